"""The command runs, and its exit status stands, whatever is missing on the machine."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, Result, codes, component, python, write_meter
from daemons import become, python_of
from sim.permissions import obey_permissions
from sim.powercap import BuildTree, two_socket_server

FAILING = ("sh", "-c", "echo ran; exit 7")


def limited(**limits: int) -> Callable[[], None]:
    """A `preexec_fn` that sets resource limits: NOFILE=8."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    return limit


@pytest.mark.parametrize("limits", [
    *({"NOFILE": count} for count in (5, 6, 8, 10, 12, 14, 16, 20)),
    *({"AS": mega << 20} for mega in (40, 60, 100, 140, 180, 220, 250)),
    {"FSIZE": 16 << 10}, {"FSIZE": 0}, {"CPU": 1000, "NOFILE": 7}, {"STACK": 1 << 19},
], ids=str)  # fmt: skip
def test_a_limit_costs_the_measurement_at_most(cli: Cli, limits: dict[str, int]) -> None:
    # Python itself would leave damaged bytecode behind where files may not grow.
    alone = {"PYTHONDONTWRITEBYTECODE": "1"}
    result = cli("--", *FAILING, preexec_fn=limited(**limits), env=alone)
    assert (result.status, result.stdout) == (7, b"ran\n"), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "count", [15, 16, 17, 20, *(pytest.param(n, marks=pytest.mark.long) for n in range(10, 40))]
)
def test_a_limit_of_descriptors_is_no_reason_to_refuse_a_named_sensor(
    cli: Cli, tmp_path: Path, count: int
) -> None:
    meter = write_meter(tmp_path / "meter", 100)
    result = cli("--sensor", meter, "--", *FAILING, preexec_fn=limited(NOFILE=count))
    assert (result.status, result.stdout) == (7, b"ran\n"), result.stderr
    assert "it has exited" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes a user whom the limit is for")
@pytest.mark.parametrize(
    "count", [3, 4, 5, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 6, 8, 12))]
)
def test_a_limit_of_threads_costs_the_measurement_at_most(open_folder: Path, count: int) -> None:
    # our threads may take what the command needs to be started
    python, env = python_of(54400 + count)

    def prepare() -> None:
        limited(NPROC=count)()
        become(54400 + count)()

    meter = write_meter(open_folder / "meter", 100)
    done = subprocess.run(
        [python, "-m", "pepr_profiler", "-q", "--sensor", meter, "--", "sh", "-c", FAILING[2]],
        env={**env, "TMPDIR": str(open_folder)}, preexec_fn=prepare,
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "ran\n"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "broken", ["raise RuntimeError('not that one')", "1/0", "import nothing_such", "ndarray = None"]
)
def test_a_foreign_numpy_costs_the_summary_and_not_the_recording(
    cli: Cli, tmp_path: Path, broken: str
) -> None:
    folder = tmp_path / "foreign" / "numpy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"{broken}\n")
    meter = write_meter(tmp_path / "meter", 100)
    result = cli(
        "--sensor", meter, "--", "sh", "-c", "sleep 0.5; exit 7",
        env={"PYTHONPATH": str(folder.parent)},
    )  # fmt: skip
    assert result.status == 7
    assert "there is no summary" in result.stderr and "Traceback" not in result.stderr
    # and it is readable where numpy is
    energy = cli.report(cli.runs()[0])["energy"]
    assert energy["total_j"] > 40


def test_a_fault_behind_the_commands_end_does_not_run_it_again(cli: Cli) -> None:
    # given a fault of ours that nothing foresees, after the command has run
    code = """
import sys
from pepr_profiler import __main__
from pepr_profiler.recording.command import HeldSignals
def fault(self): raise RuntimeError("unforeseen")
HeldSignals.release = fault
sys.argv = ["pepr-profile", "-q", "--", "sh", "-c", "echo ran"]
__main__.main()
"""
    result = run_program(cli, code)
    assert (result.status, result.stdout) == (1, b"ran\n")
    assert "unforeseen" in result.stderr and "unmeasured" not in result.stderr


