"""A simulated libnvidia-ml.so.1: what it measures, how its sensors err, which calls fail."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sim import native
from sim.waves import Constant, Wave, mean_w

# nvmlReturn_t, nvml.h
RETURNS = {
    "UNINITIALIZED": 1,
    "INVALID_ARGUMENT": 2,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "INSUFFICIENT_SIZE": 7,
    "DRIVER_NOT_LOADED": 9,
    "TIMEOUT": 10,
    "LIBRARY_NOT_FOUND": 12,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "RESET_REQUIRED": 16,
    "OPERATING_SYSTEM": 17,
    "LIB_RM_VERSION_MISMATCH": 18,
    "UNKNOWN": 999,
}


@dataclass(frozen=True)
class Sensor:
    """How a board looks at its power (MEASUREMENT.md, B). `counter_refresh_s` None: no counter."""

    refresh_s: float = 0.1
    window_s: float = 0.025
    power_usage: Literal["average", "instant"] = "average"
    counter_refresh_s: float | None = 0.1
    phase_s: float = 0.0
    average_s: float = 1.0
    samples_refresh_s: float = 0.02
    delay_s: float = 0.0
    smoothing_s: float = 0.0
    counter_delay_s: float = 0.0

    def __post_init__(self) -> None:
        spans = (self.refresh_s, self.window_s, self.average_s, self.samples_refresh_s)
        if min(spans) <= 0 or self.counter_refresh_s == 0:
            raise ValueError(f"refresh periods and windows are above 0: {self}")

    def last_refresh_s(self, t_s: float, period_s: float) -> float:
        return math.floor((t_s - self.phase_s) / period_s) * period_s + self.phase_s


H100 = Sensor()
A100 = Sensor(power_usage="instant")
TURING = Sensor(window_s=0.1, power_usage="instant")
VOLTA = Sensor(refresh_s=0.02, window_s=0.01, power_usage="instant")
PASCAL = Sensor(refresh_s=0.02, window_s=0.01, power_usage="instant", counter_refresh_s=None)

_HALF, _QUARTER, _ONE_GIB = Constant(0.5), Constant(0.25), Constant(2**30)


@dataclass(frozen=True)
class Process:
    """A compute process on a GPU, alive in [start_s, end_s); `sm` and `mem` are fractions.

    `pid` STARTED stands for every process that the asking program has started. A client of `mps` is
    only on the driver's list of those.
    """

    pid: int
    used_bytes: int
    sm: float = 0.0
    mem: float = 0.0
    start_s: float = -math.inf
    end_s: float = math.inf
    instance: int | None = None
    mps: bool = False


STARTED = 0


@dataclass(frozen=True)
class Gpu:
    """One board: its true power, its sensor, that sensor's errors, and what runs on it."""

    wave: Wave
    uuid: str | None = None
    name: str = "NVIDIA H100 80GB HBM3"
    sensor: Sensor = H100
    gain: float = 1.0
    offset_w: float = 0.0
    counter_gain: float = 1.0
    counter_offset_w: float = 0.0
    counter_start_mj: int = 1_000_000
    counter_resets_s: tuple[float, ...] = ()
    utilization: Wave = _HALF
    memory_utilization: Wave = _QUARTER
    memory_used_bytes: Wave = _ONE_GIB
    memory_total_bytes: int = 80 * 2**30
    memory_reserved_bytes: int = 2**29
    processes: tuple[Process, ...] = (Process(STARTED, 2**30, sm=0.5, mem=0.25),)
    processes_file: Path | None = None
    module: Wave | None = None
    counted: Wave | None = None
    mig: bool | None = False
    power_limit_w: float | None = 700.0

    def text(self, index: int) -> str:
        sensor = self.sensor
        lines = [
            f"gpu {self.uuid or default_uuid(index)} {self.name}",
            f"power {self.wave.words()}",
            f"sensor {sensor.refresh_s} {sensor.window_s} {sensor.phase_s} {sensor.average_s}"
            f" {sensor.power_usage} {sensor.counter_refresh_s or 0} {sensor.samples_refresh_s}",
            f"error {self.gain} {self.offset_w} {self.counter_gain} {self.counter_offset_w}",
            " ".join(map(str, ("counter", self.counter_start_mj, *sorted(self.counter_resets_s)))),
            f"utilization {self.utilization.words()}",
            f"memory_utilization {self.memory_utilization.words()}",
            f"memory_used {self.memory_used_bytes.words()}",
            f"memory {self.memory_total_bytes} {self.memory_reserved_bytes}",
            f"power_limit {self.power_limit_w or 0}",
            f"mig {'none' if self.mig is None else 'on' if self.mig else 'off'}",
        ]
        lag = sensor.delay_s, sensor.smoothing_s, sensor.counter_delay_s
        if any(lag):
            lines.append(" ".join(map(str, ("lag", *lag))))
        if self.counted is not None:
            lines.append(f"counted {self.counted.words()}")
        if self.module is not None:
            lines.append(f"module {self.module.words()}")
        for p in self.processes:
            more = " mps" if p.mps else "" if p.instance is None else f" {p.instance}"
            span = f"{p.start_s} {p.end_s}{more}"
            lines.append(f"process {p.pid} {p.used_bytes} {p.sm} {p.mem} {span}")
        if self.processes_file is not None:
            lines.append(f"processes_file {self.processes_file}")
        return "\n  ".join(lines)


