"""`sensors --check` finds out what a sensor is like: what was simulated, within its uncertainty."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import SLOW_S, Cli, component, ended, python, until
from sim.nvml import A100, H100, VOLTA, BuildNvml, Gpu, Process, Scenario, Sensor, default_uuid
from sim.powercap import BuildTree, Zone
from sim.waves import Constant, Followed

from pepr_profiler import _core
from pepr_profiler.check.findings import examine
from pepr_profiler.check.load import ProcessLoad, Ran, Schedule, cpus_for_us, no_bursts, schedule
from pepr_profiler.check.probe import check_period_ns, check_specs, probe
from pepr_profiler.check.response import Bursts, Series, compare, respond
from pepr_profiler.energy.hardware import read_hardware
from pepr_profiler.report.check_text import check_text
from pepr_profiler.sensors.machine import read_cpu_identity
from pepr_profiler.sensors.spec import lanes_by_name
from pepr_profiler.trace.lane import LaneInfo, describe

SIM = Path(__file__).parent / "sim"


# --- what is found out, in virtual time -----------------------------------------------------------


def bursts_of(begin_s: float, seconds: float, seed: int) -> Bursts:
    edges = np.array(schedule(int(begin_s * 1e9), seconds, seed)) * 1e-9
    return Bursts(edges[:, 0], edges[:, 1], np.ones(len(edges)))


class VirtualSensor:
    """A sensor of 60 W and 240 W under load, which is computed here in a way of its own."""

    def __init__(
        self,
        refresh_s: float,
        *,
        window_s: float = 0.0,
        delay_s: float = 0.0,
        smoothing_s: float = 0.0,
        counter: bool = False,
        noise_w: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        self.refresh_s, self.window_s, self.delay_s = refresh_s, window_s, delay_s
        self.smoothing_s, self.counter = smoothing_s, counter
        self.noise_w, self.jitter = noise_w, jitter

    @property
    def lag_s(self) -> float:
        return self.delay_s + (self.smoothing_s or self.window_s / 2)

    def read(self, load: Bursts, seconds: float, random: np.random.Generator) -> Series:
        # The load in steps of a quarter of a millisecond, and all filters as sums over these.
        step_s = 2.5e-4
        grid = np.arange(-2.5, seconds, step_s)
        on = np.zeros(len(grid))
        for begin_s, end_s in zip(load.begin_s, load.end_s, strict=True):
            on[(grid >= begin_s) & (grid < end_s)] = 1.0
        watts = 60 + 240 * on
        energy = np.cumsum(watts) * step_s
        if self.smoothing_s:
            kernel = np.exp(-np.arange(0, 8 * self.smoothing_s, step_s) / self.smoothing_s)
            size = 1 << (len(watts) + len(kernel)).bit_length()
            spectrum = np.fft.rfft(watts - 60, size) * np.fft.rfft(kernel / kernel.sum(), size)
            shown = 60 + np.fft.irfft(spectrum, size)[: len(watts)]
        count = int(seconds / self.refresh_s)
        spans = self.refresh_s * (1 + self.jitter * random.standard_normal(count))
        refreshes = np.cumsum(spans) - random.uniform(0, self.refresh_s)
        at = refreshes - self.delay_s
        if self.counter:
            values = np.floor(1e3 * np.interp(at, grid + step_s, energy)) / 1e3
        elif self.smoothing_s:
            values = np.interp(at, grid, shown)
        else:
            upto = [np.interp(at - back, grid + step_s, energy) for back in (0, self.window_s)]
            values = (upto[0] - upto[1]) / self.window_s
        if not self.counter:
            values = np.round(values + self.noise_w * random.standard_normal(count), 3)
        reads = np.arange(0.5, seconds - 1, 0.005)
        reads += random.uniform(0, 0.001, len(reads))
        return Series(reads, values[np.searchsorted(refreshes, reads) - 1], self.counter)


VIRTUAL: dict[str, VirtualSensor] = {
    "a100": VirtualSensor(0.1, window_s=0.025),
    "turing": VirtualSensor(0.1, window_s=0.1),
    "average": VirtualSensor(0.1, window_s=1.0),
    "average-noisy": VirtualSensor(0.1, window_s=1.0, noise_w=4, jitter=0.02),
    "volta-noisy": VirtualSensor(0.02, window_s=0.01, noise_w=4),
    "a100-noisy": VirtualSensor(0.1, window_s=0.025, noise_w=4, jitter=0.02),
    "slow": VirtualSensor(0.5, window_s=0.1),
    "slow-average": VirtualSensor(1.0, window_s=1.0),
    "late": VirtualSensor(0.1, window_s=0.025, delay_s=0.12),
    "smooth": VirtualSensor(0.1, smoothing_s=0.12),
    "counter-20": VirtualSensor(0.02, counter=True),
    "counter-100": VirtualSensor(0.1, counter=True, jitter=0.02),
    "counter-500": VirtualSensor(0.5, counter=True),
    "counter-1000": VirtualSensor(1.0, counter=True),
    "counter-late": VirtualSensor(0.1, counter=True, delay_s=0.12),
}
SEEDS = 4


@pytest.mark.parametrize("kind", VIRTUAL)
def test_what_a_sensor_is_like_is_found_within_the_uncertainty(kind: str) -> None:
    sensor = VIRTUAL[kind]
    held = {"refresh": 0, "window": 0, "lag": 0, "watts": 0}
    reported = dict.fromkeys(held, 0)
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        load = bursts_of(1.5, 20.0, seed)
        found = respond(sensor.read(load, 24.0, random), {"gpu": load})
        truths = {
            "refresh": (found.refresh_s, sensor.refresh_s),
            "window": (found.window_s, sensor.window_s),
            "lag": (found.lag_s, sensor.lag_s),
            "watts": (found.watts["gpu"], 240.0),
        }
        if sensor.smoothing_s:
            truths["window"] = (found.smoothing_s, sensor.smoothing_s)
        for name, (figure, truth) in truths.items():
            if figure.is_known:
                reported[name] += 1
                held[name] += figure.contains(truth)
                assert figure.u is not None and figure.u < 0.6 * max(
                    truth, 0.2 * sensor.refresh_s, 0.02
                )
            else:
                assert figure.why
    if sensor.counter:
        del reported["window"], held["window"]
    # then nearly all that is reported is true, and nearly all is reported
    assert all(held[name] >= reported[name] - 1 for name in reported), (held, reported)
    assert all(count >= SEEDS - 2 for count in reported.values()), reported


def test_a_sensor_that_stands_still_or_that_no_load_moves_is_reported_as_such() -> None:
    load = bursts_of(1.5, 20.0, 1)
    at_s = np.arange(0, 24, 0.005)
    still = respond(Series(at_s, np.full(len(at_s), 70.0), False), {"cpu": load})
    assert not still.refresh_s.is_known and "changed 0 times" in still.refresh_s.why
    assert not still.lag_s.is_known and still.idle_w.value == 70.0
    noise = np.random.default_rng(2).standard_normal(241)
    noisy = Series(at_s, 70 + noise[(at_s / 0.1).astype(int)], False)
    found = respond(noisy, {"cpu": load})
    assert found.refresh_s.contains(0.1)
    assert (found.lag_s.value, found.lag_s.why) == (None, "no load moved it")
    assert abs(found.watts["cpu"].value or 0) < 2 * (found.watts["cpu"].u or 0)


def test_two_sensors_of_one_device_are_compared_where_both_were_read() -> None:
    sensor, random = VIRTUAL["counter-100"], np.random.default_rng(3)
    load = bursts_of(1.5, 20.0, 3)
    counter, again = (sensor.read(load, 24.0, random) for _ in range(2))
    power = VIRTUAL["a100"].read(load, 24.0, random)
    off = counter._replace(values=1.05 * counter.values, at_s=counter.at_s)
    figure = compare(off, power, lag_s=0.0125 + 0.05)
    assert figure.contains(0.05) and figure.u is not None and figure.u < 0.03
    # and one that wraps is the same as one that does not
    wrapping = again._replace(values=again.values % 500.0, range_j=500.0)
    assert compare(counter, wrapping).contains(0.0)


# --- simulated hardware, read by the real samplers ------------------------------------------------


class AnnouncedLoad:
    """A load that waves follow: each gets `add_w` more during a burst."""

    def __init__(
        self,
        epoch_ns: int,
        waves: Sequence[tuple[Followed, float, float]],
        gpus: frozenset[str] | None = None,
    ) -> None:
        self._epoch_ns, self._waves, self._gpus = epoch_ns, waves, gpus
        self._bursts: Schedule = ()

    def prepare(self) -> None: ...

    def problem(self, within_s: float) -> str:
        del within_s
        return ""

    def begin(self, bursts: Schedule) -> None:
        self._bursts = bursts
        for wave, idle_w, add_w in self._waves:
            for edges in bursts:
                begin_s, end_s = ((edge - self._epoch_ns) * 1e-9 for edge in edges)
                wave.follow([(begin_s, idle_w + add_w), (end_s, idle_w)])

    def finish(self) -> Ran:
        edges = np.array(self._bursts) * 1e-9
        bursts = Bursts(edges[:, 0], edges[:, 1], np.ones(len(edges)))
        return Ran(bursts, pids=(4121,), by="the test", gpus=self._gpus)

    def stop(self) -> None: ...


class NoLoad(AnnouncedLoad):
    """One that cannot run."""

    def problem(self, within_s: float) -> str:
        del within_s
        return "neither torch nor cupy is installed"


def opened_for_check(*specs: str) -> list[tuple[LaneInfo, _core.Sampler]]:
    lanes = []
    for name, spec in lanes_by_name(check_specs(specs)).items():
        period_ns = check_period_ns(spec)
        sampler = _core.Sampler(spec, period_ns)
        assert sampler.wait_ready(10.0)
        lanes.append((LaneInfo(name, spec, period_ns, describe(sampler.channels)), sampler))
    return lanes


def wave_of(folder: Path, name: str, idle_w: float) -> Followed:
    wave = Followed(folder / name)
    wave.follow([(-1e6, idle_w)])
    return wave


def rows_of(findings: dict[str, Any], sensor: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in findings["rows"] if row["sensor"].startswith(sensor)}


BOARDS: dict[str, Callable[[Followed, Followed], Gpu]] = {
    "h100": lambda gpu, _: Gpu(gpu, sensor=H100),
    "volta": lambda gpu, _: Gpu(gpu, sensor=VOLTA),
    "slow": lambda gpu, _: Gpu(gpu, sensor=Sensor(0.5, 0.1, "instant", counter_refresh_s=0.5)),
    "second": lambda gpu, _: Gpu(gpu, sensor=Sensor(1.0, 1.0, "instant", counter_refresh_s=1.0)),
    "late": lambda gpu, _: Gpu(
        gpu, sensor=Sensor(delay_s=0.12, power_usage="instant", counter_delay_s=0.1)
    ),
    "smooth": lambda gpu, _: Gpu(gpu, sensor=Sensor(smoothing_s=0.12, power_usage="instant")),
    "off": lambda gpu, _: Gpu(gpu, sensor=A100, counter_gain=1.08),
    "module": lambda gpu, module: Gpu(gpu, sensor=A100, counted=module),
    "grace": lambda gpu, module: Gpu(gpu, sensor=H100, counted=module, module=module),
}
MODEL = "NVIDIA {} 80GB"


@pytest.mark.long
def test_each_class_of_simulated_board_is_found_to_be_what_it_is(
    nvml_sim: BuildNvml, powercap_sim: BuildTree, tmp_path: Path
) -> None:
    # given boards of all classes whose GPUs take 60 W and 300 W under load, one whose counter is
    # the module's, with a CPU of 30 W and 100 W under load, and that CPU's RAPL
    epoch_ns = time.monotonic_ns()
    gpu, cpu = wave_of(tmp_path, "gpu", 60.0), wave_of(tmp_path, "cpu", 30.0)
    module = wave_of(tmp_path, "module", 90.0)
    boards = [replace(make(gpu, module), name=MODEL.format(name)) for name, make in BOARDS.items()]
    sim = nvml_sim(Scenario(tuple(boards), epoch_ns=epoch_ns))
    tree = powercap_sim(
        Zone("intel-rapl:0", "package-0", cpu, range_uj=50_000_000_000),
        Zone("intel-rapl:0:0", "dram", Constant(5.0)),
        live=True,
        epoch_ns=epoch_ns,
    )
    loads = {
        "cpu": AnnouncedLoad(epoch_ns, [(cpu, 30.0, 70.0), (module, 90.0, 70.0)]),
        "gpu": AnnouncedLoad(epoch_ns, [(gpu, 60.0, 240.0), (module, 90.0, 240.0)]),
    }
    lanes = opened_for_check(sim.spec, tree.spec)
    # when they are tried
    findings = examine(probe(lanes, loads, load_s=16.0))
    for _, sampler in lanes:
        sampler.stop(1.0)
    # then each is found to be what was simulated
    by_name = {(s["device"], s["source"]): s for s in findings["sensors"]}
    off_by = {}  # in units of u
    for (name, _), board in zip(BOARDS.items(), boards, strict=True):
        look = board.sensor
        averages = look.power_usage == "average"
        truths = {
            "nvml-energy": (look.counter_refresh_s, None, look.counter_delay_s),
            "nvml-power-instant": (
                look.refresh_s,
                None if look.smoothing_s else look.window_s,
                look.delay_s + (look.smoothing_s or look.window_s / 2),
            ),
        }
        if averages:
            truths["nvml-power-average"] = (look.refresh_s, 1.0, 0.5)
        for source, expected in truths.items():
            found = by_name[MODEL.format(name), source]
            watts = found["load_w"]["gpu"]
            checks = list(zip(("refresh_s", "window_s", "lag_s"), expected, strict=True))
            for key, truth in checks:
                figure = found[key]
                if truth is None or figure["value"] is None:
                    continue
                off_by[name, source, key] = abs(figure["value"] - truth) / max(figure["u"], 1e-9)
            assert abs(watts["value"] / 240 - 1) < 0.1, (name, source, watts)
    # (of intervals with k = 2, one of twenty may miss the truth by a little)
    assert sum(off > 1 for off in off_by.values()) <= len(off_by) / 20, off_by
    assert max(off_by.values()) < 2, off_by
    known = [s for s in findings["sensors"] if s["refresh_s"]["value"] and s["lag_s"]["value"]]
    assert len(known) >= 15
    # and what is unusual is named
    unusual = {
        (row["sensor"].split()[1], row["what"])
        for row in findings["rows"]
        if row["verdict"] == "not as expected"
    }
    assert ("off", "against nvml-power-instant") in unusual
    assert ("slow", "refresh period") in unusual and ("second", "refresh period") in unusual
    assert ("late", "lag") in unusual and ("smooth", "smoothing") in unusual
    assert ("module", "moved by") in unusual
    assert not {what for board, what in unusual if board in ("h100", "volta", "grace")}
    grace = rows_of(findings, "module of gpu:8  grace")
    assert {"moved by", "against nvml-module-average"} <= grace.keys()
    module_facts = by_name[MODEL.format("module"), "nvml-energy"]
    assert module_facts["covers"] == "module" and module_facts["moved_by"] == ["cpu", "gpu"]
    assert (
        abs(module_facts["load_w"]["cpu"]["value"] - 70) <= module_facts["load_w"]["cpu"]["u"] + 1
    )
    assert by_name[MODEL.format("h100"), "nvml-energy"]["covers"] == "gpu"
    off = rows_of(findings, "gpu:6  off")["against nvml-power-instant"]["seen"]
    percent, u = float(off.split()[0]), float(off.split()[2])
    assert abs(percent - 8.0) <= u < 3.5
    # and the CPU's: at each read, moved by the CPU alone, and when it wraps
    package = rows_of(findings, "package-0  powercap")
    assert package["refresh period"]["verdict"] == "as expected"
    assert package["moved by"]["verdict"] == "as expected"
    assert package["wraps"]["seen"].startswith("at 50.00 kJ, ")
    # and the text has all that, within a page's width
    text = check_text(findings)
    assert max(map(len, text.splitlines())) <= 80
    assert "it covers more than the GPU" in " ".join(text.split())


def test_old_drivers_and_lists_of_processes_are_known(nvml_sim: BuildNvml, tmp_path: Path) -> None:
    # given a driver without fields, where PowerUsage is a 1 s average on one board, exponentially
    # smoothed on one of Kepler, and neither on a V100; their lists of processes have another
    # one's, none, and ours
    epoch_ns = time.monotonic_ns()
    gpu = wave_of(tmp_path, "gpu", 60.0)
    bare = {"counter_refresh_s": None}
    boards = (
        Gpu(
            gpu, name="NVIDIA GeForce RTX 4090", sensor=Sensor(**bare), processes=(Process(77, 1),)
        ),
        Gpu(
            gpu,
            name="Tesla K40m",
            sensor=Sensor(0.05, smoothing_s=0.1, power_usage="instant", **bare),
            processes=(),
        ),
        Gpu(
            gpu,
            name="Tesla V100-SXM2-16GB",
            sensor=Sensor(0.02, 0.01, "instant", **bare),
            processes=(Process(4121, 1),),
        ),
    )
    absent = ("nvmlDeviceGetFieldValues",)
    sim = nvml_sim(Scenario(boards, absent=absent, epoch_ns=epoch_ns))
    lanes = opened_for_check(sim.spec)
    everywhere = frozenset(map(default_uuid, range(len(boards))))
    load = AnnouncedLoad(epoch_ns, [(gpu, 60.0, 240.0)], everywhere)
    for _ in range(3):  # on a starved machine some of it cannot be found out
        findings = examine(probe(lanes, {"gpu": load}, load_s=12.0))
        average, kepler, volta = (rows_of(findings, f"gpu:{i}") for i in range(3))
        if "smoothing" in kepler:
            break
    for _, sampler in lanes:
        sampler.stop(1.0)
    # then these are as expected of them
    assert average["averaging window"]["verdict"] == "as expected"
    assert average["averaging window"]["seen"].startswith(("1.0", "0.99", "99"))
    assert kepler["smoothing"]["verdict"] == kepler["lag"]["verdict"] == "as expected"
    assert volta["averaging window"]["verdict"] == volta["lag"]["verdict"] == "as expected"
    lists = [rows["process list"] for rows in (average, kepler, volta)]
    assert [row["verdict"] for row in lists] == ["not as expected"] * 2 + ["as expected"]
    assert "another namespace" in lists[0]["why"] and "--attribution device" in lists[1]["why"]
    # and the budget has the offset of power readings: 5.9 W of each
    assert len(findings["budget"]) == 3
    parts = findings["budget"][2]["u_of_window_s"]
    mean_w = findings["budget"][2]["mean_w"]
    expected = 2 * np.hypot(0.037, 5.9 / mean_w)
    assert parts["100"] == pytest.approx(expected, rel=0.02) and parts["0.1"] > parts["100"]


def test_without_a_gpu_load_what_needs_one_cannot_be_told(
    nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    gpu = wave_of(tmp_path, "gpu", 60.0)
    cpu = wave_of(tmp_path, "cpu", 30.0)
    sim = nvml_sim(Scenario((Gpu(gpu, processes=(Process(77, 1),)),)))
    loads = {
        "cpu": AnnouncedLoad(sim.scenario.epoch_ns, [(cpu, 30.0, 70.0)]),
        "gpu": NoLoad(sim.scenario.epoch_ns, []),
    }
    lanes = opened_for_check(sim.spec)
    findings = examine(probe(lanes, loads, load_s=8.0))
    for _, sampler in lanes:
        sampler.stop(1.0)
    rows = rows_of(findings, "gpu:0")
    assert rows["moved by"]["verdict"] == "cannot be told"
    assert "neither torch nor cupy" in rows["moved by"]["why"]
    assert rows["process list"]["verdict"] == "cannot be told"
    assert any("GPU load: neither torch" in text for text in findings["not_tried"])
    assert any(text.startswith("RAPL") for text in findings["not_tried"])
    assert no_bursts().running_s(np.array([1.0])) == 0


def test_a_gpu_that_is_hidden_from_the_load_is_not_judged(
    nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given two GPUs, of which the load sees the first one only
    epoch_ns = time.monotonic_ns()
    gpu = wave_of(tmp_path, "gpu", 60.0)
    boards = (Gpu(gpu, processes=(Process(4121, 1),)), Gpu(Constant(60.0), processes=()))
    sim = nvml_sim(Scenario(boards, epoch_ns=epoch_ns))

    def rows(gpus: frozenset[str] | None) -> list[dict[str, dict[str, Any]]]:
        load = AnnouncedLoad(epoch_ns, [(gpu, 60.0, 240.0)], gpus)
        lanes = opened_for_check(sim.spec)
        findings = examine(probe(lanes, {"gpu": load}, load_s=8.0))
        for _, sampler in lanes:
            sampler.stop(1.0)
        assert default_uuid(0) not in json.dumps(findings)
        return [rows_of(findings, f"gpu:{i}") for i in range(2)]

    # then what needs a load is unknown of the second one
    seen, hidden = rows(frozenset({default_uuid(0)}))
    assert seen["moved by"]["verdict"] == seen["process list"]["verdict"] == "as expected"
    assert hidden["moved by"]["verdict"] == hidden["process list"]["verdict"] == "cannot be told"
    assert hidden["moved by"]["why"] == "no GPU load: this GPU is hidden from it"
    # and so it is where the load does not know on which GPUs it ran
    seen, unmoved = rows(None)
    assert seen["moved by"]["verdict"] == "as expected"
    assert unmoved["moved by"]["verdict"] == unmoved["process list"]["verdict"] == "cannot be told"


def test_a_gpu_load_reports_on_which_gpus_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = wave_of(tmp_path, "gpu", 60.0)
    monkeypatch.setenv("PYTHONPATH", str(SIM / "fakes"))
    monkeypatch.setenv("PEPR_SIM_GPU", f"{gpu.path} {time.monotonic_ns()} 60 300")
    monkeypatch.syspath_prepend(str(SIM / "fakes"))
    load = ProcessLoad("gpu")
    try:
        load.prepare()
        assert load.problem(30.0) == ""
        load.begin(schedule(time.monotonic_ns(), 0.3))
        time.sleep(0.3)
        ran = load.finish()
    finally:
        load.stop()
    assert (ran.by, ran.gpus) == ("torch", {default_uuid(0)})


# --- the command ----------------------------------------------------------------------------------


@contextmanager
def following_cpu_time(wave: Followed, epoch_ns: int, pid: int) -> Iterator[None]:
    """Within the block, the wave is 30 W and 35 W more for each CPU that children of `pid` use.

    40 ms late: the CPU time of 10 ms, shown 30 ms after.
    """
    ended = threading.Event()

    def cpu_s() -> float:
        total = 0.0
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                with_clock = (
                    ~int(child) << 3
                ) | 2  # CPUCLOCK_SCHED of a process, clock_getcpuclockid
                try:
                    total += time.clock_gettime(with_clock)
                except OSError:
                    continue
        return total

    def work() -> None:
        before_s, before_ns = 0.0, time.monotonic_ns()
        while not ended.wait(0.01):
            try:
                now_s = cpu_s()
            except (OSError, ValueError):
                continue
            now_ns = time.monotonic_ns()
            used = max(0.0, now_s - before_s) / ((now_ns - before_ns) * 1e-9)
            wave.follow([((now_ns - epoch_ns) * 1e-9 + 0.03, 30.0 + 35.0 * min(used, 64.0))])
            before_s, before_ns = now_s, now_ns

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


BRIEFLY = """if True:
    import functools, sys
    from pepr_profiler.check import probe
    from pepr_profiler.commands import main
    probe.probe = functools.partial(probe.probe, load_s=9.0)
    sys.exit(main(sys.argv[1:]))"""
"""The command line, which loads a machine for less time than usual."""


@pytest.mark.parametrize(
    "program",
    [("-c", BRIEFLY), pytest.param(("-m", "pepr_profiler"), marks=pytest.mark.long)],
    ids=["briefly", "as usual"],
)
def test_the_command_loads_the_machine_and_writes_what_it_found(
    cli: Cli,
    nvml_sim: BuildNvml,
    powercap_sim: BuildTree,
    tmp_path: Path,
    program: tuple[str, ...],
) -> None:
    # given a GPU that a simulated torch loads, and RAPL that follows the CPU time of the children
    epoch_ns = time.monotonic_ns()
    gpu, cpu = wave_of(tmp_path, "gpu", 60.0), wave_of(tmp_path, "cpu", 30.0)
    sim = nvml_sim(Scenario((Gpu(gpu),), epoch_ns=epoch_ns))
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", cpu), live=True, epoch_ns=epoch_ns)
    variables = {
        "PYTHONPATH": os.pathsep.join((cli.environment()["PYTHONPATH"], str(SIM / "fakes"))),
        "PEPR_SIM_GPU": f"{gpu.path} {epoch_ns} 60 300",
    }
    path = tmp_path / "hardware.json"
    arguments = ("sensors", "--check", "--sensor", sim.spec, "--sensor", tree.spec, "-o", str(path))
    with (
        cli.start(*arguments, env=variables, program=program) as process,
        following_cpu_time(cpu, epoch_ns, process.pid),
    ):
        out, err = process.communicate(timeout=SLOW_S)
    assert process.returncode == 0, err
    text = out.decode()
    assert "bursts by torch" in text and "processes of Python" in text
    findings = json.loads(path.read_text())
    by_source = {s["source"]: s for s in findings["sensors"]}
    # then the GPU's counter moved with torch, and not with the CPU
    counter = by_source["nvml-energy"]
    assert (counter["covers"], counter["moved_by"]) == ("gpu", ["gpu"])
    assert counter["load_w"]["gpu"]["value"] == pytest.approx(240, rel=0.1)
    assert counter["refresh_s"]["value"] == pytest.approx(0.1, rel=0.02)
    assert by_source["nvml-power-average"]["window_s"]["value"] == pytest.approx(1.0, rel=0.1)
    # and its process is on the driver's list
    assert rows_of(findings, "gpu:0  processes")["process list"]["seen"].endswith("with ours")
    # and RAPL moved with the CPUs, if the machine gave us any
    package = by_source["powercap"]
    if findings["loads"]["cpu"]["cpu_part"] > 0.5:
        assert "cpu" in package["moved_by"]
        full_w = 35.0 * len(os.sched_getaffinity(0))
        assert package["load_w"]["cpu"]["value"] == pytest.approx(full_w, rel=0.25)
    # and the file names no machine, user, path or board, and the driver's version
    written = path.read_text()
    for secret in ("GPU-0000", str(tmp_path), os.environ["HOME"]):
        assert secret not in written
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", written)
    assert re.search(r'"nvidia": "580\.65\.06"', written)
    assert findings["privacy"] in text.replace("\n", " ")
    # and each comparison stands with its sensor
    assert text.count("gpu:0  H100 80GB HBM3  nvml-energy\n") == 1
    assert "against nvml-power-average" in text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("-o", "x.json"), "without --check"),
        (("--check", "-o", "/nowhere/x.json"), "there is no folder /nowhere"),
        (("--check", "-o", "x.html"), "does not end in .json"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    cli: Cli, options: tuple[str, ...], why: str
) -> None:
    result = cli("sensors", "--sensor", "replay:/none", *options)
    assert result.status == 2
    assert why in result.stderr and "fix:" in result.stderr
    assert "loading" not in result.stderr


def test_where_nothing_can_be_read_nothing_is_loaded(cli: Cli) -> None:
    result = cli("sensors", "--check", "--sensor", "powercap:/none")
    assert result.status == 0 and "loading" not in result.stderr
    assert b"no sensor of energy can be read here" in result.stdout
    assert b"GPU sensors: none was found" in result.stdout
    assert b"RAPL: neither perf nor powercap" in result.stdout


def test_an_interrupted_check_leaves_no_load_behind(cli: Cli, meter: str) -> None:
    with ended(cli.start("sensors", "--check", "--sensor", meter)) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = until(lambda: children.read_text().split())
        process.send_signal(signal.SIGINT)
        assert process.wait(SLOW_S) == 130
        # One that was just being started learns from its closed stdin that nobody waits for it.
        until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])


def test_an_error_of_a_library_is_shown_without_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('/home'+'/someone/x.so: wrong ELF class')")
    program = (
        "from pepr_profiler.check.load import ProcessLoad\n"
        "load = ProcessLoad('gpu'); load.prepare(); print(load.problem(60)); load.stop()"
    )
    paths = os.pathsep.join((str(folder), Cli(tmp_path).environment()["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "torch: …: wrong ELF class\n"


def test_a_quota_of_the_container_limits_the_load(tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    file.write_text("100000 100000\n")
    assert cpus_for_us(file) == 1
    file.write_text("max 100000\n")
    assert cpus_for_us(file) == len(os.sched_getaffinity(0))


# --- hardware files -------------------------------------------------------------------------------


def hardware_file(folder: Path, name: str, **sensor: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    figures = {key: {"value": value, "u": 0.0} for key, value in sensor.items()}
    facts = {"device": "NVIDIA Odd 80GB", "source": "nvml-power-instant", **figures}
    path.write_text(json.dumps({"schema": 1, "kind": "pepr-hardware", "sensors": [facts]}))
    return path


RAISES = """if True:
    import struct, sys, time
    time.sleep(1.5)
    with open(sys.argv[1], "ab") as wave:
        wave.write(struct.pack("dd", (time.monotonic_ns() - int(sys.argv[2])) * 1e-9, 400.0))
    time.sleep(1)"""
"""A program that raises the power of a wave in its midst."""


def test_a_file_in_the_users_folder_is_what_is_known_of_a_board(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given a board whose readings are 0.3 s old, and power that a program raises from 100 to 400 W
    sensor = Sensor(power_usage="instant", counter_refresh_s=None, delay_s=0.3, window_s=0.1)
    config = tmp_path / "config"
    env = {"XDG_CONFIG_HOME": str(config)}

    def measure() -> tuple[dict[str, Any], float]:
        epoch_ns = time.monotonic_ns()
        wave = wave_of(tmp_path, f"wave-{epoch_ns}", 100.0)
        sim = nvml_sim(
            Scenario((Gpu(wave, name="NVIDIA Odd 80GB", sensor=sensor),), epoch_ns=epoch_ns)
        )
        _, summary = cli.measure(
            "--sensor", sim.spec, "--", *python(RAISES, str(wave.path), str(epoch_ns)), env=env
        )
        begin_ns, end_ns = summary["recording"]["window_ns"]
        return component(summary, f"gpu:{default_uuid(0)}"), sim.scenario.energy_j(begin_ns, end_ns)

    unknown, truth_j = measure()
    assert "stated_by" not in unknown
    late_j = unknown["device_j"] - truth_j
    # when a file says so
    hardware_file(
        config / "pepr-profiler/hardware", "odd.json", refresh_s=0.1, window_s=0.1, lag_s=0.35
    )
    known, truth_j = measure()
    # then the energy is right, and the summary names the file
    assert known["stated_by"] == "odd.json"
    assert abs(known["device_j"] - truth_j) < 0.35 * abs(late_j)
    # and a file that is damaged is named in a warning
    (config / "pepr-profiler/hardware/bad.json").write_text('{"schema": 1}')
    result = cli("report", "last", "--json", "-", env=env)
    warnings = {w["code"]: w["text"] for w in json.loads(result.stdout)["warnings"]}
    assert "bad.json is not used: it has no kind" in warnings["hardware-file"]


def test_a_file_says_that_a_counter_is_the_modules(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given a GPU of 100 W whose counter counts 300 W of its module, which nothing else shows
    name = "NVIDIA Odd 80GB"
    sim = nvml_sim(Scenario((Gpu(Constant(100), name=name, counted=Constant(300)),)))
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    def components() -> dict[str, dict[str, Any]]:
        arguments = ("--sensor", sim.spec, "--", *python("import time; time.sleep(1.5)"))
        _, summary = cli.measure(*arguments, env=env)
        return {c["label"]: c for c in summary["energy"]["components"]}

    # then without a file it is taken for the GPU's, and a model of the CPU is added
    found = components()
    assert found["gpu:0  Odd 80GB"]["mean_w"] == pytest.approx(300, rel=0.05)
    assert found["modelled"]["in_total"]
    # and with one it is the module's: nothing is added to it, and the GPU is shown apart
    facts = {"device": name, "source": "nvml-energy", "covers": "module"}
    folder = tmp_path / "config/pepr-profiler/hardware"
    folder.mkdir(parents=True)
    text = json.dumps({"schema": 1, "kind": "pepr-hardware", "sensors": [facts]})
    (folder / "odd.json").write_text(text)
    found = components()
    module = found["gpu:0  Odd 80GB, whole module"]
    assert module["mean_w"] == pytest.approx(300, rel=0.05)
    assert module["stated_by"] == "odd.json" and "modelled" not in found
    assert found["gpu:0  Odd 80GB"]["mean_w"] == pytest.approx(100, rel=0.05)
    assert not found["gpu:0  Odd 80GB"]["in_total"]


@pytest.mark.parametrize("via", [None, "daemon"])
def test_what_a_file_says_of_rapl_is_of_this_cpu_and_its_domain(
    cli: Cli, powercap_sim: BuildTree, tmp_path: Path, via: str | None
) -> None:
    # given what a check found of the packages of this machine's CPU, read directly or not
    tree = powercap_sim(
        Zone("intel-rapl:0", "package-0", Constant(50.0)),
        Zone("intel-rapl:0:0", "dram", Constant(5.0)),
        live=True,
    )
    facts = {
        "device": read_cpu_identity().name or "",
        "source": "powercap",
        "domain": "package",
        "via": via,
        "refresh_s": {"value": 0.001, "u": 0.0},
    }
    folder = tmp_path / "config/pepr-profiler/hardware"
    folder.mkdir(parents=True)
    text = json.dumps({"schema": 1, "kind": "pepr-hardware", "sensors": [facts]})
    (folder / "cpu.json").write_text(text)
    # then the package is known by that file, unless a daemon stood between, and the memory is not
    _, summary = cli.measure(
        *("--sensor", tree.spec, "--", *python("import time; time.sleep(0.5)")),
        env={"XDG_CONFIG_HOME": str(tmp_path / "config")},
    )
    stated_by = {c["id"]: c.get("stated_by") for c in summary["energy"]["components"]}
    assert stated_by["cpu:package-0"] == (None if via else "cpu.json")
    assert stated_by["dram:package-0/dram"] is None


def test_the_users_file_comes_before_the_packages(tmp_path: Path) -> None:
    hardware_file(tmp_path / "ours", "a.json", refresh_s=0.1)
    hardware_file(tmp_path / "theirs", "b.json", refresh_s=0.2, lag_s=99.0)
    ours = read_hardware((tmp_path / "ours", tmp_path / "theirs", tmp_path / "none"))
    known = ours.by_name["NVIDIA Odd 80GB", "nvml-power-instant", ""]
    assert (known.file, known.refresh_s, known.lag_s) == ("a.json", 0.1, None)
    # and a lag that no sensor has is none
    theirs = read_hardware((tmp_path / "theirs",))
    known = theirs.by_name["NVIDIA Odd 80GB", "nvml-power-instant", ""]
    assert (known.refresh_s, known.lag_s) == (0.2, None)
    assert read_hardware().problems == ()


@pytest.mark.gpu
def test_a_real_gpu_is_checked(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    result = cli("sensors", "--check", "-o", str(path))
    assert result.status == 0, result.stderr
    print(result.stdout.decode())
    findings = json.loads(path.read_text())
    boards = [s for s in findings["sensors"] if s["source"].startswith("nvml-")]
    if not boards:
        pytest.skip("no NVIDIA GPU")
    if findings["loads"]["gpu"]["problem"]:
        pytest.skip(findings["loads"]["gpu"]["problem"])
    counters = [s for s in boards if s["counter"]]
    assert all("gpu" in s["moved_by"] for s in counters)
    assert all(s["refresh_s"]["value"] for s in counters)
