"""The node's daemon as its clients know it: what is said, and a lane of it.

A lane of the daemon is read like one of our own: its ring is mapped read-only, its rows carry the
same clock. What is said over the socket is documented in docs/daemon.md.
"""

from __future__ import annotations

import bisect
import json
import os
import struct
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.daemon_client.address import SOCKET_VARIABLE, sockets_there
from pepr_profiler.daemon_client.protocol import MOST_REPLY_BYTES, VERSION
from pepr_profiler.errors import PeprError
from pepr_profiler.record import Record
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import Channel
from pepr_profiler.trace.run_json import boot_id

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    import socket  # 5 ms; most runs have no use for it
    from typing import Any

_FIRST_ANSWER_S = 5.0  # as long as a driver may take to open
_LATER_ANSWER_S = 0.25  # a recording that goes on is not held up
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.1, 5.0
_DEVICES_A_CLAIM = 16  # eight seconds of so many GPUs are half of the longest request
_LAST_ROW_POLL_S = 0.002
_MOST_CLOCK_OFFSET_NS = 1_000_000_000

RawRows = tuple[int, bytes, bytes, list[bytes]]


class Connection:
    """One connection to a daemon that we may believe. Raises PeprError in all that it does.

    Believed are root and ourselves: a socket somewhere on the way could be anybody's.
    """

    def __init__(self, path: Path, *, timeout_s: float = _FIRST_ANSWER_S) -> None:
        import socket

        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(timeout_s)
            self._connect()
            listener = peer_of(self._socket)
            if listener.uid not in (0, os.geteuid()):
                raise PeprError(
                    f"the daemon at {path} is not to be trusted",
                    why=f"it belongs to user {listener.uid}, who is neither root nor you",
                    fix=f"remove it, or unset {SOCKET_VARIABLE}",
                )
        except BaseException:
            self._socket.close()
            raise

    def _connect(self) -> None:
        directory = -1
        try:
            # Through the directory's descriptor: a socket's address holds 107 bytes.
            directory = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._socket.connect(f"/proc/self/fd/{directory}/{self.path.name}")
        except OSError as error:
            raise PeprError(
                f"no daemon answers at {self.path}",
                why=error.strerror or str(error),
                fix="start it: sudo pepr-profile daemon",
            ) from None
        finally:
            if directory >= 0:
                os.close(directory)

    def ask(self, operation: str, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """The daemon's answer and the descriptors that came with it, which are the caller's."""
        import socket

        request = {"v": VERSION, "op": operation, **fields}
        descriptors: list[int] = []
        try:
            self._socket.send(json.dumps(request).encode())
            data, descriptors, flags, _ = socket.recv_fds(
                self._socket, MOST_REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
            reply = json.loads(data) if data and not flags & socket.MSG_TRUNC else None
        except (OSError, ValueError) as error:
            close_all(descriptors)
            raise self._silence(str(error)) from None
        if not isinstance(reply, dict):
            close_all(descriptors)
            raise self._silence("it closed the connection" if reply is None else "it was no object")
        if not reply.get("ok"):
            close_all(descriptors)
            told = reply.get("error") or {}
            raise PeprError(
                str(told.get("what", "the daemon refused")),
                why=str(told.get("why", "")),
                fix=str(told.get("fix", "")),
            )
        return reply, descriptors

    def _silence(self, why: str) -> PeprError:
        fix = "see: pepr-profile daemon status, or its journal"
        return PeprError(f"the daemon at {self.path} gave no answer", why=why, fix=fix)

    def patience(self, timeout_s: float) -> None:
        """How long an answer is waited for from now on."""
        self._socket.settimeout(timeout_s)

    def is_up(self) -> bool:
        """Whether the daemon still holds its end."""
        import select

        state = select.poll()  # not recv: with a timeout set, Python would wait for it
        state.register(self._socket, 0)  # hang-ups and errors are always told
        return not state.poll(0)

    def close(self) -> None:
        self._socket.close()


class Peer(Record):
    """Who is at the other end of a Unix socket, as the kernel says."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who connected; of a connection to a listener: who listened."""
    import socket

    layout = struct.Struct("iII")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return Peer(*layout.unpack(data))


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class DaemonClient:
    """The daemon of this machine for one recording: its lanes, kept through its restarts.

    Nothing is tried before the first lane is asked for. A daemon that goes away is tried again
    with growing pauses whenever a lane is read; counters go on meanwhile.
    """

    def __init__(self) -> None:
        self.trouble: PeprError | None = None
        self.reconnects = 0
        self.version = ""
        self.wants_claims = False
        self._connection: Connection | None = None
        self._asked = False
        self._offered: list[Mapping[str, Any]] = []
        self._lanes: dict[str, RemoteLane] = {}
        self._run: str | None = None
        self._path = Path()
        self._lost_s: float | None = None
        self._retry_s, self._retry_at_s = _FIRST_RETRY_S, 0.0

    def lane(self, spec: str, *, named: bool) -> RemoteLane | None:
        """The daemon's lane for a sensor that we may not read ourselves; None if it has none.

        A sensor that was asked for by `name` is only replaced by the same one, a detected one by
        any of its family: perf and powercap tell of the same counters.
        """
        self._greet()
        for offered in self._offered:
            name = str(offered["name"])
            if name not in self._lanes and _stands_for(str(offered["spec"]), spec, named):
                try:
                    self._lanes[name] = RemoteLane(self, name, *self._open(name))
                except _UNUSABLE as error:
                    self.trouble = _as_error(error, self._path)
                    return None
                return self._lanes[name]
        return None

    def covers(self, spec: str) -> bool:
        """Whether a lane of the daemon is in use that makes this sensor superfluous."""
        return any(_stands_for(lane.spec, spec, False) for lane in self._lanes.values())

    def announce(self, run: str) -> None:
        """Registers the run with the daemon, if there is one in use."""
        if self._lanes:
            self._run = run
            self._register()
        else:
            self._hang_up()

    def claim(self, first_s: int, shares: Mapping[str, Sequence[float]]) -> None:
        """Tells the daemon what parts of its devices are surely ours, in seconds from `first_s` on.

        What does not reach it is missing from its metrics, and from nothing else.
        """
        if self._connection is None or not self.wants_claims:
            return
        devices = list(shares)
        with suppress(PeprError):
            for n in range(0, len(devices), _DEVICES_A_CLAIM):
                told = {device: shares[device] for device in devices[n : n + _DEVICES_A_CLAIM]}
                self._connection.ask("claim", run=self._run, first_s=first_s, shares=told)

    def facts(self) -> dict[str, Any] | None:
        """What a recording notes of the daemon that it read through."""
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

    def keep_up(self) -> None:
        """Notices that the daemon is gone, and finds it again once it is back."""
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
                lane.follow(*self._open(name))
        except _UNUSABLE:
            self._hang_up()
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
            return
        self._lost_s = None
        self.reconnects += 1
        self._register()

    def close(self) -> list[tuple[str, str, str]]:
        """Leaves the daemon; what was read stays readable. Returns warnings: code, text, hint."""
        self._hang_up()
        warnings = []
        if self._lanes and self._lost_s is not None:
            away_s = time.monotonic() - self._lost_s
            warnings.append(
                (
                    "daemon-gone",
                    f"the daemon at {self._path} was gone for the last {away_s:.1f} s; "
                    f"{_listed(self._lanes)} ended early",
                    "start it again: sudo pepr-profile daemon",
                )
            )
        if self.trouble is not None:
            why = f": {self.trouble.why}" if self.trouble.why else ""
            fix = self.trouble.fix or "see: pepr-profile daemon status"
            warnings.append(("daemon-unusable", f"{self.trouble.what}{why}", fix))
        return warnings

    def _greet(self) -> None:
        if self._asked:
            return
        self._asked = True
        for path in sockets_there():
            try:
                self._connect(path, timeout_s=_FIRST_ANSWER_S)
            except _UNUSABLE as error:
                self.trouble = _as_error(error, path)
                self._hang_up()
                continue
            self.trouble = None
            return

    def _connect(self, path: Path, *, timeout_s: float) -> None:
        self._connection = Connection(path, timeout_s=timeout_s)
        before_ns = time.monotonic_ns()
        reply, descriptors = self._connection.ask("hello")
        close_all(descriptors)
        after_ns = time.monotonic_ns()
        self._connection.patience(_LATER_ANSWER_S if self._lanes else _FIRST_ANSWER_S)
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
            close_all(descriptors)
            raise PeprError(f"the daemon gave no ring for lane '{name}'")
        return dict(reply["lane"]), descriptors[0]

    def _register(self) -> None:
        if self._run is not None and self._connection is not None:
            try:
                reply, _ = self._connection.ask("register", run=self._run, pid=os.getpid())
                self.wants_claims = bool(reply.get("claims"))
            except PeprError as error:
                self.trouble = error

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


_UNUSABLE = (PeprError, KeyError, TypeError, ValueError)
"""What a daemon can do to us: refuse, or answer what this version does not understand."""


def _as_error(error: Exception, path: Path) -> PeprError:
    if isinstance(error, PeprError):
        return error
    return PeprError(
        f"the daemon at {path} gives answers that are not understood",
        why=repr(error),
        fix="give it and the profiler the same version of pepr-profiler",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _stands_for(offered: str, wanted: str, named: bool) -> bool:
    if offered == wanted or named:
        return offered == wanted
    kinds = [SensorSpec(spec).kind for spec in (offered, wanted)]
    # Each hwmon chip is a sensor of its own.
    return len({_FAMILY.get(kind, kind) for kind in kinds}) == 1 and kinds[0] != "hwmon"


_FAMILY = {"perf": "rapl", "powercap": "rapl"}


class RemoteLane:
    """A lane of the daemon, read like a `_core.Sampler`; made by `DaemonClient.lane`."""

    state = "running"

    def __init__(
        self, node: DaemonClient, name: str, facts: Mapping[str, Any], descriptor: int
    ) -> None:
        self.name = name
        self.notes: list[_core.Note] = []
        self._node = node
        # The newest row is already there, and is ours: what is measured begins between two rows.
        self._since_ns, self._last_ns = time.monotonic_ns(), -1
        self._lost = 0
        # Where each of our columns is in the daemon's rows; None while they are the same.
        self._columns: list[int | None] | None = None
        self._reader = self._map(facts, descriptor)
        self.spec, self.coarse = str(facts["spec"]), bool(facts["coarse"])
        self.period_ns = int(facts["period_ns"])
        self.channels = _channels(facts)

    def wait_ready(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def read(self) -> RawRows | None:
        """As `_core.Sampler.read`. When nothing is left, sees to it that the daemon is there."""
        while (batch := self._reader.read()) is not None:
            if fresh := self._fresh(batch):
                return fresh
        self._node.keep_up()
        return None

    def latest(self) -> tuple[int, list[float]] | None:
        """As `_core.Sampler.latest`."""
        newest = self._reader.latest()
        if newest is None or self._columns is None:
            return newest
        t_ns, values = newest
        return t_ns, [float("nan") if place is None else values[place] for place in self._columns]

    def stop(self, timeout_s: float) -> bool:
        """Waits for the first row after now, so that what ends now lies between two rows."""
        end_ns = time.monotonic_ns()
        deadline_ns = end_ns + round(timeout_s * 1e9)
        while time.monotonic_ns() < deadline_ns:
            newest = self._reader.latest()
            if newest is not None and newest[0] >= end_ns:
                break
            self._node.keep_up()
            time.sleep(_LAST_ROW_POLL_S)
        return True  # what is missing by now is told as the daemon's absence

    @property
    def lost(self) -> int:
        """Rows that were overwritten before we read them."""
        return self._lost + self._reader.lost

    def follow(self, facts: Mapping[str, Any], descriptor: int) -> None:
        """Goes on in another daemon's ring, behind the last row that was read."""
        known = {channel.name: (n, channel) for n, channel in enumerate(_channels(facts))}
        columns: list[int | None] = []
        for channel in self.channels:
            place, same = known.get(channel.name, (-1, None))
            columns.append(place if same == channel else None)
        lost = self._reader.lost
        self._reader = self._map(facts, descriptor)
        self._lost += lost
        same_places = columns == list(range(len(known)))
        self._columns = None if same_places else columns

    def _map(self, facts: Mapping[str, Any], descriptor: int) -> _core.RingReader:
        try:
            reader = _core.RingReader(descriptor, max(self._since_ns, self._last_ns))
        except ValueError as error:
            raise PeprError("the daemon gave no ring that can be read", why=str(error)) from None
        finally:
            os.close(descriptor)
        if reader.width != len(facts["channels"]):
            raise PeprError("the daemon's ring is not what it says of it")
        return reader

    def _fresh(self, batch: RawRows) -> RawRows | None:
        """The rows behind the last one, in our order of channels; None if there are none."""
        rows, t_ns, read_ns, values = batch
        times = array("q", t_ns)
        seen = bisect.bisect_right(times, self._last_ns) if times[0] <= self._last_ns else 0
        if seen == rows:
            return None
        self._last_ns = times[-1]
        if self._columns is not None:
            unknown = array("d", [float("nan")]).tobytes() * rows
            values = [unknown if place is None else values[place] for place in self._columns]
        if seen:
            rows, t_ns, read_ns = rows - seen, t_ns[8 * seen :], read_ns[4 * seen :]
            values = [column[8 * seen :] for column in values]
        return rows, t_ns, read_ns, values


def _channels(facts: Mapping[str, Any]) -> tuple[Channel, ...]:
    try:
        return tuple(Channel(**channel) for channel in facts["channels"])
    except TypeError as error:
        raise PeprError("the daemon describes a lane strangely", why=str(error)) from None
