"""Impossible readings are missing: no joule is lost or invented, whatever a sensor shows once."""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, codes, write_replay
from sim.nvml import BuildNvml, Gpu, Scenario
from sim.powercap import BuildTree, Zone
from sim.sysfs import hwmon_chip
from sim.waves import Constant

from pepr_profiler import _core
from pepr_profiler.daemon.meters import Meter
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.sources import Source, find_sources
from pepr_profiler.trace.lane import Batch, Channel, LaneInfo, LaneReader, LaneWriter, describe
from pepr_profiler.units import NS_PER_S as S

RANGE_UJ = 262_143_328_850.0
CPU = Source(
    "cpu:x", "cpu", "x", "lane", 0, "powercap", counter=True, scale=1e-6, modulus=RANGE_UJ,
    limit_w=3000.0,
)  # fmt: skip
T_S = np.arange(0, 10.005, 0.02)
WATTS = 100.0


def rising(watts: float = WATTS, *, start_j: float = 5e4) -> np.ndarray:
    """What a faultless counter of µJ shows at T_S."""
    return np.floor(1e6 * (start_j + watts * T_S)) % RANGE_UJ


def integrated(
    source: Source,
    raw: np.ndarray,
    at_s: Sequence[float],
    *,
    rows: int = 97,
    alone: np.ndarray | None = None,
) -> EnergyCurve:
    """The curve of these rows, in batches of so many; those near the rows `alone` have one row."""
    t_ns = np.round(T_S * S).astype(np.int64)
    firsts = np.arange(0, len(t_ns), rows)
    if alone is not None:
        near = (alone[:, np.newaxis] + np.arange(-8, 9)).ravel()
        firsts = np.union1d(firsts, near[(near > 0) & (near < len(t_ns))])
    parts = [slice(*ends) for ends in itertools.pairwise([*firsts.tolist(), len(t_ns)])]
    batches = [Batch(t_ns[p], np.zeros_like(t_ns[p]), raw[np.newaxis, p]) for p in parts]
    return integrate(batches, [source], np.round(np.array(at_s) * S).astype(np.int64))[0]


def metered_j(source: Source, raw: np.ndarray) -> float:
    """What the daemon makes of the same rows."""
    meter = Meter(source)
    for part in np.array_split(np.arange(len(raw)), 11):
        times = array("q", (1 + np.round(T_S[part] * S)).astype(int).tolist())
        meter.take(times, array("d", raw[part].tolist()))
    return meter.energy_j


def at(*rows: int, add: float = 0.0, value: float | None = None) -> Callable[[np.ndarray], None]:
    """Changes a few rows."""

    def spoil(raw: np.ndarray) -> None:
        for row in rows:
            raw[row] = raw[row] + add if value is None else value

    return spoil


JUMP = 64_852e6
ONCE = {
    "jump": (at(250, add=JUMP), 1),
    "twice in a row": (at(250, 251, add=JUMP), 2),
    "two values in a row": (lambda raw: (at(250, add=JUMP)(raw), at(251, add=3 * JUMP)(raw)), 2),
    "a few times": (at(50, 51, 120, 250, 400, add=JUMP), 5),
    "first": (at(0, add=JUMP), 1),
    "first two": (at(0, 1, add=JUMP), 2),
    "first 0": (at(0, value=0.0), 1),
    "last": (at(-1, add=JUMP), 1),
    "0": (at(250, value=0.0), 1),
    "down and back": (at(250, 251, add=-3e9), 2),
    "a little down": (at(250, add=-5e6), 1),
    "32 bits": (at(250, value=2.0**32 - 1), 1),
    "63 bits": (at(250, value=2.0**63 - 1), 1),
    "64 bits": (at(250, 251, 252, value=2.0**64 - 1), 3),
    "64 bits at first": (at(0, value=2.0**64 - 1), 1),
    "infinite": (at(250, value=math.inf), 0),
    "unknown": (at(250, value=math.nan), 0),
    "possible, but a counter does not fall": (at(250, add=20e6), 1),
}


@pytest.mark.parametrize("start_j", [5e4, RANGE_UJ * 1e-6 - 510.0], ids=["", "beside a wrap"])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("what", ONCE)
def test_a_counter_that_is_wrong_for_a_moment_loses_and_invents_nothing(
    what: str, rows: int, start_j: float
) -> None:
    # given 100 W for 10 s, and readings that cannot be
    raw = rising(start_j=start_j)
    spoil, impossible = ONCE[what]
    spoil(raw)
    alone = np.flatnonzero(raw != rising(start_j=start_j)) if rows == 1 else None
    # when the energy of it all, and of a part, is asked for
    curve = integrated(CPU, raw, [0.0, 3.0, 7.0, 10.0], rows=97 if rows == 1 else rows, alone=alone)
    # then it is 100 W times time, and what was left out is counted
    assert np.diff(curve.energy_j) == pytest.approx([300, 400, 300], abs=2.1)
    assert (curve.resets, curve.impossible) == (0, impossible)
    # and the daemon counts as much
    assert metered_j(CPU, raw) == pytest.approx(1000, abs=4.1)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("bits", [32, 64])
