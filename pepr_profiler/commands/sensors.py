"""`pepr-profile sensors`: what can be measured here, and why the rest cannot."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pepr_profiler import _core
from pepr_profiler.commands import complain, require_writable, say, write_stdout, write_text
from pepr_profiler.daemon_client.client import DaemonClient, RemoteLane
from pepr_profiler.energy.sources import UNITS, Source, find_sources
from pepr_profiler.errors import SensorError, UsageError
from pepr_profiler.sensors.detect import detect
from pepr_profiler.sensors.machine import Surroundings, read_cpu_identity, read_surroundings
from pepr_profiler.sensors.remedy import remedy
from pepr_profiler.sensors.spec import KINDS, SensorSpec, lanes_by_name
from pepr_profiler.trace.lane import LaneInfo, describe
from pepr_profiler.units import format_quantity, known

_Opened = tuple[LaneInfo, _core.Sampler | RemoteLane]

_LOOK_S = 0.6  # six refreshes of the slowest sensors in common use (100 ms)

# RAPL is refreshed each millisecond. A call of a GPU's driver may take milliseconds itself.
_PERIOD_NS = {"perf": 200_000, "powercap": 200_000}
_OTHER_PERIOD_NS = 5_000_000

_OPEN_S = 5.0
_WIDTH = 80
_LABEL = 30


def _look_period_ns(spec: SensorSpec) -> int:
    return _PERIOD_NS.get(spec.kind, _OTHER_PERIOD_NS)


@click.command()
@click.option("--sensor", "specs", multiple=True, metavar="KIND[:WHERE]", help="Look at this one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--check", is_flag=True, help="Try the sensors under a load: up to a minute.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="With --check, write what was found.",
)
def sensors(*, specs: tuple[str, ...], as_json: bool, check: bool, output: Path | None) -> None:
    """Open each sensor, read it for a moment, and print what it gives.

    With --check, load all CPUs in bursts, then each GPU that torch or cupy sees, and find out how
    each sensor answers: how often it is refreshed, over what time it averages, how far it lags,
    what it covers, and whether sensors of one device agree. It takes up to a minute, needs no
    root, and is best done on a machine that is otherwise idle.
    """
    here = read_surroundings()
    if output is not None:
        _refuse_output(output, check=check)
    if check:
        _check(specs, here, as_json=as_json, output=output)
        return
    recorded = specs or detect()
    client = DaemonClient()
    opened, missing = _open(specs or _with_others(recorded), here, client, named=bool(specs))
    if opened:
        time.sleep(_LOOK_S)  # refreshes and power are seen from counters that change
    channels = _describe(opened, recorded)
    client.close()
    if as_json:
        found = {"place": here._asdict(), "recorded": recorded}
        click.echo(json.dumps({**found, "channels": channels, "missing": missing}, indent=1))
        return
    say(f"sensors of {os.uname().nodename}, seen by {here}\n")
    say("\n".join([*_measured(channels), *_missing(missing)]).rstrip())


def _with_others(recorded: tuple[str, ...]) -> tuple[str, ...]:
    """With the sensors that detection left out: to show that they are there, or why not."""
    kinds = {SensorSpec(spec).kind for spec in recorded}
    return (*recorded, *(kind for kind in KINDS if kind not in kinds))


def _refuse_output(output: Path, *, check: bool) -> None:
    """A usage error, before anything starts, if the file of `-o` could not be written."""
    if not check:
        raise UsageError(
            "-o is for what a check has found",
            why="without --check nothing is tried",
            fix=f"add --check, or use: pepr-profile sensors --json > {shlex.quote(str(output))}",
        )
    fix = "name a .json file in a folder that exists and is writable"
    if output.suffix != ".json":
        raise UsageError(f"cannot write {output}", why="its name does not end in .json", fix=fix)
    require_writable(output, fix=fix)


def _check(
    specs: tuple[str, ...], here: Surroundings, *, as_json: bool, output: Path | None
) -> None:
    """Tries the sensors under loads, prints what was found, and writes it."""
    from pepr_profiler.check.findings import examine
    from pepr_profiler.check.load import ProcessLoad
    from pepr_profiler.check.probe import check_period_ns, check_specs, probe
    from pepr_profiler.report.check_text import check_text

    wanted = check_specs(specs or _with_others(detect()))
    client = DaemonClient()
    opened, _ = _open(wanted, here, client, named=bool(specs), period_ns=check_period_ns)
    channels = [channel for lane, _ in opened for channel in lane.channels]
    loads = {}
    if any(channel.quantity in UNITS for channel in channels):
        loads["cpu"] = ProcessLoad("cpu")
        if any("model" in c.labels or c.labels.get("chip") == "amdgpu" for c in channels):
            loads["gpu"] = ProcessLoad("gpu")
        devices = ", then ".join(f"the {name.upper()}s" for name in loads)
        complain(f"loading {devices} in bursts, for up to a minute")
    found = probe(opened, loads)
    for _, lane in opened:
        lane.stop(1.0)
    client.close()
    findings = examine(found)
    text = json.dumps(findings, indent=1, ensure_ascii=False)
    if output is not None:
        write_text(output, text + "\n")
    if as_json:
        write_stdout(text + "\n")
    else:
        say(check_text(findings))
    if output is not None and not as_json:
        say(f"\nwritten to {output}\n{findings['privacy']}")


def _open(
    specs: tuple[str, ...],
    here: Surroundings,
    client: DaemonClient,
    *,
    named: bool,
    period_ns: Callable[[SensorSpec], int] = _look_period_ns,
) -> tuple[list[_Opened], list[dict[str, str]]]:
    """The sensors that can be read, by ourselves or through the daemon, and what is missing."""
    lanes = lanes_by_name(specs)
    periods_ns = [period_ns(spec) for spec in lanes.values()]
    samplers = [_core.Sampler(s, p) for s, p in zip(lanes.values(), periods_ns, strict=True)]
    deadline = time.monotonic() + _OPEN_S
    opened: list[_Opened] = []
    missing = []
    for (name, spec), every_ns, own in zip(lanes.items(), periods_ns, samplers, strict=True):
        failure: SensorError | None = None
        try:
            if not own.wait_ready(max(0.0, deadline - time.monotonic())):
                why = f"its driver has not answered for {_OPEN_S:.0f} s"
                missing.append({"what": spec, "why": why, "fix": "see dmesg for its driver"})
                continue
        except SensorError as error:
            failure = error
        # As a recording does: what we may not read, in part or at all, the daemon may give us.
        ask = failure is not None or any(note.denied for note in own.notes)
        if ask and (lane := client.lane(spec, named=named)):
            info = LaneInfo(f"daemon {lane.name}", lane.spec, lane.period_ns, lane.channels)
            opened.append((info, lane))
        elif failure is None:
            opened.append((LaneInfo(name, spec, every_ns, describe(own.channels)), own))
            missing += [remedy(spec, note, here) for note in own.notes]
        elif not client.covers(spec):
            missing.append(remedy(spec, failure, here))
    return opened, missing


def _describe(opened: list[_Opened], recorded: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each channel has read, and whether a recording counts it."""
    vendor = read_cpu_identity().vendor or ""
    sources = find_sources([lane for lane, _ in opened], cpu_vendor=vendor)
    by_channel = {(source.lane, source.channel): source for source in sources}
    channels = []
    for lane, sampler in opened:
        through_daemon = not isinstance(sampler, _core.Sampler)
        sampler.stop(1.0)
        of_lane = [by_channel.get((lane.name, index)) for index in range(len(lane.channels))]
        for source, facts in zip(of_lane, _read(lane, of_lane, sampler), strict=True):
            used = source is not None and source.in_total
            facts["via"] = "daemon" if through_daemon else None
            facts["component"] = source.id if source else None
            facts["label"] = source.label if source else None
            facts["in_total"] = used and (through_daemon or lane.spec in recorded)
            facts["excluded"] = source.excluded if source else ""
            if used and not facts["in_total"]:
                facts["excluded"] = "not recorded: what is recorded covers it"
            channels.append(facts)
    return channels


