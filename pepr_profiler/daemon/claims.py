"""The part of each device's energy that is certainly a run's, for each second of it.

A run's share of a device depends on the device's idle draw, which is known when the run is over.
But it depends linearly, and the idle draw is between nothing and all of the draw: the smaller of
the shares at these two ends is certain at once. The daemon turns it into joules for its metrics
(docs/daemon.md). A recorder calls it through the protocol `Claims` of recording/watches.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.daemon_client.protocol import CPU_DEVICE
from pepr_profiler.energy.activity import cpu_use, read_activity
from pepr_profiler.energy.gpu_users import read_gpu_users
from pepr_profiler.energy.sharing import certain_shares
from pepr_profiler.record import Floats, Ints
from pepr_profiler.trace.lane import Batch, LaneInfo

if TYPE_CHECKING:
    from pepr_profiler.daemon_client.client import RawRows

MOST_S = 8
"""Seconds in one claim."""

_LAG_S = 3  # the driver may report a GPU's use two reads late, and is read twice a second
_EACH_S = 2
_SECOND_NS = 1_000_000_000


class RunClaims:
    """The certain shares of a run in whole seconds of CLOCK_MONOTONIC, each given out once."""

    def __init__(self) -> None:
        self._lanes: dict[str, tuple[LaneInfo, list[Batch]]] = {}
        self._owners: dict[int, Mapping[str, Any]] = {}
        self._divided: list[tuple[int, bool]] = []  # from an instant on
        self._next_s: int | None = None

    def on_rows(self, lane: LaneInfo, rows: RawRows) -> None:
        """Takes new rows of the process lane or of a lane that lists a GPU's processes."""
        _, t_ns, read_ns, columns = rows
        batch = Batch(
            np.frombuffer(t_ns, np.int64),
            np.frombuffer(read_ns, np.uint32).astype(np.int64),
            np.array([np.frombuffer(column, np.float64) for column in columns]),
        )
        self._lanes.setdefault(lane.name, (lane, []))[1].append(batch)

    def on_note(self, facts: Mapping[str, Any]) -> None:
        """Takes a note: whose a process on a GPU is, or that blocks of a process divide it."""
        if facts.get("event") == "process":
            self._owners[int(facts["pid"])] = facts
        elif facts.get("event") == "blocks":
            self._divided.append((int(facts["t_ns"]), bool(facts["divided"])))

    def due(self, *, last: bool = False) -> tuple[int, dict[str, list[float]]] | None:
        """The first second and the shares from it on, by device; None if no claim is due.

        `last`: there will be no more rows, so it does not wait for any.
        """
        lane, batches = self._lanes.get("processes", (None, []))
        if lane is None or not batches:
            return None
        if self._next_s is None:
            self._next_s = -int(-batches[0].t_ns[0] // _SECOND_NS)
        begin_s = self._next_s
        end_s = int(batches[-1].t_ns[-1]) // _SECOND_NS - (0 if last else _LAG_S)
        if end_s - begin_s < (1 if last else _EACH_S):
            return None
        begin_s = max(begin_s, end_s - MOST_S)
        shares = self._shares(np.arange(begin_s, end_s + 1, dtype=np.int64) * _SECOND_NS)
        self._next_s = end_s
        self._forget((end_s - _LAG_S) * _SECOND_NS)
        return begin_s, shares

    def _shares(self, edges_ns: Ints) -> dict[str, list[float]]:
        begin_ns, end_ns = int(edges_ns[0]), int(edges_ns[-1])
        if self._is_divided(begin_ns, end_ns):  # nothing of the process is certainly this block's
            return {}
        found: dict[str, list[float]] = {}
        for name, (lane, batches) in self._lanes.items():
            if name == "processes":
                activity = read_activity(lane, batches)
                if activity is not None and len(activity.t_ns) > 1:
                    use = cpu_use(activity, begin_ns, end_ns)
                    found[CPU_DEVICE] = _rounded(certain_shares(use, edges_ns))
                continue
            notes = list(self._owners.values())
            gpus = read_gpu_users(lane, batches, notes, begin_ns=begin_ns, end_ns=end_ns)
            for uuid, users in gpus.items():
                whole = users.first_ns <= begin_ns and users.last_ns >= end_ns
                if whole and not users.unknown_s:
                    found[f"gpu:{uuid}"] = _rounded(certain_shares(users.use, edges_ns))
        return {device: shares for device, shares in found.items() if any(shares)}

    def _is_divided(self, begin_ns: int, end_ns: int) -> bool:
        """Whether the process was divided between blocks at some time from begin to end."""
        while len(self._divided) > 1 and self._divided[1][0] <= begin_ns:
            del self._divided[0]
        return any(divided and since_ns < end_ns for since_ns, divided in self._divided)

    def _forget(self, before_ns: int) -> None:
        for _, batches in self._lanes.values():
            while len(batches) > 1 and batches[1].t_ns[0] <= before_ns:
                del batches[0]


def _rounded(shares: Floats) -> list[float]:
    """Rounded down to a millionth: a claim is never more than what is certain."""
    certain: list[float] = (np.floor(1e6 * np.clip(shares, 0.0, 1.0)) / 1e6).tolist()
    return certain
