"""Many runs at once: a column a fact, from summaries or from the index of a store.

What a list shows, a filter asks and a comparison weighs of 100,000 runs is a few arrays; as many
dicts take twenty times as long to make as the scores do. `Columns` are these arrays, `write` and
`Saved` keep them in a file beside a text a run, which holds what else a summary says.
"""

from __future__ import annotations

import json
import math
import os
import weakref
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pepr_profiler.trace.shape import MALFORMED

Floats: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.intp]

_FORM = 5  # of the file: another one is none of ours

STATES = ("done", "failed", "incomplete")
"""How a run may have ended: with status 0 (or none, if it was attached to), otherwise, or not."""

TEXTS = (
    *("id", "recorded_id", "started_at", "experiment", "name", "host", "job", "outer"),
    *("provenance", "scope", "state", "metric", "why", "fix"),
)
NUMBERS = (
    *("duration_s", "time_s", "exit_code", "signal", "total_j", "u_j"),
    *("peak_rss_bytes", "gpu_peak_bytes", "g_co2e", "performance"),
)
CAUSES = ("gain_j", "offset_j", "model_j")
"""Of an error budget, what other runs on the same device share."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Texts (n,), each one of `values` (None is unknown), which are told apart by their number."""

    values: Sequence[str | None]
    codes: npt.NDArray[np.int32]

    def at(self, rows: npt.NDArray[Any]) -> Coded:
        return Coded(self.values, self.codes[rows])

    def followed_by(self, other: Coded) -> Coded:
        number: dict[str | None, int] = {}
        for code, value in enumerate(self.values):
            number.setdefault(value, code)
        values = list(self.values)
        renumbered = []
        for value in other.values:
            if value not in number:
                number[value] = len(values)
                values.append(value)
            renumbered.append(number[value])
        codes = np.array(renumbered, dtype=np.int32)[other.codes]
        return Coded(values, np.concatenate((self.codes, codes)))

    def list(self) -> list[str | None]:
        values = self.values
        return [values[code] for code in self.codes.tolist()]

    def where(self, wanted: npt.NDArray[np.bool_] | Sequence[bool]) -> npt.NDArray[np.bool_]:
        """Which rows (n,) have one of the values of which `wanted` says so."""
        result: npt.NDArray[np.bool_] = np.asarray(wanted, dtype=np.bool_)[self.codes]
        return result

    def equal(self, value: str | None) -> npt.NDArray[np.bool_]:
        return self.where([one == value for one in self.values])

    def groups(self) -> dict[str | None, Rows]:
        """The rows of each value, in the order in which the values appear."""
        order = np.argsort(self.codes, kind="stable")
        codes = self.codes[order]
        begins = np.flatnonzero(np.diff(codes, prepend=-1))
        parts = np.split(order, begins[1:])
        parts.sort(key=lambda rows: int(rows[0]) if len(rows) else -1)
        return {self.values[self.codes[rows[0]]]: rows for rows in parts if len(rows)}

    @property
    def distinct(self) -> bool:
        """Whether no two rows have the same value."""
        return len(np.unique(self.codes)) == len(self.codes)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Entries (k,), any number a row, in the order of the rows (k,) that they belong to.

    `label` says what an entry is of, `values` (c, k) are its numbers.
    """

    rows: npt.NDArray[np.int32]
    label: Coded
    values: Floats

    @classmethod
    def of(cls, entries: Sequence[tuple[int, str, Sequence[float]]], width: int) -> Ragged:
        values = np.array([values for _, _, values in entries], dtype=np.float64).reshape(-1, width)
        number: dict[str | None, int] = {}
        codes = [number.setdefault(label, len(number)) for _, label, _ in entries]
        return cls(
            np.array([row for row, _, _ in entries], dtype=np.int32),
            Coded(list(number), np.array(codes, dtype=np.int32)),
            np.ascontiguousarray(values.T),
        )

    def at(self, rows: npt.NDArray[Any]) -> Ragged:
        """The entries of some rows, which are numbered anew."""
        rows = rows.astype(self.rows.dtype)  # else all of the others are converted, each time
        begins = np.searchsorted(self.rows, rows, "left")
        ends = np.searchsorted(self.rows, rows, "right")
        counts = ends - begins
        moved = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        # The first of each row, and how far behind it an entry is.
        kept = np.arange(len(moved)) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        return Ragged(moved, self.label.at(kept), self.values[:, kept])

    def followed_by(self, other: Ragged, n: int) -> Ragged:
        return Ragged(
            np.concatenate((self.rows, other.rows + np.int32(n))),
            self.label.followed_by(other.label),
            np.concatenate((self.values, other.values), axis=1),
        )


@dataclass(frozen=True, eq=False)
class Columns:
    """Facts of n runs, in any order.

    `texts` has TEXTS, `numbers` NUMBERS (float64, NaN is unknown). `id` is what a run is called
    here, `recorded_id` what it was called when it was recorded, `outer` the run that it lies in.
    `metric` and `performance` are its own. `commands` are kept where the name of a run says nothing
    of its model, as it is its script's, else None. `metrics` are labelled by name, with a value;
    `errors` by device, with CAUSES, for each device in the total. A run of which only is known that
    it cannot be read has no `state`, but `why` and `fix`.
    """

    texts: Mapping[str, Coded]
    numbers: Mapping[str, Floats]
    commands: Sequence[Sequence[str] | None]
    metrics: Ragged
    errors: Ragged

    def __len__(self) -> int:
        return len(self.commands)

    @classmethod
    def of(cls, runs: Iterable[Facts]) -> Columns:
        """Of what `facts_of` and `unreadable` told of each run."""
        # As the runs come, for they may be 100,000 and just being read.
        number: list[dict[str | None, int]] = [{} for _ in TEXTS]
        codes = [array("i") for _ in TEXTS]
        numbers = array("d")
        commands: list[Sequence[str] | None] = []
        metrics: list[tuple[int, str, tuple[float, ...]]] = []
        errors: list[tuple[int, str, tuple[float, ...]]] = []
        for i, facts in enumerate(runs):
            for seen, column, text in zip(number, codes, facts.texts, strict=True):
                column.append(seen.setdefault(text, len(seen)))
            numbers.extend(facts.numbers)
            commands.append(facts.command)
            metrics += [(i, *entry) for entry in facts.metrics]
            errors += [(i, *entry) for entry in facts.errors]
        coded = [
            Coded(list(seen), np.array(column, dtype=np.int32))
            for seen, column in zip(number, codes, strict=True)
        ]
        table = np.array(numbers).reshape(-1, len(NUMBERS))
        return cls(
            texts=dict(zip(TEXTS, coded, strict=True)),
            numbers=dict(zip(NUMBERS, np.ascontiguousarray(table.T), strict=True)),
            commands=commands,
            metrics=Ragged.of(metrics, 1),
            errors=Ragged.of(errors, len(CAUSES)),
        )

    def at(self, rows: npt.NDArray[Any]) -> Columns:
        """Those of some rows, each at most once, in the order of `rows`."""
        commands = self.commands
        return Columns(
            texts={name: column.at(rows) for name, column in self.texts.items()},
            numbers={name: column[rows] for name, column in self.numbers.items()},
            commands=[commands[i] for i in rows.tolist()],
            metrics=self.metrics.at(rows),
            errors=self.errors.at(rows),
        )

    def followed_by(self, other: Columns) -> Columns:
        return Columns(
            texts={name: one.followed_by(other.texts[name]) for name, one in self.texts.items()},
            numbers={
                name: np.concatenate((one, other.numbers[name]))
                for name, one in self.numbers.items()
            },
            commands=[*self.commands, *other.commands],
            metrics=self.metrics.followed_by(other.metrics, len(self)),
            errors=self.errors.followed_by(other.errors, len(self)),
        )

    def metric(self, name: str) -> Floats:
        """One value a run (n,) of a metric that was logged, NaN where it was not."""
        values = np.full(len(self), np.nan)
        entries = self.metrics.label.equal(name)
        values[self.metrics.rows[entries]] = self.metrics.values[0, entries]
        return values

    def metric_names(self) -> list[str]:
        """What was logged by any of the runs, sorted."""
        label = self.metrics.label
        return sorted(str(label.values[code]) for code in np.unique(label.codes))

    def who(self, row: int) -> str:
        """How a run is called beside others: its id, with its name where that is not in it."""
        name, run_id = (str(self.text(key, row)) for key in ("name", "id"))
        return run_id if run_id.startswith(name) else f"{name} ({run_id})"

    def text(self, key: str, row: int) -> str | None:
        column = self.texts[key]
        return column.values[int(column.codes[row])]


class Facts(NamedTuple):
    """Of one run, what `Columns` have: TEXTS, NUMBERS, the command, and entries (label, values)."""

    texts: Sequence[str | None]
    numbers: Sequence[float]
    command: Sequence[str] | None = None
    metrics: Sequence[tuple[str, tuple[float]]] = ()
    errors: Sequence[tuple[str, tuple[float, ...]]] = ()

    @property
    def state(self) -> str | None:
        return self.texts[TEXTS.index("state")]


def facts_of(run: Mapping[str, Any], *, called: str | None = None) -> Facts:
    """What `Columns` hold of a summary, `called` so here; MALFORMED for what is none."""
    energy, memory = run["energy"], run["memory"]
    carbon, performance = run.get("carbon") or {}, run.get("performance") or {}
    name, host = str(run["name"]), run.get("host")
    outer = (run.get("recording") or {}).get("outer") or {}
    recorded = str(run["run_id"])
    errors = []
    for component in energy.get("components") or ():
        budget = component.get("budget")
        if component["in_total"] and budget:  # without: all of its u counts as the run's own
            device = f"{len(str(host))}:{host}{component['id']}"  # no two are written alike
            errors.append((device, tuple(_number(budget[cause]) for cause in CAUSES)))
    return Facts(
        texts=(
            recorded if called is None else called,
            recorded,
            str(run.get("started_at") or ""),
            _text(run.get("experiment")),
            name,
            _text(host),
            _text(run.get("job")),
            _text(outer.get("run_id")),
            _text(energy.get("provenance")),
            str(energy.get("scope", "job")),
            state_of(run),
            _text(performance.get("metric")),
            "",
            "",
        ),
        numbers=(
            _number(run.get("duration_s")),
            _number(run["time_s"]),
            _number(run["exit_code"]),
            _number(run.get("signal")),
            _number(energy["total_j"]),
            _number(energy.get("u_j")),
            _number(memory.get("peak_rss_bytes")),
            _number(memory.get("gpu_peak_bytes")),
            _number(carbon.get("g_co2e")),
            _number(performance.get("value")),
        ),
        command=_command_of_unnamed(name, run.get("command")),
        metrics=[(str(key), (_number(value),)) for key, value in run["metrics"].items()],
        errors=errors,
    )


def unreadable(called: str, why: str, fix: str) -> Facts:
    """What is known of a run that cannot be read."""
    told = {"id": called, "recorded_id": "", "started_at": "", "name": "", "host": ""}
    texts = {**dict.fromkeys(TEXTS), **told, "why": why, "fix": fix}
    return Facts(list(texts.values()), [math.nan] * len(NUMBERS))


def state_of(run: Mapping[str, Any]) -> str:
    """How a run ended; one of STATES."""
    if not run["complete"]:
        return "incomplete"
    return "failed" if run["exit_code"] else "done"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float:
    """A number; NaN for None and for what a summary should not have in its place."""
    if type(value) is float:
        return value
    if not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds
        return math.nan


def _command_of_unnamed(name: str, command: Any) -> list[str] | None:
    """The command of a run that was given no name: it is called as its script."""
    words = [str(word) for word in command or ()]
    # Most names are in no word, which is quick to see.
    for word in words:
        if name in word:
            path = Path(word)
            if name in (path.name, path.stem, path.suffix[1:]):
                return words
    return None


# --- in a file -----------------------------------------------------------------------------------

Stamps: TypeAlias = npt.NDArray[np.int64]
"""(n, 5): when what was known of each run; see store."""


class Saved:
    """A file as it was when it was opened: `columns`, `stamps` (n, 5), and a text a run on demand.

    What is replaced meanwhile stays readable here, but for a network file system's whims.
    """

    def __init__(self, descriptor: int, columns: Columns, stamps: Stamps, ends: Stamps) -> None:
        self.columns, self.stamps = columns, stamps
        self._descriptor, self._ends = descriptor, ends
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: Path) -> Saved | None:
        """None if there is no file that could be of any use."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return cls(descriptor, *_parsed(descriptor))
        except (OSError, *MALFORMED):
            os.close(descriptor)
            return None  # it is a cache: everything that it could tell is in the runs

    def text(self, row: int) -> bytes:
        """The JSON that was written with a row. OSError if it cannot be read any more."""
        begin, end = int(self._ends[row]), int(self._ends[row + 1])
        text = os.pread(self._descriptor, end - begin, begin)
        if len(text) < end - begin:
            raise OSError("the index is shorter than it was")
        return text


