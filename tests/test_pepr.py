"""PePR scores against the paper's numbers, a Monte Carlo and brute force; rankings by hand."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli import calls_of
from studies import paper_columns

from pepr_profiler.errors import UsageError
from pepr_profiler.report.export import ranking_data
from pepr_profiler.report.ranking_text import render_ranking, render_side_by_side
from pepr_profiler.study import draws, outliers, pepr
from pepr_profiler.study.study import Ranking

PAPER_COLUMNS = [
    ("energy", "E_n", "pepr_e"),
    ("co2", "C_n", "pepr_c"),
    ("train_time", "T_n", "pepr_t"),
    ("memR", "M_n", "pepr_m"),
]


def errors_of(
    n: int,
    *,
    u_r: npt.ArrayLike = 0.0,
    u_p: npt.ArrayLike = 0.0,
    shared: npt.ArrayLike = (),
) -> pepr.Errors:
    """The errors of n rows whose standard uncertainties (k = 1) are known beforehand."""
    zeros = np.zeros(n)
    return pepr.Errors(
        var_p=zeros + np.asarray(u_p, dtype=np.float64) ** 2,
        var_r=zeros + np.asarray(u_r, dtype=np.float64) ** 2,
        cov=zeros,
        dof=np.full(n, np.inf),
        shared=np.asarray(shared, dtype=np.float64).reshape(-1, n),
    )


def u_of(
    p: npt.ArrayLike,
    r: npt.ArrayLike,
    u_r: npt.ArrayLike,
    bounds: pepr.MinMax | None,
    *,
    u_performance: npt.ArrayLike = 0.0,
    shared: npt.ArrayLike = (),
) -> pepr.Floats:
    """u of the scores, from independent u that are known beforehand; all have k = 2."""
    errors = errors_of(
        len(np.asarray(r)),
        u_r=np.asarray(u_r) / 2,
        u_p=np.asarray(u_performance) / 2,
        shared=np.asarray(shared) / 2,
    )
    return pepr.standing(p, r, errors, bounds=bounds).u_pepr


def floats(cells: list[str]) -> np.ndarray:
    return np.array([float(cell) for cell in cells])


@pytest.mark.parametrize("dataset", ["derma_pt", "pneumonia_small"])
@pytest.mark.parametrize(("resource", "normalised", "published"), PAPER_COLUMNS)
def test_scores_equal_the_papers(
    dataset: str, resource: str, normalised: str, published: str
) -> None:
    # given the authors' measurements
    table = paper_columns(dataset)
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
        ([0.5], [1], None, "one row alone cannot be ranked", "--range"),
        ([0.5, 0.6], [2, 2], None, "all resources are equal", "--range"),
        ([0.5, 0.6], [1, 2], (2, 2), "is empty", "--range"),
        ([0.5, 0.6], [1, 2], (3, 2), "is empty", "--range"),
        ([0.5, 0.6], [1, 2], (math.nan, 2), "is empty", "--range"),
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
    with pytest.raises(UsageError, match="no transform 'log'") as refused:
        pepr.as_performance([0.25], transform="log")
    assert "one-minus" in refused.value.fix
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
    u = u_of(p, r, u_r, bounds, u_performance=u_p)
    # then the spread of independent draws, scored one cohort at a time by the definition
    rng = np.random.default_rng(20240)
    draws_r = rng.normal(r, u_r / 2, (200_000, 6))
    draws_p = rng.normal(p, u_p / 2, (200_000, 6))
    low = np.full((200_000, 1), bounds[0]) if bounds else draws_r.min(axis=1, keepdims=True)
    high = np.full((200_000, 1), bounds[1]) if bounds else draws_r.max(axis=1, keepdims=True)
    spread = 2 * (draws_p / (1 + (draws_r - low) / (high - low))).std(axis=0)
    # A quantile of 40,000 draws is known to 0.7 %.
    assert u == pytest.approx(spread, rel=0.02)


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
    u = u_of(p, r, own, bounds, shared=shared)
    # then the spread of draws in which the common errors are drawn once a cohort
    rng = np.random.default_rng(7)
    draws = rng.normal(r, own / 2, (200_000, 6))
    draws += rng.normal(0, 0.5, (200_000, 2)) @ shared
    low = np.full((200_000, 1), bounds[0]) if bounds else draws.min(axis=1, keepdims=True)
    high = np.full((200_000, 1), bounds[1]) if bounds else draws.max(axis=1, keepdims=True)
    spread = 2 * (p / (1 + (draws - low) / (high - low))).std(axis=0)
    assert u == pytest.approx(spread, rel=0.02, abs=1e-9)


def test_a_gain_that_all_runs_share_cancels_in_the_cohorts_own_bounds() -> None:
    p, r = [0.5, 0.8, 0.9, 0.7], np.array([10.0, 20.0, 40.0, 30.0])
    gain = 0.5 * r  # as of a power model that is 50 % off
    assert u_of(p, r, 0.0, None, shared=[gain]) == pytest.approx(np.zeros(4))
    # in fixed bounds it does not: row 0 has R = 5/45 = u(R), so u = 0.5 (1/9) / (10/9)^2
    assert u_of(p, r, 0.0, (5.0, 50.0), shared=[gain])[0] == pytest.approx(0.045, rel=0.02)


def test_uncertainty_of_pinned_rows_is_that_of_their_performance_alone() -> None:
    p, r, u_r = [0.5, 0.8, 0.9], [10.0, 20.0, 40.0], [1.0, 2.0, 4.0]
    cohort = u_of(p, r, u_r, None, u_performance=[0.02, 0.02, 0.02])
    assert cohort[0] == pytest.approx(0.02, rel=0.02)
    assert cohort[2] == pytest.approx(0.01, rel=0.02)
    clamped = u_of(p, r, u_r, (15.0, 30.0))
    assert clamped[0] == clamped[2] == 0.0 < clamped[1]


def test_an_unknown_uncertainty_stays_unknown_where_it_matters() -> None:
    p, r = [0.5, 0.8, 0.9, 0.7], [10.0, 20.0, 40.0, 30.0]
    inner = u_of(p, r, [1.0, math.nan, 1.0, 1.0], None)
    assert np.isnan(inner).tolist() == [False, True, False, False]
    bound = u_of(p, r, [math.nan, 1.0, 1.0, 1.0], None)
    assert np.isnan(bound).tolist() == [False, True, False, True]


def test_a_million_rows_are_scored_by_as_many_calls_as_ten() -> None:
    rng = np.random.default_rng(1)

    def score(rows: int) -> None:
        assert pepr.score(rng.random(rows), rng.random(rows)).pepr.shape == (rows,)

    assert calls_of(lambda: score(1_000_000)) == calls_of(lambda: score(10))


def accused(
    values: npt.ArrayLike,
    companion: npt.ArrayLike | None = None,
    *,
    name: str = "x",
    unit: str = "",
) -> pepr.Mask:
    """Which rows of one group are named as outliers."""
    numbers = np.asarray(values, dtype=np.float64)
    others = []
    if companion is not None:
        seconds = np.asarray(companion, dtype=np.float64)
        others = [outliers.Companion(name="time", unit="s" if unit else "", values=seconds)]
    (evidence,) = outliers.find_evidence(
        numbers, [range(len(numbers))], others, name=name, unit=unit, who=str
    )
    marked = np.zeros(len(numbers), np.bool_)
    for finding in evidence.findings:
        marked[list(finding.rows)] = True
    return marked


def test_wrong_energies_stand_out_against_time_and_sound_ones_do_not() -> None:
    # given tables whose 10 epochs took 10 train_time s and energy kWh
    for dataset, wrong in (("derma_pt", 0), ("pneumonia_small", 35)):
        table = paper_columns(dataset)
        energy, seconds = floats(table["energy"]), floats(table["train_time"])
        # when
        odd = accused(energy, seconds, name="energy")
        # then just the rows of a power that no such server draws
        impossible = energy * 3.6e6 / (10 * seconds) > 1500.0
        assert impossible.sum() == wrong
        assert (odd == impossible).all()


def test_unrelated_columns_are_not_compared() -> None:
    rng = np.random.default_rng(3)
    r, other = rng.lognormal(0, 2, 30), rng.lognormal(0, 2, 30)
    assert not accused(r, other).any()
    assert not accused(r[:5], r[:5] * [1, 1, 1, 1, 99]).any()
    assert not accused(r, np.zeros(30)).any()


def test_readings_that_are_wrong_in_several_ways_are_all_found() -> None:
    # given 30 runs of 180 to 220 W, of which one is 400 times too high, one 50 times, one 20 times
    # too low, and one is 0
    rng = np.random.default_rng(5)
    seconds = rng.lognormal(6, 1, 30)
    wrong = np.ones(30)
    wrong[[3, 8, 5, 11]] = 400, 50, 1 / 20, 0
    energy = seconds * rng.uniform(180, 220, 30) * wrong
    # then
    assert (accused(energy, seconds) == (wrong != 1)).all()


def test_a_slip_of_units_is_found_without_a_companion() -> None:
    memory = np.geomspace(1e9, 4e10, 12)
    assert not accused(memory, unit="B").any()
    memory[4] /= 1e6  # written in MB
    assert accused(memory, unit="B").tolist() == [i == 4 for i in range(12)]


def test_student_t_is_that_of_its_closed_forms() -> None:
    t = np.array([0.0, 0.3, 1.0, 2.5, 12.0, 300.0])
    cauchy = 0.5 - np.arctan(t) / math.pi
    two = 0.5 - t / (2 * np.sqrt(2 + t**2))
    normal = np.array([math.erfc(x / math.sqrt(2)) / 2 for x in t])
    assert draws.tail(t, np.full(6, 1.0)) == pytest.approx(cauchy, rel=1e-9, abs=1e-15)
    assert draws.tail(t, np.full(6, 2.0)) == pytest.approx(two, rel=1e-9, abs=1e-15)
    assert draws.tail(t, np.full(6, np.inf)) == pytest.approx(normal, rel=1e-3, abs=1e-15)
    assert draws.tail(-t, np.full(6, 2.0)) == pytest.approx(1 - two)


def test_coverage_factors_are_those_of_the_gum() -> None:
    # JCGM 100:2008, Table G.2, the column of 95.45 %
    table = {1: 13.97, 2: 4.53, 3: 3.31, 4: 2.87, 5: 2.65, 6: 2.52, 7: 2.43, 8: 2.37, 9: 2.32}
    table |= {10: 2.28, 15: 2.18, 20: 2.13, 30: 2.09, 50: 2.05, 100: 2.025, math.inf: 2.0}
    factors = pepr.coverage_factor(list(table))
    assert factors == pytest.approx(np.array(list(table.values())), abs=0.0051)
    assert pepr.coverage_factor([2.9, 3.0 - 1e-12]).tolist() == factors[[1, 2]].tolist()


def test_means_and_spreads_of_repeats_are_the_textbooks() -> None:
    # given a model of three runs, and one of a single run
    p, r = [0.90, 0.92, 0.94, 0.80], [100.0, 110.0, 150.0, 50.0]
    means = pepr.average([0, 0, 0, 1], p, r, u_r=[1.0, 1.0, 1.0, 3.0])
    assert means.n.tolist() == [3, 1]
    assert means.performance == pytest.approx([0.92, 0.80])
    assert means.resource == pytest.approx([120.0, 50.0])
    assert means.sd_p[0] == pytest.approx(0.02) and math.isnan(means.sd_p[1])
    assert means.sd_r[0] == pytest.approx(math.sqrt(700)) and math.isnan(means.sd_r[1])
    # then u(P) is t(95.45 %, 2 degrees) times the standard error, and the single run's energy has
    # what is known of its sensor
    assert means.errors.u_p[0] == pytest.approx(4.527 * 0.02 / math.sqrt(3), rel=1e-3)
    assert means.errors.u_r == pytest.approx([4.527 * math.sqrt(700 / 3), 6.0], rel=1e-3)


def test_the_spread_of_repeats_is_never_below_the_sensors_own() -> None:
    means = pepr.average([0, 0], [0.9, 0.9], [100.0, 100.0], u_r=[4.0, 4.0])
    assert means.errors.var_r == pytest.approx([16.0 / 2])


def test_the_order_of_the_models_moves_no_bit_of_their_errors() -> None:
    rng = np.random.default_rng(8)
    for scatter in (np.full(6, 0.02), np.geomspace(1e-4, 0.1, 6)):  # pooled wholly, and in part
        means = 100 * rng.normal(1, 0.3, 6)
        r, p = means[:, None] * rng.normal(1, scatter[:, None], (6, 4)), rng.random((6, 4))
        model = np.repeat(np.arange(6), 4)
        first = pepr.average(model, p.ravel(), r.ravel()).errors
        for _ in range(20):
            order = rng.permutation(6)
            again = pepr.average(model, p[order].ravel(), r[order].ravel()).errors
            assert again.var_r.tolist() == first.var_r[order].tolist()
            assert again.var_p.tolist() == first.var_p[order].tolist()
            assert again.dof.tolist() == first.dof[order].tolist()


def test_what_repeats_share_does_not_average_out() -> None:
    means = pepr.average(
        [0, 0, 0, 0, 1], [0.9] * 5, [100.0] * 5, u_r=1.0, shared=[[4.0] * 5, [0, 0, 8.0, 8.0, 0]]
    )
    assert means.errors.shared == pytest.approx(np.array([[4.0, 4.0], [4.0, 0.0]]))


class Truth:
    """Cohorts of six models whose true performance and energy are known, as a lab would see them.

    Every seed draws a performance (SD 0.01) and an energy (SD 2 %), which correlate; a board's
    sensor has a gain (SD 3.7 %) that all runs on it share and each reading an error of its own. The
    true order of PePR is that of the models' true means.
    """

    def __init__(
        self,
        seeds: int,
        bounds: pepr.MinMax | None,
        *,
        draws: int,
        own: float,
        close: float | None = None,
    ) -> None:
        rng = np.random.default_rng(2024)
        self.covered, self.in_interval = [], []
        swap, swapped = [], []
        for _ in range(draws):
            p = rng.uniform(0.7, 0.95, 6)
            r = 100 * np.exp(np.linspace(0, 2.5, 6) + rng.uniform(-0.15, 0.15, 6))
            if close is not None:
                r[1], r[4] = r[0] * close, r[5] / close
            model = np.repeat(np.arange(6), seeds)
            board = rng.integers(0, 2, 6)[model]
            luck = rng.normal(size=(2, len(model)))
            seen_p = p[model] + 0.01 * luck[0] * (seeds > 1)
            spent = r[model] * (1 + 0.02 * (0.6 * luck[0] + 0.8 * luck[1]) * (seeds > 1))
            gain = rng.normal(0, 0.037, 2)
            seen_r = spent * (1 + gain[board]) + rng.normal(0, own * r[model])
            shared = np.zeros((2, len(model)))
            shared[board, np.arange(len(model))] = 0.037 * seen_r
            # when
            means = pepr.average(model, seen_p, seen_r, u_r=own * seen_r, shared=shared)
            standing = pepr.standing(
                means.performance, means.resource, means.errors, bounds=bounds, count=1000
            )
            scores = pepr.score(means.performance, means.resource, bounds=bounds)
            # then
            true = pepr.score(p, r, bounds=bounds)
            self.covered.append(np.abs(scores.pepr - true.pepr) <= standing.u_pepr + 1e-12)
            order = pepr.rank(scores)
            swap.append(standing.swap[order[:-1]])
            swapped.append(true.pepr[order[:-1]] < true.pepr[order[1:]])
            rank = np.empty(6, dtype=int)
            rank[pepr.rank(true)] = np.arange(1, 7)
            assert standing.best is not None and standing.worst is not None
            self.in_interval.append((standing.best <= rank) & (rank <= standing.worst))
        self.swap, self.swapped = np.concatenate(swap), np.concatenate(swapped)


COHORTS = pytest.mark.parametrize("draws", [400, pytest.param(2_000, marks=pytest.mark.long)])


@COHORTS
@pytest.mark.parametrize("bounds", [None, (50.0, 2000.0)], ids=["cohort", "fixed"])
@pytest.mark.parametrize(("seeds", "own"), [(1, 0.02), (3, 0.005), (5, 0.02)])
def test_the_stated_interval_covers_the_truth(
    seeds: int, own: float, bounds: pepr.MinMax | None, draws: int
) -> None:
    truth = Truth(seeds, bounds, draws=draws, own=own)
    assert 0.93 <= np.mean(truth.covered) <= 0.99
    # A rank is the outcome of five comparisons, each with one error in 22 at most.
    assert np.mean(truth.in_interval) >= 0.93
    # The probability of a swap is what happens: in each tenth, and better than any constant.
    for low in np.arange(0.0, 0.5, 0.1):
        bin_ = (truth.swap >= low) & (truth.swap < low + 0.1)
        said, happened = truth.swap[bin_].mean(), truth.swapped[bin_].mean()
        assert abs(said - happened) < 0.04 + 3 * math.sqrt(said * (1 - said) / bin_.sum())
    brier = np.mean((truth.swap - truth.swapped) ** 2)
    share = truth.swapped.mean()
    assert brier < 0.85 * share * (1 - share)


@COHORTS
@pytest.mark.parametrize("close", [1.0, 1.01, 1.03])
def test_the_interval_covers_the_truth_where_two_rows_compete_for_a_bound(
    close: float, draws: int
) -> None:
    # given energies known to 2 % and two cheapest, and two dearest, that are nearer than that
    covered = np.mean(Truth(1, None, draws=draws, own=0.02, close=close).covered, axis=0)
    # then each row's interval, also that of the one that seems to set the bound
    assert 0.93 <= covered.mean() <= 0.99
    assert covered.min() >= 0.945 - 3 * math.sqrt(0.05 * 0.95 / draws)


@pytest.mark.parametrize("runs", [[3, 1], [3, 1, 1]])
@pytest.mark.parametrize("apart", [0.0, 0.02])
def test_single_runs_beside_one_repeated_model_have_its_scatter(
    runs: list[int], apart: float
) -> None:
    # given tables of models that scatter by 2 %, of which one is repeated, in any order
    rng = np.random.default_rng(3)
    tables = 1000 if apart == 0 else 400
    model = np.repeat(np.arange(len(runs)), runs)
    told_apart, ratios, scores = [], [], []
    for _ in range(tables):
        steps = rng.permutation(np.linspace(0.0, 1.0, len(runs)))
        true_r, true_score = 1000 * (1 + apart * steps), 0.9 / (1 + steps)
        r = true_r[model] * rng.normal(1, 0.02, len(model))
        means = pepr.average(model, rng.normal(0.9, 0.004, len(model)), r)
        # when
        standing = pepr.standing(means.performance, means.resource, means.errors, count=400)
        # then
        told_apart.append(standing.distinguishable is True)
        _, low, high = standing.ratio
        true_ratio = true_r[means.resource.argmax()] / true_r[means.resource.argmin()]
        ratios.append(low <= true_ratio <= high)
        scores.append((standing.low <= true_score) & (true_score <= standing.high))
    if apart == 0:  # models that are equal are told apart in 4.6 %, or in 6.6 % by chance
        assert np.mean(told_apart) <= 0.0455 + 3 * math.sqrt(0.0455 * 0.9545 / tables)
    else:
        assert np.mean(scores) >= 0.93
    assert np.mean(ratios) >= 0.93


def test_a_row_of_unknown_error_tells_nothing_apart() -> None:
    p = [0.8, 0.8, 0.8]
    one_known, two_equal, two_apart = (
        pepr.standing(p, r, errors_of(3, u_r=[1.0, u, math.nan]))
        for r, u in (
            ([100.0, 150.0, 200.0], math.nan),
            ([100.0, 100.5, 200.0], 1.0),
            ([100.0, 300.0, 200.0], 1.0),
        )
    )
    assert one_known.distinguishable is None is two_equal.distinguishable
    for standing in (one_known, two_equal):
        for value, low, high in (standing.ratio, standing.difference):
            assert math.isfinite(value) and math.isnan(low) and math.isnan(high)
    # but those that are known may differ
    assert two_apart.distinguishable is True
    assert two_apart.ratio[1] == pytest.approx(2.94, abs=0.03)


def test_a_variance_that_all_rows_share_is_off_for_all_of_them_at_once() -> None:
    # given six models that seem to differ by 2 u, and a scatter known by 12 degrees of freedom
    r = np.array([97.0, 98.0, 99.0, 101.0, 102.0, 103.0])
    p, n = np.full(6, 0.9), 6
    apart, together = (
        pepr.standing(
            p,
            r,
            pepr.Errors(
                var_p=np.zeros(n),
                var_r=np.full(n, 2.25),
                cov=np.zeros(n),
                dof=np.full(n, 12.0),
                shared=np.zeros((0, n)),
                pooled=pooled,
            ),
        )
        for pooled in (False, True)
    )
    # then with one scatter the order is less sure: it may be larger, and the models equal
    assert np.nansum(together.swap) > np.nansum(apart.swap) + 0.05
    assert together.pairs is not None and together.pairs[0, -1] < 0.5


def test_rows_that_may_set_a_bound_have_95_percent_of_the_draws() -> None:
    drawn = np.repeat([0, 1, 2, 3], [50, 30, 17, 3])
    assert pepr._likely(drawn, 5).tolist() == [True, True, True, False, False]


def test_ranks_are_ranges_where_rows_cannot_be_distinguished() -> None:
    # given scores 0.90, 0.88, 0.86, 0.70 of u 0.016 each, so that neighbours of the first three
    # (0.02 apart, u of a difference 0.0226) cannot be distinguished, but the first and third can
    p = [0.90, 0.88, 0.86, 0.70]
    errors = errors_of(4, u_p=0.008)
    standing = pepr.standing(p, [1.0] * 4, errors, bounds=(1.0, 2.0))
    # then the middle one may be any of three, and no range is wider than it has to be
    assert standing.best is not None and standing.worst is not None
    assert list(zip(standing.best, standing.worst, strict=True)) == [(1, 2), (1, 3), (2, 3), (4, 4)]
    # and the difference of neighbours is 0.02 / (sqrt(2) 0.008) = 1.768 standard uncertainties
    assert standing.swap[:2] == pytest.approx([math.erfc(1.25) / 2] * 2, abs=0.004)
    assert math.isnan(standing.swap[3])


def test_a_gain_in_common_makes_no_pair_uncertain() -> None:
    # given two energies 2 % apart, of one board (gain known to 10 %), or of two
    p, r = [0.8, 0.8, 0.5], [100.0, 102.0, 400.0]
    one = errors_of(3, shared=[[10.0, 10.2, 40.0]])
    two = errors_of(3, shared=[[10.0, 0.0, 0.0], [0.0, 10.2, 0.0], [0.0, 0.0, 40.0]])
    fixed = (50.0, 500.0)
    assert pepr.standing(p, r, one, bounds=fixed).swap[0] < 1e-6
    assert pepr.standing(p, r, two, bounds=fixed).swap[0] > 0.4


def test_several_resources_stand_side_by_side_in_the_order_of_the_first() -> None:
    by_time = small_ranking(
        label="PePR-T",
        key="time",
        resource_name="time",
        unit="s",
        resource=np.array([100.0, 200.0, 600.0]),
        scores=pepr.score([0.96, 0.8, 0.9], [100.0, 200.0, 600.0]),
    )
    # PePR-T is 0.96, 0.8 / 1.2 = 0.667 and 0.45; on its front is vit_b alone
    expected = """\
