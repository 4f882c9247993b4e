"""`pepr-profile score`: the PePR ranking of any table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pepr_profiler.commands import TEXT, complain, decorate, screen, write_stdout, write_text
from pepr_profiler.commands.report import performance_options, raw_csv_option
from pepr_profiler.errors import UsageError
from pepr_profiler.report import FORMS
from pepr_profiler.report.text import brief
from pepr_profiler.study.table import TextTable
from pepr_profiler.units import parse_range

if TYPE_CHECKING:
    from pepr_profiler.study import pepr
    from pepr_profiler.study.ranking import Bounds
    from pepr_profiler.study.study import Study


def range_options(form: str) -> Callable[[Any], Any]:
    """The options for a fixed normalisation range; see `limits_of` and `publish`."""
    file = click.Path(path_type=Path)
    options = (
        click.option("--range", "--bounds", "bounds", metavar="MIN:MAX",
                     help=f"Fixed normalisation range of the resource, {form}."),
        click.option("--save-range", "--save-bounds", "save_bounds", type=file, metavar="FILE",
                     help="Save the normalisation range, for --range-from later."),
        click.option("--range-from", "--bounds-from", "bounds_from", type=file, metavar="FILE",
                     help="Use the normalisation range that was saved in FILE."),
    )  # fmt: skip
    return partial(decorate, options=options)


def limits_of(
    bounds: str | None, bounds_from: Path | None, resources: Collection[str]
) -> pepr.MinMax | tuple[Bounds, ...] | None:
    """The range that was given, by value or as a file. UsageError where it cannot be used."""
    if bounds and bounds_from:
        raise UsageError(
            "--range and --range-from cannot be used together",
            why="a resource has one normalisation range",
            fix="leave one of them out",
        )
    if bounds_from:
        from pepr_profiler.study.study import read_bounds

        return read_bounds(bounds_from)
    limits = parse_range(bounds) if bounds else None
    if limits and len(resources) > 1:
        raise UsageError(
            "--range cannot be used with several resources",
            why="a range is in the unit of one resource",
            fix="score the resources one by one, each with its --range",
        )
    return limits


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option(
    "--performance", required=True, type=TEXT, metavar="COL", help="Column of the performance."
)
@click.option(
    "--resource",
    "resources",
    required=True,
    multiple=True,
    type=TEXT,
    metavar="COL",
    help="Column of a resource (repeatable: several are shown side by side).",
)
@click.option(
    "--name", type=TEXT, metavar="COL", help="Column of the names [the first column of text]."
)
@click.option(
    "--group",
    type=TEXT,
    metavar="COL",
    help="Rank the rows of each value of this column by themselves.",
)
@click.option(
    "--repeats", is_flag=True, help="Rows of one name are repeats of a model: rank their means."
)
@click.option(
    "--time",
    type=TEXT,
    metavar="COL",
    help="Column of the time that a row took, to find outliers with.",
)
@range_options("in the unit of its column: 150:900")
@performance_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the table with its scores."
)
@raw_csv_option
@click.option("--json", "json_file", metavar="FILE", help="Write the ranking as JSON; - is stdout.")
def score(
    table: Path,
    *,
    performance: str,
    resources: tuple[str, ...],
    name: str | None,
    group: str | None,
    repeats: bool,
    time: str | None,
    bounds: str | None,
    bounds_from: Path | None,
    save_bounds: Path | None,
    percent: bool,
    transform: str | None,
    output: Path | None,
    raw_csv: bool,
    json_file: str | None,
) -> None:
    """Score the rows of TABLE (CSV, or TSV by its extension; the first row names the columns).

    PePR = P / (1 + R). P is the performance. R is the resource, normalised to 0 for the row that
    took least and 1 for the one that took most, or to the --range that is given.

    The ranking goes to stdout unless -o or --json is given. -o adds the columns COL_n (R) and
    pepr_COL for every resource, and COL_clamped with a given range. Outliers, whose resource does
    not fit their time, are named, and the ranking is printed with and without them.
    """
    from pepr_profiler.study.study import Study

    resources = tuple(dict.fromkeys(resources))
    limits = limits_of(bounds, bounds_from, resources)
    if repeats and output:
        raise UsageError(
            "-o cannot be used with --repeats",
            why="-o adds a score to every row, but --repeats scores the means of several rows",
            fix="leave one of them out; --json FILE has the scores of the means",
        )
    rows = TextTable.read(table)
    wanted = (performance, *resources, *filter(None, (name, group, time)))
    rows.require(wanted)
    if output:
        rows.require_new(_added(resources, limits is not None))
    labels = rows.labels(name, taken=wanted)
    numeric = dict.fromkeys((performance, *resources))
    times = (time,) if time else tuple(rows.duration_columns())
    columns: dict[str, Any] = {
        column: rows.numbers(column, labels) for column in (*numeric, *times)
    }
    # Under keys that no column has: names and groups may be columns that are read as numbers, too.
    columns["\0"] = labels
    if group is not None:
        columns[f"\0{group}"] = rows.texts(group)
    study = Study.from_table(
        columns,
        performance=performance,
        resources=resources,
        name="\0",
        group=None if group is None else f"\0{group}",
        time=times,
        bounds=limits,
        percent=percent,
        transform=transform,
        repeats=repeats,
    )
    if output:
        added = _scores_by_row(study, rows.groups(group), resources, clamped=limits is not None)
        from pepr_profiler.report.export import spreadsheet_cell

        cell = None if raw_csv else spreadsheet_cell
        write_text(output, rows.text_with(added, output, cell=cell))
        complain(f"wrote {output}")
    publish(study, json_file=json_file, on_screen=output is None, save_bounds=save_bounds)


def _scores_by_row(
    study: Study,
    groups: dict[str | None, list[int]],
    resources: Sequence[str],
    *,
    clamped: bool,
) -> dict[str, list[Any]]:
    """The columns that -o adds, in the order of the table."""
    n = sum(map(len, groups.values()))
    added: dict[str, list[Any]] = {column: [None] * n for column in _added(resources, clamped)}
    for resource in resources:
        for group, members in groups.items():
            scores = study.rank(resource, group).scores
            cells = zip(members, scores.r_norm.tolist(), scores.pepr.tolist(), strict=True)
            for i, r_norm, value in cells:
                added[f"{resource}_n"][i] = repr(r_norm)
                added[f"pepr_{resource}"][i] = repr(value)
            if clamped:
                for i, outside in zip(members, scores.clamped.tolist(), strict=True):
                    added[f"{resource}_clamped"][i] = int(outside)
    return added


def publish(
    study: Study,
    *,
    json_file: str | None,
    on_screen: bool = True,
    save_bounds: Path | None = None,
    forms: Sequence[tuple[Path, str]] = (),
    load: Callable[[str], Mapping[str, Any]] | None = None,
    raw_csv: bool = False,
) -> None:
    """The rankings as JSON to a file or stdout, else (where `on_screen`) as tables on stdout.

    With `forms` (of `forms_of`) they go to those files instead; `load` is `study_page`'s. Runs that
    were left out, outliers, and what lies outside a given range are named on stderr.
    """
    from pepr_profiler.report.export import ranking_json
    from pepr_profiler.study.pepr import listed

    for who, why in study.left_out:
        complain(f"left out {brief(who)}: {brief(why)}")
    for ranking in study.rankings:
        for outlier in ranking.outliers:
            rows = "runs" if ranking.run_ids else "rows"
            few = len(outlier.names) == 1
            complain(
                f"warning: {len(outlier.names)} of {_counted(ranking.n, ranking.names)} {rows} "
                f"{'is an outlier' if few else 'are outliers'} in {brief(outlier.what)}: "
                f"{listed(list(map(brief, outlier.names)))}"
                f"\n  why: {outlier.why}; a wrong reading stretches the normalisation range and so"
                f" changes every R; the ranking is also printed without {'it' if few else 'them'}"
                f"\n  fix: check {'it' if few else 'them'} and leave out what is wrong, or fix the"
                " range with --range MIN:MAX"
            )
        clamped = [n for n, c in zip(ranking.names, ranking.scores.clamped, strict=True) if c]
        if clamped:
            complain(
                f"{len(clamped)} {ranking.of}{'s' * (len(clamped) > 1)} outside the normalisation"
                f" range, R is set to 0 or 1: {listed(list(map(brief, clamped)))}"
            )
    if save_bounds:
        write_text(save_bounds, json.dumps(study.bounds_data(), indent=2) + "\n")
        complain(f"wrote {save_bounds}")
    for path, form in forms:
        write_text(path, _rendered(study, form, load, raw_csv))
        complain(f"wrote {path}")
    if json_file == "-":
        write_stdout(ranking_json(study))
    elif json_file:
        write_text(Path(json_file), ranking_json(study))
    elif on_screen and not forms:
        width, color = screen(sys.stdout)
        width = max(width, 80)  # a narrower terminal wraps the lines, instead of losing the scores
        click.echo("\n".join(_screens(study, width=width, color=color)), nl=False, color=color)


def _rendered(
    study: Study, form: str, load: Callable[[str], Mapping[str, Any]] | None, raw_csv: bool
) -> str | bytes:
    from pepr_profiler.report.export import ranking_json, ranking_table

    kind = FORMS[form][0]
    if kind == "data":
        return ranking_json(study)
    if kind == "page":
        from pepr_profiler.report.study_page import study_page

        return study_page(study, load=load)
    if kind == "figure":
        from pepr_profiler.report.study_figures import study_figure

        return study_figure(study, form)
    return ranking_table(study.rows(), form, raw_csv=raw_csv)


def _screens(study: Study, *, width: int, color: bool) -> Iterator[str]:
    """One per group: its ranking, and again without outliers; or several side by side."""
    from pepr_profiler.report.ranking_text import render_ranking, render_side_by_side

    for rankings in study.by_group().values():
        if len(rankings) > 1:
            yield render_side_by_side(rankings, width=width, color=color)
            continue
        yield render_ranking(rankings[0], width=width, color=color)
        if rankings[0].without is not None:
            text = render_ranking(rankings[0].without, width=width, color=color)
            n = sum(len(outlier.names) for outlier in rankings[0].outliers)
            yield f"Without the {n} outlier{'s' * (n > 1)}:\n\n{text}"


def _added(resources: Sequence[str], clamped: bool) -> list[str]:
    forms = ("{}_n", "pepr_{}", "{}_clamped")[: 3 if clamped else 2]
    return [form.format(column) for column in resources for form in forms]


def _counted(n: Any, names: Sequence[str]) -> int:
    return len(names) if n is None else int(n.sum())
