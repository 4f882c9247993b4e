"""Joules of the runs that are registered, for the metrics: what is surely theirs, second by second.

A client claims a part of a device in a second; what the device took in that second is known here.
Claims are believed as far as there is something to claim: all users together have at most the
device, and who claims no more than an equal part has it, whatever others claim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pepr_profiler.daemon.meters import Meter
from pepr_profiler.energy.sources import Source

SETTLED_S = 15
"""So long after a second its energy is given out; a claim that comes later is not heard."""

_KEPT_S = 60.0  # a run that has ended is told of for so long, for scrapers to see its last figure
_BY_CPU_TIME = ("cpu", "dram")


@dataclass
class _Place:
    """A run that is told of, under a number that means nothing."""

    number: int
    energy_j: dict[str, float] = field(default_factory=dict)  # by kind of device
    claims: dict[int, dict[str, float]] = field(default_factory=dict)  # by second and device
    registered: int = 1  # how often: a client may have come back before its loss was noticed
    gone_at_s: float = 0.0


class Ledger:
    """Who is told of, and what is theirs. Called by the daemon's thread only; seconds are whole.

    There are `most` numbers and no more, of which a user has `most_per_user` at a time; the one
    that was free for longest is given out next.
    """

    def __init__(self, *, most: int = 256, most_per_user: int = 32) -> None:
        self._free = deque(range(most))
        self._most_per_user = most_per_user
        self._places: dict[tuple[int, str], _Place] = {}
        self._devices: frozenset[str] = frozenset()
        self._next_s = 0

    def enter(self, uid: int, run: str) -> bool:
        """Whether a run is told of from now on."""
        place = self._places.get((uid, run))
        if place is not None:
            place.registered += 1
            return True
        mine = sum(owner == uid for owner, _ in self._places)
        if not self._free or mine >= self._most_per_user:
            return False
        self._places[uid, run] = _Place(self._free.popleft())
        return True

    def leave(self, uid: int, run: str, now_s: float) -> None:
        place = self._places.get((uid, run))
        if place is not None:
            place.registered -= 1
            place.gone_at_s = now_s

    def number(self, uid: int, run: str) -> int | None:
        """What a run is called in the metrics; None if it is not told of."""
        place = self._places.get((uid, run))
        return None if place is None else place.number

    def claim(
        self, uid: int, run: str, first_s: int, shares: Mapping[str, Sequence[float]], now_s: float
    ) -> None:
        """Takes in parts, in [0, 1], of devices in the seconds from `first_s` on.

        What is settled, has not been yet, or is of no device of ours is not heard.
        """
        place = self._places.get((uid, run))
        if place is None:
            return
        for device in self._devices.intersection(shares):
            for second, share in enumerate(shares[device], first_s):
                if self._next_s <= second <= now_s - 1:
                    place.claims.setdefault(second, {})[device] = share

    def settle(self, meters: Iterable[Meter], now_s: float) -> None:
        """Gives out the energy of the seconds that are old enough; forgets runs long gone."""
        by_device: dict[str, list[Meter]] = {}
        for meter in meters:
            if (device := _device(meter.source)) is not None:
                by_device.setdefault(device, []).append(meter)
        self._devices = frozenset(by_device)
        end_s = int(now_s) - SETTLED_S
        claimed = {second for place in self._places.values() for second in place.claims}
        for second in sorted(s for s in claimed if s < end_s):
            for device, of_device in by_device.items():
                self._give_out(second, device, of_device)
            for place in self._places.values():
                place.claims.pop(second, None)
        self._next_s = max(self._next_s, end_s)
        for key, place in list(self._places.items()):
            if place.registered <= 0 and now_s - place.gone_at_s >= _KEPT_S:
                self._free.append(place.number)
                del self._places[key]

    def __iter__(self) -> Iterator[tuple[int, str, float]]:
        """Number of a run, kind of device, joules."""
        for place in self._places.values():
            for kind, energy_j in place.energy_j.items():
                yield place.number, kind, energy_j

    def _give_out(self, second: int, device: str, meters: Iterable[Meter]) -> None:
        of_users: dict[int, float] = {}
        for (uid, _), place in self._places.items():
            share = place.claims.get(second, {}).get(device, 0.0)
            of_users[uid] = of_users.get(uid, 0.0) + share
        granted = fair(of_users)
        for meter in meters:
            energy_j = meter.in_second_j(second)
            if energy_j is None:
                continue
            for (uid, _), place in self._places.items():
                share = place.claims.get(second, {}).get(device, 0.0)
                if share > 0:
                    part_j = energy_j * share * granted[uid] / of_users[uid]
                    kind = meter.source.kind
                    place.energy_j[kind] = place.energy_j.get(kind, 0.0) + part_j


def fair(claims: Mapping[int, float]) -> dict[int, float]:
    """What each has of 1: its claim, or where there is too little, an equal part of what is left.

    Max-min fair: whoever claims least is served first, so that nobody gains by claiming more than
    the others, and a claim of an equal part at most is granted whatever the others claim.
    """
    left, granted = 1.0, {}
    waiting = len(claims)
    for claimant, claim in sorted(claims.items(), key=lambda item: item[1]):
        granted[claimant] = min(claim, left / waiting)
        left -= granted[claimant]
        waiting -= 1
    return granted


def _device(source: Source) -> str | None:
    """What a client calls it (`claims.py`); None if it adds to no total or counts no energy."""
    if not (source.counter and source.in_total):
        return None
    if source.kind in _BY_CPU_TIME:
        return "cpu"
    return source.id if source.kind == "gpu" else None
