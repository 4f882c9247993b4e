"""The paper's analysis of any table: classes, sizes, settings, means; figures and tables of it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from studies import (
    energy,
    invoke,
    paper_columns,
    paper_table,
    refused,
    run_summary,
    scored,
    store_run,
)

from pepr_profiler.commands.compare import compare
from pepr_profiler.errors import UsageError
from pepr_profiler.study.paired import signed_ranks

RESOURCES = {"energy": "e", "co2": "c", "train_time": "t", "memR": "m"}
DATA_SETS = ("derma_pt", "pneumonia_small")


# --- the paired test, against published examples -------------------------------------------------


def test_the_signed_rank_test_gives_published_results() -> None:
    # Darwin's maize, as in Cureton, "The normal approximation to the signed-rank sampling
    # distribution when zero differences are present", JASA 62 (1967)
    maize = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
    test = signed_ranks(np.zeros(15), maize)
    assert (test.n, test.zeros, test.rank_sums) == (15, 0, (96.0, 24.0))
    assert test.p == pytest.approx(0.041259765625, abs=1e-15)
    assert test.median == 24

    # Hollander and Wolfe, "Nonparametric statistical methods" (1973), p. 29: V = 40,
    # p = 0.01953 one-sided (the example of R's wilcox.test)
    first = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
    second = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
    test = signed_ranks(second, first)
    assert test.rank_sums == (40.0, 5.0)
    assert test.p == pytest.approx(2 * 0.01953, abs=1e-5)

    # Conover, "Practical nonparametric statistics", section 5.7, example 1: twins, with a zero and
    # ties. The sum of the signed ranks is -17, and that of their squares 505.
    born_first = [86, 71, 77, 68, 91, 72, 77, 91, 70, 71, 88, 87]
    born_second = [88, 77, 76, 64, 96, 72, 65, 90, 65, 80, 81, 72]
    test = signed_ranks(born_first, born_second)
    assert (test.n, test.zeros, test.rank_sums) == (11, 1, (24.5, 41.5))
    assert test.effect == pytest.approx(-17 / 66)


def test_p_counts_all_signs_and_is_normal_for_many_pairs() -> None:
    rng = np.random.default_rng(3)
    # given ties, p is the share of all 2^10 choices of signs that are as unequal
    differences = np.array([1, 1, -2, 2, 3, -3, 3, 4, 5, 5.0])
    ranks = np.array([1.5, 1.5, 3.5, 3.5, 6, 6, 6, 8, 9.5, 9.5])
    signs = 1 - 2 * ((np.arange(1024)[:, None] >> np.arange(10)) & 1)
    sums = np.abs(signs @ ranks)
    share = np.mean(sums >= abs(np.sign(differences) @ ranks))
    assert signed_ranks(np.zeros(10), differences).p == pytest.approx(share, abs=1e-15)
    # and both ways agree where one takes over from the other
    for n in (200, 201):
        a = rng.normal(size=n)
        b = a + rng.normal(0.15, 1.0, size=n)
        test = signed_ranks(a, b)
        sum_of_squares = n * (n + 1) * (2 * n + 1) / 6
        z = abs(test.rank_sums[0] - test.rank_sums[1]) / math.sqrt(sum_of_squares)
        assert test.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_the_test_of_nothing_is_unknown_and_rounding_breaks_no_tie() -> None:
    same = signed_ranks([0.5, 0.6], [0.5, 0.6])
    assert same.n == 0 and math.isnan(same.p) and math.isnan(same.effect)
    tied = signed_ranks([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])  # 0.1, but for rounding errors
    assert tied.rank_sums == (6.0, 0.0) and tied.effect == 1.0 and tied.p == 0.25
    assert signed_ranks([1.7e308, -1.0], [-1.7e308, 1e308]).rank_sums == (1.0, 2.0)
    for bad in ([], [math.nan], [math.inf]):
        with pytest.raises(UsageError):
            signed_ranks(bad, bad)


# --- the paper's tables --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two tables of the paper below each other."""
    first, second = (paper_table(name).read_text().splitlines() for name in DATA_SETS)
    table = tmp_path_factory.mktemp("paper") / "both.csv"
    assert first[0] == second[0]
    table.write_text("\n".join([*first, *second[1:]]) + "\n")
    return table


