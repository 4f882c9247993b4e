"""The store: runs are listed as their directories are, whatever the index holds."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, python, write_meter
from sim.permissions import obey_permissions

from pepr_profiler.errors import TraceError, UsageError
from pepr_profiler.store.facts import Facts
from pepr_profiler.store.index import Filter, IndexFile, _map, write_index
from pepr_profiler.store.runs import Store

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was really recorded."""
    cli = Cli(tmp_path_factory.mktemp("recorded"))
    spec = write_meter(cli.folder / "m", 50)
    cli.measure("--sensor", spec, "--name", "net", "--", "sleep", "0.2")
    return cli.runs()[0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def make(store: Store, recorded: Path) -> Make:
    """Puts a copy of the recorded run into the store, with facts of its own."""

    def copy(name: str, /, **facts: Any) -> Path:
        directory = store.runs_path / name
        shutil.copytree(recorded, directory)
        change(directory, **{"run_id": name, **facts})
        return directory

    return copy


def change(directory: Path, **facts: Any) -> None:
    """Changes a run.json as another program would: a new file in place of the old one."""
    path = directory / "run.json"
    run = {**json.loads(path.read_text()), **facts}
    draft = directory / "draft"
    draft.write_text(json.dumps(run))
    draft.replace(path)


def began(day: int) -> str:
    return f"2026-01-{day:02d}T00:00:00.000+00:00"


LIST = "import sys; from pathlib import Path; from pepr_profiler.store.runs import Store; "


def output_of(program: str, *arguments: Any, **options: Any) -> str:
    """What a program in a process of its own prints."""
    command, root = python(program, *map(str, arguments)), Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, **options)
    return done.stdout


# --- the index ------------------------------------------------------------------------------------


def test_index_holds_what_the_runs_do(store: Store, make: Make) -> None:
    for day in range(1, 6):
        make(f"net-{day}", started_at=began(day), metrics={"accuracy": day / 10})
    fresh = list(store.find())
    assert store.index_path.exists()
    assert list(store.find()) == fresh
    # truth: the files themselves, without our reader
    for run in fresh:
        written = json.loads((store.runs_path / run["run_id"] / "run.json").read_text())
        for key in set(run) - {"energy"}:
            assert run[key] == written[key], key
        assert run["energy"]["total_j"] == written["energy"]["total_j"]
        added = [c for c in written["energy"]["components"] if c["in_total"]]
        assert [c["id"] for c in run["energy"]["components"]] == [c["id"] for c in added]
        for component, whole in zip(run["energy"]["components"], added, strict=True):
            assert component["job_j"] == whole["job_j"]
            assert component["budget"].items() <= whole["budget"].items()
            # what a comparison needs of it: what is fixed for the device
            assert {"gain_j", "offset_j", "model_j"} <= component["budget"].keys()


def test_new_changed_and_removed_runs_are_seen_at_once(store: Store, make: Make) -> None:
    a, b = make("a-1", started_at=began(1)), make("b-1", started_at=began(2))
    assert store.find().ids == ["a-1", "b-1"]
    change(a, name="other")
    shutil.rmtree(b)
    make("c-1", started_at=began(3))
    found = store.find()
    assert [(run["run_id"], run["name"]) for run in found] == [("a-1", "other"), ("c-1", "net")]


