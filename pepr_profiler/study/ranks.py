"""The ranks of a job: what each took, who waited for whom, and what the missing ones may have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pepr_profiler.energy.uncertainty import summed_u_j
from pepr_profiler.record import Floats
from pepr_profiler.study.draws import coverage_factor
from pepr_profiler.summary.doubts import ranks_disagree

Summary = Mapping[str, Any]


class RankShare(NamedTuple):
    """What one rank has of a job, or a recording without a rank: that of a whole node."""

    rank: int | None
    local_rank: int | None
    node: str
    host: str | None
    boot_id: str
    run_id: str
    energy_j: float | None
    u_j: float | None
    duration_s: float
    peak_rss_bytes: int | None
    gpu_peak_bytes: int | None
    complete: bool

    def as_dict(self, total_j: float | None) -> dict[str, Any]:
        """As `ranks` of a job's summary has it."""
        values = self._asdict()
        del values["boot_id"]
        known = self.energy_j is not None and total_j
        return {**values, "share": self.energy_j / total_j if known else None}  # type: ignore[operator]


class Pass(NamedTuple):
    """One pass of a rank through a phase, by the wall clock."""

    name: str
    rank: int | None
    run_id: str
    begin_s: float
    end_s: float

    @property
    def who(self) -> tuple[bool, int, str]:
        """Whose it is: a rank's, or that of a recording in which no rank is known."""
        return (False, self.rank, "") if self.rank is not None else (True, 0, self.run_id)


