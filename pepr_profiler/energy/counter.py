"""Energy counters: what flowed up to an instant that lies between two refreshes.

A counter gives the energy of each interval between two of its changes. How power went inside an
interval, say when it jumped, is reconstructed from the means of the intervals around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pepr_profiler.energy.curve import NARROW, UNIFORM, Accumulator, Changes, EnergyCurve
from pepr_profiler.energy.readings import CounterReadings
from pepr_profiler.record import Floats, Ints, Mask
from pepr_profiler.trace.lane import LINE_STEPS
from pepr_profiler.units import NS_PER_S

_LAST_CHANGES, _NOISE = 3, 3.0
"""After the last change the mean power of the last few goes on; but the last one's alone does if it
differs from it by more than this many times what the uncertain time of a refresh explains."""

_NEIGHBOURS = 2
"""So many intervals on either side show how power went inside of one."""

_FLAT = 0.05
"""Two intervals beside a jump are one level if their powers differ by less than this part of it."""

_ONWARD = 0.25
"""Where power goes on by more than this part of a jump beside it, it is no jump but a slope."""

_LONG_REFRESHES, _LONG_READS = 3.5, 6.0
"""A longer interval is a gap: its power is taken to be even. A counter that changes at every read
is read at up to four times its usual spacing, and three eighths more (csrc/sampling, steady.h and
lane.cpp)."""

_UNSEEN_S = 1e-3
"""The refresh period of a counter that has changed at every read: RAPL's (docs/measurement, C)."""

_ALIKE_SPANS = 1.5
"""A parabola is put through intervals whose lengths differ by no more than this factor."""

_U_STEP, _U_PARABOLA = 0.1, 0.05
"""Standard uncertainties of a reconstruction, in W per W of what may be wrong with it (fitted to
simulated loads, docs/measurement, F; benchmarks/accuracy checks them)."""


