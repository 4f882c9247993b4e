"""The CPU time of a job, held against what the kernel charged to the same tree of processes.

The trees are sim/workload.cpp's. CPU time is compared with CPU time, so that a busy machine does
not matter; what a hypervisor stole meanwhile is uncertain, and granted.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S
from sim import native

TESTS = Path(__file__).parent
KINDS = "threads workers daemons short ignored exec storm"
WITHIN = 0.01
TENTH_S = 100_000_000
BY_CLOCKS: dict[str, Any] = {"clocks": True, "wrapped": TENTH_S, "attached": TENTH_S // 10}

# A program that follows a workload, as the profiler does: wrapped from its start, attached to when
# it is ready for the second part of its work, or both at once.
FOLLOW = """
import array, json, os, struct, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from pepr_profiler import _core
from sim.permissions import forbid_perf

workload, kind, clocks, file = sys.argv[2:6]
periods_ns = json.loads(sys.argv[6])
if clocks == "clocks":
    forbid_perf()
assert _core.set_child_subreaper()
lanes, columns = {}, {}

def follow(how, spec):
    lane = lanes[how] = _core.Sampler(spec, periods_ns[how])
    assert lane.wait_ready(20)
    columns[how] = {channel.name: array.array("d") for channel in lane.channels}

def stolen_s():
    with open("/proc/stat") as stat:
        return int(stat.readline().split()[8]) / os.sysconf("SC_CLK_TCK")

tick_s = 1 / os.sysconf("SC_CLK_TCK")

def charged_s(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

stolen = stolen_s()
if "wrapped" in periods_ns:
    follow("wrapped", "processes:children")
child = subprocess.Popen([workload, kind, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
before_s = {"wrapped": 0.0, "attached": charged_s(child.pid)}
if "attached" in periods_ns:
    follow("attached", f"processes:pids={child.pid}")
child.stdin.write(b"\\n")
child.stdin.close()

def drain():
    # Now and then: on a busy machine the lanes go on for longer than their rings last.
    for how, lane in lanes.items():
        while (batch := lane.read()) is not None:
            for column, values in zip(columns[how].values(), batch[3], strict=True):
                column.frombytes(values)

while True:
    pid, status, usage = os.wait4(child.pid, os.WNOHANG)
    if pid:
        break
    drain()
    time.sleep(0.05)
child.returncode = os.waitstatus_to_exitcode(status)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
assert all([lane.stop(20) for lane in lanes.values()])
drain()
with open(file, "rb") as report:
    total_ns, since_ns = struct.unpack("qq", report.read())

def said(how, lane):
    cpu_s = columns[how]["job/cpu"]
    (label,) = [c.labels["source"] for c in lane.channels if c.name == "job/cpu"]
    return {
        "seen_s": cpu_s[-1] - cpu_s[0],
        "first_s": cpu_s[0],
        "truth_s": (since_ns if how == "attached" else total_ns) * 1e-9,
        "charged_s": usage.ru_utime + usage.ru_stime - before_s[how],
        "stolen_s": stolen_s() - stolen + tick_s,  # what was stolen is given in whole ticks
        "processes": list(columns[how]["job/processes"]),
        "source": label,
        "notes": [[n.what, n.why, n.fix] for n in lane.notes],
        "status": child.returncode,
    }

print(json.dumps({how: said(how, lane) for how, lane in lanes.items()}))
"""


@dataclass(frozen=True)
class Followed:
    """What the lane said of a workload, and the truth."""

    seen_s: float
    first_s: float
    truth_s: float
    charged_s: float
    stolen_s: float
    processes: list[float]
    source: str
    notes: list[list[str]]
    status: int


@pytest.fixture(scope="session")
def workload(native_cache: Path) -> Path:
    try:
        return native.build(native_cache, "workload", ("workload.cpp",), "-pthread")
    except native.UnavailableError as missing:
        pytest.skip(str(missing))


Follow = Callable[..., dict[str, Followed]]


@pytest.fixture(scope="module")
def follow(workload: Path, tmp_path_factory: pytest.TempPathFactory) -> Follow:
    """Follows a workload in the given ways, each with its period; what is asked again is kept."""
    reports = itertools.count()

    @cache
    def once(kind: str, clocks: bool = False, **periods_ns: int) -> dict[str, Followed]:
        report = tmp_path_factory.mktemp("workload") / str(next(reports))
        report.write_bytes(bytes(16))
        how = ("clocks" if clocks else "perf", str(report), json.dumps(periods_ns))
        done = subprocess.run(
            [sys.executable, "-c", FOLLOW, str(TESTS), str(workload), kind, *how],
            stdout=subprocess.PIPE,
            check=True,
            timeout=SLOW_S,
        )
        said = {how: Followed(**facts) for how, facts in json.loads(done.stdout).items()}
        assert all(followed.status == 0 for followed in said.values())
        return said

    return once


def require_perf(followed: Followed) -> None:
    if "perf" not in followed.source:
        pytest.skip(f"perf cannot be had here: {followed.notes}")


@pytest.mark.parametrize("kind", KINDS.split())
def test_job_cpu_time_is_what_the_kernel_charged(follow: Follow, kind: str) -> None:
    for followed in follow(kind, wrapped=TENTH_S, attached=TENTH_S).values():
        require_perf(followed)
        assert followed.notes == []
        assert followed.truth_s > 0.9
        assert followed.seen_s == pytest.approx(
            followed.truth_s, abs=WITHIN * followed.truth_s + followed.stolen_s
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS.split() if kind != "ignored"])
def test_without_perf_the_clocks_tell_as_much_of_what_is_waited_for(
    follow: Follow, kind: str
) -> None:
    followed = follow(kind, **BY_CLOCKS)["wrapped"]

    assert followed.source == "process clocks"
    assert followed.seen_s == pytest.approx(followed.truth_s, rel=WITHIN)


@pytest.mark.parametrize("kind", ["threads", "workers", "short"])
def test_what_was_used_before_the_attach_never_comes_in(follow: Follow, kind: str) -> None:
    # Without perf: the kernel adds a child's whole life to its parent when it is waited for.
    followed = follow(kind, **BY_CLOCKS)["attached"]

    assert followed.first_s < 0.01
    # What is used between the last sample and the end is lost, on all CPUs.
    assert followed.seen_s == pytest.approx(followed.truth_s, rel=0.03)
    assert followed.seen_s <= followed.truth_s * (1 + WITHIN)


def test_without_perf_it_is_said_what_is_missed_and_why(follow: Follow) -> None:
    for followed in follow("short", **BY_CLOCKS).values():
        ((what, why, fix),) = followed.notes
        assert "CPU time" in what
        assert why.startswith("Permission denied") and "that nobody waits for" in why
        assert fix


def test_a_tree_that_forks_all_the_time_can_be_attached_to(follow: Follow) -> None:
    followed = follow("busy", attached=TENTH_S)["attached"]

    require_perf(followed)
    ticks_s = 0.03  # of which the truth before the attach is made
    assert followed.seen_s == pytest.approx(
        followed.charged_s, abs=WITHIN * followed.charged_s + followed.stolen_s + ticks_s
    )


@pytest.mark.parametrize("clocks", [False, True])
def test_the_living_are_counted_until_none_is_left(follow: Follow, clocks: bool) -> None:
    asked = BY_CLOCKS if clocks else {"attached": TENTH_S // 10}
    followed = follow("workers", **asked)["attached"]

    assert followed.processes[0] == 7
    assert 7 < max(followed.processes) <= 13
    assert followed.processes[-1] == 0
