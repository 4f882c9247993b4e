"""Whose energy it was: a device's energy shared between the job, others, and nobody.

One rule for every device (docs/measurement, section D), interval by interval:
- What is above the device's idle draw belongs to those who used it, in proportion to their use: CPU
  time for CPU and DRAM, SM utilisation for a GPU.
- The idle draw belongs to them too, for as much of the time as the device was in use. For the rest
  of the time it belongs to the processes that are present on a GPU, in equal parts, or to nobody.

So a job that is alone on a GPU owns all of it, an idle machine's draw is nobody's, and the shares
of an interval add up to its energy.
"""

from __future__ import annotations

import math

import numpy as np

from pepr_profiler.energy.activity import TICK_S, Activity, DeviceUse, cpu_use
from pepr_profiler.energy.blocks import BlockPart
from pepr_profiler.energy.curve import EnergyCurve, seconds_in
from pepr_profiler.energy.gpu_users import GpuUsers
from pepr_profiler.record import Floats, Ints, Record

_SHARING_U_REL = 0.10
"""Standard uncertainty of sharing by plain CPU time, of the part that others caused (judgement,
wider than the 4.2 % that METRION reaches with a model of SMT and frequency)."""

_SM_SHARING_U_REL = 0.20
"""The same for sharing a GPU by SM utilisation, which says how long an SM was busy, not how hard
(judgement: boards draw from half to all of their power at 100 %)."""

_SEEN_IDLE_S = 1.0
"""If a GPU was without the job for less than this, its lowest power may be that of the job."""


class Shares(Record):
    """One device's energy by owner, J, cumulative at the grid: job + others + idle = device.

    `idle_w` is the device's idle draw, `job_idle_j` the part of it that is in `job_j`.
    """

    job_j: Floats
    others_j: Floats
    idle_j: Floats
    u_rel: float
    busy_rate: float = 0.0  # CPU seconds a second, of everybody; 0 where CPU time shares nothing
    idle_w: float | None = None
    job_idle_j: float | None = None
    presence_u_j: float = 0.0  # by when the job came to a GPU and left it, over `span_s`
    span_s: float = 0.0
    edge_u_j: float = 0.0  # by when the job began or stopped to work, between two samples
    block_u_rel: float = 0.0  # by which of its process's blocks it was

    def u_j(self, energy_j: float, *, duration_s: float, windows: int = 1) -> float:
        """Standard uncertainty of the job's `energy_j` in some windows, by the sharing alone."""
        busy_s = self.busy_rate * duration_s
        ticks_s = TICK_S * math.sqrt(windows / 6) if self.u_rel else 0.0
        tick_rel = min(1.0, ticks_s / busy_s) if busy_s > 0 else 0.0
        inside = min(1.0, duration_s / self.span_s) if self.span_s > 0 else 0.0
        presence_j = self.presence_u_j * math.sqrt(inside)  # a window need not hold the instant
        edges_j = min(abs(energy_j), self.edge_u_j * math.sqrt(2 * windows))
        rel = math.hypot(self.u_rel, tick_rel, self.block_u_rel)
        return math.hypot(abs(energy_j) * rel, presence_j, edges_j)


def share(
    curve: EnergyCurve,
    at_ns: Ints,
    activity: Activity | None,
    users: GpuUsers | None = None,
    *,
    idle_w: float | None = None,
    most_idle_w: float = math.inf,
    part: BlockPart | None = None,
    by_rows: bool = False,
) -> Shares:
    """Shares a device's energy interval by interval; `at_ns` is the curve's own grid.

    `users` is who computed on a GPU; without it, all of it is counted as the job's own. `idle_w` is
    the device's idle draw where that is known, else the lowest mean over one second is taken.
    `most_idle_w` is the most that such a GPU draws when it is idle. CPU and memory are shared by
    `activity`, if it has samples: `by_rows` from sample to sample, else in windows of about 1 s.
    `part` is what of its process is the job's, if that is not all.
    """
    step_j = np.diff(curve.energy_j, prepend=curve.energy_j[:1])
    span_s = np.diff(at_ns, prepend=at_ns[:1]) * 1e-9
    if curve.source.kind not in ("cpu", "dram"):
        activity = None
    if activity is not None and len(activity.t_ns) < 2:
        activity = None
    if activity is not None and part is not None:
        activity = part.of_activity(activity)
    if idle_w is None:
        idle_w = lowest_power_w(curve, at_ns)
    draw_w = idle_w or 0.0
    use = DeviceUse.by_job_alone(at_ns[0], at_ns[-1])
    if activity is not None:
        use = cpu_use(activity, at_ns[0], at_ns[-1], at_ns if by_rows else None)
    elif users is not None:
        use = users.use
    if activity is None and part is not None:
        use = part.of_use(use)
    means = use.means(at_ns)
    absent_s = float(span_s[means[0] + means[2] == 0].sum())
    alone = users is not None and users.others_s == 0
    if alone and absent_s < _SEEN_IDLE_S:  # it was never seen idle
        draw_w = min(draw_w, most_idle_w / 2)
    parts = _split(step_j, draw_w * span_s, means)
    job_j, others_j, idle_j, job_idle_j = (np.cumsum(part) for part in parts)
    return Shares(
        job_j,
        others_j,
        idle_j,
        u_rel=_sharing_u_rel(curve, float(np.sum(step_j)), job_j, others_j, users),
        busy_rate=_busy_rate(activity),
        idle_w=idle_w,
        job_idle_j=float(job_idle_j[-1]) if idle_w is not None and len(job_idle_j) else None,
        presence_u_j=0.0 if users is None else draw_w * users.edges_s / math.sqrt(12),
        span_s=float(np.sum(span_s)),
        edge_u_j=_edge_u_j(activity, job_j) if by_rows and activity is not None else 0.0,
        block_u_rel=0.0 if part is None else part.u_rel(at_ns, job_j, by_cpu=activity is not None),
    )


