"""The jobs of a store: found by an id, and put together from their recordings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.store.facts import Facts
from pepr_profiler.store.runs import LAST, Store
from pepr_profiler.study.jobs import JobRecordings, jobs_of
from pepr_profiler.summary.summarise import with_passes

_NAMED = 8


def load_job(store: Store, ref: str) -> tuple[JobRecordings, dict[str, Any]]:
    """The recordings of a job, and its summary (docs/jobs.md), computed from them.

    `ref` is the id of a job, a unique prefix of one, the id of a run in it, or `last`, the job of
    the newest run. A recording that cannot be read is named in the summary's `missing`.

    UsageError if there is no such job, or more than one. TraceError if nothing of it can be read.
    """
    rows = store.find().rows
    of_job = _rows_of(ref, rows, store)
    wanted = {row.run_id for row in of_job}
    parts: list[JobRecordings] = []
    unread: list[dict[str, str]] = []
    first_error: PeprError | None = None
    for row in _related(of_job, rows):
        try:
            parts.append(_read(store, row.run_id))
        except PeprError as error:
            first_error = first_error or error
            unread.append({"what": f"recording {row.run_id}", "why": error.why, "fix": error.fix})
    jobs = [job for job in jobs_of(parts) if wanted.intersection(job.run_ids)]
    if not jobs:
        assert first_error is not None
        raise first_error
    if len(jobs) > 1:
        listed = "; ".join(" ".join(job.run_ids[:3]) for job in jobs[:_NAMED])
        raise UsageError(
            f"job '{ref}' is {len(jobs)} jobs of that id",
            why=f"their recordings are one after the other, or of the same rank: {listed}",
            fix=f"name one by a run in it: pepr-profile report --job {jobs[-1].run_ids[0]}",
        )
    summary = jobs[0].summary()
    summary["missing"] = [*summary["missing"], *unread]
    return jobs[0], summary


def _read(store: Store, run_id: str) -> JobRecordings:
    directory = store.runs_path / run_id
    summary, passes = with_passes(directory)
    return JobRecordings.of({**summary, "run_id": run_id}, passes)


def _rows_of(ref: str, rows: Sequence[Facts], store: Store) -> list[Facts]:
    """The recordings that a reference names: all of one job id, or one run.

    Others of that run's job id may be of a job before it: `jobs_of` decides.
    """
    ids = sorted({row.job for row in rows if row.job is not None})
    names = [ref] if ref in ids else []
    if not names and ref == LAST and rows:
        return [rows[-1]]
    if not names:
        exact = [row for row in rows if row.run_id == ref]
        if exact:
            return exact[:1]
        names = [name for name in ids if name.startswith(ref)]
    if len(names) == 1:
        return [row for row in rows if row.job == names[0]]
    if names:
        raise UsageError(
            f"job '{ref}' is ambiguous",
            why=f"it could be {_listed(names)}",
            fix="give more of its id",
        )
    runs = [row for row in rows if row.run_id.startswith(ref)]
    if len(runs) == 1:
        return runs
    newest = list(dict.fromkeys(row.job for row in reversed(rows) if row.job is not None))
    if not rows:
        why = f"{store} has no runs"
    elif newest:
        why = f"the jobs in {store.path} are {_listed([repr(str(job)) for job in newest])}"
    else:
        why = f"no run in {store.path} is part of a job"
    raise UsageError(
        f"there is no job '{ref}'",
        why=why,
        fix="name a job, a run in it, or last; record one: pepr-profile --job ID -- CMD",
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}"


def _related(chosen: Sequence[Facts], rows: Sequence[Facts]) -> list[Facts]:
    """With the others of their jobs, those around them and those inside, oldest first."""
    by_job: dict[str, list[Facts]] = {}
    by_id: dict[str, list[Facts]] = {}
    inside: dict[str, list[Facts]] = {}
    for row in rows:
        by_id.setdefault(row.recorded_id or row.run_id, []).append(row)
        if row.job is not None:
            by_job.setdefault(row.job, []).append(row)
        if row.outer_id is not None:
            inside.setdefault(row.outer_id, []).append(row)
    found: dict[str, Facts] = {}
    left = list(chosen)
    while left:
        row = left.pop()
        if row.run_id in found:
            continue
        found[row.run_id] = row
        left += inside.get(row.recorded_id or row.run_id, ())
        left += by_id.get(row.outer_id, ()) if row.outer_id is not None else ()
        left += _at_once(row, by_job[row.job]) if row.job is not None else ()
    return [row for row in rows if row.run_id in found]


_CLOCKS_APART_S = 5.0
"""Clocks of nodes may differ by so much; how much they do is found out from the recordings."""


def _at_once(row: Facts, rows: Sequence[Facts]) -> list[Facts]:
    """Those that overlap a run in time, so that a long sweep of one id is not read for one step."""
    begin_s, end_s = _span_s(row)
    spans = [(other, *_span_s(other)) for other in rows]
    return [
        other
        for other, first_s, last_s in spans
        if first_s <= end_s + _CLOCKS_APART_S and begin_s <= last_s + _CLOCKS_APART_S
    ]


def _span_s(row: Facts) -> tuple[float, float]:
    """When a run was, as far as its facts tell; one that still goes on has no end."""
    try:
        begin_s = datetime.fromisoformat(row.started_at.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return -math.inf, math.inf
    if row.state == "incomplete" or row.duration_s is None:
        return begin_s, math.inf
    return begin_s, begin_s + row.duration_s
