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

from pepr_profiler.record import Floats

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
        self._shared = errors.shared[np.any(errors.shared != 0.0, axis=1)]
        digest = hashlib.blake2b(digest_size=16)
        for values in (p, r, errors.var_p, errors.var_r, errors.cov, errors.dof, errors.shared):
            digest.update(np.ascontiguousarray(values, dtype=np.float64).tobytes())
        self._seed = int.from_bytes(digest.digest(), "little")
        self._luck = self._random(0).standard_normal((self.count, len(self._shared)))
        self._population = None
        if shrink and len(self.blocks) == 1:
            self._population = _Population.of(r, var_r, self._shared)

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, number])

    @functools.lru_cache(maxsize=1)  # noqa: B019 - most cohorts are one block, which is used twice
    def block(self, number: int) -> Block:
        """The draws of one of `blocks`, the same each time."""
        rows = self.blocks[number]
        random = self._random(1 + number)
        shape = (self.count, rows.stop - rows.start)
        first, second = random.standard_normal(shape), random.standard_normal(shape)
        dof = self._errors.dof[rows]
        estimated = np.isfinite(dof)
        if estimated.any():
            wide = np.sqrt(
                dof[estimated] / random.chisquare(dof[estimated], (shape[0], int(estimated.sum())))
            )
            first[:, estimated] *= wide
            second[:, estimated] *= wide
        error_p = first * self._u_p[rows]
        noise = first * self._along[rows] + second * self._across[rows]
        noise += self._luck @ self._shared[:, rows]
        p, r = self._p[rows] - error_p, self._r[rows] - noise
        if self._population is not None:
            r, off = self._population.condition(r, random)
            p -= off * self._errors.cov[rows]
        return Block(np.clip(p, 0.0, 1.0), np.maximum(r, 0.0), noise)


@dataclass(frozen=True, eq=False)
class _Population:
    """The true resources of n rows as draws from one normal distribution, whose mean and whose
    spread tau are unknown; the prior of the mean is flat.

    V = diag(`var`) + `shared`' `shared` is the covariance of their errors. `tau` (g,) are possible
    spreads, `weight` (g,) the probability of each, given the rows. The prior of tau is uniform in
    the shrinkage s^2 / (s^2 + tau^2), where s^2 is the mean variance of the errors (Daniels, Canad.
    J. Statist. 27, 1999, "A prior for the variance in hierarchical models"): it allows that all
    are equal as well as any difference, and a few rows are enough for it.
    """

    var: Floats
    shared: Floats
    tau: Floats
    weight: Floats

    @classmethod
    def of(cls, r: Floats, var: Floats, shared: Floats) -> _Population | None:
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
        prior = np.gradient(steps) * 2.0 * steps / (1.0 + steps**2) ** 2
        flat = cls(var, shared, steps * scale, prior)
        log = np.log(prior) + [flat._log_likelihood(tau, r) for tau in flat.tau]
        weight = np.exp(log - log.max())
        return cls(var, shared, flat.tau, weight / weight.sum())

    def _inverse(self, tau: float) -> tuple[Floats, Floats]:
        """(tau^2 + V)^-1 as a diagonal and the inverse of I + shared diagonal shared'."""
        diagonal = 1.0 / (tau**2 + self.var)
        small = np.eye(len(self.shared)) + (self.shared * diagonal) @ self.shared.T
        return diagonal, np.asarray(np.linalg.inv(small), dtype=np.float64)

    def _times(self, values: Floats, inverse: tuple[Floats, Floats]) -> Floats:
        """(tau^2 + V)^-1 times each of (..., n) vectors (Woodbury)."""
        diagonal, small = inverse
        scaled = values * diagonal
        if not len(self.shared):
            return scaled
        return np.asarray(scaled - (scaled @ self.shared.T @ small @ self.shared) * diagonal)

    def _log_likelihood(self, tau: float, r: Floats) -> float:
        inverse = self._inverse(tau)
        of_one = self._times(np.ones_like(r), inverse)
        total = of_one.sum()
        off = r - (r @ of_one) / total
        log_det = np.log(inverse[0]).sum() + np.linalg.slogdet(inverse[1])[1]
        return float(0.5 * (log_det - np.log(total) - off @ self._times(off, inverse)))

    def condition(self, seen: Floats, random: np.random.Generator) -> tuple[Floats, Floats]:
        """Draws (draws, n) of the true values, and (tau^2 + V)^-1 times what was seen off the mean.

        `seen` (draws, n) is what was seen less a draw of its error. With a draw x of the population
        around 0 the true values are x + m + tau^2 (tau^2 + V)^-1 (seen - x - m), with m the
        generalised mean of seen - x (Matheron's rule).
        """
        count, n = seen.shape
        which = np.sort(random.choice(len(self.tau), count, p=self.weight))
        drawn, off = np.empty_like(seen), np.empty_like(seen)
        normal = random.standard_normal(seen.shape)
        for at in np.unique(which).tolist():
            rows = slice(*np.searchsorted(which, [at, at + 1]).tolist())
            tau = float(self.tau[at])
            inverse = self._inverse(tau)
            of_one = self._times(np.ones(n), inverse)
            x = normal[rows] * tau
            rest = seen[rows] - x
            mean = rest @ of_one / of_one.sum()
            off[rows] = self._times(rest - mean[:, None], inverse)
            drawn[rows] = x + mean[:, None] + tau**2 * off[rows]
        return drawn, off


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
    Biol. 2004, "Linear models and empirical Bayes methods"), here less its own standard error: few
    rows would else differ by chance alone in half of all cohorts. Returned are the variances and
    the degrees of freedom. Fewer than 3 `repeated` rows, or any of variance 0, stay as they are.
    """
    own, nu = variance[repeated], dof[repeated]
    if len(own) < _POOLED or not (own > 0).all():
        return variance, dof
    logs = np.log(own) - _digamma(nu / 2) + np.log(nu / 2)
    by_chance = float(_digamma(nu / 2, 1).mean())
    # The excess kurtosis of the logarithm of a chi^2 is 2.4, 1.2, 0.8 for 2, 4, 6 degrees.
    error = by_chance * math.sqrt(2.0 / (len(own) - 1) + 4.8 / float(nu.mean()) / len(own))
    excess = float(logs.var(ddof=1)) - by_chance - error
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
        variance[repeated] = common
    else:
        variance[repeated] = (more * common + nu * own) / (more + nu)
    dof[repeated] = nu + more
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
