"""The PePR score, its uncertainty and the Pareto front: was the performance worth its resource?

PePR = P / (1 + R) with R = (r - r_min) / (r_max - r_min) over a cohort: Selvan, Pepin, Igel,
Samuel, Dam, "PePR: Performance per resource unit as a metric to promote small-scale deep learning",
NLDL 2025, arXiv 2403.12562. P lies in [0, 1], higher is better.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats, Mask

MinMax: TypeAlias = tuple[float, float]
"""The ends of a normalisation range, (r_min, r_max)."""

TRANSFORMS: Mapping[str, Callable[[Floats], Floats]] = {
    "one-minus": lambda x: np.subtract(1.0, x),
    "exp-neg": lambda x: np.exp(np.negative(x)),
}
"""How a lower-is-better metric becomes a performance: an error rate in [0, 1] as 1 - x, a loss in
[0, inf) as exp(-x), which of a mean cross-entropy is the geometric mean of the likelihoods."""

COVERAGE = math.erf(math.sqrt(2.0))
"""The share of a normal distribution within k = 2, 95.45 %: every u here covers as much."""

_MOST_RANGES = 2_000  # rows: all pairs of more cost seconds, and nobody reads that many ranks


class NoCohortError(UsageError):
    """The resources of a cohort are all equal, so that R is 0/0."""


@dataclass(frozen=True, eq=False)
class Scores:
    """PePR scores of n rows, `pepr`; arrays are (n,), in the order of the input.

    `r_norm` is R, the resource normalised by `bounds`, (r_min, r_max) in its unit. `clamped` marks
    resources outside of fixed bounds, whose R was set to 0 or 1.
    """

    pepr: Floats
    r_norm: Floats
    bounds: MinMax
    clamped: Mask


@dataclass(frozen=True, eq=False, kw_only=True)
class Errors:
    """The uncertainty of the performance P and resource r of n rows, as variances (k = 1).

    `var_p`, `var_r` and their covariance `cov` (n,) are each row's own; NaN is unknown. `dof` (n,)
    are their degrees of freedom: inf where they were known beforehand, the number of repeats - 1
    where they were estimated from these. `shared` (m, n) are m errors that rows have in common:
    how far each resource moves for one standard uncertainty of that error. The gain of a power
    sensor, for example, moves every energy measured with it in proportion.
    """

    var_p: Floats
    var_r: Floats
    cov: Floats
    dof: Floats
    shared: Floats

    @property
    def u_p(self) -> Floats:
        """The u of each performance (n,), which covers COVERAGE."""
        return np.asarray(coverage_factor(self.dof) * np.sqrt(self.var_p))

    @property
    def u_r(self) -> Floats:
        """The u of each resource (n,), which covers COVERAGE, with the shared errors."""
        common = np.sum(self.shared**2, axis=0)
        total, dof = _sum([(self.var_r, self.dof), (common, math.inf)])
        return np.asarray(coverage_factor(dof) * np.sqrt(total))


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


@dataclass(frozen=True, eq=False)
class Standing:
    """How certain the order of n rows is; arrays are (n,), in the order of the input.

    `u_pepr` is the u of each score, NaN if unknown. `swap` is the probability that a row and the
    next in the ranking are in the reverse order, NaN for the last. `best` and `worst` are the ranks
    that a row can have: 1 + the number of rows that are surely better, n - the number that are
    surely worse. One row is surely better than another if the difference of their scores exceeds
    the u of that difference. There are no `best` and `worst` for more than 2,000 rows.
    """

    u_pepr: Floats
    swap: Floats
    best: npt.NDArray[np.intp] | None
    worst: npt.NDArray[np.intp] | None


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
    4.2.3), where s^2 is the sample variance. The runs' own errors are part of that scatter, so that
    s^2 is at least their mean square. Shared errors do not average out.
    """
    index = np.asarray(model, dtype=np.intp)
    p, r = np.asarray(performance, dtype=np.float64), np.asarray(resource, dtype=np.float64)
    own = np.broadcast_to(np.asarray(u_r, dtype=np.float64), p.shape)
    common = np.asarray(shared, dtype=np.float64).reshape(-1, len(p))
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
    return Means(
        n=n,
        performance=mean_p,
        resource=mean_r,
        sd_p=np.sqrt(var_p),
        sd_r=np.sqrt(var_r),
        errors=Errors(
            var_p=np.where(repeated, var_p / n, 0.0),
            # fmax: an unknown own error is in the scatter, and without repeats it stays unknown.
            var_r=np.fmax(var_r, own_var) / n,
            cov=np.where(repeated, cov / n, 0.0),
            dof=np.where(repeated, n - 1.0, np.inf),
            shared=np.array([mean(line) for line in common]).reshape(-1, len(n)),
        ),
    )


