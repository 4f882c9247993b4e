"""The lanes of a recording: one for each sensor, opened, written to disk, and closed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.errors import SensorError
from pepr_profiler.recording.options import Options
from pepr_profiler.sensors.detect import detect
from pepr_profiler.sensors.spec import (
    ProcessRoot,
    SensorSpec,
    lanes_by_name,
    processes_spec,
    with_process_lists,
)
from pepr_profiler.trace.lane import LaneInfo, LaneWriter, describe

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any

    from pepr_profiler.daemon_client.client import DaemonClient, RawRows, RemoteLane

    RowWatcher = Callable[[RawRows], None]

_OWN_PERIOD = ("processes", "nvml-processes")  # no shorter one that is asked for or learnt
_SLOWEST_OWN_NS = 1_000_000_000

_OPEN_TIMEOUT_S = 5.0  # waking an NVIDIA driver without persistence mode takes 1-3 s a GPU
_STOP_TIMEOUT_S = 1.0

_JOURNAL_S = 0.9
"""How often the rows are written to disk: a crash loses no more than 1 s."""

AddWarning = Callable[[str, str, str], None]
"""Takes a warning's code, text and hint."""


class RecordedLane:
    """One sensor of a recording: who samples it, who writes it, and who looks at its rows.

    `writer` is None until the sensor has opened and its file could be made.
    """

    __slots__ = ("name", "sampler", "spec", "watchers", "writer")

    def __init__(self, name: str, spec: SensorSpec, sampler: _core.Sampler | RemoteLane) -> None:
        self.name, self.spec, self.sampler = name, spec, sampler
        self.writer: LaneWriter | None = None
        self.watchers: Sequence[RowWatcher] = ()

    @property
    def own(self) -> _core.Sampler | None:
        """Our sampler of it; None for a lane that the node's daemon samples."""
        return self.sampler if isinstance(self.sampler, _core.Sampler) else None

    @property
    def remote(self) -> RemoteLane | None:
        """The daemon's lane where it samples; else None."""
        return None if isinstance(self.sampler, _core.Sampler) else self.sampler


