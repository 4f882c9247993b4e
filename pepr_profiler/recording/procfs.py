"""What /proc says about a process."""

# pathlib would cost the command line's start 5 ms.
# ruff: noqa: PTH115, PTH123, PTH208

from __future__ import annotations

# pathlib would cost the command line's start 5 ms.
# ruff: noqa: PTH115, PTH123, PTH208
import os
from collections.abc import Iterator
from dataclasses import dataclass

# --- /proc ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    flags: int


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_stat(pid: int) -> _Stat:
    # Field 2, the command, may hold spaces and parentheses: the last ) ends it.
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[6]))


def _status(pid: int) -> dict[str, list[str]]:
    lines = _read(f"/proc/{pid}/status").decode(errors="replace").splitlines()
    parts = (line.partition(":") for line in lines)
    return {name: values.split() for name, _, values in parts}


def _command(pid: int) -> tuple[str, ...]:
    """The command line of a process, or where it has none its name in brackets; () if gone."""
    try:
        # A program that writes a title of its own there leaves NULs behind it.
        words = os.fsdecode(_read(f"/proc/{pid}/cmdline").rstrip(b"\0")).split("\0")
        if words != [""]:
            return tuple(words)
        return (f"[{os.fsdecode(_read(f'/proc/{pid}/comm')).strip()}]",)
    except FileNotFoundError:
        return ()
    except ProcessLookupError:  # it went while it was read
        return ()


def _inner_pid(pid: int) -> int | None:
    """The innermost PID of a process in a namespace below that of our /proc."""
    pids = _status(pid).get("NSpid", [])
    return int(pids[-1]) if len(pids) > 1 else None


def _from_inside(pid: int) -> list[int]:
    """Which processes some container knows by this PID."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if _inner_pid(int(name)) == pid:
                    found.append(int(name))
            except OSError:
                continue  # it ended meanwhile, or is not shown to us
    return found


def _leader_of(pid: int) -> int | None:
    """The process of a thread; None for what is none."""
    try:
        leader = int(_status(pid)["Tgid"][0])
    except (OSError, KeyError):
        return None
    return leader if leader != pid else None


def _ancestors(pid: int) -> Iterator[int]:
    """The parent of a process, its parent, and so on, as far as /proc shows them."""
    while True:
        try:
            pid = _read_stat(pid).parent
        except OSError:
            return
        if pid == 0:
            return
        yield pid


def _proc_options() -> dict[str, str]:
    """How the /proc that we see is mounted."""
    options: dict[str, str] = {}
    for line in _read("/proc/self/mountinfo").decode(errors="replace").splitlines():
        mount, _, super_block = line.partition(" - ")
        if mount.split()[4] == "/proc":  # the last one mounted there covers the others
            parts = (option.partition("=") for option in super_block.split()[-1].split(","))
            options = {name: value for name, _, value in parts}
    return options


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
