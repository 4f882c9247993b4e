"""The stated interval holds the truth as often as it says, over random boards and loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sim import virtual
from sim.nvml import A100, Gpu, Scenario
from sim.waves import Constant, Points, Sine, Square, Step, Wave, recorded

from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.power import duty_coefficient
from pepr_profiler.energy.sources import Source, find_cross_sources, find_sources
from pepr_profiler.energy.uncertainty import (
    UncertaintyBudget,
    budget,
    combined_u_j,
    cross_check,
    likeness,
)
from pepr_profiler.trace.lane import LINE_STEPS, Batch, LaneReader, LaneWriter


def measured(run: virtual.Run, *edges_s: float) -> tuple[EnergyCurve, np.ndarray]:
    """A virtual recording through the product's own way, at the edges."""
    (source,) = find_sources([run.lane], cpu_vendor="GenuineIntel")
    at_ns = np.array([virtual.instant_ns(edge_s) for edge_s in edges_s])
    return integrate(run.batches, [source], at_ns)[0], at_ns


def whole(curve: EnergyCurve, at_ns: np.ndarray) -> UncertaintyBudget:
    return budget(curve, at_ns, np.array([0]), np.array([len(at_ns) - 1]))


def energy_j(curve: EnergyCurve) -> float:
    return float(curve.energy_j[-1] - curve.energy_j[0])


# --- the kit itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wave",
    [
        Constant(250.0),
        Step(1.3, 80.0, 300.0),
        Square(0.37, 60.0, 310.0, 0.3, 0.11),
        Sine(200.0, 90.0, 0.8, 0.2),
        Points(((0.2, 50.0), (0.9, 300.0), (2.0, 120.0))),
        virtual.bursts(np.random.default_rng(2), -1.0, 6.0),
        recorded(60.0, 400.0, begin_s=3.0),
    ],
)
def test_virtual_time_integrates_waves_exactly(wave: Wave) -> None:
    random = np.random.default_rng(1)
    for t0_s, t1_s in np.sort(random.uniform(-0.5, 5.0, (20, 2)), axis=1):
        steps = np.diff(virtual.cumulative_j(wave, np.array([t0_s, t1_s])))
        assert steps[0] == pytest.approx(wave.energy_j(t0_s, t1_s), rel=1e-9, abs=1e-6)


def test_virtual_readings_are_those_of_the_simulated_library() -> None:
    # given a board with errors of its own
    gpu = Gpu(Square(0.37, 60, 310), sensor=A100, gain=1.03, offset_w=-4.0, counter_gain=0.98)
    scenario = Scenario(gpus=(gpu,), epoch_ns=0)
    t_s = np.random.default_rng(3).uniform(0, 5, 50)
    # then both kits read alike, but for rounding
    for live, vectorised in [
        (scenario.counter_mj, virtual.counter_mj(gpu, t_s)),
        (lambda t_ns: 1e3 * scenario.instant_w(t_ns), virtual.instant_mw(gpu, t_s)),
        (lambda t_ns: 1e3 * scenario.average_w(t_ns), virtual.average_mw(gpu, t_s)),
    ]:
        expected = [live(round(t * 1e9)) for t in t_s]
        assert vectorised == pytest.approx(expected, abs=1.5)


# --- coverage -------------------------------------------------------------------------------------

# As many runs as show a term that is missing. How often exactly intervals hold is printed from
# thousands by benchmarks/accuracy.py.


@pytest.mark.parametrize("runs", [10, pytest.param(40, marks=pytest.mark.long)])  # a load
@pytest.mark.parametrize("name", virtual.CLASSES)
@pytest.mark.parametrize("cadenced", [False, True])
def test_the_interval_holds_the_truth_as_often_as_it_says(
    name: str, cadenced: bool, runs: int
) -> None:
    # given boards drawn from the published spreads, under loads of every kind, for 20 s
    random = np.random.default_rng([11, cadenced, *name.encode()])
    distances = []
    for _ in range(runs):
        for _, wave in virtual.loads(random, 20.0):
            run = virtual.record(virtual.CLASSES[name], wave, random, cadenced=cadenced)
            curve, at_ns = measured(run, 0.0, 20.0)
            error_j = energy_j(curve) - run.truth_j()
            distances.append(abs(error_j) / (2 * whole(curve, at_ns).u_j))
    # then 93 to 99 % lie within, as far as so few runs can tell (3 standard deviations)
    count = len(distances)
    covered = float(np.mean(np.array(distances) <= 1))
    assert covered >= 0.93 - 3 * math.sqrt(0.93 * 0.07 / count)
    assert covered <= 0.99 + 3 * math.sqrt(0.99 * 0.01 / count)
    # and an interval much narrower would not do
    assert 1 / np.quantile(distances, 0.95) <= 1.5


