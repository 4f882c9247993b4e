"""The daemon's promise: root's counters for everybody, through all that can go wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, codes, component, ended, python, until, used_s
from daemons import (
    BURN,
    OTHERS,
    Daemon,
    become,
    daemon,
    give_go,
    lock,
    needs_root,
    open_folder,
    python_of,
    raw,
    restart,
    say,
    times_of,
    unlock,
)
from sim import native
from sim.nvml import BuildNvml, Fault, Gpu, Scenario
from sim.permissions import obey_permissions
from sim.powercap import BuildTree, Tree, Zone, two_socket_server
from sim.sysfs import perf_tree, why_no_tsc
from sim.waves import Constant

from pepr_profiler.daemon.lanes import SamplingOptions, ServedLanes
from pepr_profiler.daemon_client.client import Connection, DaemonClient
from pepr_profiler.errors import PeprError
from pepr_profiler.trace.lane import LaneReader

tmp_path = open_folder
LATE_S = 0.02  # of a row that a busy machine kept from being read

UNTIL = "import sys, time, os\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"


@pytest.fixture
def tree(powercap_sim: BuildTree) -> Tree:
    return powercap_sim(*two_socket_server(), live=True)


@pytest.fixture
def running(tree: Tree, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that has counters open which nobody else may open."""
    with daemon(tmp_path, "--sensor", tree.spec) as started:
        lock(tree)
        yield started


def measure(daemon: Daemon, tree: Tree, *arguments: str) -> dict[str, Any]:
    """The summary of a run that may not read the tree itself."""
    result, summary = daemon.cli.measure(
        "--sensor", tree.spec, *arguments, preexec_fn=obey_permissions
    )
    assert result.status == 0, result.stderr
    return summary


def start(daemon: Daemon, tree: Tree, *arguments: str) -> subprocess.Popen[bytes]:
    summary = str(daemon.cli.folder / "summary.json")
    return daemon.cli.start(
        "--json", summary, "--sensor", tree.spec, "--", *arguments, preexec_fn=obey_permissions
    )


def start_waiting(daemon: Daemon, tree: Tree) -> subprocess.Popen[bytes]:
    """A run that goes on until `summary_of` is asked for, or the file "enough" is made."""
    return start(daemon, tree, *python(UNTIL, str(daemon.cli.folder / "enough")))


