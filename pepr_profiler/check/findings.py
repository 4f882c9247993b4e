"""What a check found: each sensor's figures, whether they are as expected, and what follows.

Verdicts are "as expected", "not as expected" and "cannot be told". What is expected is what
energies are computed with (docs/measurement.md).
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pepr_profiler import __version__
from pepr_profiler.check.load import Ran
from pepr_profiler.check.probe import LaneRows, Probe
from pepr_profiler.check.response import (
    Figure,
    Response,
    Series,
    compare,
    has_moved,
    respond,
)
from pepr_profiler.energy.hardware import KIND, SCHEMA, device_of, domain_of
from pepr_profiler.energy.sources import UNITS, Source, find_sources
from pepr_profiler.record import Record
from pepr_profiler.sensors.machine import read_cpu_identity, read_surroundings
from pepr_profiler.sensors.spec import SensorSpec
from pepr_profiler.trace.lane import Channel, LaneInfo
from pepr_profiler.units import NS_PER_S, format_quantity, format_with_u, known

AS_EXPECTED, NOT_AS_EXPECTED, UNKNOWN = "as expected", "not as expected", "cannot be told"

_NVML_REFRESH_S = 0.12
"""NVIDIA's boards refresh their power and counters every 15 to 104 ms (docs/measurement.md, B)."""

_RAPL_REFRESH_S = 0.005
_AVERAGE_S = 1.0
_SMOOTHING_S = 0.04, 0.22
"""Kepler's time constants (docs/measurement.md, B: 10 to 90 % take 90 to 480 ms)."""

_AGREEMENT = 0.02
"""A counter and the power of one board should agree to this part."""

_SHORTEST_WRAP_S = 60.0
_COSTS_S = {"nvml-dense": 0.02, "nvml-processes": 0.05}
_COST_S = 1e-3
_ENOUGH_CPU, _QUIET_CPUS = 0.8, 0.2
_WINDOWS_S = (0.1, 1.0, 10.0, 100.0)

PRIVACY = "Nothing in it names the host, a user, a serial number or a UUID."


class Row(Record):
    """One line of the table."""

    sensor: str
    what: str
    seen: str
    expected: str
    verdict: str
    why: str = ""


class _Sensor(Record):
    """One channel that measures energy, what it is of, and how it answered."""

    rows: LaneRows
    channel: int
    source: Source
    label: str
    device: str
    series: Series
    loads: Mapping[str, Ran]
    response: Response

    @property
    def channel_source(self) -> str:
        return self.rows.lane.channels[self.channel].source

    @property
    def is_nvml(self) -> bool:
        return self.channel_source.startswith("nvml-")

    @property
    def is_rapl(self) -> bool:
        return self.channel_source in ("perf", "powercap")

    @property
    def via_daemon(self) -> bool:
        return self.rows.lane.name.startswith("daemon ")


def examine(found: Probe) -> dict[str, Any]:
    """The findings as `hardware.json` has them (docs/measurement.md, H)."""
    sensors = list(_sensors(found))
    rows: list[Row] = []
    for sensor in sensors:
        rows += _rows_of(sensor)
        rows += _comparisons(sensor, sensors)
    rows += _machine_rows(found) if sensors else ()
    rows += [row for lane in found.rows if len(lane.t_ns) for row in _lane_rows(lane, found.loads)]
    here, cpu = read_surroundings(), read_cpu_identity()
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "made_by": f"pepr-profiler {__version__}",
        "made_on": time.strftime("%Y-%m-%d", time.gmtime()),
        "privacy": PRIVACY,
        "machine": {
            "cpu": cpu.name or str(cpu),
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "kernel": platform.release(),
            "container": here.container,
            "virtual": here.virtual,
        },
        "drivers": _driver_versions(lane.lane for lane in found.rows),
        "loads": {name: _load_facts(ran) for name, ran in found.loads.items()},
        "seconds": found.seconds,
        "others_cpus": found.others_cpus,
        "stolen_cpus": found.stolen_cpus,
        "sensors": [_facts(sensor) for sensor in sensors],
        "rows": [row._asdict() for row in rows],
        "budget": _budget(sensors),
        "not_tried": _not_tried(found, sensors),
    }


