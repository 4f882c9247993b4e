"""A tree shaped like /sys/class/powercap, still or live, with the exact truth about it.

Shape: Linux 6.x on a two-socket server. The class folder holds links, children flat beside their
parents; the real folders nest, and their `subsystem` and `device` links lead back up, so that
following every link never ends.
"""

from __future__ import annotations

import math
import os
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim import native
from sim.waves import Constant, Wave

RANGE_UJ = 262_143_328_850  # a common package, MEASUREMENT.md, C
IDLE = Constant(0)
SIZE = 16  # bytes of every energy_uj file, newlines behind the number


@dataclass(frozen=True)
class ZoneFault:
    """What goes wrong with a zone's file in [start_s, end_s); README.md lists the effects."""

    effect: str
    start_s: float
    end_s: float = math.inf

    def __post_init__(self) -> None:
        if self.effect not in {"stall", "reset", "empty", "garbage", "deny", "vanish"}:
            raise ValueError(f"no such effect: {self.effect}")

    def covers(self, t_s: float) -> bool:
        return self.start_s <= t_s < self.end_s


@dataclass(frozen=True)
class Zone:
    """One zone. `key` is its folder's name and says where it nests: "intel-rapl:0:1"."""

    key: str
    name: str
    wave: Wave = IDLE
    range_uj: int = RANGE_UJ
    start_uj: int = 0
    faults: tuple[ZoneFault, ...] = ()

    @property
    def control_type(self) -> str:
        return self.key.partition(":")[0]

    @property
    def parent(self) -> str:
        """The key of the zone around this one, or the control type."""
        return self.key.rpartition(":")[0]


def two_socket_server(
    *,
    package_w: float = 100.0,
    core_w: float = 60.0,
    dram_w: float = 10.0,
    psys_w: float = 260.0,
    **options: Any,
) -> tuple[Zone, ...]:
    """Two packages with core and dram each, the mmio twin of the first, and psys around all.

    `options` go to every zone (range_uj, start_uj, faults).
    """
    powers = (
        ("intel-rapl:0", "package-0", package_w),
        ("intel-rapl:0:0", "core", core_w),
        ("intel-rapl:0:1", "dram", dram_w),
        ("intel-rapl:1", "package-1", package_w),
        ("intel-rapl:1:0", "core", core_w),
        ("intel-rapl:1:1", "dram", dram_w),
        ("intel-rapl:2", "psys", psys_w),
        ("intel-rapl-mmio:0", "package-0", package_w),
    )
    return tuple(Zone(key, name, Constant(power_w), **options) for key, name, power_w in powers)


def build_writer(cache: Path) -> Path:
    """The program that keeps a tree moving. Raises native.UnavailableError."""
    return native.build(cache, "powercap_writer", ("powercap_writer.cpp",))