@pytest.mark.parametrize("name", ["a100", "h100 average", "counter 20 ms", "counter 100 ms"])
def test_without_gain_and_offset_the_other_terms_hold_too(name: str) -> None:
    # given boards without errors of their own under bursts: what is left is the sensor's sampling
    random = np.random.default_rng([12, *name.encode()])
    inside = []
    for _ in range(60):
        wave = virtual.bursts(random, -2.0, 6.0)
        run = virtual.record(virtual.CLASSES[name], wave, random, end_s=5.0, cadenced=True)
        curve, at_ns = measured(run, 0.0, 5.0)
        terms = whole(curve, at_ns)._asdict() | {"gain_j": 0.0, "offset_j": 0.0}
        error_j = energy_j(curve) - run.board_j()
        inside.append(abs(error_j) <= 2 * math.hypot(*terms.values()))
    assert np.mean(inside) >= 0.82


def test_bursts_seen_a_quarter_of_the_time_are_within_3_percent() -> None:
    random = np.random.default_rng(13)
    errors = []
    for _ in range(40):
        wave = virtual.bursts(random, -2.0, 21.0)
        run = virtual.record(virtual.CLASSES["a100"], wave, random)
        curve, _ = measured(run, 0.0, 20.0)
        errors.append(abs(energy_j(curve) - run.board_j()) / run.truth_j())
    assert np.median(errors) <= 0.03


@pytest.mark.parametrize("learns", [False, True])
def test_phases_behind_rapl_are_as_sure_as_they_say(learns: bool) -> None:
    # given phases of 0.05 to 0.5 s under loads of every kind, after seconds in which a lane may
    # have learnt that power is steady
    random = np.random.default_rng([21, learns])
    distances = []
    for _ in range(8):
        for _, wave in virtual.loads(random, 12.0):
            run = virtual.record(
                virtual.CLASSES["rapl"], wave, random, end_s=12.0, gain_u=0.0, cadenced=learns
            )
            begins_s = random.uniform(4.0, 11.4, 4)
            ends_s = begins_s + np.exp(random.uniform(np.log(0.05), np.log(0.5), 4))
            for edges_s in zip(begins_s, ends_s, strict=True):
                curve, at_ns = measured(run, *edges_s)
                u_j = whole(curve, at_ns)._replace(gain_j=0.0).u_j
                distances.append(abs(energy_j(curve) - run.truth_j(*edges_s)) / (2 * u_j))
    # then it is neither too sure of them, nor far too unsure
    assert np.mean(np.array(distances) <= 1) >= 0.93
    assert 1 / np.quantile(distances, 0.95) <= 2.0


def stored(run: virtual.Run, directory: Path) -> tuple[Batch, ...]:
    """The recording as it is on disk."""
    directory.mkdir(exist_ok=True)
    writer = LaneWriter(directory, run.lane)
    (rows,) = run.batches
    writer.write(
        rows.t_ns.tobytes(), rows.read_ns.astype(np.uint32).tobytes(), [rows.values[0].tobytes()]
    )
    writer.close()
    return tuple(LaneReader(directory, run.lane.name))


