"""The wrapper's memory over a run and at its end, bytes a value read on disk, CPU time an hour."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import (
    Product,
    UnmeasurableError,
    header,
    judge,
    main,
    powercap_tree,
    product,
    run,
    show,
)

MB = 1e6
SETTLED_S = 10.0
"""From when on the memory should be flat: imports and the first batches are behind."""

ENOUGH_VALUES = 10_000
"""From so many on the bytes a value are the values' own."""


@dataclass(frozen=True)
class Look:
    """One look at the wrapper: bytes resident by kind, its share of shared pages, CPU time."""

    t_s: float
    rss_bytes: int
    private_bytes: int  # without the rings, which fill for their first minute and then stay
    pss_bytes: int
    cpu_s: float


@dataclass(frozen=True)
class Watched:
    """One wrapped `sleep`, from spawn to reaping."""

    looks: list[Look]
    max_rss_bytes: int
    cpu_s: float
    snapshots: list[Path]
    run_directory: Path


def watch(argv: list[str], env: dict[str, str], folder: Path, seconds: float) -> Watched:
    """Looks twice a second while the child sleeps, then without pause until the profiler ends."""
    folder.mkdir()
    store = folder / "store"
    floor_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin_s = time.monotonic()
    with Path(os.devnull).open("w") as null:
        actions = [(os.POSIX_SPAWN_DUP2, null.fileno(), fd) for fd in (1, 2)]
        pid = os.posix_spawn(argv[0], argv, {**env, "PEPR_STORE": str(store)}, file_actions=actions)
    looks: list[Look] = []
    snapshots: list[Path] = []
    snapshot_every_s = max(2.0, seconds / 10)
    while not _ended(pid):
        now_s = time.monotonic() - begin_s
        look = _look(pid, now_s)
        if look is not None:
            looks.append(look)
        ending = now_s > seconds - 0.2
        if not ending and now_s > snapshot_every_s * (len(snapshots) + 1):
            snapshots.append(_copy_lanes(store, folder / f"snapshot-{len(snapshots)}"))
        time.sleep(0.002 if ending else 0.5)
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        raise UnmeasurableError(f"{' '.join(argv)} ended with status {status}")
    max_rss_bytes = usage.ru_maxrss * 1024
    if max_rss_bytes <= floor_bytes:  # exec carries ours over
        raise UnmeasurableError("this process is larger than the one that it measures")
    return Watched(
        looks=looks,
        max_rss_bytes=max_rss_bytes,
        cpu_s=usage.ru_utime + usage.ru_stime,
        snapshots=snapshots,
        run_directory=_run_directory(store),
    )


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _look(pid: int, t_s: float) -> Look | None:
    try:
        status = _fields(Path(f"/proc/{pid}/status"))
        rollup = _fields(Path(f"/proc/{pid}/smaps_rollup"))
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended meanwhile
        return None
    if "RssAnon" not in status or "Pss" not in rollup:
        return None
    anon, file, shared = (status[key] for key in ("RssAnon", "RssFile", "RssShmem"))
    cpu_s = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return Look(t_s, anon + file + shared, anon + file, rollup["Pss"], cpu_s)


def _fields(path: Path) -> dict[str, int]:
    """The lines of /proc files that say kB, in bytes."""
    found = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            found[words[0].rstrip(":")] = int(words[1]) * 1024
    return found


def _run_directory(store: Path) -> Path:
    return next((store / "runs").iterdir())


def _copy_lanes(store: Path, to: Path) -> Path:
    """The lane files as they lie on disk now: what a reader would find after kill -9."""
    to.mkdir()
    # The tail first, as the product's reader does: rows that move meanwhile are then seen twice.
    for path in sorted(_run_directory(store).glob("*.arrows"), key=lambda p: "tail" not in p.name):
        shutil.copy(path, to)
    return to


