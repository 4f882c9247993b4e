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
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from typing import Any

from benchmarks.common import ROOT, UnmeasurableError, compile_c, interleaved, product
from benchmarks.peers.environments import OURS, TOOLS_FOLDER, WRITTEN, Installed
from benchmarks.peers.hardware import Machine, machine
from benchmarks.peers.report import MISSED, REACHED, UNCLEAR, Axis, Row, run_axis, verdict
from benchmarks.peers.session import MARK, end, sessions
from benchmarks.sampler import back_to_back, beside_loop, run_loop
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
    WRITTEN: "pynvml",
}
"""What a program imports to use a tool."""

LEAST_SHARE, MOST_BARE = 5.0, 1.3
QUICKER = 7.0
BARE_LOOP, BARE_WAKES = "bare C loop", "bare wake-ups"
BARE_LOOPS = "bare C loops"
NOTHING = "no tool"
CATCH_UP_S = 0.4  # after it was stopped
RESOLVED = 1.0  # percent: half an interval at most, for a slowdown to be told
SLOWDOWN = {None: 0.2, 1000.0: 0.5}  # percent, by the rate that is asked for


def boards(count: int = 1) -> tuple[nvml.Gpu, ...]:
    # Whom the simulated driver finds computing, it seeks in /proc at each call: 200 µs a board.
    return tuple(nvml.Gpu(waves.Constant(300.0 + n), processes=()) for n in range(count))


def zones() -> tuple[powercap.Zone, ...]:
    """Two packages with memory: four counters.

    The power of one never rests: RAPL is then read as often as it ever is, while steady power would
    spare us reads.
    """
    restless = waves.Square(0.3, 60.0, 140.0)
    return (
        powercap.Zone("intel-rapl:0", "package-0", restless, start_uj=123_456_789_012),
        powercap.Zone("intel-rapl:0:0", "dram", waves.Constant(11.0), start_uj=23_456_789_012),
        powercap.Zone("intel-rapl:1", "package-1", waves.Constant(90.0), start_uj=113_456_789_012),
        powercap.Zone("intel-rapl:1:0", "dram", waves.Constant(9.0), start_uj=13_456_789_012),
    )


def figures(samples: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    """Median and quartiles, as a row has them."""
    if len(samples) < 2:
        return {"value": scale * samples[0]}
    low, value, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"value": scale * value, "low": scale * low, "high": scale * high}


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
        time.sleep(max(2.0, 6 / (rate_hz or 10)))  # what they do once, and learn in a few periods
        pids = {name: family(session.process.pid) for name, session in living.items()}
        for own in pids.values():
            signal_all(own, signal.SIGSTOP)
        try:
            measures = {name: partial(used_by, own, seconds) for name, own in pids.items()}
            found = interleaved(measures, rounds)
            memory = {name: peak_bytes(own) for name, own in pids.items()}
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
    time.sleep(CATCH_UP_S)
    before, begin_s = use_of(pids), time.monotonic()
    time.sleep(seconds)
    after, took_s = use_of(pids), time.monotonic() - begin_s
    signal_all(pids, signal.SIGSTOP)
    return Use((after.cpu_s - before.cpu_s) / took_s, (after.sleeps - before.sleeps) / took_s)


def sampler_loop(folder: Path) -> Path:
    nvml_h = native.nvml_include()
    return compile_c("sampler_loop.c", folder, "-DWITH_NVML", "-isystem", str(nvml_h))


def readings(axis: Axis) -> Iterator[Row]:
    """What a sample is, which no figure of CPU time tells."""
    for tool in axis.tools.values():
        if tool.tool.takes_rate:
            reads = tool.tool.reads
            told = {"of each GPU": reads.gpu, "of RAPL": reads.rapl, "besides": reads.besides}
            for scenario, words in told.items():
                value = words or "nothing"
                yield axis.row(scenario, tool.name, "what a sample reads", "", value=value)


