"""A recording on disk: written while the run goes on, readable up to the last flush.

A run directory holds one Arrow IPC stream a lane, `LANE.arrows`, with the columns `t_ns`
(CLOCK_MONOTONIC when the read began), `read_ns` (how long it took, at most 4.29 s), `skipped`,
`gap_ns` and a float64 a channel; what a channel is stands in the schema's metadata. Small batches,
one a flush, would cost more bytes than their numbers, so they go to `LANE.tail.arrows` and are
rewritten as one large batch now and then. A crash between the two leaves rows in both; a reader
drops those it has seen.

A large batch is stored more sparsely than it was read: rows between which every counter went
straight, and every gauge stayed level, are left out (csrc/thin.h). `skipped` says how many lay just
before a row, and `gap_ns` how long ago the last of them was read, so that a quiet stretch is never
taken for a gap. Around a gap nothing is left out.

Marks and metrics are lines of `events-HOST-PID.jsonl`, one writer a file, append only, written
through at once: they survive `kill -9` of the program that made them. A block of a program begins
and ends in one file; a mark (`pepr-profile mark`) says its phase's name and belongs to the run.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pepr_profiler import _core
from pepr_profiler.errors import TraceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUN_DIR_VARIABLE = "PEPR_RUN_DIR"
"""Names the run that a process is already part of; `profile()` joins it."""

_BATCH_ROWS = 1024
"""Rows of a finished batch: large enough that its 400 bytes of header do not matter."""

_WHOLE_ROWS = 256
"""Rows at the beginning of a lane that are all kept: refresh periods are learnt from them."""

_MOST_PENDING_ROWS = 1 << 17
"""What a full disk may keep waiting in memory before rows are dropped: 2 min at 1 kHz."""


@dataclass(frozen=True)
class Channel:
    """What one recorded number is; see `Channel` in csrc/sensor.h."""

    name: str
    quantity: str
    unit: str
    scale: float = 1.0
    modulus: float = 0.0
    counter: bool = False
    source: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lane:
    """One driver's part of a recording."""

    name: str
    spec: str
    period_ns: int
    channels: tuple[Channel, ...]


def describe(channels: Iterable[Any]) -> tuple[Channel, ...]:
    """The native core's channels as plain data."""
    names = Channel.__dataclass_fields__
    return tuple(Channel(**{name: getattr(c, name) for name in names}) for c in channels)


@dataclass(frozen=True)
class Batch:
    """Rows of one lane: `t_ns`, `read_ns` int64 (n,), `values` float64 (channels, n) as recorded.

    A recorded value times its channel's `scale` is in the channel's unit; NaN is unknown.
    `skipped` int64 (n,) rows were read just before a row and left out, the last of them `gap_ns`
    before it; in them, the same channels were unknown as in the row. Where it is 0, `gap_ns` is the
    time since the row before. None: nothing was left out.
    """

    t_ns: NDArray[np.int64]
    read_ns: NDArray[np.int64]
    values: NDArray[np.float64]
    skipped: NDArray[np.int64] | None = None
    gap_ns: NDArray[np.int64] | None = None

    @property
    def reads(self) -> int:
        """Rows that were read, those left out too."""
        return len(self.t_ns) + (0 if self.skipped is None else int(self.skipped.sum()))

    def since(self, row: int) -> Batch:
        """The rows from `row` on."""
        return Batch(
            self.t_ns[row:],
            self.read_ns[row:],
            self.values[:, row:],
            None if self.skipped is None else self.skipped[row:],
            None if self.gap_ns is None else self.gap_ns[row:],
        )


