"""`pepr-profile attach PID`: what already runs is measured whole, and does not notice."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import SLOW_S, Cli, charged_s, codes, component, ended, python, until, used_s
from launchers import inside

from pepr_profiler import TargetError, TraceError, UsageError, profile
from pepr_profiler.block import open_attached
from pepr_profiler.recording.attached import hold
from pepr_profiler.recording.cgroups import container_folder
from pepr_profiler.recording.options import Options
from pepr_profiler.trace.events import read_events
from pepr_profiler.trace.lane import LaneReader
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

# Says "ready", and goes on with argv's code once a line comes in.
WAITING = "import os, sys\nprint('ready', flush=True)\nsys.stdin.readline()\n"
BUSY = "import time\nwhile time.process_time() < {cpu_s}: pass\n"


pytestmark = pytest.mark.usefixtures("on_our_own")


@contextmanager
def running(
    command: Sequence[str], *, says: bytes = b"ready\n", **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A program of somebody's that has said that it runs; gone afterwards."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ended(subprocess.Popen(command, **{**pipes, **options})) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == says
        yield process


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    with ended(subprocess.Popen(["sleep", "600"])) as process:
        yield process


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()


@contextmanager
def attached(cli: Cli, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """`pepr-profile attach`, once it measures."""
    with ended(cli.start("attach", *arguments, **options)) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert b"measuring" in line, line + process.stderr.read()
        yield process


def finish(cli: Cli, process: subprocess.Popen[bytes]) -> tuple[str, dict[str, Any]]:
    """What an attach that is about to end says, and its summary; it ends with status 0."""
    _, said = process.communicate(timeout=SLOW_S)
    assert process.returncode == 0, said.decode()
    (directory,) = cli.runs()
    summary = json.loads((directory / "run.json").read_text())
    assert (summary["complete"], summary["exit_code"], summary["signal"]) == (True, None, None)
    return said.decode(), summary


def lane(directory: Path, channel: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and values of a channel of the process lane, as flushed so far."""
    reader = LaneReader(directory, "processes")
    index = [c.name for c in reader.lane.channels].index(channel)
    batches = list(reader)
    return (
        np.concatenate([batch.t_ns for batch in batches]),
        np.concatenate([batch.values[index] for batch in batches]),
    )


def is_flushed(directory: Path) -> bool:
    """Whether there is anything to read in the process lane yet."""
    try:
        LaneReader(directory, "processes")
    except TraceError:
        return False
    return True


# --- a cgroup, a container ------------------------------------------------------------------------


def test_attach_follows_a_cgroup_until_it_is_empty(cli: Cli, meter: str, cgroup: Path) -> None:
    # given a container with a program in a group below
    ident = "3f2a" * 16
    group = cgroup / f"docker-{ident}.scope"
    (group / "inner").mkdir(parents=True)
    conmon = subprocess.Popen(inside(group, "bash", "-c", "exec -a slurmstepd sleep 600"))
    with (
        ended(conmon),
        running(inside(group / "inner", *python(f"{WAITING}{BUSY.format(cpu_s=0.5)}"))) as target,
        attached(cli, "--container", ident[:12], "--sensor", meter) as process,
    ):
        before_s = used_s(target.pid)
        # when it works, and so do others who come and whom it knows nothing of
        come = subprocess.Popen(inside(group, *python(BUSY.format(cpu_s=0.5))))
        go(target)
        truth_s = charged_s(come) + charged_s(target) - before_s
        conmon.kill()
        conmon.wait(SLOW_S)
        # then the attach ends by itself, and has what the kernel charged to all
        said, summary = finish(cli, process)
    assert summary["recording"]["exit"]["ended_by"] == "exit"
    _, cpu_s = lane(cli.runs()[0], "job/cpu")
    assert cpu_s[-1] - cpu_s[0] == pytest.approx(truth_s, abs=0.03)
    assert summary["command"] == python(f"{WAITING}{BUSY.format(cpu_s=0.5)}")
    assert f"pepr > attach cgroup {cgroup}"[:30] in said
    assert codes(summary) == set()
    assert cli.report(summary["run_id"]) == summary


