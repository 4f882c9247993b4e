"""One component of a run: its energy, whose it is, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pepr_profiler.energy.curve import EnergyCurve, gap_limit_s, seconds_in
from pepr_profiler.energy.sharing import Shares
from pepr_profiler.energy.uncertainty import (
    CrossCheck,
    UncertaintyBudget,
    budget,
    combined_u_j,
    likeness,
)
from pepr_profiler.record import Floats, Ints, Record
from pepr_profiler.trace.events import PhaseSpan
from pepr_profiler.units import NS_PER_S

_BUCKETS = 48
"""Points of the power-over-time line in a summary."""

_STEPS, _SHORTEST_STEP_S = 480, 0.05
"""Steps of a timeline: two pixels of a page each, unless the run is short."""

_STEP_REFRESHES, _STEP_U = 4, 0.01
"""A mean power needs so many refreshes of a counter, and is sure to this part by their times."""


class Grid(Record):
    """The instants at which energy is needed, ns: seconds, buckets, steps, marks, both ends.

    `read_ns` is the end, or the last row of a recording that lacks the rows of its last moments.
    """

    at_ns: Ints
    seconds_ns: Ints
    buckets_ns: Ints
    steps_ns: Ints
    read_ns: int

    @classmethod
    def over(
        cls,
        begin_ns: int,
        end_ns: int,
        phases: Iterable[PhaseSpan],
        logged_ns: Ints,
        read_ns: int | None = None,
    ) -> Grid:
        """The grid of a window with its phases and the instants at which metrics were logged."""

        def edges(count: int) -> Ints:
            return np.linspace(begin_ns, end_ns, count + 1).astype(np.int64)

        seconds_ns = edges(seconds_in(begin_ns, end_ns))
        buckets_ns = edges(_BUCKETS)
        shortest = (end_ns - begin_ns) * 1e-9 / _SHORTEST_STEP_S
        steps_ns = edges(int(min(_STEPS, max(_BUCKETS, shortest))))
        marks = [edge for phase in phases for edge in (phase.begin_ns, phase.end_ns)]
        marks_ns = np.array(marks, dtype=np.int64)
        at_ns = np.sort(np.concatenate((seconds_ns, buckets_ns, steps_ns, marks_ns, logged_ns)))
        at_ns = at_ns[np.diff(at_ns, prepend=at_ns[0] - 1) > 0]  # np.unique loads numpy.ma: 15 ms
        read_ns = end_ns if read_ns is None else read_ns
        return cls(at_ns, seconds_ns, buckets_ns, steps_ns, read_ns)

    def places(self, at_ns: Ints) -> Ints:
        """Where these instants, which are on the grid, are."""
        return np.asarray(np.searchsorted(self.at_ns, at_ns))

    def pick(self, values: Floats, at_ns: Ints) -> Floats:
        """Of values that are given on the grid, those at these instants, which are on it."""
        return np.asarray(values[self.places(at_ns)])


_LEAST_MISSING = 0.01
"""A component that is missing for less than this part of the time is whole."""

CHECKED_S = 2.0
"""In a shorter run, power readings do not check a counter."""

_STALL_REFRESHES = 50


def stall_limit_s(curve: EnergyCurve) -> float:
    """How long a counter of a device that works does not stand still, s."""
    return max(gap_limit_s(curve.source.period_s), _STALL_REFRESHES * curve.refresh_s)


class ComponentResult(Record):
    """One component with its shares, and what another sensor of the same device says.

    `scope` says what of it is counted: "job", the job's share, or "device", all.
    """

    curve: EnergyCurve
    shares: Shares
    check: CrossCheck | None = None
    scope: str = "job"

    @property
    def is_known(self) -> bool:
        """Whether its energy is known at all."""
        return bool(np.isfinite(self.curve.energy_j).all()) and len(self.curve.energy_j) > 0

    @property
    def is_counted(self) -> bool:
        """Whether it is in the total."""
        return self.curve.source.in_total and self.is_known

    @property
    def device_j(self) -> float:
        """The whole device's energy."""
        return float(self.curve.energy_j[-1] - self.curve.energy_j[0])

    @property
    def others_j(self) -> float:
        """The energy of others than the job."""
        return float(self.shares.others_j[-1])

    @property
    def idle_j(self) -> float:
        """The energy that is nobody's."""
        return float(self.shares.idle_j[-1])

    @property
    def counted_j(self) -> float:
        """What of it is counted."""
        return float(self.counted_so_far_j[-1])

    @property
    def counted_so_far_j(self) -> Floats:
        """What of it is counted, cumulative at the grid."""
        if self.scope == "job":
            return self.shares.job_j
        return np.asarray(self.curve.energy_j - self.curve.energy_j[0])

    def counted_within_j(self, grid: Grid, begins_ns: Ints, ends_ns: Ints) -> float:
        """What of it is counted in some windows, whose edges are on the grid, together."""
        so_far_j = self.counted_so_far_j
        return float(np.sum(grid.pick(so_far_j, ends_ns) - grid.pick(so_far_j, begins_ns)))

    def missing_s(self, grid: Grid, begins_ns: Ints, ends_ns: Ints) -> float:
        """For how long in some windows its energy is missing, s.

        That is the time before its first reading and after its last, if either is more than late
        or the rows of the end are lost, and after the last change of a counter that stood still
        until the end, but for what the curve counts beyond them. A gap between two readings is
        bridged, and so is a counter that stood still and went on.
        """
        if not self.is_known:
            return float(np.sum(ends_ns - begins_ns)) * 1e-9
        first_ns, last_ns = float(self.curve.first_ns), float(self.curve.last_ns)
        limit_ns = gap_limit_s(self.curve.source.period_s) * NS_PER_S
        still_s = (last_ns - self.curve.changed_ns) * 1e-9
        if (
            self.curve.source.counter
            and self.curve.changed_ns > 0
            and still_s > stall_limit_s(self.curve)
        ):
            last_ns = self.curve.changed_ns
        missing_ns = np.zeros(len(begins_ns))
        flow_ns = self.curve.flow_ns  # what flowed a little before and after readings is counted
        if first_ns - grid.at_ns[0] > limit_ns:
            if math.isfinite(flow_ns[0]):
                first_ns = min(first_ns, flow_ns[0])
            missing_ns += np.clip(np.minimum(first_ns, ends_ns) - begins_ns, 0, None)
        if grid.at_ns[-1] - last_ns <= limit_ns and grid.read_ns >= grid.at_ns[-1]:
            last_ns = float(grid.at_ns[-1])
        elif math.isfinite(flow_ns[1]):
            last_ns = max(last_ns, flow_ns[1])
        missing_ns += np.clip(ends_ns - np.maximum(last_ns, begins_ns), 0, None)
        return float(np.sum(missing_ns)) * 1e-9

    def contradicts(self, duration_s: float) -> bool:
        """Whether its counter and its power readings differ by more than both explain.

        In a short run power readings are mostly edges, and check nothing (docs/measurement, B).
        """
        check = self.check
        return bool(check and abs(check.difference_j) > check.u_j and duration_s >= CHECKED_S)

    def budget(self, grid: Grid, begins_ns: Ints, ends_ns: Ints) -> UncertaintyBudget:
        """The uncertainty budget of `counted_within_j` of the same windows."""
        energy_j = self.counted_within_j(grid, begins_ns, ends_ns)
        begins, ends = grid.places(begins_ns), grid.places(ends_ns)
        of_device = budget(self.curve, grid.at_ns, begins, ends, energy_j=energy_j)
        if self.contradicts(float(grid.at_ns[-1] - grid.at_ns[0]) * 1e-9):
            assert self.check is not None
            part = min(1.0, abs(energy_j / self.device_j)) if self.device_j else 1.0
            apart_j = abs(self.check.difference_j) + self.check.u_j
            of_device = of_device._replace(disagreement_j=0.5 * part * apart_j)
        if self.scope != "job":
            return of_device
        duration_s = float(np.sum(ends_ns - begins_ns)) * 1e-9
        u_j = self.shares.u_j(energy_j, duration_s=duration_s, windows=len(begins))
        return of_device._replace(attribution_j=u_j)

    def whole_budget(self, grid: Grid) -> UncertaintyBudget:
        """The uncertainty budget of `counted_j`."""
        return self.budget(grid, grid.at_ns[:1], grid.at_ns[-1:])

    def summary(self, grid: Grid, duration_s: float) -> dict[str, Any]:
        """The component as run.json has it; figures that are unknown are None."""
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
        result["impossible_readings"] = self.curve.impossible
        if source.stated_by:
            result["stated_by"] = source.stated_by
        if self.curve.instead_of:
            result["fallback"] = {
                "instead_of": self.curve.instead_of,
                "seconds": self.curve.instead_s,
            }
        figures = self._figures(grid, duration_s) if self.is_known else dict.fromkeys(_FIGURES)
        return {**result, **figures}

    def _figures(self, grid: Grid, duration_s: float) -> dict[str, Any]:
        whole = self.whole_budget(grid)
        second_w = mean_powers_w(self.curve, grid, grid.seconds_ns, self.curve.energy_j)
        read_s = duration_s - self.missing_s(grid, grid.at_ns[:1], grid.at_ns[-1:])
        values = (
            self.device_j,
            float(self.shares.job_j[-1]),
            self.others_j,
            self.idle_j,
            self.shares.idle_w,
            self.shares.job_idle_j,
            2 * whole.u_j,
            self.device_j / read_s if read_s > 0 else None,
            max((watts for watts in _or_none(second_w) if watts is not None), default=None),
            self._trace_w(grid),
            whole._asdict(),
            None if self.check is None else self.check._asdict(),
        )
        return dict(zip(_FIGURES, values, strict=True))

    def _trace_w(self, grid: Grid) -> list[float | None]:
        """The power in each bucket, None before the first and after the last reading."""
        curve = self.curve
        power_w = mean_powers_w(
            curve, grid, grid.buckets_ns, curve.energy_j, within_ns=curve.flow_ns
        )
        ends_ns = zip(grid.buckets_ns[:-1], grid.buckets_ns[1:], strict=True)
        return [
            watts if end_ns >= self.curve.first_ns and begin_ns <= self.curve.last_ns else None
            for watts, (begin_ns, end_ns) in zip(_or_none(power_w), ends_ns, strict=True)
        ]


