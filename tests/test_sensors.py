"""Every driver under one contract, then what each one promises on top."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cli import SLOW_S, charged_s, made_locale, until, write_replay
from sim.nvml import (
    A100,
    H100,
    PASCAL,
    BuildNvml,
    Fault,
    Gpu,
    Scenario,
    Sensor,
    default_uuid,
)
from sim.permissions import obeying_permissions, without_perf
from sim.powercap import RANGE_UJ, BuildTree, Zone, ZoneFault, two_socket_server
from sim.sysfs import JOULE, Event, grace, hwmon_chip, perf_tree, tsc, why_no_tsc
from sim.waves import Constant, Points, Sine, Square

from pepr_profiler._core import Sampler, SensorChannel
from pepr_profiler.errors import SensorError

PERIOD_NS = 5_000_000
HOUR_NS = 3600 * 10**9  # no sample but the first and the last

QUANTITIES = {"energy", "power", "utilisation", "memory", "cpu_time", "count"}
UNITS = {"J", "W", "1", "B", "s"}


# --- helpers ------------------------------------------------------------------------------------


@pytest.fixture
def nvml(nvml_sim: BuildNvml) -> BuildNvml:
    """The factory, once all is compiled: a scenario's clock runs from when it is written down."""
    nvml_sim(Scenario())
    return nvml_sim


@dataclass(frozen=True)
class Rows:
    """Samples as they were read: times, read durations, a column a channel."""

    t_ns: list[int]
    read_ns: list[int]
    columns: dict[str, list[float]]

    def span(self, row: int) -> tuple[int, int]:
        """The interval in which this row was read."""
        return self.t_ns[row], self.t_ns[row] + self.read_ns[row]


class Lane:
    """A sampler, and all the rows that were taken from it so far."""

    def __init__(self, spec: str, period_ns: int = PERIOD_NS) -> None:
        self.sampler = Sampler(spec, period_ns)
        if not self.sampler.wait_ready(SLOW_S):
            raise TimeoutError(spec)
        self.channels: dict[str, SensorChannel] = {c.name: c for c in self.sampler.channels}
        self._t_ns, self._read_ns = array("q"), array("I")
        self._columns = [array("d") for _ in self.sampler.channels]

    def rows(self) -> Rows:
        while (batch := self.sampler.read()) is not None:
            n, t_ns, read_ns, columns = batch
            self._t_ns.frombytes(t_ns)
            self._read_ns.frombytes(read_ns)
            for column, data in zip(self._columns, columns, strict=True):
                column.frombytes(data)
            assert all(len(c) == len(self._t_ns) for c in self._columns), n
        columns_by_name = dict(zip(self.channels, map(list, self._columns), strict=True))
        return Rows(list(self._t_ns), list(self._read_ns), columns_by_name)

    def until(self, holds: Callable[[Rows], bool]) -> Rows:
        """The rows, as soon as they are what the caller waits for."""
        deadline_s = time.monotonic() + SLOW_S
        while not holds(rows := self.rows()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"never came: {rows.columns}")
            time.sleep(0.01)  # polling for a condition, no pause that a result depends on
        return rows

    def take(self, samples: int) -> Rows:
        return self.until(lambda rows: len(rows.t_ns) >= samples)

    def finish(self) -> Rows:
        assert self.sampler.stop(SLOW_S)
        return self.rows()


@contextmanager
def lane(spec: str, period_ns: int = PERIOD_NS) -> Iterator[Lane]:
    opened = Lane(spec, period_ns)
    try:
        yield opened
    finally:
        opened.sampler.stop(SLOW_S)


def why_not(spec: str) -> SensorError:
    """The error that opening this ends in; it must explain itself."""
    sampler = Sampler(spec, PERIOD_NS)
    with pytest.raises(SensorError) as caught:
        sampler.wait_ready(SLOW_S)
    assert sampler.state == "failed"
    assert sampler.stop(SLOW_S)
    with pytest.raises(SensorError):
        _ = sampler.channels
    error = caught.value
    assert error.what and error.why and error.fix
    return error


def replay(folder: Path, *lines: str) -> str:
    """A replay file whose fields are written with blanks instead of tabs."""
    file = folder / "recorded.tsv"
    file.write_text("".join(line.replace(" ", "\t") + "\n" for line in lines))
    return f"replay:{file}"


COUNTER = "channel meter/energy energy J 0.001 1000 counter replayed zone=attic"
GAUGE = "channel meter/power power W 1 0 gauge replayed"


def wrapping_replay(folder: Path) -> str:
    rows = [f"{step * 0.01} {step * 70 % 1000} {700.0}" for step in range(100)]
    return replay(folder, COUNTER, GAUGE, *rows)


def perf_spec(sysfs: Path, kind: str = "perf") -> str:
    """The spec of a perf tree, if this machine lets us count."""
    spec = f"{kind}:{sysfs}"
    sampler = Sampler(spec, HOUR_NS)
    try:
        sampler.wait_ready(SLOW_S)
    except SensorError as error:
        if "perf_event_open" in error.why or "Permission" in error.why:
            pytest.skip(f"perf events cannot be had here: {error.why}")
        raise
    finally:
        sampler.stop(SLOW_S)
    return spec


KINDS = "nvml perf hwmon powercap-still powercap-live processes-self processes-children replay"


@pytest.fixture(params=KINDS.split())
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """One healthy source of each driver."""
    kind: str = request.param
    if kind == "nvml":
        gpus = (Gpu(Square(0.2, 100, 300)), Gpu(Constant(70), sensor=A100))
        nvml: BuildNvml = request.getfixturevalue("nvml")
        return nvml(Scenario(gpus)).spec
    if kind == "perf" and (reason := why_no_tsc()):
        pytest.skip(reason)
    if kind == "perf":
        return perf_spec(perf_tree(tmp_path, [Event("energy-pkg"), Event("energy-ram")]))
    if kind == "hwmon":
        hwmon_chip(tmp_path, "amd_energy", {"energy1_input": 5_000_000})
        hwmon_chip(tmp_path, "amdgpu", {"power1_average": 30_000_000}, device="0000:03:00.0")
        return f"hwmon:{tmp_path}/class/hwmon"
    if kind.startswith("powercap"):
        powercap: BuildTree = request.getfixturevalue("powercap_sim")
        # 10 J before the wrap: psys, at 260 W, is there after 38 ms, a package after 100 ms.
        zones = two_socket_server(range_uj=100_000_000, start_uj=90_000_000)
        return powercap(*zones, live=kind.endswith("live")).spec
    return wrapping_replay(tmp_path) if kind == "replay" else kind.replace("-", ":")


# --- the contract ---------------------------------------------------------------------------------


def test_channels_say_what_each_number_is(spec: str) -> None:
    with lane(spec) as opened:
        channels = opened.sampler.channels
        assert channels
        assert len({c.name for c in channels}) == len(channels)
        for channel in channels:
            assert channel.name and channel.source
            assert channel.quantity in QUANTITIES
            assert channel.unit in UNITS
            assert channel.scale > 0 and math.isfinite(channel.scale)
            assert channel.modulus >= 0
            assert channel.counter or channel.modulus == 0
        assert opened.sampler.notes == []


