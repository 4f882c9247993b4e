"""Which part of its job a process is: by what launchers set, and under the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli
from launchers import HOST as NODE
from launchers import module, program

from pepr_profiler import UsageError, profile
from pepr_profiler.recording.launcher import Launch
from pepr_profiler.trace.events import EventWriter, read_events

HOST = os.uname().nodename

# --- what each launcher sets ----------------------------------------------------------------------

TORCHRUN = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
    **{"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"},
    **{"TORCHELASTIC_RUN_ID": "abc", "TORCHELASTIC_RESTART_COUNT": "0"},
}
SLURM_BATCH = {
    **{"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},
    "SLURMD_NODENAME": "n1",
}
SLURM = {**SLURM_BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
OPENMPI = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"PMIX_NAMESPACE": "50987009", "PMIX_RANK": "3", "PMIX_HOSTNAME": "n2"},
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "8"}
RAY = {"RAY_RAYLET_PID": "7512", "RAY_JOB_ID": "ffffffff"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "sweep-2", "JOB_COMPLETION_INDEX": "2"}
KUBEFLOW = {
    **{"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "bert-worker-0"},
    **{"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "bert-master-0", "MASTER_PORT": "23456"},
}
DEEPSPEED = {
    **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"},
    **{"CROSS_RANK": "1", "CROSS_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"},
}
LIGHTNING = {
    **{"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "56971"},
}
JOB_SET = {**POD, "JOBSET_NAME": "pretrain", "JOBSET_RESTART_ATTEMPT": "2"}

CASES: dict[str, tuple[Mapping[str, str], tuple[object, ...]]] = {
    "a rank that there cannot be": (
        {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"},
        ("torch-n1:", None, None, None, None, None, None),
    ),
    "nothing": ({}, (None, None, None, None, None, None, None)),
    "only PEPR_JOB": ({"PEPR_JOB": "mine"}, ("mine", None, None, None, None, None, None)),
    "torchrun": (TORCHRUN, ("torchrun-abc", 1, 1, 4, "0", "torchrun", 0)),
    "torchrun, no id": (
        {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"},
        ("torchrun-n1:29500", 1, 1, 4, "0", "torchrun", 0),
    ),
    "torchrun, restarted": (
        {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"},
        ("torchrun-abc#2", 1, 1, 4, "0", "torchrun", 2),
    ),
    "accelerate": (
        {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"},
        ("accelerate-abc", 1, 1, 4, "0", "accelerate", 0),
    ),
    "deepspeed": (DEEPSPEED, ("deepspeed-n1:29500", 5, 1, 8, "1", "deepspeed", None)),
    "lightning": (LIGHTNING, (f"lightning-{HOST}:56971", 1, 1, 2, "0", "lightning", None)),
    "lightning, second node": (
        {**LIGHTNING, "NODE_RANK": "1", "MASTER_ADDR": "n1"},
        ("lightning-n1:56971", None, 1, 2, "1", "lightning", None),
    ),
    "slurm task": (SLURM, ("slurm-1234.0", 1, 0, 2, "n1", "slurm", 0)),
    "slurm task, requeued": (
        {**SLURM, "SLURM_RESTART_COUNT": "1"},
        ("slurm-1234.0#1", 1, 0, 2, "n1", "slurm", 1),
    ),
    # A batch script has the variables of its first task, and is none.
    "slurm batch script": (SLURM_BATCH, ("slurm-1234", None, None, None, "n1", "slurm", 0)),
    "slurm interactive step": (
        {**SLURM, "SLURM_STEP_ID": "4294967290"},
        ("slurm-1234", None, None, None, "n1", "slurm", 0),
    ),
    "slurm with PMI-2": (
        {**SLURM, "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_JOBID": "1234.0"},
        ("slurm-1234.0", 1, 0, 2, "n1", "slurm", 0),
    ),
    "slurm with PMIx": (
        {**SLURM, "PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.1234.0"},
        ("slurm-1234.0", 1, 0, 2, "n1", "slurm", 0),
    ),
    "openmpi": (OPENMPI, ("openmpi-50987009", 3, 1, 4, "n2", "openmpi", None)),
    "PMIx": (
        {"PMIX_RANK": "2", "PMIX_NAMESPACE": "prterun-n1-7@1"},
        ("pmix-prterun-n1-7@1", 2, None, None, None, "pmix", None),
    ),
    "mpich": (MPICH, ("mpich-n1:46561", 1, 1, 2, None, "mpich", None)),
    "ray": (RAY, (None, None, None, None, None, "ray", None)),
    "ray, with a job": (
        {**RAY, "RAY_JOB_ID": "02000000"},
        ("ray-02000000", None, None, None, None, "ray", None),
    ),
    "indexed job": (POD, ("k8s-sweep", 2, None, None, "2", "kubernetes", None)),
    "JobSet": (JOB_SET, ("k8s-pretrain#2", None, None, None, "2", "kubernetes", 2)),
    "kubeflow": (
        KUBEFLOW,
        ("torch-bert-master-0:23456", 1, None, 2, None, "kubernetes", None),
    ),
    # The innermost launcher knows the rank; each part of the job's name is the same in all ranks.
    "torchrun in slurm": (
        {**SLURM, **TORCHRUN},
        ("slurm-1234/torchrun-abc", 1, 1, 4, "n1", "torchrun", 0),
    ),
    "torchrun in a requeued slurm job, restarted": (
        {**SLURM, **TORCHRUN, "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RESTART_COUNT": "2"},
        ("slurm-1234#1/torchrun-abc#2", 1, 1, 4, "n1", "torchrun", 3),
    ),
    "mpirun in slurm, on its first node": (
        {**SLURM_BATCH, **OPENMPI},
        ("slurm-1234/openmpi-50987009", 3, 1, 4, "n1", "openmpi", 0),
    ),
    "mpirun in slurm, on another node": (
        {**SLURM, **OPENMPI},
        ("slurm-1234/openmpi-50987009", 3, 1, 4, "n1", "openmpi", 0),
    ),
    "ray in slurm": (
        {**SLURM, **RAY, "RAY_JOB_ID": "02000000"},
        ("slurm-1234/ray-02000000", None, None, None, "n1", "ray", 0),
    ),
    "ray train": (
        {**RAY, **{k: v for k, v in TORCHRUN.items() if "ELASTIC" not in k}},
        ("torch-n1:29500", 1, 1, 4, "0", "ray", None),
    ),
    "torchrun in JobSet": (
        {**JOB_SET, **TORCHRUN},
        ("k8s-pretrain#2/torchrun-abc", 1, 1, 4, "0", "torchrun", 2),
    ),
    "PEPR_JOB outweighs all": (
        {**SLURM, "PEPR_JOB": "mine"},
        ("mine", 1, 0, 2, "n1", "slurm", 0),
    ),
    "nonsense": ({"RANK": "x", "WORLD_SIZE": "-1", "SLURM_JOB_ID": ""}, (None,) * 7),
}


@pytest.mark.parametrize("case", CASES)
def test_a_process_knows_who_it_is(case: str) -> None:
    environ, expected = CASES[case]
    parents = [("/usr/bin/hydra_pmi_proxy", "--control-port", "n1:46561"), ("mpiexec",)]
    assert tuple(Launch.of(environ, parents=parents)) == expected


def test_a_file_of_events_says_its_rank_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        folder = tmp_path / f"of-{rank}"
        folder.mkdir()
        writer = EventWriter(folder, rank_facts=lambda rank=rank: {"rank": rank, "world_size": 2})
        writer.begin('"train"', 1, None)
        writer.end(1)
        writer.metrics({"acc": 0.5 + rank})
        writer.mark("begin", "eval", series="s")
        writer.close()
        (path,) = folder.iterdir()
        assert path.read_text().count('"event": "rank"') == 1
        path.rename(tmp_path / f"events-host-{rank}.jsonl")
    events = read_events(tmp_path)
    assert events.torn_lines == 0
    assert {(p.name, p.rank) for p in events.phases} == {
        *(("train", 0), ("train", 1), ("eval", 0), ("eval", 1))
    }
    assert sorted(zip(events.ranks, (v["acc"] for _, v in events.metrics), strict=True)) == [
        *((0, 0.5), (1, 1.5))
    ]


def test_a_block_takes_a_job(meter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with profile("named", sensors=[meter], job="mine") as run:
        pass
    assert run.summary["job"] == "mine"
    monkeypatch.setenv("PEPR_JOB", "theirs")
    with profile("of the environment", sensors=[meter]) as run:
        pass
    assert run.summary["job"] == "theirs"
    with pytest.raises(UsageError, match="job=3"):
        profile("no text", job=3)  # type: ignore[arg-type]


def test_a_summary_shows_its_rank(cli: Cli, meter: str) -> None:
    result, summary = cli.measure("--sensor", meter, "--", "true", env=SLURM)
    assert (summary["job"], summary["rank"], summary["world_size"]) == ("slurm-1234.0", 1, 2)
    assert "  rank         1 of 2 (slurm), job slurm-1234.0\n" in result.stderr
    _, summary = cli.measure(
        "--sensor", meter, "--", "true", env={**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}
    )
    assert (summary["rank"], summary["local_world_size"]) == (1, 2)
    result, summary = cli.measure("--sensor", meter, "--", "true")
    assert summary["rank"] is None
    assert "  rank " not in result.stderr


def test_what_is_attached_to_says_who_it_is(cli: Cli, meter: str) -> None:
    with subprocess.Popen(["sleep", "100"], env={**os.environ, **SLURM}) as target:
        try:
            options = ("--sensor", meter, "--duration", "0.2s")
            result, summary = cli.measure(*options, str(target.pid), verb="attach", env=OPENMPI)
        finally:
            target.kill()
    assert result.status == 0, result.stderr
    assert (summary["job"], summary["rank"], summary["launcher"]) == ("slurm-1234.0", 1, "slurm")


# --- real launchers -------------------------------------------------------------------------------

TRAIN = """if True:
    import json, os, sys, time
    from pepr_profiler import profile
    if os.environ.get("RANK", "0") == "0" or "each" in sys.argv:
        with profile("train", sensors=[sys.argv[1]], scope="device") as run:
            with run.phase("fit"):
                time.sleep(0.3)
            run.log(acc=float(os.environ.get("RANK", 0)))
    else:
        time.sleep(0.3)
