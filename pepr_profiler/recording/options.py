"""The options of a recording, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pepr_profiler.errors import UsageError
from pepr_profiler.record import Any, Record
from pepr_profiler.units import (
    check_pue,
    is_utf8,
    parse_cpu_power,
    parse_duration,
    parse_overhead,
    utf8_text,
)

OVERHEAD = 0.005
"""CPU time that all lanes together may take by default, as a share of one core."""

SCOPES = ("job", "device")
"""What a run's total can be: the job's share of its devices, or all that they took."""

JOINS = ("auto", "never", "error")
"""What a block does inside another run: join it, be a run of its own, or refuse to begin."""

_LONGEST_PERIOD_S = 366 * 86_400.0


class Options(Record):
    """What a recording is asked to be. `Options.checked` makes one from what a user gave.

    `period_ns` None: each sensor is read when it is refreshed. `overhead` is the CPU time that
    reading may take, as a share of one core. Lanes are read less often to keep it, except those
    whose period was asked for. `intensity` is the grid's carbon intensity as run.json has it.
    """

    name: str
    experiment: str | None = None
    job: str | None = None
    sensors: tuple[str, ...] = ()
    period_ns: int | None = None
    overhead: float = OVERHEAD
    intensity: Mapping[str, Any] | None = None
    pue: float = 1.0
    cpu_power: str | None = None
    performance: str | None = None
    scope: str = "job"

    @classmethod
    def checked(
        cls,
        *,
        name: str,
        sensors: Sequence[str] = (),
        period: str | float | None = None,
        overhead: str | float = OVERHEAD,
        pue: float = 1.0,
        cpu_power: str | None = None,
        scope: str = "job",
        intensity: Mapping[str, Any] | None = None,
        **texts: str | None,
    ) -> Options:
        """Options from what a user gave on the command line or in code.

        `period` is text such as "10ms", or seconds. `overhead` is text such as "0.5%", or a
        fraction. `texts` are `experiment`, `job` and `performance`. Raises UsageError for what
        cannot be used.
        """
        for what, text in {"name": name, "cpu_power": cpu_power, **texts}.items():
            if not isinstance(text, str) and (text is not None or what == "name"):
                raise UsageError(
                    f"{what}={text!r} cannot be used",
                    why=f"its type is {type(text).__name__}, and text is expected",
                    fix=f'write it in quotes: {what}="{text}"',
                )
        texts = {what: None if text is None else utf8_text(text) for what, text in texts.items()}
        if not name:
            raise UsageError("a run needs a name", why="name is empty", fix='profile("resnet18")')
        if cpu_power is not None:
            parse_cpu_power(cpu_power)
        if not isinstance(scope, str) or scope not in SCOPES:
            raise UsageError(
                f"a scope of {scope!r} is not possible",
                why="it says what the total is",
                fix='scope="job" for the job\'s share, scope="device" for the whole devices',
            )
        return cls(
            name=utf8_text(name),
            sensors=_checked_sensors(sensors),
            period_ns=None if period is None else period_ns(period),
            overhead=parse_overhead(overhead),
            pue=check_pue(pue),
            cpu_power=cpu_power,
            scope=scope,
            intensity=intensity,
            **texts,
        )


def checked_join(join: str) -> str:
    """One of JOINS. Raises UsageError for anything else."""
    if not isinstance(join, str) or join not in JOINS:
        raise UsageError(
            f"join={join!r} is not possible",
            why="it says what a block does inside another run",
            fix='join="auto" to join it, "never" for a run of its own, "error" to refuse',
        )
    return join


def _checked_sensors(sensors: Sequence[str]) -> tuple[str, ...]:
    texts = isinstance(sensors, list | tuple) and all(isinstance(spec, str) for spec in sensors)
    if not (texts and all(spec and is_utf8(utf8_text(spec)) for spec in sensors)):
        raise UsageError(
            f"sensors={sensors!r} cannot be used",
            why="a list of sensors is expected, each as text in UTF-8: KIND or KIND:WHERE",
            fix='for example sensors=["nvml", "powercap"]; see: pepr-profile sensors',
        )
    return tuple(map(utf8_text, sensors))


def period_ns(period: str | float) -> int:
    """A sampling period in ns. Raises UsageError unless it is above 0 and at most a year."""
    if isinstance(period, str):
        period_s = parse_duration(period) * 1e-9
    else:
        try:
            period_s = float(period)
        except (TypeError, ValueError, OverflowError):
            period_s = math.nan
    if not 1e-9 <= period_s <= _LONGEST_PERIOD_S:  # NaN is neither
        raise UsageError(
            f"a period of {period!r} is not possible",
            why="it must be at least 1 ns and at most 366 days",
            fix="give seconds in code, for example period_s=0.01, or --period 10ms",
        )
    return round(period_s * 1e9)