def _edge_u_j(activity: Activity, job_j: Floats) -> float:
    """How sure the job's energy up to an instant is, by when in a row it used the CPU.

    Half of what a row that is as uneven as usual leaves open if nothing was known of its inside.
    """
    used_s, span_s = np.diff(activity.job_cpu_s), np.diff(activity.t_ns) * 1e-9
    if len(used_s) < 2 or not used_s.sum() > 0:
        return 0.0
    uneven = float(np.sqrt(np.mean(np.diff(used_s / span_s) ** 2)))
    per_cpu_j = float(job_j[-1] - job_j[0]) / float(used_s.sum())
    return per_cpu_j * uneven * float(np.mean(span_s)) / math.sqrt(12) / 2


def _sharing_u_rel(
    curve: EnergyCurve, total_j: float, job_j: Floats, others_j: Floats, users: GpuUsers | None
) -> float:
    """Relative standard uncertainty of the job's energy by how it was split from the others'."""
    if curve.source.provenance == "modelled" or not total_j > 0:  # the model's own is far larger
        return 0.0
    if users is None:
        return _SHARING_U_REL * max(1.0 - float(job_j[-1]) / total_j, 0.0)
    # Where the job was never there, or alone, that is known; so is what was nobody's.
    others_part = float(others_j[-1]) / total_j if users.job_s > 0 else 0.0
    return _SM_SHARING_U_REL * max(others_part, 0.0)


def _busy_rate(activity: Activity | None) -> float:
    if activity is None:
        return 0.0
    busy_s, span_ns = np.ptp(activity.busy_s), np.ptp(activity.t_ns)
    return float(busy_s / span_ns * 1e9) if span_ns > 0 else 0.0


def _split(step_j: Floats, draw_j: Floats, use: Floats) -> list[Floats]:
    """Job, others, nobody, and the job's part of the idle draw, of each interval, J.

    `step_j` is the device's energy, `draw_j` what it would have drawn idle, `use` is that of
    `DeviceUse.means`.
    """
    job, others, job_presence, others_presence = use
    draw_j = np.clip(draw_j, 0.0, np.maximum(step_j, 0.0))
    above_j = step_j - draw_j
    used = job + others
    busy = used > 0
    by_job = np.divide(job, used, out=np.zeros(len(used)), where=busy)
    in_use = np.minimum(used, 1.0)
    unused = 1.0 - in_use
    by_others = np.where(busy, 1.0 - by_job, 0.0)
    job_of_draw = in_use * by_job + unused * job_presence
    others_of_draw = in_use * by_others + unused * others_presence
    job_j = draw_j * job_of_draw + above_j * np.where(busy, by_job, job_presence)
    others_j = draw_j * others_of_draw + above_j * np.where(busy, by_others, others_presence)
    nobody = np.maximum(1.0 - job_presence - others_presence, 0.0)
    idle_j = draw_j * unused * nobody + above_j * np.where(busy, 0.0, nobody)
    return [job_j, others_j, idle_j, draw_j * job_of_draw]


def certain_shares(use: DeviceUse, at_ns: Ints) -> Floats:
    """The least part of each interval's energy that is the job's, whatever the idle draw, (n - 1,).

    The rule is linear in the idle draw, which lies between nothing and all that was drawn.
    """
    all_j = np.ones(len(at_ns))
    means = use.means(at_ns)
    no_draw, all_draw = (_split(all_j, draw_j, means)[0] for draw_j in (0.0 * all_j, all_j))
    return np.asarray(np.minimum(no_draw, all_draw)[1:])


def highest_power_w(curve: EnergyCurve, at_ns: Ints) -> float:
    """The highest mean power over one second of what was recorded, W; 0 if nothing was."""
    return float(np.max(_second_powers_w(curve, at_ns), initial=0.0))


def lowest_power_w(curve: EnergyCurve, at_ns: Ints) -> float | None:
    """The lowest mean power over one second of what was recorded, W; None if nothing was.

    The idle draw is at most that. In a second without any energy the counter stood still.
    """
    power_w = _second_powers_w(curve, at_ns)
    return float(power_w.min()) if len(power_w) else None


def _second_powers_w(curve: EnergyCurve, at_ns: Ints) -> Floats:
    """The mean powers of the seconds that were recorded, those above 0, W."""
    begin_ns, end_ns = max(at_ns[0], curve.first_ns), min(at_ns[-1], curve.last_ns)
    if curve.first_ns < 0 or end_ns <= begin_ns:
        return np.zeros(0)
    seconds = np.linspace(begin_ns, end_ns, seconds_in(int(begin_ns), int(end_ns)) + 1)
    power_w = np.diff(np.interp(seconds, at_ns, curve.energy_j)) / np.diff(seconds) * 1e9
    return np.asarray(power_w[power_w > 0])  # NaN is none either
