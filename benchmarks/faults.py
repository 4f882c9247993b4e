"""Faults on purpose: whether a command's status stands, which joules are lost, and who is served.

A fault is one line in FAULTS: its name, and a context in which it holds. While it does, a command
is measured whose status and energy are known, and clients of a daemon come all at once. `--only`
takes parts of names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.common import ROOT, UnmeasurableError, header, main

TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

ATTACKERS = (23471, 23472, 23473, 23474)
HONEST = 23479
CLIENTS = 200
STATUS = 7  # of the command that is measured
PACKAGE_W = 100.0
RUN_S = 2.0
SLOW_S = 120.0
SETTLE_S = 1.0  # until an attack is in full swing


@dataclass(frozen=True)
class Bench:
    """A simulated machine of known power, and the daemon that alone may read its counters."""

    tree: Any
    daemon: Any
    python: str  # that any user may run
    env: dict[str, str]

    @property
    def socket(self) -> str:
        return str(self.daemon.socket)

    def port(self) -> str:
        return str(self.daemon.status()["metrics"]).rpartition(":")[2].partition("/")[0]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong while a command is measured.

    `holds` begins the fault, and ends it when its context ends. With `scraped`, the metrics are
    asked for too.
    """

    name: str
    holds: Callable[[Bench], AbstractContextManager[object]]
    scraped: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a command and of the daemon's clients. `lost_j`: None if nothing is recorded."""

    status: int
    lost_j: float | None
    true_j: float
    served: int
    slowest_s: float
    scraped: bool | None
    daemon_lives: bool

    @property
    def good(self) -> bool:
        """Whether nothing beyond a second's energy was lost, and nobody was turned away."""
        measured = self.lost_j is not None and abs(self.lost_j) <= PACKAGE_W
        others = self.served == CLIENTS and self.daemon_lives and self.scraped is not False
        return self.status == STATUS and measured and others


# --- faults ---------------------------------------------------------------------------------------


@contextmanager
def attack(bench: Bench, name: str, *, port: bool = False) -> Iterator[None]:
    """One of `tests/attacks.py`, by four users at once."""
    from daemons import become

    where = bench.port() if port else bench.socket
    with ExitStack() as stack:
        for uid in ATTACKERS:
            program = [bench.python, str(TESTS / "attacks.py"), name, where, str(SLOW_S)]
            attacker = subprocess.Popen(
                program, env=bench.env, cwd="/", preexec_fn=become(uid),  # noqa: PLW1509
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            process = stack.enter_context(attacker)
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(SETTLE_S)
        yield


def faults() -> list[Fault]:
    from attacks import ATTACKS, METRICS_ATTACKS

    return [
        Fault("none", lambda _: nullcontext()),
        *(Fault(f"daemon: {name}", partial(attack, name=name)) for name in ATTACKS),
        *(
            Fault(f"metrics: {name}", partial(attack, name=name, port=True), scraped=True)
            for name in METRICS_ATTACKS
        ),
    ]


# --- what comes of them ---------------------------------------------------------------------------


@contextmanager
def machine() -> Iterator[Bench]:
    """As a service has it: a daemon with few descriptors, for everybody."""
    import resource

    import daemons
    import pytest
    from sim import native, powercap

    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))

    if os.geteuid() != 0:
        raise UnmeasurableError("only root can become other users: sudo")
    with daemons.open_place() as folder, ExitStack() as stack:
        try:
            writer = powercap.build_writer(folder)
            python, env = daemons.python_of(HONEST)
        except (native.UnavailableError, pytest.skip.Exception) as missing:
            raise UnmeasurableError(str(missing)) from None
        zones = powercap.two_socket_server(package_w=PACKAGE_W)
        tree = powercap.Tree(folder / "powercap", zones, writer=writer)
        stack.callback(tree.stop)
        options = ("--sensor", tree.spec, "--metrics", "0")
        running = stack.enter_context(
            daemons.daemon(folder / "daemon", *options, preexec_fn=few_descriptors)
        )
        daemons.lock(tree)
        (folder / "store").mkdir()
        os.chown(folder / "store", HONEST, HONEST)
        env |= {"PEPR_DAEMON": str(running.socket), "PEPR_STORE": str(folder / "store")}
        yield Bench(tree, running, python, env)


