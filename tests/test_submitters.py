"""Commands that only submit work: the total says so, and the warning has the command to paste."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, codes, until
from launchers import free_ports, program

from pepr_profiler.commands.submitters import Submitter

INSTEAD = {
    "srun -n 2 python t.py": "srun -n 2 pepr-profile --experiment big -- python t.py",
    "env A=b nice -n 5 srun -l python t.py": "env A=b nice -n 5 srun -l pepr-profile "
    "--experiment big -- python t.py",
    "bash -c 'cd /work && srun -n 2 python t.py'": "srun -n 2 pepr-profile --experiment big -- "
    "python t.py",
    "srun bash -c 'a && b'": "srun pepr-profile --experiment big -- bash -c 'a && b'",
    "sbatch -n 2 job.sh": "in the script: srun pepr-profile --experiment big -- CMD, or "
    "pepr-profile --experiment big -- CMD for what it runs itself",
    "docker run --rm -v /a:/b image python t.py": "docker run --rm -v /a:/b image pepr-profile "
    "--experiment big -- python t.py, with pepr-profiler in the image",
    "podman run image": "podman run IMAGE pepr-profile --experiment big -- CMD, with pepr-profiler "
    "in the image",
    "docker start -a box": "docker run IMAGE pepr-profile --experiment big -- CMD, with "
    "pepr-profiler in the image",
    "kubectl exec -it pod -- python t.py": "kubectl exec -it pod -- pepr-profile --experiment big "
    "-- python t.py",
    "kubectl apply -f job.yaml": 'in the manifest: command: ["pepr-profile", "--", "CMD"], with '
    "pepr-profiler in the image",
    "ray job submit --address http://h:8265 -- python t.py": "ray job submit --address "
    "http://h:8265 -- pepr-profile --experiment big -- python t.py",
    "ssh -p 22 host python t.py": "ssh -p 22 host pepr-profile --experiment big -- python t.py",
    "ssh host 'python t.py'": "ssh host 'pepr-profile --experiment big -- python t.py'",
    "ssh host 'a && b'": """ssh host 'pepr-profile --experiment big -- sh -c '"'"'a && b'"'"''""",
    "ssh host": "ssh HOST pepr-profile --experiment big -- CMD",
    "systemd-run --wait -p MemoryMax=4G python t.py": "systemd-run --wait -p MemoryMax=4G "
    "pepr-profile --experiment big -- python t.py",
    "tmux new -d -s work 'python t.py'": "tmux new -d -s work 'pepr-profile --experiment big -- "
    "python t.py'",
    "tmux": "in tmux: pepr-profile --experiment big -- CMD",
    "screen -dmS work python t.py": "screen -dmS work pepr-profile --experiment big -- python t.py",
}


@pytest.mark.parametrize("line", INSTEAD)
def test_what_to_run_instead_can_be_pasted(line: str) -> None:
    options = ["--experiment", "big", "--json", "out.json"]  # each rank would write that file
    submitter = Submitter.of(shlex.split(line), options)
    assert submitter is not None
    assert submitter.instead == INSTEAD[line]
    assert not submitter.profiles


@pytest.mark.parametrize(
    "line",
    ["python t.py", "torchrun t.py", "mpirun -n 2 python t.py", "ray start --head", "srunner"],
)
def test_what_runs_here_submits_nothing(line: str) -> None:
    assert Submitter.of(shlex.split(line), []) is None


@pytest.mark.parametrize("profiler", ["pepr-profile", "python -m pepr_profiler"])
def test_a_submitted_profiler_is_no_reason_for_advice(profiler: str) -> None:
    submitter = Submitter.of(["srun", *profiler.split(), "--", "python", "t.py"], [])
    assert submitter is not None
    assert submitter.profiles


def assert_accused(cli: Cli, summary: dict[str, Any], name: str, instead: str) -> None:
    (warning,) = (w for w in summary["warnings"] if w["code"] == "submitted")
    assert f"only what {name} itself took" in warning["text"]
    assert warning["hint"] == instead
    lacks = {"id": f"what {name} started", "missing_s": summary["duration_s"]}
    assert summary["energy"]["partial"] == [lacks]
    assert summary["energy"]["u_j"] is None
    # The report says so too, where the total stands.
    text = cli("report", summary["run_id"]).stdout.decode()
    assert "≥ " in text
    assert f"only what {name} itself took; what it started is not in it\n" in text


BURN = "import sys, time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass\n"


def stand_in(folder: Path, name: str, text: str) -> dict[str, str]:
    """The environment in which a command of that name runs this script of a shell."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return {"PATH": f"{path.parent}:{os.environ['PATH']}"}


def test_a_command_that_does_the_work_itself_is_not_accused(cli: Cli, meter: str) -> None:
    here = stand_in(cli.folder, "srun", 'exec "$@"')
    _, summary = cli.measure("--sensor", meter, "--", "srun", "python3", "-c", BURN, env=here)
    assert codes(summary) == set()
    assert summary["energy"]["partial"] == []
    assert summary["energy"]["u_j"] is not None


