"""From a run directory to its summary: the one place where a run's numbers are put together.

Everything is computed from what is on disk, so that `report` on an old recording gives what `run`
printed, or better once the methods are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler import carbon as carbon_model
from pepr_profiler import modelled
from pepr_profiler.attribution import (
    Activity,
    Gpus,
    Shares,
    cpu_neighbours,
    modelled_curves,
    read_activity,
    share,
    warning,
)
from pepr_profiler.curve import Curve, gap_limit_s
from pepr_profiler.energy import integrate
from pepr_profiler.errors import TraceError
from pepr_profiler.progress import COUNTERS, Logged, finite
from pepr_profiler.record import Record
from pepr_profiler.sources import find_cross_sources, find_sources
from pepr_profiler.tenants import Tenants, read_tenants
from pepr_profiler.trace import (
    MALFORMED,
    Batch,
    Events,
    LaneReader,
    Phase,
    joined,
    lane_names,
    read_events,
    read_lanes,
    read_neighbours,
    read_run,
)
from pepr_profiler.uncertainty import Budget, CrossCheck, budget, cross_check

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRACE_BUCKETS = 48
"""Points of the power-over-time line in a summary."""

_STEPS, _SHORTEST_STEP_S = 480, 0.05
"""Steps of a timeline: two pixels of a page each, unless the run is short."""

_BANDED_S = 2.0
"""Steps this long or longer hold seconds to take the lowest and highest of."""

_BAND_POINTS = 120
"""Instants at which the uncertainty of the energy so far is told."""


class TimelineComponent(Record):
    """One component's power in each step (n,), W; NaN where it was not read.

    `job_w` is what is counted of `device_w`: the job's share, or all of it where the run's scope is
    "device". `low_w` and `high_w` are the lowest and the highest
    mean over one second in the step, of the device; None where the steps are shorter.
    """

    id: str
    kind: str
    label: str
    provenance: str
    in_total: bool
    job_w: NDArray[np.float64]
    device_w: NDArray[np.float64]
    low_w: NDArray[np.float64] | None
    high_w: NDArray[np.float64] | None
    gaps_s: tuple[tuple[float, float], ...]


class Timeline(Record):
    """A run over time, s since its begin: `edges_s` (n + 1,) of n steps that are equally long.

    `energy_j` and `u_j` (m,) are what is counted up to `at_s` (m,), and its u (k = 2). `phases`
    are (name, begin, end).
    """

    edges_s: NDArray[np.float64]
    components: tuple[TimelineComponent, ...]
    at_s: NDArray[np.float64]
    energy_j: NDArray[np.float64]
    u_j: NDArray[np.float64]
    phases: tuple[tuple[str, float, float], ...]


_CHECKED_NS = 2_000_000_000
"""From this length on, a counter and power readings that disagree are worth a warning."""

_PART_TIME, _STEADY = ("nvml-power", "nvml-power-instant"), 1e-3
"""Readings that may look at a part of each refresh period only, and below which part of an energy
their spread says nothing any more about what they did not see."""

_LONGEST_NS = 1000 * 86_400_000_000_000
"""A longer recording is a damaged time."""

_MOST_SECONDS = 1 << 22
"""From 48 days on, the seconds of a run are looked at as that many longer steps."""

_STALL_S = 5.0
"""A device that computes changes its energy counter far more often than this."""


def summarise(
    directory: Path,
    *,
    since_ns: int | None = None,
    until_ns: int | None = None,
    marks: bool = True,
    run: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary of a run directory (docs/design.md, Contract), finished or not.

    `run` stands in for run.json: its writer knows what a full disk did not take.
    `since_ns` and `until_ns` narrow the window, for a part of a run or a look at one in progress.
    Without `marks` there are neither phases nor metrics, and a look costs no 17 µs a mark.
    Raises TraceError if the directory is not a recording.
    """
    with _interpreting(directory):
        return _examine(directory, since_ns, until_ns, marks, run)[0]


def with_timeline(directory: Path) -> tuple[dict[str, Any], Timeline]:
    """The summary of a run directory, and the run over time, from one pass over its trace."""
    with _interpreting(directory):
        summary, parts, grid, phases = _examine(directory)
        return summary, _timeline(parts, grid, phases)


