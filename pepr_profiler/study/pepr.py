"""The PePR score, its uncertainty and the Pareto front: was the performance worth its resource?

PePR = P / (1 + R) with R = (r - r_min) / (r_max - r_min) over a cohort: Selvan, Pepin, Igel,
Samuel, Dam, "PePR: Performance per resource unit as a metric to promote small-scale deep learning",
NLDL 2025, arXiv 2403.12562. P lies in [0, 1], higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats, Mask
from pepr_profiler.study import draws
from pepr_profiler.study.draws import COVERAGE, coverage_factor

MinMax: TypeAlias = tuple[float, float]
"""The ends of a normalisation range, (r_min, r_max)."""

TRANSFORMS: Mapping[str, Callable[[Floats], Floats]] = {
    "one-minus": lambda x: np.subtract(1.0, x),
    "exp-neg": lambda x: np.exp(np.negative(x)),
}
"""How a lower-is-better metric becomes a performance: an error rate in [0, 1] as 1 - x, a loss in
[0, inf) as exp(-x), which of a mean cross-entropy is the geometric mean of the likelihoods."""

_MOST_RANGES = 2_000  # rows: nobody reads more ranks
_MOST_PAIRS = 100  # rows: n^2 numbers


class NoCohortError(UsageError):
    """The resources of a cohort are all equal, so that R is 0/0."""


@dataclass(frozen=True, eq=False)
class Scores:
    """PePR scores of n rows, `pepr`; arrays are (n,), in the order of the input.

    `r_norm` is R, the resource normalised by `bounds`, (r_min, r_max) in its unit. `clamped` marks
    resources outside of fixed bounds, whose R was set to 0 or 1. `distinguishable` says whether the
    resources span more than models that take all the same would seem to (see `standing`). If
    not, the order of the scores is one of noise. It is None where too little uncertainty is known.
    """

    pepr: Floats
    r_norm: Floats
    bounds: MinMax
    clamped: Mask
    distinguishable: bool | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Errors:
    """The uncertainty of the performance P and resource r of n rows, as variances (k = 1).

    `var_p`, `var_r` and their covariance `cov` (n,) are each row's own; NaN is unknown. `dof` (n,)
    are their degrees of freedom: inf where they were known beforehand, the number of repeats - 1
    where they were estimated from these. `shared` (m, n) are m errors that rows have in common:
    how far each resource moves for one standard uncertainty of that error. The gain of a power
    sensor, for example, moves every energy measured with it in proportion. `pooled` says that the
    estimated variances are one number, so that all of them are off by the same factor.
    """

    var_p: Floats
    var_r: Floats
    cov: Floats
    dof: Floats
    shared: Floats
    pooled: bool = False

    @property
    def u_p(self) -> Floats:
        """The u of each performance (n,), which covers COVERAGE."""
        return np.asarray(coverage_factor(self.dof) * np.sqrt(self.var_p))

    @property
    def u_r(self) -> Floats:
        """The u of each resource (n,), which covers COVERAGE, with the shared errors.

        The degrees of freedom are those of Welch and Satterthwaite (GUM G.4.1).
        """
        total = self.var_r + np.sum(self.shared**2, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            dof = self.dof * np.where(self.var_r == 0, np.inf, (total / self.var_r) ** 2)
        return np.asarray(coverage_factor(np.where(np.isnan(dof), np.inf, dof)) * np.sqrt(total))

    def at(self, rows: npt.NDArray[np.intp]) -> Errors:
        """The errors of some of the rows."""
        return Errors(
            var_p=self.var_p[rows],
            var_r=self.var_r[rows],
            cov=self.cov[rows],
            dof=self.dof[rows],
            shared=self.shared[:, rows],
            pooled=self.pooled,
        )


@dataclass(frozen=True, eq=False)
class Means:
    """The means of `n` repeats of each of m models; arrays are (m,).

    `sd_p` and `sd_r` are sample standard deviations, NaN for a model of one run, which shows no
    spread. The `errors` of such a model are those of that run, with 0 for the performance: a lower
    bound for the model.
    """

    n: npt.NDArray[np.intp]
    performance: Floats
    resource: Floats
    sd_p: Floats
    sd_r: Floats
    errors: Errors


@dataclass(frozen=True, eq=False, kw_only=True)
class Standing:
    """How certain the scores and the order of n rows are; arrays are (n,), in the order of input.

    All of it comes from the same draws of what the true performances and resources may be. `low` to
    `high` is the interval of each true score, which covers COVERAGE, and `u_pepr` its longer side;
    NaN is unknown. `swap` is the probability that a row and the next in the ranking are in truth
    in the reverse order, NaN for the last. `best` and `worst` are the ranks from and to which a
    row's true rank lies with COVERAGE; there are none for more than 2,000 rows. `pairs` (n, n) is
    the probability that the row of the first index has in truth a lower score than that of the
    second, equal scores half; there are none for more than 100 rows.

    `ratio` is (value, low, high) of the resource of the row that took most over that of the row
    that took least, and `difference` of the first minus the second. `lopsided` (n,) are intervals
    of which one side is so much longer than the other, a third or more, that a ± would mislead.
    `distinguishable` says whether the resources span more than models that take all the same would
    seem to, with COVERAGE. Rows of unknown error are not asked; if the others do not differ, it is
    None, unknown. The intervals of `ratio` and `difference` are NaN where an end has such an error.
    """

    u_pepr: Floats
    low: Floats
    high: Floats
    swap: Floats
    best: npt.NDArray[np.intp] | None
    worst: npt.NDArray[np.intp] | None
    pairs: Floats | None
    ratio: tuple[float, float, float]
    difference: tuple[float, float, float]
    distinguishable: bool | None
    lopsided: Mask


def as_performance(
    values: npt.ArrayLike, *, percent: bool = False, transform: str | None = None
) -> Floats:
    """A metric as a performance, in [0, 1] where higher is better.

    `percent` divides by 100. `transform` "one-minus" then makes 1 - x of x, and "exp-neg" exp(-x).
    Without them the values stay as they are: nothing is guessed. UsageError for another transform.
    """
    if transform is not None and transform not in TRANSFORMS:
        raise UsageError(
            f"there is no transform {transform!r}",
            why="a performance is as it was logged, or one that is declared here",
            fix=f"transform with one of these: {', '.join(TRANSFORMS)}",
        )
    performance = np.asarray(values, dtype=np.float64)
    if percent:
        performance = performance / 100.0
    return performance if transform is None else TRANSFORMS[transform](performance)


def score(
    performance: npt.ArrayLike,
    resource: npt.ArrayLike,
    *,
    bounds: MinMax | None = None,
    names: Sequence[str] | None = None,
) -> Scores:
    """The PePR score of each row: P / (1 + R), where R is 0 at r_min and 1 at r_max.

    `performance` P and `resource` r are (n,). `bounds` are (r_min, r_max), by default the least and
    the greatest of the resources. `names` (n,) are used in errors. UsageError for different
    lengths, no rows, a performance outside [0, 1], a resource that is negative or not finite,
    bounds that do not rise, and without bounds for resources that are all equal.
    """
    p, r = checked(performance, resource, names=names)
    if bounds is None:
        low, high = float(r.min()), float(r.max())
        if low == high:
            raise NoCohortError(
                "one row alone cannot be ranked" if len(r) == 1 else "all resources are equal",
                why=f"r_min = r_max = {low:g}, so R = (r - r_min) / (r_max - r_min) is 0/0",
                fix="add rows that took more or less, or fix the range of R: --range MIN:MAX",
            )
    else:
        low, high = bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(
                f"the normalisation range {low:g}:{high:g} is empty",
                why="MIN and MAX must be finite, and MIN below MAX",
                fix="write for example --range 151k:1.94M",
            )
    r_norm = np.clip((r - low) / (high - low), 0.0, 1.0)
    return Scores(
        pepr=p / (1.0 + r_norm),
        r_norm=r_norm,
        bounds=(low, high),
        clamped=(r < low) | (r > high),
    )


def rank(scores: Scores) -> npt.NDArray[np.intp]:
    """The numbers (n,) of the rows from the best score to the worst; ties keep their order."""
    return np.asarray(np.argsort(-scores.pepr, kind="stable"))


def pareto_front(performance: npt.ArrayLike, resource: npt.ArrayLike) -> Mask:
    """Which rows (n,) are on the front of performance against resource: no other row beats them.

    A row beats another if its performance is no lower and its resource no higher, and one of these
    is better. So rows that are equal in both are on the front together.
    """
    p, r = np.asarray(performance, dtype=np.float64), np.asarray(resource, dtype=np.float64)
    order = np.lexsort((-p, r))
    p_sorted, r_sorted = p[order], r[order]
    # Rows of equal resource form a group, its best performance first. A row is on the front if it
    # has that best, and this exceeds the best of all cheaper groups. O(n log n).
    first = np.searchsorted(r_sorted, r_sorted, side="left")
    best_so_far = np.concatenate(([-np.inf], np.maximum.accumulate(p_sorted)))
    front = np.empty(len(p), dtype=np.bool_)
    front[order] = (p_sorted == p_sorted[first]) & (p_sorted > best_so_far[first])
    return front


def average(
    model: npt.ArrayLike,
    performance: npt.ArrayLike,
    resource: npt.ArrayLike,
    *,
    u_r: npt.ArrayLike = math.nan,
    shared: npt.ArrayLike = (),
) -> Means:
    """The means of the runs of each model, their spread and their uncertainty.

    `model` (n,) is the number of each run's model, from 0. `u_r` (n,) is the standard uncertainty
    of each resource (k = 1, NaN is unknown) without the shared errors, `shared` (m, n) as in
    Errors. The mean of n repeats has the variance s^2 / n with n - 1 degrees of freedom (GUM
    4.2.3), where s^2 is the sample variance, drawn towards that of the other models where 3 or more
    are repeated and scatter alike (`draws.pooled`). The runs' own errors are part of that scatter,
    so that s^2 is at least their mean square. Shared errors do not average out. A single run whose
    own error is unknown has the scatter of the repeated model that scatters most in proportion; it
    stays unknown where one of these does not scatter.

    The runs of a model may be in any order: its sums are to the bit the same.
    """
    index = np.asarray(model, dtype=np.intp)
    p, r = np.asarray(performance, dtype=np.float64), np.asarray(resource, dtype=np.float64)
    own = np.broadcast_to(np.asarray(u_r, dtype=np.float64), p.shape)
    common = np.asarray(shared, dtype=np.float64).reshape(-1, len(p))
    order = np.lexsort((own, p, r, index))
    index, p, r, own, common = index[order], p[order], r[order], own[order], common[:, order]
    n = np.bincount(index)

    def mean(values: Floats) -> Floats:
        return np.asarray(np.bincount(index, weights=values, minlength=len(n)) / n)

    mean_p, mean_r = mean(p), mean(r)
    off_p, off_r = p - mean_p[index], r - mean_r[index]
    repeated = n > 1
    with np.errstate(divide="ignore", invalid="ignore"):
        unbias = np.where(repeated, n / (n - 1.0), np.nan)
    var_p, var_r, cov = (unbias * mean(x) for x in (off_p**2, off_r**2, off_p * off_r))
    own_var = mean(own**2)
    like_p, like_r, dof, as_one = _pooled(var_p, var_r, mean_r, np.where(repeated, n - 1.0, np.inf))
    alone = ~repeated & np.isnan(own_var)
    lender = _lender(like_r, mean_r, repeated) if alone.any() else None
    if lender is not None:
        as_one = as_one or int(repeated.sum()) == 1
        like_p, like_r, dof = like_p.copy(), like_r.copy(), dof.copy()
        like_p[alone], dof[alone] = like_p[repeated].max(), dof[lender]
        like_r[alone] = like_r[lender] / mean_r[lender] ** 2 * mean_r[alone] ** 2
    known = repeated | (alone & (lender is not None))
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(cov == 0, 0.0, cov * np.sqrt(like_p / var_p * (like_r / var_r)))
    return Means(
        n=n,
        performance=mean_p,
        resource=mean_r,
        sd_p=np.sqrt(var_p),
        sd_r=np.sqrt(var_r),
        errors=Errors(
            var_p=np.where(known, like_p / n, 0.0),
            # fmax: an unknown own error is in the scatter, and without repeats it stays unknown.
            var_r=np.fmax(like_r, own_var) / n,
            cov=np.where(repeated, scaled / n, 0.0),
            dof=dof,
            pooled=as_one,
            shared=np.array([mean(line) for line in common]).reshape(-1, len(n)),
        ),
    )


def _pooled(
    var_p: Floats, var_r: Floats, mean_r: Floats, dof: Floats
) -> tuple[Floats, Floats, Floats, bool]:
    """The variances of P, of r in proportion to its mean, and their degrees of freedom, pooled
    as far as the models agree (`draws.pooled`); and whether the latter are all one number.
    """
    repeated = np.isfinite(dof)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, dof_r = draws.pooled(var_r / mean_r**2, dof, repeated)
    like_p, dof_p = (
        (var_p, dof_r) if not var_p[repeated].any() else draws.pooled(var_p, dof, repeated)
    )
    both = np.minimum(dof_p, dof_r)
    if (both <= dof)[repeated].any():
        return var_p, var_r, dof, False
    alike = relative[repeated]
    as_one = bool(len(alike) and np.ptp(alike) <= 1e-9 * alike.max())
    return like_p, relative * mean_r**2, both, as_one and bool(np.ptp(both[repeated]) == 0)


def _lender(like_r: Floats, mean_r: Floats, repeated: Mask) -> int | None:
    """The model that scatters most in proportion, whose scatter models of a single run have too.

    None where there is no repeated model, or one that does not scatter: then nothing is known of
    the others.
    """
    rows = np.flatnonzero(repeated & (mean_r > 0) & (like_r > 0))
    if not len(rows) or len(rows) < repeated.sum():
        return None
    return int(rows[np.argmax(like_r[rows] / mean_r[rows] ** 2)])


def standing(
    performance: npt.ArrayLike,
    resource: npt.ArrayLike,
    errors: Errors,
    *,
    bounds: MinMax | None = None,
    count: int | None = None,
) -> Standing:
    """How certain the PePR and the rank of each row are, by Monte Carlo; `bounds` as in `score`.

    `count` is the number of draws, by default 40,000 or as many as a cohort has time for.

    Each draw is what the true performances and resources of all rows together may be, given what
    was seen. Its bounds are those of its own resources, so that the rows exchange them where that
    may be so. Errors of rows are normal, or Student's t where they were estimated from repeats, and
    shared errors move all their rows at once. The seed is a hash of the input: equal input, equal
    output.

    Without fixed bounds the seen values are not simply taken for the middle of the true ones. Of
    rows that are nearly equal the least and the greatest are seen too far apart, since they are
    the least and the greatest also by luck; with 20 rows intervals around the seen values cover
    80 %. So the true resources are taken to be normal around a common mean, with a spread tau that
    the rows themselves tell, as far as they can (`draws.Draws`). Where tau is several times the
    uncertainty, this changes nothing.

    P(order reversed) is meant as a rate: of all pairs that are reported with p, in cohorts whose
    true bounds differ by anything from nothing to many u, a share of p is in truth reversed, where
    truly equal ones count half. No number from one cohort can be more: with a true difference of 0
    the order is wrong in half of all cohorts, but most of them show some difference.
    `benchmarks.score` prints how well this holds.
    """
    p, r = checked(performance, resource)
    scores = score(p, r, bounds=bounds)
    order = rank(scores)
    # In the order of the ranking neighbours are adjacent, and rows have the same result in
    # whatever order they were given.
    ends = [int(np.flatnonzero(order == at)[0]) for at in (r.argmax(), r.argmin())]
    sampler = draws.Draws(p[order], r[order], errors.at(order), shrink=bounds is None, count=count)
    n, last = len(p), len(sampler.blocks) - 1
    lost = np.isnan(errors.var_r)[order]
    drawn_bounds, noise_span, drawn_ends, noise_ends, at_bounds = _drawn_bounds(
        sampler, ends, known=~lost
    )
    if bounds is not None:  # which are no row's
        at_bounds = np.zeros((2, n), np.bool_)
    low, high, swap = np.empty(n), np.empty(n), np.full(n, np.nan)
    pairs, ranks = None, None
    before: Floats | None = None
    for number, rows in enumerate(sampler.blocks):
        block = sampler.block(number)
        start, stop = drawn_bounds if bounds is None else bounds
        with np.errstate(divide="ignore", invalid="ignore"):
            r_norm = np.clip((block.r - start) / np.subtract(stop, start), 0.0, 1.0)
        r_norm = np.nan_to_num(r_norm)  # with no span at all, all take as little
        drawn = block.p / (1.0 + r_norm)
        low[rows], high[rows] = _score_interval(drawn, block.p, r_norm, at_bounds[:, rows])
        chain = drawn if before is None else np.column_stack([before, drawn])
        swap[rows.stop - chain.shape[1] : rows.stop - 1] = _behind(chain[:, :-1], chain[:, 1:])
        before = drawn[:, -1]
        if number == last == 0:
            ranks = _drawn_ranks(drawn, lost)
            if n <= _MOST_PAIRS:
                pairs = np.array([_behind(drawn[:, [i]], drawn) for i in range(n)])
    back = np.argsort(order)
    unknown = _unknown(r, errors, scores)
    most, least = float(r.max()), float(r.min())
    both_ends = [drawn_ends]
    if errors.pooled:
        # Also around what was seen: draws of a scatter that is too large for all rows at once
        # bring the ends nearer to each other than they are.
        both_ends += [
            [
                np.maximum(seen - noise, 0.0)
                for seen, noise in zip((most, least), noise_ends, strict=True)
            ]
        ]
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = [ends[0] / ends[1] for ends in both_ends]
    low, high = np.minimum(low[back], scores.pepr), np.maximum(high[back], scores.pepr)
    low[unknown] = high[unknown] = np.nan
    known_ends = not lost[ends].any()
    apart = None
    if not lost.all():
        more = bool(np.ptp(r[order][~lost]) > np.quantile(noise_span, draws.COVERAGE))
        apart = more if more or not lost.any() else None
    lost |= unknown[order]  # a row at a bound too
    swap[:-1][lost[:-1] | lost[1:]] = np.nan
    sides = np.sort([high - scores.pepr, scores.pepr - low], axis=0)
    lopsided = sides[1] - sides[0] > np.maximum(0.0015, sides[1] / 3)
    return Standing(
        u_pepr=np.where(lopsided, sides[1], (high - low) / 2),
        low=low,
        high=high,
        swap=swap[back],
        best=None if ranks is None else ranks[0][back],
        worst=None if ranks is None else ranks[1][back],
        pairs=None if pairs is None else pairs[np.ix_(back, back)],
        ratio=_around(most / least if least > 0 else math.inf, quotients, known=known_ends),
        difference=_around(most - least, [x - y for x, y in both_ends], known=known_ends),
        lopsided=lopsided,
        distinguishable=apart,
    )


def _drawn_bounds(
    sampler: draws.Draws, ends: Sequence[int], *, known: Mask
) -> tuple[tuple[Floats, Floats], Floats, list[Floats], list[Floats], Mask]:
    """Of each draw: the least and greatest resource, as columns, the span of the errors alone, of
    the rows whose errors are `known` (n,), and the resources and the errors of the rows `ends`; and
    which rows (2, n) may be the least and the greatest.
    """
    least, greatest, lowest, highest, first, last = [], [], [], [], [], []
    of_ends: dict[int, tuple[Floats, Floats]] = {}
    for number, rows in enumerate(sampler.blocks):
        block = sampler.block(number)
        least.append(block.r.min(axis=1))
        greatest.append(block.r.max(axis=1))
        lowest.append(block.noise.min(axis=1, where=known[rows], initial=np.inf))
        highest.append(block.noise.max(axis=1, where=known[rows], initial=-np.inf))
        first.append(block.r.argmin(axis=1) + rows.start)
        last.append(block.r.argmax(axis=1) + rows.start)
        for i in ends:
            if rows.start <= i < rows.stop:
                of_ends[i] = block.r[:, i - rows.start], block.noise[:, i - rows.start]
    bounds = np.min(least, axis=0)[:, None], np.max(greatest, axis=0)[:, None]
    n = sampler.blocks[-1].stop
    at_bounds = np.array(
        [
            _likely(np.choose(np.argmin(least, axis=0), first), n),
            _likely(np.choose(np.argmax(greatest, axis=0), last), n),
        ]
    )
    span = np.max(highest, axis=0) - np.min(lowest, axis=0)
    drawn_ends, noise_ends = ([of_ends[i][which] for i in ends] for which in (0, 1))
    return bounds, span, drawn_ends, noise_ends, at_bounds


def _likely(drawn: npt.NDArray[np.intp], n: int) -> Mask:
    """The fewest of n rows among which the `drawn` one (draws,) is with COVERAGE."""
    share = np.bincount(drawn, minlength=n) / len(drawn)
    order = np.argsort(-share, kind="stable")
    found = np.zeros(n, np.bool_)
    found[order] = np.concatenate(([0.0], np.cumsum(share[order])[:-1])) < COVERAGE
    return found & (share > 0)


_TAIL = (1.0 - COVERAGE) / 2


def _interval(drawn: Floats) -> tuple[Floats, Floats]:
    """The interval of draws (draws, ...) that covers COVERAGE, as much on either side."""
    low, high = np.quantile(drawn, [_TAIL, 1.0 - _TAIL], axis=0)
    return low, high


def _around(value: float, drawn: Sequence[Floats], *, known: bool) -> tuple[float, float, float]:
    """A value and the ends of an interval that has those of all `drawn`, each draws (draws,) of
    which some may be infinite; NaN for ends that are not `known`.
    """
    ends = [value]
    for each in drawn:
        numbers = each[~np.isnan(each)]  # 0/0
        if not known or not len(numbers):
            return value, math.nan, math.nan
        ends += np.quantile(numbers, [_TAIL, 1.0 - _TAIL], method="inverted_cdf").tolist()
    return value, min(ends), max(ends)


def _score_interval(
    drawn: Floats, p: Floats, r_norm: Floats, at_bounds: Mask
) -> tuple[Floats, Floats]:
    """The intervals of scores (draws, n), from P/2 to P of what P can be at most.

    A row that may be the one with R 0, or with R 1 (`at_bounds`, (2, n)), has there the whole
    interval of P, or of P/2. The quantiles of the draws alone have less of it, as only some of the
    draws are at that end: of models that truly are at one, 10 % more would be missed.
    """
    low, high = _interval(drawn)
    (p_low, p_high), (r_low, r_high) = _interval(p), _interval(r_norm)
    high = np.where((r_low == 0.0) | at_bounds[0], np.maximum(high, p_high), high)
    return np.where((r_high == 1.0) | at_bounds[1], np.minimum(low, p_low / 2.0), low), high


def _behind(a: Floats, b: Floats) -> Floats:
    """In which share of the draws (draws, ...) a is less than b; equal ones count half."""
    return np.asarray((a < b).mean(axis=0) + 0.5 * (a == b).mean(axis=0))


def _drawn_ranks(drawn: Floats, lost: Mask) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The ranks from and to which each row is in draws (draws, n); `lost` rows may have any."""
    count, n = drawn.shape
    at = np.argsort(-drawn, axis=1, kind="stable")
    scores = np.take_along_axis(drawn, at, axis=1)
    # Rows of equal score have all the ranks of their group.
    places = np.arange(n)
    new = np.concatenate([np.ones((count, 1), np.bool_), scores[:, 1:] != scores[:, :-1]], axis=1)
    first = np.maximum.accumulate(np.where(new, places, 0), axis=1)
    ends = np.concatenate([new[:, 1:], np.ones((count, 1), np.bool_)], axis=1)
    last = np.minimum.accumulate(np.where(ends, places, n)[:, ::-1], axis=1)[:, ::-1]
    best, worst = np.empty_like(first), np.empty_like(last)
    np.put_along_axis(best, at, first, axis=1)
    np.put_along_axis(worst, at, last, axis=1)
    cut = int(count * _TAIL)  # as many draws lie outside on each side at most
    best, worst = (
        np.partition(best, cut, axis=0)[cut],
        np.partition(worst, -1 - cut, axis=0)[-1 - cut],
    )
    unknown = int(lost.sum())  # rows that may be anywhere, above or below the others
    best, worst = np.maximum(best - unknown, 0), np.minimum(worst + unknown, n - 1)
    return np.where(lost, 1, 1 + best), np.where(lost, n, 1 + worst)


