"""What `-o FILE` writes: its extension chooses the form, which is checked before all else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pepr_profiler.errors import UsageError
from pepr_profiler.report import table
from pepr_profiler.units import format_duration, format_with_u

# What an extension needs, and the extra of ours that installs it.
_NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "html": (("jinja2", "matplotlib"), "report"),
    "png": (("matplotlib",), "report"),
    "svg": (("matplotlib",), "report"),
    "pdf": (("matplotlib",), "report"),
    "csv": ((), ""),
    "json": ((), ""),
    "tex": ((), ""),
    "parquet": (("pyarrow",), "parquet"),
}
FIGURES = ("png", "svg", "pdf")

Installed = Callable[[str], object]


def form_of(path: Path, *, installed: Installed = find_spec) -> str:
    """The form that a file's extension asks for: html, png, svg, pdf, csv, parquet, json or tex.

    UsageError for any other, for one that needs a package which is not installed, and for a folder
    that does not exist.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in _NEEDS:
        raise UsageError(
            f"{path} has no extension that says what to write"
            if not form
            else f"nothing here writes .{form} files",
            why=f"known are {', '.join(f'.{known}' for known in _NEEDS)}",
            fix="name for example -o report.html, -o figure.pdf or -o table.csv",
        )
    modules, extra = _NEEDS[form]
    lacking = [module for module in modules if installed(module) is None]
    if lacking:
        raise UsageError(
            f".{form} files need {' and '.join(lacking)}",
            why="not installed here",
            fix=f"pip install 'pepr-profiler[{extra}]'",
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"{path} cannot be written",
            why=f"there is no folder {path.absolute().parent}",
            fix="make it first, or name another",
        )
    return form


def run_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run as a table: its total, then its components, then its phases, each with ± u (k = 2).

    `energy_j` of a component is what of it is counted: the job's, or the device's in that scope.
    """
    energy = summary["energy"]
    total_j, time_s = energy.get("total_j"), summary.get("time_s")
    counted = "device_j" if energy.get("scope") == "device" else "job_j"

    def row(part: str, name: str, **facts: Any) -> dict[str, Any]:
        energy_j = facts.get("energy_j")
        columns: dict[str, Any] = {
            "part": part,
            "name": name,
            "source": None,
            "provenance": None,
            "in_total": None,
            "count": None,
            "duration_s": None,
            "energy_j": None,
            "u_j": None,
            "share": energy_j / total_j if energy_j is not None and total_j else None,
            "device_j": None,
            "others_j": None,
            "idle_j": None,
            "mean_w": None,
            "max_w": None,
        }
        return {**columns, **facts}

    rows = [
        row("total", str(summary.get("name") or summary["run_id"]), in_total=True,
            provenance=energy.get("provenance"), duration_s=time_s, energy_j=total_j,
            u_j=energy.get("u_j"), mean_w=energy.get("mean_w"))
    ]  # fmt: skip
    for c in energy.get("components") or []:
        figures = ("u_j", "device_j", "others_j", "idle_j", "mean_w", "max_w")
        rows.append(
            row("component", str(c["id"]), source=c["source"], provenance=c["provenance"],
                in_total=c["in_total"], duration_s=time_s, energy_j=c.get(counted),
                **{name: c.get(name) for name in figures})
        )  # fmt: skip
    for p in summary.get("phases") or []:
        known = p["energy_j"] is not None and p["duration_s"]
        mean_w = p["energy_j"] / p["duration_s"] if known else None
        rows.append(
            row("phase", str(p["name"]), count=p["count"], duration_s=p["duration_s"],
                energy_j=p["energy_j"], u_j=p["u_j"], mean_w=mean_w)
        )  # fmt: skip
    return rows


def run_table(summary: Mapping[str, Any], form: str) -> bytes:
    """`run_rows` as csv, parquet or tex."""
    rows = run_rows(summary)
    if form != "tex":
        return table.encode(rows, form)
    cells = [
        [
            str(r["name"]) if r["part"] != "total" else "total",
            r["part"] if r["in_total"] is not False else f"{r['part']}, not added",
            format_duration(r["duration_s"]),
            format_with_u(r["energy_j"], r["u_j"], "J"),
            "" if r["share"] is None or r["in_total"] is False else f"{r['share']:.1%}",
        ]
        for r in rows
    ]
    return latex(["", "part", "time", "energy", "share"], cells, align="llrrr")


def ranking_table(rows: Sequence[Mapping[str, Any]], form: str) -> bytes:
    """A study's rows (`Study.rows`) as csv, parquet or tex."""
    if form != "tex":
        return table.encode(rows, form)
    several = len({row["group"] for row in rows}) > 1
    cells = []
    for r in rows:
        score = f"{r['pepr']:.3f}"
        if r["u_pepr"] is not None and math.isfinite(r["u_pepr"]):
            score += f" ± {r['u_pepr']:.3f}"
        amount = f"{r['resource']:.4g}"
        if r["unit"]:
            u = r["u_resource"]
            amount = format_with_u(r["resource"], u, r["unit"]) if u is not None else amount
        cells.append(
            [
                *([_cut(r["group"] or "")] if several else []),
                r["label"],
                str(r["rank"]),
                _cut(r["name"]),
                str(r["n"]),
                f"{r['performance']:.3f}",
                amount,
                f"{r['r_norm']:.3f}",
                score,
            ]
        )
    heads = ["score", "#", "model", "runs", "performance", "resource", "$R$", "PePR"]
    align = "lrlrrrrr"
    if several:
        heads, align = ["group", *heads], "l" + align
    return latex(heads, cells, align=align)


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "µ": r"\textmu{}", "…": r"\ldots{}",
}  # fmt: skip


_CELL = 80


def _cut(text: Any) -> str:
    """A name for a table that is to be set: the other forms have it whole."""
    return str(text) if len(str(text)) <= _CELL else f"{str(text)[: _CELL - 1]}…"


def latex(heads: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> bytes:
    r"""A LaTeX table for the booktabs package; `heads` are LaTeX already, cells are text."""
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines.append(" & ".join(h.replace("#", r"\#") for h in heads) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines).encode("utf-8", "replace")


def _tex(text: str) -> str:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return "".join(_TEX.get(c, c) for c in line)
