"""Who computed on each GPU, from the process lists that were recorded beside its energy.

A list has PIDs, and each one's SM utilisation since the read before. Whose process a PID was, was
found out and noted while it lived (recording/processes.py). Where that is unknown, the GPU's energy
is not divided, and the reason is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pepr_profiler.energy.activity import DeviceUse
from pepr_profiler.record import Floats, Ints, Mask, Record
from pepr_profiler.trace.lane import Batch, LaneInfo


class OtherProcess(Record):
    """Another's process on a GPU: how long it was there, and its part of all SM use, if known.

    `is_server` says that its program computes for whoever asks it, `same_user` that it runs as the
    user of the job.
    """

    pid: int
    command: str
    user: str
    present_s: float
    use_part: float | None
    is_server: bool = False
    same_user: bool = False


class GpuUsers(Record):
    """Who computed on one GPU. Times in ns.

    `job_s` and `others_s` are how long any process of the job's, or of others, was there;
    `unknown_s` is how long that is unknown, for `unknown_reason`. `reads` is how often the list was
    read within the window, `changes` how often the job came or left. A process came or left at any
    instant between the two reads around that: the middle is taken. `edges_s` is the root of the sum
    of the squares of these times, for the job where it is alone.
    """

    use: DeviceUse
    first_ns: int
    last_ns: int
    job_s: float
    others_s: float
    unknown_s: float
    unknown_reason: str
    other_processes: tuple[OtherProcess, ...]
    job_peak_bytes: int | None
    period_s: float
    changes: int
    reads: int
    edges_s: float = 0.0

    @classmethod
    def others_alone(cls, begin_ns: int, end_ns: int) -> GpuUsers:
        """Of a GPU that the job cannot use."""
        use = DeviceUse.by_others_alone(begin_ns, end_ns)
        return cls(use, begin_ns, end_ns, 0.0, 0.0, 0.0, "", (), None, 0.0, 0, 0)


_FREE, _JOB, _OTHER, _UNKNOWN, _MPS = range(5)
"""Whose process is in a slot of the list; that of an MPS server is its clients'."""

_OWNERS = {"job": _JOB, "other": _OTHER, "profiler": _OTHER}
"""What the notes call them; anything else is unknown."""

_MPS_SERVER = "nvidia-cuda-mps-server"

_SERVERS = re.compile(
    rf"{_MPS_SERVER}|tritonserver|\bray(let|::)|torchserve|\bvllm\b|VLLM::|sglang|"
    r"text-generation-(server|launcher)|\bollama\b|dask[- ]worker|ipykernel"
)
"""Commands of programs that compute for whoever asks them."""

_IDENTIFIED_NS = 1_000_000_000
"""A process is identified within this time from when a GPU first lists it."""

_BACKFILL_NS = 2_500_000_000
"""Where the driver has no news of SM use at one read, the next read's covers that time too."""


def read_gpu_users(
    lane: LaneInfo,
    batches: Iterable[Batch],
    notes: Iterable[Mapping[str, Any]],
    *,
    begin_ns: int,
    end_ns: int,
) -> dict[str, GpuUsers]:
    """Each GPU's users by UUID, from a lane of process lists and the notes of whose its PIDs were.

    A GPU that was not read twice is left out. Figures in seconds are of [begin_ns, end_ns].
    """
    columns = _Columns(batches)
    if not columns.rows:
        return {}
    notes_by_pid = _by_pid(notes)
    boards: dict[str, dict[str, int]] = {}
    for index, channel in enumerate(lane.channels):
        boards.setdefault(channel.device, {})[channel.reading] = index
    found = {}
    for uuid, places in boards.items():
        count = columns.of([places["processes"]])[0]
        read = np.isfinite(count)
        if np.count_nonzero(read) < 2:
            continue
        slots = [name.removeprefix("pid") for name in places if name.startswith("pid")]
        used = [slot for slot in slots if columns.has(places[f"pid{slot}"])] or slots[:1]
        pids, memory = (
            columns.of([places[f"{name}{slot}"] for slot in used])[:, read]
            for name in ("pid", "memory")
        )
        sm = None
        if f"sm{slots[0]}" in places:
            sm = columns.of([places[f"sm{slot}"] for slot in used])[:, read] * 0.01
        table = _ProcessTable(
            columns.t_ns()[read],
            count[read],
            pids.astype(np.int64),
            memory,
            sm,
            notes_by_pid,
            slots=len(slots),
        )
        found[uuid] = table.users(lane.period_ns * 1e-9, begin_ns, end_ns)
    return found


