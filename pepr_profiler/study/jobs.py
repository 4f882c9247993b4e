"""Recordings of one job put together: what several profilers saw of one device counts once.

Ranks that each wrap themselves, nodes of a cluster, a wrapped script inside a wrapped launcher:
each recording has the whole energy of the devices it saw, and its own job's share. Devices are told
apart by the boot and their component id, GPUs by their UUID, which is the world's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Summary = Mapping[str, Any]
_Span = tuple[float, float]

_BUCKETS = 48
_SUMS = ("cpu_s", "samples", "dropped", "late", "timed", "failed_reads")


def merge_jobs(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One summary a job (docs/design.md, Contract), in the order of each one's first recording.

    Recordings are of one job if they share `job` and were made at the same time, as ranks are and
    the steps of a sweep are not, or if one was made inside another (`recording.outer`). A recording
    that stands alone comes back as it is; one that is given twice counts once. Of each device:
    `device_j` is its energy over the union of the recordings' times, each instant once; the job's
    shares of the recordings add up, except that one inside another is part of it, and never exceed
    the device. What is not the job's or idle is others'. The result has the summaries' keys, those
    that describe a recording from the longest one, and `runs`: the ids of all.
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
    return [dict(group[0]) if len(group) == 1 else _Job(group).summary() for group in groups]


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
class _View:
    """What one recording saw of one device, over [begin_s, end_s] of wall-clock time."""

    run: Summary
    component: Mapping[str, Any]
    span: _Span

    @property
    def device_j(self) -> float:
        return float(self.component["device_j"])

    def between_j(self, begin_s: float, end_s: float) -> float:
        """The device's energy between two instants of the span, from its power over time.

        Where that is unknown there is, evenly, what the known power leaves of the energy: nothing
        of a counter that was not read, what was held of a model.
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