@pytest.mark.parametrize("name", ["counter 100 ms", "rapl"])
def test_phases_of_a_thinned_recording_are_as_sure_as_they_say(tmp_path: Path, name: str) -> None:
    # given ten minutes of long steps, unsteady by 4 % each 0.3 s
    random = np.random.default_rng([20, *name.encode()])
    knots_s = np.arange(-2.0, 602.0, 0.3)
    level_w = np.where(np.floor(knots_s / 17) % 2 == 0, 400.0, 90.0)
    watts = level_w * (1 + 0.04 * random.standard_normal(len(knots_s)))
    wave = Points(tuple(zip(knots_s.tolist(), watts.tolist(), strict=True)))
    kind = virtual.CLASSES[name]
    run = virtual.record(kind, wave, random, end_s=600.0, gain_u=0.0, cadenced=True)
    # when it is written, and read back with most rows left out
    thinned = stored(run, tmp_path)
    assert sum(len(batch.t_ns) for batch in thinned) < 0.5 * len(run.batches[0].t_ns)
    # then phases anywhere in it are known as well as they say
    begins_s = np.sort(random.uniform(30.0, 590.0, 400))
    ends_s = begins_s + random.uniform(0.2, 5.0, 400)
    edges_s = np.sort(np.concatenate((begins_s, ends_s)))
    curve, at_ns = measured(replace(run, batches=thinned), *edges_s)
    begins, ends = np.searchsorted(edges_s, begins_s), np.searchsorted(edges_s, ends_s)
    inside = []
    for begin, end in zip(begins, ends, strict=True):
        terms = budget(curve, at_ns, np.array([begin]), np.array([end]))
        error_j = curve.energy_j[end] - curve.energy_j[begin]
        error_j -= run.truth_j(edges_s[begin], edges_s[end])
        inside.append(abs(error_j) <= 2 * terms._replace(gain_j=0.0).u_j)
    assert np.mean(inside) >= 0.93


def test_phases_that_begin_where_steady_power_steps_keep_their_energy(tmp_path: Path) -> None:
    # given half a minute of steady power, in which RAPL is read every 0.1 s
    random = np.random.default_rng(22)
    raw_j, stored_j, truth_j = [], [], []
    for number in range(30):
        step_s = 30 + random.uniform(0, 1)
        wave = Step(step_s, *random.permutation([100.0, 250.0]).tolist())
        run = virtual.record(
            virtual.CLASSES["rapl"], wave, random, end_s=40.0, gain_u=0.0, cadenced=True
        )
        assert np.diff(run.batches[0].t_ns).max() > 70e6
        # when phases of 0.2 s begin about there
        begin_s = step_s + random.uniform(-0.01, 0.01)
        edges_s = (begin_s, begin_s + 0.2)
        on_disk = replace(run, batches=stored(run, tmp_path / str(number)))
        raw_j.append(energy_j(measured(run, *edges_s)[0]))
        stored_j.append(energy_j(measured(on_disk, *edges_s)[0]))
        truth_j.append(run.truth_j(*edges_s))
    # then energy tells where in that time power jumped, beside what a stored line may be off by
    assert raw_j == pytest.approx(truth_j, rel=0.02)
    off_j = np.abs(np.subtract(stored_j, truth_j))
    assert np.quantile(off_j / truth_j, 0.9) <= 0.02
    assert off_j.max() <= LINE_STEPS * 0.02 * 250 * 1.1


@pytest.mark.parametrize("name", ["counter 20 ms", "counter 100 ms"])
def test_phases_that_follow_each_other_are_as_sure_as_the_whole(name: str) -> None:
    # given bursts, and a phase of 130 ms that follows itself 20 times, beside gain
    random = np.random.default_rng([19, *name.encode()])
    inside, narrower = [], []
    for _ in range(60):
        wave = virtual.bursts(random, -2.0, 5.0)
        run = virtual.record(
            virtual.CLASSES[name], wave, random, end_s=4.0, gain_u=0.0, cadenced=True
        )
        begin_s = random.uniform(0.5, 0.7)
        edges_s = begin_s + 0.13 * np.arange(21)
        curve, at_ns = measured(run, *edges_s)
        # when they are taken together
        together = budget(curve, at_ns, np.arange(20), np.arange(1, 21))
        error_j = energy_j(curve) - run.truth_j(edges_s[0], edges_s[-1])
        inside.append(abs(error_j) <= 2 * together._replace(gain_j=0.0).u_j)
        # then only the first and the last edge count
        assert together.edges_j == pytest.approx(whole(curve, at_ns).edges_j)
        # and every other one, whose edges are all its own, is less sure
        apart = budget(curve, at_ns, np.arange(0, 20, 2), np.arange(1, 21, 2))
        narrower.append(together.edges_j / apart.edges_j)
    assert np.mean(inside) >= 0.93
    assert np.median(narrower) <= 0.5


