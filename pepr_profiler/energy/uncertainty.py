"""How sure an energy is: its uncertainty budget by cause, and the check by a second sensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pepr_profiler.energy.curve import EnergyCurve, Inside, median, steps_of
from pepr_profiler.record import Floats, Ints, Mask, Record
from pepr_profiler.units import NS_PER_S

_ALIAS_U = 0.2
"""An aliased energy is uncertain by this part of it (docs/measurement, F)."""

_GAIN_CORRELATION = 0.5
"""How much of a board's gain its counter and its power readings have in common (judgement: the same
shunts, other paths; no source measures both)."""


LINEAR_CAUSES = ("model_j", "attribution_j")
"""Causes whose errors are alike in all devices of a machine: they add up as they stand."""

_SAMPLED_CAUSES = ("edges_j", "duty_j", "gaps_j")


class UncertaintyBudget(Record):
    """Standard uncertainties (k = 1) of one device's energy, J, by cause (docs/measurement, F).

    `gain_j`, `offset_j` and `model_j` are errors that a device has in all of its windows and runs:
    they add and subtract as they stand. The others are independent: their squares add.
    """

    gain_j: float = 0.0
    offset_j: float = 0.0
    model_j: float = 0.0
    edges_j: float = 0.0
    duty_j: float = 0.0
    lag_j: float = 0.0
    quantisation_j: float = 0.0
    gaps_j: float = 0.0
    aliasing_j: float = 0.0
    attribution_j: float = 0.0
    disagreement_j: float = 0.0

    @property
    def u_j(self) -> float:
        """The combined standard uncertainty (k = 1), J."""
        return math.hypot(*self)

    @property
    def sampled_j(self) -> float:
        """The part of it by what the sensor did not see of the load."""
        return math.hypot(*(getattr(self, cause) for cause in _SAMPLED_CAUSES))


_LOCKED_INTERVALS = 8
"""From so many intervals on it shows whether a load repeats with windows."""

_RESOLVED = 3.0
"""Windows and gaps of so many refreshes each show what power they have."""

_HELD_SPREAD = 0.05
"""Where windows hold the same part of each interval but for this, energy cannot depend on it."""

_HIDDEN_SWING = 1.6
"""The variance of power over that of its readings, which are means over up to 0.1 s (simulated
loads: 1.0 to 1.5)."""

_HIDDEN_POWER = 0.4
"""The standard deviation of power that averages may hide, over power (judgement: that of a load
that draws 2.3 times as much in half of the time as in the other half)."""

_CALM_STEPS = 0.1
"""If power varies from step to step by less than this part of it, what varies faster may be alike
all the same."""

_DUE_REFRESHES = 3
"""A counter that has not moved for so many refreshes, or reads, stands still."""

_STEPS_ENOUGH = 16
"""From fewer steps it is unknown whether GPUs work in step: then they are taken to."""


def likeness(curves: Sequence[EnergyCurve], energies_j: Sequence[Floats]) -> Floats:
    """How alike the power of devices goes, (n, n): 1 for a device itself and for GPUs in step.

    `energies_j` are their cumulative energies (m,) at equally spaced instants. GPUs that train one
    model wait for each other, so that an edge cuts their bursts alike. Their correlation, plus two
    standard deviations of that by chance, 2/sqrt(m), is at most 1. Where there are few instants, or
    power is the same from one to the next, it is unknown: then it is 1. Others are independent.
    """
    steps_j = [np.diff(energy_j) - np.mean(np.diff(energy_j)) for energy_j in energies_j]
    usual_j = [abs(float(np.mean(np.diff(energy_j)))) for energy_j in energies_j]
    tells = [
        len(step_j) >= _STEPS_ENOUGH and float(np.std(step_j)) > _CALM_STEPS * mean_j
        for step_j, mean_j in zip(steps_j, usual_j, strict=True)
    ]
    result = np.eye(len(curves))
    for i, one in enumerate(curves):
        for j, two in enumerate(curves[:i]):
            if one.source.kind != "gpu" or two.source.kind != "gpu":
                continue
            alike = 1.0
            if tells[i] and tells[j]:
                scale = math.sqrt(float(steps_j[i] @ steps_j[i]) * float(steps_j[j] @ steps_j[j]))
                alike = float(steps_j[i] @ steps_j[j]) / scale + 2 / math.sqrt(len(steps_j[i]))
            result[i, j] = result[j, i] = min(max(alike, 0.0), 1.0)
    return result


def combined_u_j(budgets: Sequence[UncertaintyBudget], alike: Floats) -> float:
    """The standard uncertainty of a sum over devices, J; `alike` is their `likeness`.

    What a sensor did not see between its readings adds up where power goes alike (GUM, 5.2.2).
    Models of one machine err alike: else two of +-50 % would claim +-35 % together. So does the
    sharing: a job that came late to one GPU came late to all.
    """
    sampled_j = np.array([budget.sampled_j for budget in budgets])
    none = dict.fromkeys(LINEAR_CAUSES, 0.0)
    own_j2 = sum(budget._replace(**none).u_j ** 2 for budget in budgets)
    for cause in LINEAR_CAUSES:
        own_j2 += math.fsum(abs(getattr(budget, cause)) for budget in budgets) ** 2
    return math.sqrt(
        max(0.0, own_j2 + float(sampled_j @ alike @ sampled_j - sampled_j @ sampled_j))
    )


def summed_u_j(components: Iterable[Mapping[str, Any]]) -> float | None:
    """u (k = 2) of the sum of some components of summaries, J; None if one is unknown.

    As `combined_u_j`, by the budgets that the components have. How alike the power of GPUs went is
    not in a summary: it is taken to be the same. A component without a budget is independent of the
    others, unless it is modelled.
    """
    linear_j = dict.fromkeys((*LINEAR_CAUSES, "sampled_j"), 0.0)
    variance_j2 = 0.0
    for component in components:
        u_j, causes = component.get("u_j"), component.get("budget") or {}
        if u_j is None or not math.isfinite(u_j):
            return None
        if not causes and component.get("provenance") == "modelled":
            causes = {"model_j": u_j / 2}
        moved = {cause: abs(causes.get(cause, 0.0)) for cause in LINEAR_CAUSES}
        if component.get("kind") == "gpu":
            moved["sampled_j"] = math.hypot(*(causes.get(c, 0.0) for c in _SAMPLED_CAUSES))
        for cause, part_j in moved.items():
            linear_j[cause] += part_j
        variance_j2 += max(0.0, (u_j / 2) ** 2 - sum(part_j**2 for part_j in moved.values()))
    return 2 * math.sqrt(variance_j2 + sum(sum_j**2 for sum_j in linear_j.values()))


def budget(
    curve: EnergyCurve, at_ns: Ints, begins: Ints, ends: Ints, *, energy_j: float | None = None
) -> UncertaintyBudget:
    """The budget of the windows from index `begins` to `ends` of the grid, taken together.

    `at_ns` is the curve's grid. `energy_j` is the part of the windows' energy that is meant, where
    a device is shared; all of it unless given.
    """
    source = curve.source
    device_j = float(np.sum(curve.energy_j[ends] - curve.energy_j[begins]))
    seconds = float(np.sum(at_ns[ends] - at_ns[begins])) / NS_PER_S
    part = 1.0 if energy_j is None or not device_j else energy_j / device_j

    # How often the energy up to an instant is in the sum. Where one window ends and the next begins
    # it cancels, and its uncertainty with it.
    count = len(at_ns)
    times = np.bincount(ends, minlength=count) - np.bincount(begins, minlength=count)

    def summed(variance_j2: Floats | None, weights: Ints) -> float:
        if variance_j2 is None:
            return 0.0
        return abs(part) * math.sqrt(max(0.0, float(weights @ variance_j2)))

    repeats = _Repeats.of(curve, at_ns, times) if len(begins) > 1 else None
    lag_j = 0.0
    if curve.power_w is not None:
        lag_j = abs(float(np.sum(curve.power_w[ends] - curve.power_w[begins]))) * curve.lag_u_s
    if repeats is not None:  # late readings move what windows have more than gaps out of them
        lag_j = max(lag_j, repeats.step_w() * curve.lag_u_s)
    quantisation_j = curve.quantum * math.sqrt(float(times @ times) / 12)
    edges_j = summed(curve.edge_j2, times**2)
    if not source.counter:  # steady readings are all rounded alike
        quantisation_j = curve.quantum * seconds / math.sqrt(12)
        spans_s = (at_ns[ends] - at_ns[begins]) / NS_PER_S
        short_j2 = curve.short_j2[0] * seconds + curve.short_j2[1] * float(spans_s @ spans_s)
        edges_j = min(edges_j, abs(part) * math.sqrt(short_j2))
        if repeats is None:
            hidden_j = abs(device_j) * float(_hidden_part(curve.averages_s, seconds))
        elif repeats.is_unresolved:
            hidden_j = repeats.together_j()
        else:
            hidden_j = math.hypot(*repeats.hidden_j())
        edges_j = max(edges_j, abs(part) * hidden_j)
    scale_j = source.gain * device_j * part
    modelled = source.provenance == "modelled"
    unread_j = _unread_j(curve, at_ns, at_ns[begins], at_ns[ends])
    result = UncertaintyBudget(
        gain_j=0.0 if modelled else scale_j,
        model_j=scale_j if modelled else 0.0,
        offset_j=source.offset_w * seconds * part,
        edges_j=math.hypot(
            edges_j,
            abs(part) * math.sqrt(_inside_j2(curve, times, repeats)),
            abs(part) * _stood_in_j(curve, at_ns, times),
        ),
        duty_j=summed(curve.duty_j2, times),
        gaps_j=math.hypot(summed(curve.gap_j2, times), abs(part) * unread_j),
        lag_j=abs(part) * lag_j,
        quantisation_j=abs(part) * quantisation_j,
        aliasing_j=_ALIAS_U * abs(device_j * part) if curve.aliased else 0.0,
    )
    # No more than what the lowest or the highest power would have made of the windows.
    low_w, high_w = curve.extremes_w
    most_j = abs(part) * max(device_j - low_w * seconds, high_w * seconds - device_j, 0.0) / 2
    sampled_j = math.hypot(result.sampled_j, result.lag_j)
    if repeats is not None and repeats.is_hidden:
        result = result._replace(edges_j=most_j, duty_j=0.0, gaps_j=0.0, lag_j=0.0)
    elif sampled_j > most_j:
        scale = most_j / sampled_j
        names = ("edges_j", "duty_j", "gaps_j", "lag_j")
        result = result._replace(**{name: scale * getattr(result, name) for name in names})
    return result


def _hidden_part(averages_s: float, seconds: Any) -> Any:
    """u of windows of some seconds by power that repeats within averages, over their energy.

    It is the same in all averages of W. Power that repeats once in W, half of it high, puts the
    energy of a window off by its standard deviation times W/√24 (rms over all phases and lengths),
    and that of a short one times its length.
    """
    return _HIDDEN_POWER * np.minimum(1.0, averages_s / math.sqrt(24) / np.maximum(seconds, 1e-9))


def _stood_in_j(curve: EnergyCurve, at_ns: Ints, times: Ints) -> float:
    """u of what averages hide where they stand in for a counter, J; it may be alike in all windows.

    `times` is how often the energy up to each instant is in the sum.
    """
    if not curve.instead_averages_s:
        return 0.0
    replaced = np.zeros(len(at_ns), bool)  # the steps that follow the instants
    for span_ns in curve.instead_ns:
        replaced[slice(*steps_of(span_ns, at_ns))] = True
    begins, ends = _runs(replaced & (np.cumsum(times) < 0))
    joules = np.abs(curve.energy_j[ends] - curve.energy_j[begins])
    spans_s = (at_ns[ends] - at_ns[begins]) / NS_PER_S
    return float(joules @ _hidden_part(curve.instead_averages_s, spans_s))


def _runs(steps: Mask) -> tuple[Ints, Ints]:
    """Where runs of steps that follow each other begin, and where they end."""
    before = np.append(False, steps[:-1])
    return np.flatnonzero(steps & ~before), np.flatnonzero(before & ~steps)


class _Repeats(Record):
    """Several windows of one curve, those that follow each other without a gap taken as one.

    They begin and end at `begins` and `ends` of the grid. Between two of them lie `gaps_s`.
    """

    curve: EnergyCurve
    begins: Ints
    ends: Ints
    spans_s: Floats
    gaps_s: Floats

    @classmethod
    def of(cls, curve: EnergyCurve, at_ns: Ints, times: Ints) -> _Repeats | None:
        """Those of a sum; None if all of them are one."""
        begins, ends = _runs(np.cumsum(times) < 0)
        if len(begins) < 2:
            return None
        spans_s = (at_ns[ends] - at_ns[begins]) / NS_PER_S
        gaps_s = (at_ns[begins[1:]] - at_ns[ends[:-1]]) / NS_PER_S
        return cls(curve, begins, ends, spans_s, gaps_s)

    @property
    def is_unresolved(self) -> bool:
        """Whether the sensor is too slow to tell power in the windows from that beside them."""
        shortest_s = min(median(self.spans_s), median(self.gaps_s))
        return shortest_s < _RESOLVED * max(self.curve.refresh_s, self.curve.averages_s)

    def hidden_j(self) -> Floats:
        """u of what averages hide of each window, J."""
        joules = self.curve.energy_j[self.ends] - self.curve.energy_j[self.begins]
        return np.asarray(np.abs(joules) * _hidden_part(self.curve.averages_s, self.spans_s))

    @property
    def is_hidden(self) -> bool:
        """Whether they repeat within the time that readings average: these are then the same."""
        return median(self.spans_s) + median(self.gaps_s) <= self.curve.averages_s

    def together_j(self) -> float:
        """u of power readings if all windows are off the same way, J.

        Windows that hold a part f of a time t, in which power has the standard deviation s, have at
        most s·t·√(f(1 - f)) more than their share.
        """
        curve = self.curve
        if curve.edge_j2 is None:
            return 0.0
        each_j2 = curve.edge_j2[self.begins] + curve.edge_j2[self.ends]
        short_j2 = curve.short_j2[0] * self.spans_s + curve.short_j2[1] * self.spans_s**2
        each_j = np.sqrt(np.minimum(each_j2, short_j2))
        each_j = np.maximum(each_j, self.hidden_j())
        if curve.averages_s:
            return float(each_j.sum())
        swing_w = math.sqrt(_HIDDEN_SWING * curve.short_j2[1] / 2)
        most_j = swing_w * math.sqrt(float(self.spans_s.sum() * self.gaps_s.sum()))
        return min(float(each_j.sum()), most_j / 2)

    def step_w(self) -> float:
        """By how much power is higher in the windows than in the gaps, summed over the windows."""
        at = np.stack((self.begins, self.ends), axis=1).ravel()
        joules = np.diff(self.curve.energy_j[at])
        watts = joules[:-1:2] / self.spans_s[:-1] - joules[1::2] / self.gaps_s
        return abs(float(watts.mean())) * len(self.spans_s)


def _unread_j(curve: EnergyCurve, at_ns: Ints, begins_ns: Ints, ends_ns: Ints) -> float:
    """What a device may have used in windows before its first reading and after its last, J.

    That time has no energy in the curve. The mean power is taken for it: k = 2 allows for twice
    that. A counter that no longer moves was last read when its next refresh was due.
    """
    first_ns, last_ns = curve.first_ns, curve.last_ns
    if curve.source.counter and curve.changed_ns > first_ns:
        due_s = _DUE_REFRESHES * max(curve.refresh_s, curve.source.period_s)
        last_ns = min(last_ns, curve.changed_ns + round(due_s * NS_PER_S))
    if first_ns < 0 or last_ns <= first_ns:
        return 0.0
    unread_ns = np.clip(np.minimum(first_ns, ends_ns) - begins_ns, 0, None)
    unread_ns = unread_ns + np.clip(ends_ns - np.maximum(last_ns, begins_ns), 0, None)
    if not unread_ns.any():
        return 0.0
    read_ns = min(last_ns, int(at_ns[-1])) - max(first_ns, int(at_ns[0]))
    if read_ns <= 0:
        return 0.0
    mean_w = float(curve.energy_j[-1] - curve.energy_j[0]) / read_ns
    return abs(mean_w) * float(np.sum(unread_ns))


def _locked_j(held: Floats, interval_j: Floats, *, late: float) -> tuple[float, float]:
    """What repeated windows miss if power inside of them is another one than beside them, J.

    Such errors do not cancel over the repeats. The energy of an interval that the windows hold in
    part then depends on that part f by a slope b, and each is off by b·f·(1 - f). What all readings
    are `late` by, as a part of an interval, moves b times that out of each window. The second value
    is how well b is known: its standard uncertainty, infinite where the record does not show it.
    """
    pairs = held[1:-1], interval_j[1:-1]  # the load goes on where windows do not
    if len(pairs[0]) < _LOCKED_INTERVALS or np.std(pairs[0]) < _HELD_SPREAD:
        return 0.0, math.inf
    # From interval to interval, power that changes slowly does not blur the slope.
    slopes = _slope(*pairs), _slope(*(np.diff(column) for column in pairs))
    slope_j, slope_u_j = min(slopes, key=lambda slope: slope[1])
    if abs(slope_j) <= 2 * slope_u_j:
        return 0.0, slope_u_j
    missed = math.hypot(float((held * (1 - held)).sum()), late * len(held) / 2)
    return abs(slope_j) * missed, slope_u_j


def _slope(held: Floats, interval_j: Floats) -> tuple[float, float]:
    """The slope of energies over the parts held, and its standard uncertainty."""
    off, off_j = held - held.mean(), interval_j - interval_j.mean()
    spread = float(off @ off)
    if not spread > 0:
        return 0.0, math.inf
    slope_j = float(off @ off_j) / spread
    left_j = off_j - slope_j * off
    return slope_j, math.sqrt(float(left_j @ left_j) / (len(held) - 2) / spread)


def _together_j(curve: EnergyCurve, inside: Inside, used: Ints, held: Floats) -> Floats:
    """u of what windows hold of each interval, if all power in them may be another one, J.

    Power of a standard deviation s in an interval of T puts at most s·T·√(f(1 - f)) more than its
    share into a part f, and no part has power beyond the extremes.
    """
    most_j = np.sqrt(_swing_j2(inside, used) * held * (1 - held))
    low_w, high_w = curve.extremes_w
    if high_w < math.inf:
        interval_j, interval_s = inside.interval_j[used], inside.interval_s[used]
        below_j = np.maximum(interval_j - low_w * interval_s, 0.0)
        above_j = np.maximum(high_w * interval_s - interval_j, 0.0)
        up_j = np.minimum(above_j * held, below_j * (1 - held))
        down_j = np.minimum(below_j * held, above_j * (1 - held))
        most_j = np.minimum(most_j, np.maximum(up_j, down_j))
    return most_j / 2


def _swing_j2(inside: Inside, used: Ints) -> Floats:
    """The variance of power inside intervals, times their length squared."""
    even_j2 = inside.even_j2[used]
    return np.where(np.isfinite(even_j2), even_j2, 4 * inside.bridge_j2[used])


def _inside_j2(curve: EnergyCurve, times: Ints, repeats: _Repeats | None) -> float:
    """The variance of some windows' energy by what is unknown between refreshes of a counter.

    `times` is how often the energy up to each instant is in the sum. Of an interval, all that
    matters is which part of it the windows hold.
    """
    inside, power_w = curve.inside, curve.power_w
    if inside is None or power_w is None:
        return 0.0
    late = curve.lag_u_s / curve.refresh_s if curve.refresh_s > 0 else 0.0
    covers = -np.cumsum(times)  # how many windows hold what follows an instant
    used = np.flatnonzero((times != 0) & (inside.interval >= 0))
    if not len(used):
        return 0.0
    weight, part, interval = times[used], inside.part[used], inside.interval[used]
    begins = np.flatnonzero(np.diff(interval, prepend=-1))
    before = covers[used[begins]] + times[used[begins]]
    held = before.astype(np.float64) - np.add.reduceat(weight * (1 - part), begins)
    held -= np.floor(held)
    bridge_j2, even_j2 = inside.bridge_j2[used[begins]], inside.even_j2[used[begins]]
    least = np.minimum(held, 1 - held)
    varies_j2 = bridge_j2 * held * (1 - held)
    known = np.isfinite(even_j2)
    varies_j2[known] = np.minimum(bridge_j2[known] / 4, even_j2[known] * least[known] ** 2)
    variance_j2 = float(varies_j2.sum())
    if len(varies_j2) == 2:  # both edges of a window cut a load that repeats alike
        variance_j2 += 2 * inside.repeats * math.sqrt(float(varies_j2.prod()))
    if repeats is not None:
        inside_j = inside.interval_j[used[begins]]
        locked_j, slope_u_j = _locked_j(held, inside_j, late=late)
        swing_j = math.sqrt(float(np.mean(_swing_j2(inside, used[begins]))))
        if repeats.is_unresolved and slope_u_j > swing_j:  # all may be off alike
            together_j = float(_together_j(curve, inside, used[begins], held).sum())
            variance_j2 = max(variance_j2, together_j**2)
        else:
            variance_j2 += locked_j**2
    # The refreshes on either side, each of which may be the same as the next interval's.
    begin_u_s, end_u_s = inside.refresh_u_s[:, used[begins]]
    watts = weight * power_w[used]
    begin_j = np.add.reduceat(watts * (1 - part), begins) * begin_u_s
    end_j = np.add.reduceat(watts * part, begins) * end_u_s
    follows = np.diff(interval[begins], prepend=-9) == 1
    begin_j += np.where(follows, np.append(0.0, end_j[:-1]), 0.0)
    end_j = np.where(np.append(follows[1:], False), 0.0, end_j)
    return variance_j2 + float(begin_j @ begin_j + end_j @ end_j)


class CrossCheck(Record):
    """The energy that a second sensor of a device gives, minus the first one's, and u of that.

    `u_j` has k = 2.
    """

    source: str
    energy_j: float
    difference_j: float
    u_j: float


def cross_check(counter: EnergyCurve, power: EnergyCurve, at_ns: Ints) -> CrossCheck | None:
    """Compares the integral of power readings with the counter; None if one is unknown.

    Over the part of the grid in which both were read: past its last reading each source is held for
    a time of its own. Their gains agree in part (_GAIN_CORRELATION), so that 2 (1 - correlation) of
    a gain's variance is left in the difference; all other terms of both are in it.
    """
    begin_ns, end_ns = max(counter.first_ns, power.first_ns), min(counter.last_ns, power.last_ns)
    first = int(np.searchsorted(at_ns, begin_ns, side="left"))
    last = int(np.searchsorted(at_ns, end_ns, side="right")) - 1
    if last <= first:
        return None
    ends = np.array([first]), np.array([last])
    energies_j = [float(curve.energy_j[last] - curve.energy_j[first]) for curve in (counter, power)]
    if not all(math.isfinite(energy_j) for energy_j in energies_j):
        return None
    ours, theirs = (budget(curve, at_ns, *ends) for curve in (counter, power))
    gain_j = math.sqrt(2 * (1 - _GAIN_CORRELATION)) * 0.5 * (ours.gain_j + theirs.gain_j)
    u_j = math.hypot(gain_j, ours._replace(gain_j=0.0).u_j, theirs._replace(gain_j=0.0).u_j)
    return CrossCheck(
        source=power.source.source,
        energy_j=energies_j[1],
        difference_j=energies_j[1] - energies_j[0],
        u_j=2 * u_j,
    )
