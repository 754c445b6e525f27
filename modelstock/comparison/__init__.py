"""From results per example to a comparison with error bars, its report and its figures.

Modules: `metrics`, one row each; `intervals`, Wilson's and the paired bootstrap; `paired_tests`, McNemar with Holm;
`compare`, everything together; `report` and `figures`, what it looks like; `published`, others' figures.
"""

from modelstock.comparison.compare import Comparison, Line, compare
from modelstock.comparison.metrics import METRICS, Metric

__all__ = ["METRICS", "Comparison", "Line", "Metric", "compare"]
