"""What survives a killed profiler, torn and foreign files, an unwritable store, a bad disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import SLOW_S, Cli, codes, component, ended, python, until
from daemons import daemon, lock, open_place
from sim.permissions import obey_permissions
from sim.powercap import BuildTree, Tree, Zone
from sim.waves import Constant

from pepr_profiler.commands import main
from pepr_profiler.errors import TraceError
from pepr_profiler.store.runs import Store
from pepr_profiler.summary.summarise import summarise
from pepr_profiler.trace.lane import LaneReader


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, native_cache: Path
) -> tuple[Path, Tree, int, list[str]]:
    """A run whose profiler was killed by SIGKILL: its directory, truth, when, and what survived."""
    from sim import native, powercap

    cli = Cli(tmp_path_factory.mktemp("killed"))
    try:
        writer = powercap.build_writer(native_cache)
    except native.UnavailableError as missing:
        pytest.skip(str(missing))
    tree = Tree(cli.folder, (Zone("intel-rapl:0", "package-0", Constant(100)),), writer=writer)
    # The child marks and logs, waits for us, and goes on after the profiler's death.
    code = """
import os, sys
from pepr_profiler import profile
run = profile("inner").__enter__()
with run.phase("before"):
    run.log(accuracy=0.5)
open(sys.argv[1], "w").write(str(os.getpid()))
sys.stdin.read(1)
run.log(accuracy=0.75)
open(sys.argv[2], "w").write("alive")
"""
    marks, alive = cli.folder / "marks", cli.folder / "alive"
    try:
        child = python(code, str(marks), str(alive))
        process = cli.start("-q", "--sensor", tree.spec, "--", *child, stdin=subprocess.PIPE)
        with ended(process):
            until(lambda: marks.exists() and marks.read_text())
            (directory,) = cli.runs()
            marked_ns = time.monotonic_ns()  # three flushes after it, however late the child came
            until(lambda: time.monotonic_ns() > marked_ns + 3_200_000_000)
            killed_ns = time.monotonic_ns()
            process.kill()
            process.wait(SLOW_S)
            before = sorted(p.name for p in directory.iterdir())
            assert process.stdin is not None
            process.stdin.write(b"x")
            process.stdin.flush()
            until(lambda: alive.exists() and alive.read_text())
    finally:
        tree.stop()
    return directory, tree, killed_ns, before


Killed = tuple[Path, Tree, int, list[str]]


def test_child_and_recording_survive_kill_9_of_the_profiler(cli: Cli, killed: Killed) -> None:
    directory, tree, killed_ns, files = killed
    assert "powercap.tail.arrows" in files
    result = cli("report", str(directory), "--json", "-")
    assert result.status == 0
    summary = json.loads(result.stdout)
    assert (summary["complete"], summary["exit_code"]) == (False, None)
    # it reaches to the last mark, and at most the last second has no rows (or a bit more on a busy
    # machine)
    begin_ns = summary["recording"]["window_ns"][0]
    end_ns = begin_ns + round(summary["duration_s"] * 1e9)
    assert abs(killed_ns - end_ns) <= 2_000_000_000
    # what flowed after the last row, and before the last mark, is missing
    [missing] = (m for m in summary["energy"]["partial"] if m["id"] == "cpu:package-0")
    read_ns = end_ns - round(missing["missing_s"] * 1e9)
    assert begin_ns < read_ns < killed_ns
    measured_j = component(summary, "cpu:package-0")["device_j"]
    assert measured_j == pytest.approx(tree.energy_j("intel-rapl:0", begin_ns, read_ns), abs=5)
    # marks and metrics are there, those after the death too
    assert [p["name"] for p in summary["phases"]] == ["inner", "before"]
    assert summary["metrics"] == {"accuracy": 0.75}
    shown = cli("report", str(directory)).stdout.decode()
    assert "incomplete" in shown


def test_recording_torn_anywhere_in_its_last_batch_keeps_the_rest(
    killed: Killed, tmp_path: Path
) -> None:
    # given the tail with its last batches, cut at every byte
    directory = tmp_path / "torn"
    shutil.copytree(killed[0], directory)
    tail = directory / "powercap.tail.arrows"
    whole = tail.read_bytes()
    rows = [len(batch.t_ns) for batch in LaneReader(directory, "powercap")]
    assert len(rows) >= 3
    start = whole.rindex(b"\xff\xff\xff\xff")  # where the last message begins
    assert start > len(whole) // 2
    for size in range(start, len(whole)):
        os.truncate(tail, size) if size < tail.stat().st_size else tail.write_bytes(whole[:size])
        kept = np.concatenate([batch.t_ns for batch in LaneReader(directory, "powercap")])
        assert len(kept) == sum(rows[:-1]), size
        assert np.all(np.diff(kept) > 0)
    # then the summary holds at any size of the file
    for size in range(0, len(whole), max(1, len(whole) // 25)):
        tail.write_bytes(whole[:size])
        summary = summarise(directory)
        assert not summary["complete"]
        package = [c for c in summary["energy"]["components"] if c["id"] == "cpu:package-0"]
        assert not package or package[0]["device_j"] is None or package[0]["device_j"] >= 0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"PK\x03\x04 a zip archive", "not an Arrow stream"),
        (b"\xff" * 64, "Arrow stream"),
        (b"t_ns,read_ns\n1,2\n", "not an Arrow stream"),
    ],
)
def test_foreign_lane_is_refused_by_name(
    killed: Killed,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    why: str,
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(killed[0], directory)
    (directory / "powercap.arrows").write_bytes(content)
    status = main(["report", str(directory)])
    out, err = capsys.readouterr()
    assert (status, out) == (125, "")
    assert why in err
    assert "powercap.arrows" in err
    assert "fix: " in err


def test_where_no_lane_has_a_row_nothing_is_known_which_is_not_0(
    killed: Killed, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(killed[0], directory)
    for path in directory.glob("*.arrows"):
        path.write_bytes(b"")
    summary = summarise(directory)
    assert codes(summary) >= {"unwritten"}
    assert summary["energy"]["total_j"] is None


@pytest.mark.parametrize("name", ["powercap", "processes"])
def test_empty_lane_is_as_if_it_were_not_there(killed: Killed, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "run"
    shutil.copytree(killed[0], directory)
    for path in directory.glob(f"{name}*.arrows"):
        path.write_bytes(b"")
    summary = summarise(directory)
    found = {c["id"]: c for c in summary["energy"]["components"]}
    if name == "powercap":
        assert "cpu:modelled" in found
        assert "cpu:package-0" not in found
    else:
        assert found["cpu:package-0"]["device_j"] > 0
    assert summary["duration_s"] > 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": 1}', b'{"schema": 2, "complete": true}',
     b'{"schema": 1, "complete": true}', b'{"schema": 1, "complete": false, "recording": {}}',
     b'{"schema": 1, "complete": true, "recording": 5}', None],
)  # fmt: skip
def test_damaged_or_foreign_run_json_is_an_error_not_a_crash(
    killed: Killed, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    # given a good run and a bad one in a store
    store = tmp_path / "store"
    shutil.copytree(killed[0], store / "runs" / "good-1")
    shutil.copytree(killed[0], store / "runs" / "bad-1")
    path = store / "runs" / "bad-1" / "run.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    for arguments in (["report", "bad-1"], ["runs", "set", "bad-1", "a=1"]):
        status = main([*arguments, "--store", str(store)])
        _, err = capsys.readouterr()
        assert status == 125
        assert "fix: " in err
    assert main(["runs", "list", "--store", str(store)]) == 0
    good, bad = capsys.readouterr().out.splitlines()
    assert good.startswith("good-1")
    assert bad.startswith("bad-1") and "damaged: " in bad
    with pytest.raises(TraceError):
        Store(store).load("bad-1")


@pytest.mark.parametrize(
    ("window_ns", "cpu", "why"),
    [
        ([0, 2**62], {}, "days"),  # would take 37 GB of seconds
        ([9, 5], {}, "window"),
        ([-5, 5], {}, "window"),
        ([5], {}, "unpack"),
        (None, {"stepping": 1, "socket": 2}, "socket"),
    ],
)
def test_recording_that_contradicts_itself_is_said_to(
    killed: Killed, tmp_path: Path, window_ns: list[int] | None, cpu: dict[str, Any], why: str
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(killed[0], directory)
    run = json.loads((directory / "run.json").read_text())
    run["recording"]["cpu"].update(cpu)
    if window_ns is not None:
        run["recording"]["window_ns"] = window_ns
    (directory / "run.json").write_text(json.dumps(run))
    with pytest.raises(TraceError, match="contradicts itself") as refused:
        summarise(directory)
    assert why in refused.value.why and "report" in refused.value.fix


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("where", ["later", "recording"])
def test_a_number_that_is_not_finite_is_unknown_where_nothing_is_expected(
    killed: Killed, tmp_path: Path, where: str, number: str
) -> None:
    # it would be passed on, and a summary with it cannot be written
    directory = tmp_path / "run"
    shutil.copytree(killed[0], directory)
    run = json.loads((directory / "run.json").read_text())
    run.setdefault(where, {})["unknown"] = [{"x": "HERE"}]
    text = json.dumps(run).replace('"HERE"', number)
    (directory / "run.json").write_text(text)
    summary = summarise(directory)
    assert json.loads(json.dumps(summary, allow_nan=False))


# --- stores that take nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("obstacle", ["a file in its place", "no permission"])
def test_unwritable_store_is_said_and_the_run_is_kept_elsewhere(cli: Cli, obstacle: str) -> None:
    options: dict[str, Any] = {}
    if obstacle == "no permission":
        cli.store.mkdir(mode=0o555)
        options["preexec_fn"] = obey_permissions
    else:
        cli.store.write_text("")
    result = cli("-q", "--", "sh", "-c", "echo ran; exit 7", **options)
    assert (result.status, result.stdout) == (7, b"ran\n")
    assert "cannot be written" in result.stderr
    assert "--store" in result.stderr
    (fallback,) = cli.folder.glob("pepr-*")
    assert str(fallback) in result.stderr
    (run,) = cli.runs(fallback)
    summary = cli.report(run)
    assert (summary["complete"], summary["exit_code"]) == (True, 7)
    assert codes(summary) == {"store-unwritable"}


@pytest.fixture
def small_disk(cli: Cli) -> Iterator[Path]:
    """A file system of 256 KiB at the place of the store."""
    cli.store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "pepr-test", str(cli.store)]
    if shutil.which("mount") is None or subprocess.call(mount, stderr=subprocess.DEVNULL) != 0:
        pytest.skip("may not mount a file system here (not root, or a container)")
    yield cli.store
    subprocess.run(["umount", "--lazy", str(cli.store)], check=True)


FILL = """
import glob, os, sys, time
while not glob.glob(os.environ["PEPR_RUN_DIR"] + "/powercap.tail.arrows"): time.sleep(0.001)
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
def fill():
    for size in (4096, 1):
        try:
            while True: os.write(fd, b"x" * size)
        except OSError: pass
