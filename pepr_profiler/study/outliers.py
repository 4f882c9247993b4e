"""Readings of a cohort that cannot be right, named by evidence and not because they are fewer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pepr_profiler import units
from pepr_profiler.record import Floats, Ints

JUMP = 3.0
"""Sorted ratios with a step of this factor are two kinds of readings. A judgement: between good
rows of the paper's tables the steps stay below 2.3; its wrong energies, ten times the power of the
server, make a step of 9."""

_AGREEING = 8  # rows that must agree before another one counts as an outlier
_ALONE = 4  # times as many rows must agree as stand apart, else both are populations
_MOST_W = 15_000.0  # an NVIDIA DGX B200, the largest single server of 2025, draws 14.3 kW
_DIGITS = 6  # two readings that agree in as many do so by copying


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Rows of one group whose reading is wrong: `what` does not fit, and `why`."""

    rows: tuple[int, ...]
    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class TwoPopulations:
    """The rows of a group are of two kinds, and nothing says which is right; accuses none.

    `spans` are the ratios of each side: "203.1 W … 736.4 W".
    """

    sides: tuple[tuple[int, ...], tuple[int, ...]]
    spans: tuple[str, str]
    what: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was found out about the rows of one group, by their numbers in the whole table.

    `same` is a text about readings that are equal to all digits, where nothing says which of them
    is the copy.
    """

    findings: tuple[Finding, ...] = ()
    populations: TwoPopulations | None = None
    same: str = ""

    def within(self, rows: Sequence[int]) -> Evidence:
        """The same with the places of the rows in `rows`, which are those of the group."""
        place = {row: at for at, row in enumerate(rows)}

        def at(those: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(place[row] for row in those)

        two = self.populations
        if two is not None:
            two = replace(two, sides=(at(two.sides[0]), at(two.sides[1])))
        findings = tuple(replace(each, rows=at(each.rows)) for each in self.findings)
        return Evidence(findings=findings, populations=two, same=self.same)


@dataclass(frozen=True, eq=False, kw_only=True)
class Companion:
    """A quantity (n,) that the resource should grow with: time, whose ratio is a mean power."""

    name: str
    unit: str
    values: Floats


@dataclass(eq=False, kw_only=True)
class _Group:
    """The rows of one group as they are sorted out by their ratio to a companion.

    `rows` agree with each other, `odd` are wrong (and why), and each of `apart` is a few rows that
    agree with each other and not with `rows`. `whole` are all rows that have a ratio.
    """

    rows: Ints
    whole: Ints
    apart: list[Ints] = field(default_factory=list)
    odd: list[tuple[Ints, str]] = field(default_factory=list)
    sides: tuple[Ints, Ints] | None = None

    @property
    def settled(self) -> bool:
        """Whether its rows are of one kind, or it is known which kind is wrong."""
        return self.sides is None and all(len(few) == 1 for few in self.apart)


def find_evidence(
    values: Floats,
    groups: Sequence[Sequence[int]],
    companions: Sequence[Companion],
    *,
    name: str,
    unit: str,
    who: Callable[[int], str],
) -> list[Evidence]:
    """What is wrong with a resource (n,) of which NaN is left out, for each of `groups` of rows.

    Three kinds of evidence, in this order. A reading that equals another row's to all digits, with
    another time, is a copy where its ratio to the time does not fit and the other's does. One row
    that stands apart from 8 or more which agree is an outlier. Where the ratios are of two
    populations, however few the one has, the one is wrong that does not agree with the other
    groups, or that no server can draw; where neither is known, none is accused. Each holds only
    where resource and companion really grow together. `name` and `unit` are those of the resource,
    `who` names a row.
    """
    found = [Evidence() for _ in groups]
    if unit == "B":
        # Models of one study may need very different memory, but a slip of units is a factor 1000.
        for k, rows in enumerate(groups):
            group = _split(np.asarray(rows), values, jump=30.0)
            group.odd += [(few, "") for few in group.apart]
            found[k] = Evidence(findings=_named(group, values, name, unit))
        return found
    for companion in companions:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(companion.values > 0, values / companion.values, np.nan)
        copies = _copies(values, ratio, companion, groups, name=name, unit=unit)
        fresh = np.where(np.isin(np.arange(len(values)), list(copies)), np.nan, ratio)
        split = [_split(np.asarray(rows, dtype=np.intp), fresh) for rows in groups]
        scale_w, assumed = _watts(name, unit, companion)
        shown = ""
        if unit and scale_w is not None:
            ratio, fresh, scale_w, shown = ratio * scale_w, fresh * scale_w, 1.0, "W"
        what = f"{name} per {companion.name}"
        for k, group in enumerate(split):
            others = [g.rows for i, g in enumerate(split) if i != k and g.settled]
            _judge(group, ratio, others, scale_w=scale_w, unit=shown, assumed=assumed)
            parts = group.sides or (group.rows,)
            if len(group.rows) < _AGREEING:  # most of them are wrong
                parts = (group.rows, np.setdiff1d(group.whole, group.rows))
            grow = _grow_together(values, companion.values, parts)
            copied = tuple(
                Finding(
                    rows=(i,),
                    what=what,
                    why=f"it is the reading of {who(source)}, equal to all digits, with another "
                    f"{companion.name}",
                )
                for i, source in copies.items()
                if i in set(np.asarray(groups[k]).tolist())
            )
            if not grow:
                group.odd, group.sides = [], None
            if not (grow or copied):
                continue
            found[k] = Evidence(
                findings=(*copied, *_named(group, ratio, what, shown)),
                populations=_two(group, ratio, what, shown),
            )
        if any(each.findings or each.populations for each in found):
            return found
    if not companions and _is_energy(name, unit):
        for k, rows in enumerate(groups):
            found[k] = Evidence(same=_same(values, np.asarray(rows), name, who))
    return found


def _split(rows: Ints, ratio: Floats, *, jump: float = JUMP) -> _Group:
    """Sorts out rows that stand apart from the others, or divides them into two populations."""
    zero = rows[ratio[rows] == 0]
    rest = rows[ratio[rows] > 0]
    rest = rest[np.argsort(ratio[rest], kind="stable")]
    group = _Group(rows=rest, whole=rest)
    while len(rest) > _AGREEING:
        gaps = np.diff(np.log(ratio[rest]))
        cut = int(gaps.argmax()) + 1
        if gaps[cut - 1] < math.log(jump):
            break
        few, many = sorted((rest[:cut], rest[cut:]), key=len)
        if len(few) >= _AGREEING or len(few) * _ALONE > len(many):
            group.sides = rest[:cut], rest[cut:]
            break
        kinds = np.flatnonzero(np.diff(np.log(ratio[few])) >= math.log(jump)) + 1
        group.apart += np.split(few, kinds)
        rest = many
    group.rows = rest
    if 0 < len(zero) < len(rest):
        group.odd.append((zero, ""))
    if jump != JUMP and (group.sides is not None or len(rest) < _AGREEING):
        group.odd, group.apart, group.sides = [], [], None
    return group


def _judge(
    group: _Group,
    ratio: Floats,
    others: Sequence[Ints],
    *,
    scale_w: float | None,
    unit: str,
    assumed: str,
) -> None:
    """Decides which of two populations is wrong, where other groups or the hardware say so.

    Of few rows and many that agree, the many may be the wrong ones: a slip of units is one of a
    whole batch. Only one row alone is an outlier by its number.
    """

    def by_others(sides: Sequence[Ints]) -> tuple[int, str] | None:
        elsewhere = [rows for rows in others if len(rows) >= _AGREEING]
        if not elsewhere:
            return None
        known = ratio[np.concatenate(elsewhere)]
        low, high = known.min() / math.sqrt(JUMP), known.max() * math.sqrt(JUMP)
        fits = [low <= float(np.median(ratio[side])) <= high for side in sides]
        if fits[0] == fits[1]:
            return None
        return fits.index(False), f"and {span_text(known, unit)} in other groups"

    def by_hardware(sides: Sequence[Ints]) -> tuple[int, str] | None:
        if scale_w is None:
            return None
        watts = [float(np.median(ratio[side])) * scale_w for side in sides]
        possible = [each <= _MOST_W for each in watts]
        if possible[0] == possible[1]:
            return None
        wrong = possible.index(False)
        kind = units.format_quantity(watts[wrong], "W")
        return wrong, f"and no server draws {kind}{assumed}"

    if group.sides is not None and (found := by_others(group.sides) or by_hardware(group.sides)):
        wrong, why = found
        group.odd.append((group.sides[wrong], why))
        group.rows, group.sides = group.sides[1 - wrong], None
    undecided: list[Ints] = []
    sound: list[Ints] = []  # few beside many that are wrong
    reason = ""
    for few in group.apart:
        found = by_hardware((few, group.rows))
        other = by_others((few, group.rows))
        if found is None and (len(few) > 1 or other is None or other[0] == 0):
            found = other
        if found is not None and found[0] == 1:
            sound.append(few)
            reason = found[1]
        elif found is not None or (len(few) == 1 and other is None):
            group.odd.append((few, ""))
        else:
            undecided.append(few)
    group.apart = []
    if sound:
        group.odd += [(each, reason) for each in (group.rows, *undecided)]
        group.rows, group.sides = np.concatenate(sound), None
    elif undecided and group.sides is None:
        rest = np.concatenate([group.rows, *undecided[1:]])
        first, second = sorted((undecided[0], rest), key=lambda side: float(np.median(ratio[side])))
        group.sides = first, second
        group.rows = np.concatenate(group.sides)


def _named(group: _Group, ratio: Floats, what: str, unit: str) -> tuple[Finding, ...]:
    """One finding for each kind of evidence."""
    kinds: dict[str, list[Ints]] = {}
    for rows, why in group.odd:
        kinds.setdefault(why, []).append(rows)
    found = []
    for why, parts in kinds.items():
        rows = np.sort(np.concatenate(parts))
        text = (
            f"it is {span_text(ratio[rows], unit)}, but {span_text(ratio[group.rows], unit)} in the"
            f" other {len(group.rows)}"
        )
        found.append(
            Finding(rows=tuple(rows.tolist()), what=what, why=f"{text}, {why}" if why else text)
        )
    return tuple(found)


def _two(group: _Group, ratio: Floats, what: str, unit: str) -> TwoPopulations | None:
    if group.sides is None:
        return None
    first, second = (span_text(ratio[side], unit) for side in group.sides)
    low, high = (tuple(np.sort(side).tolist()) for side in group.sides)
    parts = [f"{len(low)} rows at {first}", f"{len(high)} rows at {second}"]
    return TwoPopulations(
        sides=(low, high),
        spans=(first, second),
        what=what,
        text=f"one of two populations is wrong: {', '.join(parts)}",
    )


def _copies(
    values: Floats,
    ratio: Floats,
    companion: Companion,
    groups: Sequence[Sequence[int]],
    *,
    name: str,
    unit: str,
) -> dict[int, int]:
    """The rows that carry another row's reading, and whose: {copy: source}.

    Of rows of one value, the source is the one whose ratio fits best to those of its group whose
    values are their own. What is off by 10 % more, and outside of these, is a copy.
    """
    if not _is_energy(name, unit):
        return {}
    classes = [
        rows for rows in _equal_values(values) if len(set(companion.values[rows].tolist())) > 1
    ]
    if not classes:
        return {}
    shared = np.zeros(len(values), np.bool_)
    shared[np.concatenate(classes)] = True
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(ratio)
    own = np.isfinite(log) & ~shared
    middle, reach = np.full(len(values), np.nan), np.full(len(values), np.nan)
    for members in groups:
        rows_of = np.asarray(members, dtype=np.intp)
        known = log[rows_of[own[rows_of]]]
        if len(known) < 5:
            known = log[own]
        if len(known) < 5:
            continue
        low, at, high = np.quantile(known, [0.1, 0.5, 0.9])
        middle[rows_of], reach[rows_of] = at, max(high - at, at - low)
    off = np.abs(log - middle)
    found = {}
    for rows in classes:
        if not np.isfinite(off[rows]).all():
            continue
        source = rows[int(off[rows].argmin())]
        if off[source] > reach[source] + math.log(1.2):
            continue  # none of them is sound
        for i in rows:
            if off[i] > max(off[source], reach[i]) + math.log(1.1):
                found[i] = source
    return found


def _equal_values(values: Floats) -> list[list[int]]:
    """The rows of each value that several rows have, of 6 significant digits or more."""
    finite = np.flatnonzero(np.isfinite(values) & (values != 0))
    _, first, counts = np.unique(values[finite], return_inverse=True, return_counts=True)
    several = finite[counts[first] > 1]
    found: dict[float, list[int]] = {}
    for i in several.tolist():
        found.setdefault(float(values[i]), []).append(i)
    return [rows for value, rows in found.items() if _significant(value) >= _DIGITS]


def _significant(value: float) -> int:
    """How many significant digits a number is written with."""
    mantissa = repr(value).partition("e")[0].replace(".", "").lstrip("-0")
    return len(mantissa.rstrip("0"))


def _same(values: Floats, rows: Ints, name: str, who: Callable[[int], str]) -> str:
    inside = set(rows.tolist())
    found = [c for c in _equal_values(values) if inside & set(c)]
    if not found:
        return ""
    pairs = [" and ".join(map(who, c[:3])) + (" and more" if len(c) > 3 else "") for c in found]
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    return (
        f"the same {name} to all digits, of which one is a copy: {', '.join(pairs[:5])}{more}; a "
        "column of time would say which"
    )


_ENERGY = re.compile(
    r"energy|joule|kwh|co2|carbon|(^|_)(wh|k?j|mj)$", re.IGNORECASE
)  # what is never twice the same by chance


def _is_energy(name: str, unit: str) -> bool:
    known = unit == "g" or _joules(unit) is not None
    return known or _ENERGY.search(name) is not None


_JOULES = (("kwh", 3.6e6), ("(^|_)wh$", 3600.0), ("(^|_)mj$", 1e6), ("(^|_)kj$", 1e3))
_SECONDS = (("(^|_)ms$", 1e-3), ("(^|_)(min|minutes)$", 60.0), ("(^|_)(h|hours)$", 3600.0))


def _joules(unit: str) -> float | None:
    """The joules of a unit of energy, None for any other: "kWh" -> 3.6e6, "mJ" -> 0.001."""
    match = re.fullmatch(r"([nuµμmkMGT]?)(J|Wh)", unit)
    if match is None and unit.lower() not in ("mj", "mwh"):  # kilo or mega, milli or mega
        match = re.fullmatch(r"([kg]?)(j|wh)", unit.lower().replace("joules", "j"))
    if match is None:
        return None
    scale = {"": 1.0, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "μ": 1e-6, "m": 1e-3}
    scale |= {"k": 1e3, "M": 1e6, "G": 1e9, "g": 1e9, "T": 1e12}
    return scale[match[1]] * (1.0 if match[2].lower() == "j" else units.J_PER_WH)


def _watts(name: str, unit: str, companion: Companion) -> tuple[float | None, str]:
    """The watts of a ratio of 1, and what this assumes; None where the resource is no energy.

    The resource is in `unit`. Where that is unknown, an energy column whose name has no unit is
    taken for kWh, which is what CodeCarbon, carbontracker and eco2AI write; a time for seconds.
    """
    taken = []
    joules = _joules(unit)
    if companion.unit not in ("", "s"):
        return None, ""
    if unit:
        if joules is None:
            return None, ""
    elif re.search(r"joule|(^|_)j$", name, re.IGNORECASE):
        joules = 1.0
    else:
        joules = next((j for pattern, j in _JOULES if re.search(pattern, name, re.I)), None)
        if joules is None and not re.search("energy", name, re.IGNORECASE):
            return None, ""
        if joules is None:
            joules = units.J_PER_KWH
            taken.append(f"{name} in kWh")
    seconds = 1.0
    if companion.unit != "s":
        found = next((s for p, s in _SECONDS if re.search(p, companion.name, re.I)), None)
        if found is None and not re.search(r"(^|_)(s|sec|seconds)$", companion.name, re.I):
            taken.append(f"{companion.name} in s")
        seconds = found or 1.0
    return joules / seconds, f" (taking {', '.join(taken)})" if taken else ""


def _grow_together(a: Floats, b: Floats, parts: Sequence[Ints]) -> bool:
    """Whether the logarithms of a and b correlate within each part; 8 rows in all at least."""
    if sum(map(len, parts)) < _AGREEING:
        return False
    x = np.concatenate([np.log(a[rows]) - np.log(a[rows]).mean() for rows in parts])
    y = np.concatenate([np.log(b[rows]) - np.log(b[rows]).mean() for rows in parts])
    return bool(x.std() > 0 and y.std() > 0 and np.corrcoef(x, y)[0, 1] >= 0.8)


def _three_digits(value: float) -> str:
    """A number without a unit: "0.0184", "4000"; below 1e7 without an exponent."""
    return f"{float(f'{value:.3g}'):.0f}" if 999.5 <= value < 1e7 else f"{value:.3g}"


def span_text(values: Floats, unit: str) -> str:
    """The least and the greatest of values, "203.1 W … 736.4 W"."""
    low, high = float(values.min()), float(values.max())
    ends = dict.fromkeys(
        units.format_quantity(x, unit) if unit else _three_digits(x) for x in (low, high)
    )
    return " … ".join(ends)