def _sensors(found: Probe) -> Iterable[_Sensor]:
    lanes = [rows.lane for rows in found.rows]
    vendor = read_cpu_identity().vendor or ""
    sources = {(s.lane, s.channel): s for s in find_sources(lanes, cpu_vendor=vendor)}
    for rows in found.rows:
        if not len(rows.t_ns):
            continue
        for index, channel in enumerate(rows.lane.channels):
            if UNITS.get(channel.quantity) != channel.unit:
                continue
            source = sources.get((rows.lane.name, index))
            if source is None:
                source = _power_beside_counter(rows.lane, index)
            loads = _loads_of(channel, found.loads)
            series = rows.series(source)
            response = respond(series, {name: ran.bursts for name, ran in loads.items()})
            label = f"{source.label}  {channel.source}"
            device = device_of(channel, read_cpu_identity().name or "")
            yield _Sensor(rows, index, source, label, device, series, loads, response)


def _power_beside_counter(lane: LaneInfo, index: int) -> Source:
    """The power of a board that has a counter, as it would be without that."""
    uuid = lane.channels[index].labels.get("uuid")
    channels = tuple(
        channel._replace(quantity="")
        if i != index and channel.labels.get("uuid") == uuid
        else channel
        for i, channel in enumerate(lane.channels)
    )
    sources = find_sources([lane._replace(channels=channels)])
    source = next(source for source in sources if source.channel == index)
    return source.not_counted("the board has a better sensor")


def _loads_of(channel: Channel, loads: Mapping[str, Ran]) -> Mapping[str, Ran]:
    """The loads as the device of a channel saw them: a GPU may be hidden from the GPU load."""
    uuid = channel.labels.get("uuid")
    if not uuid or "gpu" not in loads:
        return loads
    divided = channel.labels.get("mig") == "on"
    return {**loads, "gpu": loads["gpu"].seen_by(uuid, divided=divided)}


# --- one sensor -----------------------------------------------------------------------------------


def _rows_of(sensor: _Sensor) -> list[Row]:
    response = sensor.response
    rows = [_refresh_row(sensor)]
    if response.smoothing_s.is_known:
        rows.append(_smoothing_row(sensor))
    elif not sensor.source.counter:
        rows.append(_window_row(sensor))
    rows += [_lag_row(sensor), _coverage_row(sensor)]
    if sensor.source.counter:
        rows.append(_wrap_row(sensor))
    return rows


def _smoothing_row(sensor: _Sensor) -> Row:
    """That a sensor approaches its power exponentially: only Kepler's do, as far as is known."""
    figure, expected_s = sensor.response.smoothing_s, sensor.source.lag_s
    if sensor.channel_source == "nvml-power" and 0 < expected_s < _AVERAGE_S / 2:
        good = _SMOOTHING_S[0] <= (figure.value or 0.0) <= _SMOOTHING_S[1]
        expected = f"{_ms(_SMOOTHING_S[0])} to {_ms(_SMOOTHING_S[1])}"
        return _judged(sensor, "smoothing", _shown_s(figure), expected, good)
    why = "it follows a change exponentially; its energy lags by this time"
    return Row(sensor.label, "smoothing", _shown_s(figure), "none", NOT_AS_EXPECTED, why)


def _refresh_row(sensor: _Sensor) -> Row:
    figure = sensor.response.refresh_s
    limit_s = _NVML_REFRESH_S if sensor.is_nvml else _RAPL_REFRESH_S if sensor.is_rapl else 1.0
    expected = f"up to {_ms(limit_s)}"
    if sensor.via_daemon:
        why = "it is read through the daemon, which may show it coarsely"
        return Row(sensor.label, "refresh period", _shown_s(figure), expected, UNKNOWN, why)
    if figure.value is not None:
        good = figure.value - (figure.u or 0.0) <= limit_s
        return _judged(sensor, "refresh period", _shown_s(figure), expected, good)
    if figure.at_most is not None and figure.at_most <= limit_s:
        seen = "at each read"
        return Row(sensor.label, "refresh period", seen, expected, AS_EXPECTED, figure.why)
    return Row(sensor.label, "refresh period", "?", expected, UNKNOWN, figure.why)