def reconstruct_interval(
    power_w: Floats,
    span_s: Floats,
    x: Floats,
    *,
    longest_s: float | Floats,
    refreshes_unseen: bool = False,
) -> tuple[Floats, Floats, Floats]:
    """How power went inside an interval, from the means of the intervals around it.

    `power_w` and `span_s` (5, n) are mean power and length of an interval and the two on either
    side, NaN where there is none; `x` (n,) in [0, 1] is how far into the interval. Returns the
    energy up to there less that of even power, J, the power there, W, and the variance of that
    energy, J².

    The interval's own energy is kept. Power is taken to jump from the level before to the level
    after, at the place that the mean implies (subcell resolution: Harten 1989), where
    - the mean lies between those of the two neighbours,
    - one of them is flat as far as is known, and
    - the other is not part of a slope that goes on.
    Else power is the limited parabola of Colella and Woodward (1984, PPM). In an interval longer
    than `longest_s` or without a neighbour it is even.

    `refreshes_unseen` says that a refresh may lie anywhere before the read that ended an interval.
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
    # A jump may be wrong in its levels; a parabola, or a line, in what it does not follow.
    u_w = np.where(
        steps,
        _U_STEP * np.minimum(np.abs(jump), np.nan_to_num(beside_w, nan=math.inf).max(axis=0)),
        _U_PARABOLA * np.abs(left - 2 * mean + right),
    )
    # A step inside an interval of even power leaves its mean between its neighbours': the smaller
    # change bounds how far the line is off. It also shows how uneven unseen refreshes make steady
    # power look.
    off_w = np.fmin(np.abs(power_w[1] - mean), np.abs(power_w[3] - mean)) / math.sqrt(3)
    off_w = np.where(np.isfinite(off_w), off_w, 0.0)
    u_w = np.where(known & short, np.maximum(u_w, off_w) if refreshes_unseen else u_w, off_w)
    return off_line_w * span, inside_w, (u_w * span) ** 2


def _limited(
    far_left: Floats, left: Floats, mean: Floats, right: Floats, far_right: Floats
) -> tuple[Floats, Floats]:
    """Power at both ends of a parabola that adds no extremum (Colella and Woodward, 1.6-1.10)."""

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


def _values_at(values: Floats, index: Ints) -> Floats:
    """The values at `index`, NaN beyond both ends."""
    inside = (index >= 0) & (index < len(values))
    return np.where(inside, values[np.clip(index, 0, len(values) - 1)], math.nan)


@dataclass(eq=False, repr=False)
class Counter(Accumulator):
    """The curve of a counter goes through its changes.

    The first value was reached up to one refresh period before it was first read, and what flowed
    after the last change is not in the counter yet. So both ends are extended by up to one period:
    an edge is then off by a random part of a refresh, and not always the same way.
    """

    longest_stall_s: float = 0.0
    _last: float = math.nan  # the counter at its last change
    # Intervals that wait for those after them; before them `_emitted` ones, which are done.
    _knots: Floats = field(default_factory=lambda: np.zeros(0))
    _joules: Floats = field(default_factory=lambda: np.zeros(0))
    _thinned: Mask = field(default_factory=lambda: np.zeros(0, bool))
    _bridges_j2: Floats = field(default_factory=lambda: np.zeros(0))
    _emitted: int = 0
    _refreshes_unseen: bool = False  # it changes at each read: how old a change is, is unknown
    _uneven_w2: float = 0.0  # squared changes of power from interval to interval
    _intervals: int = 0
    _recent: list[tuple[float, float]] = field(default_factory=list)  # (J, s)

    def begin(self, refreshed_ns: Floats, changes: Changes) -> None:
        begin = float(changes.t_ns[0])
        if len(refreshed_ns) > 1:
            begin = min(begin, float(refreshed_ns[0]) - self.refresh_s * NS_PER_S)
        self.knot_ns, self._last = begin, float(changes.values[0])
        self._knots = np.array([begin])
        self._filled = int(np.searchsorted(self.at_ns, begin, side="right"))
        self._refreshes_unseen = not self.dense and bool(
            (changes.since_read_ns[1:] > NARROW * self.refresh_s * NS_PER_S).all()
        )
        if self._refreshes_unseen:
            self.jitter_s = max(self.jitter_s, _UNSEEN_S / UNIFORM)
        if len(refreshed_ns):
            self.add(refreshed_ns, changes.after_first())

    def add(self, refreshed_ns: Floats, changes: Changes) -> None:
        last_ns = self._knots[-1]
        step_j = np.diff(changes.values, prepend=self._last)
        self._last = float(changes.values[-1])
        span_s = np.maximum(np.diff(refreshed_ns, prepend=last_ns) / NS_PER_S, 1e-9)
        self.longest_stall_s = max(self.longest_stall_s, float(np.max(span_s)))
        few = zip(step_j[-_LAST_CHANGES:].tolist(), span_s[-_LAST_CHANGES:].tolist(), strict=True)
        self._recent = [*self._recent, *few][-_LAST_CHANGES:]
        # Rows were left out of these because a line was close enough (csrc/recording/thin.h).
        thinned = (changes.left_out > 0) & (span_s > _ALIKE_SPANS * self.refresh_s)
        self._thinned = np.append(self._thinned, thinned)
        self._bridges_j2 = np.append(self._bridges_j2, changes.bridge_j2)
        self._emit_settled(refreshed_ns, step_j)

    def _emit_settled(self, t: Floats, step_j: Floats, *, last: bool = False) -> None:
        """Emits all intervals; unless `last`, without the two that lack neighbours so far."""
        knots, joules = np.append(self._knots, t), np.append(self._joules, step_j)
        end = len(joules) - (0 if last else _NEIGHBOURS)
        if end > self._emitted:
            self._emit_intervals(knots, joules, self._emitted, end)
            self._emitted = end
        passed = max(0, self._emitted - _NEIGHBOURS)
        self._knots, self._joules = knots[passed:], joules[passed:]
        self._thinned = self._thinned[passed:]
        self._bridges_j2 = self._bridges_j2[passed:]
        self._emitted -= passed

    @property
    def counted(self) -> CounterReadings:
        """The counter's readings, with what each added."""
        assert isinstance(self.readings, CounterReadings)
        return self.readings

    def _settle_readings(self) -> None:
        """Takes in the readings after a reset that nothing has confirmed before the end."""
        changed_ns = self.counted.settle()
        if changed_ns is None:
            return
        columns = (changed_ns, changed_ns - self.last_ns, self.counted.counted * self.source.scale,
                   0.0, self.counted.bridge_j2)  # fmt: skip
        changes = Changes(*(np.array([column], dtype=np.float64) for column in columns))
        self.last_ns = changed_ns
        if self._started:
            self.add(self._refresh_times(changes), changes)
        else:
            self._first_changes.append(changes)

    def _emit_intervals(self, knots: Floats, joules: Floats, begin: int, end: int) -> None:
        span_s = np.maximum(np.diff(knots) / NS_PER_S, 1e-9)
        power_w = joules / span_s
        now = slice(begin, end)
        change_w = np.diff(power_w, prepend=power_w[0])[now]
        self._uneven_w2 += float(change_w @ change_w)
        self._intervals += end - begin
        self.last_w = float(power_w[end - 1])
        self.last_change_w = math.sqrt(self._uneven_w2 / self._intervals)
        sums = np.zeros((3, end - begin))
        sums[0] = self._sums[0] + np.cumsum(joules[now])
        sums[2] = self._sums[2] + np.cumsum(self._bridges_j2[now])
        local = np.array((power_w[now], (power_w[now] * self.jitter_s) ** 2))
        at = self.emit(knots[1:][now], sums, local)
        # Only the few intervals that hold an instant that is asked for are reconstructed.
        at_ns = self.at_ns[at].astype(np.float64)
        interval = begin + np.searchsorted(knots[1:][now], at_ns)
        x = (at_ns - knots[interval]) / NS_PER_S / span_s[interval]
        around = interval + np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1)[:, np.newaxis]
        thinned = self._thinned[interval]
        longest_s = (_LONG_READS if self._refreshes_unseen else _LONG_REFRESHES) * self.refresh_s
        beside_j, inside_w, variance_j2 = reconstruct_interval(
            _values_at(power_w, around),
            _values_at(span_s, around),
            x,
            longest_s=np.where(thinned, 0.0, longest_s),
            refreshes_unseen=self._refreshes_unseen,
        )
        line_j2 = (LINE_STEPS * power_w[interval] * self.refresh_s) ** 2 / 3
        variance_j2 = np.where(thinned, line_j2, variance_j2)
        self._cumulative[0, at] += beside_j
        self._local[0, at] = inside_w
        self._local[1, at] = (inside_w * self.jitter_s) ** 2 + variance_j2

    def finish(self) -> EnergyCurve:
        self._settle_readings()
        if not self._started and self._first_changes:
            self._start()
        if len(self._joules):
            self._emit_settled(np.zeros(0), np.zeros(0), last=True)
            # The last change alone may have been noticed late, and the one before it early.
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
            wraps=self.counted.wraps,
            resets=self.counted.resets,
            longest_stall_s=self.longest_stall_s,
            lag_u_s=self.jitter_s,  # reads trail their refreshes by as much as they vary in it
        )
