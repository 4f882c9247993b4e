"""What a training run cost in energy, time, memory and carbon, and whether it was worth it.

from pepr_profiler import profile

with profile("resnet18", experiment="baseline") as run:
    with run.phase("train"):
        train()
    run.log(accuracy=0.91, epoch=3)
print(run.summary["energy"]["total_j"])
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own, which type checkers know by name, costs 10 ms to import
if TYPE_CHECKING:
    from typing import Any

    from pepr_profiler.block import Run, profile
    from pepr_profiler.errors import (
        PeprError,
        PeprWarning,
        SensorError,
        TargetError,
        TraceError,
        UsageError,
    )
    from pepr_profiler.study.pepr import pareto_front, score
    from pepr_profiler.study.study import Study, load

__version__ = "0.1.0"

__all__ = [
    "PeprError",
    "PeprWarning",
    "Run",
    "SensorError",
    "Study",
    "TargetError",
    "TraceError",
    "UsageError",
    "load",
    "pareto_front",
    "profile",
    "score",
]

# The module that each name is imported from when it is first used. pepr_profiler.pepr is an older
# name of study.pepr.
_HOMES = {
    "PeprError": "errors",
    "PeprWarning": "errors",
    "SensorError": "errors",
    "TargetError": "errors",
    "TraceError": "errors",
    "UsageError": "errors",
    "Run": "block",
    "Study": "study.study",
    "load": "study.study",
    "profile": "block",
    "pareto_front": "study.pepr",
    "score": "study.pepr",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, so that `import pepr_profiler` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pepr_profiler' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"pepr_profiler.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
