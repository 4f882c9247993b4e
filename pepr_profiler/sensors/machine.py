"""What machine this is: its processor, and the facts that remedies depend on."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from pepr_profiler.record import Record
from pepr_profiler.sensors.detect import read_text

_CONTAINER_WORDS = ("docker", "kubepods", "containerd", "libpod", "lxc")


class Surroundings(Record):
    """Who runs this program and where, as far as it decides how a sensor can be unlocked."""

    root: bool
    container: bool
    virtual: bool

    def __str__(self) -> str:
        parts = ["root" if self.root else f"user {os.geteuid()}"]
        parts += ["in a container"] if self.container else []
        parts += ["on a virtual machine"] if self.virtual else []
        return " ".join(parts)


def read_surroundings(root: Path = Path("/")) -> Surroundings:
    """The surroundings of this process; `root` is the file system to read them from."""
    markers = (root / ".dockerenv", root / "run/.containerenv")
    cgroups = read_text(root / "proc/1/cgroup")
    return Surroundings(
        root=os.geteuid() == 0,
        container=any(marker.exists() for marker in markers)
        or any(word in cgroups for word in _CONTAINER_WORDS),
        virtual="hypervisor" in read_text(root / "proc/cpuinfo").split(),
    )


class CpuIdentity(Record):
    """What the CPU says it is; None where the kernel does not show it.

    x86: CPUID's vendor, family, model, stepping. ARM: implementer ("0x41"), architecture, part,
    revision.
    """

    vendor: str | None = None
    family: int | None = None
    model: int | None = None
    stepping: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        parts = ("family", self.family), ("model", self.model), ("stepping", self.stepping)
        known = [f"{key} {value}" for key, value in parts if value is not None]
        return " ".join([self.vendor or "unknown vendor", *known])


@functools.cache
def read_cpu_identity(proc: Path = Path("/proc")) -> CpuIdentity:
    """The first processor of `proc`/cpuinfo; every field is None if there is none to read.

    An unknown CPU gets a wider power model of its own; nothing else depends on it.
    """
    first = read_text(proc / "cpuinfo").partition("\n\n")[0]
    fields = {
        key.strip(): value.strip()
        for key, colon, value in (line.partition(":") for line in first.splitlines())
        if colon
    }

    def number(*keys: str) -> int | None:
        for key in keys:
            try:
                return int(fields[key], 0)  # ARM writes 0xd0c
            except (KeyError, ValueError):
                continue
        return None

    return CpuIdentity(
        vendor=fields.get("vendor_id") or fields.get("CPU implementer"),
        family=number("cpu family", "CPU architecture"),
        model=number("model", "CPU part"),
        stepping=number("stepping", "CPU revision"),
        name=fields.get("model name"),
    )
