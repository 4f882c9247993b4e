"""The cumulative energy of one source, and how it grows from readings that come in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler import _core
from pepr_profiler.energy.sources import Source
from pepr_profiler.record import Record
from pepr_profiler.trace.lane import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

NS_PER_S = 1e9

_LEARN_CHANGES = _core.REFRESH_CHANGES
"""Changes that are seen before a sensor's refresh period is estimated."""

_DENSE = 0.75
"""Reads closer together than this part of a refresh period tell when a refresh was."""

NARROW = 0.15
"""Reads closer together than this tell it without any help."""

UNIFORM = math.sqrt(12)
"""Width of a uniform distribution over its standard deviation."""

_JITTER = 0.03
"""A refresh may come this part of its period early (A100: 99 to 104 ms, docs/measurement, B)."""

_COUNTED_REFRESHES = 50
"""Over so many refreshes without a read the period, known to a hundredth, still tells the phase."""

_PERIOD_GAIN = 0.02
"""How fast a refresh period follows where refreshes contradict it (settles in some 30 of them)."""

_STEPS = (1e9, 1e8, 1e7, 1e6, 1e5, 1e4, 1e3, 100, 10, 1)
"""Resolutions that are looked for, in units of the raw number."""

GAP_S = 1.0
"""Without a reading for longer than this (and 10 periods) a lane has a gap worth telling."""


class EnergyCurve(Record):
    """Cumulative energy of one source: `energy_j` float64 (n,) at the instants asked for.

    Only differences mean anything. Outside [first_ns, last_ns] nothing was recorded.

    `gaps_ns` are the spans without a reading that are longer than GAP_S and 10 periods.
    `power_w` is the power at those instants, `edge_j2` the variance of the energy up to there,
    `duty_j2` and `gap_j2` cumulative variances; None is none. `quantum` is the resolution, J or W,
    `lag_u_s` the standard uncertainty of how far the readings trail, `aliased` whether the load
    seems to be in step with the refreshes.
    """

    source: Source
    energy_j: NDArray[np.float64]
    first_ns: int
    last_ns: int
    refresh_s: float = 0.0
    wraps: int = 0
    resets: int = 0
    unknown: int = 0
    longest_gap_s: float = 0.0
    longest_stall_s: float = 0.0
    power_w: NDArray[np.float64] | None = None
    edge_j2: NDArray[np.float64] | None = None
    duty_j2: NDArray[np.float64] | None = None
    gap_j2: NDArray[np.float64] | None = None
    quantum: float = 0.0
    lag_u_s: float = 0.0
    aliased: bool = False
    gaps_ns: tuple[tuple[int, int], ...] = ()


def gap_limit_s(period_s: float) -> float:
    """After so long without a reading, a lane that is read every `period_s` has a gap."""
    return max(GAP_S, 10 * period_s)


def _reads(rows: NDArray[np.bool_], batch: Batch) -> int:
    """How many readings these rows stand for; those left out were known or not as their row is."""
    left_out = 0 if batch.skipped is None else int(batch.skipped[rows].sum())
    return int(np.count_nonzero(rows)) + left_out


class Changes(Record):
    """The readings that differ from the one before: when read, how long after that one, what.

    `left_out` is how many rows since the change before were read and not stored.
    """

    t_ns: NDArray[np.float64]
    gap_ns: NDArray[np.float64]
    values: NDArray[np.float64]
    left_out: NDArray[np.float64]

    def rest(self) -> Changes:
        """All but the first."""
        return Changes(*(column[1:] for column in self))


