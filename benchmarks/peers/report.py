"""Rows, the one form in which every axis tells what it found, and the report that they make."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import UnmeasurableError, environment, main
from benchmarks.peers.environments import OURS, TOOLS, Installed, install_all
from benchmarks.peers.session import AXIS, end

SIMULATED = (
    "The sensors are simulated: a libnvidia-ml.so.1 and powercap files that answer from known "
    "loads. A read costs what the tool makes of it plus a function call or a file. What hardware "
    "adds is left out: an MSR access a RAPL read, 2.5 us to several ms and a lock a call of "
    "NVIDIA's driver, and a board's gain and offset, which the stated uncertainties take in."
)


REACHED, MISSED, UNCLEAR = "reached", "MISSED", "unclear"


def verdict(met: bool) -> str:
    return REACHED if met else MISSED


@dataclass(frozen=True)
class Row:
    """One figure of one tool. `value` None: there is none, and `note` says why.

    `low` and `high` are the quartiles of the repetitions. `verdict` is a word or two, of our own
    rows the goal's: REACHED, MISSED or UNCLEAR (it cannot be told here); "" where nothing is to be
    reached. `goal` says which; rows of one goal are one line of the summary, which shows the one of
    the greatest `strain` (any number, the larger the worse; None: yes or no) and what it is held
    `against`.
    """

    axis: str
    scenario: str
    tool: str
    version: str
    metric: str
    unit: str
    truth: float | str | None = None
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    note: str = ""
    goal: str = ""
    strain: float | None = None
    against: str = ""


@dataclass(frozen=True)
class Axis:
    """What an axis is given: tools that could be installed, and whether to be quick about it."""

    name: str
    tools: Mapping[str, Installed]
    quick: bool

    def row(self, scenario: str, tool: str, metric: str, unit: str, **facts: Any) -> Row:
        version = self.tools[tool].version if tool in self.tools else ""
        return Row(self.name, scenario, tool, version, metric, unit, **facts)


def run_axis(name: str, measure: Callable[[Axis], Iterable[Row]], about: str) -> None:
    """The command of an axis's script: measures, prints its tables, writes its rows as JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for trying")
    parser.add_argument("--tools", metavar="NAME,…", help=f"some of {', '.join(TOOLS)}")
    parser.add_argument("-o", type=Path, metavar="FILE", help="the rows, as JSON")
    arguments = parser.parse_args()

    def body() -> None:
        names = arguments.tools.split(",") if arguments.tools else of_axis(name)
        if unknown := [tool for tool in names if tool not in TOOLS]:
            raise UnmeasurableError(f"no tool called {unknown[0]}; there are: {', '.join(TOOLS)}")
        found = install_all(names)
        tools = {tool: at for tool, at in found.items() if isinstance(at, Installed)}
        axis = Axis(name, tools, arguments.quick)
        rows = [
            axis.row("installation", tool, "installed", "", note=why)
            for tool, why in found.items()
            if isinstance(why, str)
        ]
        mark = os.environ.setdefault(AXIS, uuid.uuid4().hex)  # of all that is started from here on
        try:
            rows.extend(measure(axis))
        finally:  # what was found is not lost with what fails
            if left := end(mark, AXIS):
                print(f"  ended {left} processes that were left", file=sys.stderr)
            if arguments.o is not None:
                arguments.o.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print("\n".join(tables(rows)))

    main(body)


def of_axis(name: str) -> list[str]:
    """The tools that take part in an axis."""
    return [tool.name for tool in TOOLS.values() if tool.axes is None or name in tool.axes]


def read_rows(path: Path) -> list[Row]:
    return [Row(**facts) for facts in json.loads(path.read_text())]


def facts_of_the_machine(tools: Mapping[str, Installed | str]) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    return {
        "machine": environment().splitlines()[0],
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_average": os.getloadavg(),
        "product": environment().splitlines()[1].split(",")[0].strip(),
        "tools": {n: t if isinstance(t, str) else t.version for n, t in tools.items()},
        "packages": {n: t.packages() for n, t in tools.items() if isinstance(t, Installed)},
        "left_out": SIMULATED,
    }


