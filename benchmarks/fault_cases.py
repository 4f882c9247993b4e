"""The faults of `benchmarks.faults`, and the ways in which they are injected."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

ATTACKERS = (23471, 23472, 23473, 23474)
HONEST = 23479
STATUS = 7  # of the command that is measured
REFUSED = 125  # before it starts: a sensor that was asked for by name cannot be read
RUN_S = 2.0
SLOW_S = 120.0
SETTLE_S = 1.0  # until an attack is in full swing


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """What is built once: the command, the library of bad disks, the writer of counters."""

    child: Path
    preload: Path
    writer: Path
    python: str  # that any user may run
    env: dict[str, str]


@dataclass
class Case:
    """A command that is about to be measured; a fault changes what it likes of that.

    `events` are done so many seconds behind the start of the profiler. `until_ns`: from then on
    nothing can be recorded.
    """

    tools: Tools
    folder: Path
    stack: ExitStack
    tree: Any
    daemon: Any
    env: dict[str, str]
    command: list[str]
    uid: int = 0
    options: list[str] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=list)  # instead of `pepr-profile run`
    before_exec: list[Callable[[], None]] = field(default_factory=list)
    popen: dict[str, Any] = field(default_factory=dict)
    events: list[tuple[float, Action]] = field(default_factory=list)
    until_ns: int | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def work(self) -> Path:
        """The command's working directory."""
        return self.folder / "work"

    def marks(self) -> tuple[int, int, int]:
        """PID of the child, its first and its last instant; 0 where there is none yet."""
        pid, begin_ns, end_ns = struct.unpack("3q", (self.folder / "marks").read_bytes())
        return pid, begin_ns, end_ns

    def child_pid(self) -> int:
        """Waits for the child to run."""
        until_s = time.monotonic() + SLOW_S
        while not self.marks()[0] and time.monotonic() < until_s:
            time.sleep(0.005)
        return self.marks()[0]

    def runs(self) -> list[Path]:
        """Run directories, wherever they are."""
        return sorted(path.parent for path in self.folder.rglob("run.json") if path.is_file())


Action = Callable[[Case], object]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and what has to come of it.

    `status` is the command's. With `recorded` False nothing needs to be recorded. With `served`
    honest clients come meanwhile, with `scraped` the metrics are asked for too.
    """

    name: str
    inject: Sequence[Action] = ()
    status: int = STATUS
    recorded: bool = True
    daemon: bool = False
    served: bool = False
    scraped: bool = False


# --- ways to inject a fault -----------------------------------------------------------------------


def limits(**values: int) -> Action:
    """Resource limits of the profiler and all that it starts: NOFILE=8."""

    def limit() -> None:
        for name, value in values.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    return lambda case: case.before_exec.append(limit)


def without_env(*names: str) -> Action:
    return lambda case: [case.env.pop(name, None) for name in names]


def options(*words: str) -> Action:
    """Options of `pepr-profile run`; {folder} and {store} are filled in."""
    return lambda case: case.options.extend(_filled(case, word) for word in words)


def under(*words: str) -> Action:
    """A program that starts the profiler, such as unshare."""
    return lambda case: case.prefix.extend(words)


def shell(script: str) -> Action:
    """A shell that does this and becomes the profiler."""
    return lambda case: case.prefix.extend(
        ["sh", "-c", f'{_filled(case, script)}; exec "$@"', "sh"]
    )


def child(script: str) -> Action:
    """A shell that does this and becomes the command."""

    def change(case: Case) -> None:
        case.command[:0] = ["sh", "-c", f'{_filled(case, script)}; exec "$@"', "sh"]

    return change


def first(script: str) -> Action:
    """Done before anything starts."""
    return lambda case: subprocess.run(["sh", "-ec", _filled(case, script)], check=True)


def at(when_s: float, action: Action) -> Action:
    """Done so many seconds behind the profiler's start."""
    return lambda case: case.events.append((when_s, action))


def at_script(when_s: float, script: str) -> Action:
    """The same with a shell's script, which may fail."""
    return at(when_s, lambda case: subprocess.run(["sh", "-c", _filled(case, script)], check=False))


def as_user(case: Case) -> None:
    """The command is that of a user without rights, who may read the counters."""
    case.uid = HONEST
    if case.daemon is None:
        for key in case.tree.zones:
            (case.tree.path(key) / "energy_uj").chmod(0o444)


