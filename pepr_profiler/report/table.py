"""Runs as a table: one flat row each, the units in the names of the columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pepr_profiler.errors import UsageError

FORMATS = ("csv", "json", "jsonl", "parquet")

_KINDS = ("gpu", "cpu", "dram", "other")


def flat_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as one row; None is unknown. `u` is expanded (k = 2), `energy_KIND_j` the job's."""
    energy, carbon, performance = run["energy"], run["carbon"] or {}, run["performance"] or {}
    by_kind: dict[str, float | None] = dict.fromkeys(f"energy_{kind}_j" for kind in _KINDS)
    for part in energy["components"]:
        key = f"energy_{part['kind']}_j"
        if part["in_total"] and part["job_j"] is not None and key in by_kind:
            by_kind[key] = (by_kind[key] or 0.0) + part["job_j"]
    return {
        "run_id": run["run_id"],
        "job": run["job"],
        "name": run["name"],
        "experiment": run["experiment"],
        "host": run["host"],
        "started_at": run["started_at"],
        "complete": run["complete"],
        "exit_code": run["exit_code"],
        "time_s": run["time_s"],
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


def encode(rows: Sequence[Mapping[str, Any]], form: str) -> bytes:
    """Rows as a file of one of FORMATS, with the columns of all of them in order of appearance.

    In CSV what is unknown is empty; numbers have all their digits. UsageError for parquet where
    pyarrow is not installed.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if form == "parquet":
        return _parquet(rows, columns)
    if form == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "backslashreplace")
    full = [{name: row.get(name) for name in columns} for row in rows]
    if form == "json":
        return (json.dumps(full, indent=1) + "\n").encode()
    return "".join(json.dumps(row) + "\n" for row in full).encode()


def _parquet(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "a parquet file cannot be written",
            why="pyarrow is not installed",
            fix="pip install 'pepr-profiler[parquet]', or write csv or jsonl",
        ) from None
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()
