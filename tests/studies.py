"""What studies are made of: runs on disk, the paper's tables, commands called in this process."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import click
import pytest
from cli import REPOSITORY
from click.testing import CliRunner, Result

from pepr_profiler.commands.score import score
from pepr_profiler.errors import PeprError


def paper_table(name: str) -> Path:
    """A table of the paper's, which lies beside the repository if at all; skips without it."""
    table = REPOSITORY.parent / "shared" / "paper" / f"{name}.csv"
    if not table.exists():
        pytest.skip(f"the paper's table is not beside the repository: {table}")
    return table


def paper_columns(name: str) -> dict[str, list[str]]:
    with paper_table(name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: [row[column] for row in rows] for column in rows[0]}


def energy(
    total_j: float, *, provenance: str = "measured", u_j: float | None = None
) -> dict[str, Any]:
    return {
        "total_j": total_j,
        "u_j": total_j / 20 if u_j is None else u_j,
        "mean_w": total_j / 60,
        "provenance": provenance,
        "components": [],
    }


def run_summary(name: str, seed: int = 1, **changes: Any) -> dict[str, Any]:
    """What a summary of docs/design.md has, as far as a comparison reads it."""
    summary: dict[str, Any] = {
        "schema": 1,
        "run_id": f"{name}-{seed}",
        "job": None,
        "name": name,
        "experiment": "study",
        "command": ["python", "train.py", "--seed", str(seed)],
        "host": "node",
        "started_at": f"2025-03-01T12:00:{seed:02d}Z",
        "duration_s": 60.0,
        "exit_code": 0,
        "complete": True,
        "energy": energy(1000.0),
        "time_s": 60.0,
        "memory": {"peak_rss_bytes": 2_000_000_000, "gpu_peak_bytes": None},
        "carbon": {"g_co2e": 4.0},
        "metrics": {"accuracy": 0.9, "f1": 0.8},
        "performance": {"metric": "accuracy", "value": 0.9},
    }
    return summary | changes


def store_run(store: Path, run: dict[str, Any], **changes: Any) -> None:
    """A finished run on disk: `run`, with all else that run.json has."""
    whole = {
        "boot_id": "b",
        "clock": [{"t_ns": 1, "unix_ns": 2}, {"t_ns": 60_000_000_001, "unix_ns": 60_000_000_002}],
        "phases": [],
        "sampler": {"cpu_s": 0.1, "samples": 10, "dropped": 0, "late": 0, "rate_hz": {}},
        "missing": [],
        "warnings": [],
    }
    directory = store / "runs" / run["run_id"]
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({**whole, **run, **changes}))


def invoke(command: click.Command, *args: object) -> Result:
    """A command with these arguments, in this process; its exception is kept in the result."""
    return CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=True)


def scored(*args: object) -> Result:
    """`score` with these arguments, which must work."""
    result = invoke(score, *args)
    assert result.exit_code == 0, result.exception or result.output
    return result


def refused(*args: object) -> PeprError:
    """The error of `score` with these arguments, before which it prints nothing."""
    result = invoke(score, *args)
    assert isinstance(result.exception, PeprError), result.exception or result.output
    assert result.stdout == "" and result.stderr == ""
    return result.exception
