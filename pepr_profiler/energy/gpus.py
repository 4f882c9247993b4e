"""Which GPUs are the job's, and whether it is known who used each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers, OtherProcess
from pepr_profiler.energy.sources import rated_w_of
from pepr_profiler.energy.visible import (
    INTEL,
    ROCM,
    visible_to_cuda,
    visible_to_intel,
    visible_to_rocm,
)
from pepr_profiler.record import Record
from pepr_profiler.trace.lane import Channel
from pepr_profiler.trace.run_json import PERHAPS_SERVED, UNUSED


class UnknownOrder(Record):
    """Variables that name GPUs by number where it is unknown how the runtime counts them."""

    variables: str
    gpus: frozenset[str]
    why: str
    fix: str


class Gpus(Record):
    """What is known of GPUs' users, and which boards are the job's at all.

    `boards` are NVML's labels of each, by UUID. `visible` are those that the job's CUDA may use,
    None if that is unknown, as said by `cuda_visible_devices`. `busy` were busy at some time.
    `worked_w` are the highest powers over a second, W, of those on which someone computed, as far
    as their power or their utilisation shows it. `lists_processes` says that the recording has
    their processes, if the driver gave any. Of AMD's and Intel's GPUs, `hidden` has the ids of
    those that variables hide from the job, and these variables; `unknown_orders` are of those where
    that is unknown. `scope` is the run's: "device" also counts GPUs whose processes may have served
    the job.
    """

    boards: Mapping[str, Mapping[str, str]]
    users: Mapping[str, GpuUsers]
    visible: frozenset[str] | None
    cuda_visible_devices: str
    busy: frozenset[str]
    lists_processes: bool
    hidden: Mapping[str, str]
    unknown_orders: tuple[UnknownOrder, ...]
    worked_w: Mapping[str, float] = {}
    scope: str = "job"

    @classmethod
    def of(
        cls,
        facts: Mapping[str, Any],
        channels: Iterable[Channel],
        users: Mapping[str, GpuUsers],
        *,
        busy: Iterable[str],
        most_w: Mapping[str, float] | None = None,
    ) -> Gpus:
        """From run.json's `recording`, the channels of all lanes, and who was seen.

        `most_w` are the highest powers of GPUs over a second, W, by UUID.
        """
        channels = list(channels)
        boards: dict[str, dict[str, str]] = {}
        for channel in channels:
            labels = channel.labels
            if channel.source.startswith("nvml") and labels.keys() >= {"uuid", "index", "model"}:
                boards.setdefault(labels["uuid"], {}).update(labels)
        busy, worked_w = frozenset(busy), {}
        for uuid, watts in (most_w or {}).items():
            of = users.get(uuid)
            empty = of is not None and of.job_s + of.others_s + of.unknown_s == 0
            if uuid in boards and (
                uuid in busy or watts > least_working_w(boards[uuid], empty=empty)
            ):
                worked_w[uuid] = watts
        # Recordings from before processes were listed say nothing of CUDA: all is the job's.
        cuda = facts.get("cuda")
        visible = visible_to_cuda(cuda, list(boards.values())) if cuda else frozenset(boards)
        listed = dict.fromkeys(str(env.get("CUDA_VISIBLE_DEVICES")) for env in cuda or ())
        hidden, unknown_orders = _hidden_gpus(cuda or (), channels)
        return cls(
            boards=boards,
            users=users,
            visible=visible,
            cuda_visible_devices="; ".join(listed),
            busy=busy,
            lists_processes="root" in facts,
            hidden=hidden,
            unknown_orders=unknown_orders,
            worked_w=worked_w,
            scope=facts.get("options", {}).get("scope", "job"),
        )

    def users_of(self, curve: EnergyCurve) -> GpuUsers | None:
        """Who used it, as far as that decides whose its energy is."""
        if curve.source.id in self.hidden:
            return GpuUsers.others_alone(curve.first_ns, curve.last_ns)
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
        if variables := self.hidden.get(curve.source.id):
            excluded = f"is not visible to the job ({variables})"
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
        if uuid in self.worked_w and not self._is_invisible(uuid):
            watts = self.worked_w[uuid]
            return f"it drew up to {watts:.0f} W, and its driver lists no process on it"
        if self.boards.get(uuid, {}).get("mig") == "on":
            return "the list of its processes, which needs root on a MIG board, is empty"
        return "" if users.reads > 0 else "the run was shorter than two reads of its processes"

    def most_idle_w(self, curve: EnergyCurve) -> float:
        """The most that a curve's GPU draws when it is idle, W."""
        return least_working_w(self.boards.get(board_of(curve), {}))

    def possible_servers(self, uuid: str) -> tuple[OtherProcess, ...]:
        """Others that computed on a GPU which the job may use and did not, perhaps for the job.

        Those that are known to work for others; and any of the job's user, if the job itself
        computed on no GPU.
        """
        users = self.users.get(uuid)
        if users is None or users.job_s > 0 or uuid not in self.worked_w:
            return ()
        if self._is_invisible(uuid) or self.undivided_reason(uuid):
            return ()
        job_computes = any(other.job_s > 0 for other in self.users.values())
        return tuple(
            process
            for process in users.other_processes
            if process.is_server or (process.same_user and not job_computes)
        )

    def _excluded(self, uuid: str) -> str:
        users = self.users.get(uuid)
        if users is not None and users.job_s > 0:
            return ""
        if self._is_invisible(uuid):
            return f"is not visible to the job (CUDA_VISIBLE_DEVICES={self.cuda_visible_devices})"
        known = users is not None and users.unknown_s == 0 and not self.undivided_reason(uuid)
        if not known:
            return ""
        if not self.possible_servers(uuid):
            return UNUSED
        return "" if self.scope == "device" else PERHAPS_SERVED

    def _is_invisible(self, uuid: str) -> bool:
        return self.visible is not None and uuid in self.boards and uuid not in self.visible