def summary_of(daemon: Daemon, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    (daemon.cli.folder / "enough").touch()
    _, err = process.communicate(timeout=SLOW_S)
    assert process.returncode == 0, err
    summary: dict[str, Any] = json.loads((daemon.cli.folder / "summary.json").read_text())
    return summary


def is_recording(daemon: Daemon) -> bool:
    return bool(daemon.status()["runs"])


def truth_of(tree: Tree, summary: dict[str, Any], key: str) -> float:
    return tree.energy_j(key, *summary["recording"]["window_ns"])


# --- what it is for -------------------------------------------------------------------------------


def test_a_run_that_may_not_read_a_counter_reads_it_through_the_daemon(
    running: Daemon, tree: Tree
) -> None:
    result, summary = running.cli.measure(
        "--sensor", tree.spec, "--", "sleep", "1", preexec_fn=obey_permissions
    )
    package = component(summary, "cpu:package-0")
    assert package["source"] == "powercap"
    truth_j = truth_of(tree, summary, "intel-rapl:0")
    assert abs(package["device_j"] - truth_j) <= package["u_j"] + 1 + 100 * (LATE_S + tree.late_s)
    assert summary["recording"]["daemon"]["lanes"]["powercap"]["spec"] == tree.spec
    assert summary["recording"]["daemon"]["reconnects"] == 0
    assert summary["missing"] == []
    assert codes(summary) == set()
    said = " ".join(result.stderr.split())
    assert "powercap was read by this machine's daemon" in said
    # how late rows came is known of our own alone: of the processes' lane
    own = LaneReader(running.cli.runs()[0], "processes")
    assert summary["sampler"]["timed"] == sum(len(batch.t_ns) for batch in own)
    assert "% late" in said and "(not counted as late)" in said
    # and the run was known to the daemon while it lasted
    assert running.status()["runs"] == []


def test_without_a_daemon_the_remedy_is_to_start_it(running: Daemon, tree: Tree) -> None:
    result = running.cli(
        "--sensor", tree.spec, "--", "true", preexec_fn=obey_permissions,
        env={"PEPR_DAEMON": "off"},
    )  # fmt: skip
    assert result.status == 125
    assert "Permission denied" in result.stderr


def test_the_shortest_run_lies_between_two_rows(running: Daemon, tree: Tree) -> None:
    summary = measure(running, tree, "--", "true")
    begin_ns, end_ns = summary["recording"]["window_ns"]
    rows = LaneReader(running.cli.runs()[0], "powercap")
    t_ns = [int(t) for batch in rows for t in batch.t_ns]
    assert t_ns[0] <= begin_ns and t_ns[-1] >= end_ns
    assert component(summary, "cpu:package-0")["device_j"] is not None


def test_profile_uses_it_too(running: Daemon, tree: Tree) -> None:
    code = """if True:
        import json, sys, time
        from pepr_profiler import profile
        with profile("x", sensors=[sys.argv[1]]) as run:
            with run.phase("work"):
                time.sleep(1)
        print(json.dumps(run.summary))"""
    done = subprocess.run(
        python(code, tree.spec),
        env=running.cli.environment(),
        preexec_fn=obey_permissions,
        capture_output=True,
        check=True,
    )
    summary = json.loads(done.stdout)
    assert summary["recording"]["daemon"]["lanes"]
    for_a_second = component(summary, "dram:package-1/dram")
    assert for_a_second["device_j"] == pytest.approx(10 * summary["duration_s"], rel=0.05)
    assert summary["phases"][0]["duration_s"] == pytest.approx(1, rel=0.5)


def test_a_detected_sensor_is_replaced_by_one_of_its_family(running: Daemon, tree: Tree) -> None:
    if any(Path("/sys/class/powercap").glob("*/energy_uj")):
        pytest.skip("this machine has RAPL of its own")
    result, summary = running.cli.measure("--", "sleep", "0.5")
    assert result.status == 0
    assert summary["recording"]["daemon"]["lanes"]["powercap"]["spec"] == tree.spec
    assert component(summary, "cpu:package-0")["device_j"] > 0
    assert not [item for item in summary["missing"] if "powercap" in item["what"]]


def test_what_can_be_read_directly_is(running: Daemon, tree: Tree) -> None:
    unlock(tree)
    assert measure(running, tree, "--", "true")["recording"]["daemon"] is None


def test_sensors_tells_who_reads(running: Daemon, tree: Tree) -> None:
    arguments = ("sensors", "--sensor", tree.spec)
    facts = json.loads(running.cli(*arguments, "--json", preexec_fn=obey_permissions).stdout)
    assert {channel["via"] for channel in facts["channels"]} == {"daemon"}
    assert facts["missing"] == []
    counted = {c["component"]: c["power_w"] for c in facts["channels"] if c["in_total"]}
    assert counted["cpu:package-0"] == pytest.approx(100, rel=0.1)
    text = running.cli(*arguments, preexec_fn=obey_permissions).stdout.decode()
    assert "read by this machine's daemon" in " ".join(text.split())


def test_sensors_reads_through_the_daemon_what_is_denied_in_part(
    running: Daemon, tree: Tree
) -> None:
    (tree.path("intel-rapl:0") / "energy_uj").chmod(0o444)
    # given a recording that reads the whole lane through the daemon
    assert measure(running, tree, "--", "true")["recording"]["daemon"] is not None
    # then that is what is shown
    arguments = ("sensors", "--sensor", tree.spec, "--json")
    facts = json.loads(running.cli(*arguments, preexec_fn=obey_permissions).stdout)
    assert {channel["via"] for channel in facts["channels"]} == {"daemon"}
    assert facts["missing"] == []


def test_a_signal_that_was_ignored_at_its_start_ends_it(tree: Tree, tmp_path: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for its background jobs

    with daemon(tmp_path, "--sensor", tree.spec, preexec_fn=ignore) as started:
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(SLOW_S) == 0


def test_status_and_stop(running: Daemon, tree: Tree) -> None:
    result = running.cli("daemon", "status")
    assert result.status == 0, result.stderr
    assert f"process {running.pid}" in result.stdout.decode()
    assert f"powercap   {len(tree.zones)} channels" in result.stdout.decode()
    facts = json.loads(running.cli("daemon", "status", "--json").stdout)
    assert facts["pid"] == running.pid and facts["socket"] == str(running.socket)
    assert facts["lanes"][0]["age_s"] < 5
    assert {"gap_s", "refresh_s", "samples", "late", "lost"} <= facts["lanes"][0].keys()
    # then it ends when asked to
    assert running.cli("daemon", "stop").status == 0
    assert running.process.wait(SLOW_S) == 0
    result = running.cli("daemon", "status")
    assert result.status == 125 and "no daemon answers" in result.stderr
    assert "sudo pepr-profile daemon" in result.stderr


# --- faults ---------------------------------------------------------------------------------------


def test_a_daemon_that_is_killed_and_started_again_costs_no_energy(
    running: Daemon, tree: Tree
) -> None:
    child = start_waiting(running, tree)
    with ended(child):
        until(lambda: is_recording(running))
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        unlock(tree)
        with ended(restart(running, "--sensor", tree.spec)):
            running.hears("READY=1")
            lock(tree)
            until(lambda: is_recording(running))  # it is back, and goes on for a while
            seen = running.lane("powercap")["samples"]
            until(lambda: running.lane("powercap")["samples"] > seen + 50)
            summary = summary_of(running, child)
    assert summary["recording"]["daemon"]["reconnects"] >= 1
    for key, name in (("intel-rapl:0", "cpu:package-0"), ("intel-rapl:1:1", "dram:package-1/dram")):
        truth_j = truth_of(tree, summary, key)
        assert component(summary, name)["device_j"] == pytest.approx(truth_j, rel=0.01)
    # and the lane is one, in order
    t_ns = [int(t) for b in LaneReader(running.cli.runs()[0], "powercap") for t in b.t_ns]
    assert t_ns == sorted(set(t_ns))
    # (the simulated counter itself stands still where a busy machine keeps its writer)
    assert codes(summary) <= {"gap", "stalled"}


def test_a_daemon_that_never_comes_back_ends_its_lanes_and_nothing_else(
    running: Daemon, tree: Tree
) -> None:
    child = start_waiting(running, tree)
    with ended(child):
        until(lambda: is_recording(running))
        begin = running.lane("powercap")["samples"]
        until(lambda: running.lane("powercap")["samples"] > begin + 50)
        os.kill(running.pid, signal.SIGKILL)
        time.sleep(3)  # long enough to be no gap, but an end
        summary = summary_of(running, child)
    assert {"daemon-gone", "ended-early"} <= codes(summary)
    # what was counted until then is there
    known_j = component(summary, "cpu:package-0")["device_j"]
    assert 0 < known_j < truth_of(tree, summary, "intel-rapl:0")


def test_a_daemon_that_stands_still_for_12_s_costs_resolution_only(
    running: Daemon, tree: Tree
) -> None:
    child = start_waiting(running, tree)
    with ended(child):
        until(lambda: is_recording(running))
        os.kill(running.pid, signal.SIGSTOP)
        time.sleep(12)  # longer than anything in a recording waits
        os.kill(running.pid, signal.SIGCONT)
        seen = running.lane("powercap")["samples"]
        until(lambda: running.lane("powercap")["samples"] > seen + 50)
        summary = summary_of(running, child)
    truth_j = truth_of(tree, summary, "intel-rapl:0")
    assert component(summary, "cpu:package-0")["device_j"] == pytest.approx(truth_j, rel=0.01)
    assert "gap" in codes(summary)
    assert summary["recording"]["daemon"]["reconnects"] == 0


def test_a_run_that_starts_while_the_daemon_stands_still_is_not_held_up(
    running: Daemon,
) -> None:
    os.kill(running.pid, signal.SIGSTOP)
    try:
        result, summary = running.cli.measure("--", "true")  # detected: nothing is required
        assert result.status == 0
        assert "daemon-unusable" in codes(summary)
    finally:
        os.kill(running.pid, signal.SIGCONT)


def test_a_named_sensor_waits_for_a_daemon_that_is_started_again(
    tree: Tree, tmp_path: Path
) -> None:
    with daemon(tmp_path, "--sensor", tree.spec) as running:
        lock(tree)
        running.process.kill()
        running.process.wait()
        # one that was detected is not worth the wait
        result, summary = running.cli.measure("--", "true", preexec_fn=obey_permissions)
        assert result.status == 0 and summary["recording"]["daemon"] is None
        # a named one is, and without it there is no run
        named = ("--sensor", tree.spec, "--", "sleep", "0.5")
        result = running.cli(*named, preexec_fn=obey_permissions)
        assert result.status == 125 and "cannot be read" in result.stderr
        again: list[subprocess.Popen[bytes]] = []
        later = threading.Timer(
            0.5, lambda: again.append(restart(running, "--sensor", tree.spec))
        )  # fmt: skip
        later.start()
        result, summary = running.cli.measure(*named, preexec_fn=obey_permissions)
        later.join()
        with ended(again[0]):
            assert result.status == 0
            assert component(summary, "cpu:package-0")["source"] == "powercap"


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *ts) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, ts);
    struct stat about;
    if (clock == CLOCK_REALTIME && stat(getenv("STEP_FILE"), &about) == 0) ts->tv_sec += 3600;
    return status;
}
"""


def test_a_wall_clock_that_is_moved_by_an_hour_moves_nothing_measured(
    running: Daemon, tree: Tree, tmp_path: Path
) -> None:
    (tmp_path / "step.c").write_text(SHIM)
    try:
        compiler = native.compiler()
    except native.UnavailableError as missing:
        pytest.skip(str(missing))
    flags = ["-x", "c", str(tmp_path / "step.c"), "-shared", "-fPIC", "-o", str(tmp_path / "s.so")]
    subprocess.run([compiler, *flags, "-ldl"], check=True)
    moved = {"LD_PRELOAD": str(tmp_path / "s.so"), "STEP_FILE": str(tmp_path / "step")}
    code = "import time; from pathlib import Path; time.sleep(0.5); a = time.time()\n"
    code += f"Path({str(tmp_path / 'step')!r}).touch(); assert time.time() - a > 3000\n"
    code += "time.sleep(0.5)"
    result, summary = running.cli.measure(
        "--sensor", tree.spec, "--", *python(code), env=moved, preexec_fn=obey_permissions
    )
    assert result.status == 0, result.stderr
    first, last = summary["clock"]
    assert last["unix_ns"] - first["unix_ns"] > 3600 * 10**9  # it was really moved
    assert 1 < summary["duration_s"] < 60
    truth_j = truth_of(tree, summary, "intel-rapl:0")
    assert component(summary, "cpu:package-0")["device_j"] == pytest.approx(truth_j, rel=0.02)


@needs_root
def test_a_client_with_another_clock_gets_an_error(running: Daemon, tree: Tree) -> None:
    """A container may have a time namespace; rows would then be of another time."""
    import shutil

    namespace = ["unshare", "--time", "--monotonic", "5000", "--fork"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("no time namespace can be made here")
    code = "import sys; from pepr_profiler.daemon_client.client import DaemonClient; "
    code += "node = DaemonClient(); "
    code += "assert node.lane(sys.argv[1], named=True) is None; print(node.error)"
    done = subprocess.run(
        [*namespace, *python(code, tree.spec)],
        env=running.cli.environment(),
        capture_output=True,
        check=True,
    )
    assert b"has another clock" in done.stdout


def test_a_driver_that_hangs_holds_up_its_own_lane_only(
    tree: Tree, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    hang = Fault("nvmlDeviceGet", "HANG", start_s=2.0, end_s=60.0)
    sim = nvml_sim(Scenario((Gpu(Constant(300)),), (hang,)))
    with daemon(tmp_path, "--sensor", tree.spec, "--sensor", sim.spec) as running:
        # while it was read, or, on a slow machine, while it was opened
        until(lambda: (running.lane("nvml")["age_s"] or running.status()["up_s"]) > 4)
        until(lambda: running.lane("powercap")["age_s"] < 1)
        lock(tree)
        summary = measure(running, tree, "--", "sleep", "0.5")
        assert component(summary, "cpu:package-0")["device_j"] is not None


@needs_root
def test_a_counter_that_went_and_came_back_is_opened_again_with_privileges(
    powercap_sim: BuildTree, tmp_path: Path
) -> None:
    # given a zone whose open file fails, as when its module is taken out
    powers = {"intel-rapl:0": 100, "intel-rapl:1": 50}
    names = {key: f"package-{key[-1]}" for key in powers}
    zones = [Zone(key, names[key], Constant(w)) for key, w in powers.items()]
    tree = powercap_sim(*zones, live=True)
    anew = powercap_sim(*zones, live=True, epoch_ns=tree.epoch_ns)
    options = ("--sensor", tree.spec)
    program, env = python_of(OTHERS[0])
    (tmp_path / "out").mkdir()
    os.chown(tmp_path / "out", *OTHERS[:1] * 2)
    wait = (
        "import sys, time, pathlib\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.1)"
    )
    with daemon(tmp_path, *options, waits={"lost_s": 1.0, "check_s": 0.5}) as running:
        child = subprocess.Popen(
            [program, "-m", "pepr_profiler", *options, "--json", str(tmp_path / "out/s.json"), "--",
             program, "-c", wait, str(tmp_path / "enough")],
            env={**env, "PEPR_DAEMON": str(running.socket), "PEPR_STORE": str(tmp_path / "out")},
            cwd="/", preexec_fn=become(OTHERS[0]),  # noqa: PLW1509
        )  # fmt: skip
        with ended(child):
            until(lambda: is_recording(running))
            energy = tree.path("intel-rapl:0") / "energy_uj"
            tree.fail("intel-rapl:0", "empty")
            time.sleep(1)  # for it to be seen
            energy.unlink()
            time.sleep(2)  # the daemon looks twice, and finds nothing to open
            energy.hardlink_to(anew.path("intel-rapl:0") / "energy_uj")
            # when it is back the daemon, which may not open it, asks to be started again
            assert running.process.wait(SLOW_S) == 75
            with ended(restart(running, *options)):
                running.hears("READY=1")
                until(lambda: is_recording(running))
                (tmp_path / "enough").touch()
                assert child.wait(SLOW_S) == 0
    # then no energy is missing, neither of the zone that went nor of the other
    summary = json.loads((tmp_path / "out/s.json").read_text())
    assert summary["recording"]["daemon"]["reconnects"] == 1
    for key in powers:
        truth_j = truth_of(tree, summary, key)
        found_j = component(summary, f"cpu:{names[key]}")["device_j"]
        assert found_j == pytest.approx(truth_j, rel=0.01)


def test_a_counter_that_came_back_is_opened_again_at_once_where_that_is_allowed(
    powercap_sim: BuildTree,
) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", start_uj=5))
    file = tree.path("intel-rapl:0") / "energy_uj"
    lanes = ServedLanes([tree.spec], SamplingOptions(period_ns=10_000_000), lost_s=0.5)
    lanes.open_privileged()
    lanes.open_rest(dropped_privileges=False)
    lane = lanes.get("powercap")
    assert lane is not None

    def newest() -> float:
        assert lane.reader is not None
        row = lane.reader.latest()
        return float("nan") if row is None else row[1][0]

    assert newest() == 5
    assert lanes.check() == (False, "")
    file.chmod(0o600)
    os.truncate(file, 0)  # an open file of a module that is gone gives nothing
    until(lambda: math.isnan(newest()))
    gone = file.with_name("gone")
    file.rename(gone)
    deadline_s = time.monotonic() + 1
    while time.monotonic() < deadline_s:
        assert lanes.check() == (False, "")  # opening it again would not help
        time.sleep(0.1)
    file.write_text("77\n")
    until(lambda: lanes.check() == (True, ""))
    assert newest() == 77
    lanes.stop()


def test_a_daemon_without_descriptors_serves_who_is_there_and_later_all(
    tree: Tree, tmp_path: Path
) -> None:
    import resource

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    with daemon(tmp_path, "--sensor", tree.spec, preexec_fn=few) as running:
        first = raw(running.socket)
        assert say(first, op="hello")["ok"]
        crowd = [raw(running.socket) for _ in range(60)]
        before_s = used_s(running.pid)
        assert say(first, op="hello")["ok"]
        time.sleep(2)
        # it neither dies nor turns in a circle, and says what it cannot do
        assert used_s(running.pid) - before_s < 0.5
        assert say(first, op="hello")["ok"]
        refused = say(first, op="open", lane="powercap")
        assert not refused["ok"] and "Too many open files" in refused["error"]["why"]
        for connection in crowd:
            connection.close()
        first.close()
        until(lambda: running.status()["clients"] == 1)


def test_a_client_waits_its_turn_while_the_queue_is_full(tree: Tree, tmp_path: Path) -> None:
    with daemon(tmp_path, "--sensor", tree.spec) as running, ExitStack() as queue:
        os.kill(running.pid, signal.SIGSTOP)
        try:
            while True:  # until the kernel takes no more
                crowd = queue.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                crowd.setblocking(False)
                try:
                    crowd.connect(str(running.socket))
                except BlockingIOError:
                    break
            begin_s = time.monotonic()
            with pytest.raises(PeprError, match="its queue was full for"):
                Connection(running.socket, timeout_s=0.5)
            assert 0.5 <= time.monotonic() - begin_s < SLOW_S / 2
            # a signal that comes meanwhile ends no wait and makes no connection
            before = signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            try:
                with pytest.raises(PeprError, match="its queue was full for"):
                    Connection(running.socket, timeout_s=0.5)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            # nor does a default timeout of the program, which makes its sockets non-blocking
            socket.setdefaulttimeout(SLOW_S)
            begin_s = time.monotonic()
            try:
                with pytest.raises(PeprError, match="its queue was full for"):
                    Connection(running.socket, timeout_s=0.5)
            finally:
                socket.setdefaulttimeout(None)
            assert 0.5 <= time.monotonic() - begin_s < SLOW_S / 2
            goes_on = threading.Timer(0.5, os.kill, (running.pid, signal.SIGCONT))
            goes_on.start()
            connection = Connection(running.socket, timeout_s=SLOW_S)
            goes_on.join()
            connection.close()
        finally:
            os.kill(running.pid, signal.SIGCONT)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(running: Daemon) -> None:
    connection = Connection(running.socket, timeout_s=0.3)
    assert connection.ask("hello")[0]["ok"] and connection.is_up()
    os.kill(running.pid, signal.SIGSTOP)
    try:
        with pytest.raises(PeprError, match="gave no answer"):
            connection.ask("status")
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert not connection.is_up()  # so its owner connects anew
    with pytest.raises(PeprError, match="gave no answer"):
        connection.ask("hello")
    connection.close()


# --- many -----------------------------------------------------------------------------------------

CLIENT = """if True:
    import os, select, signal, socket, sys  # the client's own imports, once for all
    from pathlib import Path
    from pepr_profiler.daemon_client.client import DaemonClient
    for _ in range(int(sys.argv[2])):
        if os.fork() == 0:
            node = DaemonClient()
            lane = node.lane(sys.argv[1], named=True)
            node.announce("run")
            assert lane.read()
            os.kill(os.getpid(), signal.SIGKILL)
    while True:
        try:
            assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
        except ChildProcessError:
            break"""


@pytest.mark.parametrize("crowds", [4, pytest.param(20, marks=pytest.mark.long)])
def test_hundreds_of_clients_that_are_killed_leave_nothing(
    tree: Tree, tmp_path: Path, crowds: int
) -> None:
    # given a daemon that one user may ask as often as they like
    with daemon(tmp_path, "--sensor", tree.spec, quotas={"requests_at_once": 1e6}) as running:
        lock(tree)

        def crowd(count: int) -> None:
            command = python(CLIENT, tree.spec, str(count))
            subprocess.run(command, env=running.cli.environment(), check=True)
            until(lambda: running.status()["clients"] == 1)

        crowd(50)  # what is allocated once is there
        before = running.status()
        for _ in range(crowds - 1):
            crowd(50)
        after = running.status()
    assert after["descriptors"] == before["descriptors"]
    assert after["runs"] == []
    assert after["rss_bytes"] - before["rss_bytes"] < 2_000_000


def test_two_hundred_clients_at_once_all_read_the_same_rows(
    running: Daemon, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEPR_DAEMON", str(running.socket))
    nodes = [DaemonClient() for _ in range(200)]
    lanes = [node.lane(tree.spec, named=True) for node in nodes]
    assert all(lanes)
    begin = running.lane("powercap")["samples"]
    until(lambda: running.lane("powercap")["samples"] > begin + 50)
    newest: list[set[int]] = []
    for lane in lanes:
        assert lane is not None
        rows = []
        while (batch := lane.read()) is not None:
            rows.append(batch)
        newest.append(set(times_of(rows)))
        assert lane.lost == 0
    common = set.intersection(*newest)
    assert len(common) >= 50
    for node in nodes:
        assert node.close() == []


# --- users ----------------------------------------------------------------------------------------


def energies_uj(lane_bytes: bytes) -> list[float]:
    return list(array("d", lane_bytes))


FINE = """if True:
    import json, sys, time
    from array import array
    from pepr_profiler.daemon_client.client import DaemonClient
    lane = DaemonClient().lane(sys.argv[1], named=True)
    t_ns, values = array("q"), array("d")
    while not t_ns or t_ns[-1] - t_ns[0] < 1_000_000_000 or len(t_ns) < 50:
        if (batch := lane.read()) is None:
            time.sleep(0.05)
            continue
        t_ns.frombytes(batch[1])
        values.frombytes(batch[3][0])
    print(json.dumps({"coarse": lane.coarse, "t_ns": list(t_ns), "uj": list(values)}))"""


def as_user(uid: int, running: Daemon, code: str, *arguments: str) -> Any:
    program, env = python_of(uid)
    done = subprocess.run(
        [program, "-c", code, *arguments],
        env={**env, "PEPR_DAEMON": str(running.socket)},
        preexec_fn=become(uid),
        cwd="/",
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


@needs_root
def test_others_learn_of_energy_coarsely_and_root_finely(
    powercap_sim: BuildTree, tmp_path: Path
) -> None:
    tree = powercap_sim(*two_socket_server(package_w=98.76), live=True)
    with daemon(tmp_path, "--sensor", tree.spec, "--period", "1ms") as running:
        fine, other = (as_user(uid, running, FINE, tree.spec) for uid in (0, OTHERS[0]))
    assert (fine["coarse"], other["coarse"]) == (False, True)
    fine_ns, other_ns = (
        min(b - a for a, b in itertools.pairwise(rows["t_ns"])) for rows in (fine, other)
    )
    assert fine_ns < 10_000_000 <= other_ns
    assert {value % 100_000 for value in other["uj"]} == {0.0}  # 0.1 J
    assert any(value % 100_000 for value in fine["uj"])
    # and what others count is what root counts, to a quantum and to how late the tree is written
    other_j = (other["uj"][-1] - other["uj"][0]) * 1e-6
    elapsed_s = (other["t_ns"][-1] - other["t_ns"][0]) * 1e-9
    assert other_j == pytest.approx(98.76 * elapsed_s, abs=0.3 + 100 * 0.05)


@needs_root
def test_an_admin_group_is_trusted_and_no_other(tree: Tree, tmp_path: Path) -> None:
    code = "import os, sys; os.setgroups([int(sys.argv[2])]) if sys.argv[2:] else 0\n"
    program, env = python_of(OTHERS[0])
    with daemon(tmp_path, "--sensor", tree.spec, "--admin-group", str(OTHERS[1])) as running:

        def trusted(groups: list[int]) -> bool:
            def change() -> None:
                os.setgroups(groups)
                os.setgid(OTHERS[0])
                os.setuid(OTHERS[0])

            done = subprocess.run(
                [program, "-m", "pepr_profiler", "daemon", "status", "--json"],
                env={**env, "PEPR_DAEMON": str(running.socket)},
                preexec_fn=change,
                cwd="/",
                stdout=subprocess.PIPE,
                check=True,
            )
            return bool(json.loads(done.stdout)["fine"])

        assert trusted([OTHERS[1]])
        assert not trusted([OTHERS[1] + 1])
        assert not trusted([])
    assert code


@needs_root
def test_two_users_measure_their_own_at_once_and_it_adds_up(tree: Tree, tmp_path: Path) -> None:
    """Counters are root's, mode 0600; nobody but the daemon can open them."""
    for uid in OTHERS:
        python_of(uid)  # a skip comes first
    with daemon(tmp_path, "--sensor", tree.spec) as running, ExitStack() as stack:
        children = []
        for uid in OTHERS:
            program, env = python_of(uid)
            home = tmp_path / f"user-{uid}"
            home.mkdir()
            os.chown(home, uid, uid)
            variables = {**env, "PEPR_DAEMON": str(running.socket), "PEPR_STORE": str(home)}
            command = [program, "-m", "pepr_profiler", "--sensor", tree.spec, "--json",
                       str(home / "summary.json"), "--name", f"job-{uid}", "--",
                       program, "-c", BURN, str(tmp_path / "go")]  # fmt: skip
            child = subprocess.Popen(
                command,
                env=variables,
                preexec_fn=become(uid),  # noqa: PLW1509
                cwd="/",
                stderr=subprocess.PIPE,
            )
            children.append(stack.enter_context(ended(child)))
        until(lambda: len(running.status()["runs"]) == 2)
        give_go(tmp_path / "go", seconds=8)  # none works before both are recorded
        # root sees both, each of them their own
        everybody = running.status()["runs"]
        assert {run["uid"] for run in everybody} == set(OTHERS)
        for uid in OTHERS:
            program, env = python_of(uid)
            ask = "import json, sys; from pepr_profiler.daemon_client.client import Connection; "
            ask += "from pathlib import Path; "
            ask += "print(json.dumps(Connection(Path(sys.argv[1])).ask('status')[0]))"
            seen = as_user(uid, running, ask, str(running.socket))
            assert {run["uid"] for run in seen["runs"]} == {uid}
            assert all(run["run"].startswith(f"job-{uid}") for run in seen["runs"])
        summaries = []
        for uid, child in zip(OTHERS, children, strict=True):
            _, err = child.communicate(timeout=SLOW_S)
            assert child.returncode == 0, err.decode()
            path = tmp_path / f"user-{uid}" / "summary.json"
            summaries.append(json.loads(path.read_text()))
    for summary in summaries:
        assert summary["recording"]["daemon"]["lanes"]["powercap"]["coarse"] is True
        package = component(summary, "cpu:package-0")
        truth_j = truth_of(tree, summary, "intel-rapl:0")
        assert package["device_j"] == pytest.approx(truth_j, rel=0.02)
        parts_j = package["job_j"] + package["others_j"] + package["idle_j"]
        assert parts_j == pytest.approx(package["device_j"], rel=1e-6)
        assert package["job_j"] > 0
    # the two jobs together are no more than the node, and what is another's to one is a job's
    for ident, key in (("cpu:package-0", "intel-rapl:0"), ("cpu:package-1", "intel-rapl:1")):
        one, two = (component(summary, ident) for summary in summaries)
        node_j = max(truth_of(tree, s, key) for s in summaries)
        assert one["job_j"] + two["job_j"] <= 1.02 * node_j
        for mine, theirs in ((one, two), (two, one)):
            assert mine["others_j"] >= 0.8 * theirs["job_j"]


