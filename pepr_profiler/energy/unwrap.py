"""Undoes the wrap of an energy counter, and distinguishes it from a reset.

A counter rises. A reading below the one before it means that the counter passed the end of its
range and began at 0 again (a wrap), or that the driver or the machine set it back (a reset). This
needs no numpy: the daemon, which stays small, undoes wraps by it too.
"""

from __future__ import annotations

from pepr_profiler._core import MAX_PLAUSIBLE_W

_LONGEST_REFRESH_S = 0.05
"""Two reads may be closer together than this and have a whole refresh's energy between them."""


def undo_fall(step_j: float, now_j: float, *, range_j: float, span_s: float) -> tuple[float, bool]:
    """What flowed while a counter fell by -`step_j` to `now_j`, J, and whether it wrapped.

    It wraps at `range_j` (0: never), which must leave a plausible power over `span_s`. Else it was
    reset: then what it has counted since is known, and what flowed before is lost.
    """
    wrapped_j = step_j + range_j
    if range_j > 0 and 0 <= wrapped_j <= MAX_PLAUSIBLE_W * max(span_s, _LONGEST_REFRESH_S):
        return wrapped_j, True
    return (now_j if 0 <= now_j <= MAX_PLAUSIBLE_W * span_s else 0.0), False
