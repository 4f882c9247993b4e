"""Power models, against the published figures multiplied out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, python

from pepr_profiler.energy.activity import Activity
from pepr_profiler.energy.modelled import (
    CpuModel,
    RamModel,
    cpu_model,
    modelled_curves,
    power_w,
)
from pepr_profiler.energy.uncertainty import UncertaintyBudget, combined_u_j, summed_u_j
from pepr_profiler.errors import UsageError
from pepr_profiler.sensors.machine import CpuIdentity, read_cpu_identity
from pepr_profiler.units import NS_PER_S as S

X86 = """\
processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
stepping\t: {stepping}
flags\t\t: fpu vme de pse
power management:

processor\t: 1
vendor_id\t: SomeoneElse
model\t\t: 99
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 243.75
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""
MILAN = CpuIdentity(vendor="AuthenticAMD", family=25, model=1, stepping=1)


def intel(model: int, stepping: int = 1) -> CpuIdentity:
    return CpuIdentity(vendor="GenuineIntel", family=6, model=model, stepping=stepping)


def amd(family: int, model: int) -> CpuIdentity:
    return CpuIdentity(vendor="AuthenticAMD", family=family, model=model, stepping=1)


@pytest.mark.parametrize(
    ("cpu", "idle_w", "max_w"),
    [  # 8 vCPUs: eight times cloud-carbon-footprint's W per vCPU
        (intel(63), 8.00, 37.92),
        (intel(79), 5.68, 29.52),
        (intel(86), 5.68, 29.52),
        (intel(85, stepping=4), 5.20, 34.08),
        (intel(85, stepping=7), 5.12, 31.76),
        (amd(23, 1), 6.56, 20.40),
        (amd(23, 49), 3.76, 13.52),
        (amd(25, 1), 3.60, 16.16),
    ],
)
def test_a_cpu_with_a_published_figure_uses_it(
    cpu: CpuIdentity, idle_w: float, max_w: float
) -> None:
    model = cpu_model(cpu, vcpus=8)
    assert (model.idle_w, model.max_w) == pytest.approx((idle_w, max_w))
    assert model.u_rel == 0.5
    assert "no published figure" not in model.description
    assert "SPECpower" in model.source


@pytest.mark.parametrize(
    ("cpu", "max_w", "relative", "u_rel"),
    [
        (intel(85, stepping=11), 31.76, "Cascade Lake", 0.75),
        (intel(106), 31.76, "Cascade Lake", 0.75),
        (intel(143), 31.76, "Cascade Lake", 1.0),
        (amd(25, 17), 16.16, "EPYC 3", 0.75),
        (amd(26, 2), 16.16, "EPYC 3", 1.0),
    ],
)
def test_a_newer_cpu_borrows_a_figure_says_so_and_claims_less(
    cpu: CpuIdentity, max_w: float, relative: str, u_rel: float
) -> None:
    model = cpu_model(cpu, vcpus=8)
    assert model.max_w == pytest.approx(max_w)
    assert model.u_rel == u_rel
    assert model.description.startswith("no published figure for ")
    assert f"its relative {relative}" in model.description


@pytest.mark.parametrize("cpu", [CpuIdentity(), intel(999), amd(6, 85)])
def test_an_unknown_cpu_takes_the_mean_of_the_list_at_100_percent(cpu: CpuIdentity) -> None:
    # given a CPU that the list does not have
    # when
    model = cpu_model(cpu, vcpus=7)
    # then seven vCPUs of the mean of seven figures are the sums of the two columns
    assert model.idle_w == pytest.approx(4.74)
    assert model.max_w == pytest.approx(22.92)
    assert model.u_rel == 1.0
    assert str(cpu) in model.description


def test_power_is_linear_in_load_between_idle_and_max() -> None:
    # given two vCPUs of EPYC 3: 0.90 W idle, 4.04 W at most
    model = cpu_model(MILAN, vcpus=2)
    # when
    watts = power_w(model, np.array([[0.0, 0.5], [1.0, 0.25]]))
    # then
    np.testing.assert_allclose(watts, [[0.90, 2.47], [4.04, 1.685]])


def test_a_load_outside_its_range_is_clipped_and_an_unknown_one_stays_unknown() -> None:
    watts = power_w(cpu_model(MILAN, vcpus=2), [-0.1, 1.3, np.nan, np.inf])
    np.testing.assert_allclose(watts, [0.90, 4.04, np.nan, 4.04], equal_nan=True)


