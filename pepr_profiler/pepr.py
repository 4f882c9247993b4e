"""PePR: was the performance worth its resource? Scores, bounds, Pareto front and uncertainty.

PePR = P / (1 + R) with R = (r - r_min) / (r_max - r_min) over a cohort: Selvan, Pepin, Igel,
Samuel, Dam, "PePR: Performance per resource unit as a metric to promote small-scale deep learning",
NLDL 2025, arXiv 2403.12562. P lies in [0, 1], higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pepr_profiler.errors import UsageError

Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Bounds: TypeAlias = tuple[float, float]

# How a lower-is-better metric becomes a performance: an error rate in [0, 1] as 1 - x; a loss in
# [0, inf) as exp(-x), which for a mean cross-entropy is the geometric mean of the likelihoods.
TRANSFORMS: Mapping[str, Callable[[Floats], Floats]] = {
    "one-minus": lambda x: np.subtract(1.0, x),
    "exp-neg": lambda x: np.exp(np.negative(x)),
}

_NAMED = 5  # offending rows that an error spells out before it only counts


@dataclass(frozen=True, eq=False)
class Scores:
    """PePR scores of a cohort of n rows; every array is (n,), in the order of the input.

    `bounds` are (r_min, r_max) in the resource's unit; `clamped` marks the resources outside fixed
    bounds, whose `r_norm` was pinned to 0 or 1.
    """

    pepr: Floats
    r_norm: Floats
    bounds: Bounds
    clamped: Mask


@dataclass(frozen=True, eq=False)
class Cohort:
    """Runs that may be compared: arrays are (n,), `left_out` says (run, reason).

    `u_resource` has k = 2 and is NaN where it is unknown; `u_shared` (m, n), in it, is what errors
    of a device that several runs used do to each of them (see `uncertainty`).
    """

    names: tuple[str, ...]
    run_ids: tuple[str, ...]
    metric: str
    performance: Floats
    resource: Floats
    u_resource: Floats
    u_shared: Floats
    resource_name: str
    unit: str
    left_out: tuple[tuple[str, str], ...]

    @property
    def u_own(self) -> Floats:
        """What of `u_resource` is each run's own, (n,)."""
        own: Floats = np.sqrt(np.maximum(self.u_resource**2 - np.sum(self.u_shared**2, axis=0), 0))
        return own

    @property
    def u_known(self) -> bool:
        """Whether any run's resource has an uncertainty."""
        return not bool(np.isnan(self.u_resource).all())


def as_performance(
    values: npt.ArrayLike, *, percent: bool = False, transform: str | None = None
) -> Floats:
    """Performance as PePR needs it, in [0, 1] and higher is better, by the user's declaration only.

    `percent` divides by 100, before the transform; `transform` is a key of TRANSFORMS.
    """
    performance = np.asarray(values, dtype=np.float64)
    if percent:
        performance = performance / 100.0
    return performance if transform is None else TRANSFORMS[transform](performance)


def score(
    performance: npt.ArrayLike,
    resource: npt.ArrayLike,
    *,
    bounds: Bounds | None = None,
    names: Sequence[str] | None = None,
) -> Scores:
    """The PePR score of every row, with bounds from the cohort or as given.

    `performance` and `resource` are (n,); `names` (n,) only word the errors. UsageError for lengths
    that differ, no rows, a performance outside [0, 1], a resource that is negative or not finite,
    bounds that do not rise, and without bounds a cohort whose resources are all equal (0/0).
    """
    p, r = _checked(performance, resource, names)
    if bounds is None:
        low, high = float(r.min()), float(r.max())
        if low == high:
            raise UsageError(
                "one row is no cohort" if len(r) == 1 else "all resources are equal",
                why=f"r_min = r_max = {low:g}, so R = (r - r_min) / (r_max - r_min) is 0/0",
                fix="add rows that cost more or less, or fix the bounds: --bounds MIN:MAX",
            )
    else:
        low, high = bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(
                f"the bounds {low:g}:{high:g} span nothing",
                why="MIN and MAX must be finite, and MIN below MAX",
                fix="write for example --bounds 151k:1.94M",
            )
    r_norm = np.clip((r - low) / (high - low), 0.0, 1.0)
    return Scores(
        pepr=p / (1.0 + r_norm),
        r_norm=r_norm,
        bounds=(low, high),
        clamped=(r < low) | (r > high),
    )


def rank(scores: Scores) -> npt.NDArray[np.intp]:
    """The row numbers (n,) from the best score to the worst; equal scores keep their order."""
    order: npt.NDArray[np.intp] = np.argsort(-scores.pepr, kind="stable")
    return order