def preloaded(name: str, value: float, from_s: float = 0.0, until_s: float = 1e9) -> Action:
    """A fault of `faults_preload.c`."""
    return lambda case: case.env.update(
        LD_PRELOAD=str(case.tools.preload), FAULT=f"{name} {value} {from_s} {until_s}"
    )


def disk(mount_options: str) -> Action:
    """The store is on a disk of its own."""

    def mount(case: Case) -> None:
        words = ["mount", "-t", "tmpfs", "-o", f"mode=777,{mount_options}", "tmpfs"]
        subprocess.run([*words, str(case.store)], check=True)
        case.stack.callback(subprocess.run, ["umount", "-l", str(case.store)], check=False)

    return mount


def fill(case: Case) -> None:
    """Takes all the space of the store's disk."""
    with suppress(OSError), (case.store / "filling").open("ab", buffering=0) as filling:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while filling.write(bytes(size)):
                    pass


def take_inodes(case: Case) -> None:
    with suppress(OSError):
        for number in range(1 << 20):
            (case.store / f"inode-{number}").touch()


def free(case: Case) -> None:
    (case.store / "filling").unlink(missing_ok=True)


def send(signo: int, *, to: str) -> Action:
    """A signal to the profiler, its child or the daemon."""

    def kill(case: Case) -> None:
        if to == "child":
            pid = case.child_pid()
        elif to == "daemon":
            pid = case.daemon.process.pid
        else:
            assert case.process is not None
            pid = case.process.pid
        with suppress(ProcessLookupError):
            os.kill(pid, signo)

    return kill


def stop(case: Case) -> None:
    """From now on nothing can be recorded."""
    case.until_ns = time.monotonic_ns()


def ended_by(signo: int, when_s: float, *, of: str) -> Action:
    """The profiler or its child is ended."""

    def inject(case: Case) -> None:
        case.events += [(when_s, send(signo, to=of)), (when_s, stop)]

    return inject


def after_start(when_s: float, signo: int) -> Action:
    """A signal to the profiler so many seconds behind the start of its child."""

    def kill(case: Case) -> None:
        case.child_pid()
        time.sleep(when_s)
        send(signo, to="profiler")(case)
        stop(case)

    return at(0, kill)


def stopped(from_s: float, seconds: float, *names: str) -> Action:
    """Processes are stopped for a while."""

    def inject(case: Case) -> None:
        for name in names:
            case.events.append((from_s, send(signal.SIGSTOP, to=name)))
            case.events.append((from_s + seconds, send(signal.SIGCONT, to=name)))

    return inject


def daemon_killed(when_s: float, back_after_s: float) -> Action:
    """The daemon is killed, and another one takes its place."""

    def again(case: Case) -> None:
        import cli
        import daemons

        case.daemon.process.wait()
        process = daemons.restart(case.daemon, *case.daemon.options)
        case.stack.enter_context(cli.ended(process))

    def inject(case: Case) -> None:
        case.events.append((when_s, send(signal.SIGKILL, to="daemon")))
        case.events.append((when_s + back_after_s, again))

    return inject


