"""Reads all lanes of a run once, and returns what they give as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pepr_profiler.energy.activity import Activity, read_activity
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers, read_gpu_users
from pepr_profiler.energy.hardware import read_hardware, with_known
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.modelled import RamModel, cpu_model, modelled_curves
from pepr_profiler.energy.sources import find_cross_sources, find_sources
from pepr_profiler.energy.uncertainty import CrossCheck, cross_check
from pepr_profiler.record import Ints, Record
from pepr_profiler.sensors.machine import CpuIdentity
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import Batch, LaneInfo, LaneReader, joined

_BUSY = 0.05
"""At a higher utilisation of a GPU, someone computes on it."""


class Readings(Record):
    """All that the lanes of a run give.

    `curves` are measured ones, then modelled ones for the CPU and the memory if they have none.
    `cross_checks` are what the power readings of a device give whose counter is used, `idle_w` its
    idle draw where that is known; both by component. `gpu_users` and `busy_gpus`, those on which
    anyone computed, are by UUID.

    `bad_files` are hardware files that cannot be used, each with why.

    `rows` are by lane and count all that were read, stored or not; `failed_reads` counts unknown
    numbers. `gpu_peak_bytes` sums the most memory that was in use on each GPU; None if none says.
    """

    curves: Sequence[EnergyCurve]
    cross_checks: Mapping[str, CrossCheck]
    idle_w: Mapping[str, float]
    activity: Activity | None
    gpu_users: Mapping[str, GpuUsers]
    busy_gpus: frozenset[str]
    rows: Mapping[str, int]
    failed_reads: int
    gpu_peak_bytes: int | None
    bad_files: tuple[tuple[str, str], ...] = ()


def read_all(
    readers: Mapping[str, LaneReader],
    facts: Mapping[str, Any],
    notes: Sequence[Mapping[str, Any]],
    at_ns: Ints,
) -> Readings:
    """Reads each lane once: energy at `at_ns` (sorted), and who was there meanwhile.

    `facts` is run.json's `recording`, `notes` say whose processes were seen.
    """
    cpu = CpuIdentity(**facts["cpu"])
    lanes = [reader.lane for reader in readers.values()]
    known = read_hardware()
    sources = with_known(find_sources(lanes, cpu_vendor=cpu.vendor or ""), lanes, known)
    cross_sources = with_known(find_cross_sources(lanes, sources), lanes, known)
    curves: list[EnergyCurve] = []
    checks: dict[str, CrossCheck] = {}
    activity = None
    gpu_users: dict[str, GpuUsers] = {}
    tally = _Tally()
    for name, reader in readers.items():
        batches = tally.counted(reader.lane, joined(reader))
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
            curves += _with_impossible(measured, powers)
            checks |= _cross_checks(measured, powers, at_ns)
    idle_w: dict[str, float] = {}
    if activity is not None and len(activity.t_ns) > 1:
        model = cpu_model(cpu, vcpus=activity.cpus, override=facts["options"]["cpu_power"])
        idle_w["cpu:modelled"] = model.idle_w
        # RAPL packages may lack a DRAM domain: memory is then modelled beside a measured CPU.
        kinds = {c.source.kind for c in curves if c.source.in_total and c.first_ns >= 0}
        modelled = modelled_curves(activity, at_ns, cpu=model, ram=RamModel())
        curves += [curve for curve in modelled if curve.source.kind not in kinds]
    return Readings(
        curves,
        checks,
        idle_w,
        activity,
        gpu_users,
        frozenset(tally.busy_gpus),
        tally.rows,
        tally.failed_reads,
        int(sum(tally.peaks_bytes.values())) if tally.peaks_bytes else None,
        known.problems,
    )


def _with_impossible(
    counters: Iterable[EnergyCurve], powers: Iterable[EnergyCurve]
) -> Iterator[EnergyCurve]:
    """The same counters; the impossible power readings of their devices count too."""
    others = {power.source.id: power.impossible for power in powers}
    for curve in counters:
        yield curve._replace(impossible=curve.impossible + others.get(curve.source.id, 0))


def _cross_checks(
    counters: Iterable[EnergyCurve], powers: Iterable[EnergyCurve], at_ns: Ints
) -> dict[str, CrossCheck]:
    by_id = {counter.source.id: counter for counter in counters}
    checks = {
        power.source.id: cross_check(by_id[power.source.id], power, at_ns) for power in powers
    }
    return {component: check for component, check in checks.items() if check is not None}


class _Tally:
    """Counts in the rows of all lanes, while others read them."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.failed_reads = 0
        self.busy_gpus: set[str] = set()
        self.peaks_bytes: dict[str, float] = {}  # by GPU

    def counted(self, lane: LaneInfo, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        self.rows[lane.name] = 0
        channels = list(enumerate(lane.channels))
        memory = [(i, c) for i, c in channels if c.source == "nvml-memory"]
        utilisation = [(i, c) for i, c in channels if c.source == "nvml-utilisation"]
        for batch in batches:
            self.rows[lane.name] += batch.reads
            unknown = np.count_nonzero(np.isnan(batch.values), axis=0)
            reads_of_row = 1 if batch.skipped is None else batch.skipped + 1
            self.failed_reads += int(np.sum(unknown * reads_of_row))
            for index, channel in utilisation:
                if np.nanmax(batch.values[index], initial=0.0) * channel.scale > _BUSY:
                    self.busy_gpus.add(channel.device)
            for index, channel in memory:
                values = batch.values[index]
                used = values[np.isfinite(values)] * channel.scale
                if len(used):
                    before = self.peaks_bytes.get(channel.device, 0.0)
                    self.peaks_bytes[channel.device] = max(before, float(used.max()))
            yield batch
