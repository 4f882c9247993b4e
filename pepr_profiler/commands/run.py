"""`pepr-profile -- CMD…`: run a command undisturbed, and report what it cost."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from pepr_profiler import _core
from pepr_profiler.block import open_recording
from pepr_profiler.commands import complain, recording
from pepr_profiler.commands.recording import LiveLine, RecordingRequest, recording_options
from pepr_profiler.errors import PeprError, UnmeasuredError, UsageError, fix_of, reason_of
from pepr_profiler.recording.command import Child, Exit, HeldSignals, resolve
from pepr_profiler.recording.options import Options
from pepr_profiler.recording.recorder import TICK_S, Recorder
from pepr_profiler.sensors.spec import MARK_VARIABLE, ProcessRoot
from pepr_profiler.trace.run_json import RUN_DIR_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pepr_profiler.recording.metrics import Metrics

_OUTSIDE_S, _OUTSIDE_SHARE = 0.3, 0.02
"""CPU time of a command outside of the cgroup that is followed which is no reason for a warning:
so much, or such a share of a core."""

_WORKS_S = 0.05
"""So much CPU time besides the command's own is not by chance: it is of what it started."""


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
@click.option(
    "--follow",
    metavar="cgroup[:PATH]",
    help="Measure all that is in a cgroup (of version 2) while CMD runs, instead of CMD and what "
    "it starts: the one that CMD is in, or /sys/fs/cgroup/PATH, which CMD may make.",
)
@recording_options
def run(
    command: tuple[str, ...],
    *,
    patterns: tuple[str, ...],
    follow: str | None,
    request: RecordingRequest,
) -> int:
    """Run CMD and measure what it costs. Its output, input and exit status stay its own."""
    if not command:
        raise UsageError(
            "no command to run",
            why="nothing follows the options",
            fix="pepr-profile [OPTIONS] -- python train.py",
        )
    resolve(command)
    root = ProcessRoot("children") if follow is None else _followed(follow)
    metrics = request.metrics(patterns)
    options = request.options(command, metrics)
    with HeldSignals() as held:
        ended = _measure(command, options, metrics, held, request=request, root=root)
    if ended.signal == signal.SIGINT:
        # A shell breaks off its loop only if we die of the Ctrl-C too; it sees 130 either way.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return ended.status


def _followed(text: str) -> ProcessRoot:
    """The cgroup that `--follow` names."""
    from pepr_profiler.recording.cgroups import folder_of, own_folder

    what, names_one, path = text.partition(":")
    if what != "cgroup":
        raise UsageError(
            f"--follow {text} is not possible",
            why="only cgroups can be followed",
            fix="--follow cgroup, or --follow cgroup:PATH; running processes: pepr-profile attach "
            "PID",
        )
    return ProcessRoot.of_cgroup(folder_of(path, exists=False) if names_one else own_folder())


def _measure(
    command: tuple[str, ...],
    options: Options,
    metrics: Metrics | None,
    held: HeldSignals,
    *,
    request: RecordingRequest,
    root: ProcessRoot,
) -> Exit:
    """Samples before, during and after the command, and summarises that; how the command ended.

    Once the command runs, no fault of ours ends its supervision: there may be no summary then.
    Raises UnmeasuredError if it cannot be recorded and does not run yet.
    """
    relay, line = None, LiveLine(on=False)
    if metrics is not None and metrics.has_patterns:
        from pepr_profiler.recording.relay import Relay

        line = LiveLine(on=not request.quiet, feed=metrics.feed)
        relay = Relay(line.sink, before=line.clear)
    try:
        recorder = Recorder(options, root=root, command=command, dedicated=True, warn=line.warn)
        open_recording(recorder, request.store)
        _core.set_child_subreaper()
    except PeprError:
        raise
    except Exception as error:
        raise UnmeasuredError(command) from error
    try:
        environment = {RUN_DIR_VARIABLE: str(recorder.directory.absolute())}
        if recorder.mark is not None:
            environment[MARK_VARIABLE] = recorder.mark
        child = Child.spawn(command, held=held, env=environment, relay=relay)
    except BaseException as error:
        recorder.discard()
        if getattr(error.__cause__, "errno", None) in (errno.EAGAIN, errno.ENOMEM):
            raise UnmeasuredError(command) from error.__cause__  # our threads took what it needs
        raise
    try:
        recorder.begin(child.started_ns)
    except Exception as error:
        complain(f"{command[0]} runs unmeasured: {reason_of(error)}\n  fix: {fix_of(error)}")
        with suppress(OSError):
            recorder.discard()
        return _supervise(child, None, recorder)

    def tick() -> float:
        after_s = recorder.tick()
        recording.log(recorder, metrics)
        line.update(recorder.directory, child.started_ns)
        return after_s if metrics is None else min(after_s, TICK_S)

    ended = _supervise(child, tick, recorder)
    with recording.summary_or_reason(recorder):
        facts = _exit_facts(recorder, command, root, ended, child.started_ns)
        _close(recorder, child, ended, metrics, line, facts=facts)
        request.finish(recorder)
    return ended


