"""Fixtures: simulated hardware (sim/README.md), the rule for real GPUs, no thread left behind."""

from __future__ import annotations

import itertools
import os
import re
import signal
import site
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cli import Cli, write_meter, write_replay
from daemons import open_folder  # noqa: F401  a fixture for every module
from launchers import real_cgroup, slurm_cluster
from sim import native, nvml, powercap

from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

# All else of the environment of whoever starts the tests is taken away.
KEPT = (
    # Where programs, libraries and packages are; which compiler the simulations are built with.
    *("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH"),
    *("CXX", "CPATH", "LIBRARY_PATH"),
)
KEPT_PREFIXES = ("PYTEST_", "COV", "ASAN_", "TSAN_", "UBSAN_", "NIX_")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Four workers more than there are cores: most tests wait, for a program or for a time.

    None for single tests, which would take longer so, and for those of a real GPU: these measure it
    one after the other.
    """
    asked = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", "")
    if asked.isdigit():
        return int(asked)
    few = all("::" in argument for argument in config.args)
    real = "gpu" in config.getoption("markexpr")
    return 0 if few or real else len(os.sched_getaffinity(0)) + 4


def _place() -> str:
    """The usual folder for temporary files, or one that sockets, shells and other users can use."""
    usual = tempfile.gettempdir()
    for place in (usual, "/tmp", "/var/tmp"):
        plain = re.fullmatch(r"[A-Za-z0-9/._-]{1,40}", place)
        folders = (Path(place), *Path(place).parents)
        if plain and all(folder.stat().st_mode & stat.S_IXOTH for folder in folders):
            return place
    return usual


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Gives the tests the same surroundings everywhere, whoever starts them and how."""
    place = tempfile.tempdir = _place()
    home = tempfile.TemporaryDirectory(prefix="pepr-test-home-")
    session.config.add_cleanup(home.cleanup)
    cache: pytest.Cache | None = getattr(session.config, "cache", None)
    fonts = home.name if cache is None else cache.mkdir("pepr-matplotlib")  # listing them takes 5 s
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name.startswith(KEPT_PREFIXES)
    }
    os.environ.clear()
    os.environ.update(
        kept,
        HOME=home.name,
        LC_ALL="C.UTF-8",
        MPLCONFIGDIR=str(fonts),
        PEPR_DAEMON="off",
        PYTHONUSERBASE=site.getuserbase(),
        TERM="xterm-256color",
        TMPDIR=place,
        TZ="UTC",
    )
    time.tzset()
    os.umask(0o022)
    # `nohup`, or a script that starts us in the background, leaves some signals ignored.
    for signo in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python ignores these
        if signal.getsignal(signo) is signal.SIG_IGN:
            ours = signal.default_int_handler if signo == signal.SIGINT else signal.SIG_DFL
            signal.signal(signo, ours)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of a real GPU and the long ones, unless -m names them."""
    asked = config.getoption("markexpr")
    if "gpu" in asked:
        return
    left_out = {"gpu"} if "long" in asked else {"gpu", "long"}
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def no_thread_leaks() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    leaked = [t.name for t in threading.enumerate() if t not in before and not t.daemon]
    assert not leaked, f"threads left running: {leaked}"


@pytest.fixture(scope="session")
def native_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled simulations are kept between sessions."""
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("native") if cache is None else cache.mkdir("pepr-sim")


@pytest.fixture
def nvml_sim(tmp_path: Path, native_cache: Path) -> nvml.BuildNvml:
    """Builds a libnvidia-ml.so.1 for a scenario; each call gives a library of its own."""
    numbers = itertools.count()
    # Compiled before the test begins: a scenario's epoch may be its first moment.
    with suppress(native.UnavailableError):
        nvml.install(nvml.Scenario(), native_cache, native_cache)

    def build(scenario: nvml.Scenario) -> nvml.NvmlSim:
        folder = tmp_path / f"nvml-{next(numbers)}"
        folder.mkdir()
        try:
            return nvml.install(scenario, folder, native_cache)
        except native.UnavailableError as missing:
            pytest.skip(str(missing))

    return build


@pytest.fixture
def powercap_sim(tmp_path: Path, native_cache: Path) -> Iterator[powercap.BuildTree]:
    """Builds a powercap tree: powercap_sim(*zones, live=False, period_s=0.001, epoch_ns=now)."""
    trees: list[powercap.Tree] = []
    with suppress(native.UnavailableError):
        powercap.build_writer(native_cache)

    def build(
        *zones: powercap.Zone,
        live: bool = False,
        period_s: float = 0.001,
        epoch_ns: int | None = None,
    ) -> powercap.Tree:
        root = tmp_path / f"powercap-{len(trees)}"
        try:
            writer = powercap.build_writer(native_cache) if live else None
        except native.UnavailableError as missing:
            pytest.skip(str(missing))
        tree = powercap.Tree(root, zones, writer=writer, period_s=period_s, epoch_ns=epoch_ns)
        trees.append(tree)
        return tree

    yield build
    for tree in trees:
        tree.stop()


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The command line, with a store in the test's folder."""
    return Cli(tmp_path)


@pytest.fixture
def meter(tmp_path: Path) -> str:
    """A sensor that says 100 W, of a device that is the job's alone."""
    return write_meter(tmp_path / "meter", 100, "meter")


@pytest.fixture
def quiet_sensor(tmp_path: Path) -> str:
    """A sensor that is always there and measures no energy: the CPU is then modelled."""
    return write_replay(tmp_path / "gauge", ["fan count 1 1 0 gauge test"], [(0.0, 1.0)])


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """A cluster of this machine alone; the variables with which its commands reach it."""
    with slurm_cluster() as variables:
        yield variables


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of version 2 of the test's own, or the test is skipped."""
    with real_cgroup() as folder:
        yield folder


@pytest.fixture
def on_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is around this process, and its own go to a store of the test's."""
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.setenv("PEPR_STORE", str(tmp_path / "store"))
