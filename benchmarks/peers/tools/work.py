"""A training with a tool and without it in turn: what an epoch takes, in the tool's environment.
Standard library only, besides what lies in the folders that --packages names: torch and examples/.

    work.py --driver use_X.py [--rate HZ]    the tool is opened in this program
    work.py --wrapped                        its wrapper is our parent
    work.py                                  no tool: what differs all the same

For the segments without it a tool stands still: of one in code the threads (ptrace) and processes
that it has started, of one around the command the wrapper (SIGSTOP). The work runs as a user's
would: on any CPU, with as many threads as torch takes by itself (--threads N: others). Prints a
JSON line:
{"pairs": [[seconds a piece without, with, CPU of the tool as a share of a core], ...]}
or {"failed": why}; with --windows {"window_s": [...], "phase_s": [...]}.
"""

import argparse
import contextlib
import ctypes
import errno
import importlib
import json
import os
import select
import signal
import sys
import time
from functools import partial
from pathlib import Path

SETTLED_S = 2.5  # by then cadences are learnt and what is done once is done
PATIENCE_S = 20.0

# linux/ptrace.h, linux/wait.h
PTRACE_CONT, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 7, 17, 0x4206, 0x4207
WAIT_ALL = 0x40000000


def training(threads):
    """An epoch of examples/train.py: a small network on handwritten digits."""
    import torch
    import train

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = train.load("digits")["train"]
    model = train.make_model("mlp_small", features=data[0].shape[1], classes=10)
    optimizer = torch.optim.AdamW(model.parameters())
    return lambda: train.train_epoch(model, optimizer, *data)


def segment(piece, seconds, used=lambda: 0.0):
    """Whole pieces for so long, one at least: (wall seconds each, CPU of the tool per second)."""
    used_s = used()  # reading clocks takes as long as the tool may take
    begin_s, pieces = time.perf_counter(), 0
    while not pieces or time.perf_counter() - begin_s < seconds:
        piece()
        pieces += 1
    took_s = time.perf_counter() - begin_s
    return took_s / pieces, max(0.0, used() - used_s) / took_s


def threads_of(pid):
    return {int(folder.name) for folder in Path(f"/proc/{pid}/task").iterdir()}


def descendants(pid):
    """What a process has started, at whatever remove."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in threads_of(each):
                found += map(int, Path(f"/proc/{each}/task/{thread}/children").read_text().split())
    return found[1:]


def cpu_s(clocks):
    """CPU time of clocks that are still there."""
    total_s = 0.0
    for clock in clocks:
        with contextlib.suppress(OSError):
            total_s += time.clock_gettime(clock)
    return total_s


def cpu_beside(of_work, started):
    """Of this process all but some of its threads, and of others."""
    return time.process_time() - cpu_s(of_work) + cpu_s(started)


def clock_of(pid, *, thread=False):
    return (~pid << 3) | (6 if thread else 2)  # as clock_getcpuclockid() names it


def open_tool(driver, rate_hz):
    sys.path.insert(0, str(driver.parent))
    module = importlib.import_module(driver.stem)
    return module.Tool(rate_hz)


class Worker:
    """A fork that does the work with the tool open in it, in segments on command. We can stop the
    tool alone: its threads, which are all that the work did not bring, and what it started.

    Bare and with the tool it is one process: two are not alike, whatever runs in them.
    """

    def __init__(self, make, arguments):
        commands, self._commands = os.pipe()
        self._results, results = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._commands)
            with os.fdopen(results, "w", buffering=1) as told:
                told.write(json.dumps(self._serve(make, arguments, commands, told)) + "\n")
            os._exit(0)
        for descriptor in (commands, results):
            os.close(descriptor)
        self._lines = os.fdopen(self._results)
        self._of_work = set(self._next()["threads"])

    @staticmethod
    def _serve(make, arguments, commands, told):
        seconds = arguments.seconds
        try:
            piece = make()
            segment(piece, SETTLED_S / 2)
            of_work = threads_of("self")
            clocks = [clock_of(tid, thread=True) for tid in of_work]
            if arguments.driver is not None:
                tool = open_tool(arguments.driver, arguments.rate)
                tool.begin("work")
            segment(piece, SETTLED_S)
            told.write(json.dumps({"threads": sorted(of_work)}) + "\n")
            while os.read(commands, 1):
                segment(piece, seconds / 4)  # it may catch up
                started = [clock_of(pid) for pid in descendants(os.getpid())]
                used = partial(cpu_beside, clocks, started)
                told.write(json.dumps({"found": segment(piece, seconds, used)}) + "\n")
        except (Exception, SystemExit) as error:
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        return {}

    def _next(self):
        if not select.select([self._results], [], [], PATIENCE_S)[0]:
            raise RuntimeError(f"the work stood still for {PATIENCE_S:.0f} s")
        facts = json.loads(self._lines.readline() or '{"failed": "it died"}')
        if "failed" in facts:
            raise RuntimeError(facts["failed"])
        return facts

    def segment(self):
        os.write(self._commands, b".")
        return self._next()["found"]

    def bare(self):
        stopped = []
        try:
            # Until there is none that another one has started meanwhile.
            while new := threads_of(self.pid) - self._of_work - set(stopped):
                for tid in new:
                    if stop_asleep(self.pid, tid):
                        stopped.append(tid)
            started = descendants(self.pid)
            for pid in started:
                os.kill(pid, signal.SIGSTOP)
            found = self.segment()
            for pid in started:
                os.kill(pid, signal.SIGCONT)
            return found
        finally:
            for tid in stopped:
                ptrace(PTRACE_DETACH, tid)

    def end(self):
        for pid in (*descendants(self.pid), self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while os.waitpid(-1, WAIT_ALL)[0] != self.pid:
            pass  # a thread that ended while it was traced


def ptrace(request, tid):
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_long(request), ctypes.c_long(tid), ctypes.c_void_p(), ctypes.c_void_p())
    if libc.ptrace(*arguments) != 0 and ctypes.get_errno() != errno.ESRCH:
        raise OSError(ctypes.get_errno(), f"no ptrace: {os.strerror(ctypes.get_errno())}")


def stop_asleep(pid, tid):
    """Stops a thread of a child where it sleeps in the kernel: elsewhere it may hold a lock that
    the work needs, as the interpreter's. False: it has ended."""
    ptrace(PTRACE_SEIZE, tid)
    folder, deadline_s = Path(f"/proc/{pid}/task/{tid}"), time.monotonic() + PATIENCE_S / 4
    while time.monotonic() < deadline_s:
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "SZ":
                time.sleep(1e-4)
                continue
            ptrace(PTRACE_INTERRUPT, tid)
            _, status = os.waitpid(tid, WAIT_ALL)  # of one that has ended, too
            if not os.WIFSTOPPED(status):
                return False
            if not (folder / "syscall").read_text().startswith("-1"):
                return True
        except (FileNotFoundError, ChildProcessError):
            return False
        ptrace(PTRACE_CONT, tid)
    raise RuntimeError("a thread of the tool never sleeps")


