"""The daemon's one thread: who is connected, what they may do, and what it answers.

It never waits for anybody. A client is disconnected if an answer cannot be sent at once, if it does
not ask anything at first, if its message is no request, and if it asks too often. It may connect
again and has lost nothing.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from pepr_profiler import __version__
from pepr_profiler.daemon import system
from pepr_profiler.daemon.exporter import Exporter, families
from pepr_profiler.daemon.lanes import LOST_S, ServedLanes
from pepr_profiler.daemon.ledger import SETTLED_S, Ledger
from pepr_profiler.daemon.meters import Meters
from pepr_profiler.daemon_client import protocol
from pepr_profiler.daemon_client.protocol import Peer, ProtocolError, Request
from pepr_profiler.errors import PeprError
from pepr_profiler.recording.attached import StopSignals
from pepr_profiler.trace.run_json import boot_id

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

STOPPED, RESTART = 0, 75
"""Exit statuses. 75 (EX_TEMPFAIL): start it again, with its privileges."""

_OPENING_CHECK_S = 0.5
_PAUSE_S = 1.0  # without new clients, when there are no descriptors left
_SO_PEERGROUPS = getattr(socket, "SO_PEERGROUPS", 59)  # Linux 4.13
_MOST_GROUPS_BYTES = 1024  # what getsockopt of Python takes


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """How much one user, and all together, may use."""

    clients: int = 1024
    clients_per_user: int = 300
    runs_per_user: int = 300
    silence_s: float = 10.0
    requests_per_s: float = 200.0
    requests_at_once: float = 3000.0  # 300 clients that begin together, with ten requests each


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How long the daemon waits before it acts."""

    check_s: float = 5.0  # from one look at its lanes to the next
    lost_s: float = LOST_S
    settled_s: int = SETTLED_S


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Who may do what. `owner` started the daemon; a single user's daemon serves nobody else."""

    owner: int
    single_user: bool
    admin_gid: int | None = None

    def admits(self, uid: int) -> bool:
        return not self.single_user or uid in (0, self.owner)

    def trusts(self, uid: int, groups: Sequence[int]) -> bool:
        """Whether a user sees fine-grained energy and everybody's runs, and may stop the daemon."""
        return uid in (0, self.owner) or self.admin_gid in groups


@dataclass
class _User:
    """A user with clients, or with many requests lately. `tokens`: requests that are still free."""

    tokens: float
    counted_at_s: float
    clients: int = 0
    runs: int = 0


@dataclass(eq=False)
class _Client:
    connection: socket.socket
    peer: Peer
    user: _User
    trusted: bool
    ask_by_s: float  # its first request
    runs: dict[str, int] = field(default_factory=dict)
    uses_lanes: bool = False