@needs_root
def test_only_a_process_of_ones_own_can_be_registered(tree: Tree, tmp_path: Path) -> None:
    code = """if True:
        import json, os, sys
        from pathlib import Path
        from pepr_profiler.errors import PeprError
        from pepr_profiler.daemon_client.client import Connection
        connection, said = Connection(Path(sys.argv[1])), []
        for pid in (os.getpid(), int(sys.argv[2]), 1, 2**31 - 1):
            try:
                connection.ask("register", run="mine", pid=pid)
                said.append("")
            except PeprError as error:
                said.append(error.what)
        try:
            connection.ask("stop")
        except PeprError as error:
            said.append(error.what)
        print(json.dumps(said))"""
    with daemon(tmp_path, "--sensor", tree.spec) as running:
        said = as_user(OTHERS[0], running, code, str(running.socket), str(os.getpid()))
        assert said[0] == ""
        assert all("is not yours" in what for what in said[1:4])
        assert said[4] == "you may not stop this daemon"
        assert running.status()["ok"]


# --- privileges -----------------------------------------------------------------------------------


def threads_of(pid: int) -> list[dict[str, str]]:
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        lines = (thread / "status").read_text().splitlines()
        found.append(dict(line.split(":\t", 1) for line in lines if ":\t" in line))
    return found


