"""A store of runs on disk, `STORE/runs/RUN_ID/`: made, found, loaded, changed, removed.

A run is found by its id, a unique prefix of that, its path, or as the last one. The run directories
are the truth: the name of a directory is the run's id, wherever it was copied from. `STORE/index`
(see index.py) is only a cache.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pepr_profiler.errors import PeprError, TraceError, UsageError, warning
from pepr_profiler.trace.events import EventWriter
from pepr_profiler.trace.files import list_files
from pepr_profiler.trace.run_json import files_of, has_ended, read_run, recorder_lives, write_json

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any

    from pepr_profiler.store.index import Filter, QueryResult

LAST = "last"
"""A name for the newest run."""

_QUIET_S = 60.0
"""A run without an end that changed within the last minute may still be recorded, on another host
or in another container: a recording is flushed at least once a second."""


_NO_HOME = Path("/proc/no-home-folder")
"""Stands for the folder of a user who has none. Nothing can be made there."""

_ROOM_BYTES = 1 << 16
"""What a place for a recording must have room for: a run.json and the first blocks of its lanes."""


def default_path() -> Path:
    """`PEPR_STORE`, else a folder in the user's data directory, the same for all shells."""
    given = os.environ.get("PEPR_STORE")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME")
    try:
        folder = Path(data) if data else Path.home() / ".local" / "share"
    except RuntimeError:  # no HOME, and the user has no entry in passwd
        folder = _NO_HOME
    return folder / "pepr-profiler"


class Store:
    """A directory of runs."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else default_path()

    def __str__(self) -> str:
        """What errors call it."""
        if self.path.parent == _NO_HOME:
            return "the store of a user without a home folder"
        return f"the store {self.path}"

    @property
    def runs_path(self) -> Path:
        return self.path / "runs"

    @property
    def index_path(self) -> Path:
        return self.path / "index"

    def create(self, name: str) -> Path:
        """A new run directory, named after the run. OSError if none can be made."""
        encoding = sys.getfilesystemencoding()  # of an old locale it lacks most letters
        plain = name.encode(encoding, "replace").decode(encoding)
        slug = re.sub(r"[^\w.-]+", "-", plain).strip("-.")[:40] or "run"
        self.runs_path.mkdir(parents=True, exist_ok=True)
        while True:
            directory = self.runs_path / f"{slug}-{os.urandom(3).hex()}"
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return directory

    def create_somewhere(self, name: str) -> tuple[Path, dict[str, str] | None]:
        """A new run directory, absolute, and a warning if it had to be made outside the store.

        A program must run and be measured even if the store cannot be written, be it that nothing
        can be made there or that its disk is full. Raises OSError if no other place can either.
        """
        try:
            # Absolute: the program that records itself may change its working directory.
            return self._create_with_room(name).absolute(), None
        except OSError as error:
            directory = create_elsewhere(name, error)
            fallback = directory.parents[1]
            return directory, warning(
                "store-unwritable",
                f"{self} cannot be written: {error.strerror or error}; "
                f"this run is kept in {fallback} instead",
                f"give --store DIR (or PEPR_STORE) that you may write; {fallback} is a store too",
            )

    def _create_with_room(self, name: str) -> Path:
        """A new run directory in which some bytes can be written. OSError without; none is left."""
        directory = self.create(name)
        probe = directory / ".room"
        try:
            file = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, _ROOM_BYTES)
            finally:
                os.close(file)
                probe.unlink()
        except OSError:
            directory.rmdir()
            raise
        return directory

    def find(self, wanted: Filter | None = None) -> QueryResult:
        """The runs that are wanted; incomplete ones with what they took so far."""
        from pepr_profiler.store.index import Index

        return Index(self.path / "index", self.runs_path).find(self._names(), wanted)

    def directory(self, ref: str) -> Path:
        """The directory of a run: an id, a unique prefix of one, a run directory, or `last`.

        UsageError if there is none or more than one.
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
            why=f"no run id in {self} begins with it, and there is no such run directory"
            if self._names()
            else f"{self} has no runs",
            fix="see: pepr-profile runs list, or give --store DIR",
        )

    def load(self, ref: str) -> dict[str, Any]:
        """The whole summary of a run: as it was written at its end, or computed now if it has none.

        UsageError as for `directory`, TraceError if it is no recording or of a newer version.
        """
        return self.load_from(self.directory(ref))

    def load_from(self, directory: Path) -> dict[str, Any]:
        """The whole summary of the run in a directory. TraceError as for `load`."""
        return self._identified(_summary_of(directory), directory)

    def set(
        self,
        ref: str,
        *,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, str | None] | None = None,
    ) -> dict[str, Any]:
        """Adds metrics to a run, and changes its facts, which are `name` and `experiment`.

        Returns the new summary. UsageError for facts of a run that is still recorded, because its
        recorder would overwrite them at the end.
        """
        directory = self.directory(ref)
        run = _summary_of(directory)  # raises for what is no recording, before anything is written
        if facts and is_recording(directory, run):
            raise _still_recording(directory, "changed", fix="wait for its end")
        _require_whole(directory, run)
        if metrics:
            writer = EventWriter(directory)
            writer.metrics(dict(metrics), t_ns=run["clock"][-1]["t_ns"])
            writer.close()
            if writer.lost:
                raise _unwritable(directory, f"the metrics of {ref} could not be written")
        summary = _summarise(directory, {**read_run(directory), **(facts or {})})
        if summary.get("complete") and summary.get("files") is not None:
            summary["files"] = list_files(directory) or summary["files"]
        try:
            write_json(directory / "run.json", summary)
        except OSError as error:
            raise _unwritable(directory, f"{ref} could not be changed", error) from error
        return self._identified(summary, directory)

    def removable(self, ref: str, *, force: bool = False) -> Path:
        """The directory of a run that may be removed.

        UsageError if it is not in this store, or is being recorded, unless `force`.
        """
        directory = self.directory(ref)
        # A link in the store may be removed, wherever it leads: only its folder is resolved.
        inside = directory.absolute().parent.resolve() == self.runs_path.resolve()
        if not inside or directory.name in ("", ".", ".."):
            raise UsageError(
                f"{ref} is not removed",
                why=f"it is outside {self}",
                fix="remove the directory itself, or say which store it is in: --store DIR",
            )
        run: dict[str, Any] = {}
        with suppress(TraceError):  # a damaged run may be removed, if nobody writes it
            run = read_run(directory)
        if not force and is_recording(directory, run):
            raise _still_recording(
                directory, "removed", fix="wait for its end; if it has none: --force"
            )
        return directory

    def remove(self, directory: Path) -> None:
        """Removes a directory that `removable` gave: it is renamed first, then its files go."""
        import shutil

        try:
            if directory.is_symlink():
                directory.unlink()
                return
            doomed = self.runs_path / f".removed-{os.urandom(6).hex()}"
            directory.rename(doomed)
            for path in self.runs_path.glob(".removed-*"):  # with what a crash has left
                shutil.rmtree(path)
        except FileNotFoundError:
            return  # somebody else was faster
        except OSError as error:
            raise _unwritable(directory, f"{directory} could not be removed", error) from error

    def _names(self) -> list[str]:
        """The names of what may be a run: all that do not begin with a dot."""
        try:
            return [name for name in os.listdir(self.runs_path) if name[0] != "."]  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise PeprError(
                f"{self} cannot be read",
                why=error.strerror or str(error),
                fix="give --store DIR (or PEPR_STORE) that you may read",
            ) from error

    def _holds(self, name: str) -> bool:
        plain = name == Path(name).name and name not in ("", "..")
        return plain and (self.runs_path / name).is_dir()

    def _identified(self, run: dict[str, Any], directory: Path) -> dict[str, Any]:
        """The run with the name of its directory as id: it may have been copied and renamed."""
        if directory.absolute().parent == self.runs_path.absolute():
            run["run_id"] = directory.name
        return run


