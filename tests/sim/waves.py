"""Power over time, with its exact integral. waves.h computes the same in another way."""

from __future__ import annotations

import functools
import math
import struct
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Protocol


class Wave(Protocol):
    """Power (or any other quantity) as a function of the seconds since an epoch."""

    def power_w(self, t_s: float) -> float:
        """The value at one instant."""

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        """The exact integral from `t0_s` to `t1_s` (t0_s <= t1_s, both finite)."""

    def words(self) -> str:
        """This wave in a scenario file."""


def mean_w(wave: Wave, t0_s: float, t1_s: float) -> float:
    return wave.energy_j(t0_s, t1_s) / (t1_s - t0_s)


@dataclass(frozen=True)
class _Flat:
    """Waves that are a kind and a row of numbers."""

    def words(self) -> str:
        return " ".join([type(self).__name__.lower(), *map(str, astuple(self))])


@dataclass(frozen=True)
class Constant(_Flat):
    level_w: float

    def power_w(self, t_s: float) -> float:
        del t_s
        return self.level_w

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        return self.level_w * (t1_s - t0_s)


@dataclass(frozen=True)
class Step(_Flat):
    at_s: float
    before_w: float
    after_w: float

    def power_w(self, t_s: float) -> float:
        return self.before_w if t_s < self.at_s else self.after_w

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        edge_s = min(max(self.at_s, t0_s), t1_s)
        return self.before_w * (edge_s - t0_s) + self.after_w * (t1_s - edge_s)


@dataclass(frozen=True)
class Square(_Flat):
    """High during the first `duty` of each period, a period beginning at `shift_s`."""

    period_s: float
    low_w: float
    high_w: float
    duty: float = 0.5
    shift_s: float = 0.0

    def __post_init__(self) -> None:
        if self.period_s <= 0 or not 0 <= self.duty <= 1:
            raise ValueError(f"a square wave needs period_s > 0 and duty in [0, 1]: {self}")

    def power_w(self, t_s: float) -> float:
        high = (t_s - self.shift_s) % self.period_s < self.duty * self.period_s
        return self.high_w if high else self.low_w

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        # Whole periods first, then the edges that the rest crosses.
        high_s = self.duty * self.period_s
        whole, rest_s = divmod(t1_s - t0_s, self.period_s)
        start_s = (t0_s - self.shift_s) % self.period_s
        end_s = start_s + rest_s
        in_high_s = max(0.0, min(end_s, high_s) - start_s)
        in_next_high_s = max(0.0, min(end_s, self.period_s + high_s) - self.period_s)
        total_high_s = whole * high_s + in_high_s + in_next_high_s
        return self.high_w * total_high_s + self.low_w * (t1_s - t0_s - total_high_s)


@dataclass(frozen=True)
class Sine(_Flat):
    mean_w: float
    amplitude_w: float
    period_s: float
    shift_s: float = 0.0

    def _angle(self, t_s: float) -> float:
        return math.tau * (t_s - self.shift_s) / self.period_s

    def power_w(self, t_s: float) -> float:
        return self.mean_w + self.amplitude_w * math.sin(self._angle(t_s))

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        # cos a - cos b as a product, which does not cancel for short windows.
        half, middle = self._angle((t1_s - t0_s) / 2 + self.shift_s), self._angle((t0_s + t1_s) / 2)
        swing_j = self.amplitude_w * self.period_s / math.pi * math.sin(middle) * math.sin(half)
        return self.mean_w * (t1_s - t0_s) + swing_j


@dataclass(frozen=True)
class Points:
    """Linear between (t_s, power_w) points, constant before the first and after the last."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        times = [t_s for t_s, _ in self.points]
        if not times or any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"points need at least one, their times strictly rising: {self}")

    def words(self) -> str:
        return " ".join(["points", *map(str, chain.from_iterable(self.points))])

    def power_w(self, t_s: float) -> float:
        after = bisect_right(self.points, (t_s, math.inf))
        if after in (0, len(self.points)):
            return self.points[max(0, after - 1)][1]
        (a_s, a_w), (b_s, b_w) = self.points[after - 1 : after + 1]
        return a_w + (b_w - a_w) * (t_s - a_s) / (b_s - a_s)

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        # Between two neighbouring knots the trapezoid is exact.
        knots = sorted({t0_s, t1_s, *(t for t, _ in self.points if t0_s < t < t1_s)})
        return sum((b - a) * (self.power_w(a) + self.power_w(b)) / 2 for a, b in pairwise(knots))


@dataclass(frozen=True)
class Followed:
    """Steps in a file to which anybody may append, also while it is read: `follow` does.

    The power of the first step was there before it.
    """

    path: Path

    def __post_init__(self) -> None:
        self.path.touch()

    def follow(self, steps: Iterable[tuple[float, float]]) -> None:
        """Appends steps: from `t_s` on, so many watts; times rise."""
        with self.path.open("ab") as file:
            file.write(b"".join(struct.pack("dd", *step) for step in steps))

    def words(self) -> str:
        return f"follow {self.path}"

    def _steps(self) -> list[tuple[float, float]]:
        data = self.path.read_bytes()
        steps: list[tuple[float, float]] = list(struct.iter_unpack("dd", data))
        return steps

    def power_w(self, t_s: float) -> float:
        steps = self._steps()
        before = bisect_right(steps, (t_s, math.inf))
        return steps[max(0, before - 1)][1]

    def energy_j(self, t0_s: float, t1_s: float) -> float:
        steps = self._steps()
        knots = sorted({t0_s, t1_s, *(t for t, _ in steps if t0_s < t < t1_s)})
        powers = [steps[max(0, bisect_right(steps, (a, math.inf)) - 1)][1] for a in knots[:-1]]
        return sum(p * (b - a) for p, (a, b) in zip(powers, pairwise(knots), strict=True))


TRAINING_LOAD = Path(__file__).parent / "data" / "training_load.csv"
"""CPUs that a small training kept busy, every 20 ms for 30 s (data/record_load.py recorded it)."""


def recorded(
    low_w: float, high_w: float, *, begin_s: float = 0.0, table: Path = TRAINING_LOAD
) -> Points:
    """A recorded load as power: from `low_w` where nothing ran to `high_w` at its busiest.

    `table` has rows of seconds and load, between which power is linear; `begin_s` of it is at 0.
    """
    times_s, loads = _rows(table)
    scale_w = (high_w - low_w) / max(loads)
    watts = (low_w + scale_w * load for load in loads)
    return Points(tuple(zip((t_s - begin_s for t_s in times_s), watts, strict=True)))


@functools.cache
def _rows(table: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    lines = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    rows = [tuple(map(float, line.split(","))) for line in lines[1:]]
    times_s, loads = zip(*rows, strict=True)
    return times_s, loads
