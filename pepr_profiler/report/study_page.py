"""The page of a study: its rankings as figures, and as tables that rank again without a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pepr_profiler.errors import UsageError
from pepr_profiler.report import figures, study_figures
from pepr_profiler.report.html import clip, render
from pepr_profiler.study import progress
from pepr_profiler.study.ranking import Ranking
from pepr_profiler.study.study import Study
from pepr_profiler.units import format_amount

_MOST_ROWS = 1000


def study_page(study: Study, *, load: Callable[[str], Mapping[str, Any]] | None = None) -> str:
    """The page of a study: figures and a ranking per group, in which rows can be unticked.

    `load` gives the whole summary of a run by its id, for the curves: a store's index has none, and
    without `load` nor has the page. UsageError for more rows than a page can show.
    """
    rows = sum(len(ranking.names) for ranking in study.rankings)
    if rows > _MOST_ROWS:
        raise UsageError(
            f"a page cannot show {rows:,} rows",
            why=f"its limit is {_MOST_ROWS:,}",
            fix="compare fewer: --experiment NAME; or write a table: -o ranking.csv",
        )
    by_id = study_figures.shown_runs(study)
    if load is not None:
        # A run that was named by its folder is whole already, and may lie outside the store.
        by_id = {i: run if "progress" in run else load(i) for i, run in by_id.items()}
        if not by_id:  # too many: one run of each row is enough for its number of parameters
            firsts = {ids[0] for ranking in study.rankings for ids in ranking.run_ids}
            by_id = {i: load(i) for i in firsts}
    groups = study.by_group()
    shown = [_group(n, *of_group, by_id) for n, of_group in enumerate(groups.items())]
    models = len({row for ranking in study.rankings for row in ranking.names})
    seen = dict.fromkeys(
        (str(run.get("experiment") or ""), str(run.get("host") or "")) for run in study.runs
    )
    experiments = [clip(name, 60) for name in dict.fromkeys(name for name, _ in seen) if name]
    hosts = sorted({clip(host, 60) for _, host in seen} - {""})
    weighed = list(dict.fromkeys(ranking.resource_name for ranking in study.rankings))
    what = f"{models} {study.rankings[0].of}s"
    if any(ranking.repeated for ranking in study.rankings):
        what += f", {len(study.runs):,} runs"
    by = study.rankings[0].grouped_by
    if len(groups) > 1:
        what += f", {len(groups)} {by}s" if study.runs else f", by {by}"
    provenance = sorted({r.provenance for r in study.rankings if r.provenance})
    first = study.rankings[0]
    return render(
        "study.html",
        scripts=["theme.js", "study.js"],
        name=clip(" and ".join(experiments[:3]) or "A PePR study", 120),
        sub=clip("; ".join(filter(None, [what, "on " + ", ".join(hosts) if hosts else ""])), 200),
        lead=f"Which model was worth its {clip(first.resource_name, 60)}? Each was trained, its "
        f"{clip(first.metric, 60)} noted and its {clip(' and '.join(weighed), 200)} "
        f"{'measured or estimated' if set(provenance) - {'measured'} else 'measured'}."
        if study.runs
        else f"Which was worth its {clip(first.resource_name, 60)}?",
        groups=[view for view, _ in shown],
        left_out=study.left_out,
        method=list(_study_method(study, provenance)),
        data={"levels": list(study_figures.LEVELS), "groups": [facts for _, facts in shown]},
    )


def _group(
    number: int,
    group: str | None,
    rankings: Sequence[Ranking],
    by_id: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template shows of one group, and the numbers of it that the script needs."""
    first = rankings[0]
    n = len(first.names)
    runs = [1] * n if first.n is None else [int(x) for x in first.n]
    parameters = _parameters(first, by_id)
    outliers = {i for each in rankings for outlier in each.outliers for i in outlier.rows}
    charts: list[dict[str, Any]] = []
    live: list[dict[str, Any]] = []

    def add(
        *, kind: str, k: int, heading: str, caption: str, text: str, points: study_figures.Points
    ) -> None:
        ident = f"g{number}-{kind}-{k}"
        drawn, places = study_figures.study_chart(ident, heading, text, points)
        charts.append({"chart": drawn, "caption": caption, "heading": heading})
        live.append({"id": ident, "kind": kind, "ranking": k, "places": places})

    for k, ranking in enumerate(rankings):
        points = study_figures.cost_points(ranking, by_id)
        add(
            kind="cost",
            k=k,
            heading=f"{clip(ranking.metric, 60)} against {clip(ranking.resource_name, 60)}",
            caption="Up is better, left is cheaper. Thin lines join points of equal "
            f"{ranking.label}, with its value at their upper ends. The dotted line is the "
            "Pareto front; its models are filled. Bars are ± u (k = 2)"
            + ("; faint dots are single runs." if points.runs else "."),
            text=_said(ranking),
            points=points,
        )
        against = study_figures.score_points(ranking, parameters) if k == 0 and n > 1 else None
        if against is not None:
            add(
                kind="score",
                k=k,
                heading=f"{ranking.label} against the number of parameters",
                caption="Are larger models worth it? As in the PePR paper's figure. Bars are "
                f"± u of {ranking.label}.",
                text="Each model's score against its number of parameters; the table has both.",
                points=against,
            )
    ids = [x for several in first.run_ids for x in several]
    ran = [by_id[x] for x in ids] if all(x in by_id for x in ids) else []
    curves = [curve for curve in map(progress.curve_shown, ran) if curve is not None]
    if len(curves) > 1 and len({curve.metric for curve in curves}) == 1:
        heading = f"{clip(curves[0].metric, 60)} during training"
        drawn = figures.chart(
            f"g{number}-way",
            heading,
            "Each run's performance as it was logged, against the energy until then.",
            lambda width: study_figures.progress_curves(
                curves, progress.envelope(curves), width=width
            ),
        )
        caption = (
            f"One thin line per run: {clip(curves[0].metric, 60)} as it was logged, against the "
            "job's energy until then. The thick line is the best that any of them had reached with "
            "that energy."
        )
        charts.append({"chart": drawn, "caption": caption, "heading": heading})
    view = {
        "title": group if group is not None else charts[0]["heading"],
        "summary": _said(first),
        "caption": _range_text(first),
        "of": first.of.capitalize(),
        "repeated": first.repeated,
        "parameters": any(p is not None for p in parameters),
        "metric": first.metric,
        "note": _rank_note(first),
        "charts": charts,
        "outliers": list(_outlier_texts(rankings)),
        "resources": [{"name": r.resource_name, "label": r.label} for r in rankings],
        "rows": [
            {
                "index": int(i),
                "rank": rank,
                "range": _ranks(first, int(i)),
                "name": first.names[i],
                "outlier": int(i) in outliers,
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
    metric, resource = clip(ranking.metric, 40), ranking.resource
    text = (
        f"By {ranking.label} the best of {len(ranking.names)} is {clip(ranking.names[best], 60)}: "
        f"{metric} {ranking.performance[best]:.3f} for "
        f"{format_amount(float(resource[best]), ranking.unit)}."
    )
    if top != best:
        factor = resource[top] / resource[best] if resource[best] else math.inf
        more = f", {factor:.1f} times as much" if 1.05 < factor < 1e4 else ""
        text += (
            f" {clip(ranking.names[top], 60)} has the highest {metric}, "
            f"{ranking.performance[top]:.3f}, for "
            f"{format_amount(float(resource[top]), ranking.unit)}{more}."
        )
    return text


def _range_text(ranking: Ranking) -> str:
    low, high = (format_amount(end, ranking.unit) for end in ranking.scores.bounds)
    who = "given" if ranking.bounds_given else "set by the cheapest and the most expensive here"
    return f"Normalisation range of R: {low} … {high}, {who}."


def _ranks(ranking: Ranking, i: int) -> str:
    standing = ranking.standing
    if standing is None or standing.best is None or standing.worst is None:
        return ""
    best, worst = int(standing.best[i]), int(standing.worst[i])
    return "" if best == worst else f"{best}–{worst}"


def _rank_note(ranking: Ranking) -> str:
    if ranking.standing is None or ranking.standing.best is None:
        return ""
    return (
        "(a–b) beside a rank: the row may have any of these ranks, as the scores differ by less "
        "than their ±."
    )


def _fraction(value: float, u: Any, i: int) -> str:
    shown = f"{value:.3f}"
    return shown if u is None or math.isnan(u[i]) else f"{shown} ± {u[i]:.3f}"


def _resource_cells(ranking: Ranking, i: int, *, u: bool) -> dict[str, Any]:
    """One row's cells; `u` where there is room for it, the figures have it all."""
    u_resource = float(ranking.u_resource[i]) if u and ranking.u_resource is not None else None
    score = float(ranking.scores.pepr[i])
    u_score = None if ranking.u_pepr is None else float(ranking.u_pepr[i])
    return {
        "amount": format_amount(float(ranking.resource[i]), ranking.unit, u_resource),
        "score": f"{score:.3f}",
        "u": "" if u_score is None or math.isnan(u_score) else f"{u_score:.3f}",
        "front": bool(ranking.front[i]),
        "percent": f"{100 * score:.1f}",
    }


def _outlier_texts(rankings: Sequence[Ranking]) -> Iterable[dict[str, str]]:
    for ranking in rankings:
        for outlier in ranking.outliers:
            named = ", ".join(clip(x, 40) for x in outlier.names[:8])
            more = f" and {len(outlier.names) - 8} more" if len(outlier.names) > 8 else ""
            effect = (
                "Check these numbers before you trust the ranking; untick them to see it without."
            )
            if ranking.without is not None:
                best = ranking.without.names[int(ranking.without.order[0])]
                effect += f" Without them, the best by {ranking.label} is {clip(best, 60)}."
            yield {
                "text": f"Outliers in {outlier.what}: {named}{more}; {outlier.why}.",
                "effect": effect,
            }


def _study_method(study: Study, provenance: Sequence[str]) -> Iterable[str]:
    yield (
        "A score holds among the models compared: another model can change the normalisation range "
        "of R, and so every score, unless the range is fixed (--range). That is why the range is "
        "printed with each table."
    )
    if any(r.repeated for r in study.rankings):
        yield (
            "Runs of one name are repeats of one model, usually with different seeds. The numbers "
            "are their means; the ± cover 95 % (k = 2, or Student's t where repeats are few) and "
            "contain the spread over repeats and the uncertainty of the energy itself."
        )
    if set(provenance) - {"measured"}:
        which = "The" if set(provenance) == {"modelled"} else "Some of the"
        yield (
            f"{which} energies are estimated from utilisation, as there is no sensor. Most of "
            "that error is the same for all runs of a machine, and cancels when they are compared "
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
