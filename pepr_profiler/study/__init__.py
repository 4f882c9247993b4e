"""Runs compared with each other: scores, rankings, jobs of several recordings, curves."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pepr_profiler.study.study import Study, load, read_bounds

__all__ = ["Study", "load", "read_bounds"]


def __getattr__(name: str) -> object:
    """Imports `study.study` when one of its names is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pepr_profiler.study import study

    return getattr(study, name)
