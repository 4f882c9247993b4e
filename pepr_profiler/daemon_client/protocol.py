"""What a client may say, checked before anything is done with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pepr_profiler.errors import PeprError

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any

OPERATIONS = ("hello", "open", "status", "register", "unregister", "claim", "stop")

_MOST_NAME = 128
_MOST_DEVICES, _MOST_SECONDS = 64, 16


class ProtocolError(PeprError):
    """A message that is none of ours. Its sender is told why, and is then left."""


@dataclass(frozen=True)
class Request:
    """One message of a client. `lane` and `run` are printable and short; `pid` is positive.

    `shares` are numbers in [0, 1] by device, in the seconds from `first_s` on.
    """

    operation: str
    lane: str = ""
    run: str = ""
    pid: int | None = None
    first_s: int = 0
    shares: Mapping[str, Sequence[float]] = field(default_factory=dict)


def parse(data: bytes) -> Request:
    """The request in a message. Raises ProtocolError for anything else, whatever the bytes."""
    if len(data) > MOST_REQUEST_BYTES:
        raise _wrong(f"it is longer than {MOST_REQUEST_BYTES} bytes")
    try:
        message = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _wrong("it is no JSON object in UTF-8") from None
    if not isinstance(message, dict):
        raise _wrong("it is no JSON object")
    if message.get("v") != VERSION or isinstance(message["v"], bool):
        raise _wrong(f"this daemon speaks version {VERSION}")
    operation = message.get("op")
    if operation not in OPERATIONS:
        raise _wrong(f"op is none of {', '.join(OPERATIONS)}")
    request = Request(
        operation, _name(message, "lane"), _name(message, "run"), _pid(message.get("pid"))
    )
    if operation == "open" and not request.lane:
        raise _wrong("open needs a lane")
    if operation in ("register", "unregister", "claim") and not request.run:
        raise _wrong(f"{operation} needs a run")
    if operation == "claim":
        return replace(request, first_s=_second(message.get("first_s")), shares=_shares(message))
    return request


def _name(message: dict[str, Any], key: str) -> str:
    name = message.get(key, "")
    if not isinstance(name, str) or len(name) > _MOST_NAME or not (name.isprintable()):
        raise _wrong(f"{key} is no printable name of at most {_MOST_NAME} characters")
    return name


def _pid(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise _wrong("pid is no process")
    return value


def _second(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise _wrong("first_s is no second")
    return value


def _shares(message: dict[str, Any]) -> dict[str, list[float]]:
    shares = message.get("shares")
    if not isinstance(shares, dict) or len(shares) > _MOST_DEVICES:
        raise _wrong(f"shares is no object of at most {_MOST_DEVICES} devices")
    return {device: [_share(s) for s in _listed(told)] for device, told in shares.items()}


def _listed(told: Any) -> list[Any]:
    if not isinstance(told, list) or len(told) > _MOST_SECONDS:
        raise _wrong(f"a device's shares are no list of at most {_MOST_SECONDS}")
    return told


def _share(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise _wrong("a share is no number from 0 to 1")
    return float(value)


def _wrong(why: str) -> ProtocolError:
    return ProtocolError("the message is not understood", why=why, fix="see docs/daemon.md")


VERSION = 1
MOST_REQUEST_BYTES = 4096
MOST_REPLY_BYTES = 1 << 17  # a lane of 16 GPUs takes 40 kB; a socket's buffer holds 208 kB
