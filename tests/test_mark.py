"""`pepr-profile mark`: phases of a run that other processes than its program begin and end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, ended, until
from sim import native
from sim.powercap import BuildTree, Zone
from sim.waves import Constant, Square

from pepr_profiler.trace.events import EventWriter, read_events
from pepr_profiler.trace.run_json import write_json

MARK = f"{shlex.quote(sys.executable)} -m pepr_profiler mark"


def marked(directory: Path) -> list[tuple[str, bool]]:
    """The phases of a run in the order of their begins, and whether each has ended."""
    return [(p.name, p.end_ns is not None) for p in read_events(directory).phases]


def phases_of(folder: Path, *marks: tuple[int, str, str | None, str]) -> list[Any]:
    """What marks (time, verb, name, series) make, each from a process of its own."""
    for number, (t_ns, verb, name, series) in enumerate(marks):
        line = {"event": "mark", "t_ns": t_ns, "verb": verb, "series": series, "name": name}
        (folder / f"events-h-{number}.jsonl").write_text(json.dumps(line) + "\n")
    return [(p.name, p.begin_ns, p.end_ns) for p in read_events(folder).phases]


@contextmanager
def recording(cli: Cli, quiet_sensor: str) -> Iterator[Path]:
    """A run that goes on until the block ends; its directory."""
    with ended(cli.start("--sensor", quiet_sensor, "--", "cat", stdin=subprocess.PIPE)) as process:
        until(lambda: [d for d in cli.runs() if (d / "run.json").exists()])
        yield cli.runs()[0]
        process.communicate(timeout=SLOW_S)
        assert process.returncode == 0


# --- scripts --------------------------------------------------------------------------------------


def test_phases_of_a_shell_script_have_the_energy_of_their_times(
    cli: Cli, powercap_sim: BuildTree
) -> None:
    # given: power that is never the same for long
    package = Zone("intel-rapl:0", "package-0", Square(0.7, 50, 150))
    tree = powercap_sim(package, Zone("intel-rapl:0:0", "dram", Constant(5)), live=True)

    def truth_j(begin_ns: int, end_ns: int) -> float:
        return sum(tree.energy_j(key, begin_ns, end_ns) for key in tree.zones)

    script = f"{MARK} load; sleep 0.5; {MARK} train; sleep 1; {MARK} end; sleep 0.3"
    # when
    result, summary = cli.measure(
        "--scope", "device", "--sensor", tree.spec, "--", "sh", "-c", script
    )
    # then: what they are said to take is what the devices took between the marks
    assert result.status == 0, result.stderr
    load, train = read_events(cli.runs()[0]).phases
    assert load.end_ns == train.begin_ns
    phases = {phase["name"]: phase for phase in summary["phases"]}
    assert set(phases) == {"load", "train"}
    for phase in (load, train):
        assert phase.end_ns is not None
        energy_j = phases[phase.name]["energy_j"]
        late_j = 155 * tree.late_s
        truth = truth_j(phase.begin_ns, phase.end_ns)
        sure_j = max(late_j, phases[phase.name]["u_j"])
        assert energy_j == pytest.approx(truth, rel=0.02, abs=sure_j)
    # and they add up with the rest of the run
    begin_ns, end_ns = summary["recording"]["window_ns"]
    assert train.end_ns is not None
    rest_j = truth_j(begin_ns, load.begin_ns) + truth_j(train.end_ns, end_ns)
    whole_j = rest_j + sum(phase["energy_j"] for phase in phases.values())
    assert whole_j == pytest.approx(summary["energy"]["total_j"], rel=0.01)
    assert phases["load"]["duration_s"] >= 0.5
    assert phases["train"]["duration_s"] >= 1


def test_phases_nest_and_a_phase_that_nobody_ends_ends_with_the_run(
    cli: Cli, quiet_sensor: str
) -> None:
    script = f"{MARK} begin epoch; {MARK} begin step; {MARK} end step; {MARK} 'tail \"ä'"
    result, summary = cli.measure("--sensor", quiet_sensor, "--", "sh", "-ec", script)
    assert result.status == 0, result.stderr
    assert marked(cli.runs()[0]) == [("epoch", False), ("step", True), ('tail "ä', False)]
    until_s = {p["name"]: p["duration_s"] for p in summary["phases"]}
    events = read_events(cli.runs()[0])
    for phase in (events.phases[0], events.phases[2]):
        to_end_s = (summary["recording"]["window_ns"][1] - phase.begin_ns) * 1e-9
        assert until_s[phase.name] == pytest.approx(to_end_s)


def test_a_run_is_marked_from_outside_by_its_id_or_a_part_of_it(
    cli: Cli, quiet_sensor: str
) -> None:
    with recording(cli, quiet_sensor) as directory:
        for ref in (directory.name, directory.name[:-2], str(directory), "last"):
            assert cli("mark", "begin", ref, "--run", ref).status == 0
            assert cli("mark", "end", ref, "--run", ref).status == 0
        names = [name for name, has_ended in marked(directory) if has_ended]
    assert names == [directory.name, directory.name[:-2], str(directory), "last"]


IMPORTS = """
import os, sys, time
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "click" and not os.path.exists(os.environ["CLICK_AT"]):
            with open(os.environ["CLICK_AT"], "w") as file:
                file.write(str(time.monotonic_ns()))
