"""A daemon as its users meet it: a real process on a socket of the test's own."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cli import PACKAGES, SLOW_S, Cli, ended
from sim.powercap import Tree

from pepr_profiler.daemon_client.client import Connection
from pepr_profiler.daemon_client.protocol import VERSION, close_all

PACKAGE_DATA = PACKAGES / "pepr_profiler" / "data"
"""Units for systemd, and the dashboard."""

OTHERS = (23451, 23452)
"""Two users that no machine has; the kernel asks for no account."""

BURN = """if True:
    import sys, time
    from pathlib import Path
    go = Path(sys.argv[1])
    while not go.exists(): time.sleep(0.01)
    end_ns = int(go.read_text())
    while time.monotonic_ns() < end_ns: sum(range(1000))"""
"""Works from when a file is there until the time that stands in it; see `give_go`."""

OTHERWISE = """if True:
    import functools, json, sys
    from importlib import import_module
    from pepr_profiler.commands import main
    from pepr_profiler.daemon.clients import Quotas
    from pepr_profiler.daemon.server import Waits
    given = json.loads(sys.argv.pop(1))
    command = import_module("pepr_profiler.commands.daemon")
    command._serve = functools.partial(
        command._serve, quotas=Quotas(**given["quotas"]), waits=Waits(**given["waits"]))
    sys.exit(main(sys.argv[1:]))"""
"""The command line, whose daemon has other quotas and waits than usual."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


Notices = socket.socket


@dataclass
class Daemon:
    """A running daemon; `cli` starts clients that find it."""

    cli: Cli
    socket: Path
    process: subprocess.Popen[bytes]
    notices: Notices
    program: Sequence[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, operation: str, **fields: Any) -> dict[str, Any]:
        connection = Connection(self.socket, timeout_s=SLOW_S)
        try:
            reply, descriptors = connection.ask(operation, **fields)
            close_all(descriptors)
        finally:
            connection.close()
        return reply

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def lane(self, name: str) -> dict[str, Any]:
        """What the status says of a lane."""
        return next(lane for lane in self.status()["lanes"] if lane["name"] == name)

    def descriptors(self) -> int:
        return int(self.status()["descriptors"])

    def hears(self, word: str) -> None:
        """Waits until the daemon has notified its manager so."""
        while True:
            assert select.select([self.notices], [], [], SLOW_S)[0], f"no {word}"
            if word in self.notices.recv(4096).decode():
                return


@contextmanager
def daemon(
    folder: Path,
    *options: str,
    env: dict[str, str] | None = None,
    quotas: dict[str, float] | None = None,
    waits: dict[str, float] | None = None,
    **popen: Any,
) -> Iterator[Daemon]:
    """Starts a daemon below `folder` and waits until it serves.

    `quotas` and `waits`: those fields of `server.Quotas` and `server.Waits` that are not as usual.
    """
    program: Sequence[str] = ("-m", "pepr_profiler")
    if quotas or waits:
        program = ("-c", OTHERWISE, json.dumps({"quotas": quotas or {}, "waits": waits or {}}))
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "run" / "daemon.sock"
    notify = folder / "notify"
    notify.unlink(missing_ok=True)
    cli = Cli(folder, {"PEPR_DAEMON": str(path)})
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.bind(str(notify))
    notify.chmod(0o777)
    variables = {"NOTIFY_SOCKET": str(notify), **(env or {})}
    process = cli.start("daemon", *options, env=variables, program=program, stderr=None, **popen)
    with notices, ended(process):
        running = Daemon(cli, path, process, notices, program)
        running.hears("READY=1")
        yield running
        if process.poll() is None:
            process.terminate()
            process.wait(SLOW_S)


def restart(running: Daemon, *options: str) -> subprocess.Popen[bytes]:
    """A daemon in the place of one that died."""
    variables = {"NOTIFY_SOCKET": running.notices.getsockname()}
    return running.cli.start(
        "daemon", *options, env=variables, program=running.program, stderr=None
    )


def lock(tree: Tree) -> None:
    """From now on nobody opens the counters who obeys their modes; who has them keeps them."""
    for key in tree.zones:
        (tree.path(key) / "energy_uj").chmod(0)


def unlock(tree: Tree) -> None:
    for key in tree.zones:
        (tree.path(key) / "energy_uj").chmod(0o600)


def become(uid: int) -> Callable[[], None]:
    """A `preexec_fn`: what is executed next is that user's."""

    def change() -> None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)

    return change


def give_go(path: Path, *, seconds: int) -> None:
    """Lets all that wait for it work for so long, until the same instant."""
    path.with_suffix(".new").write_text(str(time.monotonic_ns() + seconds * 10**9))
    path.with_suffix(".new").rename(path)


def python_of(uid: int) -> tuple[str, dict[str, str]]:
    """An interpreter that another user may run, and its environment; skips without one."""
    python, env = _python_of(uid)
    return python, {**env, "LC_ALL": "C.UTF-8", "PEPR_DAEMON": "off"}


@cache
def _python_of(uid: int) -> tuple[str, dict[str, str]]:
    paths = [str(PACKAGES), *(path for path in sys.path if "site-packages" in path)]
    env = {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        try:
            done = subprocess.run(
                [python, "-c", "import click, numpy, pepr_profiler._core"],
                env=env,
                preexec_fn=become(uid),
                cwd="/",
                capture_output=True,
                check=False,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python, env
    pytest.skip("no Python here that another user may run with this project's packages")


@contextmanager
def open_place() -> Iterator[Path]:
    """A scratch folder that any user may look into."""
    with tempfile.TemporaryDirectory(prefix="pepr-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """To be a module's `tmp_path`: pytest's own is closed to whom a daemon becomes."""
    with open_place() as folder:
        yield folder


def raw(path: Path) -> socket.socket:
    """A connection that says what it likes."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(SLOW_S)
    connection.connect(str(path))
    return connection


def say(connection: socket.socket, **message: Any) -> dict[str, Any]:
    connection.send(json.dumps({"v": VERSION, **message}).encode())
    reply: dict[str, Any] = json.loads(connection.recv(1 << 17))
    return reply


def times_of(rows: Sequence[tuple[int, bytes, bytes, list[bytes]]]) -> list[int]:
    from array import array

    times = array("q")
    for _, t_ns, _, _ in rows:
        times.frombytes(t_ns)
    return list(times)
