"""`pepr-profile score`: the PePR ranking of any table."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.units import parse_bounds

if TYPE_CHECKING:
    from pepr_profiler import pepr
    from pepr_profiler.report.ranking import Ranking

# A resource divided by one of these columns is a rate (energy: a mean power), which rows of one
# cohort share to within a small factor.
_DURATION = re.compile(r"time|duration|seconds|(^|_)s$", re.IGNORECASE)


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--performance", required=True, metavar="COL", help="Column of the performance.")
@click.option(
    "--resource",
    "resources",
    required=True,
    multiple=True,
    metavar="COL",
    help="Column of a resource; repeat it to score several side by side.",
)
@click.option("--name", metavar="COL", help="Column of the names [first column of text].")
@click.option("--group", metavar="COL", help="Score inside each value of this column.")
@click.option("--bounds", metavar="MIN:MAX", help="Fixed bounds, in the resource's unit.")
@click.option("--percent", is_flag=True, help="The performance is in percent.")
@click.option(
    "--transform",
    type=click.Choice(["one-minus", "exp-neg"]),
    help="Turn a lower-is-better metric x into 1-x or exp(-x).",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the table with its scores."
)
@click.option("--json", "json_file", metavar="FILE", help="Write the ranking as JSON; - is stdout.")
def score(
    table: Path,
    *,
    performance: str,
    resources: tuple[str, ...],
    name: str | None,
    group: str | None,
    bounds: str | None,
    percent: bool,
    transform: str | None,
    output: Path | None,
    json_file: str | None,
) -> None:
    """Score the rows of TABLE (CSV, or TSV by its extension; the first row names the columns).

    PePR = P / (1 + R): the performance per resource, R running from 0 to 1 between the bounds. The
    ranking goes to stdout unless -o or --json says where. -o adds the columns COL_n (R) and
    pepr_COL for every resource; with --bounds, COL_clamped too.
    """
    from pepr_profiler import pepr

    resources = tuple(dict.fromkeys(resources))
    limits = parse_bounds(bounds) if bounds else None
    if limits and len(resources) > 1:
        raise UsageError(
            "--bounds with several resources",
            why="bounds have the unit of one resource",
            fix="score the resources one by one, each with its --bounds",
        )
    rows = _Table.read(table)
    wanted = (performance, *resources, *filter(None, (name, group)))
    rows.require(wanted)
    if output:
        rows.refuse_existing(_added(resources, limits is not None))
    labels = rows.labels(name, taken=wanted)
    p = pepr.as_performance(rows.numbers(performance, labels), percent=percent, transform=transform)
    amounts = {column: rows.numbers(column, labels) for column in resources}

    rankings: list[Ranking] = []
    columns: dict[str, list[Any]] = {
        c: [None] * len(labels) for c in _added(resources, bool(bounds))
    }
    for value, members in rows.groups(group).items():
        names = [labels[i] for i in members]
        for column in resources:
            ranked = _ranked(
                column, names, p[members], amounts[column][members], metric=performance,
                bounds=limits, group=value,
            )  # fmt: skip
            rankings.append(ranked)
            scores = ranked.scores
            for at, i in enumerate(members):
                columns[f"{column}_n"][i] = repr(float(scores.r_norm[at]))
                columns[f"pepr_{column}"][i] = repr(float(scores.pepr[at]))
                if limits:
                    columns[f"{column}_clamped"][i] = int(scores.clamped[at])
    for column in resources:
        _warn_out_of_proportion(rows, column, labels)
    if output:
        write_text(output, rows.text_with(columns, output))
        click.echo(f"pepr-profile: wrote {output}", err=True)
    publish(rankings, json_file=json_file, screen=output is None)


def publish(
    rankings: Sequence[Ranking],
    *,
    json_file: str | None,
    screen: bool = True,
    left_out: Sequence[tuple[str, str]] = (),
) -> None:
    """The rankings as JSON to a file or stdout, else (where `screen`) as tables on stdout.

    Rows that fixed bounds clamp are named on stderr.
    """
    from pepr_profiler.report.ranking import ranking_data, render_ranking

    for ranking in rankings:
        clamped = [n for n, c in zip(ranking.names, ranking.scores.clamped, strict=True) if c]
        if clamped:
            click.echo(
                f"pepr-profile: {len(clamped)} {ranking.of}(s) outside the bounds, R clamped: "
                + _some(clamped),
                err=True,
            )
    if json_file:
        data = {
            "schema": 1,
            "rankings": [ranking_data(ranking) for ranking in rankings],
            "left_out": [{"run": run, "why": why} for run, why in left_out],
        }
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if json_file == "-":
            click.echo(text, nl=False)
        else:
            write_text(Path(json_file), text)
    elif screen:
        tty = sys.stdout.isatty()
        width = max(60, min(100, shutil.get_terminal_size().columns)) if tty else 80
        color = tty and not os.environ.get("NO_COLOR")
        screens = [render_ranking(ranking, width=width, color=color) for ranking in rankings]
        click.echo("\n".join(screens), nl=False, color=color)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all; what is not a regular file (a pipe) is written directly."""
    try:
        # A rename onto /dev/stdout or a named pipe would replace the device, not fill it.
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        path = path.resolve()  # through a link, so that the link stays one
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(text, encoding="utf-8", newline="")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise PeprError(
            f"cannot write {path}",
            why=error.strerror or str(error),
            fix="name a file in a directory that exists and is writable",
        ) from error


