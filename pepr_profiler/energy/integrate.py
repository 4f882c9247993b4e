"""Energy from recorded numbers: one pass over a lane, from readings to cumulative energy.

It gives the cumulative energy of each of the lane's sources at the instants that are asked for;
memory does not grow with the length of the recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pepr_profiler.energy.counter import Counter
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.power import Power
from pepr_profiler.energy.sources import Source, package_of
from pepr_profiler.trace.lane import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def integrate(
    batches: Iterable[Batch], sources: Sequence[Source], at_ns: NDArray[np.int64]
) -> list[EnergyCurve]:
    """The cumulative energy of each source (all of one lane) at `at_ns` (sorted), in one pass."""
    accumulators = [(Counter if source.counter else Power)(source, at_ns) for source in sources]
    mirrors = _Mirrors(sources)
    for batch in batches:
        # A value belongs to the middle of its read.
        t_ns = batch.t_ns + batch.read_ns // 2
        for accumulator in accumulators:
            accumulator.feed(t_ns, batch.values[accumulator.source.channel], batch)
        mirrors.feed(batch)
    return mirrors.mark([accumulator.finish() for accumulator in accumulators])


class _Mirrors:
    """Dies of one package whose zones are one counter (Zen 1 and 2; codecarbon issue 1274).

    Two counters of 15 µJ steps that rise alike from reading to reading are one. A refresh may fall
    between the reads of the two, and then makes one rise differ and the next one make up for it.
    """

    _ENOUGH = 8  # rises that are alike; one alone may be chance
    _ALIKE = 0.5

    def __init__(self, sources: Sequence[Source]) -> None:
        dies = [s for s in sources if s.counter and s.in_total and package_of(s.id) != s.id]
        self._pairs = [
            (one, two, [0, 0])
            for i, one in enumerate(dies)
            for two in dies[i + 1 :]
            if package_of(one.id) == package_of(two.id)
        ]
        self._last: dict[int, float] = {}

    def feed(self, batch: Batch) -> None:
        channels = {source.channel for pair in self._pairs for source in pair[:2]}
        rises = {}
        for channel in channels:
            values = batch.values[channel]
            rises[channel] = np.diff(values, prepend=self._last.get(channel, math.nan))
            self._last[channel] = float(values[-1])
        for one, two, counts in self._pairs:
            moved = (rises[one.channel] > 0) | (rises[two.channel] > 0)
            counts[0] += int(np.count_nonzero(moved))
            counts[1] += int(np.count_nonzero(moved & (rises[one.channel] == rises[two.channel])))

    def mark(self, curves: list[EnergyCurve]) -> list[EnergyCurve]:
        """The curves; what mirrors an earlier one is no longer in the total."""
        mirrored: dict[int, Source] = {}
        for one, two, (moved, alike) in self._pairs:
            if alike >= self._ENOUGH and alike > self._ALIKE * moved:
                mirrored.setdefault(two.channel, one)
        return [
            curve
            if (first := mirrored.get(curve.source.channel)) is None
            else curve._replace(
                source=curve.source._replace(
                    in_total=False, excluded=f"mirrors {first.label}: one counter"
                )
            )
            for curve in curves
        ]