def test_what_cannot_be_written_as_text_is_a_path_all_the_same(cli: Cli, tmp_path: Path) -> None:
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/st\xff")
    result = cli("--store", strange, "--", *FAILING)
    assert (result.status, result.stdout) == (7, b"ran\n")
    assert len(list(Path(strange, "runs").iterdir())) == 1
    Path(strange, "cwd").mkdir()
    result = cli("--store", "here", "--", *FAILING, cwd=Path(strange, "cwd"))
    assert (result.status, result.stdout) == (7, b"ran\n")
    assert len(list(Path(strange, "cwd", "here", "runs").iterdir())) == 1


def test_an_outer_run_that_says_little_is_none_of_the_childs_business(
    cli: Cli, tmp_path: Path
) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for outer in ({"boot_id": boot}, {"boot_id": boot, "recording": {}}, {"recording": None}):
        folder = tmp_path / "outer"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"schema": 1, **outer}))
        result = cli("--", *FAILING, env={"PEPR_RUN_DIR": str(folder)})
        assert (result.status, result.stdout) == (7, b"ran\n"), result.stderr


def test_a_store_that_is_closed_to_us_costs_its_place_only(cli: Cli) -> None:
    cli.store.mkdir(mode=0)
    result = cli("-q", "--", *FAILING, preexec_fn=obey_permissions)
    cli.store.chmod(0o700)
    assert (result.status, result.stdout) == (7, b"ran\n"), result.stderr
    assert "this run is kept in" in result.stderr


def test_a_user_without_a_home_is_measured_elsewhere(open_folder: Path) -> None:
    # given a user who has no entry in passwd, and no HOME
    if os.geteuid() != 0:
        pytest.skip("needs root to become a user without an entry")
    python, env = python_of(54321)
    open_folder.chmod(0o777)
    done = subprocess.run(
        [python, "-m", "pepr_profiler", "-q", "--", *FAILING],
        env={**env, "TMPDIR": str(open_folder)},
        preexec_fn=become(54321),
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "ran\n"), done.stderr
    assert f"this run is kept in {open_folder}" in done.stderr and "Traceback" not in done.stderr
    # and no path is shown that is none
    assert "without a home folder" in done.stderr and "/proc/" not in done.stderr


needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0
    or shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="mounting needs root",
)


