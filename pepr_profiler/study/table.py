"""A table in a CSV or TSV file: read, checked with errors that name the line, and written again."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats
from pepr_profiler.trace.files import read_given_file

# The names of columns of durations. A resource divided by one is a rate (of energy a mean power),
# which is similar in all rows of a cohort.
_DURATION = re.compile(r"time|duration|seconds|(^|_)s$", re.IGNORECASE)


_MOST_BYTES = 64 << 20
"""The size of a table: 500,000 rows of 16 columns."""


class TextTable:
    """The text of a table: names of `columns`, and `rows` with a cell for each of them."""

    def __init__(
        self, path: Path, columns: Sequence[str], rows: Sequence[list[str]], lines: Sequence[int]
    ) -> None:
        self.path, self.columns, self.rows = path, columns, rows
        self._lines = lines  # where in the file each row ends
        self._places = {column: i for i, column in enumerate(columns)}

    @classmethod
    def read(cls, path: Path) -> TextTable:
        """The table in a file. Its extension says what separates the cells, its first row names the
        columns. UsageError for everything else.
        """
        rows: list[list[str]] = []
        lines: list[int] = []
        try:
            # utf-8-sig: spreadsheets put a byte order mark in front of the first name.
            text = read_given_file(path, most_bytes=_MOST_BYTES).decode("utf-8-sig")
            reader = csv.reader(
                io.StringIO(text, newline=""), delimiter=_delimiter(path), strict=True
            )
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

    def require(self, columns: Sequence[str]) -> None:
        """UsageError if the table lacks one of these columns."""
        for column in columns:
            if column not in self._places:
                import difflib

                close = difflib.get_close_matches(column, self.columns, n=1, cutoff=0.5)
                close += [known for known in self.columns if column.lower() in known.lower()]
                raise UsageError(
                    f"{self.path} has no column {column!r}",
                    why=f"its columns are {', '.join(self.columns)}",
                    fix=f"did you mean {close[0]}?" if close else "name one of them",
                )

    def without_duplicates(self) -> tuple[TextTable, list[tuple[str, str]]]:
        """The table with each of its rows once, and (row, reason) of those that were left out."""
        first: dict[tuple[str, ...], int] = {}
        kept, out = [], []
        for i, row in enumerate(self.rows):
            other = first.setdefault(tuple(row), i)
            if other == i:
                kept.append(i)
            else:
                why = f"identical to line {self._lines[other]} in all columns, so no repeat of it"
                out.append((f"line {self._lines[i]}", why))
        if not out:
            return self, out
        rows, lines = [self.rows[i] for i in kept], [self._lines[i] for i in kept]
        return TextTable(self.path, self.columns, rows, lines), out

    def require_one_unit(
        self, resource: str, groups: Mapping[str | None, Sequence[int]], *, together: bool
    ) -> None:
        """UsageError if the table has a column of units, `unit` or `resource`_unit, which differ
        within one of the groups of rows, or with `together` between groups.
        """
        column = next((x for x in (f"{resource}_unit", "unit") if x in self._places), None)
        if column is None or column == resource:
            return
        cells = self.texts(column)
        found = {group: list(dict.fromkeys(cells[i] for i in at)) for group, at in groups.items()}
        every = list(dict.fromkeys(unit for units in found.values() for unit in units))
        mixed = [(group, units) for group, units in found.items() if len(units) > 1]
        if len(every) < 2 or not (mixed or together):
            return
        shown = mixed or list(found.items())
        named = "; ".join(
            f"{group or 'the table'}: {' and '.join(map(repr, units))}"
            for group, units in shown[:5]
        )
        raise UsageError(
            f"{resource} is in different units, by the column {column}",
            why=named,
            fix="convert them to one unit"
            + ("" if mixed else ", or score each group by itself, with a range of its own"),
        )

    def require_new(self, columns: Sequence[str]) -> None:
        """UsageError if the table already has one of these columns."""
        existing = [column for column in columns if column in self._places]
        if existing:
            raise UsageError(
                f"{self.path} already has the column(s) {', '.join(existing)}",
                why="-o adds columns of these names and overwrites none",
                fix="score the table without them, or rename them",
            )

    def texts(self, column: str) -> list[str]:
        """The cells of a column."""
        return [row[self._places[column]] for row in self.rows]

    def numbers(self, column: str, labels: Sequence[str]) -> Floats:
        """The cells of a column as numbers (n,). UsageError for one that is no finite number, which
        names the row by its label.
        """
        import numpy as np

        cells = self.texts(column)
        values = [_number(cell) for cell in cells]
        for i, value in enumerate(values):
            if value is None:
                raise UsageError(
                    f"{self.path}, line {self._lines[i]} ({labels[i]}), column {column}: "
                    + (
                        f"{cells[i]!r} is not a finite number"
                        if cells[i].strip()
                        else "the cell is blank"
                    ),
                    why="every row needs a number in each column that is asked for",
                    fix="correct the cell or take the row out of the table",
                )
        return np.array(values, dtype=np.float64)

    def labels(self, column: str | None, *, taken: Sequence[str]) -> list[str]:
        """A name for each row: its cell of `column`, else of the first column that is not `taken`
        and not all numbers, else the row's number.
        """
        if column is None:
            free = (name for name in self.columns if name not in taken)
            column = next((name for name in free if not self._is_numeric(name)), None)
        if column is None:
            return [f"row {number}" for number in range(1, len(self.rows) + 1)]
        return self.texts(column)

    def groups(self, column: str | None) -> dict[str | None, list[int]]:
        """The numbers of the rows that have each value of a column, in the order of the table.

        Without a column all rows are one group, None.
        """
        if column is None:
            return {None: list(range(len(self.rows)))}
        members: dict[str | None, list[int]] = {}
        for i, cell in enumerate(self.texts(column)):
            members.setdefault(cell, []).append(i)
        return members

    def duration_columns(self) -> list[str]:
        """The columns that are durations by their name, and all numbers."""
        return [name for name in self.columns if _DURATION.search(name) and self._is_numeric(name)]

    def text_with(
        self,
        added: Mapping[str, Sequence[Any]],
        path: Path,
        *,
        cell: Callable[[Any], Any] | None = None,
    ) -> str:
        """The text of a file `path` with this table and more columns, `added`, at its right.

        `cell` gives what is written for each cell.
        """
        own = cell or (lambda value: value)
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=_delimiter(path), lineterminator="\n")
        writer.writerow(map(own, [*self.columns, *added]))
        writer.writerows(
            map(own, [*row, *cells]) for row, *cells in zip(self.rows, *added.values(), strict=True)
        )
        return text.getvalue()

    def _is_numeric(self, column: str) -> bool:
        return all(_number(cell) is not None for cell in self.texts(column))


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    # float() reads "1_000", which in a table is a typing error or a name.
    return value if math.isfinite(value) and "_" not in cell else None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
