"""The simulation itself: the libraries and trees that other tests believe must first be right."""

from __future__ import annotations

import csv
import ctypes
import functools
import importlib.util
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from cli import SLOW_S, until
from sim import native
from sim.nvml import (
    A100,
    H100,
    PASCAL,
    RETURNS,
    VOLTA,
    BuildNvml,
    Fault,
    Gpu,
    NvmlSim,
    Process,
    Scenario,
    Sensor,
    default_uuid,
)
from sim.permissions import obey_permissions, obeying_permissions
from sim.powercap import RANGE_UJ, BuildTree, Zone, ZoneFault, two_socket_server
from sim.virtual import SteadySpacing
from sim.waves import TRAINING_LOAD, Constant, Followed, Points, Sine, Square, Step, Wave, recorded

T = TypeVar("T")

CSRC = Path(__file__).parents[1] / "csrc"

SUCCESS = 0
ENERGY, AVERAGE, INSTANT = 83, 185, 186
WAVES: dict[str, Wave] = {
    "constant": Constant(250.0),
    "step": Step(0.35, 80.0, 300.0),
    "square": Square(0.173, 100.0, 300.0, duty=0.3, shift_s=0.02),
    "sine": Sine(200.0, 90.0, 0.7, shift_s=0.1),
    "points": Points(((-1.0, 50.0), (0.5, 250.0), (0.6, 90.0), (40.0, 120.0))),
    "recorded": recorded(60.0, 400.0, begin_s=4.0),
}


