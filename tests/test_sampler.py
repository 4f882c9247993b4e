"""The sampling thread as Python sees it: it owes the interpreter nothing."""

from __future__ import annotations

import os
import threading
import time
from array import array
from pathlib import Path

import pytest

from pepr_profiler import _core

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
    begin_ns = time.monotonic_ns()
    sum(range(30_000_000))  # one call in C: no other Python thread runs meanwhile
    end_ns = time.monotonic_ns()
    assert sampler.stop(10)

    during = sum(begin_ns < t_ns < end_ns for t_ns in times_of(sampler))
    assert end_ns - begin_ns > 100 * MS
    assert during > 0.5 * (end_ns - begin_ns) / MS  # all of them, on a quiet machine


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