@needs_root
def test_no_privilege_is_left_and_counters_go_on(
    tree: Tree, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    sim = nvml_sim(Scenario((Gpu(Constant(300)),)))
    specs = [tree.spec, sim.spec]
    if not why_no_tsc():
        specs.append(f"perf:{perf_tree(tmp_path / 'perf')}")
    options = [word for spec in specs for word in ("--sensor", spec)]
    with daemon(tmp_path, *options) as running:
        until(lambda: all(lane["state"] == "running" for lane in running.status()["lanes"]))
        threads = threads_of(running.pid)
        assert len(threads) == 1 + len(specs)
        for thread in threads:
            assert "0" not in thread["Uid"].split() and "0" not in thread["Gid"].split()
            for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(thread[capabilities], 16) == 0, capabilities
            assert thread["NoNewPrivs"] == "1"
        assert "0" not in threads[0]["Groups"].split()
        # what was opened with privileges is read without
        begin = {lane["name"]: lane["samples"] for lane in running.status()["lanes"]}
        for name, count in begin.items():
            until(lambda name=name, count=count: running.lane(name)["samples"] > count + 5)
            assert running.lane(name)["failed_reads"] == 0 or name == "nvml"


@needs_root
def test_ambient_capabilities_as_systemd_gives_them_are_given_up_too(
    tree: Tree, tmp_path: Path
) -> None:
    """The unit starts another user with two capabilities instead of root."""
    import shutil

    uid = OTHERS[0]
    program, env = python_of(uid)
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv; install util-linux")
    caps = "+dac_read_search,+perfmon"
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, uid, uid)
    only = "-all,+dac_read_search,+perfmon"
    command = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups",
               "--inh-caps", caps, "--ambient-caps", caps, "--bounding-set", only,
               program, "-m", "pepr_profiler", "daemon", "--sensor", tree.spec,
               "--socket", str(run / "daemon.sock")]  # fmt: skip
    process = subprocess.Popen(command, env=env, cwd="/", stderr=subprocess.PIPE)
    with ended(process):
        assert process.stderr is not None
        assert b"serving" in process.stderr.readline()
        for thread in threads_of(process.pid):
            assert thread["Uid"].split() == [str(uid)] * 4
            for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(thread[capabilities], 16) == 0, capabilities
            assert thread["NoNewPrivs"] == "1"
        connection = raw(run / "daemon.sock")
        lane = say(connection, op="status")["lanes"][0]
        assert lane["state"] == "running" and len(lane["channels"]) == len(tree.zones)
        connection.close()


