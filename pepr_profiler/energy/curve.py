"""The cumulative energy of one source, and how it is built from readings that come in batches.

A sensor shows a new value at each of its refreshes and stands still in between. When it is read
more often than it is refreshed, most readings repeat the one before. So the curve is built from the
changes: what matters is when the refresh was that a change shows, which lies between two reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pepr_profiler import _core
from pepr_profiler.energy.sources import Source
from pepr_profiler.record import Floats, Ints, Mask, Record
from pepr_profiler.trace.lane import Batch
from pepr_profiler.units import NS_PER_S

_LEARN_CHANGES = _core.REFRESH_CHANGES
"""So many changes are seen before a sensor's refresh period is estimated."""

_DENSE = 0.75
"""Reads closer together than this part of a refresh period show when a refresh was, if its
neighbours are used too."""

NARROW = 0.15
"""Reads closer together than this part of it show that by themselves."""

UNIFORM = math.sqrt(12)
"""Width of a uniform distribution over its standard deviation."""

_JITTER = 0.03
"""A refresh may come this part of its period early (A100: 99 to 104 ms, docs/measurement, B)."""

_COUNTED_REFRESHES = 50
"""After so many refreshes without a read the phase is still known, from a period that is known to a
hundredth."""

_PERIOD_GAIN = 0.02
"""How fast the period is corrected where refreshes contradict it (settles in some 30 of them)."""

_SURPRISES = 15
"""How well refreshes are foreseen is learnt from the last so many that two reads show."""

_NORMAL_MEDIAN = 0.6745
"""Median of how far a normal variable is from its mean, over its standard deviation."""

_STEPS = (1e9, 1e8, 1e7, 1e6, 1e5, 1e4, 1e3, 100, 10, 1)
"""Resolutions that are looked for, in units of the raw number."""

_UNREAD_SWING = 0.4
"""Power goes beyond the extremes of its readings by this part of their range (judgement)."""

_MOST_SECONDS = 1 << 20
"""A run of more than 12 days is looked at in as many longer steps instead of seconds: an array over
them takes 8 MB, and each source has dozens."""

_GAP_S = 1.0
"""Without a reading for longer than this (and 10 periods) a lane has a gap worth a warning."""


class EnergyCurve(Record):
    """Cumulative energy of one source: `energy_j` float64 (n,) at the instants asked for.

    Only its differences mean anything. Outside [first_ns, last_ns] nothing was recorded. Energy is
    known of the time `flow_ns`, which is a little longer: the first and the last power went on.

    At the same instants, `power_w` is the power, `edge_j2` the variance of the energy up to there,
    and `duty_j2` and `gap_j2` are cumulative variances; None where there is none. `unknown` counts
    readings that failed, `impossible` those that were left out. `gaps_ns` are the spans without a
    reading that are longer than `gap_limit_s`. `quantum` is the resolution, J or W, `lag_u_s` the
    standard uncertainty of how far the readings trail, `aliased` whether the load seems to be in
    step with the refreshes.

    The edges of a window of t s add no more than a·t + b·t² J² to its variance, `short_j2` being
    (a, b). Power was never below or above `extremes_w`. Of a counter, `inside` says where in its
    intervals the instants lie, and `edge_j2` is only for those beyond the last refresh. `quiet_ns`
    are the spans between two of its changes that are longer than `quiet_s`, and `changed_ns` is its
    last change. `instead_of` names the source that did not answer in the spans `instead_ns`, in
    which this is another sensor's energy; `instead_averages_s` is `averages_s` of that sensor.
    `only_zero` says that 0 was all that it, or its power, read. `level_j2` is the variance at any
    instant by the rows of a gauge that were not stored, if the device has a counter. `averages_s`
    is the time over which power readings are averages, if it exceeds the refresh.
    """

    source: Source
    energy_j: Floats
    first_ns: int
    last_ns: int
    refresh_s: float = 0.0
    wraps: int = 0
    resets: int = 0
    unknown: int = 0
    impossible: int = 0
    longest_gap_s: float = 0.0
    longest_stall_s: float = 0.0
    power_w: Floats | None = None
    edge_j2: Floats | None = None
    duty_j2: Floats | None = None
    gap_j2: Floats | None = None
    quantum: float = 0.0
    lag_u_s: float = 0.0
    aliased: bool = False
    gaps_ns: tuple[tuple[int, int], ...] = ()
    inside: Inside | None = None
    short_j2: tuple[float, float] = (math.inf, math.inf)
    extremes_w: tuple[float, float] = (0.0, math.inf)
    quiet_ns: tuple[tuple[int, int], ...] = ()
    quiet_s: float = math.inf
    changed_ns: int = -1
    instead_of: str = ""
    instead_ns: tuple[tuple[int, int], ...] = ()
    instead_averages_s: float = 0.0
    flow_ns: tuple[float, float] = (-math.inf, math.inf)
    only_zero: bool = False
    level_j2: float = 0.0
    averages_s: float = 0.0

    @property
    def instead_s(self) -> float:
        """For how long this is another sensor's energy."""
        return sum(end_ns - begin_ns for begin_ns, end_ns in self.instead_ns) / NS_PER_S