@pytest.mark.parametrize("name", [n for n, kind in virtual.CLASSES.items() if kind.counter])
def test_short_phases_behind_a_counter_are_within_5_percent(name: str) -> None:
    # given 300 W and phases of 200 ms that begin anywhere
    random = np.random.default_rng([14, *name.encode()])
    for _ in range(10):
        run = virtual.record(
            virtual.CLASSES[name], Constant(300.0), random, end_s=6.0, gain_u=0.0, cadenced=True
        )
        begins_s = random.uniform(0.0, 5.8, 20)
        edges_s = np.sort(np.concatenate((begins_s, begins_s + 0.2)))
        curve, _ = measured(run, *edges_s)
        ends_j = curve.energy_j[np.searchsorted(edges_s, begins_s + 0.2)]
        phases_j = ends_j - curve.energy_j[np.searchsorted(edges_s, begins_s)]
        assert phases_j == pytest.approx(np.full(20, 60.0), rel=0.05)


# --- the terms ------------------------------------------------------------------------------------


def test_the_duty_coefficient_is_that_of_simulated_loads() -> None:
    # given loads that hold a random power for a random time around a mean time
    random = np.random.default_rng(15)
    for mean_s in (0.02, 0.1, 0.5, 2.0):
        # exponential holding times are exponential autocorrelation
        ends_s = np.cumsum(random.exponential(mean_s, int(4000 / mean_s)))
        levels = random.standard_normal(len(ends_s))
        knots_j = np.append(0.0, np.cumsum(levels * np.diff(ends_s, prepend=0.0)))
        at_s = 0.1 * np.arange(1, int(ends_s[-1] / 0.1) - 1)

        def integral(t_s: np.ndarray) -> np.ndarray:
            return np.interp(t_s, np.append(0.0, ends_s), knots_j)  # noqa: B023

        readings = (integral(at_s) - integral(at_s - 0.025)) / 0.025
        # when the error of 10 s of readings is compared with what their changes say
        block = 100
        count = len(readings) // block
        ours = 0.1 * readings[: count * block].reshape(count, block).sum(axis=1)
        edges_s = (
            at_s[: count * block : block] - 0.0625
        )  # the middle of a window, half a period back
        truth = np.diff(integral(np.append(edges_s, edges_s[-1] + block * 0.1)))
        one, two = (float(np.mean((readings[n:] - readings[:-n]) ** 2)) for n in (1, 2))
        expected = duty_coefficient(one, two) * one * 0.1**2 * block
        # then the variance is the expected one, but for chance and the blocks' own edges
        assert float(np.var(ours - truth)) == pytest.approx(expected, rel=0.3)


def test_a_load_in_step_with_the_refreshes_is_noticed() -> None:
    random = np.random.default_rng(16)
    kind = virtual.CLASSES["a100"]
    run = virtual.record(kind, Square(0.2, 100, 350, 0.4), random, gain_u=0.0)
    refresh_s = measured(run, 0.0, 20.0)[0].refresh_s
    # given a load of exactly two refreshes (a board's own draw decides how long those are)
    random = np.random.default_rng(16)
    run = virtual.record(kind, Square(2 * refresh_s, 100, 350, 0.4), random, gain_u=0.0)
    curve, at_ns = measured(run, 0.0, 20.0)
    assert curve.aliased
    assert whole(curve, at_ns).aliasing_j == pytest.approx(0.2 * energy_j(curve))


def test_training_like_loads_are_not_suspected_of_aliasing() -> None:
    random = np.random.default_rng(17)
    noticed = 0
    for _ in range(10):
        for _, wave in virtual.loads(random, 20.0):
            for cadenced in (False, True):
                run = virtual.record(virtual.CLASSES["a100"], wave, random, cadenced=cadenced)
                noticed += measured(run, 0.0, 20.0)[0].aliased
    assert noticed <= 1  # of 120


def test_a_gap_in_power_readings_widens_u_and_one_in_a_counter_does_not() -> None:
    t_s = np.arange(0, 20, 0.1)
    watts = 200 + 50 * np.sign(np.sin(t_s))
    holes = np.where((t_s > 8) & (t_s < 13), np.nan, watts)
    at_ns = np.array([virtual.instant_ns(1.0), virtual.instant_ns(19.0)])
    source = Source("gpu:x", "gpu", "x", "lane", 0, "test", counter=False, period_s=0.1)
    (curve,) = integrate([virtual.batch(t_s, holes)], [source], at_ns)
    gap_s = curve.longest_gap_s
    assert whole(curve, at_ns).gaps_j == pytest.approx(gap_s * 100 / math.sqrt(12), rel=0.05)
    joules = np.where(np.isnan(holes), np.nan, np.cumsum(watts) * 0.1)
    source = Source("gpu:x", "gpu", "x", "lane", 0, "test", counter=True, period_s=0.1)
    (curve,) = integrate([virtual.batch(t_s, joules)], [source], at_ns)
    assert whole(curve, at_ns).gaps_j == 0


