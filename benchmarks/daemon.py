"""The daemon: its CPU time, memory and growth, what a client adds, and how soon it has a sample."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    Product,
    Spread,
    UnmeasurableError,
    compile_c,
    header,
    judge,
    main,
    powercap_tree,
    product,
    run,
    show,
)

GPUS = 8
CLIENTS = 200
READY_S = 30.0
PERIOD_NS = 10_000_000
LOOK_S = 5.0
LONG_MINUTES = 10
MB = 1e6


@contextmanager
def serving(bench: Product, *options: str) -> Iterator[Path]:
    """A daemon that reads `options`; where it listens."""
    socket = bench.folder / "run" / "daemon.sock"
    argv = [sys.executable, "-m", "pepr_profiler", "daemon", "--socket", str(socket), *options]
    process = subprocess.Popen(argv, env=bench.env, cwd=ROOT, stderr=subprocess.PIPE)
    os.environ["PEPR_DAEMON"] = bench.env["PEPR_DAEMON"] = str(socket)
    try:
        assert process.stderr is not None
        words = process.stderr.readline().decode()
        if "serving" not in words:
            raise UnmeasurableError(f"the daemon did not start: {words}")
        yield socket
    finally:
        process.terminate()
        process.wait()


def gpus(folder: Path) -> str:
    """A simulated driver library with GPUS boards; its spec. Anybody may load it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from sim import native, nvml
    from sim.waves import Square

    boards = tuple(nvml.Gpu(Square(1.0, 100 + n, 400)) for n in range(GPUS))
    folder.chmod(0o755)
    (folder / "nvml").mkdir(mode=0o755)
    try:
        return nvml.install(nvml.Scenario(boards), folder / "nvml", folder).spec
    except native.UnavailableError as missing:
        raise UnmeasurableError(str(missing)) from None


def status(socket: Path) -> dict[str, Any]:
    from pepr_profiler.daemon_client.client import Connection

    connection = Connection(socket, timeout_s=READY_S)
    try:
        return connection.ask("status")[0]
    finally:
        connection.close()


def cpu_share(socket: Path, seconds: float) -> float:
    """What the daemon takes of a core. Asking is part of it: one connection."""
    before, begin_s = status(socket)["cpu_s"], time.monotonic()
    time.sleep(seconds)
    after, end_s = status(socket)["cpu_s"], time.monotonic()
    return float((after - before) / (end_s - begin_s))


def first_sample_s(spec: str) -> float:
    """From wanting a lane to holding its first row."""
    from pepr_profiler.daemon_client.client import DaemonClient

    begin_s = time.perf_counter()
    node = DaemonClient()
    lane = node.lane(spec, named=True)
    rows = lane.read() if lane is not None else None
    end_s = time.perf_counter()
    if rows is None:
        raise UnmeasurableError(f"the daemon gives no row of {spec}: {node.error}")
    node.close()
    return end_s - begin_s


def at_once(spec: str, count: int) -> list[float]:
    """The same in `count` processes that begin together."""
    gate, opener = os.pipe()
    results, results_in = os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            try:
                os.close(opener)
                os.read(gate, 1)  # until all are there
                os.write(results_in, f"{first_sample_s(spec)}\n".encode())
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
    os.close(results_in)
    os.close(gate)
    os.close(opener)
    with os.fdopen(results) as lines:
        times_s = [float(line) for line in lines]
    if len(times_s) < count:
        raise UnmeasurableError(f"only {len(times_s)} of {count} clients got a row")
    for _ in range(count):
        os.wait()
    return times_s


@contextmanager
def watching(spec: str, count: int) -> Iterator[None]:
    """`count` clients that have mapped a lane and hold their connection."""
    from pepr_profiler.daemon_client.client import DaemonClient

    nodes = [DaemonClient() for _ in range(count)]
    if not all(node.lane(spec, named=True) for node in nodes):
        raise UnmeasurableError("not every client got its lane")
    yield
    for node in nodes:
        node.close()


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.daemon", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of clients coming and going")
    parser.add_argument("--rounds", type=int, default=5)
    minutes, rounds = (vars(parser.parse_args())[name] for name in ("minutes", "rounds"))
    header(f"daemon: {GPUS} simulated GPUs and 4 RAPL domains at 100 Hz")
    with product() as bench, powercap_tree(bench.folder) as tree:
        driver = gpus(bench.folder)
        sensors = ["--sensor", tree.spec, "--sensor", driver, "--period", "10ms"]
        files = [str(tree.path(key) / "energy_uj") for key in tree.zones]
        loop = [str(compile_c("daemon_loop.c", bench.folder, "-ldl", "-pthread"))]
        loop += [str(PERIOD_NS), str(LOOK_S), driver.partition(":")[2], *files]
        with serving(bench, *sensors) as socket:
            lanes = wait_for_lanes(socket)
            report_cost(socket, tree.spec, loop, rounds)
            report_latency(socket, tree.spec)
            report_growth(socket, tree.spec, minutes)
        show("channels read", float(sum(len(lane["channels"]) for lane in lanes)), "")
        with serving(bench, *sensors[:-2]) as socket:
            wait_for_lanes(socket)
            show("the same at learnt cadence", cpu_share(socket, 10.0), "%", scale=100)


