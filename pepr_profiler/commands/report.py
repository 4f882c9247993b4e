"""`pepr-profile report RUN`: a recorded run again, computed from its trace."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

import click

from pepr_profiler.commands.score import write_text


@click.command()
@click.argument("run")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="PEPR_STORE",
    metavar="DIR",
    help="Where runs live [PEPR_STORE].",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the summary as JSON; - is stdout.")
def report(run: str, *, store: Path | None, json_file: str | None) -> None:
    """Show RUN (an id, a unique prefix of one, or a run directory), finished or not."""
    from pepr_profiler.store import Store
    from pepr_profiler.summary import summarise

    summary = summarise(Store(store).find(run))
    if json_file is not None:
        write_summary(summary, json_file)
    else:
        show(summary, file=sys.stdout)


def show(summary: dict[str, Any], *, file: IO[str]) -> None:
    """Prints a summary: in colour and as wide as a terminal is, else plain at 80 columns."""
    from pepr_profiler.report.terminal import render_run

    tty = file.isatty()
    width = 80
    if tty:
        import shutil

        width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    color = tty and not os.environ.get("NO_COLOR")
    text = render_run(summary, width=width, color=color)
    click.echo(f"{text}\n", file=file, color=color)


def write_summary(summary: dict[str, Any], path: str) -> None:
    """Writes a summary as JSON; `-` is stdout."""
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    if path == "-":
        click.echo(text, nl=False)
    else:
        write_text(Path(path), text)
