"""Which GPUs the environment variables of a job show to it: CUDA's, ROCm's and oneAPI's.

Each function takes the variables of some processes, and gives what any of them may use. It gives
None where that is unknown, as a number means nothing without the order in which devices are counted
(docs/measurement, section D).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

ROCM = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
INTEL = (
    *("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR"),
    *("ZE_FLAT_DEVICE_HIERARCHY", "ZE_ENABLE_PCI_ID_DEVICE_ORDER"),
)
"""The variables of each runtime."""


# --- CUDA -----------------------------------------------------------------------------------------


def visible_to_cuda(
    environments: Iterable[Mapping[str, str]], boards: Sequence[Mapping[str, str]]
) -> frozenset[str] | None:
    """UUIDs of the boards that CUDA shows to any of some environments; None if that is unknown.

    `boards` are NVML's labels: "uuid", "index" (in the order of the PCI bus), "model", "mig". An
    index means CUDA's own order, fastest first unless CUDA_DEVICE_ORDER says otherwise: it is
    NVML's where all boards are of one model. As CUDA does, a list ends at a name of no device.
    """
    visible: frozenset[str] | None = None
    for environment in environments:
        listed = environment.get("CUDA_VISIBLE_DEVICES")
        if listed is None:
            return frozenset(board["uuid"] for board in boards)
        visible = visible or frozenset()
        for name in listed.split(","):
            order = environment.get("CUDA_DEVICE_ORDER", "")
            named = _boards_named(name.strip(), boards, order)
            if named is None:
                return None
            if not named:
                break
            visible |= named
    return visible


def _boards_named(name: str, boards: Sequence[Mapping[str, str]], order: str) -> set[str] | None:
    """The boards that one word of CUDA_VISIBLE_DEVICES may mean; None if that is unknown."""
    if name.startswith("MIG-"):
        # MIG-GPU-<uuid>/gi/ci, before driver 470, names its board; MIG-<uuid> does not.
        of_board = {board["uuid"] for board in boards if board["uuid"] in name}
        return of_board or {board["uuid"] for board in boards if board.get("mig") == "on"}
    if name.startswith("GPU-"):
        matching = {board["uuid"] for board in boards if board["uuid"].startswith(name)}
        return matching if len(matching) == 1 else set()
    if not name.isdigit() or int(name) >= len(boards):
        return set()
    models = {board["model"] for board in boards}
    divided = any(board.get("mig") == "on" for board in boards)
    if divided or (order != "PCI_BUS_ID" and len(models) > 1):
        return None
    by_index = sorted(boards, key=lambda board: int(board["index"]))
    return {by_index[int(name)]["uuid"]}


# --- ROCm -----------------------------------------------------------------------------------------


def visible_to_rocm(
    environments: Iterable[Mapping[str, str]], gpus: Mapping[str, Mapping[str, str]]
) -> frozenset[str] | None:
    """Ids of the AMD GPUs that a ROCm program may use, out of `gpus`, which has hwmon's labels.

    ROCR_VISIBLE_DEVICES has indices in the order of KFD's nodes, or UUIDs, "GPU-" and the unique
    id. HIP counts what that leaves, by HIP_VISIBLE_DEVICES, else by CUDA_VISIBLE_DEVICES; OpenCL
    by GPU_DEVICE_ORDINAL. A list ends at a word of no device.
    """
    nodes = _by_index(gpus)
    uuids = {
        f"GPU-{labels['unique_id']}".upper(): ident
        for ident, labels in gpus.items()
        if labels.get("unique_id")
    }
    visible: frozenset[str] = frozenset()
    for environment in environments:
        shown = _shown_by_rocm(environment, gpus, nodes, uuids)
        if shown is None:
            return None
        visible |= shown
    return visible


def _shown_by_rocm(
    environment: Mapping[str, str],
    gpus: Iterable[str],
    nodes: Sequence[str | None] | None,
    uuids: Mapping[str, str],
) -> frozenset[str] | None:
    exposed: Sequence[str | None] | None = nodes
    filtered = "ROCR_VISIBLE_DEVICES" in environment
    if filtered:
        words = [word.strip().upper() for word in environment["ROCR_VISIBLE_DEVICES"].split(",")]
        exposed = _devices_named(words, nodes, uuids)
        if exposed is None:
            return None
    hip = environment.get("HIP_VISIBLE_DEVICES") or environment.get("CUDA_VISIBLE_DEVICES")
    lists = [listed for listed in (hip, environment.get("GPU_DEVICE_ORDINAL")) if listed]
    if not lists:
        return frozenset(gpus) if not filtered else _known(exposed)
    shown: frozenset[str] = frozenset()
    for listed in lists:  # a program uses one of the runtimes
        named = _devices_named(listed.upper().split(","), exposed, uuids)
        if named is None:
            return None
        shown |= _known(named)
    return shown


def _devices_named(
    words: Iterable[str], devices: Sequence[str | None] | None, uuids: Mapping[str, str]
) -> list[str | None] | None:
    """The devices that the words of a list name, each one of `devices`; None if that is unknown."""
    named: list[str | None] = []
    seen: set[int] = set()
    for word in words:
        if word.startswith("GPU-"):
            matching = {ident for uuid, ident in uuids.items() if uuid.startswith(word)}
            if devices is not None:
                matching &= {ident for ident in devices if ident is not None}
            if len(matching) != 1 or word == "GPU-":
                break
            named.append(matching.pop())
            continue
        if not word.isdecimal() or int(word) in seen:
            break
        if devices is None:
            return None
        if int(word) >= len(devices):
            break
        seen.add(int(word))
        named.append(devices[int(word)])
    return named


# --- oneAPI ---------------------------------------------------------------------------------------


def visible_to_intel(
    environments: Iterable[Mapping[str, str]], gpus: Mapping[str, Mapping[str, str]]
) -> frozenset[str] | None:
    """Ids of the Intel GPUs that a Level Zero or SYCL program may use, out of `gpus`.

    ZE_AFFINITY_MASK numbers Level Zero's devices, and ONEAPI_DEVICE_SELECTOR those that it leaves.
    Their order is the bus's only where ZE_ENABLE_PCI_ID_DEVICE_ORDER is 1; else nothing is known
    unless all of them are meant, or none. In the hierarchy FLAT each tile is a device.
    """
    cards = _by_index(gpus)
    tiles = {int(labels.get("tiles", 1)) for labels in gpus.values()}
    visible: frozenset[str] = frozenset()
    for environment in environments:
        if not environment.get("ZE_AFFINITY_MASK") and not environment.get(
            "ONEAPI_DEVICE_SELECTOR"
        ):
            return frozenset(gpus)
        # Whether a tile or a card is a device by default depends on the version of the driver.
        hierarchy = environment.get("ZE_FLAT_DEVICE_HIERARCHY", "").upper()
        by_tile = {"FLAT": (True,), "COMBINED": (True,), "COMPOSITE": (False,)}
        shown = {
            _shown_by_oneapi(environment, cards, tiles if flat else {1})
            for flat in by_tile.get(hierarchy, (True, False))
        }
        only = shown.pop()
        if only is None or shown:
            return None
        visible |= only
    return visible


def _shown_by_oneapi(
    environment: Mapping[str, str], cards: Sequence[str | None] | None, tiles: Collection[int]
) -> frozenset[str] | None:
    if cards is None or len(tiles) != 1:
        return None
    [of_card] = tiles
    exposed = list(range(len(cards) * of_card))
    mask = environment.get("ZE_AFFINITY_MASK", "")
    if mask:
        asked = {int(n) for n in re.findall(r"(?:^|,)\s*(\d+)(?:\.[\d.]+)?\s*(?=,|$)", mask)}
        exposed = [n for n in exposed if n in asked]
    selected = _selected(environment.get("ONEAPI_DEVICE_SELECTOR", ""), len(exposed))
    if selected is None:
        return None
    shown = {exposed[n] // of_card for n in selected}
    in_order = environment.get("ZE_ENABLE_PCI_ID_DEVICE_ORDER") == "1"
    if 0 < len(shown) < len(cards) and not in_order:
        return None
    return _known([cards[n] for n in sorted(shown)])


def _selected(selector: str, count: int) -> set[int] | None:
    """Which of `count` GPUs a selector gives to a program by any backend; None if unknown.

    A selector is `[!]BACKEND:DEVICE[,DEVICE …]`, several with semicolons; `!` takes devices away.
    """
    everything = set(range(count))
    if not selector:
        return everything
    by_backend: dict[str, set[int]] = {"level_zero": set(), "opencl": set()}
    unsure = False
    terms = [term.strip().lower() for term in selector.split(";") if term.strip()]
    if all(term.startswith("!") for term in terms):
        terms.insert(0, "*:*")
    for term in sorted(terms, key=lambda term: term.startswith("!")):
        backend, colon, devices = term.lstrip("!").partition(":")
        if not colon:
            return None
        for name in by_backend.keys() & ({backend} if backend != "*" else by_backend.keys()):
            named: set[int] = set()
            for device in devices.split(","):
                root = device.strip().partition(".")[0]
                if root in ("*", "gpu"):
                    named = everything
                elif root.isdecimal():
                    unsure |= name == "opencl"  # it counts processors too
                    named = named | {int(root)} & everything
            if not term.startswith("!"):
                by_backend[name] |= named
            elif "." not in devices:  # a device without one of its tiles is still there
                by_backend[name] -= named
    if by_backend["level_zero"] == everything:
        return everything
    return None if unsure else set().union(*by_backend.values())


# --- the order of devices -------------------------------------------------------------------------


def _by_index(gpus: Mapping[str, Mapping[str, str]]) -> list[str | None] | None:
    """The ids of GPUs in the order in which programs count them, None for those without a sensor.

    None if the order is unknown.
    """
    ordered: list[str | None] | None = None
    for ident, labels in gpus.items():
        if not labels.get("indices") or not labels.get("gpus"):
            return None
        if ordered is None:
            ordered = [None] * int(labels["gpus"])
        for index in map(int, labels["indices"].split(",")):
            if index >= len(ordered):
                return None
            ordered[index] = ident
    return ordered


def _known(devices: Iterable[str | None] | None) -> frozenset[str]:
    return frozenset(ident for ident in devices or () if ident is not None)
