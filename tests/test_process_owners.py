"""Whose a process is, found out from real ones while they live."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from cli import ended, until

from pepr_profiler.recording.launcher import Launch
from pepr_profiler.recording.processes import ProcessOwners, gpu_environments, run_around

NO_SUCH_PID = 4_194_303

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")

# At a line of input it computes for half a second, says so, and waits for the input's end.
BURN = """
import sys, time
until_s = time.process_time() + 0.5 if sys.stdin.readline() else 0.0
while time.process_time() < until_s: pass
print(flush=True); sys.stdin.read()
"""
# A parent that starts a child, says its PID and waits; "orphan": it ends, and the child lives on.
FAMILY = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {BURN!r}])
print(child.pid, flush=True)
if sys.argv[1] != "orphan": sys.stdin.read()
"""


# Told a PID, it starts a child that has it, says so, and waits.
TAKE_OVER = f"""
import os, subprocess, sys
pid = int(sys.stdin.readline())
while True:
    with open("{LAST_PID}", "w") as file: file.write(str(pid - 1))
    child = subprocess.Popen([sys.executable, "-c", {BURN!r}], stdin=subprocess.PIPE)
    if child.pid == pid: break
    child.communicate()
child.stdin.write(b"burn\\n"); child.stdin.flush()
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def all_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are written down however many processes are busy here."""
    monkeypatch.setattr("pepr_profiler.recording.processes._NAMED", 10_000)


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], int]]]:
    """Starts a family; the parent, and its child's PID. All end with their stdin."""
    running: list[subprocess.Popen[bytes]] = []

    def family(kind: str = "stay", **env: str) -> tuple[subprocess.Popen[bytes], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", FAMILY, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env},
        )
        running.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield family
    for process in running:
        with ended(process):
            process.communicate()


def running(code: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", code]
    return ended(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))


