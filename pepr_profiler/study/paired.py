"""The Wilcoxon signed-rank test for paired values, with its effect size.

The test: Wilcoxon, "Individual comparisons by ranking methods", Biometrics Bulletin 1 (1945), with
zeros and ties as in Conover, "Practical nonparametric statistics", 3rd ed. (1999), section 5.7.
The effect size: Kerby, "The simple difference formula", Comprehensive Psychology 3 (2014).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats

_MOST_EXACT = 200
"""Pairs up to which p is exact. Beyond, the normal approximation is right to three digits."""


@dataclass(frozen=True, kw_only=True)
class SignedRanks:
    """Whether paired values differ: the result of the signed-rank test on differences b - a.

    `n` is the number of pairs that differ, and `zeros` that of the pairs that do not, which are
    left out. `rank_sums` are the sums of the ranks of the positive and the negative differences.
    `p` is two-sided. `effect` is the matched-pairs rank-biserial correlation: the difference of the
    two sums, divided by their total. It is 1 if all differences are positive and -1 if all are
    negative. `median` is that of all differences. `p` and `effect` are NaN if no pair differs.
    """

    n: int
    zeros: int
    rank_sums: tuple[float, float]
    p: float
    effect: float
    median: float


def signed_ranks(a: npt.ArrayLike, b: npt.ArrayLike) -> SignedRanks:
    """Tests whether b - a of n pairs is distributed around 0; `a` and `b` are (n,).

    Equal sizes of differences have the mean of their ranks. Up to 200 pairs p is exact: it counts
    the signs that give sums as unequal as these or more, given the ranks with their ties. Beyond,
    the sum of the signed ranks over the root of the sum of their squares is taken as normal
    (Conover's formula). Differences are taken to 12 digits of the largest value, as rounding errors
    of a subtraction would break ties. UsageError for no pairs or values that are not finite.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    finite = bool(np.isfinite(first).all() and np.isfinite(second).all())
    if first.ndim != 1 or first.shape != second.shape or not first.size or not finite:
        raise UsageError(
            "these pairs cannot be compared",
            why="some are not finite numbers"
            if not finite
            else f"there are {first.shape} of one and {second.shape} of the other",
            fix="give two rows of numbers, one number of each for every pair",
        )
    largest = max(float(np.abs(first).max()), float(np.abs(second).max())) or 1.0
    differences = np.round(second / largest - first / largest, 12)
    moved = differences[differences != 0]
    ranks = _mean_ranks(np.abs(moved))
    up, down = float(ranks[moved > 0].sum()), float(ranks[moved < 0].sum())
    p = effect = math.nan
    if len(moved):
        effect = (up - down) / (up + down)
        if len(moved) <= _MOST_EXACT:
            p = _exact_p(ranks, min(up, down))
        else:
            p = math.erfc(abs(up - down) / math.sqrt(2.0 * float(ranks @ ranks)))
    return SignedRanks(
        n=len(moved),
        zeros=len(differences) - len(moved),
        rank_sums=(up, down),
        p=p,
        effect=effect,
        median=float(np.median(differences)) * largest,
    )


def _mean_ranks(sizes: Floats) -> Floats:
    """The rank of each size (n,) from 1 on; equal ones have the mean of their ranks."""
    _, at, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[at], dtype=np.float64)


def _exact_p(ranks: Floats, smaller: float) -> float:
    """The share of all 2^n choices of signs whose smaller rank sum is `smaller` or less."""
    doubled = np.rint(2 * ranks).astype(np.intp)  # whole numbers, as mean ranks may be halves
    total = int(doubled.sum())
    # chance[s] is the probability that the doubled ranks of the positive signs sum to s.
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    for rank in doubled:
        chance *= 0.5
        chance[rank:] += chance[: total + 1 - rank].copy()
    return min(1.0, 2.0 * float(chance[: round(2 * smaller) + 1].sum()))
