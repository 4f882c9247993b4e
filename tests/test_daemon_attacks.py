"""Whatever up to four users do to the daemon, others are served, and it does not grow."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attacks import ATTACKS, LONG_NAME
from cli import SLOW_S, component, ended, until
from daemons import (
    OTHERS,
    Daemon,
    become,
    daemon,
    lock,
    needs_root,
    open_folder,
    python_of,
    raw,
    say,
)
from sim.permissions import obey_permissions
from sim.powercap import BuildTree, Tree, two_socket_server

from pepr_profiler.daemon.clients import Quotas, Refusals

pytestmark = needs_root
LONG = pytest.mark.long
tmp_path = open_folder

HERE = Path(__file__).resolve().parent
ATTACKERS = (23471, 23472, 23473, 23474)
HONEST = 23479


@pytest.fixture
def tree(powercap_sim: BuildTree) -> Tree:
    return powercap_sim(*two_socket_server(), live=True)


@contextmanager
def attack(name: str, where: str, uid: int, *, seconds: float = SLOW_S) -> Iterator[Any]:
    """An attacker at work; after so many seconds it only keeps what it has."""
    program, env = python_of(uid)
    process = subprocess.Popen(
        [program, str(HERE / "attacks.py"), name, where, str(seconds)], env=env, cwd="/",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=become(uid),  # noqa: PLW1509
    )  # fmt: skip
    with ended(process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def served(running: Daemon, tree: Tree, count: int) -> int:
    """How many of so many clients of an honest user are."""
    program, env = python_of(HONEST)
    done = subprocess.run(
        [program, str(HERE / "attacks.py"), "honest", tree.spec, str(count)], cwd="/",
        env={**env, "PEPR_DAEMON": str(running.socket)}, preexec_fn=become(HONEST),
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return int(done.stdout)


def few_descriptors() -> None:
    """As a service has them; the kernel allows as many in flight (ETOOMANYREFS)."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1100, 1100))


def resident_bytes(running: Daemon) -> int:
    pages = Path(f"/proc/{running.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class MemoryGroup:
    """A cgroup that limits memory, of version 1 or 2."""

    folder: Path

    @property
    def _is_v1(self) -> bool:
        return (self.folder / "memory.limit_in_bytes").exists()

    def enter(self) -> None:
        """A `preexec_fn`: this process, and all that it starts, counts from now on."""
        (self.folder / "cgroup.procs").write_text("0")

    def limit(self, limit_bytes: int) -> None:
        name = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        (self.folder / name).write_text(str(limit_bytes))

    def peak_bytes(self) -> int:
        """The most that was used, the kernel's buffers included."""
        name = "memory.max_usage_in_bytes" if self._is_v1 else "memory.peak"
        return int((self.folder / name).read_text())

    def kills(self) -> int:
        """How many processes the kernel has ended because of the limit."""
        name = "memory.oom_control" if self._is_v1 else "memory.events"
        lines = (self.folder / name).read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])


@pytest.fixture
def memory_group() -> Iterator[MemoryGroup]:
    """A group of 256 MB, as the daemon's unit has it; skips where none can be made."""
    mounted = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
    parent = next((path for path in mounted if (path / "cgroup.procs").exists()), mounted[1])
    group = MemoryGroup(parent / f"pepr-test-{os.getpid()}")
    try:
        group.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {parent}: {error.strerror}")
    try:
        try:
            group.limit(256 << 20)
            group.peak_bytes()
        except OSError as error:
            pytest.skip(f"memory is not limited in {parent}: {error.strerror}")
        yield group
    finally:
        until(lambda: not (group.folder / "cgroup.procs").read_text())
        group.folder.rmdir()


