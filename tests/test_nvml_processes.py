"""The lane of who computes on each GPU: slots for processes that come and go."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cli import until
from sim.nvml import BuildNvml, Fault, Gpu, NvmlSim, Process, Scenario, default_uuid
from sim.waves import Constant

from pepr_profiler._core import Sampler
from pepr_profiler.errors import SensorError
from pepr_profiler.sensors.spec import with_process_lists
from pepr_profiler.trace.lane import LaneInfo, LaneReader, LaneWriter, describe

UUID = default_uuid(0)
PERIOD_NS = 20_000_000
Row = dict[str, float]


@contextmanager
def opened(sim: NvmlSim) -> Iterator[Sampler]:
    sampler = Sampler(sim.spec.replace("nvml:", "nvml-processes:"), PERIOD_NS)
    try:
        assert sampler.wait_ready(10.0)
        yield sampler
    finally:
        sampler.stop(1.0)


def rows(sampler: Sampler) -> list[Row]:
    """What has been read since the last call; names without the board's UUID."""
    names = [channel.name.removeprefix(f"{UUID}/") for channel in sampler.channels]
    found: list[Row] = []
    while (batch := sampler.read()) is not None:
        columns = [array("d", column) for column in batch[3]]
        found += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return found


def next_rows(sampler: Sampler, wanted: Callable[[Row], bool]) -> list[Row]:
    """Rows up to the first that is as wanted."""
    seen: list[Row] = []

    def found() -> bool:
        seen.extend(rows(sampler))
        return any(wanted(row) for row in seen)

    until(found)
    return seen


def board(*processes: Process, **more: object) -> Gpu:
    return Gpu(Constant(100), processes=processes, **more)  # type: ignore[arg-type]


