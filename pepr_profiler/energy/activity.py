"""What the job and the machine did, from the process lane, and who used a device when."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from pepr_profiler.record import Floats, Ints, Record
from pepr_profiler.trace.lane import Batch, LaneInfo

_SHARE_WINDOW_NS = 1_000_000_000
"""Shares are formed over this long: the kernel counts the machine's busy time in ticks of 10 ms."""


class Activity(Record):
    """CPU time of the job and of everybody, and the job's memory. Arrays are (n,), times in ns.

    `job_cpu_s` and `busy_s` are cumulative; `rss_bytes` is the resident size of the job's process
    tree, in which a shared page counts once a process.
    """

    t_ns: Floats
    job_cpu_s: Floats
    busy_s: Floats
    rss_bytes: Floats
    cpus: int
    installed_bytes: float

    @property
    def peak_rss_bytes(self) -> int | None:
        """The largest sample of the resident size; None if there is none above 0."""
        peak = float(np.max(self.rss_bytes, initial=0.0))
        return int(peak) if peak > 0 else None

    def load(self) -> Floats:
        """The machine's busy fraction between samples, (n - 1,)."""
        span_s = np.diff(self.t_ns) * 1e-9
        return np.asarray(np.diff(self.busy_s) / (span_s * self.cpus))

    def cpu_between(self, begin_ns: int, end_ns: int) -> list[float]:
        """CPU seconds of the job, and of everybody, from one instant to another."""
        ends_ns, both = [begin_ns, end_ns], (self.job_cpu_s, self.busy_s)
        return [float(np.diff(np.interp(ends_ns, self.t_ns, cpu_s))[0]) for cpu_s in both]


def read_activity(lane: LaneInfo, batches: Iterable[Batch]) -> Activity | None:
    """The process lane as arrays, without rows in which something is unknown; None of no row."""
    channels = {channel.name: channel for channel in lane.channels}
    places = [list(channels).index(name) for name in ("job/cpu", "system/busy", "job/rss")]
    times, values = [], []
    for batch in batches:
        times.append((batch.t_ns + batch.read_ns // 2).astype(np.float64))
        values.append(batch.values[places])
    if not times:
        return None
    t_ns, rows = np.concatenate(times), np.concatenate(values, axis=1)
    known = np.isfinite(rows).all(axis=0)
    job_cpu_s, busy_s, rss_bytes = rows[:, known]
    return Activity(
        t_ns=t_ns[known],
        job_cpu_s=job_cpu_s,
        busy_s=busy_s,
        rss_bytes=rss_bytes,
        cpus=int(channels["system/busy"].labels["cpus"]),
        installed_bytes=float(channels["job/rss"].labels["installed_bytes"]),
    )


class DeviceUse(Record):
    """Who used a device, interval by interval: `edges_ns` (n + 1,), the rest (n,).

    `job` and `others` are use in a unit of which 1 is a device in use all of the time.
    `job_presence` and `others_presence` say who bears the idle draw of the time in which the device
    is not in use: parts of it, at most 1 together; the rest is nobody's. The first and the last
    interval also hold for what lies before and after them.
    """

    edges_ns: Floats
    job: Floats
    others: Floats
    job_presence: Floats
    others_presence: Floats

    @classmethod
    def by_job_alone(cls, begin_ns: int, end_ns: int) -> DeviceUse:
        """All of a device is the job's: nobody else is there, or nobody knows who is."""
        all_, none = np.ones(1), np.zeros(1)
        return cls(np.array([begin_ns, end_ns], dtype=np.float64), all_, none, all_, none)

    @classmethod
    def by_others_alone(cls, begin_ns: int, end_ns: int) -> DeviceUse:
        """Nothing of a device is the job's."""
        all_, none = np.ones(1), np.zeros(1)
        return cls(np.array([begin_ns, end_ns], dtype=np.float64), none, all_, none, all_)

    def means(self, at_ns: Ints) -> Floats:
        """The mean of each of the four, (4, m), between each instant and the one before it.

        The first instant has none before it: 0.
        """
        origin_ns = self.edges_ns[0]
        at = at_ns - origin_ns
        edges = self.edges_ns - origin_ns
        edges[0], edges[-1] = min(edges[0], at[0]), max(edges[-1], at[-1])
        spans = np.diff(edges)
        steps = np.diff(at, prepend=at[:1])
        result = np.zeros((4, len(at)))
        for row, values in enumerate(self[1:]):
            summed = np.interp(at, edges, np.concatenate(([0.0], np.cumsum(values * spans))))
            np.divide(np.diff(summed, prepend=summed[:1]), steps, out=result[row], where=steps > 0)
        return result


def cpu_use(activity: Activity, begin_ns: float, end_ns: float) -> DeviceUse:
    """CPU seconds a second, in windows of about 1 s; nobody bears an unused CPU's idle draw.

    What ran before `begin_ns` and after `end_ns` is left out: the profiler's start and summary.
    """
    sampled_ns = activity.t_ns[[0, -1]]
    begin_ns, end_ns = np.clip(sampled_ns, begin_ns, end_ns).tolist()
    if begin_ns == end_ns:  # nothing was sampled between them
        begin_ns, end_ns = sampled_ns.tolist()
    count = max(1, math.floor((end_ns - begin_ns) / _SHARE_WINDOW_NS))
    edges_ns = np.linspace(begin_ns, end_ns, count + 1)
    span_s = np.diff(edges_ns) * 1e-9
    job_s = np.diff(np.interp(edges_ns, activity.t_ns, activity.job_cpu_s))
    # The machine's ticks may lag the job's own clock: it was at least as busy as the job.
    busy_s = np.maximum(np.diff(np.interp(edges_ns, activity.t_ns, activity.busy_s)), job_s)
    nobody = np.zeros(len(span_s))
    return DeviceUse(edges_ns, job_s / span_s, (busy_s - job_s) / span_s, nobody, nobody)
