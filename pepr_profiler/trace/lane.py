"""One lane on disk: the rows that a driver read, written while the run goes on.

`LANE.arrows` is an Arrow IPC stream with the columns `t_ns` (when the read began), `read_ns` (how
long it took, at most 4.29 s), `skipped`, `gap_ns`, and a float64 for each channel. The schema's
metadata says what a channel is.

- Small batches, one a flush, would cost more bytes than their numbers. So they are appended to
  `LANE.tail.arrows`, and moved to the main stream as one large batch now and then. A crash between
  the two leaves rows in both; a reader drops those that it has seen.
- Of a large batch, rows are left out between which every counter follows a line and every gauge
  keeps its level (csrc/recording/thin.h). `skipped` says how many were left out just before a row,
  and `gap_ns` how long before it the last of them was read, so that a quiet stretch does not look
  like a gap. Around a gap nothing is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.errors import TraceError
from pepr_profiler.record import Any, Floats, Ints, Record
from pepr_profiler.trace import arrow
from pepr_profiler.trace.files import read_file
from pepr_profiler.trace.shape import MALFORMED, shape_error


class Channel(Record):
    """What one recorded number is; see `Channel` in csrc/sensors/sensor.h."""

    name: str
    quantity: str
    unit: str
    scale: float = 1.0
    modulus: float = 0.0
    counter: bool = False
    source: str = ""
    labels: Mapping[str, str] = {}

    @property
    def device(self) -> str:
        """The device in the name: UUID of `UUID/energy`; a name without a slash is a device."""
        return self.name.rpartition("/")[0] or self.name

    @property
    def reading(self) -> str:
        """What of the device is read: energy of `UUID/energy`."""
        return self.name.rpartition("/")[2]


class LaneInfo(Record):
    """One driver's part of a recording."""

    name: str
    spec: str
    period_ns: int
    channels: tuple[Channel, ...]


def describe(channels: Iterable[Any]) -> tuple[Channel, ...]:
    """The native core's channels as plain data."""
    return tuple(Channel(*(getattr(c, name) for name in Channel._fields)) for c in channels)


class Batch(Record):
    """Rows of one lane: `t_ns`, `read_ns` int64 (n,), `values` float64 (channels, n) as recorded.

    A recorded value times its channel's `scale` is in the channel's unit; NaN is unknown.
    `skipped` int64 (n,) says how many rows were read just before a row and left out; in them, the
    same channels were unknown as in the row. `since_read_ns` int64 (n,) is the time since the row
    before was read, left out or not. Both are None if nothing was left out.
    """

    t_ns: Ints
    read_ns: Ints
    values: Floats
    skipped: Ints | None = None
    since_read_ns: Ints | None = None

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
            None if self.since_read_ns is None else self.since_read_ns[row:],
        )


class LaneWriter:
    """Writes one lane's files.

    The journal writes there what a sampler reads; `write` is for rows that come from elsewhere.
    Rows that the disk does not take are kept for later, in bounds (csrc/recording/lane_file.h).
    """

    def __init__(self, directory: Path, lane: LaneInfo) -> None:
        self.lane = lane
        self.file = _core.LaneFile(
            str(directory / lane.name),
            arrow.schema_message(schema_of(lane)),
            _thin_rules(lane.channels),
        )

    @property
    def error(self) -> OSError | None:
        """Why the last write failed, None if it did not."""
        code = self.file.error
        return OSError(code, os.strerror(code)) if code else None

    def write(self, t_ns: bytes, read_ns: bytes, values: Sequence[bytes]) -> None:
        """Appends rows as native-endian columns and waits for the disk; see `error` then."""
        self.file.append(t_ns, read_ns, values)
        self.file.flush()

    def move_to(self, directory: Path) -> None:
        """Goes on in another directory, with what was written. Raises OSError if that fails."""
        if code := self.file.move_to(str(directory / self.lane.name)):
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """Writes what is left as a last large batch and removes the tail."""
        self.file.flush(last=True)


