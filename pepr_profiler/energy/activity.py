"""What the job and the machine did, from the process lane, and who used a device when."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from pepr_profiler.record import Floats, Ints, Record
from pepr_profiler.trace.lane import Batch, LaneInfo

_SHARE_WINDOW_NS = 1_000_000_000
"""What others used is formed over this long where the kernel counts it in ticks."""

TICK_S = 0.01
"""The kernel's ticks: two uniform edges a window, 10 ms/sqrt(6)."""


class Activity(Record):
    """CPU time of the job and of everybody, and the job's memory. Arrays are (n,), times in ns.

    `job_cpu_s` and `busy_s` are cumulative; `rss_bytes` is the resident size of the job's
    processes, in which a shared page counts once a process. `charged` is the most memory that the
    kernel charged to the job's cgroup at once, its file cache included, and which file says so.
    """

    t_ns: Floats
    job_cpu_s: Floats
    busy_s: Floats
    rss_bytes: Floats
    cpus: int
    installed_bytes: float
    charged: tuple[int, str] | None = None

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
    charged = _ChargedMemory(list(channels))
    times, values = [], []
    for batch in batches:
        charged.take(batch)
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
        charged=charged.peak,
    )


class _ChargedMemory:
    """The peak of what a cgroup's memory.current and memory.peak say, where there are such."""

    def __init__(self, channels: list[str]) -> None:
        names = {"memory.current": "job/memory-current", "memory.peak": "job/memory-peak"}
        self._places = {f: channels.index(name) for f, name in names.items() if name in channels}
        self._first: dict[str, float] = {}
        self._most: dict[str, float] = {}

    def take(self, batch: Batch) -> None:
        for file, place in self._places.items():
            known = batch.values[place][np.isfinite(batch.values[place])]
            if len(known):
                self._first.setdefault(file, float(known[0]))
                self._most[file] = max(self._most.get(file, 0.0), float(known.max()))

    @property
    def peak(self) -> tuple[int, str] | None:
        """Bytes, and the file. The kernel's peak may be of before the run, unless it has grown."""
        file = "memory.peak"
        if self._most.get(file, 0.0) <= self._first.get(file, 0.0):
            file = "memory.current"
        most = self._most.get(file, 0.0)
        return (int(most), file) if most > 0 else None


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


def cpu_use(
    activity: Activity, begin_ns: float, end_ns: float, at_ns: Ints | None = None
) -> DeviceUse:
    """CPU seconds a second; nobody bears an unused CPU's idle draw.

    In windows of about 1 s, or, with `at_ns`, from row to row and between these instants. What
    others used stays a mean over about 1 s where the machine's busy time comes in ticks. What ran
    before `begin_ns` and after `end_ns` is left out: the profiler's start and summary.
    """
    sampled_ns = activity.t_ns[[0, -1]]
    begin_ns, end_ns = np.clip(sampled_ns, begin_ns, end_ns).tolist()
    if begin_ns == end_ns:  # nothing was sampled between them
        begin_ns, end_ns = sampled_ns.tolist()
    count = max(1, math.floor((end_ns - begin_ns) / _SHARE_WINDOW_NS))
    windows_ns = np.linspace(begin_ns, end_ns, count + 1)
    job_s = np.diff(np.interp(windows_ns, activity.t_ns, activity.job_cpu_s))
    busy_s = np.diff(np.interp(windows_ns, activity.t_ns, activity.busy_s))
    # The machine's ticks may lag the job's own clock: it was at least as busy as the job.
    edges_ns, others_s = windows_ns, np.maximum(busy_s - job_s, 0.0)
    if at_ns is not None and len(activity.t_ns) > 1:
        inside_ns = np.concatenate((activity.t_ns, at_ns.astype(np.float64)))
        inside_ns = inside_ns[(inside_ns > begin_ns) & (inside_ns < end_ns)]
        edges_ns = np.sort(np.concatenate((windows_ns, inside_ns)))
        edges_ns = edges_ns[np.diff(edges_ns, prepend=-1.0) > 0]
        job_s = np.diff(used_until_s(activity, edges_ns))
        if _comes_in_ticks(activity.busy_s):
            so_far_s = np.append(0.0, np.cumsum(others_s))
            others_s = np.diff(np.interp(edges_ns, windows_ns, so_far_s))
        else:
            others_s = np.diff(np.interp(edges_ns, activity.t_ns, activity.busy_s)) - job_s
            others_s = np.maximum(others_s, 0.0)
    span_s = np.diff(edges_ns) * 1e-9
    nobody = np.zeros(len(span_s))
    return DeviceUse(edges_ns, job_s / span_s, others_s / span_s, nobody, nobody)


def _comes_in_ticks(busy_s: Floats) -> bool:
    """Whether all of a machine's busy times are whole ticks of 10 ms."""
    ticks = busy_s / TICK_S
    return bool((np.abs(ticks - np.rint(ticks)) < 1e-6).all())


def used_until_s(activity: Activity, at_ns: Floats) -> Floats:
    """The job's CPU time up to some instants, where it may begin or stop to work between rows.

    Between two rows its use jumps from that before to that after, at the place that the row's own
    mean requires (subcell resolution: Harten 1989), if that mean lies between these two.
    """
    span_ns = np.maximum(np.diff(activity.t_ns), 1.0)
    rate = np.diff(activity.job_cpu_s) / span_ns
    row = np.clip(np.searchsorted(activity.t_ns, at_ns, side="right") - 1, 0, len(rate) - 1)
    x = np.clip((at_ns - activity.t_ns[row]) / span_ns[row], 0.0, 1.0)
    padded = np.concatenate((rate[:1], rate, rate[-1:]))
    before, mean, after = padded[row], padded[row + 1], padded[row + 2]
    jump = after - before
    steps = (jump != 0) & ((after - mean) * (mean - before) >= 0)
    y = np.divide(after - mean, jump, out=np.zeros(len(x)), where=steps)
    jumps = before * np.minimum(x, y) + after * np.maximum(x - y, 0.0)
    used = activity.job_cpu_s[row] + span_ns[row] * np.where(steps, jumps, x * mean)
    return np.asarray(used)
