"""Checks that JSON from a file has the expected keys and types."""

from __future__ import annotations

from pepr_profiler.record import Any

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What may be raised where a file is used that is damaged, or was written by another program."""


def shape_error(value: Any, shape: Any, at: str = "") -> str:  # noqa: PLR0911 - one a kind of shape
    """What of a JSON value does not have this shape, as "energy.total_j is 'x'"; "" if all has.

    A shape is
    - a type (float is any finite number, int one of 64 bits) or None;
    - a tuple of shapes, of which one must fit;
    - `[shape]`, a list of such items;
    - a dict: the shape of the value of each key, with `...` for all other keys, and with None the
      keys that must be there. Other keys may come from later versions and are not looked at.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _mismatch(value, at)
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
            return _mismatch(value, at)
        items = (shape_error(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value))
        return next(filter(None, items), "")
    if isinstance(shape, tuple):
        found = [shape_error(value, one, at) for one in shape]
        # Of a structure or null, what is wrong inside the structure.
        inside = (wrong for wrong in found if not wrong.startswith(f"{at or 'it'} is "))
        return "" if "" in found else next(inside, found[0])
    if shape is None:
        return "" if value is None else _mismatch(value, at)
    kind = type(value)
    if shape is float:
        fits = kind in (float, int) and -1e300 < value < 1e300
    elif shape is int:
        fits = kind is int and -(2**63) <= value < 2**63
    else:
        fits = kind is shape
    return "" if fits else _mismatch(value, at)


def _mismatch(value: Any, at: str) -> str:
    return f"{at or 'it'} is {str(value)[:40]!r}"