def default_uuid(index: int) -> str:
    return f"GPU-00000000-0000-4000-8000-{index:012d}"


@dataclass(frozen=True)
class Fault:
    """A call that fails, answers 0, is slow or hangs, in [start_s, end_s).

    `function` is a prefix: "nvmlInit" is both initialisers, "nvmlDevice" every call on a device.
    """

    function: str
    effect: str
    start_s: float = -math.inf
    end_s: float = math.inf
    gpu: int | None = None
    field: int | None = None
    every: int = 1
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.effect not in {*RETURNS, "ZERO", "HANG", "SLOW"}:
            raise ValueError(f"no such effect: {self.effect}")

    def text(self) -> str:
        if self.effect in RETURNS:
            effect = f"return {RETURNS[self.effect]}"
        else:
            effect = self.effect.lower() + (f" {self.delay_s}" if self.effect == "SLOW" else "")
        gpu, fid = ("*" if n is None else n for n in (self.gpu, self.field))
        scope = f"{self.start_s} {self.end_s} {gpu} {fid} {self.every}"
        return f"fault {self.function} {scope} {effect}"


@dataclass(frozen=True)
class Scenario:
    """Boards, faults and the instant from which their times count.

    `absent` names the functions that this driver is too old to export.
    """

    gpus: tuple[Gpu, ...] = ()
    faults: tuple[Fault, ...] = ()
    driver_version: str = "580.65.06"
    absent: tuple[str, ...] = ()
    epoch_ns: int = field(default_factory=time.monotonic_ns)

    def text(self) -> str:
        """The scenario file (README.md)."""
        lines = [f"epoch_ns {self.epoch_ns}", f"driver_version {self.driver_version}"]
        lines += [gpu.text(index) for index, gpu in enumerate(self.gpus)]
        lines += [fault.text() for fault in self.faults]
        return "\n".join(lines) + "\n"

    def since_epoch_s(self, t_ns: int) -> float:
        return (t_ns - self.epoch_ns) * 1e-9

    def energy_j(self, t0_ns: int, t1_ns: int, gpu: int = 0) -> float:
        """The energy that the board truly took, whatever its sensors say."""
        return self.gpus[gpu].wave.energy_j(self.since_epoch_s(t0_ns), self.since_epoch_s(t1_ns))

    def counter_mj(self, t_ns: int, gpu: int = 0) -> int:
        """What the energy counter reads at `t_ns`, with its gain, offset, refresh and resets."""
        board = self.gpus[gpu]
        if board.sensor.counter_refresh_s is None:
            raise ValueError("this board has no energy counter")
        t_s = self.since_epoch_s(t_ns)
        at_s = board.sensor.last_refresh_s(t_s, board.sensor.counter_refresh_s)
        behind_s = board.sensor.counter_delay_s
        resets_s = [reset_s for reset_s in board.counter_resets_s if reset_s <= at_s]
        start_s, start_mj = (
            (max(resets_s) - behind_s, 0) if resets_s else (0.0, board.counter_start_mj)
        )
        at_s -= behind_s
        wave = board.counted or board.wave
        true_j = wave.energy_j(min(start_s, at_s), max(start_s, at_s))
        span_s = at_s - start_s
        signed_j = true_j if span_s >= 0 else -true_j
        seen_j = board.counter_gain * signed_j + board.counter_offset_w * span_s
        return max(0, int(start_mj + 1e3 * seen_j))

    def instant_w(self, t_ns: int, gpu: int = 0) -> float:
        """What the instant reading says at `t_ns`: one window before the last refresh."""
        return self._reading_w(t_ns, gpu, self.gpus[gpu].sensor.window_s)

    def average_w(self, t_ns: int, gpu: int = 0) -> float:
        """What the averaged reading says at `t_ns`."""
        return self._reading_w(t_ns, gpu, self.gpus[gpu].sensor.average_s)

    def _reading_w(self, t_ns: int, gpu: int, window_s: float) -> float:
        board = self.gpus[gpu]
        sensor = board.sensor
        at_s = sensor.last_refresh_s(self.since_epoch_s(t_ns), sensor.refresh_s) - sensor.delay_s
        shown_w = mean_w(board.wave, at_s - window_s, at_s)
        if sensor.smoothing_s:  # means of slices of a hundredth of the time constant
            slices = [(i * 0.01, (i + 1) * 0.01) for i in range(1200)]
            parts = [
                (math.exp(-new) - math.exp(-old))
                * mean_w(
                    board.wave, at_s - old * sensor.smoothing_s, at_s - new * sensor.smoothing_s
                )
                for new, old in slices
            ]
            shown_w = math.fsum(parts)
        return board.gain * shown_w + board.offset_w