def test_attach_is_left_out_of_a_cgroup_that_it_is_in(cli: Cli, meter: str, cgroup: Path) -> None:
    with running(inside(cgroup, *python(WAITING))) as target:
        words = ["attach", "--cgroup", str(cgroup), "--sensor", meter]
        attach = inside(cgroup, sys.executable, "-m", "pepr_profiler", *words)
        pipe = subprocess.PIPE
        with ended(subprocess.Popen(attach, env=cli.environment(), stderr=pipe)) as process:
            assert process.stderr is not None
            assert b"measuring cgroup" in process.stderr.readline()
            go(target)
            _, summary = finish(cli, process)
    assert "attached-to-ancestor" in codes(summary)
    _, cpu_s = lane(cli.runs()[0], "job/cpu")
    assert cpu_s[-1] < 0.1  # its own is more


@pytest.mark.parametrize(
    ("peak", "most", "source"), [(9000, 3000, "memory.current"), (9001, 9001, "memory.peak")]
)
def test_a_cgroups_peak_of_memory_is_the_kernels_if_it_is_of_the_run(
    cli: Cli, meter: str, cgroup: Path, peak: int, most: int, source: str
) -> None:
    # given a folder like a cgroup that charges memory, which not every machine's groups do
    del cgroup
    group = cli.folder / "group"
    group.mkdir()
    texts = {"cpu.stat": "usage_usec 1", "memory.current": "1000", "memory.peak": "9000"}
    with sleeping() as target:
        for name, text in {**texts, "cgroup.procs": str(target.pid)}.items():
            (group / name).write_text(f"{text}\n")
        with attached(cli, "--cgroup", str(group), "--sensor", meter) as process:
            (directory,) = cli.runs()
            until(lambda: is_flushed(directory))
            (group / "memory.current").write_text("3000\n")
            (group / "memory.peak").write_text(f"{peak}\n")
            until(lambda: lane(directory, "job/memory-current")[1][-1] == 3000)
            (group / "cgroup.procs").write_text("")
            said, summary = finish(cli, process)
    memory = summary["memory"]
    assert (memory["cgroup_peak_bytes"], memory["cgroup_peak_source"]) == (most, source)
    assert memory["peak_rss_bytes"] > 2**18
    assert f"{most / 1000:.3f} kB of the cgroup with its file cache" in " ".join(said.split())


def test_a_block_measures_a_cgroup(meter: str, cgroup: Path) -> None:
    with running(inside(cgroup, *python(WAITING + BUSY.format(cpu_s=0.5)))) as target:
        before_s = used_s(target.pid)
        with profile("theirs", cgroup=cgroup, sensors=[meter]) as run:
            go(target)
            truth_s = charged_s(target) - before_s
    _, cpu_s = lane(run.directory, "job/cpu")
    assert cpu_s[-1] - cpu_s[0] == pytest.approx(truth_s, abs=0.03)
    assert not run.joined
    with pytest.raises(TargetError, match="no process is in"), profile("x", cgroup=cgroup):
        pass
    for wrong in ({"cgroup": "no/such"}, {"cgroup": 7}, {"cgroup": cgroup, "pids": [1]}):
        with pytest.raises(UsageError):
            profile("x", **wrong)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--container", "train"], "hexadecimal"),
        (["--container", "77"], "no running container has the id 77"),
        (["--container", "3f2a"], "3f2aaaaaaaaa, 3f2abbbbbbbb"),
        (["--cgroup", "{cgroup}/empty"], "no process is in the cgroup"),
        (["--cgroup", "no/such"], "there is no cgroup"),
        (["--cgroup", "x", "--container", "77"], "only one of"),
        (["1", "--cgroup", "x"], "only one of"),
        (["--cgroup", "/etc"], "/etc is no cgroup"),
        (["--cgroup", "3:memory:/user.slice"], "is a cgroup of version 1"),
        (["--cgroup", "0::/no/such"], "there is no cgroup"),
    ],
)
def test_a_cgroup_that_cannot_be_followed_is_refused(
    cli: Cli, cgroup: Path, words: list[str], why: str
) -> None:
    for name in ("a" * 60, "b" * 60):
        (cgroup / f"libpod-3f2a{name}.scope").mkdir()
        (cgroup / f"libpod-conmon-3f2a{name}.scope").mkdir()
    (cgroup / "empty").mkdir()
    result = cli("attach", *(word.format(cgroup=cgroup) for word in words))
    assert result.status in (2, 125)
    assert why in " ".join(result.stderr.split())
    assert "fix: " in result.stderr
    assert not cli.runs()


