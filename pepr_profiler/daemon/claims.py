"""What part of each device is surely a run's, second by second, while the run goes on.

How a device's energy is shared depends on its idle draw, which a run knows when it is over. The
rule is linear in it, so that the smaller of the shares at its two ends is certain before. The
node's daemon turns these into joules for its metrics (docs/daemon.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pepr_profiler.energy.activity import cpu_use, read_activity
from pepr_profiler.energy.gpu_users import read_gpu_users
from pepr_profiler.energy.sharing import certain_shares
from pepr_profiler.trace.lane import Batch, LaneInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pepr_profiler.daemon_client.client import RawRows

SECOND_NS = 1_000_000_000
CPU = "cpu"
"""What is shared by CPU time: all CPUs and their memory. A GPU is called gpu:UUID."""

_LAG_S = 3  # a GPU's use may be told by the second read after it, and that is read twice a second
_EACH_S = 2
MOST_S = 8
"""Seconds in one claim."""


class Claims:
    """The certain shares of whole seconds of CLOCK_MONOTONIC, each told once."""

    def __init__(self) -> None:
        self._lanes: dict[str, tuple[LaneInfo, list[Batch]]] = {}
        self._owners: dict[int, Mapping[str, Any]] = {}
        self._next_s: int | None = None

    def take(self, lane: LaneInfo, rows: RawRows) -> None:
        """What the lane of processes, or a list of a GPU's, has read."""
        _, t_ns, read_ns, columns = rows
        batch = Batch(
            np.frombuffer(t_ns, np.int64),
            np.frombuffer(read_ns, np.uint32).astype(np.int64),
            np.array([np.frombuffer(column, np.float64) for column in columns]),
        )
        self._lanes.setdefault(lane.name, (lane, []))[1].append(batch)

    def note(self, facts: Mapping[str, Any]) -> None:
        """Whose a process on a GPU is."""
        if facts.get("event") == "process":
            self._owners[int(facts["pid"])] = facts

    def due(self, *, last: bool = False) -> tuple[int, dict[str, list[float]]] | None:
        """The first second and the shares from it on, by device; None if none are due.

        `last`: nothing more is coming, so that nothing is waited for.
        """
        lane, batches = self._lanes.get("processes", (None, []))
        if lane is None or not batches:
            return None
        if self._next_s is None:
            self._next_s = -int(-batches[0].t_ns[0] // SECOND_NS)
        begin_s = self._next_s
        end_s = int(batches[-1].t_ns[-1]) // SECOND_NS - (0 if last else _LAG_S)
        if end_s - begin_s < (1 if last else _EACH_S):
            return None
        begin_s = max(begin_s, end_s - MOST_S)
        shares = self._shares(np.arange(begin_s, end_s + 1, dtype=np.int64) * SECOND_NS)
        self._next_s = end_s
        self._forget((end_s - _LAG_S) * SECOND_NS)
        return begin_s, shares

    def _shares(self, edges_ns: NDArray[np.int64]) -> dict[str, list[float]]:
        begin_ns, end_ns = int(edges_ns[0]), int(edges_ns[-1])
        found: dict[str, list[float]] = {}
        for name, (lane, batches) in self._lanes.items():
            if name == "processes":
                activity = read_activity(lane, batches)
                if activity is not None and len(activity.t_ns) > 1:
                    use = cpu_use(activity, begin_ns, end_ns)
                    found[CPU] = _rounded(certain_shares(use, edges_ns))
                continue
            notes = list(self._owners.values())
            told = read_gpu_users(lane, batches, notes, begin_ns=begin_ns, end_ns=end_ns)
            for uuid, tenants in told.items():
                whole = tenants.first_ns <= begin_ns and tenants.last_ns >= end_ns
                if whole and not tenants.unknown_s:
                    found[f"gpu:{uuid}"] = _rounded(certain_shares(tenants.use, edges_ns))
        return {device: shares for device, shares in found.items() if any(shares)}

    def _forget(self, before_ns: int) -> None:
        for _, batches in self._lanes.values():
            while len(batches) > 1 and batches[1].t_ns[0] <= before_ns:
                del batches[0]


def _rounded(shares: NDArray[np.float64]) -> list[float]:
    """To a millionth, downwards: a claim is never more than what is certain."""
    certain: list[float] = (np.floor(1e6 * np.clip(shares, 0.0, 1.0)) / 1e6).tolist()
    return certain
