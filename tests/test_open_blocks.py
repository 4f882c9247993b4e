"""Blocks that are open at once: which join, which are runs of their own, and whose energy it is."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import SLOW_S, Cli, codes, component
from sim.nvml import BuildNvml, Gpu, Process, Scenario, default_uuid
from sim.powercap import BuildTree, Tree, Zone
from sim.waves import Constant

import pepr_profiler
from pepr_profiler import UsageError, _core, profile
from pepr_profiler.daemon.claims import RunClaims
from pepr_profiler.energy.activity import Activity, DeviceUse
from pepr_profiler.energy.blocks import BlockPart
from pepr_profiler.study.jobs import merge_jobs
from pepr_profiler.trace.events import read_process_notes
from pepr_profiler.trace.lane import LaneReader
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

pytestmark = pytest.mark.usefixtures("on_our_own")

MACHINE_W = 110.0


@pytest.fixture
def machine(powercap_sim: BuildTree) -> Tree:
    """A package at 100 W with its memory at 10 W."""
    package = Zone("intel-rapl:0", "package-0", Constant(100.0))
    return powercap_sim(package, Zone("intel-rapl:0:0", "dram", Constant(10.0)), live=True)


def burn(cpu_s: float) -> None:
    """Takes so much CPU time of this thread."""
    begin_s = time.thread_time()
    while time.thread_time() - begin_s < cpu_s:
        pass


def total_j(run: pepr_profiler.Run) -> float:
    total = run.summary["energy"]["total_j"]
    assert isinstance(total, float)
    return total


def run_program(cli: Cli, code: str, *arguments: str) -> list[Any]:
    """The lines of JSON that a user's program prints."""
    program = cli.folder / "program.py"
    program.write_text(code)
    done = subprocess.run([sys.executable, str(program), *arguments], env=cli.environment(),
                          capture_output=True, timeout=SLOW_S, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"[")]


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What these give, each in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(SLOW_S) for future in [pool.submit(work) for work in works]]


# --- threads --------------------------------------------------------------------------------------


THREADS = """
import contextlib, json, os, sys, threading, time, warnings
from pepr_profiler import profile
warnings.simplefilter("ignore")
spec, around = sys.argv[1], sys.argv[2:]
meet = threading.Barrier(3)
found = {}

def trial(number):  # they take CPU time as 1 : 2 : 3
    with profile(f"trial{number}", sensors=[spec]) as run:
        meet.wait()
        begin_s = time.thread_time()
        while (own_s := time.thread_time() - begin_s) < 0.5 * number: pass
        meet.wait()
    found[number] = run, own_s

outer = profile("study", sensors=[spec]) if around else contextlib.nullcontext()
with outer as study:
    threads = [threading.Thread(target=trial, args=(number,)) for number in (1, 2, 3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(json.dumps([[run.joined, run.summary, own_s] for run, own_s in found.values()]))
print(json.dumps([study and study.summary, os.environ.get("PEPR_RUN_DIR")]))
"""


@pytest.mark.parametrize("around", [False, True], ids=["alone", "in a block"])
def test_blocks_of_threads_are_runs_whose_energies_add_up(
    cli: Cli, machine: Tree, around: bool
) -> None:
    trials, [study, mark] = run_program(cli, THREADS, machine.spec, *["study"] * around)
    assert mark is None and len(cli.runs()) == 3 + around
    summaries = [summary for _, summary, _ in trials]
    sum_j = sum(summary["energy"]["total_j"] for summary in summaries)
    for joined, summary, own_s in trials:
        # what a second of CPU time costs varies with what else runs here, and equal parts are 1/3
        assert summary["energy"]["total_j"] / sum_j == pytest.approx(own_s / 3.0, abs=0.1)
        assert not joined
        assert "shared-process" in codes(
            summary, "shared the machine and its process with run trial"
        )
        outer = summary["recording"]["outer"]
        assert (outer and outer["run_id"]) == (study and study["run_id"])
        assert summary["energy"]["u_j"] < 0.4 * summary["energy"]["total_j"]
    assert sum_j < MACHINE_W * max(summary["duration_s"] for summary in summaries)
    # and where they are one job, that has them once
    recorded = [*filter(None, [study]), *summaries]
    (job,) = merge_jobs([{**summary, "job": "search"} for summary in recorded])
    whole_j = study["energy"]["total_j"] if around else sum_j
    assert job["energy"]["total_j"] == pytest.approx(whole_j, rel=1e-6)
    assert "shared-process" not in codes(job)
    if around:
        assert "blocks-within" in codes(study, "and its energy has theirs: trial")
        assert 0.85 * study["energy"]["total_j"] < sum_j < study["energy"]["total_j"]


