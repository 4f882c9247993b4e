"""The PePR ranking on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pepr_profiler.record import Floats
from pepr_profiler.report.text import Line, brief, cells, cut, drawn, left, printable, right, wrap
from pepr_profiler.study.ranking import Caution, Ranking
from pepr_profiler.units import format_amount

_EIGHTHS = " ▏▎▍▌▋▊▉"
_HEADING_CELLS = 12  # a column's heading is cut here; names of metrics can be long
_LABEL_CELLS = 17  # PePR-parameters
_NAME_CELLS = (8, 14)  # what a name keeps at least, and before a bar is drawn
_BAR_CELLS = (5, 20)
_REVERSED, _REVERSED_CELLS = "P(rev.)", len("100%")


def render_ranking(
    ranking: Ranking, *, width: int = 80, color: bool = False, anyway: bool = False
) -> str:
    """The ranking as lines of at most `width` terminal cells, best score first, and its legend.

    Rows that their resource cannot tell apart are listed without scores, unless `anyway`. A row
    whose score is too close to others' for a rank of its own has the range of its possible ranks.
    Long names are cut with "…", unprintable characters are shown as escapes. `!` marks a resource
    outside a given normalisation range, `?` an outlier, `*` the Pareto front. Without `color` the
    text has no escape codes.
    """
    if ranking.noise and (ranking.undefined or not anyway):
        return _undecided(ranking, width=width, color=color)
    scores, order, standing = ranking.scores, ranking.order, ranking.standing
    odd = ranking.outlier_reasons
    marks = ["!" if clamped else "" for clamped in scores.clamped]
    pad = " " if any(marks) else ""
    u_performance = ranking.u_performance if ranking.repeated else None
    u_resource = _known(ranking.u_resource if ranking.repeated else None, ranking)
    gap = 3 if standing is None else 2  # one column more
    ranks = _ranks(ranking)
    rank_cells = max(map(len, ranks))
    longest = max(cells(printable(name)) for name in ("model", *ranking.names))
    roomy = max(longest, _NAME_CELLS[0])
    # The u of the resource only where names have room beside it, that of P where they have some.
    for of_r, of_p, least in (
        (True, True, roomy),
        (False, True, _NAME_CELLS[0]),
        (False, False, 0),
    ):
        columns = [
            (
                _heading(ranking.metric),
                _with_u(ranking.performance, u_performance if of_p else None),
            ),
            (
                _heading(ranking.resource_name),
                [
                    ("? " if odd[i] else "")
                    + format_amount(r, ranking.unit, u_resource[i] if of_r else None)
                    for i, r in enumerate(ranking.resource.tolist())
                ],
            ),
            (
                "R  " + pad,
                [f"{r:.3f}{m or pad}" for r, m in zip(scores.r_norm, marks, strict=True)],
            ),
            (_heading(ranking.label, _LABEL_CELLS), _score_texts(ranking)),
        ]
        if ranking.repeated and ranking.n is not None:
            columns.insert(0, ("n", [str(n) for n in ranking.n]))
        widths = [max(map(cells, [heading, *column])) for heading, column in columns]
        # Indent, gaps, the mark of the front: what is neither name, bar nor column.
        room = width - (2 + rank_cells + 2 + sum(widths) + gap * len(widths) + 2 + 2)
        if standing is not None:
            room -= gap + _REVERSED_CELLS
        if room >= least:
            break
    # Names come first, bars have what is left of the line.
    name_cells = max(min(longest, _NAME_CELLS[1], room), min(longest, room - _BAR_CELLS[0]))
    name_cells = max(_NAME_CELLS[0], name_cells)
    bar_cells = min(_BAR_CELLS[1], room - name_cells)
    if bar_cells < _BAR_CELLS[0]:  # no room: the numbers say it
        name_cells, bar_cells = max(_NAME_CELLS[0], min(longest, room)), 0

    def row(rank: str, name: str, values: Sequence[str], last: Sequence[str]) -> str:
        *numbers, score = zip(values, widths, strict=True)
        # The score is flush left under its heading, as its uncertainty may be missing.
        texts = [*(right(*value) for value in numbers), left(*score), *last]
        return (gap * " ").join([f"  {rank:>{rank_cells}}  {left(name, name_cells)}", *texts])

    lines = [_title(ranking, ranking.label, width), [], *_cautions(ranking, width)]
    # The last heading hangs over the bars, which have none.
    last = [] if standing is None else [_REVERSED]
    lines.append([(row("#", "model", [heading for heading, _ in columns], last), "dim")])
    for rank, i in zip(ranks, order, strict=True):
        if standing is not None:
            next_row = "" if i == order[-1] else _probability(standing.swap[i])
            last = [right(next_row, _REVERSED_CELLS)]
        values = row(rank, ranking.names[i], [column[i] for _, column in columns], last)
        bar = _bar(scores.pepr[i], bar_cells)
        line = [(f"{values}  ", ""), (left(bar, bar_cells), "green")]
        lines.append([*line, (" *", "yellow")] if ranking.front[i] else line)
    lines += [[], *_legend(_notes(ranking, ranks), width)]
    return drawn(lines, width=width, color=color) + "\n"


def render_side_by_side(
    rankings: Sequence[Ranking], *, width: int = 80, color: bool = False
) -> str:
    """Rankings of the same runs by several resources as one table, in the order of the first.

    Each score has its ± where all of them fit; `*` marks the Pareto front of each resource.
    """
    first = rankings[0]
    order = first.order
    at = [{name: i for i, name in enumerate(ranking.names)} for ranking in rankings]

    def columns_of(with_u: bool) -> list[list[str]]:
        columns = [[f"{p:.3f}" for p in first.performance]]
        for ranking, where in zip(rankings, at, strict=True):
            scored = _score_texts(ranking) if with_u else _with_u(ranking.scores.pepr, None)
            marked = [
                scored[i] + ("!" if ranking.scores.clamped[i] else "")
                + (" *" if ranking.front[i] else "  ")
                for i in (where[name] for name in first.names)
            ]  # fmt: skip
            columns.append(marked)
        return columns

    headings = [_heading(first.metric), *(_heading(ranking.label) for ranking in rankings)]
    rank_cells = len(str(len(order)))
    for columns in (columns_of(True), columns_of(False)):
        widths = [
            max(map(cells, [heading, *column]))
            for heading, column in zip(headings, columns, strict=True)
        ]
        room = width - (2 + rank_cells + 2 + sum(widths) + 3 * len(widths))
        if room >= _NAME_CELLS[0]:
            break
    longest = max(cells(printable(name)) for name in ("model", *first.names))
    name_cells = max(_NAME_CELLS[0], min(longest, room))

    def row(rank: str, name: str, values: Sequence[str]) -> str:
        texts = [right(values[0], widths[0])]
        texts += [left(value, w) for value, w in zip(values[1:], widths[1:], strict=True)]
        return "   ".join([f"  {rank:>{rank_cells}}  {left(name, name_cells)}", *texts])

    cautions = [line for ranking in rankings for line in _cautions(ranking, width)]
    lines = [_title(first, "PePR", width), [], *cautions]
    lines.append([(row("#", "model", headings), "dim")])
    for rank, i in enumerate(order, start=1):
        values = [column[i] for column in columns]
        lines.append([(row(str(rank), first.names[i], values), "")])
    notes = [
        ("PePR", f"{_in_text(first.metric)} / (1 + R); the rows are in the order of {first.label}")
    ]
    notes += [(f"R of {ranking.label}", _range_text(ranking)) for ranking in rankings]
    notes += [_outside(ranking) for ranking in rankings if ranking.scores.clamped.any()][:1]
    notes.append(("*", f"on the Pareto front of {_in_text(first.metric)} and that resource"))
    lines += [[], *_legend(notes, width)]
    return drawn(lines, width=width, color=color) + "\n"


def _undecided(ranking: Ranking, *, width: int, color: bool) -> str:
    """The rows with their performance and resource, in the order of input, without a ranking."""
    columns = [
        (_heading(ranking.metric), _with_u(ranking.performance, ranking.u_performance)),
        (
            _heading(ranking.resource_name),
            [
                format_amount(float(r), ranking.unit, None if math.isnan(u) else float(u))
                for r, u in zip(ranking.resource, _known(ranking.u_resource, ranking), strict=True)
            ],
        ),
    ]
    if ranking.repeated and ranking.n is not None:
        columns.insert(0, ("n", [str(n) for n in ranking.n]))
    widths = [max(map(cells, [heading, *column])) for heading, column in columns]
    longest = max(cells(printable(name)) for name in ("model", *ranking.names))
    name_cells = max(_NAME_CELLS[0], min(longest, width - (2 + sum(widths) + 3 * len(widths))))

    def row(name: str, values: Sequence[str]) -> str:
        texts = [right(value, room) for value, room in zip(values, widths, strict=True)]
        return "   ".join([f"  {left(name, name_cells)}", *texts])

    lines = [_title(ranking, "not ranked", width), [], *_cautions(ranking, width)]
    lines.append([(row("model", [heading for heading, _ in columns]), "dim")])
    for i, name in enumerate(ranking.names):
        lines.append([(row(name, [column[i] for _, column in columns]), "")])
    notes = []
    if ranking.repeated:
        notes.append(("n", "runs of the model; its numbers are their means"))
        notes.append(("±", "k = 2 (95%), Student's t for few repeats"))
    notes += _of_single(ranking)
    if not ranking.undefined:
        notes.append(("--anyway", "ranks them by PePR all the same"))
    lines += [[], *_legend(notes, width)]
    return drawn(lines, width=width, color=color) + "\n"


def _cautions(ranking: Ranking, width: int) -> list[Line]:
    """What has to be known before the numbers, as paragraphs."""
    lines: list[Line] = []
    for caution in ranking.warnings:
        if caution.code == "indistinguishable":
            texts = [sentence(caution.text), ratio_text(ranking)]
            styles = ["bold", ""]
        elif caution.code == "two-rows" and ranking.noise:
            texts, styles = [_two_rows(caution)], [""]
        else:
            continue  # stderr names them
        for text, style in zip(texts, styles, strict=True):
            lines += [[(f"  {part}", style)] for part in wrap(printable(text), width - 2)]
    return [*lines, []] if lines else []


def _two_rows(caution: Caution) -> str:
    return sentence(f"{caution.text}; {caution.fix}")


def sentence(text: str) -> str:
    """A text of a warning as a sentence of its own."""
    return f"{text[:1].upper()}{text[1:]}."


def ratio_text(ranking: Ranking) -> str:
    """The resource of the row that took most against that of the least, with its interval."""
    most, least = int(ranking.resource.argmax()), int(ranking.resource.argmin())
    names = brief(ranking.names[most], 40), brief(ranking.names[least], 40)
    standing, resource = ranking.standing, _in_text(ranking.resource_name)
    if ranking.undefined:
        took = format_amount(float(ranking.resource[0]), ranking.unit)
        return f"All took {took} of {resource} on average."
    if standing is None or not all(map(math.isfinite, standing.difference)):
        return f"{names[1]} took least, and {names[0]} most."
    once = "" if ranking.repeated else "; one run each, so without the spread over repeats"
    if all(map(math.isfinite, standing.ratio)):
        value, low, high = standing.ratio
        places = max(2, min(6, 2 - math.floor(math.log10(max(high - low, 1e-9)))))
        return (
            f"{names[0]} took {value:.{places}f} times the {resource} of {names[1]} "
            f"(95%: {low:.{places}f} to {high:.{places}f}{once})."
        )
    more, least_more, most_more = (format_amount(x, ranking.unit) for x in standing.difference)
    return (
        f"{names[0]} took {more} of {resource} more than {names[1]} "
        f"(95%: {least_more} to {most_more}{once})."
    )


def _title(ranking: Ranking, label: str, width: int) -> Line:
    n = len(ranking.names)
    parts = [label, f"{n} {ranking.of}{'s' if n != 1 else ''}"]
    if ranking.group is not None:
        parts.append(f"{ranking.grouped_by} {ranking.group}".strip())
    parts.append(f"metric {ranking.metric}")
    return [(cut("   ".join(map(printable, parts)), width), "bold")]


def _ranks(ranking: Ranking) -> list[str]:
    """The ranks as they are shown, in the order of the ranking."""
    order, standing = ranking.order, ranking.standing
    if standing is None or standing.best is None or standing.worst is None:
        return [str(rank) for rank in range(1, len(order) + 1)]
    return [
        f"{best}" if best == worst else f"{best}–{worst}"
        for best, worst in zip(standing.best[order], standing.worst[order], strict=True)
    ]


def _notes(ranking: Ranking, ranks: Sequence[str]) -> list[tuple[str, str]]:
    """What a reader has to know of the columns and marks that are shown."""
    metric, resource = _in_text(ranking.metric), _in_text(ranking.resource_name)
    notes = [(ranking.label, f"{metric} / (1 + R)"), ("R", _range_text(ranking))]
    if not ranking.noise:
        notes += [("", _two_rows(each)) for each in ranking.warnings if each.code == "two-rows"]
    standing = ranking.standing
    if standing is not None:
        notes.append((_REVERSED, "probability that the order of this row and the next is reversed"))
        if ranged := next((rank for rank in ranks if "–" in rank), None):
            notes.append((f"# {ranged}", "any of these ranks (95%)"))
        if any("–" in text for text in _score_texts(ranking)):
            notes.append(("0.1–0.2", "the interval of the score (95%), where it is lopsided"))
    if ranking.repeated:
        notes.append(("n", "runs of the model; its numbers are their means"))
    notes += _of_single(ranking)
    if any(ranking.scores.clamped):
        notes.append(_outside(ranking))
    if ranking.outliers:
        notes.append(("?", "an outlier: named above, with the reason"))
    notes.append(("*", f"on the {metric}/{resource} Pareto front"))
    return notes


def _of_single(ranking: Ranking) -> list[tuple[str, str]]:
    """What the numbers of models of one run mean, and what a question mark does."""
    standing, notes = ranking.standing, []
    if ranking.repeated and ranking.single.any():
        own = _known(ranking.u_resource, ranking)[ranking.single]
        text = "the spread over repeats is unknown: ± and P(rev.) leave it out"
        if np.isnan(own).all():
            text = "one run shows no spread: ± is unknown"
            if standing is not None and np.isfinite(standing.u_pepr[ranking.single]).any():
                text = "one run shows no spread: that of the others is taken for it"
        notes.append(("n = 1", text))
    elif standing is not None and not ranking.repeated:
        notes.append(("±", "k = 2; one run per model, so the spread over repeats is not in it"))
    elif standing is None and not ranking.repeated and ranking.of != "run":
        notes.append(("#", NO_SPREAD))
    unknown = [ranking.u_performance if ranking.repeated else None, ranking.u_pepr]
    if any(u is not None and np.isnan(u).any() and not np.isnan(u).all() for u in unknown):
        notes.append(("± ?", "the uncertainty is unknown; so is a probability that is ?"))
    return notes


NO_SPREAD = "how sure the order is, is unknown: one row shows no spread over repeats"
"""What has to be known of a table's rows that are no repeats."""