def _read(
    lane: LaneInfo, sources: Sequence[Source | None], sampler: _core.Sampler | RemoteLane
) -> list[dict[str, Any]]:
    """What each channel of a lane read, how often it changed, and how long a read took."""
    import numpy as np

    batches = list(iter(sampler.read, None))
    t_ns = np.concatenate([np.frombuffer(b[1], dtype=np.int64) for b in batches])
    t_s = t_ns * 1e-9
    read_s = np.concatenate([np.frombuffer(b[2], dtype=np.uint32) for b in batches]) * 1e-9
    result = []
    for index, (channel, source) in enumerate(zip(lane.channels, sources, strict=True)):
        values = np.concatenate([np.frombuffer(b[3][index]) for b in batches])
        sound = np.isfinite(values) if source is None else source.knows(values)
        if source is not None:
            sound[sound] = source.readings().screen(t_ns[sound], values[sound]).sound
        values, at_s = values[sound] * channel.scale, t_s[sound]
        steps = np.diff(values)
        moved_s = at_s[1:][steps != 0]
        refresh_s = power_w = None
        if len(moved_s) >= _core.FEWEST_REFRESH_CHANGES:
            refresh_s = float(np.median(np.diff(moved_s)))
        if channel.quantity == "power" and channel.unit == "W" and len(values):
            power_w = float(values[-1])
        elif channel.quantity == "energy" and channel.unit == "J" and len(moved_s) > 1:
            # From change to change: a counter says nothing about the time since. One that fell has
            # wrapped or was reset; what it did between the others is enough for so short a look.
            step_j, span_s = steps[steps != 0][1:], np.diff(moved_s)
            rose = step_j > 0
            power_w = float(step_j[rose].sum() / span_s[rose].sum()) if rose.any() else None
        result.append(
            {
                "sensor": lane.spec,
                "channel": channel.name,
                "source": channel.source,
                "quantity": channel.quantity,
                "value": float(values[-1]) if len(values) else None,
                "unit": channel.unit,
                "power_w": known(power_w),
                "refresh_s": refresh_s,
                "looked_every_s": lane.period_ns * 1e-9,
                "lane_read_us": float(np.median(read_s)) * 1e6,
            }
        )
    return result


