"""The child cannot tell that it is profiled; real processes, pipes and terminals throughout."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, until

from pepr_profiler.errors import CommandError
from pepr_profiler.recording.command import resolve

PYTHON = sys.executable

# What the command line does with targets.py, and nothing more.
DRIVER = """
import ctypes, json, os, sys
from pathlib import Path
from time import monotonic_ns
from pepr_profiler.errors import CommandError
from pepr_profiler.recording.command import Child, HeldSignals
from pepr_profiler.recording.relay import Relay

options, command = json.loads(sys.argv[1]), sys.argv[2:]
held = HeldSignals()
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
seen = []
relay = Relay(lambda *chunk: seen.append(chunk)) if options["relay"] else None
try:
    child = Child.spawn(command, held=held, env=options["env"], relay=relay)
except CommandError as error:
    print(error, file=sys.stderr)
    sys.exit(error.status)
ticks_ns = []
def tick():
    ticks_ns.append(monotonic_ns())
    if options["tick"] == "raise":
        raise RuntimeError("the disk is full")
    os.write(options["tick"], b"tick\\n")
    return options["every_s"]
failure = None
started_ns = monotonic_ns()
try:
    exit = child.supervise(tick=tick if options["tick"] else None, first_s=options["every_s"])
except RuntimeError as error:
    exit, failure = child.exit, str(error)
Path(options["report"]).write_text(json.dumps({
    "pid": child.pid, "code": exit.code, "signal": exit.signal, "cpu_s": exit.cpu_s,
    "max_rss_bytes": exit.max_rss_bytes, "descendants_left": exit.descendants_left,
    "lived_ns": exit.ended_ns - child.started_ns, "warnings": child.warnings, "failure": failure,
    "seen": b"".join(data for _, data, _ in seen).decode("latin-1"),
    "channels": sorted({channel for channel, _, _ in seen}),
    "started_ns": started_ns, "ticks_ns": ticks_ns,
}))
held.release()
sys.exit(exit.status)
"""

# Says which signals it gets; SIGUSR2 ends it, so that nothing sent before can go unseen.
LISTENER = """
import os, signal, sys
log = int(sys.argv[1])
def say(text):
    os.write(log, text.encode() + b"\\n")
def on_signal(signo, frame):
    if signo == signal.SIGWINCH:
        size = os.get_terminal_size(1)
        say(f"size {size.columns}x{size.lines}")
    else:
        say(signal.Signals(signo).name)
    if signo == signal.SIGUSR2:
        os._exit(0)
for name in sys.argv[2:]:
    signal.signal(getattr(signal, name), on_signal)
wake, wake_writer = os.pipe()
os.set_blocking(wake_writer, False)
signal.set_wakeup_fd(wake_writer)  # pause() would miss a signal that comes just before it
say(f"ready {os.getpid()}")
while True:
    os.read(wake, 1)