def in_mounts(mounts: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a mount namespace of its own, in which `mounts` are made first."""
    command = [sys.executable, "-m", "pepr_profiler", *arguments]
    script = f'{mounts}\nexec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", *command],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PEPR_DAEMON": "off"},
        capture_output=True, text=True, check=False, timeout=100, cwd="/",
    )  # fmt: skip


@needs_mounts
@pytest.mark.parametrize("option", ["size=64k", "size=1m,nr_inodes=3"])
def test_a_disk_that_is_full_before_the_start_costs_no_joule(tmp_path: Path, option: str) -> None:
    meter = write_meter(tmp_path / "meter", 100)
    full, spare = tmp_path / "full", tmp_path / "spare"
    for folder in (full, spare):
        folder.mkdir()
    mounts = f"mount -t tmpfs -o {option} tmpfs {full}\nhead -c 60000 /dev/zero > {full}/filling"
    summary_file = tmp_path / "summary.json"
    result = in_mounts(
        f"{mounts}\nexport TMPDIR={spare}", "--store", str(full / "store"), "--json",
        str(summary_file), "--sensor", meter, "--", "sh", "-c", "sleep 0.6; exit 7",
    )  # fmt: skip
    assert result.returncode == 7, result.stderr
    summary = json.loads(summary_file.read_text())
    assert codes(summary) == {"store-unwritable"}
    truth_j = 100 * summary["duration_s"]
    assert component(summary, "gpu:x")["device_j"] == pytest.approx(truth_j, rel=0.1)
    assert f"this run is kept in {spare}" in " ".join(result.stderr.split())


@needs_mounts
def test_where_nothing_can_be_written_the_command_runs_unmeasured(cli: Cli) -> None:
    places = ("/tmp", "/var/tmp", "/dev/shm")
    if any(Path(sys.prefix).is_relative_to(place) for place in places):
        pytest.skip("the interpreter itself lies where nothing may be written here")
    package = shutil.copytree(
        Path(__file__).parents[1] / "pepr_profiler", cli.folder / "pepr_profiler"
    )
    mounts = f"mount --bind {package.parent} /mnt\n" + "\n".join(
        f"mount -t tmpfs -o ro tmpfs {place}" for place in places
    )
    result = in_mounts(
        f"{mounts}\nexport PYTHONPATH=/mnt\ncd /proc", "--store", "/tmp/x", "--", *FAILING
    )
    assert (result.returncode, result.stdout) == (7, "ran\n"), result.stderr
    assert result.stderr.startswith("pepr-profile: sh runs unmeasured: ")
    assert "fix: give --store DIR" in result.stderr and len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize("away", ["mv {store} {other}", "rm -r {store}"])
def test_a_store_that_goes_away_in_mid_run_costs_nothing(
    cli: Cli, tmp_path: Path, away: str
) -> None:
    meter = write_meter(tmp_path / "meter", 100)
    store, other, spare = tmp_path / "store", tmp_path / "other", tmp_path / "spare"
    spare.mkdir()
    away = away.format(store=store, other=other)
    script = f"echo acc 1; sleep 0.3; {away}; echo acc 2; sleep 0.5; exit 7"
    result = cli(
        "--store", str(store), "--sensor", meter, "--metric", "acc=acc ([0-9]+)",
        "--", "sh", "-c", script, env={"TMPDIR": str(spare)},
    )  # fmt: skip
    assert result.status == 7 and "Traceback" not in result.stderr
    verb = "moved" if away.startswith("mv") else "removed"
    assert f"was {verb} while it was recorded" in " ".join(result.stderr.split())
    [directory] = [*other.glob("runs/*"), *spare.glob("*/runs/*")]
    assert not store.exists() and (verb == "moved" or str(directory) in result.stderr)
    summary = cli.report(directory)
    assert summary["complete"] and codes(summary) == {verb}
    assert summary["metrics"] == {"acc": 2} and summary["exit_code"] == 7
    truth_j = 100 * summary["duration_s"]
    assert summary["duration_s"] > 0.8
    assert component(summary, "gpu:x")["device_j"] == pytest.approx(truth_j, rel=0.1)


def test_a_store_that_is_removed_with_no_place_left_is_reported(cli: Cli, tmp_path: Path) -> None:
    code = """
import shutil, sys, time
from pepr_profiler import block, profile
def nowhere(name): raise OSError(28, "No space left on device")
block.create_elsewhere = nowhere
with profile("x", sensors=[sys.argv[1]], store=sys.argv[2]) as run: shutil.rmtree(sys.argv[2])
[warning] = [w for w in run.summary["warnings"] if w["code"] == "removed"]
assert "No space left on device" in warning["text"], warning
"""
    store = str(tmp_path / "store")
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100), store)
    assert result.status == 0, result.stderr


@pytest.mark.parametrize("closes", [False, True])
def test_a_block_whose_store_is_removed_goes_on_elsewhere_and_says_what_is_lost(
    cli: Cli, tmp_path: Path, closes: bool
) -> None:
    # given also a program that closes the descriptors that it does not know
    code = f"""
import os, shutil, subprocess, sys, time
from pepr_profiler import profile
with profile("x", sensors=[sys.argv[1]], store=sys.argv[2], period_s=0.001) as run:
    with run.phase("before"):
        run.log(a=1)
        while not os.path.getsize(run.directory / "replay.arrows"): time.sleep(0.05)
    if {closes}: os.closerange(3, 4096)
    shutil.rmtree(sys.argv[2])
    with profile("inner") as inner: time.sleep(0.2)
    with run.phase("after"): run.log(b=2); time.sleep(0.3)
assert inner.joined and not os.path.exists(sys.argv[2]) and "PEPR_RUN_DIR" not in os.environ
print(run.directory)
"""
    meter, store = write_meter(tmp_path / "meter", 100), str(tmp_path / "store")
    (tmp_path / "spare").mkdir()
    env = {"TMPDIR": str(tmp_path / "spare")}
    result = run_program(cli, code, meter, store, env=env)
    assert result.status == 0, result.stderr
    summary = cli.report(Path(result.stdout.decode().strip()))
    device_j, truth_j = component(summary, "gpu:x")["device_j"], 100 * summary["duration_s"]
    phases = [phase["name"] for phase in summary["phases"]]
    if closes:
        [partial] = summary["energy"]["partial"]
        assert partial["missing_s"] > 0.5
        assert device_j + 100 * partial["missing_s"] == pytest.approx(truth_j, rel=0.1)
        assert codes(summary) == {"removed", "events-lost", "late-start"}
        assert (summary["metrics"], phases) == ({"b": 2}, ["inner", "after"])
    else:
        assert device_j == pytest.approx(truth_j, rel=0.05)
        assert codes(summary) == {"removed"}
        assert (summary["metrics"], phases) == ({"a": 1, "b": 2}, ["before", "inner", "after"])


# --- the program that we are in -------------------------------------------------------------------


def run_program(cli: Cli, code: str, *arguments: str, **options: Any) -> Result:
    """Runs a program that measures itself, with a store of its own."""
    variables = {"PEPR_STORE": str(cli.store), "PEPR_DAEMON": "off", **options.pop("env", {})}
    done = subprocess.run(
        python(code, *arguments),
        env={**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, check=False, timeout=120, **options,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr.decode())


def test_blocks_that_have_ended_hold_no_descriptor(cli: Cli, tmp_path: Path) -> None:
    code = """
import os, sys
from pepr_profiler import profile
ended, counts = [], []
for number in range(6):
    with profile("x", sensors=[sys.argv[1]]) as run: pass
    ended.append(run)
    counts.append(len(os.listdir("/proc/self/fd")))
assert len(set(counts[1:])) == 1, counts
assert all(run.energy_j == run.summary["energy"]["total_j"] for run in ended)
assert not any(run.joined for run in ended)
"""
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert result.status == 0, result.stderr


WITHOUT_DESCRIPTORS = """
import os, resource, sys
from pepr_profiler import profile
with profile("x", sensors=[sys.argv[1]]) as run:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard[1]))
"""


def test_marks_come_back_when_descriptors_do_and_the_lost_are_counted(
    cli: Cli, tmp_path: Path
) -> None:
    code = (
        WITHOUT_DESCRIPTORS
        + """
    run.log(lost=1)
    with run.phase("lost"): pass
    resource.setrlimit(resource.RLIMIT_NOFILE, hard)
    run.log(kept=2)
    with run.phase("kept"): pass
