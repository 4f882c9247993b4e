"""The shape that a JSON value must have, checked wherever a file is read."""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any


MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What a file that is not ours, or damaged, may raise where it is used as if it were."""


def shape_error(value: Any, shape: Any, at: str = "") -> str:  # noqa: PLR0911 - one a kind of shape
    """What of `value` (JSON) has not this shape, as "energy.total_j is 'x'"; "" if all has.

    A shape is a type (float is any finite number, int one of 64 bits), None, a tuple of shapes of
    which one fits, `[shape]` for a list, or a dict: of each key that is there, with `...` for all
    others, and with None the keys that must be there. Keys that it does not name are of later
    versions.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _unfit(value, at)
        for key, item in value.items():
            inner = shape.get(key, shape.get(...))
            if inner is not None and (
                wrong := shape_error(item, inner, f"{at}.{key}" if at else key)
            ):
                return wrong
        lacking = (key for key in shape.get(None, ()) if key not in value)
        return next((f"{at or 'it'} has no {key}" for key in lacking), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _unfit(value, at)
        items = (shape_error(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value))
        return next(filter(None, items), "")
    if isinstance(shape, tuple):
        found = [shape_error(value, one, at) for one in shape]
        # Of a structure or null, what is wrong inside the structure.
        inside = (wrong for wrong in found if not wrong.startswith(f"{at or 'it'} is "))
        return "" if "" in found else next(inside, found[0])
    if shape is None:
        return "" if value is None else _unfit(value, at)
    kind = type(value)
    if shape is float:
        fits = kind in (float, int) and -1e300 < value < 1e300
    elif shape is int:
        fits = kind is int and -(2**63) <= value < 2**63
    else:
        fits = kind is shape
    return "" if fits else _unfit(value, at)


def _unfit(value: Any, at: str) -> str:
    return f"{at or 'it'} is {str(value)[:40]!r}"