def test_a_device_that_knows_processes_alone_is_divided_and_that_is_said(meter: str) -> None:
    meet = threading.Barrier(2, timeout=SLOW_S)

    def trial() -> pepr_profiler.Run:
        with profile("trial", sensors=[meter]) as run:
            meet.wait()
            threading.Event().wait(0.5)
            meet.wait()
        return run

    begin_s = time.monotonic()
    runs = at_once(trial, trial)
    most_j = 100 * (time.monotonic() - begin_s)
    meters = [component(run.summary, "gpu:meter") for run in runs]
    # truth: 100 W, of which nobody knows whose it was: any part, from nothing to all
    apart_s = abs(runs[0].summary["duration_s"] - runs[1].summary["duration_s"])
    for run, part in zip(runs, meters, strict=True):
        half_j = 50 * run.summary["duration_s"]
        assert half_j - 1 <= part["job_j"] <= half_j + 50 * (apart_s + 0.1)
        assert part["job_j"] + part["others_j"] == pytest.approx(part["device_j"])
        assert part["u_j"] == pytest.approx(half_j / np.sqrt(3) * 2, rel=0.3)
        assert "shared-process" in codes(run.summary, "gpu:meter it was cannot be told apart")
    assert sum(part["job_j"] for part in meters) <= most_j


def test_a_gpu_that_the_process_shares_is_divided_among_its_blocks(nvml_sim: BuildNvml) -> None:
    # given 400 W, half of which is this process's, and half another's, which is around it
    users = (Process(os.getpid(), 2**30, sm=0.3), Process(os.getppid(), 2**30, sm=0.3))
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(400), processes=users),)))
    meet = threading.Barrier(2, timeout=SLOW_S)

    def trial() -> pepr_profiler.Run:
        with profile("trial", sensors=[sim.spec]) as run:
            meet.wait()
            threading.Event().wait(2.0)
            meet.wait()
        return run

    runs = at_once(trial, trial)
    parts = [component(run.summary, f"gpu:{default_uuid(0)}") for run in runs]
    for part in parts:
        # (a half while the other one is not in its block yet)
        assert part["job_j"] == pytest.approx(part["device_j"] / 4, rel=0.25)
        assert part["job_j"] + part["others_j"] + part["idle_j"] == pytest.approx(part["device_j"])
        assert part["u_j"] > 1.1 * part["job_j"]  # any part of the half, from nothing to all
    assert all("shared-process" in codes(run.summary, "cannot be told apart") for run in runs)


def test_what_a_thread_starts_is_its_blocks(machine: Tree) -> None:
    with ThreadPoolExecutor(1) as pool:
        if not pool.submit(lambda: _core.ThreadClock().counts_started).result():
            pytest.skip("the kernel does not permit perf here")
    meet = threading.Barrier(2, timeout=SLOW_S)

    def trial(*command: str) -> pepr_profiler.Run:
        with profile("trial", sensors=[machine.spec]) as run:
            meet.wait()
            if command:
                subprocess.run(command, check=True)
                thread = threading.Thread(target=burn, args=(0.2,))
                thread.start()
                thread.join()
            meet.wait()
        return run

    code = "import time\nwhile time.process_time() < 0.7: pass"
    busy, idle = at_once(lambda: trial(sys.executable, "-c", code), trial)
    assert total_j(idle) < 0.25 * total_j(busy)


def test_blocks_of_a_program_that_is_killed_have_their_parts(cli: Cli, meter: str) -> None:
    code = """
import os, signal, sys, threading, time
from pepr_profiler import profile
meet = threading.Barrier(2)
def work():
    with profile("killed", sensors=sys.argv[1:], cpu_power="1:2"):
        meet.wait()
        time.sleep(1.5)  # beyond a flush
        os.kill(os.getpid(), signal.SIGKILL)
for _ in range(2): threading.Thread(target=work).start()
"""
    command = [sys.executable, "-c", code, meter]
    done = subprocess.run(command, env=cli.environment(), timeout=SLOW_S, check=False)
    assert done.returncode == -9
    for summary in map(cli.report, cli.runs()):
        part = component(summary, "gpu:meter")
        assert not summary["complete"]
        # a half, but for when the other had not begun
        assert 0.45 * part["device_j"] < part["job_j"] < 0.75 * part["device_j"]
        assert "shared-process" in codes(summary)


def test_a_block_that_follows_another_has_the_process_to_itself(meter: str) -> None:
    def trial() -> dict[str, Any]:
        with profile("trial", sensors=[meter]) as run:
            threading.Event().wait(0.1)
        return run.summary

    with ThreadPoolExecutor(1) as pool:
        for summary in (pool.submit(trial).result(), pool.submit(trial).result()):
            part = component(summary, "gpu:meter")
            assert part["job_j"] == pytest.approx(100 * summary["duration_s"], rel=1e-6)
            assert "shared-process" not in codes(summary)


