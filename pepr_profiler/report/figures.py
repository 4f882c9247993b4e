"""Figures by matplotlib: for papers as files, for pages as SVG that follows the page's colours.

No pyplot: a figure here is an object without a window, a backend or a global state.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from pepr_profiler.summary import Timeline, TimelineComponent
from pepr_profiler.units import format_duration, format_with_u

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from pepr_profiler.progress import Curve, Envelope

# Hues that stay apart for colour-blind readers (Okabe and Ito), toned down; each has a CSS variable
# of the page, whose dark values are in page.css.
_INK, _MUTED, _RULE, _PAPER = "#1d2329", "#5c6670", "#dde1e5", "#fffffe"
KIND_COLORS = {"gpu": "#2b6cb0", "cpu": "#d97a1e", "dram": "#1f9179", "other": "#8a6fb3"}
_ALARM, _POINT = "#b3372b", "#2b6cb1"
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _RULE: "--rule",
    _PAPER: "--paper",
    _ALARM: "--alarm",
    _POINT: "--point",
    **{color: f"--{kind}" for kind, color in KIND_COLORS.items()},
}
_KIND_NAMES = {"gpu": "GPUs", "cpu": "packages", "dram": "memories", "other": "others"}
_TINTS = (1.0, 0.72, 0.52, 0.86, 0.62)  # parts of one kind lie on each other: told apart by tone

WIDE, NARROW = 9.2, 4.5
"""Width in inches, for a page or a two-column paper, and for a phone or one column."""

_MOST_LAYERS = 6
MOST_DEVICES = 24
_MOST_PHASES = 7
_LABEL = 26  # characters of a name in a figure; the tables have the rest


@dataclass(frozen=True)
class Chart:
    """One figure of a page, drawn twice, and what it says to who cannot see it."""

    id: str
    title: str
    text: str
    wide: str
    narrow: str


def plain(text: str, longest: int = _LABEL) -> str:
    """`text` for a figure: one line, no control characters, cut with "…"."""
    line = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures; text stays text."""
    import matplotlib as mpl

    look: Any = {
        "axes.edgecolor": _RULE,
        "axes.labelcolor": _MUTED,
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "figure.facecolor": _PAPER,
        "axes.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.color": _RULE,
        "grid.linewidth": 0.8,
        "hatch.color": _ALARM,
        "hatch.linewidth": 0.6,
        "text.color": _INK,
        "text.parse_math": False,  # a name may hold a "$"
        "xtick.color": _MUTED,
        "xtick.major.size": 3,
        "ytick.color": _MUTED,
        "ytick.major.size": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": "pepr",
        "pdf.fonttype": 42,
    }
    with mpl.rc_context(look), warnings.catch_warnings():
        # Of a glyph that matplotlib's font lacks the page's or the reader's font may well have one.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save(figure: Figure, file_format: str) -> bytes:
    """The figure as the bytes of a png (300 dpi), svg or pdf file."""
    out = io.BytesIO()
    with style():
        metadata = {"Date": None} if file_format == "svg" else None
        figure.savefig(out, format=file_format, dpi=300, metadata=metadata)
    return out.getvalue()


def chart(ident: str, title: str, text: str, draw: Callable[[float], Figure]) -> Chart:
    """A figure for a page, from a function of its width in inches."""
    drawn = []
    for name, width in (("wide", WIDE), ("narrow", NARROW)):
        with style():
            figure = draw(width)
        drawn.append(_inline(save(figure, "svg"), f"{ident}-{name}", title, text))
    return Chart(ident, title, text, *drawn)


