"""Which channels of a recording are energy, of which component, and which of them add up."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from pepr_profiler._core import MAX_PLAUSIBLE_W
from pepr_profiler.energy.readings import CounterReadings, GaugeReadings
from pepr_profiler.record import Record
from pepr_profiler.trace.lane import Channel, LaneInfo


class Source(Record):
    """Where the energy of one component was read, and how far to trust it; not the numbers.

    `id` names the component, `lane` and `channel` the readings. `scope` is what it covers, one of
    SCOPES, and `covers` the kinds of components in it. `excluded` says why it is not in the total,
    `repeats` which component it measures again, `mirrors` which source shows the same counter, by
    its label, `checks` which counter it is read beside, as a check of that. `gain` (relative) and
    `offset_w` are standard uncertainties, fixed for a device (docs/measurement: SC24 for GPU
    boards, judgement for RAPL). `lag_s` is how far its readings trail the truth, `lag_u_s` how sure
    a hardware file is of that. `limit_w` is more power than the device can draw, `rated_w` the
    limit that its driver states, 0 if none. `instant` is the channel of a counter's lane that has
    the instant power of what it covers, in the same unit per second; -1: none. `refresh_s` and
    `window_s` are its refresh period and averaging window by the hardware file `stated_by`; 0
    without one. `read_part` is how far into the read of a row this device is asked.
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
    lag_u_s: float = 0.0
    limit_w: float = MAX_PLAUSIBLE_W
    rated_w: float = 0.0
    instant: int = -1
    refresh_s: float = 0.0
    window_s: float = 0.0
    stated_by: str = ""
    scope: str = "device"
    covers: tuple[str, ...] = ()
    repeats: str = ""
    mirrors: str = ""
    checks: str = ""
    read_part: float = 0.5

    def not_counted(self, reason: str) -> Source:
        """The same source, out of the total."""
        return self._replace(in_total=False, excluded=reason)

    def readings(self) -> CounterReadings | GaugeReadings:
        """What its readings have to go through first."""
        if self.counter:
            return CounterReadings(limit_w=self.limit_w, scale=self.scale, modulus=self.modulus)
        return GaugeReadings(limit_w=self.limit_w, scale=self.scale)

    @property
    def range_j(self) -> float:
        """What a counter has counted when it returns to 0, J; 0: it never does."""
        return self.modulus * self.scale

    @property
    def zero_is_unknown(self) -> bool:
        """Whether a reading of 0 is a driver's hiccup (zeus PR 186), not what the device does.

        Some NVIDIA drivers that are read too fast answer 0. Taken as a reset of the counter, all
        that it holds would be added when it reads right again. RAPL's counters do pass through 0.
        """
        return not self.counter or self.source == "nvml-energy"

    def knows(self, raw: Any) -> Any:
        """Whether a raw reading is known, or which of an array of them are."""
        known = abs(raw) < math.inf  # False of NaN
        return known & (raw > 0) if self.zero_is_unknown else known


_RAPL_GAIN = {"intel": 0.03, "other": 0.075, "dram": 0.15}
_GPU_GAIN, _GPU_OFFSET_W = 0.037, 5.9
_AVERAGE_LAG_S, _KEPLER_LAG_S = 0.5, 0.14
_AVERAGED = re.compile(
    r"\b(RTX ([3-9]0[5-9]0|A\d{3,4}|PRO)|A(2|10[GM]?|16|40)|L(2|4|20|40)S?|G?H(20|100|200|800)"
    r"|G?B\d{3}|Ada|Orin|Thor)\b"
)
"""Boards of Ampere (not GA100), Ada and newer: their PowerUsage is an average over 1 s (nvml.h)."""

_KEPLER = re.compile(r"\b(Tesla K\d|Quadro K\d|GRID K\d|GTX [67]\d\d|GTX TITAN)")
"""Their readings approach the power exponentially, with time constants of 40 to 220 ms (SC24)."""

UNITS = {"energy": "J", "power": "W"}
"""The quantities that are energy, and the unit that a channel of one has to be in."""

