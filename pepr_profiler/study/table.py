"""A CSV or TSV table, read with errors that name the line."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pepr_profiler.errors import UsageError

if TYPE_CHECKING:
    from pepr_profiler.study import pepr

# A resource divided by one of these columns is a rate (energy: a mean power), which rows of one
# cohort share to within a small factor. Only where --time does not say which.
_DURATION = re.compile(r"time|duration|seconds|(^|_)s$", re.IGNORECASE)


class TextTable:
    """A table of text: column names, rows of as many cells, and each row's line in the file."""

    def __init__(
        self, path: Path, columns: list[str], rows: list[list[str]], lines: list[int]
    ) -> None:
        self.path, self.columns, self.rows, self.lines = path, columns, rows, lines
        self.index = {column: i for i, column in enumerate(columns)}

    @classmethod
    def read(cls, path: Path) -> TextTable:
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
        return self.cells(name)

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
                    why="a score needs both numbers, and every row counts in the range of R",
                    fix="correct the cell or take the row out of the table",
                )
        return np.array(values, dtype=np.float64)

    def cells(self, column: str) -> list[str]:
        return [row[self.index[column]] for row in self.rows]

    def groups(self, column: str | None) -> dict[str | None, list[int]]:
        """The row numbers of each value of the column, in the order of the table."""
        if column is None:
            return {None: list(range(len(self.rows)))}
        members: dict[str | None, list[int]] = {}
        for i, cell in enumerate(self.cells(column)):
            members.setdefault(cell, []).append(i)
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


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    # float() reads "1_000", which in a table is a typing error or a name.
    return value if math.isfinite(value) and "_" not in cell else None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
