"""Files that somebody else made: nothing hangs, fills the memory, or writes where a link leads."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, Result, write_meter

from pepr_profiler.commands import write_text
from pepr_profiler.energy.hardware import read_hardware
from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.recording.metrics import Metrics
from pepr_profiler.report.export import encode
from pepr_profiler.store.facts import Facts
from pepr_profiler.store.index import IndexFile, _checksum, write_index
from pepr_profiler.store.runs import Store
from pepr_profiler.study.study import read_bounds
from pepr_profiler.study.table import TextTable
from pepr_profiler.trace.events import EventWriter, read_events
from pepr_profiler.trace.files import open_file, read_given_file
from pepr_profiler.trace.lane import LaneReader
from pepr_profiler.trace.run_json import read_run, write_json
from pepr_profiler.units import format_quantity

Plant = Callable[[Path], None]


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{(folder := os.open(path.parent, os.O_PATH))}/{path.name}")
        os.close(folder)


def plant_directory(path: Path) -> None:
    path.mkdir()


def plant_sparse_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 50 * 10**9)


def plant_link(path: Path) -> None:
    """A link to a device that never ends; an ordinary user can make no device."""
    path.symlink_to("/dev/zero")


KINDS: dict[str, Plant] = {
    "fifo": plant_fifo,
    "socket": plant_socket,
    "directory": plant_directory,
    "sparse": plant_sparse_file,
    "link": plant_link,
}
of_each_kind = pytest.mark.parametrize("plant", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was really recorded."""
    cli = Cli(tmp_path_factory.mktemp("recorded"))
    spec = write_meter(cli.folder / "m", 50)
    metric = ("--metric", "acc=acc ([0-9.]+)")
    cli.measure("--sensor", spec, "--name", "net", *metric, "--", "sh", "-c", "echo acc 0.5")
    return cli.runs()[0]


@pytest.fixture
def cli(tmp_path: Path, origin: Path) -> Cli:
    """A store with two copies of a run, `good-1` and `evil-1`."""
    cli = Cli(tmp_path)
    for name in ("good-1", "evil-1"):
        shutil.copytree(origin, cli.store / "runs" / name)
        run = json.loads((cli.store / "runs" / name / "run.json").read_text())
        write_json(cli.store / "runs" / name / "run.json", {**run, "run_id": name})
    return cli


@pytest.fixture
def evil(cli: Cli) -> Path:
    return cli.store / "runs" / "evil-1"


def ask(cli: Cli, *arguments: str) -> Result:
    """Within little time, and no more memory than a machine has to spare."""
    return cli(*arguments, bounds=(60, 4 << 30))


# --- read -----------------------------------------------------------------------------------------


@of_each_kind
def test_a_run_json_that_is_no_file_of_a_run_is_named_and_can_be_removed(
    cli: Cli, evil: Path, plant: Plant
) -> None:
    (evil / "run.json").unlink()
    plant(evil / "run.json")
    listed = ask(cli, "runs", "list")
    assert listed.status == 0, listed.stderr
    assert listed.stdout.startswith(b"good-1")
    assert b"evil-1" in listed.stdout and b"damaged" in listed.stdout
    for command in (("report",), ("runs", "show"), ("runs", "set")):
        refused = ask(cli, *command, "evil-1", *(("a=1",) if "set" in command else ()))
        assert refused.status in (2, 125), (command, refused.stderr)
        assert "run.json" in refused.stderr and "Traceback" not in refused.stderr
    assert ask(cli, "runs", "rm", "--yes", "--force", "evil-1").status == 0
    assert not evil.exists()


@of_each_kind
@pytest.mark.parametrize("name", ["replay.arrows", "replay.tail.arrows"])
def test_a_lane_that_is_no_file_is_an_error_that_names_it(
    cli: Cli, evil: Path, plant: Plant, name: str
) -> None:
    (evil / name).unlink(missing_ok=True)
    plant(evil / name)
    run = json.loads((evil / "run.json").read_text())
    write_json(evil / "run.json", {**run, "complete": False})
    refused = ask(cli, "report", "evil-1")
    assert refused.status == 125, refused.stderr
    assert name in refused.stderr and "Traceback" not in refused.stderr
    assert ask(cli, "runs", "list").status == 0


