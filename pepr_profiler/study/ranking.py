"""A cohort as arrays, weighed and ranked: repeats, bounds, and what of it looks wrong.

Where the numbers are from, runs or a table, is the business of `cohort` and `study`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pepr_profiler import units
from pepr_profiler.errors import UsageError
from pepr_profiler.study import pepr
from pepr_profiler.trace.shape import shape_error


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
    units.format_quantity knows, a currency, or "" where only the user knows it. `group` is the
    experiment or host of the runs, or the value of a table's column, and `grouped_by` which of
    these. Every u covers 95.45 % (k = 2, or Student's t for few repeats), NaN is unknown.

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
    grouped_by: str = ""
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
class Bounds:
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

    @classmethod
    def read(cls, data: Mapping[str, Any], *, source: str) -> tuple[Bounds, ...]:
        """Those that `saved` put down; ValueError, which says what is wrong, for all else."""
        try:
            if data["kind"] != "pepr-bounds" or data["schema"] != 1:
                raise ValueError(f"it is {data['kind']!r} of schema {data['schema']!r}")
            if wrong := shape_error(data, _BOUNDS):
                raise ValueError(wrong)
            if not data["bounds"]:
                raise ValueError("it has none")
            return tuple(
                cls(
                    resource=str(entry["resource"]),
                    unit=str(entry["unit"] or ""),
                    low=float(entry["min"]),
                    high=float(entry["max"]),
                    name=str(entry["name"]),
                    group=entry["group"],
                    provenance=entry["provenance"],
                    metric=entry["metric"],
                    source=source,
                )
                for entry in data["bounds"]
            )
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from error
        except TypeError as error:
            raise ValueError(str(error)) from error

    @staticmethod
    def saved(rankings: Sequence[Ranking], **facts: Any) -> dict[str, Any]:
        """The bounds of rankings as JSON data; `facts` say who made them, and when."""
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


_BOUNDS = {
    "bounds": [
        {
            **{"resource": str, "unit": (str, None), "name": str, "min": float, "max": float},
            **dict.fromkeys(("group", "provenance", "metric"), (str, None)),
        }
    ]
}


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


@dataclass(frozen=True, eq=False)
class Shared:
    """Errors that runs have in common, as in pepr.Errors, but only what is not 0; arrays are (k,).

    `moves` are how far the resource of a run, `rows`, moves for one standard uncertainty of an
    error, `lines`. Of 100,000 runs on a thousand boards a table of both would have 2 GB.
    """

    lines: npt.NDArray[np.intp]
    rows: npt.NDArray[np.intp]
    moves: pepr.Floats

    @classmethod
    def none(cls) -> Shared:
        return cls(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0))

    def at(self, rows: npt.NDArray[Any], n: int) -> Shared:
        """Those of some of the n runs."""
        place = np.full(n, -1, dtype=np.intp)
        place[rows] = np.arange(len(rows))
        kept = place[self.rows] >= 0
        return Shared(self.lines[kept], place[self.rows[kept]], self.moves[kept])

    def squares(self, n: int) -> pepr.Floats:
        """What they add to the variance of each of n runs."""
        return np.asarray(np.bincount(self.rows, self.moves**2, minlength=n), dtype=np.float64)

    def means(self, model: npt.NDArray[np.intp], n: npt.NDArray[np.intp]) -> pepr.Floats:
        """How far the mean of each model moves (lines, models), of `n` (models,) runs each."""
        lines, number = np.unique(self.lines, return_inverse=True)
        places = number * len(n) + model[self.rows]
        total = np.bincount(places, weights=self.moves, minlength=len(lines) * len(n))
        mean: pepr.Floats = total.reshape(-1, len(n)) / n
        return mean


@dataclass(frozen=True, eq=False)
class Amount:
    """What of a resource n runs or rows took; `u` has k = 2 and is NaN where it is unknown.

    `units_per_joule` (n,) is what one joule is of it, where it follows from the energy: then its
    errors are the energy's, some of which the runs share.
    """

    key: str
    name: str
    unit: str
    values: pepr.Floats
    u: pepr.Floats | None = None
    units_per_joule: pepr.Floats | None = None
    shared: Shared | None = None
    label: str = ""

    @property
    def energetic(self) -> bool:
        return self.units_per_joule is not None

    def at(self, rows: Sequence[int] | npt.NDArray[Any]) -> Amount:
        """The same of some of the rows."""
        return replace(
            self,
            values=self.values[rows],
            u=None if self.u is None else self.u[rows],
            units_per_joule=None if self.units_per_joule is None else self.units_per_joule[rows],
            shared=None
            if self.shared is None
            else self.shared.at(np.asarray(rows), len(self.values)),
        )


def ranked(
    names: Sequence[str],
    p: pepr.Floats,
    amount: Amount,
    *,
    ids: Sequence[str] = (),
    called: Callable[[int], str] | None = None,
    repeats: bool = False,
    companions: Sequence[tuple[str, str, pepr.Floats]] = (),
    bounds: pepr.MinMax | Sequence[Bounds] | None = None,
    check: bool = True,
    **facts: Any,
) -> Ranking:
    """The ranking of n runs or rows; with `repeats` those of one name become one row.

    `ids` (n,) are the runs', and `called` is how errors name one; the rows of a table have none.
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
        shared = amount.shared or Shared.none()
        # Without an u of its own a resource counts as recorded; what repeats show comes on top.
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
    doubts: tuple[Doubt, ...] = ()
    without = None
    if check:
        odd, doubts = _doubts(amount, companions, called or names.__getitem__, index)
        if doubts:
            good = np.flatnonzero(~odd).tolist()
            try:
                without = ranked(
                    [names[i] for i in good], p[good], amount.at(good),
                    ids=[ids[i] for i in good] if ids else (), repeats=repeats,
                    bounds=bounds, check=False, **facts,
                )  # fmt: skip
            except pepr.NoCohortError:
                without = None  # what is left has no span
    several = repeats and len(models) < len(names)
    return Ranking(
        **{"of": "model" if several else "run" if ids else "row", **facts},
        label=amount.label,
        names=tuple(models),
        resource_name=amount.name,
        key=amount.key,
        unit=amount.unit,
        scores=scores,
        bounds_given=limits is not None,
        bounds_source=limits.source if limits else "",
        run_ids=_members(index, len(models), ids),
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
    bounds: pepr.MinMax | Sequence[Bounds] | None,
    amount: Amount,
    group: str | None,
    provenance: str | None,
) -> Bounds | None:
    """The bounds that hold for a cohort's resource; None: the cohort's own."""
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


def _doubts(
    amount: Amount,
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
        why=f"it is {_span(ratio[odd], unit)}, but {_span(ratio[~odd], unit)} in the other "
        f"{int((~odd).sum())}",
    )
    return odd, (doubt,)


def _span(values: pepr.Floats, unit: str) -> str:
    low, high = float(values.min()), float(values.max())
    ends = dict.fromkeys(
        units.format_quantity(x, unit) if unit else f"{x:.3g}" for x in (low, high)
    )
    return " … ".join(ends)


_NAMED = 5  # items that an error spells out before it only counts


def listed(items: Sequence[str], *, limit: int = _NAMED) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
