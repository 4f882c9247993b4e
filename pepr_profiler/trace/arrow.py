"""Arrow IPC streams as recordings have them: columns of numbers of fixed width, none missing.

This follows Arrow's format/Message.fbs and Schema.fbs, which only grow: any Arrow reader opens what
is written here (the tests compare with pyarrow and nanoarrow), and what other writers make of such
columns is read. It uses no Arrow library, because a damaged file may kill a process that reads it
with nanoarrow (0.9: a message without its mark, a schema without fields), and a recording may be
what is left of a crash. The schema is written here, the batches behind it by the core
(csrc/recording/arrow.h).
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pepr_profiler.record import Record
from pepr_profiler.trace.files import open_file

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np
    from numpy.typing import NDArray

_MARK = b"\xff\xff\xff\xff"
"""A message begins with this; then come the length of its metadata, the metadata, and its body."""

_VERSION = 4
"""MetadataVersion V5, of Arrow 1.0 and later."""

_SCHEMA, _RECORD_BATCH = 1, 3  # MessageHeader
_INT, _FLOATING_POINT = 2, 3  # Type

MOST_BYTES = 16 << 30
"""The size of a stream: two years of a sensor that is read at 1 kHz, as it is stored."""

_MOST_MESSAGE_BYTES = 256 << 20
"""The size of one message; a lane of 3,000 channels has batches of 25 MB."""

_PRECISIONS = {"<f2": 0, "<f4": 1, "<f8": 2}


class Column(Record):
    """A column's name, numpy's name for its numbers ("<i8", "<u4", "<f8"), and facts about it."""

    name: str
    form: str
    facts: Mapping[str, str]


class Schema(Record):
    """The columns of a stream and facts about all of it."""

    columns: tuple[Column, ...]
    facts: Mapping[str, str]


class DamagedError(ValueError):
    """A stream cannot be read: it does not begin with a schema, or with one of such columns."""


# --- writing -----------------------------------------------------------------------------------


def schema_message(schema: Schema) -> bytes:
    """The message that a stream begins with."""
    fields: list[dict[int, _Field]] = [
        {
            **{0: column.name, 1: ("B", 0)},  # nullable
            **_type_of(column.form),
            5: [],  # no children
            6: _pairs(column.facts),
        }
        for column in schema.columns
    ]
    body: dict[int, _Field] = {0: ("h", 0), 1: fields, 2: _pairs(schema.facts)}  # little-endian
    metadata = _flatbuffer({0: ("h", _VERSION), 1: ("B", _SCHEMA), 2: body, 3: ("q", 0)})
    return _MARK + struct.pack("<i", len(metadata)) + metadata


# A table's fields by their numbers: a scalar, as (form of struct, value), or what it refers to.
_Field: TypeAlias = "tuple[str, int] | str | list[dict[int, _Field]] | dict[int, _Field]"


def _type_of(form: str) -> dict[int, _Field]:
    """The type of a Field: which one of the union's it is, and its table."""
    if form in _PRECISIONS:
        return {2: ("B", _FLOATING_POINT), 3: {0: ("h", _PRECISIONS[form])}}
    return {2: ("B", _INT), 3: {0: ("i", 8 * int(form[2:])), 1: ("B", form[1] == "i")}}


def _pairs(facts: Mapping[str, str]) -> list[dict[int, _Field]]:
    return [{0: key, 1: value} for key, value in facts.items()]


def _flatbuffer(root: dict[int, _Field]) -> bytes:
    """A tree of tables as a flatbuffer, padded to a multiple of 8.

    An offset is relative to its own place and leads forwards. A table's fields are found by its
    vtable, which is written just before it. A number lies at a multiple of its size.
    """
    data = bytearray(4)
    _refer(data, 0, _append_table(data, root))
    return bytes(data + bytes(-len(data) % 8))


def _append_table(data: bytearray, fields: dict[int, _Field]) -> int:
    """Appends a table and all that it refers to; returns where it begins."""
    vtable = [0] * (2 + max(fields) + 1)
    inline, size = [], 4  # an offset to the vtable comes first
    forms = {number: x[0] if isinstance(x, tuple) else "I" for number, x in fields.items()}
    for number in sorted(fields, key=lambda n: -struct.calcsize(forms[n])):
        inline.append((number, size))
        vtable[2 + number] = size
        size += struct.calcsize(forms[number])
    vtable[:2] = 2 * len(vtable), size
    data += bytes((4 - len(data) - 2 * len(vtable)) % 8)  # the table 4 beyond a multiple of 8
    data += struct.pack(f"<{len(vtable)}H", *vtable)
    begin = len(data)
    data += struct.pack("<i", 2 * len(vtable)) + bytes(size - 4)
    for number, at in inline:
        value = fields[number]
        if isinstance(value, tuple):
            struct.pack_into(f"<{value[0]}", data, begin + at, value[1])
        else:
            _refer(data, begin + at, _append(data, value))
    return begin


def _append(data: bytearray, value: str | list[dict[int, _Field]] | dict[int, _Field]) -> int:
    if isinstance(value, dict):
        return _append_table(data, value)
    data += bytes(-len(data) % 4)
    begin = len(data)
    if isinstance(value, str):
        text = value.encode()
        data += struct.pack("<I", len(text)) + text + b"\0"
        return begin
    data += struct.pack("<I", len(value)) + bytes(4 * len(value))
    for i, table in enumerate(value):
        _refer(data, begin + 4 + 4 * i, _append_table(data, table))
    return begin


def _refer(data: bytearray, at: int, to: int) -> None:
    struct.pack_into("<I", data, at, to - at)


# --- reading -----------------------------------------------------------------------------------