def _measured(channels: list[dict[str, Any]]) -> list[str]:
    """For each sensor what a read costs, and two lines a component: power and use, and its id."""
    lines = []
    for spec, group in itertools.groupby(channels, key=lambda channel: channel["sensor"]):
        found = list(group)
        cost = format_quantity(found[0]["lane_read_us"] * 1e-6, "s")
        who = ", read by this machine's daemon" if found[0]["via"] else ""
        lines += _wrapped(f"{spec}  one read of all takes {cost}{who}", "  ", " " * 6)
        beside: list[str] = []
        names: list[str] = []
        for c in found:
            value = format_quantity(c["value"], c["unit"])
            if c["unit"] == "1" and c["value"] is not None:
                value = f"{c['value']:.0%}"
            if c["component"] is None:
                beside.append(f"{c['source']} {value}")
                names.append(c["source"])
                continue
            use = "in the total" if c["in_total"] else f"not added: {c['excluded']}"
            label = c["label"]
            if len(label) > _LABEL:
                lines.append(f"    {label}")
                label = ""
            now = format_quantity(c["power_w"], "W")
            row = f"    {label:<{_LABEL}} {now:>9} {_refresh(c):>9}  "
            first, *rest = textwrap.wrap(use, _WIDTH - len(row))
            lines += [row + first, *(" " * len(row) + more for more in rest)]
            lines += _wrapped(f"{c['component']}  ({c['source']})", " " * 6)
        if len(beside) > len(set(names)):  # several devices give the same: names are enough
            beside = list(dict.fromkeys(names))
        lines += _wrapped("also recorded: " + ", ".join(beside), " " * 4) if beside else []
        lines.append("")
    if any(c["in_total"] for c in channels):
        heads = f"    {'measured':<{_LABEL}} {'now':>9} {'refresh':>9}  use"
        return [heads, "", *lines]
    return [*lines, "  no energy sensor: CPU and memory energy are estimated from utilisation", ""]


def _refresh(channel: dict[str, Any]) -> str:
    """The refresh period, "< …" if it is too short to be seen, "not seen" if too long."""
    refresh_s, step_s = channel["refresh_s"], channel["looked_every_s"]
    if refresh_s is None:
        return "not seen"
    if refresh_s < 1.5 * step_s:
        return f"< {1e3 * step_s:.1f} ms"
    return str(format_quantity(refresh_s, "s"))


def _missing(missing: list[dict[str, str]]) -> list[str]:
    lines = []
    for item in missing:
        lines += _wrapped(f"missing  {item['what']}", "  ", " " * 11)
        lines += _wrapped(f"why  {item['why']}", " " * 11, " " * 16)
        lines += [*_wrapped(f"fix  {item['fix']}", " " * 11, " " * 16), ""]
    return lines


def _wrapped(text: str, indent: str, rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent if rest is None else rest,
        break_on_hyphens=False,
        break_long_words=False,  # a command must stay one that can be copied
    )
