"""The comparison's own machinery (benchmarks/peers): windows on command, rows, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cli import REPOSITORY
from sim.nvml import H100, PASCAL, BuildNvml, Fault, Gpu, NvmlSim, Scenario, Sensor
from sim.waves import Constant, Square

from benchmarks.peers.__main__ import MARKS, PUBLISHED, README, rendered
from benchmarks.peers.environments import OURS, TOOLS, WRITTEN, Installed
from benchmarks.peers.report import (
    MISSED,
    REACHED,
    UNCLEAR,
    Row,
    markdown,
    read_rows,
    summary,
    tables,
)
from benchmarks.peers.session import AXIS, Session, end, living


class Here(Installed):
    """A tool in the tests' own environment, whatever its interpreter is called."""

    python = sys.executable


def here(name: str) -> Installed:
    return Here(TOOLS[name], Path(sys.prefix), "of the tests")


def environment(sim: NvmlSim, folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PEPR_")}
    paths = os.pathsep.join([str(REPOSITORY), kept.get("PYTHONPATH", "")]).strip(os.pathsep)
    return {**kept, **sim.env, "PEPR_STORE": str(folder / "store"), "PYTHONPATH": paths}


# A counter without the pauses of a real one: what is tested is the driver.
COUNTER = replace(H100, counter_refresh_s=1e-3)


@pytest.mark.parametrize(
    ("name", "sensor"), [(OURS, PASCAL), ("pynvml-loop", PASCAL), (WRITTEN, COUNTER)]
)
def test_a_tool_measures_the_windows_that_it_is_asked_for(
    name: str, sensor: Sensor, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    pytest.importorskip("pynvml")
    # given two boards of 100 and 300 W
    gpus = (Gpu(Constant(100), sensor=sensor), Gpu(Constant(300), sensor=sensor))
    sim = nvml_sim(Scenario(gpus=gpus))
    began_s = time.monotonic()
    session = Session(here(name), environment(sim, tmp_path))
    try:
        assert session.ready(), session.failed
        # when two windows are ordered ahead, the second for an instant in the future
        session.begin("first")
        session.end("first", 300_000_000)
        later_ns = time.monotonic_ns() + 1_000_000_000
        session.begin("second", later_ns)
        session.end("second", 500_000_000)
        windows = session.close()
    finally:
        session.kill()
    # then each is at least as long as asked, in its time, with the energy of all boards
    assert [(w.name, w.error) for w in windows] == [("first", None), ("second", None)]
    for window, length_ns in zip(windows, (300_000_000, 500_000_000), strict=True):
        assert window.end_ns - window.begin_ns >= length_ns
        reported_j = window.of("gpu")
        truth_j = sum(sim.scenario.energy_j(window.begin_ns, window.end_ns, i) for i in (0, 1))
        # The tool's own edges lie around the stamps, on a slow machine far around.
        assert reported_j is not None
        assert 0.9 * truth_j <= reported_j <= 400 * (time.monotonic() - began_s)
        # and nothing is said of what the machine does not have
        assert window.of("dram") is None
    assert windows[1].begin_ns >= later_ns
    # and only we say how sure that is
    stated_j = windows[1].u_of("gpu")
    assert (stated_j is not None) == (name == OURS)


def test_a_tool_that_does_not_open_says_why_and_its_windows_too(
    nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given a driver that fails, a tool that needs it
    pytest.importorskip("pynvml")
    faults = (Fault("nvmlInit", "DRIVER_NOT_LOADED"),)
    sim = nvml_sim(Scenario(gpus=(Gpu(Square(1, 2, 3)),), faults=faults))
    session = Session(here("pynvml-loop"), environment(sim, tmp_path))
    assert not session.ready()
    session.begin("window")
    session.end("window")
    (window,) = session.close()
    assert living(session.mark) == []
    # then it is no energy, and not 0, and the driver's words are there
    assert window.energy_j is None and window.of("gpu") is None
    assert window.error is not None and "Driver Not Loaded" in window.error
    assert session.failed == window.error


def test_a_program_ends_with_its_own_status_in_the_middle_of_a_window(
    nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(100)),)))
    session = Session(here(OURS), environment(sim, tmp_path))
    assert session.ready(), session.failed
    session.begin("window")
    try:
        assert session.exit(7) == 7
    finally:
        session.kill()


def rows() -> list[Row]:
    return [
        Row("accuracy", "step", OURS, "1", "error", "%", 0.0, 2.5, 1.0, 3.0, "MISSED", "by much"),
        Row("accuracy", "step", "zeus", "2", "error", "%", 0.0, 0.031),
        Row("accuracy", "burst", "zeus", "2", "error", "%", note="it | failed"),
        Row("behaviour", "exit status 7", OURS, "1", "wrapped", "", "7", "7", verdict="reached"),
    ]


