"""The ranking of a cohort: its repeats averaged, its bounds chosen, its outliers named.

`cohort` makes the numbers that are ranked from runs, `study` from runs or a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pepr_profiler import units
from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats, Mask
from pepr_profiler.study import pepr
from pepr_profiler.study.outliers import Evidence
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


class Caution(NamedTuple):
    """Something about a ranking that its reader has to know: a code, a sentence and a remedy."""

    code: str
    text: str
    fix: str


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

    `outliers` do not fit the other rows; `without` is the same ranking without them. `populations`
    is a text where the rows are of two kinds, of which one is wrong, `population` (n,) says of
    which kind each row is, and `either` are the rankings of one and of the other. `whole_rows` are
    the numbers that the rows of such a part have in the whole ranking. `same_readings` is a text
    about readings of which some are copies.
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
    whole_rows: tuple[int, ...] = ()
    populations: str = ""
    population: tuple[str, ...] = ()
    either: tuple[Ranking, ...] = ()
    same_readings: str = ""

    @property
    def noise(self) -> bool:
        """Whether a ranking would be one of noise: the cohort's own bounds are not told apart."""
        return self.scores.distinguishable is False and not self.bounds_given

    @property
    def undefined(self) -> bool:
        """Whether all resources are equal, so that there are no scores: R is 0/0."""
        return self.scores.bounds[0] == self.scores.bounds[1]

    @property
    def outlier_reasons(self) -> list[str]:
        """Why each row is an outlier, "" if it is none."""
        reasons: list[list[str]] = [[] for _ in self.names]
        for outlier in self.outliers:
            for row in outlier.rows:
                reasons[row].append(f"{outlier.what}: {outlier.why}")
        return ["; ".join(each) for each in reasons]

    @property
    def row_notes(self) -> list[str]:
        """What exports say of each row: why it is an outlier, or of which population it is."""
        reasons = self.outlier_reasons
        if not self.population:
            return reasons
        return [
            "; ".join(filter(None, each)) for each in zip(reasons, self.population, strict=True)
        ]

    @property
    def warnings(self) -> tuple[Caution, ...]:
        """What a reader has to know before the numbers, the most important first."""
        found = []
        if self.noise:
            found.append(
                Caution(
                    "indistinguishable",
                    f"these {self.of}s cannot be told apart by {self.resource_name}: their "
                    "means are equal, so that R is 0/0"
                    if self.undefined
                    else f"these {self.of}s cannot be told apart by {self.resource_name}; PePR "
                    "would rank them by noise",
                    "weigh them by performance alone, or fix the range of R: --range MIN:MAX"
                    if self.undefined
                    else "repeat the runs, or weigh them by performance alone; --anyway ranks them "
                    "all the same",
                )
            )
        if self.bounds_given and self.u_resource is not None:
            known_u = self.u_resource[np.isfinite(self.u_resource)]
            u = float(np.median(known_u)) if len(known_u) else 0.0
            width = self.scores.bounds[1] - self.scores.bounds[0]
            if width < _LEAST_SPAN * u:
                found.append(
                    Caution(
                        "narrow-range",
                        f"the normalisation range is narrower than what {self.resource_name} can "
                        f"tell: {units.format_amount(width, self.unit)} wide, where a {self.of} is "
                        f"known to ± {units.format_amount(u, self.unit)}; R is mostly noise",
                        "give the range of a larger study: --range MIN:MAX or --range-from FILE",
                    )
                )
        if len(self.names) == 2 and not self.bounds_given and not self.undefined:
            found.append(
                Caution(
                    "two-rows",
                    f"of two {self.of}s one has R = 0 and the other R = 1, however near they are",
                    "give the range of a larger study: --range MIN:MAX or --range-from FILE",
                )
            )
        if self.populations:
            found.append(
                Caution(
                    "two-populations",
                    self.populations,
                    "find out which is wrong, and leave its rows out",
                )
            )
        if self.same_readings:
            found.append(
                Caution("same-readings", self.same_readings, "correct them or leave them out")
            )
        return tuple(found)

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


