"""PePR scores against the paper's numbers, a Monte Carlo and brute force; rankings by hand."""

from __future__ import annotations

import csv
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pepr_profiler import pepr
from pepr_profiler.errors import UsageError
from pepr_profiler.report.ranking import Ranking, ranking_data, render_ranking

PAPER = Path(__file__).resolve().parents[2] / "shared" / "paper"
PAPER_COLUMNS = [
    ("energy", "E_n", "pepr_e"),
    ("co2", "C_n", "pepr_c"),
    ("train_time", "T_n", "pepr_t"),
    ("memR", "M_n", "pepr_m"),
]


def paper_table(name: str) -> dict[str, list[str]]:
    path = PAPER / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"the paper's table is not beside the repository: {path}")
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    return {column: [row[column] for row in table] for column in table[0]}


def floats(cells: list[str]) -> np.ndarray:
    return np.array([float(cell) for cell in cells])


@pytest.mark.parametrize("dataset", ["derma_pt", "pneumonia_small"])
@pytest.mark.parametrize(("resource", "normalised", "published"), PAPER_COLUMNS)
def test_scores_equal_the_papers(
    dataset: str, resource: str, normalised: str, published: str
) -> None:
    # given the authors' measurements
    table = paper_table(dataset)
    # when
    scores = pepr.score(floats(table["test_09"]), floats(table[resource]))
    # then their R and their scores, all 131 of them
    assert len(scores.pepr) == 131
    assert np.abs(scores.r_norm - floats(table[normalised])).max() < 1e-12
    assert np.abs(scores.pepr - floats(table[published])).max() < 1e-12


def test_the_score_is_p_at_the_cheapest_and_half_of_p_at_the_dearest() -> None:
    scores = pepr.score([0.8, 0.9, 0.6], [10.0, 30.0, 20.0])
    assert scores.pepr.tolist() == [0.8, 0.45, 0.6 / 1.5]
    assert scores.bounds == (10.0, 30.0)
    assert not scores.clamped.any()


