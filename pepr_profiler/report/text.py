"""Text for people: names made harmless, measured in terminal cells, cut, wrapped and coloured.

A terminal's cell is what one letter takes; a CJK character takes two. rich knows them, and is
imported only for text that is not ASCII or has colours: a run's live line is written while the
program that is measured runs.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Sequence

from pepr_profiler.record import Record
from pepr_profiler.units import utf8_text

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import TextIO

Line = list[tuple[str, str]]
"""A line as pieces of text from left to right, each with the rich style that colours it."""


def printable(text: str) -> str:
    """`text` on one line: what would move the cursor, hide or fail to encode is an escape."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in utf8_text(text)
    )


def printable_lines(text: str) -> str:
    """`text` of several lines, each of them printable."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


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

    The pieces are made printable: names may come from damaged runs. There are no escape codes
    unless `color`, and then only those of the styles.
    """
    lines = [[(printable(text), style) for text, style in line] for line in lines]
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


ENERGY_CELLS = 14
"""The least width of a column of energies: those of two tables, and of two runs, line up."""


class TextColumn(Record):
    title: str
    values: list[str]
    left: bool = False

    @property
    def cells(self) -> int:
        least = ENERGY_CELLS if self.title == "energy" else len(self.title)
        # Into the gap hang a ≤, so that digits stay below each other, and one letter of "mean W".
        least -= self.title.endswith(" W")
        return max(least, *(len(value.lstrip("≤")) for value in self.values))

    def after(self, gap: str, text: str) -> str:
        """`gap` and `text`, aligned in the column."""
        # The energy column is wide: its title stands over the digits, not over the unit.
        if self.left or (self.title == "energy" and text == self.title):
            return gap + text.ljust(self.cells)
        return text.rjust(len(gap) + self.cells)


def table_cells(room: int, columns: Sequence[TextColumn], gap: str) -> int:
    return 2 + room + sum(len(gap) + column.cells for column in columns)


def table(
    title: str, names: Sequence[str], columns: Sequence[TextColumn], *, room: int, gap: str
) -> list[Line]:
    """A header and a line for each name, the names cut and padded to `room` cells."""
    header = "".join(column.after(gap, column.title) for column in columns)
    lines: list[Line] = [[(f"  {title:<{room}}{header}", "dim")]]
    for index, name in enumerate(names):
        values = "".join(column.after(gap, column.values[index]) for column in columns)
        lines.append([(f"  {left(name, room)}{values}", "")])
    return lines


_IN_ASCII = {
    **{"±": "+/-", "−": "-", "–": "-", "—": "-", "×": "x", "·": "-", "…": "..."},
    **{"≤": "<=", "≥": ">=", "≈": "~", "²": "2", "₂": "2", "µ": "u", "μ": "u", "€": "EUR"},
    **dict(zip("▁▂▃▄▅▆▇█", "_.-=+*%#", strict=True)),
    **dict(zip("▏▎▍▌▋▊▉", ".......", strict=True)),
}
"""What the profiler prints beyond ASCII, for terminals and files that cannot show it."""


def encode_readably(stream: TextIO) -> None:
    """Makes a stream write what its encoding lacks in other letters, or as escapes.

    Without this, "±" is an error on an ASCII or ISO-8859-1 stream.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return  # it encodes nothing
    encoding = stream.encoding
    if codecs.lookup(encoding).name == "ascii":
        # Click writes UTF-8 to a stream that is called "ascii".
        codecs.register(_plain_ascii)
        encoding = _PLAIN_ASCII
    handler = f"readable-{encoding}"
    codecs.register_error(handler, lambda error: _rest_of_line(error, encoding))
    stream.reconfigure(encoding=encoding, errors=handler)


_PLAIN_ASCII = "pepr_ascii"


def _plain_ascii(name: str) -> codecs.CodecInfo | None:
    """ASCII under a name of its own."""
    if name != _PLAIN_ASCII:
        return None
    ascii_codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii_codec.encode,
        ascii_codec.decode,
        incrementalencoder=ascii_codec.incrementalencoder,
        incrementaldecoder=ascii_codec.incrementaldecoder,
        name=name,
    )


def _rest_of_line(error: UnicodeError, encoding: str) -> tuple[str | bytes, int]:
    """The line from the first letter that cannot be encoded, and where it ends.

    "+/-" takes two cells more than "±". They are taken from the spaces that follow, so that columns
    stay where they are.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    end = error.object.find("\n", error.start)
    end = len(error.object) if end < 0 else end
    written = ""
    wider = 0
    for character in utf8_text(error.object[error.start : end]):
        if character == " " and wider > 0 and written.endswith(" "):
            wider -= 1
            continue
        try:
            character.encode(encoding)
            written += character
        except UnicodeEncodeError:
            escape = character.encode("unicode_escape").decode("ascii")
            replacement = _IN_ASCII.get(character, escape)
            wider += len(replacement) - cells(character)
            written += replacement
    return written.encode(encoding), end