class Tree:
    """The tree on disk; live, if it is given the program that writes it."""

    def __init__(
        self,
        root: Path,
        zones: tuple[Zone, ...],
        *,
        writer: Path | None = None,
        period_s: float = 0.001,
        epoch_ns: int | None = None,
    ) -> None:
        root = root.resolve()
        self.zones = {zone.key: zone for zone in zones}
        self.where = root / "sys/class/powercap"
        self.epoch_ns = time.monotonic_ns() if epoch_ns is None else epoch_ns
        self.live, self.period_s = writer is not None, period_s
        self._devices = root / "sys/devices/virtual/powercap"
        self._files: dict[str, int] = {}
        self._writer: subprocess.Popen[str] | None = None
        self.where.mkdir(parents=True)
        for control_type in sorted({zone.control_type for zone in zones}):
            folder = self._devices / control_type
            folder.mkdir(parents=True)
            (folder / "enabled").write_text("1\n")
            self._link(folder)
        for zone in zones:
            self._make(zone)
        self._program, self._script = writer, root / "writer.spec"
        self._late = root / "late_ns"
        self._late.write_bytes(bytes(8))
        if writer is not None:
            self._start(writer)

    @property
    def spec(self) -> str:
        return f"powercap:{self.where}"

    @property
    def writer_pid(self) -> int | None:
        return None if self._writer is None else self._writer.pid

    def path(self, key: str) -> Path:
        """The zone's real folder, nested in its parents'."""
        family, *numbers = key.split(":")
        keys = [family]
        for number in numbers:
            keys.append(f"{keys[-1]}:{number}")
        return self._devices.joinpath(*keys)

    def set(self, key: str, value_uj: int) -> None:
        """Give a still zone this value, with one write of constant length."""
        if self.live:
            raise ValueError("a live tree moves by itself; script it with waves and faults")
        os.pwrite(self._files[key], _padded(value_uj), 0)

    def fail(self, key: str, effect: str) -> None:
        """From now on a live zone has this fault."""
        if self._program is None:
            raise ValueError("a still tree has no faults; set its value")
        fault = ZoneFault(effect, self._since_s(time.monotonic_ns()))
        zone = self.zones[key]
        self.zones[key] = replace(zone, faults=(*zone.faults, fault))
        self.stop()
        self._start(self._program)

    def energy_j(self, key: str, t0_ns: int, t1_ns: int) -> float:
        """The energy that the zone truly took, whatever its file says."""
        return self.zones[key].wave.energy_j(self._since_s(t0_ns), self._since_s(t1_ns))

    @property
    def late_s(self) -> float:
        """How late a value has been written at most: what a busy machine makes truths unsure by."""
        (late_ns,) = struct.unpack("q", self._late.read_bytes())
        return float(late_ns * 1e-9)

    def counter_uj(self, key: str, t_ns: int) -> int:
        """What a punctual live file reads at `t_ns`, wraps, stalls and resets included."""
        zone = self.zones[key]
        period_ns = round(self.period_s * 1e9)
        t_s = self._since_s(self.epoch_ns + (t_ns - self.epoch_ns) // period_ns * period_ns)
        for fault in zone.faults:
            if fault.effect == "stall" and fault.covers(t_s):
                t_s = fault.start_s
        resets_s = [f.start_s for f in zone.faults if f.effect == "reset" and f.start_s <= t_s]
        from_s, start_uj = (max(resets_s), 0) if resets_s else (0.0, zone.start_uj)
        value_uj: int = int(start_uj + 1e6 * zone.wave.energy_j(from_s, t_s)) % zone.range_uj
        step_uj: int = 10 ** max(0, len(str(value_uj)) - 8)
        return value_uj // step_uj * step_uj

    def stop(self) -> None:
        """End the writer, if any, and wait for it. Safe to call twice."""
        if self._writer is not None:
            self._writer.terminate()
            self._writer.wait()
            if self._writer.stdout is not None:
                self._writer.stdout.close()
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _since_s(self, t_ns: int) -> float:
        return (t_ns - self.epoch_ns) * 1e-9

    def _link(self, folder: Path) -> None:
        (self.where / folder.name).symlink_to(os.path.relpath(folder, self.where))
        (folder / "subsystem").symlink_to(os.path.relpath(self.where, folder))

    def _make(self, zone: Zone) -> None:
        folder = self.path(zone.key)
        folder.mkdir()
        (folder / "name").write_text(f"{zone.name}\n")
        (folder / "max_energy_range_uj").write_text(f"{zone.range_uj}\n")
        (folder / "enabled").write_text("1\n")
        (folder / "device").symlink_to(f"../../{zone.parent}")
        self._link(folder)
        # Since CVE-2020-8694 only root reads it. The live writer closes it after opening.
        mode = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(folder / "energy_uj", mode, 0o600 if self.live else 0o400)
        os.pwrite(fd, _padded(zone.start_uj), 0)
        if self.live:
            os.close(fd)
        else:
            self._files[zone.key] = fd

    def _start(self, program: Path) -> None:
        lines = [f"epoch_ns {self.epoch_ns}", f"period_ns {round(self.period_s * 1e9)}"]
        lines += [f"class {self.where}", f"late {self._late}"]
        for zone in self.zones.values():
            lines.append(f"zone {zone.range_uj} {zone.start_uj} {self.path(zone.key)}")
            lines.append(f"power {zone.wave.words()}")
            lines += [f"fault {f.effect} {f.start_s} {f.end_s}" for f in zone.faults]
        self._script.write_text("\n".join(lines) + "\n")
        self._writer = subprocess.Popen(
            [str(program), str(self._script), str(os.getpid())], stdout=subprocess.PIPE, text=True
        )
        assert self._writer.stdout is not None
        if self._writer.stdout.readline() != "ready\n":
            self.stop()
            raise RuntimeError("the powercap writer did not start; its words are above")


BuildTree = Callable[..., Tree]
"""What the fixture `powercap_sim` is: zones, and how they behave, in."""


def _padded(value_uj: int) -> bytes:
    return str(value_uj).encode().ljust(SIZE, b"\n")
