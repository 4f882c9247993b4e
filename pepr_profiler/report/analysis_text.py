"""Means over groups and compared settings on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pepr_profiler.report.text import Line, brief, cells, drawn, left, right, wrap
from pepr_profiler.report.typeset import TableColumn, mean_cautions, means_table, settings_table
from pepr_profiler.study.analysis import Analysis

_MOST_MEANS = 10
_NAME_CELLS = 24


def render_analysis(analysis: Analysis, *, width: int = 80, color: bool = False) -> Iterator[str]:
    """The means over groups, the best ten, and the compared settings, as far as asked for."""
    for each in analysis.both_ways:
        yield from _tables(each, width, color)


def _tables(analysis: Analysis, width: int, color: bool) -> Iterator[str]:
    if analysis.averages:
        first = analysis.means[0]
        n = len(first.traits.models)
        title = f"Means over {first.over} groups{analysis.of}   {n} model{'s' * (n != 1)}"
        if n > _MOST_MEANS:
            title += f", the best {_MOST_MEANS}"
        table = means_table(analysis, _MOST_MEANS)
        notes = [("±", "sample standard deviation over the groups: a spread, no uncertainty")]
        notes += [("!", note) for note in mean_cautions(analysis)]
        yield _drawn(title, table.columns, notes, width, color)
    if analysis.setting_name:
        effects = analysis.effects
        one, other = effects[0].settings
        n = len(effects[0].models)
        title = f"{analysis.setting_name}: {other} against {one}{analysis.of}   the same {n} models"
        notes = [
            ("p", "two-sided, Wilcoxon's signed-rank test, each quantity by itself"),
            ("effect", "matched-pairs rank-biserial correlation: 1 if every model is higher with "
                       f"{brief(other, 40)}, −1 if lower"),
        ]  # fmt: skip
        yield _drawn(title, settings_table(analysis).columns, notes, width, color)


def _drawn(
    title: str,
    columns: Sequence[TableColumn],
    notes: Sequence[tuple[str, str]],
    width: int,
    color: bool,
) -> str:
    widths = [max(map(cells, [column.head, *column.cells]), default=0) for column in columns]
    widths = [
        size if column.numeric else min(size, _NAME_CELLS)
        for size, column in zip(widths, columns, strict=True)
    ]

    def row(texts: Sequence[str]) -> str:
        shown = [
            (right if column.numeric else left)(text, size)
            for text, size, column in zip(texts, widths, columns, strict=True)
        ]
        return "  " + "  ".join(shown)

    lines: list[Line] = [[(title, "bold")], [], [(row([c.head for c in columns]), "dim")]]
    lines += [[(row(texts), "")] for texts in zip(*(c.cells for c in columns), strict=True)]
    lines.append([])
    key_cells = max(len(key) for key, _ in notes)
    for key, text in notes:
        head = left(key, key_cells)
        for part in wrap(text, width - 4 - key_cells):
            lines.append([(f"  {head}  {part}", "dim")])
            head = " " * key_cells
    return drawn(lines, width=max(width, sum(widths) + 2 * len(widths) + 2), color=color) + "\n"