class FieldValue(ctypes.Structure):
    _fields_ = (
        ("field_id", ctypes.c_uint),
        ("scope_id", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("value_type", ctypes.c_int),
        ("status", ctypes.c_int),
        ("value", ctypes.c_ulonglong),
    )


class ProcessInfo(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class ProcessUtilization(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("timestamp", ctypes.c_ulonglong),
        *((name, ctypes.c_uint) for name in ("sm", "mem", "enc", "dec")),
    )


class Sample(ctypes.Structure):
    _fields_ = (("timestamp", ctypes.c_ulonglong), ("value", ctypes.c_ulonglong))


class MemoryV2(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint),
        *((name, ctypes.c_ulonglong) for name in ("total", "reserved", "free", "used")),
    )


class Nvml:
    """The library through its plain C ABI, initialised, one handle a GPU."""

    def __init__(self, sim: NvmlSim) -> None:
        self.lib: Any = ctypes.CDLL(str(sim.library))
        self.status = self.lib.nvmlInit_v2()
        self.handles = []
        for index in range(len(sim.scenario.gpus) if self.status == SUCCESS else 0):
            handle = ctypes.c_void_p()
            if self.lib.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == SUCCESS:
                self.handles.append(handle)

    def number(self, function: str, gpu: int = 0) -> tuple[int, int]:
        """(status, value) of a call that fills one number."""
        value = ctypes.c_ulonglong(0)
        status = getattr(self.lib, function)(self.handles[gpu], ctypes.byref(value))
        return status, value.value

    def text(self, function: str, gpu: int = 0, room: int = 96) -> tuple[int, str]:
        buffer = ctypes.create_string_buffer(room)
        status = getattr(self.lib, function)(self.handles[gpu], buffer, room)
        return status, buffer.value.decode()

    def fields(self, *ids: int, scope: int = 0, gpu: int = 0) -> tuple[int, list[FieldValue]]:
        values = (FieldValue * len(ids))(*(FieldValue(field_id=i, scope_id=scope) for i in ids))
        status = self.lib.nvmlDeviceGetFieldValues(self.handles[gpu], len(ids), values)
        return status, list(values)


def started_ago(seconds: float) -> int:
    return time.monotonic_ns() - int(seconds * 1e9)


def bracket(read: Callable[[], T]) -> tuple[int, T, int]:
    before_ns = time.monotonic_ns()
    value = read()
    return before_ns, value, time.monotonic_ns()


def near(value: float, *candidates: float, within: float) -> bool:
    return any(abs(value - candidate) <= within for candidate in candidates)


# waves


@pytest.mark.parametrize("kind", WAVES)
def test_a_waves_integral_is_the_sum_of_its_power(kind: str) -> None:
    wave = WAVES[kind]
    steps, start_s, end_s = 100_000, -1.5, 2.75
    width_s = (end_s - start_s) / steps

    summed_j = width_s * math.fsum(
        wave.power_w(start_s + (i + 0.5) * width_s) for i in range(steps)
    )

    assert wave.energy_j(start_s, end_s) == pytest.approx(summed_j, abs=0.1)
    assert wave.energy_j(0.3, 0.3) == 0


def test_a_recorded_wave_is_its_table() -> None:
    # given the table as any other program reads it
    with TRAINING_LOAD.open() as file:
        file.readline()
        rows = [(float(row["t_s"]), float(row["cpus"])) for row in csv.DictReader(file)]
    busiest = max(cpus for _, cpus in rows)
    trapezia = [(b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(rows)]
    # then its energy is idle power and the load's part, to the last row
    wave = recorded(60.0, 400.0, begin_s=2.5)
    begin_s, end_s = rows[0][0], rows[-1][0]
    expected_j = 60.0 * (end_s - begin_s) + 340.0 / busiest * math.fsum(trapezia)
    assert wave.energy_j(begin_s - 2.5, end_s - 2.5) == pytest.approx(expected_j, rel=1e-9)
    assert wave.power_w(rows[100][0] - 2.5) == pytest.approx(60 + 340 * rows[100][1] / busiest)


def test_waves_that_cannot_be_are_refused() -> None:
    for build in (
        lambda: Square(0.0, 1, 2),
        lambda: Square(1.0, 1, 2, duty=1.5),
        lambda: Points(()),
        lambda: Points(((1.0, 5.0), (1.0, 6.0))),
    ):
        with pytest.raises(ValueError, match="need"):
            build()


# NVML


@pytest.mark.parametrize("smoothing_s", [0.0, 0.12])
def test_a_late_sensor_follows_what_is_written_while_it_is_read(
    smoothing_s: float, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given a board that follows steps in a file, one of which is in the future
    wave = Followed(tmp_path / "steps")
    wave.follow([(-1e6, 60.0), (4.0, 300.0)])
    sensor = Sensor(delay_s=0.13, smoothing_s=smoothing_s, counter_delay_s=0.07)
    gpu = Gpu(wave, sensor=sensor, counted=wave)
    sim = nvml_sim(Scenario(gpus=(gpu,), epoch_ns=started_ago(3.5)))
    nvml, truth = Nvml(sim), sim.scenario
    for _ in range(2):
        # then it reads what the truth says, also of what was written meanwhile
        t0, (_, fields), t1 = bracket(lambda: nvml.fields(ENERGY, INSTANT))
        energy, instant = (field.value for field in fields)
        assert near(energy, truth.counter_mj(t0), truth.counter_mj(t1), within=1)
        assert near(instant / 1e3, truth.instant_w(t0), truth.instant_w(t1), within=0.2)
        wave.follow([(4.4, 100.0)])
        time.sleep(1.3)


@pytest.mark.parametrize("kind", WAVES)
def test_counter_and_power_are_those_of_the_last_refresh(kind: str, nvml_sim: BuildNvml) -> None:
    # given a board that errs by known amounts, five seconds into its life
    gpu = Gpu(
        WAVES[kind],
        sensor=Sensor(phase_s=0.013),
        gain=0.94,
        offset_w=7.5,
        counter_gain=1.03,
        counter_offset_w=-2.0,
    )
    sim = nvml_sim(Scenario(gpus=(gpu,), epoch_ns=started_ago(5)))
    nvml, truth = Nvml(sim), sim.scenario

    # when it is read over more than two refreshes, then C++ and Python agree on every reading;
    # a refresh may fall between the two clocks, so either side of it is right
    end_ns = time.monotonic_ns() + 210_000_000
    while time.monotonic_ns() < end_ns:
        t0, (status, fields), t1 = bracket(lambda: nvml.fields(ENERGY, AVERAGE, INSTANT))
        assert [status, *(field.status for field in fields)] == [SUCCESS] * 4
        if t1 - t0 > 50_000_000:
            continue  # this process was put aside for longer than the comparison allows
        energy, average, instant = (field.value for field in fields)
        assert near(energy, truth.counter_mj(t0), truth.counter_mj(t1), within=1)
        assert near(average / 1e3, truth.average_w(t0), truth.average_w(t1), within=1e-3)
        assert near(instant / 1e3, truth.instant_w(t0), truth.instant_w(t1), within=1e-3)


def test_the_counter_differs_from_the_truth_by_its_refreshes_only(nvml_sim: BuildNvml) -> None:
    sim = nvml_sim(Scenario(gpus=(Gpu(WAVES["square"]),), epoch_ns=started_ago(1)))
    nvml = Nvml(sim)

    t0_ns, (_, first_mj), _ = bracket(lambda: nvml.number("nvmlDeviceGetTotalEnergyConsumption"))
    until(lambda: time.monotonic_ns() - t0_ns > 400_000_000)
    _, (_, last_mj), t1_ns = bracket(lambda: nvml.number("nvmlDeviceGetTotalEnergyConsumption"))

    # a refresh of 0.1 s at each edge, at most 300 W
    counted_j = (last_mj - first_mj) / 1e3
    assert counted_j == pytest.approx(sim.scenario.energy_j(t0_ns, t1_ns), abs=0.1 * 300 + 0.001)
    assert counted_j > 0


def test_a_sensor_that_sees_a_quarter_of_the_time_misses_the_rest(nvml_sim: BuildNvml) -> None:
    # given 300 W in exactly the 25 ms before each refresh, 100 W in the rest
    wave = Square(0.1, 100.0, 300.0, duty=0.25, shift_s=0.075)
    sim = nvml_sim(Scenario(gpus=(Gpu(wave),), epoch_ns=started_ago(3)))
    nvml = Nvml(sim)

    _, fields = nvml.fields(AVERAGE, INSTANT)

    # then the instant is 300 W, twice the truth of 150 W; the average sees all
    assert [field.value for field in fields] == [150_000, 300_000]
    assert nvml.number("nvmlDeviceGetPowerUsage") == (SUCCESS, 150_000)
    assert sim.scenario.gpus[0].wave.energy_j(0, 1) == pytest.approx(150)


def test_an_a100_has_no_average_and_a_pascal_no_counter(nvml_sim: BuildNvml) -> None:
    wave = Square(0.1, 100.0, 300.0, duty=0.25, shift_s=0.075)
    gpus = (Gpu(wave, sensor=A100), Gpu(wave, sensor=PASCAL), Gpu(wave, sensor=VOLTA))
    nvml = Nvml(nvml_sim(Scenario(gpus=gpus, epoch_ns=started_ago(3))))

    status, fields = nvml.fields(AVERAGE, INSTANT)

    assert status == SUCCESS
    assert [field.status for field in fields] == [RETURNS["NOT_SUPPORTED"], SUCCESS]
    assert nvml.number("nvmlDeviceGetPowerUsage") == (SUCCESS, 300_000)
    counters = [nvml.number("nvmlDeviceGetTotalEnergyConsumption", gpu)[0] for gpu in range(3)]
    assert counters == [SUCCESS, RETURNS["NOT_SUPPORTED"], SUCCESS]


def test_what_other_programs_ask_first_is_answered(nvml_sim: BuildNvml) -> None:
    # given a board of each class
    boards = tuple(Gpu(Constant(300), sensor=sensor) for sensor in (PASCAL, A100, H100))
    nvml = Nvml(nvml_sim(Scenario(gpus=boards)))
    # then only those have a counter that are Volta (5, nvml.h) or newer, as programs conclude
    for gpu in range(3):
        status, architecture = nvml.number("nvmlDeviceGetArchitecture", gpu)
        assert status == SUCCESS
        counted, _ = nvml.number("nvmlDeviceGetTotalEnergyConsumption", gpu)
        assert (counted == SUCCESS) == (architecture >= 5)
        # and none is joined to its CPU, shows graphics or refuses its limits
        assert nvml.number("nvmlDeviceGetC2cModeInfoV", gpu)[0] == RETURNS["NOT_SUPPORTED"]
        assert nvml.number("nvmlDeviceGetComputeMode", gpu) == (SUCCESS, 0)
        assert nvml.number("nvmlDeviceGetEnforcedPowerLimit", gpu) == (SUCCESS, 700_000)
        celsius, listed = ctypes.c_uint(0), ctypes.c_uint(9)
        handle = nvml.handles[gpu]
        assert nvml.lib.nvmlDeviceGetTemperature(handle, 0, ctypes.byref(celsius)) == SUCCESS
        assert 0 < celsius.value < 100
        graphics = nvml.lib.nvmlDeviceGetGraphicsRunningProcesses_v3
        assert graphics(handle, ctypes.byref(listed), None) == SUCCESS
        assert listed.value == 0


def test_fields_carry_their_type_their_scope_and_their_time(nvml_sim: BuildNvml) -> None:
    plain, grace = Gpu(Constant(200.0)), Gpu(Constant(200.0), module=Constant(500.0))
    nvml = Nvml(nvml_sim(Scenario(gpus=(plain, grace))))

    before_us = time.time_ns() // 1000 - 10_000
    _, (energy, power, unknown) = nvml.fields(ENERGY, INSTANT, 9999)
    assert (energy.value_type, power.value_type) == (3, 1)  # unsigned long long, unsigned int
    assert unknown.status == RETURNS["NOT_SUPPORTED"]
    assert before_us <= power.timestamp <= time.time_ns() // 1000 + 10_000

    assert nvml.fields(INSTANT, scope=1)[1][0].status == RETURNS["NOT_SUPPORTED"]
    assert nvml.fields(INSTANT, scope=1, gpu=1)[1][0].value == 500_000
    assert nvml.fields(INSTANT, scope=2, gpu=1)[1][0].status == RETURNS["NOT_SUPPORTED"]


def test_a_counter_restarts_from_zero_when_the_driver_is_reloaded(nvml_sim: BuildNvml) -> None:
    gpu = Gpu(Constant(100.0), counter_resets_s=(2.0,), counter_start_mj=5_000_000)
    before = Nvml(nvml_sim(Scenario(gpus=(gpu,), epoch_ns=started_ago(1))))
    after = Nvml(nvml_sim(Scenario(gpus=(gpu,), epoch_ns=started_ago(3.05))))

    assert before.number("nvmlDeviceGetTotalEnergyConsumption")[1] > 5_000_000
    # 100 W since the reset, at least a second ago
    assert 90_000 <= after.number("nvmlDeviceGetTotalEnergyConsumption")[1] < 5_000_000


def test_a_fault_hits_its_call_in_its_time_on_its_gpu(nvml_sim: BuildNvml) -> None:
    # given faults that are over, on, not yet due, and on one board or one field only
    faults = (
        Fault("nvmlDeviceGetPowerUsage", "UNKNOWN", end_s=5.0),
        Fault("nvmlDeviceGetPowerUsage", "NOT_SUPPORTED", start_s=5.0, end_s=3600.0, gpu=1),
        Fault("nvmlDeviceGetPowerUsage", "GPU_IS_LOST", start_s=3600.0),
        Fault("nvmlDeviceGetFieldValues", "NO_PERMISSION", gpu=0, field=INSTANT),
        Fault("nvmlDeviceGetTotalEnergyConsumption", "ZERO", gpu=1),
    )
    gpus = (Gpu(Constant(200.0)), Gpu(Constant(200.0)))
    nvml = Nvml(nvml_sim(Scenario(gpus=gpus, faults=faults, epoch_ns=started_ago(10))))

    assert nvml.number("nvmlDeviceGetPowerUsage", 0) == (SUCCESS, 200_000)
    assert nvml.number("nvmlDeviceGetPowerUsage", 1)[0] == RETURNS["NOT_SUPPORTED"]
    status, fields = nvml.fields(ENERGY, INSTANT)
    assert status == SUCCESS
    assert [field.status for field in fields] == [SUCCESS, RETURNS["NO_PERMISSION"]]
    assert nvml.fields(INSTANT, gpu=1)[1][0].status == SUCCESS
    assert nvml.number("nvmlDeviceGetTotalEnergyConsumption", 0)[1] > 0
    assert nvml.number("nvmlDeviceGetTotalEnergyConsumption", 1) == (SUCCESS, 0)


def test_a_fault_can_be_spurious_and_a_call_slow_or_stuck(nvml_sim: BuildNvml) -> None:
    scenario = Scenario(
        gpus=(Gpu(Constant(200.0)),),
        faults=(
            Fault("nvmlDeviceGetPowerUsage", "ZERO", every=3),
            Fault("nvmlDeviceGetUtilizationRates", "SLOW", delay_s=0.02),
            Fault("nvmlDeviceGetTotalEnergyConsumption", "HANG", end_s=0.3),
        ),
    )
    nvml = Nvml(nvml_sim(scenario))

    values = [nvml.number("nvmlDeviceGetPowerUsage")[1] for _ in range(6)]
    assert values == [200_000, 200_000, 0] * 2
    t0, (status, _), t1 = bracket(lambda: nvml.number("nvmlDeviceGetUtilizationRates"))
    assert status == SUCCESS
    assert t1 - t0 >= 20_000_000
    status, _ = nvml.number("nvmlDeviceGetTotalEnergyConsumption")
    assert status == SUCCESS
    assert scenario.since_epoch_s(time.monotonic_ns()) >= 0.3


@pytest.mark.parametrize("error", ["DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH", "NO_PERMISSION"])
def test_a_driver_that_does_not_start_says_why(error: str, nvml_sim: BuildNvml) -> None:
    nvml = Nvml(nvml_sim(Scenario(gpus=(Gpu(Constant(1.0)),), faults=(Fault("nvmlInit", error),))))

    nvml.lib.nvmlErrorString.restype = ctypes.c_char_p
    assert nvml.status == nvml.lib.nvmlInitWithFlags(0) == RETURNS[error]
    assert nvml.lib.nvmlErrorString(RETURNS[error]) not in (b"", b"Unknown Error")
    assert nvml.lib.nvmlShutdown() == RETURNS["UNINITIALIZED"]


def test_an_old_driver_lacks_symbols_and_a_real_one_lacks_ours(nvml_sim: BuildNvml) -> None:
    gpus = (Gpu(Constant(1.0)),)
    new = Nvml(nvml_sim(Scenario(gpus=gpus))).lib
    old = Nvml(nvml_sim(Scenario(gpus=gpus, absent=("nvmlDeviceGetFieldValues",)))).lib

    assert hasattr(new, "nvmlDeviceGetFieldValues")
    assert not hasattr(old, "nvmlDeviceGetFieldValues")
    assert hasattr(old, "nvmlDeviceGetPowerUsage")
    for name in ("nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
        assert not hasattr(new, name)  # those are macros of the header


def test_handles_live_from_init_to_the_last_shutdown(nvml_sim: BuildNvml) -> None:
    nvml = Nvml(nvml_sim(Scenario(gpus=(Gpu(Constant(200.0)),))))
    assert nvml.lib.nvmlInitWithFlags(0) == SUCCESS

    assert nvml.lib.nvmlShutdown() == SUCCESS
    assert nvml.number("nvmlDeviceGetPowerUsage") == (SUCCESS, 200_000)
    assert nvml.lib.nvmlShutdown() == SUCCESS
    assert nvml.number("nvmlDeviceGetPowerUsage")[0] == RETURNS["UNINITIALIZED"]
    assert nvml.lib.nvmlInit_v2() == SUCCESS
    assert nvml.number("nvmlDeviceGetPowerUsage")[0] == RETURNS["INVALID_ARGUMENT"]


def test_a_forked_child_must_initialise_for_itself(nvml_sim: BuildNvml) -> None:
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(200.0)),)))
    nvml = Nvml(sim)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = nvml.number("nvmlDeviceGetPowerUsage")[0]
            mine = Nvml(sim)
            after = mine.number("nvmlDeviceGetPowerUsage")
            right = (before, after) == (RETURNS["UNINITIALIZED"], (SUCCESS, 200_000))
            status = 0 if right else 1
        finally:
            os._exit(status)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert nvml.number("nvmlDeviceGetPowerUsage") == (SUCCESS, 200_000)