def test_a_block_of_the_main_thread_is_beside_one_that_was_open_before(meter: str) -> None:
    open_, close = threading.Event(), threading.Event()

    def first() -> dict[str, Any]:
        with (
            profile("first", sensors=[meter]) as run,
            profile("inner", sensors=[meter], join="never") as inner,
        ):
            open_.set()
            close.wait(SLOW_S)
        part = component(inner.summary, "gpu:meter")
        assert part["job_j"] < 0.9 * part["device_j"]  # inside of what is divided
        return run.summary

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(first)
        open_.wait(SLOW_S)
        with profile("main", sensors=[meter]) as main:
            close.wait(0.5)
        close.set()
        summary = future.result(SLOW_S)
    whole, part = component(summary, "gpu:meter"), component(main.summary, "gpu:meter")
    assert main.summary["recording"]["outer"] is summary["recording"]["outer"] is None
    # truth: the first one was there all the time, and has what the other has not
    assert part["job_j"] == pytest.approx(part["device_j"] / 2, rel=0.02)
    assert whole["job_j"] + part["job_j"] == pytest.approx(whole["device_j"], rel=0.02)


def test_a_thread_that_outlives_the_block_around_it_has_the_process_then(meter: str) -> None:
    open_, close = threading.Event(), threading.Event()

    def inner() -> dict[str, Any]:
        with profile("inner", sensors=[meter]) as run:
            open_.set()
            close.wait(SLOW_S)
            threading.Event().wait(0.3)
        return run.summary

    with ThreadPoolExecutor(1) as pool:
        with profile("outer", sensors=[meter]) as outer:
            future = pool.submit(inner)
            open_.wait(SLOW_S)
        close.set()
        summary = future.result(SLOW_S)
    assert summary["recording"]["outer"]["run_id"] == outer.run_id
    part = component(summary, "gpu:meter")
    assert part["job_j"] > 100 * 0.3 and part["u_j"] < 0.5 * part["job_j"]
    assert RUN_DIR_VARIABLE not in os.environ


def test_a_block_whose_thread_has_ended_has_nothing_of_the_main_threads(meter: str) -> None:
    left = profile("left", sensors=[meter])
    thread = threading.Thread(target=left.__enter__)
    thread.start()
    thread.join()
    for _ in range(2):
        at_once(lambda: entered("other", sensors=[meter]))
        burn(0.2)
    left.__exit__(None, None, None)
    notes = read_process_notes(left.directory)
    own_s = [note["own_s"] for note in notes if note["event"] == "blocks"]
    assert len(own_s) > 3
    assert max(own_s) - min(own_s) < 0.15


def test_energy_so_far_of_blocks_at_once_is_a_part_too(meter: str) -> None:
    meet = threading.Barrier(2, timeout=SLOW_S)

    def trial() -> tuple[float, float]:
        with profile("trial", sensors=[meter], cpu_power="1:2") as run:
            begin_s = time.monotonic()
            meet.wait()
            threading.Event().wait(0.3)
            so_far_j = run.energy_j
            seconds = time.monotonic() - begin_s
            meet.wait()
        assert so_far_j is not None
        return so_far_j, seconds

    for so_far_j, seconds in at_once(trial, trial):
        assert 10 < so_far_j < 100 * seconds * 0.75 + 2 * seconds


# --- who joins ------------------------------------------------------------------------------------


def entered(name: str = "inner", **options: Any) -> tuple[bool, str]:
    with profile(name, **{"cpu_power": "1:2", **options}) as run:
        return run.joined, run.run_id


def test_a_task_or_thread_with_the_blocks_context_joins_it(meter: str) -> None:
    async def main() -> list[tuple[bool, str]]:
        async def task() -> tuple[bool, str]:
            await asyncio.sleep(0)
            return entered()

        return [*await asyncio.gather(task(), task()), await asyncio.to_thread(entered)]

    with profile("outer", sensors=[meter]) as outer:
        context = contextvars.copy_context()
        joined = [*asyncio.run(main()), *at_once(lambda: context.run(entered))]
        [(own, other_id)] = at_once(entered)
    assert joined == [(True, outer.run_id)] * 4
    assert not own and other_id != outer.run_id


def test_tasks_at_once_are_runs_with_equal_parts(machine: Tree) -> None:
    async def task(met: asyncio.Queue[None], meets: asyncio.Queue[None]) -> pepr_profiler.Run:
        with profile("task", sensors=[machine.spec]) as run:
            meets.put_nowait(None)
            await met.get()
            burn(0.3)
            meets.put_nowait(None)
            await met.get()
        return run

    async def main() -> list[pepr_profiler.Run]:
        one: asyncio.Queue[None] = asyncio.Queue()
        other: asyncio.Queue[None] = asyncio.Queue()
        return await asyncio.gather(task(one, other), task(other, one))

    begin_s = time.monotonic()
    one, other = asyncio.run(main())
    most_j = MACHINE_W * (time.monotonic() - begin_s)
    assert not one.joined and not other.joined
    assert total_j(one) == pytest.approx(total_j(other), rel=0.3)
    assert total_j(one) + total_j(other) < most_j
    # either may have had nothing or all of it
    assert one.summary["energy"]["u_j"] == pytest.approx(total_j(one) / np.sqrt(3) * 2, rel=0.2)


