"""The verbs that look at recorded runs: report, runs, compare."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli, write_replay
from sim.nvml import NvmlSim, Scenario
from sim.powercap import Tree

from pepr_profiler.commands import main

BuildNvml = Callable[[Scenario], NvmlSim]
BuildTree = Callable[..., Tree]
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Three measured runs of one experiment: energies 1 : 2 : 4, the dearest is the best."""
    cli = Cli(tmp_path_factory.mktemp("study"))
    for name, power_w, accuracy in (
        ("small", 100, 0.80),
        ("middle", 200, 0.90),
        ("big", 400, 0.95),
    ):
        spec = write_replay(
            cli.folder / name,
            [f"meter power W 1 0 gauge test kind=gpu component=gpu:{name}"],
            [(0.0, float(power_w))],
        )
        result = cli(
            "-q", "--experiment", "sizes", "--name", name, "--sensor", spec,
            "--cpu-power", "0.001:0.002", "--metric", "acc=acc ([0-9.]+)",
            "--", sys.executable, "-c", f"import time; time.sleep(0.5); print('acc {accuracy}')",
        )  # fmt: skip
        assert result.status == 0, result.stderr
    return cli


@pytest.fixture
def say(study: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    """The command line in this process, on the study's store; its status, stdout and stderr."""
    monkeypatch.setenv("PEPR_STORE", str(study.store))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        out, err = capsys.readouterr()
        return status, out, err

    return run


def ids(cli: Cli) -> dict[str, str]:
    return {path.name.rpartition("-")[0]: path.name for path in cli.runs()}


# --- compare --------------------------------------------------------------------------------------


def test_compare_ranks_an_experiment_by_pepr(study: Cli, say: Say) -> None:
    status, out, err = say("compare", "--experiment", "sizes", "--mix-provenance", "--json", "-")
    assert status == 0, err
    ranking = json.loads(out)["rankings"][0]
    # truth: PePR = P / (1 + (E - E_min) / (E_max - E_min)), from the runs' own files
    energy_j, accuracy = {}, {"small": 0.80, "middle": 0.90, "big": 0.95}
    for name, run in ids(study).items():
        summary = json.loads((study.store / "runs" / run / "run.json").read_text())
        energy_j[name] = summary["energy"]["total_j"]
    low, high = min(energy_j.values()), max(energy_j.values())
    pepr = {n: accuracy[n] / (1 + (energy_j[n] - low) / (high - low)) for n in energy_j}
    order = sorted(pepr, key=lambda name: -pepr[name])
    assert order == ["small", "middle", "big"]
    rows = ranking["rows"]
    assert [row["name"] for row in rows] == order
    assert [row["pepr"] for row in rows] == pytest.approx([pepr[name] for name in order])
    status, out, _ = say("compare", "--experiment", "sizes", "--mix-provenance")
    lines = [line for line in out.splitlines() if any(name in line for name in order)]
    assert [next(n for n in order if n in line) for line in lines] == order
    assert "*" in lines[0]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--experiment", "none"], "none"),
        (["--resource", "luck"], "luck"),
        (["--metric", "f1"], "f1"),
        (["small"], "fix:"),
        (["no-such-run"], "no-such-run"),
        (["--bounds", "5:1"], "5:1"),
        (["--resource", "carbon"], "--region"),
    ],
    ids=" ".join,
)
def test_compare_refuses_what_cannot_be_ranked(say: Say, arguments: list[str], says: str) -> None:
    status, out, err = say("compare", *arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert "fix:" in err or "luck" in err


# --- report, runs ---------------------------------------------------------------------------------


def test_report_finds_a_run_by_id_prefix_or_path_and_says_the_same(study: Cli, say: Say) -> None:
    run = study.store / "runs" / ids(study)["small"]
    written = json.loads((run / "run.json").read_text())
    for ref in (run.name, "smal", str(run)):
        status, out, _ = say("report", ref, "--json", "-")
        assert (status, json.loads(out)) == (0, written)
    status, out, _ = say("report", "small")
    assert "exit 0" in out.splitlines()[0]
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


def test_report_of_what_is_no_run_says_what_to_do(say: Say, tmp_path: Path) -> None:
    for arguments in (
        ("report", "nothing"),
        ("report", "nothing", "--store", str(tmp_path / "none")),
        ("report", "s", "--store", str(Path(__file__))),
        ("runs", "set", "nothing", "a=1"),
    ):
        status, out, err = say(*arguments)
        assert (status, out) == (2, "")
        assert "there is no run" in err
        assert "fix:" in err


def test_ambiguous_prefix_names_the_runs(say: Say) -> None:
    status, _, err = say("report", "")
    assert status == 2
    assert "ambiguous" in err


def test_runs_lists_every_run_oldest_first(study: Cli, say: Say) -> None:
    status, out, _ = say("runs", "list", "--experiment", "sizes")
    names = ids(study)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        names["small"], names["middle"], names["big"],
    ]  # fmt: skip
    assert "acc 0.95" in out.splitlines()[-1]
    assert say("runs", "list", "--experiment", "other")[1] == ""


def test_metric_set_afterwards_is_the_runs_and_changes_nothing_else(study: Cli) -> None:
    spec = write_replay(study.folder / "g", ["fan count 1 1 0 gauge test"], [(0.0, 1.0)])
    _, before = study.measure("--sensor", spec, "--experiment", "later", "--", "sleep", "0.2")
    assert before["metrics"] == {}
    result = study("runs", "set", before["run_id"], "accuracy=0.91", "epoch=3")
    assert (result.status, result.stdout) == (0, b"")
    after = study.report(before["run_id"])
    assert after["metrics"] == {"accuracy": 0.91, "epoch": 3.0}
    assert after["performance"] == {"metric": "accuracy", "value": 0.91}
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"metrics", "performance"}
    study("runs", "set", before["run_id"], "accuracy=0.5")
    assert study.report(before["run_id"])["performance"]["value"] == 0.5


@pytest.mark.parametrize("metric", ["accuracy", "accuracy=", "=0.5", "accuracy=high", "a=nan"])
def test_metric_that_is_no_number_is_refused(say: Say, metric: str) -> None:
    status, _, err = say("runs", "set", "small", metric)
    assert status == 2
    assert "NAME=VALUE" in err
    assert "fix:" in err


def test_output_into_a_closed_pipe_ends_without_a_trace_back(study: Cli) -> None:
    script = f"{sys.executable} -m pepr_profiler report small | true"
    shell = subprocess.run(
        ["sh", "-c", script], env=study.environment(), capture_output=True, check=False
    )
    assert shell.stderr == b""
