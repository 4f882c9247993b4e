"""Power models for a CPU and memory without a sensor: energy from their recorded utilisation.

It is an estimate, and labelled *modelled* wherever it is shown. A model linear in load missed RAPL
by -52 % to +146 % in codecarbon's own load sweeps. So no figure here claims less than ±50 % (k =
2), and one that is borrowed from a related CPU claims more.
"""

from __future__ import annotations

import math

from pepr_profiler.record import Floats, Ints, Record
from pepr_profiler.sensors.machine import CpuIdentity
from pepr_profiler.units import parse_cpu_power

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from pepr_profiler.energy.activity import Activity
    from pepr_profiler.energy.curve import EnergyCurve
    from pepr_profiler.energy.sources import Source

# U is k = 2 and relative. The published figure of this very microarchitecture, of the generation
# beside it (judgement), and of nothing close (judgement; the list itself spans a factor of 2.8).
_U_KNOWN = 0.5
_U_NEIGHBOUR = 0.75
_U_DISTANT = 1.0

# W per vCPU of a whole server, idle and at full load: cloud-carbon-footprint's coefficients, which
# average the SPECpower_ssj2008 submissions of each microarchitecture. Whole server: the share of
# fans, board, power supply and memory is inside. The third column is GB of memory per vCPU: the
# mean of the submissions that its lists of CPUs select (21, 13, 81, 69, 10, 36 and 16 servers).
_PER_VCPU = {
    "Haswell": (1.00, 4.74, 1.15),
    "Broadwell": (0.71, 3.69, 1.06),
    "Skylake": (0.65, 4.26, 1.62),
    "Cascade Lake": (0.64, 3.97, 1.93),
    "EPYC 1": (0.82, 2.55, 1.50),
    "EPYC 2": (0.47, 1.69, 1.01),
    "EPYC 3": (0.45, 2.02, 1.00),
}
_SOURCE = "cloud-carbon-footprint (SPECpower), W per vCPU of a whole server"

# (vendor, family, model) -> what it is, whose figure it takes, U. Model numbers: Linux'
# arch/x86/include/asm/intel-family.h and AMD's family 17h, 19h and 1Ah revision guides. Numbers
# and not brand strings, because hypervisors hide the brand ("AMD EPYC", "Intel Xeon Processor").
_CPUS = {
    ("GenuineIntel", 6, 63): ("Haswell-EP", "Haswell", _U_KNOWN),
    ("GenuineIntel", 6, 79): ("Broadwell-EP", "Broadwell", _U_KNOWN),
    ("GenuineIntel", 6, 86): ("Broadwell-DE", "Broadwell", _U_KNOWN),
    ("GenuineIntel", 6, 85): ("Skylake-SP", "Skylake", _U_KNOWN),  # and see _identify
    ("GenuineIntel", 6, 106): ("Ice Lake-SP", "Cascade Lake", _U_NEIGHBOUR),
    ("GenuineIntel", 6, 108): ("Ice Lake-D", "Cascade Lake", _U_NEIGHBOUR),
    ("GenuineIntel", 6, 143): ("Sapphire Rapids", "Cascade Lake", _U_DISTANT),
    ("GenuineIntel", 6, 207): ("Emerald Rapids", "Cascade Lake", _U_DISTANT),
    ("GenuineIntel", 6, 173): ("Granite Rapids", "Cascade Lake", _U_DISTANT),
    ("AuthenticAMD", 23, 1): ("EPYC 7001 (Naples)", "EPYC 1", _U_KNOWN),
    ("AuthenticAMD", 23, 49): ("EPYC 7002 (Rome)", "EPYC 2", _U_KNOWN),
    ("AuthenticAMD", 25, 1): ("EPYC 7003 (Milan)", "EPYC 3", _U_KNOWN),
    ("AuthenticAMD", 25, 17): ("EPYC 9004 (Genoa)", "EPYC 3", _U_NEIGHBOUR),
    ("AuthenticAMD", 25, 160): ("EPYC 97x4 (Bergamo)", "EPYC 3", _U_NEIGHBOUR),
    ("AuthenticAMD", 26, 2): ("EPYC 9005 (Turin)", "EPYC 3", _U_DISTANT),
    ("AuthenticAMD", 26, 17): ("EPYC 9005 (Turin Dense)", "EPYC 3", _U_DISTANT),
}

