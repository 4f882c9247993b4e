"""Figures of one run: power and energy over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.energy.sources import KINDS
from pepr_profiler.record import Floats
from pepr_profiler.report import figures
from pepr_profiler.report.components import component_name
from pepr_profiler.report.figures import ALARM, INK, MUTED, NARROW, POINT, WIDE, plain
from pepr_profiler.summary.timeline import Timeline, TimelineComponent
from pepr_profiler.units import format_duration, format_with_u

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_KIND_NAMES = {"gpu": "GPUs", "cpu": "packages", "dram": "memories", "other": "others"}
_TINTS = (1.0, 0.72, 0.52, 0.86, 0.62)  # shades that distinguish parts of one kind

_MOST_LAYERS = 6
MOST_DEVICES = 24
_MOST_PHASES = 7


@dataclass(frozen=True)
class _Layer:
    label: str
    kind: str
    tint: float
    watts: Floats


def _layers(components: Iterable[TimelineComponent]) -> list[_Layer]:
    """What is stacked: the job's power by component, or by kind where there are many of them.

    NaN where nothing was read.
    """
    counted = [c for c in components if c.in_total]
    kinds = [kind for kind in KINDS if any(c.kind == kind for c in counted)]
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
            layers.append(_Layer(_name(c), kind, tint, c.job_w))
    return layers


def _name(component: TimelineComponent) -> str:
    return component_name({"kind": component.kind, "label": " ".join(component.label.split())})


def run_figure(timeline: Timeline, form: str) -> bytes:
    """Power over time as a png, svg or pdf file."""
    return figures.save(lambda: power_over_time(timeline), form)


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
        color = figures.KIND_COLORS[layer.kind]
        axes.stairs(top + layer.watts, edges, baseline=top, fill=True, linewidth=0,
                    color=color, alpha=layer.tint)  # fmt: skip
        watts = np.nan_to_num(layer.watts)  # to stack on and to place names by, not drawn
        level = float(np.mean((top + 0.5 * watts)[-len(top) // 6 :]))
        marks.append((level, layer.label, color))
        top = top + watts
    # Where a part is unknown, so is the sum.
    unread = np.zeros(len(top), dtype=np.bool_)
    for c in timeline.components:
        unread |= np.isnan(c.job_w) & c.in_total
    axes.stairs(np.where(unread, np.nan, top), edges, baseline=None, color=INK, linewidth=0.8)
    axes.set_ylim(0, max(1e-9, 1.08 * float(np.max(top, initial=0.0))))
    _hatch_gaps(axes, [c for c in timeline.components if c.in_total])
    if not marks:
        axes.text(0.5, 0.5, "no device could be measured or estimated", transform=axes.transAxes,
                  ha="center", color=MUTED)  # fmt: skip
    _amounts(axes.yaxis, "W")
    figures.label_right(axes, marks, width)
    _time_axis(axes, float(edges[-1]), width, labels=not rows)
    if rows:
        _draw_phases(figure.add_subplot(grid[1], sharex=axes), rows, float(edges[-1]), width)
    return figure


def _phase_rows(timeline: Timeline) -> list[tuple[str, list[tuple[float, float]]]]:
    """The longest phases by name, in order of appearance; bars less than a pixel apart join."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for name, begin, end in timeline.phases:
        spans.setdefault(name, []).append((begin, end))
    longest = sorted(spans, key=lambda name: -sum(e - b for b, e in spans[name]))[:_MOST_PHASES]
    pixel_s = float(timeline.edges_s[-1]) / 900
    rows = []
    for name in (name for name in spans if name in longest):
        rows.append((name, _joined(spans[name], pixel_s)))
    return rows