summary = run.summary
assert summary["metrics"] == {"kept": 2}, summary["metrics"]
assert [phase["name"] for phase in summary["phases"]] == ["kept"]
[warning] = [w for w in summary["warnings"] if w["code"] == "events-lost"]
assert warning["text"].startswith("3 mark(s)"), warning
"""
    )
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert result.status == 0, result.stderr
    assert "PeprWarning: pepr: 3 mark(s)" in result.stderr


def test_a_block_whose_descriptors_the_program_closed_takes_no_cpu_time(
    cli: Cli, tmp_path: Path
) -> None:
    code = """
import os, sys, time
from pepr_profiler import profile
with profile("x", sensors=[sys.argv[1]]) as run:
    os.closerange(3, 4096)
    begun_s = time.process_time()
    time.sleep(2)
    used_s = time.process_time() - begun_s
assert used_s < 0.5, used_s
assert "OPENBLAS_NUM_THREADS" not in os.environ
"""
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert result.status == 0, result.stderr


@pytest.mark.parametrize("close", ["os.closerange(3, 4096)", "close_one_by_one()"])
def test_a_descriptor_that_the_program_took_over_is_left_alone(
    cli: Cli, tmp_path: Path, close: str
) -> None:
    code = f"""
import os, sys, time
from pepr_profiler import profile
def close_one_by_one():
    for number in sorted(map(int, os.listdir("/proc/self/fd"))):
        if number > 2:
            try: os.close(number)
            except OSError: pass
