"""Whose energy it was: a device's energy shared between the job, others, and nobody.

One rule for every device (docs/measurement, section D). Of each interval's energy, what is above
the device's idle draw belongs to those who used it, in proportion to their use: CPU time for CPU
and DRAM, SM utilisation for a GPU. The idle draw belongs to them too, for as much of the time as
the device was in use; for the rest, to the processes that hold the device (a GPU), to each the
same, or to nobody. So who is alone on a GPU owns all of it, and an idle machine's draw is nobody's.
The shares of an interval add up to its energy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pepr_profiler.energy.activity import Activity, Use, cpu_use, whole_use
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers
from pepr_profiler.record import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHARING_U_REL = 0.10
"""Standard uncertainty of sharing by plain CPU time, of the part that others caused (judgement,
wider than the 4.2 % that METRION reaches with a model of SMT and frequency)."""

_SM_SHARING_U_REL = 0.20
"""The same for sharing a GPU by SM utilisation, which says how long an SM was busy, not how hard
(judgement: boards draw from half to all of their power at 100 %)."""

_TICK_S = 0.01
"""The kernel counts the machine's busy time in these: two uniform edges a window, 10 ms/sqrt(6)."""


class Shares(Record):
    """One device's energy by owner, J, cumulative at the grid: job + others + idle = device.

    `idle_w` is the device's idle draw, `job_idle_j` the part of it that is in `job_j`.
    """

    job_j: NDArray[np.float64]
    others_j: NDArray[np.float64]
    idle_j: NDArray[np.float64]
    u_rel: float
    busy_rate: float = 0.0  # CPU seconds a second, of everybody; 0 where nothing was shared
    idle_w: float | None = None
    job_idle_j: float | None = None
    presence_u_j: float = 0.0  # of when the job came to a GPU and left it, over `span_s`
    span_s: float = 0.0

    def u_j(self, energy_j: float, *, duration_s: float, windows: int = 1) -> float:
        """Standard uncertainty of the job's `energy_j` in some windows from the sharing alone."""
        busy_s = self.busy_rate * duration_s
        ticks_s = _TICK_S * math.sqrt(windows / 6) if self.u_rel else 0.0
        tick_rel = min(1.0, ticks_s / busy_s) if busy_s > 0 else 0.0
        inside = min(1.0, duration_s / self.span_s) if self.span_s > 0 else 0.0
        presence_j = self.presence_u_j * math.sqrt(inside)  # a window need not hold the instant
        return math.hypot(abs(energy_j) * math.hypot(self.u_rel, tick_rel), presence_j)


def share(
    curve: EnergyCurve,
    at_ns: NDArray[np.int64],
    activity: Activity | None,
    tenants: GpuUsers | None = None,
    *,
    idle_w: float | None = None,
) -> Shares:
    """Shares a device's energy interval by interval; `at_ns` is the curve's own grid.

    `tenants` is who computed on it, of a GPU; without them it is counted as the job's own.
    `idle_w` is its idle draw where that is known, else the lowest mean over one second is taken.
    Modelled memory is shared by resident size over installed size, as its power is.
    """
    step_j = np.diff(curve.energy_j, prepend=curve.energy_j[:1])
    span_s = np.diff(at_ns, prepend=at_ns[:1]) * 1e-9
    active = activity is not None and len(activity.t_ns) > 1
    by_cpu = curve.source.kind in ("cpu", "dram") and active
    if idle_w is None:
        idle_w = lowest_power_w(curve, at_ns)
    if by_cpu and activity is not None and curve.source.id == "dram:modelled":
        resident = np.interp(at_ns, activity.t_ns, activity.rss_bytes) / activity.installed_bytes
        part = np.minimum(0.5 * (resident + np.concatenate((resident[:1], resident[:-1]))), 1.0)
        # Memory that is not the job's is nobody's in particular.
        split = [step_j * part, np.zeros(len(step_j)), step_j * (1.0 - part), np.zeros(len(step_j))]
        idle_w = None
    else:
        use = whole_use(at_ns)
        if by_cpu and activity is not None:
            use = cpu_use(activity, at_ns[0], at_ns[-1])
        elif tenants is not None:
            use = tenants.use
        split = _split(step_j, (idle_w or 0.0) * span_s, use.on(at_ns))
    job_j, others_j, idle_j, job_idle_j = (np.cumsum(part) for part in split)
    busy_rate = 0.0
    if by_cpu and activity is not None:
        busy_s, span_ns = np.ptp(activity.busy_s), np.ptp(activity.t_ns)
        busy_rate = float(busy_s / span_ns * 1e9) if span_ns > 0 else 0.0
    total_j = float(np.sum(step_j))
    other = 1.0 - float(job_j[-1]) / total_j if total_j > 0 else 0.0
    u_rel = _SM_SHARING_U_REL if tenants is not None else _SHARING_U_REL
    if tenants is not None:  # what is nobody's or another's alone is known to be
        other = float(others_j[-1]) / total_j if total_j > 0 and tenants.job_s > 0 else 0.0
    modelled_too = curve.source.provenance == "modelled"
    presence_j = 0.0
    if tenants is not None and idle_w is not None:
        presence_j = idle_w * tenants.period_s * math.sqrt(tenants.changes / 12)
    return Shares(
        job_j,
        others_j,
        idle_j,
        0.0 if modelled_too else u_rel * max(other, 0.0),
        busy_rate,
        idle_w,
        float(job_idle_j[-1]) if idle_w is not None and len(job_idle_j) else None,
        presence_j,
        float(np.sum(span_s)),
    )


