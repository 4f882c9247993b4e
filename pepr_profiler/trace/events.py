"""Marks and metrics of a run, and notes about its processes: lines of JSON, one writer a file.

Lines of `events-HOST-PID.jsonl` are appended and written through at once: they survive `kill -9` of
the program that wrote them. Where that is a rank of several, the first line says which. A block of
a program begins and ends in one file. A mark (`pepr-profile mark`) names its phase, which belongs
to the run: another process may end it.

Notes about processes are in `processes-HOST-PID.jsonl`, so that who only looks at a run in progress
need not read its marks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pepr_profiler.record import Any, Record
from pepr_profiler.trace.files import moved_up, open_file, open_to_append
from pepr_profiler.trace.shape import MALFORMED, shape_error

MARKS = ("next", "begin", "end")
"""What a mark may be. "next" begins a phase, and ends the one that the last "next" of its series
began; "begin" and "end" go by the phase's name."""


# --- writing -----------------------------------------------------------------------------------


_TRUSTED_NS = 1_000_000
"""A descriptor that was ours is for so long: a look takes as long as a mark."""


class EventWriter:
    """Appends this process's events to its own file in a run directory.

    Safe across fork: a child opens a file of its own at its first event. It raises nothing: a line
    that cannot be written is counted in `lost`, and the next one opens the file anew. A descriptor
    that the program has closed, and perhaps got again for a file of its own, is not written to.
    `rank_facts` says which rank this process is, in the words of launcher.rank_facts; nothing is
    written of a process that is none.
    """

    def __init__(
        self,
        directory: Path,
        kind: str = "events",
        *,
        rank_facts: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self._directory = directory
        self._kind = kind
        self._rank_facts = rank_facts
        self._pid = 0
        self._fd = -1
        self._identity = (-1, -1)
        self._checked_ns = 0
        self._described_pid = 0
        self._written = 0
        self.lost = 0

    def write(self, line: str) -> None:
        """Appends one JSON object (without its newline), written through to the kernel."""
        self._open()
        data = line.encode() + b"\n"
        try:
            is_whole = os.write(self._fd, data) == len(data)
        except OSError:
            is_whole = False
        self._written += is_whole
        self.lost += not is_whole

    def begin(
        self,
        name: str,
        number: int,
        parent: int | None,
        *,
        thread: int | None = None,
        ancestors: Callable[[], Sequence[int]] | None = None,
    ) -> int:
        """A phase begins now: at this instant, ns.

        `thread` is that of the phase, None for the main thread. `ancestors` gives the PIDs of the
        process's parent, its parent and so on. It is called once a process.
        """
        self._open()  # takes longer than a mark; it is not part of the phase
        of = "" if thread is None else f',"thread":{thread}'
        if ancestors is not None and self._described_pid != os.getpid():
            self._described_pid = os.getpid()
            of += f',"ancestors":{json.dumps(list(ancestors()))}'
        t_ns, up = time.monotonic_ns(), "null" if parent is None else str(parent)
        line = f'{{"event":"begin","t_ns":{t_ns},"id":{number},"parent":{up},"name":{name}{of}}}'
        self.write(line)
        return t_ns

    def end(self, number: int) -> int:
        """The phase with this number ends now: at this instant, ns."""
        t_ns = time.monotonic_ns()
        self.write(f'{{"event":"end","t_ns":{t_ns},"id":{number}}}')
        return t_ns

    def mark(self, verb: str, name: str | None, *, series: str, t_ns: int | None = None) -> None:
        """A phase of the whole run, which other processes may end; `verb` is one of MARKS.

        Other processes write to other files, so marks are paired when they are read.
        """
        mark = {"event": "mark", "t_ns": time.monotonic_ns() if t_ns is None else t_ns}
        self.write(json.dumps({**mark, "verb": verb, "series": series, "name": name}))

    def metrics(self, values: dict[str, Any], *, t_ns: int | None = None) -> None:
        """Metrics that hold from now on; the last value of a name is the run's."""
        t_ns = time.monotonic_ns() if t_ns is None else t_ns
        self.write(f'{{"event":"metrics","t_ns":{t_ns},"metrics":{json.dumps(values)}}}')

    def move_to(self, directory: Path) -> None:
        """Goes on in another directory, with what was written; the file here was removed.

        Another thread may write meanwhile.
        """
        self._directory = directory
        if self._pid != os.getpid():
            return  # the next event opens a file there
        if not self._is_ours():  # somebody closed it: nothing can be read any more
            self.lost, self._written = self.lost + self._written, 0
            return
        with suppress(OSError), open(f"/proc/self/fd/{self._fd}", "rb", 0) as before:  # noqa: PTH123
            file = open_to_append(directory / self._name)
            try:
                os.write(file, before.readall())
                os.dup2(file, self._fd, inheritable=False)
                self._identity = _identity_of(file)
                os.write(file, before.readall())  # what has come since
            finally:
                os.close(file)

    @property
    def _name(self) -> str:
        return f"{self._kind}-{os.uname().nodename}-{os.getpid()}.jsonl"

    def close(self) -> None:
        if self._is_ours():
            if self._pid == os.getpid() and os.fstat(self._fd).st_nlink == 0:
                self.lost, self._written = self.lost + self._written, 0  # the file was removed
            os.close(self._fd)
        self._fd, self._pid = -1, 0

    def _is_ours(self) -> bool:
        try:
            return _identity_of(self._fd) == self._identity
        except OSError:
            return False

    def _open(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._checked_ns < _TRUSTED_NS and self._fd >= 0 and self._pid == os.getpid():
            return
        self._checked_ns = now_ns
        ours = self._is_ours()
        if ours and self._pid == os.getpid():
            return
        if ours:
            os.close(self._fd)  # inherited through fork; the parent keeps its own
        self._pid, self._fd = os.getpid(), -1
        try:
            self._fd = moved_up(open_to_append(self._directory / self._name))
            self._identity = _identity_of(self._fd)
        except OSError:
            return
        if self._rank_facts is not None and (rank := self._rank_facts()):
            self.write(json.dumps({"event": "rank", "t_ns": now_ns, **rank}))


def _identity_of(descriptor: int) -> tuple[int, int]:
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino


# --- marks and metrics, read back ---------------------------------------------------------------


class PhaseSpan(Record):
    """One pass through a phase; `end_ns` is None if it never ended.

    `series` is that of the mark that began it; None for a program's own block, which no mark ends.
    `rank` is that of the process that began it; None where it has none.

    A program's phases of one `strand` (not negative) are nested in each other or follow each other,
    those of several may be open side by side, in threads, tasks or processes. `above` are the names
    of the phases that it is nested in, also those of the thread or process that started its own.
    """

    name: str
    begin_ns: int
    end_ns: int | None
    nested: bool
    series: str | None = None
    rank: int | None = None
    strand: int = -1
    above: frozenset[str] = frozenset()


class Events(Record):
    """What the programs of a run marked and logged, in time order.

    `metrics` are (t_ns, values by name), `ranks` those of the processes that logged them (None: it
    has none). `torn_lines` counts lines that could not be read, `unread` are files that could not
    be read, each with why. `rank_facts` are what each rank that wrote a file says of itself.
    `knows_ancestors` is False for recordings of before processes stored theirs.
    """

    phases: tuple[PhaseSpan, ...]
    metrics: tuple[tuple[int, dict[str, Any]], ...]
    torn_lines: int
    unread: tuple[tuple[str, str], ...] = ()
    ranks: tuple[int | None, ...] = ()
    rank_facts: tuple[Mapping[str, int | None], ...] = ()
    knows_ancestors: bool = True

    def times_ns(self) -> Iterator[int]:
        """When each phase was entered and left, and each metric logged."""
        for phase in self.phases:
            yield phase.begin_ns
            if phase.end_ns is not None:
                yield phase.end_ns
        for t_ns, _ in self.metrics:
            yield t_ns


RANK_FACTS = ("rank", "local_rank", "world_size", "local_world_size")
"""What a rank says of itself; `local_world_size` is how many ranks its node has."""

_EVENT_SHAPE = {
    **{"t_ns": int, "id": int, "metrics": {}, "rank": int},
    **{"parent": (int, None), "thread": int, "ancestors": [int]},
    **dict.fromkeys(RANK_FACTS[1:], (int, None)),
}
"""What is used of an event, besides names; see EventWriter."""


def read_events(directory: Path) -> Events:
    """Reads every events file of a run directory."""
    blocks: list[_Block] = []
    ancestors: dict[_Process, Sequence[int]] = {}
    metrics: list[tuple[int, dict[str, Any], int | None]] = []
    marks: list[_Mark] = []
    rank_facts: dict[int, Mapping[str, int | None]] = {}
    torn = 0
    unread: list[tuple[str, str]] = []
    for path in sorted(directory.glob("events-*.jsonl")):
        host, _, pid = path.stem.rpartition("-")
        process = host, int(pid) if pid.isdecimal() else 0
        open_blocks: dict[int, int] = {}
        rank: int | None = None
        for line in _lines_of(path, unread):
            try:
                event = json.loads(line)
                kind = event["event"]
                if wrong := shape_error(event, _EVENT_SHAPE):
                    raise ValueError(wrong)
                t_ns = event["t_ns"]
                if kind == "rank":
                    rank = int(event["rank"])
                    rank_facts[rank] = {name: event.get(name) for name in RANK_FACTS}
                elif kind == "begin":
                    block = _Block.of(event, process, rank)
                    # A program that replaced itself (exec) kept its pid and counts from 1 again.
                    open_blocks[block.number] = len(blocks)
                    blocks.append(block)
                    if "ancestors" in event:
                        ancestors[process] = event["ancestors"]
                elif kind == "end":
                    begun = open_blocks.pop(event["id"], None)
                    if begun is not None:
                        blocks[begun] = blocks[begun]._replace(end_ns=t_ns)
                elif kind == "mark":
                    marks.append(_Mark.of(event, rank))
                elif kind == "metrics":
                    metrics.append((t_ns, event["metrics"], rank))
            except MALFORMED:
                torn += 1
    phases = _phases_of_blocks(blocks, ancestors)
    phases.extend(_phases_of_marks(marks))
    phases.sort(key=lambda phase: phase.begin_ns)
    metrics.sort(key=lambda item: item[0])
    logged = tuple((t_ns, values) for t_ns, values, _ in metrics)
    return Events(
        tuple(phases),
        logged,
        torn,
        tuple(unread),
        tuple(rank for *_, rank in metrics),
        tuple(facts for _, facts in sorted(rank_facts.items())),
        all(block.process in ancestors for block in blocks),
    )


_MOST_BYTES, _LONGEST_LINE = 512 << 20, 1 << 20
"""The size of a file of events or notes, and of a line in it; 5 million marks fit in."""


def _lines_of(path: Path, unread: list[tuple[str, str]]) -> Iterator[bytes]:
    """The lines of a file, a longer one in pieces; if it cannot be read, `unread` gets why."""
    try:
        with open(open_file(path, most_bytes=_MOST_BYTES), "rb") as file:  # noqa: PTH123
            while line := file.readline(_LONGEST_LINE):
                yield line
    except OSError as error:
        unread.append((path.name, error.strerror or str(error)))


_Process = tuple[str, int]
"""A process's host and PID, as the name of its file has them."""


class _Block(Record):
    """A phase of a program, as its process stored it."""

    process: _Process
    number: int
    parent: int | None
    name: str
    begin_ns: int
    end_ns: int | None
    rank: int | None
    in_main: bool

    @classmethod
    def of(cls, begin: Mapping[str, Any], process: _Process, rank: int | None) -> _Block:
        number, parent, t_ns = begin["id"], begin.get("parent"), begin["t_ns"]
        name, in_main = str(begin["name"]), "thread" not in begin
        return cls(process, number, parent, name, t_ns, None, rank, in_main)


def _phases_of_blocks(
    blocks: Sequence[_Block], ancestors: Mapping[_Process, Sequence[int]]
) -> list[PhaseSpan]:
    """The phases of all processes, with their strands and what they are nested in."""
    edges = []
    for i, block in enumerate(blocks):
        edges.append((block.begin_ns, 1, i))
        if block.end_ns is not None:  # in a damaged file it may be before the begin
            end_ns = max(block.begin_ns, block.end_ns)
            edges.append((end_ns, 0 if end_ns > block.begin_ns else 2, i))
    strands = _StrandsByTime(blocks, ancestors)
    for _, edge, i in sorted(edges):
        if edge == 1:
            strands.begin(i)
        else:
            strands.end(i)
    return [
        PhaseSpan(
            block.name,
            block.begin_ns,
            block.end_ns,
            block.parent is not None,
            rank=block.rank,
            strand=strands.strand[i],
            above=strands.above[i],
        )
        for i, block in enumerate(blocks)
    ]


_DEEPEST = 100
"""So many names of phases around a phase are known: a damaged file may nest a million."""


class _StrandsByTime:
    """Goes through the phases of all processes in order of time, and finds their strands."""

    def __init__(
        self, blocks: Sequence[_Block], ancestors: Mapping[_Process, Sequence[int]]
    ) -> None:
        self._blocks = blocks
        self._ancestors = ancestors
        self.strand = [-1] * len(blocks)
        self.above: list[frozenset[str]] = [frozenset()] * len(blocks)
        self._open: dict[tuple[_Process, int], int] = {}
        self._stacks: list[list[int]] = []
        self._free: list[int] = []
        self._of_main: dict[_Process, list[int]] = {}

    def begin(self, i: int) -> None:
        block = self._blocks[i]
        above = self._parent_of(block)
        strand = -1 if above is None else self.strand[above]
        if above is not None:
            self.above[i] = self.above[above]
            if len(self.above[i]) < _DEEPEST:
                self.above[i] |= {self._blocks[above].name}
        if above is None or self._blocks[above].process != block.process:
            self.above[i] |= self._around(block)  # a pool may be older than the phase it works for
        if above is None or self._stacks[strand][-1] != above:
            if not self._free:
                self._free.append(len(self._stacks))
                self._stacks.append([])
            strand = self._free.pop()
        self.strand[i] = strand
        self._stacks[strand].append(i)
        self._open[block.process, block.number] = i
        if block.in_main:
            self._of_main.setdefault(block.process, []).append(i)

    def end(self, i: int) -> None:
        block, stack = self._blocks[i], self._stacks[self.strand[i]]
        stack.remove(i)
        if not stack:
            self._free.append(self.strand[i])
        if self._open.get((block.process, block.number)) == i:
            del self._open[block.process, block.number]
        if block.in_main:
            self._of_main[block.process].remove(i)

    def _above(self, process: _Process) -> Iterator[_Process]:
        return ((process[0], pid) for pid in self._ancestors.get(process, ()))

    def _parent_of(self, block: _Block) -> int | None:
        """The phase that it was begun in, also one of the process that forked its own."""
        if block.parent is None:
            return None
        of = (block.process, *self._above(block.process))
        found = (self._open.get((process, block.parent)) for process in of)
        return next((i for i in found if i is not None), None)

    def _around(self, block: _Block) -> frozenset[str]:
        """The names of the open phases of the main thread above: all of them, if it has tasks."""
        of = self._above(block.process)
        if not block.in_main:
            of = iter((block.process, *of))
        mine = next((found for process in of if (found := self._of_main.get(process))), [])
        chains = {self.strand[i]: self.above[i] | {self._blocks[i].name} for i in mine}
        return frozenset.intersection(*chains.values()) if chains else frozenset()


class _Mark(Record):
    t_ns: int
    verb: str
    series: str
    name: str | None
    rank: int | None

    @classmethod
    def of(cls, event: dict[str, Any], rank: int | None) -> _Mark:
        name, verb = event["name"], event["verb"]
        if verb not in MARKS or not (isinstance(name, str) or (name is None and verb == "end")):
            raise ValueError(f"no mark: {event}")
        return cls(int(event["t_ns"]), verb, str(event["series"]), name, rank)

    def ends(self, begun: _Mark) -> bool:
        """Whether this mark may end the phase that `begun` began."""
        if self.verb == "next":
            return begun.verb == "next" and begun.series == self.series
        if self.name is None:
            return begun.series == self.series
        return self.verb == "end" and begun.name == self.name


def _phases_of_marks(marks: Sequence[_Mark]) -> Iterator[PhaseSpan]:
    """The phases that the marks of all processes make.

    Of several that a mark may end, it ends the last one that was begun by its own series: scripts
    side by side use the same names. If there is none, the last one that another series began: who
    begins and who ends may be two processes.
    """
    begun: list[_Mark] = []
    for mark in sorted(marks, key=lambda mark: mark.t_ns):
        if mark.verb != "begin":
            found = [other for other in begun if mark.ends(other)]
            found = [other for other in found if other.series == mark.series] or found
            if found:
                begun.remove(found[-1])
                yield _phase_of_mark(found[-1], mark.t_ns, begun)
        if mark.verb != "end":
            begun.append(mark)
    yield from (_phase_of_mark(mark, None, begun[:i]) for i, mark in enumerate(begun))


def _phase_of_mark(begin: _Mark, end_ns: int | None, begun: Sequence[_Mark]) -> PhaseSpan:
    """The phase that a mark began, while those that `begun` began were open too."""
    nested = any(m.series == begin.series and m.t_ns <= begin.t_ns for m in begun)
    return PhaseSpan(str(begin.name), begin.t_ns, end_ns, nested, begin.series, begin.rank)


# --- notes about processes ----------------------------------------------------------------------


def read_process_notes(
    directory: Path, unread: list[tuple[str, str]] | None = None
) -> list[dict[str, Any]]:
    """What recording/processes.py noted of processes while they lived, in time order.

    A torn line is left out. `unread` gets the files that could not be read, each with why.
    """
    unread = [] if unread is None else unread
    notes: list[dict[str, Any]] = []
    for path in sorted(directory.glob("processes-*.jsonl")):
        for line in _lines_of(path, unread):
            with suppress(*MALFORMED):
                note = json.loads(line)
                if not shape_error(note, _NOTE_SHAPE) and note.keys() >= _NOTE_KEYS[note["event"]]:
                    notes.append(note)
    return sorted(notes, key=lambda note: int(note["t_ns"]))


_NOTE_SHAPE = {
    "t_ns": int,
    "since_ns": int,
    "pid": int,
    "profiler_s": float,
    "run_id": str,
    **dict.fromkeys(("own_s", "known_s", "pool_s"), float),
    "main_s": (float, None),
    **{"divided": bool, "blocks": int, "of_thread": int, "beside": ([str], None)},
    "owner": str,
    "command": (str, None),
    "user": (str, None),
    "processes": [{"cpu_s": float, "pid": int, "command": (str, None), "user": (str, None)}],
}
_NOTE_KEYS = {
    "process": {"t_ns", "pid"},
    "cpu": {"t_ns", "since_ns", "profiler_s", "processes"},
    "blocks": {
        *("t_ns", "divided", "own_s", "known_s", "main_s", "pool_s"),
        *("blocks", "of_thread", "beside"),
    },
    "within": {"t_ns", "run_id"},
}
"""What a note must have, by its kind."""
