"""A check of this machine's sensors as text."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

_WIDTH = 80
_WHAT, _SEEN, _EXPECTED = 18, 24, 21


def check_text(findings: Mapping[str, Any]) -> str:
    """The table of a check, the uncertainties that follow from it, and what was not tried."""
    lines = [*_machine(findings), "", *_table(findings["rows"]), *_budget(findings["budget"])]
    if findings["not_tried"]:
        lines.append("not tried")
        for text in findings["not_tried"]:
            lines += _wrapped(text, "  ", "    ")
        lines.append("")
    counts = [sum(row["verdict"] == verdict for row in findings["rows"]) for verdict in _VERDICTS]
    parts = (f"{count} {verdict}" for count, verdict in zip(counts, _VERDICTS, strict=True))
    return "\n".join([*lines, ", ".join(parts)])


_VERDICTS = ("as expected", "not as expected", "cannot be told")


def _machine(findings: Mapping[str, Any]) -> list[str]:
    machine = findings["machine"]
    place = [f"{machine['cpus']} CPUs", f"Linux {machine['kernel']}"]
    place += [f"NVIDIA driver {v}" for k, v in findings["drivers"].items() if k == "nvidia"]
    place += [name for name in ("container", "virtual") if machine[name]]
    lines = _wrapped(f"check of the sensors of {machine['cpu']}, {', '.join(place)}", "")
    for name, load in findings["loads"].items():
        if load["problem"]:
            lines += _wrapped(f"{name.upper()} load  none: {load['problem']}", "  ", " " * 12)
            continue
        part = "" if load["cpu_part"] is None else f", {load['cpu_part']:.0%} of the CPUs"
        lines.append(f"  {name.upper()} load  {load['bursts']} bursts by {load['by']}{part}")
    others, stolen = findings["others_cpus"], findings["stolen_cpus"]
    if others is not None:
        stolen_too = f", {stolen:.2f} taken by the hypervisor" if stolen and stolen > 0.01 else ""
        lines.append(f"  meanwhile {others:.2f} CPUs of other work{stolen_too}")
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["no sensor of energy can be read here", ""]
    lines = []
    for sensor, group in itertools.groupby(rows, key=lambda row: row["sensor"]):
        lines += _wrapped(sensor, "")
        for row in group:
            cells = f"  {row['what']:<{_WHAT}}"
            if len(row["what"]) >= _WHAT:
                lines.append(cells)
                cells = " " * (2 + _WHAT)
            cells += f"{row['seen']:<{_SEEN}}"
            if len(row["seen"]) >= _SEEN:
                lines.append(cells)
                cells = " " * (2 + _WHAT + _SEEN)
            lines.append(f"{cells}{row['expected']:<{_EXPECTED}}{row['verdict']}".rstrip())
            if row["why"]:
                lines += _wrapped(row["why"], " " * (2 + _WHAT))
        lines.append("")
    head = f"  {'':<{_WHAT}}{'seen':<{_SEEN}}{'expected':<{_EXPECTED}}verdict"
    return [head, *lines]


def _budget(budget: list[dict[str, Any]]) -> list[str]:
    if not budget:
        return []
    windows = list(budget[0]["u_of_window_s"])
    heads = "".join(f"{window + ' s':>9}" for window in windows)
    lines = [f"{'± of a window (k = 2, at the mean power)':<44}{heads}"]
    for entry in budget:
        cells = "".join(
            f"{'?' if part is None else f'{part:.1%}':>9}"
            for part in entry["u_of_window_s"].values()
        )
        lines.append(f"  {entry['sensor'][:41]:<42}{cells}")
    return [*lines, ""]


def _wrapped(text: str, indent: str, rest: str | None = None) -> list[str]:
    rest = indent if rest is None else rest
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=rest)