def _parsed(descriptor: int) -> tuple[Columns, Stamps, Stamps]:
    """A file's columns, stamps, and where its texts end; ValueError for what is no such file."""
    from orjson import loads

    first = os.pread(descriptor, _HEAD, 0).split()
    form, check, length, size = (int(field) for field in first)
    data = memoryview(os.pread(descriptor, length, _HEAD) if form == _FORM else b"")
    whole = len(data) == length and size == os.fstat(descriptor).st_size
    if not whole or zlib.crc32(data) != check:
        raise ValueError("another form, or torn")
    at = 8 + int.from_bytes(data[:8], "little")
    head = loads(data[8:at])
    arrays = []
    for dtype, shape in head["arrays"]:
        at = -(-at // 8) * 8
        arrays.append(np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape))
        at += arrays[-1].nbytes
    stamps, ends, numbers, *codes = arrays
    texts, metrics, errors = codes[:-6], codes[-6:-3], codes[-3:]
    columns = Columns(
        texts={name: Coded(head["texts"][name], of) for name, of in zip(TEXTS, texts, strict=True)},
        numbers=dict(zip(NUMBERS, numbers, strict=True)),
        commands=head["commands"],
        metrics=Ragged(metrics[1], Coded(head["metrics"], metrics[0]), metrics[2]),
        errors=Ragged(errors[1], Coded(head["errors"], errors[0]), errors[2]),
    )
    return columns, stamps, ends + (_HEAD + length)


