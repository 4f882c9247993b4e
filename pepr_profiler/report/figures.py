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
from functools import partial
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from pepr_profiler.energy.sources import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Hues that colour-blind readers can distinguish (Okabe and Ito), toned down. Each is a CSS variable
# of the page; page.css has their values for dark mode.
INK, MUTED, RULE, PAPER = "#1d2329", "#5c6670", "#dde1e5", "#fffffe"
KIND_COLORS = dict(zip(KINDS, ("#2b6cb0", "#d97a1e", "#1f9179", "#8a6fb3"), strict=True))
ALARM, POINT = "#b3372b", "#2b6cb1"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    ALARM: "--alarm",
    POINT: "--point",
    **{color: f"--{kind}" for kind, color in KIND_COLORS.items()},
}

WIDE, NARROW = 9.2, 4.5
"""Width in inches, for a page or a two-column paper, and for a phone or one column."""
_LABEL = 26  # characters of a name in a figure; the tables have the rest


@dataclass(frozen=True)
class Chart:
    """One figure of a page in two widths, with a description for those who cannot see it."""

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
def _style() -> Iterator[None]:
    """The look of all figures; text stays text."""
    import matplotlib as mpl

    look: Any = {
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 9,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "figure.facecolor": PAPER,
        "axes.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "hatch.color": ALARM,
        "hatch.linewidth": 0.6,
        "text.color": INK,
        "text.parse_math": False,  # a name may hold a "$"
        "xtick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.color": MUTED,
        "ytick.major.size": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": "pepr",
        "pdf.fonttype": 42,
    }
    with mpl.rc_context(look), warnings.catch_warnings():
        # A glyph that matplotlib's font lacks may be in the font of the page or of the reader.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save(draw: Callable[[], Figure], file_format: str) -> bytes:
    """A figure as the bytes of a png (300 dpi), svg or pdf file."""
    out = io.BytesIO()
    with _style():
        metadata = {"Date": None} if file_format == "svg" else None
        draw().savefig(out, format=file_format, dpi=300, metadata=metadata)
    return out.getvalue()


def chart(ident: str, title: str, text: str, draw: Callable[[float], Figure]) -> Chart:
    """A figure for a page, from a function of its width in inches."""
    drawn = []
    for name, width in (("wide", WIDE), ("narrow", NARROW)):
        svg = save(partial(draw, width), "svg")
        drawn.append(_inline(svg, f"{ident}-{name}", title, text))
    return Chart(ident, title, text, *drawn)


_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def _inline(svg: bytes, prefix: str, title: str, text: str) -> str:
    """SVG as part of a page: CSS variables for colours, ids of its own, a title, short numbers."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(svg)
    for parent in root.iter():
        for child in parent.findall(f"{{{_SVG}}}metadata"):
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
    """A path with one decimal, and H and V for level and upright lines: a third of the bytes."""
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


def label_right(axes: Axes, marks: Sequence[tuple[float, str, str]], width: float) -> None:
    """Names at the right ends of curves, moved apart where they would touch."""
    if not marks:
        return
    low, high = axes.get_ylim()
    least = 0.075 * (high - low)
    places: list[float] = []
    rising = sorted(marks, key=lambda mark: mark[0])
    for y, _, _ in rising:
        places.append(max(y, places[-1] + least) if places else y)
    over = places[-1] - (high - 0.3 * least)
    if over > 0:
        places = [y - over for y in places]
    for place, (_, label, color) in zip(places, rising, strict=True):
        lines = label.split("\n")
        longest = (20 if width > NARROW else 13) if len(lines) == 1 else 40
        shown = "\n".join(plain(line, longest) for line in lines)
        axes.annotate(
            shown, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", color=color, fontsize=9, fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip
