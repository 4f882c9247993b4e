"""A study: runs, or the rows of a table, ranked by PePR for each resource.

    study = Study.from_store(experiment="sizes", resources=("energy", "time"))
    study.rank("time").scores.pepr     # in the order of study.rank("time").names
    pandas.DataFrame(study.rows())     # one row per model and resource

Runs of the same name are repeats of one model, and one row: the means of their performance and
resource, with their spread and number.
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
from pepr_profiler.record import Floats
from pepr_profiler.store.index import Filter
from pepr_profiler.store.runs import Store
from pepr_profiler.study import pepr
from pepr_profiler.study.cohort import Cohort, Run, unreadable_as_summary
from pepr_profiler.study.outliers import Companion, find_evidence
from pepr_profiler.study.ranking import Amount, Bounds, Ranking, flat_rows, make_ranking
from pepr_profiler.trace.files import read_given_file

_NAMED = 5  # runs that an error spells out before it only counts


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """Rankings by PePR, one for each group and resource, groups in order of appearance.

    `left_out` are (run, reason) of what could not be ranked. `runs` are the summaries of the runs
    that were, none for a table. From a store each summary is made when it is asked for.
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
        command: str = "",
    ) -> Study:
        """Ranks summaries (docs/design.md, Contract), such as `load` returns.

        Resources are energy, carbon, time, memory (the GPU's peak if all runs have one, else the
        host's), memory:gpu, memory:host, cost (`price` is that of a kWh and its currency), or any
        metric that the runs logged. The performance is `metric`, by default each run's own;
        `percent` and `transform` as in `as_performance`. Runs are grouped by `group`, one of
        "experiment", "host" and "none", by default by experiment if there are several. `bounds`
        are (min, max) of the one resource, or those of a study (`read_bounds`).

        Runs that failed, are incomplete, are from a newer version or were given twice are left
        out, and so are groups whose resources are all equal. Rankings by energy, carbon or cost
        leave out runs whose total is unknown, lacks a device for a time, or one that the others
        have, and estimated ones among more that are measured (unless `mix_provenance`).
        `left_out` adds to these. `whole` gives the whole summary for an id where `runs` are short
        ones. `command` is what a user typed, which an error completes.

        UsageError for a run without the metric or a resource, for runs of one group whose own
        performances are different metrics (of several groups such a one is left out), for measured
        and modelled energies in one group (unless `mix_provenance`), for bounds of another
        resource, and when no run is left.
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
        chosen, grouped, performances = _with_performance(
            chosen, out, group=group, metric=metric, transform=transform, command=command
        )
        p = np.concatenate([values for _, values in performances])
        p = pepr.as_performance(p, percent=percent, transform=transform)
        amounts = [chosen.amount(resource, price) for resource in dict.fromkeys(resources)]
        time_s = chosen.amount("time", None).values
        if mix_provenance and bounds is not None:
            bounds = [replace(x, provenance=None) if isinstance(x, Bounds) else x for x in bounds]  # type: ignore[misc]
        rankings: list[Ranking] = []
        refused: UsageError | None = None
        lacking: dict[int, str] = {}
        if any(amount.energetic for amount in amounts):
            for _, of_group in grouped:
                found = chosen.at(of_group).not_comparable(allow_mixed=mix_provenance)
                lacking |= {of_group[i]: why for i, why in found.items()}
        out += [(chosen.label(i), why) for i, why in sorted(lacking.items())]
        kept = {
            amount.key: [
                [i for i in of_group if not (amount.energetic and i in lacking)]
                for _, of_group in grouped
            ]
            for amount in amounts
        }
        evidence = {
            amount.key: find_evidence(
                amount.values,
                kept[amount.key],
                [Companion(name="time", unit="s", values=time_s)] if amount.energetic else [],
                name=amount.name,
                unit=amount.unit,
                who=chosen.label,
            )
            for amount in amounts
        }
        for number, (value, of_group) in enumerate(grouped):
            every = chosen.at(of_group)
            # What their commands differ in within the group.
            names = dict(zip(of_group, every.models(), strict=True))
            for of_all in amounts:
                at = kept[of_all.key][number]
                if not at:
                    refused = pepr.NoCohortError(
                        f"no run can be ranked by {of_all.name}",
                        why="; ".join(
                            f"{chosen.label(i)}: {lacking[i]}" for i in of_group[:_NAMED]
                        ),
                        fix="record them again; see the warnings: pepr-profile report RUN",
                    )
                    continue
                cohort, models = chosen.at(at), [names[i] for i in at]
                amount, provenance = of_all.at(at), None
                if amount.energetic:
                    provenance = cohort.provenance(allow_mixed=mix_provenance)
                    amount = cohort.with_shared_errors(amount)
                try:
                    ranking = make_ranking(
                        models,
                        p[at],
                        amount,
                        ids=cohort.ids,
                        called=cohort.label,
                        repeats=True,
                        evidence=evidence[of_all.key][number].within(at),
                        bounds=bounds,
                        metric=performances[number][0],
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
        return cls(rankings=_defined(rankings, out), left_out=tuple(out), runs=chosen.summaries)

    @classmethod
    def from_store(
        cls,
        store: Store | Path | str | None = None,
        *,
        experiment: str | None = None,
        runs: Sequence[str] = (),
        **options: Any,
    ) -> Study:
        """Ranks recorded runs: those named by id or prefix, of an experiment, or all of a store.

        `options` are those of `from_runs`. Runs that are named are one group, unless `group` is
        given.
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
        if not (len(found) or bad):
            of = f" of experiment '{experiment}'" if experiment else ""
            raise UsageError(
                f"there is no run{of} to compare",
                why=f"the store {recorded.path} has none",
                fix=f"see: pepr-profile runs list --store {recorded.path}; record one: "
                "pepr-profile --experiment NAME -- CMD",
            )
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
        unit_of: Mapping[str, str] | None = None,
    ) -> Study:
        """Ranks the rows of a table: a mapping of columns (n,), or a pandas.DataFrame.

        The other arguments name columns, but for `bounds`, `percent` and `transform`, which are as
        in `from_runs`. `unit_of` is the unit of each resource's numbers where it is known, such as
        {"energy": "kWh"}. `time` are durations, which help to find outliers of the resources. Every
        row is ranked by itself; with `repeats`, rows of one name are repeats of a model. Groups
        that cannot be ranked, such as one of one row, are left out. UsageError where no other is.
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

        def who(row: int) -> str:
            return labels[row] if group is None else f"{labels[row]} of {cells[row]}"

        rankings: list[Ranking] = []
        out: list[tuple[str, str]] = []
        refused: UsageError | None = None
        for resource in dict.fromkeys(resources):
            values = np.asarray(columns[resource], dtype=np.float64)
            label = f"PePR-{resource}" if len(resources) > 1 else "PePR"
            unit = (unit_of or {}).get(resource, "")
            amount = Amount(resource, resource, unit, values, label=label)
            companions = [
                Companion(name=column, unit="", values=duration)
                for column, duration in durations.items()
                if resource not in durations
            ]
            evidence = find_evidence(
                values, list(groups.values()), companions, name=resource, unit=unit, who=who
            )
            for (value, at), of_group in zip(groups.items(), evidence, strict=True):
                try:
                    ranking = make_ranking(
                        [labels[i] for i in at],
                        p[at],
                        amount.at(at),
                        of="model" if repeats else "row",
                        repeats=repeats,
                        evidence=of_group.within(at),
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
                    named = type(error)(f"{where}: {error.what}", why=error.why, fix=error.fix)
                    if not isinstance(error, pepr.NoCohortError):
                        raise named from error
                    refused = refused or named
                    out.append((f"the ranking of {where}", f"{error.what}: {error.why}"))
                else:
                    rankings.append(ranking)
        if refused is not None and not rankings:
            raise refused
        return cls(rankings=_defined(rankings, out), left_out=tuple(out))

    def rank(self, resource: str | None = None, group: str | None = None) -> Ranking:
        """The ranking by this resource and of this group, by default the first. UsageError if there
        is none.
        """
        for ranking in self.rankings:
            if resource in (None, ranking.key) and group in (None, ranking.group):
                return ranking
        known = ", ".join(f"{r.key} of {r.group}" if r.group else r.key for r in self.rankings)
        raise UsageError(
            f"there is no ranking by {resource or 'that'}" + (f" of {group}" if group else ""),
            why=f"this study has: {known or 'none'}",
            fix="name one of these, or make the study with that resource",
        )

    def by_group(self) -> dict[str | None, list[Ranking]]:
        """The rankings of each group, one a resource."""
        groups: dict[str | None, list[Ranking]] = {}
        for ranking in self.rankings:
            groups.setdefault(ranking.group, []).append(ranking)
        return groups

    @property
    def scores(self) -> dict[tuple[str | None, str], pepr.Scores]:
        """The scores for each (group, resource), in the order of that ranking's `names`."""
        return {(ranking.group, ranking.key): ranking.scores for ranking in self.rankings}

    @property
    def bounds(self) -> dict[tuple[str | None, str], pepr.MinMax]:
        """(r_min, r_max) for each (group, resource), in the unit of the resource."""
        return {key: scores.bounds for key, scores in self.scores.items()}

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict for each row of each ranking, best score first.

        Numbers are in SI units or the table's own, shares are fractions, None is unknown.
        `pandas.DataFrame(study.rows())` makes a table of them.
        """
        return [row for ranking in self.rankings for row in flat_rows(ranking)]

    def bounds_data(self) -> dict[str, Any]:
        """The JSON that `compare --save-range` writes: the bounds of each ranking, who made them
        and when.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Bounds.saved(self.rankings, made_at=now, made_by=_user())


