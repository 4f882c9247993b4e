"""What is known of all runs of a store: from a cache where it holds, else from their directories.

The index is one file (see columns) beside what each run.json was when it was read: its time, size
and inode. A run.json that is anything else now is read again. The file is only ever replaced whole.
So nothing is locked, which network file systems do badly, and of two that write at once one is
forgotten: its runs are read again next time. Without an index, or with a damaged one, everything
works as it does with one, later.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import shlex
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

from pepr_profiler.errors import PeprError, TraceError
from pepr_profiler.store.columns import (
    CAUSES,
    Columns,
    Facts,
    Rows,
    Saved,
    Stamps,
    dump,
    facts_of,
    unreadable,
    write,
)
from pepr_profiler.trace.run_json import files_of, has_ended, read_run
from pepr_profiler.trace.shape import MALFORMED

_STALE_SHARE = 0.01
"""An index is written anew when more than this share of it was wrong. Reading a run costs some
0.1 ms and writing one again 0.01 ms, so that a large store does not pay for each new run."""

_ABANDONED_S = 3600.0
"""A draft of an index that is older was left by a writer that was killed."""

_NO_FILE = (0, 0, 0)
"""The stamp of a run without a run.json."""

_MERE_FILE = -1
"""In the place of the time in the stamp of what is no directory."""

_ENDED = (-1, 0)
"""In the place of what the files of a run are, where all is in run.json."""

_BITS = (1 << 63) - 1

_Read: TypeAlias = tuple[Facts, tuple[int, ...], bytes]
"""Of a run: its facts, how its files were then (5 numbers), and JSON of what `Found` gives."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which runs are wanted; None is any.

    `name` and `host` are shell patterns (`resnet*`). `since` and `until` are ISO-8601 in UTC, as
    `started_at` is, and half-open: a run that began at `until` is not wanted. `state` is one of
    STATES.
    """

    experiment: str | None = None
    name: str | None = None
    host: str | None = None
    since: str | None = None
    until: str | None = None
    provenance: str | None = None
    state: str | None = None


@dataclass(frozen=True)
class Damaged:
    """A directory of the store that tells of no run, why, and what to do."""

    run_id: str
    why: str
    fix: str


class Found(Sequence[dict[str, Any]]):
    """Runs of a store, oldest first.

    `damaged` are the directories that no filter can be asked of, and those that would have been
    among the runs, but are one of them once more.

    It is a sequence of summaries (docs/design.md, Contract), each made when it is asked for,
    without what only one run's own report shows: of them stay who, where, when, how it ended,
    `time_s`, `energy` (with `components`, and of their `budget` what runs have in common),
    `memory`, `carbon`, `metrics` and `performance`. `Store.load` gives a whole one. `columns` and
    `rows` tell of all of them what comparisons and lists do, at a tenth of the cost.
    """

    def __init__(
        self, columns: Columns, summary: Callable[[int], dict[str, Any]], damaged: Sequence[Damaged]
    ) -> None:
        self.columns = columns
        self.damaged = tuple(damaged)
        self._summary = summary

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Found: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Found:
        if isinstance(index, slice):
            return self.at(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._summary(index % len(self))

    def at(self, rows: Rows) -> Found:
        """Some of them, each at most once, in the order of `rows`."""
        numbers = rows.tolist()
        return Found(self.columns.at(rows), lambda i: self._summary(numbers[i]), self.damaged)

    @property
    def rows(self) -> Iterator[Row]:
        """What a line of a list shows of each, in the same order."""
        columns = self.columns
        texts = [columns.texts[name].list() for name in ("id", "state", "started_at", "metric")]
        numbers = [
            columns.numbers[name].tolist()
            for name in ("duration_s", "exit_code", "total_j", "u_j", "performance")
        ]
        return itertools.starmap(Row, zip(*texts, *numbers, strict=True))

    @property
    def ids(self) -> list[str]:
        """Their ids, in the same order."""
        return [str(name) for name in self.columns.texts["id"].list()]


class Row(NamedTuple):
    """A run in short; numbers that are unknown are NaN, other facts None."""

    run_id: str
    state: str
    started_at: str
    metric: str | None
    duration_s: float
    exit_code: float
    total_j: float
    u_j: float
    performance: float


class Index:
    """A store's runs, and the file that makes many of them quick to list, filter and compare."""

    def __init__(self, path: Path, runs_path: Path) -> None:
        self.path, self.runs_path = path, runs_path
        self._prefix = f"{runs_path}{os.sep}"

    def find(self, names: Sequence[str], wanted: Filter | None = None) -> Found:
        """The runs that are wanted, of the directories of these names."""
        known = self._known(names)
        columns = known.columns
        picked, damaged = _picked(columns, wanted or Filter())
        found = Found(columns, known.summary, damaged)
        return found if picked.all() else found.at(np.flatnonzero(picked))

    def _known(self, names: Sequence[str]) -> _Known:
        """Every directory that may be a run, by time: from the index, or read where that is old."""
        stamps = _stamps(_map(self._stamp, names))
        saved = Saved.open(self.path)
        rows = self._still_true(saved, names, stamps)
        kept = np.sort(rows[rows >= 0])
        old = np.flatnonzero((rows < 0) & (stamps[:, 0] != _MERE_FILE))
        reads = _Reads()
        columns = Columns.of(reads.of(self._read_all([names[i] for i in old.tolist()])))
        known = _Known.of(self._read, saved, kept, columns, reads)
        count = 0 if saved is None else len(saved.columns)
        wrong = count - len(kept) + len(reads)
        if wrong > _STALE_SHARE * count:
            self._write(known)
        return known

    def _still_true(
        self, saved: Saved | None, names: Sequence[str], stamps: Stamps
    ) -> npt.NDArray[np.intp]:
        """The row (n,) of the index that is what would be read now of each name; -1: none is."""
        rows = np.full(len(names), -1, dtype=np.intp)
        if saved is None or not len(saved.columns):
            return rows
        number = {name: i for i, name in enumerate(saved.columns.texts["id"].list())}
        rows[:] = [number.get(name, -1) for name in names]
        then = saved.stamps[rows]
        rows[(then[:, :3] != stamps).any(axis=1)] = -1
        # Of what has no end its files tell, too.
        for i in np.flatnonzero((rows >= 0) & (then[:, 3] != _ENDED[0])).tolist():
            if tuple(then[i, 3:].tolist()) != files_of(self.runs_path / names[i]):
                rows[i] = -1
        return rows

    def _read_all(self, names: Sequence[str]) -> Iterator[_Read | None]:
        """`_read` of each name, in order, the disk being asked for the next ones meanwhile."""

        upcoming = {
            names[i]: names[i + _TRIED : i + 2 * _TRIED] for i in range(0, len(names), _TRIED)
        }

        def read(name: str) -> _Read | None:
            for ahead in upcoming.get(name, ()):
                _will_be_read(f"{self._prefix}{ahead}/run.json")
            return self._read(name)

        return _map(read, names)

    def _write(self, known: _Known) -> None:
        """Replaces the index, where that is possible."""
        path = self.path
        draft = path.with_name(
            f".index-{os.uname().nodename}-{os.getpid()}-{os.urandom(3).hex()}.tmp"
        )
        with suppress(OSError):  # a store that may only be read
            for left in path.parent.glob(".index-*.tmp"):
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    left.unlink(missing_ok=True)
            try:
                write(draft, known.columns, known.stamps, known.texts())
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)

    def _stamp(self, name: str) -> tuple[int, int, int]:
        """Time, size and inode of a run's run.json: see _NO_FILE, _MERE_FILE for one without.

        An atomic replace changes the inode, whatever the clock is worth.
        """
        try:
            # os.stat: a Path costs three times as much, and there may be 100,000.
            found = os.stat(f"{self._prefix}{name}/run.json")  # noqa: PTH116
        except NotADirectoryError:
            return (_MERE_FILE, 0, 0)
        except OSError:
            return _NO_FILE
        # What a file system makes up may have more bits than an index has.
        return (found.st_mtime_ns & _BITS, found.st_size, found.st_ino & _BITS)

    def _read(self, name: str) -> _Read | None:
        """What the index is to say of a run; None for what is no run."""
        # Before the files are read: what is written in between is then read again next time.
        stamp = self._stamp(name)
        directory = self.runs_path / name
        if stamp[0] == _MERE_FILE or (stamp == _NO_FILE and not files_of(directory)[0]):
            return None  # gone, or just made
        files = _ENDED
        try:
            run = read_run(directory, validate=False)  # there may be 100,000
            if not has_ended(run):
                from pepr_profiler.summary.summarise import summarise

                files = files_of(directory)
                run = summarise(directory, run=run)
            facts = facts_of(run, called=name)
            text = dump(_short(run, name))
        except PeprError as error:
            what = error.what.replace(f"{directory}{os.sep}", "").replace(str(directory), "it")
            why = f"{what}: {error.why}" if error.why else what
            facts, text = unreadable(name, why, error.fix), b"null"
        except (*MALFORMED, OSError) as error:
            why = f"run.json is not a summary of its files ({type(error).__name__}: {error})"
            fix = f"restore it, or: pepr-profile runs rm {shlex.quote(name)}"
            facts, text = unreadable(name, why, fix), b"null"
        return facts, (*stamp, *files), text


