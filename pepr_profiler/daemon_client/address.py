"""Where the daemon's socket may be."""

from __future__ import annotations

import os
from pathlib import Path

SOCKET_VARIABLE = "PEPR_DAEMON"
"""Names the daemon's socket instead of the usual places; "off": use no daemon."""

SYSTEM_SOCKET = Path("/run/pepr-profiler/daemon.sock")


def socket_paths() -> list[Path]:
    """Where a daemon may listen; the user's own comes first."""
    given = os.environ.get(SOCKET_VARIABLE)
    if given:
        return [] if given == "off" else [Path(given)]
    own = own_socket()
    return [*([own] if own else []), SYSTEM_SOCKET]


def sockets_there() -> list[Path]:
    """Those of `socket_paths` that exist and that we may reach.

    After `su`, XDG_RUNTIME_DIR is another user's directory, which we may not enter.
    """
    return [path for path in socket_paths() if os.path.exists(path)]  # noqa: PTH110  never raises


def own_socket() -> Path | None:
    """Where a daemon that serves this user alone listens."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "pepr-profiler" / "daemon.sock" if runtime else None