class Counted(Record):
    """The components of a run that are in its total, with how alike their power goes.

    `expected` are those that should be in it: of some of them nothing may be known.
    """

    components: Sequence[ComponentResult]
    alike: Floats
    expected: Sequence[ComponentResult] = ()

    @classmethod
    def of(cls, components: Iterable[ComponentResult], grid: Grid) -> Counted:
        """Those of all components that are counted."""
        wanted = [component for component in components if component.curve.source.in_total]
        expected = [one for one in wanted if one.is_known or not one.curve.only_zero]  # else off
        counted = [component for component in expected if component.is_counted]
        curves = [component.curve for component in counted]
        energies_j = [grid.pick(curve.energy_j, grid.seconds_ns) for curve in curves]
        return cls(counted, likeness(curves, energies_j), expected)

    def partial(self, grid: Grid, begins_ns: Ints, ends_ns: Ints) -> list[dict[str, Any]]:
        """Which components' energy is missing in some windows, and for how long, s.

        A sum over these windows is then less than the truth, and nobody knows by how much.
        """
        least_s = _LEAST_MISSING * float(np.sum(ends_ns - begins_ns)) * 1e-9
        missing = {c.curve.source.id: c.missing_s(grid, begins_ns, ends_ns) for c in self.expected}
        return [{"id": ident, "missing_s": s} for ident, s in missing.items() if s > least_s]

    def u_j(self, grid: Grid, begins_ns: Ints, ends_ns: Ints) -> float | None:
        """u (k = 2) of what they have in some windows together; None if partial or of none."""
        if self.partial(grid, begins_ns, ends_ns):
            return None
        budgets = [c.budget(grid, begins_ns, ends_ns) for c in self.components]
        return 2 * combined_u_j(budgets, self.alike) if budgets else None


