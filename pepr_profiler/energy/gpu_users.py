"""Who computed on each GPU, from the process lists that were recorded beside its energy.

A list tells PIDs and each one's SM utilisation since the read before; whose process a PID was has
been written down while it lived (neighbours.py). What cannot be told is said, and left undivided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.energy.activity import Use
from pepr_profiler.record import Record
from pepr_profiler.trace.lane import Batch, LaneInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray


class OtherProcess(Record):
    """Another's process on a GPU: how long it was there, and its part of all SM use, if known."""

    pid: int
    command: str
    user: str
    present_s: float
    part: float | None


class GpuUsers(Record):
    """Who computed on one GPU. Times in ns; `unknown_s` is how long that cannot be told, and `why`.

    `job_s` and `others_s` are how long any process of the job's, or of others, was there; `reads`
    is how often the list was read within the window, and `changes` how often the job came or left.
    """

    use: Use
    first_ns: int
    last_ns: int
    job_s: float
    others_s: float
    unknown_s: float
    why: str
    neighbours: tuple[OtherProcess, ...]
    job_peak_bytes: int | None
    period_s: float
    changes: int
    reads: int


def not_the_jobs(begin_ns: int, end_ns: int) -> GpuUsers:
    """Of a GPU that the job cannot use, where nobody tells who does."""
    one, none = np.ones(1), np.zeros(1)
    use = Use(np.array([begin_ns, end_ns], dtype=np.float64), none, one, none, one)
    return GpuUsers(use, begin_ns, end_ns, 0.0, 0.0, 0.0, "", (), None, 0.0, 0, 0)


_NOBODY, _JOB, _OTHER, _UNKNOWN = range(4)
_OWNERS = {"job": _JOB, "other": _OTHER, "profiler": _OTHER}
_RESOLVED_NS = 1_000_000_000
"""A process is looked up within this time from when a GPU first lists it."""

_BACKFILL_NS = 2_500_000_000
"""Where the driver has no news at one read, the next one's are about that time too."""


def read_gpu_users(
    lane: LaneInfo,
    batches: Iterable[Batch],
    notes: Iterable[Mapping[str, Any]],
    *,
    begin_ns: int,
    end_ns: int,
) -> dict[str, GpuUsers]:
    """From a process list lane and the notes of who its PIDs were, each GPU's tenants, by UUID.

    A GPU is left out if it was not read twice. Figures in seconds are of [begin_ns, end_ns].
    """
    columns = _Columns(batches)
    if not columns.rows:
        return {}
    known = _by_pid(notes)
    boards: dict[str, dict[str, int]] = {}
    for index, channel in enumerate(lane.channels):
        boards.setdefault(channel.device, {})[channel.reading] = index
    found = {}
    for uuid, at in boards.items():
        count = columns.of([at["processes"]])[0]
        listed = np.isfinite(count)
        if np.count_nonzero(listed) < 2:
            continue
        slots = [name.removeprefix("pid") for name in at if name.startswith("pid")]
        used = [slot for slot in slots if columns.has(at[f"pid{slot}"])] or slots[:1]
        pids = columns.of([at[f"pid{slot}"] for slot in used])
        memory = columns.of([at[f"memory{slot}"] for slot in used])
        sm = None
        if f"sm{slots[0]}" in at:
            sm = columns.of([at[f"sm{slot}"] for slot in used])[:, listed] * 0.01
        table = _Table(
            columns.t_ns()[listed],
            count[listed],
            pids[:, listed].astype(np.int64),
            memory[:, listed],
            sm,
            known,
            len(slots),
        )
        found[uuid] = table.tenants(lane.period_ns * 1e-9, begin_ns, end_ns)
    return found


