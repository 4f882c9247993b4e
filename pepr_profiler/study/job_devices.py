"""The recordings of a job as arrays: what all devices took, each instant of each device once.

A row is one device in one recording. All are worked out together: 1,000 nodes with 4 recordings
each have 44,000 rows (`python -m benchmarks.jobs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pepr_profiler.energy.uncertainty import UncertaintyBudget
from pepr_profiler.record import Floats, Ints, Mask
from pepr_profiler.trace.events import PhaseSpan

Summary = Mapping[str, Any]
Span = tuple[float, float]
RunKey = tuple[str, str]
"""Boot and run id."""

_MOST_RANKS = 1 << 20
"""A larger world is a damaged number."""

BUCKETS = 48
"""Steps of power over time in a summary."""

_NUMBERS = (
    *("device_j", "job_j", "others_j", "idle_j", "idle_w", "job_idle_j"),
    *("u_j", "mean_w", "max_w"),
)
_DEVICE_J, _JOB_J, _OTHERS_J, _IDLE_J, _IDLE_W, _JOB_IDLE_J, _U_J, _MEAN_W, _MAX_W = range(9)

_CAUSES = UncertaintyBudget._fields
_ALIKE = np.isin(
    _CAUSES,
    ("gain_j", "offset_j", "model_j", "duty_j", "aliasing_j", "disagreement_j", "attribution_j"),
)
"""Causes that err alike in all recordings of a device: its sensor's scale, the model, and what the
sensor does not look at, whoever reads it. The others are drawn anew by each recording's reads."""
_ATTRIBUTION = _CAUSES.index("attribution_j")


class Recording(NamedTuple):
    """One recording as it is merged: its summary, with the figures of its devices in arrays.

    `numbers` (c, 9) are _NUMBERS of each component, `budgets` (c, 11) its _CAUSES, `traces_w`
    (c, 48) its power over time; NaN is unknown. `window_ns` is its begin and end by its boot's
    clock, `clock_ns` one instant by that clock and by the wall clock. `passes` are its phases one
    by one, if they were read.
    """

    key: RunKey
    run: Summary
    window_ns: tuple[int, int]
    clock_ns: tuple[int, int]
    components: Sequence[Mapping[str, Any]]
    numbers: Floats
    budgets: Floats
    traces_w: Floats
    passes: Sequence[PhaseSpan]

    @classmethod
    def of(cls, summary: Summary, passes: Sequence[PhaseSpan] = ()) -> Recording:
        """The recording of a summary. Raises MALFORMED if it does not say when it was."""
        begin_ns, end_ns = summary["recording"]["window_ns"]
        if end_ns is None:
            end_ns = begin_ns + round((summary.get("duration_s") or 0.0) * 1e9)
        clock = summary["clock"][0]
        whole = summary["energy"]["components"]
        energy = {key: value for key, value in summary["energy"].items() if key != "components"}
        budgets = [component.get("budget") or {} for component in whole]
        return cls(
            key=(str(summary.get("boot_id")), str(summary["run_id"])),
            run={**summary, "energy": energy},
            window_ns=(int(begin_ns), int(end_ns)),
            clock_ns=(int(clock["t_ns"]), int(clock["unix_ns"])),
            components=[{k: v for k, v in c.items() if k not in _IN_ARRAYS} for c in whole],
            numbers=_table([[c.get(name) for name in _NUMBERS] for c in whole], len(_NUMBERS)),
            budgets=_table(
                [[b.get(cause, 0.0) if b else None for cause in _CAUSES] for b in budgets],
                len(_CAUSES),
            ),
            traces_w=_table([_trace_of(c.get("trace_w")) for c in whole], BUCKETS),
            passes=passes,
        )

    @property
    def begin_ns(self) -> int:
        """When it began, by the wall clock as it read that itself."""
        return self.window_ns[0] - self.clock_ns[0] + self.clock_ns[1]

    @property
    def outer_key(self) -> RunKey | None:
        """The recording that it was made inside of, by a process of that one's job."""
        outer = (self.run.get("recording") or {}).get("outer") or {}
        return (self.key[0], str(outer["run_id"])) if outer.get("run_id") else None

    @property
    def rank(self) -> int | None:
        return self.run.get("rank")

    @property
    def knows_allocation(self) -> bool:
        """Whether its job is known only as an allocation, in which several programs may run."""
        job = str(self.run.get("job"))
        return self.rank is None and "/" not in job and job.startswith(("slurm-", "k8s-"))

    @property
    def rank_on_node(self) -> tuple[str, int | None] | None:
        """What a program has once: a rank on its node, or all that an allocation has on a machine.

        None if it is neither: no rank is known, and others of the job may be beside it.
        """
        if self.knows_allocation:
            return self.host, None
        return None if self.rank is None else (self.node, self.rank)

    @property
    def host(self) -> str:
        """The name of the machine."""
        return str(self.run.get("host") or self.node)

    @property
    def node(self) -> str:
        """The node as its launcher calls it, else its host."""
        return str(self.run.get("node") or self.run.get("host") or self.key[0])

    @property
    def world_size(self) -> int | None:
        """How many ranks the job has, as far as this recording knows."""
        inner = self.run.get("inner_ranks") or ()
        sizes = [self.run.get("world_size"), *(facts.get("world_size") for facts in inner)]
        return max((size for size in sizes if size and size <= _MOST_RANKS), default=None)

    @property
    def covered_ranks(self) -> set[int] | None:
        """The ranks whose processes are in it; None if it has no rank and cannot tell.

        Without a rank it is of all that ran on its node: of each rank that marked phases in it, and
        of all others of that one's node.
        """
        if self.rank is not None:
            return {self.rank}
        covered: set[int] = set()
        for facts in self.run.get("inner_ranks") or ():
            beside = _ranks_beside(facts)
            if beside is None:
                return None
            covered.update(beside)
        return covered or None

    @property
    def ranks_of_node(self) -> set[int] | None:
        """The ranks on its node, recorded or not; None if unknown."""
        if self.rank is None:
            return self.covered_ranks
        beside = _ranks_beside(self.run)
        return None if beside is None else set(beside)