if sys.argv[2] == "full later": time.sleep(1.5)  # behind a flush
begin_s = time.monotonic()
while time.monotonic() - begin_s < 2.8:  # through two flushes
    fill()
    time.sleep(0.01)
os.ftruncate(fd, 0) if sys.argv[2] == "free" else None
time.sleep(0.8)
sys.exit(3)
"""


@pytest.mark.parametrize("then", ["free", "full", "full later"])
def test_full_disk_costs_neither_the_child_nor_the_counters_energy(
    cli: Cli, small_disk: Path, powercap_sim: BuildTree, then: str
) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(100)), live=True)
    child = python(FILL, str(small_disk / "filler"), then)
    written = ["--json", str(cli.folder / "summary.json")]
    result = cli(*written, "--period", "2ms", "--sensor", tree.spec, "--", *child)
    assert result.status == 3, result.stderr
    assert "cannot be written" in result.stderr
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr
    summary = json.loads((cli.folder / "summary.json").read_text())
    assert codes(summary) >= {"disk-full"}
    assert summary["duration_s"] >= 3.5
    assert summary["exit_code"] == 3
    begin_ns, end_ns = summary["recording"]["window_ns"]
    measured_j = component(summary, "cpu:package-0")["device_j"]
    assert measured_j == pytest.approx(tree.energy_j("intel-rapl:0", begin_ns, end_ns), abs=5)
    assert not codes(summary) & {"gap", "ended-early", "unwritten"}
    if then == "free":  # every row waited in memory
        assert summary["sampler"]["dropped"] == 0
    else:  # fewer rows of all the time have taken the place of those that were there
        assert summary["sampler"]["dropped"] > 500
        assert "rows-lost" in codes(summary)


@pytest.fixture
def freezable_disk(cli: Cli) -> Iterator[Path]:
    """A file system at the place of the store that can be frozen: who writes there, waits."""
    image = cli.folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    cli.store.mkdir()
    steps = (
        ["mkfs.ext4", "-q", str(image)],
        ["mount", "-o", "loop", str(image), str(cli.store)],
    )
    for step in steps:
        if shutil.which(step[0]) is None or subprocess.call(step, stderr=subprocess.DEVNULL) != 0:
            pytest.skip("may not make a file system here (not root, or a container)")
    yield cli.store
    subprocess.run(["umount", "--lazy", str(cli.store)], check=True)


FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # include/uapi/linux/fs.h

RECORDS_ITSELF = """
import sys, time
from pepr_profiler import profile
with profile("itself", store=sys.argv[1], sensors=(sys.argv[2],), period_s=0.01) as run:
    longest_s, last_s = 0.0, time.monotonic()
    until_s = last_s + 5.0
    print(flush=True)
    while last_s < until_s:
        time.sleep(0.001)
        longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
