"""What every benchmark shares: the environment, samples with their spread, figures with goals."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
T = TypeVar("T")
ZONES = 4
"""Powercap counters that the goals are about."""


class UnmeasurableError(Exception):
    """Why a figure cannot be had on this machine, and what would help."""


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, reduced to what is printed."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


def percentile(samples: Sequence[float], share: float) -> float:
    """The nearest-rank percentile, `share` in [0, 1]."""
    ranked = sorted(samples)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def show(what: str, value: Spread | float, unit: str, *, scale: float = 1.0) -> None:
    """Prints a figure that has no goal."""
    print(f"  {what:<52} {_text(value, unit, scale)}", flush=True)


def judge(
    what: str,
    value: Spread | float,
    unit: str,
    *,
    scale: float = 1.0,
    most: float | None = None,
    least: float | None = None,
) -> bool:
    """Prints a figure beside its goal, `most` or `least` in the printed unit; whether it is met."""
    middle = scale * (value.median if isinstance(value, Spread) else value)
    met = (most is None or middle <= most) and (least is None or middle >= least)
    goal = f"<= {most:g}" if most is not None else f">= {least:g}"
    verdict = "reached" if met else "MISSED"
    print(f"  {what:<52} {_text(value, unit, scale):<38} goal {goal} {unit}: {verdict}", flush=True)
    return met


def _text(value: Spread | float, unit: str, scale: float) -> str:
    if not isinstance(value, Spread):
        return f"{_digits(scale * value)} {unit}"
    low, high = _digits(scale * value.q1), _digits(scale * value.q3)
    return f"{_digits(scale * value.median)} {unit}  ({low} .. {high}, n={value.count})"


def _digits(number: float) -> str:
    size = abs(number)
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{number:.{places}f}"


def header(title: str) -> None:
    """Prints what is measured and where: a figure without its machine says nothing."""
    load = os.getloadavg()[0]
    print(f"\n{title}")
    print(f"  {environment()}")
    print(f"  load average {load:.1f} on {os.cpu_count()} CPUs; median (quartiles, repetitions)")


def environment() -> str:
    """CPU, kernel and Python; versions and date."""
    versions = [f"pepr-profiler {_commit()}"]
    for package in ("click", "numpy", "rich"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} missing")
    system = platform.uname()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    machine = f"{_cpu()}; {system.system} {system.release}; {python}"
    return f"{machine}\n  {', '.join(versions)}; {date} UTC"


def _cpu() -> str:
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    virtual = ", virtual" if "hypervisor" in facts.get("flags", "").split() else ""
    return f"{facts.get('model name', platform.machine())} ({family}{virtual})"


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            check=False,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return "from an unknown commit"
    return described.stdout.strip() or "from an unknown commit"


@dataclass(frozen=True)
class Product:
    """How a benchmark starts the profiler: this Python, the working tree, a store of its own."""

    folder: Path
    env: dict[str, str]

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "pepr_profiler", "run", *options, "--"]

    def module(self, name: str, *arguments: str) -> list[str]:
        """A command that runs another part of the benchmarks."""
        return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


@contextmanager
def product() -> Iterator[Product]:
    """A scratch folder and the environment of a usual installation, which has bytecode caches."""
    try:
        import pepr_profiler._core  # noqa: F401
    except ImportError as error:
        raise UnmeasurableError(
            f"the native core is missing ({error}); build it: python setup.py build_ext --inplace"
        ) from None
    with TemporaryDirectory(prefix="pepr-bench-") as folder:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PEPR_")}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        env["PEPR_STORE"] = f"{folder}/store"
        yield Product(Path(folder), env)


@contextmanager
def powercap_tree(folder: Path, *, live: bool = False) -> Iterator[Any]:
    """A powercap tree with ZONES counters; `.spec` names it, `.path(key)` its folders.

    Its counters stand still, or move every millisecond at 100 W (package) and 10 W (DRAM).
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from sim.powercap import Tree, Zone, build_writer
    from sim.waves import Constant

    package, dram = Constant(100), Constant(10)
    zones = (
        Zone("intel-rapl:0", "package-0", package, start_uj=123_456_789_012),
        Zone("intel-rapl:0:0", "dram", dram, start_uj=23_456_789_012),
        Zone("intel-rapl:1", "package-1", package, start_uj=113_456_789_012),
        Zone("intel-rapl:1:0", "dram", dram, start_uj=13_456_789_012),
    )
    assert len(zones) == ZONES
    root = folder / ("live" if live else "still")
    writer = build_writer(folder) if live else None
    tree = Tree(root, zones, writer=writer)
    try:
        yield tree
    finally:
        tree.stop()


def compile_c(source: str, folder: Path, *flags: str) -> Path:
    """Builds one of the C programs beside this file, -O2."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), "")
    if not compiler:
        raise UnmeasurableError("no C compiler; install one: sudo apt-get install gcc")
    target = folder / Path(source).stem
    command = [compiler, "-std=c11", "-O2", "-Wall", "-Werror", str(HERE / source)]
    subprocess.run([*command, *flags, "-o", str(target)], check=True)
    return target


def run(argv: Sequence[str], env: dict[str, str], folder: Path = ROOT) -> str:
    """Runs to success and returns stdout; a failure is why nothing can be measured."""
    done = subprocess.run(argv, check=False, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise UnmeasurableError(
            f"{' '.join(argv)} exited {done.returncode}:\n{done.stderr or done.stdout}"
        )
    return done.stdout


def interleaved(measures: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Measures everything once a round, so that a busy minute hits all alike; order alternates."""
    results: dict[str, list[T]] = {name: [] for name in measures}
    for number in range(rounds):
        names = list(measures)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            results[name].append(measures[name]())
    return results


def differences(those: Iterable[float], these: Iterable[float]) -> list[float]:
    """Round by round, what those add to these."""
    return [that - this for that, this in zip(those, these, strict=True)]


def main(measure: Callable[[], None]) -> None:
    """Runs a benchmark; exits 0 whatever the figures are, 1 only if there are none."""
    try:
        measure()
    except UnmeasurableError as error:
        sys.exit(f"cannot measure: {error}")
