"""From a run directory to its summary: the one place where a run's numbers are put together.

Everything is computed from what is on disk, so that `report` on an old recording gives what `run`
printed, or better once the methods are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pepr_profiler.energy import carbon as carbon_model
from pepr_profiler.energy.gpus import Gpus
from pepr_profiler.energy.sharing import share
from pepr_profiler.errors import TraceError
from pepr_profiler.summary.component import ComponentResult, _Grid, _largest
from pepr_profiler.summary.doubts import (
    _is_rows_lost,
    _other_cpu_users,
    _unknown_units,
    _unwritten,
    _warnings,
)
from pepr_profiler.summary.lanes import _curves, _Gauges, _tenants
from pepr_profiler.summary.logged import Logged, _metrics, _performance, _progress
from pepr_profiler.summary.timeline import Timeline, _timeline
from pepr_profiler.trace.events import Events, Phase, read_events, read_process_notes
from pepr_profiler.trace.lane import LaneReader, lane_names, read_lanes
from pepr_profiler.trace.run_json import read_run
from pepr_profiler.trace.shape import MALFORMED

_LONGEST_NS = 1000 * 86_400_000_000_000
"""A longer recording is a damaged time."""


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
) -> tuple[dict[str, Any], list[ComponentResult], _Grid, list[Phase]]:
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
    notes = read_process_notes(directory)
    tenants = _tenants(readers, notes, gauges, begin_ns, end_ns)
    curves, checks, activity, idle_w = _curves(readers, facts, grid.at_ns, gauges)
    options = facts["options"]
    scope = options.get("scope", "job")
    channels = [channel for reader in readers.values() for channel in reader.lane.channels]
    labels = [channel.labels for channel in channels if channel.source.startswith("nvml")]
    gpus = Gpus.of(facts, labels, tenants, busy=gauges.busy)
    parts = [
        ComponentResult(
            gpus.judged(curve),
            share(
                curve,
                grid.at_ns,
                activity,
                gpus.users_of(curve),
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
            *_unknown_units(channels),
            *_warnings(parts, events.torn_lines, begin_ns, end_ns, full=_is_rows_lost(facts)),
            *gpus.warnings([part.curve for part in counted], begin_ns, end_ns),
            *_other_cpu_users(counted, notes, activity, (begin_ns, end_ns)),
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


def _sum(values: Iterable[float]) -> float | None:
    """The sum; None of nothing."""
    listed = list(values)
    return math.fsum(listed) if listed else None


def _provenance(counted: Sequence[ComponentResult]) -> str | None:
    kinds = {part.curve.source.provenance for part in counted}
    return next(iter(kinds)) if len(kinds) == 1 else ("mixed" if kinds else None)


def _phases(
    phases: Sequence[Phase], counted: Sequence[ComponentResult], grid: _Grid
) -> list[dict[str, Any]]:
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