def say(process: subprocess.Popen[bytes], line: str) -> None:
    """Says it to the process, and waits for the answer."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line.encode() + b"\n")
    process.stdin.flush()
    process.stdout.readline()


def owners(notes: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(note["pid"], note["owner"]) for note in notes if note["event"] == "process"]


def test_descendants_of_a_wrapper_are_the_jobs_and_it_is_not(start: Any) -> None:
    # given a wrapper, which is this process: its children and theirs are the job
    parent, child = start()
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners("children", notes.append)
    seen.on_gpu([parent.pid, child, os.getpid(), 1])
    assert sorted(owners(notes)) == sorted(
        [(parent.pid, "job"), (child, "job"), (os.getpid(), "profiler"), (1, "other")]
    )
    # and each is noted once, with what it was
    seen.on_gpu([parent.pid, child, os.getpid(), 1])
    assert len(notes) == 4
    noted = next(note for note in notes if note["pid"] == parent.pid)
    assert noted["command"].startswith(f"{sys.executable} -c") and noted["user"]
    assert all(json.dumps(note) for note in notes)


def test_a_program_that_profiles_itself_is_the_job(start: Any) -> None:
    _, child = start()
    notes: list[dict[str, Any]] = []
    ProcessOwners("self", notes.append).on_gpu([os.getpid(), child, 1])
    assert dict(owners(notes)) == {os.getpid(): "job", child: "job", 1: "other"}


def test_an_attached_process_and_its_children_are_the_job(start: Any) -> None:
    target, child = start()
    stranger, _ = start()
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners(f"pids={target.pid}", notes.append)
    seen.on_gpu([target.pid, child, stranger.pid])
    assert dict(owners(notes)) == {target.pid: "job", child: "job", stranger.pid: "other"}


def test_what_is_in_a_cgroup_is_the_job(
    start: Any, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a process in a group below, and a stranger
    monkeypatch.setattr("pepr_profiler.recording.processes._NAMED", 10_000)  # who else is busy here
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (cgroup / "below").mkdir()
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    target, child = start("orphan", CUDA_VISIBLE_DEVICES="3", SLURM_PROCID="0", **step)
    stranger, other = start("orphan", SLURM_PROCID="1", **step)
    (cgroup / "below" / "cgroup.procs").write_text(str(child))
    root = f"cgroup={cgroup}"
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners(root, notes.append)
    seen.on_gpu([child, other, os.getpid()])
    assert dict(owners(notes)) == {child: "job", other: "other", os.getpid(): "profiler"}
    assert gpu_environments(root) == [{"CUDA_VISIBLE_DEVICES": "3"}]
    assert run_around("PEPR_RUN_DIR", root) is None
    launch = Launch.of_roots(root)
    assert (launch.job, launch.rank, launch.world_size) == ("slurm-7.0", 0, 2)
    # when they work, then only the stranger is another
    seen.tick()
    say(stranger, "burn")
    say(target, "burn")
    seen._scan()
    took = {process["pid"] for process in notes[-1]["processes"]}
    assert other in took
    assert child not in took
    # and two ranks in one group are no rank
    (cgroup / "cgroup.procs").write_text(str(other))
    launch = Launch.of_roots(root)
    assert (launch.job, launch.rank, launch.world_size) == ("slurm-7.0", None, None)


def test_who_was_the_jobs_stays_so_when_its_parent_has_gone(start: Any) -> None:
    # given an attached parent whose child was looked at, and then is an orphan
    target, child = start()
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners(f"pids={target.pid}", notes.append)
    seen.tick()
    orphaned = Path(f"/proc/{child}/stat")
    target.kill()
    target.wait()
    until(lambda: int(orphaned.read_text().rpartition(")")[2].split()[1]) != target.pid)
    seen.on_gpu([child])
    assert owners(notes) == [(child, "job")]


def test_an_orphan_that_bears_the_runs_mark_is_the_jobs(start: Any) -> None:
    # given orphans that nobody looked at before, one of them started within the run
    marked, plain = start("orphan", PEPR_RUN_DIR="/runs/a"), start("orphan")
    for parent, _ in (marked, plain):
        parent.wait()
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners("self", notes.append, marker=("PEPR_RUN_DIR", "/runs/a"))
    seen.on_gpu([marked[1], plain[1]])
    assert dict(owners(notes)) == {marked[1]: "job", plain[1]: "other"}


def test_what_bears_the_runs_mark_is_not_named_among_the_others(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pepr_profiler.recording.processes._NAMED", 10_000)  # who else is busy here
    target, _ = start()
    marked, plain = (start("orphan", PEPR_RUN_DIR=path) for path in ("/runs/a", "/runs/b"))
    notes: list[dict[str, Any]] = []
    mark = ("PEPR_RUN_DIR", "/runs/a")
    seen = ProcessOwners(f"pids={target.pid}", notes.append, marker=mark)
    seen.tick()
    say(marked[0], "burn")
    say(plain[0], "burn")
    seen._scan()
    took = {process["pid"] for process in notes[-1]["processes"]}
    assert plain[1] in took
    assert marked[1] not in took


def test_a_pid_that_is_listed_again_and_again_but_not_here_is_hidden() -> None:
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners("children", notes.append)
    seen.on_gpu([NO_SUCH_PID])
    assert notes == []
    seen.on_gpu([NO_SUCH_PID])
    seen.on_gpu([NO_SUCH_PID])
    assert owners(notes) == [(NO_SUCH_PID, "hidden")]


def test_one_that_ended_before_it_was_looked_up_has_gone() -> None:
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners("children", notes.append)
    seen.on_gpu([NO_SUCH_PID])
    seen.on_gpu([])
    assert owners(notes) == [(NO_SUCH_PID, "gone")]


def test_others_are_known_by_the_cpu_time_they_took(start: Any) -> None:
    # given a program that computes for half a second beside an attached job, and has ended since
    target, _ = start()
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners(f"pids={target.pid}", notes.append)
    seen.tick()
    with running(BURN) as burner:
        say(burner, "burn")
        seen._scan()
        burner.communicate()
    seen.end()
    last = [note for note in notes if note["event"] == "cpu"][-1]
    took = {process["pid"]: process for process in last["processes"]}
    assert took[burner.pid]["cpu_s"] == pytest.approx(0.5, abs=0.1)
    assert took[burner.pid]["command"].startswith(sys.executable)
    assert target.pid not in took and os.getpid() not in took
    assert last["profiler_s"] >= 0 and last["since_ns"] < last["t_ns"] <= time.monotonic_ns()


@pytest.mark.skipif(
    not os.access(LAST_PID, os.W_OK),
    reason="the next PID can be chosen only by root, on a kernel that can checkpoint",
)
def test_a_pid_that_is_given_out_again_is_another_process(start: Any) -> None:
    # given a stranger whose child lives on, and whose PID is given to a process of the job
    notes: list[dict[str, Any]] = []
    stranger, orphan = start()
    with running(TAKE_OVER) as target:
        seen = ProcessOwners(f"pids={target.pid}", notes.append)
        seen.tick()
        stranger.kill()
        stranger.wait()
        say(target, str(stranger.pid))
        # when the stranger's child computes, as the job does
        say(stranger, "burn")
        seen._scan()
        target.communicate()
    took = {process["pid"]: process["cpu_s"] for process in notes[-1]["processes"]}
    # then its time is its own, and that of the job's is not among the strangers'
    assert took[orphan] == pytest.approx(0.5, abs=0.1)
    assert stranger.pid not in took


def test_a_run_that_was_never_looked_at_is_not_looked_at_in_the_end() -> None:
    notes: list[dict[str, Any]] = []
    ProcessOwners("children", notes.append).end()
    assert notes == []


def test_the_roots_say_which_gpus_they_may_use(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    one, _ = start(CUDA_VISIBLE_DEVICES="0,1", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    two, _ = start(CUDA_VISIBLE_DEVICES="")
    assert gpu_environments("children") == [{"CUDA_VISIBLE_DEVICES": "5"}]
    assert gpu_environments(f"pids={one.pid},{two.pid},{NO_SUCH_PID}") == [
        {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        {"CUDA_VISIBLE_DEVICES": ""},
    ]


def test_the_run_around_is_found_in_an_ancestor(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEPR_RUN_DIR", raising=False)
    _, child = start(PEPR_RUN_DIR="/runs/outer")
    assert run_around("PEPR_RUN_DIR", f"pids={child}") == "/runs/outer"
    monkeypatch.setenv("PEPR_RUN_DIR", "/runs/mine")
    assert run_around("PEPR_RUN_DIR", "children") == "/runs/mine"


def test_nobody_is_looked_for_where_all_others_took_next_to_nothing() -> None:
    notes: list[dict[str, Any]] = []
    seen = ProcessOwners("self", notes.append)
    seen.tick(0.0)  # the first look, for what had been used before
    for others_s, looks in ((0.0, 0), (math.inf, 1)):
        seen._next_s = 0.0
        seen.tick(others_s)
        assert len(notes) == looks
