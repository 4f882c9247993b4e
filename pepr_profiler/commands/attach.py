"""`pepr-profile attach PID…`: measure what already runs, and leave it alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pepr_profiler.block import open_attached
from pepr_profiler.commands import complain, recording
from pepr_profiler.commands.recording import LiveLine, RecordingRequest, recording_options
from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.recording.attached import StopSignals, Targets, hold, hold_cgroup
from pepr_profiler.recording.options import Options
from pepr_profiler.recording.recorder import TICK_S
from pepr_profiler.units import parse_duration

if TYPE_CHECKING:
    from pepr_profiler.recording.metrics import Metrics


@click.command()
@click.argument("words", nargs=-1, metavar="PID...")
@click.option("--pid", "pids", type=int, multiple=True, metavar="PID", help="The same; repeatable.")
@click.option(
    "--cgroup",
    metavar="PATH",
    help="Measure all that is in this cgroup (of version 2): /sys/fs/cgroup/PATH, or PATH.",
)
@click.option(
    "--container",
    metavar="ID",
    help="Measure a running container of Docker, Podman, containerd or CRI-O; the beginning of its "
    "id suffices.",
)
@click.option(
    "--duration", metavar="TIME", help="Measure this long [until all have exited]: 30s, 5m."
)
@click.option("--metric", "patterns", multiple=True, hidden=True)
@recording_options
def attach(
    words: tuple[str, ...],
    *,
    pids: tuple[int, ...],
    cgroup: str | None,
    container: str | None,
    duration: str | None,
    patterns: tuple[str, ...],
    request: RecordingRequest,
) -> int:
    """Measure the processes PID and all that they start, now and later.

    Or measure all that is in a cgroup or a container, with what comes and goes there.

    It lasts until all of them have exited, --duration is over, or Ctrl-C: any of these is its
    regular end, with exit status 0. The processes do not notice: nothing is sent to them.
    """
    if patterns:
        raise UsageError(
            f"--metric {patterns[0]} cannot be read",
            why="the output of a process that already runs does not pass by here",
            fix="--metric-file results.json:KEY, or afterwards: pepr-profile runs set RUN "
            "NAME=VALUE",
        )
    duration_ns = parse_duration(duration) if duration else None
    with StopSignals() as stop, _hold([*map(_pid, words), *pids], cgroup, container) as targets:
        metrics = request.metrics()
        options = request.options(targets.command, metrics)
        return _measure(
            options, targets, metrics, stop=stop, duration_ns=duration_ns, request=request
        )


def _measure(
    options: Options,
    targets: Targets,
    metrics: Metrics | None,
    *,
    stop: StopSignals,
    duration_ns: int | None,
    request: RecordingRequest,
) -> int:
    """Measures and summarises the processes; our exit status."""
    line = LiveLine(on=not request.quiet)
    recorder = open_attached(options, request.store, targets, dedicated=True, warn=line.warn)
    begin_ns = time.monotonic_ns()
    if stop.received is not None:
        recorder.discard()
        complain("interrupted before the first sample")
        return 130
    try:
        recorder.begin(begin_ns)
    except BaseException:
        recorder.discard()
        raise
    if not request.quiet:
        complain(f"measuring {targets}; Ctrl-C ends that, they run on")

    def tick() -> bool:
        recorder.tick()
        recording.log(recorder, metrics)
        line.update(recorder.directory, begin_ns)
        return recorder.anyone_lives

    until_ns = None if duration_ns is None else begin_ns + duration_ns
    try:
        with recording.collecting_garbage():
            ended_by = targets.watch(tick=tick, every_s=TICK_S, stop=stop, until_ns=until_ns)
    except Exception as error:
        ended_by = "fault"
        recording.warn_of_fault(recorder, error)
    now_ns = time.monotonic_ns()
    end_ns = {"duration": until_ns, "exit": recorder.all_exited_ns}.get(ended_by) or now_ns
    line.clear()
    with recording.summary_or_reason(recorder):
        for warning in metrics.finish() if metrics else []:
            recorder.add_warning(**warning)
        recording.log(recorder, metrics)
        exit_facts = {"ended_by": ended_by, "code": None}
        recorder.close(end_ns, exit_facts=exit_facts, meanwhile=recording.load_summary_quietly)
        request.finish(recorder)
    return PeprError.status if ended_by == "fault" else 0


def _hold(pids: list[int], cgroup: str | None, container: str | None) -> Targets:
    """What is to be followed: processes, a cgroup or a container."""
    if cgroup is None and container is None:
        return hold(pids)
    if pids or (cgroup is not None and container is not None):
        raise UsageError(
            "only one of PID, --cgroup and --container can be followed",
            why="one run is of one thing",
            fix="start an attach for each, with one --job ID for all",
        )
    from pepr_profiler.recording.cgroups import container_folder, folder_of

    return hold_cgroup(container_folder(container or "") if cgroup is None else folder_of(cgroup))


def _pid(word: str) -> int:
    if word.isdecimal():
        return int(word)
    raise UsageError(
        f"{word!r} is not a PID",
        why="attach takes the numbers of running processes",
        fix="see: ps -eo pid,user,args; to start a program under it: pepr-profile -- CMD",
    )
