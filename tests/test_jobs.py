"""Recordings of one job put together: each device's time counts once."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, codes, component, python, write_meter, write_replay
from sim.waves import Constant, Square

from pepr_profiler.store.facts import facts_of
from pepr_profiler.study.jobs import JobRecordings, merge_jobs
from pepr_profiler.study.study import Study
from pepr_profiler.summary.summarise import summarise, with_passes
from pepr_profiler.trace.events import PhaseSpan
from pepr_profiler.units import NS_PER_S as S

GPU, CPU = "gpu:GPU-1", "cpu:package-0"
Part = dict[str, Any]


def part(
    ident: str,
    wave: Constant | Square,
    begin_s: float,
    end_s: float,
    *,
    job: float,
    idle: float = 0.0,
    in_total: bool = True,
) -> Part:
    """What a recording from `begin_s` to `end_s` says of a device that draws `wave`."""
    device_j = wave.energy_j(begin_s, end_s)
    step_s = (end_s - begin_s) / 48
    edges = [begin_s + i * step_s for i in range(48)]
    return {
        "id": ident, "kind": ident[:3], "label": ident, "source": "x", "provenance": "measured",
        "in_total": in_total, **({} if in_total else {"excluded": "was not used by the job"}),
        "device_j": device_j, "job_j": job * device_j, "idle_j": idle * device_j,
        "others_j": (1 - job - idle) * device_j, "idle_w": 10.0, "job_idle_j": 1.0,
        "u_j": 0.1 * job * device_j, "mean_w": device_j / (end_s - begin_s), "max_w": 1.0,
        "trace_w": [wave.energy_j(at, at + step_s) / step_s for at in edges],
        "budget": {"gain_j": 0.05 * job * device_j, "offset_j": 0.0, "model_j": 0.0},
        "cross_check": None,
    }  # fmt: skip


def run(
    name: str,
    begin_s: float,
    end_s: float,
    *parts: Part,
    job: str | None = "j",
    boot: str = "b",
    outer: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    energies = [p["job_j"] for p in parts if p["in_total"]]
    return {
        "schema": 1, "run_id": name, "job": job, "name": name, "boot_id": boot, "host": boot,
        "clock": [{"t_ns": 0, "unix_ns": 1_700_000_000 * S}], "started_at": f"{begin_s:09.3f}",
        "duration_s": end_s - begin_s, "exit_code": 0, "signal": None, "complete": True,
        "energy": {
            "total_j": sum(energies), "u_j": 1.0, "scope": "job", "provenance": "measured",
            "components": list(parts),
        },
        "recording": {
            "window_ns": [int(begin_s * S), int(end_s * S)],
            "outer": None if outer is None else {"run_id": outer, "pid": 1},
        },
        **more,
    }  # fmt: skip


def one(*runs: dict[str, Any]) -> dict[str, Any]:
    (merged,) = merge_jobs(runs)
    for c in merged["energy"]["components"]:
        assert c["job_j"] + c["others_j"] + c["idle_j"] == pytest.approx(c["device_j"])
        assert min(c["job_j"], c["others_j"], c["idle_j"]) >= -1e-9
    return merged


def test_ranks_of_one_node_count_its_devices_once_and_their_shares_together() -> None:
    # given two ranks at 100 W, one second apart, with 30 % and 40 % of it
    power = Constant(100)
    merged = one(
        run("a", 0, 10, part(CPU, power, 0, 10, job=0.3, idle=0.1)),
        run("b", 1, 11, part(CPU, power, 1, 11, job=0.4, idle=0.1)),
    )
    cpu = component(merged, CPU)
    assert (cpu["device_j"], cpu["job_j"]) == (pytest.approx(1100), pytest.approx(700))
    assert cpu["idle_j"] == pytest.approx(110)
    assert merged["energy"]["total_j"] == pytest.approx(700)
    assert (merged["duration_s"], merged["runs"]) == (pytest.approx(11), ["a", "b"])
    # one device's errors add up as they stand
    assert cpu["u_j"] == pytest.approx(70) and cpu["budget"]["gain_j"] == pytest.approx(35)


def test_the_power_over_time_decides_what_the_second_look_adds() -> None:
    # given a device at 100 W, and 500 W from 10 s on, in looks of [0, 12] and [8, 20]
    power = Square(40.0, 100, 500, duty=0.5, shift_s=10.0)
    truth_j = power.energy_j(0, 20)
    assert truth_j == pytest.approx(10 * 100 + 10 * 500)
    looks = [(0, 12), (8, 20)]
    runs = [run(f"{b}", b, e, part(GPU, power, b, e, job=0.5)) for b, e in looks]
    merged = component(one(*runs), GPU)
    assert merged["device_j"] == pytest.approx(truth_j, rel=0.01)
    trace_w = merged["trace_w"]
    assert (trace_w[0], trace_w[-1]) == (pytest.approx(100), pytest.approx(500))


@pytest.mark.parametrize(("held", "truth_j"), [(False, 1500), (True, 2000)])
def test_where_power_is_unknown_there_is_what_the_known_leaves(held: bool, truth_j: float) -> None:
    # given 100 W in looks of [0, 12] and of [8, 20], which read nothing from 15 s on: a counter has
    # no energy there, a model holds its power
    power = Constant(100)
    first, second = part(CPU, power, 0, 12, job=0), part(CPU, power, 8, 20, job=0)
    step_s = 12 / 48
    second["trace_w"][round(7 / step_s) :] = [None] * round(5 / step_s)
    if not held:
        second |= {"device_j": 700.0, "others_j": 700.0}
    merged = component(one(run("a", 0, 12, first), run("b", 8, 20, second)), CPU)
    assert merged["device_j"] == pytest.approx(truth_j)


def test_a_device_whose_power_is_all_unknown_has_its_energy_evenly() -> None:
    power = Constant(100)
    parts = [part(CPU, power, *span, job=0) for span in ((0, 12), (8, 20))]
    for each in parts:
        each["trace_w"] = [None] * 48
    runs = [run(f"{b}", b, b + 12, p) for b, p in zip((0, 8), parts, strict=True)]
    assert component(one(*runs), CPU)["device_j"] == pytest.approx(2000)


def test_what_one_recording_does_not_tell_of_itself_nobody_knows_of_the_job() -> None:
    # given a rank that crashed, and one that took nothing from the grid
    power = Constant(100)
    carbon = {"g_co2e": 5.0, "intensity_g_per_kwh": 100.0, "pue": 1.0, "source": "x", "year": 2023}
    merged = one(
        run("a", 0, 10, part(CPU, power, 0, 10, job=0.5), carbon=carbon,
            sampler={"cpu_s": 1.0, "late": 2}),
        run("b", 0, 10, part(CPU, power, 0, 10, job=0.0), carbon={**carbon, "g_co2e": 0.0},
            sampler={"cpu_s": None, "late": 3}),
    )  # fmt: skip
    assert (merged["sampler"]["cpu_s"], merged["sampler"]["late"]) == (None, 5)
    assert merged["sampler"]["cpu_fraction"] is None
    # but nothing is no unknown
    assert merged["carbon"]["g_co2e"] == pytest.approx(5.0)


def test_jobs_that_each_claim_a_whole_device_share_it_once() -> None:
    power = Constant(300)
    whole = [run(name, 0, 10, part(GPU, power, 0, 10, job=1.0)) for name in "abcd"]
    assert component(one(*whole), GPU)["job_j"] == pytest.approx(3000)
    assert one(*whole)["energy"]["total_j"] == pytest.approx(3000)


def test_what_one_recording_did_not_use_another_may_have() -> None:
    power = Constant(100)
    merged = one(
        run("a", 0, 10, part(GPU, power, 0, 10, job=0.0, in_total=False)),
        run("b", 0, 10, part(GPU, power, 0, 10, job=1.0)),
    )
    gpu = component(merged, GPU)
    assert gpu["in_total"] and "excluded" not in gpu
    assert merged["energy"]["total_j"] == pytest.approx(1000)


def test_a_recording_inside_another_is_a_part_of_it() -> None:
    # given a launcher with 80 % of a device, inside it a script with 50 % and inside that a third
    power = Constant(100)
    merged = one(
        run("inner", 4, 6, part(CPU, power, 4, 6, job=0.3), job=None, outer="middle"),
        run("launcher", 0, 10, part(CPU, power, 0, 10, job=0.8), job=None),
        run("middle", 2, 8, part(CPU, power, 2, 8, job=0.5), job=None, outer="launcher"),
    )
    assert component(merged, CPU)["job_j"] == pytest.approx(800)
    assert component(merged, CPU)["device_j"] == pytest.approx(1000)
    assert merged["run_id"] == "launcher"


def test_a_device_that_only_the_inner_recording_saw_counts_with_it() -> None:
    power = Constant(100)
    merged = one(
        run("outer", 0, 10, part(CPU, power, 0, 10, job=0.8), job=None),
        run("inner", 2, 8, part(GPU, power, 2, 8, job=1.0), job=None, outer="outer"),
    )
    assert merged["energy"]["total_j"] == pytest.approx(800 + 600)


def test_nodes_add_up_but_for_the_gpu_they_share() -> None:
    # given two boots with a CPU each of the same name, and a GPU that both see
    power = Constant(100)
    merged = one(
        *(
            run(boot, 0, 10, part(CPU, power, 0, 10, job=1.0), part(GPU, power, 0, 10, job=0.5),
                boot=boot)
            for boot in ("b1", "b2")
        )
    )  # fmt: skip
    ids = sorted(c["id"] for c in merged["energy"]["components"])
    assert ids == [CPU, CPU, GPU]
    assert merged["energy"]["total_j"] == pytest.approx(2000 + 1000)


def test_steps_of_a_job_that_follow_each_other_stay_runs_of_their_own() -> None:
    power = Constant(100)
    runs = [run(str(b), b, b + 5, part(CPU, power, b, b + 5, job=1.0)) for b in (0, 5, 20)]
    assert merge_jobs(runs) == runs


def test_a_rank_that_overlaps_two_joins_them() -> None:
    # given two ranks with a pause of 10 s between them, and a third from the one into the other
    power = Constant(100)
    spans = [(0, 10), (20, 30), (8, 22)]
    merged = one(*(run(f"{b}", b, e, part(CPU, power, b, e, job=0.25)) for b, e in spans))
    # then the device counts once over the 30 s, and the shares of all add up
    assert component(merged, CPU)["device_j"] == pytest.approx(3000)
    assert merged["energy"]["total_j"] == pytest.approx(0.25 * 100 * (10 + 10 + 14))
    assert merged["duration_s"] == pytest.approx(30)


def test_what_is_not_one_job_stays_as_it_is() -> None:
    alone = [run(name, 0, 1, job=None) for name in "abc"]
    assert merge_jobs(alone) == alone
    other = run("d", 0, 1, job="k")
    same = [run("e", 0, 1), run("f", 0, 1)]
    merged = merge_jobs([*same[:1], other, *same[1:], other])
    assert [m["run_id"] for m in merged] == ["e", "d"]
    assert merged[0]["runs"] == ["e", "f"]


def test_the_rest_of_a_job_is_put_together_too() -> None:
    phase = {"name": "train", "count": 2, "duration_s": 4.0, "energy_j": 10.0, "u_j": 1.0}
    carbon = {"g_co2e": 5.0, "intensity_g_per_kwh": 100.0, "pue": 1.0, "source": "x", "year": 2023}
    power = Constant(100)
    common = {"phases": [phase], "carbon": carbon, "memory": {"peak_rss_bytes": 7}}
    warning = {"code": "gap", "text": "gap", "hint": "x"}
    merged = one(
        run("a", 0, 10, part(CPU, power, 0, 10, job=0.5), metrics={"acc": 0.9}, exit_code=0,
            warnings=[warning], sampler={"cpu_s": 1.0}, **common),
        run("b", 0, 10, part(CPU, power, 0, 10, job=0.5), metrics={"loss": 1.0}, exit_code=3,
            warnings=[warning], sampler={"cpu_s": 2.0}, **common),
    )  # fmt: skip
    assert merged["metrics"] == {"acc": 0.9, "loss": 1.0}
    assert merged["phases"] == [{**phase, "energy_j": 20.0, "u_j": 2.0, "partial": []}]
    assert merged["carbon"]["g_co2e"] == pytest.approx(10.0)
    assert merged["memory"]["peak_rss_bytes"] == 14
    assert merged["exit_code"] == 3
    assert merged["warnings"] == [warning]
    assert merged["sampler"]["cpu_s"] == 3.0
    assert merged["sampler"]["cpu_fraction"] == pytest.approx(0.3)
    assert json.loads(json.dumps(merged)) == merged


def test_a_wrapped_script_in_a_wrapped_launcher_is_one_job(tmp_path: Path) -> None:
    # given a meter at 50 W, a launcher under one profiler, and in it a script under another
    meter = write_replay(
        tmp_path / "meter", ["m power W 1 0 gauge test kind=cpu component=cpu:meter"],
        [(0.0, 50.0)],
    )  # fmt: skip
    cli = Cli(tmp_path)
    inner = ["-m", "pepr_profiler", "--sensor", meter, "--", "sleep", "1"]
    start = f"import subprocess, sys; subprocess.run([sys.executable, *{inner!r}], check=True)"
    result = cli("--sensor", meter, "--", *python(start))
    assert result.status == 0, result.stderr
    runs = [json.loads((path / "run.json").read_text()) for path in cli.runs()]
    outer, nested = sorted(runs, key=lambda summary: -summary["duration_s"])
    assert nested["recording"]["outer"]["run_id"] == outer["run_id"]
    # then it took what the launcher took
    (merged,) = merge_jobs([nested, outer])
    device_j = component(outer, "cpu:meter")["device_j"]
    assert component(merged, "cpu:meter")["device_j"] == pytest.approx(device_j)
    assert merged["energy"]["total_j"] == pytest.approx(outer["energy"]["total_j"])


def test_a_study_counts_ranks_once_and_leaves_a_sweep_beside_its_runs() -> None:
    # given two ranks of one training that share a device, each claiming half of it, and a sweep
    # around two trainings one after the other
    power = Constant(100)
    facts = {
        "time_s": 10.0, "memory": {"peak_rss_bytes": 1, "gpu_peak_bytes": None},
        "metrics": {"accuracy": 0.9}, "performance": {"metric": "accuracy", "value": 0.9},
    }  # fmt: skip

    def trained(name: str, begin_s: float, share: float, **more: Any) -> dict[str, Any]:
        device = part(CPU, power, begin_s, begin_s + 10, job=share)
        return {**run(name, begin_s, begin_s + 10, device, **more), **facts}

    ranks = [trained(f"rank{i}", 0, 0.5, job="train") for i in range(2)]
    sweep = {**run("sweep", 20, 50, part(CPU, power, 20, 50, job=1.0), job=None), **facts}
    steps = [trained(f"step{i}", 20 + 15 * i, 1 - i / 4, job=None, outer="sweep") for i in range(2)]
    # when they are compared
    (ranking,) = Study.from_runs([*ranks, sweep, *steps]).rankings
    # then the ranks are one run, and the trainings of the sweep are still two
    joules = dict(zip(ranking.names, ranking.resource, strict=True))
    assert joules == pytest.approx({"rank0": 1000, "sweep": 3000, "step0": 1000, "step1": 750})


def test_estimates_of_several_nodes_claim_no_less_together() -> None:
    # given two nodes whose CPUs are estimated, ±50 % each
    def estimate(begin_s: float, end_s: float) -> Part:
        whole = part("cpu:modelled", Constant(100), begin_s, end_s, job=1.0)
        u_j = 0.5 * whole["job_j"]
        budget = {"gain_j": 0.0, "offset_j": 0.0, "model_j": u_j / 2}
        return {**whole, "provenance": "modelled", "u_j": u_j, "budget": budget}

    merged = one(*(run(node, 0, 10, estimate(0, 10), boot=node) for node in ("one", "two")))
    assert merged["energy"]["total_j"] == pytest.approx(2000.0)
    assert merged["energy"]["u_j"] == pytest.approx(1000.0)


# --- ranks --------------------------------------------------------------------------------------


def rank(
    number: int,
    begin_s: float,
    end_s: float,
    *parts: Part,
    of: int = 2,
    node: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The recording of one rank."""
    name, boot = more.pop("name", f"r{number}"), more.pop("boot", "b")
    made = run(name, begin_s, end_s, *parts, boot=boot, **more)
    return {**made, "name": "train", "rank": number, "local_rank": number, "world_size": of,
            "node": node, "command": ["python", "train.py"]}  # fmt: skip


