"""Records what the sensors show while one load after the other runs in bursts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pepr_profiler.check.load import LoadMaker, Ran, no_bursts, schedule
from pepr_profiler.check.response import Series
from pepr_profiler.energy.integrate import values_ns
from pepr_profiler.energy.sources import Source
from pepr_profiler.record import Floats, Ints, Record
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import LaneInfo
from pepr_profiler.units import NS_PER_S

_READY_S = 15.0
"""torch takes some seconds to load, and the first use of a GPU some more."""

_LONGEST_S = 46.0
"""With the evaluation, which takes some seconds, the whole check lasts at most a minute."""

_LOAD_S, _SHORTEST_LOAD_S = 20.0, 8.0
_REST_S = 1.3
"""Before and after the bursts: then averages over 1 s have settled."""

_DRAIN_S = 0.1
_PERIODS_NS = {"perf": 1_000_000, "powercap": 1_000_000, "nvml-processes": 200_000_000}
_OTHER_PERIOD_NS = 5_000_000


class Readable(Protocol):
    """A sampler of our own, or a lane of the daemon."""

    def read(self) -> tuple[int, bytes, bytes, list[bytes]] | None: ...


_Rows = tuple[bytes, bytes, list[bytes]]


class LaneRows(Record):
    """All that was read of one lane: when each read began, how long it took, and raw values."""

    lane: LaneInfo
    t_ns: Ints
    read_ns: Ints
    values: Floats  # (channels, n)

    def series(self, source: Source) -> Series:
        """The readings of one of its sources, in J or W."""
        at_s = values_ns(source, self.t_ns, self.read_ns) / NS_PER_S
        raw = self.values[source.channel]
        values = np.where(source.knows(raw), raw * source.scale, np.nan)
        return Series(at_s, values, source.counter, source.range_j, source.limit_w)


class Probe(Record):
    """What was recorded: the rows of each lane, what each load did, and what else ran meanwhile.

    `others_cpus` and `stolen_cpus` are mean numbers of CPUs; None where /proc does not say.
    """

    rows: Sequence[LaneRows]
    loads: Mapping[str, Ran]
    seconds: float
    others_cpus: float | None
    stolen_cpus: float | None


def check_specs(specs: Sequence[str]) -> tuple[SensorSpec, ...]:
    """The specs for a check: NVML's gauges at each read, and who is on each GPU besides."""
    result = []
    for spec in map(SensorSpec, specs):
        if spec.kind == "nvml":
            result += [SensorSpec.of(kind, spec.where) for kind in ("nvml-dense", "nvml-processes")]
        else:
            result.append(spec)
    return tuple(result)


def check_period_ns(spec: SensorSpec) -> int:
    """How often a sensor is read during a check."""
    return _PERIODS_NS.get(spec.kind, _OTHER_PERIOD_NS)


def probe(
    opened: Sequence[tuple[LaneInfo, Readable]],
    loads: Mapping[str, LoadMaker],
    *,
    load_s: float = _LOAD_S,
) -> Probe:
    """Reads the lanes while the loads run, one after the other, each for up to `load_s`."""
    begin = time.monotonic()
    kept: list[list[_Rows]] = [[] for _ in opened]
    ran: dict[str, Ran] = {}

    def drain(until: float, *, keep: bool = True) -> None:
        while True:
            for (_, lane), batches in zip(opened, kept, strict=True):
                for batch in iter(lane.read, None):
                    if keep:
                        batches.append(batch[1:])
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(_DRAIN_S, left_s))

    try:
        for load in loads.values():
            load.prepare()
        ready = {}
        for name, load in loads.items():
            problem = load.problem(max(1.0, begin + _READY_S - time.monotonic()))
            if problem:
                ran[name] = Ran(no_bursts(), problem=problem)
            else:
                ready[name] = load
        left_s = begin + _LONGEST_S - time.monotonic()
        each_s = left_s / max(1, len(ready)) - 2 * _REST_S
        load_s = min(load_s, max(_SHORTEST_LOAD_S, each_s))
        drain(time.monotonic() + 0.2, keep=False)
        first, cpu_before = time.monotonic(), _cpu_seconds()
        own_before = time.process_time()
        for name, load in ready.items():
            bursts = schedule(time.monotonic_ns() + int(_REST_S * 1e9), load_s)
            load.begin(bursts)
            drain(bursts[-1][1] * 1e-9 + _REST_S)
            ran[name] = load.finish()
        if not ready:
            drain(time.monotonic() + 3.0)
        seconds = time.monotonic() - first
        cpu_after = _cpu_seconds()
        ours_s = time.process_time() - own_before + sum(r.cpu_s for r in ran.values())
    finally:
        for load in loads.values():
            load.stop()
    others = stolen = None
    if cpu_before and cpu_after:
        others = max(0.0, (cpu_after[0] - cpu_before[0] - ours_s) / seconds)
        stolen = max(0.0, (cpu_after[1] - cpu_before[1]) / seconds)
    rows = [_rows(lane, batches) for (lane, _), batches in zip(opened, kept, strict=True)]
    return Probe(rows, {name: ran[name] for name in loads}, seconds, others, stolen)


def _rows(lane: LaneInfo, batches: Sequence[_Rows]) -> LaneRows:
    def joined(parts: Iterable[bytes], kind: type) -> Any:
        columns: list[Any] = [np.frombuffer(part, dtype=kind) for part in parts]
        return np.concatenate(columns) if columns else np.zeros(0, dtype=kind)

    t_ns = joined((batch[0] for batch in batches), np.int64)
    read_ns = joined((batch[1] for batch in batches), np.uint32).astype(np.int64)
    count = len(lane.channels)
    values = [joined((batch[2][i] for batch in batches), np.float64) for i in range(count)]
    return LaneRows(lane, t_ns, read_ns, np.array(values).reshape(count, -1))


def _cpu_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, float] | None:
    """CPU time that all took together since boot, and that a hypervisor took away, s."""
    try:
        words = stat.read_text().splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, words[:8])
    except (OSError, ValueError, IndexError):
        return None
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) * tick_s, steal * tick_s
