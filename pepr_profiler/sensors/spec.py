"""What a sensor spec, `kind[:where]`, means: its driver, its lane, how often it is first read."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = ("nvml", "perf", "powercap", "hwmon")

_PERIOD_NS = {"nvml": 10_000_000, "processes": 100_000_000, "nvml-processes": 500_000_000}
_OTHER_PERIOD_NS = 20_000_000
"""How often a lane is read until it knows its sensor's refreshes, and where each read brings news:
RAPL is refreshed each millisecond, which is more than a phase's edge is worth."""


def with_process_lists(specs: Sequence[str]) -> tuple[str, ...]:
    """The specs, and a lane beside each NVML for who uses its GPUs; it may hang without harm."""
    nvml = [spec for spec in specs if kind_of(spec) == "nvml"]
    lists = ["nvml-processes" + spec.removeprefix("nvml") for spec in nvml]
    return (*specs, *(spec for spec in dict.fromkeys(lists) if spec not in specs))


def kind_of(spec: str) -> str:
    """Which driver a spec is for."""
    return spec.partition(":")[0]


def base_period_ns(spec: str) -> int:
    """How often a sensor is read until its refreshes are known."""
    return _PERIOD_NS.get(kind_of(spec), _OTHER_PERIOD_NS)


def lane_names(specs: Sequence[str]) -> list[tuple[str, str]]:
    """A lane is called after its driver; a second one of the same kind gets a number."""
    names: list[tuple[str, str]] = []
    for spec in specs:
        kind = kind_of(spec)
        taken = sum(kind_of(other) == kind for _, other in names)
        names.append((f"{kind}-{taken + 1}" if taken else kind, spec))
    return names
