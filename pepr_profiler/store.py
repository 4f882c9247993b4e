"""Runs on disk: `STORE/runs/RUN_ID/`, found by id, unique prefix, path, or as the last one.

The run directories are the truth; the name of one is the run's id, wherever it was copied from.
`STORE/index` is a cache that makes many of them quick to list, filter and compare. It holds what
`summary` says of each run, less its curves, beside what run.json was (time, size, inode) when it
was read; a run.json that is anything else now is read again. The index is one file that is only
ever replaced whole. So nothing is locked, which network file systems do badly, and of two that
write at once one is forgotten: its runs are read again next time. Without an index, or with a
damaged one, everything works as it does with one, later.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar
from zlib import crc32

from pepr_profiler.errors import PeprError, TraceError, UsageError
from pepr_profiler.trace import (
    MALFORMED,
    EventWriter,
    boot_id,
    checked_run,
    read_run,
    write_json,
)

LAST = "last"
"""What the newest run may be called."""

STATES = ("done", "failed", "incomplete")
"""How a run may have ended: with status 0 (or none, if it was attached to), otherwise, or not."""

_FORM = 5  # of the index: another one is no index

_STALE_SHARE = 0.01
"""An index is written anew when more than this share of it was wrong. Reading a run costs some
0.3 ms and writing one again 0.01 ms, so that a large store does not pay for each new run."""

_ABANDONED_S = 3600.0
"""A draft of an index that is older was left by a writer that was killed."""

_QUIET_S = 60.0
"""A recording is flushed at least once a second. A run without an end, which changed within the
last minute, may be recorded on another machine or in another container."""


def default_path() -> Path:
    """`PEPR_STORE`, else the user's data directory, so that any shell finds every run."""
    given = os.environ.get("PEPR_STORE")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "pepr-profiler"


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


class Found:
    """Runs of a store, oldest first; `damaged` are the directories that no filter can be asked of.

    Iterating, as often as one likes, gives summaries (docs/design.md, Contract) without what only
    one run's own report shows: of them stay who, where, when, how it ended, `time_s`, `energy`
    (with `components`, and of their `budget` what runs have in common), `memory`, `carbon`,
    `metrics` and `performance`. `Store.load` gives a whole one. `rows` tell of each run what a
    line of a list does, at a fifth of the cost.
    """

    def __init__(self, entries: Sequence[_Entry], damaged: Sequence[Damaged]) -> None:
        self._entries = entries
        self.damaged = tuple(damaged)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from orjson import loads

        for _, text in self._entries:
            yield loads(text)

    @property
    def rows(self) -> Iterator[Row]:
        """Their rows of the index, in the same order."""
        return (row for row, _ in self._entries)

    @property
    def ids(self) -> list[str]:
        """Their ids, in the same order."""
        return [row.directory for row in self.rows]