def test_change_that_leaves_size_and_time_as_they_were_is_seen(store: Store, make: Make) -> None:
    a = make("a-1", name="one")
    before = (a / "run.json").stat()
    assert [run["name"] for run in store.find()] == ["one"]
    change(a, name="two")
    os.utime(a / "run.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (a / "run.json").stat().st_size == before.st_size
    assert [run["name"] for run in store.find()] == ["two"]


def test_rows_have_of_each_run_what_its_summary_has(store: Store, make: Make) -> None:
    # given a run with a performance, one that failed and one of which nothing is known
    make("good", started_at=began(1), performance={"metric": "accuracy", "value": 0.5})
    make("bad", started_at=began(2), exit_code=3)
    unknown = {"total_j": None, "u_j": None, "mean_w": None, "provenance": None, "components": []}
    make("blind", started_at=began(3), exit_code=None, energy=unknown)
    for _ in ("read", "from the index"):
        # when all are found
        found = store.find()
        # then a row is the same in short
        for row, run in zip(found.rows, found, strict=True):
            energy, performance = run["energy"], run["performance"]
            assert (row.run_id, row.started_at) == (run["run_id"], run["started_at"])
            assert (row.duration_s, row.exit_code, row.total_j, row.u_j, row.performance) == (
                *(run["duration_s"], run["exit_code"], energy["total_j"], energy["u_j"]),
                performance and performance["value"],
            )
            assert row.metric == (performance and performance["metric"])
        assert [row.state for row in found.rows] == ["done", "failed", "done"]
    assert store.index_path.exists()


def test_index_of_many_is_not_written_again_for_a_single_new_run(store: Store, make: Make) -> None:
    for number in range(101):
        directory = store.runs_path / f"n-{number}"
        if number == 0:
            make("n-0")
            continue
        directory.mkdir()
        shutil.copy(store.runs_path / "n-0" / "run.json", directory)
        change(directory, run_id=directory.name, started_at=began(1 + number % 28))
    assert len(store.find()) == 101
    written = store.index_path.stat().st_ino
    make("late-1")
    assert len(store.find()) == 102
    assert store.index_path.stat().st_ino == written
    make("late-2")
    assert len(store.find()) == 103
    assert store.index_path.stat().st_ino != written


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b'{"form":1}',
        b'{"form":1,"rows":[[1]]}\nnull',
        b'{"form":2,"rows":[]}',
        b'{"form":1,"rows":[["a-1",[0,0,0]]]}',
        b"[]",
    ],
)
def test_damaged_index_costs_nothing_but_time(store: Store, make: Make, content: bytes) -> None:
    make("a-1")
    store.find()
    store.index_path.write_bytes(content)
    assert store.find().ids == ["a-1"]
    store.index_path.unlink()
    store.index_path.mkdir()  # nor can it be written
    assert store.find().ids == ["a-1"]
    assert sorted(path.name for path in store.path.iterdir()) == ["index", "runs"]


@pytest.mark.parametrize("spoil", ["cut", "longer", "flip", "none"])
def test_torn_index_is_no_index(store: Store, make: Make, spoil: str) -> None:
    # given an index of two runs, of which one byte too few, too many or wrong was written
    make("a-1", started_at=began(1), name="one")
    make("b-1", started_at=began(2), name="two")
    store.find()
    whole = store.index_path.read_bytes()
    at = whole.index(b"two")  # among the names
    spoilt = {
        "cut": whole[:-1],
        "longer": whole + b" ",
        "flip": whole[:at] + b"T" + whole[at + 1 :],
        "none": whole,
    }
    store.index_path.write_bytes(spoilt[spoil])
    # then what is listed is what the runs say, and the index is as it was
    assert [row.run_id for row in store.find().rows] == ["a-1", "b-1"]
    assert store.find(Filter(name="two")).ids == ["b-1"]
    assert store.index_path.read_bytes() == whole


def test_what_was_found_can_be_read_though_the_index_is_replaced_or_gone(
    store: Store, make: Make
) -> None:
    for day in range(1, 4):
        make(f"n-{day}", started_at=began(day), metrics={"accuracy": day / 10})
    store.find()
    found, again = store.find(), store.find()
    # when another writer puts an index of other runs in its place
    make("late", started_at=began(9))
    store.find()
    assert [run["metrics"]["accuracy"] for run in found] == [0.1, 0.2, 0.3]
    # and when a file server loses the old one: here it is emptied where it lies
    last = store.find()
    os.truncate(store.index_path, 0)
    assert [run["run_id"] for run in last] == ["n-1", "n-2", "n-3", "late"]
    assert last[1]["metrics"] == {"accuracy": 0.2}
    # but a run that has gone too is named
    shutil.rmtree(store.runs_path / "n-2")
    with pytest.raises(TraceError, match="n-2 cannot be read any more"):
        last[1]
    assert again[-1]["run_id"] == "n-3" and [run["run_id"] for run in again[1:]] == ["n-2", "n-3"]


def random_facts(number: int) -> Facts:
    """Facts of a run, any of them unknown, or of odd characters."""
    draw = random.Random(number)
    texts = (None, "", "x", "\U0001f50b\n\0", f"own-{number}")
    numbers = (None, 0.0, -1e300, math.inf, draw.random())
    odd = {
        name: draw.choice(numbers if annotation.startswith("float") else texts)
        for name, annotation in Facts.__annotations__.items()
    }
    return Facts._make({**odd, "run_id": f"run-{number}"}.values())


