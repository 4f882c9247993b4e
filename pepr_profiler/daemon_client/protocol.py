"""What client and daemon say to each other; docs/daemon.md, "Messages", has the list."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence

from pepr_profiler import _core
from pepr_profiler.errors import PeprError
from pepr_profiler.record import Any, Record

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    import socket  # 5 ms; most recordings have no use for it

VERSION = 1
MOST_REQUEST_BYTES = 4096
MOST_REPLY_BYTES = 1 << 17  # a lane of 16 GPUs takes 40 kB; a socket's buffer holds 208 kB

OPERATIONS = ("hello", "open", "status", "register", "unregister", "claim", "stop")

CPU_DEVICE = "cpu"
"""All CPUs and their memory, in a claim. A GPU is called "gpu:UUID"."""

_LONGEST_NAME = 128
_MOST_BRACKETS = 512  # of a claim and of names; none is nested more than three deep
_MOST_DEVICES, _MOST_SECONDS = 64, 16


# --- requests -------------------------------------------------------------------------------------


class ProtocolError(PeprError):
    """A message that is no request. The daemon answers with it and closes the connection."""


class Request(Record):
    """One message of a client. `lane` and `run` are printable and short; `pid` is positive.

    `skip`: how many runs of a status the client has already.
    `shares` has numbers in [0, 1] for each device, one a second from `first_s` on.
    """

    operation: str
    lane: str = ""
    run: str = ""
    pid: int | None = None
    skip: int = 0
    first_s: int = 0
    shares: Mapping[str, Sequence[float]] = {}


def parse(data: bytes) -> Request:
    """The request in a message. Raises ProtocolError for anything else, whatever the bytes."""
    if len(data) > MOST_REQUEST_BYTES:
        raise _invalid(f"it is longer than {MOST_REQUEST_BYTES} bytes")
    if data.count(b"[") + data.count(b"{") > _MOST_BRACKETS:
        raise _invalid("it is nested too deeply")  # a parser takes 0.3 ms to give that up
    try:
        message = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _invalid("it is no JSON object in UTF-8") from None
    if not isinstance(message, dict):
        raise _invalid("it is no JSON object")
    if message.get("v") != VERSION or isinstance(message["v"], bool):
        raise _invalid(f"this daemon speaks version {VERSION}")
    operation = message.get("op")
    if operation not in OPERATIONS:
        raise _invalid(f"op is none of {', '.join(OPERATIONS)}")
    pid = message.get("pid")
    if pid is not None:
        pid = _whole(pid, range(1, 2**31), "pid is no process")
    request = Request(operation, _name(message, "lane"), _name(message, "run"), pid)
    if operation == "status":
        skip = _whole(message.get("skip", 0), range(2**31), "skip is no number of runs")
        return request._replace(skip=skip)
    if operation == "open" and not request.lane:
        raise _invalid("open needs a lane")
    if operation in ("register", "unregister", "claim") and not request.run:
        raise _invalid(f"{operation} needs a run")
    if operation == "claim":
        first_s = _whole(message.get("first_s"), range(2**53), "first_s is no second")
        return request._replace(first_s=first_s, shares=_shares(message.get("shares")))
    return request


def _name(message: dict[str, Any], key: str) -> str:
    name = message.get(key, "")
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
        raise _invalid(f"{key} is no printable name of at most {_LONGEST_NAME} characters")
    return name


def _whole(value: Any, allowed: range, why: str) -> int:
    if type(value) is not int or value not in allowed:
        raise _invalid(why)
    return value


def _shares(value: Any) -> dict[str, list[float]]:
    if not isinstance(value, dict) or len(value) > _MOST_DEVICES:
        raise _invalid(f"shares is no object of at most {_MOST_DEVICES} devices")
    return {device: _shares_of_device(shares) for device, shares in value.items()}


def _shares_of_device(value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) > _MOST_SECONDS:
        raise _invalid(f"a device's shares are no list of at most {_MOST_SECONDS}")
    return [_share(share) for share in value]


def _share(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise _invalid("a share is no number from 0 to 1")
    return float(value)


def _invalid(why: str) -> ProtocolError:
    return ProtocolError("the message is not understood", why=why, fix="see docs/daemon.md")


# --- the connection, as both sides see it ---------------------------------------------------------


class Peer(Record):
    """Who is at the other end of a Unix socket, according to the kernel."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who connected. If we connected ourselves: who listened."""
    import socket

    layout = struct.Struct("iII")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return Peer(*layout.unpack(data))


def map_ring(descriptor: int, since_ns: int) -> _core.RingReader:
    """The ring that came with a message, read from `since_ns` on; the descriptor is closed.

    Raises ValueError if it is none.
    """
    try:
        return _core.RingReader(descriptor, since_ns)
    finally:
        os.close(descriptor)


def close_all(descriptors: Iterable[int]) -> None:
    """Closes descriptors that came with a message, or were sent with one."""
    for descriptor in descriptors:
        os.close(descriptor)
