"""Fixed pieces of work, with a tool and without it in turn: what a piece takes, in the tool's
environment. Standard library only; a training adds the folders that hold torch and examples/.

    work.py {loop,training} --driver use_X.py [--rate HZ]    the tool is opened in this program
    work.py {loop,training} --wrapped                        its wrapper is our parent
    work.py {loop,training}                                  no tool: what differs all the same

In code two forks of one process take turns, with the tool and without, the other one stopped
(SIGSTOP). A wrapper is stopped for the segments without it. Prints one JSON line:
{"pairs": [[seconds a piece without, with, CPU of the tool's threads as a share of a core], ...]}
or {"failed": why}; with --windows {"window_s": [...], "phase_s": [...]}.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

SETTLED_S = 2.5  # by then cadences are learnt and what is done once is done


def a_loop():
    def piece():
        total = 0
        for number in range(100_000):
            total = (total * 31 + number) % 1_000_003
        return total

    return piece


def a_training():
    """An epoch of examples/train.py: a small network on handwritten digits."""
    import torch
    import train

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = train.load("digits")["train"]
    model = train.make_model("mlp_small", features=data[0].shape[1], classes=10)
    optimizer = torch.optim.AdamW(model.parameters())
    return lambda: train.train_epoch(model, optimizer, *data)


def segment(piece, seconds):
    """Whole pieces for so long: (wall seconds each, CPU of other threads per second)."""
    begin_s, mine_s, all_s = time.perf_counter(), time.thread_time(), time.process_time()
    pieces = 0
    while time.perf_counter() - begin_s < seconds:
        piece()
        pieces += 1
    took_s = time.perf_counter() - begin_s
    others_s = time.process_time() - all_s - (time.thread_time() - mine_s)
    return took_s / pieces, others_s / took_s


def open_tool(driver, rate_hz):
    sys.path.insert(0, str(driver.parent))
    module = importlib.import_module(driver.stem)
    return module.Tool(rate_hz)


def stay():
    """Keeps this thread on one CPU, the same for all: in a virtual machine they are not alike."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Worker:
    """A fork that does segments on command, and stands still (SIGSTOP) in between: it, its threads
    and what they started. With a driver it opens the tool first, and is given time to settle."""

    def __init__(self, piece, seconds, driver=None, rate_hz=None):
        commands, self._commands = os.pipe()
        self._results, results = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            os.close(self._commands)
            with os.fdopen(results, "w", buffering=1) as told:
                told.write(json.dumps(self._serve(piece, seconds, driver, rate_hz, commands, told)))
            os._exit(0)
        for descriptor in (commands, results):
            os.close(descriptor)
        self._lines = os.fdopen(self._results)
        self._next()

    @staticmethod
    def _serve(piece, seconds, driver, rate_hz, commands, told):
        try:
            tool = open_tool(driver, rate_hz) if driver is not None else None
            if tool is not None:
                tool.begin("work")
            stay()
            segment(piece, SETTLED_S)
            told.write("{}\n")
            while os.read(commands, 1):
                segment(piece, seconds / 4)  # it may catch up
                told.write(json.dumps({"found": segment(piece, seconds)}) + "\n")
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


def in_code(piece, arguments):
    bare = Worker(piece, arguments.seconds)
    with_it = Worker(piece, arguments.seconds, arguments.driver, arguments.rate)
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


def wrapped(piece, arguments):
    wrapper = os.getppid()
    clock = (~wrapper << 3) | 2  # its CPU time, as clock_getcpuclockid() names it

    def bare():
        os.kill(wrapper, signal.SIGSTOP)
        try:
            segment(piece, arguments.seconds / 10)
            return segment(piece, arguments.seconds)[0]
        finally:
            os.kill(wrapper, signal.SIGCONT)

    def with_it():
        segment(piece, arguments.seconds / 10)
        begin_s, used_s = time.perf_counter(), time.clock_gettime(clock)
        each_s, _ = segment(piece, arguments.seconds)
        used_s = time.clock_gettime(clock) - used_s
        return each_s, used_s / (time.perf_counter() - begin_s)

    stay()
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
    parser.add_argument("kind", choices=("loop", "training"))
    parser.add_argument("--driver", type=Path)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--wrapped", action="store_true")
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0)
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
            piece = {"loop": a_loop, "training": a_training}[arguments.kind]()
            segment(piece, arguments.seconds / 2)
            pairs = wrapped if arguments.wrapped else in_code
            facts = {"pairs": list(pairs(piece, arguments))}
    except (Exception, SystemExit) as error:
        facts = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    told.write(json.dumps(facts) + "\n")
    told.close()
    os._exit(0)  # some tools' threads would keep it


if __name__ == "__main__":
    main()