KINDS = ("gpu", "cpu", "dram", "other")
"""What a component may be; a sensor that calls it anything else measures an `other` one."""

GPU_POWER = ("nvml-power-average", "nvml-power", "nvml-power-instant")
MODULE_POWER = ("nvml-module-average", "nvml-module-instant")
_GPU_SOURCES = ("nvml-energy", *GPU_POWER)
"""What NVML says of a board's energy, best first: the counter; then the average, which sees the
whole run; then the instant."""


SCOPES = ("device", "inside", "rail", "processor", "module", "platform", "node")
"""What a source covers: one device; a part of one; something unknown on a board; a GPU with its CPU
and memory; a processor and what is around it (psys); the whole machine. Of scopes that overlap,
the narrower ones are in the total if together they measure all that the wider one does."""

_SOCKET = ("cpu", "dram")
_COVERS = {"module": ("gpu", *_SOCKET), "platform": _SOCKET, "node": KINDS}

Place = tuple[str, int]
"""A lane and a channel of it."""


def find_sources(
    lanes: Iterable[LaneInfo],
    *,
    cpu_vendor: str = "",
    silent: Set[Place] = frozenset(),
    plain: Set[str] = frozenset(),
    modules: Set[str] = frozenset(),
) -> list[Source]:
    """The energy sources of a recording; of each device the best one, and what adds up marked.

    RAPL's core and uncore lie inside package, psys contains it, and an mmio zone repeats the MSR's:
    none of them is in the total. A GPU's counter is preferred to its power readings, and a module
    contains its GPU. What two lanes both measure (perf, powercap and amd_energy read the same
    registers) counts once. A channel of a driver that is not known here says what it is in its
    labels.

    `silent` channels gave nothing, so that they are preferred to no other one. `plain` are the
    UUIDs of GPUs whose counter is known to be the GPU's own, although they are on a module;
    `modules` of those whose counter is known to be a module's, although nothing else shows one.
    """
    lanes = list(lanes)
    sources: list[Source] = []
    for lane in lanes:
        boards: dict[str, list[int]] = {}
        for index, channel in enumerate(lane.channels):
            if UNITS.get(channel.quantity) != channel.unit:
                continue
            if _is_board(channel):
                boards.setdefault(channel.labels["uuid"], []).append(index)
            else:
                sources.append(_source_of(lane, index, cpu_vendor))
        for uuid, indices in boards.items():
            module = False if uuid in plain else True if uuid in modules else None
            sources += _board_sources(lane, indices, silent, module=module)
    found = _without_repeats(_numbered_processors(sources), silent)
    return _without_overlaps(found, silent)


def find_cross_sources(lanes: Iterable[LaneInfo], sources: Iterable[Source]) -> list[Source]:
    """For each GPU whose counter is counted, its power readings as a second source of that id."""
    by_name = {lane.name: lane for lane in lanes}
    found = []
    for source in sources:
        lane = by_name[source.lane]
        counter = lane.channels[source.channel]
        if not (source.counter and source.in_total and _is_board(counter)):
            continue
        of_scope = MODULE_POWER if source.scope == "module" else GPU_POWER
        powers = [
            index
            for index, channel in enumerate(lane.channels)
            if channel.source in of_scope
            and UNITS.get(channel.quantity) == channel.unit
            and channel.labels.get("uuid") == counter.labels["uuid"]
        ]
        if powers:
            best = min(powers, key=lambda i: of_scope.index(lane.channels[i].source))
            power = _board_source(lane, best, ident=source.id)
            power = power._replace(checks=source.source)
            found.append(power.not_counted(f"checks {source.source}"))
    return found


