"""Which sensors to open on this machine.

A run waits for this, so it looks at the names of a few files and opens perf once.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.errors import SensorError
from pepr_profiler.sensors.spec import SensorSpec

_PROBE_PERIOD_NS = 3600 * 10**9  # a probe reads once
_PROBE_TIMEOUT_S = 1.0
_LOOKS_S = (0.003, 0.02)  # waited for only after a first look, which costs no time

# powercap's name of a domain, and perf's.
_DOMAINS = {"package": "energy-pkg", "dram": "energy-ram", "psys": "energy-psys"}


def detect_lasting(sysfs: Path = Path("/sys")) -> tuple[SensorSpec, ...]:
    """As `detect`, for a daemon: it may be restarted, and has privileges to open everything.

    perf counts from when it is opened, so a restart loses what flowed meanwhile. powercap shows the
    processor's own counter, and is preferred here.
    """
    zones = {domain for domain, _ in _zones(sysfs)}
    rapl = "perf" if not zones and _perf_offers(sysfs) else "powercap"
    hwmon = _hwmon_specs(sysfs, cpu_covered="package" in zones)
    return (SensorSpec("nvml"), _spec(rapl, sysfs), *hwmon)


def detect(sysfs: Path = Path("/sys")) -> tuple[SensorSpec, ...]:
    """The sensors that a recording should open here; none only repeats another.

    NVML is always tried, because only its library knows whether there is a GPU. perf is preferred
    to powercap, whose counters wrap and only root may read; powercap is added for what perf lacks,
    and where perf's counter stands still.
    hwmon chips are opened one by one, for devices that neither covers. If nothing gives the CPU's
    energy, the list has what could: opening it shows why it does not.
    """
    perf = _PerfProbe(sysfs)
    zones = _zones(sysfs)
    readable = {domain for domain, may_read in zones if may_read}
    covered = "energy-pkg" in perf.events or "package" in readable
    hwmon = _hwmon_specs(sysfs, cpu_covered=covered)
    is_still = not perf.close() and "package" in readable and not _perf_moves(sysfs)
    specs = [SensorSpec("nvml")]
    if perf.events:
        specs.append(_spec("perf", sysfs))
    denied = not perf.events and _perf_offers(sysfs)
    if is_still or {_DOMAINS[domain] for domain in readable} - perf.events:
        specs.append(_spec("powercap", sysfs))
    elif not perf.events:
        specs += [_spec("perf", sysfs)] if denied else []
        specs += [_spec("powercap", sysfs)] if zones or not denied else []
    return (*specs, *hwmon)


# --- what lies in sysfs ---------------------------------------------------------------------------


def _spec(kind: str, sysfs: Path) -> SensorSpec:
    if sysfs == Path("/sys"):
        return SensorSpec(kind)
    return SensorSpec.of(kind, sysfs if kind == "perf" else sysfs / "class" / kind)


def _perf_offers(sysfs: Path) -> bool:
    return (sysfs / "bus/event_source/devices/power/events/energy-pkg").exists()


class _PerfProbe:
    """The events that perf lets us count, which is known by opening them."""

    def __init__(self, sysfs: Path) -> None:
        self.events: frozenset[str] = frozenset()
        self._sampler: _core.Sampler | None = None
        if not _perf_offers(sysfs):
            return
        self._sampler = _core.Sampler(_spec("perf", sysfs), _PROBE_PERIOD_NS)
        with suppress(SensorError):  # whoever opens it for good will report why
            if self._sampler.wait_ready(_PROBE_TIMEOUT_S):
                self._names = [channel.labels["event"] for channel in self._sampler.channels]
                self.events = frozenset(self._names)

    def close(self) -> bool:
        """Ends the probe; whether a package's counter has risen meanwhile, if there is one."""
        if self._sampler is None:
            return True
        self._sampler.stop(_PROBE_TIMEOUT_S)  # reads once more
        if "energy-pkg" not in self.events:
            return True
        for _, _, _, columns, *_ in iter(self._sampler.read, None):
            values = memoryview(columns[self._names.index("energy-pkg")]).cast("d")
            if values[0] != values[-1]:
                return True
        return False


def _perf_moves(sysfs: Path) -> bool:
    """Whether perf's counter of a package rises. It does within 1 ms, if the machine runs."""
    for wait_s in _LOOKS_S:
        probe = _PerfProbe(sysfs)
        time.sleep(wait_s)
        if probe.close():
            return True
    return False


def _zones(sysfs: Path) -> list[tuple[str, bool]]:
    """The domain of each powercap zone that could be used, and whether we may read it."""
    zones = []
    for folder in _listed(sysfs / "class/powercap"):
        domain = read_text(folder / "name").partition("-")[0]
        if domain in _DOMAINS and not folder.name.startswith("intel-rapl-mmio"):
            zones.append((domain, os.access(folder / "energy_uj", os.R_OK)))
    return zones


def _hwmon_specs(sysfs: Path, *, cpu_covered: bool) -> list[SensorSpec]:
    specs = []
    for chip in _listed(sysfs / "class/hwmon"):
        names = [*_listed(chip), *_listed(chip / "device")]
        inputs = [n.name for n in names if n.name.endswith(("_input", "_average"))]
        name = read_text(chip / "name") or read_text(chip / "device/name")
        energetic = any(n.startswith(("energy", "power")) for n in inputs) or name == "ina3221"
        if energetic and not (cpu_covered and name == "amd_energy"):
            specs.append(SensorSpec.of("hwmon", chip))
    return specs


def read_text(path: Path) -> str:
    """The text of a small file without surrounding space; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
