"""A GPU's energy goes to whoever used it: the command line, real processes, a simulated driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, codes, component, ended, python, until, write_replay
from launchers import inside
from sim.nvml import STARTED, BuildNvml, Fault, Gpu, Process, Scenario, default_uuid
from sim.waves import Constant, Step

from pepr_profiler.study.jobs import merge_jobs
from pepr_profiler.trace.lane import LaneReader

NO_SUCH_PID = 4_194_303  # below pid_max of 64-bit kernels, and given out last of all

# Waits until instants after the epoch; at each, says who computes on GPU 0: "pid bytes sm" a line.
ACTOR = """
import os, sys, time
epoch_ns, file, *script = sys.argv[1:]
for step in script:
    at_s, _, lines = step.partition(" ")
    time.sleep(max(0.0, (int(epoch_ns) - time.monotonic_ns()) * 1e-9 + float(at_s)))
    with open(file + ".new", "w") as new:
        new.write(lines.replace("ME", str(os.getpid())).replace(";", "\\n"))
    os.replace(file + ".new", file)
"""


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is not the job's."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "stranger"]
    with ended(subprocess.Popen(command, stdin=subprocess.PIPE)) as process:
        yield process
        process.communicate()


def gpu(summary: dict[str, Any], index: int) -> dict[str, Any]:
    return component(summary, f"gpu:{default_uuid(index)}")


def adds_up(part: dict[str, Any]) -> bool:
    owners_j = part["job_j"] + part["others_j"] + part["idle_j"]
    return bool(owners_j == pytest.approx(part["device_j"], rel=1e-9))


def test_each_gpu_is_shared_by_what_its_driver_tells(
    cli: Cli, nvml_sim: BuildNvml, stranger: subprocess.Popen[bytes]
) -> None:
    # given GPUs with: the job; the job and another; another; nobody; a PID that is not of this
    # machine; the job on a divided board; the job and another on one; a board that is busy though
    # nobody is listed, and a divided one where nobody is
    job = Process(STARTED, 2**30, sm=0.4)
    other = Process(stranger.pid, 2**31, sm=0.4)
    half = Constant(0.5)
    gpus = (
        Gpu(Constant(400), processes=(job,)),
        Gpu(Constant(400), processes=(job, other)),
        Gpu(Constant(300), processes=(other,)),
        Gpu(Constant(60), processes=(), utilization=Constant(0)),
        Gpu(Constant(200), processes=(Process(NO_SUCH_PID, 2**30, sm=0.5),)),
        Gpu(Constant(100), processes=(job,), mig=True),
        Gpu(Constant(100), processes=(job, other), mig=True, utilization=half),
        Gpu(Constant(80), processes=(), utilization=half),
        Gpu(Constant(80), processes=(), mig=True),
    )
    sim = nvml_sim(Scenario(gpus=gpus))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "2.2")
    parts = [gpu(summary, index) for index in range(len(gpus))]
    alone, shared, others, unused, foreign, divided, crowded, *silent = parts

    # then who is alone has all of it, idle draw included, and equal users have halves
    assert alone["job_j"] == pytest.approx(alone["device_j"], abs=alone["u_j"])
    assert shared["job_j"] == pytest.approx(shared["device_j"] / 2, rel=1e-3)
    assert shared["others_j"] == pytest.approx(shared["device_j"] / 2, rel=1e-3)
    assert all(adds_up(part) for part in parts)
    # what the job did not use is listed, and not added
    assert (others["job_j"], others["in_total"]) == (0.0, False)
    assert others["others_j"] == pytest.approx(others["device_j"])
    assert (unused["job_j"], unused["in_total"]) == (0.0, False)
    assert unused["idle_j"] == pytest.approx(unused["device_j"])
    assert others["excluded"] == unused["excluded"] == "was not used by the job"
    # and where nobody can tell, the whole board is counted, and said to be
    for part in (foreign, divided, crowded, *silent):
        assert part["job_j"] == pytest.approx(part["device_j"], abs=part["u_j"])
    assert codes(summary, "gpu:0") == set()
    assert codes(summary, "gpu:1") == {"shared-device"}
    assert codes(summary, "gpu:4") == {"whole-device"}
    assert codes(summary, f"PID {NO_SUCH_PID}") == {"whole-device"}
    assert codes(summary, "gpu:5") == set()
    assert codes(summary, "gpu:6") == {"whole-device", "shared-device"}
    assert codes(summary, "gpu:7") == codes(summary, "gpu:8") == {"whole-device"}
    assert codes(summary, f"PID {stranger.pid} {sys.executable}"[:40]) == {"shared-device"}

    # and a report years later, when nobody lives any more, says the same
    again = cli.report(cli.runs()[0])
    assert again["energy"] == summary["energy"]
    assert again["warnings"] == summary["warnings"]


def test_idle_draw_is_measured_and_use_is_followed(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    # given a board that draws 60 W until the job computes on it at 5 s, and 360 W from then on:
    # the job alone, from 7 s with another at 30 % against 70 %, from 9 s at 90 % against 10 %
    file = tmp_path / "processes"
    file.touch()
    board = Gpu(Step(5.0, 60, 360), processes=(), processes_file=file)
    sim = nvml_sim(Scenario(gpus=(board,), epoch_ns=time.monotonic_ns()))
    who = stranger.pid
    script = [
        "5 ME 1000 0.8", f"7 ME 1000 0.3;{who} 1000 0.7", f"9 ME 1000 0.9;{who} 1000 0.1", "11 ",
    ]  # fmt: skip
    epoch = str(sim.scenario.epoch_ns)
    _, summary = cli.measure("--sensor", sim.spec, "--", *python(ACTOR, epoch, str(file), *script))
    part = gpu(summary, 0)

    # then the idle draw is known, and what flowed before was nobody's
    begin_s = (summary["recording"]["window_ns"][0] - sim.scenario.epoch_ns) * 1e-9
    assert part["idle_w"] == pytest.approx(60, rel=0.1)  # a read of a second may be late by a tenth
    assert part["idle_j"] == pytest.approx(60 * (5 - begin_s), abs=60 * 1.2)
    # and the rest is shared by use: a change is seen up to half a second late
    others_j = 360 * 2 * (0.7 + 0.1)
    assert part["others_j"] == pytest.approx(others_j, abs=360 * 0.6 * 0.7)
    assert part["job_j"] == pytest.approx(360 * 6 - others_j, abs=360 * 0.6 * 0.7 + 60)
    assert adds_up(part)
    assert codes(summary, f"PID {who}") == {"shared-device"}


def test_a_gpus_users_in_a_cgroup_are_the_job(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path, cgroup: Path, stranger: subprocess.Popen[bytes]
) -> None:
    # given a board on which a child of somebody else computes in the cgroup, and a stranger
    file = tmp_path / "processes"
    with ended(subprocess.Popen(inside(cgroup, "sleep", "600"))) as worker:
        until(lambda: str(worker.pid) in (cgroup / "cgroup.procs").read_text().split())
        file.write_text(f"{worker.pid} 1000 0.7\n{stranger.pid} 1000 0.3\n")
        sim = nvml_sim(Scenario(gpus=(Gpu(Constant(400), processes=(), processes_file=file),)))
        options = ("--sensor", sim.spec, "--follow", f"cgroup:{cgroup}", "--")
        _, summary = cli.measure(*options, "sleep", "2")
    part = gpu(summary, 0)
    assert part["job_j"] == pytest.approx(0.7 * part["device_j"], rel=0.02)
    assert adds_up(part)


def test_two_jobs_at_once_have_shares_that_add_up(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given two wrapped jobs on one board, each of whose children enters itself, and says when
    file = tmp_path / "processes"
    enter = (
        "import os, sys, time\n"
        "open(sys.argv[1], 'a').write(f'{os.getpid()} 1000 {sys.argv[2]}\\n')\n"
        "open(sys.argv[1] + sys.argv[2], 'w').write(str(time.monotonic_ns()))\n"
        "while open(sys.argv[1]).read().count('\\n') < 2: time.sleep(0.01)\n"
        "time.sleep(4)"
    )
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(400), processes=(), processes_file=file),)))
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    started = [
        cli.start(
            *("--json", str(path), "--sensor", sim.spec, "--job", "two"),
            *("--", *python(enter, str(file), use)),
        )
        for path, use in zip(paths, ("0.75", "0.25"), strict=True)
    ]
    for process in started:
        with ended(process):
            process.communicate(timeout=SLOW_S)
    summaries = [_read(path) for path in paths]
    first, second = (gpu(summary, 0) for summary in summaries)
    # then each is the other's neighbour, with three quarters and one quarter while both are there:
    # from the read before they entered, which a busy machine may let them do late
    begins_ns, begun_ns = [], []
    entered_ns = {use: int(Path(f"{file}{use}").read_text()) for use in ("0.75", "0.25")}
    for part, summary, own, other in (
        (first, summaries[0], "0.75", "0.25"),
        (second, summaries[1], "0.25", "0.75"),
    ):
        lane = LaneReader(cli.store / "runs" / summary["run_id"], "nvml-processes")
        reads_ns = [t_ns for batch in lane for t_ns in batch.t_ns.tolist()]
        begin_ns, end_ns = summary["recording"]["window_ns"]
        own_ns, other_ns = (
            max([begin_ns, *(t_ns for t_ns in reads_ns if t_ns <= entered_ns[use])])
            for use in (own, other)
        )
        begins_ns.append(begin_ns)
        begun_ns.append(own_ns)
        both_ns = end_ns - max(own_ns, other_ns)
        job_ns = max(0, other_ns - own_ns) + float(own) * both_ns
        expected = job_ns / (end_ns - begin_ns)
        assert part["job_j"] / part["device_j"] == pytest.approx(expected, abs=0.06)
    assert adds_up(first) and adds_up(second)
    # and as one job they have the whole board, once, from when the first of them entered
    (merged,) = merge_jobs(summaries)
    both = gpu(merged, 0)
    assert both["device_j"] == pytest.approx(400 * merged["duration_s"], rel=0.03)
    unused_j = 400 * (min(begun_ns) - min(begins_ns)) * 1e-9
    assert both["job_j"] == pytest.approx(both["device_j"] - unused_j, rel=0.08)
    assert adds_up(both)


def _read(path: Path) -> dict[str, Any]:
    import json

    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def test_a_process_list_that_hangs_costs_no_joule(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given a driver whose process list hangs from 1.5 s after the first lane opens
    hang = Fault("nvmlDeviceGetComputeRunningProcesses", "HANG", start_s=3.0, end_s=90.0)
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(300)),), faults=(hang,)))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "5")
    part = gpu(summary, 0)
    begin_ns, end_ns = summary["recording"]["window_ns"]
    # then the energy is whole
    truth_j = sim.scenario.energy_j(begin_ns, end_ns)
    assert part["device_j"] == pytest.approx(truth_j, abs=300 * 0.1)
    assert not codes(summary) & {"gap", "ended-early", "unknown"}
    # and who used it goes on as before, which is said, as is the lane that ended
    assert part["job_j"] == pytest.approx(part["device_j"], abs=part["u_j"])
    assert codes(summary, "nvml-processes") == {"hung-sensor"}


@pytest.mark.parametrize(
    ("answer", "missing"),
    [("NOT_SUPPORTED", "processes of GPU 0"), (None, "processes of GPU 0")],
    ids=["refused", "absent"],
)
def test_a_driver_without_process_lists_leaves_the_board_whole(
    cli: Cli, nvml_sim: BuildNvml, answer: str | None, missing: str
) -> None:
    name = "nvmlDeviceGetComputeRunningProcesses_v3"
    faults = () if answer is None else (Fault(name, answer),)
    absent = (name,) if answer is None else ()
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(300)),), faults=faults, absent=absent))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "1.8")
    part = gpu(summary, 0)
    assert part["job_j"] == pytest.approx(part["device_j"])
    assert codes(summary, "gpu:0") == {"whole-device"}
    assert [item["what"] for item in summary["missing"] if item["what"] == missing] == [missing]


def test_a_gpu_that_is_lost_makes_its_phases_and_the_total_partial_and_is_not_ranked(
    cli: Cli, nvml_sim: BuildNvml
) -> None:
    # given a job on two GPUs, of which one is lost between two of its phases
    code = (
        "import sys, time\n"
        "from pepr_profiler import profile\n"
        "epoch_ns = int(sys.argv[1])\n"
        "def until(s): time.sleep(max(0, s - (time.monotonic_ns() - epoch_ns) * 1e-9))\n"
        "with profile('job') as run:\n"
        "    run.log(accuracy=0.9)\n"
        "    with run.phase('before'): until(3)\n"
        "    with run.phase('around'): until(7)\n"
        "    with run.phase('after'): until(9)\n"
    )
    given = ["--experiment", "lost", "--metric", "accuracy=x", "--sensor"]
    epoch_ns = time.monotonic_ns()
    fault = Fault("nvmlDevice", "GPU_IS_LOST", start_s=4.0, gpu=1)
    boards = (Gpu(Constant(300)), Gpu(Constant(300)))
    whole = nvml_sim(Scenario(gpus=boards, epoch_ns=epoch_ns))
    lossy = nvml_sim(Scenario(gpus=boards, faults=(fault,), epoch_ns=epoch_ns))
    result, summary = cli.measure(
        *given, lossy.spec, "--name", "lossy", "--", *python(code, str(epoch_ns))
    )
    # then the phases of the time say so, and have no u that is too small
    lost = f"gpu:{default_uuid(1)}"
    phases = {phase["name"]: phase for phase in summary["phases"]}
    assert phases["before"]["partial"] == [] and phases["before"]["u_j"] > 0
    for name, missing_s in (("around", 3.0), ("after", 2.0)):
        assert [part["id"] for part in phases[name]["partial"]] == [lost]
        assert phases[name]["partial"][0]["missing_s"] == pytest.approx(missing_s, abs=0.4)
        assert phases[name]["u_j"] is None
    assert [part["id"] for part in summary["energy"]["partial"]] == [lost]
    assert summary["energy"]["u_j"] is None and f"without {lost}" in result.stderr
    assert summary["energy"]["mean_w"] is None and summary["progress"]["energy_j"] is None
    # and so do the screen and the page
    shown = cli("report", summary["run_id"]).stdout.decode()
    assert [line.split()[1] for line in shown.splitlines() if "after " in line] == ["≥"]
    page = cli.folder / "run.html"
    assert cli("report", summary["run_id"], "-o", str(page)).status == 0
    assert page.read_text().count("≥ ") >= 3
    # and a comparison with runs that have both names it and leaves it out, unless it is by time
    for name in ("good", "better"):
        cli.measure(*given, whole.spec, "--name", name, "--", *python(code, str(epoch_ns)))
    ranked = cli("compare", "--experiment", "lost", "--resource", "energy,time", "--json", "-")
    assert ranked.status == 0, ranked.stderr
    assert "lossy" in ranked.stderr and lost in ranked.stderr
    rankings = json.loads(ranked.stdout)["rankings"]
    names = {r["resource"]: sorted(row["name"] for row in r["rows"]) for r in rankings}
    assert names == {"energy": ["better", "good"], "time": ["better", "good", "lossy"]}


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process of another program than the job's, which is called as the test asks."""
    script = f"exec -a '{request.param}' sleep 600"
    with ended(subprocess.Popen(["bash", "-c", script])) as process:
        yield process


