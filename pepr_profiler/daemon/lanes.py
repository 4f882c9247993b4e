"""The daemon's lanes: opened once, watched, and opened again where their sensor came back."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from pepr_profiler import _core
from pepr_profiler.errors import SensorError
from pepr_profiler.sensors.spec import SensorSpec, lanes_by_name
from pepr_profiler.trace.lane import Channel, describe

OPEN_TO_ALL = frozenset({"nvml"})
"""Whoever may use a GPU may ask its driver for its energy: there is nothing to keep from anybody.
Such a sensor is opened last, without any privilege: a driver that hangs then has none either."""

COARSE_PERIOD_NS = 10_000_000
COARSE_QUANTUM_J = 0.1
"""What unprivileged clients learn of energy counters; the reasons are in docs/daemon.md."""

_OPEN_S = 5.0
_STOP_S = 0.2
_SICK_S = 5.0  # a counter that is unknown for longer is gone
_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class How:
    """How lanes are read and told.

    `period_ns` None: each sensor when it is refreshed, and less often where that would take more
    than `overhead` of a core; a period is obeyed as it is.
    """

    period_ns: int | None = None
    overhead: float = 0.01
    coarse_period_ns: int = COARSE_PERIOD_NS
    coarse_quantum_j: float = COARSE_QUANTUM_J


@dataclass
class ServedLane:
    """One driver, its rings, and what is known of its health."""

    name: str
    spec: SensorSpec
    sampler: _core.Sampler
    period_ns: int
    channels: tuple[Channel, ...] = ()
    watch: _core.RingReader | None = None
    why: str = "it is still opening"
    denied: bool = False  # only permission is missing
    failed: bool = False
    seen: set[int] = field(default_factory=set)
    sick_since_s: dict[int, float] = field(default_factory=dict)
    successor: _core.Sampler | None = None
    retry_at_s: float = 0.0

    @property
    def closed(self) -> bool:
        """Whether it is not for all: opened with privileges, and told coarsely to most."""
        return self.spec.kind not in OPEN_TO_ALL

    @property
    def ready(self) -> bool:
        return self.watch is not None

    def age_s(self) -> float | None:
        """How long ago the newest row was read, s."""
        newest = self.watch.latest() if self.watch is not None else None
        return None if newest is None else (time.monotonic_ns() - newest[0]) * 1e-9


class Lanes:
    """All lanes by name. `check()` is called now and then; it never blocks."""

    def __init__(self, specs: Sequence[str], how: How) -> None:
        self._how = how
        self._budget, self._readers = _core.CpuBudget(how.overhead), _core.Readers()
        self._specs = lanes_by_name(specs)
        self._lanes: dict[str, ServedLane] = {}
        self._refused: set[str] = set()  # even with privileges
        self._gave_up = False

    def __iter__(self) -> Iterator[ServedLane]:
        return iter(self._lanes.values())

    def get(self, name: str) -> ServedLane | None:
        """The lane with this name, if it can be read."""
        lane = self._lanes.get(name)
        return lane if lane is not None and lane.ready else None

    def open_privileged(self) -> None:
        """Opens what may need privileges and waits for it; its threads give theirs up."""
        self._open({n: s for n, s in self._specs.items() if s.kind not in OPEN_TO_ALL})
        deadline = time.monotonic() + _OPEN_S
        for lane in self:
            self._settle(lane, max(0.0, deadline - time.monotonic()))
            if lane.denied:
                self._refused.add(lane.name)

    def open_rest(self, *, gave_up: bool) -> None:
        """Opens what anybody may. `gave_up`: privileges were there and are gone by now."""
        self._gave_up = gave_up
        self._open({n: s for n, s in self._specs.items() if s.kind in OPEN_TO_ALL})

    def describe(self, lane: ServedLane, *, coarse: bool) -> dict[str, Any]:
        """What a client is told of a lane that it opens."""
        how = self._how
        told_ns = max(lane.period_ns, how.coarse_period_ns) if coarse else lane.period_ns
        return {
            "name": lane.name,
            "spec": lane.spec,
            "period_ns": told_ns,
            "coarse": coarse,
            "channels": [channel._asdict() for channel in lane.channels],
        }

    @property
    def opening(self) -> bool:
        """Whether some lane, or its successor, may become ready any moment."""
        return any(lane.successor or not (lane.ready or lane.failed) for lane in self)

    def check(self) -> tuple[bool, str]:
        """Looks after lanes that do not work.

        Returns whether rings changed, so that clients have to open them anew, and why the daemon
        has to be started again with its privileges, if it has.
        """
        changed = False
        now_s = time.monotonic()
        for lane in self:
            if not lane.ready and not lane.failed:
                changed |= self._settle(lane, 0.0)
            elif lane.successor is not None:
                done, why = self._succeed(lane)
                if why:
                    return changed, why
                changed |= done
            elif now_s >= lane.retry_at_s and (not lane.ready or self._came_back(lane, now_s)):
                lane.retry_at_s = now_s + _RETRY_S
                if lane.name not in self._refused:
                    lane.successor = self._start(lane.spec)
        return changed, ""

    def stop(self) -> None:
        for lane in self:
            lane.sampler.stop(_STOP_S)
            if lane.successor is not None:
                lane.successor.stop(_STOP_S)

    # --- parts ---

    def _open(self, specs: Mapping[str, SensorSpec]) -> None:
        for name, spec in specs.items():
            self._lanes[name] = ServedLane(name, spec, self._start(spec), self._period_ns(spec))

    def _start(self, spec: SensorSpec) -> _core.Sampler:
        how = self._how
        closed = spec.kind not in OPEN_TO_ALL
        return _core.Sampler(
            spec,
            self._period_ns(spec),
            learn=how.period_ns is None,
            budget=self._budget if how.period_ns is None else None,
            coarse=(how.coarse_period_ns, how.coarse_quantum_j) if closed else None,
            drop_capabilities=closed,
            readers=self._readers,
        )

    def _period_ns(self, spec: SensorSpec) -> int:
        return self._how.period_ns or spec.base_period_ns

    def _settle(self, lane: ServedLane, timeout_s: float) -> bool:
        """Whether a lane that was opening has become ready."""
        try:
            if not lane.sampler.wait_ready(timeout_s):
                return False
            descriptor = lane.sampler.share()
        except (SensorError, RuntimeError) as error:
            lane.why, lane.denied, lane.failed = _why(error), _is_denied(error), True
            lane.retry_at_s = time.monotonic() + _RETRY_S
            return False
        try:
            lane.watch = _core.RingReader(descriptor, 0)
        finally:
            os.close(descriptor)
        lane.channels = describe(lane.sampler.channels)
        lane.seen, lane.sick_since_s = set(), {}
        lane.why, lane.denied, lane.failed = "", False, False
        return True

    def _came_back(self, lane: ServedLane, now_s: float) -> bool:
        """Whether a counter that worked is gone, and opening its sensor again would help."""
        newest = lane.watch.latest() if lane.watch is not None else None
        if newest is None:
            return False
        for index, value in enumerate(newest[1]):
            if not isnan(value):
                lane.seen.add(index)
                lane.sick_since_s.pop(index, None)
            elif index in lane.seen:
                lane.sick_since_s.setdefault(index, now_s)
        return any(
            now_s - since_s >= _SICK_S and _exists(lane.spec, lane.channels[index])
            for index, since_s in lane.sick_since_s.items()
        )

    def _succeed(self, lane: ServedLane) -> tuple[bool, str]:
        """Puts a lane's successor in its place, if it is better."""
        successor = lane.successor
        assert successor is not None
        if successor.state == "opening":
            return False, ""
        lane.successor = None
        denied = ""
        try:
            successor.wait_ready(0.0)
            denied = next((note.what for note in successor.notes if note.denied), "")
        except (SensorError, RuntimeError) as error:
            if not _is_denied(error):
                return False, ""
            denied = str(error).partition(":")[0]
        if denied and lane.closed and self._gave_up:
            successor.stop(_STOP_S)
            return False, f"{denied}: it came back, and privileges are needed to open it again"
        if successor.state == "failed" or not self._is_better(lane, successor):
            successor.stop(_STOP_S)
            return False, ""
        lane.sampler.stop(_STOP_S)
        lane.sampler, lane.watch = successor, None
        return self._settle(lane, 0.0), ""

    def _is_better(self, lane: ServedLane, successor: _core.Sampler) -> bool:
        if not lane.ready:
            return True
        rows = successor.read()
        if rows is None:
            return False
        newest = [array("d", column)[-1] for column in rows[3]]
        known = {c.name for c, v in zip(successor.channels, newest, strict=True) if not isnan(v)}
        return all(lane.channels[index].name in known for index in lane.sick_since_s)


def _why(error: SensorError | RuntimeError) -> str:
    return error.why if isinstance(error, SensorError) else str(error)


def _is_denied(error: SensorError | RuntimeError) -> bool:
    return isinstance(error, SensorError) and error.denied


def _exists(spec: SensorSpec, channel: Channel) -> bool:
    """Whether a counter's file is there, readable or not; unknown counts as being there."""
    zone = channel.labels.get("zone")
    if spec.kind != "powercap" or zone is None:
        return True
    try:
        (Path(spec.where or "/sys/class/powercap") / zone / "energy_uj").stat()
    except OSError:
        return False
    return True
