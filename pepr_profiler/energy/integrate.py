"""From a lane's readings to the energy of each of its sources, in one pass.

Memory does not grow with the length of the recording: energy is kept only at the instants that are
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from pepr_profiler.energy.counter import Counter
from pepr_profiler.energy.curve import EnergyCurve
from pepr_profiler.energy.power import Power
from pepr_profiler.energy.sources import Source, package_of
from pepr_profiler.record import Ints
from pepr_profiler.trace.lane import Batch

_LONG_READ_NS = 5_000_000
"""A row that takes longer than this has the devices' values one after the other."""


def integrate(
    batches: Iterable[Batch], sources: Sequence[Source], at_ns: Ints
) -> list[EnergyCurve]:
    """The cumulative energy of each source, all of one lane, at `at_ns`, which is sorted."""
    accumulators = [(Counter if source.counter else Power)(source, at_ns) for source in sources]
    mirrors = _Mirrors(sources)
    for batch in batches:
        for accumulator in accumulators:
            source = accumulator.source
            t_ns = values_ns(source, batch.t_ns, batch.read_ns)
            accumulator.feed(t_ns, batch.values[source.channel], batch)
        mirrors.feed(batch)
    return mirrors.mark([accumulator.finish() for accumulator in accumulators])


def values_ns(source: Source, t_ns: Ints, read_ns: Ints) -> Ints:
    """When the values of a source are from, of rows whose read began at `t_ns` and took `read_ns`.

    That is the middle of the read; of a long one, the middle of the device's part of it.
    """
    part_ns = (read_ns * source.read_part).astype(np.int64)
    return np.asarray(t_ns + np.where(read_ns > _LONG_READ_NS, part_ns, read_ns // 2))


class _Mirrors:
    """Finds dies of a package, or GPUs of a module, that show one and the same counter.

    Dies do on Zen 1 and 2 (codecarbon issue 1274), and the two GPUs of a GB200 share a module.

    Two counters of 15 µJ steps that rise alike from reading to reading are one. A refresh between
    the reads of the two makes one rise differ, which the next one makes up for.
    """

    _ENOUGH = 8  # rises that are equal; one alone may be chance
    _EQUAL_PART = 0.5  # of all rises

    def __init__(self, sources: Sequence[Source]) -> None:
        parts = [
            source
            for source in sources
            if source.counter
            and source.in_total
            and (source.scope == "module" or package_of(source.id) != source.id)
        ]
        self._pairs = [
            (one, two, [0, 0])
            for i, one in enumerate(parts)
            for two in parts[i + 1 :]
            if one.scope == two.scope == "module" or package_of(one.id) == package_of(two.id)
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
        """The curves, without those in the total that mirror an earlier one."""
        mirrored: dict[int, Source] = {}
        for one, two, (rises, equal) in self._pairs:
            if equal >= self._ENOUGH and equal > self._EQUAL_PART * rises:
                mirrored.setdefault(two.channel, one)
        return [
            curve
            if (first := mirrored.get(curve.source.channel)) is None
            else curve._replace(
                source=curve.source._replace(mirrors=first.label).not_counted(
                    f"mirrors {first.label}: one counter"
                )
            )
            for curve in curves
        ]
