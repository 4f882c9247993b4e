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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler import modelled
from pepr_profiler.curve import Curve, gap_limit_s
from pepr_profiler.record import Record
from pepr_profiler.sources import Source
from pepr_profiler.tenants import (
    Neighbour,
    Tenants,
    Use,
    not_the_jobs,
    visible_gpus,
    whole_use,
)
from pepr_profiler.trace import Batch, Lane

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARE_WINDOW_NS = 1_000_000_000
"""Shares are formed over this long: the kernel counts the machine's busy time in ticks of 10 ms."""

_SHARING_U_REL = 0.10
"""Standard uncertainty of sharing by plain CPU time, of the part that others caused (judgement,
wider than the 4.2 % that METRION reaches with a model of SMT and frequency)."""

_SM_SHARING_U_REL = 0.20
"""The same for sharing a GPU by SM utilisation, which says how long an SM was busy, not how hard
(judgement: boards draw from half to all of their power at 100 %)."""

_TICK_S = 0.01
"""The kernel counts the machine's busy time in these: two uniform edges a window, 10 ms/sqrt(6)."""


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
    curve: Curve,
    at_ns: NDArray[np.int64],
    activity: Activity | None,
    tenants: Tenants | None = None,
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


def lowest_power_w(curve: Curve, at_ns: NDArray[np.int64]) -> float | None:
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


def _window_edges(begin_ns: float, end_ns: float) -> NDArray[np.float64]:
    """Edges of equal windows of about SHARE_WINDOW_NS from one instant to another."""
    count = max(1, math.floor((end_ns - begin_ns) / SHARE_WINDOW_NS))
    return np.linspace(begin_ns, end_ns, count + 1)


# --- which devices are the job's, and who else was there ------------------------------------------


class Gpus(Record):
    """What is known of the NVIDIA GPUs' users, and which boards are the job's at all.

    `boards` are the labels of each by UUID, `visible` those that the job's CUDA may use (None: it
    cannot be told) and `asked` how it was told so. `busy` were busy at some time. `listed` says
    that the recording would have their processes, had the driver told.
    """

    boards: Mapping[str, Mapping[str, str]]
    tenants: Mapping[str, Tenants]
    visible: frozenset[str] | None
    asked: str
    busy: frozenset[str]
    listed: bool

    @classmethod
    def of(
        cls,
        facts: Mapping[str, Any],
        labels: Iterable[Mapping[str, str]],
        tenants: Mapping[str, Tenants],
        *,
        busy: Iterable[str],
    ) -> Gpus:
        """From run.json's `recording`, the labels of all channels, and who was seen."""
        boards = {of["uuid"]: of for of in labels if "uuid" in of}
        # A recording from before processes were listed tells nothing: all is the job's, as it was.
        cuda = facts.get("cuda")
        visible = visible_gpus(cuda, list(boards.values())) if cuda else frozenset(boards)
        asked = "; ".join(dict.fromkeys(str(e.get("CUDA_VISIBLE_DEVICES")) for e in cuda or ()))
        return cls(boards, tenants, visible, asked, frozenset(busy), "root" in facts)

    def tenants_of(self, curve: Curve) -> Tenants | None:
        """Who used it, as far as that decides whose its energy is."""
        uuid = curve.source.id.removeprefix("gpu:")
        tenants = self.tenants.get(uuid)
        untold = tenants is None or tenants.unknown_s > 0 or bool(self._why_whole(uuid))
        if self._hidden(uuid) and untold and (tenants is None or tenants.job_s == 0):
            return not_the_jobs(curve.first_ns, curve.last_ns)
        return None if self._why_whole(uuid) else tenants

    def judged(self, curve: Curve) -> Curve:
        """The curve, out of the total if its GPU is none that the job used, or could use."""
        uuid = curve.source.id.removeprefix("gpu:")
        excluded = self._excluded(uuid) if uuid in self.boards else ""
        if not excluded or not curve.source.in_total:
            return curve
        return curve._replace(source=curve.source._replace(in_total=False, excluded=excluded))

    def peak_bytes(self, of_boards: int | None) -> int | None:
        """The job's memory on GPUs where its processes are known; else what the boards held."""
        mine = [of.job_peak_bytes for of in self.tenants.values() if of.job_peak_bytes]
        told = all(not self._why_whole(uuid) for uuid in self.boards)
        return sum(mine) if mine and told else of_boards

    def _excluded(self, uuid: str) -> str:
        tenants = self.tenants.get(uuid)
        if tenants is not None and tenants.job_s > 0:
            return ""
        if self._hidden(uuid):
            return f"is not visible to the job (CUDA_VISIBLE_DEVICES={self.asked})"
        known = tenants is not None and tenants.unknown_s == 0 and not self._why_whole(uuid)
        return "was not used by the job" if known else ""

    def _hidden(self, uuid: str) -> bool:
        return self.visible is not None and uuid in self.boards and uuid not in self.visible

    def _why_whole(self, uuid: str) -> str:
        """Why it cannot be told who used a GPU; nothing where it can."""
        tenants = self.tenants.get(uuid)
        if tenants is None:
            return "no list of its processes was read"
        if tenants.job_s + tenants.others_s + tenants.unknown_s > 0:
            return ""
        if uuid in self.busy:
            return "it was busy, and its driver lists no process on it"
        if self.boards.get(uuid, {}).get("mig") == "on":
            return "the list of its processes, which needs root on a MIG board, is empty"
        return "" if tenants.reads > 0 else "the run was shorter than two reads of its processes"

    def warnings(
        self, counted: Iterable[Curve], begin_ns: int, end_ns: int
    ) -> Iterator[dict[str, str]]:
        """Which of them are counted whole because nobody can tell, and which others shared."""
        if not self.listed:
            return
        if self.visible is None:
            yield warning(
                "cuda-order",
                f"CUDA_VISIBLE_DEVICES={self.asked} does not tell which GPUs the job may use: "
                "their models differ, and CUDA counts the fastest first",
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPUs by UUID (nvidia-smi -L)",
            )
        duration_s = (end_ns - begin_ns) * 1e-9
        for curve in counted:
            uuid = curve.source.id.removeprefix("gpu:")
            if uuid not in self.boards:
                continue
            name = f"gpu:{self.boards[uuid]['index']}"
            tenants = self.tenants.get(uuid)
            why = self._why_whole(uuid)
            if duration_s > _SHORT_S and why:
                yield _whole(name, why, 1.0)
            if tenants is None or why:
                continue
            if tenants.unknown_s > _SHARED * duration_s:
                yield _whole(name, tenants.why, tenants.unknown_s / duration_s)
            if tenants.others_s > _SHARED * duration_s:
                yield _shared(
                    f"{name} was used by other processes for {tenants.others_s / duration_s:.0%} "
                    f"of the run: {_named(tenants.neighbours, duration_s)}"
                )
            unread_s = (end_ns - tenants.last_ns) * 1e-9
            if unread_s > max(10 * tenants.period_s, _SHARED * duration_s):
                yield warning(
                    "processes-gap",
                    f"who used {name} is not known of the last {unread_s:.1f} s; "
                    "it is taken to have gone on as before",
                    "see dmesg for its driver",
                )


