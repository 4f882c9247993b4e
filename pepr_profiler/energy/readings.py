"""Which readings of a sensor can be true, and what an energy counter counted between them.

Sensors show impossible numbers now and then: after suspend, when a driver starts, or when a counter
is read in the middle of an update. A reading that implies more power than such a device can draw
is missing. The next sound one says what flowed meanwhile, so that no joule is lost or invented.
Nothing here needs numpy before an array comes: the daemon, which stays small, uses it too.
"""

from __future__ import annotations

import math

from pepr_profiler.record import Record

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from pepr_profiler.record import Floats, Ints, Mask

_SLACK_NS = 50_000_000
"""A refresh may be seen late and the next one in time: between the two lies the energy of a time
that is longer than the one between the reads."""

_CONFIRMING_RISES = 3
"""So many plausible rises in a row show that a counter goes on from another value: it was reset."""

_RECENT_CHANGES = 4
"""The mean power over so many changes is that from before a reset."""

_MOST_RUNS = 4
"""So many other values that a counter may go on from are kept in mind."""

_SHORT_NS = 1_000_000_000
"""First readings that nothing has confirmed were impossible, unless they stood still for longer."""

_ALL_BITS = 2.0**32 - 1, 2.0**64
"""All 32 or 64 bits set (as a double): so drivers say that a counter has no value now."""

_BLOCK = 4096
"""Readings that are looked at together. After an impossible one its block is looked at anew."""


class Screened(Record):
    """Readings after the impossible ones were left out.

    Of all readings, `sound` (n,) says which are. `level` is, of the sound ones, the energy that was
    counted since the first reading, J, or the power, W. `bridge_j2` is the variance of what a
    reset made unknown just before each of them, J²; None if there is none.
    """

    sound: Mask
    level: Floats
    bridge_j2: Floats | None = None


class GaugeReadings:
    """Power readings: what lies above `limit_w` is impossible."""

    def __init__(self, *, limit_w: float, scale: float = 1.0) -> None:
        self.impossible = 0
        self._limit_w, self._scale = limit_w, scale

    def take(self, value: float) -> bool:
        """Whether a reading, unscaled, can be true."""
        sound = value * self._scale <= self._limit_w
        self.impossible += not sound
        return sound

    def screen(self, _t_ns: Ints, values: Floats) -> Screened:
        """`take` for many readings at once."""
        level = values * self._scale
        sound = level <= self._limit_w
        self.impossible += len(values) - int(sound.sum())
        return Screened(sound, level[sound])


class _Run:
    """Readings that follow from each other, but not from the last sound one."""

    def __init__(self, t_ns: int, raw: float) -> None:
        self.first_ns = self.changed_ns = t_ns
        self.first_raw = self.raw = raw
        self.counted = 0.0
        self.readings = 1
        self.rises = self.wraps = 0


