"""A recording survives what happens to files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pepr_profiler.errors import TraceError
from pepr_profiler.trace import (
    Channel,
    EventWriter,
    Lane,
    LaneReader,
    LaneWriter,
    read_events,
    read_lanes,
    read_run,
    write_json,
)

LANE = Lane(
    "demo",
    "replay:x",
    10_000_000,
    (
        Channel("a", "energy", "J", 1e-6, 65.7e9, True, "powercap", {"zone": "intel-rapl:0"}),
        Channel("b/ä 2", "power", "W", source="nvml-power"),
    ),
)


def columns(first: int, count: int) -> tuple[bytes, bytes, list[bytes]]:
    """Rows number `first` on: row n is (n ms, n ns, n, -n)."""
    rows = range(first, first + count)
    return (
        struct.pack(f"{count}q", *(n * 1_000_000 for n in rows)),
        struct.pack(f"{count}I", *rows),
        [struct.pack(f"{count}d", *rows), struct.pack(f"{count}d", *(-n for n in rows))],
    )


def record(directory: Path, batches: list[int]) -> LaneWriter:
    writer = LaneWriter(directory, LANE)
    first = 0
    for count in batches:
        writer.write(*columns(first, count))
        first += count
    return writer


def numbers(directory: Path) -> list[int]:
    """The row numbers that a reader sees, each row checked to be whole."""
    seen: list[int] = []
    for batch in LaneReader(directory, "demo"):
        n = batch.values[0]
        assert (batch.values[1] == -n).all()
        assert (batch.t_ns == n * 1_000_000).all()
        assert (batch.read_ns == n).all()
        seen += n.astype(int).tolist()
    return seen


@pytest.mark.parametrize("batches", [[1], [3, 5], [1024], [5000, 1], [400] * 10])
def test_every_row_comes_back_once_while_recording_and_after(
    tmp_path: Path, batches: list[int]
) -> None:
    writer = record(tmp_path, batches)
    expected = list(range(sum(batches)))
    assert numbers(tmp_path) == expected
    writer.close()
    assert numbers(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["demo.arrows"]


def test_a_reader_can_be_read_again(tmp_path: Path) -> None:
    writer = record(tmp_path, [5000, 10])
    reader = LaneReader(tmp_path, "demo")
    first = [len(batch.t_ns) for batch in reader]
    assert sum(first) == 5010
    assert [len(batch.t_ns) for batch in reader] == first
    writer.close()


def test_the_file_explains_itself_to_any_arrow_reader(tmp_path: Path) -> None:
    ipc = pytest.importorskip("pyarrow.ipc")
    record(tmp_path, [100, 5000]).close()
    table = ipc.open_stream(str(tmp_path / "demo.arrows")).read_all()
    assert table.column_names == ["t_ns", "read_ns", "a", "b/ä 2"]
    assert table.column("a").to_pylist() == [float(n) for n in range(5100)]
    about = table.schema.field("a").metadata
    assert (about[b"unit"], about[b"scale"]) == (b"J", b"1e-06")
    assert json.loads(about[b"labels"]) == {"zone": "intel-rapl:0"}


def test_what_a_channel_is_comes_back_as_it_was(tmp_path: Path) -> None:
    record(tmp_path, [2]).close()
    assert read_lanes(tmp_path)["demo"].lane == LANE


def test_a_tail_torn_at_any_byte_keeps_the_batches_before_it(tmp_path: Path) -> None:
    # given 10 rows flushed, then 5 more
    writer = record(tmp_path, [10])
    tail = tmp_path / "demo.tail.arrows"
    whole = tail.stat().st_size
    writer.write(*columns(10, 5))
    data = tail.read_bytes()
    for size in range(whole, len(data)):
        # when the second flush is cut off anywhere
        tail.write_bytes(data[:size])
        # then the first is all there
        assert numbers(tmp_path) == list(range(10))
    writer.close()


def test_rows_left_in_both_files_by_a_crash_are_seen_once(tmp_path: Path) -> None:
    # given a crash after the large batch was written and before the tail was emptied
    writer = record(tmp_path, [1000])
    tail = tmp_path / "demo.tail.arrows"
    before = tail.read_bytes()
    writer.write(*columns(1000, 200))
    tail.write_bytes(before)
    assert numbers(tmp_path) == list(range(1200))
    writer.close()


def test_a_full_disk_costs_nothing_once_there_is_room_again(tmp_path: Path) -> None:
    # given a process that may not write files longer than 20 kB, a real EFBIG from the kernel
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_trace import columns, record
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
writer = record(Path({str(tmp_path)!r}), [300])
assert writer.error is None
writer.write(*columns(300, 2000))
assert writer.error is not None, "the disk was not full"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.write(*columns(2300, 10))
assert writer.error is None
writer.close()
assert writer.dropped_rows == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    # then all rows are there, those of the failed flush too
    assert numbers(tmp_path) == list(range(2310))


def test_a_disk_that_stays_full_loses_rows_and_says_how_many(tmp_path: Path) -> None:
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_trace import columns, record
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
writer = record(Path({str(tmp_path)!r}), [300, 5000, 1000])
writer.close()
print(writer.dropped_rows)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=60, capture_output=True, text=True
    )
    # then what is on disk and what is lost add up
    assert len(numbers(tmp_path)) + int(done.stdout) == 6300
    assert numbers(tmp_path) == list(range(len(numbers(tmp_path))))


@pytest.mark.parametrize("content", [b"hello, I am not Arrow", b"\xff" * 64, b"ARROW1\0\0" * 9])
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "demo.arrows").write_bytes(content)
    with pytest.raises(TraceError, match=r"demo\.arrows"):
        LaneReader(tmp_path, "demo")


def test_arrow_of_somebody_else_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    with pa.ipc.new_stream(str(tmp_path / "demo.arrows"), pa.schema([("x", pa.int64())])):
        pass
    with pytest.raises(TraceError, match="not a pepr recording"):
        LaneReader(tmp_path, "demo")


def test_an_empty_lane_is_no_lane(tmp_path: Path) -> None:
    LaneWriter(tmp_path, LANE).close()
    assert read_lanes(tmp_path) == {}
    with pytest.raises(TraceError, match="empty"):
        LaneReader(tmp_path, "demo")


# --- events ---------------------------------------------------------------------------------------


def test_marks_and_metrics_come_back_in_order(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.begin('"train"', 1, None)
    writer.begin('"step \\u00e4"', 2, 1)
    writer.metrics({"accuracy": 0.5, "epoch": 1})
    writer.end(2)
    writer.end(1)
    writer.metrics({"accuracy": 0.9})
    writer.begin('"open"', 3, None)
    writer.close()
    events = read_events(tmp_path)
    assert [(p.name, p.nested, p.end_ns is None) for p in events.phases] == [
        ("train", False, False),
        ("step ä", True, False),
        ("open", False, True),
    ]
    assert [values for _, values in events.metrics] == [
        {"accuracy": 0.5, "epoch": 1},
        {"accuracy": 0.9},
    ]
    train, step, _ = events.phases
    assert train.begin_ns <= step.begin_ns
    assert step.end_ns is not None
    assert train.end_ns is not None
    assert step.end_ns <= train.end_ns


def test_a_torn_line_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    good = '{"event":"metrics","t_ns":1,"metrics":{"a":1}}\n'
    (tmp_path / "events-h-1.jsonl").write_text(good + '{"event":"metr')
    events = read_events(tmp_path)
    assert (len(events.metrics), events.torn_lines) == (1, 1)


def test_a_forked_child_writes_to_a_file_of_its_own(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.metrics({"who": 1})
    pid = os.fork()
    if pid == 0:
        writer.metrics({"who": 2})
        os._exit(0)
    os.waitpid(pid, 0)
    writer.metrics({"who": 3})
    writer.close()
    by_pid = {
        int(path.stem.rsplit("-", 1)[1]): path.read_text().count("\n")
        for path in tmp_path.glob("events-*.jsonl")
    }
    assert by_pid == {os.getpid(): 2, pid: 1}


# --- run.json -------------------------------------------------------------------------------------


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"schema": 1, "x": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"schema": 1, "x": float("nan")})
    assert read_run(tmp_path) == {"schema": 1, "x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "not a run"), ("{", "damaged"), ('{"schema": 2}', "schema 2"), ("[]", "schema None")],
)
def test_a_directory_that_is_no_run_says_so(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(TraceError, match=words):
        read_run(tmp_path)


def test_a_batch_is_float64_and_int64_whatever_was_stored(tmp_path: Path) -> None:
    record(tmp_path, [3]).close()
    (batch,) = LaneReader(tmp_path, "demo")
    assert (batch.t_ns.dtype, batch.read_ns.dtype) == (np.int64, np.int64)
    assert (batch.values.dtype, batch.values.shape) == (np.float64, (2, 3))
