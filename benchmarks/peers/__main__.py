"""`python -m benchmarks.peers [AXIS]...`: runs the axes and merges their rows into one report."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import ROOT
from benchmarks.peers.environments import TOOLS, install_all
from benchmarks.peers.report import Row, facts_of_the_machine, markdown, read_rows

AXES = ("accuracy", "overhead", "behaviour", "scale")


def watched(command: list[str]) -> tuple[int, str]:
    """Runs it and passes its stderr on: its status, and the last line that it said there."""
    said = ""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said = line.strip() or said
    return process.returncode, said or f"it ended with {process.returncode}"


def main() -> int:
    """Each axis in a process of its own; one that ends early is a row that says so."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"some of {', '.join(AXES)}")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for trying")
    parser.add_argument("-o", type=Path, default=Path("build/compare"), metavar="FOLDER",
                        help="where report.md and report.json go (build/compare)")  # fmt: skip
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.axes if name not in AXES]:
        parser.error(f"no axis called {', '.join(unknown)}; there are: {', '.join(AXES)}")
    axes = [name for name in AXES if name in (arguments.axes or AXES)]
    arguments.o.mkdir(parents=True, exist_ok=True)
    facts = facts_of_the_machine(install_all(tuple(TOOLS)))
    rows: list[Row] = []
    with TemporaryDirectory(prefix="pepr-peers-") as folder:
        for name in axes:
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.peers.{name}", "-o", str(file)]
            command += ["--quick"] if arguments.quick else []
            print(f"\n# {name}", file=sys.stderr, flush=True)
            status, said = watched(command)
            if file.exists():
                rows += read_rows(file)
            if status != 0:
                rows.append(Row(name, "the axis", "", "", "not measured", "", note=said[:300]))
            # Rewritten after each axis: what was found is not lost with what comes later.
            report = {"environment": facts, "rows": [asdict(row) for row in rows]}
            (arguments.o / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            (arguments.o / "report.md").write_text(markdown(facts, rows))
    print((arguments.o / "report.md").read_text())
    print(f"written: {arguments.o}/report.md and report.json", file=sys.stderr)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
