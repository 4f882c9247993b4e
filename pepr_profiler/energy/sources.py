"""Which channels of a recording are energy: what they are, how sure, and which of them add up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pepr_profiler.record import Record
from pepr_profiler.trace.lane import Channel, LaneInfo


class Source(Record):
    """One energy component before its numbers: what it is, where it lies, how far to trust it.

    `gain` (relative) and `offset_w` are standard uncertainties, fixed per device
    (docs/measurement: SC24 for GPU boards, judgement for RAPL). `lag_s` is how far its readings
    trail the truth.
    """

    id: str
    kind: str
    label: str
    lane: str
    channel: int
    source: str
    counter: bool
    scale: float = 1.0
    modulus: float = 0.0
    period_s: float = 0.0
    in_total: bool = True
    excluded: str = ""
    provenance: str = "measured"
    gain: float = 0.0
    offset_w: float = 0.0
    lag_s: float = 0.0


_IMPLAUSIBLE_W = 20_000.0
"""No package, memory or board draws this: a counter that would have to has been reset."""


def wraps(step_j: float, range_j: float, span_s: float) -> bool:
    """Whether a counter that fell by -`step_j` within `span_s` has wrapped; else it began anew.

    A wrap must leave a plausible power behind.
    """
    return range_j > 0 and 0 <= step_j + range_j <= _IMPLAUSIBLE_W * max(span_s, 0.05)


def fallen_j(step_j: float, now_j: float, range_j: float, span_s: float) -> float:
    """What flowed while a counter fell to `now_j`, J, by a wrap or a reset."""
    if wraps(step_j, range_j, span_s):
        return step_j + range_j
    # What it has counted since, if that can be.
    return now_j if now_j <= _IMPLAUSIBLE_W * span_s else 0.0


_RAPL_GAIN = {"intel": 0.03, "other": 0.075, "dram": 0.15}
_GPU_GAIN, _GPU_OFFSET_W = 0.037, 5.9
_POWER_LAG_S = {"nvml-power-average": 0.5}  # half of its window of 1 s
_PACKAGE = re.compile(r"package-\d+(-die-\d+)?$")


def find_sources(lanes: Iterable[LaneInfo], *, cpu_vendor: str = "") -> list[Source]:
    """The energy sources of a recording; of each device the best one, and what adds up marked.

    RAPL's core and uncore lie inside package, psys contains it, and an mmio zone repeats the MSR's:
    none of them is in the total. A GPU's counter is preferred to its power readings, and a module
    contains its GPU. What two lanes both measure (perf, powercap and amd_energy read the same
    registers) counts once.
    """
    sources: list[Source] = []
    for lane in lanes:
        by_device: dict[str, list[int]] = {}
        for index, channel in enumerate(lane.channels):
            if channel.quantity not in ("energy", "power"):
                continue
            if channel.source in ("powercap", "perf"):
                sources.append(_rapl_source(lane, index, cpu_vendor))
            elif channel.source.startswith("hwmon"):
                sources.append(_hwmon_source(lane, index))
            elif channel.source.startswith("nvml-module"):
                sources.append(_module_source(lane, index))
            elif "uuid" in channel.labels:
                by_device.setdefault(channel.labels["uuid"], []).append(index)
            else:
                sources.append(_plain_source(lane, index))
        sources.extend(_gpu_source(lane, indices) for indices in by_device.values())
    return _without_repeats(sources)


def _make(lane: LaneInfo, index: int, **facts: object) -> Source:
    channel = lane.channels[index]
    return Source(
        lane=lane.name,
        channel=index,
        source=channel.source,
        counter=channel.quantity == "energy",
        scale=channel.scale,
        modulus=channel.modulus,
        period_s=lane.period_ns * 1e-9,
        **facts,  # type: ignore[arg-type]
    )


_PERF_DOMAINS = {
    "energy-pkg": "",
    "energy-ram": "dram",
    "energy-cores": "core",
    "energy-core": "core",
    "energy-gpu": "uncore",
}


def _rapl_source(lane: LaneInfo, index: int, cpu_vendor: str) -> Source:
    """A RAPL domain, named alike whether powercap or perf read it: `package-0/dram`."""
    channel = lane.channels[index]
    labels = channel.labels
    mmio = labels.get("zone", "").startswith("intel-rapl-mmio")
    parent, name = _perf_domain(lane, index) if channel.source == "perf" else _zone_domain(labels)
    path = f"{parent}/{name}" if parent else name
    vendor = "intel" if cpu_vendor == "GenuineIntel" else "other"
    excluded = ""
    kind, gain = "cpu", _RAPL_GAIN[vendor]
    if name == "dram":
        kind, gain = "dram", _RAPL_GAIN["dram"]
    if mmio:
        excluded = f"repeats {path}"
    elif name == "psys":
        kind, excluded = "other", "contains the packages"
    elif name != "dram" and not _PACKAGE.match(name):
        excluded = f"inside {parent}" if parent else "not a package or dram domain"
    return _make(
        lane,
        index,
        id=f"{kind}:{path}" if not mmio else f"{kind}:{path}@{labels['zone']}",
        kind=kind,
        label=path,
        in_total=not excluded,
        excluded=excluded,
        gain=gain,
    )


def _zone_domain(labels: Mapping[str, str]) -> tuple[str, str]:
    return labels.get("parent_name", ""), labels["name"]


def _perf_domain(lane: LaneInfo, index: int) -> tuple[str, str]:
    """Parent and name of a perf event as powercap would call them."""
    labels = lane.channels[index].labels
    if labels["event"] == "energy-psys":
        return "", "psys"
    package = f"package-{labels['package'] or labels['cpu']}"
    dies = {c.labels.get("die") for c in lane.channels if c.labels["package"] == labels["package"]}
    if len(dies) > 1:
        package += f"-die-{labels['die']}"
    domain = _PERF_DOMAINS.get(labels["event"], labels["event"])
    if labels["event"] == "energy-core":  # one a core, told apart by the CPU that it is read on
        domain += labels["cpu"]
    return (package, domain) if domain else ("", package)


_AMD_SOCKET = re.compile(r"Esocket(\d+)$")
_GRACE_SOCKET = re.compile(r"Grace Power Socket (\d+)$")
_JETSON_RAIL = re.compile(r"(?:VDD_)?((?:CPU|GPU|SOC|CV)(?:_(?:CPU|GPU|SOC|CV))*)$")
"""Rails that lie beside each other; VDD_IN and VIN_SYS feed them."""


def _hwmon_source(lane: LaneInfo, index: int) -> Source:
    """What a chip's own labels say it is; supplies and rails contain or repeat other components."""
    labels = lane.channels[index].labels
    chip, label, device = labels["chip"], labels["label"], labels["device"]
    name = f"{chip}@{device} {label or labels['input']}"
    socket = _AMD_SOCKET.match(label) if chip == "amd_energy" else _GRACE_SOCKET.match(label)
    facts: dict[str, Any] = {"id": f"other:{name}", "kind": "other", "label": name}
    if socket:
        facts = {"id": f"cpu:package-{socket[1]}", "kind": "cpu", "label": f"package-{socket[1]}"}
        facts["gain"] = _RAPL_GAIN["other"]
    elif labels.get("part_of") == "processor":  # one with an integrated GPU has one socket
        facts = {"id": "cpu:package-0", "kind": "cpu", "label": "package-0"}
        facts["gain"] = _RAPL_GAIN["other"]
    elif chip == "ina3221" and (rail := _JETSON_RAIL.match(label)):
        kind = next((k for k in ("cpu", "gpu") if k.upper() in rail[1]), "other")
        facts |= {"id": f"{kind}:{label}", "kind": kind, "label": label}
    elif chip == "amdgpu":
        facts = {"id": f"gpu:{device}", "kind": "gpu", "label": f"gpu  AMD {device}"}
        facts |= {"gain": _GPU_GAIN, "offset_w": _GPU_OFFSET_W}
    elif chip == "amd_energy":
        facts["excluded"] = "inside its socket"
    else:
        facts["excluded"] = "a supply or a rail: it may feed other components"
    return _make(lane, index, in_total="excluded" not in facts, **facts)