def test_index_gives_back_what_was_written(tmp_path: Path) -> None:
    # given the facts of 60 runs and a summary of each
    facts = [random_facts(number) for number in range(60)]
    summaries = [json.dumps("\U0001f50b\n" * number) for number in range(60)]
    # when
    write_index(tmp_path / "a ?#%b", zip(facts, summaries, strict=True))
    saved = IndexFile.open(tmp_path / "a ?#%b")
    # then
    assert saved is not None and saved.rows == facts
    assert [saved.summary(fact.run_id) for fact in facts] == summaries
    with pytest.raises(OSError, match="nothing of another"):
        saved.summary("another")


def test_index_of_nothing_is_one(tmp_path: Path) -> None:
    write_index(tmp_path / "index", [])
    saved = IndexFile.open(tmp_path / "index")
    assert saved is not None and saved.rows == []


def test_index_is_a_database_that_anybody_can_query(store: Store, make: Make) -> None:
    make("a-1", experiment="e", started_at=began(1))
    make("b-1", experiment="e", started_at=began(2))
    energies_j = [run["energy"]["total_j"] for run in store.find()]
    with closing(sqlite3.connect(store.index_path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        query = "SELECT experiment, count(*), sum(total_j) FROM run GROUP BY experiment"
        assert database.execute(query).fetchall() == [("e", 2, pytest.approx(sum(energies_j)))]


def test_index_of_another_format_is_replaced(store: Store, make: Make) -> None:
    # given indexes that are whole, but of a later version, and of an unknown program
    make("a-1")
    store.find()
    own = store.index_path.read_bytes()
    for change_it in ("PRAGMA user_version = 1000", "ALTER TABLE run RENAME TO other"):
        store.index_path.write_bytes(own)
        with closing(sqlite3.connect(store.index_path)) as database:
            database.execute(change_it)
        content = store.index_path.read_bytes()
        store.index_path.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
        # then
        assert store.find().ids == ["a-1"]
        assert IndexFile.open(store.index_path) is not None


def test_index_of_the_version_before_is_replaced(store: Store, make: Make) -> None:
    # given the index that version 0.1.0 wrote of two runs, of which the store has one as it was
    make("old-1", name="new")
    shutil.copy(Path(__file__).parent / "data" / "index-format-5", store.index_path)
    before = store.index_path.read_bytes()
    assert b"old-2" in before
    # then what is listed is what the run says, and the index is of this version
    assert [(run["run_id"], run["name"]) for run in store.find()] == [("old-1", "new")]
    assert store.index_path.read_bytes() != before
    assert [(run["run_id"], run["name"]) for run in store.find()] == [("old-1", "new")]


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "device", "dangling", "loop"])
def test_index_that_is_no_file_is_none(store: Store, make: Make, kind: str) -> None:
    make("a-1")
    index = store.index_path
    if kind == "folder":
        (index / "inside").mkdir(parents=True)
    elif kind == "fifo":
        os.mkfifo(index)
    elif kind == "socket":
        with closing(socket.socket(socket.AF_UNIX)) as bound:
            bound.bind(os.path.relpath(index))
    else:
        index.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": "index"}[kind])
    for _ in range(2):
        assert store.find().ids == ["a-1"]


def test_index_that_somebody_has_locked_is_read_and_replaced(store: Store, make: Make) -> None:
    make("a-1", started_at=began(1))
    store.find()
    with store.index_path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # which holds for other processes
        program = LIST + (
            "from pepr_profiler.store.index import IndexFile; store = Store(Path(sys.argv[1]))\n"
            "print(len(IndexFile.open(store.index_path).rows), len(store.find()))"
        )
        assert output_of(program, store.path) == "1 1\n"
        make("b-1", started_at=began(2))
        assert output_of(program, store.path) == "1 2\n"
    assert output_of(program, store.path) == "2 2\n"


def test_python_without_sqlite_lists_the_same(store: Store, make: Make) -> None:
    make("a-1", started_at=began(1))
    make("b-1", started_at=began(2), metrics={"accuracy": 0.5})
    with_index = [list(store.find()) for _ in range(2)][1]
    store.index_path.unlink()
    program = "import sys; sys.modules['sqlite3'] = None; import json; " + LIST
    program += "print(json.dumps(list(Store(Path(sys.argv[1])).find())))"
    assert json.loads(output_of(program, store.path)) == with_index
    assert sorted(path.name for path in store.path.iterdir()) == ["runs"]


