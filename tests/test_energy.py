"""Counters and power series against truth computed by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, codes, write_replay
from sim import virtual
from sim.waves import Step

from pepr_profiler.energy.counter import reconstruct_interval
from pepr_profiler.energy.curve import EnergyCurve, seconds_in
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.sources import UNITS, Source, find_sources
from pepr_profiler.energy.uncertainty import budget
from pepr_profiler.trace.lane import Batch, Channel, LaneInfo
from pepr_profiler.units import NS_PER_S as S


def batches(t_s: Iterable[float], *columns: Iterable[float], rows: int = 10_000) -> Iterator[Batch]:
    """The rows of a lane, read in no time, in batches of `rows`."""
    t_ns = np.round(np.asarray(list(t_s)) * S).astype(np.int64)
    values = np.array([list(column) for column in columns], dtype=np.float64)
    for at in range(0, len(t_ns), rows):
        part = slice(at, at + rows)
        yield Batch(t_ns[part], np.zeros(len(t_ns[part]), np.int64), values[:, part])


def counter(**facts: object) -> Source:
    return Source("cpu:x", "cpu", "x", "lane", 0, "test", counter=True, **facts)  # type: ignore[arg-type]


def power(**facts: object) -> Source:
    return Source("gpu:x", "gpu", "x", "lane", 0, "test", counter=False, **facts)  # type: ignore[arg-type]


def curve_of(source: Source, rows: Iterable[Batch], at_s: Iterable[float]) -> EnergyCurve:
    at_ns = np.round(np.asarray(list(at_s)) * S).astype(np.int64)
    return integrate(rows, [source], at_ns)[0]


def between(curve: EnergyCurve) -> float:
    return float(curve.energy_j[-1] - curve.energy_j[0])


def refreshed(t_s: np.ndarray, watts: float, refresh_s: float, phase_s: float) -> np.ndarray:
    """What a counter of joules shows that is refreshed every `refresh_s`, at constant power."""
    return watts * (np.floor((t_s - phase_s) / refresh_s) * refresh_s + phase_s)


# --- counters -------------------------------------------------------------------------------------


def test_a_counter_gives_the_difference_between_two_instants() -> None:
    # given 50 W, read every 10 ms
    t = np.arange(0, 10.005, 0.01)
    # when the energy from 2 s to 5.005 s is asked for
    curve = curve_of(counter(), batches(t, 50 * t + 1234), [2.0, 5.005])
    # then it is 50 W x 3.005 s
    assert between(curve) == pytest.approx(150.25, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000])
def test_how_rows_are_cut_into_batches_changes_nothing(rows: int) -> None:
    # given an uneven counter that wraps, with holes
    random = np.random.default_rng(7)
    t = np.cumsum(random.uniform(0.005, 0.02, 997))
    joules = np.cumsum(random.uniform(0, 3, 997))
    raw = np.where(random.uniform(size=997) < 0.05, np.nan, joules % 100)
    at = np.sort(random.uniform(t[0], t[-1], 31))
    source = counter(modulus=100.0)
    whole = curve_of(source, batches(t, raw), at)
    # when the same rows come in small batches
    cut = curve_of(source, batches(t, raw, rows=rows), at)
    # then the curve is the same
    assert np.diff(cut.energy_j) == pytest.approx(np.diff(whole.energy_j), rel=1e-12, abs=1e-9)
    assert (cut.wraps, cut.unknown) == (whole.wraps, whole.unknown)


def test_a_thousand_wraps_leave_no_window_negative_or_off_by_a_range() -> None:
    # given 100 W on a counter of 65.7 J, read every 10 ms for 657 s
    t = np.arange(0, 657.01, 0.01)
    raw = np.round((100 * t) % 65.7, 6)
    edges = np.arange(0.5, 656.5, 0.25)
    # when energy is taken over windows of every alignment
    curve = curve_of(counter(modulus=65.7), batches(t, raw, rows=333), edges)
    # then each window is 25 J and every wrap was seen
    assert curve.wraps == 1000 - 1 or curve.wraps == 1000
    assert np.diff(curve.energy_j) == pytest.approx(np.full(len(edges) - 1, 25.0), abs=1e-3)


def test_a_drop_that_no_wrap_explains_is_a_reset_and_loses_only_what_it_must() -> None:
    # given 100 W; after 5 s the counter begins anew at 0
    t = np.arange(0, 10.005, 0.01)
    raw = np.where(t < 5, 5e6 + 100 * t, 100 * (t - 5))
    for modulus in (0.0, 262_143.0 * 1000):
        curve = curve_of(counter(modulus=modulus), batches(t, raw), [1.0, 9.0])
        # then it is said, and one reading (1 J) at most is missing
        assert curve.resets == 1
        assert 799.0 - 1e-6 <= between(curve) <= 800.0 + 1e-6


def test_a_reset_to_a_negative_reading_gives_no_energy_back() -> None:
    # given 100 W; after 5 s the counter begins anew at -400 J
    t = np.arange(0, 10.005, 0.01)
    raw = np.where(t < 5, 5e6 + 100 * t, 100 * (t - 5) - 400)
    curve = curve_of(counter(), batches(t, raw), [1.0, 9.0])
    # then what it has counted since is known, and nothing is taken off
    assert between(curve) == pytest.approx(800.0, abs=1.01)


def test_unknown_readings_cost_resolution_but_no_joules() -> None:
    # given a hole of 3 s in a counter at 80 W
    t = np.arange(0, 10.005, 0.01)
    raw = np.where((t > 4) & (t < 7), np.nan, 80 * t)
    curve = curve_of(counter(), batches(t, raw), [1.0, 9.0])
    # then the energy is complete, and the hole is reported
    assert between(curve) == pytest.approx(640.0, rel=1e-9)
    assert curve.unknown == 299
    assert curve.longest_gap_s == pytest.approx(3.0, abs=0.02)


def test_a_counter_that_never_moves_is_unknown_not_zero() -> None:
    t = np.arange(0, 0.08, 0.01)
    curve = curve_of(counter(), batches(t, np.full(len(t), 4711.0)), [0.01, 0.05])
    assert np.isnan(curve.energy_j).all()


def test_a_counter_without_any_reading_is_unknown() -> None:
    curve = curve_of(counter(), batches([0, 1], [math.nan, math.nan]), [0.0, 1.0])
    assert np.isnan(curve.energy_j).all()
    assert (curve.first_ns, curve.unknown) == (-1, 2)


def test_a_stall_is_noticed_while_reads_go_on() -> None:
    # given a counter that stands still from 3 s to 12 s
    t = np.arange(0, 15.005, 0.01)
    raw = np.where(t < 3, 50 * t, np.where(t < 12, 150.0, 150 + 50 * (t - 12)))
    curve = curve_of(counter(), batches(t, raw, rows=100), [0.5, 14.5])
    assert curve.longest_stall_s == pytest.approx(9.0, abs=0.03)


@pytest.mark.parametrize("refresh_s", [0.02, 0.1])
@pytest.mark.parametrize("phase", [0.0, 0.3, 0.77])
def test_a_slow_counter_is_right_whatever_its_phase(refresh_s: float, phase: float) -> None:
    # given 300 W behind a counter that is refreshed at T, read every 7 ms
    t = np.arange(0, 4, 0.007)
    raw = refreshed(t, 300.0, refresh_s, phase * refresh_s)
    edges = np.arange(0.5, 3.5, 0.2)
    # when phases of 200 ms are asked for
    curve = curve_of(counter(), batches(t, raw), edges)
    # then each is within 5 % (one read in 200 ms would be off by half)
    assert np.diff(curve.energy_j) == pytest.approx(np.full(len(edges) - 1, 60.0), rel=0.05)
    assert curve.refresh_s == pytest.approx(refresh_s, rel=0.1)


@pytest.mark.parametrize("phase", np.linspace(0, 0.95, 20))
def test_the_edges_of_a_slow_counter_are_not_biased(phase: float) -> None:
    # given a run that begins with the first reading and ends with the last
    t = np.arange(0, 2.0001, 0.01)
    raw = refreshed(t, 300.0, 0.1, phase * 0.1 - 0.1)
    curve = curve_of(counter(), batches(t, raw), [0.0, 2.0])
    # then both ends are filled in: the error is a read, not a refresh (30 J)
    assert between(curve) == pytest.approx(600.0, abs=3.1)


def test_a_counter_read_little_faster_than_it_refreshes_is_not_biased() -> None:
    # given 400 W behind a refresh of 100 ms, read every 50 ms with some lateness, 200 runs of 3 s
    random = np.random.default_rng(11)
    errors_j = []
    for _ in range(200):
        t = np.arange(0, 3.2, 0.05) + random.exponential(0.002, 64)
        raw = refreshed(t, 400.0, 0.1, random.uniform(-0.1, 0))
        begin_s = random.uniform(0, 0.1)
        curve = curve_of(counter(), batches(t, raw, rows=10), [begin_s, begin_s + 3.0])
        errors_j.append(between(curve) - 1200)
    # then the mean error is nil (a refresh is 40 J), and each is well within one
    assert np.mean(errors_j) == pytest.approx(0.0, abs=2.0)
    assert np.max(np.abs(errors_j)) < 40


def test_reads_that_come_too_early_now_and_then_tell_when_the_others_were_late() -> None:
    # given 300 W behind a refresh of 100 ms; reads 1 to 6 ms after it, a fifth 1 ms before it too
    random = np.random.default_rng(22)
    errors_j = []
    for _ in range(100):
        refreshes_s = random.uniform(1.0, 1.1) + 0.1 * np.arange(40)
        late_s = refreshes_s + random.uniform(1e-3, 6e-3, 40)
        early_s = (refreshes_s - 1e-3)[random.uniform(size=40) < 0.2]
        t = np.sort(np.concatenate((late_s, early_s)))
        raw = refreshed(t, 300.0, 0.1, refreshes_s[0])
        begin_s = random.uniform(1.5, 2.5)
        errors_j.append(between(curve_of(counter(), batches(t, raw), [begin_s, begin_s + 2])) - 600)
    # then edges are sharper than the reads are late: those alone would make it 0.6 J
    assert np.sqrt(np.mean(np.square(errors_j))) <= 0.4


@pytest.mark.parametrize("jump_at", [0.1, 0.5, 0.83])
@pytest.mark.parametrize("levels_w", [(60.0, 400.0), (400.0, 60.0)])
def test_a_jump_between_two_refreshes_is_found_by_the_energy_it_left(
    jump_at: float, levels_w: tuple[float, float]
) -> None:
    # given a counter that shows its energy of every 100 ms, and a jump somewhere in between
    before_w, after_w = levels_w
    t = np.arange(0, 4.01, 0.1)
    jump_s = 2.0 + 0.1 * jump_at

    def truth_j(at_s: np.ndarray) -> np.ndarray:
        return before_w * np.minimum(at_s, jump_s) + after_w * np.maximum(at_s - jump_s, 0)

    at = np.concatenate(([1.0], np.linspace(2.0, 2.1, 11), [3.0]))
    curve = curve_of(counter(), batches(t, truth_j(t)), at)
    # then the energy up to any instant around it is the truth
    assert np.diff(curve.energy_j) == pytest.approx(np.diff(truth_j(at)), abs=1e-6)


def test_smooth_power_between_two_refreshes_follows_its_neighbours() -> None:
    # given 200 W that swings by 100 W once in 0.8 s behind a refresh of 100 ms
    turn = 2 * np.pi / 0.8
    t = np.arange(0, 6.01, 0.1)

    def truth_j(at_s: np.ndarray) -> np.ndarray:
        return 200 * at_s - 100 / turn * np.cos(turn * at_s)

    at = np.sort(np.random.default_rng(23).uniform(1, 5, 500))
    curve = curve_of(counter(), batches(t, truth_j(t)), at)
    off_j = np.diff(curve.energy_j) - np.diff(truth_j(at))
    line_j = np.diff(np.interp(at, t, truth_j(t))) - np.diff(truth_j(at))
    # then it is off by little more than half of what straight lines are, at most
    assert np.sqrt(np.mean(off_j**2)) <= 0.6 * np.sqrt(np.mean(line_j**2))


def test_what_is_put_between_refreshes_keeps_their_energy() -> None:
    # given power of all kinds, pieces of uneven length, some neighbours missing
    random = np.random.default_rng(24)
    power_w = random.choice([50.0, 51.0, 200.0, 400.0], (5, 2000)) + random.normal(0, 5, (5, 2000))
    power_w[0, ::7] = power_w[4, ::5] = power_w[1, ::11] = power_w[3, ::13] = math.nan
    span_s = random.choice([0.1, 0.11, 0.3, 3.0], (5, 2000))

    def beside_j(x: float) -> np.ndarray:
        return reconstruct_interval(power_w, span_s, np.full(2000, x), longest_s=0.35)[0]

    # then nothing is added at its ends
    assert beside_j(0.0) == pytest.approx(np.zeros(2000), abs=1e-9)
    assert beside_j(1.0) == pytest.approx(np.zeros(2000), abs=1e-9)
    # nor anywhere in one that is too long, or alone
    line = (span_s[2] > 0.35) | np.isnan(power_w[1]) | np.isnan(power_w[3])
    assert (beside_j(0.4)[line] == 0).all()
    assert np.count_nonzero(beside_j(0.4)[~line]) > 200
    # and the power there is what the energy grows by
    middle_w = reconstruct_interval(power_w, span_s, np.full(2000, 0.4), longest_s=0.35)[1]
    slope_w = power_w[2] + (beside_j(0.4 + 1e-7) - beside_j(0.4 - 1e-7)) / (2e-7 * span_s[2])
    assert middle_w == pytest.approx(slope_w, rel=1e-4, abs=0.1)


# --- power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin_s", [-0.02, 0.0, 0.013, 1.5])
@pytest.mark.parametrize("length_s", [0.001, 0.05, 0.2, 2.0])
def test_constant_power_gives_power_times_time_for_any_window(
    begin_s: float, length_s: float
) -> None:
    t = np.arange(0, 4, 0.1)
    source = power(period_s=0.1)
    curve = curve_of(source, batches(t, np.full(len(t), 300.0)), [begin_s, begin_s + length_s])
    assert between(curve) == pytest.approx(300.0 * length_s, rel=1e-9)


def test_a_window_with_a_single_sample_inside_works() -> None:
    curve = curve_of(power(), batches([1.0], [120.0]), [0.9, 1.1])
    assert between(curve) == pytest.approx(24.0)


def test_power_readings_are_joined_by_lines() -> None:
    # given a ramp from 0.1 W to 100 W in 10 s, and back
    t = np.arange(0, 21)
    watts = np.concatenate((np.linspace(0.1, 100, 11), np.linspace(100, 0.1, 11)[1:]))
    curve = curve_of(power(), batches(t, watts), [0.0, 10.0, 20.0])
    assert np.diff(curve.energy_j) == pytest.approx([500.5, 500.5])


def test_a_spurious_zero_is_a_missing_reading_not_a_device_at_rest() -> None:
    t = np.arange(0, 5, 0.1)
    watts = np.full(len(t), 250.0)
    watts[[7, 20, 21]] = 0.0
    curve = curve_of(power(), batches(t, watts), [0.5, 4.5])
    assert between(curve) == pytest.approx(1000.0)
    assert curve.unknown == 3


def test_an_averaging_sensor_is_shifted_back_by_its_lag() -> None:
    # given a step from 100 W to 300 W at 5 s, seen through an average of 1 s
    t = np.arange(0, 10.001, 0.05)
    watts = 100 + 200 * np.clip(t - 5, 0, 1)
    curve = curve_of(power(lag_s=0.5, period_s=0.05), batches(t, watts), [3.0, 5.0, 7.0])
    # then what came before and after the step is distinguished up to the ramp's symmetric halves
    assert np.diff(curve.energy_j) == pytest.approx([200 + 25, 600 - 25], abs=0.5)


# --- what is what ---------------------------------------------------------------------------------


def rapl(*zones: tuple[str, str, str]) -> LaneInfo:
    """A powercap lane with (zone, name, parent's name)."""
    channels = tuple(
        Channel(
            zone,
            "energy",
            "J",
            1e-6,
            65_700_000_000.0,
            True,
            "powercap",
            {"zone": zone, "name": name, **({"parent_name": parent} if parent else {})},
        )
        for zone, name, parent in zones
    )
    return LaneInfo("powercap", "powercap", 20_000_000, channels)


def test_packages_and_dram_add_up_and_nothing_else_does() -> None:
    lane = rapl(
        ("intel-rapl:0", "package-0", ""),
        ("intel-rapl:0:0", "core", "package-0"),
        ("intel-rapl:0:1", "uncore", "package-0"),
        ("intel-rapl:0:2", "dram", "package-0"),
        ("intel-rapl:1", "package-1", ""),
        ("intel-rapl:1:0", "dram", "package-1"),
        ("intel-rapl:2", "psys", ""),
        ("intel-rapl-mmio:0", "package-0", ""),
    )
    sources = {source.id: source for source in find_sources([lane])}
    # then the total has both packages and both memories, distinguished by their socket
    assert {i for i, source in sources.items() if source.in_total} == {
        "cpu:package-0",
        "cpu:package-1",
        "dram:package-0/dram",
        "dram:package-1/dram",
    }
    # and each of the others says why not
    assert sources["cpu:package-0/core"].excluded == "inside package-0"
    assert sources["other:psys"].excluded == "contains the packages"
    assert sources["cpu:package-0@intel-rapl-mmio:0"].excluded == "repeats package-0"


def gpu_lane(*quantities: str) -> LaneInfo:
    about = {
        "nvml-energy": ("energy", "J", True),
        "nvml-power": ("power", "W", False),
        "nvml-power-average": ("power", "W", False),
        "nvml-power-instant": ("power", "W", False),
    }
    labels = {"uuid": "GPU-1", "model": "NVIDIA H100", "index": "0"}
    channels = tuple(
        Channel(f"GPU-1/{name}", *about[name][:2], 1e-3, 0.0, about[name][2], name, labels)
        for name in quantities
    )
    return LaneInfo("nvml", "nvml", 50_000_000, channels)


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        (("nvml-energy", "nvml-power-instant", "nvml-power-average"), "nvml-energy"),
        (("nvml-power-instant", "nvml-power-average"), "nvml-power-average"),
        (("nvml-power-instant",), "nvml-power-instant"),
        (("nvml-power",), "nvml-power"),
    ],
)
def test_a_gpu_is_counted_once_by_its_best_source(offered: tuple[str, ...], taken: str) -> None:
    (source,) = find_sources([gpu_lane(*offered)])
    assert (source.id, source.source, source.in_total) == ("gpu:GPU-1", taken, True)


