"""Runs on disk: `STORE/runs/RUN_ID/`, found by id, unique prefix or path."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pepr_profiler.errors import PeprError, TraceError, UsageError
from pepr_profiler.trace import EventWriter, read_run, write_json


def default_path() -> Path:
    """`PEPR_STORE`, else the user's data directory, so that any shell finds every run."""
    given = os.environ.get("PEPR_STORE")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "pepr-profiler"


class Store:
    """A directory of runs."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else default_path()

    @property
    def runs_path(self) -> Path:
        return self.path / "runs"

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

    def find(self, ref: str) -> Path:
        """The directory of a run. Raises UsageError if there is none or more than one."""
        as_path = Path(ref)
        if (as_path / "run.json").is_file():
            return as_path
        names = sorted(path.name for path in self._directories() if path.name.startswith(ref))
        if ref in names:
            names = [ref]
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

    def summary(self, ref: str) -> dict[str, Any]:
        """The summary of a run: as it was written at its end, computed now if it has no end."""
        return summary_of(self.find(ref))

    def runs(self, *, experiment: str | None = None) -> Iterator[dict[str, Any]]:
        """Summaries, oldest first, incomplete runs too; directories that are no run are not."""
        found = []
        for directory in self._directories():
            try:
                run = read_run(directory)
            except TraceError:
                continue
            if experiment is None or run.get("experiment") == experiment:
                found.append((run.get("started_at") or "", directory, run))
        for _, directory, run in sorted(found, key=lambda item: item[:2]):
            try:
                yield run if _has_summary(run) else summary_of(directory)
            except TraceError:
                continue  # it ended before its first sample: there is nothing to tell

    def set_metrics(self, ref: str, values: Mapping[str, float]) -> dict[str, Any]:
        """Adds metrics to a run, as a new line of events, and summarises it anew."""
        directory = self.find(ref)
        run = self.summary(ref)  # raises for what is no recording, before anything is written
        writer = EventWriter(directory)
        writer.metrics(dict(values), t_ns=run["clock"][-1]["t_ns"])
        writer.close()
        if writer.lost:
            raise PeprError(
                f"the metrics of {ref} could not be written",
                why=f"{directory} does not take them",
                fix="check its permissions and the free space",
            )
        return refresh(directory)

    def _directories(self) -> list[Path]:
        try:
            return [path for path in self.runs_path.iterdir() if path.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise PeprError(
                f"the store {self.path} cannot be read",
                why=error.strerror or str(error),
                fix="give --store DIR (or PEPR_STORE) that you may read",
            ) from error


def summary_of(directory: Path) -> dict[str, Any]:
    """A run's summary: read if it is complete, else computed from what was flushed."""
    run = read_run(directory)
    if _has_summary(run):
        return run
    from pepr_profiler.summary import summarise

    return summarise(directory)


def _has_summary(run: Mapping[str, Any]) -> bool:
    return bool(run.get("complete")) and isinstance(run.get("energy"), dict)


def refresh(directory: Path) -> dict[str, Any]:
    """Computes a summary from the trace again and stores it."""
    from pepr_profiler.summary import summarise

    summary = summarise(directory)
    write_json(directory / "run.json", summary)
    return summary
