"""Energy counters: what flowed up to an instant that lies between two refreshes.

A counter gives the energy of each interval between two of its changes. How power went inside an
interval, say when it jumped, is reconstructed from the means of the intervals around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pepr_profiler.energy.curve import (
    NARROW,
    UNIFORM,
    Accumulator,
    Changes,
    EnergyCurve,
    Inside,
    extremes_w,
)
from pepr_profiler.energy.readings import CounterReadings
from pepr_profiler.record import Floats, Ints, Mask
from pepr_profiler.trace.lane import LINE_STEPS, Batch
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

_LONGEST_REFRESH_S = 1.0
"""No counter of a board is refreshed less often (docs/measurement, B)."""

_UNSEEN_S = 1e-3
_SLOWEST_UNSEEN_S = 0.1
"""The longest refresh period of a counter that has changed at every read: RAPL's, and a GPU's
(docs/measurement, C and B)."""

_ALIKE_SPANS = 1.5
"""A parabola is put through intervals whose lengths differ by no more than this factor."""

_UNTRIED, _SWING = 0.1, 0.6
"""In a record that is too short to try the reconstruction: its variance over x·(1 - x), over the
interval's energy squared, and the standard deviation of power over power (judgement: bursts)."""

_CALM = 0.05
"""Where energy changes by less than this part of its usual squared change, it is calm there; else
that may be chance, and the usual change counts as much."""

_FROM_MEAN_SQUARE = 6.0
"""x·(1 - x) is 1/6 in the mean over an interval."""

_QUIET_S, _QUIET_REFRESHES = 1.0, 10
"""A counter that has not changed for longer may be dead; other sensors of the device show it."""

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


@dataclass(eq=False, repr=False)
class SelfCheck:
    """How well the reconstruction does in this record: tried where the truth is known.

    Two intervals are taken as one, whose middle is then reconstructed and compared with the refresh
    that is really there. The scatter beyond what is stated is added to what is stated for single
    intervals (as the Birge ratio does: Birge, Phys. Rev. 40 (1932) 207). From two intervals to
    one it falls as it does from four to two: by half for white noise, by an eighth for rare steps.
    """

    longest_s: float
    refreshes_unseen: bool
    count: int = 0
    _excess_j2: float = 0.0
    _by_length_j2: Floats = field(default_factory=lambda: np.zeros(2))  # of two and four intervals
    _uneven_j2: float = 0.0
    _joules: Floats = field(default_factory=lambda: np.zeros(0))
    _span_s: Floats = field(default_factory=lambda: np.zeros(0))
    _refresh_u_s: Floats = field(default_factory=lambda: np.zeros(0))  # at the ends
    _next: int = 0  # the first interval that was not yet tried as the first of two

    def add(
        self, joules: Floats, span_s: Floats, refresh_u_s: Floats, *, last: bool = False
    ) -> None:
        """Takes in intervals in turn, NaN where the energy inside is a line by construction.

        The refreshes at their ends are known to `refresh_u_s`.
        """
        self._joules = np.append(self._joules, joules)
        self._span_s = np.append(self._span_s, span_s)
        self._refresh_u_s = np.append(self._refresh_u_s, refresh_u_s)
        end = len(self._joules) - (3 if last else 5)
        begin = max(self._next, 2)
        if end > begin:
            self._try(np.arange(begin, end))
            self._next = end
        passed = max(0, self._next - 4)
        self._joules, self._span_s = self._joules[passed:], self._span_s[passed:]
        self._refresh_u_s = self._refresh_u_s[passed:]
        self._next -= passed

    def _try(self, first: Ints) -> None:
        two_j = self._joules[:-1] + self._joules[1:]
        two_s = self._span_s[:-1] + self._span_s[1:]
        around = first + 2 * np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1)[:, np.newaxis]
        power_w = _values_at(two_j / two_s, around)
        lengths_s = _values_at(two_s, around)
        x = self._span_s[first] / lengths_s[_NEIGHBOURS]
        beside_j, _, stated_j2 = reconstruct_interval(
            power_w, lengths_s, x, longest_s=2 * self.longest_s,
            refreshes_unseen=self.refreshes_unseen,
        )  # fmt: skip
        at = first + np.arange(-2, 4)[:, np.newaxis]
        spans_s, joules = self._span_s[at], self._joules[at]
        alike = spans_s.max(axis=0) <= _ALIKE_SPANS * spans_s.min(axis=0)
        alike &= np.isfinite(joules).all(axis=0)
        if not alike.any():
            return
        middle_w = power_w[_NEIGHBOURS]
        off_j = joules[2] - x * two_j[first] - beside_j
        before_u_s, u_s, after_u_s = self._refresh_u_s[first + np.arange(-1, 2)[:, np.newaxis]]
        noise_j2 = middle_w**2 * (u_s**2 + (before_u_s**2 + after_u_s**2) / 4)
        self._excess_j2 += float((off_j**2 - stated_j2 - noise_j2)[alike].sum())
        halves_j2 = (joules[3] - joules[2]) ** 2 / 4 - noise_j2
        quarters_j2 = (joules[3:5].sum(axis=0) - joules[1:3].sum(axis=0)) ** 2 / 4 - noise_j2
        self._by_length_j2 += (halves_j2[alike].sum(), quarters_j2[alike].sum())
        self._uneven_j2 += float(uneven_j2(joules[:5])[alike].sum())
        self.count += int(np.count_nonzero(alike))

    def bridge_j2(self, around_j2: Floats) -> Floats:
        """What is to be added to the variance over f·(1 - f) of intervals that are so uneven."""
        if not self.count or self._excess_j2 <= 0:
            return np.zeros(len(around_j2))
        short_j2, long_j2 = self._by_length_j2.tolist()
        scale = min(1.0, max(0.5, short_j2 / long_j2 if long_j2 > 0 else 1.0))
        mean_j2 = 4 * scale * self._excess_j2 / self.count
        usual_j2 = self._uneven_j2 / self.count
        if usual_j2 <= 0:
            return np.full(len(around_j2), mean_j2)
        near = np.nan_to_num(around_j2 / usual_j2, nan=1.0)
        near = np.where(near < _CALM, near, (near + 1) / 2)
        return mean_j2 * near


