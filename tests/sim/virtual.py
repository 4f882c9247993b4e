"""Sensors in virtual time: what they would have shown at given instants, computed at once.

The waves and boards are those of the live kit, so that a recording of an hour takes milliseconds
and its truth is exact. Arrays of times are seconds since the epoch (n,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import read_gpu_users
from pepr_profiler.energy.gpus import least_working_w
from pepr_profiler.energy.sharing import share
from pepr_profiler.energy.sources import Source
from pepr_profiler.trace.lane import Batch, Channel, LaneInfo
from pepr_profiler.units import NS_PER_S
from sim.nvml import Gpu, Sensor
from sim.waves import Constant, Points, Sine, Square, Step, Wave, recorded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Times = NDArray[np.float64]

READ_NS = 40_000
"""How long a read takes; its value is from the middle of it."""


def cumulative_j(wave: Wave, t_s: Times) -> Times:
    """The energy from some fixed instant to each of `t_s`; only differences mean anything."""
    t_s = np.asarray(t_s, dtype=np.float64)
    if isinstance(wave, Constant):
        return wave.level_w * t_s
    if isinstance(wave, Step):
        since_s = t_s - wave.at_s
        return wave.before_w * np.minimum(since_s, 0) + wave.after_w * np.maximum(since_s, 0)
    if isinstance(wave, Square):
        whole, rest_s = np.divmod(t_s - wave.shift_s, wave.period_s)
        each_s = wave.duty * wave.period_s
        high_s = whole * each_s + np.minimum(rest_s, each_s)
        return wave.low_w * t_s + (wave.high_w - wave.low_w) * high_s
    if isinstance(wave, Sine):
        turn = 2 * np.pi / wave.period_s
        swing_j = -wave.amplitude_w / turn * np.cos(turn * (t_s - wave.shift_s))
        return wave.mean_w * t_s + swing_j
    if isinstance(wave, Points):
        knots_s, power_w = np.array(wave.points).T
        energy_j = np.append(0.0, np.cumsum(np.diff(knots_s) * (power_w[1:] + power_w[:-1]) / 2))
        left = np.clip(np.searchsorted(knots_s, t_s, side="right") - 1, 0, None)
        inside_s = np.clip(t_s, knots_s[0], knots_s[-1]) - knots_s[left]
        slope = np.append(np.diff(power_w) / np.diff(knots_s), 0.0)[left]
        result = energy_j[left] + inside_s * (power_w[left] + slope * inside_s / 2)
        result += np.minimum(t_s - knots_s[0], 0) * power_w[0]
        return result + np.maximum(t_s - knots_s[-1], 0) * power_w[-1]
    raise TypeError(f"no vectorised integral of {type(wave).__name__}")


def bursts(
    random: np.random.Generator,
    t0_s: float,
    t1_s: float,
    *,
    idle_w: float = 60.0,
    busy_w: tuple[float, float] = (150.0, 400.0),
    seconds: tuple[float, float] = (0.05, 0.8),
) -> Points:
    """Random work: bursts of random power and rests, each of random length, edges of 1 us."""
    count = int((t1_s - t0_s) / seconds[0]) + 2
    ends_s = t0_s + np.cumsum(random.uniform(*seconds, count))
    ends_s = ends_s[: int(np.searchsorted(ends_s, t1_s)) + 1]
    level_w = np.where(np.arange(len(ends_s)) % 2, idle_w, random.uniform(*busy_w, len(ends_s)))
    begins_s = np.append(t0_s, ends_s[:-1] + 1e-6)
    knots_s = np.stack((begins_s, ends_s), axis=1).ravel()
    return Points(tuple(zip(knots_s.tolist(), np.repeat(level_w, 2).tolist(), strict=True)))


def _refreshed(t_s: Times, period_s: float, phase_s: float) -> Times:
    return np.floor((t_s - phase_s) / period_s) * period_s + phase_s


def _window_w(gpu: Gpu, t_s: Times, window_s: float) -> Times:
    at_s = _refreshed(t_s, gpu.sensor.refresh_s, gpu.sensor.phase_s)
    energy_j = cumulative_j(gpu.wave, at_s) - cumulative_j(gpu.wave, at_s - window_s)
    return gpu.gain * energy_j / window_s + gpu.offset_w


def instant_mw(gpu: Gpu, t_s: Times) -> Times:
    """The instant power readings, whole mW."""
    return np.floor(1e3 * _window_w(gpu, t_s, gpu.sensor.window_s))


def average_mw(gpu: Gpu, t_s: Times) -> Times:
    """The averaged power readings, whole mW."""
    return np.floor(1e3 * _window_w(gpu, t_s, gpu.sensor.average_s))


_RISE = np.append(0.0, np.geomspace(0.02, 6.0, 24))
_RISE_WEIGHTS = np.diff(-np.exp(-_RISE)) / (1 - np.exp(-_RISE[-1]))


def filtered_mw(gpu: Gpu, t_s: Times, *, time_constant_s: float) -> Times:
    """Readings that approach the power exponentially, as Kepler's do: a mean of past means."""
    at_s = _refreshed(t_s, gpu.sensor.refresh_s, gpu.sensor.phase_s)[:, np.newaxis]
    back_s = _RISE * time_constant_s
    energy_j = -np.diff(cumulative_j(gpu.wave, at_s - back_s), axis=1)
    power_w = energy_j / np.diff(back_s) @ _RISE_WEIGHTS
    return np.floor(1e3 * (gpu.gain * power_w + gpu.offset_w))


