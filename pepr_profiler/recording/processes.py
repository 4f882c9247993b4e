"""Whose processes are whose while a run is recorded: the job's, the profiler's, somebody else's.

A sensor tells PIDs, and a PID means nothing once its process has ended. So each is looked up while
it lives, and what it was is written down beside the lanes, for a report that comes years later.

Read from /proc alone; nothing is sent to a process. Imported before the child starts: light.
"""

# pathlib would delay the child's start by 5 ms.
# ruff: noqa: PTH116, PTH123

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping

from pepr_profiler.record import Record
from pepr_profiler.sensors.spec import ProcessRoot

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any, TypeAlias

_SCAN_S, _SCAN_PART, _LONGEST_SCAN_S = 10.0, 60, 60.0
_SCAN_SHARE = 400
"""All processes are looked at so seldom that it takes a four-hundredth of a core, and so often that
who comes and goes unseen has taken a sixtieth of the time."""

_NAMED = 8
_NAMED_SHARE = 0.01
"""So many others are written down, if they took so much of a core."""

_COMMAND_LENGTH = 120
_STAT_BYTES = 4096  # 52 numbers and a name of 15 (kernel threads: 63) bytes take less
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_CUDA_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")

Note: TypeAlias = "Callable[[dict[str, Any]], None]"


class _Stat(Record):
    """What /proc/PID/stat tells of a process."""

    name: bytes
    parent: int
    cpu_s: float
    start_ticks: int  # with the pid, names one process for ever
    inode: int = 0  # of /proc/PID where that was listed: the next one of this PID has another


