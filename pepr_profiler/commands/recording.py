"""What `run` and `attach` share: the options of a recording, its live line and its end."""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pepr_profiler.block import complete_recording, grid_intensity, load_summary
from pepr_profiler.commands import (
    TEXT,
    complain,
    decorate,
    moves_cursor,
    require_writable,
    store_option,
    whoever_listens,
    written_output,
)
from pepr_profiler.commands.programs import name_of
from pepr_profiler.errors import PeprError, reason_of
from pepr_profiler.record import Record
from pepr_profiler.recording.options import SCOPES, Options
from pepr_profiler.recording.recorder import Recorder
from pepr_profiler.store.runs import default_path

if TYPE_CHECKING:
    from pepr_profiler.recording.metrics import Metrics

_QUIET_S = 3.0  # of silence, before the live line appears
_LIVE_SHARE = 100  # the live line may take a hundredth of the time
_URGENT = frozenset(
    {"disk-full", "profiler-fault", "removed", "slow-sensor", "store-unwritable", "unwritable"}
)
"""Said when they happen; the rest is in the summary."""


class RecordingRequest(Record):
    """What the options that every recording takes ask for, as they were given.

    `others` are those that `Options.checked` takes as they are.
    """

    name: str | None
    files: tuple[str, ...]
    region: str | None
    carbon_intensity: float | None
    period: str | None
    store: Path | None
    json_file: str | None
    quiet: bool
    others: Mapping[str, Any]

    def metrics(self, patterns: Sequence[str] = ()) -> Metrics | None:
        """The metrics that are asked for. Raises UsageError for one that cannot work."""
        if not patterns and not self.files:
            return None
        from pepr_profiler.recording.metrics import Metrics

        return Metrics(patterns, self.files)

    def options(self, command: Sequence[str], metrics: Metrics | None) -> Options:
        """The recording of `command` that is asked for. Raises UsageError for what cannot be."""
        if self.json_file is not None and self.json_file != "-":
            fix = "give --json FILE in a folder that you may write"
            require_writable(Path(self.json_file), fix=fix)
        return Options.checked(
            name=self.name or name_of(command),
            period=self.period or None,
            intensity=grid_intensity(self.region, self.carbon_intensity),
            performance=metrics.names[0] if metrics else None,
            **self.others,
        )

    def finish(self, recorder: Recorder) -> None:
        """Computes the summary of a closed recording, and writes it where it was asked for."""
        summary = complete_recording(recorder)
        from pepr_profiler.commands.report import show, write_summary

        if self.json_file is not None:
            try:
                with suppress(BrokenPipeError), written_output():
                    write_summary(summary, self.json_file)
            except PeprError as error:  # what was measured has happened: the status stands
                complain(str(error))
        if self.quiet:
            for warning in summary["warnings"]:
                if warning["code"] not in _URGENT:
                    complain(f"{warning['text']}\n  fix: {warning['hint']}")
            return
        with whoever_listens(sys.stderr):
            made = recorder.directory.parents[1]  # elsewhere, if the store cannot be written
            same = self.store is not None and self.store.absolute() == made
            usual = self.store is None and default_path().absolute() == made
            show(summary, file=sys.stderr, store=self.store if same or usual else made)