class Store:
    """A directory of runs."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else default_path()

    @property
    def runs_path(self) -> Path:
        return self.path / "runs"

    @property
    def index_path(self) -> Path:
        return self.path / "index"

    def create(self, name: str) -> Path:
        """A new run directory, named after the run. Raises OSError where none can be made."""
        slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:40] or "run"
        self.runs_path.mkdir(parents=True, exist_ok=True)
        while True:
            directory = self.runs_path / f"{slug}-{os.urandom(3).hex()}"
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return directory

    def find(self, wanted: Filter | None = None) -> Found:
        """The runs that are wanted, incomplete ones with what they cost so far."""
        rows, damaged = self._rows()
        return Found(_picked(rows, wanted or Filter()), damaged)

    def directory(self, ref: str) -> Path:
        """The directory of a run: an id, a unique prefix of one, a run directory, or `last`.

        Raises UsageError if there is none or more than one.
        """
        as_path = Path(ref)
        if (as_path / "run.json").is_file():
            return as_path
        names = [ref] if self._holds(ref) else []
        if not names and ref == LAST:
            names = self.find().ids[-1:]
        if not names:
            starts = sorted(name for name in self._names() if name.startswith(ref))
            names = [name for name in starts if (self.runs_path / name).is_dir()]
        if len(names) == 1:
            return self.runs_path / names[0]
        if names:
            raise UsageError(
                f"run '{ref}' is ambiguous",
                why=f"it could be {', '.join(names[:5])}{' …' if len(names) > 5 else ''}",
                fix="give more of its id",
            )
        raise UsageError(
            f"there is no run '{ref}'",
            why=f"no run in {self.path} has an id that begins so, and it is no run directory",
            fix="see: pepr-profile runs list, or give --store DIR",
        )

    def load(self, ref: str) -> dict[str, Any]:
        """The whole summary of a run: as written at its end, computed now if it has no end.

        UsageError as `directory`; TraceError for what is no recording, or a newer version's.
        """
        directory = self.directory(ref)
        return self._identified(_summary_of(directory), directory)

    def set(
        self,
        ref: str,
        *,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, str | None] | None = None,
    ) -> dict[str, Any]:
        """Adds metrics to a run, as a new line of events, and changes its `name`, `experiment`.

        Returns its summary, computed anew. Facts of a run that is still being recorded are refused
        with UsageError: its recorder writes them at the end.
        """
        directory = self.directory(ref)
        run = _summary_of(directory)  # raises for what is no recording, before anything is written
        if facts and is_recording(directory, run):
            raise _still_recording(directory, "changed", fix="wait for its end")
        if metrics:
            writer = EventWriter(directory)
            writer.metrics(dict(metrics), t_ns=run["clock"][-1]["t_ns"])
            writer.close()
            if writer.lost:
                raise _unwritable(directory, f"the metrics of {ref} could not be written")
        summary = _summarise(directory, {**_run_of(directory), **(facts or {})})
        try:
            write_json(directory / "run.json", summary)
        except OSError as error:
            raise _unwritable(directory, f"{ref} could not be changed", error) from error
        return self._identified(summary, directory)

    def removable(self, ref: str, *, force: bool = False) -> Path:
        """The directory that `remove` would take for `ref`.

        UsageError where there is none inside this store, and for a run that is being recorded
        unless `force`.
        """
        directory = self.directory(ref)
        # Of a link in the store the link is meant, so only what is above it is resolved.
        inside = directory.absolute().parent.resolve() == self.runs_path.resolve()
        if not inside or directory.name in ("", ".", ".."):
            raise UsageError(
                f"{ref} is not removed",
                why=f"it is outside the store {self.path}",
                fix="remove the directory itself, or say which store it is in: --store DIR",
            )
        run: dict[str, Any] = {}
        with suppress(TraceError):  # what cannot be read may still be removed, if nobody writes it
            run = read_run(directory)
        if not force and is_recording(directory, run):
            raise _still_recording(
                directory, "removed", fix="wait for its end; if it has none: --force"
            )
        return directory

    def remove(self, directory: Path) -> None:
        """Removes what `removable` gave: it is gone at once, its files soon after."""
        import shutil

        try:
            if directory.is_symlink():
                directory.unlink()
                return
            doomed = self.runs_path / f".removed-{os.urandom(6).hex()}"
            directory.rename(doomed)
            for path in self.runs_path.glob(".removed-*"):  # those too that a crash left over
                shutil.rmtree(path)
        except FileNotFoundError:
            return  # somebody else was faster
        except OSError as error:
            raise _unwritable(directory, f"{directory} could not be removed", error) from error

    # --- the index -------------------------------------------------------------------------------

    def _rows(self) -> tuple[list[_Entry], list[Damaged]]:
        """A row and its text for each run that can be read, each recording once; the others."""
        known = _read_index(self.index_path)
        names = self._names()
        stamps = dict(zip(names, _map(self._stamp, names), strict=True))
        rows: list[_Entry] = []  # in the order of the index, which is that of time
        for name, entry in known.items():
            stamp = stamps.get(name)
            if stamp is not None and self._holds_still(entry[0], stamp):
                rows.append(entry)
                del stamps[name]
        wrong = len(known) - len(rows)
        stale = [name for name, stamp in stamps.items() if stamp is not None]
        reads = [entry for entry in _map(self._read, stale) if entry is not None]
        if reads:
            wrong += len(reads)
            rows += reads
            rows.sort(key=lambda entry: (entry[0].started_at, entry[0].directory))
        if wrong > _STALE_SHARE * len(known):
            _write_index(self.index_path, rows)
        return _without_damaged(rows)

    def _names(self) -> list[str]:
        """What may be a run; a name with a dot in front is none."""
        try:
            return [name for name in os.listdir(self.runs_path) if name[0] != "."]  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise PeprError(
                f"the store {self.path} cannot be read",
                why=error.strerror or str(error),
                fix="give --store DIR (or PEPR_STORE) that you may read",
            ) from error

    def _holds(self, name: str) -> bool:
        plain = name == Path(name).name and name not in ("", "..")
        return plain and (self.runs_path / name).is_dir()

    @cached_property
    def _prefix(self) -> str:
        return f"{self.runs_path}{os.sep}"

    def _stamp(self, name: str) -> list[int] | None:
        """Time, size and inode of a run's run.json, zeros if it has none; None for a mere file.

        An atomic replace changes the inode, whatever the clock is worth.
        """
        try:
            # os.stat: a Path costs three times as much, and there may be 100,000.
            found = os.stat(f"{self._prefix}{name}/run.json")  # noqa: PTH116
        except NotADirectoryError:
            return None
        except OSError:
            return _NO_FILE
        return [found.st_mtime_ns, found.st_size, found.st_ino]

    def _holds_still(self, row: Row, stamp: list[int]) -> bool:
        """Whether an index's row is what would be read now."""
        if row.stamp == stamp:
            return True
        if row.stamp[:3] != stamp:
            return False
        return row.stamp[3:] == _contents(self.runs_path / row.directory)

    def _read(self, name: str) -> _Entry | None:
        """A run's row and its text for the index; None for what is no run."""
        directory = self.runs_path / name
        # Before the files are read: what is written in between is then read again next time.
        stamp = self._stamp(name)
        if stamp is None or (stamp == _NO_FILE and not _contents(directory)[0]):
            return None  # gone, or just made
        contents: list[int] = []
        try:
            run = _run_of(directory)
            if not _is_whole(run):
                contents = _contents(directory)
                run = _summarise(directory, run)
            row = _row(name, stamp, run)
            text = _dump(_short(run, name))
        except PeprError as error:
            what = error.what.replace(f"{directory}{os.sep}", "").replace(str(directory), "it")
            why = f"{what}: {error.why}" if error.why else what
            return Row(name, [*stamp, *contents], why=why, fix=error.fix), b"null"
        except (*MALFORMED, OSError) as error:
            why = f"run.json is not a summary of its files ({type(error).__name__}: {error})"
            fix = f"restore it, or: pepr-profile runs rm {shlex.quote(name)}"
            return Row(name, [*stamp, *contents], why=why, fix=fix), b"null"
        if row.state == "incomplete":
            row = row._replace(stamp=[*stamp, *contents])
        return row, text

    def _identified(self, run: dict[str, Any], directory: Path) -> dict[str, Any]:
        """The run with the id that it has here: a directory may have been copied and renamed."""
        if directory.absolute().parent == self.runs_path.absolute():
            run["run_id"] = directory.name
        return run


