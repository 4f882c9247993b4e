"""Figures: what they draw is what was measured, and their SVG fits into a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from sim import virtual
from sim.waves import Square

from benchmarks.report import gpu_lane, make_run, rapl_lane, rows_of
from pepr_profiler.energy.integrate import integrate
from pepr_profiler.energy.sources import find_sources
from pepr_profiler.report import figures, run_figures
from pepr_profiler.summary.component import Grid, mean_powers_w
from pepr_profiler.summary.summarise import summarise, with_timeline
from pepr_profiler.summary.timeline import Timeline, TimelineComponent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 min on 8 GPUs and two sockets, epochs of 10 min."""
    directory = tmp_path_factory.mktemp("run") / "twenty-minutes"
    make_run(directory, hours=1 / 3, period_s=0.01)
    return directory


def test_a_timeline_holds_the_energy_of_the_summary(run: Path) -> None:
    summary, timeline = with_timeline(run)

    assert summary == summarise(run)
    assert timeline.energy_j[-1] == pytest.approx(summary["energy"]["total_j"], rel=1e-12)
    assert timeline.u_j[-1] == pytest.approx(summary["energy"]["u_j"], rel=1e-9)
    assert timeline.energy_j[0] == 0
    step_s = np.diff(timeline.edges_s)
    by_id = {c["id"]: c for c in summary["energy"]["components"]}
    for component in timeline.components:
        drawn_j = float(np.sum(component.device_w * step_s))
        assert drawn_j == pytest.approx(by_id[component.id]["device_j"], rel=1e-6)


def test_steps_and_bands_are_the_power_that_was_recorded(run: Path) -> None:
    """Against the lane's own rows: the counter at the edges of a step and of its seconds."""
    _, timeline = with_timeline(run)
    lane = rapl_lane(10_000_000)
    rng = np.random.default_rng(20261122)
    rows = list(rows_of(lane, 10**15, 1200, rng))
    t_s = np.concatenate([t for t, _ in rows]) * 1e-9 - 10**6
    package_uj = np.concatenate([v[0] for _, v in rows])
    package_uj = np.unwrap(package_uj, period=lane.channels[0].modulus)
    component = next(c for c in timeline.components if c.id == "cpu:package-0")
    assert component.low_w is not None and component.high_w is not None
    for step in (10, 100, 230, 300):
        begin, end = timeline.edges_s[step : step + 2]
        drawn_w = np.diff(np.interp([begin, end], t_s, package_uj))[0] * 1e-6 / (end - begin)
        assert component.device_w[step] == pytest.approx(drawn_w, rel=0.01)
        seconds = np.arange(np.ceil(begin), np.floor(end) + 1)
        means_w = np.diff(np.interp(seconds, t_s, package_uj)) * 1e-6
        assert component.low_w[step] <= means_w.min() * 1.01
        assert component.high_w[step] >= means_w.max() * 0.99


def test_a_gap_is_hatched_and_named() -> None:
    nothing = np.array([np.nan, np.nan])
    watts = np.array([10.0, 10.0])
    parts = {"kind": "gpu", "label": "gpu:0", "provenance": "measured", "in_total": True}
    whole = TimelineComponent(id="gpu:0", job_w=watts, device_w=watts, low_w=None, high_w=None,
                              gaps_s=(), **parts)  # fmt: skip
    torn = TimelineComponent(id="gpu:1", job_w=nothing, device_w=nothing, low_w=None, high_w=None,
                             gaps_s=((0.5, 1.5),), **parts)  # fmt: skip
    for component, hatches in ((whole, 0), (torn, 1)):
        timeline = timeline_of(component)
        drawn = figures.chart(
            "a", "t", "d", lambda w, t=timeline: run_figures.power_over_time(t, w)
        )
        assert drawn.wide.count("<pattern") == hatches
        assert ("no reading" in drawn.wide) == bool(hatches)