if "CLICK_AT" in os.environ:
    sys.meta_path.insert(0, Finder)
"""


def test_a_mark_tells_of_the_time_when_it_was_called(
    cli: Cli, quiet_sensor: str, tmp_path: Path
) -> None:
    # given: when the command begins to import what it is made of
    (tmp_path / "sitecustomize.py").write_text(IMPORTS)
    path = f"{tmp_path}{os.pathsep}{cli.environment()['PYTHONPATH']}"
    env = {"PYTHONPATH": path, "CLICK_AT": str(tmp_path / "click-at")}
    with recording(cli, quiet_sensor) as directory:
        before_ns = time.monotonic_ns()
        assert cli("mark", "now", "--run", "last", env=env).status == 0
        (phase,) = read_events(directory).phases
    # then: its time is before that
    assert before_ns < phase.begin_ns < int((tmp_path / "click-at").read_text())


PROGRAM = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
static void mark(const char *verb, const char *name) {
    char path[4096], line[256];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(path, sizeof path, "%s/events-in-c-%d.jsonl", getenv("PEPR_RUN_DIR"), getpid());
    int length = snprintf(line, sizeof line,
        "{\"event\": \"mark\", \"t_ns\": %lld, \"verb\": \"%s\", \"series\": \"c\", "
        "\"name\": \"%s\"}\n", now.tv_sec * 1000000000LL + now.tv_nsec, verb, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (fd < 0 || write(fd, line, length) != length) exit(1);
    close(fd);
}
int main(void) {
    mark("begin", "all");
    mark("next", "load");
    mark("next", "train");
    mark("end", "all");
    return 0;
}
"""


def test_a_program_in_any_language_marks_by_appending_a_line(
    cli: Cli, quiet_sensor: str, tmp_path: Path
) -> None:
    (tmp_path / "program.c").write_text(PROGRAM)
    try:
        compiler = native.compiler()
    except native.UnavailableError as missing:
        pytest.skip(str(missing))
    program = str(tmp_path / "program")
    subprocess.run([compiler, "-x", "c", f"{program}.c", "-o", program], check=True)
    begin_ns = time.monotonic_ns()
    result, summary = cli.measure("--sensor", quiet_sensor, "--", program)
    assert result.status == 0, result.stderr
    events = read_events(cli.runs()[0])
    assert marked(cli.runs()[0]) == [("all", True), ("load", True), ("train", False)]
    all_, load, train = events.phases
    assert begin_ns < all_.begin_ns <= load.begin_ns < train.begin_ns == load.end_ns
    assert {phase["name"] for phase in summary["phases"]} == {"all", "load", "train"}


# --- pairing --------------------------------------------------------------------------------------


def test_scripts_side_by_side_end_their_own_phases(tmp_path: Path) -> None:
    assert phases_of(
        tmp_path,
        (1, "next", "load", "a"),
        (2, "next", "load", "b"),
        (3, "next", "train", "a"),
        (4, "end", "load", "b"),
        (5, "end", None, "a"),
    ) == [("load", 1, 3), ("load", 2, 4), ("train", 3, 5)]


def test_who_begins_and_who_ends_may_be_two(tmp_path: Path) -> None:
    assert phases_of(
        tmp_path,
        (1, "begin", "epoch", "a"),
        (2, "begin", "epoch", "b"),
        (3, "end", "epoch", "c"),
        (4, "end", "epoch", "c"),
        (5, "end", "epoch", "c"),
    ) == [("epoch", 1, 4), ("epoch", 2, 3)]


