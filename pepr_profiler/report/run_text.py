"""Terminal output of a run: its summary, and the live line while it runs."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pepr_profiler import units
from pepr_profiler.energy.sources import KINDS
from pepr_profiler.record import Record
from pepr_profiler.report.components import (
    component_name,
    counted,
    energy_text,
    kind_of,
    label_of,
)
from pepr_profiler.report.job_text import (
    job_name,
    missing_rank_notes,
    rank_lines,
    recordings_text,
    wait_lines,
)
from pepr_profiler.report.text import (
    Line,
    TextColumn,
    cells,
    cut,
    drawn,
    printable,
    table,
    table_cells,
    wrap,
)
from pepr_profiler.units import format_duration, format_provenance, format_quantity, format_with_u

if TYPE_CHECKING:
    from pepr_profiler.study.progress import ProgressCurve

# rich costs some 30 ms and numpy more: this module is imported while the child runs
# (render_live), so both stay out of it; rich is imported where a finished run is drawn.

_BLOCKS = "▁▂▃▄▅▆▇█"
_TITLE = "power over time"
_NAME_CELLS = 18  # keeps the energy column of the two tables, and of two runs, in one place
_KEY_CELLS = 13  # "attribution" and a gap
_MAX_PHASES = 12
_MOST_DEVICES = 24  # of one kind; of more their sum is shown
_GAP = "   "
# RAPL domains that repeat what is in the total already, and what each is to the package.
_ASIDE = {
    "uncore": "inside package",
    "core": "inside package",
    "mmio": "repeats package",
    "psys": "contains package",
}
_STYLES = {"measured": "green", "modelled": "yellow", "mixed": "yellow"}


def render_live(elapsed_s: float, energy: Mapping[str, Any], width: int) -> str:
    """The status line while the child runs, at most `width` cells, without a line end.

    `energy` is that of the summary so far.
    """
    minutes, seconds = divmod(int(elapsed_s), 60)
    clock = f"{minutes:02d}:{seconds:02d}"
    if minutes >= 60:
        clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    total, power = format_quantity(energy["total_j"], "J"), format_quantity(energy["mean_w"], "W")
    line = f"pepr  {clock}  {total}  {power}  {format_provenance(energy['provenance'])}"
    return line[:width].rstrip()


def render_run(
    summary: Mapping[str, Any],
    *,
    width: int = 80,
    color: bool = False,
    curve: Mapping[str, Any] | None = None,
    store: str = "",
    comparable: bool = True,
) -> str:
    """The screen of a run from its summary (docs/summary.md), without a final line end.

    `curve` are the options of `progress.curve_of`: which metric to show against the energy.
    `store` is what the commands that are proposed must name, if it is not the usual store.
    `comparable` says that its experiment has other models, so that `compare` can be proposed.
    No line is wider than `width` cells or ends in a space; there are no escape codes unless
    `color`. Names and commands are shown as they are, their control characters made visible.
    """
    energy = summary["energy"]
    of_job = bool(summary.get("ranks"))
    sections = [
        [_headline(summary, width)],
        _energy_lines(summary, width),
        _component_lines(energy, width),
        rank_lines(summary, width) if of_job else [],
        _phase_lines(summary.get("phases") or [], energy, width),
        wait_lines(summary, width) if of_job else [],
        _fact_lines(summary, width, curve or {}),
        _saved_lines(summary, width, store, comparable=comparable),
    ]
    lines: list[Line] = []
    for index, section in enumerate(filter(None, sections)):
        lines += [[], *section] if index else section
    return drawn(lines, width=width, color=color)


def _headline(summary: Mapping[str, Any], width: int) -> Line:
    code = summary.get("exit_code")
    if not summary.get("complete"):
        status, style = "incomplete", "bold red"
    elif code is None:
        status, style = "", ""
    else:
        status, style = _exit_text(code), "green" if code == 0 else "red"
    status = f"{_GAP}{status}" if status else ""
    duration = f"{_GAP}{format_duration(summary.get('duration_s'))}"
    head = "pepr > "
    room = max(8, width - len(head) - len(status) - len(duration))
    return [
        (head, "bold cyan"),
        (cut(printable(_subject(summary)), room), "bold"),
        (status, style),
        (duration, ""),
    ]


def _subject(summary: Mapping[str, Any]) -> str:
    """What was measured: the command, or "attach 4121 4122 (python train.py)"."""
    by_command: dict[str, list[str]] = {}
    cgroup = _cgroup(summary)
    for target in (summary.get("recording") or {}).get("attached") or []:
        who = f"cgroup {cgroup}" if cgroup else str(target["pid"])
        by_command.setdefault(shlex.join(target["command"]), []).append(who)
    if by_command:
        parts = (f"{' '.join(pids)} ({command})" for command, pids in by_command.items())
        return f"attach {', '.join(parts)}"
    command = summary.get("command")
    subject = shlex.join(command) if command else str(summary.get("name") or "")
    return f"{job_name(summary)}: {subject}" if summary.get("ranks") else subject


def _cgroup(summary: Mapping[str, Any]) -> str:
    """The cgroup that was followed; empty if none was."""
    what, _, folder = str((summary.get("recording") or {}).get("root")).partition("=")
    return folder if what == "cgroup" else ""


def _exit_text(code: int) -> str:
    # A shell's convention, which docs/design.md keeps: 128 + n for a child that signal n killed.
    try:
        return f"killed by {signal.Signals(code - 128).name} ({code})"
    except ValueError:
        return f"exit {code}"


def _energy_lines(summary: Mapping[str, Any], width: int) -> list[Line]:
    energy = summary["energy"]
    total_j, u_j, provenance = energy.get("total_j"), energy.get("u_j"), energy.get("provenance")
    line: Line = [(f"  {'Energy':<{_KEY_CELLS}}", "bold")]
    notes: list[tuple[str, str]] = []
    if units.known(total_j) is None:
        line.append((units.UNKNOWN, "bold red"))
    else:
        line.append((energy_text(energy, "total_j"), "bold"))
        line.append((f"{_GAP}({format_quantity(total_j / units.J_PER_WH, 'Wh')})", ""))
        line.append((f"{_GAP}mean {format_quantity(energy.get('mean_w'), 'W')}", ""))
        line.append((f"{_GAP}{format_provenance(provenance)}", _STYLES.get(str(provenance), "red")))
        if provenance == "modelled":
            within = ""
            if units.known(u_j) is not None and total_j > 0:
                within = f", ± {u_j / total_j:.0%}"
            notes.append(
                (f"no sensor: an estimate from utilisation{within} (see missing)", "yellow")
            )
        elif provenance == "mixed":
            notes.append(("there is no sensor for the estimated rows (see missing)", "yellow"))
    if energy.get("scope") == "device":
        notes.append(("of the whole devices, whoever used them (--attribution device)", ""))
    notes += [(note, "bold red") for note in missing_rank_notes(summary)]
    ended = (summary.get("recording") or {}).get("exit") or {}
    submitter = ended.get("submitter")
    for lost in energy.get("partial") or ():
        if lost["id"].startswith("rank:"):
            continue
        missing = format_duration(lost["missing_s"])
        text = f"partial: without {lost['id']} for {missing}; in truth it is more"
        if submitter and ":" not in lost["id"]:  # it is no device
            text = f"only what {submitter} itself took; what it started is not in it"
            if ended.get("found_cpu_s"):
                text = f"only what was found here of what {submitter} started"
        notes.append((text, "bold red"))
    if not summary.get("complete"):
        note = "incomplete: the profiler was killed or still runs; these are the figures so far"
        notes.append((note, "bold red"))
    return [line, *(fact for note in notes for fact in _fact("", [note], width))]


class _Row(Record):
    """A row of the energy table: one device, or all of a kind; None is unknown."""

    name: str
    provenance: str
    energy_j: float | None
    u_j: float | None
    mean_w: float | None
    max_w: float | None
    max_is_bound: bool  # the peaks of several parts need not coincide: their sum is an upper bound
    trace_w: Sequence[float | None] | None


def _rows(components: Iterable[Mapping[str, Any]], key: str) -> list[_Row]:
    """The rows of the table; `key` is the energy of a component that is counted."""
    added = sorted(
        (c for c in components if c.get("in_total")), key=lambda c: KINDS.index(kind_of(c))
    )
    rows = []
    for kind, group in groupby(added, key=kind_of):
        parts = list(group)
        if kind in ("cpu", "dram") or len(parts) > _MOST_DEVICES:
            name = f"{kind:<6} {len(parts):,} {'packages' if kind == 'cpu' else 'devices'}"
            name = kind if kind == "dram" else name
            rows.append(_merged(parts, name if len(parts) > 1 else None, key))
        else:
            rows.extend(_merged([part], None, key) for part in parts)
    return rows


def _merged(parts: Sequence[Mapping[str, Any]], name: str | None, key: str) -> _Row:
    """The sum of `parts`, unknown if one is."""

    def total(figure: str) -> float | None:
        values = [units.known(part.get(figure)) for part in parts]
        return None if None in values else math.fsum(v for v in values if v is not None)

    from pepr_profiler.energy.uncertainty import summed_u_j  # NumPy: not while the child runs

    if name is None:
        name = component_name(parts[0], column=6)
    traces = [part.get("trace_w") for part in parts]
    trace_w: list[float | None] | None = None
    if all(traces):
        columns = zip(*(trace or () for trace in traces), strict=True)
        trace_w = [None if None in column else math.fsum(column) for column in columns]
    provenances = {format_provenance(part.get("provenance")) for part in parts}
    return _Row(
        name=printable(name),
        provenance=provenances.pop() if len(provenances) == 1 else "mixed",
        energy_j=total(key),
        u_j=summed_u_j(parts),
        mean_w=total("mean_w"),
        max_w=total("max_w"),
        max_is_bound=len(parts) > 1,
        trace_w=trace_w,
    )


def _component_lines(energy: Mapping[str, Any], width: int) -> list[Line]:
    components = energy.get("components") or []
    rows = _rows(components, counted(energy))
    lines: list[Line] = []
    if rows:
        total = energy.get("total_j"), energy.get("u_j")
        mixed = {row.provenance for row in rows} != {format_provenance(energy.get("provenance"))}
        columns = [
            TextColumn("energy", [format_with_u(r.energy_j, r.u_j, "J", like=total) for r in rows]),
            TextColumn("share", [_share(r.energy_j, total[0]) for r in rows]),
            TextColumn("mean W", _watts([r.mean_w for r in rows])),
            TextColumn("peak W", _watts([r.max_w for r in rows], [r.max_is_bound for r in rows])),
        ]
        gap = _GAP
        if mixed:
            columns.insert(0, TextColumn("", [r.provenance for r in rows], left=True))
            gap = "  "  # the provenance takes its room from the gaps, not from the sparkline
        spare = width - table_cells(_NAME_CELLS, columns, gap) - len(gap)
        longer = max(cells(row.name) for row in rows) - _NAME_CELLS
        longer = max(0, min(longer, spare - len(_TITLE)))
        spare -= longer
        if any(row.trace_w for row in rows) and spare >= len("power"):
            title = _TITLE if spare >= len(_TITLE) else "power"
            columns.append(
                TextColumn(title, [_sparkline(r, min(48, spare)) for r in rows], left=True)
            )
        names = [row.name for row in rows]
        lines = table("device", names, columns, room=_NAME_CELLS + longer, gap=gap)
    aside = _aside(components)
    notes = [f"not in the total: {aside}"] if aside else []
    if rows:
        notes.append(_table_note(energy, any(row.max_is_bound for row in rows)))
    for note in notes:
        lines.extend([(f"  {part}", "dim")] for part in wrap(note, width - 2))
    return lines


def _table_note(energy: Mapping[str, Any], with_bound: bool) -> str:
    text = "Energy is this job's share, ± k = 2 (95%). Watts are of the whole device; "
    if energy.get("scope") == "device":
        text = "Energy, ± k = 2 (95%), and watts are of the whole device; "
    return f"{text}the peak is the highest mean over 1 s{' (≤: upper bound)' * with_bound}."


def _aside(components: Iterable[Mapping[str, Any]]) -> str:
    """The components outside the total: "core, uncore (inside package); psys (…)"."""
    names: dict[str, list[str]] = {}
    for component in components:
        if component.get("in_total"):
            continue
        name = printable(label_of(component))
        if component.get("kind") != "gpu":  # a GPU's name may contain "core"
            text = f"{component.get('id')} {name}".lower()
            name = next((key for key in _ASIDE if key in text), name)
        group = names.setdefault(_ASIDE.get(name, ""), [])
        if name not in group:
            group.append(name)
    return "; ".join(
        ", ".join(sorted(group)) + (f" ({why})" if why else "") for why, group in names.items()
    )


def _phase_lines(
    phases: Sequence[Mapping[str, Any]], energy: Mapping[str, Any], width: int
) -> list[Line]:
    if not phases:
        return []
    total = energy.get("total_j"), energy.get("u_j")

    def rank(phase: Mapping[str, Any]) -> float:
        energy_j = units.known(phase.get("energy_j"))
        return math.inf if energy_j is None else -energy_j

    shown = sorted(phases, key=rank)[:_MAX_PHASES]
    columns = [
        TextColumn("energy", [energy_text(p, like=total) for p in shown]),
        TextColumn("share", [_share(p["energy_j"], total[0]) for p in shown]),
        TextColumn("count", [f"{p['count']:,}" for p in shown]),
        TextColumn("time", [format_duration(p["duration_s"]) for p in shown]),
    ]
    spare = width - table_cells(0, columns, _GAP)
    names = [printable(str(phase["name"])) for phase in shown]
    room = max(_NAME_CELLS, min(spare, max(map(cells, names))))
    lines = table("phase", names, columns, room=room, gap=_GAP)
    if len(phases) > len(shown):
        lines.append([(f"  … {len(phases) - len(shown)} more", "dim")])
    return lines


def _fact_lines(
    summary: Mapping[str, Any], width: int, curve_options: Mapping[str, Any]
) -> list[Line]:
    components = summary["energy"].get("components") or []
    facts = [
        ("rank", _rank(summary)),
        ("cgroup", _cgroup(summary)),
        ("attribution", _attribution(summary["energy"])),
        ("carbon", _carbon(summary.get("carbon"))),
        ("metrics", _metrics(summary)),
        *_progress(summary, curve_options),
        (
            "memory",
            _memory(summary.get("memory") or {}, components, len(summary.get("ranks") or ())),
        ),
        ("sampling", _sampling(summary)),
    ]
    lines: list[Line] = []
    for key, text in facts:
        lines += _fact(key, [(text, "")], width)
    missing: dict[tuple[str, str], list[str]] = {}
    for item in summary.get("missing") or []:
        missing.setdefault((item.get("why", ""), item.get("fix", "")), []).append(item["what"])
    key = "missing"
    for (why, fix), names in missing.items():
        text = ", ".join(names) + (f": {why}" if why else "")
        lines += _fact(key, [(text, ""), (f"fix: {fix}" if fix else "", "dim")], width)
        key = ""
    key = "warning"
    for warning in summary.get("warnings") or []:
        hint = warning.get("hint")
        notes = [(warning["text"], "yellow"), (f"fix: {hint}" if hint else "", "dim")]
        lines += _fact(key, notes, width)
        key = ""
    return lines


def _rank(summary: Mapping[str, Any]) -> str:
    """Which part of its job a recording is; nothing where it is all of it."""
    rank, size = summary.get("rank"), summary.get("world_size")
    if rank is None or "runs" in summary:
        return ""
    of = "" if size is None else f" of {size}"
    launcher = summary.get("launcher")
    return f"{rank}{of}{f' ({launcher})' if launcher else ''}, job {summary.get('job')}"


def _fact(key: str, notes: Iterable[tuple[str, str]], width: int) -> list[Line]:
    """`key` with its notes wrapped beside it; those after the first are indented below it."""
    lines: list[Line] = []
    for index, (text, style) in enumerate(note for note in notes if note[0]):
        indent = 2 if index else 0
        for part in wrap(printable(text), width - 2 - _KEY_CELLS - indent):
            head = key if not lines else ""
            lines.append([(f"  {head:<{_KEY_CELLS}}", "bold"), (" " * indent + part, style)])
    return lines


def _carbon(carbon: Mapping[str, Any] | None) -> str:
    if carbon is None:
        return f"{units.UNKNOWN}: set --region CODE or --carbon-intensity G_PER_KWH"
    grams = format_quantity(carbon.get("g_co2e"), "g")
    year = f" {carbon['year']}" if carbon.get("year") is not None else ""
    return (
        f"{grams} CO2e at {carbon['intensity_g_per_kwh']:.1f} g/kWh, PUE {carbon['pue']:.2f} "
        f"({carbon['source']}{year})"
    )


def _metrics(summary: Mapping[str, Any]) -> str:
    metrics = dict(summary.get("metrics") or {})
    performance = summary.get("performance")
    parts = []
    if performance:
        metrics.pop(performance["metric"], None)
        value = units.format_number(performance["value"])
        parts.append(f"{performance['metric']} {value} (performance)")
    parts += [f"{name} {units.format_number(value)}" for name, value in metrics.items()]
    return ", ".join(parts)


_CURVE_CELLS = 24


def _progress(
    summary: Mapping[str, Any], curve_options: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """The performance against the run's energy as a line of blocks, and where to stop."""
    if not summary.get("progress"):
        return []
    from pepr_profiler.study.progress import curve_of, name_of

    curve = curve_of(summary, **curve_options)
    if curve is None or len(curve.t_s) < 2:
        return []
    curve = curve._replace(metric=name_of(curve.metric, curve_options.get("transform")))
    values = [float(value) for value in curve.performance]
    blocks = _curve_line([float(e) for e in curve.energy_j], values, curve.total_j)
    shown = f"{curve.metric} {values[0]:.4g} {blocks} {values[-1]:.4g} against the energy"
    return [("progress", shown), ("", stop_note(curve))]


