"""The facts of a run, `run.json`: its shape, read with a check and replaced atomically."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pepr_profiler.errors import TraceError
from pepr_profiler.record import Any
from pepr_profiler.trace.files import read_file, replace_file
from pepr_profiler.trace.shape import shape_error

UNUSED = "was not used by the job"
PERHAPS_SERVED = "was worked on by others, perhaps for the job"
"""Why a GPU is not in the total (`excluded`) though the job's work may have been done there."""

RUN_DIR_VARIABLE = "PEPR_RUN_DIR"
"""Names the run that a process is already part of; `profile()` joins it."""


_MOST_BYTES = 32 << 20
"""The size of a run.json; those with 200 metrics and the processes of 64 GPUs have 1 MB."""


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically: a reader sees the old one or the new one, never a part."""
    replace_file(path, f"{json.dumps(value, indent=1, allow_nan=False)}\n".encode())


def boot_id() -> str:
    """Which boot of which machine CLOCK_MONOTONIC is of; empty if the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def read_run(directory: Path, *, validate: bool = True) -> dict[str, Any]:
    """The contents of a run directory's run.json. Raises TraceError if that is not one.

    With `validate` False its shape is not checked: the check takes 0.7 ms, 20 times as long as the
    rest, which counts for 100,000 runs. The caller must then expect any of MALFORMED.
    """
    path = f"{directory}{os.sep}run.json"
    try:
        data = read_file(path, most_bytes=_MOST_BYTES)
        run = json.loads(data) if validate else _loads_quickly(data)
    except FileNotFoundError:
        raise TraceError(
            f"{directory} is not a run", why="it has no run.json", fix="see: pepr-profile runs list"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            fix="check what it is and its permissions",
        ) from None
    schema = run.get("schema") if isinstance(run, dict) else None
    if schema != 1:
        raise TraceError(
            f"{path} has schema {schema!r}",
            why="this version reads schema 1",
            fix="update pepr-profiler",
        )
    if wrong := shape_error(run, _RUN_SHAPE) if validate else "":
        raise _damaged(path, wrong)
    if validate and _ODD_NUMBER.search(data):
        _forget_odd_numbers(run)
    return dict(run)


_ODD_NUMBER = re.compile(rb"NaN|Infinity|[eE]\+?[0-9]{3}")
"""What a number that is not finite may look like; looking at each number would take 20 times as
long."""


def _forget_odd_numbers(value: Any) -> None:
    """Makes numbers that are not finite unknown, which are left under keys that nobody checked.

    They are no JSON: a summary with one of them could not be written.
    """
    waiting = [value]
    while waiting:
        node = waiting.pop()
        for key, item in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(item, dict | list):
                waiting.append(item)
            elif isinstance(item, float) and not -math.inf < item < math.inf:
                node[key] = None


def _loads_quickly(data: bytes) -> Any:
    """As json.loads, in a fifth of its time. Importing orjson takes 2 MB."""
    from orjson import JSONDecodeError, loads

    try:
        return loads(data)
    except JSONDecodeError:
        value = json.loads(data)  # it also reads NaN and names that are not Unicode
        if isinstance(value, dict):
            _forget_odd_numbers(value)  # an index could not be read with them
        return value


def _damaged(path: str, why: str) -> TraceError:
    return TraceError(
        f"{path} is damaged", why=why, fix="restore it; the lanes beside it are intact"
    )