# Crucial's rule of thumb, 3 W for 8 GB; boavizta has 0.284 and cloud-carbon-footprint 0.392.
W_PER_GB = 0.375
# Memory is sold, and these figures are meant, in binary gigabytes (JEDEC JESD100B).
_BYTES_PER_GB = 2**30


class CpuModel(Record):
    """The whole machine's CPU power as a line in load; `u_rel` is relative, k = 2.

    `memory_bytes` is how much memory the figure has the power of.
    """

    idle_w: float
    max_w: float
    u_rel: float
    source: str
    description: str
    memory_bytes: float = 0.0

    def without_memory(self, ram: RamModel, installed_bytes: float) -> CpuModel:
        """The same figure for a machine whose memory has a sensor of its own."""
        ram_w = ram.power_w(min(self.memory_bytes, installed_bytes))
        idle_w, max_w = (max(watts - ram_w, 0.0) for watts in (self.idle_w, self.max_w))
        return self._replace(idle_w=idle_w, max_w=max_w, memory_bytes=0.0)


class RamModel(Record):
    """Memory power as constant per GB installed; `u_rel` is relative, k = 2."""

    w_per_gb: float = W_PER_GB
    # The three published figures agree within 38 %; that they share no measurement is why this
    # stays at the floor for modelled values.
    u_rel: float = _U_KNOWN
    source: str = "Crucial, 3 W per 8 GB; other published figures are 0.284 and 0.392 W/GB"

    def power_w(self, mem_bytes: float) -> float:
        """The power of `mem_bytes` of memory, used or not: DRAM refreshes all of it."""
        return self.w_per_gb * mem_bytes / _BYTES_PER_GB


def cpu_model(cpuinfo: CpuIdentity, *, vcpus: int, override: str | None = None) -> CpuModel:
    """The model for a machine of `vcpus` online CPUs, or what `--cpu-power IDLE:MAX` (W) gives.

    Raises UsageError for an override that cannot be read, is negative or does not rise.
    """
    if override is not None:
        return _given(override)
    what, figure, u_rel = _identify(cpuinfo)
    if figure is None:
        from statistics import fmean  # 4 ms, which a known CPU need not pay

        idle_w, max_w, memory_gb = map(fmean, zip(*_PER_VCPU.values(), strict=True))
        basis = f"no published figure for {what}; the mean of {len(_PER_VCPU)} server CPUs"
    else:
        idle_w, max_w, memory_gb = _PER_VCPU[figure]
        basis = what
        if u_rel > _U_KNOWN:
            basis = f"no published figure for {what}; that of its relative {figure}"
    return CpuModel(
        idle_w=idle_w * vcpus,
        max_w=max_w * vcpus,
        u_rel=u_rel,
        source=_SOURCE,
        description=f"{basis}: {idle_w:.2f}-{max_w:.2f} W per vCPU x {vcpus}",
        memory_bytes=memory_gb * vcpus * _BYTES_PER_GB,
    )


def power_w(model: CpuModel, load: ArrayLike) -> Floats:
    """P = idle + load (max - idle), the form the figures were published for.

    `load` is the machine's busy fraction, any shape; outside [0, 1] (a tick counted late) it is
    clipped, NaN stays NaN.
    """
    import numpy as np  # the models alone, which options are checked with, do without it

    fraction = np.clip(np.asarray(load, dtype=np.float64), 0.0, 1.0)
    return model.idle_w + fraction * (model.max_w - model.idle_w)


