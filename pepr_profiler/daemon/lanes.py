"""The daemon's lanes: opened once, watched, and opened again when their sensor comes back."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from pepr_profiler import _core
from pepr_profiler.daemon_client.protocol import close_all, map_ring
from pepr_profiler.errors import SensorError
from pepr_profiler.sensors.spec import SensorSpec, lanes_by_name
from pepr_profiler.trace.lane import Channel, describe

_OPEN_TO_ALL = frozenset({"nvml"})
"""Users of a GPU may ask its driver for its energy, so there is nothing to hide from anybody. These
sensors are opened last, without any privilege, so that a driver that hangs has none."""

LOST_S = 5.0
"""A counter that is unknown for longer is gone."""

_OPEN_S = 5.0
_STOP_S = 0.2
_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How sensors are read, and what unprivileged clients get of energy counters (docs/daemon.md).

    With `period_ns` None each sensor is read when it is refreshed, and less often if that would
    take more than `overhead` of a core. Else the period is kept, whatever it costs.
    """

    period_ns: int | None = None
    overhead: float = 0.01
    coarse_period_ns: int = 10_000_000
    coarse_quantum_j: float = 0.1


@dataclass
class ServedLane:
    """One sensor, its rings, and its health. `reader` is None until the sensor has opened."""

    name: str
    spec: SensorSpec
    sampler: _core.Sampler
    period_ns: int
    channels: tuple[Channel, ...] = ()
    reader: _core.RingReader | None = None
    why: str = "it is still opening"
    denied: bool = False  # only permission is missing
    failed: bool = False
    ever_known: set[int] = field(default_factory=set)  # channels
    unknown_since_s: dict[int, float] = field(default_factory=dict)  # of those channels
    replacement: _core.Sampler | None = None
    retry_at_s: float = 0.0
    descriptors: dict[bool, int] = field(default_factory=dict)  # of its rings; True: the coarse one

    @property
    def restricted(self) -> bool:
        """Whether it is opened with privileges, and only trusted clients get its fine ring."""
        return _is_restricted(self.spec)

    @property
    def ready(self) -> bool:
        return self.reader is not None

    def shared(self, *, coarse: bool) -> int:
        """The descriptor of a ring, to be sent to clients; the lane's own. May raise RuntimeError.

        All get the same open file: one for each would be the daemon's memory while they keep it.
        """
        if coarse not in self.descriptors:
            self.descriptors[coarse] = self.sampler.share(coarse)
        return self.descriptors[coarse]

    def stop(self) -> None:
        """Ends its sampling; clients that have its rings keep them."""
        self.sampler.stop(_STOP_S)
        close_all(self.descriptors.values())
        self.descriptors.clear()

    def age_s(self) -> float | None:
        """How long ago the newest row was read."""
        newest = self.reader.latest() if self.reader is not None else None
        return None if newest is None else (time.monotonic_ns() - newest[0]) * 1e-9


