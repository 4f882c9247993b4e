"""Files of `-o`: chosen by the extension, refused early, written whole, true to the summary."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, python

from pepr_profiler.errors import UsageError
from pepr_profiler.report.export import form_of, run_rows, run_table
from pepr_profiler.report.typeset import Table, TableColumn, amounts, latex
from pepr_profiler.study.study import Study


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cli, str]:
    """A store with one run of 0.3 s, and that run's id."""
    cli = Cli(tmp_path_factory.mktemp("recorded"))
    spin = "import time\nt = time.monotonic()\nwhile time.monotonic() < t + 0.3: pass\n"
    spin += "print('acc 0.5')"
    result, summary = cli.measure("--metric", "acc=acc ([0-9.]+)", "--", *python(spin))
    assert result.status == 0, result.stderr
    return cli, summary["run_id"]


@pytest.mark.parametrize("name", ["table", "table.xyz", "-", "page.htm"])
def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.html") as refused:
        form_of(tmp_path / name)
    assert "-o report.html" in refused.value.fix


@pytest.mark.parametrize(
    ("name", "lacking", "extra"),
    [
        ("a.html", "jinja2", "report"),
        ("a.PDF", "matplotlib", "report"),
        ("a.parquet", "pyarrow", "parquet"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, name: str, lacking: str, extra: str
) -> None:
    with pytest.raises(UsageError, match=lacking) as refused:
        form_of(tmp_path / name, installed=lambda module: None if module == lacking else object())
    assert refused.value.fix == f"pip install 'pepr-profiler[{extra}]'"


def test_bad_output_is_refused_before_the_run_is_looked_for(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    for output in ("x.xyz", str(tmp_path / "nowhere" / "x.html")):
        result = cli("report", "no-such-run", "-o", output)
        assert result.status == 2
        assert "no-such-run" not in result.stderr and "fix:" in result.stderr
        result = cli("compare", "no-such-run", "-o", output)
        assert result.status == 2
        assert "no-such-run" not in result.stderr and "fix:" in result.stderr


def test_tables_of_a_run_say_what_its_summary_says(recorded: tuple[Cli, str]) -> None:
    cli, run = recorded
    names = ["t.csv", "t.json", "t.tex", "t.parquet"]
    files = [cli.folder / name for name in names]

    result = cli("report", run, *(word for file in files for word in ("-o", str(file))))

    assert result.status == 0, result.stderr
    assert result.stdout == b""
    summary = cli.report(run)
    assert json.loads(files[1].read_text()) == summary
    rows = list(csv.DictReader(io.StringIO(files[0].read_text())))
    assert float(rows[0]["energy_j"]) == summary["energy"]["total_j"]
    parts = {c["id"]: c["job_j"] for c in summary["energy"]["components"]}
    shown = {r["name"]: float(r["energy_j"]) for r in rows if r["part"] == "component"}
    assert shown == parts
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(files[3]).to_pylist() == run_rows(summary)
    assert files[2].read_text().count(r"\\") == 1 + len(rows)
    assert not list(cli.folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("form", "begins"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("html", b"<!doctype html>")],
)
def test_figures_and_pages_are_what_their_extension_says(
    recorded: tuple[Cli, str], form: str, begins: bytes
) -> None:
    pytest.importorskip("matplotlib")
    cli, run = recorded
    file = cli.folder / f"out.{form}"
    file.write_text("an older one")

    result = cli("report", run, "-o", str(file))

    assert result.status == 0, result.stderr
    assert file.read_bytes().startswith(begins)


def test_a_file_that_cannot_be_replaced_keeps_its_old_content(recorded: tuple[Cli, str]) -> None:
    cli, run = recorded
    folder = cli.folder / "t2.csv"
    folder.mkdir()
    result = cli("report", run, "-o", str(folder))
    assert result.status == 2
    assert folder.is_dir()


def test_a_latex_table_shows_hostile_names_as_text() -> None:
    name = "50%_#1 & $x^2$ {a}\\input{/etc/passwd}~\nnext"
    text = latex(Table("", [TableColumn("model", [name], numeric=False)]))
    row = text.splitlines()[4]
    assert row == (
        r"50\%\_\#1 \& \$x\textasciicircum{}2\$ \{a\}\textbackslash{}input\{/etc/passwd\}"
        r"\textasciitilde{} next \\"
    )
    bare = re.sub(r"\\(textbackslash|textasciicircum|textasciitilde)\{\}", "", row).removesuffix(
        r" \\"
    )
    assert not re.search(r"(?<!\\)[%#&$_{}^~]", bare)


def test_rankings_are_written_as_the_study_has_them(recorded: tuple[Cli, str]) -> None:
    cli, run = recorded
    cheap, dear = cli.folder / "cheap.csv", cli.folder / "ranking.csv"
    again, _ = cli.measure(
        "--metric", "acc=acc ([0-9.]+)", "--name", "other", "--", *python("print('acc 0.4')")
    )
    assert again.status == 0
    assert not cheap.exists()

    result = cli("compare", "--resource", "time", "-o", str(dear), "-o", str(cli.folder / "r.json"))

    assert result.status == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(dear.read_text())))
    expected = Study.from_store(cli.store, resources=("time",)).rows()
    assert [(r["name"], float(r["pepr"])) for r in rows] == [
        (r["name"], r["pepr"]) for r in expected
    ]
    assert run.startswith(min(rows, key=lambda r: -float(r["resource"]))["name"])
    ranked = json.loads((cli.folder / "r.json").read_text())["rankings"][0]["rows"]
    assert [row["name"] for row in ranked] == [row["name"] for row in rows]


def summary_of_devices() -> dict[str, Any]:
    """A run on two GPUs, one of them not used, whose memory energy is missing for a time."""
    gpu = {"kind": "gpu", "provenance": "measured", "source": "nvml", "mean_w": 300.0,
           "max_w": 400.0, "device_j": 4000.0, "others_j": 0.0, "idle_j": 0.0}  # fmt: skip
    return {
        "run_id": "r_1", "name": "big", "time_s": 10.0,
        "energy": {
            "total_j": 3123.0, "u_j": None, "mean_w": 312.3, "provenance": "measured",
            "partial": [{"id": "dram:0", "missing_s": 2.0}],
            "components": [
                {**gpu, "id": "gpu:GPU-1f", "label": "gpu:0  H100_80GB & co", "in_total": True,
                 "job_j": 3000.0, "u_j": 87.0},
                {**gpu, "id": "gpu:GPU-2e", "label": "gpu:1  H100", "in_total": False,
                 "job_j": 10.0, "u_j": 1.0},
                {**gpu, "id": "dram:0", "kind": "dram", "label": "socket 0", "in_total": True,
                 "job_j": 123.0, "u_j": 4.0},
            ],
        },
        "phases": [{"name": "train", "count": 2, "duration_s": 8.0, "energy_j": 2500.0,
                    "u_j": 70.0}],
    }  # fmt: skip


def test_a_typeset_run_names_its_devices_and_units_and_says_what_is_a_lower_bound() -> None:
    text = run_table(summary_of_devices(), "tex").decode()
    rows = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if " & " in line]
    assert rows[0] == ["", "energy is", "time (s)", "energy (kJ)", "mean power (W)", "share"]
    by_name = {" ".join(row[:-5]) if len(row) > 6 else row[0]: row[-5:] for row in rows[1:]}
    assert r"gpu:0 H100\_80GB \&" in text and "GPU-1f" not in text
    assert by_name["total"][2] == r"$\geq$ 3.123"
    assert by_name["gpu:1 H100"][4] == "not in the total"
    assert by_name["dram socket 0"][2:] == [r"0.1230 $\pm$ 0.0040", "300.0", r"3.9\%"]
    assert by_name["phase train"][2:] == [r"2.500 $\pm$ 0.070", "312.5", r"80.1\%"]
    assert text.count(r"\midrule") == 3
    assert run_table(summary_of_devices(), "md").decode().count("\n| ") == 7