def test_samples_are_whole_and_lie_on_the_clock_of_the_caller(spec: str) -> None:
    begin_ns = time.monotonic_ns()
    with lane(spec) as opened:
        opened.take(20)
        rows = opened.finish()
        end_ns = time.monotonic_ns()
        stats = opened.sampler.stats()

    assert stats["samples"] == len(rows.t_ns) >= 20
    assert stats["lost"] == 0 and stats["failed_reads"] == 0
    assert 0 < stats["cpu_s"] < (end_ns - begin_ns) * 1e-9
    assert begin_ns <= rows.t_ns[0]
    assert rows.span(-1)[1] <= end_ns
    for row in range(1, len(rows.t_ns)):
        assert rows.span(row - 1)[1] <= rows.t_ns[row]  # a read ends before the next begins
        assert rows.t_ns[row] > rows.t_ns[row - 1]
    assert max(rows.read_ns) < 1e9
    assert not any(math.isnan(value) for column in rows.columns.values() for value in column)


def test_counters_never_run_backwards(spec: str) -> None:
    with lane(spec) as opened:
        opened.take(30)
        rows = opened.finish()
        for channel in opened.channels.values():
            column = rows.columns[channel.name]
            assert min(column) >= 0
            if not channel.counter:
                continue
            if channel.modulus:
                assert max(column) < channel.modulus
            for before, after in pairwise(column):
                # A wrap is a step down by most of the range, never a small one.
                assert after >= before or (channel.modulus and before - after > channel.modulus / 4)


def test_stop_takes_a_last_sample_at_once(spec: str) -> None:
    with lane(spec, HOUR_NS) as opened:
        begin_ns = time.monotonic_ns()
        assert opened.sampler.stop(SLOW_S)
        end_ns = time.monotonic_ns()
        rows = opened.rows()
        assert opened.sampler.state == "stopped"

    assert len(rows.t_ns) == 2
    assert begin_ns <= rows.t_ns[1] <= end_ns
    assert end_ns - begin_ns < 1e9


@pytest.fixture(params=["nvml", "powercap", "replay"])
def dying_spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A source of which a part fails soon after a busy machine has opened it."""
    if request.param == "nvml":
        nvml: BuildNvml = request.getfixturevalue("nvml")
        lost = Fault("nvmlDevice", "GPU_IS_LOST", start_s=1.5, gpu=0)
        return nvml(Scenario((Gpu(Constant(50)), Gpu(Constant(60))), (lost,))).spec
    if request.param == "powercap":
        powercap: BuildTree = request.getfixturevalue("powercap_sim")
        gone = (ZoneFault("vanish", 1.5),)
        zones = (Zone("intel-rapl:0", "a", Constant(5), faults=gone), Zone("intel-rapl:1", "b"))
        return powercap(*zones, live=True).spec
    return replay(tmp_path, COUNTER, GAUGE, "0 1 1", "0.3 nan 2")


def test_a_failed_read_is_unknown_and_counted(dying_spec: str) -> None:
    with lane(dying_spec) as opened:
        opened.until(lambda rows: any(map(math.isnan, next(iter(rows.columns.values())))))
        rows = opened.finish()
        failed = opened.sampler.stats()["failed_reads"]

    columns = list(rows.columns.values())
    assert sum(math.isnan(value) for column in columns for value in column) == failed > 0
    assert not any(map(math.isnan, columns[-1]))  # the other device never notices


@pytest.mark.parametrize(
    "spec",
    ["nvml:/nowhere/lib.so", "powercap:/nowhere", "replay:/nowhere", "processes:", "magic:x", ""],
)
def test_an_absent_source_says_why_and_what_to_do(spec: str) -> None:
    error = why_not(spec)

    assert "fix: " in str(error)


def test_a_period_must_be_positive() -> None:
    with pytest.raises(ValueError, match="period_ns"):
        Sampler("processes:self", 0)


# --- powercap -------------------------------------------------------------------------------------


def test_powercap_finds_every_zone_once(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(
        *two_socket_server(), Zone("intel-rapl-mmio:1", "package-1", range_uj=65_712_999_613)
    )

    with lane(tree.spec, HOUR_NS) as opened:
        channels = opened.channels
        assert set(channels) == set(tree.zones)
        for key, zone in tree.zones.items():
            channel = channels[key]
            assert channel.quantity == "energy" and channel.counter and channel.source == "powercap"
            assert channel.scale == 1e-6
            assert channel.modulus == zone.range_uj
            assert channel.labels["zone"] == key
            assert channel.labels["name"] == zone.name
        assert channels["intel-rapl:1:1"].labels["parent"] == "intel-rapl:1"
        assert channels["intel-rapl:1:1"].labels["parent_name"] == "package-1"
        assert "parent" not in channels["intel-rapl:1"].labels


def test_powercap_reads_each_zone_from_its_own_file(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(*two_socket_server())
    values = {key: 17 + 1_000_003 * index for index, key in enumerate(tree.zones)}
    values["intel-rapl:0"] = RANGE_UJ - 1  # 12 digits arrive to the last

    with lane(tree.spec, HOUR_NS) as opened:
        for key, value_uj in values.items():
            tree.set(key, value_uj)
        rows = opened.finish()

    assert rows.columns == {key: [0.0, float(value_uj)] for key, value_uj in values.items()}


def test_powercap_follows_counters_that_wrap(powercap_sim: BuildTree) -> None:
    wave = Sine(200, 100, 0.07)
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", wave, range_uj=40_000_000), live=True)

    with lane(tree.spec, 2_000_000) as opened:
        opened.take(300)
        rows = opened.finish()
    column = rows.columns["intel-rapl:0"]
    total_uj = sum((b - a) % 40_000_000 for a, b in pairwise(column))
    truth_j = tree.energy_j("intel-rapl:0", rows.t_ns[0], rows.t_ns[-1])

    assert truth_j > 2 * 40  # it did wrap
    # On a busy machine the writer is late, at either end; a lost wrap would be 40 J.
    assert total_uj * 1e-6 == pytest.approx(truth_j, abs=300 * 0.03)


def test_powercap_notes_a_zone_that_it_may_not_read(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(*two_socket_server())
    denied = tree.path("intel-rapl:1:1") / "energy_uj"
    denied.chmod(0)

    with obeying_permissions(), lane(tree.spec, HOUR_NS) as opened:
        notes = opened.sampler.notes
        assert set(opened.channels) == set(tree.zones) - {"intel-rapl:1:1"}

    assert len(notes) == 1
    assert "intel-rapl:1:1" in notes[0].what and "dram" in notes[0].what
    assert notes[0].denied and "Permission denied" in notes[0].why
    assert f"chmod o+r {denied}" in notes[0].fix


def test_powercap_without_a_readable_zone_is_no_sensor(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(*two_socket_server())
    for key in tree.zones:
        (tree.path(key) / "energy_uj").chmod(0)

    with obeying_permissions():
        error = why_not(tree.spec)

    assert error.denied and "Permission denied" in error.why
    assert "chmod" in error.fix


def test_powercap_without_zones_is_no_sensor(tmp_path: Path) -> None:
    error = why_not(f"powercap:{tmp_path}")

    assert "energy_uj" in error.why
    assert "modprobe" in error.fix


def test_powercap_survives_garbage_and_a_zone_that_vanishes(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(
        Zone("intel-rapl:0", "a", Constant(9), faults=(ZoneFault("garbage", 0.3, 0.4),)),
        Zone("intel-rapl:1", "b", Constant(9), faults=(ZoneFault("vanish", 0.35),)),
        live=True,
    )

    with lane(tree.spec, 2_000_000) as opened:
        opened.until(lambda rows: any(map(math.isnan, rows.columns["intel-rapl:0"])))
        seen = len(opened.rows().t_ns)
        opened.until(lambda rows: not all(map(math.isnan, rows.columns["intel-rapl:0"][seen:])))
        rows = opened.until(lambda rows: any(map(math.isnan, rows.columns["intel-rapl:1"])))
    vanished = rows.columns["intel-rapl:1"]

    first_unknown = next(i for i, value in enumerate(vanished) if math.isnan(value))
    assert all(map(math.isnan, vanished[first_unknown:]))


def test_powercap_notes_a_counter_whose_range_is_unknown(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0"))
    (tree.path("intel-rapl:0") / "max_energy_range_uj").unlink()

    with lane(tree.spec, HOUR_NS) as opened:
        assert opened.channels["intel-rapl:0"].modulus == 0
        (note,) = opened.sampler.notes
    assert "max_energy_range_uj" in note.why and "reset" in note.why


def test_powercap_notes_a_directory_that_it_may_not_enter(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(*two_socket_server())
    closed = tree.path("intel-rapl:1")
    closed.chmod(0)

    try:
        with obeying_permissions(), lane(tree.spec, HOUR_NS) as opened:
            assert {"intel-rapl:0", "intel-rapl:0:1"} <= set(opened.channels)
            assert "intel-rapl:1" not in opened.channels
            assert any(str(closed) in note.fix for note in opened.sampler.notes)
    finally:
        closed.chmod(0o755)


def test_powercap_that_may_not_be_entered_at_all_says_how(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(*two_socket_server())
    tree.where.chmod(0)

    try:
        with obeying_permissions():
            error = why_not(tree.spec)
    finally:
        tree.where.chmod(0o755)
    assert error.denied and error.why.startswith("Permission denied")
    assert str(tree.where) in error.fix


@pytest.mark.parametrize("kind", ["powercap", "hwmon"])
def test_a_tree_that_changes_while_it_is_read_ends_in_an_error_or_a_sensor(
    kind: str, tmp_path: Path
) -> None:
    program = """