def is_recording(directory: Path, run: Mapping[str, Any]) -> bool:
    """Whether somebody may still be recording a run (its run.json, {} if it cannot be read)."""
    if run.get("complete"):
        return False
    if run and recorder_lives(run):
        return True
    changed_ns, _ = _contents(directory)
    return time.time() - changed_ns * 1e-9 < _QUIET_S


def recorder_lives(run: Mapping[str, Any]) -> bool:
    """Whether the profiler of an unfinished run may still be there; only one killed is not."""
    here = boot_id()
    if not here or run.get("boot_id") != here:
        return False
    pid = (run.get("recording") or {}).get("profiler_pid")
    return pid is None or Path(f"/proc/{pid}").exists()


def _dump(value: Any) -> bytes:
    """JSON for the index; what is no Unicode (a name from a byte string) loses what is not."""
    from orjson import dumps

    try:
        return dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _run_of(directory: Path) -> dict[str, Any]:
    """run.json, as `read_run`, which takes five times as long."""
    from orjson import loads

    path = directory / "run.json"
    try:
        run = loads(path.read_bytes())
    except (OSError, ValueError):
        return read_run(directory)  # it tells what is wrong, and knows names that are no Unicode
    return checked_run(run, path)


def _is_whole(run: Mapping[str, Any]) -> bool:
    """Whether a run.json is a summary; what lacks some of it is summarised anew."""
    return bool(run.get("complete")) and bool(run.get("energy")) and run.keys() >= _ALWAYS


