"""What the daemon hands out cannot be abused, and neither can the daemon."""

from __future__ import annotations

import array
import ctypes
import fcntl
import itertools
import json
import mmap
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, ended, until
from daemons import (
    OTHERS,
    Daemon,
    become,
    daemon,
    needs_root,
    open_folder,
    python_of,
    raw,
    restart,
    say,
)
from sim.powercap import BuildTree, two_socket_server

from pepr_profiler import _core
from pepr_profiler.daemon import system
from pepr_profiler.daemon.clients import Quotas
from pepr_profiler.daemon.lanes import SamplingOptions, ServedLanes
from pepr_profiler.daemon.server import Policy, Server
from pepr_profiler.daemon_client.client import Connection
from pepr_profiler.daemon_client.protocol import (
    MOST_REQUEST_BYTES,
    OPERATIONS,
    ProtocolError,
    Request,
    close_all,
    parse,
)
from pepr_profiler.errors import PeprError

tmp_path = open_folder

MS = 1_000_000
F_ADD_SEALS, F_GET_SEALS = 1033, 1034  # linux/fcntl.h
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1, 2, 4
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def replayed(tmp_path: Path) -> str:
    lines = ["channel\tx\tenergy\tJ\t1\t0\tcounter\treplay"]
    lines += [f"{0.001 * n:.3f}\t{n}" for n in range(20_000)]
    (tmp_path / "ramp").write_text("\n".join(lines) + "\n")
    return f"replay:{tmp_path / 'ramp'}"


@pytest.fixture
def shared(replayed: str) -> Iterator[tuple[_core.Sampler, int]]:
    """A lane and a reader's descriptor of it."""
    sampler = _core.Sampler(replayed, MS)
    assert sampler.wait_ready(10)
    descriptor = sampler.share()
    yield sampler, descriptor
    os.close(descriptor)
    assert sampler.stop(10)


# --- the descriptor -------------------------------------------------------------------------------


def refused(call: Callable[..., Any], *arguments: Any) -> bool:
    try:
        result = call(*arguments)
    except OSError:  # PermissionError and mmap's own
        return True
    if isinstance(result, mmap.mmap):
        result.close()
    return False


