"""Which blocks of this process are open at once, and how much CPU time each one's thread has had.

A process is one to the kernel's counters, and so to GPUs. Where several of its blocks are open at
the same time, each writes down the clocks from which its part is worked out (energy/blocks.py):
those of threads that entered a block, which include what these threads started since, and that of
the main thread.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

from pepr_profiler import _core
from pepr_profiler.record import Record
from pepr_profiler.recording.processes import run_around
from pepr_profiler.recording.procfs import ancestors_of, cpu_clock_s
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE, read_live_run

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any


class OpenBlock:
    """A block that records itself: its run's directory as others are given it, and its thread.

    `around` is the open block of this process that has the block's energy too: one whose context
    the block was entered in, or one of the main thread. `before` are the PIDs of multiprocessing's
    workers that were there before it. `notes` wait to be written to its run.
    """

    __slots__ = (
        *("around", "before", "begin_ns", "beside", "is_divided", "mark"),
        *("notes", "notifier", "owner", "pid", "run_id", "thread"),
    )

    def __init__(
        self,
        owner: Any,
        directory: Path,
        notifier: _core.Notifier,
        around: OpenBlock | None,
        *,
        begin_ns: int,
    ) -> None:
        self.owner = owner
        self.begin_ns = begin_ns
        self.mark = str(directory)
        self.run_id = directory.name
        self.notifier = notifier
        self.around = around
        self.pid = os.getpid()
        self.thread = threading.current_thread()
        self.is_divided = False
        self.beside: list[str] = []  # the runs that shared the process at the last note
        self.before = {worker.pid for worker in _workers()}
        self.notes: list[dict[str, Any]] = []

    @property
    def chain(self) -> Iterator[OpenBlock]:
        """The block, the one around it, and so on."""
        at: OpenBlock | None = self
        while at is not None:
            yield at
            at = at.around

    @property
    def is_whole(self) -> bool:
        """Whether no block around it is of another thread: alone it has the whole process."""
        return all(b.around is None or b.around.thread is b.thread for b in self.chain)

    def note_within(self, inner: OpenBlock) -> None:
        """Notes that a block inside this one is a run of its own."""
        within = {"event": "within", "t_ns": time.monotonic_ns(), "run_id": inner.run_id}
        self.notes.append(within)
        self.notifier.notify()

    def take_notes(self) -> list[dict[str, Any]]:
        """The notes that are to be written now."""
        notes, self.notes = self.notes, []
        return notes


class _Clocks(Record):
    """CPU times at an instant, s: of threads that have entered a block, and of the main thread.

    Each thread's is with what it has started. `known_s` is of all of these together, `started_s` of
    what they have started, if that may work for any of them.
    """

    t_ns: int
    main_s: float
    known_s: float
    started_s: float
    each_s: Mapping[threading.Thread, float]


class OpenBlocks:
    """The open blocks of this process that record themselves, in the order of their entry.

    Safe for threads, and across fork: a child finds those of its parent by `find` alone. The
    environment names the block that all that is started now is of for sure: the innermost one, or,
    of several side by side, the one around them, or what was named before them.
    """

    def __init__(self) -> None:
        self._blocks: list[OpenBlock] = []
        self._forget()

    def _forget(self) -> None:
        """Begins anew, as a forked child does; the blocks of its parent stay known."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._clocks: dict[threading.Thread, _core.ThreadClock] = {}
        self._ended_s = 0.0  # of threads that have ended
        self._given: str | None = None  # what the environment said before our first block
        self._said: str | None = None  # what we made it say

    def _here(self) -> threading.Lock:
        """The lock of this process; that of one that has forked us may be held for ever."""
        if self._pid != os.getpid():
            self._forget()
        return self._lock

    def ours(self) -> list[OpenBlock]:
        """The open blocks of this process itself."""
        self._here()
        return [block for block in self._blocks if block.pid == self._pid]

    def find(self, mark: str) -> OpenBlock | None:
        """The block of this process, or of one that forked it, that a value names."""
        return next((block for block in self._blocks if block.mark == mark), None)

    def given(self) -> str:
        """The run that this process is part of as a whole, as its environment named it."""
        with self._here():  # the environment may be about to name another block
            return (self._given if self.ours() else os.environ.get(RUN_DIR_VARIABLE)) or ""

    def outside(self) -> str:
        """The run around this process, by its environment or that of its ancestors; else empty."""
        with self._here():
            return (self._given if self.ours() else run_around(RUN_DIR_VARIABLE, "self")) or ""

    def around(self) -> OpenBlock | None:
        """The block that is around one which this thread enters now, in no block's context.

        That is the innermost block of the main thread, which has started this one as all others.
        """
        main = threading.main_thread()
        if threading.current_thread() is main:
            return None
        of_main = [block for block in self.ours() if block.thread is main]
        return _innermost(of_main) if of_main else None

    def start_clock(self) -> None:
        """Counts this thread's CPU time from now on, and that of what it starts: our threads too.

        The main thread's is always counted.
        """
        thread = threading.current_thread()
        with self._here():
            if thread is not threading.main_thread() and thread not in self._clocks:
                self._clocks[thread] = _core.ThreadClock()

    def enter(self, block: OpenBlock) -> None:
        """The block has begun; those that are open beside it are woken to write that down."""
        with self._here():
            if not self.ours():
                self._given, self._said = os.environ.get(RUN_DIR_VARIABLE), None
            self._blocks.append(block)
            self._name()
            self._note_all(block)

    def leave(self, block: OpenBlock) -> None:
        """The block has ended; nothing is noted of it any more."""
        with self._here():
            if block not in self._blocks:
                return
            if block.is_divided:
                self._note(block, self.ours(), self._read_clocks())
            self._blocks.remove(block)
            for other in self._blocks:
                if other.around is block:
                    other.around = block.around
            self._name()
            self._note_all()
            kept = {other.thread for other in self._blocks}
            for thread in [t for t in self._clocks if not t.is_alive() and t not in kept]:
                self._ended_s += self._clocks.pop(thread).read_s()

    def note(self, block: OpenBlock) -> None:
        """Notes now what the clocks of a divided block show."""
        with self._here():
            ours = self.ours()
            if block.is_divided and block in ours:
                self._note(block, ours, self._read_clocks())

    # --- parts ---

    def _name(self) -> None:
        """Makes the environment name a run, unless the program has changed it."""
        now = os.environ.get(RUN_DIR_VARIABLE)
        if now != (self._given if self._said is None else self._said):
            return
        ours = self.ours()
        common = _innermost(ours) if ours else None
        self._said = None if common is None else common.mark
        value = self._given if common is None else common.mark
        if value is not None:
            os.environ[RUN_DIR_VARIABLE] = value
        elif now is not None:
            del os.environ[RUN_DIR_VARIABLE]

    def _note_all(self, new: OpenBlock | None = None) -> None:
        """Notes the clocks for each block that is divided, or was until now.

        The first note of the `new` one is of its begin.
        """
        ours = self.ours()
        parted = [b for b in ours if b.is_divided or not b.is_whole or self._beside(b, ours)]
        if not parted:
            return
        clocks = self._read_clocks()
        for block in parted:
            self._note(block, ours, clocks)
            if block is new:
                block.notes[-1]["t_ns"] = block.begin_ns
            else:
                block.notifier.notify()

    def _read_clocks(self) -> _Clocks:
        main_s = _thread_clock_s(os.getpid())
        each_s = {thread: clock.read_s() for thread, clock in self._clocks.items()}
        known_s = sum(each_s.values(), main_s + self._ended_s)
        started_s = 0.0
        if _has_common_threads():
            started_s = known_s - main_s - sum(_thread_clock_s(t.native_id or 0) for t in each_s)
        return _Clocks(time.monotonic_ns(), main_s, known_s, max(0.0, started_s), each_s)

    def _note(self, block: OpenBlock, ours: list[OpenBlock], clocks: _Clocks) -> None:
        beside = self._beside(block, ours)
        block.is_divided = bool(beside) or not block.is_whole
        threads = [other.thread for other in (block, *beside)]
        before, block.beside = block.beside, [other.run_id for other in beside]
        block.notes.append(
            {
                "event": "blocks",
                "t_ns": clocks.t_ns,
                "divided": block.is_divided,
                "own_s": clocks.each_s.get(block.thread, clocks.main_s),
                "known_s": clocks.known_s,
                # What the main thread does outside of all of them is none of theirs.
                "main_s": None if threading.main_thread() in threads else clocks.main_s,
                "pool_s": clocks.started_s + _shared_s(block.before),
                "blocks": len(threads),
                "of_thread": threads.count(block.thread),
                "beside": None if block.beside == before else block.beside,  # as before
            }
        )

    @staticmethod
    def _beside(block: OpenBlock, ours: list[OpenBlock]) -> list[OpenBlock]:
        """The blocks that share the process with a block: those beside it or one around it."""
        chain = list(block.chain)
        around = [at.around for at in chain]
        return [other for other in ours if other not in chain and other.around in around]