def _close(
    recorder: Recorder,
    child: Child,
    ended: Exit,
    metrics: Metrics | None,
    line: LiveLine,
    *,
    facts: dict[str, Any],
) -> None:
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
        exit_facts=facts,
        meanwhile=recording.load_summary_quietly,
    )


def _exit_facts(
    recorder: Recorder, command: tuple[str, ...], root: ProcessRoot, ended: Exit, started_ns: int
) -> dict[str, Any]:
    """How the command ended, and what the total lacks; the user is warned of that."""
    facts: dict[str, Any] = {
        "signal": ended.signal,
        "cpu_s": ended.cpu_s,
        "max_rss_bytes": ended.max_rss_bytes,
        "code": ended.status,
    }
    duration_s = (ended.ended_ns - started_ns) * 1e-9
    if not root.cgroup:
        return facts | _submitter(recorder, command, ended, duration_s)
    from pepr_profiler.recording.cgroups import members_of

    is_inside = os.getpid() in members_of(root.cgroup)
    if not is_inside:
        facts["max_rss_bytes"] = None
    job_s = recorder.job_cpu_s(ended.ended_ns)
    if job_s == 0 and recorder.options.scope == "job":
        recorder.add_warning(
            "empty-cgroup",
            f"nothing ran in the cgroup {root.cgroup}: the total has none of the work",
            "cat /proc/PID/cgroup shows that of a process",
        )
        return {**facts, "empty_cgroup": root.cgroup}
    if job_s is None:
        return facts
    outside_s = ended.cpu_s - job_s
    if not is_inside and outside_s > max(_OUTSIDE_S, _OUTSIDE_SHARE * duration_s):
        recorder.add_warning(
            "outside-cgroup",
            f"{command[0]} used {outside_s:.1f} s of CPU time outside of the cgroup "
            f"{root.cgroup}, which are not in the total",
            "without --follow it is measured with all that it starts",
        )
    found_s = job_s - ended.cpu_s if is_inside else job_s
    if found_s < _WORKS_S or os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        facts |= _submitter(recorder, command, ended, duration_s, found_s=found_s)
    return facts


def _submitter(
    recorder: Recorder,
    command: tuple[str, ...],
    ended: Exit,
    duration_s: float,
    *,
    found_s: float | None = None,
) -> dict[str, Any]:
    """The program that started the work elsewhere, if one did; the user is warned of it.

    `found_s` is the CPU time of that work which is in the total all the same. By default it is that
    of processes with our mark, as Slurm's daemon gives it to the tasks of srun. Nobody knows then
    whether there were more, on other machines or for a short time.
    """
    from pepr_profiler.commands.submitters import Submitter

    given = sys.argv[1 : len(sys.argv) - len(command)]
    options = [word for i, word in enumerate(given) if word != "--" and (i or word != "run")]
    submitter = Submitter.of(command, options)
    if submitter is None or not submitter.did_nothing(ended.cpu_s, duration_s):
        return {}
    if found_s is None:
        found_s = (recorder.job_cpu_s(ended.ended_ns) or 0.0) - ended.cpu_s
    found_s = found_s if found_s >= _WORKS_S else 0.0
    whole = recorder.options.scope == "device"
    if not submitter.profiles:
        recorder.add_warning(**submitter.warning(ended.cpu_s, found_s=found_s, whole=whole))
    return {} if whole else {"submitter": submitter.name, "found_cpu_s": found_s}


def _supervise(child: Child, tick: Callable[[], float] | None, recorder: Recorder) -> Exit:
    """Waits for the child. A fault of ours becomes a warning and does not cost its status."""
    try:
        with recording.collecting_garbage():
            first_s = recorder.first_tick_s
            return child.supervise(tick=tick, first_s=first_s, notifier=recorder.notifier)
    except Exception as error:
        recording.warn_of_fault(recorder, error)
        return child.supervise() if child.exit is None else child.exit
