"""Two jobs on one machine at once: each has its share, and together they have no more than it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, codes, component, ended, python
from sim.powercap import BuildTree, Zone
from sim.waves import Constant

# Computes until an instant of CLOCK_MONOTONIC, when the other has begun; says its CPU time.
BURN = """
import os, sys, time
folder, name = sys.argv[1:]
open(f"{folder}/{name}", "w").close()
while len(os.listdir(folder)) < 2: time.sleep(0.001)
end = time.monotonic() + 4
while time.monotonic() < end: pass
"""


@pytest.fixture
def together(tmp_path: Path, powercap_sim: BuildTree) -> list[dict[str, Any]]:
    """Summaries of two wrapped jobs that compute at the same time, on a package at 80 W."""
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(80)), live=True)
    cli, folder = Cli(tmp_path), tmp_path / "begun"
    folder.mkdir()
    # One core for both: then the kernel gives each a half, whatever else is going on.
    core = min(os.sched_getaffinity(0))

    def command(name: str) -> list[str]:
        options = ["--json", str(tmp_path / f"{name}.json"), "--sensor", tree.spec]
        return [*options, "--", "taskset", "-c", str(core), *python(BURN, str(folder), name)]

    started = [cli.start(*command(name)) for name in ("a", "b")]
    for process in started:
        with ended(process):
            process.communicate(timeout=SLOW_S)
    return [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b")]


def test_equal_jobs_have_equal_shares_and_know_of_each_other(
    together: list[dict[str, Any]],
) -> None:
    packages = [component(summary, "cpu:package-0") for summary in together]
    per_cpu_s = []
    for summary, package in zip(together, packages, strict=True):
        owners_j = package["job_j"] + package["others_j"] + package["idle_j"]
        # job + others + idle = device, exactly
        assert owners_j == pytest.approx(package["device_j"], rel=1e-9)
        assert package["idle_w"] == pytest.approx(80, rel=0.05)
        per_cpu_s.append(package["job_j"] / summary["recording"]["exit"]["cpu_s"])
    # a CPU second costs both the same, and so equal jobs have equal shares
    assert per_cpu_s[0] == pytest.approx(per_cpu_s[1], rel=0.03)
    # and together they have no more than there is
    both_j = sum(package["job_j"] for package in packages)
    assert both_j < 80 * max(summary["duration_s"] for summary in together)

    # and each has a neighbour to be warned of
    for summary in together:
        assert "shared-device" in codes(summary, "of the CPU time that was used")
