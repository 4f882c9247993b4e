"""The command line: one module a verb, imported when used. Only here is printed and exited."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TextIO

import click

from pepr_profiler import __version__
from pepr_profiler.errors import PeprError

VERBS = {
    "run": "Run a command and measure it; `pepr-profile -- CMD…` is short for it.",
    "attach": "Measure running processes and all that they start.",
    "report": "Show a recorded run again, computed from its trace.",
    "compare": "Rank recorded runs by PePR.",
    "score": "Rank the rows of any table by PePR.",
    "runs": "List, filter, change, remove and export recorded runs.",
    "sensors": "Say what can be measured here, and why the rest cannot.",
    "mark": "Begin or end a phase of a run, from a script or any program.",
    "daemon": "Read root's counters for all users of this machine.",
}


store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="PEPR_STORE",
    metavar="DIR",
    help="Where runs live [PEPR_STORE, else the user's data directory].",
)
"""Every verb that has to do with recorded runs has it; the parameter is `store: Path | None`."""

_UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE}
)
"""What stdout may answer: a full disk, a terminal that was hung up, a reader that went away."""


class _Verbs(click.Group):
    """Imports a verb's module when the verb is called, and tells of the others without it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = import_module(f"pepr_profiler.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pepr-profile")
def cli() -> None:
    """What a training run cost in energy, time, memory and carbon, and whether it was worth it.

    \b
    pepr-profile -- python train.py
    pepr-profile --experiment sizes --metric acc='test acc: ([0-9.]+)' -- python train.py
    pepr-profile attach 4121
    pepr-profile compare --experiment sizes
    """


def complain(text: str) -> None:
    """Says something on stderr, in the profiler's name."""
    with whoever_listens(sys.stderr):
        click.echo(f"pepr-profile: {text}", err=True)


@contextmanager
def whoever_listens(stream: TextIO) -> Iterator[None]:
    """Within the block, nothing that cannot be said on `stream` fails or is tried again.

    A reader that went away, a full disk or a hung-up terminal must not cost the child's status.
    What is still buffered would fail at exit too, and turn the status into 120.
    """
    try:
        yield
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), stream.fileno())


@contextmanager
def written_output() -> Iterator[None]:
    """What the block says on stdout is there behind it, else PeprError says why it is not.

    BrokenPipeError: whoever read it went away. What is still buffered is dropped in either case.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # What has a name is a file that a verb opened.
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
    """Runs the command line; returns the exit status (docs/design.md, Contract).

    `began_ns` is when the process began to run, for verbs that tell of that instant.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by our caller: what we say goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    if arguments and arguments[0] not in (*VERBS, "-h", "--help", "--version"):
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
        return 1  # as Click has it where it meets one
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        complain("interrupted")
        return 130
    return result if isinstance(result, int) else 0


def write_text(path: Path, text: str | bytes) -> None:
    """Write `path` whole or not at all; what is not a regular file (a pipe) is written directly."""
    data = text.encode() if isinstance(text, str) else text
    try:
        # A rename onto /dev/stdout or a named pipe would replace the device, not fill it.
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path = path.resolve()  # through a link, so that the link stays one
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            draft.write_bytes(data)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise PeprError(
            f"cannot write {path}",
            why=error.strerror or str(error),
            fix="free some space, or write elsewhere"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "name a file in a directory that exists and is writable",
        ) from error