def quarter(begin_s: float, end_s: float, **more: Any) -> Part:
    return part(CPU, Constant(100), begin_s, end_s, job=0.25, **more)


def job_of(*runs: dict[str, Any], passes: dict[str, list[PhaseSpan]] | None = None) -> Part:
    """The summary of all of these as one job; `passes` are by run."""
    parts = [JobRecordings.of(r, (passes or {}).get(r["run_id"], ())) for r in runs]
    return JobRecordings().merged_with(*parts).summary()


def test_any_order_and_nesting_of_merges_gives_the_same_bits() -> None:
    # given 12 recordings of 3 nodes with devices, metrics and phases of their own
    draw = random.Random(20)
    runs = []
    for number in range(12):
        boot = f"boot{number // 4}"
        begin_s = draw.uniform(0, 1)
        end_s = draw.uniform(9, 11)
        power = Square(2.0, draw.uniform(50, 100), draw.uniform(200, 300), duty=0.3)
        parts = [
            part(CPU, power, begin_s, end_s, job=draw.uniform(0.1, 0.2), idle=0.1),
            part(f"gpu:GPU-{number}", power, begin_s, end_s, job=draw.uniform(0.5, 1)),
        ]
        for each in parts:
            each["budget"] |= {"edges_j": draw.uniform(0, 5), "attribution_j": draw.uniform(0, 5)}
        phase = {"name": "train", "count": 2, "duration_s": 4.0, "energy_j": draw.uniform(1, 9),
                 "u_j": draw.uniform(0, 1)}  # fmt: skip
        runs.append(
            rank(number, begin_s, end_s, *parts, of=14, boot=boot, phases=[phase],
                 metrics={"acc": draw.uniform(0, 1)}, sampler={"cpu_s": draw.uniform(0, 1)})
        )  # fmt: skip
    whole = json.dumps(job_of(*runs), sort_keys=True)
    # when they are merged in any order, by twos and threes, some of them twice
    for _ in range(20):
        parts_of = [JobRecordings.of(r) for r in runs]
        draw.shuffle(parts_of)
        while len(parts_of) > 1:
            taken = [parts_of.pop(draw.randrange(len(parts_of))) for _ in range(2)]
            parts_of.append(taken[0].merged_with(taken[1], *draw.sample(taken, 1)))
        assert json.dumps(parts_of[0].summary(), sort_keys=True) == whole
    # and the list of jobs is no other
    draw.shuffle(runs)
    assert json.dumps(one(*runs), sort_keys=True) == whole