@pytest.mark.parametrize(
    "name",
    [
        "docker-{}.scope",
        "libpod-{}.scope",
        "cri-containerd-{}.scope",
        "crio-{}.scope",
        "{}",
        "kubepods-besteffort-pod1.slice:cri-containerd:{}",
    ],
)
def test_a_container_is_found_by_its_id(cgroup: Path, name: str) -> None:
    ident = os.urandom(32).hex()
    group = cgroup / name.format(ident)
    (group / "container").mkdir(parents=True)
    for given in (ident, ident[:12], f"containerd://{ident}"):
        assert container_folder(given) == str(group)


# --- how long it lasts, and what it says ----------------------------------------------------------


def test_attach_follows_the_whole_tree_until_it_has_exited(cli: Cli, meter: str) -> None:
    # given a program that will be busy for 0.5 s, have a child that is, and leave a grandchild
    code = f"""{WAITING}import subprocess, time
before_s = time.process_time()
subprocess.run([sys.executable, "-c", {BUSY.format(cpu_s=0.5)!r}], check=True)
while time.process_time() - before_s < 0.5: pass
"""
    with (
        running(python(code)) as target,
        attached(cli, str(target.pid), "--sensor", meter) as process,
    ):
        before_s = used_s(target.pid)
        go(target)
        truth_s = charged_s(target) - before_s
        # when all have exited, then it ends by itself
        said, summary = finish(cli, process)
    assert summary["recording"]["exit"]["ended_by"] == "exit"
    # then it has what the kernel charged to them: 0.5 s each, and starting another interpreter
    times, cpu_s = lane(cli.runs()[0], "job/cpu")
    assert cpu_s[-1] - cpu_s[0] == pytest.approx(truth_s, abs=0.05)
    # and all of that is within the window
    begin_ns, end_ns = summary["recording"]["window_ns"]
    assert np.interp(end_ns, times, cpu_s) - np.interp(begin_ns, times, cpu_s) >= 1.0
    metered = component(summary, "gpu:meter")
    assert metered["device_j"] == pytest.approx(100 * summary["duration_s"], rel=1e-6)
    # and it tells what was measured, as `run` does
    assert summary["command"] == python(code)
    assert summary["recording"]["attached"] == [{"pid": target.pid, "command": python(code)}]
    assert f"pepr > attach {target.pid} ({sys.executable[:10]}" in said
    assert "exit" not in said.split("\n")[0]
    assert summary["memory"]["peak_rss_bytes"] > 2**20
    assert cli.report(summary["run_id"]) == summary
    assert "attached" in cli("runs", "list").stdout.decode()


def test_attach_waits_for_a_daemon_that_outlives_its_root(cli: Cli, meter: str) -> None:
    # given a program that leaves a daemon behind, which lives until a FIFO is written to
    fifo = cli.folder / "fifo"
    os.mkfifo(fifo)
    daemon = "import os, sys\nif os.fork(): os.read(0, 3), os._exit(0)\nopen(sys.argv[1]).read()"
    code = (
        f"{WAITING}import subprocess\n"
        f"subprocess.run([sys.executable, '-c', {daemon!r}, sys.argv[1]])"
    )
    with (
        running(python(code, str(fifo))) as target,
        attached(cli, "--pid", str(target.pid), "--sensor", meter) as process,
    ):
        (directory,) = cli.runs()
        until(lambda: is_flushed(directory))
        go(target)
        until(lambda: lane(directory, "job/processes")[1][-1] == 3)
        go(target)
        assert target.wait(SLOW_S) == 0
        root_ended_ns = time.monotonic_ns()

        def seen_alone() -> bool:
            times, living = lane(directory, "job/processes")
            return bool(times[-1] > root_ended_ns and living[-1] == 1)

        until(seen_alone)
        assert process.poll() is None
        # when the daemon ends, so does the attach
        fifo.write_text("end")
        _, summary = finish(cli, process)
    assert summary["recording"]["exit"]["ended_by"] == "exit"
    times, living = lane(directory, "job/processes")
    assert living[-1] == 0
    end_ns = summary["recording"]["window_ns"][1]
    assert np.any((times > root_ended_ns) & (times < end_ns) & (living == 1))