class LaneWriter:
    """Appends one lane's rows to its stream and keeps what the disk does not take for later.

    `error` is why the last write failed, None if it did not; `dropped_rows` were given up for good.
    """

    def __init__(self, directory: Path, lane: Lane) -> None:
        self.lane = lane
        self.dropped_rows = 0
        self.error: OSError | None = None
        self._main = _Stream(directory / f"{lane.name}.arrows", lane)
        self._tail = _Stream(directory / f"{lane.name}.tail.arrows", lane)
        self._rows = _Columns(len(lane.channels))
        self._rules = _thin_rules(lane.channels)
        self._whole = _WHOLE_ROWS
        self._last_ns: int | None = None
        self._tail_rows = 0  # how many of them, from the first on, the tail holds

    def write(self, t_ns: bytes, read_ns: bytes, values: Sequence[bytes]) -> None:
        """Appends rows given as native-endian columns; on disk when it returns, unless `error`."""
        rows = len(t_ns) // 8
        self._rows.extend((t_ns, read_ns, bytes(4 * rows), self._gaps(t_ns), *values))
        if self._attempt(lambda: self._tail.append(self._rows.since(self._tail_rows))):
            self._tail_rows = len(self._rows)
        if len(self._rows) >= _BATCH_ROWS:
            self._consolidate()

    def close(self) -> None:
        """Writes what is left as a last large batch and removes the tail."""
        if len(self._rows):
            self._consolidate()
        if len(self._rows):
            self._give_up()
        else:
            self._attempt(self._main.finish)
            with suppress(OSError):  # left behind it does no harm: a reader drops what it has seen
                self._tail.remove()
        self._main.close()
        self._tail.close()

    def _gaps(self, t_ns: bytes) -> bytes:
        """How long before each row the one before it was read, uint32, at most 4.29 s."""
        times = array("q", t_ns)
        if not times:
            return b""
        before = [times[0] if self._last_ns is None else self._last_ns, *times[:-1]]
        self._last_ns = times[-1]
        longest = 2**32 - 1
        gaps = (min(t - last, longest) for t, last in zip(times, before, strict=True))
        return array("I", gaps).tobytes()

    def _consolidate(self) -> None:
        def append() -> None:
            self._main.append(_core.thin(self._rows.since(0), self._rules, self._whole))

        if self._attempt(append):
            self._whole = max(0, self._whole - len(self._rows))
            self._rows.cut(0)
            self._tail.clear()
            self._tail_rows = 0
        elif len(self._rows) > _MOST_PENDING_ROWS:
            self._give_up()

    def _give_up(self) -> None:
        """Lets go of the rows that no file holds."""
        self.dropped_rows += len(self._rows) - self._tail_rows
        self._rows.cut(self._tail_rows)

    def _attempt(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            self.error = error
            return False
        self.error = None
        return True


def _thin_rules(channels: Sequence[Channel]) -> list[tuple[str, float]]:
    """How sparsely each channel may be stored; the numbers are explained in docs/design.md."""
    counted = {_device_of(c) for c in channels if c.quantity == "energy"}
    return [
        ("line", LINE_STEPS if c.quantity == "energy" else _FINE_LINE_STEPS)
        if c.counter
        else ("hold", 0.0)
        if c.quantity == "identity"  # a PID is no quantity: the next number is another process
        else ("hold", _HOLD)
        if c.quantity == "power" and _device_of(c) not in counted
        else ("level", _LEVEL_S)
        for c in channels
    ]


def _device_of(channel: Channel) -> str:
    return channel.name.rpartition("/")[0]


LINE_STEPS = 0.25
"""What a counter's stored line may be off by, in parts of a refresh's energy; u takes it in."""

_FINE_LINE_STEPS = 0.06
"""CPU times are set against each other in windows of 1 s."""

_HOLD = 0.01
"""Power that is integrated, relative."""

_LEVEL_S = 0.25
"""A gauge that nothing is integrated from: a quarter of a second of its level."""


class _Columns:
    """Rows as growing byte columns: t_ns, read_ns, skipped, gap_ns and a float64 a channel."""

    def __init__(self, channels: int) -> None:
        self._sizes = (8, 4, 4, 4, *[8] * channels)
        self._columns = [bytearray() for _ in self._sizes]

    def __len__(self) -> int:
        return len(self._columns[0]) // 8

    def extend(self, columns: Sequence[bytes]) -> None:
        for kept, new in zip(self._columns, columns, strict=True):
            kept.extend(new)

    def since(self, row: int) -> list[bytes]:
        pairs = zip(self._columns, self._sizes, strict=True)
        return [bytes(column[row * size :]) for column, size in pairs]

    def cut(self, rows: int) -> None:
        for column, size in zip(self._columns, self._sizes, strict=True):
            del column[rows * size :]


class _Stream:
    """An Arrow IPC stream that never holds half a batch: a failed write is cut off again."""

    def __init__(self, path: Path, lane: Lane) -> None:
        self._path = path
        self._lane = lane
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._size = 0
        self._sink = _Sink()
        self._writer: Any = None

    def append(self, columns: Sequence[bytes]) -> None:
        import nanoarrow as na
        from nanoarrow.ipc import StreamWriter

        schema = _arrow_schema(self._lane)
        first = self._writer is None
        if first:
            self._writer = StreamWriter.from_writable(self._sink)
        rows = len(columns[0]) // 8
        children = [
            na.c_array_from_buffers(child, rows, [None, column], null_count=0)
            for child, column in zip(schema.children, columns, strict=True)
        ]
        batch = na.c_array_from_buffers(schema, rows, [None], null_count=0, children=children)
        try:
            self._writer.write_array(batch)
            self._write(self._sink.take())
        except OSError:
            if first:  # the schema is not on disk, so the next attempt has to begin with it
                self._forget_writer()
            raise

    def finish(self) -> None:
        """Marks the end, as Arrow readers like it; a stream without rows stays empty."""
        if self._writer is not None:
            self._writer.close()
            self._write(self._sink.take())
            self._writer = None

    def clear(self) -> None:
        os.ftruncate(self._fd, 0)
        self._size = 0
        self._forget_writer()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._forget_writer()
        os.close(self._fd)

    def _forget_writer(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._sink.take()
            self._writer = None

    def _write(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], self._size + written)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)


