"""Figures of a study: performance against the resource, and over energy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.record import Floats, Mask
from pepr_profiler.report import figures
from pepr_profiler.report.figures import ALARM, INK, MUTED, NARROW, POINT, WIDE, Chart, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pepr_profiler.study.progress import Envelope, ProgressCurve
    from pepr_profiler.study.ranking import Ranking
    from pepr_profiler.study.study import Study


@dataclass(frozen=True, eq=False, kw_only=True)
class Points:
    """Rows of a study as points: `x`, `y` (n,) with their u (NaN: unknown), and their runs.

    `runs` are (row, x, y). `bounds` are (r_min, r_max) where `y` is a performance over the resource
    that they bound. `classes` (n,) are the rows' classes, `levels` all classes in the order of the
    legend. `median` asks for a line at the median of `x`. `crowded` are too many to draw each.
    """

    names: tuple[str, ...]
    x: Floats
    y: Floats
    u_x: Floats
    u_y: Floats
    front: Mask
    outlier: Mask
    x_label: str
    y_label: str
    x_unit: str
    bounds: tuple[float, float] | None = None
    runs: tuple[tuple[int, float, float], ...] = ()
    classes: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    median: bool = False
    crowded: bool = False


LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""The scores for which a line of equal PePR is drawn."""

MOST_RUNS = 1000
"""Single runs, as dots and curves, that a figure can show and a page can hold."""

MOST_POINTS = 1000
"""Points that a figure draws one by one. More are drawn as cells, darker where there are more."""

_MOST_DECADES = (-300.0, 308.0)  # of a logarithmic axis: what a float can hold
_CELL_POINTS = 3.6  # the side of such a cell, in points of 1/72 inch
_CELL_ALPHAS = (0.25, 0.45, 0.7, 1.0)
_CLASS_COLORS = (*figures.KIND_COLORS.values(), INK, MUTED)
_CLASS_MARKERS = "os^DvPd*"
MOST_PANELS = 12
_ISO_POINTS = 64
_MOST_NAMED = 14


def shown_runs(study: Study) -> dict[str, Mapping[str, Any]]:
    """The runs by their ids; none where there are too many to show."""
    if len(study.runs) > MOST_RUNS:
        return {}
    return {str(run["run_id"]): run for run in study.runs}


def cost_points(ranking: Ranking, by_id: Mapping[str, Mapping[str, Any]], **drawn: Any) -> Points:
    """Performance over the resource of every row, and of the runs behind it where known.

    `drawn` are fields of Points.
    """
    n = len(ranking.names)
    nothing = np.full(n, np.nan)
    runs = []
    if ranking.repeated and ranking.key in _OF_RUN and ranking.transform is None:
        scale = 0.01 if ranking.percent else 1.0
        all_of_them = all(x in by_id for ids in ranking.run_ids for x in ids)
        for i, ids in enumerate(ranking.run_ids):
            for run in (by_id[x] for x in ids if all_of_them):
                p = (run.get("metrics") or {}).get(ranking.metric)
                r = _OF_RUN[ranking.key](run)
                if p is not None and r is not None and len(ids) > 1:
                    runs.append((i, float(r), scale * float(p)))
    return Points(
        names=ranking.names,
        x=ranking.resource,
        y=ranking.performance,
        u_x=nothing if ranking.u_resource is None else ranking.u_resource,
        u_y=nothing if ranking.u_performance is None else ranking.u_performance,
        front=ranking.front,
        outlier=_outliers(ranking),
        x_label=ranking.resource_name,
        y_label=ranking.metric,
        x_unit=ranking.unit,
        runs=tuple(runs),
        **{"bounds": ranking.scores.bounds, "crowded": n > MOST_POINTS, **drawn},
    )


_OF_RUN: Mapping[str, Any] = {
    "energy": lambda run: run["energy"]["total_j"],
    "time": lambda run: run["time_s"],
    "carbon": lambda run: (run.get("carbon") or {}).get("g_co2e"),
}


