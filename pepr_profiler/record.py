"""Lightweight records with named fields, and `Any`, without the cost of importing typing.

`class Peer(Record): pid: int` is what `typing.NamedTuple` would make of it, and that is what
type checkers take it for. But typing, with what it compiles of each annotation, takes 0.7 MB of a
program that records itself; dataclasses, which need inspect, 1.5 MB. And a frozen dataclass is
compiled anew by each process, a millisecond a class: with all that a summary needs, a sixth of
`pepr-profile -- true`. What has to change or to cache there is a dataclass with neither `eq` nor
`repr`, which are most of that millisecond.

`Any`, and the arrays `Floats`, `Ints` and `Mask`, are for annotations, which are never evaluated.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own, which type checkers know by name
if TYPE_CHECKING:
    from typing import Any
    from typing import NamedTuple as Record

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Mask = NDArray[np.bool_]
else:
    from collections import namedtuple

    Any = Floats = Ints = Mask = object

    class _Made(type):
        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body["__annotations__"]
            defaults = [body[field] for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            for key, value in body.items():
                if key not in fields:
                    setattr(made, key, value)
            return made

    class Record(metaclass=_Made):
        pass


__all__ = ["Any", "Floats", "Ints", "Mask", "Record"]
