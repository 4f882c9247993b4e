"""Loads of known timing: processes that compute on all CPUs, or on each GPU, in bursts.

A load is a process of its own (`python -m pepr_profiler.check.load KIND`). It says "ready" when it
has loaded what it needs, reads the bursts to make from stdin, and says when they really were.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from pepr_profiler.record import Record
from pepr_profiler.units import NS_PER_S

TYPE_CHECKING = False  # as many processes as there are CPUs load this, and need no numpy
if TYPE_CHECKING:
    from pepr_profiler.check.response import Bursts

_SHORTEST_S, _LONGEST_S = 0.1, 0.7
"""How long a burst, and the pause after it, last: drawn anew each time, so that no refresh period
is in step with them, and short ones more often, so that there are many edges."""

_MOST_CPUS = 256
_ANSWER_S = 5.0

Schedule = Sequence[tuple[int, int]]
"""Begins and ends of bursts, CLOCK_MONOTONIC in ns."""


def cpus_for_us(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many CPUs this process may use: by its affinity, and by its container's quota."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return count


def schedule(begin_ns: int, seconds: float, seed: int = 17) -> list[tuple[int, int]]:
    """Bursts from `begin_ns` on, for so long."""
    draw, bursts, at_s = random.Random(seed), [], 0.0
    while at_s < seconds - _SHORTEST_S:
        on_s, off_s = (_SHORTEST_S * (_LONGEST_S / _SHORTEST_S) ** draw.random() for _ in range(2))
        end_s = min(at_s + on_s, seconds)
        bursts.append((begin_ns + int(at_s * NS_PER_S), begin_ns + int(end_s * NS_PER_S)))
        at_s += on_s + off_s
    return bursts


class Ran(Record):
    """What a load did: its bursts, by which processes, and the CPU time that these took.

    `cpu_part` is the part of the CPUs' time that it got in its bursts. `problem` says why it did
    not run. `gpus` are the UUIDs of the GPUs on which it ran; None if it does not know them.
    """

    bursts: Bursts
    pids: tuple[int, ...] = ()
    cpu_s: float = 0.0
    cpu_part: float | None = None
    problem: str = ""
    by: str = ""
    gpus: frozenset[str] | None = None

    def seen_by(self, uuid: str, *, divided: bool = False) -> Ran:
        """What it did as far as this GPU is concerned; `divided`: CUDA knows its instances only."""
        if divided:
            return self._replace(gpus=None)
        if self.problem or self.gpus is None or uuid in self.gpus:
            return self
        return Ran(no_bursts(), problem="this GPU is hidden from it", by=self.by)


def no_bursts() -> Bursts:
    """Of a load that did not run."""
    import numpy as np

    from pepr_profiler.check.response import Bursts

    nothing = np.zeros(0)
    return Bursts(nothing, nothing, nothing)


class LoadMaker(Protocol):
    """Something that can load a device in bursts."""

    def prepare(self) -> None:
        """Begins to load what it needs, without waiting for it."""

    def problem(self, within_s: float) -> str:
        """Waits until it is ready; why it cannot run, if it is not."""

    def begin(self, bursts: Schedule) -> None:
        """Starts the bursts, without waiting for them."""

    def finish(self) -> Ran:
        """What it did, after the last burst."""

    def stop(self) -> None:
        """Ends its processes."""


class ProcessLoad:
    """A load made by processes of this program: "cpu", one for each CPU, or "gpu", one for all."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        count = min(cpus_for_us(), _MOST_CPUS) if kind == "cpu" else 1
        self._numbers = range(count)
        self._processes: list[subprocess.Popen[str]] = []
        self._library = ""

    def prepare(self) -> None:
        if self._kind == "gpu":
            self._library = next((n for n in ("torch", "cupy") if find_spec(n)), "")
            if not self._library:
                return
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        program = [sys.executable, "-m", "pepr_profiler.check.load"]
        for _ in self._numbers:
            process = subprocess.Popen(
                [*program, self._library or "cpu"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            self._processes.append(process)

    def problem(self, within_s: float) -> str:
        if not self._processes:
            return "neither torch nor cupy is installed"
        deadline = time.monotonic() + within_s
        for process in self._processes:
            line = _line_of(process, deadline)
            if line != "ready\n":
                who = self._library or "a process"
                return _without_paths(line) or f"{who} was not ready within {within_s:.0f} s"
        return ""

    def begin(self, bursts: Schedule) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # `finish` sees that it is gone
                process.stdin.write(json.dumps(bursts) + "\n")
                process.stdin.flush()

    def finish(self) -> Ran:
        import numpy as np

        from pepr_profiler.check.response import Bursts

        deadline = time.monotonic() + _ANSWER_S
        done = []
        for process in self._processes:
            try:
                done.append(json.loads(_line_of(process, deadline)))
            except ValueError:
                continue
        pids = tuple(process.pid for process in self._processes)
        by = self._library or f"{len(self._processes)} processes of Python"
        if len(done) < len(self._processes):
            return Ran(no_bursts(), pids, problem="its processes ended early", by=by)
        if problem := next((d["problem"] for d in done if d["problem"]), ""):
            return Ran(no_bursts(), pids, problem=_without_paths(problem), by=by)
        times = np.array([d["bursts"] for d in done]) / NS_PER_S  # (processes, bursts, 2)
        begin_s, end_s = times.mean(axis=0).T
        cpu_s = np.array([d["cpu_s"] for d in done]).sum(axis=0)
        level = np.ones(len(begin_s))
        part = None
        if self._kind == "cpu":
            level = np.minimum(cpu_s / (len(done) * (end_s - begin_s)), 1.0)
            part = float(cpu_s.sum() / (len(done) * (end_s - begin_s).sum()))
        uuids = [uuid for d in done for uuid in d["gpus"]]
        gpus = frozenset(uuids) if uuids and all(uuids) else None
        return Ran(Bursts(begin_s, end_s, level), pids, float(cpu_s.sum()), part, "", by, gpus)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        self._processes.clear()


def _without_paths(text: str) -> str:
    """An error's text as it may be sent: paths often contain a user's name."""
    return re.sub(r"(/[^\s:'\"]+)+", "…", text.strip())


def _line_of(process: subprocess.Popen[str], deadline: float) -> str:
    """The next line that the process writes; empty if none comes in time."""
    assert process.stdout is not None
    left_s = max(0.0, deadline - time.monotonic())
    if not select.select([process.stdout], [], [], left_s)[0]:
        return ""
    return process.stdout.readline()


# --- inside the processes that make the load ------------------------------------------------------


def _main(kind: str) -> None:
    """Announces itself, makes the bursts that it reads, and reports when they were."""
    try:
        compute, gpus = {"cpu": _cpu, "torch": _torch, "cupy": _cupy}[kind]()
    except Exception as error:  # a driver or a library that is broken may raise anything
        _say(f"{kind}: {error}".splitlines()[0])
        return
    _say("ready")
    text = sys.stdin.readline()
    if not text:
        return
    made, cpu_s, problem = [], [], ""
    parent = os.getppid()
    try:
        for begin_ns, end_ns in json.loads(text):
            if os.getppid() != parent:  # who started us is gone
                return
            time.sleep(max(0, begin_ns - time.monotonic_ns()) * 1e-9)
            first_ns, before_s = time.monotonic_ns(), time.process_time()
            while time.monotonic_ns() < end_ns:
                compute()
            made.append((first_ns, time.monotonic_ns()))
            cpu_s.append(time.process_time() - before_s)
    except Exception as error:
        problem = f"{kind}: {error}".splitlines()[0]
    _say(json.dumps({"bursts": made, "cpu_s": cpu_s, "problem": problem, "gpus": gpus}))


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


_Work = tuple[Callable[[], object], list[str]]
"""What computes for a moment, and the UUIDs of the GPUs that it loads, "" for unknown ones."""


def _cpu() -> _Work:
    return lambda: sum(i * i for i in range(2000)), []


_MATRIX = 4096
_BATCH_S = 0.005
"""A batch of multiplications lasts so long: that sharp the end of a burst is."""


def _torch() -> _Work:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("it sees no GPU")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    pairs = [torch.randn((2, _MATRIX, _MATRIX), device=d, dtype=torch.float32) for d in devices]
    out = [torch.empty((_MATRIX, _MATRIX), device=d, dtype=torch.float32) for d in devices]

    def batch(times: int) -> None:
        for _ in range(times):
            for (a, b), c in zip(pairs, out, strict=True):
                torch.matmul(a, b, out=c)
        for device in devices:
            torch.cuda.synchronize(device)

    # torch has UUIDs since 2.4, and writes them without NVIDIA's "GPU-".
    uuids = [getattr(torch.cuda.get_device_properties(d), "uuid", "") for d in devices]
    return _timed(batch), [uuid and f"GPU-{uuid}" for uuid in uuids]


def _cupy() -> _Work:
    import cupy  # type: ignore[import-not-found]

    devices = [cupy.cuda.Device(i) for i in range(cupy.cuda.runtime.getDeviceCount())]
    pairs: list[Any] = []
    for device in devices:
        with device:
            pairs.append(cupy.random.rand(2, _MATRIX, _MATRIX, dtype=cupy.float32))

    def batch(times: int) -> None:
        for device, pair in zip(devices, pairs, strict=True):
            with device:
                for _ in range(times):
                    cupy.matmul(pair[0], pair[1])
        for device in devices:
            device.synchronize()

    properties = [cupy.cuda.runtime.getDeviceProperties(device.id) for device in devices]
    uuids = [each["uuid"] for each in properties if "uuid" in each]
    return _timed(batch), [f"GPU-{UUID(bytes=uuid)}" for uuid in uuids]


def _timed(batch: Callable[[int], None]) -> Callable[[], object]:
    """A batch that lasts some `_BATCH_S`; the first calls compile and are not timed."""
    batch(1)
    begin_s = time.perf_counter()
    batch(3)
    each_s = (time.perf_counter() - begin_s) / 3
    times = max(1, round(_BATCH_S / max(each_s, 1e-6)))
    return lambda: batch(times)


if __name__ == "__main__":
    _main(sys.argv[1])