def test_a_ring_that_is_handed_out_can_only_be_read(shared: tuple[_core.Sampler, int]) -> None:
    sampler, descriptor = shared
    size = os.fstat(descriptor).st_size
    # Anew through /proc, by its owner or by root, is how one would try to get more than was given.
    again = f"/proc/self/fd/{descriptor}"
    descriptors = [descriptor]
    for flags in (os.O_RDWR, os.O_WRONLY):
        try:
            descriptors.append(os.open(again, flags))
        except OSError:
            assert os.geteuid() != 0  # then the mode alone has kept us out
    for fd in descriptors:
        assert refused(os.pwrite, fd, b"x", 64)
        assert refused(mmap.mmap, fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        assert refused(os.ftruncate, fd, 0)
        assert refused(os.ftruncate, fd, size // 2)
        assert refused(os.ftruncate, fd, 2 * size)
        assert refused(os.posix_fallocate, fd, size, size)
        assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)) == -1  # punch a hole
        for seals in (0, F_SEAL_SEAL, 8):
            assert refused(fcntl.fcntl, fd, F_ADD_SEALS, seals)
        assert fcntl.fcntl(fd, F_GET_SEALS) & (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)
    # a mapping for reading never becomes one for writing, nor loses its pages
    view = libc.mmap
    view.restype = ctypes.c_void_p
    for fd in descriptors[:2]:
        at = view(None, ctypes.c_long(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        assert at != ctypes.c_void_p(-1).value
        where, length = ctypes.c_void_p(at), ctypes.c_long(size)
        assert libc.mprotect(where, length, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        assert libc.madvise(where, length, 9) == -1  # MADV_REMOVE
        assert libc.munmap(where, length) == 0
    for fd in descriptors[1:]:
        os.close(fd)
    # and the producer goes on
    before = sampler.stats()["samples"]
    until(lambda: sampler.stats()["samples"] > before + 10)


def test_a_reader_begins_at_the_row_before_and_sees_what_follows(
    shared: tuple[_core.Sampler, int],
) -> None:
    sampler, descriptor = shared
    until(lambda: sampler.stats()["samples"] > 200)
    since_ns = time.monotonic_ns()
    reader = _core.RingReader(descriptor, since_ns)
    until(lambda: sampler.stats()["samples"] > 400)
    newest = reader.latest()
    rows = reader.read()
    assert rows is not None and newest is not None
    t_ns = array.array("q", rows[1])
    assert t_ns[0] <= since_ns < t_ns[1]
    assert newest[0] in t_ns
    assert reader.lost == 0
    # from the beginning: all rows, as the producer's own cursor gives them
    whole, own = _core.RingReader(descriptor, 0).read(), sampler.read()
    assert whole is not None and own is not None
    assert own[3][0].startswith(whole[3][0]) or whole[3][0].startswith(own[3][0])


def memory_file(content: bytes, seals: int = F_SEAL_SHRINK | F_SEAL_GROW) -> int:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def header(magic: bytes = b"pepring1", *numbers: int) -> bytes:
    version, width, capacity = numbers or (1, 1, 64)
    words = b"".join(n.to_bytes(8, "little") for n in (version, width, capacity))
    return (magic + words).ljust(4096, b"\0")


BODY = bytes(64 * 3 * 8)
FAKES: list[tuple[Callable[[], int], str]] = [
    (lambda: memory_file(header() + BODY, 0), "not sealed"),
    (lambda: memory_file(header() + BODY, F_SEAL_GROW), "not sealed"),
    (lambda: memory_file(b"x"), "too small"),
    (lambda: memory_file(b"\xff" * 8192), "something else"),
    (lambda: memory_file(header(b"pepring1", 2, 1, 64) + BODY), "another version"),
    (lambda: memory_file(header() + BODY[:-8]), "its size"),
    (lambda: memory_file(header() + BODY + b"12345678"), "its size"),
    (lambda: memory_file(header(b"pepring1", 1, 1, 63) + BODY), "its size"),
    (lambda: memory_file(header(b"pepring1", 1, 2**61 - 2, 64) + BODY), "its size"),
    (lambda: memory_file(header(b"pepring1", 1, 1, 2**63) + BODY), "its size"),
    (lambda: memory_file(header(b"pepring1", 1, 1, 0)), "its size"),
    (lambda: os.open("/dev/zero", os.O_RDONLY), "no memory file"),
    (lambda: os.open(__file__, os.O_RDONLY), "not sealed"),
    (lambda: os.open("/", os.O_RDONLY), "no memory file"),
    (lambda: os.open("/", os.O_PATH), "no memory file"),
    (lambda: socket.socket().detach(), "no memory file"),
    (lambda: os.eventfd(0), "no memory file"),
]


@pytest.mark.parametrize(("make", "why"), FAKES)
def test_a_descriptor_that_is_no_ring_is_an_error(make: Callable[[], int], why: str) -> None:
    fd = make()
    try:
        with pytest.raises(ValueError, match=why):
            _core.RingReader(fd, 0)
    finally:
        os.close(fd)
    with pytest.raises(ValueError, match="not open"):
        _core.RingReader(fd, 0)


def test_a_ring_whose_owner_writes_nonsense_gives_nonsense_and_no_crash() -> None:
    random.seed(1)
    for _ in range(300):
        words = [random.choice([0, 1, 63, 64, 65, 2**32, 2**63, 2**64 - 1]) for _ in range(2)]
        content = bytearray(header() + random.randbytes(len(BODY)))
        content[64:72], content[128:136] = (n.to_bytes(8, "little") for n in words)
        fd = memory_file(bytes(content))
        reader = _core.RingReader(fd, random.choice([0, 2**62, -1]))
        os.close(fd)
        for _ in range(4):
            rows = reader.read()
            assert rows is None or len(rows[1]) == 8 * rows[0] <= 8 * 64
            reader.latest()


# --- messages -------------------------------------------------------------------------------------

VALID = [
    {"v": 1, "op": "hello"}, {"v": 1, "op": "status"}, {"v": 1, "op": "open", "lane": "replay"},
    {"v": 1, "op": "register", "run": "r", "pid": 1}, {"v": 1, "op": "unregister", "run": "r"},
    {"v": 1, "op": "claim", "run": "r", "first_s": 7, "shares": {"cpu": [0.5, 1], "gpu:x": [0]}},
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 2**31, 2**64, 1e308, "", "x", "x" * 129, "\0", "\ud800", "é",
    [], {}, [[]], {"v": 1}, "hello", "../../x", "replay",
    {"cpu": [float("nan")]}, {"cpu": [1.1]}, {"cpu": [True]}, {"cpu": [0.5] * 17}, {"cpu": 1},
    {f"gpu:{n}": [1] for n in range(65)},
]  # fmt: skip


def messages(count: int, seed: int) -> Iterator[bytes]:
    """Junk of every kind: noise, torn and mutated messages, wrong types, deep and long ones."""
    draw = random.Random(seed)
    for number in range(count):
        kind = number % 6
        message = dict(draw.choice(VALID))
        if kind == 0:
            yield draw.randbytes(draw.choice([1, 7, 64, 700]))
        elif kind == 1:
            data = bytearray(json.dumps(message).encode())
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            yield bytes(data)
        elif kind == 2:
            data = bytearray(json.dumps(message).encode())
            yield bytes(data[: draw.randrange(1, len(data))])
        elif kind == 3:
            message[draw.choice([*message, "lane", "run", "pid"])] = draw.choice(ODD_VALUES)
            yield json.dumps(message).encode()
        elif kind == 4:
            depth = draw.randrange(1, MOST_REQUEST_BYTES)
            yield draw.choice([b"[", b'{"v":', b"1", b'"', b"\\u"]) * depth
        else:
            yield draw.choice([b"NaN", b"1e999", b"\xff\xfe{\0", b"\xef\xbb\xbf{}", b'{"v":1e0}',
                               b"[" * 2000 + b"]" * 2000, b'{"v":1,"v":1,"op":"hello"}',
                               b" " * draw.randrange(1, 8000)])  # fmt: skip


@pytest.mark.parametrize("count", [12_000, pytest.param(120_000, marks=pytest.mark.long)])
def test_so_many_messages_are_requests_or_errors(count: int) -> None:
    understood = 0
    for data in messages(count, seed=7):
        try:
            request = parse(data)
        except ProtocolError as error:
            assert error.why
            continue
        understood += 1
        assert isinstance(request, Request) and request.operation in OPERATIONS
        assert len(request.lane) <= 128 and request.lane.isprintable()
        assert request.pid is None or 0 < request.pid < 2**31
        assert len(request.shares) <= 64 and 0 <= request.first_s < 2**53
        for shares in request.shares.values():
            assert len(shares) <= 16 and all(0 <= share <= 1 for share in shares)
    assert understood > count / 120  # the fuzz reaches what is behind the parser


@pytest.mark.parametrize("count", [8_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_so_many_messages_leave_the_server_as_it_was(
    tmp_path: Path, replayed: str, count: int
) -> None:
    """The daemon's own server without its limit of requests, so that all of them are answered."""
    path = tmp_path / "run" / "daemon.sock"
    faults: list[str] = []
    listener = system.listen(path, mode=0o600)
    lanes = ServedLanes([replayed], SamplingOptions())
    lanes.open_privileged()
    unlimited = Quotas(requests_per_s=1e9, requests_at_once=1e9)
    policy = Policy(owner=os.getuid(), single_user=True)
    server = Server(
        listener, lanes, policy=policy, manager=system.ServiceManager(), quotas=unlimited,
        log=faults.append,
    )  # fmt: skip
    junk = [os.open("/dev/null", os.O_RDONLY), *os.pipe(), memory_file(b"x")]
    answered = []

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def attack() -> None:
        try:
            peers = [raw(path) for _ in range(20)]  # at once: each waits for a turn of the server's
            assert all(say(peer, op="hello")["ok"] for peer in peers)
            peers[0].send(b'{"v": 1, "op": "open", "lane": "replay"}')
            close_all(socket.recv_fds(peers[0], 1 << 17, 8)[1])  # the daemon keeps its own
            before = descriptors()
            sent = iter(enumerate(messages(count, seed=11)))
            while asked := list(zip(range(len(peers)), sent, strict=False)):
                for place, (number, data) in asked:
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", junk))]
                    peers[place].sendmsg([data], ancillary if number % 50 == 0 else [])
                for place, _ in asked:
                    # every message has an answer; one that is no request is also the last
                    answer, given, _, _ = socket.recv_fds(peers[place], 1 << 17, 8)
                    close_all(given)
                    answered.append(bool(answer))
                    if not json.loads(answer)["ok"]:
                        peers[place].close()
                        peers[place] = raw(path)
            assert all(say(peer, op="hello")["ok"] for peer in peers)
            until(lambda: descriptors() == before)
            for peer in peers:
                peer.close()
        except BaseException as error:
            faults.append(repr(error))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        assert server.serve() == 0
    finally:
        attacker.join()
        lanes.stop()
        listener.close()
        close_all(junk)
    reported = [line for line in faults if line.startswith("refused user")]
    assert faults == reported and 0 < len(reported) < 10  # some lines a minute, whatever is sent
    assert answered == [True] * count


def test_every_valid_message_is_understood() -> None:
    for message in VALID:
        assert parse(json.dumps(message).encode()).operation == message["op"]
    assert parse(b'{"v": 1, "op": "hello", "later": [1]}').operation == "hello"


def test_four_thousand_hostile_connections_leave_the_daemon_as_it_was(
    tmp_path: Path, replayed: str
) -> None:
    # given: one user may ask half as often as these attacks do, which is withstood too
    quotas = {"requests_per_s": 1000.0, "requests_at_once": 1000.0}
    with daemon(tmp_path / "d", "--sensor", replayed, quotas=quotas) as running:
        junk = [os.open("/dev/null", os.O_RDONLY), *os.pipe(), memory_file(b"x")]

        def attack(count: int, seed: int) -> None:
            for data in messages(count, seed):
                connection = raw(running.socket)
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", junk))]
                try:
                    connection.sendmsg([data], ancillary if len(data) % 2 else [])
                    answer = connection.recv(1 << 17)
                    # one answer or an end, never silence
                    assert not answer or "ok" in json.loads(answer)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                connection.close()

        attack(500, seed=1)
        before = until(lambda: _status(running))
        attack(3500, seed=2)
        after = until(lambda: _status(running))
        assert after["clients"] == 1
        assert running.process.poll() is None
        assert after["descriptors"] == before["descriptors"]
        assert after["rss_bytes"] - before["rss_bytes"] < 2_000_000
        for fd in junk:
            os.close(fd)


def test_who_asks_too_often_is_left_and_others_are_served(tmp_path: Path, replayed: str) -> None:
    with daemon(tmp_path / "d", "--sensor", replayed) as running:
        greedy = raw(running.socket)
        answers = 0
        while True:  # several at once: on a slow machine one by one is not often enough
            try:
                for _ in range(32):
                    greedy.send(b'{"v": 1, "op": "hello"}')
                for _ in range(32):
                    answer = greedy.recv(1 << 17)
                    if not answer or not json.loads(answer)["ok"]:
                        raise ConnectionResetError
                    answers += 1
            except (BrokenPipeError, ConnectionResetError):
                break
        limits = Quotas()
        assert limits.requests_at_once * 0.5 < answers < 20 * limits.requests_at_once
        greedy.close()
        # given a moment, the same user is served again
        assert until(lambda: _status(running))["clients"] == 1


def _status(running: Daemon) -> dict[str, Any] | None:
    """None while it has had enough of us."""
    try:
        return running.status()
    except PeprError:
        return None


def test_who_says_nothing_or_never_listens_is_left(tmp_path: Path, replayed: str) -> None:
    with daemon(tmp_path / "d", "--sensor", replayed, quotas={"silence_s": 2.0}) as running:
        silent = raw(running.socket)
        deaf = raw(running.socket)
        deaf.setblocking(False)
        # never reading the answers: the daemon's side fills up, and it goes on without us
        with pytest.raises((BlockingIOError, BrokenPipeError, ConnectionResetError)):
            for _ in range(100_000):
                deaf.send(b'{"v": 1, "op": "status"}')
        assert running.status()["ok"]
        silent.settimeout(SLOW_S)
        assert silent.recv(1) == b""
        until(lambda: running.status()["clients"] == 1)
        silent.close()
        deaf.close()


def test_one_user_has_so_many_clients_and_no_more(tmp_path: Path, replayed: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1024:
        pytest.skip(f"only {hard} descriptors may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1024), hard))
    most = Quotas().clients_per_user
    with daemon(tmp_path / "d", "--sensor", replayed) as running:
        crowd = []
        for _ in range(most):
            crowd.append(raw(running.socket))
            assert say(crowd[-1], op="hello")["ok"]
        one_more = raw(running.socket)
        refusal = json.loads(one_more.recv(1 << 17))
        assert refusal["error"]["what"] == "too many clients"
        one_more.close()
        for connection in crowd:
            connection.close()
        until(lambda: _status(running))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_user_has_so_many_runs_and_no_more(tmp_path: Path, replayed: str) -> None:
    with daemon(tmp_path / "d", "--sensor", replayed) as running:
        connection = raw(running.socket)
        for number in range(Quotas().runs_per_user):
            assert say(connection, op="register", run=f"r{number}")["ok"]
        refusal = say(connection, op="register", run="one more")
        assert refusal["error"]["what"] == "too many runs are registered"
        assert say(connection, op="register", run="r0")["ok"]  # again is no further one
        assert say(connection, op="unregister", run="r0")["ok"]
        assert say(connection, op="register", run="one more")["ok"]
        connection.close()
        until(lambda: running.status()["runs"] == [])


@pytest.mark.parametrize(
    ("uid", "groups", "admitted", "trusted"),
    [(0, [0], True, True), (1000, [1000], True, True), (1001, [1001], False, False),
     (65534, [65534], False, False)],
)  # fmt: skip
def test_a_single_users_daemon_is_that_users(
    uid: int, groups: list[int], admitted: bool, trusted: bool
) -> None:
    own = Policy(owner=1000, single_user=True)
    assert own.admits(uid) == admitted
    assert own.trusts(uid, groups) == trusted
    shared = Policy(owner=0, single_user=False, admin_gid=4)
    assert shared.admits(uid)
    assert shared.trusts(uid, [*groups, 4])
    assert shared.trusts(uid, groups) == (uid == 0)


# --- the socket's place ---------------------------------------------------------------------------


def failure(cli: Cli, path: Path) -> str:
    result = cli("daemon", "--socket", str(path), "--sensor", "replay:/none")
    assert (result.status, result.stdout) == (125, b"")
    assert "Traceback" not in result.stderr and "fix:" in result.stderr
    return result.stderr


def test_a_place_that_others_could_have_made_is_refused(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert "no safe place" in failure(cli, tmp_path / "link" / "daemon.sock")
    (tmp_path / "open").mkdir()
    for mode in (0o777, 0o1777, 0o775):
        (tmp_path / "open").chmod(mode)
        assert "others may write to it" in failure(cli, tmp_path / "open" / "daemon.sock")
    assert list((tmp_path / "open").iterdir()) == []
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", *OTHERS)
        assert "belongs to user" in failure(cli, tmp_path / "theirs" / "daemon.sock")
    (tmp_path / "file").write_text("")
    assert "no safe place" in failure(cli, tmp_path / "file" / "daemon.sock")


@needs_root
def test_a_place_of_somebody_else_is_refused_even_to_root(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o755)
    os.chown(tmp_path / "theirs", OTHERS[0], OTHERS[0])
    assert f"belongs to user {OTHERS[0]}" in failure(Cli(tmp_path), tmp_path / "theirs" / "x.sock")


def test_what_lies_at_the_sockets_name_is_never_followed_or_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    precious = tmp_path / "precious"
    precious.write_text("data")
    path = tmp_path / "run" / "daemon.sock"
    path.symlink_to(precious)
    assert "it is no socket" in failure(Cli(tmp_path), path)
    path.unlink()
    path.write_text("data")
    assert "it is no socket" in failure(Cli(tmp_path), path)
    path.unlink()
    (tmp_path / "run" / "daemon.sock.lock").unlink()
    (tmp_path / "run" / "daemon.sock.lock").symlink_to(precious)
    assert "cannot listen" in failure(Cli(tmp_path), path)
    assert precious.read_text() == "data"


def test_there_is_one_daemon_at_a_place_and_a_dead_ones_socket_is_replaced(
    tmp_path: Path, replayed: str
) -> None:
    with daemon(tmp_path / "d", "--sensor", replayed) as running:
        assert "runs already" in failure(running.cli, running.socket)
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        assert running.socket.exists()
        with ended(restart(running, "--sensor", replayed)):
            running.hears("READY=1")
            assert running.status()["ok"]


def test_the_socket_is_as_open_as_it_should_be(tmp_path: Path, replayed: str) -> None:
    shared = os.geteuid() == 0

    def careful() -> None:
        os.umask(0o077)

    with daemon(tmp_path / "d", "--sensor", replayed, preexec_fn=careful) as running:
        assert running.socket.stat().st_mode & 0o777 == (0o666 if shared else 0o600)
        assert running.socket.parent.stat().st_mode & 0o777 == 0o755
    with daemon(tmp_path / "e", "--sensor", replayed, "--group", str(os.getgid())) as running:
        assert running.socket.stat().st_mode & 0o777 == 0o660
        assert running.socket.stat().st_gid == os.getgid()


@needs_root
def test_a_daemon_of_a_stranger_is_not_believed(tmp_path: Path) -> None:
    """Somebody listens where PEPR_DAEMON points; neither root nor another user falls for it."""
    program, env = python_of(OTHERS[0])
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHERS[0], OTHERS[0])
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
    code += "s.bind(sys.argv[1]); s.listen(); print(flush=True); sys.stdin.read()"
    path = theirs / "daemon.sock"
    process = subprocess.Popen(
        [program, "-c", code, str(path)], env=env, cwd="/", stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, preexec_fn=become(OTHERS[0]),  # noqa: PLW1509
    )  # fmt: skip
    with ended(process):
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(PeprError, match="not to be trusted"):
            Connection(path)


@needs_root
def test_a_socket_for_a_group_keeps_others_out(tmp_path: Path, replayed: str) -> None:
    program, env = python_of(OTHERS[0])
    code = "import sys; from pathlib import Path; "
    code += "from pepr_profiler.daemon_client.client import Connection; "
    code += "Connection(Path(sys.argv[1])).ask('hello')"
    with daemon(tmp_path / "d", "--sensor", replayed, "--group", str(OTHERS[1])) as running:
        for uid in OTHERS:
            done = subprocess.run(
                [program, "-c", code, str(running.socket)], env=env, cwd="/",
                preexec_fn=become(uid), capture_output=True, check=False, text=True,
            )  # fmt: skip
            assert (done.returncode == 0) == (uid == OTHERS[1]), done.stderr
            if uid == OTHERS[0]:
                assert "Permission denied" in done.stderr


@pytest.mark.parametrize(
    "options",
    [["--user", "no-such-user"], ["--group", "no-such-group"], ["--coarse-quantum", "0"],
     ["--overhead", "2"], ["--coarse-period", "x"], ["--user", "root"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_options_fail_before_anything_is_opened(tmp_path: Path, options: list[str]) -> None:
    result = Cli(tmp_path)("daemon", "--socket", str(tmp_path / "run" / "x.sock"), *options)
    assert result.status == 2, result.stderr
    assert not (tmp_path / "run").exists()


def test_the_tree_is_only_read_once_for_all(powercap_sim: BuildTree, tmp_path: Path) -> None:
    """The sampler does not know how many look."""
    tree = powercap_sim(*two_socket_server())
    with daemon(tmp_path / "d", "--sensor", tree.spec, "--period", "10ms") as running:

        def usual_gap_s() -> float:
            peer = raw(running.socket)
            peer.send(b'{"v": 1, "op": "open", "lane": "powercap"}')
            _, (descriptor,), _, _ = socket.recv_fds(peer, 1 << 17, 1)
            rows = _core.RingReader(descriptor, time.monotonic_ns())
            os.close(descriptor)
            peer.close()
            t_ns = array.array("q")
            while len(t_ns) < 100:
                if (batch := rows.read()) is not None:
                    t_ns.frombytes(batch[1])
                time.sleep(0.05)
            return 1e-9 * statistics.median(b - a for a, b in itertools.pairwise(t_ns))

        # A busy machine makes gaps longer; who looks would make them shorter.
        assert usual_gap_s() > 0.008
        crowd = [raw(running.socket) for _ in range(50)]
        assert all(say(connection, op="open", lane="powercap")["ok"] for connection in crowd)
        assert usual_gap_s() > 0.008
        for connection in crowd:
            connection.close()
