"""Watches which of the job's processes still run, and which others use CPU or GPU."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pepr_profiler.recording.processes import ProcessOwners
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.events import EventWriter
from pepr_profiler.trace.lane import LaneInfo
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pepr_profiler.daemon_client.client import RawRows
    from pepr_profiler.recording.lanes import Lanes, RowWatcher

    class Claims(Protocol):
        """Who works out the run's certain part of each device for the daemon's metrics."""

        def on_rows(self, lane: LaneInfo, rows: RawRows) -> None: ...
        def on_note(self, facts: Mapping[str, Any]) -> None: ...
        def due(self, *, last: bool = False) -> tuple[int, dict[str, list[float]]] | None: ...


_WORKS_S = 0.01  # a tenth of the process lane's period


class JobPresence:
    """Whether any process that is followed, or a descendant of one, still lives."""

    def __init__(self, channels: Sequence[str]) -> None:
        self._at = [channels.index(name) for name in ("job/processes", "job/cpu")]
        self.all_exited_ns: int | None = None
        """When all of them had exited; None while somebody lives."""
        self._empty_ns: int | None = None
        self._seen_cpu_s = 0.0

    def take(self, rows: RawRows) -> None:
        """Looks at new rows of the process lane."""
        times_ns = memoryview(rows[1]).cast("q")
        living, cpu_s = (memoryview(rows[3][place]).cast("d") for place in self._at)
        for at_ns, count, used_s in zip(times_ns, living, cpu_s, strict=True):
            # A daemon whose parents ended between two samples shows by its CPU time alone.
            works = used_s - self._seen_cpu_s > _WORKS_S
            self._seen_cpu_s = used_s
            if count != 0:  # or unknown
                self._empty_ns = self.all_exited_ns = None
            elif self._empty_ns is None or works:
                self._empty_ns, self.all_exited_ns = at_ns, None
            else:
                self.all_exited_ns = self._empty_ns


class Watches:
    """Who of the job lives, whose each process on a GPU is, and who else uses the CPU.

    What is found out is written to `processes-HOST-PID.jsonl` of the run, because a PID means
    nothing once its process has ended. `claims`, if there are any, take the same rows and notes.
    """

    def __init__(self, lanes: Lanes, *, root: str, follows: bool, dedicated: bool) -> None:
        self.claims: Claims | None = None
        self.presence: JobPresence | None = None
        self._lanes = lanes
        self._root = root
        self._follows = follows
        self._dedicated = dedicated
        self._owners: ProcessOwners | None = None
        self._notes: EventWriter | None = None
        self._pid_places: dict[str, list[int]] = {}  # of each list of a GPU's processes
        self._cpu_places: list[int] = []  # the job's and all CPU time, in the process lane
        self._others_before_s = math.nan

    def begin(self, directory: Path) -> None:
        """The run begins: finds out from now on who its processes are."""
        self._notes = EventWriter(directory, "processes")
        self._owners = ProcessOwners(
            self._root,
            self.note,
            dedicated=self._dedicated,
            marker=(RUN_DIR_VARIABLE, str(directory)),
        )

    def watchers_of(self, lane: LaneInfo) -> list[RowWatcher]:
        """Who looks at the rows of a lane that begins to be written."""
        kind, names = SensorSpec(lane.spec).kind, [channel.name for channel in lane.channels]
        watchers: list[Callable[[RawRows], None]] = []
        if self.claims is not None and kind in ("processes", "nvml-processes"):
            watchers.append(functools.partial(self.claims.on_rows, lane))
        if lane.name == "processes":
            self._cpu_places = [names.index(name) for name in ("job/cpu", "system/busy")]
            if self._follows:
                self.presence = JobPresence(names)
                watchers.append(self.presence.take)
        if kind == "nvml-processes":
            self._pid_places[lane.name] = [
                i for i, channel in enumerate(lane.channels) if channel.reading.startswith("pid")
            ]
        return watchers

    def look(self) -> None:
        """Looks up processes that are new on a GPU, and now and then who else uses the CPU."""
        if self._owners is not None:
            self._owners.on_gpu(self._on_gpu())
            self._owners.tick(self._others_cpu_s())

    def move_to(self, directory: Path) -> None:
        """Writes the notes to another directory from now on, those of before too."""
        if self._notes is not None:
            self._notes.move_to(directory)

    def end(self) -> None:
        """Takes a last look and closes the file of notes."""
        if self._owners is not None:
            self._owners.end()
        if self._notes is not None:
            self._notes.close()

    @property
    def has_unidentified(self) -> bool:
        """Whether it is not known yet whose some process on a GPU is."""
        return self._owners is not None and self._owners.has_unidentified

    def job_cpu_s(self, until_ns: int) -> float | None:
        """CPU time that the job has used until an instant or a little later; None if unknown.

        Waits for the sample that says so, for at most 0.5 s.
        """
        deadline_s = time.monotonic() + 0.5
        while self._cpu_places and (newest := self._lanes.newest_row("processes")) is not None:
            if newest[0] >= until_ns or time.monotonic() >= deadline_s:
                return newest[1][self._cpu_places[0]]
            time.sleep(0.01)
        return None

    def note(self, facts: dict[str, Any]) -> None:
        """Stores a note beside the lanes."""
        assert self._notes is not None
        self._notes.write(json.dumps(facts))
        if self.claims is not None:
            self.claims.on_note(facts)

    def _on_gpu(self) -> set[int]:
        """The PIDs in the newest rows of the lists; 0 and unknown are none."""
        found: set[int] = set()
        for name, places in self._pid_places.items():
            if (newest := self._lanes.newest(name)) is not None:
                found.update(int(newest[place]) for place in places if newest[place] > 0)
        return found

    def _others_cpu_s(self) -> float:
        """CPU seconds of this machine that were not the job's, since this was first asked."""
        newest = self._lanes.newest("processes") if self._cpu_places else None
        if newest is None:
            return math.inf
        job_s, busy_s = (newest[place] for place in self._cpu_places)
        if math.isnan(self._others_before_s):
            self._others_before_s = busy_s - job_s
        others_s = busy_s - job_s - self._others_before_s
        return math.inf if math.isnan(others_s) else others_s
