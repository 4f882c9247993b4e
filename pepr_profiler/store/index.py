"""All runs of a store: from the index where it is up to date, else from the runs' files.

The index is a cache, an SQLite file. For each run it keeps the facts that lists and comparisons
need, a short summary, and what run.json was when it was read: its time, size and inode. A run.json
that differs from that is read again. Without an index, with a damaged one, or where Python lacks
sqlite3, everything works as it does with one, but slower.

The file is only ever replaced as a whole and never locked, because locks are unreliable on network
file systems. If two processes write at once, the later file stays, and the runs that only the other
one had are read again next time.
"""

from __future__ import annotations

import os
import shlex
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, overload

from pepr_profiler.errors import PeprError, TraceError
from pepr_profiler.record import Record
from pepr_profiler.store.facts import CAUSES, Facts, dump, facts_of, is_unicode
from pepr_profiler.trace.files import CREATE, open_file
from pepr_profiler.trace.run_json import files_of, has_ended, read_run
from pepr_profiler.trace.shape import MALFORMED

if TYPE_CHECKING:
    import sqlite3

_STALE_SHARE = 0.01
"""An index is written again when more than this share of it was wrong. To read a run takes some
0.1 ms and to write it 0.01 ms, so that a large store does not pay for each new run."""

_ABANDONED_S = 3600.0
"""A draft of an index that is older than this was left by a writer that was killed."""

_BY_TIME = attrgetter("started_at", "run_id")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which runs are wanted; None means any.

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

    def matches(self, run: Facts) -> bool:
        return (
            self.experiment in (None, run.experiment)
            and self.provenance in (None, run.provenance)
            and self.state in (None, run.state)
            and (self.since is None or run.started_at >= self.since)
            and (self.until is None or run.started_at < self.until)
            and (self.name is None or fnmatchcase(run.name, self.name))
            and (self.host is None or fnmatchcase(run.host or "", self.host))
        )


@dataclass(frozen=True)
class Damaged:
    """A directory of the store that is not among the runs, why, and what to do about it."""

    run_id: str
    why: str
    fix: str


class QueryResult(Sequence[dict[str, Any]]):
    """The runs of a store that a filter matches, oldest first.

    It is a sequence of short summaries (docs/design.md, Contract), each made when it is asked for.
    A short summary has who, where and when, how the run ended, `time_s`, `energy` (with the
    `components` in the total, and of their `budget` the CAUSES), `memory`, `carbon`, `metrics` and
    `performance`. `Store.load` gives a whole summary. `rows` are the facts of the same runs, at a
    tenth of the cost.

    `damaged` are the directories that cannot be read, and copies of runs that match the filter.
    """

    def __init__(
        self,
        rows: Sequence[Facts],
        summary: Callable[[str], dict[str, Any]],
        damaged: Sequence[Damaged],
    ) -> None:
        self.rows = rows
        self.damaged = tuple(damaged)
        self._summary = summary

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> QueryResult: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | QueryResult:
        if isinstance(index, slice):
            return QueryResult(self.rows[index], self._summary, self.damaged)
        return self._summary(self.rows[index].run_id)

    @property
    def ids(self) -> list[str]:
        return [run.run_id for run in self.rows]


