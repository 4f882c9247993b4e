"""The PePR score under the name that it has always had; the code is in study/pepr.py."""

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
