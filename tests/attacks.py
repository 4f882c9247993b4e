"""What a user of the machine may do to the daemon: `python attacks.py NAME WHERE [SECONDS]`.

WHERE is the daemon's socket, or the port of its metrics. It prints "ready" when the attack is under
way, goes on for so long or until it is killed, and then prints how many bytes it has not read, and
keeps what it has until its stdin ends. Only the standard library is needed, so that any account can
run it. `honest` is no attack: clients that want what a recording wants.
`tests/test_daemon_attacks.py` and `benchmarks/faults.py` use this.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

LONG_NAME = "\U0001f50b" * 127  # 12 bytes each in JSON


class Peer:
    """A connection that never waits and never fails; `gone` when the daemon has closed it."""

    def __init__(self, path: str) -> None:
        self.gone = False
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        try:
            self.socket.connect(path)
        except BlockingIOError:
            self.gone = True
            time.sleep(0.01)  # its queue is full
        except OSError:
            self.gone = True

    def say(self, **message: object) -> bool:
        return self.send(json.dumps({"v": 1, **message}).encode())

    def send(self, data: bytes) -> bool:
        try:
            self.socket.send(data)
        except BlockingIOError:
            return False
        except OSError:
            self.gone = True
        return not self.gone

    def hear(self, timeout_s: float = 5.0) -> list[int]:
        """Takes one answer; the descriptors in it."""
        self.socket.settimeout(timeout_s)
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 17, 4)
        except OSError:
            data, descriptors = b"", []
        self.socket.setblocking(False)
        self.gone |= not data
        return descriptors

    def unread(self) -> int:
        """Bytes of answers that wait for us."""
        with suppress(OSError):
            waiting: int = struct.unpack("i", fcntl.ioctl(self.socket, termios.FIONREAD, bytes(4)))[
                0
            ]
            return waiting
        return 0


def _keep_asking(
    path: str, count: int, *, pause_s: float = 0.05, **message: object
) -> Iterator[list[Peer]]:
    """Connections that ask as often as they can and never read; new ones for those left."""
    kept = [Peer(path) for _ in range(count)]
    while True:
        for peer in kept:
            for _ in range(100):
                if not peer.say(**message):
                    break
        yield kept
        # Those that were left stay open, with what they have not read.
        kept += [Peer(path) for _ in range(count - sum(not peer.gone for peer in kept))]
        time.sleep(pause_s)


def opens_unread(path: str) -> Iterator[list[Peer]]:
    """Rings that are asked for and never taken: descriptors in flight."""
    yield from _keep_asking(path, 14, op="open", lane="powercap")


def opens_then_offends(path: str) -> Iterator[list[Peer]]:
    """The same on ever new connections, which the daemon is made to leave."""
    kept = []
    while True:
        for _ in range(200):
            peer = Peer(path)
            peer.say(op="open", lane="powercap")
            peer.send(b"rubbish")
            kept.append(peer)
        yield kept
        time.sleep(0.05)


def status_unread(path: str) -> Iterator[list[Peer]]:
    """The longest answers there are, never read."""
    registrar = Peer(path)
    for number in range(300):
        registrar.say(op="register", run=f"{LONG_NAME}{number % 10}"[-128:])
        registrar.hear()
    # More often would cost us most: what is asked waits where it is until an answer is read.
    yield from _keep_asking(path, 300, pause_s=1, op="status")


def opens_kept(path: str) -> Iterator[list[Peer]]:
    """Rings without end, all of them kept."""
    peer, descriptors = Peer(path), []
    while True:
        for _ in range(100):
            if not peer.say(op="open", lane="powercap"):
                peer = Peer(path)
                continue
            descriptors += peer.hear()
        yield [peer]


def silent(path: str) -> Iterator[list[Peer]]:
    """Connections that say nothing, and come again."""
    kept: list[Peer] = []
    while True:
        kept = [peer for peer in kept if not peer.gone]
        kept += [Peer(path) for _ in range(400 - len(kept))]
        yield kept
        for peer in kept:
            peer.hear(0.0)
        time.sleep(0.2)


def idle(path: str) -> Iterator[list[Peer]]:
    """As many clients as there may be, greeted and then idle."""
    kept: list[Peer] = []
    while True:
        for _ in range(400 - len(kept)):
            kept.append(Peer(path))
            kept[-1].say(op="hello")
            kept[-1].hear()
        kept = [peer for peer in kept if not peer.gone]
        yield kept
        time.sleep(0.2)


def registered(path: str) -> Iterator[list[Peer]]:
    """As many clients as there may be, which look like recordings."""
    kept: list[Peer] = []
    while True:
        for number in range(400 - len(kept)):
            kept.append(Peer(path))
            for message in ({"op": "open", "lane": "powercap"},
                            {"op": "register", "run": f"run{number}"}):  # fmt: skip
                kept[-1].say(**message)
                for descriptor in kept[-1].hear():
                    os.close(descriptor)
        kept = [peer for peer in kept if not peer.gone]
        yield kept
        time.sleep(0.2)


def crowd_that_asks(path: str) -> Iterator[list[Peer]]:
    """Most of the clients that there may be, and the longest work for the daemon."""
    crowd = next(registered(path))
    yield crowd
    for _ in asks_in_a_loop(path):
        yield crowd


def refusals_unread(path: str) -> Iterator[list[Peer]]:
    """Connections beyond all limits, whose refusals are never read."""
    kept = []
    while True:
        for _ in range(200):
            kept.append(Peer(path))
        yield kept


def comes_and_goes(path: str) -> Iterator[list[Peer]]:
    """Connections without end, each closed at once."""
    while True:
        for _ in range(500):
            Peer(path).socket.close()
        yield []


def asks_in_a_loop(path: str) -> Iterator[list[Peer]]:
    """Requests as fast as answers come."""
    peers = [Peer(path) for _ in range(8)]
    while True:
        for _ in range(100):
            for n, peer in enumerate(peers):
                if peer.gone:
                    peers[n] = Peer(path)
                peers[n].say(op="status")
            for peer in peers:
                peer.hear(0.5)
        yield peers


def rubbish(path: str) -> Iterator[list[Peer]]:
    """Messages that are no requests, with descriptors."""
    junk = os.open("/dev/null", os.O_RDONLY)
    while True:
        for _ in range(200):
            peer = Peer(path)
            with suppress(OSError):
                socket.send_fds(peer.socket, [b"[" * 4000], [junk] * 8)
            peer.socket.close()
        yield []


def reads_slowly(path: str) -> Iterator[list[Peer]]:
    """One answer in some seconds on each of very many connections."""
    kept: list[Peer] = []
    while True:
        kept = [peer for peer in kept if not peer.gone]
        kept += [Peer(path) for _ in range(300 - len(kept))]
        for peer in kept:
            for _ in range(20):
                peer.say(op="open", lane="powercap")
        yield kept
        time.sleep(3)
        for peer in kept:
            for descriptor in peer.hear(0.0):
                os.close(descriptor)


def trickle(port: str) -> Iterator[list[Peer]]:
    """A byte now and then on as many sockets as a scraper could use, and again when cut off."""
    kept: list[socket.socket | None] = [None] * 32
    while True:
        for n, slow in enumerate(kept):
            try:
                if slow is None:
                    raise ConnectionResetError
                slow.send(b"x")
            except OSError:
                with suppress(OSError):
                    kept[n] = socket.create_connection(("127.0.0.1", int(port)), 1)
        yield []
        time.sleep(0.5)


def scrapes(port: str) -> Iterator[list[Peer]]:
    """All metrics, as fast as they come, and not read."""
    while True:
        for _ in range(50):
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1) as scrape:
                scrape.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        yield []


def floods(port: str) -> Iterator[list[Peer]]:
    """Connections that ask nothing, each opened again as soon as it is closed."""
    kept: list[socket.socket] = []
    while True:
        alive = []
        for flood in kept:
            try:
                if flood.recv(1):
                    alive.append(flood)
            except BlockingIOError:
                alive.append(flood)
            except OSError:
                flood.close()
        kept = alive
        for _ in range(200 - len(kept)):
            flood = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            with suppress(OSError):
                flood.connect(("127.0.0.1", int(port)))
            kept.append(flood)
        yield []
        time.sleep(0.005)


ATTACKS: dict[str, Callable[[str], Iterator[list[Peer]]]] = {
    attack.__name__.replace("_", "-"): attack
    for attack in (
        opens_unread, opens_then_offends, status_unread, opens_kept, silent, idle, registered,
        crowd_that_asks, refusals_unread, comes_and_goes, asks_in_a_loop, rubbish, reads_slowly,
    )
}  # fmt: skip
"""On the daemon's socket."""

