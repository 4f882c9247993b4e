"""The PePR ranking as a screen of text and as data."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pepr_profiler import units
from pepr_profiler.study.ranking import Ranking, flat_rows

_EIGHTHS = " ▏▎▍▌▋▊▉"
_HEADING_CELLS = 12  # a column's heading is cut here; names of metrics can be long
_LABEL_CELLS = 17  # PePR-parameters
_NAME_CELLS = (8, 14)  # what a name keeps at least, and before a bar is drawn
_BAR_CELLS = (5, 20)

# A line is pieces of text, each with the style that a colour terminal gives it.
_Line = list[tuple[str, str]]


def render_ranking(ranking: Ranking, *, width: int = 80, color: bool = False) -> str:
    """The ranking as lines of at most `width` terminal cells, best score first.

    The rank of a row that cannot be told from others is the range of its possible ranks. Long names
    are cut with "…", unprintable characters become "?". `!` marks a resource outside fixed bounds,
    `*` the Pareto front. Without `color` the text has no escape codes.
    """
    scores, order = ranking.scores, ranking.order
    front = ranking.front
    marks = ["!" if clamped else "" for clamped in scores.clamped]
    pad = " " if any(marks) else ""
    columns = [
        (_short(ranking.metric, _HEADING_CELLS), _performance_cells(ranking)),
        (
            _short(ranking.resource_name, _HEADING_CELLS),
            [_amount(r, ranking.unit) for r in ranking.resource],
        ),
        ("R  " + pad, [f"{r:.3f}{m or pad}" for r, m in zip(scores.r_norm, marks, strict=True)]),
        (_short(ranking.label, _LABEL_CELLS), _score_cells(ranking)),
    ]
    if ranking.repeated and ranking.n is not None:
        columns.insert(0, ("n", [str(n) for n in ranking.n]))
    if ranking.standing is not None:
        columns.append(("swap", [_percent(x) for x in ranking.standing.swap]))
        columns[-1][1][order[-1]] = ""  # there is no next row
    ranks = _ranks(ranking)
    widths = [max(map(_cells, [heading, *cells])) for heading, cells in columns]
    rank_cells = max(map(len, ranks))
    # Indent, gaps, the mark of the front: what is neither name, bar nor column.
    gap = 3 if ranking.standing is None else 2  # one column more
    left = width - (2 + rank_cells + 2 + sum(widths) + gap * len(widths) + 2 + 2)
    # Names come first, bars have what is left of the line.
    longest = max(map(_cells, ["model", *ranking.names]))
    name_cells = max(min(longest, _NAME_CELLS[1], left), min(longest, left - _BAR_CELLS[0]))
    name_cells = max(_NAME_CELLS[0], name_cells)
    bar_cells = min(_BAR_CELLS[1], left - name_cells)
    if bar_cells < _BAR_CELLS[0]:  # no room: the numbers say it
        name_cells, bar_cells = max(_NAME_CELLS[0], min(longest, left)), 0
    score_at = len(columns) - (ranking.standing is not None) - 1

    def row(rank: str, name: str, cells: list[str]) -> str:
        # The score is flush left under its heading, as its uncertainty may be missing.
        numbers = [
            (_left if at == score_at else _right)(cell, w)
            for at, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return (gap * " ").join([f"  {rank:>{rank_cells}}  {_left(name, name_cells)}", *numbers])

    lines: list[_Line] = [[(line, "bold")] for line in _title(ranking, width)]
    lines += [[], [(row("#", "model", [heading for heading, _ in columns]), "dim")]]
    for rank, i in zip(ranks, order, strict=True):
        line = [(row(rank, ranking.names[i], [cells[i] for _, cells in columns]) + "  ", "")]
        if front[i]:
            line += [(_left(_bar(scores.pepr[i], bar_cells), bar_cells), "green"), (" *", "yellow")]
        else:
            line += [(_bar(scores.pepr[i], bar_cells), "green")]
        lines.append(line)
    trade_off = f"{_printable(ranking.metric)}/{_printable(ranking.resource_name)}"
    lines.append([(_short(f"  * on the {trade_off} Pareto front", width), "dim")])
    if any(marks):
        lines.append([("  ! outside the bounds, R clamped", "dim")])
    lines += [[(note, "dim")] for note in _notes(ranking, ranks)]
    return _written(lines, color=color, width=width)


def render_side_by_side(
    rankings: Sequence[Ranking], *, width: int = 80, color: bool = False
) -> str:
    """Rankings of one cohort by several resources as one table, in the order of the first.

    Each score has its ± where all of them fit; `*` marks the Pareto front of each resource.
    """
    first = rankings[0]
    order = first.order
    at = [{name: i for i, name in enumerate(ranking.names)} for ranking in rankings]

    def cells_of(with_u: bool) -> list[list[str]]:
        columns = [[f"{p:.3f}" for p in first.performance]]
        for ranking, where in zip(rankings, at, strict=True):
            scored = _score_cells(ranking) if with_u else [f"{x:.3f}" for x in ranking.scores.pepr]
            marked = [
                scored[i] + ("!" if ranking.scores.clamped[i] else "")
                + (" *" if ranking.front[i] else "  ")
                for i in (where[name] for name in first.names)
            ]  # fmt: skip
            columns.append(marked)
        return columns

    headings = [_short(first.metric, _HEADING_CELLS)]
    headings += [_short(ranking.label, _HEADING_CELLS) for ranking in rankings]
    rank_cells = len(str(len(order)))
    for columns in (cells_of(True), cells_of(False)):
        widths = [
            max(map(_cells, [heading, *cells]))
            for heading, cells in zip(headings, columns, strict=True)
        ]
        left = width - (2 + rank_cells + 2 + sum(widths) + 3 * len(widths))
        if left >= _NAME_CELLS[0]:
            break
    name_cells = max(_NAME_CELLS[0], min(max(map(_cells, ["model", *first.names])), left))

    def row(rank: str, name: str, cells: Sequence[str]) -> str:
        numbers = [_right(cells[0], widths[0])]
        numbers += [_left(cell, w) for cell, w in zip(cells[1:], widths[1:], strict=True)]
        return "   ".join([f"  {rank:>{rank_cells}}  {_left(name, name_cells)}", *numbers])

    n = len(first.names)
    title = [f"PePR   {n} {first.of}{'s' if n != 1 else ''}"]
    if first.group is not None:
        title.append(f"group {_printable(first.group)}")
    title.append(f"metric {_printable(first.metric)}")
    lines: list[_Line] = [[(_short("   ".join(title), width), "bold")]]
    for ranking in rankings:
        lines.append([(_short(f"  {ranking.label}   {_bounds(ranking)}", width), "")])
    lines += [[], [(row("#", "model", headings), "dim")]]
    for rank, i in enumerate(order, start=1):
        lines.append([(row(str(rank), first.names[i], [cells[i] for cells in columns]), "")])
    lines.append([(_short(f"  ranked by {first.label}; * on its Pareto front", width), "dim")])
    return _written(lines, color=color, width=width)


def ranking_data(ranking: Ranking) -> dict[str, Any]:
    """The ranking as JSON data, best score first; SI or the table's own unit; unknown is None."""
    low, high = ranking.scores.bounds
    order = ranking.order
    rows = []
    for i, flat in zip(order, flat_rows(ranking), strict=True):
        row = {key: value for key, value in flat.items() if key not in _OF_RANKING}
        rows.append({**row, "runs": list(ranking.run_ids[i]) if ranking.run_ids else []})
    return {
        "label": ranking.label,
        "group": ranking.group,
        "metric": ranking.metric,
        "percent": ranking.percent,
        "transform": ranking.transform,
        "resource": ranking.resource_name,
        "resource_key": ranking.key,
        "unit": ranking.unit or None,
        "provenance": ranking.provenance,
        "bounds": {
            "min": low,
            "max": high,
            "set_by": "given" if ranking.bounds_given else "cohort",
            "source": ranking.bounds_source or None,
        },
        "rows": rows,
        "doubts": [
            {"what": doubt.what, "why": doubt.why, "names": list(doubt.names)}
            for doubt in ranking.doubts
        ],
        "without_doubtful": ranking_data(ranking.without) if ranking.without else None,
    }


