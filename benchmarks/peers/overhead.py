"""What it costs to be profiled: CPU and memory at a rate, slowdown, start-up, import, windows."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from typing import Any

from benchmarks.common import ROOT, UnmeasurableError, compile_c, interleaved, product
from benchmarks.peers.environments import OURS, TOOLS_FOLDER, Installed
from benchmarks.peers.hardware import Machine, machine
from benchmarks.peers.report import Axis, Row, run_axis
from benchmarks.peers.session import sessions
from benchmarks.sampler import run_lane, run_loop
from benchmarks.startup import start_s, wall_s

from sim import native, nvml, powercap, waves  # isort: skip  hardware.py says where it lies

RATES_HZ = (1.0, 10.0, 100.0, 1000.0)
MODULES = {
    OURS: "pepr_profiler",
    "zeus": "zeus.monitor",
    "codecarbon": "codecarbon",
    "carbontracker": "carbontracker.tracker",
    "nvitop": "nvitop",
    "pyjoules": "pyJoules.energy_meter",
    "pynvml-loop": "pynvml",
}
"""What a program imports to use a tool."""

LEAST_SHARE, MOST_BARE = 5.0, 1.3
QUICKER = 7.0
NOTHING = "no tool"
RESOLVED = 1.0  # percent: half an interval at most, for a slowdown to be told
SLOWDOWN = {None: 0.2, 1000.0: 0.5}  # percent, by the rate that is asked for


def boards(count: int = 1) -> tuple[nvml.Gpu, ...]:
    return tuple(nvml.Gpu(waves.Constant(300.0 + n)) for n in range(count))


def zones() -> tuple[powercap.Zone, ...]:
    """Two packages with memory: four counters."""
    return (
        powercap.Zone("intel-rapl:0", "package-0", waves.Constant(100.0), start_uj=123_456_789_012),
        powercap.Zone("intel-rapl:0:0", "dram", waves.Constant(11.0), start_uj=23_456_789_012),
        powercap.Zone("intel-rapl:1", "package-1", waves.Constant(90.0), start_uj=113_456_789_012),
        powercap.Zone("intel-rapl:1:0", "dram", waves.Constant(9.0), start_uj=13_456_789_012),
    )


def figures(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median and quartiles, as a row has them."""
    if len(samples) < 2:
        return {"value": scale * samples[0]}
    low, value, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"value": scale * value, "low": scale * low, "high": scale * high}


def verdict(met: bool) -> str:
    return "reached" if met else "MISSED"


# --- CPU and memory at a rate --------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """What a process and all that it started had used: CPU time, times that it went to sleep."""

    cpu_s: float
    sleeps: float


def family(pid: int) -> list[int]:
    """A process and its descendants that live."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):  # it has ended
            for thread in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def use_of(pids: Sequence[int]) -> Use:
    """To the nanosecond, ended threads too; of processes that ended, ticks."""
    cpu_s, sleeps = 0.0, 0
    for pid in pids:
        with contextlib.suppress(OSError):
            cpu_s += time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid() names it
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu_s += (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
            for thread in Path(f"/proc/{pid}/task").iterdir():
                status = (thread / "status").read_text()
                sleeps += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return Use(cpu_s, sleeps)


def peak_bytes(pids: Sequence[int]) -> int:
    """Of the largest of them: what they share would count more than once in a sum."""
    peaks = []
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{pid}/status").read_text()
            peaks.append(int(status.partition("\nVmHWM:")[2].split()[0]) * 1024)
    return max(peaks, default=0)


def signal_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(frozen=True)
class Looks:
    """What tools used that were open side by side, each while the others were stopped."""

    share: dict[str, list[float]]  # CPU seconds a second
    sleeps_hz: dict[str, float]
    peak_bytes: dict[str, int]
    failed: dict[str, str]


def looks(
    tools: Sequence[Installed],
    env: Mapping[str, str],
    rate_hz: float | None,
    *,
    rounds: int,
    seconds: float,
) -> Looks:
    """Each in turn, several times, from a window's begin on."""
    with sessions(tools, env, rate_hz=rate_hz) as opened:
        living = {s.name: s for s in opened if s.failed is None}
        for session in living.values():
            session.begin("work")
        time.sleep(2.0)  # what they do once
        pids = {name: family(session.process.pid) for name, session in living.items()}
        memory = {name: peak_bytes(own) for name, own in pids.items()}
        for own in pids.values():
            signal_all(own, signal.SIGSTOP)
        try:
            measures = {name: lambda p=own: used_by(p, seconds) for name, own in pids.items()}
            found = interleaved(measures, rounds)
        finally:
            for own in pids.values():  # zeus leaves its own behind
                signal_all(own, signal.SIGKILL)
    sleeps = {name: statistics.median(x.sleeps for x in uses) for name, uses in found.items()}
    return Looks(
        {name: [use.cpu_s for use in uses] for name, uses in found.items()},
        sleeps,
        memory,
        {s.name: s.failed for s in opened if s.failed is not None},
    )