def test_generators_and_decorated_functions_of_one_thread_join(meter: str) -> None:
    @profile("generator", sensors=[meter])
    def generator() -> Iterator[bool]:
        yield entered()[0]
        yield entered()[0]

    @profile("decorated", cpu_power="1:2")
    def decorated() -> tuple[bool, bool]:
        return entered()[0], next(generator())

    assert decorated() == (True, True)
    one, other = generator(), generator()
    assert [next(one), next(other), next(one), next(other)] == [True] * 4
    one.close()
    other.close()
    assert entered()[0] is False
    assert RUN_DIR_VARIABLE not in os.environ


def test_a_block_that_two_threads_enter_is_a_run_once(meter: str) -> None:
    run, meet = profile("once", sensors=[meter]), threading.Barrier(2, timeout=SLOW_S)

    def enter() -> str:
        meet.wait()
        try:
            with run:
                meet.wait()
        except UsageError as error:
            meet.wait()
            return error.what
        return "entered"

    assert sorted(at_once(enter, enter)) == [
        "entered", "this profile() block has been entered already"]  # fmt: skip
    with profile("after", sensors=[meter]) as after:
        pass
    assert "shared-process" not in codes(after.summary)


def test_join_never_is_a_run_of_its_own_and_error_refuses(meter: str, tmp_path: Path) -> None:
    with profile("outer", sensors=[meter], join="error") as outer:
        assert entered(join="auto") == (True, outer.run_id)
        with profile("never", sensors=[meter], join="never") as never:
            assert not never.joined
            assert entered() == (True, never.run_id)
            threading.Event().wait(0.1)
        assert entered() == (True, outer.run_id)
        refused = profile("refused", join="error")
        with pytest.raises(UsageError, match=r"(?s)would join the run outer-.*\"never\""):
            refused.__enter__()
        [(joined, _)] = at_once(lambda: entered(join="error"))
        assert not joined
    part = component(never.summary, "gpu:meter")
    assert part["job_j"] == pytest.approx(100 * never.summary["duration_s"], rel=1e-6)
    assert never.summary["recording"]["outer"]["run_id"] == outer.run_id
    assert "blocks-within" in codes(outer.summary, never.run_id)
    assert "shared-process" not in codes(never.summary)
    assert len(list(tmp_path.glob("store/runs/*"))) == 3
    for wrong in ("no", None, 1):
        with pytest.raises(UsageError, match="join="):
            profile("wrong", join=wrong)  # type: ignore[arg-type]


def test_blocks_of_threads_in_a_wrapped_program_join_its_run(cli: Cli, meter: str) -> None:
    code = """
import threading
from pepr_profiler import profile
meet = threading.Barrier(2)
def work():
    with profile("thread") as run:
        meet.wait()
        assert run.joined
        meet.wait()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with profile("own", join="never", cpu_power="1:2") as run:
    print(run.joined, run.summary if run.joined else "")
"""
    result, summary = cli.measure("--sensor", meter, "--", sys.executable, "-c", code)
    assert result.status == 0, result.stderr
    assert [(p["name"], p["count"]) for p in summary["phases"]] == [("thread", 2)]
    assert result.stdout == b"False \n"
    outer = [json.loads((r / "run.json").read_text())["recording"]["outer"] for r in cli.runs()]
    assert [facts and facts["run_id"] for facts in outer].count(summary["run_id"]) == 1


# --- other processes ------------------------------------------------------------------------------

CHILD = """
from pepr_profiler import profile
with profile("child", cpu_power="1:2") as run: print(run.joined, run.run_id)
"""


def child() -> tuple[bool, str]:
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    return said[0] == "True", said[1]


def test_the_environment_names_the_run_that_a_child_is_of_for_sure(meter: str) -> None:
    meet = threading.Barrier(2, timeout=SLOW_S)

    def trial() -> tuple[str, tuple[bool, str], tuple[bool, str]]:
        with profile("trial", sensors=[meter]) as run:
            meet.wait()
            found = child()
            if meet.wait() == 0:
                meet.wait()
                return run.run_id, found, (True, run.run_id)
        meet.wait()
        return run.run_id, found, (True, run.run_id)

    # two side by side: whose a child is cannot be told, so it is a run of its own
    for _, (joined, _), _ in at_once(trial, trial):
        assert not joined
    # in a block around both it joins that
    with profile("outer", sensors=[meter]) as outer:
        assert child() == (True, outer.run_id)
        assert [found for _, found, _ in at_once(trial, trial)] == [(True, outer.run_id)] * 2
        assert os.environ[RUN_DIR_VARIABLE] == str(outer.directory)
    assert RUN_DIR_VARIABLE not in os.environ
    # and one that is alone has it, whichever thread it is of
    [(run_id, found)] = at_once(lambda: _alone(meter))
    assert found == (True, run_id)


