"""Text for people: names made harmless, measured in terminal cells, cut, wrapped and coloured.

A terminal's cell is what one letter takes; a CJK character takes two. rich knows them, and is
imported only for text that is not ASCII or has colours: a run's live line is written while the
program that is measured runs.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pepr_profiler.units import UNKNOWN, format_duration, format_provenance, format_quantity

Line = list[tuple[str, str]]
"""A line as pieces of text from left to right, each with the rich style that colours it."""


def printable(text: str) -> str:
    """`text` on one line: what would move the cursor, hide or fail to encode is an escape."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def brief(text: str, longest: int = 200) -> str:
    """`text` as part of a sentence: printable, and cut after `longest` characters."""
    return printable(text if len(text) <= longest else f"{text[: longest - 1]}…")


def cells(text: str) -> int:
    """How many cells of a terminal a printable text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, room: int) -> str:
    """A printable text in at most `room` cells, its end replaced with "…"."""
    if cells(text) <= room:
        return text
    from rich.cells import set_cell_size

    return set_cell_size(text, room - 1).rstrip() + "…"


def left(text: str, room: int) -> str:
    """`text`, made printable, in exactly `room` cells: cut, or padded on its right."""
    shown = cut(printable(text), room)
    return shown + " " * (room - cells(shown))


def right(text: str, room: int) -> str:
    """`text`, made printable, in at least `room` cells: padded on its left."""
    shown = printable(text)
    return " " * (room - cells(shown)) + shown


def wrap(text: str, room: int) -> list[str]:
    """Lines of at most `room` cells; a word longer than that is folded."""
    if all(cells(character) == 1 for character in set(text)):
        # The profiler's own texts: this spares an ordinary screen rich's console, 30 ms.
        from textwrap import wrap as wrap_letters

        return wrap_letters(text, max(room, 1), break_on_hyphens=False)
    from rich.console import Console
    from rich.text import Text

    lines = Text(text).wrap(Console(file=io.StringIO()), max(room, 1), overflow="fold")
    return [line.plain.rstrip() for line in lines]


def drawn(lines: Iterable[Line], *, width: int, color: bool) -> str:
    """The lines, each cut at `width` cells and without spaces at its end; no final line end.

    There are no escape codes unless `color`.
    """
    if not color:
        return "\n".join(cut("".join(text for text, _ in line).rstrip(), width) for line in lines)
    from rich.console import Console
    from rich.text import Text

    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        color_system="standard",
        no_color=False,
        highlight=False,
    )
    with console.capture() as capture:
        for line in lines:
            text = Text.assemble(*line)
            text.rstrip()
            text.truncate(width, overflow="ellipsis")
            console.print(text, soft_wrap=True)
    return capture.get().removesuffix("\n")


def known(value: float | None) -> float | None:
    """The value, or None where it is no finite number."""
    return value if value is not None and math.isfinite(value) else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """What part of the whole it is; None where that is unknown."""
    part, whole = known(part), known(whole)
    return None if part is None or not whole else part / whole


def percent(fraction: float | None, *, unknown: str = "?") -> str:
    """A fraction in percent with one decimal."""
    return unknown if fraction is None else f"{fraction:.1%}"


def number(value: Any) -> str:
    """A metric's value: four significant digits, whole numbers in full."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 9999.5 else f"{value:,.0f}"


def amount(value: float, unit: str) -> str:
    """An amount of a resource: a time, a physical quantity, money, or a number without a unit."""
    if unit == "s":
        return format_duration(value)
    if unit in ("J", "g", "B"):
        return format_quantity(value, unit)
    if unit:
        return f"{value:#.4g} {unit}"  # a currency takes no prefix
    return format_quantity(value, "").rstrip() if value >= 1e4 else f"{value:.4g}"


def counted(energy: Mapping[str, Any]) -> str:
    """The key of what is counted of each component of a summary's energy."""
    return "device_j" if energy.get("scope") == "device" else "job_j"


def kind_of(component: Mapping[str, Any]) -> str:
    """The kind of a component, one of `energy.sources.KINDS`."""
    from pepr_profiler.energy.sources import KINDS

    return component["kind"] if component.get("kind") in KINDS else "other"


def label_of(component: Mapping[str, Any]) -> str:
    """What distinguishes a component from others of its kind: its label, else its id's own part."""
    return format_provenance(
        component.get("label") or str(component.get("id", "")).partition(":")[2]
    )


def component_name(component: Mapping[str, Any], *, column: int = 0) -> str:
    """A component as reports call it: "gpu:0 H100", "cpu package-0".

    The name of its kind, where it is not in the label, has at least `column` cells.
    """
    kind, label = str(component.get("kind")), label_of(component)
    return label if label.startswith(kind) or kind == "other" else f"{kind:<{column}} {label}"