class Server:
    """Serves lanes to the clients of a listener until it is stopped."""

    def __init__(
        self,
        listener: socket.socket,
        lanes: ServedLanes,
        *,
        policy: Policy,
        manager: system.ServiceManager,
        quotas: Quotas | None = None,
        check_s: float = Waits.check_s,
        exporter: Exporter | None = None,
        ledger: Ledger | None = None,
        log: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._lanes = lanes
        self._policy = policy
        self._quotas = quotas or Quotas()
        self._check_s = check_s
        self._log = log
        self._manager = manager
        self._exporter = exporter
        self._meters = Meters(lanes) if exporter is not None else None
        shown = ledger if exporter is not None else None
        self._shows_runs = shown is not None
        self._ledger = shown or Ledger(most=0)
        self._refused = {"user": 0, "requests": 0, "clients": 0, "message": 0}
        self._selector = selectors.DefaultSelector()
        self._clients: set[_Client] = set()
        self._silent: set[_Client] = set()  # without a request so far
        self._users: dict[int, _User] = {}
        self._status: int | None = None
        self._paused_until_s: float | None = None
        self._check_at_s = self._watchdog_at_s = 0.0
        self._started_s = time.monotonic()
        self._boot_id = boot_id()

    def serve(self) -> int:
        """Serves until a signal, a client or a lane ends it; returns the exit status."""
        self._listener.setblocking(False)
        stop = StopSignals((signal.SIGTERM, signal.SIGINT), ignored_too=True)
        self._selector.register(stop.fd, selectors.EVENT_READ, self._end)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        if self._exporter is not None:
            self._selector.register(self._exporter.wake, selectors.EVENT_READ, self._export)
            self._exporter.start()
        self._manager.notify(READY="1", STATUS=self._describe_lanes())
        try:
            while self._status is None:
                for key, _ in self._selector.select(self._timeout_s()):
                    key.data()
                self._tick()
            return self._status
        finally:
            self._manager.notify(STOPPING="1")
            if self._exporter is not None:
                self._exporter.stop()
            for client in list(self._clients):
                self._drop(client)
            self._selector.close()
            stop.close()

    # --- time ---

    def _timeout_s(self) -> float:
        """How long nothing is to be done unless somebody asks."""
        now_s = time.monotonic()
        until_s = [self._check_at_s]
        until_s += [client.ask_by_s for client in self._silent]
        until_s += [self._paused_until_s] if self._paused_until_s is not None else []
        until_s += [self._watchdog_at_s] if self._manager.watchdog_s is not None else []
        return max(0.0, min(until_s) - now_s)

    def _tick(self) -> None:
        now_s = time.monotonic()
        for client in [c for c in self._silent if c.ask_by_s <= now_s]:
            self._drop(client)
        if self._paused_until_s is not None and now_s >= self._paused_until_s:
            self._paused_until_s = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        if self._manager.watchdog_s is not None and now_s >= self._watchdog_at_s:
            self._watchdog_at_s = now_s + self._manager.watchdog_s
            self._manager.notify(WATCHDOG="1")
        if now_s >= self._check_at_s:
            self._check_lanes()
            self._update_meters()
            self._check_at_s = now_s + (_OPENING_CHECK_S if self._lanes.opening else self._check_s)
            self._forget_users(now_s)

    def _update_meters(self) -> None:
        if self._meters is not None:
            self._meters.update()
            self._ledger.settle(self._meters, time.monotonic())

    def _check_lanes(self) -> None:
        changed, restart = self._lanes.check()
        if restart:
            self._log(restart)
            self._status = RESTART
        elif changed:
            # Clients of the old ring would see it stand still. They connect again and get the new.
            self._manager.notify(STATUS=self._describe_lanes())
            for client in [c for c in self._clients if c.uses_lanes]:
                self._drop(client)

    def _describe_lanes(self) -> str:
        ready = [f"{lane.name} ({len(lane.channels)})" for lane in self._lanes if lane.ready]
        return f"reading {', '.join(ready) or 'nothing'}"

    def _end(self) -> None:
        self._status = STOPPED

    def _export(self) -> None:
        """Answers the scrapers that wait. A bug in this must not end the service for all."""
        assert self._exporter is not None
        try:
            self._exporter.answer(self._families)
        except Exception as error:
            self._log(f"metrics could not be made: {error!r}")

    def _families(self) -> list[Metric]:
        assert self._exporter is not None and self._meters is not None
        self._update_meters()
        return families(
            self._meters,
            self._lanes,
            clients=len(self._clients),
            registered=sum(len(client.runs) for client in self._clients),
            refused={**self._refused, "scrape": self._exporter.refused},
            version=__version__,
            runs=self._ledger if self._shows_runs else None,
        )

    # --- clients ---

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in system.NO_DESCRIPTORS_LEFT:
                # Clients in the queue keep it readable: without a pause this would spin.
                self._selector.unregister(self._listener)
                self._paused_until_s = time.monotonic() + _PAUSE_S
            return  # else the client has gone already
        try:
            connection.setblocking(False)
            self._admit(connection, protocol.peer_of(connection))
        except OSError:
            connection.close()

    def _admit(self, connection: socket.socket, peer: Peer) -> None:
        quotas, user = self._quotas, self._user(peer.uid)
        if not self._policy.admits(peer.uid):
            self._refused["user"] += 1
            return _refuse(connection, "this daemon serves another user", "start one of your own")
        if not self._may_ask(user):
            self._refused["requests"] += 1
            return _refuse(connection, "too many requests", "come back in a second")
        full = len(self._clients) >= quotas.clients and peer.uid != 0  # root may always stop us
        if full or user.clients >= quotas.clients_per_user:
            self._refused["clients"] += 1
            return _refuse(connection, "too many clients", "end some recordings")
        client = _Client(
            connection,
            peer,
            user,
            trusted=self._policy.trusts(peer.uid, _groups_of(connection, peer)),
            ask_by_s=time.monotonic() + quotas.silence_s,
        )
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(client))
        user.clients += 1
        self._clients.add(client)
        self._silent.add(client)
        return None

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        self._silent.discard(client)
        client.user.clients -= 1
        client.user.runs -= len(client.runs)
        for run in client.runs:
            self._ledger.leave(client.peer.uid, run, time.monotonic())
        self._selector.unregister(client.connection)
        client.connection.close()

    def _user(self, uid: int) -> _User:
        now_s = time.monotonic()
        user = self._users.setdefault(uid, _User(self._quotas.requests_at_once, now_s))
        gained = (now_s - user.counted_at_s) * self._quotas.requests_per_s
        user.tokens = min(self._quotas.requests_at_once, user.tokens + gained)
        user.counted_at_s = now_s
        return user

    def _may_ask(self, user: _User) -> bool:
        if user.tokens < 1:
            return False
        user.tokens -= 1
        return True

    def _forget_users(self, now_s: float) -> None:
        patience_s = self._quotas.requests_at_once / self._quotas.requests_per_s
        for uid, user in list(self._users.items()):
            if not user.clients and now_s - user.counted_at_s > patience_s:
                del self._users[uid]

    # --- requests ---

    def _receive(self, client: _Client) -> None:
        if client not in self._clients:
            return  # dropped since it was selected
        try:
            # A plain recv: the kernel closes descriptors that a client sends along.
            data = client.connection.recv(protocol.MOST_REQUEST_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        descriptors: list[int] = []
        try:
            if not self._may_ask(self._user(client.peer.uid)):
                raise ProtocolError("too many requests", fix="come back in a second")
            reply, descriptors = self._answer(client, protocol.parse(data))
            self._send(client, {"v": protocol.VERSION, "ok": True, **reply}, descriptors)
        except ProtocolError as error:
            self._refused["message"] += 1
            self._send(client, _failure(error))
            self._drop(client)
        except PeprError as error:
            self._send(client, _failure(error))
        except OSError as error:
            why = error.strerror or str(error)
            self._send(client, _failure(PeprError("that did not work", why=why, fix="try again")))
        except Exception as error:  # a bug in this must not end the service for all
            self._log(f"a request of user {client.peer.uid} failed: {error!r}")
            self._drop(client)
        finally:
            protocol.close_all(descriptors)

    def _send(
        self, client: _Client, reply: dict[str, Any], descriptors: Sequence[int] = ()
    ) -> None:
        data = json.dumps(reply).encode()
        if len(data) > protocol.MOST_REPLY_BYTES:
            data = json.dumps(_failure(PeprError("the answer is too long"))).encode()
        try:
            socket.send_fds(client.connection, [data], list(descriptors))
        except OSError:  # it is gone, or does not read its answers
            self._drop(client)

    def _answer(self, client: _Client, request: Request) -> tuple[dict[str, Any], list[int]]:
        self._silent.discard(client)
        if request.operation == "open":
            return self._open(client, request.lane)
        answer = {
            "hello": self._hello,
            "status": self._describe,
            "register": lambda who: self._register(who, request),
            "unregister": lambda who: self._unregister(who, request),
            "claim": lambda who: self._claim(who, request),
            "stop": self._stop,
        }[request.operation]
        return answer(client), []

    def _hello(self, client: _Client) -> dict[str, Any]:
        return {
            "version": __version__,
            "boot_id": self._boot_id,
            "t_ns": time.monotonic_ns(),
            "fine": client.trusted,
            "lanes": [
                {"name": lane.name, "spec": lane.spec, "channels": len(lane.channels)}
                for lane in self._lanes
                if lane.ready
            ],
        }

    def _open(self, client: _Client, name: str) -> tuple[dict[str, Any], list[int]]:
        lane = self._lanes.get(name)
        if lane is None:
            raise PeprError(f"there is no lane '{name}'", fix="say hello to see which there are")
        coarse = lane.restricted and not client.trusted
        try:
            descriptor = lane.sampler.share(coarse)
        except RuntimeError as error:
            raise PeprError("the ring cannot be shared", why=str(error), fix="try again") from None
        client.uses_lanes = True
        return {"lane": self._lanes.describe(lane, coarse=coarse)}, [descriptor]

    def _register(self, client: _Client, request: Request) -> dict[str, Any]:
        pid = request.pid or client.peer.pid
        if system.owner_of(pid) != client.peer.uid and client.peer.uid != 0:
            raise PeprError(f"process {pid} is not yours", fix="register one of your own")
        if request.run not in client.runs:
            if client.user.runs >= self._quotas.runs_per_user:
                raise PeprError("too many runs are registered", fix="end some of them")
            client.user.runs += 1
            self._ledger.enter(client.peer.uid, request.run)
        client.runs[request.run] = pid
        return {} if self._number(client, request.run) is None else {"claims": True}

    def _unregister(self, client: _Client, request: Request) -> dict[str, Any]:
        if client.runs.pop(request.run, None) is None:
            raise PeprError(f"run '{request.run}' is not registered here")
        client.user.runs -= 1
        self._ledger.leave(client.peer.uid, request.run, time.monotonic())
        return {}

    def _claim(self, client: _Client, request: Request) -> dict[str, Any]:
        if request.run not in client.runs:
            raise PeprError(f"run '{request.run}' is not registered here")
        claim = client.peer.uid, request.run, request.first_s, request.shares
        self._ledger.claim(*claim, time.monotonic())
        return {}

    def _number(self, client: _Client, run: str) -> int | None:
        return self._ledger.number(client.peer.uid, run)

    def _stop(self, client: _Client) -> dict[str, Any]:
        if not client.trusted:
            raise PeprError(
                "you may not stop this daemon",
                why="it is for root, for whoever started it and for its administrators",
                fix="sudo pepr-profile daemon stop",
            )
        self._end()
        return {}

    def _describe(self, client: _Client) -> dict[str, Any]:
        """The daemon's health. Clients and runs are the user's own, or everybody's if trusted."""
        seen = [c for c in self._clients if client.trusted or c.peer.uid == client.peer.uid]
        process = psutil.Process()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "user": os.geteuid(),
            "capabilities": system.capabilities(),
            "up_s": time.monotonic() - self._started_s,
            "cpu_s": time.process_time(),
            "rss_bytes": process.memory_info().rss,
            "descriptors": process.num_fds() - 1,  # without the one that lists them
            "fine": client.trusted,
            "metrics": self._exporter and self._exporter.url,
            "clients": len(seen),
            "runs": [
                {"run": run, "pid": pid, "uid": c.peer.uid, "number": self._number(c, run)}
                for c in seen
                for run, pid in c.runs.items()
            ],
            "lanes": [
                {
                    "name": lane.name,
                    "spec": lane.spec,
                    "state": "running" if lane.ready else lane.sampler.state,
                    "why": lane.why,
                    "coarse": lane.restricted and not client.trusted,
                    "channels": [c.name for c in lane.channels],
                    "age_s": lane.age_s(),
                    **lane.sampler.stats(),
                }
                for lane in self._lanes
            ],
        }


def _failure(error: PeprError) -> dict[str, Any]:
    facts = {"what": error.what, "why": error.why, "fix": error.fix}
    return {"v": protocol.VERSION, "ok": False, "error": facts}


def _refuse(connection: socket.socket, what: str, fix: str) -> None:
    with connection:
        try:
            connection.send(json.dumps(_failure(PeprError(what, fix=fix))).encode())
        except OSError:
            return  # it has gone already


def _groups_of(connection: socket.socket, peer: Peer) -> list[int]:
    """The groups of a peer. Of somebody with more than 256 only the primary one is known."""
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS_BYTES)
    except OSError:
        return [peer.gid]
    return [peer.gid, *struct.unpack(f"{len(data) // 4}I", data)]


def raise_descriptor_limit(wanted: int) -> None:
    """Allows as many descriptors as the system lets us have, up to `wanted`: one a client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
