"""The daemon's socket, its privileges, and its integration with systemd."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pepr_profiler import _core
from pepr_profiler.daemon_client.address import SYSTEM_SOCKET, own_socket
from pepr_profiler.errors import PeprError, UsageError

ACCOUNT = "pepr-profiler"
"""The account that a daemon becomes which root starts; `nobody` where there is none."""

_LISTEN_FD = 3  # sd_listen_fds(3)
_BACKLOG = 512  # 200 clients may come at once, each waits for milliseconds

_SO_PEERPIDFD = getattr(socket, "SO_PEERPIDFD", 77)  # Linux 6.5

NO_DESCRIPTORS_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""The errors of accept(2) that pass when a connection ends."""

# linux/capability.h. Opening counters takes no more than these: to read files of root's, and to
# count the events of a whole machine.
_DAC_READ_SEARCH, _PERFMON = 2, 38
_OPENING = 1 << _DAC_READ_SEARCH | 1 << _PERFMON


# --- the socket -----------------------------------------------------------------------------------


def default_path() -> Path:
    """Where a daemon of this user listens. Raises UsageError if there is no safe place."""
    path = SYSTEM_SOCKET if os.geteuid() == 0 else own_socket()
    if path is None:
        raise UsageError(
            "there is no place for the daemon's socket",
            why="XDG_RUNTIME_DIR is not set",
            fix="give --socket FILE in a directory that is yours, and PEPR_DAEMON=FILE to clients",
        )
    return path


def inherited_socket() -> socket.socket | None:
    """The listener that systemd opened for us, if any. Raises PeprError if it is of no use."""
    mine = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not mine or count in ("", "0"):
        return None
    listener = socket.socket(fileno=os.dup(_LISTEN_FD))
    os.close(_LISTEN_FD)
    kind = listener.family, listener.type & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    accepts = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if count != "1" or kind != (socket.AF_UNIX, socket.SOCK_SEQPACKET) or not accepts:
        listener.close()
        raise PeprError(
            "the socket unit does not fit",
            why="it must pass one listening Unix socket that keeps packets apart",
            fix="use ListenSequentialPacket= in pepr-profiler.socket",
        )
    return listener