def test_ranks_have_their_shares_of_the_total_and_of_their_nodes() -> None:
    # given two nodes of two ranks at 100 W, each rank with a quarter of its node
    runs = [
        rank(i, 0, 10, quarter(0, 10), of=4, boot=f"b{i // 2}", node=f"n{i // 2}",
             memory={"peak_rss_bytes": 10 + i, "gpu_peak_bytes": None})
        for i in range(4)
    ]  # fmt: skip
    job = job_of(*runs)
    assert [r["rank"] for r in job["ranks"]] == [0, 1, 2, 3]
    assert [r["energy_j"] for r in job["ranks"]] == pytest.approx([250] * 4)
    assert [r["share"] for r in job["ranks"]] == pytest.approx([0.25] * 4)
    assert [r["run_id"] for r in job["ranks"]] == ["r0", "r1", "r2", "r3"]
    nodes = [(n["node"], n["ranks"], n["energy_j"], n["peak_rss_bytes"]) for n in job["nodes"]]
    assert nodes == [("n0", [0, 1], pytest.approx(500), 21), ("n1", [2, 3], pytest.approx(500), 25)]
    assert (job["missing_ranks"], job["energy"]["imputed"]) == ([], None)
    # a package errs in both of its ranks alike, and two packages one without the other
    assert job["nodes"][0]["u_j"] == pytest.approx(2 * 0.05 * 500)
    assert job["energy"]["u_j"] == pytest.approx(math.sqrt(2) * 2 * 0.05 * 500)


