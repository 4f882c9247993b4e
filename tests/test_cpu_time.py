"""The CPU time of a job, held against what the kernel charged to the same tree of processes.

The trees are sim/workload.cpp's. CPU time is compared with CPU time, so that a busy machine does
not matter; what a hypervisor stole meanwhile is uncertain, and granted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S
from sim import native

TESTS = Path(__file__).parent
KINDS = "threads workers daemons short ignored exec storm"
WITHIN = 0.01

# A program that follows a workload, as the profiler does: wrapped from its start, or attached to
# when it is ready for the second part of its work.
FOLLOW = """
import array, json, os, resource, struct, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from pepr_profiler import _core
from sim.permissions import forbid_perf

workload, kind, how, file, period_ns = sys.argv[2:7]
if "clocks" in how:
    forbid_perf()
assert _core.set_child_subreaper()

def follow(spec):
    begin_s = time.thread_time(), time.monotonic()
    lane = _core.Sampler(spec, int(period_ns))
    assert lane.wait_ready(20)
    return lane, time.monotonic() - begin_s[1]

def stolen_s():
    with open("/proc/stat") as stat:
        return int(stat.readline().split()[8]) / os.sysconf("SC_CLK_TCK")

tick_s = 1 / os.sysconf("SC_CLK_TCK")

def charged_s(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

stolen = stolen_s()
if "wrapped" in how:
    lane, opened_s = follow("processes:children")
child = subprocess.Popen([workload, kind, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
before_s = 0.0
if "attached" in how:
    before_s = charged_s(child.pid)
    lane, opened_s = follow(f"processes:pids={child.pid}")
child.stdin.write(b"\\n")
child.stdin.close()
columns = {channel.name: array.array("d") for channel in lane.channels}

def drain():
    # Now and then: on a busy machine the lane goes on for longer than its ring lasts.
    while (batch := lane.read()) is not None:
        for column, values in zip(columns.values(), batch[3], strict=True):
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
assert lane.stop(20)
drain()
cpu_s = columns["job/cpu"]
with open(file, "rb") as report:
    total_ns, since_ns = struct.unpack("qq", report.read())
(label,) = [c.labels["source"] for c in lane.channels if c.name == "job/cpu"]
print(json.dumps({
    "seen_s": cpu_s[-1] - cpu_s[0],
    "first_s": cpu_s[0],
    "truth_s": (since_ns if "attached" in how else total_ns) * 1e-9,
    "charged_s": usage.ru_utime + usage.ru_stime - before_s,
    "stolen_s": stolen_s() - stolen + tick_s,  # what was stolen is given in whole ticks
    "opened_s": opened_s,
    "processes": list(columns["job/processes"]),
    "source": label,
    "notes": [[n.what, n.why, n.fix] for n in lane.notes],
    "status": child.returncode,
}))
"""


@dataclass(frozen=True)
class Followed:
    """What the lane said of a workload, and the truth."""

    seen_s: float
    first_s: float
    truth_s: float
    charged_s: float
    stolen_s: float
    opened_s: float
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


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Path]:
    """Where the workload says what it used."""
    file = tmp_path / "report"
    file.write_bytes(bytes(16))
    yield file


def follow(
    workload: Path,
    kind: str,
    how: str,
    report: Path,
    *,
    period_ns: int = 100_000_000,
    **kwargs: Any,
) -> Followed:
    arguments = [str(TESTS), str(workload), kind, how, str(report), str(period_ns)]
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, *arguments],
        stdout=subprocess.PIPE,
        check=True,
        timeout=SLOW_S,
        **kwargs,
    )
    followed = Followed(**json.loads(done.stdout))
    assert followed.status == 0
    return followed


def require_perf(followed: Followed) -> None:
    if "perf" not in followed.source:
        pytest.skip(f"perf cannot be had here: {followed.notes}")


@pytest.mark.parametrize("how", ["wrapped", "attached"])
@pytest.mark.parametrize("kind", KINDS.split())
def test_job_cpu_time_is_what_the_kernel_charged(
    workload: Path, report: Path, kind: str, how: str
) -> None:
    followed = follow(workload, kind, how, report)

    require_perf(followed)
    assert followed.notes == []
    assert followed.truth_s > 0.9
    assert followed.seen_s == pytest.approx(
        followed.truth_s, abs=WITHIN * followed.truth_s + followed.stolen_s
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS.split() if kind != "ignored"])
def test_without_perf_the_clocks_tell_as_much_of_what_is_waited_for(
    workload: Path, report: Path, kind: str
) -> None:
    followed = follow(workload, kind, "wrapped by clocks", report)

    assert followed.source == "process clocks"
    assert followed.seen_s == pytest.approx(followed.truth_s, rel=WITHIN)


def test_without_perf_it_is_said_what_is_missed_and_why(workload: Path, report: Path) -> None:
    followed = follow(workload, "short", "wrapped by clocks", report)

    ((what, why, fix),) = followed.notes
    assert "CPU time" in what
    assert why.startswith("Permission denied") and "that nobody waits for" in why
    assert fix


@pytest.mark.parametrize("kind", ["threads", "workers", "short"])
def test_what_was_used_before_the_attach_never_comes_in(
    workload: Path, report: Path, kind: str
) -> None:
    # Without perf: the kernel adds a child's whole life to its parent when it is waited for.
    followed = follow(workload, kind, "attached by clocks", report, period_ns=10_000_000)

    assert followed.first_s < 0.01
    # What is used between the last sample and the end is lost, on all CPUs.
    assert followed.seen_s == pytest.approx(followed.truth_s, rel=0.03)
    assert followed.seen_s <= followed.truth_s * (1 + WITHIN)


def test_a_tree_that_forks_all_the_time_can_be_attached_to(workload: Path, report: Path) -> None:
    followed = follow(workload, "busy", "attached", report)

    require_perf(followed)
    ticks_s = 0.03  # of which the truth before the attach is made
    assert followed.seen_s == pytest.approx(
        followed.charged_s, abs=WITHIN * followed.charged_s + followed.stolen_s + ticks_s
    )


@pytest.mark.parametrize("how", ["attached", "attached by clocks"])
def test_the_living_are_counted_until_none_is_left(workload: Path, report: Path, how: str) -> None:
    followed = follow(workload, "workers", how, report, period_ns=10_000_000)

    assert followed.processes[0] == 7
    assert 7 < max(followed.processes) <= 13
    assert followed.processes[-1] == 0
