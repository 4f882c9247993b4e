"""What is known of a device's sensors before it is read: files that `sensors --check -o` wrote.

They lie in the package (data/hardware) and in the user's own folder,
`$XDG_CONFIG_HOME/pepr-profiler/hardware` (~/.config without the variable), which comes first. A
recording's own readings outweigh them where they can tell.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pepr_profiler.energy.sources import Source
from pepr_profiler.record import Any, Record
from pepr_profiler.trace.files import read_file
from pepr_profiler.trace.lane import Channel, LaneInfo
from pepr_profiler.trace.shape import MALFORMED, shape_error

KIND, SCHEMA = "pepr-hardware", 1

_FIGURE = ({"value": (float, None), "u": (float, None), None: ("value",)}, None)
_SHAPE = {
    "kind": str,
    "schema": int,
    "sensors": [
        {
            "device": str,
            "source": str,
            "domain": (str, None),
            "via": (str, None),
            "refresh_s": _FIGURE,
            "window_s": _FIGURE,
            "lag_s": _FIGURE,
            "covers": (str, None),
            None: ("device", "source"),
        }
    ],
    None: ("kind", "schema", "sensors"),
}
_RAPL = ("perf", "powercap", "powercap-mmio")

_LONGEST_S = 10.0
"""A longer refresh, window or lag is no sensor's."""

_MOST_BYTES = 4 << 20
"""The size of a file; one of a node with 16 GPUs has 20 kB."""

_NO_LAG_S = 1e-6
"""0 would mean that the lag is unknown."""


SensorName = tuple[str, str, str]
"""The model of a device, the source of its channel, and the domain of RAPL."""


class KnownSensor(Record):
    """The figures of a file for one sensor of one model; None where the file does not say."""

    file: str
    refresh_s: float | None
    window_s: float | None
    lag_s: float | None
    covers: str | None = None
    lag_u_s: float = 0.0


class KnownSensors(Record):
    """The sensors of all files, by `SensorName`; and unusable files with why."""

    by_name: dict[SensorName, KnownSensor]
    problems: tuple[tuple[str, str], ...]

    def counters_of(self, scope: str, lanes: Iterable[LaneInfo]) -> frozenset[str]:
        """UUIDs of the GPUs whose counter is known to cover "gpu" or "module"."""
        if not self.by_name:
            return frozenset()
        return frozenset(
            channel.labels["uuid"]
            for lane in lanes
            for channel in lane.channels
            if channel.source == "nvml-energy" and "uuid" in channel.labels
            and (sensor := self.by_name.get((device_of(channel, ""), channel.source, "")))
            and sensor.covers == scope
        )  # fmt: skip


def folders() -> tuple[Path, Path]:
    """Where files may lie: the user's folder, then the package's."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    with suppress(RuntimeError):  # a user without a home folder
        config = config.expanduser()
    return config / "pepr-profiler/hardware", Path(__file__).parents[1] / "data/hardware"


def device_of(channel: Channel, cpu_name: str) -> str:
    """The model that a channel's sensor is of, as files name it; empty if none is known.

    RAPL is of the CPU that the machine has.
    """
    labels = channel.labels
    if channel.source in _RAPL:
        return cpu_name
    if "model" in labels:
        return labels["model"]
    return " ".join(filter(None, (labels.get("chip", ""), labels.get("label", ""))))


def domain_of(source: Source) -> str:
    """What of a CPU a source of RAPL measures, as files name it: package, dram, psys; else ""."""
    if source.source not in _RAPL:
        return ""
    return re.split(r"[-\d]", source.label.rpartition("/")[2])[0]


def read_hardware(places: Iterable[Path] | None = None) -> KnownSensors:
    """All that the files say. Of two for one sensor the user's counts, then the last by name."""
    found: dict[SensorName, KnownSensor] = {}
    problems = []
    for folder in folders() if places is None else places:
        try:
            paths = sorted(folder.glob("*.json"), reverse=True)
        except OSError as error:
            problems.append((str(folder), error.strerror or str(error)))
            continue
        for path in paths:
            try:
                facts = json.loads(read_file(path, most_bytes=_MOST_BYTES, linked=True))
                if wrong := shape_error(facts, _SHAPE):
                    raise ValueError(wrong)
                if (facts["kind"], facts["schema"]) != (KIND, SCHEMA):
                    raise ValueError(f"it is {facts['kind']} of schema {facts['schema']}")
                for sensor in facts["sensors"]:
                    known = _known(path.name, sensor)
                    if known is not None and sensor["device"]:
                        name = (sensor["device"], sensor["source"], sensor.get("domain") or "")
                        found.setdefault(name, known)
            except (OSError, *MALFORMED) as error:
                problems.append((str(path), str(error)))
    return KnownSensors(found, tuple(problems))


def _known(file: str, sensor: dict[str, Any]) -> KnownSensor | None:
    """What a file says of a sensor, if it says anything that can be.

    What was read through a daemon says how coarsely the daemon shows it, and nothing of the sensor.
    """
    if sensor.get("via"):
        return None

    def number(key: str, least: float) -> float | None:
        value = (sensor.get(key) or {}).get("value")
        return value if value is not None and least <= value <= _LONGEST_S else None

    figures = number("refresh_s", 1e-5), number("window_s", 1e-5), number("lag_s", 0.0)
    covers = sensor.get("covers")
    known = covers is not None or figures != (None, None, None)
    u_s = (sensor.get("lag_s") or {}).get("u") or 0.0  # k = 2
    return KnownSensor(file, *figures, covers, abs(u_s) / 2) if known else None


def with_known(
    sources: Iterable[Source], lanes: Iterable[LaneInfo], known: KnownSensors, *, cpu_name: str
) -> list[Source]:
    """The sources, with what files say of their sensors' refresh, window and lag."""
    if not known.by_name:
        return list(sources)
    by_name = {lane.name: lane for lane in lanes}
    result = []
    for source in sources:
        channel = by_name[source.lane].channels[source.channel]
        name = (device_of(channel, cpu_name), channel.source, domain_of(source))
        sensor = known.by_name.get(name)
        if sensor is not None:
            source = source._replace(  # noqa: PLW2901
                refresh_s=sensor.refresh_s or 0.0,
                window_s=0.0 if source.counter else sensor.window_s or 0.0,
                lag_s=source.lag_s
                if source.counter or sensor.lag_s is None
                else max(sensor.lag_s, _NO_LAG_S),
                lag_u_s=0.0 if source.counter or sensor.lag_s is None else sensor.lag_u_s,
                stated_by=sensor.file,
            )
        result.append(source)
    return result
