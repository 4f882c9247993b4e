"""Energy counters: wraps and resets undone, and what flowed between two refreshes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.energy.curve import NARROW, NS_PER_S, UNIFORM, Accumulator, Changes, EnergyCurve
from pepr_profiler.energy.unwrap import undo_fall
from pepr_profiler.trace.lane import LINE_STEPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAST_CHANGES = 3
_NOISE = 3.0
"""Behind the last change the mean power of the last few goes on, unless the last one's differs from
it by more than this many times what the uncertain time of a refresh explains."""


_NEIGHBOURS = 2
"""Pieces on either side that tell how power went inside of one."""

_FLAT = 0.05
"""Two pieces differ by so little of a jump beside them that both are its level."""

_ONWARD = 0.25
"""Where power goes on like this part of a jump beside it, it is no jump but a slope."""

_LONG_REFRESHES, _LONG_READS = 3.5, 6.0
"""A longer piece is a gap: it stays a line. A counter that changes at every read is read at up to
four times its usual distance, and three eighths more (steady.h and lane.cpp of
csrc/sampling)."""

_UNSEEN_S = 1e-3
"""Between refreshes of a counter that has changed at every read: RAPL's (docs/measurement, C)."""

_ALIKE_SPANS = 1.5
"""A parabola is put through pieces whose lengths differ by no more."""

_U_STEP, _U_PARABOLA = 0.1, 0.05
"""Standard uncertainties of what is put into a piece, in W per W of what may be wrong with it
(fitted to simulated loads, docs/measurement, F; benchmarks/accuracy checks them)."""


