"""Whose energy it was: a device's energy shared between the job, others, and nobody.

The shares of an interval add up to its energy. CPU packages and DRAM are shared by busy CPU time,
E_job = E · cpu_job / cpu_busy (docs/measurement, section D); what flows while nothing is busy is
idle. A GPU is counted as the job's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pepr_profiler import modelled
from pepr_profiler.energy import Curve, Source, gap_limit_s
from pepr_profiler.trace import Batch, Lane

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARE_WINDOW_NS = 1_000_000_000
"""Shares are formed over this long: the kernel counts the machine's busy time in ticks of 10 ms."""

_SHARING_U_REL = 0.10
"""Standard uncertainty of sharing by plain CPU time, of the part that others caused (judgement,
wider than the 4.2 % that METRION reaches with a model of SMT and frequency)."""

_TICK_S = 0.01
"""The kernel counts the machine's busy time in these: two uniform edges a window, 10 ms/sqrt(6)."""


@dataclass(frozen=True)
class Activity:
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


def read_activity(lane: Lane, batches: Iterable[Batch]) -> Activity | None:
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
) -> list[Curve]:
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
) -> Curve:
    """A curve from the mean power of each interval between samples; held beyond its ends."""
    if not len(power_w):
        return Curve(source, np.full(len(at_ns), np.nan), -1, -1)
    energy_j = np.concatenate(([0.0], np.cumsum(power_w * np.diff(t_ns) * 1e-9)))
    at = at_ns.astype(np.float64)
    curve_j = np.interp(at, t_ns, energy_j)
    curve_j += np.minimum(at - t_ns[0], 0.0) * 1e-9 * power_w[0]
    curve_j += np.maximum(at - t_ns[-1], 0.0) * 1e-9 * power_w[-1]
    apart_ns = np.diff(t_ns)
    period_s = float(np.sort(apart_ns)[len(apart_ns) // 2]) * 1e-9
    long = np.flatnonzero(apart_ns > gap_limit_s(period_s) * 1e9)
    gaps = tuple((int(t_ns[i]), int(t_ns[i + 1])) for i in long)
    return Curve(source, curve_j, int(t_ns[0]), int(t_ns[-1]), gaps_ns=gaps)


@dataclass(frozen=True)
class Shares:
    """One device's energy by owner, J, cumulative at the grid: job + others + idle = device."""

    job_j: NDArray[np.float64]
    others_j: NDArray[np.float64]
    idle_j: NDArray[np.float64]
    u_rel: float
    busy_rate: float = 0.0  # CPU seconds a second, of everybody; 0 where nothing was shared

    def u_j(self, energy_j: float, *, duration_s: float, windows: int = 1) -> float:
        """Standard uncertainty of the job's `energy_j` in some windows from the sharing alone."""
        busy_s = self.busy_rate * duration_s
        ticks_s = _TICK_S * math.sqrt(windows / 6) if self.u_rel else 0.0
        tick_rel = min(1.0, ticks_s / busy_s) if busy_s > 0 else 0.0
        return abs(energy_j) * math.hypot(self.u_rel, tick_rel)


def share(curve: Curve, at_ns: NDArray[np.int64], activity: Activity | None) -> Shares:
    """Shares a device's energy interval by interval; `at_ns` is the curve's own grid.

    Modelled memory is shared by resident size over installed size, as its power is.
    """
    step_j = np.diff(curve.energy_j, prepend=curve.energy_j[:1])
    shared = (
        curve.source.kind in ("cpu", "dram") and activity is not None and len(activity.t_ns) > 1
    )
    if not shared or activity is None:
        job, busy = np.ones(len(step_j)), np.ones(len(step_j))
    elif curve.source.id == "dram:modelled":
        resident = np.interp(at_ns, activity.t_ns, activity.rss_bytes) / activity.installed_bytes
        job = np.minimum(0.5 * (resident + np.concatenate((resident[:1], resident[:-1]))), 1.0)
        busy = job  # memory that is not the job's is nobody's in particular
    else:
        job, busy = _busy_shares(activity, at_ns)
    busy_rate = 0.0
    if shared and activity is not None:
        busy_s, span_ns = np.ptp(activity.busy_s), np.ptp(activity.t_ns)
        busy_rate = float(busy_s / span_ns * 1e9) if span_ns > 0 else 0.0
    job_j, device_j = np.cumsum(step_j * job), np.cumsum(step_j)
    idle_j = np.cumsum(step_j * (1.0 - busy))
    total_j = float(device_j[-1]) if len(device_j) else 0.0
    other = 1.0 - float(job_j[-1]) / total_j if total_j > 0 else 0.0
    u_rel = 0.0 if curve.source.provenance == "modelled" else _SHARING_U_REL * max(other, 0.0)
    return Shares(job_j, device_j - job_j - idle_j, idle_j, u_rel, busy_rate)


def _busy_shares(
    activity: Activity, at_ns: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each grid interval: the job's share of busy time, and 1 where anything was busy."""
    edges = _window_edges(activity.t_ns)
    job_s = np.diff(np.interp(edges, activity.t_ns, activity.job_cpu_s))
    # The machine's ticks may lag the job's own clock: it was at least as busy as the job.
    busy_s = np.maximum(np.diff(np.interp(edges, activity.t_ns, activity.busy_s)), job_s)
    with np.errstate(invalid="ignore"):
        job_share = np.where(busy_s > 0, job_s / busy_s, 0.0)
    middle = at_ns.astype(np.float64)
    middle = 0.5 * (middle + np.concatenate((middle[:1], middle[:-1])))
    window = np.clip(np.searchsorted(edges, middle, side="right") - 1, 0, len(job_s) - 1)
    return job_share[window], (busy_s > 0).astype(np.float64)[window]


def _window_edges(t_ns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of equal windows of about SHARE_WINDOW_NS over the samples' span."""
    count = max(1, math.floor((t_ns[-1] - t_ns[0]) / SHARE_WINDOW_NS))
    return np.linspace(t_ns[0], t_ns[-1], count + 1)
