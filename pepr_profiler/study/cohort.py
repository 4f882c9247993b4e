"""Recorded runs as a cohort: which can be compared, what model each is of, and what they took."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, overload

import numpy as np

from pepr_profiler import units
from pepr_profiler.errors import UsageError
from pepr_profiler.store.columns import CAUSES, Columns, Rows, facts_of
from pepr_profiler.store.index import Found
from pepr_profiler.study import pepr
from pepr_profiler.study.jobs import merge_jobs
from pepr_profiler.study.ranking import Amount, Shared, listed
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
"""How the paper calls the score of a resource; any other's is PePR-NAME."""

GROUPS = ("experiment", "host", "none")
"""What runs may be grouped by, each group a cohort of its own."""

_NAMELESS = "no experiment"

_SHARED = {"gain_j": 1.0, "offset_j": 1.0, "model_j": 0.5}
"""Causes of error that all runs on a device share, and how much of their variance. A sensor's gain
and offset are fixed for its board; a power model is off by a part that is the machine's and a part
that depends on the load (half each: a judgement)."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """Runs that can be compared: what is known of them as columns, and their summaries."""

    columns: Columns
    summaries: Sequence[Run]

    def __len__(self) -> int:
        return len(self.columns)

    @classmethod
    def of(
        cls, runs: Iterable[Run], whole: Callable[[str], Run] | None = None
    ) -> tuple[Cohort, list[tuple[str, str]]]:
        """The runs that can be ranked, each once, and why the others cannot.

        What several profilers recorded of one job is one run (see jobs.merge_jobs), for which
        `whole` gives a whole summary by its id.
        """
        out: list[tuple[str, str]] = []
        given = cls(runs.columns, runs) if isinstance(runs, Found) else cls._read(runs, out)
        every = given._one_a_job(whole)
        columns = every.columns
        code, signal = columns.numbers["exit_code"], columns.numbers["signal"]
        incomplete = columns.texts["state"].equal("incomplete")
        failed, killed = (np.nan_to_num(x) != 0 for x in (code, signal))
        good = ~(incomplete | failed | killed)
        for i in np.flatnonzero(~good).tolist():
            if incomplete[i]:
                why = "incomplete: it was killed or still runs"
            elif failed[i]:
                why = f"failed with exit status {code[i]:.0f}"
            else:
                why = f"was killed by signal {signal[i]:.0f}"
            out.append((columns.who(i), why))
        if not columns.texts["id"].distinct:
            # An id is unique in a store. Two stores may share one, a copied run shares all.
            identity = [columns.texts[key].codes for key in ("id", "host", "started_at")]
            chosen = np.flatnonzero(good)
            _, first = np.unique(np.array(identity)[:, chosen], axis=1, return_index=True)
            good[np.delete(chosen, first)] = False
        return every.at(np.flatnonzero(good)), out

    @classmethod
    def _read(cls, runs: Iterable[Run], out: list[tuple[str, str]]) -> Cohort:
        """Of summaries; those that are none go `out`."""
        good, facts = [], []
        for run in runs:
            reason = unreadable_as_summary(run)
            if not reason:
                try:
                    facts.append(facts_of(run))
                except MALFORMED as error:
                    reason = f"it is no summary ({type(error).__name__}: {error})"
            if reason:
                out.append((str(run.get("run_id", "a run")), reason))
            else:
                good.append(run)
        return cls(Columns.of(facts), good)

    def at(self, rows: Rows) -> Cohort:
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self
        return Cohort(self.columns.at(rows), _Picked(self.summaries, rows.tolist()))

    @property
    def ids(self) -> list[str]:
        return [str(name) for name in self.columns.texts["id"].list()]

    def _one_a_job(self, whole: Callable[[str], Run] | None) -> Cohort:
        """With what several profilers recorded of one job as one, behind the others.

        A run around several others that are compared, the script of a sweep, stays beside them.
        """
        texts = self.columns.texts
        job, outer = texts["job"], texts["outer"]
        counts = np.bincount(job.codes, minlength=len(job.values))
        shared = [
            value is not None and count > 1 for value, count in zip(job.values, counts, strict=True)
        ]
        inside = Counter(outer.list())
        around = {name for name, count in inside.items() if name is not None and count == 1}
        around &= set(texts["id"].values) if around else set()
        if not any(shared) and not around:
            return self
        related = job.where(shared)
        for column in (texts["id"], outer):
            related |= column.where([value in around for value in column.values])
        parts = np.flatnonzero(related)
        ids = self.ids
        merged = merge_jobs(
            [whole(ids[i]) if whole is not None else self.summaries[i] for i in parts.tolist()]
        )
        rest = self.at(np.flatnonzero(~related))
        return Cohort(
            rest.columns.followed_by(Columns.of(map(facts_of, merged))),
            _Picked(_Chained(rest.summaries, merged), range(len(rest) + len(merged))),
        )

    def performance(self, metric: str | None) -> tuple[str, pepr.Floats]:
        """The metric's name and one value a run: the named metric, or the runs' own performance.

        UsageError for a run that has none, and where the runs' own are not the same.
        """
        columns = self.columns
        own = columns.texts["metric"]
        if metric is None:
            values = np.where(own.equal(None), np.nan, columns.numbers["performance"])
        else:
            values = columns.metric(metric)
            instead = np.isnan(values) & own.equal(metric)
            values[instead] = columns.numbers["performance"][instead]
        without = np.flatnonzero(np.isnan(values)).tolist()
        if without:
            known = columns.metric_names()
            others = f"; or --metric with one of: {', '.join(known)}" if known else ""
            raise UsageError(
                f"no {metric or 'performance'} is known of {listed([columns.who(i) for i in without])}",  # noqa: E501
                why="a score needs the performance of every run of the cohort",
                fix=f"pepr-profile runs set {columns.text('id', without[0])} "
                f"{metric or 'accuracy'}=0.91{others}; "
                "or name the runs to compare: pepr-profile compare RUN RUN",
            )
        if metric is not None:
            return metric, values
        names = sorted(str(own.values[code]) for code in np.unique(own.codes))
        if len(names) > 1:
            raise UsageError(
                "the runs' performances are not the same metric",
                why=f"they are {', '.join(names)}",
                fix=f"say which one to compare: --metric {names[0]}",
            )
        return names[0], values

    def models(self) -> list[str]:
        """What model each run is of: its name. Runs of one model are repeats.

        A run that was not given a name has its script's, which says nothing of the model: such runs
        are repeats only if their commands are the same, a seed apart, and are told apart by what of
        their commands differs.
        """
        names = [str(name) for name in self.columns.texts["name"].list()]
        unnamed: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
        for i, words in enumerate(self.columns.commands):
            if words is not None:
                unnamed.setdefault(names[i], []).append((i, _without_seed(words)))
        for name, commands in unnamed.items():
            if len({command for _, command in commands}) == 1:
                continue
            in_all = set.intersection(*(set(command) for _, command in commands))
            for i, command in commands:
                own = " ".join(word for word in command if word not in in_all)
                names[i] = f"{name} {own}".rstrip()
        return names

    def groups(self, by: str | None) -> dict[str | None, Rows]:
        """The runs' numbers by group, in order of appearance."""
        if by is not None and by not in GROUPS:
            raise UsageError(
                f"runs cannot be grouped by {by!r}",
                why=f"it is none of {', '.join(GROUPS)}",
                fix="--group experiment",
            )
        if by == "none":
            return {None: np.arange(len(self))}
        groups = self.columns.texts[by or "experiment"].groups()
        if by is None and len(groups) == 1:
            return {None: np.arange(len(self))}
        nameless = groups.pop(None, None)
        if nameless is not None:  # beside an experiment that is called so, if there is one
            named = groups.get(_NAMELESS, nameless[:0])
            groups[_NAMELESS] = np.sort(np.concatenate((named, nameless)))
        return dict(sorted(groups.items(), key=lambda group: int(group[1][0])))

    def provenance(self, *, allow_mixed: bool) -> str:
        """Whether the energies are measured or modelled, all of one scope.

        UsageError if some are this, some that, and if some are the job's share of its devices, and
        some all that they took.
        """
        columns = self.columns
        whole = np.flatnonzero(columns.texts["scope"].equal("device"))
        kinds = columns.texts["provenance"].groups()
        if len(kinds) > 1 and not allow_mixed:
            named = {str(kind): [columns.who(i) for i in at.tolist()] for kind, at in kinds.items()}
            raise UsageError(
                f"{' and '.join(sorted(named))} energies are not comparable",
                why="; ".join(f"{kind}: {listed(who)}" for kind, who in sorted(named.items())),
                fix="compare runs of one kind by naming them, or ask for it: --mix-provenance",
            )
        if 0 < len(whole) < len(self):
            raise UsageError(
                "energies of jobs and of whole devices are not comparable",
                why=listed([columns.who(i) for i in whole.tolist()])
                + " recorded with --scope device, the others without",
                fix="compare runs of one scope by naming them",
            )
        return "mixed" if len(kinds) > 1 else str(next(iter(kinds)))

    def with_shared_errors(self, amount: Amount) -> Amount:
        """An amount of these runs that follows from their energy, with what errors they share.

        One a device and cause: what one standard uncertainty of it does to each run.
        """
        assert amount.units_per_joule is not None
        errors = self.columns.errors
        rows, moves = [errors.rows[:0]], [errors.values[0, :0]]
        for entries in errors.label.groups().values():
            for cause, part in _SHARED.items():
                rows.append(errors.rows[entries])
                moves.append(math.sqrt(part) * errors.values[CAUSES.index(cause), entries])
        lines = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
        at, moves_j = np.concatenate(rows), np.concatenate(moves)
        some = moves_j != 0
        shared = Shared(lines[some], at[some], (moves_j * amount.units_per_joule[at])[some])
        return replace(amount, shared=shared)

    def amount(self, resource: str, price: tuple[float, str] | None) -> Amount:
        """A resource of every run. UsageError if it is unknown of any."""
        numbers = self.columns.numbers
        if resource in ("energy", "carbon", "cost"):
            return self._energetic(resource, price)
        if resource == "time":
            values, name, unit = numbers["time_s"], "time", "s"
            fix = "name the runs to compare: pepr-profile compare RUN RUN"
        elif resource.partition(":")[0] == "memory":
            if resource not in LABELS:
                raise self._no_such(resource)
            gpu = numbers["gpu_peak_bytes"]
            on_gpu = resource == "memory:gpu" or (
                resource == "memory" and bool(np.nan_to_num(gpu).all())
            )
            values = gpu if on_gpu else numbers["peak_rss_bytes"]
            name, unit = "GPU memory" if on_gpu else "peak RSS", "B"
            sensor = "nvml" if on_gpu else "processes"
            fix = f"profile again with the {sensor} sensor, or rank by energy: --resource energy"
        else:
            values = self.columns.metric(resource)
            if np.isnan(values).all():
                raise self._no_such(resource)
            name, unit = resource, ""
            fix = f"pepr-profile runs set RUN {resource}=VALUE"
        self._require(values, what="peak memory" if unit == "B" else name, fix=fix)
        return Amount(resource, name, unit, values, label=_label(resource))

    def _energetic(self, resource: str, price: tuple[float, str] | None) -> Amount:
        numbers = self.columns.numbers
        energy_j = numbers["total_j"]
        self._require(energy_j, what="energy", fix="pepr-profile sensors says what can be measured")
        unit, units_per_joule = "J", np.ones(len(self))
        if resource == "carbon":
            values = numbers["g_co2e"]
            self._require(
                values,
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
        u = numbers["u_j"] * units_per_joule
        return Amount(resource, resource, unit, values, u, units_per_joule, label=_label(resource))

    def _require(self, values: pepr.Floats, *, what: str, fix: str) -> None:
        """UsageError that names the runs whose value is unknown."""
        lacking = [self.columns.who(i) for i in np.flatnonzero(np.isnan(values)).tolist()]
        if lacking:
            raise UsageError(
                f"no {what} is known of {listed(lacking)}",
                why="an unknown resource is not 0, and the cohort's bounds depend on every run",
                fix=fix,
            )

    def _no_such(self, resource: str) -> UsageError:
        known = ["energy", "carbon", "time", "memory", "memory:gpu", "memory:host", "cost"]
        known += self.columns.metric_names()
        return UsageError(
            f"there is no resource {resource!r}",
            why="it is neither measured nor logged by any of these runs, which have: "
            + listed(known, limit=20),
            fix="--resource with one of these",
        )


def _label(resource: str) -> str:
    return LABELS.get(resource, f"PePR-{resource}")


class _Picked(Sequence[Run]):
    """Some of the runs of a sequence that makes each when it is asked for."""

    def __init__(self, runs: Sequence[Run] | _Chained, rows: Sequence[int]) -> None:
        self._runs, self._rows = runs, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | Sequence[Run]:
        if isinstance(index, slice):
            return _Picked(self._runs, self._rows[index])
        return self._runs[self._rows[index]]


class _Chained:
    """Two sequences of runs, one behind the other."""

    def __init__(self, first: Sequence[Run], second: Sequence[Run]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, index: int) -> Run:
        n = len(self._first)
        return self._first[index] if index < n else self._second[index - n]


_READ = {"run_id", "name", "complete", "exit_code", "energy", "time_s", "memory", "metrics"}


def unreadable_as_summary(run: Run) -> str:
    """Why a mapping cannot be compared as a summary, or nothing."""
    schema = run.get("schema", 1)
    if schema != 1:
        return f"its schema is {schema!r}, this version reads 1: update pepr-profiler"
    if run.keys() >= _READ:
        return ""
    return f"it is no summary: it lacks {', '.join(sorted(_READ - run.keys()))}"


_SEED = re.compile(r"-{0,2}(\w+[._-])?seed", re.IGNORECASE)


def _without_seed(command: Sequence[Any]) -> tuple[str, ...]:
    """A command less --seed 1, --seed=1 and seed=1, which tell repeats of one model apart."""
    words: list[str] = []
    skip = False
    for word in map(str, command):
        flag, equals, _ = word.partition("=")
        seed = _SEED.fullmatch(flag) is not None
        if not skip and not (seed and (equals or word.startswith("-"))):
            words.append(word)
        skip = seed and not equals and word.startswith("-") and not skip
    return tuple(words)