def in_code(make, arguments):
    worker = Worker(make, arguments)
    try:
        for number in range(arguments.pairs):
            if number % 2:
                each_s, share = worker.segment()
                yield worker.bare()[0], each_s, share
            else:
                before_s, _ = worker.bare()
                yield (before_s, *worker.segment())
    finally:
        worker.end()


def wrapped(make, arguments):
    wrapper, piece = os.getppid(), make()
    clocks = [clock_of(wrapper)]

    def bare():
        os.kill(wrapper, signal.SIGSTOP)
        try:
            segment(piece, arguments.seconds / 4)
            return segment(piece, arguments.seconds)[0]
        finally:
            os.kill(wrapper, signal.SIGCONT)

    def with_it():
        segment(piece, arguments.seconds / 4)
        return segment(piece, arguments.seconds, lambda: cpu_s(clocks))

    segment(piece, SETTLED_S)
    for number in range(arguments.pairs):
        if number % 2:
            each_s, share = with_it()
            yield bare(), each_s, share
        else:
            before_s = bare()
            yield (before_s, *with_it())


def windows(arguments):
    """What begin and end of a window take together, and a phase where the tool has such."""
    tool = open_tool(arguments.driver, arguments.rate)
    found = {"window_s": [], "phase_s": []}
    end_s = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end_s and len(found["window_s"]) < 500:
        name = f"window{len(found['window_s'])}"
        begin_s = time.perf_counter()
        tool.begin(name)
        tool.end(name)
        found["window_s"].append(time.perf_counter() - begin_s)
    run = getattr(tool, "_run", None)
    if hasattr(run, "phase"):
        for _ in range(500):
            begin_s = time.perf_counter()
            with run.phase("train"):
                pass
            found["phase_s"].append(time.perf_counter() - begin_s)
    tool.close()
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--driver", type=Path)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--wrapped", action="store_true")
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.05, help="a segment, or all windows")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: what it takes itself")
    parser.add_argument(
        "--packages", action="append", default=[], help="further places to import from"
    )
    arguments = parser.parse_args()
    # Behind the environment's own: a tool finds the versions that it was installed with.
    sys.path += arguments.packages
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        if arguments.windows:
            facts = windows(arguments)
        else:
            pairs = wrapped if arguments.wrapped else in_code
            facts = {"pairs": list(pairs(lambda: training(arguments.threads), arguments))}
    except (Exception, SystemExit) as error:
        facts = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    told.write(json.dumps(facts) + "\n")
    told.close()
    os._exit(0)  # some tools' threads would keep it


if __name__ == "__main__":
    main()
