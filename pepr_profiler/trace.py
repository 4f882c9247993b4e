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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pepr_profiler import _core, arrow
from pepr_profiler.errors import TraceError
from pepr_profiler.record import Record

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np
    from numpy.typing import NDArray

RUN_DIR_VARIABLE = "PEPR_RUN_DIR"
"""Names the run that a process is already part of; `profile()` joins it."""


class Channel(Record):
    """What one recorded number is; see `Channel` in csrc/sensor.h."""

    name: str
    quantity: str
    unit: str
    scale: float = 1.0
    modulus: float = 0.0
    counter: bool = False
    source: str = ""
    labels: Mapping[str, str] = {}


class Lane(Record):
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
    """One lane's files: the journal writes there what a sampler reads, we what we are given.

    Rows that the disk does not take are kept for later, in bounds (csrc/lane_file.h).
    """

    def __init__(self, directory: Path, lane: Lane) -> None:
        self.lane = lane
        self.file = _core.LaneFile(
            str(directory / lane.name),
            arrow.schema_message(_schema_of(lane)),
            _thin_rules(lane.channels),
        )

    @property
    def error(self) -> OSError | None:
        """Why the last write failed, None if it did not."""
        code = self.file.error
        return OSError(code, os.strerror(code)) if code else None

    def write(self, t_ns: bytes, read_ns: bytes, values: Sequence[bytes]) -> None:
        """Appends rows given as native-endian columns; on disk when it returns, unless `error`."""
        self.file.take(t_ns, read_ns, values)
        self.file.flush()

    def close(self) -> None:
        """Writes what is left as a last large batch and removes the tail."""
        self.file.flush(last=True)


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


_OF_THE_ROW = (
    arrow.Column("t_ns", "<i8", {"unit": "ns", "clock": "CLOCK_MONOTONIC"}),
    arrow.Column("read_ns", "<u4", {"unit": "ns"}),
    arrow.Column("skipped", "<u4", {"unit": "1"}),
    arrow.Column("gap_ns", "<u4", {"unit": "ns"}),
)
"""The columns before the channels'; of recordings in which nothing was left out, the first two."""


def _schema_of(lane: Lane) -> arrow.Schema:
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
    return arrow.Schema((*_OF_THE_ROW, *channels), facts)


MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What a file that is not ours, or damaged, may raise where it is used as if it were."""


def misfit(value: Any, shape: Any, at: str = "") -> str:  # noqa: PLR0911 - one a kind of shape
    """What of `value` (JSON) has not this shape, as "energy.total_j is 'x'"; "" if all has.

    A shape is a type (float is any finite number, int one of 64 bits), None, a tuple of shapes of
    which one fits, `[shape]` for a list, or a dict: of each key that is there, with `...` for all
    others, and with None the keys that must be there. Keys that it does not name are of later
    versions.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _unfit(value, at)
        for key, item in value.items():
            inner = shape.get(key, shape.get(...))
            if inner is not None and (wrong := misfit(item, inner, f"{at}.{key}" if at else key)):
                return wrong
        lacking = (key for key in shape.get(None, ()) if key not in value)
        return next((f"{at or 'it'} has no {key}" for key in lacking), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _unfit(value, at)
        items = (misfit(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value))
        return next(filter(None, items), "")
    if isinstance(shape, tuple):
        found = [misfit(value, one, at) for one in shape]
        # Of a structure or null, what is wrong inside the structure.
        inside = (wrong for wrong in found if not wrong.startswith(f"{at or 'it'} is "))
        return "" if "" in found else next(inside, found[0])
    if shape is None:
        return "" if value is None else _unfit(value, at)
    kind = type(value)
    if shape is float:
        fits = kind in (float, int) and -1e300 < value < 1e300
    elif shape is int:
        fits = kind is int and -(2**63) <= value < 2**63
    else:
        fits = kind is shape
    return "" if fits else _unfit(value, at)


def _unfit(value: Any, at: str) -> str:
    return f"{at or 'it'} is {str(value)[:40]!r}"


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

    def __iter__(self) -> Iterator[Batch]:
        import numpy as np

        seen_ns = -1
        for source in (self._main, self._tail):
            if self._schema_in(source) != self._schema:
                continue  # not yet written
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


def lane_names(directory: Path) -> list[str]:
    """All lanes, those too of which nothing was written."""
    return sorted({path.name.split(".")[0] for path in directory.glob("*.arrows")})


def read_lanes(directory: Path) -> dict[str, LaneReader]:
    """A reader for each lane that holds rows."""
    readers = {}
    for name in lane_names(directory):
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


def _lane_of(schema: arrow.Schema) -> Lane:
    """The lane that a schema describes; raises one of MALFORMED if it describes none."""
    if schema.facts["pepr"] != "1":
        raise ValueError("it is of another version")
    columns = [(column.name, column.form) for column in schema.columns]
    about = [(column.name, column.form) for column in _OF_THE_ROW]
    first = next((n for n in (len(about), 2) if columns[:n] == about[:n]), 0)
    if not first or {form for _, form in columns[first:]} != {"<f8"}:
        raise ValueError(f"its columns are {columns[:9]}")
    channels = []
    for column in schema.columns[first:]:
        told = column.facts
        counter, labels = json.loads(told["counter"]), json.loads(told["labels"])
        if wrong := misfit(counter, bool) or misfit(labels, {...: str}):
            raise ValueError(f"of {column.name}, {wrong}")
        channels.append(
            Channel(
                name=column.name,
                quantity=told["quantity"],
                unit=told["unit"],
                scale=_number(told["scale"]),
                modulus=_number(told["modulus"], least=0.0),
                counter=counter,
                source=told["source"],
                labels=labels,
            )
        )
    period_ns = int(_number(schema.facts["period_ns"], least=1.0))
    return Lane(schema.facts["lane"], schema.facts["spec"], period_ns, tuple(channels))


def _number(text: str, *, least: float = -1e30) -> float:
    value = float(text)
    if not least <= value <= 1e30:
        raise ValueError(f"{text} is out of range")
    return value


_LAST_NS = 1 << 62
"""A machine that runs for 146 years."""


_MOST = 2.0**64
"""No register that is read holds more; what seems to is unknown."""


def _batches(source: Path | bytes, schema: arrow.Schema) -> Iterator[Batch]:
    """The batches of a lane's stream, up to the first that is torn or damaged: times rise."""
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
        values[np.abs(values) > _MOST] = np.nan  # one flipped bit would else drown all others
        yield Batch(t_ns, times[0], values, *times[1:])


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
        self._open()
        try:
            os.write(self._fd, line.encode() + b"\n")
        except OSError:
            self.lost += 1

    def begin(self, name: str, number: int, parent: int | None) -> int:
        """A phase begins now: at this instant, ns."""
        self._open()  # which takes longer than a mark, and is none of the phase's time
        t_ns, up = time.monotonic_ns(), "null" if parent is None else str(parent)
        self.write(f'{{"event":"begin","t_ns":{t_ns},"id":{number},"parent":{up},"name":{name}}}')
        return t_ns

    def end(self, number: int) -> int:
        """The phase with this number ends now: at this instant, ns."""
        t_ns = time.monotonic_ns()
        self.write(f'{{"event":"end","t_ns":{t_ns},"id":{number}}}')
        return t_ns

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
        if self._pid == os.getpid():
            return
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


class Phase(Record):
    """One pass through a phase; `end_ns` is None if it never ended.

    `series` is whose mark began it; None for a program's own block, which no mark ends.
    """

    name: str
    begin_ns: int
    end_ns: int | None
    nested: bool
    series: str | None = None


class Events(Record):
    """What the programs of a run marked and logged, in time order."""

    phases: tuple[Phase, ...]
    metrics: tuple[tuple[int, dict[str, Any]], ...]
    torn_lines: int


_EVENT = {"t_ns": int, "id": int, "metrics": {}}
"""What of an event is computed with; see EventWriter."""


def _lines_of(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError:
        return []


def read_events(directory: Path) -> Events:
    """Reads every events file of a run directory; a torn last line is counted, not fatal."""
    phases: list[Phase] = []
    metrics: list[tuple[int, dict[str, Any]]] = []
    marks: list[_Mark] = []
    torn = 0
    for path in sorted(directory.glob("events-*.jsonl")):
        open_phases: dict[int, dict[str, Any]] = {}
        for line in _lines_of(path):
            try:
                event = json.loads(line)
                kind = event["event"]
                if wrong := misfit(event, _EVENT):
                    raise ValueError(wrong)
                t_ns = event["t_ns"]
                if kind == "begin":
                    _ = event["name"]
                    # A program that replaced itself (exec) kept its pid and counts from 1 again.
                    if event["id"] in open_phases:
                        phases.append(_phase(open_phases[event["id"]], None))
                    open_phases[event["id"]] = event
                elif kind == "end":
                    begin = open_phases.pop(event["id"], None)
                    if begin is not None:
                        phases.append(_phase(begin, t_ns))
                elif kind == "mark":
                    marks.append(_Mark.of(event))
                elif kind == "metrics":
                    metrics.append((t_ns, event["metrics"]))
            except MALFORMED:
                torn += 1
        phases.extend(_phase(begin, None) for begin in open_phases.values())
    phases.extend(_marked(marks))
    phases.sort(key=lambda phase: phase.begin_ns)
    metrics.sort(key=lambda item: item[0])
    return Events(tuple(phases), tuple(metrics), torn)


class _Mark(Record):
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
        for line in _lines_of(path):
            with suppress(*MALFORMED):
                note = json.loads(line)
                if not misfit(note, _NOTE) and note.keys() >= _NOTED[note["event"]]:
                    notes.append(note)
    return sorted(notes, key=lambda note: int(note["t_ns"]))


_NOTE = {
    "t_ns": int,
    "since_ns": int,
    "pid": int,
    "profiler_s": float,
    "owner": str,
    "command": (str, None),
    "user": (str, None),
    "processes": [{"cpu_s": float, "pid": int, "command": (str, None), "user": (str, None)}],
}
_NOTED = {"process": {"t_ns", "pid"}, "cpu": {"t_ns", "since_ns", "profiler_s", "processes"}}
"""What is computed with of a note, by its kind; see neighbours.py."""


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


def read_run(directory: Path, *, believed: bool = False) -> dict[str, Any]:
    """The contents of a run directory's run.json. Raises TraceError if it is none.

    Where it is `believed`, as one of very many, its shape is not looked at, which takes 0.7 ms, 20
    times as long as the rest: what uses it must then expect any of MALFORMED.
    """
    path = f"{directory}{os.sep}run.json"
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - 100,000 may be read in a row
            data = file.readall()
        run = _loads_quickly(data) if believed else json.loads(data)
    except FileNotFoundError:
        raise TraceError(
            f"{directory} is not a run", why="it has no run.json", fix="see: pepr-profile runs list"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
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
    if wrong := "" if believed else misfit(run, _RUN):
        raise _damaged(path, wrong)
    return dict(run)


def _loads_quickly(data: bytes) -> Any:
    """In a fifth of the time that json takes; but importing it takes 2 MB."""
    from orjson import JSONDecodeError, loads

    try:
        return loads(data)
    except JSONDecodeError:
        return json.loads(data)  # knows NaN, and names that are no Unicode


def _damaged(path: str, why: str) -> TraceError:
    return TraceError(
        f"{path} is damaged", why=why, fix="restore it; the lanes beside it are intact"
    )


_Shape: TypeAlias = "dict[Any, Any]"
_TEXT, _NUMBER, _COUNT, _BY_NAME = (
    (str, None),
    (float, None),
    (int, None),
    ({...: (float, None)}, None),
)
_WARNING: _Shape = {None: ("code", "text", "hint"), ...: str}
_COMPONENT: _Shape = {
    None: ("id", "kind", "source", "provenance", "label", "in_total", "job_j", "u_j", "trace_w"),
    **dict.fromkeys(("id", "kind", "source", "provenance", "label"), str),
    **dict.fromkeys(("device_j", "job_j", "others_j", "idle_j", "idle_w", "job_idle_j"), _NUMBER),
    **dict.fromkeys(("u_j", "mean_w", "max_w"), _NUMBER),
    "in_total": bool,
    "excluded": _TEXT,
    "trace_w": ([_NUMBER], None),
    "budget": ({None: ("gain_j", "offset_j", "model_j"), ...: _NUMBER}, None),
    "cross_check": ({"source": str, "energy_j": _NUMBER, "difference_j": _NUMBER}, None),
}
_ENERGY: _Shape = {
    None: ("total_j", "u_j", "mean_w", "provenance", "components"),
    **dict.fromkeys(("total_j", "u_j", "mean_w", "others_j", "idle_j"), _NUMBER),
    "provenance": _TEXT,
    "scope": str,
    "components": [_COMPONENT],
}
_PHASE: _Shape = {
    None: ("name", "count", "duration_s", "energy_j", "u_j"),
    **{"name": str, "count": int, "duration_s": float, "energy_j": _NUMBER, "u_j": _NUMBER},
}
_PROGRESS: _Shape = {
    None: ("t_s", "energy_j", "u_j", "metrics", "left_out"),
    **{"t_s": [float], "energy_j": ([float], None), "u_j": ([float], None)},
    **{"metrics": {...: [_NUMBER]}, "left_out": int},
}
_COST: _Shape = {
    **dict.fromkeys(("cpu_s", "cpu_fraction", "samples", "dropped"), _NUMBER),
    **dict.fromkeys(("late", "timed", "failed_reads"), _NUMBER),
    **dict.fromkeys(("rate_hz", "refresh_s", "wasted"), _BY_NAME),
    "overhead": ({"budget": float, "used": float, "gap_s": {...: float}}, None),
}
_PEAKS = ("peak_rss_bytes", "gpu_peak_bytes")
_INTENSITY: _Shape = {
    **{"g_per_kwh": float, "source": str, "year": _COUNT},
    **dict.fromkeys(("region", "iso3"), _TEXT),
}
_RECORDING: _Shape = {
    "window_ns": [_COUNT],
    "profiler_pid": _COUNT,
    "cpu": {...: (str, int, None)},
    "options": {
        "intensity": (_INTENSITY, None),
        **{"pue": float, "performance": _TEXT, "scope": str},
    },
    "attached": ([{"pid": int, "command": [str]}], None),
    "root": str,
    "cuda": [{...: _TEXT}],
    "outer": ({None: ("run_id",), "run_id": str, "pid": _COUNT}, None),
    "exit": ({"ended_by": _TEXT, "max_rss_bytes": _NUMBER}, None),
    "sampler": (_COST, None),
    "daemon": (
        {
            **{"socket": _TEXT, "version": _TEXT, "reconnects": _COUNT},
            "lanes": {...: {"spec": str, "coarse": bool}},
        },
        None,
    ),
    "warnings": [_WARNING],
}
_RUN: _Shape = {
    **dict.fromkeys(("run_id", "name", "host"), str),
    **dict.fromkeys(("job", "experiment", "boot_id", "started_at"), _TEXT),
    **dict.fromkeys(("duration_s", "time_s"), _NUMBER),
    **dict.fromkeys(("exit_code", "signal"), _COUNT),
    "command": [str],
    "complete": bool,
    "clock": [{None: ("t_ns", "unix_ns"), "t_ns": int, "unix_ns": int}],
    "energy": (_ENERGY, None),
    "phases": [_PHASE],
    "memory": {None: _PEAKS, **dict.fromkeys(_PEAKS, _NUMBER)},
    "carbon": ({None: ("g_co2e",), "g_co2e": _NUMBER, "source": str, "year": _COUNT}, None),
    "metrics": {...: _NUMBER},
    "progress": (_PROGRESS, None),
    "performance": ({None: ("metric", "value"), "metric": str, "value": float}, None),
    "sampler": _COST,
    "missing": [{None: ("what", "why", "fix"), ...: str}],
    "warnings": [_WARNING],
    "recording": _RECORDING,
}
"""The shape of run.json (docs/design.md, Contract); what is not there is looked for where it is
used."""


def has_ended(run: Mapping[str, Any]) -> bool:
    """Whether a run.json is a summary; what lacks some of it is to be summarised anew."""
    return bool(run.get("complete")) and bool(run.get("energy")) and run.keys() >= _ALWAYS


_ALWAYS = {
    *("run_id", "name", "experiment", "job", "command", "host", "started_at", "exit_code"),
    *("duration_s", "time_s", "memory", "carbon", "metrics", "performance"),
}
"""What every summary has had from the first version on."""


def files_of(directory: Path) -> tuple[int, int]:
    """The latest change of a directory's files, ns, and their size in all; zeros: there is none."""
    changed_ns = size = 0
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                found = entry.stat()
                changed_ns, size = max(changed_ns, found.st_mtime_ns), size + found.st_size
    return changed_ns, size
