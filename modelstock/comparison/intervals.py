"""95 % intervals: Wilson's for a share, the paired bootstrap for means and differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.proportion import proportion_confint

from modelstock.scoring.results import Scores

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A share (or a difference of shares) and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(correct: NDArray[np.bool_]) -> Estimate:
    """A share of n examples with its 95 % Wilson interval."""
    low, high = proportion_confint(int(correct.sum()), correct.size, method="wilson")
    return Estimate(float(correct.mean()), float(low), float(high))


def percentile(value: float, samples: Float) -> Estimate:
    """A value with the 2.5 and 97.5 percentiles of its bootstrap samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def resampled(correct: NDArray[np.bool_], draws: int, generator: np.random.Generator) -> Float:
    """Accuracies (draws, rows) of bootstrap samples of the examples, the same samples for every row.

    `correct`: (rows, n). A sample is a vector of multinomial counts, so its accuracies are one product.
    """
    rows, count = correct.shape
    table, accuracies = correct.T.astype(np.float64), np.empty((draws, rows))
    for start in range(0, draws, 200):
        size = min(200, draws - start)
        counts = generator.multinomial(count, np.full(count, 1 / count), size=size)
        accuracies[start : start + size] = counts @ table / count
    return accuracies


class Accuracies:
    """Every row's accuracy on each benchmark and by each summary, as measured and on resampled examples.

    `summaries`: summary -> the benchmarks that it is the mean over. Rows are given by their places.
    """

    def __init__(
        self, results: Sequence[Scores], summaries: Mapping[str, Sequence[Scores]], *, draws: int, seed: int
    ) -> None:
        generator = np.random.default_rng(seed)
        self.measured = {scores.benchmark: scores.correct.mean(axis=1) for scores in results}
        self.drawn = {
            scores.benchmark: resampled(scores.correct, draws, generator)
            for members in summaries.values()
            for scores in members
        }
        for name, members in summaries.items():
            self.measured[name] = np.mean([self.measured[scores.benchmark] for scores in members], axis=0)
            self.drawn[name] = np.mean([self.drawn[scores.benchmark] for scores in members], axis=0)

    def mean(self, rows: Sequence[int], name: str) -> Estimate:
        """The mean over rows, by a benchmark or a summary."""
        return percentile(self._exact(rows, name), self._samples(rows, name))

    def difference(self, rows: Sequence[int], others: Sequence[int], name: str) -> Estimate:
        """The mean over `rows` minus that over `others`, on the same resampled examples."""
        exact = self._exact(rows, name) - self._exact(others, name)
        return percentile(exact, self._samples(rows, name) - self._samples(others, name))

    def spread(self, rows: Sequence[int], name: str) -> float:
        """The standard deviation over rows."""
        return float(self.measured[name][list(rows)].std(ddof=1))

    def _exact(self, rows: Sequence[int], name: str) -> float:
        return float(self.measured[name][list(rows)].mean())

    def _samples(self, rows: Sequence[int], name: str) -> Float:
        samples: Float = self.drawn[name][:, list(rows)].mean(axis=1)
        return samples
