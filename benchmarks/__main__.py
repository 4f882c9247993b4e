"""`python -m benchmarks [NAME]...`: all of them, or those named, one after the other."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT

NAMES = (
    "startup", "sampler", "marks", "footprint", "accuracy", "attach", "follow", "store", "report",
    "daemon", "metrics", "faults", "jobs", "score",
)  # fmt: skip


def main() -> int:
    """Runs them in processes of their own; the status says whether all could measure."""
    asked = sys.argv[1:] or list(NAMES)
    if unknown := [name for name in asked if name not in NAMES]:
        print(f"no benchmark called {', '.join(unknown)}; there are: {', '.join(NAMES)}")
        return 2
    commands = [[sys.executable, "-m", f"benchmarks.{name}"] for name in asked]
    return max(subprocess.run(command, check=False, cwd=ROOT).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