_Shape = dict[Any, Any]
_TEXT, _NUMBER, _COUNT, _BY_NAME = (
    (str, None),
    (float, None),
    (int, None),
    ({...: (float, None)}, None),
)
_WARNING: _Shape = {None: ("code", "text", "hint"), ...: str}
_COMPONENT: _Shape = {
    None: ("id", "kind", "source", "provenance", "label", "in_total", "job_j", "u_j", "trace_w"),
    **dict.fromkeys(("id", "kind", "source", "provenance", "label"), str),
    **dict.fromkeys(("device_j", "job_j", "others_j", "idle_j", "idle_w", "job_idle_j"), _NUMBER),
    **dict.fromkeys(("u_j", "mean_w", "max_w"), _NUMBER),
    "in_total": bool,
    "excluded": _TEXT,
    "trace_w": ([_NUMBER], None),
    "budget": ({None: ("gain_j", "offset_j", "model_j"), ...: _NUMBER}, None),
    "cross_check": ({"source": str, "energy_j": _NUMBER, "difference_j": _NUMBER}, None),
}
_PARTIAL: list[_Shape] = [{None: ("id", "missing_s"), "id": str, "missing_s": float}]
_ENERGY: _Shape = {
    None: ("total_j", "u_j", "mean_w", "provenance", "components"),
    **dict.fromkeys(("total_j", "u_j", "mean_w", "others_j", "idle_j"), _NUMBER),
    "provenance": _TEXT,
    "scope": str,
    "components": [_COMPONENT],
    "partial": _PARTIAL,
}
_PHASE: _Shape = {
    None: ("name", "count", "duration_s", "energy_j", "u_j"),
    **{"name": str, "count": int, "duration_s": float, "energy_j": _NUMBER, "u_j": _NUMBER},
    "partial": _PARTIAL,
}
_PROGRESS: _Shape = {
    None: ("t_s", "energy_j", "u_j", "metrics", "left_out"),
    **{"t_s": [float], "energy_j": ([float], None), "u_j": ([float], None)},
    **{"metrics": {...: [_NUMBER]}, "left_out": int},
}
_COST: _Shape = {
    **dict.fromkeys(("cpu_s", "cpu_fraction", "samples", "dropped"), _NUMBER),
    **dict.fromkeys(("late", "timed", "failed_reads"), _NUMBER),
    **dict.fromkeys(("rate_hz", "refresh_s", "wasted"), _BY_NAME),
    "overhead": ({"budget": float, "used": float, "gap_s": {...: float}}, None),
}
_PEAKS = ("peak_rss_bytes", "gpu_peak_bytes")
_INTENSITY: _Shape = {
    **{"g_per_kwh": float, "source": str, "year": _COUNT},
    **dict.fromkeys(("region", "iso3"), _TEXT),
}
_RECORDING: _Shape = {
    "window_ns": [_COUNT],
    "profiler_pid": _COUNT,
    "cpu": {...: (str, int, None)},
    "options": {
        "intensity": (_INTENSITY, None),
        **{"pue": float, "performance": _TEXT, "scope": str},
    },
    "attached": ([{"pid": int, "command": [str]}], None),
    "root": str,
    "cuda": [{...: _TEXT}],
    "outer": ({None: ("run_id",), "run_id": str, "pid": _COUNT}, None),
    "exit": (
        {
            **{"ended_by": _TEXT, "max_rss_bytes": _NUMBER},
            **{"submitter": _TEXT, "found_cpu_s": _NUMBER, "empty_cgroup": _TEXT},
        },
        None,
    ),
    "sampler": (_COST, None),
    "daemon": (
        {
            **{"socket": _TEXT, "version": _TEXT, "reconnects": _COUNT},
            "lanes": {...: {"spec": str, "coarse": bool}},
        },
        None,
    ),
    "warnings": [_WARNING],
}
_RUN_SHAPE: _Shape = {
    **dict.fromkeys(("run_id", "name", "host"), str),
    **dict.fromkeys(("job", "experiment", "boot_id", "started_at"), _TEXT),
    **dict.fromkeys(("node", "launcher"), _TEXT),
    **dict.fromkeys(("rank", "local_rank", "world_size", "local_world_size", "attempt"), _COUNT),
    "inner_ranks": [{None: ("rank",), "rank": int, ...: _COUNT}],
    **dict.fromkeys(("duration_s", "time_s"), _NUMBER),
    **dict.fromkeys(("exit_code", "signal"), _COUNT),
    "command": [str],
    "complete": bool,
    "clock": [{None: ("t_ns", "unix_ns"), "t_ns": int, "unix_ns": int}],
    "energy": (_ENERGY, None),
    "phases": [_PHASE],
    "memory": {
        None: _PEAKS,
        **dict.fromkeys((*_PEAKS, "cgroup_peak_bytes"), _NUMBER),
        "cgroup_peak_source": str,
    },
    "carbon": ({None: ("g_co2e",), "g_co2e": _NUMBER, "source": str, "year": _COUNT}, None),
    "metrics": {...: _NUMBER},
    "progress": (_PROGRESS, None),
    "performance": ({None: ("metric", "value"), "metric": str, "value": float}, None),
    "sampler": _COST,
    "missing": [{None: ("what", "why", "fix"), ...: str}],
    "files": {...: {None: ("bytes", "crc32"), "bytes": int, "crc32": str}},
    "warnings": [_WARNING],
    "recording": _RECORDING,
}
"""The shape of run.json (docs/design.md, Contract). It says little of what must be there: who uses
a value looks for it."""


def has_ended(run: Mapping[str, Any]) -> bool:
    """Whether a run.json is a whole summary; if not, the run is to be summarised anew."""
    return bool(run.get("complete")) and bool(run.get("energy")) and run.keys() >= _ALWAYS


_ALWAYS = {
    *("run_id", "name", "experiment", "job", "command", "host", "started_at", "exit_code"),
    *("duration_s", "time_s", "memory", "carbon", "metrics", "performance"),
}
"""What every summary has had since the first version."""


def read_live_run(directory: Path) -> dict[str, Any] | None:
    """The facts of a run that is being recorded; None if it has ended or cannot be read."""
    try:
        run = read_run(directory)
    except TraceError:
        return None
    return run if not run.get("complete") and recorder_lives(run) else None


def recorder_lives(run: Mapping[str, Any]) -> bool:
    """Whether the profiler of an unfinished run may still be alive."""
    here = boot_id()
    if not here or run.get("boot_id") != here:
        return False
    pid = (run.get("recording") or {}).get("profiler_pid")
    return pid is None or Path(f"/proc/{pid}").exists()


def files_of(directory: Path) -> tuple[int, int]:
    """The latest change of a directory's files, ns, and their size in all; 0, 0 if it has none."""
    changed_ns = size = 0
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                found = entry.stat()
                changed_ns, size = max(changed_ns, found.st_mtime_ns), size + found.st_size
    return changed_ns, size
