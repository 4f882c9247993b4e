"""A source counts because it answers, and for what it covers: nothing is missed, nothing twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli, codes, component, write_replay
from sim.nvml import BuildNvml, Fault, Gpu, Scenario, Sensor, default_uuid
from sim.powercap import BuildTree, Zone
from sim.sysfs import grace as grace_tree
from sim.virtual import (
    average_mw,
    batch,
    counter_mj,
    cumulative_j,
    instant_ns,
    nvml_lane,
    read_times_s,
)
from sim.waves import Constant, Square

from pepr_profiler.energy.fallback import stood_in, with_fallback
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.sources import find_cross_sources, find_sources
from pepr_profiler.energy.uncertainty import budget
from pepr_profiler.trace.lane import Batch, Channel, LaneInfo, LaneReader, LaneWriter
from pepr_profiler.units import NS_PER_S

ENERGY = "nvmlDeviceGetTotalEnergyConsumption"
STEP_S = 0.02


def covers(part: dict[str, Any], truth_j: float) -> bool:
    return bool(abs(part["device_j"] - truth_j) <= part["u_j"] < 0.3 * truth_j)


# --- sources that are there and do not answer -----------------------------------------------------


@pytest.mark.parametrize("effect", ["UNKNOWN", "TIMEOUT", "ZERO", "stands still"])
def test_a_gpu_whose_counter_is_dead_has_the_energy_of_its_power(
    cli: Cli, nvml_sim: BuildNvml, effect: str
) -> None:
    # given 300 W, and a counter that does not answer
    still = effect == "stands still"
    board = Gpu(Constant(300), counter_gain=0.0 if still else 1.0)
    faults = () if still else (Fault(ENERGY, effect),)
    sim = nvml_sim(Scenario(gpus=(board,), faults=faults))
    _, summary = cli.measure("--scope", "device", "--sensor", sim.spec, "--", "sleep", "2.5")
    # then its power readings count, under the same id, and this is said
    part = component(summary, f"gpu:{default_uuid(0)}")
    assert part["source"] == "nvml-power-average" and part["in_total"]
    assert covers(part, 300 * summary["duration_s"])
    assert part["fallback"]["instead_of"] == "nvml-energy"
    assert part["fallback"]["seconds"] == pytest.approx(summary["duration_s"])
    assert "fallback" in codes(summary, part["id"])
    assert not codes(summary, part["id"]) & {"unknown", "stalled"}


def test_a_counter_that_dies_in_a_run_is_continued_by_power(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given 300 W; the counter fails from the fifth second on
    nvml_sim(Scenario())  # compiles first: a scenario's clock runs from when it is written down
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(300)),), faults=(Fault(ENERGY, "TIMEOUT", 4.0),)))
    _, summary = cli.measure("--scope", "device", "--sensor", sim.spec, "--", "sleep", "7")
    part = component(summary, f"gpu:{default_uuid(0)}")
    assert part["source"] == "nvml-energy+nvml-power-average"
    assert covers(part, 300 * summary["duration_s"])
    assert 1.0 < part["fallback"]["seconds"] < summary["duration_s"] - 0.5
    assert "fallback" in codes(summary, part["id"])
    assert not codes(summary, part["id"]) & {"ended-early", "stalled", "disagreement"}
    # and power goes on in the line over time
    assert [w for w in part["trace_w"] if w is not None] == pytest.approx(
        [300] * sum(w is not None for w in part["trace_w"]), rel=0.2
    )


GPU = "uuid=GPU-1 model=H100 index=0"
PACKAGE = (
    "intel-rapl:0 energy J 1e-6 262143328850 counter powercap zone=intel-rapl:0 name=package-0"
)
CORE = "name=core parent_name=package-0"
EVENT = "cpu0/energy-pkg energy J 1e-6 0 counter perf event=energy-pkg package=0 cpu=0 die=0"


def replay(cli: Cli, lanes: dict[str, tuple[Sequence[str], Any]], seconds: float) -> dict[str, Any]:
    """Runs with lanes by name: their channels, and what gives the values at a time."""
    specs: list[str] = []
    for name, (channels, values) in lanes.items():
        times = [i * STEP_S for i in range(int((seconds + 20) / STEP_S))]
        rows = [(t, *values(t)) for t in times]
        specs += ["--sensor", write_replay(cli.folder / name, list(channels), rows)]
    _, summary = cli.measure("--scope", "device", *specs, "--", "sleep", str(seconds))
    return summary


@pytest.mark.parametrize("begin_s", [0.0, 3.0])
def test_a_counter_that_stands_still_for_a_while_is_bridged_by_power(
    cli: Cli, begin_s: float
) -> None:
    # given 300 W, and a counter that does not move from 0 s or 3 s on, for 2.5 s, and loses that
    def values(t: float) -> tuple[float, float]:
        lost_s = min(max(t - begin_s, 0.0), 2.5)
        return 5e6 + 300e3 * (t - lost_s), 300e3 + (t * 50) % 2

    channels = [
        f"GPU-1/energy energy J 1e-3 0 counter nvml-energy {GPU}",
        f"GPU-1/power_average power W 1e-3 0 gauge nvml-power-average {GPU}",
    ]
    summary = replay(cli, {"gpu": (channels, values)}, 7.0)
    part = component(summary, "gpu:GPU-1")
    assert covers(part, 300 * summary["duration_s"])
    assert part["fallback"]["seconds"] == pytest.approx(2.5, abs=1.0)


@pytest.mark.parametrize("within_s", [0.0, 0.6])
def test_a_counter_that_catches_up_is_believed(cli: Cli, within_s: float) -> None:
    # given a counter at 300 W that shows nothing for 2.5 s and then all, at once or step by step;
    # power reads 10 % too much
    def values(t: float) -> tuple[float, float]:
        shown_s = 3.0 if 3.0 <= t < 5.5 else t
        if 5.5 <= t < 5.5 + within_s:
            shown_s = 3.0 + (t - 5.5) * (2.5 + within_s) / within_s
        return 5e6 + 300e3 * shown_s, 330e3 + (t * 50) % 2

    channels = [
        f"GPU-1/energy energy J 1e-3 0 counter nvml-energy {GPU}",
        f"GPU-1/power_average power W 1e-3 0 gauge nvml-power-average {GPU}",
    ]
    part = component(replay(cli, {"gpu": (channels, values)}, 7.0), "gpu:GPU-1")
    assert part["source"] == "nvml-energy" and "fallback" not in part
    assert part["mean_w"] == pytest.approx(300, rel=0.03)


def test_what_neither_the_counter_nor_its_power_measured_is_missing(cli: Cli) -> None:
    # given 300 W; the counter stands still from 1.5 s on, and its power is not there after 3 s
    def values(t: float) -> tuple[float, float]:
        power_mw = 300e3 + (t * 50) % 2 if t < 3.0 else math.nan
        return 5e6 + 300e3 * min(t, 1.5), power_mw

    channels = [
        f"GPU-1/energy energy J 1e-3 0 counter nvml-energy {GPU}",
        f"GPU-1/power_average power W 1e-3 0 gauge nvml-power-average {GPU}",
    ]
    summary = replay(cli, {"gpu": (channels, values)}, 5.0)
    part = component(summary, "gpu:GPU-1")
    assert part["fallback"]["instead_of"] == "nvml-energy"
    (missing,) = summary["energy"]["partial"]
    assert missing["id"] == "gpu:GPU-1"
    assert missing["missing_s"] == pytest.approx(summary["duration_s"] - 3.0, abs=0.5)
    assert "stalled" in codes(summary, "gpu:GPU-1")


def test_what_is_counted_beyond_the_last_reading_is_not_missing(cli: Cli) -> None:
    # given 300 W whose readings are gone after 2 s: the last one is held for a while
    def values(t: float) -> tuple[float]:
        return (300e3 + (t * 50) % 2 if t < 2.0 else math.nan,)

    channels = [f"GPU-1/power_average power W 1e-3 0 gauge nvml-power-average {GPU}"]
    summary = replay(cli, {"gpu": (channels, values)}, 4.0)
    part, (missing,) = component(summary, "gpu:GPU-1"), summary["energy"]["partial"]
    read_s = summary["duration_s"] - missing["missing_s"]
    assert part["device_j"] == pytest.approx(300 * read_s, rel=0.01)
    assert part["mean_w"] == pytest.approx(300, rel=0.01)


def test_a_counter_that_stands_still_at_the_end_makes_the_total_partial(cli: Cli) -> None:
    # given 100 W of a package whose counter stands still for the last 2 s
    powercap = ([PACKAGE], lambda t: (1e6 * (7 + 100 * min(t, 1.5)),))
    summary = replay(cli, {"powercap": powercap}, 3.5)
    (missing,) = summary["energy"]["partial"]
    assert missing["id"] == "cpu:package-0"
    assert missing["missing_s"] == pytest.approx(summary["duration_s"] - 1.5, abs=0.5)
    assert "stalled" in codes(summary, "cpu:package-0")


def test_phases_by_averages_that_stand_in_for_a_counter_are_as_sure_as_they_say() -> None:
    # given bursts that a 1 s average hides, and a counter that is dead from 5 s on
    random = np.random.default_rng(3)
    gpu = Gpu(Square(0.25, 100, 600), sensor=Sensor(0.1, 0.025))
    lane = nvml_lane("nvml-energy", "nvml-power-average")
    t_s = read_times_s(random, 0.0, 20.0, period_s=0.02)
    counter = counter_mj(gpu, np.minimum(t_s, 5.0))
    rows = [batch(t_s, counter, average_mw(gpu, t_s))]
    sources = find_sources([lane])
    sources += find_cross_sources([lane], sources)
    begin_s = np.sort(random.uniform(6.0, 19.0, 200))
    edges_s = np.stack((begin_s, begin_s + random.uniform(0.05, 0.5, 200)), axis=1)
    at_s = np.unique(np.append(edges_s, [0.1, 19.9]))
    at_ns = np.array([instant_ns(t) for t in at_s.tolist()])
    curve = with_fallback(*integrate(rows, sources, at_ns), at_ns)
    assert curve.instead_of == "nvml-energy" and curve.instead_averages_s == 1.0
    # then the energy of a phase is within its u as often as it says
    held = []
    for begin, end in np.searchsorted(at_s, edges_s).tolist():
        parts = budget(curve, at_ns, np.array([begin]), np.array([end]))
        truth_j = float(np.diff(cumulative_j(gpu.wave, at_s[[begin, end]]))[0])
        off_j = abs(curve.energy_j[end] - curve.energy_j[begin] - truth_j)
        held.append(off_j <= 2 * parts._replace(gain_j=0.0, offset_j=0.0).u_j)
    assert np.mean(held) >= 0.9


@pytest.mark.parametrize(
    ("read_s", "code"), [((0.7, 60.0), "late-start"), ((0.0, 1.7), "ended-early")]
)
def test_time_without_readings_at_an_end_is_in_u(
    cli: Cli, read_s: tuple[float, float], code: str
) -> None:
    # given 300 W, and a counter that answers only from 0.7 s on, or until 1.7 s, of 2.5 s
    def values(t: float) -> tuple[float]:
        answers = read_s[0] <= t < read_s[1]
        return (5e6 + 300e3 * math.floor(t * 10) / 10 if answers else math.nan,)

    channel = f"GPU-1/energy energy J 1e-3 0 counter nvml-energy {GPU}"
    summary = replay(cli, {"gpu": ([channel], values)}, 2.5)
    # then what is missing is uncertain, or the total says that it is missing
    part = component(summary, "gpu:GPU-1")
    assert abs(part["device_j"] - 300 * summary["duration_s"]) <= part["u_j"]
    assert code in codes(summary, "gpu:GPU-1")
    # and the line over time shows the power of the time that was read
    shown_w = [w for w in part["trace_w"] if w is not None]
    assert shown_w == pytest.approx([300] * len(shown_w), rel=0.1)


def test_a_gpu_that_is_off_has_no_fault(cli: Cli) -> None:
    # given a board whose counter stands at 0, as its power does, beside one that works
    channels = [
        f"GPU-1/energy energy J 1e-3 0 counter nvml-energy {GPU}",
        f"GPU-1/power power W 1e-3 0 gauge nvml-power {GPU}",
        "x power W 1 0 gauge acme kind=gpu component=gpu:x",
    ]
    summary = replay(cli, {"gpu": (channels, lambda _t: (0.0, 0.0, 100.0))}, 1.5)
    assert codes(summary, "GPU-1") == set()
    assert component(summary, "gpu:GPU-1")["device_j"] is None
    assert component(summary, "gpu:x")["mean_w"] == pytest.approx(100, rel=0.01)


def test_a_rapl_counter_that_stands_still_leaves_the_cpu_to_the_model(
    cli: Cli, powercap_sim: BuildTree
) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", start_uj=4711))
    _, summary = cli.measure("--sensor", tree.spec, "--", "sleep", "1.5")
    parts = {c["id"]: c for c in summary["energy"]["components"] if c["in_total"]}
    assert parts["cpu:modelled"]["device_j"] > 0
    assert parts["cpu:package-0"]["device_j"] is None
    assert "unknown" in codes(summary, "cpu:package-0")


@pytest.mark.parametrize("dies_at_s", [-1.0, 2.5])
def test_a_package_that_stands_still_gives_way_to_its_mmio_zone(cli: Cli, dies_at_s: float) -> None:
    # given 100 W, which the MSR's zone shows until it stands still, and the mmio zone all the time;
    # the cores in it are in both
    def values(t: float) -> tuple[float, float, float, float]:
        until_s = min(t, dies_at_s) if dies_at_s > 0 else 1.0
        return 1e8 * until_s, 5e7 * until_s, 7e6 + 1e8 * t, 5e7 * t

    channels = [
        PACKAGE,
        PACKAGE.replace("intel-rapl:0", "intel-rapl:0:0").replace("name=package-0", CORE),
        PACKAGE.replace("intel-rapl:0", "intel-rapl-mmio:0"),
        PACKAGE.replace("intel-rapl:0", "intel-rapl-mmio:0:0").replace("name=package-0", CORE),
    ]
    summary = replay(cli, {"powercap": (channels, values)}, 5.0)
    measured = [c for c in summary["energy"]["components"] if c["kind"] == "cpu" and c["in_total"]]
    (part,) = measured
    assert part["id"] == "cpu:package-0"
    assert part["mean_w"] == pytest.approx(100, rel=0.03)
    assert part["source"] == "powercap-mmio" if dies_at_s < 0 else "powercap+powercap-mmio"
    assert part["fallback"]["instead_of"] == "powercap"


@pytest.mark.parametrize("dies_at_s", [-1.0, 2.5])
def test_perf_that_stands_still_gives_way_to_powercap(cli: Cli, dies_at_s: float) -> None:
    # given 100 W, which perf shows until it stands still, and powercap all the time
    perf = ([EVENT], lambda t: (1e6 * 100 * (min(t, dies_at_s) if dies_at_s > 0 else 1.0),))
    powercap = ([PACKAGE], lambda t: (1e6 * (7 + 100 * t),))
    summary = replay(cli, {"perf": perf, "powercap": powercap}, 5.0)
    measured = [c for c in summary["energy"]["components"] if c["kind"] == "cpu" and c["in_total"]]
    # then the package is counted once, by what answers
    (part,) = measured
    assert part["id"] == "cpu:package-0"
    assert part["mean_w"] == pytest.approx(100, rel=0.03)
    assert part["source"] == ("powercap" if dies_at_s < 0 else "perf+powercap")
    assert part["fallback"]["instead_of"] == "perf"


def test_phases_by_power_that_was_stored_beside_a_counter_are_as_sure_as_they_say(
    tmp_path: Path,
) -> None:
    # given power that changes every few seconds, read beside a counter that is dead, on disk
    random = np.random.default_rng(9)
    t_s = np.arange(0, 300, 0.1)
    level_w = np.repeat(random.uniform(100, 600, 100), 30)
    watts = np.floor(1e3 * level_w * (1 + 0.03 * random.standard_normal(len(t_s))))
    board = {"uuid": "GPU-1", "model": "H100", "index": "0"}
    channels = (
        Channel("GPU-1/energy", "energy", "J", 1e-3, 0.0, True, "nvml-energy", board),
        Channel("GPU-1/power", "power", "W", 1e-3, 0.0, False, "nvml-power", board),
    )
    lane = LaneInfo("nvml", "nvml", 100_000_000, channels)
    t_ns = np.round(t_s * NS_PER_S).astype(np.int64) + NS_PER_S
    writer = LaneWriter(tmp_path, lane)
    columns = [np.full(len(t_s), 7.0).tobytes(), watts.tobytes()]
    writer.write(t_ns.tobytes(), np.zeros(len(t_s), np.uint32).tobytes(), columns)
    writer.close()
    stored = list(LaneReader(tmp_path, "nvml"))
    assert sum(len(batch.t_ns) for batch in stored) < 0.5 * len(t_s)
    # when phases of 1 to 4 s are asked for, of what is on disk and of all that was read
    (source,) = find_sources([lane], silent={("nvml", 0)})
    at_ns = np.sort(random.integers(t_ns[300], t_ns[-20], 400))
    whole = [Batch(t_ns, np.zeros(len(t_ns), np.int64), np.array([watts * 0, watts]))]
    on_disk, truth = (integrate(rows, [source], at_ns)[0] for rows in (stored, whole))
    # then they differ by no more than u says
    curve = stood_in(on_disk)
    begins = np.arange(0, 396)
    off = [
        abs(np.diff(on_disk.energy_j)[i] - np.diff(truth.energy_j)[i])
        <= 2 * budget(curve, at_ns, np.array([i]), np.array([i + 1]))._replace(gain_j=0.0).u_j
        for i in begins
    ]
    assert np.mean(off) >= 0.95


# --- sources that cover others --------------------------------------------------------------------

WATTS = {
    "GPU-1/energy": 700.0,
    "GPU-1/power_instant": 500.0,
    "GPU-1/power_average": 500.0,
    "GPU-1/module_power_average": 700.0,
    "Grace Power Socket 0": 200.0,
    "CPU Power Socket 0": 140.0,
    "SysIO Power Socket 0": 20.0,
    "Module Power Socket 0": 700.0,
}
"""A GH200: its module draws 700 W, of which 500 W the GPU and 200 W Grace with its memory."""


def nvml(*names: str) -> tuple[list[str], Any]:
    sources = {
        "energy": "energy J 1e-3 0 counter nvml-energy",
        "power_instant": "power W 1e-3 0 gauge nvml-power-instant",
        "power_average": "power W 1e-3 0 gauge nvml-power-average",
        "module_power_average": "power W 1e-3 0 gauge nvml-module-average",
    }
    channels = [f"GPU-1/{name} {sources[name]} uuid=GPU-1 model=GH200 index=0" for name in names]
    watts = [WATTS[f"GPU-1/{name}"] for name in names]
    return channels, lambda t: tuple(
        1e3 * (w * t + 5) if name == "energy" else 1e3 * w + (t * 50) % 2
        for name, w in zip(names, watts, strict=True)
    )


def grace(*meters: str) -> tuple[list[str], Any]:
    channels = [
        f"m{n} power W 1e-6 0 gauge hwmon-power chip=power_meter device=A{n} input=power1 "
        f"label={meter.replace(' ', '~')}"
        for n, meter in enumerate(meters)
    ]
    return channels, lambda t: tuple(1e6 * WATTS[m] + (t * 50) % 2 for m in meters)


ALL_NVML = ("energy", "power_instant", "power_average", "module_power_average")
CASES = {
    "GPU and Grace add up": (ALL_NVML, ("Grace Power Socket 0",), {"gpu": 500, "cpu": 200}),
    "with all meters of Grace": (ALL_NVML, tuple(WATTS)[4:], {"gpu": 500, "cpu": 200}),
    "no hwmon: the module alone": (ALL_NVML, (), {"gpu": 700}),
    "no power of the GPU": (
        ("energy", "module_power_average"), ("Grace Power Socket 0",), {"gpu": 700}
    ),
    "no NVML: the module's meter": ((), tuple(WATTS)[4:], {"other": 700}),
    "Grace alone": ((), ("Grace Power Socket 0", "CPU Power Socket 0"), {"cpu": 200}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_grace_hopper_counts_its_module_once(cli: Cli, case: str) -> None:
    of_nvml, meters, watts = CASES[case]
    lanes = {"nvml": nvml(*of_nvml)} if of_nvml else {}
    specs: list[str] = []
    for name, (channels, values) in (lanes | ({"grace": grace(*meters)} if meters else {})).items():
        path = cli.folder / name
        write_replay(path, channels, [(i * STEP_S, *values(i * STEP_S)) for i in range(1500)])
        path.write_text(path.read_text().replace("~", " "))
        specs += ["--sensor", f"replay:{path}"]
    _, summary = cli.measure("--scope", "device", *specs, "--", "sleep", "2.5")
    by_kind: dict[str, float] = {}
    for part in summary["energy"]["components"]:
        if part["in_total"] and part["provenance"] == "measured":
            by_kind[part["kind"]] = by_kind.get(part["kind"], 0.0) + part["mean_w"]
        assert bool(part.get("excluded")) != part["in_total"]
    assert by_kind == pytest.approx(watts, rel=0.05)
    # and no model of what is measured inside another source is added
    modelled = {c["kind"] for c in summary["energy"]["components"] if c["provenance"] == "modelled"}
    assert modelled == set()


def test_a_counter_on_a_module_that_counts_its_gpu_alone_is_found_out(cli: Cli) -> None:
    # given the readings of a module, and a counter that integrates the GPU's power
    channels, values = nvml(*ALL_NVML)
    gpu_only = (channels, lambda t: (1e3 * (500 * t + 5), *values(t)[1:]))
    summary = replay(cli, {"nvml": gpu_only}, 2.5)
    part = component(summary, "gpu:GPU-1")
    assert part["source"] == "nvml-energy"
    assert part["mean_w"] == pytest.approx(500, rel=0.03)
    # and the CPU is estimated, as nothing measures it
    assert component(summary, "cpu:modelled")["in_total"]


def test_two_gpus_of_one_module_count_it_once(cli: Cli) -> None:
    # given two GPUs, each with the power of its own, and with the one counter of their module
    def values(t: float) -> tuple[float, ...]:
        odd = (t * 50) % 2
        return tuple(
            number
            for watts in (500.0, 480.0)
            for number in (
                1e3 * (1200 * t + 3 * math.sin(7 * t) + 9),
                1e3 * watts + odd,
                12e5 + odd,
            )
        )

    channels = [
        f"GPU-{n}/{name} uuid=GPU-{n} model=GB200 index={n}"
        for n in (1, 2)
        for name in (
            "energy energy J 1e-3 0 counter nvml-energy",
            "power_average power W 1e-3 0 gauge nvml-power-average",
            "module_power_average power W 1e-3 0 gauge nvml-module-average",
        )
    ]
    summary = replay(cli, {"nvml": (channels, values)}, 3.0)
    counted = [c for c in summary["energy"]["components"] if c["in_total"]]
    assert [c["id"] for c in counted] == ["gpu:GPU-1"]
    assert summary["energy"]["total_j"] == pytest.approx(1200 * summary["duration_s"], rel=0.03)
    assert "mirrored" in codes(summary, "gpu:GPU-2")


@pytest.mark.parametrize("sees_grace", [True, False])
def test_a_simulated_grace_hopper_is_its_gpu_and_its_socket_or_its_module(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path, sees_grace: bool
) -> None:
    # given a GPU of 300 and 700 W in turn, beside Grace at 200 W, in one module with one counter
    grace_tree(tmp_path, 0, module=True)
    board = Gpu(
        Square(0.8, 300, 700), name="NVIDIA GH200 480GB", module=Square(0.8, 500, 900),
        counted=Square(0.8, 500, 900),
    )  # fmt: skip
    nvml_sim(Scenario())  # compiles first: a scenario's clock runs from when it is written down
    sim = nvml_sim(Scenario(gpus=(board,)))
    sensors = ["--sensor", sim.spec]
    sensors += ["--sensor", f"hwmon:{tmp_path}/class/hwmon"] if sees_grace else []
    _, summary = cli.measure("--scope", "device", *sensors, "--", "sleep", "4")
    begin_ns, end_ns = summary["recording"]["window_ns"]
    grace_j = 200 * (end_ns - begin_ns) * 1e-9
    truth_j = sim.scenario.energy_j(begin_ns, end_ns) + grace_j
    # then the total is what the module took, once, and nothing is estimated beside it
    energy = summary["energy"]
    assert energy["provenance"] == "measured"
    assert abs(energy["total_j"] - truth_j) <= energy["u_j"] < 0.15 * truth_j
    parts = {c["kind"]: c for c in energy["components"] if c["in_total"]}
    assert parts.keys() == ({"gpu", "cpu"} if sees_grace else {"gpu"})
    assert ("whole module" in parts["gpu"]["label"]) is not sees_grace


def lane_of(name: str, *channels: tuple[str, dict[str, str]], quantity: str = "power") -> LaneInfo:
    unit = {"power": "W", "energy": "J"}[quantity]
    return LaneInfo(
        name,
        name,
        20_000_000,
        tuple(
            Channel(f"{source}/{n}", quantity, unit, 1.0, 0.0, quantity == "energy", source, labels)
            for n, (source, labels) in enumerate(channels)
        ),
    )


def rapl(*names: str) -> LaneInfo:
    zones = [
        ("powercap", {"zone": f"intel-rapl:{n}", "name": name}) for n, name in enumerate(names)
    ]
    return lane_of("powercap", *zones, quantity="energy")


def apu(*devices: str) -> LaneInfo:
    return lane_of("hwmon", *(
        ("hwmon-power", {"chip": "amdgpu", "label": "PPT", "device": device, "input": "power1",
                         "part_of": "processor"})
        for device in devices
    ))  # fmt: skip


def meter(scope: str, kind: str = "other") -> LaneInfo:
    return lane_of("meter", ("acme", {"scope": scope, "kind": kind, "component": f"{kind}:meter"}))


GPU_POWER = lane_of("nvml", ("nvml-power", {"uuid": "GPU-1", "model": "H100", "index": "0"}))


@pytest.mark.parametrize(
    ("lanes", "counted"),
    [
        # psys contains the packages, and stands for them where there are none
        ([rapl("package-0", "psys")], {"cpu:package-0"}),
        ([rapl("psys")], {"other:psys"}),
        ([rapl("psys"), GPU_POWER], {"gpu:GPU-1"}),
        # MI300A: four sockets of CPU and GPU, which RAPL repeats
        ([apu("0000:01:00.0")], {"cpu:package-0"}),
        ([apu("0002:01:00.0", "0000:01:00.0")], {"cpu:package-0", "cpu:package-1"}),
        (
            [rapl("package-0", "package-1"), apu("0000:01:00.0", "0002:01:00.0")],
            {"cpu:package-0", "cpu:package-1"},
        ),
        # the meter of a node contains all; alone it is better than nothing
        ([meter("node"), rapl("package-0")], {"cpu:package-0"}),
        ([meter("node")], {"other:meter"}),
        ([meter("module"), GPU_POWER], {"gpu:GPU-1"}),
        ([meter("no such scope"), GPU_POWER], {"other:meter", "gpu:GPU-1"}),
    ],
)
def test_of_scopes_that_overlap_the_narrower_ones_that_add_up_are_counted(
    lanes: list[LaneInfo], counted: set[str]
) -> None:
    sources = find_sources(lanes)
    assert {source.id for source in sources if source.in_total} == counted
    assert all(bool(source.excluded) != source.in_total for source in sources)
    assert len({source.id for source in sources}) == len(sources)


def test_a_wider_source_stands_for_narrower_ones_that_are_silent() -> None:
    lane = rapl("package-0", "psys", "dram")
    sources = find_sources([lane], silent={("powercap", 0)})
    # the silent package is still listed as unknown, and not left out without a word
    assert {source.id for source in sources if source.in_total} == {"cpu:package-0", "other:psys"}
    assert math.isclose(sum(source.kind == "cpu" for source in sources), 2)