class _Reads:
    """What was read of k runs: stamps (k, 5) and a text each, counted from 0 or, as lists, from -k.

    The texts are in one piece: between files of several times their size, which come and go, they
    would leave the heap as large as all the files.
    """

    def __init__(self) -> None:
        self._stamps, self._ends, self._texts = array("q"), array("q", [0]), bytearray()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def of(self, reads: Iterable[_Read | None]) -> Iterator[Facts]:
        """Keeps what is read, and hands on the facts."""
        for read in reads:
            if read is not None:
                facts, stamp, text = read
                self._stamps.extend(stamp)
                self._texts += text
                self._ends.append(len(self._texts))
                yield facts

    @property
    def stamps(self) -> Stamps:
        return np.array(self._stamps, dtype=np.int64).reshape(-1, 5)

    def text(self, number: int) -> bytes:
        number %= len(self)
        return bytes(self._texts[self._ends[number] : self._ends[number + 1]])


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of n directories, by time; `place` (n,) is where the text of each is.

    From 0 on that is a row of `saved`; -1 is the last of `reads`, -2 the one before …
    """

    read: Callable[[str], _Read | None]
    columns: Columns
    saved: Saved | None
    reads: _Reads
    place: Rows

    @classmethod
    def of(
        cls,
        read: Callable[[str], _Read | None],
        saved: Saved | None,
        kept: Rows,
        columns: Columns,
        reads: _Reads,
    ) -> _Known:
        """What is saved in some of its rows, and the columns of what was read."""
        place = np.arange(-len(reads), 0)
        if saved is not None:
            old = saved.columns
            old = old if len(kept) == len(old) else old.at(kept)
            columns = old.followed_by(columns) if len(reads) else old
            place = np.concatenate((kept, place))
        known = cls(read, columns, saved, reads, place)
        if not len(reads):
            return known  # what is saved is by time
        began, ids = (columns.texts[name].list() for name in ("started_at", "id"))
        keys = list(zip(began, ids, strict=True))
        return known.at(np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.intp))

    def at(self, rows: Rows) -> _Known:
        return replace(self, columns=self.columns.at(rows), place=self.place[rows])

    @property
    def stamps(self) -> Stamps:
        fresh = self.reads.stamps
        both = fresh if self.saved is None else np.concatenate((self.saved.stamps, fresh))
        return both[self.place]

    def texts(self) -> list[bytes]:
        """The text of each. OSError if what is saved cannot be read any more."""
        return list(map(self._text, self.place.tolist()))

    def _text(self, place: int) -> bytes:
        if self.saved is None or place < 0:
            return self.reads.text(place)
        return self.saved.text(place)

    def summary(self, row: int) -> dict[str, Any]:
        """What `Found` gives of a run. TraceError if it has gone meanwhile, and from here too."""
        from orjson import loads

        place = int(self.place[row])
        try:
            text = self._text(place)
        except OSError:  # a file server may forget what another client has replaced
            name = str(self.columns.text("id", row))
            again = self.read(name)
            if again is None or again[0].state is None:
                raise TraceError(
                    f"run {name} cannot be read any more",
                    why="it was removed or damaged while it was looked at",
                    fix="try again",
                ) from None
            text = again[2]
        summary: dict[str, Any] = loads(text)
        return summary


def _stamps(stamps: Iterable[tuple[int, int, int]]) -> Stamps:
    every = itertools.chain.from_iterable(stamps)
    return np.fromiter(every, dtype=np.int64).reshape(-1, 3)


def _will_be_read(path: str) -> None:
    """Asks for a file, which is then fetched while others are computed on."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _copies(columns: Columns, rows: Rows) -> Iterator[tuple[int, str]]:
    """Which of the runs is another once more, and the directory of that."""
    recorded = columns.texts["recorded_id"].at(rows)
    if recorded.distinct:
        return
    for run_id, same in recorded.groups().items():
        originals: dict[tuple[str | None, ...], str] = {}
        members = [(int(rows[i]), str(columns.text("id", int(rows[i])))) for i in same]
        # A directory that still has the name it was made with is the original, else the first.
        members.sort(key=lambda member: member[1] != run_id)
        for row, directory in members:
            key = tuple(columns.text(name, row) for name in ("host", "started_at"))
            if originals.setdefault(key, directory) != directory:
                yield row, originals[key]


