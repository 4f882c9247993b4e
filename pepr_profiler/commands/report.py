"""`pepr-profile report RUN`: a recorded run again, computed from its recording."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from pepr_profiler.commands import TEXT, complain, screen, store_option, write_stdout, write_text
from pepr_profiler.errors import UsageError
from pepr_profiler.report import FORMS

if TYPE_CHECKING:
    from pepr_profiler.study.progress import ProgressCurve
    from pepr_profiler.summary.timeline import Timeline

output_option = click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a file whose extension says what it is: "
    f"{', '.join(f'.{form}' for form in FORMS)} (repeatable).",
)
"""`-o FILE` of report and compare; the parameter is `outputs`, see `forms_of`."""

raw_csv_option = click.option(
    "--raw-csv",
    is_flag=True,
    help="Write texts to CSV as they are. Without it, one that a spreadsheet would take for a "
    "formula has a ' before it, and control characters are escapes.",
)
"""`--raw-csv` of what writes CSV; the parameter is `raw_csv`."""


def forms_of(outputs: Sequence[Path], *, pipe: str | None = None) -> list[tuple[Path, str]]:
    """Each file of -o with its form. UsageError, before anything is computed, if one cannot be.

    `pipe` is the form of what is there, is no regular file and has no extension, such as a named
    pipe or /dev/stdout.
    """
    from pepr_profiler.report.export import form_of

    def form(path: Path) -> str:
        if pipe and not path.suffix and path.exists() and not (path.is_file() or path.is_dir()):
            return pipe
        return form_of(path)

    return [(path, form(path)) for path in outputs]


def performance_options(command: Any) -> Any:
    """The options that say how a metric becomes a performance: from 0 to 1, higher is better."""
    transform = click.option(
        "--transform",
        type=click.Choice(["one-minus", "exp-neg"]),  # pepr.TRANSFORMS, whose module loads numpy
        help="Turn a lower-is-better metric x into 1-x or exp(-x).",
    )
    percent = click.option("--percent", is_flag=True, help="The metric is in percent.")
    return percent(transform(command))


@click.command()
@click.argument("run", required=False)
@click.option(
    "--job",
    type=TEXT,
    metavar="ID",
    help="Show a whole job, all its ranks and nodes: its id, a unique prefix of one, a run in it, "
    "or last.",
)
@store_option
@click.option("--json", "json_file", metavar="FILE", help="Write the summary as JSON; - is stdout.")
@output_option
@raw_csv_option
@click.option(
    "--metric",
    type=TEXT,
    metavar="NAME",
    help="Metric to show against the energy [the performance].",
)
@performance_options
def report(
    run: str | None,
    *,
    job: str | None,
    store: Path | None,
    json_file: str | None,
    outputs: tuple[Path, ...],
    raw_csv: bool,
    **wanted: Any,  # of progress.curve_of
) -> None:
    """Show RUN again (an id, a unique prefix of one, a run directory, or last), finished or not.

    All numbers are computed again from the recording, by the methods of this version. With --job
    all recordings of a job are put together: each device counts once, each rank for its share.

    \b
    -o run.html           a page: figures, tables, method; one file, no network
    -o power.pdf          power over time, for a paper (also .png, .svg)
    -o table.csv          total, components and phases (also .tsv, .parquet)
    -o table.tex          the same for a paper, with units and ± (also .md)
    -o run.json           the summary, as --json writes it
    """
    from pepr_profiler.store.runs import Store

    forms, metric = forms_of(outputs), wanted["metric"]
    if (run is None) == (job is None):
        raise UsageError(
            "report needs a run or a job" if run is None else "report shows a run or a job",
            why="neither was named" if run is None else "both were named",
            fix="pepr-profile report last, or pepr-profile report --job last",
        )
    recorded = Store(store)
    timeline = None
    if job is not None:
        from pepr_profiler.study.recorded_jobs import load_job

        recordings, summary = load_job(recorded, job)
        timeline = recordings.timeline(summary) if forms else None
    elif forms:
        from pepr_profiler.summary.summarise import with_timeline

        summary, timeline = with_timeline(recorded.directory(str(run)))
    else:
        from pepr_profiler.summary.summarise import summarise

        summary = summarise(recorded.directory(str(run)))
    if timeline is not None:
        curve = None
        if metric is not None:
            from pepr_profiler.study.progress import curve_of, name_of

            _require_logged(summary, metric)
            curve = curve_of(summary, **wanted)
            curve = curve and curve._replace(metric=name_of(metric, wanted["transform"]))
        for path, form in forms:
            write_text(path, _rendered(summary, timeline, form, curve, raw_csv))
            complain(f"wrote {path}")
    if json_file is not None:
        write_summary(summary, json_file)
    elif not forms:
        if metric is not None:
            _require_logged(summary, metric)
        show(summary, file=sys.stdout, curve=wanted, store=store)


def _rendered(
    summary: dict[str, Any],
    timeline: Timeline,
    form: str,
    curve: ProgressCurve | None,
    raw_csv: bool,
) -> str | bytes:
    from pepr_profiler.report.export import run_json, run_table

    kind = FORMS[form][0]
    if kind == "data":
        return run_json(summary)
    if kind == "page":
        from pepr_profiler.report.run_page import run_page

        return run_page(summary, timeline, curve=curve)
    if kind == "figure":
        from pepr_profiler.report.run_figures import run_figure

        return run_figure(timeline, form)
    return run_table(summary, form, raw_csv=raw_csv)


def _require_logged(summary: Mapping[str, Any], metric: str) -> None:
    """UsageError if a metric was not logged during the run."""
    logged = (summary["progress"] or {"metrics": {}})["metrics"]
    if metric not in logged:
        raise UsageError(
            f"run {summary['run_id']} logged no {metric}",
            why=f"it logged {', '.join(logged)}" if logged else "it logged no metric at all",
            fix="log it in the program, run.log(accuracy=…, epoch=…), or with --metric NAME=REGEX",
        )


def show(
    summary: dict[str, Any],
    *,
    file: IO[str],
    curve: Mapping[str, Any] | None = None,
    store: Path | None = None,
) -> None:
    """Prints a summary: in colour and as wide as the terminal, else plain and 80 columns wide.

    `curve` chooses what to show against the energy, as in `render_run`. `store` is the one that
    was asked for.
    """
    from pepr_profiler.report.run_text import render_run

    width, color = screen(file)
    named = "" if store is None or os.environ.get("PEPR_STORE") == str(store) else str(store)
    text = render_run(
        summary,
        width=width,
        color=color,
        curve=curve,
        store=named,
        comparable=_has_others(summary, store),
    )
    click.echo(f"{text}\n", file=file, color=color)


def _has_others(summary: Mapping[str, Any], store: Path | None) -> bool:
    """Whether a run's experiment has other models in the store, which `compare` can rank."""
    experiment = summary.get("experiment")
    if not (experiment and summary.get("performance")):
        return False  # nobody proposes to compare it
    from pepr_profiler.store.index import Filter
    from pepr_profiler.store.runs import Store
    from pepr_profiler.study.cohort import Cohort

    found = Store(store).find(Filter(experiment=experiment, state="done"))
    models = set(Cohort(found.rows, found).models())
    return len(models) > 1 and len({row.metric for row in found.rows}) == 1


def write_summary(summary: dict[str, Any], path: str) -> None:
    """Writes a summary as JSON; `-` is stdout."""
    from pepr_profiler.report.export import run_json

    text = run_json(summary)
    if path == "-":
        write_stdout(text)
    else:
        write_text(Path(path), text)