def test_the_same_component_from_two_lanes_is_counted_once() -> None:
    lane = rapl(("intel-rapl:0", "package-0", ""))
    again = LaneInfo("powercap-2", lane.spec, lane.period_ns, lane.channels)
    sources = find_sources([lane, again])
    assert [source.in_total for source in sources] == [True, False]
    assert sources[1].excluded == "repeats package-0 of powercap"


def perf(*events: tuple[str, int, int, int], name: str = "perf") -> LaneInfo:
    """Perf events, each with the CPU, package and die that it is counted on."""
    channels = tuple(
        Channel(
            f"cpu{cpu}/{event}", "energy", "J", 2.0**-32, 0.0, True, "perf",
            {"pmu": "power", "event": event, "cpu": str(cpu), "package": str(package),
             "die": str(die)},
        )
        for event, cpu, package, die in events
    )  # fmt: skip
    return LaneInfo(name, name, 20_000_000, channels)


def hwmon(*sensors: tuple[str, str, str], **labels: str) -> LaneInfo:
    """Hwmon inputs, each with chip, label and device."""
    channels = tuple(
        Channel(
            f"{chip}@{device}/power{n}", "power", "W", 1e-6, 0.0, False, "hwmon-power",
            {"chip": chip, "label": label, "device": device, "input": f"power{n}", **labels},
        )
        for n, (chip, label, device) in enumerate(sensors)
    )  # fmt: skip
    return LaneInfo("hwmon", "hwmon", 20_000_000, channels)


