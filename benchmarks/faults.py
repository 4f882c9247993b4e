"""Faults on purpose: whether a command's status stands, which joules are lost, and who is served.

A fault is a line of `fault_cases.faults`: its name, what injects it, and what then has to come of
it. A command of 2 s runs under it on a simulated machine of 100 W and writes down when it began and
ended, so that its status and energy are known. While the daemon is attacked, 200 clients come at
once. `--only` takes parts of names, `--list` prints them. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import UnmeasurableError, compile_c, header, judge, main
from benchmarks.fault_cases import (
    HONEST,
    RUN_S,
    SLOW_S,
    STATUS,
    TESTS,
    Case,
    Fault,
    Tools,
    faults,
    metrics_port,
)

CLIENTS = 200
PACKAGE_W = 100.0
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of linux/sched.h


@dataclass(frozen=True)
class Outcome:
    """What came of a fault. `lost_j`: None if nothing is recorded; `served`: None if not asked."""

    fault: Fault
    status: int | None
    lost_j: float | None
    true_j: float
    served: int | None = None
    slowest_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        return self.status == self.fault.status

    @property
    def kept(self) -> bool:
        """Whether at most a second's energy was lost or made up."""
        lost_j = self.true_j if self.lost_j is None else self.lost_j
        return abs(lost_j) <= PACKAGE_W or (self.lost_j is None and not self.fault.recorded)

    @property
    def all_served(self) -> bool:
        return self.served in (None, CLIENTS) and not self.notes


# --- what comes of them ---------------------------------------------------------------------------


def isolate() -> None:
    """This process, and all that it starts, has mounts of its own from now on."""
    if os.geteuid() != 0:
        raise UnmeasurableError("only root can become other users and mount disks: sudo")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS) != 0:
        raise UnmeasurableError(f"no private mounts: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def make_tools(folder: Path) -> Tools:
    import daemons
    import pytest
    from sim import native, powercap

    try:
        writer = powercap.build_writer(folder)
        python, variables = daemons.python_of(HONEST)
    except (native.UnavailableError, pytest.skip.Exception) as missing:
        raise UnmeasurableError(str(missing)) from None
    preload = compile_c("faults_preload.c", folder, "-fPIC", "-shared", "-ldl")
    return Tools(compile_c("faults_child.c", folder), preload, writer, python, variables)


def new_case(tools: Tools, folder: Path, stack: ExitStack, *, with_daemon: bool) -> Case:
    """A command that is measured where nothing is wrong."""
    import daemons
    from sim import powercap

    zones = powercap.two_socket_server(package_w=PACKAGE_W)
    tree = powercap.Tree(folder / "powercap", zones, writer=tools.writer)
    stack.callback(tree.stop)
    for name in ("store", "work", "home", "tmp"):
        (folder / name).mkdir()
        os.chown(folder / name, HONEST, HONEST)
    (folder / "marks").write_bytes(bytes(24))
    (folder / "marks").chmod(0o666)
    marks = [str(folder / "marks"), str(RUN_S), str(STATUS)]
    variables = tools.env | {
        "PEPR_STORE": str(folder / "store"), "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"), "PATH": os.environ["PATH"],
    }  # fmt: skip
    command = [str(tools.child), *marks]
    case = Case(tools, folder, stack, tree, None, variables, command)
    case.popen = {"cwd": folder / "work", "stdout": subprocess.DEVNULL}
    case.popen |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if with_daemon:
        words = ("--sensor", tree.spec, "--metrics", "0")
        few: dict[str, Any] = {"preexec_fn": _few_descriptors}  # as its unit has them
        case.daemon = stack.enter_context(daemons.daemon(folder / "daemon", *words, **few))
        case.daemon.options = words
        daemons.lock(tree)
        case.uid = HONEST
        case.env["PEPR_DAEMON"] = str(case.daemon.socket)
    return case


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))


def start(case: Case) -> subprocess.Popen[bytes]:
    from daemons import become

    def prepare() -> None:
        # Ignored where this runs in the background.
        for signo in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(signo, signal.SIG_DFL)
        for change in case.before_exec:
            change()
        if case.uid:
            become(case.uid)()

    words = [case.tools.python, *case.program]
    if not case.program:
        words += ["-m", "pepr_profiler", "run", "--sensor", case.tree.spec, *case.options, "--"]
        words += case.command
    process = subprocess.Popen(
        [*case.prefix, *words], env=case.env, preexec_fn=prepare, **case.popen,  # noqa: PLW1509
    )  # fmt: skip
    case.stack.callback(process.wait)
    case.stack.callback(process.kill)
    return process


def start_crowd(case: Case) -> subprocess.Popen[bytes]:
    from daemons import become

    words = [str(TESTS / "attacks.py"), "honest", case.tree.spec, str(CLIENTS)]
    variables = case.tools.env | {"PEPR_DAEMON": str(case.daemon.socket)}
    crowd = subprocess.Popen(
        [case.tools.python, *words], env=variables, cwd="/", stdout=subprocess.PIPE,
        preexec_fn=become(HONEST), stderr=subprocess.DEVNULL,  # noqa: PLW1509
    )  # fmt: skip
    return case.stack.enter_context(crowd)


