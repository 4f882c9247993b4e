"""Where the node's daemon may listen."""

from __future__ import annotations

import os
from pathlib import Path

SOCKET_VARIABLE = "PEPR_DAEMON"
"""Where the node's daemon listens, instead of the usual places; "off": there is none."""

SYSTEM_SOCKET = Path("/run/pepr-profiler/daemon.sock")


def socket_paths() -> list[Path]:
    """Where a daemon may listen: the user's own comes first."""
    given = os.environ.get(SOCKET_VARIABLE)
    if given:
        return [] if given == "off" else [Path(given)]
    own = own_socket()
    return [*([own] if own else []), SYSTEM_SOCKET]


def sockets_there() -> list[Path]:
    """Those of `socket_paths` where something is for us.

    `su` leaves XDG_RUNTIME_DIR another user's, which we may not look into.
    """
    return [path for path in socket_paths() if os.path.exists(path)]  # noqa: PTH110  it never raises


def own_socket() -> Path | None:
    """Where a daemon of this user alone listens."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "pepr-profiler" / "daemon.sock" if runtime else None
