"""Energy from recorded numbers: unwrapped counters, integrated power, and how sure they are.

One pass over a lane gives the cumulative energy of each of its sources at the instants that are
asked for; memory does not grow with the length of the recording.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.trace import Batch, Channel, Lane

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NS_PER_S = 1e9

_IMPLAUSIBLE_W = 20_000.0
"""No package, memory or board draws this: a counter that would have to has been reset."""

GAP_S = 1.0
"""Without a reading for longer than this (and 10 periods) a lane has a gap worth telling."""

_LEARN_CHANGES = 16
"""Changes that are seen before a sensor's refresh period is estimated."""

_DENSE = 0.75
"""Reads closer together than this part of a refresh period tell when a refresh was."""

_NARROW = 0.15
"""Reads closer together than this tell it without any help."""

_UNIFORM = math.sqrt(12)
"""Width of a uniform distribution over its standard deviation."""

_JITTER = 0.03
"""A refresh may come this part of its period early (A100: 99 to 104 ms, docs/measurement, B)."""

_COUNTED_REFRESHES = 50
"""Over so many refreshes without a read the period, known to a hundredth, still tells the phase."""

_PERIOD_GAIN = 0.02
"""How fast a refresh period follows where refreshes contradict it (settles in some 30 of them)."""

_STEPS = (1e9, 1e8, 1e7, 1e6, 1e5, 1e4, 1e3, 100, 10, 1)
"""Resolutions that are looked for, in units of the raw number."""

_SLOWEST_REFRESH_S = 0.12
"""GPUs refresh their power every 15 to 104 ms (docs/measurement, B)."""

_USUAL_LAG = 0.3
"""Where its window is not known, a reading's middle lies this part of a refresh period back: the
windows are 1/4 to 1 of a period, half of which is 1/8 to 1/2."""

_GAP_REFRESHES = 3
"""Power readings further apart than this are a gap, not a slow refresh."""

_ALIAS_REFRESHES = 40
_ALIAS_SWING = 0.05
_ALIAS_REPEATS = 0.3
_ALIAS_DRIFT = 20
_ALIAS_U = 0.2
"""Aliasing is told from so many refreshes that change by so much of the power and come back after
two or three by so much better. An aliased energy is uncertain by 0.2 (docs/measurement, F)."""

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

    `gaps_ns` are the spans without a reading that are longer than GAP_S and 10 periods.
    `power_w` is the power at those instants, `edge_j2` the variance of the energy up to there,
    `duty_j2` and `gap_j2` cumulative variances; None is none. `quantum` is the resolution, J or W,
    `lag_u_s` the standard uncertainty of how far the readings trail, `aliased` whether the load
    seems to be in step with the refreshes.
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
    power_w: NDArray[np.float64] | None = None
    edge_j2: NDArray[np.float64] | None = None
    duty_j2: NDArray[np.float64] | None = None
    gap_j2: NDArray[np.float64] | None = None
    quantum: float = 0.0
    lag_u_s: float = 0.0
    aliased: bool = False
    gaps_ns: tuple[tuple[int, int], ...] = ()


def gap_limit_s(period_s: float) -> float:
    """After so long without a reading, a lane that is read every `period_s` has a gap."""
    return max(GAP_S, 10 * period_s)


# --- which channels are energy, and which of them add up -----------------------------------------

_RAPL_GAIN = {"intel": 0.03, "other": 0.075, "dram": 0.15}
_GPU_GAIN, _GPU_OFFSET_W = 0.037, 5.9
_POWER_LAG_S = {"nvml-power-average": 0.5}  # half of its window of 1 s
_PACKAGE = re.compile(r"package-\d+(-die-\d+)?$")


def find_sources(lanes: Iterable[Lane], *, cpu_vendor: str = "") -> list[Source]:
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
_JETSON_RAIL = re.compile(r"(?:VDD_)?((?:CPU|GPU|SOC|CV)(?:_(?:CPU|GPU|SOC|CV))*)$")
"""Rails that lie beside each other; VDD_IN and VIN_SYS feed them."""


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


def _module_source(lane: Lane, index: int) -> Source:
    """A Grace Hopper module: its GPU has a sensor of its own, its CPU one in hwmon."""
    channel = lane.channels[index]
    window = channel.source.removeprefix("nvml-module-")
    name = f"module of gpu:{channel.labels['index']} ({window})"
    ident = f"other:{channel.labels['uuid']}/module-{window}"
    contains = "contains the GPU"
    return _make(lane, index, id=ident, kind="other", label=name, in_total=False, excluded=contains)


def _gpu_source(lane: Lane, indices: Sequence[int]) -> Source:
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


