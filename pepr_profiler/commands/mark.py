"""`pepr-profile mark NAME`: phases of a run, from shell scripts and programs in any language."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from pepr_profiler.commands import TEXT, store_option
from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.recording.launcher import rank_facts
from pepr_profiler.store.runs import Store, is_recording
from pepr_profiler.trace.events import EventWriter, read_events
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE, boot_id, read_run


@click.command()
@click.argument("words", nargs=-1, type=TEXT, metavar="[begin|end] NAME")
@click.option(
    "--run",
    "ref",
    envvar=RUN_DIR_VARIABLE,
    metavar="RUN",
    help="The run to mark [the one that this command is part of].",
)
@click.option(
    "--series",
    type=TEXT,
    metavar="KEY",
    help="Phases of one series follow each other [one series per calling process].",
)
@store_option
@click.pass_obj
def mark(
    began_ns: int | None,
    /,
    *,
    words: tuple[str, ...],
    ref: str | None,
    series: str | None,
    store: Path | None,
) -> None:
    """Begin or end a phase of a run that is being recorded.

    \b
    pepr-profile mark load          begins "load", ends the mark before it
    pepr-profile mark begin epoch   begins "epoch", inside or beside other phases
    pepr-profile mark end epoch     ends "epoch", whoever began it
    pepr-profile mark end           ends what this script began last

    A phase that is never ended ends with the run. The time of a mark is when this command was
    started. A mark reads no sensor: the energy of a phase is computed afterwards.
    """
    t_ns = time.monotonic_ns() if began_ns is None else began_ns
    action, name = _parsed(words)
    if ref is None:
        raise UsageError(
            "there is no run to mark",
            why=f"this command is not part of a run ({RUN_DIR_VARIABLE} is not set)",
            fix="give --run RUN: an id, the beginning of one, a run directory, or last",
        )
    directory = _recorded(ref, store)
    series = series or str(os.getppid())
    if action == "end":
        _require_open(directory, name, series)
    writer = EventWriter(directory, rank_facts=rank_facts)
    writer.mark(action, name, series=series, t_ns=t_ns)
    writer.close()
    if writer.lost:
        raise PeprError(
            f"{directory.name} could not be marked",
            why=f"nothing can be written to {directory}",
            fix="check its permissions and the free space",
        )


def _parsed(words: tuple[str, ...]) -> tuple[str, str | None]:
    """The action and the name; a first word `begin` or `end` is always the action."""
    action = words[0] if words and words[0] in ("begin", "end") else "next"
    names = words if action == "next" else words[1:]
    if len(names) == 1 and names[0]:
        return action, names[0]
    if action == "end" and not names:
        return action, None
    raise UsageError(
        "a mark needs one name",
        why=f"{len(names)} were given" if len(names) != 1 else "it is empty",
        fix="pepr-profile mark [begin|end] NAME; put a name with spaces in quotes",
    )


def _recorded(ref: str, store: Path | None) -> Path:
    """The directory of a run that is being recorded here and now, or raises UsageError."""
    directory = Path(ref)
    if ref == os.environ.get(RUN_DIR_VARIABLE) and directory.is_dir():
        # The run that we are part of: its command starts a moment before its run.json is written.
        if not (directory / "run.json").exists():
            return directory
    else:
        directory = Store(store).directory(ref)
    run = read_run(directory)
    if run.get("boot_id") != boot_id():
        raise UsageError(
            f"{directory.name} cannot be marked from here",
            why=f"it is of another machine or another boot (host {run.get('host')}), "
            "whose clock is not this one's",
            fix="mark it where it is recorded",
        )
    ended = (run.get("recording") or {}).get("window_ns", [None, None])[1] is not None
    if ended or not is_recording(directory, run):
        raise UsageError(
            f"{directory.name} cannot be marked",
            why="it has ended" if ended else "it is not being recorded any more",
            fix="mark a run while it is recorded",
        )
    return directory


def _require_open(directory: Path, name: str | None, series: str) -> None:
    """UsageError if no such phase is open: a misspelt name must not go unnoticed."""
    marked = [p for p in read_events(directory).phases if p.series and p.end_ns is None]
    if any(p.series == series if name is None else p.name == name for p in marked):
        return
    names = ", ".join(dict.fromkeys(p.name for p in marked))
    raise UsageError(
        f"there is no phase '{name}' to end" if name else "there is no phase to end",
        why=f"open are: {names}" if names else "no phase is open",
        fix="begin it first: pepr-profile mark begin NAME",
    )
