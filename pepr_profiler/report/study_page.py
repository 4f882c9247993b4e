"""The page of a study: figures, and tables that rank again when a row is unticked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pepr_profiler.record import Mask
from pepr_profiler.report import analysis_figures, figures, study_figures
from pepr_profiler.report.html import clip, render
from pepr_profiler.report.ranking_text import ratio_text, sentence
from pepr_profiler.report.run_text import stop_note
from pepr_profiler.report.typeset import means_table, population_tables, settings_table
from pepr_profiler.study import progress
from pepr_profiler.study.analysis import Analysis, Traits
from pepr_profiler.study.pepr import listed
from pepr_profiler.study.ranking import Ranking
from pepr_profiler.study.study import Study
from pepr_profiler.units import format_amount

_MOST_LIVE = 3000
"""Rows of all rankings together that a page can rank again when one is unticked."""

_MOST_ROWS = 600
"""Rows of all tables of a page that shows only the best of each ranking."""

_MOST_CHARTS = 24
"""Figures of such a page, and the points that these draw one by one: each takes 0.6 kB."""
_MOST_DRAWN = 4000


def is_thinned(study: Study) -> bool:
    """Whether a page shows only the best rows of a study, as there are too many to show all."""
    sizes = [len(ranking.names) for ranking in study.rankings]
    return sum(sizes) > _MOST_LIVE or max(sizes) > study_figures.MOST_POINTS


def study_page(
    study: Study,
    *,
    load: Callable[[str], Mapping[str, Any]] | None = None,
    analysis: Analysis | None = None,
    all_rows: str = "",
) -> str:
    """The page of a study: figures and a ranking per group, in which rows can be unticked.

    `load` gives the whole summary of a run by its id, for the curves: a store's index has none, and
    without `load` nor has the page. `analysis` adds classes, sizes, settings and means. Where the
    study `is_thinned`, nothing can be unticked, and `all_rows` is the name of the file beside the
    page that has all rows.
    """
    analysis = analysis or Analysis.of_runs(study)
    live = not is_thinned(study)
    by_id = study_figures.shown_runs(study)
    if load is not None:
        # A run that was named by its folder is whole already, and may lie outside the store.
        by_id = {i: run if "progress" in run else load(i) for i, run in by_id.items()}
        if not by_id:  # too many: one run of each row is enough for its number of parameters
            firsts = {ids[0] for ranking in study.rankings for ids in ranking.run_ids}
            by_id = {i: load(i) for i in firsts}
    groups = study.by_group()
    traits = dict(zip(map(id, study.rankings), analysis.traits, strict=True))
    resources = max(map(len, groups.values()))
    drawn = list(groups.items())[: None if live else max(1, _MOST_CHARTS // resources)]
    most = None if live else _MOST_ROWS // len(drawn)
    points = study_figures.MOST_POINTS if live else _MOST_DRAWN // (len(drawn) * resources)
    shown = [
        _group(n, *of_group, by_id, analysis=analysis, traits=traits, most=most, points=points)
        for n, of_group in enumerate(drawn)
    ]
    models = len({row for ranking in study.rankings for row in ranking.names})
    seen = dict.fromkeys(
        (str(run.get("experiment") or ""), str(run.get("host") or "")) for run in study.runs
    )
    experiments = [clip(name, 60) for name in dict.fromkeys(name for name, _ in seen) if name]
    hosts = sorted({clip(host, 60) for _, host in seen} - {""})
    weighed = list(dict.fromkeys(ranking.resource_name for ranking in study.rankings))
    what = f"{models:,} {study.rankings[0].of}s"
    repeated = any(ranking.repeated for ranking in study.rankings)
    if repeated:
        several = (of_group[0] for of_group in groups.values())
        runs = len(study.runs) or sum(int(r.n.sum()) for r in several if r.n is not None)
        what += f", {runs:,} {'runs' if study.runs else 'rows'}"
    by = study.rankings[0].grouped_by
    if len(groups) > 1:
        what += f", {len(groups)} {by}s" if study.runs else f", by {by}"
    first = study.rankings[0]
    return render(
        "study.html",
        scripts=["theme.js", "study.js"] if live else ["theme.js"],
        name=clip(" and ".join(experiments[:3]) or "A PePR study", 120),
        sub=clip("; ".join(filter(None, [what, "on " + ", ".join(hosts) if hosts else ""])), 200),
        are_runs=bool(study.runs),
        first=first,
        resources=clip(" and ".join(weighed), 200),
        provenances=sorted({r.provenance for r in study.rankings if r.provenance}),
        repeated=repeated,
        groups=[view for view, _ in shown],
        live=live,
        all_rows=all_rows,
        groups_not_shown=len(groups) - len(drawn),
        extras=list(_extras(analysis)),
        left_out=study.left_out,
        data={"levels": list(study_figures.LEVELS), "groups": [facts for _, facts in shown]},
    )


def _group(
    number: int,
    group: str | None,
    rankings: Sequence[Ranking],
    by_id: Mapping[str, Mapping[str, Any]],
    *,
    analysis: Analysis,
    traits: Mapping[int, Traits],
    most: int | None,
    points: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template shows of one group, and the numbers of it that the script needs.

    `traits` are by the id of a ranking; `most` is the number of rows in the table, None for all,
    and `points` that of a figure's that are drawn one by one.
    """
    first = rankings[0]
    n = len(first.names)
    runs = [1] * n if first.n is None else [int(x) for x in first.n]
    parameters = _parameters(first, by_id)
    classes = traits[id(first)].classes
    fronts = [(ranking, ranking.front) for ranking in rankings]
    unranked = analysis.unranked(first)
    order = (np.arange(n) if unranked else first.order)[:most]
    ranks_again = most is None and not any(map(analysis.unranked, rankings))
    outliers = {i for each in rankings for outlier in each.outliers for i in outlier.rows}
    charts: list[dict[str, Any]] = []
    live: list[dict[str, Any]] = []

    def add(kind: str, k: int, heading: str, text: str, points: study_figures.Points) -> None:
        ident = f"g{number}-{kind}-{k}"
        drawn, places = study_figures.study_chart(ident, heading, text, points)
        facts = {
            "label": rankings[k].label,
            "has_runs": bool(points.runs),
            "classes": bool(points.classes),
            "crowded": points.crowded,
            "iso": points.bounds is not None,
        }
        charts.append({"chart": drawn, "heading": heading, "kind": kind, **facts})
        live.append({"id": ident, "kind": kind, "ranking": k, "places": places})

    for k, ranking in enumerate(rankings):
        heading = f"{clip(ranking.metric, 60)} against {clip(ranking.resource_name, 60)}"
        scattered = analysis_figures.cost_points(
            analysis, ranking, traits[id(ranking)], by_id, most=points
        )
        add("cost", k, heading, clip(_said(ranking), 600), scattered)
        against = study_figures.score_points(ranking, parameters) if k == 0 and n > 1 else None
        if against is not None:
            heading = f"{ranking.label} against the number of parameters"
            text = "Each model's score against its number of parameters; the table has both."
            add("score", k, heading, text, against)
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
        metric = clip(curves[0].metric, 60)
        way = {"chart": drawn, "heading": heading, "kind": "curves", "metric": metric}
        charts.append({**way, "stops": list(_stops(first, by_id, curves[0].metric))})
    view = {
        "title": group if group is not None else charts[0]["heading"],
        "live": ranks_again,
        "unranked": unranked,
        "cautions": [
            (sentence(each.text), sentence(each.fix))
            for each in dict.fromkeys(x for ranking in rankings for x in ranking.warnings)
        ],
        "summary": clip(_said(first), 600),
        "populations": []
        if most is not None
        else [
            table
            for each in rankings
            for table in population_tables(each, traits[id(each)], analysis)
        ],
        "caption": "" if unranked else _range_text(first),
        "of": first.of.capitalize(),
        "repeated": first.repeated,
        "parameters": any(p is not None for p in parameters),
        "metric": first.metric,
        "has_ranges": first.standing is not None and first.standing.best is not None,
        "charts": charts,
        "outliers": list(_outlier_facts(rankings)),
        "not_shown": n - len(order),
        "class_name": analysis.class_name,
        "resources": [{"name": r.resource_name, "label": r.label} for r in rankings],
        "rows": [
            {
                "index": int(i),
                "rank": "–" if unranked else rank,
                "range": "" if unranked else _ranks(first, int(i)),
                "name": first.names[i],
                "of_class": "" if classes is None else classes[i],
                "outlier": int(i) in outliers,
                "population": clip(first.population[i], 80) if first.population else "",
                "runs": runs[i],
                "parameters": "" if parameters[i] is None else f"{parameters[i]:,.0f}",
                "performance": _fraction(first.performance[i], first.u_performance, int(i)),
                "resources": [
                    _resource_cells(r, int(i), front, u=r is first, ranked=not analysis.unranked(r))
                    for r, front in fronts
                ],
            }
            for rank, i in enumerate(order, start=1)
        ],
    }
    if not ranks_again:
        return view, {}
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


