"""One job from its recordings: each device counts once, and each rank for its share.

A job has several recordings if each of its ranks is wrapped or has a `profile()` block, if it runs
on several nodes, or if a wrapped script runs in a wrapped launcher. Each recording has the whole
energy of the devices that it saw, and the share of its own processes. Two recordings saw the same
device if boot and component id are the same, or the UUID of a GPU, which is unique in the world.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pepr_profiler.energy.uncertainty import summed_u_j
from pepr_profiler.record import Floats
from pepr_profiler.study import ranks as of_ranks
from pepr_profiler.study.job_devices import (
    BUCKETS,
    JobDevices,
    Recording,
    RunKey,
    Span,
    Summary,
    chain_of,
    device_of,
    length_s,
    spans_of,
    uncovered,
    union_of,
    windows_ns,
)
from pepr_profiler.study.ranks import MachineRest, Pass, RankShare
from pepr_profiler.summary.doubts import SHARED_DEVICE, SHARED_PROCESS, shared_job
from pepr_profiler.summary.timeline import Timeline, TimelineComponent
from pepr_profiler.trace.events import PhaseSpan
from pepr_profiler.trace.run_json import PERHAPS_SERVED, UNUSED
from pepr_profiler.trace.shape import MALFORMED

_SUMS = ("cpu_s", "samples", "dropped", "late", "timed", "failed_reads")


def merge_jobs(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One summary per job (docs/design.md, Contract), in the order of their first recordings.

    Recordings are of one job if they have the same `job` and overlap in time, as ranks do and the
    steps of a sweep do not, or if one was made inside another (`recording.outer`). Two of the same
    rank, neither inside the other, are two programs, and so are those side by side in a recording
    around several jobs, the script of a sweep. So are two on one machine of which only Slurm or
    Kubernetes tells the job, and no rank. A recording that is alone, and has no rank missing, is
    returned as it is; one that is given twice counts once. One that does not say when it was is of
    no job, and comes last.

    `JobRecordings.summary` says what a merged summary has.
    """
    recordings: dict[RunKey, Recording] = {}
    given: dict[RunKey, Summary] = {}
    of_none: list[dict[str, Any]] = []
    for summary in summaries:
        try:
            one = Recording.of(summary)
        except MALFORMED:
            of_none.append(dict(summary))
            continue
        recordings.setdefault(one.key, one)
        given.setdefault(one.key, summary)
    merged = []
    for group in _groups(list(recordings.values())):
        job = JobRecordings(group)
        alone = len(group) == 1 and not job.missing_ranks
        merged.append(dict(given[group[0].key]) if alone else job.summary())
    return [*merged, *of_none]


def jobs_of(recordings: Iterable[JobRecordings]) -> list[JobRecordings]:
    """The same recordings, put together by the job that they are of; see `merge_jobs`."""
    unique = {one.key: one for some in recordings for one in some._recordings}
    return [JobRecordings(group) for group in _groups(list(unique.values()))]


# --- which recordings are of one job ------------------------------------------------------------


def _groups(recordings: Sequence[Recording]) -> list[list[Recording]]:
    """The recordings of each job, jobs in the order in which their first ones were given."""
    sets = _DisjointSets(len(recordings))
    spans = spans_of(recordings)
    place = {one.key: i for i, one in enumerate(recordings)}
    outer = [place.get(one.outer_key) if one.outer_key else None for one in recordings]
    by_job: dict[str, list[int]] = {}
    for i, one in enumerate(recordings):
        # Of what was started inside another recording, an allocation's id says nothing.
        if one.run.get("job") is not None and not (one.knows_allocation and outer[i] is not None):
            by_job.setdefault(str(one.run["job"]), []).append(i)
    for members in by_job.values():
        for together in _overlapping(members, spans):
            for program in _programs(together, recordings, outer):
                sets.join(program)
    # The recording around those of one job is of that job; around several it is a sweep's script.
    inside: dict[int, list[int]] = {}
    for i, around in enumerate(outer):
        if around is not None:
            inside.setdefault(around, []).append(i)
    for around in sorted(inside, key=lambda i: (-len(chain_of(i, outer)), i)):
        others = {sets.find(i) for i in inside[around]} - {sets.find(around)}
        if len(others) == 1:
            sets.join([around, *others])
    groups: dict[int, list[Recording]] = {}
    for i, one in enumerate(recordings):
        groups.setdefault(sets.find(i), []).append(one)
    return list(groups.values())