with profile("x", sensors=[sys.argv[1]]) as run:
    run.log(before=1)
    time.sleep(1.2)
    {close}
    counts, files = [], []
    for number in range(350):
        counts.append(os.eventfd(7))
        files.append(open(os.path.join(sys.argv[2], str(number)), "w"))
    run.log(after=2)
    with run.phase("after"): time.sleep(1.2)
sizes = [os.fstat(file.fileno()).st_size for file in files]
assert not any(sizes), sizes
counts = [os.eventfd_read(count) for count in counts]
assert set(counts) == {{7}}, counts
for file in files: file.write("mine"); file.close()
assert run.summary["metrics"] == {{"before": 1, "after": 2}}, run.summary["metrics"]
assert [phase["name"] for phase in run.summary["phases"]] == ["after"]
"""
    folder = tmp_path / "own"
    folder.mkdir()
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100), str(folder))
    assert result.status == 0, result.stderr
    assert {path.read_text() for path in folder.iterdir()} == {"mine"}


@pytest.mark.parametrize("files", [0, 700])
def test_a_counter_whose_descriptor_the_program_closed_is_opened_anew(
    cli: Cli, tmp_path: Path, powercap_sim: BuildTree, files: int
) -> None:
    # given a program that closes all descriptors, and gets ours for files of its own with digits
    tree = powercap_sim(*two_socket_server(), live=True)
    code = """
import os, sys, time
from pepr_profiler import profile
with profile("x", sensors=[sys.argv[1]]) as run:
    time.sleep(0.7)
    os.closerange(3, 4096)
    for number in range(int(sys.argv[3])):
        os.write(os.open(os.path.join(sys.argv[2], str(number)), os.O_RDWR | os.O_CREAT), b"9" * 9)
    time.sleep(0.7)
"""
    result = run_program(cli, code, tree.spec, str(tmp_path), str(files))
    assert result.status == 0, result.stderr
    summary = cli.report(cli.runs()[0])
    truth_j = tree.energy_j("intel-rapl:0", *summary["recording"]["window_ns"])
    assert component(summary, "cpu:package-0")["device_j"] == pytest.approx(truth_j, rel=0.05)


LIFE = {
    "decorated coroutines and generators": """
@run.phase("coroutine")
async def wait(): await asyncio.sleep(0.3)
@run.phase("generator")
def count():
    yield 1
    time.sleep(0.3)
    yield 2
@run.phase("async generator")
async def stream():
    await asyncio.sleep(0.3)
    yield 1
asyncio.run(wait())
assert list(count()) == [1, 2]
async def read(): return [x async for x in stream()]
assert asyncio.run(read()) == [1]
expected = {"coroutine": 0.3, "generator": 0.3, "async generator": 0.3}
""",
    "left in another thread": """
phase = run.phase("moved")
thread = threading.Thread(target=phase.__enter__)
thread.start(); thread.join()
time.sleep(0.2)
phase.__exit__(None, None, None)
expected = {"moved": 0.2}
""",
    "left in another task": """
async def main():
    phase = run.phase("moved")
    async def enter(): phase.__enter__()
    await asyncio.create_task(enter())
    await asyncio.sleep(0.2)
    phase.__exit__(None, None, None)
asyncio.run(main())
expected = {"moved": 0.2}
""",
    "left twice, or never entered": """
phase = run.phase("twice")
with phase: time.sleep(0.2)
phase.__exit__(None, None, None)
run.phase("never").__exit__(None, None, None)
expected = {"twice": 0.2}
""",
}


@pytest.mark.parametrize("what", LIFE)
def test_the_life_of_a_phase_never_raises_into_the_program(
    cli: Cli, tmp_path: Path, what: str
) -> None:
    code = f"""
