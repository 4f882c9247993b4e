"""What a recording is asked to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pepr_profiler.record import Record

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from pepr_profiler.energy.carbon import GridIntensity

    _F = TypeVar("_F", bound=Callable[..., Any])

OVERHEAD = 0.005
"""CPU time that all lanes together may take by default, as a share of one core."""

SCOPES = ("job", "device")
"""What a run's total can be: the job's share of its devices, or all that they took."""


class Options(Record):
    """What a recording is asked to be.

    `period_ns` None: each sensor is read when it is refreshed. `overhead` is the CPU time that
    reading may take, as a share of one core; lanes are stretched to keep it, all by one factor,
    except those whose period was asked for.
    """

    name: str
    experiment: str | None = None
    job: str | None = None
    store: Path | None = None
    sensors: tuple[str, ...] = ()
    period_ns: int | None = None
    overhead: float = OVERHEAD
    intensity: GridIntensity | None = None
    pue: float = 1.0
    cpu_power: str | None = None
    performance: str | None = None
    scope: str = "job"