def _source_of(lane: LaneInfo, index: int, cpu_vendor: str) -> Source:
    """What a driver's labels say that a channel is; if it is none of ours, the channel's own."""
    channel = lane.channels[index]
    labels = channel.labels.keys()
    if channel.source == "powercap" and "name" in labels:
        domain = channel.labels.get("parent_name", ""), channel.labels["name"]
        return _rapl_source(lane, index, domain, cpu_vendor)
    if channel.source == "perf" and labels >= {"event", "package", "cpu"}:
        return _rapl_source(lane, index, _perf_domain(lane, channel), cpu_vendor)
    if channel.source.startswith("hwmon-") and labels >= {"chip", "label", "device", "input"}:
        return _hwmon_source(lane, index)
    if channel.source.startswith("nvml-module-") and labels >= {"uuid", "index"}:
        return _module_source(lane, index)
    return _labelled_source(lane, index)


def _make(
    lane: LaneInfo,
    index: int,
    *,
    kind: str,
    scope: str = "device",
    covers: tuple[str, ...] | None = None,
    excluded: str = "",
    **facts: object,
) -> Source:
    channel = lane.channels[index]
    return Source(
        lane=lane.name,
        channel=index,
        source=channel.source,
        counter=channel.quantity == "energy",
        scale=channel.scale,
        modulus=channel.modulus,
        period_s=lane.period_ns * 1e-9,
        in_total=not excluded,
        excluded=excluded,
        limit_w=_limit_w(channel, kind),
        rated_w=_rated_w(channel),
        kind=kind,
        covers=_COVERS.get(scope, (kind,)) if covers is None else covers,
        scope=scope,
        **facts,  # type: ignore[arg-type]
    )


_MOST_W = {"gpu": 5000.0, "cpu": 3000.0, "dram": 1000.0}
"""More than any such device draws (2026: 1.4 kW a GPU, 2.7 kW a module of several, 0.5 kW a CPU
package); for others it is MAX_PLAUSIBLE_W."""

_OVER_LIMIT, _LEAST_LIMIT_W = 4.0, 400.0
"""What is above this many times a device's stated limit is impossible. Limits are held on average,
RAPL's is the thermal design power, which boosts exceed, and some drivers state one too low. To lose
a true reading is worse than to keep a wrong one of this size: those seen are far larger."""


def _limit_w(channel: Channel, kind: str) -> float:
    """More power than a device can draw: by the limit in its channel's labels, else by its kind."""
    if rated_w := _rated_w(channel):
        return max(_LEAST_LIMIT_W, _OVER_LIMIT * rated_w)
    return _MOST_W.get(kind, MAX_PLAUSIBLE_W)


def _rated_w(channel: Channel) -> float:
    return rated_w_of(channel.labels)


def rated_w_of(labels: Mapping[str, str]) -> float:
    """The limit that the driver states in a channel's labels, W; 0 if there is none."""
    try:
        rated_w = float(labels.get("limit_w", 0.0))
    except ValueError:
        return 0.0
    return rated_w if 0 < rated_w <= MAX_PLAUSIBLE_W else 0.0


def _labelled_source(lane: LaneInfo, index: int) -> Source:
    """A channel that says itself which component it is (CONTRIBUTING, Add a sensor)."""
    channel = lane.channels[index]
    kind = channel.labels.get("kind", "other")
    kind = kind if kind in KINDS else "other"
    return _make(
        lane,
        index,
        id=channel.labels.get("component", f"{kind}:{channel.name}"),
        kind=kind,
        label=channel.labels.get("label", channel.name),
        excluded=channel.labels.get("excluded", ""),
        gain=stated_gain(channel) or 0.0,
        scope=scope if (scope := channel.labels.get("scope", "")) in SCOPES else "device",
    )


def stated_gain(channel: Channel) -> float | None:
    """The `gain` of a channel's labels; 0 without one, None if it is no number from 0 to 100."""
    try:
        gain = float(channel.labels.get("gain", 0.0))
    except ValueError:
        return None
    return gain if 0 <= gain <= 100 else None


# --- RAPL, whether powercap or perf reads it ------------------------------------------------------

_PACKAGE = re.compile(r"package-\d+(-die-\d+)?$")

_PERF_DOMAINS = {
    "energy-pkg": "",
    "energy-ram": "dram",
    "energy-cores": "core",
    "energy-core": "core",
    "energy-gpu": "uncore",
}