def paper_arguments(table: Path, *, group: bool = True) -> list[object]:
    wanted = [word for column in RESOURCES for word in ("--resource", column)]
    return [table, "--performance", "test_09", *wanted, *(["--group", "dataset"] if group else [])]


def test_scores_of_both_tables_at_once_are_the_published_ones(both: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    scored(*paper_arguments(both), "-o", out)
    rows = list(csv.DictReader(out.read_text().splitlines(), delimiter="\t"))
    assert len(rows) == 262
    for row in rows:
        for column, letter in RESOURCES.items():
            assert abs(float(row[f"pepr_{column}"]) - float(row[f"pepr_{letter}"])) < 1e-12


def published_means(letter: str) -> dict[str, tuple[float, float]]:
    """The mean and the sample SD of a published score over the data sets, by NumPy."""
    found: dict[str, list[float]] = {}
    for name in DATA_SETS:
        columns = paper_columns(name)
        for model, value in zip(columns["model"], columns[f"pepr_{letter}"], strict=True):
            found.setdefault(model, []).append(float(value))
    return {m: (float(np.mean(x)), float(np.std(x, ddof=1))) for m, x in found.items()}


def test_means_over_groups_are_those_of_the_published_columns(both: Path, tmp_path: Path) -> None:
    out = tmp_path / "means.md"
    result = scored(*paper_arguments(both), "--mean", "--size", "num_param", "-o", out)
    assert "left out of the means" not in result.stderr
    table = out.read_text().split("**Means over 2 groups: derma\\_pt, pneumonia\\_small**")[1]
    table, sound = table.split("**Means over 2 groups, without outliers:")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)
    assert len(rows) == 131
    for column, letter in RESOURCES.items():
        known = published_means(letter)
        place = head.index(f"PePR-{column}".replace("_", "\\_"))
        for row in rows:
            mean, sd = known[row[head.index("model")].replace("\\", "")]
            shown, _, spread = row[place].partition(" ± ")
            digit = 10.0 ** -len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(mean, abs=0.51 * digit)
            assert float(spread) == pytest.approx(sd, abs=0.51 * digit)
    # and, as one table has outliers, again without these
    assert "pneumonia\\_small has outliers in energy per train\\_time." in table
    assert "Left out, as not in pneumonia" in sound and sound.count("| 96 |") == 1
    energies = [float(row[head.index("PePR-energy")].partition(" ")[0]) for row in rows]
    assert sorted(energies, reverse=True) == pytest.approx(energies, abs=1e-2)