class CounterReadings:
    """An energy counter, followed from reading to reading. Times are in ns, readings unscaled.

    A reading follows from an earlier one if the counter could have risen to it in the time since
    it last changed, at `limit_w`. So a counter that stood still may catch up. One that falls by
    about its range (`modulus`; 0: it has none) has passed its end.

    Readings that do not follow from the last sound one wait. If the next one follows from that
    again, they were impossible. If they follow from each other and rise _CONFIRMING_RISES times,
    the counter was reset, unless they follow from before the last few changes. What flowed over a
    reset is what it has counted since it began at 0, if it did, and for the rest of the time the
    power from before.
    """

    def __init__(self, *, limit_w: float, scale: float = 1.0, modulus: float = 0.0) -> None:
        self.impossible = self.wraps = self.resets = 0
        self.counted = 0.0
        """Since the first reading, unscaled."""
        self.bridge_j2 = 0.0
        """The variance of what the last sound reading added for a reset, J²."""
        self._per_ns = limit_w * 1e-9 / scale
        self._scale, self._modulus = scale, modulus
        self._raw = math.nan
        self._read_ns = self._changed_ns = 0
        self._early = 0  # readings before it was confirmed that they are the counter's own
        self._recent: list[tuple[int, float]] = []  # changes: when, and `counted` then
        self._runs: list[_Run] = []

    def take(self, t_ns: int, raw: float) -> bool:
        """Takes in the next reading; whether it is sound, and `counted` has been moved on."""
        self.bridge_j2 = 0.0
        if raw in _ALL_BITS:
            self.impossible += 1
            return False
        if math.isnan(self._raw):
            self._follow(t_ns, raw, 0.0)
            return True
        rise = self._rise(raw, self._raw, t_ns - self._changed_ns)
        if rise is not None:
            self._drop_runs()
            self.wraps += raw < self._raw
            self._follow(t_ns, raw, rise)
            return True
        for run in reversed(self._runs):
            rise = self._rise(raw, run.raw, t_ns - run.changed_ns)
            if rise is not None:
                break
        else:
            self._drop_runs(keep=_MOST_RUNS - 1)
            self._runs.append(_Run(t_ns, raw))
            return False
        run.readings += 1
        if rise > 0 or raw < run.raw:
            run.rises, run.changed_ns = run.rises + 1, t_ns
        run.wraps += raw < run.raw
        run.counted, run.raw = run.counted + rise, raw
        if run.rises < _CONFIRMING_RISES:
            return False
        self._accept_run(run, t_ns)
        return True

    def settle(self) -> int | None:
        """Ends the readings. If those that still wait were a reset, when the last change was."""
        run = max(self._runs, key=lambda run: run.rises, default=None)
        if run is None or not run.rises:
            self._drop_runs()
            return None
        self.bridge_j2 = 0.0
        self._accept_run(run, run.changed_ns)
        return run.changed_ns

    def screen(self, t_ns: Ints, raw: Floats) -> Screened:
        """`take` for many readings at once."""
        import numpy as np

        none = (raw == _ALL_BITS[0]) | (raw == _ALL_BITS[1])
        if none.any():
            self.impossible += int(none.sum())
            screened = self.screen(t_ns[~none], raw[~none])
            sound = np.zeros(len(raw), bool)
            sound[~none] = screened.sound
            return screened._replace(sound=sound)
        sound, counted = np.ones(len(raw), bool), np.empty(len(raw))
        bridge_j2 = None
        at = 0
        while at < len(raw):
            if not self._runs and not math.isnan(self._raw):
                block = slice(at, at + _BLOCK)
                at += self._follow_all(t_ns[block], raw[block], counted[block])
                if at >= len(raw) or at == block.stop:
                    continue
            sound[at] = self.take(int(t_ns[at]), float(raw[at]))
            counted[at] = self.counted
            if self.bridge_j2:
                bridge_j2 = np.zeros(len(raw)) if bridge_j2 is None else bridge_j2
                bridge_j2[at] = self.bridge_j2
            at += 1
        return Screened(
            sound, counted[sound] * self._scale, None if bridge_j2 is None else bridge_j2[sound]
        )

    # --- parts ---

    def _rise(self, raw: float, before: float, span_ns: int) -> float | None:
        """What was counted from one reading to another; None if it cannot be."""
        rise, most = raw - before, self._per_ns * (span_ns + _SLACK_NS)
        if rise < 0:
            rise = rise + self._modulus if self._modulus > 0 else math.nan
        return rise if 0 <= rise <= most else None

    def _follow(self, t_ns: int, raw: float, rise: float) -> None:
        self._read_ns = t_ns
        if rise > 0 or raw != self._raw:
            self._raw, self._changed_ns = raw, t_ns
            self.counted += rise
            self._recent = [*self._recent, (t_ns, self.counted)][-_RECENT_CHANGES:]
        self._early += not self._confirmed

    @property
    def _confirmed(self) -> bool:
        return len(self._recent) > _CONFIRMING_RISES

    def _follow_all(self, t_ns: Ints, raw: Floats, counted: Floats) -> int:
        """Follows readings up to the first that falls or is impossible; returns how many."""
        import numpy as np

        step = np.diff(raw, prepend=self._raw)
        changed = np.flatnonzero(step)
        span_ns = np.diff(t_ns[changed], prepend=self._changed_ns)
        ok = (step[changed] > 0) & (step[changed] <= self._per_ns * (span_ns + _SLACK_NS))
        count = len(raw) if ok.all() else int(changed[int(np.argmin(ok))])
        if not count:
            return 0
        counted[:count] = raw[:count] - self._raw + self.counted
        changed = changed[changed < count]
        if not self._confirmed:
            rises = _CONFIRMING_RISES - len(self._recent)
            self._early += int(changed[rises]) if len(changed) > rises else count
        last = changed[-_RECENT_CHANGES:]
        few = zip(t_ns[last].tolist(), counted[last].tolist(), strict=True)
        self._recent = [*self._recent, *few][-_RECENT_CHANGES:]
        self.counted, self._raw = float(counted[count - 1]), float(raw[count - 1])
        self._read_ns, self._changed_ns = int(t_ns[count - 1]), self._recent[-1][0]
        return count

    def _drop_runs(self, *, keep: int = 0) -> None:
        dropped = self._runs[: len(self._runs) - keep] if len(self._runs) > keep else []
        self.impossible += sum(run.readings for run in dropped)
        del self._runs[: len(dropped)]

    def _accept_run(self, run: _Run, t_ns: int) -> None:
        """Goes on from a run of readings that follow from each other."""
        earlier = self._before_spike(run)
        self.counted = (self._over_reset(run) if earlier is None else earlier) + run.counted
        self.wraps += run.wraps
        self._runs.remove(run)
        self._drop_runs()
        self._raw, self._read_ns, self._changed_ns = run.raw, t_ns, run.changed_ns
        self._recent = [(run.first_ns, self.counted - run.counted), (t_ns, self.counted)]

    def _before_spike(self, run: _Run) -> float | None:
        """`counted` where a run begins, if it follows from before the last changes.

        They were possible each, but a counter does not fall: it was they that were wrong.
        """
        for changed_ns, counted in reversed(self._recent[:-1]):
            raw = self._raw - (self.counted - counted)
            raw = raw % self._modulus if self._modulus > 0 else raw
            rise = self._rise(run.first_raw, raw, run.first_ns - changed_ns)
            if rise is not None:
                self.impossible += 1
                return counted + rise
        return None

    def _over_reset(self, run: _Run) -> float:
        """`counted` where a run begins, which follows from nothing."""
        after = run.counted / max(run.changed_ns - run.first_ns, 1)  # power, unscaled, per ns
        since_ns, before = self._read_ns, after
        if self._confirmed:
            (begin_ns, begin), (end_ns, end) = self._recent[0], self._recent[-1]
            before = (end - begin) / max(end_ns - begin_ns, 1)
            self.resets += 1
        elif run.first_ns - self._changed_ns < _SHORT_NS:  # the first readings were impossible
            since_ns = self._changed_ns
            self.impossible += self._early
        else:
            self.resets += 1
        gap_ns = run.first_ns - since_ns
        new = run.first_raw if 0 <= run.first_raw <= after * gap_ns else 0.0
        lost_ns = gap_ns - new / after
        self.bridge_j2 = (max(before, after) * lost_ns * self._scale) ** 2 / 3
        return self.counted + new + lost_ns * before