def test_boards_have_their_names_and_are_found_by_uuid(nvml_sim: BuildNvml) -> None:
    gpus = (Gpu(Constant(1.0)), Gpu(Constant(2.0), uuid="GPU-abc", name="Tesla V100", mig=None))
    nvml = Nvml(nvml_sim(Scenario(gpus=gpus, driver_version="470.1")))

    count, handle = ctypes.c_uint(), ctypes.c_void_p()
    assert nvml.lib.nvmlDeviceGetCount_v2(ctypes.byref(count)) == SUCCESS
    assert count.value == 2
    assert nvml.text("nvmlDeviceGetUUID", 0) == (SUCCESS, default_uuid(0))
    assert nvml.text("nvmlDeviceGetUUID", 1) == (SUCCESS, "GPU-abc")
    assert nvml.text("nvmlDeviceGetName", 1) == (SUCCESS, "Tesla V100")
    assert nvml.text("nvmlDeviceGetName", 1, room=5)[0] == RETURNS["INSUFFICIENT_SIZE"]
    assert nvml.number("nvmlDeviceGetIndex", 1) == (SUCCESS, 1)
    assert nvml.lib.nvmlDeviceGetHandleByUUID(b"GPU-abc", ctypes.byref(handle)) == SUCCESS
    assert handle.value == nvml.handles[1].value
    missing = nvml.lib.nvmlDeviceGetHandleByUUID(b"GPU-no", ctypes.byref(handle))
    assert missing == RETURNS["NOT_FOUND"]
    beyond = nvml.lib.nvmlDeviceGetHandleByIndex_v2(2, ctypes.byref(handle))
    assert beyond == RETURNS["INVALID_ARGUMENT"]
    version = ctypes.create_string_buffer(80)
    assert nvml.lib.nvmlSystemGetDriverVersion(version, 80) == SUCCESS
    assert version.value == b"470.1"
    modes = (ctypes.c_uint(9), ctypes.c_uint(9))
    assert nvml.lib.nvmlDeviceGetMigMode(nvml.handles[0], *map(ctypes.byref, modes)) == SUCCESS
    assert [mode.value for mode in modes] == [0, 0]
    no_mig = nvml.lib.nvmlDeviceGetMigMode(nvml.handles[1], *map(ctypes.byref, modes))
    assert no_mig == RETURNS["NOT_SUPPORTED"]