_DIE = re.compile(r"(?<=package-\d)-die-\d+|(?<=package-\d\d)-die-\d+")


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
            whole = _DIE.sub("", source.id)
            other = packages.setdefault(whole, source)
            if (other.id == whole) != (source.id == whole):
                first = other
        if first is None:
            seen[source.id] = source
            continue
        excluded = source.excluded or f"repeats {first.label} of {first.lane}"
        ident = f"{source.id}@{source.lane}.{source.channel}"
        seen[ident] = replace(source, id=ident, in_total=False, excluded=excluded)
    return list(seen.values())


# --- integration ---------------------------------------------------------------------------------


def integrate(
    batches: Iterable[Batch], sources: Sequence[Source], at_ns: NDArray[np.int64]
) -> list[Curve]:
    """The cumulative energy of each source (all of one lane) at `at_ns` (sorted), in one pass."""
    accumulators = [(_Counter if source.counter else _Power)(source, at_ns) for source in sources]
    mirrors = _Mirrors(sources)
    for batch in batches:
        # A value belongs to the middle of its read.
        t_s_from = batch.t_ns + batch.read_ns // 2
        for accumulator in accumulators:
            accumulator.feed(t_s_from, batch.values[accumulator.source.channel], batch)
        mirrors.feed(batch)
    return mirrors.mark([accumulator.finish() for accumulator in accumulators])


class _Mirrors:
    """Dies of one package whose zones are one counter (Zen 1 and 2; codecarbon issue 1274).

    Two counters of 15 µJ steps that rise alike from reading to reading are one. A refresh may fall
    between the reads of the two, and then makes one rise differ and the next one make up for it.
    """

    _ENOUGH = 8  # rises that are alike; one alone may be chance
    _ALIKE = 0.5

    def __init__(self, sources: Sequence[Source]) -> None:
        dies = [s for s in sources if s.counter and s.in_total and _DIE.search(s.id)]
        self._pairs = [
            (one, two, [0, 0])
            for i, one in enumerate(dies)
            for two in dies[i + 1 :]
            if _DIE.sub("", one.id) == _DIE.sub("", two.id)
        ]
        self._last: dict[int, float] = {}

    def feed(self, batch: Batch) -> None:
        channels = {source.channel for pair in self._pairs for source in pair[:2]}
        rises = {}
        for channel in channels:
            values = batch.values[channel]
            rises[channel] = np.diff(values, prepend=self._last.get(channel, math.nan))
            self._last[channel] = float(values[-1])
        for one, two, counts in self._pairs:
            moved = (rises[one.channel] > 0) | (rises[two.channel] > 0)
            counts[0] += int(np.count_nonzero(moved))
            counts[1] += int(np.count_nonzero(moved & (rises[one.channel] == rises[two.channel])))

    def mark(self, curves: list[Curve]) -> list[Curve]:
        """The curves; what mirrors an earlier one is no longer in the total."""
        mirrored: dict[int, Source] = {}
        for one, two, (moved, alike) in self._pairs:
            if alike >= self._ENOUGH and alike > self._ALIKE * moved:
                mirrored.setdefault(two.channel, one)
        return [
            curve
            if (first := mirrored.get(curve.source.channel)) is None
            else replace(
                curve,
                source=replace(
                    curve.source, in_total=False, excluded=f"mirrors {first.label}: one counter"
                ),
            )
            for curve in curves
        ]


def _reads(rows: NDArray[np.bool_], batch: Batch) -> int:
    """How many readings these rows stand for; those left out were known or not as their row is."""
    left_out = 0 if batch.skipped is None else int(batch.skipped[rows].sum())
    return int(np.count_nonzero(rows)) + left_out


@dataclass
class _Changes:
    """The readings that differ from the one before: when read, how long after that one, what."""

    t_ns: NDArray[np.float64]
    gap_ns: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass
class _Accumulator:
    """Turns a stream of (time, value) into cumulative energy at the instants asked for.

    A sensor stands still between its refreshes, so only changes of its value are knots of the
    curve. The refresh period is learnt from the first of them.
    """

    source: Source
    at_ns: NDArray[np.int64]
    first_ns: int = -1
    last_ns: int = -1
    unknown: int = 0
    longest_gap_s: float = 0.0
    refresh_s: float = 0.0
    jitter_s: float = 0.0  # standard uncertainty of the time of a knot
    quantum: float = 0.0
    dense: bool = False  # read faster than it is refreshed
    knot_ns: float = 0.0  # the last point of the piecewise linear curve
    first_w: float = math.nan
    last_w: float = math.nan  # power of the last piece
    last_edge_j2: float = 0.0
    last_change_w: float = 0.0
    held_s: float = 0.0  # how long the first power is taken to have flowed before the first knot
    _value: float = math.nan  # at the last reading
    _early: list[_Changes] = field(default_factory=list)
    _changes: int = 0
    _started: bool = False
    _placed_ns: float = math.nan  # the refresh that the last change is from
    _filled: int = 0
    _gaps: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cumulative = np.zeros((3, len(self.at_ns)))  # energy; duty cycle and gaps, J²
        self._local = np.zeros((2, len(self.at_ns)))  # power; variance of the energy up to here
        self._sums = np.zeros(3)

    def valid(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.isfinite(values)

    def notable_gap_s(self) -> float:
        """After this long without a reading, even the same value is news."""
        return math.inf

    def feed(self, t_ns: NDArray[np.int64], values: NDArray[np.float64], batch: Batch) -> None:
        good = self.valid(values)
        self.unknown += _reads(~good, batch)
        t = t_ns[good].astype(np.float64)
        if not len(t):
            return
        gap_ns = np.diff(t, prepend=self.last_ns if self.last_ns >= 0 else t[0])
        if batch.skipped is not None and batch.gap_ns is not None:
            # Rows were left out because nothing happened in them: they were read all the same.
            gap_ns = np.where(batch.skipped[good] > 0, batch.gap_ns[good], gap_ns)
        self.longest_gap_s = max(self.longest_gap_s, float(np.max(gap_ns)) / _NS_PER_S)
        long = np.flatnonzero(gap_ns > gap_limit_s(self.source.period_s) * _NS_PER_S)
        self._gaps += [(int(t[i] - gap_ns[i]), int(t[i])) for i in long]
        known = values[good] * self.source.scale
        changed = np.diff(known, prepend=self._value) != 0  # of the first, which follows NaN, too
        changed |= gap_ns > self.notable_gap_s() * _NS_PER_S
        if self.first_ns < 0:
            self.first_ns = int(t[0])
        self.last_ns, self._value = int(t[-1]), float(known[-1])
        changes = _Changes(t[changed], gap_ns[changed], known[changed])
        if self._started:
            if len(changes.t_ns):
                self.join(self._place(changes), changes)
            return
        self._early.append(changes)
        self._changes += len(changes.t_ns)
        if self._changes > _LEARN_CHANGES:
            self._start()

    def _start(self) -> None:
        """Learns from the first changes and begins the curve with them."""
        parts = [(c.t_ns, c.gap_ns, c.values) for c in self._early]
        all_changes = _Changes(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        self._early.clear()
        self._started = True
        self._learn(all_changes)
        placed = self._place(_Changes(*(column[1:] for column in _columns(all_changes))))
        self.begin(placed, all_changes)

    def _learn(self, changes: _Changes) -> None:
        """Refresh period, jitter and resolution; from a fixed number, however rows are cut."""
        t, gap, values = (column[: _LEARN_CHANGES + 1] for column in _columns(changes))
        t, gap = t[1:], gap[1:]  # the first value is no change
        self.refresh_s = self.source.period_s
        if len(t) == 1:
            self.refresh_s = max(float(t[0] - changes.t_ns[0]), float(gap[0])) / _NS_PER_S
        elif len(t) > 1:
            period = self.typical(np.diff(t), gap)
            self.dense = bool(_median(gap) < _DENSE * period)
            # A line through the middles of the gaps, in which the changes lie, over the refreshes.
            middle = t - gap / 2 if self.dense else t
            number = np.append(0.0, np.cumsum(np.maximum(np.rint(np.diff(middle) / period), 1)))
            off, mean = number - number.mean(), float(middle.mean())
            slope = float(off @ (middle - mean)) / float(off @ off)
            if abs(slope / period - 1) < 0.3:  # else it is no clockwork
                period = slope
                left = middle - mean - slope * off
                self.jitter_s = min(float(np.std(left)), period / 2) / _NS_PER_S
                if self.dense:
                    self.jitter_s = max(self.jitter_s, float(_median(gap)) / _NS_PER_S / _UNIFORM)
                    self._placed_ns = mean + slope * (float(off[0]) - 1)
            self.refresh_s = period / _NS_PER_S
        # Readings that are all multiples of ten steps come in steps of ten (psys of some servers
        # counts whole joules in units of 1 uJ). A few levels only could be round by chance.
        raw = values / self.source.scale
        if len(set(values.tolist())) >= _LEARN_CHANGES // 2 and (np.abs(raw) < 2.0**53).all():
            step = next((s for s in _STEPS if (np.abs(raw - s * np.rint(raw / s)) < 1e-6).all()), 0)
            self.quantum = step * self.source.scale

    def typical(self, between: NDArray[np.float64], gap: NDArray[np.float64]) -> float:
        """A usual time between two changes, ns: the mean without those that missed a refresh."""
        del gap
        return float(np.mean(between[between <= 2.5 * _median(between)]))

    def _place(self, changes: _Changes) -> NDArray[np.float64]:
        """When the refreshes were that these changes show.

        A change happened between two reads. Where these are close together against the refresh
        period, refreshes are taken to be equally spaced as far as the reads allow, over a gap in
        the reads too; where they are not, each read is as fresh as one can know.
        """
        t, gap = changes.t_ns, changes.gap_ns
        period = self.refresh_s * _NS_PER_S
        if not len(t):
            return t
        alone = np.where(gap < _DENSE * period, t - gap / 2, t)
        known = gap < _NARROW * period
        if not self.dense or known.all():
            self._placed_ns = float(alone[-1])
            return alone
        placed, last = [], self._placed_ns
        columns = (t.tolist(), gap.tolist(), alone.tolist(), known.tolist())
        for latest, width, best, certain in zip(*columns, strict=True):
            if certain or math.isnan(last):
                last = best
            elif width >= _DENSE * period:  # reads were put off: the last refresh before this one
                count = max(1, math.floor((latest - last) / period + _JITTER))
                expected = last + count * period
                if count > _COUNTED_REFRESHES:
                    expected = latest - period / 2
                last = min(max(expected, latest - width), latest)
            else:
                expected = last + max(1, round((best - last) / period)) * period
                last = min(max(expected, latest - width), latest)
                # Where the reads contradict, the period is a little off too.
                period += _PERIOD_GAIN * min(max(last - expected, -0.1 * period), 0.1 * period)
            placed.append(last)
        self.refresh_s = period / _NS_PER_S
        self._placed_ns = last
        return np.array(placed)

    def begin(self, placed: NDArray[np.float64], changes: _Changes) -> None:
        """Begins the curve with the first readings; `placed` is when all but the first changed."""
        raise NotImplementedError

    def join(self, placed: NDArray[np.float64], changes: _Changes) -> None:
        raise NotImplementedError

    def emit(
        self, t: NDArray[np.float64], sums: NDArray[np.float64], local: NDArray[np.float64]
    ) -> None:
        """Appends knots to the curve and fills in the instants that they cover.

        `sums` (3, n) are cumulative at the knots `t`, `local` (2, n) of the pieces that end there.
        """
        end = int(np.searchsorted(self.at_ns, t[-1], side="right"))
        if end > self._filled:
            now = slice(self._filled, end)
            at = self.at_ns[now].astype(np.float64)
            knots = np.concatenate(([self.knot_ns], t))
            for row, (before, after) in enumerate(zip(self._sums, sums, strict=True)):
                self._cumulative[row, now] = np.interp(at, knots, np.append(before, after))
            piece = np.minimum(np.searchsorted(t, at), len(t) - 1)
            self._local[:, now] = local[:, piece]
            self._cumulative[0, now] -= self._before_first_j(at)
            self._filled = end
        self.knot_ns, self._sums = float(t[-1]), sums[:, -1]
        self.last_edge_j2 = float(local[1, -1])

    def _before_first_j(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self.held_s:
            return np.zeros(len(at))
        # Only before the very first knot is an instant before the last one.
        return self.first_w * np.clip((self.knot_ns - at) / _NS_PER_S, 0.0, self.held_s)

    def extend(self, limit_s: float) -> None:
        """Goes on at the last power for up to `limit_s`, then stands still."""
        rest = slice(self._filled, None)
        at = self.at_ns[rest].astype(np.float64)
        beyond_s = np.clip((at - self.knot_ns) / _NS_PER_S, 0.0, limit_s)
        self._cumulative[:, rest] = self._sums[:, np.newaxis]
        self._cumulative[0, rest] += self.last_w * beyond_s - self._before_first_j(at)
        self._local[0, rest] = self.last_w
        self._local[1, rest] = self.last_edge_j2 + (self.last_change_w * beyond_s) ** 2 / 3

    def finish(self) -> Curve:
        raise NotImplementedError

    def curve(self, **facts: Any) -> Curve:
        energy_j, duty_j2, gap_j2 = self._cumulative
        if self.first_ns < 0:
            energy_j[:] = np.nan
        return Curve(
            self.source,
            energy_j,
            self.first_ns,
            self.last_ns,
            refresh_s=self.refresh_s,
            unknown=self.unknown,
            longest_gap_s=self.longest_gap_s,
            power_w=self._local[0],
            edge_j2=self._local[1],
            duty_j2=duty_j2,
            gap_j2=gap_j2,
            quantum=self.quantum,
            gaps_ns=tuple(self._gaps),
            **facts,
        )


def _median(values: NDArray[np.float64]) -> float:
    """The upper median; np.median loads numpy.ma, 15 ms."""
    return float(np.sort(values)[len(values) // 2])


def _columns(changes: _Changes) -> tuple[NDArray[np.float64], ...]:
    return changes.t_ns, changes.gap_ns, changes.values


@dataclass
class _Counter(_Accumulator):
    """A counter: the line goes through its changes.

    The first value was reached up to one refresh period before it was first read, and what flowed
    after the last change is not in the counter yet: both ends are extended by up to one period, so
    that an edge is off by a random part of a refresh and not always the same way.
    """

    wraps: int = 0
    resets: int = 0
    longest_stall_s: float = 0.0
    _last: float = math.nan  # the counter at its last change
    _before_w: float = math.nan  # power of the piece before the one that waits
    # A piece waits for the one after it, which tells how unsteady its power is: (end, J).
    _waiting: tuple[float, float] | None = None
    _uneven_w2: float = 0.0  # squared changes of power from piece to piece
    _pieces: int = 0
    _recent: list[tuple[float, float]] = field(default_factory=list)  # (J, s)

    def valid(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        known = np.isfinite(values)
        # Polled too fast, some NVIDIA drivers answer 0 (zeus PR 186). Taken as a reset, all that
        # the counter holds would be added when it reads right again. RAPL does pass through 0.
        return known & (values != 0) if self.source.source == "nvml-energy" else known

    def begin(self, placed: NDArray[np.float64], changes: _Changes) -> None:
        begin = float(changes.t_ns[0])
        if len(placed) > 1:
            begin = min(begin, float(placed[0]) - self.refresh_s * _NS_PER_S)
        self.knot_ns, self._last = begin, float(changes.values[0])
        self._filled = int(np.searchsorted(self.at_ns, begin, side="right"))
        if len(placed):
            self.join(placed, _Changes(*(column[1:] for column in _columns(changes))))

    def join(self, placed: NDArray[np.float64], changes: _Changes) -> None:
        last_ns = self._waiting[0] if self._waiting else self.knot_ns
        step_j = np.diff(changes.values, prepend=self._last)
        self._last = float(changes.values[-1])
        span_s = np.maximum(np.diff(placed, prepend=last_ns) / _NS_PER_S, 1e-9)
        self._unwrap(step_j, span_s, changes.values)
        self.longest_stall_s = max(self.longest_stall_s, float(np.max(span_s)))
        few = zip(step_j[-_LAST_CHANGES:].tolist(), span_s[-_LAST_CHANGES:].tolist(), strict=True)
        self._recent = [*self._recent, *few][-_LAST_CHANGES:]
        if self._waiting:
            placed = np.append(self._waiting[0], placed)
            step_j = np.append(self._waiting[1], step_j)
        self._settle(placed, step_j)

    def _unwrap(
        self, step_j: NDArray[np.float64], span_s: NDArray[np.float64], values: NDArray[np.float64]
    ) -> None:
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

    def _settle(
        self, t: NDArray[np.float64], step_j: NDArray[np.float64], *, last: bool = False
    ) -> None:
        """Emits pieces; all but the last, which has no successor yet, unless `last`."""
        span_s = np.maximum(np.diff(t, prepend=self.knot_ns) / _NS_PER_S, 1e-9)
        power_w = step_j / span_s
        before_w = power_w[0] if math.isnan(self._before_w) else self._before_w
        change_w = np.abs(np.diff(power_w, prepend=before_w))
        if not last:
            self._waiting = (float(t[-1]), float(step_j[-1]))
        count = len(t) if last else len(t) - 1
        if not count:
            return
        # A step inside a piece leaves its power between those of its neighbours, so the smaller
        # of the two changes bounds how far the straight line can be off inside (docs/measurement).
        following_w = np.append(change_w[1:], change_w[-1])
        if math.isnan(self._before_w):
            change_w[0] = following_w[0]
        uneven_w = np.minimum(change_w, following_w)[:count]
        power_w, span_s, change_w = power_w[:count], span_s[:count], change_w[:count]
        edge_j2 = (power_w * self.jitter_s) ** 2 + (uneven_w * span_s) ** 2 / 3
        self._before_w = self.last_w = float(power_w[-1])
        self._uneven_w2 += float(change_w @ change_w)
        self._pieces += count
        self.last_change_w = math.sqrt(self._uneven_w2 / self._pieces)
        sums = np.zeros((3, count))
        sums[0] = self._sums[0] + np.cumsum(step_j[:count])
        self.emit(t[:count], sums, np.array((power_w, edge_j2)))

    def finish(self) -> Curve:
        if not self._started and self._early:
            self._start()
        if self._waiting:
            self._settle(np.array([self._waiting[0]]), np.array([self._waiting[1]]), last=True)
            # Of a few changes: one alone may have been noticed late and the next one early.
            joules, seconds = zip(*self._recent, strict=True)
            self.last_w = sum(joules) / sum(seconds)
        still_s = max(0.0, (self.last_ns - self.knot_ns) / _NS_PER_S)
        self.longest_stall_s = max(self.longest_stall_s, still_s)
        self.extend(min(self.refresh_s, still_s))
        if math.isnan(self.last_w):  # it never moved: how much flowed is unknown, not 0
            self._cumulative[:] = math.nan
        return self.curve(
            wraps=self.wraps, resets=self.resets, longest_stall_s=self.longest_stall_s
        )


@dataclass
class _Power(_Accumulator):
    """Power readings, joined by straight lines and held at the ends; shifted back by their lag.

    A reading that stays was still seen: it is held until a refresh before the next change, or until
    the last read. A reading of 0 or less is a driver's hiccup (zeus PR 186), not a device at rest.
    """

    lag_s: float = 0.0
    begin_ns: float = 0.0
    common_edge_j2: float = 0.0  # times seconds
    lowest_w: float = math.inf
    highest_w: float = 0.0
    _watts: float = math.nan
    _seen_ns: float = 0.0  # the refresh of the last change, not shifted
    _count: int = 0  # refreshes, as many as were seen
    # Sums of squared differences of readings 1, 2 and 3 refreshes apart, and the last readings.
    _structure: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    _tail: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def valid(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.isfinite(values) & (values > 0)

    def notable_gap_s(self) -> float:
        return _GAP_REFRESHES * max(_SLOWEST_REFRESH_S, self.source.period_s)

    def typical(self, between: NDArray[np.float64], gap: NDArray[np.float64]) -> float:
        """A low quartile: at constant power a refresh may change nothing and not be noticed.

        No GPU takes longer than 100 ms (docs/measurement, B); a reader may.
        """
        quartile = np.sort(between)[len(between) // 4]
        return float(min(quartile, max(_SLOWEST_REFRESH_S * _NS_PER_S, _median(gap))))

    def begin(self, placed: NDArray[np.float64], changes: _Changes) -> None:
        self.refresh_s = self.refresh_s or _SLOWEST_REFRESH_S
        slow_s = max(_SLOWEST_REFRESH_S, 1.05 * self.source.period_s)
        if len(placed) < 2:
            self.refresh_s = min(self.refresh_s, slow_s)
        self.lag_s = self.source.lag_s or (_USUAL_LAG * self.refresh_s if self.dense else 0.0)
        self.held_s = 2 * max(self.source.period_s, 0.1)
        first_ns = float(changes.t_ns[0])
        if len(placed):  # the reading that is there at first was taken a refresh before the next
            first_ns = max(first_ns - self.refresh_s * _NS_PER_S / 2, min(first_ns, placed[0]))
        first_ns = min(first_ns, float(changes.t_ns[0]))
        self._watts = self.first_w = self.last_w = float(changes.values[0])
        self.lowest_w = self.highest_w = self._watts
        self._tail = changes.values[:1]
        self._seen_ns = first_ns
        self.knot_ns = self.begin_ns = first_ns - self.lag_s * _NS_PER_S
        if len(placed):
            self.join(placed, _Changes(*(column[1:] for column in _columns(changes))))

    def join(self, placed: NDArray[np.float64], changes: _Changes) -> None:
        values, period = changes.values, self.refresh_s * _NS_PER_S
        earlier = np.append(self._watts, values[:-1])
        since = np.append(self._seen_ns, placed[:-1])
        self._watch(earlier, values, np.rint((placed - since) / period))
        # Two knots a change: the end of the reading before, where it was held, and the change.
        until = np.minimum(placed - period, changes.t_ns - changes.gap_ns)
        keep = np.stack((until > since + period / 2, np.ones(len(placed), bool)), axis=1).ravel()
        t = np.stack((until, placed), axis=1).ravel()[keep] - self.lag_s * _NS_PER_S
        watts = np.stack((earlier, values), axis=1).ravel()[keep]
        held = np.stack((keep[::2], np.zeros(len(placed), bool)), axis=1).ravel()[keep]
        self._watts, self._seen_ns = float(values[-1]), float(placed[-1])
        self._through(t, watts, held)

    def _through(
        self, t: NDArray[np.float64], watts: NDArray[np.float64], held: NDArray[np.bool_]
    ) -> None:
        """Goes on through knots; up to those that are `held` the reading before was still seen."""
        before = np.append(self.last_w, watts[:-1])
        span_s = np.maximum(np.diff(t, prepend=self.knot_ns) / _NS_PER_S, 0.0)
        mean_w, change_w = 0.5 * (watts + before), watts - before
        gap = ~held & (span_s > _GAP_REFRESHES * max(self.refresh_s, self.source.period_s))
        window_s = 2 * self.source.lag_s
        if window_s > self.refresh_s:
            # An average sees all of the run; but an edge lies in a ramp as long as its window.
            slope = change_w / np.maximum(span_s, self.refresh_s / 2)
            duty_j2, edge_j2 = np.zeros(len(t)), (slope * window_s**2 / 12) ** 2
            self.common_edge_j2 += float(edge_j2 @ span_s)
        else:
            duty_j2 = np.where(gap, 0.0, (change_w * span_s) ** 2)
            edge_j2 = np.where(gap, 0.0, (change_w * span_s) ** 2 / 12)
        sums = np.array((mean_w * span_s, duty_j2, np.where(gap, span_s, 0.0) ** 2))
        sums = self._sums[:, np.newaxis] + np.cumsum(sums, axis=1)
        self.last_w, self.last_change_w = float(watts[-1]), 0.0
        self.emit(t, sums, np.array((mean_w, edge_j2)))

    def _watch(
        self,
        earlier: NDArray[np.float64],
        values: NDArray[np.float64],
        refreshes: NDArray[np.float64],
    ) -> None:
        """Range and regularity of the readings, a held one as often as it was refreshed."""
        self.lowest_w = min(self.lowest_w, float(values.min()))
        self.highest_w = max(self.highest_w, float(values.max()))
        self._count += int(np.maximum(refreshes, 1).sum())
        times = np.clip(refreshes, 1, 4).astype(np.int64) - 1  # more of them add nothing
        new = np.repeat(np.stack((earlier, values), axis=1).ravel(),
                        np.stack((times, np.ones_like(times)), axis=1).ravel())  # fmt: skip
        series = np.append(self._tail, new)
        for apart in (1, 2, 3):
            change = (series[apart:] - series[:-apart])[-len(new) :]
            self._structure[apart - 1] += float(change @ change)
        self._tail = series[-3:]

    def finish(self) -> Curve:
        if not self._started and self._early:
            self._start()
        last = self.last_ns - self.lag_s * _NS_PER_S
        if self.first_ns >= 0 and last > self.knot_ns:
            self._through(np.array([last]), np.array([self.last_w]), np.ones(1, bool))
        # Held at the end for as long as its next reading could have been expected.
        self.extend(self.lag_s + self.held_s)
        self._cumulative[1] *= duty_coefficient(*self._structure[:2]) if self._count else 0.0
        self._cumulative[2] *= max(0.0, self.highest_w - self.lowest_w) ** 2 / 12
        # The ramps that an average makes of fast changes are too flat to show where they were.
        seconds = max((self.knot_ns - self.begin_ns) / _NS_PER_S, 1e-9)
        self._local[1] += self.common_edge_j2 / seconds
        return self.curve(lag_u_s=self.refresh_s / _UNIFORM, aliased=self._aliased())

    def _aliased(self) -> bool:
        """Whether readings repeat after two or three refreshes: the load's period is near those.

        Then the sensor sees the same two or three moments of each period, and what lies between
        them is anybody's guess. A load in step with the refreshes themselves looks constant.
        """
        one, *others = self._structure.tolist()
        mean_w = 0.5 * (self.lowest_w + self.highest_w)
        if 2 * self.source.lag_s > self.refresh_s or self._count < _ALIAS_REFRESHES:
            return False
        swing = one / (2 * self._count) > (_ALIAS_SWING * mean_w) ** 2
        # Where the phase drifts through all of the period several times, all of it is seen.
        repeats = min(_ALIAS_REPEATS, _ALIAS_DRIFT / self._count)
        return bool(swing and min(others) < repeats * one)


_DUTY = 0.25
"""Share of a refresh period that a power reading looks at, where it is not known: GA100's and
H100's 25 of 100 ms, the least of all classes (SC24)."""


def duty_coefficient(one_w2: float, two_w2: float, *, duty: float = _DUTY) -> float:
    """Variance of a refresh's energy over (change of reading · refresh period)².

    `one_w2` and `two_w2` are mean (or summed) squares of the differences between readings one and
    two refreshes apart. For a load with exponential autocorrelation, seen through windows that
    cover `duty` of each period T, the sum of readings times T is off by T²·Σ C_r(jT) − T·∫C a
    period, C_r being the readings' covariance and C the load's. two/one tells its correlation time:
    1 for one far below T, 2 for one far above. White: (1 − duty)/2; rare steps: 1/12 at most.
    """
    a = np.geomspace(30.0, 0.01, 60)  # T / correlation time
    x = a * duty
    own = 2 * (x - 1 + np.exp(-x)) / x**2
    factor = 2 * (np.cosh(x) - 1) / x**2
    apart = [factor * np.exp(-a * j) for j in (1, 2)]
    excess = own + 2 * factor / np.expm1(a) - 2 / a
    ratio = (own - apart[1]) / (own - apart[0])
    seen = two_w2 / one_w2 if one_w2 > 0 else 1.0
    return float(np.interp(seen, ratio, excess / (2 * (own - apart[0]))))


# --- uncertainty ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Standard uncertainties (k = 1) of one device's energy, J, by cause (docs/measurement, F).

    `gain_j`, `offset_j` and `model_j` are fixed for the device, whatever it does: over its windows
    and runs they add and subtract as they stand. The others are independent: their squares add.
    """

    gain_j: float = 0.0
    offset_j: float = 0.0
    model_j: float = 0.0
    edges_j: float = 0.0
    duty_j: float = 0.0
    lag_j: float = 0.0
    quantisation_j: float = 0.0
    gaps_j: float = 0.0
    aliasing_j: float = 0.0
    attribution_j: float = 0.0

    @property
    def u_j(self) -> float:
        """The combined standard uncertainty (k = 1), J."""
        return math.hypot(*vars(self).values())


_CORRELATED = ("gain_j", "offset_j", "model_j")


def combine(a: Budget, b: Budget, *, sign: float = 1.0) -> Budget:
    """The budget of the sum of two energies of one device, or of a - b with `sign` -1."""
    pairs = {name: (one, vars(b)[name]) for name, one in vars(a).items()}
    return Budget(
        **{
            name: one + sign * two if name in _CORRELATED else math.hypot(one, two)
            for name, (one, two) in pairs.items()
        }
    )


def difference(a: Budget, b: Budget) -> Budget:
    """The budget of E_a - E_b on one device: what is fixed for the device cancels."""
    return combine(a, b, sign=-1.0)


def budget(
    curve: Curve,
    at_ns: NDArray[np.int64],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    *,
    energy_j: float | None = None,
) -> Budget:
    """The budget of the windows from grid index `begins` to `ends`, taken together.

    `at_ns` is the curve's grid. `energy_j` is what of the windows' energy is meant, a part of it
    where a device is shared; all of it unless given.
    """
    source = curve.source
    device_j = float(np.sum(curve.energy_j[ends] - curve.energy_j[begins]))
    seconds = float(np.sum(at_ns[ends] - at_ns[begins])) / _NS_PER_S
    part = 1.0 if energy_j is None or not device_j else energy_j / device_j

    def summed(variance_j2: NDArray[np.float64] | None, sign: float) -> float:
        if variance_j2 is None:
            return 0.0
        total_j2 = float(np.sum(variance_j2[ends] + sign * variance_j2[begins]))
        return abs(part) * math.sqrt(max(0.0, total_j2))

    lag_j = 0.0
    if curve.power_w is not None:
        lag_j = abs(float(np.sum(curve.power_w[ends] - curve.power_w[begins]))) * curve.lag_u_s
    readings = 2 * len(begins)
    if not source.counter:  # each refresh is a reading, of as many seconds
        readings = seconds * max(curve.refresh_s, 1e-9)  # type: ignore[assignment]
    scale_j = source.gain * device_j * part
    modelled = source.provenance == "modelled"
    return Budget(
        gain_j=0.0 if modelled else scale_j,
        model_j=scale_j if modelled else 0.0,
        offset_j=source.offset_w * seconds * part,
        edges_j=summed(curve.edge_j2, 1.0),
        duty_j=summed(curve.duty_j2, -1.0),
        gaps_j=summed(curve.gap_j2, -1.0),
        lag_j=abs(part) * lag_j,
        quantisation_j=abs(part) * curve.quantum * math.sqrt(readings / 12),
        aliasing_j=_ALIAS_U * abs(device_j * part) if curve.aliased else 0.0,
    )


_GAIN_CORRELATION = 0.5
"""How much of a board's gain its counter and its power readings have in common (judgement: the same
shunts, other paths; no source measures both)."""


@dataclass(frozen=True, kw_only=True)
class CrossCheck:
    """What a second sensor of a device gives: J, J minus the first one's, and u of that (k = 2)."""

    source: str
    energy_j: float
    difference_j: float
    u_j: float


def find_cross_sources(lanes: Iterable[Lane], sources: Iterable[Source]) -> list[Source]:
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


_CROSS_ORDER = ("nvml-power-average", "nvml-power", "nvml-power-instant")


def cross_check(counter: Curve, power: Curve, at_ns: NDArray[np.int64]) -> CrossCheck | None:
    """Holds the integral of power against the counter; None if one is unknown.

    Over the part of the grid in which both were read: past its last reading a source is held, each
    for its own while.

    Their gains are taken to agree in part (_GAIN_CORRELATION), so of the two gains' variance
    2 (1 - correlation) is left; all other terms of both are in the difference.
    """
    begin_ns, end_ns = max(counter.first_ns, power.first_ns), min(counter.last_ns, power.last_ns)
    first = int(np.searchsorted(at_ns, begin_ns, side="left"))
    last = int(np.searchsorted(at_ns, end_ns, side="right")) - 1
    if last <= first:
        return None
    ends = np.array([first]), np.array([last])
    energies_j = [float(curve.energy_j[last] - curve.energy_j[first]) for curve in (counter, power)]
    if not all(math.isfinite(energy_j) for energy_j in energies_j):
        return None
    ours, theirs = (budget(curve, at_ns, *ends) for curve in (counter, power))
    gain_j = math.sqrt(2 * (1 - _GAIN_CORRELATION)) * 0.5 * (ours.gain_j + theirs.gain_j)
    u_j = math.hypot(gain_j, replace(ours, gain_j=0.0).u_j, replace(theirs, gain_j=0.0).u_j)
    return CrossCheck(
        source=power.source.source,
        energy_j=energies_j[1],
        difference_j=energies_j[1] - energies_j[0],
        u_j=2 * u_j,
    )
