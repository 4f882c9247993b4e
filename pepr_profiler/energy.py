"""Energy from recorded numbers: unwrapped counters, integrated power, and how sure they are.

One pass over a lane gives the cumulative energy of each of its sources at the instants that are
asked for; memory does not grow with the length of the recording.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.trace import Batch, Channel, Lane

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NS_PER_S = 1e9

_IMPLAUSIBLE_W = 20_000.0
"""No package, memory or board draws this: a counter that would have to has been reset."""

_LEARN_CHANGES = 8
"""Changes of a counter that are seen before its refresh period is estimated."""

_LAST_CHANGES = 3
"""Changes of a counter whose mean power goes on behind the last of them."""


@dataclass(frozen=True)
class Source:
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


@dataclass(frozen=True)
class Curve:
    """Cumulative energy of one source: `energy_j` float64 (n,) at the instants asked for.

    Only differences mean anything. Outside [first_ns, last_ns] nothing was recorded.
    """

    source: Source
    energy_j: NDArray[np.float64]
    first_ns: int
    last_ns: int
    refresh_s: float = 0.0
    wraps: int = 0
    resets: int = 0
    unknown: int = 0
    longest_gap_s: float = 0.0
    longest_stall_s: float = 0.0


# --- which channels are energy, and which of them add up -----------------------------------------

_RAPL_GAIN = {"intel": 0.03, "other": 0.075, "dram": 0.15}
_GPU_GAIN, _GPU_OFFSET_W = 0.037, 5.9
_POWER_LAG_S = {"nvml-power-average": 0.5}  # half of its window of 1 s
_PACKAGE = re.compile(r"package-\d+(-die-\d+)?$")


def find_sources(lanes: Iterable[Lane], *, cpu_vendor: str = "") -> list[Source]:
    """The energy sources of a recording; of each device the best one, and what adds up marked.

    RAPL's core and uncore lie inside package, psys contains it, and an mmio zone repeats the MSR's:
    none of them is in the total. A GPU's counter is preferred to its power readings. What two lanes
    both measure (perf and powercap read the same registers) counts once.
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
            elif "uuid" in channel.labels:
                by_device.setdefault(channel.labels["uuid"], []).append(index)
            else:
                sources.append(_plain_source(lane, index))
        sources.extend(_gpu_source(lane, indices) for indices in by_device.values())
    return _without_repeats(sources)


def _make(lane: Lane, index: int, **facts: object) -> Source:
    channel = lane.channels[index]
    return Source(
        lane=lane.name,
        channel=index,
        source=channel.source,
        counter=channel.quantity == "energy",
        scale=channel.scale,
        modulus=channel.modulus,
        period_s=lane.period_ns / _NS_PER_S,
        **facts,  # type: ignore[arg-type]
    )


_PERF_DOMAINS = {
    "energy-pkg": "",
    "energy-ram": "dram",
    "energy-cores": "core",
    "energy-core": "core",
    "energy-gpu": "uncore",
}


def _rapl_source(lane: Lane, index: int, cpu_vendor: str) -> Source:
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


def _perf_domain(lane: Lane, index: int) -> tuple[str, str]:
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


def _hwmon_source(lane: Lane, index: int) -> Source:
    """What a chip's own labels say it is; supplies and rails contain or repeat other components."""
    labels = lane.channels[index].labels
    chip, label, device = labels["chip"], labels["label"], labels["device"]
    name = f"{chip}@{device} {label or labels['input']}"
    socket = _AMD_SOCKET.match(label) if chip == "amd_energy" else _GRACE_SOCKET.match(label)
    facts: dict[str, Any] = {"id": f"other:{name}", "kind": "other", "label": name}
    if socket:
        facts = {"id": f"cpu:package-{socket[1]}", "kind": "cpu", "label": f"package-{socket[1]}"}
        facts["gain"] = _RAPL_GAIN["other"]
    elif chip == "amdgpu":
        facts = {"id": f"gpu:{device}", "kind": "gpu", "label": f"gpu  AMD {device}"}
        facts |= {"gain": _GPU_GAIN, "offset_w": _GPU_OFFSET_W}
    elif chip == "amd_energy":
        facts["excluded"] = "inside its socket"
    else:
        facts["excluded"] = "a supply or a rail: other components may be in it"
    return _make(lane, index, in_total="excluded" not in facts, **facts)