def at_rates(axis: Axis, hardware: Machine) -> Iterator[Row]:
    """CPU and memory of the tools that can be asked for a rate; measured over seconds."""
    yield from readings(axis)
    tools = [tool for tool in axis.tools.values() if tool.tool.takes_rate]
    assert hardware.boards is not None and hardware.tree is not None
    loop = sampler_loop(Path(hardware.env["TMPDIR"]))
    zones = [str(hardware.tree.path(key) / "energy_uj") for key in hardware.tree.zones]
    for rate_hz in RATES_HZ:
        scenario = f"{rate_hz:g} Hz"
        # Whole periods, and of the slowest rate several: there what a tool does every 10 s while it
        # is not stopped is worth as much as its samples, and falls in half of an even number.
        rounds = 2 if axis.quick else 4 if rate_hz == min(RATES_HZ) else 3
        seconds = max(1.0 if axis.quick else 1.5, 5 / rate_hz - CATCH_UP_S)
        found = looks(tools, hardware.env, rate_hz, rounds=rounds, seconds=seconds)
        for name, why in found.failed.items():
            yield axis.row(scenario, name, "CPU", "s/h", note=why)
        keep_up = set()
        for name, shares in found.share.items():
            sleeps_hz = found.sleeps_hz[name]
            # Who samples, sleeps before each sample; one may fall beside what was looked at.
            kept = sleeps_hz >= max(0.8 * rate_hz - 1 / seconds, 0.1)
            keep_up |= {name} if kept else set()
            note = "" if kept else f"not at this rate: it slept {sleeps_hz:.1f} times a second"
            yield axis.row(scenario, name, "CPU", "s/h", **figures(shares, 3600), note=note)

        # What this machine takes of anybody who wakes up so often, with one thread, and reads.
        def share(reads: list[str], rate_hz: float = rate_hz, seconds: float = seconds) -> float:
            return run_loop(loop, reads, round(1e9 / rate_hz), seconds).cpu_per_sample_s * rate_hz

        all_reads = [hardware.boards.spec, *zones]
        bare = interleaved(
            {BARE_WAKES: lambda: share([]), BARE_LOOP: lambda: share(all_reads)},  # noqa: B023
            rounds,
        )
        for name, shares in bare.items():
            yield axis.row(scenario, name, "CPU", "s/h", **figures(shares, 3600))
        if OURS in found.share:
            least = statistics.median(bare[BARE_LOOP])
            yield from over_ours(axis, scenario, found, keep_up - {OURS}, least)
        peaks = {name: peak / 1e6 for name, peak in found.peak_bytes.items()}
        least, leanest = min(
            ((peak, name) for name, peak in peaks.items() if name != OURS), default=(0.0, "")
        )
        for name, peak in peaks.items():
            facts: dict[str, Any] = {}
            if name == OURS and leanest:
                facts = {
                    "verdict": verdict(peak < least),
                    "goal": "peak RSS below each peer's",
                    "strain": peak / least,
                    "against": f"{leanest}: {least:.1f} MB",
                }
            yield axis.row(scenario, name, "peak RSS", "MB", value=peak, **facts)


def over_ours(
    axis: Axis, scenario: str, found: Looks, peers: set[str], least: float
) -> Iterator[Row]:
    """CPU of each peer that keeps the rate over ours. The goal is about who reads what we read.

    `least` is what nobody can do with less: the same reads in C, and nothing done with them.
    """
    metric = "CPU, of a peer that keeps the rate over ours"
    for name in sorted(peers):
        pairs = zip(found.share[name], found.share[OURS], strict=True)
        ratios = figures([theirs / ours for theirs, ours in pairs])
        as_we = axis.tools[name].tool.reads.as_we
        note = "" if as_we else "it reads less than we: no goal"
        yield axis.row(scenario, name, metric, "x", **ratios, note=note)
    middle = {
        name: statistics.median(found.share[name])
        for name in peers
        if axis.tools[name].tool.reads.as_we
    }
    if middle:
        leanest = min(middle, key=lambda name: middle[name])
        ours = statistics.median(found.share[OURS])
        times = middle[leanest] / ours
        yield axis.row(
            *(scenario, OURS, metric, "x"),
            value=times,
            verdict=verdict(times >= LEAST_SHARE),
            note=f"the leanest that reads GPUs and RAPL is {leanest}; goal {LEAST_SHARE:g}",
            goal=f"CPU >= {LEAST_SHARE:g} x below every Python peer that reads the same sensors "
            "at the same rate",
            strain=1 / times,
            against=f"{leanest}: {3600 * middle[leanest]:.1f} s/h, ours {3600 * ours:.1f}; "
            f"{BARE_LOOP} {3600 * least:.1f}, that is {middle[leanest] / least:.1f} x",
        )


