"""What a phase, a logged metric and a look at the energy cost the program that asks for them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Product,
    Spread,
    header,
    judge,
    main,
    percentile,
    powercap_tree,
    product,
    run,
    show,
)

NS_PER_US = 1e-3


def timed_ns(action: Callable[[], object], count: int) -> list[int]:
    """Each call's duration, the clock's own 50 ns or so included."""
    clock = time.perf_counter_ns
    times_ns = []
    for _ in range(count):
        begin_ns = clock()
        action()
        times_ns.append(clock() - begin_ns)
    return times_ns


def work(spec: str, count: int, seconds: float) -> dict[str, Any]:
    """Times energy_j inside a `profile()` block, when `seconds` are recorded, then marks."""
    from pepr_profiler import profile

    def mark() -> None:
        with block.phase("train"):
            pass

    def log() -> None:
        block.log(accuracy=0.91, epoch=3)

    with profile("marks", sensors=[spec], period_s=0.001) as block:
        time.sleep(seconds)
        energy_ns = timed_ns(lambda: block.energy_j, 11)[1:]
        timed_ns(mark, 100)
        timed_ns(log, 100)
        phase_ns, log_ns = timed_ns(mark, count), timed_ns(log, count)
        floor_ns = _plain_writes_ns(block.directory, count)
        many_ns = timed_ns(lambda: block.energy_j, 6)[1:]
        joined = block.joined
    return {
        "joined": joined,
        "phase": _reduced(phase_ns),
        "log": _reduced(log_ns),
        "floor": _reduced(floor_ns),
        "energy": Spread.of(energy_ns).median,
        "energy after marks": Spread.of(many_ns).median,
    }


def _plain_writes_ns(folder: Path, count: int) -> list[int]:
    """Two bare appends of a mark's length: what being durable against kill -9 costs by itself."""
    line = b'{"event":"begin","t_ns":1234567890123456,"id":12345,"parent":1,"name":"train"}\n'
    path = folder / "floor.bin"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def two() -> None:
        os.write(fd, line)
        os.write(fd, line)

    times_ns = timed_ns(two, count)
    os.close(fd)
    path.unlink()
    return times_ns


def _reduced(times_ns: list[int]) -> list[float]:
    return [percentile(times_ns, 0.5), percentile(times_ns, 0.99)]


def measure_both(
    bench: Product, spec: str, *, count: int, seconds: float, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """An own run and a joined one in turn, each in a process of its own."""
    asked = ["--work", spec, "--count", str(count), "--seconds", str(seconds)]
    found: dict[str, list[dict[str, Any]]] = {"own": [], "joined": []}
    wrapper = bench.command("--quiet", "--sensor", spec, "--period", "1ms")
    for _ in range(rounds):
        for kind, prefix in (("own", []), ("joined", wrapper)):
            argv = [*prefix, *bench.module("marks", *asked)]
            result = json.loads(run(argv, bench.env))
            assert result["joined"] == (kind == "joined")
            found[kind].append(result)
    return found


def by_command(count: int) -> dict[str, list[float]]:
    """How long `pepr-profile mark` takes, and how much later than its call its time is."""
    from pepr_profiler.trace.events import read_events
    from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

    calls_ns, took_ns = [], []
    for _ in range(count):
        calls_ns.append(time.monotonic_ns())
        subprocess.run([sys.executable, "-m", "pepr_profiler", "mark", "step"], check=True)
        took_ns.append(time.monotonic_ns() - calls_ns[-1])
    phases = read_events(Path(os.environ[RUN_DIR_VARIABLE])).phases
    late_ns = [p.begin_ns - called_ns for p, called_ns in zip(phases, calls_ns, strict=True)]
    return {"took": _reduced(took_ns), "late": _reduced(late_ns)}


def report(kind: str, found: list[dict[str, Any]], *, count: int, seconds: float) -> None:
    def over(name: str, index: int) -> Spread:
        return Spread.of([result[name][index] for result in found])

    print(f"  in {'a joined run' if kind == 'joined' else 'a run of its own'}:")
    judge("run.phase() enter + exit, median", over("phase", 0), "us", scale=NS_PER_US, most=15)
    show("run.phase() enter + exit, p99", over("phase", 1), "us", scale=NS_PER_US)
    judge("run.log(accuracy=, epoch=), median", over("log", 0), "us", scale=NS_PER_US, most=20)
    show("run.log(accuracy=, epoch=), p99", over("log", 1), "us", scale=NS_PER_US)
    show("two bare os.write of that length, median", over("floor", 0), "us", scale=NS_PER_US)
    rows = round(1000 * seconds)
    energy = Spread.of([result["energy"] for result in found])
    show(f"run.energy_j after {rows} rows a lane", energy, "ms", scale=1e-6)
    many = Spread.of([result["energy after marks"] for result in found])
    show(f"run.energy_j after {count} phases besides", many, "ms", scale=1e-6)


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.marks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=20_000, help="marks a round")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="recorded at 1 kHz before energy_j is read; 3 s are the rows of a minute at the "
        "default 50 Hz",
    )
    parser.add_argument("--commands", type=int, default=40, help="marks from the command line")
    parser.add_argument("--by-command", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", metavar="SPEC", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    count, seconds = arguments.count, arguments.seconds
    if arguments.work:
        print(json.dumps(work(arguments.work, count, seconds)))
        return
    if arguments.by_command:
        print(json.dumps(by_command(arguments.commands)))
        return
    header("marks: what marking, logging and looking cost the profiled program")
    with product() as bench, powercap_tree(bench.folder) as tree:
        found = measure_both(
            bench, tree.spec, count=count, seconds=seconds, rounds=arguments.rounds
        )
        for kind, results in found.items():
            report(kind, results, count=count, seconds=seconds)
        asked = bench.module("marks", "--by-command", "--commands", str(arguments.commands))
        argv = [*bench.command("--quiet", "--sensor", tree.spec), *asked]
        told = json.loads(run(argv, bench.env))
        print("  pepr-profile mark, from a script:")
        for what, key in (
            ("the command takes", "took"),
            ("its time is later than its call", "late"),
        ):
            for share, value in zip(("median", "p99"), told[key], strict=True):
                show(f"{what}, {share}", value, "ms", scale=1e-6)


if __name__ == "__main__":
    main(measure)
