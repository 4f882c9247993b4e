"""What the job and the machine did over time, from the process lane, and who used a device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pepr_profiler.energy import modelled
from pepr_profiler.energy.curve import EnergyCurve, gap_limit_s
from pepr_profiler.energy.sources import Source
from pepr_profiler.record import Record
from pepr_profiler.trace.lane import Batch, LaneInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray


if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARE_WINDOW_NS = 1_000_000_000
"""Shares are formed over this long: the kernel counts the machine's busy time in ticks of 10 ms."""


class Activity(Record):
    """What the job and the machine did, from the process lane. Arrays are (n,), times in ns.

    `job_cpu_s` and `busy_s` are cumulative; `rss_bytes` is the tree's, shared pages counted in each
    process; `peak_rss_bytes` is its largest sample, None if there is none above 0.
    """

    t_ns: NDArray[np.float64]
    job_cpu_s: NDArray[np.float64]
    busy_s: NDArray[np.float64]
    rss_bytes: NDArray[np.float64]
    cpus: int
    installed_bytes: float

    @property
    def peak_rss_bytes(self) -> int | None:
        peak = float(np.max(self.rss_bytes, initial=0.0))
        return int(peak) if peak > 0 else None

    def load(self) -> NDArray[np.float64]:
        """The machine's busy fraction between samples, (n - 1,)."""
        span_s = np.diff(self.t_ns) * 1e-9
        return np.asarray(np.diff(self.busy_s) / (span_s * self.cpus))

    def job_cpu_between(self, begin_ns: int, end_ns: int) -> float:
        """CPU seconds of the job from one instant to another."""
        ends = np.interp([begin_ns, end_ns], self.t_ns, self.job_cpu_s)
        return float(ends[1] - ends[0])

    def busy_between(self, begin_ns: int, end_ns: int) -> float:
        """CPU seconds of everybody from one instant to another."""
        ends = np.interp([begin_ns, end_ns], self.t_ns, self.busy_s)
        return float(ends[1] - ends[0])