class _Columns:
    """A lane's rows by channel, without channels that are 0: most slots of a list are free."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.rows = 0
        self._t_ns: list[Floats] = []
        self._parts: dict[int, list[tuple[int, Floats]]] = {}
        for batch in batches:
            for index in np.flatnonzero((batch.values != 0).any(axis=1)).tolist():
                self._parts.setdefault(index, []).append((self.rows, batch.values[index]))
            self._t_ns.append((batch.t_ns + batch.read_ns // 2).astype(np.float64))
            self.rows += len(batch.t_ns)

    def t_ns(self) -> Floats:
        """When each row was read."""
        return np.concatenate(self._t_ns)

    def has(self, index: int) -> bool:
        """Whether a channel was ever anything but 0."""
        return index in self._parts

    def of(self, indices: Sequence[int]) -> Floats:
        """Some channels as recorded, (channels, rows)."""
        values = np.zeros((len(indices), self.rows))
        for row, index in enumerate(indices):
            for first, part in self._parts.get(index, ()):
                values[row, first : first + len(part)] = part
        return values


def _by_pid(notes: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    by_pid: dict[int, list[Mapping[str, Any]]] = {}
    for note in notes:
        if note.get("event") == "process":
            by_pid.setdefault(int(note["pid"]), []).append(note)
    return by_pid


@dataclass(eq=False, repr=False)
class _ProcessTable:
    """The process lists of one GPU: `count` (n,); PIDs, bytes and SM fractions (slots, n)."""

    t_ns: Floats
    count: Floats
    pids: Ints
    memory: Floats
    sm: Floats | None
    notes: Mapping[int, Sequence[Mapping[str, Any]]]
    slots: int  # how many the list has, those that were never used too

    @cached_property
    def owners(self) -> Ints:
        """Whose the process in each slot was at each row."""
        owners = np.full(self.pids.shape, _FREE)
        for pid in sorted(set(self.pids[self.pids > 0].tolist())):
            at = self.pids == pid
            owners[at] = self._owner_of(pid)[np.nonzero(at)[1]]
        if not np.isin(owners, (_JOB, _OTHER, _UNKNOWN)).any():
            owners[owners == _MPS] = _OTHER  # the driver does not list its clients
        return owners

    @cached_property
    def overfull(self) -> Mask:
        """Where there were more processes than slots."""
        return np.asarray(self.count > np.count_nonzero(self.pids, axis=0))

    def _owner_of(self, pid: int) -> Ints:
        """Whose process the PID was at each row: a PID may be given out again."""
        notes = self.notes.get(pid)
        if not notes:
            return np.full(len(self.t_ns), _UNKNOWN)
        times = np.array([note["t_ns"] for note in notes], dtype=np.float64)
        codes = np.array([_code_of(note) for note in notes])
        latest = np.searchsorted(times, self.t_ns + _IDENTIFIED_NS, side="right") - 1
        return np.asarray(codes[np.maximum(latest, 0)])

    def users(self, period_s: float, begin_ns: int, end_ns: int) -> GpuUsers:
        """What the lists say of the GPU's use, and in seconds of [begin_ns, end_ns]."""
        job, others, unknown = (
            np.count_nonzero(self.owners == owner, axis=0) for owner in (_JOB, _OTHER, _UNKNOWN)
        )
        job_n, others_n = _more_of_both_ends(job), _more_of_both_ends(others)
        both = (job_n > 0) & (others_n > 0)
        undivided = _more_of_both_ends(unknown + self.overfull) > 0
        if self.sm is None:
            undivided |= both
        spans_s = _spans_s(self.t_ns, begin_ns, end_ns)
        job_bytes = np.where(self.owners == _JOB, self.memory, 0.0).sum(axis=0)
        peak = float(np.max(job_bytes[np.isfinite(job_bytes)], initial=0.0))
        alone = (others_n == 0) & ~undivided
        job_part = _part_of_interval(job)
        # A run ends with its job: who was there at the last read before the end was until the end.
        last = int(np.searchsorted(self.t_ns, end_ns, side="right")) - 1
        if 0 <= last < len(job_part) and job[last] > 0:
            job_part[last] = 1.0
        inside = (self.t_ns > begin_ns) & (self.t_ns < end_ns)
        return GpuUsers(
            use=self._use(job_part, job, others, undivided),
            first_ns=int(self.t_ns[0]),
            last_ns=int(self.t_ns[-1]),
            job_s=float((spans_s * job_part).sum()),
            others_s=float((spans_s * _part_of_interval(others)).sum()),
            unknown_s=float(spans_s[undivided].sum()),
            unknown_reason=self._unknown_reason(both),
            other_processes=self._other_processes(spans_s),
            job_peak_bytes=int(peak) if peak > 0 else None,
            period_s=period_s,
            changes=int(np.count_nonzero(np.diff(job[inside] > 0))),
            reads=int(np.count_nonzero(inside)),
            edges_s=float(np.sqrt(np.sum(spans_s[job_part * alone == 0.5] ** 2))),
        )

    def _use(self, job_part: Floats, job: Ints, others: Ints, undivided: Mask) -> DeviceUse:
        """Use by how many processes of each there were; what is undivided counts as the job's.

        `job_part` is for which part of each interval the job was there.

        Who is alone and came or left between two reads used the device for half of that time: all
        that is above the idle draw is theirs, and half of the idle draw.
        """
        job_n, others_n = _more_of_both_ends(job), _more_of_both_ends(others)
        job_alone = undivided | ((job_n > 0) & (others_n == 0))
        others_alone = ~undivided & (job_n == 0) & (others_n > 0)
        shared = ~undivided & (job_n > 0) & (others_n > 0)
        processes = np.maximum(job_n + others_n, 1)

        job_part = np.where(undivided, 1.0, job_part)
        others_part = _part_of_interval(others)
        job_sm, others_sm = self._sm_use(_JOB), self._sm_use(_OTHER)
        # What an MPS server is said to have used, its clients did: in equal parts.
        of_mps = self._sm_use(_MPS) / processes
        alone_or_shared = (
            (job_alone, job_part, job_sm + of_mps * job_n),
            (others_alone, others_part, others_sm + of_mps * others_n),
            (job_alone, job_part == 1.0, job_n / processes),
            (others_alone, others_part == 1.0, others_n / processes),
        )
        parts = (
            np.where(alone, if_alone, np.where(shared, part, 0.0))
            for alone, if_alone, part in alone_or_shared
        )
        return DeviceUse(self.t_ns, *parts)

    def _sm_use(self, owner: int) -> Floats:
        """SM use of an owner's processes in each interval; a read says what was since the last one.

        A process that has gone, and left no last sample, is taken to have gone on as before.
        """
        if self.sm is None:
            return np.zeros(len(self.t_ns) - 1)
        sm = np.nan_to_num(self.sm)
        gone = self.pids[:, :-1] != self.pids[:, 1:]  # a process keeps its slot
        last = np.where(gone, sm[:, :-1], 0.0)
        own = self.owners == owner
        use = (np.where(own, sm, 0.0)[:, 1:] + np.where(own[:, :-1], last, 0.0)).sum(axis=0)
        has_news = (sm[:, 1:] + last).sum(axis=0) > 0
        late = ~has_news[:-1] & has_news[1:] & (np.diff(self.t_ns)[1:] < _BACKFILL_NS)
        use[:-1][late] = use[1:][late]
        return np.asarray(use)

    def _other_processes(self, spans_s: Floats) -> tuple[OtherProcess, ...]:
        """Processes of others, who used most first."""
        pids = sorted(set(self.pids[self.owners == _OTHER].tolist()))
        used_s, total_s = {}, 0.0
        if self.sm is not None:
            used = np.nan_to_num(self.sm)[:, 1:] * spans_s
            used_s = {pid: float(used[self.pids[:, 1:] == pid].sum()) for pid in pids}
            total_s = float(used.sum())
        found = []
        for pid in pids:
            present = _more_of_both_ends((self.pids == pid).any(axis=0).astype(int)) > 0
            note = self.notes[pid][-1]
            part = used_s[pid] / total_s if total_s > 0 else None
            present_s = float(spans_s[present].sum())
            serves = bool(_SERVERS.search(note["command"]))
            same = bool(note.get("same_user"))
            process = OtherProcess(
                pid, note["command"], note["user"], present_s, part, serves, same
            )
            found.append(process)
        return tuple(sorted(found, key=lambda n: (-(n.use_part or 0.0), -n.present_s)))

    def _unknown_reason(self, both: Mask) -> str:
        """Why it is unknown who used the GPU, at times; empty if it never is."""
        unknown = sorted(set(self.pids[self.owners == _UNKNOWN].tolist()))
        foreign = [p for p in unknown if any(n["owner"] == "hidden" for n in self.notes.get(p, ()))]
        if foreign:
            return f"PID {foreign[0]} on it is of another PID namespace"
        if unknown:
            return f"PID {unknown[0]} on it had ended before it could be looked up"
        if self.overfull.any():
            return f"more than {self.slots} processes use it"
        return "its driver does not say how much of it each process uses" if both.any() else ""


def _code_of(note: Mapping[str, Any]) -> int:
    if note["owner"] == "other" and _MPS_SERVER in note.get("command", ""):
        return _MPS
    return _OWNERS.get(note["owner"], _UNKNOWN)


def _part_of_interval(counts: Ints) -> Floats:
    """For which part of each interval between reads anybody was there: 0, 1/2 or 1."""
    there = counts > 0
    return np.asarray((there[:-1].astype(np.float64) + there[1:]) / 2)


def _more_of_both_ends(counts: Ints) -> Ints:
    """Of each interval between reads, the larger of the counts at its two ends."""
    return np.maximum(counts[:-1], counts[1:])


def _spans_s(t_ns: Floats, begin_ns: int, end_ns: int) -> Floats:
    """How much of each interval, as `DeviceUse` has them, lies in a window."""
    edges = t_ns.copy()
    edges[0], edges[-1] = min(edges[0], begin_ns), max(edges[-1], end_ns)
    return np.asarray(np.diff(np.clip(edges, begin_ns, end_ns)) * 1e-9)
