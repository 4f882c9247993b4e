"""`python -m benchmarks.peers [AXIS]...`: runs the axes and merges their rows into one report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import ROOT
from benchmarks.peers.environments import TOOLS, install_all
from benchmarks.peers.report import (
    Row,
    facts_of_the_machine,
    markdown,
    read_rows,
    summary,
    summary_lines,
)
from benchmarks.peers.session import AXIS, end

AXES = ("accuracy", "overhead", "behaviour", "scale")
PUBLISHED, README = ROOT / "docs/compare.json", ROOT / "README.md"
MARKS = ("<!-- compare: python -m benchmarks.peers --publish writes this -->", "<!-- /compare -->")


def watched(command: list[str]) -> tuple[int, str]:
    """Runs it and passes its stderr on: its status, and the last line that it said there."""
    said, mark = "", uuid.uuid4().hex
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, AXIS: mark},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said = line.strip() or said
    end(mark, AXIS)  # of an axis that was killed
    return process.returncode, said or f"it ended with {process.returncode}"


def report(axes: Sequence[str], folder: Path, *, quick: bool) -> bool:
    """Each axis in a process of its own; one that ends early is a row that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    facts = {**facts_of_the_machine(install_all(tuple(TOOLS))), "quick": quick}
    facts["took_s"] = {"installation": time.monotonic() - began_s}
    rows: list[Row] = []
    with TemporaryDirectory(prefix="pepr-peers-") as scratch:
        for name in axes:
            began_s = time.monotonic()
            file = Path(scratch) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.peers.{name}", "-o", str(file)]
            command += ["--quick"] if quick else []
            print(f"\n# {name}", file=sys.stderr, flush=True)
            status, said = watched(command)
            facts["took_s"][name] = time.monotonic() - began_s
            if file.exists():
                rows += read_rows(file)
            if status != 0:
                rows.append(Row(name, "the axis", "", "", "not measured", "", note=said[:300]))
            # Rewritten after each axis: what was found is not lost with what comes later.
            kept = {"environment": facts, "rows": [asdict(row) for row in rows]}
            (folder / "report.json").write_text(json.dumps(kept, indent=1) + "\n")
            (folder / "report.md").write_text(markdown(facts, rows))
    print((folder / "report.md").read_text())
    print(f"written: {folder}/report.md and report.json", file=sys.stderr)
    return bool(rows)


def of_report(file: Path) -> dict[str, Any]:
    """What a report's summary is made of."""
    found = json.loads(file.read_text())
    names = ("date", "machine", "cores", "product", "tools", "quick")
    rows = [Row(**facts) for facts in found["rows"]]
    return {
        "environment": {name: found["environment"][name] for name in names},
        "summary": summary(rows),
    }


def rendered(kept: Mapping[str, Any]) -> str:
    return "\n".join(summary_lines(kept["environment"], kept["summary"])) + "\n"


def publish(kept: Mapping[str, Any]) -> None:
    """Writes the summary to docs/compare.json, and between its two comments in the README."""
    PUBLISHED.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    before, _, rest = README.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    README.write_text(f"{before}{MARKS[0]}\n{rendered(kept)}{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"some of {', '.join(AXES)}")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for trying")
    parser.add_argument("-o", type=Path, default=Path("build/compare"), metavar="FOLDER",
                        help="where report.md and report.json go (build/compare)")  # fmt: skip
    parser.add_argument("--summary", type=Path, metavar="REPORT.JSON",
                        help="print the head of a report as Markdown, measure nothing")  # fmt: skip
    parser.add_argument("--publish", type=Path, metavar="REPORT.JSON",
                        help="write it to docs/compare.json and README.md")  # fmt: skip
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.axes if name not in AXES]:
        parser.error(f"no axis called {', '.join(unknown)}; there are: {', '.join(AXES)}")
    if arguments.summary or arguments.publish:
        kept = of_report(arguments.summary or arguments.publish)
        if arguments.publish:
            publish(kept)
        print(rendered(kept), end="")
        return 0
    axes = [name for name in AXES if name in (arguments.axes or AXES)]
    return 0 if report(axes, arguments.o, quick=arguments.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