def _rapl_source(lane: LaneInfo, index: int, domain: tuple[str, str], cpu_vendor: str) -> Source:
    """A RAPL domain, (parent, name), named alike whoever read it: `package-0/dram`."""
    parent, name = domain
    path = f"{parent}/{name}" if parent else name
    zone = lane.channels[index].labels.get("zone", "")
    vendor = "intel" if cpu_vendor == "GenuineIntel" else "other"
    kind, gain, excluded, scope = "cpu", _RAPL_GAIN[vendor], "", "device"
    if name == "dram":
        kind, gain = "dram", _RAPL_GAIN["dram"]
    elif name == "psys":
        kind, scope = "other", "platform"
    elif not _PACKAGE.match(name):
        scope = "inside"
        excluded = f"inside {parent}" if parent else "not a package or dram domain"
    source = _make(
        lane,
        index,
        id=f"{kind}:{path}",
        kind=kind,
        label=path,
        excluded=excluded,
        gain=gain,
        scope=scope,
    )
    if not zone.startswith("intel-rapl-mmio"):
        return source
    repeats = source.id if source.in_total else ""
    twin = source._replace(id=f"{source.id}@{zone}", source="powercap-mmio", repeats=repeats)
    return twin.not_counted(f"repeats {path}")


def _perf_domain(lane: LaneInfo, channel: Channel) -> tuple[str, str]:
    """Parent and name of a perf event as powercap would call them."""
    labels = channel.labels
    event, number = labels["event"], labels["package"]
    if event == "energy-psys":
        return "", "psys"
    package = f"package-{number or labels['cpu']}"
    dies = {c.labels.get("die") for c in lane.channels if c.labels.get("package") == number}
    if len(dies) > 1:
        package += f"-die-{labels.get('die')}"
    domain = _PERF_DOMAINS.get(event, event)
    if event == "energy-core":  # one a core, named after the CPU that it is read on
        domain += labels["cpu"]
    return (package, domain) if domain else ("", package)


# --- chips of hwmon -------------------------------------------------------------------------------

_AMD_SOCKET = re.compile(r"Esocket(\d+)$")
_GRACE_METER = re.compile(r"(Grace|CPU|SysIO|Module) Power Socket (\d+)$")
"""Meters of NVIDIA's Grace (its performance tuning guide, Power and Thermals): a socket with its
memory and regulators; the rails of its CPU and of the rest of the chip, which lie in it; a Grace
Hopper module with all of that and its GPU."""
_JETSON_RAIL = re.compile(r"(?:VDD_)?((?:CPU|GPU|SOC|CV)(?:_(?:CPU|GPU|SOC|CV))*)$")
"""Rails that lie beside each other; VDD_IN and VIN_SYS feed them."""


def _hwmon_source(lane: LaneInfo, index: int) -> Source:
    """What a chip's own labels say it is; supplies and rails contain or repeat other components."""
    labels = lane.channels[index].labels
    chip, label, device = labels["chip"], labels["label"], labels["device"]
    name = f"{chip}@{device} {label or labels['input']}"
    socket = _AMD_SOCKET.match(label) if chip == "amd_energy" else None
    facts: dict[str, Any] = {"id": f"other:{name}", "kind": "other", "label": name}
    if grace := _GRACE_METER.match(label):
        facts |= _grace_facts(*grace.groups())
    elif socket:
        facts = {"id": f"cpu:package-{socket[1]}", "kind": "cpu", "label": f"package-{socket[1]}"}
        facts["gain"] = _RAPL_GAIN["other"]
    elif labels.get("part_of") == "processor":  # one with an integrated GPU has one socket
        facts = {"id": f"cpu:{device}", "kind": "cpu", "label": "package-0", "scope": "processor"}
        facts["gain"] = _RAPL_GAIN["other"]
    elif chip == "ina3221" and (rail := _JETSON_RAIL.match(label)):
        kind = next((k for k in ("cpu", "gpu") if k.upper() in rail[1]), "other")
        facts |= {"id": f"{kind}:{label}", "kind": kind, "label": label}
    elif chip == "amdgpu":
        facts = {"id": f"gpu:{device}", "kind": "gpu", "label": f"gpu  AMD {device}"}
        facts |= {"gain": _GPU_GAIN, "offset_w": _GPU_OFFSET_W}
    elif chip in ("xe", "i915"):
        facts = _intel_gpu(lane, index)
    elif chip.startswith("i915_gt"):
        facts["excluded"] = "a tile inside its GPU"
    elif chip == "amd_energy":
        facts |= {"excluded": "inside its socket", "scope": "inside"}
    else:
        facts["scope"] = "rail"
        facts["excluded"] = "a supply or a rail: it may feed other components"
    return _make(lane, index, **facts)


