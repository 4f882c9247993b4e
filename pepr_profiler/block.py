"""`with profile(...)`: records a block and summarises it. Commands use parts of it too."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed has signal only
import atexit
import contextlib
import contextvars
import functools
import itertools
import json
import math
import operator
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.errors import (
    PeprWarning,
    SensorError,
    TraceError,
    UsageError,
    fix_of,
    reason_of,
)
from pepr_profiler.recording.blocks import OpenBlock, OpenBlocks, runs_of_ancestors
from pepr_profiler.recording.launcher import rank_facts
from pepr_profiler.recording.options import OVERHEAD, Options, checked_join
from pepr_profiler.recording.procfs import ancestors_of
from pepr_profiler.recording.recorder import TICK_S, Recorder
from pepr_profiler.store.runs import Store, create_elsewhere
from pepr_profiler.trace.events import EventWriter
from pepr_profiler.trace.run_json import read_live_run

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from types import CodeType, FrameType
    from typing import Any, TypeVar

    from pepr_profiler.recording.attached import Targets
    from pepr_profiler.recording.lanes import AddWarning
    from pepr_profiler.recording.watches import Claims

    _F = TypeVar("_F", bound=Callable[..., Any])

# --- a recording, from its directory to its summary -----------------------------------------------


def open_recording(recorder: Recorder, store: Path | None) -> None:
    """Opens a recording in a new directory of the store; its lanes sample, `begin` is to come.

    Raises as `Recorder.open` does; nothing is left then.
    """
    try:
        directory, warning = Store(store).create_somewhere(recorder.options.name)
        if warning is not None:
            recorder.add_warning(**warning)
        name = recorder.options.name
        recorder.open(directory, elsewhere=lambda: create_elsewhere(name), claims=_claims)
    except BaseException:  # Ctrl-C too: the program may go on
        recorder.discard()
        raise


def open_attached(
    options: Options,
    store: Path | None,
    targets: Targets,
    *,
    dedicated: bool = False,
    warn: AddWarning | None = None,
) -> Recorder:
    """An open recording of running processes, with all of `targets` in it.

    Those that exit before it is open are let go. Raises TargetError if none is left, else as
    `open_recording` does.
    """
    while True:
        try:
            recorder = Recorder(
                options,
                root=targets.root,
                command=targets.command,
                attached=targets.facts,
                dedicated=dedicated,
                warn=warn,
            )
            open_recording(recorder, store)
        except SensorError:
            if not targets.drop_ended():
                raise
            continue
        try:
            # Who lives now has lived all the while: the lane met no later owner of a PID.
            some_ended = targets.drop_ended()
        except BaseException:
            recorder.discard()
            raise
        if not some_ended:
            for warning in targets.warnings:
                recorder.add_warning(**warning)
            return recorder
        recorder.discard()


def load_summary() -> None:
    """Imports what a summary needs; to be done while the lanes go on at the end of a recording.

    Raises MemoryError if a limit leaves no room for it: NumPy's BLAS would end the process.
    """
    if "numpy" not in sys.modules:
        _require_room_for_numpy()
    from pepr_profiler.summary import summarise  # noqa: F401  takes as long as a refresh


_SPARE_BYTES = 1 << 26


def _require_room_for_numpy() -> None:
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    pid = os.fork()
    if pid == 0:  # a copy of us tries it
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            from pepr_profiler.summary import summarise  # noqa: F401

            bytearray(_SPARE_BYTES)  # for the summary itself
        except BaseException:
            os._exit(1)
        os._exit(0)
    if _status_of(pid) != 0:
        raise MemoryError("NumPy cannot be loaded within the memory limit (ulimit -v)")


def _status_of(pid: int) -> int:
    """How a child of ours ended; one that does not within some seconds is ended."""
    until_s = time.monotonic() + _TRY_S
    try:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
            if time.monotonic() > until_s:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
    except ChildProcessError:  # the program collects its children itself: it stays unknown
        return 0


_TRY_S = 20.0


def complete_recording(recorder: Recorder) -> dict[str, Any]:
    """The summary of a closed recording, also written to its run.json."""
    load_summary()
    from pepr_profiler.summary.summarise import summarise

    return recorder.complete(summarise(recorder.directory, run=recorder.facts()))


def grid_intensity(region: str | None, carbon_intensity: float | None) -> Mapping[str, Any] | None:
    """The grid's carbon intensity as run.json has it; None if none was asked for.

    Raises UsageError if the region is unknown or both are given.
    """
    if region is None and carbon_intensity is None:
        return None
    from pepr_profiler.energy.carbon import intensity_of  # a table of 208 countries

    return intensity_of(region, carbon_intensity)


def _claims() -> Claims:
    from pepr_profiler.daemon.claims import RunClaims  # NumPy, which few runs need this early

    return RunClaims()


# --- inside a program ----------------------------------------------------------------------------

_numbers = itertools.count(1)  # of phases: all blocks of a process write to one file
_current_phase: contextvars.ContextVar[int | None] = contextvars.ContextVar("phase", default=None)
_current_run: contextvars.ContextVar[Run | None] = contextvars.ContextVar("run", default=None)
"""The innermost block that records itself, of this thread or task, or of what started the task."""

_open_blocks = OpenBlocks()


_COROUTINE, _GENERATOR, _ASYNC_GENERATOR = 0x80, 0x20, 0x200
"""Flags of a function's code (CPython's code.h); inspect, which knows them too, takes 5 ms."""


def _decorated(function: _F, enter: Callable[[], Any]) -> _F:
    """The function, each call of which is within what `enter` makes anew, until it has ended."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    flags = getattr(code, "co_flags", 0)
    wrapper: Callable[..., Any]
    if flags & _COROUTINE:

        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            with enter():
                return await function(*args, **kwargs)
    elif flags & _ASYNC_GENERATOR:

        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            # What is sent into it (asend) is not passed on.
            with enter():
                async with contextlib.aclosing(function(*args, **kwargs)) as values:
                    async for value in values:
                        yield value
    elif flags & _GENERATOR:

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with enter():
                return (yield from function(*args, **kwargs))
    else:

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with enter():  # a fresh one: calls may nest or run in threads
                return function(*args, **kwargs)

    return functools.wraps(function)(wrapper)  # type: ignore[return-value]


