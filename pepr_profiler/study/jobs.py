"""Merges the recordings of one job: energy that several profilers saw of a device counts once.

A job has several recordings if each of its ranks is wrapped, if it runs on several nodes, or if a
wrapped script runs in a wrapped launcher. Each recording has the whole energy of the devices that
it saw, and the share of its own processes. Two recordings saw the same device if boot and component
id are the same, or the UUID of a GPU, which is unique in the world.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pepr_profiler.energy.uncertainty import summed_u_j

Summary = Mapping[str, Any]
_Span = tuple[float, float]

_BUCKETS = 48
_SUMS = ("cpu_s", "samples", "dropped", "late", "timed", "failed_reads")


def merge_jobs(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One summary per job (docs/design.md, Contract), in the order of their first recordings.

    Recordings are of one job if one was made inside another (`recording.outer`), or if they have
    the same `job` and overlap in time, as ranks do and the steps of a sweep do not. A recording
    that is alone is returned as it is; one that is given twice counts once.

    The `device_j` of a device is its energy over the union of the recordings' times, each instant
    once. The recordings' shares add up to `job_j`, but for a recording inside another, which is
    part of that; they never exceed the device. What is neither the job's nor idle is others'. A
    merged summary has the same keys. What describes a recording is that of the longest one; `runs`
    are the ids of all.
    """
    unique: dict[tuple[Any, str], Summary] = {}
    for summary in summaries:
        unique.setdefault((summary.get("boot_id"), summary["run_id"]), summary)
    groups: list[list[Summary]] = []
    for summary in unique.values():
        related = [group for group in groups if any(_related(summary, one) for one in group)]
        for group in related[1:]:
            groups.remove(group)
        merged = [*(one for group in related for one in group), summary]
        if related:
            related[0][:] = merged
        else:
            groups.append(merged)
    return [
        dict(group[0]) if len(group) == 1 else _JobRecordings(group).merged() for group in groups
    ]


def _related(one: Summary, other: Summary) -> bool:
    if one.get("job") is not None and one["job"] == other.get("job"):
        begin, end = _overlap(*_spans([one, other]))
        if end > begin:
            return True
    return _inside(one, other) or _inside(other, one)


def _inside(inner: Summary, outer: Summary) -> bool:
    """Whether the inner recording was made by a process of the outer one's job."""
    around = (inner.get("recording") or {}).get("outer") or {}
    same_boot = inner.get("boot_id") == outer.get("boot_id")
    return same_boot and around.get("run_id") == outer["run_id"]


@dataclass(frozen=True)
class _DeviceRecord:
    """What one recording has of one device, from begin to end of `span` (wall-clock s)."""

    run: Summary
    component: Mapping[str, Any]
    span: _Span

    @property
    def device_j(self) -> float:
        return float(self.component["device_j"])

    @property
    def missing_s(self) -> float:
        """For how long its energy is missing in the recording."""
        partial = self.run["energy"].get("partial") or ()
        return math.fsum(
            part["missing_s"] for part in partial if part["id"] == self.component["id"]
        )

    def between_j(self, begin_s: float, end_s: float) -> float:
        """The device's energy between two instants of the span, from its power over time.

        Where the power is unknown, the energy that the known power does not account for is spread
        evenly: 0 for a counter, which was not read there, the held value for a model.
        """
        begin, end = self.span
        trace_w = self.component.get("trace_w") or (None,)
        step_s = (end - begin) / len(trace_w)
        known_w = _known(trace_w)
        left_j = max(0.0, self.device_j - math.fsum(known_w) * step_s)
        unknown_s = (len(trace_w) - len(known_w)) * step_s
        power_w = [left_j / unknown_s if watts is None else watts for watts in trace_w]
        if not any(power_w):
            return 0.0
        overlaps = (
            max(0.0, min(end_s, begin + (i + 1) * step_s) - max(begin_s, begin + i * step_s))
            for i in range(len(power_w))
        )
        part = math.fsum(w * s for w, s in zip(power_w, overlaps, strict=True)) / step_s
        return self.device_j * part / math.fsum(power_w)


