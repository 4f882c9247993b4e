"""Our Arrow streams against those of Arrow's own libraries."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pepr_profiler import _core
from pepr_profiler.trace import arrow
from pepr_profiler.trace.arrow import Column, DamagedError, Schema

END = b"\xff\xff\xff\xff" + bytes(4)
"""What Arrow has at the end of a stream."""

FORMS = ("<i8", "<u4", "<i4", "<u8", "<f4", "<f8", "<i2", "<u1")
OF_A_LANE = ("<i8", "<u4", "<u4", "<u4")  # before its channels, which are "<f8"
ROWS = (1, 7, 8, 1000)


def schema(columns: int, *, forms: Sequence[str] = FORMS) -> Schema:
    """Names and facts of all lengths: what follows them lies at every remainder of 8."""
    return Schema(
        tuple(
            Column(
                "µ" * (n % 9) + f"c{n}",
                forms[n % len(forms)],
                {"a" * m: "b" * n for m in range(n % 5)},
            )
            for n in range(columns)
        ),
        {"x" * n: "ü" * n for n in range(columns % 7)},
    )


def of_a_lane(channels: int) -> Schema:
    columns = len(OF_A_LANE) + channels
    return schema(columns, forms=(*OF_A_LANE, *["<f8"] * channels))


def numbers(about: Schema, rows: int) -> list[np.ndarray[Any, Any]]:
    return [
        (np.arange(rows) * (n + 3) % 251).astype(column.form)
        for n, column in enumerate(about.columns)
    ]


def written(about: Schema, folder: Path) -> list[tuple[bytes, list[np.ndarray[Any, Any]]]]:
    """What the recorder writes of some rows at a time: each message, and what it should tell."""
    rules = [("hold", 0.0)] * (len(about.columns) - len(OF_A_LANE))
    file = _core.LaneFile(str(folder / "lane"), arrow.schema_message(about), rules)
    tail, size = folder / "lane.tail.arrows", len(arrow.schema_message(about))
    messages, before_ns = [], None
    for rows in ROWS:
        t_ns, read_ns, skipped, gap_ns, *values = numbers(about, rows)
        t_ns += 1000 * len(messages)
        file.append(t_ns.tobytes(), read_ns.tobytes(), [column.tobytes() for column in values])
        file.flush()
        data = tail.read_bytes()
        gaps_ns = np.diff(t_ns, prepend=t_ns[0] if before_ns is None else before_ns)
        skipped[:], gap_ns[:], before_ns = 0, np.maximum(gaps_ns, 0), t_ns[-1]
        messages.append((data[size:], [t_ns, read_ns, skipped, gap_ns, *values]))
        size = len(data)
    return messages


def stream(about: Schema, messages: Sequence[tuple[bytes, Any]]) -> bytes:
    return b"".join((arrow.schema_message(about), *(message for message, _ in messages), END))


@pytest.mark.parametrize("channels", range(40))
def test_pyarrow_reads_what_is_written(tmp_path: Path, channels: int) -> None:
    ipc = pytest.importorskip("pyarrow.ipc")
    about = of_a_lane(channels)
    messages = written(about, tmp_path)
    with ipc.open_stream(stream(about, messages)) as reader:
        fields = reader.schema
        batches = list(reader)
    assert [(f.name, np.dtype(f.type.to_pandas_dtype()).str.replace("|", "<")) for f in fields] == [
        (c.name, c.form) for c in about.columns
    ]
    assert not any(field.nullable for field in fields)
    for field, column in zip(fields, about.columns, strict=True):
        facts = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
        assert facts == column.facts
    assert {k.decode(): v.decode() for k, v in (fields.metadata or {}).items()} == about.facts
    for batch, (_, columns) in zip(batches, messages, strict=True):
        batch.validate(full=True)
        for read, expected in zip(batch.columns, columns, strict=True):
            np.testing.assert_array_equal(read.to_numpy(), expected)


@pytest.mark.parametrize("columns", range(1, 40))
def test_pyarrow_reads_a_schema_of_every_kind(columns: int) -> None:
    ipc, pa = pytest.importorskip("pyarrow.ipc"), pytest.importorskip("pyarrow")
    about = schema(columns)
    fields = ipc.read_schema(pa.py_buffer(arrow.schema_message(about)))
    assert [(f.name, np.dtype(f.type.to_pandas_dtype()).str.replace("|", "<")) for f in fields] == [
        (c.name, c.form) for c in about.columns
    ]


def test_nanoarrow_reads_what_is_written(tmp_path: Path) -> None:
    na = pytest.importorskip("nanoarrow")
    about = of_a_lane(12)
    messages = written(about, tmp_path)
    (tmp_path / "s.arrows").write_bytes(stream(about, messages))
    read = na.ArrayStream.from_path(str(tmp_path / "s.arrows")).read_all()
    for at, column in enumerate(about.columns):
        expected = np.concatenate([columns[at] for _, columns in messages])
        assert read.child(at).to_pylist() == expected.tolist(), column


@pytest.mark.parametrize("columns", [1, 2, 3, 30])
def test_what_pyarrow_writes_is_read(columns: int) -> None:
    pa = pytest.importorskip("pyarrow")
    about = schema(columns)
    fields = [
        pa.field(c.name, pa.from_numpy_dtype(np.dtype(c.form)), nullable=False, metadata=c.facts)
        for c in about.columns
    ]
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.schema(fields, metadata=about.facts)) as writer:
        for rows in (*ROWS, 0):
            arrays = [pa.array(column) for column in numbers(about, rows)]
            writer.write_batch(pa.record_batch(arrays, schema=pa.schema(fields)))
    data = sink.getvalue()
    assert arrow.read_schema(data) == about
    batches = list(arrow.read_batches(data, [c.form for c in about.columns]))
    assert [len(batch[0]) for batch in batches] == list(ROWS)
    for batch, rows in zip(batches, ROWS, strict=True):
        for read, written in zip(batch, numbers(about, rows), strict=True):
            np.testing.assert_array_equal(read, written)


@pytest.mark.parametrize("how", ["compressed", "with nulls"])
def test_batches_of_another_kind_are_not_misread(how: str) -> None:
    pa = pytest.importorskip("pyarrow")
    options = pa.ipc.IpcWriteOptions(compression="zstd" if how == "compressed" else None)
    values = [1.0] * 1000 if how == "compressed" else [1.0, None]
    sink = io.BytesIO()
    batch = pa.record_batch({"a": pa.array(values)})
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    assert list(arrow.read_batches(sink.getvalue(), ["<f8"])) == []


def test_a_stream_comes_back_up_to_where_it_is_torn(tmp_path: Path) -> None:
    about = of_a_lane(1)
    forms, whole = [c.form for c in about.columns], [len(arrow.schema_message(about))]
    data = arrow.schema_message(about)
    for message, _ in written(about, tmp_path):
        data += message
        whole.append(len(data))
    data += END
    for size in [*range(0, whole[2]), len(data)]:
        read = [len(batch[0]) for batch in arrow.read_batches(data[:size], forms)]
        assert read == [rows for rows, end in zip(ROWS, whole[1:], strict=True) if end <= size]
        assert (arrow.read_schema(data[:size]) is not None) == (size >= whole[0])


@pytest.mark.parametrize(
    "data", [b"PK\3\4" * 9, END + bytes(30), b"\xff\xff\xff\xff\x08\0\0\0" + bytes(8), b"x"]
)
def test_what_is_no_stream_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedError):
        arrow.read_schema(data)


def test_a_batch_cannot_claim_more_than_there_is(tmp_path: Path) -> None:
    # given a batch of 8 rows that says it has others
    about = of_a_lane(0)
    begin, forms = arrow.schema_message(about), [c.form for c in about.columns]
    batch = written(about, tmp_path)[ROWS.index(8)][0]
    at = batch.index(struct.pack("<q", 8))
    for rows in (1000, -1, 2**62, -(2**63)):
        data = begin + batch[:at] + struct.pack("<q", rows) + batch[at + 8 :]
        assert list(arrow.read_batches(data, forms)) == []
    assert [len(b[0]) for b in arrow.read_batches(begin + batch, forms)] == [8]