def test_load_and_memory_are_the_scenarios(nvml_sim: BuildNvml) -> None:
    gpu = Gpu(Constant(1.0), utilization=Constant(0.73), memory_utilization=Constant(0.2))
    nvml = Nvml(nvml_sim(Scenario(gpus=(gpu, Gpu(Constant(1.0), mig=True)))))

    status, packed = nvml.number("nvmlDeviceGetUtilizationRates")
    assert (status, packed & 0xFFFFFFFF, packed >> 32) == (SUCCESS, 73, 20)
    assert nvml.number("nvmlDeviceGetUtilizationRates", 1)[0] == RETURNS["NOT_SUPPORTED"]

    memory = MemoryV2(version=0x02000028)
    get = nvml.lib.nvmlDeviceGetMemoryInfo_v2
    assert get(nvml.handles[0], ctypes.byref(memory)) == SUCCESS
    assert (memory.used, memory.reserved, memory.total) == (2**30, 2**29, 80 * 2**30)
    assert memory.used + memory.reserved + memory.free == memory.total
    assert get(nvml.handles[0], ctypes.byref(MemoryV2(version=2))) == 25  # version mismatch
    first = (ctypes.c_ulonglong * 3)()
    assert nvml.lib.nvmlDeviceGetMemoryInfo(nvml.handles[0], first) == SUCCESS
    assert first[2] == 2**30 + 2**29
    assert first[1] + first[2] == first[0]