def wait_for_lanes(socket: Path) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        lanes: list[dict[str, Any]] = status(socket)["lanes"]
        if all(lane["channels"] for lane in lanes):
            time.sleep(2.0)  # the first second is about opening
            return lanes
        time.sleep(0.1)
    raise UnmeasurableError(f"not every lane opens: {json.dumps(lanes)}")


@contextmanager
def a_job() -> Iterator[None]:
    """A program that computes. On a machine at rest each wake-up pays for leaving that state."""
    job = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        job.kill()
        job.wait()


def bare_share(socket: Path, loop: list[str]) -> float:
    """What the same calls, reads and sleeps take of a core by themselves.

    The daemon is stopped meanwhile: who finds the machine awake wakes up for less.
    """
    daemon = int(status(socket)["pid"])
    os.kill(daemon, signal.SIGSTOP)
    try:
        _, driver_ns, _, files_ns = map(int, run(loop, {}).split())
    finally:
        os.kill(daemon, signal.SIGCONT)
    time.sleep(0.5)  # it catches up
    return (driver_ns + files_ns) * 1e-9 / LOOK_S


def report_cost(socket: Path, spec: str, loop: list[str], rounds: int) -> None:
    alone, crowded, bare, once = [], [], [], []
    for _ in range(rounds):
        alone.append(cpu_share(socket, LOOK_S))
        bare.append(bare_share(socket, loop))
        once.append(bare_share(socket, [*loop[:1], "--one", *loop[1:]]))
        with watching(spec, CLIENTS):
            time.sleep(0.5)  # their coming is not their being there
            crowded.append(cpu_share(socket, LOOK_S))
    judge("CPU time", Spread.of(alone), "% of a core", scale=100, most=1.0)
    with a_job():
        time.sleep(0.5)
        beside = [cpu_share(socket, LOOK_S) for _ in range(rounds)]
    show("the same beside a job that keeps a CPU busy", Spread.of(beside), "% of a core", scale=100)
    for who, shares in (("a thread each", bare), ("one thread", once)):
        show(f"a bare C loop, {who}", Spread.of(shares), "% of a core", scale=100)
        ratios = [a / b for a, b in zip(alone, shares, strict=True)]
        show(f"CPU time, daemon / C loop, {who}", Spread.of(ratios), "x")
    no_sleep = run([loop[0], "0", "0.5", *loop[3:]], {}).split()
    for who, samples, cpu_ns in (("driver", *no_sleep[:2]), ("files", *no_sleep[2:])):
        share = int(cpu_ns) / int(samples) / PERIOD_NS
        show(f"of the C loop, the {who} without sleeping", share, "% of a core", scale=100)
    facts = status(socket)
    for lane in facts["lanes"]:
        share = lane["cpu_s"] / facts["up_s"]
        show(f"of it, lane {lane['name']} with its driver", share, "% of a core", scale=100)
    added = [(b - a) / CLIENTS for a, b in zip(alone, crowded, strict=True)]
    judge("added by a further client", Spread.of(added), "% of a core", scale=100, most=0.01)
    judge("RSS", float(status(socket)["rss_bytes"]), "MB", scale=1 / MB, most=60)


def report_latency(socket: Path, spec: str) -> None:
    times_s = [first_sample_s(spec) for _ in range(100)]
    judge("request to first sample", Spread.of(times_s), "ms", scale=1e3, most=20)
    before_s = status(socket)["cpu_s"]
    together_s = at_once(spec, CLIENTS)
    # How long each waits is how many processes the machine runs at a time, theirs included.
    show(f"the same, {CLIENTS} processes at once", Spread.of(together_s), "ms", scale=1e3)
    show("the slowest of these", max(together_s), "ms", scale=1e3)
    spent_s = (status(socket)["cpu_s"] - before_s) / CLIENTS
    show("CPU time of the daemon for each of these", spent_s, "ms", scale=1e3)


def report_growth(socket: Path, spec: str, minutes: float) -> None:
    """Twenty clients come each twenty seconds, stay for one, and go."""
    looks, visits, first = [], 0, status(socket)
    begin_s = time.monotonic()
    while (elapsed_s := time.monotonic() - begin_s) < 60 * minutes:
        with watching(spec, 20):
            visits += 20
            time.sleep(1.0)
        time.sleep(19.0)
        looks.append((elapsed_s, status(socket)["rss_bytes"]))
    last, spent_s = status(socket), time.monotonic() - begin_s
    third = max(1, len(looks) // 3)
    early, late = ([rss for _, rss in part] for part in (looks[third : 2 * third], looks[-third:]))
    growth = Spread.of(late).median - Spread.of(early).median if early else 0.0
    print(f"  {visits} clients in {spent_s:.0f} s:")
    what = "growth of RSS, last third over the one before"
    if minutes >= LONG_MINUTES:
        judge(what, growth, "MB", scale=1 / MB, most=0.5)
    else:  # the rings fill for a minute
        show(what, growth, "MB", scale=1 / MB)
    judge("RSS at the end", float(last["rss_bytes"]), "MB", scale=1 / MB, most=60)
    judge("descriptors left", float(last["descriptors"] - first["descriptors"]), "", most=0)
    share = (last["cpu_s"] - first["cpu_s"]) / spent_s
    judge("CPU time meanwhile", share, "% of a core", scale=100, most=1.0)


if __name__ == "__main__":
    main(measure)