class _DisjointSets:
    """Numbers that are joined into sets (union-find with path halving)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, i: int) -> int:
        """The number that stands for the set of `i`."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(self, members: Sequence[int]) -> None:
        """Makes one set of theirs."""
        for i in members[1:]:
            first, other = sorted((self.find(members[0]), self.find(i)))
            self._parent[other] = first


def _overlapping(members: Iterable[int], spans: Sequence[Span]) -> Iterator[list[int]]:
    """Those that overlap in time, be it through others."""
    together: list[int] = []
    end_s = -math.inf
    for i in sorted(members, key=lambda i: spans[i]):
        if together and spans[i][0] >= end_s:
            yield together
            together = []
            end_s = -math.inf
        together.append(i)
        end_s = max(end_s, spans[i][1])
    if together:
        yield together


def _programs(
    together: Sequence[int], recordings: Sequence[Recording], outer: Sequence[int | None]
) -> list[list[int]]:
    """Recordings of one job id, by program; they are in order of their begin.

    A program has each rank once, and one recording of all on a machine. Several in one allocation,
    side by side or as blocks one after the other, are told apart by their names, else by the order
    in which a rank began them.
    """
    inside = {i: set(chain_of(i, outer)) for i in together if outer[i] is not None}
    by_rank: dict[tuple[str, int | None], list[int]] = {}
    for i in together:
        rank = recordings[i].rank_on_node
        if rank is not None:
            same = by_rank.setdefault(rank, [])
            if not inside.get(i, set()).intersection(same):
                same.append(i)
    if all(len(same) == 1 for same in by_rank.values()):
        return [list(together)]
    names: dict[str, dict[tuple[str, int | None], list[int]]] = {}
    for rank, same in by_rank.items():
        for i in same:
            name = str(recordings[i].run.get("name"))
            names.setdefault(name, {}).setdefault(rank, []).append(i)
    if any(of_name.keys() != by_rank.keys() for of_name in names.values()):
        names = {"": by_rank}  # ranks have names of their own
    programs: list[list[int]] = []
    for of_name in names.values():
        most = max(len(same) for same in of_name.values())
        programs += [[same[k] for same in of_name.values() if k < len(same)] for k in range(most)]
    where = {i: program for program in programs for i in program}
    for i in together:  # what is inside one of them, or has no rank
        if i not in where:
            near = next((where[j] for j in chain_of(i, outer) if j in where), None)
            if near is None:
                programs.append([i])
            else:
                near.append(i)
    return programs


# --- one job ------------------------------------------------------------------------------------