def test_first_readings_with_all_bits_set_are_missing(bits: int, count: int) -> None:
    # given a counter of 100 W that begins with no value, and is then a little above 2^32 - 1
    raw = rising(start_j=4400.0)
    at(*range(count), value=2.0**bits - 1)(raw)
    curve = integrated(CPU, raw, [0.2, 3.0, 10.0])
    assert np.diff(curve.energy_j) == pytest.approx([280, 700], abs=2.1)
    assert (curve.resets, curve.impossible) == (0, count)
    assert metered_j(CPU, raw) == pytest.approx(1000 - 2.0 * count, abs=4.1)


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("to_j", [0.0, 3.0, 4e4, 2e5, 1.5e5], ids=str)
@pytest.mark.parametrize("after_w", [100.0, 250.0])
def test_a_jump_that_stays_is_a_reset_and_u_covers_what_flowed_over_it(
    to_j: float, after_w: float, rows: int
) -> None:
    # given 100 W; after 5 s a counter that goes on elsewhere, at a power of its own
    raw = rising()
    later = T_S > 5.001
    raw[later] = np.floor(1e6 * (to_j + after_w * (T_S[later] - 5.01)))
    curve = integrated(CPU, raw, [0.0, 10.0], rows=rows)
    # then one reset, and no more is unknown than one read of 20 ms
    assert (curve.resets, curve.impossible) == (1, 0)
    energy_j = float(np.diff(curve.energy_j)[0])
    truth_j = 500 + 5 * after_w
    assert curve.gap_j2 is not None
    u_j = 2 * math.sqrt(float(curve.gap_j2[-1]))
    assert abs(energy_j - truth_j) <= u_j + 2.0 <= 15
    assert metered_j(CPU, raw) == pytest.approx(truth_j, abs=15)


def test_an_impossible_reading_just_after_a_reset_does_not_hide_it() -> None:
    # given 100 W, a reset at 5 s, and a reading just after it that belongs to nothing
    raw = rising()
    later = T_S > 5.001
    raw[later] = np.floor(1e6 * 250 * (T_S[later] - 5.01))
    raw[[252, 254, 256]] = 2.0**64 - 1, 9e9, 2.0**63
    curve = integrated(CPU, raw, [0.0, 10.0])
    assert (curve.resets, curve.impossible) == (1, 3)
    assert float(np.diff(curve.energy_j)[0]) == pytest.approx(1750, abs=5)
    assert metered_j(CPU, raw) == pytest.approx(1750, abs=15)


def test_a_reset_while_nothing_is_read_is_bridged_and_uncertain() -> None:
    # given 100 W; the driver is gone for 2 s, and its counter begins anew
    raw = rising()
    raw[(T_S > 4) & (T_S < 6)] = math.nan
    later = T_S >= 6
    raw[later] = np.floor(1e6 * 100 * (T_S[later] - 5.5))
    curve = integrated(CPU, raw, [0.0, 10.0])
    assert curve.gap_j2 is not None
    # then the power on both sides is taken for what is unknown, the 1.5 s before it began at 0
    assert float(np.diff(curve.energy_j)[0]) == pytest.approx(1000, rel=0.01)
    assert math.sqrt(float(curve.gap_j2[-1])) == pytest.approx(150 / math.sqrt(3), rel=0.1)


def test_what_a_counter_catches_up_on_is_energy() -> None:
    # given a counter that stands still for 3 s at 800 W and then shows all at once
    raw = rising(800.0)
    still = (T_S > 4) & (T_S < 7)
    raw[still] = raw[T_S <= 4][-1]
    curve = integrated(CPU, raw, [0.0, 10.0])
    assert float(np.diff(curve.energy_j)[0]) == pytest.approx(8000, rel=0.005)
    assert (curve.resets, curve.impossible) == (0, 0)
    assert metered_j(CPU, raw) == pytest.approx(8000, rel=0.005)


def test_a_device_that_was_not_read_for_long_may_take_a_big_step() -> None:
    raw = rising(500.0)
    raw[(T_S > 1) & (T_S < 9.5)] = math.nan
    curve = integrated(CPU, raw, [0.0, 10.0])
    assert float(np.diff(curve.energy_j)[0]) == pytest.approx(5000, rel=0.005)
    assert (curve.resets, curve.impossible) == (0, 0)