def used_by(pids: Sequence[int], seconds: float) -> Use:
    """What a tool uses a second, that goes on meanwhile and is stopped before and after."""
    signal_all(pids, signal.SIGCONT)
    time.sleep(0.4)  # it may catch up
    before, begin_s = use_of(pids), time.monotonic()
    time.sleep(seconds)
    after, took_s = use_of(pids), time.monotonic() - begin_s
    signal_all(pids, signal.SIGSTOP)
    return Use((after.cpu_s - before.cpu_s) / took_s, (after.sleeps - before.sleeps) / took_s)


def at_rates(axis: Axis, hardware: Machine) -> Iterator[Row]:
    """CPU and memory of the tools that can be asked for a rate; measured over seconds."""
    tools = [tool for tool in axis.tools.values() if tool.tool.takes_rate]
    rounds, seconds = (2, 1.0) if axis.quick else (3, 1.5)
    for rate_hz in RATES_HZ:
        scenario = f"{rate_hz:g} Hz"
        found = looks(tools, hardware.env, rate_hz, rounds=rounds, seconds=seconds)
        for name, why in found.failed.items():
            yield axis.row(scenario, name, "CPU", "s/h", note=why)
        keep_up = set()
        for name, shares in found.share.items():
            sleeps_hz = found.sleeps_hz[name]
            # Who samples, sleeps before each sample; one may fall beside what was looked at.
            kept = sleeps_hz >= 0.8 * rate_hz - 1 / seconds
            keep_up |= {name} if kept else set()
            note = "" if kept else f"not at this rate: it slept {sleeps_hz:.1f} times a second"
            yield axis.row(scenario, name, "CPU", "s/h", **figures(shares, 3600), note=note)
        if OURS not in found.share:
            continue
        for name in keep_up - {OURS}:
            pairs = zip(found.share[name], found.share[OURS], strict=True)
            yield axis.row(
                *(scenario, name, "CPU, of a peer that keeps the rate over ours", "x"),
                **figures([theirs / ours for theirs, ours in pairs]),
            )
        middle = {name: statistics.median(found.share[name]) for name in keep_up | {OURS}}
        if len(middle) > 1:
            leanest = min(middle.keys() - {OURS}, key=lambda name: middle[name])
            times = middle[leanest] / middle[OURS]
            yield axis.row(
                *(scenario, OURS, "CPU, of a peer that keeps the rate over ours", "x"),
                value=times,
                verdict=verdict(times >= LEAST_SHARE),
                note=f"the leanest of them is {leanest}; goal {LEAST_SHARE:g}; ours follows the "
                "job's processes ten times a second besides, and writes all to disk",
            )
        least = min((m for n, m in found.peak_bytes.items() if n != OURS), default=None)
        for name, peak in found.peak_bytes.items():
            met = verdict(peak < least) if name == OURS and least is not None else ""
            yield axis.row(scenario, name, "peak RSS", "MB", value=peak / 1e6, verdict=met)


