"""Performance against energy while a run goes on, and where it could have been stopped.

A summary has the instants at which metrics were logged, and the energy up to each (`progress`,
docs/design.md, Contract). A curve is one of these metrics. The PePR at a point of it is the score
that the run would have if it had been stopped there. Its bounds are those of a cohort, or 0 and the
energy of the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.record import Floats, Record
from pepr_profiler.summary.logged import COUNTERS

if TYPE_CHECKING:
    import numpy.typing as npt

    from pepr_profiler.study import pepr


class ProgressCurve(Record):
    """The performance of a run at each point where it was logged; arrays are (n,), by time, n >= 1.

    `t_s` and `energy_j` are counted from the beginning of the run, `u_j` is the uncertainty of the
    energy (k = 2), `total_j` the energy of the whole run. `epoch` is NaN where none was logged.
    """

    run_id: str
    name: str
    metric: str
    t_s: Floats
    energy_j: Floats
    u_j: Floats
    epoch: Floats
    performance: Floats
    total_j: float


class Stop(Record):
    """A point of a curve at which the run could have been stopped; `point` is its index.

    `performance_share` is the performance there over that at the last point, `best_share` over the
    best of the curve, `energy_share` the energy up to there over that of the whole run. `epoch` is
    None where none was logged. `first` and `last` are the first and the last point that the noise
    of the curve does not tell from this one, and `noise` the standard uncertainty of a point, 0
    where the curve is too short to tell.
    """

    point: int
    epoch: float | None
    t_s: float
    energy_j: float
    performance: float
    pepr: float
    performance_share: float
    best_share: float
    energy_share: float
    first: int
    last: int
    noise: float


class Envelope(Record):
    """The best performance that some curves reach with an energy, a step function; arrays are (m,).

    From `energy_j[i]` (included) to `energy_j[i + 1]` it is `performance[i]`, reached at the point
    `point[i]` of the curve `curve[i]`. With less than `energy_j[0]` no curve has a performance.
    `energy_j` and `performance` rise strictly.
    """

    energy_j: Floats
    performance: Floats
    curve: npt.NDArray[np.intp]
    point: npt.NDArray[np.intp]


def metric_of(summary: Mapping[str, Any]) -> str | None:
    """The metric that a run's curve is of by default: its performance, else the only one logged."""
    progress = summary.get("progress")
    if not progress:
        return None
    performance = summary.get("performance")
    if performance and performance["metric"] in progress["metrics"]:
        return str(performance["metric"])
    names = [name for name in progress["metrics"] if name not in COUNTERS]
    return str(names[0]) if len(names) == 1 else None


def curve_of(
    summary: Mapping[str, Any],
    *,
    metric: str | None = None,
    percent: bool = False,
    transform: str | None = None,
) -> ProgressCurve | None:
    """The curve of a run's `metric`; None if it has none, or if its energy is unknown.

    `percent` and `transform` as in `pepr.as_performance`. Values that are not finite are left out.
    If several values in a row are of one epoch, as of batches or of ranks that log the same, the
    last is the epoch's. An epoch that is run again after a restart is another point.
    """
    from pepr_profiler.study.pepr import as_performance  # most runs have no curve

    metric = metric or metric_of(summary)
    progress = summary.get("progress")
    if metric is None or not progress or metric not in progress["metrics"]:
        return None
    total_j = summary["energy"]["total_j"]
    if total_j is None or progress["energy_j"] is None:
        return None

    def column(values: Sequence[float | None]) -> Floats:
        return np.array([math.nan if v is None else v for v in values], dtype=np.float64)

    values = column(progress["metrics"][metric])
    epochs = progress["metrics"].get("epoch")
    epoch = np.full(len(values), math.nan) if epochs is None else column(epochs)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return None
    last = np.append(epoch[known][1:] != epoch[known][:-1], True)  # NaN differs from NaN
    rows = known[last]
    return ProgressCurve(
        run_id=str(summary.get("run_id") or ""),
        name=str(summary.get("name") or ""),
        metric=metric,
        t_s=column(progress["t_s"])[rows],
        energy_j=column(progress["energy_j"])[rows],
        u_j=column(progress["u_j"])[rows],
        epoch=epoch[rows],
        performance=as_performance(values[rows], percent=percent, transform=transform),
        total_j=float(total_j),
    )


def name_of(metric: str, transform: str | None) -> str:
    """The name of a metric after a transform of `pepr.TRANSFORMS`, such as "1 - error"."""
    return {"one-minus": "1 - {}", "exp-neg": "exp(-{})"}.get(transform or "", "{}").format(metric)


def curve_shown(summary: Mapping[str, Any]) -> ProgressCurve | None:
    """The curve of a run to show: two points or more, all of them in [0, 1]; None if it has none.

    It is that of the run's performance. If that was logged only once, as `accuracy` at the end, it
    is that of a metric whose name ends so, as `val_accuracy` of each epoch.
    """
    logged = (summary.get("progress") or {}).get("metrics") or {}
    own = metric_of(summary)
    named = str((summary.get("performance") or {}).get("metric") or "\0")
    for metric in dict.fromkeys([own, *(name for name in logged if str(name).endswith(named))]):
        curve = curve_of(summary, metric=metric) if metric is not None else None
        if curve is not None and len(curve.performance) > 1:
            low, high = float(curve.performance.min()), float(curve.performance.max())
            if low >= 0 and high <= 1:
                return curve
    return None