def modelled_curves(
    activity: Activity, at_ns: Ints, *, cpu: CpuModel | None, ram: RamModel | None
) -> list[EnergyCurve]:
    """Energy of CPU and memory from recorded utilisation, of what has a model and no sensor.

    A figure of a whole server has the power of some memory in it: only what exceeds that is added,
    and memory has no curve if nothing does.
    """
    import numpy as np

    from pepr_profiler.energy.sources import Source

    load = activity.load()
    # `u_rel` is stated for k = 2; a source carries k = 1. It is a scale error, fixed for a machine.
    curves = []
    if cpu is not None:
        source = Source(
            "cpu:modelled", "cpu", "modelled", "processes", -1, "utilisation",
            counter=False, provenance="modelled", gain=cpu.u_rel / 2,
        )  # fmt: skip
        curves.append(_curve_of_power(source, activity.t_ns, power_w(cpu, load), at_ns))
    beyond_bytes = activity.installed_bytes - (0.0 if cpu is None else cpu.memory_bytes)
    if ram is not None and beyond_bytes > 0:
        source = Source(
            "dram:modelled", "dram", "modelled", "processes", -1, "installed-memory",
            counter=False, provenance="modelled", gain=ram.u_rel / 2,
        )  # fmt: skip
        ram_w = np.full(len(load), ram.power_w(beyond_bytes))
        curves.append(_curve_of_power(source, activity.t_ns, ram_w, at_ns))
    return curves


def _curve_of_power(source: Source, t_ns: Floats, mean_w: Floats, at_ns: Ints) -> EnergyCurve:
    """A curve from the mean power between samples; beyond them, the first and last go on."""
    import numpy as np

    from pepr_profiler.energy.curve import EnergyCurve, gap_limit_s, median

    if not len(mean_w):
        return EnergyCurve(source, np.full(len(at_ns), np.nan), -1, -1)
    span_ns = np.diff(t_ns)
    energy_j = np.concatenate(([0.0], np.cumsum(mean_w * span_ns * 1e-9)))
    at = at_ns.astype(np.float64)
    curve_j = np.interp(at, t_ns, energy_j)
    curve_j += np.minimum(at - t_ns[0], 0.0) * 1e-9 * mean_w[0]
    curve_j += np.maximum(at - t_ns[-1], 0.0) * 1e-9 * mean_w[-1]
    long = np.flatnonzero(span_ns > gap_limit_s(median(span_ns) * 1e-9) * 1e9)
    gaps = tuple((int(t_ns[i]), int(t_ns[i + 1])) for i in long)
    return EnergyCurve(source, curve_j, int(t_ns[0]), int(t_ns[-1]), gaps_ns=gaps)


def _identify(cpuinfo: CpuIdentity) -> tuple[str, str | None, float]:
    """What the CPU is, the key of the figure to use (None: no relative in the list) and U."""
    vendor, family, model = cpuinfo.vendor, cpuinfo.family, cpuinfo.model
    if vendor is None or family is None or model is None:
        return f"this CPU ({cpuinfo})", None, _U_DISTANT
    # Three server generations share model 85; steppings as in Linux' arch/x86/kernel/cpu/intel.c.
    if (vendor, family, model) == ("GenuineIntel", 6, 85) and (cpuinfo.stepping or 0) >= 5:
        if cpuinfo.stepping in (5, 6, 7):
            return "Cascade Lake", "Cascade Lake", _U_KNOWN
        return "Cooper Lake", "Cascade Lake", _U_NEIGHBOUR
    unknown = (f"this CPU ({cpuinfo})", None, _U_DISTANT)
    return _CPUS.get((vendor, family, model), unknown)


def _given(override: str) -> CpuModel:
    idle_w, max_w = parse_cpu_power(override)
    return CpuModel(
        idle_w=idle_w,
        max_w=max_w,
        # Two good end points do not make the line between them true: at a known TDP the line was
        # what missed by -52 % to +146 %.
        u_rel=_U_KNOWN,
        source="given by --cpu-power",
        description=f"given: {idle_w:g}-{max_w:g} W for the whole machine, linear in load",
        memory_bytes=math.inf,
    )