_OF_RANKING = {"group", "metric", "resource_key", "unit", "label"}


def _title(ranking: Ranking, width: int) -> list[str]:
    """What is ranked and who set the bounds: one line, or two where one is too short."""
    n = len(ranking.names)
    parts = [ranking.label, f"{n} {ranking.of}{'s' if n != 1 else ''}"]
    if ranking.group is not None:
        parts.append(f"group {_printable(ranking.group)}")
    parts.append(f"metric {_printable(ranking.metric)}")
    parts.append(_bounds(ranking))
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}   {part}" if lines[-1] else part
        if _cells(joined) > width:
            lines.append(_short("  " + part, width))
        else:
            lines[-1] = joined
    return lines


def _bounds(ranking: Ranking) -> str:
    low, high = (_amount(bound, ranking.unit) for bound in ranking.scores.bounds)
    who = f"this {'group' if ranking.group else 'cohort'}"
    if ranking.bounds_given:
        who = f"of {_printable(ranking.bounds_source)}" if ranking.bounds_source else "given"
    return f"bounds {low} … {high} ({who})"


def _ranks(ranking: Ranking) -> list[str]:
    """The ranks as they are shown, in the order of the ranking."""
    order, standing = ranking.order, ranking.standing
    if standing is None or standing.best is None or standing.worst is None:
        return [str(rank) for rank in range(1, len(order) + 1)]
    return [
        f"{best}" if best == worst else f"{best}–{worst}"
        for best, worst in zip(standing.best[order], standing.worst[order], strict=True)
    ]