def _stops(
    ranking: Ranking, by_id: Mapping[str, Mapping[str, Any]], metric: str
) -> Iterable[tuple[str, str]]:
    """Where the runs of each model could have been stopped, by the mean curve of its repeats."""
    for name, ids in zip(ranking.names, ranking.run_ids, strict=True):
        every = [progress.curve_shown(by_id[x]) for x in ids]
        curves = [curve for curve in every if curve is not None]
        if not curves:
            continue
        mean, noise = progress.mean_curve(curves)
        of = f" (mean of {len(curves)} runs)" if len(curves) > 1 else ""
        note = stop_note(mean._replace(metric=metric), noise if len(curves) > 1 else None)
        if note:
            yield clip(name, 60) + of, note


def _extras(analysis: Analysis) -> Iterable[dict[str, Any]]:
    """The sections on sizes, means over groups and settings, as far as they were asked for."""
    if analysis.size_name:
        heading = f"Scores against {clip(analysis.size_name, 60)}"
        text = "Each model's score against its size."
        parts = analysis_figures.size_parts(analysis)
        drawn = figures.chart(
            "sizes", heading, text, lambda width: study_figures.panels(parts, width=width)
        )
        caption = "Are larger models worth it? The dashed line is the median size."
        if analysis.averages:
            caption += " Each point is a mean over the groups; bars are the SD over these."
        yield {"heading": heading, "chart": drawn, "caption": caption, "table": None}
    for each in analysis.both_ways:
        if each.averages:
            table = means_table(each, _MOST_MEANS)
            yield {"heading": table.title, "chart": None, "caption": "", "table": table}
    for number, each in enumerate(filter(lambda x: x.setting_name, analysis.both_ways)):
        table = settings_table(each)
        drawn = figures.chart(
            f"settings{number or ''}",
            table.title,
            "Distributions with two settings; the table has their medians.",
            partial(analysis_figures.violins, each.effects),
        )
        caption = "The ring is the median, the bar spans the middle half of the models."
        yield {"heading": table.title, "chart": drawn, "caption": caption, "table": table}