class JobRecordings:
    """The recordings of one job, as a set: merges in any order and nesting give the same, bit for
    bit.

    What is put together is the recordings, not their sums. `summary` computes from all of them, in
    an order of their own.
    """

    def __init__(self, recordings: Iterable[Recording] = ()) -> None:
        unique: dict[RunKey, Recording] = {}
        for one in recordings:
            before = unique.setdefault(one.key, one)
            if _progress_of(one) > _progress_of(before):  # read again, later
                unique[one.key] = one
        self._recordings = sorted(unique.values(), key=lambda one: (one.begin_ns, one.key))
        self._spans = spans_of(self._recordings)

    @classmethod
    def of(cls, summary: Summary, passes: Sequence[PhaseSpan] = ()) -> JobRecordings:
        """One recording. Its `passes` (summarise.with_passes) are for the time of phases."""
        return cls([Recording.of(summary, passes)])

    def merged_with(self, *others: JobRecordings) -> JobRecordings:
        """The recordings of all of these, each once."""
        return JobRecordings(one for some in (self, *others) for one in some._recordings)

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def run_ids(self) -> list[str]:
        return [one.key[1] for one in self._recordings]

    @property
    def job(self) -> str | None:
        """The job's id; None if no recording has one."""
        return next(iter(_known(one.run.get("job") for one in self._recordings)), None)

    @cached_property
    def _outer(self) -> list[int | None]:
        place = {one.key: i for i, one in enumerate(self._recordings)}
        return [place.get(one.outer_key) if one.outer_key else None for one in self._recordings]

    @cached_property
    def _top(self) -> list[Recording]:
        """The recordings that are inside no other."""
        return [
            one for one, outer in zip(self._recordings, self._outer, strict=True) if outer is None
        ]

    @cached_property
    def world_size(self) -> int | None:
        """How many ranks the job has, as far as anyone knows."""
        return max(_known(one.world_size for one in self._recordings), default=None)

    @cached_property
    def missing_ranks(self) -> list[int]:
        """The ranks that nobody recorded.

        A recording without a rank is of all that ran on its node. Where it cannot tell which ranks
        these were, none is called missing.
        """
        covered = [one.covered_ranks for one in self._top]
        if self.world_size is None or None in covered:
            return []
        seen = {one.rank for one in self._recordings}.union(*_known(covered))
        return [rank for rank in range(self.world_size) if rank not in seen]

    def summary(self) -> dict[str, Any]:
        """The summary of the whole job, with the keys of a run's (docs/jobs.md).

        The `device_j` of a device is its energy over the union of the recordings' times, each
        instant once. The recordings' shares add up to `job_j`, but for a recording inside another,
        which is part of that; they never exceed the device. What is neither the job's nor idle is
        others'. What describes a recording is that of the longest one.
        """
        runs = [one.run for one in self._recordings]
        top = [one.run for one in self._top]
        main = max(top or runs, key=lambda run: run.get("duration_s") or 0.0)
        devices = JobDevices(self._recordings, self._spans, self._outer)
        components, of_runs_j = devices.merged()
        of_boots = devices.by_boot(components)
        duration_s = length_s(union_of(self._spans))
        energy = self._energy(components, duration_s, devices.scope)
        shares = list(self._shares(of_runs_j, energy))
        codes = [run.get("exit_code") for run in runs]
        failed = next((run for run in runs if run.get("exit_code")), None)
        first = min(runs, key=lambda run: str(run.get("started_at")))
        memory = [run.get("memory") or {} for run in top]
        metrics, performance, warnings = of_ranks.metrics_of(self._by_authority())
        rests = list(self._rests(of_boots, devices.scope)) if self.missing_ranks else []
        energy["imputed"] = of_ranks.imputed(shares, self.missing_ranks, energy, rests)
        if self.missing_ranks:
            energy["partial"] += [
                {"id": f"rank:{rank}", "missing_s": duration_s} for rank in self.missing_ranks
            ]
        if energy["partial"]:
            energy["u_j"] = energy["mean_w"] = None
        passes = self._passes()
        return {
            **main,
            "runs": self.run_ids,
            "job": self.job,
            "rank": None,
            "local_rank": None,
            "local_world_size": None,
            "world_size": self.world_size,
            "started_at": first.get("started_at"),
            "duration_s": duration_s,
            "time_s": duration_s,
            "exit_code": failed["exit_code"] if failed else (None if None in codes else 0),
            "signal": failed.get("signal") if failed else None,
            "complete": all(run.get("complete") for run in runs),
            "energy": energy,
            "phases": self._phases(energy, of_runs_j, passes),
            "memory": {
                name: _sum_known(m.get(name) for m in memory)
                for name in ("peak_rss_bytes", "gpu_peak_bytes")
            },
            "carbon": _carbon(top, energy["total_j"]),
            "metrics": metrics,
            "progress": self._progress(energy["total_j"], performance),
            "performance": performance,
            "sampler": _sampler(main, runs, duration_s),
            "missing": _unique(runs, "missing", "what"),
            "warnings": [*_warnings(runs, components), *warnings],
            "ranks": [share.as_dict(energy["total_j"]) for share in shares],
            "nodes": of_ranks.nodes_of(shares, of_boots, energy),
            "missing_ranks": self.missing_ranks,
            "stragglers": of_ranks.stragglers_of(passes),
        }

    def timeline(self, summary: Mapping[str, Any]) -> Timeline:
        """The job over time, from its `summary`: in steps of a 48th, its phases as unions."""
        energy = summary["energy"]
        begin_s, end_s = min(s[0] for s in self._spans), max(s[1] for s in self._spans)
        edges_s = np.linspace(0.0, end_s - begin_s, BUCKETS + 1)
        counted = [c for c in energy["components"] if c["in_total"] and c["device_j"] is not None]
        key = "device_j" if energy["scope"] == "device" else "job_j"
        components = [
            _over_time(kind, same, key)
            for kind in dict.fromkeys(c["kind"] for c in counted)
            for same in _one_by_one([c for c in counted if c["kind"] == kind])
        ]
        step_s = float(edges_s[1])
        energy_j = np.zeros(BUCKETS + 1)
        for component in components:
            energy_j[1:] += np.cumsum(np.nan_to_num(component.job_w) * step_s)
        scale = energy["total_j"] / energy_j[-1] if energy["total_j"] and energy_j[-1] else 1.0
        u_rel = energy["u_j"] / energy["total_j"] if energy["u_j"] and energy["total_j"] else None
        phases = of_ranks.spans_by_name(self._passes())
        return Timeline(
            edges_s=edges_s,
            components=tuple(components),
            at_s=edges_s,
            energy_j=energy_j * scale,
            u_j=energy_j * scale * (math.nan if u_rel is None else u_rel),
            phases=tuple(
                (name, begin - begin_s, end - begin_s)
                for name, spans in phases.items()
                for begin, end in union_of(spans)
            ),
        )

    def _energy(
        self, components: list[dict[str, Any]], duration_s: float, scope: str
    ) -> dict[str, Any]:
        counted = [c for c in components if c["in_total"] and c["device_j"] is not None]
        total_j = _sum(c["device_j" if scope == "device" else "job_j"] for c in counted)
        kinds = {c["provenance"] for c in counted}
        u_j = summed_u_j(counted) if counted else None
        if len(self._recordings) == 1:  # it knows how alike the power of its devices went
            u_j = self._recordings[0].run["energy"].get("u_j")
        return {
            "total_j": total_j,
            "u_j": u_j,
            "mean_w": total_j / duration_s if total_j is not None and duration_s > 0 else None,
            "provenance": (kinds.pop() if len(kinds) == 1 else "mixed") if kinds else None,
            "scope": scope,
            "others_j": _sum(c["others_j"] for c in counted),
            "idle_j": _sum(c["idle_j"] for c in counted),
            "components": components,
            "partial": self._partial(),
        }

    def _partial(self) -> list[dict[str, Any]]:
        """Devices that the total lacks for a time, which no whole recording of them covers, s."""
        spans: dict[tuple[str, str], list[tuple[Span, float]]] = {}
        lost = {}
        for one in self._recordings:
            for part in one.run["energy"].get("partial") or ():
                lost[(*one.key, part["id"])] = float(part["missing_s"])
        if not lost:
            return []
        for one, span in zip(self._recordings, self._spans, strict=True):
            for component in one.components:
                if component["in_total"]:
                    missing_s = lost.get((*one.key, component["id"]), 0.0)
                    spans.setdefault(device_of(one, component), []).append((span, missing_s))
        found = []
        for (_, ident), seen in spans.items():
            whole = union_of(span for span, missing_s in seen if not missing_s)
            missing_s = max(min(s, length_s(uncovered(span, whole))) for span, s in seen)
            if missing_s > 0:
                found.append({"id": ident, "missing_s": missing_s})
        return found

    def _shares(self, of_runs_j: Floats, energy: Mapping[str, Any]) -> Iterator[RankShare]:
        """What each rank has of the total, then what recordings without a rank have besides.

        A rank that was recorded inside another's recording has its part of that.
        """
        own = [one.rank for one in self._recordings]
        chains = [chain_of(i, self._outer) for i in range(len(own))]
        listed = [
            i
            for i, chain in enumerate(chains)
            if not chain or (own[i] is not None and own[i] not in {own[j] for j in chain})
        ]
        left_j = {i: float(of_runs_j[i]) for i in listed}
        divided: set[int] = set()
        for i in listed:
            around = next((j for j in chains[i] if j in left_j), None)
            if around is not None:
                left_j[around] -= float(of_runs_j[i])
                divided.add(around)
        by_rank: dict[int, list[int]] = {}
        for i in listed:
            rank = own[i]
            if rank is not None:
                by_rank.setdefault(rank, []).append(i)
        shared = len(own) > 1
        for rank, places in sorted(by_rank.items()):
            energy_j = max(0.0, math.fsum(left_j[i] for i in places))
            yield self._share(rank, places, energy_j, of_runs_j, shared)
        for i in listed:
            rest = i not in divided or left_j[i] > _ROUNDING * (energy["total_j"] or 0.0)
            if own[i] is None and rest:
                yield self._share(None, [i], max(0.0, left_j[i]), of_runs_j, shared)

    def _share(
        self, rank: int | None, places: Sequence[int], energy_j: float, all_j: Floats, shared: bool
    ) -> RankShare:
        """One rank, of one recording or of several one after the other."""
        longest = max(places, key=lambda i: (self._spans[i][1] - self._spans[i][0], -i))
        one, runs = self._recordings[longest], [self._recordings[i].run for i in places]
        us_j = [run["energy"].get("u_j") for run in runs]
        known = None not in us_j and runs[0]["energy"].get("total_j") is not None
        recorded_j = math.fsum(all_j[places])
        scale = energy_j / recorded_j if shared and recorded_j > 0 else 1.0
        memory = [run.get("memory") or {} for run in runs]
        return RankShare(
            rank=rank,
            local_rank=one.run.get("local_rank"),
            node=one.node,
            host=one.run.get("host"),
            boot_id=one.key[0],
            run_id=one.key[1],
            energy_j=energy_j if known else None,
            u_j=math.fsum(us_j) * scale if known else None,
            duration_s=length_s(union_of(self._spans[i] for i in places)),
            peak_rss_bytes=max(_known(m.get("peak_rss_bytes") for m in memory), default=None),
            gpu_peak_bytes=max(_known(m.get("gpu_peak_bytes") for m in memory), default=None),
            complete=all(run.get("complete") for run in runs),
        )

    def _rests(
        self, components: Mapping[str, Sequence[Mapping[str, Any]]], scope: str
    ) -> Iterator[MachineRest]:
        """What the recordings of each machine leave to ranks without one. `components` are by boot.

        Where ranks saw GPUs of their own each, others may have had some that nobody saw.
        """
        by_boot: dict[str, list[Recording]] = {}
        for one in self._recordings:
            by_boot.setdefault(one.key[0], []).append(one)
        for boot_id, recordings in by_boot.items():
            gpus = {
                frozenset(c["id"] for c in one.components if c["kind"] == "gpu")
                for one in recordings
                if one.rank is not None
            }
            left_j = [
                0.0 if c["in_total"] and scope == "device" else c["device_j"] - c["job_j"]
                for c in components.get(boot_id, ())
                if c["device_j"] is not None
                and (c["in_total"] or c.get("excluded") in (UNUSED, PERHAPS_SERVED))
            ]
            known = _known(one.ranks_of_node for one in recordings)
            yield MachineRest(
                ranks=set().union(*known) if known else None,
                left_j=math.fsum(left_j) if len(gpus) <= 1 else math.inf,
            )

    def _by_authority(self) -> list[tuple[int | None, Summary]]:
        """Whose metrics are the job's: those of a recording around all, then those of rank 0."""
        placed = [
            (outer is not None, -1 if one.rank is None else one.rank, i)
            for i, (one, outer) in enumerate(zip(self._recordings, self._outer, strict=True))
        ]
        ordered = (self._recordings[i] for _, _, i in sorted(placed))
        return [(one.rank, one.run) for one in ordered]

    def _progress(
        self, total_j: float | None, performance: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        """That of whose performance it is; its energies in proportion to the job's total."""
        for _, run in self._by_authority():
            progress = run.get("progress")
            if not progress or (performance and run.get("performance") != performance):
                continue
            own_j = run["energy"].get("total_j")
            if progress.get("energy_j") is None or not own_j or total_j is None:
                return dict(progress)
            scale = total_j / own_j
            us_j = progress.get("u_j")
            return {
                **progress,
                "energy_j": [scale * energy_j for energy_j in progress["energy_j"]],
                "u_j": us_j and [None if u_j is None else scale * u_j for u_j in us_j],
            }
        return None

    def _passes(self) -> list[Pass]:
        """All phases of all recordings one by one, by the wall clock.

        A process that has no rank, in a recording that has none, is told by its recording.
        """
        passes = []
        windows = windows_ns(self._recordings)
        for one, (_, end_ns, offset_ns) in zip(self._recordings, windows, strict=True):
            for span in one.passes:
                rank = one.rank if span.rank is None else span.rank
                last_ns = end_ns if span.end_ns is None else span.end_ns
                at_s = (span.begin_ns + offset_ns) * 1e-9, (last_ns + offset_ns) * 1e-9
                passes.append(Pass(span.name, rank, one.key[1], *at_s))
        return passes

    def _phases(
        self, energy: Mapping[str, Any], of_runs_j: Floats, passes: Sequence[Pass]
    ) -> list[dict[str, Any]]:
        """The phases by name: the sum of the ranks' energies, over the union of their times.

        Their u has two parts. What the devices err by is the same part of a phase's energy as of
        the total; the rest is drawn anew in each recording. It is never more than the sum of all.
        A phase of a recording inside another only counts where no other has one of that name.
        """
        total_j, u_j = energy["total_j"], energy["u_j"]
        recorded = Counter[str]()
        names: dict[str, list[tuple[float, Mapping[str, Any], Summary]]] = {}
        own_names = {p["name"] for one in self._top for p in one.run.get("phases") or ()}
        for i, one in enumerate(self._recordings):
            own_j = one.run["energy"].get("total_j")
            scale = min(1.0, float(of_runs_j[i]) / own_j) if own_j else 1.0
            for phase in one.run.get("phases") or ():
                if self._outer[i] is None or phase["name"] not in own_names:
                    names.setdefault(phase["name"], []).append((scale, phase, one.run))
                    recorded[phase["name"]] += 1
        unions = {
            name: length_s(union_of(spans))
            for name, spans in of_ranks.spans_by_name(passes).items()
        }
        result = []
        for name, parts in names.items():
            result.append(
                {
                    **parts[0][1],
                    "count": max(phase["count"] for _, phase, _ in parts),
                    "duration_s": unions.get(
                        name, max(phase["duration_s"] for _, phase, _ in parts)
                    ),
                    **_joined_energy(parts, total_j, u_j),
                    "partial": [p for _, phase, _ in parts for p in phase.get("partial", ())],
                }
            )
        return result


_MOST_DEVICES = 24
"""Of a kind of which there are more, a timeline has the sum."""


def _one_by_one(same: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [same] if len(same) > _MOST_DEVICES else [[component] for component in same]


def _over_time(kind: str, same: Sequence[Mapping[str, Any]], key: str) -> TimelineComponent:
    """The power of one device, or of all of a kind together."""
    traces_w = np.array([c["trace_w"] for c in same], dtype=np.float64)
    parts = np.array([c[key] / c["device_j"] if c["device_j"] else 0.0 for c in same])
    unread = np.isnan(traces_w).all(axis=0)
    provenances = {c["provenance"] for c in same}
    label, host = same[0]["label"], same[0].get("host")
    return TimelineComponent(
        id=same[0]["id"] if len(same) == 1 else kind,
        kind=kind,
        label=f"{len(same):,} devices" if len(same) > 1 else f"{label} {host}" if host else label,
        provenance=provenances.pop() if len(provenances) == 1 else "mixed",
        in_total=True,
        job_w=np.where(unread, np.nan, np.nansum(traces_w * parts[:, None], axis=0)),
        device_w=np.where(unread, np.nan, np.nansum(traces_w, axis=0)),
        low_w=None,
        high_w=None,
        gaps_s=(),
    )


_ROUNDING = 1e-6
"""What is left of a recording around the ranks, if it is no more than this part of the total."""


def _joined_energy(
    parts: Sequence[tuple[float, Mapping[str, Any], Summary]],
    total_j: float | None,
    total_u_j: float | None,
) -> dict[str, float | None]:
    """The energy and u (k = 2) of one phase of several recordings."""
    if any(phase["energy_j"] is None for _, phase, _ in parts):
        return {"energy_j": None, "u_j": None}
    energy_j = math.fsum(scale * phase["energy_j"] for scale, phase, _ in parts)
    if total_j is not None:
        energy_j = min(energy_j, total_j)
    if len(parts) == 1:
        scale, phase, _ = parts[0]
        return {"energy_j": energy_j, "u_j": phase["u_j"] and scale * phase["u_j"]}
    if not total_j or total_u_j is None or any(phase["u_j"] is None for _, phase, _ in parts):
        return {"energy_j": energy_j, "u_j": None}
    anew_j2 = []
    for scale, phase, run in parts:
        own_j, own_u_j = run["energy"].get("total_j"), run["energy"].get("u_j")
        fixed_j = phase["energy_j"] * own_u_j / own_j if own_j and own_u_j else 0.0
        anew_j2.append(scale**2 * max(0.0, phase["u_j"] ** 2 - fixed_j**2))
    most_j = math.fsum(scale * phase["u_j"] for scale, phase, _ in parts)
    u_j = math.hypot(energy_j * total_u_j / total_j, math.sqrt(math.fsum(anew_j2)))
    return {"energy_j": energy_j, "u_j": min(u_j, most_j)}


def _progress_of(one: Recording) -> tuple[bool, float, int]:
    """How far a recording was when it was read."""
    run = one.run
    return bool(run.get("complete")), run.get("duration_s") or 0.0, len(one.passes)


def _carbon(top: Sequence[Summary], total_j: float | None) -> dict[str, Any] | None:
    known = [run for run in top if run.get("carbon")]
    if len(known) < len(top) or total_j is None:
        return None
    recorded_j = math.fsum(run["energy"]["total_j"] for run in known)
    if recorded_j <= 0:  # it shows no intensity
        return None
    emitted_g = math.fsum(run["carbon"]["g_co2e"] for run in known)
    return {**known[0]["carbon"], "g_co2e": emitted_g * total_j / recorded_j}


def _sampler(main: Summary, runs: Sequence[Summary], duration_s: float) -> dict[str, Any]:
    of_runs = [run.get("sampler") or {} for run in runs]
    # A recording that crashed lacks these, and then the sum is unknown.
    known: dict[str, list[Any]] = {name: [of.get(name) for of in of_runs] for name in _SUMS}
    sums = {name: None if None in values else sum(values) for name, values in known.items()}
    cpu_s = sums["cpu_s"]
    fraction = cpu_s / duration_s if cpu_s is not None and duration_s > 0 else None
    return {**(main.get("sampler") or {}), **sums, "cpu_fraction": fraction}


def _warnings(runs: Sequence[Summary], components: Iterable[Summary]) -> list[dict[str, str]]:
    """All warnings once. Of several recordings each takes the job's other ranks for others."""
    every = _unique(runs, "warnings", "text")
    if len(runs) == 1:
        return every
    kept = [warning for warning in every if warning["code"] not in (SHARED_DEVICE, SHARED_PROCESS)]
    return [*kept, *shared_job(components)]


def _unique(runs: Iterable[Summary], key: str, name: str) -> list[Any]:
    found = {item[name]: item for run in runs for item in reversed(run.get(key) or ())}
    return list(found.values())


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _sum(values: Iterable[float]) -> float | None:
    listed = list(values)
    return math.fsum(listed) if listed else None


def _sum_known(values: Iterable[Any]) -> Any:
    """The sum of what is known; None if nothing is."""
    known = _known(values)
    return sum(known) if known else None