import os, sys
root = sys.argv[1]
print(flush=True)
while os.getppid() == int(sys.argv[2]):
    for n in range(40):
        os.makedirs(f"{root}/x:{n}", exist_ok=True)
        for name in ("name", "energy_uj", "energy1_input"):
            with open(f"{root}/x:{n}/{name}", "w") as file:
                file.write("7")
    for n in range(40):
        for name in ("name", "energy_uj", "energy1_input"):
            os.unlink(f"{root}/x:{n}/{name}")
        os.rmdir(f"{root}/x:{n}")
"""
    arguments = [sys.executable, "-c", program, str(tmp_path), str(os.getpid())]
    outcomes = set()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as churn:
        try:
            assert churn.stdout is not None
            churn.stdout.readline()
            for _ in range(100):
                sampler = Sampler(f"{kind}:{tmp_path}", HOUR_NS)
                try:
                    outcomes.add(sampler.wait_ready(SLOW_S))
                except SensorError as error:
                    outcomes.add(bool(error.why and error.fix))
                sampler.stop(SLOW_S)
        finally:
            churn.kill()
    assert outcomes == {True}


# --- perf -----------------------------------------------------------------------------------------


def test_perf_counts_what_the_kernel_counts(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    spec = perf_spec(perf_tree(tmp_path, [Event("energy-pkg"), Event("energy-ram", scale="2e-9")]))

    begin_ns, begin = time.monotonic_ns(), tsc()
    with lane(spec) as opened:
        rows = opened.until(lambda rows: rows.t_ns[-1:] > [begin_ns + 300_000_000])
        channels = opened.channels
    hertz = (tsc() - begin) / (time.monotonic_ns() - begin_ns) * 1e9

    assert set(channels) == {"cpu0/energy-pkg", "cpu0/energy-ram"}
    span_s = (rows.t_ns[-1] - rows.t_ns[0]) * 1e-9
    for name, scale in (("cpu0/energy-pkg", float(JOULE)), ("cpu0/energy-ram", 2e-9)):
        assert channels[name].scale == scale and channels[name].modulus == 0
        rise = rows.columns[name][-1] - rows.columns[name][0]
        assert rise * channels[name].scale / span_s == pytest.approx(hertz * scale, rel=0.01)
    # one read for the group: both are of one instant (a second system call takes longer)
    package, ram = (rows.columns[name] for name in channels)
    apart = sorted(b - a for a, b in zip(package, ram, strict=True))
    middle = len(apart) // 4
    assert apart[-middle] - apart[middle] < 2e-6 * hertz


def test_perf_reads_each_socket_on_a_cpu_of_its_mask(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    if os.cpu_count() == 1:
        pytest.skip("one CPU is no two sockets")
    tree = perf_tree(tmp_path, cpus={0: (0, 0), 1: (1, 0)}, cpumask="0-1")

    with lane(perf_spec(tree)) as opened:
        rows = opened.take(5)
        labels = {name: channel.labels for name, channel in opened.channels.items()}
    assert {name: (known["package"], known["cpu"]) for name, known in labels.items()} == {
        "cpu0/energy-pkg": ("0", "0"),
        "cpu1/energy-pkg": ("1", "1"),
    }
    for column in rows.columns.values():
        assert all(b > a for a, b in pairwise(column))


def test_perf_core_is_a_pmu_of_its_own(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    tree = perf_tree(tmp_path, [Event("energy-core")], pmu="power_core")

    with lane(perf_spec(tree, "perf-core")) as opened:
        (channel,) = opened.channels.values()
    assert (channel.labels["pmu"], channel.labels["event"]) == ("power_core", "energy-core")


def test_perf_puts_bits_where_the_format_says(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    perf_spec(perf_tree(tmp_path / "right"))
    # given an event whose number lies in bits 0-1 and 62-63: 3 ends up as 3, not as the counter 0
    right = perf_tree(tmp_path / "low", [Event("energy-pkg", "far=0x0")])
    wrong = perf_tree(tmp_path / "high", [Event("energy-pkg", "far=0x4")])
    with lane(f"perf:{right}") as opened:
        assert opened.take(3).columns["cpu0/energy-pkg"][-1] > 0
    # then 4 is bit 62 of the configuration, which the kernel does not know
    assert "perf_event_open: " in why_not(f"perf:{wrong}").why


def test_perf_ignores_what_is_no_energy(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    events = [
        Event("energy-pkg"),
        Event("energy-cores", unit="Watts"),
        Event("energy-gpu", unit=None),
        Event("cycles"),
    ]
    with lane(perf_spec(perf_tree(tmp_path, events))) as opened:
        assert set(opened.channels) == {"cpu0/energy-pkg"}


def test_perf_without_events_or_without_a_pmu_is_no_sensor(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    empty = why_not(f"perf:{perf_tree(tmp_path / 'vm', [])}")
    absent = why_not(f"perf:{tmp_path}")
    no_cpu = why_not(f"perf:{perf_tree(tmp_path / 'none', cpus={}, cpumask=' ')}")

    assert "virtual machine" in empty.why
    assert "no PMU 'power'" in absent.why and "modprobe rapl" in absent.fix
    assert "cpumask" in no_cpu.why


def test_perf_that_is_not_permitted_names_the_switch(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) <= 0:
        pytest.skip("everybody may count here")
    tree = perf_tree(tmp_path)

    with without_perf():
        error = why_not(f"perf:{tree}")

    assert error.denied
    assert error.why.startswith("Permission denied: kernel.perf_event_paranoid is ")
    assert error.fix == "sudo sysctl kernel.perf_event_paranoid=0"


# --- hwmon ----------------------------------------------------------------------------------------


def test_hwmon_names_a_channel_by_chip_device_and_input(tmp_path: Path) -> None:
    gpu = hwmon_chip(
        tmp_path, "amdgpu",
        {"power1_average": 31_000_000, "power1_input": 9, "power1_cap": 1, "power1_label": "PPT"},
        device="0000:03:00.0",
    )  # fmt: skip
    (tmp_path / "devices/0000:03:00.0/product_name").write_text("Instinct MI210\n")
    socket: dict[str, int | str] = {
        "energy1_input": 10,
        "energy1_label": "Ecore000",
        "energy9_input": 2**63 - 1,
    }
    hwmon_chip(tmp_path, "amd_energy", {**socket, "energy9_label": "Esocket0"})
    hwmon_chip(tmp_path, "nvme", {"temp1_input": 40_000})

    with lane(f"hwmon:{tmp_path}/class/hwmon", HOUR_NS) as opened:
        gpu.set("power1_average", 250_000_000)
        rows = opened.finish()
        channels = opened.channels

    # then the average was taken, not the instant, and nothing that is no energy
    assert rows.columns == {
        "amdgpu@0000:03:00.0/power1": [31e6, 250e6],
        "amd_energy@hwmon1/energy1": [10, 10],
        "amd_energy@hwmon1/energy9": [float(2**63 - 1)] * 2,
    }
    power = channels["amdgpu@0000:03:00.0/power1"]
    assert (power.quantity, power.unit, power.scale, power.counter) == ("power", "W", 1e-6, False)
    assert power.labels == {
        "chip": "amdgpu", "device": "0000:03:00.0", "input": "power1", "label": "PPT",
        "model": "Instinct MI210",
    }  # fmt: skip
    energy = channels["amd_energy@hwmon1/energy9"]
    assert energy.counter and energy.unit == "J" and energy.labels["label"] == "Esocket0"


def test_hwmon_finds_what_an_old_driver_leaves_with_its_device(tmp_path: Path) -> None:
    grace(tmp_path, 0, module=True)

    with lane(f"hwmon:{tmp_path}/class/hwmon", HOUR_NS) as opened:
        rows = opened.finish()
        read_w = {
            channel.labels["label"]: rows.columns[name][-1] * channel.scale
            for name, channel in opened.channels.items()
        }
    assert read_w == pytest.approx(
        {"Grace Power Socket 0": 200, "CPU Power Socket 0": 150, "SysIO Power Socket 0": 20,
         "Module Power Socket 0": 700}
    )  # fmt: skip


def test_hwmon_multiplies_volts_and_amperes_where_there_is_no_power(tmp_path: Path) -> None:
    rails: dict[str, int | str] = {
        "in1_input": 4_980,
        "curr1_input": 1_500,
        "in1_label": "VDD_GPU_SOC",
    }
    other: dict[str, int | str] = {
        "in2_input": 5_000,
        "in2_label": "VDD_CPU_CV",
        "in7_input": 1,
        "in7_label": "sum",
    }
    chip = hwmon_chip(tmp_path, "ina3221", {**rails, **other, "curr2_input": 100})

    with lane(f"hwmon:{chip.where}", HOUR_NS) as opened:
        chip.set("curr1_input", 2_000)
        rows = opened.finish()
        scale = opened.channels["ina3221@hwmon0/in1"].scale
    truth_w = {"in1": [4.98 * 1.5, 4.98 * 2.0], "in2": [0.5, 0.5]}
    for rail, powers_w in truth_w.items():
        column = rows.columns[f"ina3221@hwmon0/{rail}"]
        assert [value * scale for value in column] == pytest.approx(powers_w)
    assert len(rows.columns) == 2  # no current, no power


def test_hwmon_of_one_chip_is_that_chip_alone(tmp_path: Path) -> None:
    hwmon_chip(tmp_path, "psu", {"power1_input": 5})
    chip = hwmon_chip(tmp_path, "psu", {"power1_input": 6})

    with lane(f"hwmon:{chip.where}", HOUR_NS) as opened:
        assert [column[0] for column in opened.finish().columns.values()] == [6]


def test_hwmon_that_may_not_be_read_names_the_file(tmp_path: Path) -> None:
    chip = hwmon_chip(tmp_path, "amd_energy", {"energy1_input": 5})
    chip.path("energy1_input").chmod(0)

    with obeying_permissions():
        error = why_not(f"hwmon:{tmp_path}/class/hwmon")
    assert error.denied and error.why.startswith("Permission denied")
    assert error.fix == f"sudo chmod o+r {chip.path('energy1_input')}"


@pytest.mark.parametrize("chips", [(), ("nvme",)])
def test_hwmon_without_energy_or_power_is_no_sensor(tmp_path: Path, chips: tuple[str]) -> None:
    (tmp_path / "class/hwmon").mkdir(parents=True)
    for name in chips:
        hwmon_chip(tmp_path, name, {"temp1_input": 40_000})

    assert f"none of {len(chips)} chips" in why_not(f"hwmon:{tmp_path}/class/hwmon").why


# --- nvml -----------------------------------------------------------------------------------------


def gpu_channels(opened: Lane, gpu: int) -> set[str]:
    uuid = default_uuid(gpu)
    return {name.partition("/")[2] for name in opened.channels if name.startswith(uuid)}


def test_nvml_energy_is_the_truth_within_one_refresh(nvml: BuildNvml) -> None:
    sim = nvml(Scenario((Gpu(Square(0.13, 60, 640)),)))

    with lane(sim.spec) as opened:
        opened_ns = time.monotonic_ns()
        rows = opened.until(lambda rows: rows.t_ns[-1:] > [opened_ns + 500_000_000])
        energy = rows.columns[f"{default_uuid(0)}/energy"]
        scale = opened.channels[f"{default_uuid(0)}/energy"].scale

    for row, value_mj in enumerate(energy):
        first_ns, last_ns = rows.span(row)
        assert sim.scenario.counter_mj(first_ns) - 1 <= value_mj
        assert value_mj <= sim.scenario.counter_mj(last_ns) + 1
    seen_j = (energy[-1] - energy[0]) * scale
    truth_j = sim.scenario.energy_j(rows.t_ns[0], rows.t_ns[-1])
    assert seen_j == pytest.approx(truth_j, abs=640 * 0.1)
    assert seen_j > 0


def test_nvml_knows_every_gpu_by_its_uuid(nvml: BuildNvml) -> None:
    uuids = (
        "GPU-ffff0000-1111-4222-8333-444444444444",
        None,
        "GPU-00000001-1111-4222-8333-444444444444",
    )
    gpus = tuple(
        Gpu(Constant(100 * (i + 1)), uuid=uuid, memory_used_bytes=Constant(2**30 * (i + 1)))
        for i, uuid in enumerate(uuids)
    )
    sim = nvml(Scenario(gpus))

    with lane(sim.spec) as opened:
        rows = opened.take(3)
        for index, uuid in enumerate(uuids):
            name = uuid or default_uuid(index)
            labels = opened.channels[f"{name}/energy"].labels
            board = {"uuid": name, "model": "NVIDIA H100 80GB HBM3", "index": str(index)}
            board["driver"] = sim.scenario.driver_version
            assert labels == {**board, "limit_w": "700"}
            assert rows.columns[f"{name}/power_instant"][-1] == 100_000 * (index + 1)
            assert rows.columns[f"{name}/memory_used"][-1] >= 2**30 * (index + 1)
            assert rows.columns[f"{name}/utilisation"][-1] == 50
            assert opened.channels[f"{name}/utilisation"].scale == 0.01


def test_nvml_reads_instant_and_average_power(nvml: BuildNvml) -> None:
    sim = nvml(Scenario((Gpu(Square(0.4, 100, 500)),)))

    with lane(sim.spec) as opened:
        opened_ns = time.monotonic_ns()
        rows = opened.until(lambda rows: rows.t_ns[-1:] > [opened_ns + 500_000_000])
        assert "power" not in gpu_channels(opened, 0)  # it would repeat one of the two

    for kind, truth_w in (("instant", sim.scenario.instant_w), ("average", sim.scenario.average_w)):
        column = rows.columns[f"{default_uuid(0)}/power_{kind}"]
        assert len(set(column)) > 1
        for row, value_mw in enumerate(column):
            if row > 0 and value_mw == column[row - 1]:
                continue  # perhaps it was not asked
            possible_w = [truth_w(t_ns) for t_ns in rows.span(row)]
            assert min(possible_w) - 0.002 <= value_mw * 1e-3 <= max(possible_w) + 0.002


@pytest.mark.parametrize(
    ("sensor", "often"),
    [
        (H100, {"energy"}),
        (PASCAL, {"power_instant"}),  # no counter: this is what its energy comes from
    ],
)
def test_nvml_is_asked_seldom_for_what_tells_no_energy(
    nvml: BuildNvml, sensor: Sensor, often: set[str]
) -> None:
    # given a board of which each number changes in each millisecond
    ramp = Points(((-10.0, 10.0), (100.0, 600.0)))
    quick = replace(sensor, refresh_s=0.001, counter_refresh_s=sensor.counter_refresh_s and 0.001)
    held = Points(((-10.0, 1e9), (100.0, 9e9)))
    share = Points(((-10.0, 0.0), (2.0, 1.0)))
    sim = nvml(Scenario((Gpu(ramp, sensor=quick, memory_used_bytes=held, utilization=share),)))

    with lane(sim.spec) as opened:
        opened_ns = time.monotonic_ns()
        opened.until(lambda rows: rows.t_ns[-1:] > [opened_ns + 900_000_000])
        rows = opened.finish()

    t_ns = np.array(rows.t_ns)
    end_ns = t_ns + np.array(rows.read_ns)
    for name, column in rows.columns.items():
        changed = 1 + np.flatnonzero(np.diff(column))
        if name.partition("/")[2] in often:
            assert len(changed) > 0.9 * len(t_ns)
        else:
            assert len(changed) >= 3
            asked = changed[:-1]  # at the end of all it is asked once more
            assert (end_ns[asked[1:]] - t_ns[asked[:-1]] >= 200_000_000).all()
            if not name.endswith("/utilisation"):  # of which a percent takes 0.12 s
                assert changed[-1] == len(t_ns) - 1


def test_nvml_takes_what_an_older_board_or_driver_offers(nvml: BuildNvml) -> None:
    fields, counter = "nvmlDeviceGetFieldValues", "nvmlDeviceGetTotalEnergyConsumption"
    rest = {"utilisation", "memory_used"}
    cases = (
        (Scenario((Gpu(Constant(90), sensor=A100),)), {"energy", "power_instant"} | rest),
        (Scenario((Gpu(Constant(90), sensor=PASCAL),)), {"power_instant"} | rest),
        (Scenario((Gpu(Constant(90), sensor=H100),), absent=(fields,)), {"energy", "power"} | rest),
        (Scenario((Gpu(Constant(90), sensor=H100),), absent=(fields, counter)), {"power"} | rest),
        (Scenario((Gpu(Constant(90), sensor=H100),), absent=(counter,)),
         {"energy", "power_instant", "power_average"} | rest),
        (Scenario((Gpu(Constant(90), module=Constant(90)),)),
         {"energy", "power_instant", "power_average", "module_power_instant",
          "module_power_average"} | rest),
        (Scenario((Gpu(Constant(90)),), absent=("nvmlDeviceGetMemoryInfo", "nvmlErrorString")),
         {"energy", "power_instant", "power_average", "utilisation"}),
    )  # fmt: skip

    for scenario, expected in cases:
        with lane(nvml(scenario).spec) as opened:
            assert gpu_channels(opened, 0) == expected
            rows = opened.take(2)
            powers = [c for name, c in rows.columns.items() if "/power" in name]
            assert all(column[-1] == 90_000 for column in powers)


@pytest.mark.parametrize(
    "folder",
    [
        "",
        "usr/local/nvidia/lib64",
        "usr/lib/wsl/lib",
        "run/opengl-driver/lib",
        "usr/lib64",
        "usr/lib/x86_64-linux-gnu/nvidia/current",
    ],
)
def test_nvml_is_found_where_drivers_put_it(nvml: BuildNvml, tmp_path: Path, folder: str) -> None:
    # given a file system whose driver is not on the loader's path, and one folder of a wrong one
    sim = nvml(Scenario((Gpu(Constant(120)),)))
    root = tmp_path / "host"
    wrong = root / "usr/local/nvidia/lib"
    for where in (root / folder, wrong):
        where.mkdir(parents=True, exist_ok=True)
    (wrong / "libnvidia-ml.so.1").write_text("of another machine")
    for suffix in ("", ".scenario"):
        shutil.copyfile(f"{sim.library}{suffix}", root / folder / f"{sim.library.name}{suffix}")

    # then its root is enough to find it, also for the lists of processes
    with lane(f"nvml:{root}") as opened:
        assert gpu_channels(opened, 0)
    with lane(f"nvml-processes:{root}"):
        pass


def test_nvml_that_is_nowhere_names_the_way_to_it(tmp_path: Path) -> None:
    for where in (tmp_path / "none.so", tmp_path):
        error = why_not(f"nvml:{where}")
        assert error.what == "no NVIDIA driver library"
        assert "--sensor nvml:PATH" in error.fix
    # what is there and cannot be loaded says more than the loader's own way
    (tmp_path / "usr/lib64").mkdir(parents=True)
    (tmp_path / "usr/lib64/libnvidia-ml.so.1").write_text("of another machine")
    assert "usr/lib64/libnvidia-ml.so.1" in why_not(f"nvml:{tmp_path}").why


def test_nvml_of_the_loader_comes_first(nvml: BuildNvml) -> None:
    # given a program whose LD_LIBRARY_PATH has the driver
    sim = nvml(Scenario((Gpu(Constant(120)),)))
    code = """if True:
        from pepr_profiler import _core
        sampler = _core.Sampler("nvml", 10**9)
        sampler.wait_ready(10)
        print(len(sampler.channels) > 0)
        sampler.stop(10)"""
    env = {**os.environ, **sim.env}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout == b"True\n"


def test_nvml_without_the_calls_of_every_driver_is_no_sensor(nvml: BuildNvml) -> None:
    error = why_not(nvml(Scenario((Gpu(Constant(1)),), absent=("nvmlInit_v2",))).spec)

    assert "nvml:" in error.fix


def test_nvml_goes_on_when_a_gpu_is_lost_for_a_while(nvml: BuildNvml) -> None:
    lost = Fault("nvmlDevice", "GPU_IS_LOST", start_s=0.3, end_s=0.45, gpu=0)
    sim = nvml(Scenario((Gpu(Constant(50)), Gpu(Constant(60))), (lost,)))

    with lane(sim.spec) as opened:
        rows = opened.until(lambda rows: rows.t_ns[-1:] > [sim.scenario.epoch_ns + 550_000_000])

    for name, column in rows.columns.items():
        for row, value in enumerate(column):
            first_s, last_s = map(sim.scenario.since_epoch_s, rows.span(row))
            if name.startswith(default_uuid(1)) or last_s < 0.3:
                assert not math.isnan(value)
            elif name.endswith("/energy") and (first_s > 0.45 or (first_s > 0.3 and last_s < 0.45)):
                assert math.isnan(value) == (last_s < 0.45)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("DRIVER_NOT_LOADED", "modprobe nvidia"),
        ("LIB_RM_VERSION_MISMATCH", "reboot"),
        ("NO_PERMISSION", "/dev/nvidia"),
        ("UNKNOWN", "nvidia-smi"),
    ],
)
def test_nvml_that_does_not_start_names_the_remedy(nvml: BuildNvml, code: str, remedy: str) -> None:
    error = why_not(nvml(Scenario((Gpu(Constant(1)),), (Fault("nvmlInit", code),))).spec)

    assert remedy in error.fix


def test_nvml_without_a_gpu_is_no_sensor(nvml: BuildNvml) -> None:
    assert "NVIDIA_VISIBLE_DEVICES" in why_not(nvml(Scenario()).spec).fix


def test_nvml_notes_a_gpu_that_it_cannot_open(nvml: BuildNvml) -> None:
    broken = Fault("nvmlDeviceGetHandleByIndex", "GPU_IS_LOST", gpu=1)
    sim = nvml(Scenario((Gpu(Constant(1)), Gpu(Constant(2))), (broken,)))

    with lane(sim.spec) as opened:
        notes = opened.sampler.notes
        assert gpu_channels(opened, 0) and not gpu_channels(opened, 1)

    assert [note.what for note in notes] == ["GPU 1"]
    assert "(15)" in notes[0].why
    assert "nvidia-smi --gpu-reset" in notes[0].fix


def test_nvml_with_no_openable_gpu_tells_the_reason(nvml: BuildNvml) -> None:
    denied = Fault("nvmlDeviceGetHandleByIndex", "NO_PERMISSION")

    assert "/dev/nvidia" in why_not(nvml(Scenario((Gpu(Constant(1)),), (denied,))).spec).fix


def test_nvml_call_that_hangs_stops_nothing_else(nvml: BuildNvml, tmp_path: Path) -> None:
    hang = Fault("nvmlDeviceGetTotalEnergyConsumption", "HANG", start_s=0.3, end_s=20.0)
    sim = nvml(Scenario((Gpu(Constant(100)),), (hang,)))

    with lane(wrapping_replay(tmp_path)) as other:
        hung = Lane(sim.spec)
        other.until(lambda rows: rows.t_ns[-1:] > [sim.scenario.epoch_ns + 450_000_000])
        assert not hung.sampler.stop(0.1)
        assert time.monotonic_ns() < sim.scenario.epoch_ns + 20e9  # while it hangs
        rows = hung.rows()
        assert rows.t_ns[-1] < sim.scenario.epoch_ns + 3e8  # what came before is kept
        after = len(other.rows().t_ns)
        assert other.take(after + 20).t_ns[-1] < sim.scenario.epoch_ns + 20e9


def test_nvml_is_not_put_off_by_a_spurious_refusal(nvml: BuildNvml) -> None:
    # Each second call of each kind; with two GPUs, one of them meets it while it is being opened.
    spurious = tuple(
        Fault(function, "NOT_SUPPORTED", every=2)
        for function in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues")
    )
    sim = nvml(Scenario((Gpu(Constant(80)), Gpu(Constant(80))), spurious))

    with lane(sim.spec) as opened:
        for gpu in (0, 1):
            assert {"energy", "power_instant", "power_average"} <= gpu_channels(opened, gpu)
        rows = opened.take(10)

    values = [v for name, c in rows.columns.items() if "/energy" in name for v in c]
    assert any(map(math.isnan, values))  # unknown for once, never 0
    assert min(value for value in values if not math.isnan(value)) >= 1_000_000


def test_nvml_keeps_the_power_of_the_module_apart(nvml: BuildNvml) -> None:
    sim = nvml(Scenario((Gpu(Constant(300), module=Constant(450)),)))

    with lane(sim.spec, HOUR_NS) as opened:
        rows = opened.finish()
    read_w = {name.partition("/")[2]: c[-1] * 1e-3 for name, c in rows.columns.items()}
    assert (read_w["power_average"], read_w["module_power_average"]) == (300, 450)
    assert (read_w["power_instant"], read_w["module_power_instant"]) == (300, 450)


def test_nvml_says_that_mig_energy_is_the_boards(nvml: BuildNvml) -> None:
    sim = nvml(Scenario((Gpu(Constant(300), mig=True), Gpu(Constant(100), mig=None))))

    with lane(sim.spec, HOUR_NS) as opened:
        (note,) = opened.sampler.notes
        energies = {n: c for n, c in opened.channels.items() if n.endswith("/energy")}
        assert "utilisation" not in gpu_channels(opened, 0)
    assert [c.labels.get("mig") for c in energies.values()] == ["on", None]
    assert "MIG" in note.what and "whole board" in note.why and "-i 0 -mig 0" in note.fix


def test_nvml_uses_what_is_permitted_and_names_what_is_not(nvml: BuildNvml) -> None:
    denied = (
        Fault("nvmlDeviceGetTotalEnergy", "NO_PERMISSION"),
        Fault("nvmlDeviceGetFieldValues", "NO_PERMISSION", field=83),
    )
    sim = nvml(Scenario((Gpu(Constant(300)),), denied))

    with lane(sim.spec, HOUR_NS) as opened:
        assert "energy" not in gpu_channels(opened, 0)
        assert "power_average" in gpu_channels(opened, 0)
        notes = opened.sampler.notes
    assert {note.what for note in notes} == {"energy of GPU 0"}
    assert all(note.denied for note in notes)
    assert all(n.why.startswith("Permission denied") and "/dev/nvidia" in n.fix for n in notes)


@pytest.mark.parametrize("code", ["NO_PERMISSION", "GPU_IS_LOST", "NOT_SUPPORTED", "TIMEOUT"])
def test_nvml_reading_that_fails_later_is_unknown_alone(nvml: BuildNvml, code: str) -> None:
    fault = Fault("nvmlDeviceGetFieldValues", code, start_s=0.25, field=186)
    sim = nvml(Scenario((Gpu(Constant(300)),), (fault,)))

    with lane(sim.spec) as opened:
        key = f"{default_uuid(0)}/power_instant"
        rows = opened.until(lambda rows: any(map(math.isnan, rows.columns[key])))
    for name, column in rows.columns.items():
        assert name == key or not any(map(math.isnan, column))


def test_nvml_asks_again_without_keeping_the_run_waiting(nvml: BuildNvml) -> None:
    # given eight boards that lack a counter and average power (each refused three times)
    boards = tuple(Gpu(Constant(100), sensor=PASCAL) for _ in range(8))
    sim = nvml(Scenario(boards))

    def opened_s() -> float:
        begin_s = time.monotonic()
        with lane(sim.spec, HOUR_NS):
            return time.monotonic() - begin_s

    # then the pauses (two of 5 ms) are shared by all: apart they would be 8 x 2 x 10 ms, always
    until(lambda: opened_s() < 0.15)


# --- processes ------------------------------------------------------------------------------------

BURN = """
import os, signal, sys, time
def burn(cpu_s):
    begin_s = time.process_time()
    while time.process_time() - begin_s < cpu_s:
        pass