class _Job:
    """Recordings of one job, the first given first."""

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
        found: list[Summary] = []
        at: Summary | None = run
        while at is not None:
            at = next((r for r in self._runs if _inside(at, r) and r not in found), None)
            if at is not None:
                found.append(at)
        return found

    def summary(self) -> dict[str, Any]:
        duration_s = _length(self._whole)
        components = [self._component(views) for views in self._devices().values()]
        counted = [c for c in components if c["in_total"] and c["device_j"] is not None]
        scopes = {run["energy"].get("scope", "job") for run in self._runs}
        scope = scopes.pop() if len(scopes) == 1 else "job"
        total_j = _sum(c["device_j" if scope == "device" else "job_j"] for c in counted)
        uncertain = [c["u_j"] for c in counted]
        kinds = {c["provenance"] for c in counted}
        energy = {
            "total_j": total_j,
            "u_j": None if not counted or None in uncertain else math.hypot(*uncertain),
            "mean_w": total_j / duration_s if total_j is not None and duration_s > 0 else None,
            "provenance": (kinds.pop() if len(kinds) == 1 else "mixed") if kinds else None,
            "scope": scope,
            "others_j": _sum(c["others_j"] for c in counted),
            "idle_j": _sum(c["idle_j"] for c in counted),
            "components": components,
        }
        codes = [run.get("exit_code") for run in self._runs]
        failed = next((run for run in self._runs if run.get("exit_code")), None)
        first = min(self._runs, key=lambda run: str(run.get("started_at")))
        memory = [run.get("memory") or {} for run in self._top]
        metrics: dict[str, Any] = {}
        for run in [*self._top, *self._runs]:
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
            "performance": _first(run.get("performance") for run in [*self._top, *self._runs]),
            "sampler": self._sampler(duration_s),
            "missing": _unique(self._runs, "missing", "what"),
            "warnings": _unique(self._runs, "warnings", "text"),
        }

    def _devices(self) -> dict[tuple[str, str], list[_View]]:
        """Who saw which device, the longest look first."""
        devices: dict[tuple[str, str], list[_View]] = {}
        for run, span in zip(self._runs, self._spans, strict=True):
            for component in run["energy"]["components"]:
                ident = component["id"]
                place = "" if ident.startswith("gpu:GPU-") else str(run.get("boot_id"))
                devices.setdefault((place, ident), []).append(_View(run, component, span))
        for views in devices.values():
            views.sort(key=lambda view: view.span[0] - view.span[1])
        return devices

    def _component(self, views: Sequence[_View]) -> dict[str, Any]:
        known = [view for view in views if view.component.get("device_j") is not None]
        if not known:
            return dict(views[0].component)
        seers = [view.run for view in known]
        inner = [v for v in known if any(run in seers for run in self._outers(v.run))]
        own = [v for v in known if v not in inner and v.component["in_total"]]
        seen: list[_Span] = []
        pieces: list[tuple[_View, _Span]] = []
        for view in known:
            fresh = _without(view.span, seen)
            pieces += [(view, span) for span in fresh]
            seen = _union([*seen, view.span])
        parts_j = [view.between_j(*span) for view, span in pieces]
        device_j = math.fsum(parts_j)
        job_j = min(math.fsum(view.component["job_j"] for view in own), device_j)
        idle_j = math.fsum(
            view.component["idle_j"] * part_j / view.device_j
            for (view, _), part_j in zip(pieces, parts_j, strict=True)
            if view.device_j > 0
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
            "idle_w": _least(view.component.get("idle_w") for view in known),
            "job_idle_j": _sum_known(view.component.get("job_idle_j") for view in own),
            # One device's errors are the same in each look at it: they add up as they stand.
            "u_j": _sum_known(view.component.get("u_j") for view in own or known[:1]),
            "mean_w": device_j / seen_s if seen_s > 0 else None,
            "max_w": _most(view.component.get("max_w") for view in known),
            "trace_w": self._trace_w(pieces),
            "budget": _budgets([view.component.get("budget") for view in own or known[:1]]),
        }

    def _trace_w(self, pieces: Iterable[tuple[_View, _Span]]) -> list[float | None]:
        begin_s, end_s = self._whole[0][0], self._whole[-1][1]
        step_s = (end_s - begin_s) / _BUCKETS
        listed = list(pieces)
        trace: list[float | None] = []
        for i in range(_BUCKETS):
            bucket = begin_s + i * step_s, begin_s + (i + 1) * step_s
            cut = [(view, _overlap(span, bucket)) for view, span in listed]
            inside = [(view, span) for view, span in cut if span[1] > span[0]]
            seen_s = math.fsum(span[1] - span[0] for _, span in inside)
            energy_j = math.fsum(view.between_j(*span) for view, span in inside)
            trace.append(energy_j / seen_s if seen_s > 0 else None)
        return trace

    def _phases(self) -> list[dict[str, Any]]:
        """Energies add up, phases of the ranks go on at the same time; those inside count once."""
        phases: dict[str, dict[str, Any]] = {}
        for run in self._top:
            for phase in run.get("phases") or ():
                before = phases.get(phase["name"])
                phases[phase["name"]] = dict(phase) if before is None else _together(before, phase)
        nested = (run for run in self._runs if run not in self._top)
        for phase in (phase for run in nested for phase in run.get("phases") or ()):
            phases.setdefault(phase["name"], dict(phase))
        return list(phases.values())

    def _carbon(self, total_j: float | None) -> dict[str, Any] | None:
        known = [run for run in self._top if run.get("carbon")]
        if len(known) < len(self._top) or total_j is None:
            return None
        recorded_j = math.fsum(run["energy"]["total_j"] for run in known)
        if recorded_j <= 0:  # no intensity can be told from it
            return None
        emitted_g = math.fsum(run["carbon"]["g_co2e"] for run in known)
        return {**known[0]["carbon"], "g_co2e": emitted_g * total_j / recorded_j}

    def _sampler(self, duration_s: float) -> dict[str, Any]:
        of_runs = [run.get("sampler") or {} for run in self._runs]
        # After a crash one recording does not tell: then nobody knows the sum.
        told: dict[str, list[Any]] = {name: [of.get(name) for of in of_runs] for name in _SUMS}
        sums = {name: None if None in values else sum(values) for name, values in told.items()}
        cpu_s = sums["cpu_s"]
        fraction = cpu_s / duration_s if cpu_s is not None and duration_s > 0 else None
        return {**(self._main.get("sampler") or {}), **sums, "cpu_fraction": fraction}


def _spans(runs: Sequence[Summary]) -> list[_Span]:
    """When each was recorded, wall-clock s. Those of one boot share one clock, not two readings."""
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
    """The times covered by any of some spans, in order and apart."""
    union: list[_Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def _without(span: _Span, seen: Iterable[_Span]) -> list[_Span]:
    """What of a span lies in none of those seen."""
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


def _together(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    def added(key: str) -> float | None:
        return None if None in (one[key], other[key]) else one[key] + other[key]

    longest = {key: max(one[key], other[key]) for key in ("count", "duration_s")}
    return {**one, **longest, "energy_j": added("energy_j"), "u_j": added("u_j")}


def _budgets(budgets: Iterable[Mapping[str, float] | None]) -> dict[str, float] | None:
    known = [budget for budget in budgets if budget]
    names = known[0].keys() if known else ()
    return {name: math.fsum(b.get(name, 0.0) for b in known) for name in names} or None


def _unique(runs: Iterable[Summary], key: str, name: str) -> list[Any]:
    found = {item[name]: item for run in runs for item in reversed(run.get(key) or ())}
    return list(found.values())


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _sum(values: Iterable[float]) -> float | None:
    listed = list(values)
    return math.fsum(listed) if listed else None


def _sum_known(values: Iterable[Any]) -> Any:
    """The sum of what is known; None if nothing is."""
    known = _known(values)
    return sum(known) if known else None


def _least(values: Iterable[Any]) -> Any:
    return min(_known(values), default=None)


def _most(values: Iterable[Any]) -> Any:
    return max(_known(values), default=None)
