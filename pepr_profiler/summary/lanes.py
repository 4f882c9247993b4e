"""Reads all lanes of a run once, and returns what they give as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from pepr_profiler.energy.activity import Activity, read_activity
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.fallback import (
    answers,
    counters_of_gpus,
    replacements,
    silent_places,
    stood_in,
    with_fallback,
)
from pepr_profiler.energy.gpu_users import GpuUsers, read_gpu_users
from pepr_profiler.energy.hardware import read_hardware, with_known
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.modelled import RamModel, cpu_model, modelled_curves
from pepr_profiler.energy.sources import Place, Source, find_cross_sources, find_sources
from pepr_profiler.energy.uncertainty import CrossCheck, cross_check
from pepr_profiler.record import Ints, Record
from pepr_profiler.sensors.machine import CpuIdentity
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import Batch, LaneInfo, LaneReader, joined

_BUSY = 0.05
"""At a higher utilisation of a GPU, someone computes on it."""


_TRIES = 4
"""A device has a counter, and power as an average and as an instant."""


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
    energy = _EnergyReader(readers, cpu, at_ns)
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
            energy.read(name, batches)
    curves, checks = energy.settle()
    idle_w: dict[str, float] = {}
    if activity is not None and len(activity.t_ns) > 1:
        model = cpu_model(cpu, vcpus=activity.cpus, override=facts["options"]["cpu_power"])
        ram = RamModel()
        # RAPL packages may lack a DRAM domain: memory is then modelled beside a measured CPU.
        kinds = {k for c in curves if c.source.in_total and answers(c) for k in c.source.covers}
        if "dram" in kinds:
            model = model.without_memory(ram, activity.installed_bytes)
        idle_w["cpu:modelled"] = model.idle_w
        curves += modelled_curves(
            activity,
            at_ns,
            cpu=None if "cpu" in kinds else model,
            ram=None if "dram" in kinds else ram,
        )
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
        energy.known.problems,
    )


class _EnergyReader:
    """Integrates the energy of all lanes, and decides then which source of a component counts."""

    def __init__(self, readers: Mapping[str, LaneReader], cpu: CpuIdentity, at_ns: Ints) -> None:
        self._readers, self._at_ns = readers, at_ns
        self._lanes = [reader.lane for reader in readers.values()]
        self._cpu, self.known = cpu, read_hardware()
        self._find()
        self._curves: dict[Place, EnergyCurve] = {}

    def read(self, name: str, batches: Iterable[Batch]) -> None:
        """Integrates a lane's sources, those that are not in the total too."""
        wanted = [*self._sources, *self._cross_sources]
        self._integrate(batches, [s for s in wanted if s.lane == name])

    def settle(self) -> tuple[list[EnergyCurve], dict[str, CrossCheck]]:
        """The curve of each component by the source that answers, and the checks of counters."""
        first = self._of(self._sources)
        silent: set[Place] = set()
        for _ in range(_TRIES):  # another source may be silent too
            silent = silent_places(self._curves)
            plain = counters_of_gpus(self._lanes, self._curves)
            self._find(silent, plain)
            unread = [s for s in (*self._sources, *self._cross_sources)
                      if (s.lane, s.channel) not in self._curves]  # fmt: skip
            if not unread:
                break
            for name in {source.lane for source in unread}:
                of_lane = [source for source in unread if source.lane == name]
                self._integrate(joined(self._readers[name]), of_lane)
        curves = self._of(self._sources)
        stands_for = replacements(first, curves, silent)
        spare = {c.source.repeats: c for c in curves if c.source.repeats and answers(c)}
        spare |= {c.source.id: c for c in self._of(self._cross_sources)}
        checks: dict[str, CrossCheck] = {}
        result = []
        for curve in curves:
            source = curve.source
            instead_of = stands_for.get((source.lane, source.channel), "")
            settled = curve
            if instead_of:
                whole_ns = int(self._at_ns[0]), int(self._at_ns[-1])
                settled = stood_in(curve)._replace(instead_of=instead_of, instead_ns=(whole_ns,))
            other = spare.get(source.id)
            if not answers(curve) and other is not None and other.only_zero:
                settled = settled._replace(only_zero=True)  # a device that is off
            if source.in_total and other is not None:
                settled = settled._replace(impossible=curve.impossible + other.impossible)
                if source.counter and answers(curve) and answers(other):
                    settled = with_fallback(settled, other, self._at_ns)
                is_check = settled.source == source and bool(other.source.checks)
                check = cross_check(curve, other, self._at_ns) if is_check else None
                checks |= {source.id: check} if check is not None else {}
            result.append(settled)
        return result, checks

    # --- parts ---

    def _find(self, silent: Set[Place] = frozenset(), plain: Set[str] = frozenset()) -> None:
        lanes = self._lanes
        found = find_sources(
            lanes,
            cpu_vendor=self._cpu.vendor or "",
            silent=silent,
            plain=plain | self.known.counters_of("gpu", lanes),
            modules=self.known.counters_of("module", lanes),
        )
        cpu_name = self._cpu.name or ""
        self._sources = with_known(found, lanes, self.known, cpu_name=cpu_name)
        cross = find_cross_sources(lanes, self._sources)
        self._cross_sources = with_known(cross, lanes, self.known, cpu_name=cpu_name)

    def _integrate(self, batches: Iterable[Batch], sources: Sequence[Source]) -> None:
        for curve in integrate(batches, sources, self._at_ns):
            self._curves[curve.source.lane, curve.source.channel] = curve

    def _of(self, sources: Iterable[Source]) -> list[EnergyCurve]:
        """The curves of sources, named as these are."""
        curves = []
        for source in sources:
            curve = self._curves[source.lane, source.channel]
            found = curve.source
            if found.mirrors:  # which only the readings show
                source = source._replace(mirrors=found.mirrors).not_counted(found.excluded)  # noqa: PLW2901
            curves.append(curve._replace(source=source))
        return curves


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
