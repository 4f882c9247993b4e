"""The page of one run: its power and energy over time, by device and by phase."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pepr_profiler import units
from pepr_profiler.energy.sources import KINDS
from pepr_profiler.energy.uncertainty import LINEAR_CAUSES
from pepr_profiler.report import figures, run_figures, study_figures
from pepr_profiler.report.components import component_name, counted, energy_text, kind_of
from pepr_profiler.report.html import clip, render
from pepr_profiler.report.job_text import (
    job_name,
    missing_rank_notes,
    rank_name,
    shown_ranks,
    wait_name,
)
from pepr_profiler.report.run_text import stop_note
from pepr_profiler.study import progress
from pepr_profiler.summary.timeline import Timeline
from pepr_profiler.units import format_duration, format_percent, format_quantity, format_with_u

_MOST_PHASES, _MOST_RANKS, _MOST_DEVICES = 60, 64, 200

_CAUSES = {
    "gain_j": ("gain", "the scale of the sensor, which is fixed for its board"),
    "offset_j": ("offset", "what the sensor adds at any power, fixed for its board"),
    "model_j": ("model", "there is no sensor: a power model of the processor and the memory"),
    "edges_j": ("edges", "the sensor's refreshes do not coincide with the run's begin and end"),
    "duty_j": ("duty cycle", "the sensor measures during a part of each refresh period only"),
    "lag_j": ("lag", "readings lag behind the power that they report"),
    "quantisation_j": ("steps", "the sensor counts in steps"),
    "gaps_j": ("gaps", "times without a reading"),
    "aliasing_j": ("aliasing", "the load repeats nearly in step with the sensor"),
    "disagreement_j": ("disagreement", "its counter and its power readings contradict each other"),
    "attribution_j": ("sharing", "the job's part of a device is inferred from how much it used it"),
}


def run_page(
    summary: Mapping[str, Any], timeline: Timeline, *, curve: progress.ProgressCurve | None = None
) -> str:
    """The page of one run, from its summary and the run over time.

    `curve` is what to show against the energy, else `progress.curve_shown` chooses.
    """
    energy = summary["energy"]
    total = energy.get("total_j"), energy.get("u_j")
    whole = energy.get("scope") == "device"  # the whole devices, whoever used them
    whose = "The devices'" if whole else "This job's"
    status, status_class = _status(summary)
    name = str(summary.get("name") or summary.get("run_id") or "")
    name = clip(f"{job_name(summary)}: {name}" if summary.get("ranks") else name, 120)
    shown_energy = energy_text(energy, "total_j")
    steps = run_figures.step_text(timeline)
    duration_s = float(timeline.edges_s[-1])
    charts = {
        "power": figures.chart(
            "power",
            "Power over time by device",
            f"{whose} power was {format_quantity(energy.get('mean_w'), 'W')} on average over "
            f"{format_duration(duration_s)}. The table of devices has the numbers.",
            lambda width: run_figures.power_over_time(timeline, width),
        ),
        "energy": figures.chart(
            "energy",
            "Energy so far",
            f"{whose} energy rises to {shown_energy}.",
            lambda width: run_figures.energy_over_time(timeline, width),
        ),
    }
    if timeline.components:
        charts["devices"] = figures.chart(
            "devices",
            "Power of each device",
            "One panel per device. The table of devices has mean and peak power.",
            lambda width: run_figures.devices_over_time(timeline, width),
        )
    curve = curve or progress.curve_shown(summary)
    if curve is not None:
        charts["progress"] = figures.chart(
            "progress",
            "Performance against energy",
            "The performance that was reached, against the energy spent until then.",
            lambda width: study_figures.progress_curves([curve], width=width),
        )
    phases = summary.get("phases") or []
    wh = "" if total[0] is None else format_quantity(total[0] / units.J_PER_WH, "Wh")
    return render(
        "run.html",
        scripts=["theme.js"],
        run=summary,
        name=name,
        status=status,
        status_class=status_class,
        started=_instant(summary.get("started_at")),
        duration=format_duration(summary.get("duration_s")),
        command=clip(shlex.join(summary.get("command") or []), 2000),
        energy=shown_energy,
        energy_wh=wh,
        provenance=energy.get("provenance") or "",
        provenance_text=units.format_provenance(energy.get("provenance")),
        facts=list(_facts(summary)),
        warnings=summary.get("warnings") or [],
        missing=summary.get("missing") or [],
        charts=charts,
        whole=whole,
        whose=whose,
        steps=steps,
        hatched=any(c.gaps_s for c in timeline.components if c.in_total),
        banded=any(c.low_w is not None for c in timeline.components),
        progress=_progress_text(curve),
        components=list(_components(energy)),
        more_devices=max(0, len(energy.get("components") or ()) - _MOST_DEVICES),
        phases=list(_phases(phases, total)),
        more_phases=max(0, len(phases) - _MOST_PHASES),
        lacking=missing_rank_notes(summary),
        ranks=list(_ranks(summary)),
        more_ranks=max(0, len(summary.get("ranks") or ()) - _MOST_RANKS),
        waits=list(_waits(summary)),
        budget=list(_budget(energy)),
        checks=_cross_checks(energy),
        metrics=_metrics(summary),
        method=_method(energy),
        quality=_quality(summary),
    )


def _status(summary: Mapping[str, Any]) -> tuple[str, str]:
    if not summary.get("complete"):
        return "incomplete: it was killed or still runs", "incomplete"
    code = summary.get("exit_code")
    if code is None:
        return "", ""
    return ("finished", "ok") if code == 0 else (f"failed, exit status {code}", "failed")


def _instant(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return "at an unknown time"


def _facts(summary: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """The name of each, its value, and what else there is to say of it."""
    yield "Mean power", format_quantity(summary["energy"].get("mean_w"), "W"), ""
    yield "Time", format_duration(summary.get("time_s")), ""
    performance = summary.get("performance")
    if performance:
        value = units.format_number(performance["value"])
        yield clip(str(performance["metric"]), 40), value, "performance"
    carbon = summary.get("carbon")
    if carbon:
        year = f" {carbon['year']}" if carbon.get("year") is not None else ""
        yield (
            "Carbon",
            f"{format_quantity(carbon.get('g_co2e'), 'g')} CO₂e",
            f"{carbon['intensity_g_per_kwh']:.4g} g/kWh, PUE {carbon['pue']:.2f}; "
            f"{clip(str(carbon['source']), 120)}{year}",
        )
    else:
        yield "Carbon", units.UNKNOWN, "set the place: --region CODE"
    memory = summary.get("memory") or {}
    gpu_bytes = memory.get("gpu_peak_bytes")
    yield (
        "Peak memory",
        format_quantity(memory.get("peak_rss_bytes"), "B"),
        f"and {format_quantity(gpu_bytes, 'B')} on GPUs" if gpu_bytes is not None else "",
    )


_SENSORS = {
    "nvml-energy": "NVML energy counter",
    "nvml-power-average": "NVML power, averaged",
    "nvml-power": "NVML power",
    "nvml-power-instant": "NVML power, instant",
    "powercap": "RAPL by powercap",
    "perf": "RAPL by perf",
    "utilisation": "estimated from utilisation",
    "installed-memory": "estimated from installed memory",
}


def _components(energy: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    total = energy.get("total_j"), energy.get("u_j")
    key = counted(energy)

    def place(c: Mapping[str, Any]) -> tuple[bool, int, str]:
        return not c["in_total"], KINDS.index(kind_of(c)), str(c.get("label"))

    every = energy.get("components") or []
    if len(every) > _MOST_DEVICES:
        every = sorted(every, key=lambda c: (not c["in_total"], -(c.get(key) or 0.0)))
    for c in sorted(every[:_MOST_DEVICES], key=place):
        share = units.ratio(c.get(key), total[0]) if c["in_total"] else None
        known, like = c.get(key) is not None, total if c["in_total"] else None
        sensor = clip(_SENSORS.get(c["source"], str(c["source"])), 60)
        yield {
            "name": component_name(c),
            "kind": kind_of(c),
            "in_total": c["in_total"],
            "excluded": c.get("excluded") or ("" if known else "unknown"),
            "energy": format_with_u(c.get(key), c.get("u_j"), "J", like=like),
            "share": format_percent(share, unknown=""),
            "percent": f"{100 * share:.2f}" if share is not None else "0",
            "others": _rest(c, "others_j"),
            "idle": _rest(c, "idle_j"),
            "mean": format_quantity(c.get("mean_w"), "W"),
            "peak": format_quantity(c.get("max_w"), "W"),
            "sensor": sensor,
        }


def _rest(component: Mapping[str, Any], key: str) -> str:
    """Others' or idle energy; a rounding error of the device's energy is 0."""
    value, device_j = component.get(key), component.get("device_j")
    if value is not None and device_j is not None and abs(value) < 1e-9 * device_j:
        value = 0.0
    return format_quantity(value, "J")


def _phases(
    phases: Sequence[Mapping[str, Any]], total: tuple[float | None, float | None]
) -> Iterable[dict[str, Any]]:
    for p in sorted(phases, key=lambda p: -(p["energy_j"] or 0.0))[:_MOST_PHASES]:
        share = units.ratio(p["energy_j"], total[0])
        yield {
            "name": str(p["name"]),
            "energy": energy_text(p, like=total),
            "share": format_percent(share, unknown=""),
            "percent": f"{min(100.0, 100 * share):.2f}" if share is not None else "0",
            "time": format_duration(p["duration_s"]),
            "mean": format_quantity(units.ratio(p["energy_j"], p["duration_s"]), "W"),
            "count": f"{p['count']:,}",
        }


def _ranks(summary: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """What the ranks of a job have of it; nothing of a run, or of a job of one recording."""
    ranks = summary.get("ranks") or ()
    if len(ranks) < 2:
        return
    energy = summary["energy"]
    total = energy.get("total_j"), energy.get("u_j")
    for rank in shown_ranks(summary, _MOST_RANKS):
        share = units.ratio(rank["energy_j"], total[0])
        yield {
            "name": rank_name(rank, summary),
            "energy": energy_text(rank, like=total),
            "share": format_percent(share, unknown=""),
            "percent": f"{min(100.0, 100 * share):.2f}" if share is not None else "0",
            "time": format_duration(rank["duration_s"]),
            "memory": format_quantity(rank["peak_rss_bytes"], "B"),
            "gpu_memory": format_quantity(rank["gpu_peak_bytes"], "B"),
        }


def _waits(summary: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    waits = [wait for wait in summary.get("stragglers") or () if wait["passes"]]
    for wait in sorted(waits, key=lambda wait: -wait["total_s"])[:_MOST_RANKS]:
        yield {
            "name": f"{wait['phase']}, {wait_name(wait)}",
            "median": format_duration(wait["median_s"]),
            "longest": format_duration(wait["max_s"]),
            "total": format_duration(wait["total_s"]),
            "last": f"{wait['was_last']:,} of {wait['passes']:,}",
        }


def _in_squares(values: Iterable[float]) -> float:
    return math.hypot(*values)


def _budget(energy: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    """The causes of u by size, of all devices.

    Some add up as they stand, as in the total. What sensors did not see adds in squares here; of
    GPUs that work in step it adds up in the total, which may then be more than its causes.
    """
    budgets = [
        c["budget"] for c in energy.get("components") or [] if c["in_total"] and c.get("budget")
    ]
    causes = {
        cause: 2
        * (math.fsum if cause in LINEAR_CAUSES else _in_squares)(
            budget.get(cause, 0.0) for budget in budgets
        )
        for cause in _CAUSES
    }
    largest = max(causes.values(), default=0.0)
    if not budgets or largest <= 0:
        return
    for cause, u_j in sorted(causes.items(), key=lambda item: -item[1]):
        if u_j > 0.001 * largest:
            name, what = _CAUSES[cause]
            yield {
                "cause": name,
                "u": f"± {format_quantity(u_j, 'J')}",
                "percent": f"{100 * u_j / largest:.1f}",
                "what": what,
            }


def _cross_checks(energy: Mapping[str, Any]) -> dict[str, Any]:
    """What second sensors say: which of them disagree, and of the others the one most apart."""
    agreeing: list[dict[str, Any]] = []
    disagreeing: list[dict[str, Any]] = []
    for c in energy.get("components") or []:
        if check := c.get("cross_check"):
            agrees = abs(check["difference_j"]) <= check["u_j"]
            named = {"name": clip(component_name(c), 60), **check}
            (agreeing if agrees else disagreeing).append(named)
    most = max(agreeing, key=lambda check: abs(check["difference_j"]), default=None)
    return {"disagreeing": disagreeing, "agreeing": len(agreeing), "most": most}


def _metrics(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    performance = (summary.get("performance") or {}).get("metric")
    return [
        {"name": name, "value": units.format_number(value), "performance": name == performance}
        for name, value in (summary.get("metrics") or {}).items()
    ][:100]


def _method(energy: Mapping[str, Any]) -> dict[str, bool]:
    """Which paragraphs of the template say how the energy was computed."""
    added = [c for c in energy.get("components") or [] if c["in_total"]]
    sources = {str(c["source"]) for c in added}
    return {
        "counters": bool(sources & {"powercap", "perf", "nvml-energy"}),
        "powers": any(source.startswith(("nvml-power", "hwmon")) for source in sources),
        "estimates": any(c["provenance"] == "modelled" for c in added),
        "shares": any(c["kind"] in ("cpu", "dram", "gpu") for c in added),
    }


def _quality(summary: Mapping[str, Any]) -> str:
    sampler = summary.get("sampler") or {}
    samples = sampler.get("samples")
    text = "an unknown number of samples" if samples is None else f"{samples:,} samples"
    rates = {name: rate for name, rate in (sampler.get("rate_hz") or {}).items() if rate}
    if rates:
        text += " (" + ", ".join(f"{name} {rate:.4g} Hz" for name, rate in rates.items()) + ")"
    for key in ("dropped", "late", "failed_reads"):
        if sampler.get(key) is not None:
            text += f", {sampler[key]:,} {key.replace('_', ' ')}"
    if sampler.get("cpu_s") is not None:
        text += f"; the profiler itself used {format_duration(sampler['cpu_s'])} of CPU time"
        if sampler.get("cpu_fraction") is not None:
            text += f" ({sampler['cpu_fraction']:.1%} of one CPU)"
    return f"Recording {clip(str(summary['run_id']), 80)}: {text}."


def _progress_text(curve: progress.ProgressCurve | None) -> dict[str, Any] | None:
    if curve is None:
        return None
    curve = curve._replace(metric=clip(curve.metric, 60))
    note = stop_note(curve)
    return {
        "caption": f"{curve.metric} as it was logged, against the job's energy until then.",
        "note": f"{note[0].upper()}{note[1:]}." if note else "",
    }
