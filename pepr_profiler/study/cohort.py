"""Runs as a cohort: which can be compared, what model each is of, and how much each took."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, overload

import numpy as np
from orjson import loads

from pepr_profiler import units
from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats
from pepr_profiler.store.facts import CAUSES, Facts, facts_of
from pepr_profiler.store.index import QueryResult
from pepr_profiler.study.jobs import merge_jobs
from pepr_profiler.study.pepr import listed
from pepr_profiler.study.ranking import Amount, SharedErrors
from pepr_profiler.summary.logged import COUNTERS, is_performance
from pepr_profiler.trace.shape import MALFORMED

Run: TypeAlias = Mapping[str, Any]

LABELS = {
    "energy": "PePR-E",
    "carbon": "PePR-C",
    "time": "PePR-T",
    "memory": "PePR-M",
    "memory:gpu": "PePR-M gpu",
    "memory:host": "PePR-M host",
}
"""The paper's names of the scores. The score of any other resource is PePR-NAME."""

GROUPS = ("experiment", "host", "none")
"""What runs may be grouped by. Each group is a cohort of its own."""

_WHOLE = 0.99
"""What is missing for more than this part of a run is missing for all of it."""

_NAMELESS = "no experiment"

_SHARED = {"gain_j": 1.0, "offset_j": 1.0, "model_j": 0.5}
"""Causes of error that all runs on a device share, and which part of the variance they share. The
gain and offset of a sensor are fixed for its board. The error of a power model depends half on the
machine and half on the load, which is a judgement."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """Runs that can be compared: the facts of each, and their summaries in the same order."""

    rows: Sequence[Facts]
    summaries: Sequence[Run]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(
        cls, runs: Iterable[Run], whole: Callable[[str], Run] | None = None
    ) -> tuple[Cohort, list[tuple[str, str]]]:
        """The runs that can be ranked, each once, and (run, reason) of those that cannot.

        What several profilers recorded of one job is one run (see jobs.merge_jobs). `whole` gives
        the whole summary of a run, which that needs, by its id.
        """
        out: list[tuple[str, str]] = []
        given = cls(runs.rows, runs) if isinstance(runs, QueryResult) else cls._read(runs, out)
        every = given._one_a_job(whole)
        chosen: list[int] = []
        # An id is unique in a store. Two stores may share one, a copied run shares all of these.
        seen: set[tuple[str, str | None, str]] = set()
        for i, row in enumerate(every.rows):
            identity = row.run_id, row.host, row.started_at
            if reason := _not_done(row):
                out.append((row.label, reason))
            elif identity not in seen:
                seen.add(identity)
                chosen.append(i)
        return every.at(chosen), out

    @classmethod
    def _read(cls, runs: Iterable[Run], out: list[tuple[str, str]]) -> Cohort:
        """A cohort of summaries; what is no summary goes to `out`."""
        good, rows = [], []
        for run in runs:
            reason = unreadable_as_summary(run)
            if not reason:
                try:
                    rows.append(facts_of(run))
                except MALFORMED as error:
                    reason = f"it is no summary ({type(error).__name__}: {error})"
            if reason:
                out.append((str(run.get("run_id", "a run")), reason))
            else:
                good.append(run)
        return cls(rows, good)

    def at(self, chosen: Sequence[int]) -> Cohort:
        """Some of the runs, in the order of `chosen`."""
        if len(chosen) == len(self) and list(chosen) == list(range(len(self))):
            return self
        return Cohort([self.rows[i] for i in chosen], _Runs(self.summaries, chosen))

    @property
    def ids(self) -> list[str]:
        return [row.run_id for row in self.rows]

    def label(self, i: int) -> str:
        """What a run is called in messages."""
        return self.rows[i].label

    def _one_a_job(self, whole: Callable[[str], Run] | None) -> Cohort:
        """The same with one run for each job, those of several recordings behind the others.

        A run around several others that are compared, the script of a sweep, stays beside them,
        unless these are the ranks of one job.
        """
        rows = self.rows
        in_job = Counter(row.job for row in rows if row.job is not None)
        inside = Counter(row.outer_id for row in rows if row.outer_id is not None)
        no_job = Counter(row.outer_id for row in rows if row.job is None)
        around = {outer for outer, count in inside.items() if count == 1 or not no_job[outer]}
        around &= {row.run_id for row in rows} if around else set()
        related = [
            i
            for i, row in enumerate(rows)
            if (row.job is not None and in_job[row.job] > 1)
            or (row.rank is not None and (row.world_size or 1) > 1)
            or row.run_id in around
            or row.outer_id in around
        ]
        if not related:
            return self
        merged = merge_jobs(
            [self.summaries[i] if whole is None else whole(rows[i].run_id) for i in related]
        )
        rest = sorted(set(range(len(rows))).difference(related))
        return Cohort(
            [*(rows[i] for i in rest), *map(facts_of, merged)],
            _Runs(self.summaries, rest, merged),
        )

    def incomplete_totals(self) -> dict[int, str]:
        """The runs whose total lacks a device that it should have, and which, by their numbers.

        A device that is missing for a part of the time makes a total that is too low. One that is
        missing for all of it does where another run of the same host knows such a device; where
        none does, the totals are of the same devices, and can be compared.
        """
        known: dict[str | None, set[str]] = {}
        for row in self.rows:
            known.setdefault(row.host, set()).update(row.kinds.split(",")[:-1])
        found = {}
        for i, row in enumerate(self.rows):
            kinds = set(row.kinds.split(",")[:-1])
            elsewhere = known[row.host] - kinds - {"other"}
            lost = loads(row.lost)
            if ranks := [ident[5:] for ident, _ in lost if ident.startswith("rank:")]:
                found[i] = f"its energy lacks rank {listed(ranks)}, of which there is no recording"
                continue
            for ident, part in lost:
                kind = ident.partition(":")[0]
                if part < _WHOLE:
                    found[i] = f"its energy lacks {ident} for {part:.0%} of the time"
                elif kind == ident:  # no device, but what a command started elsewhere
                    found[i] = f"its energy lacks {ident}"
                elif kind in known[row.host]:
                    found[i] = f"its energy lacks {ident}, not measured or used for others"
            if row.kinds and elsewhere and i not in found:
                found[i] = f"its energy lacks the {listed(sorted(elsewhere))} of other runs there"
        return found

    def not_comparable(self, *, allow_mixed: bool) -> dict[int, str]:
        """The runs whose energy cannot be weighed against that of the others, and why, by number.

        Their total is unknown, or lacks a device, or (unless `allow_mixed`) it is estimated where
        more runs, of two models at least, are measured.
        """
        found = {
            i: "its energy is unknown" for i, row in enumerate(self.rows) if row.total_j is None
        }
        if len(found) == len(self):
            return {}  # an error says what to do
        found = {**self.incomplete_totals(), **found}
        rest = [i for i in range(len(self)) if i not in found]
        measured = [i for i in rest if self.rows[i].provenance == "measured"]
        names = self.models()
        more = len(measured) * 2 > len(rest) and len({names[i] for i in measured}) > 1
        if more and not allow_mixed:
            for i in set(rest).difference(measured):
                kind = units.format_provenance(self.rows[i].provenance)
                found[i] = f"its energy is {kind}, that of the others measured (--mix-provenance)"
        return found

    def _numbers(self, name: str) -> Floats:
        """One of the Facts that are numbers (n,); NaN is unknown."""
        return np.array([getattr(row, name) for row in self.rows], dtype=np.float64)

    def _metric(self, name: str) -> Floats:
        """A metric that was logged (n,); NaN is unknown."""
        return np.array([loads(row.metrics).get(name) for row in self.rows], dtype=np.float64)

    def _metric_names(self) -> list[str]:
        return sorted({name for row in self.rows for name in loads(row.metrics)})

    def performance(
        self, metric: str | None, *, transform: str | None = None, command: str = ""
    ) -> tuple[str, Floats]:
        """The metric's name and one value a run: the named metric, or the runs' own performance.

        UsageError for a run that has none, where the runs' own are not the same metric, and for a
        counter or a loss without `transform`. `command` is what the user typed, for the remedy.
        """
        rows = self.rows
        own = [None if row.metric is None else row.performance for row in rows]
        values = np.array(own, dtype=np.float64)
        if metric is not None:
            named = np.array([row.metric == metric for row in rows], dtype=np.bool_)
            logged = self._metric(metric)
            values = np.where(np.isnan(logged) & named, values, logged)
        without = [rows[i] for i in np.flatnonzero(np.isnan(values)).tolist()]
        if without and metric is None:
            self._refuse_undeclared(without, command)
        if without:
            known = self._metric_names()
            others = f"; or --metric with one of: {', '.join(known)}" if known else ""
            raise UsageError(
                f"no {metric or 'performance'} is known of "
                + listed([row.label for row in without]),
                why="a score needs the performance of every run that is compared",
                fix=f"pepr-profile runs set {without[0].run_id} {metric or 'accuracy'}=0.91"
                f"{others}; or name the runs to compare: pepr-profile compare RUN RUN",
            )
        names = sorted({str(row.metric) for row in rows}) if metric is None else [metric]
        if len(names) > 1:
            raise UsageError(
                "the runs' performances are not the same metric",
                why=f"they are {', '.join(names)}",
                fix=f"say which one to compare: --metric {shlex.quote(names[0])}",
            )
        if transform is None and not is_performance(names[0]):
            counts = names[0] in COUNTERS
            raise UsageError(
                f"{names[0]} is no performance",
                why="it counts how far a run is"
                if counts
                else "of a loss less is better, and it says nothing of its range",
                fix="name another: --metric NAME"
                if counts
                else "declare how it becomes one: --metric "
                f"{shlex.quote(names[0])} --transform exp-neg; or name another: --metric NAME",
            )
        return names[0], values

    def _refuse_undeclared(self, without: Sequence[Facts], command: str) -> None:
        """UsageError with the metrics to choose from, if all of these runs logged some."""
        logged = [loads(row.metrics) for row in without]
        names = [name for name in logged[0] if all(x.get(name) is not None for x in logged)]
        if not names:
            return
        texts = []
        for name in names:
            values = [float(x[name]) for x in logged]
            ends = dict.fromkeys(f"{x:.4g}" for x in (min(values), max(values)))
            texts.append(f"{name} {' … '.join(ends)}")
        good = [
            name
            for name in names
            if is_performance(name) and all(0 <= float(x[name]) <= 1 for x in logged)
        ]
        losses = [name for name in names if name not in COUNTERS]
        wanted = f"--metric {shlex.quote(good[0])}" if good else ""
        if not good and losses:
            wanted = f"--metric {shlex.quote(losses[0])} --transform exp-neg"
        raise UsageError(
            "none of the metrics is declared as the performance of "
            + listed([row.label for row in without]),
            why=f"the last values are: {listed(texts, limit=20)}",
            fix=f"{command or 'pepr-profile compare'} {wanted or '--metric NAME'}",
        )

    def models(self) -> list[str]:
        """The name of the model that each run is of: the run's name. Runs of one model are repeats.

        A run that was given no name has its script's, which says nothing of the model. Such runs
        are repeats only if their commands are the same but for the seed. Else what differs in their
        commands becomes part of the name.
        """
        names = [row.name for row in self.rows]
        unnamed: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
        for i, row in enumerate(self.rows):
            if row.command is not None:
                command = _without_seed(loads(row.command))
                unnamed.setdefault(row.name, []).append((i, command))
        for name, commands in unnamed.items():
            if len({command for _, command in commands}) == 1:
                continue
            in_all = set.intersection(*(set(command) for _, command in commands))
            for i, command in commands:
                own = " ".join(word for word in command if word not in in_all)
                names[i] = f"{name} {own}".rstrip()
        return names

    def groups(self, by: str | None) -> dict[str | None, list[int]]:
        """The numbers of the runs in each group, groups in order of appearance.

        `by` is one of GROUPS; None is the experiment, with one nameless group if there is only one.
        """
        if by is not None and by not in GROUPS:
            raise UsageError(
                f"runs cannot be grouped by {by!r}",
                why=f"it is none of {', '.join(GROUPS)}",
                fix="--group experiment",
            )
        groups: dict[str | None, list[int]] = {}
        for i, row in enumerate(self.rows):
            value = None if by == "none" else row.host if by == "host" else row.experiment
            groups.setdefault(_NAMELESS if value is None else value, []).append(i)
        if by == "none" or (by is None and len(groups) == 1):
            return {None: list(range(len(self)))}
        return groups

    def provenance(self, *, allow_mixed: bool) -> str:
        """Whether the energies are measured or modelled, all of one attribution.

        UsageError where some are measured and others modelled, unless `allow_mixed`, and where some
        are the job's share of its devices and others all that the devices took.
        """
        kinds = sorted({str(row.provenance) for row in self.rows})
        if len(kinds) > 1 and not allow_mixed:
            words = [units.format_provenance(kind) for kind in kinds]
            who = (
                listed([row.label for row in self.rows if str(row.provenance) == kind])
                for kind in kinds
            )
            raise UsageError(
                f"{' and '.join(words)} energies are not comparable",
                why="; ".join(map(": ".join, zip(words, who, strict=True))),
                fix="name runs of one kind, or compare them all the same: --mix-provenance",
            )
        whole = [row.label for row in self.rows if row.scope == "device"]
        if 0 < len(whole) < len(self):
            raise UsageError(
                "energies of jobs and of whole devices are not comparable",
                why=f"{listed(whole)} recorded with --attribution device, the others without",
                fix="name runs of one attribution",
            )
        return "mixed" if len(kinds) > 1 else kinds[0]

    def with_shared_errors(self, amount: Amount) -> Amount:
        """An amount of these runs that follows from their energy, with the errors that they share.

        There is one such error for each device and cause. Power models of a host err alike; half of
        their error's variance is the same for all runs on it, half for those of one program.
        """
        assert amount.units_per_joule is not None
        number: dict[str, int] = {}
        entries = []
        of_models = self.models()
        model = CAUSES.index("model_j")
        for i, row in enumerate(self.rows):
            models_j: dict[str, float] = {}  # by host
            for device, *errors_j in loads(row.errors):
                if errors_j[model]:
                    host = _host_of(device)
                    models_j[host] = models_j.get(host, 0.0) + errors_j[model]
                    errors_j[model] = 0.0
                entries.append((number.setdefault(device, len(number)), i, *errors_j))
            for host, model_j in models_j.items():
                machine = [0.0] * len(CAUSES)
                machine[model] = model_j
                load = [x * math.sqrt(1 / _SHARED["model_j"] - 1) for x in machine]
                # Repeats of one program are the same load, so that no mean of them is surer.
                for line, errors_j in ((host, machine), (f"{host}\0{of_models[i]}", load)):
                    entries.append((number.setdefault(line, len(number)), i, *errors_j))
        table = np.array(entries, dtype=np.float64).reshape(-1, 2 + len(CAUSES))
        devices, runs = table[:, :2].T.astype(np.intp)
        moves_j = table[:, 2:] * np.sqrt([_SHARED[cause] for cause in CAUSES])
        entry, cause = np.nonzero(moves_j)
        shared = SharedErrors(
            lines=devices[entry] * len(CAUSES) + cause,
            rows=runs[entry],
            moves=moves_j[entry, cause] * amount.units_per_joule[runs[entry]],
        )
        return replace(amount, shared=shared)

    def amount(self, resource: str, price: tuple[float, str] | None) -> Amount:
        """A resource of every run. UsageError if it is unknown of any."""
        if resource in ("energy", "carbon", "cost"):
            return self._energetic(resource, price)
        if resource == "time":
            values, name, unit = self._numbers("time_s"), "time", "s"
            fix = "name the runs to compare: pepr-profile compare RUN RUN"
        elif resource.partition(":")[0] == "memory":
            if resource not in LABELS:
                raise self._no_such(resource)
            gpu = self._numbers("gpu_peak_bytes")
            on_gpu = resource == "memory:gpu" or (
                resource == "memory" and bool(np.nan_to_num(gpu).all())
            )
            values = gpu if on_gpu else self._numbers("peak_rss_bytes")
            name, unit = "GPU memory" if on_gpu else "peak RSS", "B"
            sensor = "nvml" if on_gpu else "processes"
            fix = f"profile again with the {sensor} sensor, or rank by energy: --resource energy"
        else:
            values = self._metric(resource)
            if np.isnan(values).all():
                raise self._no_such(resource)
            name, unit = resource, ""
            fix = f"pepr-profile runs set RUN {resource}=VALUE"
        self._require(values, what="peak memory" if unit == "B" else name, fix=fix)
        return Amount(resource, name, unit, values, label=_label(resource))

    def _energetic(self, resource: str, price: tuple[float, str] | None) -> Amount:
        energy_j = self._numbers("total_j")
        if np.isnan(energy_j).all():  # single runs without are left out
            self._require(
                energy_j, what="energy", fix="pepr-profile sensors says what can be measured"
            )
        unit, units_per_joule = "J", np.ones(len(self))
        if resource == "carbon":
            values = self._numbers("g_co2e")
            self._require(
                np.where(np.isnan(energy_j), 0.0, values),
                what="carbon",
                fix="profile with --region CODE or --carbon-intensity G_PER_KWH, "
                "or rank by energy: --resource energy",
            )
            unit = "g"
            with np.errstate(divide="ignore", invalid="ignore"):
                units_per_joule = values / energy_j
        else:
            if resource == "cost":
                if price is None:
                    raise UsageError(
                        "the cost needs the price of a kWh",
                        why="it differs by place and contract",
                        fix="--price 0.30EUR",
                    )
                unit, units_per_joule = price[1], np.full(len(self), price[0] / units.J_PER_KWH)
            values = energy_j * units_per_joule
        u = self._numbers("u_j") * units_per_joule
        return Amount(resource, resource, unit, values, u, units_per_joule, label=_label(resource))

    def _require(self, values: Floats, *, what: str, fix: str) -> None:
        """UsageError that names the runs whose value is unknown."""
        lacking = [self.rows[i].label for i in np.flatnonzero(np.isnan(values)).tolist()]
        if lacking:
            raise UsageError(
                f"no {what} is known of {listed(lacking)}",
                why="an unknown resource is not 0, and every run counts in the normalisation range",
                fix=fix,
            )

    def _no_such(self, resource: str) -> UsageError:
        known = ["energy", "carbon", "time", "memory", "memory:gpu", "memory:host", "cost"]
        known += self._metric_names()
        return UsageError(
            f"there is no resource {resource!r}",
            why="it is neither measured nor logged by any of these runs, which have: "
            + listed(known, limit=20),
            fix="--resource with one of these",
        )


def _not_done(row: Facts) -> str:
    """Why a run did not end as it should have; "" if it did."""
    if row.state == "incomplete":
        return "incomplete: it was killed or still runs"
    if row.exit_code:
        return f"failed with exit status {row.exit_code:.0f}"
    return f"was killed by signal {row.signal:.0f}" if row.signal else ""


def _label(resource: str) -> str:
    return LABELS.get(resource, f"PePR-{resource}")


class _Runs(Sequence[Run]):
    """Some runs of a sequence that makes each when it is asked for, and more behind them."""

    def __init__(
        self, runs: Sequence[Run], chosen: Sequence[int], more: Sequence[Run] = ()
    ) -> None:
        self._runs, self._chosen, self._more = runs, chosen, more

    def __len__(self) -> int:
        return len(self._chosen) + len(self._more)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | Sequence[Run]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return _Runs(self, places)
        behind = places - len(self._chosen)
        return self._runs[self._chosen[places]] if behind < 0 else self._more[behind]


_READ = {"run_id", "name", "complete", "exit_code", "energy", "time_s", "memory", "metrics"}


def unreadable_as_summary(run: Run) -> str:
    """Why a mapping is no summary that can be compared; "" if it is one."""
    schema = run.get("schema", 1)
    if schema != 1:
        return f"its schema is {schema!r}, this version reads 1: update pepr-profiler"
    if run.keys() >= _READ:
        return ""
    return f"it is no summary: it lacks {', '.join(sorted(_READ - run.keys()))}"


def _host_of(device: str) -> str:
    """The host that the name of a device in `Facts.errors` begins with, "6:node-1gpu:…"."""
    length, _, rest = device.partition(":")
    return f"{length}:{rest[: int(length)]}"


_SEED = re.compile(r"-{0,2}(\w+[._-])?seed", re.IGNORECASE)


def _without_seed(command: Sequence[Any]) -> tuple[str, ...]:
    """A command without --seed 1, --seed=1 and seed=1, in which repeats of one model differ."""
    words: list[str] = []
    skip = False
    for word in map(str, command):
        flag, equals, _ = word.partition("=")
        seed = _SEED.fullmatch(flag) is not None
        if not skip and not (seed and (equals or word.startswith("-"))):
            words.append(word)
        skip = seed and not equals and word.startswith("-") and not skip
    return tuple(words)