def test_structs_are_as_large_as_the_drivers_own() -> None:
    sizes = {FieldValue: 40, Sample: 16, ProcessUtilization: 32, ProcessInfo: 24, MemoryV2: 40}
    assert {struct: ctypes.sizeof(struct) for struct in sizes} == sizes


def test_processes_are_listed_while_they_run(nvml_sim: BuildNvml) -> None:
    processes = (
        Process(41, 1000, sm=0.6, mem=0.1),
        Process(42, 2000, sm=0.2),
        Process(43, 3000, end_s=1.0),
    )
    gpu = Gpu(Constant(1.0), processes=processes)
    nvml = Nvml(nvml_sim(Scenario(gpus=(gpu,), epoch_ns=started_ago(5))))
    listing = nvml.lib.nvmlDeviceGetComputeRunningProcesses_v3
    usage = nvml.lib.nvmlDeviceGetProcessUtilization

    # the count first, then the list
    count = ctypes.c_uint(0)
    status = listing(nvml.handles[0], ctypes.byref(count), None)
    assert (status, count.value) == (RETURNS["INSUFFICIENT_SIZE"], 2)
    infos = (ProcessInfo * count.value)()
    assert listing(nvml.handles[0], ctypes.byref(count), infos) == SUCCESS
    assert [(info.pid, info.used_bytes) for info in infos] == [(41, 1000), (42, 2000)]

    samples = (ProcessUtilization * 8)()
    count = ctypes.c_uint(8)
    since = ctypes.c_ulonglong(0)
    assert usage(nvml.handles[0], samples, ctypes.byref(count), since) == SUCCESS
    assert [(s.pid, s.sm, s.mem) for s in samples[: count.value]] == [(41, 60, 10), (42, 20, 0)]
    # nothing new until the next sample, a sixth of a second later; a minute ahead there is none
    since = ctypes.c_ulonglong(samples[0].timestamp + 60_000_000)
    count = ctypes.c_uint(8)
    empty = usage(nvml.handles[0], samples, ctypes.byref(count), since)
    assert empty == RETURNS["NOT_FOUND"]


