"""Shares of a device's energy add up to it, whoever was busy."""

from __future__ import annotations

import numpy as np
import pytest

from pepr_profiler.attribution import Activity, modelled_curves, read_activity, share
from pepr_profiler.curve import Curve
from pepr_profiler.modelled import CpuModel, RamModel
from pepr_profiler.sources import Source
from pepr_profiler.trace import Batch, Channel, Lane

S = 1_000_000_000
GB = 2**30


def activity(
    seconds: int, *, job: list[float], busy: list[float], cpus: int = 4, rss_bytes: float = 0.0
) -> Activity:
    """Ten samples a second; `job` and `busy` give CPU seconds a second, second by second."""
    t_ns = np.arange(0, seconds * 10 + 1) * (S / 10)
    rates = np.array([job, busy]).repeat(10, axis=1) / 10
    cumulated = np.concatenate((np.zeros((2, 1)), np.cumsum(rates, axis=1)), axis=1)
    rss = np.full(len(t_ns), rss_bytes)
    return Activity(t_ns, cumulated[0], cumulated[1], rss, cpus, 16.0 * GB)


def device(watts: float, seconds: int, *, kind: str = "cpu") -> tuple[Curve, np.ndarray]:
    at_ns = (np.arange(0, seconds * 4 + 1) * (S // 4)).astype(np.int64)
    source = Source(f"{kind}:x", kind, "x", "lane", 0, "test", counter=True)
    return Curve(source, watts * at_ns / S, 0, int(at_ns[-1])), at_ns


def test_energy_is_shared_by_busy_time_second_by_second() -> None:
    # given 100 W for 4 s: the job alone, half of the load, nobody, others alone
    did = activity(4, job=[2.0, 1.0, 0.0, 0.0], busy=[2.0, 2.0, 0.0, 3.0])
    curve, at_ns = device(100.0, 4)
    shares = share(curve, at_ns, did)
    # then job 100 + 50, idle 100, others 50 + 100
    assert shares.job_j[-1] == pytest.approx(150.0)
    assert shares.idle_j[-1] == pytest.approx(100.0)
    assert shares.others_j[-1] == pytest.approx(150.0)


def test_shares_add_up_at_every_instant() -> None:
    random = np.random.default_rng(3)
    busy = random.uniform(0, 4, 30)
    did = activity(30, job=list(busy * random.uniform(0, 1, 30)), busy=list(busy))
    curve, at_ns = device(73.0, 30)
    shares = share(curve, at_ns, did)
    total = shares.job_j + shares.others_j + shares.idle_j
    assert total == pytest.approx(curve.energy_j, rel=1e-12)
    assert (np.diff(shares.job_j) >= 0).all()


def test_a_machine_whose_ticks_lag_is_as_busy_as_the_job() -> None:
    # given a job clock of 1.03 s where the machine's ticks only show 1.00 s
    curve, at_ns = device(100.0, 2)
    shares = share(curve, at_ns, activity(2, job=[1.03, 1.03], busy=[1.0, 1.0]))
    assert shares.job_j[-1] == pytest.approx(200.0)
    assert shares.others_j[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_gpu_is_the_jobs_own() -> None:
    curve, at_ns = device(300.0, 3, kind="gpu")
    shares = share(curve, at_ns, activity(3, job=[0, 0, 0], busy=[4, 4, 4]))
    assert shares.job_j[-1] == pytest.approx(900.0)


def test_what_others_caused_widens_the_uncertainty() -> None:
    curve, at_ns = device(100.0, 2)
    alone = share(curve, at_ns, activity(2, job=[1, 1], busy=[1, 1]))
    crowded = share(curve, at_ns, activity(2, job=[1, 1], busy=[4, 4]))
    assert alone.u_rel == pytest.approx(0.0, abs=1e-12)
    assert crowded.u_rel == pytest.approx(0.075)


def test_modelled_power_follows_the_load() -> None:
    # given 4 CPUs at 25 %, then 100 %, on a machine of 10 W idle and 50 W full, 16 GB at 0.375 W/GB
    did = activity(2, job=[1.0, 4.0], busy=[1.0, 4.0], rss_bytes=4.0 * GB)
    model = CpuModel(idle_w=10, max_w=50, u_rel=0.5, source="test", description="test")
    at_ns = np.array([0, S, 2 * S])
    cpu, ram = modelled_curves(did, at_ns, cpu=model, ram=RamModel(w_per_gb=0.375))
    # then 20 J and 50 J of CPU, 6 J a second of memory, and k = 2 of 50 % is 25 % of k = 1
    assert np.diff(cpu.energy_j) == pytest.approx([20.0, 50.0])
    assert np.diff(ram.energy_j) == pytest.approx([6.0, 6.0])
    assert cpu.source.gain == pytest.approx(0.25)
    assert {cpu.source.provenance, ram.source.provenance} == {"modelled"}
    # and the job, resident in a quarter of the memory, has a quarter of its energy
    shares = share(ram, at_ns, did)
    assert shares.job_j[-1] == pytest.approx(3.0)
    assert shares.idle_j[-1] == pytest.approx(9.0)


def test_a_run_shorter_than_a_sample_period_still_has_a_model() -> None:
    # given two samples 40 ms apart, and a window inside
    did = Activity(
        np.array([0.0, 0.04 * S]), np.array([0, 0.04]), np.array([0, 0.04]), np.zeros(2), 1, GB
    )
    model = CpuModel(idle_w=10, max_w=50, u_rel=0.5, source="test", description="test")
    at_ns = np.array([0.01 * S, 0.03 * S]).astype(np.int64)
    cpu, _ = modelled_curves(did, at_ns, cpu=model, ram=RamModel())
    assert np.diff(cpu.energy_j) == pytest.approx([1.0])


def test_rows_with_an_unknown_number_are_left_out_of_the_activity() -> None:
    names = [("job/cpu", "s"), ("job/rss", "B"), ("job/processes", "1"), ("system/busy", "s")]
    labels = {"system/busy": {"cpus": "8"}, "job/rss": {"installed_bytes": str(GB)}}
    channels = tuple(Channel(n, "x", u, labels=labels.get(n, {})) for n, u in names)
    values = np.array([[0, 1, 2.0], [5, 7, 6.0], [1, 1, 1.0], [0, np.nan, 3.0]])
    rows = Batch(np.array([0, 1, 2]) * S, np.zeros(3, np.int64), values)
    did = read_activity(Lane("processes", "processes:self", S, channels), [rows])
    assert did is not None
    assert did.job_cpu_s.tolist() == [0.0, 2.0]
    assert (did.cpus, did.peak_rss_bytes) == (8, 6)