@pytest.mark.parametrize(
    "server", ["nvidia-cuda-mps-server", "ray::train()", "tritonserver"], indirect=True
)
def test_a_gpu_whose_work_a_server_did_is_a_loud_warning_with_a_remedy_that_works(
    cli: Cli, nvml_sim: BuildNvml, server: subprocess.Popen[bytes]
) -> None:
    # given a job that computes on GPU 0, and a server that computes on GPU 1 at 300 W and waits
    # on GPU 2
    worker = (Process(server.pid, 2**30, sm=0.9),)
    idle = Gpu(Constant(70), processes=(Process(server.pid, 2**30),), utilization=Constant(0))
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(200)), Gpu(Constant(300), processes=worker), idle)))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "2")
    assert not gpu(summary, 1)["in_total"]
    found = [w for w in summary["warnings"] if w["code"] == "served-device"]
    assert [w["text"][:17] for w in found] == ["gpu:1 drew up to "]
    assert float(found[0]["text"].split()[4]) == pytest.approx(300, abs=30)  # late reads jitter
    assert f"PID {server.pid}" in found[0]["text"] and "--attribution device" in found[0]["hint"]
    # when what the hint says is done, then that GPU is counted
    _, whole = cli.measure("--sensor", sim.spec, "--attribution", "device", "--", "sleep", "2")
    assert gpu(whole, 1)["in_total"] and not gpu(whole, 2)["in_total"]
    begin_ns, end_ns = whole["recording"]["window_ns"]
    truth_j = (200 + 300) * (end_ns - begin_ns) * 1e-9
    of_gpus = [c for c in whole["energy"]["components"] if c["kind"] == "gpu" and c["in_total"]]
    assert sum(c["device_j"] for c in of_gpus) == pytest.approx(truth_j, rel=0.05)
    assert codes(whole, "gpu:1") == {"shared-device", "served-device"}


