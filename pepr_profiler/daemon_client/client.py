"""The daemon of this machine as a recording uses it.

A lane of the daemon is read like one of our own: its ring is mapped read-only, and its rows carry
times of the same clock.
"""

from __future__ import annotations

import bisect
import json
import os
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.daemon_client import protocol
from pepr_profiler.daemon_client.address import SOCKET_VARIABLE, sockets_there
from pepr_profiler.errors import PeprError
from pepr_profiler.record import Any
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import Channel
from pepr_profiler.trace.run_json import boot_id

_FIRST_ANSWER_S = 5.0  # as long as a driver may take to open
_LATER_ANSWER_S = 0.25  # short, because a recording that goes on waits for it
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.1, 5.0
_RESTART_S = 3.0  # a run whose sensor was named waits so long for a daemon that is started again
_DEVICES_PER_CLAIM = 16  # eight seconds of so many GPUs fill half of the longest request
_LAST_ROW_POLL_S = 0.002
_MOST_CLOCK_OFFSET_NS = 1_000_000_000

RawRows = tuple[int, bytes, bytes, list[bytes]]
"""Rows as the core gives them: how many, `t_ns`, `read_ns` and the channels, native-endian."""


class DaemonGoneError(PeprError):
    """A daemon was there and has ended; its manager may start it again."""


