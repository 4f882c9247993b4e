"""Commands that only submit work: the total says so, or a cgroup has the work (--follow)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, charged_s, codes, ended, python, until
from launchers import free_ports, inside, program

from pepr_profiler.commands.submitters import Submitter
from pepr_profiler.trace.lane import LaneReader

OUTSIDE = "; or from outside, while it runs: pepr-profile attach --container ID"
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
    "--experiment big -- python t.py, with pepr-profiler in the image" + OUTSIDE,
    "podman run image": "podman run IMAGE pepr-profile --experiment big -- CMD, with pepr-profiler "
    "in the image" + OUTSIDE,
    "docker start -a box": "docker run IMAGE pepr-profile --experiment big -- CMD, with "
    "pepr-profiler in the image" + OUTSIDE,
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


USED = (
    f"{BURN}import resource\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
    "open(sys.argv[1], 'w').write(repr(used.ru_utime + used.ru_stime))\n"
)
"""Writes down what it has used in the end."""


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
        f"{OUTSIDE}"
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


# --- a cgroup has the work ------------------------------------------------------------------------


def job_cpu_s(cli: Cli, summary: dict[str, Any]) -> float:
    """The CPU time of the job, as recorded."""
    batches = list(LaneReader(cli.store / "runs" / summary["run_id"], "processes"))
    return float(batches[-1].values[0][-1] - batches[0].values[0][0])


def test_work_that_is_submitted_into_a_cgroup_is_counted(
    cli: Cli, meter: str, cgroup: Path
) -> None:
    # given a command that hands its work to a child of somebody else, who does it in the cgroup
    for name in ("submitted", "done"):
        os.mkfifo(cli.folder / name)
    worker = f"open({str(cli.folder / 'submitted')!r}).read()\n{BURN}"
    here = stand_in(cli.folder, "srun", f"cd {cli.folder}; echo x > submitted; read line < done")
    with ended(subprocess.Popen(inside(cgroup, *python(worker)))) as process:
        options = ("--sensor", meter, "--follow", f"cgroup:{cgroup.name}", "--")
        path = cli.folder / "summary.json"
        with ended(cli.start("run", "--json", str(path), *options, "srun", "x", env=here)) as run:
            truth_s = charged_s(process)
            (cli.folder / "done").write_text("\n")
            _, said = run.communicate(timeout=SLOW_S)
    assert run.returncode == 0, said
    summary = json.loads(path.read_text())
    # then all of it is in the figures, perhaps but for the worker's start, and nobody is accused
    assert 0.995 < job_cpu_s(cli, summary) < 1.005 * truth_s
    assert codes(summary) == set()
    assert summary["energy"]["partial"] == []
    assert summary["energy"]["u_j"] is not None
    assert summary["memory"]["peak_rss_bytes"] > 2**20
    assert summary["recording"]["root"] == f"cgroup={cgroup}"
    assert f"cgroup       {cgroup}\n" in said.decode()


DAEMON = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
DAEMON += "        while time.process_time() < 0.5: pass\n        os.close(1)\n    os._exit(0)\n"


def test_the_cgroup_of_the_command_is_measured_without_the_profiler(
    cli: Cli, meter: str, cgroup: Path
) -> None:
    # given a daemon that the command leaves behind, and another one's child in the same cgroup
    command = python(f"{DAEMON}os.wait()\n{BURN}\nos.read(0, 1)")
    path = cli.folder / "summary.json"
    options = ["--sensor", meter, "--json", str(path), "--follow", "cgroup", "--", *command]
    run = inside(cgroup, sys.executable, "-m", "pepr_profiler", "run", *options)
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ended(subprocess.Popen(run, env=cli.environment(), **pipes)) as profiler:
        until(lambda: cli.runs() and (cli.runs()[0] / "run.json").exists())
        other_s = charged_s(subprocess.Popen(inside(cgroup, *python(BURN))))
        _, said = profiler.communicate(b"x", timeout=SLOW_S)
    assert profiler.returncode == 0, said
    summary = json.loads(path.read_text())
    truth_s = summary["recording"]["exit"]["cpu_s"] + other_s
    assert truth_s > 2.5
    assert job_cpu_s(cli, summary) == pytest.approx(truth_s, rel=0.02)


def test_a_script_of_slurm_is_measured_with_the_tasks_of_its_steps(
    cli: Cli, meter: str, cgroup: Path
) -> None:
    # given the groups that Slurm makes, and a script whose work enters that of a step
    script, step = (cgroup / "job_12" / name for name in ("step_batch/user/task_0", "step_0"))
    for group in (script, step):
        group.mkdir(parents=True)
    path = cli.folder / "summary.json"
    options = ["--sensor", meter, "--json", str(path), "--follow", "cgroup", "--"]
    command = inside(step, *python(BURN))
    run = inside(script, sys.executable, "-m", "pepr_profiler", *options, *command)
    subprocess.run(run, env=cli.environment(), check=True, timeout=SLOW_S)
    summary = json.loads(path.read_text())
    assert summary["recording"]["root"] == f"cgroup={cgroup}/job_12"
    assert job_cpu_s(cli, summary) == pytest.approx(summary["recording"]["exit"]["cpu_s"], rel=0.02)


def test_a_cgroup_may_be_made_and_removed_by_the_command(
    cli: Cli, meter: str, cgroup: Path
) -> None:
    group = cgroup / "made"
    work = shlex.join(inside(group, *python(BURN)))
    script = f"mkdir {group} && {work} && until rmdir {group}; do sleep 0.01; done"
    options = ("--sensor", meter, "--follow", f"cgroup:{group}", "--", "sh", "-c", script)
    _, summary = cli.measure(*options)
    assert codes(summary) == set()
    assert summary["energy"]["partial"] == []
    # What it used after the last sample is only known from what the group around it used.
    assert 0.9 < job_cpu_s(cli, summary) < summary["recording"]["exit"]["cpu_s"] + 0.1


def test_a_cgroup_without_the_work_is_no_total(cli: Cli, meter: str, cgroup: Path) -> None:
    group = cgroup / "never-made"
    _, summary = cli.measure("--sensor", meter, "--follow", f"cgroup:{group}", "--", "true")
    assert "empty-cgroup" in codes(summary)
    lacks = {"id": f"cgroup {group}", "missing_s": summary["duration_s"]}
    assert summary["energy"]["partial"] == [lacks]
    assert summary["energy"]["u_j"] is None
    # but whole devices lack nothing
    options = ("--sensor", meter, "--follow", f"cgroup:{group}", "--attribution", "device", "--")
    _, summary = cli.measure(*options, "true")
    assert codes(summary) == set()
    assert summary["energy"]["partial"] == []


def test_what_a_command_does_outside_of_the_cgroup_is_named(
    cli: Cli, meter: str, cgroup: Path
) -> None:
    with ended(subprocess.Popen(inside(cgroup, "sh", "-c", "while :; do sleep 0.01; done"))):
        options = ("--sensor", meter, "--follow", f"cgroup:{cgroup}", "--")
        _, summary = cli.measure(*options, *python(BURN.replace("+ 1", "+ 2")))
    assert "outside-cgroup" in codes(summary)


@pytest.mark.parametrize(
    ("follow", "why"),
    [
        ("pids", "only cgroups can be followed"),
        ("cgroup:", "no cgroup is named"),
        ("cgroup:/no/such/group", "is no folder"),
        ("cgroup:/etc", "/etc is no cgroup: it has no cpu.stat"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_starts(
    cli: Cli, cgroup: Path, follow: str, why: str
) -> None:
    del cgroup  # skips the test where none can be followed
    result = cli("run", "--follow", follow, "--", "touch", str(cli.folder / "started"))
    assert why in result.stderr
    assert "fix: " in result.stderr
    assert result.status in (2, 125)
    assert not (cli.folder / "started").exists()
    assert not cli.runs()


# --- real ones ------------------------------------------------------------------------------------


def test_srun_is_no_parent_of_its_tasks(cli: Cli, meter: str, slurm: dict[str, str]) -> None:
    burn = cli.folder / "burn.py"
    burn.write_text(BURN)
    # Without our environment they cannot be found.
    words = ("srun", "--export=PATH", "-n", "1", "-O")
    _, summary = cli.measure("--sensor", meter, "--", *words, "python3", str(burn), env=slurm)
    assert summary["exit_code"] == 0
    assert summary["recording"]["exit"]["cpu_s"] < 0.3
    instead = f"{shlex.join(words)} pepr-profile --sensor {meter} -- python3 {burn}"
    assert_accused(cli, summary, "srun", instead)


def test_tasks_of_srun_on_this_machine_are_found_by_their_environment(
    cli: Cli, meter: str, slurm: dict[str, str]
) -> None:
    burn = cli.folder / "burn.py"
    burn.write_text(USED.replace("+ 1", "+ 3"))
    task = ["sh", "-c", f'exec python3 "$0" {cli.folder}/used-$SLURM_PROCID', str(burn)]
    _, summary = cli.measure("--sensor", meter, "--", "srun", "-n", "2", "-O", *task, env=slurm)
    truth_s = sum(float((cli.folder / f"used-{rank}").read_text()) for rank in range(2))
    # But for what each used after the last sample before its end, in 0.1 s, and srun itself.
    assert truth_s - 0.3 < job_cpu_s(cli, summary) < truth_s + 0.2
    # then it is a lower bound: there may be more on other machines
    (warning,) = (w for w in summary["warnings"] if w["code"] == "submitted")
    assert "the total has what was found of it here (" in warning["text"]
    assert summary["energy"]["partial"][0]["id"] == "what srun started"
    assert summary["recording"]["exit"]["found_cpu_s"] > 5
    text = cli("report", summary["run_id"]).stdout.decode()
    assert "only what was found here of what srun started\n" in text


def test_the_tasks_of_srun_are_counted_in_their_cgroup(
    cli: Cli, meter: str, slurm: dict[str, str], cgroup: Path
) -> None:
    # The cluster makes no cgroups of its own, which its daemons could not where tests run.
    burn = cli.folder / "burn.py"
    burn.write_text(USED)
    script = f'echo $$ > {cgroup}/cgroup.procs; exec python3 "$0" {cli.folder}/used-$SLURM_PROCID'
    task = ["sh", "-c", script, str(burn)]
    options = ("--sensor", meter, "--follow", f"cgroup:{cgroup}", "--")
    _, summary = cli.measure(*options, "srun", "-n", "2", "-O", *task, env=slurm)
    assert summary["exit_code"] == 0
    truth_s = sum(float((cli.folder / f"used-{rank}").read_text()) for rank in range(2))
    # the end of an interpreter comes after it has said what it used
    assert job_cpu_s(cli, summary) == pytest.approx(truth_s, rel=0.02, abs=0.2)
    assert codes(summary) == set()
    assert summary["energy"]["partial"] == []


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
