"""`pepr-profile compare`: the PePR ranking of recorded runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pepr_profiler.commands import TEXT, store_option
from pepr_profiler.commands.report import (
    forms_of,
    output_option,
    performance_options,
    raw_csv_option,
)
from pepr_profiler.commands.score import (
    Wanted,
    analysis_options,
    anyway_option,
    figure_of,
    limits_of,
    publish,
    range_options,
)
from pepr_profiler.errors import UsageError


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--experiment", type=TEXT, metavar="NAME", help="Only the runs of this experiment.")
@store_option
@click.option(
    "--resource",
    "resources",
    multiple=True,
    type=TEXT,
    default=("energy",),
    show_default=True,
    metavar="NAME[,NAME]...",
    help="Resource that the performance is weighed against: energy, carbon, time, memory (the "
    "GPU's peak where all runs have one, else the host's), memory:gpu, memory:host, cost, or a "
    "metric that was logged (parameters). Several are shown side by side.",
)
@click.option("--price", metavar="PER_KWH", help="Price of a kWh, for --resource cost: 0.30EUR.")
@click.option(
    "--group",
    type=click.Choice(["experiment", "host", "none"]),
    help="Rank each experiment or host by itself [experiment, unless runs are named].",
)
@click.option(
    "--metric", type=TEXT, metavar="NAME", help="Metric that is the performance [each run's own]."
)
@range_options("in J, g, s or bytes: 151k:1.94M")
@performance_options
@click.option(
    "--mix-provenance", is_flag=True, help="Compare measured and estimated energies all the same."
)
@anyway_option
@click.option("--json", "json_file", metavar="FILE", help="Write the ranking as JSON; - is stdout.")
@analysis_options("Metric (or experiment, host)", "NAME")
@output_option
@raw_csv_option
def compare(
    runs: tuple[str, ...],
    *,
    store: Path | None,
    resources: tuple[str, ...],
    price: str | None,
    bounds: str | None,
    bounds_from: Path | None,
    save_bounds: Path | None,
    anyway: bool,
    json_file: str | None,
    wanted: Wanted,
    outputs: tuple[Path, ...],
    raw_csv: bool,
    **options: Any,  # of Study.from_store
) -> None:
    """Rank runs by PePR: RUNs by id or prefix, those of an experiment, or all in the store.

    PePR = P / (1 + R). P is the performance. R is the resource, normalised to 0 for the run that
    took least and 1 for the one that took most, so another run can change every R, unless --range
    or --range-from fixes the normalisation range.

    Runs of one name are repeats of a model, and ranked by their means. Runs that failed or are
    incomplete are left out and named on stderr. Outliers, whose energy does not fit their time, are
    named too, and the ranking is printed with and without them. Models that their energy cannot
    tell apart are not ranked, but for --anyway.

    \b
    -o study.html         a page: figures, and rankings that you can change
    -o figure.pdf         performance against the resource (also .png, .svg)
    -o table.csv          the rankings (also .tsv, .parquet, .json)
    -o table.tex          the same for a paper, with units and ± (also .md)
    """
    from pepr_profiler.store.runs import Store
    from pepr_profiler.study.analysis import Analysis
    from pepr_profiler.study.study import Study

    forms = forms_of(outputs)
    figure = figure_of(forms, wanted)
    named = [name.strip() for text in resources for name in text.split(",") if name.strip()]
    recorded = Store(store)
    study = Study.from_store(
        recorded,
        runs=runs,
        resources=named or ["energy"],
        bounds=limits_of(bounds, bounds_from, dict.fromkeys(named)),
        price=parse_price(price) if price else None,
        command=_command(runs, store, resources, options),
        **options,
    )
    publish(
        study,
        analysis=Analysis.of_runs(
            study,
            class_by=wanted.class_by,
            size_by=wanted.size_by,
            setting_by=wanted.setting_by,
            averages=wanted.averages,
            anyway=anyway,
        ),
        json_file=json_file,
        save_bounds=save_bounds,
        forms=forms,
        figure=figure,
        best=wanted.best,
        load=recorded.load,
        raw_csv=raw_csv,
    )


def _command(
    runs: Sequence[str], store: Path | None, resources: Sequence[str], options: Mapping[str, Any]
) -> str:
    """What was typed, as far as it decides which runs are compared, and by what."""
    words = ["pepr-profile", "compare", *runs]
    for flag, value in (
        ("--experiment", options.get("experiment")),
        ("--store", store),
        ("--group", options.get("group")),
    ):
        words += [flag, str(value)] if value else []
    if tuple(resources) != ("energy",):
        words += [word for name in resources for word in ("--resource", name)]
    return shlex.join(words)


def parse_price(text: str) -> tuple[float, str]:
    """A price and its currency, from "0.30", "0.30EUR", "0.30 EUR" or "€0.30"."""
    match = re.fullmatch(r"\s*([^\d\s.,+-]{0,8})\s*(\d+\.?\d*|\.\d+)\s*([^\d\s.,+-]{0,8})\s*", text)
    if match and not (match[1] and match[3]):
        return float(match[2]), match[1] or match[3]
    raise UsageError(
        f"--price {text!r} cannot be read",
        why="a number and a currency are expected",
        fix="write for example --price 0.30EUR",
    )