def test_the_drivers_buffer_holds_past_power_at_its_own_instants(nvml_sim: BuildNvml) -> None:
    wave = Step(4.0, 100.0, 300.0)
    sim = nvml_sim(Scenario(gpus=(Gpu(wave),), epoch_ns=started_ago(5)))
    nvml = Nvml(sim)
    get, kind, count = nvml.lib.nvmlDeviceGetSamples, ctypes.c_int(), ctypes.c_uint()

    def fetch(since_us: int, room: int) -> tuple[int, list[Sample]]:
        count.value, samples = room, (Sample * room)()
        seen = ctypes.c_ulonglong(since_us)
        status = get(nvml.handles[0], 0, seen, *map(ctypes.byref, (kind, count)), samples)
        return status, samples[: count.value]

    seen = ctypes.c_ulonglong(0)
    assert get(nvml.handles[0], 0, seen, ctypes.byref(kind), ctypes.byref(count), None) == SUCCESS
    status, samples = fetch(0, count.value)

    assert (status, len(samples), kind.value) == (SUCCESS, 120, 1)
    steps_us = {b.timestamp - a.timestamp for a, b in itertools.pairwise(samples)}
    assert steps_us == {20_000}
    assert (samples[0].value, samples[-1].value) == (100_000, 300_000)
    assert fetch(samples[59].timestamp, 5)[1][0].timestamp == samples[60].timestamp
    assert fetch(samples[-1].timestamp + 60_000_000, 5)[0] == RETURNS["NOT_FOUND"]


def test_a_scenario_that_does_not_parse_is_refused_with_its_line(
    nvml_sim: BuildNvml, capfd: pytest.CaptureFixture[str]
) -> None:
    sim = nvml_sim(Scenario())
    file = Path(f"{sim.library}.scenario")
    for line in ("gpu GPU-1 A\n power cube 1", "fault nvmlInit x", "wat 3", "epoch_ns init init"):
        file.write_text(f"# first\n{line}\n")

        assert Nvml(sim).status == RETURNS["UNKNOWN"]
        assert f"{file}:{2 + line.count(chr(10))}: " in capfd.readouterr().err


def test_each_scenario_has_its_library_and_threads_share_one(nvml_sim: BuildNvml) -> None:
    from concurrent.futures import ThreadPoolExecutor

    one = Nvml(nvml_sim(Scenario(gpus=(Gpu(Constant(100.0)),))))
    two = Nvml(nvml_sim(Scenario(gpus=(Gpu(Constant(200.0)),))))

    def read(nvml: Nvml) -> set[tuple[int, int]]:
        return {nvml.number("nvmlDeviceGetPowerUsage") for _ in range(500)}

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, [one, two, one, two]))
    assert results == [{(SUCCESS, 100_000)}, {(SUCCESS, 200_000)}] * 2


def test_nvidias_own_bindings_read_it(nvml_sim: BuildNvml) -> None:
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("pip install nvidia-ml-py")
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(123.0)), Gpu(Constant(321.0)))))
    script = """
import pynvml as n
n.nvmlInit()
for i in range(n.nvmlDeviceGetCount()):
    h = n.nvmlDeviceGetHandleByIndex(i)
    field = n.nvmlDeviceGetFieldValues(h, [n.NVML_FI_DEV_POWER_INSTANT])[0]
    print(n.nvmlDeviceGetPowerUsage(h), field.value.uiVal, n.nvmlDeviceGetUUID(h),
          n.nvmlDeviceGetMemoryInfo(h, version=n.nvmlMemory_v2).used,
          n.nvmlDeviceGetUtilizationRates(h).gpu, n.nvmlDeviceGetPciInfo(h).busId,
          len(n.nvmlDeviceGetSamples(h, 0, 0)[1]), n.nvmlDeviceGetComputeRunningProcesses(h))
"""
    # given no scenario beside the library: the variable names it
    Path(f"{sim.library}.scenario").rename(sim.library.with_name("elsewhere"))
    env = {**os.environ, **sim.env, "PEPR_SIM_NVML": str(sim.library.with_name("elsewhere"))}

    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=env, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip

    assert found == [
        f"{mw} {mw} {default_uuid(i)} {2**30} 50 00000000:0{i + 1}:00.0 120 []"
        for i, mw in enumerate((123_000, 321_000))
    ]


# powercap