def within_piece(
    power_w: NDArray[np.float64],
    span_s: NDArray[np.float64],
    x: NDArray[np.float64],
    *,
    longest_s: float | NDArray[np.float64],
    blind: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """How power went inside a piece of a counter, from the means of its neighbours.

    `power_w` and `span_s` (5, n) are mean power and length of a piece and the two on either side,
    NaN where there is none; `x` (n,) in [0, 1] is how far into the piece. Returns the energy up to
    there beside the straight line's, J, the power there, W, and the variance of that energy, J².

    The piece's own energy is kept. Where its mean lies between its neighbours', one of which is
    flat, or may be, and the other no further part of a slope, power jumps from one level to the
    other at the place that the mean tells (subcell resolution: Harten 1989); else it is the limited
    parabola of Colella and Woodward (1984, PPM).
    A piece longer than `longest_s` or without a neighbour stays a line. `blind` are refreshes that
    may lie anywhere before the reads that ended the pieces.
    """
    far_left, left, mean, right, far_right = power_w
    known = np.isfinite(left) & np.isfinite(right)
    left, right = np.where(known, left, mean), np.where(known, right, mean)
    onward_w = np.array((left - far_left, far_right - right))  # NaN where there is none
    beside_w = np.abs(onward_w)
    jump = right - left
    span = span_s[_NEIGHBOURS]
    short = span <= longest_s
    steps = known & short & (jump != 0) & ((right - mean) * (mean - left) >= 0)
    steps &= np.nan_to_num(beside_w).min(axis=0) <= _FLAT * np.abs(jump)
    steps &= np.nan_to_num(onward_w * np.sign(jump)).max(axis=0) <= _ONWARD * np.abs(jump)
    y = np.divide(right - mean, jump, out=np.zeros_like(x), where=steps)
    step_w = left * np.minimum(x, y) + right * np.maximum(x - y, 0.0)

    widest, narrowest = (pick(span_s[1:-1], axis=0) for pick in (np.max, np.min))
    curved = known & short & (widest <= _ALIKE_SPANS * narrowest)  # False beside NaN
    far_left, far_right = (
        np.where(np.isfinite(far), far, near)
        for far, near in ((far_left, left), (far_right, right))
    )
    low, high = _limited(far_left, left, mean, right, far_right)
    low, high = np.where(curved, low, mean), np.where(curved, high, mean)
    bow = 6 * mean - 3 * (low + high)
    parabola_w = x * (low + x * ((high - low + bow) / 2 - x * bow / 3))

    off_line_w = np.where(steps, step_w, parabola_w) - x * mean
    inside_w = np.where(steps, np.where(x < y, left, right), low + x * (high - low + bow * (1 - x)))
    # A jump is off where its levels are; a parabola, or a line, by what it does not follow.
    u_w = np.where(
        steps,
        _U_STEP * np.minimum(np.abs(jump), np.nan_to_num(beside_w, nan=math.inf).max(axis=0)),
        _U_PARABOLA * np.abs(left - 2 * mean + right),
    )
    # A step inside of a line's piece leaves its mean between its neighbours': the smaller change
    # bounds how far the line is off. It also tells how uneven unseen refreshes make steady power.
    off_w = np.fmin(np.abs(power_w[1] - mean), np.abs(power_w[3] - mean)) / math.sqrt(3)
    off_w = np.where(np.isfinite(off_w), off_w, 0.0)
    u_w = np.where(known & short, np.maximum(u_w, off_w) if blind else u_w, off_w)
    return off_line_w * span, inside_w, (u_w * span) ** 2


def _limited(
    far_left: NDArray[np.float64],
    left: NDArray[np.float64],
    mean: NDArray[np.float64],
    right: NDArray[np.float64],
    far_right: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Power at both ends of a piece with a parabola between that adds no extremum (1.6-1.10)."""

    def slope(a: Any, b: Any, c: Any) -> Any:
        most = 2 * np.minimum(np.abs(b - a), np.abs(c - b))
        limited = np.copysign(np.minimum(np.abs(c - a) / 2, most), c - a)
        return np.where((b - a) * (c - b) > 0, limited, 0.0)

    middle = slope(left, mean, right)
    low = (left + mean) / 2 - (middle - slope(far_left, left, mean)) / 6
    high = (mean + right) / 2 - (slope(mean, right, far_right) - middle) / 6
    extremum = (high - mean) * (mean - low) <= 0
    rise, bow = high - low, 6 * mean - 3 * (low + high)
    too_low, too_high = rise * bow > rise**2, rise * bow < -(rise**2)
    new_low = np.where(too_low, 3 * mean - 2 * high, low)
    new_high = np.where(too_high, 3 * mean - 2 * low, high)
    return np.where(extremum, mean, new_low), np.where(extremum, mean, new_high)


def _taken(values: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    """The values at `index`, NaN beyond both ends."""
    inside = (index >= 0) & (index < len(values))
    return np.where(inside, values[np.clip(index, 0, len(values) - 1)], math.nan)


@dataclass(eq=False, repr=False)
class Counter(Accumulator):
    """A counter: the line goes through its changes.

    The first value was reached up to one refresh period before it was first read, and what flowed
    after the last change is not in the counter yet: both ends are extended by up to one period, so
    that an edge is off by a random part of a refresh and not always the same way.
    """

    wraps: int = 0
    resets: int = 0
    longest_stall_s: float = 0.0
    _last: float = math.nan  # the counter at its last change
    # The pieces that wait for those after them, and before them `_done` ones that were emitted.
    _knots: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _joules: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _thinned: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    _done: int = 0
    _blind: bool = False  # changes at each read, of which nobody knows how old they are
    _uneven_w2: float = 0.0  # squared changes of power from piece to piece
    _pieces: int = 0
    _recent: list[tuple[float, float]] = field(default_factory=list)  # (J, s)

    def begin(self, placed: NDArray[np.float64], changes: Changes) -> None:
        begin = float(changes.t_ns[0])
        if len(placed) > 1:
            begin = min(begin, float(placed[0]) - self.refresh_s * NS_PER_S)
        self.knot_ns, self._last = begin, float(changes.values[0])
        self._knots = np.array([begin])
        self._filled = int(np.searchsorted(self.at_ns, begin, side="right"))
        self._blind = not self.dense and bool(
            (changes.gap_ns[1:] > NARROW * self.refresh_s * NS_PER_S).all()
        )
        if self._blind:
            self.jitter_s = max(self.jitter_s, _UNSEEN_S / UNIFORM)
        if len(placed):
            self.join(placed, changes.rest())

    def join(self, placed: NDArray[np.float64], changes: Changes) -> None:
        last_ns = self._knots[-1]
        step_j = np.diff(changes.values, prepend=self._last)
        self._last = float(changes.values[-1])
        span_s = np.maximum(np.diff(placed, prepend=last_ns) / NS_PER_S, 1e-9)
        self._unwrap(step_j, span_s, changes.values)
        self.longest_stall_s = max(self.longest_stall_s, float(np.max(span_s)))
        few = zip(step_j[-_LAST_CHANGES:].tolist(), span_s[-_LAST_CHANGES:].tolist(), strict=True)
        self._recent = [*self._recent, *few][-_LAST_CHANGES:]
        # A line was found to do for these, as sure as it is kept in (csrc/recording/thin.h).
        thinned = (changes.left_out > 0) & (span_s > _ALIKE_SPANS * self.refresh_s)
        self._thinned = np.append(self._thinned, thinned)
        self._settle(placed, step_j)

    def _unwrap(
        self, step_j: NDArray[np.float64], span_s: NDArray[np.float64], values: NDArray[np.float64]
    ) -> None:
        """Puts what flowed, J, in the place of each step that fell."""
        for i in np.flatnonzero(step_j < 0):
            step_j[i], wrapped = undo_fall(
                float(step_j[i]),
                float(values[i]),
                range_j=self.source.range_j,
                span_s=float(span_s[i]),
            )
            self.wraps += wrapped
            self.resets += not wrapped

    def _settle(
        self, t: NDArray[np.float64], step_j: NDArray[np.float64], *, last: bool = False
    ) -> None:
        """Emits pieces; all but the last two, whose neighbours have yet to come, unless `last`."""
        knots, joules = np.append(self._knots, t), np.append(self._joules, step_j)
        end = len(joules) - (0 if last else _NEIGHBOURS)
        if end > self._done:
            self._emit_pieces(knots, joules, self._done, end)
            self._done = end
        passed = max(0, self._done - _NEIGHBOURS)
        self._knots, self._joules = knots[passed:], joules[passed:]
        self._thinned = self._thinned[passed:]
        self._done -= passed

    def _emit_pieces(
        self, knots: NDArray[np.float64], joules: NDArray[np.float64], begin: int, end: int
    ) -> None:
        span_s = np.maximum(np.diff(knots) / NS_PER_S, 1e-9)
        power_w = joules / span_s
        now = slice(begin, end)
        change_w = np.diff(power_w, prepend=power_w[0])[now]
        self._uneven_w2 += float(change_w @ change_w)
        self._pieces += end - begin
        self.last_w = float(power_w[end - 1])
        self.last_change_w = math.sqrt(self._uneven_w2 / self._pieces)
        sums = np.zeros((3, end - begin))
        sums[0] = self._sums[0] + np.cumsum(joules[now])
        local = np.array((power_w[now], (power_w[now] * self.jitter_s) ** 2))
        at = self.emit(knots[1:][now], sums, local)
        # Only the few pieces that hold an instant are looked into.
        at_ns = self.at_ns[at].astype(np.float64)
        piece = begin + np.searchsorted(knots[1:][now], at_ns)
        x = (at_ns - knots[piece]) / NS_PER_S / span_s[piece]
        around = piece + np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1)[:, np.newaxis]
        thinned = self._thinned[piece]
        longest_s = (_LONG_READS if self._blind else _LONG_REFRESHES) * self.refresh_s
        beside_j, inside_w, variance_j2 = within_piece(
            _taken(power_w, around),
            _taken(span_s, around),
            x,
            longest_s=np.where(thinned, 0.0, longest_s),
            blind=self._blind,
        )
        line_j2 = (LINE_STEPS * power_w[piece] * self.refresh_s) ** 2 / 3
        variance_j2 = np.where(thinned, line_j2, variance_j2)
        self._cumulative[0, at] += beside_j
        self._local[0, at] = inside_w
        self._local[1, at] = (inside_w * self.jitter_s) ** 2 + variance_j2

    def finish(self) -> EnergyCurve:
        if not self._started and self._early:
            self._start()
        if len(self._joules):
            self._settle(np.zeros(0), np.zeros(0), last=True)
            # Of a few changes: one alone may have been noticed late and the next one early.
            joules, seconds = zip(*self._recent, strict=True)
            mean_w, last_w = sum(joules) / sum(seconds), joules[-1] / seconds[-1]
            noise_w = _NOISE * mean_w * self.jitter_s / seconds[-1]
            self.last_w = mean_w if abs(last_w - mean_w) <= noise_w else last_w
        still_s = max(0.0, (self.last_ns - self.knot_ns) / NS_PER_S)
        self.longest_stall_s = max(self.longest_stall_s, still_s)
        self.extend(min(self.refresh_s, still_s))
        if math.isnan(self.last_w):  # it never moved: how much flowed is unknown, not 0
            self._cumulative[:] = math.nan
        return self.curve(
            wraps=self.wraps,
            resets=self.resets,
            longest_stall_s=self.longest_stall_s,
            lag_u_s=self.jitter_s,  # a read follows its refresh by as much as reads differ in it
        )