def test_store_that_may_only_be_read_is_listed(store: Store, make: Make) -> None:
    make("a-1")
    store.path.chmod(0o555)
    program = LIST + "print(Store(Path(sys.argv[1])).find().ids)"
    listed = output_of(program, store.path, preexec_fn=obey_permissions)
    store.path.chmod(0o755)
    assert listed == "['a-1']\n"
    assert not store.index_path.exists()


WRITE = LIST + (
    "store = Store(Path(sys.argv[1]));\n"
    "for _ in range(20):\n"
    "    store.index_path.unlink(missing_ok=True)\n"
    "    assert len(store.find()) == 8, store.find().ids\n"
)


def test_writers_at_once_never_see_less_than_there_is(store: Store, make: Make) -> None:
    for number in range(8):
        make(f"n-{number}", started_at=began(1 + number))
    command = python(WRITE, str(store.path))
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert [path.name for path in store.path.iterdir() if path.name[0] == "."] == []
    assert len(store.find()) == 8


def test_draft_of_a_killed_writer_is_swept_up_when_it_is_old(store: Store, make: Make) -> None:
    make("a-1")
    old, young = store.path / ".index-host-1-aa.tmp", store.path / ".index-host-2-bb.tmp"
    for draft in (old, young):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.find()
    assert (old.exists(), young.exists()) == (False, True)


def test_calls_that_wait_as_over_a_network_are_done_side_by_side_and_in_order() -> None:
    names = [str(number) for number in range(64 + 4 * 64)]
    together = threading.Barrier(4)

    def slow(name: str) -> str:
        if int(name) < 64:
            threading.Event().wait(0.001)  # a file server's answer
        elif int(name) % 64 == 0:
            together.wait(60)  # passes only where four are under way at once
        return name * 2

    assert list(_map(slow, names)) == [name * 2 for name in names]
    assert list(_map(str.upper, ["a", "b"])) == ["A", "B"]


# --- filters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ({}, ["a-1", "b-1", "c-1", "d-1"]),
        ({"experiment": "e"}, ["a-1", "b-1"]),
        ({"name": "res*"}, ["b-1", "c-1"]),
        ({"name": "res[!n]*"}, []),
        ({"host": "node1?"}, ["a-1", "d-1"]),
        ({"since": began(2)}, ["b-1", "c-1", "d-1"]),
        ({"until": began(2)}, ["a-1"]),
        ({"since": began(2), "until": began(3)}, ["b-1"]),
        ({"state": "failed"}, ["c-1"]),
        ({"state": "incomplete"}, ["d-1"]),
        ({"state": "done", "experiment": "e", "name": "resnet"}, ["b-1"]),
        ({"provenance": "modelled"}, []),
    ],
    ids=str,
)
def test_filters_pick_what_they_say(
    store: Store, make: Make, wanted: dict[str, str], ids: list[str]
) -> None:
    make("a-1", name="cnn", experiment="e", host="node10", started_at=began(1))
    make("b-1", name="resnet", experiment="e", host="node20", started_at=began(2))
    make("c-1", name="resnext", experiment="f", host="node2", started_at=began(3), exit_code=1)
    make("d-1", name="vit", experiment=None, host="node11", started_at=began(4), complete=False)
    for _ in ("read", "from the index"):
        assert store.find(Filter(**wanted)).ids == ids


# --- runs from elsewhere --------------------------------------------------------------------------


def test_copied_run_just_works_and_is_called_what_its_directory_is(
    store: Store, make: Make, recorded: Path
) -> None:
    make("a-1")
    shutil.copytree(recorded, store.runs_path / "from-afar")
    (run,) = [run for run in store.find() if run["run_id"] == "from-afar"]
    assert store.load("from-a")["run_id"] == "from-afar"
    assert run["energy"]["total_j"] == store.load("from-afar")["energy"]["total_j"]