_USUAL_LIMIT_W = 300.0
_WORKING = 0.35, 40.0
"""A GPU with a process on it that draws more than this part of its limit, and this power, W,
computes. An idle one with a context in its memory draws up to 0.3 of its limit, small boards up to
30 W (docs/measurement, D)."""

_WORKING_EMPTY = 0.2, 30.0
"""The same for one with no process on its list: idle ones draw about 0.1."""


def least_working_w(labels: Mapping[str, str], *, empty: bool = False) -> float:
    """The power above which someone computes on a GPU, W; `labels` may state its limit.

    `empty` says that no process is on its list.
    """
    part, least_w = _WORKING_EMPTY if empty else _WORKING
    return max(part * (rated_w_of(labels) or _USUAL_LIMIT_W), least_w)


def board_of(curve: EnergyCurve) -> str:
    """The UUID of the board that a curve is of, if it is one of NVIDIA's."""
    return curve.source.id.removeprefix("gpu:")


_VENDORS = (
    (
        ("amdgpu",),
        ROCM,
        visible_to_rocm,
        "ROCm counts GPUs in the order of /sys/class/kfd, which is not in the recording",
        "name the GPUs by UUID in ROCR_VISIBLE_DEVICES (rocminfo), or make /sys/class/kfd readable",
    ),
    (
        ("xe", "i915"),
        INTEL,
        visible_to_intel,
        "the order in which Level Zero counts GPUs depends on its driver",
        "set ZE_ENABLE_PCI_ID_DEVICE_ORDER=1, and ZE_FLAT_DEVICE_HIERARCHY where a GPU has tiles",
    ),
)
"""Chips of hwmon, their variables, who reads these, and what may be unknown and how to mend it."""


def _hidden_gpus(
    environments: Sequence[Mapping[str, str]], channels: Iterable[Channel]
) -> tuple[dict[str, str], tuple[UnknownOrder, ...]]:
    """AMD's and Intel's GPUs that are hidden from the job, and those of which it is unknown."""
    labels = [channel.labels for channel in channels if channel.source.startswith("hwmon-")]
    hidden: dict[str, str] = {}
    unknown = []
    for chips, variables, visible_to, why, fix in _VENDORS:
        gpus = {
            f"gpu:{of['device']}": of
            for of in labels
            if of.get("chip") in chips and "device" in of and of.get("part_of") != "processor"
        }
        given = [{name: e[name] for name in variables if name in e} for e in environments]
        if not gpus or not any(given):
            continue
        said = "; ".join(
            dict.fromkeys(f"{name}={value}" for one in given for name, value in one.items())
        )
        visible = visible_to(given, gpus)
        if visible is None:
            unknown.append(UnknownOrder(said, frozenset(gpus), why, fix))
        else:
            hidden |= dict.fromkeys(gpus.keys() - visible, said)
    return hidden, tuple(unknown)
