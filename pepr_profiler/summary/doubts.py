"""Warnings about a run: what its readings themselves give reason to doubt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pepr_profiler.energy.activity import Activity
from pepr_profiler.energy.curve import EnergyCurve, gap_limit_s
from pepr_profiler.energy.gpus import _NAMED, _SHARED, _more, _shared, _who
from pepr_profiler.energy.sources import UNITS
from pepr_profiler.errors import warning
from pepr_profiler.summary.component import ComponentResult
from pepr_profiler.trace.lane import Channel, LaneReader


def other_cpu_users(
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


_CHECKED_NS = 2_000_000_000
"""From this length on, a counter and power readings that disagree are worth a warning."""

_PART_TIME, _STEADY = ("nvml-power", "nvml-power-instant"), 1e-3
"""Readings that may look at a part of each refresh period only, and below which part of an energy
their spread says nothing any more about what they did not see."""

_STALL_S = 5.0
"""A device that computes changes its energy counter far more often than this."""


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


def _unknown_units(channels: Iterable[Channel]) -> Iterator[dict[str, str]]:
    for channel in channels:
        unit = UNITS.get(channel.quantity, channel.unit)
        if channel.unit != unit:
            yield warning(
                "unknown-unit",
                f"{channel.name} is recorded in {channel.unit}, not in {unit}: it is not counted",
                f"give its sensor the unit {unit} and the scale that makes it so",
            )


def _is_rows_lost(facts: Mapping[str, Any]) -> bool:
    return any(told.get("code") == "rows-lost" for told in facts.get("warnings", []))


def _warnings(
    parts: Iterable[ComponentResult], torn_lines: int, begin_ns: int, end_ns: int, *, full: bool
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


def _other_cpu_users(
    counted: Iterable[ComponentResult],
    notes: Iterable[Mapping[str, Any]],
    activity: Activity | None,
    window_ns: tuple[int, int],
) -> list[dict[str, str]]:
    cpus = [part for part in counted if part.curve.source.kind == "cpu"]
    device_j = math.fsum(part.device_j for part in cpus)
    if activity is None or device_j <= 0:
        return []
    part = math.fsum(part.others_j for part in cpus) / device_j
    return other_cpu_users(notes, activity, part, window_ns)


def _doubts(part: ComponentResult, duration_ns: int) -> Iterator[dict[str, str]]:
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


def _steady(curve: EnergyCurve) -> bool:
    """Whether readings hardly change: what the sensor does not see then adds no uncertainty."""
    energy_j = float(curve.energy_j[-1] - curve.energy_j[0])
    if curve.duty_j2 is None or not energy_j > 0:
        return False
    duty_j2 = float(curve.duty_j2[-1] - curve.duty_j2[0])
    return math.sqrt(max(0.0, duty_j2)) < _STEADY * energy_j
