"""Figures of the PePR paper's kinds: classes, scores against size, two settings compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.record import Floats
from pepr_profiler.report import figures, study_figures
from pepr_profiler.report.figures import INK, MUTED, NARROW, PAPER, WIDE, plain
from pepr_profiler.report.study_figures import Points
from pepr_profiler.study.analysis import Analysis, GroupMeans, SettingEffect, Traits
from pepr_profiler.study.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 40  # rows whose spread over groups is drawn


def analysis_figure(analysis: Analysis, kind: str, form: str) -> bytes:
    """A figure as a png, svg or pdf file; `kind` is "performance", "size" or "setting"."""
    draw: Callable[[float], Figure] = {
        "performance": lambda width: study_figures.panels(cost_parts(analysis), width=width),
        "size": lambda width: study_figures.panels(size_parts(analysis), width=width),
        "setting": lambda width: violins(analysis.effects, width),
    }[kind]
    return figures.save(lambda: draw(WIDE), form)


def cost_parts(analysis: Analysis) -> list[tuple[str, Points]]:
    """Performance against the resource, a panel a ranking, with the classes' colours."""
    by_id = study_figures.shown_runs(analysis.study)
    shown = list(zip(analysis.study.rankings, analysis.traits, strict=True))
    return [
        (ranking.group or "", cost_points(analysis, ranking, traits, by_id))
        for ranking, traits in shown[: study_figures.MOST_PANELS]
    ]


def cost_points(
    analysis: Analysis,
    ranking: Ranking,
    traits: Traits,
    by_id: Mapping[str, Mapping[str, Any]],
    *,
    most: int = study_figures.MOST_POINTS,
) -> Points:
    """A ranking's rows as points, with their classes and the median where classes were given.

    At most `most` are drawn one by one.
    """
    drawn: dict[str, Any] = {"crowded": len(ranking.names) > most}
    if analysis.unranked(ranking):
        drawn["bounds"] = None
    if traits.classes is not None:
        drawn |= {"classes": traits.classes, "levels": analysis.classes, "median": True}
    return study_figures.cost_points(ranking, by_id, **drawn)


def size_parts(analysis: Analysis) -> list[tuple[str, Points]]:
    """Scores against the size, a panel a resource; of several groups the means over these."""
    if not analysis.grouped:
        pairs = zip(analysis.study.rankings, analysis.traits, strict=True)
        return [
            (
                "",
                _against_size(analysis, traits, ranking.scores.pepr, ranking.u_pepr, ranking.label),
            )
            for ranking, traits in pairs
        ][: study_figures.MOST_PANELS]
    return [
        ("", _against_size(analysis, means.traits, means.pepr, means.sd_pepr,
                           means.label + _over(means)))
        for means in analysis.means
    ][: study_figures.MOST_PANELS]  # fmt: skip


def _over(means: GroupMeans) -> str:
    return f", mean over {means.over} groups" if means.over > 1 else ""


def _against_size(
    analysis: Analysis, traits: Traits, score: Floats, bars: Floats | None, label: str
) -> Points:
    assert traits.sizes is not None
    n = len(traits.models)
    nothing = np.full(n, np.nan)
    return Points(
        names=traits.models,
        x=traits.sizes,
        y=score,
        u_x=nothing,
        u_y=nothing if bars is None or n > _MOST_BARS else bars,
        front=np.zeros(n, dtype=np.bool_),
        outlier=np.zeros(n, dtype=np.bool_),
        x_label=analysis.size_name,
        y_label=label,
        x_unit="",
        classes=traits.classes or (),
        levels=analysis.classes if traits.classes else (),
        median=True,
        crowded=n > study_figures.MOST_POINTS,
    )


def violins(effects: Sequence[SettingEffect], width: float = WIDE) -> Figure:
    """Distributions of each quantity with two settings side by side, and the paired test above."""
    from matplotlib.figure import Figure

    columns = min(len(effects), 3 if width > NARROW else 2)
    rows = math.ceil(len(effects) / columns)
    figure = Figure(figsize=(width, 3.4 * rows), dpi=72, layout="constrained")
    for number, effect in enumerate(effects, start=1):
        _draw_violins(figure.add_subplot(rows, columns, number), effect, number, width / columns)
    return figure


def _draw_violins(axes: Axes, effect: SettingEffect, number: int, width: float) -> None:
    parts: Any = axes.violinplot(
        list(effect.values), positions=[0, 1], widths=0.75, showextrema=False, points=200
    )
    for k, body in enumerate(parts["bodies"]):
        color = study_figures.class_style(k)[0]
        body.set(facecolor=color, edgecolor=color, alpha=0.35, linewidth=1.0)
        body.set_gid(f"violin-{number}-{k}")
    for k, values in enumerate(effect.values):
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        axes.plot([k, k], [low, high], color=INK, linewidth=5, solid_capstyle="butt", alpha=0.55)
        axes.plot([k], [middle], "o", color=INK, markerfacecolor=PAPER, markersize=5.5,
                  markeredgewidth=1.4, gid=f"median-{number}-{k}", zorder=5)  # fmt: skip
    room = max(8, int(width * 5.5))
    axes.set_xticks([0, 1], [plain(name, room) for name in effect.settings])
    axes.set_xlim(-0.6, 1.6)
    axes.set_title(plain(effect.name, int(width * 9)), loc="left", fontsize=10, color=INK, pad=22)
    axes.text(0, 1.03, test_in_words(effect), transform=axes.transAxes, fontsize=8.5, color=MUTED,
              va="bottom")  # fmt: skip


def test_in_words(effect: SettingEffect) -> str:
    """The paired test in a few words: "p = 0.004, r = +0.62, n = 131"."""
    test = effect.test
    n = len(effect.models)
    if not test.n:
        return f"no pair differs, n = {n}"
    return f"{p_text(test.p)}, r = {test.effect:+.2f}, n = {n}".replace("-", "−")


def p_text(p: float) -> str:
    """A p-value: three decimals, below 0.001 only that it is."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
