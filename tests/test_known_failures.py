"""What other tools get wrong (docs/design.md, top), each on a simulated machine, end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli import SLOW_S, Cli, codes, component, python
from sim.nvml import PASCAL, BuildNvml, Gpu, Scenario, default_uuid
from sim.powercap import RANGE_UJ, BuildTree, Zone, two_socket_server
from sim.waves import Constant, Step

from pepr_profiler.trace.events import read_events
from pepr_profiler.trace.lane import LaneReader

# Lives until CLOCK_MONOTONIC is argv[1] ns, and for 1 s: how late it starts does not matter.
UNTIL = """
import sys, time
end_ns = max(int(sys.argv[1]), time.monotonic_ns() + 1_000_000_000)
while time.monotonic_ns() < end_ns: time.sleep(0.01)
"""


def window_ns(summary: dict[str, Any]) -> tuple[int, int]:
    begin_ns, end_ns = summary["recording"]["window_ns"]
    return begin_ns, end_ns


def test_four_gpus_are_a_sum_and_no_mean(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given boards of 100, 200, 300 and 400 W: their mean is 250 W
    watts = (100, 200, 300, 400)
    sim = nvml_sim(Scenario(gpus=tuple(Gpu(Constant(power_w)) for power_w in watts)))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "1")
    # then each has its own energy, and the total is that of 1000 W
    gpus_j = [component(summary, f"gpu:{default_uuid(index)}")["device_j"] for index in range(4)]
    seconds = summary["duration_s"]
    for gpu_j, power_w in zip(gpus_j, watts, strict=True):
        assert gpu_j == pytest.approx(power_w * seconds, rel=0.03)
    parts = summary["energy"]["components"]
    others_j = math.fsum(c["job_j"] for c in parts if c["in_total"] and c["kind"] != "gpu")
    measured_j = summary["energy"]["total_j"] - others_j
    # The job may have come to the boards at any time before their processes were first listed.
    u_j = math.fsum(component(summary, f"gpu:{default_uuid(index)}")["u_j"] for index in range(4))
    assert u_j < 200
    assert measured_j == pytest.approx(1000 * seconds, abs=u_j)
    assert "part-time" not in codes(summary)  # they have counters


def test_a_counter_that_wraps_makes_no_phase_negative(cli: Cli, powercap_sim: BuildTree) -> None:
    # given 100 W on a counter of the usual range (262 144 J) that wraps 5 s after it is there
    epoch_ns = time.monotonic_ns()
    zone = Zone("intel-rapl:0", "package-0", Constant(100), start_uj=RANGE_UJ - 500_000_000)
    tree = powercap_sim(zone, live=True, epoch_ns=epoch_ns)
    # and a program of phases of 50 ms that goes on until half a second after that
    code = """
import sys, time
from pepr_profiler import profile
with profile("phases") as run:
    number = 0
    while time.monotonic_ns() < int(sys.argv[1]):
        with run.phase(str(number)): time.sleep(0.05)
        number += 1
"""
    end_ns = epoch_ns + 5_500_000_000
    _, summary = cli.measure("--sensor", tree.spec, "--", *python(code, str(end_ns)))
    # then the package has what it took, and no phase less than nothing or more than that
    package = component(summary, "cpu:package-0")
    truth_j = tree.energy_j("intel-rapl:0", *window_ns(summary))
    assert abs(package["device_j"] - truth_j) <= min(package["u_j"] + 0.1, 0.05 * truth_j)
    phases = [phase for phase in summary["phases"] if phase["name"].isdigit()]
    assert all(0 <= phase["energy_j"] <= truth_j for phase in phases)
    # and there were some on either side of the wrap
    (directory,) = cli.runs()
    begins_ns = [p.begin_ns for p in read_events(directory).phases if p.name.isdigit()]
    assert len(begins_ns) == len(phases)
    assert min(begins_ns) < epoch_ns + 5_000_000_000 < max(begins_ns)
    assert "reset" not in codes(summary)


def test_constant_power_is_energy_and_not_nothing(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given a board without a counter at 300 W, whose readings never change
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(300), sensor=PASCAL),)))
    _, summary = cli.measure("--sensor", sim.spec, "--", "sleep", "2")
    gpu = component(summary, f"gpu:{default_uuid(0)}")
    # then it took 300 W for all of the time
    assert gpu["source"] == "nvml-power-instant"
    assert gpu["device_j"] == pytest.approx(300 * summary["duration_s"], rel=1e-6)
    # and the line of power over time nowhere falls to 0
    known_w = [watts for watts in gpu["trace_w"] if watts is not None]
    assert known_w == pytest.approx([300.0] * len(known_w))
    assert len(known_w) >= len(gpu["trace_w"]) - 2 > 40
    # but a load in step with the refreshes would look the same, and that is said
    assert "part-time" in codes(summary)


@pytest.mark.parametrize("counter", [True, False])
def test_the_last_second_is_there(cli: Cli, nvml_sim: BuildNvml, counter: bool) -> None:
    # given a board at 50 W that draws 400 W from 3 s after now on, and a child that ends 1 s later
    epoch_ns = time.monotonic_ns()
    board = {} if counter else {"sensor": PASCAL}
    gpu = Gpu(Step(3.0, 50.0, 400.0), **board)  # type: ignore[arg-type]
    sim = nvml_sim(Scenario(gpus=(gpu,), epoch_ns=epoch_ns))
    until_ns = epoch_ns + 4_000_000_000
    _, summary = cli.measure("--sensor", sim.spec, "--", *python(UNTIL, str(until_ns)))
    # then of the 400 J of its last second no tenth is missing
    begin_ns, end_ns = window_ns(summary)
    assert end_ns >= until_ns
    truth_j = sim.scenario.energy_j(begin_ns, end_ns)
    assert truth_j >= 400
    assert component(summary, f"gpu:{default_uuid(0)}")["device_j"] == pytest.approx(
        truth_j, abs=40
    )


GIL_HOLDER = """
import json, sys, threading, time
from pepr_profiler import profile
ticks = []
stop = threading.Event()
def tick():
    while not stop.wait(0.01): ticks.append(time.monotonic_ns())