def test_a_run_that_does_not_say_how_it_ended_is_incomplete(tmp_path: Path, recorded: Path) -> None:
    # given a recording whose run.json lost its end: make fuzz found that `runs show` failed
    cli = Cli(tmp_path)
    copy = cli.store / "runs" / "cut-1"
    shutil.copytree(recorded, copy)
    run = json.loads((copy / "run.json").read_text())
    del run["complete"], run["exit_code"]
    (copy / "run.json").write_text(json.dumps(run))
    shown = cli("runs", "show", "cut-1")
    assert (shown.status, b"incomplete" in shown.stdout) == (0, True), shown.stderr
    assert [row.state for row in Store(cli.store).find().rows] == ["incomplete"]


def test_odd_numbers_and_missing_words_of_a_run_json_end_no_list(
    tmp_path: Path, recorded: Path
) -> None:
    # given what make fuzz found: NaN under an unknown key, no source of the carbon, no id
    cli = Cli(tmp_path)
    copy = cli.store / "runs" / "odd-1"
    shutil.copytree(recorded, copy)
    run = json.loads((copy / "run.json").read_text())
    run["carbon"] = {"g_co2e": 5.0}
    run["energy"]["components"][0]["unknown"] = float("nan")
    del run["run_id"]
    (copy / "run.json").write_text(json.dumps(run))
    for verb in (("list",), ("list",), ("show", "odd-1")):
        result = cli("runs", *verb)
        assert result.status == 0 and "Traceback" not in result.stderr, result.stderr
    assert cli("report", "odd-1").status == 0
    assert json.dumps(list(Store(cli.store).find()), allow_nan=False)


def test_what_cannot_be_read_is_named_with_its_reason(store: Store, make: Make) -> None:
    make("good-1")
    make("again-1", run_id="good-1")
    change(make("newer-1"), schema=2)
    (make("torn-1") / "run.json").write_text('{"schema": 1,')
    (make("bare-1") / "run.json").unlink()
    change(make("odd-1"), energy={"total_j": "much"})
    (make("list-1") / "run.json").write_text("[1]")
    (make("deep-1") / "run.json").write_text("[" * 100_000)
    (store.runs_path / "empty-1").mkdir()  # one that is being made
    (store.runs_path / "note.txt").write_text("no run")
    for _ in ("read", "from the index"):
        found = store.find()
        assert found.ids == ["good-1"]
        why = {bad.run_id: bad.why for bad in found.damaged}
        assert list(why) == sorted(
            ["again-1", "bare-1", "deep-1", "list-1", "newer-1", "odd-1", "torn-1"]
        )
        assert "good-1" in why["again-1"]
        assert "schema 2" in why["newer-1"]
        assert "no run.json" in why["bare-1"]
        assert "not a summary" in why["odd-1"]
        assert all(bad.fix for bad in found.damaged)
    # and one that is repaired is a run again
    shutil.copy(store.runs_path / "good-1" / "run.json", store.runs_path / "torn-1")
    change(store.runs_path / "torn-1", run_id="torn-1", host="elsewhere")
    assert set(store.find().ids) == {"good-1", "torn-1"}


def test_copy_is_named_only_where_it_would_have_counted(store: Store, make: Make) -> None:
    make("net-1", experiment="e")
    make("again-1", run_id="net-1", experiment="e")
    make("other-1", experiment="f", started_at=began(1))
    for _ in ("read", "from the index"):
        assert [bad.run_id for bad in store.find(Filter(experiment="e")).damaged] == ["again-1"]
        assert store.find(Filter(experiment="f")).damaged == ()


def test_original_is_the_run_whatever_its_copy_is_called(store: Store, make: Make) -> None:
    for copy in ("a-copy", "z-copy"):
        make(copy, run_id="net-1")
    make("net-1")
    found = store.find()
    assert found.ids == ["net-1"]
    assert [bad.run_id for bad in found.damaged] == ["a-copy", "z-copy"]


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "../../etc", "n" * 10_000, "🔋\n\x1b[2J", "\udcff"]
)
def test_hostile_names_are_names(store: Store, make: Make, name: str) -> None:
    make("a-1", name=name, experiment=name, host=name)
    store.find()
    (run,) = store.find()
    kept = name.encode("utf-8", "replace").decode()
    assert (run["name"], run["experiment"]) in {(name, name), (kept, kept)}


def test_directory_name_that_is_no_text_is_listed(store: Store, make: Make) -> None:
    make("a-1")
    os.rename(store.runs_path / "a-1", os.fsencode(store.runs_path) + b"/\xff-1")  # noqa: PTH104
    for _ in range(2):
        assert len(store.find()) == 1


