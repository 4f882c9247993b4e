"""The child of `pepr-profile -- CMD…`: started, supervised and reaped as if no profiler were there.

    held = HeldSignals()                        # first of all, before any thread exists
    relay = Relay(metrics.feed) if metrics.has_patterns else None
    child = Child.spawn(command, held=held, env={"PEPR_RUN": run_dir}, relay=relay)
    exit = child.supervise(tick=recorder.tick, notifier=recorder.notifier)
    …                                           # write the summary; signals still wait
    held.release()
    sys.exit(exit.status)

The child keeps our process group, session, controlling terminal, working directory, descriptors,
environment, signal mask and ignored signals. SIGPIPE and SIGXFSZ are set to their default: CPython
ignores them at its start, and what they were before that is no longer known.

Signals. A terminal sends its signals to the whole foreground group, so that the child has its own
copy; the kernel marks them SI_KERNEL, and we do not pass them on. A signal from a process is passed
on, because most senders (`kill PID`, docker, systemd, Slurm's batch step) know only our PID. We
cannot tell a sender that signals the whole group (`kill -TERM -PGID`, GNU timeout) from one that
signals us alone, so that its signal reaches the child twice. That is better than never: the second
of two SIGTERMs finds the child dying. A signal that the child sent to us is not sent back.

Loaded before the child starts, so nothing heavier than `signal` is imported at the top.
"""

from __future__ import annotations

# pathlib would delay the child's start by 5 ms.
# ruff: noqa: PTH112, PTH116, PTH123, PTH208
import errno
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from pepr_profiler import _core
from pepr_profiler.errors import CommandError, warning
from pepr_profiler.record import Record
from pepr_profiler.recording import procfs

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from pepr_profiler.recording.relay import Relay

_SI_KERNEL = 0x80  # linux/include/uapi/asm-generic/siginfo.h; the signal module has no name for it

_FORWARDED = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
    # Left alone, their default action would end the profiler and leave the child unsupervised.
    | {signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR}
    | {signal.SIGXCPU, signal.SIGURG}
    | set(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
)
_JOB_STOPS = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_HELD = _FORWARDED | _JOB_STOPS | {signal.SIGCHLD, signal.SIGCONT, signal.SIGWINCH}
_FATAL = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})


_NEVER_NS = 2**62

SignalSet = frozenset[int]


class HeldSignals:
    """The signals meant for the child, blocked until `release()`; `original` is the mask before.

    Make it before the sampler's threads exist: they inherit the blocked mask, so that only
    `supervise` receives signals.
    """

    def __init__(self) -> None:
        self.original: SignalSet = frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, _HELD))
        # An inherited SIG_IGN would make the kernel reap the child without telling its status.
        self._sigchld = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def release(self) -> None:
        """Restore mask and SIGCHLD; what is still pending was meant for the child and is dropped.

        Call it when the summary is written: a second Ctrl-C must not cost the run.
        """
        while signal.sigtimedwait(_HELD - self.original, 0) is not None:
            pass
        signal.signal(signal.SIGCHLD, self._sigchld)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.original)

    def __enter__(self) -> HeldSignals:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def resolve(command: Sequence[str]) -> str:
    """The path that execvp would execute for `command`, found before anything starts.

    Raises CommandError: 127 where there is no such command, 126 where it cannot be executed.
    """
    name = command[0]
    if "/" in name:
        candidates = [name]
    else:
        folders = os.environ.get("PATH", os.defpath).split(":") if name else []
        candidates = [f"{folder or '.'}/{name}" for folder in folders]
    refused = ""
    for path in candidates:
        if os.path.isdir(path):
            # A folder of that name in PATH is passed over, as shells do.
            refused = refused or (f"{path} is a directory" if "/" in name else "")
        elif os.access(path, os.X_OK):
            return path
        elif os.path.lexists(path):
            refused = refused or _why_not_executable(path)
    if refused:
        raise CommandError(
            f"cannot execute {name}",
            status=126,
            why=refused,
            fix=_fix_not_executable(candidates[0] if "/" in name else name),
        )
    raise CommandError(
        f"command not found: {name!r}",
        status=127,
        why="no such file" if "/" in name else "no folder of PATH has it",
        fix="check the spelling, or give its path (a file in this folder is ./NAME)",
    )


def _why_not_executable(path: str) -> str:
    try:
        os.stat(path)
    except OSError as error:
        return f"{path}: {os.strerror(error.errno or 0)}"
    return f"{path} may not be executed (no x permission)"