_MOST_MEANS = 100


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
    """What the ranking says, in a sentence or two; of noise only how far the resources differ."""
    if ranking.noise:
        return ratio_text(ranking)
    if ranking.either:
        parts = ((ranking.population[part.whole_rows[0]], part) for part in ranking.either)
        return " ".join(f"Of the {kind}: {_said(part)}" for kind, part in parts)
    best, top = int(ranking.order[0]), int(np.argmax(ranking.performance))
    metric, resource = clip(ranking.metric, 40), ranking.resource
    standing = ranking.standing
    shared = 1
    if standing is not None and standing.best is not None:
        shared = int((standing.best == 1).sum())
    first = (
        "the best of" if shared == 1 else f"{shared:,} may be the best of"
    ) + f" {len(ranking.names):,}"
    text = (
        f"By {ranking.label} {first}{' is' if shared == 1 else '; the first is'} "
        f"{clip(ranking.names[best], 60)}: "
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


def _fraction(value: float, u: Any, i: int) -> str:
    shown = f"{value:.3f}"
    return shown if u is None or math.isnan(u[i]) else f"{shown} ± {u[i]:.3f}"


def _resource_cells(
    ranking: Ranking, i: int, front: Mask, *, u: bool, ranked: bool
) -> dict[str, Any]:
    """One row's cells; `u` where there is room for it, the figures have it all."""
    u_resource = float(ranking.u_resource[i]) if u and ranking.u_resource is not None else None
    score, standing = float(ranking.scores.pepr[i]), ranking.standing
    u_score = None if standing is None else float(standing.u_pepr[i])
    pm = "" if u_score is None or math.isnan(u_score) else f"± {u_score:.3f}"
    if standing is not None and standing.lopsided[i]:
        pm = f"({standing.low[i]:.3f}–{standing.high[i]:.3f})"
    return {
        "amount": format_amount(float(ranking.resource[i]), ranking.unit, u_resource),
        "score": f"{score:.3f}" if ranked else "–",
        "u": pm if ranked else "",
        "front": ranked and bool(front[i]),
        "percent": f"{100 * score:.1f}" if ranked else "0",
    }


def _outlier_facts(rankings: Sequence[Ranking]) -> Iterable[dict[str, Any]]:
    for ranking in rankings:
        for outlier in ranking.outliers:
            best = None
            if ranking.without is not None and not ranking.without.noise:
                best = ranking.without.names[int(ranking.without.order[0])]
            named = listed([clip(x, 40) for x in outlier.names], limit=8)
            facts = {"what": outlier.what, "why": outlier.why, "names": named}
            yield {**facts, "label": ranking.label, "best_without": best}