@of_each_kind
@pytest.mark.parametrize("stem", ["events", "processes"])
def test_events_and_notes_that_are_no_file_are_left_out_and_reported(
    cli: Cli, evil: Path, plant: Plant, stem: str
) -> None:
    plant(evil / f"{stem}-x-1.jsonl")
    result = ask(cli, "report", "--json", "-", "evil-1")
    assert result.status == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["metrics"] == {"acc": 0.5}  # the other files are read
    (warning,) = [w for w in summary["warnings"] if w["code"] == "unread-file"]
    assert f"{stem}-x-1.jsonl" in warning["text"]


def test_the_most_that_is_read_of_a_file_is_in_the_error(tmp_path: Path) -> None:
    plant_sparse_file(tmp_path / "run.json")
    with pytest.raises(PeprError, match=r"50,000,000,000 bytes; .* at most 33,554,432 are read"):
        read_run(tmp_path)


def test_a_message_that_claims_more_than_any_lane_has_is_not_read(
    origin: Path, tmp_path: Path
) -> None:
    """Its length fits the file, which is sparse."""
    shutil.copytree(origin, tmp_path / "run")
    lane = tmp_path / "run" / "replay.arrows"
    before = sum(batch.reads for batch in LaneReader(tmp_path / "run", "replay"))
    data = lane.read_bytes()
    second = data.index(b"\xff\xff\xff\xff", 8)
    head = data[: second + 8]
    lane.write_bytes(head[:-4] + (2**31 - 1).to_bytes(4, "little") + data[second + 8 :])
    os.truncate(lane, 5 << 30)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
        "from pathlib import Path; from pepr_profiler.trace.lane import LaneReader;"
        "print(sum(b.reads for b in LaneReader(Path(sys.argv[1]), 'replay')))"
    )
    result = Cli(tmp_path)(code, str(lane.parent), program=("-c",))
    assert result.status == 0, result.stderr
    assert int(result.stdout) < before


def test_a_line_of_events_without_end_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "events-x-1.jsonl"
    path.write_bytes(b'{"event":"metrics","t_ns":1,"metrics":{"a":1}}\n')
    os.truncate(path, 300 << 20)
    code = (
        "import resource, sys; from pathlib import Path;"
        "from pepr_profiler.trace.events import read_events;"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = used();"  # Linux counts the memory of the process that executed us too
        "e = read_events(Path(sys.argv[1]));"
        "print(len(e.metrics), e.torn_lines > 0,"
        " used() - before < 100_000)"
    )
    result = Cli(tmp_path)(code, str(tmp_path), program=("-c",))
    assert result.stdout.split() == [b"1", b"True", b"True"], result.stderr


@of_each_kind
def test_tables_ranges_and_hardware_files_are_refused_if_they_are_no_files(
    tmp_path: Path, plant: Plant
) -> None:
    for name in ("t.csv", "range.json", "hardware.json"):
        plant(tmp_path / name)
    with pytest.raises(UsageError):
        TextTable.read(tmp_path / "t.csv")
    with pytest.raises(UsageError):
        read_bounds(tmp_path / "range.json")
    assert read_hardware([tmp_path]).problems


@of_each_kind
def test_an_index_that_is_no_file_is_none(cli: Cli, plant: Plant) -> None:
    plant(cli.store / "index")
    listed = ask(cli, "runs", "list")
    assert listed.status == 0 and len(listed.stdout.splitlines()) == 2, listed.stderr


def test_an_index_whose_table_computes_for_ever_is_none(tmp_path: Path) -> None:
    path = tmp_path / "index"
    write_index(path, [])
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE run RENAME TO other")
        columns = ", ".join(f"n AS {name}" for name in (*Facts._fields, "summary"))
        endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
        database.execute(f"CREATE VIEW run AS {endless} SELECT {columns} FROM c")
        database.commit()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 16384 * 16384)
        file.write(_checksum(file, path.stat().st_size))  # type: ignore[arg-type]
    assert IndexFile.open(path) is None