def _fix_not_executable(path: str) -> str:
    if path.endswith(".py"):
        return f"pepr-profile -- python {path}, or chmod +x {path}"
    return f"name a program; a script needs chmod +x {path}"


class Exit(Record):
    """How the child ended: exactly one of `code` and `signal` is set.

    `cpu_s` is the user and system time of all processes reaped: the child, what it waited for, and
    orphaned descendants where this process is a child subreaper. `max_rss_bytes` is the largest
    single process among them, None where it lies below what exec carries over from our own
    (Linux counts the memory of the process that spawned into ru_maxrss). `descendants_left` still
    live and are in neither figure; None where their number cannot be read.
    """

    code: int | None
    signal: int | None
    cpu_s: float
    max_rss_bytes: int | None
    ended_ns: int
    descendants_left: int | None

    @property
    def status(self) -> int:
        """What a shell sees: the exit code, or 128 + the signal."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


def _next_deadline(deadline_ns: int, after_ns: int) -> int:
    """The next one of those `after_ns` apart; if the last was not awaited, they begin now."""
    now_ns, after_ns = time.monotonic_ns(), max(after_ns, 1)
    if now_ns < deadline_ns:
        return now_ns + after_ns
    return deadline_ns + ((now_ns - deadline_ns) // after_ns + 1) * after_ns


class Child:
    """A running command under supervision, spawned by `spawn`."""

    spawned = False
    """Whether this process has started a command."""

    def __init__(self, pid: int, *, started_ns: int, floor_bytes: int, relay: Relay | None) -> None:
        self.pid = pid
        self.started_ns = started_ns
        self.exit: Exit | None = None
        self.warnings: list[dict[str, str]] = []
        self._relay = relay
        self._floor_bytes = floor_bytes
        self._status: int | None = None
        self._ended_ns = 0
        self._cpu_s = 0.0
        self._max_rss_bytes = 0
        self._stopped = False
        self._stop_asked = False

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        *,
        held: HeldSignals,
        env: Mapping[str, str] | None = None,
        relay: Relay | None = None,
    ) -> Child:
        """Execute `command` with the variables of `env` added; returns once exec has succeeded.

        Raises CommandError as `resolve` does, and for what only exec finds out (a missing
        interpreter, an argument list too long); the relay is closed then.
        """
        import resource

        def execute(path: str, argv: list[str]) -> int:
            return os.posix_spawn(
                path,
                argv,
                {**procfs.given_environment(), **(env or {})},
                file_actions=relay.file_actions() if relay else (),
                setsigmask=held.original,
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )

        if relay is not None:
            relay.start()
        started_ns = time.monotonic_ns()
        floor_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        try:
            path = resolve(command)
            try:
                pid = execute(path, list(command))
            except OSError as error:
                if error.errno != errno.ENOEXEC:
                    raise
                # A script without "#!": a shell and execvp run it with /bin/sh.
                pid = execute("/bin/sh", ["/bin/sh", path, *command[1:]])
        except (OSError, CommandError) as error:
            if relay is not None:
                relay.close()
            if isinstance(error, CommandError):
                raise
            raise _exec_failure(path, error) from error
        cls.spawned = True
        if relay is not None:
            relay.leave_ends_to_child()
        return cls(pid, started_ns=started_ns, floor_bytes=floor_bytes, relay=relay)

    def supervise(
        self,
        *,
        tick: Callable[[], float] | None = None,
        first_s: float = 0.5,
        notifier: _core.Notifier | None = None,
    ) -> Exit:
        """Forward signals and reap until the child has ended and its output is passed on.

        `tick` runs first after `first_s`, and whenever `notifier` asks. It returns after how many
        seconds it is to run again. Deadlines that are missed, because the tick was slow or the job
        was stopped, are skipped. After an exception it runs no more; the exception is raised when
        the child has ended, and `exit` is set by then. Descendants that outlive the child are
        neither waited for nor ended.
        """
        deadline_ns = time.monotonic_ns() + round(first_s * 1e9)
        failure: Exception | None = None
        held = tuple(_HELD)
        while self._status is None or (self._relay is not None and not self._relay.finished):
            if tick is None:
                info = _core.wait_signal(held, _NEVER_NS)
            elif time.monotonic_ns() < deadline_ns:
                info = _core.wait_signal(held, deadline_ns, notifier)
            else:
                info = None
            if info is None and tick is not None:
                try:
                    deadline_ns = _next_deadline(deadline_ns, round(tick() * 1e9))
                except Exception as error:
                    failure, tick = error, None
            if info is None:
                continue
            if self._status is None:
                self._on_signal(*info)
            elif info[0] in _FATAL and self._relay is not None:
                # Its reader (a pager) may never take the rest, and there is no child to ask.
                self._relay.join()
                break
        self._reap()
        self.exit = self._make_exit()
        if self._relay is not None:
            self._relay.close()
            self.warnings += self._relay.warnings
        if failure is not None:
            raise failure
        return self.exit

    def _on_signal(self, signo: int, code: int, sender: int) -> None:
        of_terminal = code == _SI_KERNEL
        if signo == signal.SIGCHLD:
            self._reap()
            return
        if signo == signal.SIGCONT:
            self._continue()
            return
        if signo == signal.SIGWINCH and self._relay is not None and self._relay.resize():
            # The child may have asked for the size before we had copied it: send it again.
            of_terminal = False
        if signo in _JOB_STOPS:
            self._stop_asked = True
        if signo == signal.SIGHUP and os.getsid(0) == os.getpid():
            # A hang-up goes to the session's leader alone (drivers/tty/tty_jobctrl.c): that is us,
            # and would have been the child.
            of_terminal = False
        if not of_terminal and sender != self.pid:
            self._send(signo)

    def _send(self, signo: int) -> None:
        try:
            os.kill(self.pid, signo)
        except PermissionError:  # a setuid program, such as sudo
            name = signal.strsignal(signo) or str(signo)
            text = (
                f"the child did not get a signal sent to the profiler ({name}): "
                "it runs as another user"
            )
            hint = f"send it as that user: sudo kill -{int(signo)} PID"
            self.warnings.append(warning("signal-not-delivered", text, hint))

    def _continue(self) -> None:
        """Resume the child, unless it was resumed with us: `fg` signals the group, `kill` only us.

        A SIGCONT is not passed on to a child that runs: `fg` and `bg` would send every one twice.
        """
        self._reap()
        self._stop_asked = False
        if self._relay is not None:
            self._relay.resize()
        if self._stopped and self._status is None:
            self._send(signal.SIGCONT)

    def _reap(self) -> None:
        """Collect every child that changed state, our own and adopted ones: no zombie stays."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                if pid == self.pid:
                    self._stop_with_child(os.WSTOPSIG(status))
            elif os.WIFCONTINUED(status):
                self._stopped = self._stopped and pid != self.pid
            else:
                self._cpu_s += usage.ru_utime + usage.ru_stime
                self._max_rss_bytes = max(self._max_rss_bytes, usage.ru_maxrss * 1024)
                if pid == self.pid:
                    self._status, self._ended_ns = status, time.monotonic_ns()
                    if self._relay is not None:
                        self._relay.wind_up()

    def _stop_with_child(self, signo: int) -> None:
        """Stop as the child did, so that the shell sees its job stopped.

        This happens after the child has stopped, so that a program that tidies the screen first
        (vim, less) has the time for it. After a bare SIGSTOP we go on: who stopped the child by its
        PID will resume that PID, and not ours.
        """
        self._stopped = True
        asked, self._stop_asked = self._stop_asked, False
        if (signo in _JOB_STOPS or asked) and signal.SIGCONT not in signal.sigpending():
            os.kill(os.getpid(), signal.SIGSTOP)

    def _make_exit(self) -> Exit:
        code = os.waitstatus_to_exitcode(self._status or 0)  # below 0: the signal that killed it
        peak_bytes = self._max_rss_bytes
        return Exit(
            code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            cpu_s=self._cpu_s,
            max_rss_bytes=peak_bytes if peak_bytes > self._floor_bytes else None,
            ended_ns=self._ended_ns,
            descendants_left=_children_left(),
        )


def _children_left() -> int | None:
    """How many children this process still has; None if there are some, but uncountable."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    count = 0
    try:
        tasks = os.listdir("/proc/self/task")
    except OSError:  # no descriptor is free
        return None
    for task in tasks:
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                count += len(file.read().split())
        except OSError:
            if task == str(os.getpid()):  # a kernel without CONFIG_PROC_CHILDREN
                return None
            # else a thread that has just ended
    return count


def _exec_failure(path: str, error: OSError) -> CommandError:
    if error.errno == errno.ENOENT:
        why = "the interpreter on its first line, or its loader, does not exist"
        fix = f"correct the first line: head -n 1 {path}"
    elif error.errno == errno.E2BIG:
        why, fix = "arguments and environment are too long", "pass them in a file"
    else:
        why, fix = os.strerror(error.errno or 0), f"run it without the profiler first: {path}"
    return CommandError(f"cannot execute {path}", status=126, why=why, fix=fix)
