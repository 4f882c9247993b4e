"""A recording in progress: begins and ends its parts, and writes the facts of its run.json.

It knows nothing of joules. What a run cost is worked out later, from the files that it writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.recording.lanes import AddWarning, Lanes
from pepr_profiler.recording.launcher import Launch, rank_facts
from pepr_profiler.recording.options import Options
from pepr_profiler.recording.processes import gpu_environments, run_around
from pepr_profiler.recording.watches import Watches
from pepr_profiler.trace.events import EventWriter
from pepr_profiler.trace.files import list_files, moved_up
from pepr_profiler.trace.run_json import (
    RUN_DIR_VARIABLE,
    boot_id,
    read_live_run,
    write_json,
)
from pepr_profiler.units import NS_PER_S, utf8_text

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any

    from pepr_profiler.recording.watches import Claims

_REFRESHES_AFTER, _TWO_AFTER_S = 2.1, 0.25
"""Lanes go on for two refreshes behind the end, which may take so long."""

_ONE_AFTER_S, _LOOK_S = 1.1, 0.01
"""A slow counter has its energy of the end at its next refresh only. It is waited for so long; one
whose refreshes are not known yet is looked at so often meanwhile."""

TICK_S = 0.5
"""How often `Recorder.tick` is to be called while there is something to watch."""

_FIRST_S, _REMOTE_S, _IDLE_S = 0.05, 1.0, 10.0
"""How often it is to be called where we write down a daemon's lanes, at first and later, and where
nothing is to do."""


_STORED = ("intensity", "pue", "cpu_power", "performance", "scope")
"""The options that a summary needs."""


class Recorder:
    """One run, from the first sample to its complete files.

    `root` is "children" for a wrapper, which does not charge itself to its child, "self" for a
    program that profiles itself, "pids=…" for processes that already run, and "cgroup=…" for what
    is in a cgroup; `attached` describes what ran already. `around` is the directory of the run
    around this one, empty if there is none; it is searched for if it is not given. `dedicated` says
    that this process only records: its CPU time is the profiler's. `warn` hears each warning at
    once. A wrapper gives its child `mark` as MARK_VARIABLE: what bears it is the job's, wherever it
    hangs.

    Threads of the core sample and write to disk. Everything else is done in `tick`, by the caller's
    thread; `notifier` becomes ready when a tick is due earlier.
    """

    def __init__(
        self,
        options: Options,
        *,
        root: str,
        command: Sequence[str],
        attached: Sequence[Mapping[str, Any]] = (),
        around: str | None = None,
        dedicated: bool = False,
        warn: AddWarning | None = None,
    ) -> None:
        self.options = options
        self.command = list(command)
        self.attached = [dict(target) for target in attached]
        self.warnings: list[dict[str, str]] = []
        self.directory = Path()
        self.notifier = _core.Notifier()
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}" if root == "children" else None
        self._root = root
        self._dir_around = around
        self._dedicated = dedicated
        self._warn = warn
        self._pid = os.getpid()
        self._window_ns: list[int | None] = [None, None]
        self._clock = [_clock_pair()]
        self._directory_fd = -1
        self._opened: os.stat_result | None = None
        self._elsewhere: Callable[[], Path]
        self._events: EventWriter | None = None
        self._disk_is_full = False
        self._sampler: dict[str, Any] | None = None
        self._exit: dict[str, Any] | None = None
        self._around: dict[str, Any] = {}
        self._launch = Launch()
        self._facts: dict[str, Any] = {}
        self._lanes = Lanes(
            options,
            root=root,
            mark=self.mark,
            follows=bool(attached),
            notifier=self.notifier,
            add_warning=self.add_warning,
        )
        self._watches = Watches(self._lanes, root=root, follows=bool(attached), dedicated=dedicated)

    # --- the life of a recording ---

    def open(
        self, directory: Path, *, elsewhere: Callable[[], Path], claims: Callable[[], Claims]
    ) -> None:
        """Waits until the lanes sample; the run will be written to `directory`, which exists.

        `elsewhere` makes another directory, should this one be removed on the way, and `claims` the
        object that the daemon's metrics need, should a daemon ask for it. Raises SensorError for a
        sensor that was asked for and is not there.
        """
        self._elsewhere = elsewhere
        self._hold(directory)
        self._lanes.wait_ready()
        client = self._lanes.client
        if client is not None:
            client.announce(directory.name)
            if client.wants_claims:
                self._watches.claims = claims()

    def begin(self, t_ns: int) -> None:
        """The measured window begins; from here on the run is on disk."""
        self._window_ns[0] = t_ns
        self._watches.begin(self.directory)
        self._around = {
            "root": self._root,
            "cuda": gpu_environments(self._root),
            "outer": _outer_facts(self._root, self._dir_around),
        }
        self._launch = Launch.of_roots(self._root)
        self._write_run()
        self._lanes.begin_writing(self.directory, self._watches.watchers_of)

    def tick(self) -> float:
        """Looks at what neither sampler nor journal does; after how many seconds to do so again.

        `notifier` may ask for it earlier. A training whose GPUs we read ourselves is looked at
        every 10 s.
        """
        if self._pid != os.getpid():
            return _IDLE_S
        self.notifier.clear()
        self.follow_directory()
        self._look()
        if self._lanes.needs_looks or self._watches.has_unidentified:
            return TICK_S
        if not self._lanes.has_remote:
            return _IDLE_S
        elapsed_s = (time.monotonic_ns() - (self._window_ns[0] or 0)) * 1e-9
        return min(max(_FIRST_S, elapsed_s), _REMOTE_S)

    @property
    def first_tick_s(self) -> float:
        """After how many seconds the first tick is due: a program may be killed at once."""
        return _FIRST_S if self._lanes.has_remote else TICK_S

    def flush(self) -> None:
        """Writes to disk what was sampled until now."""
        if self._pid == os.getpid():
            self._lanes.flush()
            self._look()

    @property
    def all_exited_ns(self) -> int | None:
        """When all processes that are followed had exited; None while any lives."""
        presence = self._watches.presence
        return None if presence is None else presence.all_exited_ns

    @property
    def anyone_lives(self) -> bool:
        """Whether anything that is followed has run until now, as far as has been flushed."""
        return self.all_exited_ns is None and self._lanes.is_written("processes")

    def job_cpu_s(self, until_ns: int) -> float | None:
        """CPU time of the job until about `until_ns`, s; None if unknown. It may wait for 0.5 s."""
        return self._watches.job_cpu_s(until_ns)

    @property
    def events(self) -> EventWriter:
        """Where this process writes the run's marks and metrics."""
        if self._events is None:
            self._events = EventWriter(self.directory, rank_facts=rank_facts)
        return self._events

    def log(self, name: str, value: float, *, t_ns: int) -> None:
        """Records one value of a metric that was seen at `t_ns`."""
        self.events.metrics({name: value}, t_ns=t_ns)

    def note(self, facts: dict[str, Any]) -> None:
        """Stores what a report needs to know of the run's processes (trace/events.py)."""
        self._watches.note(facts)

    def add_warning(self, code: str, text: str, hint: str) -> None:
        """Keeps a warning for the summary, each text once, and passes it to `warn` at once."""
        if any(warning["text"] == text for warning in self.warnings):
            return
        self.warnings.append({"code": code, "text": text, "hint": hint})
        if self._warn is not None:
            self._warn(code, text, hint)

    def close(
        self, end_ns: int, *, exit_facts: dict[str, Any], meanwhile: Callable[[], object]
    ) -> None:
        """Takes the last samples, ends the lanes and completes the files.

        `exit_facts` say how the run ended, with its exit status (or None) as `code`. The lanes go
        on behind `end_ns` until they have seen what happened before it, for up to 1.1 s;
        `meanwhile` is called first. What it raises is raised when the files are complete.
        """
        self._window_ns[1], self._exit = end_ns, exit_facts
        fault = None
        try:
            meanwhile()
        except Exception as error:
            fault = error  # raised when the recording is whole
        self._wait_for_refreshes(end_ns)
        self._lanes.stop()
        self.follow_directory()
        self._close_directory()
        self.flush()
        self._claim(last=True)
        if self._lanes.client is not None:
            for warning in self._lanes.client.close():
                self.add_warning(*warning)
        self._watches.end()
        if self._root == "self":  # a program may choose its GPUs and start its ranks in the block
            self._around["cuda"] = gpu_environments(self._root)
            if self._launch.rank is None:
                self._launch = Launch.of_roots(self._root)
        if self._events is not None:
            self._events.close()
        lost_rows = self._lanes.close()
        if self._lanes.dropped_rows:
            self.add_warning(
                "rows-lost",
                f"{self._lanes.dropped_rows} samples could not be written; "
                "counters keep their energy across the hole, power readings do not",
                f"free space at {self.directory}",
            )
        self._clock.append(_clock_pair())
        self._sampler = self._lanes.facts(lost_rows=lost_rows, dedicated=self._dedicated)
        self._write_run()
        if fault is not None:
            raise fault

    def complete(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the closed run's summary to its run.json; the summary with what went wrong."""
        files = list_files(self.directory)
        whole = {**summary, "complete": True, **({} if files is None else {"files": files})}
        known = len(self.warnings)
        self._write_json(whole)
        whole["warnings"] = [*whole["warnings"], *self.warnings[known:]]
        return whole

    def release(self) -> None:
        """Lets go of all that a complete recording keeps open; its facts are left."""
        self._lanes.release()
        del self._lanes, self._watches, self.notifier

    def discard(self) -> None:
        """Ends the lanes of a run that never began and leaves nothing behind."""
        import shutil

        self._lanes.discard()
        self._close_directory()
        if self.directory != Path():
            shutil.rmtree(self.directory, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """A copy of what run.json has, or would have if the disk took it."""
        facts: dict[str, Any] = json.loads(json.dumps(self._facts))
        return facts

    # --- parts ---

    def _look(self) -> None:
        error = self._lanes.look()
        self._watches.look()
        self._claim()
        if error is not None and not self._disk_is_full:
            self.add_warning(
                "disk-full",
                f"the recording cannot be written to {self.directory}: {error.strerror or error}; "
                "the program runs on",
                "free some space: what is pending is kept in memory for a while",
            )
        self._disk_is_full = error is not None

    def _hold(self, directory: Path) -> None:
        """Keeps the run's directory open, so that it is found again where it is moved to."""
        self.directory = directory
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._directory_fd = moved_up(os.open(directory, flags))
        self._opened = os.fstat(self._directory_fd)

    def follow_directory(self) -> None:
        """Finds the run's directory again if it was moved; goes on elsewhere if it was removed."""
        there, opened = self._opened, self._directory_fd
        if there is None:
            return
        with suppress(OSError):
            if os.path.samestat(self.directory.stat(), there):
                return
        with suppress(OSError):
            if os.path.samestat(os.fstat(opened), there):  # nobody has closed it
                moved = Path(f"/proc/self/fd/{opened}").readlink()
                if os.path.samestat(moved.stat(), there):
                    text = f"the run's directory {self.directory} was moved while it was recorded"
                    self.directory = self._lanes.directory = moved
                    self.add_warning("moved", text, f"it is {moved} now")
                    return
        self._close_directory()
        text = f"the run's directory {self.directory} was removed while it was recorded"
        try:
            self._go_on_in(self._elsewhere())
        except OSError as error:
            why = error.strerror or error
            text += f", and it cannot go on elsewhere ({why}): what was recorded is lost"
            hint = "record again, and leave the store alone meanwhile"
        else:
            text += (
                f"; it goes on in {self.directory}, without the marks and metrics that other "
                "programs had written"
            )
            hint = f"leave a store alone meanwhile; {self.directory.parents[1]} is a store too"
        self.add_warning("removed", text, hint)

    def _go_on_in(self, directory: Path) -> None:
        """Moves what was recorded, as far as its files can still be read, to another directory."""
        import shutil

        try:
            self._lanes.move_to(directory)
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self._hold(directory)
        self._watches.move_to(directory)
        if self._events is not None:
            self._events.move_to(directory)
        self._write_run()

    def _close_directory(self) -> None:
        """Closes our descriptor of the run's directory, if it still is that."""
        opened, self._directory_fd = self._directory_fd, -1
        with suppress(OSError):
            if self._opened is not None and os.path.samestat(os.fstat(opened), self._opened):
                os.close(opened)

    def _claim(self, *, last: bool = False) -> None:
        claims, client = self._watches.claims, self._lanes.client
        if claims is not None and client is not None and (claim := claims.due(last=last)):
            client.claim(*claim)

    def _wait_for_refreshes(self, end_ns: int) -> None:
        """Lets the lanes see the refreshes after the end that show what happened before it.

        The first has the energy up to the end, the second shows where power jumped before it.
        A slow counter is waited for once, and one whose refreshes are not known yet until it moves.
        """
        refresh_s = self._lanes.longest_refresh_s()
        after_s = max(
            min(_REFRESHES_AFTER * refresh_s, _TWO_AFTER_S), min(1.1 * refresh_s, _ONE_AFTER_S)
        )
        unlearnt = self._lanes.unlearnt_counters()
        if unlearnt:
            after_s = max(after_s, _TWO_AFTER_S)
        while unlearnt and time.monotonic_ns() - end_ns < _ONE_AFTER_S * NS_PER_S:
            time.sleep(_LOOK_S)
            unlearnt = self._lanes.unmoved(unlearnt)
        time.sleep(max(0.0, after_s - (time.monotonic_ns() - end_ns) * 1e-9))

    def _write_run(self) -> None:
        from pepr_profiler.sensors.machine import read_cpu_identity

        options = self.options
        client = self._lanes.client
        self._facts = {
            "schema": 1,
            "run_id": utf8_text(self.directory.name),
            **self._launch.facts(),
            "local_world_size": (
                self._launch.local_world_size() if self._root in ("self", "children") else None
            ),
            **({} if options.job is None else {"job": options.job}),
            "name": options.name,
            "experiment": options.experiment,
            "command": [utf8_text(word) for word in self.command],
            "host": os.uname().nodename,
            "boot_id": boot_id(),
            "clock": self._clock,
            "started_at": _iso(self._clock[0], self._window_ns[0]),
            "exit_code": self._exit["code"] if self._exit else None,
            "signal": self._exit.get("signal") if self._exit else None,
            "complete": False,
            "missing": self._lanes.missing,
            "recording": {
                "window_ns": self._window_ns,
                "cpu_shares": "rows",  # earlier recordings keep the shares of their time
                "profiler_pid": self._pid,
                "cpu": read_cpu_identity()._asdict(),
                "options": {name: getattr(options, name) for name in _STORED},
                "attached": self.attached,
                **self._around,
                "exit": self._exit,
                "sampler": self._sampler,
                "daemon": client.facts() if client is not None else None,
                "warnings": self.warnings,
            },
        }
        self._write_json(self._facts)

    def _write_json(self, value: Mapping[str, Any]) -> None:
        path = self.directory / "run.json"
        try:
            write_json(path, value)
        except OSError as error:
            self.add_warning(
                "unwritable",
                f"{path} cannot be written: {error.strerror or error}",
                "free some space or check the permissions",
            )


def _outer_facts(root: str, around: str | None) -> dict[str, Any] | None:
    """The run that is recorded around the roots of this one, if any."""
    if around is None:
        around = run_around(RUN_DIR_VARIABLE, root)
    run = read_live_run(Path(around)) if around else None
    if run is None:
        return None
    facts = run.get("recording")
    pid = facts.get("profiler_pid") if isinstance(facts, dict) else None
    return {"run_id": str(run.get("run_id") or Path(around or "").name), "pid": pid}


def _clock_pair() -> dict[str, int]:
    return {"t_ns": time.monotonic_ns(), "unix_ns": time.time_ns()}


def _iso(clock: Mapping[str, int], t_ns: int | None) -> str:
    unix_ns = clock["unix_ns"] + ((t_ns or clock["t_ns"]) - clock["t_ns"])
    seconds, rest_ns = divmod(unix_ns, 10**9)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{rest_ns // 10**6:03d}+00:00"
