"""A recording in progress: its lanes, its files, and the facts of its run.json."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.daemon_client.address import sockets_there
from pepr_profiler.errors import SensorError, TraceError
from pepr_profiler.recording.options import Options
from pepr_profiler.recording.processes import ProcessOwners, cuda_environments, run_around
from pepr_profiler.sensors.detect import detect
from pepr_profiler.sensors.machine import place
from pepr_profiler.sensors.remedy import is_denied, remedy
from pepr_profiler.sensors.spec import ProcessRoot, SensorSpec, lanes_by_name, with_process_lists
from pepr_profiler.store.runs import Store, recorder_lives
from pepr_profiler.trace.events import EventWriter
from pepr_profiler.trace.lane import LaneInfo, LaneWriter, describe
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE, boot_id, read_run, write_json

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from pepr_profiler.daemon.claims import Claims
    from pepr_profiler.daemon_client.client import DaemonClient, RawRows, RemoteLane
    from pepr_profiler.recording.attached import Targets

    _F = TypeVar("_F", bound=Callable[..., Any])

_OWN_PERIOD = ("processes", "nvml-processes")  # no shorter one that is asked for or learnt
_SLOWEST_OWN_NS = 1_000_000_000

_OPEN_TIMEOUT_S = 5.0  # waking an NVIDIA driver without persistence mode takes 1-3 s a GPU
_STOP_TIMEOUT_S = 1.0
_REFRESHES_AFTER, _LINGER_S = 2.1, 0.25  # lanes go on for so long behind the end, at most

TICK_S = 0.5
"""How often `Recorder.tick` is to be called while there is something to watch."""

_JOURNAL_S = 0.9
"""How often what was read is written down: a crash loses no more than 1 s."""

_REMOTE_S, _IDLE_S = 1.0, 10.0
"""How often it is to be called where we write down a daemon's lanes, and where nothing is to do."""

_WORKS_S = 0.01  # a tenth of the process lane's period

Missing = dict[str, str]
Warn = Callable[[str, str, str], None]