def _split(
    step_j: NDArray[np.float64], draw_j: NDArray[np.float64], use: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Job, others, nobody, and the job's part of the idle draw, of each interval, J.

    `step_j` is the device's energy, `draw_j` what it would have drawn idle, `use` as of `Use.on`.
    """
    job, others, job_held, others_held = use
    draw_j = np.clip(draw_j, 0.0, np.maximum(step_j, 0.0))
    above_j = step_j - draw_j
    used = job + others
    busy = used > 0
    by_job = np.divide(job, used, out=np.zeros(len(used)), where=busy)
    in_use = np.minimum(used, 1.0)
    job_of_draw = in_use * by_job + (1.0 - in_use) * job_held
    others_of_draw = in_use * np.where(busy, 1.0 - by_job, 0.0) + (1.0 - in_use) * others_held
    job_j = draw_j * job_of_draw + above_j * np.where(busy, by_job, job_held)
    others_j = draw_j * others_of_draw + above_j * np.where(busy, 1.0 - by_job, others_held)
    nobody = np.maximum(1.0 - job_held - others_held, 0.0)
    idle_j = draw_j * (1.0 - in_use) * nobody + above_j * np.where(busy, 0.0, nobody)
    return [job_j, others_j, idle_j, draw_j * job_of_draw]


def certain_shares(use: Use, at_ns: NDArray[np.int64]) -> NDArray[np.float64]:
    """The least part of each interval's energy that is the job's, whatever the idle draw, (n - 1,).

    What the rule gives is linear in the idle draw, which lies between none and all that was drawn.
    """
    all_j = np.ones(len(at_ns))
    on = use.on(at_ns)
    none_idle, all_idle = (_split(all_j, draw_j, on)[0] for draw_j in (0.0 * all_j, all_j))
    return np.asarray(np.minimum(none_idle, all_idle)[1:])


def lowest_power_w(curve: EnergyCurve, at_ns: NDArray[np.int64]) -> float | None:
    """The lowest mean power over one second of what was recorded, W; None if nothing was.

    The idle draw is at most that. A second without any energy is a counter that stood still.
    """
    begin_ns, end_ns = max(at_ns[0], curve.first_ns), min(at_ns[-1], curve.last_ns)
    if curve.first_ns < 0 or end_ns <= begin_ns:
        return None
    seconds = np.linspace(begin_ns, end_ns, max(1, int((end_ns - begin_ns) // 1e9)) + 1)
    power_w = np.diff(np.interp(seconds, at_ns, curve.energy_j)) / np.diff(seconds) * 1e9
    power_w = power_w[power_w > 0]  # NaN is none either
    return float(power_w.min()) if len(power_w) else None