def counter_mj(gpu: Gpu, t_s: Times) -> Times:
    """The energy counter, whole mJ; without resets."""
    if gpu.sensor.counter_refresh_s is None:
        raise ValueError("this board has no energy counter")
    at_s = _refreshed(t_s, gpu.sensor.counter_refresh_s, gpu.sensor.phase_s)
    true_j = cumulative_j(gpu.wave, at_s) - cumulative_j(gpu.wave, np.zeros(1))
    seen_j = gpu.counter_gain * true_j + gpu.counter_offset_w * at_s
    return np.floor(gpu.counter_start_mj + 1e3 * seen_j)


def rapl_uj(
    wave: Wave,
    t_s: Times,
    *,
    gain: float = 1.0,
    refresh_s: float = 1e-3,
    unit_j: float = 2.0**-14,
    range_uj: float = 262_143_328_850.0,
    start_uj: float = 0.0,
) -> Times:
    """A RAPL zone's `energy_uj`: refreshed each ms, in the register's unit, wrapped."""
    at_s = _refreshed(t_s, refresh_s, 0.0)
    energy_j = gain * (cumulative_j(wave, at_s) - cumulative_j(wave, np.zeros(1)))
    return np.floor(start_uj + 1e6 * unit_j * np.floor(energy_j / unit_j)) % range_uj


def read_times_s(
    random: np.random.Generator, begin_s: float, end_s: float, *, period_s: float
) -> Times:
    """When a lane of a fixed period reads from `begin_s` to `end_s`, included; a little late."""
    t_s = np.arange(begin_s, end_s, period_s)
    late_s = np.minimum(random.exponential(1e-4, len(t_s)), period_s / 2)
    t_s = t_s + late_s
    return np.append(t_s[t_s < end_s - 1e-3], end_s)


def cadenced_times_s(
    random: np.random.Generator,
    begin_s: float,
    end_s: float,
    *,
    refresh_s: float,
    phase_s: float,
    wasted: float = 0.2,
) -> Times:
    """When a lane reads that follows the refreshes: just after each, and too early now and then."""
    first, last = np.ceil((begin_s - phase_s) / refresh_s), np.floor((end_s - phase_s) / refresh_s)
    at_s = phase_s + refresh_s * np.arange(first, last + 1)
    after_s = at_s + 1e-3 + np.minimum(random.exponential(1e-3, len(at_s)), refresh_s / 4)
    early_s = (at_s - 1e-3)[random.uniform(size=len(at_s)) < wasted]
    t_s = np.sort(np.concatenate((after_s, early_s)))
    return np.concatenate(([begin_s], t_s[(t_s > begin_s) & (t_s < end_s - 1e-3)], [end_s]))


