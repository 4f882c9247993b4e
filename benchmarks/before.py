"""This tree beside another, in turn in one run: start-up, import, memory, a block, marks, sampling.

    python -m benchmarks.before CHECKOUT [--rounds 15]

CHECKOUT is another working tree with its core built in place, such as `git worktree add` makes of
the commit before. What measures is this tree's code for both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    Product,
    Spread,
    UnmeasurableError,
    compile_c,
    header,
    interleaved,
    main,
    powercap_tree,
    product,
    run,
    show,
)
from benchmarks.startup import start_s

BLOCK = """
import json, resource, sys, time
clock = time.perf_counter_ns
begin_ns = clock()
from pepr_profiler import profile
with profile("block", sensors=[sys.argv[1]]) as run:
    entered_ns = clock()
    time.sleep(0.2)
    leaving_ns = clock()
left_ns = clock()
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"enter": entered_ns - begin_ns, "exit": left_ns - leaving_ns, "peak": peak}))
"""


@dataclass(frozen=True)
class Tree:
    """One of the two: processes that it starts import its package, and this tree's benchmarks."""

    bench: Product

    @classmethod
    def of(cls, bench: Product, checkout: Path, name: str) -> Tree:
        package = checkout.resolve() / "pepr_profiler"
        if not any(package.glob("_core*.so")):
            raise UnmeasurableError(
                f"{checkout} has no built core; build it there: python setup.py build_ext --inplace"
            )
        folder = bench.folder / name
        folder.mkdir()
        (folder / "pepr_profiler").symlink_to(package)  # without the benchmarks beside it
        paths = os.pathsep.join([str(folder), str(ROOT)])
        env = {**bench.env, "PYTHONPATH": paths, "PEPR_STORE": str(folder / "store")}
        return cls(dataclasses.replace(bench, folder=folder, env=env))

    def json_of(self, *arguments: str) -> dict[str, Any]:
        argv = [sys.executable, *arguments]
        found: dict[str, Any] = json.loads(run(argv, self.bench.env, self.bench.folder))
        return found

    def finish(self, argv: list[str]) -> dict[str, float]:
        """A process until its end: wall and CPU time in s, peak memory in bytes."""
        null = os.open(os.devnull, os.O_RDWR)
        begin_ns = time.monotonic_ns()
        pid = os.posix_spawnp(
            argv[0],
            argv,
            self.bench.env,
            file_actions=[(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)],
        )
        _, status, used = os.wait4(pid, 0)
        end_ns = time.monotonic_ns()
        os.close(null)
        if status != 0:
            raise UnmeasurableError(f"{' '.join(argv)} ended with wait status {status}")
        return {
            "wall": 1e-9 * (end_ns - begin_ns),
            "cpu": used.ru_utime + used.ru_stime,
            "peak": 1024.0 * used.ru_maxrss,
        }

    def wrapped(self) -> dict[str, float]:
        used = self.finish([*self.bench.command(), "true"])
        return {
            "pepr-profile -- true, wall time": used["wall"],
            "pepr-profile -- true, CPU time": used["cpu"],
            "pepr-profile -- true, peak memory": used["peak"],
        }

    def started(self, stamp: Path) -> dict[str, float]:
        bench = self.bench
        return {"until the child starts": start_s(bench.command(), stamp, bench.env, bench.folder)}

    def imported(self) -> dict[str, float]:
        used = self.finish([sys.executable, "-c", "import pepr_profiler"])
        return {
            "import pepr_profiler, wall time": used["wall"],
            "import pepr_profiler, CPU time": used["cpu"],
        }

    def block(self, spec: str) -> dict[str, float]:
        took = self.json_of("-c", BLOCK, spec)
        return {
            "profile() block, import and entry": 1e-9 * took["enter"],
            "profile() block, exit": 1e-9 * took["exit"],
            "profile() block, peak memory": took["peak"],
        }

    def marks(self, spec: str) -> dict[str, float]:
        work = ("--work", spec, "--count", "2000", "--seconds", "0.2")
        took = self.json_of("-m", "benchmarks.marks", *work)
        return {
            "run.phase(), median": 1e-9 * took["phase"][0],
            "run.log(), median": 1e-9 * took["log"][0],
            "run.energy_j": 1e-9 * took["energy"],
        }

    def lane(self, spec: str, what: str, period_ns: int, seconds: float) -> dict[str, float]:
        asked = ("--lane", spec, str(period_ns), "--seconds", str(seconds))
        found = self.json_of("-m", "benchmarks.sampler", *asked)["lane"]
        return {f"CPU time a sample {what}": found["cpu_per_sample_s"]}


Measured = Callable[[Tree], dict[str, float]]


def compare(trees: Mapping[str, Tree], measured: Measured, rounds: int) -> None:
    """Measures both in turn. A quotient is that of one round: above 1, this tree takes more."""
    for tree in trees.values():
        measured(tree)  # writes the bytecode caches
    found = interleaved({name: partial(measured, tree) for name, tree in trees.items()}, rounds)
    for name, first in found["now"][0].items():
        now, before = ([each[name] for each in found[tree]] for tree in ("now", "before"))
        if "memory" in name:
            unit, scale = "MB", 1e-6
        else:
            unit, scale = ("ms", 1e3) if first > 1e-3 else ("us", 1e6)
        print(f"  {name}:")
        show("  before", Spread.of(before), unit, scale=scale)
        show("  now", Spread.of(now), unit, scale=scale)
        show("  now / before", Spread.of([a / b for a, b in zip(now, before, strict=True)]), "x")


def measure() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    header("before: this tree beside another, in turn")
    with product() as bench, powercap_tree(bench.folder) as counters:
        stamp = compile_c("stamp.c", bench.folder)
        both = {
            "before": Tree.of(bench, arguments.checkout, "before"),
            "now": Tree.of(bench, ROOT, "now"),
        }
        spec = counters.spec
        measures: list[Measured] = [
            Tree.wrapped,
            lambda tree: tree.started(stamp),
            Tree.imported,
            lambda tree: tree.lane(spec, "at 1 kHz", 1_000_000, 1.0),
            lambda tree: tree.lane(spec, "without a pause", 1, 0.3),
        ]
        for measured in measures:
            compare(both, measured, arguments.rounds)
        # The end of a block waits for a counter's change, so these need counters that move.
        with powercap_tree(bench.folder, live=True) as moving:
            compare(both, lambda tree: tree.block(moving.spec), arguments.rounds)
            compare(both, lambda tree: tree.marks(moving.spec), arguments.rounds)


if __name__ == "__main__":
    main(measure)
