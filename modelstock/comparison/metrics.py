"""The metrics, one row each: adding one is a function and a row here, and nothing elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from modelstock.comparison.intervals import label_weights
from modelstock.scoring.results import Scores

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of the table: a number per weight set and benchmark.

    `measure`: (results of a benchmark, place of the row) -> the number, a share where `unit` is percent. `labels`: it
    is shown where a benchmark has more labels than this.
    """

    name: str
    title: str
    measure: Callable[[Scores, int], float]
    unit: Literal["percent", "nats"]
    better: Literal["higher", "lower"]
    about: str
    labels: int = 0

    def text(self, value: float) -> str:
        """A value as tables show it."""
        return f"{100 * value:.1f}" if self.unit == "percent" else f"{value:.3f}"


def top1(scores: Scores, row: int) -> float:
    """The share of the examples whose label is the most probable one."""
    return float(scores.correct[row].mean())


def balanced_accuracy(scores: Scores, row: int) -> float:
    """The mean over the labels that occur of the accuracy on each label's own examples, which is the label's recall.

    Source: Brodersen et al., ICPR 2010; for more than two labels scikit-learn's balanced_accuracy_score.
    """
    return float(label_weights(scores.truth) @ scores.correct[row])


def top5(scores: Scores, row: int) -> float:
    """The share of the examples whose label is among the five most probable ones."""
    return float(scores.correct5[row].mean())


def nll(scores: Scores, row: int) -> float:
    """The mean negative log-likelihood of the truth, in nats."""
    return float(scores.nll[row].mean(dtype=np.float64))


def ece(scores: Scores, row: int) -> float:
    """sum over bins of n_bin / n * |accuracy in the bin - mean confidence in the bin|.

    15 equal bins of the confidence in the predicted label; one of exactly 1 belongs to the last.
    Source: Guo et al., ICML 2017, equation 3.
    """
    confidence = np.minimum(scores.confidence[row].astype(np.float64), 1)
    bins = np.clip(np.searchsorted(np.linspace(0, 1, BINS + 1), confidence, side="right") - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=scores.correct[row] - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="top1", title="top-1", measure=top1, unit="percent", better="higher", about="accuracy"),
        Metric(
            name="balanced_accuracy",
            title="balanced accuracy",
            measure=balanced_accuracy,
            unit="percent",
            better="higher",
            about="accuracy with the same weight for each label: the mean of the labels' recalls",
        ),
        Metric(
            name="top5",
            title="top-5",
            measure=top5,
            unit="percent",
            better="higher",
            about="accuracy within the five most probable labels",
            labels=5,
        ),
        Metric(
            name="nll",
            title="NLL",
            measure=nll,
            unit="nats",
            better="lower",
            about="mean negative log-likelihood of the truth",
        ),
        Metric(
            name="ece",
            title="ECE",
            measure=ece,
            unit="percent",
            better="lower",
            about=f"expected calibration error of the predicted label over {BINS} equal bins of its confidence",
        ),
    )
}


def metrics(scores: Scores, row: int) -> dict[str, float]:
    """Every metric of one row."""
    return {name: metric.measure(scores, row) for name, metric in METRICS.items()}