def against_bare_loop(axis: Axis, hardware: Machine) -> Iterator[Row]:
    """Our lanes beside the least that reads the same at the same instants, pair by pair."""
    assert hardware.boards is not None and hardware.tree is not None
    pairs = 3 if axis.quick else 7
    files = [str(hardware.tree.path(key) / "energy_uj") for key in hardware.tree.zones]
    gpus = hardware.boards.spec
    sensors = {"RAPL": (hardware.tree.spec, files), "NVML": (gpus, [gpus])}
    with product() as bench:
        loop = compile_c(
            *("sampler_loop.c", bench.folder, "-DWITH_NVML"),
            *("-isystem", str(native.nvml_include())),
        )
        for rate in (1000, 100, 10, 0):
            seconds = {1000: 1.0, 100: 1.0, 10: 2.0, 0: 0.3}[rate]
            for name, (spec, reads) in sensors.items():
                period_ns = 1_000_000_000 // rate if rate else 0
                measures: dict[str, Callable[[], float]] = {
                    "lane": lambda s=spec, p=period_ns, t=seconds: (  # type: ignore[misc]
                        run_lane(bench, s, max(1, p), t).cpu_per_sample_s
                    ),
                    "loop": lambda r=reads, p=period_ns, t=seconds: (  # type: ignore[misc]
                        run_loop(loop, r, p, t).cpu_per_sample_s
                    ),
                }
                found = interleaved(measures, pairs)
                ratios = [a / b for a, b in zip(found["lane"], found["loop"], strict=True)]
                scenario = f"{name}, {rate} Hz" if rate else f"{name}, without a pause"
                lane = figures(found["lane"], 1e6)
                bare = figures(found["loop"], 1e6)
                yield axis.row(scenario, OURS, "CPU a sample", "us", **lane)
                yield axis.row(scenario, "bare C loop", "CPU a sample", "us", **bare)
                met = statistics.median(ratios) <= MOST_BARE
                yield axis.row(
                    *(scenario, OURS, "CPU a sample, over the bare C loop", "x"),
                    **figures(ratios),
                    verdict=verdict(met) if rate else "",
                )


