"""The old name of `study.pepr`, kept so that what imports it works as before."""

from pepr_profiler.study.draws import COVERAGE, coverage_factor
from pepr_profiler.study.pepr import (
    TRANSFORMS,
    Errors,
    Means,
    MinMax,
    NoCohortError,
    Scores,
    Standing,
    as_performance,
    average,
    pareto_front,
    rank,
    score,
    standing,
)

Bounds = MinMax

__all__ = [
    "COVERAGE",
    "TRANSFORMS",
    "Bounds",
    "Errors",
    "Means",
    "NoCohortError",
    "Scores",
    "Standing",
    "as_performance",
    "average",
    "coverage_factor",
    "pareto_front",
    "rank",
    "score",
    "standing",
]
