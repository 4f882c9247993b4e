"""The command line: one module per command, imported when used. Nothing else prints or exits."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar

import click

from pepr_profiler import __version__
from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.report.text import encode_readably, printable_lines
from pepr_profiler.trace.files import replace_file
from pepr_profiler.units import utf8_text

COMMANDS = {
    "run": "Run a command and measure it; short: `pepr-profile -- CMD…`.",
    "attach": "Measure running processes and everything that they start.",
    "report": "Show a recorded run again, computed from its recording.",
    "compare": "Rank recorded runs by PePR.",
    "score": "Rank the rows of any table by PePR.",
    "runs": "List, filter, change, remove and export recorded runs.",
    "sensors": "List what can be measured here, and why the rest cannot.",
    "mark": "Begin or end a phase of a run, from a script or any program.",
    "daemon": "Read root's counters for all users of this machine.",
}


class _Text(click.types.StringParamType):
    """Text that is no path: UTF-8, also where the locale's encoding is another."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return utf8_text(super().convert(value, param, ctx))


TEXT = _Text()
"""The type of options that name runs' facts, metrics, columns and phases."""

store_option = click.option(
    "--store",
    # A store that is closed to us is no usage error: the command runs, and is kept elsewhere.
    type=click.Path(path_type=Path, readable=False),
    envvar="PEPR_STORE",
    metavar="DIR",
    help="Where runs are kept [PEPR_STORE, else the user's data directory].",
)
"""Every command that has to do with recorded runs has it; the parameter is `store: Path | None`."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def decorate(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    """The command with options, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


_UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE}
)
"""How writing to stdout fails: a full disk, a terminal that hung up, a reader that went away."""


class _Commands(click.Group):
    """Imports a command's module when it is called, and lists the others without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"pepr_profiler.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pepr-profile")
def cli() -> None:
    """What a training run cost in energy, time, memory and carbon, and whether it was worth it.

    \b
    pepr-profile -- python train.py
    pepr-profile --experiment sizes --metric acc='acc ([0-9.]+)' -- ./train.py
    pepr-profile attach 4121
    pepr-profile compare --experiment sizes
    """


def say(text: str, *, err: bool = False) -> None:
    """Prints lines of plain text, which may hold names from damaged or foreign runs.

    What would move the cursor, hide text or change colours is printed as an escape. Whatever is for
    people goes through here, or through report.text.drawn, which has colours of its own.
    """
    click.echo(printable_lines(text), err=err)


def complain(text: str) -> None:
    """Prints a message of the profiler on stderr.

    Lines after the first are indented, so that no name with a line end in it looks like a message.
    """
    first, *others = f"pepr-profile: {text}".split("\n")
    others = [line if line.startswith("  ") else f"  {line}" for line in others]
    with whoever_listens(sys.stderr):
        say("\n".join([first, *others]), err=True)


@contextmanager
def whoever_listens(stream: TextIO) -> Iterator[None]:
    """Within the block, what cannot be written to `stream` is dropped without an error.

    A reader that went away, a full disk or a terminal that hung up must not change the exit status,
    which is the child's. What is still buffered is dropped too: it would fail again at exit, and
    turn the status into 120.
    """
    try:
        yield
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), stream.fileno())


@contextmanager
def written_output() -> Iterator[None]:
    """Within the block, what cannot be written to stdout is a PeprError with the reason.

    A reader that went away is a BrokenPipeError. What is still buffered is dropped in either case.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # An error with a file name is about a file that a command opened.
        if error.filename is not None or error.errno not in _UNWRITABLE:
            raise
        with whoever_listens(sys.stdout):
            pass
        if isinstance(error, BrokenPipeError):
            raise
        raise PeprError(
            "cannot write to standard output",
            why=error.strerror or str(error),
            fix="free some space, or write elsewhere",
        ) from error


def main(arguments: list[str] | None = None, *, began_ns: int | None = None) -> int:
    """Runs the command line; returns the exit status (docs/cli.md).

    `began_ns` is when the process began to run, for commands that need that instant.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # our caller closed it: what we print goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        encode_readably(getattr(sys, name))
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
        arguments = ["run", *arguments]
    try:
        with written_output():
            result = cli.main(
                arguments or ["--help"],
                prog_name="pepr-profile",
                standalone_mode=False,
                obj=began_ns,
            )
    except PeprError as error:
        complain(str(error))
        return error.status
    except BrokenPipeError:
        return 1  # as Click itself does
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip("\n"), err=True)
        return error.exit_code
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):  # not Ctrl-C: a file of Python's own is damaged
            raise error.__context__ from None
        complain("interrupted")
        return 130
    return result if isinstance(result, int) else 0


def moves_cursor(file: IO[str]) -> bool:
    """Whether `file` is a terminal that understands escape codes."""
    return file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def screen(file: IO[str]) -> tuple[int, bool]:
    """The width of a report on `file` in cells, and whether it has colours.

    The width is the terminal's, at most 120, and 80 where there is none. Colours follow NO_COLOR
    (no-color.org), TERM and FORCE_COLOR (force-color.org), in this order.
    """
    width = 80
    if file.isatty():
        import shutil

        width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown"):
        return width, False
    return width, bool(os.environ.get("FORCE_COLOR")) or file.isatty()


def write_stdout(data: str | bytes) -> None:
    """Writes data, which is UTF-8 whatever the encoding of stdout is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(_as_bytes(data))
    sys.stdout.buffer.flush()


def _as_bytes(data: str | bytes) -> bytes:
    """UTF-8; bytes of a file name that are no UTF-8 are escapes, as JSON has them."""
    if isinstance(data, bytes):
        return data
    return utf8_text(data).encode("utf-8", "backslashreplace")


def require_writable(path: Path, *, fix: str) -> None:
    """A usage error, before anything starts, if a file could not be written."""
    target = path if path.exists() else path.resolve().parent
    if path.is_dir():
        why = "it is a folder"
    elif not target.exists():
        why = f"there is no folder {target}"
    elif not os.access(target, os.W_OK):
        why = f"you may not write to {target}"
    else:
        return
    raise UsageError(f"cannot write {path}", why=why, fix=fix)


def write_text(path: Path, text: str | bytes) -> None:
    """Writes `path` whole or not at all; what is no regular file (a pipe) is written directly."""
    data = _as_bytes(text)
    try:
        # A rename onto /dev/stdout or a named pipe would replace the device, not fill it.
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path = path.resolve()  # through a link, so that the link stays one
        replace_file(path, data)
    except OSError as error:
        raise PeprError(
            f"cannot write {path}",
            why=error.strerror or str(error),
            fix="free some space, or write elsewhere"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "name a file in a directory that exists and is writable",
        ) from error