def count(folder: Path) -> dict[str, list[int]]:
    """Bytes and values read of each lane of a folder, by the product's own reader."""
    from pepr_profiler.trace.lane import read_lanes

    return {
        name: [
            sum(path.stat().st_size for path in folder.glob(f"{name}.*")),
            sum(batch.reads * len(batch.values) for batch in reader),
        ]
        for name, reader in read_lanes(folder).items()
    }


def counted(bench: Product, folder: Path) -> dict[str, list[int]]:
    """In a process of its own: NumPy's memory would hide the wrapper's from ru_maxrss."""
    found: dict[str, list[int]] = json.loads(
        run(bench.module("footprint", "--count", str(folder)), bench.env)
    )
    return found


def _growth(values: Sequence[int]) -> float:
    """Median of the last third less that of the first: batches on their way make it a sawtooth."""
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def report(bench: Product, what: str, watched: Watched, seconds: float) -> None:
    looks = watched.looks
    steady = [look for look in looks if SETTLED_S < look.t_s < seconds - 0.5]
    print(f"  {what}, {seconds:g} s, {len(looks)} looks:")
    show("RSS when settled", steady[0].rss_bytes, "MB", scale=1 / MB)
    show("RSS just before the child ends", steady[-1].rss_bytes, "MB", scale=1 / MB)
    show("Pss just before the child ends", steady[-1].pss_bytes, "MB", scale=1 / MB)
    peak = max(watched.max_rss_bytes, *(look.rss_bytes for look in looks))
    judge("peak RSS, the final summary included", peak, "MB", scale=1 / MB, most=80)
    private = [look.private_bytes for look in steady]
    rings = [look.rss_bytes - look.private_bytes for look in steady]
    judge("growth besides the rings", _growth(private), "MB", scale=1 / MB, most=0.5)
    show("growth of the rings, which are full after 66 s", _growth(rings), "MB", scale=1 / MB)
    cpu_s = steady[-1].cpu_s - steady[0].cpu_s
    hourly = cpu_s / (steady[-1].t_s - steady[0].t_s) * 3600
    show("CPU time of the profiler, steady", hourly, "s/h")
    show("CPU time of the whole run, start and end included", watched.cpu_s, "s")
    _report_disk(bench, watched)


def _report_disk(bench: Product, watched: Watched) -> None:
    """A value is one number that was read of a sensor, stored or on a line between two that are."""
    unit = "bytes/value read"
    during = [_ratio(counted(bench, snapshot).values()) for snapshot in watched.snapshots]
    lanes = counted(bench, watched.run_directory)
    show("all lanes while it runs, at the first look", during[0], unit)
    show("all lanes while it runs, at the last look", during[-1], unit)
    # A file begins with some kB that say what it holds: few values are not judged by them.
    if sum(values for _, values in lanes.values()) > ENOUGH_VALUES:
        judge("all lanes after the run", _ratio(lanes.values()), unit, most=12)
    else:
        show("all lanes after the run", _ratio(lanes.values()), unit)
    for lane, (size, values) in lanes.items():
        show(f"{lane} after the run ({values} values)", size / values, unit)


def _ratio(lanes: Iterable[list[int]]) -> float:
    sizes, values = zip(*lanes, strict=True)
    return float(sum(sizes) / sum(values))


def measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the child sleeps")
    parser.add_argument("--count", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        print(json.dumps(count(arguments.count)))
        return
    seconds = arguments.seconds
    if seconds < 3 * SETTLED_S:
        sys.exit(f"--seconds must be {3 * SETTLED_S:g} or more: a slope needs time")
    header("footprint: the wrapper's memory, disk and CPU time while its child sleeps")
    with product() as bench, powercap_tree(bench.folder) as tree:
        fast = bench.command("--sensor", tree.spec, "--period", "1ms")
        sleep = ["sleep", f"{seconds:g}"]
        cases = (("defaults", bench.command()), ("1 kHz over 4 counters", fast))
        for number, (what, prefix) in enumerate(cases):
            folder = bench.folder / f"watched-{number}"
            watched = watch([*prefix, *sleep], bench.env, folder, seconds)
            report(bench, what, watched, seconds)


if __name__ == "__main__":
    main(measure)
