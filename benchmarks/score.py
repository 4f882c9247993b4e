"""How well ±, ranks and P(order reversed) of PePR scores hold, over cohorts of known truth.

    python -m benchmarks.score                  # 2,000 cohorts a line, about ten minutes
    python -m benchmarks.score --around-seen    # what draws around the seen values would give

A cohort has models whose true resources lie evenly between two bounds, in random order, and whose
true performances are equal, so that the order is one of the resource. u is the standard uncertainty
of a model's mean resource: the scatter of its runs over the root of their number, or of the one
run's reading, which is stated. In the line of difference 0 no true score exists (R is 0/0), and
all orders are half wrong. In the lines "any" the difference d of each cohort is another one:
1 / (1 + d^2 / 2) is uniform from 0.02 to 1, so that d is 0 to 10 u, in the middle 1.4 u.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from benchmarks.common import header, judge, main
from pepr_profiler.record import Floats
from pepr_profiler.study import draws, pepr

ROWS, REPEATS, DIFFERENCES = (2, 3, 6, 20), (1, 3, 5), (0.0, 0.5, 1.0, 2.0, 5.0)
ANY = -1.0
_MEAN, _U = 1000.0, 20.0  # J: a scatter of 2 % for one run, 3.5 % for three
_P, _SD_P = 0.9, 0.004
_DRAWS = 1000


@dataclass(frozen=True, eq=False)
class Line:
    """What was printed over some cohorts of one kind, and what was true.

    `covered` (cohorts, n) is of the models in the order of their true resource; `printed` and
    `reversed_` (cohorts, n - 1) are of neighbours in the ranking.
    """

    rows: int
    repeats: int
    difference: float
    covered: Floats
    printed: Floats
    reversed_: Floats
    surely_first: float
    told_apart: float


def cohorts(kind: tuple[int, int, float], *, count: int, around_seen: bool) -> Line:
    """Simulates cohorts of one kind."""
    if around_seen:
        draws._Population.of = classmethod(lambda *_: None)  # type: ignore[assignment,method-assign]
    n, repeats, difference = kind
    random = np.random.default_rng([n, repeats, int(10 * abs(difference))])
    true = _P / (1 + np.linspace(0.0, 1.0, n)) if difference else np.full(n, np.nan)
    model = np.repeat(np.arange(n), repeats)
    covered, printed, wrong, first, apart = [], [], [], [], []
    for _ in range(count):
        apart_u = difference
        if difference == ANY:
            apart_u = float(np.sqrt(2.0 / random.uniform(0.02, 1.0) - 2.0))
        true_r = _MEAN + _U * np.linspace(0.0, apart_u, n)
        r = true_r[model] + _U * np.sqrt(repeats) * random.standard_normal(len(model))
        p = _P + _SD_P * random.standard_normal(len(model)) * (repeats > 1)
        means = pepr.average(model, p, r, u_r=_U if repeats == 1 else 0.0)
        at = means.performance, means.resource
        standing = pepr.standing(*at, means.errors, count=_DRAWS)
        order = pepr.rank(pepr.score(*at))
        covered.append((standing.low <= true) & (true <= standing.high))
        printed.append(standing.swap[order[:-1]])
        wrong.append((order[:-1] > order[1:]) if difference else np.full(n - 1, 0.5))
        assert standing.worst is not None
        first.append(standing.worst[order[0]] == 1)
        apart.append(standing.distinguishable is True)
    return Line(
        *kind,
        np.array(covered, dtype=np.float64),
        np.array(printed),
        np.array(wrong, dtype=np.float64),
        float(np.mean(first)),
        float(np.mean(apart)),
    )


def calibration(lines: list[Line]) -> Iterator[tuple[float, float, int]]:
    """In each tenth of what was printed: its mean, the share that is reversed, and the number."""
    printed = np.concatenate([line.printed.ravel() for line in lines])
    wrong = np.concatenate([line.reversed_.ravel() for line in lines])
    for low in np.arange(0.0, 0.6, 0.1):
        inside = (printed >= low) & (printed < low + 0.1)
        if inside.sum() >= 100:
            yield float(printed[inside].mean()), float(wrong[inside].mean()), int(inside.sum())


def table(pool: ProcessPoolExecutor, count: int, *, around_seen: bool) -> None:
    print(
        f"\n  {count} cohorts a line; covered: true scores within their intervals (goal 93-97 %);"
        "\n  least: of the row that is covered least; first: the first is surely first (of ties"
        "\n  <= 5 %); apart: can be told apart; P(rev.): mean printed, and share reversed\n"
    )
    print("  rows repeats  apart by   covered   least   first   apart   P(rev.) true")
    kinds = list(product(ROWS, REPEATS, (*DIFFERENCES, ANY)))
    one = partial(cohorts, count=count, around_seen=around_seen)
    together: dict[tuple[int, int, str], list[Line]] = {}
    for line in pool.map(one, kinds):
        which = "any" if line.difference == ANY else "fixed"
        together.setdefault((line.rows, line.repeats, which), []).append(line)
        tied = line.difference == 0
        shown = "any" if line.difference == ANY else f"{line.difference:.1f}"
        least = line.covered.mean(axis=0).min()
        covers = "      -       -" if tied else f"{line.covered.mean():>7.1%}{least:>8.1%}"
        missed = line.surely_first > 0.05 if tied else line.covered.mean() < 0.93
        print(
            f"  {line.rows:>4}{line.repeats:>8}{shown:>9} u   {covers}"
            f"{line.surely_first:>8.1%}{line.told_apart:>8.1%}{line.printed.mean():>10.2f}"
            f"{line.reversed_.mean():>5.2f}{'   MISSED' if missed else ''}",
            flush=True,
        )
    print(
        "\n  P(order reversed) of neighbours, over the fixed differences, and where it is any:"
        "\n  printed > share reversed (pairs), for rows and repeats; goal: they differ by 0.05\n"
    )
    for (rows, repeats, which), lines in together.items():
        bins = list(calibration(lines))
        worst = max((abs(printed - wrong) for printed, wrong, _ in bins), default=1.0)
        text = "  ".join(
            f"{printed:.2f} > {wrong:.2f} ({pairs:,})" for printed, wrong, pairs in bins
        )
        reached = "reached" if worst <= 0.05 else "MISSED"
        print(f"  {rows:>4}{repeats:>4} {which:<5}  {text}   {reached}")


def speed() -> None:
    print("\n  time")
    random = np.random.default_rng(1)

    def timed(what: str, most_s: float, work: object) -> None:
        spent = []
        for _ in range(5):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            spent.append(time.perf_counter() - start)
        judge(what, float(np.median(spent)), "s", most=most_s)

    p, r = random.random(1_000_000), random.random(1_000_000)
    timed("score of 1,000,000 rows", 1.0, lambda: pepr.rank(pepr.score(p, r)))
    model = np.repeat(np.arange(100), 5)
    p, r = random.uniform(0.7, 0.9, 500), (100 + model) * random.normal(1, 0.03, 500)

    def repeats() -> None:
        means = pepr.average(model, p, r)
        pepr.standing(means.performance, means.resource, means.errors)

    timed("score and standing of 100 rows of 5 repeats", 0.5, repeats)


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description=__doc__)
    parser.add_argument("--cohorts", type=int, default=2000, help="cohorts a line")
    parser.add_argument("--around-seen", action="store_true", help="without shrinking")
    options = parser.parse_args()
    header("score: PePR's uncertainty against cohorts of known truth")
    with ProcessPoolExecutor() as pool:
        table(pool, options.cohorts, around_seen=options.around_seen)
    speed()


if __name__ == "__main__":
    main(measure)
