"""How long a store of many runs takes to be listed, filtered, compared and indexed anew."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import (
    Product,
    Spread,
    UnmeasurableError,
    header,
    interleaved,
    judge,
    main,
    product,
    run,
    show,
)

EXPERIMENTS = 1000

TRAIN = """
import time
from pepr_profiler import profile
with profile("model", experiment="sizes", region="DK", performance="accuracy") as run:
    for epoch in range(10):
        with run.phase("train"):
            time.sleep(0.05)
        run.log(accuracy=1 - 0.5 / (epoch + 1), loss=1 / (epoch + 1), epoch=epoch)
"""
"""The run that all the others are made from: ten epochs."""


def fill(bench: Product, count: int) -> Path:
    """A store of `count` runs like one that is really recorded, with energies of their own."""
    first = Path(bench.env["PEPR_STORE"])
    run([sys.executable, "-c", TRAIN], bench.env)
    (recorded,) = (first / "runs").iterdir()
    summary = json.loads((recorded / "run.json").read_text(encoding="utf-8"))
    store = bench.folder / "many"
    draw = random.Random(1)
    for number in range(count):
        run_id = f"model-{number:06x}"
        factor = draw.lognormvariate(0, 1)
        day = f"2026-{1 + number % 12:02d}-{1 + number % 28:02d}"
        changed = {
            **summary,
            "run_id": run_id,
            "name": f"model-{number % 97}",
            "experiment": f"experiment-{number % EXPERIMENTS}",
            "started_at": f"{day}T{number % 24:02d}:00:00.{number % 1000:03d}+00:00",
            "energy": {**summary["energy"], "total_j": summary["energy"]["total_j"] * factor},
            "metrics": {**summary["metrics"], "accuracy": draw.random()},
            "performance": {"metric": "accuracy", "value": draw.random()},
        }
        directory = store / "runs" / run_id
        directory.mkdir(parents=True)
        text = json.dumps(changed, indent=1)
        (directory / "run.json").write_text(text, encoding="utf-8")
    return store


def forget(store: Path) -> None:
    """Asks the kernel to drop what it holds of the runs' files (their names stay cached)."""
    os.sync()
    for path in (store / "runs").iterdir():
        descriptor = os.open(path / "run.json", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cpu_s() -> float:
    """The CPU time of all commands so far, which neighbours on the machine hardly lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wall_s(bench: Product, *arguments: str) -> float:
    command = [sys.executable, "-m", "pepr_profiler", *arguments]
    begun_s = time.perf_counter()
    done = subprocess.run(
        command, check=False, env=bench.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode:
        raise UnmeasurableError(f"{' '.join(command)}:\n{done.stderr.decode()}")
    return time.perf_counter() - begun_s


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    header(f"store: {arguments.runs:,} runs, whole commands (Python's start included)")
    with product() as bench:
        store = fill(bench, arguments.runs)
        bench.env["PEPR_STORE"] = str(store)
        index = store / "index"
        verbs = {
            "list": ["runs", "list"],
            "filter": ["runs", "list", "--experiment", "experiment-7", "--since", "2026-03-01"],
            "compare": ["compare", "--group", "none"],
            "compare one": ["compare", "--experiment", "experiment-7"],
            "export": ["runs", "export", str(bench.folder / "runs.csv")],
        }
        forget(store)
        cold_s = wall_s(bench, *verbs["list"])
        index.unlink()
        rebuild_s = wall_s(bench, *verbs["list"])
        size = index.stat().st_size / arguments.runs
        times = interleaved(
            {name: lambda v=verb: wall_s(bench, *v) for name, verb in verbs.items()},  # type: ignore[misc]
            arguments.rounds,
        )
        spread = {name: Spread.of(samples) for name, samples in times.items()}
        judge("runs list, no index, files not in memory", cold_s, "s", most=30)
        judge("runs list, no index, files in memory", rebuild_s, "s", most=30)
        judge("runs list, warm", spread["list"], "s", most=3)
        show("runs list, warm, one experiment of 1000", spread["filter"], "s")
        judge("compare, all as one cohort", spread["compare"], "s", most=3)
        show("compare, one experiment of 1000", spread["compare one"], "s")
        show("runs export to CSV", spread["export"], "s")
        for name in ("list", "compare"):
            before_s = cpu_s()
            wall_s(bench, *verbs[name])
            show(f"CPU time of {' '.join(verbs[name])}", cpu_s() - before_s, "s")
        show("size of the index, a run", size, "bytes")


if __name__ == "__main__":
    main(measure)