def _joined(spans: Iterable[tuple[float, float]], apart_s: float) -> list[tuple[float, float]]:
    """The spans in order; those that overlap or are at most `apart_s` apart are one."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin - joined[-1][1] <= apart_s:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def _draw_phases(
    axes: Axes, rows: Sequence[tuple[str, list[tuple[float, float]]]], end_s: float, width: float
) -> None:
    for number, (_, bars) in enumerate(rows):
        least = end_s / 700  # what is shorter than a pixel is still there
        widths = [(begin, max(end - begin, least)) for begin, end in bars]
        axes.broken_barh(widths, (number - 0.34, 0.68), color=MUTED, alpha=0.55, linewidth=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [plain(name, 16) for name, _ in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    _time_axis(axes, end_s, width)


def _hatch_gaps(axes: Axes, components: Sequence[TimelineComponent]) -> None:
    spans = _joined((gap for c in components for gap in c.gaps_s), 0.0)
    for number, (begin, end) in enumerate(spans):
        axes.axvspan(begin, end, facecolor="none", edgecolor=ALARM, hatch="////", linewidth=0)
        if number == 0:
            axes.annotate("no reading", ((begin + end) / 2, 1.0), ha="center", va="bottom",
                          xycoords=("data", "axes fraction"), color=ALARM, fontsize=8)  # fmt: skip


def energy_over_time(timeline: Timeline, width: float = WIDE) -> Figure:
    """The job's energy so far, with a band of ± u (k = 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.6), layout="constrained")
    axes = figure.add_subplot()
    at, energy, u = timeline.at_s, timeline.energy_j, timeline.u_j
    axes.fill_between(
        at, np.maximum(energy - u, 0), energy + u, color=POINT, alpha=0.2, linewidth=0
    )
    axes.plot(at, energy, color=POINT, linewidth=1.6)
    _amounts(axes.yaxis, "J")
    axes.set_ylim(bottom=0)
    if len(energy):
        end = format_with_u(float(energy[-1]), float(u[-1]), "J").replace(" ± ", "\n± ")
        figures.label_right(axes, [(float(energy[-1]), end, POINT)], width)
    _time_axis(axes, float(timeline.edges_s[-1]), width)
    return figure


def devices_over_time(timeline: Timeline, width: float = WIDE) -> Figure:
    """A panel per device: its power, and the band of its lowest and highest or the job's part."""
    from matplotlib.figure import Figure

    shown = sorted(timeline.components, key=lambda c: KINDS.index(c.kind))[:MOST_DEVICES]
    columns = 2 if width > NARROW and len(shown) > 1 else 1
    rows = max(1, math.ceil(len(shown) / columns))
    height = 0.4 + 1.05 * rows
    figure = Figure(figsize=(width, height))
    # Placed by hand, as matplotlib's own layout takes seconds for a dozen panels.
    left = 0.62
    panel = (width - columns * (left + 0.3)) / columns, 0.72
    size = max(1, math.ceil((len(timeline.edges_s) - 1) / (240 if width > NARROW else 160)))
    for number, c in enumerate(shown):
        column, row = divmod(number, rows)
        x, y = left + column * (panel[0] + left + 0.3), height - 0.28 - panel[1] - 1.05 * row
        axes = figure.add_axes((x / width, y / height, panel[0] / width, panel[1] / height))
        color = figures.KIND_COLORS.get(c.kind, figures.KIND_COLORS["other"])
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
        aside = "" if c.in_total else " (not in the total)"
        name = plain(_name(c), 34) + aside
        axes.set_title(name, loc="left", fontsize=9, color=INK, pad=3)
        top = float(np.nanmax(c.high_w if c.high_w is not None else c.device_w, initial=0.0))
        axes.set_ylim(0, max(1e-9, 1.1 * top))
        _amounts(axes.yaxis, "W", most=3)
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


def step_text(timeline: Timeline) -> str:
    """What a step of the power figures is, for their captions."""
    step_s = float(timeline.edges_s[1] - timeline.edges_s[0])
    text = f"Each step is the mean over {format_duration(step_s)}, its energy divided by its time"
    if any(c.joins_steps for c in timeline.components):
        text += ", or over several such where a sensor does not tell more"
    if any(c.low_w is not None for c in timeline.components):
        text += "; the band spans the lowest and the highest second within it"
    return text + "."