parts = {part["id"]: part for part in run.summary["energy"]["components"]}
print(longest_s, run.summary["sampler"]["dropped"], parts["cpu:package-0"]["device_j"])
print(*(warning["code"] for warning in run.summary["warnings"]))
"""


def test_a_disk_that_hangs_holds_up_neither_the_program_nor_the_sampling(
    freezable_disk: Path, powercap_sim: BuildTree
) -> None:
    # given a program that records itself, and a disk that takes nothing for 3 s meanwhile
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(100)), live=True)
    command = python(RECORDS_ITSELF, str(freezable_disk), tree.spec)
    disk = os.open(freezable_disk, os.O_RDONLY)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            program.stdout.readline()
            time.sleep(1.0)
            fcntl.ioctl(disk, FIFREEZE, 0)
            time.sleep(3.0)
            assert program.poll() is None
        finally:
            with contextlib.suppress(OSError):
                fcntl.ioctl(disk, FITHAW, 0)
            os.close(disk)
        figures, warnings = program.stdout.read().splitlines()
    # then it did not wait for it, and every row is there
    longest_s, dropped, package_j = map(float, figures.split())
    assert program.returncode == 0
    assert longest_s < 2.9
    assert dropped == 0
    assert not {"gap", "rows-lost"} & set(warnings.split())
    assert package_j == pytest.approx(500, abs=60)


def test_a_client_whose_disk_is_full_loses_no_energy_and_costs_the_daemon_nothing(
    cli: Cli, small_disk: Path, powercap_sim: BuildTree
) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(100)), live=True)
    child = python(FILL, str(small_disk / "filler"), "free")
    written = ["--json", str(cli.folder / "summary.json")]
    with open_place() as folder, daemon(folder, "--sensor", tree.spec, "--period", "2ms") as node:
        lock(tree)
        before = node.descriptors()
        result = cli(
            *written, "--sensor", tree.spec, "--", *child,
            env={"PEPR_DAEMON": str(node.socket)}, preexec_fn=obey_permissions,
        )  # fmt: skip
        assert result.status == 3, result.stderr
        until(lambda: node.status()["clients"] == 1)
        # It keeps one descriptor of the ring that it has handed out, whoever asks for it next.
        assert (node.descriptors(), node.status()["runs"]) == (before + 1, [])
        newest = node.lane("powercap")["samples"]
        until(lambda: node.lane("powercap")["samples"] > newest)
    summary = json.loads((cli.folder / "summary.json").read_text())
    assert codes(summary) >= {"disk-full"} and "gap" not in codes(summary)
    assert summary["recording"]["daemon"]["reconnects"] == 0
    begin_ns, end_ns = summary["recording"]["window_ns"]
    measured_j = component(summary, "cpu:package-0")["device_j"]
    assert measured_j == pytest.approx(tree.energy_j("intel-rapl:0", begin_ns, end_ns), abs=5)