def _range_text(ranking: Ranking) -> str:
    low, high = (format_amount(end, ranking.unit) for end in ranking.scores.bounds)
    who = f" of these {ranking.of}s"
    if ranking.bounds_given:
        who = f" of {ranking.bounds_source}" if ranking.bounds_source else ", as given"
    return f"0 at {low}, 1 at {high} (normalisation range{who})"


def _outside(ranking: Ranking) -> tuple[str, str]:
    return (
        "!",
        f"{_in_text(ranking.resource_name)} outside of the normalisation range: R is set to 0 or 1",
    )


def _legend(notes: Sequence[tuple[str, str]], width: int) -> list[Line]:
    """The notes below each other, their texts in one column."""
    room = max(cells(printable(key)) for key, _ in notes)
    lines: list[Line] = []
    for key, text in notes:
        head = left(key, room)
        for part in wrap(printable(text), width - 2 - room - 2):
            lines.append([(f"  {head}  {part}", "dim")])
            head = " " * room
    return lines


def _heading(text: str, room: int = _HEADING_CELLS) -> str:
    return cut(printable(text), room)


def _in_text(name: str) -> str:
    """A name within the legend: names of metrics can be long."""
    return brief(name, 40)


def _with_u(values: Floats, u: Floats | None) -> list[str]:
    """Each value with its u, "?" where it is unknown; without, where nothing is known of any."""
    if u is None or np.isnan(u).all():
        return [f"{value:.3f}" for value in values]
    texts = ["?" if math.isnan(x) else f"{x:.3f}" for x in u]
    return [f"{value:.3f} ± {text}" for value, text in zip(values, texts, strict=True)]


def _known(values: Floats | None, ranking: Ranking) -> Floats:
    return np.full(len(ranking.names), math.nan) if values is None else values


def _score_texts(ranking: Ranking) -> list[str]:
    """Each score with its ±, or with its interval where one side is much longer."""
    standing = ranking.standing
    texts = _with_u(ranking.scores.pepr, ranking.u_pepr)
    if standing is None:
        return texts
    return [
        f"{ranking.scores.pepr[i]:.3f} {standing.low[i]:.3f}–{standing.high[i]:.3f}"
        if standing.lopsided[i]
        else text
        for i, text in enumerate(texts)
    ]


def _probability(value: float) -> str:
    if math.isnan(value):
        return "?"
    return "<1%" if value < 0.01 else f"{value:.0%}"


def _bar(fraction: float, room: int) -> str:
    full, eighths = divmod(round(fraction * room * 8), 8)
    return "█" * full + (_EIGHTHS[eighths] if eighths else "")
