"""Two people with accounts of their own share a machine: who logs in finds all by itself."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, component, ended, until
from daemons import BURN, OTHERS, give_go, needs_root, open_folder, python_of
from sim.powercap import BuildTree, Tree, two_socket_server

pytestmark = needs_root
tmp_path = open_folder

DAEMON_ACCOUNT, LAB, STRANGER = "pepr-profiler", "pepr-test-lab", "pepr-test-mallory"
USERADD = ("useradd", "--shell", "/bin/sh", "--no-log-init")


@dataclass(frozen=True)
class Machine:
    """This machine with an /etc and a /run of its own, which only we see: a mount namespace."""

    keeper: int

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--mount", "--target", str(self.keeper), "--wd=/", *words]

    def run(self, *words: str) -> str:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def account(self, name: str) -> pwd.struct_passwd:
        fields = self.run("getent", "passwd", name).strip().split(":")
        return pwd.struct_passwd((*fields[:2], int(fields[2]), int(fields[3]), *fields[4:]))


def login(name: str, *words: str) -> list[str]:
    """A command in a login shell of theirs: their groups, their home, their environment."""
    return ["su", "-", name, "-c", shlex.join(words)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    for program in ("unshare", "nsenter", "useradd", "groupadd", "su", "getent"):
        if not shutil.which(program):
            pytest.skip(f"no {program} here; install util-linux, passwd and libc-bin")
    etc = tmp_path / "etc"
    script = f"""
        cp -a /etc {shlex.quote(str(etc))}
        mount --bind {shlex.quote(str(etc))} /etc
        mount -t tmpfs -o mode=755 tmpfs /run
        sed -i '/^pepr-/d' /etc/passwd /etc/group /etc/shadow /etc/gshadow
        echo CREATE_MAIL_SPOOL=no >> /etc/default/useradd
        echo ready
        exec cat"""
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ended(keeper):  # type: ignore[arg-type]
        assert keeper.stdout is not None and keeper.stderr is not None
        if keeper.stdout.readline() != "ready\n":
            pytest.skip(f"no mount namespace can be made here: {keeper.stderr.read().strip()}")
        yield Machine(keeper.pid)


@pytest.fixture
def tree(powercap_sim: BuildTree) -> Tree:
    """Counters of root's, in a folder of root's."""
    made = powercap_sim(*two_socket_server(), live=True)
    for key in made.zones:
        (made.path(key) / "energy_uj").chmod(0o400)
    return made


def runs_seen(machine: Machine, name: str, product: list[str]) -> list[dict[str, Any]]:
    shown = machine.run(*login(name, *product, "daemon", "status", "--json"))
    runs: list[dict[str, Any]] = json.loads(shown)["runs"]
    return runs


@pytest.mark.long
def test_two_accounts_measure_their_own_jobs_at_once_and_it_adds_up(
    machine: Machine, tree: Tree, tmp_path: Path
) -> None:
    program, variables = python_of(OTHERS[0])
    del variables["PEPR_DAEMON"]  # it is in its usual place
    # given accounts as an administrator makes them, two in a group, one who is in no group, and
    # nobody learns anything
    machine.run("groupadd", LAB)
    machine.run(*USERADD, "--system", "--no-create-home", DAEMON_ACCOUNT)
    people = ("pepr-test-alice", "pepr-test-bob")
    for name in people:
        home = tmp_path / name
        machine.run(*USERADD, "--create-home", "--home-dir", str(home), "--groups", LAB, name)
    machine.run(*USERADD, "--no-create-home", STRANGER)
    accounts = {name: machine.account(name) for name in people}
    # `su` without a dash, as people do, leaves them with root's
    closed = tmp_path / "run-user-0"
    closed.mkdir(mode=0o700)
    settings = [f"XDG_RUNTIME_DIR={closed}", *(f"{k}={value}" for k, value in variables.items())]
    product = ["env", "--unset=PEPR_DAEMON", *settings, program, "-m", "pepr_profiler"]
    with ExitStack() as stack:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PEPR_", "XDG_"))}
        daemon = subprocess.Popen(
            machine.command(*product, "daemon", "--sensor", tree.spec, "--group", LAB),
            env=kept, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.enter_context(ended(daemon))  # type: ignore[arg-type]
        assert daemon.stderr is not None
        served_by = machine.account(DAEMON_ACCOUNT).pw_uid
        said = daemon.stderr.readline()
        assert said == (
            f"pepr-profile: serving /run/pepr-profiler/daemon.sock as user {served_by}\n"
        )
        # when both log in and measure a job, knowing of no daemon
        children = {}
        for name in people:
            words = [*product, "--sensor", tree.spec, "--name", name, "--json", "summary.json",
                     "--", program, "-c", BURN, str(tmp_path / "go")]  # fmt: skip
            child = subprocess.Popen(machine.command(*login(name, *words)), stderr=subprocess.PIPE)
            children[name] = stack.enter_context(ended(child))
        until(lambda: all(runs_seen(machine, name, product) for name in people))
        give_go(tmp_path / "go", seconds=8)  # none works before both are recorded
        # then the stranger is not let in, each of the two sees their own run, and root both
        status = machine.command(*login(STRANGER, *product, "daemon", "status"))
        refused = subprocess.run(status, capture_output=True, text=True, check=False)
        assert refused.returncode == 125 and "Permission denied" in refused.stderr
        for name in people:
            (mine,) = runs_seen(machine, name, product)
            assert mine["uid"] == accounts[name].pw_uid
            assert mine["run"].startswith(name)
        everybody = json.loads(machine.run(*product, "daemon", "status", "--json"))["runs"]
        assert {run["uid"] for run in everybody} == {a.pw_uid for a in accounts.values()}
        for name, child in children.items():
            _, err = child.communicate(timeout=SLOW_S)
            assert child.returncode == 0, (name, err.decode())
        machine.run(*product, "daemon", "stop")
        assert daemon.wait(SLOW_S) == 0
    summaries = []
    for account in accounts.values():
        summaries.append(json.loads((Path(account.pw_dir) / "summary.json").read_text()))
        # what was recorded is theirs, below their home
        (found,) = Path(account.pw_dir).rglob(summaries[-1]["run_id"])
        assert found.stat().st_uid == account.pw_uid
    for summary in summaries:
        daemon = summary["recording"]["daemon"]
        assert daemon["socket"] == "/run/pepr-profiler/daemon.sock"
        assert daemon["lanes"]["powercap"]["coarse"] is True
        for ident, key in (
            ("cpu:package-0", "intel-rapl:0"),
            ("dram:package-1/dram", "intel-rapl:1:1"),
        ):
            part = component(summary, ident)
            truth_j = tree.energy_j(key, *summary["recording"]["window_ns"])
            assert part["device_j"] == pytest.approx(truth_j, rel=0.02)
            whole_j = part["job_j"] + part["others_j"] + part["idle_j"]
            assert whole_j == pytest.approx(part["device_j"], rel=1e-6)
            assert part["job_j"] > 0
    # and together the jobs have no more than the node took
    one, two = (summary["recording"]["window_ns"] for summary in summaries)
    for ident, key in (("cpu:package-0", "intel-rapl:0"), ("cpu:package-1", "intel-rapl:1")):
        shares_j = [component(summary, ident)["job_j"] for summary in summaries]
        node_j = tree.energy_j(key, min(one[0], two[0]), max(one[1], two[1]))
        assert sum(shares_j) <= 1.02 * node_j
        for summary, other_j in zip(summaries, reversed(shares_j), strict=True):
            assert component(summary, ident)["others_j"] >= 0.7 * other_j
    with pytest.raises(KeyError):
        pwd.getpwnam(people[0])  # the machine itself knows of nobody
