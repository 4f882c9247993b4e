"""What lists, filters and comparisons need to know of one run, as one flat record.

A store may hold 100,000 runs. Their whole summaries would take twenty times as long to load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pepr_profiler.record import Record
from pepr_profiler.trace.run_json import PERHAPS_SERVED
from pepr_profiler.units import utf8_text

STATES = ("done", "failed", "incomplete")
"""How a run may have ended: with status 0 or none (if it was attached to), otherwise, or not."""

CAUSES = ("gain_j", "offset_j", "model_j")
"""The entries of an uncertainty budget that runs on the same device share."""


class Facts(Record):
    """One run; None is unknown.

    `run_id` is the name of its directory, `recorded_id` the id that it was recorded with, which
    differs in a copy that was renamed. `outer_id` is the run that it was recorded inside. `rank` is
    which of the `world_size` processes of its job it recorded.
    `metric` and `performance` are the run's own. `state` is one of STATES. A run that cannot be
    read has no state, but `why` and `fix`.

    `kinds` are the kinds of devices whose energy is known, or known to be none of the run's, with a
    comma behind each. Four facts are JSON, which is only parsed where it is needed: `command` (a
    list, only where the run has its script's name), `metrics` (a number or null for each name),
    `errors` (for each device in the total a list: its name, then the values of CAUSES in J), and
    `lost` (for each device that its total lacks: its id, and for which part of the time).
    """

    run_id: str
    recorded_id: str = ""
    started_at: str = ""
    name: str = ""
    experiment: str | None = None
    host: str | None = None
    job: str | None = None
    rank: float | None = None
    world_size: float | None = None
    outer_id: str | None = None
    provenance: str | None = None
    scope: str | None = None
    state: str | None = None
    duration_s: float | None = None
    time_s: float | None = None
    exit_code: float | None = None
    signal: float | None = None
    total_j: float | None = None
    u_j: float | None = None
    peak_rss_bytes: float | None = None
    gpu_peak_bytes: float | None = None
    g_co2e: float | None = None
    metric: str | None = None
    performance: float | None = None
    command: str | None = None
    metrics: str = "{}"
    errors: str = "[]"
    kinds: str = ""
    lost: str = "[]"
    why: str = ""
    fix: str = ""
    run_json: str = ""
    files: str | None = None

    @property
    def label(self) -> str:
        """What the run is called beside others: its id, and its name if the id lacks it."""
        return self.run_id if self.run_id.startswith(self.name) else f"{self.name} ({self.run_id})"


def facts_of(run: Mapping[str, Any], *, run_id: str | None = None) -> Facts:
    """The facts of a summary, of the directory `run_id`; raises MALFORMED for what is none."""
    energy, memory = run["energy"], run["memory"]
    carbon, performance = run.get("carbon") or {}, run.get("performance") or {}
    outer = (run.get("recording") or {}).get("outer") or {}
    name, host, recorded_id = _text(run["name"]), run.get("host"), _text(run["run_id"])
    errors = []
    for component in energy.get("components") or ():
        budget = component.get("budget")
        if component["in_total"] and budget:  # without: all of its u counts as the run's own
            # The length, so that no host and component together are another's.
            place = str(component.get("host") or host)  # a job has devices of several hosts
            device = f"{len(place)}:{place}{component['id']}"
            errors.append([device, *(_number(budget[cause]) for cause in CAUSES)])
    return Facts(
        run_id=recorded_id if run_id is None else run_id,
        recorded_id=recorded_id,
        started_at=_text(run.get("started_at") or ""),
        name=name,
        experiment=_optional(run.get("experiment")),
        host=_optional(host),
        job=_optional(run.get("job")),
        rank=_number(run.get("rank")),
        world_size=_number(run.get("world_size")),
        outer_id=_optional(outer.get("run_id")),
        provenance=_optional(energy.get("provenance")),
        scope=_text(energy.get("scope", "job")),
        state=state_of(run),
        duration_s=_number(run.get("duration_s")),
        time_s=_number(run["time_s"]),
        exit_code=_number(run["exit_code"]),
        signal=_number(run.get("signal")),
        total_j=_number(energy["total_j"]),
        u_j=_number(energy.get("u_j")),
        peak_rss_bytes=_number(memory.get("peak_rss_bytes")),
        gpu_peak_bytes=_number(memory.get("gpu_peak_bytes")),
        g_co2e=_number(carbon.get("g_co2e")),
        metric=_optional(performance.get("metric")),
        performance=_number(performance.get("value")),
        command=_command_of_unnamed(name, run.get("command")),
        metrics=dump({str(key): _number(value) for key, value in run["metrics"].items()}),
        errors=dump(errors),
        **_devices_of(energy, _number(run.get("duration_s"))),
    )


def _devices_of(energy: Mapping[str, Any], duration_s: float | None) -> dict[str, str]:
    """The facts `kinds` and `lost`. Summaries of old do not say what is missing for a time."""
    components = energy.get("components") or ()
    unknown = {c["id"] for c in components if c["in_total"] and c["job_j"] is None}
    partial = {part["id"]: _number(part["missing_s"]) for part in energy.get("partial") or ()}
    served = {c["id"] for c in components if c.get("excluded") == PERHAPS_SERVED}
    lost = dict.fromkeys(unknown | served, 1.0)
    for ident, missing_s in partial.items():
        lost[ident] = min(1.0, (missing_s or 0.0) / duration_s) if duration_s else 1.0
    kinds = sorted({_text(c["kind"]) for c in components if c["id"] not in lost})
    return {
        "kinds": "".join(f"{kind}," for kind in kinds),
        "lost": dump([[_text(ident), part] for ident, part in sorted(lost.items())]),
    }


def state_of(run: Mapping[str, Any]) -> str:
    """How a run ended; one of STATES."""
    if not run["complete"]:
        return "incomplete"
    return "failed" if run["exit_code"] else "done"


def dump(value: Any) -> str:
    """JSON; characters that are no Unicode (of a name from a byte string) become `?`."""
    from orjson import dumps

    try:
        return dumps(value).decode()
    except TypeError:
        return _text(json.dumps(value, ensure_ascii=False))


def is_unicode(text: str) -> bool:
    """Whether a text can be stored; names from the file system may be any bytes."""
    return text.isascii() or _text(text) == text


def _text(value: Any) -> str:
    text = utf8_text(str(value))
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _optional(value: Any) -> str | None:
    return None if value is None else _text(value)


def _number(value: Any) -> float | None:
    """A number; None for NaN and for anything else that a damaged summary may have there."""
    if not isinstance(value, (int, float)) or value != value:  # noqa: PLR0124 - faster than isnan
        return None
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds
        return None


def _command_of_unnamed(name: str, command: Any) -> str | None:
    """The command of a run that was given no name and so has its script's; as JSON."""
    words = [str(word) for word in command or ()]
    # Most names are in no word, which is quick to see.
    for word in words:
        if name in word:
            path = Path(word)
            if name in (path.name, path.stem, path.suffix[1:]):
                return dump(words)
    return None