def stop_note(curve: ProgressCurve, noise: float | None = None) -> str:
    """Where along a curve the run could have been stopped, at the highest PePR.

    R is the energy so far over the run's own (`progress.scores_along`): there is nothing else to
    compare with. `noise` is that of `progress.best_stop`.
    """
    from pepr_profiler.study.progress import best_stop

    performance = curve.performance
    if performance.min() < 0 or performance.max() > 1:
        return (
            "no PePR along the run, as it needs values from 0 to 1: see --percent of report, "
            "and --transform where lower is better"
        )
    if performance[-1] < performance[0]:
        return "the values fall; where lower is better: --transform one-minus or exp-neg of report"
    if curve.total_j <= 0:
        return ""
    stop = best_stop(curve, noise=noise)
    if stop is None:
        return f"no point to stop at stands out from the noise of {curve.metric}"
    if stop.point == len(performance) - 1:
        return "PePR along the run is highest at its end"
    when = f"after {format_duration(stop.t_s)}"
    if stop.epoch is not None:
        when = f"at epoch {stop.epoch:g}"
    if stop.first < stop.last:
        ends = [curve.energy_j[i] / curve.total_j for i in (stop.first, stop.last)]
        when += f" (its noise allows {ends[0]:.0%} to {ends[1]:.0%} of the energy)"
    best = (
        "" if stop.best_share >= stop.performance_share else f", {stop.best_share:.1%} of its best,"
    )
    return (
        f"PePR along the run is highest {when}: to stop there keeps {stop.performance_share:.1%} "
        f"of the final {curve.metric}{best} for {stop.energy_share:.0%} of the energy"
    )


