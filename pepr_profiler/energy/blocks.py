"""A block's part of its process, while other blocks of the process were open.

Devices and the process lane know the process as one. Its CPU time is divided by the clocks of
threads, which recording/blocks.py notes: a block has what its thread had, and what that started.
Several blocks of one thread (asyncio) have equal parts of its time. So have all blocks of what no
clock tells, and of a GPU. Parts of all blocks add up to the process, but for what its main thread
did outside of them.

Where n blocks have equal parts, nothing is known but that the parts add up: with all divisions as
likely (Dirichlet's distribution with parameters of 1), the standard uncertainty of one is
sqrt((n - 1)/(n + 1))/n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pepr_profiler.energy.activity import Activity, DeviceUse, used_until_s
from pepr_profiler.record import Floats, Ints, Record

_WORKS = 0.02
"""Threads outside of all blocks that take less of a core than this do nothing of what blocks do."""


class BlockPart(Record):
    """The block's part, interval by interval: `edges_ns` (n + 1,), the rest (n,), from 0 to 1.

    `cpu` is of the process's CPU time, `equal` of what is known of the process alone, both with
    their standard uncertainty. The first and the last interval also hold for what lies before and
    after them.
    """

    edges_ns: Floats
    cpu: Floats
    cpu_u: Floats
    equal: Floats
    equal_u: Floats

    @classmethod
    def of(
        cls,
        notes: Sequence[Mapping[str, Any]],
        activity: Activity | None,
        begin_ns: int,
        end_ns: int,
    ) -> BlockPart | None:
        """From the notes of its run, in order of time; None if it always had the whole process.

        From the last note on, of a run that was cut off, nothing tells the parts.
        """
        of_blocks = [note for note in notes if note["event"] == "blocks"]
        if not any(note["divided"] for note in of_blocks):
            return None
        at_ns, of_thread, blocks, main_s, *clocks_s = (_column(of_blocks, n) for n in _COLUMNS)
        own_s, known_s, pool_s = (np.maximum(np.diff(clock_s), 0.0) for clock_s in clocks_s)
        process_s = known_s
        if activity is not None and len(activity.t_ns) > 1:
            process_s = np.maximum(np.diff(used_until_s(activity, at_ns)), 0.0)
        # Clocks are read at other instants than the lane: together they are at most the whole.
        scale = np.minimum(1.0, _ratio(process_s, known_s, 1.0))
        own_s, rest_s = scale * own_s, process_s - scale * known_s
        # A block alone, in one of the main thread, may have nothing of what other threads do there.
        apart_s = np.nan_to_num(np.diff(main_s)) + np.where(blocks[:-1] < 2, rest_s, 0.0)
        count = blocks.copy()
        count[:-1] += apart_s > _WORKS * np.diff(at_ns) * 1e-9
        equal, equal_u = 1.0 / count, _unknown(count)
        part_s = own_s / of_thread[:-1] + rest_s * equal[:-1]
        # Workers are counted to the thread that started them, and others may use them too.
        unsure_s = np.minimum(rest_s + pool_s, process_s)
        u_s = own_s * _unknown(of_thread[:-1]) + unsure_s * equal_u[:-1]
        cpu = np.append(np.minimum(_ratio(part_s, process_s, equal[:-1]), 1.0), equal[-1])
        cpu_u = np.append(_ratio(u_s, process_s, equal_u[:-1]), equal_u[-1])
        divided = np.array([note["divided"] for note in of_blocks])
        edges_ns = [min(begin_ns, at_ns[0]) - 1.0, *at_ns, max(end_ns, at_ns[-1]) + 1.0]
        return cls(
            np.array(edges_ns),
            np.append(1.0, np.where(divided, cpu, 1.0)),
            np.append(0.0, np.where(divided, cpu_u, 0.0)),
            np.append(1.0, np.where(divided, equal, 1.0)),
            np.append(0.0, np.where(divided, equal_u, 0.0)),
        )

    def of_activity(self, activity: Activity) -> Activity:
        """The process's activity with the block's CPU time as the job's."""
        inside_ns = self.edges_ns[
            (self.edges_ns > activity.t_ns[0]) & (self.edges_ns < activity.t_ns[-1])
        ]
        at_ns = np.sort(np.concatenate((activity.t_ns, inside_ns)))
        used_s = np.diff(used_until_s(activity, at_ns)) * self._at(self.cpu, _middles(at_ns))
        so_far_s = np.append(0.0, np.cumsum(used_s))
        rows = np.searchsorted(at_ns, activity.t_ns)
        return activity._replace(job_cpu_s=activity.job_cpu_s[0] + so_far_s[rows])

    def of_use(self, use: DeviceUse) -> DeviceUse:
        """A process's use of a device with an equal part of it as the job's."""
        inside_ns = self.edges_ns[
            (self.edges_ns > use.edges_ns[0]) & (self.edges_ns < use.edges_ns[-1])
        ]
        edges_ns = np.sort(np.concatenate((use.edges_ns, inside_ns)))
        at_ns = _middles(edges_ns)
        row = np.clip(np.searchsorted(use.edges_ns, at_ns) - 1, 0, len(use.job) - 1)
        job, others, job_there, others_there = (values[row] for values in use[1:])
        part = self._at(self.equal, at_ns)
        return DeviceUse(
            edges_ns,
            job * part,
            others + job * (1.0 - part),
            job_there * part,
            others_there + job_there * (1.0 - part),
        )

    def u_rel(self, at_ns: Ints, job_j: Floats, *, by_cpu: bool) -> float:
        """Relative standard uncertainty by the division of the job's energy, cumulative `job_j`."""
        if len(at_ns) < 2 or not job_j[-1] > job_j[0]:
            return 0.0
        value, u = (self.cpu, self.cpu_u) if by_cpu else (self.equal, self.equal_u)
        ratio = self._at(_ratio(u, value, 0.0), _middles(at_ns.astype(np.float64)))
        return float(np.diff(job_j) @ ratio / (job_j[-1] - job_j[0]))

    def _at(self, values: Floats, at_ns: Floats) -> Floats:
        row = np.clip(np.searchsorted(self.edges_ns, at_ns) - 1, 0, len(values) - 1)
        return np.asarray(values[row])


def _unknown(count: Floats) -> Floats:
    """Standard uncertainty of one of so many parts of which nothing is known."""
    return np.asarray(np.sqrt((count - 1.0) / (count + 1.0)) / count)


_COLUMNS = ("t_ns", "of_thread", "blocks", "main_s", "own_s", "known_s", "pool_s")


def _column(notes: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """A number of each note, NaN where it was not noted. ValueError for what cannot be."""
    values = np.array([np.nan if note[name] is None else float(note[name]) for note in notes])
    least = 1.0 if name in ("of_thread", "blocks") else 0.0
    usable = (values >= least) & (values < _MOST)
    if not (usable | np.isnan(values) if name == "main_s" else usable).all():
        raise ValueError(f"{name} of its blocks is {values[:3]}")
    return values


_MOST = float(1 << 62)


def _ratio(part: Floats, whole: Floats, otherwise: Floats | float) -> Floats:
    """Their ratio, and `otherwise` where there is no whole."""
    result = np.broadcast_to(np.asarray(otherwise, dtype=np.float64), whole.shape).copy()
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _middles(at_ns: Floats) -> Floats:
    return np.asarray((at_ns[:-1] + at_ns[1:]) / 2)
