"""Which sensors to open on this machine, as which lanes, what would unlock the rest, and where the
node's daemon may listen, which has some of them.

Decided from the names of a few files and one attempt to open perf: a run waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.errors import SensorError
from pepr_profiler.record import Record

KINDS = ("nvml", "perf", "powercap", "hwmon")

_PERIOD_NS = {"nvml": 10_000_000, "processes": 100_000_000, "nvml-processes": 500_000_000}
_OTHER_PERIOD_NS = 20_000_000
"""How often a lane is read until it knows its sensor's refreshes, and where each read brings news:
RAPL is refreshed each millisecond, which is more than a phase's edge is worth."""

SOCKET_VARIABLE = "PEPR_DAEMON"
"""Where the node's daemon listens, instead of the usual places; "off": there is none."""

SYSTEM_SOCKET = Path("/run/pepr-profiler/daemon.sock")

_PROBE_NS = 3600 * 10**9  # a probe reads once
_PROBE_TIMEOUT_S = 1.0
_DENIED = "Permission denied"  # csrc/sensor.h, kDenied

# What powercap calls a domain, and perf.
_DOMAINS = {"package": "energy-pkg", "dram": "energy-ram", "psys": "energy-psys"}
_CONTAINER_WORDS = ("docker", "kubepods", "containerd", "libpod", "lxc")


class Place(Record):
    """Where this process runs, as far as it decides what unlocks a sensor."""

    root: bool
    container: bool
    virtual: bool

    def __str__(self) -> str:
        parts = ["root" if self.root else f"user {os.geteuid()}"]
        parts += ["in a container"] if self.container else []
        parts += ["on a virtual machine"] if self.virtual else []
        return " ".join(parts)


def place(root: Path = Path("/")) -> Place:
    """Who and where we are; `root` is the file system to judge by."""
    markers = (root / ".dockerenv", root / "run/.containerenv")
    cgroups = _text(root / "proc/1/cgroup")
    return Place(
        root=os.geteuid() == 0,
        container=any(marker.exists() for marker in markers)
        or any(word in cgroups for word in _CONTAINER_WORDS),
        virtual="hypervisor" in _text(root / "proc/cpuinfo").split(),
    )


def is_denied(why: str) -> bool:
    """Whether only permission is missing, by the reason that a driver gives."""
    return why.startswith(_DENIED)


def detect_lasting(sysfs: Path = Path("/sys")) -> tuple[str, ...]:
    """As `detect`, for a reader that may be restarted: counters that go on without it come first.

    perf counts from when it is opened, so that a restart loses what was used meanwhile; powercap
    shows the processor's own counter. Who is asking has privileges, so permission does not count.
    """
    zones = {domain for domain, _ in _zones(sysfs)}
    rapl = "perf" if not zones and _perf_offers(sysfs) else "powercap"
    hwmon = _hwmon_specs(sysfs, cpu_covered="package" in zones)
    return ("nvml", _spec(rapl, sysfs), *hwmon)


def detect(sysfs: Path = Path("/sys")) -> tuple[str, ...]:
    """The specs that a recording should open here; none is opened that only repeats another.

    NVML is always tried: only loading its library tells. perf is preferred to powercap, whose
    counters wrap and are root's own; powercap is added for what perf lacks. hwmon chips are opened
    one by one, for devices that neither covers. Where nothing gives the CPU's energy, what could is
    in the list all the same: opening it says why it does not.
    """
    zones = _zones(sysfs)
    events = _perf_events(sysfs)
    specs = ["nvml"]
    if events:
        specs.append(_spec("perf", sysfs))
    denied = not events and _perf_offers(sysfs)
    readable = {domain for domain, may_read in zones if may_read}
    if {_DOMAINS[domain] for domain in readable} - events:
        specs.append(_spec("powercap", sysfs))
    elif not events:
        specs += [_spec("perf", sysfs)] if denied else []
        specs += [_spec("powercap", sysfs)] if zones or not denied else []
    covered = "energy-pkg" in events or "package" in readable
    return (*specs, *_hwmon_specs(sysfs, cpu_covered=covered))


def with_process_lists(specs: Sequence[str]) -> tuple[str, ...]:
    """The specs, and a lane beside each NVML for who uses its GPUs; it may hang without harm."""
    nvml = [spec for spec in specs if kind_of(spec) == "nvml"]
    lists = ["nvml-processes" + spec.removeprefix("nvml") for spec in nvml]
    return (*specs, *(spec for spec in dict.fromkeys(lists) if spec not in specs))


def socket_paths() -> list[Path]:
    """Where a daemon may listen: the user's own comes first."""
    given = os.environ.get(SOCKET_VARIABLE)
    if given:
        return [] if given == "off" else [Path(given)]
    own = own_socket()
    return [*([own] if own else []), SYSTEM_SOCKET]


def sockets_there() -> list[Path]:
    """Those of `socket_paths` where something is for us.

    `su` leaves XDG_RUNTIME_DIR another user's, which we may not look into.
    """
    return [path for path in socket_paths() if os.path.exists(path)]  # noqa: PTH110  it never raises