@contextmanager
def _interpreting(directory: Path) -> Iterator[None]:
    """Labels, options and numbers of a recording are used as its profiler wrote them."""
    try:
        yield
    except MALFORMED as error:
        raise TraceError(
            f"the recording {directory} contradicts itself",
            why=f"one of its files was changed or damaged ({type(error).__name__}: {error})",
            fix="restore it; if nothing has changed it, please report this as a fault of "
            "pepr-profiler, with the directory",
        ) from error


def _examine(
    directory: Path,
    since_ns: int | None = None,
    until_ns: int | None = None,
    marks: bool = True,
    run: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[_Part], _Grid, list[Phase]]:
    run = read_run(directory) if run is None else dict(run)
    run.setdefault("complete", False)  # what does not tell its end has none
    run.setdefault("exit_code", None)
    facts = _recording(run, directory)
    readers = read_lanes(directory)
    events = read_events(directory) if marks else Events((), (), 0)
    begin_ns, end_ns = _window(facts, readers, since_ns, until_ns)
    phases = [_clip(phase, begin_ns, end_ns) for phase in events.phases]
    phases = [
        phase for phase in phases if phase.end_ns is not None and phase.end_ns >= phase.begin_ns
    ]
    logged = Logged.within(events.metrics, begin_ns, end_ns, cut=until_ns is not None)
    grid = _Grid.over(begin_ns, end_ns, phases, logged.at_ns)

    gauges = _Gauges()
    notes = read_neighbours(directory)
    tenants = _tenants(readers, notes, gauges, begin_ns, end_ns)
    curves, checks, activity, idle_w = _curves(readers, facts, grid.at_ns, gauges)
    options = facts["options"]
    scope = options.get("scope", "job")
    labels = [channel.labels for r in readers.values() for channel in r.lane.channels]
    gpus = Gpus.of(facts, labels, tenants, busy=gauges.busy)
    parts = [
        _Part(
            gpus.judged(curve),
            share(
                curve,
                grid.at_ns,
                activity,
                gpus.tenants_of(curve),
                idle_w=idle_w.get(curve.source.id),
            ),
            checks.get(curve.source.id),
            scope,
        )
        for curve in curves
    ]
    counted = [part for part in parts if part.counted]
    duration_s = (end_ns - begin_ns) * 1e-9

    total_j = _sum(part.counted_j for part in counted)
    u_j = math.hypot(*(part.whole(grid).u_j for part in counted))
    metrics = _metrics(events.metrics)
    exit_facts = facts.get("exit") or {}
    run.update(
        duration_s=duration_s,
        time_s=duration_s,
        energy={
            "total_j": total_j,
            "u_j": 2 * u_j if counted else None,
            "mean_w": total_j / duration_s if total_j is not None and duration_s > 0 else None,
            "provenance": _provenance(counted),
            "scope": scope,
            "others_j": _sum(part.others_j for part in counted),
            "idle_j": _sum(part.idle_j for part in counted),
            "components": [part.summary(grid, duration_s) for part in parts],
        },
        phases=_phases(phases, counted, grid),
        memory={
            "peak_rss_bytes": _largest(
                activity.peak_rss_bytes if activity else None, exit_facts.get("max_rss_bytes")
            ),
            "gpu_peak_bytes": gpus.peak_bytes(gauges.peak_sum("nvml-memory")),
        },
        carbon=_carbon(total_j, options),
        metrics=metrics,
        progress=_progress(logged, counted, grid),
        performance=_performance(metrics, options.get("performance")),
        sampler=_sampler(facts, readers, gauges, duration_s),
        warnings=[
            *facts.get("warnings", []),
            *_unwritten(facts, lane_names(directory), readers),
            *_warnings(parts, events.torn_lines, begin_ns, end_ns, full=_is_rows_lost(facts)),
            *gpus.warnings([part.curve for part in counted], begin_ns, end_ns),
            *_cpu_neighbours(counted, notes, activity, (begin_ns, end_ns)),
        ],
    )
    return run, parts, grid, phases


