"""`pepr-profile score`: the PePR ranking of any table."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pepr_profiler.commands import TEXT, complain, decorate, screen, write_stdout, write_text
from pepr_profiler.commands.report import (
    forms_of,
    output_option,
    performance_options,
    raw_csv_option,
)
from pepr_profiler.errors import UsageError
from pepr_profiler.report import FIGURES, FORMS
from pepr_profiler.report.text import brief
from pepr_profiler.study.table import TextTable
from pepr_profiler.units import parse_range

if TYPE_CHECKING:
    from pepr_profiler.study import pepr
    from pepr_profiler.study.analysis import Analysis
    from pepr_profiler.study.ranking import Bounds, Ranking
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


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for beyond rankings; see `analysis_options`."""

    class_by: str | None
    size_by: str | None
    setting_by: str | None
    averages: bool
    best: int | None
    figure: str | None


def analysis_options(of: str, form: str) -> Callable[[Any], Any]:
    """The options of the paper's analysis, as an argument `wanted`; `of` is where the values are
    from, such as a column.
    """
    options = (
        click.option("--class", "class_by", type=TEXT, metavar=form,
                     help=f"{of} of each model's class, such as CNN or other: colours in figures."),
        click.option("--size", "size_by", type=TEXT, metavar=form,
                     help=f"{of} of each model's size, such as its parameters, to draw the scores "
                     "against; of several groups their means."),
        click.option("--setting", "setting_by", type=TEXT, metavar=form,
                     help=f"{of} of two settings, such as pretrained or not, to compare the same "
                     "models with both."),
        click.option("--mean", "averages", is_flag=True,
                     help="Also the mean of each model's scores over the groups."),
        click.option("--best", type=click.IntRange(min=1), metavar="N",
                     help="In .tex and .md: only the best N by each score and by performance."),
        click.option("--figure", type=click.Choice(FIGURES),
                     help="What a figure shows [size or setting where one is given, else the "
                     "performance against the resource]."),
    )  # fmt: skip

    def decorated(command: Callable[..., None]) -> Any:
        @functools.wraps(command)
        def with_wanted(*args: Any, **given: Any) -> None:
            wanted = Wanted(**{field.name: given.pop(field.name) for field in fields(Wanted)})
            command(*args, wanted=wanted, **given)

        return decorate(with_wanted, options=options)

    return decorated


def figure_of(
    forms: Sequence[tuple[Path, str]],
    wanted: Wanted,
) -> str:
    """Which of FIGURES the files of -o show. UsageError where that is unclear."""
    figure, by = wanted.figure, {"size": wanted.size_by, "setting": wanted.setting_by}
    given = [name for name in by if by[name]]
    if figure in ("size", "setting") and figure not in given:
        raise UsageError(
            f"--figure {figure} needs --{figure}",
            why="it shows what that option names",
            fix=f"add --{figure} NAME",
        )
    drawn = [path for path, form in forms if FORMS[form][0] == "figure"]
    if drawn and figure is None and len(given) > 1:
        raise UsageError(
            f"{drawn[0]} could show the sizes or the settings",
            why="a file has one figure",
            fix="choose it with --figure size, or --figure setting",
        )
    return figure or (given[0] if given else "performance")


