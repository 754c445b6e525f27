"""95 % intervals: Wilson's for the share of one weight set, and its like for means over seeds and images."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from modelstock.comparison.crossed import Crossed, Sample, Subsets, crossed, satterthwaite
from modelstock.scoring.results import Row

Float = NDArray[np.float64]
Clusters = Sequence[NDArray[np.integer]] | None


@dataclass(frozen=True)
class Estimate:
    """A share (or a difference of shares) and the ends of its 95 % interval.

    `over`: what would be drawn anew: "images", "seeds and images", or the same with classes.
    """

    value: float
    low: float
    high: float
    over: str = "images"


def wilson(correct: NDArray[np.bool_]) -> Estimate:
    """A share of n examples with its 95 % Wilson interval."""
    low, high = proportion_confint(int(correct.sum()), correct.size, method="wilson")
    return Estimate(float(correct.mean()), float(low), float(high))


def share(moments: Crossed, images: int) -> Estimate:
    """A mean p of shares with Wilson's interval for p (1 - p) / variance independent images, which have its variance.

    The quantile is Student's, by the degrees of freedom of the variance. `images`: for a share of exactly 0 or 1.

    Source: Dean and Pagano, Journal of Survey Statistics and Methodology 3 (2015), on clustered surveys.
    """
    p = moments.value
    across = p * (1 - p)
    inverse = moments.variance / across if across > 1e-12 else 1 / images  # of the number of images
    quantile = float(stats.t.ppf(0.975, moments.freedom))
    added = quantile**2 * inverse
    centre = (p + added / 2) / (1 + added)
    half = quantile / (1 + added) * np.sqrt(max(0.0, across) * inverse + added * inverse / 4)
    return Estimate(p, min(p, float(centre - half)), max(p, float(centre + half)), moments.over)


class Accuracies:
    """Every row's results on some test sets, whose means are averaged. `correct`: by set (rows, images).

    `clusters`: by set the class of each image, where images are drawn by class.
    """

    def __init__(self, rows: Sequence[Row], correct: Sequence[NDArray[np.bool_]], clusters: Clusters = None) -> None:
        self.rows, self.correct, self.clusters = rows, correct, clusters
        self.measured: Float = np.mean([right.mean(axis=1) for right in correct], axis=0)  # by row

    def mean(self, places: Sequence[int]) -> Estimate:
        """The mean over the rows at these places."""
        if len(places) == 1 and len(self.correct) == 1 and self.clusters is None:
            return wilson(self.correct[0][places[0]])
        sample = Sample(self._subsets(places), tuple(right[list(places)].astype(float) for right in self.correct))
        return share(crossed([sample], self.clusters), sum(right.shape[1] for right in self.correct))

    def spread(self, places: Sequence[int]) -> float:
        """The standard deviation over rows."""
        return float(self.measured[list(places)].std(ddof=1))

    def paired(self, places: Sequence[int], others: Sequence[int]) -> Crossed:
        """The mean of row minus other row, of the same seeds."""
        values = (right[list(places)].astype(float) - right[list(others)] for right in self.correct)
        return crossed([Sample(self._subsets(places), tuple(values))], self.clusters)

    def over_members(self, places: Sequence[int], seeds: Sequence[int]) -> Crossed:
        """The mean of rows minus the mean over `seeds`, the rows of all seeds.

        Where each seed is in equally many rows, that is the mean of every row minus its own seeds, paired over seeds
        and images, and `spread` is the variance of a row minus any one of its seeds. Elsewhere it is over images alone.
        """
        by_seed = {self.rows[seed].members[0]: seed for seed in seeds}
        members = [self.rows[place].members for place in places]
        times = [sum(seed in one for one in members) for seed in by_seed]
        balanced = len(set(times)) == 1 and all(seed in by_seed for one in members for seed in one)
        if not balanced:
            everyone = tuple(sorted(by_seed))
            values = (right[list(places)].mean(axis=0) - right[list(seeds)].mean(axis=0) for right in self.correct)
            return crossed([Sample(Subsets((everyone,)), tuple(value[None] for value in values))], self.clusters)
        own = [[by_seed[seed] for seed in one] for one in members]
        values = (
            np.stack([right[place] - right[mine].mean(axis=0) for place, mine in zip(places, own, strict=True)])
            for right in self.correct
        )
        moments = crossed([Sample(Subsets(tuple(members)), tuple(values))], self.clusters)
        return moments if moments.shortage else _of_one_seed(moments, self.measured[list(seeds)], len(members[0]))

    def _subsets(self, places: Sequence[int]) -> Subsets:
        return Subsets(tuple(self.rows[place].members for place in places))


def _of_one_seed(moments: Crossed, seeds: Float, size: int) -> Crossed:
    """The spread of a row minus one of its seeds, from that of a row minus the mean of its `size` seeds."""
    more = float(seeds.var(ddof=1)) * (size - 1) / size  # of a seed around the mean of its subset
    freedom = satterthwaite([(moments.spread, moments.spread_freedom), (more, len(seeds) - 1)])
    return dataclasses.replace(moments, spread=moments.spread + more, spread_freedom=freedom)