"""


def start(program: str, *, piped: bool = False) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE if piped else None
    return subprocess.Popen([sys.executable, "-c", BURN + program], stdin=pipe, stdout=pipe)


def growth_s(rows: Rows) -> float:
    return rows.columns["job/cpu"][-1] - rows.columns["job/cpu"][0]


@pytest.mark.parametrize("spec", ["processes:children", "processes:self"])
def test_processes_see_a_busy_child_to_its_last_slice(spec: str) -> None:
    with lane(spec, 200_000_000) as opened:
        mine_s = time.process_time()
        truth_s = charged_s(start("burn(0.9)"))
        rows = opened.finish()
        mine_s = time.process_time() - mine_s

    assert truth_s >= 0.9
    seen_s = growth_s(rows) - (mine_s if spec == "processes:self" else 0.0)
    assert seen_s == pytest.approx(truth_s, rel=0.02)


def test_processes_see_grandchildren_and_count_the_living() -> None:
    program = "pid = os.fork()\nburn(0.2)\nif pid: os.waitpid(pid, 0)\nelse: os._exit(0)"
    with lane("processes:children", 10_000_000) as opened:
        child = start(program)
        opened.until(lambda rows: 2 in rows.columns["job/processes"])
        truth_s = charged_s(child)
        rows = opened.finish()

    assert truth_s >= 0.4
    assert growth_s(rows) == pytest.approx(truth_s, rel=0.02)
    assert rows.columns["job/processes"][0] == rows.columns["job/processes"][-1] == 0


def test_processes_do_not_count_short_children_twice() -> None:
    # Each is seen live to the nanosecond, then in its parent's cutime, which is cut off to ticks.
    program = """
