"""Which GPUs are the job's, and what is known about their users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.gpu_users import GpuUsers, OtherProcess, not_the_jobs
from pepr_profiler.errors import warning
from pepr_profiler.record import Record

# --- which devices are the job's, and who else was there ------------------------------------------


class Gpus(Record):
    """What is known of the NVIDIA GPUs' users, and which boards are the job's at all.

    `boards` are the labels of each by UUID, `visible` those that the job's CUDA may use (None: it
    cannot be told) and `asked` how it was told so. `busy` were busy at some time. `listed` says
    that the recording would have their processes, had the driver told.
    """

    boards: Mapping[str, Mapping[str, str]]
    tenants: Mapping[str, GpuUsers]
    visible: frozenset[str] | None
    asked: str
    busy: frozenset[str]
    listed: bool

    @classmethod
    def of(
        cls,
        facts: Mapping[str, Any],
        labels: Iterable[Mapping[str, str]],
        tenants: Mapping[str, GpuUsers],
        *,
        busy: Iterable[str],
    ) -> Gpus:
        """From run.json's `recording`, the labels of all channels, and who was seen."""
        boards = {of["uuid"]: of for of in labels if of.keys() >= {"uuid", "index", "model"}}
        # A recording from before processes were listed tells nothing: all is the job's, as it was.
        cuda = facts.get("cuda")
        visible = visible_gpus(cuda, list(boards.values())) if cuda else frozenset(boards)
        asked = "; ".join(dict.fromkeys(str(e.get("CUDA_VISIBLE_DEVICES")) for e in cuda or ()))
        return cls(boards, tenants, visible, asked, frozenset(busy), "root" in facts)

    def users_of(self, curve: EnergyCurve) -> GpuUsers | None:
        """Who used it, as far as that decides whose its energy is."""
        uuid = curve.source.id.removeprefix("gpu:")
        tenants = self.tenants.get(uuid)
        untold = tenants is None or tenants.unknown_s > 0 or bool(self._why_whole(uuid))
        if self._hidden(uuid) and untold and (tenants is None or tenants.job_s == 0):
            return not_the_jobs(curve.first_ns, curve.last_ns)
        return None if self._why_whole(uuid) else tenants

    def judged(self, curve: EnergyCurve) -> EnergyCurve:
        """The curve, out of the total if its GPU is none that the job used, or could use."""
        uuid = curve.source.id.removeprefix("gpu:")
        excluded = self._excluded(uuid) if uuid in self.boards else ""
        if not excluded or not curve.source.in_total:
            return curve
        return curve._replace(source=curve.source._replace(in_total=False, excluded=excluded))

    def peak_bytes(self, of_boards: int | None) -> int | None:
        """The job's memory on GPUs where its processes are known; else what the boards held."""
        mine = [of.job_peak_bytes for of in self.tenants.values() if of.job_peak_bytes]
        told = all(not self._why_whole(uuid) for uuid in self.boards)
        return sum(mine) if mine and told else of_boards

    def _excluded(self, uuid: str) -> str:
        tenants = self.tenants.get(uuid)
        if tenants is not None and tenants.job_s > 0:
            return ""
        if self._hidden(uuid):
            return f"is not visible to the job (CUDA_VISIBLE_DEVICES={self.asked})"
        known = tenants is not None and tenants.unknown_s == 0 and not self._why_whole(uuid)
        return "was not used by the job" if known else ""

    def _hidden(self, uuid: str) -> bool:
        return self.visible is not None and uuid in self.boards and uuid not in self.visible

    def _why_whole(self, uuid: str) -> str:
        """Why it cannot be told who used a GPU; nothing where it can."""
        tenants = self.tenants.get(uuid)
        if tenants is None:
            return "no list of its processes was read"
        if tenants.job_s + tenants.others_s + tenants.unknown_s > 0:
            return ""
        if uuid in self.busy:
            return "it was busy, and its driver lists no process on it"
        if self.boards.get(uuid, {}).get("mig") == "on":
            return "the list of its processes, which needs root on a MIG board, is empty"
        return "" if tenants.reads > 0 else "the run was shorter than two reads of its processes"

    def warnings(
        self, counted: Iterable[EnergyCurve], begin_ns: int, end_ns: int
    ) -> Iterator[dict[str, str]]:
        """Which of them are counted whole because nobody can tell, and which others shared."""
        if not self.listed:
            return
        if self.visible is None:
            yield warning(
                "cuda-order",
                f"CUDA_VISIBLE_DEVICES={self.asked} does not tell which GPUs the job may use: "
                "their models differ, and CUDA counts the fastest first",
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPUs by UUID (nvidia-smi -L)",
            )
        duration_s = (end_ns - begin_ns) * 1e-9
        for curve in counted:
            uuid = curve.source.id.removeprefix("gpu:")
            if uuid not in self.boards:
                continue
            name = f"gpu:{self.boards[uuid]['index']}"
            tenants = self.tenants.get(uuid)
            why = self._why_whole(uuid)
            if duration_s > _SHORT_S and why:
                yield _whole(name, why, 1.0)
            if tenants is None or why:
                continue
            if tenants.unknown_s > _SHARED * duration_s:
                yield _whole(name, tenants.why, tenants.unknown_s / duration_s)
            if tenants.others_s > _SHARED * duration_s:
                yield _shared(
                    f"{name} was used by other processes for {tenants.others_s / duration_s:.0%} "
                    f"of the run: {_named(tenants.neighbours, duration_s)}"
                )
            unread_s = (end_ns - tenants.last_ns) * 1e-9
            if unread_s > max(10 * tenants.period_s, _SHARED * duration_s):
                yield warning(
                    "processes-gap",
                    f"who used {name} is not known of the last {unread_s:.1f} s; "
                    "it is taken to have gone on as before",
                    "see dmesg for its driver",
                )


