"""`pepr-profile sensors`: what can be measured here, and why the rest cannot."""

from __future__ import annotations

import json
import time
from typing import Any

import click

_LOOK_S = 0.3
_PERIOD_NS = 10_000_000


@click.command()
@click.option("--sensor", "specs", multiple=True, metavar="KIND[:WHERE]", help="Look at this one.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def sensors(*, specs: tuple[str, ...], as_json: bool) -> None:
    """Open each sensor, read it for a moment, and say what it gives."""
    from pepr_profiler import _core
    from pepr_profiler.profiler import DETECTED

    chosen = specs or DETECTED
    lanes = {spec: _core.Sampler(spec, _PERIOD_NS) for spec in chosen}
    time.sleep(_LOOK_S)  # what it looks at is the passing of time
    found: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for spec, sampler in lanes.items():
        channels, notes = _look(spec, sampler)
        found += channels
        missing += notes
    if as_json:
        click.echo(json.dumps({"channels": found, "missing": missing}, indent=1))
        return
    _print(found, missing)


def _look(spec: str, sampler: Any) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    import numpy as np

    from pepr_profiler.energy import find_sources
    from pepr_profiler.errors import SensorError
    from pepr_profiler.trace import Lane, describe

    try:
        if not sampler.wait_ready(5.0):
            why = "its driver has not answered for 5 s"
            return [], [{"what": spec, "why": why, "fix": "see dmesg for its driver"}]
    except SensorError as error:
        return [], [{"what": error.what, "why": error.why, "fix": error.fix}]
    sampler.stop(1.0)
    lane = Lane(spec.partition(":")[0], spec, _PERIOD_NS, describe(sampler.channels))
    rows = sampler.read()
    read_us = float(np.median(np.frombuffer(rows[2], dtype=np.uint32))) / 1e3
    used = {source.channel: source for source in find_sources([lane])}
    channels = []
    for index, (channel, column) in enumerate(zip(lane.channels, rows[3], strict=True)):
        source = used.get(index)
        last = np.frombuffer(column)[-1] * channel.scale
        channels.append(
            {
                "sensor": spec,
                "channel": channel.name,
                "quantity": channel.quantity,
                "value": float(last) if np.isfinite(last) else None,
                "unit": channel.unit,
                "component": source.id if source else None,
                "in_total": source.in_total if source else False,
                "excluded": source.excluded if source else "",
                "lane_read_us": read_us,
            }
        )
    notes = [{"what": n.what, "why": n.why, "fix": n.fix} for n in sampler.notes]
    return channels, notes


def _print(found: list[dict[str, Any]], missing: list[dict[str, str]]) -> None:
    from pepr_profiler.units import format_quantity

    for channel in found:
        value = format_quantity(channel["value"], channel["unit"])
        if channel["unit"] == "1" and channel["value"] is not None:
            value = f"{channel['value']:.0%}"
        use = "in the total" if channel["in_total"] else channel["excluded"] or "recorded beside"
        click.echo(f"{channel['channel']:<32} {channel['quantity']:<12} {value:>12}  {use}")
    if not found:
        click.echo("no energy sensor: CPU and memory energy will be modelled from utilisation")
    for note in missing:
        click.echo(f"missing  {note['what']}: {note['why']}")
        if note["fix"]:
            click.echo(f"         fix: {note['fix']}")