for _ in range(12):
    if (pid := os.fork()) == 0:
        burn(0.015)
        time.sleep(0.05)
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.03)
"""
    with lane("processes:children", 10_000_000) as opened:
        truth_s = charged_s(start(program))
        rows = opened.finish()

    assert growth_s(rows) == pytest.approx(truth_s, abs=0.01)


def test_processes_keep_what_a_parent_that_ignores_sigchld_throws_away() -> None:
    program = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
living, dies = os.pipe()
if os.fork() == 0:
    burn(0.4)
    print(time.process_time(), flush=True)
    sys.stdin.buffer.raw.read(1)
    os._exit(0)
os.close(dies)
os.read(living, 1)
burn(0.3)
"""
    with lane("processes:children", 20_000_000) as opened:
        child = start(program, piped=True)
        assert child.stdin is not None and child.stdout is not None
        thrown_away_s = float(child.stdout.readline())
        opened.until(lambda rows: growth_s(rows) >= thrown_away_s)  # all of it was seen live
        child.stdin.close()
        truth_s = charged_s(child) + thrown_away_s
        rows = opened.finish()
        child.stdout.close()

    assert thrown_away_s >= 0.4
    assert growth_s(rows) == pytest.approx(truth_s, abs=0.02)


def test_processes_see_a_daemon_under_a_subreaper() -> None:
    program = """
import array, json, resource
from pepr_profiler import _core
assert _core.set_child_subreaper()
lane = _core.Sampler("processes:children", 20_000_000)
assert lane.wait_ready(20)
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        burn(0.4)
    os._exit(0)
waited = 0
while True:
    try:
        os.wait()
        waited += 1
    except ChildProcessError:
        break
assert lane.stop(20)
cpu_s = array.array("d", lane.read()[3][0])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([waited, cpu_s[-1] - cpu_s[0], usage.ru_utime + usage.ru_stime]))
"""
    done = subprocess.run(
        [sys.executable, "-c", BURN + program],
        stdout=subprocess.PIPE,
        check=True,
        timeout=SLOW_S,
    )
    waited, seen_s, truth_s = json.loads(done.stdout)

    assert waited == 2
    assert truth_s >= 0.4
    assert seen_s == pytest.approx(truth_s, rel=0.02)