anyway_option = click.option(
    "--anyway", is_flag=True, help="Rank models too that their resource cannot tell apart."
)


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
@click.option(
    "--unit",
    "units",
    multiple=True,
    type=TEXT,
    metavar="COL=UNIT",
    help="Unit of a resource's numbers, to print beside them: energy=kWh (repeatable).",
)
@range_options("in the unit of its column: 150:900")
@performance_options
@analysis_options("Column", "COL")
@output_option
@raw_csv_option
@anyway_option
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
    units: tuple[str, ...],
    bounds: str | None,
    bounds_from: Path | None,
    save_bounds: Path | None,
    percent: bool,
    transform: str | None,
    wanted: Wanted,
    outputs: tuple[Path, ...],
    raw_csv: bool,
    anyway: bool,
    json_file: str | None,
) -> None:
    """Score the rows of TABLE (CSV, or TSV by its extension; the first row names the columns).

    PePR = P / (1 + R). P is the performance. R is the resource, normalised to 0 for the row that
    took least and 1 for the one that took most, or to the --range that is given.

    The ranking goes to stdout unless -o or --json is given. Outliers, whose resource does not fit
    their time, are named, and the ranking is printed with and without them. Models that their
    resource cannot tell apart are not ranked, but for --anyway.

    \b
    -o study.html         a page: figures, and rankings that you can change
    -o figure.pdf         performance against the resource (also .png, .svg)
    -o table.tex          the rankings for a paper, with units and ± (also .md)
    -o scored.csv         TABLE with its scores (also .tsv): COL_n (R), pepr_COL
                          and, with a given range, COL_clamped; outlier (why)
    -o ranking.json       what --json writes (as a flat table: .parquet)
    """
    from pepr_profiler.study.analysis import Analysis
    from pepr_profiler.study.study import Study

    resources = tuple(dict.fromkeys(resources))
    limits = limits_of(bounds, bounds_from, resources)
    unit_of = dict(_named_unit(text, resources) for text in units)
    if bounds_from:
        limits = _in_units(limits, unit_of)
    forms = forms_of(outputs, pipe="csv")
    figure = figure_of(forms, wanted)
    spreadsheets = [path for path, form in forms if form in _SPREADSHEETS]
    if repeats and spreadsheets:
        raise UsageError(
            f"-o {spreadsheets[0]} cannot be used with --repeats",
            why="it adds a score to every row, but --repeats scores the means of several rows",
            fix="leave one of them out; -o ranking.json, .parquet, .tex and .md have the means",
        )
    rows = TextTable.read(table)
    pasted: list[tuple[str, str]] = []
    if repeats:
        rows, pasted = rows.without_duplicates()
    class_by, size_by, setting_by = wanted.class_by, wanted.size_by, wanted.setting_by
    others = (name, group, time, class_by, size_by, setting_by)
    named = (performance, *resources, *filter(None, others))
    rows.require(named)
    if spreadsheets:
        rows.require_new(_added(resources, limits is not None))
    files = [Path(path) for path in (json_file, save_bounds) if path]
    files += [path for path, _ in forms]
    files += [_beside(path) for path, form in forms if FORMS[form][0] == "page"]
    _require_other_file(table, files)
    models = labels = rows.labels(name, taken=named)
    groups = rows.groups(group)
    for resource in resources:
        rows.require_one_unit(resource, groups, together=limits is not None)
    if setting_by:  # within a group, a model with another setting is no repeat of it
        cells = rows.texts(setting_by)
        mixed = {i for at in groups.values() if len({cells[i] for i in at}) > 1 for i in at}
        labels = [f"{x} ({cells[i]})" if i in mixed else x for i, x in enumerate(models)]
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
        unit_of=unit_of,
    )
    study = replace(study, left_out=(*pasted, *study.left_out))
    analysis = Analysis.of_table(
        study,
        models=models,
        labels=labels,
        groups=groups,
        classes=(class_by, rows.texts(class_by)) if class_by else None,
        sizes=(size_by, rows.numbers(size_by, models)) if size_by else None,
        settings=(setting_by, rows.texts(setting_by)) if setting_by else None,
        averages=wanted.averages,
        anyway=anyway,
    )

    def with_scores(path: Path) -> str:
        from pepr_profiler.report.export import spreadsheet_cell

        added = _scores_by_row(study, groups, resources, clamped=limits is not None)
        return rows.text_with(added, path, cell=None if raw_csv else spreadsheet_cell)

    if not repeats:
        _complain_of_same_names(labels, groups, named=name is not None)
    publish(
        study,
        json_file=json_file,
        save_bounds=save_bounds,
        forms=forms,
        raw_csv=raw_csv,
        analysis=analysis,
        figure=figure,
        best=wanted.best,
        spreadsheet=with_scores,
    )


def _require_other_file(table: Path, outputs: Iterable[Path]) -> None:
    """UsageError if one of the outputs is the table itself."""
    for path in outputs:
        if path.exists() and path.samefile(table):
            raise UsageError(
                f"{path} is the table that is scored",
                why="it would be lost",
                fix="write to another file",
            )