def _alone(meter: str) -> tuple[str, tuple[bool, str]]:
    with profile("alone", sensors=[meter]) as run:
        return run.run_id, child()


def test_a_fork_of_a_thread_is_of_its_block(cli: Cli, meter: str) -> None:
    code = """
import os, sys, threading, warnings
from pepr_profiler import profile
warnings.simplefilter("ignore")
meet = threading.Barrier(2)
def work():
    with profile("trial", sensors=sys.argv[1:]) as run:
        meet.wait()
        pid = os.fork()
        if pid == 0:
            with profile("forked") as inner:
                os._exit(0 if inner.joined and inner.run_id == run.run_id else 1)
        print(os.waitpid(pid, 0)[1], end=" ")
        meet.wait()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    command = [sys.executable, "-c", code, meter]
    done = subprocess.run(command, env=cli.environment(), capture_output=True, timeout=SLOW_S,
                          check=True)  # fmt: skip
    assert done.stdout.split() == [b"0", b"0"], done.stderr.decode()


WORKERS = """
import json, os, sys, time, warnings
from pepr_profiler import profile
warnings.simplefilter("ignore")
folder, spec = sys.argv[1:]

def burn(cpu_s):
    begin_s = time.process_time()
    while time.process_time() - begin_s < cpu_s: pass

def task(cpu_s):
    with profile("task", cpu_power="1:2") as run:
        burn(cpu_s)
    return os.getpid(), run.joined, run.run_id

def block(name, work):  # that nothing of the machine counts twice is in the job's CPU time
    with profile(name, sensors=[spec]) as run:
        found = work()
    from pepr_profiler.trace.lane import LaneReader
    cpu_s = [value for batch in LaneReader(run.directory, "processes") for value in batch.values[0]]
    phases = [(phase["name"], phase["count"]) for phase in run.summary["phases"]]
    print(json.dumps([run.run_id, found, float(cpu_s[-1]) - float(cpu_s[0]), phases]))
"""

POOLS = {
    "fork": """
import multiprocessing
pool = None
def work():
    global pool
    pool = pool or multiprocessing.get_context("fork").Pool(2)
    return pool.map(task, [0.3] * 4, chunksize=1)
""",
    "spawn": """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
def work(): return list(pool.map(task, [0.3] * 4))
""",
    "loky": """
from joblib import Parallel, delayed
def work(): return Parallel(n_jobs=2, backend="loky")([delayed(task)(0.3)] * 4)
""",
    "loader": """
import torch.utils.data
class Items(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, item): return task(0.3)
loader = torch.utils.data.DataLoader(
    Items(), num_workers=2, batch_size=None, persistent_workers=True
)
def work(): return list(loader)
""",
    "ray": """
import ray, tempfile
short = tempfile.TemporaryDirectory(dir="/tmp")  # the paths of its sockets hold 107 bytes
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         _temp_dir=short.name)
remote = ray.remote(task)
def work(): return ray.get([remote.remote(0.3) for _ in range(4)])
""",
}


def test_tasks_of_joblibs_threads_are_runs_in_the_main_threads_block(cli: Cli, meter: str) -> None:
    if find_spec("joblib") is None:
        pytest.skip("joblib is not installed")
    code = f"""{WORKERS}
from joblib import Parallel, delayed
block("one", lambda: Parallel(n_jobs=2, backend="threading")([delayed(task)(0.05)] * 4))
"""
    [(run_id, found, _, phases)] = run_program(cli, code, str(cli.folder), meter)
    assert [joined for _, joined, _ in found] == [False] * 4
    assert phases == []
    inner = {of for *_, of in found}
    outer = {run["run_id"]: run["recording"]["outer"] for run in map(cli.report, cli.runs())}
    assert {name for name, around in outer.items() if around} == inner
    assert {around["run_id"] for around in outer.values() if around} == {run_id}


LONG = [pytest.mark.long]
FRAMEWORKS = ("loky", "loader", "ray")  # they take seconds to load


@pytest.mark.parametrize(
    ("pool", "started"),
    [
        *(pytest.param(pool, "before", marks=LONG * (pool in FRAMEWORKS)) for pool in POOLS),
        ("fork", "inside"),
        ("spawn", "inside"),
    ],
)
def test_a_worker_is_of_the_block_that_uses_it_once(
    cli: Cli, meter: str, pool: str, started: str
) -> None:
    needs = {"loky": "joblib", "loader": "torch", "ray": "ray"}.get(pool)
    if needs is not None and find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    code = f"""{WORKERS}{POOLS[pool]}
if __name__ == "__main__":
    # the workers are started before any block, or are those of a block that has ended
    {"block('first', work)" if started == "inside" else "work()"}
    block("one", work)
    block("two", work)
