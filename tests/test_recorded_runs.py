"""The commands that look at recorded runs: report, runs, compare."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cli import Cli, ended, until, write_meter, write_replay
from pyarrow import parquet

from pepr_profiler.commands import main
from pepr_profiler.commands.runs import _instant

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Three measured runs of one experiment: energies 1 : 2 : 4, the most expensive is the best."""
    cli = Cli(tmp_path_factory.mktemp("study"))
    for name, power_w, accuracy in (
        ("small", 100, 0.80),
        ("middle", 200, 0.90),
        ("big", 400, 0.95),
    ):
        spec = write_meter(cli.folder / name, power_w, name)
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
        (["--range", "5:1"], "5:1"),
        (["--bounds", "5:1"], "5:1"),
        (["--resource", "carbon"], "--region"),
    ],
    ids=" ".join,
)
def test_compare_refuses_what_cannot_be_ranked(say: Say, arguments: list[str], says: str) -> None:
    status, out, err = say("compare", *arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert "fix:" in err


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


def test_runs_are_listed_by_what_they_are_and_when(study: Cli, say: Say) -> None:
    names = ids(study)
    for arguments, listed in (
        (("--name", "m*"), ["middle"]),
        (("--name", "[bs]*", "--experiment", "sizes"), ["small", "big"]),
        (("--host", os.uname().nodename, "--experiment", "sizes"), ["small", "middle", "big"]),
        (("--host", "elsewhere"), []),
        (("--since", "2099-01-01"), []),
        (("--since", "1h", "--until", "2099-01-01T00:00Z", "--name", "big"), ["big"]),
        (("--until", "1h"), []),
        (("--state", "failed"), []),
        (("--state", "done", "--provenance", "mixed", "--name", "small"), ["small"]),
    ):
        status, out, _ = say("runs", "list", *arguments)
        assert status == 0
        assert [line.split()[0] for line in out.splitlines()] == [names[name] for name in listed]
        found = json.loads(say("runs", "list", "--json", *arguments)[1])
        assert [run["name"] for run in found["runs"]] == listed
        assert found["damaged"] == []
    # estimated is what reports call an energy that summaries call modelled
    estimated, modelled = (
        say("runs", "list", "--provenance", word)[1] for word in ("estimated", "modelled")
    )
    assert estimated == modelled and "sizes" not in estimated
    for when in ("yesterday", "", "-", "3x", "2026-13-01"):
        status, out, err = say("runs", "list", "--since", when)
        assert (status, out) == (2, "")
        assert "--since" in err and "fix:" in err


def test_times_without_a_zone_are_utc_as_they_are_listed() -> None:
    assert _instant("2026-11-20", option="") == "2026-11-20T00:00:00.000+00:00"
    assert _instant("2026-11-20T12:30", option="") == "2026-11-20T12:30:00.000+00:00"
    assert _instant("2026-11-20T12:30+02:00", option="") == "2026-11-20T10:30:00.000+00:00"
    assert _instant("2026-11-20T12:30Z", option="") == "2026-11-20T12:30:00.000+00:00"
    week_ago = datetime.now(timezone.utc) - timedelta(days=7)
    found = datetime.fromisoformat(_instant("7d", option=""))
    assert abs(found - week_ago) < timedelta(minutes=1)


def test_damaged_runs_are_named_wherever_runs_are_taken_together(study: Cli, say: Say) -> None:
    first = study.store / "runs" / ids(study)["small"]
    copy, torn = first.with_name("small-copy"), first.with_name("torn\x1b[2J")
    shutil.copytree(first, copy)
    shutil.copytree(first, torn)
    (torn / "run.json").write_text("{")
    try:
        status, out, _ = say("runs", "list")
        bad = [line for line in out.splitlines() if " damaged: " in line]
        assert status == 0
        assert len(bad) == 2
        assert bad[0].startswith("small-copy") and first.name in bad[0]
        assert bad[1].startswith(r"torn\x1b[2J")
        for arguments in (
            ("compare", "--experiment", "sizes", "--mix-provenance"),
            ("runs", "export", "-", "--format", "csv"),
        ):
            status, out, err = say(*arguments)
            assert status == 0
            assert "small-copy" in err and "torn" in err
            assert "small-copy" not in out
    finally:
        shutil.rmtree(copy)
        shutil.rmtree(torn)


def test_show_tells_the_facts_of_one_run(study: Cli, say: Say) -> None:
    run = ids(study)["big"]
    summary = json.loads((study.store / "runs" / run / "run.json").read_text())
    status, out, _ = say("runs", "show", "big")
    assert status == 0
    facts = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["run", run] in facts
    assert ["experiment", "sizes"] in facts
    assert ["metric", "acc = 0.95"] in facts
    assert ["directory", str(study.store / "runs" / run)] in facts
    assert sum("gpu:big" in line for line in out.splitlines()) == 1
    assert json.loads(say("runs", "show", "big", "--json")[1]) == summary


def test_export_has_a_row_a_run_whatever_its_form(study: Cli, say: Say, tmp_path: Path) -> None:
    wanted = ("--experiment", "sizes")
    for form in ("csv", "json", "jsonl", "parquet"):
        path = tmp_path / f"runs.{form}"
        assert say("runs", "export", str(path), *wanted)[0] == 0
    # each form by a reader of its own
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    full = json.loads((tmp_path / "runs.json").read_text())
    assert [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()] == full
    assert parquet.read_table(tmp_path / "runs.parquet").to_pylist() == full
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in full] == rows
    # truth: the runs' own files
    assert [row["name"] for row in full] == ["small", "middle", "big"]
    for row in full:
        summary = json.loads((study.store / "runs" / row["run_id"] / "run.json").read_text())
        assert row["energy_j"] == summary["energy"]["total_j"]
        assert row["energy_u_j"] == summary["energy"]["u_j"]
        assert row["metric_acc"] == summary["metrics"]["acc"]
        parts = (row["energy_gpu_j"], row["energy_cpu_j"], row["energy_dram_j"])
        assert sum(part or 0.0 for part in parts) == pytest.approx(row["energy_j"])
        assert row["carbon_g_co2e"] is None
    status, out, err = say("runs", "export", str(tmp_path / "runs.xls"), *wanted)
    assert (status, out) == (2, "")
    assert "csv" in err and "fix:" in err
    assert say("runs", "export", "-", "--format", "csv", *wanted)[0] == 0


