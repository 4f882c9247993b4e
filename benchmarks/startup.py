"""What the profiler adds to a command, how long it keeps it from starting, and its import."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import (
    Product,
    Spread,
    UnmeasurableError,
    compile_c,
    differences,
    header,
    interleaved,
    judge,
    main,
    product,
    show,
)


def wall_s(argv: Sequence[str], env: dict[str, str], folder: Path) -> float:
    """From just before the spawn until the end, the output going nowhere."""
    with Path(os.devnull).open("r+b") as null:
        begin_ns = time.monotonic_ns()
        child = subprocess.Popen(argv, env=env, cwd=folder, stdin=null, stdout=null, stderr=null)
        status = child.wait()
        end_ns = time.monotonic_ns()
    if status != 0:
        raise UnmeasurableError(f"{' '.join(argv)} exited {status}")
    return (end_ns - begin_ns) * 1e-9


def start_s(prefix: Sequence[str], stamp: Path, env: dict[str, str], folder: Path) -> float:
    """From just before the spawn until the wrapped program's first instruction of its own."""
    file = folder / "stamp.txt"
    file.unlink(missing_ok=True)
    begin_ns = time.monotonic_ns()
    wall_s([*prefix, str(stamp), str(file)], env, folder)
    return (int(file.read_text()) - begin_ns) * 1e-9


def measure_product(bench: Product, stamp: Path, rounds: int) -> None:
    env, folder = bench.env, bench.folder
    loud, quiet = bench.command(), bench.command("--quiet")
    python = [sys.executable, "-c"]
    wall_s([*loud, "true"], env, folder)  # writes the bytecode caches
    times = interleaved(
        {
            "bare": lambda: wall_s(["true"], env, folder),
            "loud": lambda: wall_s([*loud, "true"], env, folder),
            "quiet": lambda: wall_s([*quiet, "true"], env, folder),
            "start bare": lambda: start_s([], stamp, env, folder),
            "start": lambda: start_s(loud, stamp, env, folder),
            "python": lambda: wall_s([*python, "pass"], env, folder),
            "import": lambda: wall_s([*python, "import pepr_profiler"], env, folder),
            "profile": lambda: wall_s([*python, "from pepr_profiler import profile"], env, folder),
        },
        rounds,
    )
    spread = {name: Spread.of(samples) for name, samples in times.items()}
    added = Spread.of(differences(times["loud"], times["bare"]))
    added_quiet = Spread.of(differences(times["quiet"], times["bare"]))
    delay = Spread.of(differences(times["start"], times["start bare"]))
    imported = Spread.of(differences(times["import"], times["python"]))
    used = Spread.of(differences(times["profile"], times["python"]))
    show("true, bare", spread["bare"], "ms", scale=1e3)
    show("python -c pass, bare", spread["python"], "ms", scale=1e3)
    judge("pepr-profile -- true adds", added, "ms", scale=1e3, most=300)
    show("pepr-profile --quiet -- true adds", added_quiet, "ms", scale=1e3)
    judge("pepr-profile delays the child's start by", delay, "ms", scale=1e3, most=120)
    judge("import pepr_profiler, over bare python", imported, "ms", scale=1e3, most=60)
    judge("from pepr_profiler import profile, likewise", used, "ms", scale=1e3, most=60)


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    header("startup: what wrapping a command and importing the package cost")
    with product() as bench:
        stamp = compile_c("stamp.c", bench.folder)
        measure_product(bench, stamp, arguments.rounds)


if __name__ == "__main__":
    main(measure)