def markdown(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole report: the summary, where we lose, a table a metric, what failed."""
    lines = ["# Side by side", "", *summary_lines(facts, summary(rows)), ""]
    load = ", ".join(f"{value:.1f}" for value in facts["load_average"])
    lines += [f"Load average at the start {load}. {facts['left_out']}", ""]
    if took_s := facts.get("took_s"):
        each = ", ".join(f"{name} {minutes(seconds)}" for name, seconds in took_s.items())
        lines += [f"It took {minutes(sum(took_s.values()))}: {each}.", ""]
    ours = [row for row in rows if row.tool == OURS and row.verdict]
    missed = [row for row in ours if row.verdict == MISSED]
    reached = sum(row.verdict == REACHED for row in ours)
    lines += [f"In {reached} of {len(ours)} places where we have a goal it is reached.", ""]
    if missed:
        lines += ["## Where we fall short", ""]
        for row in missed:
            value = f"{_text(row.value)} {row.unit}".strip()
            against = f" ({row.against})" if row.against else ""
            lines.append(
                f"- {row.axis}, {row.scenario}, {row.metric}: {value}{against}. {row.note}"
            )
        lines.append("")
    for axis in dict.fromkeys(row.axis for row in rows):
        lines += [f"## {axis.capitalize()}", ""]
        lines += tables([row for row in rows if row.axis == axis])
    return "\n".join(lines).rstrip() + "\n"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line a goal: ours where it is worst, what it is held against there, the verdict on all."""
    goals: dict[str, list[Row]] = {}
    for row in rows:
        if row.tool == OURS and row.goal:
            goals.setdefault(row.goal, []).append(row)
    lines = []
    for goal, these in goals.items():
        missed, unclear = (sum(row.verdict == word for row in these) for word in (MISSED, UNCLEAR))
        told = MISSED if missed else UNCLEAR if unclear else REACHED
        if len(these) > 1:
            told += f" in {missed or unclear or len(these)} of {len(these)}"
        worst = max(these, key=lambda row: (row.verdict == MISSED, row.strain or 0.0))
        ours = f"{_text(worst.value)} {worst.unit}".strip() + f" ({worst.scenario})"
        against = worst.against
        if worst.strain is None:
            ours, against = f"{len(these) - missed} of {len(these)}", _as_good(rows, these)
        lines.append(
            {
                "goal": goal,
                "ours": ours,
                "against": against,
                "verdict": told,
            }
        )
    return lines


def _as_good(rows: Sequence[Row], ours: Sequence[Row]) -> str:
    """Of those that are asked the same yes or no, the one that says yes the most."""
    asked = {(row.axis, row.scenario, row.metric) for row in ours}
    yes = Counter(
        row.tool
        for row in rows
        if row.tool != OURS and row.verdict and (row.axis, row.scenario, row.metric) in asked
    )
    return ", ".join(f"{tool} {count}" for tool, count in yes.most_common(1))


def summary_lines(facts: Mapping[str, Any], goals: Sequence[Mapping[str, str]]) -> list[str]:
    """The summary as Markdown: machine, date and versions, then a table."""
    peers = {name: version for name, version in facts["tools"].items() if name != OURS}
    versions = ", ".join(f"{name} {version}" for name, version in peers.items())
    quick = " A quick run, with few repetitions." if facts.get("quick") else ""
    lines = [
        f"{facts['date']}; {facts['machine']}; {facts['cores']} cores; simulated sensors.{quick}",
        f"{facts['product']} beside {versions}.",
        "",
        "| goal | ours | beside it | verdict |",
        "| --- | --- | --- | --- |",
    ]
    for line in goals:
        told = line["verdict"]
        told = f"**{told}**" if told.startswith(MISSED) else told
        cells = (line["goal"], line["ours"], line["against"], told)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def tables(rows: Sequence[Row]) -> list[str]:
    """A table a metric: a line a scenario, a column a tool; reasons and remarks below."""
    lines: list[str] = []
    for metric, unit in dict.fromkeys((row.metric, row.unit) for row in rows):
        these = [row for row in rows if (row.metric, row.unit) == (metric, unit)]
        tools = [name for name in TOOLS if any(row.tool == name for row in these)]
        tools += [t for t in dict.fromkeys(row.tool for row in these) if t not in tools]
        cells = {(row.scenario, row.tool): row for row in these}
        lines += [f"**{metric}**" + (f", {unit}" if unit else ""), ""]
        remarks: dict[str, int] = {}
        body = []
        for scenario in dict.fromkeys(row.scenario for row in these):
            words = [_cell(cells.get((scenario, tool)), remarks) for tool in tools]
            body.append(f"| {scenario} | " + " | ".join(words) + " |")
        lines += ["| scenario | " + " | ".join(tools) + " |", "| --- |" + " --- |" * len(tools)]
        lines += [*body, ""]
        lines += [f"{number}. {remark}" for remark, number in remarks.items()]
        lines += [""] if remarks else []
    return lines


def _cell(row: Row | None, remarks: dict[str, int]) -> str:
    if row is None:
        return ""
    words = "–" if row.value is None else _text(row.value)
    if row.verdict == MISSED:
        words = f"**{words}**"
    if row.note:
        number = remarks.setdefault(row.note, len(remarks) + 1)
        words += f" [{number}]"
    return words.replace("|", "\\|")


def _text(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "unknown"
    size = abs(value)
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 4
    return f"{value:.{places}f}"
