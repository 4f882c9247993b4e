"""Feeds damaged and foreign files to everything that reads files.

    python tests/fuzz.py [TARGET...] [--seconds 60 | --inputs 400] [--seed 1]    (or make fuzz)

What is promised: each input loads, or raises PeprError, or is reported as torn or left out. Never
another error, a hang, or memory without bounds; and what loads is consistent.

The seconds are those of all targets together. In that time the branches of our own Python that an
input reaches decide which inputs are tried next (atheris, libFuzzer's engine). They also depend on
clocks and addresses. `--inputs` needs no atheris: it tries so many inputs of the slowest target and
more of the quicker ones, which depend on the seed only. So CI (make fuzz INPUTS=400) passes or
fails by the code and by nothing else. `--seed 0` tries others each time. What fails is written to
build/fuzz/TARGET/, with the command that tries it again.

JSON is changed as a tree half of the time: bytes alone would hardly ever get through its parser.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

COUNTED = any(word.startswith("--input") for word in sys.argv)
"""Whether inputs are counted. Instrumented code would be slower, by up to two times."""

try:
    import atheris
except ImportError:
    if not COUNTED:
        sys.exit("atheris is missing: pip install '.[fuzz]' (x86-64), or give --inputs COUNT")


def instrumented() -> contextlib.AbstractContextManager[object]:
    if COUNTED:
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[object]
    manager = atheris.instrument_imports(include=["pepr_profiler"])
    return manager


with instrumented():
    import numpy as np

    from pepr_profiler import commands
    from pepr_profiler.commands import compare, report, runs, score  # noqa: F401 - instrumented
    from pepr_profiler.errors import PeprError
    from pepr_profiler.recording.linear_search import LinearPattern, TooSlowError
    from pepr_profiler.recording.metrics import Metrics
    from pepr_profiler.report import run_page, run_text
    from pepr_profiler.store.index import IndexFile, write_index
    from pepr_profiler.store.runs import Store
    from pepr_profiler.summary import summarise as summary
    from pepr_profiler.trace.events import read_events, read_process_notes
    from pepr_profiler.trace.lane import Channel, LaneInfo, LaneReader, LaneWriter
    from pepr_profiler.trace.run_json import write_json
    from pepr_profiler.units import NS_PER_S as S

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "fuzz"
MOST_MEMORY_MB = 2048
LONGEST_INPUT_S = 60  # of CPU time; a hang may take ten times as long, beside other programs
LONGEST_INPUT = 32768  # bytes
REPORTED = 10_000  # inputs from one line in a target's log to the next
MOST_FAILURES = 10  # of a target whose inputs are counted
PAGES = 256  # one run in so many becomes a page, which takes as long as 100 summaries
MARK = b"\n--8<-- "  # before the name of each file of an input that is several

BEGIN_NS = 1000 * S
END_NS = BEGIN_NS + 3 * S

Files = dict[str, bytes]


def pack(files: Mapping[str, bytes]) -> bytes:
    return b"".join(MARK + name.encode() + b"\n" + content for name, content in files.items())


def unpack(data: bytes, names: tuple[str, ...]) -> Files:
    """The files of an input; what has no name, or an unknown one, is the first file's."""
    files: Files = {}
    for part in data.split(MARK):
        head, _, content = part.partition(b"\n")
        name = head.decode("latin-1")
        if name in names:
            files[name] = content
        elif part:
            files.setdefault(names[0], part)
    return files


# --- seeds: a run on a node with two kinds of counters, a GPU that is shared, marks and metrics ---


def channels_of_processes() -> tuple[Channel, ...]:
    job, system = {"scope": "job", "root": "children"}, {"scope": "system", "cpus": "2"}
    memory = {"scope": "job", "installed_bytes": "25276510208"}
    return (
        Channel("job/cpu", "cpu_time", "s", counter=True, source="procfs", labels=job),
        Channel("job/rss", "memory", "B", source="procfs", labels=memory),
        Channel("job/processes", "count", "1", source="procfs", labels={"scope": "job"}),
        Channel("system/busy", "cpu_time", "s", counter=True, source="procfs", labels=system),
        Channel("job/memory-current", "memory", "B", source="cgroup", labels={"scope": "job"}),
        Channel("job/memory-peak", "memory", "B", source="cgroup", labels={"scope": "job"}),
    )


