"""`pepr-profile -- CMD…`: run a command undisturbed, and report what it cost."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import click

from pepr_profiler.block import load_summary, open_recording
from pepr_profiler.commands import recording
from pepr_profiler.commands.recording import LiveLine, RecordingRequest, recording_options
from pepr_profiler.errors import UsageError
from pepr_profiler.recording.command import Child, Exit, HeldSignals, resolve
from pepr_profiler.recording.options import Options
from pepr_profiler.recording.recorder import TICK_S, Recorder
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from pepr_profiler.recording.metrics import Metrics


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD [ARG]...")
@click.option(
    "--metric",
    "patterns",
    multiple=True,
    metavar="NAME=REGEX",
    help="Read a metric from the command's output; the last match counts. The first metric is the "
    "run's performance.",
)
@recording_options
def run(command: tuple[str, ...], *, patterns: tuple[str, ...], request: RecordingRequest) -> int:
    """Run CMD and measure what it costs. Its output, input and exit status stay its own."""
    if not command:
        raise UsageError(
            "no command to run",
            why="nothing follows the options",
            fix="pepr-profile [OPTIONS] -- python train.py",
        )
    resolve(command)
    metrics = request.metrics(patterns)
    options = request.options(command, metrics)
    with HeldSignals() as held:
        recorder, ended = _measure(command, options, metrics, held, request)
        request.finish(recorder)
    if ended.signal == signal.SIGINT:
        # A shell breaks off its loop only if we die of the Ctrl-C too; it sees 130 either way.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return ended.status


def _measure(
    command: tuple[str, ...],
    options: Options,
    metrics: Metrics | None,
    held: HeldSignals,
    request: RecordingRequest,
) -> tuple[Recorder, Exit]:
    """Samples before, during and after the command; returns the closed recording."""
    from pepr_profiler import _core

    # Orphaned grandchildren become ours, so that their time is counted when they end.
    _core.set_child_subreaper()
    relay, line = None, LiveLine(on=False)
    if metrics is not None and metrics.has_patterns:
        from pepr_profiler.recording.relay import Relay

        line = LiveLine(on=not request.quiet, feed=metrics.feed)
        relay = Relay(line.sink, before=line.clear)
    recorder = Recorder(options, root="children", command=command, dedicated=True, warn=line.warn)
    open_recording(recorder, request.store)
    try:
        environment = {RUN_DIR_VARIABLE: str(recorder.directory.absolute())}
        child = Child.spawn(command, held=held, env=environment, relay=relay)
    except BaseException:
        recorder.discard()
        raise
    recorder.begin(child.started_ns)

    def tick() -> float:
        after_s = recorder.tick()
        recording.log(recorder, metrics)
        line.update(recorder.directory, child.started_ns)
        return after_s if metrics is None else min(after_s, TICK_S)

    ended = _supervise(child, tick, recorder)
    line.clear()
    for warning in [*child.warnings, *(metrics.finish() if metrics else [])]:
        recorder.add_warning(**warning)
    recording.log(recorder, metrics)
    if ended.descendants_left:
        recorder.add_warning(
            "descendants-left",
            f"{ended.descendants_left} process(es) that the command started still run; "
            "what they cost from now on is not counted",
            "let the command wait for them",
        )
    recorder.close(
        ended.ended_ns,
        exit_facts={
            "signal": ended.signal,
            "cpu_s": ended.cpu_s,
            "max_rss_bytes": ended.max_rss_bytes,
            "code": ended.status,
        },
        meanwhile=load_summary,
    )
    return recorder, ended


def _supervise(child: Child, tick: Callable[[], float], recorder: Recorder) -> Exit:
    """Waits for the child. A fault of ours becomes a warning and does not cost its status."""
    try:
        with recording.collecting_garbage():
            return child.supervise(tick=tick, notifier=recorder.notifier)
    except Exception as error:
        if child.exit is None:
            raise
        recording.warn_of_fault(recorder, error)
        return child.exit