def against_bare_loop(axis: Axis, hardware: Machine) -> Iterator[Row]:
    """Our lanes beside the least that reads the same as often, pair by pair."""
    assert hardware.boards is not None and hardware.tree is not None
    pairs = 4 if axis.quick else 16
    files = [str(hardware.tree.path(key) / "energy_uj") for key in hardware.tree.zones]
    gpus = hardware.boards.spec
    sensors = {"RAPL": (hardware.tree.spec, files), "NVML": (gpus, [gpus])}
    with product() as bench:
        loop = sampler_loop(bench.folder)
        for rate in (1000, 100, 10, 0):
            seconds = {1000: 0.5, 100: 0.5, 10: 1.0, 0: 0.3}[rate]
            period_ns = 1_000_000_000 // rate if rate else 1
            if rate:
                wakes = [run_loop(loop, [], period_ns, seconds).cpu_per_sample_s for _ in range(3)]
            for name, (spec, reads) in sensors.items():
                scenario = f"{name}, {rate} Hz" if rate else f"{name}, without a pause"
                if rate:
                    found = beside_loop(
                        bench, spec, loop, reads, rate=rate, pairs=pairs, seconds=seconds
                    )
                else:
                    found = back_to_back(bench, spec, loop, reads, pairs=pairs, seconds=seconds)
                lanes, loops = ([each.cpu_per_sample_s for each in those] for those in found)
                ratios = [a / b for a, b in zip(lanes, loops, strict=True)]
                yield axis.row(scenario, OURS, "CPU a sample", "us", **figures(lanes, 1e6))
                yield axis.row(scenario, BARE_LOOP, "CPU a sample", "us", **figures(loops, 1e6))
                facts: dict[str, Any] = {}
                if rate:
                    bare = figures(wakes, 1e6)
                    yield axis.row(scenario, BARE_WAKES, "CPU a sample", "us", **bare)
                    times = statistics.median(ratios)
                    lane_us, loop_us = (1e6 * statistics.median(each) for each in (lanes, loops))
                    facts = {
                        "verdict": verdict(times <= MOST_BARE),
                        "goal": f"CPU a sample <= {MOST_BARE:g} x that of a bare C loop, "
                        "10 to 1,000 Hz",
                        "strain": times,
                        "against": f"{BARE_LOOP}: {loop_us:.1f} us, ours {lane_us:.1f}, "
                        f"{BARE_WAKES}: {bare['value']:.1f}",
                    }
                metric = "CPU a sample, over the bare C loop"
                yield axis.row(scenario, OURS, metric, "x", **figures(ratios), **facts)