def test_attach_waits_for_a_daemon_that_works_even_if_it_went_unseen(cli: Cli, meter: str) -> None:
    # given a daemon whose parent ends at once, before anybody can have looked
    code = f"""{WAITING}
if os.fork():
    os.wait(), os._exit(0)
if os.fork():
    os._exit(0)
try:
    os.nice(-15)  # its CPU time is all that shows of it: on a busy machine it needs its part
except PermissionError:
    pass
os.set_blocking(0, False)
while True:
    try:
        os.read(0, 1)
        break
    except BlockingIOError:
        pass
"""
    with (
        running(python(code)) as target,
        attached(cli, str(target.pid), "--sensor", meter) as process,
    ):
        (directory,) = cli.runs()
        until(lambda: is_flushed(directory))
        if "perf" not in LaneReader(directory, "processes").lane.channels[0].labels["source"]:
            pytest.skip("without perf nothing tells of a process that was never seen")
        go(target)
        assert target.wait(SLOW_S) == 0
        root_ended_ns = time.monotonic_ns()
        until(lambda: lane(directory, "job/cpu")[0][-1] > root_ended_ns + 10**9)
        assert process.poll() is None
        assert target.stdin is not None
        target.stdin.close()
        finish(cli, process)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_ends_the_recording_and_never_reaches_the_target(
    cli: Cli, meter: str, name: str
) -> None:
    code = """
import os, signal, sys
def say(signo, frame):
    os.write(1, signal.Signals(signo).name.encode() + b"\\n")
for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT, signal.SIGUSR1):
    signal.signal(signo, say)
os.write(1, b"ready\\n")
sys.stdin.read()
"""
    with running(python(code)) as target:
        with attached(cli, str(target.pid), "--sensor", meter) as process:
            assert "TracerPid:\t0\n" in Path(f"/proc/{target.pid}/status").read_text()
            process.send_signal(getattr(signal, name))
            process.send_signal(getattr(signal, name))  # an impatient second one costs nothing
            said, summary = finish(cli, process)
        assert "pepr > attach" in said
        assert summary["recording"]["exit"]["ended_by"] == name
        # the target runs on, and the first signal that it ever got is ours
        assert target.poll() is None
        target.send_signal(signal.SIGUSR1)
        assert target.stdout is not None
        assert target.stdout.readline() == b"SIGUSR1\n"


def test_signal_that_was_ignored_stays_ignored_as_under_nohup(cli: Cli, meter: str) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with (
        sleeping() as target,
        attached(cli, str(target.pid), "--sensor", meter, preexec_fn=ignore) as process,
    ):
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        _, summary = finish(cli, process)
    assert summary["recording"]["exit"]["ended_by"] == "SIGTERM"


def test_duration_ends_it_to_the_nanosecond_and_quiet_says_nothing(cli: Cli, meter: str) -> None:
    with sleeping() as target:
        result, summary = cli.measure(
            str(target.pid), "--duration", "300ms", "--sensor", meter, "-q", verb="attach"
        )
        assert target.poll() is None
    assert (result.status, result.stdout, result.stderr) == (0, b"", "")
    begin_ns, end_ns = summary["recording"]["window_ns"]
    assert end_ns - begin_ns == 300_000_000
    assert component(summary, "gpu:meter")["device_j"] == pytest.approx(30, rel=1e-6)
    assert (summary["name"], summary["command"]) == ("sleep", ["sleep", "600"])
    assert (summary["complete"], summary["exit_code"]) == (True, None)
    assert summary["recording"]["exit"]["ended_by"] == "duration"


def test_metric_file_is_watched_and_an_older_one_is_stale(cli: Cli, meter: str) -> None:
    curve, old = cli.folder / "curve.json", cli.folder / "old.json"
    old.write_text('{"f1": 1}')
    options = ["--metric-file", f"{curve}:acc", "--metric-file", f"{old}:f1", "--sensor", meter]
    with sleeping() as target, attached(cli, str(target.pid), *options) as process:
        (directory,) = cli.runs()
        for value in (0.5, 0.75):
            curve.write_text('{"acc": ')  # as seen while it is being written
            curve.write_text(json.dumps({"acc": value}))
            until(lambda v=value: {"acc": v} in [m for _, m in read_events(directory).metrics])
        process.send_signal(signal.SIGINT)
        _, summary = finish(cli, process)
    logged = [values["acc"] for _, values in read_events(directory).metrics]
    assert logged == [0.5, 0.75]
    assert summary["metrics"] == {"acc": 0.75}
    assert summary["performance"] == {"metric": "acc", "value": 0.75}
    assert codes(summary) >= {"metric-file-stale"}