def own_socket() -> Path | None:
    """Where a daemon of this user alone listens."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "pepr-profiler" / "daemon.sock" if runtime else None


def kind_of(spec: str) -> str:
    """Which driver a spec is for."""
    return spec.partition(":")[0]


def base_period_ns(spec: str) -> int:
    """How often a sensor is read until its refreshes are known."""
    return _PERIOD_NS.get(kind_of(spec), _OTHER_PERIOD_NS)


def lane_names(specs: Sequence[str]) -> list[tuple[str, str]]:
    """A lane is called after its driver; a second one of the same kind gets a number."""
    names: list[tuple[str, str]] = []
    for spec in specs:
        kind = kind_of(spec)
        taken = sum(kind_of(other) == kind for _, other in names)
        names.append((f"{kind}-{taken + 1}" if taken else kind, spec))
    return names


def remedy(spec: str, *, what: str, why: str, fix: str, where: Place) -> dict[str, str]:
    """What is missing, why, and the exact command that unlocks it for whoever runs here.

    `what`, `why` and `fix` are the driver's, which knows the file but not who is asking.
    """
    kind, _, path = spec.partition(":")
    if is_denied(why):
        fix = _permit(kind, fix, where)
    elif not path:  # a place that was named by hand is checked by hand
        why, fix = _provide(kind, why, fix, where)
    if where.root and not where.container:
        fix = fix.replace("sudo ", "")
    return {"what": what, "why": why, "fix": fix}


def _permit(kind: str, fix: str, where: Place) -> str:
    if not where.container:
        # The daemon first: what is opened to all is open to everybody's side channels too.
        if kind in ("perf", "powercap") and not where.root:
            return f"sudo pepr-profile daemon (or, to open it to everybody: {fix})"
        return fix
    return {
        "perf": "docker run --cap-add PERFMON --security-opt seccomp=unconfined …, or on the host: "
        "sudo sysctl kernel.perf_event_paranoid=0",
        "nvml": "docker run --gpus all …, as a user who may open /dev/nvidia*",
        "powercap": "on the host: sudo pepr-profile daemon, and docker run "
        f"-v /run/pepr-profiler:/run/pepr-profiler … (or, to open it to everybody: {fix})",
        "processes": "docker run --cap-add PERFMON …, and on the host: "
        "sudo sysctl kernel.perf_event_paranoid=2",
    }.get(kind, f"on the host: {fix}")


def _provide(kind: str, why: str, fix: str, where: Place) -> tuple[str, str]:
    """Why a sensor is not at its usual place, and how to get it there."""
    if kind in ("perf", "powercap") and where.virtual:
        why = "this is a virtual machine, and RAPL stays with the machine that hosts it"
        return why, "measure on that machine, or see: pepr-profile run --help, --cpu-power"
    if kind == "nvml":
        boxed = "start the container with its GPUs: docker run --gpus all …"
        return why, boxed if where.container else fix
    if not where.container:
        module = {"perf": "rapl", "powercap": "intel_rapl_msr"}.get(kind)
        return why, f"sudo modprobe {module}" if module else fix
    if kind == "perf":
        return why, "on the host: sudo modprobe rapl"
    folder = f"/sys/class/{kind}"
    return (
        f"the container does not show {folder}, or its host has none",
        f"docker run -v /sys:/host/sys:ro …, and --sensor {kind}:/host{folder}",
    )


# --- what lies in sysfs ---------------------------------------------------------------------------


def _spec(kind: str, sysfs: Path) -> str:
    if sysfs == Path("/sys"):
        return kind
    return f"{kind}:{sysfs if kind == 'perf' else sysfs / 'class' / kind}"


def _perf_offers(sysfs: Path) -> bool:
    return (sysfs / "bus/event_source/devices/power/events/energy-pkg").exists()


def _perf_events(sysfs: Path) -> set[str]:
    """The events that perf lets us count. Only the kernel knows whether it does: it is asked."""
    if not _perf_offers(sysfs):
        return set()
    probe = _core.Sampler(_spec("perf", sysfs), _PROBE_NS)
    try:
        if not probe.wait_ready(_PROBE_TIMEOUT_S):
            return set()
        return {channel.labels["event"] for channel in probe.channels}
    except SensorError:
        return set()  # said again, with its reason, by whoever opens it for good
    finally:
        probe.stop(_PROBE_TIMEOUT_S)


def _zones(sysfs: Path) -> list[tuple[str, bool]]:
    """Of each powercap zone that could count, its domain, and whether we may read it."""
    zones = []
    for folder in _listed(sysfs / "class/powercap"):
        domain = _text(folder / "name").partition("-")[0]
        if domain in _DOMAINS and not folder.name.startswith("intel-rapl-mmio"):
            zones.append((domain, os.access(folder / "energy_uj", os.R_OK)))
    return zones


def _hwmon_specs(sysfs: Path, *, cpu_covered: bool) -> list[str]:
    specs = []
    for chip in _listed(sysfs / "class/hwmon"):
        names = [*_listed(chip), *_listed(chip / "device")]
        inputs = [n.name for n in names if n.name.endswith(("_input", "_average"))]
        name = _text(chip / "name") or _text(chip / "device/name")
        energetic = any(n.startswith(("energy", "power")) for n in inputs) or name == "ina3221"
        if energetic and not (cpu_covered and name == "amd_energy"):
            specs.append(f"hwmon:{chip}")
    return specs


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