@pytest.mark.parametrize(
    "name",
    ["status-unread", *(pytest.param(n, marks=LONG) for n in ("opens-unread", "refusals-unread"))],
)
def test_unread_answers_do_not_fill_the_memory_that_its_unit_allows(
    tree: Tree, tmp_path: Path, memory_group: MemoryGroup, name: str
) -> None:
    # what the kernel keeps for a client that does not read is the daemon's memory
    options: dict[str, Any] = {"preexec_fn": memory_group.enter}
    with daemon(tmp_path, "--sensor", tree.spec, **options) as running, ExitStack() as attackers:
        lock(tree)
        assert served(running, tree, 1) == 1
        before = memory_group.peak_bytes()
        for uid in ATTACKERS:
            attackers.enter_context(attack(name, str(running.socket), uid))
        time.sleep(6)
        until(lambda: served(running, tree, 10) == 10)
        assert running.process.poll() is None and memory_group.kills() == 0
        grown = memory_group.peak_bytes() - before
        print(f"{name}: {before / 1e6:.0f} MB, {grown / 1e6:.0f} MB more under attack")
        # four users together have at most four fifths of what may be unread; and what it takes
        assert grown < Quotas().unread_bytes + 32_000_000


@pytest.mark.parametrize("name", ATTACKS)
def test_others_are_served_whatever_two_users_do(tree: Tree, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"preexec_fn": few_descriptors}
    with daemon(tmp_path, "--sensor", tree.spec, **options) as running, ExitStack() as attackers:
        lock(tree)
        with raw(running.socket) as peer:
            assert say(peer, op="open", lane="powercap")["ok"]
        before = resident_bytes(running)
        for uid in ATTACKERS[:2]:
            attackers.enter_context(attack(name, str(running.socket), uid))
        time.sleep(0.5)
        assert served(running, tree, 30) == 30
        # root is always admitted, and no attack makes the daemon grow
        assert running.status()["ok"]
        assert resident_bytes(running) - before < 16_000_000
        assert running.process.poll() is None


def test_a_run_loses_no_joule_while_descriptors_are_asked_for_and_not_taken(
    tree: Tree, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"preexec_fn": few_descriptors}
    with daemon(tmp_path, "--sensor", tree.spec, **options) as running, ExitStack() as attackers:
        lock(tree)
        for uid in ATTACKERS:
            attackers.enter_context(attack("opens-unread", str(running.socket), uid))
        time.sleep(1)
        result, summary = running.cli.measure(
            "--sensor", tree.spec, "--", "sleep", "2", preexec_fn=obey_permissions
        )
        assert result.status == 0
        package = component(summary, "cpu:package-0")
        assert package["source"] == "powercap"
        truth_j = tree.energy_j("intel-rapl:0", *summary["recording"]["window_ns"])
        assert package["device_j"] == pytest.approx(truth_j, abs=10)


@pytest.mark.parametrize(
    "name", ["opens-unread", "opens-then-offends", "status-unread", "refusals-unread"]
)
def test_what_a_user_does_not_read_is_bounded_whatever_becomes_of_the_connections(
    tree: Tree, tmp_path: Path, name: str
) -> None:
    with daemon(tmp_path, "--sensor", tree.spec) as running:
        with attack(name, str(running.socket), ATTACKERS[0], seconds=4) as attacker:
            unread = int(attacker.stdout.readline())
            quotas = Quotas()
            # one answer may go beyond the limit, and refusals count by themselves
            assert 0 < unread <= quotas.unread_bytes_per_user + (1 << 17) + 16 * 512
            assert running.ask("hello")["ok"]
        # all of it is free again when the attacker is gone
        until(lambda: running.status()["clients"] == 1)


def test_a_client_has_one_unread_answer_and_goes_on_when_it_reads(
    tree: Tree, tmp_path: Path
) -> None:
    with daemon(tmp_path, "--sensor", tree.spec, quotas={"unread_per_user": 2}) as running:
        peers = [raw(running.socket) for _ in range(3)]
        for peer in peers:
            for _ in range(5):
                peer.send(b'{"v": 1, "op": "hello"}')
        begin_s = time.monotonic()
        peers[2].settimeout(0.5)
        with pytest.raises(TimeoutError):
            peers[2].recv(1 << 17)  # two of its user's answers are unread
        peers[2].settimeout(SLOW_S)
        # all that was asked is answered as soon as there is room
        answers = dict.fromkeys(peers, 0)
        while set(answers.values()) != {5}:
            for peer in select.select(peers, [], [], SLOW_S)[0]:
                assert json.loads(peer.recv(1 << 17))["ok"]
                answers[peer] += 1
        assert time.monotonic() - begin_s < 5  # nothing waits for a timer
        for peer in peers:
            assert say(peer, op="hello")["ok"]
            peer.close()


