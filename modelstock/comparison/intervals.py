"""95 % intervals: Wilson's for the share of one weight set, and its like for means over seeds and images.

Balanced accuracy is a mean over images too, with the weight 1 / (L n_l) for each of the n_l images of one of the L
labels that occur. Where images are drawn anew, so are the n_l; a label's share of the draw does not change its recall,
so what an image adds to the variance is its distance from the recall of its own label, not from the mean over labels.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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


class Values(ABC):
    """A figure of every row that is a mean over images, on some test sets, whose figures are averaged.

    `measured`: the figure by row. `clusters`: by set the class of each image, where images are drawn by class.
    """

    def __init__(self, rows: Sequence[Row], measured: Float, clusters: Clusters) -> None:
        self.rows, self.measured, self.clusters = rows, measured, clusters

    @abstractmethod
    def values(self, places: Sequence[int]) -> Iterator[Float]:
        """By set (rows, images), for the rows at these places: numbers whose mean is the figure."""

    def spread(self, places: Sequence[int]) -> float:
        """The standard deviation over rows."""
        return float(self.measured[list(places)].std(ddof=1))

    def paired(self, places: Sequence[int], others: Sequence[int]) -> Crossed:
        """The mean of row minus other row, of the same seeds."""
        values = (mine - theirs for mine, theirs in zip(self.values(places), self.values(others), strict=True))
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
            both = zip(self.values(places), self.values(seeds), strict=True)
            values = (mine.mean(axis=0) - theirs.mean(axis=0) for mine, theirs in both)
            return crossed([Sample(Subsets((everyone,)), tuple(value[None] for value in values))], self.clusters)
        own = [[seeds.index(by_seed[seed]) for seed in one] for one in members]
        values = (
            np.stack([row - theirs[one].mean(axis=0) for row, one in zip(mine, own, strict=True)])
            for mine, theirs in zip(self.values(places), self.values(seeds), strict=True)
        )
        moments = crossed([Sample(Subsets(tuple(members)), tuple(values))], self.clusters)
        return moments if moments.shortage else _of_one_seed(moments, self.measured[list(seeds)], len(members[0]))

    def _subsets(self, places: Sequence[int]) -> Subsets:
        return Subsets(tuple(self.rows[place].members for place in places))


class Accuracies(Values):
    """Every row's accuracy. `correct`: by set (rows, images)."""

    def __init__(self, rows: Sequence[Row], correct: Sequence[NDArray[np.bool_]], clusters: Clusters = None) -> None:
        super().__init__(rows, np.mean([right.mean(axis=1) for right in correct], axis=0), clusters)
        self.correct = correct

    def values(self, places: Sequence[int]) -> Iterator[Float]:
        """Right or wrong."""
        return (right[list(places)].astype(float) for right in self.correct)

    def mean(self, places: Sequence[int]) -> Estimate:
        """The mean over the rows at these places."""
        if len(places) == 1 and len(self.correct) == 1 and self.clusters is None:
            return wilson(self.correct[0][places[0]])
        sample = Sample(self._subsets(places), tuple(self.values(places)))
        return share(crossed([sample], self.clusters), sum(right.shape[1] for right in self.correct))


class BalancedAccuracies(Values):
    """Every row's balanced accuracy. `truths`: by set the label of each image."""

    def __init__(
        self,
        rows: Sequence[Row],
        correct: Sequence[NDArray[np.bool_]],
        truths: Sequence[NDArray[np.integer]],
        clusters: Clusters = None,
    ) -> None:
        weights = [label_weights(truth) for truth in truths]
        super().__init__(rows, np.mean([x @ w for x, w in zip(correct, weights, strict=True)], axis=0), clusters)
        self.sets = list(zip(correct, weights, [None if clusters else _strata(t) for t in truths], strict=True))

    def values(self, places: Sequence[int]) -> Iterator[Float]:
        """See `_linear`."""
        return (_linear(right[list(places)], weights, strata) for right, weights, strata in self.sets)


def label_weights(truth: NDArray[np.integer]) -> Float:
    """What an example counts in balanced accuracy: 1 / (labels that occur * examples of its label); the sum is 1."""
    counts = np.bincount(truth)
    weights: Float = 1 / (np.count_nonzero(counts) * counts[truth])
    return weights


def _strata(truth: NDArray[np.integer]) -> NDArray[np.integer]:
    """The label of each image; labels of one image are a stratum together, if there is one only with the next rarest.

    Their images have no variance of their own, and count as unsure rather than sure ("collapsed strata": Cochran,
    Sampling Techniques, 1977, section 5A.12).
    """
    counts = np.bincount(truth)
    by_count = np.argsort(np.where(counts, counts, len(truth) + 1), kind="stable")
    single = int((counts == 1).sum())
    rarest = by_count[: 2 if single == 1 else single]
    strata: NDArray[np.integer] = np.where(np.isin(truth, rarest), rarest[0], truth) if single else truth
    return strata


def _linear(correct: NDArray[np.bool_], weights: Float, strata: NDArray[np.integer] | None) -> Float:
    """Values (rows, images) whose mean is the balanced accuracy, and whose variance over images is n times its own.

    Each is the balanced accuracy plus n * weight * (right or wrong - centre). Where images are drawn, the centre is
    their label's recall, and sqrt(n_l / (n_l - 1)) takes off its bias; where labels are, it is the balanced accuracy.
    Source: the linearised variance of a post-stratified mean (Sarndal, Swensson and Wretman, Model Assisted Survey
    Sampling, 1992, section 7.6).
    """
    images = len(weights)
    balanced = (correct @ weights)[:, None]
    if strata is None:
        by_class: Float = balanced + images * weights * (correct - balanced)
        return by_class
    weighted = images * weights * correct
    counts = np.maximum(np.bincount(strata), 1)
    means = np.stack([np.bincount(strata, weights=row) for row in weighted]) / counts
    unbiased = np.sqrt(counts / np.maximum(counts - 1, 1) * (images - 1) / images)
    values: Float = balanced + (weighted - means[:, strata]) * unbiased[strata]
    return values


def _of_one_seed(moments: Crossed, seeds: Float, size: int) -> Crossed:
    """The spread of a row minus one of its seeds, from that of a row minus the mean of its `size` seeds."""
    more = float(seeds.var(ddof=1)) * (size - 1) / size  # of a seed around the mean of its subset
    freedom = satterthwaite([(moments.spread, moments.spread_freedom), (more, len(seeds) - 1)])
    return dataclasses.replace(moments, spread=moments.spread + more, spread_freedom=freedom)
