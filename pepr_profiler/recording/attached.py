"""Processes that already run: found, checked, followed to their end, and never touched.

    stop = StopSignals()                          # from here on Ctrl-C ends us in order
    with hold([4121, 4122]) as targets:
        …                                         # record them: processes:pids=4121,4122
        ended = targets.watch(tick=recorder_tick, every_s=0.5, stop=stop)

A pidfd names one process for ever; a PID names it only until the kernel gives the number to another
one. So the pidfd is opened first, then /proc is read, and then the pidfd shows whether the process
still lives. No signal is sent to a target, and it is neither stopped nor reaped.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pepr_profiler.errors import TargetError, UsageError, warning
from pepr_profiler.recording import procfs
from pepr_profiler.recording.cgroups import members_of, oldest_of
from pepr_profiler.recording.procfs import ancestors_of, command_of
from pepr_profiler.sensors.spec import ProcessRoot

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PF_KTHREAD = 0x00200000  # include/linux/sched.h
_FROM_START = "to measure it from its start: pepr-profile -- CMD"
_LISTED = 3
_SHOWN = 40  # characters of a command in a message


class StopSignals:
    """Turns signals into something to wait for, until `close()`: `fd` is readable when one came.

    None of them interrupts anything then: a second Ctrl-C must not cost the summary. One that was
    ignored before stays ignored (nohup) unless `ignored_too`. Use it in the main thread.
    """

    def __init__(self, signals: Sequence[int] = _STOPS, *, ignored_too: bool = False) -> None:
        self._received: list[int] = []
        self.fd, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            signo: signal.signal(signo, lambda number, _: self._received.append(number))
            for signo in signals
            if ignored_too or signal.getsignal(signo) is not signal.SIG_IGN
        }

    @property
    def received(self) -> str | None:
        """The name of the first of them that came, if one did."""
        return signal.Signals(self._received[0]).name if self._received else None

    def close(self) -> None:
        """Restores what these signals did before."""
        for signo, action in self._before.items():
            signal.signal(signo, action)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.fd)
        os.close(self._writer)

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One running process; `inner_pid` is what its own PID namespace (a container) calls it."""

    pid: int
    fd: int
    command: tuple[str, ...]
    inner_pid: int | None

    @property
    def ended(self) -> bool:
        """Whether it has exited, collected by its parent or not."""
        return _is_ready(self.fd)

    def __str__(self) -> str:
        inside = f", PID {self.inner_pid} of its container" if self.inner_pid is not None else ""
        return f"{_who(self.pid, self.command)}{inside}"