def test_four_users_with_all_clients_they_can_get_leave_room_for_200(
    tree: Tree, tmp_path: Path
) -> None:
    with daemon(tmp_path, "--sensor", tree.spec) as running, ExitStack() as attackers:
        lock(tree)
        for uid in ATTACKERS:
            attackers.enter_context(attack("registered", str(running.socket), uid))
        assert running.status()["clients"] > 1000
        assert served(running, tree, 200) == 200


@pytest.mark.parametrize(
    "name", ["floods", *(pytest.param(n, marks=LONG) for n in ("trickle", "scrapes"))]
)
def test_the_metrics_answer_whatever_four_users_do_to_their_port(
    tree: Tree, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("prometheus_client")
    with (
        daemon(tmp_path, "--sensor", tree.spec, "--metrics", "0") as running,
        ExitStack() as attackers,
    ):
        url = running.status()["metrics"]
        port = url.rpartition(":")[2].partition("/")[0]
        for uid in ATTACKERS:
            attackers.enter_context(attack(name, port, uid))
        time.sleep(1)
        for _ in range(3):
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert b"pepr_device_energy" in answer.read()


def test_places_are_fair_by_user_and_some_are_for_trusted_ones(tree: Tree, tmp_path: Path) -> None:
    few = {"clients": 40, "reserved": 5, "requests_at_once": 1e6}
    with daemon(tmp_path, "--sensor", tree.spec, quotas=few) as running, ExitStack() as attackers:
        lock(tree)
        for uid in ATTACKERS:
            attackers.enter_context(attack("idle", str(running.socket), uid))
        taken = running.status()["clients"] - 1
        assert 20 <= taken <= 35
        assert served(running, tree, 1) == 1
        with ExitStack() as roots:
            for _ in range(5):
                peer = roots.enter_context(raw(running.socket))
                assert say(peer, op="register", run="the node's own")["ok"]
        assert running.status()["refused"]["clients"] > 0


def test_a_greeted_client_without_a_run_is_left_and_one_with_a_run_stays(
    tree: Tree, tmp_path: Path
) -> None:
    short = {"idle_s": 1.0, "silence_s": 1.0}
    with daemon(tmp_path, "--sensor", tree.spec, quotas=short) as running:
        idle, recording = raw(running.socket), raw(running.socket)
        assert say(idle, op="hello")["ok"]
        assert say(recording, op="register", run="mine")["ok"]
        assert idle.recv(1) == b""
        assert say(recording, op="hello")["ok"]
        time.sleep(3)
        assert say(recording, op="hello")["ok"]
        assert say(recording, op="unregister", run="mine")["ok"]
        assert recording.recv(1) == b""
        for peer in (idle, recording):
            peer.close()
        assert running.status()["refused"]["idle"] == 2


def test_a_refusal_says_why_also_to_who_asks_first(tree: Tree, tmp_path: Path) -> None:
    few = {"clients_per_user": 1}
    with daemon(tmp_path, "--sensor", tree.spec, quotas=few) as running:
        with raw(running.socket) as first:
            assert say(first, op="hello")["ok"]
            with raw(running.socket) as second:
                time.sleep(0.2)
                second.send(b'{"v": 1, "op": "hello"}')  # the refusal is there already
                assert json.loads(second.recv(4096))["error"]["what"] == "too many clients"
        until(lambda: running.status()["clients"] == 1)


def test_refusals_are_counted_and_logged_some_lines_a_minute() -> None:
    lines: list[str] = []
    refusals = Refusals(lines.append)
    for number in range(10_000):
        refusals.note("clients", number % 50)
    assert refusals.counts["clients"] == 10_000
    assert lines == ["refused user 0, 1 time(s): too many clients"]
    refusals._log_at_s = 0.0
    refusals.report()
    assert len(lines) <= 7 and "200 time(s)" in lines[1]


def test_status_shows_refusals(tree: Tree, tmp_path: Path) -> None:
    with daemon(tmp_path, "--sensor", tree.spec) as running:
        assert "refused" not in running.cli("daemon", "status").stdout.decode()
        with raw(running.socket) as peer:
            peer.send(b"rubbish")
            peer.recv(4096)
        assert "refused so far: 1 (message)" in running.cli("daemon", "status").stdout.decode()


def test_status_has_300_runs_of_the_longest_names(tree: Tree, tmp_path: Path) -> None:
    names = [f"{LONG_NAME[:-3]}{number:03}" for number in range(300)]
    with daemon(tmp_path, "--sensor", tree.spec) as running, raw(running.socket) as peer:
        for name in names:
            assert say(peer, op="register", run=name)["ok"]
        first = running.status()  # as an older client asks
        assert 0 < len(first["runs"]) < 300 and first["more"] == 300 - len(first["runs"])
        facts = json.loads(running.cli("daemon", "status", "--json").stdout)
        assert [run["run"] for run in facts["runs"]] == names
        result = running.cli("daemon", "status")
        assert all(name in result.stdout.decode() for name in names)
        for skip in (-1, True, 2**31, "x", 1.5):
            with raw(running.socket) as other:
                assert not say(other, op="status", skip=skip)["ok"]


def test_a_long_answer_counts_as_several_requests(tree: Tree, tmp_path: Path) -> None:
    with (
        daemon(tmp_path, "--sensor", tree.spec) as running,
        raw(running.socket) as peer,
        raw(running.socket) as registrar,
    ):
        for number in range(300):
            assert say(registrar, op="register", run=f"{LONG_NAME[:-3]}{number:03}")["ok"]
        answers = 0
        while say(peer, op="status")["ok"]:
            answers += 1
        assert answers < 0.5 * Quotas().requests_at_once


def test_all_get_the_same_open_file_so_that_keeping_it_costs_the_daemon_nothing(
    tree: Tree, tmp_path: Path
) -> None:
    with daemon(tmp_path, "--sensor", tree.spec) as running, raw(running.socket) as peer:
        received = []
        for _ in range(50):
            peer.send(b'{"v": 1, "op": "open", "lane": "powercap"}')
            received += socket.recv_fds(peer, 1 << 17, 1)[1]
        # a shared file has one offset
        os.lseek(received[0], 7, os.SEEK_SET)
        assert {os.lseek(fd, 0, os.SEEK_CUR) for fd in received} == {7}
        for fd in received:
            os.close(fd)


@pytest.mark.parametrize("uid", [0, OTHERS[0]])
def test_a_client_in_a_pid_namespace_registers_its_run(
    tree: Tree, tmp_path: Path, uid: int
) -> None:
    """As in a container: its own number there is 1, which is another process for us."""
    program, env = python_of(uid)
    code = """if True:
        import json, os, sys
        from pathlib import Path
        from pepr_profiler.errors import PeprError
        from pepr_profiler.daemon_client.client import Connection
        connection = Connection(Path(sys.argv[1]))
        assert os.getpid() == 1
        connection.ask("register", run="mine", pid=os.getpid())
        if os.getuid():
            try:
                connection.ask("register", run="another", pid=2)
                sys.exit("another process was taken")
            except PeprError:
                pass
        print(json.dumps([run for run in connection.ask("status")[0]["runs"]]), flush=True)
        sys.stdin.read()"""
    words = ["unshare", "--pid", "--fork", "--kill-child", "setpriv", f"--reuid={uid}",
             f"--regid={uid}", "--clear-groups", program, "-c", code]  # fmt: skip
    with daemon(tmp_path, "--sensor", tree.spec) as running:
        process = subprocess.Popen(
            [*words, str(running.socket)], env=env, cwd="/", stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        with ended(process):
            assert process.stdout is not None
            runs = json.loads(process.stdout.readline() or "null")
            assert [(run["run"], run["uid"]) for run in runs] == [("mine", uid)]
            # as we number it
            status = Path(f"/proc/{runs[0]['pid']}/status").read_text()
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid"))
            assert numbers.split()[1:] == [str(runs[0]["pid"]), "1"]
            process.kill()