@pytest.mark.parametrize("server", ["tritonserver"], indirect=True)
def test_a_run_whose_work_a_server_did_is_not_ranked_as_cheap(
    cli: Cli, nvml_sim: BuildNvml, server: subprocess.Popen[bytes]
) -> None:
    # given a run that used a GPU itself, and one whose work may have been done by a server
    for processes in ((), (Process(server.pid, 2**30, sm=0.9),)):
        sim = nvml_sim(Scenario(gpus=(Gpu(Constant(300), processes=processes),)))
        name = "served" if processes else "own"
        _, summary = cli.measure("--name", name, "--sensor", sim.spec, "--", "sleep", "1.5")
        assert cli("runs", "set", summary["run_id"], "accuracy=0.9").status == 0
    own, served = sorted(run.name for run in cli.runs())
    # then the second one is named and left out
    result = cli("compare", "--mix-provenance", "--json", "-", own, served)
    assert f"left out {served}: its energy lacks gpu:{default_uuid(0)}" in result.stderr


@pytest.mark.parametrize("server", ["tritonserver"], indirect=True)
def test_a_server_that_works_at_low_power_or_in_bursts_is_noticed_too(
    cli: Cli, nvml_sim: BuildNvml, server: subprocess.Popen[bytes]
) -> None:
    # given boards whose mean power is that of an idle one: steady at 240 W of 700, and in bursts;
    # and one at 240 W with nobody on its list, and no utilisation
    worker = (Process(server.pid, 2**30, sm=0.9),)
    epoch_ns = time.monotonic_ns()
    burst = Gpu(Step(6.0, 60, 600), processes=worker, utilization=Constant(0))
    silent = Gpu(Constant(240), processes=(), utilization=Constant(0))
    steady = Gpu(Constant(240), processes=worker, utilization=Constant(0.9))
    sim = nvml_sim(Scenario(gpus=(steady, burst, silent), epoch_ns=epoch_ns))
    until = (
        f"import time; time.sleep(max(0, {epoch_ns + 7_300_000_000} - time.monotonic_ns()) / 1e9)"
    )
    _, summary = cli.measure("--sensor", sim.spec, "--", *python(until))
    found = {w["text"][:5] for w in summary["warnings"] if w["code"] == "served-device"}
    assert found == {"gpu:0", "gpu:1"}
    assert gpu(summary, 2)["in_total"]
    assert codes(summary, "gpu:2 is unknown: it drew up to") == {"whole-device"}