def _picked(columns: Columns, wanted: Filter) -> tuple[npt.NDArray[np.bool_], list[Damaged]]:
    """Which runs (n,) the filter wants, each recording once, and what cannot be picked."""
    readable = ~columns.texts["state"].equal(None)
    damaged = [
        Damaged(*(str(columns.text(key, i)) for key in ("id", "why", "fix")))
        for i in np.flatnonzero(~readable).tolist()
    ]
    picked = readable & _wanted(columns, wanted)
    for i, original in _copies(columns, np.flatnonzero(readable)):
        if picked[i]:
            name = str(columns.text("id", i))
            why = f"it is {original} once more, which would count twice"
            damaged.append(Damaged(name, why, f"pepr-profile runs rm {shlex.quote(name)}"))
        picked[i] = False
    return picked, sorted(damaged, key=lambda d: d.run_id)


def _wanted(columns: Columns, wanted: Filter) -> npt.NDArray[np.bool_]:
    """Of which runs (n,) the filter's facts are true."""
    picked = np.ones(len(columns), dtype=np.bool_)
    for key in ("experiment", "state", "provenance"):
        if (value := getattr(wanted, key)) is not None:
            picked &= columns.texts[key].equal(value)
    for key in ("name", "host"):
        if (glob := getattr(wanted, key)) is not None:
            match = re.compile(fnmatch.translate(glob)).match
            column = columns.texts[key]
            picked &= column.where([match(str(value)) is not None for value in column.values])
    began = columns.texts["started_at"]
    if wanted.since is not None:
        picked &= began.where([str(value) >= wanted.since for value in began.values])
    if wanted.until is not None:
        picked &= began.where([str(value) < wanted.until for value in began.values])
    return picked