def create_elsewhere(name: str, error: OSError | None = None) -> Path:
    """A new run directory, in a store that is made in a temporary folder.

    Raises `error`, or another OSError, if there is no place.
    """
    import tempfile

    for folder in (None, "/var/tmp", "/dev/shm"):
        try:
            fallback = Path(tempfile.mkdtemp(prefix="pepr-", dir=folder))
            try:
                return Store(fallback)._create_with_room(name)
            except OSError:
                with suppress(OSError):
                    Store(fallback).runs_path.rmdir()
                    fallback.rmdir()
                raise
        except OSError as failure:
            error = error or failure
    assert error is not None
    raise error


def is_recording(directory: Path, run: Mapping[str, Any]) -> bool:
    """Whether a run may still be recorded. `run` is its run.json, {} if that cannot be read."""
    if run.get("complete"):
        return False
    if run and recorder_lives(run):
        return True
    changed_ns, _ = files_of(directory)
    return time.time() - changed_ns * 1e-9 < _QUIET_S


def _summary_of(directory: Path) -> dict[str, Any]:
    """A run's summary: read if the run has ended, else computed from its files."""
    run = read_run(directory)
    return run if has_ended(run) else _summarise(directory, run)


def _summarise(directory: Path, run: dict[str, Any]) -> dict[str, Any]:
    from pepr_profiler.summary.summarise import summarise

    return summarise(directory, run=run)


def _require_whole(directory: Path, run: Mapping[str, Any]) -> None:
    from pepr_profiler.summary.summarise import require_whole

    require_whole(directory, run)


def _still_recording(directory: Path, verb: str, *, fix: str) -> UsageError:
    return UsageError(f"{directory.name} is not {verb}", why="it may still be recorded", fix=fix)


def _unwritable(directory: Path, what: str, error: OSError | None = None) -> PeprError:
    why = f"{directory} does not take them" if error is None else error.strerror or str(error)
    return PeprError(what, why=why, fix="check its permissions and the free space")
