"""Ctrl-C at random instants of a block's entry and exit: whether anything of the block is left.

    python tests/interrupts.py 1000    # of each kind, 8 min; the tests do fewer

Each instant is tried in a forked process of its own. The kinds are "import" (SIGINT at a random
time, in a program that has imported nothing), "time" (the same, when all is imported) and "step"
(at a random instruction of the block's own code behind which CPython looks for signals: the windows
are there that a time would seldom meet).
"""

from __future__ import annotations

import argparse
import contextlib
import dis
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KINDS = ("import", "time", "step")
_MOST_S = 10.0


def block(meter: str) -> None:
    from pepr_profiler import profile

    with profile("interrupted", sensors=[meter]):
        pass


def threads() -> set[str]:
    """Our threads that run."""
    names = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.add((task / "comm").read_text().strip())
    return {name for name in names if "pepr" in name}


def require_nothing_left(meter: str) -> None:
    """Raises AssertionError if something of a block is left, or a later block does not work."""
    assert "PEPR_RUN_DIR" not in os.environ
    until_s = time.monotonic() + _MOST_S
    while threads() and time.monotonic() < until_s:
        time.sleep(0.005)
    assert not threads(), threads()
    from pepr_profiler import profile

    with profile("later", sensors=[meter]) as later:
        echo = subprocess.run(["printenv", "PEPR_RUN_DIR"], stdout=subprocess.PIPE, check=True)
    assert echo.stdout.decode().strip() == str(later.directory)
    assert not later.joined and later.summary["complete"]


class Steps:
    """Counts where block.py, and who enters a block, hear a signal; SIGINT at one of them.

    That is where a function begins, behind calls, and where a loop goes back.
    """

    def __init__(self, at: int) -> None:
        from pepr_profiler import block as module

        self.count, self.at = 0, at
        self.where = ""
        self._files = (module.__file__, contextlib.__file__, __file__)
        self._before: dict[FrameType, str] = {}

    def __call__(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        frame.f_trace_opcodes = True
        if event == "return":
            self._before.pop(frame, None)
        if event == "opcode" and frame.f_code.co_filename in self._files:
            before = self._before.get(frame, "RESUME")
            self._before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if not before.startswith(("RESUME", "CALL", "JUMP_BACKWARD")):
                return self
            self.count += 1
            if self.count == self.at:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self


def stepped(meter: str, at: int) -> Steps:
    """A block that is interrupted at its instruction `at`; how far it came."""
    steps = Steps(at)
    sys.settrace(steps)
    try:
        block(meter)
    except KeyboardInterrupt:
        assert at
    finally:
        sys.settrace(None)
    return steps


def child(meter: str, step: int | None) -> None:
    """A block that is interrupted, and what is left then. Does not return."""
    handler, where = signal.default_int_handler, "any time"

    def ignore() -> None:
        assert signal.getsignal(signal.SIGINT) is handler, "SIGINT has another handler"
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    try:
        try:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                if step is None:
                    block(meter)
                else:
                    where = stepped(meter, step).where
            except KeyboardInterrupt:
                pass
            ignore()
        except KeyboardInterrupt:  # it comes once, and perhaps only now
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                ignore()
        require_nothing_left(meter)
    except BaseException:
        traceback.print_exc()
        print(f"interrupted at {where}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def interrupt(meter: str, *, after_s: float | None = None, step: int | None = None) -> bool:
    """Whether nothing was left of a block that was interrupted after a time, or at a step."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pid = os.fork()
    if pid == 0:
        child(meter, step)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGINT)
    return os.waitpid(pid, 0)[1] == 0


def spans_s(meter: str) -> float:
    """How long a whole block takes, with what it imports."""
    begin_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        block(meter)
        os._exit(0)
    os.waitpid(pid, 0)
    return time.monotonic() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int, help="of instants, for each kind")
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    # A shell's background jobs ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PEPR_STORE": f"{folder}/store", "PEPR_DAEMON": "off"}
        meter = f"replay:{folder}/meter"
        channel = "meter power W 1 0 gauge test kind=gpu component=gpu:x"
        Path(folder, "meter").write_text("channel\t" + "\t".join(channel.split()) + "\n0\t100\n")
        for kind in arguments.kinds:
            if kind != "import":
                block(meter)  # imports all
            steps, whole_s = stepped(meter, 0).count if kind == "step" else 0, spans_s(meter)
            bad = 0
            for _ in range(arguments.number):
                if kind == "step":
                    bad += not interrupt(meter, step=random.randint(1, steps))
                else:
                    bad += not interrupt(meter, after_s=random.uniform(0, whole_s))
            print(f"{kind}: {arguments.number} interrupts, {bad} left something", flush=True)
            failed += bad
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
