"""Which of AMD's and Intel's GPUs a job may use, as its environment says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, codes, component
from sim.sysfs import Chip, drm_card, hwmon_chip, kfd_node

from pepr_profiler.energy.visible import visible_to_intel, visible_to_rocm

# Three AMD GPUs; KFD counts the one on the last bus first. The fourth node is an integrated GPU.
AMD = {
    "gpu:03": {"indices": "1", "gpus": "4", "unique_id": "5a1f0000000000aa"},
    "gpu:83": {"indices": "2", "gpus": "4", "unique_id": "5a1f0000000000bb"},
    "gpu:c3": {"indices": "0", "gpus": "4", "unique_id": "77000000000000cc"},
}
ALL = {"03", "83", "c3"}
NO_ORDER = {ident: {"unique_id": of["unique_id"]} for ident, of in AMD.items()}


def names(visible: frozenset[str] | None) -> set[str] | None:
    return None if visible is None else {ident.removeprefix("gpu:") for ident in visible}


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, ALL),
        ({"ROCR_VISIBLE_DEVICES": ""}, set()),  # set, and empty: none (amd_filter_device.cpp)
        ({"ROCR_VISIBLE_DEVICES": "-1"}, set()),
        ({"ROCR_VISIBLE_DEVICES": "0"}, {"c3"}),
        ({"ROCR_VISIBLE_DEVICES": " 2 , 1"}, {"83", "03"}),
        ({"ROCR_VISIBLE_DEVICES": "3"}, set()),  # the integrated one has no sensor of its own
        ({"ROCR_VISIBLE_DEVICES": "0,9,1"}, {"c3"}),  # a word of no device ends the list
        ({"ROCR_VISIBLE_DEVICES": "0,0,1"}, {"c3"}),  # and so does a repeated one
        ({"ROCR_VISIBLE_DEVICES": "GPU-77"}, {"c3"}),
        ({"ROCR_VISIBLE_DEVICES": "gpu-5A1F0000000000AA,0"}, {"03", "c3"}),
        ({"ROCR_VISIBLE_DEVICES": "GPU-5a1f"}, set()),  # of two
        ({"ROCR_VISIBLE_DEVICES": "GPU-"}, set()),
        ({"HIP_VISIBLE_DEVICES": ""}, ALL),  # HIP takes an empty one for none
        ({"HIP_VISIBLE_DEVICES": "-1"}, set()),
        ({"HIP_VISIBLE_DEVICES": "0,1"}, {"c3", "03"}),
        ({"CUDA_VISIBLE_DEVICES": "1"}, {"03"}),
        ({"HIP_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "1"}, {"83"}),
        ({"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "1"}, {"03"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, set()),  # NVIDIA's
        ({"GPU_DEVICE_ORDINAL": "2"}, {"83"}),
        ({"HIP_VISIBLE_DEVICES": "0", "GPU_DEVICE_ORDINAL": "2"}, {"c3", "83"}),
        # HIP counts what ROCR leaves, in the order in which it was named
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1"}, {"03"}),
        ({"ROCR_VISIBLE_DEVICES": "GPU-77,1", "HIP_VISIBLE_DEVICES": "0"}, {"c3"}),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "2"}, set()),
    ],
)
def test_rocm_variables_are_read_as_rocm_reads_them(
    environment: dict[str, str], shown: set[str]
) -> None:
    assert names(visible_to_rocm([environment], AMD)) == shown


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"ROCR_VISIBLE_DEVICES": "0"}, None),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, None),
        ({"ROCR_VISIBLE_DEVICES": "GPU-77,GPU-5a1f0000000000bb"}, {"c3", "83"}),
        ({"ROCR_VISIBLE_DEVICES": "GPU-77", "HIP_VISIBLE_DEVICES": "0"}, {"c3"}),
        ({"ROCR_VISIBLE_DEVICES": ""}, set()),
        ({}, ALL),
    ],
)
def test_a_number_says_nothing_where_rocms_order_is_unknown(
    environment: dict[str, str], shown: set[str] | None
) -> None:
    assert names(visible_to_rocm([environment], NO_ORDER)) == shown


def test_a_divided_gpu_has_several_numbers() -> None:
    divided = {"gpu:a": {"indices": "0,1", "gpus": "4"}, "gpu:b": {"indices": "2,3", "gpus": "4"}}
    assert names(visible_to_rocm([{"ROCR_VISIBLE_DEVICES": "1"}], divided)) == {"a"}
    assert names(visible_to_rocm([{"ROCR_VISIBLE_DEVICES": "0,1,2"}], divided)) == {"a", "b"}


def test_several_roots_may_use_what_any_of_them_may() -> None:
    two = [{"ROCR_VISIBLE_DEVICES": "0"}, {"ROCR_VISIBLE_DEVICES": "2"}]
    assert names(visible_to_rocm(two, AMD)) == {"c3", "83"}
    assert names(visible_to_rocm([*two, {}], AMD)) == ALL


def cards(*idents: str, of: int | None = None, tiles: int = 1) -> dict[str, dict[str, str]]:
    facts = {"gpus": str(of or len(idents))} | ({"tiles": str(tiles)} if tiles > 1 else {})
    return {f"gpu:{ident}": {"indices": str(n), **facts} for n, ident in enumerate(idents)}


SORTED = {"ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1"}


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, set("abc")),
        ({"ZE_AFFINITY_MASK": ""}, set("abc")),
        ({"ZE_AFFINITY_MASK": "0"}, {"a"}),
        ({"ZE_AFFINITY_MASK": "2,0"}, set("ac")),
        ({"ZE_AFFINITY_MASK": "1.0"}, {"b"}),  # a tile is of its card
        ({"ZE_AFFINITY_MASK": "9"}, set()),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:0,1"}, set("ab")),
        ({"ONEAPI_DEVICE_SELECTOR": "LEVEL_ZERO:GPU"}, set("abc")),
        ({"ONEAPI_DEVICE_SELECTOR": "*:gpu"}, set("abc")),
        ({"ONEAPI_DEVICE_SELECTOR": "*:cpu"}, set()),
        ({"ONEAPI_DEVICE_SELECTOR": "cuda:*"}, set()),
        ({"ONEAPI_DEVICE_SELECTOR": "opencl:cpu;level_zero:2"}, {"c"}),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:0;opencl:*"}, set("abc")),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:*;!level_zero:1"}, set("ac")),
        ({"ONEAPI_DEVICE_SELECTOR": "!level_zero:1"}, set("abc")),  # OpenCL has it still
        ({"ONEAPI_DEVICE_SELECTOR": "!level_zero:1;!opencl:*"}, set("ac")),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:1.0"}, {"b"}),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:1.*"}, {"b"}),
        ({"ONEAPI_DEVICE_SELECTOR": "opencl:0"}, None),  # its numbers include processors
        ({"ONEAPI_DEVICE_SELECTOR": "gpu"}, None),  # which is none
        # the selector counts what the mask leaves
        ({"ZE_AFFINITY_MASK": "1,2", "ONEAPI_DEVICE_SELECTOR": "level_zero:0"}, {"b"}),
    ],
)
def test_oneapi_variables_are_read_as_its_runtimes_read_them(
    environment: dict[str, str], shown: set[str] | None
) -> None:
    assert names(visible_to_intel([{**SORTED, **environment}], cards("a", "b", "c"))) == shown


@pytest.mark.parametrize(
    ("gpus", "environment", "shown"),
    [
        (cards("a", "b"), {"ZE_AFFINITY_MASK": "0"}, None),
        (cards("a", "b"), {"ZE_AFFINITY_MASK": "0,1"}, {"a", "b"}),
        (cards("a", "b"), {"ONEAPI_DEVICE_SELECTOR": "cuda:0"}, set()),
        (cards("a"), {"ZE_AFFINITY_MASK": "0"}, {"a"}),
        (cards("a", of=2), {"ZE_AFFINITY_MASK": "0"}, None),  # the other one is integrated
        (cards("a", of=2), {**SORTED, "ZE_AFFINITY_MASK": "1"}, set()),
        ({"gpu:a": {}}, {"ZE_AFFINITY_MASK": "0"}, None),
    ],
)
def test_a_number_needs_the_order_of_the_bus(
    gpus: Mapping[str, Mapping[str, str]], environment: dict[str, str], shown: set[str] | None
) -> None:
    assert names(visible_to_intel([environment], gpus)) == shown


@pytest.mark.parametrize(
    ("hierarchy", "mask", "shown"),
    [
        ("FLAT", "1", {"a"}),
        ("COMBINED", "2,3", {"b"}),
        ("COMPOSITE", "1", {"b"}),
        ("", "1", None),  # FLAT is the default of newer drivers only
        ("", "0", {"a"}),  # both ways
    ],
)
def test_tiles_are_devices_in_the_flat_hierarchy(
    hierarchy: str, mask: str, shown: set[str] | None
) -> None:
    environment = {**SORTED, "ZE_FLAT_DEVICE_HIERARCHY": hierarchy, "ZE_AFFINITY_MASK": mask}
    assert names(visible_to_intel([environment], cards("a", "b", tiles=2))) == shown


# --- whole runs -----------------------------------------------------------------------------------


def amd_machine(sysfs: Path, *, kfd: bool = True) -> str:
    """Two AMD GPUs of 100 and 200 W, which KFD counts against the order of the bus."""
    for bus, power_w in (("03", 100), ("83", 200)):
        values = {"power1_average": power_w * 10**6, "power1_cap": 300 * 10**6}
        chip = hwmon_chip(sysfs, "amdgpu", values, device=f"0000:{bus}:00.0")
        (chip.where / "device/unique_id").write_text(f"00000000000000{bus}\n")
    if kfd:
        kfd_node(sysfs, 0)
        kfd_node(sysfs, 2, "0000:83:00.0")
        kfd_node(sysfs, 10, "0000:03:00.0")
    return f"hwmon:{sysfs}/class/hwmon"


@pytest.mark.parametrize(
    ("variables", "used"),
    [
        ({}, {"03", "83"}),
        ({"ROCR_VISIBLE_DEVICES": "0"}, {"83"}),
        ({"HIP_VISIBLE_DEVICES": "1"}, {"03"}),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000003"}, {"03"}),
        ({"ROCR_VISIBLE_DEVICES": ""}, set()),
    ],
)
def test_amd_gpus_that_the_job_cannot_use_are_listed_not_added(
    cli: Cli, tmp_path: Path, variables: dict[str, str], used: set[str]
) -> None:
    spec = amd_machine(tmp_path)
    _, summary = cli.measure("--sensor", spec, "--", "sleep", "0.5", env=variables)

    for bus, power_w in (("03", 100), ("83", 200)):
        part = component(summary, f"gpu:0000:{bus}:00.0")
        assert part["device_j"] == pytest.approx(power_w * summary["duration_s"], rel=0.02)
        assert part["in_total"] is (bus in used)
        assert part["job_j"] == pytest.approx(part["device_j"] if bus in used else 0)
        assert part["others_j"] == pytest.approx(0 if bus in used else part["device_j"])
        if bus not in used:
            [(name, value)] = variables.items()
            assert part["excluded"] == f"is not visible to the job ({name}={value})"
    assert "gpu-order" not in codes(summary)


def test_a_number_without_an_order_counts_all_and_is_reported(cli: Cli, tmp_path: Path) -> None:
    spec = amd_machine(tmp_path, kfd=False)
    variables = {"HIP_VISIBLE_DEVICES": "1"}
    _, summary = cli.measure("--sensor", spec, "--", "sleep", "0.3", env=variables)

    assert codes(summary, "HIP_VISIBLE_DEVICES=1 does not say") == {"gpu-order"}
    parts = [part for part in summary["energy"]["components"] if part["kind"] == "gpu"]
    assert [part["in_total"] for part in parts] == [True, True]


@contextmanager
def drawing(chips: Mapping[Chip, Mapping[str, float]]) -> Iterator[None]:
    """Energy counters in J that rise by so many W for as long as the block lasts."""
    done = threading.Event()
    begin_s = time.monotonic()

    def write() -> None:
        while not done.wait(0.002):
            spent_s = time.monotonic() - begin_s
            for chip, powers_w in chips.items():
                for name, power_w in powers_w.items():
                    chip.set(name, int(power_w * spent_s * 1e6))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def intel_chip(sysfs: Path, name: str, bus: str, **labels: str) -> Chip:
    values: dict[str, Any] = {}
    for n, label in labels.items():
        values |= {f"{n}_input": 0} | ({f"{n}_label": label} if label else {})
    values |= {"power1_max": 300 * 10**6, "power1_crit": 600 * 10**6}
    return hwmon_chip(sysfs, name, values, device=f"0000:{bus}:00.0")


def test_intel_gpus_are_gpus_and_count_once(cli: Cli, tmp_path: Path) -> None:
    # given xe with counters of card and chip, xe with one of the chip alone, i915 with a tile
    both = intel_chip(tmp_path, "xe", "03", energy1="card", energy2="pkg")
    chip = intel_chip(tmp_path, "xe", "43", energy2="pkg")
    older = intel_chip(tmp_path, "i915", "83", energy1="")
    values = {"energy1_input": 0}
    tile = hwmon_chip(tmp_path, "i915_gt0", values)
    (tile.where / "device").symlink_to(tmp_path / "devices/0000:83:00.0")
    for number, bus in enumerate(("03", "43", "83")):
        drm_card(tmp_path, number, f"0000:{bus}:00.0")
    drm_card(tmp_path, 3, "0000:c3:00.0", vendor="0x10de")
    powers_w = {
        both: {"energy1_input": 200.0, "energy2_input": 150.0},
        chip: {"energy2_input": 100.0},
        older: {"energy1_input": 50.0},
        tile: {"energy1_input": 30.0},
    }

    # when a job may use two of them
    variables = {"ZE_AFFINITY_MASK": "0,1", **SORTED}
    with drawing(powers_w):
        spec = f"hwmon:{tmp_path}/class/hwmon"
        _, summary = cli.measure("--sensor", spec, "--", "sleep", "1", env=variables)

    # then each device is there once, and is a GPU
    duration_s = summary["duration_s"]
    for bus, power_w in (("03", 200), ("43", 100), ("83", 50)):
        part = component(summary, f"gpu:0000:{bus}:00.0")
        assert part["kind"] == "gpu"
        assert part["device_j"] == pytest.approx(power_w * duration_s, rel=0.05)
        assert part["in_total"] is (bus != "83")
    assert component(summary, "other:xe@0000:03:00.0 pkg")["excluded"] == "inside its card"
    assert "without its board" in component(summary, "gpu:0000:43:00.0")["label"]
    others = {c["excluded"] for c in summary["energy"]["components"] if c["kind"] == "other"}
    assert others == {"inside its card", "a tile inside its GPU"}
    assert "gpu-order" not in codes(summary)
