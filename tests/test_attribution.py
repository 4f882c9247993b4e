"""Shares of a device's energy add up to it, whoever was busy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sim import virtual

from pepr_profiler.energy.activity import Activity, DeviceUse, cpu_use, read_activity
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers, OtherProcess
from pepr_profiler.energy.gpus import Gpus
from pepr_profiler.energy.modelled import CpuModel, RamModel, modelled_curves
from pepr_profiler.energy.sharing import Shares, certain_shares, lowest_power_w, share
from pepr_profiler.energy.sources import Source
from pepr_profiler.summary.doubts import shared_cpu, shared_gpus
from pepr_profiler.trace.lane import Batch, Channel, LaneInfo
from pepr_profiler.units import NS_PER_S as S

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


def device(watts: float, seconds: int, *, kind: str = "cpu") -> tuple[EnergyCurve, np.ndarray]:
    at_ns = (np.arange(0, seconds * 4 + 1) * (S // 4)).astype(np.int64)
    source = Source(f"{kind}:x", kind, "x", "lane", 0, "test", counter=True)
    return EnergyCurve(source, watts * at_ns / S, 0, int(at_ns[-1])), at_ns


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
    # and the job, which was alone and kept a CPU or more busy, has all of it
    shares = share(ram, at_ns, did)
    assert shares.job_j[-1] == pytest.approx(12.0)


@pytest.mark.parametrize("rss_bytes", [0.0, 4.0 * GB])
def test_estimated_memory_is_shared_by_cpu_time_as_measured_memory_is(rss_bytes: float) -> None:
    # given 6 W for 2 s, a job of 0.1 CPU s a second and others of 0.3, on 4 CPUs
    did = activity(2, job=[0.1, 0.1], busy=[0.4, 0.4], rss_bytes=rss_bytes)
    model = CpuModel(idle_w=10, max_w=50, u_rel=0.5, source="test", description="test")
    at_ns = np.array([0, S, 2 * S])
    _, ram = modelled_curves(did, at_ns, cpu=model, ram=RamModel(w_per_gb=0.375))
    shares = share(ram, at_ns, did)
    # then a constant draw is all idle draw: used 0.4 of the time, 1 : 3, and else nobody's
    assert shares.job_j[-1] == pytest.approx(12.0 * 0.4 / 4)
    assert shares.others_j[-1] == pytest.approx(12.0 * 0.4 * 3 / 4)
    assert shares.idle_j[-1] == pytest.approx(12.0 * 0.6)
    # and so is the energy of a sensor that shows the same
    sensor = ram._replace(source=ram.source._replace(id="dram:package-0", provenance="measured"))
    measured = share(sensor, at_ns, did)
    for ours, theirs in zip(shares[:3], measured[:3], strict=True):
        assert ours == pytest.approx(theirs)


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
    did = read_activity(LaneInfo("processes", "processes:self", S, channels), [rows])
    assert did is not None
    assert did.job_cpu_s.tolist() == [0.0, 2.0]
    assert (did.cpus, did.peak_rss_bytes) == (8, 6)


# --- one rule for every device ----------------------------------------------------------------


def uses(random: np.random.Generator, owners: int, intervals: int) -> list[DeviceUse]:
    """What several jobs on one device see of it, each of itself and the rest."""
    edges = np.sort(random.uniform(0, 30 * S, intervals + 1))
    of = random.uniform(0, 0.6, (owners, intervals)) * (random.random((owners, intervals)) < 0.6)
    held = random.uniform(0, 1, (owners, intervals))
    held /= np.maximum(held.sum(axis=0), 1.0)
    return [
        DeviceUse(edges, of[i], of.sum(axis=0) - of[i], held[i], held.sum(axis=0) - held[i])
        for i in range(owners)
    ]


def shares_of(curve: EnergyCurve, at_ns: np.ndarray, use: DeviceUse, *, idle_w: float) -> Shares:
    seen = GpuUsers(use, 0, 0, 1.0, 1.0, 0.0, "", (), None, 0.5, 0, 2)
    return share(curve, at_ns, None, seen, idle_w=idle_w)


@pytest.mark.parametrize("seed", range(20))
def test_the_shares_of_all_jobs_and_idle_make_the_device_whatever_happens(seed: int) -> None:
    # given three jobs that share a device at random, each with a profiler of its own
    random = np.random.default_rng(seed)
    curve, at_ns = device(100.0, 30, kind="gpu")
    energy_j = np.concatenate(([0.0], np.cumsum(random.exponential(20.0, len(at_ns) - 1))))
    curve = curve._replace(energy_j=energy_j)
    jobs = uses(random, owners=3, intervals=int(random.integers(1, 90)))
    each = [shares_of(curve, at_ns, use, idle_w=random.uniform(0, 120)) for use in jobs[:1]]
    idle_w = each[0].idle_w or 0.0
    each += [shares_of(curve, at_ns, use, idle_w=idle_w) for use in jobs[1:]]
    for one in each:
        # then each one's view is whole at every instant, and nobody's part ever shrinks
        whole_j = one.job_j + one.others_j + one.idle_j
        assert whole_j == pytest.approx(energy_j, rel=1e-9, abs=1e-9)
        for part in (one.job_j, one.others_j, one.idle_j):
            assert np.diff(part).min() > -1e-9
        # and they agree on what was nobody's
        assert one.idle_j == pytest.approx(each[0].idle_j, rel=1e-6, abs=1e-6)
    # and together they have what is not idle
    jobs_j = sum(one.job_j[-1] for one in each)
    assert jobs_j + each[0].idle_j[-1] == pytest.approx(energy_j[-1], rel=1e-9)


def test_the_idle_draw_is_nobodys_for_as_long_as_nobody_works() -> None:
    # given 50 W idle; for 4 s each: the job busy on one of four CPUs at 80 W; a daemon that takes
    # 2 % of a CPU at 50 W
    did = activity(8, job=[1.0] * 4 + [0.0] * 4, busy=[1.0] * 4 + [0.02] * 4)
    curve, at_ns = device(80.0, 8)
    curve = curve._replace(energy_j=np.interp(at_ns, [0, 4 * S, 8 * S], [0.0, 320.0, 520.0]))
    shares = share(curve, at_ns, did)
    assert shares.idle_w == pytest.approx(50.0)
    assert shares.job_j[-1] == pytest.approx(320.0)
    assert shares.job_idle_j == pytest.approx(200.0)
    assert shares.others_j[-1] == pytest.approx(200.0 * 0.02)
    assert shares.idle_j[-1] == pytest.approx(200.0 * 0.98)


def test_above_the_idle_draw_use_decides_and_below_it_presence_too() -> None:
    # given a GPU at 260 W, 60 W of it idle draw, where the job uses 0.1 and another 0.3 of it
    use = DeviceUse(np.array([0.0, 4.0 * S]), *(np.array([x]) for x in (0.1, 0.3, 0.5, 0.5)))
    curve, at_ns = device(260.0, 4, kind="gpu")
    shares = shares_of(curve, at_ns, use, idle_w=60.0)
    # then 200 W by use, and 60 W by use for 0.4 of the time, by halves for the rest
    job_w = 200 / 4 + 60 * (0.4 / 4 + 0.6 / 2)
    assert shares.job_j[-1] == pytest.approx(4 * job_w)
    assert shares.others_j[-1] == pytest.approx(4 * (260 - job_w))


def test_a_counter_that_stands_still_is_no_idle_draw() -> None:
    curve, at_ns = device(100.0, 6)
    stalled = np.interp(at_ns, [0, 2 * S, 4 * S, 6 * S], [0, 200, 200, 500])
    assert lowest_power_w(curve._replace(energy_j=stalled), at_ns) == pytest.approx(100.0)
    assert lowest_power_w(curve._replace(first_ns=-1), at_ns) is None


# --- who else was here ------------------------------------------------------------------------


def look(*processes: tuple[int, float], profiler_s: float = 0.0) -> dict[str, Any]:
    listed = [{"pid": p, "cpu_s": s, "command": f"run {p}", "user": "ann"} for p, s in processes]
    times = {"t_ns": 10 * S, "since_ns": 0, "profiler_s": profiler_s}
    return {"event": "cpu", **times, "processes": listed}


def test_others_on_the_cpu_are_named_with_their_part_of_its_use() -> None:
    # given 10 s of two busy CPUs: the job 10 s, two others 5 s and 2 s, the rest unseen
    did = activity(10, job=[1.0] * 10, busy=[2.0] * 10)
    (warning,) = shared_cpu([look((8, 5.0), (9, 2.0))], did, 0.5, 0, 10 * S)
    assert warning["code"] == "shared-device"
    assert "50% of the CPU time" in warning["text"]
    assert "PID 8 run 8 (25%), PID 9 run 9 (10%)" in warning["text"]
    assert "came and went (15%)" in warning["text"]


def test_a_few_are_named_and_the_rest_counted() -> None:
    did = activity(10, job=[1.0] * 10, busy=[2.0] * 10)
    (warning,) = shared_cpu([look(*((p, 2.0) for p in range(5)))], did, 0.5, 0, 10 * S)
    assert warning["text"].count("PID") == 3 and warning["text"].endswith(" and 2 more")


def test_the_profiler_is_nobody_to_be_warned_of() -> None:
    did = activity(10, job=[1.0] * 10, busy=[1.3] * 10)
    assert list(shared_cpu([look(profiler_s=2.8)], did, 0.23, 0, 10 * S)) == []
    assert list(shared_cpu([look(profiler_s=0.0)], did, 0.23, 0, 10 * S)) != []
    assert list(shared_cpu([look()], did, 0.04, 0, 10 * S)) == []  # 4 % of the energy
    assert list(shared_cpu([], did, 0.5, 0, 10 * S)) == []  # nobody has looked


BOARD = Channel(
    "GPU-1/energy", "energy", "J", source="nvml-energy",
    labels={"uuid": "GPU-1", "index": "0", "model": "H100"},
)  # fmt: skip


def gpus(of: GpuUsers, **more: Any) -> Gpus:
    facts = {"root": "children", "cuda": [{}], **more}
    return Gpus.of(facts, [BOARD], {"GPU-1": of}, busy=[])


def seen(*, job_s: float, others_s: float = 0.0, unknown_s: float = 0.0, last_s: float = 60) -> Any:
    use = DeviceUse(np.array([0.0, 60.0 * S]), *(np.array([x]) for x in (0.5, 0.5, 0.5, 0.5)))
    others = tuple(OtherProcess(p, "train.py", "ann", others_s, 0.2) for p in range(5))[
        : int(others_s)
    ]
    last_ns = int(last_s * S)
    return GpuUsers(use, 0, last_ns, job_s, others_s, unknown_s, "why", others, None, 0.5, 0, 120)


@pytest.mark.parametrize(
    ("of", "warned"),
    [
        (seen(job_s=60.0), []),
        (seen(job_s=60.0, others_s=2.9), []),  # less than 5 % of 60 s
        (seen(job_s=60.0, others_s=3.1), ["shared-device"]),
        (seen(job_s=60.0, unknown_s=2.9), []),
        (seen(job_s=60.0, unknown_s=3.1), ["whole-device"]),
        (seen(job_s=60.0, last_s=54.0), ["processes-gap"]),
        (seen(job_s=60.0, last_s=56.0), []),
    ],
)
def test_a_gpu_is_warned_of_when_it_matters(of: GpuUsers, warned: list[str]) -> None:
    curve, _ = device(100.0, 60, kind="gpu")
    curve = curve._replace(source=curve.source._replace(id="gpu:GPU-1"))
    assert [w["code"] for w in shared_gpus(gpus(of), [curve], 0, 60 * S)] == warned


def test_a_recording_that_never_listed_processes_stays_as_it_was() -> None:
    # given a trace from before there were lists: no facts about the root, no lane
    old = Gpus.of({}, [BOARD], {}, busy=["GPU-1"])
    curve, _ = device(100.0, 60, kind="gpu")
    curve = curve._replace(source=curve.source._replace(id="gpu:GPU-1"))
    assert old.without_unused(curve) is curve and old.users_of(curve) is None
    assert list(shared_gpus(old, [curve], 0, 60 * S)) == []


def test_what_is_certain_is_less_than_any_idle_draw_gives_and_no_more_can_be_said() -> None:
    random = np.random.default_rng(11)
    at_ns = np.arange(0, 21, dtype=np.int64) * S
    parts = random.dirichlet([0.4, 0.4, 0.4], size=20).T  # of the job, of others, of nobody
    use = DeviceUse(
        at_ns.astype(float), 3 * random.random(20), 3 * random.random(20), parts[0], parts[1]
    )
    use.job[4] = use.others[4] = use.others[7] = 0.0
    certain = certain_shares(use, at_ns)
    # the rule, by hand: of the idle draw the job has its part of the use while the device is in
    # use and what it holds in the rest; of all above, its part of the use
    for second in range(20):
        used = use.job[second] + use.others[second]
        of_use = use.job[second] / used if used else use.job_presence[second]
        in_use = min(used, 1.0)
        of_draw = in_use * of_use + (1 - in_use) * use.job_presence[second]
        drawn = [(1 - idle) * of_use + idle * of_draw for idle in np.linspace(0, 1, 101)]
        assert certain[second] == pytest.approx(min(drawn))
    # of CPU time: the part of what was used, or of the time where less than one CPU was in use
    did = activity(4, job=[2.0, 0.3, 0.0, 0.5], busy=[4.0, 0.6, 0.0, 1.0])
    seconds = np.arange(0, 5, dtype=np.int64) * S
    assert certain_shares(cpu_use(did, 0, 4 * S), seconds) == pytest.approx([0.5, 0.3, 0.0, 0.5])


@pytest.mark.parametrize(("idle_w", "busy_w"), [(60.0, 400.0), (60.0, 90.0), (300.0, 300.0)])
def test_who_comes_and_goes_between_reads_has_no_more_and_no_less(
    idle_w: float, busy_w: float
) -> None:
    random = np.random.default_rng(5)
    job_j, u_j, truth_j = np.array(
        [virtual.visit(random, idle_w=idle_w, busy_w=busy_w) for _ in range(300)]
    ).T
    # then the mean error is nothing, and u covers what is seen late
    assert np.sum(job_j) == pytest.approx(np.sum(truth_j), rel=0.01)
    assert np.mean(np.abs(job_j - truth_j) <= u_j) >= 0.93


# --- phases shorter than a second -----------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("ticks", [False, True])
def test_phases_share_the_cpu_as_their_cpu_time_says(seconds: float, ticks: bool) -> None:
    # given a job that computes on 5.9 CPUs and sleeps in turn, and rows each 0.1 s in any phase
    random = np.random.default_rng([6, round(10 * seconds), ticks])
    parts, inside = [], []
    for _ in range(200):
        edges_s = np.arange(0.0, 10.0, seconds) + random.uniform(0.5, 0.6)
        busy = np.arange(len(edges_s)) % 2 == 0
        rows_s = np.arange(0.0, 12.0, 0.1) + random.uniform(0, 1e-3, 120)
        job_s = np.append(0.0, np.cumsum(np.where(busy[:-1], 5.9, 0.016) * np.diff(edges_s)))
        used_s = np.interp(rows_s, edges_s, job_s)
        all_s = used_s + 0.05 * rows_s
        if ticks:
            all_s = np.floor(all_s / 0.01) * 0.01
        did = Activity(rows_s * S, used_s, all_s, np.zeros(120), 8, 16.0 * GB)
        # when a package of 300 W, 60 W of them idle, is shared
        at_ns = np.round(np.union1d(edges_s, np.arange(0.7, 9.0, 0.05)) * S).astype(np.int64)
        phase = np.searchsorted(edges_s, at_ns[1:] / S - 1e-6) - 1
        power_w = np.where(busy[np.clip(phase, 0, None)], 300.0, 60.0)
        joules = np.append(0.0, np.cumsum(power_w * np.diff(at_ns / S)))
        source = Source("cpu:x", "cpu", "x", "lane", 0, "test", counter=True)
        curve = EnergyCurve(source, joules, int(at_ns[0]), int(at_ns[-1]))
        shares = share(curve, at_ns, did, idle_w=60.0, by_rows=True)
        edges = np.searchsorted(at_ns, np.round(edges_s * S).astype(np.int64))
        phases_j = np.diff(shares.job_j[edges])
        # then each phase that computes has its part of what the job has
        middle = slice(2, -2)
        parts.append(phases_j[busy[:-1]][middle] / (300.0 * seconds * 5.9 / 5.95))
        inside.append(np.abs(phases_j[~busy[:-1]][middle]) <= 0.05 * 300.0 * seconds)
    assert np.quantile(np.abs(np.concatenate(parts) - 1), 0.95) <= 0.05
    assert np.mean(np.concatenate(inside)) >= 0.95