def standing(
    performance: npt.ArrayLike,
    resource: npt.ArrayLike,
    errors: Errors,
    *,
    bounds: MinMax | None = None,
) -> Standing:
    """How certain the PePR and the rank of each row are; `bounds` as in `score`.

    First-order propagation, J Cov J^T (GUM 5.2.2). With s = r_max - r_min and D = P / (1 + R)^2 / s
    the score moves by 1 / (1 + R) per unit of its P, by -D per unit of its r and, without fixed
    bounds, by D (1 - R) per unit of r_min and D R per unit of r_max. So a gain that all rows share
    cancels. First order holds while s is several u(r).

    R has no error outside of fixed bounds, nor in the row that sets a bound (the first of equals):
    its R is 0 or 1 whatever its resource is. But if a runner-up is so near that it may in truth be
    the bound, the error of that is added.

    Variances estimated from few repeats are widened by Student's t, with the effective degrees of
    freedom of Welch and Satterthwaite (GUM G.4.1). If row a is above row b by d, and u_d is the
    standard uncertainty of d, they are in the reverse order with the probability of t < -d / u_d.
    """
    p, r = checked(performance, resource)
    score_errors = _ScoreErrors.of(p, r, errors, bounds)
    scores = score(p, r, bounds=bounds)
    variance, dof = score_errors.of_rows()
    order = rank(scores)
    swap = np.full(len(p), np.nan)
    swap[order[:-1]] = tail(
        *_in_sigmas(scores.pepr[order[:-1]] - scores.pepr[order[1:]], *score_errors.of_steps(order))
    )
    best, worst = None, None
    if len(p) <= _MOST_RANGES:
        lead = scores.pepr[:, None] - scores.pepr
        in_sigmas, dofs = _in_sigmas(lead, *score_errors.of_pairs())
        surely = in_sigmas > coverage_factor(dofs)  # False where it is unknown
        best, worst = 1 + surely.sum(axis=0), len(p) - surely.sum(axis=1)
    return Standing(
        u_pepr=coverage_factor(dof) * np.sqrt(variance), swap=swap, best=best, worst=worst
    )