@pytest.mark.parametrize("value", [3.7e9, 65_535e3, 2.0**32 - 1, 2.0**63, math.inf, -5e3, 0.0])
def test_a_power_reading_that_cannot_be_is_missing(value: float) -> None:
    # given a GPU at 300 W, whose reading in mW is wrong for one refresh
    source = Source("gpu:x", "gpu", "x", "l", 0, "nvml-power", counter=False, scale=1e-3,
                    limit_w=5000.0)  # fmt: skip
    raw = np.full(len(T_S), 300e3) + np.arange(len(T_S)) % 2
    raw[250:255] = value
    curve = integrated(source, raw, [0.0, 10.0])
    assert float(np.diff(curve.energy_j)[0]) == pytest.approx(3000, rel=0.001)
    assert curve.impossible == (5 if 5e6 < value < math.inf else 0)


@pytest.mark.parametrize(
    "what", ["jump", "twice in a row", "0", "64 bits", "down and back", "stays"]
)
def test_rows_that_are_left_out_on_disk_change_none_of_that(tmp_path: Path, what: str) -> None:
    # given 100 W for 200 s on disk, where most rows are left out, and odd readings on the way
    t_s = np.arange(0, 200, 0.02)
    random = np.random.default_rng(5)
    raw = np.floor(1e6 * (5e4 + np.cumsum(random.normal(2.0, 0.02, len(t_s)))))
    truth_j = (raw[-1] - raw[0]) * 1e-6
    odd = np.arange(1500, 9000, 2000)
    if what == "stays":
        for row in odd:
            raw[row:] += JUMP
    else:
        for row in odd:
            window = raw[row - 250 : row + 251].copy()
            ONCE[what][0](window)
            raw[row - 250 : row + 251] = window
    channel = Channel("z", "energy", "J", 1e-6, 0.0, True, "powercap", {})
    lane = LaneInfo("powercap", "powercap", 20_000_000, (channel,))
    t_ns = np.round(t_s * S).astype(np.int64) + S
    writer = LaneWriter(tmp_path, lane)
    writer.write(t_ns.tobytes(), np.zeros(len(t_s), np.uint32).tobytes(), [raw.tobytes()])
    writer.close()
    batches = list(LaneReader(tmp_path, "powercap"))
    assert sum(len(batch.t_ns) for batch in batches) < 0.5 * len(t_s)
    source = CPU._replace(modulus=0.0)
    curve = integrate(batches, [source], t_ns[[0, -1]])[0]
    assert float(np.diff(curve.energy_j)[0]) == pytest.approx(truth_j, rel=0.001)
    if what == "stays":
        assert (curve.resets, curve.impossible) == (len(odd), 0)
    else:
        assert curve.resets == 0
        assert (
            2 / 3 <= curve.impossible / (len(odd) * ONCE[what][1]) <= 1
        )  # of equal rows some are left out


# --- what a device can draw -----------------------------------------------------------------------


def lane_of(source: str, quantity: str, **labels: str) -> LaneInfo:
    unit = {"energy": "J", "power": "W"}[quantity]
    channel = Channel("x/y", quantity, unit, 1.0, 0.0, quantity == "energy", source, labels)
    return LaneInfo(source, source, 20_000_000, (channel,))


GPU = {"uuid": "GPU-1", "index": "0", "model": "NVIDIA B200"}
ZONE = {"zone": "intel-rapl:0", "name": "package-0"}


@pytest.mark.parametrize(
    ("lane", "drawn_w", "impossible_w"),
    [
        # a GB300 module draws 2.7 kW, a B300 1.4 kW; either may pass its limit for a moment
        (lane_of("nvml-energy", "energy", **GPU), 2700, 65_535),
        (lane_of("nvml-power", "power", **GPU, limit_w="1000"), 2700, 5000),
        (lane_of("nvml-energy", "energy", **GPU, limit_w="700"), 2700, 3000),
        (lane_of("nvml-module-instant", "power", **GPU), 5600, 65_535),
        # two sockets of 500 W; a limit that is the thermal design power of a desktop that boosts
        (lane_of("powercap", "energy", **ZONE), 1000, 65_535),
        (lane_of("powercap", "energy", **ZONE, limit_w="125"), 400, 3000),
        (lane_of("powercap", "energy", **ZONE, limit_w="0"), 1000, 65_535),
        (lane_of("powercap", "energy", **ZONE, limit_w="nan"), 1000, 65_535),
        (lane_of("acme", "power", kind="other", limit_w="50 W"), 15_000, 65_535),
        (lane_of("acme", "power", kind="gpu"), 2700, 65_535),
        (lane_of("acme", "energy", kind="gpu", limit_w="300"), 1000, 3000),
    ],
)  # fmt: skip
def test_what_is_drawn_is_kept_and_what_cannot_be_is_left_out(
    lane: LaneInfo, drawn_w: float, impossible_w: float
) -> None:
    (source,) = find_sources([lane])
    assert drawn_w < source.limit_w < impossible_w