import asyncio, sys, threading, time, warnings
warnings.simplefilter("ignore")
from pepr_profiler import profile
with profile("x", sensors=[sys.argv[1]]) as run:
{textwrap.indent(LIFE[what], "    ")}
found = {{phase["name"]: phase["duration_s"] for phase in run.summary["phases"]}}
assert found.keys() == expected.keys(), found
for name, seconds in expected.items(): assert seconds <= found[name] < seconds + 2, found
run.__exit__(None, None, None)  # again
"""
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert result.status == 0, result.stderr
    assert len(cli.runs()) == 1


def test_a_block_decorates_functions_of_every_kind(cli: Cli, tmp_path: Path) -> None:
    code = """
import asyncio, sys, time
from pepr_profiler import profile
@profile("plain", sensors=[sys.argv[1]])
def plain(x): time.sleep(0.2); return x
@profile("coroutine", sensors=[sys.argv[1]])
async def coroutine(x): await asyncio.sleep(0.2); return x
@profile("generator", sensors=[sys.argv[1]])
def generator(x):
    time.sleep(0.2)
    yield x
assert [plain(1), plain(2), asyncio.run(coroutine(3)), list(generator(4))] == [1, 2, 3, [4]]
assert plain.__name__ == "plain"
"""
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert result.status == 0, result.stderr
    runs = [cli.report(directory) for directory in cli.runs()]
    assert sorted(run["name"] for run in runs) == ["coroutine", "generator", "plain", "plain"]
    assert all(run["complete"] and run["duration_s"] >= 0.2 for run in runs)


LEFT_OPEN = {
    "a suspended generator": "def g():\n    with block(): yield 1\nkept = g(); next(kept)",
    "a context manager that is never left": "kept = block(); kept.__enter__()",
    "contextlib": (
        "import contextlib\n@contextlib.contextmanager\ndef g():\n    with block(): yield 1\n"
        "kept = g(); kept.__enter__()"
    ),
    "an exit stack": (
        "import contextlib\nkept = contextlib.ExitStack(); kept.enter_context(block())"
    ),
    "a daemon thread": (
        "def work():\n    with block(): time.sleep(60)\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(1.5); sys.exit(0)"
    ),
    "asyncio in a daemon thread": (
        "async def main():\n    with block(): await asyncio.sleep(60)\n"
        "threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()\n"
        "time.sleep(1.5)"
    ),
    "an error": "kept = block(); kept.__enter__(); time.sleep(0.4); raise SystemExit(0)",
}


@pytest.mark.parametrize("what", LEFT_OPEN)
def test_a_block_that_nobody_leaves_ends_with_the_program(
    cli: Cli, tmp_path: Path, what: str
) -> None:
    code = (
        "import asyncio, sys, threading, time\nfrom pepr_profiler import profile\n"
        f"def block(): return profile('x', sensors=[sys.argv[1]])\n{LEFT_OPEN[what]}\n"
        "time.sleep(0.4)"
    )
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert result.status == 0, result.stderr
    [directory] = cli.runs()
    run = cli.report(directory)
    assert run["complete"] and run["energy"]["total_j"] > 20


def test_a_block_without_a_free_descriptor_at_its_end_does_not_raise(
    cli: Cli, tmp_path: Path
) -> None:
    code = (
        WITHOUT_DESCRIPTORS
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, hard)
print("went on")
"""
    )
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert (result.status, result.stdout) == (0, b"went on\n"), result.stderr
    assert "PeprWarning" in result.stderr and "pepr-profile report" in result.stderr


DEATHS = {
    "os._exit": "os._exit(9)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "a crash in C": "ctypes.string_at(0)",
    "an abort": "os.abort()",
    "exec": "os.execv('/bin/true', ['true'])",
}


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("after_s", [0.0, 0.6])
def test_of_a_program_that_dies_early_the_first_rows_are_on_disk(
    cli: Cli, tmp_path: Path, death: str, after_s: float
) -> None:
    code = f"""
import ctypes, os, signal, sys, time
from pepr_profiler import profile
with profile("x", sensors=[sys.argv[1]]):
    time.sleep({after_s})
    {DEATHS[death]}
"""
    run_program(cli, code, write_meter(tmp_path / "meter", 100), preexec_fn=limited(CORE=0))
    [directory] = cli.runs()
    summary = cli.report(directory)
    # On disk are all lanes, from the beginning to the last flush.
    assert not summary["complete"] and not codes(summary)
    assert summary["sampler"]["samples"] >= 2 and summary["memory"]["peak_rss_bytes"]
    assert after_s / 5 <= summary["duration_s"] < after_s + 2
    truth_j = 100 * summary["duration_s"]
    assert component(summary, "gpu:x")["device_j"] == pytest.approx(truth_j, rel=0.01, abs=0.01)