def _innermost(blocks: list[OpenBlock]) -> OpenBlock | None:
    """The innermost of the blocks that are around all of these, or are one of them."""
    outer = {id(block.around) for block in blocks}
    chains = [list(block.chain) for block in blocks if id(block) not in outer]
    common = (at for at in chains[0] if all(at in chain for chain in chains))
    return next(common, None)


def _thread_clock_s(thread: int) -> float:
    """CPU time of one of our threads alone; 0 if it has ended."""
    try:
        return time.clock_gettime((~thread << 3) | 6)  # as pthread_getcpuclockid(3) names it
    except OSError:
        return 0.0


def _has_common_threads() -> bool:
    """Whether a library is in use whose threads work for all others, whoever came first.

    Those of OpenMP, which most have, work for the thread that started them.
    """
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # autograd's thread of each GPU
    uses_cuda = getattr(cuda, "is_initialized", bool)()
    return uses_cuda or any(name in sys.modules for name in ("jax", "tensorflow", "numba"))


def _workers() -> list[Any]:
    """The living workers of multiprocessing, and of what is built on it, that this process has."""
    return list(getattr(sys.modules.get("multiprocessing.process"), "_children", ()))


def _shared_s(before: Container[int | None]) -> float:
    """CPU time of the workers that several threads may use, whoever started them.

    These are loky's, which all threads have in common, and those that were there before a block.
    """
    shared = (
        worker.pid
        for worker in _workers()
        if worker.pid in before or "loky" in type(worker).__module__
    )
    return sum(cpu_clock_s(pid) or 0.0 for pid in shared if pid)