PePR   3 runs   metric accuracy

  #  model          accuracy   PePR-E    PePR-T
  1  mobilenet_v3      0.800   0.800 *   0.667
  2  resnet18          0.900   0.720 *   0.450
  3  vit_b             0.960   0.480 *   0.960 *

  PePR         accuracy / (1 + R); the rows are in the order of PePR-E
  R of PePR-E  0 at 100.0 kJ, 1 at 500.0 kJ (normalisation range of these runs)
  R of PePR-T  0 at 1 min 40 s, 1 at 10 min 00 s (normalisation range of these
               runs)
  *            on the Pareto front of accuracy and that resource
"""
    rankings = [small_ranking(standing=None), dataclasses.replace(by_time, standing=None)]
    assert render_side_by_side(rankings) == expected


def small_ranking(**changes: Any) -> Ranking:
    """Three runs whose numbers can be checked by hand.

    s = 400 kJ: R is 0, 0.25, 1; PePR is 0.8, 0.9/1.25 = 0.72, 0.96/2 = 0.48. u(R) of the middle is
    sqrt(8^2 + (0.75*4)^2 + (0.25*24)^2)/400 = sqrt(109)/400 = 0.0261, u(PePR) = 0.9*0.0261/1.25^2
    = 0.0150; the others set the bounds. The screen leaves 80 - 69 = 11 cells for the bar, and the
    scores take 70, 63 and 42 of their 88 eighths.
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
        "standing": pepr.standing(p, r, errors_of(3, u_r=[12e3, 2e3, 4e3])),
    }
    return Ranking(**(values | changes))