def test_what_each_recording_draws_anew_adds_up_in_squares() -> None:
    # given two ranks that share a package, whose reads miss 3 J and 4 J at the edges
    runs = []
    for i, edges_j in enumerate((3.0, 4.0)):
        of_rank = quarter(0, 10)
        of_rank["budget"] = {"gain_j": 0.0, "offset_j": 0.0, "model_j": 0.0, "edges_j": edges_j}
        of_rank["u_j"] = 2 * edges_j
        runs.append(rank(i, 0, 10, of_rank))
    cpu = component(job_of(*runs), CPU)
    assert (cpu["budget"]["edges_j"], cpu["u_j"]) == (pytest.approx(5), pytest.approx(10))


def test_ranks_that_share_a_device_do_not_make_each_other_unsure() -> None:
    # given two ranks with half of a package each, alone on it
    runs = []
    for i in range(2):
        half = part(CPU, Constant(100), 0, 10, job=0.5)
        half["budget"] = {"gain_j": 0.0, "offset_j": 0.0, "model_j": 0.0, "attribution_j": 25.0}
        runs.append(rank(i, 0, 10, {**half, "u_j": 50.0}))
    # then it is known whose all of it is
    assert component(job_of(*runs), CPU)["u_j"] == pytest.approx(0)


def test_a_missing_rank_is_named_and_what_it_took_is_imputed_apart() -> None:
    runs = [rank(i, 0, 10, quarter(0, 10, idle=0.0), of=4) for i in (0, 1, 3)]
    job = job_of(*runs)
    assert job["missing_ranks"] == [2]
    energy = job["energy"]
    assert (energy["total_j"], energy["u_j"]) == (pytest.approx(750), None)
    assert energy["partial"] == [{"id": "rank:2", "missing_s": pytest.approx(10)}]
    imputed = energy["imputed"]
    assert (imputed["ranks"], imputed["missing_j"]) == (1, pytest.approx(250))
    assert imputed["total_j"] == pytest.approx(1000)
    assert imputed["u_j"] == pytest.approx(2 * 0.05 * 1000)
    assert "mean of the 3 present" in imputed["how"]
    # and the same where one recording is all that there is
    (alone,) = merge_jobs(runs[:1])
    assert alone["missing_ranks"] == [1, 2, 3]
    assert alone["energy"]["imputed"]["u_j"] is None


