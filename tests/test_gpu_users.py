"""Who computed on a GPU, from recorded process lists; and which GPUs CUDA shows to a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pepr_profiler.energy.gpu_users import GpuUsers, read_gpu_users
from pepr_profiler.energy.visible import visible_to_cuda
from pepr_profiler.trace.lane import Batch, Channel, LaneInfo
from pepr_profiler.units import NS_PER_S as S

GPU = "GPU-1"
Row = dict[int, float]  # SM use by PID


def lane(*, slots: int = 4, sm: bool = True) -> LaneInfo:
    names = ["processes"]
    for i in range(slots):
        names += [f"pid{i}", f"memory{i}", *([f"sm{i}"] if sm else [])]
    channels = tuple(Channel(f"{GPU}/{name}", "x", "1", labels={"uuid": GPU}) for name in names)
    return LaneInfo("nvml-processes", "nvml-processes", S // 2, channels)


def batch(
    of: LaneInfo, rows: Sequence[Row | None], *, count: int | None = None, step_s: float = 1.0
) -> Batch:
    """One row each `step_s`; a process keeps its slot; None is a read that failed."""
    values = np.zeros((len(of.channels), len(rows)))
    index = {c.reading: i for i, c in enumerate(of.channels)}
    slots: list[int] = []
    for at, row in enumerate(rows):
        if row is None:
            values[:, at] = np.nan
            continue
        slots = [pid if pid in row else 0 for pid in slots]
        for pid in row:
            if pid not in slots:
                slots = [*slots, pid] if 0 not in slots else slots
                slots[slots.index(0) if 0 in slots else slots.index(pid)] = pid
        for slot, pid in enumerate(slots):
            values[index[f"pid{slot}"], at] = pid
            values[index[f"memory{slot}"], at] = 100 * pid
            if f"sm{slot}" in index and pid:
                values[index[f"sm{slot}"], at] = 100 * row[pid]
        values[index["processes"], at] = len(row) if count is None else count
    t_ns = (np.arange(len(rows)) * step_s * S).astype(np.int64)
    return Batch(t_ns, np.zeros(len(rows), np.int64), values)


def note(pid: int, owner: str, *, t_s: float = 0.1) -> dict[str, Any]:
    who = {"command": f"run {pid}", "user": "ann"}
    return {"event": "process", "t_ns": int(t_s * S), "pid": pid, "owner": owner, **who}


def users(
    rows: Sequence[Row | None], *notes: dict[str, Any], sm: bool = True, count: int | None = None
) -> GpuUsers:
    of = lane(sm=sm)
    batches = [batch(of, rows, count=count)]
    end_ns = (len(rows) - 1) * S
    return read_gpu_users(of, batches, notes, begin_ns=0, end_ns=end_ns)[GPU]


def parts(of: GpuUsers) -> list[tuple[float, float]]:
    """The job's and others' use of each interval."""
    return [(float(a), float(b)) for a, b in zip(of.use.job, of.use.others, strict=True)]


JOB, OTHER = note(1, "job"), note(2, "other")


def test_who_is_alone_has_all_of_it_from_the_middle_between_two_reads() -> None:
    # given the job at reads 2 and 3 of 0 … 5, then nobody, and another at the last
    seen = users([{}, {}, {1: 0.2}, {1: 0.0}, {}, {2: 0.9}], JOB, OTHER)
    assert parts(seen) == [(0, 0), (0.5, 0), (1, 0), (0.5, 0), (0, 0.5)]
    assert (seen.job_s, seen.others_s, seen.unknown_s) == (2.0, 0.5, 0.0)
    assert seen.changes == 2 and seen.edges_s == pytest.approx(2**0.5)
    assert seen.job_peak_bytes == 100


def test_two_share_by_sm_use_and_hold_it_each_the_same() -> None:
    third = note(3, "other")
    seen = users([{1: 0, 2: 0}, {1: 0.3, 2: 0.6}, {1: 0.1, 2: 0.1, 3: 0.2}], JOB, OTHER, third)
    assert np.allclose(parts(seen), [(0.3, 0.6), (0.1, 0.3)])
    assert seen.use.job_presence.tolist() == [0.5, pytest.approx(1 / 3)]
    assert seen.use.others_presence.tolist() == [0.5, pytest.approx(2 / 3)]
    # and each neighbour is known with its time and its part of all use, 0.7 of 1.3
    assert [(n.pid, n.present_s) for n in seen.other_processes] == [(2, 2.0), (3, 1.0)]
    assert seen.other_processes[0].use_part == pytest.approx(0.7 / 1.3)


def test_where_the_driver_has_no_news_the_next_read_tells() -> None:
    seen = users([{1: 0, 2: 0}, {1: 0, 2: 0}, {1: 0.2, 2: 0.6}], JOB, OTHER)
    assert np.allclose(parts(seen), [(0.2, 0.6), (0.2, 0.6)])


def test_one_that_ended_without_a_last_sample_went_on_as_before() -> None:
    seen = users([{1: 0, 2: 0}, {1: 0.5, 2: 0.5}, {2: 0.5}], JOB, OTHER)
    assert np.allclose(parts(seen), [(0.5, 0.5), (0.5, 0.5)])


def test_a_failed_read_is_bridged_by_its_neighbours() -> None:
    seen = users([{1: 0.5}, None, {1: 0.5}], JOB)
    assert parts(seen) == [(1, 0)]
    assert seen.job_s == 2.0


@pytest.mark.parametrize(
    ("rows", "notes", "why"),
    [
        ([{7: 0.1}] * 3, [note(7, "hidden")], "PID 7 on it is of another PID namespace"),
        ([{7: 0.1}] * 3, [note(7, "gone")], "PID 7 on it had ended before it could be looked up"),
        ([{7: 0.1}] * 3, [], "PID 7 on it had ended before it could be looked up"),
    ],
)
def test_a_process_that_nobody_knows_leaves_the_board_undivided(
    rows: list[Row | None], notes: list[dict[str, Any]], why: str
) -> None:
    seen = users(rows, *notes)
    assert parts(seen) == [(1, 0), (1, 0)]
    assert (seen.unknown_s, seen.job_s, seen.unknown_reason) == (2.0, 0.0, why)


def test_without_sm_use_only_a_shared_board_is_undivided() -> None:
    seen = users([{1: 0}, {1: 0}, {1: 0, 2: 0}], JOB, OTHER, sm=False)
    assert parts(seen) == [(1, 0), (1, 0)]
    assert seen.unknown_s == 1.0
    assert "how much of it each process uses" in seen.unknown_reason


def test_more_processes_than_slots_leave_it_undivided() -> None:
    seen = users([{1: 0.1, 2: 0.1}] * 2, JOB, OTHER, count=40)
    assert (seen.unknown_s, seen.unknown_reason) == (1.0, "more than 4 processes use it")


def test_a_pid_that_was_given_out_again_is_another_process() -> None:
    # given PID 1 as the job's until 5 s, and another's from 8 s on
    rows: list[Row | None] = [{1: 0.5}] * 5 + [{}] * 3 + [{1: 0.5}] * 3
    seen = users(rows, note(1, "job", t_s=0.2), note(1, "other", t_s=8.3))
    ends = [(0.5, 0), (0, 0), (0, 0), (0, 0.5)]
    assert parts(seen) == [(1, 0)] * 4 + ends + [(0, 1)] * 2


def test_a_gpu_that_was_read_once_tells_nothing() -> None:
    of = lane()
    assert read_gpu_users(of, [batch(of, [{1: 0.5}])], [JOB], begin_ns=0, end_ns=S) == {}


# --- CUDA_VISIBLE_DEVICES ---------------------------------------------------------------------

UUIDS = ["GPU-8932f937-a", "GPU-89aa-b", "GPU-1111-c"]
BOARDS = [{"uuid": u, "index": str(i), "model": "H100"} for i, u in enumerate(UUIDS)]
MIXED = [{**board, "model": f"M{i}"} for i, board in enumerate(BOARDS)]
DIVIDED = [{**BOARDS[0], "mig": "on"}, *BOARDS[1:]]


@pytest.mark.parametrize(
    ("listed", "shown"),
    [
        (None, {0, 1, 2}),
        ("", set()),
        ("-1", set()),
        ("NoDevFiles", set()),
        ("1", {1}),
        ("2,0", {0, 2}),
        (" 2 , 0 ", {0, 2}),
        ("0,7,1", {0}),  # a list ends at what names no device
        ("0,-1,1", {0}),
        ("GPU-1111-c", {2}),
        ("GPU-8932", {0}),
        ("GPU-89", set()),  # of two
        ("GPU-89aa,GPU-11", {1, 2}),
        ("MIG-GPU-89aa-b/1/0", {1}),
    ],
)
def test_every_spelling_of_visible_devices_is_understood(
    listed: str | None, shown: set[int]
) -> None:
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_to_cuda([environment], BOARDS) == {UUIDS[i] for i in shown}


def test_an_index_needs_an_order_that_is_known() -> None:
    listed = {"CUDA_VISIBLE_DEVICES": "0"}
    assert visible_to_cuda([listed], MIXED) is None
    by_bus = {**listed, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_to_cuda([by_bus], MIXED) == {UUIDS[0]}
    assert visible_to_cuda([{"CUDA_VISIBLE_DEVICES": "GPU-1111"}], MIXED) == {UUIDS[2]}
    assert visible_to_cuda([listed], DIVIDED) is None


def test_a_mig_device_is_on_one_of_the_divided_boards() -> None:
    assert visible_to_cuda([{"CUDA_VISIBLE_DEVICES": "MIG-5f1c"}], DIVIDED) == {UUIDS[0]}


def test_several_roots_may_use_what_any_of_them_may() -> None:
    of_two = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "2"}]
    assert visible_to_cuda(of_two, BOARDS) == {UUIDS[0], UUIDS[2]}
    assert visible_to_cuda([], BOARDS) is None  # none could be read
