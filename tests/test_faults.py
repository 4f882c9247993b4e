"""The command runs, and its exit status stands, whatever is missing on the machine."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli, codes, component, write_meter
from daemons import become, python_of

FAILING = ("sh", "-c", "echo ran; exit 7")


def limited(**limits: int) -> Callable[[], None]:
    """A `preexec_fn` that sets resource limits: NOFILE=8."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    return limit


@pytest.mark.parametrize("limits", [
    *({"NOFILE": count} for count in (5, 6, 8, 10, 12, 14, 16, 20)),
    *({"AS": mega << 20} for mega in (40, 60, 100, 140, 180, 220, 250)),
    {"FSIZE": 16 << 10}, {"FSIZE": 0}, {"CPU": 1000, "NOFILE": 7}, {"STACK": 1 << 19},
], ids=str)  # fmt: skip
def test_a_limit_costs_the_measurement_at_most(cli: Cli, limits: dict[str, int]) -> None:
    # Python itself would leave damaged bytecode behind where files may not grow.
    alone = {"PYTHONDONTWRITEBYTECODE": "1"}
    result = cli("--", *FAILING, preexec_fn=limited(**limits), env=alone)
    assert (result.status, result.stdout) == (7, b"ran\n"), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "broken", ["raise RuntimeError('not that one')", "1/0", "import nothing_such", "ndarray = None"]
)
def test_a_foreign_numpy_costs_the_summary_and_not_the_recording(
    cli: Cli, tmp_path: Path, broken: str
) -> None:
    folder = tmp_path / "foreign" / "numpy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"{broken}\n")
    meter = write_meter(tmp_path / "meter", 100)
    result = cli(
        "--sensor", meter, "--", "sh", "-c", "sleep 0.5; exit 7",
        env={"PYTHONPATH": str(folder.parent)},
    )  # fmt: skip
    assert result.status == 7
    assert "there is no summary" in result.stderr and "Traceback" not in result.stderr
    # and it is readable where numpy is
    energy = cli.report(cli.runs()[0])["energy"]
    assert energy["total_j"] > 40


def test_what_cannot_be_written_as_text_is_a_path_all_the_same(cli: Cli, tmp_path: Path) -> None:
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/st\xff")
    result = cli("--store", strange, "--", *FAILING)
    assert (result.status, result.stdout) == (7, b"ran\n")
    assert len(list(Path(strange, "runs").iterdir())) == 1
    Path(strange, "cwd").mkdir()
    result = cli("--store", "here", "--", *FAILING, cwd=Path(strange, "cwd"))
    assert (result.status, result.stdout) == (7, b"ran\n")
    assert len(list(Path(strange, "cwd", "here", "runs").iterdir())) == 1


def test_an_outer_run_that_says_little_is_none_of_the_childs_business(
    cli: Cli, tmp_path: Path
) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for outer in ({"boot_id": boot}, {"boot_id": boot, "recording": {}}, {"recording": None}):
        folder = tmp_path / "outer"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"schema": 1, **outer}))
        result = cli("--", *FAILING, env={"PEPR_RUN_DIR": str(folder)})
        assert (result.status, result.stdout) == (7, b"ran\n"), result.stderr


def test_a_user_without_a_home_is_measured_elsewhere(tmp_path: Path) -> None:
    # given a user who has no entry in passwd, and no HOME
    if os.geteuid() != 0:
        pytest.skip("needs root to become a user without an entry")
    python, env = python_of(54321)
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:3]:
        folder.chmod(0o755)
    done = subprocess.run(
        [python, "-m", "pepr_profiler", "-q", "--", *FAILING],
        env={**env, "TMPDIR": str(tmp_path)},
        preexec_fn=become(54321),
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "ran\n"), done.stderr
    assert f"this run is kept in {tmp_path}" in done.stderr and "Traceback" not in done.stderr


needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0
    or os.geteuid() != 0,
    reason="mounting needs root",
)


def in_mounts(mounts: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a mount namespace of its own, in which `mounts` are made first."""
    command = [sys.executable, "-m", "pepr_profiler", *arguments]
    script = f'{mounts}\nexec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", *command],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PEPR_DAEMON": "off"},
        capture_output=True, text=True, check=False, timeout=100, cwd="/",
    )  # fmt: skip


@needs_mounts
@pytest.mark.parametrize("option", ["size=64k", "size=1m,nr_inodes=3"])
def test_a_disk_that_is_full_before_the_start_costs_no_joule(tmp_path: Path, option: str) -> None:
    meter = write_meter(tmp_path / "meter", 100)
    full, spare = tmp_path / "full", tmp_path / "spare"
    for folder in (full, spare):
        folder.mkdir()
    mounts = f"mount -t tmpfs -o {option} tmpfs {full}\nhead -c 60000 /dev/zero > {full}/filling"
    summary_file = tmp_path / "summary.json"
    result = in_mounts(
        f"{mounts}\nexport TMPDIR={spare}", "--store", str(full / "store"), "--json",
        str(summary_file), "--sensor", meter, "--", "sh", "-c", "sleep 0.6; exit 7",
    )  # fmt: skip
    assert result.returncode == 7, result.stderr
    summary = json.loads(summary_file.read_text())
    assert codes(summary) == {"store-unwritable"}
    assert component(summary, "gpu:x")["device_j"] == pytest.approx(60, rel=0.15)
    assert f"this run is kept in {spare}" in " ".join(result.stderr.split())


@needs_mounts
def test_where_nothing_can_be_written_the_command_runs_unmeasured(cli: Cli) -> None:
    places = ("/tmp", "/var/tmp", "/dev/shm")
    package = shutil.copytree(
        Path(__file__).parents[1] / "pepr_profiler", cli.folder / "pepr_profiler"
    )
    mounts = f"mount --bind {package.parent} /mnt\n" + "\n".join(
        f"mount -t tmpfs -o ro tmpfs {place}" for place in places
    )
    result = in_mounts(
        f"{mounts}\nexport PYTHONPATH=/mnt\ncd /proc", "--store", "/tmp/x", "--", *FAILING
    )
    assert (result.returncode, result.stdout) == (7, "ran\n"), result.stderr
    assert result.stderr.startswith("pepr-profile: sh runs unmeasured: ")
    assert "fix: give --store DIR" in result.stderr and len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize("away", ["mv {store} {other}", "rm -r {store}"])
def test_a_store_that_goes_away_in_mid_run_is_reported(cli: Cli, tmp_path: Path, away: str) -> None:
    meter = write_meter(tmp_path / "meter", 100)
    store, other = tmp_path / "store", tmp_path / "other"
    script = f"sleep 0.3; {away.format(store=store, other=other)}; sleep 0.5; exit 7"
    result = cli("--store", str(store), "--sensor", meter, "--", "sh", "-c", script)
    assert result.status == 7 and "Traceback" not in result.stderr
    if away.startswith("mv"):
        assert "was moved while it was recorded" in " ".join(result.stderr.split())
        [directory] = (other / "runs").iterdir()
        summary = cli.report(directory)
        assert summary["complete"] and codes(summary) == {"moved"}
        assert component(summary, "gpu:x")["device_j"] == pytest.approx(80, rel=0.15)
    else:
        assert "was removed while it was recorded" in " ".join(result.stderr.split())
