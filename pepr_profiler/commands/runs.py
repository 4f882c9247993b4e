"""`pepr-profile runs`: what has been recorded."""

from __future__ import annotations

from pathlib import Path

import click

from pepr_profiler.errors import UsageError

_store = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="PEPR_STORE",
    metavar="DIR",
    help="Where runs live [PEPR_STORE].",
)


@click.group()
def runs() -> None:
    """List recorded runs, set their metrics."""


@runs.command("list")
@click.option("--experiment", metavar="NAME", help="Only this experiment's.")
@_store
def list_runs(*, experiment: str | None, store: Path | None) -> None:
    """One line a run, oldest first."""
    from pepr_profiler.store import Store
    from pepr_profiler.units import format_duration, format_quantity, format_with_u

    found = Store(store)
    count = 0
    for summary in found.runs(experiment=experiment):
        count += 1
        energy, performance = summary["energy"], summary["performance"]
        code = summary["exit_code"]
        state = "attached" if code is None else f"exit {code}"  # whose end is not ours to know
        state = state if summary["complete"] else "incomplete"
        joules = format_quantity(None, "J")
        if energy["total_j"] is not None:
            joules = format_with_u(energy["total_j"], energy["u_j"], "J")
        metric = f"{performance['metric']} {performance['value']:g}" if performance else ""
        began, duration = summary["started_at"][:16], format_duration(summary["duration_s"])
        row = f"{summary['run_id']:<28} {began}  {duration:>11}  {joules:>18}  {state:<10} {metric}"
        click.echo(row.rstrip())
    if not count:
        click.echo(f"no runs in {found.path}", err=True)


@runs.command("set")
@click.argument("run")
@click.argument("metrics", nargs=-1, required=True, metavar="NAME=VALUE...")
@_store
def set_metrics(run: str, metrics: tuple[str, ...], *, store: Path | None) -> None:
    """Add metrics to a run after it has ended: `runs set RUN accuracy=0.91`."""
    import math

    from pepr_profiler.store import Store

    values = {}
    for text in metrics:
        name, equals, number = text.partition("=")
        try:
            values[name] = float(number)
        except ValueError:
            values[name] = math.nan
        if not equals or not name or not math.isfinite(values[name]):
            raise UsageError(
                f"cannot read {text!r}",
                why="a metric is NAME=VALUE with a finite number",
                fix=f"pepr-profile runs set {run} accuracy=0.91",
            )
    summary = Store(store).set_metrics(run, values)
    click.echo(
        f"{summary['run_id']}: {', '.join(f'{k}={v:g}' for k, v in values.items())}", err=True
    )
