"""The daemon's one thread: who is connected, what they may do, and what it answers.

It never waits for anybody. A client gets no further answer until it has read the last one. It is
disconnected if it does not read that, if it does not ask anything at first or has no run later, if
its message is no request, and if it asks too often. It may connect again and has lost nothing.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import resource
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from pepr_profiler import __version__
from pepr_profiler.daemon import system
from pepr_profiler.daemon.clients import Client, Places, Quotas, Refusals, User
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
_MOST_ACCEPTED = 32  # before others are served again, some ms
_PAUSE_S = 1.0  # without new clients, when there are no descriptors left
_SO_PEERGROUPS = getattr(socket, "SO_PEERGROUPS", 59)  # Linux 4.13
_MOST_GROUPS_BYTES = 1024  # what getsockopt of Python takes
_SWEEP_S = 1.0  # from one look at who is to be left to the next, while there is anybody
_STATUS_REQUESTS = 10  # a status counts as so many: with many clients it takes milliseconds
_RUNS_BYTES = 32 << 10  # of a status; the rest is to be asked for
_SEND_BUFFER_BYTES = protocol.MOST_REPLY_BYTES // 2 + 1024  # the kernel doubles it: one answer


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
        self._places = Places(self._quotas)
        self._refusals = Refusals(log)
        self._selector = selectors.DefaultSelector()
        self._clients: dict[Client, None] = {}
        self._ended: set[Client] = set()  # served no more, but with an unread answer
        self._status: int | None = None
        self._paused_until_s: float | None = None
        self._check_at_s = self._watchdog_at_s = 0.0
        self._sweep_at_s = math.inf
        self._started_s = time.monotonic()
        self._boot_id = boot_id()

    def serve(self) -> int:
        """Serves until a signal, a client or a lane ends it; returns the exit status."""
        self._listener.setblocking(False)
        stop = StopSignals((signal.SIGTERM, signal.SIGINT), ignored_too=True)
        self._selector.register(stop.fd, selectors.EVENT_READ, self._end)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._places, selectors.EVENT_READ, self._resume)
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
            for client in list(self._ended):
                self._let_go(client)
            self._selector.close()
            self._places.close()
            stop.close()

    # --- time ---

    def _timeout_s(self) -> float:
        """How long nothing is to be done unless somebody asks."""
        now_s = time.monotonic()
        until_s = [self._check_at_s, self._sweep_at_s]
        until_s += [self._paused_until_s] if self._paused_until_s is not None else []
        until_s += [self._watchdog_at_s] if self._manager.watchdog_s is not None else []
        return max(0.0, min(until_s) - now_s)

    def _tick(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._sweep_at_s:
            self._sweep(now_s)
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
            self._places.forget_users()
            self._refusals.report()

    def _sweep(self, now_s: float) -> None:
        """Leaves clients whose time is over, and looks again when there will be others."""
        bounded = bool(self._ended)
        for client in list(self._clients):
            why, limit_s = self._limit(client)
            if now_s - client.since_s >= limit_s:
                self._refusals.note(why, client.peer.uid)
                self._drop(client)
            bounded |= limit_s < math.inf
        for client in list(self._ended):
            self._let_go_if_read(client)
        for user in self._places.users():
            self._resume_held(user)
        self._sweep_at_s = now_s + self._sweep_s() if bounded else math.inf

    def _limit(self, client: Client) -> tuple[str, float]:
        """How long a client may stay as it is, and what it is then said to have failed to do."""
        if not client.greeted:
            return "silent", self._quotas.silence_s
        if not self._places.has_read(client):
            return "unread", self._quotas.silence_s
        return "idle", math.inf if client.runs else self._quotas.idle_s

    def _sweep_s(self) -> float:
        return min(_SWEEP_S, self._quotas.silence_s / 4)

    def _sweep_soon(self) -> None:
        self._sweep_at_s = min(self._sweep_at_s, time.monotonic() + self._sweep_s())

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
            refused={**self._refusals.counts, "scrape": self._exporter.refused},
            version=__version__,
            runs=self._ledger if self._shows_runs else None,
        )

    # --- clients ---

    def _accept(self) -> None:
        """Admits several at once: who waits behind users that connect in a loop waits less."""
        for _ in range(_MOST_ACCEPTED):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in system.NO_DESCRIPTORS_LEFT:
                    # Clients in the queue keep it readable: without a pause this would spin.
                    self._selector.unregister(self._listener)
                    self._paused_until_s = time.monotonic() + _PAUSE_S
                return  # else the client has gone already
            self._welcome(connection)

    def _welcome(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._admit(connection, protocol.peer_of(connection))
        except OSError:
            connection.close()

    def _admit(self, connection: socket.socket, peer: Peer) -> None:
        user = self._places.user(peer.uid)
        trusted = self._policy.trusts(peer.uid, _groups_of(connection, peer))
        client = Client(connection, peer, user, trusted, since_s=time.monotonic())
        if not self._policy.admits(peer.uid):
            what, fix = "this daemon serves another user", "start one of your own"
            self._turn_away(client, "user", PeprError(what, fix=fix))
        elif not self._places.may_ask(user):
            error = PeprError("too many requests", fix="come back in a second")
            self._turn_away(client, "requests", error)
        elif not self._places.has_room(peer.uid, user, trusted=trusted):
            error = PeprError("too many clients", fix="end some recordings")
            self._turn_away(client, "clients", error)
        else:
            receive = functools.partial(self._receive, client)
            self._selector.register(connection, selectors.EVENT_READ, receive)
            self._places.enter(client)
            self._clients[client] = None
            self._sweep_soon()

    def _turn_away(self, client: Client, why: str, error: PeprError) -> None:
        """Tells a new client why it has no place, if it reads that; else just closes."""
        self._refusals.note(why, client.peer.uid)
        if not self._places.enter_refused(client):
            client.connection.close()
            return
        data = json.dumps(_failure(error)).encode()
        try:
            client.connection.send(data)
        except OSError:  # it has gone already
            self._places.leave(client)
            return
        self._places.sent(client, len(data))
        self._keep_until_read(client)

    def _drop(self, client: Client) -> None:
        """Serves a client no more. Its place is free when it has read its last answer."""
        if client.ended:
            return
        client.ended = True
        del self._clients[client]
        client.user.runs -= len(client.runs)
        for run in client.runs:
            self._ledger.leave(client.peer.uid, run, time.monotonic())
        client.runs.clear()
        if client in client.user.held:
            del client.user.held[client]
        else:
            self._selector.unregister(client.connection)
        with suppress(OSError):  # its end is closed already
            client.connection.shutdown(socket.SHUT_RDWR)
        self._keep_until_read(client)

    def _keep_until_read(self, client: Client) -> None:
        self._ended.add(client)
        self._places.watch(client)
        self._sweep_soon()
        self._let_go_if_read(client)

    def _let_go_if_read(self, client: Client) -> None:
        if client in self._ended and self._places.has_read(client):
            self._let_go(client)

    def _let_go(self, client: Client) -> None:
        self._ended.remove(client)
        self._places.leave(client)

    def _hold(self, client: Client) -> None:
        """Lets its requests wait in its socket, which costs the daemon nothing."""
        self._selector.unregister(client.connection)
        self._places.hold(client)
        self._sweep_soon()
        self._resume_held(client.user)  # it may have read the answer just before it was watched

    def _resume(self) -> None:
        """Goes on with clients that have read their answers."""
        for client in self._places.changed():
            if client.ended:
                self._let_go_if_read(client)
            self._resume_held(client.user)

    def _resume_held(self, user: User) -> None:
        for client in self._places.release(user):
            receive = functools.partial(self._receive, client)
            self._selector.register(client.connection, selectors.EVENT_READ, receive)

    # --- requests ---

    def _receive(self, client: Client) -> None:
        if client.ended or client in client.user.held:
            return  # since it was selected
        if not self._places.may_answer(client):
            self._hold(client)
            return
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
        client.greeted = True
        uid, why = client.peer.uid, "message"
        try:
            if not self._places.may_ask(self._places.user(uid)):
                why = "requests"
                raise ProtocolError("too many requests", fix="come back in a second")
            reply, descriptors = self._answer(client, protocol.parse(data))
            self._send(client, {"v": protocol.VERSION, "ok": True, **reply}, descriptors)
        except ProtocolError as error:
            self._refusals.note(why, uid)
            self._send(client, _failure(error))
            self._drop(client)
        except PeprError as error:
            self._send(client, _failure(error))
        except OSError as error:
            why = error.strerror or str(error)
            self._send(client, _failure(PeprError("that did not work", why=why, fix="try again")))
        except Exception as error:  # a bug in this must not end the service for all
            self._log(f"a request of user {uid} failed: {error!r}")
            self._drop(client)

    def _send(self, client: Client, reply: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        data = json.dumps(reply).encode()
        if len(data) > protocol.MOST_REPLY_BYTES:
            data = json.dumps(_failure(PeprError("the answer is too long"))).encode()
        try:
            socket.send_fds(client.connection, [data], list(descriptors))
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS and descriptors:
                # Of all processes of our user. Our own clients' alone are fewer than the limit.
                self._refusals.note("descriptors", client.peer.uid)
                why = "other processes of the daemon's user have too many in flight"
                fix = "try again; give the daemon an account of its own"
                failure = _failure(PeprError("no ring can be sent", why=why, fix=fix))
                self._send(client, failure)
                return
            self._drop(client)  # it is gone
            return
        self._places.sent(client, len(data))
        self._sweep_soon()

    def _answer(self, client: Client, request: Request) -> tuple[dict[str, Any], list[int]]:
        if request.operation == "open":
            return self._open(client, request.lane)
        answer = {
            "hello": self._hello,
            "status": lambda who: self._describe(who, skip=request.skip),
            "register": lambda who: self._register(who, request),
            "unregister": lambda who: self._unregister(who, request),
            "claim": lambda who: self._claim(who, request),
            "stop": self._stop,
        }[request.operation]
        return answer(client), []

    def _hello(self, client: Client) -> dict[str, Any]:
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

    def _open(self, client: Client, name: str) -> tuple[dict[str, Any], list[int]]:
        lane = self._lanes.get(name)
        if lane is None:
            raise PeprError(f"there is no lane '{name}'", fix="say hello to see which there are")
        coarse = lane.restricted and not client.trusted
        try:
            descriptor = lane.shared(coarse=coarse)
        except RuntimeError as error:
            raise PeprError("the ring cannot be shared", why=str(error), fix="try again") from None
        client.uses_lanes = True
        return {"lane": self._lanes.describe(lane, coarse=coarse)}, [descriptor]

    def _register(self, client: Client, request: Request) -> dict[str, Any]:
        pid = _process_of(client, request.pid)
        if request.run not in client.runs:
            if client.user.runs >= self._quotas.runs_per_user:
                raise PeprError("too many runs are registered", fix="end some of them")
            client.user.runs += 1
            self._ledger.enter(client.peer.uid, request.run)
        client.runs[request.run] = pid
        return {} if self._number(client, request.run) is None else {"claims": True}

    def _unregister(self, client: Client, request: Request) -> dict[str, Any]:
        if client.runs.pop(request.run, None) is None:
            raise PeprError(f"run '{request.run}' is not registered here")
        client.user.runs -= 1
        self._ledger.leave(client.peer.uid, request.run, time.monotonic())
        return {}

    def _claim(self, client: Client, request: Request) -> dict[str, Any]:
        if request.run not in client.runs:
            raise PeprError(f"run '{request.run}' is not registered here")
        claim = client.peer.uid, request.run, request.first_s, request.shares
        self._ledger.claim(*claim, time.monotonic())
        return {}

    def _number(self, client: Client, run: str) -> int | None:
        return self._ledger.number(client.peer.uid, run)

    def _stop(self, client: Client) -> dict[str, Any]:
        if not client.trusted:
            raise PeprError(
                "you may not stop this daemon",
                why="it is for root, for whoever started it and for its administrators",
                fix="sudo pepr-profile daemon stop",
            )
        self._end()
        return {}

    def _describe(self, client: Client, *, skip: int) -> dict[str, Any]:
        """The daemon's health. Clients and runs are the user's own, or everybody's if trusted.

        There are as many runs as fit, without the first `skip`; `more` follow them.
        """
        client.user.tokens -= _STATUS_REQUESTS - 1
        seen = [c for c in self._clients if client.trusted or c.peer.uid == client.peer.uid]
        runs = [(c, run, pid) for c in seen for run, pid in c.runs.items()][skip:]
        shown: list[dict[str, Any]] = []
        size = 0
        for c, run, pid in runs:
            facts = {"run": run, "pid": pid, "uid": c.peer.uid, "number": self._number(c, run)}
            size += len(json.dumps(facts))
            if shown and size > _RUNS_BYTES:
                break
            shown.append(facts)
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
            "refused": {why: count for why, count in self._refusals.counts.items() if count},
            "runs": shown,
            "more": len(runs) - len(shown),
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


def _process_of(client: Client, asked: int | None) -> int:
    """The process that a client registers, as we number it. Raises PeprError for one of others.

    A client in a PID namespace of its own, a container's, names processes as they are numbered
    there. We know which one it is itself, and none of the others.
    """
    uid, own = client.peer.uid, client.peer.pid
    numbers = system.peer_numbers(client.connection, own)
    if asked is None or asked in (own, numbers[-1]):
        return own
    if uid != 0 and (len(numbers) > 1 or system.owner_of(asked) != uid):
        raise PeprError(f"process {asked} is not yours", fix="register one of your own")
    return asked


def _groups_of(connection: socket.socket, peer: Peer) -> list[int]:
    """The groups of a peer. Of somebody with more than 256 only the primary one is known."""
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS_BYTES)
    except OSError:
        return [peer.gid]
    return [peer.gid, *struct.unpack(f"{len(data) // 4}I", data)]


def raise_descriptor_limit(wanted: int) -> int:
    """Allows as many descriptors as the system lets us have, up to `wanted`; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
