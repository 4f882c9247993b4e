"""A run or a study as one HTML file: no network, every text escaped, light, dark and on paper."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler import progress
from pepr_profiler.errors import UsageError
from pepr_profiler.ranking import Ranking
from pepr_profiler.report import figures
from pepr_profiler.study import Study
from pepr_profiler.summary import Timeline
from pepr_profiler.units import (
    J_PER_WH,
    UNKNOWN,
    format_duration,
    format_quantity,
    format_with_u,
)

if TYPE_CHECKING:
    from jinja2 import Environment

_MOST_PHASES = 60

_CAUSES = {
    "gain_j": ("gain", "the scale of the sensor, which is fixed for its board"),
    "offset_j": ("offset", "what the sensor adds at any power, fixed for its board"),
    "model_j": ("model", "no sensor: a power model of the processor and the memory"),
    "edges_j": ("edges", "the sensor refreshes now and then, not when the run begins and ends"),
    "duty_j": ("duty cycle", "the sensor looks at a part of each refresh period only"),
    "lag_j": ("lag", "readings trail the truth"),
    "quantisation_j": ("steps", "the sensor counts in steps"),
    "gaps_j": ("gaps", "times without a reading"),
    "aliasing_j": ("aliasing", "the load repeats nearly in step with the sensor"),
    "attribution_j": ("sharing", "the job's part of what others used too, told by their use"),
}


def run_page(summary: Mapping[str, Any], timeline: Timeline) -> str:
    """The page of one run, from its summary and the run over time."""
    energy = summary["energy"]
    total = energy.get("total_j"), energy.get("u_j")
    whole = energy.get("scope") == "device"  # all that the devices took, whoever used them
    whose = "The devices'" if whole else "This job's"
    status, status_class = _status(summary)
    name = clip(str(summary.get("name") or summary["run_id"]), 120)
    shown_energy = format_with_u(*total, "J")
    steps = figures.step_text(timeline)
    duration_s = float(timeline.edges_s[-1])
    charts = {
        "power": figures.chart(
            "power",
            "Power over time by component",
            f"{whose} power was {format_quantity(energy.get('mean_w'), 'W')} on average over "
            f"{format_duration(duration_s)}. The table of components has the numbers.",
            lambda width: figures.power_over_time(timeline, width),
        ),
        "energy": figures.chart(
            "energy",
            "Energy so far",
            f"{whose} energy rises to {shown_energy}.",
            lambda width: figures.energy_over_time(timeline, width),
        ),
    }
    if timeline.components:
        charts["devices"] = figures.chart(
            "devices",
            "Power of each device",
            "One panel a device. The table of components has mean and highest power.",
            lambda width: figures.devices_over_time(timeline, width),
        )
    curve = _curve(summary)
    if curve is not None:
        charts["progress"] = figures.chart(
            "progress",
            "Performance against energy",
            "The performance that was reached, over the energy spent until then.",
            lambda width: figures.progress_curves([curve], width=width),
        )
    hatched = any(c.gaps_s for c in timeline.components if c.in_total)
    phases = summary.get("phases") or []
    return _render(
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
        energy_note=_energy_note(energy),
        provenance=energy.get("provenance") or "",
        facts=list(_facts(summary)),
        warnings=summary.get("warnings") or [],
        missing=summary.get("missing") or [],
        charts=charts,
        power_caption=(
            f"{whose} power, its components on top of each other. "
            + steps.partition(";")[0].rstrip(".")
            + "."
            + (" Below: its phases." if phases else "")
            + (
                " Hatched: times without a reading; what is drawn there is no reading."
                if hatched
                else ""
            )
        ),
        whole=whole,
        energy_caption=f"{whose} energy since the beginning. The band is ± u, k = 2: it holds the "
        "truth with 95 % probability.",
        devices_caption="The whole device's power as a line. "
        + (
            steps
            if any(c.low_w is not None for c in timeline.components)
            else f"{steps} The area is what is counted of it."
        ),
        progress=_progress_text(curve),
        components=list(_components(energy)),
        phases=list(_phases(phases, total)),
        more_phases=max(0, len(phases) - _MOST_PHASES),
        budget=list(_budget(energy)),
        cross_checks=list(_cross_checks(energy)),
        metrics=_metrics(summary),
        method=list(_method(summary)),
        quality=_quality(summary),
    )


def clip(text: str, longest: int = 160) -> str:
    """`text` for a page: at most `longest` characters, what cannot be shown made visible."""
    kept = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in kept)


def _render(template: str, *, scripts: Sequence[str], **values: Any) -> str:
    """A template with the page's style and scripts, which alone may run (its policy says so)."""
    code = [_asset(name) for name in scripts]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in code
    )
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; "
        "base-uri 'none'; form-action 'none'"
    )
    try:
        version = metadata.version("pepr-profiler")
    except metadata.PackageNotFoundError:
        version = "from its source"
    return (
        _environment()
        .get_template(template)
        .render(
            css=_asset("page.css"),
            scripts=code,
            policy=policy,
            version=version,
            made_on=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            **values,
        )
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("pepr_profiler.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    made.filters["clip"] = clip
    made.filters["data"] = embedded
    return made


def embedded(value: Any) -> Any:
    """JSON that may stand in a script element: nothing in it ends it or begins a comment."""
    from markupsafe import Markup

    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # no character that HTML knows is left


def _asset(name: str) -> str:
    return (resources.files("pepr_profiler.report") / "templates" / name).read_text("utf-8")


# --- one run -------------------------------------------------------------------------------------


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


def _energy_note(energy: Mapping[str, Any]) -> str:
    total_j = energy.get("total_j")
    if total_j is None:
        return "no component could be measured or modelled"
    text = f"{format_quantity(total_j / J_PER_WH, 'Wh')}"
    if energy.get("provenance") == "modelled":
        text += "; an estimate from utilisation, as no sensor could be read"
    elif energy.get("provenance") == "mixed":
        text += "; modelled rows are estimates, as there is no sensor for them"
    return text


def _facts(summary: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    def fact(name: str, value: str, more: str = "") -> dict[str, str]:
        return {"name": name, "value": value, "more": more}

    yield fact("Mean power", format_quantity(summary["energy"].get("mean_w"), "W"))
    yield fact("Time", format_duration(summary.get("time_s")))
    performance = summary.get("performance")
    if performance:
        yield fact(
            clip(str(performance["metric"]), 40), _number(performance["value"]), "performance"
        )
    carbon = summary.get("carbon")
    if carbon:
        year = f" {carbon['year']}" if carbon.get("year") is not None else ""
        yield fact(
            "Carbon",
            f"{format_quantity(carbon.get('g_co2e'), 'g')} CO₂e",
            f"{carbon['intensity_g_per_kwh']:.4g} g/kWh, PUE {carbon['pue']:.2f}; "
            f"{clip(str(carbon['source']), 120)}{year}",
        )
    else:
        yield fact("Carbon", UNKNOWN, "say where it ran: --region CODE")
    memory = summary.get("memory") or {}
    gpu_bytes = memory.get("gpu_peak_bytes")
    yield fact(
        "Peak memory",
        format_quantity(memory.get("peak_rss_bytes"), "B"),
        f"and {format_quantity(gpu_bytes, 'B')} on GPUs" if gpu_bytes is not None else "",
    )


_SOURCES = {
    "nvml-energy": "NVML energy counter",
    "nvml-power-average": "NVML power, averaged",
    "nvml-power": "NVML power",
    "nvml-power-instant": "NVML power, instant",
    "powercap": "RAPL by powercap",
    "perf": "RAPL by perf",
    "utilisation": "modelled from utilisation",
    "installed-memory": "modelled from installed memory",
}


def _components(energy: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    total = energy.get("total_j"), energy.get("u_j")
    kinds = list(figures.KIND_COLORS)
    counted = "device_j" if energy.get("scope") == "device" else "job_j"

    def place(c: Mapping[str, Any]) -> tuple[bool, int, str]:
        kind = kinds.index(c["kind"]) if c["kind"] in kinds else len(kinds)
        return not c["in_total"], kind, str(c.get("label"))

    for c in sorted(energy.get("components") or [], key=place):
        share = _ratio(c.get(counted), total[0]) if c["in_total"] else None
        known = c.get(counted) is not None
        source = clip(_SOURCES.get(c["source"], str(c["source"])), 60)
        yield {
            "name": figures.component_name(str(c["kind"]), str(c.get("label") or c["id"])),
            "kind": c["kind"] if c["kind"] in figures.KIND_COLORS else "other",
            "in_total": c["in_total"],
            "excluded": c.get("excluded") or ("" if known else "unknown"),
            "energy": format_with_u(c.get(counted), c.get("u_j"), "J", like=_like(total, c)),
            "share": _percent(share),
            "percent": f"{100 * share:.2f}" if share is not None else "0",
            "others": _rest(c, "others_j"),
            "idle": _rest(c, "idle_j"),
            "mean": format_quantity(c.get("mean_w"), "W"),
            "highest": format_quantity(c.get("max_w"), "W"),
            "source": source,
        }


def _rest(component: Mapping[str, Any], key: str) -> str:
    """A share; what is left of rounding the device's energy is none."""
    value, device_j = component.get(key), component.get("device_j")
    if value is not None and device_j is not None and abs(value) < 1e-9 * device_j:
        value = 0.0
    return format_quantity(value, "J")


def _like(total: tuple[Any, Any], component: Mapping[str, Any]) -> tuple[Any, Any] | None:
    return total if component["in_total"] else None


def _phases(
    phases: Sequence[Mapping[str, Any]], total: tuple[float | None, float | None]
) -> Iterable[dict[str, Any]]:
    for p in sorted(phases, key=lambda p: -(p["energy_j"] or 0.0))[:_MOST_PHASES]:
        share = _ratio(p["energy_j"], total[0])
        yield {
            "name": str(p["name"]),
            "energy": format_with_u(p["energy_j"], p["u_j"], "J", like=total),
            "share": _percent(share),
            "percent": f"{min(100.0, 100 * share):.2f}" if share is not None else "0",
            "time": format_duration(p["duration_s"]),
            "mean": format_quantity(_ratio(p["energy_j"], p["duration_s"]), "W"),
            "count": f"{p['count']:,}",
        }


def _budget(energy: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    """Causes by size; of several devices one cause's parts add in squares, as the total does."""
    budgets = [
        c["budget"] for c in energy.get("components") or [] if c["in_total"] and c.get("budget")
    ]
    causes = {
        cause: 2 * math.hypot(*(budget.get(cause, 0.0) for budget in budgets)) for cause in _CAUSES
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


def _cross_checks(energy: Mapping[str, Any]) -> Iterable[str]:
    """What a second sensor says: those that disagree by name, the others in one sentence."""
    agreeing = []
    for c in energy.get("components") or []:
        check = c.get("cross_check")
        if check and abs(check["difference_j"]) <= check["u_j"]:
            agreeing.append(check)
        elif check:
            name = figures.component_name(str(c["kind"]), str(c.get("label") or c["id"]))
            yield (
                f"Cross-check: the power readings of {clip(name, 60)}, integrated, are "
                f"{format_quantity(check['difference_j'], 'J')} from its energy counter; "
                f"± {format_quantity(check['u_j'], 'J')} would be usual."
            )
    if agreeing:
        most = max(agreeing, key=lambda check: abs(check["difference_j"]))
        devices = "one device" if len(agreeing) == 1 else f"{len(agreeing)} devices"
        yield (
            f"Cross-check: the power readings of {devices}, integrated, agree with the energy "
            f"counters: at most {format_quantity(abs(most['difference_j']), 'J')} apart, where "
            f"± {format_quantity(most['u_j'], 'J')} is usual."
        )


def _metrics(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    performance = (summary.get("performance") or {}).get("metric")
    return [
        {"name": name, "value": _number(value), "performance": name == performance}
        for name, value in (summary.get("metrics") or {}).items()
    ][:100]


def _method(summary: Mapping[str, Any]) -> Iterable[str]:
    energy = summary["energy"]
    added = [c for c in energy.get("components") or [] if c["in_total"]]
    sources = {str(c["source"]) for c in added}
    if any(s in sources for s in ("powercap", "perf", "nvml-energy")):
        yield (
            "Where a device counts its own energy, the energy is the difference of two counter "
            "values: a sample that is missed costs resolution, never joules. Wraps of the counter "
            "are undone."
        )
    if any(s.startswith("nvml-power") for s in sources) or any(
        s.startswith("hwmon") for s in sources
    ):
        yield (
            "Where a device reports power only, its readings are integrated over time, shifted "
            "back by what they trail the truth: 0.5 s where they are averages over a second, 0.3 "
            "of their refresh period elsewhere, where that period can be seen."
        )
    if any(c["provenance"] == "modelled" for c in added):
        yield (
            "Where there is no sensor, power is modelled: for the processor from its recorded busy "
            "time, with the watts per CPU of servers of its generation; for the memory from its "
            "size, of which the job is given the part that it had in use. Such an estimate carries "
            "± 50 % or more. Two runs on one machine share most of that error, so they compare "
            "better than the ± says."
        )
    if any(c["kind"] in ("cpu", "dram", "gpu") for c in added):
        yield (
            "A device is shared with whatever else ran on it. What it took above its idle draw "
            "belongs to those who used it, in proportion to their use: busy CPU time for "
            "processors and memory, SM utilisation for a GPU. The idle draw is theirs for as long "
            "as it was in use; else it belongs to whoever holds the GPU, or to nobody and is "
            "called idle."
        )
    yield (
        "Every ± is an expanded uncertainty, k = 2, after the Guide to the expression of "
        "uncertainty in measurement (JCGM 100:2008). The facts about sensors, and their sources, "
        "are in the project's docs/measurement.md; the score for comparing runs is PePR, arXiv "
        "2403.12562."
    )


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


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:,.0f}"


def _curve(summary: Mapping[str, Any]) -> progress.Curve | None:
    """The run's curve of its performance; where that was logged once, of what is called after it.

    `val_accuracy` an epoch tells how `accuracy`, computed at the end, came about.
    """
    logged = (summary.get("progress") or {}).get("metrics") or {}
    own = progress.metric_of(summary)
    named = str((summary.get("performance") or {}).get("metric") or "\0")
    for metric in dict.fromkeys([own, *(name for name in logged if str(name).endswith(named))]):
        curve = progress.curve_of(summary, metric=metric) if metric is not None else None
        if curve is not None and len(curve.performance) > 1:
            low, high = float(curve.performance.min()), float(curve.performance.max())
            if low >= 0 and high <= 1:
                return curve
    return None


def _progress_text(curve: progress.Curve | None) -> dict[str, Any] | None:
    if curve is None:
        return None
    lines = []
    stop = progress.best_stop(curve)
    if stop.index < len(curve.performance) - 1:
        where = f"epoch {stop.epoch:.0f}" if stop.epoch is not None else format_duration(stop.t_s)
        lines.append(
            f"Stopping at {where} would have kept {stop.performance_share:.1%} of the final "
            f"{clip(curve.metric, 60)} for {stop.energy_share:.1%} of the energy: there PePR along "
            "this curve is highest."
        )
    return {
        "caption": f"{clip(curve.metric, 60)} as it was logged, over the job's energy until then.",
        "lines": lines,
    }


# --- a study -------------------------------------------------------------------------------------

_MOST_ROWS = 1000
_MOST_PANELS = 12


def study_page(
    study: Study, *, load: Callable[[str], Mapping[str, Any]] | None = None, name: str = ""
) -> str:
    """The page of a study: figures and a ranking a group, which the reader may try without a row.

    `load` gives the whole summary of a run by its id, for the curves: a store's index leaves them
    out, and without it so does the page.
    UsageError for more rows than a page can show.
    """
    rows = sum(len(ranking.names) for ranking in study.rankings)
    if rows > _MOST_ROWS:
        raise UsageError(
            f"a page of {rows:,} rows would help nobody",
            why=f"{_MOST_ROWS:,} are the most that it shows",
            fix="compare fewer: --experiment NAME; or write a table: -o ranking.csv",
        )
    by_id = {str(run["run_id"]): run for run in study.runs}
    if load is not None:
        # One that was named by its folder is whole already, and may be of no store.
        by_id = {i: run if "progress" in run else load(i) for i, run in by_id.items()}
    groups: dict[str | None, list[Ranking]] = {}
    for ranking in study.rankings:
        groups.setdefault(ranking.group, []).append(ranking)
    shown, data = [], []
    for number, (group, rankings) in enumerate(groups.items()):
        view, facts = _group(number, group, rankings, by_id)
        shown.append(view)
        data.append(facts)
    models = len({row for ranking in study.rankings for row in ranking.names})
    experiments = list(dict.fromkeys(str(run.get("experiment") or "") for run in study.runs))
    experiments = [clip(name, 60) for name in experiments if name]
    weighed = list(dict.fromkeys(ranking.resource_name for ranking in study.rankings))
    hosts = sorted({str(run.get("host") or "") for run in study.runs} - {""})
    what = f"{models} {study.rankings[0].of}s"
    if any(ranking.repeated for ranking in study.rankings):
        what += f", {len(study.runs)} runs"
    if len(groups) > 1:
        what += f", {len(groups)} groups"
    provenance = sorted({r.provenance for r in study.rankings if r.provenance})
    first = study.rankings[0]
    return _render(
        "study.html",
        scripts=["theme.js", "study.js"],
        name=clip(name or " and ".join(experiments[:3]) or "A PePR study", 120),
        sub=clip("; ".join(filter(None, [what, "on " + ", ".join(hosts) if hosts else ""])), 200),
        lead=f"Which model was worth its {clip(first.resource_name, 60)}? Each was trained, its "
        f"{clip(first.metric, 60)} noted and its {clip(' and '.join(weighed), 200)} "
        f"{'measured or modelled' if set(provenance) - {'measured'} else 'measured'}."
        if study.runs
        else f"Which was worth its {clip(first.resource_name, 60)}?",
        groups=shown,
        left_out=study.left_out,
        method=list(_study_method(study, provenance)),
        data={"levels": list(figures.LEVELS), "groups": data},
    )


def study_figure(study: Study, form: str) -> bytes:
    """Performance against the resource, a panel a ranking, as a png, svg or pdf file."""
    by_id = {str(run["run_id"]): run for run in study.runs}
    with figures.style():
        figure = figures.panels(
            [
                (ranking.group or "", cost_points(ranking, by_id))
                for ranking in study.rankings[:_MOST_PANELS]
            ]
        )
    return figures.save(figure, form)


def _group(
    number: int,
    group: str | None,
    rankings: Sequence[Ranking],
    by_id: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One group's view for the template, and its numbers for the script."""
    first = rankings[0]
    n = len(first.names)
    runs = [1] * n if first.n is None else [int(x) for x in first.n]
    parameters = _parameters(first, by_id)
    suspects = {i for ranking in rankings for doubt in ranking.doubts for i in doubt.rows}
    charts: list[dict[str, Any]] = []
    live: list[dict[str, Any]] = []

    def add(
        *, kind: str, k: int, heading: str, caption: str, text: str, points: figures.Points
    ) -> None:
        ident = f"g{number}-{kind}-{k}"
        drawn, places = figures.study_chart(ident, heading, text, points)
        charts.append({"chart": drawn, "caption": caption, "heading": heading})
        live.append({"id": ident, "kind": kind, "ranking": k, "places": places})

    for k, ranking in enumerate(rankings):
        add(
            kind="cost",
            k=k,
            heading=f"{clip(ranking.metric, 60)} against {ranking.resource_name}",
            caption="Up is better, left is cheaper. Thin lines join places of equal "
            f"{ranking.label}, whose value stands at their upper ends. The dotted line is the "
            "Pareto front, whose models are filled. Bars are ± u (k = 2)"
            + ("; faint dots are the single runs." if ranking.repeated else "."),
            text=_said(ranking),
            points=cost_points(ranking, by_id),
        )
        points = score_points(ranking, parameters) if k == 0 and n > 1 else None
        if points is not None:
            add(
                kind="score",
                k=k,
                heading=f"{ranking.label} against the number of parameters",
                caption="As in the paper's figure: whether larger models are worth it. Bars are "
                f"± u of {ranking.label}.",
                text="Each model's score over its number of parameters; the table has both.",
                points=points,
            )
    ran = [by_id[x] for ids in first.run_ids for x in ids if x in by_id]
    curves = [curve for curve in map(_curve, ran) if curve is not None]
    if len(curves) > 1 and len({curve.metric for curve in curves}) == 1:
        heading = f"{clip(curves[0].metric, 60)} on the way"
        drawn = figures.chart(
            f"g{number}-way",
            heading,
            "Each run's performance as it was logged, over the energy until then.",
            lambda width: figures.progress_curves(curves, progress.envelope(curves), width=width),
        )
        caption = (
            f"A thin line a run: {clip(curves[0].metric, 60)} as it was logged, over the job's "
            "energy until then. The thick line is the best that any of them had reached for that "
            "energy."
        )
        charts.append({"chart": drawn, "caption": caption, "heading": heading})
    view = {
        "title": group if group is not None else f"{first.metric} against {first.resource_name}",
        "summary": _said(first),
        "caption": _bounds_text(first),
        "of": first.of.capitalize(),
        "repeated": first.repeated,
        "parameters": any(p is not None for p in parameters),
        "metric": first.metric,
        "note": _rank_note(first),
        "charts": charts,
        "doubts": list(_doubt_texts(rankings)),
        "resources": [{"name": r.resource_name, "label": r.label} for r in rankings],
        "rows": [
            {
                "index": int(i),
                "rank": rank,
                "range": _range(first, int(i)),
                "name": first.names[i],
                "suspect": int(i) in suspects,
                "runs": runs[i],
                "parameters": "" if parameters[i] is None else f"{parameters[i]:,.0f}",
                "performance": _fraction(first.performance[i], first.u_performance, int(i)),
                "resources": [_resource_cells(r, int(i), u=r is first) for r in rankings],
            }
            for rank, i in enumerate(first.order, start=1)
        ],
    }
    facts = {
        "names": [clip(x, 80) for x in first.names],
        "p": first.performance.tolist(),
        "runs": runs,
        "parameters": parameters,
        "charts": live,
        "resources": [
            {
                "unit": r.unit,
                "resource": r.resource.tolist(),
                "bounds": list(r.scores.bounds) if r.bounds_given else None,
                "pepr": r.scores.pepr.tolist(),
            }
            for r in rankings
        ],
    }
    return view, facts


def cost_points(ranking: Ranking, by_id: Mapping[str, Mapping[str, Any]]) -> figures.Points:
    """Performance over the resource of every row, and of the runs behind it where known."""
    n = len(ranking.names)
    nothing = np.full(n, np.nan)
    runs = []
    if ranking.repeated and ranking.key in _OF_RUN and ranking.transform is None:
        scale = 0.01 if ranking.percent else 1.0
        for i, ids in enumerate(ranking.run_ids):
            for run in (by_id[x] for x in ids if x in by_id):
                p = (run.get("metrics") or {}).get(ranking.metric)
                r = _OF_RUN[ranking.key](run)
                if p is not None and r is not None and len(ids) > 1:
                    runs.append((i, float(r), scale * float(p)))
    return figures.Points(
        names=ranking.names,
        x=ranking.resource,
        y=ranking.performance,
        u_x=nothing if ranking.u_resource is None else ranking.u_resource,
        u_y=nothing if ranking.u_performance is None else ranking.u_performance,
        front=ranking.front,
        suspect=_suspect(ranking),
        x_label=ranking.resource_name,
        y_label=clip(ranking.metric, 60),
        x_unit=ranking.unit,
        bounds=ranking.scores.bounds,
        runs=tuple(runs),
    )


_OF_RUN: Mapping[str, Any] = {
    "energy": lambda run: run["energy"]["total_j"],
    "time": lambda run: run["time_s"],
    "carbon": lambda run: (run.get("carbon") or {}).get("g_co2e"),
}


def score_points(ranking: Ranking, parameters: Sequence[float | None]) -> figures.Points | None:
    """Scores over the number of parameters; None where a row's is unknown."""
    if any(p is None for p in parameters):
        return None
    n = len(ranking.names)
    nothing = np.full(n, np.nan)
    return figures.Points(
        names=ranking.names,
        x=np.array(parameters, dtype=np.float64),
        y=ranking.scores.pepr,
        u_x=nothing,
        u_y=nothing if ranking.u_pepr is None else ranking.u_pepr,
        front=np.zeros(n, dtype=np.bool_),
        suspect=_suspect(ranking),
        x_label="parameters",
        y_label=ranking.label,
        x_unit="",
    )


def _suspect(ranking: Ranking) -> Any:
    mask = np.zeros(len(ranking.names), dtype=np.bool_)
    for doubt in ranking.doubts:
        mask[list(doubt.rows)] = True
    return mask


def _parameters(ranking: Ranking, by_id: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    """What the runs of each row logged as their number of parameters."""
    found: list[float | None] = []
    for ids in ranking.run_ids or [()] * len(ranking.names):
        known = [
            value
            for run in (by_id[x] for x in ids if x in by_id)
            for key in ("parameters", "params", "n_parameters")
            if (value := (run.get("metrics") or {}).get(key)) is not None
        ]
        found.append(float(known[0]) if known else None)
    return found


def _said(ranking: Ranking) -> str:
    """What the ranking says, in a sentence or two."""
    best, top = int(ranking.order[0]), int(np.argmax(ranking.performance))
    shown = clip(ranking.names[best], 60)
    text = (
        f"By {ranking.label} the best of {len(ranking.names)} is {shown}: "
        f"{clip(ranking.metric, 40)} {ranking.performance[best]:.3f} for "
        f"{_amount(ranking.resource[best], ranking)}."
    )
    if top != best:
        factor = (
            ranking.resource[top] / ranking.resource[best] if ranking.resource[best] else math.inf
        )
        more = f", {factor:.1f} times as much" if 1.05 < factor < 1e4 else ""
        text += (
            f" The highest {clip(ranking.metric, 40)}, {ranking.performance[top]:.3f}, is that of "
            f"{clip(ranking.names[top], 60)}, for {_amount(ranking.resource[top], ranking)}{more}."
        )
    return text


def _amount(value: float, ranking: Ranking) -> str:
    if ranking.unit == "s":
        return format_duration(float(value))
    return format_quantity(float(value), ranking.unit) if ranking.unit else f"{value:.4g}"


def _bounds_text(ranking: Ranking) -> str:
    low, high = (_amount(bound, ranking) for bound in ranking.scores.bounds)
    who = "given" if ranking.bounds_given else "set by the cheapest and the dearest here"
    return f"Bounds of R: {low} … {high}, {who}."


def _range(ranking: Ranking, i: int) -> str:
    standing = ranking.standing
    if standing is None or standing.best is None or standing.worst is None:
        return ""
    best, worst = int(standing.best[i]), int(standing.worst[i])
    return "" if best == worst else f"{best}–{worst}"


def _rank_note(ranking: Ranking) -> str:
    if ranking.standing is None or ranking.standing.best is None:
        return ""
    return (
        "(a–b) beside a rank: the ranks that the row can have, as some scores cannot be told apart "
        "by what is known of them."
    )


def _fraction(value: float, u: Any, i: int) -> str:
    shown = f"{value:.3f}"
    return shown if u is None or math.isnan(u[i]) else f"{shown} ± {u[i]:.3f}"


def _resource_cells(ranking: Ranking, i: int, *, u: bool) -> dict[str, Any]:
    """One row's cells; `u` where there is room for it, the figures have it all."""
    value, u_resource = float(ranking.resource[i]), ranking.u_resource
    amount = _amount(value, ranking)
    if u and u_resource is not None and math.isfinite(u_resource[i]) and ranking.unit:
        amount = format_with_u(value, float(u_resource[i]), ranking.unit)
    score = float(ranking.scores.pepr[i])
    u_score = None if ranking.u_pepr is None else float(ranking.u_pepr[i])
    return {
        "amount": amount,
        "score": f"{score:.3f}",
        "u": "" if u_score is None or math.isnan(u_score) else f"{u_score:.3f}",
        "front": bool(ranking.front[i]),
        "percent": f"{100 * score:.1f}",
    }


def _doubt_texts(rankings: Sequence[Ranking]) -> Iterable[dict[str, str]]:
    for ranking in rankings:
        for doubt in ranking.doubts:
            named = ", ".join(clip(x, 40) for x in doubt.names[:8])
            more = f" and {len(doubt.names) - 8} more" if len(doubt.names) > 8 else ""
            effect = (
                "Check these numbers before believing the ranking; untick them to see it without."
            )
            if ranking.without is not None:
                best = ranking.without.names[int(ranking.without.order[0])]
                effect += f" Without them, the best by {ranking.label} is {clip(best, 60)}."
            yield {
                "text": f"{doubt.what} of {named}{more} does not fit the others: {doubt.why}.",
                "effect": effect,
            }


def _study_method(study: Study, provenance: Sequence[str]) -> Iterable[str]:
    yield (
        "The score belongs to the models compared: another model can move the bounds of R, and so "
        "every score, unless the bounds are fixed (--bounds). That is why they are printed with "
        "each table."
    )
    if any(r.repeated for r in study.rankings):
        yield (
            "Runs of one name are repeats of one model, here as a rule with different seeds. Shown "
            "are their means; the ± cover 95 % (k = 2, or Student's t where repeats are few) and "
            "hold the spread over repeats and what the energy itself is uncertain by."
        )
    if set(provenance) - {"measured"}:
        which = "The" if set(provenance) == {"modelled"} else "Some of the"
        yield (
            f"{which} energies are modelled from utilisation, where there is no sensor. Most of "
            "that error is common to all runs of a machine, and cancels where they are compared "
            "with each other."
        )
    for ranking in study.rankings[:1]:
        if ranking.percent or ranking.transform:
            how = " and ".join(
                filter(None, ["divided by 100" if ranking.percent else "", ranking.transform or ""])
            )
            yield f"The performance is the metric {clip(ranking.metric, 60)}, transformed: {how}."
    yield (
        "PePR: Selvan, Pepin, Igel, Samuel, Dam: PePR: Performance per resource unit as a metric "
        "to promote small-scale deep learning. NLDL 2025, arXiv 2403.12562."
    )