class SteadySpacing:
    """How far apart a lane reads a counter that changes at every read: csrc/sampling/steady.h.

    The spacing doubles, up to four times the base, after 16 steps in a row that lie on a line
    within half of a step at the base. The first step off the line resets it.
    """

    def __init__(self, base_s: float) -> None:
        self._base_s = self._spacing_s = base_s
        self._slope = 0.0  # per s
        self._steps_on_line = 0

    def next_s(self, step: float, since_s: float) -> float:
        """The time until the next read, after a step of the counter within `since_s`."""
        off = abs(step - self._slope * since_s)
        if off > 0.5 * self._slope * self._base_s:
            self._spacing_s, self._steps_on_line = self._base_s, 0
        else:
            self._steps_on_line += 1
            if self._steps_on_line == 16:
                self._spacing_s = min(2 * self._spacing_s, 4 * self._base_s)
                self._steps_on_line = 0
        self._slope = step / since_s
        return self._spacing_s


def steady_times_s(
    random: np.random.Generator, begin_s: float, end_s: float, *, wave: Wave, base_s: float = 0.02
) -> Times:
    """When a lane reads a counter that changes at every read: less often while power is steady.

    From 1 s on it shares the wake-ups of another lane, which reads each 0.1 s: it reads earlier by
    up to five eighths of its spacing, or later by up to three.
    """
    grid_s = np.arange(begin_s, end_s, 1e-3)
    energy_j = cumulative_j(wave, grid_s)
    late_s = np.minimum(random.exponential(1e-4, len(grid_s)), base_s / 4)
    phase_s = random.uniform(0, 0.1)
    spacing = SteadySpacing(base_s)
    times, reached_j, gap_s = [begin_s], float(energy_j[0]), base_s
    while True:
        t_s = times[-1] + gap_s
        other_s = np.floor((t_s + 3 / 8 * gap_s - phase_s) / 0.1) * 0.1 + phase_s
        if t_s > begin_s + 1.0 and other_s >= t_s - 5 / 8 * gap_s:
            t_s = float(other_s)
        if t_s >= end_s - 2e-3:
            return np.append(times, end_s)
        times.append(t_s + float(late_s[len(times)]))
        now_j = float(energy_j[int((times[-1] - begin_s) / 1e-3)])
        gap_s = spacing.next_s(now_j - reached_j, times[-1] - times[-2])
        reached_j = now_j


def batch(t_s: Times, *columns: Times) -> Batch:
    """Reads around `t_s` as a lane's rows, one column a channel, in raw units."""
    t_ns = np.round(np.asarray(t_s) * 1e9).astype(np.int64) + EPOCH_NS - READ_NS // 2
    return Batch(t_ns, np.full(len(t_ns), READ_NS, np.int64), np.array(columns, np.float64))


EPOCH_NS = 1_000_000_000_000
"""The kit's epoch in CLOCK_MONOTONIC time."""


def instant_ns(t_s: float) -> int:
    """A time of the kit as the recording has it."""
    return EPOCH_NS + round(t_s * 1e9)


_NVML = {
    "nvml-energy": ("energy", "J", True),
    "nvml-power": ("power", "W", False),
    "nvml-power-average": ("power", "W", False),
    "nvml-power-instant": ("power", "W", False),
}


def nvml_lane(
    *sources: str, model: str = "NVIDIA GPU", period_s: float = 0.05, limit_w: str = ""
) -> LaneInfo:
    """A lane with these readings of one board, whose stated limit is `limit_w`."""
    labels = {"uuid": "GPU-1", "model": model, "index": "0"}
    if limit_w:
        labels["limit_w"] = limit_w
    channels = tuple(
        Channel(f"GPU-1/{name}", *_NVML[name][:2], 1e-3, 0.0, _NVML[name][2], name, dict(labels))
        for name in sources
    )
    return LaneInfo("nvml", "nvml", round(period_s * 1e9), channels)


def rapl_lane(*, range_uj: float = 262_143_328_850.0, period_s: float = 0.02) -> LaneInfo:
    """A lane with one package."""
    labels = {"zone": "intel-rapl:0", "name": "package-0"}
    channel = Channel("p", "energy", "J", 1e-6, range_uj, True, "powercap", labels)
    return LaneInfo("powercap", "powercap", round(period_s * 1e9), (channel,))


@dataclass(frozen=True)
class SensorClass:
    """A class of MEASUREMENT.md, B: the source it is recorded as, and how it looks at power."""

    source: str
    sensor: Sensor | None
    rise_s: tuple[float, float] | None = None
    counter: bool = False


