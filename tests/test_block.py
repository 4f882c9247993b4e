"""`profile()`: phases, metrics and energy from inside a program, alone or in somebody's run."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import SLOW_S, Cli, codes, component, ended, python, until, write_meter
from sim import native

import pepr_profiler
from pepr_profiler import UsageError, profile
from pepr_profiler.errors import PeprError
from pepr_profiler.summary.summarise import summarise
from pepr_profiler.trace.events import EventWriter
from pepr_profiler.trace.lane import LaneReader
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

pytestmark = pytest.mark.usefixtures("on_our_own")


def wait_s(duration_s: float) -> None:
    """What is measured lasts this long."""
    threading.Event().wait(duration_s)


def script(cli: Cli, code: str, *arguments: str, **options: Any) -> str:
    """Runs a program of a user's; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=cli.environment(options.pop("env", None)),
        capture_output=True,
        timeout=SLOW_S,
        check=False,
        **options,
    )
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert not said, said
    return done.stdout.decode()


# --- a block of its own ---------------------------------------------------------------------------


@pytest.mark.parametrize(("period_s", "expected_s"), [(0.01, 0.1), (0.5, 0.5), (5.0, 1.0)])
def test_processes_are_read_no_more_often_than_is_asked_for(
    meter: str, period_s: float, expected_s: float
) -> None:
    with profile("seldom", sensors=[meter], period_s=period_s) as run:
        wait_s(0.1)
    assert LaneReader(run.directory, "processes").lane.period_ns == expected_s * 1e9


def test_a_block_ends_though_its_end_is_heard_by_a_look_that_had_begun(
    meter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pepr_profiler.recording.recorder._IDLE_S", 1e6)  # it never looks again
    run = profile("raced", sensors=[meter])
    run.__enter__()
    assert run._recorder is not None
    # given a look that has begun, and will hear what is raised until it gets the lock
    run._lock.acquire()
    run._recorder.notifier.notify()
    wait_s(0.2)
    threading.Timer(0.3, run._lock.release).start()
    run.__exit__(None, None, None)
    assert run.summary["complete"]


def test_a_block_that_is_faster_than_its_profiler_joins_it(cli: Cli, meter: str) -> None:
    code = """
from pepr_profiler import profile
print("enters", flush=True)
with profile("early") as run: print(run.joined)
"""
    with profile("outer", sensors=[meter]) as run:
        # given a run of which nothing is written yet when its program enters a block
        written, hidden = (run.directory / name for name in ("run.json", "hidden"))
        written.rename(hidden)
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=cli.environment({RUN_DIR_VARIABLE: str(run.directory)}),
            stdout=subprocess.PIPE,
        )
        with ended(process):
            assert process.stdout is not None and process.stdout.readline() == b"enters\n"
            wait_s(0.3)
            hidden.rename(written)
            assert process.communicate(timeout=SLOW_S)[0] == b"True\n"
    assert [phase["name"] for phase in run.summary["phases"]] == ["early"]