def _summary_of(directory: Path) -> dict[str, Any]:
    """A run's summary: read if it is complete, else computed from what was flushed."""
    run = _run_of(directory)
    return run if _is_whole(run) else _summarise(directory, run)


def _summarise(directory: Path, run: dict[str, Any]) -> dict[str, Any]:
    from pepr_profiler.summary import summarise

    return summarise(directory, run=run)


def _still_recording(directory: Path, verb: str, *, fix: str) -> UsageError:
    return UsageError(f"{directory.name} is not {verb}", why="it may still be recorded", fix=fix)


def _unwritable(directory: Path, what: str, error: OSError | None = None) -> PeprError:
    why = f"{directory} does not take them" if error is None else error.strerror or str(error)
    return PeprError(what, why=why, fix="check its permissions and the free space")


class Row(NamedTuple):
    """What the index says of a run apart from its text: enough to filter, list and see changes.

    `directory` is its id here; `run_id` is the one that it was recorded with. `stamp` is [mtime_ns,
    size, inode] of run.json; of a run without an end, two numbers of all its files follow.
    `performance` is a metric and its value. A damaged run has `why` and `fix`, and no state.
    """

    directory: str
    stamp: list[int]
    state: str | None = None
    run_id: str = ""
    started_at: str = ""
    experiment: str | None = None
    name: str = ""
    host: str = ""
    provenance: str | None = None
    duration_s: float | None = None
    exit_code: int | None = None
    total_j: float | None = None
    u_j: float | None = None
    performance: list[Any] | None = None
    why: str = ""
    fix: str = ""


_Entry: TypeAlias = tuple[Row, bytes | memoryview]
"""A run's row and its text, JSON of what `Found` gives."""


def _row(directory: str, stamp: list[int], run: Mapping[str, Any]) -> Row:
    energy, performance = run["energy"], run["performance"]
    return Row(
        directory=directory,
        stamp=stamp,
        state=state_of(run),
        run_id=str(run["run_id"]),
        started_at=str(run["started_at"] or ""),
        experiment=run["experiment"],
        name=str(run["name"]),
        host=str(run["host"]),
        provenance=energy["provenance"],
        duration_s=run["duration_s"],
        exit_code=run["exit_code"],
        total_j=energy["total_j"],
        u_j=energy["u_j"],
        performance=performance and [performance["metric"], performance["value"]],
    )


def state_of(run: Mapping[str, Any]) -> str:
    """How a run ended; one of STATES."""
    if not run["complete"]:
        return "incomplete"
    return "failed" if run["exit_code"] else "done"


_NO_FILE = [0, 0, 0]
"""The stamp of a run without a run.json."""

_KEPT = (
    *("schema", "job", "name", "command", "experiment", "host", "started_at", "duration_s"),
    *("time_s", "exit_code", "signal", "complete", "memory", "carbon", "metrics", "performance"),
)
_ALWAYS = {
    *("run_id", "name", "experiment", "job", "command", "host", "started_at", "exit_code"),
    *("duration_s", "time_s", "memory", "carbon", "metrics", "performance"),
}
"""What every summary has had from the first version on."""

_KEPT_OF_COMPONENT = ("id", "kind", "source", "provenance", "in_total", "job_j", "u_j")
_KEPT_OF_BUDGET = ("gain_j", "offset_j", "model_j")
"""Of an error budget, what other runs on the same device share."""


def _short(run: Mapping[str, Any], directory: str) -> dict[str, Any]:
    energy = run["energy"]
    components = []
    for component in energy["components"]:
        if component["in_total"]:
            part = {key: component.get(key) for key in _KEPT_OF_COMPONENT}
            budget = component.get("budget")
            part["budget"] = budget and {key: budget[key] for key in _KEPT_OF_BUDGET}
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


