"""Files of `-o`: chosen by the extension, refused early, written whole, true to the summary."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from cli import Cli, python

from pepr_profiler.errors import UsageError
from pepr_profiler.report.export import form_of, run_rows
from pepr_profiler.report.typeset import Table, TableColumn, latex
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
