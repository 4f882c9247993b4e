"""One lane at 1 kHz against a bare C loop of the same reads and sleeps; rate, lateness, the GIL."""

from __future__ import annotations

import argparse
import array
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ZONES,
    Product,
    Spread,
    compile_c,
    header,
    interleaved,
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


def lane(
    spec: str, period_ns: int, seconds: float, *, hold_gil: bool, loop: Sequence[str] = ()
) -> tuple[Lane, str]:
    """Runs a lane in this process, the main thread idle or holding the GIL in one C call.

    `loop` is a command that runs meanwhile; the second that is returned is what it printed.
    """
    from pepr_profiler import _core

    exponent = _exponent(seconds) if hold_gil else 0
    sampler = _core.Sampler(spec, period_ns)
    sampler.wait_ready(10.0)
    clock = _clock_of("pepr-sampler")
    time.sleep(1.5e-9 * period_ns)  # in which all is touched for the first time
    rows = _Rows()
    rows.take(sampler)
    # Between two samples of the lane: that is where those of the loop shall be.
    time.sleep(max(0.0, 1e-9 * (rows.t_ns[-1] + 1.5 * period_ns - time.monotonic_ns())))
    neighbour = subprocess.Popen(loop, stdout=subprocess.PIPE, text=True) if loop else None
    before_s, samples_before = time.clock_gettime(clock), sampler.stats()["samples"]
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
        # The ring holds 2 s, but without a pause there are 2 million rows a second. A recording is
        # written down once a second; who wakes up more often takes caches from the lane.
        pause_s = min(0.1 if period_ns < 1_000_000 else 1.0, seconds)
        while time.monotonic_ns() - begin_ns < seconds * 1e9:
            time.sleep(pause_s)
            rows.take(sampler)
        end_ns = time.monotonic_ns()
    cpu_s = time.clock_gettime(clock) - before_s
    samples = sampler.stats()["samples"] - samples_before
    sampler.stop(1.0)
    stats = sampler.stats()
    rows.take(sampler)
    late_ns = rows.late_ns(period_ns)
    inside = [t_ns for t_ns in rows.t_ns if begin_ns <= t_ns < end_ns]
    assert len(rows.t_ns) == stats["samples"], "the ring lost rows"
    measured = Lane(
        cpu_per_sample_s=cpu_s / samples,
        rate_hz=(len(inside) - 1) / (inside[-1] - inside[0]) * 1e9,
        late_p50_s=percentile(late_ns, 0.5) * 1e-9,
        late_p99_s=percentile(late_ns, 0.99) * 1e-9,
        others_ran=sum(begin_ns < t_ns < end_ns for t_ns in turns),
    )
    return measured, neighbour.communicate()[0] if neighbour is not None else ""


def _clock_of(thread: str) -> int:
    """The CPU clock of the only thread of that name."""
    (own,) = (
        int(task.name)
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text().strip() == thread
    )
    return (~own << 3) | 6  # as pthread_getcpuclockid() names it


class _Rows:
    def __init__(self) -> None:
        self.t_ns = array.array("q")
        self._read_ns = array.array("I")

    def take(self, sampler: Any) -> None:
        while (batch := sampler.read()) is not None:
            self.t_ns.frombytes(batch[1])
            self._read_ns.frombytes(batch[2])

    def late_ns(self, period_ns: int) -> list[int]:
        """How far behind its deadline each row began, less what the promptest took.

        Deadlines passed over are not its own. The first row comes when the sensor is open, the last
        when the lane is asked to stop.
        """
        late_ns = []
        deadline_ns = self.t_ns[1]
        for t_ns, read_ns in zip(self.t_ns[1:-1], self._read_ns[1:-1], strict=True):
            late_ns.append(t_ns - deadline_ns)
            deadline_ns += period_ns
            passed = (t_ns + read_ns - deadline_ns) // period_ns + 1
            deadline_ns += max(0, passed) * period_ns
        least_ns = min(late_ns)
        return [late - least_ns for late in late_ns]


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
    return Lane(**json.loads(run(argv, bench.env))["lane"])


def run_loop(loop: Path, files: list[str], period_ns: int, seconds: float) -> Lane:
    return _of_loop(run([str(loop), str(period_ns), str(seconds), *files], {}))


def _of_loop(said: str) -> Lane:
    samples, cpu_ns, took_ns, p50_ns, p99_ns = map(int, said.split())
    return Lane(
        cpu_per_sample_s=1e-9 * cpu_ns / samples,
        rate_hz=1e9 * samples / took_ns,
        late_p50_s=1e-9 * p50_ns,
        late_p99_s=1e-9 * p99_ns,
    )