def test_a_counter_that_its_power_readings_contradict_has_a_u_that_says_so(
    cli: Cli, nvml_sim: BuildNvml
) -> None:
    # given a counter that shows a tenth of what the power readings do
    board = Gpu(Constant(300), counter_gain=0.1)
    sim = nvml_sim(Scenario(gpus=(board,)))
    _, summary = cli.measure("--sensor", sim.spec, "--attribution", "device", "--", "sleep", "3")
    part = gpu(summary, 0)
    truth_j = 300 * summary["duration_s"]
    assert codes(summary, "gpu:") & {"disagreement"}
    assert abs(part["device_j"] - truth_j) <= part["u_j"] <= 1.2 * truth_j
    assert summary["energy"]["u_j"] >= 0.9 * part["u_j"]


@pytest.mark.parametrize("server", ["nvidia-cuda-mps-server"], indirect=True)
def test_a_client_of_mps_is_matched_to_the_job(
    cli: Cli, nvml_sim: BuildNvml, server: subprocess.Popen[bytes]
) -> None:
    # given two clients of an MPS server, the job and another, and a GPU of the job's alone
    mps = Process(server.pid, 2**20)
    clients = (
        Process(STARTED, 2**30, sm=0.6, mps=True),
        Process(os.getpid(), 2**30, sm=0.2, mps=True),
    )
    boards = (
        Gpu(Constant(300), processes=(mps, clients[0])),
        Gpu(Constant(300), processes=(mps, *clients)),
    )
    sim = nvml_sim(Scenario(gpus=boards))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "2.2")
    alone, shared = (gpu(summary, index) for index in range(2))
    # then the server is nobody: the job has all of one, and its part of the other
    assert alone["job_j"] == pytest.approx(alone["device_j"], abs=alone["u_j"])
    assert (alone["others_j"], codes(summary, "gpu:0")) == (0.0, set())
    assert shared["job_j"] == pytest.approx(0.75 * shared["device_j"], rel=0.1)
    assert codes(summary, "gpu:1") == {"shared-device"}