class Connection:
    """A connection to a daemon that root or our own user runs. Every method may raise PeprError.

    Another user's daemon is refused: anybody can make a socket where others may write.
    """

    def __init__(self, path: Path, *, timeout_s: float = _FIRST_ANSWER_S) -> None:
        import socket

        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.settimeout(None)  # the program may have set a default one
        try:
            self._connect(timeout_s)
            self._socket.settimeout(timeout_s)
            listener = protocol.peer_of(self._socket)
            if listener.uid not in (0, os.geteuid()):
                raise PeprError(
                    f"the daemon at {path} is not to be trusted",
                    why=f"it belongs to user {listener.uid}, who is neither root nor you",
                    fix=f"remove it, or unset {SOCKET_VARIABLE}",
                )
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, timeout_s: float) -> None:
        import errno

        directory = -1
        try:
            # Through the directory's descriptor: a socket's address holds 107 bytes.
            directory = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._wait_in_queue(f"/proc/self/fd/{directory}/{self.path.name}", timeout_s)
        except OSError as error:
            full = error.errno == errno.EAGAIN
            gone = error.errno in (errno.ECONNREFUSED, errno.ECONNRESET)
            raise (DaemonGoneError if gone else PeprError)(
                f"no daemon answers at {self.path}",
                why=f"its queue was full for {timeout_s:g} s"
                if full
                else error.strerror or str(error),
                fix="see: pepr-profile daemon status"
                if full
                else "start it: sudo pepr-profile daemon",
            ) from None
        finally:
            if directory >= 0:
                os.close(directory)

    def _wait_in_queue(self, address: str, timeout_s: float) -> None:
        """Connects; if the daemon's queue is full, the kernel lets us wait our turn.

        A socket that does not block, as one with Python's timeout, fails at once (EAGAIN).
        """
        import errno
        import socket
        import struct

        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            whole_s = int(left_s)
            limit = struct.pack("ll", whole_s, max(1, int((left_s - whole_s) * 1e6)))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._socket.connect(address)
            try:
                self._socket.getpeername()
            except OSError:
                continue  # a signal ended the wait, and Python takes that for a connection
            return
        raise OSError(errno.EAGAIN, "")

    def ask(self, operation: str, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """The daemon's answer and the descriptors that came with it, which are the caller's."""
        import socket

        request = {"v": protocol.VERSION, "op": operation, **fields}
        descriptors: list[int] = []
        try:
            self._socket.send(json.dumps(request).encode())
            data, descriptors, flags, _ = socket.recv_fds(
                self._socket, protocol.MOST_REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
            if not data or flags & socket.MSG_TRUNC:
                raise ValueError("it closed the connection")
            reply = json.loads(data)
            if not isinstance(reply, dict):
                raise ValueError("it was no object")
        except (OSError, ValueError) as error:
            protocol.close_all(descriptors)
            gone = not isinstance(error, TimeoutError) and not self.is_up()
            with suppress(OSError):  # an answer that comes later would be taken for the next one
                self._socket.shutdown(socket.SHUT_RDWR)
            fix = "see: pepr-profile daemon status, or its journal"
            what = f"the daemon at {self.path} gave no answer"
            raise (DaemonGoneError if gone else PeprError)(what, why=str(error), fix=fix) from None
        if not reply.get("ok"):
            protocol.close_all(descriptors)
            refusal = reply.get("error") or {}
            raise PeprError(
                str(refusal.get("what", "the daemon refused")),
                why=str(refusal.get("why", "")),
                fix=str(refusal.get("fix", "")),
            )
        return reply, descriptors

    def set_timeout(self, timeout_s: float) -> None:
        """From now on `ask` waits so long for an answer."""
        self._socket.settimeout(timeout_s)

    def is_up(self) -> bool:
        """Whether the daemon still holds its end."""
        import select

        state = select.poll()  # not recv, which would wait for as long as the timeout
        state.register(self._socket, 0)  # hang-ups and errors are reported in any case
        return not state.poll(0)

    def close(self) -> None:
        self._socket.close()


class DaemonClient:
    """The lanes of the daemon that one recording reads. They survive a restart of the daemon.

    It connects when the first lane is asked for. If the daemon goes away, reading a lane tries to
    connect again, at growing intervals; the counters go on meanwhile. `error` says why a daemon
    that is there cannot be used.
    """

    def __init__(self) -> None:
        self.error: PeprError | None = None
        self.reconnects = 0
        self.version = ""
        self.wants_claims = False
        self._connection: Connection | None = None
        self._tried = False
        self._offered: list[Mapping[str, Any]] = []
        self._lanes: dict[str, RemoteLane] = {}
        self._run: str | None = None
        self._path = Path()
        self._lost_s: float | None = None
        self._retry_s, self._retry_at_s = _FIRST_RETRY_S, 0.0

    def lane(self, spec: str, *, named: bool) -> RemoteLane | None:
        """The daemon's lane for a sensor that we may not read ourselves; None if it has none.

        `named`: the user asked for this very sensor. A detected one may be replaced by another
        that reads the same counters, as perf and powercap do. Without a named one there is no run,
        so that it is waited for a daemon that is just started again.
        """
        deadline_s = time.monotonic() + (_RESTART_S if named else 0.0)
        while True:
            found = self._lane(spec, named=named)
            gone = found is None and not self._lanes and isinstance(self.error, DaemonGoneError)
            if not gone or time.monotonic() >= deadline_s:
                return found
            self._hang_up()
            time.sleep(_FIRST_RETRY_S)
            self._tried = False

    def _lane(self, spec: str, *, named: bool) -> RemoteLane | None:
        self._connect_once()
        for offered in self._offered:
            name = str(offered["name"])
            if name not in self._lanes and _replaces(str(offered["spec"]), spec, named=named):
                try:
                    self._lanes[name] = RemoteLane(self, name, *self._open(name))
                except _UNUSABLE as error:
                    self.error = _as_error(error, self._path)
                    return None
                return self._lanes[name]
        return None

    def covers(self, spec: str) -> bool:
        """Whether a lane that we read from the daemon has the counters of this sensor."""
        return any(_replaces(lane.spec, spec, named=False) for lane in self._lanes.values())

    def announce(self, run: str) -> None:
        """Registers the run with the daemon, if we read any of its lanes; else hangs up."""
        if self._lanes:
            self._run = run
            self._register()
        else:
            self._hang_up()

    def claim(self, first_s: int, shares: Mapping[str, Sequence[float]]) -> None:
        """Claims parts of devices for the run, one a second from `first_s` on.

        A claim that does not reach the daemon is missing in its metrics, and nowhere else.
        """
        if self._connection is None or not self.wants_claims:
            return
        devices = list(shares)
        with suppress(PeprError):
            for n in range(0, len(devices), _DEVICES_PER_CLAIM):
                some = {device: shares[device] for device in devices[n : n + _DEVICES_PER_CLAIM]}
                self._connection.ask("claim", run=self._run, first_s=first_s, shares=some)

    def facts(self) -> dict[str, Any] | None:
        """What run.json says of the daemon; None if none of its lanes was read."""
        if not self._lanes:
            return None
        return {
            "socket": str(self._path),
            "version": self.version,
            "reconnects": self.reconnects,
            "lanes": {
                name: {"spec": lane.spec, "coarse": lane.coarse}
                for name, lane in self._lanes.items()
            },
        }

    def reconnect(self) -> None:
        """Does nothing while connected. Else connects again, if it is time to try that."""
        if self._lost_s is None:
            if self._connection is not None and self._connection.is_up():
                return
            self._hang_up()
            self._lost_s = time.monotonic()
            self._retry_s = _FIRST_RETRY_S
        if time.monotonic() < self._retry_at_s:
            return
        try:
            self._connect(self._path, timeout_s=_LATER_ANSWER_S)
            for name, lane in self._lanes.items():
                lane.continue_in(*self._open(name))
        except _UNUSABLE:
            self._hang_up()
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
            return
        self._lost_s = None
        self.reconnects += 1
        self._register()

    def close(self) -> list[tuple[str, str, str]]:
        """Hangs up; lanes can still be read to their ends. Returns warnings: code, text, hint."""
        self._hang_up()
        warnings = []
        if self._lanes and self._lost_s is not None:
            gone_s = time.monotonic() - self._lost_s
            text = (
                f"the daemon at {self._path} was gone for the last {gone_s:.1f} s; "
                f"{', '.join(sorted(self._lanes))} ended early"
            )
            warnings.append(("daemon-gone", text, "start it again: sudo pepr-profile daemon"))
        if self.error is not None:
            why = f": {self.error.why}" if self.error.why else ""
            fix = self.error.fix or "see: pepr-profile daemon status"
            warnings.append(("daemon-unusable", f"{self.error.what}{why}", fix))
        return warnings

    def _connect_once(self) -> None:
        if self._tried:
            return
        self._tried = True
        for path in sockets_there():
            try:
                self._connect(path, timeout_s=_FIRST_ANSWER_S)
            except _UNUSABLE as error:
                self.error = _as_error(error, path)
                self._hang_up()
                continue
            self.error = None
            return

    def _connect(self, path: Path, *, timeout_s: float) -> None:
        self._connection = Connection(path, timeout_s=timeout_s)
        before_ns = time.monotonic_ns()
        reply, descriptors = self._connection.ask("hello")
        protocol.close_all(descriptors)
        after_ns = time.monotonic_ns()
        self._connection.set_timeout(_LATER_ANSWER_S if self._lanes else _FIRST_ANSWER_S)
        offset_ns = max(before_ns - int(reply["t_ns"]), int(reply["t_ns"]) - after_ns)
        if reply.get("boot_id") != boot_id() or offset_ns > _MOST_CLOCK_OFFSET_NS:
            raise PeprError(
                f"the daemon at {path} has another clock",
                why="it lives in another time namespace, or on another machine",
                fix="run both in the same one",
            )
        self._path, self.version = path, str(reply["version"])
        self._offered = list(reply["lanes"])

    def _open(self, name: str) -> tuple[dict[str, Any], int]:
        """A lane's description and the descriptor of its ring."""
        if self._connection is None:
            raise PeprError("the daemon is gone")
        reply, descriptors = self._connection.ask("open", lane=name)
        if len(descriptors) != 1:
            protocol.close_all(descriptors)
            raise PeprError(f"the daemon gave no ring for lane '{name}'")
        return dict(reply["lane"]), descriptors[0]

    def _register(self) -> None:
        if self._run is not None and self._connection is not None:
            try:
                reply, _ = self._connection.ask("register", run=self._run, pid=os.getpid())
                self.wants_claims = bool(reply.get("claims"))
            except PeprError as error:
                self.error = error

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


_UNUSABLE = (PeprError, KeyError, TypeError, ValueError)
"""Raised if a daemon refuses, or answers what this version does not understand."""


def _as_error(error: Exception, path: Path) -> PeprError:
    if isinstance(error, PeprError):
        return error
    return PeprError(
        f"the daemon at {path} gives answers that are not understood",
        why=repr(error),
        fix="use one version of pepr-profiler for both",
    )


_FAMILY = {"perf": "rapl", "powercap": "rapl"}  # they read the same counters


def _replaces(offered: str, wanted: str, *, named: bool) -> bool:
    """Whether one sensor can be read instead of another."""
    if offered == wanted or named:
        return offered == wanted
    kinds = [SensorSpec(spec).kind for spec in (offered, wanted)]
    # Each hwmon chip is a sensor of its own.
    return len({_FAMILY.get(kind, kind) for kind in kinds}) == 1 and kinds[0] != "hwmon"


class RemoteLane:
    """A lane of the daemon, read as a `_core.Sampler` is; made by `DaemonClient.lane`."""

    state = "running"

    def __init__(
        self, client: DaemonClient, name: str, facts: Mapping[str, Any], descriptor: int
    ) -> None:
        self.name = name
        self.notes: list[_core.Note] = []
        self._client = client
        # Of the rows that are there, the newest is ours: the run begins between it and the next.
        self._since_ns, self._last_ns = time.monotonic_ns(), -1
        self._lost = 0
        # Where in the daemon's rows each of our channels is, if not at the same place.
        self._columns: list[int | None] | None = None
        self._reader = self._map(facts, descriptor)
        self.spec, self.coarse = SensorSpec(facts["spec"]), bool(facts["coarse"])
        self.period_ns = int(facts["period_ns"])
        self.channels = _channels(facts)

    def wait_ready(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def read(self) -> RawRows | None:
        """As `_core.Sampler.read`. When nothing is left, it also looks whether the daemon lives."""
        while (batch := self._reader.read()) is not None:
            if fresh := self._fresh(batch):
                return fresh
        self._client.reconnect()
        return None

    def latest(self) -> tuple[int, list[float]] | None:
        """As `_core.Sampler.latest`."""
        newest = self._reader.latest()
        if newest is None or self._columns is None:
            return newest
        t_ns, values = newest
        return t_ns, [float("nan") if at is None else values[at] for at in self._columns]

    def stop(self, timeout_s: float) -> bool:
        """Waits for the first row after now, so that the run ends between two rows."""
        end_ns = time.monotonic_ns()
        deadline_ns = end_ns + round(timeout_s * 1e9)
        while time.monotonic_ns() < deadline_ns:
            newest = self._reader.latest()
            if newest is not None and newest[0] >= end_ns:
                break
            self._client.reconnect()
            time.sleep(_LAST_ROW_POLL_S)
        return True  # if there was no such row, `DaemonClient.close` warns that the daemon is gone

    @property
    def lost(self) -> int:
        """Rows that were overwritten before we read them."""
        return self._lost + self._reader.lost

    def continue_in(self, facts: Mapping[str, Any], descriptor: int) -> None:
        """Goes on in the ring of a restarted daemon, after the last row that was read."""
        known = {channel.name: (n, channel) for n, channel in enumerate(_channels(facts))}
        columns: list[int | None] = []
        for channel in self.channels:
            column, same = known.get(channel.name, (-1, None))
            columns.append(column if same == channel else None)
        lost = self._reader.lost
        self._reader = self._map(facts, descriptor)
        self._lost += lost
        unchanged = columns == list(range(len(known)))
        self._columns = None if unchanged else columns

    def _map(self, facts: Mapping[str, Any], descriptor: int) -> _core.RingReader:
        try:
            reader = protocol.map_ring(descriptor, max(self._since_ns, self._last_ns))
        except ValueError as error:
            raise PeprError("the daemon gave no ring that can be read", why=str(error)) from None
        if reader.width != len(facts["channels"]):
            raise PeprError("the daemon's ring has another width than its description")
        return reader

    def _fresh(self, batch: RawRows) -> RawRows | None:
        """The rows after the last one that was read, in our order of channels; None if none."""
        rows, t_ns, read_ns, values = batch
        times = array("q", t_ns)
        seen = bisect.bisect_right(times, self._last_ns) if times[0] <= self._last_ns else 0
        if seen == rows:
            return None
        self._last_ns = times[-1]
        if self._columns is not None:
            unknown = array("d", [float("nan")]).tobytes() * rows
            values = [unknown if at is None else values[at] for at in self._columns]
        if seen:
            rows, t_ns, read_ns = rows - seen, t_ns[8 * seen :], read_ns[4 * seen :]
            values = [column[8 * seen :] for column in values]
        return rows, t_ns, read_ns, values


def _channels(facts: Mapping[str, Any]) -> tuple[Channel, ...]:
    try:
        return tuple(Channel(**channel) for channel in facts["channels"])
    except TypeError as error:
        why = str(error)
        raise PeprError("the daemon's description of a lane is not understood", why=why) from None
