"""One lane at 1 kHz against a bare C loop of the same reads and sleeps; rate, lateness, the GIL."""

from __future__ import annotations

import argparse
import array
import itertools
import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ZONES,
    Product,
    Spread,
    compile_c,
    header,
    judge,
    main,
    percentile,
    powercap_tree,
    product,
    run,
    show,
)

KARATSUBA = 1.585  # log2(3): how the cost of multiplying Python integers grows with their length


@dataclass(frozen=True)
class Lane:
    """What one run of a lane, or of the C loop, came to."""

    cpu_per_sample_s: float
    rate_hz: float
    late_p50_s: float
    late_p99_s: float
    others_ran: int = 0


def lane(spec: str, period_ns: int, seconds: float, *, hold_gil: bool) -> Lane:
    """Runs a lane in this process, the main thread idle or holding the GIL in one C call."""
    from pepr_profiler import _core

    exponent = _exponent(seconds) if hold_gil else 0
    sampler = _core.Sampler(spec, period_ns)
    sampler.wait_ready(10.0)
    before = sampler.stats()
    turns: list[int] = []
    begin_ns = time.monotonic_ns()
    if hold_gil:
        stop = threading.Event()
        watcher = threading.Thread(target=_take_turns, args=(stop, turns))
        watcher.start()
        begin_ns = time.monotonic_ns()
        pow(3, exponent)  # one call into C: the interpreter cannot switch threads inside it
        end_ns = time.monotonic_ns()
        stop.set()
        watcher.join()
    else:
        rows = _Rows()
        # The ring holds 2 s, but without a pause there are 2 million rows a second. A recording is
        # written down once a second; who wakes up more often takes caches from the lane.
        pause_s = min(0.1 if period_ns < 1_000_000 else 1.0, seconds)
        while time.monotonic_ns() - begin_ns < seconds * 1e9:
            time.sleep(pause_s)
            rows.take(sampler)
        end_ns = time.monotonic_ns()
    sampler.stop(1.0)
    stats = sampler.stats()
    if hold_gil:
        rows = _Rows()
    rows.take(sampler)
    late_ns = rows.late_ns(period_ns)
    inside = [t_ns for t_ns in rows.t_ns if begin_ns <= t_ns < end_ns]
    assert len(rows.t_ns) == stats["samples"], "the ring lost rows"
    return Lane(
        # Opening the sensor is in both, so it is in neither.
        cpu_per_sample_s=(stats["cpu_s"] - before["cpu_s"])
        / (stats["samples"] - before["samples"]),
        rate_hz=(len(inside) - 1) / (inside[-1] - inside[0]) * 1e9,
        late_p50_s=percentile(late_ns, 0.5) * 1e-9,
        late_p99_s=percentile(late_ns, 0.99) * 1e-9,
        others_ran=sum(begin_ns < t_ns < end_ns for t_ns in turns),
    )


class _Rows:
    def __init__(self) -> None:
        self.t_ns = array.array("q")
        self._read_ns = array.array("I")

    def take(self, sampler: Any) -> None:
        while (batch := sampler.read()) is not None:
            self.t_ns.frombytes(batch[1])
            self._read_ns.frombytes(batch[2])

    def late_ns(self, period_ns: int) -> list[int]:
        """How far behind its deadline each row began; deadlines passed over are not its own."""
        late_ns = []
        deadline_ns = self.t_ns[0]
        for t_ns, read_ns in zip(self.t_ns, self._read_ns, strict=True):
            late_ns.append(t_ns - deadline_ns)
            deadline_ns += period_ns
            passed = (t_ns + read_ns - deadline_ns) // period_ns + 1
            deadline_ns += max(0, passed) * period_ns
        return late_ns[1:-1]  # the first sets the grid, the last is taken when asked to stop


def _take_turns(stop: threading.Event, turns: list[int]) -> None:
    while not stop.wait(0.005):
        turns.append(time.monotonic_ns())


def _exponent(seconds: float) -> int:
    """The power of 3 that takes about that long."""
    trial = 2_000_000
    begin_s = time.monotonic()
    pow(3, trial)
    took_s = time.monotonic() - begin_s
    return int(trial * (seconds / took_s) ** (1 / KARATSUBA))


def run_lane(
    bench: Product, spec: str, period_ns: int, seconds: float, *, hold_gil: bool = False
) -> Lane:
    """The lane in a process of its own."""
    more = ["--hold-gil"] if hold_gil else []
    argv = bench.module("sampler", "--lane", spec, str(period_ns), "--seconds", str(seconds), *more)
    return Lane(**json.loads(run(argv, bench.env)))


def run_loop(loop: Path, files: list[str], period_ns: int, seconds: float) -> Lane:
    words = run([str(loop), str(period_ns), str(seconds), *files], {}).split()
    samples, cpu_ns, took_ns, p50_ns, p99_ns = map(int, words)
    return Lane(
        cpu_per_sample_s=1e-9 * cpu_ns / samples,
        rate_hz=1e9 * samples / took_ns,
        late_p50_s=1e-9 * p50_ns,
        late_p99_s=1e-9 * p99_ns,
    )