def test_a_gpu_that_works_though_nobody_is_listed_is_counted(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given a driver that lists no process and knows no utilisation, as WSL2's
    silent = {"processes": (), "utilization": Constant(0)}
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(300), **silent), Gpu(Constant(60), **silent))))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "2")
    working, idle = (gpu(summary, index) for index in range(2))
    assert working["in_total"] and working["job_j"] == pytest.approx(working["device_j"])
    assert codes(summary, "gpu:0 is unknown: it drew up to") == {"whole-device"}
    assert not idle["in_total"] and codes(summary, "gpu:1") == set()
    # and one that the job cannot use is not, whatever it draws
    _, summary = cli.measure(
        "--sensor", sim.spec, "--", "sleep", "2", env={"CUDA_VISIBLE_DEVICES": "1"}
    )
    assert not gpu(summary, 0)["in_total"] and codes(summary, "gpu:0") == set()


def test_a_driver_that_is_not_there_is_missed_once(cli: Cli, tmp_path: Path) -> None:
    library = tmp_path / "libnvidia-ml.so.1"
    result = cli("--sensor", f"nvml:{library}", "--", "true")
    assert result.stderr.count("no NVIDIA driver library") == 1


@pytest.mark.parametrize(
    ("listed", "used"),
    [
        ("0,2", {0, 2}),
        ("2", {2}),
        (f"{default_uuid(1)}", {1}),
        ("GPU-00000000-0000-4000-8000-000000000003", {3}),
        ("-1", set()),
        ("", set()),
    ],
)
def test_gpus_that_the_job_cannot_use_are_listed_not_added(
    cli: Cli, nvml_sim: BuildNvml, listed: str, used: set[int]
) -> None:
    # given four boards of which nobody tells who uses them, and a job that may use some
    absent = ("nvmlDeviceGetComputeRunningProcesses_v3",)
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(100)),) * 4, absent=absent))
    _, summary = cli.measure(
        "--sensor", sim.spec, "--", "sleep", "0.7", env={"CUDA_VISIBLE_DEVICES": listed}
    )
    for index in range(4):
        part = gpu(summary, index)
        assert part["in_total"] == (index in used)
        # as long as it took, but for two refreshes
        assert part["device_j"] == pytest.approx(100 * summary["duration_s"], abs=100 * 0.2)
        assert (part["job_j"] > 0) == (index in used)
        assert adds_up(part)
        if index not in used:
            assert part["excluded"].endswith(f"(CUDA_VISIBLE_DEVICES={listed})")