"""


@pytest.fixture
def train(tmp_path: Path) -> str:
    """The path of a program that records itself: `train.py SENSOR [each]`."""
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return str(path)


def identities(cli: Cli) -> list[dict[str, Any]]:
    """Who each recording of the store says it is, by rank."""
    runs = [json.loads((run / "run.json").read_text()) for run in cli.runs()]
    assert all(run["complete"] for run in runs)
    return sorted(runs, key=lambda run: (run["rank"] is not None, run["rank"] or 0))


def launch(cli: Cli, *command: str, env: Mapping[str, str] | None = None) -> str:
    """Runs a launcher to its good end; what it printed."""
    with subprocess.Popen(
        command,
        env=cli.environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as launcher:
        try:
            out, err = launcher.communicate(timeout=3 * SLOW_S)  # torch alone may take a third
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)  # its ranks wait for each other for ever
            raise
    assert launcher.returncode == 0, err.decode()
    return out.decode()


def test_torchrun_each_rank_says_who_it_is(cli: Cli, train: str, meter: str) -> None:
    module("torch")
    launch(
        cli,
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *(train, meter, "each"),
    )
    first, second = identities(cli)
    assert first["job"] == second["job"]
    assert first["job"].startswith("torchrun-")
    assert [(r["rank"], r["local_rank"], r["world_size"]) for r in (first, second)] == [
        *((0, 0, 2), (1, 1, 2))
    ]
    assert {r["launcher"] for r in (first, second)} == {"torchrun"}
    assert {r["attempt"] for r in (first, second)} == {0}


@pytest.mark.long
def test_torchrun_rank_0_alone_says_how_many_there_are(cli: Cli, train: str, meter: str) -> None:
    module("torch")
    launch(
        cli,
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", train, meter),
    )
    (only,) = identities(cli)
    assert (only["rank"], only["world_size"]) == (0, 2)


@pytest.mark.long
def test_torchrun_in_a_wrapper_is_one_run_whose_marks_have_ranks(
    cli: Cli, train: str, meter: str
) -> None:
    module("torch")
    result, summary = cli.measure(
        *("--sensor", meter, "--", sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", "2", train, meter, "each"),
    )
    assert result.status == 0, result.stderr
    (directory,) = cli.runs()
    assert (summary["job"], summary["rank"], summary["launcher"]) == (None, None, None)
    events = read_events(directory)
    assert {(p.name, p.rank) for p in events.phases} == {
        *(("train", 0), ("train", 1), ("fit", 0), ("fit", 1))
    }
    # Each rank logged its own; the lowest rank's is the run's, whichever wrote last.
    assert sorted(rank or 0 for rank in events.ranks) == [0, 1]
    assert summary["metrics"]["acc"] == 0.0


@pytest.mark.long
def test_torchrun_each_rank_is_wrapped(cli: Cli, meter: str) -> None:
    module("torch")
    profiler = (sys.executable, "-m", "pepr_profiler", "-q", "--sensor", meter)
    launch(
        cli,
        *(sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2"),
        *(*profiler, "--", "sleep", "0.2"),
    )
    first, second = identities(cli)
    assert [(r["rank"], r["world_size"]) for r in (first, second)] == [(0, 2), (1, 2)]
    assert first["job"] == second["job"]
    assert first["name"] == "sleep"


@pytest.mark.long
def test_torchrun_a_restart_is_another_attempt(cli: Cli, tmp_path: Path, meter: str) -> None:
    module("torch")
    path = tmp_path / "fails_once.py"
    path.write_text(
        TRAIN + '    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": raise SystemExit(1)\n'
    )
    launch(
        cli,
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"),
        *("--max-restarts", "1", "--monitor-interval", "0.1", str(path), meter),
    )
    jobs = {run["attempt"]: run["job"] for run in identities(cli)}
    assert jobs.keys() == {0, 1}
    assert jobs[1] == f"{jobs[0]}#1"


@pytest.mark.long
def test_accelerate_says_who_it_is(cli: Cli, train: str, meter: str) -> None:
    module("accelerate")
    launch(
        cli,
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(train, meter),
    )
    (only,) = identities(cli)  # one process: accelerate starts it as it is
    assert only["rank"] is None


@pytest.mark.long
def test_lightning_each_process_says_who_it_is(cli: Cli, tmp_path: Path, meter: str) -> None:
    module("lightning")
    path = tmp_path / "fabric.py"
    path.write_text(
        "import sys\n"
        "from lightning.fabric import Fabric\n"
        "fabric = Fabric(accelerator='cpu', devices=2, strategy='ddp')\n"
        "fabric.launch()\n" + TRAIN
    )
    launch(cli, sys.executable, str(path), meter, "each")
    first, second = identities(cli)
    assert [r["rank"] for r in (first, second)] == [0, 1]
    assert first["job"] == second["job"]
    assert {r["launcher"] for r in (first, second)} == {"lightning"}


MPIRUN = {
    "openmpi": ("mpirun.openmpi", "openmpi-bin", ("--allow-run-as-root", "--oversubscribe")),
    "mpich": ("mpirun.mpich", "mpich", ()),
}


@pytest.mark.parametrize("kind", MPIRUN)
def test_mpi_each_rank_says_who_it_is(cli: Cli, train: str, meter: str, kind: str) -> None:
    name, package, options = MPIRUN[kind]
    mpirun = program(name, package)
    launch(cli, mpirun, *options, "-n", "2", sys.executable, train, meter, "each")
    first, second = identities(cli)
    assert [(r["rank"], r["world_size"], r["launcher"]) for r in (first, second)] == [
        *((0, 2, kind), (1, 2, kind))
    ]
    assert first["job"] == second["job"]
    assert first["job"].startswith(f"{kind}-")


@pytest.mark.parametrize("kind", MPIRUN)
def test_mpi_each_rank_is_wrapped(cli: Cli, meter: str, kind: str) -> None:
    name, package, options = MPIRUN[kind]
    mpirun = program(name, package)
    profiler = (sys.executable, "-m", "pepr_profiler", "-q", "--sensor", meter)
    launch(cli, mpirun, *options, "-n", "2", *profiler, "--", "sleep", "0.2")
    first, second = identities(cli)
    assert [r["rank"] for r in (first, second)] == [0, 1]
    assert first["job"] == second["job"]


RAY_DRIVER = """if True:
    import logging, os, sys, time
    import ray
    from pepr_profiler import profile
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    @ray.remote
    def work(sensor):
        with profile("task", sensors=[sensor]):
            time.sleep(0.2)
    ray.get([work.remote(sys.argv[1]) for _ in range(2)])
    with profile("driver", sensors=[sys.argv[1]]):
        pass