def read_schema(source: Path | bytes) -> Schema | None:
    """The schema of a stream; None if it was not written whole.

    Raises DamagedError if something else is there, OSError if it cannot be read.
    """
    first = next(_messages(source), None)
    if first is None:
        if _is_begun(source):
            return None
        raise DamagedError("it does not begin with a schema")
    kind, header, _ = first
    try:
        if kind != _SCHEMA or header.number(0, "<h"):
            raise DamagedError("it does not begin with a schema of little-endian numbers")
        columns = (Column(x.text(0), _form_of(x), x.facts(6)) for x in header.tables(1))
        return Schema(tuple(columns), header.facts(2))
    except (LookupError, ValueError, struct.error) as error:
        raise DamagedError(f"its schema is damaged ({error})") from None


def read_batches(source: Path | bytes, forms: Sequence[str]) -> Iterator[list[NDArray[np.generic]]]:
    """The columns of each batch, (rows,) of `forms` each, up to the first torn or damaged batch.

    Arrow has no checksums, but each column must be as long as its batch says. A batch that is
    compressed, or in which a number is missing, is not one of ours. Empty batches are left out.
    """
    import numpy as np

    for kind, header, body in _messages(source):
        if kind != _RECORD_BATCH:
            continue
        try:
            rows = header.number(0, "<q")
            places = header.vector(2, "qq")  # offset and length of each column's two buffers
            missing = any(header.vector(1, "qq")[1::2])  # length and unknown of each column
            if rows < 0 or missing or header.has(3):  # compressed
                return
            at = zip(forms, places[2::4], strict=True)
            numbers = [np.frombuffer(body, form, rows, offset) for form, offset in at]
        except (ValueError, struct.error):
            return
        if rows:
            yield numbers


def _form_of(column: _Table) -> str:
    """Numpy's name for a column's numbers; of other columns, the number of their type."""
    kind = column.number(2, "<B")
    if kind == _INT:
        of_int = column.table(3)
        return f"<{'i' if of_int.number(1, '<B') else 'u'}{of_int.number(0, '<i') // 8}"
    if kind == _FLOATING_POINT:
        return f"<f{2 << min(column.table(3).number(0, '<H'), 3)}"
    return f"type {kind}"


class _Table:
    """A table of a flatbuffer, which may be damaged.

    Its methods raise ValueError or struct.error where it contradicts itself; none reads outside of
    the data.
    """

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        vtable = at - self._read("<i", at)
        size = self._read("<H", vtable) // 2
        self._fields = struct.unpack_from(f"<{min(size, 16)}H", data, vtable)[2:]

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, *struct.unpack_from("<I", data))

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise ValueError("an offset leads out of the metadata")
        (value,) = struct.unpack_from(form, self._data, at)
        return int(value)

    def _position(self, field: int) -> int:
        """Where a field is; 0 if it is not stored, since it has its default."""
        offset = self._fields[field] if field < len(self._fields) else 0
        return self._at + offset if offset else 0

    def has(self, field: int) -> bool:
        return self._position(field) > 0

    def number(self, field: int, form: str) -> int:
        at = self._position(field)
        return self._read(form, at) if at else 0

    def table(self, field: int) -> _Table:
        at = self._position(field)
        return _Table(self._data, at + self._read("<I", at))

    def vector(self, field: int, form: str) -> list[int]:
        """The numbers of a vector of structs; `form` is one struct's."""
        at = self._position(field)
        if not at:
            return []
        at += self._read("<I", at)
        count = self._read("<I", at)
        if count > len(self._data):
            raise ValueError("a vector is longer than the metadata")
        return list(struct.unpack_from(f"<{form * count}", self._data, at + 4))

    def tables(self, field: int) -> list[_Table]:
        at = self._position(field)
        offsets = self.vector(field, "I")
        first = at + self._read("<I", at) + 4 if offsets else 0
        return [_Table(self._data, first + 4 * i + x) for i, x in enumerate(offsets)]

    def text(self, field: int) -> str:
        at = self._position(field)
        at += self._read("<I", at)
        text = self._data[at + 4 : at + 4 + self._read("<I", at)]
        return text.decode()

    def facts(self, field: int) -> dict[str, str]:
        """Custom metadata."""
        return {pair.text(0): pair.text(1) for pair in self.tables(field)}


def _open(path: Path) -> Any:
    return open(open_file(path, most_bytes=MOST_BYTES), "rb")  # noqa: PTH123


def _messages(source: Path | bytes) -> Iterator[tuple[int, _Table, bytes]]:
    """Kind, header and body of each message, up to the first that is not whole."""
    try:
        file: Any = _open(source) if isinstance(source, Path) else io.BytesIO(source)
    except FileNotFoundError:
        return
    with file:
        left = file.seek(0, os.SEEK_END) - file.seek(0)
        while True:
            begin = file.read(8)
            length = int.from_bytes(begin[4:], "little", signed=True)
            left -= 8
            if begin[:4] != _MARK or not 0 < length <= min(left, _MOST_MESSAGE_BYTES):
                return  # torn, or the end
            try:
                message = _Table.root(file.read(length))
                body_bytes = message.number(3, "<q")
                left -= length + body_bytes
                if not 0 <= body_bytes <= _MOST_MESSAGE_BYTES or left < 0:
                    return
                kind, header = message.number(1, "<B"), message.table(2)
            except (ValueError, struct.error):
                return
            yield kind, header, file.read(body_bytes)


def _is_begun(source: Path | bytes) -> bool:
    """Whether a stream without a whole first message may still be being written."""
    if isinstance(source, Path):
        try:
            with _open(source) as file:
                head, size = file.read(8), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return True
    else:
        head, size = source[:8], len(source)
    length = int.from_bytes(head[4:], "little", signed=True)
    return head[:4] == _MARK[: len(head)] and (len(head) < 8 or length > size - 8)
