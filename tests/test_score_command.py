"""`pepr-profile score` and `compare`: tables and runs in, rankings out, bad input refused."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import REPOSITORY
from studies import energy, invoke, paper_table, refused, run_summary, scored, store_run

from pepr_profiler.commands.compare import compare
from pepr_profiler.errors import UsageError

MODELS = """\
model,accuracy,kwh,task
small,0.8,1.0,a
middle,0.9,2.0,a
large,0.96,5.0,b
tiny,0.6,1.0,b
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    table = tmp_path / "models.csv"
    table.write_text(MODELS)
    return table


COLUMNS = ("--performance", "accuracy", "--resource", "kwh")


def test_the_ranking_of_a_table_goes_to_stdout_and_nothing_else_does(models: Path) -> None:
    # given R = (kwh - 1) / 4, so 0, 0.25, 1, 0 and PePR 0.8, 0.72, 0.48, 0.6
    result = scored(models, *COLUMNS)
    # then; the bar has 80 - 47 = 33 cells, of which it takes 20
    assert result.stdout == (
        "PePR   4 rows   metric accuracy\n"
        "\n"
        "  #  model      accuracy   kwh     R     PePR\n"
        "  1  small         0.800     1   0.000   0.800  ████████████████     *\n"
        "  2  middle        0.900     2   0.250   0.720  ██████████████▍      *\n"
        "  3  tiny          0.600     1   0.000   0.600  ████████████\n"
        "  4  large         0.960     5   1.000   0.480  █████████▋           *\n"
        "\n"
        "  PePR  accuracy / (1 + R)\n"
        "  R     0 at 1, 1 at 5 (normalisation range of these rows)\n"
        "  #     how sure the order is, is unknown: one row shows no spread over repeats\n"
        "  *     on the accuracy/kwh Pareto front\n"
    )
    assert result.stderr == ""


