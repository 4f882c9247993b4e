"""What reports write as files: `-o FILE`, `--json FILE` and `runs export`.

The extension of FILE chooses its form, which is checked before anything is computed.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pepr_profiler.energy.sources import KINDS
from pepr_profiler.errors import UsageError
from pepr_profiler.report import FORMS
from pepr_profiler.report.components import counted
from pepr_profiler.units import known

if TYPE_CHECKING:
    from pepr_profiler.study.analysis import Analysis, GroupMeans, SettingEffect
    from pepr_profiler.study.ranking import Ranking
    from pepr_profiler.study.study import Study

Installed = Callable[[str], object]


def form_of(path: Path, *, installed: Installed = find_spec) -> str:
    """The form that a file's extension asks for, a key of FORMS.

    UsageError for any other, for one that needs a package which is not installed, and for a folder
    that does not exist.
    """
    form = path.suffix.lower().removeprefix(".")
    form = {"tab": "tsv"}.get(form, form)
    if form not in FORMS:
        raise UsageError(
            f"{path} has no extension that says what to write"
            if not form
            else f".{form} files cannot be written",
            why=f"the known ones are {', '.join(f'.{known}' for known in FORMS)}",
            fix="name for example -o report.html, -o figure.pdf or -o table.csv",
        )
    require_packages(form, installed=installed)
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"{path} cannot be written",
            why=f"there is no folder {path.absolute().parent}",
            fix="make it first, or name another",
        )
    return form


def require_packages(form: str, *, installed: Installed = find_spec) -> None:
    """UsageError if a form needs a package that is not installed."""
    _, modules, extra = FORMS.get(form, ("table", (), ""))
    lacking = [module for module in modules if installed(module) is None]
    if lacking:
        raise UsageError(
            f".{form} files need {' and '.join(lacking)}",
            why="not installed here",
            fix=f"pip install 'pepr-profiler[{extra}]'",
        )


def run_json(summary: Mapping[str, Any]) -> str:
    """A summary as the text of a JSON file."""
    return json.dumps(summary, indent=1, allow_nan=False) + "\n"


def ranking_json(study: Study, analysis: Analysis | None = None) -> str:
    """The rankings of a study as the text of a JSON file, with means over groups and compared
    settings where an analysis has them.
    """
    both = () if analysis is None else analysis.both_ways
    data = {
        "schema": 1,
        "rankings": [ranking_data(ranking) for ranking in study.rankings],
        "left_out": [{"run": run, "why": why} for run, why in study.left_out],
        "means": [_means(each, bool(a.of)) for a in both if a.averages for each in a.means],
        "settings": [
            _effect(each, a.setting_name, bool(a.of))
            for a in both
            if a.setting_name
            for each in a.effects
        ],
    }
    return _visible(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def _means(means: GroupMeans, without_outliers: bool) -> dict[str, Any]:
    """Means over groups as JSON data, best score first; SDs are spreads over the groups."""
    traits = means.traits
    rows = [
        {
            "name": traits.models[i],
            "setting": None if traits.settings is None else traits.settings[i],
            "class": None if traits.classes is None else traits.classes[i],
            "size": None if traits.sizes is None else float(traits.sizes[i]),
            "performance": known(float(means.performance[i])),
            "sd_performance": known(float(means.sd_performance[i])),
            "pepr": known(float(means.pepr[i])),
            "sd_pepr": known(float(means.sd_pepr[i])),
        }
        for i in means.order.tolist()
    ]
    return {
        "label": means.label,
        "metric": means.metric,
        "groups": list(means.groups),
        "without_outliers": without_outliers,
        "left_out": [{"group": group, "why": why} for group, why in means.left_out],
        "missing": [{"name": name, "groups": list(groups)} for name, groups in means.missing],
        "rows": rows,
    }


def _effect(effect: SettingEffect, setting: str, without_outliers: bool) -> dict[str, Any]:
    """A quantity with two settings and its paired test as JSON data."""
    return {
        "setting": setting,
        "quantity": effect.name,
        "without_outliers": without_outliers,
        "values": [
            {"setting": name, "by_model": dict(zip(effect.models, column.tolist(), strict=True))}
            for name, column in zip(effect.settings, effect.values, strict=True)
        ],
        "median_difference": known(effect.test.median),
        "p": known(effect.test.p),
        "effect": known(effect.test.effect),
    }


def ranking_data(ranking: Ranking) -> dict[str, Any]:
    """The ranking as JSON data, best score first; SI or the table's own unit; unknown is None."""
    from pepr_profiler.study.ranking import flat_rows

    low, high = ranking.scores.bounds
    order, standing = ranking.order, ranking.standing
    rows = []
    for i, flat in zip(order, flat_rows(ranking), strict=True):
        row = {key: value for key, value in flat.items() if key not in _OF_ALL_ROWS}
        rows.append({**row, "runs": list(ranking.run_ids[i]) if ranking.run_ids else []})
    return {
        "label": ranking.label,
        "group": ranking.group,
        "metric": ranking.metric,
        "percent": ranking.percent,
        "transform": ranking.transform,
        "resource": ranking.resource_name,
        "resource_key": ranking.key,
        "unit": ranking.unit or None,
        "provenance": ranking.provenance,
        "bounds": {
            "min": low,
            "max": high,
            "set_by": "given" if ranking.bounds_given else "cohort",
            "source": ranking.bounds_source or None,
        },
        "distinguishable": ranking.scores.distinguishable,
        "resource_ratio": _interval(standing.ratio) if standing else None,
        "resource_difference": _interval(standing.difference) if standing else None,
        "warnings": [caution._asdict() for caution in ranking.warnings],
        "rows": rows,
        "doubts": [
            {"what": outlier.what, "why": outlier.why, "names": list(outlier.names)}
            for outlier in ranking.outliers
        ],
        "without_doubtful": ranking_data(ranking.without) if ranking.without else None,
        "either_population": [ranking_data(each) for each in ranking.either],
    }


