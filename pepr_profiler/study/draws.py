"""Draws of what the true performances and resources of a cohort may be, given what was seen.

Student's t and the pooling of variances, which the draws need, are here too.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pepr_profiler.record import Floats, Ints

if TYPE_CHECKING:
    from pepr_profiler.study.pepr import Errors

COVERAGE = math.erf(math.sqrt(2.0))
"""The share of a normal distribution within k = 2, 95.45 %: every u here covers as much."""

BLOCK_ROWS = 2_000  # rows drawn at a time: 100,000 rows take 8 MB an array, and not 400 MB
_CELLS, _MOST_DRAWS, _LEAST_DRAWS = 400_000, 40_000, 250
_MOST_WORK = 4e8  # multiplications to find how far the rows spread; about 0.3 s


@dataclass(frozen=True, eq=False)
class Block:
    """Draws (draws, k) of the true performance `p` and resource `r` of k rows that follow each
    other, and of the error `noise` of the resource that goes with them, which is not the error that
    was taken off `r` where `r` is shrunk.
    """

    p: Floats
    r: Floats
    noise: Floats


class Draws:
    """Draws of n rows, whose errors are `Errors`; the seed is a hash of all of them.

    With `shrink` the resources are drawn as those of one population (see `_Population`), else
    around the values that were seen. More than BLOCK_ROWS rows are never shrunk.
    """

    def __init__(
        self, p: Floats, r: Floats, errors: Errors, *, shrink: bool, count: int | None = None
    ) -> None:
        n = len(r)
        self.count = count or int(np.clip(_CELLS // n, _LEAST_DRAWS, _MOST_DRAWS))
        self.blocks = [slice(at, min(at + BLOCK_ROWS, n)) for at in range(0, n, BLOCK_ROWS)]
        self._p, self._r, self._errors = p, r, errors
        var_r = np.nan_to_num(errors.var_r)  # an unknown one is reported as unknown by the caller
        self._u_p = np.sqrt(errors.var_p)
        with np.errstate(divide="ignore", invalid="ignore"):
            self._along = np.where(self._u_p > 0, errors.cov / self._u_p, 0.0)
        self._across = np.sqrt(np.maximum(var_r - self._along**2, 0.0))
        shared = errors.shared[np.any(errors.shared != 0.0, axis=1)]
        self._shared = shared[np.lexsort(shared.T)]  # in whatever order they were given
        digest = hashlib.blake2b(digest_size=16)
        for values in (p, r, errors.var_p, errors.var_r, errors.cov, errors.dof, self._shared):
            digest.update(np.ascontiguousarray(values, dtype=np.float64).tobytes())
        self._seed = int.from_bytes(digest.digest(), "little")
        random = self._random(0)
        self._luck = random.standard_normal((self.count, len(self._shared)))
        self._estimated = np.isfinite(errors.dof)
        # By which factor the variance that all rows share may be off, by chance alone.
        self._factor = np.ones(self.count)
        if errors.pooled:
            dof = float(errors.dof[self._estimated][0])
            self._factor = dof / random.chisquare(dof, self.count)
        self._population = None
        if shrink and len(self.blocks) == 1:
            self._population = _Population.of(r, var_r, self._shared, errors)

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, number])

    @functools.lru_cache(maxsize=1)  # noqa: B019 - most cohorts are one block, which is used twice
    def block(self, number: int) -> Block:
        """The draws of one of `blocks`, the same each time."""
        rows = self.blocks[number]
        random = self._random(1 + number)
        shape = (self.count, rows.stop - rows.start)
        first, second = random.standard_normal(shape), random.standard_normal(shape)
        estimated = self._estimated[rows]
        if estimated.any() and not self._errors.pooled:
            dof = self._errors.dof[rows][estimated]
            wide = np.sqrt(dof / random.chisquare(dof, (shape[0], len(dof))))
            first[:, estimated] *= wide
            second[:, estimated] *= wide
        error_p = first * self._u_p[rows]
        error_r = first * self._along[rows] + second * self._across[rows]
        shared = self._luck @ self._shared[:, rows]

        def scaled(values: Floats, factor: Floats) -> Floats:
            return np.where(estimated, values * factor[:, None], values)

        noise = scaled(error_r, np.sqrt(self._factor)) + shared
        if self._population is None:
            p, r = self._p[rows] - scaled(error_p, np.sqrt(self._factor)), self._r[rows] - noise
        else:
            which, factor = self._population.choose(self.count, random)
            seen = self._r[rows] - scaled(error_r, np.sqrt(factor)) - shared
            r, off = self._population.condition(seen, which, random)
            p = self._p[rows] - scaled(error_p, np.sqrt(factor))
            p -= off * scaled(self._errors.cov[rows] + np.zeros(shape), factor)
        return Block(np.clip(p, 0.0, 1.0), np.maximum(r, 0.0), noise)


@dataclass(frozen=True, eq=False)
class _Population:
    """The true resources of n rows as draws from one normal distribution, whose mean and whose
    spread tau are unknown; the prior of the mean is flat.

    V = diag(`var`) + `shared`' `shared` is the covariance of their errors. `tau` (g,) are possible
    spreads, `factor` (g,) what the variances that were `estimated` are off by, and `weight` (g,) is
    the probability of each pair, given the rows. A variance that is known badly makes the spread
    uncertain too: were it taken for known, rows that are equal would often seem to differ.

    The prior of tau is uniform in the shrinkage s^2 / (s^2 + d^2 / 2), where s^2 is the mean
    variance of the errors, and d the difference of the bounds, of n rows that lie evenly between
    (Daniels, Canad. J. Statist. 27, 1999, "A prior for the variance in hierarchical models", for
    two rows): it allows that all are equal as well as any difference, and a few rows are enough
    for it. That of the factor is dof / chi^2.
    """

    var: Floats
    shared: Floats
    estimated: npt.NDArray[np.bool_]
    tau: Floats
    factor: Floats
    weight: Floats

    @classmethod
    def of(cls, r: Floats, var: Floats, shared: Floats, errors: Errors) -> _Population | None:
        """None for rows without errors, and where it would take too long to find out."""
        n = len(r)
        if len(shared) > n:  # fewer errors of the same covariance
            values, vectors = np.linalg.eigh(shared.T @ shared)
            shared = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
        span = float(np.ptp(r))
        if span > 0:
            shared = _without_scale(shared, r)
        mean = float((var + np.sum(shared**2, axis=0)).mean())
        scale = math.sqrt(mean) if n > 1 else 0.0
        if (
            not (math.isfinite(scale) and scale > 1e-12 * span)
            or n * len(shared) ** 2 * _TAUS > _MOST_WORK
        ):
            return None
        steps = np.geomspace(0.03, max(30.0, 3.0 * span / scale), _TAUS)
        evenly = 6.0 * (n - 1) ** 2 / (n * (n + 1))  # d^2 / 2 over tau^2
        prior = np.gradient(steps) * steps / (1.0 + evenly * steps**2) ** 2
        factors, chance = np.ones(1), np.ones(1)
        estimated = np.isfinite(errors.dof) & errors.pooled
        if errors.pooled:
            factors, chance = _factors(float(errors.dof[estimated][0]))
        tau, factor = (x.ravel() for x in np.meshgrid(steps * scale, factors))
        flat = cls(var, shared, estimated, tau, factor, np.outer(chance, prior).ravel())
        every = np.arange(len(tau)).reshape(len(factors), -1)
        log = np.log(flat.weight) + np.concatenate([flat._log_likelihood(g, r) for g in every])
        weight = np.exp(log - log.max())
        return cls(var, shared, estimated, tau, factor, weight / weight.sum())

    def _inverse(self, g: Ints) -> tuple[Floats, Floats]:
        """(tau^2 + V)^-1 of k pairs as diagonals (k, 1, n) and the inverses (k, m, m) of
        I + shared diagonal shared'.
        """
        factor = np.where(self.estimated, self.factor[g][:, None], 1.0)
        diagonal = 1.0 / (self.tau[g][:, None] ** 2 + self.var * factor)[:, None, :]
        small = np.eye(len(self.shared)) + (self.shared * diagonal) @ self.shared.T
        return diagonal, np.asarray(np.linalg.inv(small), dtype=np.float64)

    def _times(self, values: Floats, inverse: tuple[Floats, Floats]) -> Floats:
        """(tau^2 + V)^-1 times vectors (k, ..., n) (Woodbury)."""
        diagonal, small = inverse
        scaled = values * diagonal
        if not len(self.shared):
            return scaled
        return np.asarray(scaled - (scaled @ self.shared.T @ small @ self.shared) * diagonal)

    def _log_likelihood(self, g: Ints, r: Floats) -> Floats:
        inverse = self._inverse(g)
        of_one = self._times(np.ones((len(g), 1, len(r))), inverse)
        total = of_one.sum(axis=2, keepdims=True)
        off = r - of_one @ r[:, None] / total
        log_det = np.log(inverse[0]).sum(axis=(1, 2)) + np.linalg.slogdet(inverse[1])[1]
        squares = (off * self._times(off, inverse)).sum(axis=(1, 2))
        return np.asarray(0.5 * (log_det - np.log(total[:, 0, 0]) - squares))

    def choose(self, count: int, random: np.random.Generator) -> tuple[Ints, Floats]:
        """The numbers (count,) of drawn pairs, rising, and the factor of each."""
        which = np.sort(random.choice(len(self.tau), count, p=self.weight))
        return which, self.factor[which]

    def condition(
        self, seen: Floats, which: Ints, random: np.random.Generator
    ) -> tuple[Floats, Floats]:
        """Draws (draws, n) of the true values, and (tau^2 + V)^-1 times what was seen off the mean.

        `seen` (draws, n) is what was seen less a draw of its error. With a draw x of the population
        around 0 the true values are x + m + tau^2 (tau^2 + V)^-1 (seen - x - m), with m the
        generalised mean of seen - x (Matheron's rule).
        """
        n = seen.shape[1]
        drawn, off = np.empty_like(seen), np.empty_like(seen)
        normal = random.standard_normal(seen.shape)
        for g in np.unique(which).tolist():
            rows = slice(*np.searchsorted(which, [g, g + 1]).tolist())
            tau = float(self.tau[g])
            inverse = self._inverse(np.array([g]))
            of_one = self._times(np.ones((1, 1, n)), inverse)[0, 0]
            x = normal[rows] * tau
            rest = seen[rows] - x
            mean = rest @ of_one / of_one.sum()
            off[rows] = self._times((rest - mean[:, None])[None], inverse)[0]
            drawn[rows] = x + mean[:, None] + tau**2 * off[rows]
        return drawn, off


def _factors(dof: float) -> tuple[Floats, Floats]:
    """What a variance of `dof` degrees of freedom may be off by (k,), and how probable each is."""
    sd = math.sqrt(float(_digamma(np.array([dof / 2]), 1)[0]))  # of the logarithm of chi^2
    logs = sd * np.linspace(-2.5, 3.5, _FACTORS)
    chi2 = dof * np.exp(-logs)
    chance = np.exp(dof / 2 * (1.0 - logs) - chi2 / 2)
    return np.exp(logs), chance / chance.sum()


_FACTORS = 9
_TAUS = 30
_SCALE = 0.5  # an error of less than half of what the rows differ in reverses none of them


def _without_scale(shared: Floats, r: Floats) -> Floats:
    """Shared errors without what only shifts or scales all resources, and so leaves every R.

    That all models take the same and one gain is off by 25 times its uncertainty would else be the
    best explanation of 100 models that differ in all but their last digits.
    """
    off = r - r.mean()
    shared = shared - shared.mean(axis=1, keepdims=True)
    scale = shared @ off / (off @ off)
    return np.asarray(shared - np.where(np.abs(scale) < _SCALE, scale, 0.0)[:, None] * off)


def pooled(variance: Floats, dof: Floats, repeated: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Variances estimated from few repeats, each drawn towards that of all as far as they agree.

    With 3 repeats each of 20 models a variance is known to a factor of 10, and Student's t has
    tails that set every bound; if the models scatter alike, all 40 degrees of freedom count.
    How alike they are is told by the scatter of their logarithms (Smyth, Stat. Appl. Genet. Mol.
    Biol. 2004, "Linear models and empirical Bayes methods"), here less twice its own standard
    error: few rows would else differ by chance alone in half of all cohorts, and those whose
    variance is small by chance be ranked too surely. Also of models whose standard deviations
    differ by a factor of 1.6, more intervals hold with 2 errors than with 1. Returned are the
    variances and the degrees of freedom. Fewer than 3 `repeated` rows, or any of variance 0, stay
    as they are.
    """
    rows = np.flatnonzero(repeated)
    rows = rows[np.lexsort((dof[rows], variance[rows]))]  # sums to the bit the same in any order
    own, nu = variance[rows], dof[rows]
    if len(own) < _POOLED or not (own > 0).all():
        return variance, dof
    logs = np.log(own) - _digamma(nu / 2) + np.log(nu / 2)
    by_chance = float(_digamma(nu / 2, 1).mean())
    # The excess kurtosis of the logarithm of a chi^2 is 2.4, 1.2, 0.8 for 2, 4, 6 degrees.
    error = by_chance * math.sqrt(2.0 / (len(own) - 1) + 4.8 / float(nu.mean()) / len(own))
    excess = float(logs.var(ddof=1)) - by_chance - 2.0 * error
    others = nu.sum() - nu
    if excess <= 0:  # no more apart than chance
        common, more = float(own @ nu / nu.sum()), others
    else:
        prior = 2.0 * _inverse_trigamma(excess)
        common = math.exp(
            logs.mean() + float(_digamma(np.array([prior / 2]))[0]) - math.log(prior / 2)
        )
        more = np.minimum(prior, others)
    variance, dof = variance.copy(), dof.copy()
    if excess <= 0:
        variance[rows] = common
    else:
        variance[rows] = (more * common + nu * own) / (more + nu)
    dof[rows] = nu + more
    return variance, dof


_POOLED = 3


def _digamma(x: Floats, order: int = 0) -> Floats:
    """The digamma function, or with `order` 1 its derivative, of x > 0 (n,)."""
    total = np.zeros_like(x, dtype=np.float64)
    for _ in range(8):  # up to where the asymptotic series is exact to 8 digits
        total += 1.0 / x**2 if order else -1.0 / x
        x = x + 1.0
    y = 1.0 / x**2
    if order:
        return np.asarray(total + 1.0 / x + y / 2 + y / x * (1 / 6 - y * (1 / 30 - y / 42)))
    return np.asarray(total + np.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y / 252)))


def _inverse_trigamma(value: float) -> float:
    low, high = 1e-3, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        above = float(_digamma(np.array([middle]), 1)[0]) > value
        low, high = (middle, high) if above else (low, middle)
    return math.sqrt(low * high)


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