def test_what_is_imputed_is_no_more_than_is_left_of_the_devices() -> None:
    # given two ranks of three that each claim all of a GPU at 100 W, and have a tenth of a CPU
    def imputed(ranks: int = 2, unused: bool = False, of: int = 3, **more: Any) -> Part:
        runs = []
        for i in range(ranks):
            gpu = part(GPU, Constant(100), 0, 10, job=1.0)
            cpu = part(CPU, Constant(10), 0, 10, job=0.1, idle=0.5)
            free = part("gpu:GPU-2", Constant(100), 0, 10, job=0.0, in_total=False)
            inside = part("rail", Constant(500), 0, 10, job=0.0, in_total=False)
            rail = {**inside, "excluded": "contains the GPU"}
            parts = (gpu, cpu, rail, *([free] if unused else []))
            runs.append(rank(i, 0, 10, *parts, of=of, **more))
        found: Part = job_of(*runs)["energy"]["imputed"]
        return found

    # when the third is on their machine, then it has what they leave of the CPU, at most
    capped = imputed(local_world_size=3)
    assert (capped["missing_j"], capped["total_j"]) == (pytest.approx(80), pytest.approx(1100))
    assert capped["u_j"] is None and "no more than is left" in capped["how"]
    alone = imputed(1, of=2, local_world_size=2)
    assert alone["total_j"] == pytest.approx(1100)
    # when another GPU was free, or it is on another machine, it may have as much as they
    assert imputed(unused=True, local_world_size=3)["missing_j"] == pytest.approx(510)
    assert imputed(local_world_size=2)["missing_j"] == pytest.approx(510)
    # when what is left is within the ± of the means, that is held
    thirds = [rank(i, 0, 10, part(CPU, Constant(100), 0, 10, job=0.35), of=3) for i in (0, 1)]
    within = job_of(*({**r, "local_world_size": 3} for r in thirds))["energy"]["imputed"]
    assert (within["total_j"], within["u_j"]) == (pytest.approx(1000), pytest.approx(105))
    # when nobody says where it is, nobody knows
    unknown = imputed()
    assert (unknown["missing_j"], unknown["total_j"], unknown["u_j"]) == (None, None, None)
    assert "unknown which ranks" in unknown["how"]


def test_a_recording_of_a_whole_node_covers_the_ranks_on_it() -> None:
    node = {**run("node", 0, 10, part(CPU, Constant(100), 0, 10, job=0.6)), "world_size": 2}
    assert job_of(node)["missing_ranks"] == []
    inner = rank(0, 1, 9, part(CPU, Constant(100), 1, 9, job=0.3), outer="node")
    job = job_of(node, inner)
    assert job["missing_ranks"] == []
    # what the rank has is its own, what is left is the rest of the node
    shares = [(r["rank"], r["run_id"], r["energy_j"]) for r in job["ranks"]]
    assert shares == [(0, "r0", pytest.approx(240)), (None, "node", pytest.approx(360))]
    assert job["energy"]["total_j"] == pytest.approx(600)


def test_ranks_inside_another_recording_have_no_more_than_the_device_took_meanwhile() -> None:
    # given a launcher at 100 W, in it two ranks in [2, 7] and [3, 8], and in rank 1 two blocks;
    # each says that all of the GPU is its own
    def claimed(begin_s: float, end_s: float) -> Part:
        return part(GPU, Constant(100), begin_s, end_s, job=1.0)

    around = run("around", 0, 10, claimed(0, 10), job=None)
    ranks = [rank(i, 2 + i, 7 + i, claimed(2 + i, 7 + i), outer="around") for i in range(2)]
    blocks = [rank(2 + i, 4, 6, claimed(4, 6), outer="r1") for i in range(2)]
    job = job_of(around, *ranks)
    # then the ranks have halves of the 6 s in which any was there, and the launcher the rest
    shares = [(r["rank"], r["energy_j"]) for r in job["ranks"]]
    expected = [(0, 300), (1, 300), (None, 400)]
    assert shares == [(number, pytest.approx(energy_j)) for number, energy_j in expected]
    assert job["energy"]["total_j"] == pytest.approx(1000)
    assert job["nodes"][0]["share"] == pytest.approx(1.0)
    # and blocks in a rank share what is the rank's
    shares = [(r["rank"], r["energy_j"]) for r in job_of(around, *ranks, *blocks)["ranks"]]
    expected = [(0, 300), (1, 180), (2, 60), (3, 60), (None, 400)]
    assert shares == [(number, pytest.approx(energy_j)) for number, energy_j in expected]