CLASSES: Mapping[str, SensorClass] = {
    "kepler": SensorClass("nvml-power", Sensor(0.1, 0.001), rise_s=(0.09, 0.48)),
    "pascal, volta": SensorClass("nvml-power", Sensor(0.02, 0.01)),
    "turing": SensorClass("nvml-power", Sensor(0.1, 0.1)),
    "ampere instant": SensorClass("nvml-power-instant", Sensor(0.1, 0.1)),
    "ampere average": SensorClass("nvml-power-average", Sensor(0.1, 0.1)),
    "a100": SensorClass("nvml-power", Sensor(0.1, 0.025)),
    "h100 instant": SensorClass("nvml-power-instant", Sensor(0.1, 0.025)),
    "h100 average": SensorClass("nvml-power-average", Sensor(0.1, 0.025)),
    "counter 20 ms": SensorClass("nvml-energy", Sensor(counter_refresh_s=0.02), counter=True),
    "counter 100 ms": SensorClass("nvml-energy", Sensor(counter_refresh_s=0.1), counter=True),
    "rapl": SensorClass("powercap", None, counter=True),
}

LEAD_S, TAIL_S = 0.3, 0.21
"""A lane begins to read this long before the window. One that follows refreshes goes on for two of
them behind its end, one of a fixed period ends with it."""

GAIN, OFFSET_W = 0.037, 5.9
"""Spread of GPU boards against an external meter (SC24): gradient and offset."""

RAPL_GAIN = 0.03
"""Of Intel server packages (judgement)."""


@dataclass(frozen=True)
class Run:
    """A recording of one source in virtual time, and its truth."""

    lane: LaneInfo
    batches: tuple[Batch, ...]
    wave: Wave
    begin_s: float
    end_s: float
    gain: float
    offset_w: float

    def truth_j(self, t0_s: float | None = None, t1_s: float | None = None) -> float:
        """The energy that was really taken, in the whole window or a part of it."""
        begin_s = self.begin_s if t0_s is None else t0_s
        end_s = self.end_s if t1_s is None else t1_s
        return float(np.diff(cumulative_j(self.wave, np.array([begin_s, end_s])))[0])

    def board_j(self, t0_s: float | None = None, t1_s: float | None = None) -> float:
        """What a perfect integration of this board's readings gives: gain and offset included."""
        seconds = (self.end_s if t1_s is None else t1_s) - (self.begin_s if t0_s is None else t0_s)
        return self.gain * self.truth_j(t0_s, t1_s) + self.offset_w * seconds


def record(
    kind: SensorClass,
    wave: Wave,
    random: np.random.Generator,
    *,
    begin_s: float = 0.0,
    end_s: float = 20.0,
    gain_u: float | None = None,
    cadenced: bool = False,
    period_s: float | None = None,
) -> Run:
    """One run on a board drawn at random: gain and offset, refresh period and phase."""
    first_s, last_s = begin_s - LEAD_S, end_s + (TAIL_S if cadenced else 0.0)
    if gain_u is None:
        gain_u = RAPL_GAIN if kind.sensor is None else GAIN
    gain = 1 + gain_u * random.standard_normal()
    if kind.sensor is None:
        if cadenced:
            wave_t = steady_times_s(random, first_s, last_s, wave=wave, base_s=period_s or 0.02)
        else:
            wave_t = read_times_s(random, first_s, last_s, period_s=period_s or 0.02)
        start_uj = random.uniform(0, 262e9)
        refresh_s = random.uniform(0.95e-3, 1.05e-3)  # in step with nobody's reads
        column = rapl_uj(wave, wave_t, gain=gain, refresh_s=refresh_s, start_uj=start_uj)
        lane = rapl_lane(period_s=period_s or 0.02)
        return Run(lane, (batch(wave_t, column),), wave, begin_s, end_s, gain, 0.0)
    offset_w = 0.0 if kind.counter else OFFSET_W * random.standard_normal()
    stretch = random.uniform(0.99, 1.04)  # SC24: 99 to 104 ms
    sensor = kind.sensor
    refresh_s = sensor.refresh_s * stretch
    counter_s = (sensor.counter_refresh_s or 0.1) * stretch
    shown_s = counter_s if kind.counter else refresh_s
    phase_s = random.uniform(0, shown_s)
    look = Sensor(refresh_s, sensor.window_s, counter_refresh_s=counter_s, phase_s=phase_s)
    gpu = Gpu(wave, sensor=look, gain=gain, offset_w=offset_w, counter_gain=gain)
    if cadenced:
        t_s = cadenced_times_s(random, first_s, last_s, refresh_s=shown_s, phase_s=phase_s)
    else:
        t_s = read_times_s(random, first_s, last_s, period_s=period_s or 0.05)
    show: Callable[[Gpu, Times], Times] = instant_mw
    if kind.rise_s:
        # 10 to 90 % of an exponential rise are 2.2 time constants.
        column = filtered_mw(gpu, t_s, time_constant_s=random.uniform(*kind.rise_s) / 2.2)
    else:
        if kind.counter:
            show = counter_mj
        elif kind.source == "nvml-power-average":
            show = average_mw
        column = show(gpu, t_s)
    lane = nvml_lane(kind.source, period_s=period_s or 0.05)
    return Run(lane, (batch(t_s, column),), wave, begin_s, end_s, gain, offset_w)


