"""Records how many CPUs a command keeps busy: how `training_load.csv` was made.

    python tests/sim/data/record_load.py training_load.csv python examples/train.py --model cnn

The mean over each 20 ms of the process's CPU clock (all its threads, ns), at the middle of it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

STEP_S, LONGEST_S = 0.02, 30.0


def record(argv: list[str]) -> list[tuple[float, float]]:
    """Seconds since the start and CPUs in use, until the command ends."""
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        clock = (~process.pid << 3) | 2  # clock_getcpuclockid(3)
        begin_s = before_s = time.monotonic()
        before_cpu_s = time.clock_gettime(clock)
        rows = []
        while before_s - begin_s < LONGEST_S:
            time.sleep(STEP_S)
            if process.poll() is not None:
                break
            now_s, cpu_s = time.monotonic(), time.clock_gettime(clock)
            middle_s = (now_s + before_s) / 2 - begin_s
            rows.append((middle_s, (cpu_s - before_cpu_s) / (now_s - before_s)))
            before_s, before_cpu_s = now_s, cpu_s
        process.kill()
    return rows


if __name__ == "__main__":
    text = ["# CPUs in use by: " + " ".join(sys.argv[2:]), "t_s,cpus"]
    text += [f"{t_s:.3f},{cpus:.3f}" for t_s, cpus in record(sys.argv[2:])]
    Path(sys.argv[1]).write_text("\n".join(text) + "\n")
