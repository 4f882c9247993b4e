"""The warnings of a summary: which figures may be wrong, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pepr_profiler.energy.activity import Activity
from pepr_profiler.energy.curve import EnergyCurve, gap_limit_s
from pepr_profiler.energy.gpu_users import OtherProcess
from pepr_profiler.energy.gpus import Gpus, board_of
from pepr_profiler.energy.sources import UNITS, stated_gain
from pepr_profiler.errors import warning
from pepr_profiler.summary.component import CHECKED_S, ComponentResult, stall_limit_s
from pepr_profiler.trace.lane import Channel

_PART_TIME, _STEADY = ("nvml-power", "nvml-power-instant"), 1e-3
"""Readings that may look at only a part of each refresh period. Where they spread by less than this
part of the energy, their spread says nothing of what they did not see."""

_SHARED = 0.05
"""Others who used a device for more than this part of a run are worth a warning."""

_SHORT_S = 1.5
"""In a run shorter than this, who used a GPU is not worth a warning: it is read twice a second."""

_NAMED, _SHOWN = 3, 40
"""How many other processes a warning names, and how many letters of each one's command."""

_LOOK_AFTER_NS = 2_000_000_000
"""The last look at all processes is taken within this time after the end of a run."""


# --- the recording --------------------------------------------------------------------------------


def has_lost_rows(facts: Mapping[str, Any]) -> bool:
    """Whether the disk did not take all rows; `facts` are run.json's `recording`."""
    return any(warning.get("code") == "rows-lost" for warning in facts.get("warnings", []))


def unwritten_lanes(facts: Mapping[str, Any], names: Iterable[str]) -> Iterator[dict[str, str]]:
    """For lanes of which nothing is on disk."""
    if has_lost_rows(facts):
        fix = "free space for the store"
    elif facts.get("sampler") is None:
        fix = "nothing: the recording ended before its first flush"
    else:
        fix = "run for longer than it takes to give one, or see: pepr-profile sensors"
    for name in names:
        text = f"no reading of {name} is on disk; the summary is without it"
        yield warning("unwritten", text, fix)


def unknown_units(channels: Iterable[Channel]) -> Iterator[dict[str, str]]:
    """For channels of energy that cannot be counted as joules."""
    for channel in channels:
        unit = UNITS.get(channel.quantity, channel.unit)
        if channel.unit != unit:
            yield warning(
                "unknown-unit",
                f"{channel.name} is recorded in {channel.unit}, not in {unit}: it is not counted",
                f"give its sensor the unit {unit} and the scale that makes it so",
            )


def unknown_gains(channels: Iterable[Channel]) -> Iterator[dict[str, str]]:
    """For channels whose stated uncertainty cannot be used."""
    for channel in channels:
        if channel.quantity in UNITS and stated_gain(channel) is None:
            yield warning(
                "unknown-gain",
                f"{channel.name} has the gain {channel.labels['gain']!r}, which is no number "
                "of 0 or more: its energy is taken to be exact",
                "give its sensor the relative standard uncertainty of its gain, such as 0.03",
            )


