"""The ranking of a cohort: its repeats averaged, its bounds chosen, its outliers named.

`cohort` makes the numbers that are ranked from runs, `study` from runs or a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pepr_profiler import units
from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats, Mask
from pepr_profiler.study import pepr
from pepr_profiler.study.pepr import listed
from pepr_profiler.trace.shape import shape_error


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """Runs whose numbers do not fit the others': a hint for a person to look at, not a proof.

    `names` are these runs (or rows of a table), and `rows` the rows of the ranking that they are
    part of. `what` says which number does not fit ("energy per time"), `why` how far off it is.
    """

    rows: tuple[int, ...]
    names: tuple[str, ...]
    what: str
    why: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranking:
    """A scored cohort of n rows; arrays and `names` are (n,), in the order of the input.

    `label` is the name of the score ("PePR-E"), `of` what a row is ("run", "model", "row").
    `metric` is the performance, `percent` and `transform` what was done to it. `key` is the
    resource as it was asked for, `resource_name` what it is called; `unit` is one that
    units.format_quantity knows, a currency, or "" where only the user knows it. `group` is
    the experiment or host of the runs, or the value of a table's column, and `grouped_by` which of
    these. `provenance` is that of all energies. `bounds_given` says that the bounds are not the
    cohort's own, `bounds_source` the file that they are from.

    Each u covers 95.45 % (k = 2, or Student's t for few repeats); NaN is unknown. `n` is the number
    of runs that each row is the mean of, `run_ids` are their ids, and `sd_performance` and
    `sd_resource` their sample standard deviations. A row of one run shows no spread: its SDs are
    NaN, and its `u_pepr` is that of this run, a lower bound for the model. `u_pepr` and
    `standing`, which says how sure the order is, are None where nothing is known of any row.

    `outliers` do not fit the other rows; `without` is the same ranking without them.
    """

    label: str
    of: str
    names: tuple[str, ...]
    metric: str
    resource_name: str
    unit: str
    performance: Floats
    resource: Floats
    scores: pepr.Scores
    bounds_given: bool
    bounds_source: str = ""
    key: str = ""
    group: str | None = None
    grouped_by: str = ""
    provenance: str | None = None
    percent: bool = False
    transform: str | None = None
    n: npt.NDArray[np.intp] | None = None
    run_ids: tuple[tuple[str, ...], ...] = ()
    u_performance: Floats | None = None
    u_resource: Floats | None = None
    sd_performance: Floats | None = None
    sd_resource: Floats | None = None
    standing: pepr.Standing | None = None
    outliers: tuple[Outlier, ...] = ()
    without: Ranking | None = None

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """The row numbers, best score first."""
        return pepr.rank(self.scores)

    @property
    def front(self) -> Mask:
        """Which rows are on the performance/resource Pareto front."""
        return pepr.pareto_front(self.performance, self.resource)

    @property
    def u_pepr(self) -> Floats | None:
        """The u of each score."""
        return None if self.standing is None else self.standing.u_pepr

    @property
    def repeated(self) -> bool:
        """Whether any row is the mean of several runs."""
        return self.n is not None and bool((self.n > 1).any())

    @property
    def single(self) -> Mask:
        """Which rows are one run, so that their spread over repeats is unknown."""
        return np.ones(len(self.names), np.bool_) if self.n is None else self.n == 1

    @property
    def doubts(self) -> tuple[Outlier, ...]:
        """The old name of `outliers`."""
        return self.outliers


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The normalisation range of one resource, from `low` to `high`, and what it belongs to.

    `name` is what the resource is called: memory may be the GPU's or the host's. `source` is the
    file that it was read from. None is unknown or does not matter.
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

    @classmethod
    def read(cls, data: Mapping[str, Any], *, source: str) -> tuple[Bounds, ...]:
        """The bounds in JSON data that `saved` made. ValueError, which says why, for other data."""
        try:
            if data["kind"] != "pepr-bounds" or data["schema"] != 1:
                raise ValueError(f"it is {data['kind']!r} of schema {data['schema']!r}")
            if wrong := shape_error(data, _BOUNDS):
                raise ValueError(wrong)
            if not data["bounds"]:
                raise ValueError("it has none")
            return tuple(
                cls(
                    **{key: entry[key] for key in _SAME_IN_FILE},
                    unit=entry["unit"] or "",
                    low=float(entry["min"]),
                    high=float(entry["max"]),
                    source=source,
                )
                for entry in data["bounds"]
            )
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from error

    @staticmethod
    def saved(rankings: Sequence[Ranking], **facts: Any) -> dict[str, Any]:
        """The bounds of rankings as JSON data. `facts` are added: who made them, and when."""
        return {
            "schema": 1,
            "kind": "pepr-bounds",
            **facts,
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
                for ranking in rankings
            ],
        }


_SAME_IN_FILE = ("resource", "name", "group", "provenance", "metric")
_BOUNDS = {
    "bounds": [
        {
            **{"resource": str, "unit": (str, None), "name": str, "min": float, "max": float},
            **dict.fromkeys(("group", "provenance", "metric"), (str, None)),
        }
    ]
}


def flat_rows(ranking: Ranking) -> list[dict[str, Any]]:
    """A flat dict for each row of a ranking, best score first; see `Study.rows`."""
    scores, front, order = ranking.scores, ranking.front, ranking.order
    standing = ranking.standing
    odd = {row for outlier in ranking.outliers for row in outlier.rows}

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
        "doubtful": [i in odd for i in order.tolist()],
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


@dataclass(frozen=True, eq=False)
class SharedErrors:
    """Errors that runs have in common, as in pepr.Errors.shared, without its zeros; arrays (k,).

    The resource of the run `rows[i]` moves by `moves[i]` for one standard uncertainty of the error
    `lines[i]`. For 100,000 runs on a thousand boards, a table with the zeros would have 2 GB.
    """

    lines: npt.NDArray[np.intp]
    rows: npt.NDArray[np.intp]
    moves: Floats

    @classmethod
    def none(cls) -> SharedErrors:
        return cls(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0))

    def at(self, rows: npt.NDArray[Any], n: int) -> SharedErrors:
        """The errors of some of n runs, which are numbered anew."""
        place = np.full(n, -1, dtype=np.intp)
        place[rows] = np.arange(len(rows))
        kept = place[self.rows] >= 0
        return SharedErrors(self.lines[kept], place[self.rows[kept]], self.moves[kept])

    def squares(self, n: int) -> Floats:
        """What they add to the variance of each of n runs (n,)."""
        return np.asarray(np.bincount(self.rows, self.moves**2, minlength=n), dtype=np.float64)

    def means(self, model: npt.NDArray[np.intp], n: npt.NDArray[np.intp]) -> Floats:
        """How far they move the mean of each model (lines, models), of `n` (models,) runs each.

        `model` (runs,) is the number of each run's model.
        """
        lines, number = np.unique(self.lines, return_inverse=True)
        places = number * len(n) + model[self.rows]
        total = np.bincount(places, weights=self.moves, minlength=len(lines) * len(n))
        return np.asarray(total.reshape(-1, len(n)) / n)


@dataclass(frozen=True, eq=False)
class Amount:
    """How much of a resource each of n runs or rows took: `values` (n,) in `unit`.

    `u` (n,) is the uncertainty (k = 2, NaN is unknown). `units_per_joule` (n,) is what one joule
    makes of a resource that follows from the energy, such as a cost. The errors of such a resource
    are those of the energy, of which the runs share some (`shared`). `key` is the resource as it
    was asked for, `name` what it is called, `label` the name of its score.
    """

    key: str
    name: str
    unit: str
    values: Floats
    u: Floats | None = None
    units_per_joule: Floats | None = None
    shared: SharedErrors | None = None
    label: str = ""

    @property
    def energetic(self) -> bool:
        return self.units_per_joule is not None

    def at(self, rows: Sequence[int] | npt.NDArray[Any]) -> Amount:
        """The amounts of some of the rows."""
        return replace(
            self,
            values=self.values[rows],
            u=None if self.u is None else self.u[rows],
            units_per_joule=None if self.units_per_joule is None else self.units_per_joule[rows],
            shared=None
            if self.shared is None
            else self.shared.at(np.asarray(rows), len(self.values)),
        )


def make_ranking(
    names: Sequence[str],
    p: Floats,
    amount: Amount,
    *,
    ids: Sequence[str] = (),
    called: Callable[[int], str] | None = None,
    repeats: bool = False,
    companions: Sequence[tuple[str, str, Floats]] = (),
    bounds: pepr.MinMax | Sequence[Bounds] | None = None,
    check: bool = True,
    **facts: Any,
) -> Ranking:
    """The ranking of n runs or rows by name, performance `p` (n,) and resource.

    With `repeats` the runs of one name become one row. `ids` (n,) are those of the runs, `called`
    gives the name of one in messages; rows of a table have neither. `companions` (name, unit,
    values) grow with the resource, and with `check` show its outliers. `facts` are fields of the
    Ranking.
    """
    given = _bounds_for(amount, bounds, facts.get("group"), facts.get("provenance"))
    fixed = None if given is None else (given.low, given.high)
    models = list(dict.fromkeys(names)) if repeats else list(names)
    number = {name: i for i, name in enumerate(models)}
    index = np.array([number[name] for name in names]) if repeats else np.arange(len(names))
    values = amount.values
    pepr.checked(p, values, names=names)  # before means hide a bad value
    shown: dict[str, Any] = {"performance": p, "resource": values}
    standing = None
    if repeats:
        shared = amount.shared or SharedErrors.none()
        # A resource whose u is unknown counts as exact, but for what its repeats show.
        u = np.zeros(len(p)) if amount.u is None else amount.u
        own = np.sqrt(np.maximum(u**2 / 4 - shared.squares(len(p)), 0.0))
        means = pepr.average(index, p, values, u_r=own)
        errors = replace(means.errors, shared=shared.means(index, means.n))
        once = means.n == 1
        shown = {
            "performance": means.performance,
            "resource": means.resource,
            "n": means.n,
            "u_performance": np.where(once, np.nan, errors.u_p),
            "u_resource": np.where(once & (amount.u is None), np.nan, errors.u_r),
            "sd_performance": means.sd_p,
            "sd_resource": means.sd_r,
        }
        if not (once.all() and (amount.u is None or np.isnan(amount.u).all())):
            standing = pepr.standing(means.performance, means.resource, errors, bounds=fixed)
    scores = pepr.score(shown["performance"], shown["resource"], bounds=fixed, names=models)
    outliers: tuple[Outlier, ...] = ()
    without = None
    if check:
        odd, outliers = _outliers(amount, companions, called or names.__getitem__, index)
        if outliers:
            good = np.flatnonzero(~odd).tolist()
            with suppress(pepr.NoCohortError):  # what is left may have no span
                without = make_ranking(
                    [names[i] for i in good], p[good], amount.at(good),
                    ids=[ids[i] for i in good] if ids else (), repeats=repeats,
                    bounds=bounds, check=False, **facts,
                )  # fmt: skip
    several = repeats and len(models) < len(names)
    return Ranking(
        **{"of": "model" if several else "run" if ids else "row", **facts},
        label=amount.label,
        names=tuple(models),
        resource_name=amount.name,
        key=amount.key,
        unit=amount.unit,
        scores=scores,
        bounds_given=given is not None,
        bounds_source=given.source if given else "",
        run_ids=_members(index, len(models), ids),
        standing=standing,
        outliers=outliers,
        without=without,
        **shown,
    )


def _members(
    index: npt.NDArray[np.intp], models: int, ids: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """The ids of each model's runs; empty for the rows of a table."""
    if not ids:
        return ()
    members: list[list[str]] = [[] for _ in range(models)]
    for i, x in zip(index.tolist(), ids, strict=True):
        members[i].append(x)
    return tuple(map(tuple, members))


def _bounds_for(
    amount: Amount,
    bounds: pepr.MinMax | Sequence[Bounds] | None,
    group: str | None,
    provenance: str | None,
) -> Bounds | None:
    """Which of the bounds that were given hold for a cohort's resource; None: the cohort's own.

    UsageError if bounds were given, but none for this resource, unit, group and provenance.
    """
    if bounds is None:
        return None
    entries = [entry for entry in bounds if isinstance(entry, Bounds)]
    if not entries:
        low, high = (float(x) for x in bounds if not isinstance(x, Bounds))
        return Bounds(resource=amount.key, unit=amount.unit, low=low, high=high)
    source = entries[0].source
    same = [entry for entry in entries if entry.resource == amount.key]
    if not same:
        raise UsageError(
            f"{source} has no normalisation range of {amount.key}",
            why=f"it has those of {listed(sorted({entry.resource for entry in entries}))}",
            fix="name one of these: --resource; or save a range of that one: --save-range FILE",
        )
    found = [entry for entry in same if entry.group == group] or (same if len(same) == 1 else [])
    if not found:
        raise UsageError(
            f"{source} has no normalisation range of {amount.key} "
            f"for {group or 'all runs together'}",
            why=f"it has one each for {listed([str(entry.group) for entry in same])}",
            fix="compare runs of one of these: --experiment NAME --group experiment",
        )
    entry = found[0]
    if entry.name not in ("", amount.name):
        raise UsageError(
            f"{source} has the normalisation range of {entry.name}",
            why=f"here it is {amount.name}",
            fix="compare the same kind: --resource memory:gpu or memory:host",
        )
    if entry.unit != amount.unit:
        raise UsageError(
            f"{source} has the range of {amount.key} in {entry.unit or 'no unit'}",
            why=f"here it is in {amount.unit or 'no unit'}",
            fix="compare in the same unit (--price for a cost), or give --range MIN:MAX",
        )
    kinds = {entry.provenance, provenance}
    if len(kinds - {None, "mixed"}) > 1:
        raise UsageError(
            f"{source} has the range of {units.format_provenance(entry.provenance)} energies, "
            f"these are {units.format_provenance(provenance)}",
            why="measured and estimated energies are not comparable",
            fix="use a range of the same kind, or compare them all the same: --mix-provenance",
        )
    return entry


def _outliers(
    amount: Amount,
    companions: Sequence[tuple[str, str, Floats]],
    who: Callable[[int], str],
    index: npt.NDArray[np.intp],
) -> tuple[Mask, tuple[Outlier, ...]]:
    """Which runs or rows (n,) do not fit the others, and the message about them."""
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
    outlier = Outlier(
        rows=tuple(np.unique(index[odd]).tolist()),
        names=tuple(who(i) for i in np.flatnonzero(odd).tolist()),
        what=what,
        why=f"it is {_span(ratio[odd], unit)}, but {_span(ratio[~odd], unit)} in the other "
        f"{int((~odd).sum())}",
    )
    return odd, (outlier,)


def _span(values: Floats, unit: str) -> str:
    low, high = float(values.min()), float(values.max())
    ends = dict.fromkeys(
        units.format_quantity(x, unit) if unit else f"{x:.3g}" for x in (low, high)
    )
    return " … ".join(ends)