def test_the_best_five_are_those_of_the_published_scores(both: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.tex"
    scored(*paper_arguments(both), "--class", "type", "--best", "5", "-o", out)
    tables = out.read_text().split(r"\begin{tabular}")[1:]
    assert len(tables) == 3  # the second of them again, without its outliers
    for name, table in zip(DATA_SETS, tables[:2], strict=True):
        columns = paper_columns(name)
        rows = [line.split(" & ") for line in table.splitlines() if line.endswith(r" \\")][1:]
        assert len(rows) == 25 and table.count(r"\midrule") == 5
        for by, key in [*((f"PePR-{c}", f"pepr_{x}") for c, x in RESOURCES.items()),
                        ("test_09", "test_09")]:  # fmt: skip
            values = np.array(columns[key], dtype=float)
            best = sorted(values, reverse=True)[:5]
            mine = [row for row in rows if row[0].replace("\\", "") == by]
            named = [row[2].replace("\\", "").removesuffix(" dag{}") for row in mine]
            shown = [values[columns["model"].index(model)] for model in named]
            assert shown == pytest.approx(best, abs=1e-12), by
            types = [columns["type"][columns["model"].index(model)] for model in named]
            assert [row[3] for row in mine] == types


def exact_p(differences: np.ndarray) -> float:
    """The two-sided p in whole numbers: a product of 1 + x^rank, packed into one integer."""
    moved = [round(d, 12) for d in differences.tolist() if round(d, 12)]
    sizes = sorted(abs(d) for d in moved)
    doubled = [2 * sizes.index(abs(d)) + 1 + sizes.count(abs(d)) for d in moved]
    bits = len(moved) + 1
    product = 1
    for rank in doubled:
        product += product << (bits * rank)
    least = min(
        sum(r for r, d in zip(doubled, moved, strict=True) if sign * d > 0) for sign in (1, -1)
    )
    mask = (1 << bits) - 1
    count = sum(product >> (bits * k) & mask for k in range(least + 1))
    return min(1.0, 2 * count / 2 ** len(moved))


def test_settings_of_the_papers_tables_are_compared_in_pairs(both: Path) -> None:
    result = scored(*paper_arguments(both, group=False), "--setting", "dataset", "--group",
                    "dataset")  # fmt: skip
    text = result.stdout[result.stdout.index("dataset: pneumonia_small against derma_pt") :]
    text, sound = text.split("dataset: pneumonia_small against derma_pt, without outliers")
    assert "the same 131 models" in text.splitlines()[0]
    assert "the same 96 models" in sound.splitlines()[0]
    first, second = (paper_columns(name) for name in DATA_SETS)
    place = [second["model"].index(model) for model in first["model"]]
    for row, key in (("test_09", "test_09"), ("PePR-energy", "pepr_e"), ("PePR-memR", "pepr_m")):
        a = np.array(first[key], dtype=float)
        b = np.array(second[key], dtype=float)[place]
        p = exact_p(b - a)
        (line,) = (x.split() for x in text.splitlines() if x.split()[:1] == [row])
        assert float(line[1]) == pytest.approx(np.median(a), abs=6e-5)
        assert float(line[2]) == pytest.approx(np.median(b), abs=6e-5)
        assert float(line[3].replace("−", "-")) == pytest.approx(np.median(b - a), abs=6e-5)
        assert int(line[4]) == 131
        assert math.log10(float(line[5])) == pytest.approx(math.log10(p), abs=0.03)


# --- any table -----------------------------------------------------------------------------------

STUDY = """\
model,kind,parameters,data,pretrained,accuracy,kwh
small,CNN,1e6,a,1,0.8,1.0
middle,CNN,5e6,a,1,0.9,2.0
large,other,2e7,a,1,0.96,5.0
small,CNN,1e6,b,1,0.6,2.0
middle,CNN,5e6,b,1,0.7,4.0
large,other,2e7,b,1,0.72,6.0
tiny,other,2e5,b,1,0.5,1.0
"""
COLUMNS = ("--performance", "accuracy", "--resource", "kwh")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    table = tmp_path / "study.csv"
    table.write_text(STUDY)
    return table


def test_a_model_that_a_group_lacks_has_no_mean_and_is_named(study: Path) -> None:
    result = scored(study, *COLUMNS, "--group", "data", "--mean")
    assert "left out of the means over groups: tiny: not in a" in result.stderr
    means = result.stdout[result.stdout.index("Means over 2 groups") :]
    assert "3 models" in means and "tiny" not in means
    # R in a: 0, 1/4, 1; in b: 1/5, 3/5, 1
    row = next(line.split() for line in means.splitlines() if "middle" in line)
    of_a, of_b = 0.9 / 1.25, 0.7 / 1.6
    sd = np.std([of_a, of_b], ddof=1)
    assert row[-3:] == [f"{(of_a + of_b) / 2:.2f}", "±", f"{sd:.2f}"]


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        (["--class", "kinds"], "no column 'kinds'", "kind"),
        (["--size", "kind"], "column kind: 'CNN' is not a finite number", "correct"),
        (["--setting", "model"], "--setting model has 4 values", "two values"),
        (["--setting", "pretrained"], "--setting pretrained has 1 value: two", "two values"),
        (["--setting", "kind"], "several rows are called small CNN, middle CNN", "--repeats"),
        (["--mean"], "there is no mean over groups: there is one group", "--group"),
        (["--mean", "--group", "kind"], "several rows of kind CNN are called small", "--repeats"),
        (["--setting", "kind", "--group", "data"], "no model has both values of kind", "--name"),
        (["--figure", "size"], "--figure size needs --size", "--size"),
        (["--figure", "setting"], "--figure setting needs --setting", "--setting"),
        (["--repeats", "-o", "out.csv"], "-o out.csv cannot be used with --repeats", ".tex"),
    ],
)
def test_an_analysis_that_cannot_be_made_is_refused_before_anything(
    study: Path, options: list[str], what: str, fix: str
) -> None:
    error = refused(study, *COLUMNS, *options)
    assert what in str(error) and fix in error.fix


