"""A training with a tool and without it in turn: what an epoch takes, in the tool's environment.
Standard library only, besides what lies in the folders that --packages names: torch and examples/.

    work.py --driver use_X.py [--rate HZ]    the tool is opened in this program
    work.py --wrapped                        its wrapper is our parent
    work.py                                  no tool: what differs all the same

In code two forks of one process take turns, with the tool and without, the other one stopped
(SIGSTOP). A wrapper is stopped for the segments without it. The work runs as a user's would: on
any CPU, with as many threads as torch takes by itself (--threads N: others). Prints a JSON line:
{"pairs": [[seconds a piece without, with, CPU of the tool as a share of a core], ...]}
or {"failed": why}; with --windows {"window_s": [...], "phase_s": [...]}.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

SETTLED_S = 2.5  # by then cadences are learnt and what is done once is done


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
    """Whole pieces for so long: (wall seconds each, CPU of the tool per second)."""
    begin_s, used_s = time.perf_counter(), used()
    pieces = 0
    while time.perf_counter() - begin_s < seconds:
        piece()
        pieces += 1
    took_s = time.perf_counter() - begin_s
    return took_s / pieces, (used() - used_s) / took_s


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


def clock_of(pid, *, thread=False):
    return (~pid << 3) | (6 if thread else 2)  # as clock_getcpuclockid() names it


def open_tool(driver, rate_hz):
    sys.path.insert(0, str(driver.parent))
    module = importlib.import_module(driver.stem)
    return module.Tool(rate_hz)


class Worker:
    """A fork that does segments on command, and stands still (SIGSTOP) in between: it, its threads
    and what they started. With a driver it opens the tool first, and is given time to settle. The
    work is made in the fork: OpenMP's threads do not survive one."""

    def __init__(self, make, seconds, driver=None, rate_hz=None):
        commands, self._commands = os.pipe()
        self._results, results = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            os.close(self._commands)
            with os.fdopen(results, "w", buffering=1) as told:
                told.write(json.dumps(self._serve(make, seconds, driver, rate_hz, commands, told)))
            os._exit(0)
        for descriptor in (commands, results):
            os.close(descriptor)
        self._lines = os.fdopen(self._results)
        self._next()

    @staticmethod
    def _serve(make, seconds, driver, rate_hz, commands, told):
        clocks = []
        try:
            if driver is not None:
                before = threads_of("self")
                tool = open_tool(driver, rate_hz)
                tool.begin("work")
                # Those that came with it, before the work has any of its own.
                clocks = [clock_of(tid, thread=True) for tid in threads_of("self") - before]
                clocks += [clock_of(pid) for pid in descendants(os.getpid())]
            piece = make()
            segment(piece, SETTLED_S if driver is not None else SETTLED_S / 2)
            told.write("{}\n")
            while os.read(commands, 1):
                segment(piece, seconds / 4)  # it may catch up
                found = segment(piece, seconds, lambda: cpu_s(clocks))
                told.write(json.dumps({"found": found}) + "\n")
        except (Exception, SystemExit) as error:
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        return {}

    def _next(self):
        facts = json.loads(self._lines.readline() or '{"failed": "it died"}')
        if "failed" in facts:
            raise RuntimeError(facts["failed"])
        os.killpg(self.pid, signal.SIGSTOP)
        return facts.get("found")

    def segment(self):
        os.killpg(self.pid, signal.SIGCONT)
        os.write(self._commands, b".")
        return self._next()

    def end(self):
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def in_code(make, arguments):
    bare = Worker(make, arguments.seconds)
    with_it = Worker(make, arguments.seconds, arguments.driver, arguments.rate)
    try:
        for number in range(arguments.pairs):
            if number % 2:
                each_s, share = with_it.segment()
                yield bare.segment()[0], each_s, share
            else:
                before_s, _ = bare.segment()
                yield (before_s, *with_it.segment())
    finally:
        for worker in (bare, with_it):
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
    parser.add_argument("--seconds", type=float, default=0.3, help="a segment, or all windows")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: what it takes itself")
    parser.add_argument(
        "--packages", action="append", default=[], help="further places to import from"
    )
    parser.add_argument("--import", dest="modules", action="append", default=[])
    arguments = parser.parse_args()
    # Behind the environment's own: a tool finds the versions that it was installed with.
    sys.path += arguments.packages
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        if arguments.windows:
            facts = windows(arguments)
        else:
            for name in arguments.modules:
                importlib.import_module(name)
            pairs = wrapped if arguments.wrapped else in_code
            facts = {"pairs": list(pairs(lambda: training(arguments.threads), arguments))}
    except (Exception, SystemExit) as error:
        facts = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    told.write(json.dumps(facts) + "\n")
    told.close()
    os._exit(0)  # some tools' threads would keep it


if __name__ == "__main__":
    main()