def test_attached_midway_sees_what_its_wrapper_sees(cli: Cli, meter: str) -> None:
    # given a wrapped program with workers that compute, some of them renewed all the time
    code = """
import multiprocessing, os, select, time
def work(cpu_s):
    while time.process_time() < cpu_s: pass
context = multiprocessing.get_context("fork")
long = context.Process(target=work, args=(600,), daemon=True)
long.start()
os.write(1, b"%d\\n" % long.pid)
while not select.select([0], [], [], 0)[0]:
    short = context.Process(target=work, args=(0.2,))
    short.start()
    short.join()
long.kill()
"""
    wrapper = cli.start("--sensor", meter, "--name", "wrapped", "--", *python(code),
                        stdin=subprocess.PIPE)  # fmt: skip
    with ended(wrapper):
        assert wrapper.stdout is not None
        worker = int(wrapper.stdout.readline())
        parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        # when somebody attaches to it for a while
        result, attached = cli.measure(
            str(parent), "--duration", "2.5s", "--sensor", meter, verb="attach"
        )
        assert result.status == 0, result.stderr
        wrapper.communicate(timeout=SLOW_S)
    # then both have the same CPU time in these 2.5 s
    used_s = []
    for directory in cli.runs():
        times, cpu_s = lane(directory, "job/cpu")
        used_s.append(np.diff(np.interp(attached["recording"]["window_ns"], times, cpu_s))[0])
    assert len(used_s) == 2
    assert used_s[0] > 0.05  # however busy the machine is
    assert used_s[0] == pytest.approx(used_s[1], rel=0.03, abs=0.02)


def test_attach_within_a_run_is_a_recording_of_its_own(cli: Cli, meter: str) -> None:
    with sleeping() as target:
        inner = [sys.executable, "-m", "pepr_profiler", "attach", str(target.pid)]
        result, outer = cli.measure(
            "--sensor", meter, "--", *inner, "--duration", "0.2", "--sensor", meter
        )
    assert result.status == 0, result.stderr
    names = {json.loads((path / "run.json").read_text())["name"] for path in cli.runs()}
    assert names == {"pepr_profiler", "sleep"}
    assert outer["phases"] == []


@pytest.mark.parametrize("verb", ["run", "attach"])
def test_attribution_device_makes_the_total_what_the_devices_took(
    cli: Cli, meter: str, verb: str
) -> None:
    with sleeping() as target:
        what = {"run": ["--", "sleep", "0.2"], "attach": [str(target.pid), "--duration", "0.2"]}
        result, summary = cli.measure(
            "--scope", "device", "--sensor", meter, *what[verb], verb=verb
        )
    assert result.status == 0, result.stderr
    assert summary["recording"]["options"]["scope"] == "device"
    added = [c for c in summary["energy"]["components"] if c["in_total"]]
    assert summary["energy"]["total_j"] == pytest.approx(sum(c["device_j"] for c in added))
    # a job that sleeps has next to nothing of the machine, and that is reported all the same
    shares_j = [sum(c[key] for c in added) for key in ("job_j", "others_j", "idle_j")]
    assert sum(shares_j) == pytest.approx(summary["energy"]["total_j"])
    assert shares_j[0] < summary["energy"]["total_j"]
    assert "attribution  this job" in result.stderr
    assert "--attribution device" in result.stderr