@dataclass(frozen=True, eq=False)
class _ScoreErrors:
    """The errors of n scores: each row's own, and those that move several scores at once.

    `own` (n,) are variances with `dof` (n,) degrees of freedom. `common` are pairs: q independent
    errors (q, n), as how far each score moves for one standard uncertainty, and their degrees of
    freedom. `at_bounds` (n,) are the variances of rows that set a bound; see `_bound_error`.
    """

    own: Floats
    dof: Floats
    common: list[tuple[Floats, float]]
    at_bounds: Floats

    @classmethod
    def of(cls, p: Floats, r: Floats, errors: Errors, bounds: MinMax | None) -> _ScoreErrors:
        scores = score(p, r, bounds=bounds)
        low, high = scores.bounds
        per_p = 1.0 / (1.0 + scores.r_norm)
        slope = p * per_p**2 / (high - low)
        per_r = np.where(scores.clamped, 0.0, -slope)
        shared, common, at_bounds = errors.shared, [], np.zeros_like(p)
        if bounds is None:
            at_low, at_high = int(r.argmin()), int(r.argmax())
            per_r[[at_low, at_high]] = 0.0
            per_low, per_high = slope * (1.0 - scores.r_norm), slope * scores.r_norm
            per_low[at_low] = per_high[at_high] = 0.0
            moved = per_r * shared + per_low * shared[:, [at_low]] + per_high * shared[:, [at_high]]
        else:
            moved = per_r * shared
        own = (
            per_p**2 * errors.var_p
            + _product(per_r**2, errors.var_r)
            + 2.0 * per_p * _product(per_r, errors.cov)
        )
        if bounds is None:
            # The row that sets a bound moves all others with its resource, and itself with its P.
            for at, per_bound in ((at_low, per_low), (at_high, per_high)):
                own[at] = 0.0
                at_bounds[at] = (slope[at] * _bound_error(at, r, errors)) ** 2
                per_own_p = np.zeros_like(p)
                per_own_p[at] = per_p[at]
                u_p = math.sqrt(errors.var_p[at])
                along = float(errors.cov[at]) / u_p if u_p > 0 else 0.0
                across = math.sqrt(max(float(errors.var_r[at]) - along**2, 0.0))
                if math.isnan(errors.var_r[at]):
                    across = math.nan
                pair = [u_p * per_own_p + along * per_bound, _product(per_bound, across)]
                common.append((np.array(pair), float(errors.dof[at])))
        common.append((moved, math.inf))
        return cls(np.maximum(own, 0.0), errors.dof, common, at_bounds)

    def of_rows(self) -> tuple[Floats, Floats]:
        """The variance of each score (n,) and its degrees of freedom (n,)."""
        common = [(np.sum(moves**2, axis=0), dof) for moves, dof in self.common]
        return _sum([(self.own, self.dof), (self.at_bounds, math.inf), *common])

    def of_steps(self, order: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
        """The same of the difference between each row and the next in `order`, (n - 1,)."""
        a, b = order[:-1], order[1:]
        common = [(np.sum((x[:, a] - x[:, b]) ** 2, axis=0), dof) for x, dof in self.common]
        return _sum([(self.own[a], self.dof[a]), (self.own[b], self.dof[b]), *common])

    def of_pairs(self) -> tuple[Floats, Floats]:
        """The same of the difference between any two rows, (n, n)."""
        n = len(self.own)
        own, dof = np.tile(self.own, (n, 1)), np.tile(self.dof, (n, 1))
        parts: list[tuple[Floats, Floats | float]] = [(own, dof), (own.T, dof.T)]
        for moves, of_moves in self.common:
            squares = np.sum(moves**2, axis=0)
            between = squares[:, None] + squares - 2.0 * moves.T @ moves
            parts.append((np.maximum(between, 0.0), of_moves))
        return _sum(parts)


def _bound_error(at: int, r: Floats, errors: Errors) -> float:
    """How far the row that sets a bound may in truth be from the bound, as standard uncertainty.

    If d is the distance of a runner-up and u the standard uncertainty of d, the runner-up may in
    truth set the bound, 2 u - d further out (one-sided, k = 2). Without this a row that seems the
    cheapest would claim an R of exactly 0, although the next is as cheap within the errors, and be
    wrong half of the time.
    """
    apart = errors.var_r + errors.var_r[at]
    apart = apart + np.sum((errors.shared - errors.shared[:, [at]]) ** 2, axis=0)
    reach = np.sqrt(apart) - np.abs(r - r[at]) / 2
    reach[at] = 0.0
    return float(np.fmax.reduce(reach, initial=0.0))


def _product(factor: Floats, value: Floats | float) -> Floats:
    """The product; 0 where the factor is 0, even if the value is unknown (NaN)."""
    return np.where(factor == 0.0, 0.0, factor * value)


def _sum(parts: Sequence[tuple[Floats, Floats | float]]) -> tuple[Floats, Floats]:
    """The sum of variances, and its degrees of freedom, from (variance, degrees of freedom).

    The degrees of freedom are those of Welch and Satterthwaite.
    """
    total = np.asarray(sum(variance for variance, _ in parts), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = total**2 / np.asarray(sum(variance**2 / dof for variance, dof in parts))
    return total, np.where(np.isnan(dof), np.inf, dof)


def _in_sigmas(lead: Floats, variance: Floats, dof: Floats) -> tuple[Floats, Floats]:
    """A lead in standard uncertainties, with the degrees of freedom; 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        in_sigmas = np.where(lead == 0.0, 0.0 * variance, lead / np.sqrt(variance))
    return in_sigmas, dof


# cos(phi)^(dof - 1) is smooth: 40 points give 6 digits, with one degree of freedom or a million.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(40)
_MOST_DOF = 1e6  # with as many, Student's t is normal to 6 digits


def tail(t: Floats, dof: Floats) -> Floats:
    """The probability (n,) that Student's t with `dof` (n,), inf for a normal, exceeds `t` (n,).

    With t = sqrt(dof) tan(phi) the density is that of cos(phi)^(dof - 1), from -pi/2 to pi/2.
    """
    nu = np.minimum(np.asarray(dof, dtype=np.float64), _MOST_DOF)
    start = np.arctan(np.abs(t) / np.sqrt(nu))
    values, at = np.unique(nu, return_inverse=True)  # a cohort has few
    half = _tail_integral(np.zeros_like(values), values)[at].reshape(nu.shape)
    mass = 0.5 * _tail_integral(start, nu) / half
    return np.where(np.asarray(t) < 0, 1.0 - mass, mass)


def _tail_integral(start: Floats, nu: Floats) -> Floats:
    """The integral of cos^(nu - 1) from `start` (n,) to pi/2, or to where it has become 0."""
    end = np.minimum(start + 9.0 / np.sqrt(nu), math.pi / 2)
    half = (end - start) / 2
    phi = (start + half)[..., None] + half[..., None] * _POINTS
    with np.errstate(divide="ignore"):
        logarithm = (nu - 1.0)[..., None] * np.log(np.cos(phi))
    return np.asarray(half * (np.exp(logarithm) @ _WEIGHTS))


def coverage_factor(dof: npt.ArrayLike) -> Floats:
    """The k that covers COVERAGE: 2 for infinite degrees of freedom, 13.97, 4.53, 3.31 for 1, 2, 3.

    Fractions are rounded down (GUM G.4.1). With interpolation instead, the intervals of two or
    three repeats would cover 1 % less than they state.
    """
    inverse, factors = _coverage_factors()
    # The factor keeps a whole number that rounding errors made a little smaller.
    nu = np.floor(np.maximum(np.asarray(dof, dtype=np.float64), 1.0) * (1.0 + 1e-9))
    return np.asarray(np.interp(1.0 / nu, inverse, factors))


@functools.lru_cache(maxsize=1)
def _coverage_factors() -> tuple[Floats, Floats]:
    """1 / dof, rising, and the k of each, found by bisection.

    From 64 degrees of freedom on, k is nearly linear in 1 / dof.
    """
    inverse = np.concatenate(([0.0], 1.0 / np.arange(64.0, 0.0, -1.0)))
    with np.errstate(divide="ignore"):
        nu = 1.0 / inverse
    low, high = np.full_like(nu, 1.9), np.full_like(nu, 14.0)
    for _ in range(50):
        middle = (low + high) / 2
        too_low = tail(middle, nu) > (1.0 - COVERAGE) / 2
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    high[0] = 2.0  # by the definition of COVERAGE
    return inverse, high


def out_of_proportion(
    resource: npt.ArrayLike, companion: npt.ArrayLike | None = None, *, jump: float = 3.0
) -> Mask:
    """Which rows (n,) are outliers: their resource is not in the others' proportion to `companion`.

    Where two resources grow together (energy and time: their ratio is a mean power), faulty
    readings stand apart: the sorted ratios have a step of a factor `jump` or more. The side of the
    step with fewer rows is marked, and the other side is looked at again. A 0 beside rows that are
    not 0 is marked too. Nothing is marked unless 8 or more rows are left in which the two really
    grow together (correlation of the logarithms 0.8 or more). Without a companion the resource
    itself is sorted.

    A hint for a person to look at, not a proof. The default of `jump` is a judgement: in the
    paper's tables the steps between good rows stay below 2.3, and the 35 wrong energies of
    pneumonia_small, 10 times the power of the server, make a step of 9.
    """
    a = np.asarray(resource, dtype=np.float64)
    b = np.ones_like(a) if companion is None else np.asarray(companion, dtype=np.float64)
    odd = np.zeros(len(a), dtype=np.bool_)
    rest = np.flatnonzero((a > 0) & (b > 0))
    rest = rest[np.argsort(a[rest] / b[rest], kind="stable")]
    while len(rest) > _AGREEING:
        gaps = np.diff(np.log(a[rest] / b[rest]))
        cut = int(gaps.argmax()) + 1
        if gaps[cut - 1] < math.log(jump):
            break
        few, rest = sorted((rest[:cut], rest[cut:]), key=len)
        odd[few] = True
    zero = (a == 0) & (b > 0)
    if zero.sum() < len(rest):
        odd |= zero
    sound = len(rest) >= _AGREEING and (companion is None or _grow_together(a[rest], b[rest]))
    return odd if sound else np.zeros_like(odd)


_AGREEING = 8  # rows that must agree before another one counts as an outlier


def _grow_together(a: Floats, b: Floats) -> bool:
    x, y = np.log(a), np.log(b)
    return bool(x.std() > 0 and y.std() > 0 and np.corrcoef(x, y)[0, 1] >= 0.8)


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
