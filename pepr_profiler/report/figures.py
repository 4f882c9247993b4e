"""Figures by matplotlib: for papers as files, for pages as SVG that follows the page's colours.

No pyplot: a figure here is an object without a window, a backend or a global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from pepr_profiler.summary.timeline import Timeline
from pepr_profiler.units import format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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

WIDE, NARROW = 9.2, 4.5
"""Width in inches, for a page or a two-column paper, and for a phone or one column."""
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
