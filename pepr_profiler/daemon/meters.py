"""Joules and watts of each source, from the rows that the daemon's lanes read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from pepr_profiler import _core
from pepr_profiler.daemon.lanes import ServedLanes
from pepr_profiler.daemon_client.protocol import map_ring
from pepr_profiler.energy.readings import CounterReadings, GaugeReadings
from pepr_profiler.energy.sources import UNITS, Place, Source, find_sources
from pepr_profiler.trace.lane import LaneInfo

STALE_S = 5.0
"""A number that has been unknown for longer is left out of the metrics."""

_SILENT_NS = 5_000_000_000
"""A counter that has not moved for longer, although it was read, gives way to another source of its
device, as in a recording (energy/fallback.py)."""

_SECOND_NS, _SECONDS_KEPT = 1_000_000_000, 32


@dataclass
class Meter:
    """One source: the joules that it counted since the daemon began, or its watts now."""

    source: Source
    energy_j: float = 0.0
    value: float = nan  # the last known reading, J or W
    t_ns: int = 0  # of that reading
    at_seconds_j: dict[int, float] = field(default_factory=dict)
    """`energy_j` at the latest whole seconds of CLOCK_MONOTONIC."""
    _readings: CounterReadings | GaugeReadings | None = None
    _counted_j: float = 0.0  # what the readings had counted when it was last added

    def take(self, t_ns: array[int], values: array[float]) -> None:
        """Takes in rows of its lane: their times and its values, unscaled."""
        source = self.source
        if self._readings is None or not self.t_ns:
            self._readings, self._counted_j = source.readings(), 0.0
        for at_ns, raw in zip(t_ns, values, strict=True):
            if not source.knows(raw):
                continue
            if isinstance(self._readings, GaugeReadings):
                if not self._readings.take(raw):
                    continue
            elif not self._readings.take(at_ns, raw):
                continue
            elif self.t_ns:
                # It is less only after a spike that was not seen to be one. A metric does not fall.
                step_j = max(0.0, self._readings.counted * source.scale - self._counted_j)
                if self.t_ns // _SECOND_NS != at_ns // _SECOND_NS:
                    self._pass_seconds(at_ns, step_j)
                self.energy_j += step_j
                self._counted_j += step_j
            self.value, self.t_ns = raw * source.scale, at_ns

    def in_second_j(self, second: int) -> float | None:
        """What was counted in a whole second; None if that is unknown, or too long ago."""
        ends = self.at_seconds_j.get(second), self.at_seconds_j.get(second + 1)
        return None if ends[0] is None or ends[1] is None else ends[1] - ends[0]

    def _pass_seconds(self, at_ns: int, step_j: float) -> None:
        """Notes the energy at each whole second up to a row, with constant power since the last."""
        seconds = range(self.t_ns // _SECOND_NS + 1, at_ns // _SECOND_NS + 1)
        for second in seconds[-_SECONDS_KEPT:]:
            part = (second * _SECOND_NS - self.t_ns) / (at_ns - self.t_ns)
            self.at_seconds_j[second] = self.energy_j + part * step_j
        for second in [s for s in self.at_seconds_j if s <= seconds[-1] - _SECONDS_KEPT]:
            del self.at_seconds_j[second]

    def known(self, now_ns: int) -> float | None:
        """J of a counter, else W; None if it has been unknown for STALE_S."""
        if not self.t_ns or now_ns - self.t_ns > STALE_S * 1e9:
            return None
        return self.energy_j if self.source.counter else self.value


@dataclass
class _Feed:
    """A lane's rows, from the ring that unprivileged clients read too."""

    sampler: _core.Sampler
    rows: _core.RingReader
    lane: LaneInfo
    newest_ns: int = 0
    last: dict[int, float] = field(default_factory=dict)
    """The last reading of each channel of energy or power, unscaled."""
    answered_ns: dict[int, int] = field(default_factory=dict)
    """When a counter last moved, or power was last known."""

    def note(self, t_ns: array[int], columns: Sequence[bytes]) -> None:
        """Notes which channels have answered in some rows."""
        self.newest_ns = t_ns[-1]
        for index, channel in enumerate(self.lane.channels):
            if UNITS.get(channel.quantity) != channel.unit:
                continue
            raw = array("d", columns[index][-8:])[0]
            moved = raw != self.last.get(index) if channel.counter else raw > 0
            if (isfinite(raw) and moved) or index not in self.answered_ns:
                self.answered_ns[index] = self.newest_ns
            if isfinite(raw):
                self.last[index] = raw

    def silent(self) -> set[Place]:
        """Places that have not answered for long, although they were read."""
        return {
            (self.lane.name, index)
            for index, at_ns in self.answered_ns.items()
            if self.newest_ns - at_ns > _SILENT_NS
        }


class Meters:
    """A meter for each source of all lanes. Only the daemon's thread calls it."""

    def __init__(self, lanes: ServedLanes) -> None:
        self._lanes = lanes
        self._feeds: dict[str, _Feed] = {}
        self._meters: dict[str, Meter] = {}  # of the sources that are there
        self._ever: dict[str, Meter] = {}  # and of those that were
        self._silent: set[Place] = set()

    def update(self) -> None:
        """Takes the rows since the last call. Rows lost in between cost no counter a joule.

        A counter whose lane was opened again goes on from where it was.
        """
        changed = False
        for lane in self._lanes:
            feed = self._feeds.get(lane.name)
            if not lane.ready or (feed is not None and feed.sampler is lane.sampler):
                continue
            if feed is not None:
                self._take(feed)
            try:
                descriptor = lane.sampler.share(coarse=lane.restricted)
            except RuntimeError:
                continue  # no descriptors left: its numbers are unknown until the next call
            since_ns = self._newest_ns(lane.name) if feed is not None else 0
            rows = map_ring(descriptor, since_ns)
            facts = LaneInfo(lane.name, lane.spec, lane.period_ns, lane.channels)
            self._feeds[lane.name] = _Feed(lane.sampler, rows, facts)
            changed = True
        if changed:
            self._find()
        for feed in self._feeds.values():
            self._take(feed)
        silent = set().union(*(feed.silent() for feed in self._feeds.values()))
        if silent != self._silent:
            self._silent = silent
            self._find()

    def __iter__(self) -> Iterator[Meter]:
        return iter(self._meters.values())

    def lost(self, lane: str) -> int:
        """Rows of a lane that were overwritten before they were taken."""
        feed = self._feeds.get(lane)
        return feed.rows.lost if feed is not None else 0

    # --- parts ---

    def _find(self) -> None:
        """Finds the sources of all lanes; each keeps what it has counted so far."""
        lanes = [self._feeds[lane.name].lane for lane in self._lanes if lane.name in self._feeds]
        self._meters = {}
        for source in find_sources(lanes, silent=self._silent):
            meter = self._ever.setdefault(source.id, Meter(source))
            if (meter.source.lane, meter.source.source) != (source.lane, source.source):
                meter.t_ns = 0  # another counter begins elsewhere
            meter.source = source
            self._meters[source.id] = meter

    def _newest_ns(self, lane: str) -> int:
        return max((m.t_ns for m in self._meters.values() if m.source.lane == lane), default=0)

    def _take(self, feed: _Feed) -> None:
        while (rows := feed.rows.read()) is not None:
            t_ns = array("q", rows[1])
            feed.note(t_ns, rows[3])
            for meter in self._meters.values():
                if meter.source.lane == feed.lane.name:
                    meter.take(t_ns, array("d", rows[3][meter.source.channel]))