def _window_row(sensor: _Sensor) -> Row:
    figure, source = sensor.response.window_s, sensor.channel_source
    refresh_s = sensor.response.refresh_s.value or _NVML_REFRESH_S
    if source.endswith("average"):
        expected = f"{_ms(_AVERAGE_S)} ± 10%"
        low_s, high_s = 0.9 * _AVERAGE_S, 1.1 * _AVERAGE_S
    elif source == "nvml-power" and sensor.source.lag_s >= _AVERAGE_S / 2:
        expected = f"{_ms(2 * sensor.source.lag_s)} ± 10%"
        low_s, high_s = 1.8 * sensor.source.lag_s, 2.2 * sensor.source.lag_s
    elif sensor.is_nvml:
        expected, low_s, high_s = "up to its refresh", 0.0, 1.1 * refresh_s
    else:
        expected, low_s, high_s = f"up to {_ms(1.0)}", 0.0, 1.0
    if figure.value is None:
        return Row(sensor.label, "averaging window", "?", expected, UNKNOWN, figure.why)
    u = figure.u or 0.0
    good = low_s - u <= figure.value <= high_s + u
    return _judged(sensor, "averaging window", _shown_s(figure), expected, good)


def _lag_row(sensor: _Sensor) -> Row:
    """How far the middle of a reading lies behind the refresh that shows it."""
    figure, source = sensor.response.lag_s, sensor.source
    refresh_s = sensor.response.refresh_s.value or 0.1
    if source.counter:
        expected_s, within_s = 0.0, 0.02
    elif source.lag_s >= _AVERAGE_S / 2:
        expected_s, within_s = source.lag_s, 0.1 * source.lag_s + 0.02
    elif source.lag_s:
        expected_s, within_s = source.lag_s, max(0.5 * source.lag_s, 0.02)
    else:  # windows of a quarter of a refresh to all of one
        expected_s, within_s = 0.3 * refresh_s, 0.25 * refresh_s
    expected = f"{_ms(expected_s)} ± {_ms(within_s)}"
    if figure.value is None:
        return Row(sensor.label, "lag", "?", expected, UNKNOWN, figure.why)
    good = abs(figure.value - expected_s) <= within_s + (figure.u or 0.0)
    return _judged(sensor, "lag", _shown_s(figure), expected, good)


def _coverage_row(sensor: _Sensor) -> Row:
    """What moves the sensor."""
    watts, loads = sensor.response.watts, sensor.loads
    moved = moved_by(sensor.response)
    parts = [
        f"{name.upper()} load {_shown_w(watts[name])}"
        for name in loads
        if watts[name].is_known and not loads[name].problem
    ]
    seen = ", ".join(parts) or "?"
    kind = sensor.source.kind
    ran = {name for name, load in loads.items() if not load.problem}
    what = "moved by"
    if sensor.source.scope == "module":
        expected, needed, forbidden = "CPU and GPU load", {"cpu", "gpu"}, set()
    elif kind == "gpu":
        expected, needed, forbidden = "GPU load only", {"gpu"}, {"cpu"}
    elif kind in ("cpu", "dram"):
        # A GPU's work keeps a thread of the CPU busy too.
        expected, needed, forbidden = "CPU load", {"cpu"}, set()
    else:
        expected, needed, forbidden = "any load", set(), set()
    if moved & forbidden:
        why = f"it covers more than the {kind.upper()}: it is the module's or the board's"
        if "gpu" in ran and "gpu" not in moved:
            why = "it follows the CPU, and not the GPU"
        return Row(sensor.label, what, seen, expected, NOT_AS_EXPECTED, why)
    if lacking := (needed & ran) - moved:
        why = f"the {' and '.join(sorted(lacking)).upper()} load did not move it"
        may_be_hidden = "gpu" in lacking and loads["gpu"].gpus is None
        if may_be_hidden:
            why += ", and it is unknown on which GPUs that ran"
        weak = kind == "dram" or loads_are_weak(lacking, loads)
        verdict = UNKNOWN if may_be_hidden or weak else NOT_AS_EXPECTED
        return Row(sensor.label, what, seen, expected, verdict, why)
    if unrun := sorted(needed - ran):
        problems = (f"no {n.upper()} load: {loads[n].problem}" for n in unrun if n in loads)
        why = "; ".join(problems) or "no load of its kind ran"
        return Row(sensor.label, what, seen, expected, UNKNOWN, why)
    return Row(sensor.label, what, seen, expected, AS_EXPECTED)