def loads(random: np.random.Generator, end_s: float) -> Iterator[tuple[str, Wave]]:
    """One wave of each kind, drawn at random: what a training's power may look like."""
    low_w, high_w = sorted(random.uniform(60, 420, 2).tolist())
    yield "constant", Constant(high_w)
    before_w, after_w = random.permutation([low_w, high_w]).tolist()
    yield "step", Step(random.uniform(0.1, 0.9) * end_s, before_w, after_w)
    period_s = float(np.exp(random.uniform(np.log(0.35), np.log(5.0))))
    shift_s = random.uniform(0, period_s)
    yield "square", Square(period_s, low_w, high_w, random.uniform(0.2, 0.8), shift_s)
    half_w = (high_w - low_w) / 2
    yield "sine", Sine(low_w + half_w, half_w, period_s, shift_s)
    yield "bursty", bursts(random, -2.0, end_s + 1)
    yield "recorded", recorded(low_w, high_w, begin_s=random.uniform(1.0, 9.0))


@dataclass(frozen=True)
class Board:
    """A board whose windows hold few refreshes: its counter beside its power, or only its power.

    `counter_s` is the refresh period of its energy counter, None: it has none. `power` is the
    source of its power readings, `limit_w` the limit that NVML states.
    `time_constant_s` makes the readings lag exponentially.
    """

    counter_s: float | None = 0.1
    power: str = "nvml-power-instant"
    window_s: float = 0.025
    time_constant_s: float | None = None
    limit_w: str = "400"
    model: str = "NVIDIA H100 80GB HBM3"


GAUGES_S = 0.2
"""How often the power of a board with a counter is read (csrc/sensors/nvml.cpp)."""


def record_board(
    board: Board,
    wave: Wave,
    random: np.random.Generator,
    *,
    begin_s: float = 0.0,
    end_s: float,
    lead_s: float = LEAD_S,
    tail_s: float | None = None,
    gain_u: float = GAIN,
) -> Run:
    """One run on a board drawn at random, read as the product reads it.

    Each 20 ms, or each 16th of a refresh period, until seven refreshes were seen; then just after
    each. `tail_s` is how long it is read behind the end: two refreshes, but 0.25 s at most, or
    one, if that takes 1 s at most.
    """
    stretch = random.uniform(0.99, 1.04)
    counter_s = None if board.counter_s is None else board.counter_s * stretch
    power_s = 0.1 * random.uniform(0.99, 1.04)
    shown_s = counter_s or power_s
    phase_s = random.uniform(0, shown_s)
    first_s = begin_s - lead_s
    if tail_s is None:
        tail_s = max(min(2.1 * shown_s, 0.25), min(1.1 * shown_s, 1.1))
    last_s = end_s + tail_s
    learnt_s = min(phase_s + shown_s * (np.ceil((first_s - phase_s) / shown_s) + 6), last_s)
    t_s = read_times_s(random, first_s, learnt_s, period_s=max(0.02, shown_s / 16))
    if shown_s <= 0.025:  # all reads bring news: it is read each 20 ms
        t_s = read_times_s(random, first_s, last_s, period_s=0.02)
    elif learnt_s < last_s:
        later_s = cadenced_times_s(random, learnt_s, last_s, refresh_s=shown_s, phase_s=phase_s)
        t_s = np.append(t_s[:-1], later_s)
    gain = 1 + gain_u * random.standard_normal()
    offset_w = OFFSET_W * random.standard_normal() if gain_u and counter_s is None else 0.0
    look = Sensor(power_s, board.window_s, counter_refresh_s=counter_s, phase_s=phase_s)
    gpu = Gpu(wave, sensor=look, gain=gain, offset_w=offset_w, counter_gain=gain)
    asked_s = t_s
    if counter_s is not None:  # power keeps its value for 0.2 s
        asked = np.floor((t_s - first_s) / GAUGES_S)
        asked_s = t_s[np.searchsorted(asked, asked)]
        asked_s[-1] = t_s[-1]
    if board.time_constant_s is not None:
        watts = filtered_mw(gpu, asked_s, time_constant_s=board.time_constant_s)
    elif board.power == "nvml-power-instant":
        watts = instant_mw(gpu, asked_s)
    else:
        watts = average_mw(gpu, asked_s)
    columns, sources = [watts], [board.power]
    if counter_s is not None:
        columns, sources = [counter_mj(gpu, t_s), *columns], ["nvml-energy", *sources]
    lane = nvml_lane(*sources, model=board.model, period_s=0.02, limit_w=board.limit_w)
    return Run(lane, (batch(t_s, *columns),), wave, begin_s, end_s, gain, offset_w)