def test_a_block_may_end_before_a_sensor_has_opened(meter: str, tmp_path: Path) -> None:
    # given a driver's library that takes its time to load, and then is none
    library = tmp_path / "slow.so"
    source = "#include <unistd.h>\n__attribute__((constructor)) void load() { usleep(400000); }"
    compiling = [native.compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(compiling, input=source.encode(), check=True)
    with profile("short", sensors=[meter, f"nvml-processes:{library}"]) as run:
        pass
    assert run.summary["complete"]
    assert not run.summary["warnings"]
    [missing] = run.summary["missing"]
    assert str(library) in missing["what"]


def test_python_sleeps_while_there_is_nothing_to_look_at(meter: str) -> None:
    with profile("quiet", sensors=[meter]) as run:
        recorder = run._recorder
        assert recorder is not None
        with run._lock:
            assert recorder.tick() >= 10.0
        assert not recorder.notifier.wait(0.3)
    with (
        ended(subprocess.Popen(["sleep", "60"])) as other,
        profile("attached", sensors=[meter], pids=[other.pid]) as run,
    ):
        recorder = run._recorder
        assert recorder is not None
        with run._lock:
            assert recorder.tick() <= 0.5  # an end has to be noticed


def test_phases_that_cover_the_run_have_all_of_its_energy(meter: str) -> None:
    with profile("covered", sensors=[meter]) as run:
        for _ in range(2):
            with run.phase("train"):
                wait_s(0.2)
        with run.phase("test"):
            wait_s(0.15)
            with run.phase("inner"):
                wait_s(0.15)
    summary = run.summary
    phases = {phase["name"]: phase for phase in summary["phases"]}
    assert list(phases) == ["train", "test", "inner"]
    assert [phases[name]["count"] for name in phases] == [2, 1, 1]
    outer_s = phases["train"]["duration_s"] + phases["test"]["duration_s"]
    assert 0.7 <= outer_s <= summary["duration_s"]
    # truth: the meter's 100 W over each phase, and the modelled rest on top
    parts = summary["energy"]["components"]
    modelled_j = sum(c["job_j"] for c in parts if c["provenance"] == "modelled" and c["in_total"])
    metered = component(summary, "gpu:meter")
    assert metered["job_j"] == pytest.approx(100 * summary["duration_s"], rel=1e-6)
    assert summary["energy"]["total_j"] == pytest.approx(metered["job_j"] + modelled_j)
    for phase in phases.values():
        metered_j = 100 * phase["duration_s"]
        assert metered_j - 1e-6 <= phase["energy_j"] <= metered_j + modelled_j + 1e-6
        assert phase["u_j"] > 0
    left_j = summary["energy"]["total_j"] - phases["train"]["energy_j"] - phases["test"]["energy_j"]
    left_s = summary["duration_s"] - outer_s
    assert 100 * left_s - 1e-6 <= left_j <= 100 * left_s + modelled_j


def test_decorated_function_is_a_phase_each_time_it_runs(meter: str) -> None:
    with profile("decorated", sensors=[meter]) as run:

        @run.phase("step")
        def step(depth: int) -> int:
            """Counts down."""
            return depth if depth == 0 else step(depth - 1)

        assert step(2) == 0
        assert (step.__name__, step.__doc__) == ("step", "Counts down.")
        with pytest.raises(ZeroDivisionError), run.phase("failing"):
            1 / 0  # noqa: B018
    assert [(p["name"], p["count"]) for p in run.summary["phases"]] == [("step", 3), ("failing", 1)]


def test_a_block_that_cannot_begin_leaves_no_lane_behind(
    meter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads() -> set[str]:
        return {task.name for task in Path("/proc/self/task").iterdir()}

    # given no place at all for a run
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = threads()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises((OSError, PeprError)) as kept, profile("nowhere", sensors=[meter]):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # then nothing samples, though the traceback is kept, as interpreters do; the kernel shows a
    # thread that has been joined for a moment more
    until(lambda: threads() <= before)
    del kept


def test_log_takes_every_kind_of_number_and_the_last_one_counts(meter: str) -> None:
    class Tensor:
        """As torch's: no number, but float() takes it."""

        def __float__(self) -> float:
            return 0.5

    with profile("logged", sensors=[meter], performance="accuracy") as run:
        run.log(accuracy=0.1, epoch=1)
        run.log(accuracy=np.float32(0.75), epoch=np.int64(2), zero_d=np.array(3.5), loss=Tensor())
        run.log(diverged=math.nan, yes=True)
        for value in ("high", None, [1.0], np.zeros(2), 1j):
            with pytest.raises(UsageError, match="not a number"):
                run.log(accuracy=value)
    assert run.summary["metrics"] == {
        "accuracy": 0.75, "epoch": 2.0, "zero_d": 3.5, "loss": 0.5, "diverged": None, "yes": 1.0,
    }  # fmt: skip
    assert run.summary["performance"] == {"metric": "accuracy", "value": 0.75}


def test_energy_grows_while_running_and_the_summary_comes_after(meter: str) -> None:
    with profile("growing", sensors=[meter]) as run:
        with pytest.raises(UsageError, match="no summary yet"):
            run.summary  # noqa: B018
        wait_s(0.1)
        first_j = run.energy_j
        wait_s(0.2)
        second_j = run.energy_j
        assert first_j is not None
        assert second_j is not None
        assert first_j > 5
        assert second_j - first_j >= 100 * 0.2 - 1e-6
    assert run.summary["energy"]["total_j"] >= second_j
    assert run.energy_j == pytest.approx(run.summary["energy"]["total_j"])
    # what it says is what is on disk, and what `report` says
    stored = json.loads((run.directory / "run.json").read_text())
    assert stored == run.summary
    assert (stored["complete"], stored["exit_code"], stored["name"]) == (True, 0, "growing")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("boom"), 1), (KeyboardInterrupt(), 1), (SystemExit(0), 0), (SystemExit(3), 3)],
    ids=repr,
)
def test_exception_leaves_the_block_and_completes_the_run(
    meter: str, error: BaseException, status: int
) -> None:
    run = profile("failing", sensors=[meter])
    with pytest.raises(type(error)) as raised, run, run.phase("train"):
        raise error
    assert raised.value is error
    assert (run.summary["complete"], run.summary["exit_code"]) == (True, status)
    assert [phase["name"] for phase in run.summary["phases"]] == ["train"]


