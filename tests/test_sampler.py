"""The sampling thread as Python sees it: it owes the interpreter nothing."""

from __future__ import annotations

import itertools
import os
import threading
import time
from array import array
from pathlib import Path

import pytest
from cli import until
from sim.nvml import H100, BuildNvml, Gpu, Scenario
from sim.waves import Constant
from studies import invoke

from pepr_profiler import _core, profile
from pepr_profiler.commands.run import run
from pepr_profiler.errors import UsageError

CHANNEL = "channel\tx\tpower\tW\t1\t0\tgauge\treplay\n"
MS = 1_000_000


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "steady").write_text(f"{CHANNEL}0\t1\n")
    return f"replay:{tmp_path / 'steady'}"


def times_of(sampler: _core.Sampler) -> list[int]:
    t_ns = array("q")
    while (batch := sampler.read()) is not None:
        t_ns.frombytes(batch[1])
    return list(t_ns)


def test_the_clock_is_that_of_time_monotonic() -> None:
    before_ns = time.monotonic_ns()
    now_ns = _core.now_ns()
    assert before_ns <= now_ns <= time.monotonic_ns()


def test_sampling_goes_on_while_python_never_releases_the_gil(spec: str) -> None:
    sampler = _core.Sampler(spec, MS)
    assert sampler.wait_ready(10)

    def rows_read() -> int:
        """During one call in C: no Python thread runs beside it."""
        begin_ns = time.monotonic_ns()
        sum(range(30_000_000))
        end_ns = time.monotonic_ns()
        assert (end_ns - begin_ns) / MS > 100
        return sum(begin_ns < t_ns < end_ns for t_ns in times_of(sampler))

    # One a millisecond on a quiet machine, and fewer where others keep the cores; a thread that
    # needs the lock has none, however often.
    until(lambda: rows_read() > 10)
    assert sampler.stop(10)


def test_waiting_for_a_driver_lets_other_threads_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "driver")  # a driver that hangs until someone writes
    sampler = _core.Sampler(f"replay:{tmp_path / 'driver'}", MS)
    writer = threading.Thread(target=(tmp_path / "driver").write_text, args=(f"{CHANNEL}0\t1\n",))
    assert not sampler.wait_ready(0.01)
    assert sampler.state == "opening"
    writer.start()
    assert sampler.wait_ready(10)
    writer.join()
    assert sampler.state == "running"
    assert sampler.stop(10)


def test_a_reader_that_comes_late_gets_everything_in_batches(spec: str) -> None:
    sampler = _core.Sampler(spec, 20_000)  # 50 kHz, as fast as it can
    assert sampler.wait_ready(10)
    deadline_s = time.monotonic() + 20
    while sampler.stats()["samples"] < 5000 and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert sampler.stop(10)

    sizes = []
    while (batch := sampler.read()) is not None:
        n, t_ns, read_ns, columns = batch
        assert len(t_ns) == 8 * n and len(read_ns) == 4 * n
        assert [len(column) for column in columns] == [8 * n]
        sizes.append(n)
    stats = sampler.stats()
    assert len(sizes) > 1  # more than one batch holds
    assert sum(sizes) == stats["samples"] >= 5000
    assert stats["lost"] == 0


def test_lanes_are_independent(spec: str) -> None:
    fast, slow = _core.Sampler(spec, MS), _core.Sampler(spec, 3600 * 10**9)
    assert fast.wait_ready(10) and slow.wait_ready(10)
    assert slow.stop(10)
    before = fast.stats()["samples"]
    while fast.stats()["samples"] < before + 10:
        time.sleep(0.001)
    assert fast.stop(10)

    assert len(times_of(slow)) == 2
    assert len(times_of(fast)) >= 12


# --- cadence and budget; the rest is in tests/core, in virtual time -------------------------------


def repeated(sampler: _core.Sampler) -> list[bool]:
    """For each row but the first, whether its first channel reads as in the row before."""
    values = array("d")
    while (batch := sampler.read()) is not None:
        values.frombytes(batch[3][0])
    return [a == b for a, b in itertools.pairwise(values)]


def test_a_lane_that_learns_wastes_few_reads_and_one_that_does_not_most(
    nvml_sim: BuildNvml,
) -> None:
    # given an energy counter that is refreshed every 100 ms
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(300.0), sensor=H100),)))
    learning, fixed = _core.Sampler(sim.spec, 10 * MS, learn=True), _core.Sampler(sim.spec, MS)
    assert learning.wait_ready(10) and fixed.wait_ready(10)
    deadline_s = time.monotonic() + 30
    while learning.stats()["settled"] < 40 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert learning.stop(10) and fixed.stop(10)
    stats = learning.stats()
    assert stats["refresh_s"] == pytest.approx(0.1, rel=0.05)
    assert stats["wasted"] / stats["settled"] <= 0.30
    # then the rows say the same as the lane does of itself
    assert sum(repeated(learning)[-30:]) <= 0.4 * 30
    same = repeated(fixed)
    assert sum(same) > 0.5 * len(same)  # 0.99 where the machine is ours


def test_a_budget_is_kept_by_reading_less_often(spec: str) -> None:
    # given a lane that would take far more than a thousandth of a core
    budget = _core.CpuBudget(0.001)
    sampler = _core.Sampler(spec, 200_000, budget=budget)
    assert sampler.wait_ready(10)
    deadline_s = time.monotonic() + 30
    while not sampler.stats()["gap_s"] and time.monotonic() < deadline_s:
        time.sleep(0.01)
    gap_s = sampler.stats()["gap_s"]
    assert sampler.stop(10)
    assert 0.0002 < gap_s <= 0.8


def test_the_summary_says_what_reading_cost_and_wasted(tmp_path: Path) -> None:
    ramp = "".join(f"{0.05 * n:.2f}\t{n}\n" for n in range(100))
    (tmp_path / "ramp").write_text(f"channel\tx/energy\tenergy\tJ\t1\t0\tcounter\treplay\n{ramp}")
    with profile("x", store=tmp_path, sensors=[f"replay:{tmp_path / 'ramp'}"], overhead=0.2) as p:
        deadline_s = time.monotonic() + 1.5
        while time.monotonic() < deadline_s:
            time.sleep(0.01)
    sampler = p.summary["sampler"]
    assert 0.045 < sampler["refresh_s"]["replay"] < 0.1  # longer where reads come late
    assert sampler["refresh_s"]["processes"] is None
    assert 0 <= sampler["wasted"]["replay"] < 0.5
    overhead = sampler["overhead"]
    assert overhead["budget"] == 0.2
    assert 0 < overhead["used"] < 0.2
    assert sampler["rate_hz"]["replay"] > 5


@pytest.mark.parametrize("overhead", [0.0, -1.0, 1.5, float("nan")])
def test_an_impossible_overhead_is_refused(overhead: float) -> None:
    with pytest.raises(UsageError, match="overhead"):
        profile("x", overhead=overhead)


@pytest.mark.parametrize("text", ["0", "0%", "101%", "much", "", "%"])
def test_an_impossible_overhead_is_refused_before_the_command_starts(text: str) -> None:
    done = invoke(run, "--overhead", text, "--", "true")
    assert isinstance(done.exception, UsageError)
    assert "overhead" in str(done.exception)