def attack(name: str, *, port: bool = False) -> Action:
    """One of `tests/attacks.py`, by four users at once."""
    from daemons import become

    def inject(case: Case) -> None:
        where = metrics_port(case) if port else str(case.daemon.socket)
        for uid in ATTACKERS:
            words = [case.tools.python, str(TESTS / "attacks.py"), name, where, str(SLOW_S)]
            attacker = subprocess.Popen(
                words, env=case.tools.env, cwd="/", preexec_fn=become(uid),  # noqa: PLW1509
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            process = case.stack.enter_context(attacker)
            case.stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(SETTLE_S)

    return inject


BLOCK = """
import asyncio, os, resource, signal, struct, sys, threading, time, warnings
warnings.simplefilter("ignore")
from pepr_profiler import profile
def mark(number):
    with open({folder!r} + "/marks", "r+b") as marks:
        marks.seek(8 * number)
        marks.write(struct.pack("q", time.monotonic_ns()))
def block(): return profile("block", sensors=[{spec!r}])
def spend(seconds={run_s}): time.sleep(seconds)
"""


def program(body: str) -> Action:
    """A Python program that measures a block of itself, instead of a command that is wrapped."""

    def inject(case: Case) -> None:
        begin = BLOCK.format(folder=str(case.folder), spec=case.tree.spec, run_s=RUN_S)
        case.program += ["-c", f"{begin}{body}\nsys.exit({STATUS})\n"]

    return inject


def _filled(case: Case, text: str) -> str:
    words = {"folder": case.folder, "store": case.store, "work": case.work, "spec": case.tree.spec}
    for word, value in words.items():
        text = text.replace(f"{{{word}}}", str(value))
    return text


def metrics_port(case: Case) -> str:
    return str(case.daemon.status()["metrics"]).rpartition(":")[2].partition("/")[0]


# --- the faults -----------------------------------------------------------------------------------

_MEGA = 1 << 20
_READ_ONLY = """
for place in / /dev/shm /run; do mount -o remount,bind,ro "$place" 2>/dev/null; done; exec "$@"
"""
_IN_ANOTHER_TIME = ("unshare", "--time", "--fork", "--kill-child", "--monotonic")
_PIDS = ("unshare", "-p", "-f", "--kill-child")
_ON_FIRST_RUN = "cd {store}/runs/*; "


class Dice:
    """Random instants, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def instants(self, count: int, first_s: float = 0.1, last_s: float = RUN_S) -> list[float]:
        return sorted(round(self._random.uniform(first_s, last_s), 2) for _ in range(count))


def faults(seed: int) -> list[Fault]:
    """All faults; those at random instants are at the same ones for the same seed."""
    dice = Dice(seed)
    return [
        Fault("nothing"),
        Fault("nothing, through the daemon", daemon=True),
        *_limits(),
        *_surroundings(),
        *_stores(dice),
        *_disks(dice),
        *_signals(dice),
        *_clocks(),
        *_commands(),
        *_blocks(dice),
        *_daemons(dice),
        *_attacks(),
    ]


def _limits() -> list[Fault]:
    return [
        *(
            Fault(f"limit: {count} descriptors", [limits(NOFILE=count)], recorded=count >= 32)
            for count in (5, 6, 8, 10, 12, 16, 20, 32)
        ),
        *(
            Fault(f"limit: {size} MB of memory", [limits(AS=size * _MEGA)], recorded=size >= 100)
            for size in (40, 60, 100, 150, 200, 250)
        ),
        *(
            Fault(f"limit: files of {size} bytes", [limits(FSIZE=size)], recorded=False)
            for size in (0, 16 << 10)
        ),
        *(
            Fault(f"limit: {count} threads", [as_user, limits(NPROC=count)], recorded=count >= 32)
            for count in (1, 2, 4, 32)
        ),
        Fault("limit: 1 s of CPU time", [limits(CPU=1)]),
        Fault("limit: a stack of 512 KiB", [limits(STACK=_MEGA // 2)]),
        Fault("limit: no locked memory, no signals", [limits(MEMLOCK=0, SIGPENDING=0)]),
    ]


def _surroundings() -> list[Fault]:
    return [
        Fault("working directory: no UTF-8", [_odd_folder]),
        Fault(
            "working directory: removed",
            [under("sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh")],
        ),
        Fault("no HOME, no passwd entry", [as_user, without_env("HOME", "PEPR_STORE")]),
        Fault("umask 777", [as_user, shell("umask 777")], recorded=False),
        Fault("stdin, stdout, stderr closed", [shell("exec <&- >&- 2>&-")]),
        Fault("stderr: nobody reads", [_deaf]),
        Fault("SIGCHLD ignored by the parent", [_ignoring(signal.SIGCHLD)]),
        Fault("all signals ignored by the parent", [_ignoring(*range(1, 32))]),
        Fault(
            "an outer run that says nothing",
            [first("mkdir {folder}/outer; echo '{}' > {folder}/outer/run.json"), _outer],
        ),
        Fault(
            "an outer run whose run.json is a FIFO",
            [first("mkdir {folder}/outer; mkfifo {folder}/outer/run.json"), _outer],
        ),
        Fault(
            "a foreign numpy that fails",
            [first("mkdir {work}/numpy; echo 1/0 > {work}/numpy/__init__.py"), _foreign],
        ),
        Fault(
            "a foreign click that fails",
            [first("echo 1/0 > {work}/click.py"), _foreign],
            recorded=False,
        ),
        Fault("a PID namespace, no /proc of its own", [under(*_PIDS)]),
        Fault(
            "everything is read-only",
            [under("unshare", "-m", "sh", "-c", _READ_ONLY, "sh")],
            recorded=False,
        ),
    ]


def _stores(dice: Dice) -> list[Fault]:
    return [
        Fault("store: a name that is no UTF-8", [_odd_store]),
        Fault("store: a file is in its place", [first("rmdir {store}; touch {store}")]),
        Fault("store: a FIFO is in its place", [first("rmdir {store}; mkfifo {store}")]),
        Fault("store: a link to nowhere", [first("rmdir {store}; ln -s {folder}/no {store}")]),
        Fault("store: its index is a FIFO", [first("mkfifo {store}/index")]),
        Fault(
            "store: beside it a run of FIFOs",
            [first("mkdir -p {store}/runs/evil; mkfifo {store}/runs/evil/nvml.arrows")],
        ),
        *(
            Fault(
                f"store: removed at {when_s} s",
                [at_script(when_s, "rm -rf {store}")],
                recorded=False,
            )
            for when_s in dice.instants(2)
        ),
        *(
            Fault(f"store: renamed at {when_s} s", [at_script(when_s, "mv {store} {folder}/moved")])
            for when_s in dice.instants(3)
        ),
        Fault(
            "store: closed to us at 1 s",
            [as_user, at_script(1, "chmod 0 {store} {store}/runs")],
        ),
        Fault(
            "store: its file system is unmounted at 1 s",
            [disk("size=9m"), at_script(1, "umount -l {store}")],
            recorded=False,
        ),
        Fault(
            "run: its run.json becomes a FIFO at 1 s",
            [at_script(1, f"{_ON_FIRST_RUN}rm run.json; mkfifo run.json")],
        ),
        Fault(
            "run: its lane becomes a directory at 1 s",
            [at_script(1, f"{_ON_FIRST_RUN}rm powercap*; mkdir powercap.arrows")],
            recorded=False,
        ),
    ]


def _disks(dice: Dice) -> list[Fault]:
    return [
        Fault("disk: full before the start", [disk("size=64k"), fill]),
        Fault("disk: no inodes before the start", [disk("size=9m,nr_inodes=6"), take_inodes]),
        *(
            Fault(f"disk: full at {when_s} s", [disk("size=4m"), at(when_s, fill)])
            for when_s in dice.instants(6)
        ),
        Fault(
            "disk: full at 0.5 s, free at 1.5 s", [disk("size=4m"), at(0.5, fill), at(1.5, free)]
        ),
        *(
            Fault(
                f"disk: no inodes at {when_s} s",
                [disk("size=9m,nr_inodes=60"), at(when_s, take_inodes)],
            )
            for when_s in dice.instants(3)
        ),
        Fault("disk: each write takes 50 ms", [preloaded("slow", 0.05)]),
        Fault("disk: each write takes 0.5 s, from 1 s on", [preloaded("slow", 0.5, 1)]),
        Fault("disk: writes write half", [preloaded("short", 0)]),
        Fault("disk: I/O errors from 0.5 to 1.5 s", [preloaded("error", errno.EIO, 0.5, 1.5)]),
        Fault("disk: no quota from 0.5 to 1.5 s", [preloaded("error", errno.EDQUOT, 0.5, 1.5)]),
        Fault(
            "disk: read-only from 1.5 s on", [preloaded("error", errno.EROFS, 1.5), at(1.5, stop)]
        ),
    ]


def _signals(dice: Dice) -> list[Fault]:
    passed_on = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1)
    return [
        *(
            Fault(
                f"SIGKILL of the profiler at {when_s} s",
                [ended_by(signal.SIGKILL, when_s, of="profiler")],
                status=-signal.SIGKILL,
            )
            for when_s in dice.instants(6)
        ),
        *(
            Fault(
                f"SIGKILL of the child at {when_s} s",
                [ended_by(signal.SIGKILL, when_s, of="child")],
                status=128 + signal.SIGKILL,
            )
            for when_s in dice.instants(4, first_s=0.4)
        ),
        Fault(
            "SIGSEGV of the child at 1 s",
            [ended_by(signal.SIGSEGV, 1, of="child")],
            status=128 + signal.SIGSEGV,
        ),
        *(
            Fault(
                f"{signo.name} to the profiler at {when_s} s",
                [after_start(when_s, signo)],
                status=-signo if signo == signal.SIGINT else 128 + signo,
            )
            for signo, when_s in zip(passed_on, dice.instants(5), strict=True)
        ),
        Fault(
            "twenty SIGWINCH and SIGURG",
            [
                at(0.1 * (number + 1), send(signo, to="profiler"))
                for number, signo in enumerate((signal.SIGWINCH, signal.SIGURG) * 10)
            ],
        ),
        Fault("SIGSTOP of the profiler, 1 s", [stopped(0.5, 1, "profiler")]),
        Fault("SIGSTOP of the child, 1 s", [stopped(0.5, 1, "child")]),
        Fault("SIGSTOP of both, 1 s", [stopped(0.5, 1, "child", "profiler")]),
        Fault("SIGSTOP of the profiler at the end, 3 s", [stopped(1, 3, "profiler")]),
    ]


def _clocks() -> list[Fault]:
    return [
        Fault("clock: a day forward at 1 s", [preloaded("step", 86400, 1)]),
        Fault("clock: a day back at 1 s", [preloaded("step", -86400, 1)]),
        Fault("clock: a day back at the start", [preloaded("step", -86400)]),
        Fault("clock: before 1970", [preloaded("step", -1_900_000_000)]),
        Fault("clock: a time namespace, 11 days ahead", [under(*_IN_ANOTHER_TIME, "1000000")]),
        Fault("clock: a time namespace, 1 s ahead", [under(*_IN_ANOTHER_TIME, "1")]),
        Fault(
            "clock: the daemon lives in another time",
            [under(*_IN_ANOTHER_TIME, "1000000"), _setpriv],
            status=REFUSED,
            daemon=True,
            recorded=False,
        ),
    ]


def _commands() -> list[Fault]:
    return [
        Fault(
            "command: 2,000 children that come and go",
            [child("i=0; while [ $i -lt 2000 ]; do /bin/true; i=$((i+1)); done")],
        ),
        Fault("command: closes all descriptors", [child("exec 0<&- 1>&- 2>&- 3<&- 4<&- 5<&-")]),
        Fault("command: leaves a process behind", [child("sleep 4 & true")]),
        Fault("command: signals to the profiler", [child("kill -TERM $PPID; kill -HUP $PPID")]),
        Fault(
            "command: 300 MB without a match",
            [
                options("--metric", "acc=accuracy: ([0-9.]+)"),
                child("yes lossless | head -c 300000000"),
            ],
        ),
        Fault(
            "command: a match in each of 2,000,000 lines",
            [options("--metric", "acc=acc: ([0-9.]+)"), child("yes acc: 0.5 | head -2000000")],
        ),
        Fault(
            "command: a pattern that backtracks",
            [
                options("--metric", "x=(?:a+)+b ([0-9]+)"),
                child("head -c 4000 /dev/zero | tr '\\0' a; echo"),
            ],
        ),
    ]


_BLOCKS = {
    "nothing": "spend()",
    "all descriptors closed": "spend(1); os.closerange(3, 4096); spend(1)",
    "descriptors closed and taken over": """spend(1); os.closerange(3, 4096)
    files = [open(f"mine-{number}", "w") for number in range(600)]
    run.log(x=1); spend(1)
    assert not any(os.fstat(file.fileno()).st_size for file in files)""",
    "no descriptor for 1 s": """hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spend(0.5); resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard[1]))
    run.log(x=1); spend(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, hard); run.log(x=2); spend(0.5)""",
    "20 forks that close descriptors": """spend(0.5)
    for _ in range(20):
        if os.fork() == 0: os.closerange(3, 4096); os._exit(0)
        os.wait()
    spend(1.5)""",
    "a phase that is left elsewhere": """phase = run.phase("moved")
    thread = threading.Thread(target=phase.__enter__); thread.start(); thread.join()
    spend(); phase.__exit__(None, None, None); phase.__exit__(None, None, None)""",
    "Ctrl-C": """
    try: threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start(); spend(9)
    except KeyboardInterrupt: pass
    spend(1)""",
}
"""What happens within a block that is left as usual."""

_PROGRAMS = {
    "in a generator that is not closed": """def g():
    with block(): mark(1); yield 1
