"""`pepr-profile compare`: the PePR ranking of recorded runs."""

from __future__ import annotations

from pathlib import Path

import click

from pepr_profiler.commands.score import publish
from pepr_profiler.units import parse_bounds


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--experiment", metavar="NAME", help="The runs of this experiment.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="PEPR_STORE",
    metavar="DIR",
    help="Where runs live [PEPR_STORE].",
)
@click.option(
    "--resource",
    type=click.Choice(["energy", "carbon", "time", "memory"]),
    default="energy",
    show_default=True,
    help="What the performance is weighed against.",
)
@click.option("--metric", metavar="NAME", help="The performance [the run's own].")
@click.option("--bounds", metavar="MIN:MAX", help="Fixed bounds, in J, g, s or bytes: 151k:1.94M.")
@click.option("--percent", is_flag=True, help="The metric is in percent.")
@click.option(
    "--transform",
    type=click.Choice(["one-minus", "exp-neg"]),
    help="Turn a lower-is-better metric x into 1-x or exp(-x).",
)
@click.option(
    "--mix-provenance", is_flag=True, help="Let measured and modelled energies share a cohort."
)
@click.option("--json", "json_file", metavar="FILE", help="Write the ranking as JSON; - is stdout.")
def compare(
    runs: tuple[str, ...],
    *,
    experiment: str | None,
    store: Path | None,
    resource: str,
    metric: str | None,
    bounds: str | None,
    percent: bool,
    transform: str | None,
    mix_provenance: bool,
    json_file: str | None,
) -> None:
    """Rank runs by PePR = P / (1 + R): RUNs by id or prefix, an experiment's, or all of the store.

    The score belongs to the cohort: another run can change every R, unless --bounds fixes them.
    Runs that failed or are incomplete are left out and named on stderr.
    """
    from pepr_profiler import pepr
    from pepr_profiler.report.ranking import Ranking
    from pepr_profiler.store import Store

    limits = parse_bounds(bounds) if bounds else None
    recorded = Store(store)
    if runs:
        # One run named twice, or by two prefixes, is one run.
        found = {s["run_id"]: s for s in map(recorded.summary, runs)}
        summaries = [s for s in found.values() if experiment in (None, s["experiment"])]
    else:
        summaries = list(recorded.runs(experiment=experiment))
    cohort = pepr.cohort_of_runs(
        summaries, resource=resource, metric=metric, mix_provenance=mix_provenance
    )
    for who, why in cohort.left_out:
        click.echo(f"pepr-profile: left out {who}: {why}", err=True)
    p = pepr.as_performance(cohort.performance, percent=percent, transform=transform)
    scores = pepr.score(p, cohort.resource, bounds=limits, names=cohort.names)
    u_pepr = pepr.uncertainty(p, cohort.resource, cohort.u_own, limits, shared=cohort.u_shared)
    ranking = Ranking(
        label=f"PePR-{resource[0].upper()}",
        of="run",
        names=cohort.names,
        metric=cohort.metric,
        resource_name=cohort.resource_name,
        unit=cohort.unit,
        performance=p,
        resource=cohort.resource,
        scores=scores,
        bounds_given=limits is not None,
        u_pepr=u_pepr if cohort.u_known else None,
    )
    publish([ranking], json_file=json_file, left_out=cohort.left_out)
