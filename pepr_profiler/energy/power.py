"""Power readings integrated: lag, duty cycle, gaps, and loads in step with the refreshes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from pepr_profiler.energy.curve import (
    UNIFORM,
    Accumulator,
    Changes,
    EnergyCurve,
    extremes_w,
    median,
)
from pepr_profiler.record import Floats, Mask
from pepr_profiler.trace.lane import LEVEL_S
from pepr_profiler.units import NS_PER_S

_SLOWEST_REFRESH_S = 0.12
"""GPUs refresh their power every 15 to 104 ms (docs/measurement, B)."""

_LONGEST_UNSTORED_S = 4.0
"""One row is stored in this time (csrc/recording/thin.h)."""

_USUAL_LAG = 0.3
"""Of a sensor whose averaging window is unknown, a reading's middle lies this part of a refresh
period back: windows are 1/4 to 1 of a period, half of which is 1/8 to 1/2."""

_LAG_REFRESHES, _LONGEST_LAG_S = 6, 0.22
"""After so many refreshes, readings show how far they trail: up to 220 ms (Kepler: 10 to 90 % take
480 ms, 2.2 time constants)."""

_GAP_REFRESHES = 3
"""Power readings further apart than this are a gap, not a slow refresh."""

_OVER_RATED, _UNRATED = 1.2, 3.0
"""Power goes up to so many times the stated limit of a board, which is held on average; or of the
highest average, where none is stated, as of a load that works a third of the time (judgement)."""

_ALIAS_REFRESHES = 40
_ALIAS_SWING = 0.05
_ALIAS_REPEATS = 0.3
_ALIAS_DRIFT = 20
"""Aliasing shows in at least so many refreshes, which change by this part of the power, where the
squared change over two or three refreshes is less than this part of that over one. In a longer run
it has to be even less: the phase then drifts through all of the load's period so many times."""