def test_ranks_inside_a_recording_that_counts_less_have_no_more_than_that() -> None:
    around = run("around", 0, 10, part(CPU, Constant(100), 0, 10, job=0.4), job=None)
    ranks = [rank(i, 1, 9, part(CPU, Constant(100), 1, 9, job=0.3), outer="around") for i in (0, 1)]
    job = job_of(around, *ranks)
    assert [r["energy_j"] for r in job["ranks"]] == pytest.approx([200, 200])
    assert job["energy"]["total_j"] == pytest.approx(400)


def test_the_devices_of_a_jobs_nodes_are_no_others_devices() -> None:
    facts = {
        "time_s": 10.0, "memory": {}, "metrics": {},
        "performance": {"metric": "accuracy", "value": 0.9},
    }  # fmt: skip
    runs = [{**rank(i, 0, 10, quarter(0, 10), boot=f"n{i}"), **facts} for i in range(2)]
    devices = [device for device, *_ in json.loads(facts_of(job_of(*runs)).errors)]
    assert devices == ["2:n0cpu:package-0", "2:n1cpu:package-0"]


def test_a_rank_that_was_recorded_inside_another_ones_recording_has_its_part_of_that() -> None:
    # given a program of Lightning, rank 0, that has started rank 1, and both have a recording
    first = rank(0, 0, 10, part(CPU, Constant(100), 0, 10, job=0.6))
    second = rank(1, 1, 9, part(CPU, Constant(100), 1, 9, job=0.3), outer="r0")
    job = job_of(first, second)
    assert job["energy"]["total_j"] == pytest.approx(600)
    shares = [(r["rank"], r["energy_j"]) for r in job["ranks"]]
    assert shares == [(0, pytest.approx(360)), (1, pytest.approx(240))]
    assert job["missing_ranks"] == []


def test_two_programs_of_the_same_rank_in_one_allocation_stay_apart() -> None:
    # given two trials side by side in one Slurm step, each of two ranks, and blocks one after the
    # other in the ranks of a third
    trials = [
        {**rank(i, begin_s, end_s, quarter(begin_s, end_s), name=f"{name}{i}"), "name": name}
        for name, begin_s, end_s in (("a", 0, 10), ("b", 1, 11))
        for i in range(2)
    ]
    assert sorted(m["runs"] for m in merge_jobs(trials)) == [["a0", "a1"], ["b0", "b1"]]
    # then their names tell them apart, else the order in which each rank began them
    same = [{**r, "name": "train"} for r in trials]
    assert sorted(m["runs"] for m in merge_jobs(same)) == [["a0", "a1"], ["b0", "b1"]]
    blocks = [
        rank(i, at, at + 10, quarter(at, at + 10), name=f"{k}-{i}")
        for i in range(2)
        for k, at in enumerate((0 + i, 10.5 + i))
    ]
    assert sorted(m["runs"] for m in merge_jobs(blocks)) == [["0-0", "0-1"], ["1-0", "1-1"]]
    # and a script that was wrapped in a wrapped rank is no second program
    inner = rank(0, 2, 4, quarter(2, 4), name="inner", outer="r0")
    (job,) = merge_jobs([rank(0, 0, 10, quarter(0, 10)), rank(1, 0, 10, quarter(0, 10)), inner])
    assert [r["rank"] for r in job["ranks"]] == [0, 1]


def test_what_shares_only_an_allocation_stays_apart() -> None:
    # given a batch script that runs two trials at once on each of two nodes: Slurm names the
    # allocation, and no ranks
    def trial(name: str, boot: str, job: str | None = "slurm-77", **more: Any) -> dict[str, Any]:
        its = part(CPU, Constant(100), 0, 10, job=0.4)
        own = run(f"{name}{boot}", 0, 10, its, job=job, boot=boot, **more)
        return {**own, "name": name}

    nodes = [trial(name, boot) for name in "xy" for boot in ("1", "2")]
    assert [m["runs"] for m in merge_jobs(nodes)] == [["x1", "x2"], ["y1", "y2"]]
    assert [m["run_id"] for m in merge_jobs(nodes[::2])] == ["x1", "y1"]
    # those inside another recording are of a sweep, as they are where there is no Slurm
    for job in ("slurm-77", "k8s-js", None):
        around = trial("sweep", "1", job)
        inside = [trial(name, "1", job, outer="sweep1") for name in "xy"]
        merged = merge_jobs([around, *inside])
        assert [m["run_id"] for m in merged] == ["sweep1", "x1", "y1"]
    # and a job that the user named is one
    assert [m["runs"] for m in merge_jobs([trial(n, "1", "mine") for n in "xy"])] == [["x1", "y1"]]


def test_a_recording_around_the_ranks_of_one_job_is_of_it_and_one_around_several_is_not() -> None:
    around = run("around", 0, 40, part(CPU, Constant(100), 0, 40, job=0.9), job=None)
    first = [rank(i, 1, 10, quarter(1, 10), outer="around", name=f"a{i}") for i in range(2)]
    (job,) = merge_jobs([around, *first])
    assert job["runs"] == ["around", "a0", "a1"]
    assert job["energy"]["total_j"] == pytest.approx(3600)
    second = [
        rank(i, 21, 30, quarter(21, 30), outer="around", name=f"b{i}", job="k") for i in range(2)
    ]
    jobs = merge_jobs([around, *first, *second])
    assert [job["run_id"] for job in jobs] == ["around", "a0", "b0"]
    assert [len(job["ranks"]) for job in jobs[1:]] == [2, 2]