# --- systemd --------------------------------------------------------------------------------------

DATA = Path(__file__).parents[1] / "pepr_profiler" / "data"


def test_it_tells_its_manager_how_it_is_and_takes_its_socket(tree: Tree, tmp_path: Path) -> None:
    import socket

    path = tmp_path / "given.sock"
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(8)
    cli = Cli(tmp_path, {"PEPR_DAEMON": str(path)})

    def third() -> None:
        os.dup2(listener.fileno(), 3, inheritable=True)

    # The shell's pid is the daemon's, as systemd knows it before it executes.
    script = 'LISTEN_PID=$$ WATCHDOG_PID=$$ exec "$@"'
    variables = {
        "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000",
    }  # fmt: skip
    process = subprocess.Popen(
        ["sh", "-c", f"export LISTEN_PID=$$ WATCHDOG_PID=$$; {script}", "sh",
         sys.executable, "-m", "pepr_profiler", "daemon", "--sensor", tree.spec],
        env=cli.environment(variables), pass_fds=(3,), stderr=subprocess.PIPE,
        preexec_fn=third,  # noqa: PLW1509
    )  # fmt: skip
    with ended(process), notify, listener:
        notify.settimeout(SLOW_S)
        assert notify.recv(4096) == b"READY=1\nSTATUS=reading powercap (8)"
        assert notify.recv(4096) == b"WATCHDOG=1"
        assert notify.recv(4096) == b"WATCHDOG=1"
        connection = Connection(path)
        assert connection.ask("hello")[0]["lanes"][0]["name"] == "powercap"
        connection.close()
        process.terminate()
        while (word := notify.recv(4096)) != b"STOPPING=1":
            assert word == b"WATCHDOG=1"
        assert process.wait(SLOW_S) == 0