def test_processes_tell_the_memory_of_the_tree() -> None:
    program = """
held = bytearray(b"x" * (50 << 20))
print(flush=True)
sys.stdin.buffer.raw.read(1)
"""
    with lane("processes:children", 10_000_000) as opened:
        child = start(program, piped=True)
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text().split("Rss:")[1]
        truth_bytes = int(rollup.split()[0]) * 1024
        seen = len(opened.rows().t_ns)
        rows = opened.take(seen + 2)
        child.stdin.close()
        charged_s(child)
        child.stdout.close()

    assert truth_bytes > 50 << 20
    # The kernel batches the counters behind /proc/PID/stat: 32 pages or so a thread and CPU.
    assert rows.columns["job/rss"][-1] == pytest.approx(truth_bytes, abs=2 << 20)


def test_processes_follow_those_that_are_named_and_nobody_else() -> None:
    program = "print(flush=True)\nsys.stdin.readline()\nburn(0.3)"
    children = [start(program, piped=True) for _ in range(3)]
    for child in children:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
    with lane(f"processes:pids={children[0].pid},{children[1].pid}", 10_000_000) as opened:
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
        opened.until(lambda rows: rows.columns["job/processes"][-1] == 0)
        rows = opened.finish()
    for child in children:
        child.communicate()

    assert rows.columns["job/processes"][0] == 2
    assert rows.columns["job/cpu"][0] < 0.01
    assert growth_s(rows) == pytest.approx(0.6, rel=0.05)