def _interval(ends: tuple[float, float, float]) -> dict[str, float | None]:
    """A value and the ends of its interval, such as the ratio of the greatest resource to the
    least.
    """
    value, low, high = (x if math.isfinite(x) else None for x in ends)
    return {"value": value, "low": low, "high": high}


_OF_ALL_ROWS = {"group", "metric", "resource_key", "unit", "label", "distinguishable"}


def flat_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as one flat row, the units in the names of its columns; None is unknown.

    `energy_u_j` is expanded (k = 2), `energy_KIND_j` is the job's.
    """
    energy, carbon, performance = run["energy"], run["carbon"] or {}, run["performance"] or {}
    by_kind: dict[str, float | None] = dict.fromkeys(f"energy_{kind}_j" for kind in KINDS)
    for part in energy["components"]:
        key = f"energy_{part['kind']}_j"
        if part["in_total"] and part["job_j"] is not None and key in by_kind:
            by_kind[key] = (by_kind[key] or 0.0) + part["job_j"]
    return {
        **{key: run[key] for key in _SAME_IN_SUMMARY},
        "energy_j": energy["total_j"],
        "energy_u_j": energy["u_j"],
        "power_mean_w": energy["mean_w"],
        "provenance": energy["provenance"],
        **by_kind,
        "carbon_g_co2e": carbon.get("g_co2e"),
        "intensity_g_per_kwh": carbon.get("intensity_g_per_kwh"),
        "pue": carbon.get("pue"),
        "peak_rss_bytes": run["memory"]["peak_rss_bytes"],
        "gpu_peak_bytes": run["memory"]["gpu_peak_bytes"],
        "performance_metric": performance.get("metric"),
        "performance": performance.get("value"),
        **{f"metric_{name}": value for name, value in run["metrics"].items()},
    }


_SAME_IN_SUMMARY = (
    *("run_id", "job", "name", "experiment", "host", "started_at", "complete", "exit_code"),
    "time_s",
)


_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_FORMULA = tuple("=+-@\t\n＝＋－＠")


def spreadsheet_cell(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet runs as a formula and no terminal obeys.

    A text that begins like a formula gets a ' in front, which spreadsheets do not show. Numbers
    stay numbers, also in a text. Control characters become escapes; tabs and line ends stay.
    """
    if not isinstance(value, str):
        return value
    text = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), value)
    if len(text) > 1 and (text.startswith(_FORMULA) or text.lstrip().startswith(_FORMULA)):
        try:
            float(text)
        except ValueError:
            return f"'{text}"
    return text


def _unchanged(value: Any) -> Any:
    return value


