"""Makes small recordings of simulated hardware, and beside them what their version printed of them.

    sudo .venv/bin/python tests/data/recordings/record.py FOLDER [CHECKOUT]

FOLDER must not exist. CHECKOUT, with its core built in place, is the version that records; without
it, the version around this file does. Namespaces of Linux give the recordings a host name, PIDs, a
boot id and paths that belong to no real machine. Needs root, g++ and `unshare`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve()
TESTS = HERE.parents[2]
sys.path.insert(0, str(TESTS))

from sim import nvml, powercap  # noqa: E402
from sim.waves import Constant, Square  # noqa: E402

STAGE = Path("/srv")  # a file system in memory lies over it, which ends with us
BOOT_ID = "5e0c1d4a-0000-4000-8000-000000000001"
DESTINATION = "PEPR_RECORDINGS"
PROFILER = ["python", "-m", "pepr_profiler"]

TRAIN = """
import sys, time
epochs, work_s = int(sys.argv[1]), float(sys.argv[2])
for epoch in range(epochs):
    end_s = time.process_time() + work_s
    while time.process_time() < end_s:
        sum(range(1000))
    time.sleep(0.05)
    print(f"epoch {epoch} loss {1 / (epoch + 1):.4f} acc {0.9 - 0.4 / (epoch + 1):.4f}", flush=True)
"""

PHASES = """#!/bin/sh
python -m pepr_profiler mark load
sleep 0.2
python -m pepr_profiler mark train
python train.py 2 0.2
python -m pepr_profiler mark begin test
python train.py 1 0.1
python -m pepr_profiler mark end test
"""

IN_CODE = """
import sys, time
from pepr_profiler import profile

with profile("in-code", experiment="code", sensors=[sys.argv[1]], carbon_intensity=56.0) as run:
    for epoch in range(4):
        with run.phase("train"):
            time.sleep(0.15)
        with run.phase("eval"):
            time.sleep(0.05)
        run.log(epoch=epoch, accuracy=0.9 - 0.5 / (epoch + 1), loss=1 / (epoch + 1))
"""


STAGED = f"""
hostname node-1
mount -t tmpfs none {STAGE}
cd {STAGE}
mkdir venv tests
mount --bind {sys.prefix} venv
mount --bind {TESTS} tests
echo {BOOT_ID} > boot_id
mount --bind boot_id /proc/sys/kernel/random/boot_id
exec python tests/data/recordings/record.py
"""


def enter_namespaces(folder: str, checkout: str = "") -> int:
    """Runs this script again where nothing that it sees belongs to this machine."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PEPR_", "PYTHON"))}
    env |= {"PEPR_DAEMON": "off", "PEPR_STORE": f"{STAGE}/store"}
    env |= {"PATH": f"{STAGE}/venv/bin:{env['PATH']}", DESTINATION: str(Path(folder).resolve())}
    env["PYTHONPATH"] = str(Path(checkout).resolve() if checkout else TESTS.parent)
    apart = ["unshare", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"]
    return subprocess.run([*apart, "sh", "-euc", STAGED], env=env, check=False).returncode


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PROFILER, *arguments], stdout=subprocess.DEVNULL)


def run(*arguments: str) -> None:
    with start(*arguments) as process:
        if process.wait() != 0:
            sys.exit(f"{arguments} ended with {process.returncode}")


def output_of(*arguments: str) -> bytes:
    return subprocess.run([*PROFILER, *arguments], check=True, stdout=subprocess.PIPE).stdout


@contextmanager
def server() -> Iterator[str]:
    """Two sockets; the power of the first alternates, and its counter wraps every 1.2 s."""
    wave = Square(0.5, 40, 160)
    zones = (
        powercap.Zone("intel-rapl:0", "package-0", wave, range_uj=120_000_000),
        powercap.Zone("intel-rapl:0:0", "dram", Constant(12)),
        powercap.Zone("intel-rapl:1", "package-1", Constant(45)),
    )
    tree = powercap.Tree(STAGE / "server", zones, writer=powercap.build_writer(STAGE))
    try:
        yield tree.spec
    finally:
        tree.stop()


def driver(name: str, board: nvml.Gpu, absent: tuple[str, ...] = ()) -> str:
    folder = STAGE / name
    folder.mkdir()
    return nvml.install(nvml.Scenario((board,), absent=absent), folder, STAGE).spec