def test_a_study_ranks_a_wrapped_launcher_of_wrapped_ranks_as_one() -> None:
    facts = {
        "time_s": 10.0, "memory": {"peak_rss_bytes": 1, "gpu_peak_bytes": None},
        "metrics": {"accuracy": 0.9}, "performance": {"metric": "accuracy", "value": 0.9},
    }  # fmt: skip
    around = run("around", 0, 20, part(CPU, Constant(100), 0, 20, job=0.9), job=None)
    ranks = [rank(i, 1, 10, quarter(1, 10), outer="around") for i in range(2)]
    other = run("other", 30, 40, part(CPU, Constant(100), 30, 40, job=0.9), job=None)
    lacking = rank(0, 50, 60, quarter(50, 60), name="lacking", job="lacking")
    study = Study.from_runs([{**r, **facts} for r in (around, *ranks, other, lacking)])
    (ranking,) = study.rankings
    joules = dict(zip(ranking.names, ranking.resource, strict=True))
    assert joules == pytest.approx({"around": 1800, "other": 900})
    assert ranking.n.tolist() == [1, 1]
    # a job that lacks a rank took more than is known
    assert [(run, "lacks rank 1" in why) for run, why in study.left_out] == [
        ("train (lacking)", True)
    ]


def test_phases_take_the_union_of_the_ranks_times_and_the_sum_of_their_energies() -> None:
    # given two ranks whose training overlaps for 4 of 8 s, on clocks that began 100 s apart
    def phase(energy_j: float, u_j: float) -> Part:
        return {"name": "train", "count": 1, "duration_s": 6.0, "energy_j": energy_j, "u_j": u_j}

    runs = [
        rank(0, 0, 10, quarter(0, 10), phases=[phase(150.0, 15.0)]),
        {**rank(1, 100, 110, quarter(100, 110), phases=[phase(150.0, 15.0)], boot="b2"),
         "clock": [{"t_ns": 0, "unix_ns": (1_700_000_000 - 100) * S}]},
    ]  # fmt: skip
    passes = {
        "r0": [PhaseSpan("train", 1 * S, 7 * S, False)],
        "r1": [PhaseSpan("train", 103 * S, 109 * S, False)],
    }
    job = job_of(*runs, passes=passes)
    (train,) = job["phases"]
    assert train["duration_s"] == pytest.approx(8)
    assert train["energy_j"] == pytest.approx(300)
    # the fixed errors of two boards are independent: 15 J and 15 J make 21 J
    assert 15 < train["u_j"] <= 30
    # and rank 0 waited 2 s for rank 1
    waits = [(w["rank"], w["median_s"], w["was_last"]) for w in job["stragglers"]]
    assert waits == [(0, pytest.approx(2), 0), (1, pytest.approx(0), 1)]


def test_phases_of_ranks_that_claim_one_device_are_never_more_than_the_total() -> None:
    phase = {"name": "train", "count": 1, "duration_s": 10.0, "energy_j": 950.0, "u_j": 9.0}
    whole = [
        rank(i, 0, 10, part(GPU, Constant(100), 0, 10, job=1.0), phases=[phase]) for i in range(2)
    ]
    job = job_of(*whole)
    assert job["energy"]["total_j"] == pytest.approx(1000)
    assert job["phases"][0]["energy_j"] == pytest.approx(950)
    assert [r["energy_j"] for r in job["ranks"]] == pytest.approx([500, 500])


def test_stragglers_are_compared_pass_by_pass() -> None:
    # given three ranks and three epochs; rank 2 is 1 s late in the second, and crashes in the third
    ends_s = {0: (10, 20, 30), 1: (10, 20.5, 29), 2: (10, 21)}
    runs = [rank(i, 0, 40, quarter(0, 40), of=3) for i in range(3)]
    passes = {
        f"r{i}": [PhaseSpan("epoch", int((s - 9) * S), int(s * S), False) for s in of_rank]
        for i, of_rank in ends_s.items()
    }
    waits = {w["rank"]: w for w in job_of(*runs, passes=passes)["stragglers"]}
    assert [waits[i]["total_s"] for i in range(3)] == pytest.approx([1.0, 1.5, 0.0])
    assert [waits[i]["max_s"] for i in range(3)] == pytest.approx([1.0, 1.0, 0.0])
    assert [waits[i]["was_last"] for i in range(3)] == [2, 1, 2]
    assert [waits[i]["passes"] for i in range(3)] == [3, 3, 2]


def test_the_performance_of_a_job_is_that_of_rank_0_and_others_may_disagree() -> None:
    def scored(number: int, value: float) -> dict[str, Any]:
        return rank(number, 0, 10, quarter(0, 10), metrics={"acc": value},
                    performance={"metric": "acc", "value": value})  # fmt: skip

    job = job_of(scored(1, 0.7), scored(0, 0.9))
    assert (job["performance"]["value"], job["metrics"]) == (0.9, {"acc": 0.9})
    texts = {warning["code"]: warning["text"] for warning in job["warnings"]}
    assert "rank 1 logged 0.7" in texts["ranks-disagree"]
    agreed = job_of(scored(1, 0.9), scored(0, 0.9))["warnings"]
    assert "ranks-disagree" not in {warning["code"] for warning in agreed}


def test_the_ranks_of_a_job_are_no_others_to_be_warned_of() -> None:
    def half(number: int, part_of_it: float) -> dict[str, Any]:
        shared = {"code": "shared-device", "text": f"{number}", "hint": ""}
        device = part(CPU, Constant(100), 0, 10, job=part_of_it)
        return rank(number, 0, 10, device, warnings=[shared])

    assert job_of(half(0, 0.5), half(1, 0.5))["warnings"] == []
    (warning,) = job_of(half(0, 0.3), half(1, 0.5))["warnings"]
    assert "others than the job had 20% of the energy of its CPUs" in warning["text"]