@dataclass(frozen=True)
class NvmlSim:
    """A library on disk with its scenario beside it, and the truth about both."""

    library: Path
    scenario: Scenario

    @property
    def spec(self) -> str:
        return f"nvml:{self.library}"

    @property
    def env(self) -> dict[str, str]:
        """For a program that loads the library by its plain name."""
        return {
            "LD_LIBRARY_PATH": str(self.library.parent),
            "PEPR_SIM_NVML": f"{self.library}.scenario",
        }


BuildNvml = Callable[[Scenario], NvmlSim]
"""What the fixture `nvml_sim` is."""


def install(scenario: Scenario, folder: Path, cache: Path) -> NvmlSim:
    """Put a library of its own for `scenario` into `folder`. Raises native.UnavailableError."""
    # An older driver is the same code linked with fewer exports.
    code = native.build(
        cache,
        "nvml.o",
        ("nvml/nvml.cpp", "nvml/scenario.cpp"),
        # Unique symbols would be shared by the copies that one process loads.
        *("-r", "-nostdlib", "-fPIC", "-fno-gnu-unique"),
        *("-isystem", str(native.nvml_include())),
    )
    hidden = "".join(f" {name};" for name in sorted(scenario.absent))
    built = native.build(
        cache,
        "libnvidia-ml.so.1",
        (str(code),),
        *("-shared", "-pthread", "-Wl,-soname,libnvidia-ml.so.1"),
        exports=f"{{ global: nvml*; local:{hidden} *; }};\n",
    )
    library = folder.resolve() / "libnvidia-ml.so.1"
    shutil.copyfile(built, library)  # a copy: the loader takes one inode for one library
    Path(f"{library}.scenario").write_text(scenario.text())
    return NvmlSim(library, scenario)