class _Sink:
    """A file object that keeps what nanoarrow writes until it is taken in one piece."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, piece: Any) -> int:
        self._pieces.append(bytes(piece))
        return len(piece)

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


def _arrow_schema(lane: Lane) -> Any:
    import nanoarrow as na

    fields = {
        "t_ns": _annotate(na.int64(nullable=False), {"unit": "ns", "clock": "CLOCK_MONOTONIC"}),
        "read_ns": _annotate(na.uint32(nullable=False), {"unit": "ns"}),
        "skipped": _annotate(na.uint32(nullable=False), {"unit": "1"}),
        "gap_ns": _annotate(na.uint32(nullable=False), {"unit": "ns"}),
    }
    for channel in lane.channels:
        facts = {
            "quantity": channel.quantity,
            "unit": channel.unit,
            "scale": repr(channel.scale),
            "modulus": repr(channel.modulus),
            "counter": json.dumps(channel.counter),
            "source": channel.source,
            "labels": json.dumps(channel.labels),
        }
        fields[channel.name] = _annotate(na.float64(nullable=False), facts)
    facts = {"pepr": "1", "lane": lane.name, "spec": lane.spec, "period_ns": str(lane.period_ns)}
    return _annotate(na.struct(fields, nullable=False), facts)


def _annotate(schema: Any, facts: dict[str, str]) -> Any:
    import nanoarrow as na

    metadata = {key.encode(): value.encode() for key, value in facts.items()}
    return na.c_schema(schema).modify(metadata=metadata)


class _EmptyLaneError(TraceError):
    """Not even a lane's schema was written whole."""