class Targets:
    """Running processes that are followed by their pidfds; made by `hold`.

    `root` says whose they are to the process lane, `command` is that of the first, and `facts` has
    the "pid" and "command" of each, as run.json has them under `attached`.
    """

    def __init__(self, targets: Sequence[Target], warnings: Sequence[dict[str, str]]) -> None:
        self._held = list(targets)
        self.warnings = list(warnings)

    @property
    def root(self) -> ProcessRoot:
        return ProcessRoot.of_pids(target.pid for target in self.roots)

    @property
    def command(self) -> tuple[str, ...]:
        return self.roots[0].command

    @property
    def facts(self) -> list[dict[str, Any]]:
        return [{"pid": target.pid, "command": target.command} for target in self.roots]

    def __str__(self) -> str:
        return f"{' and '.join(map(str, self.roots))} and what they start"

    @property
    def roots(self) -> list[Target]:
        """Those that descend from none of the others: to follow these is to follow all."""
        pids = {target.pid for target in self._held}
        return [t for t in self._held if not pids & set(ancestors_of(t.pid))]

    def drop_ended(self) -> bool:
        """Drops those that have exited. Returns whether there were any.

        Raises TargetError if none is left.
        """
        gone = [target for target in self._held if target.ended]
        for target in gone:
            os.close(target.fd)
            self._held.remove(target)
            text = f"{target} exited while pepr-profile attached to it; it is not in the figures"
            self.warnings.append(warning("target-ended", text, _FROM_START))
        if not self._held:
            raise _ended(str(gone[0]) if gone else "the process")
        return bool(gone)

    def watch(
        self,
        *,
        tick: Callable[[], bool],
        every_s: float,
        stop: StopSignals,
        until_ns: int | None = None,
    ) -> str:
        """Waits until all have exited ("exit"), `until_ns` ("duration"), or a signal (its name).

        `tick` runs every `every_s`, at absolute deadlines of which missed ones are skipped, and
        once more as soon as the last of them exits. It returns whether any process that they
        started still lives; then the wait goes on.
        """
        every_ns = round(every_s * 1e9)
        deadline_ns = time.monotonic_ns() + every_ns
        poller = select.poll()
        poller.register(stop.fd, select.POLLIN)
        living = {target.fd for target in self._held}
        for fd in living:
            poller.register(fd, select.POLLIN)
        while True:
            now_ns = time.monotonic_ns()
            if until_ns is not None and now_ns >= until_ns:
                return "duration"
            if now_ns >= deadline_ns:
                deadline_ns += ((now_ns - deadline_ns) // every_ns + 1) * every_ns
                if not tick() and not living:
                    return "exit"
                continue
            wake_ns = min(deadline_ns, until_ns or deadline_ns)
            ready = {fd for fd, _ in poller.poll(-((now_ns - wake_ns) // 1_000_000))}
            if stop.received is not None:
                return stop.received
            for fd in living & ready:
                poller.unregister(fd)
                living.remove(fd)
                if not living:
                    deadline_ns = time.monotonic_ns()

    def close(self) -> None:
        """Closes all pidfds."""
        for target in self._held:
            os.close(target.fd)
        self._held.clear()

    def __enter__(self) -> Targets:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CgroupTargets(Targets):
    """Whatever is in a cgroup, until it is empty; made by `hold_cgroup`."""

    def __init__(self, folder: str, first: Sequence[int], warnings: Sequence[dict[str, str]]):
        super().__init__((), warnings)
        self._folder = folder
        commands = {pid: command_of(pid) for pid in first}
        # These only start and watch what is to be measured.
        named = [pid for pid in first if not _is_monitor(commands[pid])] or list(first)
        self._first = named[0], commands[named[0]]

    @property
    def root(self) -> ProcessRoot:
        return ProcessRoot.of_cgroup(self._folder)

    @property
    def command(self) -> tuple[str, ...]:
        return self._first[1]

    @property
    def facts(self) -> list[dict[str, Any]]:
        return [dict(zip(("pid", "command"), self._first, strict=True))]

    def drop_ended(self) -> bool:
        """Nobody has to live on: who has ended is in what the kernel counted."""
        return False

    def __str__(self) -> str:
        return f"cgroup {self._folder} (first: {_who(*self._first)})"


def hold_cgroup(folder: str) -> Targets:
    """Follows a cgroup. Raises TargetError if no process is in it that can be seen."""
    first = oldest_of(folder, most=64)
    if not first:
        raise TargetError(
            f"no process is in the cgroup {folder}",
            why="it is empty, or its processes are of a PID namespace that is not shown here",
            fix="name one that works (systemd-cgls shows all), and attach from the host; to wait "
            "for what a command starts in it: pepr-profile run --follow cgroup:PATH -- CMD",
        )
    warnings = []
    if os.getpid() in members_of(folder):
        text = f"pepr-profile itself was started in the cgroup {folder}: whatever else is there is "
        hint = "attach to the cgroup of the program itself"
        warnings.append(warning("attached-to-ancestor", f"{text}in the figures", hint))
    return CgroupTargets(folder, first, warnings)


def _is_monitor(command: Sequence[str]) -> bool:
    return not command or command[0].rpartition("/")[2].startswith(("slurmstepd", "conmon"))


def hold(pids: Sequence[int]) -> Targets:
    """Opens running processes to follow them; one that is named twice is followed once.

    Raises TargetError for a process that cannot be followed (there is none, /proc hides it, it is a
    zombie or a thread of the kernel), and UsageError for what is no PID or would be ourselves. No
    pidfd is open then.
    """
    if not pids:
        raise UsageError(
            "no process to attach to", why="no PID is given", fix="pepr-profile attach 4121"
        )
    targets: list[Target] = []
    warnings: list[dict[str, str]] = []
    try:
        for pid in dict.fromkeys(pids):
            targets.append(_hold_one(pid))
            if pid in ancestors_of(os.getpid()):
                warnings.append(_of_ancestor(targets[-1]))
    except BaseException:
        Targets(targets, ()).close()
        raise
    return Targets(targets, warnings)


def _hold_one(pid: int) -> Target:
    if pid < 1:
        raise UsageError(
            f"{pid} is not a PID", why="PIDs are positive", fix="see: ps -eo pid,user,args"
        )
    if pid == os.getpid():
        raise UsageError(
            f"{pid} is this process itself",
            why="a profiler that follows itself measures its own work",
            fix="attach to another process; in code: with profile(NAME): without pids",
        )
    fd = _open(pid)
    try:
        try:
            stat, command = procfs.read_stat(pid), command_of(pid)
            inner_pid = procfs.inner_pid_of(pid)
        except OSError as error:
            # Gone, or not shown to us: the pidfd, which needs no /proc, knows.
            raise (_ended(str(pid)) if _is_ready(fd) else _hidden(pid, error)) from error
        if stat.flags & _PF_KTHREAD:
            raise TargetError(
                f"{_who(pid, command)} is a thread of the kernel",
                why="it works for all who need the kernel, and belongs to no job",
                fix="attach to the program that causes its work",
            )
        if _is_ready(fd):
            if stat.state != "Z":
                raise _ended(_who(pid, command))
            parent = _who(stat.parent, command_of(stat.parent))
            raise TargetError(
                f"{_who(pid, command)} has ended already",
                why=f"it is a zombie: its parent {parent} has not collected it",
                fix=f"attach to what still runs; {_FROM_START}",
            )
        if pid == 1 and pid in ancestors_of(os.getpid()):
            raise TargetError(
                f"{_who(pid, command)} is where every process comes from, the profiler too",
                why="following it would follow everything that runs here",
                fix="name the program itself (see: ps -eo pid,user,args); for the whole machine: "
                "pepr-profile --scope device -- sleep 60",
            )
    except BaseException:
        os.close(fd)
        raise
    return Target(pid=pid, fd=fd, command=command, inner_pid=inner_pid)


def _open(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OverflowError:
        raise _no_such(pid) from None
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise TargetError(
                f"{pid} cannot be followed",
                why="this kernel has no pidfds, and a PID alone may come to name another process",
                fix="use Linux 5.3 or newer, or start the program under pepr-profile",
            ) from error
        if error.errno == errno.EPERM:
            raise TargetError(
                f"{pid} cannot be followed",
                why="pidfd_open is not permitted here, as in a container with an old seccomp "
                "profile",
                fix="attach from the host, or: docker run --security-opt seccomp=unconfined …",
            ) from error
        leader = procfs.process_of_thread(pid)
        if leader is not None:  # EINVAL, or ENOENT since Linux 6.9: a thread has none of its own
            raise TargetError(
                f"{pid} is a thread, not a process",
                why=f"it is one of {_who(leader, command_of(leader))}",
                fix=f"pepr-profile attach {leader}",
            ) from error
        raise _no_such(pid) from error


# --- what went wrong ------------------------------------------------------------------------------


def _ended(who: str) -> TargetError:
    return TargetError(
        f"{who} exited while pepr-profile attached to it",
        why="nothing of it is left to measure",
        fix=_FROM_START,
    )


def _no_such(pid: int) -> TargetError:
    why, fix = "no process has this PID", "see which there are: ps -eo pid,user,args"
    outer = procfs.find_by_inner_pid(pid)
    if outer:
        names = ", ".join(_who(other, command_of(other)) for other in outer[:_LISTED])
        why += f" here; in its container {names} has"
        fix = f"name it as it is called here: pepr-profile attach {outer[0]}"
    elif procfs.is_in_container():
        why += " in this container, where those of the host mean nothing"
    return TargetError(f"there is no process {pid}", why=why, fix=fix)


def _hidden(pid: int, error: OSError) -> TargetError:
    """A process that runs and that /proc does not show us."""
    owner = procfs.owner_of(pid)
    options = procfs.mount_options()
    hidepid = options.get("hidepid", "0")
    why = f"/proc does not let us read it ({error.strerror})"
    if hidepid not in ("0", "off"):
        why = f"/proc is mounted with hidepid={hidepid} and shows a process to its owner alone"
    ways = [f"run pepr-profile as {owner or 'the user it runs as'}"]
    ways.append("with sudo" if os.geteuid() else "with CAP_SYS_PTRACE")
    # hidepid=4 (ptraceable) knows no group. One that is not stated is root's.
    if "gid" in options and hidepid not in ("4", "ptraceable"):
        ways.append(f"as a member of group {options['gid']}")
    return TargetError(
        f"process {pid} may not be followed",
        why=f"it runs as {owner}, and {why}" if owner else f"it is another user's, and {why}",
        fix=", or ".join(ways),
    )


def _of_ancestor(target: Target) -> dict[str, str]:
    return {
        "code": "attached-to-ancestor",
        "text": f"pepr-profile itself was started from {target}: whatever else was, now and "
        "later, is in the figures",
        "hint": "attach to the program itself",
    }


def _who(pid: int, command: Sequence[str]) -> str:
    text = " ".join(" ".join(command).split())
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    return f"{pid} ({shown})" if shown else str(pid)


def _is_ready(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
