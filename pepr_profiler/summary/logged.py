"""What a run logged: its metrics, when they were logged, and what the run had cost by then."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pepr_profiler.record import Ints, Record
from pepr_profiler.summary.component import Counted, Grid

COUNTERS = ("epoch", "step")
"""They say when a metric was logged, and are no metrics themselves."""

_LOSS = re.compile(r"(^|[^a-z])loss($|[^a-z])", re.IGNORECASE)

_MOST_POINTS = 200
"""Instants that are kept of a run: what a figure can show, in 20 kB of run.json."""


def of_lowest_rank(
    logged: Sequence[tuple[int, dict[str, Any]]], ranks: Sequence[int | None]
) -> list[tuple[int, dict[str, Any]]]:
    """Of each metric that several ranks logged, what the lowest of them did, in the same order.

    A process without a rank counts as rank 0: the first one of Lightning, or a user's correction.
    """
    if not any(ranks):
        return list(logged)
    lowest: dict[str, int] = {}
    for (_, values), rank in zip(logged, ranks, strict=True):
        for name in values:
            lowest[name] = min(lowest.get(name, rank or 0), rank or 0)
    kept = [
        (t_ns, {name: value for name, value in values.items() if lowest[name] == (rank or 0)})
        for (t_ns, values), rank in zip(logged, ranks, strict=True)
    ]
    return [(t_ns, values) for t_ns, values in kept if values]


def last_values(logged: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, float | None]:
    """The last value of each metric; None for one that is not a finite number."""
    last: dict[str, Any] = {}
    for _, values in logged:
        last.update(values)
    return {name: _finite(value) for name, value in last.items()}


def is_performance(name: str) -> bool:
    """Whether a metric may be a performance as it is: no counter, and no loss, of which less is
    better.
    """
    return name not in COUNTERS and _LOSS.search(name) is None


def performance_of(
    metrics: Mapping[str, float | None], wanted: str | None
) -> dict[str, Any] | None:
    """The metric that the score is about: the one that was asked for, or the only one there is."""
    names = [wanted] if wanted else [name for name in metrics if name not in COUNTERS]
    if len(names) != 1 or metrics.get(names[0]) is None:
        return None
    if not wanted and not is_performance(names[0]):
        return None
    return {"metric": names[0], "value": metrics[names[0]]}


def progress_of(log: MetricLog, counted: Counted, grid: Grid) -> dict[str, Any] | None:
    """Time and energy from the begin to each instant of the log, and its metrics; None of none."""
    if not log.rows:
        return None
    at_ns, begin_ns = log.at_ns, grid.at_ns[:1]
    known = counted.components and not counted.partial(grid, begin_ns, grid.at_ns[-1:])
    energies_j = [grid.pick(component.counted_so_far_j, at_ns) for component in counted.components]
    return {
        "t_s": [float(t_s) for t_s in (at_ns - begin_ns) * 1e-9],
        "energy_j": [math.fsum(at) for at in zip(*energies_j, strict=True)] if known else None,
        "u_j": [counted.u_j(grid, begin_ns, at_ns[i : i + 1]) for i in range(len(at_ns))]
        if known
        else None,
        "metrics": log.columns(),
        "left_out": log.left_out,
    }


class MetricLog(Record):
    """Instants `at_ns` (n,) at which metrics were logged, in time order, with their values `rows`.

    A row holds finite numbers, and the epoch and step that held then. Of more than _MOST_POINTS
    instants some are `left_out`.
    """

    at_ns: Ints
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
    ) -> MetricLog:
        """What was logged (in time order) in a window; what came later at its end, unless `cut`.

        The last lines of a program are read after its end, and metrics may be set after it.
        """
        counters: dict[str, float] = {}
        by_instant: dict[int, dict[str, float]] = {}
        for t_ns, values in logged:
            if t_ns < begin_ns or (cut and t_ns > end_ns):
                continue
            known = {name: x for name, value in values.items() if (x := _finite(value)) is not None}
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
    """Which rows are kept, _MOST_POINTS at most, shared among the metrics; the rarest choose first.

    Of a metric's rows in one epoch the last is kept. Where these are too many: the last, the
    highest, the lowest and the first, and others evenly between.
    """
    rows_of: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for name in row.keys() - COUNTERS:
            own = rows_of.setdefault(name, [])
            epoch = row.get("epoch")
            if own and epoch is not None and rows[own[-1]].get("epoch") == epoch:
                own[-1] = index
            else:
                own.append(index)
    chosen: set[int] = set()
    rarest_first = sorted(rows_of.items(), key=lambda item: (len(item[1]), item[0]))
    for number, (name, own) in enumerate(rarest_first):
        room = (_MOST_POINTS - len(chosen)) // (len(rarest_first) - number)
        if len(set(own) - chosen) <= room:
            chosen.update(own)
            continue
        values = [rows[i][name] for i in own]
        ends = (len(own) - 1, int(np.argmax(values)), int(np.argmin(values)), 0)
        between = np.linspace(0, len(own) - 1, max(0, room - len(ends))).astype(int)
        picks = dict.fromkeys([*ends, *(int(i) for i in between)])
        chosen.update([own[i] for i in picks][:room])
    return chosen


def _finite(value: Any) -> float | None:
    """A finite number as float; None for all else."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        return None
    return number if math.isfinite(number) else None