def _unknown(r: Floats, errors: Errors, scores: Scores) -> Mask:
    """Whose score has an unknown error: of rows whose own is, and of those between bounds whose is.

    A row that sets a bound has R 0 or 1, and one outside of fixed bounds too.
    """
    lost = np.isnan(errors.var_r)
    if not lost.any():
        return lost
    inner = ~scores.clamped
    if scores.bounds == (r.min(), r.max()):
        ends = [int(r.argmin()), int(r.argmax())]
        inner[ends] = False
        if lost[ends].any():
            return inner
    return np.asarray(lost & inner)


def checked(
    performance: npt.ArrayLike, resource: npt.ArrayLike, *, names: Sequence[str] | None = None
) -> tuple[Floats, Floats]:
    """Performance and resource as arrays (n,) that can be scored. UsageError as in `score`."""
    p, r = np.asarray(performance, dtype=np.float64), np.asarray(resource, dtype=np.float64)
    if p.ndim != 1 or p.shape != r.shape:
        raise UsageError(
            "performance and resource do not belong together",
            why=f"their shapes are {p.shape} and {r.shape}",
            fix="give two columns of the same length",
        )
    if not len(p):
        raise UsageError("there is nothing to score", why="there are no rows", fix="add rows")
    bad = ~((p >= 0) & (p <= 1))
    if bad.any():
        raise UsageError(
            f"performance outside [0, 1] in {_rows(bad, p, names)}",
            why="PePR is defined for a performance from 0 to 1, higher is better",
            fix="--percent if it is in percent; --transform one-minus|exp-neg if lower is better",
        )
    bad = ~(np.isfinite(r) & (r >= 0))
    if bad.any():
        raise UsageError(
            f"resource negative or not finite in {_rows(bad, r, names)}",
            why="a resource is an amount: 0 or more; an unknown one cannot be scored",
            fix="correct these rows or leave them out",
        )
    return p, r


def _rows(bad: Mask, values: Floats, names: Sequence[str] | None) -> str:
    rows = np.flatnonzero(bad).tolist()
    return listed([f"{names[i] if names else f'row {i + 1}'} ({values[i]:g})" for i in rows])


def listed(items: Sequence[str], *, limit: int = 5) -> str:
    """The first few items, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