def score_points(ranking: Ranking, parameters: Sequence[float | None]) -> Points | None:
    """Scores over the number of parameters; None where a row's is unknown."""
    if any(p is None for p in parameters):
        return None
    n = len(ranking.names)
    nothing = np.full(n, np.nan)
    return Points(
        names=ranking.names,
        x=np.array(parameters, dtype=np.float64),
        y=ranking.scores.pepr,
        u_x=nothing,
        u_y=nothing if ranking.u_pepr is None else ranking.u_pepr,
        front=np.zeros(n, dtype=np.bool_),
        outlier=_outliers(ranking),
        x_label="parameters",
        y_label=ranking.label,
        x_unit="",
    )


def _outliers(ranking: Ranking) -> Any:
    mask = np.zeros(len(ranking.names), dtype=np.bool_)
    for outlier in ranking.outliers:
        mask[list(outlier.rows)] = True
    return mask


def study_chart(ident: str, title: str, text: str, points: Points) -> tuple[Chart, dict[str, Any]]:
    """A scatter of a study, and how its two drawings map numbers to positions, for the script.

    A map is [slope, offset] of log10 x (of x where `log` is false) and of y, in SVG units.
    """
    places: dict[str, Any] = {"log": _log_fits(points.x)}

    def draw(width: float) -> Figure:
        figure = scatter(points, width)
        axes = figure.axes[0]
        height = figure.get_size_inches()[1] * figure.dpi
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        corners = axes.transData.transform([(x0, y0), (x1, y1)]) * 72 / figure.dpi
        if places["log"]:
            x0, x1 = math.log10(x0), math.log10(x1)
        slope_x = (corners[1, 0] - corners[0, 0]) / (x1 - x0)
        slope_y = -(corners[1, 1] - corners[0, 1]) / (y1 - y0)
        bottom = height * 72 / figure.dpi - corners[0, 1]
        places["wide" if width == WIDE else "narrow"] = {
            "x": [slope_x, corners[0, 0] - slope_x * x0],
            "y": [slope_y, bottom - slope_y * y0],
            "xlim": [x0, x1],
            "top": y1,
        }
        return figure

    return figures.chart(ident, title, text, draw), places


def _log_fits(x: Floats) -> bool:
    return bool((x > 0).all())


def scatter(points: Points, width: float = WIDE) -> Figure:
    """Performance over a resource, its axis logarithmic, with lines of equal PePR and the front.

    Bars are u, faint dots single runs, crosses outliers.
    """
    return panels([("", points)], width=width, height=4.4 if width > NARROW else 4.0)


def panels(
    parts: Sequence[tuple[str, Points]], *, width: float = WIDE, height: float = 4.0
) -> Figure:
    """Scatters side by side, two a row, each with its name."""
    from matplotlib.figure import Figure

    columns = min(2, len(parts)) if width > NARROW else 1
    rows = math.ceil(len(parts) / columns)
    figure = Figure(figsize=(width, height * rows), dpi=72, layout="constrained")
    places = [figure.add_subplot(rows, columns, i + 1) for i in range(len(parts))]
    each = width / columns
    for axes, (name, points) in zip(places, parts, strict=True):
        _prepare(axes, points, each)
        if name:
            axes.set_title(plain(name), loc="right", fontsize=10, fontweight="bold", pad=16)
    _add_legend(figure, [points for _, points in parts], width)
    figure.draw_without_rendering()  # now pixels are known, and stay
    figure.set_layout_engine("none")
    for axes, (_, points) in zip(places, parts, strict=True):
        _fill(axes, points)
    return figure


def _class_style(points: Points, i: int) -> tuple[str, str]:
    """The colour and the marker of a point."""
    if not points.classes:
        return POINT, "o"
    return class_style(points.levels.index(points.classes[i]))


def class_style(number: int) -> tuple[str, str]:
    """The colour and the marker of a class."""
    return _CLASS_COLORS[number % len(_CLASS_COLORS)], _CLASS_MARKERS[number % len(_CLASS_MARKERS)]


