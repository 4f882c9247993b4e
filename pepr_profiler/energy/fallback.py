"""Another sensor of a device counts where the preferred one does not answer.

A counter can be there and be dead: UNKNOWN, always 0, or standing still while the device draws 300
W (pynvml 54, DCGM 171). It can also die during a run. Then the device's power readings count, or
another driver that reads the same device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set

import numpy as np

from pepr_profiler.energy.curve import EnergyCurve, steps_of
from pepr_profiler.energy.sources import GPU_POWER, MODULE_POWER, Place
from pepr_profiler.record import Floats, Ints, Mask
from pepr_profiler.trace.lane import LaneInfo
from pepr_profiler.units import NS_PER_S

_MISSED = 0.25
"""A counter that stood still has missed energy if it lacks more than this part of what the other
sensor saw meanwhile; else it caught up. Their gains differ by less (docs/measurement, B)."""

_TELLING = 0.1
"""The power of a GPU and of its module, of which the counter's cannot be told otherwise, differ by
more than this part."""


def answers(curve: EnergyCurve) -> bool:
    """Whether a source gave any energy at all."""
    return len(curve.energy_j) > 0 and bool(np.isfinite(curve.energy_j).all())


def silent_places(curves: Mapping[Place, EnergyCurve]) -> set[Place]:
    """Where nothing was measured."""
    return {place for place, curve in curves.items() if not answers(curve)}


def counters_of_gpus(lanes: Iterable[LaneInfo], curves: Mapping[Place, EnergyCurve]) -> set[str]:
    """UUIDs of GPUs on a module whose counter has counted the GPU's energy, not the module's.

    That the counter is the module's was seen on a GH200 (zeus 172). Where a recording has the power
    of both, it shows which of them the counter integrates.
    """
    by_uuid: dict[str, dict[str, float]] = {}
    for lane in lanes:
        for index, channel in enumerate(lane.channels):
            curve = curves.get((lane.name, index))
            if curve is None or not answers(curve):
                continue
            what = (
                "gpu"
                if channel.source in GPU_POWER
                else "module"
                if channel.source in MODULE_POWER
                else channel.source
            )
            of_gpu = by_uuid.setdefault(channel.labels.get("uuid", ""), {})
            of_gpu.setdefault(what, float(curve.energy_j[-1] - curve.energy_j[0]))
    return {
        uuid
        for uuid, j in by_uuid.items()
        if j.keys() >= {"gpu", "module", "nvml-energy"}
        and j["module"] - j["gpu"] > _TELLING * j["module"]
        and abs(j["nvml-energy"] - j["gpu"]) < abs(j["nvml-energy"] - j["module"])
    }


def with_fallback(curve: EnergyCurve, other: EnergyCurve, at_ns: Ints) -> EnergyCurve:
    """The curve, with what `other` measured in the times in which this counter missed energy.

    Between instants of the grid: an interval in which the counter was dead for a part is the
    other's. Its offset then holds for all of the run.
    """
    quiet_ns = list(_quiet_spans(curve, other, at_ns))
    missed_ns = [span_ns for span_ns in quiet_ns if _has_missed(curve, other, at_ns, span_ns)]
    replaced = np.zeros(max(0, len(at_ns) - 1), bool)
    for span_ns in missed_ns:
        replaced[slice(*steps_of(span_ns, at_ns))] = True
    if not replaced.any():
        return curve
    other = stood_in(other)
    beside = np.append(replaced, False) | np.append(False, replaced)
    name = f"{curve.source.source}+{other.source.source}"
    offset_w = max(curve.source.offset_w, other.source.offset_w)
    # Where the counter is dead until the end, its energy is known for as long as the other's.
    first_ns, last_ns, changed_ns = curve.first_ns, curve.last_ns, curve.changed_ns
    begin_ns, end_ns = curve.flow_ns
    if min(span_ns[0] for span_ns in missed_ns) < first_ns:
        first_ns, begin_ns = min(first_ns, other.first_ns), min(begin_ns, other.flow_ns[0])
    if max(span_ns[1] for span_ns in missed_ns) > changed_ns:
        last_ns, end_ns = max(last_ns, other.last_ns), max(end_ns, other.flow_ns[1])
        changed_ns = max(changed_ns, other.changed_ns if other.source.counter else other.last_ns)
    stalls_ns = [_read_ns(span_ns, curve.gaps_ns) for span_ns in set(quiet_ns) - set(missed_ns)]
    gaps_ns = sorted(
        {gap_ns for gap_ns in curve.gaps_ns if not _overlap(gap_ns, missed_ns)}
        | {gap_ns for gap_ns in other.gaps_ns if _overlap(gap_ns, missed_ns)}
    )
    return curve._replace(
        source=curve.source._replace(source=name, offset_w=offset_w),
        energy_j=_joined(curve.energy_j, other.energy_j, replaced),
        power_w=_picked(curve.power_w, other.power_w, beside),
        edge_j2=_picked(curve.edge_j2, other.edge_j2, beside),
        inside=curve.inside._replace(interval=np.where(beside, -1, curve.inside.interval))
        if curve.inside is not None
        else None,
        duty_j2=_joined_known(curve.duty_j2, other.duty_j2, replaced),
        gap_j2=_joined_known(curve.gap_j2, other.gap_j2, replaced),
        extremes_w=(
            min(curve.extremes_w[0], other.extremes_w[0]),
            max(curve.extremes_w[1], other.extremes_w[1]),
        ),
        first_ns=first_ns,
        last_ns=last_ns,
        changed_ns=changed_ns,
        longest_stall_s=max(*stalls_ns, last_ns - changed_ns, 0) / NS_PER_S,
        longest_gap_s=max((gap_ns[1] - gap_ns[0] for gap_ns in gaps_ns), default=0) / NS_PER_S,
        gaps_ns=tuple(gaps_ns),
        lag_u_s=max(curve.lag_u_s, other.lag_u_s),
        aliased=curve.aliased or other.aliased,
        instead_of=curve.instead_of or curve.source.source,
        instead_ns=tuple(
            (max(span_ns[0], int(at_ns[0])), min(span_ns[1], int(at_ns[-1])))
            for span_ns in missed_ns
        ),
        flow_ns=(begin_ns, end_ns),
        instead_averages_s=other.averages_s,
    )


def _has_missed(
    curve: EnergyCurve, other: EnergyCurve, at_ns: Ints, span_ns: tuple[int, int]
) -> bool:
    """Whether a counter that stood still in a span did not count what flowed then.

    One that only showed it late may need a few refreshes to catch up: half of the span is added.
    """
    begin_ns, end_ns = span_ns
    late_ns = end_ns + (end_ns - begin_ns) // 2
    first, last = steps_of((begin_ns, end_ns), at_ns)
    lasts = last, steps_of((begin_ns, late_ns), at_ns)[1]
    if last <= first:
        return False
    counted_j, other_j = (
        [float(c.energy_j[i] - c.energy_j[first]) for i in lasts] for c in (curve, other)
    )
    missed = (
        o > 0 and o - c > _MISSED * other_j[0] for c, o in zip(counted_j, other_j, strict=True)
    )
    return all(missed)


def _read_ns(span_ns: tuple[int, int], gaps_ns: Iterable[tuple[int, int]]) -> int:
    """How much of a span is in no gap."""
    unread_ns = (
        min(end_ns, span_ns[1]) - max(begin_ns, span_ns[0]) for begin_ns, end_ns in gaps_ns
    )
    return span_ns[1] - span_ns[0] - sum(max(0, each_ns) for each_ns in unread_ns)


def _overlap(span_ns: tuple[int, int], others_ns: Iterable[tuple[int, int]]) -> bool:
    """Whether a span has a time in common with one of others."""
    return any(span_ns[0] < end_ns and begin_ns < span_ns[1] for begin_ns, end_ns in others_ns)


def stood_in(curve: EnergyCurve) -> EnergyCurve:
    """Power readings in the place of a counter, beside which they were not stored closely."""
    if curve.edge_j2 is None or not curve.level_j2:
        return curve
    unbounded = (math.inf, math.inf)
    return curve._replace(edge_j2=curve.edge_j2 + curve.level_j2, short_j2=unbounded, level_j2=0.0)


def replacements(
    before: Iterable[EnergyCurve], now: Iterable[EnergyCurve], silent: Set[Place]
) -> dict[Place, str]:
    """Of the curves that are counted now, which silent source each one stands in for."""
    dead = {
        curve.source.id: curve.source.source
        for curve in before
        if curve.source.in_total and (curve.source.lane, curve.source.channel) in silent
    }
    return {
        (curve.source.lane, curve.source.channel): dead[curve.source.id]
        for curve in now
        if curve.source.in_total
        and answers(curve)
        and dead.get(curve.source.id, curve.source.source) != curve.source.source
    }


def _quiet_spans(curve: EnergyCurve, other: EnergyCurve, at_ns: Ints) -> Iterable[tuple[int, int]]:
    """When the counter did not change for long although the other sensor was read."""
    spans = list(curve.quiet_ns)
    begin_ns, end_ns = int(at_ns[0]), int(at_ns[-1])
    if curve.first_ns - max(other.first_ns, begin_ns) > curve.quiet_s * NS_PER_S:
        spans.append((begin_ns, curve.first_ns))
    if min(other.last_ns, end_ns) - curve.changed_ns > curve.quiet_s * NS_PER_S:
        spans.append((curve.changed_ns, end_ns))
    return spans


def _joined(mine: Floats, theirs: Floats, replaced: Mask) -> Floats:
    """A cumulative sum of one's steps, and of the other's where these are replaced."""
    steps = np.where(replaced, np.diff(theirs), np.diff(mine))
    return np.concatenate((mine[:1], mine[0] + np.cumsum(steps)))


def _joined_known(mine: Floats | None, theirs: Floats | None, replaced: Mask) -> Floats | None:
    return mine if mine is None or theirs is None else _joined(mine, theirs, replaced)


def _picked(mine: Floats | None, theirs: Floats | None, replaced: Mask) -> Floats | None:
    return mine if mine is None or theirs is None else np.where(replaced, theirs, mine)