def loads_are_weak(names: Iterable[str], loads: Mapping[str, Ran]) -> bool:
    """Whether one of these loads got too little of the CPUs to show anything."""
    parts = (loads[name].cpu_part for name in names)
    return any(part is not None and part < _ENOUGH_CPU for part in parts)


def moved_by(response: Response) -> set[str]:
    """The loads that certainly moved a sensor, by a part of its power that matters."""
    highest = max((w.value or 0.0 for w in response.watts.values()), default=0.0)
    return {
        name
        for name, watts in response.watts.items()
        if has_moved(watts, response.mean_w) and (watts.value or 0.0) > 0.03 * highest
    }


def _wrap_row(sensor: _Sensor) -> Row:
    range_j, highest_w = sensor.source.range_j, sensor.response.highest_w
    expected = f"over {_SHORTEST_WRAP_S:.0f} s, or never"
    if not range_j:
        return Row(sensor.label, "wraps", "never", expected, AS_EXPECTED)
    seen = f"at {format_quantity(range_j, 'J')}"
    if not highest_w or highest_w <= 0:
        return Row(sensor.label, "wraps", seen, expected, UNKNOWN, "no power was seen")
    wrap_s = range_j / highest_w
    seen += f", {wrap_s / 60:.0f} min" if wrap_s > 600 else f", {wrap_s:.0f} s"
    return _judged(sensor, "wraps", seen, expected, wrap_s > _SHORTEST_WRAP_S)


def _judged(sensor: _Sensor, what: str, seen: str, expected: str, good: bool) -> Row:
    return Row(sensor.label, what, seen, expected, AS_EXPECTED if good else NOT_AS_EXPECTED)


# --- two sensors of one device --------------------------------------------------------------------


def _comparisons(one: _Sensor, sensors: Sequence[_Sensor]) -> Iterable[Row]:
    """A counter against the power readings of its device, and RAPL read by perf and powercap."""
    if not one.source.counter:
        return
    for two in sensors:
        if two is one or two.source.kind != one.source.kind or _device_id(one) != _device_id(two):
            continue
        power = not two.source.counter and one.source.scope == two.source.scope
        twice = (one.channel_source, two.channel_source) == ("perf", "powercap")
        if power or (twice and two.source.source != "powercap-mmio"):
            yield _agreement(one, two)


def _device_id(sensor: _Sensor) -> str:
    """What of it is the same for all sensors of a device: the UUID of a GPU, else the id."""
    labels = sensor.rows.lane.channels[sensor.channel].labels
    plain = sensor.source.id.partition("@")[0] if sensor.is_rapl else sensor.source.id
    return labels.get("uuid") or plain


def _agreement(one: _Sensor, two: _Sensor) -> Row:
    held_s = 0.0 if two.source.counter else (two.response.refresh_s.value or 0.0) / 2
    behind_s = (two.response.lag_s.value or 0.0) - (one.response.lag_s.value or 0.0)
    figure = compare(one.series, two.series, lag_s=behind_s + held_s)
    what = f"against {two.channel_source}"
    expected = f"equal to {_AGREEMENT:.0%}"
    if figure.value is None:
        return Row(one.label, what, "?", expected, UNKNOWN, figure.why)
    u = figure.u or 0.0
    percent = round(100 * figure.value, 1) or 0.0  # not -0.0
    seen = f"{percent:+.1f} ± {100 * u:.1f} %"
    if u > 2 * _AGREEMENT:
        return Row(one.label, what, seen, expected, UNKNOWN, "its uncertainty is too large")
    return _judged(one, what, seen, expected, abs(figure.value) <= _AGREEMENT + u)


# --- the machine, and lanes -----------------------------------------------------------------------