_REPEATS_S, _REPEATS = 0.07, (1 / 16, 0.7)
"""Variance of energy over x·(1 - x), of a load that repeats in each interval, in parts of that of
power times the interval squared: 1/4 if it repeats once, 1/16 if it does twice. The latter is taken
for long intervals; for short ones more than the former, as readings average over fast loads."""

_EVEN, _EVEN_FAST = 1.5, 3.0
"""Power inside an interval varies more than readings show, which average over up to 0.1 s; all the
more, as far as it lies beyond what the counter shows and so changes within an interval."""

_INSTANTS = 4096
"""So many instant power readings are kept; if there are more, evenly fewer."""

_SHOW_EXTREMES = 6
"""So many different readings show between what power goes."""

_SEEN_BACK_NS, _SEEN_AHEAD_NS = 0.25e9, 0.05e9
"""An instant reading shows the power of this time before it and, if clocks differ, after it."""


@dataclass(eq=False, repr=False)
class Instants:
    """A board's instant power beside its counter: how uneven power is inside an interval.

    A load that repeats with each refresh leaves no trace in the counter. Its instant readings then
    lie beyond the mean powers of all intervals around them.
    """

    _waiting: list[Floats] = field(default_factory=list)
    _kept: list[Floats] = field(default_factory=list)  # (4, n): reading, mean, lowest, highest; W
    _kept_count: int = 0
    _stride: int = 1
    _last_w: float = math.nan
    readings: int = 0
    lowest_w: float = math.inf
    highest_w: float = 0.0

    def feed(self, t_ns: Floats, watts: Floats) -> None:
        """Takes in readings; those that repeat the one before are none."""
        known = np.isfinite(watts) & (watts > 0)
        t_ns, watts = t_ns[known], watts[known]
        new = np.diff(watts, prepend=self._last_w) != 0
        if len(watts):
            self._last_w = float(watts[-1])
            self.lowest_w = min(self.lowest_w, float(watts.min()))
            self.highest_w = max(self.highest_w, float(watts.max()))
        self.readings += int(np.count_nonzero(new))
        self._waiting.append(np.array((t_ns[new], watts[new])))

    def compare(self, knots: Floats, power_w: Floats) -> None:
        """Compares the readings up to the last of `knots` with the mean powers between these."""
        t_ns, watts = np.concatenate(self._waiting, axis=1)
        now = t_ns <= knots[-1] - _SEEN_AHEAD_NS
        self._waiting = [np.array((t_ns[~now], watts[~now]))]
        now &= t_ns > knots[0]
        t_ns, watts = t_ns[now], watts[now]
        if not len(t_ns):
            return
        last = len(power_w) - 1
        first, own, after = (
            np.clip(np.searchsorted(knots, t_ns + off, side="right") - 1, 0, last)
            for off in (-_SEEN_BACK_NS, 0.0, _SEEN_AHEAD_NS)
        )
        first, after = (
            np.minimum(first, np.maximum(own - 1, 0)),
            np.minimum(np.maximum(after, own + 1), last),
        )
        low_w, high_w = power_w[own], power_w[own]
        for step in range(int((after - first).max()) + 1):
            beside_w = power_w[np.minimum(first + step, after)]
            low_w, high_w = np.minimum(low_w, beside_w), np.maximum(high_w, beside_w)
        self._kept.append(np.array((watts, power_w[own], low_w, high_w))[:, :: self._stride])
        self._kept_count += self._kept[-1].shape[1]
        if self._kept_count > 2 * _INSTANTS:
            self._kept = [np.concatenate(self._kept, axis=1)[:, ::2]]
            self._kept_count, self._stride = self._kept[0].shape[1], 2 * self._stride

    def beyond_w2(self) -> tuple[float, float]:
        """Mean square of how far readings lie beyond what the counter shows around them, W².

        And of how far they are from the mean power of the interval that they are in.
        """
        if self._kept_count < 3:
            return 0.0, 0.0
        watts, mean_w, low_w, high_w = np.concatenate(self._kept, axis=1)
        watts = watts * (mean_w.sum() / watts.sum())  # the two differ in gain
        beyond_w = watts - np.clip(watts, low_w, high_w)
        return float(np.mean(beyond_w**2)), float(np.mean((watts - mean_w) ** 2))

    @property
    def usual_w(self) -> float:
        """The mean of the readings that are not compared yet; 0 if there are none."""
        watts = np.concatenate(self._waiting, axis=1)[1]
        return float(watts.mean()) if len(watts) else 0.0