def scores_along(curve: ProgressCurve, bounds: pepr.MinMax | None = None) -> pepr.Scores:
    """The PePR that the run would have if it had been stopped at each point.

    `bounds` are those of a cohort, in J. By default R is the energy so far over that of the whole
    run. UsageError for a performance outside [0, 1], and for a run that took no energy.
    """
    from pepr_profiler.study.pepr import score

    return score(
        curve.performance,
        curve.energy_j,
        bounds=bounds or (0.0, curve.total_j),
        names=[f"point {i + 1} of {curve.run_id}" for i in range(len(curve.t_s))],
    )


def best_stop(
    curve: ProgressCurve, bounds: pepr.MinMax | None = None, *, noise: float | None = None
) -> Stop | None:
    """The point of the highest PePR along a curve, the first of equals; see `scores_along`.

    `noise` is the standard uncertainty of a point, by default what the curve itself shows
    (`noise_of`); `mean_curve` gives that of repeats. Of points that the noise does not tell from
    the highest, the one is taken that is highest on the smoothed curve. None where stopping would
    gain less than the noise (k = 2): no point stands out then.
    """
    scores = scores_along(curve, bounds)
    sd = noise_of(curve.performance) if noise is None else noise
    per_p = 1.0 / (1.0 + scores.r_norm)
    top = int(scores.pepr.argmax())
    u = 2.0 * sd * np.hypot(per_p, per_p[top])
    near = np.flatnonzero(scores.pepr >= scores.pepr[top] - u)
    smooth = _smoothed(curve.performance) * per_p if sd > 0 and noise is None else scores.pepr
    best = int(near[smooth[near].argmax()])
    end = len(curve.t_s) - 1
    if best != end and smooth[best] - smooth[end] < u[end]:
        return None
    performance = float(curve.performance[best])
    final, highest = float(curve.performance[-1]), float(curve.performance.max())
    return Stop(
        point=best,
        epoch=None if math.isnan(curve.epoch[best]) else float(curve.epoch[best]),
        t_s=float(curve.t_s[best]),
        energy_j=float(curve.energy_j[best]),
        performance=performance,
        pepr=float(scores.pepr[best]),
        performance_share=performance / final if final else math.nan,
        best_share=performance / highest if highest else math.nan,
        energy_share=float(curve.energy_j[best]) / curve.total_j,
        first=int(near[0]),
        last=int(near[-1]),
        noise=sd,
    )


_LEAST_POINTS = 8
"""Of a shorter curve nobody can say what is noise and what is learning."""


def noise_of(performance: Floats) -> float:
    """The standard deviation of a curve's points around what changes slowly; 0 if it is short.

    From third differences, which have 20 times the variance of a point, and of a curve that
    flattens next to nothing else. Their median, as a drop of the learning rate is no noise.
    """
    if len(performance) < _LEAST_POINTS:
        return 0.0
    return float(np.median(np.abs(np.diff(performance, 3)))) / (0.6745 * math.sqrt(20.0))


def _smoothed(values: Floats) -> Floats:
    """The means of five points, of fewer at the ends."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    reach = np.minimum(2, np.minimum(at, at[::-1]))
    return np.asarray((sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1))


def mean_curve(curves: Sequence[ProgressCurve]) -> tuple[ProgressCurve, float]:
    """The mean of repeats point by point, as long as the shortest, and the noise of its points.

    The noise is the scatter of the repeats, over the root of their number; of one curve its own.
    """
    n = min(len(curve.t_s) for curve in curves)

    def mean(name: str) -> Floats:
        return np.asarray(np.mean([getattr(curve, name)[:n] for curve in curves], axis=0))

    curve = curves[0]._replace(
        t_s=mean("t_s"),
        energy_j=mean("energy_j"),
        u_j=mean("u_j"),
        epoch=mean("epoch"),
        performance=mean("performance"),
        total_j=float(np.mean([curve.total_j for curve in curves])),
    )
    if len(curves) == 1:
        return curve, noise_of(curve.performance)
    scatter = np.var([each.performance[:n] for each in curves], axis=0, ddof=1)
    return curve, math.sqrt(float(scatter.mean()) / len(curves))


def envelope(curves: Sequence[ProgressCurve]) -> Envelope:
    """The best performance that any of the curves reaches with each energy.

    Of points that are equal in both, that of the first curve counts. O(n log n) in all points.
    """
    if not curves:
        none = np.empty(0)
        nowhere = np.empty(0, dtype=np.intp)
        return Envelope(energy_j=none, performance=none, curve=nowhere, point=nowhere)
    energy_j = np.concatenate([curve.energy_j for curve in curves])
    performance = np.concatenate([curve.performance for curve in curves])
    number = np.repeat(np.arange(len(curves)), [len(curve.t_s) for curve in curves])
    point = np.concatenate([np.arange(len(curve.t_s)) for curve in curves])
    order = np.lexsort((-performance, energy_j))  # stable: curves stay in their order
    best = np.maximum.accumulate(np.concatenate(([-np.inf], performance[order])))
    rows = order[performance[order] > best[:-1]]
    return Envelope(
        energy_j=energy_j[rows],
        performance=performance[rows],
        curve=number[rows],
        point=point[rows],
    )