def test_what_is_seen_on_a_gpu_outweighs_what_was_announced(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given a launcher that may use no GPU by its own environment, whose worker computes on one
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(100)), Gpu(Constant(100), processes=()))))
    _, summary = cli.measure(
        "--sensor", sim.spec, "--", "sleep", "1.2", env={"CUDA_VISIBLE_DEVICES": "1"}
    )
    assert gpu(summary, 0)["in_total"] and gpu(summary, 0)["job_j"] > 0


def test_scope_device_counts_whole_devices(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given a run of which the job has a quarter of a board, summarised both ways from one trace
    from pepr_profiler.summary.summarise import summarise
    from pepr_profiler.trace.events import EventWriter
    from pepr_profiler.trace.run_json import read_run

    me = Process(os.getpid(), 2**30, sm=0.75)
    board = Gpu(Constant(200), processes=(Process(STARTED, 2**30, sm=0.25), me))
    sim = nvml_sim(Scenario(gpus=(board,)))
    _, by_job = cli.measure("--sensor", sim.spec, "--", "sleep", "1.5")
    run = read_run(cli.runs()[0])
    run["recording"]["options"]["scope"] = "device"
    events = EventWriter(cli.runs()[0])
    events.metrics({"accuracy": 0.9})  # after its end: it counts there
    events.close()
    by_device = summarise(cli.runs()[0], run=run)
    job, device = by_job["energy"], by_device["energy"]
    assert (job["scope"], device["scope"]) == ("job", "device")
    assert gpu(by_job, 0)["job_j"] == pytest.approx(gpu(by_job, 0)["device_j"] / 4, rel=0.02)
    counted = [c for c in device["components"] if c["in_total"]]
    assert device["total_j"] == pytest.approx(sum(c["device_j"] for c in counted))
    assert device["total_j"] == pytest.approx(
        job["total_j"] + job["others_j"] + job["idle_j"], rel=1e-9
    )
    # and a metric was reached with the energy that is counted
    assert by_device["progress"]["energy_j"] == pytest.approx([device["total_j"]])


def test_an_attached_process_is_found_on_its_gpu(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    # given a program that computes on the second board, the only one that it may use, with a
    # stranger, where the lists of the first and the third tell nothing
    file = tmp_path / "processes"
    boards = (
        Gpu(Constant(100)),
        Gpu(Constant(400), processes=(), processes_file=file),
        Gpu(Constant(100)),
    )
    name = "nvmlDeviceGetComputeRunningProcesses"
    refused = tuple(Fault(name, "NOT_SUPPORTED", gpu=index) for index in (0, 2))
    sim = nvml_sim(Scenario(gpus=boards, faults=refused))
    target = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": default_uuid(1)},
    )
    with ended(target):
        file.write_text(f"{target.pid} 1000 0.6\n{stranger.pid} 1000 0.4\n")
        path = tmp_path / "attached.json"
        result = cli(
            *("attach", str(target.pid), "--duration", "2"),
            *("--sensor", sim.spec, "--json", str(path)),
        )
        target.communicate()
    assert result.status == 0, result.stderr
    summary = _read(path)
    used = gpu(summary, 1)
    assert used["job_j"] == pytest.approx(0.6 * used["device_j"], rel=0.01)
    assert adds_up(used)
    assert codes(summary, f"PID {stranger.pid}") == {"shared-device"}
    assert not gpu(summary, 0)["in_total"] and not gpu(summary, 2)["in_total"]


def test_a_daemon_of_the_job_is_the_jobs(cli: Cli, nvml_sim: BuildNvml, tmp_path: Path) -> None:
    # given a command that leaves its work to a daemon: forked twice, in a session of its own
    file = tmp_path / "processes"
    daemon = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        open(sys.argv[1], 'w').write(f'{os.getpid()} 1000 0.5\\n')\n"
        "        time.sleep(1.5)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "time.sleep(1.2)"
    )
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(200), processes=(), processes_file=file),)))
    _, summary = cli.measure("--sensor", sim.spec, "--", *python(daemon, str(file)))
    part = gpu(summary, 0)
    assert part["others_j"] == 0.0 and part["job_j"] > 180.0
    assert "whole-device" not in codes(summary)


