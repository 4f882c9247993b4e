"""What the screen of a job has beside that of a run: its ranks, their waits, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pepr_profiler.report.components import energy_text
from pepr_profiler.report.text import Line, TextColumn, printable, table, table_cells
from pepr_profiler.units import (
    format_duration,
    format_percent,
    format_quantity,
    format_with_u,
    ratio,
)

_MOST_RANKS, _MOST_NODES, _MOST_WAITS = 12, 12, 8
_NAME_CELLS = 18
_GAP = "   "
_NAMED = 12


def job_name(summary: Mapping[str, Any]) -> str:
    """The job, how many ranks of it were recorded, and on how many nodes."""
    job = summary.get("job")
    ranks = sum(rank["rank"] is not None for rank in summary["ranks"])
    nodes = len(summary["nodes"])
    parts = []
    if ranks:
        size = summary.get("world_size") or ranks
        parts.append(f"{ranks:,} rank{'s' * (ranks != 1)}" if ranks >= size else
                     f"{ranks:,} of {size:,} ranks")  # fmt: skip
    if nodes > 1:
        parts.append(f"{nodes:,} nodes")
    name = f"job {job}" if job is not None else "job"
    return f"{name} ({', '.join(parts)})" if parts else name


def missing_rank_notes(summary: Mapping[str, Any]) -> list[str]:
    """That the total lacks ranks, and what it may be with them."""
    missing, imputed = summary.get("missing_ranks"), summary["energy"].get("imputed")
    if not missing or imputed is None:
        return []
    which = f"{ranks_text(missing)} of {summary.get('world_size'):,}"
    notes = [f"lower bound: there is no recording of rank {which}"]
    if imputed["total_j"] is not None:
        total = format_with_u(imputed["total_j"], imputed["u_j"], "J")
        notes.append(f"with them perhaps {total}: {imputed['how']}")
    else:
        notes.append(f"what they took is unknown: {imputed['how']}")
    return notes


def ranks_text(ranks: Sequence[int]) -> str:
    """Numbers in order, ranges together: "0-3, 7"."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = [f"{a}-{b}" if b > a else str(a) for a, b in ranges[:_NAMED]]
    return ", ".join(shown) + (" …" if len(ranges) > _NAMED else "")


def rank_name(rank: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """A rank, with its node where there are several; what a recording has besides its ranks."""
    host = rank["host"] or rank["node"]
    if rank["rank"] is not None:
        name = f"rank {rank['rank']}"
        return printable(f"{name} {host}" if len(summary["nodes"]) > 1 else name)
    divided = any(node["ranks"] for node in summary["nodes"] if node["host"] == rank["host"])
    return printable(f"rest of {rank['run_id']}" if divided else f"{host} {rank['run_id']}")


def shown_ranks(summary: Mapping[str, Any], most: int) -> Sequence[Mapping[str, Any]]:
    """All ranks, or of many those that took most."""
    ranks: Sequence[Mapping[str, Any]] = summary["ranks"]
    if len(ranks) <= most:
        return ranks
    return sorted(ranks, key=lambda rank: -(rank["energy_j"] or 0.0))[:most]


def rank_lines(summary: Mapping[str, Any], width: int) -> list[Line]:
    """The tables of ranks and of nodes, where there are several."""
    lines: list[Line] = []
    ranks, nodes = summary["ranks"], summary["nodes"]
    if len(ranks) > 1:
        shown = shown_ranks(summary, _MOST_RANKS)
        names = [rank_name(rank, summary) for rank in shown]
        lines = _shares("rank", names, shown, summary, width)
        if len(ranks) > len(shown):
            lines.append([(f"  … {len(ranks) - len(shown):,} more took less", "dim")])
    if 1 < len(nodes) < len(ranks):
        of_most = sorted(nodes, key=lambda node: -(node["energy_j"] or 0.0))[:_MOST_NODES]
        most = of_most if len(nodes) > _MOST_NODES else nodes
        names = [printable(str(node["host"] or node["node"])) for node in most]
        lines += [*([[]] if lines else []), *_shares("node", names, most, summary, width)]
        if len(nodes) > len(most):
            lines.append([(f"  … {len(nodes) - len(most):,} more took less", "dim")])
    return lines


def _shares(
    title: str,
    names: Sequence[str],
    parts: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    width: int,
) -> list[Line]:
    energy = summary["energy"]
    total = energy.get("total_j"), energy.get("u_j")
    shares = [format_percent(ratio(part["energy_j"], total[0])) for part in parts]
    memory = [format_quantity(part["peak_rss_bytes"], "B") for part in parts]
    columns = [
        TextColumn("energy", [energy_text(part, like=total) for part in parts]),
        TextColumn("share", shares),
        TextColumn("time", [format_duration(part["duration_s"]) for part in parts]),
        TextColumn("RAM", memory),
    ]
    if any(part["gpu_peak_bytes"] is not None for part in parts):
        on_gpus = [format_quantity(part["gpu_peak_bytes"], "B") for part in parts]
        columns.append(TextColumn("GPU", on_gpus))
        if width - table_cells(_NAME_CELLS, columns, _GAP) < 0:
            columns.pop(-2)
    spare = width - table_cells(0, columns, _GAP)
    room = max(_NAME_CELLS, min(spare, max(map(len, names))))
    return table(title, names, columns, room=room, gap=_GAP)


def wait_lines(summary: Mapping[str, Any], width: int) -> list[Line]:
    """How long ranks waited at the end of phases: those that waited longest, and who was last."""
    waits = [wait for wait in summary["stragglers"] if wait["passes"]]
    if not waits:
        return []
    shown = sorted(waits, key=lambda wait: -wait["total_s"])[:_MOST_WAITS]
    names = [f"{wait['phase']} {wait_name(wait)}" for wait in shown]
    columns = [
        TextColumn("median", [format_duration(wait["median_s"]) for wait in shown]),
        TextColumn("longest", [format_duration(wait["max_s"]) for wait in shown]),
        TextColumn("in all", [format_duration(wait["total_s"]) for wait in shown]),
        TextColumn("was last", [f"{wait['was_last']} of {wait['passes']}" for wait in shown]),
    ]
    spare = width - table_cells(0, columns, _GAP)
    room = max(_NAME_CELLS, min(spare, max(map(len, names))))
    lines = table("waited after", names, columns, room=room, gap=_GAP)
    if len(waits) > len(shown):
        lines.append([(f"  … {len(waits) - len(shown):,} more waited less", "dim")])
    return lines


def wait_name(wait: Mapping[str, Any]) -> str:
    """Who waited: a rank, or a recording in which no rank is known."""
    return str(wait["run_id"]) if wait["rank"] is None else f"rank {wait['rank']}"


def recordings_text(summary: Mapping[str, Any]) -> str:
    """Which recordings the job is made of."""
    runs = [printable(str(run)) for run in summary["runs"]]
    more = f" and {len(runs) - _NAMED:,} more" if len(runs) > _NAMED else ""
    count = f"{len(runs):,} recording{'s' * (len(runs) != 1)}"
    return f"{count}: {', '.join(runs[:_NAMED])}{more}"