# --- slowdown ------------------------------------------------------------------------------------


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Where the median lies, 95 %: percentiles of 4,000 resamples (Efron 1979)."""
    draws = random.Random(1)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[3899]


def slowdown(axis: Axis, hardware: Machine, kind: str) -> Iterator[Row]:
    """A piece of work with the tool over without it, in pairs that follow each other at once."""
    packages = [str(ROOT / "examples"), *_packages_of_torch()] if kind == "training" else []
    pairs, seconds = (4, 0.5) if axis.quick else (12, 0.4)
    work = [str(TOOLS_FOLDER / "work.py"), kind, "--seconds", str(seconds)]
    for place in packages:
        work += ["--packages", place]
    # Without any tool, twice: who is told to be slower than that is not, here.
    found = told([sys.executable, *work, "--pairs", str(pairs)], hardware.env)
    if "pairs" in found:
        nothing = f"{kind}, in code, default settings"
        yield from slowdown_rows(axis, nothing, NOTHING, found["pairs"], None)
    ours: list[tuple[str, float | None, list[str] | None]] = [
        ("in code, default settings", None, None),
        ("in code, 1 kHz", 1000.0, None),
    ]
    for tool in axis.tools.values():
        if not tool.tool.takes_rate:
            continue  # it does nothing between the edges of a window
        ways = ours if tool.name == OURS else ours[:1]
        # What runs beside a program shares no interpreter with it.
        wrapper = tool.wrapper(Path(hardware.env["TMPDIR"])) if kind == "training" else None
        if wrapper is not None:
            ways = [*ways, ("wrapped, default settings", None, wrapper)]
        if wrapper is not None and tool.name == OURS:
            fast = [*wrapper[:-1], "--period", "1ms", wrapper[-1]]
            ways = [*ways, ("wrapped, 1 kHz", 1000.0, fast)]
        for how, rate_hz, prefix in ways:
            count = pairs if tool.name == OURS else max(4, pairs // 2)
            command = [tool.python, *work, "--pairs", str(count)]
            if prefix is not None:
                command = [*prefix, *command, "--wrapped"]
            else:
                command += [
                    "--driver",
                    tool.driver()[1],
                    "--import",
                    MODULES.get(tool.name, "json"),
                ]
                command += ["--rate", str(rate_hz)] if rate_hz else []
            found = told(command, hardware.env)
            scenario = f"{kind}, {how}"
            if "failed" in found:
                yield axis.row(scenario, tool.name, "slowdown", "%", note=found["failed"])
                continue
            yield from slowdown_rows(axis, scenario, tool.name, found["pairs"], rate_hz)


def slowdown_rows(
    axis: Axis,
    scenario: str,
    tool: str,
    pairs: Sequence[Sequence[float]],
    rate_hz: float | None,
) -> Iterator[Row]:
    ratios = [100 * (with_s / bare_s - 1) for bare_s, with_s, _ in pairs]
    low, high = interval(ratios)
    value = statistics.median(ratios)
    goal = SLOWDOWN[rate_hz]
    # A wide interval that holds the goal shows nothing; one above it is a miss, however wide.
    shown = tool == OURS and (high - low <= 2 * RESOLVED or low > goal)
    met = (value <= goal and low <= 0) or high <= goal
    note = f"95 % of the median of {len(pairs)} pairs: {low:+.2f} to {high:+.2f} %"
    if tool == OURS:
        note += f"; goal {goal:g} %"
        note += "" if shown else ", which this machine is too busy to tell"
    yield axis.row(
        *(scenario, tool, "slowdown", "%"),
        value=value,
        low=low,
        high=high,
        verdict=verdict(met) if shown else "",
        note=note,
    )
    shares = [100 * share for _, _, share in pairs]
    yield axis.row(scenario, tool, "CPU beside the work", "% of a core", **figures(shares))


def _packages_of_torch() -> list[str]:
    """Where a training finds torch and its data: beside this Python's own."""
    import importlib.util

    places = []
    for name in ("torch", "sklearn"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise UnmeasurableError(
                f"no {name} to train with; pip install torch==2.13.0 '.[examples]'"
            )
        places.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(places))


