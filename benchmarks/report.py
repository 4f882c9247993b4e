"""The HTML page of a long run: seconds, peak memory and size, from a trace made up in minutes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import UnmeasurableError, header, judge, main, product, show
from pepr_profiler.trace import arrow
from pepr_profiler.trace.lane import Channel, LaneInfo, LaneWriter
from pepr_profiler.trace.run_json import write_json

ROWS = 4096
EPOCH_S = 600.0
GPUS = 8
RANGE_UJ = 262_143_328_850.0


def rapl_lane(period_ns: int) -> LaneInfo:
    def zone(name: str, label: str, parent: str = "") -> Channel:
        labels = {"zone": name, "name": label}
        labels |= {"parent": name.rpartition(":")[0], "parent_name": parent} if parent else {}
        return Channel(
            name=name,
            quantity="energy",
            unit="J",
            scale=1e-6,
            modulus=RANGE_UJ,
            counter=True,
            source="powercap",
            labels=labels,
        )

    channels = []
    for socket in range(2):
        package = f"package-{socket}"
        channels.append(zone(f"intel-rapl:{socket}", package))
        channels.append(zone(f"intel-rapl:{socket}:0", "dram", package))
    return LaneInfo("powercap", "powercap", period_ns, tuple(channels))


def gpu_lane(period_ns: int) -> LaneInfo:
    channels = []
    for index in range(GPUS):
        uuid = f"GPU-00000000-0000-4000-8000-{index:012d}"
        labels = {"uuid": uuid, "model": "NVIDIA H100 80GB HBM3", "index": str(index)}
        channels += [
            Channel(f"{uuid}/energy", "energy", "J", 1e-3, counter=True, source="nvml-energy",
                    labels=labels),
            Channel(f"{uuid}/power-average", "power", "W", 1e-3, source="nvml-power-average",
                    labels=labels),
            Channel(f"{uuid}/memory", "memory", "B", source="nvml-memory", labels=labels),
        ]  # fmt: skip
    return LaneInfo("nvml", "nvml", period_ns, tuple(channels))


def power_w(t_s: NDArray[np.floating[Any]], full_w: float, idle_w: float) -> NDArray[np.float64]:
    """Epochs of 10 min that end in 45 s of a lighter load."""
    return np.where(t_s % EPOCH_S < EPOCH_S - 45, full_w, 0.55 * full_w + 0.45 * idle_w)


def rows_of(
    lane: LaneInfo, begin_ns: int, seconds: float, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Instants and raw numbers of a lane, ROWS at a time: steps, 3 % of noise, late reads."""
    count = int(seconds * 1e9) // lane.period_ns
    counters = np.array([RANGE_UJ * 0.4 if c.modulus else 1e6 for c in lane.channels])
    before_ns = begin_ns
    for first in range(0, count, ROWS):
        number = np.arange(first, min(first + ROWS, count))
        t_ns = (
            begin_ns + number * lane.period_ns + rng.integers(0, lane.period_ns // 10, len(number))
        )
        span_s = np.diff(t_ns, prepend=before_ns) * 1e-9
        before_ns = int(t_ns[-1])
        t_s = (t_ns - begin_ns) * 1e-9
        values = np.empty((len(lane.channels), len(number)))
        for i, channel in enumerate(lane.channels):
            full_w, idle_w = (620.0, 90.0) if channel.source.startswith("nvml") else (180.0, 70.0)
            if channel.labels.get("name") == "dram":
                full_w, idle_w = 24.0, 9.0
            if channel.quantity == "memory":
                values[i] = 61e9
                continue
            watts = power_w(t_s, full_w, idle_w) * (1 + 0.03 * rng.standard_normal(len(number)))
            if channel.quantity == "power":
                values[i] = np.rint(watts / channel.scale)
                continue
            counted = counters[i] + np.cumsum(watts * span_s) / channel.scale
            counters[i] = counted[-1]
            step = 61.035 if channel.modulus else 1.0  # 2**-14 J in uJ; mJ
            counted = np.rint(np.floor(counted / step) * step)
            values[i] = counted % channel.modulus if channel.modulus else counted
        yield t_ns, values


class WholeWriter:
    """A lane with every row, as a crash would leave none: the most that a reader can meet."""

    def __init__(self, directory: Path, lane: LaneInfo) -> None:
        import pyarrow as pa

        from pepr_profiler.trace.lane import schema_of

        self._schema = pa.ipc.read_schema(pa.py_buffer(arrow.schema_message(schema_of(lane))))
        self._stream = pa.ipc.new_stream(str(directory / f"{lane.name}.arrows"), self._schema)

    def write(self, t_ns: bytes, read_ns: bytes, values: Sequence[bytes]) -> None:
        import pyarrow as pa

        rows = len(t_ns) // 8
        columns = [t_ns, read_ns, bytes(4 * rows), bytes(4 * rows), *values]
        arrays = [
            pa.Array.from_buffers(field.type, rows, [None, pa.py_buffer(column)])
            for field, column in zip(self._schema, columns, strict=True)
        ]
        self._stream.write_batch(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        self._stream.close()


def make_run(
    directory: Path, *, hours: float, whole: bool = False, period_s: float = 0.001
) -> None:
    """A run directory as the profiler would have left it."""
    directory.mkdir(parents=True)
    begin_ns, seconds = 10**15, hours * 3600
    rng = np.random.default_rng(20261122)
    for lane in (rapl_lane(int(period_s * 1e9)), gpu_lane(100_000_000)):
        writer = (WholeWriter if whole else LaneWriter)(directory, lane)
        for t_ns, values in rows_of(lane, begin_ns, seconds, rng):
            read_ns = np.full(len(t_ns), 3000, dtype=np.uint32)
            writer.write(t_ns.tobytes(), read_ns.tobytes(), [row.tobytes() for row in values])
        writer.close()
    with (directory / "events-bench-1.jsonl").open("w") as file:
        for number in range(int(seconds / EPOCH_S)):
            begin = begin_ns + int(number * EPOCH_S * 1e9)
            middle, end = begin + int((EPOCH_S - 45) * 1e9), begin + int(EPOCH_S * 1e9)
            for k, (name, t0, t1) in enumerate((("train", begin, middle), ("eval", middle, end))):
                ident = 2 * number + k + 1
                started = {"event": "begin", "t_ns": t0, "id": ident, "parent": None, "name": name}
                file.write(json.dumps(started) + "\n")
                file.write(json.dumps({"event": "end", "t_ns": t1, "id": ident}) + "\n")
            logged = {"epoch": number + 1, "accuracy": 0.97 - 0.6 * 0.95**number}
            file.write(json.dumps({"event": "metrics", "t_ns": end, "metrics": logged}) + "\n")
    end_ns = begin_ns + int(seconds * 1e9)
    options = {"intensity": None, "pue": 1.0, "cpu_power": None, "performance": "accuracy"}
    cpu = {"vendor": "GenuineIntel", "family": 6, "model": 143, "stepping": 8, "name": "Xeon"}
    write_json(
        directory / "run.json",
        {
            "schema": 1,
            "run_id": directory.name,
            "job": None,
            "name": "a day of training",
            "experiment": None,
            "command": ["python", "train.py"],
            "host": "bench",
            "boot_id": "",
            "clock": [
                {"t_ns": begin_ns, "unix_ns": 1_750_000_000_000_000_000},
                {"t_ns": end_ns, "unix_ns": 1_750_000_000_000_000_000 + end_ns - begin_ns},
            ],
            "started_at": "2026-06-15T15:06:40.000+00:00",
            "exit_code": 0,
            "signal": None,
            "complete": True,
            "missing": [],
            "recording": {
                "window_ns": [begin_ns, end_ns],
                "profiler_pid": 1,
                "cpu": cpu,
                "options": options,
                "exit": None,
                "sampler": None,
                "warnings": [],
            },
        },
    )


def reported(argv: Sequence[str], env: dict[str, str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command, by the kernel's own account."""
    began_s = time.monotonic()
    pid = os.posix_spawn(argv[0], list(argv), env)
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        raise UnmeasurableError(f"{' '.join(argv)} ended with status {status}")
    return time.monotonic() - began_s, usage.ru_maxrss * 1024


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0, help="length of the run (24)")
    parser.add_argument("--whole", action="store_true", help="store every row: 5 GB for 24 h")
    parser.add_argument("--run", type=Path, metavar="DIR", help="where the run is made, and kept")
    arguments = parser.parse_args()
    header(f"report: a page of {arguments.hours:g} h of 1 kHz RAPL and {GPUS} GPUs")
    with product() as bench:
        run = arguments.run or bench.folder / "day"
        began_s = time.monotonic()
        if not run.exists():
            make_run(run, hours=arguments.hours, whole=arguments.whole)
            show("to make up the trace", time.monotonic() - began_s, "s")
        size = sum(path.stat().st_size for path in run.glob("*.arrows"))
        show("the trace", size, "MB", scale=1e-6)
        page = bench.folder / "day.html"
        argv = [sys.executable, "-m", "pepr_profiler", "report", str(run)]
        seconds, _ = reported([*argv, "--json", str(bench.folder / "day.json")], bench.env)
        show("the summary alone", seconds, "s")
        seconds, peak = reported([*argv, "-o", str(page)], bench.env)
        judge("the page", seconds, "s", most=20)
        judge("its peak memory", peak, "GB", scale=1e-9, most=1.5)
        judge("its size", page.stat().st_size, "MB", scale=1e-6, most=1.5)


if __name__ == "__main__":
    main(measure)
