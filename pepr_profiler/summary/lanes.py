"""One pass over the lanes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.energy import modelled
from pepr_profiler.energy.activity import Activity, modelled_curves, read_activity
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers, read_gpu_users
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.sources import find_cross_sources, find_sources
from pepr_profiler.energy.uncertainty import CrossCheck, cross_check
from pepr_profiler.sensors.machine import CpuIdentity
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import Batch, LaneReader, joined

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _curves(
    readers: Mapping[str, LaneReader],
    facts: Mapping[str, Any],
    at_ns: NDArray[np.int64],
    gauges: _Gauges,
) -> tuple[list[EnergyCurve], dict[str, CrossCheck], Activity | None, dict[str, float]]:
    """Measured curves of every lane, and modelled ones for the CPU and memory that have none.

    With them what the power readings of a device give whose counter is used, and the idle draw, W,
    where it is known; both by component.
    """
    cpu = CpuIdentity(**facts["cpu"])
    lanes = [reader.lane for reader in readers.values()]
    sources = find_sources(lanes, cpu_vendor=cpu.vendor or "")
    others = find_cross_sources(lanes, sources)
    checks: dict[str, CrossCheck] = {}
    curves: list[EnergyCurve] = []
    activity = None
    idle_w: dict[str, float] = {}
    for name, reader in readers.items():
        if _lists_processes(reader):
            continue
        if name == "processes":
            activity = read_activity(reader.lane, gauges.watching(reader))
            continue
        own = [source for source in sources if source.lane == name]
        aside = [source for source in others if source.lane == name]
        found = integrate(gauges.watching(reader), [*own, *aside], at_ns)
        curves += found[: len(own)]
        counters = {curve.source.id: curve for curve in found[: len(own)]}
        for power in found[len(own) :]:
            if check := cross_check(counters[power.source.id], power, at_ns):
                checks[power.source.id] = check
    if activity is not None and len(activity.t_ns) > 1:
        model = modelled.cpu_model(cpu, vcpus=activity.cpus, override=facts["options"]["cpu_power"])
        idle_w["cpu:modelled"] = model.idle_w
        measured = {c.source.kind for c in curves if c.source.in_total and c.first_ns >= 0}
        for curve in modelled_curves(activity, at_ns, cpu=model, ram=modelled.RamModel()):
            # RAPL packages without a DRAM domain: memory is then modelled beside a measured CPU.
            if curve.source.kind not in measured:
                curves.append(curve)
    return curves, checks, activity, idle_w


def _lists_processes(reader: LaneReader) -> bool:
    return SensorSpec(reader.lane.spec).kind == "nvml-processes"


def _tenants(
    readers: Mapping[str, LaneReader],
    notes: Sequence[Mapping[str, Any]],
    gauges: _Gauges,
    begin_ns: int,
    end_ns: int,
) -> dict[str, GpuUsers]:
    """Who computed on each GPU, by UUID."""
    found: dict[str, GpuUsers] = {}
    for reader in filter(_lists_processes, readers.values()):
        batches = gauges.watching(reader)
        found |= read_gpu_users(reader.lane, batches, notes, begin_ns=begin_ns, end_ns=end_ns)
    return found


class _Gauges:
    """Rows, unknowns and peaks of gauges, noticed while batches pass by on their way elsewhere."""

    def __init__(self) -> None:
        self.rows = 0
        self.rows_by_lane: dict[str, int] = {}
        self.unknown = 0
        self.busy: set[str] = set()
        self.peaks: dict[str, dict[int, float]] = {}

    def watching(self, reader: LaneReader) -> Iterator[Batch]:
        watched = [
            (index, channel)
            for index, channel in enumerate(reader.lane.channels)
            if channel.source == "nvml-memory"
        ]
        utilised = [
            (index, channel)
            for index, channel in enumerate(reader.lane.channels)
            if channel.source == "nvml-utilisation"
        ]
        for batch in joined(reader):
            rows = batch.reads
            self.rows += rows
            self.rows_by_lane[reader.lane.name] = self.rows_by_lane.get(reader.lane.name, 0) + rows
            unknown = np.count_nonzero(np.isnan(batch.values), axis=0)
            self.unknown += int(unknown.sum() if batch.skipped is None
                                else unknown @ (batch.skipped + 1))  # fmt: skip
            for index, channel in utilised:
                if np.nanmax(batch.values[index], initial=0.0) * channel.scale > _BUSY:
                    self.busy.add(channel.device)
            for index, channel in watched:
                values = batch.values[index][np.isfinite(batch.values[index])] * channel.scale
                if len(values):
                    peaks = self.peaks.setdefault(channel.source, {})
                    peaks[index] = max(peaks.get(index, 0.0), float(values.max()))
            yield batch

    def peak_sum(self, source: str) -> int | None:
        peaks = self.peaks.get(source)
        return int(sum(peaks.values())) if peaks else None


_BUSY = 0.05
"""GPU utilisation from which on somebody computes."""