"""


@pytest.mark.long
def test_ray_tasks_and_their_driver_are_of_one_job(cli: Cli, tmp_path: Path, meter: str) -> None:
    module("ray")
    path = tmp_path / "driver.py"
    path.write_text(RAY_DRIVER)
    # Sockets of Ray lie in TMPDIR, and their paths may have 107 bytes.
    launch(cli, sys.executable, str(path), meter, env={"TMPDIR": "/tmp"})
    runs = identities(cli)
    assert sorted(run["name"] for run in runs) == ["driver", "task", "task"]
    (job,) = {run["job"] for run in runs}
    assert job.startswith("ray-01000000@")
    assert {run["launcher"] for run in runs} == {"ray"}


# --- Slurm, on this machine -----------------------------------------------------------------------


def test_slurm_each_task_says_who_it_is(
    cli: Cli, train: str, meter: str, slurm: dict[str, str]
) -> None:
    launch(cli, "srun", "-n", "2", "-O", sys.executable, train, meter, "each", env=slurm)
    first, second = identities(cli)
    assert [(r["rank"], r["local_rank"], r["world_size"]) for r in (first, second)] == [
        *((0, 0, 2), (1, 1, 2))
    ]
    assert first["job"] == second["job"]
    assert first["job"].startswith("slurm-")
    assert first["job"].endswith(".0")
    assert {r["launcher"] for r in (first, second)} == {"slurm"}
    assert {r["node"] for r in (first, second)} == {NODE}


def test_slurm_a_batch_script_is_no_task(
    cli: Cli, meter: str, tmp_path: Path, slurm: dict[str, str]
) -> None:
    batch = tmp_path / "job.sh"
    profiler = f"{sys.executable} -m pepr_profiler -q --sensor {meter}"
    batch.write_text(
        f"#!/bin/sh\n{profiler} --name whole -- sleep 0.1\n"
        f"srun -n 2 -O {profiler} --name task -- sleep 0.1\n"
    )
    launch(cli, "sbatch", "-W", "-n", "2", "-O", "-o", str(tmp_path / "out"), str(batch), env=slurm)
    whole, *tasks = identities(cli)
    assert (whole["name"], whole["rank"], whole["launcher"]) == ("whole", None, "slurm")
    assert [task["rank"] for task in tasks] == [0, 1]
    assert {task["job"] for task in tasks} == {f"{whole['job']}.0"}