def listen(path: Path, *, mode: int, gid: int = -1) -> socket.socket:
    """A listener at `path`, in a directory that only we may write to.

    The file's `mode` and, if it is not -1, its group `gid` say who may connect.
    Whoever can write to the directory could replace the socket by their own. So the directory must
    be ours, no symbolic link, and closed to others, and everything is done through its descriptor.
    Raises PeprError for a directory that is not safe, and if a daemon runs already.
    """
    try:
        made = not path.parent.exists()
        path.parent.mkdir(mode=0o755, exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory = os.open(path.parent, flags)
    except OSError as error:
        raise _unsafe(path.parent, error.strerror or str(error)) from None
    try:
        if made and os.fstat(directory).st_uid == os.geteuid():
            os.fchmod(directory, 0o755)  # mkdir's mode was subject to the umask
        about = os.fstat(directory)
        if about.st_uid != os.geteuid():
            raise _unsafe(path.parent, f"it belongs to user {about.st_uid}")
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _unsafe(path.parent, "others may write to it")
        _lock(directory, path)
        return _bound(directory, path.name, mode, gid)
    except OSError as error:
        raise PeprError(
            f"the daemon cannot listen at {path}",
            why=error.strerror or str(error),
            fix="give --socket FILE elsewhere",
        ) from None
    finally:
        os.close(directory)


def _lock(directory: int, path: Path) -> None:
    """Takes the lock that this process keeps for life: a socket beside a free lock is dead."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(f"{path.name}.lock", flags, 0o600, dir_fd=directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise PeprError(
            f"a daemon runs already at {path}",
            why="it holds the lock beside its socket",
            fix="stop it: pepr-profile daemon stop",
        ) from None


def _bound(directory: int, name: str, mode: int, gid: int) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise PeprError(f"{name} is in the way", why="it is no socket", fix="remove it")
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)  # closed to others until group and mode are set
    try:
        listener.bind(f"/proc/self/fd/{directory}/{name}")
        if gid >= 0:
            os.chown(name, -1, gid, dir_fd=directory, follow_symlinks=False)
        os.chmod(name, mode, dir_fd=directory)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _unsafe(directory: Path, why: str) -> PeprError:
    return PeprError(
        f"{directory} is no safe place for the daemon's socket",
        why=why,
        fix="give --socket FILE in a directory that is yours and that only you may write to",
    )


def group_id(name: str) -> int:
    """A group by name or number. Raises UsageError if there is none."""
    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(
            f"there is no group '{name}'",
            why="the system does not know it",
            fix=f"create it: groupadd --system {name}",
        ) from None


# --- privileges -----------------------------------------------------------------------------------


def account(name: str | None) -> pwd.struct_passwd:
    """The account to become: the one asked for, else `pepr-profiler`, else `nobody`."""
    for candidate in (name,) if name else (ACCOUNT, "nobody"):
        try:
            entry = pwd.getpwnam(candidate)
        except KeyError:
            continue
        if entry.pw_uid == 0:
            break
        return entry
    raise UsageError(
        f"the daemon cannot become '{name or ACCOUNT}'",
        why="there is no such account, or it is root",
        fix=f"create it: useradd --system --no-create-home {ACCOUNT}; or give --user NAME",
    )


def confine(become: pwd.struct_passwd | None) -> bool:
    """Keeps only the capabilities that open counters, and becomes another user if root.

    To be called before any thread exists. From then on nothing that is executed gains privileges.
    Returns whether any capability is left.
    """
    _core.forbid_privileges()  # first: only root may empty the bounding set
    if os.geteuid() == 0 and become is not None:
        uid, gid = become.pw_uid, become.pw_gid
        _core.keep_across_setuid(True)
        os.initgroups(become.pw_name, gid)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        _core.keep_across_setuid(False)
    _core.keep_capabilities(_OPENING)
    return capabilities() != 0


def capabilities() -> int:
    """The permitted capabilities of this thread, as a mask."""
    with Path("/proc/thread-self/status").open(encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith("CapPrm")).split()[1], 16)


def owner_of(pid: int) -> int | None:
    """The real user of a process; None if there is no such process that we may see."""
    try:
        return int(psutil.Process(pid).uids().real)
    except psutil.Error:
        return None


def peer_numbers(connection: socket.socket, pid: int) -> list[int]:
    """The numbers of the process at the other end: as we see it, …, as it sees itself.

    Several if it is in a PID namespace below ours. `pid`: what SO_PEERCRED says.
    """
    try:
        # A pidfd's numbers are its process's, also where /proc shows no process of others.
        descriptor = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        try:
            lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
        finally:
            os.close(descriptor)
    except OSError:  # before Linux 6.5, or it has gone
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return [pid]
    found = next((line for line in lines.splitlines() if line.startswith("NSpid:")), "")
    return [int(number) for number in found.split()[1:]] or [pid]


# --- systemd --------------------------------------------------------------------------------------


class ServiceManager:
    """The service manager that started us and wants to be notified (sd_notify(3)), if any."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = os.environ.pop("WATCHDOG_USEC", "")
        mine = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = float(watchdog_us) / 2e6 if mine and watchdog_us.isdigit() else None
        self._socket: socket.socket | None = None
        if address[:1] in ("/", "@"):
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._socket = socket.socket(socket.AF_UNIX, kind)
            with self._unless_gone():
                # Now: the user that we become may not be allowed to reach it.
                self._socket.connect(f"\0{address[1:]}" if address[0] == "@" else address)

    def notify(self, **facts: str) -> None:
        """Sends READY="1", STATUS="…", STOPPING="1" or WATCHDOG="1"; a manager may be gone."""
        if self._socket is not None:
            with self._unless_gone():
                self._socket.send("\n".join(f"{k}={v}" for k, v in facts.items()).encode())

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