class _JobRecordings:
    """The recordings of one job, in the order in which they were given."""

    def __init__(self, runs: Sequence[Summary]) -> None:
        self._runs = runs
        self._spans = _spans(runs)
        self._whole = _union(self._spans)
        self._main = max(self._top, key=lambda run: run.get("duration_s") or 0.0)

    @cached_property
    def _top(self) -> list[Summary]:
        """The recordings that are inside no other."""
        return [run for run in self._runs if not self._outers(run)]

    def _outers(self, run: Summary) -> list[Summary]:
        """The recordings that a recording is inside of, the nearest first."""
        found: list[Summary] = []
        at: Summary | None = run
        while at is not None:
            at = next((r for r in self._runs if _inside(at, r) and r not in found), None)
            if at is not None:
                found.append(at)
        return found

    def merged(self) -> dict[str, Any]:
        """The summary of the whole job."""
        duration_s = _length(self._whole)
        components = [self._component(records) for records in self._devices().values()]
        counted = [c for c in components if c["in_total"] and c["device_j"] is not None]
        scopes = {run["energy"].get("scope", "job") for run in self._runs}
        scope = scopes.pop() if len(scopes) == 1 else "job"
        total_j = _sum(c["device_j" if scope == "device" else "job_j"] for c in counted)
        kinds = {c["provenance"] for c in counted}
        energy = {
            "total_j": total_j,
            "u_j": summed_u_j(counted) if counted else None,
            "mean_w": total_j / duration_s if total_j is not None and duration_s > 0 else None,
            "provenance": (kinds.pop() if len(kinds) == 1 else "mixed") if kinds else None,
            "scope": scope,
            "others_j": _sum(c["others_j"] for c in counted),
            "idle_j": _sum(c["idle_j"] for c in counted),
            "components": components,
            "partial": self._partial(),
        }
        if energy["partial"]:
            energy["u_j"] = None
        codes = [run.get("exit_code") for run in self._runs]
        failed = next((run for run in self._runs if run.get("exit_code")), None)
        first = min(self._runs, key=lambda run: str(run.get("started_at")))
        memory = [run.get("memory") or {} for run in self._top]
        outer_first = [*self._top, *self._runs]
        performances = _known(run.get("performance") for run in outer_first)
        metrics: dict[str, Any] = {}
        for run in outer_first:
            metrics = {**(run.get("metrics") or {}), **metrics}
        return {
            **self._main,
            "runs": [run["run_id"] for run in self._runs],
            "job": next((run["job"] for run in self._runs if run.get("job") is not None), None),
            "started_at": first.get("started_at"),
            "duration_s": duration_s,
            "time_s": duration_s,
            "exit_code": failed["exit_code"] if failed else (None if None in codes else 0),
            "signal": failed.get("signal") if failed else None,
            "complete": all(run.get("complete") for run in self._runs),
            "energy": energy,
            "phases": self._phases(),
            "memory": {
                name: _sum_known(m.get(name) for m in memory)
                for name in ("peak_rss_bytes", "gpu_peak_bytes")
            },
            "carbon": self._carbon(total_j),
            "metrics": metrics,
            "performance": next(iter(performances), None),
            "sampler": self._sampler(duration_s),
            "missing": _unique(self._runs, "missing", "what"),
            "warnings": _unique(self._runs, "warnings", "text"),
        }

    def _partial(self) -> list[dict[str, Any]]:
        """Devices that the total lacks for a time, which no whole recording of them covers, s."""
        found: dict[str, float] = {}
        for (_, ident), records in self._devices().items():
            wanted = [record for record in records if record.component["in_total"]]
            whole = _union(record.span for record in wanted if not record.missing_s)
            for record in wanted:
                missing_s = min(record.missing_s, _length(_without(record.span, whole)))
                found[ident] = max(missing_s, found.get(ident, 0.0))
        return [{"id": ident, "missing_s": s} for ident, s in found.items() if s > 0]

    def _devices(self) -> dict[tuple[str, str], list[_DeviceRecord]]:
        """The records of each device, the longest first."""
        devices: dict[tuple[str, str], list[_DeviceRecord]] = {}
        for run, span in zip(self._runs, self._spans, strict=True):
            for component in run["energy"]["components"]:
                ident = component["id"]
                place = "" if ident.startswith("gpu:GPU-") else str(run.get("boot_id"))
                devices.setdefault((place, ident), []).append(_DeviceRecord(run, component, span))
        for records in devices.values():
            records.sort(key=lambda record: record.span[0] - record.span[1])
        return devices

    def _component(self, records: Sequence[_DeviceRecord]) -> dict[str, Any]:
        known = [record for record in records if record.component.get("device_j") is not None]
        if not known:
            return dict(records[0].component)
        seers = [record.run for record in known]
        inner = [v for v in known if any(run in seers for run in self._outers(v.run))]
        own = [v for v in known if v not in inner and v.component["in_total"]]
        seen: list[_Span] = []
        pieces: list[tuple[_DeviceRecord, _Span]] = []
        for record in known:
            fresh = _without(record.span, seen)
            pieces += [(record, span) for span in fresh]
            seen = _union([*seen, record.span])
        parts_j = [record.between_j(*span) for record, span in pieces]
        device_j = math.fsum(parts_j)
        job_j = min(math.fsum(record.component["job_j"] for record in own), device_j)
        idle_j = math.fsum(
            record.component["idle_j"] * part_j / record.device_j
            for (record, _), part_j in zip(pieces, parts_j, strict=True)
            if record.device_j > 0
        )
        idle_j = min(idle_j, device_j - job_j)
        result = {**known[0].component, "in_total": bool(own)}
        if own:
            result = {**result, **{k: own[0].component[k] for k in ("source", "provenance")}}
            result.pop("excluded", None)
        seen_s = _length(seen)
        return {
            **result,
            "device_j": device_j,
            "job_j": job_j,
            "others_j": device_j - job_j - idle_j,
            "idle_j": idle_j,
            "idle_w": min(_known(r.component.get("idle_w") for r in known), default=None),
            "job_idle_j": _sum_known(record.component.get("job_idle_j") for record in own),
            # The errors of a device are the same in each of its records: they add up linearly.
            "u_j": _sum_known(record.component.get("u_j") for record in own or known[:1]),
            "mean_w": device_j / seen_s if seen_s > 0 else None,
            "max_w": max(_known(r.component.get("max_w") for r in known), default=None),
            "trace_w": self._trace_w(pieces),
            "budget": _budgets([record.component.get("budget") for record in own or known[:1]]),
        }

    def _trace_w(self, pieces: Iterable[tuple[_DeviceRecord, _Span]]) -> list[float | None]:
        begin_s, end_s = self._whole[0][0], self._whole[-1][1]
        step_s = (end_s - begin_s) / _BUCKETS
        listed = list(pieces)
        trace: list[float | None] = []
        for i in range(_BUCKETS):
            bucket = begin_s + i * step_s, begin_s + (i + 1) * step_s
            cut = [(record, _overlap(span, bucket)) for record, span in listed]
            inside = [(record, span) for record, span in cut if span[1] > span[0]]
            seen_s = math.fsum(span[1] - span[0] for _, span in inside)
            energy_j = math.fsum(record.between_j(*span) for record, span in inside)
            trace.append(energy_j / seen_s if seen_s > 0 else None)
        return trace

    def _phases(self) -> list[dict[str, Any]]:
        """The phases by name: energies of ranks add up, of times the longest counts.

        A phase of a recording inside another only counts where no other has one of that name.
        """
        phases: dict[str, dict[str, Any]] = {}
        for run in self._top:
            for phase in run.get("phases") or ():
                before = phases.get(phase["name"])
                phases[phase["name"]] = dict(phase) if before is None else _joined(before, phase)
        nested = (run for run in self._runs if run not in self._top)
        for phase in (phase for run in nested for phase in run.get("phases") or ()):
            phases.setdefault(phase["name"], dict(phase))
        return list(phases.values())

    def _carbon(self, total_j: float | None) -> dict[str, Any] | None:
        known = [run for run in self._top if run.get("carbon")]
        if len(known) < len(self._top) or total_j is None:
            return None
        recorded_j = math.fsum(run["energy"]["total_j"] for run in known)
        if recorded_j <= 0:  # it shows no intensity
            return None
        emitted_g = math.fsum(run["carbon"]["g_co2e"] for run in known)
        return {**known[0]["carbon"], "g_co2e": emitted_g * total_j / recorded_j}

    def _sampler(self, duration_s: float) -> dict[str, Any]:
        of_runs = [run.get("sampler") or {} for run in self._runs]
        # A recording that crashed lacks these, and then the sum is unknown.
        known: dict[str, list[Any]] = {name: [of.get(name) for of in of_runs] for name in _SUMS}
        sums = {name: None if None in values else sum(values) for name, values in known.items()}
        cpu_s = sums["cpu_s"]
        fraction = cpu_s / duration_s if cpu_s is not None and duration_s > 0 else None
        return {**(self._main.get("sampler") or {}), **sums, "cpu_fraction": fraction}