def test_output_keeps_the_table_and_adds_two_columns_a_resource(
    models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    result = scored(models, *COLUMNS, "-o", out)
    assert result.stdout == ""
    assert str(out) in result.stderr
    rows = list(csv.reader(out.read_text().splitlines()))
    assert rows[0] == ["model", "accuracy", "kwh", "task", "kwh_n", "pepr_kwh", "outlier"]
    assert [row[:4] for row in rows] == [line.split(",") for line in MODELS.splitlines()]
    assert [(float(row[4]), float(row[5])) for row in rows[1:]] == [
        (0.0, 0.8),
        (0.25, 0.72),
        (1.0, 0.48),
        (0.0, 0.6),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.csv", "out.csv"]


@pytest.mark.parametrize("dataset", ["derma_pt", "pneumonia_small"])
def test_the_papers_tables_give_the_papers_scores(dataset: str, tmp_path: Path) -> None:
    table = paper_table(dataset)
    columns = {"energy": "e", "co2": "c", "train_time": "t", "memR": "m"}
    wanted = [arg for column in columns for arg in ("--resource", column)]
    out = tmp_path / "out.csv"
    # when
    result = scored(table, "--performance", "test_09", *wanted, "-o", out)
    # then
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 131
    for row in rows:
        for column, letter in columns.items():
            assert abs(float(row[f"{column}_n"]) - float(row[f"{letter.upper()}_n"])) < 1e-12
            assert abs(float(row[f"pepr_{column}"]) - float(row[f"pepr_{letter}"])) < 1e-12
    # and the wrong energies of one table are noticed
    warned = "35 of 131 rows are outliers in energy per train_time" in result.stderr
    assert warned == (dataset == "pneumonia_small")


def test_groups_are_scored_inside_themselves(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    scored(models, *COLUMNS, "--group", "task", "-o", out)
    scores = [float(row["pepr_kwh"]) for row in csv.DictReader(out.read_text().splitlines())]
    assert scores == [0.8, 0.45, 0.48, 0.6]
    screen = scored(models, *COLUMNS, "--group", "task").stdout
    assert screen.count("range of these rows") == 2
    assert "2 rows   task a" in screen and "2 rows   task b" in screen


def test_rows_outside_a_fixed_range_are_clamped_flagged_and_named(
    models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    result = scored(models, *COLUMNS, "--range", "1:3", "-o", out, "--json", "-")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["kwh_clamped"] for row in rows] == ["0", "0", "1", "0"]
    assert "outside the normalisation range" in result.stderr and "large" in result.stderr
    (ranking,) = json.loads(result.stdout)["rankings"]
    assert ranking["bounds"] == {"min": 1.0, "max": 3.0, "set_by": "given", "source": None}
    assert [row["name"] for row in ranking["rows"] if row["clamped"]] == ["large"]


def test_json_has_the_whole_ranking(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "ranking.json"
    result = scored(models, *COLUMNS, "--json", target)
    assert result.stdout == ""
    (ranking,) = json.loads(target.read_text())["rankings"]
    assert ranking["bounds"] == {"min": 1.0, "max": 5.0, "set_by": "cohort", "source": None}
    known = {
        "rank": 2,
        "name": "middle",
        "n": 1,
        "performance": 0.9,
        "resource": 2.0,
        "r_norm": 0.25,
        "pepr": 0.72,
        "pareto": True,
        "clamped": False,
        "doubtful": False,
        "spread_known": False,
        "runs": [],
    }
    unknown = {"rank_best", "rank_worst", "u_performance", "sd_performance", "u_resource"}
    unknown |= {"sd_resource", "u_pepr", "swap_with_next", "pepr_low", "pepr_high", "outlier"}
    assert ranking["rows"][1] == {**known, **dict.fromkeys(unknown)}


def test_percent_and_lower_is_better_are_declared(tmp_path: Path) -> None:
    table = tmp_path / "errors.csv"
    table.write_text("error,kwh\n20,1\n10,2\n")
    result = scored(
        table, "--performance", "error", "--resource", "kwh", "--percent",
        "--transform", "one-minus", "--json", "-",
    )  # fmt: skip
    (ranking,) = json.loads(result.stdout)["rankings"]
    assert [(row["name"], row["performance"], row["pepr"]) for row in ranking["rows"]] == [
        ("row 1", 0.8, 0.8),
        ("row 2", 0.9, 0.45),
    ]


def test_a_tsv_with_a_byte_order_mark_empty_lines_and_quotes_is_read(tmp_path: Path) -> None:
    table = tmp_path / "models.tsv"
    table.write_bytes(b'\xef\xbb\xbfacc\tj\tmodel\r\n0.5\t1e3\t"a, b"\r\n\r\n1\t2e3\tc\r\n')
    result = scored(table, "--performance", "acc", "--resource", "j", "--json", "-")
    (ranking,) = json.loads(result.stdout)["rankings"]
    assert {row["name"]: row["pepr"] for row in ranking["rows"]} == {"a, b": 0.5, "c": 0.5}


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("", "is empty: it has no header", "first row"),
        ("model,accuracy,kwh\n", "is empty: it has a header but no rows", "first row"),
        ("model,accuracy,energy_kwh\na,0.5,1\n", "no column 'kwh': its columns are model", "kwh?"),
        ("model;accuracy;kwh\na;0,5;1\n", "is separated by semicolons", "commas"),
        ("model,kwh,accuracy,kwh\na,1,0.5,1\n", "names a column twice: 'kwh'", "rename"),
        ("model,accuracy,kwh\na,0.5,1\nb,0.5\n", "line 3: 2 cells instead of 3", "complete"),
        ("model,accuracy,kwh\na,0.5,1\nb,0.5,nan\n", r"line 3 (b), column kwh: 'nan'", "cell"),
        ("model,accuracy,kwh\na,0.5,1\nb,,2\n", "line 3 (b), column accuracy: the cell is", "cell"),
        ("model,accuracy,kwh\na,0.5,1\nb,good,2\n", "line 3 (b), column accuracy: 'good'", "cell"),
        ("model,accuracy,kwh\na,0.5,1\nb,50,2\n", "outside [0, 1] in b (50)", "--percent"),
        ("model,accuracy,kwh\na,0.5,1\nb,0.5,-2\n", "kwh: resource negative", "rows"),
        ("model,accuracy,kwh\na,0.5,1\n", "kwh: one row alone cannot be ranked", "--range"),
        ("model,accuracy,kwh\na,0.5,1\nb,0.6,1\n", "kwh: all resources are equal", "--range"),
        ('model,accuracy,kwh\n"a,0.5,1\n', "is not a table", "UTF-8"),
    ],
)
def test_a_table_that_cannot_be_scored_is_refused(
    tmp_path: Path, text: str, what: str, fix: str
) -> None:
    table, out = tmp_path / "bad.csv", tmp_path / "out.csv"
    table.write_text(text)
    error = refused(table, *COLUMNS, "-o", out)
    assert isinstance(error, UsageError) and error.status == 2
    assert what in str(error) and fix in error.fix
    assert not out.exists()


def test_a_missing_binary_or_latin_table_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.csv", *COLUMNS).why
    assert "directory" in refused(tmp_path, *COLUMNS).why
    latin = tmp_path / "latin.csv"
    latin.write_bytes("modèle,accuracy,kwh\na,0.5,1\n".encode("latin-1"))
    assert "is not a table" in refused(latin, *COLUMNS).what


def test_a_group_that_cannot_be_ranked_is_named(models: Path) -> None:
    error = refused(models, *COLUMNS, "--group", "model")
    assert error.what == "kwh, model 'small': one row alone cannot be ranked"


def table_of(folder: Path, *rows: object, columns: str = "model,accuracy,kwh") -> Path:
    table = folder / "table.csv"
    table.write_text("\n".join([columns, *map(str, rows)]) + "\n")
    return table


def test_a_group_of_one_is_left_out_and_the_others_are_scored(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"{MODELS}lone,0.7,3.0,c\n")
    out = tmp_path / "out.csv"
    result = scored(table, *COLUMNS, "--group", "task", "-o", out)
    assert "left out the ranking of kwh, task 'c': one row alone cannot be ranked" in result.stderr
    *others, lone = csv.DictReader(out.read_text().splitlines())
    assert [float(row["pepr_kwh"]) for row in others] == [0.8, 0.45, 0.48, 0.6]
    assert (lone["kwh_n"], lone["pepr_kwh"], lone["outlier"]) == ("", "", "")


@pytest.mark.parametrize("anyway", [[], ["--anyway"]])
def test_equal_resources_of_repeats_are_a_sentence_and_no_error(
    tmp_path: Path, anyway: list[str]
) -> None:
    rows = [f"{name},0.9{seed},2.0" for name in "ab" for seed in range(3)]
    arguments = (table_of(tmp_path, *rows), *COLUMNS, "--repeats", *anyway)
    text = " ".join(scored(*arguments).stdout.split())
    assert "cannot be told apart by kwh: their means are equal, so that R is 0/0." in text
    assert "All took 2 of kwh on average." in text and "nan" not in text and "anyway" not in text
    (ranking,) = json.loads(scored(*arguments, "--json", "-").stdout)["rankings"]
    assert ranking["distinguishable"] is False
    assert [row["pepr"] for row in ranking["rows"]] == [None, None]
    for form in ("html", "md", "tex", "parquet", "svg"):
        out = tmp_path / f"out.{form}"
        scored(*arguments, "-o", out)
        assert b"nan" not in out.read_bytes().lower() or form in ("parquet", "svg")


def test_rows_that_were_pasted_twice_are_no_repeats(tmp_path: Path) -> None:
    rows = [f"{name},0.9,{kwh}" for name, kwh in (("a", 1), ("b", 2), ("c", 4)) for _ in range(3)]
    result = scored(table_of(tmp_path, *rows), *COLUMNS, "--repeats")
    assert "left out line 3: identical to line 2 in all columns" in result.stderr
    assert "±" not in result.stdout
    # and with a column that tells them apart they are
    seeds = [f"{row},{number}" for number, row in enumerate(rows)]
    table = table_of(tmp_path, *seeds, columns="model,accuracy,kwh,seed")
    assert "0.900 ± 0.000" in scored(table, *COLUMNS, "--repeats").stdout


@pytest.mark.parametrize("alike", [True, False])
def test_one_run_among_repeats_is_never_sure_of_itself(tmp_path: Path, alike: bool) -> None:
    # given models of three repeats, which scatter alike or not, and one that ran once
    scatters = {"a": 1.0, "b": 1.1, "c": 0.9} if alike else {"a": 1.0, "b": 0.0}
    rows = [
        f"{name},{0.9 + shift / 500},{kwh * (1 + scatter * shift / 100)}"
        for (name, scatter), kwh in zip(scatters.items(), (1, 2, 4), strict=False)
        for shift in (-1, 0, 1)
    ]
    result = scored(table_of(tmp_path, *rows, "once,0.9,0.5"), *COLUMNS, "--repeats", "--json", "-")
    (ranking,) = json.loads(result.stdout)["rankings"]
    once = next(row for row in ranking["rows"] if row["name"] == "once")
    # then its score has the others' scatter, or none that is known
    assert once["n"] == 1 and not once["spread_known"]
    assert once["u_pepr"] > 0.002 if alike else once["u_pepr"] is None
    text = scored(table_of(tmp_path, *rows, "once,0.9,0.5"), *COLUMNS, "--repeats").stdout
    assert ("that of the others is taken for it" in text) == alike
    assert ("± ?" in text.rpartition("PePR ")[2]) or alike


def test_one_run_beside_a_model_that_does_not_scatter_leaves_all_unknown(tmp_path: Path) -> None:
    rows = [f"a,0.90{seed},2.0" for seed in range(3)]
    result = scored(table_of(tmp_path, *rows, "b,0.905,2.01"), *COLUMNS, "--repeats", "--json", "-")
    (ranking,) = json.loads(result.stdout)["rankings"]
    assert ranking["distinguishable"] is None
    assert ranking["resource_ratio"] == {"value": 1.005, "low": None, "high": None}
    for row in ranking["rows"]:
        assert row["pepr_low"] is row["pepr_high"] is row["swap_with_next"] is None
    text = scored(tmp_path / "table.csv", *COLUMNS, "--repeats").stdout
    assert text.count("± ?") >= 2


def test_a_resource_of_0_is_compared_by_its_difference(tmp_path: Path) -> None:
    rows = ["a,0.90,0", "a,0.91,0", "b,0.90,2.2", "b,0.91,0.3"]
    result = scored(table_of(tmp_path, *rows), *COLUMNS, "--repeats")
    text = " ".join(result.stdout.split())
    assert "b took 1.25 of kwh more than a (95%: " in text
    data = json.loads(scored(tmp_path / "table.csv", *COLUMNS, "--repeats", "--json", "-").stdout)
    (ranking,) = data["rankings"]
    difference = ranking["resource_difference"]
    assert difference["value"] == 1.25 and difference["low"] <= 1.25 < difference["high"]
    assert ranking["resource_ratio"]["value"] is None


def test_a_range_of_noise_is_named_where_it_is_saved_and_where_it_is_given(tmp_path: Path) -> None:
    # given two models that differ by less than their repeats
    rows = ["a,0.90,1.00", "a,0.91,1.04", "b,0.90,1.01", "b,0.91,1.05"]
    table, saved = table_of(tmp_path, *rows), tmp_path / "range.json"
    result = scored(table, *COLUMNS, "--repeats", "--save-range", saved)
    assert f"the range of kwh in {saved} is noise" in result.stderr
    for given in (["--range-from", saved], ["--range", "1:1.1"]):
        stderr = scored(table, *COLUMNS, "--repeats", *given).stderr
        assert "the normalisation range is narrower than what kwh can tell" in stderr
    assert scored(table, *COLUMNS, "--repeats", "--range", "0.5:9").stderr == ""
    # and rows of which nothing is known do not make those sure of which something is
    rows += ["c,0.90,1.02", "c,0.90,1.02", "d,0.9,1.03", "e,0.9,1.03", "f,0.9,1.02"]
    stderr = scored(table_of(tmp_path, *rows), *COLUMNS, "--repeats", "--range", "1:1.01").stderr
    assert "the normalisation range is narrower than what kwh can tell" in stderr


def test_a_saved_range_keeps_the_unit_and_holds_for_no_other(tmp_path: Path) -> None:
    table, saved = table_of(tmp_path, "a,0.9,1", "b,0.8,2", "c,0.7,4"), tmp_path / "range.json"
    scored(table, *COLUMNS, "--unit", "kwh=kWh", "--save-range", saved)
    data = json.loads(saved.read_text())
    assert data["bounds"][0]["unit"] == "kWh"
    error = refused(table, *COLUMNS, "--unit", "kwh=J", "--range-from", saved)
    assert "range of kwh in kWh" in error.what and error.why == "here it is in J"
    assert scored(table, *COLUMNS, "--unit", "kwh=kWh", "--range-from", saved).stderr == ""
    # and a range of before, whose unit nobody noted, still holds, with a warning
    data["bounds"][0]["unit"] = None
    saved.write_text(json.dumps(data))
    result = scored(table, *COLUMNS, "--unit", "kwh=kWh", "--range-from", saved)
    assert "does not say in which unit its range of kwh is" in result.stderr
    assert "0 at 1.000 kWh, 1 at 4.000 kWh (normalisation range of range.json)" in result.stdout


def test_a_range_that_outliers_set_is_named_where_it_is_saved(tmp_path: Path) -> None:
    columns = ["--performance", "accuracy", "--resource", "energy", "--unit", "energy=MJ"]
    saved = tmp_path / "range.json"
    for sides, wrong in (
        ([(12, 300.0), (1, 60_000.0)], "is set by outliers"),
        ([(14, 300.0), (10, 5000.0)], "is set by one of two populations"),
    ):
        result = scored(powered(tmp_path, *sides), *columns, "--save-range", saved)
        assert f"the range of energy in {saved} has an end that {wrong}" in result.stderr
    result = scored(powered(tmp_path, (12, 300.0)), *columns, "--save-range", saved)
    assert result.stderr == f"pepr-profile: wrote {saved}\n"


def test_rows_of_one_name_are_no_repeats_unless_asked_for_and_show_no_spread(
    tmp_path: Path,
) -> None:
    table = table_of(tmp_path, "a,0.9,1", "a,0.91,1.2", "b,0.8,2", "b,0.82,2.1")
    result = scored(table, *COLUMNS)
    assert "several rows are called a, b: each of them is ranked by itself" in result.stderr
    assert "fix: --repeats" in result.stderr
    assert (
        "#     how sure the order is, is unknown" in result.stdout
        and "shows no spread over repeats" in result.stdout
    )
    result = scored(table, *COLUMNS, "--repeats")
    assert "several rows" not in result.stderr and "shows no spread" not in result.stdout
    # and one row of each model shows none either, in a paper's table too
    table = table_of(tmp_path, "a,0.9,1", "b,0.8,2", "c,0.7,3")
    assert "shows no spread over repeats" in scored(table, *COLUMNS, "--repeats").stdout
    result = scored(table, *COLUMNS, "-o", tmp_path / "table.md")
    assert "several" not in result.stderr
    assert (
        "How sure the order is, is unknown: one row shows no" in (tmp_path / "table.md").read_text()
    )


def powered(tmp_path: Path, *sides: tuple[int, float]) -> Path:
    """A table of MJ and s; `sides` are numbers of rows and their watts."""
    watts = [w for n, w in sides for _ in range(n)]
    rows = [
        f"m{i},0.{500 + i},{w * (100 + 37 * i) * (1 + i % 5 / 50) / 1e6},{100 + 37 * i}"
        for i, w in enumerate(watts)
    ]
    return table_of(tmp_path, *rows, columns="model,accuracy,energy,train_time")


def test_the_declared_unit_says_what_the_rows_draw(tmp_path: Path) -> None:
    # given 14 rows of 300 W and 10 of 5 kW, which in kWh would be 18 kW
    table = powered(tmp_path, (14, 300.0), (10, 5000.0))
    columns = ["--performance", "accuracy", "--resource", "energy"]
    result = scored(table, *columns, "--unit", "energy=MJ")
    # then none is accused, and what is shown is their power
    assert "outlier" not in result.stderr
    assert "14 rows at 300.0 W … 324.0 W, 10 rows at 5.000 kW … 5.400 kW" in result.stderr
    assert "no server draws" in scored(table, *columns, "--unit", "energy=kWh").stderr
    # and both parts name their unit and which they are
    assert "Only the 14 at 300.0 W … 324.0 W:" in result.stdout
    assert "Only the 10 at 5.000 kW … 5.400 kW:" in result.stdout
    assert result.stdout.count("MJ (normalisation range") == 3


def test_the_uncertainty_of_the_resource_is_shown_where_names_have_room(tmp_path: Path) -> None:
    rows = [f"{name},0.9{seed},{kwh + seed / 99}" for name, kwh in (("a", 1), ("b", 3))
            for seed in range(3)]  # fmt: skip
    text = scored(table_of(tmp_path, *rows), *COLUMNS, "--repeats").stdout
    assert "1.010 ± 0.026" in text and "P(rev.)" in text
    rows = [row.replace("a,", f"{'a' * 30},").replace("b,", f"{'b' * 30},") for row in rows]
    text = scored(table_of(tmp_path, *rows), *COLUMNS, "--repeats").stdout
    assert "  1.01  " in text and "1.010" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_order_of_the_rows_moves_no_probability(tmp_path: Path) -> None:
    rows = [f"{name},{0.9 + seed / 777},{kwh + seed / 3}" for name, kwh in (("a", 9), ("b", 9.2),
            ("c", 9.7)) for seed in range(5)]  # fmt: skip

    def ranked(*rows: str) -> list[dict[str, object]]:
        result = scored(table_of(tmp_path, *rows), *COLUMNS, "--repeats", "--anyway", "--json", "-")
        (ranking,) = json.loads(result.stdout)["rankings"]
        return ranking["rows"]

    assert ranked(*rows) == ranked(*rows[::-1]) == ranked(*rows[7:], *rows[:7])


def test_the_table_that_is_scored_is_never_overwritten(models: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.csv"
    link.symlink_to(models)
    (tmp_path / "page-all-rows.csv").symlink_to(models)  # what a large page would write too
    for option in (
        ["-o", link],
        ["--json", models],
        ["--save-range", models],
        ["-o", tmp_path / "page.html"],
    ):
        assert "is the table that is scored" in refused(models, *COLUMNS, *option).what
    assert models.read_text() == MODELS


def test_units_that_differ_within_a_cohort_are_refused(tmp_path: Path) -> None:
    rows = ["a,0.9,1,kWh,x", "b,0.8,2,kWh,x", "a,0.9,100,J,y", "b,0.8,200,J,y"]
    table = table_of(tmp_path, *rows, columns="model,accuracy,kwh,unit,task")
    error = refused(table, *COLUMNS)
    assert "different units" in error.what and "'kWh' and 'J'" in error.why
    scored(table, *COLUMNS, "--group", "task")
    error = refused(table, *COLUMNS, "--group", "task", "--range", "1:3")
    assert "x: 'kWh'; y: 'J'" in error.why


def test_a_range_belongs_to_one_resource(models: Path) -> None:
    error = refused(models, *COLUMNS, "--resource", "accuracy", "--bounds", "1:3")
    assert "one by one" in error.fix


def test_no_column_is_overwritten(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    scored(models, *COLUMNS, "-o", out)
    assert (
        "already has the column(s) kwh_n, pepr_kwh, outlier"
        in refused(out, *COLUMNS, "-o", out).what
    )


def test_an_output_that_cannot_be_written_is_a_failure_and_leaves_nothing(
    models: Path, tmp_path: Path
) -> None:
    error = refused(models, *COLUMNS, "-o", tmp_path / "absent" / "out.csv")
    assert error.status == 2 and "there is no folder" in error.why
    error = refused(models, *COLUMNS, "-o", "/proc/out.csv")
    assert error.status == 125 and "cannot write" in error.what
    assert "directory" in refused(models, *COLUMNS, "--json", tmp_path).why
    assert [path.name for path in tmp_path.iterdir()] == ["models.csv"]


def test_a_named_pipe_is_filled_and_not_replaced(models: Path, tmp_path: Path) -> None:
    # given a reader at the other end
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        # when
        scored(models, *COLUMNS, "-o", pipe)
        assert reader.stdout is not None
        received = reader.stdout.read()
    # then
    assert received.startswith("model,accuracy,kwh,task,kwh_n,pepr_kwh,outlier\n")
    assert pipe.is_fifo()


def test_loading_the_commands_loads_neither_numpy_nor_rich() -> None:
    code = (
        "import sys; import pepr_profiler.commands.score, pepr_profiler.commands.compare; "
        "assert not {'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three runs that R = 0, 0.5, 1 and one that failed."""
    for name, total_j, exit_code in (("a", 1e3, 0), ("b", 3e3, 0), ("c", 5e3, 0), ("d", 9e3, 3)):
        run = run_summary(name, energy=energy(total_j, u_j=100.0), carbon=None)
        store_run(tmp_path, run, exit_code=exit_code)
    return tmp_path


def test_compare_ranks_an_experiments_runs_and_names_the_left_out(store: Path) -> None:
    result = invoke(compare, "--store", store, "--experiment", "study", "--json", "-")
    assert result.exit_code == 0, result.exception
    data = json.loads(result.stdout)
    (ranking,) = data["rankings"]
    assert ranking["label"] == "PePR-E" and ranking["unit"] == "J"
    assert [(row["name"], row["pepr"]) for row in ranking["rows"]] == [
        ("a", 0.9),
        ("b", 0.6),
        ("c", 0.45),
    ]
    # u(R) = sqrt(100^2 + 50^2 + 50^2) / 4000, u(PePR) = 0.9 u(R) / 1.5^2
    assert ranking["rows"][1]["u_pepr"] == pytest.approx(0.9 * 122.4745 / 4000 / 2.25, rel=0.03)
    assert data["left_out"] == [{"run": "d-1", "why": "failed with exit status 3"}]
    assert "left out d-1" in result.stderr


def test_compare_takes_runs_by_name_and_other_resources(store: Path) -> None:
    result = invoke(compare, "--store", store, "a-1", "b-1", "a-1", "--bounds", "0:6k")
    assert result.exit_code == 0, result.exception
    assert "PePR-E   2 runs   metric accuracy\n" in result.stdout
    assert "0 at 0 J, 1 at 6.000 kJ (normalisation range, as given)" in result.stdout
    carbon = invoke(compare, "--store", store, "--resource", "carbon")
    assert isinstance(carbon.exception, UsageError) and "--region" in carbon.exception.fix
    time = invoke(compare, "--store", store, "--resource", "time")
    assert isinstance(time.exception, UsageError) and "equal" in time.exception.what