"""
    blocks = run_program(cli, code, str(cli.folder), meter)[-2:]
    # then all tasks of the same workers are of the block around them, and count there
    assert len(blocks) == 2
    pids = [{pid for pid, *_ in found} for _, found, _, _ in blocks]
    assert pids[0] & pids[1]
    for run_id, found, cpu_s, phases in blocks:
        assert [(joined, of) for _, joined, of in found] == [(True, run_id)] * 4
        assert phases == [["task", 4]]
        # truth: 4 tasks of 0.3 s, and what Ray's own processes do meanwhile
        assert 1.15 < cpu_s < (4.0 if pool == "ray" else 2.0)
    assert {path.name for path in cli.runs()} >= {run_id for run_id, *_ in blocks}


SEARCH = """
import json, sys, time, warnings
import optuna
from pepr_profiler import profile
warnings.simplefilter("ignore")
optuna.logging.disable_default_handler()
spec, jobs, around = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
begin_s = time.process_time()

def objective(trial):
    with profile("trial", sensors=[spec]) as run:
        begin_s = time.thread_time()
        while time.thread_time() - begin_s < 0.3: pass
    print(json.dumps([run.joined, run.run_id, run.summary["energy"]["total_j"]]), flush=True)
    return 0.0

study = optuna.create_study()
if around:
    with profile("study", sensors=[spec]) as run:
        study.optimize(objective, n_trials=5, n_jobs=jobs)
    print(json.dumps([run.joined, run.run_id, run.summary["energy"]["total_j"]]))
else:
    study.optimize(objective, n_trials=5, n_jobs=jobs)
"""


@pytest.mark.parametrize(("jobs", "around"), [("1", ""), ("3", ""), ("1", "study"), ("3", "study")])
def test_trials_of_optuna_are_runs(cli: Cli, machine: Tree, jobs: str, around: str) -> None:
    if find_spec("optuna") is None:
        pytest.skip("optuna is not installed")
    begun = time.monotonic()
    found = run_program(cli, SEARCH, machine.spec, jobs, *filter(None, [around]))
    most_j = MACHINE_W * (time.monotonic() - begun)
    total = {run_id: total_j for joined, run_id, total_j in found if not joined}
    trials_j = [energy_j for run_id, energy_j in total.items() if run_id.startswith("trial")]
    if jobs == "1" and around:  # trials of the study's own thread are its phases
        assert not trials_j and [joined for joined, *_ in found] == [True] * 5 + [False]
        (run,) = cli.runs()
        assert [(p["name"], p["count"]) for p in cli.report(run)["phases"]] == [("trial", 5)]
        return
    assert len(trials_j) == 5 and len(cli.runs()) == len(total) == 5 + bool(around)
    if around:
        (study,) = (energy_j for run_id, energy_j in total.items() if run_id.startswith("study"))
        assert sum(trials_j) < study < most_j
    assert sum(trials_j) < most_j
    # each took 0.3 s of one thread
    assert max(trials_j) < 4 * min(trials_j)


def test_trials_of_several_processes_are_runs_that_share_the_machine(
    cli: Cli, machine: Tree
) -> None:
    if find_spec("optuna") is None:
        pytest.skip("optuna is not installed")
    begun = time.monotonic()
    found = [
        trial
        for trials in at_once(
            *(lambda: run_program(cli, SEARCH, machine.spec, "1") for _ in range(3))
        )
        for trial in trials
    ]
    most_j = MACHINE_W * (time.monotonic() - begun)
    assert len(found) == len(cli.runs()) == 15
    assert not any(joined for joined, *_ in found)
    assert sum(energy_j for *_, energy_j in found) < most_j


def test_workers_that_several_blocks_use_at_once_are_divided_within_doubt(
    cli: Cli, machine: Tree
) -> None:
    if find_spec("joblib") is None:
        pytest.skip("joblib is not installed")
    code = f"""{WORKERS}
import threading
from joblib import Parallel, delayed
meet = threading.Barrier(2)
def work():
    meet.wait()
    Parallel(n_jobs=2)([delayed(burn)(0.4)] * 2)
    meet.wait()
def one():
    with profile("user", sensors=[spec]) as run:
        work()
    energy = run.summary["energy"]
    print(json.dumps([energy["total_j"], energy["u_j"]]))
if __name__ == "__main__":
    Parallel(n_jobs=2)([delayed(os.getpid)()] * 2)
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""
    same_work_within_doubt(cli, code, machine)


def test_threads_that_work_for_all_are_divided_within_doubt(cli: Cli, machine: Tree) -> None:
    # given a library whose only thread is started by whoever comes first, as numba's are
    (cli.folder / "numba.py").write_text("""
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(1)
""")
    code = f"""{WORKERS}
import threading
meet = threading.Barrier(2)
def one():
    import numba
    with profile("user", sensors=[spec]) as run:
        meet.wait()
        numba.pool.submit(burn, 0.4).result()
        meet.wait()
    energy = run.summary["energy"]
    print(json.dumps([energy["total_j"], energy["u_j"]]))
threads = [threading.Thread(target=one) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    same_work_within_doubt(cli, code, machine)


def test_a_worker_of_several_blocks_at_once_is_a_run_and_says_so(cli: Cli, meter: str) -> None:
    code = f"""{WORKERS}
