"""Performance over energy: the instants kept, a run's curve, where to stop, the envelope."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli, python, write_meter

from pepr_profiler.errors import UsageError
from pepr_profiler.report.run_text import render_run
from pepr_profiler.study.progress import (
    ProgressCurve,
    best_stop,
    curve_of,
    envelope,
    mean_curve,
    scores_along,
)
from pepr_profiler.summary.logged import MetricLog

POWER_W = 200.0

TRAIN = """
import time
from pepr_profiler import profile
with profile("net") as run:
    for epoch in range(6):
        with run.phase("train"):
            time.sleep(0.1)
        run.log(accuracy=(0.5, 0.8, 0.9, 0.94, 0.95, 0.95)[epoch], epoch=epoch)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cli, dict[str, Any]]:
    """Six epochs on a device that draws 200 W, and nearly nothing beside."""
    cli = Cli(tmp_path_factory.mktemp("trained"))
    spec = write_meter(cli.folder / "m", POWER_W)
    options = ("--sensor", spec, "--cpu-power", "0.001:0.002", "--period", "10ms")
    _, summary = cli.measure(*options, "--", *python(TRAIN))
    return cli, summary


def test_energy_at_each_epoch_is_the_power_times_the_time(
    trained: tuple[Cli, dict[str, Any]],
) -> None:
    _, summary = trained
    progress = summary["progress"]
    assert progress["metrics"]["epoch"] == [0, 1, 2, 3, 4, 5]
    assert progress["metrics"]["accuracy"] == [0.5, 0.8, 0.9, 0.94, 0.95, 0.95]
    assert progress["left_out"] == 0
    # truth: the device's power is constant; the modelled rest is below 1 %
    expected_j = [POWER_W * t_s for t_s in progress["t_s"]]
    assert progress["energy_j"] == pytest.approx(expected_j, rel=0.02)
    # the epochs' metrics are logged where their phases end
    train_s = next(p["duration_s"] for p in summary["phases"] if p["name"] == "train")
    assert progress["t_s"][-1] - progress["t_s"][0] == pytest.approx(train_s * 5 / 6, rel=0.25)
    # what a whole run is uncertain by, its last instant nearly is
    assert progress["u_j"][-1] < summary["energy"]["u_j"]
    assert all(np.diff(progress["energy_j"]) > 0)


def test_screen_says_where_to_stop_and_what_it_keeps(trained: tuple[Cli, dict[str, Any]]) -> None:
    cli, summary = trained
    run = summary["run_id"]
    screen = cli("report", run, "--metric", "accuracy").stdout.decode()
    text = " ".join(screen.split())
    # truth: P / (1 + E / E_total) in exact steps of time, which the energy is proportional to
    times_s, accuracy = summary["progress"]["t_s"], summary["progress"]["metrics"]["accuracy"]
    pepr = [p / (1 + t / summary["duration_s"]) for p, t in zip(accuracy, times_s, strict=True)]
    best = pepr.index(max(pepr))
    assert f"PePR along the run is highest at epoch {best}" in text
    assert f"keeps {accuracy[best] / 0.95:.1%} of the final accuracy" in text
    assert max(map(len, screen.splitlines())) <= 80
    percent = " ".join(cli("report", run, "--percent").stdout.decode().split())
    assert "accuracy 0.005" in percent
    refused = cli("report", run, "--metric", "f1")
    assert (refused.status, refused.stdout) == (2, b"")
    assert "accuracy" in refused.stderr