_FIGURES = (
    *("device_j", "job_j", "others_j", "idle_j", "idle_w", "job_idle_j"),
    *("u_j", "mean_w", "max_w", "trace_w", "budget", "cross_check"),
)
"""The keys of a component whose values are unknown if its energy is."""


def mean_powers_w(
    curve: EnergyCurve,
    grid: Grid,
    edges_ns: Ints,
    so_far_j: Floats,
    *,
    within_ns: tuple[float, float] = (-math.inf, math.inf),
) -> Floats:
    """The mean power between edges on the grid (n + 1,), as finely as the readings support, (n,).

    The uncertain times of two refreshes make an interval between them look longer or shorter. So
    steps that are too short for a counter have the mean of as many of them as are long enough. Of
    each, the mean is that of its time `within_ns`.
    """
    kept = np.array(supported_edges(curve, grid, edges_ns))
    spans_s = np.diff(np.clip(edges_ns[kept], *within_ns)) * 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        power_w = np.diff(grid.pick(so_far_j, edges_ns[kept])) / spans_s
    return np.asarray(np.repeat(power_w, np.diff(kept)))


def supported_edges(curve: EnergyCurve, grid: Grid, edges_ns: Ints) -> list[int]:
    """Which edges are _STEP_REFRESHES apart, and so far that power is sure to _STEP_U (k = 2)."""
    last = len(edges_ns) - 1
    if curve.inside is None:
        return list(range(last + 1))
    u_ns = (
        np.maximum(curve.inside.refresh_u_s[:, grid.places(edges_ns)].max(axis=0), 0.0) * NS_PER_S
    )
    least_ns = _STEP_REFRESHES * curve.refresh_s * NS_PER_S
    unsure_ns = 2 / _STEP_U * np.hypot(u_ns[:-1], u_ns[1:])
    if bool((np.diff(edges_ns) >= np.maximum(least_ns, unsure_ns)).all()):
        return list(range(last + 1))  # of a long run in seconds: the loop would take seconds
    kept = [0]
    times_ns, unsures_ns = edges_ns.tolist(), (2 / _STEP_U * u_ns).tolist()
    for edge in range(1, last + 1):
        both_ns = math.hypot(unsures_ns[kept[-1]], unsures_ns[edge])
        if times_ns[edge] - times_ns[kept[-1]] >= max(least_ns, both_ns):
            kept.append(edge)
    if kept[-1] != last:  # the rest is too short to stand alone
        kept = [*kept[:-1], last] if len(kept) > 1 else [0, last]
    return kept


def _or_none(power_w: Floats) -> list[float | None]:
    return [float(watts) if math.isfinite(watts) else None for watts in power_w]