def _in_units(
    limits: pepr.MinMax | tuple[Bounds, ...] | None, unit_of: Mapping[str, str]
) -> pepr.MinMax | tuple[Bounds, ...] | None:
    """The bounds of a file, of which those without a unit have the column's, with a warning."""
    from pepr_profiler.study.ranking import Bounds

    found = []
    for entry in limits or ():
        if not isinstance(entry, Bounds):
            return limits
        if not entry.unit and (unit := unit_of.get(entry.resource)):
            complain(
                f"warning: {entry.source} does not say in which unit its range of "
                f"{brief(entry.resource)} is: it is taken to be in {brief(unit)}\n"
                f"  fix: save it again with --unit {brief(entry.resource)}={brief(unit)}"
            )
            found.append(replace(entry, unit=unit))
        else:
            found.append(entry)
    return tuple(found)


def _complain_of_same_names(
    labels: Sequence[str], groups: Mapping[str | None, Sequence[int]], *, named: bool
) -> None:
    """Warns of rows of one name within a group, which are not taken for repeats."""
    from pepr_profiler.study.pepr import listed

    counts = (Counter(labels[i] for i in at) for at in groups.values())
    several = dict.fromkeys(label for count in counts for label, n in count.items() if n > 1)
    if several:
        complain(
            f"warning: several rows are called {listed(list(map(brief, several)))}: each of them "
            "is ranked by itself\n  fix: --repeats, if they are repeats of a model; --setting COL, "
            f"if they differ in a setting{'' if named else '; --name COL, if COL has the names'}"
        )


def _named_unit(text: str, resources: Sequence[str]) -> tuple[str, str]:
    """A column and its unit from "energy=kWh". UsageError if it is no --resource."""
    column, equals, unit = text.rpartition("=")
    if not equals or not unit.strip() or column not in resources:
        raise UsageError(
            f"--unit {text!r} cannot be used",
            why=f"it names no --resource; these are {', '.join(resources)}"
            if equals and unit.strip()
            else "COL=UNIT is expected",
            fix=f"write for example --unit {resources[0]}=kWh",
        )
    return column, unit.strip()


def _scores_by_row(
    study: Study,
    groups: dict[str | None, list[int]],
    resources: Sequence[str],
    *,
    clamped: bool,
) -> dict[str, list[Any]]:
    """The columns that -o adds, in the order of the table."""
    n = sum(map(len, groups.values()))
    reasons: list[list[str]] = [[] for _ in range(n)]
    added: dict[str, list[Any]] = {column: [None] * n for column in _added(resources, clamped)}
    rankings = {(ranking.key, ranking.group): ranking for ranking in study.rankings}
    for resource in resources:
        for group, members in groups.items():
            if (ranking := rankings.get((resource, group))) is None:
                continue  # it could not be ranked
            scores = ranking.scores
            cells = zip(members, scores.r_norm.tolist(), scores.pepr.tolist(), strict=True)
            for i, r_norm, value in cells:
                added[f"{resource}_n"][i] = repr(r_norm)
                added[f"pepr_{resource}"][i] = repr(value)
            if clamped:
                for i, outside in zip(members, scores.clamped.tolist(), strict=True):
                    added[f"{resource}_clamped"][i] = int(outside)
            for i, reason in zip(members, ranking.row_notes, strict=True):
                reasons[i] += [reason] if reason else []
    added["outlier"] = ["; ".join(each) for each in reasons]
    return added


def publish(
    study: Study,
    *,
    json_file: str | None,
    analysis: Analysis,
    save_bounds: Path | None = None,
    forms: Sequence[tuple[Path, str]] = (),
    figure: str = "performance",
    best: int | None = None,
    load: Callable[[str], Mapping[str, Any]] | None = None,
    raw_csv: bool = False,
    spreadsheet: Callable[[Path], str] | None = None,
) -> None:
    """The rankings as JSON to a file or stdout, else as tables on stdout.

    With `forms` (of `forms_of`) they go to those files instead; `load` is `study_page`'s,
    `spreadsheet` gives the text of a csv or tsv file that is no plain ranking. Runs that were left
    out, outliers, and what lies outside a given range are named on stderr, and, where no table on
    stdout says it, that a ranking is one of noise.
    """
    from pepr_profiler.report.export import ranking_json

    _name_left_out(study)
    for ranking in study.rankings:
        both = len(study.by_group()[ranking.group]) == 1
        _complain_of(ranking, printed=not forms and not json_file, both=both)
    for text in _incomparable(analysis):
        complain(text)
    if save_bounds:
        _save_range(study, save_bounds)
    for path, form in forms:
        if spreadsheet is not None and form in _SPREADSHEETS:
            write_text(path, spreadsheet(path))
        else:
            wanted = {"figure": figure, "best": best, "load": load, "raw_csv": raw_csv}
            _write_form(path, analysis, form, **wanted)
        complain(f"wrote {path}")
    if json_file == "-":
        write_stdout(ranking_json(study, analysis))
    elif json_file:
        write_text(Path(json_file), ranking_json(study, analysis))
    elif not forms:
        width, color = screen(sys.stdout)
        width = max(width, 80)  # a narrower terminal wraps the lines, instead of losing the scores
        screens = _screens(analysis, width=width, color=color)
        click.echo("\n".join(screens), nl=False, color=color)


