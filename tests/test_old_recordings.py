"""Recordings made by earlier versions open, and every measured energy is what was printed then.

An uncertainty may be known better by now, and differ by half. Steps of power may be coarser: their
sum is the same. Memory without a sensor is estimated by another rule, so that runs with such an
estimate are compared without it. How sure a ranking is comes from draws that move its range too.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, ended, python
from sim.nvml import Gpu, NvmlSim, Scenario
from sim.waves import Constant

KEPT = Path(__file__).parent / "data" / "recordings"
MADE = sorted(folder for folder in KEPT.iterdir() if (folder / "runs").is_dir())
RUNS = sorted(run for folder in MADE for run in (folder / "runs").iterdir())
PROSE = {"text", "hint", "what", "why", "fix", "excluded"}  # for people, and reworded at times
FREE = {"metrics", "rate_hz", "refresh_s", "wasted", "gap_s", "budget"}  # keys of a run's own
# Terms of an uncertainty, as far as it is sampled, and how sure a ranking is.
TERMS = ("edges_j", "lag_j", "duty_j", "quantisation_j", "u_pepr", "swap_with_next")


def differences(now: Any, then: Any, where: str = "") -> Iterator[str]:
    """What was there then and is missing or another value now; what is new is none."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key, value in then.items():
            if key not in now:
                yield f"{where}.{key} is missing"
            elif key not in PROSE:
                yield from differences(now[key], value, f"{where}.{key}")
    elif isinstance(then, list) and isinstance(now, list):
        if len(now) != len(then):
            yield f"{where} has {len(now)} entries, not {len(then)}"
        if where.endswith("trace_w"):
            sums = [math.fsum(watts or 0.0 for watts in trace) for trace in (now, then)]
            if sums[0] != pytest.approx(sums[1], rel=1e-3):
                yield f"{where} sums up to {sums[0]}, not {sums[1]}"
            return
        for number, pair in enumerate(zip(now, then, strict=False)):
            yield from differences(*pair, f"{where}[{number}]")
    elif isinstance(then, float) and isinstance(now, float):
        key = where.rstrip("0123456789[]")
        if key.endswith(TERMS):
            if math.isnan(now) or now < 0:
                yield f"{where} is {now!r}"
        elif key.endswith(("u_j", "u_resource")) and then / 1.5 <= now <= 1.5 * then:
            pass
        elif now != pytest.approx(then, rel=1e-9, abs=0.0, nan_ok=True):  # sums in another order
            yield f"{where} is {now!r}, not {then!r}"
    elif now is None and where.endswith(("swap_with_next", "u_pepr")):
        pass  # one run of a model without a ± of its own: how sure it is was said to be known
    elif now != then or type(now) is not type(then):
        yield f"{where} is {now!r}, not {then!r}"


def measured(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without estimates, if its memory is estimated: only what sensors gave is left."""
    energy = summary["energy"]
    estimates = [c for c in energy["components"] if c["provenance"] == "modelled"]
    if all(c["kind"] != "dram" for c in estimates):
        return summary
    left = {**energy, "components": [c for c in energy["components"] if c not in estimates]}
    counted = "device_j" if energy["scope"] == "device" else "job_j"
    for total, part in (("total_j", counted), ("others_j", "others_j"), ("idle_j", "idle_j")):
        left[total] = energy[total] - math.fsum(c[part] for c in estimates)
    del left["mean_w"], left["u_j"]
    phases = [{**p, "energy_j": None, "u_j": None} for p in summary["phases"]]
    progress = summary["progress"] and {**summary["progress"], "energy_j": None, "u_j": None}
    return {**summary, "energy": left, "phases": phases, "progress": progress, "carbon": None}


def keys(value: Any, where: str = "") -> Iterator[str]:
    """The path of every key: `energy.components[].job_j`."""
    if isinstance(value, dict) and where.rpartition(".")[2] not in FREE:
        for key, inner in value.items():
            path = f"{where}.{key}".lstrip(".")
            yield path
            yield from keys(inner, path)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner, f"{where}[]")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parents[1].name}/{run.name}")
def test_the_report_of_a_recording_has_the_numbers_of_its_time(run: Path, cli: Cli) -> None:
    printed = run.parents[1] / "printed" / f"{run.name}.json"
    # A finished run keeps its summary, which was what `report` printed.
    then = json.loads((printed if printed.exists() else run / "run.json").read_text())
    copy = shutil.copytree(run, cli.store / "runs" / run.name)
    assert list(differences(measured(cli.report(copy)), measured(then))) == []


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.name)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("list", "runs list --json"),
        ("export", "runs export - --format json"),
        ("compare", "compare --experiment sizes --resource energy,carbon,time,memory --json -"),
    ],
)
def test_a_store_of_recordings_is_listed_and_ranked_as_in_its_time(
    made: Path, name: str, arguments: str, cli: Cli
) -> None:
    then = json.loads((made / "printed" / f"{name}.json").read_text())
    shutil.copytree(made / "runs", cli.store / "runs")
    for _ in ("read one by one", "from the index"):
        result = cli(*arguments.split())
        assert result.status == 0, result.stderr
        assert list(differences(json.loads(result.stdout), then)) == []


def test_no_key_of_an_earlier_run_json_is_missing_today(
    cli: Cli, nvml_sim: Callable[[Scenario], NvmlSim]
) -> None:
    then: set[str] = set()
    for run in RUNS:
        then |= set(keys(json.loads((run / "run.json").read_text())))
    assert {"energy.components[].job_j", "recording.window_ns", "progress.energy_j"} <= then

    absent = ("nvmlDeviceGetComputeRunningProcesses_v3",)  # so that something is missing
    sensor = ("--sensor", nvml_sim(Scenario((Gpu(Constant(100.0)),), absent=absent)).spec)
    code = """
import time
from pepr_profiler import profile
with profile("inner") as run, run.phase("train"):
    run.log(epoch=1, accuracy=0.5)
    time.sleep(1.0)
"""
    options = [*sensor, "--region", "DK", "--metric", "accuracy=(x)"]
    assert cli("run", *options, "--", *python(code)).status == 0
    with ended(subprocess.Popen(["sleep", "9"])) as job:
        assert cli("attach", *sensor, "--duration", "0.5s", str(job.pid)).status == 0

    now = {key for run in cli.runs() for key in keys(json.loads((run / "run.json").read_text()))}
    assert sorted(then - now) == []