def test_the_ranking_screen_is_exact_at_80_columns() -> None:
    expected = """\
PePR-E   3 runs   metric accuracy

  #  model         accuracy    energy    R    PePR-E         P(rev.)
  1  mobilenet_v3     0.800  100.0 kJ  0.000  0.800 ± 0.000   <1%  ████████▊   *
  2  resnet18         0.900  200.0 kJ  0.250  0.720 ± 0.015   <1%  ███████▉    *
  3  vit_b            0.960  500.0 kJ  1.000  0.480 ± 0.000        █████▎      *

  PePR-E   accuracy / (1 + R)
  R        0 at 100.0 kJ, 1 at 500.0 kJ (normalisation range of these runs)
  P(rev.)  probability that the order of this row and the next is reversed
  ±        k = 2; one run per model, so the spread over repeats is not in it
  *        on the accuracy/energy Pareto front
"""
    assert render_ranking(small_ranking()) == expected


def test_fixed_bounds_and_rows_outside_them_are_said_on_the_screen() -> None:
    # given a range that the most expensive run exceeds, in time, no uncertainty, and a beaten run;
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
        standing=None,
    )
    expected = """\
PePR-T   3 runs   metric accuracy

  #  model          accuracy          time     R      PePR-T
  1  mobilenet_v3      0.800    1 min 40 s   0.000    0.800   ████████████▊    *
  2  resnet18          0.700    3 min 20 s   0.250    0.560   █████████
  3  vit_b             0.960   14 min 07 s   1.000!   0.480   ███████▋         *

  PePR-T  accuracy / (1 + R)
  R       0 at 1 min 40 s, 1 at 8 min 20 s (normalisation range, as given)
  !       time outside of the normalisation range: R is set to 0 or 1
  *       on the accuracy/time Pareto front
"""
    assert render_ranking(ranking) == expected