_HEAD = 64
"""Bytes of the first line: form, check sum and length of the columns, length of the file."""


def write(path: Path, columns: Columns, stamps: Stamps, texts: Sequence[bytes]) -> None:
    """Writes a file that `Saved.open` reads: n runs, with a text for each. OSError if it cannot."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    ends = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths)))
    coded = {name: _used(columns.texts[name]) for name in TEXTS}
    metrics, errors = _used(columns.metrics.label), _used(columns.errors.label)
    arrays: list[npt.NDArray[Any]] = [
        *(stamps, ends, np.array([columns.numbers[name] for name in NUMBERS])),
        *(column.codes for column in coded.values()),
        *(metrics.codes, columns.metrics.rows, columns.metrics.values),
        *(errors.codes, columns.errors.rows, columns.errors.values),
    ]
    arrays = [one.astype(one.dtype.newbyteorder("<"), copy=False) for one in arrays]
    head = dump(
        {
            "arrays": [[one.dtype.str, one.shape] for one in arrays],
            "texts": {name: column.values for name, column in coded.items()},
            "commands": columns.commands,
            "metrics": metrics.values,
            "errors": errors.values,
        }
    )
    parts = [len(head).to_bytes(8, "little") + head, *(one.tobytes() for one in arrays)]
    data = b"".join(part + bytes(-len(part) % 8) for part in parts)
    size = _HEAD + len(data) + int(ends[-1])
    first = b"%d %d %d %d" % (_FORM, zlib.crc32(data), len(data), size)
    with path.open("wb") as file:
        file.write(first.ljust(_HEAD - 1) + b"\n" + data)
        file.writelines(texts)


def _used(column: Coded) -> Coded:
    """The same with only the values that a row has."""
    codes, renumbered = np.unique(column.codes, return_inverse=True)
    return Coded([column.values[code] for code in codes], renumbered.astype(np.int32))


def dump(value: Any) -> bytes:
    """JSON; what is no Unicode (a name from a byte string) loses what is not."""
    from orjson import dumps

    try:
        return dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