def _ranks_beside(facts: Mapping[str, Any]) -> range | None:
    """The ranks on the node of one, by what that says of itself; None if it does not say."""
    local, size = facts.get("local_rank"), facts.get("local_world_size")
    if local is None or size is None or size > _MOST_RANKS:
        return None
    first = facts["rank"] - local
    return range(first, first + size)


_IN_ARRAYS = {*_NUMBERS, "trace_w", "budget"}


def _table(rows: Sequence[Sequence[Any]], columns: int) -> Floats:
    return np.array(rows, dtype=np.float64).reshape(-1, columns)


def _trace_of(trace_w: Sequence[float | None] | None) -> Sequence[float | None]:
    """Power over time in BUCKETS steps; recordings of others may have more, fewer or none."""
    if trace_w and len(trace_w) == BUCKETS:
        return trace_w
    if not trace_w:
        return [None] * BUCKETS
    return [trace_w[int((i + 0.5) * len(trace_w) / BUCKETS)] for i in range(BUCKETS)]


def spans_of(recordings: Sequence[Recording]) -> list[Span]:
    """When each was recorded, in wall-clock s.

    For all of one boot the earliest reading of both clocks is used: another one may differ by what
    the wall clock was set, and would move them against each other.
    """
    return [
        ((begin_ns + offset_ns) * 1e-9, (end_ns + offset_ns) * 1e-9)
        for begin_ns, end_ns, offset_ns in windows_ns(recordings)
    ]


def windows_ns(recordings: Sequence[Recording]) -> Iterator[tuple[int, int, int]]:
    """Begin and end of each by its boot's clock, and what that is behind the wall clock."""
    clocks: dict[str, tuple[int, int]] = {}
    for one in recordings:
        clocks[one.key[0]] = min(one.clock_ns, clocks.get(one.key[0], one.clock_ns))
    for one in recordings:
        t_ns, unix_ns = clocks[one.key[0]]
        yield *one.window_ns, unix_ns - t_ns