def _set_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        _core.set_python_handler(number, handler)  # first runs the handlers of what has come


_set_handlers = _core.insistent(_set_handlers)


class _SignalsHeld:
    """What comes within it, Ctrl-C or a time limit, is handled behind it.

    A handler may raise, and half a recording must not be left.
    """

    def __enter__(self) -> None:
        self._received: dict[int, Any] = {}
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return  # handlers run in the main thread only
        # signal.getsignal looks each number up in an enumeration: 50 us in all.
        found = {number: _signal.getsignal(number) for number in range(1, signal.NSIG)}
        self._before = {number: handler for number, handler in found.items() if callable(handler)}
        try:
            _set_handlers(dict.fromkeys(self._before, self._receive))
        except BaseException:
            _set_handlers(self._before)
            raise

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # calls all, though one raises
            stack.callback(self._call_handlers)
            _set_handlers(self._before)

    def _call_handlers(self) -> None:
        with contextlib.ExitStack() as stack:
            for number, frame in self._received.items():
                stack.callback(self._before[number], number, frame)

    def _receive(self, number: int, frame: object) -> None:
        self._received[number] = frame


class Run:
    """A profiled block: marks phases, logs metrics, knows its energy. Made by `profile()`.

    As a decorator it measures each call of a function as a run of its own. Once the block has begun
    nothing of it raises into the program: what fails is a PeprWarning.
    """

    def __init__(
        self,
        options: Options,
        *,
        store: Path | None,
        pids: Sequence[int] | None,
        cgroup: str | None,
        join: str,
        synchronise: bool,
        again: Callable[[], Run],
    ) -> None:
        self._again = again
        self._options = options
        self._store = store
        self._pids = None if pids is None and cgroup is None else tuple(pids or ())
        self._cgroup = cgroup
        self._join = join
        self._synchronise = synchronise
        self._recorder: Recorder | None = None
        self._events: EventWriter | None = None
        self._block: Phase | None = None
        self._window_ns: tuple[int, int | None] = (0, None)
        self._summary: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._ending = False
        self._lock = threading.Lock()
        self._pid = 0
        self._is_entered = False
        self._entered_by: Sequence[tuple[CodeType, int]] = ()
        self._place: OpenBlock | None = None  # among the open blocks, while we record this process
        self._context: Run | None = None  # the block in whose context we were entered
        self._phase_outside: int | None = None
        self._unsure: Sequence[str] = ()  # runs of our ancestor, of which we may be in any
        self._facts: Mapping[str, Any] | None = None  # of a recording of our own that has ended
        self.directory = Path()

    def __call__(self, function: _F) -> _F:
        return _decorated(function, self._again)

    @property
    def run_id(self) -> str:
        """The id of the run that this block belongs to."""
        return self.directory.name

    @property
    def joined(self) -> bool:
        """Whether the block is part of a run that somebody else records."""
        return self._recorder is None and self._facts is None

    def __enter__(self) -> Run:
        with self._lock:  # two threads may enter it at once
            if self._is_entered:
                raise UsageError(
                    "this profile() block has been entered already",
                    why="a run happens once",
                    fix="call profile() again for a new run",
                )
            self._is_entered = True
        self._pid = os.getpid()
        self._entered_by = _callers()
        self._context = _open_run()
        forgotten = self._context if self._context and self._context._is_forgotten else None
        outer = None
        # A run around us covers us, but not the processes that we follow.
        if self._pids is None and self._join != "never" and forgotten is None:
            outer = self._outer_run()
        if outer is not None and self._join == "error":
            self._is_entered = False
            raise UsageError(
                f"profile({self._options.name!r}) would join the run {outer.name}",
                why="it was entered inside of that run, and has join='error'",
                fix='end that run before it, or give join="auto" to join it, or join="never" for '
                "a run of its own, whose energy is in both",
            )
        try:
            with _SignalsHeld():
                if outer is None:
                    self._window_ns = (self._record(), None)
                else:
                    self.directory = outer
                    self._events = EventWriter(self.directory, rank_facts=rank_facts)
                    self._block = self.phase(self._options.name).__enter__()
                    self._window_ns = (self._block.t_ns, None)
                self._warn_of_others(forgotten)
                # A generator that nobody closes, or a program that forgets us, leaves us never.
                atexit.register(self.__exit__, None, None, None)
            return self
        except BaseException as error:  # Ctrl-C: whoever enters us does not leave us then
            self.__exit__(type(error), error, None)
            self._is_entered = self._events is not None
            raise

    @_core.insistent  # Ctrl-C may come before its first line
    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        found: Sequence[tuple[str, str]] = ()
        with _SignalsHeld():
            # A forked child leaves the block that its parent is still in; or it has ended.
            if self._pid == os.getpid() and self._events is not None and self._window_ns[1] is None:
                found = self._end(self._events, error)
        for text, hint in found:  # last: a warning may be an error (python -W error)
            warnings.warn(f"pepr: {text} ({hint})", PeprWarning, stacklevel=2)

    def _outer_run(self) -> Path | None:
        """The unfinished run that we are part of, if any: joined, it has all that we do.

        That is the block in whose context we are; else what this process was started in; else one
        of an ancestor that records itself, and so its workers.
        """
        if self._context is not None:
            directory = self._context._find_directory()
            return None if read_live_run(directory) is None else directory
        value = _open_blocks.given()
        block = _open_blocks.find(value)  # of the process that has forked us
        directory = block.owner._find_directory() if block else Path(value)
        run = read_live_run(directory) or _begun_late(directory) if value else None
        # A program that replaced itself by this one (exec) may have recorded itself before.
        if run and (block or (run.get("recording") or {}).get("profiler_pid") != os.getpid()):
            return directory
        return self._run_of_ancestor()

    def _run_of_ancestor(self) -> Path | None:
        """The run that we are in as a worker; None if there is none, or several may be it."""
        found = runs_of_ancestors()
        if len(found) > 1:
            self._unsure = [path.name for path in found]
        return found[0] if len(found) == 1 else None

    @property
    def _is_open(self) -> bool:
        """Whether the block has not ended; that of a parent may have since we were forked."""
        if self._pid == os.getpid():
            return self._window_ns[1] is None
        return read_live_run(self.directory) is not None

    @property
    def _is_forgotten(self) -> bool:
        """Whether nobody may leave this open block: it was entered by hand.

        A `with` statement leaves its block. After a call of `__enter__` (in a notebook's cell, say)
        an error or a second call suffices that nobody does.
        """
        if self._pid != os.getpid():
            return False
        return not any(map(_is_with, self._entered_by)) and _knows_with()

    def _end(self, events: EventWriter, error: BaseException | None) -> Sequence[tuple[str, str]]:
        """Ends the block; what there is to warn of, and what to do."""
        atexit.unregister(self.__exit__)
        if self._block is not None:
            self._block.__exit__()
            end_ns = self._block.t_ns
        else:
            end_ns = time.monotonic_ns()
        self._window_ns = (self._window_ns[0], end_ns)
        if self._recorder is not None:
            return self._finish(self._recorder, events, end_ns, error)
        events.close()
        return _of_lost(events)

    def _warn_of_others(self, forgotten: Run | None) -> None:
        """Warns where the energy of this run is in another one's too."""
        place = self._place
        if self._recorder is None or place is None:
            return
        if forgotten is not None:
            self._warn_of(forgotten)
        elif place.around is not None:
            place.around.note_within(place)
        if self._unsure:
            text = f"this process is a worker of one that has the blocks {', '.join(self._unsure)}"
            both = "open; which of them it works for is unknown, and their energy has this run's"
            hint = "use one pool of workers for each block, or one block around all"
            self._recorder.add_warning("blocks-around", f"{text} {both}", hint)

    def _warn_of(self, forgotten: Run) -> None:
        """Warns in both runs that the other block was open when this one began."""
        ours, other = self._recorder, forgotten._recorder
        name, place = forgotten._options.name, forgotten._entered_by[0]
        where = f"{place[0].co_filename}, {place[0].co_name}"
        hint = f"leave '{name}' where it ends: use `with`, or call __exit__(None, None, None)"
        if ours is not None:
            text = f"the block '{name}', entered by hand in {where}, was open when this run began"
            ours.add_warning("block-left-open", f"{text}; this is a run of its own", hint)
        if other is not None:
            text = f"the block '{self._options.name}' began while this one was open"
            both = "it is a run of its own, and its energy is counted in both"
            other.add_warning("block-left-open", f"{text}; {both}", hint)

    def phase(self, name: str) -> Phase:
        """A named part of the run: `with run.phase("train"):`, or a decorator. Phases nest."""
        return Phase(self, name)

    def log(self, **metrics: Any) -> None:
        """Records metrics that hold from now on; the last value of a name is the run's.

        Accepts what `float()` accepts, also torch and NumPy scalars. Raises UsageError for what is
        no number.
        """
        events = self._writer("run.log()")
        events.metrics({name: _number(name, value) for name, value in metrics.items()})

    def _writer(self, what: str) -> EventWriter:
        """Where marks and metrics go. Raises UsageError outside the block."""
        if self._events is None or self._window_ns[1] is not None:
            raise UsageError(
                f"{what} outside the block",
                why="the run has not begun" if self._events is None else "the run has ended",
                fix="use it inside `with profile(...) as run:`",
            )
        return self._events

    @property
    def energy_j(self) -> float | None:
        """The job's energy so far, J; None while it is unknown.

        It is computed from the recording, which takes milliseconds, more for a long run: read it
        once an epoch, not once a batch. In a joined run it may be up to 1 s old.
        """
        until_ns = self._window_ns[1] or time.monotonic_ns()
        so_far = self._summarise(until_ns=until_ns, marks=False)
        total_j = so_far["energy"]["total_j"]
        return None if total_j is None else float(total_j)

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary (docs/design.md, Contract), after the block has ended.

        Of a joined run: the outer run's figures over this block. u of the total is None if other
        threads, tasks or processes of that run had phases beside it, whose energy it has too.
        """
        if self._summary is None:
            end_ns = self._window_ns[1]
            if end_ns is None:
                raise UsageError(
                    "there is no summary yet",
                    why="the block has not ended",
                    fix="read run.energy_j inside the block, run.summary after it",
                )
            _wait_for_rows(self.directory, end_ns)
            self._summary = self._summarise(until_ns=end_ns)
            if self._block is not None:
                self._doubt_total(self._summary)
        return self._summary

    def _doubt_total(self, summary: dict[str, Any]) -> None:
        """Makes u of the total unknown where the phase that this block is has a part of it only."""
        energy, name = summary["energy"], self._options.name
        own = next((phase for phase in summary["phases"] if phase["name"] == name), None)
        beside = any(warning["code"] == "phases-at-once" for warning in summary["warnings"])
        if (
            beside
            and own is not None
            and (own["energy_j"] or 0) < _WHOLE * (energy["total_j"] or 0)
        ):
            energy["u_j"] = None

    def job_summary(self) -> dict[str, Any]:
        """The summary of the whole job that this run is of (docs/jobs.md), as far as it has come.

        It is made of all recordings of the job in this run's store: those of other ranks and nodes
        too, also if they still go on. UsageError before the block has begun.
        """
        if self._events is None:
            raise UsageError(
                "there is no job yet",
                why="the block has not begun",
                fix="read run.job_summary() inside the block or after it",
            )
        self._flush()
        from pepr_profiler.study.recorded_jobs import load_job

        recordings = Store(self.directory.absolute().parent.parent)
        return load_job(recordings, self.run_id)[1]

    def _summarise(self, *, until_ns: int, marks: bool = True) -> dict[str, Any]:
        from pepr_profiler.summary.summarise import summarise

        self._flush()
        since_ns = self._window_ns[0]
        recorder = self._recorder
        run = self._facts if recorder is None else recorder.facts()
        return summarise(
            self.directory,
            since_ns=since_ns,
            until_ns=until_ns,
            marks=marks,
            run=None if run is None else dict(run),
        )

    def _record(self) -> int:
        """Begins a recording of our own. Returns when it began, ns."""
        if self._pids is not None:
            from pepr_profiler.recording.attached import hold, hold_cgroup

            with hold(self._pids) if self._cgroup is None else hold_cgroup(self._cgroup) as targets:
                recorder = open_attached(self._options, self._store, targets)
        else:
            within = self._context._place if self._context else _open_blocks.around()
            around = _open_blocks.outside() if within is None else within.mark
            _open_blocks.start_clock()
            recorder = Recorder(
                self._options,
                root="self",
                command=[sys.executable, *sys.argv],
                around=around or str(self._run_of_ancestor() or ""),
            )
            open_recording(recorder, self._store)
        begin_ns = time.monotonic_ns()
        look = threading.Thread(target=self._keep_looking, name="pepr-look", daemon=True)
        try:
            recorder.begin(begin_ns)
            self._recorder, self.directory = recorder, recorder.directory
            self._events = recorder.events
            look.start()
        except BaseException:
            self._recorder = self._events = None
            recorder.discard()
            raise
        self._thread = look
        if self._pids is None:
            self._place = OpenBlock(
                self, recorder.directory, recorder.notifier, within, begin_ns=begin_ns
            )
            _open_blocks.enter(self._place)
            self._phase_outside = _current_phase.get()
            _current_phase.set(None)
            _current_run.set(self)
        return begin_ns

    def _keep_looking(self) -> None:
        recorder = self._recorder
        assert recorder is not None
        after_s = recorder.first_tick_s
        while not self._ending:  # checked after each tick too, which clears the notifier
            recorder.notifier.wait(after_s)
            if not self._ending:
                with self._lock:
                    try:
                        after_s = min(recorder.tick(), self._note_neighbours(recorder))
                        self.directory = recorder.directory  # it may have been moved
                    except OSError as error:  # no descriptor is free, or the program closed ours
                        after_s = TICK_S
                        recorder.add_warning(
                            "looks-failed",
                            f"who else computes was not looked at for a time: {reason_of(error)}",
                            fix_of(error),
                        )

    def _note_neighbours(self, recorder: Recorder) -> float:
        """Stores what the clocks of the blocks beside us show; when to do so again, s."""
        place = self._place
        if place is None:
            return math.inf
        _open_blocks.note(place)
        for note in place.take_notes():
            recorder.note(note)
        if not place.is_divided:
            return math.inf
        elapsed_s = (time.monotonic_ns() - place.begin_ns) * 1e-9
        return min(max(_DIVIDED_S, elapsed_s / _DIVIDED_PART), _DIVIDED_MOST_S)

    def _find_directory(self) -> Path:
        """Where the run is now: its directory may have been moved or removed."""
        if self._pid == os.getpid():
            with self._lock:
                if self._recorder is not None and not self._ending:
                    self._recorder.follow_directory()
                    self.directory = self._recorder.directory
        return self.directory

    def _flush(self) -> None:
        if self._pid != os.getpid():
            return  # a forked child, whose lock may be held for ever
        with self._lock:
            if self._recorder is not None and not self._ending:
                self._note_neighbours(self._recorder)
                self._recorder.flush()

    def _finish(
        self, recorder: Recorder, events: EventWriter, end_ns: int, error: BaseException | None
    ) -> list[tuple[str, str]]:
        """Ends our own recording and lets go of it; what there is to warn of, and what to do."""
        with self._lock:  # nobody is in the middle of a flush then
            self._ending = True
        recorder.notifier.notify()
        if self._thread is not None:
            self._thread.join()
        self._leave_blocks(recorder)
        for text, hint in _of_lost(events):
            recorder.add_warning("events-lost", text, hint)
        exit_code = _exit_code(error) if self._pids is None else None
        failed = []
        try:
            recorder.close(end_ns, exit_facts={"code": exit_code}, meanwhile=load_summary)
            self._summary = complete_recording(recorder)
        except Exception as fault:
            kept = f"the recording is kept: pepr-profile report {recorder.directory}"
            failed = [(f"there is no summary: {reason_of(fault)}", kept)]
        self.directory = recorder.directory
        self._facts, self._recorder, self._thread = recorder.facts(), None, None
        recorder.release()
        return [*((w["text"], w["hint"]) for w in recorder.warnings), *failed]

    def _leave_blocks(self, recorder: Recorder) -> None:
        """Later blocks and processes are not ours; they join what is still open around us."""
        place, self._place = self._place, None
        if place is None:
            return
        _open_blocks.leave(place)
        for note in place.take_notes():
            recorder.note(note)
        if _current_run.get() is self:
            _current_run.set(self._context)
            if _current_phase.get() is None:
                _current_phase.set(self._phase_outside)


class Phase:
    """A named part of a run, as a context manager or as a decorator; see `Run.phase`."""

    __slots__ = ("_name", "_number", "_outer", "_run", "_token", "t_ns")

    def __init__(self, run: Run, name: str) -> None:
        self._run = run
        self._name = name
        self._number = 0
        self._token: contextvars.Token[int | None] | None = None
        self._outer: int | None = None
        self.t_ns = 0
        """When it was entered, or left."""

    def __enter__(self) -> Phase:
        run = self._run
        events = run._writer(f"phase '{self._name}'")
        if run._synchronise:
            _synchronise_cuda()
        self._number, self._outer = next(_numbers), _current_phase.get()
        ident = threading.get_ident()
        self.t_ns = events.begin(
            json.dumps(self._name),
            self._number,
            self._outer,
            thread=None if ident == threading.main_thread().ident else ident,
            ancestors=_ancestors,
        )
        self._token = _current_phase.set(self._number)
        return self

    def __exit__(self, *_: object) -> None:
        run = self._run
        if run._synchronise:
            _synchronise_cuda()
        token, self._token = self._token, None
        if token is None or run._events is None or run._window_ns[1] is not None:
            how = "without being entered; use it as: with run.phase(NAME)"
            if token is not None:
                how = "after its run had ended, and counts until that; leave it inside the block"
            text = f"pepr: phase '{self._name}' was left {how}"
            warnings.warn(text, PeprWarning, stacklevel=2)
            return
        self.t_ns = run._events.end(self._number)
        try:
            _current_phase.reset(token)
        except ValueError:  # entered in another task or thread; here may be another phase
            if _current_phase.get() == self._number:
                _current_phase.set(self._outer)

    def __call__(self, function: _F) -> _F:
        return _decorated(function, lambda: Phase(self._run, self._name))


def _ancestors() -> Sequence[int]:
    """The processes above this one, from its parent outwards."""
    return list(ancestors_of(os.getpid()))


def profile(
    name: str,
    *,
    experiment: str | None = None,
    job: str | None = None,
    store: str | os.PathLike[str] | None = None,
    sensors: Sequence[str] = (),
    period_s: float | None = None,
    overhead: float = OVERHEAD,
    region: str | None = None,
    carbon_intensity: float | None = None,
    pue: float = 1.0,
    cpu_power: str | None = None,
    performance: str | None = None,
    scope: str = "job",
    pids: Sequence[int] | None = None,
    cgroup: str | os.PathLike[str] | None = None,
    join: str = "auto",
    synchronise: bool = True,
) -> Run:
    """Measures a `with` block: `with profile("resnet18") as run:`.

    As a decorator, `@profile("resnet18")`, it measures each call, also of a coroutine or generator.

    Inside a program that `pepr-profile` wraps, or inside another block, it joins that run: its
    phases and metrics go there, nothing is sampled twice, and the arguments besides `name` and
    `join` have no effect. Inside is what is of the same thread, or of a task or thread that got its
    context (asyncio), and what a process does that the block started or whose worker it is. A block
    of another thread is a run of its own. Several at once divide the process between them by the
    CPU time of their threads; GPUs, which know processes alone, in equal parts with a wide ±. One
    of the main thread has all that other threads do, their runs too. `join="never"` makes it a run
    of its own everywhere, `join="error"` refuses to join (docs/jobs.md).

    With `pids` it measures these running processes and all that they start, instead of this one,
    for as long as the block lasts; with `cgroup`, all that is in a cgroup of version 2, but for
    this process: /sys/fs/cgroup/PATH, or PATH. That is always a run of its own.

    `experiment` groups runs to compare. `job` names the job that several recordings are of, those
    of its ranks and nodes; by default PEPR_JOB does, or what launched the program. `store` is the
    directory of all runs. `sensors` are read instead of those that are found. `period_s` is how
    often each is read, in s, instead of just after its refreshes. `overhead` is the CPU time that
    reading may take, as a fraction of a core. `region` or `carbon_intensity` (g/kWh) and `pue` give
    the carbon. `cpu_power` is "IDLE:MAX" in W for a machine without sensors. `performance` names
    the metric that the score is about. `scope` is what the total sums: "job", the job's share of
    the devices, or "device", all they took. Where torch uses CUDA, the edges of phases wait for the
    GPU unless `synchronise` is False.

    Raises UsageError for an argument that cannot be used. Entering the block raises TargetError or
    SensorError for a process or a sensor that was asked for and is not there, and UsageError where
    `join="error"` would join. Nothing is left then.
    """
    options = Options.checked(
        name=name,
        experiment=experiment,
        job=None if job == "" else job,
        sensors=sensors,
        period=period_s,
        overhead=overhead,
        intensity=grid_intensity(region, carbon_intensity),
        pue=pue,
        cpu_power=cpu_power,
        performance=performance,
        scope=scope,
    )
    try:
        where = None if store is None else Path(store)
        if where is not None and b"\0" in os.fsencode(where):
            raise ValueError("no path can hold a NUL byte")
        if isinstance(pids, bytes | str):
            raise TypeError(f"'{type(pids).__name__}' is no list of numbers")
        followed = None if pids is None else [operator.index(pid) for pid in pids]
        path = None if cgroup is None else os.fsdecode(cgroup)
    except (TypeError, ValueError) as error:  # a lone surrogate is a ValueError too
        given = f"store={store!r} or pids={pids!r}" + ("" if cgroup is None else f" or {cgroup=}")
        raise UsageError(
            f"{given} cannot be used",
            why=str(error),
            fix='a store is a path, pids is a list of numbers: store="runs", pids=[4121]',
        ) from error
    if followed is not None and path is not None:
        raise UsageError(
            f"pids={pids!r} and {cgroup=} are both given",
            why="a run follows either processes or a cgroup",
            fix="give one of them; a run each of both is two blocks",
        )
    folder = None
    if path is not None:
        from pepr_profiler.recording.cgroups import folder_of

        folder = folder_of(path)

    joins = checked_join(join)

    def make() -> Run:
        return Run(
            options,
            store=where,
            pids=followed,
            cgroup=folder,
            join=joins,
            synchronise=synchronise,
            again=make,
        )

    return make()


def _of_lost(events: EventWriter) -> list[tuple[str, str]]:
    """What to warn of where marks and metrics could not be written."""
    if not events.lost:
        return []
    text = f"{events.lost} mark(s) and metric(s) could not be written, and are lost"
    return [(text, "free descriptors (ulimit -n) and space for the store")]


_DIVIDED_S, _DIVIDED_PART, _DIVIDED_MOST_S = 1.0, 600, 10.0
"""Blocks that are open side by side note the CPU times of their threads every second, later every
600th of the run, at most every 10 s."""


def _open_run() -> Run | None:
    """The innermost open block that we are in the context of, of this process or its parent.

    One that was entered by hand may have been entered in another context of this thread, such as
    another cell of a notebook.
    """
    run = _current_run.get()
    while run is not None and not run._is_open:
        run = run._context
    if run is None:
        here = threading.current_thread()
        of_here = [block.owner for block in _open_blocks.ours() if block.thread is here]
        run = next((block for block in reversed(of_here) if block._is_forgotten), None)
    return run


_WHOLE = 0.99
"""A phase with this part of the energy in its time has all of it, but for its edges."""

_CALLERS = 8


def _callers() -> Sequence[tuple[CodeType, int]]:
    """Who enters a block: the code and the instruction in it, from the nearest caller outwards.

    The frames themselves would keep all that their functions hold.
    """
    found: list[tuple[CodeType, int]] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and len(found) < _CALLERS:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found


def _is_with(caller: tuple[CodeType, int]) -> bool:
    """Whether an instruction begins a `with` statement, or a function is one of _ENTERING."""
    import dis

    code, at = caller
    if code.co_name in _ENTERING:
        return True
    names = [step.opname for step in dis.get_instructions(code) if step.offset <= at][-2:]
    return names[-1] in _WITH or names[0] == "LOAD_SPECIAL"  # behind it the call, since 3.14


_WITH = ("BEFORE_WITH", "BEFORE_ASYNC_WITH", "SETUP_WITH", "SETUP_ASYNC_WITH")
_ENTERING = ("enter_context", "enter_async_context", "_enter_context")
"""Functions of contextlib and unittest that enter a block and have it left."""


def _knows_with() -> bool:
    """Whether this version of Python compiles `with` as `_is_with` expects; a later one may not."""

    class Seen:
        def __enter__(self) -> bool:
            return _is_with(_callers()[0])

        def __exit__(self, *_: object) -> None:
            pass

    with Seen() as is_seen:
        return is_seen


def _begun_late(directory: Path) -> dict[str, Any] | None:
    """The run of a directory in which it has not begun yet, as soon as it has.

    A profiler starts its command before it writes its run.json, and a busy machine may delay it.
    """
    end_s = time.monotonic() + _BEGIN_S
    try:
        is_new = time.time() - directory.stat().st_mtime < _NEW_S
    except OSError:
        return None
    while is_new and not (directory / "run.json").exists() and time.monotonic() < end_s:
        time.sleep(0.005)
    return read_live_run(directory) if is_new else None


_BEGIN_S, _NEW_S = 5.0, 60.0  # sensors may be opened in between


def _wait_for_rows(directory: Path, t_ns: int) -> None:
    """Waits, 2 s at most, until the outer profiler has flushed what was sampled up to `t_ns`."""
    from pepr_profiler.trace.lane import LaneReader

    blocks = [block.owner for block in _open_blocks.ours()]
    ours: Run | None = next((run for run in blocks if run.directory == directory), None)
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        if ours is not None:
            ours._flush()
        try:
            last = [int(batch.t_ns[-1]) for batch in LaneReader(directory, "processes")]
        except TraceError:
            last = []
        if last and last[-1] >= t_ns:
            return
        time.sleep(0.05 if ours is None else 0.01)


def _exit_code(error: BaseException | None) -> int:
    """The status that a program would end with if `error` ended it."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return 0 if error is None else 1


def _number(name: str, value: Any) -> float | int:
    if isinstance(value, bool | int | float):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"metric {name}={value!r} is not a number",
            why=f"it is a {type(value).__name__}",
            fix="log a number, or a scalar tensor or array",
        ) from None


def _synchronise_cuda() -> None:
    """Waits for the GPU if the program uses it: a phase would else end before its work does."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
