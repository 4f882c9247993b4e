"""Tables for papers: LaTeX (booktabs) and Markdown, one unit a column, ± to the same digit."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pepr_profiler.energy.sources import KINDS
from pepr_profiler.report.components import component_name, counted
from pepr_profiler.report.job_text import job_name, rank_name
from pepr_profiler.report.ranking_text import NO_SPREAD, ratio_text, sentence
from pepr_profiler.study.analysis import Analysis, Traits, best, best_performing
from pepr_profiler.study.pepr import listed
from pepr_profiler.study.ranking import Ranking
from pepr_profiler.units import (
    UNKNOWN,
    format_amount,
    format_percent,
    format_provenance,
    known,
    ratio,
)

_MOST_DIGITS = 6
"""Of a number, however small its u is: a reader gains nothing from more."""

_WIDEST = 1e5
"""A column whose amounts differ by more than this factor has a unit in each cell instead."""

_MOST_ZEROS = 9  # that a number begins or ends with; beyond, it has an exponent
_CELL = 80  # characters of a name; the other forms have it in full


@dataclass(frozen=True)
class TableColumn:
    """A column of plain text: its heading and its cells. Numbers are flush right."""

    head: str
    cells: Sequence[str]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Columns of equal length, with a title and notes.

    `rules` are the numbers of the rows that a rule stands above, besides the first.
    """

    title: str
    columns: Sequence[TableColumn]
    notes: Sequence[str] = ()
    rules: frozenset[int] = frozenset()

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells of each row."""
        return list(zip(*(column.cells for column in self.columns), strict=True))


def typeset(tables: Iterable[Table], form: str) -> bytes:
    """Tables as the text of a file, `form` is "tex" or "md".

    In LaTeX each is a tabular for the booktabs package, with its title and notes as comments.
    """
    write = latex if form == "tex" else markdown
    return "\n".join(map(write, tables)).encode("utf-8", "replace")


def latex(table: Table) -> str:
    """A table as a tabular for booktabs."""
    heads = [_LATEX_HEADS.get(column.head, latex_text(column.head)) for column in table.columns]
    rows = [list(map(latex_text, row)) for row in table.rows]
    body = [f"% {_one_line(text)}" for text in filter(None, [table.title, *table.notes])]
    # pdflatex knows the letters of Latin alphabets; the T1 fonts have them all.
    if any(ord(c) > 0x17F for row in [heads, *rows] for cell in row for c in cell):
        body.append("% Some characters below need XeLaTeX or LuaLaTeX, and a font that has them.")
    align = "".join("r" if column.numeric else "l" for column in table.columns)
    body += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", " & ".join(heads) + r" \\"]
    body.append(r"\midrule")
    for number, row in enumerate(rows):
        if number in table.rules:
            body.append(r"\midrule")
        body.append(" & ".join(row) + r" \\")
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}", ""])


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown, its title above and its notes below."""
    lines = [f"**{markdown_text(table.title)}**", ""] if table.title else []
    lines.append("| " + " | ".join(markdown_text(column.head) for column in table.columns) + " |")
    lines.append("| " + " | ".join("--:" if c.numeric else ":--" for c in table.columns) + " |")
    lines += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in table.rows]
    for note in table.notes:
        lines += ["", markdown_text(note)]
    return "\n".join([*lines, ""])


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    # After \\ these two would be its arguments.
    "[": "{[}", "]": "{]}", "*": "{*}",
    # Two of these in a row would be another character.
    "-": "-{}", "'": "'{}", "`": "`{}",
    "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "×": r"$\times$", "·": r"$\cdot$",
    "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "²": r"\textsuperscript{2}",
    "₂": r"\textsubscript{2}", "µ": r"\textmu{}", "μ": r"\textmu{}", "…": r"\ldots{}",
    "★": r"$\star$", "†": r"\dag{}", "∞": r"$\infty$",
    **{c: rf"\textsuperscript{{{n}}}" for n, c in zip("0345679", "⁰³⁴⁵⁶⁷⁹", strict=True)},
}  # fmt: skip
_LATEX["¹"], _LATEX["⁸"] = r"\textsuperscript{1}", r"\textsuperscript{8}"
_LATEX_HEADS = {"R": "$R$", "#": r"\#"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~$#&])")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def latex_text(text: str) -> str:
    """Any text as LaTeX that shows it, on one line."""
    escaped = "".join(_LATEX.get(c, c) for c in _one_line(text))
    # A lone hyphen or quote needs no braces behind it.
    return re.sub(r"([-'`])\{\}(?!\1)", r"\1", escaped)


def markdown_text(text: str) -> str:
    """Any text as Markdown that shows it, on one line."""
    return _MARKDOWN.sub(r"\\\1", _one_line(text))


def names(head: str, cells: Iterable[Any]) -> TableColumn:
    """A column of texts, which are cut where they are long."""
    texts = ["" if cell is None else str(cell) for cell in cells]
    shown = [x if len(x) <= _CELL else f"{x[: _CELL - 1]}…" for x in texts]
    return TableColumn(head, shown, numeric=False)


def numbers(
    head: str,
    values: Iterable[float | None],
    us: Iterable[float | None] | None = None,
    *,
    digits: int = 4,
) -> TableColumn:
    """A column of pure numbers with `digits` decimals; those with a u have two digits of it."""
    values = list(values)
    many = [None] * len(values) if us is None else list(us)
    any_u = any(known(u) for u in many)
    return TableColumn(
        head,
        [
            _with_u(value, u, digits=digits, any_u=any_u)
            for value, u in zip(values, many, strict=True)
        ],
    )


def amounts(
    head: str,
    values: Iterable[float | None],
    us: Iterable[float | None] | None = None,
    *,
    unit: str,
    at_least: Sequence[bool] = (),
) -> TableColumn:
    """A column of amounts in one unit, which stands in its heading: "energy (kJ)".

    Where they differ by more than five powers of ten each cell has its own. `at_least` are the ones
    that are lower bounds: "≥ 450".
    """
    values = list(values)
    many = [None] * len(values) if us is None else list(us)
    sizes = sorted(abs(v) for v in values if known(v) is not None and v)
    if sizes and sizes[-1] / sizes[0] > _WIDEST:
        cells = [
            UNKNOWN if known(v) is None or v is None else format_amount(v, unit, u)
            for v, u in zip(values, many, strict=True)
        ]
        return TableColumn(head, cells)
    scale, shown = _scale(sizes[len(sizes) // 2] if sizes else 1.0, unit)
    any_u = any(known(u) for u in many)
    bounds = at_least or [False] * len(values)
    cells = [
        UNKNOWN
        if known(v) is None or v is None
        else f"≥ {_with_u(v / scale, 0.0)}"
        if bound
        else _with_u(v / scale, None if u is None else u / scale, any_u=any_u)
        for v, u, bound in zip(values, many, bounds, strict=True)
    ]
    return TableColumn(f"{head} ({shown})" if shown else head, cells)


_SCALES = {"J": "JkMGT", "W": "WkMGT", "g": "gk", "B": "BkMGT"}
_TIMES = ((3600.0 * 48, "h", 3600.0), (7200.0, "h", 3600.0), (120.0, "min", 60.0), (0.0, "s", 1.0))


def _scale(typical: float, unit: str) -> tuple[float, str]:
    """What the amounts of a column are divided by, and the unit that they have then."""
    if unit == "s":
        return next((scale, name) for least, name, scale in _TIMES if typical >= least)
    power = max(-9, min(12, math.floor(math.log10(typical)) // 3 * 3)) if typical else 0
    if unit == "g" and power >= 6:
        return 1e6, "t"
    if unit in ("J", "W", "g", "B"):
        power = max(power, 0) if unit == "B" else power
        return 10.0**power, f"{_PREFIXES[power]}{unit}"
    if unit or -3 <= power < 6:
        return 1.0, unit  # a currency, and whatever else a user names, takes no prefix
    return 10.0**power, "×10" + "".join(_RAISED[c] for c in str(power))


_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T"}
_RAISED = dict(zip("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True))


def _with_u(
    value: float | None, u: float | None, *, digits: int | None = None, any_u: bool = False
) -> str:
    """A number and its u with the same last digit: two digits of u (GUM 7.2.6).

    Without a u it has `digits` decimals, or four significant digits; "?" is an unknown u where
    others have one.
    """
    value, u = known(value), known(u)
    if value is None:
        return UNKNOWN
    exponent = math.floor(math.log10(abs(value))) if value else 0
    if abs(exponent) > _MOST_ZEROS:
        return f"{value:.3e}" + (f" ± {u:.1e}" if u else "")
    if u is None or u <= 0:
        decimals = max(0, 3 - exponent) if digits is None else digits
        text = _signed(value, decimals)
        return f"{text} ± ?" if u is None and any_u else text
    largest = max(exponent, math.floor(math.log10(u)))
    decimals = min(1 - int(f"{u:.1e}".partition("e")[2]), _MOST_DIGITS - 1 - largest)
    shown_u = max(u, 10.0**-decimals)
    return f"{_signed(value, decimals)} ± {_signed(shown_u, decimals)}"


def _signed(value: float, decimals: int) -> str:
    text = f"{round(value, decimals):.{max(decimals, 0)}f}"
    return "−" + text[1:] if text.startswith("-") else text


def run_table(summary: Mapping[str, Any]) -> Table:
    """A run or job as a table: its total, its devices by name, a job's ranks, its phases."""
    energy = summary["energy"]
    total_j, time_s = energy.get("total_j"), summary.get("time_s")
    ranks, phases = summary.get("ranks") or (), summary.get("phases") or ()
    devices = energy.get("components") or ()
    groups = [
        [_Part("total", energy, total_j, time_s, energy.get("mean_w"))],
        [_Part(component_name(device), device, device.get(counted(energy)), time_s,
               device.get("mean_w")) for device in devices],
        [_Part.lasting(rank_name(rank, summary), rank) for rank in ranks if len(ranks) > 1],
        [_Part.lasting(f"phase {phase['name']}", phase) for phase in phases],
    ]  # fmt: skip
    parts = [part for group in groups for part in group]
    sizes = [len(group) for group in groups]
    shares = [
        format_percent(ratio(part.energy_j, total_j), unknown="")
        if part.of.get("in_total", True)
        else "not in the total"
        for part in parts
    ]
    whose = job_name(summary) if ranks else f"run {summary['run_id']}"
    by = "device, rank and phase" if sizes[2] else "device and phase"
    return Table(
        title=f"{whose[0].upper()}{whose[1:]}: its energy by {by}",
        columns=[
            names("", [part.name for part in parts]),
            names("energy is", [
                format_provenance(part.of.get("provenance"))
                for group in groups[:2] for part in group] + [""] * sum(sizes[2:])),
            amounts("time", [part.duration_s for part in parts], unit="s"),
            amounts("energy", [part.energy_j for part in parts],
                    [part.of.get("u_j") for part in parts], unit="J",
                    at_least=[bool(part.of.get("partial")) for part in parts]),
            amounts("mean power", [part.mean_w for part in parts], unit="W"),
            TableColumn("share", shares),
        ],
        notes=[_OF_ENERGY, "The mean power of a device is of the whole device."],
        rules=frozenset(itertools.accumulate(sizes[:-1])) - {len(parts)},
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """A row of `run_table`; `of` is the part of a summary that it shows."""

    name: str
    of: Mapping[str, Any]
    energy_j: float | None
    duration_s: float | None
    mean_w: float | None

    @classmethod
    def lasting(cls, name: str, of: Mapping[str, Any]) -> _Part:
        """A rank or phase, which has a duration of its own."""
        energy_j, duration_s = of["energy_j"], of["duration_s"]
        has_mean = known(energy_j) is not None and duration_s
        mean_w = energy_j / duration_s if has_mean else None
        return cls(name, of, energy_j, duration_s, mean_w)


_OF_ENERGY = (
    "Energy ± covers 95% (k = 2). After ≥ a device is missing for a time, and what it took unknown."
)


def runs_table(rows: Sequence[Mapping[str, Any]], partial: Sequence[bool]) -> Table:
    """Runs (`export.flat_run`) as a table; `partial` are those whose total lacks a device."""

    def column(key: str) -> list[Any]:
        return [row[key] for row in rows]

    columns = [
        names("run", column("run_id")),
        names("name", column("name")),
        names("experiment", column("experiment")),
        amounts("time", column("time_s"), unit="s"),
        amounts("energy", column("energy_j"), column("energy_u_j"), unit="J", at_least=partial),
        names("energy is", map(format_provenance, column("provenance"))),
        *(amounts(_KIND_NAMES[k], column(f"energy_{k}_j"), unit="J") for k in KINDS),
        amounts("carbon", column("carbon_g_co2e"), unit="g"),
        amounts("memory", column("peak_rss_bytes"), unit="B"),
        amounts("GPU memory", column("gpu_peak_bytes"), unit="B"),
        names("metric", column("performance_metric")),
        numbers("performance", column("performance")),
    ]
    return Table(
        title=f"{len(rows):,} runs",
        columns=[c for c in columns if c.head == "run" or set(c.cells) - {"", UNKNOWN}],
        notes=[_OF_ENERGY, "Carbon is that of CO2 and what warms as much."],
    )


_KIND_NAMES = {"gpu": "GPUs", "cpu": "CPU", "dram": "DRAM", "other": "other devices"}


def study_tables(analysis: Analysis, count: int | None) -> list[Table]:
    """A study as tables: a ranking each; with `count`, of each group the best by any score and by
    performance. Where rows are outliers or of two populations, tables without these follow. Means
    over groups and compared settings have tables of their own.
    """
    study = analysis.study
    traits = dict(zip(map(id, study.rankings), analysis.traits, strict=True))
    groups = [[r] for r in study.rankings] if count is None else study.by_group().values()
    tables = []
    for rankings in groups:
        for what, shown in _both_ways(rankings):
            first = shown[0]
            of_rows = traits[id(rankings[0])]
            if first is not rankings[0]:
                of_rows = of_rows.at(first.whole_rows)
            table = (
                _ranking(first, of_rows, analysis)
                if count is None
                else _best(shown, of_rows, analysis, count)
            )
            tables.append(replace(table, title=table.title + what))
    for each in analysis.both_ways:
        if each.averages:
            tables.append(means_table(each, count))
        if each.setting_name:
            tables.append(settings_table(each))
    return tables


def population_tables(ranking: Ranking, traits: Traits, analysis: Analysis) -> list[Table]:
    """The ranking of each of two populations."""
    tables = []
    for what, (part,) in _both_ways([ranking]):
        if any(part is each for each in ranking.either):
            table = _ranking(part, traits.at(part.whole_rows), analysis)
            tables.append(replace(table, title=table.title + what))
    return tables


def _both_ways(rankings: Sequence[Ranking]) -> Iterator[tuple[str, list[Ranking]]]:
    """The rankings of a group, and again without outliers and of either population, each with what
    its title adds. A ranking that has none of these stays as it is.
    """
    yield "", list(rankings)
    if any(ranking.without is not None for ranking in rankings):
        yield ", without outliers", [ranking.without or ranking for ranking in rankings]
    if whole := next((ranking for ranking in rankings if ranking.either), None):
        for k, part in enumerate(whole.either):
            what = f", {whole.population[part.whole_rows[0]]}"
            yield what, [r.either[k] if k < len(r.either) else r for r in rankings]


def _traits(traits: Traits, analysis: Analysis, rows: Sequence[int]) -> list[TableColumn]:
    """The columns of classes, sizes and settings that were asked for."""
    columns = []
    if traits.settings is not None:
        columns.append(names(analysis.setting_name, [traits.settings[i] for i in rows]))
    if traits.classes is not None:
        columns.append(names(analysis.class_name, [traits.classes[i] for i in rows]))
    if traits.sizes is not None:
        columns.append(amounts(analysis.size_name, [float(traits.sizes[i]) for i in rows], unit=""))
    return columns


def _ranking(ranking: Ranking, traits: Traits, analysis: Analysis) -> Table:
    """All rows, best first; without scores and in their own order where these are noise."""
    ranked = not analysis.unranked(ranking)
    order = ranking.order.tolist() if ranked else list(range(len(ranking.names)))
    marks, notes = _outlier_marks(ranking)
    columns = [TableColumn("#", ranks(ranking))] if ranked else []
    columns += [
        names("model", [traits.models[i] + marks.get(i, "") for i in order]),
        *_traits(traits, analysis, order),
    ]
    if ranking.n is not None and ranking.repeated:
        columns.append(TableColumn("runs", [str(ranking.n[i]) for i in order]))
    columns += [
        _performance(ranking, order),
        amounts(ranking.resource_name, _at(ranking.resource, order), _at(ranking.u_resource, order),
                unit=ranking.unit),
    ]  # fmt: skip
    notes = [*_cautions(ranking), *notes]
    if ranked:
        columns.append(TableColumn("R", [f"{ranking.scores.r_norm[i]:.3f}" for i in order]))
        columns.append(_scores(ranking, order))
        notes += [_range(ranking), *_of_u(ranking)]
    return Table(
        title=_title(ranking, ranking.label if ranked else f"{ranking.metric}, not ranked"),
        columns=columns,
        notes=notes,
    )


def _cautions(ranking: Ranking) -> list[str]:
    """What has to be known before the numbers."""
    notes = [f"{sentence(each.text)} {sentence(each.fix)}" for each in ranking.warnings]
    return [*notes, ratio_text(ranking)] if ranking.noise else notes


def _scores(ranking: Ranking, rows: Sequence[int | None]) -> TableColumn:
    """The scores with their ±, or their interval where one side is much longer."""
    column = numbers(ranking.label, _at(ranking.scores.pepr, rows), _at(ranking.u_pepr, rows))
    standing = ranking.standing
    if standing is None:
        return column
    cells = [
        f"{ranking.scores.pepr[i]:.3f} ({standing.low[i]:.3f}–{standing.high[i]:.3f})"
        if i is not None and standing.lopsided[i]
        else cell
        for i, cell in zip(rows, column.cells, strict=True)
    ]
    return TableColumn(column.head, cells)


def _best(rankings: Sequence[Ranking], traits: Traits, analysis: Analysis, count: int) -> Table:
    """The best rows by the score of each resource, and by performance, with all their scores."""
    first = rankings[0]
    at = [{name: i for i, name in enumerate(ranking.names)} for ranking in rankings]
    blocks = [
        (f"{ranking.label}", [ranking.names[i] for i in best(ranking, count)])
        for ranking in rankings
        if not analysis.unranked(ranking)
    ]
    blocks.append((first.metric, [first.names[i] for i in best_performing(first, count)]))
    # Rankings of runs may each have left out others.
    chosen = [
        (by, rank, name)
        for by, found in blocks
        for rank, name in enumerate(found, start=1)
        if name in at[0]
    ]
    rows = [at[0][name] for _, _, name in chosen]
    everywhere = [[where.get(name) for _, _, name in chosen] for where in at]
    marks, notes = _outlier_marks(*rankings)
    columns = [
        names("best by", [by for by, _, _ in chosen]),
        TableColumn("#", [str(rank) for _, rank, _ in chosen]),
        names("model", [traits.models[i] + marks.get(i, "") for i in rows]),
        *_traits(traits, analysis, rows),
        _performance(first, rows),
        *(
            amounts(ranking.resource_name, _at(ranking.resource, places),
                    _at(ranking.u_resource, places), unit=ranking.unit)
            for ranking, places in zip(rankings, everywhere, strict=True)
        ),
        *(
            _scores(ranking, places)
            for ranking, places in zip(rankings, everywhere, strict=True)
            if not analysis.unranked(ranking)
        ),
    ]  # fmt: skip
    starts = [i for i, (_, rank, _) in enumerate(chosen) if rank == 1 and i]
    return Table(
        title=_title(first, f"Best {count} by PePR and by {first.metric}"),
        columns=columns,
        notes=[
            *(text for ranking in rankings for text in _cautions(ranking)),
            *notes,
            *map(_range, rankings),
            *_of_u(first),
        ],
        rules=frozenset(starts),
    )


def means_table(analysis: Analysis, count: int | None) -> Table:
    """The means of each model over the groups, best first by the first score."""
    means = analysis.means
    first = means[0]
    order = first.order[:count].tolist()
    idents = [first.traits.ident(i) for i in range(len(first.traits.models))]
    columns = [
        TableColumn("#", [str(rank) for rank in range(1, len(order) + 1)]),
        names("model", [first.traits.models[i] for i in order]),
        *_traits(first.traits, analysis, order),
        numbers(first.metric, _at(first.performance, order), _at(first.sd_performance, order)),
    ]
    for each in means:
        where = {each.traits.ident(i): i for i in range(len(each.traits.models))}
        places = [where.get(idents[i]) for i in order]
        columns.append(numbers(each.label, _at(each.pepr, places), _at(each.sd_pepr, places)))
    notes = ["± is the sample standard deviation over the groups: a spread, no uncertainty."]
    notes += mean_cautions(analysis)
    lacking: dict[tuple[str, ...], list[str]] = {}
    for model, groups in first.missing:
        lacking.setdefault(groups, []).append(model)
    notes += [
        f"Left out, as not in {listed(groups)}: {listed(models, limit=_MOST_MISSING)}."
        for groups, models in lacking.items()
    ]
    return Table(
        title=f"Means over {first.over} groups{analysis.of}: {listed(first.groups, limit=20)}",
        columns=columns,
        notes=notes,
    )


_MOST_MISSING = 20


def mean_cautions(analysis: Analysis) -> list[str]:
    """What has to be known of groups whose scores the means contain, or leave out."""
    left_out = dict.fromkeys(x for means in analysis.means for x in means.left_out)
    notes = [f"Left out: {group}, as {why}." for group, why in left_out]
    for ranking in analysis.study.rankings:
        if ranking.outliers and not analysis.of:
            notes.append(f"{ranking.group} has outliers in {ranking.outliers[0].what}.")
        if ranking.noise and not analysis.unranked(ranking):
            apart = f"its {ranking.of}s cannot be told apart by {ranking.resource_name}"
            notes.append(f"The scores of {ranking.group} are noise: {apart}.")
        if ranking.populations:
            notes.append(sentence(f"{ranking.group}: {ranking.populations}"))
    return list(dict.fromkeys(notes))


def settings_table(analysis: Analysis) -> Table:
    """The paired test of two settings, a row for each quantity."""
    effects = analysis.effects
    one, other = effects[0].settings
    label = analysis.setting_name

    def middle(k: int) -> list[float]:
        return [float(np.median(effect.values[k])) for effect in effects]

    return Table(
        title=f"{label}: {other} against {one}{analysis.of}, the same {len(effects[0].models)} "
        "models",
        columns=[
            names("", [effect.name for effect in effects]),
            numbers(f"median, {one}", middle(0)),
            numbers(f"median, {other}", middle(1)),
            numbers("median difference", [effect.test.median for effect in effects]),
            TableColumn("pairs", [str(len(effect.models)) for effect in effects]),
            TableColumn("p", [p_value(effect.test.p) for effect in effects]),
            TableColumn("effect", [effect_size(effect.test.effect) for effect in effects]),
        ],
        notes=[
            "p: two-sided, Wilcoxon's signed-rank test, each quantity by itself. effect: "
            "matched-pairs rank-biserial correlation, 1 if every model is higher with the second "
            "setting, −1 if every one is lower."
        ],
    )


def p_value(p: float) -> str:
    """A p-value to two digits: "0.023", "4.1e-07"."""
    return "–" if math.isnan(p) else f"{p:#.2g}"


def effect_size(effect: float) -> str:
    """A correlation with its sign: "+0.62"."""
    return "–" if math.isnan(effect) else f"{effect:+.2f}".replace("-", "−")


def ranks(ranking: Ranking) -> list[str]:
    """The ranks that each row can have, in the order of the ranking."""
    order, standing = ranking.order, ranking.standing
    if standing is None or standing.best is None or standing.worst is None:
        return [str(rank) for rank in range(1, len(order) + 1)]
    pairs = zip(standing.best[order].tolist(), standing.worst[order].tolist(), strict=True)
    return [str(high) if high == low else f"{high}–{low}" for high, low in pairs]


def _at(values: Any, rows: Sequence[int | None]) -> list[float | None]:
    """The values of some rows; None where there is neither a row nor a value."""
    if values is None:
        return [None] * len(rows)
    return [None if i is None else float(values[i]) for i in rows]


def _performance(ranking: Ranking, rows: Sequence[int]) -> TableColumn:
    u = ranking.u_performance if ranking.repeated else None
    return numbers(ranking.metric, _at(ranking.performance, rows), _at(u, rows))


def _title(ranking: Ranking, what: str) -> str:
    n = len(ranking.names)
    of = f"{ranking.grouped_by} {ranking.group}".strip() if ranking.group else ""
    return ", ".join(filter(None, [what, of, f"{n:,} {ranking.of}{'s' * (n != 1)}"]))


def _range(ranking: Ranking) -> str:
    low, high = (format_amount(end, ranking.unit) for end in ranking.scores.bounds)
    given = ", as given" if ranking.bounds_given else ""
    return (
        f"{ranking.label} is {ranking.metric} / (1 + R); R is 0 at {low} and 1 at {high} of "
        f"{ranking.resource_name}{given}."
    )


def _of_u(ranking: Ranking) -> list[str]:
    """What the ± and the ranges of ranks mean, where there are any."""
    if ranking.standing is None:
        return [sentence(NO_SPREAD)] if ranking.of != "run" else []
    notes = ["± covers 95% (k = 2, or Student's t where repeats are few)."]
    us = [ranking.standing.u_pepr, ranking.u_performance if ranking.repeated else None]
    if any(u is not None and np.isnan(u).any() for u in us):
        notes.append("± ?: unknown, as one run shows no spread.")
    if any("–" in rank for rank in ranks(ranking)):
        notes.append("Ranks a–b: any of these (95%).")
    if ranking.standing.lopsided.any():
        notes.append("(a–b) after a score: its interval (95%), where it is lopsided.")
    return notes


def _outlier_marks(*rankings: Ranking) -> tuple[dict[int, str], list[str]]:
    """A mark for each row that is an outlier, and a note for each kind of outlier."""
    marks: dict[int, str] = {}
    notes = []
    for ranking in rankings:
        for outlier in ranking.outliers:
            marks |= dict.fromkeys(outlier.rows, " †")
            notes.append(f"† outlier in {outlier.what}: {outlier.why}.")
    return marks, notes