class Inside(Record):
    """Where instants (n,) lie between the refreshes of a counter, and what is unknown there.

    `interval` numbers the intervals between refreshes, -1 where an instant is in none; `part` is
    how far into it the instant is, 0 to 1. The energy of a part f of an interval has the variance
    `bridge_j2`·f·(1 - f), if power changes often inside it, and at most `even_j2`·f².
    The times of the refreshes at its begin and its end have the standard uncertainties
    `refresh_u_s` (2, n). `interval_j` is its energy, `interval_s` its length.
    `repeats`, 0 to 1, is how far the load repeats within the intervals.
    """

    interval: Ints
    part: Floats
    bridge_j2: Floats
    even_j2: Floats
    refresh_u_s: Floats
    interval_j: Floats
    interval_s: Floats
    repeats: float


def extremes_w(lowest_w: float, highest_w: float) -> tuple[float, float]:
    """What power can have reached whose readings, short means, were between these."""
    margin_w = _UNREAD_SWING * (highest_w - lowest_w)
    return max(0.0, lowest_w - margin_w), highest_w + margin_w


def steps_of(span_ns: tuple[int, int], at_ns: Ints) -> tuple[int, int]:
    """The first and the last index of the grid's instants that hold a span, as far as they do."""
    first = max(0, int(np.searchsorted(at_ns, span_ns[0], side="right")) - 1)
    return first, min(len(at_ns) - 1, int(np.searchsorted(at_ns, span_ns[1], side="left")))


