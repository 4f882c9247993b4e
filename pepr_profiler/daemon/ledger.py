"""Adds up the certain energy of each registered run (claims.py), for the metrics.

A client claims a part of a device in a second, and the daemon knows what the device took then. It
grants what there is: all users together get at most the device, and whoever claims no more than an
equal part gets it, whatever others claim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pepr_profiler.daemon.meters import Meter
from pepr_profiler.daemon_client.protocol import CPU_DEVICE
from pepr_profiler.energy.sources import Source

SETTLED_S = 15
"""The energy of a second is given out so long after it. A claim that comes later is ignored."""

_KEPT_S = 60.0  # a run stays so long after its end, for scrapers to see its last figure
_BY_CPU_TIME = ("cpu", "dram")


@dataclass
class _Entry:
    """A run in the metrics, under a number that means nothing."""

    number: int
    energy_j: dict[str, float] = field(default_factory=dict)  # by kind of device
    claims: dict[int, dict[str, float]] = field(default_factory=dict)  # by second and device
    registered: int = 1  # how often: a client may have come back before its loss was noticed
    gone_at_s: float = 0.0


class Ledger:
    """The runs in the metrics, and what each has taken. Only the daemon's thread calls it.

    There are `most` numbers, of which a user has `most_per_user` at a time. The number that was
    free for longest is given out next.
    """

    def __init__(
        self, *, most: int = 256, most_per_user: int = 32, settled_s: int = SETTLED_S
    ) -> None:
        self._settled_s = settled_s
        self._free = deque(range(most))
        self._most_per_user = most_per_user
        self._entries: dict[tuple[int, str], _Entry] = {}
        self._devices: frozenset[str] = frozenset()
        self._next_s = 0

    def enter(self, uid: int, run: str) -> bool:
        """Takes a run in, if there is a number for it; returns whether it is in the metrics."""
        entry = self._entries.get((uid, run))
        if entry is not None:
            entry.registered += 1
            return True
        mine = sum(owner == uid for owner, _ in self._entries)
        if not self._free or mine >= self._most_per_user:
            return False
        self._entries[uid, run] = _Entry(self._free.popleft())
        return True

    def leave(self, uid: int, run: str, now_s: float) -> None:
        entry = self._entries.get((uid, run))
        if entry is not None:
            entry.registered -= 1
            entry.gone_at_s = now_s

    def number(self, uid: int, run: str) -> int | None:
        """The number of a run in the metrics; None if it is not in them."""
        entry = self._entries.get((uid, run))
        return None if entry is None else entry.number

    def claim(
        self, uid: int, run: str, first_s: int, shares: Mapping[str, Sequence[float]], now_s: float
    ) -> None:
        """Takes in parts, in [0, 1], of devices in the whole seconds from `first_s` on.

        Ignored are seconds that are settled or not over, and devices that we do not measure.
        """
        entry = self._entries.get((uid, run))
        if entry is None:
            return
        for device in self._devices.intersection(shares):
            for second, share in enumerate(shares[device], first_s):
                if self._next_s <= second <= now_s - 1:
                    entry.claims.setdefault(second, {})[device] = share

    def settle(self, meters: Iterable[Meter], now_s: float) -> None:
        """Gives out the energy of the seconds that are old enough, and forgets runs long gone."""
        by_device: dict[str, list[Meter]] = {}
        for meter in meters:
            if (device := _device(meter.source)) is not None:
                by_device.setdefault(device, []).append(meter)
        self._devices = frozenset(by_device)
        end_s = int(now_s) - self._settled_s
        claimed = {second for entry in self._entries.values() for second in entry.claims}
        for second in sorted(s for s in claimed if s < end_s):
            for device, of_device in by_device.items():
                self._give_out(second, device, of_device)
            for entry in self._entries.values():
                entry.claims.pop(second, None)
        self._next_s = max(self._next_s, end_s)
        for key, entry in list(self._entries.items()):
            if entry.registered <= 0 and now_s - entry.gone_at_s >= _KEPT_S:
                self._free.append(entry.number)
                del self._entries[key]

    def __iter__(self) -> Iterator[tuple[int, str, float]]:
        """Number of a run, kind of device, joules."""
        for entry in self._entries.values():
            for kind, energy_j in entry.energy_j.items():
                yield entry.number, kind, energy_j

    def _give_out(self, second: int, device: str, meters: Iterable[Meter]) -> None:
        of_users: dict[int, float] = {}
        for (uid, _), entry in self._entries.items():
            share = entry.claims.get(second, {}).get(device, 0.0)
            of_users[uid] = of_users.get(uid, 0.0) + share
        granted = fair(of_users)
        for meter in meters:
            energy_j = meter.in_second_j(second)
            if energy_j is None:
                continue
            for (uid, _), entry in self._entries.items():
                share = entry.claims.get(second, {}).get(device, 0.0)
                if share > 0:
                    part_j = energy_j * share * granted[uid] / of_users[uid]
                    kind = meter.source.kind
                    entry.energy_j[kind] = entry.energy_j.get(kind, 0.0) + part_j


def fair(claims: Mapping[int, float]) -> dict[int, float]:
    """How much of 1 each claimant gets: its claim, or an equal part of what is left if less.

    Max-min fair: who claims least is served first. So nobody gains by claiming more than others,
    and a claim of at most an equal part is granted whatever others claim.
    """
    left, granted = 1.0, {}
    waiting = len(claims)
    for claimant, claim in sorted(claims.items(), key=lambda item: item[1]):
        granted[claimant] = min(claim, left / waiting)
        left -= granted[claimant]
        waiting -= 1
    return granted


def _device(source: Source) -> str | None:
    """The device of a claim that a source measures; None if no joules of it can be claimed."""
    if not (source.counter and source.in_total):
        return None
    if source.kind in _BY_CPU_TIME:
        return CPU_DEVICE
    return source.id if source.kind == "gpu" else None