def test_live_line_tells_the_energy_so_far_and_is_gone_at_the_end(cli: Cli, meter: str) -> None:
    master, slave = pty.openpty()
    with sleeping() as target:
        process = cli.start(
            "attach", str(target.pid), "--sensor", meter, "--json", "-",
            stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        with ended(process):
            seen = b""
            while b"pepr  00:0" not in seen:
                seen += os.read(master, 4096)
            process.send_signal(signal.SIGINT)
            while b"saved" not in seen:
                seen += os.read(master, 4096)
            out, _ = process.communicate(timeout=SLOW_S)
    os.close(master)
    assert process.returncode == 0
    assert json.loads(out)["complete"]
    after = seen[seen.rindex(b"pepr  00:0") :]
    assert after.index(b"\x1b[2K") < after.index(b"pepr > ")


# --- who cannot be followed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "no PID is given"),
        (["python", "train.py"], 2, "'python' is not a PID"),
        (["0"], 2, "PIDs are positive"),
        (["--metric", "acc=([0-9.]+)", "1"], 2, "--metric-file"),
        (["--duration", "0", "1"], 2, "at least 1 ns"),
        (["--scope", "room", "1"], 2, "scope"),
        (["9999999"], 125, "there is no process 9999999"),  # beyond the kernel's largest PID
        (["99999999999999999999"], 125, "there is no process"),
        (["1"], 125, "where every process comes from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_request_that_cannot_work_is_refused_with_a_remedy(
    cli: Cli, arguments: list[str], status: int, says: str
) -> None:
    result = cli("attach", *arguments)
    assert (result.status, result.stdout) == (status, b"")
    assert says in result.stderr
    assert "fix: " in result.stderr or "--help" in result.stderr
    assert "Traceback" not in result.stderr
    assert cli.runs() == []


def test_thread_of_the_kernel_is_refused() -> None:
    if Path("/proc/2/comm").read_text() != "kthreadd\n" if Path("/proc/2").exists() else True:
        pytest.skip("this PID namespace shows no thread of the kernel")
    with pytest.raises(TargetError, match=r"2 \(\[kthreadd\]\) is a thread of the kernel"):
        hold([2])


def test_zombie_is_refused_and_its_parent_named() -> None:
    # given a process that has ended, and that its parent (we) has not collected
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(TargetError, match="has ended already") as caught:
            hold([process.pid])
        assert f"its parent {os.getpid()} " in caught.value.why
        # and it is still there to be collected
        assert process.wait(SLOW_S) == 0


def test_leader_that_ended_before_its_threads_is_no_zombie() -> None:
    code = """
import ctypes, sys, threading
def work():
    print("ready", flush=True)
    sys.stdin.read()
threading.Thread(target=work).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with running(python(code)) as target:
        stat = Path(f"/proc/{target.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        with hold([target.pid]) as targets:
            assert not targets.drop_ended()


def test_thread_is_refused_and_its_process_named() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        with pytest.raises(TargetError, match="is a thread, not a process") as caught:
            hold([thread.native_id])
        assert caught.value.fix == f"pepr-profile attach {os.getpid()}"
    finally:
        stop.set()
        thread.join()


def test_profiler_does_not_follow_itself() -> None:
    with pytest.raises(UsageError, match="is this process itself"):
        hold([os.getpid()])


def test_profiler_leaves_itself_out_of_what_it_was_started_from(cli: Cli, meter: str) -> None:
    # given a script that attaches to itself, and is idle but for the profiler
    ours = f"{sys.executable} -m pepr_profiler attach $$ --sensor {meter} --cpu-power 1:2"
    script = f"{ours} 2>said & while ! grep -q measuring said; do sleep 0.05; done; exec sleep 1"
    shell = subprocess.Popen(["sh", "-c", script], env=cli.environment(), cwd=cli.folder,
                             start_new_session=True)  # fmt: skip
    with ended(shell) as process:
        assert process.wait(SLOW_S) == 0
        # then it ends with the script, and has counted the script alone
        (directory,) = cli.runs()

        def finished() -> dict[str, Any] | None:
            run: dict[str, Any] = json.loads((directory / "run.json").read_text())
            return run if run["complete"] else None

        try:
            run = until(finished)
        except AssertionError:
            os.killpg(shell.pid, signal.SIGKILL)  # it would follow itself for ever
            raise
    assert run["recording"]["exit"]["ended_by"] == "exit"
    assert codes(run) >= {"attached-to-ancestor"}
    times, cpu_s = lane(directory, "job/cpu")
    begin_ns, end_ns = run["recording"]["window_ns"]
    inside = (times >= begin_ns) & (times <= end_ns)
    assert cpu_s[inside][-1] - cpu_s[inside][0] < run["sampler"]["cpu_s"]
    assert lane(directory, "job/processes")[1][inside].max() <= 3  # sh, grep or sleep


def test_process_named_twice_or_below_another_is_followed_once() -> None:
    code = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
sys.stdin.read()
child.kill()
"""
    with ended(
        subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        with hold([child, parent.pid, child, parent.pid]) as targets:
            assert [target.pid for target in targets.roots] == [parent.pid]
            # and when the one above is gone, it is followed for itself
            parent.kill()
            os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
            assert targets.drop_ended()
            assert [target.pid for target in targets.roots] == [child]
            assert [w["code"] for w in targets.warnings] == ["target-ended"]
        os.kill(child, signal.SIGKILL)


def test_target_that_exits_while_we_attach_is_reported_and_not_followed(tmp_path: Path) -> None:
    options, store = Options(name="race", cpu_power="1:2"), tmp_path / "store"
    with sleeping() as stays, sleeping() as goes, hold([goes.pid, stays.pid]) as targets:
        goes.kill()
        goes.wait()
        recorder = open_attached(options, store, targets)
        recorder.discard()
        assert [target["pid"] for target in recorder.attached] == [stays.pid]
        assert [warning["code"] for warning in recorder.warnings] == ["target-ended"]
        stays.kill()
        stays.wait()
        with pytest.raises(TargetError, match="exited while pepr-profile attached"):
            open_attached(options, store, targets)
    assert list((tmp_path / "store" / "runs").iterdir()) == []


def test_pid_that_was_given_to_another_process_is_not_followed(tmp_path: Path) -> None:
    last_pid = Path("/proc/sys/kernel/ns_last_pid")
    try:
        last_pid.open("w").close()
    except OSError:
        pytest.skip("the next PID can be chosen only by root, on a kernel that can checkpoint")
    options, store = Options(name="reused", cpu_power="1:2"), tmp_path / "store"
    with sleeping() as before, hold([before.pid]) as targets:
        before.kill()
        before.wait()

        def take_over() -> subprocess.Popen[bytes] | None:
            last_pid.write_text(str(before.pid - 1))
            process = subprocess.Popen(["sleep", "600"])
            if process.pid == before.pid:
                return process
            process.kill()
            process.wait()
            return None

        with ended(until(take_over)) as after:
            assert after.pid == before.pid
            with pytest.raises(TargetError, match="exited while pepr-profile attached"):
                open_attached(options, store, targets)
            assert after.poll() is None


@contextmanager
def below(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`unshare` with a program below it, as process 1 of a PID namespace; its PID as seen here."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("PID namespaces are made with unshare, by root")
    probe = subprocess.run(["unshare", *command, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no namespaces here: {probe.stderr.decode().strip()}")
    whole = ["unshare", *command, "--kill-child", "sh", "-c", "echo ready; exec sleep 600"]
    with running(whole) as process:
        yield process, _children(process.pid)[0]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_process_of_a_container_is_followed_by_its_pid_here(cli: Cli, meter: str) -> None:
    with (
        below(["--pid", "--fork", "--mount-proc"]) as (_, pid),
        ended(cli.start("attach", str(pid), "--sensor", meter)) as process,
    ):
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        process.send_signal(signal.SIGINT)
        _, summary = finish(cli, process)
    assert f"measuring {pid} (sleep 600), PID 1 of its container" in line
    assert summary["command"] == ["sleep", "600"]


def test_pid_that_only_a_container_knows_is_translated() -> None:
    with below(["--pid", "--fork", "--mount-proc"]) as (_, pid):
        # given so many processes in there that a PID is reached that is free here
        free = next(number for number in range(3, 2**22) if not Path(f"/proc/{number}").exists())
        if free > 3000:
            pytest.skip(f"the first free PID is {free}")
        forks = "while :; do sleep 600 & [ $! -ge $0 ] && break; kill $!; done; echo $!; wait"
        inside = ["nsenter", "--target", str(pid), "--pid", "--mount", "sh", "-c", forks, str(free)]
        with ended(subprocess.Popen(inside, stdout=subprocess.PIPE)) as entered:
            assert entered.stdout is not None
            inner = int(entered.stdout.readline())
            (shell,) = _children(entered.pid)
            there = _children(shell)[-1]
            if Path(f"/proc/{inner}").exists():
                pytest.skip(f"{inner} is a PID here too")
            with pytest.raises(TargetError, match=f"there is no process {inner}") as caught:
                hold([inner])
            assert caught.value.fix.endswith(f"pepr-profile attach {there}")
            os.kill(shell, signal.SIGKILL)


@pytest.mark.parametrize("hidepid", ["invisible", "ptraceable"])
def test_process_that_proc_hides_names_what_would_permit_it(cli: Cli, hidepid: str) -> None:
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("another user and another /proc are needed, and only root can have them")
    # given a /proc that shows processes to their owner alone, and a process of nobody's
    ours = f"{sys.executable} -m pepr_profiler attach $!"
    script = (
        f"mount -t proc -o hidepid={hidepid},gid=7 proc /proc || exit 77;"
        "setpriv --reuid 65534 --regid 65534 --clear-groups sleep 600 & "
        'while [ "$(stat -c %u /proc/$!)" != 65534 ]; do sleep 0.01; done;'
        f"setpriv --regid 65534 --clear-groups --bounding-set -all --inh-caps=-all {ours};"
        "status=$?; kill $!; exit $status"
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], env=cli.environment(),
                          capture_output=True, timeout=SLOW_S, check=False)  # fmt: skip
    said = done.stderr.decode()
    if done.returncode == 77 or "unshare" in said:
        pytest.skip(f"no such /proc here: {said}")
    assert done.returncode == 125, said
    assert "may not be followed: it is another user's" in said
    assert f"hidepid={hidepid}" in said
    assert "CAP_SYS_PTRACE" in said
    assert ("as a member of group 7" in said) == (hidepid == "invisible")
    assert cli.runs() == []


# --- in code --------------------------------------------------------------------------------------


def test_block_with_pids_measures_them_and_not_the_program(meter: str, tmp_path: Path) -> None:
    busy = "import time\nbefore_s = time.process_time()\n"
    busy += "while time.process_time() - before_s < 0.6: pass\n"
    code = f"{WAITING}{busy}print('done', flush=True)\nsys.stdin.readline()"
    with running(python(code)) as target:
        with profile("theirs", pids=[target.pid], sensors=[meter], scope="device") as run:
            assert not run.joined
            assert RUN_DIR_VARIABLE not in os.environ
            with run.phase("busy"):
                go(target)
                assert target.stdout is not None
                assert target.stdout.readline() == b"done\n"
            run.log(accuracy=0.5)
            sum(range(20_000_000))  # ours, which is not theirs
            assert run.energy_j is not None
        assert target.poll() is None
    summary = run.summary
    _, cpu_s = lane(run.directory, "job/cpu")
    assert cpu_s[-1] - cpu_s[0] == pytest.approx(0.6, abs=0.06)
    assert [phase["name"] for phase in summary["phases"]] == ["busy"]
    assert summary["phases"][0]["energy_j"] >= 100 * summary["phases"][0]["duration_s"] - 1e-6
    assert summary["metrics"] == {"accuracy": 0.5}
    assert summary["command"] == python(code)
    assert (summary["complete"], summary["exit_code"]) == (True, None)
    assert summary["recording"]["options"]["scope"] == "device"
    assert [path.name for path in (tmp_path / "store" / "runs").iterdir()] == [run.run_id]


def test_block_with_pids_joins_nothing_and_nothing_joins_it(meter: str) -> None:
    with (
        sleeping() as target,
        profile("ours", sensors=[meter]) as outer,
        profile("theirs", sensors=[meter], pids=[target.pid]) as theirs,
        profile("again ours") as inner,
    ):
        inner.log(a=1)
        theirs.log(b=2)
    assert theirs.run_id != outer.run_id
    assert inner.run_id == outer.run_id
    assert (outer.summary["metrics"], theirs.summary["metrics"]) == ({"a": 1.0}, {"b": 2.0})


def test_block_with_pids_fails_before_it_begins(meter: str, tmp_path: Path) -> None:
    for pids, error in (([], UsageError), ([os.getpid()], UsageError), ([9999999], TargetError)):
        with pytest.raises(error), profile("x", sensors=[meter], pids=pids):
            raise AssertionError("not reached")
    with pytest.raises(UsageError, match="scope"):
        profile("x", scope="room")
    assert not (tmp_path / "store").exists()
