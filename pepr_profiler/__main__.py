"""`python -m pepr_profiler` is the command line too.

A command that we are asked to run runs, whatever is missing: before it has been started, a fault of
ours makes this process become the command, which then runs unmeasured.
"""

from __future__ import annotations

import sys
import time

_BEGAN_NS = time.monotonic_ns()  # a mark is of now, not of when our imports are done

from pepr_profiler.errors import fix_of, reason_of  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> None:
    """The console script."""
    import gc

    gc.disable()  # imports leave no garbage: 10 ms less before the child starts
    try:
        from pepr_profiler.commands import main as run

        status = run(began_ns=_BEGAN_NS)
    except Exception as error:
        command = getattr(error, "command", None) or _command_of(sys.argv[1:])
        if command is None or _has_started():
            raise
        _become(command, error.__cause__ or error)
    _exit(status)


def _has_started() -> bool:
    """Whether the command runs or has run: it must not run twice."""
    spawning = sys.modules.get("pepr_profiler.recording.command")
    return spawning is not None and spawning.Child.spawned


def _command_of(arguments: list[str]) -> list[str] | None:
    """The command that is to be run, where nothing has looked at our options yet."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if "--" not in arguments or (verb in _OTHERS and arguments[0] == verb):
        return None
    return arguments[arguments.index("--") + 1 :] or None


_OTHERS = ("attach", "report", "compare", "score", "runs", "sensors", "mark", "daemon")


def _become(command: list[str], error: BaseException) -> NoReturn:
    """Executes the command in our place, with the signals that Python ignores as they were."""
    import errno
    import os
    import signal

    _say(f"{command[0]} runs unmeasured: {reason_of(error)}\n  fix: {fix_of(error)}")
    for signo in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signo, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, _given_environment())
    except OSError as failure:
        why = f"cannot execute {command[0]}: {failure.strerror}"
        _say(f"{why}\n  fix: check the spelling, or chmod +x it")
        os._exit(127 if failure.errno in (errno.ENOENT, errno.ENOTDIR) else 126)


def _given_environment() -> dict[str, str]:
    import os

    try:
        from pepr_profiler.recording.procfs import given_environment
    except Exception:  # what does not load here is why we are here
        return dict(os.environ)
    return given_environment()


def _say(text: str) -> None:
    try:
        sys.stderr.write(f"pepr-profile: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # nobody listens


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