def test_marks_of_ranks_tell_which_of_them_a_recording_of_a_node_covers() -> None:
    # given torchrun on two nodes of two ranks, of which one node has a profiler and rank 0 marks
    def seen(**facts: int | None) -> list[int]:
        first = {"rank": 0, "local_rank": 0, "world_size": 4, **facts}
        node = run("node", 0, 10, quarter(0, 10), inner_ranks=[first])
        missing: list[int] = job_of(node)["missing_ranks"]
        return missing

    assert seen(local_world_size=2) == [2, 3]
    assert seen(local_world_size=4) == []
    assert seen(local_world_size=None) == []
    assert seen(local_world_size=2, world_size=1 << 40) == []


def marks_of(directory: Path, number: int, *phases: tuple[str, float, float]) -> None:
    """A file of events of one rank of two: its phases, in s since the run's begin."""
    window_ns = json.loads((directory / "run.json").read_text())["recording"]["window_ns"]
    lines: list[dict[str, Any]] = [{"event": "rank", "t_ns": 0, "rank": number, "world_size": 2}]
    for ident, (name, begin_s, end_s) in enumerate(phases):
        at_ns = [window_ns[0] + int(at_s * S) for at_s in (begin_s, end_s)]
        lines += [
            {"event": "begin", "t_ns": at_ns[0], "id": ident, "parent": None, "name": name},
            {"event": "end", "t_ns": at_ns[1], "id": ident},
            {"event": "metrics", "t_ns": at_ns[1], "metrics": {"acc": 0.9 - number / 10}},
        ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / f"events-host-{number}.jsonl").write_text(text)


def test_ranks_in_one_recording_have_equal_parts_of_its_power(tmp_path: Path) -> None:
    # given a run at 50 W in which rank 0 is there for 1.6 s and rank 1 for the first 0.8 s of them
    cli = Cli(tmp_path)
    meter = write_meter(tmp_path / "meter", 50.0)
    assert cli("--sensor", meter, "--", "sleep", "2").status == 0
    (directory,) = cli.runs()
    marks_of(directory, 0, ("train", 0.1, 1.7), ("forward", 0.1, 0.5))
    marks_of(directory, 1, ("train", 0.1, 0.9), ("backward", 0.1, 0.9))
    summary = summarise(directory)
    phases = {phase["name"]: phase for phase in summary["phases"]}
    # then a phase of both has all, and one of a rank its half of what they took meanwhile
    joules = {name: phase["energy_j"] for name, phase in phases.items()}
    assert joules == pytest.approx({"train": 80.0, "forward": 10.0, "backward": 20.0}, rel=0.01)
    assert phases["train"]["u_j"] == pytest.approx(0, abs=1.0)
    assert phases["forward"]["u_j"] == pytest.approx(0.5 * 10.0, rel=0.1)
    assert phases["train"]["duration_s"] == pytest.approx(1.6)
    # and the lowest rank's metric counts, which the other one contradicts
    assert summary["metrics"] == {"acc": 0.9}
    assert "ranks-disagree" in codes(summary, "rank 1 logged 0.8")
    assert [facts["rank"] for facts in summary["inner_ranks"]] == [0, 1]
    # and the job of this one recording says who waited: rank 1, for 0.8 s
    job = JobRecordings.of(*with_passes(directory)).summary()
    (first, second) = [wait["median_s"] for wait in job["stragglers"]]
    assert (first, second) == (pytest.approx(0), pytest.approx(0.8))


def test_a_job_has_a_page_a_figure_and_a_table(tmp_path: Path) -> None:
    # given two ranks of three
    cli = Cli(tmp_path)
    meter = write_meter(tmp_path / "meter", 50.0)
    started = []
    for number in range(2):
        variables = {"RANK": str(number), "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "x<y"}
        command = ("--sensor", meter, "--name", f"r{number}", "--", "sleep", "2")
        started.append(cli.start(*command, env=variables))
    for process in started:
        process.communicate(timeout=SLOW_S)
    files = [str(tmp_path / f"job.{form}") for form in ("html", "svg", "csv", "json", "md")]
    outputs = [word for file in files for word in ("-o", file)]
    done = cli("report", "--job", "torchrun-x", *outputs)
    assert done.status == 0, done.stderr
    page = Path(files[0]).read_text()
    assert "This is a lower bound" in page and "there is no recording of rank 2 of 3" in page
    assert "rank 1" in page and "x&lt;y" in page and "x<y" not in page
    rows = list(csv.DictReader(Path(files[2]).read_text().splitlines()))
    assert [row["name"] for row in rows if row["part"] == "rank"] == ["rank 0", "rank 1"]
    job = json.loads(Path(files[3]).read_text())
    assert job["missing_ranks"] == [2]
    table = Path(files[4]).read_text()
    assert table.startswith("**Job torchrun-x\\<y (2 of 3 ranks): its energy by device, rank and")
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert [name for name in names if name.startswith("rank")] == ["rank 0", "rank 1"]
    assert [line for line in table.splitlines() if "total" in line and "≥" in line]
    # and on the screen the total is one, too
    shown = cli("report", "--job", "last").stdout.decode()
    assert "job torchrun-x<y (2 of 3 ranks)" in shown
    assert "lower bound: there is no recording of rank 2 of 3" in shown