def test_a_coarse_counter_is_uncertain_by_its_resolution() -> None:
    # given whole joules in units of 1 uJ, as some servers' psys
    t_s = np.arange(0, 30, 0.02)
    microjoules = 1e6 * np.floor(37.3 * t_s)
    source = Source("other:psys", "other", "x", "l", 0, "test", True, 1e-6, period_s=0.02)
    at_ns = np.array([virtual.instant_ns(1.0), virtual.instant_ns(29.0)])
    (curve,) = integrate([virtual.batch(t_s, microjoules)], [source], at_ns)
    assert whole(curve, at_ns).quantisation_j == pytest.approx(1 / math.sqrt(6))


# --- two sources of one device --------------------------------------------------------------------


def both(gain: float, wave: Wave, seed: int) -> tuple[float, float]:
    """Difference of power from counter and its u, of a board whose power reads `gain` too high."""
    random = np.random.default_rng(seed)
    gpu = Gpu(wave, gain=gain)
    t_s = virtual.read_times_s(random, -0.3, 20.0, period_s=0.05)
    lane = virtual.nvml_lane("nvml-energy", "nvml-power-average")
    batch = virtual.batch(t_s, virtual.counter_mj(gpu, t_s), virtual.average_mw(gpu, t_s))
    sources = find_sources([lane])
    at_ns = np.array([virtual.instant_ns(0.0), virtual.instant_ns(20.0)])
    curves = integrate([batch], [*sources, *find_cross_sources([lane], sources)], at_ns)
    check = cross_check(*curves, at_ns)
    assert check is not None
    assert (check.source, curves[1].source.in_total) == ("nvml-power-average", False)
    assert check.difference_j == pytest.approx(check.energy_j - energy_j(curves[0]))
    return check.difference_j, check.u_j


WAVES: list[Callable[[np.random.Generator], Wave]] = [
    lambda random: Constant(random.uniform(100, 400)),
    lambda random: virtual.bursts(random, -2.0, 21.0),
]


@pytest.mark.parametrize("draw", WAVES)
def test_power_and_counter_that_agree_raise_no_doubt(
    draw: Callable[[np.random.Generator], Wave],
) -> None:
    random = np.random.default_rng(18)
    for seed in range(20):
        difference_j, u_j = both(1.0, draw(random), seed)
        assert abs(difference_j) <= u_j


def test_power_and_counter_that_disagree_do() -> None:
    # given 327 W where the counter has 187 (zeus issue 181)
    difference_j, u_j = both(327 / 187, Constant(187.0), 1)
    assert difference_j == pytest.approx(20 * 140.0, rel=0.01)
    assert difference_j > u_j


# --- windows that hold few refreshes --------------------------------------------------------------


def distances(
    board: virtual.Board, load: str, seconds: float, *, runs: int, seed: int, short: bool = False
) -> np.ndarray:
    """How far phases anywhere in a run, or short runs, are from the truth, in interval halves."""
    random = np.random.default_rng([seed, *load.encode()])
    found = []
    for _ in range(runs):
        wave = dict(virtual.window_loads(random, 8.0))[load]
        begin_s = random.uniform(1.0, 7.5 - seconds)
        edges_s = (begin_s, begin_s + seconds)
        if short:
            run = virtual.record_board(
                board, wave, random, begin_s=edges_s[0], end_s=edges_s[1], gain_u=0.0,
                lead_s=random.uniform(0.05, 0.15),
            )  # fmt: skip
        else:
            run = virtual.record_board(board, wave, random, end_s=8.0, gain_u=0.0)
        curve, at_ns = measured(run, *edges_s)
        u_j = whole(curve, at_ns)._replace(gain_j=0.0, offset_j=0.0).u_j
        found.append(abs(energy_j(curve) - run.truth_j(*edges_s)) / (2 * u_j))
    return np.array(found)