METRICS_ATTACKS = {"trickle": trickle, "scrapes": scrapes, "floods": floods}
"""On the port of its metrics."""


def honest(spec: str, count: int) -> int:
    """How many of so many clients that come at once get their lane, its rows and a registration."""
    from pepr_profiler.daemon_client.client import DaemonClient

    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                node = DaemonClient()
                lane = node.lane(spec, named=True)
                node.announce("honest")
                served = lane is not None and node.error is None and lane.read() is not None
                why = f"not served: {node.error} ({node.error and node.error.why})\n"
                print("" if served else why, end="", file=sys.stderr)
                status = 0 if served else 1
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] == 0 for child in children)


def main(name: str, where: str, *more: str) -> int:
    if name == "honest":
        print(honest(where, int(more[0])))
        return 0
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    until_s = time.monotonic() + float(more[0]) if more else None
    kept: list[Peer] = []
    ready = False
    try:
        for kept in {**ATTACKS, **METRICS_ATTACKS}[name](where):  # noqa: B007
            if not ready:
                print("ready", flush=True)
            ready = True
            if until_s is not None and time.monotonic() > until_s:
                break
    except OSError:  # no descriptors left: what is open stays so
        if not ready:
            print("ready", flush=True)
    print(sum(peer.unread() for peer in kept), flush=True)  # what it made the daemon keep
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