"""

# A job-control shell with one job; a byte on `orders` resumes it: "g" the group, "p" its leader.
SHELL = """
import fcntl, os, signal, sys, termios
log, orders = int(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
job = os.posix_spawn(
    sys.argv[3], sys.argv[3:], os.environ, setpgroup=0, setsigdef=[signal.SIGTTOU]
)
os.tcsetpgrp(0, job)
os.write(log, f"job {job}\\n".encode())
while True:
    _, status = os.waitpid(job, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    os.tcsetpgrp(0, os.getpid())
    os.write(log, b"stopped\\n")
    order = os.read(orders, 1)
    os.tcsetpgrp(0, job)
    os.kill(-job if order == b"g" else job, signal.SIGCONT)
os.write(log, f"exit {os.waitstatus_to_exitcode(status)}\\n".encode())
"""

# Makes the terminal its own and becomes the command: a session leader, as in `xterm -e CMD`.
LEADER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Log:
    """Lines that any process of a test writes into one inherited pipe."""

    def __init__(self) -> None:
        self._reader, self.fd = os.pipe()
        self._rest = b""

    def next(self) -> str:
        """The next line, or "" when every writer is gone."""
        while b"\n" not in self._rest:
            assert select.select([self._reader], [], [], SLOW_S)[0], "nothing was said"
            data = os.read(self._reader, 4096)
            if not data:
                return ""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def until(self, prefix: str) -> list[str]:
        lines = [self.next()]
        while lines[-1] and not lines[-1].startswith(prefix):
            lines.append(self.next())
        assert lines[-1].startswith(prefix), lines
        return lines

    def rest(self) -> list[str]:
        self.close_writer()
        return list(iter(self.next, ""))

    def close_writer(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        self.close_writer()
        os.close(self._reader)


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    log.close()


class Terminal:
    """Both ends of a pty, as a terminal emulator holds them."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def shown(self) -> bytes:
        """All output, until no process holds the terminal any more."""
        self.close_slave()
        output = b""
        while True:
            assert select.select([self.master], [], [], SLOW_S)[0], output
            try:
                output += os.read(self.master, 65536)
            except OSError as error:
                assert error.errno == errno.EIO
                return output

    def close_slave(self) -> None:
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def hang_up(self) -> None:
        self.close_slave()
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.hang_up()


class Wrapper:
    """Starts commands under the driver; what is left of them ends with the test."""

    def __init__(self, folder: Path) -> None:
        self._report = folder / "report.json"
        self._running: list[subprocess.Popen[bytes]] = []

    def argv(
        self,
        command: Sequence[str | bytes],
        *,
        relay: bool = False,
        env: dict[str, str] | None = None,
        tick: int | str = 0,
        every_s: float = 0.5,
    ) -> list[str | bytes]:
        options = {
            "relay": relay, "env": env or {}, "tick": tick, "every_s": every_s,
            "report": str(self._report),
        }  # fmt: skip
        return [PYTHON, "-c", DRIVER, json.dumps(options), *command]

    def popen(self, argv: Sequence[str | bytes], **kwargs: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(argv, **kwargs)
        self._running.append(process)
        return process

    def start(
        self,
        command: Sequence[str | bytes],
        *,
        relay: bool = False,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> subprocess.Popen[bytes]:
        return self.popen(self.argv(command, relay=relay, **(options or {})), **kwargs)

    def run(
        self,
        command: Sequence[str | bytes],
        *,
        relay: bool = False,
        input: bytes | None = None,
        **kwargs: Any,
    ) -> subprocess.CompletedProcess[bytes]:
        process = self.start(
            command,
            relay=relay,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **kwargs,
        )
        output, errors = process.communicate(input, timeout=SLOW_S)
        return subprocess.CompletedProcess([], process.returncode, output, errors)

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self._report.read_text()))

    @property
    def has_report(self) -> bool:
        return self._report.exists()

    def end_all(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
            process.wait()


@pytest.fixture
def wrapper(tmp_path: Path) -> Iterator[Wrapper]:
    wrapper = Wrapper(tmp_path)
    yield wrapper
    wrapper.end_all()


def listener(log: Log, *names: str) -> list[str]:
    return [PYTHON, "-c", LISTENER, str(log.fd), *names, "SIGUSR2"]


def pid_of(line: str) -> int:
    return int(line.split()[1])


def state_of(pid: int) -> str:
    """One letter, as ps prints it; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


both_ways = pytest.mark.parametrize("relay", [False, True], ids=["inherited", "relayed"])


# --- exit status ----------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143)],
)
def test_exit_status_is_what_a_shell_would_see(
    wrapper: Wrapper, script: str, status: int, relay: bool
) -> None:
    assert wrapper.run(["sh", "-c", script], relay=relay).returncode == status


def test_exit_tells_code_from_signal(wrapper: Wrapper) -> None:
    # given a child that exits with the number a shell uses for SIGKILL, and one that is killed
    wrapper.run(["sh", "-c", "exit 137"])
    by_code = wrapper.report
    wrapper.run(["sh", "-c", "kill -KILL $$"])
    by_signal = wrapper.report

    # then they differ
    assert (by_code["code"], by_code["signal"]) == (137, None)
    assert (by_signal["code"], by_signal["signal"]) == (None, signal.SIGKILL)


def test_command_that_cannot_run_fails_before_anything_starts(
    wrapper: Wrapper, tmp_path: Path
) -> None:
    # given
    text = tmp_path / "train.py"
    text.write_text("print(1)\n")
    no_interpreter = tmp_path / "script"
    no_interpreter.write_text("#!/no/such/interpreter\n")
    no_interpreter.chmod(0o755)

    # when
    outcomes = {
        command: wrapper.run([command])
        for command in ("no-such-command-anywhere", str(tmp_path / "absent"), "", str(text),
                        str(tmp_path), str(no_interpreter))
    }  # fmt: skip

    # then each has its status and a remedy
    assert [done.returncode for done in outcomes.values()] == [127, 127, 127, 126, 126, 126]
    assert all(b"fix: " in done.stderr for done in outcomes.values())
    assert b"python " + os.fsencode(text) in outcomes[str(text)].stderr
    assert b"is a directory" in outcomes[str(tmp_path)].stderr
    assert b"interpreter" in outcomes[str(no_interpreter)].stderr
    assert not wrapper.has_report


def test_resolve_takes_the_first_executable_of_path_as_execvp_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a PATH with a folder, a plain file and then an executable of one name
    for folder, mode in (("a", None), ("b", 0o644), ("c", 0o755), ("d", 0o755)):
        (tmp_path / folder).mkdir()
        if mode is None:
            (tmp_path / folder / "tool").mkdir()
        else:
            (tmp_path / folder / "tool").write_text("#!/bin/sh\necho $0\n")
            (tmp_path / folder / "tool").chmod(mode)
    monkeypatch.setenv("PATH", ":".join(f"{tmp_path}/{name}" for name in "abcd"))

    # then
    assert resolve(["tool"]) == f"{tmp_path}/c/tool"
    assert resolve(["tool"]) == subprocess.run(
        ["tool"], capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip

    # and with only the plain file left it is there, but not executable
    monkeypatch.setenv("PATH", f"{tmp_path}/a:{tmp_path}/b")
    with pytest.raises(CommandError) as caught:
        resolve(["tool"])
    assert caught.value.status == 126


def test_script_without_interpreter_line_runs_in_the_shell(
    wrapper: Wrapper, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0 got $1"\nexit 3\n')
    script.chmod(0o755)

    done = wrapper.run([str(script), "two words"])

    assert (done.stdout, done.returncode) == (f"{script} got two words\n".encode(), 3)


# --- what the child sees --------------------------------------------------------------------------


@both_ways
def test_arguments_arrive_unmodified(wrapper: Wrapper, relay: bool) -> None:
    arguments = [b"--help", b"-x", b"--", b"", b"a b", b"*", b"\xff\xfe", "größe".encode()]

    done = wrapper.run(["printf", "%s\\0", *arguments], relay=relay)

    assert done.stdout == b"".join(argument + b"\0" for argument in arguments)


# Everything a process has from its parent, but no pid, pipe or time of its own.
LOOK_AROUND = """
    cat /proc/self/status | grep -E '^(Sig(Blk|Ign|Cgt)|NSpgid|NSsid|Umask|Groups|NoNewPrivs)'
    ls /proc/self/fd; pwd; cat /proc/self/limits /proc/self/oom_score_adj /proc/self/timerslack_ns
    nice; cat <&7
"""


def without_libc_signals(output: bytes) -> str:
    """glibc's posix_spawn leaves its own signals 32 and 33 ignored, which no program can use."""
    return re.sub(
        r"(?<=SigIgn:\t)[0-9a-f]+",
        lambda mask: f"{int(mask[0], 16) & ~(3 << 31):016x}",
        output.decode(),
    )


@both_ways
@pytest.mark.parametrize("ignored", ["", "HUP", "HUP INT QUIT"], ids=["", "nohup", "background"])
def test_child_starts_as_it_would_without_us(
    wrapper: Wrapper, tmp_path: Path, relay: bool, ignored: str
) -> None:
    # given a parent that ignores some signals, blocks one and holds descriptor 7 open
    (tmp_path / "seven").write_text("read through descriptor 7\n")
    launch = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        f"[signal.signal(getattr(signal, 'SIG' + n), signal.SIG_IGN) for n in {ignored.split()}]\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        f"os.dup2(os.open({str(tmp_path / 'seven')!r}, os.O_RDONLY), 7)\n"
        "os.umask(0o27)\n"
        "os.execvp(sys.argv[1], sys.argv[1:])\n"
    )
    command = ["sh", "-c", LOOK_AROUND]

    # when
    direct = subprocess.run(
        [PYTHON, "-c", launch, *command], stdin=subprocess.PIPE, capture_output=True, check=True
    )
    wrapped = wrapper.popen(
        [PYTHON, "-c", launch, *wrapper.argv(command, relay=relay)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, errors = wrapped.communicate(timeout=SLOW_S)

    # then
    assert b"descriptor 7" in direct.stdout
    assert without_libc_signals(output) == without_libc_signals(direct.stdout)
    assert errors == direct.stderr == b""


def test_environment_is_the_given_one_with_our_variables_added(wrapper: Wrapper) -> None:
    # given the C locale, in which CPython changes its own environment (PEP 538)
    given = {"PATH": os.environ["PATH"], "ODD": "a=b\nc", "PYTHONPATH": ":".join(sys.path)}

    # when
    bare = wrapper.start(
        ["cat", "/proc/self/environ"],
        options={"env": {"PEPR_RUN": "/runs/1"}},
        env=given,
        stdout=subprocess.PIPE,
    )
    output, _ = bare.communicate(timeout=SLOW_S)

    # then
    expected = {*(f"{key}={value}" for key, value in given.items()), "PEPR_RUN=/runs/1"}
    assert set(output.decode().rstrip("\0").split("\0")) == expected


@both_ways
def test_stdin_passes_through(wrapper: Wrapper, relay: bool) -> None:
    data = bytes(range(256)) * 4096

    assert wrapper.run(["cat"], relay=relay, input=data).stdout == data


# --- signals --------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGALRM", "SIGWINCH"]
)
def test_signal_to_the_wrapper_reaches_the_child_exactly_once(
    wrapper: Wrapper, log: Log, terminal: Terminal, name: str, relay: bool
) -> None:
    # given a child that listens
    terminal.resize(80, 24)
    process = wrapper.start(
        listener(log, name), relay=relay, pass_fds=[log.fd], stdout=terminal.slave
    )
    log.until("ready")

    # when the wrapper is signalled
    process.send_signal(getattr(signal, name))
    first = log.next()
    process.send_signal(signal.SIGUSR2)

    # then the child has it once, before the signal that ends it
    assert first == ("size 80x24" if name == "SIGWINCH" else name)
    assert log.rest() == ["SIGUSR2"]
    assert process.wait(SLOW_S) == 0


def test_default_action_of_a_forwarded_signal_ends_the_child_and_is_reported(
    wrapper: Wrapper, log: Log
) -> None:
    process = wrapper.start(listener(log), pass_fds=[log.fd])
    log.until("ready")

    process.terminate()

    assert process.wait(SLOW_S) == 143
    assert wrapper.report["signal"] == signal.SIGTERM


def test_signal_after_the_childs_end_does_not_cost_the_summary(wrapper: Wrapper, log: Log) -> None:
    # given two SIGINTs at once, as an impatient user sends them; the child ends on the first
    process = wrapper.start(listener(log), pass_fds=[log.fd])
    log.until("ready")

    # when
    for _ in range(2):
        process.send_signal(signal.SIGINT)

    # then the report is written all the same; a second one that comes behind it may end us
    assert process.wait(SLOW_S) in (1, 130, -signal.SIGINT)
    assert wrapper.has_report


def test_signal_that_the_child_sends_does_not_come_back(wrapper: Wrapper, log: Log) -> None:
    # given a child whose parent is the wrapper, which it signals
    program = LISTENER.replace(
        "while True:", "os.kill(os.getppid(), signal.SIGUSR1); say('sent')\nwhile True:"
    )
    command = [PYTHON, "-c", program, str(log.fd), "SIGUSR1", "SIGUSR2"]

    # when
    process = wrapper.start(command, pass_fds=[log.fd])
    log.until("sent")
    process.send_signal(signal.SIGUSR2)

    # then
    assert log.rest() == ["SIGUSR2"]


def test_child_survives_sigkill_of_the_profiler(wrapper: Wrapper, log: Log) -> None:
    process = wrapper.start(listener(log, "SIGTERM"), pass_fds=[log.fd])
    child = pid_of(log.until("ready")[-1])

    process.kill()
    process.wait(SLOW_S)
    os.kill(child, signal.SIGTERM)
    answer = log.next()
    os.kill(child, signal.SIGUSR2)

    assert answer == "SIGTERM"
    assert log.rest() == ["SIGUSR2"]


# --- terminal and job control ---------------------------------------------------------------------


class Session:
    """A terminal whose job-control shell runs the wrapper around a listener in the foreground."""

    def __init__(self, wrapper: Wrapper, log: Log, terminal: Terminal, *, relay: bool) -> None:
        orders, self._orders = os.pipe()
        self._terminal, self._log = terminal, log
        argv = wrapper.argv(listener(log, "SIGINT", "SIGQUIT", "SIGWINCH", "SIGCONT"), relay=relay)
        self.shell = wrapper.popen(
            [PYTHON, "-c", SHELL, str(log.fd), str(orders), *argv],
            stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave,
            pass_fds=[log.fd, orders], start_new_session=True,
        )  # fmt: skip
        os.close(orders)
        said = [log.next(), log.next()]
        self.job = next(pid_of(line) for line in said if line.startswith("job"))
        self.child = next(pid_of(line) for line in said if line.startswith("ready"))

    def resume(self, order: bytes) -> None:
        os.write(self._orders, order)

    def finish(self) -> list[str]:
        os.kill(self.job, signal.SIGUSR2)
        lines = self._log.until("exit")
        self._terminal.close_slave()
        self.shell.wait(SLOW_S)
        os.close(self._orders)
        return lines


@both_ways
@pytest.mark.parametrize("name", ["SIGINT", "SIGQUIT"])
def test_key_of_the_terminal_reaches_the_child_exactly_once(
    wrapper: Wrapper, log: Log, terminal: Terminal, name: str, relay: bool
) -> None:
    session = Session(wrapper, log, terminal, relay=relay)

    terminal.type({"SIGINT": b"\x03", "SIGQUIT": b"\x1c"}[name])
    first = log.next()

    assert first == name
    assert session.finish() == ["SIGUSR2", "exit 0"]


@both_ways
@pytest.mark.parametrize("order", [b"g", b"p"], ids=["fg", "kill-CONT"])
def test_suspended_job_stops_whole_and_resumes_whole(
    wrapper: Wrapper, log: Log, terminal: Terminal, relay: bool, order: bytes
) -> None:
    session = Session(wrapper, log, terminal, relay=relay)

    for _ in range(2):
        # when Ctrl-Z, then the shell gets its prompt, and child and wrapper are stopped
        terminal.type(b"\x1a")
        assert log.until("stopped") == ["stopped"]
        assert (state_of(session.job), state_of(session.child)) == ("T", "T")

        # when resumed, then both run
        session.resume(order)
        assert log.next() == "SIGCONT"
        terminal.type(b"\x03")
        assert "SIGINT" in log.until("SIGINT")
    assert session.finish()[-2:] == ["SIGUSR2", "exit 0"]


def test_frozen_child_does_not_freeze_the_profiler(wrapper: Wrapper, log: Log) -> None:
    # given a child stopped by its own pid, as `kill -STOP` and checkpointers do
    process = wrapper.start(listener(log, "SIGUSR1"), pass_fds=[log.fd])
    child = pid_of(log.until("ready")[-1])
    os.kill(child, signal.SIGSTOP)
    until(lambda: state_of(child) == "T")

    # when signals come through the wrapper and the child is thawed by its own pid
    process.send_signal(signal.SIGUSR1)
    os.kill(child, signal.SIGCONT)

    # then the wrapper has passed them on
    assert log.next() == "SIGUSR1"
    process.send_signal(signal.SIGUSR2)
    assert process.wait(SLOW_S) == 0


def test_who_has_no_descriptor_left_hears_signals_and_returns_to_look_again() -> None:
    script = """
import os, resource, signal, time
from pepr_profiler import _core
notifier = _core.Notifier()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
lowest = os.open("/dev/null", os.O_RDONLY)
os.close(lowest)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))
for sent in (True, False):
    if sent:
        os.kill(os.getpid(), signal.SIGUSR1)
    begin_s = time.monotonic()
    found = _core.wait_signal([signal.SIGUSR1], time.monotonic_ns() + 60 * 10**9, notifier)
    print(found and found[0], time.monotonic() - begin_s < 30)
"""
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(int(signal.SIGUSR1)), "True", "None", "True"]


def test_a_stop_that_outlasts_the_deadline_is_no_signal(wrapper: Wrapper) -> None:
    # given a process that waits for one signal, 10 ms at a time (signal.sigtimedwait() would
    # then return whatever was in its memory, SIGQUIT for example)
    script = """
import signal, time
from pepr_profiler import _core
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("ready", flush=True)
while (found := _core.wait_signal([signal.SIGUSR1], time.monotonic_ns() + 10_000_000)) is None:
    pass
print(*found, flush=True)
"""
    process = wrapper.popen([PYTHON, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    # when it is stopped for longer, time and again
    for _ in range(30):
        process.send_signal(signal.SIGSTOP)
        until(lambda: state_of(process.pid) == "T")
        overdue_s = time.monotonic() + 0.01
        until(lambda overdue_s=overdue_s: time.monotonic() > overdue_s)
        process.send_signal(signal.SIGCONT)
        until(lambda: state_of(process.pid) != "T")
    process.send_signal(signal.SIGUSR1)

    # then what it gets is what was sent, and by whom
    si_user = 0
    words = process.stdout.read().split()
    assert [int(word) for word in words] == [signal.SIGUSR1, si_user, os.getpid()]


def test_a_profiler_that_is_stopped_and_goes_on_passes_on_what_was_sent_alone(
    wrapper: Wrapper, log: Log
) -> None:
    # given a profiler whose next tick is due before any stop is over
    every_s = 0.01
    with Path(os.devnull).open("w") as nowhere:
        process = wrapper.start(
            listener(log, "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"),
            options={"tick": nowhere.fileno(), "every_s": every_s},
            pass_fds=[log.fd, nowhere.fileno()],
        )
    log.until("ready")

    # when it alone is stopped and continued, as Slurm's suspend and cgroups do
    for _ in range(30):
        process.send_signal(signal.SIGSTOP)
        until(lambda: state_of(process.pid) == "T")
        overdue_s = time.monotonic() + every_s
        until(lambda overdue_s=overdue_s: time.monotonic() > overdue_s)
        process.send_signal(signal.SIGCONT)
        until(lambda: state_of(process.pid) != "T")

    # then it lives, and the child has heard of nothing but what follows
    process.send_signal(signal.SIGUSR1)
    assert log.next() == "SIGUSR1"
    process.send_signal(signal.SIGUSR2)
    assert log.next() == "SIGUSR2"
    assert process.wait(SLOW_S) == 0


@both_ways
def test_window_size_is_the_terminals_and_follows_it(
    wrapper: Wrapper, log: Log, terminal: Terminal, relay: bool
) -> None:
    session = Session(wrapper, log, terminal, relay=relay)

    terminal.resize(101, 33)
    said = log.until("size 101x33")
    terminal.resize(61, 21)
    said += log.until("size 61x21")

    assert {line.split()[0] for line in said} == {"size"}
    assert session.finish()[-1] == "exit 0"


@both_ways
def test_hang_up_reaches_the_child_where_we_lead_the_session(
    wrapper: Wrapper, log: Log, terminal: Terminal, relay: bool
) -> None:
    # given `xterm -e pepr-profile -- CMD`: no shell between the terminal and us
    command = [PYTHON, "-c", LISTENER.replace("SIGUSR2:", "SIGHUP:"), str(log.fd), "SIGHUP"]
    process = wrapper.popen(
        [PYTHON, "-c", LEADER, *wrapper.argv(command, relay=relay)],
        stdin=terminal.slave, stdout=terminal.slave, pass_fds=[log.fd], start_new_session=True,
    )  # fmt: skip
    log.until("ready")

    # when the window is closed
    terminal.hang_up()

    # then
    assert log.rest() == ["SIGHUP"]
    assert process.wait(SLOW_S) == 0
    assert wrapper.has_report


# --- output through the relay ---------------------------------------------------------------------

ALL_BYTES = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 4096)"


def test_binary_output_passes_a_pipe_unmodified_and_is_seen(wrapper: Wrapper) -> None:
    done = wrapper.run([PYTHON, "-c", ALL_BYTES], relay=True)

    assert done.stdout == bytes(range(256)) * 4096
    assert wrapper.report["seen"].encode("latin-1") == done.stdout


def test_output_to_a_terminal_is_byte_for_byte_the_one_without_us(wrapper: Wrapper) -> None:
    # given a terminal with its usual modes, which change newlines and tabs
    shown = {}
    for relay in (False, True):
        terminal = Terminal()
        process = wrapper.start([PYTHON, "-c", ALL_BYTES], relay=relay, stdout=terminal.slave)

        # when
        shown[relay] = terminal.shown()

        # then
        assert process.wait(SLOW_S) == 0
        terminal.hang_up()
    assert shown[True] == shown[False]
    assert len(shown[True]) > 256 * 4096  # the terminal did its part: \n became \r\n


@both_ways
def test_child_sees_a_terminal_exactly_where_ours_is(
    wrapper: Wrapper, terminal: Terminal, relay: bool
) -> None:
    terminal.resize(77, 11)
    program = "import os; print(os.isatty(1), os.isatty(2), *os.get_terminal_size(1))"

    process = wrapper.start(
        [PYTHON, "-c", program], relay=relay, stdout=terminal.slave, stderr=subprocess.PIPE
    )

    assert terminal.shown() == b"True False 77 11\r\n"
    assert process.wait(SLOW_S) == 0


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_stdout_and_stderr_of_one_place_keep_their_order(wrapper: Wrapper, kind: str) -> None:
    # given a child that writes in turn to both
    program = "import os\nfor i in range(300): os.write(1 + i % 2, b'%d\\n' % i)"
    expected = b"".join(b"%d\n" % i for i in range(300))

    # when both go to one place
    if kind == "pipe":
        process = wrapper.start(
            [PYTHON, "-c", program], relay=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = process.communicate(timeout=SLOW_S)
    else:
        terminal = Terminal()
        process = wrapper.start(
            [PYTHON, "-c", program], relay=True, stdout=terminal.slave, stderr=terminal.slave
        )
        output = terminal.shown().replace(b"\r\n", b"\n")
        process.wait(SLOW_S)
        terminal.hang_up()

    # then
    assert output == expected
    assert wrapper.report["channels"] == [1]


def test_stdout_and_stderr_of_two_places_stay_apart(wrapper: Wrapper) -> None:
    done = wrapper.run(["sh", "-c", "echo out; echo err >&2"], relay=True)

    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")
    assert wrapper.report["channels"] == [1, 2]


def test_output_passes_at_once_not_at_the_end_of_a_line(wrapper: Wrapper) -> None:
    # given a prompt without newline, and a child that waits for the answer
    process = wrapper.start(
        ["sh", "-c", "printf 'name? '; read name; echo hello $name"],
        relay=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    # then it arrives before the child goes on
    assert os.read(process.stdout.fileno(), 100) == b"name? "
    process.stdin.write(b"Ada\n")
    process.stdin.flush()
    assert process.stdout.read() == b"hello Ada\n"


def test_nonblocking_stdout_loses_nothing(wrapper: Wrapper) -> None:
    # given a stdout that another program made non-blocking, and that fills up at once
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = wrapper.start([PYTHON, "-c", ALL_BYTES], relay=True, stdout=writer)
    os.close(writer)

    # when
    output = b""
    while data := os.read(reader, 65536):
        output += data
    os.close(reader)

    # then
    assert output == bytes(range(256)) * 4096
    assert process.wait(SLOW_S) == 0


@both_ways
def test_closed_reader_ends_the_child_by_sigpipe(wrapper: Wrapper, relay: bool) -> None:
    # given `yes | head -c 3`
    process = wrapper.start(["yes"], relay=relay, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 3) == b"y\ny"

    # when
    process.stdout.close()

    # then
    assert process.wait(SLOW_S) == 128 + signal.SIGPIPE
    assert wrapper.report["warnings"] == []


def test_full_disk_below_stdout_is_said(wrapper: Wrapper) -> None:
    with Path("/dev/full").open("wb") as full:
        process = wrapper.start(["yes"], relay=True, stdout=full)

        assert process.wait(SLOW_S) == 128 + signal.SIGPIPE
    (warning,) = wrapper.report["warnings"]
    assert warning["code"] == "output-lost"
    assert os.strerror(errno.ENOSPC) in warning["text"]


@both_ways
def test_closed_stdout_stays_closed(wrapper: Wrapper, relay: bool) -> None:
    argv = wrapper.argv(["sh", "-c", "echo text || exit 9"], relay=relay)

    process = wrapper.popen(["sh", "-c", 'exec "$@" >&-', "sh", *argv], stderr=subprocess.PIPE)
    process.communicate(timeout=SLOW_S)

    assert process.returncode == 9


# --- descendants ----------------------------------------------------------------------------------


@both_ways
def test_background_process_that_keeps_stdout_neither_delays_nor_loses_its_output(
    wrapper: Wrapper, tmp_path: Path, relay: bool
) -> None:
    # given a child that leaves a process behind, which waits before it writes
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = wrapper.start(
        ["sh", "-c", f"echo done; (cat {fifo} &)"], relay=relay, stdout=subprocess.PIPE
    )
    assert process.stdout is not None

    # then we end with the child
    assert process.wait(SLOW_S) == 0
    assert wrapper.report["descendants_left"] == 1

    # and what the other one writes afterwards arrives all the same
    with fifo.open("wb") as stream:
        stream.write(b"late\n")
    assert process.stdout.read() == b"done\nlate\n"


def test_background_process_that_never_stops_writing_does_not_keep_us(
    wrapper: Wrapper, log: Log
) -> None:
    # given a child that ends while its descendant floods stdout
    command = f"(yes & echo pid $! >/dev/fd/{log.fd}); exit 4"
    process = wrapper.start(
        ["sh", "-c", command], relay=True, stdout=subprocess.PIPE, pass_fds=[log.fd]
    )
    assert process.stdout is not None
    flood = pid_of(log.next())
    try:
        # when its output is taken away as it comes
        while process.poll() is None:
            assert os.read(process.stdout.fileno(), 1 << 20)

        # then we have ended, and it has not
        assert process.returncode == 4
        assert state_of(flood) in ("R", "S", "D")
    finally:
        os.kill(flood, signal.SIGKILL)


def test_orphaned_grandchildren_are_reaped_and_their_cpu_time_counted(
    wrapper: Wrapper, log: Log
) -> None:
    # given a child that waits for none of its grandchildren: they say what they used, and end
    program = """
import os, signal, sys, time
log = int(sys.argv[1])
for _ in range(4):
    if os.fork() == 0:
        if os.fork() == 0:
            while time.process_time() < 0.1: pass
            os.write(log, f"orphan {os.getpid()} {time.process_time()}\\n".encode())
        os._exit(0)
    os.wait()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
os.write(log, b"all\\n")
signal.sigwait([signal.SIGUSR2])
"""
    process = wrapper.start([PYTHON, "-c", program, str(log.fd)], pass_fds=[log.fd])

    # when
    said = [line.split() for line in (log.next() for _ in range(5)) if line != "all"]

    # then none of them stays a zombie while the child lives on
    until(lambda: not any(state_of(int(pid)) for _, pid, _ in said))
    process.send_signal(signal.SIGUSR2)
    assert process.wait(SLOW_S) == 0

    # and their CPU time is in the sum
    assert wrapper.report["cpu_s"] >= sum(float(used_s) for *_, used_s in said)
    assert wrapper.report["descendants_left"] == 0


def test_largest_process_is_measured_and_small_ones_are_not_invented(wrapper: Wrapper) -> None:
    # given a child that says its own peak, 200 MB above ours, and one far below ours
    ours_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    program = (
        f"import resource; b'x' * {ours_bytes + 200_000_000}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )

    # when
    done = wrapper.run([PYTHON, "-c", program])
    large = wrapper.report["max_rss_bytes"]
    wrapper.run(["true"])
    small = wrapper.report["max_rss_bytes"]

    # then
    assert large == pytest.approx(int(done.stdout), rel=0.02)
    assert large > 200e6
    assert small is None


# --- ticks ----------------------------------------------------------------------------------------


def test_ticks_come_at_absolute_deadlines_and_never_more_often(wrapper: Wrapper, log: Log) -> None:
    # given
    every_s = 0.02
    process = wrapper.start(
        listener(log), options={"tick": log.fd, "every_s": every_s}, pass_fds=[log.fd]
    )
    log.until("ready")

    # when ten ticks have passed
    for _ in range(10):
        log.until("tick")
    process.send_signal(signal.SIGUSR2)
    assert process.wait(SLOW_S) == 0

    # then each waited for its own deadline: the n-th is never early, and no two share a period
    report = wrapper.report
    periods = [(t - report["started_ns"]) / (every_s * 1e9) for t in report["ticks_ns"]]
    assert all(period >= n for n, period in enumerate(periods, start=1))
    assert len({int(period) for period in periods}) == len(periods)


def test_failing_tick_costs_neither_the_child_nor_its_exit(wrapper: Wrapper, log: Log) -> None:
    # given a tick that raises
    process = wrapper.start(
        listener(log, "SIGTERM"), options={"tick": "raise", "every_s": 0.001}, pass_fds=[log.fd]
    )
    log.until("ready")

    # when the child goes on to be signalled through the wrapper
    process.send_signal(signal.SIGTERM)
    assert log.next() == "SIGTERM"
    process.send_signal(signal.SIGUSR2)

    # then its end is known, and so is the failure
    assert process.wait(SLOW_S) == 0
    assert wrapper.report["failure"] == "the disk is full"
    assert wrapper.report["code"] == 0
    assert len(wrapper.report["ticks_ns"]) == 1


def test_nothing_heavy_is_imported_before_the_child_starts() -> None:
    heavy = ["numpy", "rich", "asyncio", "subprocess", "ctypes", "threading", "json", "shutil"]
    program = textwrap.dedent(
        f"""
        import sys
        before = set(sys.modules)
        import pepr_profiler.recording.command
        print(sorted(set({heavy}) & (set(sys.modules) - before)))
        """
    )

    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