def seconds_in(begin_ns: int, end_ns: int) -> int:
    """Into how many steps of a second, or a little longer, a window is divided."""
    return min(max(1, (end_ns - begin_ns) // NS_PER_S), _MOST_SECONDS)


def gap_limit_s(period_s: float) -> float:
    """How long a lane that is read every `period_s` may go without a reading before it is a gap."""
    return max(_GAP_S, 10 * period_s)


class Changes(Record):
    """The readings that differ from the one before, (n,) each.

    They were read at `t_ns`, `since_read_ns` after the reading before. `left_out` is how many rows
    since the last change were read and not stored. `bridge_j2` is the variance of what a reset just
    before each of them made unknown, J².
    """

    t_ns: Floats
    since_read_ns: Floats
    values: Floats
    left_out: Floats
    bridge_j2: Floats

    def after_first(self) -> Changes:
        """All but the first."""
        return Changes(*(column[1:] for column in self))


@dataclass(eq=False, repr=False)
class Accumulator:
    """Turns a stream of (time, value) into cumulative energy at the instants asked for.

    The curve goes through knots; between two of them lies an interval. Knots are made of changes of
    the value. The refresh period is learnt from the first changes.
    """

    source: Source
    at_ns: Ints
    first_ns: int = -1
    last_ns: int = -1
    unknown: int = 0
    zeros: int = 0
    longest_gap_s: float = 0.0
    refresh_s: float = 0.0
    jitter_s: float = 0.0  # standard uncertainty of the time of a knot
    quantum: float = 0.0
    dense: bool = False  # read more often than it is refreshed
    knot_ns: float = 0.0  # the last knot
    first_w: float = math.nan
    last_w: float = math.nan  # power in the last interval
    last_edge_j2: float = 0.0
    last_change_w: float = 0.0
    hold_before_s: float = 0.0  # the first power is taken to have flowed so long before it
    _value: float = math.nan  # of the last reading
    _first_changes: list[Changes] = field(default_factory=list)
    _change_count: int = 0
    _left_out: float = 0.0  # rows that were not stored, in all
    _left_out_before: float = 0.0  # and up to the last change
    _started: bool = False
    _refreshed_ns: float = math.nan  # the refresh that the last change shows
    _sure_refresh_ns: float = math.nan  # the last one that two reads close together show
    _unfollowed: bool = False  # each read of a GPU's counter brings news: refreshes are not seen
    _surprises_ns: Floats = field(default_factory=lambda: np.zeros(0))  # of sure refreshes
    _filled: int = 0  # instants whose energy is there
    _gaps: list[tuple[int, int]] = field(default_factory=list)
    _flow_ns: tuple[float, float] = (math.nan, math.inf)

    def __post_init__(self) -> None:
        self.refresh_u_ns = np.zeros(0)  # of the refreshes that were found last
        self._cumulative = np.zeros((3, len(self.at_ns)))  # energy; duty cycle and gaps, J²
        self._local = np.zeros((2, len(self.at_ns)))  # power; variance of the energy up to here
        self._sums = np.zeros(3)
        self.readings = self.source.readings()

    # --- what counters and power readings do differently ---

    def begin(self, refreshed_ns: Floats, changes: Changes) -> None:
        """Begins the curve; `refreshed_ns` are the refreshes of all changes but the first."""
        raise NotImplementedError

    def add(self, refreshed_ns: Floats, changes: Changes) -> None:
        """Continues the curve with changes, and the refreshes that they show."""
        raise NotImplementedError

    def finish(self) -> EnergyCurve:
        """The curve, when all has been fed."""
        raise NotImplementedError

    def news_after_s(self) -> float:
        """After this long without a reading, the same value again counts as a change."""
        return math.inf

    def usual_period_ns(self, spacing_ns: Floats, since_read_ns: Floats) -> float:
        """The usual one of the times between two changes: the mean of those that missed none."""
        del since_read_ns
        return float(np.mean(spacing_ns[spacing_ns <= 2.5 * median(spacing_ns)]))

    # --- from readings to changes ---

    def feed(self, t_ns: Ints, values: Floats, batch: Batch) -> None:
        """Takes in a batch's readings of this source, and when they were read."""
        known = self.source.knows(values)
        if self.source.zero_is_unknown:
            self.zeros += int(np.count_nonzero(values == 0))
        skipped = np.zeros(len(t_ns)) if batch.skipped is None else batch.skipped
        # Rows that were left out were known or not as the row behind them.
        self.unknown += int(np.count_nonzero(~known) + skipped[~known].sum())
        left_out = self._left_out + np.cumsum(skipped, dtype=np.float64)
        self._left_out += float(skipped.sum())
        screened = self.readings.screen(t_ns[known], values[known])
        known[known] = screened.sound
        if not known.any():
            return
        t, level = t_ns[known].astype(np.float64), screened.level
        since_read_ns = self._since_read_ns(t, known, batch)
        changed = np.diff(level, prepend=self._value) != 0  # the first, which follows NaN, too
        changed |= since_read_ns > self.news_after_s() * NS_PER_S
        if self.first_ns < 0:
            self.first_ns = int(t[0])
        self.last_ns, self._value = int(t[-1]), float(level[-1])
        before_change = left_out[known][changed]
        changes = Changes(
            t[changed],
            since_read_ns[changed],
            level[changed],
            np.diff(before_change, prepend=self._left_out_before),
            np.zeros(len(before_change))
            if screened.bridge_j2 is None
            else screened.bridge_j2[changed],
        )
        if len(before_change):
            self._left_out_before = float(before_change[-1])
        if self._started:
            if len(changes.t_ns):
                self.add(self._refresh_times(changes), changes)
            return
        self._first_changes.append(changes)
        self._change_count += len(changes.t_ns)
        if self._change_count > _LEARN_CHANGES:
            self._start()

    def _since_read_ns(self, t: Floats, known: Mask, batch: Batch) -> Floats:
        """How long before each known reading the one before was read; notes where too long."""
        since_ns = np.diff(t, prepend=self.last_ns if self.last_ns >= 0 else t[0])
        if batch.skipped is not None and batch.since_read_ns is not None:
            # Rows were left out because nothing happened in them: they were read all the same.
            since_ns = np.where(batch.skipped[known] > 0, batch.since_read_ns[known], since_ns)
        self.longest_gap_s = max(self.longest_gap_s, float(np.max(since_ns)) / NS_PER_S)
        long = np.flatnonzero(since_ns > gap_limit_s(self.source.period_s) * NS_PER_S)
        self._gaps += [(int(t[i] - since_ns[i]), int(t[i])) for i in long]
        return since_ns

    def _start(self) -> None:
        """Learns from the first changes and begins the curve with them."""
        columns = zip(*self._first_changes, strict=True)
        changes = Changes(*(np.concatenate(column) for column in columns))
        self._first_changes.clear()
        self._started = True
        # From a fixed number of changes, however rows are cut into batches.
        learnt = Changes(*(column[: _LEARN_CHANGES + 1] for column in changes))
        self._learn_refreshes(learnt)
        self._learn_resolution(learnt.values)
        self.begin(self._refresh_times(changes.after_first()), changes)

    # --- when the sensor was refreshed ---

    def _learn_refreshes(self, changes: Changes) -> None:
        """Learns the refresh period and its jitter."""
        t, since_read = changes.t_ns[1:], changes.since_read_ns[1:]  # the first is no change
        if len(t) == 0:
            self.refresh_s = self.source.refresh_s or self.source.period_s
            return
        if len(t) == 1:
            longest_ns = max(float(t[0] - changes.t_ns[0]), float(since_read[0]))
            self.refresh_s = self.source.refresh_s or longest_ns / NS_PER_S
            return
        period = self.usual_period_ns(np.diff(t), since_read)
        self.dense = bool(median(since_read) < _DENSE * period)
        # A line is put through the middles of the spans in which the changes lie, over the number
        # of the refresh. Where reads were dense at first and then put off to follow the refreshes,
        # only the middles of dense ones say anything.
        sharp = since_read < _DENSE * period if self.dense else np.full(len(t), True)
        since_read = since_read[sharp]
        middle = t[sharp] - since_read / 2 if self.dense else t
        number = np.append(0.0, np.cumsum(np.maximum(np.rint(np.diff(middle) / period), 1)))
        off, mean = number - number.mean(), float(middle.mean())
        slope = float(off @ (middle - mean)) / float(off @ off)
        if abs(slope / period - 1) < 0.3:  # else it is no clockwork
            period = slope
            residual = middle - mean - slope * off
            # Two of the degrees of freedom went into the line.
            spread = math.sqrt(float(residual @ residual) / max(1, len(residual) - 2))
            self.jitter_s = min(spread, period / 2) / NS_PER_S
            if self.dense:
                least_s = float(median(since_read)) / NS_PER_S / UNIFORM
                self.jitter_s = max(self.jitter_s, least_s)
                first = mean + slope * float(off[0])
                self._refreshed_ns = first - (round((first - float(t[0])) / slope) + 1) * slope
            elif (narrow := since_read < NARROW * period).any():  # these show the phase of all
                width = float(median(since_read[narrow])) / UNIFORM
                spread = float(np.std((residual - since_read / 2)[narrow]))
                self.jitter_s = max(width, spread) / NS_PER_S
        self.refresh_s = period / NS_PER_S
        all_news = not self.dense and bool((since_read >= _DENSE * period).all())
        self._unfollowed = all_news and self.source.source == "nvml-energy"

    def _learn_resolution(self, values: Floats) -> None:
        """Learns in which steps readings come: psys of some servers counts 1 J in units of 1 µJ.

        Readings that are all multiples of a step come in that step. A few could be so by chance.
        """
        raw = values / self.source.scale
        if len(set(values.tolist())) >= _LEARN_CHANGES // 2 and (np.abs(raw) < 2.0**53).all():
            step = next((s for s in _STEPS if (np.abs(raw - s * np.rint(raw / s)) < 1e-6).all()), 0)
            self.quantum = step * self.source.scale

    def _refresh_times(self, changes: Changes) -> Floats:
        """When the refreshes were that these changes show, ns.

        A refresh was between two reads. Where these are close together against the refresh period,
        or some of them are (a lane that follows the refreshes is too early now and then), refreshes
        are taken to be equally spaced as far as the reads allow, over a gap in the reads too. Where
        none are, a refresh is taken to be as late as the read that shows it.
        """
        t, since_read = changes.t_ns, changes.since_read_ns
        period = self.refresh_s * NS_PER_S
        self.refresh_u_ns = np.full(len(t), self.jitter_s * NS_PER_S)
        if not len(t):
            return t
        alone = np.where(since_read < _DENSE * period, t - since_read / 2, t)
        narrow = since_read < NARROW * period
        if narrow.all():
            self._refreshed_ns = float(alone[-1])
            return alone
        unfollowed = not narrow.any() or self._unfollowed
        if not self.dense and unfollowed and math.isnan(self._refreshed_ns):
            return alone
        refreshed, last, sure = [], self._refreshed_ns, self._sure_refresh_ns
        if not self.dense and math.isnan(last) and narrow.any():  # from the first sure one back
            first = float(alone[int(np.argmax(narrow))])
            last = first - (round((first - float(t[0])) / period) + 1) * period
        columns = (t.tolist(), since_read.tolist(), alone.tolist(), narrow.tolist())
        for latest, width, best, is_sure in zip(*columns, strict=True):
            if is_sure and not self.dense:
                if not math.isnan(sure):  # what was made of the reads in between does not matter
                    count = max(1, round((best - sure) / period))
                    if count <= _COUNTED_REFRESHES:
                        off = (best - sure) / count - period
                        period += _PERIOD_GAIN * count * min(max(off, -0.1 * period), 0.1 * period)
                last = sure = best
            elif is_sure or math.isnan(last):
                last = best
            elif width >= _DENSE * period:  # reads were put off: the last refresh before this one
                count = max(1, math.floor((latest - last) / period + _JITTER))
                expected = last + count * period
                if count > _COUNTED_REFRESHES:
                    expected = latest - period / 2
                last = min(max(expected, latest - width), latest)
            else:
                expected = last + max(1, round((best - last) / period)) * period
                last = min(max(expected, latest - width), latest)
                # Where the reads contradict, the period is a little off too.
                period += _PERIOD_GAIN * min(max(last - expected, -0.1 * period), 0.1 * period)
            refreshed.append(last)
        self.refresh_s = period / NS_PER_S
        found = np.array(refreshed)
        self._learn_surprises(found, since_read, narrow)
        self._refreshed_ns, self._sure_refresh_ns = last, sure
        return found

    def _learn_surprises(self, refreshed_ns: Floats, since_read_ns: Floats, sure: Mask) -> None:
        """Learns how well refreshes are foreseen: from how far those are off that two reads show.

        The others' standard uncertainty is that of a normal distribution of the same median.
        """
        step_ns, period_ns = np.diff(refreshed_ns, prepend=self._refreshed_ns), self.refresh_s * 1e9
        off_ns = np.abs(step_ns - np.maximum(np.rint(step_ns / period_ns), 1) * period_ns)[sure]
        seen_ns = np.concatenate((self._surprises_ns, off_ns[np.isfinite(off_ns)]))
        self._surprises_ns = seen_ns[-_SURPRISES:]
        last = np.cumsum(sure) + len(seen_ns) - np.count_nonzero(sure) - 1
        few = np.arange(len(seen_ns))[:, np.newaxis] - np.arange(_SURPRISES)
        ranked = np.sort(np.where(few >= 0, seen_ns[np.maximum(few, 0)], math.inf), axis=1)
        middle = np.minimum(few[:, 0], _SURPRISES - 1) // 2
        usual_ns = np.append(ranked[np.arange(len(seen_ns)), middle] / _NORMAL_MEDIAN, math.inf)
        usual_ns = np.where(sure | (last < 0), math.inf, usual_ns[last])
        self.refresh_u_ns = np.minimum(
            np.minimum(since_read_ns / UNIFORM, usual_ns), self.refresh_u_ns
        )

    # --- from knots to the instants asked for ---

    def emit(self, t: Floats, sums: Floats, local: Floats) -> slice:
        """Appends knots to the curve and fills in the instants up to the last; which these are.

        `sums` (3, n) are cumulative at the knots `t`, `local` (2, n) of the intervals before them.
        """
        self._flow_from(self.knot_ns)
        begin = self._filled
        end = int(np.searchsorted(self.at_ns, t[-1], side="right"))
        if end > self._filled:
            now = slice(self._filled, end)
            at = self.at_ns[now].astype(np.float64)
            knots = np.concatenate(([self.knot_ns], t))
            for row, (before, after) in enumerate(zip(self._sums, sums, strict=True)):
                self._cumulative[row, now] = np.interp(at, knots, np.append(before, after))
            interval = np.minimum(np.searchsorted(t, at), len(t) - 1)
            self._local[:, now] = local[:, interval]
            self._cumulative[0, now] -= self._before_first_j(at)
            self._filled = end
        self.knot_ns, self._sums = float(t[-1]), sums[:, -1]
        self.last_edge_j2 = float(local[1, -1])
        return slice(begin, self._filled)

    def _flow_from(self, knot_ns: float) -> None:
        """Notes that the first knot is there, if it is the first one."""
        if math.isnan(self._flow_ns[0]):
            self._flow_ns = knot_ns - self.hold_before_s * NS_PER_S, math.inf

    def _before_first_j(self, at: Floats) -> Floats:
        """What the first power makes of the time between these instants and the first knot."""
        if not self.hold_before_s:
            return np.zeros(len(at))
        # Only before the very first knot is an instant before the last one.
        return self.first_w * np.clip((self.knot_ns - at) / NS_PER_S, 0.0, self.hold_before_s)

    def extend(self, limit_s: float) -> None:
        """Goes on at the last power for up to `limit_s`, then stands still."""
        self._flow_from(self.knot_ns)
        self._flow_ns = self._flow_ns[0], self.knot_ns + limit_s * NS_PER_S
        rest = slice(self._filled, None)
        at = self.at_ns[rest].astype(np.float64)
        beyond_s = np.clip((at - self.knot_ns) / NS_PER_S, 0.0, limit_s)
        self._cumulative[:, rest] = self._sums[:, np.newaxis]
        self._cumulative[0, rest] += self.last_w * beyond_s - self._before_first_j(at)
        self._local[0, rest] = self.last_w
        self._local[1, rest] = self.last_edge_j2 + (self.last_change_w * beyond_s) ** 2

    def curve(self, **facts: Any) -> EnergyCurve:
        """The curve as far as it has come, with facts that only a subclass has."""
        energy_j, duty_j2, gap_j2 = self._cumulative
        if self.first_ns < 0:
            energy_j[:] = np.nan
        return EnergyCurve(
            self.source,
            energy_j,
            self.first_ns,
            self.last_ns,
            refresh_s=self.refresh_s,
            unknown=self.unknown,
            impossible=self.readings.impossible,
            only_zero=self.first_ns < 0 and self.zeros > 0,
            longest_gap_s=self.longest_gap_s,
            power_w=self._local[0],
            edge_j2=self._local[1],
            duty_j2=duty_j2,
            gap_j2=gap_j2,
            quantum=self.quantum,
            gaps_ns=tuple(self._gaps),
            flow_ns=self._flow_ns,
            **facts,
        )


def median(values: Floats) -> float:
    """The upper median; np.median loads numpy.ma, 15 ms."""
    return float(np.sort(values)[len(values) // 2])
