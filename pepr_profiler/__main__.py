"""`python -m pepr_profiler` is the command line too.

A command that we are asked to run runs, whatever is missing: before it has been started, a fault of
ours makes this process become the command, which then runs unmeasured.
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> None:
    """The console script."""
    began_ns = time.monotonic_ns()  # `mark` tells of now, not of when its imports are done
    import gc

    gc.disable()  # imports leave no garbage: 10 ms less before the child starts
    try:
        from pepr_profiler.commands import main as run

        status = run(began_ns=began_ns)
    except Exception as error:
        command = getattr(error, "command", None) or _command_of(sys.argv[1:])
        if command is None or getattr(error, "started", False):
            raise
        _become(command, error.__cause__ or error)
    _exit(status)


def _command_of(arguments: list[str]) -> list[str] | None:
    """The command that is to be run, where nothing has looked at our options yet."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if "--" not in arguments or (verb in _OTHERS and arguments[0] == verb):
        return None
    return arguments[arguments.index("--") + 1 :] or None


_OTHERS = ("attach", "report", "compare", "score", "runs", "sensors", "mark", "daemon")


def _become(command: list[str], error: BaseException) -> NoReturn:
    """Executes the command in our place, with the signals that Python ignores as they were."""
    import os
    import signal

    why = " ".join(str(error).split()) or type(error).__name__
    text = f"pepr-profile: {command[0]} runs unmeasured: {why}\n  fix: {_fix_of(error)}\n"
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # nobody listens
    for signo in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signo, signal.SIG_DFL)
    os.execvp(command[0], command)


def _fix_of(error: BaseException) -> str:
    import errno

    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return "allow more open files: ulimit -n 256"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
        return "give --store DIR (or PEPR_STORE) that can be written"
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return "allow more memory: ulimit -v unlimited"
    if number == errno.EAGAIN or "thread" in str(error):
        return "allow more processes and threads (ulimit -u) and memory (ulimit -v)"
    return "see: pepr-profile sensors; if it works there, report this as a bug of pepr-profiler"


def _exit(status: int) -> None:
    """As sys.exit, without taking NumPy apart first: 47 ms of 386 on a slow machine."""
    import atexit
    import os
    import threading

    if threading.active_count() == 1:
        atexit._run_exitfuncs()  # first, as what they print is to be flushed too
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):
            pass  # the interpreter knows what to say of it, and which status
        else:
            os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