@dataclass(eq=False, repr=False)
class Accumulator:
    """Turns a stream of (time, value) into cumulative energy at the instants asked for.

    A sensor stands still between its refreshes, so only changes of its value are knots of the
    curve. The refresh period is learnt from the first of them.
    """

    source: Source
    at_ns: NDArray[np.int64]
    first_ns: int = -1
    last_ns: int = -1
    unknown: int = 0
    longest_gap_s: float = 0.0
    refresh_s: float = 0.0
    jitter_s: float = 0.0  # standard uncertainty of the time of a knot
    quantum: float = 0.0
    dense: bool = False  # read faster than it is refreshed
    knot_ns: float = 0.0  # the last point of the piecewise linear curve
    first_w: float = math.nan
    last_w: float = math.nan  # power of the last piece
    last_edge_j2: float = 0.0
    last_change_w: float = 0.0
    held_s: float = 0.0  # how long the first power is taken to have flowed before the first knot
    _value: float = math.nan  # at the last reading
    _early: list[Changes] = field(default_factory=list)
    _changes: int = 0
    _left_out: float = 0.0  # rows in all, and up to the last change
    _left_out_before: float = 0.0
    _started: bool = False
    _placed_ns: float = math.nan  # the refresh that the last change is from
    _sure_ns: float = math.nan  # the last one that was seen within a narrow gap
    _filled: int = 0
    _gaps: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cumulative = np.zeros((3, len(self.at_ns)))  # energy; duty cycle and gaps, J²
        self._local = np.zeros((2, len(self.at_ns)))  # power; variance of the energy up to here
        self._sums = np.zeros(3)

    def notable_gap_s(self) -> float:
        """After this long without a reading, even the same value is news."""
        return math.inf

    def feed(self, t_ns: NDArray[np.int64], values: NDArray[np.float64], batch: Batch) -> None:
        good = np.isfinite(values)
        if self.source.zero_is_unknown:
            good &= values > 0
        self.unknown += _reads(~good, batch)
        t = t_ns[good].astype(np.float64)
        if not len(t):
            self._left_out += 0 if batch.skipped is None else float(batch.skipped.sum())
            return
        gap_ns = np.diff(t, prepend=self.last_ns if self.last_ns >= 0 else t[0])
        if batch.skipped is not None and batch.gap_ns is not None:
            # Rows were left out because nothing happened in them: they were read all the same.
            gap_ns = np.where(batch.skipped[good] > 0, batch.gap_ns[good], gap_ns)
        self.longest_gap_s = max(self.longest_gap_s, float(np.max(gap_ns)) / NS_PER_S)
        long = np.flatnonzero(gap_ns > gap_limit_s(self.source.period_s) * NS_PER_S)
        self._gaps += [(int(t[i] - gap_ns[i]), int(t[i])) for i in long]
        known = values[good] * self.source.scale
        changed = np.diff(known, prepend=self._value) != 0  # of the first, which follows NaN, too
        changed |= gap_ns > self.notable_gap_s() * NS_PER_S
        if self.first_ns < 0:
            self.first_ns = int(t[0])
        self.last_ns, self._value = int(t[-1]), float(known[-1])
        left_out = np.full(np.count_nonzero(changed), self._left_out_before)
        if batch.skipped is not None:
            total = self._left_out + np.cumsum(batch.skipped, dtype=np.float64)
            self._left_out, left_out = float(total[-1]), total[good][changed]
        left_out, before = np.diff(left_out, prepend=self._left_out_before), left_out
        if len(before):
            self._left_out_before = float(before[-1])
        changes = Changes(t[changed], gap_ns[changed], known[changed], left_out)
        if self._started:
            if len(changes.t_ns):
                self.join(self._place(changes), changes)
            return
        self._early.append(changes)
        self._changes += len(changes.t_ns)
        if self._changes > _LEARN_CHANGES:
            self._start()

    def _start(self) -> None:
        """Learns from the first changes and begins the curve with them."""
        columns = zip(*self._early, strict=True)
        all_changes = Changes(*(np.concatenate(column) for column in columns))
        self._early.clear()
        self._started = True
        self._learn(all_changes)
        placed = self._place(all_changes.rest())
        self.begin(placed, all_changes)

    def _learn(self, changes: Changes) -> None:
        """Refresh period, jitter and resolution; from a fixed number, however rows are cut."""
        t, gap, values, _ = (column[: _LEARN_CHANGES + 1] for column in changes)
        t, gap = t[1:], gap[1:]  # the first value is no change
        self.refresh_s = self.source.period_s
        if len(t) == 1:
            self.refresh_s = max(float(t[0] - changes.t_ns[0]), float(gap[0])) / NS_PER_S
        elif len(t) > 1:
            period = self.typical(np.diff(t), gap)
            self.dense = bool(median(gap) < _DENSE * period)
            # A line through the middles of the gaps, in which the changes lie, over the refreshes.
            # Where reads were dense at first and then put off to follow the refreshes, only the
            # dense ones have a middle that says anything.
            sharp = gap < _DENSE * period if self.dense else np.full(len(t), True)
            gap = gap[sharp]
            middle = t[sharp] - gap / 2 if self.dense else t
            number = np.append(0.0, np.cumsum(np.maximum(np.rint(np.diff(middle) / period), 1)))
            off, mean = number - number.mean(), float(middle.mean())
            slope = float(off @ (middle - mean)) / float(off @ off)
            if abs(slope / period - 1) < 0.3:  # else it is no clockwork
                period = slope
                left = middle - mean - slope * off
                # Two of the degrees of freedom went into the line.
                spread = math.sqrt(float(left @ left) / max(1, len(left) - 2))
                self.jitter_s = min(spread, period / 2) / NS_PER_S
                if self.dense:
                    self.jitter_s = max(self.jitter_s, float(median(gap)) / NS_PER_S / UNIFORM)
                    first = mean + slope * float(off[0])
                    self._placed_ns = first - (round((first - float(t[0])) / slope) + 1) * slope
                elif (narrow := gap < NARROW * period).any():  # these tell the phase of all
                    wide = float(median(gap[narrow])) / UNIFORM
                    self.jitter_s = max(wide, float(np.std((left - gap / 2)[narrow]))) / NS_PER_S
            self.refresh_s = period / NS_PER_S
        # Readings that are all multiples of ten steps come in steps of ten (psys of some servers
        # counts whole joules in units of 1 uJ). A few levels only could be round by chance.
        raw = values / self.source.scale
        if len(set(values.tolist())) >= _LEARN_CHANGES // 2 and (np.abs(raw) < 2.0**53).all():
            step = next((s for s in _STEPS if (np.abs(raw - s * np.rint(raw / s)) < 1e-6).all()), 0)
            self.quantum = step * self.source.scale

    def typical(self, between: NDArray[np.float64], gap: NDArray[np.float64]) -> float:
        """A usual time between two changes, ns: the mean without those that missed a refresh."""
        del gap
        return float(np.mean(between[between <= 2.5 * median(between)]))

    def _place(self, changes: Changes) -> NDArray[np.float64]:
        """When the refreshes were that these changes show.

        A change happened between two reads. Where these are close together against the refresh
        period, or some of them are (a lane that follows the refreshes is too early now and then),
        refreshes are taken to be equally spaced as far as the reads allow, over a gap in the reads
        too; where none are, each read is as fresh as one can know.
        """
        t, gap = changes.t_ns, changes.gap_ns
        period = self.refresh_s * NS_PER_S
        if not len(t):
            return t
        alone = np.where(gap < _DENSE * period, t - gap / 2, t)
        known = gap < NARROW * period
        if known.all():
            self._placed_ns = float(alone[-1])
            return alone
        if not self.dense and not known.any() and math.isnan(self._placed_ns):
            return alone
        placed, last, sure = [], self._placed_ns, self._sure_ns
        if not self.dense and math.isnan(last) and known.any():  # from the first sure one back
            first = float(alone[int(np.argmax(known))])
            last = first - (round((first - float(t[0])) / period) + 1) * period
        columns = (t.tolist(), gap.tolist(), alone.tolist(), known.tolist())
        for latest, width, best, certain in zip(*columns, strict=True):
            if certain and not self.dense:
                if not math.isnan(sure):  # what the reads in between made of it does not matter
                    count = max(1, round((best - sure) / period))
                    if count <= _COUNTED_REFRESHES:
                        off = (best - sure) / count - period
                        period += _PERIOD_GAIN * count * min(max(off, -0.1 * period), 0.1 * period)
                last = sure = best
            elif certain or math.isnan(last):
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
            placed.append(last)
        self.refresh_s = period / NS_PER_S
        self._placed_ns, self._sure_ns = last, sure
        return np.array(placed)

    def begin(self, placed: NDArray[np.float64], changes: Changes) -> None:
        """Begins the curve with the first readings; `placed` is when all but the first changed."""
        raise NotImplementedError

    def join(self, placed: NDArray[np.float64], changes: Changes) -> None:
        raise NotImplementedError

    def emit(
        self, t: NDArray[np.float64], sums: NDArray[np.float64], local: NDArray[np.float64]
    ) -> slice:
        """Appends knots to the curve and fills in the instants that they cover: those returned.

        `sums` (3, n) are cumulative at the knots `t`, `local` (2, n) of the pieces that end there.
        """
        begin = self._filled
        end = int(np.searchsorted(self.at_ns, t[-1], side="right"))
        if end > self._filled:
            now = slice(self._filled, end)
            at = self.at_ns[now].astype(np.float64)
            knots = np.concatenate(([self.knot_ns], t))
            for row, (before, after) in enumerate(zip(self._sums, sums, strict=True)):
                self._cumulative[row, now] = np.interp(at, knots, np.append(before, after))
            piece = np.minimum(np.searchsorted(t, at), len(t) - 1)
            self._local[:, now] = local[:, piece]
            self._cumulative[0, now] -= self._before_first_j(at)
            self._filled = end
        self.knot_ns, self._sums = float(t[-1]), sums[:, -1]
        self.last_edge_j2 = float(local[1, -1])
        return slice(begin, self._filled)

    def _before_first_j(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self.held_s:
            return np.zeros(len(at))
        # Only before the very first knot is an instant before the last one.
        return self.first_w * np.clip((self.knot_ns - at) / NS_PER_S, 0.0, self.held_s)

    def extend(self, limit_s: float) -> None:
        """Goes on at the last power for up to `limit_s`, then stands still."""
        rest = slice(self._filled, None)
        at = self.at_ns[rest].astype(np.float64)
        beyond_s = np.clip((at - self.knot_ns) / NS_PER_S, 0.0, limit_s)
        self._cumulative[:, rest] = self._sums[:, np.newaxis]
        self._cumulative[0, rest] += self.last_w * beyond_s - self._before_first_j(at)
        self._local[0, rest] = self.last_w
        self._local[1, rest] = self.last_edge_j2 + (self.last_change_w * beyond_s) ** 2

    def finish(self) -> EnergyCurve:
        raise NotImplementedError

    def curve(self, **facts: Any) -> EnergyCurve:
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
            longest_gap_s=self.longest_gap_s,
            power_w=self._local[0],
            edge_j2=self._local[1],
            duty_j2=duty_j2,
            gap_j2=gap_j2,
            quantum=self.quantum,
            gaps_ns=tuple(self._gaps),
            **facts,
        )


def median(values: NDArray[np.float64]) -> float:
    """The upper median; np.median loads numpy.ma, 15 ms."""
    return float(np.sort(values)[len(values) // 2])