_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def _inline(svg: bytes, prefix: str, title: str, text: str) -> str:
    """SVG to stand in a page: colours by CSS variables, ids of its own, a title, short numbers."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.attrib[key] = _attribute(key, value, prefix)
        if element.tag == f"{{{_SVG}}}text":
            # The page's font, at matplotlib's size.
            css = element.attrib.get("style", "")
            element.attrib["style"] = re.sub(
                r"font: (?:\w+ )?([\d.]+)px [^;]*", r"font-size: \1px", css
            )
    view = root.attrib.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": view,
            "class": prefix.rpartition("-")[2],
            "role": "img",
            "aria-labelledby": f"{prefix}-title {prefix}-text",
        }
    )
    about = [ET.Element("title", id=f"{prefix}-title"), ET.Element("desc", id=f"{prefix}-text")]
    about[0].text, about[1].text = plain(title, 200), plain(text, 600)
    root[:0] = about
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    if key == "d":
        return _shorter(value)
    if key in ("style", "fill", "stroke"):
        for color, variable in _VARIABLES.items():
            value = value.replace(color, f"var({variable})")
        return value
    if key in ("x", "y", "transform"):
        return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value)
    return value


def _shorter(path: str) -> str:
    """A path with one decimal, level and upright lines written as such: a third of the bytes."""
    pieces: list[str] = []
    at: tuple[str, ...] = ()
    for command, numbers in re.findall(r"([MLQCz])([^MLQCz]*)", path):
        point = tuple(f"{float(number):.1f}".removesuffix(".0") for number in numbers.split())
        if command == "L" and point == at[-2:]:
            continue
        if command == "L" and point[1] == at[-1]:
            pieces.append(f"H{point[0]}")
        elif command == "L" and point[0] == at[-2]:
            pieces.append(f"V{point[1]}")
        else:
            pieces.append(command + " ".join(point))
        at = point or at
    return "".join(pieces)


# --- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    label: str
    kind: str
    tint: float
    watts: NDArray[np.float64]


def _layers(components: Iterable[TimelineComponent]) -> list[_Layer]:
    """What is stacked: the job's power by component, by kind where that were too many; NaN where
    nothing of it was read."""
    counted = [c for c in components if c.in_total]
    kinds = [kind for kind in KIND_COLORS if any(c.kind == kind for c in counted)]
    layers = []
    for kind in kinds:
        same = [c for c in counted if c.kind == kind]
        if len(counted) > _MOST_LAYERS and len(same) > 1:
            parts_w = np.array([c.job_w for c in same])
            known = np.isfinite(parts_w).any(axis=0)
            watts = np.where(known, np.nansum(parts_w, axis=0), np.nan)
            name = f"{len(same)} {_KIND_NAMES[kind]}"
            layers.append(_Layer(name, kind, 1.0, watts))
            continue
        for number, c in enumerate(same):
            tint = _TINTS[number % len(_TINTS)]
            layers.append(_Layer(component_name(c.kind, c.label), kind, tint, c.job_w))
    return layers


def component_name(kind: str, label: str) -> str:
    """A component as it is called in figures and tables: "gpu:0 H100", "cpu package-0"."""
    label = " ".join(label.split())
    return label if label.startswith(kind) or kind == "other" else f"{kind} {label}"


def power_over_time(timeline: Timeline, width: float = WIDE) -> Figure:
    """The job's power stacked by component, its phases below, gaps hatched."""
    from matplotlib.figure import Figure

    rows = _phase_rows(timeline)
    below = 0.24 * len(rows)
    figure = Figure(figsize=(width, 3.3 + below), layout="constrained")
    grid = figure.add_gridspec(2 if rows else 1, 1, height_ratios=[3.3, below] if rows else [1])
    axes = figure.add_subplot(grid[0])
    edges, top = timeline.edges_s, np.zeros(len(timeline.edges_s) - 1)
    marks = []
    for layer in _layers(timeline.components):
        axes.stairs(top + layer.watts, edges, baseline=top, fill=True, linewidth=0,
                    color=KIND_COLORS[layer.kind], alpha=layer.tint)  # fmt: skip
        watts = np.nan_to_num(layer.watts)  # to stack on and to place names by, not drawn
        marks.append((float(np.mean((top + 0.5 * watts)[-len(top) // 6 :])), layer))
        top = top + watts
    # Of a sum that lacks a part, the part that is known is no sum.
    unread = np.zeros(len(top), dtype=np.bool_)
    for c in timeline.components:
        unread |= np.isnan(c.job_w) & c.in_total
    axes.stairs(np.where(unread, np.nan, top), edges, baseline=None, color=_INK, linewidth=0.8)
    axes.set_ylim(0, max(1e-9, 1.08 * float(np.max(top, initial=0.0))))
    _hatch_gaps(axes, [c for c in timeline.components if c.in_total])
    if not marks:
        axes.text(0.5, 0.5, "no component could be measured or modelled", transform=axes.transAxes,
                  ha="center", color=_MUTED)  # fmt: skip
    _amounts(axes.yaxis, "W")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    _label_right(axes, [(y, layer.label, KIND_COLORS[layer.kind]) for y, layer in marks], width)
    _time_axis(axes, float(edges[-1]), width, labels=not rows)
    if rows:
        _draw_phases(figure.add_subplot(grid[1], sharex=axes), rows, float(edges[-1]), width)
    return figure


def _phase_rows(timeline: Timeline) -> list[tuple[str, list[tuple[float, float]]]]:
    """Phases by name, the longest ones, in order of appearance; bars one pixel apart join."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for name, begin, end in timeline.phases:
        spans.setdefault(name, []).append((begin, end))
    longest = sorted(spans, key=lambda name: -sum(e - b for b, e in spans[name]))[:_MOST_PHASES]
    pixel_s = float(timeline.edges_s[-1]) / 900
    rows = []
    for name in (name for name in spans if name in longest):
        bars: list[tuple[float, float]] = []
        for begin, end in sorted(spans[name]):
            if bars and begin - bars[-1][1] < pixel_s:
                bars[-1] = (bars[-1][0], max(bars[-1][1], end))
            else:
                bars.append((begin, end))
        rows.append((name, bars))
    return rows


def _draw_phases(
    axes: Axes, rows: Sequence[tuple[str, list[tuple[float, float]]]], end_s: float, width: float
) -> None:
    for number, (_, bars) in enumerate(rows):
        least = end_s / 700  # what is shorter than a pixel is still there
        widths = [(begin, max(end - begin, least)) for begin, end in bars]
        axes.broken_barh(widths, (number - 0.34, 0.68), color=_MUTED, alpha=0.55, linewidth=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [plain(name, 16) for name, _ in rows])
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    _time_axis(axes, end_s, width)


def _hatch_gaps(axes: Axes, components: Sequence[TimelineComponent]) -> None:
    spans: list[list[float]] = []
    for begin, end in sorted(gap for c in components for gap in c.gaps_s):
        if spans and begin <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([begin, end])
    for number, (begin, end) in enumerate(spans):
        axes.axvspan(begin, end, facecolor="none", edgecolor=_ALARM, hatch="////", linewidth=0)
        if number == 0:
            axes.annotate("no reading", ((begin + end) / 2, 1.0), ha="center", va="bottom",
                          xycoords=("data", "axes fraction"), color=_ALARM, fontsize=8)  # fmt: skip


def energy_over_time(timeline: Timeline, width: float = WIDE) -> Figure:
    """The job's energy so far, with its band of k = 2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.6), layout="constrained")
    axes = figure.add_subplot()
    at, energy, u = timeline.at_s, timeline.energy_j, timeline.u_j
    axes.fill_between(
        at, np.maximum(energy - u, 0), energy + u, color=_POINT, alpha=0.2, linewidth=0
    )
    axes.plot(at, energy, color=_POINT, linewidth=1.6)
    _amounts(axes.yaxis, "J")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    if len(energy):
        end = format_with_u(float(energy[-1]), float(u[-1]), "J").replace(" ± ", "\n± ")
        _label_right(axes, [(float(energy[-1]), end, _POINT)], width)
    _time_axis(axes, float(timeline.edges_s[-1]), width)
    return figure


def devices_over_time(timeline: Timeline, width: float = WIDE) -> Figure:
    """Every device in a panel of its own: its power, the job's part, its lowest and highest."""
    from matplotlib.figure import Figure

    shown = sorted(timeline.components, key=lambda c: list(KIND_COLORS).index(c.kind))[
        :MOST_DEVICES
    ]
    columns = 2 if width > NARROW and len(shown) > 1 else 1
    rows = max(1, math.ceil(len(shown) / columns))
    height = 0.4 + 1.05 * rows
    figure = Figure(figsize=(width, height))
    # Placed by hand: matplotlib's own layout takes seconds for a dozen panels.
    left = 0.62
    panel = (width - columns * (left + 0.3)) / columns, 0.72
    size = max(1, math.ceil((len(timeline.edges_s) - 1) / (240 if width > NARROW else 160)))
    for number, c in enumerate(shown):
        column, row = divmod(number, rows)
        x, y = left + column * (panel[0] + left + 0.3), height - 0.28 - panel[1] - 1.05 * row
        axes = figure.add_axes((x / width, y / height, panel[0] / width, panel[1] / height))
        color = KIND_COLORS.get(c.kind, KIND_COLORS["other"])
        first = np.arange(0, len(timeline.edges_s) - 1, size)
        edges = np.append(timeline.edges_s[first], timeline.edges_s[-1])
        count = np.diff(np.append(first, len(timeline.edges_s) - 1))
        if c.low_w is not None and c.high_w is not None:
            low, high = np.minimum.reduceat(c.low_w, first), np.maximum.reduceat(c.high_w, first)
            axes.stairs(high, edges, baseline=low, fill=True, color=color, alpha=0.3, linewidth=0)
        else:
            job = np.add.reduceat(c.job_w, first) / count
            axes.stairs(job, edges, fill=True, color=color, alpha=0.3, linewidth=0)
        device = np.add.reduceat(c.device_w, first) / count
        axes.stairs(device, edges, color=color, linewidth=1.0, baseline=None)
        _hatch_gaps(axes, [c])
        aside = "" if c.in_total else " (not added)"
        name = plain(component_name(c.kind, c.label), 34) + aside
        axes.set_title(name, loc="left", fontsize=9, color=_INK, pad=3)
        top = float(np.nanmax(c.high_w if c.high_w is not None else c.device_w, initial=0.0))
        axes.set_ylim(0, max(1e-9, 1.1 * top))
        _amounts(axes.yaxis, "W", most=3)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        _time_axis(
            axes, float(edges[-1]), width, labels=row == rows - 1 or number == len(shown) - 1
        )
    return figure


def _amounts(axis: Any, unit: str, *, most: int = 5) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(EngFormatter(unit=unit, sep=" "))


_TIME_STEPS = (
    *(m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)),
    10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 10800.0, 21600.0,
    43200.0, *(86400.0 * d for d in (1, 2, 5, 10, 20, 50, 100)),
)  # fmt: skip


def _time_axis(axes: Axes, end_s: float, width: float, *, labels: bool = True) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    most = 8 if width > NARROW else 5
    step = next((s for s in _TIME_STEPS if end_s / s <= most), end_s or 1.0)
    ticks = np.arange(0, end_s * 1.0001, step)
    unit, size = next(
        (u, s)
        for u, s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
        if step >= s or s == 1e-3
    )
    axes.set_xlim(0, max(end_s, 1e-9))
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda t, _: f"{t / size:.4g} {unit}" if t else "0")
    )
    axes.tick_params(axis="x", labelbottom=labels)


def _label_right(axes: Axes, marks: Sequence[tuple[float, str, str]], width: float) -> None:
    """Names beside the ends of what they name, moved apart where they would touch."""
    if not marks:
        return
    low, high = axes.get_ylim()
    least = 0.075 * (high - low)
    places: list[float] = []
    for y, _, _ in sorted(marks, key=lambda mark: mark[0]):
        places.append(max(y, places[-1] + least) if places else y)
    over = places[-1] - (high - 0.3 * least)
    if over > 0:
        places = [y - over for y in places]
    for place, (_, label, color) in zip(places, sorted(marks, key=lambda m: m[0]), strict=True):
        lines = label.split("\n")
        longest = (20 if width > NARROW else 13) if len(lines) == 1 else 40
        shown = "\n".join(plain(line, longest) for line in lines)
        axes.annotate(
            shown, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", color=color, fontsize=9, fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip


def step_text(timeline: Timeline) -> str:
    """What a step of the power figures is, in words."""
    step_s = float(timeline.edges_s[1] - timeline.edges_s[0])
    text = f"Each step is the mean over {format_duration(step_s)}: energy divided by time, exactly"
    if any(c.low_w is not None for c in timeline.components):
        text += "; the band spans the lowest and the highest second within it"
    return text + "."


# --- a study -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Points:
    """Rows of a study as points: `x`, `y` (n,) with their u (NaN: unknown), and each one's runs.

    `runs` are (row, x, y). `bounds` are (r_min, r_max) where `y` is a performance over the resource
    that they bound.
    """

    names: tuple[str, ...]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    u_x: NDArray[np.float64]
    u_y: NDArray[np.float64]
    front: NDArray[np.bool_]
    suspect: NDArray[np.bool_]
    x_label: str
    y_label: str
    x_unit: str
    bounds: tuple[float, float] | None = None
    runs: tuple[tuple[int, float, float], ...] = ()


LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Scores whose lines of equal PePR are drawn."""

_ISO_POINTS = 64
_MOST_NAMED = 14


def study_chart(ident: str, title: str, text: str, points: Points) -> tuple[Chart, dict[str, Any]]:
    """A scatter of a study, and how its two drawings map numbers to places, for the page's script.

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

    return chart(ident, title, text, draw), places


def _log_fits(x: NDArray[np.float64]) -> bool:
    return bool((x > 0).all())


def scatter(points: Points, width: float = WIDE) -> Figure:
    """Performance over a resource, its axis logarithmic, with lines of equal PePR and the front.

    Bars are u; faint dots are single runs; a cross is a row whose numbers look wrong.
    """
    return panels([("", points)], width=width, height=4.4 if width > NARROW else 4.0)


def panels(
    parts: Sequence[tuple[str, Points]], *, width: float = WIDE, height: float = 4.0
) -> Figure:
    """Scatters side by side, two a row, each with its name."""
    from matplotlib.figure import Figure

    columns = min(2, len(parts))
    rows = math.ceil(len(parts) / columns)
    figure = Figure(figsize=(width, height * rows), dpi=72, layout="constrained")
    places = [figure.add_subplot(rows, columns, i + 1) for i in range(len(parts))]
    each = width / columns
    for axes, (name, points) in zip(places, parts, strict=True):
        _prepare(axes, points, each)
        if name:
            axes.set_title(plain(name), loc="right", fontsize=10, fontweight="bold", pad=16)
    figure.draw_without_rendering()  # now pixels are known, and stay
    figure.set_layout_engine("none")
    for axes, (_, points) in zip(places, parts, strict=True):
        _fill(axes, points)
    return figure


def _prepare(axes: Axes, points: Points, width: float) -> None:
    xs, ys = [points.x], [points.y]
    if points.runs:
        xs.append(np.array([x for _, x, _ in points.runs]))
        ys.append(np.array([y for _, _, y in points.runs]))
    all_x, all_y = np.concatenate(xs), np.concatenate(ys)
    log = _log_fits(points.x) and _log_fits(all_x)
    if log:
        axes.set_xscale("log")
        span = max(0.12, 0.11 * math.log10(all_x.max() / all_x.min()))
        axes.set_xlim(all_x.min() / 10 ** (1.2 * span), all_x.max() * 10 ** (1.8 * span))
    _amounts_below(axes, points.x_unit, width)
    low, high = float(all_y.min()), float(all_y.max())
    pad = max(0.02, 0.14 * (high - low))
    axes.set_ylim(max(0.0, low - pad), min(1.03, high + pad))
    axes.set_xlabel(plain(points.x_label, 60), loc="right")
    axes.set_title(plain(points.y_label, 60), loc="left", fontsize=9, color=_MUTED, pad=16)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def _amounts_below(axes: Axes, unit: str, width: float) -> None:
    """Ticks of the x axis: amounts with their unit, few and round on a logarithmic one too."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        decades = math.log10(high / low)
        subs: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0) if decades < 1 else (1.0, 2.0, 5.0)
        if decades > (2.5 if width > NARROW else 1.5):
            subs = (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=list(subs)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", size=0)
    axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))


def _fill(axes: Axes, points: Points) -> None:
    if points.bounds is not None:
        _draw_isolines(axes, points.bounds, log=axes.get_xscale() == "log")
    order = np.argsort(points.x[points.front])
    axes.plot(points.x[points.front][order], points.y[points.front][order], color=_INK,
              linewidth=0.9, linestyle=(0, (1, 2.5)), gid="front", zorder=2)  # fmt: skip
    for row, x, y in points.runs:
        axes.plot([x], [y], ".", color=_POINT, alpha=0.4, markersize=4, gid=f"run-{row}", zorder=3)
    for i in range(len(points.names)):
        _draw_point(axes, points, i)
    _name_points(axes, points)


def _draw_isolines(axes: Axes, bounds: tuple[float, float], *, log: bool) -> None:
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    x = np.geomspace(x0, x1, _ISO_POINTS) if log else np.linspace(x0, x1, _ISO_POINTS)
    r = np.clip((x - bounds[0]) / (bounds[1] - bounds[0]), 0.0, 1.0)
    named = False
    for level in LEVELS:
        axes.plot(x, level * (1 + r), color=_MUTED, linewidth=0.7, alpha=0.55,
                  gid=f"iso-{level}", zorder=1, scalex=False, scaley=False)  # fmt: skip
        # Named where it leaves the figure at its top; the page's script moves the name along.
        end = bounds[0] + (y1 / level - 1) * (bounds[1] - bounds[0])
        if level < y1 <= 2 * level and x0 <= end <= x1:
            axes.annotate(f"{level:g}" if named else f"PePR {level:g}", (end, 1.0),
                          xycoords=("data", "axes fraction"), textcoords="offset points",
                          xytext=(8, 3), ha="right", color=_MUTED, fontsize=8,
                          gid=f"isoname-{level}", annotation_clip=False)  # fmt: skip
            named = True
    axes.set_xlim(x0, x1)
    axes.set_ylim(y0, y1)


def _draw_point(axes: Axes, points: Points, i: int) -> None:
    x, y, u_x, u_y = (float(a[i]) for a in (points.x, points.y, points.u_x, points.u_y))
    suspect = bool(points.suspect[i])
    color = _ALARM if suspect else _POINT
    if math.isfinite(u_x) and u_x > 0:
        left = max(x - u_x, axes.get_xlim()[0])
        axes.plot([left, x + u_x], [y, y], color=color, linewidth=1, alpha=0.5, gid=f"barx-{i}",
                  scalex=False, scaley=False)  # fmt: skip
    if math.isfinite(u_y) and u_y > 0:
        axes.plot([x, x], [y - u_y, y + u_y], color=color, linewidth=1, alpha=0.5, gid=f"bary-{i}",
                  scalex=False, scaley=False)  # fmt: skip
    filled = _POINT if points.front[i] and not suspect else _PAPER
    axes.plot([x], [y], "X" if suspect else "o", color=color, markerfacecolor=filled,
              markersize=6.5, markeredgewidth=1.6, gid=f"point-{i}", zorder=5)  # fmt: skip


def _name_points(axes: Axes, points: Points) -> None:
    """Names beside points where they cover neither a point nor another name."""
    pixels = axes.transData.transform(np.column_stack((points.x, points.y)))
    box = axes.get_window_extent()
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    first = [*np.flatnonzero(points.front), *np.flatnonzero(points.suspect), *np.argsort(-points.y)]
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
    curves: Sequence[Curve], best: Envelope | None = None, *, width: float = WIDE
) -> Figure:
    """Performance over the energy until then, a line a run; `best` is the envelope of them all.

    Lines of one name are one colour and named once; energy is logarithmic where there are several.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.4), dpi=72, layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(curve.name for curve in curves))
    cycle = [*KIND_COLORS.values(), _ALARM, _MUTED]
    if len(curves) > 1 and all(_log_fits(curve.energy_j) for curve in curves):
        axes.set_xscale("log")
    for curve in curves[:_MOST_CURVES]:
        color = _POINT if len(names) == 1 else cycle[names.index(curve.name) % len(cycle)]
        axes.plot(curve.energy_j, curve.performance, color=color, linewidth=1.1,
                  linestyle="-" if names.index(curve.name) < len(cycle) else "--",
                  alpha=1 if len(curves) == 1 else 0.6, marker="o" if len(curves) == 1 else "",
                  markersize=4)  # fmt: skip
    if best is not None and len(best.energy_j):
        last = max(float(curve.energy_j[-1]) for curve in curves)
        energy_j = np.append(best.energy_j, last)
        performance = np.append(best.performance, best.performance[-1])
        axes.plot(
            energy_j, performance, color=_INK, linewidth=1.8, drawstyle="steps-post", zorder=4
        )
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
        _label_right(axes, marks, width)
    elif curves:
        axes.set_xlim(left=0)
    _amounts_below(axes, "J", width)
    axes.set_title(
        plain(curves[0].metric, 60) if curves else "", loc="left", fontsize=9, color=_MUTED
    )
    axes.set_xlabel("energy", loc="right")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    return figure
