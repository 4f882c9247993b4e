"""The tools that are compared: which versions, how they are opened, an environment for each."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT, UnmeasurableError

TOOLS_FOLDER = Path(__file__).parent / "tools"
OURS = "pepr-profiler"
WRITTEN = "python-loop"
"""What a careful programmer writes to record what we do."""


@dataclass(frozen=True)
class Reads:
    """What a tool reads for a sample, in words; "" is nothing."""

    gpu: str
    rapl: str = ""
    besides: str = ""

    @property
    def as_we(self) -> bool:
        """Whether it reads the sensors that we do, GPUs and RAPL."""
        return bool(self.gpu and self.rapl)


@dataclass(frozen=True)
class Tool:
    """One way to use a package. Several share an environment where they share a requirement.

    `kinds` are what it can measure of gpu, cpu (packages) and dram. `driver` is the file of tools/
    that opens it in code; `wrapper` says how it wraps a command: (its bin folder, a scratch folder)
    to the words before the command. None: it has no such mode, for the reason in `lacks`.
    `takes_rate`: it can be asked to sample at a rate, and then reads `reads` each time; else
    `begin` and `end` are all it does. `by_default`: what is to be known of its own rate. `axes`:
    those that it takes part in; None: all.
    """

    name: str
    requirement: str
    kinds: frozenset[str]
    driver: str | None = None
    wrapper: Callable[[Path, Path], list[str]] | None = None
    takes_rate: bool = False
    cpu_has_dram: bool = False  # its cpu is packages and their memory in one figure
    lacks: str = ""
    reads: Reads = Reads("")
    by_default: str = ""
    axes: frozenset[str] | None = None

    @property
    def distribution(self) -> str:
        return self.requirement.partition("==")[0].partition("[")[0]


def _codecarbon(binaries: Path, _: Path) -> list[str]:
    options = ("--offline", "--no-api", "--country-iso-code", "DNK")
    return [str(binaries / "codecarbon"), "monitor", *options, "--"]


def _carbontracker(binaries: Path, scratch: Path) -> list[str]:
    # It has no `--`: its own options are taken from wherever they stand.
    return [str(binaries / "carbontracker"), "--log_dir", str(scratch / "carbontracker")]


def _ours(binaries: Path, _: Path) -> list[str]:
    return [str(binaries / "pepr-profile"), "run", "--"]


_GPU, _CPU, _DRAM = frozenset({"gpu"}), frozenset({"cpu"}), frozenset({"dram"})
_IN_CODE = "its documentation has no command that wraps another"
_LOOP = "it is a loop in a program"

TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            *(OURS, OURS, _GPU | _CPU | _DRAM, "use_pepr_profiler.py", _ours),
            takes_rate=True,
            reads=Reads(
                "energy; five times a second utilisation, memory, power (instant, average)",
                "all packages and DRAM",
                "CPU time and memory of the job's processes, busy time of the machine (10 Hz); "
                "all on disk",
            ),
        ),
        Tool("zeus", "zeus==0.16.0", _GPU | _CPU | _DRAM, "use_zeus.py", lacks=_IN_CODE),
        Tool(
            *("zeus-power", "zeus==0.16.0", _GPU, "use_zeus_power.py"),
            takes_rate=True,
            lacks=_IN_CODE,
            reads=Reads("power (instant, average), a process for each"),
            # infer_counter_update_period() takes min(0.0, what it detected).
            by_default="PowerMonitor()'s own update_period comes out as 0 s in 0.16.0: its "
            "processes read without a pause",
        ),
        Tool(
            *("codecarbon", "codecarbon==3.3.2", _GPU | _CPU, "use_codecarbon.py", _codecarbon),
            takes_rate=True,
            reads=Reads("energy", "packages", "CPU load and memory of the machine"),
        ),
        Tool(
            *("carbontracker", "carbontracker==2.4.7", _GPU | _CPU),
            *("use_carbontracker.py", _carbontracker),
            takes_rate=True,
            cpu_has_dram=True,
            reads=Reads("power", "all packages and DRAM"),
        ),
        Tool(
            *("nvitop", "nvitop==1.7.2", _GPU, "use_nvitop.py"),
            takes_rate=True,
            lacks="its command is a screen for people; it wraps nothing",
            reads=Reads(
                "power, utilisation, memory, temperature, fan",
                besides="load and memory of the machine and of its process",
            ),
        ),
        Tool(
            *("pyjoules", "pyJoules[nvidia]==0.5.1", _GPU | _CPU | _DRAM, "use_pyjoules.py"),
            lacks=_IN_CODE,
        ),
        Tool(
            *("pynvml-loop", "nvidia-ml-py==13.615.71", _GPU, "use_pynvml.py"),
            takes_rate=True,
            lacks=_LOOP,
            reads=Reads("power"),
        ),
        Tool(
            *(WRITTEN, "nvidia-ml-py==13.615.71", _GPU | _CPU | _DRAM, "use_python_loop.py"),
            takes_rate=True,
            lacks=_LOOP,
            reads=Reads(
                "energy; five times a second utilisation, memory, power (instant, average)",
                "all packages and DRAM",
                "CPU time and memory of its own process; all to a CSV file",
            ),
            axes=frozenset({"overhead", "scale"}),
        ),
    )
}  # fmt: skip
PEERS = tuple(name for name in TOOLS if name != OURS)


@dataclass(frozen=True)
class Installed:
    """A tool in its environment."""

    tool: Tool
    folder: Path
    version: str

    @property
    def name(self) -> str:
        return self.tool.name

    @property
    def python(self) -> str:
        return str(self.folder / "bin/python")

    def driver(self, rate_hz: float | None = None) -> list[str]:
        """The command that opens the tool in code and serves windows (tools/serving.py).

        `rate_hz` None: the tool's own default.
        """
        assert self.tool.driver is not None
        rate = [] if rate_hz is None else ["--rate", f"{rate_hz:g}"]
        return [self.python, str(TOOLS_FOLDER / self.tool.driver), *rate]

    def wrapper(self, scratch: Path) -> list[str] | None:
        """The words before a command that the tool wraps; its files go to `scratch`."""
        return self.tool.wrapper and self.tool.wrapper(self.folder / "bin", scratch)

    def packages(self) -> dict[str, str]:
        """All that is installed there, with versions."""
        listed = _told([self.python, "-m", "pip", "list", "--format", "json"])
        return {found["name"]: found["version"] for found in json.loads(listed)}


def cache_folder() -> Path:
    """Where environments and simulations are kept: PEPR_PEERS, else below the user's cache."""
    if own := os.environ.get("PEPR_PEERS"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pepr-profiler-peers"


def install(name: str) -> Installed:
    """The tool in an environment of its own, made the first time, which needs a network.

    Raises UnmeasurableError with pip's words where it cannot be installed.
    """
    tool = TOOLS[name]
    requirement = str(ROOT) if name == OURS else tool.requirement
    content = _digest_of_checkout() if name == OURS else tool.requirement
    digest = hashlib.sha256(f"{content} {sys.version}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{tool.distribution}-{digest}"
    if not (folder / "complete").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "complete").exists():  # another process may have made it meanwhile
                print(f"  installing {requirement} into {folder} …", file=sys.stderr, flush=True)
                _make(folder, requirement)
    script = f"import importlib.metadata as m; print(m.version({tool.distribution!r}))"
    return Installed(tool, folder, _told([str(folder / "bin/python"), "-c", script]).strip())


def install_all(names: Sequence[str] = tuple(TOOLS)) -> dict[str, Installed | str]:
    """Each tool installed, or in its place why it is not."""

    def attempt(name: str) -> Installed | str:
        try:
            return install(name)
        except UnmeasurableError as error:
            return f"not installed: {error}"

    with ThreadPoolExecutor(4) as pool:  # they wait for the network and the disk
        return dict(zip(names, pool.map(attempt, names), strict=True))


def _make(folder: Path, requirement: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True, symlinks=True)
        _told([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", requirement])
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnmeasurableError(str(error)) from None
    (folder / "complete").touch()


def _told(command: Sequence[str]) -> str:
    # Elsewhere than in the checkout, whose package would be found before the installed one.
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cache_folder())
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip()[-500:]
        raise UnmeasurableError(f"{' '.join(command)} exited {done.returncode}: {words}")
    return done.stdout


def _digest_of_checkout() -> str:
    """Changes with whatever the installation is built from."""
    digest = hashlib.sha256()
    names = ("pyproject.toml", "setup.py", "CMakeLists.txt", "pepr_profiler", "csrc")
    for path in (ROOT / name for name in names):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix not in {".pyc", ".so"}:
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()