def test_a_metric_file_may_be_a_link_and_a_table_a_pipe(tmp_path: Path) -> None:
    """Programs link their latest results; shells make pipes of `<(sort table)`. Users name both."""
    metrics = Metrics([], [f"{tmp_path}/latest.json:acc"])
    (tmp_path / "1.json").write_text('{"acc": 0.5}')
    (tmp_path / "latest.json").symlink_to("1.json")
    assert metrics.finish() == []
    assert [point.value for point in metrics.take()] == [0.5]
    reader, writer = os.pipe()
    os.write(writer, b"name,acc\nx,1\n")
    os.close(writer)
    table = TextTable.read(Path(f"/proc/self/fd/{reader}"))
    assert table.rows == [["x", "1"]]
    os.close(reader)


def test_a_fifo_that_nobody_writes_is_an_empty_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(UsageError, match="empty"):
        TextTable.read(tmp_path / "t.csv")


def test_a_pipe_is_read_in_bounds(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x" * 100)
    os.close(writer)
    with pytest.raises(OSError, match="at most 99 are read"):
        read_given_file(f"/proc/self/fd/{reader}", most_bytes=99)
    os.close(reader)
    (tmp_path / "f").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="at most 99 are read"):
        open_file(tmp_path / "f", most_bytes=99)


# --- written --------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "bashrc"
    path.write_text("alias ll='ls -l'\n")
    return path


def planted_everywhere(directory: Path, victim: Path, *, pids: range) -> None:
    """Links at each name that a writer of old would have used."""
    host = os.uname().nodename
    for pid in pids:
        for name in (f".run.json.{pid}.tmp", f"events-{host}-{pid}.jsonl", f".out.{pid}.tmp"):
            (directory / name).symlink_to(victim)


def test_a_received_run_makes_nothing_be_written_elsewhere(
    cli: Cli, evil: Path, victim: Path
) -> None:
    """`runs set` of a run whose directory has links in the way of its drafts and events."""
    before = victim.read_bytes()
    # given a command that waits until there are links with its PID
    when_told = "import os, sys; sys.stdin.readline(); os.execv(sys.executable, sys.orig_argv[:1]"
    when_told += " + ['-m', 'pepr_profiler', *sys.argv[1:]])"
    arguments = ("runs", "set", "evil-1", "acc=0.91")
    with cli.start(*arguments, program=("-c", when_told), stdin=subprocess.PIPE) as process:
        planted_everywhere(evil, victim, pids=range(process.pid, process.pid + 1))
        _, errors = process.communicate(b"\n", timeout=SLOW_S)
    assert victim.read_bytes() == before
    assert process.returncode == 125 and b"could not be written" in errors
    renamed = ask(cli, "runs", "set", "evil-1", "name=other")
    assert renamed.status == 0, renamed.stderr
    assert victim.read_bytes() == before
    assert read_run(evil)["name"] == "other"


def test_a_draft_is_made_anew_and_a_link_is_replaced(tmp_path: Path, victim: Path) -> None:
    before = victim.read_bytes()
    planted_everywhere(tmp_path, victim, pids=range(os.getpid(), os.getpid() + 1))
    (tmp_path / "run.json").symlink_to(victim)
    write_json(tmp_path / "run.json", {"schema": 1})
    write_text(tmp_path / "out", "text")
    assert victim.read_bytes() == before
    assert not (tmp_path / "run.json").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.is_symlink()) == [
        *("bashrc", "out", "run.json")
    ]


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
def test_events_go_into_no_file_that_somebody_else_chose(
    tmp_path: Path, victim: Path, kind: str
) -> None:
    path = tmp_path / f"events-{os.uname().nodename}-{os.getpid()}.jsonl"
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)
    else:
        os.mkfifo(path)
    before = victim.read_bytes()
    writer = EventWriter(tmp_path)
    writer.metrics({"a": 1.0})
    writer.close()
    assert writer.lost == 1
    assert victim.read_bytes() == before
    assert read_events(tmp_path).metrics == ()