def lanes() -> dict[str, tuple[LaneInfo, Callable[[float], list[float]]]]:
    """A lane and its values at t (s) of each kind that is interpreted differently."""
    gpu = {"uuid": "GPU-1", "model": "NVIDIA H100 80GB HBM3", "index": "0"}
    zone = {"zone": "intel-rapl:0", "name": "package-0"}
    board = (
        Channel("GPU-1/energy", "energy", "J", 1e-3, 0.0, True, "nvml-energy", gpu),
        Channel("GPU-1/power", "power", "W", 1e-3, 0.0, False, "nvml-power-instant", gpu),
        Channel("GPU-1/sm", "utilisation", "1", 0.01, 0.0, False, "nvml-utilisation", gpu),
        Channel("GPU-1/memory", "memory", "B", 1.0, 0.0, False, "nvml-memory", gpu),
    )
    slots = ("processes", "pid0", "memory0", "sm0", "pid1", "memory1", "sm1")
    listed = tuple(Channel(f"GPU-1/{name}", "identity", "1", labels=gpu) for name in slots)
    package = Channel("package-0", "energy", "J", 1e-6, 300e6, True, "powercap", zone)
    alone = Channel("m", "power", "W", source="test", labels={"kind": "gpu", "component": "gpu:m"})
    return {
        "nvml": (
            LaneInfo("nvml", "nvml", S // 10, board),
            lambda t: [300e3 * round(t, 1), 300e3, 90.0, 2.0**30],
        ),
        "nvml-processes": (
            LaneInfo("nvml-processes", "nvml-processes", S // 2, listed),
            lambda t: [2, 4121, 2.0**30, 60, 4122 + (t > 2), 2.0**20, 20],
        ),
        "powercap": (
            LaneInfo("powercap", "powercap", S // 10, (package,)),
            lambda t: [(250e6 + 100e6 * t) % 300e6],
        ),
        "processes": (
            LaneInfo("processes", "processes:children", S // 10, channels_of_processes()),
            lambda t: [t * 0.9, 2.0**28, 3, 1000 + t * 1.5, 2.0**29, 2.0**30 + t],
        ),
        "replay": (LaneInfo("replay", "replay:x", S // 10, (alone,)), lambda _: [100.0]),
    }


def record(directory: Path, lane: LaneInfo, values: Callable[[float], list[float]]) -> None:
    """A lane of 33 rows with a gap and a failed read, the last of them still in its tail."""
    writer = LaneWriter(directory, lane)
    rows = [i for i in range(33) if not 12 <= i < 16]
    for part in (rows[:20], rows[20:]):
        t_ns = np.array(part, dtype=np.int64) * (S // 10) + BEGIN_NS - S // 10
        table = np.array([values(float(t - BEGIN_NS) * 1e-9) for t in t_ns.tolist()]).T
        table[0, 5] = np.nan
        reads = np.full(len(part), 40_000, dtype=np.uint32)
        writer.write(t_ns.tobytes(), reads.tobytes(), [column.tobytes() for column in table])
        if part[0] == rows[0]:  # so that there is a main stream as well as a tail
            main, tail = (directory / f"{lane.name}{end}" for end in (".arrows", ".tail.arrows"))
            shutil.copy(tail, main)


EVENTS = (
    ("begin", {"id": 1, "parent": None, "name": "train"}),
    ("begin", {"id": 2, "parent": 1, "name": "epoch"}),
    ("metrics", {"metrics": {"accuracy": 0.5, "epoch": 1, "loss": 2.5}}),
    ("end", {"id": 2}),
    ("mark", {"verb": "next", "series": "4121", "name": "load"}),
    ("mark", {"verb": "begin", "series": "x", "name": "inner"}),
    ("mark", {"verb": "end", "series": "x", "name": None}),
    ("metrics", {"metrics": {"accuracy": 0.9, "epoch": 2, "parameters": 10**6}}),
    ("end", {"id": 1}),
)


def events() -> bytes:
    lines = [
        {"event": kind, "t_ns": BEGIN_NS + (i + 1) * S // 4, **facts}
        for i, (kind, facts) in enumerate(EVENTS)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def notes() -> bytes:
    who = {"command": "python train.py", "user": "ann"}
    lines = [
        {"event": "process", "t_ns": BEGIN_NS, "pid": 4121, "owner": "job", **who},
        {"event": "process", "t_ns": BEGIN_NS + S, "pid": 4122, "owner": "other", **who},
        {
            "event": "cpu",
            "t_ns": END_NS,
            "since_ns": BEGIN_NS,
            "profiler_s": 0.01,
            "processes": [{"pid": 4122, "cpu_s": 1.1, **who}],
        },
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def facts() -> dict[str, Any]:
    """What run.json holds before anything is computed."""
    clock = [{"t_ns": t, "unix_ns": t + 10**18} for t in (BEGIN_NS, END_NS)]
    intensity = {"g_per_kwh": 56.0, "source": "given", "year": None}
    options = {"cpu_power": None, "performance": "accuracy", "scope": "job", "pue": 1.1}
    return {
        "schema": 1,
        "run_id": "seed-1",
        "job": "slurm:7",
        **{"rank": 0, "local_rank": 0, "world_size": 2, "node": "n1", "launcher": "slurm"},
        "name": "seed",
        "experiment": "sizes",
        "command": ["python", "train.py", "--seed", "1"],
        "host": "node1",
        "boot_id": "b",
        "clock": clock,
        "started_at": "2026-01-02T03:04:05.678+00:00",
        "exit_code": 0,
        "signal": None,
        "complete": True,
        "missing": [{"what": "no psu", "why": "no sensor", "fix": "none"}],
        "recording": {
            "window_ns": [BEGIN_NS, END_NS],
            "profiler_pid": 6460,
            "cpu": {
                "vendor": "AuthenticAMD",
                "family": 25,
                "model": 17,
                "stepping": 1,
                "name": "E",
            },
            "options": {**options, "intensity": intensity},
            "attached": [],
            "root": "children",
            "cuda": [{"CUDA_VISIBLE_DEVICES": "0"}],
            "outer": {"run_id": "outer-1", "pid": 1},
            "exit": {"signal": None, "cpu_s": 2.7, "max_rss_bytes": 2**28, "code": 0},
            "sampler": {
                **{"cpu_s": 0.36, "dropped": 0, "late": 0, "timed": 6},
                "refresh_s": {"nvml": 0.1, "processes": None},
                "wasted": {"nvml": 0.0},
                "overhead": {"budget": 0.005, "used": 0.003, "gap_s": {"nvml": 0.1}},
            },
            "daemon": {
                **{"socket": "/run/s", "version": "0.1.0", "reconnects": 0},
                "lanes": {"powercap": {"spec": "powercap", "coarse": True}},
            },
            "warnings": [{"code": "x", "text": "y", "hint": "z"}],
        },
    }


RUN_FILES = (
    *("run.json", "events-node1-4121.jsonl", "processes-node1-4121.jsonl"),
    *("nvml.arrows", "nvml.tail.arrows", "nvml-processes.arrows", "powercap.arrows"),
    *("processes.arrows", "replay.arrows"),
)


def recorded(directory: Path) -> Files:
    """The files of a run."""
    for lane, values in lanes().values():
        record(directory, lane, values)
    (directory / RUN_FILES[1]).write_bytes(events())
    (directory / RUN_FILES[2]).write_bytes(notes())
    write_json(directory / "run.json", facts())
    write_json(directory / "run.json", summary.summarise(directory))
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def foreign_streams() -> Iterator[bytes]:
    """Arrow streams that are not ours, or say that they are and are not."""
    import pyarrow as pa

    ours = {b"pepr": b"1", b"lane": b"demo", b"spec": b"x", b"period_ns": b"100000000"}
    about = {b"quantity": b"energy", b"unit": b"J", b"scale": b"1", b"modulus": b"0"}
    about |= {b"counter": b"true", b"source": b"x", b"labels": b"{}"}
    n = 5
    times, reads = pa.array(range(n), pa.int64()), pa.array([1] * n, pa.uint32())
    shapes: list[list[tuple[str, Any]]] = [
        [("a", pa.array(["x"] * n)), ("b", pa.array([1.5] * n))],
        [("t_ns", times), ("read_ns", reads), ("a", pa.array([1.5] * n, pa.float32()))],
        [("t_ns", times), ("read_ns", reads), ("a", pa.array([1.5, None] + [2.0] * 3))],
        [("t_ns", pa.array([1.0] * n)), ("read_ns", reads), ("a", pa.array([1.5] * n))],
        [("t_ns", pa.array(range(n), pa.int32())), ("read_ns", reads)],
        [("t_ns", times), ("a", pa.array([[1.0]] * n))],
        [("t_ns", times), ("read_ns", reads), ("a", pa.array(["x"] * n).dictionary_encode())],
        [("t_ns", times), ("read_ns", reads), ("a", pa.nulls(n))],
        [("t_ns", times), ("read_ns", reads), ("a", pa.array([True] * n))],
        [("a", pa.array([1.5] * n)), ("t_ns", times), ("read_ns", reads)],
        [("t_ns", pa.array([3, 2, 9, 1, 5], pa.int64())), ("read_ns", reads)],
        [],
    ]
    for columns in shapes:
        for metadata in ({}, ours):
            fields = [pa.field(name, a.type, metadata=about) for name, a in columns]
            schema = pa.schema(fields, metadata=metadata)
            batch = pa.record_batch([a for _, a in columns], schema=schema)
            for compression in (None, "zstd"):
                sink = io.BytesIO()
                options = pa.ipc.IpcWriteOptions(compression=compression)
                with pa.ipc.new_stream(sink, schema, options=options) as stream:
                    stream.write_batch(batch)
                yield sink.getvalue()


# --- what is checked ------------------------------------------------------------------------------


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What may be raised: an error that says what, and its reason or remedy."""
    try:
        yield
    except PeprError as error:
        assert error.what and (error.why or error.fix), repr(error)


def cli(*arguments: str) -> tuple[int, str]:
    """The command line in this process; its status and what it printed."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", how) for how in ("strict", "backslashreplace")
    )
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = commands.main(list(arguments))
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    assert status in (0, 2, 125), (status, texts[1])
    assert status == 0 or texts[1], "failed without a word"
    for text in texts:  # no text of a file moves the cursor or hides what is there
        assert text.replace("\n", "").isprintable(), ascii(text)
    return status, texts[0]


def chosen(ways: Sequence[Any], files: Files) -> Any:
    """One of them, the same for the same input: all of them would make each input slow."""
    return ways[crc32(b"".join(files.values())) % len(ways)]


def fill(directory: Path, files: Files) -> None:
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)


def is_json(value: Any) -> None:
    json.dumps(value, allow_nan=False)  # finite or null, everywhere


def read_lane(directory: Path, files: Files) -> None:
    fill(directory, files)
    with refusals():
        last_ns = -1
        for batch in LaneReader(directory, "demo"):
            n = len(batch.t_ns)
            assert n and batch.read_ns.shape == (n,)
            assert batch.t_ns.dtype == np.int64 and batch.values.dtype == np.float64
            assert batch.values.ndim == 2 and batch.values.shape[1] == n
            assert batch.t_ns[0] > last_ns and (np.diff(batch.t_ns) > 0).all(), "times descend"
            assert batch.reads >= n
            last_ns = int(batch.t_ns[-1])
    with refusals():
        found = read_events(directory)
        assert [p.begin_ns for p in found.phases] == sorted(p.begin_ns for p in found.phases)
        assert all(p.end_ns is None or isinstance(p.end_ns, int) for p in found.phases)
        read_process_notes(directory)


def summarise(directory: Path, files: Files) -> None:
    fill(directory, files)
    with refusals():
        run, timeline = summary.with_timeline(directory)
        is_json(run)
        energy = run["energy"]
        assert energy["u_j"] is None or energy["u_j"] >= 0
        assert run["duration_s"] >= 0
        for part in energy["components"]:
            if part["device_j"] is not None and part["in_total"]:
                shares = part["job_j"] + part["others_j"] + part["idle_j"]
                peak_w = max(abs(watts or 0) for watts in part["trace_w"])  # rounding is of it
                scale = max(abs(part["device_j"]), abs(part["job_j"]), peak_w * run["duration_s"])
                assert abs(shares - part["device_j"]) <= 1e-6 * scale + 1e-6, part
        run_text.render_run(run, width=80, color=False)
        if chosen(range(PAGES), files) == 0:
            run_page.run_page(run, timeline)


def keep(directory: Path, files: Files) -> None:
    """A store with this run beside a good one."""
    store = Store(directory / "store")
    damaged = store.runs_path / "seed-1"
    damaged.mkdir(parents=True, exist_ok=True)
    fill(damaged, files)
    store.index_path.unlink(missing_ok=True)
    for _ in range(2):  # read, then from the index
        found = store.find()
        is_json(list(found))
        assert "good-1" in found.ids, "a damaged run hid another"
        assert len(found) + len(found.damaged) <= 2
    with refusals():
        is_json(store.load("seed-1"))
    name = str(store.path)
    status, _ = cli("runs", "list", "--store", name)
    assert status == 0
    resources = ("--resource", "energy,time,memory,carbon", "--group", "none")
    verbs = (
        ("runs", "show", "seed-1"),
        ("report", "seed-1"),
        ("report", "--job", "seed-1"),
        ("compare", *resources),
        ("compare", "seed-1", "good-1", "--mix-provenance", *resources[:2]),
        ("runs", "export", "-o", str(directory / "all.csv")),
    )
    cli(*chosen(verbs, files), "--store", name)


def index(directory: Path, files: Files) -> None:
    store = Store(directory / "store")
    text = files.get("index", b"")
    store.index_path.write_bytes(text)
    found = store.find()
    assert len(found) + len(found.damaged) == 2
    for run in found:
        is_json(run)
    list(found.rows)
    verbs = (("runs", "list"), ("compare", "--group", "none"))
    store.index_path.write_bytes(text)
    cli(*chosen(verbs, files), "--store", str(store.path))


SCORES = (
    ("--performance", "acc", "--resource", "energy"),
    ("--performance", "acc", "--resource", "energy", "--repeats", "--name", "model"),
    ("--performance", "acc", "--resource", "energy", "--resource", "time", "--group", "data"),
    ("--performance", "acc", "--resource", "energy", "--bounds", "1:100", "--percent"),
    ("--performance", "acc", "--resource", "energy", "--transform", "exp-neg", "--time", "time"),
)


def table(directory: Path, files: Files) -> None:
    (directory / "t.csv").write_bytes(files.get("t.csv", b""))
    options = chosen(SCORES, files)
    cli("score", str(directory / "t.csv"), *options)
    status, text = cli("score", str(directory / "t.csv"), *options, "--json", "-")
    if status == 0:
        for ranking in json.loads(text)["rankings"]:
            for row in ranking["rows"]:
                assert 0 <= row["pepr"] <= 1 and 0 <= row["r_norm"] <= 1, row
    if status == 0 and "--repeats" not in options:
        status, _ = cli("score", str(directory / "t.csv"), *options, "-o", str(directory / "o.csv"))
        if status == 0:
            again, _ = cli("score", str(directory / "o.csv"), *options)
            assert again == 0, "what -o wrote cannot be read"


def bounds(directory: Path, files: Files) -> None:
    (directory / "b.json").write_bytes(files.get("b.json", b""))
    (directory / "t.csv").write_bytes(TABLE)
    given = ("--bounds-from", str(directory / "b.json"))
    cli("score", str(directory / "t.csv"), *SCORES[0], *given)
    status, text = cli("score", str(directory / "t.csv"), *SCORES[2], *given, "--json", "-")
    if status == 0:
        json.loads(text)


METRIC_FILES = ("m.json", "m.csv", "m.tsv", "out")


def metric(directory: Path, files: Files) -> None:
    fill(directory, {})
    sought = ["m.json:acc", "m.json:history.-1.loss:loss", "m.csv:val_acc:table", "m.tsv:b:tab"]
    metrics = Metrics(["out=acc: *([0-9.]+)", "pair=a|b"], [f"{directory}/{it}" for it in sought])
    fill(directory, files)
    metrics.watch()
    text = files.get("out", b"")
    for i in range(0, len(text), 7):
        metrics.feed(1, text[i : i + 7], i)
    for warning in metrics.finish():
        assert warning["text"] and warning["hint"]
    for point in metrics.take():
        assert np.isfinite(point.value)


PATTERN_FILES = ("pattern", "out")


def pattern(directory: Path, files: Files) -> None:  # noqa: ARG001
    """Any pattern on any text: bounded time, and what `re` finds where that is quick."""
    regex, text = (files.get(name, b"").decode("utf-8", "replace") for name in PATTERN_FILES)
    with contextlib.suppress(re.error, RecursionError, OverflowError, TooSlowError):
        linear = LinearPattern(regex)
        for line in text.splitlines()[:20]:
            found = list(linear.find(line))
            if found:
                assert linear.literal in line
                assert linear.lower_literal.encode() in line.encode(errors="replace").lower()
    metrics = None
    with refusals():
        metrics = Metrics([f"x={regex}"])
    if metrics is not None:
        metrics.feed(1, text.encode("utf-8", "replace"), 1)
        metrics.finish()


def plant(directory: Path, files: Files) -> None:
    """A run in which files were replaced by what is no file, as `plan` says: pairs of bytes."""
    damaged = directory / "store" / "runs" / "seed-1"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(directory / "store" / "runs" / "good-1", damaged)
    victim = directory / "victim"
    victim.write_bytes(b"alias ll='ls -l'")
    plan = files.get("plan", b"")
    for which, kind in zip(plan[:16:2], plan[1:16:2], strict=False):
        names = sorted(path.name for path in damaged.iterdir()) or ["run.json"]
        path = damaged / (*names, "events-x-1.jsonl", "second.arrows")[which % (len(names) + 2)]
        if path.is_dir() and not path.is_symlink():
            continue
        path.unlink(missing_ok=True)
        if kind % 6 == 0:
            os.mkfifo(path)
        elif kind % 6 == 1:
            path.mkdir()
        elif kind % 6 == 2:
            path.touch()
            os.truncate(path, 50 * 10**9)
        elif kind % 6 == 3:
            path.symlink_to("/dev/zero")
        elif kind % 6 == 4:
            path.symlink_to(victim)
    name = str(directory / "store")
    verbs = (
        (("report", "seed-1"), ("runs", "set", "seed-1", "acc=1")),
        (("runs", "show", "seed-1"), ("runs", "set", "seed-1", "name=x")),
        (("compare", "--group", "none"), ("runs", "set", "seed-1", "acc=1")),
    )
    assert cli("runs", "list", "--store", name)[0] == 0
    for verb in chosen(verbs, files):
        cli(*verb, "--store", name)
    assert victim.read_bytes() == b"alias ll='ls -l'", "a link was written through"
    assert cli("runs", "rm", "--yes", "--force", "seed-1", "--store", name)[0] == 0


TABLE = b"""model,acc,energy,time,data
a,0.9,10,1.5,x
b,0.95,20,2.5,x
"c, d",0.5,5,0.5,x
a,0.91,11,1.6,y
b,0.94,21,2.6,y
"""


@dataclass(frozen=True)
class Target:
    """A reader of files: what it is called with, and inputs to begin from."""

    check: Callable[[Path, Files], None]
    names: tuple[str, ...]
    seeds: Callable[[Path], Iterator[Files]]
    prepare: Callable[[Path], None] = lambda _: None
    quickness: int = 1  # its inputs in the time of one of the slowest, about: --inputs times this


def seeds_of_lane(scratch: Path) -> Iterator[Files]:
    names = {".arrows": "demo.arrows", ".tail.arrows": "demo.tail.arrows"}
    kept: list[Files] = []
    for lane, values in lanes().values():
        folder = scratch / lane.name
        folder.mkdir()
        record(folder, lane._replace(name="demo"), values)
        kept.append({name: (folder / name).read_bytes() for name in names.values()})
    log = {"events-h-1.jsonl": events(), "processes-h-1.jsonl": notes()}
    yield from ({**files, **log} for files in kept)
    yield from ({"demo.arrows": files["demo.arrows"]} for files in kept)
    yield from ({"demo.tail.arrows": files["demo.tail.arrows"]} for files in kept)
    yield from ({"demo.arrows": stream} for stream in foreign_streams())
    old = ROOT / "tests" / "data" / "lane-without-skipped" / "demo.arrows"
    yield {"demo.arrows": old.read_bytes()}


def seeds_of_run(scratch: Path) -> Iterator[Files]:
    whole = recorded(scratch)
    yield whole
    for name in ("nvml", "powercap", "processes", "replay"):
        yield {k: v for k, v in whole.items() if not k.endswith(".arrows") or k.startswith(name)}
    ended = json.loads(whole["run.json"])
    ended["complete"], ended["recording"]["window_ns"][1] = False, None
    yield {**whole, "run.json": json.dumps(ended).encode()}


def good_runs(directory: Path, count: int = 1) -> None:
    for i in range(count):
        good = directory / "store" / "runs" / f"good-{i + 1}"
        good.mkdir(parents=True)
        recorded(good)
        run = json.loads((good / "run.json").read_bytes())
        own = {"run_id": good.name, "name": good.name, "rank": i + 1, "host": f"n{i}"}
        run["recording"]["outer"] = None
        write_json(good / "run.json", {**run, **own})


def seeds_of_index(scratch: Path) -> Iterator[Files]:
    good_runs(scratch, 2)
    store = Store(scratch / "store")
    store.find()
    saved = IndexFile.open(store.index_path)
    assert saved is not None
    # Stamps have inodes and times: this seed, and all that comes of it, would be another each time.
    entries = [(row._replace(run_json="1 2 3"), saved.summary(row.run_id)) for row in saved.rows]
    store.index_path.unlink()
    write_index(store.index_path, entries)
    yield {"index": store.index_path.read_bytes()}


def seeds_of_bounds(scratch: Path) -> Iterator[Files]:
    (scratch / "t.csv").write_bytes(TABLE)
    for options in (SCORES[0], SCORES[2]):
        cli("score", str(scratch / "t.csv"), *options, "--save-bounds", str(scratch / "b.json"))
        yield {"b.json": (scratch / "b.json").read_bytes()}


def seeds_of_metric(_: Path) -> Iterator[Files]:
    tree = b'{"acc": 0.5, "history": [{"loss": 1.5}, {"loss": 0.5}], "a.b": {"c": 1}}'
    csv, tsv = b"epoch,val_acc\n1,0.5\n2,0.75\n", b"a\tb\n1\t2\n"
    output = b"acc: 0.5\r\x1b[1macc: 0.75\x1b[0m\n\xff acc:1e5 a b\n"
    yield {"m.json": tree, "m.csv": csv, "m.tsv": tsv, "out": output}
    yield {"m.json": b'{"acc": 1}\n{"acc": "0.5"}\n{"history": []}\n'}


def seeds_of_pattern(_: Path) -> Iterator[Files]:
    for regex in (
        r"(?:a+)+b ([0-9]+)",
        r"epoch (\d+).*?acc=([^ ]*)$",
        r"(?i)\bk|s{2,3}x*",
        "(?<=a)b",
    ):
        yield {"pattern": regex.encode(), "out": b"aaaab 17\nepoch 3 acc=0.5 aab\n\xff K ssx\n"}


def seeds_of_plant(_: Path) -> Iterator[Files]:
    yield from ({"plan": bytes((which, kind))} for which in range(10) for kind in range(6))


def seeds_of_table(_: Path) -> Iterator[Files]:
    yield {"t.csv": TABLE}
    yield {"t.csv": b"\xef\xbb\xbfmodel,acc,energy,time,data\r\na,50,1e300,-0,x\r\nb,60,2,3,y\r\n"}
    yield {"t.csv": b"acc,energy,time,data,model\n1_0,nan,inf,\xc3\xa9,=1+1\n0.5,1,1,1,1\n"}


TARGETS = {
    "plant": Target(plant, ("plan",), seeds_of_plant, good_runs),
    "run": Target(summarise, RUN_FILES, seeds_of_run, quickness=2),
    "store": Target(keep, RUN_FILES, seeds_of_run, good_runs, quickness=4),
    "index": Target(
        index, ("index",), seeds_of_index, functools.partial(good_runs, count=2), quickness=4
    ),
    "table": Target(table, ("t.csv",), seeds_of_table, quickness=12),
    "bounds": Target(bounds, ("b.json",), seeds_of_bounds, quickness=12),
    "lane": Target(
        read_lane,
        ("demo.arrows", "demo.tail.arrows", "events-h-1.jsonl", "processes-h-1.jsonl"),
        seeds_of_lane,
        quickness=24,
    ),
    "metric": Target(metric, METRIC_FILES, seeds_of_metric, quickness=16),
    "pattern": Target(pattern, PATTERN_FILES, seeds_of_pattern, quickness=16),
}
"""The slowest first, so that no slow one is left at the end."""


# --- changing an input ----------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, "", "x", [], {}, [[]], [None], {"": None}, 0, -1, 1, 0.5, -0.0),
    *(1e308, -1e308, 1e-320, 2**31, 2**63 - 1, 2**63, -(2**63), 10**40, float("nan"), float("inf")),
    *("\ud800", "\x00", "\x1b[2J", "é" * 40, "9" * 400, "GPU-1", "nan", "2026-13-45", 9 * 10**18),
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            found.append((node, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    return found


def change_tree(tree: Any, dice: random.Random) -> Any:
    """Puts something odd, or something from elsewhere, somewhere into a JSON tree."""
    if not isinstance(tree, dict | list) or not (found := places(tree)):
        return dice.choice(ODD)
    node, key = dice.choice(found)
    action = dice.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1:
        other, name = dice.choice(found)
        node[key] = json.loads(json.dumps(other[name])) if name in range_or_keys(other) else None
    elif action == 2 and isinstance(node[key], int | float):
        node[key] = node[key] * dice.choice((-1, 0, 2, 1e9, 1e-9, 10**9))
    elif action == 3 and isinstance(node, list):
        node.insert(0, node[key])
    else:
        node[key] = dice.choice(ODD)
    return tree


def range_or_keys(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))


def change_json(content: bytes, dice: random.Random) -> bytes:
    """The same with one line (or all of it) changed as a tree; bytes where it is no JSON."""
    try:
        return json.dumps(change_tree(json.loads(content), dice)).encode()
    except (ValueError, RecursionError):
        lines = content.split(b"\n")
    at = dice.randrange(len(lines))
    with contextlib.suppress(ValueError, RecursionError):
        lines[at] = json.dumps(change_tree(json.loads(lines[at]), dice)).encode()
    return b"\n".join(lines)


def change_bytes(content: bytes, most: int, dice: random.Random) -> bytes:
    """A few bytes of it lost, doubled, moved or replaced, as the fuzzer's engine does it."""
    changed = bytearray(content)
    at, other = (dice.randrange(len(changed) + 1) for _ in range(2))
    size = dice.choice((1, 1, 2, 4, 8, 64))
    action = dice.randrange(6)
    if action == 0:
        del changed[at : at + size]
    elif action == 1:
        changed[at:at] = changed[other : other + size]
    elif action == 2:
        changed[at : at + size] = changed[other : other + size]
    elif action == 3:
        changed[at : at + size] = dice.choice((b"\0", b"\xff", b"0")) * size
    elif action == 4:
        changed[at : at + size] = dice.randbytes(size)
    elif at < len(changed):
        changed[at] ^= 1 << dice.randrange(8)
    return bytes(changed[:most])


def mutator(
    target: Target, change_bytes: Callable[[bytes, int, random.Random], bytes]
) -> Callable[[bytes, int, int], bytes]:
    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        dice = random.Random(seed)
        files = unpack(data, target.names)
        if not files or dice.random() < 0.1:
            return change_bytes(data, max_size, dice)
        # Texts are where most of the meaning is, and arrays where most of the bytes are.
        name = dice.choice(sorted(files))
        content = files[name]
        textual = not name.endswith((".arrows", ".csv", ".tsv"))
        if textual and dice.random() < 0.7:
            for _ in range(dice.choice((1, 1, 1, 2, 4))):
                content = change_json(content, dice)
        elif dice.random() < 0.1:
            content = content[: dice.randrange(len(content) + 1)]
        else:
            content = change_bytes(content, len(content) + 64, dice)
        return pack({**files, name: content})[:max_size]

    return mutate


# --- running --------------------------------------------------------------------------------------


def start(name: str, folder: Path, seed: int, *, seconds: float, inputs: int | None) -> int:
    """Forks a fuzzer of one target, whose output goes to a log beside its corpus; its PID."""
    target = TARGETS[name]
    corpus, scratch, kept = folder / name, folder / f"{name}-files", KEPT / name
    shutil.rmtree(kept, ignore_errors=True)
    for made in (corpus, scratch, folder / f"{name}-seeds", kept):
        made.mkdir(parents=True)
    for i, files in enumerate(target.seeds(folder / f"{name}-seeds")):
        (corpus / f"seed-{i:02}").write_bytes(pack(files))
    target.prepare(scratch)
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    random.seed(seed)
    if inputs is None:
        search(target, corpus, scratch, kept, seed=seed, seconds=seconds)
    else:
        count(target, corpus, scratch, kept, seed=seed, inputs=inputs * target.quickness)
    os._exit(70)


def search(
    target: Target, corpus: Path, scratch: Path, kept: Path, *, seed: int, seconds: float
) -> None:
    """Fuzzes for so long, led by what is reached, and ends this process."""
    options = [
        *(f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}"),
        *(f"-timeout={LONGEST_INPUT_S}", f"-rss_limit_mb={MOST_MEMORY_MB}"),
        *(f"-max_len={LONGEST_INPUT}", f"-artifact_prefix={kept}/", "-print_final_stats=1"),
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)],
        lambda data: target.check(scratch, unpack(data, target.names)),
        custom_mutator=mutator(target, lambda data, most, _: bytes(atheris.Mutate(data, most))),
    )
    atheris.Fuzz()


def count(
    target: Target, corpus: Path, scratch: Path, kept: Path, *, seed: int, inputs: int
) -> None:
    """Tries each seed, then so many inputs that only `seed` decides; ends this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_MB << 20,) * 2)
    for signo in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(signo, signal.SIG_DFL)
    seeds = [file.read_bytes() for file in sorted(corpus.iterdir())]
    dice = random.Random(f"{seed} {kept.name}" if seed else None)
    mutate = mutator(target, change_bytes)
    tried = failures = 0
    current = kept / "input"  # it stays there if it ends this process
    while tried < len(seeds) + inputs and failures < MOST_FAILURES:
        data = seeds[tried] if tried < len(seeds) else dice.choice(seeds)
        for _ in range(dice.choice((1, 1, 2, 3, 5)) if tried >= len(seeds) else 0):
            data = mutate(data, LONGEST_INPUT, dice.getrandbits(32))
        current.write_bytes(data)
        if tried % REPORTED == 0:
            print(f"tried {tried}", flush=True)
        signal.alarm(10 * LONGEST_INPUT_S)
        signal.setitimer(signal.ITIMER_PROF, LONGEST_INPUT_S)
        tried += 1
        try:
            target.check(scratch, unpack(data, target.names))
        except BaseException:
            failures += 1
            current.rename(kept / f"input-{tried}")
            traceback.print_exc()
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    current.unlink(missing_ok=True)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"number_of_executed_units: {tried}\npeak_rss_mb: {peak_mb}", flush=True)
    sys.stderr.flush()
    os._exit(1 if failures else 0)


def print_result(name: str, status: int, text: str, took_s: float) -> int:
    """Prints how a target did; returns how many inputs it tried, as far as that is known."""

    def statistic(key: str) -> str:
        lines = [line for line in text.splitlines() if key in line]
        return lines[-1].split()[-1] if lines else "?"

    inputs, memory = statistic("number_of_executed_units"), statistic("peak_rss_mb")
    if status == 0:
        print(f"{name:<8} held: {inputs} inputs in {took_s:.0f} s, peak {memory} MB", flush=True)
    else:
        print(text[-6000:])
        for path in sorted((KEPT / name).iterdir()):
            again = f"python tests/fuzz.py {name} --input {path.relative_to(ROOT)}"
            print(f"{name:<8} FAILED: {again}", flush=True)
    return int(inputs) if inputs.isdecimal() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    ends.add_argument("--inputs", type=int, help="of the slowest target; more of the others")
    parser.add_argument("--seed", type=int, default=1, help="0: other inputs each time")
    parser.add_argument("--input", type=Path, help="try one input of one target")
    chosen = parser.parse_args()
    waiting = chosen.targets or list(TARGETS)
    if unknown := set(waiting) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    os.environ.update(PEPR_DAEMON="off", NO_COLOR="1")
    np.seterr(all="ignore")  # what a damaged number gives is checked, not warned of
    end_s = time.monotonic() + chosen.seconds
    at_once = min(len(waiting), os.cpu_count() or 1)
    running: dict[int, tuple[str, float]] = {}
    held, tried, begin_s = True, 0, time.monotonic()
    # Files are made and replaced thousands of times a second: in memory where that can be had.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="pepr-fuzz-", dir=memory))
    ours = os.getpid()
    try:
        if chosen.input:
            target = TARGETS[waiting[0]]
            target.prepare(folder)
            target.check(folder, unpack(chosen.input.read_bytes(), target.names))
            return 0
        while waiting or running:
            while waiting and len(running) < at_once:
                name, now_s = waiting.pop(0), time.monotonic()
                rounds = -(-(len(waiting) + 1) // at_once)
                child = start(
                    name, folder, chosen.seed, seconds=(end_s - now_s) / rounds,
                    inputs=chosen.inputs,
                )  # fmt: skip
                running[child] = name, now_s
            child, status = os.wait()
            name, began_s = running.pop(child)
            log = (folder / f"{name}.log").read_text(errors="replace")
            tried += print_result(name, status, log, time.monotonic() - began_s)
            held &= status == 0
        print(f"{tried} inputs in {time.monotonic() - begin_s:.0f} s", flush=True)
    finally:
        if os.getpid() == ours:
            shutil.rmtree(folder)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
