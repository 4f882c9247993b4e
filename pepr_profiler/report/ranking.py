"""The PePR ranking as a screen of text and as data."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

from pepr_profiler import pepr, units

_EIGHTHS = " ▏▎▍▌▋▊▉"
_HEADING_CELLS = 12  # a column's heading is cut here; names of metrics can be long
_NAME_CELLS = 8  # what a name keeps at least
_BAR_CELLS = (8, 20)

# A line is pieces of text, each with the style that a colour terminal gives it.
_Line = list[tuple[str, str]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranking:
    """A scored cohort and what its numbers mean; arrays and `names` are (n,), in any order.

    `label` heads the score ("PePR-E"), `of` says what a row is ("run"). `unit` is a unit that
    units.format_quantity knows, or "" where only the user knows it. `u_pepr` has k = 2, with NaN
    for unknown; None where no row's is known.
    """

    label: str
    of: str
    names: tuple[str, ...]
    metric: str
    resource_name: str
    unit: str
    performance: pepr.Floats
    resource: pepr.Floats
    scores: pepr.Scores
    bounds_given: bool
    u_pepr: pepr.Floats | None = None
    group: str | None = None

    @property
    def front(self) -> pepr.Mask:
        """Which rows are on the performance/resource Pareto front."""
        return pepr.pareto_front(self.performance, self.resource)


def render_ranking(ranking: Ranking, *, width: int = 80, color: bool = False) -> str:
    """The ranking as lines of at most `width` terminal cells, best score first.

    Long names are cut with "…", unprintable characters become "?". `!` marks a resource outside
    fixed bounds, `*` the Pareto front. Without `color` the text has no escape codes.
    """
    scores, order = ranking.scores, pepr.rank(ranking.scores)
    front = ranking.front
    marks = ["!" if clamped else "" for clamped in scores.clamped]
    pad = " " if any(marks) else ""
    columns = [
        (_short(ranking.metric, _HEADING_CELLS), [f"{p:.3f}" for p in ranking.performance]),
        (
            _short(ranking.resource_name, _HEADING_CELLS),
            [_amount(r, ranking.unit) for r in ranking.resource],
        ),
        ("R  " + pad, [f"{r:.3f}{m or pad}" for r, m in zip(scores.r_norm, marks, strict=True)]),
        (ranking.label, _score_cells(ranking)),
    ]
    widths = [max(map(_cells, [heading, *cells])) for heading, cells in columns]
    rank_cells = max(1, len(str(len(order))))
    # Indent, gaps, the mark of the front: what is neither name, bar nor column.
    left = width - (2 + rank_cells + 2 + sum(widths) + 3 * len(widths) + 2 + 2)
    longest = max(map(_cells, ["model", *ranking.names]))
    name_cells = max(_NAME_CELLS, min(longest, left - _BAR_CELLS[0]))
    bar_cells = max(_BAR_CELLS[0], min(_BAR_CELLS[1], left - name_cells))

    def row(rank: str, name: str, cells: list[str]) -> str:
        # The score is flush left under its heading, as its uncertainty may be missing.
        numbers = [_right(cell, w) for cell, w in zip(cells[:-1], widths[:-1], strict=True)]
        score = _left(cells[-1], widths[-1])
        return "   ".join([f"  {rank:>{rank_cells}}  {_left(name, name_cells)}", *numbers, score])

    lines: list[_Line] = [[(line, "bold")] for line in _title(ranking, width)]
    lines += [[], [(row("#", "model", [heading for heading, _ in columns]), "dim")]]
    for rank, i in enumerate(order, start=1):
        line = [(row(str(rank), ranking.names[i], [cells[i] for _, cells in columns]) + "  ", "")]
        if front[i]:
            line += [(_left(_bar(scores.pepr[i], bar_cells), bar_cells), "green"), (" *", "yellow")]
        else:
            line += [(_bar(scores.pepr[i], bar_cells), "green")]
        lines.append(line)
    trade_off = f"{_printable(ranking.metric)}/{_printable(ranking.resource_name)}"
    lines.append([(_short(f"  * on the {trade_off} Pareto front", width), "dim")])
    if any(marks):
        lines.append([("  ! outside the bounds, R clamped", "dim")])
    return _written(lines, color=color, width=width)


def ranking_data(ranking: Ranking) -> dict[str, Any]:
    """The ranking as JSON data, best score first; SI or the table's own unit; unknown is None."""
    scores, front = ranking.scores, ranking.front
    low, high = scores.bounds
    u = ranking.u_pepr
    return {
        "label": ranking.label,
        "group": ranking.group,
        "metric": ranking.metric,
        "resource": ranking.resource_name,
        "unit": ranking.unit or None,
        "bounds": {
            "min": low,
            "max": high,
            "set_by": "given" if ranking.bounds_given else "cohort",
        },
        "rows": [
            {
                "rank": rank,
                "name": ranking.names[i],
                "performance": float(ranking.performance[i]),
                "resource": float(ranking.resource[i]),
                "r_norm": float(scores.r_norm[i]),
                "pepr": float(scores.pepr[i]),
                "u_pepr": None if u is None or math.isnan(u[i]) else float(u[i]),
                "pareto": bool(front[i]),
                "clamped": bool(scores.clamped[i]),
            }
            for rank, i in enumerate(pepr.rank(scores), start=1)
        ],
    }


def _title(ranking: Ranking, width: int) -> list[str]:
    """What is ranked and who set the bounds: one line, or two where one is too short."""
    n = len(ranking.names)
    low, high = (_amount(bound, ranking.unit) for bound in ranking.scores.bounds)
    parts = [ranking.label, f"{n} {ranking.of}{'s' if n != 1 else ''}"]
    if ranking.group is not None:
        parts.append(f"group {_printable(ranking.group)}")
    parts.append(f"metric {_printable(ranking.metric)}")
    who = "given" if ranking.bounds_given else f"this {'group' if ranking.group else 'cohort'}"
    parts.append(f"bounds {low} … {high} ({who})")
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}   {part}" if lines[-1] else part
        if _cells(joined) > width:
            lines.append(_short("  " + part, width))
        else:
            lines[-1] = joined
    return lines


def _score_cells(ranking: Ranking) -> list[str]:
    values, u = ranking.scores.pepr, ranking.u_pepr
    if u is None:
        return [f"{value:.3f}" for value in values]
    return [
        f"{value:.3f} ± " + ("?" if math.isnan(u_value) else f"{u_value:.3f}")
        for value, u_value in zip(values, u, strict=True)
    ]


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return units.format_duration(value)
    return units.format_quantity(value, unit) if unit else f"{value:.4g}"


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