class _Table:
    """A table of text: column names, rows of as many cells, and each row's line in the file."""

    def __init__(
        self, path: Path, columns: list[str], rows: list[list[str]], lines: list[int]
    ) -> None:
        self.path, self.columns, self.rows, self.lines = path, columns, rows, lines
        self.index = {column: i for i, column in enumerate(columns)}

    @classmethod
    def read(cls, path: Path) -> _Table:
        rows: list[list[str]] = []
        lines: list[int] = []
        try:
            # utf-8-sig: spreadsheets put a byte order mark in front of the first name.
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
                for row in reader:
                    if row:  # an empty line
                        rows.append(row)
                        lines.append(reader.line_num)
        except OSError as error:
            raise UsageError(
                f"cannot read {path}",
                why=error.strerror or str(error),
                fix="name a CSV or TSV file that exists and is readable",
            ) from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise UsageError(
                f"{path} is not a table",
                why=f"it is no CSV text in UTF-8: {error}",
                fix="save it as CSV with commas, in UTF-8",
            ) from error
        if len(rows) < 2:
            raise UsageError(
                f"{path} is empty",
                why="it has a header but no rows" if rows else "it has no header",
                fix="the first row names the columns, each further row is one model",
            )
        columns = [column.strip() for column in rows[0]]
        if len(columns) == 1 and ";" in columns[0]:
            raise UsageError(
                f"{path} is separated by semicolons",
                why="a CSV has commas between its cells, and points in its numbers",
                fix="save it with commas, or with tabs as .tsv",
            )
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise UsageError(
                f"{path} names a column twice: {', '.join(map(repr, twice))}",
                why="it would be unclear which one is meant",
                fix="rename one of them in the first row",
            )
        for row, line in zip(rows[1:], lines[1:], strict=True):
            if len(row) != len(columns):
                raise UsageError(
                    f"{path}, line {line}: {len(row)} cells instead of {len(columns)}",
                    why="every row needs a cell for every column of the first row",
                    fix="complete the row, or put a cell that contains the separator in quotes",
                )
        return cls(path, columns, rows[1:], lines[1:])

    def require(self, wanted: Sequence[str]) -> None:
        for column in wanted:
            if column not in self.index:
                import difflib

                close = difflib.get_close_matches(column, self.columns, n=1, cutoff=0.5)
                close += [known for known in self.columns if column.lower() in known.lower()]
                raise UsageError(
                    f"{self.path} has no column {column!r}",
                    why=f"its columns are {', '.join(self.columns)}",
                    fix=f"did you mean {close[0]}?" if close else "name one of them",
                )

    def refuse_existing(self, added: Sequence[str]) -> None:
        existing = [column for column in added if column in self.index]
        if existing:
            raise UsageError(
                f"{self.path} already has the column(s) {', '.join(existing)}",
                why="-o adds columns of these names and overwrites none",
                fix="score the table without them, or rename them",
            )

    def labels(self, name: str | None, *, taken: Sequence[str]) -> list[str]:
        """What each row is called: the named column, else the first of text, else its number."""
        if name is None:
            free = (column for column in self.columns if column not in taken)
            name = next((column for column in free if not self._is_numeric(column)), None)
        if name is None:
            return [f"row {number}" for number in range(1, len(self.rows) + 1)]
        return [row[self.index[name]] for row in self.rows]

    def numbers(self, column: str, labels: Sequence[str]) -> pepr.Floats:
        """The column as (n,) floats; UsageError names the first cell that is no finite number."""
        import numpy as np

        at = self.index[column]
        values = [_number(row[at]) for row in self.rows]
        for i, value in enumerate(values):
            if value is None:
                cell = self.rows[i][at]
                raise UsageError(
                    f"{self.path}, line {self.lines[i]} ({labels[i]}), column {column}: "
                    + (f"{cell!r} is not a finite number" if cell.strip() else "the cell is blank"),
                    why="a score needs both numbers of every row, and bounds depend on all rows",
                    fix="correct the cell or take the row out of the table",
                )
        return np.array(values, dtype=np.float64)

    def groups(self, column: str | None) -> dict[str | None, list[int]]:
        """The row numbers of each value of the column, in the order of the table."""
        if column is None:
            return {None: list(range(len(self.rows)))}
        members: dict[str | None, list[int]] = {}
        for i, row in enumerate(self.rows):
            members.setdefault(row[self.index[column]], []).append(i)
        return members

    def durations(self) -> list[str]:
        return [c for c in self.columns if _DURATION.search(c) and self._is_numeric(c)]

    def text_with(self, added: dict[str, list[Any]], path: Path) -> str:
        """The table with columns added, cells otherwise as they were; separated as `path` says."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=_delimiter(path), lineterminator="\n")
        writer.writerow([*self.columns, *added])
        writer.writerows(
            [*row, *cells] for row, *cells in zip(self.rows, *added.values(), strict=True)
        )
        return text.getvalue()

    def _is_numeric(self, column: str) -> bool:
        at = self.index[column]
        return all(_number(row[at]) is not None for row in self.rows)


def _ranked(
    column: str,
    names: list[str],
    p: pepr.Floats,
    r: pepr.Floats,
    *,
    metric: str,
    bounds: pepr.Bounds | None,
    group: str | None,
) -> Ranking:
    from pepr_profiler import pepr
    from pepr_profiler.report.ranking import Ranking

    try:
        scores = pepr.score(p, r, bounds=bounds, names=names)
    except UsageError as error:
        where = column if group is None else f"{column}, group {group!r}"
        raise UsageError(f"{where}: {error.what}", why=error.why, fix=error.fix) from error
    return Ranking(
        label="PePR",
        of="row",
        names=tuple(names),
        metric=metric,
        resource_name=column,
        unit="",
        performance=p,
        resource=r,
        scores=scores,
        bounds_given=bounds is not None,
        group=group,
    )


def _warn_out_of_proportion(rows: _Table, column: str, labels: list[str]) -> None:
    """Say which rows' resource per time is far from the others': they may set the bounds."""
    from pepr_profiler import pepr

    if _DURATION.search(column):
        return
    for duration in rows.durations():
        odd = pepr.out_of_proportion(rows.numbers(column, labels), rows.numbers(duration, labels))
        if odd is not None:
            click.echo(
                f"pepr-profile: warning: {int(odd.sum())} of {len(labels)} rows are out of "
                f"proportion in {column} per {duration}: "
                + _some([label for label, is_odd in zip(labels, odd, strict=True) if is_odd])
                + "\n  why: the others lie together, a factor of 3 or more away; readings that are"
                " wrong set the bounds and flatten every other R"
                "\n  fix: check these rows and leave wrong ones out, or fix the bounds with"
                " --bounds MIN:MAX",
                err=True,
            )
            return


def _added(resources: Sequence[str], clamped: bool) -> list[str]:
    forms = ("{}_n", "pepr_{}", "{}_clamped")[: 3 if clamped else 2]
    return [form.format(column) for column in resources for form in forms]


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    # float() reads "1_000", which in a table is a typing error or a name.
    return value if math.isfinite(value) and "_" not in cell else None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tsv", ".tab") else ","


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
