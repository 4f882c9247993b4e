"""Real launchers for tests: where they are, a cluster of Slurm on this machine, and cgroups."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from cli import SLOW_S, until

HOST = os.uname().nodename.partition(".")[0]


def module(name: str) -> None:
    """Skips the test where a package is not installed."""
    pytest.importorskip(name, reason=f"{name} is not installed (pip install '.[launchers]')")


def program(name: str, package: str) -> str:
    """The path of a program; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install {package})")
    return path


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


SLURM_CONF = """
ClusterName=pepr
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


@contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """A cluster of this machine alone: the variables with which its commands reach it."""
    munged, slurmctld, slurmd = (
        program(name, package)
        for name, package in (("munged", "munge"), ("slurmctld", "slurmctld"), ("slurmd", "slurmd"))
    )
    program("srun", "slurm-client")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts tasks only as root")
    folder = Path(
        subprocess.check_output(["mktemp", "-d", "/tmp/pepr-slurm-XXXXXX"], text=True).strip()
    )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    ports = free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(
            host=HOST,
            port=ports[0],
            node_port=ports[1],
            folder=folder,
            cpus=os.cpu_count(),
        )
    )
    env = {**os.environ, "SLURM_CONF": str(conf)}
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        log = (folder / f"{Path(command[0]).name}.log").open("wb")
        started.append(
            subprocess.Popen(
                command,
                env=env,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,  # noqa: PLW1509  no thread holds a lock that it takes
            )
        )
        log.close()

    try:
        start(
            *(munged, "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"),
            *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"),
        )
        _until((folder / "munge.sock").exists, "munged", folder)
        start(slurmctld, "-D")
        start(slurmd, "-D")
        _until(
            lambda: (
                b"idle"
                in subprocess.run(["sinfo", "-h"], env=env, capture_output=True, check=False).stdout
            ),
            "slurmctld",
            folder,
        )
        yield {"SLURM_CONF": str(conf)}
    finally:
        for process in started[::-1]:
            process.terminate()
            process.wait(SLOW_S)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def real_cgroup() -> Iterator[Path]:
    """A cgroup of version 2 of the test's own; gone afterwards, with those in it."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = [line.split()[4] for line in lines if " - cgroup2 " in line]
    if not mounts:
        pytest.skip("no cgroups of version 2 are mounted")
    try:
        folder = Path(subprocess.check_output(["mktemp", "-d", f"{mounts[0]}/pepr-test-XXXXXX"],
                      stderr=subprocess.STDOUT, text=True).strip())  # fmt: skip
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no cgroup can be made here: {error.output}")
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        groups = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for group in groups[::-1]:
            until(partial(_is_removed, group))


def _is_removed(group: Path) -> bool:
    """Removes a cgroup, once its processes have gone."""
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


def inside(group: Path, *command: str) -> list[str]:
    """A command that enters a cgroup and then is `command`."""
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]


def _end_with_parent() -> None:
    """A session of tests that is killed leaves no daemon behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h


def _until(condition: Callable[[], bool], what: str, folder: Path) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end_s:
            logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in folder.glob("*.log"))
            pytest.skip(f"{what} does not run here: {logs}")
        time.sleep(0.1)