def _visible(text: str) -> str:
    """JSON with what is no printable character as its escape, which means the same."""
    if text.isascii():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def encode(rows: Sequence[Mapping[str, Any]], form: str, *, raw_csv: bool = False) -> bytes:
    """Rows as a file of one of EXPORTS, with the columns of all of them in order of appearance.

    In CSV and TSV what is unknown is empty, numbers have all their digits, and texts are
    `spreadsheet_cell`s unless `raw_csv`.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if form == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        file = io.BytesIO()
        parquet.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), file)
        return file.getvalue()
    if form in ("csv", "tsv"):
        text = io.StringIO(newline="")
        own: Callable[[Any], Any] = _unchanged if raw_csv else spreadsheet_cell
        separator = "\t" if form == "tsv" else ","
        writer = csv.writer(text, delimiter=separator, lineterminator="\n")
        writer.writerow(map(own, columns))
        writer.writerows([own(row.get(name)) for name in columns] for row in rows)
        return text.getvalue().encode("utf-8", "backslashreplace")
    full = [{name: row.get(name) for name in columns} for row in rows]
    if form == "json":
        return (json.dumps(full, indent=1) + "\n").encode()
    return "".join(json.dumps(row) + "\n" for row in full).encode()


def run_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run as a table: its total, its devices, a job's ranks, its phases, each with ± u (k = 2).

    `energy_j` of a device is the part that is counted: the job's share, or all of it.
    """
    energy = summary["energy"]
    total_j, time_s = energy.get("total_j"), summary.get("time_s")

    def row(part: str, name: str, **facts: Any) -> dict[str, Any]:
        energy_j = facts.get("energy_j")
        share = energy_j / total_j if energy_j is not None and total_j else None
        return {**dict.fromkeys(_RUN_COLUMNS), "part": part, "name": name, "share": share, **facts}

    rows = [
        row("total", str(summary.get("name") or summary["run_id"]), in_total=True,
            provenance=energy.get("provenance"), duration_s=time_s, energy_j=total_j,
            u_j=energy.get("u_j"), mean_w=energy.get("mean_w"))
    ]  # fmt: skip
    for c in energy.get("components") or []:
        figures = ("u_j", "device_j", "others_j", "idle_j", "mean_w", "max_w")
        name = f"{c['id']} {c.get('host', '')}".rstrip()
        rows.append(
            row("component", name, source=c["source"], provenance=c["provenance"],
                in_total=c["in_total"], duration_s=time_s, energy_j=c.get(counted(energy)),
                **{name: c.get(name) for name in figures})
        )  # fmt: skip
    for rank in summary.get("ranks") or []:
        name = rank["run_id"] if rank["rank"] is None else f"rank {rank['rank']}"
        energy_j, duration_s = rank["energy_j"], rank["duration_s"]
        rows.append(
            row("rank", str(name), duration_s=duration_s, energy_j=energy_j, u_j=rank["u_j"],
                mean_w=energy_j / duration_s if energy_j is not None and duration_s else None)
        )  # fmt: skip
    for p in summary.get("phases") or []:
        known = p["energy_j"] is not None and p["duration_s"]
        mean_w = p["energy_j"] / p["duration_s"] if known else None
        rows.append(
            row("phase", str(p["name"]), count=p["count"], duration_s=p["duration_s"],
                energy_j=p["energy_j"], u_j=p["u_j"], mean_w=mean_w)
        )  # fmt: skip
    return rows


_RUN_COLUMNS = (
    *("part", "name", "source", "provenance", "in_total", "count", "duration_s", "energy_j", "u_j"),
    *("share", "device_j", "others_j", "idle_j", "mean_w", "max_w"),
)


def run_table(summary: Mapping[str, Any], form: str, *, raw_csv: bool = False) -> bytes:
    """A run as a table: `run_rows` as csv, tsv or parquet, or a tex or md table for a paper."""
    if FORMS[form][0] != "typeset":
        return encode(run_rows(summary), form, raw_csv=raw_csv)
    from pepr_profiler.report import typeset

    return typeset.typeset([typeset.run_table(summary)], form)


def runs_table(runs: Sequence[Mapping[str, Any]], form: str, *, raw_csv: bool = False) -> bytes:
    """Summaries as a file of one of EXPORTS, a row each."""
    rows = [flat_run(run) for run in runs]
    if form not in FORMS or FORMS[form][0] != "typeset":
        return encode(rows, form, raw_csv=raw_csv)
    from pepr_profiler.report import typeset

    partial = [bool(run["energy"].get("partial")) for run in runs]
    return typeset.typeset([typeset.runs_table(rows, partial)], form)