def _none_if_empty(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """A variable of a script that is not set names nothing: such runs have nothing in common."""
    return value or None


_OPTIONS = (
    click.option("--name", metavar="NAME", help="Name of the run [the command's name]."),
    click.option(
        "--experiment",
        envvar="PEPR_EXPERIMENT",
        metavar="NAME",
        callback=_none_if_empty,
        help="Experiment that the run belongs to; `compare` ranks the runs of one.",
    ),
    click.option(
        "--job",
        envvar="PEPR_JOB",
        metavar="ID",
        callback=_none_if_empty,
        help="Job that the recording is part of, where several record one: ranks, nodes.",
    ),
    click.option(
        "--metric-file",
        "files",
        multiple=True,
        metavar="FILE:KEY[:NAME]",
        help="Read a metric from a JSON or CSV file that the command writes.",
    ),
    click.option(
        "--region",
        type=TEXT,
        envvar="PEPR_REGION",
        metavar="COUNTRY",
        help="Country whose grid's mean carbon intensity is used: DK, DNK, Denmark.",
    ),
    click.option(
        "--carbon-intensity",
        envvar="PEPR_CARBON_INTENSITY",
        type=float,
        metavar="G_PER_KWH",
        help="The grid's carbon intensity, instead of --region.",
    ),
    click.option(
        "--pue",
        envvar="PEPR_PUE",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="The data centre's power usage effectiveness, for carbon [1.0].",
    ),
    click.option(
        "--cpu-power",
        envvar="PEPR_CPU_POWER",
        metavar="IDLE:MAX",
        help="The machine's power in W, where the CPU has no sensor.",
    ),
    click.option(
        "--attribution",
        "--scope",
        "scope",
        envvar=["PEPR_ATTRIBUTION", "PEPR_SCOPE"],
        type=click.Choice(SCOPES),
        default="job",
        help="What the total energy is of: the job's share of its devices, or whole devices [job].",
    ),
    click.option(
        "--sensor",
        "sensors",
        envvar="PEPR_SENSOR",
        multiple=True,
        metavar="KIND[:WHERE]",
        help="Read this sensor instead of what is found: nvml, powercap, replay:FILE …",
    ),
    click.option(
        "--period",
        envvar="PEPR_PERIOD",
        metavar="TIME",
        help="Read every sensor this often [just after each of its refreshes]: 10ms. At most 10 "
        "times a second for processes, and 5 for what a GPU reports besides energy.",
    ),
    click.option(
        "--overhead",
        envvar="PEPR_OVERHEAD",
        default="0.5%",
        metavar="SHARE",
        help="Share of one core that reading sensors may take; they are read less often to keep "
        "it [0.5%].",
    ),
    store_option,
    click.option(
        "--json", "json_file", metavar="FILE", help="Write the summary as JSON; - is stdout."
    ),
    click.option("-q", "--quiet", is_flag=True, help="No summary and no live line; warnings stay."),
)


_OTHERS = ("experiment", "job", "sensors", "overhead", "pue", "cpu_power", "scope")


def recording_options(verb: Callable[..., int]) -> Callable[..., int]:
    """Gives a verb the options of every recording, as its argument `request`."""

    @functools.wraps(verb)
    def with_request(**parameters: Any) -> int:
        others = {name: parameters.pop(name) for name in _OTHERS}
        asked = {
            name: parameters.pop(name) for name in RecordingRequest._fields if name != "others"
        }
        return verb(**parameters, request=RecordingRequest(**asked, others=others))

    return decorate(with_request, _OPTIONS)


def log(recorder: Recorder, metrics: Metrics | None) -> None:
    """Moves the metrics found so far, also in files, to the recording."""
    if metrics is None:
        return
    metrics.watch()
    for point in metrics.take():
        recorder.log(point.name, point.value, t_ns=point.t_ns)


@contextmanager
def collecting_garbage() -> Iterator[None]:
    """For the long part of a recording; it is off since the start, and for the summary again."""
    gc.enable()
    try:
        yield
    finally:
        gc.disable()


def load_summary_quietly() -> None:
    """As `load_summary`, in a process that is ours alone."""
    # BLAS would start a thread a core that nothing uses: 0.1 s of CPU on two cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    load_summary()


@contextmanager
def summary_or_reason(recorder: Recorder) -> Iterator[None]:
    """Within it a fault of ours costs the summary, and not the exit status."""
    try:
        yield
    except Exception as error:
        kept = f"the recording is kept: pepr-profile report {recorder.directory}"
        complain(f"there is no summary: {reason_of(error)}\n  fix: {kept}")


def warn_of_fault(recorder: Recorder, error: Exception) -> None:
    """Tells of a fault of ours in the long part of a recording, which then ends with a summary."""
    recorder.add_warning(
        "profiler-fault",
        f"the profiler stopped recording on the way: {error!r}",
        "report this as a bug of pepr-profiler",
    )


class LiveLine:
    """A status line on our terminal if it is `on`, shown while nothing else is written there.

    A child that shares the terminal has to pass its output through `sink`, which hands it on to
    `feed`; else our line would wipe out one that the child has begun.
    """

    def __init__(self, *, on: bool, feed: Callable[[int, bytes, int], None] | None = None) -> None:
        self._on = on and moves_cursor(sys.stderr)
        self._feed = feed
        self._lock = threading.Lock()  # the child speaks in threads of the relay
        self._shown = False
        self._line_begun = False
        self._next_s = time.monotonic() + _QUIET_S

    def sink(self, channel: int, data: bytes, t_ns: int) -> None:
        """Notices that the child has written something, and passes it on."""
        self._line_begun = not data.endswith(b"\n")
        self._next_s = time.monotonic() + _QUIET_S
        if self._feed is not None:
            self._feed(channel, data, t_ns)

    def update(self, directory: Path, started_ns: int) -> None:
        """Shows the line anew, if it is time and the child is quiet."""
        now_s = time.monotonic()
        if not self._on or now_s < self._next_s or not _in_foreground():
            return
        from pepr_profiler.report.run_text import render_live
        from pepr_profiler.summary.summarise import summarise

        energy = summarise(directory, marks=False)["energy"]
        elapsed_s = (time.monotonic_ns() - started_ns) * 1e-9
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        text = render_live(elapsed_s, energy, width - 1)
        with self._lock:
            if time.monotonic() >= self._next_s and not self._line_begun:
                self._write(f"\r\x1b[2K{text}\r")
                self._shown = True
        cost_s = time.monotonic() - now_s
        self._next_s = max(self._next_s, now_s + max(1.0, _LIVE_SHARE * cost_s))

    def warn(self, code: str, text: str, hint: str) -> None:
        """Says those warnings at once that cannot wait for the summary."""
        self.clear()
        if code in _URGENT:
            complain(f"{text}\n  fix: {hint}")

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
