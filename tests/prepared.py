"""Commands as processes that need not load the product: they are forked by one that has.

Most of what a short command costs is to load Python, NumPy and matplotlib, and the tests call
commands that only read hundreds of times. `Cli` has them forked by a server. A command that records
is always started anew, and so is whatever a test gives to `Cli.start`.

    python tests/prepared.py FD    the server, which takes requests from that socket
"""

from __future__ import annotations

import atexit
import io
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NoReturn

MOST_BYTES = 1 << 16
FEW = 2
"""So many calls with variables of a kind are not worth a server that was started with them."""

STARTING = "PYTHON", "LC_", "LANG", "LOCPATH", "LD_", "OPENBLAS_", "OMP_", "MPL"
"""Variables that say how Python and its libraries start begin so."""

LOADED = "commands daemon_client energy report store study summary trace"
OTHERS_LOADED = ("jinja2", "matplotlib.backends.backend_svg", "matplotlib.figure", "rich.table")


def run(
    arguments: Sequence[str],
    env: Mapping[str, str],
    folder: str | Path,
    *,
    bounds: tuple[int, int] | None,
    timeout_s: float,
) -> tuple[int, bytes, bytes] | None:
    """`pepr-profile` with these arguments: its status and both outputs.

    None if it is to be started as usual: a server does not pay, or text is no UTF-8 or too long.
    """
    starting = tuple(sorted(item for item in env.items() if item[0].startswith(STARTING)))
    _calls[starting] += 1
    if _calls[starting] <= FEW:
        return None
    request = json.dumps([list(arguments), dict(env), str(Path(folder).absolute()), bounds])
    if len(request) > MOST_BYTES or "\\udc" in request:
        return None
    with ExitStack() as stack:
        our_out, their_out = os.pipe()
        our_err, their_err = os.pipe()
        ours, theirs = socket.socketpair()
        stack.callback(os.close, our_out)
        stack.callback(os.close, our_err)
        stack.enter_context(ours)
        socket.send_fds(
            _server(starting), [request.encode()], [their_out, their_err, theirs.fileno()]
        )
        theirs.close()
        os.close(their_out)
        os.close(their_err)
        parts = {our_out: b"", our_err: b"", ours.fileno(): b""}
        waiting = set(parts)
        end_s = time.monotonic() + timeout_s
        while waiting:
            ready = select.select(waiting, [], [], max(0.0, end_s - time.monotonic()))[0]
            if not ready:
                os.kill(int(parts[ours.fileno()].split()[0]), signal.SIGKILL)
                raise subprocess.TimeoutExpired(list(arguments), timeout_s)
            for fd in ready:
                data = os.read(fd, 1 << 16)
                parts[fd] += data
                if not data:
                    waiting.remove(fd)
        status = int(parts[ours.fileno()].split()[1])
        return os.waitstatus_to_exitcode(status), parts[our_out], parts[our_err]


_calls: Counter[tuple[tuple[str, str], ...]] = Counter()


@cache
def _server(variables: tuple[tuple[str, str], ...]) -> socket.socket:
    """This process's server that was started with these variables; it ends with us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # The shell ends at once: some tests count the children of this process.
        command = ["sh", "-c", '"$@" &', "sh", sys.executable, __file__, str(theirs.fileno())]
        subprocess.run(
            command,
            env={"PATH": os.environ["PATH"], **dict(variables)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            check=True,
        )
    atexit.register(ours.close)
    return ours


def bound(seconds: int, memory_bytes: int) -> None:
    """Ends this process after so long, and lets it have no more memory than that."""
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


# --- in the server --------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> None:
    for package in LOADED.split():
        module = import_module(f"pepr_profiler.{package}")
        for path in Path(module.__path__[0]).glob("[a-z]*.py"):
            import_module(f"{module.__name__}.{path.stem}")
    for name in OTHERS_LOADED:
        with suppress(ImportError):
            import_module(name)
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, 2 * MOST_BYTES, 3)
        if not data:
            return
        if os.fork() == 0:
            requests.close()
            _supervise(data, *descriptors)
        for fd in descriptors:
            os.close(fd)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _supervise(data: bytes, out: int, err: int, answer: int) -> NoReturn:
    """Forks the command, and says its PID and then its status."""
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        _become(data, out, err)
    os.close(out)
    os.close(err)
    os.write(answer, b"%d " % pid)
    os.write(answer, b"%d" % os.waitpid(pid, 0)[1])
    os._exit(0)


def _become(data: bytes, out: int, err: int) -> NoReturn:
    """The command, as Python would start it."""
    arguments, env, folder, bounds = json.loads(data)
    arguments = [_as_here(text) for text in arguments]
    for fd, ours in ((out, 1), (err, 2)):
        os.dup2(fd, ours)
        os.close(fd)
    os.environ.clear()
    os.environ.update({_as_here(name): _as_here(value) for name, value in env.items()})
    os.chdir(_as_here(folder))
    time.tzset()
    for name, fd in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)  # of the encoding that Python has chosen when it started
        binary = open(fd, "wb", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(binary, old.encoding, old.errors, line_buffering=fd == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv[1:] = arguments
    if bounds:
        bound(*bounds)
    status = 1
    try:
        import_module("pepr_profiler.__main__").main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _as_here(text: str) -> str:
    """As Python decodes it when it starts, whatever the encoding of its locale is."""
    return os.fsdecode(text.encode())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        _serve(given)
