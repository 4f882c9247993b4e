"""This project beside the tools that people use today: same machine, same simulated hardware."""

import sys
from pathlib import Path

# Where `sim` is, the simulated hardware (tests/sim/README.md).
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
