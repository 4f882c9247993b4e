"""The old name of `study.pepr`, kept so that what imports it works as before."""

from pepr_profiler.study.pepr import (
    MinMax as Bounds,
)
from pepr_profiler.study.pepr import (
    Scores,
    Standing,
    as_performance,
    pareto_front,
    rank,
    score,
)

__all__ = ["Bounds", "Scores", "Standing", "as_performance", "pareto_front", "rank", "score"]
