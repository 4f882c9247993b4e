"""How long a store of many runs takes to be listed, filtered, compared and indexed anew."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from benchmarks.common import (
    ROOT,
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


@dataclass(frozen=True)
class Cost:
    """What one command took; neighbours on the machine lengthen its CPU time least."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def cost(bench: Product, *arguments: str) -> Cost:
    """The cost of a whole command of the profiler, Python's start included."""
    command = [sys.executable, "-m", "pepr_profiler", *arguments]
    begun_s = time.perf_counter()
    with TemporaryFile() as complaints:
        child = subprocess.Popen(
            command, cwd="/", env=bench.env, stdout=subprocess.DEVNULL, stderr=complaints
        )
        _, status, used = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - begun_s
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            complaints.seek(0)
            raise UnmeasurableError(f"{' '.join(command)}:\n{complaints.read().decode()}")
    return Cost(wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def seen_by(bench: Product, store: Path, tree: Path, number: int) -> Product:
    """The same runs with an index of their own, as another checkout of the project sees them."""
    view = bench.folder / f"view{number}"
    view.mkdir()
    (view / "runs").symlink_to(store / "runs")
    return replace(bench, env={**bench.env, "PEPR_STORE": str(view), "PYTHONPATH": str(tree)})


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout, measured in turns"
    )
    arguments = parser.parse_args()
    header(f"store: {arguments.runs:,} runs, whole commands (Python's start included)")
    with product() as bench:
        store = fill(bench, arguments.runs)
        trees = {"": ROOT} | ({"other: ": arguments.against} if arguments.against else {})
        sides = {
            side: seen_by(bench, store, tree, number)
            for number, (side, tree) in enumerate(trees.items())
        }
        verbs = {
            "list": ["runs", "list"],
            "filter": ["runs", "list", "--experiment", "experiment-7", "--since", "2026-03-01"],
            "compare": ["compare", "--group", "none"],
            "compare one": ["compare", "--experiment", "experiment-7"],
            "export": ["runs", "export", str(bench.folder / "runs.csv")],
        }

        def without_index(side: Product, *, in_memory: bool) -> Cost:
            Path(side.env["PEPR_STORE"], "index").unlink(missing_ok=True)
            if not in_memory:
                forget(store)
            return cost(side, *verbs["list"])

        measures: dict[str, Callable[[], Cost]] = {}
        for side, seen in sides.items():
            measures[f"{side}cold"] = partial(without_index, seen, in_memory=False)
            measures[f"{side}rebuild"] = partial(without_index, seen, in_memory=True)
        costs = interleaved(measures, 1)
        measures = {
            f"{side}{name}": partial(cost, seen, *verb)
            for name, verb in verbs.items()
            for side, seen in sides.items()
        }
        costs |= interleaved(measures, arguments.rounds)
        for side, seen in sides.items():
            report(side, costs)
            size = Path(seen.env["PEPR_STORE"], "index").stat().st_size / arguments.runs
            show(f"{side}size of the index, a run", size, "bytes")


def report(side: str, costs: Mapping[str, Sequence[Cost]]) -> None:
    def wall_s(name: str) -> Spread:
        return Spread.of([one.wall_s for one in costs[side + name]])

    judge(f"{side}runs list, no index, files not in memory", wall_s("cold"), "s", most=30)
    judge(f"{side}runs list, no index, files in memory", wall_s("rebuild"), "s", most=30)
    judge(f"{side}runs list, warm", wall_s("list"), "s", most=3)
    show(f"{side}runs list, warm, one experiment of 1000", wall_s("filter"), "s")
    judge(f"{side}compare, all as one cohort", wall_s("compare"), "s", most=3)
    show(f"{side}compare, one experiment of 1000", wall_s("compare one"), "s")
    show(f"{side}runs export to CSV", wall_s("export"), "s")
    for name in ("rebuild", "list", "compare"):
        of = costs[side + name]
        show(f"{side}CPU time of {name}", Spread.of([one.cpu_s for one in of]), "s")
        show(f"{side}memory of {name}, at most", max(one.peak_mb for one in of), "MB")


if __name__ == "__main__":
    main(measure)
