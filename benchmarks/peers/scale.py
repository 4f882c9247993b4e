"""What grows with what: cost by GPUs and channels, by processes followed, by hours of trace."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import compile_c, interleaved, product
from benchmarks.follow import follow_in_fresh_process
from benchmarks.peers.environments import OURS
from benchmarks.peers.hardware import machine
from benchmarks.peers.overhead import BARE_LOOP, boards, figures, looks, zones
from benchmarks.peers.report import Axis, Row, run_axis, verdict
from benchmarks.report import make_run, reported
from benchmarks.sampler import run_lane, run_loop

from sim import native  # isort: skip  hardware.py says where it lies

COUNTS = (1, 2, 4, 8, 16, 32, 64)
CHANNELS = 5  # of a simulated H100: energy, utilisation, memory, two powers
PROCESSES = (1, 30, 300, 2000)
WITHIN = 1.2


def lanes(axis: Axis) -> Iterator[Row]:
    """A lane over the boards, read without a pause: what is about the code, not about sleeping."""
    rounds, seconds = (3, 0.2) if axis.quick else (5, 0.3)
    counts = COUNTS[::3] if axis.quick else COUNTS
    measures: dict[str, Callable[[], float]] = {}
    with product() as bench:
        loop = compile_c(
            *("sampler_loop.c", bench.folder, "-DWITH_NVML"),
            *("-isystem", str(native.nvml_include())),
        )
        specs = {count: _library(bench.folder, count) for count in counts}
        for count, spec in specs.items():
            measures[f"lane {count}"] = lambda s=spec: (  # type: ignore[misc]
                run_lane(bench, s, 1, seconds).cpu_per_sample_s
            )
            measures[f"loop {count}"] = lambda s=spec: (  # type: ignore[misc]
                run_loop(loop, [s], 0, seconds).cpu_per_sample_s
            )
        found = interleaved(measures, rounds)
    for count in counts:
        scenario = f"{count} GPU{'s' * (count > 1)}, {CHANNELS * count} channels"
        times = 0.0
        for who, tool in (("loop", BARE_LOOP), ("lane", OURS)):
            each = [sample_s / (CHANNELS * count) for sample_s in found[f"{who} {count}"]]
            yield axis.row(scenario, tool, "CPU a channel and sample", "ns", **figures(each, 1e9))
            first = [sample_s / CHANNELS for sample_s in found[f"{who} {counts[0]}"]]
            ratios = [a / b for a, b in zip(each, first, strict=True)]
            against, times = f"{BARE_LOOP}: {times:.2f} x", statistics.median(ratios)
            facts: dict[str, Any] = {}
            if tool == OURS:
                facts = {
                    "verdict": verdict(times <= WITHIN),
                    "goal": f"CPU a channel and sample <= {WITHIN:g} x that of 1 GPU, to 64 GPUs",
                    "strain": times,
                    "against": against,
                }
            facts["note"] = f"goal {WITHIN:g}; the simulated driver is in it, as in the bare loop"
            metric = "CPU a channel, over that of 1 GPU"
            yield axis.row(scenario, tool, metric, "x", **figures(ratios), **facts)


def _library(folder: Path, count: int) -> str:
    """The spec of a simulated driver with so many boards."""
    from sim import nvml

    own = folder / f"gpus-{count}"
    own.mkdir()
    return nvml.install(nvml.Scenario(boards(count)), own, folder).spec


def tools_by_gpus(axis: Axis) -> Iterator[Row]:
    """The tools as a whole, asked for 10 samples a second."""
    tools = [tool for tool in axis.tools.values() if tool.tool.takes_rate]
    rounds, seconds = (2, 1.0) if axis.quick else (2, 1.5)
    for count in (1, 64):
        scenario = f"{count} GPU{'s' * (count > 1)}, 10 Hz"
        with machine(gpus=boards(count), zones=zones()) as hardware:
            found = looks(tools, hardware.env, 10.0, rounds=rounds, seconds=seconds)
        for name, why in found.failed.items():
            yield axis.row(scenario, name, "CPU of the whole tool", "s/h", note=why)
        for name, shares in found.share.items():
            sleeps_hz = found.sleeps_hz[name]
            slow = f"not at this rate: it slept {sleeps_hz:.1f} times a second"
            yield axis.row(
                *(scenario, name, "CPU of the whole tool", "s/h"),
                **figures(shares, 3600),
                note=slow if sleeps_hz < 8 else "",
            )
            peak = found.peak_bytes[name] / 1e6
            yield axis.row(scenario, name, "peak RSS", "MB", value=peak)


def processes(axis: Axis) -> Iterator[Row]:
    """The process lane at its own rate, attached to trees whose processes wake up once a second."""
    rounds, seconds = (1, 2.0) if axis.quick else (3, 3.0)
    with product() as bench:
        tree = compile_c("follow_tree.c", bench.folder)
        for count in PROCESSES[::3] if axis.quick else PROCESSES:
            uses = [
                follow_in_fresh_process(bench, tree, "attached", count, seconds)
                for _ in range(rounds)
            ]
            scenario = f"{count:,} process{'es' * (count > 1)}"
            shares = [use["core"] for use in uses]
            yield axis.row(scenario, OURS, "CPU to follow", "% of a core", **figures(shares, 100))


def hours(axis: Axis) -> Iterator[Row]:
    """The report of a made-up training: 1 kHz of RAPL and 8 GPUs, as the profiler stores them."""
    with product() as bench:
        for count in (0.5, 2.0) if axis.quick else (1.0, 4.0, 16.0):
            run = bench.folder / f"hours-{count:g}"
            make_run(run, hours=count)
            argv = [sys.executable, "-m", "pepr_profiler", "report", str(run)]
            scenario = f"{count:g} h of trace"
            size = sum(path.stat().st_size for path in run.glob("*.arrows"))
            yield axis.row(scenario, OURS, "the trace", "MB", value=size / 1e6)
            found = [
                reported([*argv, "--json", str(bench.folder / "summary.json")], bench.env)
                for _ in range(1 if axis.quick else 3)
            ]
            took = figures([seconds for seconds, _ in found])
            yield axis.row(scenario, OURS, "time of its report", "s", **took)
            peak = max(memory for _, memory in found)
            yield axis.row(scenario, OURS, "peak RSS of its report", "MB", value=peak / 1e6)


def measure(axis: Axis) -> Iterator[Row]:
    for part in (lanes, tools_by_gpus, processes, hours):
        begin_s = time.monotonic()
        yield from part(axis)
        print(f"  {part.__name__}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_axis("scale", measure, str(__doc__))
