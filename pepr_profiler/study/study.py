"""A study: runs, or the rows of a table, weighed against resources and ranked by PePR.

    study = Study.from_store(experiment="sizes", resources=("energy", "time"))
    study.rank("time").scores.pepr     # in the order of study.rank("time").names
    pandas.DataFrame(study.rows())     # a row a model and resource

Repeats of one model (runs of the same name) are one row, with the means of their performance and
resource, their spread and their number.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pepr_profiler.errors import UsageError
from pepr_profiler.store.index import Filter
from pepr_profiler.store.runs import Store
from pepr_profiler.study import pepr
from pepr_profiler.study.cohort import Cohort, Run, unreadable_as_summary
from pepr_profiler.study.ranking import Amount, Bounds, Ranking, flat_rows, ranked

_NAMED = 5  # runs that an error spells out before it only counts


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """Rankings, one for each group and resource, groups in the order of their appearance.

    `left_out` says (run, reason). `runs` are the summaries that were ranked, empty for a table;
    those from a store are made when they are asked for.
    """

    rankings: tuple[Ranking, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    runs: Sequence[Run] = field(default=(), repr=False)

    @classmethod
    def from_runs(
        cls,
        runs: Iterable[Run],
        *,
        resources: Sequence[str] = ("energy",),
        metric: str | None = None,
        group: str | None = None,
        bounds: pepr.MinMax | Sequence[Bounds] | None = None,
        percent: bool = False,
        transform: str | None = None,
        mix_provenance: bool = False,
        price: tuple[float, str] | None = None,
        left_out: Sequence[tuple[str, str]] = (),
        whole: Callable[[str], Run] | None = None,
    ) -> Study:
        """Of summaries (docs/design.md, Contract), such as `load` gives.

        A resource is energy, carbon, time, memory (the GPU's peak where all runs have one, else the
        host's), memory:gpu, memory:host, cost (with `price` a kWh and its currency), or any metric
        that the runs logged. `metric` is the performance, without it the runs' own. `group` is one
        of GROUPS; without it the experiment, if there are several. `bounds` fix those of the one
        resource, or are those of a study (`read_bounds`).

        Runs that failed, are incomplete, of a newer version, or given twice are left out and named,
        and so are groups that are no cohort. UsageError for a run without the metric or a resource,
        for runs whose own performance is not the same metric, for measured beside modelled energy
        in one cohort (unless `mix_provenance`), for bounds of another resource, and when nothing is
        left.
        """
        chosen, gone = Cohort.of(runs, whole)
        out = [*left_out, *gone]
        if not len(chosen):
            raise UsageError(
                "there is no run to compare",
                why="; ".join(f"{who} {reason}" for who, reason in out[:_NAMED])
                or "none was found",
                fix="record one: pepr-profile --experiment NAME -- CMD (see: pepr-profile runs list)",  # noqa: E501
            )
        metric, values = chosen.performance(metric)
        p = pepr.as_performance(values, percent=percent, transform=transform)
        amounts = [chosen.amount(resource, price) for resource in dict.fromkeys(resources)]
        time_s = chosen.amount("time", None).values
        if mix_provenance and bounds is not None:
            bounds = [replace(x, provenance=None) if isinstance(x, Bounds) else x for x in bounds]  # type: ignore[misc]
        rankings: list[Ranking] = []
        refused: UsageError | None = None
        for value, at in chosen.groups(group).items():
            cohort = chosen.at(at)
            models = cohort.models()  # what their commands differ in within the group
            for of_all in amounts:
                amount, provenance = of_all.at(at), None
                if amount.energetic:
                    provenance = cohort.provenance(allow_mixed=mix_provenance)
                    amount = cohort.with_shared_errors(amount)
                try:
                    ranking = ranked(
                        models,
                        p[at],
                        amount,
                        ids=cohort.ids,
                        called=cohort.label,
                        repeats=True,
                        companions=[("time", "s", time_s[at])] if amount.energetic else (),
                        bounds=bounds,
                        metric=metric,
                        group=value,
                        grouped_by=group or "experiment",
                        provenance=provenance,
                        percent=percent,
                        transform=transform,
                    )
                except pepr.NoCohortError as error:
                    refused = error
                    of = f" of {value}" if value else ""
                    what = f"the ranking{of} by {amount.name}"
                    out.append((what, f"{error.what}: {error.why}"))
                else:
                    rankings.append(ranking)
        if refused is not None and not rankings:
            gone_too = [f"{who}: {why}" for who, why in out if not why.startswith(refused.what)]
            raise pepr.NoCohortError(
                refused.what,
                why=refused.why + "".join(f"; left out {what}" for what in gone_too[:_NAMED]),
                fix=refused.fix,
            )
        return cls(rankings=tuple(rankings), left_out=tuple(out), runs=chosen.summaries)

    @classmethod
    def from_store(
        cls,
        store: Store | Path | str | None = None,
        *,
        experiment: str | None = None,
        runs: Sequence[str] = (),
        **options: Any,
    ) -> Study:
        """Of recorded runs: those named by id or prefix, an experiment's, or all of the store.

        `options` are those of `from_runs`. Runs that are named are one cohort unless a group
        is.
        """
        recorded = store if isinstance(store, Store) else Store(Path(store) if store else None)
        if runs:
            options = {**options, "group": options.get("group") or "none"}
            summaries = [recorded.load(ref) for ref in runs]
            return cls.from_runs(
                (run for run in summaries if experiment in (None, run["experiment"])), **options
            )
        found = recorded.find(Filter(experiment=experiment))
        bad = [(damaged.run_id, damaged.why) for damaged in found.damaged]
        return cls.from_runs(found, left_out=bad, whole=recorded.load, **options)

    @classmethod
    def from_table(
        cls,
        columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]],
        *,
        performance: str,
        resources: Sequence[str],
        name: str | None = None,
        group: str | None = None,
        time: str | Sequence[str] | None = None,
        bounds: pepr.MinMax | Sequence[Bounds] | None = None,
        percent: bool = False,
        transform: str | None = None,
        repeats: bool = False,
    ) -> Study:
        """Of columns (n,) of a table: a mapping of sequences, or a pandas.DataFrame.

        Every row is ranked; with `repeats` those of one name are repeats of a model. `time`
        names columns of durations, which resources that grow with them are checked against.
        """
        p = pepr.as_performance(columns[performance], percent=percent, transform=transform)
        labels = (
            [str(x) for x in columns[name]] if name else [f"row {i + 1}" for i in range(len(p))]
        )
        cells = [None] * len(p) if group is None else list(columns[group])
        groups: dict[Any, list[int]] = {}
        for i, cell in enumerate(cells):
            groups.setdefault(cell, []).append(i)
        durations = {
            column: np.asarray(columns[column], dtype=np.float64)
            for column in ([time] if isinstance(time, str) else time or ())
        }
        rankings = []
        for resource in dict.fromkeys(resources):
            values = np.asarray(columns[resource], dtype=np.float64)
            label = f"PePR-{resource}" if len(resources) > 1 else "PePR"
            amount = Amount(resource, resource, "", values, label=label)
            for value, at in groups.items():
                companions = [
                    (column, "", duration[at])
                    for column, duration in durations.items()
                    if resource not in durations
                ]
                try:
                    ranking = ranked(
                        [labels[i] for i in at],
                        p[at],
                        amount.at(at),
                        of="model" if repeats else "row",
                        repeats=repeats,
                        companions=companions,
                        bounds=bounds,
                        metric=performance,
                        group=None if value is None else str(value),
                        grouped_by=(group or "").strip("\0"),
                        percent=percent,
                        transform=transform,
                    )
                except UsageError as error:
                    where = resource
                    if group is not None:
                        where += ", " + f"{group} {value!r}".lstrip("\0")
                    raise type(error)(
                        f"{where}: {error.what}", why=error.why, fix=error.fix
                    ) from error
                rankings.append(ranking)
        return cls(rankings=tuple(rankings))

    def rank(self, resource: str | None = None, group: str | None = None) -> Ranking:
        """The ranking by a resource (of a group); the first where there is no choice to make."""
        for ranking in self.rankings:
            if resource in (None, ranking.key) and group in (None, ranking.group):
                return ranking
        known = ", ".join(f"{r.key} of {r.group}" if r.group else r.key for r in self.rankings)
        raise UsageError(
            f"there is no ranking by {resource or 'that'}" + (f" of {group}" if group else ""),
            why=f"this study has: {known or 'none'}",
            fix="name one of these, or make the study with that resource",
        )

    @property
    def scores(self) -> dict[tuple[str | None, str], pepr.Scores]:
        """The scores of every (group, resource), in the order of the ranking's `names`."""
        return {(ranking.group, ranking.key): ranking.scores for ranking in self.rankings}

    @property
    def bounds(self) -> dict[tuple[str | None, str], pepr.MinMax]:
        """(r_min, r_max) of every (group, resource), in the resource's unit."""
        return {key: scores.bounds for key, scores in self.scores.items()}

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict a row and resource, best score first: `pandas.DataFrame(study.rows())`.

        SI units or the table's own, fractions; unknown is None.
        """
        return [row for ranking in self.rankings for row in flat_rows(ranking)]

    def bounds_data(self) -> dict[str, Any]:
        """What `compare --save-range` writes: the bounds, of what, by whom and when."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Bounds.saved(self.rankings, made_at=now, made_by=_user())


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return None


def load(run: str | Path | Run, *, store: Path | None = None) -> dict[str, Any]:
    """The summary of a run (docs/design.md, Contract) as a dict.

    `run` is an id, a unique prefix, `last`, a run directory, a summary's file (`--json FILE`), or a
    summary. UsageError if there is no such run, TraceError for what is no recording.
    """
    if isinstance(run, Mapping):
        if reason := unreadable_as_summary(run):
            raise UsageError(
                "this mapping is no summary of a run",
                why=reason,
                fix="give what `pepr-profile run --json FILE` wrote, or a run's id",
            )
        return dict(run)
    path = Path(run)
    if path.is_file():
        return load(_json_of(path, "a summary of a run"))
    return Store(store).load(str(run))


def read_bounds(path: Path) -> tuple[Bounds, ...]:
    """The bounds of a study, as `compare --save-range` wrote them; UsageError for all else."""
    data = _json_of(path, "normalisation range")
    try:
        return Bounds.read(data, source=path.name)
    except ValueError as error:
        raise UsageError(
            f"{path} has no normalisation range",
            why=str(error),
            fix="save one: pepr-profile compare --save-range FILE",
        ) from error


def _json_of(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} has no {what}",
            why=(error.strerror if isinstance(error, OSError) else None) or str(error),
            fix="name a JSON file that pepr-profile wrote",
        ) from error
    return data