def shared_gpu(neighbour: int) -> str:
    """A board with an energy counter, on which the job and a neighbour compute."""
    job, other = nvml.Process(nvml.STARTED, 2**30, sm=0.6), nvml.Process(neighbour, 2**30, sm=0.2)
    return driver("shared", nvml.Gpu(Square(0.6, 120, 420), processes=(job, other)))


def old_gpu() -> str:
    """A board without a counter, whose driver cannot list processes."""
    board = nvml.Gpu(Square(0.4, 60, 200), name="Tesla P100", sensor=nvml.PASCAL)
    lists = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetProcessUtilization")
    versions = tuple(f"{lists[0]}{suffix}" for suffix in ("", "_v2", "_v3"))
    return driver("old", board, absent=(*versions, lists[1]))


def meter() -> str:
    """A sensor of power that is the job's alone; CPU and memory have none and are modelled."""
    columns = ("meter", "power", "W", "1", "0", "gauge", "test", "kind=gpu", "component=gpu:meter")
    rows = (f"{0.1 * n:.1f}\t{100 + 20 * (n % 5)}" for n in range(100))
    file = STAGE / "meter"
    file.write_text("\n".join(["\t".join(("channel", *columns)), *rows]) + "\n")
    return f"replay:{file}"


def record_all() -> None:
    of_output = ["--metric", r"acc=acc ([0-9.]+)", "--metric", r"loss=loss ([0-9.]+)"]
    study = ["run", "-q", "--experiment", "sizes", "--region", "DK", "--pue", "1.2", *of_output]
    meter_spec = meter()
    with server() as rapl:
        for epochs in (2, 3):
            command = ["python", "train.py", str(epochs), "0.15"]
            run(*study, "--name", "small", "--sensor", rapl, "--", *command)
        # Two recordings of one job, which a comparison puts together.
        large = [*study, "--name", "large", "--job", "17", "--sensor", rapl]
        with start(*large, "--", "python", "train.py", "6", "0.1"):
            run(*large, "--", "python", "train.py", "5", "0.1")
        with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as neighbour:
            gpu = ["--sensor", shared_gpu(neighbour.pid), "--sensor", rapl]
            run("run", "-q", "--name", "shared", *gpu, "--", "sh", "phases.sh")
            neighbour.kill()
        with start("run", "-q", "--name", "killed", "--sensor", rapl, "--", "sleep", "9") as ours:
            time.sleep(1.8)  # at least one flush
            ours.send_signal(signal.SIGKILL)
    run("run", "-q", "--name", "old-driver", "--sensor", old_gpu(), "--", "sleep", "1")
    with subprocess.Popen(["python", "train.py", "9", "0.2"], stdout=subprocess.DEVNULL) as job:
        span = ["--duration", "1s", "--scope", "device", "--name", "attached"]
        run("attach", "-q", *span, "--sensor", meter_spec, str(job.pid))
        job.kill()
    subprocess.run(["python", "in_code.py", meter_spec], check=True)


def print_all(folder: Path) -> None:
    """Copies the runs, and keeps what this version prints of them.

    The report of a finished run is its run.json; only others need a file.
    """
    store, printed = STAGE / "store", folder / "printed"
    printed.mkdir(parents=True)
    for directory in sorted((store / "runs").iterdir()):
        report = output_of("report", directory.name, "--json", "-")
        if report != (directory / "run.json").read_bytes():
            (printed / f"{directory.name}.json").write_bytes(report)
    resources = ("--resource", "energy,carbon,time,memory")
    for name, arguments in {
        "compare": ("compare", "--experiment", "sizes", *resources, "--json", "-"),
        "list": ("runs", "list", "--json"),
        "export": ("runs", "export", "-", "--format", "json"),
    }.items():
        (printed / f"{name}.json").write_bytes(output_of(*arguments))
    shutil.copytree(store / "runs", folder / "runs")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:7} {file.relative_to(folder)}")


def main() -> int:
    if 2 <= len(sys.argv) <= 3:
        return enter_namespaces(*sys.argv[1:])
    if DESTINATION not in os.environ:
        sys.exit(__doc__)
    folder = Path(os.environ.pop(DESTINATION))
    for name, text in (("train.py", TRAIN), ("phases.sh", PHASES), ("in_code.py", IN_CODE)):
        (STAGE / name).write_text(text)
    record_all()
    print_all(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