def test_any_names_fit_80_columns_and_move_no_cursor() -> None:
    names = ("a_very_long_name_" * 5, "模型" * 20, "evil\x1b[2J\nname")
    text = render_ranking(small_ranking(names=names, metric="balanced_accuracy_" * 9))
    for line in text.splitlines():
        wide = sum(2 if ord(c) > 0x2E80 else 1 for c in line)
        assert wide <= 80, line
    assert "\x1b" not in text and "…" in text and r"evil\x1b[2J" in text


def test_colour_adds_escape_codes_and_changes_no_character() -> None:
    plain, colored = render_ranking(small_ranking()), render_ranking(small_ranking(), color=True)
    assert "\x1b[" in colored
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert [line.rstrip() for line in stripped.splitlines()] == plain.splitlines()


def test_an_unknown_uncertainty_is_a_question_mark_and_null() -> None:
    # given a middle run whose energy is known without its u: no bound is, so the others are certain
    p, r = np.array([0.96, 0.8, 0.9]), np.array([500e3, 100e3, 200e3])
    errors = errors_of(3, u_r=[12e3, 2e3, math.nan])
    ranking = small_ranking(standing=pepr.standing(p, r, errors))
    assert "0.720 ± ?" in render_ranking(ranking)
    rows = ranking_data(ranking)["rows"]
    assert [(row["name"], row["u_pepr"]) for row in rows] == [
        ("mobilenet_v3", 0.0),
        ("resnet18", None),
        ("vit_b", 0.0),
    ]