def test_rows_survive_their_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([asdict(row) for row in rows()]))
    assert read_rows(file) == rows()


def test_a_table_has_a_line_a_scenario_and_a_column_a_tool() -> None:
    assert tables(rows()[:3]) == [
        "**error**, %",
        "",
        "| scenario | pepr-profiler | zeus |",
        "| --- | --- | --- |",
        "| step | **2.50** [1] | 0.0310 |",
        "| burst |  | – [2] |",
        "",
        "1. by much",
        "2. it | failed",
        "",
    ]


FACTS: dict[str, Any] = {
    "date": "2026-11-28 12:00 UTC",
    "machine": "a CPU; Linux 6; CPython 3.11",
    "cores": 2,
    "load_average": (0.5, 1.0, 2.0),
    "product": "pepr-profiler abc",
    "tools": {"zeus": "2"},
    "left_out": "What a read costs.",
    "took_s": {"accuracy": 300.0, "behaviour": 90.0},
}


def test_the_report_says_first_where_we_fall_short() -> None:
    text = markdown(FACTS, rows())
    assert "In 1 of 2 places where we have a goal it is reached." in text
    short, table = text.index("## Where we fall short"), text.index("## Accuracy")
    assert short < table < text.index("## Behaviour")
    assert "- accuracy, step, error: 2.50 %. by much" in text
    for words in ("a CPU; Linux 6", "at the start 0.5, 1.0, 2.0", "zeus 2", "What a read costs."):
        assert words in text
    assert "It took 6.5 min: accuracy 5.0 min, behaviour 1.5 min." in text


def judged(scenario: str, verdict: str, **facts: Any) -> Row:
    return Row("overhead", scenario, OURS, "1", "CPU", "x", verdict=verdict, **facts)


def test_the_summary_has_a_line_a_goal_and_shows_the_worst() -> None:
    # given a goal that is missed in one of three scenarios, one that is unclear in one of two,
    # and one of yes and no in which a peer is better than we
    found = [
        judged("10 Hz", REACHED, value=1.1, goal="lean", strain=1.1, against="loop: 1 us"),
        judged("1 kHz", MISSED, value=1.4, goal="lean", strain=1.4, against="loop: 2 us"),
        judged("1 Hz", REACHED, value=1.2, goal="lean", strain=1.2),
        judged("a", UNCLEAR, value=0.3, goal="quick", strain=0.3),
        judged("b", REACHED, value=-0.1, goal="quick", strain=-0.1),
        judged("exit 7", REACHED, value="7", goal="unseen"),
        judged("Ctrl-C", MISSED, value="hangs", goal="unseen"),
        Row("overhead", "exit 7", "zeus", "2", "CPU", "x", verdict="as alone"),
        Row("overhead", "Ctrl-C", "zeus", "2", "CPU", "x", verdict="as alone"),
        judged("no goal", "", value=3.0),
    ]
    # then each is one line
    assert [tuple(line.values()) for line in summary(found)] == [
        ("lean", "1.40 x (1 kHz)", "loop: 2 us", "MISSED in 1 of 3"),
        ("quick", "0.30 x (a)", "", "unclear in 1 of 2"),
        ("unseen", "1 of 2", "zeus 2", "MISSED in 1 of 2"),
    ]
    # and the head of the report, which is all that is published
    kept = {"environment": FACTS, "summary": summary(found)}
    assert rendered(kept) in markdown(FACTS, found)
    assert "| lean | 1.40 x (1 kHz) | loop: 2 us | **MISSED in 1 of 3** |" in rendered(kept)


def test_the_readme_shows_what_a_report_printed_and_nothing_else() -> None:
    shown = README.read_text().partition(MARKS[0] + "\n")[2].partition(MARKS[1])[0]
    assert shown == rendered(json.loads(PUBLISHED.read_text()))


def test_what_a_tool_left_behind_is_found_by_its_mark_and_ended() -> None:
    # given a process that a process left behind in a session of its own
    mark = uuid.uuid4().hex
    command = ["sh", "-c", "setsid sleep 1000 & exec true"]
    subprocess.run(command, check=True, env={**os.environ, AXIS: mark})
    assert len(living(mark, AXIS)) == 1
    # when all of that mark are ended, then it is gone
    assert end(mark, AXIS) == 1
    deadline = time.monotonic() + 60
    while living(mark, AXIS) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert living(mark, AXIS) == []
