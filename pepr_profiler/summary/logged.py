"""What a run logged: metrics, and the instants at which they were logged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.record import Record
from pepr_profiler.summary.component import ComponentResult, _Grid

if TYPE_CHECKING:
    import numpy.typing as npt


def _progress(
    logged: Logged, counted: Sequence[ComponentResult], grid: _Grid
) -> dict[str, Any] | None:
    """What is counted from the beginning to the instants that were logged at; None: to none."""
    if not logged.rows:
        return None
    at_ns, begin_ns = logged.at_ns, grid.at_ns[:1]
    energies_j = [grid.pick(part.counting_j, at_ns) for part in counted]
    us_j = [
        2 * math.hypot(*(part.budget(grid, begin_ns, at_ns[i : i + 1]).u_j for part in counted))
        for i in range(len(at_ns))
    ]
    return {
        "t_s": [float(t) for t in (at_ns - begin_ns) * 1e-9],
        "energy_j": [math.fsum(at) for at in zip(*energies_j, strict=True)] or None,
        "u_j": us_j if counted else None,
        "metrics": logged.columns(),
        "left_out": logged.left_out,
    }


def _metrics(logged: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, float | None]:
    """The last value of each metric; None for one that is no finite number."""
    last: dict[str, Any] = {}
    for _, values in logged:
        last.update(values)
    return {name: finite(value) for name, value in last.items()}


def _performance(metrics: Mapping[str, float | None], wanted: str | None) -> dict[str, Any] | None:
    """The metric that the score is about: the one asked for, or the only one there is."""
    names = [wanted] if wanted else [n for n in metrics if n not in COUNTERS]
    if len(names) != 1 or metrics.get(names[0]) is None:
        return None
    return {"metric": names[0], "value": metrics[names[0]]}


COUNTERS = ("epoch", "step")
"""What says when a metric was logged, and is none itself."""


_MOST_POINTS = 200
"""Instants that are kept of a run: what a figure can show, in 20 kB of run.json."""


class Logged(Record):
    """Instants `at_ns` (n,) at which metrics were logged, in time order, and what: finite numbers.

    With each stand the epoch and the step that held then. Instants beyond _MOST_POINTS are
    `left_out`.
    """

    at_ns: npt.NDArray[np.int64]
    rows: tuple[Mapping[str, float], ...]
    left_out: int

    @classmethod
    def within(
        cls,
        logged: Iterable[tuple[int, Mapping[str, Any]]],
        begin_ns: int,
        end_ns: int,
        *,
        cut: bool,
    ) -> Logged:
        """What was logged (in time order) in a window; what came later at its end, unless `cut`.

        The last lines of a program are read after its end, and metrics may be set after it.
        """
        counters: dict[str, float] = {}
        by_instant: dict[int, dict[str, float]] = {}
        for t_ns, values in logged:
            if t_ns < begin_ns or (cut and t_ns > end_ns):
                continue
            known = {name: x for name, value in values.items() if (x := finite(value)) is not None}
            counters.update((name, known[name]) for name in COUNTERS if name in known)
            row = by_instant.setdefault(min(t_ns, end_ns), {})
            row.update(counters)
            row.update(known)
        instants = [(t_ns, row) for t_ns, row in by_instant.items() if row.keys() - COUNTERS]
        kept = sorted(_chosen([row for _, row in instants]))
        return cls(
            at_ns=np.array([instants[i][0] for i in kept], dtype=np.int64),
            rows=tuple(instants[i][1] for i in kept),
            left_out=len(instants) - len(kept),
        )

    def columns(self) -> dict[str, list[float | None]]:
        """A list (n,) for each metric, None where it was not logged."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return {name: [row.get(name) for row in self.rows] for name in names}


def _chosen(rows: Sequence[Mapping[str, float]]) -> set[int]:
    """Which rows stay, _MOST_POINTS at most, shared among the metrics; the rarest choose first.

    Of a metric's rows in one epoch the last stays. Where that is too many: the last, the highest,
    the lowest and the first, and others evenly between.
    """
    of_metric: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for name in row.keys() - COUNTERS:
            own = of_metric.setdefault(name, [])
            epoch = row.get("epoch")
            if own and epoch is not None and rows[own[-1]].get("epoch") == epoch:
                own[-1] = index
            else:
                own.append(index)
    chosen: set[int] = set()
    ranked = sorted(of_metric.items(), key=lambda item: (len(item[1]), item[0]))
    for number, (name, own) in enumerate(ranked):
        room = (_MOST_POINTS - len(chosen)) // (len(ranked) - number)
        if len(set(own) - chosen) <= room:
            chosen.update(own)
            continue
        values = [rows[i][name] for i in own]
        ends = (len(own) - 1, int(np.argmax(values)), int(np.argmin(values)), 0)
        between = np.linspace(0, len(own) - 1, max(0, room - len(ends))).astype(int)
        picks = dict.fromkeys([*ends, *(int(i) for i in between)])
        chosen.update([own[i] for i in picks][:room])
    return chosen


def finite(value: Any) -> float | None:
    """A finite number as float; None for all else."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        return None
    return number if math.isfinite(number) else None
