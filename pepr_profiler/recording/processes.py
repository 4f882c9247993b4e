"""Decides whether a PID belongs to the job, the profiler or another, while it runs.

A sensor reports PIDs, and a PID means nothing once its process has ended. So each is looked up
while it lives, and what it was is written beside the lanes, for a report that may come years later.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from pepr_profiler.record import Any
from pepr_profiler.recording import procfs
from pepr_profiler.recording.procfs import Stat, environ_of, find_stat
from pepr_profiler.sensors.spec import ProcessRoot
from pepr_profiler.units import utf8_text

_SCAN_S, _LONGEST_SCAN_S = 10.0, 60.0
_SCAN_PART, _SCAN_SHARE = 60, 400
"""All processes are scanned every 10 s, later every sixtieth of the run, at most every 60 s: what
comes and goes unseen has then taken a sixtieth of the time. A scan that is slow is made less often,
so that it takes no more than a four-hundredth of a core."""

_NAMED, _NAMED_SHARE = 8, 0.01
"""At most so many others are written down, each of which took so much of a core."""

_COMMAND_LENGTH = 120
_GPU_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
    *("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"),
    *("ZE_FLAT_DEVICE_HIERARCHY", "ZE_ENABLE_PCI_ID_DEVICE_ORDER"),
)
"""What energy/visible.py reads."""

Note = Callable[[dict[str, Any]], None]


class ProcessOwners:
    """Finds out whose each process is, and writes down who used the machine's devices.

    `root` is a ProcessRoot. A process is the job's if one of its ancestors is, or if it is in the
    cgroup that is followed; if it was so when it was looked at before; or if it was started inside
    the run: its environment has `marker`, a variable and its value. `dedicated` says that this
    process only records; it is then not listed among the others. `note` takes what is to be kept,
    as JSON objects:
    {"event": "process", "t_ns", "pid", "owner": "job"|"other"|"profiler"|"hidden"|"gone",
    "command", "user", "same_user"} for each process on a GPU, where `same_user` says whether the
    job runs as that user too, and {"event": "cpu", "t_ns", "since_ns", "profiler_s", "processes":
    [{"pid", "cpu_s", "command", "user"}]} for the others that took most CPU time since `since_ns`.
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
        self._marker = None if marker is None else os.fsencode("=".join(marker))
        self._includes_self = root == "self"
        self._root, self._cgroup = root, ProcessRoot(root).cgroup
        self._roots = _roots_of(root, self._profiler)
        self._job: set[tuple[int, int]] = set()  # PID and start of each process of the job
        for pid in self._roots:
            if stat := find_stat(pid):
                self._job.add((pid, stat.start_ticks))
        self._on_gpu: dict[int, _OnGpu] = {}
        self._begin_ns = 0  # when the first scan was
        self._alive: dict[int, Stat] = {}  # at the last scan
        self._first: dict[int, tuple[int, float]] = {}  # start and CPU seconds at the first scan
        self._others: dict[tuple[int, int], dict[str, Any]] = {}
        self._next_s = 0.0

    def tick(self, others_s: float = math.inf) -> None:
        """Scans all processes, if it is time for that again.

        `others_s` is the CPU time of all others together since the first tick, if it is known. No
        scan is made while it is too little for any of them to be written down.
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
        """Makes a last scan, unless the run was too short for a first one."""
        self.on_gpu(())
        if self._begin_ns:
            self._scan()

    # --- on GPUs ---

    @property
    def has_unidentified(self) -> bool:
        """Whether it is not known yet whose some process on a GPU is."""
        return any(found.owner is None for found in self._on_gpu.values())

    def on_gpu(self, pids: Iterable[int]) -> None:
        """These processes compute on some GPU now; those that are new are looked up."""
        present = set(pids)
        for pid in self._on_gpu.keys() - present:
            if self._on_gpu.pop(pid).owner is None:
                self._note_owner(pid, "gone")
        for pid in present:
            found = self._on_gpu.setdefault(pid, _OnGpu())
            stat = find_stat(pid)
            if stat is None:
                found.missed += 1
                if found.owner is None and _exists_for_another(pid):
                    found.owner = "other"  # behind a /proc that is mounted with hidepid
                elif found.owner is None and found.missed > 1:
                    # Listed again although /proc has no such process: it is of another namespace.
                    found.owner = "hidden"
                else:
                    continue
                self._note_owner(pid, found.owner)
            elif found.owner != "job" or found.start_ticks != stat.start_ticks:
                owner = self._find_owner(pid, stat)
                if (owner, stat.start_ticks) != (found.owner, found.start_ticks):
                    self._note_owner(pid, owner, **_describe(pid, stat))
                found.owner, found.start_ticks = owner, stat.start_ticks

    def _note_owner(self, pid: int, owner: str, command: str = "", user: str = "") -> None:
        jobs = _named_in(self._root) if self._cgroup else self._roots
        same = bool(user) and user == procfs.owner_of((*jobs, self._profiler)[0])
        facts = {"t_ns": time.monotonic_ns(), "pid": pid, "owner": owner, "same_user": same}
        self._note({"event": "process", **facts, "command": command, "user": user})

    def _find_owner(self, pid: int, stat: Stat) -> str:
        """Whose a process is: by its cgroup or its ancestors, or by its environment."""
        if self._cgroup:
            if pid == self._profiler:
                return "profiler"
            if (pid, stat.start_ticks) in self._job or pid in _members_of(self._cgroup):
                self._job.add((pid, stat.start_ticks))
                return "job"
        elif (owner := self._owner_by_descent(pid, stat)) is not None:
            return owner
        if self._bears_mark(pid):
            self._job.add((pid, stat.start_ticks))
            return "job"
        return "other"

    def _bears_mark(self, pid: int) -> bool:
        return self._marker is not None and self._marker in environ_of(pid)

    def _owner_by_descent(self, pid: int, stat: Stat) -> str | None:
        """Whose a process is by its ancestors; None if these are not of the job."""
        lineage: list[tuple[int, int]] = []
        at, here = pid, stat
        while True:
            key = (at, here.start_ticks)
            if key in self._job or (at == self._profiler and lineage and self._roots == ()):
                self._job.update(lineage)
                return "job"
            if at == self._profiler and not lineage:
                return "profiler"
            lineage.append(key)
            above = find_stat(here.parent) if here.parent > 0 else None
            if above is None or not _is_older(above, here):
                return None
            at, here = here.parent, above

    # --- on CPUs ---

    def _scan(self) -> None:
        now_ns = time.monotonic_ns()
        self._alive = alive = _scan_all(self._alive)
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
                if known is None and self._bears_mark(pid):
                    self._job.add((pid, stat.start_ticks))
                    continue
                who = known or {"pid": pid, **_describe(pid, stat)}
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

    def _job_of(self, alive: Mapping[int, Stat]) -> set[int]:
        """Which of the living are the job's; remembered, for when their parents have gone."""
        verdict: dict[int, bool] = {0: False}
        if self._cgroup:
            members = _members_of(self._cgroup)
            verdict = {
                pid: pid in members or (pid, stat.start_ticks) in self._job
                for pid, stat in alive.items()
            }
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
                    at = stat.parent if above is None or _is_older(above, stat) else 0
            for below in line:
                verdict[below] = verdict[at]
        job = {pid for pid in alive if verdict[pid]}
        if not self._includes_self:
            job.discard(self._profiler)
        self._job = {(pid, alive[pid].start_ticks) for pid in job}
        return job