def pareto_front(performance: npt.ArrayLike, resource: npt.ArrayLike) -> Mask:
    """Which rows (n,) no other row beats: performance as high, resource as low, one of them better.

    Rows that are equal in both do not beat each other: they are on the front together.
    """
    p, r = np.asarray(performance, dtype=np.float64), np.asarray(resource, dtype=np.float64)
    order = np.lexsort((-p, r))
    p_sorted, r_sorted = p[order], r[order]
    # Rows of one resource form a group, its best performance first. On the front is who has that
    # best, where it exceeds the best of all cheaper groups. O(n log n).
    first = np.searchsorted(r_sorted, r_sorted, side="left")
    best_so_far = np.concatenate(([-np.inf], np.maximum.accumulate(p_sorted)))
    front = np.empty(len(p), dtype=np.bool_)
    front[order] = (p_sorted == p_sorted[first]) & (p_sorted > best_so_far[first])
    return front


def uncertainty(
    performance: npt.ArrayLike,
    resource: npt.ArrayLike,
    u_resource: npt.ArrayLike,
    bounds: Bounds | None,
    *,
    u_performance: npt.ArrayLike | None = None,
    shared: npt.ArrayLike = (),
) -> Floats:
    """u of every row's PePR (n,), with the k of the u that go in; `bounds` None: the cohort's own.

    `u_resource` (n,) holds what is each row's own. `shared` (m, n) holds errors that rows have in
    common, one a line: how much each resource moves, all at once, when that error is one u. The
    gain of a power sensor moves every energy measured with it in proportion; in a cohort's own
    bounds such an error cancels. First-order propagation (GUM 5.1.2); with s = r_max - r_min:

        u(PePR)^2 = (P u(R) / (1 + R)^2)^2 + (u(P) / (1 + R))^2
        u(R)^2    = (u(r)^2 + sum c^2) / s^2                                      fixed bounds
        u(R)^2    = (u(r)^2 + (1 - R)^2 u(r_min)^2 + R^2 u(r_max)^2
                     + sum (c - (1 - R) c_min - R c_max)^2) / s^2                 cohort's bounds

    A row that is pinned has u(R) = 0: outside fixed bounds, or the very row that sets a bound of
    the cohort (its R is 0 or 1 whatever its resource is). Of rows that tie for a bound, the first
    sets it. A resource whose u is NaN (unknown) makes the scores that depend on it NaN. First order
    holds while s and the distance of the runner-up to each bound are several u(r).
    """
    p, r = _checked(performance, resource, None)
    u_r = np.broadcast_to(np.asarray(u_resource, dtype=np.float64), r.shape)
    common = np.asarray(shared, dtype=np.float64).reshape(-1, len(r))
    scores = score(p, r, bounds=bounds)
    low, high = scores.bounds
    if bounds is None:
        at_low, at_high = int(r.argmin()), int(r.argmax())
        from_low, from_high = 1.0 - scores.r_norm, scores.r_norm
        variance = u_r**2 + (from_low * u_r[at_low]) ** 2 + (from_high * u_r[at_high]) ** 2
        common = common - from_low * common[:, [at_low]] - from_high * common[:, [at_high]]
        variance[[at_low, at_high]] = 0.0
    else:
        variance = np.where(scores.clamped, 0.0, u_r**2)
        common = np.where(scores.clamped, 0.0, common)
    u_norm = np.sqrt(variance + np.sum(common**2, axis=0)) / (high - low)
    u_p = np.zeros_like(p) if u_performance is None else np.asarray(u_performance, np.float64)
    denominator = 1.0 + scores.r_norm
    u_pepr: Floats = np.hypot(p * u_norm / denominator**2, u_p / denominator)
    return u_pepr


def out_of_proportion(
    resource: npt.ArrayLike, companion: npt.ArrayLike, *, jump: float = 3.0
) -> Mask | None:
    """Rows (n,) whose resource is not in the others' proportion to `companion`, or None.

    For two resources that grow together (energy and time: their ratio is a mean power), faulty
    readings stand apart: the sorted ratios of the rows have a jump of `jump` or more. The side with
    fewer rows is returned, if the other has at least 8 and there the two really grow together
    (correlation of the logarithms 0.8 or more). A hint for a person to look at, not a proof. The
    jump is a judgement: in the paper's tables good rows stay below 2.3, and 35 wrong energies of
    pneumonia_small, 10 times the power of the server, make one of 9.
    """
    a, b = np.asarray(resource, dtype=np.float64), np.asarray(companion, dtype=np.float64)
    if len(a) < 9 or not ((a > 0).all() and (b > 0).all()):
        return None
    ratio = np.log(a / b)
    order = np.argsort(ratio, kind="stable")
    gaps = np.diff(ratio[order])
    cut = int(gaps.argmax()) + 1
    if gaps[cut - 1] < math.log(jump):
        return None
    few, many = sorted((order[:cut], order[cut:]), key=len)
    x, y = np.log(a[many]), np.log(b[many])
    if len(many) < 8 or x.std() == 0 or y.std() == 0 or np.corrcoef(x, y)[0, 1] < 0.8:
        return None
    mask = np.zeros(len(a), dtype=np.bool_)
    mask[few] = True
    return mask