def test_a_lane_is_not_written_through_a_link(tmp_path: Path, victim: Path, origin: Path) -> None:
    from pepr_profiler.trace.lane import LaneWriter

    lane = LaneReader(origin, "replay").lane
    (tmp_path / "replay.arrows").symlink_to(victim)
    before = victim.read_bytes()
    with pytest.raises(OSError):
        LaneWriter(tmp_path, lane)
    assert victim.read_bytes() == before


def test_an_index_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "draft").symlink_to(victim)
    before = victim.read_bytes()
    with pytest.raises(OSError):
        write_index(tmp_path / "draft", [])
    (tmp_path / "store" / "runs").mkdir(parents=True)
    (tmp_path / "store" / "index").symlink_to(victim)
    assert len(Store(tmp_path / "store").find()) == 0
    assert victim.read_bytes() == before


# --- whole ----------------------------------------------------------------------------------------


def test_a_finished_run_lists_its_files(origin: Path) -> None:
    listed = json.loads((origin / "run.json").read_text())["files"]
    kept = {path.name: path.read_bytes() for path in origin.iterdir() if path.name != "run.json"}
    assert listed == {
        name: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        for name, data in kept.items()
    }
    assert {"replay.arrows", "processes.arrows"} < listed.keys()


def lose(directory: Path) -> None:
    (directory / "replay.arrows").unlink()


