"""Studies: cohorts of runs and tables; repeats, groups, resources, bounds, outliers, bad input."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import energy, invoke, paper_columns, run_summary, store_run

import pepr_profiler
from pepr_profiler.commands.compare import compare, parse_price
from pepr_profiler.commands.report import show
from pepr_profiler.commands.score import score
from pepr_profiler.errors import PeprError, TraceError, UsageError
from pepr_profiler.report.export import encode, ranking_data
from pepr_profiler.report.ranking_text import render_ranking
from pepr_profiler.report.study_page import study_page
from pepr_profiler.report.typeset import study_tables
from pepr_profiler.store.index import Filter
from pepr_profiler.store.runs import Store
from pepr_profiler.study import pepr
from pepr_profiler.study.analysis import Analysis
from pepr_profiler.study.ranking import SharedErrors, flat_rows
from pepr_profiler.study.study import Study, load, read_bounds


def on_board(board: str, total_j: float, *, gain_j: float, own_j: float) -> dict[str, Any]:
    """The energy of a run on one board, of k = 1 budget."""
    budget = {"gain_j": gain_j, "offset_j": 0.0, "model_j": 0.0}
    component = {
        "id": f"gpu:{board}",
        "kind": "gpu",
        "source": "nvml-energy",
        "provenance": "measured",
        "in_total": True,
        "job_j": total_j,
        "u_j": None,
        "budget": budget,
    }
    inside = {**component, "id": "cpu:package-0/core", "in_total": False, "budget": None}
    u_j = 2 * math.hypot(gain_j, own_j)
    return {**energy(total_j, u_j=u_j), "components": [component, inside]}


def measured(name: str, seed: int, total_j: float, accuracy: float, **changes: Any) -> Any:
    return run_summary(
        name,
        seed,
        energy=energy(total_j),
        metrics={"accuracy": accuracy},
        performance={"metric": "accuracy", "value": accuracy},
        carbon={"g_co2e": total_j * 1e-4},
        **changes,
    )


def small_study() -> list[dict[str, Any]]:
    """Three models: two, three and one runs."""
    return [
        measured("small", 1, 990.0, 0.80),
        measured("small", 2, 1010.0, 0.82),
        measured("large", 1, 2900.0, 0.90),
        measured("large", 2, 3000.0, 0.91),
        measured("large", 3, 3100.0, 0.92),
        measured("huge", 1, 5000.0, 0.95),
    ]


# --- repeats -------------------------------------------------------------------------------------


def test_runs_of_one_name_are_one_row_of_their_means() -> None:
    # when
    ranking = Study.from_runs(small_study()).rank()
    # then bounds, R and PePR are those of the means: 1000, 3000, 5000 J
    assert ranking.names == ("small", "large", "huge") and ranking.of == "model"
    assert ranking.n is not None and ranking.n.tolist() == [2, 3, 1]
    assert ranking.scores.bounds == (1000.0, 5000.0)
    assert ranking.performance == pytest.approx([0.81, 0.91, 0.95])
    assert ranking.scores.pepr == pytest.approx([0.81, 0.91 / 1.5, 0.95 / 2])
    assert ranking.run_ids[0] == ("small-1", "small-2")


def test_the_spread_that_one_run_does_not_show_is_unknown_and_said() -> None:
    ranking = Study.from_runs(small_study()).rank()
    small, large, huge = ranking_data(ranking)["rows"]
    assert (small["n"], large["n"], huge["n"]) == (2, 3, 1)
    assert small["sd_performance"] == pytest.approx(0.02 / math.sqrt(2))
    assert huge["sd_performance"] is huge["u_performance"] is huge["sd_resource"] is None
    assert huge["spread_known"] is False and large["spread_known"] is True
    screen = render_ranking(ranking)
    assert "0.950 ± ?" in screen and "n = 1    the spread over repeats is unknown" in screen


def test_the_uncertainty_of_a_mean_is_student_ts() -> None:
    # given fixed bounds, in which large's PePR is P / (1 + (r - 1000) / 9000), three seeds whose
    # P and r rise together, and sensors of no gain and a u below what the seeds scatter
    runs = small_study()
    for run in runs:
        run["energy"]["u_j"] = 1.0
    large = Study.from_runs(runs, bounds=(1000.0, 10000.0)).rank()
    # then u is t(2 degrees) s / sqrt(3) of the linearised score of each seed
    one_r = 1 + 2000 / 9000
    linear = [
        p / one_r - 0.91 / one_r**2 * r / 9000
        for p, r in ((0.90, 2900.0), (0.91, 3000.0), (0.92, 3100.0))
    ]
    expected = 4.527 * np.std(linear, ddof=1) / math.sqrt(3)
    assert large.u_pepr is not None
    assert large.u_pepr[1] == pytest.approx(expected, rel=0.03)


def test_runs_without_a_name_of_their_own_are_repeats_only_if_their_commands_are() -> None:
    # given runs that are called as their script is, of two sizes and two seeds each
    runs = [
        measured(
            "train",
            number,
            1000.0 * size + seed,
            0.8,
            command=["python", "src/train.py", f"--width={size}", "--seed", str(seed)],
        )
        for number, (size, seed) in enumerate([(1, 7), (1, 8), (2, 7), (2, 8)])
    ]
    # when
    ranking = Study.from_runs(runs).rank()
    # then
    assert ranking.names == ("train --width=1", "train --width=2")
    assert ranking.n is not None and ranking.n.tolist() == [2, 2]
    # and a name that was given is believed
    named = [{**run, "name": "mine"} for run in runs]
    with pytest.raises(UsageError, match="one model alone cannot be ranked"):
        Study.from_runs(named)


@pytest.mark.parametrize("resource", ["energy", "carbon", "cost"])
def test_runs_on_one_board_share_its_gain_and_others_do_not(resource: str) -> None:
    # given three runs on board A (4 % gain, 3 J of their own) and one on B; 0.01 g/J
    boards = [("a", "A", 500.0), ("b", "A", 900.0), ("c", "A", 2000.0), ("d", "B", 1000.0)]
    runs = [
        run_summary(
            name,
            energy=on_board(board, j, gain_j=0.04 * j, own_j=3.0),
            carbon={"g_co2e": 0.01 * j},
        )
        for name, board, j in boards
    ]
    # when
    study = Study.from_runs(runs, resources=[resource], price=(0.3, "EUR"))
    # then u is the spread of draws in which each board has one gain for all its runs
    rng = np.random.default_rng(11)
    r = np.array([j for _, _, j in boards])
    gain = rng.normal(1, 0.04, (200_000, 2))[:, [0, 0, 0, 1]]
    drawn = r * gain + rng.normal(0, 3.0, (200_000, 4))
    low, high = drawn.min(axis=1, keepdims=True), drawn.max(axis=1, keepdims=True)
    spread = 2 * (0.9 / (1 + (drawn - low) / (high - low))).std(axis=0)
    assert study.rank().u_pepr == pytest.approx(spread, rel=0.02, abs=1e-9)
    relative = np.hypot(0.08 * r, 6.0) / r
    assert study.rank().u_resource == pytest.approx(relative * study.rank().resource)


def test_what_boards_share_is_the_same_as_a_table_of_all_runs_and_boards() -> None:
    # given 40 errors that 300 runs of 25 models share, each a few of them
    rng = np.random.default_rng(5)
    table = np.where(rng.random((40, 300)) < 0.05, rng.normal(size=(40, 300)), 0.0)
    lines, rows = np.nonzero(table)
    shared = SharedErrors(lines, rows, table[lines, rows])
    model = rng.permutation(np.arange(300) % 25)
    # then they move the runs, and their models' means, as that table does
    assert shared.squares(300) == pytest.approx(np.sum(table**2, axis=0))
    truth = pepr.average(model, np.ones(300), np.ones(300), shared=table).errors.shared
    assert shared.means(model, np.bincount(model)) == pytest.approx(truth)
    some = rng.permutation(300)[:100]
    assert shared.at(some, 300).squares(100) == pytest.approx(np.sum(table[:, some] ** 2, axis=0))
    assert SharedErrors.none().squares(3).tolist() == [0, 0, 0]
    assert SharedErrors.none().means(model, np.bincount(model)).shape == (0, 25)


# --- resources -----------------------------------------------------------------------------------


def test_summaries_become_a_ranking() -> None:
    ranking = Study.from_runs([run_summary("a"), run_summary("b", energy=energy(3000.0))]).rank()
    assert ranking.names == ("a", "b") and ranking.of == "run"
    assert (ranking.metric, ranking.resource_name, ranking.unit) == ("accuracy", "energy", "J")
    assert ranking.resource.tolist() == [1000.0, 3000.0]
    assert ranking.u_resource == pytest.approx([50.0, 150.0])
    assert (ranking.label, ranking.provenance) == ("PePR-E", "measured")


def test_a_named_metric_replaces_the_runs_own() -> None:
    runs = [run_summary("a"), run_summary("b", energy=energy(2000.0))]
    ranking = Study.from_runs(runs, metric="f1").rank()
    assert ranking.metric == "f1" and ranking.performance.tolist() == [0.8, 0.8]


def test_memory_is_the_gpus_where_every_run_has_it_and_says_which() -> None:
    def with_gpu(name: str, rss: int, gpu: int | None) -> dict[str, Any]:
        return run_summary(name, memory={"peak_rss_bytes": rss, "gpu_peak_bytes": gpu})

    both = [with_gpu("a", 10, 7_000_000), with_gpu("b", 20, 8_000_000)]
    some = [*both, with_gpu("c", 30, None)]
    for runs, asked, name, label, values in (
        (both, "memory", "GPU memory", "PePR-M", [7e6, 8e6]),
        (some, "memory", "peak RSS", "PePR-M", [10.0, 20.0, 30.0]),
        (both, "memory:host", "peak RSS", "PePR-M host", [10.0, 20.0]),
        (both, "memory:gpu", "GPU memory", "PePR-M gpu", [7e6, 8e6]),
    ):
        ranking = Study.from_runs(runs, resources=[asked]).rank()
        assert (ranking.resource_name, ranking.resource.tolist()) == (name, values)
        assert ranking.label == label and ranking.u_pepr is None
    with pytest.raises(UsageError, match="no peak memory is known of c-1"):
        Study.from_runs(some, resources=["memory:gpu"])


def test_cost_carbon_and_logged_numbers_are_resources() -> None:
    runs = [
        run_summary(
            name,
            energy=energy(j),
            carbon={"g_co2e": j / 1000},
            metrics={"accuracy": 0.9, "parameters": j * 7},
        )
        for name, j in (("a", 3.6e6), ("b", 7.2e6))
    ]
    study = Study.from_runs(runs, resources=["cost", "carbon", "parameters"], price=(0.3, "EUR"))
    cost, carbon, parameters = study.rankings
    assert cost.resource == pytest.approx([0.3, 0.6]) and cost.unit == "EUR"
    assert carbon.resource == pytest.approx([3600.0, 7200.0]) and carbon.unit == "g"
    assert carbon.u_resource == pytest.approx([180.0, 360.0])
    assert parameters.resource == pytest.approx([3.6e6 * 7, 7.2e6 * 7])
    assert [r.label for r in study.rankings] == ["PePR-cost", "PePR-C", "PePR-parameters"]


@pytest.mark.parametrize(
    ("text", "price"),
    [("0.3", (0.3, "")), ("0.30EUR", (0.3, "EUR")), ("2 kr", (2.0, "kr")), ("€.31", (0.31, "€"))],
)
def test_a_price_has_a_currency(text: str, price: tuple[float, str]) -> None:
    assert parse_price(text) == price


@pytest.mark.parametrize("text", ["EUR", "-1EUR", "1,5", "nan", "€1€", "1e400", ""])
def test_a_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--price"):
        parse_price(text)


# --- groups --------------------------------------------------------------------------------------


def two_experiments() -> list[dict[str, Any]]:
    return [
        measured("a", 1, 1000.0, 0.9, experiment="digits"),
        measured("b", 1, 2000.0, 0.9, experiment="digits"),
        measured("a", 2, 10.0, 0.5, experiment="iris", host="other"),
        measured("b", 2, 30.0, 0.6, experiment="iris", host="other"),
        measured("lonely", 1, 5.0, 0.6, experiment="one"),
    ]


def test_each_experiment_is_a_cohort_of_its_own_and_what_is_none_is_named() -> None:
    study = Study.from_runs(two_experiments())
    assert study.bounds == {
        ("digits", "energy"): (1000.0, 2000.0),
        ("iris", "energy"): (10.0, 30.0),
    }
    assert [who for who, _ in study.left_out] == ["the ranking of one by energy"]
    assert study.rank(group="iris").scores.pepr.tolist() == [0.5, 0.3]


def test_runs_of_many_experiments_are_one_cohort_when_asked_for() -> None:
    study = Study.from_runs(two_experiments(), group="none")
    assert study.rank().names == ("a", "b", "lonely") and study.rank().group is None
    by_host = Study.from_runs(two_experiments(), group="host")
    assert [ranking.group for ranking in by_host.rankings] == ["node", "other"]
    with pytest.raises(UsageError, match="cannot be grouped by 'luck'"):
        Study.from_runs(two_experiments(), group="luck")


# --- outliers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "wrong"), [("derma_pt", 0), ("pneumonia_small", 35)])
def test_the_papers_wrong_energies_are_named_and_ranked_without(dataset: str, wrong: int) -> None:
    columns = paper_columns(dataset)
    numbers = {c: np.array(columns[c], dtype=float) for c in ("test_09", "energy", "train_time")}
    # when
    study = Study.from_table(
        {**numbers, "model": columns["model"]}, performance="test_09", resources=["energy"],
        name="model", time="train_time",
    )  # fmt: skip
    # then named are the rows of a power (energy in kWh is of ten epochs) that no such server draws
    watts = numbers["energy"] * 3.6e6 / (10 * numbers["train_time"])
    impossible = {m for m, w in zip(columns["model"], watts, strict=True) if w > 1500}
    assert len(impossible) == wrong
    ranking = study.rank()
    named = {name for outlier in ranking.outliers for name in outlier.names}
    assert named == impossible
    assert len(ranking.names) == 131  # the ranking that was asked for has them
    if not wrong:
        assert ranking.without is None
        return
    # and the one without them has the bounds and the scores of the rest
    rest = watts <= 1500
    alone = pepr.score(numbers["test_09"][rest], numbers["energy"][rest])
    assert ranking.without is not None and len(ranking.without.names) == 96
    assert ranking.without.scores.pepr.tolist() == alone.pepr.tolist()
    assert sum(row["doubtful"] for row in study.rows()) == 35


def test_a_run_of_impossible_power_is_named_and_the_ranking_given_both_ways() -> None:
    # given 12 models of two seeds at 200 W, one run of which reads 30 times its energy
    runs = []
    for model in range(12):
        for seed in range(2):
            seconds = 60.0 * (model + 1) + seed
            faulty = (model, seed) == (4, 1)
            watts = 6000.0 if faulty else 200.0
            runs.append(measured(f"m{model}", seed, seconds * watts, 0.9, time_s=seconds))
    # when
    ranking = Study.from_runs(runs).rank()
    # then
    (outlier,) = ranking.outliers
    assert outlier.names == ("m4-1",) and ranking.names[outlier.rows[0]] == "m4"
    assert (
        outlier.what == "energy per time" and "6.000 kW" in outlier.why and "200.0 W" in outlier.why
    )
    assert ranking.scores.bounds[1] == pytest.approx((300 * 200 + 301 * 6000) / 2)
    without = ranking.without
    assert without is not None and without.scores.bounds[1] == pytest.approx(720.5 * 200)
    assert without.n is not None and without.n[without.names.index("m4")] == 1
    data = ranking_data(ranking)
    assert data["doubts"][0]["names"] == ["m4-1"]
    assert data["without_doubtful"]["bounds"]["max"] == pytest.approx(720.5 * 200)


# --- bounds of another study ---------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for run in small_study():
        store_run(tmp_path, run)
    return tmp_path


def compared(*args: object) -> dict[str, Any]:
    result = invoke(compare, *args, "--json", "-")
    assert result.exit_code == 0, result.exception
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_a_new_model_is_scored_against_a_saved_study(store: Path, tmp_path: Path) -> None:
    # given the bounds of a study
    file = tmp_path / "study.json"
    first = compared("--store", store, "--save-bounds", file)
    saved = json.loads(file.read_text())
    assert saved["made_at"] and saved["bounds"][0]["n"] == 3
    assert (saved["bounds"][0]["unit"], saved["bounds"][0]["provenance"]) == ("J", "measured")
    # when one model alone is compared within them, and another that is outside
    new = tmp_path / "new"
    store_run(new, measured("new", 1, 4000.0, 0.93))
    store_run(new, measured("giant", 1, 9000.0, 0.98))
    (ranking,) = compared("--store", new, "--bounds-from", file)["rankings"]
    # then the bounds are the study's, and what is outside is clamped and flagged
    assert ranking["bounds"] == {
        **{key: first["rankings"][0]["bounds"][key] for key in ("min", "max")},
        "set_by": "given",
        "source": "study.json",
    }
    assert [(row["name"], row["pepr"], row["clamped"]) for row in ranking["rows"]] == [
        ("new", pytest.approx(0.93 / 1.75), False),
        ("giant", pytest.approx(0.98 / 2), True),
    ]
    screen = invoke(compare, "--store", new, "--bounds-from", file)
    assert "(normalisation range of study.json)" in screen.stdout and "giant" in screen.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--resource", "time"], "study.json has no normalisation range of time"),
        (["--bounds", "1:2"], "--range and --range-from cannot be used together"),
        (
            ["--resource", "energy,time", "--range", "1:2"],
            "--range and --range-from cannot be used together",
        ),
    ],
)
def test_bounds_of_something_else_are_refused(
    store: Path, tmp_path: Path, arguments: list[str], what: str
) -> None:
    file = tmp_path / "study.json"
    compared("--store", store, "--save-range", file)
    result = invoke(compare, "--store", store, "--range-from", file, *arguments)
    assert isinstance(result.exception, UsageError) and result.exception.fix
    assert what in result.exception.what and result.stdout == ""


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"unit": "kWh"}, "range of energy in kWh"),
        ({"name": "GPU memory"}, "range of GPU memory"),
        ({"provenance": "modelled"}, "range of estimated energies, these are measured"),
    ],
)
def test_bounds_in_another_unit_or_of_another_kind_are_refused(
    store: Path, tmp_path: Path, changed: dict[str, Any], what: str
) -> None:
    file = tmp_path / "study.json"
    compared("--store", store, "--save-bounds", file)
    saved = json.loads(file.read_text())
    saved["bounds"][0].update(changed)
    file.write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=what):
        Study.from_store(store, bounds=read_bounds(file))
    if "provenance" in changed:  # asked for by name
        asked = Study.from_store(store, bounds=read_bounds(file), mix_provenance=True)
        assert asked.rank().bounds_given


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "pepr-bounds", "schema": 2}', '{"kind": "pepr-bounds"}',
             '{"kind": "pepr-bounds", "schema": 1, "bounds": [{}]}', "\x00", "[" * 100_000,
             '{"kind": "pepr-bounds", "schema": 1, "bounds": []}',
             '{"kind": "pepr-bounds", "schema": 1, "bounds": ""}',
             '{"kind": "pepr-bounds", "schema": 1, "bounds": [{"resource": "energy", "unit": "J", '
             '"name": "energy", "min": 1, "max": NaN, "group": null, "provenance": null, '
             '"metric": null}]}']
)  # fmt: skip
def test_a_file_without_bounds_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.json"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_bounds(file)
    assert refused.value.why and refused.value.fix
    with pytest.raises(UsageError, match=r"none\.json"):
        read_bounds(tmp_path / "none.json")


def test_one_run_alone_is_scored_within_bounds() -> None:
    ranking = Study.from_runs([measured("a", 1, 2000.0, 0.9)], bounds=(1000.0, 3000.0)).rank()
    assert ranking.scores.pepr.tolist() == [0.6]
    # u(R) = 100 J / 2000 J, u(PePR) = 0.9 u(R) / 1.5^2
    assert ranking.u_pepr is not None and ranking.u_pepr[0] == pytest.approx(0.02, rel=0.03)
    assert "0.600 ± 0.020" in render_ranking(ranking)


def test_bounds_of_a_grouped_study_go_to_the_group_of_their_name(tmp_path: Path) -> None:
    study = Study.from_runs(two_experiments())
    file = tmp_path / "study.json"
    file.write_text(json.dumps(study.bounds_data()))
    again = Study.from_runs(two_experiments()[:4], bounds=read_bounds(file))
    assert again.bounds == study.bounds
    with pytest.raises(UsageError, match="no normalisation range of energy for all runs together"):
        Study.from_runs(two_experiments()[:2], bounds=read_bounds(file))
    named = Study.from_runs(two_experiments()[2:4], bounds=read_bounds(file), group="experiment")
    assert named.rank().scores.bounds == (10.0, 30.0)


# --- the command ---------------------------------------------------------------------------------


def test_several_resources_are_one_table_a_row_a_model(store: Path) -> None:
    result = invoke(compare, "--store", store, "--resource", "energy,carbon", "--resource", "cost",
                         "--price", "0.3EUR")  # fmt: skip
    assert result.exit_code == 0, result.exception
    heading = next(line for line in result.stdout.splitlines() if line.startswith("  #"))
    assert heading.split() == ["#", "model", "accuracy", "PePR-E", "PePR-C", "PePR-cost"]
    assert len([line for line in result.stdout.splitlines() if " large " in line]) == 1
    free = invoke(compare, "--store", store, "--resource", "energy,cost")
    assert isinstance(free.exception, UsageError) and "--price" in free.exception.fix
    # and one that all models took alike is missing, and said to be
    alike = invoke(compare, "--store", store, "--resource", "energy,time")
    assert "left out the ranking by time: all resources are equal" in alike.stderr
    assert alike.stdout.startswith("PePR-E   3 models")


def test_transforms_are_declared_and_recorded(tmp_path: Path) -> None:
    for name, total_j, error in (("a", 1000.0, 20.0), ("b", 2000.0, 10.0)):
        store_run(tmp_path, measured(name, 1, total_j, error))
    (ranking,) = compared("--store", tmp_path, "--percent", "--transform", "one-minus")["rankings"]
    assert (ranking["percent"], ranking["transform"]) == (True, "one-minus")
    assert [row["performance"] for row in ranking["rows"]] == pytest.approx([0.8, 0.9])
    refused = invoke(compare, "--store", tmp_path).exception
    assert isinstance(refused, UsageError) and "--percent" in refused.fix


def test_hostile_names_stay_text_on_the_screen_and_whole_in_the_data(tmp_path: Path) -> None:
    names = [
        "<script>alert(1)</script>",
        "../../etc/passwd",
        "x" * 10_000,
        "😀" * 40,
        "a\nb\x1b[2J",
    ]
    for i, name in enumerate(names):
        run = measured("m", i, 1000.0 * (i + 1), 0.9)
        store_run(tmp_path, {**run, "name": name})
    store_run(tmp_path, {**measured("m", 9, 1.0, 0.9), "name": "bad\x1b[2J" * 99, "exit_code": 3})
    result = invoke(compare, "--store", tmp_path)
    assert result.exit_code == 0, result.exception
    for line in result.stdout.splitlines():
        assert sum(2 if ord(c) > 0x2E80 else 1 for c in line) <= 80
    assert "\x1b" not in result.stdout + result.stderr
    assert max(map(len, result.stderr.splitlines())) < 500
    rows = compared("--store", tmp_path)["rankings"][0]["rows"]
    assert {row["name"] for row in rows} == set(names)


def test_score_checks_against_the_column_of_time_and_averages_repeats(tmp_path: Path) -> None:
    # given 10 sound rows at 200 and one at 4000 per unit of "took"
    table = tmp_path / "t.csv"
    rows = [f"m{i // 2},0.9,{(i + 1) * (4000 if i == 6 else 200)},{i + 1}" for i in range(11)]
    table.write_text("model,acc,joules,took\n" + "\n".join(rows) + "\n")
    columns = [str(table), "--performance", "acc", "--resource", "joules"]
    silent = invoke(score, *columns)
    assert "outlier" not in silent.stderr
    # when
    both = invoke(score, *columns, "--time", "took")
    assert "1 of 11 rows is an outlier in joules per took: m3" in both.stderr
    assert "Without the 1 outlier:" in both.stdout
    repeats = invoke(score, *columns, "--repeats", "--json", "-")
    data = json.loads(repeats.stdout)["rankings"][0]["rows"]
    assert {row["name"]: row["n"] for row in data}["m0"] == 2 and len(data) == 6
    refused = invoke(score, *columns, "--repeats", "-o", str(tmp_path / "o.csv"))
    assert isinstance(refused.exception, UsageError)


# --- bad input -----------------------------------------------------------------------------------


def test_runs_that_cannot_be_ranked_are_left_out_by_name() -> None:
    study = Study.from_runs(
        [
            run_summary("ok"),
            run_summary("fine", energy=energy(2000.0)),
            run_summary("crashed", exit_code=139),
            run_summary("killed", complete=False, exit_code=None),
            run_summary("shot", exit_code=None, signal=9),
            run_summary("future", schema=2),
            {"run_id": "odd", "schema": 1},
        ]
    )
    assert study.rank().names == ("ok", "fine")
    why = dict(study.left_out)
    assert "signal 9" in why["shot-1"]
    assert "139" in why["crashed-1"] and "incomplete" in why["killed-1"]
    assert "update pepr-profiler" in why["future-1"]
    assert "no summary" in why["odd"]


def test_a_run_given_twice_counts_once_and_two_of_one_id_count_twice() -> None:
    run, other = run_summary("a"), run_summary("b", energy=energy(2000.0))
    same = Study.from_runs([run, dict(run), other]).rank()
    assert same.n is not None and same.n.tolist() == [1, 1]
    elsewhere = {**run, "host": "another", "energy": energy(1100.0)}
    two = Study.from_runs([run, elsewhere, other]).rank()
    assert two.n is not None and two.n.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("runs", "options", "what", "fix"),
    [
        (
            [run_summary("a"), run_summary("b", energy=energy(9.0, provenance="modelled"))],
            {},
            "measured and estimated energies",
            "--mix-provenance",
        ),
        (
            [run_summary("a"), run_summary("b", metrics={}, performance=None)],
            {},
            "no performance is known of b-1",
            "pepr-profile runs set b-1 accuracy=0.91",
        ),
        ([run_summary("a")], {"metric": "auc"}, "no auc is known of a-1", "set a-1 auc=0.91"),
        (
            [run_summary("a", metrics={"f1": None})],
            {"metric": "f1"},
            "no f1 is known of a-1",
            "set a-1 f1=0.91",
        ),
        (
            [run_summary("a"), run_summary("b", performance={"metric": "f1", "value": 0.8})],
            {},
            "not the same metric",
            "--metric accuracy",
        ),
        ([run_summary("a", carbon=None)], {"resources": ["carbon"]}, "no carbon", "--region"),
        (
            [run_summary("a", memory={"peak_rss_bytes": None, "gpu_peak_bytes": None})],
            {"resources": ["memory"]},
            "no peak memory is known of a-1",
            "--resource energy",
        ),
        ([run_summary("a")], {"resources": ["luck"]}, "no resource 'luck'", "--resource"),
        ([run_summary("a")], {"resources": ["memory:luck"]}, "no resource", "--resource"),
        ([run_summary("a")], {"resources": ["cost"]}, "needs the price", "--price"),
        ([run_summary("a")], {}, "one run alone cannot be ranked", "--range"),
        (
            [measured("a", 1, 1.0, 0.5), measured("a", 2, 1.0, 1.4), measured("b", 1, 2.0, 0.5)],
            {},
            r"performance outside \[0, 1\] in a \(1.4\)",
            "--percent",
        ),
        ([run_summary("a", exit_code=1)], {}, "no run to compare", "pepr-profile runs"),
        ([], {}, "no run to compare", "pepr-profile runs"),
    ],
)
def test_runs_that_may_not_be_compared_are_refused(
    runs: list[dict[str, Any]], options: dict[str, Any], what: str, fix: str
) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        Study.from_runs(runs, **options)
    assert refused.value.why and fix in refused.value.fix


def test_mixed_provenance_is_compared_when_asked_for_and_never_matters_for_time() -> None:
    runs = [
        run_summary("a"),
        run_summary("b", energy=energy(9.0, provenance="modelled"), time_s=90.0),
    ]
    assert Study.from_runs(runs, mix_provenance=True).rank().provenance == "mixed"
    assert Study.from_runs(runs, resources=["time"]).rank().resource.tolist() == [60.0, 90.0]


def test_energies_of_jobs_and_of_whole_devices_share_no_cohort(store: Path) -> None:
    # given a run of each scope
    whole = energy(9.0) | {"scope": "device"}
    runs = [run_summary("a"), run_summary("b", energy=whole, time_s=90.0)]
    # then their energies are not compared, their times are
    with pytest.raises(UsageError, match="b-1 recorded with --attribution device"):
        Study.from_runs(runs)
    assert Study.from_runs(runs, resources=["time"]).rank().resource.tolist() == [60.0, 90.0]
    # and nor through the store's index
    for run in runs:
        store_run(store, run)
    found = Store(store).find(Filter(name="[ab]"))
    assert [run["energy"]["scope"] for run in found] == ["job", "device"]


# --- in code -------------------------------------------------------------------------------------


def test_a_run_is_loaded_by_id_directory_file_or_as_it_is(store: Path, tmp_path: Path) -> None:
    by_id = pepr_profiler.load("large-2", store=store)
    assert by_id["name"] == "large" and by_id["energy"]["total_j"] == 3000.0
    directory = store / "runs" / "large-2"
    assert load(directory) == load(directory / "run.json") == load(by_id) == by_id
    with pytest.raises(UsageError, match="no run"):
        load("none", store=store)
    with pytest.raises(UsageError, match="no summary"):
        load({"schema": 3})
    (tmp_path / "text.json").write_text("not JSON")
    with pytest.raises(PeprError, match=r"text\.json"):
        load(tmp_path / "text.json")
    store_run(store, run_summary("future"), schema=9)
    with pytest.raises(TraceError, match="schema"):
        load("future-1", store=store)


def test_a_study_of_a_store_has_flat_rows_for_a_data_frame(store: Path) -> None:
    study = pepr_profiler.Study.from_store(store, experiment="study")
    rows = study.rows()
    assert [row["name"] for row in rows] == ["small", "large", "huge"]
    assert all(set(row) == set(rows[0]) for row in rows)
    assert all(
        value is None or isinstance(value, str | int | float | bool)
        for row in rows
        for value in row.values()
    )
    assert rows[0]["resource_key"] == "energy" and rows[0]["unit"] == "J"
    assert study.scores[None, "energy"].bounds == study.bounds[None, "energy"] == (1000.0, 5000.0)
    with pytest.raises(UsageError, match="no ranking by time"):
        study.rank("time")


def test_a_study_through_the_index_is_that_of_the_summaries_to_the_bit(tmp_path: Path) -> None:
    # given runs of two experiments, some without a name, on two boards whose errors they share
    rng = np.random.default_rng(3)
    runs = []
    for number in range(60):
        j = float(rng.lognormal(5, 1))
        run = run_summary(
            f"m{number % 7}" if number % 3 else "train",
            number,
            run_id=f"r-{number}",
            experiment="one" if number % 2 else None,
            command=["python", "train.py", f"--width={number % 5}", "--seed", str(number)],
            energy=on_board("AB"[number % 4 // 2], j, gain_j=0.04 * j, own_j=0.01 * j),
            metrics={"accuracy": float(rng.random()), "f1": 0.5} if number % 11 else {"f1": 1},
            performance={"metric": "f1", "value": 0.75},
            carbon={"g_co2e": j * 1e-4},
            time_s=float(rng.random()),
            memory={"peak_rss_bytes": 10**9 + number, "gpu_peak_bytes": None},
        )
        runs.append(run | {"exit_code": 1} if number % 13 == 0 else run)
        store_run(tmp_path, runs[-1])
    runs.sort(key=lambda run: (run["started_at"], run["run_id"]))  # as a store has them
    every_option: list[dict[str, Any]] = [
        {"resources": ["energy", "carbon", "time", "memory", "f1", "cost"]},
        {"group": "none"},
        {"group": "host", "metric": "f1"},
    ]
    for options in every_option:
        expected = Study.from_runs(runs, price=(0.3, "EUR"), **options)
        for _ in ("read", "from the index"):
            # when
            study = Study.from_store(tmp_path, price=(0.3, "EUR"), **options)
            # then
            assert [ranking_data(r) for r in study.rankings] == [
                ranking_data(r) for r in expected.rankings
            ]
            assert study.left_out == expected.left_out and len(study.left_out) == 5
            assert [r["run_id"] for r in study.runs] == [r["run_id"] for r in expected.runs]


def test_what_is_left_of_a_cohort_too_small_says_what_was_left_out() -> None:
    runs = [run_summary("a"), run_summary("b", energy=energy(9.0), complete=False)]
    with pytest.raises(UsageError, match="one run alone cannot be ranked") as refused:
        Study.from_runs(runs)
    assert "left out b-1: incomplete" in refused.value.why


def test_a_run_of_odd_parts_is_left_out_with_the_reason() -> None:
    odd = run_summary("odd", energy={"total_j": 5.0, "components": [{"budget": {}}]})
    study = Study.from_runs([run_summary("a"), run_summary("b", energy=energy(9.0)), odd])
    assert study.rank().names == ("a", "b")
    ((who, why),) = study.left_out
    assert who == "odd-1" and "no summary" in why


def test_runs_without_an_experiment_join_the_experiment_that_is_called_so() -> None:
    runs = [
        measured("a", 1, 1.0, 0.5, experiment=None),
        measured("b", 1, 2.0, 0.5, experiment="no experiment"),
        measured("c", 1, 3.0, 0.5, experiment="another"),
        measured("d", 1, 4.0, 0.5, experiment="another"),
    ]
    study = Study.from_runs(runs)
    assert [(r.group, r.names) for r in study.rankings] == [
        ("no experiment", ("a", "b")),
        ("another", ("c", "d")),
    ]


def test_a_table_of_arrays_is_a_study() -> None:
    columns = {"acc": np.array([0.8, 0.9, 0.7]), "j": [1.0, 2.0, 3.0], "set": ["x", "x", "y"]}
    study = Study.from_table(columns, performance="acc", resources=["j"])
    assert study.rank().names == ("row 1", "row 2", "row 3")
    assert study.rank().scores.pepr.tolist() == [0.8, 0.6, 0.35]
    # and a group of one is left out by name
    grouped = Study.from_table(columns, performance="acc", resources=["j"], group="set")
    assert [(r.group, r.names) for r in grouped.rankings] == [("x", ("row 1", "row 2"))]
    ((what, why),) = grouped.left_out
    assert what == "the ranking of j, set 'y'" and "one row alone cannot be ranked" in why


def test_importing_the_package_does_not_import_what_a_study_needs() -> None:
    code = (
        "import sys, pepr_profiler; assert 'numpy' not in sys.modules; "
        "pepr_profiler.Study, pepr_profiler.load, pepr_profiler.score; "
        "assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def estimated(cpu_j: float, dram_j: float) -> dict[str, Any]:
    """The energy of a run whose CPU and memory are estimated, ±50 % each."""
    components = [
        {
            **{"id": f"{kind}:modelled", "kind": kind, "source": "x", "provenance": "modelled"},
            **{"in_total": True, "job_j": part_j, "u_j": part_j / 2},
            "budget": {"gain_j": 0.0, "offset_j": 0.0, "model_j": part_j / 4},
        }
        for kind, part_j in (("cpu", cpu_j), ("dram", dram_j))
    ]
    total_j = cpu_j + dram_j
    return {**energy(total_j, provenance="modelled", u_j=total_j / 2), "components": components}


def test_no_mean_of_estimates_claims_less_than_one_of_them() -> None:
    # given five repeats of one program and two of another, that agree exactly
    runs = [run_summary("a", seed, energy=estimated(60.0, 40.0)) for seed in range(5)]
    runs += [run_summary("b", seed, energy=estimated(120.0, 80.0)) for seed in range(2)]
    ranking = Study.from_runs(runs).rank()

    assert dict(zip(ranking.names, ranking.resource, strict=True)) == {"a": 100.0, "b": 200.0}
    assert ranking.u_resource is not None
    assert (ranking.u_resource >= 0.4999 * ranking.resource).all()


# --- two models, noise, outliers, bad numbers ----------------------------------------------------


def repeated(*models: tuple[str, float], seeds: int = 3, sd: float = 0.03) -> list[dict[str, Any]]:
    """Runs of models with these mean energies, their scatter as a part of it."""
    rng = np.random.default_rng(6)
    return [
        measured(name, seed, j * float(rng.normal(1, sd)), 0.9)
        for name, j in models
        for seed in range(seeds)
    ]


def test_the_ratio_of_the_resource_has_an_interval_however_heavy_the_tails(tmp_path: Path) -> None:
    # given three repeats, of which Student's t draws both models at 0 now and then
    table = tmp_path / "two.csv"
    a, b = (2.38625, 2.36847, 2.28196), (2.31087, 2.35034, 2.29787)
    rows = [f"{name},0.9,{joules}" for name, seen in (("a", a), ("b", b)) for joules in seen]
    table.write_text("\n".join(["model,acc,energy", *rows]))
    # when
    arguments = (table, "--performance", "acc", "--resource", "energy", "--repeats", "--json", "-")
    (ranking,) = json.loads(invoke(score, *arguments).stdout)["rankings"]
    # then
    ratio = ranking["resource_ratio"]
    assert ratio["value"] == pytest.approx(sum(a) / sum(b))
    assert 0.95 < ratio["low"] < 1 < ratio["high"] < 1.06


def test_models_that_cannot_be_told_apart_are_not_ranked_but_for_anyway(tmp_path: Path) -> None:
    # given six runs of one program, half of them called a and half b
    for run in repeated(("a", 2314.0), ("b", 2314.0), sd=0.002):
        store_run(tmp_path, run | {"energy": energy(run["energy"]["total_j"], u_j=1.0)})
    # when
    result = invoke(compare, "--store", tmp_path)
    # then
    text = " ".join(result.stdout.split())
    assert "These models cannot be told apart by energy; PePR would rank them by noise." in text
    assert re.search(r"took 1\.\d+ times the energy of . \(95%: 0\.99\d+ to 1\.00\d+\)", text)
    assert "one has R = 0 and the other R = 1, however near they are" in text
    assert "--range MIN:MAX or --range-from FILE" in text and "PePR-E" not in text
    anyway = " ".join(invoke(compare, "--store", tmp_path, "--anyway").stdout.split())
    assert "PePR-E" in anyway and "cannot be told apart" in anyway and "1–2" in anyway
    several = invoke(compare, "--store", tmp_path, "--resource", "energy,carbon").stdout
    assert "cannot be told apart by carbon" in " ".join(several.split())
    assert several.count("not ranked") == 2 and "PePR-E" not in several
    # and in the data all is there, with the warning and an interval from P/2 to P
    (ranking,) = compared("--store", tmp_path)["rankings"]
    assert ranking["distinguishable"] is False
    assert [w["code"] for w in ranking["warnings"]] == ["indistinguishable", "two-rows"]
    assert ranking["resource_ratio"]["low"] < 1 < ranking["resource_ratio"]["high"]
    for row in ranking["rows"]:
        assert row["pepr_low"] == pytest.approx(0.45, abs=0.01)
        assert row["pepr_high"] == pytest.approx(0.9, abs=0.01)
        assert (row["rank_best"], row["rank_worst"]) == (1, 2)
    assert 0.2 < ranking["rows"][0]["swap_with_next"] <= 0.5


def test_models_that_differ_by_many_u_are_told_apart() -> None:
    ranking = Study.from_runs(repeated(("a", 1000.0), ("b", 2000.0), ("c", 1500.0))).rank()
    assert ranking.scores.distinguishable is True and ranking.warnings == ()
    assert ranking.standing is not None and ranking.standing.best is not None
    assert ranking.standing.best[0] == 1 and ranking.standing.swap[0] < 0.05
    fixed = Study.from_runs(repeated(("a", 1000.0), ("b", 1000.0)), bounds=(500.0, 4000.0)).rank()
    assert fixed.warnings == ()  # R means something there
    table = Study.from_table({"acc": [0.8, 0.9], "j": [1.0, 2.0]}, performance="acc",
                             resources=["j"]).rank()  # fmt: skip
    assert table.scores.distinguishable is None
    assert [caution.code for caution in table.warnings] == ["two-rows"]


def test_the_draws_are_the_same_each_time_and_in_any_order_of_the_runs() -> None:
    runs = repeated(("a", 1000.0), ("b", 1030.0), ("c", 1100.0))
    first, again = Study.from_runs(runs).rank(), Study.from_runs(runs).rank()
    assert ranking_data(first) == ranking_data(again)
    assert first.standing is not None and first.standing.pairs is not None
    order = first.order
    for a, b in itertools.pairwise(order.tolist()):
        assert first.standing.pairs[a, b] == first.standing.swap[a]
    assert first.standing.pairs + first.standing.pairs.T == pytest.approx(np.ones((3, 3)))


def tables(*groups: tuple[str, Sequence[float], Sequence[float]]) -> dict[str, list[Any]]:
    """A table with the energies and times of the rows of each group."""
    rows = [
        (group, f"m{i}", j, s)
        for group, energies, times in groups
        for i, (j, s) in enumerate(zip(energies, times, strict=True))
    ]
    columns = ["data", "model", "energy", "time"]
    table = {c: list(cells) for c, cells in zip(columns, zip(*rows, strict=True), strict=True)}
    return {**table, "acc": [0.5 + 0.001 * i for i in range(len(rows))]}


def study_of(table: dict[str, list[Any]], *, time: str | None = "time") -> Study:
    return Study.from_table(
        table, performance="acc", resources=["energy"], name="model", group="data", time=time
    )


def test_a_reading_copied_from_another_row_or_group_is_named_also_where_copies_are_the_more() -> (
    None
):
    # given two groups at 500 W in kWh and s; 11 of 20 rows of the second have the energies of the
    # first, which took six times as long
    rng = np.random.default_rng(9)
    times = rng.uniform(1000, 5000, 20)
    sound = times * rng.uniform(480, 520, 20) / 3.6e6
    short = times / 6
    mixed = short * rng.uniform(480, 520, 20) / 3.6e6
    mixed[:11] = sound[:11]
    # when
    study = study_of(tables(("large", sound.tolist(), times.tolist()),
                            ("small", mixed.tolist(), short.tolist())))  # fmt: skip
    # then
    large, small = study.rankings
    assert large.outliers == () and large.populations == ""
    named = {name for outlier in small.outliers for name in outlier.names}
    assert named == {f"m{i}" for i in range(11)}
    assert all("reading of m" in outlier.why and "of large" in outlier.why
               for outlier in small.outliers)  # fmt: skip
    assert small.without is not None and len(small.without.names) == 9
    # and without a time nobody knows which is the copy
    free = study_of(tables(("large", sound.tolist(), times.tolist()),
                           ("small", mixed.tolist(), short.tolist())), time=None)  # fmt: skip
    assert all(ranking.outliers == () for ranking in free.rankings)
    assert "to all digits, of which one is a copy" in free.rankings[1].same_readings


def population(watts: float, n: int, seed: int) -> tuple[list[float], list[float]]:
    """Energies in kWh and times in s."""
    rng = np.random.default_rng(seed)
    times = rng.uniform(1000, 5000, n)
    return (times * watts * rng.uniform(0.9, 1.1, n) / 3.6e6).tolist(), times.tolist()


def test_of_two_populations_the_one_is_wrong_that_no_server_draws_even_if_it_is_the_larger() -> (
    None
):
    right, wrong = population(5500.0, 53, 1), population(34_000.0, 78, 2)
    table = tables(("x", right[0] + wrong[0], right[1] + wrong[1]))
    (ranking,) = study_of(table).rankings
    (outlier,) = ranking.outliers
    assert len(outlier.names) == 78 and "no server draws" in outlier.why
    assert outlier.names[0] == "m53" and ranking.without is not None


def test_of_two_populations_the_one_is_right_that_agrees_with_other_groups() -> None:
    right, wrong = population(500.0, 20, 1), population(3400.0, 30, 2)
    other = population(520.0, 25, 3)
    (mixed, _) = study_of(
        tables(("x", right[0] + wrong[0], right[1] + wrong[1]), ("y", *other))
    ).rankings
    (outlier,) = mixed.outliers
    assert len(outlier.names) == 30 and "in other groups" in outlier.why


@pytest.mark.parametrize("few", [2, 7])
def test_few_rows_are_not_wrong_because_they_are_few(few: int) -> None:
    # given few rows of 300 W, beside 35 of which each draws more than any server
    sound, wrong = population(300.0, few, 1), population(70_000.0, 35, 2)
    ranking = study_of(tables(("x", sound[0] + wrong[0], sound[1] + wrong[1]))).rank()
    # then the 35 are named, and the others ranked without them
    (outlier,) = ranking.outliers
    assert set(outlier.names) == {f"m{i}" for i in range(few, few + 35)}
    assert "no server draws" in outlier.why
    assert ranking.without is not None and len(ranking.without.names) == few
    # and of two possible powers none is accused
    other = population(3000.0, 35, 2)
    ranking = study_of(tables(("x", sound[0] + other[0], sound[1] + other[1]))).rank()
    assert ranking.outliers == () and [len(each.names) for each in ranking.either] == [few, 35]
    # but where another group has one of them, in any order of the groups
    groups = [("x", sound[0] + other[0], sound[1] + other[1]), ("y", *population(310.0, 20, 3))]
    for of_groups in (groups, groups[::-1]):
        rankings = {ranking.group: ranking for ranking in study_of(tables(*of_groups)).rankings}
        (outlier,) = rankings["x"].outliers
        assert len(outlier.names) == 35 and "in other groups" in outlier.why
        assert rankings["y"].outliers == ()


def test_of_two_populations_none_is_accused_where_nothing_decides() -> None:
    a, b = population(500.0, 53, 1), population(3400.0, 78, 2)
    study = study_of(tables(("x", a[0] + b[0], a[1] + b[1])))
    ranking = study.rank()
    assert ranking.outliers == () and ranking.without is None
    assert "one of two populations is wrong: 53 rows at" in ranking.populations
    assert "78 rows at" in ranking.populations
    assert [len(each.names) for each in ranking.either] == [53, 78]
    data = ranking_data(ranking)
    assert data["warnings"][0]["code"] == "two-populations"
    assert [len(each["rows"]) for each in data["either_population"]] == [53, 78]


def test_totals_that_are_unknown_and_estimates_among_measurements_are_left_out_by_name() -> None:
    runs = [
        measured("a", 1, 1000.0, 0.8),
        measured("b", 1, 2000.0, 0.9),
        measured("c", 1, 3000.0, 0.9),
        measured("null", 1, 1.0, 0.9) | {"energy": energy(1.0) | {"total_j": None, "u_j": None}},
        measured("guess", 1, 1.0, 0.9) | {"energy": energy(4000.0, provenance="modelled")},
    ]
    study = Study.from_runs(runs, resources=["energy", "carbon"])
    for ranking in study.rankings:
        assert ranking.names == ("a", "b", "c")
    why = dict(study.left_out)
    assert why["null-1"] == "its energy is unknown"
    assert "estimated" in why["guess-1"] and "--mix-provenance" in why["guess-1"]
    mixed = Study.from_runs(runs, mix_provenance=True).rank()
    assert mixed.names == ("a", "b", "c", "guess") and mixed.provenance == "mixed"


def test_an_undeclared_metric_is_asked_for_with_the_command_that_answers(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        run = run_summary(name, energy=energy(1000.0 * (i + 1)), performance=None)
        logged = {"epoch": 3.0, "loss": 0.25, "accuracy": 0.9 + i / 100, "seconds": 7.0}
        store_run(tmp_path, run, metrics=logged)
    refused = invoke(compare, "--store", tmp_path).exception
    assert isinstance(refused, UsageError)
    assert "accuracy 0.9 … 0.91" in refused.why and "loss 0.25" in refused.why
    assert refused.fix == f"pepr-profile compare --store {tmp_path} --metric accuracy"
    words = refused.fix.split()[2:]
    assert invoke(compare, *words).exit_code == 0


@pytest.mark.parametrize(
    ("metric", "fix"),
    [
        ("loss", "--metric loss --transform exp-neg"),
        ("val loss", "--metric 'val loss' --transform exp-neg"),
        ("step", "--metric NAME"),
    ],
)
def test_a_loss_or_a_counter_is_no_performance_without_a_direction(metric: str, fix: str) -> None:
    runs = [
        run_summary(
            name,
            energy=energy(j),
            metrics={metric: 0.5},
            performance={"metric": metric, "value": 0.5},
        )
        for name, j in (("a", 1000.0), ("b", 2000.0))
    ]
    for options in ({}, {"metric": metric}):
        with pytest.raises(UsageError, match=f"{metric} is no performance") as refused:
            Study.from_runs(runs, **options)
        assert fix in refused.value.fix
    declared = Study.from_runs(runs, metric=metric, transform="exp-neg").rank()
    assert declared.performance == pytest.approx([math.exp(-0.5)] * 2)


def test_an_experiment_without_a_metric_stops_no_other(tmp_path: Path) -> None:
    # given three experiments: of accuracy, of another metric, and of none that is declared
    for experiment, performance in (
        ("acc", {"metric": "accuracy", "value": 0.9}),
        ("f1", {"metric": "f1", "value": 0.8}),
        ("notes", None),
    ):
        for number, name in enumerate("ab", start=1):
            run = run_summary(f"{experiment}-{name}", energy=energy(1000.0 * number))
            store_run(tmp_path, run, experiment=experiment, performance=performance)
    # when
    result = invoke(compare, "--store", tmp_path)
    # then
    assert result.exit_code == 0, result.exception
    titles = [line.split() for line in result.stdout.splitlines() if line.startswith("PePR-E  ")]
    assert [(words[4], words[6]) for words in titles if "metric" in words] == [
        ("acc", "accuracy"),
        ("f1", "f1"),
    ]
    assert "left out experiment notes: none of the metrics is declared" in result.stderr
    alone = invoke(compare, "--store", tmp_path, "--experiment", "notes").exception
    assert isinstance(alone, UsageError) and alone.fix.endswith("--metric accuracy")


def test_what_a_run_proposes_next_is_a_command_that_works(tmp_path: Path) -> None:
    def proposed(run: dict[str, Any]) -> list[str]:
        text = io.StringIO()
        show(Store(tmp_path).load(run["run_id"]), file=text, store=tmp_path)
        following = text.getvalue().partition("next: pepr-profile ")[2]
        return shlex.split(following.replace("\\\n", " "))

    # given an experiment's first run, another of the same model, and one of another model
    for number, name in enumerate(("a", "a", "b"), start=1):
        run = run_summary(name, number, energy=energy(1000.0 * number), carbon=None)
        store_run(tmp_path, run)
        # when
        verb, *words = proposed(run)
        # then it is compared where that works
        works = invoke(compare, "--experiment", "study", "--store", tmp_path).exit_code == 0
        assert (verb, works) == (("compare", True) if name == "b" else ("report", False))
        assert "--store" in words


BAD = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        # one model with many repeats
        ({"acc": [0.9] * 6, "j": BAD, "m": ["a"] * 6}, {"repeats": True}, "one model alone"),
        # negative, not finite, NaN among repeats
        ({"acc": [0.9] * 6, "j": BAD - 1.5}, {}, "negative or not finite in row 1"),
        ({"acc": [0.9] * 6, "j": BAD * [1, 1, np.nan, 1, 1, 1]}, {"repeats": True}, "in row 3"),
        ({"acc": [0.9, 0.9, np.nan, 0.9, 0.9, 0.9], "j": BAD}, {"repeats": True}, "outside"),
        (
            {"acc": [0.9] * 6, "j": BAD * 1e300, "m": list("aaabbb")},
            {"repeats": True},
            "j of b is 2e+300",
        ),
        # groups of one
        ({"acc": [0.9] * 6, "j": BAD, "g": list("uvwxyz")}, {"group": "g"}, "g 'u': one row alone"),
        # a bound equal to a value of all
        ({"acc": [0.9] * 6, "j": BAD}, {"bounds": (2.0, 2.0)}, "is empty"),
    ],
)
def test_numbers_that_cannot_be_scored_are_named(
    columns: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    name = "m" if "m" in columns else None
    with pytest.raises(UsageError, match=re.escape(expected)) as refused:
        Study.from_table(columns, performance="acc", resources=["j"], name=name, **options)
    assert refused.value.why and refused.value.fix


@pytest.mark.parametrize(
    ("acc", "j"),
    [
        ([0.9] * 6, [1.0, 1.1, 0.9, 2.0, 2.1, 1.9]),  # all accuracies equal
        ([0.0] * 6, [1.0, 1.1, 0.9, 2.0, 2.1, 1.9]),
        ([0.9, 0.8, 0.9, 0.8, 0.9, 0.8], [0.0, 0.0, 0.0, 2.0, 2.1, 1.9]),  # a resource of 0
        ([0.9, 0.8, 0.9, 0.8, 0.9, 0.8], [1e-300, 1.1e-300, 0.9e-300, 2e-300, 2e-300, 1.9e-300]),
        ([0.9, 0.9, 0.9, 0.8, 0.8, 0.8], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]),  # duplicated runs
    ],
)
def test_odd_numbers_have_finite_scores_and_intervals_within_their_range(
    acc: list[float], j: list[float]
) -> None:
    table = {"acc": acc, "j": j, "m": ["a", "a", "a", "b", "b", "b"]}
    study = Study.from_table(table, performance="acc", resources=["j"], name="m", repeats=True)
    ranking = study.rank()
    assert ranking.standing is not None
    low, high = ranking.standing.low, ranking.standing.high
    assert np.isfinite([low, high, ranking.scores.pepr]).all()
    assert (low <= ranking.scores.pepr).all() and (ranking.scores.pepr <= high).all()
    assert (low >= 0).all() and (high <= 1).all()
    json.dumps(ranking_data(ranking), allow_nan=False)
    render_ranking(ranking)
    render_ranking(ranking, anyway=True)


def test_a_bound_that_equals_a_value_clamps_nothing() -> None:
    scores = pepr.score([0.8, 0.9], [1.0, 3.0], bounds=(1.0, 3.0))
    assert not scores.clamped.any() and scores.r_norm.tolist() == [0.0, 1.0]


# --- what exports say of noise and of populations -------------------------------------------------


def noisy_study() -> Study:
    """Two models of three repeats, which differ by less than these scatter."""
    return Study.from_table(
        {
            "model": ["a"] * 3 + ["b"] * 3,
            "acc": [0.9, 0.91, 0.89, 0.9, 0.89, 0.91],
            "energy": [1.0, 1.02, 0.98, 1.01, 0.97, 1.03],
        },
        performance="acc",
        resources=("energy",),
        name="model",
        repeats=True,
    )


def test_flat_rows_say_that_their_ranks_are_those_of_noise() -> None:
    noise = noisy_study()
    assert noise.rank().noise
    assert [row["distinguishable"] for row in noise.rows()] == [False, False]
    text = encode(noise.rows(), "csv").decode().splitlines()
    assert text[0].endswith(",distinguishable") and text[1].endswith(",False")
    plain = Study.from_table({"acc": [0.5, 0.6], "j": [1, 2]}, performance="acc", resources=("j",))
    assert [row["distinguishable"] for row in plain.rows()] == [None, None]


def test_every_row_of_two_populations_says_of_which_it_is() -> None:
    a, b = population(500.0, 12, 1), population(3400.0, 15, 2)
    ranking = study_of(tables(("x", a[0] + b[0], a[1] + b[1]))).rank()
    assert all(note.startswith("population at ") for note in ranking.row_notes)
    assert len(set(ranking.row_notes[:12])) == len(set(ranking.row_notes[12:])) == 1
    rows = flat_rows(ranking)
    assert all(row["outlier"].startswith("population at ") for row in rows)
    assert not any(row["doubtful"] for row in rows)  # none is accused
    # and a paper's table has both rankings
    analysis = Analysis.of_runs(Study(rankings=(ranking,)))
    for count in (None, 3):
        titles = [table.title for table in study_tables(analysis, count)]
        assert len(titles) == 3 and "27 rows" in titles[0]
        assert "12 rows" in titles[1] and "15 rows" in titles[2]
        assert "population at" in titles[1] and titles[1] != titles[2]


def test_a_page_names_no_first_of_models_that_cannot_be_told_apart() -> None:
    page = study_page(noisy_study())
    assert "cannot be told apart" in page and "By PePR" not in page