def window_loads(random: np.random.Generator, end_s: float) -> Iterator[tuple[str, Wave]]:
    """Loads whose power changes within a refresh, and one that does not."""
    yield "bursts", bursts(random, -2.0, end_s + 2, seconds=(0.005, 0.3))
    yield "37 ms", Square(0.037, 80.0, 400.0, shift_s=random.uniform(0, 0.037))
    yield "50 ms", Square(0.05, 80.0, 400.0, random.uniform(0.2, 0.8), random.uniform(0, 0.05))
    period_s = random.uniform(0.35, 2.0)
    yield "steps", Square(period_s, 80.0, 400.0, random.uniform(0.2, 0.8), random.uniform(0, 1))
    yield "bursts 0.05-0.8", bursts(random, -2.0, end_s + 2)


def visit(
    random: np.random.Generator, *, idle_w: float, busy_w: float
) -> tuple[float, float, float]:
    """A job's visit of 1 to 5 s to a GPU whose list is read each 0.5 s.

    Returns the job's energy as it is shared, its u (k = 2) by the sharing, and the truth, J.
    """
    begin_s, span_s = random.uniform(1.5, 4.0), random.uniform(1.0, 5.0)
    at_s = np.arange(0.0, 12.001, 0.05)
    inside_s = np.clip(at_s - begin_s, 0.0, span_s)
    at_ns = np.round(at_s * NS_PER_S).astype(np.int64)
    source = Source("gpu:GPU-1", "gpu", "x", "lane", 0, "test", counter=True)
    energy_j = idle_w * at_s + (busy_w - idle_w) * inside_s
    curve = EnergyCurve(source, energy_j, 0, int(at_ns[-1]))
    read_s = np.arange(random.uniform(0.0, 0.5), 12.0, 0.5)
    there = ((read_s >= begin_s) & (read_s < begin_s + span_s)).astype(float)
    names = ("processes", "pid0", "memory0")
    lane = LaneInfo(
        "nvml-processes",
        "nvml-processes",
        NS_PER_S // 2,
        tuple(Channel(f"GPU-1/{name}", "x", "1", labels={"uuid": "GPU-1"}) for name in names),
    )
    rows = Batch(
        np.round(read_s * NS_PER_S).astype(np.int64),
        np.zeros(len(read_s), np.int64),
        np.array([there, 7 * there, there]),
    )
    note = {"event": "process", "t_ns": int(begin_s * NS_PER_S), "pid": 7, "owner": "job"}
    users = read_gpu_users(lane, [rows], [note], begin_ns=0, end_ns=12 * NS_PER_S)["GPU-1"]
    shares = share(curve, at_ns, None, users, most_idle_w=least_working_w({}))
    job_j = float(shares.job_j[-1])
    return job_j, 2 * shares.u_j(job_j, duration_s=12.0), busy_w * span_s