def chain_of(i: int, outer: Sequence[int | None]) -> list[int]:
    """What a recording is inside of, the nearest first."""
    found: list[int] = []
    at = outer[i]
    while at is not None and at not in found:
        found.append(at)
        at = outer[at]
    return found


def device_of(one: Recording, component: Mapping[str, Any]) -> tuple[str, str]:
    """Where a component is, and its id; a GPU with a UUID is the same wherever it is seen."""
    ident = component["id"]
    return ("" if ident.startswith("gpu:GPU-") else one.key[0], ident)


class JobDevices:
    """All devices that some recordings saw. A row is one device in one recording.

    The rows of a device stand together, the longest recording first; the device of a row is
    `device`, its recording is `run`, its component is `parts[row]`.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        spans: Sequence[Span],
        outer: Sequence[int | None],
    ) -> None:
        self._recordings = recordings
        self._outer = outer
        scopes = {one.run["energy"].get("scope", "job") for one in recordings}
        self.scope = scopes.pop() if len(scopes) == 1 else "job"
        self._edges_s = np.linspace(min(s[0] for s in spans), max(s[1] for s in spans), BUCKETS + 1)
        number: dict[tuple[str, str], int] = {}
        devices, runs, parts = [], [], []
        for i, one in enumerate(recordings):
            for component in one.components:
                devices.append(number.setdefault(device_of(one, component), len(number)))
                runs.append(i)
                parts.append(component)
        self._count = len(number)
        device, run = np.array(devices, dtype=np.int64), np.array(runs, dtype=np.int64)
        at_s = np.array(spans, dtype=np.float64).reshape(-1, 2)[run]
        # Rows of a device from the longest on; of equally long ones in the recordings' order.
        order = np.lexsort((np.arange(len(run)), at_s[:, 0] - at_s[:, 1], device))
        self._device, self._run, self._at_s = device[order], run[order], at_s[order]
        self._parts = [parts[i] for i in order]
        self._numbers, self._budgets, self._traces_w = (
            np.concatenate([getattr(one, name) for one in recordings])[order]
            for name in ("numbers", "budgets", "traces_w")
        )
        self._in_total = np.array([part["in_total"] for part in self._parts], dtype=np.bool_)
        self._known = np.isfinite(self._numbers[:, _DEVICE_J])

    def merged(self) -> tuple[list[dict[str, Any]], Floats]:
        """The component of each device, and what each recording has of the total, J."""
        known, numbers, device = self._known, self._numbers, self._device
        device_j, idle_j, seen_s, traces_w = self._over_time()
        around = self._rows_around()
        own = known & self._in_total & (around < 0)
        rows_j = np.where(known, numbers[:, _JOB_J], 0.0)
        job_j = np.minimum(self._sum(np.where(own, rows_j, 0.0)), device_j)
        idle_j = np.minimum(idle_j, device_j - job_j)
        others_j = device_j - job_j - idle_j
        with np.errstate(divide="ignore", invalid="ignore"):
            not_job = np.where(device_j > 0, 1.0 - job_j / device_j, 0.0)
        budgets, us_j = self._uncertainty(own, not_job)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_w = np.where(seen_s > 0, device_j / seen_s, np.nan)
        columns = {
            "device_j": device_j,
            "job_j": job_j,
            "others_j": others_j,
            "idle_j": idle_j,
            "idle_w": self._extreme(_IDLE_W, np.fmin),
            "job_idle_j": self._sum_of_known(numbers[:, _JOB_IDLE_J], own),
            "u_j": us_j,
            "mean_w": mean_w,
            "max_w": self._extreme(_MAX_W, np.fmax),
        }
        first_known = _first_of(device, known, self._count)
        first_own = _first_of(device, own, self._count)
        first = _first_of(device, np.ones(len(device), dtype=np.bool_), self._count)
        several = len({one.key[0] for one in self._recordings}) > 1
        components = []
        for i in range(self._count):
            row = int(first_known[i] if first_known[i] >= 0 else first[i])
            part = self._parts[row]
            where = {"host": self._recordings[self._run[row]].host} if several else {}
            if first_known[i] < 0:
                components.append({**part, **where, **dict.fromkeys(_NUMBERS_AND_MORE)})
                continue
            component = {**part, **where, "in_total": bool(first_own[i] >= 0)}
            if first_own[i] >= 0:
                counted = self._parts[int(first_own[i])]
                component |= {"source": counted["source"], "provenance": counted["provenance"]}
                component.pop("excluded", None)
            component |= {name: _or_none(float(column[i])) for name, column in columns.items()}
            component["trace_w"] = [_or_none(watts) for watts in traces_w[i].tolist()]
            budget = [_or_none(u_j) for u_j in budgets[i].tolist()]
            known = dict(zip(_CAUSES, budget, strict=True))
            component["budget"] = None if budget[0] is None else known
            components.append(component)
        return components, self._of_runs_j(own, around, job_j, device_j)

    def by_boot(self, components: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """The components by the boot that saw them first; see `merged`."""
        first = _first_of(self._device, np.ones(len(self._device), dtype=np.bool_), self._count)
        found: dict[str, list[dict[str, Any]]] = {}
        for component, row in zip(components, first.tolist(), strict=True):
            found.setdefault(self._recordings[self._run[row]].key[0], []).append(component)
        return found

    def _of_runs_j(self, own: Mask, around: Ints, job_j: Floats, device_j: Floats) -> Floats:
        """What each recording has of the total; what is inside another is part of that one's.

        Where the recordings' parts of a device are more than that, each has less in proportion. So
        have those side by side in another one: they have no more than the device took in the union
        of their times, nor than the one around them counts.
        """
        column = _DEVICE_J if self.scope == "device" else _JOB_J
        counted_j = device_j if self.scope == "device" else job_j
        rows_j = np.where(self._known & self._in_total, self._numbers[:, column], 0.0)
        sums_j = self._sum(np.where(own, rows_j, 0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(sums_j > 0, counted_j / sums_j, 1.0)[self._device]
        rows = np.flatnonzero(around >= 0)
        if len(rows):
            inside_j = np.bincount(around[rows], rows_j[rows], minlength=len(around))
            most_j = np.minimum(rows_j, self._union_j(rows, around))
            with np.errstate(divide="ignore", invalid="ignore"):
                inner = np.where(inside_j > most_j, most_j / inside_j, 1.0)
            at = around.copy()
            for _ in self._recordings:  # one step further out each time
                rows = rows[at[rows] >= 0]
                if not len(rows):
                    break
                scale[rows] *= inner[at[rows]]
                at[rows] = around[at[rows]]
        of_runs_j = np.bincount(self._run, rows_j * scale, minlength=len(self._recordings))
        return np.asarray(of_runs_j, dtype=np.float64)

    def _union_j(self, rows: Ints, around: Ints) -> Floats:
        """What the device took in the union of the rows inside each row (m,); 0 if none is."""
        chosen = rows[self._known[rows]]
        pieces, begins_s, ends_s = self._pieces(
            chosen[np.argsort(around[chosen], kind="stable")], around
        )
        curves_j = self._curves_j()
        parts_j = self._until_j(curves_j, pieces, ends_s)
        parts_j -= self._until_j(curves_j, pieces, begins_s)
        sums_j = np.bincount(around[pieces], parts_j, minlength=len(around))
        return np.asarray(sums_j, dtype=np.float64)

    def _sum(self, values: Floats) -> Floats:
        """The sum of each device's rows (D,)."""
        return np.asarray(
            np.bincount(self._device, values, minlength=self._count), dtype=np.float64
        )

    def _sum_of_known(self, values: Floats, chosen: Mask) -> Floats:
        """The sum of what is known of the chosen rows; NaN if nothing is."""
        known = chosen & np.isfinite(values)
        sums = self._sum(np.where(known, values, 0.0))
        return np.where(self._sum(known.astype(np.float64)) > 0, sums, np.nan)

    def _extreme(self, column: int, ufunc: np.ufunc) -> Floats:
        result = np.full(self._count, np.nan)
        ufunc.at(result, self._device[self._known], self._numbers[self._known, column])
        return result

    def _rows_around(self) -> Ints:
        """The row of the same device in the nearest recording around each one's (m,), else -1."""
        around = np.full(len(self._run), -1, dtype=np.int64)
        if all(outer is None for outer in self._outer):
            return around
        chains = [chain_of(i, self._outer) for i in range(len(self._outer))]
        known = np.flatnonzero(self._known)
        seen = zip(self._device[known].tolist(), self._run[known].tolist(), strict=True)
        places = dict(zip(seen, known.tolist(), strict=True))
        for row in known.tolist():
            device, run = int(self._device[row]), int(self._run[row])
            found = (places.get((device, outer)) for outer in chains[run])
            around[row] = next((place for place in found if place is not None), -1)
        return around

    # --- over time ---

    def _over_time(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Of each device: its energy, the idle part, how long it was seen, its power over time."""
        rows, begins_s, ends_s = self._pieces(np.flatnonzero(self._known), self._device)
        curves_j = self._curves_j()
        at = self._device[rows]
        parts_j = self._until_j(curves_j, rows, ends_s) - self._until_j(curves_j, rows, begins_s)
        whole_j, idle_j = self._numbers[rows, _DEVICE_J], self._numbers[rows, _IDLE_J]
        with np.errstate(divide="ignore", invalid="ignore"):
            idle_j = np.where(whole_j > 0, idle_j * parts_j / whole_j, 0.0)
        traces_w = np.full((self._count, BUCKETS), np.nan)
        for chunk in np.array_split(np.arange(len(rows)), max(1, len(rows) // _CHUNK)):
            if not len(chunk):
                continue
            cut_s = np.clip(self._edges_s, begins_s[chunk, None], ends_s[chunk, None])
            so_far_j = self._until_j(curves_j, rows[chunk, None], cut_s)
            energy_j, seen_s = np.diff(so_far_j, axis=1), np.diff(cut_s, axis=1)
            first = np.flatnonzero(np.diff(at[chunk], prepend=-1))
            energy_j = np.add.reduceat(energy_j, first)
            seen_s = np.add.reduceat(seen_s, first)
            with np.errstate(divide="ignore", invalid="ignore"):
                watts = np.where(seen_s > 0, energy_j / seen_s, np.nan)
            traces_w[at[chunk][first]] = watts
        device_j, idle_sum_j, seen_s = (
            np.asarray(np.bincount(at, values, minlength=self._count), dtype=np.float64)
            for values in (parts_j, idle_j, ends_s - begins_s)
        )
        return device_j, idle_sum_j, seen_s, traces_w

    def _pieces(self, known: Ints, groups: Ints) -> tuple[Ints, Floats, Floats]:
        """The part of each row's time that no row of its group before it has: row, begin, end.

        The rows `known` of a group stand together. A row's group is `groups[row]`.
        """
        rows, begins_s, ends_s = [], [], []
        seen: list[Span] = []
        before = -1
        listed = zip(known.tolist(), groups[known].tolist(), self._at_s[known].tolist(),
                     strict=True)  # fmt: skip
        for row, group, (begin_s, end_s) in listed:
            if group != before:
                seen, before = [], group
            elif len(seen) == 1 and seen[0][0] <= begin_s and end_s <= seen[0][1]:
                continue  # as nearly all: the longest was there all the time
            for piece in uncovered((begin_s, end_s), seen):
                rows.append(row)
                begins_s.append(piece[0])
                ends_s.append(piece[1])
            seen = union_of([*seen, (begin_s, end_s)])
        return np.array(rows, dtype=np.int64), np.array(begins_s), np.array(ends_s)

    def _curves_j(self) -> Floats:
        """The energy of each row up to the edges of its own steps, (m, 49).

        Where the power is unknown, the energy that the known power does not account for is spread
        evenly: 0 for a counter, which was not read there, the held value for a model.
        """
        device_j = self._numbers[:, _DEVICE_J, None]
        step_s = (self._at_s[:, 1] - self._at_s[:, 0])[:, None] / BUCKETS
        unread = np.isnan(self._traces_w)
        steps_j = np.where(unread, 0.0, self._traces_w * step_s)
        count = unread.sum(axis=1, keepdims=True)
        left_j = np.maximum(0.0, device_j - steps_j.sum(axis=1, keepdims=True))
        steps_j += np.where(unread, left_j / np.maximum(count, 1), 0.0)
        so_far_j = np.cumsum(steps_j, axis=1)
        last_j = so_far_j[:, -1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            so_far_j *= np.where(last_j != 0, device_j / last_j, 0.0)
        return np.concatenate((np.zeros((len(so_far_j), 1)), so_far_j), axis=1)

    def _until_j(self, curves_j: Floats, rows: Ints, at_s: Floats) -> Floats:
        """The energy of rows from their begin to some instants within them."""
        begin_s, end_s = self._at_s[rows, 0], self._at_s[rows, 1]
        place = (at_s - begin_s) / (end_s - begin_s) * BUCKETS
        step = np.clip(place.astype(np.int64), 0, BUCKETS - 1)
        low_j, high_j = curves_j[rows, step], curves_j[rows, step + 1]
        return np.asarray(low_j + (place - step) * (high_j - low_j))

    # --- how sure it is ---

    def _uncertainty(self, own: Mask, not_job: Floats) -> tuple[Floats, Floats]:
        """The budget (D, 11), k = 1, and u (D,), k = 2, of each device's share of the job.

        How sure a share is depends on how much of the device others had (energy.sharing). Of ranks
        that share it each is another to the others; to the job they are not.
        """
        chosen = own.copy()
        not_counted = np.setdiff1d(self._device[self._known], self._device[own])
        chosen[_first_of(self._device, self._known, self._count)[not_counted]] = True
        rows = np.flatnonzero(chosen)
        device, budgets = self._device[rows], self._budgets[rows].copy()
        whole_j = self._numbers[rows, _DEVICE_J]
        with np.errstate(divide="ignore", invalid="ignore"):
            not_own = 1.0 - self._numbers[rows, _JOB_J] / whole_j
            scale = np.where(not_own > 0, not_job[device] / not_own, 1.0)
        alone = np.bincount(device, minlength=self._count)[device] == 1
        scale = np.where(alone | ~np.isfinite(scale), 1.0, np.minimum(scale, 1.0))
        budgets[:, _ATTRIBUTION] *= scale
        unknown = np.isnan(budgets[:, 0])
        summed = np.full((self._count, len(_CAUSES)), np.nan)
        for cause in range(len(_CAUSES)):
            values = np.where(unknown, 0.0, budgets[:, cause])
            values = np.abs(values) if _ALIKE[cause] else values**2
            sums = np.bincount(device, values, minlength=self._count)
            summed[:, cause] = sums if _ALIKE[cause] else np.sqrt(sums)
        of_known = np.bincount(device, ~unknown, minlength=self._count)
        us_j = 2 * np.sqrt((summed**2).sum(axis=1))
        # Without a budget nobody knows what of it is drawn anew: all of it adds up.
        plain = np.bincount(device, unknown, minlength=self._count) > 0
        linear_j = self._sum_of_known(self._numbers[:, _U_J], chosen)
        summed[of_known == 0] = np.nan
        return summed, np.where(plain, linear_j, us_j)


_CHUNK = 8192
_NUMBERS_AND_MORE = (*_NUMBERS, "trace_w", "budget")


def _first_of(device: Ints, chosen: Mask, count: int) -> Ints:
    """The first chosen row of each device (D,); -1 if it has none."""
    first = np.full(count, -1, dtype=np.int64)
    rows = np.flatnonzero(chosen)[::-1]
    first[device[rows]] = rows
    return first


def union_of(spans: Iterable[Span]) -> list[Span]:
    """The union of some spans: in order, and no two of them touch."""
    union: list[Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def uncovered(span: Span, seen: Iterable[Span]) -> list[Span]:
    """The parts of a span that none of those seen, which are in order, covers."""
    left, at = [], span[0]
    for begin, end in seen:
        if begin > at:
            left.append((at, min(begin, span[1])))
        at = max(at, end)
    left.append((at, span[1]))
    return [(begin, end) for begin, end in left if end > begin]


def length_s(spans: Iterable[Span]) -> float:
    return math.fsum(end - begin for begin, end in spans)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