def test_processes_say_who_has_exited_before_they_are_followed() -> None:
    gone, zombie = start(""), start("")
    gone.wait()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    try:
        for pid in (gone.pid, zombie.pid):
            error = why_not(f"processes:pids={os.getpid()},{pid}")
            assert str(pid) in error.what and "exited" in error.why
    finally:
        zombie.wait()


def test_processes_know_how_busy_the_machine_is() -> None:
    with lane("processes:self", 10_000_000) as opened:
        cpus = int(opened.channels["system/busy"].labels["cpus"])
        child = start("burn(0.5)")
        truth_s = charged_s(child)
        rows = opened.finish()
        busy_s = rows.columns["system/busy"][-1] - rows.columns["system/busy"][0]

    assert cpus == os.sysconf("SC_NPROCESSORS_ONLN")
    elapsed_s = (rows.t_ns[-1] - rows.t_ns[0]) * 1e-9
    assert truth_s - 0.05 <= busy_s <= elapsed_s * cpus + 0.05  # ticks, at either end


def test_a_forked_child_neither_samples_nor_hangs(tmp_path: Path) -> None:
    with lane(wrapping_replay(tmp_path)) as opened:
        before = len(opened.rows().t_ns)
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            stopped = opened.sampler.stop(10.0)
            del opened.sampler  # its destructor must not wait for a thread that is not here
            os._exit(1 if stopped else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        opened.take(before + 10)


# --- replay ---------------------------------------------------------------------------------------


def test_replay_plays_against_the_clock(tmp_path: Path) -> None:
    played = replay(tmp_path, "# played from the moment it is opened", COUNTER, GAUGE,
                    "0.05 10 1.5", "0.1 20 nan", "0.15 30 2.5")  # fmt: skip
    begin_ns = time.monotonic_ns()
    with lane(played, 2_000_000) as opened:
        ready_ns = time.monotonic_ns()
        rows = opened.until(lambda rows: 30 in rows.columns["meter/energy"])
        channel = opened.channels["meter/energy"]

    assert (channel.quantity, channel.unit, channel.scale) == ("energy", "J", 0.001)
    assert (channel.modulus, channel.counter, channel.source) == (1000, True, "replayed")
    assert channel.labels == {"zone": "attic"}
    assert not opened.channels["meter/power"].counter
    truth = ((0.15, 30.0, 2.5), (0.1, 20.0, math.nan), (0.05, 10.0, 1.5), (0.0, math.nan, math.nan))
    for row, seen in enumerate(zip(*rows.columns.values(), strict=True)):
        # It was opened at an unknown instant between `begin` and `ready`.
        earliest_s = (rows.t_ns[row] - ready_ns) * 1e-9
        latest_s = (rows.span(row)[1] - begin_ns) * 1e-9
        possible = [
            values
            for index, (at_s, *values) in enumerate(truth)
            if at_s <= latest_s and (index == 0 or truth[index - 1][0] > earliest_s)
        ]
        assert any(str(list(seen)) == str(values) for values in possible)


@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        (("channel a energy J 1 0 counter",), 1),
        (("channel a energy J one 0 counter x",), 1),
        (("channel a energy J 1 0 counter x label",), 1),
        ((COUNTER, "", "# fine", "0 1", "0.1 1 2"), 5),
        ((COUNTER, "0 1", "0.1"), 3),
        ((COUNTER, "0 1", "0 2"), 3),
        ((COUNTER, "0 1", "-1 2"), 3),
        ((COUNTER, "0 many"), 2),
        ((COUNTER, "0 1", GAUGE), 3),
        ((COUNTER, "soon 1"), 2),
        ((COUNTER, "0 12volts"), 2),
        ((COUNTER, "nan 1"), 2),
        ((COUNTER, "1e30 1"), 2),
        (("channel a energy J 1 0 tally x",), 1),
    ],
)
def test_replay_names_the_line_that_is_wrong(
    tmp_path: Path, lines: tuple[str, ...], bad: int
) -> None:
    error = why_not(replay(tmp_path, *lines))

    assert error.what.startswith(f"{tmp_path}/recorded.tsv:{bad} ")