def spans_by_name(passes: Iterable[Pass]) -> dict[str, list[tuple[float, float]]]:
    """When each phase was passed through, by whomever."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in passes:
        found.setdefault(one.name, []).append((one.begin_s, one.end_s))
    return found


def stragglers_of(passes: Iterable[Pass]) -> list[dict[str, Any]]:
    """How long each rank waited at the end of each phase until the last rank was done, s.

    The first pass of a rank is compared with the first passes of the others, and so on. Phases that
    only one rank marked are left out. Clocks of several nodes differ by what NTP leaves, some ms.
    """
    names: dict[str, dict[tuple[bool, int, str], list[Pass]]] = {}
    for one in passes:
        names.setdefault(one.name, {}).setdefault(one.who, []).append(one)
    found = []
    for name, by_rank in names.items():
        if len(by_rank) < 2:
            continue
        ends_s = {
            who: np.array(
                [p.end_s for p in sorted(own, key=lambda p: (p.begin_s, p.end_s))], dtype=np.float64
            )
            for who, own in sorted(by_rank.items())
        }
        count = sorted(map(len, ends_s.values()))[-2]  # more passes than another has end alone
        last_s: Floats = np.full(count, -math.inf)
        for own_s in ends_s.values():
            compared = own_s[:count]
            last_s[: len(compared)] = np.maximum(last_s[: len(compared)], compared)
        for who, own_s in ends_s.items():
            compared = own_s[:count]
            wait_s = last_s[: len(compared)] - compared
            found.append(
                {
                    "phase": name,
                    "rank": None if who[0] else who[1],
                    "run_id": by_rank[who][0].run_id,
                    "passes": len(compared),
                    "median_s": float(np.median(wait_s)),
                    "max_s": float(np.max(wait_s)),
                    "total_s": float(np.sum(wait_s)),
                    "was_last": int(np.count_nonzero(wait_s == 0)),
                }
            )
    return found


class MachineRest(NamedTuple):
    """What the recordings of a machine leave of its devices to ranks that nobody recorded.

    `ranks` are those on the machine, recorded or not; None is unknown. `left_j` is what is neither
    the recorded ranks' nor of devices that they could not see, infinite where it has no bound.
    """

    ranks: set[int] | None
    left_j: float


def imputed(
    shares: Sequence[RankShare],
    missing: Sequence[int],
    energy: Mapping[str, Any],
    rests: Sequence[MachineRest],
) -> dict[str, Any] | None:
    """What the missing ranks may have taken, apart from the total; None if none is missing.

    Each is taken to be as the mean of those that are there. The estimate of the whole job then has
    their errors, scaled up, and what single ranks differ by: s·√(M + M²/n) for M missing and n
    present ones whose energies have the standard deviation s. Those on a recorded machine took no
    more than the present ones leave of its devices. Where that is less than their means by more
    than the ±, the ± is unknown. If nobody says whether they were there, the estimate is too.
    """
    if not missing:
        return None
    known_j = np.array(
        [s.energy_j for s in shares if s.rank is not None and s.energy_j is not None],
        dtype=np.float64,
    )
    n, m = len(known_j), len(missing)
    total_j, u_j = energy["total_j"], energy["u_j"]
    result: dict[str, Any] = {"ranks": m, "missing_j": None, "total_j": None, "u_j": None}
    if not n or total_j is None:
        return {**result, "how": "the energy of no rank is known"}
    mean_j = math.fsum(known_j) / n
    placed = [len(rest.ranks.intersection(missing)) for rest in rests if rest.ranks is not None]
    left_j = [rest.left_j for rest in rests if rest.ranks is not None]
    elsewhere_j = (m - sum(placed)) * mean_j
    unplaced_j = math.fsum(rest.left_j for rest in rests if rest.ranks is None)
    unsure = any(rest.ranks is None for rest in rests) and _exceeds(elsewhere_j, unplaced_j)
    less = [_exceeds(count * mean_j, most_j) for count, most_j in zip(placed, left_j, strict=True)]
    mean = "that of the present one" if n == 1 else f"the mean of the {n} present ones"
    if unsure or (any(less) and energy["partial"]):
        why = "some devices were not read all the time" if not unsure else (
            "it is unknown which ranks were on their machines"
        )  # fmt: skip
        more = f"{mean} is more than is left of the recorded devices, and {why}"
        return {**result, "how": more}
    how = f"{'the missing rank is' if m == 1 else f'each of the {m} missing ranks is'} taken " + (
        f"to be as {'the present one' if n == 1 else mean}"
    )
    missing_j = elsewhere_j + math.fsum(
        most_j if is_less else count * mean_j
        for count, most_j, is_less in zip(placed, left_j, less, strict=True)
    )
    if any(less):
        how += ", but no more than is left of the devices of its machine"
    result |= {"missing_j": missing_j, "total_j": total_j + missing_j, "how": how}
    if n > 1 and u_j is not None and not energy["partial"]:
        spread_j = float(np.std(known_j, ddof=1)) * math.sqrt(m + m**2 / n)
        estimate_u_j = math.hypot(u_j * (1 + m / n), float(coverage_factor(n - 1)) * spread_j)
        if m * mean_j - missing_j <= estimate_u_j:
            result["u_j"] = estimate_u_j
    elif n == 1:
        result["how"] += "; how much ranks differ is unknown, as there is one"
    return result


def _exceeds(energy_j: float, most_j: float) -> bool:
    """Whether it is more, by more than rounding."""
    return energy_j > most_j + 1e-9 * abs(energy_j)


def nodes_of(
    shares: Sequence[RankShare],
    components: Mapping[str, Sequence[Mapping[str, Any]]],
    energy: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The nodes of a job: what their ranks have, together. `components` are by boot."""
    by_boot: dict[str, list[RankShare]] = {}
    for share in shares:
        by_boot.setdefault(share.boot_id, []).append(share)
    total_j = energy["total_j"]
    nodes = []
    for boot_id, own in by_boot.items():
        known = [share.energy_j for share in own if share.energy_j is not None]
        energy_j = math.fsum(known) if known else None
        devices = [
            c for c in components.get(boot_id, ()) if c["in_total"] and c["device_j"] is not None
        ]
        nodes.append(
            {
                "node": own[0].node,
                "host": own[0].host,
                "ranks": sorted(share.rank for share in own if share.rank is not None),
                "energy_j": energy_j,
                "u_j": summed_u_j(devices) if devices else None,
                "share": energy_j / total_j if energy_j is not None and total_j else None,
                "duration_s": max(share.duration_s for share in own),
                "peak_rss_bytes": _sum_of_known(share.peak_rss_bytes for share in own),
                "gpu_peak_bytes": _sum_of_known(share.gpu_peak_bytes for share in own),
            }
        )
    return nodes


def _sum_of_known(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def metrics_of(
    runs: Sequence[tuple[int | None, Summary]],
) -> tuple[dict[str, Any], dict[str, Any] | None, list[dict[str, str]]]:
    """A job's metrics, its performance, and a warning if its ranks disagree about that.

    `runs` are (rank, summary), those whose word counts more first: a metric is the first one's that
    has it.
    """
    metrics: dict[str, Any] = {}
    for _, run in runs:
        metrics = {**(run.get("metrics") or {}), **metrics}
    performances = (run.get("performance") for _, run in runs)
    performance = next((dict(found) for found in performances if found), None)
    if performance is None:
        return metrics, None, []
    name = performance["metric"]
    values = {rank: (run.get("metrics") or {}).get(name) for rank, run in runs if rank is not None}
    return metrics, performance, list(ranks_disagree(name, performance["value"], values))