class Lanes:
    """The lanes of one recording, which begin to open when this is made.

    `root` is whom the process lane follows, besides whatever bears `mark` in its environment.
    `follows` says that processes are waited for which already run. `missing` has what could not be
    opened, with the reason and the remedy.
    """

    def __init__(
        self,
        options: Options,
        *,
        root: str,
        mark: str | None,
        follows: bool,
        notifier: _core.Notifier,
        add_warning: AddWarning,
    ) -> None:
        self.missing: list[dict[str, str]] = []
        self._failed: set[SensorSpec] = set()
        self.dropped_rows = 0
        self.client: DaemonClient | None = None  # made when a sensor is denied to us
        self._options = options
        self._follows = follows
        self._add_warning = add_warning
        self.directory: Path | None = None  # both are set when writing begins
        self._watchers_of: Callable[[LaneInfo], Sequence[RowWatcher]]
        self._opened_ns = time.monotonic_ns()
        self._journal = _core.Journal(_JOURNAL_S, notifier)
        specs = with_process_lists(options.sensors or detect())
        named = lanes_by_name([*specs, processes_spec(root, mark)])
        budget, readers = _core.CpuBudget(options.overhead), _core.Readers()
        self._lanes = {
            name: RecordedLane(
                name,
                spec,
                _core.Sampler(
                    spec,
                    self._period_ns(spec),
                    learn=options.period_ns is None and spec.kind not in _OWN_PERIOD,
                    budget=None if self._is_asked_period(spec) else budget,
                    readers=readers,
                    notifier=notifier,
                ),
            )
            for name, spec in named.items()
        }

    # --- opening ---

    def wait_ready(self) -> None:
        """Waits until the lanes sample.

        Raises SensorError for a sensor that was asked for and is not there. A detected one that is
        absent goes to `missing`. One that is slow to open joins when it is ready.
        """
        deadline = time.monotonic() + _OPEN_TIMEOUT_S
        for lane in list(self._lanes.values()):
            if lane.spec.kind == "nvml-processes":
                continue  # it joins when it is ready: who uses a GPU is no reason to wait
            if not self._is_settled(lane, max(0.0, deadline - time.monotonic())):
                self._add_warning(
                    "slow-sensor",
                    f"{lane.spec} is still opening after {_OPEN_TIMEOUT_S:.0f} s; "
                    "the run starts without it",
                    "it joins when it is ready; NVIDIA: sudo nvidia-smi -pm 1",
                )

    def begin_writing(
        self, directory: Path, watchers_of: Callable[[LaneInfo], Sequence[RowWatcher]]
    ) -> None:
        """Writes to `directory` from now on what the lanes sample; the first rows at once.

        `watchers_of` is asked, for each lane that begins to be written, who looks at its rows.
        """
        self.directory, self._watchers_of = directory, watchers_of
        for lane in list(self._lanes.values()):
            self._open_writer(lane)
        self.flush()  # a program may be killed at once
        if self.has_remote:
            self.look()

    def move_to(self, directory: Path) -> None:
        """Writes to another directory from now on, which gets what is in the files of this one.

        Raises OSError if that fails.
        """
        self.directory = directory if self.directory is not None else None
        for lane in list(self._lanes.values()):
            if lane.writer is not None:
                lane.writer.move_to(directory)

    def _is_settled(self, lane: RecordedLane, timeout_s: float) -> bool:
        """Whether a lane has opened, or failed and was removed. False: it is still opening.

        Raises SensorError if it failed and was asked for, and nothing is written yet. If it failed
        for want of descriptors or memory, the run goes on with what works.
        """
        try:
            if not lane.sampler.wait_ready(timeout_s):
                return False
        except SensorError as error:
            if self._read_through_daemon(lane):
                return True
            named = self._follows or ProcessRoot(lane.spec.where).cgroup
            asked = self._options.sensors or (named and lane.name == "processes")
            if asked and self.directory is None and not _is_shortage(error):
                raise
            del self._lanes[lane.name]
            # A missing driver is reported once, for its energy, and not for its process list too.
            energy = SensorSpec.of("nvml", lane.spec.where)
            reported = lane.spec.kind == "nvml-processes" and energy in self._failed
            self._failed.add(lane.spec)
            if not reported and not (self.client is not None and self.client.covers(lane.spec)):
                self._add_missing(lane, error)
            return True
        notes = lane.sampler.notes
        if any(note.denied for note in notes) and self._read_through_daemon(lane):
            return True
        for note in notes:
            self._add_missing(lane, note)
        return True

    def _read_through_daemon(self, lane: RecordedLane) -> bool:
        """Reads through the node's daemon what we may not read; False if it cannot either."""
        if self.client is None:
            from pepr_profiler.daemon_client.address import sockets_there

            if not sockets_there():
                return False
            from pepr_profiler.daemon_client.client import DaemonClient

            self.client = DaemonClient()
        remote = self.client.lane(lane.spec, named=bool(self._options.sensors))
        if remote is None:
            return False
        lane.sampler.stop(_STOP_TIMEOUT_S)
        lane.sampler, lane.spec = remote, SensorSpec(remote.spec)
        return True

    def _add_missing(self, lane: RecordedLane, part: SensorError | _core.Note) -> None:
        from pepr_profiler.sensors.machine import read_surroundings  # if something is missing
        from pepr_profiler.sensors.remedy import remedy

        self.missing.append(remedy(lane.spec, part, read_surroundings()))

    def _is_asked_period(self, spec: SensorSpec) -> bool:
        return self._options.period_ns is not None and spec.kind not in _OWN_PERIOD

    def _period_ns(self, spec: SensorSpec) -> int:
        asked_ns, base_ns = self._options.period_ns, spec.base_period_ns
        if spec.kind not in _OWN_PERIOD:
            return asked_ns or base_ns
        # A long period slows these too, so that they cost little. But the end of a process that is
        # followed is waited for.
        return max(base_ns, min(asked_ns or 0, 0 if self._follows else _SLOWEST_OWN_NS))

    def _open_writer(self, lane: RecordedLane) -> LaneWriter | None:
        """The lane's writer, made once the sensor has opened; None if there is none."""
        if lane.writer is not None or self.directory is None:
            return lane.writer
        if lane.sampler.state == "opening":
            return None
        if lane.sampler.state == "failed":
            self._is_settled(lane, 0.0)
            return None
        period_ns = lane.remote.period_ns if lane.remote else self._period_ns(lane.spec)
        info = LaneInfo(lane.name, lane.spec, period_ns, describe(lane.sampler.channels))
        try:
            lane.writer = LaneWriter(self.directory, info)
        except OSError as error:
            why = error.strerror or error
            self._add_warning(
                "unwritable",
                f"{self.directory / lane.name}.arrows cannot be written: {why}",
                "free some space or check the permissions",
            )
            return None
        lane.watchers = self._watchers_of(info)
        if lane.own is not None:
            self._journal.add(lane.own, lane.writer.file)
        return lane.writer

    # --- while they sample ---

    def look(self) -> OSError | None:
        """Hands new rows to those who watch them, and opens the writers of lanes that are ready.

        Also writes down what the daemon samples. Returns why the disk takes nothing, if so.
        """
        error = None
        for lane in list(self._lanes.values()):
            writer = self._open_writer(lane)
            if writer is None:
                continue
            while (lane.remote or lane.watchers) and (rows := lane.sampler.read()) is not None:
                if lane.remote:
                    writer.write(*rows[1:])
                for watch in lane.watchers:
                    watch(rows)
            error = error or writer.error
        return error

    def flush(self) -> None:
        """Writes to disk what our own lanes have sampled until now."""
        self._journal.flush()

    @property
    def needs_looks(self) -> bool:
        """Whether somebody watches rows, or a lane is still to be written."""
        return any(lane.watchers or lane.writer is None for lane in self._lanes.values())

    @property
    def has_remote(self) -> bool:
        """Whether the daemon samples a lane, which only `look` writes down."""
        return any(lane.own is None for lane in self._lanes.values())

    def is_written(self, name: str) -> bool:
        """Whether the lane of this name exists and is being written."""
        return name in self._lanes and self._lanes[name].writer is not None

    def newest(self, name: str) -> list[float] | None:
        """The values of a lane's newest row; None if it is not written, or has no row yet."""
        newest = self.newest_row(name)
        return None if newest is None else newest[1]

    def newest_row(self, name: str) -> tuple[int, list[float]] | None:
        """As `newest`, with the time of the row, ns."""
        return self._lanes[name].sampler.latest() if self.is_written(name) else None

    # --- the end ---

    def longest_refresh_s(self) -> float:
        """The longest time between two refreshes of a sensor, as far as it was learnt; else 0."""
        return max((stats["refresh_s"] for stats in self._stats().values()), default=0.0)

    def unlearnt_counters(self) -> dict[str, list[float]]:
        """The newest values of the counters in lanes whose refreshes are not known yet."""
        found: dict[str, list[float]] = {}
        if self._options.period_ns is not None:
            return found
        for lane in self._lanes.values():
            own, newest = lane.own, self.newest(lane.name)
            if own is None or newest is None or own.stats()["settled"]:
                continue
            channels = zip(own.channels, newest, strict=True)
            values = [v for channel, v in channels if channel.counter and channel.unit == "J"]
            if any(value > 0 for value in values):
                found[lane.name] = values
        return found

    def unmoved(self, counters: dict[str, list[float]]) -> dict[str, list[float]]:
        """Those of `unlearnt_counters` in which one still is as it was then."""
        now = self.unlearnt_counters()
        return {
            name: then
            for name, then in counters.items()
            if name in now and any(a == b for a, b in zip(now[name], then, strict=True))
        }

    def stop(self) -> None:
        """Takes a last sample of each lane and ends it; then the journal writes the rest."""
        for lane in list(self._lanes.values()):
            if not lane.sampler.stop(_STOP_TIMEOUT_S):
                self._add_warning(
                    "hung-sensor",
                    f"{lane.spec} did not answer for {_STOP_TIMEOUT_S:.0f} s; its lane ends early",
                    "see dmesg for its driver",
                )
            self._open_writer(lane)  # it may have opened, or failed, since the last look
        self._journal.stop()

    def close(self) -> int:
        """Completes the files. Returns how many rows were lost before they could be written."""
        lost = 0
        for lane in self._lanes.values():
            if lane.remote is not None:
                lost += lane.remote.lost
            if lane.writer is not None:
                lane.writer.close()
                lost += lane.writer.file.lost_rows
                self.dropped_rows += lane.writer.file.dropped_rows
        return lost

    def discard(self) -> None:
        """Ends everything at once; nothing is completed."""
        for lane in self._lanes.values():
            lane.sampler.stop(_STOP_TIMEOUT_S)
        self._journal.stop()
        for lane in self._lanes.values():
            if lane.writer is not None:
                lane.writer.close()
        if self.client is not None:
            self.client.close()

    def release(self) -> None:
        """Lets go of what the ended lanes keep open."""
        self._lanes.clear()
        del self._journal, self._watchers_of

    def facts(self, *, lost_rows: int, dedicated: bool) -> dict[str, Any]:
        """How sampling went, as run.json has it under `recording.sampler`.

        `dedicated` says that this process only records: its whole CPU time is then the profiler's.
        """
        stats = self._stats()
        lanes_s = sum(s["cpu_s"] for s in stats.values())
        own_s = max(0.0, time.process_time() - lanes_s) if dedicated else self._journal.cpu_s
        elapsed_s = (time.monotonic_ns() - self._opened_ns) * 1e-9
        return {
            "cpu_s": lanes_s + own_s,
            "dropped": int(lost_rows) + self.dropped_rows,
            "late": int(sum(s["late"] for s in stats.values())),
            "timed": int(sum(s["samples"] for s in stats.values())),
            # None: every read brings news, or the sensor never moved.
            "refresh_s": {name: s["refresh_s"] or None for name, s in stats.items()},
            "wasted": {
                name: s["wasted"] / s["settled"] if s["settled"] else None
                for name, s in stats.items()
            },
            "overhead": {
                "budget": self._options.overhead,
                "used": lanes_s / elapsed_s if elapsed_s > 0 else None,
                "gap_s": {n: s["gap_s"] for n, s in stats.items() if s["gap_s"]},
            },
        }

    def _stats(self) -> dict[str, dict[str, float]]:
        """How sampling went in our own lanes; the daemon's status has that of its lanes."""
        return {lane.name: lane.own.stats() for lane in self._lanes.values() if lane.own}


def _is_shortage(error: SensorError) -> bool:
    """Whether a sensor is there and cannot be opened for want of descriptors or memory."""
    numbers = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return any(os.strerror(number) in error.why for number in numbers)