def test_runs_export_typesets_what_a_paper_needs(recorded: tuple[Cli, str]) -> None:
    cli, run = recorded
    for form in ("tex", "md"):
        result = cli("runs", "export", str(cli.folder / f"runs.{form}"))
        assert result.status == 0, result.stderr
    text = (cli.folder / "runs.md").read_text()
    heads = next(line for line in text.splitlines() if line.startswith("| run"))
    assert re.search(r"time \((ms|s)\) \| energy \(\w*J\) \| energy is", heads)
    assert "CPU (" in heads and "carbon" not in heads  # unknown of all
    assert run.replace("_", r"\_") in text and " ± " in text
    assert (cli.folder / "runs.tex").read_text().count(r"\begin{tabular}") == 1


@pytest.mark.parametrize(
    ("values", "us", "unit", "head", "cells"),
    [
        ([371612.0, 98.2], [9300.0, 1.44], "J", "energy (kJ)", ["371.6 ± 9.3", "0.0982 ± 0.0014"]),
        ([371612.0, None], [None, None], "J", "energy (kJ)", ["371.6", "unknown"]),
        ([1234.0, 999.0], [560.0, None], "", "energy", ["1230 ± 560", "999.0 ± ?"]),
        ([0.0, 0.0], None, "J", "energy (J)", ["0.000", "0.000"]),
        ([1e-3, 1e6], None, "J", "energy", ["1.000 mJ", "1.000 MJ"]),
        ([7200.0, 5400.0], None, "s", "energy (h)", ["2.000", "1.500"]),
        ([2.5e9, 5e8], None, "B", "energy (GB)", ["2.500", "0.5000"]),
        ([0.21, 4.0], [0.0, 0.0], "EUR", "energy (EUR)", ["0.2100", "4.000"]),
        ([5e6, 2.5e7], None, "", "energy (×10⁶)", ["5.000", "25.00"]),
        ([1e300, 2e300], None, "J", "energy (TJ)", None),
        ([9.9996, 10.0], [0.099999, 0.1], "", "energy", ["10.00 ± 0.10", "10.00 ± 0.10"]),
    ],
)
def test_a_column_has_one_unit_and_numbers_end_where_their_u_does(
    values: list[Any], us: Any, unit: str, head: str, cells: list[str] | None
) -> None:
    column = amounts("energy", values, us, unit=unit)
    assert column.head == head
    assert cells is None or list(column.cells) == cells
