"""What /proc says about a process: the one place that reads it in Python.

Without psutil, which takes 14 ms and 1.3 MB of the program that records itself, and which has
neither the PIDs of inner namespaces nor the mount options of /proc.
"""

# pathlib would delay the child's start by 5 ms.
# ruff: noqa: PTH115, PTH116, PTH123, PTH208

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator

from pepr_profiler.record import Record
from pepr_profiler.units import utf8_text

_STAT_BYTES = 4096  # 52 numbers and a name of 15 (kernel threads: 63) bytes take less
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class Stat(Record):
    """A process as /proc/PID/stat has it; a PID and `start_ticks` name one process for ever.

    `inode` is that of the directory /proc/PID, if it was listed: the next process that gets this
    PID has another.
    """

    name: bytes
    state: str
    parent: int
    flags: int
    cpu_s: float
    start_ticks: int
    inode: int = 0


def read_stat(pid: int) -> Stat:
    """Raises OSError for a process that is gone, or that is hidden from us."""
    # Without a file object, which makes four times as many system calls.
    fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, _STAT_BYTES)
    finally:
        os.close(fd)
    # Field 2, the name, may hold spaces and parentheses: the last ) ends it. proc(5) counts from 1.
    end = text.rfind(b")")
    fields = text[end + 2 :].split(None, 20)
    if end < 0 or len(fields) < 20:
        raise ProcessLookupError(f"/proc/{pid}/stat is cut off")
    return Stat(
        name=text[text.find(b"(") + 1 : end],
        state=fields[0].decode(),
        parent=int(fields[1]),
        flags=int(fields[6]),
        cpu_s=(int(fields[11]) + int(fields[12])) * _TICK_S,
        start_ticks=int(fields[19]),
    )


def find_stat(pid: int) -> Stat | None:
    """As `read_stat`; None for a process that is gone or hidden."""
    try:
        return read_stat(pid)
    except OSError:
        return None


def cpu_clock_s(pid: int) -> float | None:
    """CPU time of a process by its clock, at a tenth of the price of `read_stat`; None if gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) names it
    except OSError:  # it has ended; or a sandbox has no such clocks
        return None


def command_of(pid: int) -> tuple[str, ...]:
    """The command line of a process, or its name in brackets if it has none; () if it is gone.

    Raises OSError if it is hidden from us.
    """
    try:
        # A program that writes a title of its own there leaves NULs behind it.
        words = utf8_text(os.fsdecode(_read(f"/proc/{pid}/cmdline").rstrip(b"\0"))).split("\0")
        if words != [""]:
            return tuple(words)
        return (f"[{utf8_text(os.fsdecode(_read(f'/proc/{pid}/comm'))).strip()}]",)
    except (FileNotFoundError, ProcessLookupError):  # the latter: it went while it was read
        return ()


def environ_of(pid: int) -> tuple[bytes, ...]:
    """The environment that a process was started with, as NAME=VALUE; () if it cannot be read."""
    try:
        return tuple(entry for entry in _read(f"/proc/{pid}/environ").split(b"\0") if entry)
    except OSError:
        return ()


def owner_of(pid: int) -> str | None:
    """The name of the user that a process runs as; None if it is gone or hidden."""
    try:
        return _user_name(os.stat(f"/proc/{pid}").st_uid)
    except OSError:
        return None


def ancestors_of(pid: int) -> Iterator[int]:
    """The parent of a process, its parent, and so on, as far as /proc shows them."""
    while (stat := find_stat(pid)) is not None and stat.parent > 0:
        pid = stat.parent
        yield pid


def inner_pid_of(pid: int) -> int | None:
    """The innermost PID of a process in a namespace below that of our /proc; else None.

    Raises OSError for a process that is gone, or that is hidden from us.
    """
    pids = _status(pid).get("NSpid", [])
    return int(pids[-1]) if len(pids) > 1 else None


def find_by_inner_pid(inner_pid: int) -> list[int]:
    """Which processes some container knows by this PID."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if inner_pid_of(int(name)) == inner_pid:
                    found.append(int(name))
            except OSError:
                continue  # it ended meanwhile, or is not shown to us
    return found


def process_of_thread(tid: int) -> int | None:
    """The process of a thread; None for what is no thread."""
    try:
        leader = int(_status(tid)["Tgid"][0])
    except (OSError, KeyError):
        return None
    return leader if leader != tid else None


def is_in_container() -> bool:
    """Whether our PIDs are not those of the machine."""
    try:
        # PROC_PID_INIT_INO, include/linux/proc_ns.h
        return os.readlink("/proc/self/ns/pid") != "pid:[4026531836]"
    except OSError:
        return False


def mount_options() -> dict[str, str]:
    """How the /proc that we see is mounted."""
    options: dict[str, str] = {}
    for line in _read("/proc/self/mountinfo").decode(errors="replace").splitlines():
        mount, _, super_block = line.partition(" - ")
        if mount.split()[4] == "/proc":  # the last one mounted there covers the others
            parts = (option.partition("=") for option in super_block.split()[-1].split(","))
            options = {name: value for name, _, value in parts}
    return options


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _status(pid: int) -> dict[str, list[str]]:
    lines = _read(f"/proc/{pid}/status").decode(errors="replace").splitlines()
    parts = (line.partition(":") for line in lines)
    return {name: values.split() for name, _, values in parts}


@functools.cache
def _user_name(uid: int) -> str:
    """Asked once a user: on a cluster the answer may come over the network."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


_COERCED_LOCALES = frozenset({"C.UTF-8", "C.utf8", "UTF-8"})  # PEP 538's targets


def given_environment() -> dict[str, str]:
    """Our environment as we were given it.

    In a C locale CPython puts LC_CTYPE=C.UTF-8 into its own environment (PEP 538), which would
    change a child's locale; the kernel still shows the block that exec was given.
    """
    environment = dict(os.environ)
    if environment.get("LC_CTYPE") in _COERCED_LOCALES:
        with open("/proc/self/environ", "rb") as file:
            given = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
        if b"LC_CTYPE" in given:
            environment["LC_CTYPE"] = os.fsdecode(given[b"LC_CTYPE"])
        else:
            del environment["LC_CTYPE"]
    return environment