def test_unfinished_run_is_read_again_when_it_has_grown(store: Store, make: Make) -> None:
    directory = make("a-1", complete=False)
    assert next(iter(store.find()))["metrics"] == {}
    begin_ns = json.loads((directory / "run.json").read_text())["recording"]["window_ns"][0]
    line = {"event": "metrics", "t_ns": begin_ns + 1, "metrics": {"accuracy": 0.5}}
    (directory / "events-host-1.jsonl").write_text(json.dumps(line) + "\n")
    assert next(iter(store.find()))["metrics"] == {"accuracy": 0.5}


# --- by name --------------------------------------------------------------------------------------


def test_run_is_found_by_id_prefix_path_and_as_the_last(store: Store, make: Make) -> None:
    a, b = make("net-1", started_at=began(2)), make("net-12", started_at=began(1))
    assert store.directory("net-1") == a  # an id, though another begins with it
    assert store.directory("net-12") == b
    assert store.directory(str(a)) == a
    assert store.directory("last") == a
    for ref in ("net", "", "..", "../runs", "net-3", "a\0b"):
        with pytest.raises(UsageError, match=r"ambiguous|no run"):
            store.directory(ref)


def test_last_of_an_empty_store_is_none(store: Store) -> None:
    with pytest.raises(UsageError, match="no run 'last'"):
        store.directory("last")


# --- removing -------------------------------------------------------------------------------------


def test_removed_run_is_gone_and_nothing_else_is(store: Store, make: Make) -> None:
    make("a-1")
    make("b-1")
    store.remove(store.removable("a-1"))
    assert store.find().ids == ["b-1"]
    assert [path.name for path in store.runs_path.iterdir()] == ["b-1"]


def test_nothing_outside_the_store_can_be_removed(
    store: Store, make: Make, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a-1")
    (store.path / "outside").mkdir()
    shutil.copy(recorded / "run.json", store.path / "outside" / "run.json")
    shutil.copy(recorded / "run.json", store.runs_path / "run.json")  # runs/ itself looks like one
    monkeypatch.chdir(store.runs_path)
    for ref in (str(recorded), "../outside", "../../store/outside", ".", "a-1/..", "..", "/"):
        with pytest.raises(UsageError):
            store.remove(store.removable(ref))
    assert (store.path / "outside" / "run.json").exists()
    assert (store.runs_path / "a-1" / "run.json").exists()
    assert recorded.is_dir()


def test_of_a_linked_run_only_the_link_is_removed(store: Store, recorded: Path) -> None:
    store.runs_path.mkdir(parents=True)
    (store.runs_path / "linked-1").symlink_to(recorded)
    assert store.find().ids == ["linked-1"]
    store.remove(store.removable("linked-1"))
    assert list(store.runs_path.iterdir()) == []
    assert (recorded / "run.json").exists()


def test_run_that_may_still_be_recorded_is_removed_only_by_force(store: Store, make: Make) -> None:
    # its recorder is this very process
    facts = json.loads((make("gone-1") / "run.json").read_text())
    own = {**facts["recording"], "profiler_pid": os.getpid()}
    live = make("live-1", complete=False, recording=own)
    # one of another machine, that changed just now, and one that nobody has touched for an hour
    make("afar-1", complete=False, boot_id="another")
    old = make("old-1", complete=False, boot_id="another")
    for path in [live, old, *live.iterdir(), *old.iterdir()]:
        os.utime(path, (1e9, 1e9))
    for ref in ("live-1", "afar-1"):
        with pytest.raises(UsageError, match="may still be recorded"):
            store.removable(ref)
        assert store.removable(ref, force=True).is_dir()
    store.remove(store.removable("old-1"))
    with pytest.raises(UsageError, match="may still be recorded"):
        store.set("live-1", facts={"name": "x"})


# --- changing -------------------------------------------------------------------------------------


def test_name_and_experiment_are_changed_and_the_rest_is_not(store: Store, make: Make) -> None:
    make("a-1")
    before = store.load("a-1")
    store.find()
    store.set("a-1", facts={"name": "better", "experiment": "late"})
    assert store.find(Filter(experiment="late", name="better")).ids == ["a-1"]
    after = store.load("a-1")
    assert {key for key in after if after[key] != before[key]} == {"name", "experiment"}