def _curve_line(energy_j: Sequence[float], values: Sequence[float], total_j: float) -> str:
    """The values against the energy in eighth blocks, lowest to highest; " " before the first."""
    low, span = min(values), max(values) - min(values)
    line = ""
    for cell in range(_CURVE_CELLS):
        reached = [v for e, v in zip(energy_j, values, strict=True)
                   if e * _CURVE_CELLS <= total_j * (cell + 1)]  # fmt: skip
        if not reached:
            line += " "
        else:
            line += _BLOCKS[min(7, int((reached[-1] - low) / span * 8)) if span > 0 else 7]
    return line


def _memory(memory: Mapping[str, Any], components: Iterable[Mapping[str, Any]], ranks: int) -> str:
    text = f"peak {format_quantity(memory.get('peak_rss_bytes'), 'B')} in RAM"
    gpu_bytes = memory.get("gpu_peak_bytes")
    if gpu_bytes is not None or any(c.get("kind") == "gpu" for c in components):
        text += f", {format_quantity(gpu_bytes, 'B')} on GPUs"
    if (charged := memory.get("cgroup_peak_bytes")) is not None:
        is_exact = memory.get("cgroup_peak_source") == "memory.peak"
        how = "memory.peak" if is_exact else "the highest seen of memory.current"
        text += f"; {format_quantity(charged, 'B')} of the cgroup with its file cache ({how})"
    return f"{text} (the ranks' peaks together)" if ranks > 1 else text


