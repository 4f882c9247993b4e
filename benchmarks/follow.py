"""What following a tree of 2,000 processes costs at the default rate; how long an attach takes."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

from benchmarks.common import Product, Spread, compile_c, header, judge, main, product, run, show

PERIOD_NS = 100_000_000  # of the lane `processes`, by default
FEW, MANY = 30, 2000


def follow(tree: str, how: str, count: int, seconds: float) -> dict[str, float]:
    """Follows a tree of `count` processes that wake up once a second, in a fresh process."""
    from pepr_profiler import _core

    def opened(spec: str) -> tuple[_core.Sampler, float]:
        begin_s = time.monotonic()
        sampler = _core.Sampler(spec, PERIOD_NS)
        sampler.wait_ready(60.0)
        return sampler, time.monotonic() - begin_s

    if how == "wrapped":
        sampler, open_s = opened("processes:children")
    with subprocess.Popen(
        [tree, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        if how == "attached":
            sampler, open_s = opened(f"processes:pids={child.pid}")
        time.sleep(1.0)
        before, begin_s = sampler.stats(), time.monotonic()
        time.sleep(seconds)
        after, end_s = sampler.stats(), time.monotonic()
        sampler.stop(10.0)
        child.stdin.close()
    samples = after["samples"] - before["samples"]
    cpu_s = after["cpu_s"] - before["cpu_s"]
    return {
        "open_s": open_s,
        # At the default rate: a busy machine, or the sampler's budget, may read less often.
        "core": cpu_s / samples / (PERIOD_NS * 1e-9),
        "rate_hz": samples / (end_s - begin_s),
    }


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.follow", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=7.0)
    parser.add_argument(
        "--follow", nargs=3, metavar=("TREE", "HOW", "COUNT"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.follow:
        tree, how, count = arguments.follow
        print(json.dumps(follow(tree, how, int(count), arguments.seconds)))
        return
    header(f"follow: a tree of {MANY:,} processes at {1e9 / PERIOD_NS:g} Hz")
    with product() as bench:
        tree = compile_c("follow_tree.c", bench.folder)
        for how in ("wrapped", "attached"):
            many = _rounds(bench, tree, how, MANY, arguments.rounds, arguments.seconds)
            print(f"  {how}, {arguments.rounds} times {arguments.seconds:g} s:")
            cores = Spread.of([x["core"] for x in many])
            judge(f"{MANY:,} processes: CPU", cores, "% of a core", scale=100, most=2)
            show("rate", Spread.of([x["rate_hz"] for x in many]), "Hz")
            if how == "attached":
                few = _rounds(bench, tree, how, FEW, arguments.rounds, 0.3)
                opens = Spread.of([x["open_s"] for x in few])
                judge(f"attach to {FEW} processes", opens, "ms", scale=1e3, most=100)
                opens = Spread.of([x["open_s"] for x in many])
                show(f"attach to {MANY:,} processes", opens, "ms", scale=1e3)


def follow_in_fresh_process(
    bench: Product, tree: Path, how: str, count: int, seconds: float
) -> dict[str, float]:
    follow = ("--follow", str(tree), how, str(count), "--seconds", str(seconds))
    found: dict[str, float] = json.loads(run(bench.module("follow", *follow), bench.env))
    return found


def _rounds(
    bench: Product, tree: Path, how: str, count: int, rounds: int, seconds: float
) -> list[dict[str, float]]:
    return [follow_in_fresh_process(bench, tree, how, count, seconds) for _ in range(rounds)]


if __name__ == "__main__":
    main(measure)