def read_activity(lane: LaneInfo, batches: Iterable[Batch]) -> Activity | None:
    """The process lane as arrays; None if it holds no row."""
    index = {channel.name: i for i, channel in enumerate(lane.channels)}
    columns = ["job/cpu", "system/busy", "job/rss"]
    times, values = [], []
    for batch in batches:
        times.append((batch.t_ns + batch.read_ns // 2).astype(np.float64))
        values.append(batch.values[[index[name] for name in columns]])
    if not times:
        return None
    t_ns, rows = np.concatenate(times), np.concatenate(values, axis=1)
    known = np.isfinite(rows).all(axis=0)
    job_cpu_s, busy_s, rss_bytes = rows[:, known]
    labels = {channel.name: channel.labels for channel in lane.channels}
    return Activity(
        t_ns=t_ns[known],
        job_cpu_s=job_cpu_s,
        busy_s=busy_s,
        rss_bytes=rss_bytes,
        cpus=int(labels["system/busy"]["cpus"]),
        installed_bytes=float(labels["job/rss"]["installed_bytes"]),
    )


def modelled_curves(
    activity: Activity, at_ns: NDArray[np.int64], *, cpu: modelled.CpuModel, ram: modelled.RamModel
) -> list[EnergyCurve]:
    """Energy of CPU and memory from recorded utilisation, for a machine without sensors."""
    cpu_w = modelled.power_w(cpu, activity.load())
    ram_w = np.full(len(cpu_w), ram.power_w(activity.installed_bytes))
    # u is stated for k = 2; a source carries k = 1. It is a scale error, fixed for the machine.
    sources = (
        Source("cpu:modelled", "cpu", "modelled", "processes", -1, "utilisation", counter=False,
               provenance="modelled", gain=cpu.u_rel / 2),
        Source("dram:modelled", "dram", "modelled", "processes", -1, "installed-memory",
               counter=False, provenance="modelled", gain=ram.u_rel / 2),
    )  # fmt: skip
    return [
        _from_power(source, activity.t_ns, power_w, at_ns)
        for source, power_w in zip(sources, (cpu_w, ram_w), strict=True)
    ]


def _from_power(
    source: Source,
    t_ns: NDArray[np.float64],
    power_w: NDArray[np.float64],
    at_ns: NDArray[np.int64],
) -> EnergyCurve:
    """A curve from the mean power of each interval between samples; held beyond its ends."""
    if not len(power_w):
        return EnergyCurve(source, np.full(len(at_ns), np.nan), -1, -1)
    energy_j = np.concatenate(([0.0], np.cumsum(power_w * np.diff(t_ns) * 1e-9)))
    at = at_ns.astype(np.float64)
    curve_j = np.interp(at, t_ns, energy_j)
    curve_j += np.minimum(at - t_ns[0], 0.0) * 1e-9 * power_w[0]
    curve_j += np.maximum(at - t_ns[-1], 0.0) * 1e-9 * power_w[-1]
    apart_ns = np.diff(t_ns)
    period_s = float(np.sort(apart_ns)[len(apart_ns) // 2]) * 1e-9
    long = np.flatnonzero(apart_ns > gap_limit_s(period_s) * 1e9)
    gaps = tuple((int(t_ns[i]), int(t_ns[i + 1])) for i in long)
    return EnergyCurve(source, curve_j, int(t_ns[0]), int(t_ns[-1]), gaps_ns=gaps)


def cpu_use(activity: Activity, begin_ns: float, end_ns: float) -> Use:
    """CPU seconds a second, in windows of about 1 s. A CPU is held by nobody.

    What ran before `begin_ns` and after `end_ns` is left out: the profiler's start and summary.
    """
    begin_ns, end_ns = np.clip(activity.t_ns[[0, -1]], begin_ns, end_ns).tolist()
    if begin_ns == end_ns:  # nothing was sampled during it
        begin_ns, end_ns = activity.t_ns[[0, -1]].tolist()
    edges = _window_edges(begin_ns, end_ns)
    span_s = np.diff(edges) * 1e-9
    job_s = np.diff(np.interp(edges, activity.t_ns, activity.job_cpu_s))
    # The machine's ticks may lag the job's own clock: it was at least as busy as the job.
    busy_s = np.maximum(np.diff(np.interp(edges, activity.t_ns, activity.busy_s)), job_s)
    nobody = np.zeros(len(span_s))
    return Use(edges, job_s / span_s, (busy_s - job_s) / span_s, nobody, nobody)


def _window_edges(begin_ns: float, end_ns: float) -> NDArray[np.float64]:
    """Edges of equal windows of about SHARE_WINDOW_NS from one instant to another."""
    count = max(1, math.floor((end_ns - begin_ns) / SHARE_WINDOW_NS))
    return np.linspace(begin_ns, end_ns, count + 1)


class Use(Record):
    """Who used a device, interval by interval: `edges_ns` (n + 1,), the rest (n,).

    `job` and `others` are use in any unit of which 1 is a device in use all of the time; `job_held`
    and `others_held` are the parts of the unused time's idle draw that are theirs, at most 1
    together. Before the first edge and after the last, the first and the last interval go on.
    """

    edges_ns: NDArray[np.float64]
    job: NDArray[np.float64]
    others: NDArray[np.float64]
    job_held: NDArray[np.float64]
    others_held: NDArray[np.float64]

    def on(self, at_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Means over the grid's intervals, (4, m); the first, which is no interval, has 0."""
        origin_ns = self.edges_ns[0]
        at = at_ns - origin_ns
        edges = self.edges_ns - origin_ns
        edges[0], edges[-1] = min(edges[0], at[0]), max(edges[-1], at[-1])
        spans = np.diff(edges)
        steps = np.diff(at, prepend=at[:1])
        result = np.zeros((4, len(at)))
        for row, values in enumerate((self.job, self.others, self.job_held, self.others_held)):
            summed = np.interp(at, edges, np.concatenate(([0.0], np.cumsum(values * spans))))
            np.divide(np.diff(summed, prepend=summed[:1]), steps, out=result[row], where=steps > 0)
        return result


def whole_use(at_ns: NDArray[np.int64]) -> Use:
    """All of a device is the job's: alone on it, or nobody can tell."""
    one, none = np.ones(1), np.zeros(1)
    return Use(np.array([at_ns[0], at_ns[-1]], dtype=np.float64), one, none, one, none)
