"""From a run directory to its summary: puts together what the other modules work out.

Everything is computed from what is on disk, so that `report` on an old recording gives what `run`
printed, or better once the methods are.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pepr_profiler.energy import carbon
from pepr_profiler.energy.blocks import BlockPart
from pepr_profiler.energy.gpus import Gpus, board_of
from pepr_profiler.energy.sharing import highest_power_w, share
from pepr_profiler.errors import TraceError
from pepr_profiler.record import Floats, Ints, Record
from pepr_profiler.summary import doubts
from pepr_profiler.summary.component import ComponentResult, Counted, Grid
from pepr_profiler.summary.lanes import Readings, read_all
from pepr_profiler.summary.logged import (
    MetricLog,
    last_values,
    of_lowest_rank,
    performance_of,
    progress_of,
)
from pepr_profiler.summary.timeline import Timeline, timeline_of
from pepr_profiler.trace.events import Events, PhaseSpan, read_events, read_process_notes
from pepr_profiler.trace.files import file_errors
from pepr_profiler.trace.lane import LaneReader, lane_names, read_lanes
from pepr_profiler.trace.run_json import read_run, recorder_lives
from pepr_profiler.trace.shape import MALFORMED
from pepr_profiler.units import format_quantity

_LONGEST_NS = 1000 * 86_400_000_000_000
"""A longer recording is a damaged time."""
_ROWS_WAIT_NS = 2_000_000_000
"""A row waits for less before it is written, however busy the machine is."""


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
    require_whole(directory, run)
    with _damage_reported(directory):
        return _examine(directory, since_ns, until_ns, marks, run).summary


def with_timeline(directory: Path) -> tuple[dict[str, Any], Timeline]:
    """The summary of a run directory, and the run over time, from one pass over its trace."""
    require_whole(directory)
    with _damage_reported(directory):
        examined = _examine(directory)
        timeline = timeline_of(examined.components, examined.grid, examined.phases)
        return examined.summary, timeline


def with_passes(directory: Path) -> tuple[dict[str, Any], Sequence[PhaseSpan]]:
    """The summary of a run directory, and its phases one by one, for the summary of its job."""
    require_whole(directory)
    with _damage_reported(directory):
        examined = _examine(directory)
        return examined.summary, examined.phases


def require_whole(directory: Path, run: Mapping[str, Any] | None = None) -> None:
    """TraceError if a finished run lacks a file that it had at its end, or has another one.

    Without a lane, its total would be less and look complete. Runs that were recorded before their
    files were listed pass.
    """
    run = read_run(directory) if run is None else run
    listed = run.get("files")
    if listed is None or not run.get("complete"):
        return
    wrong = list(file_errors(directory, listed))
    if not wrong:
        return
    stored = format_quantity((run.get("energy") or {}).get("total_j"), "J")
    try:
        with _damage_reported(directory):
            left = _examine(directory, run=dict(run)).summary["energy"]["total_j"]
        given = f"these files give {format_quantity(left, 'J')}"
    except TraceError:
        given = "these files give no total"
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise TraceError(
        f"{directory} is not as it was recorded",
        why=f"{'; '.join(wrong[:3])}{more}; run.json says {stored}, {given}",
        fix="copy the whole directory again; what run.json says: "
        f"pepr-profile runs show {shlex.quote(str(directory))}",
    )


@contextmanager
def _damage_reported(directory: Path) -> Iterator[None]:
    """What a damaged recording raises becomes a TraceError: its values are used unchecked."""
    try:
        yield
    except MALFORMED as error:
        raise TraceError(
            f"the recording {directory} contradicts itself",
            why=f"one of its files was changed or damaged ({type(error).__name__}: {error})",
            fix="restore it; if nothing has changed it, please report this as a fault of "
            "pepr-profiler, with the directory",
        ) from error


class _Examined(Record):
    """A summary, and what it was made of."""

    summary: dict[str, Any]
    components: Sequence[ComponentResult]
    grid: Grid
    phases: Sequence[PhaseSpan]


def _examine(
    directory: Path,
    since_ns: int | None = None,
    until_ns: int | None = None,
    marks: bool = True,
    run: dict[str, Any] | None = None,
) -> _Examined:
    run = read_run(directory) if run is None else dict(run)
    run.setdefault("complete", False)  # a recording without an end does not have these yet
    run.setdefault("exit_code", None)
    facts = _facts_of(run, directory)
    options = facts["options"]

    # What is on disk.
    readers = read_lanes(directory)
    channels = [channel for reader in readers.values() for channel in reader.lane.channels]
    events = read_events(directory) if marks else Events((), (), 0)
    unread = list(events.unread)
    notes = read_process_notes(directory, unread)
    begin_ns, end_ns = _window(facts, readers, since_ns, until_ns)
    read_ns = end_ns
    if facts["window_ns"][1] is None and until_ns is None and not recorder_lives(run):
        # A mark is on disk at once, a row up to a second later: the program that was killed has
        # lived until its last mark.
        latest_ns = read_ns + _ROWS_WAIT_NS
        end_ns = max([end_ns, *(t_ns for t_ns in events.times_ns() if t_ns < latest_ns)])
    duration_s = (end_ns - begin_ns) * 1e-9
    phases = _with_first_rank(_phases_within(events.phases, begin_ns, end_ns))
    logged = of_lowest_rank(events.metrics, events.ranks)
    log = MetricLog.within(logged, begin_ns, end_ns, cut=until_ns is not None)
    grid = Grid.over(begin_ns, end_ns, phases, log.at_ns, read_ns)

    # Whose energy it was.
    readings = read_all(readers, facts, notes, grid.at_ns)
    most_w = {board_of(curve): highest_power_w(curve, grid.at_ns) for curve in readings.curves}
    gpus = Gpus.of(facts, channels, readings.gpu_users, busy=readings.busy_gpus, most_w=most_w)
    scope = options.get("scope", "job")
    part = BlockPart.of(notes, readings.activity, begin_ns, end_ns)
    by_rows = facts.get("cpu_shares") == "rows"
    components = _components(readings, gpus, grid, scope, part, by_rows=by_rows)
    together = Counted.of(components, grid)
    counted = together.components
    energy = _energy(components, together, grid, duration_s, scope)
    if lacking := _lacking(facts.get("exit") or {}):
        lacks = {"id": lacking, "missing_s": duration_s}
        energy.update(partial=[*energy["partial"], lacks], u_j=None, mean_w=None)
    metrics = last_values(logged)
    performance = performance_of(metrics, options.get("performance"))

    if run.get("rank") is None and events.rank_facts:
        run["inner_ranks"] = [dict(facts) for facts in events.rank_facts]
    phases_of_run, at_once = _phases(phases, together, grid, sure=events.knows_ancestors)
    run.update(
        duration_s=duration_s,
        time_s=duration_s,
        energy=energy,
        phases=phases_of_run,
        memory=_memory(facts, readings, gpus),
        carbon=_carbon(energy["total_j"], options),
        metrics=metrics,
        progress=progress_of(log, together, grid),
        performance=performance,
        sampler=_sampler(facts, readings, duration_s),
        warnings=[
            *facts.get("warnings", []),
            *doubts.unwritten_lanes(facts, (n for n in lane_names(directory) if n not in readers)),
            *doubts.unknown_units(channels),
            *doubts.unknown_gains(channels),
            *doubts.bad_hardware_files(readings.bad_files),
            *doubts.doubtful_readings(
                components, begin_ns, end_ns, lost_rows=doubts.has_lost_rows(facts)
            ),
            *doubts.torn_events(events.torn_lines),
            *_disagreements(events, performance),
            *doubts.phases_at_once(at_once),
            *doubts.unread_files(unread),
            *doubts.shared_gpus(gpus, [c.curve for c in counted], begin_ns, end_ns),
            *doubts.served_gpus(gpus),
            *doubts.blocks_within(notes),
            *doubts.shared_process(notes, components, begin_ns, end_ns),
            *doubts.shared_cpu(
                notes, readings.activity, _others_part(counted, "cpu"), begin_ns, end_ns
            ),
        ],
    )
    return _Examined(run, components, grid, phases)


def _lacking(how_it_ended: Mapping[str, Any]) -> str:
    """Whose energy the total lacks besides that of devices; empty if nobody's."""
    if (empty := how_it_ended.get("empty_cgroup")) is not None:
        return f"cgroup {empty}"
    submitter = how_it_ended.get("submitter")
    return "" if submitter is None else f"what {submitter} started"