def test_fixed_bounds_make_a_score_independent_of_the_cohort_and_clamp_what_is_outside() -> None:
    alone = pepr.score([0.9], [15.0], bounds=(10.0, 20.0))
    cohort = pepr.score([0.9, 0.5, 0.5, 0.5], [15.0, 9.0, 20.0, 80.0], bounds=(10.0, 20.0))
    assert alone.pepr[0] == cohort.pepr[0] == 0.9 / 1.5
    assert cohort.r_norm.tolist() == [0.5, 0.0, 1.0, 1.0]
    assert cohort.clamped.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("performance", "resource", "bounds", "what", "fix"),
    [
        ([0.5, 91.2], [1, 2], None, r"outside \[0, 1\] in row 2 \(91.2\)", "--percent"),
        ([0.5, -0.1], [1, 2], None, r"outside \[0, 1\] in row 2", "--transform"),
        ([math.nan, 0.5], [1, 2], None, r"outside \[0, 1\] in row 1 \(nan\)", "--percent"),
        ([0.5, 0.5], [1, math.nan], None, r"resource negative or not finite in row 2", "rows"),
        ([0.5, 0.5], [math.inf, 1], None, r"resource negative or not finite in row 1", "rows"),
        ([0.5, 0.5], [1, -1], None, r"resource negative or not finite in row 2 \(-1\)", "rows"),
        ([0.5, 0.5], [1], None, "do not belong together", "same length"),
        ([], [], None, "nothing to score", "add rows"),
        ([0.5], [1], None, "one row is no cohort", "--bounds"),
        ([0.5, 0.6], [2, 2], None, "all resources are equal", "--bounds"),
        ([0.5, 0.6], [1, 2], (2, 2), "span nothing", "--bounds"),
        ([0.5, 0.6], [1, 2], (3, 2), "span nothing", "--bounds"),
        ([0.5, 0.6], [1, 2], (math.nan, 2), "span nothing", "--bounds"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_remedy(
    performance: list[float],
    resource: list[float],
    bounds: tuple[float, float] | None,
    what: str,
    fix: str,
) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        pepr.score(performance, resource, bounds=bounds)
    assert refused.value.why and fix in refused.value.fix


def test_an_error_names_the_first_rows_and_counts_the_others() -> None:
    with pytest.raises(UsageError, match=r"m0 \(2\), m1 \(2\), .*m4 \(2\) and 95 more"):
        pepr.score([2.0] * 100, range(100), names=[f"m{i}" for i in range(100)])


def test_performance_is_converted_only_as_declared() -> None:
    assert pepr.as_performance([91.0, 50.0], percent=True).tolist() == [0.91, 0.5]
    assert pepr.as_performance([0.25], transform="one-minus").tolist() == [0.75]
    assert pepr.as_performance([25.0], percent=True, transform="one-minus").tolist() == [0.75]
    assert pepr.as_performance([math.log(4.0)], transform="exp-neg")[0] == pytest.approx(0.25)


def test_ranking_is_descending_and_keeps_the_order_of_equals() -> None:
    # given 99 rows of three performances in turn, and one that sets the upper bound
    scores = pepr.score([0.5, 0.9, 0.7] * 33 + [0.0], [1.0] * 99 + [2.0])
    assert pepr.rank(scores).tolist() == [*range(1, 99, 3), *range(2, 99, 3), *range(0, 99, 3), 99]


def test_the_pareto_front_is_what_no_row_dominates() -> None:
    # given random rows on a coarse grid, so that ties and duplicates are common
    rng = np.random.default_rng(7)
    p, r = rng.integers(0, 9, 300) / 8, rng.integers(1, 40, 300).astype(float)
    # when
    front = pepr.pareto_front(p, r)
    # then it is the definition, checked pair by pair
    for i in range(300):
        dominated = any(
            p[j] >= p[i] and r[j] <= r[i] and (p[j] > p[i] or r[j] < r[i]) for j in range(300)
        )
        assert front[i] != dominated


def test_duplicates_of_a_row_on_the_front_are_all_on_it() -> None:
    front = pepr.pareto_front([0.8, 0.8, 0.7, 0.9, 0.8], [1.0, 1.0, 1.0, 2.0, 1.5])
    assert front.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("bounds", [(100.0, 1000.0), None], ids=["fixed", "cohort"])
def test_uncertainty_equals_a_monte_carlo(bounds: tuple[float, float] | None) -> None:
    # given resources and performances known to 1-2 % (k = 2), bounds several u apart
    p = np.array([0.70, 0.80, 0.85, 0.90, 0.95, 0.60])
    r = np.array([120.0, 300.0, 450.0, 700.0, 980.0, 250.0])
    u_r = np.array([3.0, 6.0, 4.0, 12.0, 16.0, 5.0])
    u_p = np.array([0.004, 0.002, 0.006, 0.0, 0.003, 0.005])
    # when
    u = pepr.uncertainty(p, r, u_r, bounds, u_performance=u_p)
    # then the spread of independent draws, scored one cohort at a time by the definition
    rng = np.random.default_rng(20240)
    draws_r = rng.normal(r, u_r / 2, (200_000, 6))
    draws_p = rng.normal(p, u_p / 2, (200_000, 6))
    low = np.full((200_000, 1), bounds[0]) if bounds else draws_r.min(axis=1, keepdims=True)
    high = np.full((200_000, 1), bounds[1]) if bounds else draws_r.max(axis=1, keepdims=True)
    spread = 2 * (draws_p / (1 + (draws_r - low) / (high - low))).std(axis=0)
    # A standard deviation of 200,000 draws is known to 0.16 %; first order costs the rest.
    assert u == pytest.approx(spread, rel=0.01)


@pytest.mark.parametrize("bounds", [(100.0, 1000.0), None], ids=["fixed", "cohort"])
def test_errors_in_common_are_propagated_as_a_monte_carlo_does(
    bounds: tuple[float, float] | None,
) -> None:
    # given two boards: rows 0-2 share one's gain (4 %), rows 2-5 the other's offset (5 J)
    p = np.array([0.70, 0.80, 0.85, 0.90, 0.95, 0.60])
    r = np.array([120.0, 300.0, 450.0, 700.0, 980.0, 250.0])
    own = np.array([2.0, 3.0, 1.0, 4.0, 5.0, 3.0])
    shared = np.zeros((2, 6))
    shared[0, :3] = 0.04 * r[:3]
    shared[1, 2:] = 5.0
    # when
    u = pepr.uncertainty(p, r, own, bounds, shared=shared)
    # then the spread of draws in which the common errors are drawn once a cohort
    rng = np.random.default_rng(7)
    draws = rng.normal(r, own / 2, (200_000, 6))
    draws += rng.normal(0, 0.5, (200_000, 2)) @ shared
    low = np.full((200_000, 1), bounds[0]) if bounds else draws.min(axis=1, keepdims=True)
    high = np.full((200_000, 1), bounds[1]) if bounds else draws.max(axis=1, keepdims=True)
    spread = 2 * (p / (1 + (draws - low) / (high - low))).std(axis=0)
    assert u == pytest.approx(spread, rel=0.01, abs=1e-9)


def test_a_gain_that_all_runs_share_cancels_in_the_cohorts_own_bounds() -> None:
    p, r = [0.5, 0.8, 0.9, 0.7], np.array([10.0, 20.0, 40.0, 30.0])
    gain = 0.5 * r  # as of a power model that is 50 % off
    assert pepr.uncertainty(p, r, 0.0, None, shared=[gain]) == pytest.approx(np.zeros(4))
    # in fixed bounds it does not: row 0 has R = 5/45 = u(R), so u = 0.5 (1/9) / (10/9)^2
    assert pepr.uncertainty(p, r, 0.0, (5.0, 50.0), shared=[gain])[0] == pytest.approx(0.045)


def test_uncertainty_of_pinned_rows_is_that_of_their_performance_alone() -> None:
    p, r, u_r = [0.5, 0.8, 0.9], [10.0, 20.0, 40.0], [1.0, 2.0, 4.0]
    cohort = pepr.uncertainty(p, r, u_r, None, u_performance=[0.02, 0.02, 0.02])
    assert cohort[0] == pytest.approx(0.02)
    assert cohort[2] == pytest.approx(0.01)
    clamped = pepr.uncertainty(p, r, u_r, (15.0, 30.0))
    assert clamped[0] == clamped[2] == 0.0 < clamped[1]


def test_an_unknown_uncertainty_stays_unknown_where_it_matters() -> None:
    p, r = [0.5, 0.8, 0.9, 0.7], [10.0, 20.0, 40.0, 30.0]
    inner = pepr.uncertainty(p, r, [1.0, math.nan, 1.0, 1.0], None)
    assert np.isnan(inner).tolist() == [False, True, False, False]
    bound = pepr.uncertainty(p, r, [math.nan, 1.0, 1.0, 1.0], None)
    assert np.isnan(bound).tolist() == [False, True, False, True]


def test_a_million_rows_are_scored_within_a_second() -> None:
    rng = np.random.default_rng(1)
    p, r = rng.random(1_000_000), rng.random(1_000_000)
    start = time.process_time()
    scores = pepr.score(p, r)
    spent_s = time.process_time() - start
    assert scores.pepr.shape == (1_000_000,)
    assert spent_s < 1.0


def test_wrong_energies_stand_out_against_time_and_sound_ones_do_not() -> None:
    # given tables whose 10 epochs took 10 train_time s and energy kWh
    for dataset, wrong in (("derma_pt", 0), ("pneumonia_small", 35)):
        table = paper_table(dataset)
        energy, seconds = floats(table["energy"]), floats(table["train_time"])
        # when
        odd = pepr.out_of_proportion(energy, seconds)
        # then just the rows of a power that no such server draws
        impossible = energy * 3.6e6 / (10 * seconds) > 1500.0
        assert impossible.sum() == wrong
        assert (odd is None) if not wrong else (odd == impossible).all()


def test_unrelated_columns_are_not_compared() -> None:
    rng = np.random.default_rng(3)
    r, other = rng.lognormal(0, 2, 30), rng.lognormal(0, 2, 30)
    assert pepr.out_of_proportion(r, other) is None
    assert pepr.out_of_proportion(r[:5], r[:5] * [1, 1, 1, 1, 99]) is None
    assert pepr.out_of_proportion(r, np.zeros(30)) is None


def run_summary(name: str, **changes: Any) -> dict[str, Any]:
    """What a summary of DESIGN has, as far as a comparison reads it."""
    summary: dict[str, Any] = {
        "run_id": f"{name}-1",
        "name": name,
        "experiment": "study",
        "exit_code": 0,
        "complete": True,
        "energy": {"total_j": 1000.0, "u_j": 50.0, "provenance": "measured"},
        "time_s": 60.0,
        "memory": {"peak_rss_bytes": 2_000_000_000, "gpu_peak_bytes": None},
        "carbon": {"g_co2e": 4.0},
        "metrics": {"accuracy": 0.9, "f1": 0.8},
        "performance": {"metric": "accuracy", "value": 0.9},
    }
    return summary | changes


def energy(total_j: float, *, provenance: str = "measured") -> dict[str, Any]:
    return {"total_j": total_j, "u_j": total_j / 20, "provenance": provenance}


def on_board(board: str, total_j: float, *, gain_j: float, edges_j: float) -> dict[str, Any]:
    """The energy of a run on one board, of k = 1 budget."""
    budget = {"gain_j": gain_j, "offset_j": 0.0, "model_j": 0.0, "edges_j": edges_j}
    component = {"id": f"gpu:{board}", "in_total": True, "budget": budget}
    return energy(total_j) | {
        "u_j": 2 * math.hypot(gain_j, edges_j),
        "components": [component, {"id": "cpu:package-0/core", "in_total": False, "budget": None}],
    }


@pytest.mark.parametrize("resource", ["energy", "carbon"])
def test_runs_on_one_board_share_its_gain_and_others_do_not(resource: str) -> None:
    # given three runs on board A (4 % gain, 3 J of edges) and one on B; 0.01 g/J
    runs = [
        run_summary(name, energy=on_board(board, j, gain_j=0.04 * j, edges_j=3.0), host="n1",
                    carbon={"g_co2e": 0.01 * j})
        for name, board, j in (("a", "A", 500.0), ("b", "A", 900.0), ("c", "A", 2000.0),
                               ("d", "B", 1000.0))
    ]  # fmt: skip
    unit = {"energy": 1.0, "carbon": 0.01}[resource]
    # when
    cohort = pepr.cohort_of_runs(runs, resource=resource)
    # then A's gain moves a, b and c together, B's moves d, and 6 J (k = 2) are each one's own
    used = cohort.u_shared[(cohort.u_shared > 0).any(axis=1)] / unit
    assert used == pytest.approx(np.array([[40.0, 72.0, 160.0, 0.0], [0.0, 0.0, 0.0, 80.0]]))
    assert cohort.u_own / unit == pytest.approx(np.full(4, 6.0))


def test_runs_without_a_budget_count_as_independent() -> None:
    cohort = pepr.cohort_of_runs([run_summary("a"), run_summary("b", energy=energy(2000.0))])
    assert cohort.u_shared.shape == (0, 2)
    assert cohort.u_own == pytest.approx([50.0, 100.0])


def test_summaries_become_a_cohort() -> None:
    cohort = pepr.cohort_of_runs(
        [run_summary("a"), run_summary("b", energy=energy(3000.0), exit_code=None)]
    )
    assert cohort.names == ("a", "b")
    assert (cohort.metric, cohort.resource_name, cohort.unit) == ("accuracy", "energy", "J")
    assert cohort.performance.tolist() == [0.9, 0.9]
    assert cohort.resource.tolist() == [1000.0, 3000.0]
    assert cohort.u_resource.tolist() == [50.0, 150.0]
    assert cohort.left_out == ()


def test_carbon_has_the_relative_uncertainty_of_the_energy() -> None:
    cohort = pepr.cohort_of_runs([run_summary("a")], resource="carbon")
    assert (cohort.resource.tolist(), cohort.u_resource.tolist()) == ([4.0], [0.2])


def test_a_named_metric_replaces_the_runs_own() -> None:
    cohort = pepr.cohort_of_runs([run_summary("a"), run_summary("b")], metric="f1")
    assert cohort.metric == "f1" and cohort.performance.tolist() == [0.8, 0.8]


def test_memory_is_the_gpus_where_every_run_has_it_and_says_which() -> None:
    on_gpu = run_summary("g", memory={"peak_rss_bytes": 10, "gpu_peak_bytes": 7_000_000})
    gpu = pepr.cohort_of_runs([on_gpu], resource="memory")
    both = pepr.cohort_of_runs([on_gpu, run_summary("c")], resource="memory")
    assert (gpu.resource_name, gpu.resource.tolist()) == ("GPU memory", [7e6])
    assert (both.resource_name, both.resource.tolist()) == ("peak RSS", [10.0, 2e9])
    assert not gpu.u_known


def test_failed_and_incomplete_runs_are_left_out_by_name() -> None:
    cohort = pepr.cohort_of_runs(
        [
            run_summary("ok"),
            run_summary("crashed", exit_code=139),
            run_summary("killed", complete=False, exit_code=None),
        ]
    )
    assert cohort.names == ("ok",)
    assert [who for who, _ in cohort.left_out] == ["crashed-1", "killed-1"]
    assert "139" in cohort.left_out[0][1] and "incomplete" in cohort.left_out[1][1]


@pytest.mark.parametrize(
    ("runs", "options", "what", "fix"),
    [
        (
            [run_summary("a"), run_summary("b", energy=energy(9.0, provenance="modelled"))],
            {},
            "measured and modelled energies",
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
            [run_summary("a"), run_summary("b", performance={"metric": "f1", "value": 0.8})],
            {},
            "not the same metric",
            "--metric accuracy",
        ),
        ([run_summary("a", carbon=None)], {"resource": "carbon"}, "no carbon", "--region"),
        (
            [run_summary("a", memory={"peak_rss_bytes": None, "gpu_peak_bytes": None})],
            {"resource": "memory"},
            "no peak memory is known of a-1",
            "--resource energy",
        ),
        ([run_summary("a", exit_code=1)], {}, "no run to compare", "pepr-profile runs"),
        ([], {}, "no run to compare", "pepr-profile runs"),
    ],
)
def test_runs_that_may_not_be_compared_are_refused(
    runs: list[dict[str, Any]], options: dict[str, Any], what: str, fix: str
) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        pepr.cohort_of_runs(runs, **options)
    assert refused.value.why and fix in refused.value.fix


def test_mixed_provenance_is_compared_when_asked_for_and_never_matters_for_time() -> None:
    runs = [run_summary("a"), run_summary("b", energy=energy(9.0, provenance="modelled"))]
    assert len(pepr.cohort_of_runs(runs, mix_provenance=True).names) == 2
    assert pepr.cohort_of_runs(runs, resource="time").resource.tolist() == [60.0, 60.0]


def small_ranking(**changes: Any) -> Ranking:
    """Three runs whose numbers can be checked by hand.

    s = 400 kJ: R is 0, 0.25, 1; PePR is 0.8, 0.9/1.25 = 0.72, 0.96/2 = 0.48. u(R) of the middle is
    sqrt(8^2 + (0.75*4)^2 + (0.25*24)^2)/400 = sqrt(109)/400 = 0.0261, u(PePR) = 0.9*0.0261/1.25^2
    = 0.0150; the others set the bounds. The screen leaves 80 - 67 = 13 cells for the bar, and the
    scores take 83, 75 and 50 of their 104 eighths.
    """
    p, r = np.array([0.96, 0.8, 0.9]), np.array([500e3, 100e3, 200e3])
    values: dict[str, Any] = {
        "label": "PePR-E",
        "of": "run",
        "names": ("vit_b", "mobilenet_v3", "resnet18"),
        "metric": "accuracy",
        "resource_name": "energy",
        "unit": "J",
        "performance": p,
        "resource": r,
        "scores": pepr.score(p, r),
        "bounds_given": False,
        "u_pepr": pepr.uncertainty(p, r, [24e3, 4e3, 8e3], None),
    }
    return Ranking(**(values | changes))


def test_the_ranking_screen_is_exact_at_80_columns() -> None:
    expected = """\
PePR-E   3 runs   metric accuracy   bounds 100.0 kJ … 500.0 kJ (this cohort)

  #  model          accuracy     energy     R     PePR-E
  1  mobilenet_v3      0.800   100.0 kJ   0.000   0.800 ± 0.000  ██████████▍   *
  2  resnet18          0.900   200.0 kJ   0.250   0.720 ± 0.015  █████████▍    *
  3  vit_b             0.960   500.0 kJ   1.000   0.480 ± 0.000  ██████▎       *
  * on the accuracy/energy Pareto front
"""
    assert render_ranking(small_ranking()) == expected


def test_fixed_bounds_and_rows_outside_them_are_said_on_the_screen() -> None:
    # given bounds that the dearest run exceeds, in time, with no uncertainty, and a beaten run;
    # the bar has 80 - 64 = 16 cells, of whose 128 eighths 0.8, 0.56 and 0.48 are 102, 72 and 61
    p, r = np.array([0.96, 0.8, 0.7]), np.array([847.0, 100.0, 200.0])
    ranking = small_ranking(
        label="PePR-T",
        resource_name="time",
        unit="s",
        performance=p,
        resource=r,
        scores=pepr.score(p, r, bounds=(100.0, 500.0)),
        bounds_given=True,
        u_pepr=None,
    )
    expected = """\
PePR-T   3 runs   metric accuracy   bounds 1 min 40 s … 8 min 20 s (given)

  #  model          accuracy          time     R      PePR-T
  1  mobilenet_v3      0.800    1 min 40 s   0.000    0.800   ████████████▊    *
  2  resnet18          0.700    3 min 20 s   0.250    0.560   █████████
  3  vit_b             0.960   14 min 07 s   1.000!   0.480   ███████▋         *
  * on the accuracy/time Pareto front
  ! outside the bounds, R clamped
"""
    assert render_ranking(ranking) == expected


def test_any_names_fit_80_columns_and_move_no_cursor() -> None:
    names = ("a_very_long_name_" * 5, "模型" * 20, "evil\x1b[2J\nname")
    text = render_ranking(small_ranking(names=names, metric="balanced_accuracy_" * 9))
    for line in text.splitlines():
        wide = sum(2 if ord(c) > 0x2E80 else 1 for c in line)
        assert wide <= 80, line
    assert "\x1b" not in text and "…" in text and "evil?[2J?name" in text


def test_colour_adds_escape_codes_and_changes_no_character() -> None:
    plain, colored = render_ranking(small_ranking()), render_ranking(small_ranking(), color=True)
    assert "\x1b[" in colored
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert [line.rstrip() for line in stripped.splitlines()] == plain.splitlines()


def test_an_unknown_uncertainty_is_a_question_mark_and_null() -> None:
    ranking = small_ranking(u_pepr=np.array([0.0, 0.0, math.nan]))
    assert "0.720 ± ?" in render_ranking(ranking)
    rows = ranking_data(ranking)["rows"]
    assert [(row["name"], row["u_pepr"]) for row in rows] == [
        ("mobilenet_v3", 0.0),
        ("resnet18", None),
        ("vit_b", 0.0),
    ]