def compare(
    bench: Product,
    spec: str,
    loop: Path,
    files: list[str],
    *,
    rate: int,
    pairs: int,
    seconds: float,
) -> None:
    """Lane and loop in turn; their ratio is taken pair by pair."""
    period_ns = 1_000_000_000 // rate
    lanes, loops = [], []
    for number in range(pairs):
        if number % 2:
            loops.append(run_loop(loop, files, period_ns, seconds))
        lanes.append(run_lane(bench, spec, period_ns, seconds))
        if number % 2 == 0:
            loops.append(run_loop(loop, files, period_ns, seconds))
    ratios = [a.cpu_per_sample_s / b.cpu_per_sample_s for a, b in zip(lanes, loops, strict=True)]
    print(f"  {rate} Hz over {ZONES} counters, {pairs} pairs of {seconds:g} s:")
    _show_all("lane", lanes, rate)
    _show_all("C loop", loops, None)
    if rate == 1000:
        judge("CPU per sample, lane / C loop", Spread.of(ratios), "x", most=1.5)
    else:
        show("CPU per sample, lane / C loop", Spread.of(ratios), "x")


def back_to_back(bench: Product, spec: str, loop: Path, files: list[str], *, pairs: int) -> None:
    """Without the sleeps, whose cost in a virtual machine hides everything else."""
    found = [(run_lane(bench, spec, 1, 0.4), run_loop(loop, files, 0, 0.4)) for _ in range(pairs)]
    print(f"  read without a pause, {pairs} pairs of 0.4 s:")
    for who, mine in (("lane", 0), ("C loop", 1)):
        costs = [pair[mine].cpu_per_sample_s for pair in found]
        show(f"{who}: CPU per sample", Spread.of(costs), "us", scale=1e6)
    ratios = [a.cpu_per_sample_s / b.cpu_per_sample_s for a, b in found]
    show("CPU per sample, lane / C loop", Spread.of(ratios), "x")


def _show_all(who: str, lanes: list[Lane], rate: int | None) -> None:
    show(f"{who}: CPU per sample", Spread.of([x.cpu_per_sample_s for x in lanes]), "us", scale=1e6)
    rates = Spread.of([x.rate_hz for x in lanes])
    if rate is None:
        show(f"{who}: rate", rates, "Hz")
    else:
        judge(f"{who}: rate", rates, "Hz", least=0.999 * rate)
    show(f"{who}: lateness p50", Spread.of([x.late_p50_s for x in lanes]), "us", scale=1e6)
    show(f"{who}: lateness p99", Spread.of([x.late_p99_s for x in lanes]), "us", scale=1e6)


def wasted(bench: Product, *, seconds: float) -> None:
    """Reads that found nothing new, of a counter that is refreshed every 100 ms."""
    script = "from benchmarks.sampler import wasted_reads; import sys; wasted_reads(*sys.argv[1:])"
    replay = bench.folder / "refreshed-every-100ms"
    rows = "".join(f"{0.1 * n:.1f}\t{n}\n" for n in range(int(10 * seconds) + 20))
    channel = "channel\tgpu/energy\tenergy\tJ\t1\t0\tcounter\treplay\n"
    replay.write_text(channel + rows)
    print(f"  a counter that is refreshed every 100 ms, {seconds:g} s:")
    for who, learns, goal in (("learnt cadence", "1", 0.30), ("fixed 1 kHz", "", None)):
        found = json.loads(
            run([sys.executable, "-c", script, f"replay:{replay}", learns, str(seconds)], bench.env)
        )
        if goal is not None:
            judge(f"{who}: reads wasted", found["wasted"], "of all", most=goal)
        else:
            show(f"{who}: reads wasted", found["wasted"], "of all")
        show(f"{who}: refreshes seen", found["seen"], "of all")


def wasted_reads(spec: str, learns: str, seconds: str) -> None:
    """Prints the share of reads that were wasted and of refreshes that were seen, after 2 s."""
    from pepr_profiler import _core

    period_ns = 10_000_000 if learns else 1_000_000
    sampler = _core.Sampler(spec, period_ns, learn=bool(learns))
    sampler.wait_ready(10.0)
    times, values = array.array("q"), array.array("d")
    end_s = time.monotonic() + float(seconds)
    while time.monotonic() < end_s:
        time.sleep(0.1)
        while (batch := sampler.read()) is not None:
            times.frombytes(batch[1])
            values.frombytes(batch[3][0])
    sampler.stop(1.0)
    first = next(i for i, t_ns in enumerate(times) if t_ns - times[0] > 2e9)
    later = values[first:]
    changes = sum(a != b for a, b in itertools.pairwise(later))
    print(
        json.dumps(
            {
                "wasted": 1 - changes / (len(later) - 1),
                "seen": changes / (later[-1] - later[0]),
            }
        )
    )


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--lane", nargs=2, metavar=("SPEC", "PERIOD_NS"), help=argparse.SUPPRESS)
    parser.add_argument("--hold-gil", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.lane:
        spec, period_ns = arguments.lane
        result = lane(spec, int(period_ns), arguments.seconds, hold_gil=arguments.hold_gil)
        print(json.dumps(vars(result)))
        return
    pairs, seconds = arguments.pairs, arguments.seconds
    header("sampler: one lane against a bare C loop of the same reads and sleeps")
    with product() as bench, powercap_tree(bench.folder) as tree:
        loop = compile_c("sampler_loop.c", bench.folder)
        files = [str(tree.path(key) / "energy_uj") for key in tree.zones]
        for rate in (1000, 100, 10):
            compare(bench, tree.spec, loop, files, rate=rate, pairs=pairs, seconds=seconds)
        back_to_back(bench, tree.spec, loop, files, pairs=pairs)
        wasted(bench, seconds=5 * seconds)
        print(f"  1000 Hz while the main thread holds the GIL in one C call, {pairs} times:")
        held = [run_lane(bench, tree.spec, 1_000_000, seconds, hold_gil=True) for _ in range(pairs)]
        _show_all("lane", held, 1000)
        turns = max(x.others_ran for x in held)
        show("turns that another Python thread got meanwhile", turns, "(0 or 1: it was held)")


if __name__ == "__main__":
    main(measure)