def _whole(name: str, why: str, part: float) -> dict[str, str]:
    some = "" if part > 0.99 else f" for {part:.0%} of the run"
    return warning(
        "whole-device",
        f"who used {name} cannot be told{some}: {why}; all of its energy there is counted as the "
        "job's",
        "in a container: share the host's PIDs (docker run --pid=host), or profile on the host",
    )


def _shared(text: str) -> dict[str, str]:
    return warning(
        "shared-device",
        text,
        "compare runs only on devices that they have to themselves; the job's share is counted",
    )


_SHARED = 0.05
"""Others who used a device for more than this part of a run are worth a warning."""

_SHORT_S = 1.5
"""In a run shorter than this, who used a GPU is not worth a warning: it is read twice a second."""

_NAMED, _SHOWN = 3, 40


def _named(neighbours: Sequence[OtherProcess], duration_s: float) -> str:
    texts = []
    for one in neighbours[:_NAMED]:
        use = "" if one.part is None else f", {one.part:.0%} of its use"
        texts.append(f"{_who(one._asdict())} ({one.present_s / duration_s:.0%} of the time{use})")
    return ", ".join(texts) + _more(len(neighbours))


def _who(process: Mapping[str, Any]) -> str:
    command = process["command"] or f"of {process['user'] or 'another user'}"
    return f"PID {process['pid']} {command if len(command) <= _SHOWN else command[:_SHOWN] + '…'}"


def _more(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""


# --- which GPUs the job may use ------------------------------------------------------------------


def visible_gpus(
    environments: Iterable[Mapping[str, str]], boards: Sequence[Mapping[str, str]]
) -> frozenset[str] | None:
    """UUIDs of the boards that CUDA shows to any of some environments; None: it cannot be told.

    `boards` are NVML's labels: "uuid", "index" (in the order of the PCI bus), "model", "mig". An
    index means CUDA's own order, fastest first unless CUDA_DEVICE_ORDER says otherwise: it is
    NVML's where all boards are of one model. As CUDA does, a list ends at what names no device.
    """
    shown: set[str] = set()
    told = False
    for environment in environments:
        told = True
        listed = environment.get("CUDA_VISIBLE_DEVICES")
        names = [name.strip() for name in (listed or "").split(",")]
        if listed is None:
            return frozenset(board["uuid"] for board in boards)
        for name in names:
            named = _boards_named(name, boards, environment.get("CUDA_DEVICE_ORDER", ""))
            if named is None:
                return None
            if not named:
                break
            shown |= named
    return frozenset(shown) if told else None


def _boards_named(name: str, boards: Sequence[Mapping[str, str]], order: str) -> set[str] | None:
    """The boards that one word of CUDA_VISIBLE_DEVICES may mean; None: it cannot be told."""
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