def _thin_rules(channels: Sequence[Channel]) -> list[tuple[str, float]]:
    """How sparsely each channel may be stored (docs/design.md, Store what a line does not say)."""
    modules = {c.device for c in channels if c.source.startswith("nvml-module")}
    counted = {c.device for c in channels if c.quantity == "energy"} - modules
    return [
        ("line", LINE_STEPS if c.quantity == "energy" else _FINE_LINE_STEPS)
        if c.counter
        else ("hold", 0.0)
        if c.quantity == "identity"  # a PID is no quantity: the next number is another process
        else ("hold", _HOLD)
        if c.quantity == "power" and c.device not in counted
        else ("level", LEVEL_S)
        for c in channels
    ]


LINE_STEPS = 0.25
"""What a counter's stored line may be off by, in parts of a refresh's energy; u includes it."""

_FINE_LINE_STEPS = 0.06
"""The same for CPU times, which are compared with each other in windows of 1 s."""

_HOLD = 0.01
"""What power that is integrated may be off by, relative."""

LEVEL_S = 0.25
"""What the integral of any other gauge may be off by: its level for a quarter of a second."""


_ROW_COLUMNS = (
    arrow.Column("t_ns", "<i8", {"unit": "ns", "clock": "CLOCK_MONOTONIC"}),
    arrow.Column("read_ns", "<u4", {"unit": "ns"}),
    arrow.Column("skipped", "<u4", {"unit": "1"}),
    arrow.Column("gap_ns", "<u4", {"unit": "ns"}),
)
"""The columns before the channels'. Recordings of before rows were left out have the first two."""


def schema_of(lane: LaneInfo) -> arrow.Schema:
    channels = (
        arrow.Column(
            channel.name,
            "<f8",
            {
                "quantity": channel.quantity,
                "unit": channel.unit,
                "scale": repr(channel.scale),
                "modulus": repr(channel.modulus),
                "counter": json.dumps(channel.counter),
                "source": channel.source,
                "labels": json.dumps(channel.labels),
            },
        )
        for channel in lane.channels
    )
    facts = {"pepr": "1", "lane": lane.name, "spec": lane.spec, "period_ns": str(lane.period_ns)}
    return arrow.Schema((*_ROW_COLUMNS, *channels), facts)


class _EmptyLaneError(TraceError):
    """The schema of a lane was not written whole, nor was anything behind it."""