def _legend_label(name: str) -> str:
    """A name for a legend, from which matplotlib leaves out what is empty or begins with "_"."""
    shown = plain(name)
    return f" {shown}" if shown.startswith("_") else shown or "(none)"


def _add_legend(figure: Figure, parts: Sequence[Points], width: float) -> None:
    """What colours, marks and lines are, below the panels, where any of it is not obvious."""
    from matplotlib.lines import Line2D

    first = parts[0]
    handles = []
    for number, name in enumerate(first.levels):
        color, marker = class_style(number)
        handles.append(
            Line2D([], [], color=color, marker=marker, linestyle="", markersize=6.5,
                   markerfacecolor=figures.PAPER, markeredgewidth=1.6, label=_legend_label(name))
        )  # fmt: skip
    if not (handles or first.median):
        return
    if any(points.front.any() for points in parts):
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (1, 2.5)),
                              label="Pareto front"))  # fmt: skip
    if first.median:
        of = {points.x_label for points in parts}
        label = f"median {plain(first.x_label, 30)}" if len(of) == 1 else "median of the resource"
        handles.append(Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)),
                              label=label))  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9,
                  ncols=min(len(handles), 6 if width > NARROW else 3))  # fmt: skip


def _prepare(axes: Axes, points: Points, width: float) -> None:
    xs, ys = [points.x], [points.y]
    if points.runs:
        xs.append(np.array([x for _, x, _ in points.runs]))
        ys.append(np.array([y for _, _, y in points.runs]))
    all_x, all_y = np.concatenate(xs), np.concatenate(ys)
    log = _log_fits(points.x) and _log_fits(all_x)
    if log:
        axes.set_xscale("log")
        low, high = math.log10(all_x.min()), math.log10(all_x.max())
        span = max(0.12, 0.11 * (high - low))
        ends = (max(low - 1.2 * span, _MOST_DECADES[0]), min(high + 1.8 * span, _MOST_DECADES[1]))
        axes.set_xlim(10 ** ends[0], 10 ** ends[1])
    _amounts_below(axes, points.x_unit, width)
    low, high = float(all_y.min()), float(all_y.max())
    pad = max(0.02, 0.14 * (high - low))
    axes.set_ylim(max(0.0, low - pad), min(1.03, high + pad))
    axes.set_xlabel(plain(points.x_label, 60), loc="right")
    axes.set_title(plain(points.y_label, 60), loc="left", fontsize=9, color=MUTED, pad=16)