@dataclass(eq=False, repr=False)
class Power(Accumulator):
    """The curve of power readings: joined by lines, held at the ends, shifted back by their lag.

    A reading that repeats was seen again: it is held until a refresh before the next change, or
    until the last read.
    """

    lag_s: float = 0.0
    begin_ns: float = 0.0
    common_edge_j2: float = 0.0  # variance of an edge anywhere, J² times seconds
    lowest_w: float = math.inf
    highest_w: float = 0.0
    _watts: float = math.nan
    _seen_ns: float = 0.0  # the refresh of the last change, without the lag
    _count: int = 0  # refreshes that were seen
    # Sums of squared differences of readings 1, 2 and 3 refreshes apart, and the last readings.
    _structure: Floats = field(default_factory=lambda: np.zeros(3))
    _tail: Floats = field(default_factory=lambda: np.zeros(0))

    @property
    def _averages_s(self) -> float:
        """The averaging window: a hardware file's, else twice the lag, as far as that is known."""
        return self.source.window_s or 2 * self.source.lag_s

    def news_after_s(self) -> float:
        return _GAP_REFRESHES * max(_SLOWEST_REFRESH_S, self.source.period_s)

    def usual_period_ns(self, spacing_ns: Floats, since_read_ns: Floats) -> float:
        """The low quartile: at constant power a refresh may change nothing and not be noticed.

        No GPU takes longer than 100 ms (docs/measurement, B); its readers may.
        """
        quartile = np.sort(spacing_ns)[len(spacing_ns) // 4]
        return float(min(quartile, max(_SLOWEST_REFRESH_S * NS_PER_S, median(since_read_ns))))

    def begin(self, refreshed_ns: Floats, changes: Changes) -> None:
        self.refresh_s = self.refresh_s or _SLOWEST_REFRESH_S
        slow_s = max(_SLOWEST_REFRESH_S, 1.05 * self.source.period_s)
        if len(refreshed_ns) < 2:
            self.refresh_s = self.source.refresh_s or min(self.refresh_s, slow_s)
        self.lag_s = self.source.lag_s or (_USUAL_LAG * self.refresh_s if self.dense else 0.0)
        self.hold_before_s = 2 * max(self.source.period_s, 0.1)
        first_ns = float(changes.t_ns[0])
        if len(refreshed_ns):  # what is there at first was taken a refresh before the next
            first_ns = max(first_ns - self.refresh_s * NS_PER_S / 2, min(first_ns, refreshed_ns[0]))
        first_ns = min(first_ns, float(changes.t_ns[0]))
        self._watts = self.first_w = self.last_w = float(changes.values[0])
        self.lowest_w = self.highest_w = self._watts
        self._tail = changes.values[:1]
        self._seen_ns = first_ns
        self.knot_ns = self.begin_ns = first_ns - self.lag_s * NS_PER_S
        if len(refreshed_ns):
            self.add(refreshed_ns, changes.after_first())

    def add(self, refreshed_ns: Floats, changes: Changes) -> None:
        values, period = changes.values, self.refresh_s * NS_PER_S
        earlier = np.append(self._watts, values[:-1])
        since = np.append(self._seen_ns, refreshed_ns[:-1])
        self._watch(earlier, values, np.rint((refreshed_ns - since) / period))
        # Two knots a change: the end of the reading before, where it was held, and the change.
        until = np.minimum(refreshed_ns - period, changes.t_ns - changes.since_read_ns)
        always = np.ones(len(values), bool)
        keep = np.stack((until > since + period / 2, always), axis=1).ravel()
        t = np.stack((until, refreshed_ns), axis=1).ravel()[keep] - self.lag_s * NS_PER_S
        watts = np.stack((earlier, values), axis=1).ravel()[keep]
        held = np.stack((keep[::2], ~always), axis=1).ravel()[keep]
        self._watts, self._seen_ns = float(values[-1]), float(refreshed_ns[-1])
        self._through(t, watts, held)

    def _through(self, t: Floats, watts: Floats, held: Mask) -> None:
        """Adds knots; until those that are `held` the reading before was still seen."""
        before = np.append(self.last_w, watts[:-1])
        span_s = np.maximum(np.diff(t, prepend=self.knot_ns) / NS_PER_S, 0.0)
        mean_w, change_w = 0.5 * (watts + before), watts - before
        gap = ~held & (span_s > _GAP_REFRESHES * max(self.refresh_s, self.source.period_s))
        window_s = self._averages_s
        if window_s > self.refresh_s:
            # An average sees all of the run, but makes a ramp, as long as its window, of an edge.
            slope = change_w / np.maximum(span_s, self.refresh_s / 2)
            duty_j2, edge_j2 = np.zeros(len(t)), (slope * window_s**2 / 12) ** 2
            self.common_edge_j2 += float(edge_j2 @ span_s)
        else:
            duty_j2 = np.where(gap, 0.0, (change_w * span_s) ** 2)
            edge_j2 = np.where(gap, 0.0, (change_w * span_s) ** 2 / 12)
        sums = np.array((mean_w * span_s, duty_j2, np.where(gap, span_s, 0.0) ** 2))
        sums = self._sums[:, np.newaxis] + np.cumsum(sums, axis=1)
        self.last_w, self.last_change_w = float(watts[-1]), 0.0
        self.emit(t, sums, np.array((mean_w, edge_j2)))

    def _watch(self, earlier: Floats, values: Floats, refreshes: Floats) -> None:
        """Notes the range and the regularity of the readings, each as often as it was refreshed."""
        self.lowest_w = min(self.lowest_w, float(values.min()))
        self.highest_w = max(self.highest_w, float(values.max()))
        self._count += int(np.maximum(refreshes, 1).sum())
        times = np.clip(refreshes, 1, 4).astype(np.int64) - 1  # more repeats add nothing
        new = np.repeat(np.stack((earlier, values), axis=1).ravel(),
                        np.stack((times, np.ones_like(times)), axis=1).ravel())  # fmt: skip
        series = np.append(self._tail, new)
        for apart in (1, 2, 3):
            change = (series[apart:] - series[:-apart])[-len(new) :]
            self._structure[apart - 1] += float(change @ change)
        self._tail = series[-3:]

    def finish(self) -> EnergyCurve:
        if self.first_ns < 0:
            return self.curve()
        if not self._started and self._first_changes:
            self._start()
        last = self.last_ns - self.lag_s * NS_PER_S
        if last > self.knot_ns:
            self._through(np.array([last]), np.array([self.last_w]), np.ones(1, bool))
        # The last reading is held for as long as the next one could be expected to take.
        self.extend(self.lag_s + self.hold_before_s)
        duty = self._averages_s / self.refresh_s if self.source.window_s else _DUTY
        duty = min(max(duty, _LEAST_DUTY), 1.0)
        one_w2, two_w2, _ = self._structure.tolist()
        self._cumulative[1] *= duty_coefficient(one_w2, two_w2, duty=duty) if self._count else 0.0
        self._cumulative[2] *= max(0.0, self.highest_w - self.lowest_w) ** 2 / 12
        change_w2 = float(self._structure[0]) / max(self._count, 1)
        window_s = self._averages_s
        if window_s > self.refresh_s:
            # The ramps that an average makes of fast changes are too flat to show where these were.
            seconds = max((self.knot_ns - self.begin_ns) / NS_PER_S, 1e-9)
            self._local[1] += self.common_edge_j2 / seconds
            # Of white noise, the change is that of the energy of two refreshes a window apart.
            short_j2 = change_w2 * window_s**2 / (2 * self.refresh_s), 0.0
        else:
            part = max(1 / 12, duty_coefficient(one_w2, two_w2, duty=duty))
            alike = self._alike()
            change_w2 *= (1 + alike) / (1 - alike)  # of what the sensor has smoothed
            self._local[1] = np.maximum(self._local[1], part * change_w2 * self.refresh_s**2)
            short_j2 = 0.0, change_w2
        facts = {"lag_u_s": self._lag_u_s(), "aliased": self._aliased(), "short_j2": short_j2}
        if window_s <= self.refresh_s and self._count >= _LAG_REFRESHES:
            facts["extremes_w"] = extremes_w(self.lowest_w, self.highest_w)
        elif window_s > self.refresh_s:
            # An average hides how far power went, but not beyond what the board may draw.
            limit_w = _OVER_RATED * self.source.rated_w or _UNRATED * self.highest_w
            facts |= {"averages_s": window_s, "extremes_w": (0.0, max(limit_w, self.highest_w))}
        return self.curve(level_j2=self._level_j2(), **facts)

    def _level_j2(self) -> float:
        """What rows that are not stored may be off by, if only the mean was kept."""
        if not self._left_out:
            return 0.0
        range_w = self.highest_w - self.lowest_w
        off_j = min(LEVEL_S * self.highest_w, _LONGEST_UNSTORED_S * range_w)
        return off_j**2 / 3

    def _alike(self) -> float:
        """How much of each change of the readings the next one repeats, as a part of it.

        A sensor that approaches the power exponentially repeats e^(-T/lag) of it. So does power
        that changes slowly, which cannot be told from it, up to the slowest sensor.
        """
        one_w2, two_w2 = self._structure[:2].tolist()
        if self._count < _LAG_REFRESHES or one_w2 <= 0:
            return 0.0
        repeated = float(two_w2 / one_w2 / 2 - 1)
        return min(max(repeated, 0.0), math.exp(-self.refresh_s / _LONGEST_LAG_S))

    def _lag_u_s(self) -> float:
        """How well it is known how far readings trail."""
        known = self._averages_s > self.refresh_s or (self.source.stated_by and self.source.lag_s)
        alike = 0.0 if known else self._alike()
        lag_s = -self.refresh_s / math.log(alike) if alike > 0 else 0.0
        stated_s = self.source.lag_u_s
        return math.hypot(self.refresh_s / UNIFORM, max(0.0, lag_s - self.lag_s), stated_s)

    def _aliased(self) -> bool:
        """Whether readings repeat after two or three refreshes: then so does the load.

        The sensor then sees the same two or three moments of each period of the load, and what lies
        between them is unknown. A load in step with the refreshes themselves looks constant.
        """
        one, *others = self._structure.tolist()
        mean_w = 0.5 * (self.lowest_w + self.highest_w)
        if self._averages_s > self.refresh_s or self._count < _ALIAS_REFRESHES:
            return False
        swing = one / (2 * self._count) > (_ALIAS_SWING * mean_w) ** 2
        # If the phase drifts through all of the period several times, all of it is seen.
        repeats = min(_ALIAS_REPEATS, _ALIAS_DRIFT / self._count)
        return bool(swing and min(others) < repeats * one)


_DUTY = 0.25
"""The part of a refresh period that a power reading looks at, where it is unknown: GA100's and
H100's 25 of 100 ms, the least of all classes (SC24)."""

_LEAST_DUTY = 0.01


def duty_coefficient(one_w2: float, two_w2: float, *, duty: float = _DUTY) -> float:
    """The variance of a refresh's energy over (change of reading · refresh period)².

    `one_w2` and `two_w2` are mean (or summed) squares of the differences between readings one and
    two refreshes apart. Take a load with exponential autocorrelation, seen through windows that
    cover `duty` of each period T. The sum of its readings times T has the variance
    T²·Σ C_r(jT) − T·∫C a period, C_r being the readings' covariance and C the load's. two/one gives
    its correlation time: 1 if that is far below T, 2 if it is far above. The result is
    (1 − duty)/2 for white noise, and at most 1/12 for rare steps.
    """
    a = np.geomspace(30.0, 0.01, 60)  # T / correlation time
    x = a * duty
    own = 2 * (x - 1 + np.exp(-x)) / x**2
    factor = 2 * (np.cosh(x) - 1) / x**2
    apart = [factor * np.exp(-a * j) for j in (1, 2)]
    excess = own + 2 * factor / np.expm1(a) - 2 / a
    ratio = (own - apart[1]) / (own - apart[0])
    seen = two_w2 / one_w2 if one_w2 > 0 else 1.0
    return float(np.interp(seen, ratio, excess / (2 * (own - apart[0]))))