class LaneReader:
    """Iterates the batches of one lane of a run directory, in time order, each row once.

    Raises TraceError if the file is not a recording of ours. A torn tail ends the iteration; what
    was flushed before it is all there.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._main = directory / f"{name}.arrows"
        # The tail first: rows that move to the main stream while we look are then seen twice and
        # dropped once, instead of being missed.
        self._tail = _read_bytes(directory / f"{name}.tail.arrows")
        source = _open_stream(self._main) or _open_stream(self._tail)
        if source is None:
            raise _EmptyLaneError(
                f"lane '{name}' of {directory} is empty",
                why="the recording ended before its first flush",
                fix="nothing can be recovered from this lane",
            )
        self.lane = _lane_of(source, self._main)

    def __iter__(self) -> Iterator[Batch]:
        import numpy as np

        seen_ns = -1
        for source in (self._main, self._tail):
            stream = _open_stream(source)  # anew: a stream can be read once
            if stream is None:
                continue
            for batch in _batches(stream):
                fresh = int(np.searchsorted(batch.t_ns, seen_ns, side="right"))
                if fresh:
                    batch = batch.since(fresh)  # noqa: PLW2901
                if len(batch.t_ns):
                    seen_ns = int(batch.t_ns[-1])
                    yield batch


def read_lanes(directory: Path) -> dict[str, LaneReader]:
    """A reader for each lane that holds rows."""
    readers = {}
    for name in sorted({path.name.split(".")[0] for path in directory.glob("*.arrows")}):
        with suppress(_EmptyLaneError):  # a crash before its first flush must not hide the others
            readers[name] = LaneReader(directory, name)
    return readers


_JOINED_ROWS = 1 << 15
"""What a reader handles at once: below it the calls cost more than the numbers."""


def joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same rows in fewer batches: a stored one that was thinned well holds 60 rows.

    A day of RAPL at 1 kHz is integrated in a fifth of the time.
    """
    waiting: list[Batch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += len(batch.t_ns)
        if rows >= _JOINED_ROWS:
            yield _join(waiting)
            waiting, rows = [], 0
    if waiting:
        yield _join(waiting)


def _join(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    import numpy as np

    def column(name: str) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else np.concatenate(parts)  # all of a lane have it, or none

    times = (column(name) for name in ("skipped", "gap_ns"))
    values = np.concatenate([batch.values for batch in batches], axis=1)
    return Batch(column("t_ns"), column("read_ns"), values, *times)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _open_stream(source: Path | bytes) -> Any:
    """An Arrow stream over a file or bytes; None where not even the schema was written whole."""
    import nanoarrow as na
    from nanoarrow._utils import NanoarrowException

    if isinstance(source, Path):
        if not source.exists():
            return None
        with source.open("rb") as file:
            head, size = file.read(8), source.stat().st_size
    else:
        head, size = source[:8], len(source)
    # An encapsulated message: 0xFFFFFFFF, the length of its metadata, the metadata.
    length = int.from_bytes(head[4:8], "little", signed=True)
    if head[:4] == b"\xff" * len(head[:4]) and (size < 8 or 0 < length > size - 8):
        return None
    try:
        if isinstance(source, Path):
            stream = na.ArrayStream.from_path(str(source))
        else:
            stream = na.ArrayStream.from_readable(source)
        stream.schema  # noqa: B018 - parsed here, so that a foreign file fails here
    except (NanoarrowException, ValueError) as error:
        raise _foreign(source, str(error)) from None
    return stream


def _foreign(source: Path | bytes, why: str) -> TraceError:
    return TraceError(
        f"{source if isinstance(source, Path) else 'the tail of a lane'} is not an Arrow stream",
        why=why,
        fix="point at a run directory that pepr-profile wrote",
    )


def _lane_of(stream: Any, path: Path) -> Lane:
    import nanoarrow as na

    schema = na.c_schema(stream.schema)
    facts = _facts(schema)
    if facts.get("pepr") != "1":
        raise TraceError(
            f"{path} is not a pepr recording of a version that this one reads",
            why=f"its schema says pepr={facts.get('pepr', 'nothing')!r}",
            fix="update pepr-profiler, or point at a run directory that it wrote",
        )
    channels = []
    for child in schema.children:
        about = _facts(child)
        if "quantity" not in about:
            continue  # a column that is about the row
        channels.append(
            Channel(
                name=child.name,
                quantity=about["quantity"],
                unit=about["unit"],
                scale=float(about["scale"]),
                modulus=float(about["modulus"]),
                counter=json.loads(about["counter"]),
                source=about["source"],
                labels=json.loads(about["labels"]),
            )
        )
    return Lane(facts["lane"], facts["spec"], int(facts["period_ns"]), tuple(channels))


def _facts(schema: Any) -> dict[str, str]:
    if schema.metadata is None:
        return {}
    return {key.decode(): value.decode() for key, value in schema.metadata.items()}


def _batches(stream: Any) -> Iterator[Batch]:
    import numpy as np
    from nanoarrow._utils import NanoarrowException

    try:
        for array in stream:
            rows = len(array)
            columns = [np.asarray(child.buffer(1))[:rows] for child in array.iter_children()]
            times = [c.astype(np.int64, copy=False) for c in columns if c.dtype.kind in "iu"]
            values = np.vstack([c for c in columns if c.dtype.kind == "f"])
            yield Batch(times[0], times[1], values, *times[2:4])
    except NanoarrowException:
        return  # torn by a crash in mid-write: all that was flushed before has been yielded


# --- marks and metrics -------------------------------------------------------------------------

MARKS = ("next", "begin", "end")
"""What a mark may say: "next" ends the phase that "next" began before in its series, and begins
one; "begin" and "end" go by the phase's name."""


class EventWriter:
    """Appends marks and metrics of this process to its own file of a run directory.

    Safe across fork: a child opens a file of its own at its first event. Raises nothing once it is
    open: a line that cannot be written is counted in `lost`.
    """

    def __init__(self, directory: Path, kind: str = "events") -> None:
        self._directory = directory
        self._kind = kind
        self._pid = 0
        self._fd = -1
        self.lost = 0

    def write(self, line: str) -> None:
        """Appends one JSON object (without its newline), written through to the kernel."""
        if self._pid != os.getpid():
            self._open()
        try:
            os.write(self._fd, line.encode() + b"\n")
        except OSError:
            self.lost += 1

    def begin(self, name: str, number: int, parent: int | None) -> None:
        """A phase begins now."""
        up = "null" if parent is None else str(parent)
        self.write(
            f'{{"event":"begin","t_ns":{time.monotonic_ns()},"id":{number},"parent":{up},"name":{name}}}'
        )

    def end(self, number: int) -> None:
        """The phase with this number ends now."""
        self.write(f'{{"event":"end","t_ns":{time.monotonic_ns()},"id":{number}}}')

    def mark(self, verb: str, name: str | None, *, series: str, t_ns: int | None = None) -> None:
        """A phase of the whole run, which other processes may end; `verb` is one of MARKS.

        A file knows only its own writer, so marks are paired where they are read (`read_events`).
        """
        mark = {"event": "mark", "t_ns": time.monotonic_ns() if t_ns is None else t_ns}
        self.write(json.dumps({**mark, "verb": verb, "series": series, "name": name}))

    def metrics(self, values: dict[str, Any], *, t_ns: int | None = None) -> None:
        """Metrics that hold from now on; the last value of a name is the run's."""
        t_ns = time.monotonic_ns() if t_ns is None else t_ns
        self.write(f'{{"event":"metrics","t_ns":{t_ns},"metrics":{json.dumps(values)}}}')

    def close(self) -> None:
        if self._fd >= 0 and self._pid == os.getpid():
            os.close(self._fd)
        self._fd, self._pid = -1, 0

    def _open(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # inherited through fork; the parent keeps its own
        self._pid = os.getpid()
        name = f"{self._kind}-{os.uname().nodename}-{self._pid}.jsonl"
        path = self._directory / name
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o644)
        except OSError:
            self._fd = -1


@dataclass(frozen=True)
class Phase:
    """One pass through a phase; `end_ns` is None if it never ended.

    `series` is whose mark began it; None for a program's own block, which no mark ends.
    """

    name: str
    begin_ns: int
    end_ns: int | None
    nested: bool
    series: str | None = None


@dataclass(frozen=True)
class Events:
    """What the programs of a run marked and logged, in time order."""

    phases: tuple[Phase, ...]
    metrics: tuple[tuple[int, dict[str, Any]], ...]
    torn_lines: int


def read_events(directory: Path) -> Events:
    """Reads every events file of a run directory; a torn last line is counted, not fatal."""
    phases: list[Phase] = []
    metrics: list[tuple[int, dict[str, Any]]] = []
    marks: list[_Mark] = []
    torn = 0
    for path in sorted(directory.glob("events-*.jsonl")):
        open_phases: dict[int, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines():
            try:
                event = json.loads(line)
                kind = event["event"]
                if kind == "begin":
                    # A program that replaced itself (exec) kept its pid and counts from 1 again.
                    if event["id"] in open_phases:
                        phases.append(_phase(open_phases[event["id"]], None))
                    open_phases[event["id"]] = event
                elif kind == "end":
                    begin = open_phases.pop(event["id"], None)
                    if begin is not None:
                        phases.append(_phase(begin, event["t_ns"]))
                elif kind == "mark":
                    marks.append(_Mark.of(event))
                elif kind == "metrics":
                    metrics.append((int(event["t_ns"]), dict(event["metrics"])))
            except (ValueError, KeyError, TypeError):
                torn += 1
        phases.extend(_phase(begin, None) for begin in open_phases.values())
    phases.extend(_marked(marks))
    phases.sort(key=lambda phase: phase.begin_ns)
    metrics.sort(key=lambda item: item[0])
    return Events(tuple(phases), tuple(metrics), torn)


@dataclass(frozen=True)
class _Mark:
    t_ns: int
    verb: str
    series: str
    name: str | None

    @classmethod
    def of(cls, event: dict[str, Any]) -> _Mark:
        name, verb = event["name"], event["verb"]
        if verb not in MARKS or not (isinstance(name, str) or (name is None and verb == "end")):
            raise ValueError(f"no mark: {event}")
        return cls(int(event["t_ns"]), verb, str(event["series"]), name)

    def ends(self, begun: _Mark) -> bool:
        """Whether this mark ends the phase that `begun` began, if no better one is open."""
        if self.verb == "next":
            return begun.verb == "next" and begun.series == self.series
        if self.name is None:
            return begun.series == self.series
        return self.verb == "end" and begun.name == self.name


def _marked(marks: Sequence[_Mark]) -> Iterator[Phase]:
    """The phases that marks of all processes make; of several that one could end, the last begun.

    A phase of the mark's own series comes first: scripts side by side use the same names. One that
    another began is ended too: who begins and who ends may be two processes.
    """
    begun: list[_Mark] = []
    for mark in sorted(marks, key=lambda mark: mark.t_ns):
        if mark.verb != "begin":
            found = [other for other in begun if mark.ends(other)]
            found = [other for other in found if other.series == mark.series] or found
            if found:
                begun.remove(found[-1])
                yield _between(found[-1], mark.t_ns, begun)
        if mark.verb != "end":
            begun.append(mark)
    yield from (_between(mark, None, begun[:i]) for i, mark in enumerate(begun))


def _between(begin: _Mark, end_ns: int | None, begun: Sequence[_Mark]) -> Phase:
    around = any(m.series == begin.series and m.t_ns <= begin.t_ns for m in begun)
    return Phase(str(begin.name), begin.t_ns, end_ns, around, begin.series)


def read_neighbours(directory: Path) -> list[dict[str, Any]]:
    """What was written down of processes while they lived (neighbours.py), in time order.

    In a file of its own: whoever only looks at a run in progress need not read its marks. A torn
    line is left out.
    """
    notes: list[dict[str, Any]] = []
    for path in sorted(directory.glob("processes-*.jsonl")):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                note = json.loads(line)
                if isinstance(note, dict) and isinstance(note.get("t_ns"), int):
                    notes.append(note)
    return sorted(notes, key=lambda note: int(note["t_ns"]))


def _phase(begin: dict[str, Any], end_ns: int | None) -> Phase:
    return Phase(str(begin["name"]), int(begin["t_ns"]), end_ns, begin.get("parent") is not None)


# --- run.json ----------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically: a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def boot_id() -> str:
    """Which boot of which machine CLOCK_MONOTONIC is of; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def read_run(directory: Path) -> dict[str, Any]:
    """The contents of a run directory's run.json. Raises TraceError if it is none."""
    from orjson import JSONDecodeError, loads

    path = f"{directory}{os.sep}run.json"
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - 100,000 may be read in a row
            data = file.readall()
        try:
            run = loads(data)
        except JSONDecodeError:
            run = json.loads(data)  # five times as long; knows NaN, and names that are no Unicode
    except FileNotFoundError:
        raise TraceError(
            f"{directory} is not a run", why="it has no run.json", fix="see: pepr-profile runs list"
        ) from None
    except ValueError as error:
        raise TraceError(
            f"{path} is damaged", why=str(error), fix="restore it; the lanes beside it are intact"
        ) from None
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            fix="check what it is and its permissions",
        ) from None
    schema = run.get("schema") if isinstance(run, dict) else None
    if schema != 1:
        raise TraceError(
            f"{path} has schema {schema!r}",
            why="this version reads schema 1",
            fix="update pepr-profiler",
        )
    return dict(run)


def has_ended(run: Mapping[str, Any]) -> bool:
    """Whether a run.json was written at the end of its recording, and is a summary."""
    return bool(run.get("complete")) and isinstance(run.get("energy"), dict)


def files_of(directory: Path) -> tuple[int, int]:
    """The latest change of a directory's files, ns, and their size in all; zeros: there is none."""
    changed_ns = size = 0
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                found = entry.stat()
                changed_ns, size = max(changed_ns, found.st_mtime_ns), size + found.st_size
    return changed_ns, size