def cohort_of_runs(
    summaries: Iterable[Mapping[str, Any]],
    *,
    resource: str = "energy",
    metric: str | None = None,
    mix_provenance: bool = False,
) -> Cohort:
    """Summaries of runs as the arrays that `score` takes; performance as the run logged it.

    Runs that failed or are incomplete are left out and named. UsageError for a run without the
    metric or the resource, for runs whose own performance is not the same metric, for measured
    beside modelled energy (unless `mix_provenance`), and when nothing is left.
    """
    runs: list[Mapping[str, Any]] = []
    left_out: list[tuple[str, str]] = []
    for run in summaries:
        if not run["complete"]:
            left_out.append((_who(run), "incomplete: it was killed or still runs"))
        elif run["exit_code"]:
            left_out.append((_who(run), f"failed with exit status {run['exit_code']}"))
        else:
            runs.append(run)
    if not runs:
        raise UsageError(
            "there is no run to compare",
            why="; ".join(f"{who} {reason}" for who, reason in left_out[:_NAMED])
            or "none was found",
            fix="record one: pepr-profile --experiment NAME -- CMD (see: pepr-profile runs list)",
        )
    metric, performance = _performances(runs, metric)
    if resource in ("energy", "carbon") and not mix_provenance:
        _same_provenance(runs)
    name, unit, values, u = _resources(runs, resource)
    shared = (
        _shared_errors_j(runs) if resource in ("energy", "carbon") else np.empty((0, len(runs)))
    )
    if resource == "carbon":
        shared *= [_ratio(g, run["energy"]["total_j"]) for g, run in zip(values, runs, strict=True)]
    return Cohort(
        names=tuple(str(run["name"]) for run in runs),
        run_ids=tuple(str(run["run_id"]) for run in runs),
        metric=metric,
        performance=np.array(performance, dtype=np.float64),
        resource=np.array(values, dtype=np.float64),
        u_resource=np.array(u, dtype=np.float64),
        u_shared=shared,
        resource_name=name,
        unit=unit,
        left_out=tuple(left_out),
    )


def _performances(runs: Sequence[Mapping[str, Any]], metric: str | None) -> tuple[str, list[float]]:
    """The metric's name and one value a run: the named metric, or the runs' own performance."""
    found: list[tuple[str, float] | None] = []
    for run in runs:
        own = run["performance"]
        if metric is not None and metric in run["metrics"]:
            found.append((metric, float(run["metrics"][metric])))
        elif own is not None and metric in (None, own["metric"]):
            found.append((str(own["metric"]), float(own["value"])))
        else:
            found.append(None)
    without = [run for run, value in zip(runs, found, strict=True) if value is None]
    if without:
        known = sorted({name for run in runs for name in run["metrics"]})
        first = without[0]["run_id"]
        others = f"; or --metric with one of: {', '.join(known)}" if known else ""
        raise UsageError(
            f"no {metric or 'performance'} is known of {_listed([_who(run) for run in without])}",
            why="a score needs the performance of every run of the cohort",
            fix=f"pepr-profile runs set {first} {metric or 'accuracy'}=0.91{others}; "
            "or name the runs to compare: pepr-profile compare RUN RUN",
        )
    values = [value for value in found if value is not None]
    names = sorted({name for name, _ in values})
    if len(names) > 1:
        raise UsageError(
            "the runs' performances are not the same metric",
            why=f"they are {', '.join(names)}",
            fix=f"say which one to compare: --metric {names[0]}",
        )
    return names[0], [value for _, value in values]


def _same_provenance(runs: Sequence[Mapping[str, Any]]) -> None:
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(str(run["energy"]["provenance"]), []).append(_who(run))
    if len(groups) > 1:
        raise UsageError(
            f"{' and '.join(sorted(groups))} energies are not comparable",
            why="; ".join(f"{kind}: {_listed(names)}" for kind, names in sorted(groups.items())),
            fix="compare runs of one kind by naming them, or ask for it: --mix-provenance",
        )


