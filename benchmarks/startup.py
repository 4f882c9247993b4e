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

PEERS = ("codecarbon==3.3.2", "carbontracker==2.4.7")


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


def peer_prefixes(venv: Path, folder: Path) -> dict[str, list[str]]:
    """How each peer wraps a command, as free of network use as its own options allow."""
    prefixes = {
        "codecarbon": [
            *(str(venv / "bin/codecarbon"), "monitor", "--offline", "--no-api"),
            *("--country-iso-code", "DNK", "--"),
        ],
        "carbontracker": [str(venv / "bin/carbontracker"), "--log_dir", str(folder / "ct")],
    }
    for prefix in prefixes.values():
        if not Path(prefix[0]).exists():
            raise UnmeasurableError(
                f"no {prefix[0]}; pass --peers, or: {venv}/bin/pip install {' '.join(PEERS)}"
            )
    return prefixes


def make_peer_venv(folder: Path) -> Path:
    venv = folder / "peers"
    print(f"  installing {' and '.join(PEERS)} (network) …", flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [str(venv / "bin/pip"), "install", "-q", *PEERS],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise UnmeasurableError(f"{' '.join(command)}:\n{done.stderr}")
    return venv


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


def measure_peers(bench: Product, stamp: Path, rounds: int, venv: Path) -> None:
    env, folder = bench.env, bench.folder
    env = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    prefixes = peer_prefixes(venv, folder)
    prefixes = {"pepr-profile": bench.command(), **prefixes}
    (folder / "ct").mkdir(exist_ok=True)
    environments = {name: bench.env if name == "pepr-profile" else env for name in prefixes}
    measures = {"bare": lambda: wall_s(["true"], env, folder)}
    measures["start bare"] = lambda: start_s([], stamp, env, folder)
    for name, prefix in prefixes.items():
        own = environments[name]
        wall_s([*prefix, "true"], own, folder)
        measures[name] = lambda p=prefix, e=own: wall_s([*p, "true"], e, folder)  # type: ignore[misc]
        measures[f"start {name}"] = lambda p=prefix, e=own: start_s(p, stamp, e, folder)  # type: ignore[misc]
    times = interleaved(measures, rounds)
    print("  against its peers, in rounds of their own:")
    for name in prefixes:
        added = Spread.of(differences(times[name], times["bare"]))
        delay = Spread.of(differences(times[f"start {name}"], times["start bare"]))
        show(f"{name} adds", added, "ms", scale=1e3)
        show(f"{name} delays the child's start by", delay, "ms", scale=1e3)


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer-rounds", type=int, default=5)
    parser.add_argument("--peer-venv", type=Path, metavar="DIR", help="has both peers installed")
    parser.add_argument("--peers", action="store_true", help="install them in a scratch venv")
    arguments = parser.parse_args()
    header("startup: what wrapping a command and importing the package cost")
    with product() as bench:
        stamp = compile_c("stamp.c", bench.folder)
        measure_product(bench, stamp, arguments.rounds)
        venv = arguments.peer_venv
        if venv is None and arguments.peers:
            venv = make_peer_venv(bench.folder)
        if venv is not None:
            measure_peers(bench, stamp, arguments.peer_rounds, venv.absolute())


if __name__ == "__main__":
    main(measure)