# --- slowdown ------------------------------------------------------------------------------------


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Where the median lies, 95 %: percentiles of 4,000 resamples (Efron 1979)."""
    draws = random.Random(1)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[3899]


@dataclass(frozen=True)
class Way:
    """How a tool is beside the work: wrapped around it or in it, at a rate or by its defaults."""

    name: str
    rate_hz: float | None = None
    wrapper: tuple[str, ...] = ()


DEFAULT, FAST = Way("in code, default settings"), Way("in code, 1 kHz", 1000.0)


def ways(tool: Installed, scratch: Path) -> Iterator[Way]:
    yield DEFAULT
    if tool.tool.by_default:
        yield Way("in code, 10 Hz", 10.0)
    if tool.name == OURS:
        yield FAST
    # What runs beside a program shares no interpreter with it.
    wrapper = tool.wrapper(scratch)
    if wrapper is not None:
        yield Way("wrapped, default settings", None, tuple(wrapper))
    if wrapper is not None and tool.name == OURS:
        yield Way("wrapped, 1 kHz", 1000.0, (*wrapper[:-1], "--period", "1ms", wrapper[-1]))


def slowdown(axis: Axis, hardware: Machine) -> Iterator[Row]:
    """An epoch with the tool over one without it, in pairs that follow each other at once."""
    assert hardware.boards is not None and hardware.tree is not None
    scratch = Path(hardware.env["TMPDIR"])
    work = [str(TOOLS_FOLDER / "work.py"), "--threads", "1"]  # as examples/train.py has by itself
    try:
        for place in [str(ROOT / "examples"), *_packages_of_torch()]:
            work += ["--packages", place]
    except UnmeasurableError as error:
        yield axis.row("training", OURS, "slowdown", "%", note=str(error))
        return
    # Turns of one epoch: what is uncertain goes down with the number of pairs, and what the machine
    # does for some time is in both of a pair, the shorter the surer.
    work += ["--seconds", "0"]
    few, many = (16, 16) if axis.quick else (120, 480)
    # Without any tool, twice: who is told to be slower than that is not, here.
    beside: list[tuple[str, Way, str, list[str]]] = [(NOTHING, DEFAULT, sys.executable, [])]
    # And what the machine takes of the work for anybody's wake-ups and reads.
    driver = ["--driver", str(TOOLS_FOLDER / "use_bare_loops.py")]
    beside.append((BARE_LOOPS, FAST, sys.executable, driver))
    for tool in axis.tools.values():
        if not tool.tool.takes_rate:
            continue  # it does nothing between the edges of a window
        opened = ["--driver", tool.driver()[1]]
        for way in ways(tool, scratch):
            options = ["--wrapped"] if way.wrapper else opened
            beside.append((tool.name, way, tool.python, options))
    counters = [str(hardware.tree.path(key) / "energy_uj") for key in hardware.tree.zones]
    reads = ([hardware.boards.spec], counters)
    loops = [[str(sampler_loop(scratch)), "{period_ns}", "600", *each] for each in reads]
    env = {**hardware.env, "PEERS_LOOPS": json.dumps(loops)}
    controls: dict[tuple[str, float | None], str] = {}
    for name, way, python, options in beside:
        pairs = many if name in (OURS, BARE_LOOPS, NOTHING) else few
        command = [*way.wrapper, python, *work, *options, "--pairs", str(pairs)]
        command += ["--rate", str(way.rate_hz)] if way.rate_hz and not way.wrapper else []
        found = told(command, env)
        scenario = f"training, {way.name}"
        if "failed" in found:
            yield axis.row(scenario, name, "slowdown", "%", note=found["failed"])
            continue
        rows = list(slowdown_rows(axis, scenario, name, found["pairs"], way, controls))
        if name in (NOTHING, BARE_LOOPS):
            controls[name, way.rate_hz] = f"{name} {rows[0].value:+.2f} %"
        yield from rows


def slowdown_rows(
    axis: Axis,
    scenario: str,
    tool: str,
    pairs: Sequence[Sequence[float]],
    way: Way,
    controls: Mapping[tuple[str, float | None], str],
) -> Iterator[Row]:
    """The slowdown, then the tool's CPU time; `controls`: what was seen of none, at a rate."""
    ratios = [100 * (with_s / bare_s - 1) for bare_s, with_s, _ in pairs]
    low, high = interval(ratios)
    value = statistics.median(ratios)
    remark = axis.tools[tool].tool.by_default if tool in axis.tools and way == DEFAULT else ""
    note = f"95 % of the median of {len(pairs)} pairs: {low:+.2f} to {high:+.2f} %"
    facts: dict[str, Any] = {}
    if tool == OURS:
        most = SLOWDOWN[way.rate_hz]
        kept = high <= most or (value <= most and (low <= 0 or way.rate_hz is not None))
        told = UNCLEAR
        if low > most:
            told = MISSED
        elif kept and high - low <= 2 * RESOLVED:
            told = REACHED
        note += f"; goal {most:g} %"
        note += ", which this machine is too busy to tell" if told == UNCLEAR else ""
        settings = "at 1 kHz" if way.rate_hz else "at default settings"
        facts = {
            "verdict": told,
            "goal": f"training slowdown {settings} <= {most:g} %"
            + ("" if way.rate_hz else ", interval with 0"),
            "strain": value,
            "against": "; ".join(
                [
                    f"95 %: {low:+.2f} to {high:+.2f} %",
                    *(seen for (_, rate), seen in controls.items() if rate in (None, way.rate_hz)),
                ]
            ),
        }
    note += f"; {remark}" if remark else ""
    yield axis.row(
        *(scenario, tool, "slowdown", "%"), value=value, low=low, high=high, note=note, **facts
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
    mark = uuid.uuid4().hex
    with (
        TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env={**env, MARK: mark}, cwd=env["TMPDIR"], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        ender = Timer(patience_s, lambda: end(mark))
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
            end(mark)
        said.seek(0)
        return {"failed": f"status {process.returncode}: {' '.join(said.read().split())[-200:]}"}


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
            times = statistics.median(ratios)
            facts: dict[str, Any] = {}
            if not prefix_of:
                theirs_ms, ours_ms = (1e3 * statistics.median(added[n]) for n in (name, OURS))
                facts = {
                    "verdict": verdict(times >= QUICKER),
                    "goal": f"start-up >= {QUICKER:g} x below each peer that wraps commands",
                    "strain": 1 / times,
                    "against": f"{name}: {theirs_ms:.0f} ms, ours {ours_ms:.0f}",
                }
            beside, over = f"{scenario}, beside {name}", f"{metric}, of the peer over ours"
            yield axis.row(beside, OURS, over, "x", **figures(ratios), **facts)


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
        command = [tool.python, str(TOOLS_FOLDER / "work.py"), "--windows"]
        command += ["--driver", tool.driver()[1], "--seconds", "1" if axis.quick else "2"]
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
        for part in (start_up, imports, windows, at_rates, against_bare_loop, slowdown):
            begin_s = time.monotonic()
            yield from part(axis, hardware)
            print(f"  {part.__name__}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_axis("overhead", measure, str(__doc__))