_LEAST_SPAN = 1.4
"""Two equal models seem to differ by up to as many u, k = 2, in 95 %."""


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
    reasons, notes = ranking.outlier_reasons, ranking.row_notes

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
        "pepr_low": column(None if standing is None else standing.low),
        "pepr_high": column(None if standing is None else standing.high),
        "swap_with_next": column(None if standing is None else standing.swap),
        "spread_known": (~ranking.single[order]).tolist(),
        "pareto": front[order].tolist(),
        "clamped": scores.clamped[order].tolist(),
        "doubtful": [bool(reasons[i]) for i in order.tolist()],
        "outlier": [notes[i] or None for i in order.tolist()],
    }
    fixed = {
        "group": ranking.group,
        "metric": ranking.metric,
        "resource_key": ranking.key,
        "unit": ranking.unit or None,
        "label": ranking.label,
    }
    return [
        {
            **fixed,
            **dict(zip(columns, cells, strict=True)),
            "distinguishable": scores.distinguishable,
        }
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


_MOST = 1e150


def make_ranking(
    names: Sequence[str],
    p: Floats,
    amount: Amount,
    *,
    ids: Sequence[str] = (),
    called: Callable[[int], str] | None = None,
    repeats: bool = False,
    evidence: Evidence | None = None,
    bounds: pepr.MinMax | Sequence[Bounds] | None = None,
    **facts: Any,
) -> Ranking:
    """The ranking of n runs or rows by name, performance `p` (n,) and resource.

    With `repeats` the runs of one name become one row. `ids` (n,) are those of the runs, `called`
    gives the name of one in messages; rows of a table have neither. `evidence` says which of the
    runs or rows are outliers. `facts` are fields of the Ranking.
    """
    given = _bounds_for(amount, bounds, facts.get("group"), facts.get("provenance"))
    fixed = None if given is None else (given.low, given.high)
    models = list(dict.fromkeys(names)) if repeats else list(names)
    number = {name: i for i, name in enumerate(models)}
    index = np.array([number[name] for name in names]) if repeats else np.arange(len(names))
    values = amount.values
    pepr.checked(p, values, names=names)  # before means hide a bad value
    several = repeats and len(models) < len(names)
    facts = {"of": "model" if several else "run" if ids else "row", **facts}
    shown: dict[str, Any] = {"performance": p, "resource": values}
    standing, known_u = None, False
    if repeats:
        if float(values.max()) > _MOST:
            raise UsageError(
                f"{amount.name} of {names[int(values.argmax())]} is {values.max():g}",
                why="the square of such an amount is no number, so its spread cannot be known",
                fix="correct it, or give it in a larger unit",
            )
        shared = amount.shared or SharedErrors.none()
        u = np.full(len(p), math.nan) if amount.u is None else amount.u
        own = np.sqrt(np.maximum(u**2 / 4 - shared.squares(len(p)), 0.0))
        means = pepr.average(index, p, values, u_r=own)
        errors = replace(means.errors, shared=shared.means(index, means.n))
        once = means.n == 1
        known_u = not (once.all() and (amount.u is None or np.isnan(amount.u).all()))
        shown = {
            "performance": means.performance,
            "resource": means.resource,
            "n": means.n,
            "u_performance": np.where(once, np.nan, errors.u_p),
            "u_resource": np.where(once & (amount.u is None), np.nan, errors.u_r),
            "sd_performance": means.sd_p,
            "sd_resource": means.sd_r,
        }
    scores = _scores(shown, fixed, models, of=facts["of"], several=several)
    if known_u and not math.isnan(scores.pepr[0]):
        standing = pepr.standing(means.performance, means.resource, errors, bounds=fixed)
        scores = replace(scores, distinguishable=standing.distinguishable)
        if (lost := once & np.isnan(errors.var_r)).any():  # at a bound too: P is one value
            if fixed is None:  # any such row may in truth set a bound, and so every R
                lost = np.ones_like(lost)
            standing = replace(
                standing,
                swap=np.where(lost, math.nan, standing.swap),
                u_pepr=np.where(lost, math.nan, standing.u_pepr),
                low=np.where(lost, math.nan, standing.low),
                high=np.where(lost, math.nan, standing.high),
                lopsided=standing.lopsided & ~lost,
            )
    evidence = evidence or Evidence()
    who = called or names.__getitem__

    def only(rows: Sequence[int]) -> Ranking | None:
        """The same ranking of some of the runs or rows; None if it has no span."""
        with suppress(pepr.NoCohortError):
            part = make_ranking(
                [names[i] for i in rows], p[rows], amount.at(rows),
                ids=[ids[i] for i in rows] if ids else (), repeats=repeats, bounds=bounds, **facts,
            )  # fmt: skip
            return replace(part, whole_rows=tuple(dict.fromkeys(index[list(rows)].tolist())))
        return None

    without = None
    either: list[Ranking | None] = []
    wrong = {row for finding in evidence.findings for row in finding.rows}
    rest = [i for i in range(len(names)) if i not in wrong]
    if wrong and rest:
        without = only(rest)
    if evidence.populations is not None:
        either = [only(sorted(set(side) - wrong)) for side in evidence.populations.sides]
    population: list[str] = []
    if evidence.populations is not None:
        kinds: list[list[str]] = [[] for _ in models]
        for side, span in zip(evidence.populations.sides, evidence.populations.spans, strict=True):
            for i in np.unique(index[list(side)]).tolist():
                kinds[i].append(f"population at {span}")
        population = ["; ".join(each) for each in kinds]
    return Ranking(
        **facts,
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
        outliers=tuple(
            Outlier(
                rows=tuple(np.unique(index[list(finding.rows)]).tolist()),
                names=tuple(map(who, finding.rows)),
                what=finding.what,
                why=finding.why,
            )
            for finding in evidence.findings
        ),
        without=without,
        populations=f"{evidence.populations.what}: {evidence.populations.text}"
        if evidence.populations
        else "",
        population=tuple(population),
        either=tuple(each for each in either if each is not None),
        same_readings=evidence.same,
        **shown,
    )


def _scores(
    shown: Mapping[str, Any],
    bounds: pepr.MinMax | None,
    models: Sequence[str],
    *,
    of: str,
    several: bool,
) -> pepr.Scores:
    """The scores of rows. Of `several` repeats whose means are all equal there are none, NaN."""
    r = shown["resource"]
    try:
        return pepr.score(shown["performance"], r, bounds=bounds, names=models)
    except pepr.NoCohortError as error:
        if len(r) == 1:
            what = f"one {of} alone cannot be ranked"
            raise pepr.NoCohortError(what, why=error.why, fix=error.fix) from error
        if not several:
            raise
        return pepr.Scores(
            pepr=np.full(len(r), math.nan),
            r_norm=np.full(len(r), math.nan),
            bounds=(float(r[0]), float(r[0])),
            clamped=np.zeros(len(r), np.bool_),
            distinguishable=False,
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
            fix="compare runs of one of these: --experiment NAME --group experiment; or rows of a "
            "table: --group COLUMN",
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
            fix="compare in the same unit (--price for a cost, --unit for a column), or give "
            "--range MIN:MAX",
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
