"""Sensor specs, `kind[:where]`: which driver, where its device is, and the first period."""

from __future__ import annotations

from collections.abc import Iterable

KINDS = ("nvml", "perf", "powercap", "hwmon")
"""The drivers that measure energy."""

# RAPL is refreshed each millisecond, which is finer than the edge of a phase needs.
_BASE_PERIOD_NS = {"nvml": 10_000_000, "processes": 100_000_000, "nvml-processes": 500_000_000}
_OTHER_BASE_PERIOD_NS = 20_000_000


class SensorSpec(str):
    """A sensor as users, recordings and the core write it: "nvml", "powercap:/sys/class/powercap".

    It is that text, so that it can be passed on, compared and stored as it is.
    """

    __slots__ = ()

    @classmethod
    def of(cls, kind: str, where: object = "") -> SensorSpec:
        """The spec of a driver at a place, or at its usual place."""
        return cls(f"{kind}:{where}" if str(where) else kind)

    @property
    def kind(self) -> str:
        """The driver's name."""
        return self.partition(":")[0]

    @property
    def where(self) -> str:
        """A library, a directory, a file or a ProcessRoot; empty for the driver's usual place."""
        return self.partition(":")[2]

    @property
    def base_period_ns(self) -> int:
        """How often the sensor is read until its refreshes are known."""
        return _BASE_PERIOD_NS.get(self.kind, _OTHER_BASE_PERIOD_NS)


class ProcessRoot(str):
    """Whose processes the spec `processes:ROOT` counts as the job; each with its descendants.

    "self" is the process that records, "children" what it starts, but not itself, "pids=12,34"
    are processes that already run, and "cgroup=/sys/fs/cgroup/x" is whatever is in that cgroup.
    """

    __slots__ = ()

    @classmethod
    def of_pids(cls, pids: Iterable[int]) -> ProcessRoot:
        return cls("pids=" + ",".join(map(str, pids)))

    @classmethod
    def of_cgroup(cls, folder: str) -> ProcessRoot:
        return cls(f"cgroup={folder}")

    @property
    def cgroup(self) -> str:
        """The folder of the cgroup; empty for all others."""
        names, _, folder = self.partition("=")
        return folder if names == "cgroup" else ""

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are named; none for all others."""
        names, _, numbers = self.partition("=")
        return tuple(map(int, numbers.split(","))) if names == "pids" else ()


MARK_VARIABLE = "PEPR_RUN_MARK"
"""What a command gets into its environment, and what it starts has too, wherever that hangs."""


def processes_spec(root: str, mark: str | None) -> SensorSpec:
    """The spec of a lane of processes: those of a ProcessRoot, and any whose mark is `mark`."""
    marked = "" if mark is None else f",mark={MARK_VARIABLE}={mark}"
    return SensorSpec.of("processes", f"{root}{marked}")


def with_process_lists(specs: Iterable[str]) -> tuple[SensorSpec, ...]:
    """The specs, and for each NVML one that lists which processes use its GPUs.

    These lists are lanes of their own: if the driver hangs over one, its energy is still read.
    """
    given = [SensorSpec(spec) for spec in specs]
    lists = [SensorSpec.of("nvml-processes", spec.where) for spec in given if spec.kind == "nvml"]
    return (*given, *(spec for spec in dict.fromkeys(lists) if spec not in given))


def lanes_by_name(specs: Iterable[str]) -> dict[str, SensorSpec]:
    """Each spec by the name of its lane: its kind, with a number from the second one on."""
    lanes: dict[str, SensorSpec] = {}
    for spec in map(SensorSpec, specs):
        same = sum(other.kind == spec.kind for other in lanes.values())
        lanes[f"{spec.kind}-{same + 1}" if same else spec.kind] = spec
    return lanes