_KEPT = (
    *("schema", "job", "name", "command", "experiment", "host", "started_at", "duration_s"),
    *("time_s", "exit_code", "signal", "complete", "memory", "carbon", "metrics", "performance"),
)
_KEPT_OF_COMPONENT = ("id", "kind", "source", "provenance", "in_total", "job_j", "u_j")


def _short(run: Mapping[str, Any], directory: str) -> dict[str, Any]:
    energy = run["energy"]
    components = []
    for component in energy["components"]:
        if component["in_total"]:
            part = {key: component.get(key) for key in _KEPT_OF_COMPONENT}
            budget = component.get("budget")
            part["budget"] = budget and {key: budget[key] for key in CAUSES}
            components.append(part)
    outer = (run.get("recording") or {}).get("outer")
    return {
        "run_id": directory,
        **{key: run.get(key) for key in _KEPT},
        **({"recording": {"outer": outer}} if outer else {}),
        "energy": {
            **{key: energy[key] for key in ("total_j", "u_j", "mean_w", "provenance")},
            "scope": energy.get("scope", "job"),
            "components": components,
        },
    }


_T = TypeVar("_T")
_TRIED = 64  # calls after which it is known whether they wait


def _map(function: Callable[[str], _T], names: Sequence[str]) -> Iterator[_T]:
    """`function` of each name, in order; by 16 threads if it mostly waits, as over a network."""
    begun_s, cpu_s = time.perf_counter(), time.thread_time()
    yield from map(function, names[:_TRIED])
    waited_s = (time.perf_counter() - begun_s) - (time.thread_time() - cpu_s)
    if waited_s < _TRIED * 1e-4:
        yield from map(function, names[_TRIED:])
        return
    from concurrent.futures import ThreadPoolExecutor

    parts = [names[i : i + _TRIED] for i in range(_TRIED, len(names), _TRIED)]
    with ThreadPoolExecutor(16) as pool:
        for results in pool.map(lambda part: [function(name) for name in part], parts):
            yield from results