class ProcessOwners:
    """Tells the job's processes from others, and writes down who used the machine's devices.

    `root` is what the process lane follows: "self", "children" or "pids=…". A process is the job's
    if one of its ancestors is, if it was while we looked before, or if it was started inside the
    run (`marker`, a variable and its value). `dedicated`: this process does nothing but record, and
    is no neighbour to speak of. `note` takes what is to be kept, as JSON objects:
    {"event": "process", "t_ns", "pid", "owner": "job"|"other"|"profiler"|"hidden"|"gone",
    "command", "user"} for each process on a GPU, and {"event": "cpu", "t_ns", "since_ns",
    "profiler_s", "processes": [{"pid", "cpu_s", "command", "user"}]} for the others that took most
    CPU time since `since_ns`.
    """

    def __init__(
        self,
        root: str,
        note: Note,
        *,
        dedicated: bool = True,
        marker: tuple[str, str] | None = None,
    ) -> None:
        self._note = note
        self._dedicated = dedicated and root != "self"
        self._profiler = os.getpid()
        self._marker = None if marker is None else "=".join(marker).encode()
        self._includes_self = root == "self"
        self._roots = _roots_of(root, self._profiler)
        self._job: set[tuple[int, int]] = set()
        for pid in self._roots:
            if stat := _read_stat(pid):
                self._job.add((pid, stat.start_ticks))
        self._on_gpu: dict[int, _Seen] = {}
        self._begin_ns = 0
        self._alive: dict[int, _Stat] = {}  # at the last look
        self._first: dict[int, tuple[int, float]] = {}  # pid: start, CPU seconds at the first look
        self._others: dict[tuple[int, int], dict[str, Any]] = {}
        self._next_s = 0.0

    def tick(self, others_s: float = math.inf) -> None:
        """Looks at the CPU time of all processes, if it is time for that again.

        `others_s` is what all others together have used since the first tick, if that is known:
        too little for any of them to be written down, and nobody need be looked at.
        """
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        if self._begin_ns and others_s < _NAMED_SHARE * (now_s - self._begin_ns * 1e-9):
            return
        self._scan()
        cost_s = time.monotonic() - now_s
        elapsed_s = now_s - self._begin_ns * 1e-9
        rest_s = min(max(_SCAN_S, elapsed_s / _SCAN_PART), _LONGEST_SCAN_S)
        self._next_s = now_s + max(rest_s, _SCAN_SHARE * cost_s)

    def end(self) -> None:
        """A last look; a run so short that there was no first one is spared it."""
        self.on_gpu(())
        if self._begin_ns:
            self._scan()

    # --- on GPUs ---

    @property
    def has_unidentified(self) -> bool:
        """Whether it is not known yet whose some process on a GPU is."""
        return any(seen.owner is None for seen in self._on_gpu.values())

    def on_gpu(self, pids: Iterable[int]) -> None:
        """These processes compute on some GPU now; those that are new are looked up."""
        present = set(pids)
        for pid in self._on_gpu.keys() - present:
            if self._on_gpu.pop(pid).owner is None:
                self._tell(pid, "gone", "", "")
        for pid in present:
            seen = self._on_gpu.setdefault(pid, _Seen())
            stat = _read_stat(pid)
            if stat is None:
                seen.missed += 1
                if seen.owner is None and _is_anothers(pid):
                    seen.owner = "other"  # behind a /proc that is mounted with hidepid
                elif seen.owner is None and seen.missed > 1:
                    # Listed again and again, it is none of ours: it lives in another namespace.
                    seen.owner = "hidden"
                else:
                    continue
                self._tell(pid, seen.owner, "", "")
            elif seen.owner != "job" or seen.start_ticks != stat.start_ticks:
                owner = self._owner(pid, stat)
                if (owner, stat.start_ticks) != (seen.owner, seen.start_ticks):
                    self._tell(pid, owner, _command(pid, stat.name), _user(pid))
                seen.owner, seen.start_ticks = owner, stat.start_ticks

    def _tell(self, pid: int, owner: str, command: str, user: str) -> None:
        facts = {"t_ns": time.monotonic_ns(), "pid": pid, "owner": owner}
        self._note({"event": "process", **facts, "command": command, "user": user})

    def _owner(self, pid: int, stat: _Stat) -> str:
        line: list[tuple[int, int]] = []
        at, here = pid, stat
        while True:
            key = (at, here.start_ticks)
            if key in self._job or (at == self._profiler and line and self._roots == ()):
                self._job.update(line)
                return "job"
            if at == self._profiler and not line:
                return "profiler"
            line.append(key)
            above = _read_stat(here.parent) if here.parent > 0 else None
            # A parent is older: else its pid has been given out again.
            if above is None or above.start_ticks > here.start_ticks:
                break
            at, here = here.parent, above
        if self._marker is not None and self._marker in _environ(pid).split(b"\0"):
            self._job.add((pid, stat.start_ticks))
            return "job"
        return "other"

    # --- on CPUs ---

    def _scan(self) -> None:
        now_ns = time.monotonic_ns()
        self._alive = alive = _look_again(self._alive)
        job = self._job_of(alive)
        if not self._begin_ns:
            self._begin_ns = now_ns
            self._first = {pid: (stat.start_ticks, stat.cpu_s) for pid, stat in alive.items()}
            return
        least_s = _NAMED_SHARE * (now_ns - self._begin_ns) * 1e-9
        for pid, stat in alive.items():
            if pid in job or (pid == self._profiler and self._dedicated):
                continue
            start_ticks, before_s = self._first.get(pid, (stat.start_ticks, 0.0))
            cpu_s = stat.cpu_s - (before_s if start_ticks == stat.start_ticks else 0.0)
            if cpu_s > least_s:
                known = self._others.get((pid, stat.start_ticks))
                who = known or {"pid": pid, "command": _command(pid, stat.name), "user": _user(pid)}
                self._others[pid, stat.start_ticks] = {**who, "cpu_s": round(cpu_s, 3)}
        # Those that have ended stay with what was last seen of them, until they matter no more.
        most = sorted(self._others.items(), key=lambda item: -item[1]["cpu_s"])
        self._others = {who: facts for who, facts in most if facts["cpu_s"] > least_s}
        own_s = 0.0
        if self._dedicated and (own := alive.get(self._profiler)):
            own_s = own.cpu_s - self._first[self._profiler][1]
        self._note(
            {
                "event": "cpu",
                "t_ns": now_ns,
                "since_ns": self._begin_ns,
                "profiler_s": own_s,
                "processes": list(self._others.values())[:_NAMED],
            }
        )

    def _job_of(self, alive: Mapping[int, _Stat]) -> set[int]:
        """Which of the living are the job's; remembered, for when their parents have gone."""
        verdict: dict[int, bool] = {0: False}
        for pid in alive:
            line: list[int] = []
            at = pid
            while at not in verdict:
                if at in line:  # read while PIDs were given out again: no family has a circle
                    verdict[at] = False
                    break
                stat = alive.get(at)
                line.append(at)
                if stat is None or (at == self._profiler and not self._roots):
                    verdict[at] = stat is not None
                elif (at, stat.start_ticks) in self._job:
                    verdict[at] = True
                else:
                    above = alive.get(stat.parent)
                    # A parent is older: else its PID has been given out again.
                    older = above is None or above.start_ticks <= stat.start_ticks
                    at = stat.parent if older else 0
            for below in line:
                verdict[below] = verdict[at]
        job = {pid for pid in alive if verdict[pid]}
        if not self._includes_self:
            job.discard(self._profiler)
        self._job = {(pid, alive[pid].start_ticks) for pid in job}
        return job