def cut_short(directory: Path) -> None:
    os.truncate(directory / "replay.arrows", (directory / "replay.arrows").stat().st_size // 2)


def flip_a_bit(directory: Path) -> None:
    data = bytearray((directory / "replay.arrows").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "replay.arrows").write_bytes(data)


def mix_up(directory: Path) -> None:
    shutil.copy(directory / "processes.arrows", directory / "replay.arrows")


def add_one(directory: Path) -> None:
    shutil.copy(directory / "replay.arrows", directory / "second.arrows")


def lose_events(directory: Path) -> None:
    (path,) = directory.glob("events-*")
    path.unlink()


@pytest.mark.parametrize("spoil", [lose, cut_short, flip_a_bit, mix_up, add_one, lose_events])
def test_a_run_that_is_not_whole_is_an_error_with_both_figures(
    cli: Cli, evil: Path, spoil: Callable[[Path], None]
) -> None:
    before = json.loads((evil / "run.json").read_text())
    spoil(evil)
    for command in (("report",), ("report", "--json", "-"), ("report", "-o", "run.csv")):
        refused = cli(*command, "evil-1", cwd=cli.folder)
        assert refused.status == 125 and not refused.stdout, command
        message = " ".join(refused.stderr.split())
        stored = format_quantity(before["energy"]["total_j"], "J")
        assert f"run.json says {stored}, these files give" in message
        assert re.search(r"(replay|second|events-.*)\S* (is missing|has|was added)", message)
    # What is stored stays, and is what lists and comparisons show.
    assert cli("runs", "set", "evil-1", "name=x").status == 125
    assert json.loads((evil / "run.json").read_text()) == before
    assert cli("runs", "show", "evil-1").status == 0


def test_setting_a_metric_keeps_the_list_true(cli: Cli, evil: Path) -> None:
    for value in ("acc=0.6", "acc=0.7", "name=other"):
        assert cli("runs", "set", "evil-1", value).status == 0
        assert cli.report("evil-1")["name"] in ("net", "other")
    assert cli.report("evil-1")["metrics"] == {"acc": 0.7}
    listed = json.loads((evil / "run.json").read_text())["files"]
    assert sum(name.startswith("events-") for name in listed) == 3


def test_a_program_that_outlives_its_run_may_add_events(cli: Cli, evil: Path) -> None:
    (path,) = evil.glob("events-*")
    with path.open("a") as file:
        file.write('{"event":"metrics","t_ns":1,"metrics":{"late":1}}\n')
    (evil / "events-later-1.jsonl").write_text("")
    assert cli.report("evil-1")["metrics"]["acc"] == 0.5


def test_a_run_of_old_without_the_list_is_read_as_before(cli: Cli, evil: Path) -> None:
    run = json.loads((evil / "run.json").read_text())
    del run["files"]
    write_json(evil / "run.json", run)
    lose(evil)
    assert cli.report("evil-1")["energy"]["total_j"] != run["energy"]["total_j"]
    assert cli("runs", "set", "evil-1", "acc=1").status == 0
    assert "files" not in json.loads((evil / "run.json").read_text())


@pytest.mark.parametrize("name", ["replay.arrows", "replay.tail.arrows"])
def test_another_lane_in_a_file_is_an_error_in_an_unfinished_run(
    cli: Cli, evil: Path, name: str
) -> None:
    run = json.loads((evil / "run.json").read_text())
    del run["files"]
    write_json(evil / "run.json", {**run, "complete": False})
    shutil.copy(evil / "processes.arrows", evil / name)
    refused = cli("report", "evil-1")
    assert refused.status == 125 and "holds another lane" in refused.stderr


# --- shown ----------------------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eevil\x1b[0m\nline"


def hostile(value: Any, key: str = "") -> Any:
    """A JSON value of the same shape, each text of which ends in escape sequences."""
    if isinstance(value, dict):
        own = key in ("metrics", "rate_hz", "refresh_s", "wasted")  # whose keys are the run's
        return {k + ESCAPES * own: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(item, key) for item in value]
    fixed = ("started_at", "kind", "crc32", "boot_id", "root", "performance", "scope")
    return value + ESCAPES if isinstance(value, str) and key not in fixed else value


@pytest.fixture
def cursed(cli: Cli) -> Cli:
    """Two runs all of whose texts have escape sequences, and a directory with them in its name."""
    for run_id, total_j in (("evil-1", 10.0), ("good-1", 20.0)):
        directory = cli.store / "runs" / run_id
        run = json.loads((directory / "run.json").read_text())
        run["experiment"], run["name"] = "sizes", run_id
        run["energy"]["total_j"] = total_j
        run["warnings"] += [{"code": "x", "text": "a warning", "hint": "a hint"}]
        run["missing"] += [{"what": "no psu", "why": "no sensor", "fix": "none"}]
        figures = {"count": 1, "duration_s": 1.0, "energy_j": 1.0, "u_j": 0.1}
        run["phases"] += [{"name": "train", **figures}]
        run = hostile(run)
        run["performance"] = {"metric": "acc" + ESCAPES, "value": 0.5}
        write_json(directory / "run.json", run)
    (cli.store / "runs" / f"bad{ESCAPES}").mkdir()
    (cli.store / "runs" / f"bad{ESCAPES}" / "run.json").write_text("{")
    (cli.folder / "t.csv").write_text(
        f"name{ESCAPES[:-5]},acc,kwh\na{ESCAPES[:-5]},0.5,1\nb,0.6,2\n"
    )
    return cli


def assert_harmless(data: bytes | str) -> None:
    text = data if isinstance(data, str) else data.decode()
    bad = sorted({c for c in text if not c.isprintable() and c != "\n"})
    assert not bad, (bad, text)


COMMANDS = (
    ("runs", "list"),
    ("runs", "list", "--json"),
    ("runs", "show", "evil-1"),
    ("runs", "show", "evil-1", "--json"),
    ("runs", "show", "bad"),
    ("runs", "export", "-", "--format", "csv"),
    ("runs", "export", "-", "--format", "json"),
    ("runs", "set", "evil-1", f"name={ESCAPES}"),
    ("runs", "set", "evil-1", f"a{ESCAPES}=x"),
    ("runs", "rm", "bad"),
    ("report", "evil-1"),
    ("report", "evil-1", "--json", "-"),
    ("report", "evil-1", "--metric", f"none{ESCAPES}"),
    ("report", "bad"),
    ("report", f"none{ESCAPES}"),
    ("report", f"--none{ESCAPES}"),
    ("compare",),
    ("compare", "--resource", "energy,time"),
    ("compare", "--json", "-"),
    ("compare", "evil-1", f"none{ESCAPES}"),
    ("score", "t.csv", "--performance", "acc", "--resource", "kwh"),
    ("score", "t.csv", "--performance", f"x{ESCAPES}", "--resource", "kwh"),
    ("score", f"none{ESCAPES}", "--performance", "acc", "--resource", "kwh"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: repr(" ".join(command))[:40])
def test_no_text_of_a_foreign_run_reaches_the_terminal_as_it_is(
    cursed: Cli, command: tuple[str, ...]
) -> None:
    result = cursed(*command, cwd=cursed.folder)
    assert result.stdout or result.stderr
    assert "Traceback" not in result.stderr
    assert_harmless(result.stdout)
    assert_harmless(result.stderr)


@pytest.mark.parametrize("command", [("report", "evil-1"), ("compare",)], ids=" ".join)
def test_in_colour_only_our_own_styles_are_escapes(cursed: Cli, command: tuple[str, ...]) -> None:
    result = cursed(*command, env={"FORCE_COLOR": "1"})
    assert result.status == 0, result.stderr
    assert b"\x1b[1m" in result.stdout
    assert_harmless(re.sub(r"\x1b\[[0-9;]*m", "", result.stdout.decode()))
    assert b"\x1b[0mline" not in result.stdout


def test_a_line_end_in_a_name_makes_no_message_of_its_own(cli: Cli) -> None:
    forged = "x\npepr-profile: all is well"
    result = cli("report", forged)
    assert [line for line in result.stderr.splitlines() if line.startswith("pepr")] == [
        "pepr-profile: there is no run 'x"
    ]


FORMULAS = ("=cmd|' /C calc'!A0", "+1+cmd", "-1+cmd", "@SUM(1)", "\t=1", "\r=1", " =1", "＝1+1")


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_cell_of_a_csv_file_is_a_formula(cli: Cli, evil: Path, formula: str) -> None:
    run = json.loads((evil / "run.json").read_text())
    name, phase = formula + "\x1b[2J", {"name": formula, "count": 1, "duration_s": 1.0}
    phases = [{**phase, "energy_j": -1.5, "u_j": 0.1}]
    energy = {**run["energy"], "total_j": 99.0}  # of a cohort of equals there is no ranking
    facts = {"name": name, "experiment": formula, "phases": phases, "energy": energy}
    write_json(evil / "run.json", {**run, **facts})
    commands = {
        "runs.csv": ("runs", "export", "runs.csv"),
        "study.csv": ("compare", "-o", "study.csv", "--group", "none"),
    }
    for file, command in commands.items():
        for raw in ((), ("--raw-csv",)):
            result = cli(*command, *raw, cwd=cli.folder)
            assert result.status == 0, result.stderr
            text = (cli.folder / file).read_bytes().decode()
            cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
            found = [cell for cell in cells if formula.strip() in cell.replace("\\r", "")]
            assert found, text
            if raw:
                assert any(cell.startswith(formula.strip("\r")) for cell in found)
            else:
                assert "\x1b" not in text
                assert not [cell for cell in found if cell.strip()[:1] in "=+-@＝"]


def test_numbers_of_a_csv_file_stay_numbers() -> None:
    rows = [{"name": "-5", "energy_j": -5.5, "n": 3, "unknown": None, "dash": "-", "ok": True}]
    assert encode(rows, "csv") == b"name,energy_j,n,unknown,dash,ok\n-5,-5.5,3,,-,True\n"
    assert encode([{"=x": "=1"}], "csv") == b"'=x\n'=1\n"
    assert encode([{"=x": "=1"}], "csv", raw_csv=True) == b"=x\n=1\n"


def test_a_table_with_its_scores_has_no_formula_of_somebody_else(cli: Cli) -> None:
    table = "name,acc,kwh\n=1+1,0.5,1\n-2,0.6,2\n\x1b[2J,0.7,3\n"
    (cli.folder / "t.csv").write_text(table)
    score = ("score", "t.csv", "--performance", "acc", "--resource", "kwh", "-o", "s.csv")
    for raw, expected in (
        ((), ["'=1+1", "-2", r"\x1b[2J"]),
        (("--raw-csv",), ["=1+1", "-2", "\x1b[2J"]),
    ):
        assert cli(*score, *raw, cwd=cli.folder).status == 0
        lines = (cli.folder / "s.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == expected