def _intel_gpu(lane: LaneInfo, index: int) -> dict[str, Any]:
    """An Intel GPU: xe may have a counter of the card and one of the chip on it ("pkg")."""
    channel = lane.channels[index]
    labels = channel.labels
    device = labels["device"]
    facts: dict[str, Any] = {
        "id": f"gpu:{device}",
        "kind": "gpu",
        "label": f"gpu  Intel {device}",
        "gain": _GPU_GAIN,
        "offset_w": _GPU_OFFSET_W if channel.quantity == "power" else 0.0,
    }
    if labels["label"] != "pkg":
        return facts
    siblings = [other.labels for other in lane.channels if other.quantity == channel.quantity]
    if any(s.get("device") == device and s.get("label") == "card" for s in siblings):
        return facts | {
            "id": f"other:{labels['chip']}@{device} pkg",
            "kind": "other",
            "label": f"pkg of gpu {device}",
            "excluded": "inside its card",
        }
    return facts | {"label": f"gpu  Intel {device}, without its board"}


def _grace_facts(of: str, socket: str) -> dict[str, Any]:
    if of == "Module":
        return {"scope": "module"}
    part = "" if of == "Grace" else f"/{of.lower()}"
    covers: dict[str, tuple[str, ...]] = {"Grace": _SOCKET, "CPU": ("cpu",), "SysIO": ()}
    label = f"package-{socket}{part}"
    gain = _RAPL_GAIN["other"]
    return {"id": f"cpu:{label}", "kind": "cpu", "label": label, "covers": covers[of], "gain": gain}


def _numbered_processors(sources: Iterable[Source]) -> list[Source]:
    """Gives processors with a GPU inside their sockets' numbers, in the order of the PCI bus.

    A desktop has one; a board of AMD's MI300A has four. RAPL's packages repeat them.
    """
    sources = list(sources)
    devices = sorted({source.id for source in sources if source.scope == "processor"})
    numbers = {ident: f"package-{n}" for n, ident in enumerate(devices)}
    return [
        source
        if source.scope != "processor"
        else source._replace(
            id=f"cpu:{numbers[source.id]}", label=numbers[source.id], scope="device"
        )
        for source in sources
    ]


# --- boards of NVIDIA -----------------------------------------------------------------------------


def _is_board(channel: Channel) -> bool:
    """Whether NVML read a board's energy or power there."""
    return channel.source in _GPU_SOURCES and channel.labels.keys() >= {"uuid", "index", "model"}


def _board_sources(
    lane: LaneInfo, indices: Iterable[int], silent: Set[Place], *, module: bool | None
) -> list[Source]:
    """The best of a board's channels; of a GPU on a module also the counter, which is the module's.

    On a Grace Hopper, NVML's energy counter covers the CPU and its memory too (zeus 172). Whether a
    board is a module shows in that its module's power can be read: a DGX Spark, which is none, has
    the scope of the GPU only (zeus 242). `module` says it where that is known otherwise.
    """
    order = sorted(indices, key=lambda i: _GPU_SOURCES.index(lane.channels[i].source))
    answering = [i for i in order if (lane.name, i) not in silent] or order
    uuid = lane.channels[order[0]].labels["uuid"]
    if module is None:
        module = any(
            channel.source in MODULE_POWER and channel.labels.get("uuid") == uuid
            for channel in lane.channels
        )
    if not module or not lane.channels[order[0]].counter:
        return [_board_source(lane, answering[0])]
    counter = _board_source(lane, order[0], scope="module")
    powers = [i for i in answering if not lane.channels[i].counter]
    if not powers:
        return [counter]
    counter = counter._replace(id=f"other:{uuid}/module", kind="other")
    return [_board_source(lane, powers[0]), counter._replace(label=f"module of {counter.label}")]