def test_misuse_is_refused_with_a_remedy(meter: str, tmp_path: Path) -> None:
    run = profile("misused", sensors=[meter])
    with pytest.raises(UsageError, match="outside the block"):
        run.log(a=1)
    with pytest.raises(UsageError, match="outside the block"), run.phase("p"):
        pass
    with run, pytest.raises(UsageError, match="entered already"):
        run.__enter__()
    with pytest.raises(UsageError, match="entered already"), run:
        pass
    with pytest.raises(UsageError, match="the run has ended"):
        run.log(a=1)
    with pytest.raises(UsageError, match="the run has ended"), run.phase("p"):
        pass
    for options in ({"name": ""}, {"region": "Atlantis"}, {"region": "DK", "carbon_intensity": 1}):
        with pytest.raises(UsageError):
            profile(**{"name": "x", **options})
    before = sorted(tmp_path.glob("store/runs/*"))
    with pytest.raises(pepr_profiler.SensorError, match="no driver"), profile("x", sensors=["?"]):
        raise AssertionError("not reached")
    assert sorted(tmp_path.glob("store/runs/*")) == before
    assert RUN_DIR_VARIABLE not in os.environ


def test_no_thread_and_no_descriptor_stays(meter: str) -> None:
    def held() -> tuple[int, set[str]]:
        links = [link for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
        files = {str(link.readlink()) for link in links if os.path.lexists(link)}
        tasks = len(list(Path("/proc/self/task").iterdir()))
        return tasks, {name for name in files if "pepr" in name or "runs" in name}

    with profile("warm", sensors=[meter]):
        pass
    before = held()
    for _ in range(3):
        with profile("again", sensors=[meter]) as run, run.phase("p"):
            run.log(a=1)
    threads, rings = held()
    assert threads == before[0] and rings <= before[1]  # those of earlier tests may go meanwhile


def test_phases_of_threads_are_kept_apart(meter: str) -> None:
    meet = threading.Barrier(3, timeout=SLOW_S)
    with profile("threads", sensors=[meter]) as run, run.phase("main"):

        def work() -> None:
            meet.wait()
            with run.phase("work"):
                meet.wait()  # all three are inside at once
            run.log(done=1)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {p["name"]: p["count"] for p in run.summary["phases"]} == {"main": 1, "work": 3}


def events_of(directory: Path, pid: int, *phases: dict[str, Any]) -> None:
    """A process's file of events; `at` of each phase is its begin and end, s since the run's."""
    begin_ns = json.loads((directory / "run.json").read_text())["recording"]["window_ns"][0]
    lines = []
    for ident, phase in enumerate(phases):
        first_ns, last_ns = (begin_ns + round(at_s * 1e9) for at_s in phase.pop("at"))
        begin = {"event": "begin", "t_ns": first_ns, "id": pid * 100 + ident, "parent": None}
        lines += [begin | phase, {"event": "end", "t_ns": last_ns, "id": pid * 100 + ident}]
    text = "".join(f"{json.dumps(line)}\n" for line in sorted(lines, key=lambda x: x["t_ns"]))
    (directory / f"events-host-{pid}.jsonl").write_text(text)


def test_phases_that_are_open_side_by_side_have_equal_parts(cli: Cli, tmp_path: Path) -> None:
    # given a run at 50 W: a search in the main thread, a phase in each of two threads of it, then
    # one in a worker, then two tasks, and a mark over all of it
    meter = write_meter(tmp_path / "meter", 50.0)
    assert cli("--sensor", meter, "--", "sleep", "2").status == 0
    (directory,) = cli.runs()
    of_main: list[dict[str, Any]] = [
        {"name": "search", "at": (0.1, 1.5), "ancestors": []},
        {"name": "t1", "at": (0.1, 0.7), "thread": 7},
        {"name": "t2", "at": (0.1, 0.7), "thread": 8},
        {"name": "task1", "at": (1.1, 1.5), "parent": 100},
        {"name": "task2", "at": (1.1, 1.5), "parent": 100},
    ]
    events_of(directory, 1, *(dict(phase) for phase in of_main))
    events_of(directory, 2, {"name": "w", "at": (0.7, 1.1), "ancestors": [3, 1]})
    writer = EventWriter(directory)
    begin_ns = json.loads((directory / "run.json").read_text())["recording"]["window_ns"][0]
    writer.mark("begin", "marked", series="s", t_ns=begin_ns + 100_000_000)
    writer.mark("end", "marked", series="s", t_ns=begin_ns + 1_500_000_000)
    writer.close()
    summary = summarise(directory)
    # then what the search started is in it, and each of n at once has 1/n ± of n unknown parts
    phases = {phase["name"]: phase for phase in summary["phases"]}
    joules = {name: phase["energy_j"] for name, phase in phases.items()}
    threads, halves = {"t1": 10.0, "t2": 10.0}, {"w": 10.0, "task1": 10.0, "task2": 10.0}
    whole = {"search": 70.0, "marked": 70.0}
    assert joules == pytest.approx(whole | threads | halves, rel=0.01)
    assert phases["t1"]["u_j"] == pytest.approx(2 * math.sqrt(2 / 4) / 3 * 30, rel=0.1)
    assert phases["w"]["u_j"] == pytest.approx(2 * math.sqrt(1 / 3) / 2 * 20, rel=0.1)
    assert phases["search"]["u_j"] == phases["marked"]["u_j"] < 5
    assert "phases-at-once" in codes(summary, "'t1', 't2', 'w' and 2 more; each has an equal part")

    # and a recording of before, which does not tell what started what, is as it was, with no ±
    new = ("ancestors", "thread")
    events_of(directory, 1, *({k: v for k, v in p.items() if k not in new} for p in of_main))
    summary = summarise(directory)
    before = {phase["name"]: (phase["energy_j"], phase["u_j"]) for phase in summary["phases"]}
    assert before["t1"] == (pytest.approx(30, rel=0.01), None)
    assert before["search"] == (pytest.approx(70, rel=0.01), None)
    assert "phases-at-once" in codes(summary, "is unknown, and so is their ±")


def test_one_phase_after_another_has_all_whoever_began_it(cli: Cli, tmp_path: Path) -> None:
    meter = write_meter(tmp_path / "meter", 50.0)
    assert cli("--sensor", meter, "--", "sleep", "2").status == 0
    (directory,) = cli.runs()
    events_of(directory, 1, {"name": "a", "at": (0.1, 0.7)}, {"name": "b", "at": (0.7, 1.1)})
    events_of(directory, 2, {"name": "c", "at": (1.1, 1.5), "thread": 5})
    summary = summarise(directory)
    joules = {phase["name"]: phase["energy_j"] for phase in summary["phases"]}
    assert joules == pytest.approx({"a": 30, "b": 20, "c": 20}, rel=0.01)
    assert all(phase["u_j"] is not None for phase in summary["phases"])
    assert "phases-at-once" not in codes(summary)


SIDE_BY_SIDE = """
import multiprocessing, sys, threading
from pepr_profiler import profile

def trial(number):
    with profile(f"trial {number}") as run:
        meet.wait(100)
        threading.Event().wait(0.2)
        meet.wait(100)
    unknown.append(run.summary["energy"]["u_j"] is None)
    return unknown[-1]

unknown = []

def begun(barrier):
    global meet
    meet = barrier

if __name__ == "__main__":
    with profile("search"):
        if sys.argv[1] == "threads":
            meet = threading.Barrier(3)
            each = [threading.Thread(target=trial, args=(number,)) for number in range(3)]
            for thread in each: thread.start()
            for thread in each: thread.join()
        else:
            context = multiprocessing.get_context(sys.argv[1])
            with context.Pool(3, begun, (context.Barrier(3),)) as pool:
                unknown = pool.map(trial, range(3), chunksize=1)
    assert unknown == [True] * 3, unknown
"""


@pytest.mark.parametrize("how", ["threads", "fork", "spawn"])
def test_trials_side_by_side_in_one_run_add_up_to_no_more_than_it(
    cli: Cli, meter: str, tmp_path: Path, how: str
) -> None:
    (tmp_path / "search.py").write_text(SIDE_BY_SIDE)
    command = (sys.executable, str(tmp_path / "search.py"), how)
    done = cli("run", "--sensor", meter, "--", *command)
    assert done.status == 0, done.stderr
    (directory,) = cli.runs()
    summary = json.loads((directory / "run.json").read_text())
    phases = {phase["name"]: phase for phase in summary["phases"]}
    search = phases.pop("search")
    assert sorted(phases) == ["trial 0", "trial 1", "trial 2"]
    assert sum(phase["energy_j"] for phase in phases.values()) < search["energy_j"]
    assert all(phase["u_j"] > 0.5 * phase["energy_j"] for phase in phases.values())
    assert search["energy_j"] >= 0.99 * 100 * search["duration_s"]
    assert search["u_j"] < 0.5 * search["energy_j"]
    assert "phases-at-once" in codes(summary)


def test_working_directory_may_change_inside_the_block(cli: Cli) -> None:
    code = """
import os, subprocess, sys
from pepr_profiler import profile
with profile("moved", store="here", cpu_power="1:2") as run:
    os.chdir("/")
    run.log(a=1)
    child = "from pepr_profiler import profile\\nwith profile('child') as run: run.log(b=2)"
    subprocess.run([sys.executable, "-c", child], check=True)
    assert run.energy_j > 0
print(run.directory, sorted(run.summary["metrics"].items()))
"""
    said = script(cli, code, cwd=cli.folder)
    assert said.startswith(f"{cli.folder}/here/runs/moved-")
    assert said.endswith("[('a', 1.0), ('b', 2.0)]\n")


def test_warning_that_is_an_error_does_not_cost_the_run(cli: Cli) -> None:
    (cli.folder / "file").write_text("")
    code = """
from pepr_profiler import profile
try:
    with profile("kept", store="file/store", cpu_power="1:2") as run:
        run.log(a=1)
except UserWarning as warning:
    print(warning)
print(run.summary["complete"], run.directory)
"""
    said = script(cli, code, cwd=cli.folder)
    assert "cannot be written" in said
    assert f"True {cli.folder}/pepr-" in said  # the fallback, in TMPDIR


# --- joining --------------------------------------------------------------------------------------

JOINING = """
import os, sys, threading
from pepr_profiler import profile
with profile("inner", experiment="ignored") as run:
    assert run.joined
    with run.phase("train"):
        threading.Event().wait(1.2)  # the outer recording is on disk once a second
        with profile("deeper") as deeper:
            assert deeper.run_id == run.run_id
            deeper.log(depth=2)
    run.log(accuracy=0.9)
    assert run.energy_j >= 0
tasks = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
assert "pepr-sampler" not in tasks, tasks
print(run.summary["energy"]["total_j"], run.summary["duration_s"], run.run_id)
"""


def test_block_in_a_wrapped_program_joins_its_run(cli: Cli, meter: str) -> None:
    result, summary = cli.measure("--sensor", meter, "--experiment", "outer", "--",
                                  *python(JOINING))  # fmt: skip
    assert result.status == 0, result.stderr
    # then there is one run with one recording, and phases and metrics are its
    (directory,) = cli.runs()
    assert summary["run_id"] == directory.name
    assert sorted(p.stem for p in directory.glob("*.arrows")) == ["processes", "replay"]
    assert summary["experiment"] == "outer"
    assert summary["metrics"] == {"accuracy": 0.9, "depth": 2.0}
    phases = {phase["name"]: phase for phase in summary["phases"]}
    assert list(phases) == ["inner", "train", "deeper"]
    # and the block's own summary is the outer run's over the block
    energy_j, duration_s, run_id = result.stdout.split()
    assert run_id.decode() == summary["run_id"]
    assert float(duration_s) == pytest.approx(phases["inner"]["duration_s"], rel=0.05)
    assert float(energy_j) >= 100 * 1.2
    assert float(energy_j) == pytest.approx(phases["inner"]["energy_j"], rel=0.1)


def test_nested_blocks_are_one_run(meter: str, tmp_path: Path) -> None:
    with profile("outer", sensors=[meter]) as outer:
        with profile("inner") as inner:
            inner.log(a=1)
            with inner.phase("p"):
                wait_s(0.1)
        assert inner.joined
        assert not outer.joined
        assert inner.summary["energy"]["total_j"] >= 10
    assert [p["name"] for p in outer.summary["phases"]] == ["inner", "p"]
    # A block is from mark to mark: not the time in which its file was opened.
    assert outer.summary["phases"][0]["duration_s"] == inner.summary["duration_s"]
    assert outer.summary["metrics"] == {"a": 1.0}
    assert [p.name for p in tmp_path.glob("store/runs/*")] == [outer.run_id]
    with profile("next", sensors=[meter]) as later:
        assert not later.joined


# --- fork, spawn, notebooks -----------------------------------------------------------------------

FORKING = """
import json, multiprocessing, os, sys, threading, warnings
from pathlib import Path
from pepr_profiler import profile

def work(number):
    run.log(**{f"worker_{number}": number})
    with run.phase("worker"):
        pass
    run.energy_j
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert "pepr-sampler" not in names, names
    assert threading.active_count() == 1

with profile("forking", sensors=[sys.argv[1]]) as run:
    run.log(parent=1)
    warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
    pid = os.fork()
    if pid == 0:
        work(1)
        sys.exit(0)  # out through the block, as a careless program does
    assert os.waitpid(pid, 0)[1] == 0
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(number,)) for number in (2, 3)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    while run.energy_j < 20: pass
print(json.dumps([os.getpid(), run.summary]))
"""


def test_forked_children_neither_sample_nor_hang_nor_touch_the_parents_files(
    cli: Cli, meter: str
) -> None:
    pid, summary = json.loads(script(cli, FORKING, meter))
    (directory,) = cli.runs()
    files = {int(p.stem.rsplit("-", 1)[1]): p for p in directory.glob("events-*.jsonl")}
    assert len(files) == 4
    assert files.pop(pid).read_text().count("\n") == 1
    assert all(path.read_text().count("\n") == 3 for path in files.values())
    assert summary["metrics"] == {"parent": 1, "worker_1": 1, "worker_2": 2, "worker_3": 3}
    assert {p["name"]: p["count"] for p in summary["phases"]} == {"worker": 3}
    assert summary["complete"]
    # the lanes are whole: times rise, and the meter ran through
    for lane in ("processes", "replay"):
        times = np.concatenate([batch.t_ns for batch in LaneReader(directory, lane)])
        assert np.all(np.diff(times) > 0)
    assert component(summary, "gpu:meter")["job_j"] == pytest.approx(
        100 * summary["duration_s"], rel=1e-6
    )


def test_spawned_workers_join(cli: Cli, meter: str) -> None:
    program = cli.folder / "spawning.py"
    program.write_text("""
import multiprocessing, sys
from pepr_profiler import profile

def work(number):
    with profile("worker") as run:
        run.log(**{f"worker_{number}": number})

if __name__ == "__main__":
    with profile("spawning", sensors=[sys.argv[1]]) as run:
        context = multiprocessing.get_context("spawn")
        worker = context.Process(target=work, args=(1,))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    print(run.summary["metrics"], [p["name"] for p in run.summary["phases"]])
""")
    said = script(cli, "import runpy, sys; sys.argv = sys.argv[1:]; "
                       "runpy.run_path(sys.argv[0], run_name='__main__')",
                  str(program), meter)  # fmt: skip
    assert said == "{'worker_1': 1.0} ['worker']\n"
    assert len(cli.runs()) == 1


def test_it_works_cell_by_cell_in_ipython(cli: Cli, meter: str) -> None:
    pytest.importorskip("IPython")
    code = """
import sys, warnings
warnings.simplefilter("default")
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in (
    "from pepr_profiler import profile",
    f"run = profile('cells', sensors=[{sys.argv[1]!r}]).__enter__()",
    "with run.phase('train'):\\n    run.log(accuracy=0.5)",
    "run.__exit__(None, None, None)",
    "print(run.summary['metrics'], run.summary['phases'][0]['name'])",
    "with profile('again', cpu_power='1:2') as run:\\n    pass",
    "print(run.summary['complete'])",
):
    shell.run_cell(cell).raise_error()
"""
    said = script(cli, code, meter, env={"IPYTHONDIR": str(cli.folder / "ipython")})
    assert said.splitlines() == ["{'accuracy': 0.5} train", "True"]


FORGOTTEN = """
import contextlib, os, sys, time, unittest, warnings
warnings.simplefilter("ignore")
from pepr_profiler import profile
def block(name, **options): return profile(name, sensors=[sys.argv[1]], **options)
"""


def test_a_block_after_one_that_nobody_left_is_a_run_of_its_own(cli: Cli, meter: str) -> None:
    code = f"""{FORGOTTEN}
def work():
    block("forgotten").__enter__()
    raise RuntimeError("on the way")
with contextlib.suppress(RuntimeError): work()
forgotten = os.environ["PEPR_RUN_DIR"]
for name, options in (("other", {{}}), ("forgotten", {{}}), ("forgotten", dict(experiment="e"))):
    with block(name, **options) as run:
        with block("inner") as inner: time.sleep(0.1)
        print(run.joined, inner.joined, inner.run_id == run.run_id, end=" ")
        print(os.environ["PEPR_RUN_DIR"] == str(run.directory))
    print([p["name"] for p in run.summary["phases"]], run.summary["name"],
          run.summary["experiment"], os.environ["PEPR_RUN_DIR"] == forgotten)
"""
    said = script(cli, code, meter)
    assert said.splitlines() == [
        "False True True True", "['inner'] other None True",
        "False True True True", "['inner'] forgotten None True",
        "False True True True", "['inner'] forgotten e True",
    ]  # fmt: skip
    # and both sides say so
    summaries = sorted((cli.report(run) for run in cli.runs()), key=lambda s: str(s["started_at"]))
    assert all(summary["complete"] for summary in summaries) and len(summaries) == 4
    texts = [[w["text"] for w in s["warnings"] if w["code"] == "block-left-open"]
             for s in summaries]  # fmt: skip
    assert [len(found) for found in texts] == [2, 1, 1, 1]  # the same sentence stands once
    assert "'other' began" in texts[0][0]
    assert "'forgotten', entered by hand" in texts[1][0] and ", work, was open" in texts[1][0]


def test_a_block_within_one_that_will_be_left_joins_it(cli: Cli, meter: str) -> None:
    code = f"""{FORGOTTEN}
@contextlib.contextmanager
def generator():
    with block("generator"): yield
class Wrapper:
    def __enter__(self): self.run = block("wrapper").__enter__()
    def __exit__(self, *error): self.run.__exit__(*error)
@contextlib.contextmanager
def stack():
    with contextlib.ExitStack() as stack:
        stack.enter_context(block("stack"))
        yield
@block("decorated")
def decorated():
    with block("inner") as inner: print(inner.joined, end=" ")
class Case(unittest.TestCase):
    def runTest(self):
        if sys.version_info < (3, 11):  # as enterContext does it
            def _enter_context(outer):
                outer.__enter__(); self.addCleanup(outer.__exit__, None, None, None)
            self.enterContext = _enter_context
        self.enterContext(block("unittest"))
        with block("inner") as inner: print(inner.joined, end=" ")
for outer in (block("with"), generator(), Wrapper(), stack()):
    with outer, block("inner") as inner: print(inner.joined, end=" ")
decorated()
Case().debug()
print("PEPR_RUN_DIR" in os.environ)
"""
    assert script(cli, code, meter) == "True True True True True True False\n"
    assert len(cli.runs()) == 6


def test_a_block_leaves_the_program_its_signal_handlers(cli: Cli, meter: str) -> None:
    code = """
import ctypes, faulthandler, os, signal, sys, tempfile
libc = ctypes.CDLL(None)
def disposition(number):  # the handler, the 64 signals of its mask, and flags: sigaction(2)
    found = ctypes.create_string_buffer(152)
    libc.sigaction(number, None, found)
    return found.raw[:16], found.raw[136:140]
numbers = signal.SIGUSR1, signal.SIGUSR2
heard = []
for number in numbers: signal.signal(number, lambda number, _: heard.append(number))
dump = tempfile.TemporaryFile()
faulthandler.register(signal.SIGUSR1, file=dump, chain=True)
signal.siginterrupt(signal.SIGUSR2, False)
before = [disposition(number) for number in numbers]
from pepr_profiler import profile
assert [disposition(number) for number in numbers] == before, "import"
with profile("heard", sensors=sys.argv[1:]):
    assert [disposition(number) for number in numbers] == before, "entry"
assert [disposition(number) for number in numbers] == before, "exit"
for number in numbers: signal.raise_signal(number)
print(heard == list(numbers), b"most recent call" in os.pread(dump.fileno(), 4096, 0))
dump.close()
"""
    assert script(cli, code, meter) == "True True\n"


def test_a_program_that_replaced_itself_does_not_join_what_it_was(cli: Cli, meter: str) -> None:
    code = f"""{FORGOTTEN}
if len(sys.argv) == 2:
    kept = block("before").__enter__()
    os.execv(sys.executable, [sys.executable, sys.argv[0], sys.argv[1], "again"])
with block("after") as run: pass
print(run.joined, run.summary["complete"])
"""
    program = cli.folder / "program.py"
    program.write_text(code)
    said = script(cli, "import runpy, sys; sys.argv = sys.argv[1:]; "
                       "runpy.run_path(sys.argv[0], run_name='__main__')",
                  str(program), meter)  # fmt: skip
    assert said == "False True\n"


# --- a program that dies, a program that never lets go --------------------------------------------


def test_kill_9_of_the_program_loses_no_mark(cli: Cli, meter: str) -> None:
    code = """
import os, signal, sys
from pepr_profiler import profile
run = profile("killed", sensors=sys.argv[1:]).__enter__()
with run.phase("done"):
    run.log(accuracy=0.5)
run.phase("open").__enter__()
run.log(accuracy=0.75)
print(run.directory, flush=True)
sys.stdin.read(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # given a program of its own that kills itself after its last mark
    process = subprocess.Popen([sys.executable, "-c", code, meter], env=cli.environment(),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with ended(process):
        assert process.stdout is not None
        directory = Path(process.stdout.readline().decode().strip())
        tail = directory / "replay.tail.arrows"
        size = tail.stat().st_size
        until(lambda: tail.stat().st_size > size)  # a flush behind its marks
        process.communicate(b"x", timeout=SLOW_S)
    assert process.returncode == -signal.SIGKILL
    summary = cli.report(directory)
    assert (summary["complete"], summary["exit_code"]) == (False, None)
    assert summary["metrics"] == {"accuracy": 0.75}
    assert [(p["name"], p["count"]) for p in summary["phases"]] == [("done", 1), ("open", 1)]
    # and the same in a wrapped program, whose run is then complete
    result, summary = cli.measure("--sensor", meter, "--", *python(code), stdin=b"x")
    assert result.status == 137
    assert summary["complete"]
    assert summary["metrics"] == {"accuracy": 0.75}
    assert [p["name"] for p in summary["phases"]] == ["killed", "done", "open"]