def _whole(name: str, why: str, part: float) -> dict[str, str]:
    some = "" if part > 0.99 else f" for {part:.0%} of the run"
    return warning(
        "whole-device",
        f"who used {name} cannot be told{some}: {why}; all of its energy there is counted as the "
        "job's",
        "in a container: share the host's PIDs (docker run --pid=host), or profile on the host",
    )


def _shared(text: str) -> dict[str, str]:
    return warning(
        "shared-device",
        text,
        "compare runs only on devices that they have to themselves; the job's share is counted",
    )


_SHARED = 0.05
"""Others who used a device for more than this part of a run are worth a warning."""

_SHORT_S = 1.5
"""In a run shorter than this, who used a GPU is not worth a warning: it is read twice a second."""

_NAMED, _SHOWN = 3, 40


def _named(neighbours: Sequence[Neighbour], duration_s: float) -> str:
    texts = []
    for one in neighbours[:_NAMED]:
        use = "" if one.part is None else f", {one.part:.0%} of its use"
        texts.append(f"{_who(one._asdict())} ({one.present_s / duration_s:.0%} of the time{use})")
    return ", ".join(texts) + _more(len(neighbours))


def _who(process: Mapping[str, Any]) -> str:
    command = process["command"] or f"of {process['user'] or 'another user'}"
    return f"PID {process['pid']} {command if len(command) <= _SHOWN else command[:_SHOWN] + '…'}"


def _more(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""


def cpu_neighbours(
    notes: Iterable[Mapping[str, Any]],
    activity: Activity,
    others_part: float,
    window_ns: tuple[int, int],
) -> list[dict[str, str]]:
    """A warning that names who else used the CPU, if others had `others_part` of its energy.

    From the last look at all processes within the window. The profiler's own CPU time is in the
    others' energy, but is nobody to be warned of.
    """
    looks = [n for n in notes if n.get("event") == "cpu" and window_ns[0] < n["t_ns"]]
    if not looks or others_part < _SHARED:
        return []
    look = next((n for n in reversed(looks) if n["t_ns"] <= window_ns[1] + _AFTER_NS), looks[0])
    span_ns = look["since_ns"], look["t_ns"]
    busy_s, job_s = activity.busy_between(*span_ns), activity.job_cpu_between(*span_ns)
    others_s = busy_s - job_s - look["profiler_s"]
    if others_s < _SHARED * (span_ns[1] - span_ns[0]) * 1e-9:
        return []
    named = [p for p in look["processes"] if p["cpu_s"] > 0.01 * busy_s]
    texts = [f"{_who(p)} ({p['cpu_s'] / busy_s:.0%})" for p in named[:_NAMED]]
    rest_s = others_s - math.fsum(p["cpu_s"] for p in look["processes"])
    if rest_s > _SHARED * busy_s or not texts:
        texts.append(f"the kernel and processes that came and went ({rest_s / busy_s:.0%})")
    text = (
        f"other processes took {others_s / busy_s:.0%} of the CPU time that was used: "
        f"{', '.join(texts)}{_more(len(named))}"
    )
    return [_shared(text)]


_AFTER_NS = 2_000_000_000
"""The last look at all processes is taken when the run has ended."""


def warning(code: str, text: str, hint: str) -> dict[str, str]:
    """A warning as a summary has it."""
    return {"code": code, "text": text, "hint": hint}
