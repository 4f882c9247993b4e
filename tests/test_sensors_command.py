"""`pepr-profile sensors` says what is measured here, and exactly why the rest is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, write_replay
from daemons import needs_root
from sim.nvml import BuildNvml, Gpu, Scenario, default_uuid
from sim.powercap import BuildTree, Tree, Zone, two_socket_server
from sim.sysfs import hwmon_chip, perf_tree, why_no_tsc
from sim.waves import Constant

from pepr_profiler.sensors.machine import read_surroundings


def said(cli: Cli, *specs: str) -> dict[str, Any]:
    arguments = [word for spec in specs for word in ("--sensor", spec)]
    result = cli("sensors", *arguments, "--json")
    assert result.status == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def text_of(cli: Cli, *specs: str) -> str:
    arguments = [word for spec in specs for word in ("--sensor", spec)]
    result = cli("sensors", *arguments)
    assert (result.status, result.stderr) == (0, "")
    return result.stdout.decode()


def test_each_source_is_shown_with_its_power_refresh_and_use(
    cli: Cli, nvml_sim: BuildNvml, powercap_sim: BuildTree
) -> None:
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(400)), Gpu(Constant(100)))))
    tree = powercap_sim(*two_socket_server(), live=True)
    facts = said(cli, sim.spec, tree.spec)
    assert facts["missing"] == []
    assert facts["recorded"] == [sim.spec, tree.spec]
    # then the total has what it should, and each power is the truth
    truth_w = {
        f"gpu:{default_uuid(0)}": 400, f"gpu:{default_uuid(1)}": 100, "cpu:package-0": 100,
        "cpu:package-1": 100, "dram:package-0/dram": 10, "dram:package-1/dram": 10,
    }  # fmt: skip
    counted = {c["component"]: c for c in facts["channels"] if c["in_total"]}
    assert {i: c["power_w"] for i, c in counted.items()} == pytest.approx(truth_w, rel=0.1)
    # and what is left out says why
    excluded = {c["component"]: c["excluded"] for c in facts["channels"] if c["excluded"]}
    assert excluded["other:psys"] == "contains the packages"
    assert excluded["cpu:package-0@intel-rapl-mmio:0"] == "repeats package-0"
    # and refresh periods are found: 100 ms of the GPU's counter, 1 ms of RAPL's
    assert counted[f"gpu:{default_uuid(0)}"]["refresh_s"] == pytest.approx(0.1, rel=0.2)
    assert 0.0005 < counted["cpu:package-0"]["refresh_s"] < 0.01
    assert all(0 < c["lane_read_us"] < 1e5 for c in facts["channels"])
    by_name = {c["channel"]: c for c in facts["channels"]}
    assert by_name[f"{default_uuid(0)}/power_instant"]["value"] == pytest.approx(400)
    assert by_name[f"{default_uuid(1)}/utilisation"]["value"] == pytest.approx(0.5)


def test_a_counter_that_is_reset_or_wraps_shows_its_power(cli: Cli, tmp_path: Path) -> None:
    # given counters at 1 W: one is set back to 0 every 0.2 s, one to a value from which it would be
    # just plausible that it went through all of its range, one wraps every 0.2 s, and one that is
    # read too fast answers 0 at times; and one that falls at each change
    channels = [
        "reset energy J 1e-6 262143328850 counter test component=cpu:reset kind=cpu",
        "near energy J 1 1000 counter test component=cpu:near",
        "wrap energy J 1e-3 200 counter test component=cpu:wrap",
        "g/energy energy J 1 0 counter nvml-energy uuid=GPU-1 model=H100 index=0",
        "fall energy J 1 1000 counter test component=cpu:fall",
    ]
    t_s = [i * 0.005 for i in range(4000)]
    rows = [
        (t, 1e6 * (t % 0.2), 999.79 + t % 0.2, 1e3 * (t % 0.2),
         0.0 if i % 7 == 0 else 5e5 + t, 900.0 - i)
        for i, t in enumerate(t_s)
    ]  # fmt: skip
    spec = write_replay(tmp_path / "counters", channels, rows)
    right_w = dict.fromkeys(["cpu:near", "cpu:reset", "cpu:wrap", "gpu:GPU-1"], 1.0)
    for _ in range(3):  # a busy machine may read so late that a wrap is missed
        shown_w = {c["component"]: c["power_w"] for c in said(cli, spec)["channels"]}
        assert shown_w.pop("cpu:fall") is None
        if shown_w == pytest.approx(right_w, rel=0.15):
            break
    assert shown_w == pytest.approx(right_w, rel=0.15)


def test_the_screen_has_a_line_for_each_and_fits(
    cli: Cli, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(400)), Gpu(Constant(100), mig=True))))
    hwmon_chip(tmp_path, "psu", {"power1_input": 500_000_000, "power1_label": "total"})
    text = text_of(cli, sim.spec, f"hwmon:{tmp_path}/class/hwmon")
    lines = text.splitlines()
    assert sum("in the total" in line for line in lines) == 2
    row = next(line for line in lines if "gpu:0  H100 80GB HBM3" in line).split()
    assert float(row[-7]) == pytest.approx(400, rel=0.05) and row[-6] == "W"
    assert "gpu:1  H100 80GB HBM3, MIG: whole board" in text
    assert f"gpu:{default_uuid(0)}  (nvml-energy)" in text
    assert "also recorded: nvml-" in text and text.count("nvml-power-average") == 1
    assert "500.0 W  not seen  not added: a supply or a" in text
    assert "why  NVIDIA measures the whole board only" in text
    # nothing but a path that cannot be broken is wider than the page
    assert [line for line in lines if len(line) > 80 and "/" not in line] == []


def test_perf_is_shown_before_the_powercap_that_it_repeats(
    cli: Cli, powercap_sim: BuildTree
) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(50)), live=True)
    perf = f"perf:{perf_tree(tree.where.parents[1])}"
    facts = said(cli, perf, tree.spec)
    if facts["missing"]:
        pytest.skip(facts["missing"][0]["why"])
    used = {(c["source"], c["in_total"], c["excluded"]) for c in facts["channels"]}
    assert used == {("perf", True, ""), ("powercap", False, "repeats package-0 of perf")}


def test_sensors_that_are_absent_are_named_with_why_and_fix(cli: Cli) -> None:
    facts = said(cli, "powercap:/none", "nvml:/none", "perf:/none", "hwmon:/none")
    assert facts["channels"] == []
    assert len(facts["missing"]) == 4
    assert all(note["what"] and note["why"] and note["fix"] for note in facts["missing"])


def test_a_driver_that_hangs_is_named_and_holds_nobody_up(cli: Cli, nvml_sim: BuildNvml) -> None:
    from sim.nvml import Fault

    hang = Fault("nvmlInit", "HANG", end_s=30.0)
    sim = nvml_sim(Scenario((Gpu(Constant(1)),), (hang,)))
    (note,) = said(cli, sim.spec)["missing"]
    assert "5 s" in note["why"]


def test_this_machine_is_shown_as_it_is(cli: Cli) -> None:
    # when nothing is asked for by name
    facts = said(cli)
    # then each kind is either read or missing, and what is missing is explained for who asks
    kinds = {c["sensor"].partition(":")[0] for c in facts["channels"]}
    assert len(kinds) + len(facts["missing"]) >= 4
    here = read_surroundings()
    assert facts["place"] == {
        "root": os.geteuid() == 0, "container": here.container, "virtual": here.virtual
    }  # fmt: skip
    for note in facts["missing"]:
        assert note["why"] and note["fix"]
        if note["what"].startswith("no perf") and here.virtual:
            assert "virtual machine" in note["why"]
    if not Path("/sys/class/powercap").exists():
        assert any("powercap" in note["what"] for note in facts["missing"])
    text = text_of(cli)
    assert str(here) in text.splitlines()[0]
    if not any(c["in_total"] for c in facts["channels"]):
        assert "estimated from utilisation" in text


AS_NOBODY = """
import os, sys
# All that the command loads later: what holds the interpreter may be closed to this user.
import click, numpy
from pepr_profiler import _core, units
from pepr_profiler.sensors import detect
from pepr_profiler.daemon_client import client
from pepr_profiler.energy import integrate, modelled
from pepr_profiler.trace import lane
from pepr_profiler.commands import main, sensors
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(main(sys.argv[1:]))
"""


@needs_root
def test_a_user_who_is_not_root_learns_what_would_unlock(cli: Cli, open_folder: Path) -> None:
    tree = Tree(open_folder, (Zone("intel-rapl:0", "package-0"),))
    (tree.path("intel-rapl:0") / "energy_uj").chmod(0o400)
    specs = [tree.spec]
    if not why_no_tsc():
        specs.append(f"perf:{perf_tree(open_folder / 'sys')}")
    arguments = [word for spec in specs for word in ("--sensor", spec)]
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, "sensors", *arguments, "--json"],
        env=cli.environment(),
        capture_output=True,
        check=True,
        cwd="/",
    )
    facts = json.loads(done.stdout)
    assert facts["place"]["root"] is False
    powercap = next(n for n in facts["missing"] if "RAPL" in n["what"])
    assert powercap["why"].startswith("Permission denied")
    assert "sudo pepr-profile daemon" in powercap["fix"]
    assert f"sudo chmod o+r {tree.where}/*/energy_uj" in powercap["fix"]
    paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
    if specs[1:] and paranoid > 0:
        assert facts["channels"] == []
        perf = next(n for n in facts["missing"] if "perf" in n["what"])
        assert "perf_event_paranoid" in perf["why"]
        assert "sysctl kernel.perf_event_paranoid=0" in perf["fix"]
