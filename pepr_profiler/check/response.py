"""How a sensor answers a load whose timing is known: refresh, averaging window, lag, watts. Pure.

The load is on and off for times of irregular length, so that its edges fall on all phases of a
sensor's refresh. A model of the sensor is fitted to what it showed: the load, averaged over a
window or smoothed exponentially, shifted by a delay, times watts, above an idle power that drifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pepr_profiler._core import MAX_PLAUSIBLE_W
from pepr_profiler.energy.readings import CounterReadings, GaugeReadings
from pepr_profiler.record import Floats, Record
from pepr_profiler.units import NS_PER_S

FEWEST_CHANGES = 12
"""From fewer changes of a value neither its refresh period nor its response is estimated."""

_EACH_READ = 0.7
"""A value that changes at more than this part of its reads may be refreshed more often still."""

_MOST_POINTS = 800
_CLUSTERS = 16
"""Residuals of one sixteenth of the time are taken to be correlated, those of two are not."""

_MANY = 60
"""So many spacings of nearly one length are a refresh each."""

_MULTIPLES = 8
"""Spacings of changes up to so many refresh periods say how long one is: clocks wander."""


class Figure(Record):
    """A number with its expanded uncertainty (k = 2), or why it is unknown.

    `at_most` is what an unknown number certainly does not exceed; None if that is unknown too.
    """

    value: float | None = None
    u: float | None = None
    why: str = ""
    at_most: float | None = None

    @property
    def is_known(self) -> bool:
        return self.value is not None

    def contains(self, value: float) -> bool:
        """Whether `value` lies within the uncertainty."""
        return self.value is not None and abs(self.value - value) <= (self.u or 0.0)


class Bursts(Record):
    """When a load ran, s, (n,) each, and how much of all that it could be; in time order."""

    begin_s: Floats
    end_s: Floats
    level: Floats

    def running_s(self, t_s: Floats) -> Floats:
        """The time for which the load has run at its full level up to instants."""
        if not len(self.begin_s):
            return np.zeros_like(t_s)
        edges = np.stack((self.begin_s, self.end_s), axis=1).ravel()
        ran = np.stack(
            (np.zeros(len(self.level)), self.level * (self.end_s - self.begin_s)), axis=1
        )
        return np.asarray(np.interp(t_s, edges, np.cumsum(ran.ravel())))

    def smoothed(self, t_s: Floats, tau_s: float) -> tuple[Floats, Floats]:
        """The load behind a low pass of time constant `tau_s`, and the integral of that, s."""
        edges = np.stack((self.begin_s, self.end_s), axis=1).ravel()
        onto = np.stack((self.level, np.zeros(len(self.level))), axis=1).ravel()
        if not len(edges):
            return np.zeros_like(t_s), np.zeros_like(t_s)
        # What it is, and its integral, at each edge: from there it decays onto the next level.
        at, total = [0.0], [0.0]
        for span_s, onto_level in zip(np.diff(edges).tolist(), onto.tolist(), strict=False):
            gone = -math.expm1(-span_s / tau_s)
            total.append(total[-1] + onto_level * span_s + (at[-1] - onto_level) * tau_s * gone)
            at.append(at[-1] + (onto_level - at[-1]) * gone)
        index = np.maximum(np.searchsorted(edges, t_s, side="right") - 1, 0)
        since_s = np.maximum(t_s - edges[index], 0.0)
        level, start = onto[index], np.array(at)[index]
        gone_part = -np.expm1(-since_s / tau_s)
        now = np.where(t_s < edges[0], 0.0, start + (level - start) * gone_part)
        added_s = level * since_s + (start - level) * tau_s * gone_part
        return now, np.where(t_s < edges[0], 0.0, np.array(total)[index] + added_s)


class Series(Record):
    """One channel as it was read: (n,) at `at_s`; joules of a counter, else watts.

    A counter returns to 0 at `range_j` (0: never). More power than `limit_w` is impossible.
    """

    at_s: Floats
    values: Floats
    counter: bool
    range_j: float = 0.0
    limit_w: float = MAX_PLAUSIBLE_W


class Response(Record):
    """What a sensor is found to be. `watts` is how much each load adds, by its name.

    `lag_s` is how far the middle of what a refresh shows lies back. `smoothing_s` is the time
    constant of a sensor that smooths exponentially instead of averaging over a window.
    """

    changes: int
    refresh_s: Figure
    window_s: Figure
    smoothing_s: Figure
    lag_s: Figure
    idle_w: Figure
    watts: Mapping[str, Figure]
    mean_w: float | None = None
    highest_w: float | None = None


class _Refreshes(Record):
    """The refreshes of a series: when each was, and what it showed."""

    at_s: Floats
    values: Floats
    timing_u_s: float  # standard uncertainty of each `at_s`


def respond(series: Series, loads: Mapping[str, Bursts]) -> Response:
    """Finds out how the sensor behind `series` answers the loads."""
    series = _unwrapped(series)
    moved = np.flatnonzero(np.diff(series.values) != 0)
    count = len(moved)
    if count < FEWEST_CHANGES:
        why = f"its value changed {count} times; {FEWEST_CHANGES} are needed"
        unknown = Figure(why=why)
        mean_w = (
            float(np.mean(series.values)) if len(series.values) and not series.counter else None
        )
        level = Figure(mean_w) if mean_w is not None and count == 0 else unknown
        none = dict.fromkeys(loads, unknown)
        return Response(count, unknown, unknown, unknown, unknown, level, none, mean_w, mean_w)
    refresh_s, refreshes = _refreshes(series, moved)
    return _fit(series.counter, refreshes, loads, refresh_s, count)


def _unwrapped(series: Series) -> Series:
    """Without unknown and impossible values, wraps and resets."""
    known = np.isfinite(series.values)
    at_s, values = series.at_s[known], series.values[known]
    readings: CounterReadings | GaugeReadings = GaugeReadings(limit_w=series.limit_w)
    if series.counter:
        readings = CounterReadings(limit_w=series.limit_w, modulus=series.range_j)
    screened = readings.screen((at_s * NS_PER_S).astype(np.int64), values)
    return series._replace(at_s=at_s[screened.sound], values=screened.level)


# --- when it is refreshed -------------------------------------------------------------------------


def _refreshes(series: Series, moved: np.ndarray) -> tuple[Figure, _Refreshes]:
    """The refresh period, and the refreshes that the changes after the reads `moved` show."""
    before_s, after_s = series.at_s[moved], series.at_s[moved + 1]
    at_s, values = (before_s + after_s) / 2, series.values[moved + 1]
    gap_s = float(np.median(after_s - before_s))
    reads = int(moved[-1] - moved[0])
    if len(moved) > _EACH_READ * reads:
        why = f"it changed at each read: not longer than {1e3 * gap_s:.3g} ms"
        # Of a value that changes all the time each read shows what has just been refreshed.
        sparse = _spread(after_s, max(20 * gap_s, 0.02) if series.counter else 0.0)
        timing_u_s = gap_s / math.sqrt(12)
        points = _Refreshes(after_s[sparse] - gap_s / 2, values[sparse], timing_u_s)
        return Figure(why=why, at_most=gap_s), points
    refresh_s = _period(np.diff(at_s), gap_s)
    if not series.counter and refresh_s.value is not None:
        span_s = float(series.at_s[0]), float(series.at_s[-1])
        at_s, values = _held(at_s, values, refresh_s.value, span_s)
        values[at_s < before_s[0]] = series.values[0]
    return refresh_s, _Refreshes(at_s, values, gap_s / math.sqrt(12))


def _spread(at_s: Floats, least_s: float) -> np.ndarray:
    """Indices of instants at least `least_s` apart."""
    slots = np.floor((at_s - at_s[0]) / least_s) if least_s > 0 else np.arange(len(at_s))
    return np.flatnonzero(np.diff(slots, prepend=-1.0) > 0)


def _period(spacing_s: Floats, gap_s: float) -> Figure:
    """The longest period of which nearly all spacings of changes are multiples."""
    shortest_s = float(np.quantile(spacing_s, 0.1))
    for part in range(1, 25):
        period_s = shortest_s / part
        if period_s < 1.9 * gap_s:
            break
        for _ in range(3):
            times = np.maximum(np.rint(spacing_s / period_s), 1.0)
            near = times <= _MULTIPLES
            if near.sum() < FEWEST_CHANGES // 2:
                near = times <= 3 * _MULTIPLES
            if not near.any():
                break
            period_s = float(times[near] @ spacing_s[near]) / float(times[near] @ times[near])
        off = np.abs(spacing_s - times * period_s)[near] / period_s
        fits = near.sum() >= FEWEST_CHANGES // 2
        # Spacings that have nothing to do with the period are off by a quarter in the mean.
        if fits and np.mean(off < 0.35) >= 0.9 and np.median(off) < 0.15:
            kept = near.copy()
            kept[near] = off < 0.35
            total = float(times[kept].sum())
            mean_s = float(spacing_s[kept].sum()) / total
            scatter_s = float(np.std((spacing_s - times * mean_s)[kept]))
            # Errors of the edges of neighbouring spacings cancel; a wandering clock's do not.
            u_s = math.hypot(
                gap_s / math.sqrt(6) / math.sqrt(total),
                scatter_s * (1 + 3 / total) / math.sqrt(total),
            )
            return Figure(mean_s, 2 * max(u_s, 1e-3 * mean_s))
    # Each refresh changes it, and the reads are not far closer together than the refreshes.
    middle_s = float(np.median(spacing_s))
    steady = np.abs(spacing_s - middle_s) <= 1.3 * gap_s
    if len(spacing_s) >= _MANY and np.mean(steady) >= 0.95 and middle_s > 1.9 * gap_s:
        mean_s = float(spacing_s[steady].mean())
        u_s = gap_s / math.sqrt(6 * len(spacing_s))
        return Figure(mean_s, 2 * max(u_s, 1e-3 * mean_s))
    return Figure(why="its changes follow no clock that the reads could show")


def _held(
    at_s: Floats, values: Floats, period_s: float, span_s: tuple[float, float]
) -> tuple[Floats, Floats]:
    """With refreshes at which the value stayed the same, which nothing shows, all over `span_s`."""
    earlier = int((at_s[0] - span_s[0]) / period_s)
    at_s = np.append(at_s[0] - earlier * period_s, at_s) if earlier else at_s
    values = np.append(math.nan, values) if earlier else values
    more = np.rint(np.diff(at_s, append=span_s[1] - period_s / 2) / period_s).astype(int)
    times = np.maximum(more, 1)
    first = np.repeat(at_s, times)
    nth = np.arange(len(first)) - np.repeat(np.cumsum(times) - times, times)
    return first + nth * period_s, np.repeat(values, times)


# --- the model of the sensor ----------------------------------------------------------------------

_DELAYS_S = (-0.02, 0.0, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
_WIDTHS_S = (0.002, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5)
_COARSE_POINTS, _STARTS, _FINEST_S = 250, 3, 4e-4

_Trial = tuple[float, float, float]
"""A sum of squares, a delay and a width."""


class _Points(Record):
    """What is fitted: each power `y_w`, shown at `at_s`; of a counter, the mean since `since_s`."""

    at_s: Floats
    since_s: Floats | None
    y_w: Floats
    loads: Sequence[Bursts]

    def every(self, stride: int) -> _Points:
        """One in `stride` of them."""
        since_s = None if self.since_s is None else self.since_s[::stride]
        return _Points(self.at_s[::stride], since_s, self.y_w[::stride], self.loads)

    def columns(self, shape: str, delay_s: float, width_s: float) -> Floats:
        """The regressors (n, loads + 2): each load as the sensor would show it, 1, and a drift."""
        t_s = self.at_s - delay_s
        shown = [self._shown(load, t_s, delay_s, shape, width_s) for load in self.loads]
        middle_s = (self.at_s[0] + self.at_s[-1]) / 2
        drift = (self.at_s - middle_s) / max(self.at_s[-1] - middle_s, 1e-9)
        return np.stack([*shown, np.ones_like(t_s), drift], axis=1)

    def _shown(
        self, load: Bursts, t_s: Floats, delay_s: float, shape: str, width_s: float
    ) -> Floats:
        if self.since_s is not None:
            s = self.since_s - delay_s
            if shape == "smoothing":
                ran = load.smoothed(t_s, width_s)[1] - load.smoothed(s, width_s)[1]
            else:
                ran = load.running_s(t_s) - load.running_s(s)
            return ran / (t_s - s)
        if shape == "smoothing":
            return load.smoothed(t_s, width_s)[0]
        return (load.running_s(t_s) - load.running_s(t_s - width_s)) / width_s

    def solve(self, shape: str, delay_s: float, width_s: float) -> tuple[float, Floats, Floats]:
        """The sum of squared residuals, the coefficients, and the residuals."""
        x = self.columns(shape, delay_s, width_s)
        normal = x.T @ x  # a tenth of the cost of lstsq; a load that never ran is a column of 0
        normal[np.diag_indices_from(normal)] += 1e-9 * max(float(np.trace(normal)), 1e-9)
        beta = np.linalg.solve(normal, x.T @ self.y_w)
        off = self.y_w - x @ beta
        return float(off @ off), np.asarray(beta), off


def _points_of(counter: bool, refreshes: _Refreshes, loads: Sequence[Bursts]) -> _Points:
    at_s, values = refreshes.at_s, refreshes.values
    stride = max(1, math.ceil(len(at_s) / _MOST_POINTS))
    at_s, values = at_s[::stride], values[::stride]
    if not counter:
        return _Points(at_s, None, values, loads)
    span_s = np.diff(at_s)
    return _Points(at_s[1:], at_s[:-1], np.diff(values) / span_s, loads)


def _search(points: _Points, shape: str, *, fixed_width: bool) -> tuple[float, float, float]:
    """The least sum of squares over delay and width, and where it is."""

    def tried(points: _Points, pairs: Iterable[tuple[float, float]]) -> list[_Trial]:
        return [(points.solve(shape, d, w)[0], d, w) for d, w in pairs]

    widths = (1.0,) if fixed_width else _WIDTHS_S
    few = points.every(math.ceil(len(points.y_w) / _COARSE_POINTS))
    coarse = sorted(tried(few, ((d, w) for d in _DELAYS_S for w in widths)))
    trials = []
    for _, delay_s, width_s in coarse[:_STARTS]:
        best = tried(points, [(delay_s, width_s)])[0]
        step_s = max(0.01, 0.3 * width_s, 0.3 * abs(delay_s))
        while step_s > _FINEST_S:
            _, d, w = best
            wider = [w] if fixed_width else [w, w + step_s, max(1e-3, w - step_s)]
            # Along a line of equal lag, too: there the sum changes least.
            pairs = [(d + i * step_s, v) for i in (-1, 0, 1) for v in wider]
            pairs += (
                []
                if fixed_width
                else [(d - i * step_s / 2, max(1e-3, w + i * step_s)) for i in (-1, 1)]
            )
            found = min(tried(points, pairs))
            if found[0] >= best[0]:
                step_s *= 0.5
            best = min(best, found)
        trials.append(best)
    return min(trials)


def _fit(
    counter: bool,
    refreshes: _Refreshes,
    loads: Mapping[str, Bursts],
    refresh_s: Figure,
    changes: int,
) -> Response:
    names = [name for name, load in loads.items() if len(load.begin_s)]
    points = _points_of(counter, refreshes, [loads[name] for name in names])
    found: dict[str, _Trial] = {}
    if names and len(points.y_w) > len(names) + 6:
        found["window"] = _search(points, "window", fixed_width=counter)
        if not _is_fine(points, found["window"][0]):
            found["smoothing"] = _search(points, "smoothing", fixed_width=False)
    # A window is the usual kind of sensor; the other is believed where it explains far more, and
    # where it is slow enough to differ from a window between two refreshes.
    shape = "window"
    if "smoothing" in found:
        rss, _, tau_s = found["smoothing"]
        slow = tau_s > 0.3 * (refresh_s.value or 0.0)
        shape = "smoothing" if slow and rss < 0.6 * found["window"][0] else shape
    _, delay_s, width_s = found.get(shape, (0.0, 0.0, 1.0))
    _, beta, _ = points.solve(shape, delay_s, width_s)
    with_width = bool(found) and not (counter and shape == "window")
    u_beta, u_width, u_lag = _uncertainties(
        points, (shape, delay_s, width_s), refreshes.timing_u_s, with_width=with_width
    )
    watts = {name: Figure(float(beta[i]), 2 * float(u_beta[i])) for i, name in enumerate(names)} | {
        name: Figure(why="this load did not run") for name in loads if name not in names
    }
    mean_w = float(np.mean(points.y_w))
    moved = any(has_moved(w, mean_w) for w in watts.values())
    unknown = Figure(why="no load moved it" if names else "no load ran")
    response = Response(
        changes=changes,
        refresh_s=refresh_s,
        window_s=unknown,
        smoothing_s=unknown,
        lag_s=unknown,
        idle_w=Figure(float(beta[-2]), 2 * float(u_beta[-2])),
        watts=watts,
        mean_w=mean_w,
        highest_w=float(np.max(points.y_w)),
    )
    if not found or not moved:
        return response
    window = Figure(why="a counter has none: it adds up" if counter else "it smooths instead")
    smoothing = Figure(why="it averages over a window")
    lag_s = delay_s
    if shape == "smoothing":
        smoothing, lag_s = Figure(width_s, 2 * u_width), delay_s + width_s
    elif not counter:
        window, lag_s = Figure(width_s, 2 * u_width), delay_s + width_s / 2
    return response._replace(
        window_s=_if_sure(window, max(0.5 * width_s, 0.02)),
        smoothing_s=_if_sure(smoothing, 0.5 * width_s),
        lag_s=_if_sure(Figure(lag_s, 2 * u_lag), 0.5 * (refresh_s.value or 0.1) + 0.1),
    )


def _if_sure(figure: Figure, most_u: float) -> Figure:
    """The figure if its uncertainty is small enough to say something."""
    if figure.u is None or figure.u <= most_u:
        return figure
    if math.isinf(figure.u):
        return Figure(why="too few of its refreshes hold an edge of the load")
    return Figure(why=f"only known within {1e3 * figure.u:.3g} ms")


def _is_fine(points: _Points, rss: float) -> bool:
    """Whether a fit leaves less than 1 % of the swing: then no other shape is looked for."""
    return math.sqrt(rss / len(points.y_w)) < 0.01 * float(np.std(points.y_w))


def has_moved(watts: Figure, mean_w: float | None) -> bool:
    """Whether a load certainly moved the sensor, by more than its noise and half a percent."""
    if watts.value is None or watts.u is None:
        return False
    return watts.value > max(1.5 * watts.u, 5e-3 * abs(mean_w or 0.0), 0.05)


def _uncertainties(
    points: _Points, model: tuple[str, float, float], timing_u_s: float, *, with_width: bool
) -> tuple[Floats, float, float]:
    """Standard uncertainties of the coefficients, the width and the lag.

    From the residuals (a sandwich of clusters in time, because neighbours err alike), and from how
    well the times of refreshes and of the load's edges are known.
    """
    shape, delay_s, width_s = model
    _, beta, off = points.solve(*model)
    x = points.columns(*model)

    def slope(delay_step_s: float, width_step_s: float) -> Floats:
        after = points.columns(shape, delay_s + delay_step_s, width_s + width_step_s)
        before = points.columns(shape, delay_s - delay_step_s, width_s - width_step_s)
        return np.asarray((after - before) @ beta / (2 * (delay_step_s + width_step_s)))

    step_s = max(2e-3, 0.05 * width_s if with_width else 5e-3)
    columns = [x, slope(step_s, 0.0)[:, np.newaxis]]
    if with_width:
        columns.append(slope(0.0, min(step_s, 0.5 * width_s))[:, np.newaxis])
    design = np.concatenate(columns, axis=1)
    scale = np.sqrt((design**2).sum(axis=0))
    scale[scale == 0] = 1.0
    normal = design / scale
    bread = np.linalg.pinv(normal.T @ normal, rcond=1e-10)
    cluster = np.minimum((np.arange(len(off)) * _CLUSTERS) // max(1, len(off)), _CLUSTERS - 1)
    scores = np.stack(
        [(normal * off[:, np.newaxis])[cluster == c].sum(0) for c in range(_CLUSTERS)]
    )
    used = min(_CLUSTERS, len(off))
    free = max(1.0, used - design.shape[1])
    covariance = bread @ (scores.T @ scores) @ bread * (used / free)
    plain = bread * float(off @ off) / max(1, len(off) - design.shape[1])
    covariance = np.where(np.diag(covariance)[:, None] < np.diag(plain)[:, None], plain, covariance)
    # A refresh whose time is known to `timing_u_s` is a reading that is off by the slope there.
    late = normal * (design[:, len(beta)] * timing_u_s)[:, np.newaxis]
    covariance = covariance + bread @ (late.T @ late) @ bread
    covariance = covariance / np.outer(scale, scale)
    count = design.shape[1]
    at_delay = len(beta)
    # Few readings that hold an edge each say little of how well they say it.
    effective = [_effective(column) for column in design.T]
    few = [1 + _FEW / max(count, 1.0) for count in effective]
    covariance = covariance * np.sqrt(np.outer(few, few))
    variance = np.diag(covariance)
    delay_v = max(0.0, float(variance[at_delay]))
    width_v = max(0.0, float(variance[-1])) if count > at_delay + 1 else 0.0
    share = (0.5 if shape == "window" else 1.0) if with_width else 0.0
    lag_v = delay_v
    if with_width:
        cross = float(covariance[at_delay, -1] + covariance[-1, at_delay]) / 2
        lag_v = delay_v + share**2 * width_v + 2 * share * cross
    u_lag = math.sqrt(max(lag_v, 0.0) + _EDGE_U_S**2)
    u_width = math.sqrt(width_v + 2 * _EDGE_U_S**2)
    if with_width and effective[-1] < _FEWEST_EFFECTIVE:
        u_width = math.inf
    if effective[at_delay] < _FEWEST_EFFECTIVE:
        u_lag = math.inf
    return np.sqrt(np.maximum(variance[:at_delay], 0.0)), u_width, u_lag


def _effective(column: Floats) -> float:
    """How many readings decide over what multiplies `column`."""
    fourth = float((column**4).sum())
    return float((column**2).sum()) ** 2 / fourth if fourth > 0 else 1.0


_FEW = 4.0
_FEWEST_EFFECTIVE = 4.0
"""A window or a lag that rests on fewer readings is not reported."""

_EDGE_U_S = 1e-3
"""How well it is known when a load began to take power (standard uncertainty, judgement)."""


# --- two sensors of one device --------------------------------------------------------------------


def compare(first: Series, second: Series, *, lag_s: float = 0.0) -> Figure:
    """By what part the first exceeds the second over the time in which both were read.

    `lag_s` is how far the second trails behind the first.
    """
    first_s, second_s = _energy_at(_unwrapped(first)), _energy_at(_unwrapped(second))
    if first_s is None or second_s is None:
        return Figure(why="one of them stood still")
    begin_s = max(first_s[0][0], second_s[0][0] - lag_s)
    end_s = min(first_s[0][-1], second_s[0][-1] - lag_s)
    if end_s - begin_s < 2.0:
        return Figure(why="they were read together for too short")
    edges = np.linspace(begin_s, end_s, 17)
    ours = np.diff(np.interp(edges, *first_s))
    theirs = np.diff(np.interp(edges + lag_s, *second_s))
    if ours.sum() <= 0 or theirs.sum() <= 0:
        return Figure(why="no energy flowed")
    ratio = float(ours.sum() / theirs.sum())
    left = (ours.sum() - ours) / (theirs.sum() - theirs)
    count = len(left)
    u = math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    if not second.counter:
        u = math.hypot(u, _HELD_U)
    return Figure(ratio - 1, 2 * max(u, 2e-4))


_HELD_U = 0.01
"""Readings of power are held from one to the next, and may see a part of the time only: standard
uncertainty of their sum under bursts, beside its scatter (simulated boards: up to 2 % off)."""


def _energy_at(series: Series) -> tuple[Floats, Floats] | None:
    """Cumulative energy at the changes of a counter, or at the reads of a power."""
    if len(series.values) < FEWEST_CHANGES:
        return None
    if not series.counter:
        steps = np.diff(series.at_s) * series.values[:-1]  # held until the next read
        return series.at_s, np.append(0.0, np.cumsum(steps))
    moved = np.flatnonzero(np.diff(series.values) != 0)
    if len(moved) < FEWEST_CHANGES:
        return None
    at_s = (series.at_s[moved] + series.at_s[moved + 1]) / 2
    return at_s, series.values[moved + 1]