class _OnGpu:
    """A PID that a GPU lists: whose it is (None: not known yet) and since when it runs."""

    def __init__(self) -> None:
        self.owner: str | None = None
        self.start_ticks = -1
        self.missed = 0


def gpu_environments(root: str) -> list[dict[str, str]]:
    """The variables that choose GPUs, in each root of the job that we may read them from."""
    if root in ("self", "children"):
        given: list[Mapping[str, str]] = [os.environ]
    else:
        blocks = filter(None, map(environ_of, _named_in(root)))
        given = [dict(os.fsdecode(e).partition("=")[::2] for e in block) for block in blocks]
    found = [{name: env[name] for name in _GPU_VARIABLES if name in env} for env in given]
    return [env for i, env in enumerate(found) if env not in found[:i]]


def run_around(variable: str, root: str) -> str | None:
    """The run directory that `variable` names in the roots or in an ancestor of theirs, if any.

    A cgroup is in no run: others than the run's processes may be in it.
    """
    if ProcessRoot(root).cgroup:
        return None
    if root in ("self", "children") and os.environ.get(variable):
        return os.environ[variable]
    at, name = (*_roots_of(root, os.getpid()), os.getpid())[0], f"{variable}=".encode()
    while at > 1:
        for entry in environ_of(at):
            if entry.startswith(name):
                return os.fsdecode(entry[len(name) :])
        stat = find_stat(at)
        at = stat.parent if stat is not None else 0
    return None


def _roots_of(root: str, profiler: int) -> tuple[int, ...]:
    """What the job descends from; nothing for "children", whose parent is not the job."""
    return (profiler,) if root == "self" else ProcessRoot(root).pids


def _named_in(root: str) -> Sequence[int]:
    """The processes that a ProcessRoot names, or the oldest ones that are in its cgroup now."""
    at = ProcessRoot(root)
    if not at.cgroup:
        return at.pids
    from pepr_profiler.recording.cgroups import oldest_of  # nobody else needs it

    return oldest_of(at.cgroup)


def _members_of(folder: str) -> set[int]:
    from pepr_profiler.recording.cgroups import members_of

    return members_of(folder)


def _is_older(parent: Stat, child: Stat) -> bool:
    """Whether this can be the parent. A younger process has got the PID of a parent that ended."""
    return parent.start_ticks <= child.start_ticks


def _scan_all(before: Mapping[int, Stat]) -> dict[int, Stat]:
    """All processes: what they were when first scanned, and the CPU time that they have now."""
    alive: dict[int, Stat] = {}
    with os.scandir("/proc") as entries:
        for entry in entries:
            if not entry.name.isdigit():
                continue
            pid, inode = int(entry.name), entry.inode()
            known = before.get(pid)
            cpu_s = procfs.cpu_clock_s(pid) if known is not None and known.inode == inode else None
            if known is not None and cpu_s is not None:
                alive[pid] = known._replace(cpu_s=cpu_s)
            elif (stat := find_stat(pid)) is not None:
                alive[pid] = stat._replace(inode=inode)
    return alive


def _exists_for_another(pid: int) -> bool:
    """Whether a process that /proc does not show is another user's; asking sends it nothing."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _describe(pid: int, stat: Stat) -> dict[str, str]:
    """A process's command line and user, as notes have them."""
    try:
        command = " ".join(procfs.command_of(pid))[:_COMMAND_LENGTH]
    except OSError:
        command = ""
    command = command or f"[{utf8_text(os.fsdecode(stat.name))}]"
    return {"command": command, "user": procfs.owner_of(pid) or ""}