def replace(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_a_process_keeps_its_slot_and_its_numbers_stay_apart(
    nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    file = tmp_path / "processes"
    file.write_text("41 1000 0.3\n42 2000 0.6\n")
    sim = nvml_sim(Scenario(gpus=(board(processes_file=file),)))
    with opened(sim) as sampler:
        both = next_rows(sampler, lambda row: row["sm1"] > 0)[-1]
        assert (both["processes"], both["pid0"], both["pid1"], both["pid2"]) == (2, 41, 42, 0)
        assert (both["memory0"], both["memory1"]) == (1000, 2000)
        # given one that ends, its neighbour stays where it is, and the next one takes the place
        replace(file, "42 2000 0.6\n")
        alone = next_rows(sampler, lambda row: row["pid0"] == 0)[-1]
        assert (alone["processes"], alone["pid1"], alone["memory0"]) == (1, 42, 0)
        replace(file, "42 2000 0.6\n43 3000 0.1\n")
        again = next_rows(sampler, lambda row: row["pid0"] == 43)[-1]
        assert (again["pid1"], again["memory0"]) == (42, 3000)


def test_use_is_what_the_driver_sampled_since_the_read_before(nvml_sim: BuildNvml) -> None:
    # given a process at 30 %, another at 60 % that sleeps from 1 s on, samples each sixth of 1 s
    busy = (Process(41, 1, sm=0.3), Process(42, 1, sm=0.6, end_s=1.0), Process(42, 1, start_s=1.0))
    sim = nvml_sim(Scenario(gpus=(board(*busy),), epoch_ns=time.monotonic_ns()))
    with opened(sim) as sampler:
        seen = next_rows(sampler, lambda row: row["sm0"] == 30 and row["sm1"] == 0)
    # then each sample counts in one row, and the rows without one say nothing
    known = [row["sm0"] for row in seen if row["sm0"] > 0]
    assert set(known) == {30.0}
    assert len(known) < len(seen) / 3
    assert 60.0 in {row["sm1"] for row in seen}


def test_more_processes_than_slots_are_known_by_their_count(nvml_sim: BuildNvml) -> None:
    crowd = tuple(Process(100 + i, 1, sm=0.01) for i in range(40))
    with opened(nvml_sim(Scenario(gpus=(board(*crowd),)))) as sampler:
        row = next_rows(sampler, bool)[0]
    assert row["processes"] == 40
    assert [row[f"pid{i}"] for i in range(16)] == [100 + i for i in range(16)]


def test_a_list_that_fails_for_a_while_is_unknown_meanwhile(nvml_sim: BuildNvml) -> None:
    lost = Fault("nvmlDeviceGetComputeRunning", "GPU_IS_LOST", start_s=0.3, end_s=0.6)
    sim = nvml_sim(
        Scenario(
            gpus=(board(Process(41, 1)),),
            faults=(lost,),
            epoch_ns=time.monotonic_ns() + 500_000_000,
        )
    )
    with opened(sim) as sampler:
        next_rows(sampler, lambda row: row["pid0"] == 41)
        failed = next_rows(sampler, lambda row: np.isnan(row["pid0"]))
        next_rows(sampler, lambda row: row["pid0"] == 41)
    assert all(np.isnan(list(row.values())).all() for row in failed if np.isnan(row["pid0"]))


def test_use_that_is_refused_has_no_channels(nvml_sim: BuildNvml) -> None:
    refused = Fault("nvmlDeviceGetProcessUtilization", "NOT_SUPPORTED", gpu=0)
    divided = board(Process(41, 5, instance=3), mig=True)
    sim = nvml_sim(Scenario(gpus=(board(Process(40, 5)), divided), faults=(refused,)))
    with opened(sim) as sampler:
        row = next_rows(sampler, bool)[0]
    on_board, on_divided = (
        {name.rpartition("/")[2] for name in row if name.startswith(prefix)}
        for prefix in ("", default_uuid(1))
    )
    assert "sm0" not in on_board | on_divided
    assert "instance0" in on_divided and row[f"{default_uuid(1)}/instance0"] == 3


def test_a_gpu_without_a_list_is_noted_and_alone_is_no_sensor(nvml_sim: BuildNvml) -> None:
    refused = Fault("nvmlDeviceGetComputeRunning", "NOT_SUPPORTED", gpu=0)
    two = nvml_sim(Scenario(gpus=(board(), board()), faults=(refused,)))
    with opened(two) as sampler:
        assert [note.what for note in sampler.notes] == ["processes of GPU 0"]
        assert all(channel.labels["index"] == "1" for channel in sampler.channels)
    one = nvml_sim(Scenario(gpus=(board(),), faults=(refused,)))
    sampler = Sampler(one.spec.replace("nvml:", "nvml-processes:"), PERIOD_NS)
    with pytest.raises(SensorError, match="processes of GPU 0"):
        sampler.wait_ready(10.0)
    assert sampler.stop(1.0)


def test_each_nvml_has_a_list_beside_it() -> None:
    assert with_process_lists(["nvml", "perf"]) == ("nvml", "perf", "nvml-processes")
    where = with_process_lists(["powercap", "nvml:/a/lib.so"])
    assert where == ("powercap", "nvml:/a/lib.so", "nvml-processes:/a/lib.so")
    assert with_process_lists(["nvml", "nvml-processes"]) == ("nvml", "nvml-processes")
    assert with_process_lists(["replay:x"]) == ("replay:x",)


def test_pids_are_stored_exactly_where_other_numbers_are_thinned(
    nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given an hour of a list in which PIDs that differ by 1 follow each other
    with opened(nvml_sim(Scenario(gpus=(board(Process(41, 1)),)))) as sampler:
        channels = describe(sampler.channels)
    names = [channel.reading for channel in channels]
    count = 7200
    t_ns = np.arange(count, dtype=np.int64) * 500_000_000
    random = np.random.default_rng(5)
    pids = 4_000_000.0 + np.cumsum(random.random(count) < 0.02)
    values = np.zeros((len(channels), count))
    values[names.index("pid0")] = pids
    values[names.index("processes")] = 1
    writer = LaneWriter(tmp_path, LaneInfo("nvml-processes", "x", 500_000_000, channels))
    for begin in range(0, count, 100):
        part = slice(begin, begin + 100)
        times = t_ns[part].tobytes(), bytes(400)
        writer.write(*times, [column[part].tobytes() for column in values])
    writer.close()
    kept = list(LaneReader(tmp_path, "nvml-processes"))
    kept_ns = np.concatenate([batch.t_ns for batch in kept])
    kept_pids = np.concatenate([batch.values[names.index("pid0")] for batch in kept])
    # then each row left out is as the one before it, and most are
    at = np.searchsorted(kept_ns, t_ns, side="right") - 1
    assert (kept_pids[at] == pids).all()
    assert len(kept_ns) < count / 2