import multiprocessing, threading
from concurrent.futures import ProcessPoolExecutor
meet = threading.Barrier(2)
def one(pool):
    with profile("user", sensors=[spec]) as run:
        meet.wait()
        found = pool.submit(task, 0.05).result()
        meet.wait()
    print(json.dumps([run.run_id, found]))
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        threads = [threading.Thread(target=one, args=(pool,)) for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
"""
    found = run_program(cli, code, str(cli.folder), meter)
    users = {run_id for run_id, _ in found}
    assert not any(joined for _, (_, joined, _) in found)
    for _, (_, _, run_id) in found:
        summary = cli.report(cli.store / "runs" / run_id)
        (text,) = (w["text"] for w in summary["warnings"] if w["code"] == "blocks-around")
        assert all(user in text for user in users)


def same_work_within_doubt(cli: Cli, code: str, machine: Tree) -> None:
    """Two blocks at once had the same work done by others: ± has that each may have had all."""
    begun = time.monotonic()
    found = run_program(cli, code, str(cli.folder), machine.spec)
    most_j = MACHINE_W * (time.monotonic() - begun)
    both_j = sum(energy_j for energy_j, _ in found)
    assert len(found) == 2 and 5 < both_j < most_j
    for energy_j, u_j in found:
        assert abs(energy_j - both_j / 2) < u_j
        assert u_j > 0.4 * energy_j


# --- the arithmetic -------------------------------------------------------------------------------

S = 1_000_000_000


def a_process(cpu_per_s: float, seconds: int = 10) -> Activity:
    """A process that takes so many CPU seconds a second, on a machine that takes twice as many."""
    t_ns = np.arange(0, seconds * S + 1, S // 10, dtype=np.float64)
    job_s = cpu_per_s * t_ns / S
    return Activity(t_ns, job_s, 2 * job_s, np.ones(len(t_ns)), cpus=8, installed_bytes=1e9)


def a_note(t_s: int, own_s: float, known_s: float, **other: Any) -> dict[str, Any]:
    usual = {"divided": True, "main_s": 0.0, "pool_s": 0.0, "blocks": 2, "of_thread": 1}
    clocks = {"t_ns": t_s * S, "own_s": own_s, "known_s": known_s, "beside": ["other"]}
    return {"event": "blocks", **usual, **clocks, **other}


def part_of(notes: list[dict[str, Any]], process: Activity, end_s: int = 10) -> BlockPart:
    part = BlockPart.of(notes, process, 0, end_s * S)
    assert part is not None
    return part


def test_parts_are_what_threads_had_and_equal_ones_of_the_rest() -> None:
    # given 3 CPU seconds a second for 10 s; from 2 to 8 s two blocks, of which threads had 1 and
    # 1.5, so that half a second a second is of neither
    process = a_process(3.0)
    first = [a_note(2, 5.0, 10.0), a_note(8, 11.0, 25.0, divided=False, blocks=1)]
    second = [a_note(2, 1.0, 10.0), a_note(8, 10.0, 25.0)]
    one, other = part_of(first, process), part_of(second, process, end_s=8)
    used = one.of_activity(process)
    assert used.cpu_between(0, 2 * S)[0] == pytest.approx(6.0)  # alone
    assert used.cpu_between(2 * S, 8 * S)[0] == pytest.approx(6 * 1.25)
    assert used.cpu_between(8 * S, 10 * S)[0] == pytest.approx(6.0)
    of_other = other.of_activity(process).cpu_between(2 * S, 8 * S)[0]
    assert of_other == pytest.approx(6 * 1.75)
    # what nobody knows: any part of half a second a second, as likely as another
    at_ns = np.array([2 * S, 8 * S])
    by_cpu = one.u_rel(at_ns, np.array([0.0, 7.5]), by_cpu=True)
    assert by_cpu * 1.25 == pytest.approx(0.5 / np.sqrt(12))
    # and a device that knows the process alone: half of it
    assert one.u_rel(at_ns, np.array([0.0, 1.0]), by_cpu=False) == pytest.approx(1 / np.sqrt(3))
    use = one.of_use(DeviceUse.by_job_alone(0, 10 * S))
    means = use.means(np.array([0, 2 * S, 8 * S, 10 * S]))
    assert means[0, 1:].tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert (means[0] + means[1])[1:].tolist() == pytest.approx([1.0] * 3)


def test_parts_of_clocks_that_run_ahead_add_up_to_the_process() -> None:
    process = a_process(1.0)
    parts = [
        part_of([a_note(0, 0.0, 0.0), a_note(10, own_s, 12.0)], process) for own_s in (4.0, 8.0)
    ]
    sums = [part.of_activity(process).cpu_between(0, 10 * S)[0] for part in parts]
    assert sums == pytest.approx([10 / 3, 20 / 3])


def test_what_the_main_thread_does_is_no_blocks() -> None:
    process = a_process(2.0)
    own, shared = [a_note(0, 0.0, 0.0, blocks=1)], {"blocks": 1, "main_s": 10.0}
    part = part_of([*own, a_note(10, 6.0, 16.0, **shared)], process)
    # 6 are its own, 10 the main thread's, and of 4 either may have had any part
    assert part.of_activity(process).cpu_between(0, 10 * S)[0] == pytest.approx(6 + 4 / 2)


def test_a_block_alone_in_one_of_the_main_thread_may_have_none_of_its_helpers() -> None:
    # given 6 CPU seconds of its own, and 4 of threads that the block around it may have started
    process = a_process(1.0)
    notes = [a_note(0, 0.0, 0.0, blocks=1), a_note(10, 6.0, 6.0, blocks=1)]
    part = part_of(notes, process)
    at_ns = np.array([0, 10 * S])
    assert part.of_activity(process).cpu_between(0, 10 * S)[0] == pytest.approx(6 + 4 / 2)
    by_cpu = part.u_rel(at_ns, np.array([0.0, 8.0]), by_cpu=True)
    assert by_cpu * 8 == pytest.approx(4 / np.sqrt(12))
    assert part.of_use(DeviceUse.by_job_alone(0, 10 * S)).job[0] == pytest.approx(0.5)
    # and where there are none, all is its own
    notes = [a_note(0, 0.0, 0.0, blocks=1), a_note(10, 10.0, 10.0, blocks=1)]
    part = part_of(notes, process)
    assert part.of_use(DeviceUse.by_job_alone(0, 10 * S)).job[0] == 1.0
    assert part.u_rel(at_ns, np.array([0.0, 1.0]), by_cpu=True) == 0.0


def test_a_run_that_was_cut_off_has_an_equal_part_since_its_last_note() -> None:
    process = a_process(1.0)
    part = part_of([a_note(4, 0.0, 0.0, blocks=4)], process)
    used = part.of_activity(process)
    assert used.cpu_between(0, 4 * S)[0] == pytest.approx(4.0)
    assert used.cpu_between(4 * S, 10 * S)[0] == pytest.approx(6 / 4)


def test_blocks_of_one_thread_and_pools_leave_it_open_whose_time_it_was() -> None:
    process, at_ns, job_j = a_process(1.0), np.array([0, 10 * S]), np.array([0.0, 1.0])
    tasks = part_of([a_note(0, 0.0, 0.0, of_thread=2), a_note(10, 10.0, 10.0)], process)
    assert tasks.of_activity(process).cpu_between(0, 10 * S)[0] == pytest.approx(5.0)
    assert tasks.u_rel(at_ns, job_j, by_cpu=True) == pytest.approx(1 / np.sqrt(3))
    pool = part_of([a_note(0, 0.0, 0.0), a_note(10, 10.0, 10.0, pool_s=4.0)], process)
    assert pool.u_rel(at_ns, job_j, by_cpu=True) == pytest.approx(0.4 / np.sqrt(12))


def test_a_thread_has_a_clock_without_perf_too() -> None:
    code = """
import resource, subprocess, sys, threading, time
from pepr_profiler import _core
def work():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # perf finds no descriptor
    clock, begin_s = _core.ThreadClock(), time.thread_time()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    while time.thread_time() - begin_s < 0.2: pass
    inside = begin_s + clock.read_s() - time.thread_time()
    print(clock.counts_started, abs(inside) < 0.01)
    return clock
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.splitlines() == [b"False True"] * 2


def test_nothing_is_claimed_of_a_device_while_blocks_divide_the_process(meter: str) -> None:
    with profile("lane", sensors=[meter]) as run:
        pass
    lane = LaneReader(run.directory, "processes").lane
    t_ns = np.arange(S, 9 * S, S // 10, dtype=np.int64)
    values = {"job/cpu": t_ns / S, "system/busy": t_ns / S, "job/rss": t_ns, "job/processes": t_ns}
    columns = [values[channel.name].astype(np.float64).tobytes() for channel in lane.channels]
    rows = (len(t_ns), t_ns.tobytes(), np.zeros(len(t_ns), np.uint32).tobytes(), columns)

    def claimed(*notes: dict[str, Any]) -> bool:
        claims = RunClaims()
        claims.on_rows(lane, rows)
        for note in notes:
            claims.on_note(note)
        due = claims.due(last=True)
        assert due is not None
        return bool(due[1])

    assert claimed()
    assert not claimed(a_note(3, 0.0, 0.0))
    assert claimed(a_note(0, 0.0, 0.0), a_note(1, 0.0, 0.0, divided=False))