class _Seen:
    """A PID that a GPU lists: whose it is (None: not known yet) and since when."""

    def __init__(self) -> None:
        self.owner: str | None = None
        self.start_ticks = -1
        self.missed = 0


def cuda_environments(root: str) -> list[dict[str, str]]:
    """What tells CUDA which GPUs it may use, in each root of the job that we may read it from."""
    pids = _roots_of(root, os.getpid())
    if root in ("self", "children"):
        given: list[Mapping[str, str]] = [os.environ]
    else:
        given = [
            dict(entry.partition("=")[::2] for entry in os.fsdecode(block).split("\0"))
            for block in map(_environ, pids)
            if block
        ]
    found = [{name: env[name] for name in _CUDA_VARIABLES if name in env} for env in given]
    return [env for i, env in enumerate(found) if env not in found[:i]]


def run_around(variable: str, root: str) -> str | None:
    """The run directory that `variable` names in the roots or in an ancestor of theirs, if any."""
    start = _roots_of(root, os.getpid())[:1] or (os.getpid(),)
    if root in ("self", "children") and os.environ.get(variable):
        return os.environ[variable]
    at, name = start[0], f"{variable}=".encode()
    while at > 1:
        for entry in _environ(at).split(b"\0"):
            if entry.startswith(name):
                return os.fsdecode(entry[len(name) :])
        stat = _read_stat(at)
        at = stat.parent if stat is not None else 0
    return None


def _roots_of(root: str, profiler: int) -> tuple[int, ...]:
    """What the job descends from; nothing for "children", whose parent is not the job."""
    if root == "children":
        return ()
    if root == "self":
        return (profiler,)
    return ProcessRoot(root).pids


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it has ended, or is not for us
        return b""


def _read_stat(pid: int) -> _Stat | None:
    try:  # without a file object, which asks four times as much of the kernel
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, _STAT_BYTES)
        finally:
            os.close(fd)
    except OSError:
        return None
    # Field 2, the command, may hold spaces and parentheses: the last ) ends it. proc(5) from 1.
    end = text.rfind(b")")
    fields = text[end + 2 :].split(None, 20)
    if end < 0 or len(fields) < 20:
        return None
    cpu_s = (int(fields[11]) + int(fields[12])) * _TICK_S
    return _Stat(text[text.find(b"(") + 1 : end], int(fields[1]), cpu_s, int(fields[19]))


def _look_again(before: Mapping[int, _Stat]) -> dict[int, _Stat]:
    """All processes: what they were when first looked at, and the CPU time that they have now.

    That of one looked at before comes from its clock, at a tenth of the price of /proc/PID/stat.
    """
    alive: dict[int, _Stat] = {}
    with os.scandir("/proc") as entries:
        for entry in entries:
            if not entry.name.isdigit():
                continue
            pid, inode = int(entry.name), entry.inode()
            known = before.get(pid)
            cpu_s = _cpu_s(pid) if known is not None and known.inode == inode else None
            if known is not None and cpu_s is not None:
                alive[pid] = _Stat(known.name, known.parent, cpu_s, known.start_ticks, inode)
            elif (stat := _read_stat(pid)) is not None:
                alive[pid] = stat._replace(inode=inode)
    return alive


def _cpu_s(pid: int) -> float | None:
    try:
        return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) names it
    except OSError:  # it has ended; or a sandbox has no such clocks
        return None


def _is_anothers(pid: int) -> bool:
    """Whether a process that /proc does not show exists; asking sends it nothing."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _environ(pid: int) -> bytes:
    return _read(f"/proc/{pid}/environ")


def _command(pid: int, name: bytes) -> str:
    words = os.fsdecode(_read(f"/proc/{pid}/cmdline")).rstrip("\0").replace("\0", " ")
    return words[:_COMMAND_LENGTH] or f"[{os.fsdecode(name)}]"


def _user(pid: int) -> str:
    try:
        return _name_of(os.stat(f"/proc/{pid}").st_uid)
    except OSError:  # it has ended
        return ""


@functools.cache
def _name_of(uid: int) -> str:
    """Asked once a user: on a cluster the answer may come over the network."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