def _picked(rows: list[_Entry], wanted: Filter) -> list[_Entry]:
    """The rows that the filter wants, in their order."""
    for key in ("experiment", "state", "provenance"):
        if (value := getattr(wanted, key)) is not None:
            rows = [entry for entry in rows if getattr(entry[0], key) == value]
    for key in ("name", "host"):
        if (glob := getattr(wanted, key)) is not None:
            match = re.compile(fnmatch.translate(glob)).match
            rows = [entry for entry in rows if match(getattr(entry[0], key))]
    if wanted.since is not None:
        rows = [entry for entry in rows if entry[0].started_at >= wanted.since]
    if wanted.until is not None:
        rows = [entry for entry in rows if entry[0].started_at < wanted.until]
    return rows


def _without_damaged(rows: list[_Entry]) -> tuple[list[_Entry], list[Damaged]]:
    """The runs of which each recording is there once, and what is left of the directories."""
    originals: dict[tuple[str, str, str], str] = {}
    damaged = []
    good = []
    again = False
    for entry in rows:
        row = entry[0]
        if row.state is None:
            damaged.append(Damaged(row.directory, row.why, row.fix))
            continue
        key = (row.run_id, row.host, row.started_at)
        # A directory that still has the name it was made with is the original, else the first.
        if originals.setdefault(key, row.directory) != row.directory:
            again = True
            if row.directory == row.run_id:
                originals[key] = row.directory
        good.append(entry)
    if again:
        entries, good = good, []
        for entry in entries:
            row = entry[0]
            original = originals[row.run_id, row.host, row.started_at]
            if original == row.directory:
                good.append(entry)
                continue
            why = f"it is {original} once more, which would count twice"
            fix = f"pepr-profile runs rm {shlex.quote(row.directory)}"
            damaged.append(Damaged(row.directory, why, fix))
    return good, sorted(damaged, key=lambda d: d.run_id)


def _contents(directory: Path) -> list[int]:
    """The latest change of a directory's files, ns, and their size in all; zeros: there is none."""
    changed_ns = size = 0
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                found = entry.stat()
                changed_ns, size = max(changed_ns, found.st_mtime_ns), size + found.st_size
    return [changed_ns, size]


def _read_index(path: Path) -> dict[str, _Entry]:
    """The rows of an index by directory; none if there is no index that could be of any use."""
    from orjson import loads

    try:
        data = path.read_bytes()
        # Rows are believed as they are: a check of each would cost more than reading them.
        if data[:_HEAD] != _head(memoryview(data)[_HEAD:]):
            return {}
        facts, *texts = _lines(data, _HEAD)
        rows = [Row(*row) for row in loads(facts)]
    except (OSError, *MALFORMED):
        return {}  # it is a cache: everything that it could tell is in the runs
    return {row.directory: (row, text) for row, text in zip(rows, texts, strict=True)}


def _head(content: bytes | memoryview) -> bytes:
    """The first line of an index: its form, and a checksum of what follows (1 ms for 1 MB)."""
    return b"pepr %04d %08x\n" % (_FORM, crc32(content))


_HEAD = len(_head(b""))


def _lines(data: bytes, begin: int) -> Iterator[memoryview]:
    """The lines of `data` from `begin` on, which are not copied: an index may be 100 MB."""
    view = memoryview(data)
    while (end := data.find(b"\n", begin)) >= 0:
        yield view[begin:end]
        begin = end + 1
    yield view[begin:]


def _write_index(path: Path, rows: Sequence[_Entry]) -> None:
    """Replaces the index, where that is possible: a head, a line with the rows, a text each."""
    facts = _dump([row for row, _ in rows])
    draft = path.with_name(f".index-{os.uname().nodename}-{os.getpid()}-{os.urandom(3).hex()}.tmp")
    with suppress(OSError):  # a store that may only be read
        for left in path.parent.glob(".index-*.tmp"):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                left.unlink(missing_ok=True)
        try:
            content = b"\n".join([facts, *(text for _, text in rows)])
            with draft.open("wb") as file:
                file.writelines((_head(content), content))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


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
