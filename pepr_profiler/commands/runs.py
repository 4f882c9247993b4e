"""`pepr-profile runs`: lists, filters, changes, removes and exports recorded runs."""

from __future__ import annotations

import functools
import json
import math
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pepr_profiler import units
from pepr_profiler.commands import (
    TEXT,
    complain,
    decorate,
    say,
    store_option,
    write_stdout,
    write_text,
)
from pepr_profiler.commands.report import raw_csv_option
from pepr_profiler.errors import UsageError
from pepr_profiler.report import EXPORTS
from pepr_profiler.report.text import printable
from pepr_profiler.store.facts import STATES, state_of
from pepr_profiler.store.index import Filter
from pepr_profiler.store.runs import Store
from pepr_profiler.units import format_duration, format_number, format_quantity, format_with_u

if TYPE_CHECKING:
    from pepr_profiler.store.facts import Facts
    from pepr_profiler.store.index import Damaged

_FACTS = ("name", "experiment")
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SHOWN = 5  # of the damaged runs; the others are counted


@click.group()
def runs() -> None:
    """List recorded runs, change, remove and export them.

    RUN is a run's id, the beginning of one that no other has, its directory, or `last`.
    """


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that choose runs; the parameter is `wanted: Filter`."""

    @functools.wraps(command)
    def with_filter(*arguments: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in Filter.__dataclass_fields__}
        for name in ("since", "until"):
            if given[name] is not None:
                given[name] = _instant(given[name], option=f"--{name}")
        if given["provenance"] == "estimated":
            given["provenance"] = "modelled"  # as summaries call it
        return command(*arguments, wanted=Filter(**given), **options)

    return decorate(with_filter, _FILTERS)


_FILTERS = (
    click.option("--experiment", type=TEXT, metavar="NAME", help="Only runs of this experiment."),
    click.option("--name", type=TEXT, metavar="GLOB", help="Only runs of such a name: 'resnet*'."),
    click.option("--host", type=TEXT, metavar="GLOB", help="Only runs on such a host: 'node*'."),
    click.option(
        "--since", metavar="WHEN", help="Only runs begun at or after: 2026-11-20, 7d (ago)."
    ),
    click.option(
        "--until", metavar="WHEN", help="Only runs begun before: 2026-11-20T12:00 (UTC), 12h."
    ),
    click.option(
        "--provenance",
        type=click.Choice(["measured", "estimated", "modelled", "mixed"]),
        help="Only runs of such an energy; modelled is an older word for estimated.",
    ),
    click.option("--state", type=click.Choice(STATES), help="Only runs that ended so."),
)


def _instant(text: str, *, option: str) -> str:
    """ISO-8601 in UTC, as `started_at`, from a date, a time (UTC if it has no zone), or an age."""
    count = text.rstrip("smindhw")
    unit = text[len(count) :]
    try:
        if unit in _UNITS:
            at = datetime.now(timezone.utc) - timedelta(seconds=float(count) * _UNITS[unit])
        else:
            # Python 3.10 does not know the Z.
            at = datetime.fromisoformat(text.removesuffix("Z"))
            at = at.replace(tzinfo=timezone.utc) if at.tzinfo is None else at
        return at.astimezone(timezone.utc).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError):
        raise UsageError(
            f"{option} {text!r} cannot be read",
            why="a date, a time or an age (s, min, h, d, w) is expected",
            fix=f"write for example {option} 2026-11-20, 2026-11-20T12:30 (UTC) or 7d",
        ) from None


def complain_of_damaged(damaged: tuple[Damaged, ...]) -> None:
    """Names on stderr what lies in a store and cannot be read as a run."""
    for run in damaged[:_SHOWN]:
        complain(f"left out {run.run_id}: {run.why}\n  fix: {run.fix}")
    if len(damaged) > _SHOWN:
        more = len(damaged) - _SHOWN
        complain(f"left out {more} more damaged runs; see: pepr-profile runs list")


@runs.command("list")
@filter_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, the damaged runs included.")
@store_option
def list_runs(*, wanted: Filter, as_json: bool, store: Path | None) -> None:
    """List runs, one per line, oldest first.

    Those that cannot be read are last, with the reason.
    """
    found = Store(store).find(wanted)
    if as_json:
        sys.stdout.write('{"runs": [')
        for index, run in enumerate(found):
            sys.stdout.write(f"{',' * bool(index)}\n{json.dumps(run)}")
        damaged = [vars(run) for run in found.damaged]
        sys.stdout.write(f'\n], "damaged": {json.dumps(damaged)}}}\n')
        return
    sys.stdout.writelines(map(_line, found.rows))
    for bad in found.damaged:
        sys.stdout.write(f"{printable(bad.run_id):<28} damaged: {printable(bad.why)}\n")
    if not len(found) and not found.damaged:
        all_of_them = wanted == Filter()
        complain(f"no {'' if all_of_them else 'such '}runs in {Store(store).path}")


def _line(row: Facts) -> str:
    # Without an exit code: it was attached to, and only its parent gets that.
    state = "attached" if row.exit_code is None else f"exit {row.exit_code:.0f}"
    state = "incomplete" if row.state == "incomplete" else state
    joules, duration = format_with_u(row.total_j, row.u_j, "J"), format_duration(row.duration_s)
    metric = "" if row.metric is None else f"{row.metric} {format_number(row.performance)}"
    text = f"{row.run_id:<28} {row.started_at[:16]}  {duration:>11}  {joules:>18}  {state:<10} "
    return f"{printable(text + metric).rstrip()}\n"


@runs.command("show")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print the whole summary as JSON.")
@store_option
def show_run(run: str, *, as_json: bool, store: Path | None) -> None:
    """Show the stored facts of one run.

    They are not computed again, as `report` does.
    """
    recorded = Store(store)
    directory = recorded.directory(run)
    facts = recorded.load_from(directory)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for key, value in _facts(facts, directory):
        say(f"{key:<12} {printable(value)}")


def _facts(run: dict[str, Any], directory: Path) -> list[tuple[str, str]]:
    energy, carbon, memory = run["energy"], run["carbon"], run["memory"]
    gpu_bytes = memory["gpu_peak_bytes"]
    ended = f" with status {run['exit_code']}" if run["exit_code"] is not None else ""
    joules = format_with_u(energy["total_j"], energy["u_j"], "J")
    rows: list[tuple[str, str | None]] = [
        ("run", run["run_id"]),
        ("name", run.get("name")),  # one that did not end may lack these and what follows
        ("experiment", run.get("experiment")),
        ("job", run.get("job")),
        ("command", shlex.join(run.get("command") or ())),
        ("host", run.get("host")),
        ("began", run.get("started_at")),
        ("lasted", format_duration(run["duration_s"])),
        ("state", state_of(run) + ended),
        ("energy", f"{joules}, {units.format_provenance(energy['provenance'])}"),
        *(
            (
                "",
                f"{part['id']}  {format_with_u(part['job_j'], part['u_j'], 'J')}  {part['source']}"
                + ("" if part["in_total"] else ", not in the total"),
            )
            for part in energy["components"]
        ),
        (
            "carbon",
            carbon and f"{format_quantity(carbon['g_co2e'], 'g')} CO2e, {carbon.get('source')}",
        ),
        ("memory", format_quantity(memory["peak_rss_bytes"], "B")),
        ("GPU memory", None if gpu_bytes is None else format_quantity(gpu_bytes, "B")),
        *(("metric", f"{name} = {format_number(value)}") for name, value in run["metrics"].items()),
        *(("warning", warning["text"]) for warning in run.get("warnings") or ()),
        ("directory", str(directory)),
    ]
    return [(key, value) for key, value in rows if value is not None]


@runs.command("set")
@click.argument("run")
@click.argument("values", nargs=-1, required=True, type=TEXT, metavar="NAME=VALUE...")
@store_option
def set_values(run: str, values: tuple[str, ...], *, store: Path | None) -> None:
    """Add metrics to a run: `set RUN acc=0.91`.

    `name=TEXT` and `experiment=TEXT` change its name and its experiment (`experiment=` takes it out
    of one); its id stays.
    """
    metrics: dict[str, float] = {}
    facts: dict[str, str | None] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if equals and name in _FACTS and (value or name == "experiment"):
            facts[name] = value or None
            continue
        try:
            metrics[name] = float(value)
        except ValueError:
            metrics[name] = math.nan
        if not equals or not name or not math.isfinite(metrics[name]):
            raise UsageError(
                f"cannot read {text!r}",
                why="a metric is NAME=VALUE with a finite number; a name is name=TEXT",
                fix=f"pepr-profile runs set {run} accuracy=0.91",
            )
    summary = Store(store).set(run, metrics=metrics, facts=facts)
    said = [f"{k}={v or ''}" for k, v in facts.items()]
    said += [f"{k}={v:g}" for k, v in metrics.items()]
    say(printable(f"{summary['run_id']}: {', '.join(said)}"), err=True)


@runs.command("rm")
@click.argument("refs", nargs=-1, required=True, metavar="RUN...")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Also a run that may still be recorded.")
@store_option
def remove_runs(refs: tuple[str, ...], *, yes: bool, force: bool, store: Path | None) -> None:
    """Delete runs of the store, after asking.

    Nothing outside the store is touched.
    """
    recorded = Store(store)
    doomed = list(dict.fromkeys(recorded.removable(ref, force=force) for ref in refs))
    names = ", ".join(printable(directory.name) for directory in doomed)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                f"{names} not removed",
                why="there is no terminal to ask for confirmation",
                fix="confirm it with --yes",
            )
        click.confirm(f"Delete {names}?", abort=True, err=True)
    for directory in doomed:
        recorded.remove(directory)
    say(f"removed {names}", err=True)


@runs.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@filter_options
@click.option(
    "--format",
    "form",
    type=click.Choice(EXPORTS),
    help="The form of FILE [its extension].",
)
@raw_csv_option
@store_option
def export_runs(
    file: Path, *, wanted: Filter, form: str | None, raw_csv: bool, store: Path | None
) -> None:
    """Write runs to FILE as a table.

    It has one row per run, oldest first. - is stdout, as CSV unless --format says otherwise. The
    names of the columns contain the units. Metrics are columns metric_NAME; what is unknown is
    empty. A .tex or .md table is for a paper: fewer columns, units in the headings, ± beside.
    """
    from pepr_profiler.report.export import require_packages, runs_table

    form = form or ("csv" if str(file) == "-" else file.suffix.removeprefix("."))
    if form not in EXPORTS:
        raise UsageError(
            f"the form of {file} is not known",
            why=f"its extension is none of {', '.join(EXPORTS)}",
            fix="give it one of these extensions, or --format csv",
        )
    require_packages(form)
    found = Store(store).find(wanted)
    data = runs_table(found, form, raw_csv=raw_csv)
    if str(file) == "-":
        write_stdout(data)
    else:
        write_text(file, data)
        complain(f"wrote {len(found)} runs to {file}")
    complain_of_damaged(found.damaged)