class ServedLanes:
    """All lanes of the daemon. `check` is to be called now and then; it never blocks."""

    def __init__(
        self, specs: Sequence[str], options: SamplingOptions, *, lost_s: float = LOST_S
    ) -> None:
        self._options = options
        self._lost_s = lost_s
        self._budget, self._readers = _core.CpuBudget(options.overhead), _core.Readers()
        self._specs = lanes_by_name(specs)
        self._lanes: dict[str, ServedLane] = {}
        self._denied: set[str] = set()  # even with privileges
        self._dropped_privileges = False

    def __iter__(self) -> Iterator[ServedLane]:
        return iter(self._lanes.values())

    def get(self, name: str) -> ServedLane | None:
        """The lane with this name, if it can be read."""
        lane = self._lanes.get(name)
        return lane if lane is not None and lane.ready else None

    def open_privileged(self) -> None:
        """Opens sensors that may need privileges and waits for them; their threads drop theirs."""
        self._open({name: s for name, s in self._specs.items() if _is_restricted(s)})
        deadline = time.monotonic() + _OPEN_S
        for lane in self:
            self._finish_opening(lane, max(0.0, deadline - time.monotonic()))
            if lane.denied:
                self._denied.add(lane.name)

    def open_rest(self, *, dropped_privileges: bool) -> None:
        """Opens sensors that anybody may open. `dropped_privileges`: there were some before."""
        self._dropped_privileges = dropped_privileges
        self._open({name: s for name, s in self._specs.items() if not _is_restricted(s)})

    def describe(self, lane: ServedLane, *, coarse: bool) -> dict[str, Any]:
        """The description that a client gets with a lane's ring."""
        shortest_ns = self._options.coarse_period_ns if coarse else 0
        return {
            "name": lane.name,
            "spec": lane.spec,
            "period_ns": max(lane.period_ns, shortest_ns),
            "coarse": coarse,
            "channels": [channel._asdict() for channel in lane.channels],
        }

    @property
    def opening(self) -> bool:
        """Whether some lane, or a replacement of one, may become ready any moment."""
        return any(lane.replacement or not (lane.ready or lane.failed) for lane in self)

    def check(self) -> tuple[bool, str]:
        """Tries to open again what does not work.

        Returns whether rings changed, so that clients have to open them anew, and, if the daemon
        has to be started again with its privileges, the reason for that.
        """
        changed = False
        now_s = time.monotonic()
        for lane in self:
            if not lane.ready and not lane.failed:
                changed |= self._finish_opening(lane, 0.0)
            elif lane.replacement is not None:
                replaced, why = self._replace(lane)
                if why:
                    return changed, why
                changed |= replaced
            elif now_s >= lane.retry_at_s and (not lane.ready or self._can_recover(lane, now_s)):
                lane.retry_at_s = now_s + _RETRY_S
                if lane.name not in self._denied:
                    lane.replacement = self._start(lane.spec)
        return changed, ""

    def stop(self) -> None:
        for lane in self:
            lane.stop()
            if lane.replacement is not None:
                lane.replacement.stop(_STOP_S)

    # --- parts ---

    def _open(self, specs: Mapping[str, SensorSpec]) -> None:
        for name, spec in specs.items():
            self._lanes[name] = ServedLane(name, spec, self._start(spec), self._period_ns(spec))

    def _start(self, spec: SensorSpec) -> _core.Sampler:
        options, restricted = self._options, _is_restricted(spec)
        return _core.Sampler(
            spec,
            self._period_ns(spec),
            learn=options.period_ns is None,
            budget=self._budget if options.period_ns is None else None,
            coarse=(options.coarse_period_ns, options.coarse_quantum_j) if restricted else None,
            drop_capabilities=restricted,
            readers=self._readers,
        )

    def _period_ns(self, spec: SensorSpec) -> int:
        return self._options.period_ns or spec.base_period_ns

    def _finish_opening(self, lane: ServedLane, timeout_s: float) -> bool:
        """Whether a lane that was opening has become ready; notes why if it failed."""
        try:
            if not lane.sampler.wait_ready(timeout_s):
                return False
            descriptor = lane.sampler.share()
        except (SensorError, RuntimeError) as error:
            lane.why = error.why if isinstance(error, SensorError) else str(error)
            lane.denied = isinstance(error, SensorError) and error.denied
            lane.failed = True
            lane.retry_at_s = time.monotonic() + _RETRY_S
            return False
        lane.reader = map_ring(descriptor, 0)
        lane.channels = describe(lane.sampler.channels)
        lane.ever_known, lane.unknown_since_s = set(), {}
        lane.why, lane.denied, lane.failed = "", False, False
        return True

    def _can_recover(self, lane: ServedLane, now_s: float) -> bool:
        """Whether a counter that worked is gone, and opening its sensor again may help."""
        newest = lane.reader.latest() if lane.reader is not None else None
        if newest is None:
            return False
        for index, value in enumerate(newest[1]):
            if not isnan(value):
                lane.ever_known.add(index)
                lane.unknown_since_s.pop(index, None)
            elif index in lane.ever_known:
                lane.unknown_since_s.setdefault(index, now_s)
        return any(
            now_s - since_s >= self._lost_s and _exists(lane.spec, lane.channels[index])
            for index, since_s in lane.unknown_since_s.items()
        )

    def _replace(self, lane: ServedLane) -> tuple[bool, str]:
        """Puts a lane's replacement in its place if it is better; returns as `check` does."""
        replacement = lane.replacement
        assert replacement is not None
        if replacement.state == "opening":
            return False, ""
        lane.replacement = None
        try:
            replacement.wait_ready(0.0)
            denied = next((note.what for note in replacement.notes if note.denied), "")
        except SensorError as error:
            if not error.denied:
                return False, ""
            denied = error.what
        except RuntimeError:
            return False, ""
        if denied and lane.restricted and self._dropped_privileges:
            replacement.stop(_STOP_S)
            return False, f"{denied}: it came back, and privileges are needed to open it again"
        if replacement.state == "failed" or not self._is_better(lane, replacement):
            replacement.stop(_STOP_S)
            return False, ""
        lane.stop()
        lane.sampler, lane.reader = replacement, None
        return self._finish_opening(lane, 0.0), ""

    def _is_better(self, lane: ServedLane, replacement: _core.Sampler) -> bool:
        """Whether it reads the counters that the lane has lost."""
        if not lane.ready:
            return True
        rows = replacement.read()
        if rows is None:
            return False
        newest = [array("d", column)[-1] for column in rows[3]]
        known = {c.name for c, v in zip(replacement.channels, newest, strict=True) if not isnan(v)}
        return all(lane.channels[index].name in known for index in lane.unknown_since_s)


def _is_restricted(spec: SensorSpec) -> bool:
    return spec.kind not in _OPEN_TO_ALL


def _exists(spec: SensorSpec, channel: Channel) -> bool:
    """Whether a counter's file is there, readable or not; True if that cannot be found out."""
    zone = channel.labels.get("zone")
    if spec.kind != "powercap" or zone is None:
        return True
    try:
        (Path(spec.where or "/sys/class/powercap") / zone / "energy_uj").stat()
    except OSError:
        return False
    return True