def test_too_many_classes_and_one_class_per_repeat_are_demanded(
    study: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "wide.csv"
    rows = [f"m{i},c{i},0.5,{i + 1}" for i in range(9)]
    wide.write_text("\n".join(["model,kind,accuracy,kwh", *rows]) + "\n")
    assert "has 9 values" in refused(wide, *COLUMNS, "--name", "model", "--class", "kind").what
    study.write_text(STUDY.replace("large,other,2e7,b", "large,CNN,2e7,b"))
    error = refused(study, *COLUMNS, "--repeats", "--class", "kind", "--group", "pretrained")
    assert "large has several values of kind" in error.what
    error = refused(study, *COLUMNS, "--group", "data", "--class", "kind", "--mean")
    assert "large has several values of kind" in error.what and "CNN, other" in error.why


@pytest.mark.parametrize("name", ["x.xyz", "x.htm", "x", "x.xlsx"])
def test_a_file_of_an_unknown_ending_is_refused_with_the_forms(
    study: Path, tmp_path: Path, name: str
) -> None:
    error = refused(study, *COLUMNS, "-o", tmp_path / name)
    assert error.status == 2
    assert all(form in error.why for form in (".html", ".pdf", ".tex", ".md", ".csv", ".tsv"))
    assert [path.name for path in tmp_path.iterdir()] == ["study.csv"]


def test_a_figure_of_sizes_and_settings_must_be_chosen(study: Path, tmp_path: Path) -> None:
    study.write_text(STUDY.replace(",b,1,", ",b,0,"))
    wanted = (study, *COLUMNS, "--size", "parameters", "--setting", "pretrained")
    error = refused(*wanted, "-o", tmp_path / "x.pdf")
    assert "--figure size" in error.fix
    result = scored(*wanted, "-o", tmp_path / "x.md")
    assert "are not with both settings in every group: tiny" in result.stderr
    assert "pretrained: 0 against 1, the same 3 models" in (tmp_path / "x.md").read_text()


def test_a_page_has_the_sections_that_were_asked_for(study: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    study.write_text(STUDY.replace(",b,1,", ",b,0,"))
    page = tmp_path / "study.html"
    scored(study, *COLUMNS, "--size", "parameters", "--setting", "pretrained", "--class", "kind",
           "-o", page)  # fmt: skip
    text = page.read_text()
    for heading in ("Scores against parameters", "pretrained: 0 against 1"):
        assert len(re.findall(f'<h2 id="e[12]">{heading}', text)) == 1
    assert "Wilcoxon" in text and text.count('class="wide"') == 3
    assert text.count(">CNN</td>") == 4


BAD_NAMES = ("<b>$\\frac{1}{0$", "", "_under", "\x00\x07\n", "n" * 5000)


@pytest.mark.parametrize(
    "rows",
    [
        [(0.5, i + 1, i + 1) for i in range(5)],  # all accuracies equal
        [(0.1 * i, i, 0) for i in range(5)],  # a resource of 0, and sizes of 0
        [(0.1 * i, 1e300 * (i + 1), 1e300) for i in range(5)],
        [(0.1 * i, 10.0 ** (60 * i - 100), 10.0 ** (60 * i - 100)) for i in range(5)],
        [(0.5, i + 1, -i) for i in range(2)],
    ],
    ids=["equal", "zero", "huge", "wide", "two"],
)
def test_odd_numbers_and_names_give_every_file(
    rows: list[tuple[float, float, float]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    table = tmp_path / "odd.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "kind", "set", "accuracy", "kwh", "size"])
        for i, row in enumerate(rows):
            for setting in ("_a", "$b"):
                writer.writerow([f"{BAD_NAMES[i]}{i}", BAD_NAMES[i], setting, *row])
    files = [tmp_path / f"out.{form}" for form in ("html", "tex", "md")]
    wanted = (table, *COLUMNS, "--name", "model", "--class", "kind", "--size", "size")
    scored(*wanted, "--setting", "set", *(word for file in files for word in ("-o", file)))
    for figure in ("performance", "size", "setting"):
        svg = tmp_path / f"{figure}.svg"
        scored(*wanted, "--setting", "set", "--figure", figure, "-o", svg)
        assert "<b>" not in svg.read_text()
        if figure != "setting":
            assert ">(none)<" in svg.read_text() or len(rows) < 3
    assert "<b>$" not in files[0].read_text()
    # and no number is written with hundreds of digits
    assert not re.search(r"\d{25}", files[1].read_text().replace("n", ""))


# --- figures are read back -----------------------------------------------------------------------


def many(tmp_path: Path, n: int) -> tuple[Path, dict[str, Any]]:
    rng = np.random.default_rng(7)
    columns: dict[str, Any] = {
        "model": [f"m{i}" for i in range(n)],
        "kind": [("CNN", "other")[i % 2] for i in range(n)],
        "accuracy": rng.uniform(0.3, 0.9, n).round(6),
        "kwh": np.geomspace(0.1, 90, n).round(6),
        "size": (10 ** rng.uniform(5, 8, n)).round(),
    }
    table = tmp_path / "many.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return table, columns


def deviation(drawn: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """How far points lie from a linear image of (x, y), in points: positions carry the numbers."""
    basis = np.column_stack([x, np.ones_like(x)])
    of_x, *_ = np.linalg.lstsq(basis, drawn[:, 0], rcond=None)
    basis_y = np.column_stack([y, np.ones_like(y)])
    of_y, *_ = np.linalg.lstsq(basis_y, drawn[:, 1], rcond=None)
    assert of_x[0] > 0
    return float(
        max(abs(basis @ of_x - drawn[:, 0]).max(), abs(basis_y @ of_y - drawn[:, 1]).max())
    )


SVG = "{http://www.w3.org/2000/svg}"


def svg_points(path: Path) -> np.ndarray:
    found = {}
    for group in ET.parse(path).iter(f"{SVG}g"):
        if match := re.fullmatch(r"point-(\d+)", group.get("id", "")):
            use = next(group.iter(f"{SVG}use"))
            found[int(match[1])] = (float(use.get("x", "nan")), float(use.get("y", "nan")))
    return np.array([found[i] for i in sorted(found)])


def test_an_svg_and_a_pdf_of_classes_hold_every_number(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, columns = many(tmp_path, 80)
    svg, pdf = tmp_path / "f.svg", tmp_path / "f.pdf"
    scored(table, *COLUMNS, "--class", "kind", "-o", svg)
    scored(table, *COLUMNS, "-o", pdf)
    x, y = np.log10(columns["kwh"]), np.array(columns["accuracy"])
    drawn = svg_points(svg)
    assert len(drawn) == 80 and deviation(drawn, x, y) < 0.01
    text = svg.read_text()
    for word in ("CNN", "other", "median kwh", "Pareto front", "PePR 0."):
        assert f">{word}" in text
    # the median line stands between the two middle points
    line = next(g for g in ET.parse(svg).iter(f"{SVG}g") if g.get("id") == "median")
    at = float(re.findall(r"M ([\d.]+)", next(line.iter(f"{SVG}path")).get("d", ""))[0])
    assert drawn[39, 0] < at < drawn[40, 0]
    # and a PDF: circles are eight curves, which begin at the bottom
    streams = re.findall(rb"stream\r?\n(.*?)endstream", pdf.read_bytes(), re.DOTALL)
    page = max((zlib.decompress(s) for s in streams if s[:1] == b"x"), key=len).decode("latin-1")
    circles = re.findall(r"([\d.]+) ([\d.]+) m\n(?:[\d. \n]+c\n){8}h\n\nB", page)
    assert len(circles) == 80
    assert deviation(np.array(circles, dtype=float), x, y) < 0.01


def test_sizes_are_drawn_where_the_means_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, columns = many(tmp_path, 60)
    svg = tmp_path / "f.svg"
    scored(table, *COLUMNS, "--size", "size", "-o", svg)
    r = np.array(columns["kwh"])
    pepr = columns["accuracy"] / (1 + (r - r.min()) / (r.max() - r.min()))
    drawn = svg_points(svg)
    assert len(drawn) == 60
    assert deviation(drawn, np.log10(columns["size"]), pepr) < 0.01


def test_violins_have_the_medians_of_both_settings(study: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    study.write_text(STUDY.replace(",b,1,", ",b,0,"))
    svg = tmp_path / "f.svg"
    scored(study, *COLUMNS, "--setting", "pretrained", "-o", svg)
    at = {}
    for group in ET.parse(svg).iter(f"{SVG}g"):
        if (name := group.get("id", "")).startswith("median-"):
            at[name] = float(next(group.iter(f"{SVG}use")).get("y", "nan"))
    assert set(at) == {f"median-{i}-{k}" for i in (1, 2) for k in (0, 1)}
    assert at["median-1-0"] < at["median-1-1"]  # higher in the figure: 0.9 above 0.7
    text = svg.read_text()
    assert ">p = 0.250, r = −1.00, n = 3<" in text
    assert text.count("violin-") == 4


def test_of_thousands_of_points_every_one_is_in_a_cell(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, columns = many(tmp_path, 3000)
    svg = tmp_path / "f.svg"
    scored(table, *COLUMNS, "--class", "kind", "-o", svg)
    root = ET.parse(svg)
    assert len(svg_points(svg)) == 0
    cells = []
    for group in root.iter(f"{SVG}g"):
        if group.get("id", "").startswith("cells-"):
            for d in (path.get("d", "") for path in group.iter(f"{SVG}path")):
                cells += re.findall(
                    r"M ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)", d
                )
    boxes = np.array(cells, dtype=float)[:, [0, 1, 4, 5]]
    assert 500 < len(boxes) <= 3000

    def ticks(axis: str, read: Any) -> tuple[float, float]:
        """Where the labels of an axis are, as a line through them."""
        places, values = [], []
        for group in root.iter(f"{SVG}g"):
            texts = list(group.iter(f"{SVG}text"))
            if re.fullmatch(rf"{axis}tick_\d+", group.get("id", "")) and texts:
                of_x = next(group.iter(f"{SVG}use"), None)
                of_y = next(group.iter(f"{SVG}path"), None)
                if axis == "x" and of_x is not None:
                    places.append(float(of_x.get("x", "nan")))
                elif of_y is not None:  # the line of the grid: M x y L …
                    places.append(float(of_y.get("d", "").split()[2]))
                values.append(read("".join(texts[0].itertext())))
        slope, offset = np.polyfit(values, places, 1)
        return float(slope), float(offset)

    slope, offset = ticks("x", lambda text: math.log10(float(text)))
    x = slope * np.log10(columns["kwh"]) + offset
    slope, offset = ticks("y", float)
    y = slope * np.array(columns["accuracy"]) + offset
    left, right = boxes[:, [0, 2]].min(axis=1), boxes[:, [0, 2]].max(axis=1)
    top, bottom = boxes[:, [1, 3]].min(axis=1), boxes[:, [1, 3]].max(axis=1)
    for px, py in zip(x, y, strict=True):
        inside = (left - 0.1 <= px) & (px <= right + 0.1) & (top - 0.1 <= py) & (py <= bottom + 0.1)
        assert inside.any()


def test_a_page_of_many_rows_has_all_of_them_in_a_table_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    table, columns = many(tmp_path, 5000)
    page = tmp_path / "page.html"
    result = scored(table, *COLUMNS, "--class", "kind", "-o", page)
    assert "page-all-rows.csv" in result.stderr
    rows = list(csv.DictReader((tmp_path / "page-all-rows.csv").read_text().splitlines()))
    assert sorted(row["name"] for row in rows) == sorted(columns["model"])
    text = page.read_text()
    assert "page-all-rows.csv has all" in text and len(text) < 2_000_000
    assert re.search(rf'data-key="name">{rows[0]["name"]}<', text)


# --- tables for papers ---------------------------------------------------------------------------

HOSTILE = [
    r"50%_#1 & $x^2$ {a}\input{x}~",
    "[a] * b",
    "*star",
    "--dash ''quote`` <<x>> |bar| \"q\"",
    "naïve Übergröße ¿señor? œuvre",
    "two\nlines\tand `code` *bold*",
    "",
]


def test_a_latex_table_of_any_names_compiles(tmp_path: Path) -> None:
    """Needs a LaTeX with booktabs (Debian: texlive-latex-base, texlive-latex-recommended)."""
    table = tmp_path / "study.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "kind_&%", "acc_#", "e^{kwh}", "data"])
        for i, name in enumerate(HOSTILE):
            for data in ("a_1", "b%2"):
                writer.writerow([name or "x", "[k]", 0.5 + i / 100, 1.5 + i * i, data])
    files = [tmp_path / "all.tex", tmp_path / "best.tex"]
    wanted = (table, "--performance", "acc_#", "--resource", "e^{kwh}", "--name", "model")
    scored(*wanted, "--group", "data", "--class", "kind_&%", "--mean", "-o", files[0])
    scored(*wanted, "--setting", "data", "--best", "3", "-o", files[1])
    for file in files:
        text = file.read_text()
        rows = [line for line in text.splitlines() if line.endswith(r" \\")]
        assert rows and not [row for row in rows if re.match(r"[\[*]", row)]
        bare = re.sub(
            r"\\(text\w+|ldots|dag)\{\}|\\text\w+\{\d\}|\$\\?\w*[-]?\$", "", "\n".join(rows)
        )
        assert not re.search(r"(?<!\\)[%#$_^~]", bare)
    latex = shutil.which("pdflatex")
    booktabs = (
        shutil.which("kpsewhich")
        and subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).stdout
    )
    if not latex or not booktabs:
        pytest.skip("no pdflatex with booktabs (Debian: texlive-latex-recommended)")
    document = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}"
    document += r"\begin{document}\input{all}\par\input{best}\end{document}"
    (tmp_path / "paper.tex").write_text(document)
    done = subprocess.run(
        [latex, "-interaction=nonstopmode", "-halt-on-error", "paper"],
        cwd=tmp_path, capture_output=True, text=True, check=False, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two experiments of three models with two repeats each."""
    for k, experiment in enumerate(("a", "b")):
        for m, name in enumerate(("small", "middle", "large")):
            for seed in (1, 2):
                run = run_summary(
                    f"{name}", seed + 10 * k,
                    run_id=f"{experiment}-{name}-{seed}",
                    experiment=experiment,
                    energy=energy(1000.0 * (m + 1) * (k + 1) + 5 * seed, u_j=50.0),
                    metrics={"accuracy": 0.7 + m / 10 - k / 20 + seed / 500, "efficient": m == 0,
                             "parameters": 1e6 * 10**m},
                    performance={"metric": "accuracy",
                                 "value": 0.7 + m / 10 - k / 20 + seed / 500},
                )  # fmt: skip
                run["metrics"]["efficient"] = float(m == 0)
                store_run(tmp_path, run)
    return tmp_path


def test_runs_of_a_store_are_analysed_by_what_they_logged(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.tex"
    result = invoke(compare, "--store", store, "--class", "efficient", "--size", "parameters",
                    "--setting", "experiment", "-o", out, "-o", tmp_path / "t.md")  # fmt: skip
    assert result.exit_code == 0, result.exception
    text = out.read_text()
    assert text.count(r"\begin{tabular}") == 3  # two rankings and the settings
    assert "energy (kJ)" in text and r"$\pm$" in text
    assert r"parameters ($\times$10\textsuperscript{6})" in text
    assert "experiment: b against a" in text
    # numbers and their ± have the same last digit
    for number, u in re.findall(r"(\d+\.?\d*) \$\\pm\$ (\d+\.?\d*)", text):
        assert len(number.partition(".")[2]) == len(u.partition(".")[2])
    # and R is what it is in each group
    columns = [line.split(" | ") for line in (tmp_path / "t.md").read_text().splitlines()]
    assert sorted(c[8] for c in columns if len(c) == 10) == sorted(
        ["R", "--:", "0.000", "0.500", "1.000"] * 2
    )


def test_facts_that_runs_lack_are_named(store: Path) -> None:
    for options, what in (
        (["--class", "kind"], "no kind is known of"),
        (["--size", "host"], "--size host is no number"),
        (["--setting", "accuracy"], "--setting accuracy has"),
        (["--group", "none", "--setting", "experiment"], "several values of experiment"),
    ):
        result = invoke(compare, "--store", store, *options)
        assert isinstance(result.exception, UsageError), options
        assert what in str(result.exception)
        assert result.stdout == ""


def test_no_mean_contains_a_group_that_is_noise(tmp_path: Path) -> None:
    # given two data sets in which the models differ by far, and one in which they scatter alike
    table = tmp_path / "noise.csv"
    rows = [
        f"{data},{model},{0.9 + seed / 999},{(10 * factor if data != 'z' else 10) + seed / 5}"
        for data in "xyz"
        for factor, model in enumerate("abc", start=1)
        for seed in (-1, 0, 1.1 + factor / 99)
    ]
    table.write_text("\n".join(["data,model,accuracy,kwh", *rows]) + "\n")
    wanted = (table, *COLUMNS, "--group", "data", "--repeats", "--mean")
    # when
    result = scored(*wanted)
    # then
    assert "left out of the means over groups: z: its models cannot be told apart" in result.stderr
    assert "Means over 2 groups" in result.stdout and "Left out: z, as its models" in result.stdout
    data = json.loads(scored(*wanted, "--json", "-").stdout)
    (means,) = data["means"]
    assert means["groups"] == ["x", "y"] and [x["group"] for x in means["left_out"]] == ["z"]
    scores: dict[str, list[float]] = {}
    for ranking in data["rankings"][:2]:
        for row in ranking["rows"]:
            scores.setdefault(row["name"], []).append(row["pepr"])
    assert {row["name"]: row["pepr"] for row in means["rows"]} == {
        name: pytest.approx(np.mean(of_groups)) for name, of_groups in scores.items()
    }
    (every,) = json.loads(scored(*wanted, "--anyway", "--json", "-").stdout)["means"]
    assert every["groups"] == ["x", "y", "z"] and every["left_out"] == []
    note = "The scores of z are noise: its models cannot be told apart by kwh"
    assert note in " ".join(scored(*wanted, "--anyway").stdout.split())
    scored(*wanted, "--anyway", "-o", tmp_path / "means.md")
    assert note in (tmp_path / "means.md").read_text()
    assert note not in " ".join(result.stdout.split())
    # and of one group that is none there is no mean
    table.write_text("\n".join(["data,model,accuracy,kwh", *rows[9:]]) + "\n")
    error = refused(*wanted)
    assert error.what == "there is no mean over groups" and "--anyway" in error.fix


def test_what_cannot_be_told_apart_is_ranked_in_no_output(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    # given two models of three repeats each, which differ by less than these scatter
    table = tmp_path / "twins.csv"
    rows = [f"{m},{0.9 + k / 500},{2.3 + k / 50 + i / 1000}" for i, m in enumerate("ab")
            for k in (-1, 0, 1)]  # fmt: skip
    table.write_text("\n".join(["model,accuracy,kwh", *rows]) + "\n")
    files = [tmp_path / f"t.{form}" for form in ("md", "html", "svg")]
    wanted = [table, *COLUMNS, "--repeats", *(word for file in files for word in ("-o", file))]
    # when
    scored(*wanted)
    md, page, svg = (file.read_text() for file in files)
    # then
    for text in (md, page):
        assert "cannot be told apart by kwh; PePR would rank them by noise" in text
        assert re.search(r"b took 1\.000\d* times the kwh of a \(95%: 0\.9\d+ to 1\.0\d+\)", text)
    assert "| model | runs | accuracy | kwh |" in md and "PePR |" not in md
    assert "not ranked" in md and not re.search(r"\b0\.4[56]\d", md)
    assert 'class="score">–</b>' in page and not re.search(r'class="score">[\d.]', page)
    assert "iso-" not in svg and "By PePR the best" not in page
    # but for --anyway
    scored(*wanted, "--anyway")
    md, page, svg = (file.read_text() for file in files)
    assert "| PePR |" in md and re.search(r'class="score">0\.', page) and "iso-0.6" in svg