class _Columns:
    """A lane's rows by channel, without what is 0: most slots are free, and would fill a memory."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.rows = 0
        self._t_ns: list[NDArray[np.float64]] = []
        self._parts: dict[int, list[tuple[int, NDArray[np.float64]]]] = {}
        for batch in batches:
            for index in np.flatnonzero((batch.values != 0).any(axis=1)).tolist():
                self._parts.setdefault(index, []).append((self.rows, batch.values[index]))
            self._t_ns.append((batch.t_ns + batch.read_ns // 2).astype(np.float64))
            self.rows += len(batch.t_ns)

    def t_ns(self) -> NDArray[np.float64]:
        """When each row was read."""
        return np.concatenate(self._t_ns)

    def has(self, index: int) -> bool:
        """Whether a channel was ever anything but 0."""
        return index in self._parts

    def of(self, indices: Sequence[int]) -> NDArray[np.float64]:
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
class _Table:
    """The rows of one GPU: `count` (n,), PIDs, bytes and SM fractions (slots, n)."""

    t_ns: NDArray[np.float64]
    count: NDArray[np.float64]
    pids: NDArray[np.int64]
    memory: NDArray[np.float64]
    sm: NDArray[np.float64] | None
    notes: Mapping[int, Sequence[Mapping[str, Any]]]
    room: int  # slots that there are; those never used are left out

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """Whose the process in each slot was at each row."""
        owners = np.full(self.pids.shape, _NOBODY)
        for pid in sorted(set(self.pids[self.pids > 0].tolist())):
            at = self.pids == pid
            owners[at] = self._owner_of(pid)[np.nonzero(at)[1]]
        return owners

    @cached_property
    def crowded(self) -> NDArray[np.bool_]:
        """Where there were more processes than slots."""
        return np.asarray(self.count > np.count_nonzero(self.pids, axis=0))

    def _owner_of(self, pid: int) -> NDArray[np.int64]:
        """Whose process the PID was at each row: a PID may be given out again."""
        notes = self.notes.get(pid)
        if not notes:
            return np.full(len(self.t_ns), _UNKNOWN)
        times = np.array([note["t_ns"] for note in notes], dtype=np.float64)
        codes = np.array([_OWNERS.get(note["owner"], _UNKNOWN) for note in notes])
        latest = np.searchsorted(times, self.t_ns + _RESOLVED_NS, side="right") - 1
        return np.asarray(codes[np.maximum(latest, 0)])

    def tenants(self, period_s: float, begin_ns: int, end_ns: int) -> GpuUsers:
        job, others, unknown = (
            np.count_nonzero(self.owners == code, axis=0) for code in (_JOB, _OTHER, _UNKNOWN)
        )
        # A process came after the read before it was first seen and left before the one after it
        # was last seen: it is taken to have been there all that time.
        job_n, others_n = _either(job), _either(others)
        untold = _either(unknown + self.crowded) > 0
        both = (job_n > 0) & (others_n > 0)
        measured = self._used(_JOB), self._used(_OTHER)
        if self.sm is None:
            untold |= both
        held = np.maximum(job_n + others_n, 1)
        whole = untold | ((job_n > 0) & (others_n == 0))
        other = ~untold & (job_n == 0) & (others_n > 0)
        shared = both & ~untold
        use = Use(
            self.t_ns,
            np.where(whole, 1.0, np.where(shared, measured[0], 0.0)),
            np.where(other, 1.0, np.where(shared, measured[1], 0.0)),
            np.where(whole, 1.0, np.where(shared, job_n / held, 0.0)),
            np.where(other, 1.0, np.where(shared, others_n / held, 0.0)),
        )
        spans_s = _spans_s(self.t_ns, begin_ns, end_ns)
        bytes_ = np.where(self.owners == _JOB, self.memory, 0.0).sum(axis=0)
        peak = float(np.max(bytes_[np.isfinite(bytes_)], initial=0.0))
        inside = (self.t_ns > begin_ns) & (self.t_ns < end_ns)
        return GpuUsers(
            use=use,
            first_ns=int(self.t_ns[0]),
            last_ns=int(self.t_ns[-1]),
            job_s=float(spans_s[job_n > 0].sum()),
            others_s=float(spans_s[others_n > 0].sum()),
            unknown_s=float(spans_s[untold].sum()),
            why=self._why(both),
            neighbours=self._neighbours(spans_s),
            job_peak_bytes=int(peak) if peak > 0 else None,
            period_s=period_s,
            changes=int(np.count_nonzero(np.diff(job[inside] > 0))),
            reads=int(np.count_nonzero(inside)),
        )

    def _used(self, code: int) -> NDArray[np.float64]:
        """SM use of an owner's processes in each interval; a read tells of the time before it.

        One that has gone, and left no last sample, is taken to have gone on as before.
        """
        if self.sm is None:
            return np.zeros(len(self.t_ns) - 1)
        sm = np.nan_to_num(self.sm)
        gone = self.pids[:, :-1] != self.pids[:, 1:]  # a process keeps its slot
        last = np.where(gone, sm[:, :-1], 0.0)
        theirs = self.owners == code
        of = (np.where(theirs, sm, 0.0)[:, 1:] + np.where(theirs[:, :-1], last, 0.0)).sum(axis=0)
        news = (sm[:, 1:] + last).sum(axis=0) > 0
        late = ~news[:-1] & news[1:] & (np.diff(self.t_ns)[1:] < _BACKFILL_NS)
        of[:-1][late] = of[1:][late]
        return np.asarray(of)

    def _neighbours(self, spans_s: NDArray[np.float64]) -> tuple[OtherProcess, ...]:
        of_others = sorted(set(self.pids[self.owners == _OTHER].tolist()))
        used_s = {}
        if self.sm is not None:
            used = np.nan_to_num(self.sm)[:, 1:] * spans_s
            used_s = {pid: float(used[self.pids[:, 1:] == pid].sum()) for pid in of_others}
            total_s = float(used.sum())
        found = []
        for pid in of_others:
            there = _either((self.pids == pid).any(axis=0).astype(int)) > 0
            note = self.notes[pid][-1]
            part = used_s[pid] / total_s if used_s and total_s > 0 else None
            present_s = float(spans_s[there].sum())
            found.append(OtherProcess(pid, note["command"], note["user"], present_s, part))
        return tuple(sorted(found, key=lambda n: (-(n.part or 0.0), -n.present_s)))

    def _why(self, both: NDArray[np.bool_]) -> str:
        unknown = sorted(set(self.pids[self.owners == _UNKNOWN].tolist()))
        hidden = [p for p in unknown if any(n["owner"] == "hidden" for n in self.notes.get(p, ()))]
        if hidden:
            return f"PID {hidden[0]} on it is of another PID namespace"
        if unknown:
            return f"PID {unknown[0]} on it had ended before it could be looked up"
        if self.crowded.any():
            return f"more than {self.room} processes use it"
        return "its driver does not tell how much of it each process uses" if both.any() else ""


def _either(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.maximum(counts[:-1], counts[1:])


def _spans_s(t_ns: NDArray[np.float64], begin_ns: int, end_ns: int) -> NDArray[np.float64]:
    """How much of each interval lies in a window; the first and the last go on, as in `Use`."""
    edges = t_ns.copy()
    edges[0], edges[-1] = min(edges[0], begin_ns), max(edges[-1], end_ns)
    return np.asarray(np.diff(np.clip(edges, begin_ns, end_ns)) * 1e-9)