class Index:
    """The runs of a store, and the file that makes many of them quick to list and compare."""

    def __init__(self, path: Path, runs_path: Path) -> None:
        self.path, self.runs_path = path, runs_path
        self._prefix = f"{runs_path}{os.sep}"

    def find(self, names: Sequence[str], wanted: Filter | None = None) -> QueryResult:
        """The runs that are wanted among the directories of these names."""
        saved = IndexFile.open(self.path)
        known = [] if saved is None else saved.rows
        stamps = dict(zip(names, _map(self._stamp, names), strict=True))
        rows = [
            row
            for row in known
            if row.run_json == stamps.get(row.run_id)
            # The files of a run without an end tell more than its run.json.
            and (row.files is None or row.files == _files_stamp(self.runs_path / row.run_id))
        ]
        held = {row.run_id for row in rows}
        fresh = self._read_all(
            [name for name, stamp in stamps.items() if stamp is not None and name not in held]
        )
        stale = len(known) - len(rows) + len(fresh)
        if fresh:
            rows = sorted([*rows, *(entry.row for entry in fresh.values())], key=_BY_TIME)

        def summary_of(run_id: str) -> str:
            if run_id in fresh or saved is None:
                return fresh[run_id].summary
            return saved.summary(run_id)

        if stale > _STALE_SHARE * len(known):
            self._write(rows, summary_of)
        found, damaged = _matching(rows, wanted or Filter())
        return QueryResult(found, partial(self._summary, summary_of), damaged)

    def _read_all(self, names: Sequence[str]) -> dict[str, _Entry]:
        """`_read` of each, while the disk is asked for the next ones."""
        upcoming = {
            names[i]: names[i + _TRIED : i + 2 * _TRIED] for i in range(0, len(names), _TRIED)
        }

        def read(name: str) -> _Entry | None:
            for ahead in upcoming.get(name, ()):
                _will_be_read(f"{self._prefix}{ahead}/run.json")
            return self._read(name)

        entries = zip(names, _map(read, names), strict=True)
        return {name: entry for name, entry in entries if entry is not None}

    def _write(self, rows: Sequence[Facts], summary_of: Callable[[str], str]) -> None:
        """Replaces the index, where that is possible. Names that are no Unicode are left out."""
        draft = self.path.with_name(f".index-{os.urandom(8).hex()}.tmp")
        kept = ((row, summary_of(row.run_id)) for row in rows if is_unicode(row.run_id))
        with suppress(OSError):  # a store that may only be read
            for left in self.path.parent.glob(".index-*.tmp"):
                if time.time() - left.lstat().st_mtime > _ABANDONED_S:
                    left.unlink(missing_ok=True)
            try:
                write_index(draft, kept)
                draft.replace(self.path)
            finally:
                draft.unlink(missing_ok=True)

    def _stamp(self, name: str) -> str | None:
        """Time, size and inode of a run's run.json; "" if it has none, None for a mere file.

        An atomic replace changes the inode, even where the clock does not move.
        """
        try:
            # os.stat: a Path costs three times as much, and there may be 100,000.
            found = os.stat(f"{self._prefix}{name}/run.json")  # noqa: PTH116
        except NotADirectoryError:
            return None
        except OSError:
            return ""
        return f"{found.st_mtime_ns} {found.st_size} {found.st_ino}"

    def _read(self, name: str) -> _Entry | None:
        """What the index is to have of a run; None for what is no run."""
        # Before the files are read: what is written in between is then read again next time.
        stamp = self._stamp(name)
        directory = self.runs_path / name
        if stamp is None or not (stamp or files_of(directory)[0]):
            return None  # gone, or just made
        files = None
        try:
            run = read_run(directory, validate=False)  # there may be 100,000
            if not has_ended(run):
                from pepr_profiler.summary.summarise import summarise

                files = _files_stamp(directory)
                run = summarise(directory, run=run)
            row = facts_of(run, run_id=name)
            summary = dump(_short(run, name))
        except PeprError as error:
            what = error.what.replace(f"{directory}{os.sep}", "").replace(str(directory), "it")
            why = f"{what}: {error.why}" if error.why else what
            row, summary = Facts(run_id=name, why=why, fix=error.fix), "null"
        except (*MALFORMED, OSError) as error:
            why = f"run.json is not a summary of its files ({type(error).__name__}: {error})"
            fix = f"restore it, or: pepr-profile runs rm {shlex.quote(name)}"
            row, summary = Facts(run_id=name, why=why, fix=fix), "null"
        return _Entry(row=row._replace(run_json=stamp, files=files), summary=summary)

    def _summary(self, summary_of: Callable[[str], str], run_id: str) -> dict[str, Any]:
        """The short summary of a run. TraceError if it was removed meanwhile."""
        from orjson import loads

        # A file server may forget an index that another client has replaced.
        with suppress(OSError, ValueError):
            summary: dict[str, Any] = loads(summary_of(run_id))
            return summary
        again = self._read(run_id)
        if again is None or again.row.state is None:
            raise TraceError(
                f"run {run_id} cannot be read any more",
                why="it was removed or damaged while it was looked at",
                fix="try again",
            )
        summary = loads(again.summary)
        return summary


class _Entry(Record):
    """What was read of a run: its facts, and its short summary as JSON."""

    row: Facts
    summary: str


def _files_stamp(directory: Path) -> str:
    changed_ns, size = files_of(directory)
    return f"{changed_ns} {size}"


# --- the file ------------------------------------------------------------------------------------

_FORMAT = 8
"""The `user_version` of the database, to be raised when Facts or short summaries change.
An index with another one is replaced."""

_FACTS = ", ".join(Facts._fields)

_TABLE = f"CREATE TABLE run ({_FACTS}, summary, PRIMARY KEY (run_id))"
_DEFINITIONS = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 2"

_MOST_BYTES = 4 << 30
"""The size of an index; one of 100,000 runs has 160 MB."""

_CHECKSUM = 4
"""The file ends with the CRC-32 of all before, in so many bytes. SQLite does not look at them,
because the header of a database says how long that is."""