def test_an_index_among_unlike_gpus_is_said_to_tell_nothing(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given a slow and a fast board, and a job that may use "0", whichever that is, and uses the
    # slow one
    slow = Gpu(Constant(50), name="NVIDIA T4")
    fast = Gpu(Constant(60), processes=(), utilization=Constant(0))
    sim = nvml_sim(Scenario(gpus=(slow, fast)))
    listed = {"CUDA_VISIBLE_DEVICES": "0"}
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "1.2", env=listed)
    assert codes(summary, "CUDA_VISIBLE_DEVICES=0") == {"cuda-order"}
    assert gpu(summary, 0)["in_total"] and not gpu(summary, 1)["in_total"]


def test_memory_of_gpus_that_two_drivers_read_adds_up(cli: Cli, tmp_path: Path) -> None:
    # given two lanes, each with the memory of a GPU of its own, and one of both GPUs
    rows = [(0.0, 3e9), (0.1, 4e9), (0.2, 3e9)]
    specs = [
        write_replay(tmp_path / name, [f"{name}/memory memory B 1 0 gauge nvml-memory"], rows)
        for name in ("a", "b")
    ]
    both = [f"{name}/memory memory B 1 0 gauge nvml-memory" for name in "ba"]
    specs.append(write_replay(tmp_path / "both", both, [(t, size, size) for t, size in rows]))
    arguments = [word for spec in specs for word in ("--sensor", spec)]
    _, summary = cli.measure(*arguments, "--", "sleep", "0.5")
    # then each GPU counts once, with the most that was in use on it
    assert summary["memory"]["gpu_peak_bytes"] == 8_000_000_000


def test_the_jobs_own_memory_is_known_where_its_processes_are(
    cli: Cli, nvml_sim: BuildNvml, stranger: subprocess.Popen[bytes]
) -> None:
    # given a board that holds 3 GiB, 1 GiB of it the job's, and another's board
    other = Process(stranger.pid, 2**31)
    held = Constant(3 * 2**30)
    boards = (
        Gpu(Constant(1), processes=(Process(STARTED, 2**30), other), memory_used_bytes=held),
        Gpu(Constant(1), processes=(other,), memory_used_bytes=held),
    )
    sim = nvml_sim(Scenario(gpus=boards))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "1.2")
    assert summary["memory"]["gpu_peak_bytes"] == 2**30