def _recording(run: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    facts = run.get("recording")
    if not isinstance(facts, dict) or not {"window_ns", "cpu", "options"} <= facts.keys():
        raise TraceError(
            f"{directory / 'run.json'} tells of no recording",
            why="it lacks what the profiler notes when it starts; another program may have made it",
            fix="point at a run directory that pepr-profile wrote",
        )
    return facts


def _window(
    facts: Mapping[str, Any],
    readers: Mapping[str, LaneReader],
    since_ns: int | None,
    until_ns: int | None,
) -> tuple[int, int]:
    """What is summarised: the child's life or the block's; to the last row if it never ended."""
    begin_ns, end_ns = facts["window_ns"]
    if begin_ns is not None and not 0 <= begin_ns <= (begin_ns if end_ns is None else end_ns):
        raise ValueError(f"its window is {begin_ns} … {end_ns} ns")
    if begin_ns is None:
        raise TraceError(
            f"run {facts.get('name', '')} never began",
            why="the profiler ended before it started the command",
            fix="remove its directory",
        )
    if since_ns is not None:
        begin_ns = max(begin_ns, since_ns)
    if end_ns is None and until_ns is not None:
        end_ns = until_ns
    if end_ns is None:
        last = [batch.t_ns[-1] for reader in readers.values() for batch in reader]
        end_ns = max([begin_ns, *(int(t) for t in last)])
    if until_ns is not None:
        end_ns = max(begin_ns, min(end_ns, until_ns))
    if end_ns - begin_ns > _LONGEST_NS:
        raise ValueError(f"it lasts {(end_ns - begin_ns) * 1e-9 / 86400:.0f} days")
    return begin_ns, end_ns


def _clip(phase: Phase, begin_ns: int, end_ns: int) -> Phase:
    phase_end_ns = end_ns if phase.end_ns is None else phase.end_ns
    return Phase(phase.name, max(phase.begin_ns, begin_ns), min(phase_end_ns, end_ns), phase.nested)


class _Grid(Record):
    """The instants at which energy is needed: seconds, buckets, steps, marks, both ends."""

    at_ns: NDArray[np.int64]
    seconds_ns: NDArray[np.int64]
    buckets_ns: NDArray[np.int64]
    steps_ns: NDArray[np.int64]

    @classmethod
    def over(
        cls, begin_ns: int, end_ns: int, phases: Iterable[Phase], logged_ns: NDArray[np.int64]
    ) -> _Grid:
        seconds = min(max(1, (end_ns - begin_ns) // 1_000_000_000), _MOST_SECONDS)
        seconds_ns = np.linspace(begin_ns, end_ns, seconds + 1).astype(np.int64)
        buckets_ns = np.linspace(begin_ns, end_ns, TRACE_BUCKETS + 1).astype(np.int64)
        steps = int(min(_STEPS, max(TRACE_BUCKETS, (end_ns - begin_ns) * 1e-9 / _SHORTEST_STEP_S)))
        steps_ns = np.linspace(begin_ns, end_ns, steps + 1).astype(np.int64)
        edges = [edge for phase in phases for edge in (phase.begin_ns, phase.end_ns)]
        edges_ns = np.array(edges, dtype=np.int64)
        at_ns = np.sort(np.concatenate((seconds_ns, buckets_ns, steps_ns, edges_ns, logged_ns)))
        at_ns = at_ns[np.diff(at_ns, prepend=at_ns[0] - 1) > 0]  # np.unique loads numpy.ma: 15 ms
        return cls(at_ns, seconds_ns, buckets_ns, steps_ns)

    def pick(self, values: NDArray[np.float64], at_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        """The values, given on the grid, at instants that are on it."""
        return np.asarray(values[self.where(at_ns)])

    def where(self, at_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where on the grid these instants of it are."""
        return np.asarray(np.searchsorted(self.at_ns, at_ns))


_FIGURES = (
    *("device_j", "job_j", "others_j", "idle_j", "idle_w", "job_idle_j"),
    *("u_j", "mean_w", "max_w", "trace_w"),
)


class _Part(Record):
    """One component with its shares, and what another sensor of the same device says.

    `scope` says what of it is counted: "job", the job's share, or "device", all.
    """

    curve: Curve
    shares: Shares
    check: CrossCheck | None = None
    scope: str = "job"

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.curve.energy_j).all()) and len(self.curve.energy_j) > 0

    @property
    def counted(self) -> bool:
        return self.curve.source.in_total and self.known

    @property
    def device_j(self) -> float:
        return float(self.curve.energy_j[-1] - self.curve.energy_j[0])

    @property
    def job_j(self) -> float:
        return float(self.shares.job_j[-1])

    @property
    def others_j(self) -> float:
        return float(self.shares.others_j[-1])

    @property
    def idle_j(self) -> float:
        return float(self.shares.idle_j[-1])

    @property
    def counted_j(self) -> float:
        return float(self.counting_j[-1])

    @property
    def counting_j(self) -> NDArray[np.float64]:
        """What of it is counted, cumulative at the grid."""
        if self.scope == "job":
            return self.shares.job_j
        return np.asarray(self.curve.energy_j - self.curve.energy_j[0])

    def budget(
        self, grid: _Grid, begins_ns: NDArray[np.int64], ends_ns: NDArray[np.int64]
    ) -> Budget:
        """The budget of what is counted in some windows whose edges are on the grid."""
        begins, ends = grid.where(begins_ns), grid.where(ends_ns)
        energy_j = float(np.sum(self.counting_j[ends] - self.counting_j[begins]))
        of_device = budget(self.curve, grid.at_ns, begins, ends, energy_j=energy_j)
        if self.scope != "job":
            return of_device
        duration_s = float(np.sum(ends_ns - begins_ns)) * 1e-9
        u_j = self.shares.u_j(energy_j, duration_s=duration_s, windows=len(begins))
        return of_device._replace(attribution_j=u_j)

    def whole(self, grid: _Grid) -> Budget:
        """The budget of what is counted in all."""
        return self.budget(grid, grid.at_ns[:1], grid.at_ns[-1:])

    def summary(self, grid: _Grid, duration_s: float) -> dict[str, Any]:
        source = self.curve.source
        result: dict[str, Any] = {
            "id": source.id,
            "kind": source.kind,
            "label": source.label,
            "source": source.source,
            "provenance": source.provenance,
            "in_total": source.in_total,
        }
        if source.excluded:
            result["excluded"] = source.excluded
        names = [*_FIGURES, "budget", "cross_check"]
        if not self.known:
            return {**result, **dict.fromkeys(names)}
        whole = self.whole(grid)
        energy_j = self.curve.energy_j
        values = (
            self.device_j,
            self.job_j,
            self.others_j,
            self.idle_j,
            self.shares.idle_w,
            self.shares.job_idle_j,
            2 * whole.u_j,
            self.device_j / duration_s if duration_s > 0 else None,
            _largest(*_power_w(grid.pick(energy_j, grid.seconds_ns), grid.seconds_ns)),
            self._trace_w(grid),
            whole._asdict(),
            None if self.check is None else self.check._asdict(),
        )
        return {**result, **dict(zip(names, values, strict=True))}

    def _trace_w(self, grid: _Grid) -> list[float | None]:
        power_w = _power_w(grid.pick(self.curve.energy_j, grid.buckets_ns), grid.buckets_ns)
        ends_ns = zip(grid.buckets_ns[:-1], grid.buckets_ns[1:], strict=True)
        return [
            watts if end_ns >= self.curve.first_ns and begin_ns <= self.curve.last_ns else None
            for watts, (begin_ns, end_ns) in zip(power_w, ends_ns, strict=True)
        ]


def _timeline(parts: Sequence[_Part], grid: _Grid, phases: Sequence[Phase]) -> Timeline:
    begin_ns = int(grid.steps_ns[0])

    def since_begin_s(t_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray((t_ns - begin_ns) * 1e-9)

    apart = max(1, (len(grid.steps_ns) - 1) // _BAND_POINTS)
    at_ns = np.append(grid.steps_ns[:-1:apart], grid.steps_ns[-1])
    counted = [part for part in parts if part.counted]
    energy_j, variance_j2 = np.zeros(len(at_ns)), np.zeros(len(at_ns))
    for part in counted:
        energy_j += grid.pick(part.counting_j, at_ns)
        whole = [part.budget(grid, at_ns[:1], at_ns[i : i + 1]).u_j for i in range(len(at_ns))]
        variance_j2 += np.square(whole)
    return Timeline(
        edges_s=since_begin_s(grid.steps_ns),
        components=tuple(_over_time(part, grid) for part in parts if part.known),
        at_s=since_begin_s(at_ns),
        energy_j=energy_j,
        u_j=2 * np.sqrt(variance_j2),
        phases=tuple(
            (phase.name, (phase.begin_ns - begin_ns) * 1e-9, (phase.end_ns - begin_ns) * 1e-9)
            for phase in phases
            if phase.end_ns is not None
        ),
    )


def _over_time(part: _Part, grid: _Grid) -> TimelineComponent:
    curve, steps_ns = part.curve, grid.steps_ns
    begin_ns, end_ns = int(steps_ns[0]), int(steps_ns[-1])
    span_s = np.maximum(np.diff(steps_ns) * 1e-9, 1e-9)
    unread = (steps_ns[1:] < curve.first_ns) | (steps_ns[:-1] > curve.last_ns)

    def mean_w(energy_j: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(unread, np.nan, np.diff(grid.pick(energy_j, steps_ns)) / span_s)

    low_w = high_w = None
    if span_s[0] >= _BANDED_S:
        seconds_ns = grid.seconds_ns
        second_w = np.diff(grid.pick(curve.energy_j, seconds_ns)) / (np.diff(seconds_ns) * 1e-9)
        first = np.searchsorted(seconds_ns[:-1], steps_ns[:-1])
        low_w = np.where(unread, np.nan, np.minimum.reduceat(second_w, first))
        high_w = np.where(unread, np.nan, np.maximum.reduceat(second_w, first))
    # What lies beyond the first and the last reading is as little known as a gap between two.
    limit_ns = gap_limit_s(curve.source.period_s) * 1e9
    ends = [(begin_ns, curve.first_ns), (curve.last_ns, end_ns)]
    gaps_ns = [*curve.gaps_ns, *(gap for gap in ends if gap[1] - gap[0] > limit_ns)]
    return TimelineComponent(
        id=curve.source.id,
        kind=curve.source.kind,
        label=curve.source.label,
        provenance=curve.source.provenance,
        in_total=curve.source.in_total,
        job_w=mean_w(part.counting_j),
        device_w=mean_w(curve.energy_j),
        low_w=low_w,
        high_w=high_w,
        gaps_s=tuple(
            ((max(one, begin_ns) - begin_ns) * 1e-9, (min(two, end_ns) - begin_ns) * 1e-9)
            for one, two in sorted(gaps_ns)
            if two > begin_ns and one < end_ns
        ),
    )


def _power_w(energy_j: NDArray[np.float64], at_ns: NDArray[np.int64]) -> list[float | None]:
    span_s = np.diff(at_ns) * 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        power_w = np.diff(energy_j) / span_s
    return [float(watts) if math.isfinite(watts) else None for watts in power_w]


def _curves(
    readers: Mapping[str, LaneReader],
    facts: Mapping[str, Any],
    at_ns: NDArray[np.int64],
    gauges: _Gauges,
) -> tuple[list[Curve], dict[str, CrossCheck], Activity | None, dict[str, float]]:
    """Measured curves of every lane, and modelled ones for the CPU and memory that have none.

    With them what the power readings of a device give whose counter is used, and the idle draw, W,
    where it is known; both by component.
    """
    cpu = modelled.CpuIdentity(**facts["cpu"])
    lanes = [reader.lane for reader in readers.values()]
    sources = find_sources(lanes, cpu_vendor=cpu.vendor or "")
    others = find_cross_sources(lanes, sources)
    checks: dict[str, CrossCheck] = {}
    curves: list[Curve] = []
    activity = None
    idle_w: dict[str, float] = {}
    for name, reader in readers.items():
        if _lists_processes(reader):
            continue
        if name == "processes":
            activity = read_activity(reader.lane, gauges.watching(reader))
            continue
        own = [source for source in sources if source.lane == name]
        aside = [source for source in others if source.lane == name]
        found = integrate(gauges.watching(reader), [*own, *aside], at_ns)
        curves += found[: len(own)]
        counters = {curve.source.id: curve for curve in found[: len(own)]}
        for power in found[len(own) :]:
            if check := cross_check(counters[power.source.id], power, at_ns):
                checks[power.source.id] = check
    if activity is not None and len(activity.t_ns) > 1:
        model = modelled.cpu_model(cpu, vcpus=activity.cpus, override=facts["options"]["cpu_power"])
        idle_w["cpu:modelled"] = model.idle_w
        measured = {c.source.kind for c in curves if c.source.in_total and c.first_ns >= 0}
        for curve in modelled_curves(activity, at_ns, cpu=model, ram=modelled.RamModel()):
            # RAPL packages without a DRAM domain: memory is then modelled beside a measured CPU.
            if curve.source.kind not in measured:
                curves.append(curve)
    return curves, checks, activity, idle_w


def _lists_processes(reader: LaneReader) -> bool:
    return reader.lane.spec.partition(":")[0] == "nvml-processes"


def _tenants(
    readers: Mapping[str, LaneReader],
    notes: Sequence[Mapping[str, Any]],
    gauges: _Gauges,
    begin_ns: int,
    end_ns: int,
) -> dict[str, Tenants]:
    """Who computed on each GPU, by UUID."""
    found: dict[str, Tenants] = {}
    for reader in filter(_lists_processes, readers.values()):
        batches = gauges.watching(reader)
        found |= read_tenants(reader.lane, batches, notes, begin_ns=begin_ns, end_ns=end_ns)
    return found


def _sum(values: Iterable[float]) -> float | None:
    """The sum; None of nothing."""
    listed = list(values)
    return math.fsum(listed) if listed else None


class _Gauges:
    """Rows, unknowns and peaks of gauges, noticed while batches pass by on their way elsewhere."""

    def __init__(self) -> None:
        self.rows = 0
        self.rows_by_lane: dict[str, int] = {}
        self.unknown = 0
        self.busy: set[str] = set()
        self.peaks: dict[str, dict[int, float]] = {}

    def watching(self, reader: LaneReader) -> Iterator[Batch]:
        watched = [
            (index, channel)
            for index, channel in enumerate(reader.lane.channels)
            if channel.source == "nvml-memory"
        ]
        utilised = [
            (index, channel)
            for index, channel in enumerate(reader.lane.channels)
            if channel.source == "nvml-utilisation"
        ]
        for batch in joined(reader):
            rows = batch.reads
            self.rows += rows
            self.rows_by_lane[reader.lane.name] = self.rows_by_lane.get(reader.lane.name, 0) + rows
            unknown = np.count_nonzero(np.isnan(batch.values), axis=0)
            self.unknown += int(unknown.sum() if batch.skipped is None
                                else unknown @ (batch.skipped + 1))  # fmt: skip
            for index, channel in utilised:
                if np.nanmax(batch.values[index], initial=0.0) * channel.scale > _BUSY:
                    self.busy.add(channel.labels["uuid"])
            for index, channel in watched:
                values = batch.values[index][np.isfinite(batch.values[index])] * channel.scale
                if len(values):
                    peaks = self.peaks.setdefault(channel.source, {})
                    peaks[index] = max(peaks.get(index, 0.0), float(values.max()))
            yield batch

    def peak_sum(self, source: str) -> int | None:
        peaks = self.peaks.get(source)
        return int(sum(peaks.values())) if peaks else None


_BUSY = 0.05
"""GPU utilisation from which on somebody computes."""


def _provenance(counted: Sequence[_Part]) -> str | None:
    kinds = {part.curve.source.provenance for part in counted}
    return next(iter(kinds)) if len(kinds) == 1 else ("mixed" if kinds else None)


def _phases(phases: Sequence[Phase], counted: Sequence[_Part], grid: _Grid) -> list[dict[str, Any]]:
    """Phases by name, in order of first appearance: energy between their edges, summed."""
    by_name: dict[str, list[Phase]] = {}
    for phase in phases:
        by_name.setdefault(phase.name, []).append(phase)
    result = []
    for name, same in by_name.items():
        begins = np.array([phase.begin_ns for phase in same], dtype=np.int64)
        ends = np.array([phase.end_ns for phase in same], dtype=np.int64)
        duration_s = float(np.sum(ends - begins)) * 1e-9
        energies_j, budgets = [], []
        for part in counted:
            so_far_j = part.counting_j
            energy_j = float(np.sum(grid.pick(so_far_j, ends) - grid.pick(so_far_j, begins)))
            energies_j.append(energy_j)
            budgets.append(part.budget(grid, begins, ends).u_j)
        result.append(
            {
                "name": name,
                "count": len(same),
                "duration_s": duration_s,
                "energy_j": math.fsum(energies_j) if counted else None,
                "u_j": 2 * math.hypot(*budgets) if counted else None,
            }
        )
    return result


def _progress(logged: Logged, counted: Sequence[_Part], grid: _Grid) -> dict[str, Any] | None:
    """What is counted from the beginning to the instants that were logged at; None: to none."""
    if not logged.rows:
        return None
    at_ns, begin_ns = logged.at_ns, grid.at_ns[:1]
    energies_j = [grid.pick(part.counting_j, at_ns) for part in counted]
    us_j = [
        2 * math.hypot(*(part.budget(grid, begin_ns, at_ns[i : i + 1]).u_j for part in counted))
        for i in range(len(at_ns))
    ]
    return {
        "t_s": [float(t) for t in (at_ns - begin_ns) * 1e-9],
        "energy_j": [math.fsum(at) for at in zip(*energies_j, strict=True)] or None,
        "u_j": us_j if counted else None,
        "metrics": logged.columns(),
        "left_out": logged.left_out,
    }


def _metrics(logged: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, float | None]:
    """The last value of each metric; None for one that is no finite number."""
    last: dict[str, Any] = {}
    for _, values in logged:
        last.update(values)
    return {name: finite(value) for name, value in last.items()}


def _performance(metrics: Mapping[str, float | None], wanted: str | None) -> dict[str, Any] | None:
    """The metric that the score is about: the one asked for, or the only one there is."""
    names = [wanted] if wanted else [n for n in metrics if n not in COUNTERS]
    if len(names) != 1 or metrics.get(names[0]) is None:
        return None
    return {"metric": names[0], "value": metrics[names[0]]}


def _carbon(total_j: float | None, options: Mapping[str, Any]) -> dict[str, Any] | None:
    stated = options.get("intensity")
    if stated is None or total_j is None:
        return None
    intensity = carbon_model.GridIntensity(**stated)
    return dict(carbon_model.estimate(total_j, intensity=intensity, pue=options["pue"]))


def _sampler(
    facts: Mapping[str, Any], readers: Mapping[str, LaneReader], gauges: _Gauges, duration_s: float
) -> dict[str, Any]:
    """The profiler's own cost and quality; what only it knew while alive is None after a crash."""
    stats = facts.get("sampler") or {}
    cpu_s = stats.get("cpu_s")
    return {
        "cpu_s": cpu_s,
        "cpu_fraction": cpu_s / duration_s if cpu_s is not None and duration_s > 0 else None,
        "samples": gauges.rows,
        "dropped": stats.get("dropped"),
        "late": stats.get("late"),
        "timed": stats.get("timed"),
        "failed_reads": gauges.unknown,
        "rate_hz": {
            name: gauges.rows_by_lane.get(name, 0) / duration_s if duration_s > 0 else None
            for name in readers
        },
        "refresh_s": stats.get("refresh_s"),
        "wasted": stats.get("wasted"),
        "overhead": stats.get("overhead"),
    }


def _unwritten(
    facts: Mapping[str, Any], names: Iterable[str], readers: Mapping[str, LaneReader]
) -> Iterator[dict[str, str]]:
    if _is_rows_lost(facts):
        fix = "free space for the store"
    elif facts.get("sampler") is None:
        fix = "nothing: the recording ended before its first flush"
    else:
        fix = "run for longer than it takes to give one, or see: pepr-profile sensors"
    for name in names:
        if name not in readers:
            text = f"no reading of {name} is on disk; the summary is without it"
            yield warning("unwritten", text, fix)


def _is_rows_lost(facts: Mapping[str, Any]) -> bool:
    return any(told.get("code") == "rows-lost" for told in facts.get("warnings", []))


def _warnings(
    parts: Iterable[_Part], torn_lines: int, begin_ns: int, end_ns: int, *, full: bool
) -> Iterator[dict[str, str]]:
    for part in parts:
        curve, name = part.curve, part.curve.source.id
        source = curve.source
        if source.excluded.startswith("mirrors"):
            yield warning(
                "mirrored",
                f"{name} is not in the total: it {source.excluded}",
                "nothing; some AMD processors show one socket's counter on each die",
            )
        if not source.in_total or source.provenance == "modelled":
            continue
        gap_s = gap_limit_s(source.period_s)
        if not part.known:
            yield warning(
                "unknown",
                f"{name} gave no usable reading; its energy is not in the total",
                "run longer than a few refreshes of the sensor, or see: pepr-profile sensors",
            )
            continue
        yield from _doubts(part, end_ns - begin_ns)
        if curve.resets:
            yield warning(
                "reset",
                f"{name} was reset {curve.resets}x; what it had counted since the last reading "
                "is lost",
                "nothing; the driver or the machine reset it",
            )
        if source.modulus:
            energy_j = float(curve.energy_j[-1] - curve.energy_j[0])
            mean_w = energy_j * 1e9 / max(end_ns - begin_ns, 1)
            half_range_s = source.modulus * source.scale / 2 / max(mean_w, 1e-9)
            if curve.longest_gap_s > half_range_s:
                yield warning(
                    "ambiguous-wrap",
                    f"{name} was not read for {curve.longest_gap_s:.1f} s, time enough to wrap "
                    "unseen; its energy may be a multiple of its range too low",
                    "keep the profiler from being stopped, or sample more often (--period)",
                )
        if curve.longest_stall_s > max(_STALL_S, 50 * curve.refresh_s) and source.counter:
            yield warning(
                "stalled",
                f"{name} stood still for {curve.longest_stall_s:.1f} s while it was read",
                "check the driver; its energy is a lower bound",
            )
        late_s = (curve.first_ns - begin_ns) * 1e-9
        early_s = (end_ns - curve.last_ns) * 1e-9
        if late_s > gap_s:
            yield warning(
                "late-start",
                f"{name} gave its first reading {late_s:.1f} s after the start; "
                "its energy before is not in the total",
                "NVIDIA: enable persistence mode (sudo nvidia-smi -pm 1)",
            )
        if early_s > gap_s:
            yield warning(
                "ended-early",
                f"{name} gave no reading in the last {early_s:.1f} s; its energy since is not in "
                "the total",
                f"{'free space for the store, or ' if full else ''}see dmesg for its driver",
            )
        elif curve.longest_gap_s > gap_s:
            kept = "the counter kept its energy" if source.counter else "its power is interpolated"
            yield warning(
                "gap",
                f"{name} has a gap of {curve.longest_gap_s:.1f} s: {kept}",
                "check the load of the machine and the driver",
            )
    if torn_lines:
        yield warning(
            "torn-events",
            f"{torn_lines} line(s) of the events files could not be read and were left out",
            "a program was killed while it wrote, or the file was edited",
        )


def _cpu_neighbours(
    counted: Iterable[_Part],
    notes: Iterable[Mapping[str, Any]],
    activity: Activity | None,
    window_ns: tuple[int, int],
) -> list[dict[str, str]]:
    cpus = [part for part in counted if part.curve.source.kind == "cpu"]
    device_j = math.fsum(part.device_j for part in cpus)
    if activity is None or device_j <= 0:
        return []
    part = math.fsum(part.others_j for part in cpus) / device_j
    return cpu_neighbours(notes, activity, part, window_ns)


def _doubts(part: _Part, duration_ns: int) -> Iterator[dict[str, str]]:
    """What the readings themselves give reason to doubt."""
    curve, check, name = part.curve, part.check, part.curve.source.id
    if curve.aliased:
        yield warning(
            "aliasing",
            f"the load of {name} repeats nearly in step with its sensor's refreshes "
            f"({curve.refresh_s * 1e3:.0f} ms), which may see only a part of it",
            "vary the length of a step, or compare with another meter; u is widened to 40 %",
        )
    elif curve.source.source in _PART_TIME and duration_ns >= _CHECKED_NS and _steady(curve):
        yield warning(
            "part-time",
            f"{name} has power readings only, which may see no more than a quarter of the time: "
            "a load exactly in step with them would look as steady as these; u does not cover it",
            "nothing if the load is steady; else vary the length of a step, or compare with "
            "another meter",
        )
    # Shorter windows are mostly edges (docs/measurement, B).
    if check and abs(check.difference_j) > check.u_j and duration_ns >= _CHECKED_NS:
        yield warning(
            "disagreement",
            f"{name}: its power readings ({check.source}) give {check.energy_j:.0f} J, "
            f"{check.difference_j:+.0f} J from its counter; {check.u_j:.0f} J would be usual",
            "compare with an external meter; the counter's energy is in the total",
        )


def _steady(curve: Curve) -> bool:
    """Whether readings hardly change: what the sensor does not see then adds no uncertainty."""
    energy_j = float(curve.energy_j[-1] - curve.energy_j[0])
    if curve.duty_j2 is None or not energy_j > 0:
        return False
    duty_j2 = float(curve.duty_j2[-1] - curve.duty_j2[0])
    return math.sqrt(max(0.0, duty_j2)) < _STEADY * energy_j


def _largest(*values: float | None) -> Any:
    known = [value for value in values if value is not None]
    return max(known) if known else None