def test_the_tree_has_the_kernels_shape(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(*two_socket_server())

    # children lie flat in the class folder and nested in the real one
    assert {entry.name for entry in tree.where.iterdir()} == {
        "intel-rapl", "intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:1",
        "intel-rapl:1:0", "intel-rapl:1:1", "intel-rapl:2", "intel-rapl-mmio", "intel-rapl-mmio:0",
    }  # fmt: skip
    assert all(entry.is_symlink() for entry in tree.where.iterdir())
    dram = tree.where / "intel-rapl:0" / "intel-rapl:0:1"
    assert dram.samefile(tree.where / "intel-rapl:0:1")
    assert dram.samefile(tree.path("intel-rapl:0:1"))
    assert (dram / "name").read_text() == "dram\n"
    assert (dram / "max_energy_range_uj").read_text() == "262143328850\n"
    assert (dram / "device").samefile(tree.where / "intel-rapl:0")
    assert (dram / "subsystem").samefile(tree.where)
    assert (dram / "energy_uj").stat().st_mode & 0o777 == 0o400
    assert not (tree.where / "intel-rapl" / "energy_uj").exists()


def test_a_still_zone_shows_what_it_is_set_to(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", start_uj=7))
    fd = os.open(tree.path("intel-rapl:0") / "energy_uj", os.O_RDONLY)
    try:
        for value in (7, 262_143_328_849, 0, 12):
            tree.set("intel-rapl:0", value)
            text = os.pread(fd, 64, 0)
            assert (int(text), len(text)) == (value, 16)
    finally:
        os.close(fd)


def test_a_live_zone_follows_its_wave_and_wraps(powercap_sim: BuildTree) -> None:
    # given 2 kW on a counter of 65.7 kJ that wraps in a second, and a square wave
    range_uj = 65_712_999_613
    zones = [
        Zone("intel-rapl:0", "package-0", Constant(2000.0), range_uj, range_uj - 2_000_000_000),
        Zone("intel-rapl:1", "package-1", Square(0.05, 50.0, 150.0)),
    ]
    tree = powercap_sim(*zones, live=True)
    files = {z.key: os.open(tree.path(z.key) / "energy_uj", os.O_RDONLY) for z in zones}
    reads: dict[str, list[tuple[int, int, int]]] = {key: [] for key in files}
    try:
        # when one reader takes modular differences until it has
        end_ns = tree.epoch_ns + 1_300_000_000
        while time.monotonic_ns() < end_ns:
            for zone in zones:
                t0, text, t1 = bracket(functools.partial(os.pread, files[zone.key], 64, 0))
                reads[zone.key].append((t0, int(text), t1))
    finally:
        for fd in files.values():
            os.close(fd)

    # then they add up to the truth, but for how late this machine let them be written
    for zone in zones:
        values = [value for _, value, _ in reads[zone.key]]
        steps_uj = [(b - a) % zone.range_uj for a, b in itertools.pairwise(values)]
        assert max(steps_uj) < zone.range_uj / 2, "the counter went back"
        (first_0, _, first_1), (last_0, _, last_1) = reads[zone.key][0], reads[zone.key][-1]
        slack_j = zone.wave.power_w(0) * (tree.late_s + 0.001) + 0.02
        passed_j = sum(steps_uj) / 1e6
        assert passed_j >= tree.energy_j(zone.key, first_1, last_0) - slack_j
        assert passed_j <= tree.energy_j(zone.key, first_0, last_1) + slack_j
    wrapping = [value for _, value, _ in reads["intel-rapl:0"]]
    assert sum(b < a for a, b in itertools.pairwise(wrapping)) == 1


def test_a_reader_never_sees_half_a_number(powercap_sim: BuildTree) -> None:
    # given eight zones that move each 0.1 ms, all of whose digits change
    powers = {"package_w": 9_123.5, "core_w": 5_234.6, "dram_w": 3_123.5, "psys_w": 9_876.4}
    zones = two_socket_server(**powers, start_uj=10**11)
    tree = powercap_sim(*zones, live=True, period_s=1e-4)
    files = {z.key: os.open(tree.path(z.key) / "energy_uj", os.O_RDONLY) for z in zones}
    last = dict.fromkeys(files, 10**11)
    reads = 0
    try:
        # when they are read as fast as this machine can
        end_ns = time.monotonic_ns() + 1_000_000_000
        while time.monotonic_ns() < end_ns:
            for key, fd in files.items():
                text = os.pread(fd, 64, 0)
                value = int(text)  # no empty, foreign or zero byte
                # then only the first word of a number moves, and no number goes back
                assert text[8:] == b"0000\n\n\n\n"
                assert value >= last[key]
                last[key] = value
                reads += 1
    finally:
        for fd in files.values():
            os.close(fd)
    now_ns = time.monotonic_ns()
    assert reads > 10_000
    assert all(last[key] <= tree.counter_uj(key, now_ns) for key in last)


def test_a_zones_faults_show_in_its_file(powercap_sim: BuildTree) -> None:
    def zone(key: str, *faults: ZoneFault, start_uj: int = 0) -> Zone:
        return Zone(key, "package-0", Constant(100.0), start_uj=start_uj, faults=faults)

    # given faults that are on now, and one that is over
    tree = powercap_sim(
        zone("intel-rapl:0", ZoneFault("stall", 1.0)),
        zone("intel-rapl:1", ZoneFault("stall", 1.0, 2.0)),
        zone("intel-rapl:2", ZoneFault("reset", 2.0), start_uj=10**9),
        zone("intel-rapl:3", ZoneFault("empty", 1.0)),
        zone("intel-rapl:4", ZoneFault("garbage", 1.0)),
        zone("intel-rapl:5", ZoneFault("deny", 1.0)),
        zone("intel-rapl:6", ZoneFault("vanish", 1.0)),
        zone("intel-rapl:7", ZoneFault("vanish", 3600.0)),
        zone("intel-rapl:8", ZoneFault("stall", 1.0), start_uj=RANGE_UJ - 50_000_000),
        live=True,
        epoch_ns=started_ago(5),
    )

    def text(number: int) -> str:
        return (tree.where / f"intel-rapl:{number}" / "energy_uj").read_text().strip()

    assert text(0) == "100000000"
    assert int(text(1)) >= 500_000_000  # caught up
    assert 300_000_000 <= int(text(2)) < 10**9
    assert text(3) == ""
    assert text(4) == "garbage"
    with obeying_permissions(), pytest.raises(PermissionError):
        text(5)
    for folder in (tree.where / "intel-rapl:6", tree.path("intel-rapl:6")):
        assert not os.path.lexists(folder)
    assert int(text(7)) >= 500_000_000
    assert text(8) == "50000000"  # 100 J later, past the wrap


def test_a_zone_that_vanishes_reads_as_nothing_through_a_kept_descriptor(
    powercap_sim: BuildTree,
) -> None:
    faults = (ZoneFault("empty", 0.3, 1.0), ZoneFault("vanish", 2.0))
    tree = powercap_sim(Zone("intel-rapl:0", "p", Constant(1.0), faults=faults), live=True)
    fd = os.open(tree.path("intel-rapl:0") / "energy_uj", os.O_RDONLY)
    try:
        until(lambda: os.pread(fd, 64, 0) == b"")
        until(lambda: os.pread(fd, 64, 0) != b"")
        assert int(os.pread(fd, 64, 0)) >= 100_000
        until(lambda: not tree.path("intel-rapl:0").exists())
        assert os.pread(fd, 64, 0) == b""
    finally:
        os.close(fd)


def test_the_writer_ends_with_its_tree_and_with_its_parent(
    powercap_sim: BuildTree, native_cache: Path, tmp_path: Path
) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0"), live=True)
    pid = tree.writer_pid
    tree.stop()
    assert not Path(f"/proc/{pid}").exists()

    # given a parent that is killed before it can stop anything
    script = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from sim.powercap import *\n"
        "writer, root = map(Path, sys.argv[2:])\n"
        "tree = Tree(root, two_socket_server(), writer=build_writer(writer))\n"
        "print(tree.writer_pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    here, root = str(Path(__file__).parent), str(tmp_path / "orphan")
    found = subprocess.run(
        [sys.executable, "-c", script, here, str(native_cache), root],
        check=False, capture_output=True, text=True, timeout=SLOW_S,  # the writer holds our stderr
    )  # fmt: skip
    assert found.returncode == -9, found.stderr
    orphan = Path(f"/proc/{int(found.stdout)}/stat")

    # gone, or a zombie where nobody reaps
    until(lambda: not orphan.exists() or orphan.read_text().rpartition(") ")[2][0] == "Z")


def test_simulated_lanes_read_steady_counters_as_far_apart_as_real_ones(tmp_path: Path) -> None:
    # given steady power with noise, jumps now and then, and steps of no or of a random size
    random, base_ns = np.random.default_rng(3), 20_000_000
    lengths = random.integers(1, 300, 200)
    power_w = np.repeat(random.uniform(50, 400, 200), lengths)
    noise = np.repeat(random.uniform(0.01, 0.2, 200), lengths)
    since_ns = random.integers(base_ns // 2, 5 * base_ns, len(power_w))
    steps_uj = power_w * since_ns * 1e-3 * random.normal(1, noise)
    odd = random.uniform(size=len(power_w)) < 0.02
    steps_uj[odd] *= random.choice([0, -1, 3], odd.sum())

    # when the rule of the product and that of the simulation get the same steps
    try:
        program = native.build(tmp_path, "steady", ("steady_spacing.cpp",), f"-I{CSRC}")
    except native.UnavailableError as missing:
        pytest.skip(str(missing))
    pairs = list(zip(steps_uj.tolist(), since_ns.tolist(), strict=True))
    lines = "".join(f"{step!r} {ns}\n" for step, ns in pairs)
    done = subprocess.run(
        [program, str(base_ns)], input=lines, capture_output=True, text=True, check=True
    )
    real_ns = np.array(done.stdout.split(), dtype=np.int64)
    spacing = SteadySpacing(1e-9 * base_ns)
    simulated_ns = np.rint([1e9 * spacing.next_s(step, 1e-9 * ns) for step, ns in pairs])

    # then they ask for the same spacing each time, and for each of the possible ones
    assert np.array_equal(simulated_ns, real_ns)
    assert set((real_ns // base_ns).tolist()) == {1, 2, 4}


def test_even_root_can_be_made_to_obey_permissions(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0"))
    file = tree.path("intel-rapl:0") / "energy_uj"
    file.chmod(0)
    child = [sys.executable, "-c", "import sys; open(sys.argv[1]).read()", str(file)]

    with obeying_permissions(), pytest.raises(PermissionError):
        file.read_text()
    refused = subprocess.run(
        child, check=False, capture_output=True, text=True, preexec_fn=obey_permissions
    )
    assert "PermissionError" in refused.stderr
    if os.geteuid() == 0:
        assert file.read_text().strip() == "0"  # and afterwards root is root again


def test_a_missing_tool_is_named(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from sim import native\n"
        "try: native.compiler()\n"
        "except native.UnavailableError as missing: print(missing)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={"PATH": str(tmp_path)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "install g++" in found.stdout