def test_metrics_read_from_the_output_make_a_curve(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    program = (
        "import time\n"
        "for epoch, loss in enumerate((2.0, 1.0, 0.5)):\n"
        "    time.sleep(0.1); print(f'epoch {epoch} loss {loss}', flush=True)"
    )
    patterns = ("--metric", "loss=loss ([0-9.]+)", "--metric", "epoch=epoch ([0-9]+)")
    _, summary = cli.measure(*patterns, "--", *python(program))
    curve = curve_of(summary, transform="exp-neg")
    assert curve is not None
    assert list(curve.epoch) == [0, 1, 2]
    assert list(curve.performance) == pytest.approx([math.exp(-2), math.exp(-1), math.exp(-0.5)])
    assert curve_of(summary, metric="accuracy") is None


# --- which instants are kept ----------------------------------------------------------------------


def within(logged: Sequence[tuple[int, Mapping[str, Any]]], **options: Any) -> MetricLog:
    return MetricLog.within(logged, 0, 10**9, **{"cut": False, **options})


def test_what_is_logged_outside_the_window_is_at_its_end_or_not_there() -> None:
    logged = [(-5, {"a": 1}), (5, {"a": 2}), (2 * 10**9, {"a": 3})]
    kept = within(logged)
    assert (list(kept.at_ns), kept.columns()) == ([5, 10**9], {"a": [2, 3]})
    kept = within(logged, cut=True)
    assert (list(kept.at_ns), kept.columns()) == ([5], {"a": [2]})


def test_what_is_no_number_leaves_a_hole_and_epochs_hold_until_the_next() -> None:
    kept = within(
        [
            (1, {"epoch": 0}),
            (2, {"a": math.nan, "b": 1.5}),
            (3, {"a": 0.5}),
            (4, {"epoch": 1, "a": math.inf}),
            (4, {"a": True}),
            (5, {"a": "high"}),
            (6, {"a": 10**400}),
        ]
    )
    assert list(kept.at_ns) == [2, 3, 4]
    assert kept.columns() == {"epoch": [0, 0, 1], "b": [1.5, None, None], "a": [None, 0.5, 1]}


def test_only_counting_is_no_progress() -> None:
    kept = within([(1, {"epoch": 0}), (2, {"step": 1}), (3, {})])
    assert (len(kept.at_ns), kept.columns(), kept.left_out) == (0, {}, 0)


def test_of_too_many_instants_the_extremes_and_the_rarer_metric_stay() -> None:
    draw = random.Random(3)
    logged: list[tuple[int, dict[str, float]]] = [
        (i * 10, {"loss": draw.random()}) for i in range(5000)
    ]
    logged[1234][1]["loss"], logged[4321][1]["loss"] = -1.0, 2.0
    logged += [(i * 5000 + 3, {"accuracy": i / 10}) for i in range(10)]
    kept = within(sorted(logged, key=lambda item: item[0]))
    columns = kept.columns()
    assert len(kept.at_ns) <= 200
    assert kept.left_out == 5010 - len(kept.at_ns)
    assert [a for a in columns["accuracy"] if a is not None] == [i / 10 for i in range(10)]
    losses = [x for x in columns["loss"] if x is not None]
    assert (min(losses), max(losses)) == (-1.0, 2.0)
    assert (losses[0], losses[-1]) == (logged[0][1]["loss"], logged[4999][1]["loss"])
    assert list(kept.at_ns) == sorted(set(kept.at_ns))
    # evenly: no stretch of a tenth of the run is without a point
    assert max(np.diff(kept.at_ns)) < 5000


def test_a_thousand_metrics_stay_within_bounds() -> None:
    kept = within([(t, {f"m{i}": t * i for i in range(1000)}) for t in range(1, 1000)])
    assert 0 < len(kept.at_ns) <= 200


def test_batches_of_an_epoch_count_once_by_their_last() -> None:
    batches = [
        (e * 1000 + b, {"epoch": e, "a": e + b / 1000}) for e in range(150) for b in range(9)
    ]
    kept = within(batches)
    assert len(kept.at_ns) == 150
    assert kept.columns()["a"] == [e + 0.008 for e in range(150)]


# --- curves ---------------------------------------------------------------------------------------


def summary_with(
    metrics: Mapping[str, Sequence[float | None]], energy_j: Sequence[float], **facts: Any
) -> dict[str, Any]:
    progress = {
        "t_s": [e / 10 for e in energy_j],
        "energy_j": list(energy_j),
        "u_j": [e / 100 for e in energy_j],
        "metrics": {name: list(values) for name, values in metrics.items()},
        "left_out": 0,
    }
    return {
        "run_id": "net-1",
        "name": "net",
        "energy": {"total_j": 100.0},
        "performance": None,
        "progress": progress,
        **facts,
    }


def test_curve_has_one_point_an_epoch_the_last_and_restarts_count_again() -> None:
    # given two ranks that log the same, a value that is none, and a restart from epoch 1
    metrics = {
        "epoch": [0, 0, 1, 1, 2, 1, 1, 2],
        "accuracy": [0.1, 0.2, 0.3, None, 0.5, 0.55, 0.6, 0.7],
    }
    curve = curve_of(summary_with(metrics, [10, 20, 30, 40, 50, 60, 70, 80]))
    assert curve is not None
    assert list(curve.epoch) == [0, 1, 2, 1, 2]
    assert list(curve.performance) == [0.2, 0.3, 0.5, 0.6, 0.7]
    assert list(curve.energy_j) == [20, 30, 50, 70, 80]


def test_curve_without_epochs_has_every_point() -> None:
    curve = curve_of(summary_with({"accuracy": [0.1, 0.2, 0.2]}, [10, 20, 30]))
    assert curve is not None
    assert list(curve.performance) == [0.1, 0.2, 0.2]
    assert np.isnan(curve.epoch).all()
    stop = best_stop(curve)
    assert stop is not None and stop.epoch is None


@pytest.mark.parametrize(
    "summary",
    [
        summary_with({"a": [1, 2], "b": [3, 4]}, [1, 2]),  # which of the two?
        summary_with({"a": [None, None]}, [1, 2]),
        summary_with({"a": [1, 2]}, [1, 2], energy={"total_j": None}),
        summary_with({"a": [1, 2]}, [1, 2], progress=None),
        {**summary_with({}, []), "progress": {}},
    ],
)
def test_run_without_a_curve_has_none(summary: dict[str, Any]) -> None:
    assert curve_of(summary) is None


def test_performance_names_the_metric_of_a_curve() -> None:
    summary = summary_with(
        {"a": [1, 2], "b": [3, 4]}, [1, 2], performance={"metric": "b", "value": 4}
    )
    curve = curve_of(summary)
    assert curve is not None
    assert (curve.metric, list(curve.performance)) == ("b", [3, 4])


def curve(
    performance: Sequence[float], energy_j: Sequence[float], total_j: float = 100.0
) -> ProgressCurve:
    n = len(performance)
    return ProgressCurve(
        run_id="net-1", name="net", metric="accuracy", t_s=np.array(energy_j) / 10,
        energy_j=np.array(energy_j, dtype=float), u_j=np.zeros(n), epoch=np.arange(n, dtype=float),
        performance=np.array(performance, dtype=float), total_j=total_j,
    )  # fmt: skip


def test_best_stop_is_where_performance_over_one_plus_r_is_highest() -> None:
    points = curve([0.5, 0.9, 0.93, 0.94], [10, 20, 58, 100])
    # truth by hand: 0.5/1.1, 0.9/1.2, 0.93/1.58, 0.94/2
    assert scores_along(points).pepr == pytest.approx([0.4545454, 0.75, 0.5886075, 0.47])
    stop = best_stop(points)
    assert stop is not None
    assert (stop.point, stop.epoch, stop.energy_j) == (1, 1.0, 20.0)
    assert stop.performance_share == pytest.approx(0.9 / 0.94)
    assert stop.energy_share == pytest.approx(0.2)
    assert stop.best_share == pytest.approx(0.9 / 0.94)
    # in a cohort that reaches to 10 kJ, energy hardly matters here
    # and below its lowest bound nothing is left to save
    for bounds in ((0.0, 10_000.0), (100.0, 200.0)):
        stop = best_stop(points, bounds)
        assert stop is not None and stop.point == 3


def test_a_stop_within_the_noise_is_no_peak_of_luck_and_says_what_else_may_be() -> None:
    # given a curve that rises to 0.9 at epoch 10 and stays, ± 0.01, with one lucky epoch
    draw = np.random.default_rng(4)
    rise = 0.9 * (1 - np.exp(-np.arange(40) / 3.0))
    noisy = rise + draw.normal(0, 0.01, 40)
    points = curve(noisy.clip(0, 1).tolist(), np.linspace(2.5, 100, 40).tolist())
    # when
    stop = best_stop(points, (0.0, 400.0))
    # then its noise is known to a factor of 2, and the best without noise is among what it allows
    assert stop is not None
    assert 0.005 < stop.noise < 0.02
    true = int((rise / (1 + np.linspace(2.5, 100, 40) / 400)).argmax())
    assert stop.first <= true <= stop.last
    # and where the energy hardly counts no point stands out, as all later ones are equal
    assert best_stop(points, (0.0, 100_000.0), noise=0.05) is None


def test_repeats_of_a_curve_are_averaged_and_their_scatter_is_the_noise() -> None:
    a = curve([0.5, 0.8, 0.9], [10, 20, 30])
    b = curve([0.7, 0.8, 0.7, 0.6], [12, 22, 32, 42])
    mean, noise = mean_curve([a, b])
    assert mean.performance == pytest.approx([0.6, 0.8, 0.8])
    assert mean.energy_j == pytest.approx([11, 21, 31])
    # variances 0.02, 0, 0.02 of single runs
    assert noise == pytest.approx(math.sqrt(0.04 / 3 / 2))
    # which is more than 0.66 has before 0.61
    assert best_stop(mean, noise=noise) is None
    assert best_stop(mean, noise=0.01) is not None


def test_loss_as_a_performance_is_refused_where_it_leaves_its_range() -> None:
    with pytest.raises(UsageError, match="point 1 of net-1"):
        best_stop(curve([2.5, 0.5], [10, 20]))
    screen = render_run(screen_of([2.5, 0.5]), width=80)
    assert "--transform" in screen
    assert "--transform" in render_run(screen_of([0.9, 0.5]), width=80)  # it falls
    assert "highest at its end" in render_run(screen_of([0.1, 0.9]), width=80)


def screen_of(values: Sequence[float]) -> dict[str, Any]:
    return {
        "complete": True,
        **summary_with({"accuracy": values}, [50, 100]),
        "energy": {"total_j": 100.0, "u_j": 1.0, "mean_w": 1.0, "provenance": "measured"},
    }


def test_envelope_is_the_best_of_all_points_within_every_budget() -> None:
    draw = random.Random(7)
    curves = []
    for _ in range(20):
        energy_j = sorted(draw.randrange(1, 50) for _ in range(draw.randrange(1, 30)))
        curves.append(curve([draw.randrange(20) / 20 for _ in energy_j], energy_j))
    found = envelope(curves)
    for budget_j in range(60):
        # truth by brute force
        within_budget = [
            p
            for one in curves
            for p, e in zip(one.performance, one.energy_j, strict=True)
            if e <= budget_j
        ]
        step = int(np.searchsorted(found.energy_j, budget_j, side="right")) - 1
        assert (step < 0) == (not within_budget)
        if within_budget:
            assert found.performance[step] == max(within_budget)
            own = curves[found.curve[step]]
            assert own.performance[found.point[step]] == found.performance[step]
            assert own.energy_j[found.point[step]] == found.energy_j[step]
    assert (np.diff(found.energy_j) > 0).all()
    assert (np.diff(found.performance) > 0).all()


def test_envelope_of_nothing_is_empty() -> None:
    assert len(envelope([]).energy_j) == 0


def test_summary_is_json_that_a_reader_of_json_takes(trained: tuple[Cli, dict[str, Any]]) -> None:
    cli, summary = trained
    text = (cli.runs()[0] / "run.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["progress"] == summary["progress"]