@pytest.mark.parametrize("after_s", [0.0, 0.6])
def test_of_a_profiler_that_dies_early_the_first_rows_are_on_disk(
    cli: Cli, tmp_path: Path, after_s: float
) -> None:
    # given a child that ends its profiler as soon as the recording has begun
    code = f"""
import os, pathlib, signal, time
folder = pathlib.Path(os.environ["PEPR_RUN_DIR"])
while not any(path.stat().st_size for path in folder.glob("processes.*")): time.sleep(0.001)
time.sleep({after_s})
os.kill(os.getppid(), signal.SIGKILL)
"""
    meter = write_meter(tmp_path / "meter", 100)
    assert cli("--sensor", meter, "--", *python(code)).status == -9
    [directory] = cli.runs()
    summary = cli.report(directory)
    assert not summary["complete"] and not codes(summary)
    assert summary["sampler"]["samples"] >= 2
    assert after_s / 5 <= summary["duration_s"] < after_s + 2


@pytest.mark.parametrize(("kind", "number"), [("import", 20), ("time", 20), ("step", 60)])
def test_ctrl_c_at_any_time_leaves_nothing(kind: str, number: int) -> None:
    program = [sys.executable, str(Path(__file__).with_name("interrupts.py")), str(number), kind]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{kind}: {number} interrupts, 0 left something\n"


def test_other_signals_whose_handlers_raise_leave_nothing_either(cli: Cli, tmp_path: Path) -> None:
    # given a time limit and a clean end, as training programs have them
    code = """
import os, signal, sys, threading, time
from pepr_profiler import profile, block
class Limit(Exception): pass
def limit(*_): raise Limit
signal.signal(signal.SIGALRM, limit)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
begin, end = block.Recorder.begin, block.Recorder.close
def interrupted_begin(*given): os.kill(os.getpid(), signal.SIGALRM); begin(*given)
def interrupted_end(*given, **named): os.kill(os.getpid(), signal.SIGTERM); end(*given, **named)
block.Recorder.begin, block.Recorder.close = interrupted_begin, end
try:
    with profile("x", sensors=[sys.argv[1]]): assert False
except Limit: pass
assert "PEPR_RUN_DIR" not in os.environ
block.Recorder.begin, block.Recorder.close = begin, interrupted_end
try:
    with profile("x", sensors=[sys.argv[1]]) as run: pass
except SystemExit: pass
assert run.summary["complete"] and "PEPR_RUN_DIR" not in os.environ
assert signal.getsignal(signal.SIGALRM) is limit
block.Recorder.close = end
with profile("x", sensors=[sys.argv[1]]): pass
"""
    result = run_program(cli, code, write_meter(tmp_path / "meter", 100))
    assert result.status == 0, result.stderr


def test_a_sub_interpreter_is_refused_with_a_reason(cli: Cli) -> None:
    code = """
import sys
import textwrap
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
run = getattr(interpreters, "run_string", None) or interpreters.exec
run(interpreters.create(), '''
import sys
import textwrap
try:
    import pepr_profiler._core
except ImportError as error:
    print(error)
''')
"""
    result = run_program(cli, code)
    assert result.status == 0, result.stderr
    assert b"sub-interpreter" in result.stdout or b"subinterpreter" in result.stdout


def test_the_benchmark_of_faults_has_each_once_and_the_same_for_a_seed() -> None:
    from benchmarks.fault_cases import faults

    names = [fault.name for fault in faults(1)]
    assert len(set(names)) == len(names) >= 60
    assert names == [fault.name for fault in faults(1)] != [fault.name for fault in faults(2)]