def _machine_rows(found: Probe) -> Iterable[Row]:
    """Whether the machine was quiet enough for what was found."""
    ran = found.loads.get("cpu")
    if ran is not None and ran.cpu_part is not None:
        good = ran.cpu_part >= _ENOUGH_CPU
        why = "" if good else "the machine is busy: repeat it when it is idle"
        verdict = AS_EXPECTED if good else NOT_AS_EXPECTED
        seen, expected = f"{ran.cpu_part:.0%} of the CPUs", f"over {_ENOUGH_CPU:.0%}"
        yield Row("this machine", "CPU load", seen, expected, verdict, why)
    if found.others_cpus is not None:
        good = found.others_cpus <= _QUIET_CPUS
        why = "" if good else "it disturbs what moves a sensor, and makes u larger"
        verdict = AS_EXPECTED if good else NOT_AS_EXPECTED
        seen, expected = f"{found.others_cpus:.2f} CPUs", f"up to {_QUIET_CPUS:g} CPUs"
        yield Row("this machine", "other work", seen, expected, verdict, why)


def _lane_rows(rows: LaneRows, loads: Mapping[str, Ran]) -> list[Row]:
    kind = SensorSpec(rows.lane.spec).kind
    median_s, slow_s = (np.quantile(rows.read_ns, (0.5, 0.99)) / NS_PER_S).tolist()
    limit_s = _COSTS_S.get(kind, _COST_S)
    label = f"reading {kind.replace('-dense', '')}"
    seen = f"{_us(median_s)}, 99%: {_us(slow_s)}"
    verdict = AS_EXPECTED if median_s <= limit_s else NOT_AS_EXPECTED
    result = [Row(label, "cost of a read", seen, f"up to {_us(limit_s)}", verdict)]
    if kind == "nvml-processes":
        result += _process_rows(rows, loads)
    return result


def _process_rows(rows: LaneRows, loads: Mapping[str, Ran]) -> Iterable[Row]:
    """Whether the driver lists who computes on each GPU, and names our own process."""
    expected = "names the GPU load"
    boards: dict[str, list[int]] = {}
    for index, channel in enumerate(rows.lane.channels):
        if channel.quantity == "identity" and channel.reading.startswith("pid"):
            boards.setdefault(channel.device, []).append(index)
    for indices in boards.values():
        channel = rows.lane.channels[indices[0]]
        ran = _loads_of(channel, loads).get("gpu")
        label = f"gpu:{channel.labels.get('index', '?')}  processes"
        values = rows.values[indices]
        pids = set(np.unique(values[np.isfinite(values) & (values > 0)]).astype(int).tolist())
        listed = f"lists {len(pids)}"
        if ran is None or ran.problem:
            why = f"no GPU load: {ran.problem}" if ran else "no GPU load ran"
            yield Row(label, "process list", listed, expected, UNKNOWN, why)
        elif pids & set(ran.pids):
            yield Row(label, "process list", f"{listed}, with ours", expected, AS_EXPECTED)
        elif ran.gpus is None:
            why = "it is unknown on which GPUs the GPU load ran"
            yield Row(label, "process list", f"{listed}, not ours", expected, UNKNOWN, why)
        elif pids:
            why = "it lists PIDs of another namespace, or only other users' processes"
            yield Row(label, "process list", f"{listed}, not ours", expected, NOT_AS_EXPECTED, why)
        else:
            why = "whose energy it is cannot be told here: use --attribution device"
            yield Row(label, "process list", "empty", expected, NOT_AS_EXPECTED, why)


# --- what follows ---------------------------------------------------------------------------------