def _name_left_out(study: Study) -> None:
    for who, why in study.left_out[:_MOST_LEFT_OUT]:
        complain(f"left out {brief(who)}: {brief(why)}")
    if more := len(study.left_out[_MOST_LEFT_OUT:]):
        complain(f"left out {more} more: --json FILE has all of them")


def _save_range(study: Study, path: Path) -> None:
    """Saves the normalisation ranges of a study, with a warning where one is of noise."""
    for ranking in study.rankings:
        if ranking.noise:
            of = f" of {brief(ranking.group)}" if ranking.group else ""
            complain(
                f"warning: the range of {ranking.resource_name}{of} in {path} is noise: these "
                f"{ranking.of}s cannot be told apart by it\n  fix: save the range of a study whose "
                "models differ by more"
            )
        rest = ranking.without
        moved = ranking.outliers and (rest is None or rest.scores.bounds != ranking.scores.bounds)
        if not ranking.bounds_given and (moved or ranking.populations):
            of = f" of {brief(ranking.group)}" if ranking.group else ""
            wrong = "outliers" if moved else "one of two populations, and one of these is wrong"
            complain(
                f"warning: the range of {brief(ranking.resource_name)}{of} in {path} has an end "
                f"that is set by {wrong}\n  fix: leave out the rows that are wrong, and save it "
                "again"
            )
    write_text(path, json.dumps(study.bounds_data(), indent=2) + "\n")
    complain(f"wrote {path}")


def _complain_of(ranking: Ranking, *, printed: bool, both: bool) -> None:
    """Names on stderr what has to be known of a ranking; `printed` says that a table shows it, and
    `both` that it is printed without outliers too.
    """
    from pepr_profiler.study.pepr import listed

    for caution in ranking.warnings:
        if not printed or caution.code in ("two-populations", "same-readings", "narrow-range"):
            of = f"{brief(ranking.group)}: " if ranking.group else ""
            complain(f"warning: {of}{brief(caution.text, 400)}\n  fix: {caution.fix}")
    for outlier in ranking.outliers:
        also = ""
        if printed and both and ranking.without is not None:
            also = "; the ranking is also printed without outliers"
        rows = "runs" if ranking.run_ids else "rows"
        few = len(outlier.names) == 1
        complain(
            f"warning: {len(outlier.names)} of {_counted(ranking.n, ranking.names)} {rows} "
            f"{'is an outlier' if few else 'are outliers'} in {brief(outlier.what)}: "
            f"{listed(list(map(brief, outlier.names)))}"
            f"\n  why: {outlier.why}; a wrong reading stretches the normalisation range and so"
            f" changes every R{also}\n  fix: check {'it' if few else 'them'} and leave out what is"
            " wrong, or fix the range with --range MIN:MAX"
        )
    clamped = [n for n, c in zip(ranking.names, ranking.scores.clamped, strict=True) if c]
    if clamped:
        complain(
            f"{len(clamped)} {ranking.of}{'s' * (len(clamped) > 1)} outside the normalisation"
            f" range, R is set to 0 or 1: {listed(list(map(brief, clamped)))}"
        )


_SPREADSHEETS = ("csv", "tsv")
_MOST_LEFT_OUT = 20