def bad_hardware_files(bad_files: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """For hardware files that cannot be used."""
    for path, why in bad_files:
        yield warning(
            "hardware-file",
            f"{path} is not used: {why}",
            "write it anew with pepr-profile sensors --check -o, or remove it",
        )


def torn_events(torn_lines: int) -> Iterator[dict[str, str]]:
    """For lines of marks and metrics that could not be read."""
    if torn_lines:
        yield warning(
            "torn-events",
            f"{torn_lines} line(s) of the events files could not be read and were left out",
            "a program was killed while it wrote, or the file was edited",
        )


def ranks_disagree(
    metric: str, value: float, by_rank: Mapping[int, float | None]
) -> Iterator[dict[str, str]]:
    """Where ranks logged another performance than the one that counts, `value`."""
    others = {
        rank: other
        for rank, other in sorted(by_rank.items())
        if other is not None and not math.isclose(other, value, rel_tol=_SAME, abs_tol=1e-12)
    }
    if others:
        rank, other = max(others.items(), key=lambda item: abs(item[1] - value))
        more = f" ({len(others)} ranks disagree)" if len(others) > 1 else ""
        text = f"{metric} {value:g} counts, and rank {rank} logged {other:g}{more}"
        fix = "reduce the metric over all ranks, and log it in rank 0 alone"
        yield warning("ranks-disagree", text, fix)


_SAME = 1e-6
"""Ranks that differ by less than this part agree: sums in another order round differently."""


def phases_at_once(phases: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """For phases beside which other threads, tasks or processes had phases too."""
    if phases:
        names = [phase["name"] for phase in phases]
        named = ", ".join(repr(name[:_SHOWN]) for name in names[:_NAMED])
        what = "each has an equal part of that time's energy, as ± says"
        if any(phase["u_j"] is None for phase in phases):
            what = "which of them had how much of that time's energy is unknown, and so is their ±"
        yield warning(
            "phases-at-once",
            "phases of several threads, tasks or processes ran side by side: "
            f"{named}{_more(len(names))}; {what}",
            'record trials as runs of their own: profile(…, join="never")',
        )


def unread_files(files: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """For files of marks, metrics or notes about processes that could not be read."""
    for name, why in files:
        yield warning(
            "unread-file",
            f"{name} was left out, with the marks and metrics in it: {why}",
            "restore it as a regular file",
        )


# --- the readings of a component ------------------------------------------------------------------


def doubtful_readings(
    components: Iterable[ComponentResult], begin_ns: int, end_ns: int, *, lost_rows: bool
) -> Iterator[dict[str, str]]:
    """For components whose readings themselves give reason to doubt their energy."""
    for component in components:
        curve, name = component.curve, component.curve.source.id
        source = curve.source
        if source.mirrors:
            yield warning(
                "mirrored",
                f"{name} is not in the total: it {source.excluded}",
                "nothing; some AMD processors show one socket's counter on each die, and GPUs "
                "of a module show the module's",
            )
        if not source.in_total or source.provenance == "modelled":
            continue
        if curve.impossible:
            yield warning(
                "impossible",
                f"{curve.impossible} reading(s) of {name} were left out: each implies more than "
                f"{source.limit_w:.0f} W, or a counter that runs backward"
                + ("; the readings around them bridge them" if component.is_known else ""),
                "see dmesg for its driver; if the device can draw more, please report it",
            )
        if not component.is_known and curve.only_zero:
            continue  # the device is off: its power reads 0 too
        if not component.is_known:
            yield warning(
                "unknown",
                f"{name} gave no usable reading; its energy is not in the total",
                "run longer than a few refreshes of the sensor, or see: pepr-profile sensors",
            )
            continue
        duration_s = (end_ns - begin_ns) * 1e-9
        if curve.instead_of:
            yield _fallback(curve, duration_s)
        yield from _doubtful_power(component, duration_s)
        if source.counter:
            yield from _doubtful_counter(curve, duration_s)
        yield from _missing_time(curve, begin_ns, end_ns, lost_rows=lost_rows)


def _fallback(curve: EnergyCurve, duration_s: float) -> dict[str, str]:
    """That another source was used than the one that is preferred."""
    part = curve.instead_s / duration_s if duration_s > 0 else 1.0
    when = "" if part > 0.99 else f" for {curve.instead_s:.1f} s"
    used = curve.source.source.rpartition("+")[2]
    return warning(
        "fallback",
        f"{curve.source.id}: {curve.instead_of} did not answer or stood still{when}; "
        f"{used} is used for that time",
        "see dmesg for its driver, or restart it (NVIDIA: sudo nvidia-smi --gpu-reset)",
    )


def _doubtful_power(component: ComponentResult, duration_s: float) -> Iterator[dict[str, str]]:
    """Power readings that see a part of the time only, or contradict the counter."""
    curve, check, name = component.curve, component.check, component.curve.source.id
    if curve.aliased:
        yield warning(
            "aliasing",
            f"the load of {name} repeats nearly in step with its sensor's refreshes "
            f"({curve.refresh_s * 1e3:.0f} ms), which may see only a part of it",
            "vary the length of a step, or compare with another meter; u is widened to 40 %",
        )
    elif curve.source.source in _PART_TIME and duration_s >= CHECKED_S and _is_steady(curve):
        yield warning(
            "part-time",
            f"{name} has power readings only, which may see no more than a quarter of the time: "
            "a load exactly in step with them would look as steady as these; u does not cover it",
            "nothing if the load is steady; else vary the length of a step, or compare with "
            "another meter",
        )
    if check and component.contradicts(duration_s):
        yield warning(
            "disagreement",
            f"{name}: its power readings ({check.source}) give {check.energy_j:.0f} J, "
            f"{check.difference_j:+.0f} J from its counter; {check.u_j:.0f} J would be usual",
            "compare with an external meter; the counter's energy is in the total, and its u "
            "covers the difference",
        )


def _is_steady(curve: EnergyCurve) -> bool:
    """Whether readings hardly change: what the sensor does not see then adds no uncertainty."""
    energy_j = float(curve.energy_j[-1] - curve.energy_j[0])
    if curve.duty_j2 is None or not energy_j > 0:
        return False
    duty_j2 = float(curve.duty_j2[-1] - curve.duty_j2[0])
    return math.sqrt(max(0.0, duty_j2)) < _STEADY * energy_j


def _doubtful_counter(curve: EnergyCurve, duration_s: float) -> Iterator[dict[str, str]]:
    """A counter that was reset, may have wrapped unseen, or stood still."""
    name = curve.source.id
    if curve.resets:
        yield warning(
            "reset",
            f"{name} was reset {curve.resets}x; what flowed meanwhile is taken from the power "
            "before and after, and u covers it",
            "nothing; the driver or the machine reset it",
        )
    energy_j = float(curve.energy_j[-1] - curve.energy_j[0])
    mean_w = energy_j / max(duration_s, 1e-9)
    half_range_s = curve.source.range_j / 2 / max(mean_w, 1e-9)
    if 0 < half_range_s < curve.longest_gap_s:
        yield warning(
            "ambiguous-wrap",
            f"{name} was not read for {curve.longest_gap_s:.1f} s, time enough to wrap "
            "unseen; its energy may be a multiple of its range too low",
            "keep the profiler from being stopped, or sample more often (--period)",
        )
    if curve.longest_stall_s > stall_limit_s(curve):
        yield warning(
            "stalled",
            f"{name} stood still for {curve.longest_stall_s:.1f} s while it was read",
            "check the driver; its energy is a lower bound",
        )


_TOLERATED_S, _TOLERATED = 0.1, 0.05
"""Readings may begin so late, and end so early, s and part of the run: u covers it."""


def _missing_time(
    curve: EnergyCurve, begin_ns: int, end_ns: int, *, lost_rows: bool
) -> Iterator[dict[str, str]]:
    """Readings that began late, ended early or have a gap."""
    name = curve.source.id
    gap_s = gap_limit_s(curve.source.period_s)
    late_s = (curve.first_ns - begin_ns) * 1e-9
    early_s = (end_ns - curve.last_ns) * 1e-9
    tolerated_s = min(gap_s, max(_TOLERATED_S, _TOLERATED * (end_ns - begin_ns) * 1e-9))
    if late_s > tolerated_s:
        yield warning(
            "late-start",
            f"{name} gave its first reading {late_s:.1f} s after the start; its energy before that "
            "is not in the total",
            "NVIDIA: enable persistence mode (sudo nvidia-smi -pm 1)",
        )
    if early_s > tolerated_s:
        yield warning(
            "ended-early",
            f"{name} gave no reading in the last {early_s:.1f} s; its energy since then is not in "
            "the total",
            f"{'free space for the store, or ' if lost_rows else ''}see dmesg for its driver",
        )
    elif curve.longest_gap_s > gap_s:
        kept = (
            "its power is interpolated"
            if not curve.source.counter
            else "a reset in it may have lost energy, which u covers"
            if curve.resets
            else "the counter kept its energy"
        )
        yield warning(
            "gap",
            f"{name} has a gap of {curve.longest_gap_s:.1f} s: {kept}",
            "check the load of the machine and the driver",
        )


# --- who else used a device -----------------------------------------------------------------------


def shared_gpus(
    gpus: Gpus, counted: Iterable[EnergyCurve], begin_ns: int, end_ns: int
) -> Iterator[dict[str, str]]:
    """For GPUs that others used too, or that are counted whole because nobody knows who did."""
    counted = list(counted)
    for unknown in gpus.unknown_orders:
        if unknown.gpus & {curve.source.id for curve in counted}:
            yield warning(
                "gpu-order",
                f"{unknown.variables} does not say which GPUs the job may use: {unknown.why}; all "
                "of them are counted",
                unknown.fix,
            )
    if not gpus.lists_processes:
        return
    if gpus.visible is None:
        yield warning(
            "cuda-order",
            f"CUDA_VISIBLE_DEVICES={gpus.cuda_visible_devices} does not say which GPUs the job may "
            "use: their models differ, and CUDA counts the fastest first",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPUs by UUID (nvidia-smi -L)",
        )
    duration_s = (end_ns - begin_ns) * 1e-9
    for uuid in filter(gpus.boards.__contains__, map(board_of, counted)):
        name = f"gpu:{gpus.boards[uuid]['index']}"
        users = gpus.users.get(uuid)
        reason = gpus.undivided_reason(uuid)
        if duration_s > _SHORT_S and reason:
            yield _whole_device(name, reason, 1.0)
        if users is None or reason:
            continue
        if users.unknown_s > _SHARED * duration_s:
            yield _whole_device(name, users.unknown_reason, users.unknown_s / duration_s)
        if users.others_s > _SHARED * duration_s:
            yield _shared_device(
                f"{name} was used by other processes for {users.others_s / duration_s:.0%} "
                f"of the run: {_listed(users.other_processes, duration_s)}"
            )
        unread_s = (end_ns - users.last_ns) * 1e-9
        if unread_s > max(10 * users.period_s, _SHARED * duration_s):
            yield warning(
                "processes-gap",
                f"who used {name} in the last {unread_s:.1f} s is unknown; its use is taken to "
                "have gone on as before",
                "see dmesg for its driver",
            )


def served_gpus(gpus: Gpus) -> Iterator[dict[str, str]]:
    """For GPUs on which others computed that may have worked for the job."""
    for uuid, watts in gpus.worked_w.items():
        servers = gpus.possible_servers(uuid)
        if not servers:
            continue
        index, called = gpus.boards[uuid]["index"], _called(servers[0]._asdict())
        counted = "is" if gpus.scope == "device" else "is not"
        fix = "if it works for the job only, count the whole GPU: --attribution device"
        others = f"{called}{_more(len(servers) - 1 + _NAMED)}"
        yield warning(
            "served-device",
            f"gpu:{index} drew up to {watts:.0f} W, and the job is not on the list of its "
            f"processes: {others} computed on it, perhaps for the job; its energy {counted} in the "
            "total",
            "nothing, if it works for the job only" if gpus.scope == "device" else fix,
        )


def shared_cpu(
    notes: Iterable[Mapping[str, Any]],
    activity: Activity | None,
    others_part: float,
    begin_ns: int,
    end_ns: int,
) -> Iterator[dict[str, str]]:
    """For a CPU of whose energy others had `others_part`: who they are.

    From the last look at all processes within the window. The profiler's own CPU time is in the
    others' energy, but nobody is warned of it.
    """
    looks = [n for n in notes if n.get("event") == "cpu" and begin_ns < n["t_ns"]]
    if activity is None or not looks or others_part < _SHARED:
        return
    look = next((n for n in reversed(looks) if n["t_ns"] <= end_ns + _LOOK_AFTER_NS), looks[0])
    span_ns = look["since_ns"], look["t_ns"]
    job_s, busy_s = activity.cpu_between(*span_ns)
    others_s = busy_s - job_s - look["profiler_s"]
    if others_s < _SHARED * (span_ns[1] - span_ns[0]) * 1e-9:
        return
    named = [p for p in look["processes"] if p["cpu_s"] > 0.01 * busy_s]
    texts = [f"{_called(p)} ({p['cpu_s'] / busy_s:.0%})" for p in named[:_NAMED]]
    rest_s = others_s - math.fsum(p["cpu_s"] for p in look["processes"])
    if rest_s > _SHARED * busy_s or not texts:
        texts.append(f"the kernel and processes that came and went ({rest_s / busy_s:.0%})")
    yield _shared_device(
        f"other processes took {others_s / busy_s:.0%} of the CPU time that was used: "
        f"{', '.join(texts)}{_more(len(named))}"
    )


def shared_process(
    notes: Sequence[Mapping[str, Any]],
    components: Iterable[ComponentResult],
    begin_ns: int,
    end_ns: int,
) -> Iterator[dict[str, str]]:
    """For a block beside which other blocks of its process were open, or that had one thread only.

    `notes` are those of its run, in order of time.
    """
    of_blocks = [note for note in notes if note["event"] == "blocks"]
    ends_ns = [*(note["t_ns"] for note in of_blocks), end_ns][1:]
    times_s: dict[str, float] = {}
    divided_s, beside = 0.0, ()
    for note, until_ns in zip(of_blocks, ends_ns, strict=False):
        seconds = max(0, min(until_ns, end_ns) - max(note["t_ns"], begin_ns)) * 1e-9
        divided_s += seconds if note["divided"] else 0.0
        beside = beside if note["beside"] is None else note["beside"]
        for run_id in beside:
            times_s[run_id] = times_s.get(run_id, 0.0) + seconds
    if not divided_s > 0:
        return
    named = [f"run {run_id} for {seconds:.1f} s" for run_id, seconds in times_s.items()][:_NAMED]
    partners = ", ".join(named) or f"its main thread for {divided_s:.1f} s"
    text = (
        f"it shared the machine and its process with {partners}{_more(len(times_s))}: it has the "
        "CPU time of its thread, and an equal part of what no thread's clock tells"
    )
    unknown = sorted({c.curve.source.id for c in components if _is_equal_part(c)})
    if unknown:
        text += f"; whose use of {', '.join(unknown)} it was cannot be told apart, as ± says"
    fix = "to compare such runs, let them follow each other or be programs of their own"
    yield warning(SHARED_PROCESS, text, fix)


def blocks_within(notes: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """For blocks inside a run's block that were runs of their own."""
    inner = [note["run_id"] for note in notes if note["event"] == "within"]
    if inner:
        named = f"{', '.join(inner[:_NAMED])}{_more(len(inner))}"
        text = (
            f"blocks inside of this one were runs of their own, and its energy has theirs: {named}"
        )
        yield warning(
            "blocks-within",
            text,
            "do not add theirs to it; to have phases instead: run.phase(NAME)",
        )


def _is_equal_part(component: ComponentResult) -> bool:
    """Whether an equal part of a device is counted, which the process as a whole used."""
    apart = component.curve.source.kind not in ("cpu", "dram") and component.shares.block_u_rel > 0
    return component.is_counted and apart


def shared_job(components: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """For kinds of devices of whose energy others than a job of several recordings had a part.

    Who they are is in the recordings, where each rank is another to the others.
    """
    sums_j: dict[str, list[float]] = {}
    for component in components:
        shared = component["kind"] in _PLURALS  # memory is shared as its CPU is
        if shared and component["in_total"] and component["others_j"] is not None:
            both_j = sums_j.setdefault(component["kind"], [0.0, 0.0])
            both_j[0] += component["others_j"]
            both_j[1] += component["device_j"]
    for kind, (others_j, device_j) in sums_j.items():
        if device_j > 0 and others_j > _SHARED * device_j:
            yield _shared_device(
                f"processes of others than the job had {others_j / device_j:.0%} of the energy of "
                f"its {_PLURALS[kind]}"
            )


_PLURALS = {"cpu": "CPUs", "gpu": "GPUs"}

SHARED_DEVICE, SHARED_PROCESS = "shared-device", "shared-process"


def _whole_device(name: str, reason: str, part: float) -> dict[str, str]:
    some = "" if part > 0.99 else f" for {part:.0%} of the run"
    return warning(
        "whole-device",
        f"who used {name} is unknown{some}: {reason}; all of its energy of that time is counted as "
        "the job's",
        "in a container: share the host's PIDs (docker run --pid=host), or profile on the host",
    )


def _shared_device(text: str) -> dict[str, str]:
    return warning(
        SHARED_DEVICE,
        text,
        "compare runs only on devices that they have to themselves; the job's share is counted",
    )


def _listed(processes: Sequence[OtherProcess], duration_s: float) -> str:
    texts = []
    for one in processes[:_NAMED]:
        use = "" if one.use_part is None else f", {one.use_part:.0%} of its use"
        texts.append(
            f"{_called(one._asdict())} ({one.present_s / duration_s:.0%} of the time{use})"
        )
    return ", ".join(texts) + _more(len(processes))


def _called(process: Mapping[str, Any]) -> str:
    command = process["command"] or f"of {process['user'] or 'another user'}"
    return f"PID {process['pid']} {command if len(command) <= _SHOWN else command[:_SHOWN] + '…'}"


def _more(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""