def _spans(runs: Sequence[Summary]) -> list[_Span]:
    """When each run was recorded, in wall-clock s.

    For all runs of one boot the first one's reading of both clocks is used: another reading may
    differ by what the wall clock was set, and would move them against each other.
    """
    offsets_ns: dict[str, int] = {}
    spans = []
    for run in runs:
        begin_ns, end_ns = run["recording"]["window_ns"]
        clock = run["clock"][0]
        boot = str(run.get("boot_id"))
        offset_ns = offsets_ns.setdefault(boot, clock["unix_ns"] - clock["t_ns"])
        if end_ns is None:
            end_ns = begin_ns + round((run.get("duration_s") or 0.0) * 1e9)
        spans.append(((begin_ns + offset_ns) * 1e-9, (end_ns + offset_ns) * 1e-9))
    return spans


def _union(spans: Iterable[_Span]) -> list[_Span]:
    """The union of some spans: in order, and no two of them touch."""
    union: list[_Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def _without(span: _Span, seen: Iterable[_Span]) -> list[_Span]:
    """The parts of a span that none of those seen covers."""
    left, at = [], span[0]
    for begin, end in _union(seen):
        if begin > at:
            left.append((at, min(begin, span[1])))
        at = max(at, end)
    left.append((at, span[1]))
    return [(begin, end) for begin, end in left if end > begin]


def _overlap(one: _Span, other: _Span) -> _Span:
    return max(one[0], other[0]), min(one[1], other[1])


def _length(spans: Iterable[_Span]) -> float:
    return math.fsum(end - begin for begin, end in spans)


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    def added(key: str) -> float | None:
        return None if None in (one[key], other[key]) else one[key] + other[key]

    longest = {key: max(one[key], other[key]) for key in ("count", "duration_s")}
    sums = {key: added(key) for key in ("energy_j", "u_j")}
    return {
        **one,
        **longest,
        **sums,
        "partial": [*one.get("partial", ()), *other.get("partial", ())],
    }


def _budgets(budgets: Iterable[Mapping[str, float] | None]) -> dict[str, float] | None:
    known = [budget for budget in budgets if budget]
    names = known[0].keys() if known else ()
    return {name: math.fsum(b.get(name, 0.0) for b in known) for name in names} or None


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