def _incomparable(analysis: Analysis) -> Iterator[str]:
    """What means over groups and pairs leave out, and why."""
    from pepr_profiler.study.pepr import listed

    if analysis.averages or analysis.setting_name:
        for group, why in dict.fromkeys(x for means in analysis.means for x in means.left_out):
            yield f"left out of the means over groups: {brief(group)}: {why}"
    if analysis.averages:
        for name, groups in analysis.means[0].missing[:_MOST_NAMED]:
            yield (
                f"left out of the means over groups: {brief(name)}: not in "
                f"{listed(list(map(brief, groups)))}"
            )
        if more := len(analysis.means[0].missing[_MOST_NAMED:]):
            yield f"left out of the means over groups: {more} more that are not in every group"
    if analysis.setting_name and (unpaired := analysis.unpaired):
        yield (
            f"left out of the comparison of {brief(analysis.setting_name)}, as they are not with "
            f"both settings in every group: {listed(list(map(brief, unpaired)))}"
        )


_MOST_NAMED = 5


def _write_form(path: Path, analysis: Analysis, form: str, **wanted: Any) -> None:
    """Writes a file of -o, and beside a page that shows only the best rows a table of all.

    `wanted` are arguments of `_rendered`.
    """
    beside = ""
    if FORMS[form][0] == "page":
        from pepr_profiler.report.study_page import is_thinned

        if is_thinned(analysis.study):
            beside = _beside(path).name
            write_text(_beside(path), _rendered(analysis, "csv", **wanted))
            complain(f"wrote {_beside(path)}")
    write_text(path, _rendered(analysis, form, beside=beside, **wanted))


def _beside(page: Path) -> Path:
    """The table of all rows beside a page that shows only the best."""
    return page.with_name(f"{page.stem}-all-rows.csv")


def _rendered(
    analysis: Analysis,
    form: str,
    *,
    figure: str = "performance",
    best: int | None = None,
    load: Callable[[str], Mapping[str, Any]] | None = None,
    raw_csv: bool = False,
    beside: str = "",
) -> str | bytes:
    study = analysis.study
    kind = FORMS[form][0]
    if kind == "data":
        from pepr_profiler.report.export import ranking_json

        return ranking_json(study, analysis)
    if kind == "page":
        from pepr_profiler.report.study_page import study_page

        return study_page(study, load=load, analysis=analysis, all_rows=beside)
    if kind == "figure":
        from pepr_profiler.report.analysis_figures import analysis_figure

        return analysis_figure(analysis, figure, form)
    if kind == "typeset":
        from pepr_profiler.report.typeset import study_tables, typeset

        return typeset(study_tables(analysis, best), form)
    from pepr_profiler.report.export import encode

    return encode(study.rows(), form, raw_csv=raw_csv)


def _screens(analysis: Analysis, *, width: int, color: bool) -> Iterator[str]:
    """One per group: its ranking, and again without outliers, or of either population.

    Several resources stand side by side, or below each other if one of them cannot rank the rows.
    """
    from pepr_profiler.report.analysis_text import render_analysis
    from pepr_profiler.report.ranking_text import render_ranking, render_side_by_side

    render = partial(render_ranking, width=width, color=color, anyway=analysis.anyway)
    for rankings in analysis.study.by_group().values():
        if len(rankings) > 1 and any(map(analysis.unranked, rankings)):
            yield from map(render, rankings)  # a table of all would rank by noise
            continue
        if len(rankings) > 1:
            yield render_side_by_side(rankings, width=width, color=color)
            continue
        yield render(rankings[0])
        if rankings[0].without is not None:
            n = sum(len(outlier.names) for outlier in rankings[0].outliers)
            yield f"Without the {n} outlier{'s' * (n > 1)}:\n\n{render(rankings[0].without)}"
        for each in rankings[0].either:
            n, kind = _counted(each.n, each.names), rankings[0].population[each.whole_rows[0]]
            of = kind.removeprefix("population ") if ";" not in kind else "of one population"
            yield f"Only the {n} {of}:\n\n{render(each)}"
    yield from render_analysis(analysis, width=width, color=color)


def _added(resources: Sequence[str], clamped: bool) -> list[str]:
    forms = ("{}_n", "pepr_{}", "{}_clamped")[: 3 if clamped else 2]
    return [*(form.format(column) for column in resources for form in forms), "outlier"]


def _counted(n: Any, names: Sequence[str]) -> int:
    return len(names) if n is None else int(n.sum())