def _disagreements(
    events: Events, performance: Mapping[str, Any] | None
) -> Iterator[dict[str, str]]:
    """If ranks logged other values of the performance than the one that counts."""
    if performance is None:
        return
    name, by_rank = performance["metric"], {}
    for (_, values), rank in zip(events.metrics, events.ranks, strict=False):
        if rank is not None and name in values:
            by_rank[rank] = last_values([(0, values)])[name]
    yield from doubts.ranks_disagree(name, performance["value"], by_rank)


def _facts_of(run: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    facts = run.get("recording")
    if not isinstance(facts, dict) or not {"window_ns", "cpu", "options"} <= facts.keys():
        raise TraceError(
            f"{directory / 'run.json'} describes no recording",
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


def _phases_within(phases: Iterable[PhaseSpan], begin_ns: int, end_ns: int) -> list[PhaseSpan]:
    """What lies in a window of each phase; one without an end goes on to the window's."""
    within = []
    for phase in phases:
        first_ns = max(phase.begin_ns, begin_ns)
        last_ns = end_ns if phase.end_ns is None else min(phase.end_ns, end_ns)
        if first_ns <= last_ns:
            within.append(phase._replace(begin_ns=first_ns, end_ns=last_ns))
    return within


def _with_first_rank(phases: list[PhaseSpan]) -> list[PhaseSpan]:
    """Where other ranks mark blocks and rank 0 does not, a program without a rank is rank 0.

    Lightning starts the other ranks from a program that a user has started.
    """
    ranks = {phase.rank for phase in phases}
    if 0 in ranks or ranks <= {None}:
        return phases
    return [
        phase._replace(rank=0) if phase.rank is None and phase.series is None else phase
        for phase in phases
    ]


def _components(
    readings: Readings, gpus: Gpus, grid: Grid, scope: str, part: BlockPart | None, *, by_rows: bool
) -> list[ComponentResult]:
    results = []
    for curve in readings.curves:
        ident = curve.source.id
        shares = share(
            curve,
            grid.at_ns,
            readings.activity,
            gpus.users_of(curve),
            idle_w=readings.idle_w.get(ident),
            most_idle_w=gpus.most_idle_w(curve),
            part=part,
            by_rows=by_rows,
        )
        check = readings.cross_checks.get(ident)
        results.append(ComponentResult(gpus.without_unused(curve), shares, check, scope))
    return results


def _energy(
    components: Sequence[ComponentResult],
    together: Counted,
    grid: Grid,
    duration_s: float,
    scope: str,
) -> dict[str, Any]:
    counted = together.components
    whole = grid.at_ns[:1], grid.at_ns[-1:]
    partial = together.partial(grid, *whole)
    total_j = _sum(component.counted_j for component in counted)
    provenances = {component.curve.source.provenance for component in counted}
    mixed = "mixed" if provenances else None
    return {
        "total_j": total_j,
        "u_j": together.u_j(grid, *whole),
        "partial": partial,
        "mean_w": None if partial or total_j is None or duration_s <= 0 else total_j / duration_s,
        "provenance": provenances.pop() if len(provenances) == 1 else mixed,
        "scope": scope,
        "others_j": _sum(component.others_j for component in counted),
        "idle_j": _sum(component.idle_j for component in counted),
        "components": [component.summary(grid, duration_s) for component in components],
    }


def _sum(values: Iterable[float]) -> float | None:
    """The sum; None of nothing."""
    listed = list(values)
    return math.fsum(listed) if listed else None


def _others_part(counted: Iterable[ComponentResult], kind: str) -> float:
    """Which part of the energy of the counted components of a kind was others'."""
    of_kind = [component for component in counted if component.curve.source.kind == kind]
    device_j = math.fsum(component.device_j for component in of_kind)
    others_j = math.fsum(component.others_j for component in of_kind)
    return others_j / device_j if device_j > 0 else 0.0


def _phases(
    phases: Sequence[PhaseSpan], together: Counted, grid: Grid, *, sure: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Phases by name, in order of first appearance: energy between their edges, summed.

    Where phases of one name overlap (nested, or in threads), that time counts once. Where several
    ranks mark theirs in one run, a rank's phase has that rank's part of the energy. Where phases of
    several threads, tasks or processes are open side by side, each has an equal part; where it is
    not `sure` which of them started which, or they are of one of several ranks, their energies are
    as they are alone, and u is None. Second come the phases that ran side by side.
    """
    by_name: dict[str, list[PhaseSpan]] = {}
    for phase in phases:
        by_name.setdefault(phase.name, []).append(phase)
    ranks = _Ranks.of(phases)
    strands = _Strands.of(phases if sure or ranks is None else (), by_rank=ranks is not None)
    result: list[dict[str, Any]] = []
    at_once: list[dict[str, Any]] = []
    is_whole = ranks is not None or not sure
    for name, same in by_name.items():
        begins_ns, ends_ns = _union(same)
        energies_j = [c.counted_within_j(grid, begins_ns, ends_ns) for c in together.components]
        energy_j, u_j = _sum(energies_j), together.u_j(grid, begins_ns, ends_ns)
        if ranks is not None and energy_j:
            part, u_part = ranks.part_of(same, together, grid)
            u_j = None if u_j is None else math.hypot(u_j * part, energy_j * u_part)
            energy_j *= part
        found = strands.part_of(same, together, grid) if energy_j and strands.by_rank else None
        if energy_j and found is not None:
            part, u_part = found
            if is_whole:
                u_j = None
            else:
                u_j = None if u_j is None else math.hypot(u_j * part, energy_j * u_part)
                energy_j *= part
        result.append(
            {
                "name": name,
                "count": len(same),
                "duration_s": float(np.sum(ends_ns - begins_ns)) * 1e-9,
                "energy_j": energy_j,
                "u_j": u_j,
                "partial": together.partial(grid, begins_ns, ends_ns),
            }
        )
        if found is not None:
            at_once.append(result[-1])
    return result, at_once


_DIVISION_U = 0.5
"""How sure an equal part of a run's power is to be that of one rank (k = 1), of what the others
have (judgement: a rank that waits may draw next to nothing, or as much as one that works)."""


class _Ranks(Record):
    """The ranks that mark phases in one run: when each was there, from its first mark to its last.

    Their processes are all of one job, whose energy is not divided by process. At each instant the
    ranks that are there have equal parts of it.
    """

    begins_ns: Ints
    ends_ns: Ints

    @classmethod
    def of(cls, phases: Iterable[PhaseSpan]) -> _Ranks | None:
        """None if there are not several."""
        there: dict[int, tuple[int, int]] = {}
        for phase in phases:
            if phase.rank is not None:
                end_ns = phase.end_ns or phase.begin_ns
                first_ns, last_ns = there.get(phase.rank, (phase.begin_ns, end_ns))
                there[phase.rank] = min(first_ns, phase.begin_ns), max(last_ns, end_ns)
        if len(there) < 2:
            return None
        begins_ns, ends_ns = np.array(list(there.values()), dtype=np.int64).T
        return cls(np.sort(begins_ns), np.sort(ends_ns))

    def part_of(
        self, same: Sequence[PhaseSpan], together: Counted, grid: Grid
    ) -> tuple[float, float]:
        """Which part of the energy in a phase's time is that of its ranks, and u of it (k = 2).

        A process without a rank speaks for the whole run.
        """
        by_rank: dict[int | None, list[PhaseSpan]] = {}
        for phase in same:
            by_rank.setdefault(phase.rank, []).append(phase)
        whole = by_rank.pop(None, None)
        unions = [_union(own) for own in by_rank.values()]
        if not unions:
            return 1.0, 0.0
        begins_ns = np.sort(np.concatenate([begins for begins, _ in unions]))
        ends_ns = np.sort(np.concatenate([ends for _, ends in unions]))
        edges = [self.begins_ns, self.ends_ns, begins_ns, ends_ns]
        of_whole = None if whole is None else _union(whole)
        at_ns = np.sort(np.concatenate(edges if of_whole is None else [*edges, *of_whole]))
        at_ns = at_ns[np.diff(at_ns, prepend=at_ns[0] - 1) > 0]
        inside = _open_at(at_ns[:-1], begins_ns, ends_ns)
        there = np.maximum(_open_at(at_ns[:-1], self.begins_ns, self.ends_ns), inside)
        part = inside / np.maximum(there, 1)
        used = inside > 0
        if of_whole is not None:
            all_of_it = _open_at(at_ns[:-1], *of_whole) > 0
            part, used = np.where(all_of_it, 1.0, part), used | all_of_it
        steps_j = np.where(used, _steps_j(together, grid, at_ns), 0.0)
        energy_j = float(steps_j.sum())
        if energy_j <= 0:
            return 1.0, 0.0
        u_j = 2 * _DIVISION_U * float(np.abs(steps_j) @ (part * (1 - part)))
        return float(steps_j @ part) / energy_j, u_j / energy_j


class _Strands(Record):
    """When phases of each strand of a run are open (PhaseSpan): of several, each has an equal part.

    A phase has the parts of its own strand and of those that were started in it. Strands of another
    rank are not looked at, because `_Ranks` divides between ranks.
    """

    by_rank: Mapping[int | None, tuple[Ints, Ints]]
    within: Mapping[tuple[int | None, str], Sequence[PhaseSpan]]
    apart: bool

    @classmethod
    def of(cls, phases: Iterable[PhaseSpan], *, by_rank: bool) -> _Strands:
        """Those of all phases, of each rank apart if `by_rank`; empty if never two are open."""
        of_rank: dict[int | None, list[PhaseSpan]] = {}
        for phase in phases:
            if phase.strand >= 0:
                of_rank.setdefault(phase.rank if by_rank else None, []).append(phase)
        open_ns = {rank: _open_spans(own) for rank, own in of_rank.items()}
        several = {
            rank: spans for rank, spans in open_ns.items() if (spans[0][1:] < spans[1][:-1]).any()
        }
        within: dict[tuple[int | None, str], list[PhaseSpan]] = {}
        for rank in several:
            for phase in of_rank[rank]:
                for name in phase.above | {phase.name}:
                    within.setdefault((rank, name), []).append(phase)
        return cls(several, within, by_rank)

    def part_of(
        self, same: Sequence[PhaseSpan], together: Counted, grid: Grid
    ) -> tuple[float, float] | None:
        """Which part of the energy in a phase's time is its own, and u of it (k = 2).

        None if all of it, for sure.
        """
        if any(phase.strand < 0 for phase in same):
            return None  # a mark is of the whole run
        for rank in self.by_rank:
            own = [phase for phase in same if not self.apart or phase.rank == rank]
            if own and (found := self._part_of(own, rank, together, grid)) is not None:
                return found
        return None

    def _part_of(
        self,
        same: Sequence[PhaseSpan],
        rank: int | None,
        together: Counted,
        grid: Grid,
    ) -> tuple[float, float] | None:
        begun_ns, ended_ns = self.by_rank[rank]
        of_name = _union(same)
        own = _open_spans(self.within[rank, same[0].name])
        first_ns, last_ns = of_name[0][0], of_name[1][-1]
        near = [  # a run may have a hundred thousand phases, each with a name of its own
            edges[np.searchsorted(edges, first_ns) : np.searchsorted(edges, last_ns, "right")]
            for edges in (begun_ns, ended_ns, *own, *of_name)
        ]
        at_ns = np.sort(np.concatenate(near))
        at_ns = at_ns[np.diff(at_ns, prepend=at_ns[0] - 1) > 0]
        used = _open_at(at_ns[:-1], *of_name) > 0
        there = np.maximum(_open_at(at_ns[:-1], begun_ns, ended_ns), 1)
        part = _open_at(at_ns[:-1], *own) / there
        if bool((part[used] >= 1).all()):
            return None
        steps_j = np.where(used, _steps_j(together, grid, at_ns), 0.0)
        energy_j = float(steps_j.sum())
        if energy_j <= 0:
            return None
        # Of n parts of which nothing is known but that they add up to 1, all are as likely.
        u_part = 2 * np.sqrt(np.maximum(part * (1 - part), 0.0) / (there + 1))
        return float(steps_j @ part) / energy_j, float(np.abs(steps_j) @ u_part) / energy_j


def _steps_j(together: Counted, grid: Grid, at_ns: Ints) -> Floats:
    """The counted energy from each instant to the next, J."""
    steps_j = np.zeros(len(at_ns) - 1)
    for component in together.components:
        steps_j += np.diff(grid.pick(component.counted_so_far_j, at_ns))
    return steps_j


def _open_spans(phases: Iterable[PhaseSpan]) -> tuple[Ints, Ints]:
    """The begins of the times in which a strand is open, of all strands in order, and the ends."""
    by_strand: dict[int, list[PhaseSpan]] = {}
    for phase in phases:
        by_strand.setdefault(phase.strand, []).append(phase)
    unions = [_union(own) for own in by_strand.values()]
    begins_ns = np.sort(np.concatenate([begins for begins, _ in unions]))
    return begins_ns, np.sort(np.concatenate([ends for _, ends in unions]))


def _open_at(at_ns: Ints, begins_ns: Ints, ends_ns: Ints) -> Ints:
    """How many spans, whose begins and ends are in order, hold each instant."""
    begun = np.searchsorted(begins_ns, at_ns, side="right")
    return np.asarray(begun - np.searchsorted(ends_ns, at_ns, side="right"))


def _union(phases: Iterable[PhaseSpan]) -> tuple[Ints, Ints]:
    """The begins and ends of the time that some phases take together, in order."""
    spans: list[list[int]] = []
    for phase in sorted(phases, key=lambda phase: phase.begin_ns):
        if spans and phase.begin_ns < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], phase.end_ns or phase.begin_ns)
        else:
            spans.append([phase.begin_ns, phase.end_ns or phase.begin_ns])
    begins_ns, ends_ns = np.array(spans, dtype=np.int64).T
    return begins_ns, ends_ns


def _memory(facts: Mapping[str, Any], readings: Readings, gpus: Gpus) -> dict[str, Any]:
    # The kernel's own peak of the child is exact, but of one process only.
    activity = readings.activity
    sampled = activity.peak_rss_bytes if activity else None
    peaks = (sampled, (facts.get("exit") or {}).get("max_rss_bytes"))
    return {
        "peak_rss_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "gpu_peak_bytes": gpus.peak_bytes(readings.gpu_peak_bytes),
        **_of_cgroup(activity.charged if activity else None),
    }


def _of_cgroup(charged: tuple[int, str] | None) -> dict[str, Any]:
    """What the kernel charged to a cgroup that was followed, if one was."""
    if charged is None:
        return {}
    return dict(zip(("cgroup_peak_bytes", "cgroup_peak_source"), charged, strict=True))


def _carbon(total_j: float | None, options: Mapping[str, Any]) -> dict[str, Any] | None:
    stated = options.get("intensity")
    if stated is None or total_j is None:
        return None
    intensity = carbon.GridIntensity(**stated)
    return dict(carbon.estimate(total_j, intensity=intensity, pue=options["pue"]))


def _sampler(facts: Mapping[str, Any], readings: Readings, duration_s: float) -> dict[str, Any]:
    """The profiler's own cost and quality; what only it knew while alive is None after a crash."""
    stats = facts.get("sampler") or {}
    cpu_s = stats.get("cpu_s")
    return {
        "cpu_s": cpu_s,
        "cpu_fraction": cpu_s / duration_s if cpu_s is not None and duration_s > 0 else None,
        "samples": sum(readings.rows.values()),
        "dropped": stats.get("dropped"),
        "late": stats.get("late"),
        "timed": stats.get("timed"),
        "failed_reads": readings.failed_reads,
        "rate_hz": {
            name: rows / duration_s if duration_s > 0 else None
            for name, rows in readings.rows.items()
        },
        "refresh_s": stats.get("refresh_s"),
        "wasted": stats.get("wasted"),
        "overhead": stats.get("overhead"),
    }
