"""One pass over the lanes of a run: all that their readings give, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.energy.activity import Activity, read_activity
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers, read_gpu_users
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.modelled import RamModel, cpu_model, modelled_curves
from pepr_profiler.energy.sources import find_cross_sources, find_sources
from pepr_profiler.energy.uncertainty import CrossCheck, cross_check
from pepr_profiler.record import Record
from pepr_profiler.sensors.machine import CpuIdentity
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import Batch, LaneInfo, LaneReader, joined

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BUSY = 0.05
"""GPU utilisation from which on somebody computes."""


class LaneStats(Record):
    """What is counted in a lane's rows, whatever they are read for.

    `rows` are those that were read, stored or not. `failed_reads` counts numbers that were unknown.
    `memory_peak_bytes` is by GPU; `busy_gpus` are those that were busy at some time.
    """

    rows: int
    failed_reads: int
    memory_peak_bytes: Mapping[str, float]
    busy_gpus: frozenset[str]


class Readings(Record):
    """All that the lanes of a run give.

    `curves` are measured ones, then modelled ones for the CPU and the memory if they have none.
    `cross_checks` are what the power readings of a device give whose counter is used, `idle_w` its
    idle draw where that is known; both by component. `gpu_users` are by UUID, `stats` by lane.
    """

    curves: Sequence[EnergyCurve]
    cross_checks: Mapping[str, CrossCheck]
    idle_w: Mapping[str, float]
    activity: Activity | None
    gpu_users: Mapping[str, GpuUsers]
    stats: Mapping[str, LaneStats]

    @property
    def rows(self) -> int:
        """Rows that were read in all lanes."""
        return sum(lane.rows for lane in self.stats.values())

    @property
    def failed_reads(self) -> int:
        """Numbers that could not be read."""
        return sum(lane.failed_reads for lane in self.stats.values())

    @property
    def busy_gpus(self) -> frozenset[str]:
        """GPUs on which somebody computed."""
        return frozenset[str]().union(*(lane.busy_gpus for lane in self.stats.values()))

    @property
    def gpu_peak_bytes(self) -> int | None:
        """The most memory that was in use on each GPU, summed; None if no GPU says so."""
        peaks: dict[str, float] = {}
        for lane in self.stats.values():
            for gpu, peak in lane.memory_peak_bytes.items():
                peaks[gpu] = max(peaks.get(gpu, 0.0), peak)
        return int(sum(peaks.values())) if peaks else None


def read_all(
    readers: Mapping[str, LaneReader],
    facts: Mapping[str, Any],
    notes: Sequence[Mapping[str, Any]],
    at_ns: NDArray[np.int64],
) -> Readings:
    """Reads each lane once: energy at `at_ns` (sorted), and who was there meanwhile.

    `facts` is run.json's `recording`, `notes` say whose processes were seen.
    """
    cpu = CpuIdentity(**facts["cpu"])
    lanes = [reader.lane for reader in readers.values()]
    sources = find_sources(lanes, cpu_vendor=cpu.vendor or "")
    cross_sources = find_cross_sources(lanes, sources)
    curves: list[EnergyCurve] = []
    checks: dict[str, CrossCheck] = {}
    activity = None
    gpu_users: dict[str, GpuUsers] = {}
    stats: dict[str, LaneStats] = {}
    for name, reader in readers.items():
        tally = _Tally(reader.lane)
        batches = tally.watch(joined(reader))
        if SensorSpec(reader.lane.spec).kind == "nvml-processes":
            begin_ns, end_ns = int(at_ns[0]), int(at_ns[-1])
            gpu_users |= read_gpu_users(
                reader.lane, batches, notes, begin_ns=begin_ns, end_ns=end_ns
            )
        elif name == "processes":
            activity = read_activity(reader.lane, batches)
        else:
            own = [source for source in sources if source.lane == name]
            cross = [source for source in cross_sources if source.lane == name]
            integrated = integrate(batches, [*own, *cross], at_ns)
            measured, powers = integrated[: len(own)], integrated[len(own) :]
            curves += measured
            checks |= _cross_checks(measured, powers, at_ns)
        stats[name] = tally.stats()
    idle_w: dict[str, float] = {}
    if activity is not None and len(activity.t_ns) > 1:
        model = cpu_model(cpu, vcpus=activity.cpus, override=facts["options"]["cpu_power"])
        idle_w["cpu:modelled"] = model.idle_w
        # RAPL packages may lack a DRAM domain: memory is then modelled beside a measured CPU.
        kinds = {c.source.kind for c in curves if c.source.in_total and c.first_ns >= 0}
        modelled = modelled_curves(activity, at_ns, cpu=model, ram=RamModel())
        curves += [curve for curve in modelled if curve.source.kind not in kinds]
    return Readings(curves, checks, idle_w, activity, gpu_users, stats)


def _cross_checks(
    counters: Iterable[EnergyCurve], powers: Iterable[EnergyCurve], at_ns: NDArray[np.int64]
) -> dict[str, CrossCheck]:
    by_id = {counter.source.id: counter for counter in counters}
    checks = {
        power.source.id: cross_check(by_id[power.source.id], power, at_ns) for power in powers
    }
    return {component: check for component, check in checks.items() if check is not None}


class _Tally:
    """Counts in the rows of one lane on their way to whoever reads them."""

    def __init__(self, lane: LaneInfo) -> None:
        channels = list(enumerate(lane.channels))
        self._memory = [(i, c) for i, c in channels if c.source == "nvml-memory"]
        self._utilisation = [(i, c) for i, c in channels if c.source == "nvml-utilisation"]
        self._rows = self._failed_reads = 0
        self._peaks: dict[str, float] = {}
        self._busy: set[str] = set()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        for batch in batches:
            self._add(batch)
            yield batch

    def stats(self) -> LaneStats:
        """What was counted in the batches so far."""
        return LaneStats(self._rows, self._failed_reads, self._peaks, frozenset(self._busy))

    def _add(self, batch: Batch) -> None:
        self._rows += batch.reads
        unknown = np.count_nonzero(np.isnan(batch.values), axis=0)
        reads_of_row = 1 if batch.skipped is None else batch.skipped + 1
        self._failed_reads += int(np.sum(unknown * reads_of_row))
        for index, channel in self._utilisation:
            if np.nanmax(batch.values[index], initial=0.0) * channel.scale > _BUSY:
                self._busy.add(channel.device)
        for index, channel in self._memory:
            used = batch.values[index][np.isfinite(batch.values[index])] * channel.scale
            if len(used):
                peak = max(self._peaks.get(channel.device, 0.0), float(used.max()))
                self._peaks[channel.device] = peak
