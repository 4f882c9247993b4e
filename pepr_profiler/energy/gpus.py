"""Which GPUs are the job's, and whether it is known who used each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers
from pepr_profiler.record import Record
from pepr_profiler.trace.lane import Channel


class Gpus(Record):
    """What is known of the NVIDIA GPUs' users, and which boards are the job's at all. By UUID.

    `boards` are NVML's labels of each. `visible` are those that the job's CUDA may use, None if
    that is unknown, as said by `cuda_visible_devices`. `busy` were busy at some time.
    `lists_processes` says that the recording has their processes, if the driver gave any.
    """

    boards: Mapping[str, Mapping[str, str]]
    users: Mapping[str, GpuUsers]
    visible: frozenset[str] | None
    cuda_visible_devices: str
    busy: frozenset[str]
    lists_processes: bool

    @classmethod
    def of(
        cls,
        facts: Mapping[str, Any],
        channels: Iterable[Channel],
        users: Mapping[str, GpuUsers],
        *,
        busy: Iterable[str],
    ) -> Gpus:
        """From run.json's `recording`, the channels of all lanes, and who was seen."""
        boards = {
            channel.labels["uuid"]: channel.labels
            for channel in channels
            if channel.source.startswith("nvml")
            and channel.labels.keys() >= {"uuid", "index", "model"}
        }
        # Recordings from before processes were listed say nothing of CUDA: all is the job's.
        cuda = facts.get("cuda")
        visible = visible_gpus(cuda, list(boards.values())) if cuda else frozenset(boards)
        listed = dict.fromkeys(str(env.get("CUDA_VISIBLE_DEVICES")) for env in cuda or ())
        return cls(boards, users, visible, "; ".join(listed), frozenset(busy), "root" in facts)

    def users_of(self, curve: EnergyCurve) -> GpuUsers | None:
        """Who used it, as far as that decides whose its energy is."""
        uuid = board_of(curve)
        users = self.users.get(uuid)
        undivided = bool(self.undivided_reason(uuid))
        unknown = users is None or users.unknown_s > 0 or undivided
        if self._is_invisible(uuid) and unknown and (users is None or users.job_s == 0):
            return GpuUsers.others_alone(curve.first_ns, curve.last_ns)
        return None if undivided else users

    def without_unused(self, curve: EnergyCurve) -> EnergyCurve:
        """The curve, out of the total if its GPU is one that the job did not or could not use."""
        uuid = board_of(curve)
        excluded = self._excluded(uuid) if uuid in self.boards else ""
        if not excluded or not curve.source.in_total:
            return curve
        return curve._replace(source=curve.source.not_counted(excluded))

    def peak_bytes(self, of_boards: int | None) -> int | None:
        """The job's memory on GPUs where its processes are known; else what the boards held."""
        peaks = [users.job_peak_bytes for users in self.users.values() if users.job_peak_bytes]
        all_known = not any(self.undivided_reason(uuid) for uuid in self.boards)
        return sum(peaks) if peaks and all_known else of_boards

    def undivided_reason(self, uuid: str) -> str:
        """Why nothing is known of who used a GPU, whose energy is then not divided; else empty."""
        users = self.users.get(uuid)
        if users is None:
            return "no list of its processes was read"
        if users.job_s + users.others_s + users.unknown_s > 0:
            return ""
        if uuid in self.busy:
            return "it was busy, and its driver lists no process on it"
        if self.boards.get(uuid, {}).get("mig") == "on":
            return "the list of its processes, which needs root on a MIG board, is empty"
        return "" if users.reads > 0 else "the run was shorter than two reads of its processes"

    def _excluded(self, uuid: str) -> str:
        users = self.users.get(uuid)
        if users is not None and users.job_s > 0:
            return ""
        if self._is_invisible(uuid):
            return f"is not visible to the job (CUDA_VISIBLE_DEVICES={self.cuda_visible_devices})"
        known = users is not None and users.unknown_s == 0 and not self.undivided_reason(uuid)
        return "was not used by the job" if known else ""

    def _is_invisible(self, uuid: str) -> bool:
        return self.visible is not None and uuid in self.boards and uuid not in self.visible


def board_of(curve: EnergyCurve) -> str:
    """The UUID of the board that a curve is of, if it is one of NVIDIA's."""
    return curve.source.id.removeprefix("gpu:")


def visible_gpus(
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