with profile("held", sensors=[sys.argv[1]], period_s=0.005) as run:
    thread = threading.Thread(target=tick)
    thread.start()
    size, held_s = 1 << 20, 0.0
    while held_s < 0.7:  # until one call of C holds the GIL for long on this machine
        begin_ns = time.monotonic_ns()
        pow(3, size)
        end_ns = time.monotonic_ns()
        held_s, size = (end_ns - begin_ns) * 1e-9, size * 2
    stop.set()
    thread.join()
inside = [t for t in ticks if begin_ns + 20_000_000 < t < end_ns - 20_000_000]
print(json.dumps([begin_ns, end_ns, len(inside), str(run.directory), run.summary]))
"""


def test_lanes_sample_on_while_the_program_never_releases_the_gil(
    cli: Cli, powercap_sim: BuildTree
) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(100)), live=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", GIL_HOLDER, tree.spec],
        env=cli.environment(),
        capture_output=True,
        timeout=SLOW_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    begin_ns, end_ns, ticks, directory, summary = json.loads(done.stdout)
    # a Python thread got nowhere, the lane kept its rate
    assert ticks <= 2
    # (by its own count: rows that say nothing new are not stored, but around a gap all are)
    # the machine's other work may keep it from some, but nothing waits for the program
    assert summary["sampler"]["rate_hz"]["powercap"] >= 0.25 / 0.005
    rows = [batch.t_ns for batch in LaneReader(Path(directory), "powercap")]
    assert sum(int(((t_ns > begin_ns) & (t_ns < end_ns)).sum()) for t_ns in rows) >= 3
    assert summary["sampler"]["dropped"] == 0
    measured_j = component(summary, "cpu:package-0")["device_j"]
    assert measured_j == pytest.approx(100 * summary["duration_s"], abs=3)


def test_nothing_heavy_is_imported_before_the_child_starts(cli: Cli, nvml_sim: BuildNvml) -> None:
    # given Python that tells each module as it has been imported, and a child that tells its start
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(100)),)))
    says = ["sh", "-c", "echo CHILD STARTS >&2"]
    result = cli("--sensor", sim.spec, "--", *says, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.status == 0
    before, _, after = result.stderr.partition("CHILD STARTS")
    heavy = {"numpy", "rich", "pyarrow", "torch", "pandas"}

    def imported(text: str) -> set[str]:
        lines = [line for line in text.splitlines() if line.startswith("import time:")]
        return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}

    # then what takes long comes after it, if at all
    assert "pepr_profiler" in imported(before)
    assert not imported(before) & heavy
    assert "numpy" in imported(after)


def test_every_energy_has_its_uncertainty(
    cli: Cli, nvml_sim: BuildNvml, powercap_sim: BuildTree
) -> None:
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(200)),)))
    tree = powercap_sim(*two_socket_server(), live=True)
    sensors = ["--sensor", sim.spec, "--sensor", tree.spec]
    code = "import time\nfrom pepr_profiler import profile\n" + (
        "with profile('block') as run, run.phase('work'): time.sleep(0.7)"
    )
    result, summary = cli.measure(*sensors, "--", *python(code))
    # then the total, each component and each phase says how sure it is, and so does the screen
    energy = summary["energy"]
    assert 0 < energy["u_j"] < energy["total_j"]
    for part in energy["components"]:
        assert part["u_j"] > 0
        assert part["u_j"] == pytest.approx(2 * math.hypot(*part["budget"].values()))
    assert {phase["name"] for phase in summary["phases"]} == {"block", "work"}
    assert all(phase["u_j"] > 0 for phase in summary["phases"])
    total = next(line for line in result.stderr.splitlines() if line.strip().startswith("Energy"))
    assert "±" in total