def test_given_power_is_the_whole_machines_and_still_an_estimate() -> None:
    # when
    model = cpu_model(CpuIdentity(), vcpus=64, override="12:95W")
    # then neither the vCPUs nor the unknown CPU matter
    assert (model.idle_w, model.max_w) == (12.0, 95.0)
    assert model.u_rel == 0.5
    assert "--cpu-power" in model.source
    assert power_w(model, 0.5) == pytest.approx(53.5)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("95", "IDLE:MAX"),
        ("a:95", "'a' is not a number"),
        ("95:12", "IDLE must be below MAX"),
        ("12:12", "IDLE must be below MAX"),
        ("-1:95", "below 0 W"),
    ],
)
def test_a_bad_override_says_what_why_and_the_fix(override: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        cpu_model(MILAN, vcpus=2, override=override)
    assert f"--cpu-power {override!r}" in caught.value.what
    assert why in caught.value.why
    assert "--cpu-power 12:95" in caught.value.fix


def test_memory_draws_three_watts_for_eight_gigabytes() -> None:
    ram = RamModel()
    assert ram.power_w(8 * 2**30) == 3.0
    assert ram.u_rel >= 0.5
    # and ± u brackets every other published figure
    for w_per_gb in (0.284, 0.392):
        assert abs(w_per_gb - ram.w_per_gb) < ram.u_rel * ram.w_per_gb


def test_the_first_x86_processor_is_read(tmp_path: Path) -> None:
    # given
    text = X86.format(vendor="GenuineIntel", family=6, model=85, name="Intel Xeon", stepping=7)
    (tmp_path / "cpuinfo").write_text(text)
    # when
    cpu = read_cpu_identity(tmp_path)
    # then
    assert cpu == CpuIdentity(
        vendor="GenuineIntel", family=6, model=85, stepping=7, name="Intel Xeon"
    )
    assert str(cpu) == "GenuineIntel family 6 model 85 stepping 7"


def test_a_hidden_stepping_is_unknown_and_not_an_error(tmp_path: Path) -> None:
    # given what some hypervisors show
    text = X86.format(vendor="GenuineIntel", family=6, model=85, name="x", stepping="unknown")
    (tmp_path / "cpuinfo").write_text(text)
    # when
    cpu = read_cpu_identity(tmp_path)
    # then
    assert cpu.stepping is None
    assert cpu_model(cpu, vcpus=1).max_w == 4.26


def test_an_arm_core_is_read_by_implementer_and_part(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(ARM)
    cpu = read_cpu_identity(tmp_path)
    assert cpu == CpuIdentity(vendor="0x41", family=8, model=0xD0C, stepping=1)
    assert cpu_model(cpu, vcpus=1).u_rel == 1.0


@pytest.mark.parametrize("text", [None, "", "\0\1not: a cpuinfo"])
def test_an_unreadable_cpuinfo_is_an_unknown_cpu(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert read_cpu_identity(tmp_path) == CpuIdentity()


def test_this_machine_has_a_model_that_rises_with_load() -> None:
    # given the real file
    cpu = read_cpu_identity()
    # when
    model = cpu_model(cpu, vcpus=2)
    # then
    assert cpu.vendor is not None
    assert 0 < model.idle_w < model.max_w


# --- memory beside a figure that has some in it ---------------------------------------------------

GB = 2**30
AT_NS = np.array([0, S])


def steady(installed_gb: float, *, cpus: int = 8) -> Activity:
    """One second of a machine that does nothing."""
    t_ns, none = np.array([0.0, float(S)]), np.zeros(2)
    return Activity(t_ns, none, none, none, cpus, installed_gb * GB)


def energies_j(did: Activity, cpu: CpuModel | None, ram: RamModel | None) -> dict[str, float]:
    curves = modelled_curves(did, AT_NS, cpu=cpu, ram=ram)
    return {curve.source.id: float(np.diff(curve.energy_j)[0]) for curve in curves}


@pytest.mark.parametrize(
    ("cpu", "gb_per_vcpu"),
    [  # mean memory of the SPECpower servers, over the threads of one
        (intel(63), 1.15),
        (intel(79), 1.06),
        (intel(85, stepping=4), 1.62),
        (intel(85, stepping=7), 1.93),
        (amd(23, 1), 1.50),
        (amd(23, 49), 1.01),
        (amd(25, 1), 1.00),
        (CpuIdentity(), (1.15 + 1.06 + 1.62 + 1.93 + 1.50 + 1.01 + 1.00) / 7),
    ],
)
def test_memory_that_a_servers_figure_has_is_not_added_to_it(
    cpu: CpuIdentity, gb_per_vcpu: float
) -> None:
    # given 8 vCPUs, whose figure has 8 times that much memory
    model = cpu_model(cpu, vcpus=8)
    # then as much memory adds nothing, and 40 GB more 15 W
    least = energies_j(steady(8 * gb_per_vcpu), model, RamModel())
    assert least == pytest.approx({"cpu:modelled": model.idle_w})
    more = energies_j(steady(8 * gb_per_vcpu + 40), model, RamModel())
    assert more["dram:modelled"] == pytest.approx(15.0)
    assert more["cpu:modelled"] == least["cpu:modelled"]


def test_given_power_has_all_memory_in_it() -> None:
    given = cpu_model(MILAN, vcpus=8, override="120:500")
    assert energies_j(steady(2048), given, RamModel()) == pytest.approx({"cpu:modelled": 120.0})


def test_memory_beside_a_cpu_with_a_sensor_is_all_of_it() -> None:
    assert energies_j(steady(64), None, RamModel()) == pytest.approx({"dram:modelled": 24.0})


@pytest.mark.parametrize(
    ("cpu", "idle_w", "max_w"),
    [
        (cpu_model(MILAN, vcpus=8), 3.6 - 3.0, 16.16 - 3.0),  # 8 GB of it
        (cpu_model(MILAN, vcpus=8, override="120:500"), 120 - 24.0, 500 - 24.0),  # all 64 GB
        (cpu_model(MILAN, vcpus=8, override="12:500"), 0.0, 500 - 24.0),  # never below 0 W
    ],
)
def test_memory_with_a_sensor_is_taken_off_a_servers_figure(
    cpu: CpuModel, idle_w: float, max_w: float
) -> None:
    less = cpu.without_memory(RamModel(), 64 * GB)
    assert (less.idle_w, less.max_w) == pytest.approx((idle_w, max_w))


# --- no estimate claims less than ±50 % -----------------------------------------------------------


def test_estimates_of_several_devices_claim_no_less_than_each() -> None:
    # given a CPU and memory of ±50 % each, k = 2
    budgets = [UncertaintyBudget(model_j=25.0), UncertaintyBudget(model_j=25.0)]
    assert 2 * combined_u_j(budgets, np.eye(2)) == pytest.approx(0.5 * 200)
    # and a measured device beside them is independent
    gpu = UncertaintyBudget(gain_j=20.0, edges_j=5.0)
    assert combined_u_j([*budgets, gpu], np.eye(3)) == pytest.approx(np.hypot(50.0, gpu.u_j))
    # and so in summaries
    parts = [{"provenance": "modelled", "u_j": 50.0}] * 2
    assert summed_u_j(parts) == 100.0
    assert summed_u_j([*parts, {"provenance": "measured", "u_j": 75.0}]) == 125.0
    assert summed_u_j([*parts, {"provenance": "measured", "u_j": None}]) is None
    # and four GPUs that were shared alike, and work in step, have the errors of one times four
    of_one = UncertaintyBudget(gain_j=1.0, attribution_j=10.0, edges_j=3.0)
    gpus = [
        {"kind": "gpu", "u_j": 2 * of_one.u_j, "budget": of_one._asdict(), "provenance": "measured"}
    ] * 4
    in_step = combined_u_j([of_one] * 4, np.ones((4, 4)))
    assert summed_u_j(gpus) == pytest.approx(2 * in_step)


PROGRAM = """if True:
    import time, pepr_profiler
    with pepr_profiler.profile("same") as run:
        for epoch in range(3):
            with run.phase("train"):
                time.sleep(0.1)
            run.log(acc=0.5 + epoch / 10, epoch=epoch)
"""


def test_no_output_of_a_run_without_sensors_claims_less(cli: Cli, quiet_sensor: str) -> None:
    # given three repeats of a program on a machine whose CPU and memory are estimated
    for _ in range(3):
        options = ("--sensor", quiet_sensor, "--experiment", "e", "--metric", "acc=never (x)")
        result, summary = cli.measure(*options, "--", *python(PROGRAM))
        assert result.status == 0, result.stderr

        # then all figures of each claim at least ±50 %
        energy = summary["energy"]
        assert energy["provenance"] == "modelled"
        figures = [(energy["total_j"], energy["u_j"])]
        figures += [(c["job_j"], c["u_j"]) for c in energy["components"]]
        figures += [(p["energy_j"], p["u_j"]) for p in summary["phases"]]
        progress = summary["progress"]
        figures += zip(progress["energy_j"], progress["u_j"], strict=True)
        assert len(figures) > 5
        assert [u_j >= 0.4999 * e_j for e_j, u_j in figures] == [True] * len(figures)
    # and so in tables and in the mean of the repeats
    rows = json.loads(cli("runs", "export", "-", "--format", "json").stdout)
    assert all(row["energy_u_j"] >= 0.4999 * row["energy_j"] for row in rows)
    compared = json.loads(
        cli("compare", "--experiment", "e", "--range", "0:1k", "--json", "-").stdout
    )
    [row] = compared["rankings"][0]["rows"]
    assert row["n"] == 3
    assert row["u_resource"] >= 0.4999 * row["resource"]
