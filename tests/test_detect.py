"""Which sensors are opened unasked, and what is said to whoever may not open them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli import calls_of
from sim.permissions import obeying_permissions, without_perf
from sim.powercap import BuildTree, Tree, Zone, two_socket_server
from sim.sysfs import Event, grace, hwmon_chip, perf_tree, why_no_tsc

from pepr_profiler import _core
from pepr_profiler.errors import SensorError
from pepr_profiler.sensors.detect import detect, detect_lasting
from pepr_profiler.sensors.machine import Surroundings, read_surroundings
from pepr_profiler.sensors.remedy import remedy
from pepr_profiler.sensors.spec import ProcessRoot, SensorSpec, lanes_by_name

BOTH = (Event("energy-pkg"), Event("energy-ram"), Event("energy-psys"))


@pytest.fixture
def may_count(tmp_path: Path) -> None:
    if reason := why_no_tsc():
        pytest.skip(reason)
    sampler = _core.Sampler(f"perf:{perf_tree(tmp_path / 'probe')}", 10**9)
    try:
        sampler.wait_ready(10)
    except SensorError as error:
        pytest.skip(str(error))
    finally:
        sampler.stop(10)


def kinds(specs: tuple[str, ...]) -> list[str]:
    return [spec.partition(":")[0] for spec in specs]


def sysfs_of(tree: Tree) -> Path:
    return tree.where.parents[1]


@pytest.mark.usefixtures("may_count")
@pytest.mark.parametrize(
    ("events", "zones", "chosen"),
    [
        (BOTH, two_socket_server(), ["perf"]),
        (BOTH[:1], (Zone("intel-rapl:0", "package-0"),), ["perf"]),
        # AMD: perf has the package, powercap its cores too, which lie inside
        (BOTH[:1], (Zone("intel-rapl:0", "package-0"), Zone("intel-rapl:0:0", "core")), ["perf"]),
        # what perf lacks
        (BOTH[:1], two_socket_server(), ["perf", "powercap"]),
        (BOTH[:2], (*two_socket_server()[:3], Zone("intel-rapl:2", "psys")), ["perf", "powercap"]),
        # a mmio zone is nobody's only source
        (BOTH[:2], (*two_socket_server()[:6], Zone("intel-rapl-mmio:0", "psys")), ["perf"]),
    ],
)
def test_powercap_is_opened_for_what_perf_lacks(
    powercap_sim: BuildTree,
    events: tuple[Event, ...],
    zones: tuple[Zone, ...],
    chosen: list[str],
) -> None:
    tree = powercap_sim(*zones)
    perf_tree(sysfs_of(tree), events)
    specs = detect(sysfs_of(tree))
    assert kinds(specs) == ["nvml", *chosen]
    # and each spec is one that opens
    for spec in specs[1:]:
        sampler = _core.Sampler(spec, 10**9)
        assert sampler.wait_ready(10)
        sampler.stop(10)


@pytest.mark.usefixtures("may_count")
def test_powercap_is_opened_too_where_perf_stands_still(powercap_sim: BuildTree) -> None:
    # given an event that the kernel offers and that never happens: its software PMU's dummy
    tree = powercap_sim(*two_socket_server()[:1])
    sysfs = perf_tree(sysfs_of(tree), (Event("energy-pkg", encoding="event=0x09"),))
    (sysfs / "bus/event_source/devices/power/type").write_text("1\n")
    assert kinds(detect(sysfs)) == ["nvml", "perf", "powercap"]


@pytest.mark.usefixtures("may_count")
def test_perf_that_is_not_permitted_gives_way_to_powercap(powercap_sim: BuildTree) -> None:
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) <= 0:
        pytest.skip("everybody may count here")
    tree = powercap_sim(*two_socket_server())
    sysfs = perf_tree(sysfs_of(tree), BOTH)
    with without_perf():
        assert kinds(detect(sysfs)) == ["nvml", "powercap"]
    # given that powercap may not be read either: both are named, since either would do
    for key in tree.zones:
        (tree.path(key) / "energy_uj").chmod(0)
    with obeying_permissions():
        assert kinds(detect(sysfs)) == ["nvml", "perf"]


def test_powercap_alone_and_nothing_at_all_are_both_tried(
    tmp_path: Path, powercap_sim: BuildTree
) -> None:
    assert kinds(detect(sysfs_of(powercap_sim(*two_socket_server())))) == ["nvml", "powercap"]
    # nothing: opening it says why
    assert kinds(detect(tmp_path)) == ["nvml", "powercap"]
    # the empty directory of a virtual machine
    if not why_no_tsc():
        assert kinds(detect(perf_tree(tmp_path / "vm", ()))) == ["nvml", "powercap"]


def test_a_reader_that_may_be_restarted_prefers_counters_that_go_on_without_it(
    tmp_path: Path, powercap_sim: BuildTree
) -> None:
    tree = powercap_sim(*two_socket_server())
    both = perf_tree(sysfs_of(tree), BOTH)
    for key in tree.zones:
        (tree.path(key) / "energy_uj").chmod(0)  # it has privileges that are not looked at
    hwmon_chip(both, "amd_energy", {"energy1_input": 1})
    hwmon_chip(both, "amdgpu", {"power1_average": 1}, device="0000:03:00.0")
    assert kinds(detect_lasting(both)) == ["nvml", "powercap", "hwmon"]
    # perf where there is nothing else, and then what says why there is nothing
    assert kinds(detect_lasting(perf_tree(tmp_path / "perf", BOTH))) == ["nvml", "perf"]
    assert kinds(detect_lasting(tmp_path / "none")) == ["nvml", "powercap"]


def test_hwmon_is_opened_for_devices_that_nothing_else_covers(
    tmp_path: Path, powercap_sim: BuildTree
) -> None:
    def add(sysfs: Path) -> Path:
        hwmon_chip(sysfs, "amd_energy", {"energy1_input": 1, "energy1_label": "Esocket0"})
        hwmon_chip(sysfs, "nvme", {"temp1_input": 1})
        hwmon_chip(sysfs, "amdgpu", {"power1_average": 1}, device="0000:03:00.0")
        hwmon_chip(sysfs, "ina3221", {"in1_input": 1, "curr1_input": 1})
        return sysfs

    def chips(sysfs: Path) -> list[str]:
        return [Path(spec[6:]).name for spec in detect(sysfs) if spec.startswith("hwmon:")]

    # given RAPL: amd_energy would repeat it, and a disk's temperature is no energy
    assert chips(add(sysfs_of(powercap_sim(Zone("intel-rapl:0", "package-0"))))) == [
        "hwmon2",
        "hwmon3",
    ]
    # without RAPL amd_energy is what there is
    assert chips(add(tmp_path)) == ["hwmon0", "hwmon2", "hwmon3"]
    # and Grace's meters are found with their devices
    grace(tmp_path / "arm", 0)
    assert kinds(detect(tmp_path / "arm")).count("hwmon") == 3


@pytest.mark.usefixtures("may_count")
def test_detection_costs_a_run_next_to_nothing(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(*two_socket_server())
    sysfs = perf_tree(sysfs_of(tree), BOTH)
    for n in range(12):
        hwmon_chip(sysfs, "nvme", {"temp1_input": n})
    # then it calls 2,000 functions, 50 of which ask the kernel: a millisecond or two
    assert calls_of(lambda: detect(sysfs)) < 4000


# --- where we are, and what that changes ----------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "container", "virtual"),
    [
        ({}, False, False),
        ({".dockerenv": ""}, True, False),
        ({"run/.containerenv": ""}, True, False),
        ({"proc/1/cgroup": "0::/kubepods.slice/kubepods-pod1.slice/cri"}, True, False),
        ({"proc/1/cgroup": "0::/init.scope"}, False, False),
        ({"proc/cpuinfo": "flags\t: fpu hypervisor avx\n"}, False, True),
        ({"proc/cpuinfo": "flags\t: fpu avx\n"}, False, False),
    ],
)
def test_a_container_and_a_virtual_machine_are_known_by_their_marks(
    tmp_path: Path, files: dict[str, str], container: bool, virtual: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    where = read_surroundings(tmp_path)
    assert (where.container, where.virtual) == (container, virtual)


def error_of(spec: str) -> SensorError:
    sampler = _core.Sampler(spec, 10**9)
    with pytest.raises(SensorError) as caught:
        sampler.wait_ready(10)
    sampler.stop(10)
    return caught.value


def advice(spec: str, error: SensorError, **where: bool) -> dict[str, str]:
    here = Surroundings(**{"root": False, "container": False, "virtual": False, **where})
    return remedy(spec, error, here)


def test_a_denied_zone_is_unlocked_where_it_is_locked(powercap_sim: BuildTree) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0"))
    (tree.path("intel-rapl:0") / "energy_uj").chmod(0)
    file = tree.where / "*" / "energy_uj"  # all of them: the class folder lists zones flat
    with obeying_permissions():
        error = error_of(tree.spec)
    fix = advice(tree.spec, error)["fix"]
    assert fix == f"sudo pepr-profile daemon (or, to open it to everybody: sudo chmod o+r {file})"
    assert advice(tree.spec, error, root=True)["fix"] == f"chmod o+r {file}"
    boxed = advice(tree.spec, error, root=True, container=True)
    assert boxed["fix"].startswith("on the host: sudo pepr-profile daemon, and docker run -v")
    assert boxed["fix"].endswith(f"sudo chmod o+r {file})")
    assert boxed["why"].startswith("Permission denied")


@pytest.mark.usefixtures("may_count")
def test_denied_counting_is_unlocked_by_its_switch(tmp_path: Path) -> None:
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) <= 0:
        pytest.skip("everybody may count here")
    spec = f"perf:{perf_tree(tmp_path)}"
    with without_perf():
        error = error_of(spec)
    switch = "sysctl kernel.perf_event_paranoid=0"
    fix = advice(spec, error)["fix"]
    assert fix == f"sudo pepr-profile daemon (or, to open it to everybody: sudo {switch})"
    assert advice(spec, error, root=True)["fix"] == switch
    assert "--cap-add PERFMON" in advice(spec, error, root=True, container=True)["fix"]


@pytest.mark.parametrize("kind", ["perf", "powercap", "hwmon", "nvml"])
def test_what_is_absent_is_explained_for_where_we_are(kind: str, tmp_path: Path) -> None:
    error = error_of(f"{kind}:{tmp_path / 'nothing'}")
    user, root = advice(kind, error), advice(kind, error, root=True)
    boxed = advice(kind, error, root=True, container=True)
    assert len({user["fix"], boxed["fix"]}) == 2
    assert ("on the host" if kind == "perf" else "docker run") in boxed["fix"]
    assert "sudo" not in root["fix"]
    if kind in ("perf", "powercap"):
        assert user["fix"].startswith("sudo modprobe")
        virtual = advice(kind, error, virtual=True, container=True)
        assert "virtual machine" in virtual["why"] and "modprobe" not in virtual["fix"]
    # a place that was named by hand keeps what the driver says of it
    named = advice(f"{kind}:/there", error)
    assert (named["what"], named["why"], named["fix"]) == (error.what, error.why, error.fix)


@pytest.mark.parametrize(
    ("text", "kind", "where"),
    [
        ("nvml", "nvml", ""),
        ("powercap:/host/sys/class/powercap", "powercap", "/host/sys/class/powercap"),
        ("hwmon:/sys/devices/pci0000:00/hwmon0", "hwmon", "/sys/devices/pci0000:00/hwmon0"),
        ("processes:pids=12,34", "processes", "pids=12,34"),
    ],
)
def test_a_spec_is_its_kind_and_place_and_still_the_text(text: str, kind: str, where: str) -> None:
    spec = SensorSpec(text)
    assert (spec.kind, spec.where) == (kind, where)
    assert SensorSpec.of(kind, where) == text
    assert json.loads(json.dumps({"spec": spec})) == {"spec": text}


def test_lanes_of_one_kind_are_numbered_from_the_second_on() -> None:
    lanes = lanes_by_name(["hwmon:/a", "nvml", "hwmon:/b", "hwmon:/c"])
    assert lanes == {"hwmon": "hwmon:/a", "nvml": "nvml", "hwmon-2": "hwmon:/b",
                     "hwmon-3": "hwmon:/c"}  # fmt: skip


def test_the_core_understands_the_roots_that_we_write() -> None:
    own = os.getpid()
    for root in (ProcessRoot("self"), ProcessRoot("children"), ProcessRoot.of_pids([own])):
        sampler = _core.Sampler(SensorSpec.of("processes", root), 10**9)
        assert sampler.wait_ready(10)
        sampler.stop(10)
    assert ProcessRoot.of_pids([12, 34]) == "pids=12,34"
    assert [ProcessRoot(r).pids for r in ("self", "children", "pids=12,34")] == [(), (), (12, 34)]
