"""`pepr-profile -- CMD…`: run a command as if nobody watched, and say what it cost."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pepr_profiler.commands import complain, whoever_listens
from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.profiler import RUN_DIR_VARIABLE, Options, Recorder, intensity_of
from pepr_profiler.targets import Child, Exit, HeldSignals, Relay, hold_signals, resolve
from pepr_profiler.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from pepr_profiler.metrics import Metrics

_FLUSH_S = 0.5
_QUIET_S = 3.0  # of silence, before the live line appears
_LIVE_SHARE = 100  # the live line may take a hundredth of the time


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD [ARG]...")
@click.option("--name", metavar="NAME", help="What the run is called [the command's name].")
@click.option(
    "--experiment", envvar="PEPR_EXPERIMENT", metavar="NAME", help="Runs to be compared share one."
)
@click.option("--job", envvar="PEPR_JOB", metavar="ID", help="Recordings of one job share one.")
@click.option(
    "--metric",
    "patterns",
    multiple=True,
    metavar="NAME=REGEX",
    help="Read a metric from the command's output; the last match counts. The first metric is the "
    "run's performance.",
)
@click.option(
    "--metric-file",
    "files",
    multiple=True,
    metavar="FILE:KEY[:NAME]",
    help="Read a metric from a JSON or CSV file that the command writes.",
)
@click.option(
    "--region", envvar="PEPR_REGION", metavar="COUNTRY", help="Whose grid: DK, DNK, Denmark."
)
@click.option(
    "--carbon-intensity",
    envvar="PEPR_CARBON_INTENSITY",
    type=float,
    metavar="G_PER_KWH",
    help="The grid's carbon intensity, instead of --region.",
)
@click.option(
    "--pue",
    envvar="PEPR_PUE",
    type=float,
    default=1.0,
    metavar="FACTOR",
    help="The data centre's power usage effectiveness, for carbon [1.0].",
)
@click.option(
    "--cpu-power",
    envvar="PEPR_CPU_POWER",
    metavar="IDLE:MAX",
    help="The machine's power in W, where the CPU has no sensor.",
)
@click.option(
    "--sensor",
    "sensors",
    envvar="PEPR_SENSOR",
    multiple=True,
    metavar="KIND[:WHERE]",
    help="Read this sensor instead of what is found: nvml, powercap, replay:FILE …",
)
@click.option(
    "--period",
    envvar="PEPR_PERIOD",
    metavar="TIME",
    help="Read every sensor this often [just after each of its refreshes]: 10ms.",
)
@click.option(
    "--overhead",
    envvar="PEPR_OVERHEAD",
    default="0.5%",
    metavar="SHARE",
    help="CPU time that reading sensors may take, of one core; kept by reading less often [0.5%].",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="PEPR_STORE",
    metavar="DIR",
    help="Where runs live [PEPR_STORE, else the user's data directory].",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the summary as JSON; - is stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No summary and no live line; warnings stay.")
def run(
    command: tuple[str, ...],
    *,
    name: str | None,
    experiment: str | None,
    job: str | None,
    patterns: tuple[str, ...],
    files: tuple[str, ...],
    region: str | None,
    carbon_intensity: float | None,
    pue: float,
    cpu_power: str | None,
    sensors: tuple[str, ...],
    period: str | None,
    overhead: str,
    store: Path | None,
    json_file: str | None,
    quiet: bool,
) -> int:
    """Run CMD and measure what it costs. Its output, input and exit status stay its own."""
    if not command:
        raise UsageError(
            "no command to run",
            why="nothing follows the options",
            fix="pepr-profile [OPTIONS] -- python train.py",
        )
    resolve(command)
    if not (pue >= 1.0 and pue < float("inf")):
        raise UsageError(
            f"a PUE of {pue:g} is not possible",
            why="a data centre draws at least what its machines draw",
            fix="give 1.0 (the machines alone) or more, for example --pue 1.2",
        )
    if cpu_power is not None:
        from pepr_profiler.modelled import CpuIdentity, cpu_model

        cpu_model(
            CpuIdentity(), vcpus=1, override=cpu_power
        )  # a bad one fails here, not at the end
    metrics = None
    if patterns or files:
        from pepr_profiler.metrics import Metrics

        metrics = Metrics(patterns, files)
    if json_file is not None and json_file != "-":
        _require_writable(Path(json_file))
    options = Options(
        name=name or _name_of(command),
        experiment=experiment,
        job=job,
        store=store,
        sensors=sensors,
        period_ns=parse_duration(period) if period else None,
        overhead=share_of(overhead),
        intensity=intensity_of(region, carbon_intensity),
        pue=pue,
        cpu_power=cpu_power,
        performance=metrics.names[0] if metrics else None,
    )
    with hold_signals() as held:
        recorder, ended = _measure(command, options, metrics, held, live=not quiet)
        # NumPy's BLAS would start a thread a core that nothing uses: 0.1 s of CPU on two cores.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        summary = recorder.summarise()
        _show(summary, json_file=json_file, quiet=quiet)
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
    *,
    live: bool,
) -> tuple[Recorder, Exit]:
    """Samples before, during and after the command; returns the closed recording."""
    from pepr_profiler import _core

    # Orphaned grandchildren become ours, so that their time is counted when they end.
    _core.set_child_subreaper()
    relay = line = None
    if metrics is not None and metrics.has_patterns:
        line = _LiveLine(metrics.feed)
        relay = Relay(line.sink, before=line.clear) if live else Relay(metrics.feed)

    def warn(code: str, text: str, hint: str) -> None:
        if line is not None:
            line.clear()
        if code in _URGENT:
            complain(f"{text}\n  fix: {hint}")

    recorder = Recorder(options, root="children", command=command, warn=warn)
    try:
        recorder.open()
        environment = {RUN_DIR_VARIABLE: str(recorder.directory.absolute())}
        child = Child.spawn(command, held=held, env=environment, relay=relay)
    except BaseException:
        recorder.discard()
        raise
    recorder.begin(child.started_ns)

    def tick() -> None:
        recorder.flush()
        _log(recorder, metrics)
        if line is not None and live:
            line.update(recorder.directory, child.started_ns)

    ended = _supervise(child, tick, recorder)
    if line is not None:
        line.clear()
    for warning in [*child.warnings, *(metrics.finish() if metrics else [])]:
        recorder.add_warning(**warning)
    _log(recorder, metrics)
    if ended.descendants_left:
        recorder.add_warning(
            "descendants-left",
            f"{ended.descendants_left} process(es) that the command started still run; "
            "what they cost from now on is not counted",
            "let the command wait for them",
        )
    recorder.close(
        ended.ended_ns,
        exit_code=ended.status,
        exit_facts={
            "signal": ended.signal,
            "cpu_s": ended.cpu_s,
            "max_rss_bytes": ended.max_rss_bytes,
        },
    )
    return recorder, ended


def _supervise(child: Child, tick: Callable[[], None], recorder: Recorder) -> Exit:
    """Waits for the child; a fault of ours on the way is told and does not cost its status."""
    try:
        gc.enable()  # off since the start, and for the imports of the summary again
        return child.supervise(tick=tick, every_s=_FLUSH_S)
    except Exception as error:
        if child.exit is None:
            raise
        recorder.add_warning(
            "profiler-fault",
            f"the profiler stopped recording while the command ran: {error!r}",
            "report this as a bug of pepr-profiler",
        )
        return child.exit
    finally:
        gc.disable()


_URGENT = frozenset(
    {"disk-full", "profiler-fault", "slow-sensor", "store-unwritable", "unwritable"}
)
"""Said when they happen; the rest is in the summary."""


def _log(recorder: Recorder, metrics: Metrics | None) -> None:
    """Moves the metrics found so far to the recording."""
    if metrics is None:
        return
    for point in metrics.take():
        recorder.log(point.name, point.value, t_ns=point.t_ns)


def _show(summary: dict[str, Any], *, json_file: str | None, quiet: bool) -> None:
    from pepr_profiler.commands.report import show, write_summary

    if json_file is not None:
        try:
            with whoever_listens(sys.stdout):
                write_summary(summary, json_file)
        except PeprError as error:  # the command has run: its status stands
            complain(str(error))
    if not quiet:
        with whoever_listens(sys.stderr):
            show(summary, file=sys.stderr)


def share_of(text: str) -> float:
    """0.5% or 0.005 as a fraction. Raises UsageError for what is none in (0, 1]."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(
            f"an overhead of '{text}' is not possible",
            why="it is the share of one core that reading the sensors may take",
            fix="give more than 0% and at most 100%, for example --overhead 0.5%",
        )
    return share