def start(bench: Bench, *words: str) -> subprocess.Popen[bytes]:
    """Starts a program as a user who has nothing to do with the fault."""
    from daemons import become

    return subprocess.Popen(
        [bench.python, *words], env=bench.env, cwd="/", preexec_fn=become(HONEST),  # noqa: PLW1509
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def measure_one(bench: Bench, fault: Fault) -> Outcome:
    with fault.holds(bench):
        command = start(
            bench, "-m", "pepr_profiler", "run", "--json", "-", "--sensor", bench.tree.spec, "--",
            "/bin/sh", "-c", f"sleep {RUN_S} >&2; exit {STATUS}",
        )  # fmt: skip
        begin_s = time.monotonic()
        crowd = start(bench, str(TESTS / "attacks.py"), "honest", bench.tree.spec, str(CLIENTS))
        served, _ = crowd.communicate(timeout=SLOW_S)
        slowest_s = time.monotonic() - begin_s
        scraped = scrapes(bench) if fault.scraped else None
        summary, _ = command.communicate(timeout=SLOW_S)
    true_j, lost_j = joules(bench, summary)
    return Outcome(
        command.returncode, lost_j, true_j, int(served or 0), slowest_s, scraped,
        bench.daemon.process.poll() is None,
    )  # fmt: skip


def scrapes(bench: Bench) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{bench.port()}/metrics", timeout=10) as text:
            return b"pepr_device_energy" in text.read()
    except OSError:
        return False


def joules(bench: Bench, text: bytes) -> tuple[float, float | None]:
    """The first package's energy while the command ran, and what the summary lacks of it."""
    try:
        summary = json.loads(text)
        true_j = bench.tree.energy_j("intel-rapl:0", *summary["recording"]["window_ns"])
    except (ValueError, KeyError):
        return PACKAGE_W * RUN_S, None
    # Whatever the window left out of the command's life is lost too.
    true_j = max(true_j, PACKAGE_W * RUN_S)
    measured_j = sum(
        part["device_j"] or 0.0
        for part in summary["energy"]["components"]
        if part["id"] == "cpu:package-0" and part["source"] == "powercap"
    )
    return true_j, true_j - measured_j


def report(fault: Fault, outcome: Outcome) -> None:
    lost = "all" if outcome.lost_j is None else f"{outcome.lost_j:.1f}"
    served = f"{outcome.served} of {CLIENTS} in {outcome.slowest_s:.1f} s"
    notes = [
        *(["the daemon ended"] if not outcome.daemon_lives else []),
        *(["no scrape"] if outcome.scraped is False else []),
    ]
    status = "right" if outcome.status == STATUS else f"{outcome.status}!"
    print(
        f"  {fault.name:<32} {status:<7} {lost:>6} of {outcome.true_j:<6.0f} {served:<22} "
        f"{'reached' if outcome.good else 'MISSED'}{''.join(f'; {note}' for note in notes)}",
        flush=True,
    )


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of faults")
    asked = parser.parse_args().only
    chosen = [fault for fault in faults() if any(part in fault.name for part in asked)]
    header("faults: a command of 2 s at 100 W, and 200 clients at once, under each")
    print(f"  {'fault':<32} {'status':<7} {'lost J':>6}    {'':<6} served")
    good = 0
    for fault in chosen:
        with machine() as bench:
            outcome = measure_one(bench, fault)
        report(fault, outcome)
        good += outcome.good
    print(f"  {good} of {len(chosen)} as they should be")


if __name__ == "__main__":
    main(measure)
