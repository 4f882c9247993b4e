"""A recording survives what happens to files."""

from __future__ import annotations

import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pepr_profiler.errors import TraceError
from pepr_profiler.trace.events import EventWriter, read_events
from pepr_profiler.trace.lane import (
    Batch,
    Channel,
    LaneInfo,
    LaneReader,
    LaneWriter,
    joined,
    read_lanes,
)
from pepr_profiler.trace.run_json import read_run, write_json
from pepr_profiler.units import NS_PER_S as S

LANE = LaneInfo(
    "demo",
    "replay:x",
    10_000_000,
    (
        Channel("a", "energy", "J", 1e-6, 65.7e9, True, "powercap", {"zone": "intel-rapl:0"}),
        Channel("b/ä 2", "power", "W", source="nvml-power"),
    ),
)


def uneven(n: int) -> int:
    """Rises by 9 and by 1 in turn: no row lies on a line through others, so all are stored."""
    return 5 * n + 4 * (n % 2)


def columns(first: int, count: int) -> tuple[bytes, bytes, list[bytes]]:
    """Rows number `first` on: row n is (n ms, n ns, uneven(n), -n)."""
    rows = range(first, first + count)
    return (
        struct.pack(f"{count}q", *(n * 1_000_000 for n in rows)),
        struct.pack(f"{count}I", *rows),
        [
            struct.pack(f"{count}d", *map(uneven, rows)),
            struct.pack(f"{count}d", *(-n for n in rows)),
        ],
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
        n = -batch.values[1]
        assert batch.values[0].tolist() == [uneven(i) for i in n.astype(int).tolist()]
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


def test_a_phase_that_ends_before_it_begins_is_read(tmp_path: Path) -> None:
    lines = [
        '{"event":"begin","t_ns":20,"id":1,"parent":null,"name":"damaged"}',
        '{"event":"end","t_ns":10,"id":1}',
        '{"event":"begin","t_ns":30,"id":2,"parent":null,"name":"sound"}',
        '{"event":"end","t_ns":40,"id":2}',
    ]
    (tmp_path / "events-host-1.jsonl").write_text("\n".join(lines) + "\n")
    phases = read_events(tmp_path).phases
    spans = [(phase.name, phase.begin_ns, phase.end_ns) for phase in phases]
    assert spans == [("damaged", 20, 10), ("sound", 30, 40)]
    assert phases[1].strand >= 0


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
    assert table.column_names == ["t_ns", "read_ns", "skipped", "gap_ns", "a", "b/ä 2"]
    assert table.column("a").to_pylist() == [float(uneven(n)) for n in range(5100)]
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


def test_a_tail_of_many_channels_stays_small(tmp_path: Path) -> None:
    # given who uses 64 GPUs, a row a flush
    count, flushes, most = 3136, 150, 1 << 24
    lane = LaneInfo(
        "wide", "replay:x", 500_000_000, tuple(Channel(f"c{i}", "count", "1") for i in range(count))
    )
    writer, sizes = LaneWriter(tmp_path, lane), []
    for n in range(flushes):
        row = struct.pack("d", uneven(n))
        writer.write(struct.pack("q", n), struct.pack("I", n), [row] * count)
        sizes.append((tmp_path / "wide.tail.arrows").stat().st_size)

    # then the tail is emptied before 17 MB, and not at each flush
    assert max(sizes) < most
    assert sum(later < earlier for earlier, later in itertools.pairwise(sizes)) < flushes / 50
    # and every row is there, while it is recorded and after
    for ended in (False, True):
        if ended:
            writer.close()
        seen = np.hstack([batch.values for batch in LaneReader(tmp_path, "wide")])
        assert seen.shape == (count, flushes)
        assert (seen == [uneven(n) for n in range(flushes)]).all()


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
assert writer.file.dropped_rows == 0
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
print(writer.file.dropped_rows)
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


# --- what is left out ----------------------------------------------------------------------------

GPU = (
    Channel("g/energy", "energy", "J", 1e-3, 0.0, True, "nvml-energy", {"kind": "gpu"}),
    Channel("g/power", "power", "W", 1e-3, 0.0, False, "nvml-power"),
    Channel("g/memory", "memory", "B", 1.0, 0.0, False, "nvml-memory"),
)


def stored(directory: Path, channels: tuple[Channel, ...], t_ns: Any, values: list[Any]) -> Batch:
    """Writes rows as one lane and reads them back as one batch."""
    writer = LaneWriter(directory, LaneInfo("demo", "replay:x", 100_000_000, channels))
    for first in range(0, len(t_ns), 500):
        now = slice(first, first + 500)
        times = np.asarray(t_ns[now], np.int64)
        columns = [np.asarray(v[now], np.float64).tobytes() for v in values]
        writer.write(times.tobytes(), np.full(len(times), 1000, np.uint32).tobytes(), columns)
    writer.close()
    batches = list(LaneReader(directory, "demo"))
    skipped = [b.skipped for b in batches if b.skipped is not None]
    gaps = [b.since_read_ns for b in batches if b.since_read_ns is not None]
    return Batch(
        np.concatenate([b.t_ns for b in batches]),
        np.concatenate([b.read_ns for b in batches]),
        np.concatenate([b.values for b in batches], axis=1),
        np.concatenate(skipped),
        np.concatenate(gaps),
    )


def training(rows: int, *, seed: int = 3) -> tuple[Any, Any, list[Any]]:
    """Refreshes of 100 ms: 500 W with 3 % of noise for 50 s, 100 W for 10 s, in turn."""
    noise = np.random.default_rng(seed)
    t_ns = np.arange(1, rows + 1, dtype=np.int64) * 100_000_000 + noise.integers(0, 50_000, rows)
    busy = (t_ns // S) % 60 < 50
    power_w = np.where(busy, 500.0, 100.0) * (1 + 0.03 * noise.standard_normal(rows))
    energy_mj = np.floor(np.cumsum(power_w * 0.1) * 1e3)
    memory = np.where(busy, 6e10, 2e10)
    return t_ns, power_w, [energy_mj, np.floor(power_w * 1e3), memory]


def test_a_quiet_lane_is_stored_sparsely_and_every_phase_keeps_its_energy(tmp_path: Path) -> None:
    # given half an hour in two phases
    t_ns, _, values = training(18_000)
    batch = stored(tmp_path, GPU, t_ns, values)
    assert len(batch.t_ns) < 18_000 / 8
    assert batch.reads == 18_000
    # then any stretch has its energy within a quarter of a refresh's at each of its ends
    edges = np.arange(40, 1790, 1.37) * S
    true_j = np.interp(edges, t_ns, values[0]) * 1e-3
    energy_j = np.interp(edges, batch.t_ns, batch.values[0]) * 1e-3
    assert np.max(np.abs(energy_j - true_j)) <= 0.25 * 500 * 0.1 * 1.1
    # and what is left out adds up: the gaps and the rows that were skipped tell all reads
    spans = np.diff(batch.t_ns)
    assert batch.skipped is not None and batch.since_read_ns is not None
    assert (np.diff(np.searchsorted(t_ns, batch.t_ns)) - 1 == batch.skipped[1:]).all()
    direct = batch.skipped[1:] == 0
    assert (batch.since_read_ns[1:][direct] == spans[direct]).all()
    assert (batch.since_read_ns[1:] < 0.2 * S).all()


def test_extremes_and_both_ends_of_a_gauge_are_kept(tmp_path: Path) -> None:
    t_ns, _, values = training(9_000)
    values[2][4321] = 7.9e10  # one row alone
    values[1][6543] = 1.0
    batch = stored(tmp_path, GPU, t_ns, values)
    assert batch.values[2].max() == 7.9e10
    assert batch.values[1].min() == 1.0
    assert (batch.t_ns[0], batch.t_ns[-1]) == (t_ns[0], t_ns[-1])


def test_power_beside_the_counter_of_another_device_is_kept_as_closely_as_alone(
    tmp_path: Path,
) -> None:
    # given two devices, neither of whose names has a slash
    energy = Channel("meter", "energy", "J", 1e-3, 0.0, True, "test")
    power = Channel("lamp", "power", "W", 1e-3, 0.0, False, "test")
    t_ns, _, values = training(9_000)
    batch = stored(tmp_path, (energy, power), t_ns, values[:2])
    # then the power, which is integrated, is held only where it hardly changed
    before = np.searchsorted(batch.t_ns, t_ns, side="right") - 1
    held_w, read_w = batch.values[1][before], values[1]
    assert np.max(np.abs(held_w / read_w - 1)) <= 0.011


def test_a_counter_that_was_idle_at_first_is_held_to_a_line_as_close_later(tmp_path: Path) -> None:
    # given changes every 2 s, and after 40 s one at each read of 0.1 s, at 70 to 130 W
    t_ns = np.arange(1, 6001, dtype=np.int64) * 100_000_000
    step_j = 10 + 3 * np.sin(2 * np.pi * t_ns / (3 * S))
    step_j[:400] = np.where(np.arange(400) % 20 == 0, 0.05, 0.0)
    energy_j = np.cumsum(step_j)
    batch = stored(tmp_path, GPU[:1], t_ns, [np.floor(energy_j * 1e3)])
    # then behind the batch in which it began, a line is off by a quarter of 0.1 s, not of 2 s
    later = t_ns >= 110 * S
    kept_j = np.interp(t_ns[later], batch.t_ns, batch.values[0]) * 1e-3
    assert np.max(np.abs(kept_j - energy_j[later])) <= 0.25 * 13 * 1.05
    assert len(batch.t_ns) < 5000


def test_nothing_is_left_out_around_what_is_unknown_or_not_read(tmp_path: Path) -> None:
    t_ns, _, values = training(9_000)
    values[0][5000:5400] = np.nan
    t_ns[7000:] += 30 * S
    batch = stored(tmp_path, GPU, t_ns, values)
    for edge in (4999, 5000, 5399, 5400, 6999, 7000):
        assert t_ns[edge] in batch.t_ns
    assert batch.skipped is not None
    unknown = np.isnan(batch.values[0])
    # then the rows that are left out were known or not as the row behind them
    assert int(unknown.sum() + batch.skipped[unknown].sum()) == 400
    gap = int(np.argmax(np.diff(batch.t_ns))) + 1
    assert (batch.t_ns[gap], batch.skipped[gap]) == (t_ns[7000], 0)


def test_a_wrap_and_a_standstill_keep_their_rows(tmp_path: Path) -> None:
    channel = Channel("z/energy", "energy", "J", 1e-6, 1e9, True, "powercap")
    t_ns = np.arange(9000, dtype=np.int64) * 20_000_000
    energy = np.arange(9000) * 2e5
    energy[4000:4500] = energy[4000]
    batch = stored(tmp_path, (channel,), t_ns, [energy % 1e9])
    steps = np.diff(batch.values[0])
    assert int((steps < 0).sum()) == int(energy[-1] // 1e9)
    assert steps[steps < 0].tolist() == [2e5 - 1e9] * int((steps < 0).sum())
    assert {t_ns[4499], t_ns[4500]} <= set(batch.t_ns.tolist())


def test_power_without_a_counter_is_held_between_the_rows_that_are_kept(tmp_path: Path) -> None:
    channel = Channel("p/power", "power", "W", 1e-3, 0.0, False, "nvml-power")
    t_ns, power_w, _ = training(9_000, seed=5)
    steady = np.where(power_w > 300, 500_000.0, 100_000.0) + np.arange(9000) % 3 * 200.0
    batch = stored(tmp_path, (channel,), t_ns, [steady])
    assert len(batch.t_ns) < 9000 / 5
    held = batch.values[0][np.searchsorted(batch.t_ns, t_ns, side="right") - 1]
    assert np.max(np.abs(held / steady - 1)) <= 0.0101
    assert abs(float(held.sum() / steady.sum()) - 1) < 0.002


def test_a_day_of_eight_gpus_and_two_sockets_is_small(tmp_path: Path) -> None:
    # given a tenth of a day at default settings: 8 GPUs refreshed every 0.1 s, RAPL read at 50 Hz
    hours = 2.4
    gpus = [
        Channel(f"GPU-{g}/{what}", quantity, unit, 1.0, 0.0, counter, f"nvml-{what}")
        for g in range(8)
        for what, quantity, unit, counter in (
            ("energy", "energy", "mJ", True), ("power", "power", "mW", False),
            ("average", "power", "mW", False), ("utilisation", "utilisation", "1", False),
            ("memory", "memory", "B", False),
        )
    ]  # fmt: skip
    zones = [
        Channel(f"z{i}/energy", "energy", "J", 1e-6, 2.6e11, True, "powercap") for i in range(4)
    ]
    rows = int(hours * 36_000)
    columns: list[Any] = []
    for g in range(8):
        t_ns, power_w, values = training(rows, seed=g)
        noise = np.random.default_rng(99 + g)
        percent = np.clip(np.floor(97 + 2 * noise.standard_normal(rows)), 0, 100)
        columns += [values[0], values[1], np.floor(power_w) * 1e3, percent, values[2]]
    batch = stored(tmp_path, tuple(gpus), t_ns, columns)
    nvml_bytes = (tmp_path / "demo.arrows").stat().st_size
    for g in range(8):
        total_j = (columns[5 * g][-1] - columns[5 * g][0]) * 1e-3
        assert batch.values[5 * g][-1] - batch.values[5 * g][0] == pytest.approx(1e3 * total_j)
    noise = np.random.default_rng(7)
    rows = int(hours * 180_000)
    t_ns = np.arange(rows, dtype=np.int64) * 20_000_000
    power_w = np.where((t_ns // S) % 60 < 50, 150.0, 60.0)
    energy_uj = [
        np.floor(np.cumsum(power_w * (1 + 0.03 * noise.standard_normal(rows)) * 2e4)) % 2.6e11
        for _ in zones
    ]
    stored(tmp_path, tuple(zones), t_ns, energy_uj)
    rapl_bytes = (tmp_path / "demo.arrows").stat().st_size
    assert (nvml_bytes + rapl_bytes) * 24 / hours < 100e6  # a process lane and noisier loads: 200


def test_a_lane_of_an_older_version_reads_as_it_did() -> None:
    # given a lane written before rows were left out, without the columns that tell of it
    (batch,) = LaneReader(Path(__file__).parent / "data" / "lane-without-skipped", "demo")
    assert batch.skipped is None and batch.since_read_ns is None
    assert batch.t_ns.tolist() == [n * 1_000_000 for n in range(300)]
    assert batch.values[0].tolist() == list(range(300))
    assert batch.reads == 300


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


def test_joined_batches_hold_the_same_rows_in_order() -> None:
    ends = [0, 3, 40_000, 40_001, 90_000]
    t_ns = np.arange(90_000, dtype=np.int64)
    values = np.stack((t_ns * 2.0, np.where(t_ns % 7, 1.0, np.nan)))
    whole = Batch(t_ns, t_ns // 3, values, t_ns % 5, t_ns % 11)
    cut = [Batch(*(column[..., a:b] for column in whole)) for a, b in itertools.pairwise(ends)]
    without = [Batch(batch.t_ns, batch.read_ns, batch.values) for batch in cut]

    together = list(joined(cut))

    assert len(together) < len(cut)
    for name, column in whole._asdict().items():
        parts = [getattr(batch, name) for batch in together]
        np.testing.assert_array_equal(np.concatenate(parts, axis=-1), column)
    assert all(batch.skipped is None for batch in joined(without))


# --- what make fuzz found -------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["first", "later"])
def test_message_without_its_mark_never_reaches_the_arrow_library(tmp_path: Path, at: str) -> None:
    # given a stream in which a message begins as before Arrow 0.15: nanoarrow 0.9 aborts there
    record(tmp_path, [5000]).close()
    path = tmp_path / "demo.arrows"
    data = path.read_bytes()
    schema_ends = data.index(b"\xff\xff\xff\xff", 4)
    begin = 0 if at == "first" else schema_ends
    path.write_bytes(data[:begin] + b"\x01\0\0\0" + data[begin + 4 :])
    # then what is before it is read, in a process of its own as it would take this one along
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["TraceError"] if at == "first" else ["0"])


READ = """
import sys, pathlib
from pepr_profiler.trace.lane import LaneReader, TraceError
try:
    print(sum(len(batch.t_ns) for batch in LaneReader(pathlib.Path(sys.argv[1]), "demo")))
except TraceError as error:
    print(type(error).__name__)
"""


def test_lane_is_read_up_to_where_its_times_turn_back(tmp_path: Path) -> None:
    # given a flipped bit in the time of row 12, of a second batch
    writer = record(tmp_path, [10, 5])
    tail = tmp_path / "demo.tail.arrows"
    data, time_ns = tail.read_bytes(), struct.pack("q", 12_000_000)
    assert data.count(time_ns) == 1
    tail.write_bytes(data.replace(time_ns, struct.pack("q", 12_000_000 ^ 1 << 22)))
    # then the first batch is all there is
    assert numbers(tmp_path) == list(range(10))
    writer.close()


def test_number_that_no_register_holds_is_unknown(tmp_path: Path) -> None:
    # given a flipped bit in the exponent of one value
    record(tmp_path, [10]).close()
    path = tmp_path / "demo.arrows"
    value, damaged = struct.pack("d", uneven(4)), struct.pack("d", 1.5e260)
    assert path.read_bytes().count(value) == 1
    path.write_bytes(path.read_bytes().replace(value, damaged))
    (batch,) = LaneReader(tmp_path, "demo")
    assert np.flatnonzero(np.isnan(batch.values[0])).tolist() == [4]
    assert not np.isnan(batch.values[1]).any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'{"zone": "intel-rapl:0"}', b'["zone", "intel-rapl:0"]'),
        (b"1e-06", b"1e-6x"),
        (b"1e-06", b"  inf"),
        (b"quantity", b"quantitx"),
        (b"10000000", b"100OO000"),
        (b"read_ns", b"read_nx"),
        (b"intel-rapl:0", b"intel-rapl\xff0"),
    ],
)
def test_schema_that_describes_no_lane_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    record(tmp_path, [5]).close()
    path = tmp_path / "demo.arrows"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(TraceError, match="is not a") as refused:
        LaneReader(tmp_path, "demo")
    assert refused.value.why and refused.value.fix


@pytest.mark.parametrize(
    "columns",
    [
        {"t_ns": "int64", "read_ns": "uint32", "a": "string"},
        {"t_ns": "int64", "read_ns": "uint32", "a": "float"},
        {"t_ns": "double", "read_ns": "uint32", "a": "double"},
        {"a": "double", "t_ns": "int64", "read_ns": "uint32"},
        {"t_ns": "int64", "read_ns": "uint32"},
        {"a": "string"},
    ],
)
def test_columns_of_another_program_are_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    pa = pytest.importorskip("pyarrow")
    ours = {"pepr": "1", "lane": "demo", "spec": "x", "period_ns": "1"}
    about = {"quantity": "energy", "unit": "J", "scale": "1", "modulus": "0"}
    about |= {"counter": "true", "source": "x", "labels": "{}"}
    fields = [pa.field(n, pa.type_for_alias(t), metadata=about) for n, t in columns.items()]
    schema = pa.schema(fields, metadata=ours)
    table = pa.table([pa.array([None] * 3, field.type) for field in schema], schema=schema)
    with (
        pa.OSFile(str(tmp_path / "demo.arrows"), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        stream.write_table(table)
    with pytest.raises(TraceError, match="columns"):
        LaneReader(tmp_path, "demo")


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "metrics", "t_ns": "5", "metrics": {}}',
        '{"event": "metrics", "t_ns": 1e400, "metrics": {}}',
        '{"event": "metrics", "t_ns": 9223372036854775808, "metrics": {}}',
        '{"event": "metrics", "t_ns": 5, "metrics": [["a", 1]]}',
        '{"event": "begin", "t_ns": 5, "id": [], "name": "x"}',
        '{"event": "begin", "t_ns": 5, "id": 2}',
        '{"event": "end", "t_ns": null, "id": 1}',
        '{"event": "mark", "t_ns": true, "verb": "next", "series": "s", "name": "x"}',
        "[" * 100_000,
    ],
)
def test_event_that_is_none_is_counted_and_harms_no_other(tmp_path: Path, line: str) -> None:
    good = ['{"event": "begin", "t_ns": 1, "id": 1, "parent": null, "name": "whole"}']
    good.append('{"event": "end", "t_ns": 9, "id": 1}')
    (tmp_path / "events-h-1.jsonl").write_text("\n".join([good[0], line, good[1]]))
    found = read_events(tmp_path)
    assert found.torn_lines == 1
    assert [(p.name, p.begin_ns, p.end_ns) for p in found.phases] == [("whole", 1, 9)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"time_s": "1 s"}, "time_s is '1 s'"),
        ({"time_s": float("nan")}, "time_s is 'nan'"),
        ({"exit_code": 2**70}, "exit_code"),
        ({"complete": 1}, "complete is '1'"),
        ({"metrics": {"accuracy": [0.5]}}, r"metrics.accuracy is '\[0.5\]'"),
        ({"energy": {"components": [{"job_j": {}}]}}, r"energy.components\[0\].job_j"),
        ({"recording": {"window_ns": [0, "end"]}}, r"recording.window_ns\[1\] is 'end'"),
    ],
)
def test_run_json_of_another_shape_is_refused_by_the_place(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, **change}))
    with pytest.raises(TraceError, match=why):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "of a later version": change}))
    assert read_run(tmp_path)["schema"] == 1