def _attribution(energy: Mapping[str, Any]) -> str:
    added = [c for c in energy.get("components") or [] if c.get("in_total")]
    if not added:
        return ""

    def total(key: str) -> str:
        values = [value for c in added if (value := units.known(c.get(key))) is not None]
        if not values:
            return units.UNKNOWN
        at_least = "at least " if len(values) < len(added) else ""
        return at_least + format_quantity(math.fsum(values), "J")

    shares = f"this job {total('job_j')}, other processes {total('others_j')}"
    return f"{shares}, idle {total('idle_j')}"


def _sampling(summary: Mapping[str, Any]) -> str:
    sampler = summary.get("sampler") or {}
    samples = sampler.get("samples")
    if samples is None:
        return ""
    daemon = (summary.get("recording") or {}).get("daemon") or {}
    by_daemon = ", ".join(daemon.get("lanes") or ())
    late, timed = sampler.get("late"), sampler.get("timed")
    timed = samples if timed is None else timed  # older recordings have no `timed`
    text = f"{samples:,} samples, {_count(sampler.get('dropped'))} dropped"
    text += f", {_share(late, timed) if timed else _count(late)} late"
    cpu_s = units.known(sampler.get("cpu_s"))
    fraction = units.known(sampler.get("cpu_fraction"))
    if fraction is None:
        fraction = units.ratio(cpu_s, summary.get("duration_s"))
    text += f"; profiler {format_duration(cpu_s)} CPU"
    text += "" if fraction is None else f" ({fraction:.1%})"
    if by_daemon:  # it alone knows which of its reads were late
        text += f"; {printable(by_daemon)} was read by this machine's daemon (not counted as late)"
    return text