def uneven_j2(joules: Floats) -> Floats:
    """Mean squared change of energy from interval to interval, of five (5, n) or fewer."""
    change_j2 = np.diff(joules, axis=0) ** 2
    known = np.isfinite(change_j2)
    count = known.sum(axis=0)
    mean_j2 = np.where(known, change_j2, 0.0).sum(axis=0) / np.maximum(count, 1)
    return np.where(count > 0, mean_j2, np.nan)


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
    _passed: int = 0  # intervals that are no longer held
    _unseen_s: float = 0.0  # so old a change may be when it is read, if refreshes are not seen
    _extreme_means_w: tuple[float, float] = (math.inf, 0.0)
    _check: SelfCheck | None = None
    _instants: Instants | None = None
    _quiet: list[tuple[int, int]] = field(default_factory=list)
    _recent: list[tuple[float, float]] = field(default_factory=list)  # (J, s)

    def feed(self, t_ns: Ints, values: Floats, batch: Batch) -> None:
        if self.source.instant >= 0:
            self._instants = self._instants or Instants()
            watts = batch.values[self.source.instant] * self.source.scale
            watts = np.where(watts <= self.source.limit_w, watts, math.nan)
            self._instants.feed(t_ns.astype(np.float64), watts)
        super().feed(t_ns, values, batch)

    def begin(self, refreshed_ns: Floats, changes: Changes) -> None:
        begin = float(changes.t_ns[0])
        self._refreshes_unseen = self._unfollowed or (
            not self.dense
            and bool((changes.since_read_ns[1:] > NARROW * self.refresh_s * NS_PER_S).all())
        )
        if self._refreshes_unseen:
            slowest_s = _SLOWEST_UNSEEN_S if self.source.source == "nvml-energy" else _UNSEEN_S
            self._unseen_s = min(self.refresh_s, slowest_s)
            self.jitter_s = self._unseen_s / UNIFORM
        if len(refreshed_ns) == 1:
            self._guess_refresh(float(np.diff(changes.values)[0]))
        if len(refreshed_ns):
            begin = min(begin, float(refreshed_ns[0]) - self.refresh_s * NS_PER_S)
        self.knot_ns, self._last = begin, float(changes.values[0])
        self._knots = np.array([begin])
        self._filled = int(np.searchsorted(self.at_ns, begin, side="right"))
        # Of each instant: the interval, the part of it, stated variance, unevenness around it, and
        # how well the refreshes at both ends of the interval are known; its energy and length.
        self._inside = np.full((8, len(self.at_ns)), -1.0)
        longest = _LONG_READS if self._refreshes_unseen else _LONG_REFRESHES
        self._check = SelfCheck(longest * self.refresh_s, self._refreshes_unseen)
        self._knot_u_s = np.array([self.jitter_s])
        if len(refreshed_ns):
            self.add(refreshed_ns, changes.after_first())

    def add(self, refreshed_ns: Floats, changes: Changes) -> None:
        last_ns = self._knots[-1]
        step_j = np.diff(changes.values, prepend=self._last)
        self._last = float(changes.values[-1])
        span_s = np.maximum(np.diff(refreshed_ns, prepend=last_ns) / NS_PER_S, 1e-9)
        stall_s = span_s - changes.since_read_ns / NS_PER_S  # it was read for so long meanwhile
        self.longest_stall_s = max(self.longest_stall_s, float(np.max(stall_s)))
        for i in np.flatnonzero(span_s > self._quiet_s):
            until_ns = float(refreshed_ns[i])
            self._quiet.append((int(until_ns - span_s[i] * NS_PER_S), int(until_ns)))
        few = zip(step_j[-_LAST_CHANGES:].tolist(), span_s[-_LAST_CHANGES:].tolist(), strict=True)
        self._recent = [*self._recent, *few][-_LAST_CHANGES:]
        # Rows were left out of these because a line was close enough (csrc/recording/thin.h).
        thinned = (changes.left_out > 0) & (span_s > _ALIKE_SPANS * self.refresh_s)
        self._thinned = np.append(self._thinned, thinned)
        self._bridges_j2 = np.append(self._bridges_j2, changes.bridge_j2)
        u_s = self.refresh_u_ns / NS_PER_S
        if self._refreshes_unseen:
            u_s = np.full(len(u_s), self.jitter_s)
        self._knot_u_s = np.append(self._knot_u_s, u_s)
        self._emit_settled(refreshed_ns, step_j)

    def _guess_refresh(self, step_j: float) -> None:
        """Guesses the refresh period from a single change: power readings say how long it took.

        Between two refreshes is more time than between the first reading and the change.
        """
        usual_w = self._instants.usual_w if self._instants is not None else 0.0
        longest_s = max(self.refresh_s, _LONGEST_REFRESH_S)
        guess_s = step_j / usual_w if usual_w > 0 else math.sqrt(self.refresh_s * longest_s)
        self.refresh_s = min(max(guess_s, self.refresh_s), longest_s)
        self.jitter_s = 0.0

    def _emit_settled(self, t: Floats, step_j: Floats, *, last: bool = False) -> None:
        """Emits all intervals; unless `last`, without the two that lack neighbours so far."""
        knots, joules = np.append(self._knots, t), np.append(self._joules, step_j)
        end = len(joules) - (0 if last else _NEIGHBOURS)
        if end > self._emitted:
            self._emit_intervals(knots, joules, self._emitted, end)
            self._emitted = end
        passed = max(0, self._emitted - _NEIGHBOURS)
        self._passed += passed
        self._knots, self._joules = knots[passed:], joules[passed:]
        self._thinned, self._knot_u_s = self._thinned[passed:], self._knot_u_s[passed:]
        self._bridges_j2 = self._bridges_j2[passed:]
        self._emitted -= passed

    @property
    def _quiet_s(self) -> float:
        return max(_QUIET_S, _QUIET_REFRESHES * self.refresh_s)

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
        lowest_w, highest_w = self._extreme_means_w
        self._extreme_means_w = (
            min(lowest_w, float(power_w[now].min())), max(highest_w, float(power_w[now].max()))
        )  # fmt: skip
        change_w = np.diff(power_w, prepend=power_w[0])[now]
        self._uneven_w2 += float(change_w @ change_w)
        self._intervals += end - begin
        self.last_w = float(power_w[end - 1])
        self.last_change_w = math.sqrt(self._uneven_w2 / self._intervals)
        assert self._check is not None
        if self._instants is not None:
            self._instants.compare(knots[begin : end + 1], power_w[now])
        u_s = self._knot_u_s[begin + 1 : end + 1]
        self._check.add(np.where(self._thinned[now], np.nan, joules[now]), span_s[now], u_s)
        sums = np.zeros((3, end - begin))
        sums[0] = self._sums[0] + np.cumsum(joules[now])
        sums[2] = self._sums[2] + np.cumsum(self._bridges_j2[now])
        local = np.array((power_w[now], np.zeros(end - begin)))
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
        if self._refreshes_unseen:  # power may be that of either side
            beside_w = _values_at(power_w, interval + np.arange(-1, 2)[:, np.newaxis])
            inside_w = np.asarray(np.nanmax(beside_w, axis=0))
        self._local[0, at] = inside_w
        uneven = uneven_j2(_values_at(joules, around))
        self._inside[:, at] = (
            self._passed + interval, np.clip(x, 0.0, 1.0), _FROM_MEAN_SQUARE * variance_j2, uneven,
            self._knot_u_s[interval], self._knot_u_s[interval + 1], joules[interval],
            span_s[interval],
        )  # fmt: skip

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
        changed_ns = int(self.knot_ns)
        still_s = max(0.0, (self.last_ns - self.knot_ns) / NS_PER_S)
        self.longest_stall_s = max(self.longest_stall_s, still_s)
        self.extend(min(self.refresh_s, still_s))
        if math.isnan(self.last_w):  # it never moved: how much flowed is unknown, not 0
            self._cumulative[:] = math.nan
        return self.curve(
            inside=self._where(),
            extremes_w=self._extremes_w(),
            wraps=self.counted.wraps,
            resets=self.counted.resets,
            longest_stall_s=self.longest_stall_s,
            quiet_ns=tuple(self._quiet),
            quiet_s=self._quiet_s,
            changed_ns=changed_ns,
            # Reads trail their refreshes by as much as they vary in it.
            lag_u_s=max(self.jitter_s, self._unseen_s / math.sqrt(3)),
        )

    def _extremes_w(self) -> tuple[float, float]:
        """Between what power was, from its instant readings; a counter alone shows no extremes."""
        if self._instants is None or self._instants.readings < _SHOW_EXTREMES:
            return 0.0, math.inf
        if self.counted.resets:  # a device that its driver loses may be off meanwhile
            return 0.0, math.inf
        lowest_w = min(self._instants.lowest_w, self._extreme_means_w[0])
        return extremes_w(lowest_w, max(self._instants.highest_w, self._extreme_means_w[1]))

    def _where(self) -> Inside | None:
        """Where the instants are between the refreshes, with what the record itself shows."""
        if self._check is None:
            return None
        self._check.add(np.zeros(0), np.zeros(0), np.zeros(0), last=True)
        interval, part, stated_j2, uneven, *refresh_u_s, joules, span_s = self._inside
        even_j2, fast = np.full(len(part), math.inf), 0.0
        if self._check.count:
            bridge_j2 = stated_j2 + self._check.bridge_j2(uneven)
        else:
            bridge_j2 = np.maximum(stated_j2, _UNTRIED * joules**2)
            even_j2 = (_SWING * joules) ** 2
        if self._instants is not None:
            beyond_w2, own_w2 = self._instants.beyond_w2()
            repeats = min(max(_REPEATS_S / self.refresh_s, _REPEATS[0]), _REPEATS[1])
            repeats_j2 = repeats * beyond_w2 * self.refresh_s**2
            bridge_j2 = stated_j2 + np.maximum(bridge_j2 - stated_j2, repeats_j2)
            if own_w2 > 0 and self._check.count:
                fast = min(beyond_w2 / own_w2, 1.0) ** 2
                even_j2[:] = (_EVEN + _EVEN_FAST * fast) * own_w2 * self.refresh_s**2
        return Inside(
            interval.astype(np.int64), part, bridge_j2, even_j2, np.array(refresh_u_s), joules,
            span_s, fast,
        )  # fmt: skip
