"""A tool opened in its own process and environment, which measures windows on command."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import Installed

PATIENCE_S = 60.0
"""Far beyond what any tool takes to open or to close: beyond it, it hangs, and is ended."""


MARK = "PEPR_PEERS_MARK"
"""The variable by which what a tool has started, at whatever remove, is known as its own."""
AXIS = "PEERS_AXIS"
"""Likewise what an axis has started."""


def living(mark: str, variable: str = MARK) -> list[int]:
    """Processes that have this mark in their environment, zombies left out."""
    found, sought = [], f"{variable}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                marked = sought in (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if marked and state != "Z":
                    found.append(int(folder.name))
    return found


def end(mark: str, variable: str = MARK) -> int:
    """Kills them all but us, and who they start meanwhile; how many there were."""
    ended: set[int] = set()
    while left := set(living(mark, variable)) - ended - {os.getpid()}:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended |= left
    return len(ended)


@dataclass(frozen=True)
class Window:
    """What a tool says about one window, J by component; None and `error`: it does not say."""

    name: str
    begin_ns: int
    end_ns: int
    energy_j: Mapping[str, float] | None
    u_j: Mapping[str, float] | None
    error: str | None

    def of(self, kind: str) -> float | None:
        """The energy of all devices of a kind: gpu, cpu or dram. None: not told."""
        if self.energy_j is None:
            return None
        told = [joules for name, joules in self.energy_j.items() if _is_of(name, kind)]
        return None if not told or None in told else sum(told)

    def u_of(self, kind: str) -> float | None:
        """The stated uncertainty of `of` (k = 2); None: none is stated."""
        told = [u_j for name, u_j in (self.u_j or {}).items() if _is_of(name, kind)]
        return None if not told or None in told else sum(u_j * u_j for u_j in told) ** 0.5


def _is_of(component: str, kind: str) -> bool:
    return component.partition(":")[0] == kind


class Session:
    """Speaks with tools/serving.py. A tool that fails leaves `failed`, and windows that say so.

    What the tool itself prints goes to the file `stdout`, if one is given.
    """

    def __init__(
        self,
        installed: Installed,
        env: Mapping[str, str],
        *,
        rate_hz: float | None = None,
        stdout: Path | None = None,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        self.name = installed.name
        self.failed: str | None = None
        self.mark = env.get(MARK, uuid.uuid4().hex)
        self._asked: dict[str, tuple[int, int]] = {}
        self._told: dict[str, Window] = {}
        self._rest = b""
        self.process = subprocess.Popen(
            [*installed.driver(rate_hz), *([] if stdout is None else ["--stdout", str(stdout)])],
            env={**env, MARK: self.mark},
            cwd=env.get("TMPDIR"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=preexec_fn,  # noqa: PLW1509  this process has one thread
        )

    def ready(self) -> bool:
        """Waits until the tool is open; False: it failed, which `failed` explains."""
        for facts in self._lines(PATIENCE_S):
            self.failed = facts.get("failed")
            return self.failed is None
        self.failed = self.failed or "it ended, or hung, before it was open"
        return False

    def begin(self, name: str, at_ns: int = 0) -> None:
        """Begins a window, not before an instant of CLOCK_MONOTONIC. Names are words."""
        self._asked[name] = (at_ns or time.monotonic_ns(), 0)
        self._say(f"begin {name} {at_ns}")

    def end(self, name: str, after_ns: int = 0) -> None:
        """Ends it, `after_ns` after it began or at once.

        Commands are obeyed in turn, so that a whole schedule can be sent ahead.
        """
        begin_ns = self._asked[name][0]
        self._asked[name] = (begin_ns, max(begin_ns + after_ns, time.monotonic_ns()))
        self._say(f"end {name} {after_ns}")

    def close(self, patience_s: float = PATIENCE_S) -> list[Window]:
        """Waits for the last window and ends the tool, which may take `patience_s` after that.

        All windows in the order of their begins, those untold with the reason.
        """
        self._say("quit")
        last_ns = max((end_ns for _, end_ns in self._asked.values()), default=0)
        left_s = max(0.0, (last_ns - time.monotonic_ns()) * 1e-9)
        for facts in self._lines(left_s + patience_s):
            self._told[facts["name"]] = Window(
                facts["name"],
                facts["begin_ns"],
                facts["end_ns"],
                facts["energy_j"],
                facts["u_j"],
                facts["error"],
            )
        self.kill()
        why = self.failed or f"it ended with status {self.process.returncode} and said nothing"
        return [
            self._told.get(name) or Window(name, begin_ns, end_ns, None, None, why)
            for name, (begin_ns, end_ns) in self._asked.items()
        ]

    def exit(self, status: int) -> int:
        """Lets the program that uses the tool end as programs do; its status as a shell has it.

        What it leaves running runs on until `kill`.
        """
        self._say(f"exit {status}")
        ended = self.process.wait(PATIENCE_S)
        self.close_pipes()
        return ended if ended >= 0 else 128 - ended

    def kill(self) -> None:
        """Whatever happens: no process stays, of the tool's neither."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        end(self.mark)
        self.close_pipes()

    def close_pipes(self) -> None:
        """Of a program that has ended; what it has left behind may wait for that."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            self.failed = self.failed or "it ended before it was asked"

    def _lines(self, patience_s: float) -> Iterator[dict[str, Any]]:
        """JSON lines until the tool closes its output, or for so long."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + patience_s
        while True:
            line, separator, rest = self._rest.partition(b"\n")
            if separator:
                self._rest = rest
                yield json.loads(line)
                continue
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                self.failed = self.failed or f"it did not answer for {patience_s:g} s"
                return
            more = os.read(descriptor, 65536)
            if not more:
                return
            self._rest += more


@contextmanager
def sessions(
    tools: Sequence[Installed], env: Mapping[str, str], **options: Any
) -> Iterator[list[Session]]:
    """All of them open, or failed twice; two at a time, as some allow themselves 10 s."""
    opened: list[Session] = []

    def wait_for(place: int) -> None:
        if not opened[place].ready():
            opened[place].kill()
            opened[place] = Session(tools[place], env, **options)
            opened[place].ready()

    try:
        for place, tool in enumerate(tools):
            opened.append(Session(tool, env, **options))
            if place:
                wait_for(place - 1)
        if tools:
            wait_for(len(tools) - 1)
        yield opened
    finally:
        for session in opened:
            session.kill()