def test_what_was_not_read_is_a_gap_in_the_figures_and_not_0_w() -> None:
    # given a GPU that was read in the second step only, beside one that was read throughout
    some, all_w = np.array([np.nan, 10.0]), np.array([7.0, 7.0])
    late, whole = (
        TimelineComponent(id=f"gpu:{i}", job_w=w, device_w=w, low_w=None, high_w=None, gaps_s=(),
                          kind="gpu", label=f"gpu:{i}", provenance="measured", in_total=True)
        for i, w in enumerate((some, all_w))
    )  # fmt: skip
    for parts, begins_s in (((late,), [1, 1]), ((whole, late), [0, 1, 1])):
        (axes,) = run_figures.power_over_time(timeline_of(*parts)).axes
        # then neither its area nor the outline of the sum has a point there
        assert [drawn_from_s(patch) for patch in axes.patches] == begins_s
    # and where many are drawn as one, it has what is known of them
    (axes,) = run_figures.power_over_time(timeline_of(*[late] * 7)).axes
    assert [drawn_from_s(patch) for patch in axes.patches] == [1, 1]
    (axes,) = run_figures.power_over_time(timeline_of(whole, *[late] * 6)).axes
    assert [drawn_from_s(patch) for patch in axes.patches] == [0, 1]
    # and a panel of its own has neither a line nor an area
    (axes,) = run_figures.devices_over_time(timeline_of(late)).axes
    assert [drawn_from_s(patch) for patch in axes.patches] == [1, 1]


def drawn_from_s(patch: Any) -> float:
    return float(patch.get_path().vertices[:, 0].min())


def timeline_of(
    *components: TimelineComponent, phases: tuple[tuple[str, float, float], ...] = ()
) -> Timeline:
    return Timeline(
        edges_s=np.array([0.0, 1.0, 2.0]),
        components=components,
        at_s=np.array([0.0, 2.0]),
        energy_j=np.array([0.0, 20.0]),
        u_j=np.array([0.0, 1.0]),
        phases=phases,
    )


HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{1}{0$",
    "]]>",
    '" onload="x',
    "🦜" * 9,
    "\x00\x07\n",
    "n" * 10_000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text_in_a_figure(name: str) -> None:
    watts = np.array([1.0, 2.0])
    component = TimelineComponent(
        id="x", kind="other", label=name, provenance="measured", in_total=True,
        job_w=watts, device_w=watts, low_w=None, high_w=None, gaps_s=(),
    )  # fmt: skip
    timeline = timeline_of(component, phases=((name, 0.0, 1.0),))
    for draw in (
        run_figures.power_over_time,
        run_figures.devices_over_time,
        run_figures.energy_over_time,
    ):
        drawn = figures.chart("a", name, name, lambda w, draw=draw: draw(timeline, w))
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(drawn.wide).iter()}
        assert tags <= {
            "svg",
            "g",
            "defs",
            "path",
            "text",
            "title",
            "desc",
            "use",
            "clipPath",
            "rect",
            "style",
            "pattern",
        }
        assert len(drawn.wide) < 60_000


def test_svg_of_a_page_has_ids_of_its_own_and_only_the_pages_colours(run: Path) -> None:
    _, timeline = with_timeline(run)
    drawn = figures.chart("a", "t", "d", lambda w: run_figures.power_over_time(timeline, w))
    wide, narrow = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (drawn.wide, drawn.narrow))
    assert wide and not wide & narrow
    for svg in (drawn.wide, drawn.narrow):
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert used <= set(ids)
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}
        root = ET.fromstring(svg)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-labelledby"].split()[0] in ids


def test_the_lanes_of_the_benchmark_are_what_it_says() -> None:
    assert len(rapl_lane(1).channels) == 4
    assert sum(c.quantity == "energy" for c in gpu_lane(1).channels) == 8


@pytest.mark.parametrize("counter_s", [0.02, 0.1, 0.5])
def test_no_step_of_a_figure_exceeds_what_the_readings_support(counter_s: float) -> None:
    # given power that never exceeds 520 W, and a counter whose refreshes are known to some ms
    random = np.random.default_rng(8)
    for _ in range(10):
        wave = Square(random.uniform(0.35, 2.0), 80.0, 520.0, random.uniform(0.3, 0.8))
        run = virtual.record_board(virtual.Board(counter_s), wave, random, end_s=20.0, gain_u=0.0)
        grid = Grid.over(virtual.instant_ns(0.0), virtual.instant_ns(20.0), [], np.zeros(0, int))
        (source,) = find_sources([run.lane])
        (curve,) = integrate(run.batches, [source], grid.at_ns)
        # then neither a step, nor a second, nor a bucket is higher
        for edges_ns in (grid.steps_ns, grid.seconds_ns, grid.buckets_ns):
            steps_w = mean_powers_w(curve, grid, edges_ns, curve.energy_j)
            assert steps_w.max() <= 1.025 * 520.0
            # and their energies are those of the run
            energy_j = float(steps_w @ np.diff(edges_ns)) * 1e-9
            assert energy_j == pytest.approx(curve.energy_j[-1] - curve.energy_j[0])