SERVER = rapl(
    ("intel-rapl:0", "package-0", ""),
    ("intel-rapl:0:0", "dram", "package-0"),
    ("intel-rapl:1", "package-1", ""),
    ("intel-rapl:1:0", "dram", "package-1"),
    ("intel-rapl:2", "psys", ""),
    ("intel-rapl-mmio:0", "package-0", ""),
)
SERVER_PERF = perf(
    *((e, cpu, cpu // 32, 0) for e in ("energy-pkg", "energy-ram") for cpu in (0, 32)),
    ("energy-psys", 0, 0, 0),
)
DIES = rapl(*((f"intel-rapl:{n}", f"package-0-die-{n}", "") for n in range(4)))
DIES_PERF = perf(*(("energy-pkg", 8 * n, 0, n) for n in range(4)))
AMD_PERF = perf(("energy-pkg", 0, 0, 0))
AMD_HWMON = hwmon(("amd_energy", "Esocket0", "amd_energy.0"), ("amd_energy", "Ecore000", "a.0"))
APU = hwmon(("amdgpu", "PPT", "0000:04:00.0"), part_of="processor")


@pytest.mark.parametrize(
    ("lanes", "counted"),
    [
        ([SERVER_PERF], 4),
        ([SERVER_PERF, SERVER], 4),
        ([SERVER, SERVER_PERF], 4),
        ([SERVER, SERVER, SERVER_PERF], 4),
        ([DIES], 4),
        ([DIES_PERF], 4),
        ([DIES_PERF, DIES], 4),
        # kernels differ: one counter a die, or one a package; amd_energy has one a socket
        ([AMD_PERF, DIES], 1),
        ([DIES, AMD_PERF], 4),
        ([AMD_PERF, AMD_HWMON], 1),
        ([AMD_HWMON, AMD_PERF], 1),
        ([DIES, AMD_HWMON], 4),
        ([AMD_HWMON], 1),
        # the power of an integrated GPU is its processor's
        ([AMD_PERF, APU], 1),
        ([APU], 1),
    ],
)
def test_no_combination_of_lanes_counts_a_package_twice(
    lanes: list[LaneInfo], counted: int
) -> None:
    # given lanes of one machine, as the kernel's three ways to RAPL show it
    named = [lane._replace(name=f"{lane.name}-{n}") for n, lane in enumerate(lanes)]
    sources = find_sources(named)
    # then each package and memory is in the total once, and all ids differ
    total = [source.id for source in sources if source.in_total]
    assert len(total) == counted
    assert len({source.id for source in sources}) == len(sources)
    dies = {i for i in total if "-die-" in i}
    assert dies == set() or dies == {i for i in total if i.startswith("cpu:")}
    assert all(bool(source.excluded) != source.in_total for source in sources)


def test_hwmon_adds_boards_and_sockets_but_no_supplies() -> None:
    lane = hwmon(
        ("power_meter", "Grace Power Socket 0", "ACPI000D:00"),
        ("power_meter", "CPU Power Socket 0", "ACPI000D:01"),
        ("power_meter", "Module Power Socket 0", "ACPI000D:02"),
        ("power_meter", "Grace Power Socket 1", "ACPI000D:03"),
        ("amdgpu", "PPT", "0000:03:00.0"),
        ("amdgpu", "PPT", "0000:83:00.0"),
        ("corsairpsu", "power total", "0003:1B1C:1C05"),
        ("ina3221", "VDD_GPU_SOC", "1-0040"),
        ("ina3221", "VDD_CPU_CV", "1-0040"),
        ("ina3221", "VIN_SYS_5V0", "1-0040"),
        ("ina3221", "VDD_CPU_GPU_CV", "1-0041"),
    )
    total = {(s.id, s.kind) for s in find_sources([lane]) if s.in_total}
    assert total == {
        ("cpu:package-0", "cpu"),
        ("cpu:package-1", "cpu"),
        ("gpu:0000:03:00.0", "gpu"),
        ("gpu:0000:83:00.0", "gpu"),
        ("gpu:VDD_GPU_SOC", "gpu"),
        ("cpu:VDD_CPU_CV", "cpu"),
        ("cpu:VDD_CPU_GPU_CV", "cpu"),  # a modelled CPU beside it would count twice
    }


def test_a_module_is_shown_beside_the_gpu_that_it_contains() -> None:
    labels = {"uuid": "GPU-1", "model": "NVIDIA GH200 480GB", "index": "0", "mig": "on"}
    facts = (("nvml-energy", "energy"), ("nvml-module-average", "power"))
    channels = tuple(
        Channel(f"GPU-1/{s}", quantity, UNITS[quantity], 1e-3, 0.0, quantity == "energy", s, labels)
        for s, quantity in facts
    )
    module, gpu = find_sources([LaneInfo("nvml", "nvml", 50_000_000, channels)])
    assert (gpu.in_total, module.in_total, module.excluded) == (True, False, "contains the GPU")
    # and what a MIG instance is charged with is said to be the board's
    assert gpu.label == "gpu:0  GH200 480GB, MIG: whole board"


CONTRIBUTED = {
    "gpu:new": "new/energy energy J 1 0 counter dcgm uuid=GPU-new kind=gpu component=gpu:new",
    "other:npu/energy": "npu/energy energy J 1 0 counter acme kind=npu index=first uuid=x",
    "other:bare": "bare energy J 1 0 counter acme gain=0.01",
    "other:vague": "vague energy J 1 0 counter acme gain=low",
    # names of our drivers' sources, without the labels that these give
    "cpu:zone": "zone energy J 1 0 counter powercap kind=cpu",
    "cpu:event": "event energy J 1 0 counter perf kind=cpu",
    "other:chip/power1": "chip/power1 power W 1 0 gauge hwmon-power",
    "gpu:a/energy": "a/energy energy J 1 0 counter nvml-energy kind=gpu uuid=GPU-a",
    "gpu:a/power": "a/power power W 1 0 gauge nvml-power kind=gpu",
    "other:a/module": "a/module power W 1 0 gauge nvml-module-average",
    "other:a/hbm": "a/hbm energy J 1 0 counter nvml-hbm uuid=GPU-a index=0 model=H100",
}
NO_ENERGY = (
    "a/utilisation utilisation 1 1 0 gauge nvml-utilisation",
    "a/memory memory B 1 0 gauge nvml-memory",
    "a/clock clock Hz 1 0 gauge acme uuid=GPU-a",
    "odd/energy energy kWh 1 0 counter acme",
)


def test_a_sensor_that_nobody_knows_is_an_ordinary_one(tmp_path: Path) -> None:
    # given 50 W of each component, from sensors with labels and sources of their own
    channels = [*CONTRIBUTED.values(), *NO_ENERGY]
    gauges = {i for i, channel in enumerate(channels) if " gauge " in channel}
    rows = [
        (i * 0.02, *(50.0 if n in gauges else float(i) for n in range(len(channels))))
        for i in range(500)
    ]
    spec = write_replay(tmp_path / "new", channels, rows)
    cli = Cli(tmp_path)
    _, summary = cli.measure("--sensor", spec, "--", "sleep", "1.5")
    # then each one's energy is in the summary under its own id, and adds up
    listed = {c["id"]: c for c in summary["energy"]["components"] if c["source"] != "utilisation"}
    measured = {i: c["device_j"] for i, c in listed.items() if c["provenance"] == "measured"}
    expected_j = 50.0 * summary["duration_s"]
    assert measured == pytest.approx(dict.fromkeys(CONTRIBUTED, expected_j), rel=0.03)
    assert {c["kind"] for c in listed.values()} <= {"gpu", "cpu", "dram", "other"}
    # and energy in another unit is not taken for joules, and said to be left out
    assert codes(summary, "odd/energy") == {"unknown-unit"}
    # and a gain that is no number is 0, with a warning
    assert codes(summary, "vague") == {"unknown-gain"}
    assert listed["other:vague"]["budget"]["gain_j"] == 0.0
    assert listed["other:bare"]["budget"]["gain_j"] == pytest.approx(0.01 * expected_j, rel=0.03)
    # and a page with its figures can be drawn of it
    result = cli("report", str(cli.runs()[0]), "-o", str(tmp_path / "run.html"))
    assert result.status == 0, result.stderr


@pytest.mark.parametrize("lane", [DIES, DIES_PERF], ids=["powercap", "perf"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_dies_that_mirror_one_counter_are_counted_once(lane: LaneInfo, rows: int) -> None:
    # given four dies read every 20 ms; 0 and 2 show one counter, refreshed each ms and read 30 us
    # apart, from different starts; 1 and 3 are like them in power but are counters of their own
    random = np.random.default_rng(3)
    t = np.arange(0, 4, 0.02) + random.uniform(0, 1e-3, 200)
    joule = 1 / lane.channels[0].scale

    def walk(read_at_s: np.ndarray) -> np.ndarray:
        ticks = random.normal(0.05, 0.003, 4100).cumsum() * joule
        return np.floor(ticks[(read_at_s * 1000).astype(int)])

    state = random.bit_generator.state
    zero = walk(t)
    random.bit_generator.state = state
    two = walk(t + 30e-6) + 4711
    assert np.count_nonzero(zero + 4711 != two) > 0  # some reads lie on either side of a refresh
    columns = [zero, walk(t), two, walk(t)]
    sources = find_sources([lane])
    at_ns = np.array([0, 4 * S])
    # when they are integrated
    curves = integrate(batches(t, *columns, rows=rows), sources, at_ns)
    # then the third is no longer in the total, and says why
    assert [curve.source.in_total for curve in curves] == [True, True, False, True]
    assert curves[2].source.excluded == "mirrors package-0-die-0: one counter"


def test_two_packages_alike_are_no_mirrors() -> None:
    # given two packages of exactly the same power, as a simulation may have them
    t = np.arange(0, 4, 0.02)
    lane = rapl(("intel-rapl:0", "package-0", ""), ("intel-rapl:1", "package-1", ""))
    curves = integrate(batches(t, 1e8 * t, 1e8 * t), find_sources([lane]), np.array([0, 4 * S]))
    assert all(curve.source.in_total for curve in curves)


# --- uncertainty ----------------------------------------------------------------------------------


def test_the_budget_adds_gain_offset_and_edges_in_squares() -> None:
    # given 250 W for 20 s on a board of 4 % gain and 6 W offset, each edge known to 7 J
    source = power(gain=0.04, offset_w=6.0, period_s=0.05)
    at_ns = np.array([0, 20 * S])
    curve = EnergyCurve(source, np.array([0.0, 5000.0]), 0, 20 * S, edge_j2=np.array([49.0, 49.0]))
    # then gain is 200 J, offset 120 J, edges 7 sqrt(2) J
    terms = budget(curve, at_ns, np.array([0]), np.array([1]))
    assert (terms.gain_j, terms.offset_j) == (200.0, 120.0)
    assert terms.u_j == pytest.approx(math.sqrt(200**2 + 120**2 + 98), rel=1e-12)


def test_edges_count_once_a_window_and_offsets_with_time() -> None:
    source = power(offset_w=6.0, gain=0.01)
    at_ns = S * np.arange(10)
    curve = EnergyCurve(source, 100.0 * np.arange(10), 0, 9 * S, edge_j2=np.full(10, 2.0))
    one = budget(curve, at_ns, np.array([0]), np.array([1]))
    many = budget(curve, at_ns, np.array([0, 2, 4, 6]), np.array([1, 3, 5, 7]))
    assert many.edges_j == pytest.approx(2 * one.edges_j)
    assert (many.offset_j, many.gain_j) == pytest.approx((4 * one.offset_j, 4 * one.gain_j))


def test_a_part_of_a_device_has_that_part_of_its_uncertainty() -> None:
    source = counter(gain=0.03)
    curve = EnergyCurve(source, np.array([0.0, 1000.0]), 0, S, edge_j2=np.array([8.0, 8.0]))
    ends = np.array([0]), np.array([1])
    all_of_it = budget(curve, np.array([0, S]), *ends)
    quarter = budget(curve, np.array([0, S]), *ends, energy_j=250.0)
    assert quarter.u_j == pytest.approx(all_of_it.u_j / 4)


def test_reads_that_are_put_off_for_a_while_do_not_shift_the_counters_refreshes() -> None:
    # given 400 W behind a refresh of 100 ms: read every 15 ms for 2.2 s, then about every 95 ms
    random = np.random.default_rng(5)
    errors_j = []
    for _ in range(100):
        sparse = 2.2 + np.cumsum(random.uniform(0.05, 0.19, 12))
        t = np.concatenate((np.arange(0, 2.2, 0.015), sparse))
        raw = refreshed(t, 400.0, 0.1, random.uniform(-0.1, 0))
        end_s = float(t[-1]) - 0.005
        curve = curve_of(counter(), batches(t, raw, rows=40), [0.0, end_s])
        errors_j.append(between(curve) - 400 * end_s)
    # then the ends are as sharp as ever: a refresh is 40 J
    assert np.mean(errors_j) == pytest.approx(0.0, abs=4.0)
    assert np.percentile(np.abs(errors_j), 90) < 15


@pytest.mark.parametrize("dense", [5, 8, 11])
def test_reads_that_begin_to_follow_the_refreshes_do_not_change_their_period(dense: int) -> None:
    # given 400 W behind a refresh of 100 ms: read every 10 ms while `dense` refreshes are learnt,
    # then 1 ms after each refresh, or 1 ms before it and 3 ms after it
    random = np.random.default_rng(41)
    for _ in range(50):
        phase_s = random.uniform(-0.1, 0)
        learnt_s = phase_s + 0.1 * (dense + 1) + 0.011
        refreshes_s = phase_s + 0.1 * np.arange(dense + 2, dense + 7)
        early = random.uniform(size=5) < 0.3
        late_s = refreshes_s + np.where(early, 3e-3, 1e-3)
        after_s = np.sort(np.concatenate((late_s, (refreshes_s - 1e-3)[early])))
        t = np.concatenate((np.arange(0, learnt_s, 0.01), after_s))
        raw = refreshed(t, 400.0, 0.1, phase_s)
        end_s = float(t[-1]) - 0.15
        curve = curve_of(counter(period_s=0.01), batches(t, raw), [0.0, end_s])
        # then the period is the refreshes' own, and the ends are off by a read (4 J), not a tenth
        assert curve.refresh_s == pytest.approx(0.1, rel=0.02)
        assert between(curve) == pytest.approx(400 * end_s, abs=4)


def test_gpus_that_are_read_one_after_the_other_have_their_own_times() -> None:
    # given eight GPUs whose calls take 20 ms each, and power that jumps at 5 s
    rows_s = np.arange(0.0, 10.0, 0.2)
    wave = Step(5.0, 100.0, 400.0)
    lane = virtual.nvml_lane("nvml-energy")
    channels, columns = [], []
    for number in range(8):
        (channel,) = lane.channels
        labels = {**channel.labels, "uuid": f"GPU-{number}", "index": str(number)}
        channels.append(channel._replace(name=f"GPU-{number}/energy", labels=labels))
        shown_s = np.floor((rows_s + 0.02 * (number + 0.5)) / 0.01) * 0.01
        columns.append(1e6 + np.floor(1e3 * virtual.cumulative_j(wave, shown_s)))
    begun_ns = np.round(rows_s * 1e9).astype(np.int64) + virtual.EPOCH_NS
    rows = Batch(begun_ns, np.full(len(rows_s), 160_000_000), np.array(columns))
    at_ns = np.array([virtual.instant_ns(t_s) for t_s in (2.0, 5.0, 8.0)])
    # when they are integrated
    sources = find_sources([lane._replace(channels=tuple(channels))])
    curves = integrate([rows], sources, at_ns)
    # then each has its energy before and after, the first and the last one too
    for curve in curves:
        assert np.diff(curve.energy_j) == pytest.approx([300.0, 1200.0], abs=6.0)


def test_a_year_is_divided_into_no_more_steps_than_fit_into_memory() -> None:
    assert [seconds_in(7, 7 + span_ns) for span_ns in (0, S // 2, 90 * S)] == [1, 1, 90]
    assert seconds_in(0, 365 * 86_400 * S) == 1 << 20