def _notes(ranking: Ranking, ranks: Sequence[str]) -> list[str]:
    """What a reader has to know of ranks, ± and swap."""
    standing = ranking.standing
    if standing is None:
        return []
    notes = []
    if ranged := next((rank for rank in ranks if "–" in rank), None):
        notes.append(f"  # {ranged}: any of these ranks; such rows differ by less than ± (k = 2)")
    notes.append("  swap: how likely a row and the next are in truth the other way round")
    if ranking.repeated and ranking.single.any():
        notes.append("  n = 1: the spread over repeats is unknown; ± and swap are at least that")
    elif not ranking.repeated:
        notes.append("  one run a model: the spread over repeats is unknown, and not in ± and swap")
    return notes


def _performance_cells(ranking: Ranking) -> list[str]:
    u = ranking.u_performance
    if u is None or not ranking.repeated:
        return [f"{p:.3f}" for p in ranking.performance]
    return [_with_u(p, x) for p, x in zip(ranking.performance, u, strict=True)]


def _score_cells(ranking: Ranking) -> list[str]:
    values, u = ranking.scores.pepr, ranking.u_pepr
    if u is None or bool(np.isnan(u).all()):
        return [f"{value:.3f}" for value in values]
    return [_with_u(value, x) for value, x in zip(values, u, strict=True)]


def _with_u(value: float, u: float) -> str:
    return f"{value:.3f} ± " + ("?" if math.isnan(u) else f"{u:.3f}")


def _percent(probability: float) -> str:
    if math.isnan(probability):
        return "?"
    return "<1%" if probability < 0.01 else f"{probability:.0%}"


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return units.format_duration(value)
    if unit in ("J", "g", "B"):
        return units.format_quantity(value, unit)
    if unit:
        return f"{value:#.4g} {unit}"  # a currency takes no prefix
    return units.format_quantity(value, "").rstrip() if value >= 1e4 else f"{value:.4g}"


def _bar(fraction: float, cells: int) -> str:
    full, eighths = divmod(round(fraction * cells * 8), 8)
    return "█" * full + (_EIGHTHS[eighths] if eighths else "")


def _written(lines: list[_Line], *, color: bool, width: int) -> str:
    if not color:
        return "\n".join("".join(text for text, _ in line).rstrip() for line in lines) + "\n"
    from rich.console import Console
    from rich.text import Text

    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=True, color_system="standard", no_color=False, width=width
    )
    for line in lines:
        console.print(Text.assemble(*line), no_wrap=True, overflow="ignore", crop=False)
    return screen.getvalue()


def _cells(text: str) -> int:
    if text.isascii():  # the common case, and 5 times faster
        return len(text)
    from rich.cells import cell_len  # names can be wide: one CJK character takes two cells

    return cell_len(_printable(text))


def _left(text: str, cells: int) -> str:
    """`text` in exactly `cells` terminal cells, cut with "…" or padded on its right."""
    text = _printable(text)
    taken = _cells(text)
    if taken <= cells:
        return text + " " * (cells - taken)
    from rich.cells import set_cell_size

    return set_cell_size(set_cell_size(text, cells - 1).rstrip() + "…", cells)


def _right(text: str, cells: int) -> str:
    return " " * (cells - _cells(text)) + _printable(text)


def _short(text: str, cells: int) -> str:
    return _left(text, min(_cells(text), cells))


def _printable(text: str) -> str:
    """No control characters: a name from a file could move the cursor or ring the bell."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