def test_the_units_are_valid_and_harden_the_service(tmp_path: Path) -> None:
    import re
    import shutil

    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze; install systemd")
    for name in ("pepr-profiler.service", "pepr-profiler.socket"):
        text = (DATA / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/pepr-profile", "/bin/true"))
    units = [str(tmp_path / name) for name in ("pepr-profiler.service", "pepr-profiler.socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", units[0]],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze knows no --offline (before 250)")
    score = re.search(r"exposure level for .*: ([0-9.]+)", done.stdout)
    assert score is not None, done.stderr
    assert float(score[1]) <= 1.5


# --- a daemon that is none ------------------------------------------------------------------------

ODD = [
    b"", b"{", b"[]", b"null", b'"' + b"x" * 200_000 + b'"', b'{"ok": true}', b'{"ok": false}',
    b'{"ok": true, "t_ns": "x", "boot_id": "", "version": 1, "lanes": 5}',
    b'{"ok": true, "t_ns": 0, "boot_id": "", "version": "1", "lanes": []}',
]  # fmt: skip


@pytest.mark.parametrize("answer", ODD, ids=lambda a: a[:12].decode())
def test_a_daemon_that_answers_nonsense_costs_a_warning(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket
    import threading

    path = tmp_path / "odd.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener.accept()[0] as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            connection.recv(4096)
            connection.send(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    monkeypatch.setenv("PEPR_DAEMON", str(path))
    node = DaemonClient()
    assert node.lane("powercap", named=False) is None
    thread.join()
    listener.close()
    assert isinstance(node.error, PeprError)
    assert [code for code, _, _ in node.close()] == ["daemon-unusable"]


def test_status_prints_no_control_characters_of_a_daemon(cli: Cli, tmp_path: Path) -> None:
    import socket
    import threading

    odd = "\x1b[2J\r"
    status = {
        "v": 1, "ok": True, "version": odd, "pid": odd, "up_s": 1, "cpu_s": 1, "rss_bytes": 1,
        "fine": True, "refused": {odd: odd}, "metrics": odd, "clients": odd,
        "lanes": [{"name": odd, "channels": [], "coarse": False, "why": odd}],
        "runs": [{"run": odd, "pid": odd, "uid": odd, "number": odd}],
    }  # fmt: skip
    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.send(json.dumps(status).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        result = cli("daemon", "--socket", str(path), "status")
        thread.join()
    text = result.stdout.decode()
    assert result.status == 0 and "refused so far" in text
    assert text.replace("\n", "").isprintable(), ascii(text)