def _saved_lines(
    summary: Mapping[str, Any], width: int, store: str, *, comparable: bool
) -> list[Line]:
    run_id = printable(str(summary.get("run_id") or ""))
    if not run_id:
        return []
    if summary.get("ranks"):
        return [[(f"  {line}", "bold")] for line in wrap(recordings_text(summary), width - 2)]
    experiment = summary.get("experiment")
    following = f"next: pepr-profile report {run_id}"
    done = summary.get("complete") and not summary.get("exit_code")
    if experiment and comparable and done and summary.get("performance"):
        following = f"next: pepr-profile compare --experiment {printable(shlex.quote(experiment))}"
    saved = f"  saved {run_id}"
    named = f"--store {printable(shlex.quote(store))}" if store else ""
    whole = f"{following} {named}".rstrip()
    gap = width - cells(saved) - cells(whole)
    if gap >= len(_GAP):
        return [[(saved, "bold"), (" " * gap, ""), (whole, "dim")]]
    if cells(whole) + 2 <= width:
        return [[(saved, "bold")], [(f"  {whole}", "dim")]]
    # A command that is cut cannot be copied: the shell reads on behind a backslash.
    return [[(saved, "bold")], [(f"  {following} \\", "dim")], [(f"    {named}", "dim")]]


def _sparkline(row: _Row, room: int) -> str:
    """The row's power over the run in eighth blocks from 0 W to its peak; a gap is a space."""
    trace_w = row.trace_w or []
    means = [
        _mean_between(trace_w, i * len(trace_w) / room, (i + 1) * len(trace_w) / room)
        for i in range(room if trace_w else 0)
    ]
    full_w = max([row.max_w or 0.0, *(w for w in means if w is not None)])
    return "".join(
        " " if w is None else _BLOCKS[max(0, min(7, int(w / full_w * 8)) if full_w > 0 else 0)]
        for w in means
    )


def _mean_between(trace_w: Sequence[float | None], start: float, stop: float) -> float | None:
    """The mean of the known buckets in [start, stop), each weighted by its part inside."""
    weighted, weight = 0.0, 0.0
    for index in range(int(start), min(len(trace_w), math.ceil(stop))):
        value, part = units.known(trace_w[index]), min(index + 1, stop) - max(index, start)
        if value is not None and part > 1e-9:  # rounding of start and stop is no sample
            weighted, weight = weighted + part * value, weight + part
    return weighted / weight if weight else None


def _watts(values: Sequence[float | None], bounds: Sequence[bool] | None = None) -> list[str]:
    """A column of watts with one number of decimals, two where a value is below 10 W."""
    decimals = 2 if any(value is not None and abs(value) < 9.95 for value in values) else 1
    return [
        "?" if value is None else f"{'≤' if bound else ''}{value:.{decimals}f}"
        for value, bound in zip(values, bounds or [False] * len(values), strict=True)
    ]


def _share(part: float | None, whole: float | None) -> str:
    return units.format_percent(units.ratio(part, whole))


def _count(n: int | None) -> str:
    return units.UNKNOWN if n is None else f"{n:,}"