def measure_one(tools: Tools, fault: Fault) -> Outcome:
    import daemons

    with daemons.open_place() as folder, ExitStack() as stack:
        case = new_case(tools, folder, stack, with_daemon=fault.daemon)
        for inject in fault.inject:
            inject(case)
        begin_s = time.monotonic()
        case.process = start(case)
        crowd = start_crowd(case) if fault.served else None
        for when_s, action in sorted(case.events, key=lambda event: event[0]):
            time.sleep(max(0.0, begin_s + when_s - time.monotonic()))
            action(case)
        served, slowest_s, notes = None, 0.0, []
        if crowd is not None:
            served = int(crowd.communicate(timeout=SLOW_S)[0] or 0)
            slowest_s = time.monotonic() - begin_s
            if case.daemon.process.poll() is not None:
                notes.append("the daemon ended")
        if fault.scraped and not scrapes(case):
            notes.append("no scrape")
        status: int | None = None
        with suppress(subprocess.TimeoutExpired):
            status = case.process.wait(SLOW_S)
        true_j, lost_j = joules(case)
        with suppress(ProcessLookupError):
            if pid := case.marks()[0]:
                os.kill(pid, signal.SIGKILL)  # the profiler's end is not the child's
        return Outcome(fault, status, lost_j, true_j, served, slowest_s, tuple(notes))


def scrapes(case: Case) -> bool:
    import urllib.request

    try:
        url = f"http://127.0.0.1:{metrics_port(case)}/metrics"
        with urllib.request.urlopen(url, timeout=10) as text:
            return b"pepr_device_energy" in text.read()
    except OSError:
        return False


def joules(case: Case) -> tuple[float, float | None]:
    """The first package's energy while the command ran, and what the recording lacks of it."""
    _, begin_ns, end_ns = case.marks()
    ends_ns = [t_ns for t_ns in (end_ns, case.until_ns) if t_ns]
    if not begin_ns or not ends_ns:
        return 0.0, 0.0  # it was ended before it began
    end_ns = max(min(ends_ns), begin_ns)
    true_j = PACKAGE_W * (end_ns - begin_ns) * 1e-9
    recorded = []
    for run in case.runs():
        summary = report(case, run)
        found = [
            component
            for component in summary.get("energy", {}).get("components", ())
            if component["id"] == "cpu:package-0" and component["source"] == "powercap"
        ]
        if not found:
            continue
        from_ns = summary["recording"]["window_ns"][0]
        to_ns = from_ns + round(summary["duration_s"] * 1e9)
        if case.until_ns:
            to_ns = min(to_ns, case.until_ns)
        common_ns = min(end_ns, to_ns) - max(begin_ns, from_ns)
        # What the window left out of the command's life is lost too.
        both_s = (max(end_ns, to_ns) - min(begin_ns, from_ns)) * 1e-9
        recorded.append((common_ns, PACKAGE_W * both_s - (found[0]["device_j"] or 0.0)))
    return true_j, max(recorded)[1] if recorded else None


def report(case: Case, run: Path) -> dict[str, Any]:
    """The run's summary, made where nothing is wrong; empty if there is none."""
    done = subprocess.run(
        [case.tools.python, "-m", "pepr_profiler", "report", str(run), "--json", "-"],
        env=case.tools.env, cwd="/", capture_output=True, check=False, timeout=SLOW_S,
    )  # fmt: skip
    try:
        summary: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {}
    return summary


def show_outcome(outcome: Outcome) -> None:
    lost = "all" if outcome.lost_j is None else f"{outcome.lost_j:.1f}"
    status = "right" if outcome.right else f"{outcome.status}!"
    served = "" if outcome.served is None else f"{outcome.served} in {outcome.slowest_s:.1f} s"
    good = outcome.right and outcome.kept and outcome.all_served
    notes = "".join(f"; {note}" for note in outcome.notes)
    print(
        f"  {outcome.fault.name:<48} {status:<6} {lost:>6} of {outcome.true_j:<4.0f} "
        f"{served:<14} {'reached' if good else 'MISSED'}{notes}",
        flush=True,
    )


def measure() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts of names")
    parser.add_argument("--seed", type=int, default=1, help="of the random instants")
    parser.add_argument("--list", action="store_true", help="print the names and nothing else")
    asked = parser.parse_args()
    chosen = [it for it in faults(asked.seed) if any(part in it.name for part in asked.only)]
    if asked.list:
        print(*(fault.name for fault in chosen), sep="\n")
        return
    isolate()
    from daemons import open_place

    header(f"faults: a command of 2 s at 100 W under each, and {CLIENTS} clients while attacked")
    print(f"  {'fault':<48} {'status':<6} {'lost J':>6}    {'':<4} served")
    outcomes = []
    with open_place() as folder:
        tools = make_tools(folder)
        for fault in chosen:
            outcomes.append(measure_one(tools, fault))
            show_outcome(outcomes[-1])
    if not reached(outcomes):
        sys.exit(1)


def reached(outcomes: Sequence[Outcome]) -> bool:
    """Prints the three goals; whether all are reached."""
    recorded = [outcome for outcome in outcomes if outcome.fault.recorded]
    attacked = [outcome for outcome in outcomes if outcome.served is not None]
    verdicts = [
        judge(f"{what}, of {len(of)}", float(sum(good)), "faults", least=len(of))
        for what, of, good in (
            ("status right", outcomes, [it.right for it in outcomes]),
            ("at most 1 s of energy lost", recorded, [it.kept for it in recorded]),
            (f"{CLIENTS} clients served", attacked, [it.all_served for it in attacked]),
        )
        if of
    ]
    return all(verdicts)


if __name__ == "__main__":
    main(measure)
