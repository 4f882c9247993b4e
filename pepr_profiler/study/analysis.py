"""What the PePR paper asks of a study beyond its rankings: classes, sizes and settings of models.

Means of the scores over groups (data sets), two settings compared in pairs, the best few.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pepr_profiler.errors import UsageError
from pepr_profiler.record import Floats
from pepr_profiler.study.paired import SignedRanks, signed_ranks
from pepr_profiler.study.pepr import listed
from pepr_profiler.study.ranking import Ranking
from pepr_profiler.study.study import Study
from pepr_profiler.units import format_number

MOST_CLASSES = 8
"""Colours that a reader can tell apart."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Traits:
    """What is known of the n rows of a ranking beside their scores; None was not asked for.

    `models` (n,) are the names that rows of several groups and settings have in common. `sizes`
    (n,) may be any number that grows with a model.
    """

    models: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    sizes: Floats | None = None
    settings: tuple[str, ...] | None = None

    def ident(self, i: int) -> tuple[str, str]:
        """The model and the setting of a row."""
        return self.models[i], "" if self.settings is None else self.settings[i]

    def at(self, rows: Sequence[int]) -> Traits:
        """The traits of some of the rows."""

        def some(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if values is None else tuple(values[i] for i in rows)

        return Traits(
            models=some(self.models) or (),
            classes=some(self.classes),
            sizes=None if self.sizes is None else self.sizes[list(rows)],
            settings=some(self.settings),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupMeans:
    """Means of m models over groups, by one resource, in order of appearance; arrays are (m,).

    A model that is not in all `groups` is `missing` from these, and has no mean here: means over
    different groups are not comparable. `left_out` are (group, reason) of those whose rankings are
    noise. A setting may have groups of its own; `over` is the number
    of groups that a mean is of, the larger one where the settings differ in it. `sd_performance`
    and `sd_pepr` are sample standard deviations over the groups, NaN for one group. They are a
    spread, not an uncertainty.
    """

    label: str
    metric: str
    groups: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    over: int
    traits: Traits
    performance: Floats
    sd_performance: Floats
    pepr: Floats
    sd_pepr: Floats
    missing: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """The numbers of the models, the best mean score first."""
        return np.argsort(-self.pepr, kind="stable")


@dataclass(frozen=True, eq=False, kw_only=True)
class SettingEffect:
    """A quantity of the same n models with two settings, and the paired test of the second - first.

    `values` are (n,) for each of `settings`. A model's value is the mean over the groups.
    """

    name: str
    settings: tuple[str, str]
    models: tuple[str, ...]
    values: tuple[Floats, Floats]
    test: SignedRanks


@dataclass(frozen=True, eq=False, kw_only=True)
class Analysis:
    """A study with the traits of the rows of each of its rankings, in the same order.

    The names are those of the columns or metrics that the traits are from; "" was not asked for.
    `averages` asks for the means over groups, `anyway` for rankings of noise too, which are in no
    mean else. `of` is what titles add: which of the rows these are.
    """

    study: Study
    traits: tuple[Traits, ...] = field(repr=False)
    averages: bool = False
    anyway: bool = False
    class_name: str = ""
    size_name: str = ""
    setting_name: str = ""
    of: str = ""

    @classmethod
    def of_table(
        cls,
        study: Study,
        *,
        models: Sequence[str],
        labels: Sequence[str],
        groups: Mapping[str | None, Sequence[int]],
        classes: tuple[str, Sequence[str]] | None = None,
        sizes: tuple[str, Floats] | None = None,
        settings: tuple[str, Sequence[str]] | None = None,
        averages: bool = False,
        anyway: bool = False,
    ) -> Analysis:
        """The rankings of a table, and its columns (name, cells) of classes, sizes and settings.

        `models` and `labels` are a row's model and its name in the ranking, `groups` the rows of
        each group. UsageError for too many classes, for other than two settings, and for rows of
        one model that are repeats but differ in class or setting.
        """
        names: dict[str | None, list[list[int]]] = {}
        for group, at in groups.items():
            rows: dict[Any, list[int]] = {}
            for i in at:
                rows.setdefault(labels[i], []).append(i)
            names[group] = list(rows.values())
        of_ranking = []
        for ranking in study.rankings:
            members = names[ranking.group]
            if ranking.of != "model":  # every row by itself
                members = [[i] for i in groups[ranking.group]]
            of_ranking.append(members)
        columns: dict[str, Any] = {"classes": classes, "sizes": sizes, "settings": settings}
        return cls._of(study, of_ranking, models, averages=averages, anyway=anyway, **columns)

    @classmethod
    def of_runs(
        cls,
        study: Study,
        *,
        class_by: str | None = None,
        size_by: str | None = None,
        setting_by: str | None = None,
        averages: bool = False,
        anyway: bool = False,
    ) -> Analysis:
        """The rankings of runs with what they logged: a metric, "experiment" or "host" each.

        UsageError as in `of_table`, and for a run that has no such metric.
        """
        if not (class_by or size_by or setting_by):  # a store's summaries take time to make
            every = [Traits(models=ranking.names) for ranking in study.rankings]
            return cls(
                study=study,
                traits=tuple(every),
                averages=_averages(study, every, asked=averages, sizes=False),
                anyway=anyway,
            )._checked()
        runs = list(study.runs)
        number = {str(run["run_id"]): i for i, run in enumerate(runs)}

        def facts(name: str) -> list[Any]:
            if name in ("experiment", "host"):
                return [str(run.get(name) or f"no {name}") for run in runs]
            found = [(run.get("metrics") or {}).get(name) for run in runs]
            lacking = [str(run["run_id"]) for run, x in zip(runs, found, strict=True) if x is None]
            if lacking:
                logged = sorted({key for run in runs for key in run.get("metrics") or {}})
                raise UsageError(
                    f"no {name} is known of {listed(lacking)}",
                    why=f"it is neither experiment nor host; metrics are {', '.join(logged)}"
                    if logged
                    else "it is neither experiment nor host, and no metric was logged",
                    fix=f"pepr-profile runs set {lacking[0]} {name}=1",
                )
            return found

        def texts(name: str) -> tuple[str, list[str]]:
            return name, [x if isinstance(x, str) else format_number(x) for x in facts(name)]

        classes = texts(class_by) if class_by else None
        settings = texts(setting_by) if setting_by else None
        sizes = None
        if size_by in ("experiment", "host"):
            raise UsageError(
                f"--size {size_by} is no number",
                why="a size is a metric that the runs logged",
                fix="log one: run.log(parameters=…)",
            )
        if size_by:
            sizes = size_by, np.array(facts(size_by), dtype=np.float64)
        members = [
            [[number[x] for x in ids] for ids in ranking.run_ids] for ranking in study.rankings
        ]
        names = [""] * len(runs)
        for ranking, rows in zip(study.rankings, members, strict=True):
            for name, row in zip(ranking.names, rows, strict=True):
                for i in row:
                    names[i] = name
        columns: dict[str, Any] = {"classes": classes, "sizes": sizes, "settings": settings}
        return cls._of(study, members, names, averages=averages, anyway=anyway, **columns)

    @classmethod
    def _of(
        cls,
        study: Study,
        members: Sequence[Sequence[Sequence[int]]],
        models: Sequence[str],
        *,
        classes: tuple[str, Sequence[str]] | None,
        sizes: tuple[str, Floats] | None,
        settings: tuple[str, Sequence[str]] | None,
        averages: bool,
        anyway: bool,
    ) -> Analysis:
        """`members` are the table's rows or the runs of each row of each ranking."""
        if classes:
            check_classes(*classes)
        if settings:
            two_settings(*settings)

        def one(column: tuple[str, Sequence[str]] | None, rows: Sequence[Sequence[int]]) -> Any:
            if column is None:
                return None
            for row in rows:
                differing = sorted({column[1][i] for i in row})
                if len(differing) > 1:
                    raise UsageError(
                        f"{models[row[0]]} has several values of {column[0]}",
                        why=f"its repeats have {listed(differing)}",
                        fix="give rows of different values different names",
                    )
            return tuple(column[1][row[0]] for row in rows)

        traits = [
            Traits(
                models=tuple(models[row[0]] for row in rows),
                classes=one(classes, rows),
                sizes=None
                if sizes is None
                else np.array([float(np.mean(sizes[1][list(row)])) for row in rows]),
                settings=one(settings, rows),
            )
            for rows in members
        ]
        return cls(
            study=study,
            traits=tuple(traits),
            averages=_averages(study, traits, asked=averages, sizes=sizes is not None),
            anyway=anyway,
            class_name=classes[0] if classes else "",
            size_name=sizes[0] if sizes else "",
            setting_name=settings[0] if settings else "",
        )._checked()

    def _checked(self) -> Analysis:
        """The same. An error is due before anything is printed or written."""
        if self.averages or self.setting_name:
            _ = self.effects if self.setting_name else self.means
        return self

    @cached_property
    def both_ways(self) -> tuple[Analysis, ...]:
        """The analysis, and again without outliers where there are any."""
        parts: list[tuple[Ranking, Traits]] = []
        for ranking, traits in zip(self.study.rankings, self.traits, strict=True):
            rest = ranking.without
            parts.append((ranking, traits) if rest is None else (rest, traits.at(rest.whole_rows)))
        if all(ranking.without is None for ranking in self.study.rankings):
            return (self,)
        rankings, rows = zip(*parts, strict=True)
        rest_of = replace(self.study, rankings=rankings)
        try:
            sound = replace(self, study=rest_of, traits=rows, of=", without outliers")._checked()
        except UsageError:  # no model is left in all groups
            return (self,)
        return self, sound

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes, the one of most rows first."""
        count: Counter[str] = Counter()
        for traits in self.traits:
            count.update(traits.classes or ())
        return tuple(name for name, _ in count.most_common())

    def unranked(self, ranking: Ranking) -> bool:
        """Whether a ranking is one of noise, which is not shown."""
        return ranking.noise and (ranking.undefined or not self.anyway)

    @property
    def grouped(self) -> bool:
        """Whether there are several groups."""
        return len({ranking.group for ranking in self.study.rankings}) > 1

    def _by_resource(self) -> Iterator[list[tuple[Ranking, Traits]]]:
        parts: dict[str, list[tuple[Ranking, Traits]]] = {}
        for ranking, traits in zip(self.study.rankings, self.traits, strict=True):
            parts.setdefault(ranking.key, []).append((ranking, traits))
        yield from parts.values()

    def _places(self, ranking: Ranking, traits: Traits) -> dict[tuple[str, str], int]:
        """The row of each model and setting of a ranking. UsageError if two rows are the same."""
        places = {traits.ident(i): i for i in range(len(traits.models))}
        if len(places) < len(traits.models):
            count = Counter(map(traits.ident, range(len(traits.models))))
            twice = [" ".join(ident).strip() for ident, rows in count.items() if rows > 1]
            of = f" of {ranking.grouped_by or 'group'} {ranking.group}" if ranking.group else ""
            raise UsageError(
                f"several rows{of} are called {listed(twice)}",
                why="a mean over groups and a pair need one row of each model",
                fix="--repeats, if they are repeats of a model; or --name COL with other names",
            )
        return places

    @cached_property
    def means(self) -> tuple[GroupMeans, ...]:
        """The means over the groups, one for each resource by which groups can be ranked."""
        found = [self._mean(parts) for parts in self._by_resource()]
        if not any(found):
            names = sorted({ranking.resource_name for ranking in self.study.rankings})
            raise UsageError(
                "there is no mean over groups",
                why=f"the models of too few groups can be told apart by {listed(names)}; else the "
                "mean would be one of noise",
                fix="repeat the runs, or --anyway",
            )
        return tuple(means for means in found if means is not None)

    def _mean(self, parts: Sequence[tuple[Ranking, Traits]]) -> GroupMeans | None:
        out = tuple(
            (_group(ranking), f"its {ranking.of}s cannot be told apart by {ranking.resource_name}")
            for ranking, _ in parts
            if self.unranked(ranking)
        )
        every, parts = parts, [part for part in parts if not self.unranked(part[0])]
        if len(parts) < min(2, len(every)):
            return None
        places = [self._places(ranking, traits) for ranking, traits in parts]
        # A setting may have groups of its own.
        of_setting: dict[str, list[int]] = {}
        for k, (_, traits) in enumerate(parts):
            for setting in dict.fromkeys(traits.settings or [""]):
                of_setting.setdefault(setting, []).append(k)
        everyone = dict.fromkeys(ident for of_group in places for ident in of_group)
        whole, missing = [], []
        for ident in everyone:
            lacking = [k for k in of_setting[ident[1]] if ident not in places[k]]
            if lacking:
                missing.append(
                    (" ".join(ident).strip(), tuple(_group(parts[k][0]) for k in lacking))
                )
            else:
                whole.append(ident)
        if not whole:
            raise UsageError(
                "there is no mean over groups",
                why=f"no model is in all of them: {listed([_group(r) for r, _ in parts])}",
                fix="check the names of the models: --name COL",
            )
        rows = [[(k, places[k][ident]) for k in of_setting[ident[1]]] for ident in whole]

        def of(values: Sequence[Floats]) -> tuple[Floats, Floats]:
            each = [[float(values[k][i]) for k, i in row] for row in rows]
            if len({len(x) for x in each}) > 1:  # a setting of more groups than the other
                spread = [float(np.std(x, ddof=1)) if len(x) > 1 else math.nan for x in each]
                return np.array([float(np.mean(x)) for x in each]), np.array(spread)
            table = np.array(each)
            alone = table.shape[1] == 1
            sd = np.full(len(table), math.nan) if alone else table.std(axis=1, ddof=1)
            return table.mean(axis=1), sd

        performance, sd_performance = of([ranking.performance for ranking, _ in parts])
        pepr, sd_pepr = of([ranking.scores.pepr for ranking, _ in parts])
        first = parts[0][1]
        classes = None
        if first.classes is not None:
            classes = tuple(self._same_class(parts, row) for row in rows)
        sizes = None
        if first.sizes is not None:
            sizes = of([traits.sizes for _, traits in parts if traits.sizes is not None])[0]
        return GroupMeans(
            label=parts[0][0].label,
            metric=parts[0][0].metric,
            groups=tuple(_group(ranking) for ranking, _ in parts),
            left_out=out,
            over=max(map(len, of_setting.values())),
            traits=Traits(
                models=tuple(model for model, _ in whole),
                classes=classes,
                sizes=sizes,
                settings=None if first.settings is None else tuple(x for _, x in whole),
            ),
            performance=performance,
            sd_performance=sd_performance,
            pepr=pepr,
            sd_pepr=sd_pepr,
            missing=tuple(missing),
        )

    def _same_class(
        self, parts: Sequence[tuple[Ranking, Traits]], row: Sequence[tuple[int, int]]
    ) -> str:
        found = sorted({(parts[k][1].classes or ())[i] for k, i in row})
        if len(found) > 1:
            k, i = row[0]
            raise UsageError(
                f"{parts[k][1].models[i]} has several values of {self.class_name}",
                why=f"in different groups it is {listed(found)}",
                fix="give a model one class in all groups",
            )
        return found[0]

    @cached_property
    def effects(self) -> tuple[SettingEffect, ...]:
        """The performance and each score with two settings, compared in pairs of models."""
        settings = two_settings(
            self.setting_name, [x for traits in self.traits for x in traits.settings or ()]
        )
        effects = []
        for k, means in enumerate(self.means):
            at = [
                {
                    model: i
                    for i, model in enumerate(means.traits.models)
                    if means.traits.ident(i)[1] == setting
                }
                for setting in settings
            ]
            both = [model for model in at[0] if model in at[1]]
            if not both:
                raise UsageError(
                    f"no model has both values of {self.setting_name}, {' and '.join(settings)}",
                    why="the test compares the same models with one and with the other",
                    fix="check the names of the models: --name COL",
                )
            quantities = [(means.label, means.pepr)]
            if k == 0:
                quantities.insert(0, (means.metric, means.performance))
            for name, values in quantities:
                one, other = (values[[places[model] for model in both]] for places in at)
                effects.append(
                    SettingEffect(
                        name=name,
                        settings=settings,
                        models=tuple(both),
                        values=(one, other),
                        test=signed_ranks(one, other),
                    )
                )
        return tuple(effects)

    @property
    def unpaired(self) -> tuple[str, ...]:
        """The models of which the test knows no pair."""
        paired = {model for effect in self.effects for model in effect.models}
        every = dict.fromkeys(model for traits in self.traits for model in traits.models)
        return tuple(model for model in every if model not in paired)


def _averages(study: Study, traits: Sequence[Traits], *, asked: bool, sizes: bool) -> bool:
    """Whether there are means over groups: where asked for, and for sizes of several groups."""
    groups: dict[str, set[str | None]] = {}
    for ranking, of_rows in zip(study.rankings, traits, strict=True):
        for setting in set(of_rows.settings or [""]):
            groups.setdefault(setting, set()).add(ranking.group)
    several = any(len(of_setting) > 1 for of_setting in groups.values())
    if asked and not several:
        raise UsageError(
            "there is no mean over groups",
            why=f"there is one group{' of each setting' if len(groups) > 1 else ''}",
            fix="name what the groups are: --group",
        )
    return several and (asked or sizes)


def _group(ranking: Ranking) -> str:
    return ranking.group or "all"


def check_classes(name: str, cells: Sequence[str]) -> None:
    """UsageError if a column has more classes than a figure can show."""
    found = list(dict.fromkeys(cells))
    if len(found) > MOST_CLASSES:
        raise UsageError(
            f"--class {name} has {len(found)} values",
            why=f"a figure can show {MOST_CLASSES} classes; these are {listed(found)}",
            fix="name a column of few values, such as one of CNN, efficient and other",
        )


def two_settings(name: str, cells: Sequence[str]) -> tuple[str, str]:
    """The two values of a column, in order of appearance. UsageError for more or fewer."""
    found = list(dict.fromkeys(cells))
    if len(found) != 2:
        raise UsageError(
            f"--setting {name} has {len(found)} value{'s' * (len(found) != 1)}",
            why=f"two settings are compared, these are {listed(found)}",
            fix="name a column of two values, or leave out the rows of the others",
        )
    return found[0], found[1]


def best(ranking: Ranking, count: int) -> npt.NDArray[np.intp]:
    """The numbers of the rows with the best scores, at most `count`."""
    return ranking.order[:count]


def best_performing(ranking: Ranking, count: int) -> npt.NDArray[np.intp]:
    """The numbers of the rows that perform best, at most `count`; of equals the cheaper first."""
    return np.lexsort((ranking.resource, -ranking.performance))[:count]