def limits_of(spec: str) -> dict[str, str | None]:
    sampler = _core.Sampler(spec, 10**9)
    assert sampler.wait_ready(10)
    channels = describe(sampler.channels)
    sampler.stop(1.0)
    return {channel.name: channel.labels.get("limit_w") for channel in channels}


def test_drivers_record_what_limits_a_device(
    nvml_sim: BuildNvml, powercap_sim: BuildTree, tmp_path: Path
) -> None:
    # given a board with a limit of 700 W, and a module around another
    boards = (Gpu(Constant(300), power_limit_w=700), Gpu(Constant(300), module=Constant(400),
              power_limit_w=900), Gpu(Constant(300), power_limit_w=None))  # fmt: skip
    limits = limits_of(nvml_sim(Scenario(gpus=boards)).spec)
    uuids = sorted({name.split("/")[0] for name in limits})
    of = {
        name.removeprefix("GPU-00000000-0000-4000-8000-00000000000"): w
        for name, w in limits.items()
    }
    assert len(uuids) == 3
    # then the limit is that of the GPU's readings; the counter of the second is its module's
    assert of["0/energy"] == of["0/power_instant"] == of["0/power_average"] == "700"
    assert (of["1/energy"], of["1/power_instant"], of["1/module_power_instant"]) == (
        None,
        "900",
        None,
    )
    assert of["2/energy"] is None
    # and of a RAPL zone the largest of its constraints
    tree = powercap_sim(Zone("intel-rapl:0", "package-0"), Zone("intel-rapl:0:0", "core"))
    for n, watts in enumerate((205, 0, 380)):
        (tree.path("intel-rapl:0") / f"constraint_{n}_name").write_text("x\n")
        (tree.path("intel-rapl:0") / f"constraint_{n}_max_power_uw").write_text(f"{watts}000000\n")
    assert limits_of(tree.spec) == {"intel-rapl:0": "380", "intel-rapl:0:0": None}
    # and of a chip its cap, or what it calls critical
    hwmon_chip(tmp_path, "amdgpu", {"power1_average": 10**8, "power1_cap": 10**8,
               "power1_cap_max": 3 * 10**8, "energy1_input": 5})  # fmt: skip
    hwmon_chip(tmp_path, "psu", {"power2_input": 10**8, "power2_crit": 9 * 10**8})
    assert set(limits_of(f"hwmon:{tmp_path}/class/hwmon").values()) == {"300", "900"}


# --- in a run -------------------------------------------------------------------------------------


def test_a_summary_says_how_many_readings_were_left_out_and_of_what(
    cli: Cli, tmp_path: Path
) -> None:
    # given 100 W by a counter and 200 W by a gauge, each wrong for a moment each second or so
    channels = [
        "intel-rapl:0 energy J 1e-6 262143328850 counter powercap zone=intel-rapl:0 name=package-0",
        "g/power power W 1e-3 0 gauge nvml-power uuid=GPU-1 model=B200 index=0",
    ]
    rows = [
        (
            i * 0.02,
            1e6 * (7 + 2.0 * i + (64_852 if i % 30 == 20 else 0)),
            3.7e9 if 50 <= i % 60 < 55 else 200e3 + i % 2,
        )
        for i in range(500)
    ]
    spec = write_replay(tmp_path / "odd", channels, rows)
    _, summary = cli.measure("--scope", "device", "--sensor", spec, "--", "sleep", "1.9")
    parts = {c["id"]: c for c in summary["energy"]["components"]}
    duration_s = summary["duration_s"]
    # then the energies are the truth, and both are named
    for ident, watts in (("cpu:package-0", 100), ("gpu:GPU-1", 200)):
        part = parts[ident]
        assert part["device_j"] == pytest.approx(watts * duration_s, rel=0.03)
        assert abs(part["device_j"] - watts * duration_s) <= part["u_j"]
        assert part["impossible_readings"] >= 1
        assert "impossible" in codes(summary, ident)
    # and a sound run has none
    assert parts["dram:modelled"]["impossible_readings"] == 0


def test_sensors_shows_no_power_that_cannot_be(cli: Cli, tmp_path: Path) -> None:
    channels = ["x power W 1 0 gauge acme kind=gpu", "y energy J 1 0 counter acme kind=gpu"]
    rows = [(i * 0.02, 3.7e6 if i > 5 else 40.0, 9e9 if i == 12 else 0.8 * i) for i in range(500)]
    spec = write_replay(tmp_path / "odd", channels, rows)
    result = cli("sensors", "--json", "--sensor", spec)
    shown = {c["channel"]: c["power_w"] for c in json.loads(result.stdout)["channels"]}
    assert shown == pytest.approx({"x": 40.0, "y": 40.0}, rel=0.15)