@pytest.mark.parametrize("lines", [(), (COUNTER,), ("0 ",), ("# nothing",)])
def test_replay_needs_channels_and_rows(tmp_path: Path, lines: tuple[str, ...]) -> None:
    why_not(replay(tmp_path, *lines))


COMMA_LOCALE = """
import json, locale, sys
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
assert locale.localeconv()["decimal_point"] == ","
from pepr_profiler import _core
found = {}
for spec in sys.argv[1:]:
    sampler = _core.Sampler(spec, 10**9)
    assert sampler.wait_ready(10)
    found[spec] = [[channel.scale, channel.modulus] for channel in sampler.channels]
    rows = sampler.latest()
    found[spec].append(rows[1] if rows else None)
    sampler.stop(1)
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def comma_locale(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a program that may use de_DE.UTF-8, which writes 0,5 for a half."""
    return {**os.environ, **made_locale(tmp_path_factory.mktemp("locales"), "de_DE", "UTF-8")}


def test_numbers_have_a_point_in_a_program_with_a_comma_locale(
    tmp_path: Path, comma_locale: dict[str, str], powercap_sim: BuildTree
) -> None:
    # given a program that has set a comma locale, as Qt and GTK do
    channel = "meter power W 0.25 0 gauge test kind=gpu component=gpu:meter"
    replay = write_replay(tmp_path / "meter", [channel], [(0.0, 100.5)])
    zone = powercap_sim(Zone("intel-rapl:0", "package-0"))
    specs = [replay, zone.spec]
    if not why_no_tsc():
        specs.append(perf_spec(perf_tree(tmp_path / "sys", [Event("energy-pkg", scale="2.5e-9")])))
    program = [sys.executable, "-c", COMMA_LOCALE, *specs]
    done = subprocess.run(program, env=comma_locale, capture_output=True, text=True, check=False)

    # then scales, ranges and readings are what the files say
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[replay] == [[0.25, 0.0], [100.5]]
    assert found[zone.spec][0][1] == RANGE_UJ
    for spec in specs[2:]:
        assert found[spec][0] == [2.5e-9, 0.0]
