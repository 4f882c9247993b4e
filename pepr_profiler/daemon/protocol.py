"""What a client may say, checked before anything is done with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pepr_profiler.errors import PeprError
from pepr_profiler.node import MOST_REQUEST_BYTES, VERSION

OPERATIONS = ("hello", "open", "status", "register", "unregister", "stop")

_MOST_NAME = 128


class ProtocolError(PeprError):
    """A message that is none of ours. Its sender is told why, and is then left."""


@dataclass(frozen=True)
class Request:
    """One message of a client. `lane` and `run` are printable and short; `pid` is positive."""

    operation: str
    lane: str = ""
    run: str = ""
    pid: int | None = None


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
    if operation in ("register", "unregister") and not request.run:
        raise _wrong(f"{operation} needs a run")
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


def _wrong(why: str) -> ProtocolError:
    return ProtocolError("the message is not understood", why=why, fix="see docs/daemon.md")
