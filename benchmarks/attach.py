"""Attaching to a training that runs, beside wrapping it from its start: the same energy rate?"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Product,
    Spread,
    UnmeasurableError,
    differences,
    header,
    interleaved,
    judge,
    main,
    product,
    show,
)

SIZES = (1, 50, 500)
"""Processes of the tree that is attached to."""


def latencies_s(folder: Path, size: int, rounds: int) -> list[float]:
    """From the request until every lane has its first sample, of a tree of `size` processes."""
    from pepr_profiler.block import open_attached
    from pepr_profiler.recording.attached import hold
    from pepr_profiler.recording.options import Options

    script = f"for i in $(seq {size - 1}); do sleep 600 & done; echo ready; read line; kill 0"
    tree = subprocess.Popen(
        ["sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert tree.stdout is not None
    tree.stdout.readline()
    options = Options(name="latency")
    found = []
    for _ in range(rounds):
        begin_ns = time.monotonic_ns()
        with hold([tree.pid]) as targets:
            recorder = open_attached(options, folder, targets)
        found.append((time.monotonic_ns() - begin_ns) * 1e-9)
        recorder.discard()
    tree.communicate(b"\n")
    return found


def training(scratch: Product, seconds: float) -> list[str]:
    return scratch.module("loader", "--seconds", str(seconds))


def summary_of(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def rate_w(summary: dict[str, Any]) -> float:
    return float(summary["energy"]["total_j"] / summary["duration_s"])


def attach_to(scratch: Product, pid: int, seconds: float) -> dict[str, Any]:
    """Attaches as a user would, and ends it by Ctrl-C; the summary."""
    file = scratch.folder / "attached.json"
    command = [sys.executable, "-m", "pepr_profiler", "attach", str(pid), "--json", str(file)]
    profiler = subprocess.Popen(command, env=scratch.env, stderr=subprocess.PIPE, text=True)
    assert profiler.stderr is not None
    profiler.stderr.readline()
    time.sleep(seconds)
    profiler.send_signal(signal.SIGINT)
    _, said = profiler.communicate()
    if profiler.returncode != 0:
        raise UnmeasurableError(f"{' '.join(command)} exited {profiler.returncode}:\n{said}")
    return summary_of(file)


def until_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == f"epoch {epoch}\n":
            return
    raise UnmeasurableError("the training ended too early; see: python -m benchmarks.loader")


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0])


@contextmanager
def wrapping(scratch: Product, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A training that is wrapped from its start, in its second epoch; ended when the block ends."""
    command = [*scratch.command("--name", "wrapped", "-q"), *training(scratch, seconds)]
    with subprocess.Popen(command, env=scratch.env, stdout=subprocess.PIPE, text=True) as wrapper:
        until_epoch(wrapper, 1)
        yield wrapper
        assert wrapper.stdout is not None
        wrapper.stdout.read()


def wrapped_w(scratch: Product, begin_ns: int, end_ns: int) -> float:
    """The energy rate of the last training that was wrapped, between two instants."""
    from pepr_profiler.summary.summarise import summarise

    runs = (Path(scratch.env["PEPR_STORE"]) / "runs").glob("wrapped-*")
    last = max(runs, key=lambda path: path.stat().st_mtime_ns)
    return rate_w(summarise(last, since_ns=begin_ns, until_ns=end_ns))


def same_window(scratch: Product, seconds: float) -> float:
    """Wraps a training and attaches to it midway; attached over wrapped, over the same instants."""
    with wrapping(scratch, seconds) as wrapper:
        attached = attach_to(scratch, child_of(wrapper.pid), seconds / 2)
    return rate_w(attached) / wrapped_w(scratch, *attached["recording"]["window_ns"])


def alone_wrapped_w(scratch: Product, seconds: float) -> float:
    """The energy rate of a training that was wrapped from its start, once it trains."""
    with wrapping(scratch, seconds):
        begin_ns = time.monotonic_ns()
    return wrapped_w(scratch, begin_ns, begin_ns + round(seconds / 2 * 1e9))


def alone_attached_w(scratch: Product, seconds: float) -> float:
    """The energy rate of a training that was started bare, from its second epoch on."""
    command = training(scratch, 1.2 * seconds)
    # Its workers complain when it is ended.
    with subprocess.Popen(
        command, env=scratch.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as bare:
        until_epoch(bare, 1)
        rate = rate_w(attach_to(scratch, bare.pid, seconds / 2))
        bare.terminate()
    return rate


def measure(rounds: int, seconds: float, *, apart: bool) -> None:
    with product() as scratch:
        header("attach: running processes")
        for size in SIZES:
            latency = Spread.of(latencies_s(scratch.folder / "latency", size, 8))
            label = f"until the first sample, {size} process{'es' if size > 1 else ''}"
            judge(label, latency, "ms", scale=1e3, most=100)
        ratios = [same_window(scratch, seconds) for _ in range(rounds)]
        off = Spread.of([100 * abs(ratio - 1) for ratio in ratios])
        judge("job's energy, attached from wrapped, same window", off, "%", most=3)
        if apart:
            rates = interleaved(
                {
                    "wrapped": lambda: alone_wrapped_w(scratch, seconds),
                    "attached": lambda: alone_attached_w(scratch, seconds),
                },
                rounds,
            )
            show("wrapped from its start", Spread.of(rates["wrapped"]), "W")
            show("attached midway, another time", Spread.of(rates["attached"]), "W")
            gaps = differences(rates["attached"], rates["wrapped"])
            relative = [100 * g / w for g, w in zip(gaps, rates["wrapped"], strict=True)]
            show("difference", Spread.of(relative), "%")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a training (default 20)")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="also compare different runs of the training, which a shared machine blurs",
    )
    options = parser.parse_args()
    main(lambda: measure(options.rounds, options.seconds, apart=options.apart))