class LaneReader:
    """Iterates the batches of one lane of a run directory, in time order, each row once.

    Raises TraceError if the file is not a recording of ours. A torn tail ends the iteration; what
    was flushed before it is all there.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._main = directory / f"{name}.arrows"
        # The tail first: rows that move to the main stream while we look are then seen twice and
        # dropped once, instead of being missed.
        self._tail = _read_tail(directory / f"{name}.tail.arrows")
        schema = self._schema_in(self._main) or self._schema_in(self._tail)
        if schema is None:
            raise _EmptyLaneError(
                f"lane '{name}' of {directory} is empty",
                why="the recording ended before its first flush",
                fix="nothing can be recovered from this lane",
            )
        self._schema = schema
        try:
            self.lane = _lane_of(schema)
        except MALFORMED as error:
            pepr = schema.facts.get("pepr", "nothing")
            damage = f"its schema describes no lane ({type(error).__name__}: {error})"
            raise TraceError(
                f"{self._main} is not a pepr recording of a version that this one reads",
                why=damage if pepr == "1" else f"its schema says pepr={pepr!r}",
                fix="update pepr-profiler, or point at a run directory that it wrote",
            ) from error
        if self.lane.name != name:
            raise _of_another_lane(self._main, f"its schema says lane {self.lane.name!r}")

    def __iter__(self) -> Iterator[Batch]:
        import numpy as np

        seen_ns = -1
        for source in (self._main, self._tail):
            schema = self._schema_in(source)
            if schema is None:
                continue  # not yet written
            if schema != self._schema:
                raise _of_another_lane(self._main, "its tail is of another lane")
            for batch in _batches(source, self._schema):
                fresh = int(np.searchsorted(batch.t_ns, seen_ns, side="right"))
                if fresh:
                    batch = batch.since(fresh)  # noqa: PLW2901
                if len(batch.t_ns):
                    seen_ns = int(batch.t_ns[-1])
                    yield batch

    def _schema_in(self, source: Path | bytes) -> arrow.Schema | None:
        try:
            return arrow.read_schema(source)
        except arrow.DamagedError as error:
            raise TraceError(
                f"{self._main} is not an Arrow stream",
                why=str(error),
                fix="point at a run directory that pepr-profile wrote",
            ) from None
        except OSError as error:
            raise _unreadable(self._main, error) from None


def lane_names(directory: Path) -> list[str]:
    """All lanes of a run, also those of which no row was written."""
    return sorted({path.name.split(".")[0] for path in directory.glob("*.arrows")})


def read_lanes(directory: Path) -> dict[str, LaneReader]:
    """A reader for each lane that holds rows."""
    readers = {}
    for name in lane_names(directory):
        with suppress(_EmptyLaneError):  # a crash before its first flush must not hide the others
            readers[name] = LaneReader(directory, name)
    return readers


_JOINED_ROWS = 1 << 15
"""So many rows are handled at once: of fewer, the calls cost more than the numbers."""


def joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same rows in fewer batches: of a stored one, as few as 60 rows may be left.

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

    times = (column(name) for name in ("skipped", "since_read_ns"))
    values = np.concatenate([batch.values for batch in batches], axis=1)
    return Batch(column("t_ns"), column("read_ns"), values, *times)


_MOST_TAIL_BYTES = 1 << 30
"""The size of a tail, which is read whole; it has 16 MB unless the disk was full."""


def _read_tail(path: Path) -> bytes:
    try:
        return read_file(path, most_bytes=_MOST_TAIL_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unreadable(path, error) from None


def _of_another_lane(path: Path, why: str) -> TraceError:
    return TraceError(
        f"{path} holds another lane than its name says", why=why, fix="copy the run again"
    )


def _unreadable(path: Path, error: OSError) -> TraceError:
    return TraceError(
        f"{path} cannot be read",
        why=error.strerror or str(error),
        fix="check what it is and its permissions",
    )


def _lane_of(schema: arrow.Schema) -> LaneInfo:
    """The lane that a schema describes; raises one of MALFORMED if it describes none."""
    if schema.facts["pepr"] != "1":
        raise ValueError("it is of another version")
    columns = [(column.name, column.form) for column in schema.columns]
    of_row = [(column.name, column.form) for column in _ROW_COLUMNS]
    first = next((n for n in (len(of_row), 2) if columns[:n] == of_row[:n]), 0)
    if not first or {form for _, form in columns[first:]} != {"<f8"}:
        raise ValueError(f"its columns are {columns[:9]}")
    channels = []
    for column in schema.columns[first:]:
        facts = column.facts
        counter, labels = json.loads(facts["counter"]), json.loads(facts["labels"])
        if wrong := shape_error(counter, bool) or shape_error(labels, {...: str}):
            raise ValueError(f"of {column.name}, {wrong}")
        channels.append(
            Channel(
                name=column.name,
                quantity=facts["quantity"],
                unit=facts["unit"],
                scale=_number(facts["scale"]),
                modulus=_number(facts["modulus"], least=0.0),
                counter=counter,
                source=facts["source"],
                labels=labels,
            )
        )
    period_ns = int(_number(schema.facts["period_ns"], least=1.0))
    return LaneInfo(schema.facts["lane"], schema.facts["spec"], period_ns, tuple(channels))


def _number(text: str, *, least: float = -1e30) -> float:
    value = float(text)
    if not least <= value <= 1e30:
        raise ValueError(f"{text} is out of range")
    return value


_LAST_NS = 1 << 62
"""The uptime of a machine that has run for 146 years."""

_MOST = 2.0**64
"""No register that is read holds more; a larger number is taken to be unknown."""


def _batches(source: Path | bytes, schema: arrow.Schema) -> Iterator[Batch]:
    """The batches of a lane's stream, up to the first that is torn, or whose times do not rise."""
    import numpy as np

    forms = [column.form for column in schema.columns]
    channels = forms.count("<f8")
    last_ns = -1
    for numbers in arrow.read_batches(source, forms):
        t_ns = numbers[0].view(np.int64)
        if t_ns[0] <= last_ns or t_ns[-1] > _LAST_NS or not (t_ns[1:] > t_ns[:-1]).all():
            return
        last_ns = int(t_ns[-1])
        times = [column.astype(np.int64) for column in numbers[1:-channels]]
        values = np.vstack(numbers[-channels:])
        values[np.abs(values) > _MOST] = np.nan  # one flipped bit would drown all others
        yield Batch(t_ns, times[0], values, *times[1:])