@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("load", ["bursts", "37 ms", "steps"])
def test_single_phases_shorter_than_a_refresh_hold_the_truth(load: str, seconds: float) -> None:
    # given power that changes within a refresh of 100 ms, beside gain
    found = distances(virtual.Board(0.1), load, seconds, runs=50, seed=30)
    # then as many intervals hold the truth (0.61 to 0.94 did)
    assert np.mean(found <= 1) >= (0.9 if load == "37 ms" else 0.93)


@pytest.mark.parametrize("counter_s", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("load", ["bursts", "37 ms", "steps"])
def test_runs_shorter_than_a_refresh_hold_the_truth(load: str, counter_s: float) -> None:
    # given runs of 40 ms, of which one or a few changes are seen
    found = distances(virtual.Board(counter_s), load, 0.04, runs=50, seed=31, short=True)
    # then they are as unsure as that
    assert np.mean(found <= 1) >= 0.88


def test_steady_power_is_known_in_every_phase() -> None:
    # given 300 W
    random = np.random.default_rng(32)
    board = virtual.Board(0.1)
    for _ in range(20):
        run = virtual.record_board(board, Constant(300.0), random, end_s=8.0, gain_u=0.0)
        begin_s = random.uniform(2.0, 7.0)
        curve, at_ns = measured(run, begin_s, begin_s + 0.2)
        # then nothing is unsure but when the refreshes were
        assert whole(curve, at_ns)._replace(gain_j=0.0).u_j <= 0.05 * 60.0
        assert energy_j(curve) == pytest.approx(60.0, rel=0.05)


AVERAGED = virtual.Board(None, "nvml-power", model="NVIDIA RTX A6000")
KEPLER = virtual.Board(None, "nvml-power", time_constant_s=0.12, model="Tesla K80")


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("load", ["bursts", "steps"])
@pytest.mark.parametrize("board", [AVERAGED, KEPLER], ids=["average", "lag"])
def test_phases_behind_readings_that_trail_hold_the_truth(
    board: virtual.Board, load: str, seconds: float
) -> None:
    # given a GPU without a counter, whose PowerUsage is a 1 s average, or lags by 120 ms
    found = distances(board, load, seconds, runs=50, seed=33)
    # then as many intervals hold the truth (6 % and 31 to 42 % did)
    assert np.mean(found <= 1) >= 0.9


@pytest.mark.parametrize(
    ("model", "lag_s"),
    [
        *((f"NVIDIA {name}", 0.5) for name in ("A10", "A40", "L4", "L40S", "H100 PCIe", "GH200",
          "B200", "GeForce RTX 3090", "GeForce RTX 4060 Ti", "GeForce RTX 5090", "RTX A2000 12GB",
          "RTX 6000 Ada Generation", "RTX PRO 6000 Blackwell")),
        *((f"NVIDIA {name}", 0.0) for name in ("A100-SXM4-80GB", "A30", "A800-SXM4-80GB",
          "GeForce RTX 2080 Ti", "TITAN V", "GPU")),
        *((name, 0.0) for name in ("Tesla V100-SXM2-16GB", "Tesla T4", "Tesla P100-PCIE-16GB",
          "Quadro RTX 5000", "NVIDIA GeForce GTX 1080 Ti")),
        *((name, 0.14) for name in ("Tesla K80", "GeForce GTX 780", "Quadro K2200")),
    ],
)  # fmt: skip
def test_what_power_usage_means_is_known_by_the_board(model: str, lag_s: float) -> None:
    (source,) = find_sources([virtual.nvml_lane("nvml-power", model=model)])
    assert source.lag_s == lag_s


@pytest.mark.parametrize("seconds", [0.1, 0.2, 1.0, 2.5])
def test_gpus_in_step_have_errors_that_add_up(seconds: float) -> None:
    # given four GPUs under one load, with refreshes of 20 ms to 1 s
    random = np.random.default_rng(34)
    inside, ratios = [], []
    for _ in range(25):
        wave = dict(virtual.window_loads(random, 12.0))["bursts"]
        begin_s = random.uniform(2.0, 12.0 - seconds)
        edges_s = np.union1d(np.arange(13.0), [begin_s, begin_s + seconds])
        ends = np.searchsorted(edges_s, [begin_s, begin_s + seconds])
        seconds_at = np.searchsorted(edges_s, np.arange(13.0))
        curves, terms, error_j = [], [], 0.0
        for counter_s in (0.02, 0.1, 0.5, 1.0):
            board = virtual.Board(counter_s)
            run = virtual.record_board(board, wave, random, end_s=12.0, gain_u=0.0)
            curve, at_ns = measured(run, *edges_s)
            error_j += float(np.diff(curve.energy_j[ends])[0])
            error_j -= run.truth_j(begin_s, begin_s + seconds)
            curves.append(curve)
            terms.append(budget(curve, at_ns, ends[:1], ends[1:])._replace(gain_j=0.0))
        # when their energies are added
        alike = likeness(curves, [curve.energy_j[seconds_at] for curve in curves])
        u_j = combined_u_j(terms, alike)
        inside.append(abs(error_j) <= 2 * u_j)
        ratios.append(u_j / math.hypot(*(term.u_j for term in terms)))
    # then so are their errors (0.56 to 0.64 held as independent ones)
    assert np.mean(inside) >= 0.93
    assert np.median(ratios) > 1.15


def test_gpus_of_different_loads_and_other_devices_are_independent() -> None:
    random = np.random.default_rng(35)
    edges_s = np.arange(0.0, 61.0)
    curves = []
    for _ in range(2):
        run = virtual.record_board(
            virtual.Board(0.1), virtual.bursts(random, -2.0, 62.0), random, end_s=60.0, gain_u=0.0
        )
        curves.append(measured(run, *edges_s)[0])
    alike = likeness(curves, [curve.energy_j for curve in curves])
    assert np.diag(alike).tolist() == [1.0, 1.0]
    assert alike[0, 1] <= 0.6
    # and a CPU's sensor is of another kind
    cpu = curves[1]._replace(source=curves[1].source._replace(kind="cpu"))
    assert likeness([curves[0], cpu], [c.energy_j for c in curves]).tolist() == np.eye(2).tolist()


def test_no_interval_exceeds_what_power_could_have_made_of_the_window() -> None:
    # given phases of 5 to 50 ms under bursts of 60 to 400 W, within refreshes of 1 s
    random = np.random.default_rng(36)
    for _ in range(40):
        wave = dict(virtual.window_loads(random, 8.0))["bursts"]
        run = virtual.record_board(virtual.Board(1.0), wave, random, end_s=8.0, gain_u=0.0)
        begin_s, seconds = random.uniform(1.0, 7.0), random.uniform(0.005, 0.05)
        curve, at_ns = measured(run, begin_s, begin_s + seconds)
        terms = whole(curve, at_ns)
        # then the interval is no wider than from nothing to all that such a board draws
        assert 2 * math.hypot(terms.sampled_j, terms.lag_j) <= 1.4 * 400.0 * seconds


Repeated = tuple[list[EnergyCurve], list[UncertaintyBudget], float]
"""Curves at whole seconds, the budget of 30 phases of each, and their error together."""


def repeated(
    boards: list[virtual.Board], wave: Wave, begins_s: np.ndarray, seconds: float, seed: int
) -> Repeated:
    """Phases behind boards that take the same load, beside gain and offset."""
    random = np.random.default_rng(seed)
    edges_s = np.unique([*np.arange(17.0), *begins_s, *(begins_s + seconds)])
    begins = np.searchsorted(edges_s, begins_s)
    ends = np.searchsorted(edges_s, begins_s + seconds)
    truth_j = sum(
        np.diff(virtual.cumulative_j(wave, np.array([begin_s, begin_s + seconds])))[0]
        for begin_s in begins_s
    )
    curves, terms, error_j = [], [], 0.0
    for board in boards:
        run = virtual.record_board(board, wave, random, end_s=16.0, gain_u=0.0)
        curve, at_ns = measured(run, *edges_s)
        terms.append(budget(curve, at_ns, begins, ends)._replace(gain_j=0.0, offset_j=0.0))
        error_j += float(np.sum(curve.energy_j[ends] - curve.energy_j[begins])) - truth_j
        at_seconds = np.searchsorted(edges_s, np.arange(17.0))
        curves.append(curve._replace(energy_j=curve.energy_j[at_seconds]))
    return curves, terms, error_j


def in_step(random: np.random.Generator) -> tuple[Wave, np.ndarray, float]:
    """Steps of a training of 130 to 230 ms, and 30 phases that each hold the part at 400 W."""
    period_s, duty = random.uniform(0.13, 0.23), random.uniform(0.2, 0.6)
    wave = Square(period_s, 80.0, 400.0, duty, random.uniform(0, period_s))
    begins_s = wave.shift_s + period_s * (np.arange(30) + np.ceil(1 / period_s))
    return wave, begins_s, duty * period_s


@pytest.mark.parametrize(
    "board",
    [*(virtual.Board(counter_s) for counter_s in (0.02, 0.1, 0.5, 1.0)),
     virtual.Board(None), AVERAGED, KEPLER],
    ids=["20 ms", "100 ms", "500 ms", "1 s", "power", "average", "lag"],
)  # fmt: skip
def test_errors_of_phases_that_repeat_with_the_load_do_not_cancel(board: virtual.Board) -> None:
    # given 30 phases in step with the load, behind sensors that are faster or slower than they
    random = np.random.default_rng(37)
    inside, relative = [], []
    for seed in range(20):
        wave, begins_s, seconds = in_step(random)
        # when they are taken together
        _, (terms,), error_j = repeated([board], wave, begins_s, seconds, seed)
        inside.append(abs(error_j) <= 2 * terms.u_j)
        relative.append(2 * terms.u_j / (30 * 400.0 * seconds))
    # then the interval holds the truth (in quadrature hardly one did) and does not exceed it
    assert np.mean(inside) >= 0.9
    assert np.median(relative) <= 0.9


def test_errors_of_gpus_add_up_over_phases_that_repeat_with_their_load() -> None:
    # given four GPUs that train one model, at the same mean power in every second
    random = np.random.default_rng(38)
    boards = [virtual.Board(counter_s) for counter_s in (0.02, 0.1, 0.5, 1.0)]
    inside = []
    for seed in range(12):
        curves, terms, error_j = repeated(boards, *in_step(random), seed)
        # when it does not show in seconds that they are in step
        alike = likeness(curves, [curve.energy_j for curve in curves])
        # then they are taken to be
        assert alike.tolist() == np.ones((4, 4)).tolist()
        inside.append(abs(error_j) <= 2 * combined_u_j(terms, alike))
    assert np.mean(inside) >= 0.9  # 5 % were


@pytest.mark.parametrize("load", ["37 ms", "steps", "bursts 0.05-0.8"])
def test_a_record_that_shows_phases_to_be_independent_keeps_them_so(load: str) -> None:
    # given 30 phases of 50 ms that have nothing to do with the load, behind a counter of 100 ms
    random = np.random.default_rng(39)
    inside, relative = [], []
    for seed in range(15):
        wave = dict(virtual.window_loads(random, 16.0))[load]
        begins_s = random.uniform(1.0, 1.2) + random.uniform(0.13, 0.22) * np.arange(30)
        (curve,), (terms,), error_j = repeated([virtual.Board(0.1)], wave, begins_s, 0.05, seed)
        inside.append(abs(error_j) <= 2 * terms.u_j)
        mean_w = (curve.energy_j[-1] - curve.energy_j[0]) / 16.0
        relative.append(2 * terms.u_j / (30 * 0.05 * mean_w))
    # then their errors cancel
    assert np.mean(inside) >= 0.9
    assert np.median(relative) <= 0.2


def test_what_an_average_hides_is_unknown_and_not_0() -> None:
    # given a load of 50 ms, 20 times in each second, behind a 1 s average
    random = np.random.default_rng(40)
    for _ in range(20):
        wave = Square(0.05, 80.0, 400.0, random.uniform(0.3, 0.8), random.uniform(0, 0.05))
        run = virtual.record_board(AVERAGED, wave, random, end_s=8.0, gain_u=0.0)
        begin_s = random.uniform(1.0, 7.0)
        for seconds in (0.02, 0.1, 0.5):
            curve, at_ns = measured(run, begin_s, begin_s + seconds)
            u_j = whole(curve, at_ns)._replace(gain_j=0.0, offset_j=0.0).u_j
            # then a phase is as unsure as that
            assert abs(energy_j(curve) - run.truth_j(begin_s, begin_s + seconds)) <= 2.5 * u_j
            # but not beyond what the board can draw
            assert 2 * u_j <= 1.2 * 400.0 * seconds