def compare(lanes: list[Lane], loops: list[Lane], *, rate: int, seconds: float) -> None:
    """Prints what lanes and loops came to side by side; their ratio is taken pair by pair."""
    ratios = [a.cpu_per_sample_s / b.cpu_per_sample_s for a, b in zip(lanes, loops, strict=True)]
    print(f"  {rate} Hz over {ZONES} counters, {len(lanes)} pairs of {seconds:g} s:")
    _show_all("lane", lanes, rate)
    _show_all("C loop", loops, None)
    if rate == 1000:
        judge("CPU per sample, lane / C loop", Spread.of(ratios), "x", most=1.5)
    else:
        show("CPU per sample, lane / C loop", Spread.of(ratios), "x")


def beside_loop(
    bench: Product,
    spec: str,
    loop: Path,
    files: list[str],
    *,
    rate: int,
    pairs: int,
    seconds: float,
) -> tuple[list[Lane], list[Lane]]:
    """Pairs of a lane and a loop with its reads, both at once on one CPU, another one each time.

    What the machine does to one of them at the moment, it does to the other.
    """
    period_ns = 1_000_000_000 // rate
    argv = bench.module("sampler", "--lane", spec, str(period_ns), "--seconds", str(seconds))
    argv += ["--beside", str(loop), *files]
    lanes, loops = [], []
    cpus = sorted(os.sched_getaffinity(0))
    try:
        for number in range(pairs):
            os.sched_setaffinity(0, {cpus[number % len(cpus)]})  # the children inherit it
            found = json.loads(run(argv, bench.env))
            lanes.append(Lane(**found["lane"]))
            loops.append(_of_loop(found["loop"]))
    finally:
        os.sched_setaffinity(0, cpus)
    return lanes, loops


def back_to_back(
    bench: Product, spec: str, loop: Path, files: list[str], *, pairs: int, seconds: float
) -> tuple[list[Lane], list[Lane]]:
    """Pairs that never sleep, whose cost in a virtual machine hides all else; so, in turn."""
    found = interleaved(
        {
            "lane": lambda: run_lane(bench, spec, 1, seconds),
            "loop": lambda: run_loop(loop, files, 0, seconds),
        },
        pairs,
    )
    return found["lane"], found["loop"]


def without_a_pause(bench: Product, spec: str, loop: Path, files: list[str], *, pairs: int) -> None:
    found = back_to_back(bench, spec, loop, files, pairs=pairs, seconds=0.4)
    print(f"  read without a pause, {pairs} pairs of 0.4 s:")
    costs = [[each.cpu_per_sample_s for each in those] for those in found]
    for who, those in zip(("lane", "C loop"), costs, strict=True):
        show(f"{who}: CPU per sample", Spread.of(those), "us", scale=1e6)
    ratios = [a / b for a, b in zip(*costs, strict=True)]
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
    parser.add_argument("--beside", nargs="+", metavar="LOOP", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.lane:
        spec, period_ns = arguments.lane
        seconds, (loop, *files) = arguments.seconds, arguments.beside or [""]
        argv = [loop, period_ns, str(seconds), *files] if loop else []
        result, said = lane(spec, int(period_ns), seconds, hold_gil=arguments.hold_gil, loop=argv)
        print(json.dumps({"lane": vars(result), "loop": said}))
        return
    pairs, seconds = arguments.pairs, arguments.seconds
    header("sampler: one lane against a bare C loop of the same reads and sleeps")
    with product() as bench, powercap_tree(bench.folder) as tree:
        bare = compile_c("sampler_loop.c", bench.folder)
        files = [str(tree.path(key) / "energy_uj") for key in tree.zones]
        for rate in (1000, 100, 10):
            found = beside_loop(
                bench, tree.spec, bare, files, rate=rate, pairs=pairs, seconds=seconds
            )
            compare(*found, rate=rate, seconds=seconds)
        without_a_pause(bench, tree.spec, bare, files, pairs=pairs)
        wasted(bench, seconds=5 * seconds)
        print(f"  1000 Hz while the main thread holds the GIL in one C call, {pairs} times:")
        held = [run_lane(bench, tree.spec, 1_000_000, seconds, hold_gil=True) for _ in range(pairs)]
        _show_all("lane", held, 1000)
        turns = max(x.others_ran for x in held)
        show("turns that another Python thread got meanwhile", turns, "(0 or 1: it was held)")


if __name__ == "__main__":
    main(measure)