def _with_performance(
    chosen: Cohort,
    out: list[tuple[str, str]],
    *,
    group: str | None,
    **options: Any,  # of Cohort.performance
) -> tuple[Cohort, list[tuple[str | None, list[int]]], list[tuple[str, Floats]]]:
    """The runs of the groups that can be ranked, one group behind the other, the numbers of each,
    and its metric with the values.

    Of several groups those whose runs have no common performance go to `out`. UsageError where no
    other is.
    """
    groups = chosen.groups(group)
    kept: list[int] = []
    grouped: list[tuple[str | None, list[int]]] = []
    performances = []
    refused: UsageError | None = None
    for value, of_group in groups.items():
        try:
            performances.append(chosen.at(of_group).performance(**options))
        except UsageError as error:
            refused = refused or error
            out.append((f"{group or 'experiment'} {value}", f"{error.what}: {error.why}"))
            continue
        grouped.append((value, list(range(len(kept), len(kept) + len(of_group)))))
        kept += of_group
    if refused is not None and not grouped:
        raise refused
    return chosen.at(kept), grouped, performances


def _defined(rankings: Sequence[Ranking], out: list[tuple[str, str]]) -> tuple[Ranking, ...]:
    """The rankings that have scores, if any has; the others go to `out`."""
    if all(ranking.undefined for ranking in rankings):
        return tuple(rankings)
    for ranking in rankings:
        if ranking.undefined:
            of = f" of {ranking.group}" if ranking.group else ""
            what = f"the ranking{of} by {ranking.resource_name}"
            out.append((what, f"all resources are equal, {ranking.scores.bounds[0]:g}: R is 0/0"))
    return tuple(ranking for ranking in rankings if not ranking.undefined)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return None


def load(run: str | Path | Run, *, store: Path | None = None) -> dict[str, Any]:
    """The summary of a run (docs/design.md, Contract) as a dict.

    `run` is an id, a unique prefix of one, `last`, a run directory, a file that `--json FILE`
    wrote, or a summary. `store` is where runs are looked for. UsageError if there is no such run,
    TraceError if it is no recording.
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
    """The bounds in a file that `compare --save-range` wrote. UsageError for any other file."""
    data = _json_of(path, "normalisation range")
    try:
        return Bounds.read(data, source=path.name)
    except ValueError as error:
        raise UsageError(
            f"{path} has no normalisation range",
            why=str(error),
            fix="save one: pepr-profile compare --save-range FILE",
        ) from error


_MOST_BYTES = 4 << 20
"""The size of a file of normalisation ranges; one of 100 resources and groups has 40 kB."""


def _json_of(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(read_given_file(path, most_bytes=_MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        unread = error.strerror if isinstance(error, OSError) else f"it is no JSON file: {error}"
        data, why = None, unread or str(error)
    else:
        why = "it is no JSON object"
    if not isinstance(data, dict):
        raise UsageError(
            f"{path} has no {what}",
            why=why,
            fix="name a JSON file that pepr-profile wrote",
        )
    return data