class Recorder:
    """Lanes, their files and the facts of one run, from the first sample to the summary.

    `root` is "children" for a wrapper, which does not charge itself to its child, "self" for a
    program that profiles itself, and "pids=…" for processes that already run, which `attached`
    describes. `dedicated` says that this process only records: its CPU time is the profiler's.
    Everything is done by the caller's thread except sampling and writing down what was sampled;
    `news` says when it is worth a `tick`.
    """

    def __init__(
        self,
        options: Options,
        *,
        root: str,
        command: Sequence[str],
        attached: Sequence[Mapping[str, Any]] = (),
        dedicated: bool = False,
        warn: Warn | None = None,
    ) -> None:
        self.options = options
        self.command = list(command)
        self.attached = [dict(target) for target in attached]
        self.warnings: list[dict[str, str]] = []
        self.missing: list[Missing] = []
        self.directory = Path()
        self.all_exited_ns: int | None = None  # since when all that is attached to has ended
        self._empty_ns: int | None = None
        self._seen_cpu_s = 0.0
        self._cpu_places: list[int] = []  # of the job's and of all CPU time, in the process lane
        self._others_before_s = math.nan
        self._dedicated = dedicated
        self._warn = warn
        self._pid = os.getpid()
        self._window_ns: list[int | None] = [None, None]
        self._clock = [_clock_pair()]
        self._writers: dict[str, LaneWriter] = {}
        self._watches: dict[str, list[Callable[[RawRows], None]]] = {}
        self._events: EventWriter | None = None
        self._full = False
        self._dropped = 0
        self._sampler_facts: dict[str, Any] | None = None
        self._exit: dict[str, Any] | None = None
        self._facts: dict[str, Any] = {}
        self._complete = False
        self._root = root
        self._around: dict[str, Any] = {}
        self._neighbours: ProcessOwners | None = None
        self._notes: EventWriter | None = None
        self._gpu_lists: dict[str, list[int]] = {}  # where in a lane's rows its PIDs are
        self._claims: Claims | None = None
        specs = with_process_lists(options.sensors or detect())
        self._specs = lanes_by_name([*specs, SensorSpec.of("processes", root)])
        budget, crew = _core.Budget(options.overhead), _core.Crew()
        self.news = _core.News()
        self._journal = _core.Journal(_JOURNAL_S, self.news)
        self._node: DaemonClient | None = None  # made when there is one to ask
        self._samplers: dict[str, _core.Sampler | RemoteLane] = {
            name: _core.Sampler(
                spec,
                self._period_ns(spec),
                learn=self._learns(spec),
                budget=None if self._is_asked_period(spec) else budget,
                crew=crew,
                news=self.news,
            )
            for name, spec in self._specs.items()
        }

    # --- the life of a recording ---

    def open(self) -> None:
        """Makes the run directory and waits until the lanes sample.

        Raises SensorError for a sensor that was asked for and is not there. A detected one that is
        absent goes to `missing`; one that is slow to open joins when it is ready.
        """
        self.directory = self._make_directory()
        deadline = time.monotonic() + _OPEN_TIMEOUT_S
        for name in list(self._samplers):
            if self._specs[name].kind == "nvml-processes":
                continue  # it joins when it is ready: who uses a GPU is no reason to wait
            if not self._ready(name, max(0.0, deadline - time.monotonic())):
                self.add_warning(
                    "slow-sensor",
                    f"{self._specs[name]} is still opening after {_OPEN_TIMEOUT_S:.0f} s; "
                    "the run starts without it",
                    "it joins when it is ready; NVIDIA: sudo nvidia-smi -pm 1",
                )
        if self._node is not None:
            self._node.announce(self.directory.name)
        if self._node is not None and self._node.wants_claims:
            from pepr_profiler.daemon.claims import (
                Claims,  # NumPy, which few runs need before their end
            )

            self._claims = Claims()

    def begin(self, t_ns: int) -> None:
        """The measured window begins; from here on the run is on disk."""
        self._window_ns[0] = t_ns
        self._notes = EventWriter(self.directory, "processes")
        self._neighbours = ProcessOwners(
            self._root,
            self._note,
            dedicated=self._dedicated,
            marker=(RUN_DIR_VARIABLE, str(self.directory)),
        )
        self._around = {
            "root": self._root,
            "cuda": cuda_environments(self._root),
            "outer": _outer_facts(self._root),
        }
        self._write_run()
        for name in list(self._samplers):
            self._open_writer(name)  # the journal begins; who else computes, a first tick may tell

    def tick(self) -> float:
        """Looks at what neither sampler nor journal does; after how many seconds to do so again.

        There may be `news` before. A training whose GPUs we read ourselves is looked at every 10 s.
        """
        if self._pid != os.getpid():
            return _IDLE_S
        self.news.hear()
        self._look()
        watching = len(self._writers) < len(self._samplers) or any(self._watches.values())
        if watching or (self._neighbours is not None and self._neighbours.has_unidentified):
            return TICK_S
        return _REMOTE_S if self._remote_lanes() else _IDLE_S

    def flush(self) -> None:
        """Moves what was sampled until now to disk."""
        if self._pid == os.getpid():
            self._journal.flush()
            self._look()

    def _look(self) -> None:
        error = None
        for name in list(self._samplers):
            writer = self._writers.get(name) or self._open_writer(name)
            if writer is not None:
                self._take(name, writer)
                error = error or writer.error
        if self._neighbours is not None:
            self._neighbours.on_gpu(self._on_gpu())
            self._neighbours.tick(self._others_cpu_s())
        self._claim()
        if error is not None and not self._full:
            self.add_warning(
                "disk-full",
                f"the recording cannot be written to {self.directory}: {error.strerror or error}; "
                "the program runs on",
                "free some space: what is pending is kept in memory for a while",
            )
        self._full = error is not None

    @property
    def anyone_lives(self) -> bool:
        """Whether anything that is followed has run until now, as far as has been flushed."""
        return self.all_exited_ns is None and "processes" in self._writers

    def close(
        self, end_ns: int, *, exit_code: int | None, exit_facts: dict[str, Any] | None = None
    ) -> None:
        """Takes the last samples, ends the lanes and completes the files."""
        self._window_ns[1] = end_ns
        self._exit = {**(exit_facts or {}), "code": exit_code}
        self._linger(end_ns)
        for name, sampler in self._samplers.items():
            if not sampler.stop(_STOP_TIMEOUT_S):
                self.add_warning(
                    "hung-sensor",
                    f"{self._specs[name]} did not answer for {_STOP_TIMEOUT_S:.0f} s; "
                    "its lane ends early",
                    "see dmesg for its driver",
                )
        self._journal.stop()
        self.flush()
        self._claim(last=True)
        for warning in self._node.close() if self._node is not None else ():
            self.add_warning(*warning)
        if self._neighbours is not None:
            self._neighbours.end()
        if self._root == "self":  # a program may choose its GPUs inside the block
            self._around["cuda"] = cuda_environments(self._root)
        for events in (self._events, self._notes):
            if events is not None:
                events.close()
        by_lane = self._stats()
        stats = by_lane.values()
        lost = sum(lane.lost for lane in self._remote_lanes())
        for writer in self._writers.values():
            writer.close()
            lost += writer.file.lost_rows
            self._dropped += writer.file.dropped_rows
        if self._dropped:
            self.add_warning(
                "rows-lost",
                f"{self._dropped} samples could not be written; "
                "counters keep their energy across the hole, power readings do not",
                f"free space at {self.directory}",
            )
        self._clock.append(_clock_pair())
        self._sampler_facts = {
            "cpu_s": sum(s["cpu_s"] for s in stats) + self._own_cpu_s(),
            "dropped": int(lost) + self._dropped,
            "late": int(sum(s["late"] for s in stats)),
            "timed": int(sum(s["samples"] for s in stats)),
            # None: every read brings news, or the sensor never moved.
            "refresh_s": {name: s["refresh_s"] or None for name, s in by_lane.items()},
            "wasted": {
                name: s["wasted"] / s["settled"] if s["settled"] else None
                for name, s in by_lane.items()
            },
            "overhead": self._overhead(by_lane),
        }
        self._write_run()

    def summarise(self) -> dict[str, Any]:
        """The finished run's summary, also written to its run.json."""
        from pepr_profiler.summary.summarise import summarise

        self._complete = True
        summary = {**summarise(self.directory, run=self.facts()), "complete": True}
        try:
            write_json(self.directory / "run.json", summary)
        except OSError as error:
            known = len(self.warnings)
            self._unwritable("run.json", error)
            summary["warnings"] = [*summary["warnings"], *self.warnings[known:]]
        return summary

    def discard(self) -> None:
        """Ends the lanes of a run that never began and leaves nothing behind."""
        import shutil

        for sampler in self._samplers.values():
            sampler.stop(_STOP_TIMEOUT_S)
        self._journal.stop()
        for writer in self._writers.values():
            writer.close()
        if self._node is not None:
            self._node.close()
        if self.directory != Path():
            shutil.rmtree(self.directory, ignore_errors=True)

    def log(self, name: str, value: float, *, t_ns: int) -> None:
        """Records one value of a metric that was seen at `t_ns`."""
        if self._events is None:
            self._events = EventWriter(self.directory)
        self._events.metrics({name: value}, t_ns=t_ns)

    def add_warning(self, code: str, text: str, hint: str) -> None:
        """Notes a warning for the summary, and says it at once where somebody listens."""
        self.warnings.append({"code": code, "text": text, "hint": hint})
        if self._warn is not None:
            self._warn(code, text, hint)

    # --- parts ---

    def _linger(self, end_ns: int) -> None:
        """Lets the lanes see the two refreshes after the end: it lies before the first of them.

        What flowed up to the end is told by the one, where power jumped in between by the other.
        """
        from pepr_profiler import summary  # noqa: F401  its imports take as long as a refresh

        refreshes_s = [stats["refresh_s"] for stats in self._stats().values()]
        linger_s = min(_REFRESHES_AFTER * max(refreshes_s, default=0.0), _LINGER_S)
        time.sleep(max(0.0, linger_s - (time.monotonic_ns() - end_ns) * 1e-9))

    def _note(self, facts: dict[str, Any]) -> None:
        assert self._notes is not None
        self._notes.write(json.dumps(facts))
        if self._claims is not None:
            self._claims.note(facts)

    def _take(self, name: str, writer: LaneWriter) -> None:
        """A lane's rows for those who watch them, and for the disk if its sampler is another's."""
        sampler, watches = self._samplers[name], self._watches[name]
        remote = not isinstance(sampler, _core.Sampler)
        if not remote and not watches:
            return
        while (rows := sampler.read()) is not None:
            if remote:
                writer.write(*rows[1:])
            for watch in watches:
                watch(rows)

    def _remote_lanes(self) -> list[RemoteLane]:
        return [lane for lane in self._samplers.values() if not isinstance(lane, _core.Sampler)]

    def _claim(self, *, last: bool = False) -> None:
        if self._claims is not None and (claim := self._claims.due(last=last)) is not None:
            assert self._node is not None
            self._node.claim(*claim)

    def _on_gpu(self) -> set[int]:
        """The PIDs in the newest rows of the lists; 0 and unknown are none."""
        found: set[int] = set()
        for name, places in self._gpu_lists.items():
            if name in self._samplers and (newest := self._samplers[name].latest()) is not None:
                found.update(int(newest[1][place]) for place in places if newest[1][place] > 0)
        return found

    def _others_cpu_s(self) -> float:
        """What this machine has computed for others since the first time this was asked."""
        newest = self._samplers["processes"].latest() if "processes" in self._writers else None
        if newest is None:
            return math.inf
        job_s, busy_s = (newest[1][place] for place in self._cpu_places)
        if math.isnan(self._others_before_s):
            self._others_before_s = busy_s - job_s
        others_s = busy_s - job_s - self._others_before_s
        return math.inf if math.isnan(others_s) else others_s

    def _note_living(self, places: Sequence[int], rows: RawRows) -> None:
        living, cpu_s = (array("d", rows[3][place]) for place in places)
        for at_ns, count, used_s in zip(array("q", rows[1]), living, cpu_s, strict=True):
            # A daemon whose parents ended between two samples is known by its work alone.
            works = used_s - self._seen_cpu_s > _WORKS_S
            self._seen_cpu_s = used_s
            if count != 0:  # or unknown
                self._empty_ns = self.all_exited_ns = None
            elif self._empty_ns is None or works:
                self._empty_ns, self.all_exited_ns = at_ns, None
            else:
                self.all_exited_ns = self._empty_ns

    def _stats(self) -> dict[str, dict[str, float]]:
        """How sampling went in our own lanes; of the daemon's, its status tells."""
        samplers = self._samplers.items()
        return {name: s.stats() for name, s in samplers if isinstance(s, _core.Sampler)}

    def _overhead(self, by_lane: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """The budget, what the lanes took of a core, and where reads had to be put off, s."""
        elapsed_s = (self._clock[-1]["t_ns"] - self._clock[0]["t_ns"]) * 1e-9
        used_s = sum(stats["cpu_s"] for stats in by_lane.values())
        return {
            "budget": self.options.overhead,
            "used": used_s / elapsed_s if elapsed_s > 0 else None,
            "gap_s": {name: s["gap_s"] for name, s in by_lane.items() if s["gap_s"]},
        }

    def _is_asked_period(self, spec: SensorSpec) -> bool:
        return self.options.period_ns is not None and spec.kind not in _OWN_PERIOD

    def _learns(self, spec: SensorSpec) -> bool:
        return self.options.period_ns is None and spec.kind not in _OWN_PERIOD

    def _period_ns(self, spec: SensorSpec) -> int:
        asked_ns, base_ns = self.options.period_ns, spec.base_period_ns
        if spec.kind not in _OWN_PERIOD:
            return asked_ns or base_ns
        # Who wants little is asked for little; the end of what is attached to is waited for.
        return max(base_ns, min(asked_ns or 0, 0 if self.attached else _SLOWEST_OWN_NS))

    def _ready(self, name: str, timeout_s: float) -> bool:
        """False: still opening. A sensor that failed is removed, or raised if it was asked for."""
        sampler = self._samplers[name]
        try:
            if not sampler.wait_ready(timeout_s):
                return False
        except SensorError as error:
            if self._through_daemon(name):
                return True
            asked = self.options.sensors or (self.attached and name == "processes")
            if asked and not self._window_ns[0]:
                raise
            spec = self._specs[name]
            del self._samplers[name]
            # Without a driver its energy is missing, and that is said once.
            told = spec.replace("nvml-processes", "nvml") in (spec, *self._living_specs())
            if told and not (self._node is not None and self._node.covers(spec)):
                self._add_missing(name, error)
            return True
        if any(is_denied(note.why) for note in sampler.notes) and self._through_daemon(name):
            return True
        for note in sampler.notes:
            self._add_missing(name, note)
        return True

    def _living_specs(self) -> list[str]:
        return [self._specs[name] for name in self._samplers]

    def _through_daemon(self, name: str) -> bool:
        """Reads through the node's daemon what we may not read; False if it does not, either."""
        if self._node is None:
            if not sockets_there():
                return False
            from pepr_profiler.daemon_client.client import DaemonClient

            self._node = DaemonClient()
        lane = self._node.lane(self._specs[name], named=bool(self.options.sensors))
        if lane is None:
            return False
        self._samplers[name].stop(_STOP_TIMEOUT_S)
        self._samplers[name], self._specs[name] = lane, SensorSpec(lane.spec)
        return True

    def _add_missing(self, name: str, part: SensorError | _core.Note) -> None:
        spec = self._specs[name]
        self.missing.append(remedy(spec, what=part.what, why=part.why, fix=part.fix, where=place()))

    def _open_writer(self, name: str) -> LaneWriter | None:
        sampler = self._samplers[name]
        if sampler.state == "opening":
            return None
        if self._window_ns[0] and sampler.state == "failed":
            self._ready(name, 0.0)
            return None
        spec = self._specs[name]
        period_ns = self._period_ns(spec)
        if not isinstance(sampler, _core.Sampler):
            period_ns = sampler.period_ns
        lane = LaneInfo(name, spec, period_ns, describe(sampler.channels))
        try:
            self._writers[name] = LaneWriter(self.directory, lane)
        except OSError as error:
            self._unwritable(f"{name}.arrows", error)
            return None
        self._watches[name] = self._watches_of(lane)
        if isinstance(sampler, _core.Sampler):
            self._journal.add(sampler, self._writers[name].file)
        return self._writers[name]

    def _watches_of(self, lane: LaneInfo) -> list[Callable[[RawRows], None]]:
        """What is done with a lane's rows besides writing them down."""
        kind, names = SensorSpec(lane.spec).kind, [channel.name for channel in lane.channels]
        watches: list[Callable[[RawRows], None]] = []
        if self._claims is not None and kind in _OWN_PERIOD:
            watches.append(functools.partial(self._claims.take, lane))
        if lane.name == "processes":
            self._cpu_places = [names.index(wanted) for wanted in ("job/cpu", "system/busy")]
        if lane.name == "processes" and self.attached:
            places = [names.index(wanted) for wanted in ("job/processes", "job/cpu")]
            watches.append(functools.partial(self._note_living, places))
        if kind == "nvml-processes":
            places = [i for i, n in enumerate(names) if n.rpartition("/")[2].startswith("pid")]
            self._gpu_lists[lane.name] = places
        return watches

    def _make_directory(self) -> Path:
        store = Store(self.options.store)
        try:
            # Absolute: the program that records itself may change its working directory.
            return store.create(self.options.name).absolute()
        except OSError as error:
            # The command must run all the same, and what it cost must not be lost.
            import tempfile

            fallback = Path(tempfile.mkdtemp(prefix="pepr-"))
            self.add_warning(
                "store-unwritable",
                f"the store {store.path} cannot be written: {error.strerror or error}; "
                f"this run is kept in {fallback} instead",
                f"give --store DIR (or PEPR_STORE) that you may write; {fallback} is a store too",
            )
            return Store(fallback).create(self.options.name)

    def _unwritable(self, name: str, error: OSError) -> None:
        text = f"{self.directory / name} cannot be written: {error.strerror or error}"
        if all(warning["text"] != text for warning in self.warnings):
            self.add_warning("unwritable", text, "free some space or check the permissions")

    def _own_cpu_s(self) -> float:
        """A wrapper's CPU time besides its lanes. Of a program, which is the job: the journal's."""
        if not self._dedicated:
            return self._journal.cpu_s
        lanes_s = sum(stats["cpu_s"] for stats in self._stats().values())
        return max(0.0, time.process_time() - lanes_s)

    def facts(self) -> dict[str, Any]:
        """What run.json says, or would where it cannot be written; a copy, as read from there."""
        facts: dict[str, Any] = json.loads(json.dumps(self._facts))
        return facts

    def _write_run(self) -> None:
        options = self.options
        self._facts = {
            "schema": 1,
            "run_id": self.directory.name,
            "job": options.job,
            "name": options.name,
            "experiment": options.experiment,
            "command": self.command,
            "host": os.uname().nodename,
            "boot_id": boot_id(),
            "clock": self._clock,
            "started_at": _iso(self._clock[0], self._window_ns[0]),
            "exit_code": self._exit["code"] if self._exit else None,
            "signal": self._exit.get("signal") if self._exit else None,
            "complete": self._complete,
            "missing": self.missing,
            "recording": {
                "window_ns": self._window_ns,
                "profiler_pid": self._pid,
                "cpu": _cpu_identity(),
                "options": {
                    "intensity": dict(vars(options.intensity)) if options.intensity else None,
                    "pue": options.pue,
                    "cpu_power": options.cpu_power,
                    "performance": options.performance,
                    "scope": options.scope,
                },
                "attached": self.attached,
                **self._around,
                "exit": self._exit,
                "sampler": self._sampler_facts,
                "daemon": self._node.facts() if self._node is not None else None,
                "warnings": self.warnings,
            },
        }
        try:
            write_json(self.directory / "run.json", self._facts)
        except OSError as error:
            self._unwritable("run.json", error)


def attach(
    options: Options, targets: Targets, *, dedicated: bool = False, warn: Warn | None = None
) -> Recorder:
    """A recording of running processes, opened: its lanes sample, and all of `targets` are in it.

    Those that exit before are let go of. Raises TargetError if none is left, else as `open` does.
    """
    while True:
        roots = targets.roots
        recorder = Recorder(
            options,
            root=ProcessRoot.of_pids(target.pid for target in roots),
            command=roots[0].command,
            attached=[{"pid": t.pid, "command": t.command} for t in roots],
            dedicated=dedicated,
            warn=warn,
        )
        try:
            recorder.open()
            # Who lives now has lived all the while: the lane met no later owner of a PID.
            if not targets.drop_ended():
                for warning in targets.warnings:
                    recorder.add_warning(**warning)
                return recorder
        except SensorError:
            recorder.discard()
            if not targets.drop_ended():
                raise
        except BaseException:
            recorder.discard()
            raise
        else:
            recorder.discard()


def _clock_pair() -> dict[str, int]:
    return {"t_ns": time.monotonic_ns(), "unix_ns": time.time_ns()}


def _iso(clock: dict[str, int], t_ns: int | None) -> str:
    unix_ns = clock["unix_ns"] + ((t_ns or clock["t_ns"]) - clock["t_ns"])
    seconds, rest_ns = divmod(unix_ns, 10**9)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{rest_ns // 10**6:03d}+00:00"


@functools.cache
def _cpu_identity() -> dict[str, Any]:
    from pepr_profiler.sensors.machine import read_cpu_identity

    return read_cpu_identity()._asdict()


def _outer_facts(root: str) -> dict[str, Any] | None:
    """The run that another profiler records around the roots of this one, if any."""
    around = run_around(RUN_DIR_VARIABLE, root)
    if around is None:
        return None
    try:
        run = read_run(Path(around))
    except TraceError:
        return None
    if run.get("complete") or not recorder_lives(run):
        return None
    return {"run_id": run["run_id"], "pid": run["recording"]["profiler_pid"]}