class IndexFile:
    """An index as it was when it was opened; `rows` are the facts of all its runs, by time.

    It can still be read after it was replaced, except where a network file system forgets it.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        weakref.finalize(self, database.close)
        (form,) = database.execute("PRAGMA user_version").fetchone()
        if form != _FORMAT:
            raise ValueError(f"its format is {form}")
        # A view of this name could compute for ever.
        if database.execute(_DEFINITIONS).fetchall() != [(_TABLE,)]:
            raise ValueError("it holds more than a table of runs")
        self.rows = list(map(Facts._make, database.execute(f"SELECT {_FACTS} FROM run")))

    @classmethod
    def open(cls, path: Path) -> IndexFile | None:
        """None if there is no whole index of this version's format."""
        try:
            import sqlite3
        except ImportError:  # Python can be built without it
            return None
        if not _is_whole(path):
            return None
        # `immutable`: nothing is locked, and no journal is looked for.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            return cls(sqlite3.connect(uri, uri=True, check_same_thread=False))
        except (sqlite3.Error, ValueError):
            return None

    def summary(self, run_id: str) -> str:
        """The short summary of a run as JSON. OSError if it cannot be read any more."""
        from sqlite3 import Error

        query = "SELECT summary FROM run WHERE run_id = ?"
        try:
            (summary,) = self._database.execute(query, (run_id,)).fetchone() or (None,)
        except Error as error:
            raise OSError(str(error)) from error
        if not isinstance(summary, str):
            raise OSError(f"the index has nothing of {run_id}")
        return summary


def write_index(path: Path, runs: Iterable[tuple[Facts, str]]) -> None:
    """Writes a new index: facts and the short summary of each run, by time. OSError if it cannot.

    Everybody can query it: one table, `run`, whose columns are the Facts, and `summary`.
    """
    try:
        import sqlite3
    except ImportError as error:
        raise OSError("this Python has no sqlite3") from error
    places = ", ".join("?" * (len(Facts._fields) + 1))
    os.close(os.open(path, CREATE, 0o666))  # SQLite would follow a link
    try:
        # `nolock`: nobody else knows this file, and it may lie on a network file system.
        uri = f"{path.absolute().as_uri()}?nolock=1"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as database:
            database.execute("PRAGMA page_size = 16384")  # wastes less of each on rows of 1.6 kB
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")  # a torn file is detected
            database.execute(f"PRAGMA user_version = {_FORMAT}")
            database.execute("BEGIN")
            database.execute(_TABLE)
            rows = ((*row, summary) for row, summary in runs)
            database.executemany(f"INSERT INTO run VALUES ({places})", rows)
            database.execute("COMMIT")
    except sqlite3.Error as error:
        raise OSError(str(error)) from error
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "r+b", buffering=0) as file:  # noqa: PTH123
        file.write(_checksum(file, path.stat().st_size))


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the checksum of all before that."""
    try:
        descriptor = open_file(path, most_bytes=_MOST_BYTES)
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
            length = os.fstat(file.fileno()).st_size - _CHECKSUM
            return length > 0 and _checksum(file, length) == file.read(_CHECKSUM)
    except OSError:
        return False


def _checksum(file: BinaryIO, length: int) -> bytes:
    """The CRC-32 of the next `length` bytes of a file."""
    check = 0
    while length > 0 and (data := file.read(min(length, 1 << 20))):
        check = zlib.crc32(data, check)
        length -= len(data)
    return check.to_bytes(_CHECKSUM, "little")


# --- what is wanted ------------------------------------------------------------------------------


def _matching(rows: Sequence[Facts], wanted: Filter) -> tuple[list[Facts], list[Damaged]]:
    """The runs that the filter matches, each recording once, and what has to be left out."""
    damaged = [Damaged(row.run_id, row.why, row.fix) for row in rows if row.state is None]
    readable = [row for row in rows if row.state is not None] if damaged else rows
    found = [row for row in readable if wanted.matches(row)]
    if copies := _copies(readable):
        for row in found:
            if original := copies.get(row.run_id):
                why = f"it is a copy of {original}, which would count twice"
                fix = f"pepr-profile runs rm {shlex.quote(row.run_id)}"
                damaged.append(Damaged(row.run_id, why, fix))
        found = [row for row in found if row.run_id not in copies]
    return found, sorted(damaged, key=attrgetter("run_id"))


def _copies(rows: Sequence[Facts]) -> dict[str, str]:
    """Which directories hold a copy of a run, and the directory of that run."""
    if len({row.recorded_id for row in rows}) == len(rows):
        return {}
    identity = attrgetter("recorded_id", "host", "started_at")
    originals: dict[Any, str] = {}
    for row in rows:
        # A directory that still has the name it was recorded with is the original, else the first.
        if identity(row) not in originals or row.run_id == row.recorded_id:
            originals[identity(row)] = row.run_id
    named = {row.run_id: originals[identity(row)] for row in rows}
    return {copy: original for copy, original in named.items() if copy != original}


_KEPT = (
    *("schema", "job", "name", "command", "experiment", "host", "started_at", "duration_s"),
    *("time_s", "exit_code", "signal", "complete", "memory", "carbon", "metrics", "performance"),
)
_KEPT_OF_COMPONENT = ("id", "kind", "source", "provenance", "in_total", "job_j", "u_j")


def _short(run: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """The part of a summary that `QueryResult` gives."""
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


# --- reading many files --------------------------------------------------------------------------


def _will_be_read(path: str) -> None:
    """Asks the kernel for a file, which is then fetched while others are parsed."""
    with suppress(OSError):
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        descriptor = os.open(path, flags)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


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