def _module_source(lane: LaneInfo, index: int) -> Source:
    """A Grace Hopper module: its GPU has a sensor of its own, its CPU one in hwmon."""
    channel = lane.channels[index]
    window = channel.source.removeprefix("nvml-module-")
    name = f"module of gpu:{channel.labels['index']} ({window})"
    ident = f"other:{channel.labels['uuid']}/module-{window}"
    contains = "contains the GPU"
    return _make(lane, index, id=ident, kind="other", label=name, in_total=False, excluded=contains)


def _gpu_source(lane: LaneInfo, indices: Sequence[int]) -> Source:
    """The energy counter; else average power, which sees the whole run; else instant power."""
    order = ["nvml-energy", "nvml-power-average", "nvml-power", "nvml-power-instant"]
    best = min(indices, key=lambda i: order.index(lane.channels[i].source))
    channel = lane.channels[best]
    labels = channel.labels
    power = channel.quantity == "power"
    model = labels["model"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    board = ", MIG: whole board" if labels.get("mig") == "on" else ""
    return _make(
        lane,
        best,
        id=f"gpu:{labels['uuid']}",
        kind="gpu",
        label=f"gpu:{labels['index']}  {model}{board}",
        gain=_GPU_GAIN,
        offset_w=_GPU_OFFSET_W if power else 0.0,
        lag_s=_POWER_LAG_S.get(channel.source, 0.0),
    )


def _plain_source(lane: LaneInfo, index: int) -> Source:
    """A channel that says itself which component it is (replays, drivers without a tree)."""
    channel: Channel = lane.channels[index]
    kind = channel.labels.get("kind", "other")
    ident = channel.labels.get("component", f"{kind}:{channel.name}")
    excluded = channel.labels.get("excluded", "")
    return _make(
        lane,
        index,
        id=ident,
        kind=kind,
        label=channel.labels.get("label", channel.name),
        in_total=not excluded,
        excluded=excluded,
        gain=float(channel.labels.get("gain", 0.0)),
    )


_DIE = re.compile(r"(?<=package-\d)-die-\d+|(?<=package-\d\d)-die-\d+")


def package_of(ident: str) -> str:
    """The id of the package that a die is of; any other id as it is."""
    return _DIE.sub("", ident)


def _without_repeats(sources: list[Source]) -> list[Source]:
    """Makes ids unique: the same component from two lanes is counted once, the first.

    A package and its dies are the same component too (kernels differ in what AMD's counters are);
    the dies of a package add up.
    """
    seen: dict[str, Source] = {}
    packages: dict[str, Source] = {}
    for source in sources:
        first = seen.get(source.id)
        if first is None and source.in_total:
            whole = package_of(source.id)
            other = packages.setdefault(whole, source)
            if (other.id == whole) != (source.id == whole):
                first = other
        if first is None:
            seen[source.id] = source
            continue
        excluded = source.excluded or f"repeats {first.label} of {first.lane}"
        ident = f"{source.id}@{source.lane}.{source.channel}"
        seen[ident] = source._replace(id=ident, in_total=False, excluded=excluded)
    return list(seen.values())


_CROSS_ORDER = ("nvml-power-average", "nvml-power", "nvml-power-instant")


def find_cross_sources(lanes: Iterable[LaneInfo], sources: Iterable[Source]) -> list[Source]:
    """For each GPU whose counter is counted, its power readings as a second source of that id."""
    by_name = {lane.name: lane for lane in lanes}
    found = []
    for source in sources:
        channels = by_name[source.lane].channels
        uuid = channels[source.channel].labels.get("uuid")
        if not (source.counter and source.in_total and uuid):
            continue
        powers = [
            (_CROSS_ORDER.index(channel.source), index)
            for index, channel in enumerate(channels)
            if channel.labels.get("uuid") == uuid and channel.source in _CROSS_ORDER
        ]
        if powers:
            _, index = min(powers)
            name = channels[index].source
            facts = {"kind": source.kind, "label": source.label, "gain": source.gain}
            facts |= {"offset_w": _GPU_OFFSET_W, "lag_s": _POWER_LAG_S.get(name, 0.0)}
            aside = {"in_total": False, "excluded": f"checks {source.source}"}
            found.append(_make(by_name[source.lane], index, id=source.id, **facts, **aside))
    return found