def _amounts_below(axes: Axes, unit: str, width: float) -> None:
    """Ticks of the x axis: amounts with their unit, few and round on a logarithmic one too."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        decades = math.log10(high) - math.log10(low)
        subs: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0) if decades < 1 else (1.0, 2.0, 5.0)
        if decades > (2.5 if width > NARROW else 1.5):
            subs = (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=list(subs)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", size=0)
    engineering = EngFormatter(unit=unit, sep=" " if unit else "")
    if unit:
        axes.xaxis.set_major_formatter(engineering)
        return
    # Of a number without a unit, "10m" would be taken for metres or millions.
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: engineering(x) if abs(x) >= 1e4 else f"{x:g}")
    )


def _fill(axes: Axes, points: Points) -> None:
    if points.bounds is not None:
        _draw_isolines(axes, points.bounds, log=axes.get_xscale() == "log")
    if points.median and len(points.x):
        axes.axvline(float(np.median(points.x)), color=MUTED, linewidth=1.0,
                     linestyle=(0, (5, 3)), gid="median", zorder=1.5)  # fmt: skip
    order = np.argsort(points.x[points.front])
    axes.plot(points.x[points.front][order], points.y[points.front][order], color=INK,
              linewidth=0.9, linestyle=(0, (1, 2.5)), gid="front", zorder=2)  # fmt: skip
    for row, x, y in points.runs:
        axes.plot([x], [y], ".", color=POINT, alpha=0.4, markersize=4, gid=f"run-{row}", zorder=3)
    if points.crowded:
        _draw_cells(axes, points)
    else:
        for i in range(len(points.names)):
            _draw_point(axes, points, i)
    _name_points(axes, points)


def _draw_cells(axes: Axes, points: Points) -> None:
    """All points as cells of a grid: darker where there are more, in the colour of the class that
    has most points in the cell. One path holds the cells of one colour and shade.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    side = _CELL_POINTS * axes.figure.dpi / 72
    at = axes.transData.transform(np.column_stack((points.x, points.y)))
    places, cell = np.unique(np.floor(at / side).astype(np.intp), axis=0, return_inverse=True)
    number = {name: i for i, name in enumerate(points.levels)}
    of_class = np.array([number[name] for name in points.classes] or [0] * len(at))
    counts = np.zeros((len(places), max(1, len(number))), dtype=np.intp)
    np.add.at(counts, (cell.reshape(-1), of_class), 1)
    total, most = counts.sum(axis=1), counts.argmax(axis=1)
    shade = np.log(total) / max(math.log(total.max()), 1e-9) * len(_CELL_ALPHAS)
    shade = np.minimum(shade.astype(np.intp), len(_CELL_ALPHAS) - 1)
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for kind, level in np.unique(np.column_stack((most, shade)), axis=0).tolist():
        corners = places[(most == kind) & (shade == level)][:, None, :] + square
        inside = axes.transData.inverted().transform(corners.reshape(-1, 2) * side)
        axes.add_artist(
            PathPatch(Path(inside, codes * len(corners)), linewidth=0, antialiased=False,
                      facecolor=class_style(kind)[0] if number else POINT,
                      alpha=_CELL_ALPHAS[level], gid=f"cells-{kind}-{level}", zorder=3)
        )  # fmt: skip


def _draw_isolines(axes: Axes, bounds: tuple[float, float], *, log: bool) -> None:
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    x = np.geomspace(x0, x1, _ISO_POINTS) if log else np.linspace(x0, x1, _ISO_POINTS)
    r = np.clip((x - bounds[0]) / (bounds[1] - bounds[0]), 0.0, 1.0)
    named = False
    for level in LEVELS:
        axes.plot(x, level * (1 + r), color=MUTED, linewidth=0.7, alpha=0.55,
                  gid=f"iso-{level}", zorder=1, scalex=False, scaley=False)  # fmt: skip
        # Its name is where it leaves the figure at the top; the page's script moves it along.
        end = bounds[0] + (y1 / level - 1) * (bounds[1] - bounds[0])
        if level < y1 <= 2 * level and x0 <= end <= x1:
            axes.annotate(f"{level:g}" if named else f"PePR {level:g}", (end, 1.0),
                          xycoords=("data", "axes fraction"), textcoords="offset points",
                          xytext=(8, 3), ha="right", color=MUTED, fontsize=8,
                          gid=f"isoname-{level}", annotation_clip=False)  # fmt: skip
            named = True
    axes.set_xlim(x0, x1)
    axes.set_ylim(y0, y1)


def _draw_point(axes: Axes, points: Points, i: int) -> None:
    x, y, u_x, u_y = (float(a[i]) for a in (points.x, points.y, points.u_x, points.u_y))
    outlier = bool(points.outlier[i])
    own, marker = _class_style(points, i)
    color = ALARM if outlier else own
    if math.isfinite(u_x) and u_x > 0:
        left = max(x - u_x, axes.get_xlim()[0])
        axes.plot([left, x + u_x], [y, y], color=color, linewidth=1, alpha=0.5, gid=f"barx-{i}",
                  scalex=False, scaley=False)  # fmt: skip
    if math.isfinite(u_y) and u_y > 0:
        axes.plot([x, x], [y - u_y, y + u_y], color=color, linewidth=1, alpha=0.5, gid=f"bary-{i}",
                  scalex=False, scaley=False)  # fmt: skip
    filled = own if points.front[i] and not outlier else figures.PAPER
    axes.plot([x], [y], "X" if outlier else marker, color=color, markerfacecolor=filled,
              markersize=6.5, markeredgewidth=1.6, gid=f"point-{i}", zorder=5)  # fmt: skip