# --- workers that were started before the block ---------------------------------------------------


def runs_of_ancestors() -> list[Path]:
    """The runs that the nearest ancestor which records itself has open, so that we are in them.

    A worker that was started before the block has no mark of it. Whoever records holds its run's
    directory open.
    """
    if not _is_worker():
        return []
    for pid in ancestors_of(os.getpid()):
        found: dict[str, dict[str, Any]] = {}
        for path in _open_runs(pid):
            run = read_live_run(Path(path))
            facts = (run or {}).get("recording") or {}
            if run and facts.get("profiler_pid") == pid and facts.get("root") == "self":
                found[path] = run
        if found:
            return _certain(found)
    return []


def _is_worker() -> bool:
    """Whether this process is one of multiprocessing, of what is built on it, or of Ray.

    Other programs are spared the 0.3 ms that it takes to look at their ancestors.
    """
    parent = getattr(sys.modules.get("multiprocessing.process"), "_parent_process", None)
    return parent is not None or "RAY_RAYLET_PID" in os.environ


def _open_runs(pid: int) -> set[str]:
    """The directories named runs/NAME that a process has open, as far as we may see."""
    found = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            try:
                path = os.readlink(f"/proc/{pid}/fd/{fd}")  # noqa: PTH115
            except OSError:  # closed meanwhile
                continue
            if path.rpartition("/")[0].endswith("/runs"):
                found.add(path)
    except OSError:  # another user's
        pass
    return found


def _certain(runs: dict[str, dict[str, Any]]) -> list[Path]:
    """The innermost run, or the one around all; all of them where there is neither."""
    ids = {path: run.get("run_id") for path, run in runs.items()}
    around = {path: run["recording"].get("outer") or {} for path, run in runs.items()}
    outer = {path: facts.get("run_id") for path, facts in around.items()}
    inner = [path for path in runs if ids[path] not in outer.values()]
    outermost = [path for path in runs if outer[path] not in ids.values()]
    for candidates in (inner, outermost):
        if len(candidates) == 1:
            return [Path(candidates[0])]
    return [Path(path) for path in runs]