kept = g(); next(kept); spend(); mark(2)""",
    "in a thread that never ends": """def work():
    with block(): mark(1); time.sleep(60)
threading.Thread(target=work, daemon=True).start(); spend(3); mark(2)""",
    "in asyncio in a thread": """async def work():
    with block(): mark(1); await asyncio.sleep(60)
threading.Thread(target=asyncio.run, args=(work(),), daemon=True).start(); spend(3); mark(2)""",
    "not left": "kept = block(); kept.__enter__(); mark(1); spend(); mark(2)",
    "20 before it, 64 descriptors": """kept = []
for _ in range(20):
    with block() as run: pass
    kept.append(run)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with block() as run: mark(1); spend(); mark(2)""",
}


def _within(body: str) -> Action:
    return program(f"with block() as run:\n    mark(1)\n    {body}\n    mark(2)")


def _blocks(dice: Dice) -> list[Fault]:
    return [
        *(Fault(f"block: {name}", [_within(body)]) for name, body in _BLOCKS.items()),
        *(Fault(f"block: {name}", [program(body)]) for name, body in _PROGRAMS.items()),
        *(
            Fault(
                f"block: SIGKILL at {when_s} s",
                [_within("spend()"), ended_by(signal.SIGKILL, when_s, of="profiler")],
                status=-signal.SIGKILL,
            )
            for when_s in dice.instants(3, first_s=0.3)
        ),
        Fault("block: the disk is full at 1 s", [disk("size=4m"), _within("spend()"), at(1, fill)]),
    ]


def _daemons(dice: Dice) -> list[Fault]:
    def fault(name: str, *inject: Action) -> Fault:
        return Fault(f"daemon: {name}", inject, daemon=True)

    return [
        *(
            fault(f"killed at {when_s} s, back 0.3 s later", daemon_killed(when_s, 0.3))
            for when_s in dice.instants(4, first_s=0.0, last_s=RUN_S - 0.8)
        ),
        fault("killed at 1 s, not back", at(1, send(signal.SIGKILL, to="daemon")), at(1, stop)),
        fault("stopped from 0.5 s to 1.5 s", stopped(0.5, 1, "daemon")),
        fault(
            "stopped before the start, for 1 s",
            send(signal.SIGSTOP, to="daemon"),
            at(1, send(signal.SIGCONT, to="daemon")),
        ),
        Fault("daemon: hangs", [_hang], status=REFUSED, daemon=True, recorded=False),
        fault("its client in a PID namespace", under(*_PIDS), _setpriv),
        fault(
            "its socket is removed at 0.8 s", at_script(0.8, "rm {folder}/daemon/run/daemon.sock")
        ),
    ]


def _attacks() -> list[Fault]:
    from attacks import ATTACKS, METRICS_ATTACKS

    return [
        *(Fault(f"attack: {name}", [attack(name)], daemon=True, served=True) for name in ATTACKS),
        *(
            Fault(
                f"attack on the metrics: {name}",
                [attack(name, port=True)],
                daemon=True,
                served=True,
                scraped=True,
            )
            for name in METRICS_ATTACKS
        ),
    ]


# --- what only one of them does -------------------------------------------------------------------


def _setpriv(case: Case) -> None:
    """Becomes the user behind what only root may do."""
    case.uid = 0
    case.prefix += ["setpriv", f"--reuid={HONEST}", f"--regid={HONEST}", "--clear-groups"]


def _hang(case: Case) -> None:
    send(signal.SIGSTOP, to="daemon")(case)
    case.stack.callback(send(signal.SIGCONT, to="daemon"), case)  # so that it can be ended


def _odd_store(case: Case) -> None:
    case.env["PEPR_STORE"] = os.fsdecode(os.fsencode(case.store) + b"/st\xff")


def _odd_folder(case: Case) -> None:
    odd = Path(os.fsdecode(os.fsencode(case.work) + b"/\xff"))
    odd.mkdir()
    case.popen["cwd"] = odd


def _deaf(case: Case) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    case.stack.callback(os.close, writer)
    case.popen["stderr"] = writer


def _ignoring(*signals: int) -> Action:
    def ignore() -> None:
        for signo in signals:
            if signo not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(signo, signal.SIG_IGN)

    def inject(case: Case) -> None:
        case.before_exec.append(ignore)
        case.popen["restore_signals"] = False

    return inject


def _outer(case: Case) -> None:
    case.env["PEPR_RUN_DIR"] = str(case.folder / "outer")


def _foreign(case: Case) -> None:
    case.env["PYTHONPATH"] = f"{case.work}:{case.env['PYTHONPATH']}"
