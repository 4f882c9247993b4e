"""Trees shaped like /sys for perf's energy events and for hwmon.

A perf tree points its energy events at a counter that is there on every x86 machine: the time
stamp counter, behind the PMU `msr`. What is opened and read is the kernel's; `tsc()` is the truth.
An hwmon tree is a class folder whose files are set by hand.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MSR = Path("/sys/bus/event_source/devices/msr")
JOULE = "2.3283064365386962890625e-10"  # 2**-32, as the kernel writes it
_WIDTH = 24  # bytes of every hwmon value: one write of constant length is never torn


def tsc() -> int:
    """The time stamp counter, read without perf: rdtsc; shl rdx, 32; or rax, rdx; ret."""
    return int(_rdtsc())


def _compile() -> object:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("0f31 48c1e220 4809d0 c3"))
    call = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    call.page = page  # type: ignore[attr-defined]  # as long as the call
    return call


_rdtsc = _compile() if platform.machine() == "x86_64" else None


def why_no_tsc() -> str:
    """Why a perf tree cannot be had here; empty if it can."""
    if _rdtsc is None:
        return f"no time stamp counter on {platform.machine()}"
    return "" if (MSR / "events/tsc").exists() else "this kernel has no PMU 'msr'"


@dataclass(frozen=True)
class Event:
    """An event of a perf tree; `encoding` 0 is the time stamp counter in the PMU `msr`."""

    name: str
    encoding: str = "event=0x00"
    scale: str = JOULE
    unit: str | None = "Joules"


def perf_tree(
    sysfs: Path,
    events: Sequence[Event] = (Event("energy-pkg"),),
    *,
    cpus: Mapping[int, tuple[int, int]] | None = None,
    pmu: str = "power",
    cpumask: str | None = None,
) -> Path:
    """Writes the PMU into `sysfs`; `cpus` are those of the mask, each with (package, die)."""
    cpus = {0: (0, 0)} if cpus is None else cpus
    folder = sysfs / "bus/event_source/devices" / pmu
    (folder / "events").mkdir(parents=True)
    (folder / "format").mkdir()
    (folder / "type").write_text((MSR / "type").read_text())
    (folder / "cpumask").write_text((cpumask or ",".join(map(str, cpus))) + "\n")
    (folder / "format/event").write_text("config:0-7\n")
    (folder / "format/far").write_text("config:0-1,62-63\n")
    for event in events:
        path = folder / "events" / event.name
        path.write_text(event.encoding + "\n")
        Path(f"{path}.scale").write_text(event.scale + "\n")
        if event.unit is not None:
            Path(f"{path}.unit").write_text(event.unit + "\n")
    for cpu, (package, die) in cpus.items():
        topology = sysfs / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True, exist_ok=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "die_id").write_text(f"{die}\n")
    return sysfs


@dataclass(eq=False)
class Chip:
    """One hwmonN; a value is set by the name of its file."""

    where: Path
    _files: dict[str, Path] = field(default_factory=dict)

    def set(self, name: str, value: int | str) -> None:
        path = self._files[name]
        with path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), str(value).encode().ljust(_WIDTH, b"\n"), 0)

    def path(self, name: str) -> Path:
        return self._files[name]


def hwmon_chip(
    sysfs: Path,
    name: str,
    values: Mapping[str, int | str],
    *,
    device: str | None = None,
    with_device: bool = False,
) -> Chip:
    """Adds a chip to `sysfs`. `with_device`: its files lie with its device, as of old drivers."""
    root = sysfs / "class/hwmon"
    root.mkdir(parents=True, exist_ok=True)
    where = root / f"hwmon{len(list(root.iterdir()))}"
    where.mkdir()
    folder = where
    if device is not None:
        real = sysfs / "devices" / device
        real.mkdir(parents=True)
        (where / "device").symlink_to(real)
        folder = real if with_device else where
    (folder / "name").write_text(name + "\n")
    chip = Chip(where)
    for file, value in values.items():
        chip._files[file] = folder / file
        (folder / file).touch()
        chip.set(file, value)
    return chip


def grace(sysfs: Path, socket: int, *, module: bool = False) -> list[Chip]:
    """The power meters of one Grace socket, as its tuning guide lists them, W: 200, 150, 20."""
    meters = {"Grace": 200, "CPU": 150, "SysIO": 20} | ({"Module": 700} if module else {})
    return [
        hwmon_chip(
            sysfs,
            "power_meter",
            {
                "power1_average": power_w * 1_000_000,
                "power1_average_interval": 50,
                "power1_oem_info": f"{of} Power Socket {socket}",
            },
            device=f"ACPI000D:{socket}{index}",
            with_device=True,
        )
        for index, (of, power_w) in enumerate(meters.items())
    ]


def kfd_node(sysfs: Path, node: int, address: str | None = None) -> None:
    """A node of KFD's topology: the GPU at a PCI address, or a processor."""
    folder = sysfs / f"class/kfd/kfd/topology/nodes/{node}"
    folder.mkdir(parents=True)
    facts = {"cpu_cores_count": 64, "simd_count": 0, "location_id": 0, "domain": 0}
    if address is not None:
        domain, bus, slot, function = (int(part, 16) for part in re.split("[:.]", address))
        location = bus << 8 | slot << 3 | function
        facts |= {"cpu_cores_count": 0, "simd_count": 440, "location_id": location}
        facts |= {"domain": domain}
    (folder / "properties").write_text("".join(f"{k} {v}\n" for k, v in facts.items()))


def drm_card(sysfs: Path, number: int, device: str, *, vendor: str = "0x8086") -> None:
    """A graphics card of the class drm, with a connector; `device` is its PCI address."""
    folder, real = sysfs / f"class/drm/card{number}", sysfs / "devices" / device
    folder.mkdir(parents=True)
    (sysfs / f"class/drm/card{number}-DP-1").mkdir()
    real.mkdir(parents=True, exist_ok=True)
    (real / "vendor").write_text(vendor + "\n")
    (folder / "device").symlink_to(real)
