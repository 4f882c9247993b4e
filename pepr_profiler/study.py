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
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pepr_profiler import pepr, units
from pepr_profiler.errors import UsageError
from pepr_profiler.jobs import merge_jobs
from pepr_profiler.store import Filter, Store
from pepr_profiler.trace import misfit

Run: TypeAlias = Mapping[str, Any]

LABELS = {
    "energy": "PePR-E",
    "carbon": "PePR-C",
    "time": "PePR-T",
    "memory": "PePR-M",
    "memory:gpu": "PePR-M gpu",
    "memory:host": "PePR-M host",
}
"""How the paper calls the score of a resource; any other's is PePR-NAME."""

GROUPS = ("experiment", "host", "none")
"""What runs may be grouped by, each group a cohort of its own."""

_NAMED = 5  # runs that an error spells out before it only counts


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Numbers that do not fit their cohort's, and the ranking's rows that they are part of.

    `names` are the runs (or a table's rows) that have them, `what` was compared ("energy per
    time"), `why` it looks wrong. A hint for a person to look at, not a proof.
    """

    rows: tuple[int, ...]
    names: tuple[str, ...]
    what: str
    why: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranking:
    """A scored cohort of n rows and what its numbers mean; arrays and `names` are (n,), unordered.

    `label` heads the score ("PePR-E"), `of` says what a row is ("run", "model", "row"). `key` is
    the resource as it was asked for, `resource_name` how it is called; `unit` is one that
    units.format_quantity knows, a currency, or "" where only the user knows it. Every u covers
    95.45 % (k = 2, or Student's t for few repeats), NaN is unknown.

    `n` is the repeats of each row. Where n = 1, `u_pepr` lacks the spread over repeats, which
    nobody has seen (`sd_performance` and `sd_resource` are NaN): it is what is known of that run,
    and a lower bound for the model. `u_pepr` is None where nothing is known of any row.
    `standing` tells how sure the order is, None as `u_pepr`.

    `doubts` are rows that look wrong, `without` the same ranking without them.
    """

    label: str
    of: str
    names: tuple[str, ...]
    metric: str
    resource_name: str
    unit: str
    performance: pepr.Floats
    resource: pepr.Floats
    scores: pepr.Scores
    bounds_given: bool
    bounds_source: str = ""
    key: str = ""
    group: str | None = None
    provenance: str | None = None
    percent: bool = False
    transform: str | None = None
    n: npt.NDArray[np.intp] | None = None
    run_ids: tuple[tuple[str, ...], ...] = ()
    u_performance: pepr.Floats | None = None
    u_resource: pepr.Floats | None = None
    sd_performance: pepr.Floats | None = None
    sd_resource: pepr.Floats | None = None
    standing: pepr.Standing | None = None
    doubts: tuple[Doubt, ...] = ()
    without: Ranking | None = None

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """The row numbers, best score first."""
        return pepr.rank(self.scores)

    @property
    def front(self) -> pepr.Mask:
        """Which rows are on the performance/resource Pareto front."""
        return pepr.pareto_front(self.performance, self.resource)

    @property
    def u_pepr(self) -> pepr.Floats | None:
        return None if self.standing is None else self.standing.u_pepr

    @property
    def repeated(self) -> bool:
        """Whether any row is the mean of several runs."""
        return self.n is not None and bool((self.n > 1).any())

    @property
    def single(self) -> pepr.Mask:
        """Rows (n,) whose spread over repeats is unknown: one run."""
        return np.ones(len(self.names), np.bool_) if self.n is None else self.n == 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one resource, and where they are from; None is unknown or does not matter.

    `name` is what the resource is called: memory may be the GPU's or the host's.
    """

    resource: str
    unit: str
    low: float
    high: float
    name: str = ""
    group: str | None = None
    provenance: str | None = None
    metric: str | None = None
    source: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """Rankings, one for each group and resource, groups in the order of their appearance.

    `left_out` says (run, reason). `runs` are the summaries that were ranked, empty for a table.
    """

    rankings: tuple[Ranking, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    runs: tuple[Run, ...] = field(default=(), repr=False)

    @classmethod
    def from_runs(
        cls,
        runs: Iterable[Run],
        *,
        resources: Sequence[str] = ("energy",),
        metric: str | None = None,
        group: str | None = None,
        bounds: pepr.Bounds | Sequence[Limits] | None = None,
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
        chosen, gone = _chosen(_one_a_job(runs, whole))
        out = [*left_out, *gone]
        if not chosen:
            raise UsageError(
                "there is no run to compare",
                why="; ".join(f"{who} {reason}" for who, reason in out[:_NAMED])
                or "none was found",
                fix="record one: pepr-profile --experiment NAME -- CMD (see: pepr-profile runs list)",  # noqa: E501
            )
        metric, values = _performances(chosen, metric)
        p = pepr.as_performance(values, percent=percent, transform=transform)
        amounts = [_amounts(chosen, resource, price) for resource in dict.fromkeys(resources)]
        time_s = _amounts(chosen, "time", None).values
        if mix_provenance and bounds is not None:
            bounds = [replace(x, provenance=None) if isinstance(x, Limits) else x for x in bounds]  # type: ignore[misc]
        rankings: list[Ranking] = []
        refused: UsageError | None = None
        members = _groups(chosen, group)
        for value, at in members.items():
            cohort = [chosen[i] for i in at]
            models = _models(cohort)  # what their commands differ in within the group
            for amount in amounts:
                provenance = None
                if amount.energetic:
                    provenance = _provenance(cohort, allow_mixed=mix_provenance)
                    _one_scope(cohort)
                try:
                    ranking = _ranked(
                        models,
                        p[at],
                        amount.at(at),
                        runs=cohort,
                        repeats=True,
                        companions=[("time", "s", time_s[at])] if amount.energetic else (),
                        bounds=bounds,
                        metric=metric,
                        group=value,
                        provenance=provenance,
                        percent=percent,
                        transform=transform,
                    )
                except pepr.NoCohortError as error:
                    refused = error
                    what = (
                        f"{value}, by {amount.name}" if value else f"the ranking by {amount.name}"
                    )
                    out.append((what, f"{error.what}: {error.why}"))
                else:
                    rankings.append(ranking)
        if refused is not None and not rankings:
            raise refused
        return cls(rankings=tuple(rankings), left_out=tuple(out), runs=tuple(chosen))

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
        bounds: pepr.Bounds | Sequence[Limits] | None = None,
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
            amount = _Amount(resource, resource, "", values, label=label)
            for value, at in groups.items():
                companions = [
                    (column, "", duration[at])
                    for column, duration in durations.items()
                    if resource not in durations
                ]
                try:
                    ranking = _ranked(
                        [labels[i] for i in at],
                        p[at],
                        amount.at(at),
                        of="model" if repeats else "row",
                        repeats=repeats,
                        companions=companions,
                        bounds=bounds,
                        metric=performance,
                        group=None if value is None else str(value),
                        percent=percent,
                        transform=transform,
                    )
                except UsageError as error:
                    where = resource if group is None else f"{resource}, group {value!r}"
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
    def bounds(self) -> dict[tuple[str | None, str], pepr.Bounds]:
        """(r_min, r_max) of every (group, resource), in the resource's unit."""
        return {key: scores.bounds for key, scores in self.scores.items()}

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict a row and resource, best score first: `pandas.DataFrame(study.rows())`.

        SI units or the table's own, fractions; unknown is None.
        """
        return [row for ranking in self.rankings for row in flat_rows(ranking)]

    def bounds_data(self) -> dict[str, Any]:
        """What `compare --save-bounds` writes: the bounds, of what, by whom and when."""
        return {
            "schema": 1,
            "kind": "pepr-bounds",
            "made_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "made_by": _user(),
            "bounds": [
                {
                    "resource": ranking.key,
                    "name": ranking.resource_name,
                    "unit": ranking.unit or None,
                    "min": ranking.scores.bounds[0],
                    "max": ranking.scores.bounds[1],
                    "n": len(ranking.names),
                    "group": ranking.group,
                    "metric": ranking.metric,
                    "percent": ranking.percent,
                    "transform": ranking.transform,
                    "provenance": ranking.provenance,
                }
                for ranking in self.rankings
            ],
        }


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return None


def flat_rows(ranking: Ranking) -> list[dict[str, Any]]:
    """The rows of a ranking, best score first; see `Study.rows`."""
    scores, front, order = ranking.scores, ranking.front, ranking.order
    standing = ranking.standing
    doubtful = {row for doubt in ranking.doubts for row in doubt.rows}

    def column(values: npt.NDArray[Any] | None) -> list[Any]:
        if values is None:
            return [None] * len(order)
        return [x if math.isfinite(x) else None for x in values[order].tolist()]

    columns: dict[str, Sequence[Any]] = {
        "rank": range(1, len(order) + 1),
        "rank_best": column(None if standing is None else standing.best),
        "rank_worst": column(None if standing is None else standing.worst),
        "name": [ranking.names[i] for i in order],
        "n": [1] * len(order) if ranking.n is None else ranking.n[order].tolist(),
        "performance": column(ranking.performance),
        "u_performance": column(ranking.u_performance),
        "sd_performance": column(ranking.sd_performance),
        "resource": column(ranking.resource),
        "u_resource": column(ranking.u_resource),
        "sd_resource": column(ranking.sd_resource),
        "r_norm": column(scores.r_norm),
        "pepr": column(scores.pepr),
        "u_pepr": column(ranking.u_pepr),
        "swap_with_next": column(None if standing is None else standing.swap),
        "spread_known": (~ranking.single[order]).tolist(),
        "pareto": front[order].tolist(),
        "clamped": scores.clamped[order].tolist(),
        "doubtful": [i in doubtful for i in order.tolist()],
    }
    fixed = {
        "group": ranking.group,
        "metric": ranking.metric,
        "resource_key": ranking.key,
        "unit": ranking.unit or None,
        "label": ranking.label,
    }
    return [
        {**fixed, **dict(zip(columns, cells, strict=True))}
        for cells in zip(*columns.values(), strict=True)
    ]


def load(run: str | Path | Run, *, store: Path | None = None) -> dict[str, Any]:
    """The summary of a run (docs/design.md, Contract) as a dict.

    `run` is an id, a unique prefix, `last`, a run directory, a summary's file (`--json FILE`), or a
    summary. UsageError if there is no such run, TraceError for what is no recording.
    """
    if isinstance(run, Mapping):
        if reason := _unreadable(run):
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


def read_bounds(path: Path) -> tuple[Limits, ...]:
    """The bounds of a study, as `compare --save-bounds` wrote them; UsageError for all else."""
    data = _json_of(path, "bounds of a study")
    try:
        if data["kind"] != "pepr-bounds" or data["schema"] != 1:
            raise ValueError(f"it is {data['kind']!r} of schema {data['schema']!r}")
        if wrong := misfit(data, _BOUNDS):
            raise ValueError(wrong)
        if not data["bounds"]:
            raise ValueError("it has none")
        return tuple(
            Limits(
                resource=str(entry["resource"]),
                unit=str(entry["unit"] or ""),
                low=float(entry["min"]),
                high=float(entry["max"]),
                name=str(entry["name"]),
                group=entry["group"],
                provenance=entry["provenance"],
                metric=entry["metric"],
                source=path.name,
            )
            for entry in data["bounds"]
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{path} has no bounds of a study",
            why=reason,
            fix="write one: pepr-profile compare --save-bounds FILE",
        ) from error


_BOUNDS = {
    "bounds": [
        {
            **{"resource": str, "unit": (str, None), "name": str, "min": float, "max": float},
            **dict.fromkeys(("group", "provenance", "metric"), (str, None)),
        }
    ]
}


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


# --- from runs to arrays -------------------------------------------------------------------------


def _one_a_job(runs: Iterable[Run], whole: Callable[[str], Run] | None) -> list[Run]:
    """The runs, with what several profilers recorded of one job as one (see jobs.merge_jobs).

    A run around several others that are compared, the script of a sweep, stays beside them.
    """
    listed = list(runs)
    jobs = Counter(run.get("job") for run in listed)
    shared = {job for job, count in jobs.items() if job is not None and count > 1}
    inside = Counter(_outer(run) for run in listed)
    around = {outer for outer, count in inside.items() if outer is not None and count == 1}
    around &= {run.get("run_id") for run in listed} if around else set()
    if not shared and not around:
        return listed
    merged: list[Run] = []
    parts: list[Run] = []
    for run in listed:
        related = run.get("job") in shared or run.get("run_id") in around or _outer(run) in around
        (parts if related and not _unreadable(run) else merged).append(run)
    if not parts:
        return listed
    return [*merged, *merge_jobs([whole(run["run_id"]) if whole else run for run in parts])]


def _outer(run: Run) -> Any:
    return ((run.get("recording") or {}).get("outer") or {}).get("run_id")


def _chosen(runs: Iterable[Run]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The runs that can be ranked, each once, and why the others cannot."""
    chosen: dict[tuple[Any, ...], Run] = {}
    out = []
    for run in runs:
        if reason := _unreadable(run):
            out.append((str(run.get("run_id", "a run")), reason))
        elif not run["complete"]:
            out.append((_who(run), "incomplete: it was killed or still runs"))
        elif run["exit_code"]:
            out.append((_who(run), f"failed with exit status {run['exit_code']}"))
        elif run.get("signal"):
            out.append((_who(run), f"was killed by signal {run['signal']}"))
        else:
            # An id is unique in a store. Two stores may share one, a copied run shares all.
            identity = (run["run_id"], run.get("host"), run.get("started_at"))
            chosen.setdefault(identity, run)
    return list(chosen.values()), out


_READ = {"run_id", "name", "complete", "exit_code", "energy", "time_s", "memory", "metrics"}


def _unreadable(run: Run) -> str:
    """Why a mapping cannot be compared as a summary, or nothing."""
    schema = run.get("schema", 1)
    if schema != 1:
        return f"its schema is {schema!r}, this version reads 1: update pepr-profiler"
    if run.keys() >= _READ:
        return ""
    return f"it is no summary: it lacks {', '.join(sorted(_READ - run.keys()))}"


def _performances(runs: Sequence[Run], metric: str | None) -> tuple[str, pepr.Floats]:
    """The metric's name and one value a run: the named metric, or the runs' own performance."""
    found: list[tuple[str, float] | None] = []
    for run in runs:
        own = run.get("performance")
        if metric is not None and run["metrics"].get(metric) is not None:
            found.append((metric, float(run["metrics"][metric])))
        elif own is not None and metric in (None, own["metric"]):
            found.append((str(own["metric"]), float(own["value"])))
        else:
            found.append(None)
    without = [run for run, value in zip(runs, found, strict=True) if value is None]
    if without:
        known = sorted({name for run in runs for name in run["metrics"]})
        first = without[0]["run_id"]
        others = f"; or --metric with one of: {', '.join(known)}" if known else ""
        raise UsageError(
            f"no {metric or 'performance'} is known of {_listed([_who(run) for run in without])}",
            why="a score needs the performance of every run of the cohort",
            fix=f"pepr-profile runs set {first} {metric or 'accuracy'}=0.91{others}; "
            "or name the runs to compare: pepr-profile compare RUN RUN",
        )
    values = [value for value in found if value is not None]
    names = sorted({name for name, _ in values})
    if len(names) > 1:
        raise UsageError(
            "the runs' performances are not the same metric",
            why=f"they are {', '.join(names)}",
            fix=f"say which one to compare: --metric {names[0]}",
        )
    return names[0], np.array([value for _, value in values], dtype=np.float64)


def _models(runs: Sequence[Run]) -> list[str]:
    """What model each run is of: its name. Runs of one model are repeats.

    A run that was not given a name has its script's, which says nothing of the model: such runs are
    repeats only if their commands are the same, a seed apart, and are told apart by what of their
    commands differs.
    """
    names = [str(run["name"]) for run in runs]
    unnamed: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        # Most names are in no word, which is quick to see.
        words = [Path(word) for word in map(str, run.get("command") or ()) if names[i] in word]
        if any(names[i] in (word.name, word.stem, word.suffix[1:]) for word in words):
            unnamed.setdefault(names[i], []).append(i)
    for name, at in unnamed.items():
        commands = [_without_seed(runs[i]["command"]) for i in at]
        if len(set(commands)) == 1:
            continue
        in_all = set.intersection(*map(set, commands))
        for i, command in zip(at, commands, strict=True):
            own = " ".join(word for word in command if word not in in_all)
            names[i] = f"{name} {own}".rstrip()
    return names


_SEED = re.compile(r"-{0,2}(\w+[._-])?seed", re.IGNORECASE)


def _without_seed(command: Sequence[Any]) -> tuple[str, ...]:
    """A command less --seed 1, --seed=1 and seed=1, which tell repeats of one model apart."""
    words: list[str] = []
    skip = False
    for word in map(str, command):
        flag, equals, _ = word.partition("=")
        seed = _SEED.fullmatch(flag) is not None
        if not skip and not (seed and (equals or word.startswith("-"))):
            words.append(word)
        skip = seed and not equals and word.startswith("-") and not skip
    return tuple(words)


def _groups(runs: Sequence[Run], group: str | None) -> dict[str | None, list[int]]:
    """The runs' numbers by group, in order of appearance."""
    if group is not None and group not in GROUPS:
        raise UsageError(
            f"runs cannot be grouped by {group!r}",
            why=f"it is none of {', '.join(GROUPS)}",
            fix="--group experiment",
        )
    by = group or "experiment"
    cells = [None if by == "none" else run.get(by) for run in runs]
    if group is None and len(set(cells)) == 1:
        return {None: list(range(len(runs)))}
    members: dict[str | None, list[int]] = {}
    for i, cell in enumerate(cells):
        key = None if by == "none" else "no experiment" if cell is None else str(cell)
        members.setdefault(key, []).append(i)
    return members


def _provenance(runs: Sequence[Run], *, allow_mixed: bool) -> str:
    """Whether the energies are measured or modelled. UsageError if some are this, some that."""
    found = {str(run["energy"]["provenance"]) for run in runs}
    if len(found) == 1:
        return found.pop()
    if allow_mixed:
        return "mixed"
    kinds: dict[str, list[str]] = {}
    for run in runs:
        kinds.setdefault(str(run["energy"]["provenance"]), []).append(_who(run))
    raise UsageError(
        f"{' and '.join(sorted(kinds))} energies are not comparable",
        why="; ".join(f"{kind}: {_listed(names)}" for kind, names in sorted(kinds.items())),
        fix="compare runs of one kind by naming them, or ask for it: --mix-provenance",
    )


def _one_scope(runs: Sequence[Run]) -> None:
    """UsageError if some energies are the job's share of its devices, and some all they took."""
    whole = [_who(run) for run in runs if run["energy"].get("scope", "job") == "device"]
    if 0 < len(whole) < len(runs):
        raise UsageError(
            "energies of jobs and of whole devices are not comparable",
            why=f"{_listed(whole)} recorded with --scope device, the others without",
            fix="compare runs of one scope by naming them",
        )


@dataclass(frozen=True, eq=False)
class _Amount:
    """What of a resource n runs or rows took; `u` has k = 2 and is NaN where it is unknown.

    `per_j` (n,) is what one joule is of it, where it follows from the energy: then its errors are
    the energy's, some of which the runs share.
    """

    key: str
    name: str
    unit: str
    values: pepr.Floats
    u: pepr.Floats | None = None
    per_j: pepr.Floats | None = None
    label: str = ""

    @property
    def energetic(self) -> bool:
        return self.per_j is not None

    def at(self, rows: Sequence[int] | npt.NDArray[Any]) -> _Amount:
        """The same of some of the rows."""
        return replace(
            self,
            values=self.values[rows],
            u=None if self.u is None else self.u[rows],
            per_j=None if self.per_j is None else self.per_j[rows],
        )


def _amounts(runs: Sequence[Run], resource: str, price: tuple[float, str] | None) -> _Amount:
    """A resource of every run. UsageError if it is unknown of any."""
    if resource in ("energy", "carbon", "cost"):
        return _energetic(runs, resource, price)
    if resource == "time":
        values = [run["time_s"] for run in runs]
        name, unit, fix = "time", "s", "name the runs to compare: pepr-profile compare RUN RUN"
    elif resource.partition(":")[0] == "memory":
        gpu = [run["memory"]["gpu_peak_bytes"] for run in runs]
        on_gpu = resource == "memory:gpu" or (resource == "memory" and all(gpu))
        if resource not in LABELS:
            raise _no_such(resource, runs)
        values = gpu if on_gpu else [run["memory"]["peak_rss_bytes"] for run in runs]
        name, unit = "GPU memory" if on_gpu else "peak RSS", "B"
        sensor = "nvml" if on_gpu else "processes"
        fix = f"profile again with the {sensor} sensor, or rank by energy: --resource energy"
    else:
        values = [run["metrics"].get(resource) for run in runs]
        if all(value is None for value in values):
            raise _no_such(resource, runs)
        name, unit = resource, ""
        fix = f"pepr-profile runs set RUN {resource}=VALUE"
    _require(runs, values, what="peak memory" if unit == "B" else name, fix=fix)
    label = LABELS.get(resource, f"PePR-{resource}")
    return _Amount(resource, name, unit, np.array(values, dtype=np.float64), label=label)


def _energetic(runs: Sequence[Run], resource: str, price: tuple[float, str] | None) -> _Amount:
    total = [run["energy"]["total_j"] for run in runs]
    _require(runs, total, what="energy", fix="pepr-profile sensors says what can be measured")
    energy_j = np.array(total, dtype=np.float64)
    unit, per_j = "J", np.ones(len(runs))
    if resource == "carbon":
        grams = [(run.get("carbon") or {}).get("g_co2e") for run in runs]
        _require(
            runs,
            grams,
            what="carbon",
            fix="profile with --region CODE or --carbon-intensity G_PER_KWH, "
            "or rank by energy: --resource energy",
        )
        unit = "g"
        with np.errstate(divide="ignore", invalid="ignore"):
            per_j = np.array(grams, dtype=np.float64) / energy_j
        values = np.array(grams, dtype=np.float64)
    else:
        if resource == "cost":
            if price is None:
                raise UsageError(
                    "the cost needs the price of a kWh",
                    why="it differs by place and contract",
                    fix="--price 0.30EUR",
                )
            unit, per_j = price[1], np.full(len(runs), price[0] / units.J_PER_KWH)
        values = energy_j * per_j
    u_j = np.array([_or_nan(run["energy"]["u_j"]) for run in runs], dtype=np.float64)
    label = LABELS.get(resource, f"PePR-{resource}")
    return _Amount(resource, resource, unit, values, u_j * per_j, per_j, label)


def _no_such(resource: str, runs: Sequence[Run]) -> UsageError:
    metrics = sorted({name for run in runs for name in run["metrics"]})
    known = ["energy", "carbon", "time", "memory", "memory:gpu", "memory:host", "cost", *metrics]
    return UsageError(
        f"there is no resource {resource!r}",
        why=f"it is neither measured nor logged by any of these runs, which have: {_listed(known, limit=20)}",  # noqa: E501
        fix="--resource with one of these",
    )


_SHARED = {"gain_j": 1.0, "offset_j": 1.0, "model_j": 0.5}
"""Causes of error that all runs on a device share, and how much of their variance. A sensor's gain
and offset are fixed for its board; a power model is off by a part that is the machine's and a part
that depends on the load (half each: a judgement)."""


def _shared_errors_j(runs: Sequence[Run]) -> pepr.Floats:
    """One line (n,) a device and cause: what one standard uncertainty of it does to each run, J."""
    devices: dict[tuple[str, str], list[tuple[int, Mapping[str, float]]]] = defaultdict(list)
    for index, run in enumerate(runs):
        host = str(run.get("host"))
        for component in run["energy"].get("components") or ():
            budget = component.get("budget")
            if component["in_total"] and budget:  # without: all of its u counts as the run's own
                devices[host, component["id"]].append((index, budget))
    lines = []
    for budgets in devices.values():
        at = [index for index, _ in budgets]
        for cause, part in _SHARED.items():
            moves = np.array([budget[cause] for _, budget in budgets], dtype=np.float64)
            if moves.any():
                lines.append((at, math.sqrt(part) * moves))
    shared = np.zeros((len(lines), len(runs)))
    for line, (at, moves) in zip(shared, lines, strict=True):
        line[at] = moves
    return shared


# --- from arrays to rankings ---------------------------------------------------------------------


def _ranked(
    names: Sequence[str],
    p: pepr.Floats,
    amount: _Amount,
    *,
    runs: Sequence[Run] = (),
    repeats: bool = False,
    companions: Sequence[tuple[str, str, pepr.Floats]] = (),
    bounds: pepr.Bounds | Sequence[Limits] | None = None,
    check: bool = True,
    **facts: Any,
) -> Ranking:
    """The ranking of n runs or rows; with `repeats` those of one name become one row.

    `companions` are name, unit and values of what the resource grows with. `facts` are fields of
    the Ranking.
    """
    limits = _limits(bounds, amount, facts.get("group"), facts.get("provenance"))
    fixed = None if limits is None else (limits.low, limits.high)
    models = list(dict.fromkeys(names)) if repeats else list(names)
    number = {name: i for i, name in enumerate(models)}
    index = np.array([number[name] for name in names]) if repeats else np.arange(len(names))
    values = amount.values
    # Before the means hide them.
    pepr.checked(p, values, names=names)
    shown: dict[str, Any] = {"performance": p, "resource": values}
    standing = None
    if repeats:
        shared = np.empty((0, len(p)))
        if amount.per_j is not None:
            shared = _shared_errors_j(runs) * amount.per_j
        # Without an u of its own a resource counts as recorded; what repeats show comes on top.
        u = np.zeros(len(p)) if amount.u is None else amount.u
        own = np.sqrt(np.maximum(u**2 / 4 - np.sum(shared**2, axis=0), 0.0))
        means = pepr.average(index, p, values, u_r=own, shared=shared)
        once = means.n == 1
        shown = {
            "performance": means.performance,
            "resource": means.resource,
            "n": means.n,
            "u_performance": np.where(once, np.nan, means.errors.u_p),
            "u_resource": np.where(once & (amount.u is None), np.nan, means.errors.u_r),
            "sd_performance": means.sd_p,
            "sd_resource": means.sd_r,
        }
        if not (once.all() and (amount.u is None or np.isnan(amount.u).all())):
            standing = pepr.standing(means.performance, means.resource, means.errors, bounds=fixed)
    scores = pepr.score(shown["performance"], shown["resource"], bounds=fixed, names=models)
    doubts: tuple[Doubt, ...] = ()
    without = None
    if check:
        odd, doubts = _doubts(
            amount, companions, lambda i: _who(runs[i]) if runs else names[i], index
        )
        if doubts:
            good = np.flatnonzero(~odd).tolist()
            try:
                without = _ranked(
                    [names[i] for i in good], p[good], amount.at(good),
                    runs=[runs[i] for i in good] if runs else (), repeats=repeats,
                    bounds=bounds, check=False, **facts,
                )  # fmt: skip
            except pepr.NoCohortError:
                without = None  # what is left has no span
    several = repeats and len(models) < len(names)
    return Ranking(
        **{"of": "model" if several else "run" if runs else "row", **facts},
        label=amount.label,
        names=tuple(models),
        resource_name=amount.name,
        key=amount.key,
        unit=amount.unit,
        scores=scores,
        bounds_given=limits is not None,
        bounds_source=limits.source if limits else "",
        run_ids=_members(index, len(models), [str(run["run_id"]) for run in runs]),
        standing=standing,
        doubts=doubts,
        without=without,
        **shown,
    )


def _members(
    index: npt.NDArray[np.intp], models: int, ids: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """The ids of each model's runs; nothing for the rows of a table."""
    if not ids:
        return ()
    if models == len(ids):
        return tuple((x,) for x in ids)
    members: list[list[str]] = [[] for _ in range(models)]
    for i, x in zip(index.tolist(), ids, strict=True):
        members[i].append(x)
    return tuple(map(tuple, members))


def _limits(
    bounds: pepr.Bounds | Sequence[Limits] | None,
    amount: _Amount,
    group: str | None,
    provenance: str | None,
) -> Limits | None:
    """The bounds that hold for a cohort's resource; None: the cohort's own."""
    if bounds is None:
        return None
    entries = [entry for entry in bounds if isinstance(entry, Limits)]
    if not entries:
        low, high = (float(x) for x in bounds if not isinstance(x, Limits))
        return Limits(resource=amount.key, unit=amount.unit, low=low, high=high)
    source = entries[0].source
    same = [entry for entry in entries if entry.resource == amount.key]
    if not same:
        raise UsageError(
            f"{source} has no bounds of {amount.key}",
            why=f"it has those of {_listed(sorted({entry.resource for entry in entries}))}",
            fix="name one of these: --resource, or bounds of the same study and resource",
        )
    found = [entry for entry in same if entry.group == group] or (same if len(same) == 1 else [])
    if not found:
        raise UsageError(
            f"{source} has no bounds of {amount.key} for {group or 'a cohort without a group'}",
            why=f"its groups are {_listed([str(entry.group) for entry in same])}",
            fix="compare runs of one of these groups: --experiment NAME --group experiment",
        )
    entry = found[0]
    if entry.name not in ("", amount.name):
        raise UsageError(
            f"{source} has bounds of {entry.name}",
            why=f"here it is {amount.name}",
            fix="compare the same kind: --resource memory:gpu or memory:host",
        )
    if entry.unit != amount.unit:
        raise UsageError(
            f"{source} has bounds of {amount.key} in {entry.unit or 'no unit'}",
            why=f"here it is in {amount.unit or 'no unit'}",
            fix="compare in the same unit (--price for a cost), or give --bounds MIN:MAX",
        )
    kinds = {entry.provenance, provenance}
    if len(kinds - {None, "mixed"}) > 1:
        raise UsageError(
            f"{source} has bounds of {entry.provenance} energies, these are {provenance}",
            why="measured and modelled energies are not comparable",
            fix="use bounds of the same kind, or ask for it: --mix-provenance",
        )
    return entry


def _doubts(
    amount: _Amount,
    companions: Sequence[tuple[str, str, pepr.Floats]],
    who: Callable[[int], str],
    index: npt.NDArray[np.intp],
) -> tuple[pepr.Mask, tuple[Doubt, ...]]:
    """Which runs or rows (n,) look wrong beside the others, and what to say of them."""
    odd = np.zeros(len(index), dtype=np.bool_)
    ratio, what, unit = amount.values, amount.name, amount.unit
    if unit == "B":
        # Models of one study may need very different memory, but a slip of units is a factor 1000.
        odd = pepr.out_of_proportion(ratio, jump=30.0)
    for name, of_companion, values in companions:
        odd = pepr.out_of_proportion(amount.values, values)
        if odd.any():
            ratio, what = amount.values / values, f"{amount.name} per {name}"
            unit = "W" if (amount.unit, of_companion) == ("J", "s") else ""
            break
    if not odd.any():
        return odd, ()
    doubt = Doubt(
        rows=tuple(np.unique(index[odd]).tolist()),
        names=tuple(who(i) for i in np.flatnonzero(odd).tolist()),
        what=what,
        why=f"it is {_span(ratio[odd], unit)}, in the other {int((~odd).sum())} "
        + _span(ratio[~odd], unit),
    )
    return odd, (doubt,)


def _span(values: pepr.Floats, unit: str) -> str:
    low, high = float(values.min()), float(values.max())
    ends = dict.fromkeys(
        units.format_quantity(x, unit) if unit else f"{x:.3g}" for x in (low, high)
    )
    return " … ".join(ends)


def _require(runs: Sequence[Run], values: Sequence[float | None], *, what: str, fix: str) -> None:
    """UsageError that names the runs whose value is unknown (None, or NaN)."""
    lacking = [
        _who(run) for run, value in zip(runs, values, strict=True) if math.isnan(_or_nan(value))
    ]
    if lacking:
        raise UsageError(
            f"no {what} is known of {_listed(lacking)}",
            why="an unknown resource is not 0, and the cohort's bounds depend on every run",
            fix=fix,
        )


def _listed(items: Sequence[str], *, limit: int = _NAMED) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _who(run: Run) -> str:
    name, run_id = str(run["name"]), str(run["run_id"])
    return run_id if run_id.startswith(name) else f"{name} ({run_id})"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