def _gpu_source(lane: Lane, indices: Sequence[int]) -> Source:
    """The energy counter; else average power, which sees the whole run; else instant power."""
    order = ["nvml-energy", "nvml-power-average", "nvml-power", "nvml-power-instant"]
    best = min(indices, key=lambda i: order.index(lane.channels[i].source))
    channel = lane.channels[best]
    labels = channel.labels
    power = channel.quantity == "power"
    model = labels["model"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    return _make(
        lane,
        best,
        id=f"gpu:{labels['uuid']}",
        kind="gpu",
        label=f"gpu:{labels['index']}  {model}",
        gain=_GPU_GAIN,
        offset_w=_GPU_OFFSET_W if power else 0.0,
        lag_s=_POWER_LAG_S.get(channel.source, 0.0),
    )


def _plain_source(lane: Lane, index: int) -> Source:
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


def _without_repeats(sources: list[Source]) -> list[Source]:
    """Makes ids unique: the same component from two lanes is counted once, the first."""
    seen: dict[str, Source] = {}
    for source in sources:
        first = seen.setdefault(source.id, source)
        if first is not source:
            ident = f"{source.id}@{source.lane}.{source.channel}"
            facts = {**vars(source), "id": ident, "in_total": False}
            facts["excluded"] = source.excluded or f"repeats {first.label} of {first.lane}"
            seen[ident] = Source(**facts)
    return list(seen.values())


# --- integration ---------------------------------------------------------------------------------


def integrate(
    batches: Iterable[Batch], sources: Sequence[Source], at_ns: NDArray[np.int64]
) -> list[Curve]:
    """The cumulative energy of each source (all of one lane) at `at_ns` (sorted), in one pass."""
    accumulators = [(_Counter if source.counter else _Power)(source, at_ns) for source in sources]
    for batch in batches:
        # A value belongs to the middle of its read.
        t_s_from = batch.t_ns + batch.read_ns // 2
        for accumulator in accumulators:
            accumulator.feed(t_s_from, batch.values[accumulator.source.channel])
    return [accumulator.finish() for accumulator in accumulators]


@dataclass
class _Accumulator:
    """Turns a stream of (time, value) into cumulative energy at the instants asked for."""

    source: Source
    at_ns: NDArray[np.int64]
    energy_j: NDArray[np.float64] = field(init=False)
    first_ns: int = -1
    last_ns: int = -1
    unknown: int = 0
    longest_gap_s: float = 0.0
    total_j: float = 0.0
    knot_ns: float = 0.0  # the last point of the piecewise linear curve
    last_w: float = math.nan  # power of the last piece
    _filled: int = 0

    def __post_init__(self) -> None:
        self.energy_j = np.zeros(len(self.at_ns))

    def valid(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.isfinite(values)

    def feed(self, t_ns: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        good = self.valid(values)
        self.unknown += int(len(good) - np.count_nonzero(good))
        t = t_ns[good].astype(np.float64)
        if not len(t):
            return
        before = self.last_ns if self.last_ns >= 0 else int(t[0])
        self.longest_gap_s = max(
            self.longest_gap_s, float(np.max(np.diff(t, prepend=before))) / _NS_PER_S
        )
        if self.first_ns < 0:
            self.first_ns = int(t[0])
        self.last_ns = int(t[-1])
        self.add(t, values[good] * self.source.scale)

    def add(self, t: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        raise NotImplementedError

    def emit(self, t: NDArray[np.float64], energy_j: NDArray[np.float64]) -> None:
        """Appends knots to the curve and fills in the instants that they cover."""
        end = int(np.searchsorted(self.at_ns, t[-1], side="right"))
        if end > self._filled:
            at = self.at_ns[self._filled : end].astype(np.float64)
            self.energy_j[self._filled : end] = np.interp(
                at, np.concatenate(([self.knot_ns], t)), np.concatenate(([self.total_j], energy_j))
            )
            early = at < self.knot_ns
            if early.any():  # only before the very first knot
                self.energy_j[self._filled : end][early] = self.before_first(at[early])
            self._filled = end
        self.knot_ns, self.total_j = float(t[-1]), float(energy_j[-1])

    def before_first(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(len(at), self.total_j)

    def extend(self, limit_s: float) -> None:
        """Goes on at the last power for up to `limit_s`, then stands still."""
        rest = self.at_ns[self._filled :].astype(np.float64)
        beyond_s = np.minimum((rest - self.knot_ns) / _NS_PER_S, limit_s)
        self.energy_j[self._filled :] = self.total_j + self.last_w * np.maximum(beyond_s, 0.0)

    def finish(self) -> Curve:
        raise NotImplementedError

    def curve(self, **facts: float) -> Curve:
        if self.first_ns < 0:
            self.energy_j[:] = np.nan
        return Curve(
            self.source,
            self.energy_j,
            self.first_ns,
            self.last_ns,
            unknown=self.unknown,
            longest_gap_s=self.longest_gap_s,
            **facts,  # type: ignore[arg-type]
        )


@dataclass
class _Counter(_Accumulator):
    """A counter stands still between its refreshes, so the line goes through its changes only.

    The first value was reached up to one refresh period before it was first read, and what flowed
    after the last change is not in the counter yet: both ends are extended by up to one period, so
    that an edge is off by a random part of a refresh and not always the same way.
    """

    wraps: int = 0
    resets: int = 0
    refresh_s: float = 0.0
    longest_stall_s: float = 0.0
    _last: float = math.nan  # the counter at its last change
    _early: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list)
    _changes: int = 0
    _started: bool = False

    def valid(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        known = np.isfinite(values)
        # Polled too fast, some NVIDIA drivers answer 0 (zeus PR 186). Taken as a reset, all that
        # the counter holds would be added when it reads right again. RAPL does pass through 0.
        return known & (values != 0) if self.source.source == "nvml-energy" else known

    def add(self, t: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        before = self._last
        changed = np.diff(values, prepend=before if not math.isnan(before) else values[0]) != 0
        if math.isnan(before):
            changed[0] = True  # the first value begins the curve
        t, values = t[changed], values[changed]
        if not len(t):
            return
        self._last = float(values[-1])
        if self._started:
            self._unwrap(t, values, before)
            return
        self._early.append((t, values))
        self._changes += len(t)
        if self._changes > _LEARN_CHANGES:
            self._start()

    def _start(self) -> None:
        t = np.concatenate([times for times, _ in self._early])
        values = np.concatenate([numbers for _, numbers in self._early])
        self._early.clear()
        self._started = True
        changes_s = np.diff(t[1:]) / _NS_PER_S  # the first value is no change
        begin = t[0]
        if len(changes_s):
            self.refresh_s = float(np.median(changes_s))
            begin = min(t[0], t[1] - self.refresh_s * _NS_PER_S)
        elif len(t) > 1:
            self.refresh_s = float(t[1] - t[0]) / _NS_PER_S
        self.knot_ns = float(begin)
        if len(t) > 1:
            self._unwrap(t[1:], values[1:], float(values[0]))
        else:
            self._fill_constant()

    def _fill_constant(self) -> None:
        self._filled = int(np.searchsorted(self.at_ns, self.knot_ns, side="right"))

    def _unwrap(self, t: NDArray[np.float64], values: NDArray[np.float64], before: float) -> None:
        step_j = np.diff(values, prepend=before)
        span_s = np.maximum(np.diff(t, prepend=self.knot_ns) / _NS_PER_S, 1e-9)
        range_j = self.source.modulus * self.source.scale
        for i in np.flatnonzero(step_j < 0):
            unwrapped_j = step_j[i] + range_j
            # A wrap must leave a plausible power behind; else the counter began anew.
            if range_j > 0 and 0 <= unwrapped_j <= _IMPLAUSIBLE_W * max(span_s[i], 0.05):
                step_j[i] = unwrapped_j
                self.wraps += 1
            else:
                since_j = values[i]  # what it has counted since, if that can be
                step_j[i] = since_j if since_j <= _IMPLAUSIBLE_W * span_s[i] else 0.0
                self.resets += 1
        self.longest_stall_s = max(self.longest_stall_s, float(np.max(span_s)))
        # Of a few changes: one alone may have been noticed late and the next one early.
        self.last_w = float(step_j[-_LAST_CHANGES:].sum() / span_s[-_LAST_CHANGES:].sum())
        self.emit(t, self.total_j + np.cumsum(step_j))

    def finish(self) -> Curve:
        if not self._started and self._early:
            self._start()
        self.longest_stall_s = max(self.longest_stall_s, (self.last_ns - self.knot_ns) / _NS_PER_S)
        self.extend(min(self.refresh_s, max(0.0, (self.last_ns - self.knot_ns) / _NS_PER_S)))
        if math.isnan(self.last_w):  # it never moved: how much flowed is unknown, not 0
            self.energy_j[:] = math.nan
        return self.curve(
            wraps=self.wraps,
            resets=self.resets,
            refresh_s=self.refresh_s,
            longest_stall_s=self.longest_stall_s,
        )


@dataclass
class _Power(_Accumulator):
    """Power readings, joined by straight lines and held at the ends; shifted back by their lag.

    A reading of 0 or less is a driver's hiccup (zeus PR 186), not a powered device at rest.
    """

    _watts: float = math.nan
    _first_w: float = math.nan

    def valid(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.isfinite(values) & (values > 0)

    def add(self, t: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        t = t - self.source.lag_s * _NS_PER_S
        if math.isnan(self._watts):
            self.knot_ns, self._watts, self._first_w = (
                float(t[0]),
                float(values[0]),
                float(values[0]),
            )
        span_s = np.diff(t, prepend=self.knot_ns) / _NS_PER_S
        earlier = np.concatenate(([self._watts], values[:-1]))
        energy_j = self.total_j + np.cumsum(0.5 * (values + earlier) * span_s)
        self._watts = self.last_w = float(values[-1])
        self.emit(t, energy_j)

    def before_first(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.total_j - self._first_w * (self.knot_ns - at) / _NS_PER_S

    def finish(self) -> Curve:
        # Held at the end for as long as its next reading could have been expected.
        self.extend(self.source.lag_s + 2 * max(self.source.period_s, 0.1))
        return self.curve()


# --- uncertainty ---------------------------------------------------------------------------------


def uncertainty_j(curve: Curve, *, energy_j: float, duration_s: float, windows: int = 1) -> float:
    """Standard uncertainty (k = 1) of an energy over `windows` windows of `duration_s` in all.

    GUM style, variances add: gain g·E and offset u_o·t of the device, two uniform edges of a
    refresh (or of a sample period, where that is longer) a window, T·P/√6.
    """
    source = curve.source
    mean_w = energy_j / duration_s if duration_s > 0 else 0.0
    edge_s = max(curve.refresh_s, source.period_s)
    variance = (source.gain * energy_j) ** 2
    variance += (source.offset_w * duration_s) ** 2
    variance += windows * (edge_s * mean_w) ** 2 / 6
    return math.sqrt(variance)