def told(
    command: Sequence[str], env: Mapping[str, str], patience_s: float = 240.0
) -> dict[str, Any]:
    """The JSON line that work.py prints, or {"failed": why}; nothing of it is left running."""
    with (
        TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env=dict(env), cwd=env["TMPDIR"], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        ender = Timer(patience_s, lambda: signal_group(process.pid))
        ender.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    found = json.loads(line)
                    if isinstance(found, dict) and found.keys() & {"pairs", "window_s", "failed"}:
                        return found
            process.wait()
        finally:
            ender.cancel()
            signal_group(process.pid)
        said.seek(0)
        return {"failed": f"status {process.returncode}: {' '.join(said.read().split())[-200:]}"}


def signal_group(pid: int) -> None:
    """Ends a session's processes: some tools leave their own behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


# --- start-up, import, windows -------------------------------------------------------------------


def start_up(axis: Axis, hardware: Machine) -> Iterator[Row]:
    """What wrapping `true` adds, and how much later a program begins."""
    env, folder = dict(hardware.env), Path(hardware.env["TMPDIR"])
    stamp = compile_c("stamp.c", folder)
    measures: dict[str, Callable[[], float]] = {
        "bare": lambda: wall_s(["true"], env, folder),
        "start bare": lambda: start_s([], stamp, env, folder),
    }
    names = []
    for tool in axis.tools.values():
        prefix = tool.wrapper(folder)
        if prefix is None:
            why = f"no such mode: {tool.tool.lacks}"
            yield axis.row("-- true", tool.name, "start-up", "ms", note=why)
            continue
        try:
            wall_s([*prefix, "true"], env, folder)  # bytecode is written
        except UnmeasurableError as error:
            yield axis.row("-- true", tool.name, "start-up", "ms", note=str(error))
            continue
        names.append(tool.name)
        measures[tool.name] = lambda p=prefix: wall_s([*p, "true"], env, folder)  # type: ignore[misc]
        measures[f"start {tool.name}"] = lambda p=prefix: start_s(p, stamp, env, folder)  # type: ignore[misc]
    found = interleaved(measures, 3 if axis.quick else 5)
    for metric, prefix_of, scenario in (
        ("start-up", "", "-- true"),
        ("delay of the program's start", "start ", "-- program"),
    ):
        bare = found[f"{prefix_of}bare"]
        added = {
            name: [a - b for a, b in zip(found[f"{prefix_of}{name}"], bare, strict=True)]
            for name in names
        }
        for name, samples in added.items():
            yield axis.row(scenario, name, metric, "ms", **figures(samples, 1e3))
        for name in added.keys() & {"codecarbon", "carbontracker"} if OURS in added else ():
            ratios = [a / b for a, b in zip(added[name], added[OURS], strict=True)]
            yield axis.row(
                *(f"{scenario}, beside {name}", OURS, f"{metric}, of the peer over ours", "x"),
                **figures(ratios),
                verdict=verdict(statistics.median(ratios) >= QUICKER) if not prefix_of else "",
                note=f"goal {QUICKER:g}" if not prefix_of else "",
            )


def imports(axis: Axis, hardware: Machine) -> Iterator[Row]:
    env, folder = dict(hardware.env), Path(hardware.env["TMPDIR"])
    for tool in axis.tools.values():
        if tool.name not in MODULES:
            continue
        try:
            found = interleaved(
                {
                    "bare": lambda t=tool: wall_s([t.python, "-c", "pass"], env, folder),  # type: ignore[misc]
                    "import": lambda t=tool: wall_s(  # type: ignore[misc]
                        [t.python, "-c", f"import {MODULES[t.name]}"], env, folder
                    ),
                },
                3 if axis.quick else 5,
            )
        except UnmeasurableError as error:
            yield axis.row("over bare python", tool.name, "import", "ms", note=str(error))
            continue
        added = [a - b for a, b in zip(found["import"], found["bare"], strict=True)]
        yield axis.row("over bare python", tool.name, "import", "ms", **figures(added, 1e3))


def windows(axis: Axis, hardware: Machine) -> Iterator[Row]:
    """Begin and end of a window, of an epoch or a task, with nothing between them."""
    for tool in axis.tools.values():
        command = [tool.python, str(TOOLS_FOLDER / "work.py"), "loop", "--windows"]
        command += ["--driver", tool.driver()[1], "--seconds", "1" if axis.quick else "3"]
        found = told(command, hardware.env, 60.0)
        if "failed" in found:
            yield axis.row("window", tool.name, "a window", "us", note=found["failed"])
            continue
        yield axis.row("window", tool.name, "a window", "us", **figures(found["window_s"], 1e6))
        if found["phase_s"]:
            phases = figures(found["phase_s"], 1e6)
            yield axis.row("phase", tool.name, "a window", "us", **phases)


def measure(axis: Axis) -> Iterator[Row]:
    with machine(gpus=boards(), zones=zones()) as hardware:
        for part in (start_up, imports, windows, at_rates, against_bare_loop):
            begin_s = time.monotonic()
            yield from part(axis, hardware)
            print(f"  {part.__name__}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr)
        for kind in ("loop", "training"):
            begin_s = time.monotonic()
            try:
                yield from slowdown(axis, hardware, kind)
            except UnmeasurableError as error:
                yield axis.row(kind, OURS, "slowdown", "%", note=str(error))
            print(f"  {kind}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_axis("overhead", measure, str(__doc__))