def test_marks_in_turn_leave_phases_alone_that_are_ended_by_name(tmp_path: Path) -> None:
    assert phases_of(
        tmp_path,
        (1, "begin", "all", "a"),
        (2, "next", "x", "a"),
        (3, "next", "y", "a"),
        (4, "end", "all", "a"),
    ) == [("all", 1, 4), ("x", 2, 3), ("y", 3, None)]


def test_marks_and_the_blocks_of_a_program_do_not_mix(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.begin('"epoch"', 1, None)
    writer.mark("begin", "epoch", series="a", t_ns=5)
    writer.mark("end", "epoch", series="a", t_ns=6)
    writer.close()
    assert sorted(marked(tmp_path)) == [("epoch", False), ("epoch", True)]


@pytest.mark.parametrize(
    "wrong", [{"verb": "stop"}, {"name": None}, {"name": 3}, {"t_ns": "x"}], ids=str
)
def test_a_line_that_is_no_mark_is_counted_as_torn(tmp_path: Path, wrong: dict[str, Any]) -> None:
    mark = {"event": "mark", "t_ns": 1, "verb": "next", "series": "a", "name": "x", **wrong}
    (tmp_path / "events-h-1.jsonl").write_text(json.dumps(mark) + "\n")
    events = read_events(tmp_path)
    assert (events.phases, events.torn_lines) == ((), 1)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "a mark needs one name"),
        (("",), "it is empty"),
        (("two", "words"), "2 were given"),
        (("begin",), "0 were given"),
        (("end", "a", "b"), "2 were given"),
    ],
)
def test_a_mark_without_one_name_is_refused(cli: Cli, words: tuple[str, ...], says: str) -> None:
    result = cli("mark", *words, "--run", "last")
    assert result.status == 2
    assert says in result.stderr


def test_a_mark_without_a_run_says_how_to_name_one(cli: Cli) -> None:
    result = cli("mark", "x")
    assert result.status == 2
    assert "PEPR_RUN_DIR is not set" in result.stderr and "--run RUN" in result.stderr


def test_a_run_that_has_ended_is_refused(cli: Cli, quiet_sensor: str) -> None:
    with recording(cli, quiet_sensor) as directory:
        pass
    for env in ({}, {"PEPR_RUN_DIR": str(directory)}):
        arguments = ["mark", "late"] if env else ["mark", "late", "--run", "last"]
        result = cli(*arguments, env=env)
        assert result.status == 2
        assert f"{directory.name} cannot be marked: it has ended" in result.stderr
    assert marked(directory) == []


def test_a_run_of_another_boot_is_refused(cli: Cli, quiet_sensor: str) -> None:
    with recording(cli, quiet_sensor) as directory:
        facts = json.loads((directory / "run.json").read_text())
        copy = directory.with_name("copy-123456")
        copy.mkdir()
        write_json(copy / "run.json", {**facts, "run_id": copy.name, "boot_id": "another"})
        result = cli("mark", "x", "--run", str(copy))
    assert result.status == 2
    assert "another boot" in result.stderr
    assert list(copy.glob("events-*")) == []


def test_a_run_whose_recorder_was_killed_is_refused(cli: Cli, quiet_sensor: str) -> None:
    with ended(cli.start("--sensor", quiet_sensor, "--", "true")) as process:
        process.communicate(timeout=SLOW_S)
    (directory,) = cli.runs()
    facts = json.loads((directory / "run.json").read_text())
    facts["complete"], facts["recording"]["window_ns"][1] = False, None
    facts["recording"]["profiler_pid"] = process.pid
    write_json(directory / "run.json", facts)
    for path in (directory, *directory.iterdir()):
        os.utime(path, (1, 1))  # long ago
    result = cli("mark", "x", "--run", "last")
    assert result.status == 2
    assert "it is not being recorded any more" in result.stderr


def test_ending_what_is_not_open_is_refused_and_says_what_is(cli: Cli, quiet_sensor: str) -> None:
    with recording(cli, quiet_sensor) as directory:
        assert cli("mark", "begin", "train", "--run", "last").status == 0
        result = cli("mark", "end", "trian", "--run", "last")
        assert result.status == 2
        assert "no phase 'trian'" in result.stderr and "open are: train" in result.stderr
        assert cli("mark", "end", "--run", "last", "--series", "nobody").status == 2
        assert cli("mark", "end", "train", "--run", "last").status == 0
        assert marked(directory) == [("train", True)]