def test_a_command_that_did_nothing_is_accused(cli: Cli, meter: str) -> None:
    here = stand_in(cli.folder, "docker", "sleep 0.3")
    _, summary = cli.measure("--sensor", meter, "--", "docker", "run", "image", "x", env=here)
    instead = (
        f"docker run image pepr-profile --sensor {meter} -- x, with pepr-profiler in the image"
    )
    assert_accused(cli, summary, "docker", instead)


def test_whole_devices_lack_nothing_on_this_machine(cli: Cli, meter: str) -> None:
    here = stand_in(cli.folder, "srun", "sleep 0.3")
    options = ("--sensor", meter, "--attribution", "device", "--")
    _, summary = cli.measure(*options, "srun", "x", env=here)
    assert summary["energy"]["partial"] == []
    (warning,) = (w for w in summary["warnings"] if w["code"] == "submitted")
    assert warning["text"].endswith("what it takes on other machines is not in the total")


def test_a_comparison_names_a_total_that_lacks_what_was_submitted(cli: Cli, meter: str) -> None:
    here = stand_in(cli.folder, "srun", "sleep 0.2")
    for name, command in (("a", ["srun", "x"]), ("b", ["sleep", "0.2"]), ("c", ["sleep", "0.3"])):
        result = cli("--sensor", meter, "--name", name, "--", *command, env=here)
        assert result.status == 0, result.stderr
        cli("runs", "set", "last", "acc=0.5")
    result = cli("compare", "--resource", "energy")
    assert "lacks what srun started" in " ".join((result.stdout.decode() + result.stderr).split())


# --- real ones ------------------------------------------------------------------------------------


def test_srun_is_no_parent_of_its_tasks(cli: Cli, meter: str, slurm: dict[str, str]) -> None:
    burn = cli.folder / "burn.py"
    burn.write_text(BURN)
    options = ("--sensor", meter, "--")
    _, summary = cli.measure(*options, "srun", "-n", "1", "-O", "python3", str(burn), env=slurm)
    assert summary["exit_code"] == 0
    assert summary["recording"]["exit"]["cpu_s"] < 0.3
    instead = f"srun -n 1 -O pepr-profile --sensor {meter} -- python3 {burn}"
    assert_accused(cli, summary, "srun", instead)


def test_tmux_is_no_parent_of_its_windows(cli: Cli, meter: str) -> None:
    program("tmux", "tmux")
    server = cli.folder / "tmux"
    # A server that runs already: else it would be a child of the measured client.
    subprocess.run(["tmux", "-S", server, "new", "-d", "sleep 100"], check=True, timeout=SLOW_S)
    try:
        command = ("new", "-d", "sleep 0.1")
        env = {"TMUX": f"{server},1,0"}  # as inside one of its windows
        _, summary = cli.measure("--sensor", meter, "--", "tmux", *command, env=env)
    finally:
        subprocess.run(["tmux", "-S", server, "kill-server"], check=False, timeout=SLOW_S)
    assert_accused(
        cli, summary, "tmux", f"tmux new -d 'pepr-profile --sensor {meter} -- sleep 0.1'"
    )


@pytest.fixture
def ssh_options(tmp_path: Path) -> Iterator[list[str]]:
    """A server of this machine's own: the options with which ssh reaches it."""
    sshd = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
    program("ssh", "openssh-client")
    if sshd is None:
        pytest.skip("sshd is not installed (apt-get install openssh-server)")
    if os.geteuid() != 0:
        pytest.skip("sshd lets others in only as root")
    Path("/run/sshd").mkdir(exist_ok=True)
    (port,) = free_ports(1)
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True
        )
    common = ["-o", "StrictModes=no", "-o", f"AuthorizedKeysFile={tmp_path}/user.pub"]
    server = subprocess.Popen(
        [
            sshd,
            "-D",
            "-e",
            "-p",
            str(port),
            "-h",
            str(tmp_path / "host"),
            "-f",
            "/dev/null",
            *common,
        ],
        stderr=subprocess.PIPE,
    )
    options = ["-F", "/dev/null", "-p", str(port), "-i", str(tmp_path / "user")]
    options += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known"]
    try:
        assert server.stderr is not None
        until(lambda: server.poll() is not None or b"listening" in server.stderr.readline())
        done = subprocess.run(
            ["ssh", *options, "127.0.0.1", "true"], capture_output=True, check=False, timeout=SLOW_S
        )
        if done.returncode:
            pytest.skip(f"sshd lets nobody in here: {done.stderr.decode()}")
        yield options
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=SLOW_S)


def test_ssh_is_no_parent_of_its_command(cli: Cli, meter: str, ssh_options: list[str]) -> None:
    words = ["ssh", *ssh_options, "127.0.0.1"]
    _, summary = cli.measure("--sensor", meter, "--", *words, "sleep", "0.1")
    assert summary["exit_code"] == 0
    instead = shlex.join([*words, "pepr-profile", "--sensor", meter, "--", "sleep", "0.1"])
    assert_accused(cli, summary, "ssh", instead)
