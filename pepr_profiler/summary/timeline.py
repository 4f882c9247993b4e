"""A run over time, for figures: each component's power, the energy so far, gaps and phases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pepr_profiler.energy.curve import gap_limit_s
from pepr_profiler.record import Floats, Ints, Record
from pepr_profiler.summary.component import (
    ComponentResult,
    Counted,
    Grid,
    mean_powers_w,
    supported_edges,
)
from pepr_profiler.trace.events import PhaseSpan

_BANDED_S = 2.0
"""Steps this long or longer hold seconds to take the lowest and highest of."""

_BAND_POINTS = 120
"""Instants at which the uncertainty of the energy so far is worked out."""


class TimelineComponent(Record):
    """One component's power in each step (n,), W; NaN where it was not read.

    Steps that are too short for its sensor have the mean of several: then it `joins_steps`.
    `job_w` is what is counted of `device_w`: the job's share, or all of it where the run's scope is
    "device". `low_w` and `high_w` are the lowest and the highest mean over one second in the step,
    of the device; None where the steps are shorter. `gaps_s` are (begin, end).
    """

    id: str
    kind: str
    label: str
    provenance: str
    in_total: bool
    job_w: Floats
    device_w: Floats
    low_w: Floats | None
    high_w: Floats | None
    gaps_s: tuple[tuple[float, float], ...]
    joins_steps: bool = False


class Timeline(Record):
    """A run over time, s since its begin: `edges_s` (n + 1,) of n steps that are equally long.

    `energy_j` and `u_j` (m,) are what is counted up to `at_s` (m,), and its u (k = 2; NaN where it
    is unknown). `phases` are (name, begin, end).
    """

    edges_s: Floats
    components: tuple[TimelineComponent, ...]
    at_s: Floats
    energy_j: Floats
    u_j: Floats
    phases: tuple[tuple[str, float, float], ...]


def timeline_of(
    components: Sequence[ComponentResult], grid: Grid, phases: Sequence[PhaseSpan]
) -> Timeline:
    """The timeline of a run, from what its summary was made of."""
    begin_ns = int(grid.steps_ns[0])

    def since_begin_s(t_ns: Ints) -> Floats:
        return np.asarray((t_ns - begin_ns) * 1e-9)

    apart = max(1, (len(grid.steps_ns) - 1) // _BAND_POINTS)
    at_ns = np.append(grid.steps_ns[:-1:apart], grid.steps_ns[-1])
    counted = Counted.of(components, grid)
    energy_j = np.zeros(len(at_ns))
    for component in counted.components:
        energy_j += grid.pick(component.counted_so_far_j, at_ns)
    us_j = [counted.u_j(grid, at_ns[:1], at_ns[i : i + 1]) for i in range(len(at_ns))]
    return Timeline(
        edges_s=since_begin_s(grid.steps_ns),
        components=tuple(_over_time(one, grid) for one in components if one.is_known),
        at_s=since_begin_s(at_ns),
        energy_j=energy_j,
        u_j=np.array([math.nan if u_j is None else u_j for u_j in us_j]),
        phases=tuple(
            (phase.name, (phase.begin_ns - begin_ns) * 1e-9, (phase.end_ns - begin_ns) * 1e-9)
            for phase in phases
            if phase.end_ns is not None
        ),
    )


def _over_time(component: ComponentResult, grid: Grid) -> TimelineComponent:
    curve, steps_ns = component.curve, grid.steps_ns
    span_s = np.maximum(np.diff(steps_ns) * 1e-9, 1e-9)
    unread = (steps_ns[1:] < curve.first_ns) | (steps_ns[:-1] > curve.last_ns)

    def mean_w(energy_j: Floats) -> Floats:
        return np.where(unread, np.nan, mean_powers_w(curve, grid, steps_ns, energy_j))

    low_w = high_w = None
    if span_s[0] >= _BANDED_S:
        seconds_ns = grid.seconds_ns
        second_w = mean_powers_w(curve, grid, seconds_ns, curve.energy_j)
        first = np.searchsorted(seconds_ns[:-1], steps_ns[:-1])
        low_w = np.where(unread, np.nan, np.minimum.reduceat(second_w, first))
        high_w = np.where(unread, np.nan, np.maximum.reduceat(second_w, first))
    return TimelineComponent(
        id=curve.source.id,
        kind=curve.source.kind,
        label=curve.source.label,
        provenance=curve.source.provenance,
        in_total=curve.source.in_total,
        job_w=mean_w(component.counted_so_far_j),
        device_w=mean_w(curve.energy_j),
        low_w=low_w,
        high_w=high_w,
        gaps_s=_gaps_s(component, int(steps_ns[0]), int(steps_ns[-1])),
        joins_steps=len(supported_edges(curve, grid, steps_ns)) < len(steps_ns),
    )


def _gaps_s(
    component: ComponentResult, begin_ns: int, end_ns: int
) -> tuple[tuple[float, float], ...]:
    """Gaps between readings, before the first and after the last, s since `begin_ns`."""
    curve = component.curve
    limit_ns = gap_limit_s(curve.source.period_s) * 1e9
    ends = [(begin_ns, curve.first_ns), (curve.last_ns, end_ns)]
    gaps_ns = [*curve.gaps_ns, *(gap for gap in ends if gap[1] - gap[0] > limit_ns)]
    return tuple(
        ((max(one, begin_ns) - begin_ns) * 1e-9, (min(two, end_ns) - begin_ns) * 1e-9)
        for one, two in sorted(gaps_ns)
        if two > begin_ns and one < end_ns
    )
