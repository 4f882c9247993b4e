"""Jobs of several processes under real launchers, against the truth of the simulated hardware."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli
from sim.powercap import BuildTree, Tree, Zone
from sim.waves import Constant

PACKAGE_W, DRAM_W = 100.0, 10.0

# Two ranks keep all CPUs busy. Every half a second of its block each says what it has used so far,
# by the kernel's account, and what everybody has.
TRAIN = """
import contextlib, json, os, sys, time
import torch
import torch.distributed as dist
from pepr_profiler import profile

spec, folder, who = sys.argv[1:4]
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(max(1, os.cpu_count() // size))

def busy_s():
    ticks = list(map(int, open("/proc/stat").readline().split()[1:8]))
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")

def compute(seconds):
    a, end = torch.rand(200, 200), time.monotonic() + seconds
    while time.monotonic() < end:
        a = torch.tanh(a @ a)

profiled = who in ("each", "wrapped") or rank == 0
compute(0.1)
dist.barrier()
block = profile("train", sensors=[spec]) if profiled else contextlib.nullcontext()
with block as run:
    used = [(time.monotonic(), time.process_time(), busy_s())]
    for epoch in range(4):
        name = "forward" if rank == 0 else "backward"
        with run.phase(name) if run else contextlib.nullcontext():
            for _ in range(2):
                compute(0.5)
                used.append((time.monotonic(), time.process_time(), busy_s()))
    if run:
        run.log(accuracy=0.9 if rank == 0 else 0.8)
json.dump(used, open(f"{folder}/truth-{rank}", "w"))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def machine(powercap_sim: BuildTree) -> Tree:
    """A package at 100 W with its memory at 10 W."""
    package = Zone("intel-rapl:0", "package-0", Constant(PACKAGE_W))
    dram = Zone("intel-rapl:0:0", "dram", Constant(DRAM_W))
    return powercap_sim(package, dram, live=True)


def launch(cli: Cli, *command: str, env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env=cli.environment(env), capture_output=True, timeout=SLOW_S, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def torchrun(cli: Cli, tree: Tree, who: str, *wrapper: str) -> dict[str, Any]:
    """A training of two ranks, and its job's summary as `report --job last` has it."""
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    script = cli.folder / "train.py"
    script.write_text(TRAIN)
    launch(
        cli,
        *(*wrapper, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", f"job-{who}"),
        *(str(script), tree.spec, str(cli.folder), who),
    )
    return report(cli, "last")


def report(cli: Cli, job: str) -> dict[str, Any]:
    shown = cli("report", "--job", job, "--json", "-")
    assert shown.status == 0, shown.stderr
    summary: dict[str, Any] = json.loads(shown.stdout)
    return summary


def truth_j(cli: Cli, *ranks: int) -> float:
    """What ranks took in their blocks, by the CPU time that the kernel counted for them.

    Step by step, since on a busy machine a CPU second costs more at one time than at another.
    """
    sum_j = 0.0
    for rank in ranks:
        used = json.loads((cli.folder / f"truth-{rank}").read_text())
        for before, after in itertools.pairwise(used):
            seconds, own_s, busy_s = (y - x for x, y in zip(before, after, strict=True))
            sum_j += (PACKAGE_W + DRAM_W) * seconds * min(1.0, own_s / busy_s)
    return sum_j


def sure(cli: Cli) -> float:
    """How sure that truth is, relatively.

    Where others have most of the CPUs, their use from step to step decides, and steps are not those
    of the profiler.
    """
    parts = []
    for path in cli.folder.glob("truth-*"):
        first, *_, last = json.loads(path.read_text())
        _, own_s, busy_s = (y - x for x, y in zip(first, last, strict=True))
        parts.append(own_s / busy_s)
    return 0.03 if sum(parts) > 0.5 else 0.10


@pytest.mark.long
def test_torchrun_a_block_in_each_rank_is_one_job_with_the_sum_of_both(
    cli: Cli, machine: Tree
) -> None:
    job = torchrun(cli, machine, "each")
    assert (job["job"], len(job["runs"]), job["world_size"]) == ("torchrun-job-each", 2, 2)
    assert [rank["rank"] for rank in job["ranks"]] == [0, 1]
    assert job["missing_ranks"] == []
    total_j = job["energy"]["total_j"]
    assert total_j == pytest.approx(truth_j(cli, 0, 1), rel=sure(cli))
    for rank in job["ranks"]:
        assert rank["energy_j"] == pytest.approx(truth_j(cli, rank["rank"]), rel=2 * sure(cli))
    assert sum(rank["share"] for rank in job["ranks"]) == pytest.approx(1)
    phases = {phase["name"]: phase["energy_j"] for phase in job["phases"]}
    assert sum(phases.values()) <= total_j
    # rank 0's word counts, and it is said that rank 1 disagrees
    assert job["performance"] == {"metric": "accuracy", "value": 0.9}
    assert "ranks-disagree" in {warning["code"] for warning in job["warnings"]}
    # and it is one row where runs are compared
    compared = cli("compare", "--json", "-", "--range", "0:1M")
    (ranking,) = json.loads(compared.stdout)["rankings"]
    assert [row["n"] for row in ranking["rows"]] == [1]
    assert ranking["rows"][0]["resource"] == pytest.approx(total_j)


@pytest.mark.long
def test_torchrun_in_a_wrapper_has_the_same_energy_and_phases_below_it(
    cli: Cli, machine: Tree
) -> None:
    profiler = (sys.executable, "-m", "pepr_profiler", "--sensor", machine.spec, "--job", "mine")
    job = torchrun(cli, machine, "wrapped", *profiler, "--")
    assert (job["job"], len(job["runs"]), job["missing_ranks"]) == ("mine", 1, [])
    phases = {phase["name"]: phase["energy_j"] for phase in job["phases"]}
    assert phases["train"] == pytest.approx(truth_j(cli, 0, 1), rel=sure(cli))
    # ranks are in phases of their own at the same time: each has its part of the energy
    inner_j = phases["forward"] + phases["backward"]
    assert inner_j == pytest.approx(truth_j(cli, 0, 1), rel=2 * sure(cli))
    assert inner_j <= phases["train"] <= job["energy"]["total_j"]
    assert job["energy"]["imputed"] is None
    waits = {(wait["phase"], wait["rank"]) for wait in job["stragglers"]}
    assert waits == {("train", 0), ("train", 1)}


@pytest.mark.long
def test_torchrun_a_block_in_rank_0_alone_says_what_it_lacks(cli: Cli, machine: Tree) -> None:
    job = torchrun(cli, machine, "first")
    energy = job["energy"]
    assert energy["total_j"] == pytest.approx(truth_j(cli, 0), rel=sure(cli))
    assert job["missing_ranks"] == [1]
    assert [part["id"] for part in energy["partial"]] == ["rank:1"]
    assert energy["imputed"]["total_j"] == pytest.approx(2 * energy["total_j"])
    shown = cli("report", "--job", "last").stdout.decode()
    assert "lower bound: there is no recording of rank 1 of 2" in shown
    assert "≥" in shown


def test_mpirun_of_wrapped_ranks_in_a_wrapper_counts_once(cli: Cli, machine: Tree) -> None:
    mpirun = shutil.which("mpirun.openmpi")
    if mpirun is None:
        pytest.skip("mpirun.openmpi is not installed (apt-get install openmpi-bin)")
    burn = "import time; end = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    profiler = (sys.executable, "-m", "pepr_profiler", "--sensor", machine.spec)
    own = ("--metric", r"accuracy=acc (\S+)")
    rank = (*profiler, *own, "--", sys.executable, "-c", f"print('acc 0.9')\n{burn}")
    options = ("--allow-run-as-root", "--oversubscribe", "-n", "2")
    launch(cli, *profiler, *own, "--name", "all", "--", mpirun, *options, *rank)
    job = report(cli, "last")
    assert len(job["runs"]) == 3
    assert [rank["rank"] for rank in job["ranks"]][:2] == [0, 1]
    outer = json.loads(cli("runs", "show", "all", "--json").stdout)
    assert job["energy"]["total_j"] == pytest.approx(outer["energy"]["total_j"])
    compared = json.loads(cli("compare", "--json", "-", "--range", "0:1M").stdout)
    (ranking,) = compared["rankings"]
    assert [row["n"] for row in ranking["rows"]] == [1]


# --- nodes --------------------------------------------------------------------------------------

NODE = """
mount --bind "$1" /proc/sys/kernel/random/boot_id && hostname "$2" && shift 2 && exec "$@"
"""


def node(folder: Path, name: str) -> list[str]:
    """What runs a command on a node of its own: a host name, a network and a boot id."""
    apart = ["unshare", "--mount", "--net", "--uts"]
    boot = folder / f"boot-{name}"
    boot.write_text(f"0000{name[-1]}000-0000-4000-8000-000000000000\n")
    command = [*apart, "sh", "-c", NODE, "sh", str(boot), name]
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no namespaces can be made here: {tried.stderr.decode().strip()}")
    return command


def test_two_nodes_are_told_apart_by_their_boots(cli: Cli, machine: Tree) -> None:
    # given two nodes with a package of the same name each, and one rank on each
    burn = "import time; end = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    profiler = (sys.executable, "-m", "pepr_profiler", "--sensor", machine.spec)
    started = []
    for rank in range(2):
        variables = {
            **{"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": str(rank)},
            **{"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "two"},
        }
        command = [*node(cli.folder, f"node{rank}"), *profiler, "--", sys.executable, "-c", burn]
        started.append(subprocess.Popen(command, env=cli.environment(variables)))
    assert [process.wait(timeout=SLOW_S) for process in started] == [0, 0]
    job = report(cli, "torchrun-two")
    # then each has a package and a memory of its own, and the job has all four
    devices = [(c["id"], c["host"]) for c in job["energy"]["components"]]
    packages = [host for ident, host in devices if ident == "cpu:package-0"]
    assert len(packages) == 2 and len(set(packages)) == 2
    assert [entry["host"] for entry in job["nodes"]] == ["node0", "node1"]
    runs = [json.loads((path / "run.json").read_text()) for path in cli.runs()]
    apart_j = sum(run["energy"]["total_j"] for run in runs)
    assert job["energy"]["total_j"] == pytest.approx(apart_j, rel=1e-6)
    shown = cli("report", "--job", "torchrun-t").stdout.decode()
    assert "job torchrun-two (2 ranks, 2 nodes)" in shown, shown


# --- finding a job ------------------------------------------------------------------------------


def test_a_job_is_found_by_its_id_by_a_prefix_and_by_a_run(cli: Cli, meter: str) -> None:
    for job in ("alpha-1", "alpha-2"):
        assert cli("--sensor", meter, "--job", job, "--", "sleep", "0.1").status == 0
    assert cli("--sensor", meter, "--name", "none", "--", "sleep", "0.1").status == 0
    run = cli.runs()[0].name
    assert report(cli, "alpha-1")["job"] == "alpha-1"
    assert report(cli, run)["runs"] == [run]
    assert report(cli, "last")["job"] is None
    for ref, what in (("alpha", "ambiguous"), ("beta", "there is no job 'beta'")):
        refused = cli("report", "--job", ref)
        assert refused.status == 2 and what in refused.stderr, refused.stderr
        assert "alpha-1" in refused.stderr and "alpha-2" in refused.stderr
    assert cli("report").status == 2
    assert cli("report", "last", "--job", "last").status == 2


def test_jobs_of_one_id_after_each_other_are_named_by_their_runs(cli: Cli, meter: str) -> None:
    for _ in range(2):
        assert cli("--sensor", meter, "--job", "again", "--", "sleep", "0.1").status == 0
    refused = cli("report", "--job", "again")
    names = [path.name for path in cli.runs()]
    assert refused.status == 2
    assert all(name in refused.stderr for name in names)
    assert report(cli, names[0])["runs"] == [names[0]]


def test_a_job_that_still_runs_is_shown_as_far_as_it_has_come(cli: Cli, meter: str) -> None:
    with cli.start("--sensor", meter, "--job", "live", "--", "sleep", "60") as process:
        try:
            deadline = time.monotonic() + SLOW_S
            while time.monotonic() < deadline:
                shown = cli("report", "--job", "live", "--json", "-")
                if shown.status == 0 and json.loads(shown.stdout)["duration_s"] > 1:
                    break
            job = json.loads(shown.stdout)
            assert not job["complete"]
            assert job["ranks"][0]["complete"] is False
            assert job["energy"]["total_j"] > 0
        finally:
            process.terminate()


def test_a_recording_that_cannot_be_read_is_named(cli: Cli, meter: str) -> None:
    started = [
        cli.start("--sensor", meter, "--job", "two", "--name", name, "--", "sleep", "2")
        for name in ("whole", "torn")
    ]
    for process in started:
        process.communicate(timeout=SLOW_S)
    (torn,) = [path for path in cli.runs() if path.name.startswith("torn")]
    (torn / "replay.arrows").unlink(missing_ok=True)
    for lane in torn.glob("*.arrows"):
        lane.unlink()
    job = report(cli, "two")
    assert len(job["runs"]) == 1
    assert torn.name in " ".join(item["what"] for item in job["missing"])


@pytest.mark.usefixtures("on_our_own")
def test_a_block_shows_its_job(tmp_path: Path, meter: str) -> None:
    from pepr_profiler import UsageError, profile

    run = profile("block", store=tmp_path / "store", sensors=[meter], job="mine")
    with pytest.raises(UsageError):
        run.job_summary()
    with run:
        inside = run.job_summary()
    job = run.job_summary()
    assert (inside["complete"], job["complete"]) == (False, True)
    assert (job["job"], job["runs"]) == ("mine", [run.run_id])
    assert job["energy"]["total_j"] == pytest.approx(run.summary["energy"]["total_j"])