def _name_of(command: tuple[str, ...]) -> str:
    """The script's name where an interpreter runs one, else the program's."""
    program = Path(command[0]).name
    if program.startswith(("python", "torchrun", "bash", "sh")):
        for i, argument in enumerate(command[1:], start=1):
            if argument == "-m" and i + 1 < len(command):
                return command[i + 1].rsplit(".", 1)[-1]
            if not argument.startswith("-"):
                return Path(argument).stem
            if argument == "-c":
                break
    return program


def _require_writable(path: Path) -> None:
    directory = path.parent
    if path.is_dir() or not os.access(path if path.exists() else directory, os.W_OK):
        raise UsageError(
            f"the summary cannot be written to {path}",
            why="it is a directory" if path.is_dir() else f"{directory} is missing or not writable",
            fix="give --json FILE in a directory that you may write",
        )


class _LiveLine:
    """One status line on our terminal while the child is quiet; gone before anything is said.

    It needs to see the child's output, or it would wipe out a line that the child has begun: only
    a run with a metric pattern has one.
    """

    def __init__(self, feed: Callable[[int, bytes, int], None]) -> None:
        self._feed = feed
        self._on = sys.stderr.isatty()
        self._lock = threading.Lock()  # the child speaks in threads of the relay
        self._shown = False
        self._line_begun = False
        self._next_s = time.monotonic() + _QUIET_S

    def sink(self, channel: int, data: bytes, t_ns: int) -> None:
        """Takes note of what the child has said, and passes it on."""
        self._line_begun = not data.endswith(b"\n")
        self._next_s = time.monotonic() + _QUIET_S
        self._feed(channel, data, t_ns)

    def update(self, directory: Path, started_ns: int) -> None:
        """Shows the line anew, if it is time and the child is quiet."""
        now_s = time.monotonic()
        if not self._on or now_s < self._next_s or not _in_foreground():
            return
        from pepr_profiler.report.terminal import render_live
        from pepr_profiler.summary import summarise

        energy = summarise(directory, marks=False)["energy"]
        elapsed_s = (time.monotonic_ns() - started_ns) * 1e-9
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        text = render_live(
            elapsed_s, energy["total_j"], energy["mean_w"], energy["provenance"] or "", width - 1
        )
        with self._lock:
            if time.monotonic() >= self._next_s and not self._line_begun:
                self._write(f"\r\x1b[2K{text}\r")
                self._shown = True
        cost_s = time.monotonic() - now_s
        self._next_s = max(self._next_s, now_s + max(1.0, _LIVE_SHARE * cost_s))

    def clear(self) -> None:
        """Takes the line away, if it is there."""
        with self._lock:
            if self._shown:
                self._write("\r\x1b[2K")
                self._shown = False

    def _write(self, text: str) -> None:
        with whoever_listens(sys.stderr):
            sys.stderr.write(text)
            sys.stderr.flush()


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except OSError:
        return False