def _name_points(axes: Axes, points: Points) -> None:
    """Names beside points where they cover neither a point nor another name."""
    pixels = axes.transData.transform(np.column_stack((points.x, points.y)))
    box = axes.get_window_extent()
    # Among thousands a name lies on some points in any case.
    near = pixels[points.front] if points.crowded else pixels
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in near]
    first = [*np.flatnonzero(points.front), *np.flatnonzero(points.outlier), *np.argsort(-points.y)]
    for i in list(dict.fromkeys(int(i) for i in first))[:_MOST_NAMED]:
        name = plain(points.names[i], 22)
        w, h = 5.1 * len(name), 10.0
        x, y = pixels[i]
        places = (
            (x + 8, y - h / 2, "left"), (x - 8 - w, y - h / 2, "right"),
            (x - w / 2, y + 8, "center"), (x - w / 2, y - 8 - h, "center"),
            (x + 6, y + 6, "left"), (x + 6, y - 6 - h, "left"),
            (x - 6 - w, y + 6, "right"), (x - 6 - w, y - 6 - h, "right"),
        )  # fmt: skip
        for left, bottom, side in places:
            here = (left, bottom, left + w, bottom + h)
            inside = (
                here[0] > box.x0 - 4
                and here[2] < box.x1 + 8
                and here[1] > box.y0
                and here[3] < box.y1
            )
            if inside and not any(_touch(here, other) for other in taken):
                taken.append(here)
                anchor = {"left": left, "right": left + w, "center": left + w / 2}[side]
                axes.annotate(name, (points.x[i], points.y[i]), textcoords="offset points",
                              xytext=(anchor - x, bottom + h / 2 - y), ha=side, va="center",
                              gid=f"name-{i}", fontsize=9)  # fmt: skip
                break


def _touch(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


_MOST_CURVES = 60


def progress_curves(
    curves: Sequence[ProgressCurve], best: Envelope | None = None, *, width: float = WIDE
) -> Figure:
    """Performance against the energy until then, one line per run; `best` is their envelope.

    Lines of one name are one colour and named once; energy is logarithmic where there are several.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.4), dpi=72, layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(curve.name for curve in curves))
    cycle = [*figures.KIND_COLORS.values(), ALARM, MUTED]
    if len(curves) > 1 and all(_log_fits(curve.energy_j) for curve in curves):
        axes.set_xscale("log")
    for curve in curves[:_MOST_CURVES]:
        color = POINT if len(names) == 1 else cycle[names.index(curve.name) % len(cycle)]
        axes.plot(curve.energy_j, curve.performance, color=color, linewidth=1.1,
                  linestyle="-" if names.index(curve.name) < len(cycle) else "--",
                  alpha=1 if len(curves) == 1 else 0.6, marker="o" if len(curves) == 1 else "",
                  markersize=4)  # fmt: skip
    if best is not None and len(best.energy_j):
        last = max(float(curve.energy_j[-1]) for curve in curves)
        energy_j = np.append(best.energy_j, last)
        performance = np.append(best.performance, best.performance[-1])
        axes.plot(energy_j, performance, color=INK, linewidth=1.8, drawstyle="steps-post", zorder=4)
    if len(names) > 1:
        ends = {curve.name: curve for curve in curves[:_MOST_CURVES]}
        marks = [
            (
                float(c.performance[-1]),
                plain(name) if names.index(name) < len(cycle) else f"{plain(name, 10)} (dashed)",
                cycle[names.index(name) % len(cycle)],
            )
            for name, c in ends.items()
        ]
        figures.label_right(axes, marks, width)
    elif curves:
        axes.set_xlim(left=0)
    _amounts_below(axes, "J", width)
    axes.set_title(
        plain(curves[0].metric, 60) if curves else "", loc="left", fontsize=9, color=MUTED
    )
    axes.set_xlabel("energy", loc="right")
    return figure