def _budget(sensors: Sequence[_Sensor]) -> list[dict[str, Any]]:
    """For each counted device, ± of windows (k = 2) as parts of their energy, at the mean power.

    The terms are those of docs/measurement.md, F, with the figures that were found.
    """
    result = []
    for sensor in sensors:
        response, source = sensor.response, sensor.source
        mean_w = response.mean_w
        if not source.in_total or not mean_w or mean_w <= 0:
            continue
        refresh_s = response.refresh_s.value or (1e-3 if sensor.is_rapl else 0.1)
        swings_w = [w.value for w in response.watts.values() if w.value is not None]
        window_s = response.window_s.value or response.smoothing_s.value or 2 * source.lag_s
        if source.counter:
            edges_j = mean_w * refresh_s / math.sqrt(6)
        elif swings_w:
            edges_j = max(swings_w) * max(refresh_s, window_s) * math.sqrt(2 / 12)
        else:  # no load ran: how much its power changes within a window is unknown
            edges_j = math.nan
        parts: dict[str, float | None] = {}
        for window in _WINDOWS_S:
            energy_j = mean_w * window
            terms = (source.gain * energy_j, source.offset_w * window, edges_j)
            parts[f"{window:g}"] = known(2 * math.hypot(*terms) / energy_j)
        result.append({"sensor": sensor.label, "mean_w": mean_w, "u_of_window_s": parts})
    return result


def _not_tried(found: Probe, sensors: Sequence[_Sensor]) -> list[str]:
    """What a check does and could not do here, and why."""
    tried = {sensor.source.kind for sensor in sensors}
    missing = []
    if "gpu" not in tried:
        missing.append("GPU sensors: none was found")
    for name, ran in found.loads.items():
        if ran.problem:
            missing.append(f"{name.upper()} load: {ran.problem}")
    rapl = {sensor.channel_source for sensor in sensors if sensor.is_rapl}
    if not rapl:
        missing.append("RAPL: neither perf nor powercap can be read here")
    elif len(rapl) == 1:
        other = "powercap" if "perf" in rapl else "perf"
        missing.append(f"RAPL in two ways: {other} cannot be read here")
    if not any(s.is_nvml and s.source.counter for s in sensors) and "gpu" in tried:
        missing.append("a GPU's counter against its power: no GPU has a counter here")
    if not tried or not rapl:
        missing.append("pepr-profile sensors prints why a sensor is missing, and what unlocks it")
    return missing


# --- as JSON --------------------------------------------------------------------------------------


def _facts(sensor: _Sensor) -> dict[str, Any]:
    response, source = sensor.response, sensor.source
    moved = moved_by(response)
    return {
        "device": sensor.device,
        "kind": source.kind,
        "source": sensor.channel_source,
        "domain": domain_of(source) or None,
        "counter": source.counter,
        "via": "daemon" if sensor.via_daemon else None,
        "in_total": source.in_total,
        "moved_by": sorted(moved),
        "covers": _covers("gpu" if sensor.is_nvml else source.kind, moved),
        "changes": response.changes,
        "refresh_s": _plain(response.refresh_s),
        "window_s": _plain(response.window_s),
        "smoothing_s": _plain(response.smoothing_s),
        "lag_s": _plain(response.lag_s),
        "idle_w": _plain(response.idle_w),
        "load_w": {name: _plain(watts) for name, watts in response.watts.items()},
        "range_j": source.range_j or None,
    }


def _covers(kind: str, moved: set[str]) -> str | None:
    """What a sensor measures, as far as the loads show it; None where they do not."""
    if moved >= {"cpu", "gpu"}:
        return "module" if kind == "gpu" else kind
    if moved == {"gpu"}:
        return "gpu"
    return "cpu" if moved == {"cpu"} and kind != "gpu" else None


def _plain(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "u": figure.u, "why": figure.why}


def _load_facts(ran: Ran) -> dict[str, Any]:
    return {
        "by": ran.by,
        "bursts": len(ran.bursts.begin_s),
        "cpu_part": ran.cpu_part,
        "problem": ran.problem,
    }


def _driver_versions(lanes: Iterable[LaneInfo]) -> dict[str, str]:
    """The versions of the drivers that were read, where their channels say them."""
    nvml = (lane for lane in lanes if SensorSpec(lane.spec).kind.startswith("nvml"))
    versions = (c.labels.get("driver", "") for lane in nvml for c in lane.channels)
    version = next(filter(None, versions), "")
    return {"nvidia": version} if version else {}


# --- numbers for people ---------------------------------------------------------------------------


def _shown_s(figure: Figure) -> str:
    return format_with_u(figure.value, figure.u, "s")


def _shown_w(figure: Figure) -> str:
    sign = "+" if (figure.value or 0.0) >= 0 else ""
    return sign + format_with_u(figure.value, figure.u, "W")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"