def _resources(
    runs: Sequence[Mapping[str, Any]], resource: str
) -> tuple[str, str, list[float], list[float]]:
    """The resource's name and unit, and value and u (k = 2, NaN: unknown) of every run."""
    unknown = [math.nan] * len(runs)
    energy = [run["energy"] for run in runs]
    if resource == "energy":
        total = [e["total_j"] for e in energy]
        _require(runs, total, what="energy", fix="pepr-profile sensors says what can be measured")
        return "energy", "J", total, [_or_nan(e["u_j"]) for e in energy]
    if resource == "carbon":
        carbon = [run["carbon"] and run["carbon"]["g_co2e"] for run in runs]
        _require(
            runs,
            carbon,
            what="carbon",
            fix="profile with --region CODE or --carbon-intensity G_PER_KWH, "
            "or rank by energy: --resource energy",
        )
        # Carbon is the energy times a constant: the relative u is the same.
        relative = [_ratio(e["u_j"], e["total_j"]) for e in energy]
        return "carbon", "g", carbon, [g * u for g, u in zip(carbon, relative, strict=True)]
    if resource == "time":
        return "time", "s", [run["time_s"] for run in runs], unknown
    gpu = [run["memory"]["gpu_peak_bytes"] for run in runs]
    if all(gpu):
        return "GPU memory", "B", gpu, unknown
    rss = [run["memory"]["peak_rss_bytes"] for run in runs]
    _require(
        runs,
        rss,
        what="peak memory",
        fix="profile again with the processes sensor, or rank by energy: --resource energy",
    )
    return "peak RSS", "B", rss, unknown


_SHARED = {"gain_j": 1.0, "offset_j": 1.0, "model_j": 0.5}
"""Causes of error that all runs on a device share, and how much of their variance. A sensor's gain
and offset are fixed for its board; a power model is off by a part that is the machine's and a part
that depends on the load (half each: a judgement)."""


def _shared_errors_j(runs: Sequence[Mapping[str, Any]]) -> Floats:
    """One line (n,) a device and cause: what one u (k = 2) of that error does to each run, J."""
    lines: dict[tuple[str, str, str], list[float]] = {}
    for index, run in enumerate(runs):
        for component in run["energy"].get("components") or ():
            budget = component.get("budget")
            if not component["in_total"] or not budget:
                continue  # recorded by an older version: all of its u counts as the run's own
            for cause, part in _SHARED.items():
                key = (str(run.get("host")), component["id"], cause)
                line = lines.setdefault(key, [0.0] * len(runs))
                line[index] = 2 * math.sqrt(part) * budget[cause]
    return np.array(list(lines.values()), dtype=np.float64).reshape(-1, len(runs))


def _ratio(value: float | None, total: float | None) -> float:
    return _or_nan(value) / total if total else math.nan


def _require(
    runs: Sequence[Mapping[str, Any]], values: Sequence[float | None], *, what: str, fix: str
) -> None:
    """UsageError that names the runs whose value is unknown (None, or NaN)."""
    lacking = [
        _who(run) for run, value in zip(runs, values, strict=True) if math.isnan(_or_nan(value))
    ]
    if lacking:
        raise UsageError(
            f"no {what} is known of {_listed(lacking)}",
            why="an unknown resource is not 0, and the cohort's bounds depend on every run",
            fix=fix,
        )


def _checked(
    performance: npt.ArrayLike, resource: npt.ArrayLike, names: Sequence[str] | None
) -> tuple[Floats, Floats]:
    p, r = np.asarray(performance, dtype=np.float64), np.asarray(resource, dtype=np.float64)
    if p.ndim != 1 or p.shape != r.shape:
        raise UsageError(
            "performance and resource do not belong together",
            why=f"their shapes are {p.shape} and {r.shape}",
            fix="give two columns of the same length",
        )
    if not len(p):
        raise UsageError("there is nothing to score", why="the cohort is empty", fix="add rows")
    bad = ~((p >= 0) & (p <= 1))
    if bad.any():
        raise UsageError(
            f"performance outside [0, 1] in {_rows(bad, p, names)}",
            why="PePR is defined for a performance from 0 to 1, higher is better",
            fix="--percent if it is in percent; --transform one-minus|exp-neg if lower is better",
        )
    bad = ~(np.isfinite(r) & (r >= 0))
    if bad.any():
        raise UsageError(
            f"resource negative or not finite in {_rows(bad, r, names)}",
            why="a resource is an amount: 0 or more; an unknown one cannot be scored",
            fix="correct these rows or leave them out",
        )
    return p, r


def _rows(bad: Mask, values: Floats, names: Sequence[str] | None) -> str:
    rows = np.flatnonzero(bad)
    return _listed(
        [f"{names[i] if names else f'row {i + 1}'} ({values[i]:g})" for i in rows[:_NAMED]],
        total=len(rows),
    )


def _listed(items: Sequence[str], *, total: int | None = None) -> str:
    total = len(items) if total is None else total
    more = f" and {total - _NAMED} more" if total > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more


def _who(run: Mapping[str, Any]) -> str:
    name, run_id = str(run["name"]), str(run["run_id"])
    return run_id if run_id.startswith(name) else f"{name} ({run_id})"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