def _board_source(lane: LaneInfo, index: int, *, ident: str = "", **facts: Any) -> Source:
    """One of a board's channels."""
    channel = lane.channels[index]
    labels = channel.labels
    model = labels["model"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    divided = ", MIG: whole board" if labels.get("mig") == "on" else ""
    return _make(
        lane,
        index,
        id=ident or f"gpu:{labels['uuid']}",
        kind="gpu",
        label=f"gpu:{labels['index']}  {model}{divided}",
        gain=_GPU_GAIN,
        offset_w=_GPU_OFFSET_W if channel.quantity == "power" else 0.0,
        lag_s=_lag_s(channel.source, model),
        read_part=_read_part(lane, labels["uuid"]),
        instant=_instant_power(lane, labels["uuid"], facts.get("scope", ""))
        if channel.quantity == "energy"
        else -1,
        **facts,
    )


def _read_part(lane: LaneInfo, uuid: str) -> float:
    """The middle of the part of a row in which a board is asked: one after the other, all alike."""
    boards = list(dict.fromkeys(c.labels["uuid"] for c in lane.channels if "uuid" in c.labels))
    return (boards.index(uuid) + 0.5) / len(boards)


def _lag_s(source: str, model: str) -> float:
    """How far a board's readings trail, if that is known from what it is; 0: it is learnt."""
    averages = source in ("nvml-power-average", "nvml-module-average")
    if averages or (source == "nvml-power" and _AVERAGED.search(model)):
        return _AVERAGE_LAG_S
    return _KEPLER_LAG_S if source == "nvml-power" and _KEPLER.search(model) else 0.0


def _instant_power(lane: LaneInfo, uuid: str, scope: str) -> int:
    """The channel of the instant power of a board, or of the module that it is on; -1: none."""
    wanted = "nvml-module-instant" if scope == "module" else "nvml-power-instant"
    for index, channel in enumerate(lane.channels):
        if channel.source == wanted and channel.labels.get("uuid") == uuid:
            return index
    return -1


def _module_source(lane: LaneInfo, index: int) -> Source:
    """The power of a Grace Hopper module."""
    channel = lane.channels[index]
    window = channel.source.removeprefix("nvml-module-")
    return _make(
        lane,
        index,
        id=f"other:{channel.labels['uuid']}/module-{window}",
        kind="other",
        label=f"module of gpu:{channel.labels['index']} ({window})",
        excluded="contains the GPU",
        scope="module",
        gain=_GPU_GAIN,
        offset_w=_GPU_OFFSET_W,
        lag_s=_lag_s(channel.source, ""),
    )


# --- what is measured twice -----------------------------------------------------------------------

_DIE = re.compile(r"(?<=package-\d)-die-\d+|(?<=package-\d\d)-die-\d+")


def package_of(ident: str) -> str:
    """The id of the package that a die is of; any other id as it is."""
    return _DIE.sub("", ident)


def _without_repeats(sources: list[Source], silent: Set[Place]) -> list[Source]:
    """Makes ids unique: of a component that two lanes measure, the first source is counted.

    One that gave something comes before one that is silent, and RAPL's mmio zones only in the place
    of those. A package and its dies are the same
    component too (kernels differ in what AMD's counters are of); the dies of a package add up.
    """
    dead = {source.id for source in sources if source.in_total and _place(source) in silent}
    dead -= {source.id for source in sources if source.in_total and _place(source) not in silent}
    sources = [
        source._replace(id=source.repeats, repeats="", in_total=True, excluded="")
        if source.repeats in dead and _place(source) not in silent
        else source
        for source in sources
    ]
    seen: dict[str, Source] = {}
    packages: dict[str, Source] = {}
    for source in sorted(sources, key=lambda source: _place(source) in silent):
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
        repeats = first.id if source.id == first.id and not source.excluded else source.repeats
        seen[ident] = source._replace(id=ident, repeats=repeats).not_counted(excluded)
    places = {_place(source): n for n, source in enumerate(sources)}
    return sorted(seen.values(), key=lambda source: places[_place(source)])


def _place(source: Source) -> Place:
    return source.lane, source.channel


def _without_overlaps(sources: list[Source], silent: Set[Place]) -> list[Source]:
    """Of sources that overlap, counts the narrower ones if they add up to the wider one, else that.

    A module is its GPU and its CPU with the memory; what psys covers beside the packages depends on
    the machine, and a node is all that is in it.
    """
    overlap = _Overlap(sources, silent)
    overlap.settle_rails()
    overlap.settle_nvml_modules()
    overlap.settle_wider()
    return list(overlap.found.values())


class _Overlap:
    """Sources by place, while those that overlap others are taken out of the total."""

    def __init__(self, sources: Iterable[Source], silent: Set[Place]) -> None:
        self.found = {_place(source): source for source in sources}
        self._silent = silent

    def settle_rails(self) -> None:
        """The rails of a socket whose own meter is counted."""
        cpus = self._counted("cpu")
        sockets = {source.label for source in cpus if source.covers == _SOCKET}
        self._leave_out(
            (s for s in cpus if "/" in s.label and s.label.partition("/")[0] in sockets),
            "inside its socket",
        )

    def settle_nvml_modules(self) -> None:
        """Modules that NVML measures, with the power of their GPU beside it or without."""
        cpu_is_known = any(source.scope == "device" for source in self._counted("cpu"))
        modules = [s for s in self._of_scope("module") if s.source.startswith("nvml")]
        for module in modules:
            gpu_id = "gpu:" + module.id.removeprefix("other:").partition("/")[0]
            gpu = next((source for source in self.found.values() if source.id == gpu_id), None)
            if gpu is None:
                continue  # nothing measures the GPU alone
            if cpu_is_known or not self._answers(module):
                self._leave_out([module], "contains the GPU and its CPU")
                continue
            self._leave_out([gpu._replace(id=f"{gpu_id}/gpu")], "inside its module")
            label = f"{gpu.label}, whole module"
            self.found[_place(module)] = module._replace(id=gpu_id, kind="gpu", label=label)
        still = [module for module in self._of_scope("module") if self._answers(module)]
        if any(module.source.startswith("nvml") for module in still):
            self._leave_out(self._counted("cpu", "dram"), "inside the module")

    def settle_wider(self) -> None:
        """Modules, platforms and nodes that others measure."""
        for scope, contains, excluded in (
            ("module", ("gpu",), "contains the GPU and its CPU"),
            ("platform", ("cpu", "gpu"), "contains the packages"),
            ("node", (), "contains what else is measured"),
        ):
            wider = [s for s in self._of_scope(scope) if not s.source.startswith("nvml")]
            parts = [s for s in self._counted() if s not in wider]
            known = [s for s in parts if not contains or s.kind in contains or s.scope != "device"]
            for source in wider:
                if known or not self._answers(source):
                    self._leave_out([source], excluded)
                else:
                    self._leave_out(parts, f"inside the {scope}")
                    kind = "cpu" if scope == "platform" else source.kind
                    self.found[_place(source)] = source._replace(kind=kind)

    # --- parts ---

    def _answers(self, source: Source) -> bool:
        return _place(source) not in self._silent

    def _of_scope(self, scope: str) -> list[Source]:
        return [s for s in self.found.values() if s.scope == scope and s.in_total]

    def _counted(self, *kinds: str) -> list[Source]:
        """What is in the total and has been measured; of these kinds, if any are given."""
        return [
            source
            for source in self.found.values()
            if source.in_total and self._answers(source) and (not kinds or source.kind in kinds)
        ]

    def _leave_out(self, sources: Iterable[Source], reason: str) -> None:
        for source in list(sources):
            self.found[_place(source)] = source.not_counted(reason)
