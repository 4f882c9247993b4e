"""One component of a run: its energy, its shares, its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.sharing import Shares
from pepr_profiler.energy.uncertainty import CrossCheck, UncertaintyBudget, budget
from pepr_profiler.record import Record
from pepr_profiler.trace.events import Phase

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRACE_BUCKETS = 48
"""Points of the power-over-time line in a summary."""

_STEPS, _SHORTEST_STEP_S = 480, 0.05
"""Steps of a timeline: two pixels of a page each, unless the run is short."""

_MOST_SECONDS = 1 << 22
"""From 48 days on, the seconds of a run are looked at as that many longer steps."""


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


class ComponentResult(Record):
    """One component with its shares, and what another sensor of the same device says.

    `scope` says what of it is counted: "job", the job's share, or "device", all.
    """

    curve: EnergyCurve
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
    ) -> UncertaintyBudget:
        """The budget of what is counted in some windows whose edges are on the grid."""
        begins, ends = grid.where(begins_ns), grid.where(ends_ns)
        energy_j = float(np.sum(self.counting_j[ends] - self.counting_j[begins]))
        of_device = budget(self.curve, grid.at_ns, begins, ends, energy_j=energy_j)
        if self.scope != "job":
            return of_device
        duration_s = float(np.sum(ends_ns - begins_ns)) * 1e-9
        u_j = self.shares.u_j(energy_j, duration_s=duration_s, windows=len(begins))
        return of_device._replace(attribution_j=u_j)

    def whole(self, grid: _Grid) -> UncertaintyBudget:
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


def _power_w(energy_j: NDArray[np.float64], at_ns: NDArray[np.int64]) -> list[float | None]:
    span_s = np.diff(at_ns) * 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        power_w = np.diff(energy_j) / span_s
    return [float(watts) if math.isfinite(watts) else None for watts in power_w]


def _largest(*values: float | None) -> Any:
    known = [value for value in values if value is not None]
    return max(known) if known else None