def test_run_is_renamed_and_moved_to_another_experiment(study: Cli) -> None:
    _, run = study.measure("--name", "draft", "--experiment", "first", "--", "true")
    said = study("runs", "set", "draft", "name=final", "experiment=second", "f1=0.5")
    assert (said.status, said.stdout) == (0, b"")
    after = study.report(run["run_id"])
    assert (after["name"], after["experiment"]) == ("final", "second")
    assert after["metrics"] == {"f1": 0.5}
    study("runs", "set", "draft", "experiment=")
    assert study.report(run["run_id"])["experiment"] is None
    assert study("runs", "set", "draft", "name=").status == 2


def test_runs_are_removed_only_where_it_was_meant(study: Cli, tmp_path: Path) -> None:
    def record(name: str) -> Path:
        _, run = study.measure("--name", name, "--", "true")
        return study.store / "runs" / run["run_id"]

    one, two, three = record("spare-one"), record("spare-two"), record("spare-three")
    # without a terminal it does not ask, and does not guess
    refused = study("runs", "rm", one.name)
    assert refused.status == 2
    assert "--yes" in refused.stderr
    # a hostile id among good ones: nothing at all is removed
    shutil.copytree(one, tmp_path / "elsewhere")
    for ref in ("../../elsewhere", str(tmp_path / "elsewhere"), "..", "/"):
        assert study("runs", "rm", "--yes", one.name, ref).status == 2
    assert one.is_dir() and (tmp_path / "elsewhere").is_dir()
    assert study("runs", "rm", "--yes", one.name, "spare-tw").status == 0
    assert not one.exists() and not two.exists()
    # on a terminal it asks
    for answer, left in ((b"n\n", True), (b"y\n", False)):
        master, slave = os.openpty()
        with study.start("runs", "rm", three.name, stdin=slave) as process:
            os.write(master, answer)
            _, err = process.communicate()
        os.close(slave)
        os.close(master)
        assert three.name.encode() in err
        assert (process.returncode == 0, three.exists()) == (not left, left)


def test_run_in_progress_is_not_removed(study: Cli) -> None:
    with ended(study.start("--name", "busy", "--", "cat", stdin=subprocess.PIPE)) as process:
        (directory,) = until(lambda: list((study.store / "runs").glob("busy-*/run.json")))
        refused = study("runs", "rm", "--yes", "busy")
        assert refused.status == 2
        assert "--force" in refused.stderr
        process.communicate(b"")
    assert study("runs", "rm", "--yes", "busy").status == 0
    assert not directory.exists()


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
    assert changed == {"metrics", "performance", "progress", "files"}
    (added,) = after["files"].keys() - before["files"].keys()
    assert added.startswith("events-") and after["files"].items() > before["files"].items()
    # what is set afterwards holds at the end of the run
    assert after["progress"]["t_s"] == [after["duration_s"]]
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


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["report small", "runs list", "--help"])
def test_output_onto_a_full_disk_is_an_error_of_ours(
    study: Cli, command: str, unbuffered: str
) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "pepr_profiler", *command.split()],
            env=study.environment({"PYTHONUNBUFFERED": unbuffered}),
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 125
    assert result.stderr.startswith("pepr-profile: cannot write to standard output: No space left")
    assert result.stderr.count("\n") == 2  # and the fix
