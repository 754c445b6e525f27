"""The variance of a mean over weight sets when both would be drawn anew: the seeds they are made of, and the images.

Row r (a weight set, or its difference from another one) has the value x[r, i] on image i, and the mean x[r] over the
images; a statistic is the mean over the rows. With n images,

    images       = variance over i of the rows' mean x[., i], divided by n
    seeds        = share * tau^2,   tau^2 = sum over r of (x[r] - mean)^2 / trace
    interaction  = the part of `seeds` that these images alone explain, and that `images` has too
    variance     = images + max(0, seeds - interaction)

tau^2 is the variance of one row over seeds. Rows that have members in common move together: two rows' correlation is
taken to be the share of the members that they have in common, which is exact where a merge's accuracy is the sum of
what its seeds bring, and an upper bound where a subset brings something of its own. `share` is the mean of those
correlations over all pairs of rows, and `trace` what is left of them after the mean is taken off: for single seeds
they are 1 / rows and rows - 1. The degrees of freedom are Satterthwaite's, of `seeds` and of what `images` has more
than the interaction, no fewer than those of `seeds` and no more than those of the images.

Images are drawn one by one, or by cluster, where all images of a class are drawn together.

Sources: the variance of a two-way layout with random rows and columns (Cornfield and Tukey, Annals of Mathematical
Statistics 27, 1956), as used for readers and cases (Dorfman, Berbaum and Metz, Investigative Radiology 27, 1992;
Hillis, Statistics in Medicine 26, 2007); Satterthwaite, Biometrics Bulletin 2 (1946); clusters: Liang and Zeger,
Biometrika 73 (1986). docs/scoring.md has the coverage of this and of the bootstraps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
ENOUGH = 3  # subsets of seeds with nothing in common; of two, a standard error is off by a factor of 12 in its quantile


@dataclass(frozen=True)
class Subsets:
    """The seeds of each row, equally many. A row of no seeds has none that could be drawn anew."""

    members: tuple[tuple[int, ...], ...]

    @cached_property
    def _common(self) -> Float:
        sets = [frozenset(members) for members in self.members]
        return np.array([[len(a & b) / max(1, len(a)) for b in sets] for a in sets])

    @property
    def share(self) -> float:
        """The variance of the rows' mean, in variances of one row."""
        return float(self._common.mean())

    @cached_property
    def _centred(self) -> Float:
        means = self._common.mean(axis=0)
        centred: Float = self._common - means - means[:, None] + means.mean()
        return centred

    @property
    def trace(self) -> float:
        """The expected sum of the rows' squared distances from their mean, in variances of one row."""
        return float(np.trace(self._centred))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of that sum."""
        return self.trace**2 / float((self._centred**2).sum())

    @property
    def shortage(self) -> str:
        """ "not enough seeds (2 of 3)", or nothing where there are enough.

        What counts is the seeds of as many separate subsets as have the same variance of their mean.
        """
        size = len(self.members[0])
        have = int(size / self.share + 1e-9) if size else 0
        need = ENOUGH * max(1, size)
        return "" if have >= need else f"not enough seeds ({have} of {need})"


@dataclass(frozen=True)
class Sample:
    """Rows that are averaged. `values`: by test set (rows, images); the sets' means are averaged with equal weight."""

    subsets: Subsets
    values: tuple[NDArray[np.number], ...]


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """A mean with its variance. `over`: what would be drawn anew, "images" or "seeds and images" (or classes).

    `shortage`: why seeds are not in it, if they are not. `spread`: the variance of a row over seeds, on these images;
    `seeds`: that of the mean. Both are 0 where there is a shortage. `draws`: how many separate subsets of seeds.
    """

    value: float
    variance: float
    freedom: float
    over: str
    shortage: str
    spread: float
    spread_freedom: float
    seeds: float
    draws: float


def crossed(samples: Sequence[Sample], clusters: Sequence[NDArray[np.integer]] | None = None) -> Crossed:
    """The sum of the samples' means, of samples whose seeds have nothing to do with each other.

    A difference between two such samples has the second one's values with the other sign. `clusters`: per test set,
    the class of each image, where images are drawn by class: a class is drawn for all test sets together.
    """
    shortage = next((sample.subsets.shortage for sample in samples if sample.subsets.shortage), "")
    images, images_freedom, interaction = _over_images(samples, clusters, seeds=not shortage)
    spreads, seeds = [], []
    means = [np.mean([values.mean(axis=1) for values in sample.values], axis=0) for sample in samples]
    if not shortage:
        for sample, rows in zip(samples, means, strict=True):
            one = float(((rows - rows.mean()) ** 2).sum()) / sample.subsets.trace
            spreads.append((one, sample.subsets.freedom))
            seeds.append((one * sample.subsets.share, sample.subsets.freedom))
    of_seeds = sum(part for part, _ in seeds)
    variance, freedom = images + max(0.0, of_seeds - interaction), images_freedom
    if of_seeds:
        beyond = (max(0.0, images - interaction), images_freedom)
        few = min(images_freedom, satterthwaite(seeds))
        freedom = max(few, min(images_freedom, satterthwaite([*seeds, beyond], variance)))
    drawn = "images" if clusters is None else "classes"
    return Crossed(
        value=float(sum(rows.mean() for rows in means)),
        variance=variance,
        freedom=freedom,
        over=drawn if shortage else f"seeds and {drawn}",
        shortage=shortage,
        spread=sum(part for part, _ in spreads),
        spread_freedom=satterthwaite(spreads),
        seeds=of_seeds,
        draws=min(1 / sample.subsets.share for sample in samples) if not shortage else 0.0,
    )


def satterthwaite(parts: Sequence[tuple[float, float]], variance: float | None = None) -> float:
    """The degrees of freedom of a variance, or of the sum of its parts, from the parts with theirs."""
    squares = sum(part**2 / freedom for part, freedom in parts)
    variance = sum(part for part, _ in parts) if variance is None else variance
    return variance**2 / squares if squares else math.inf


def _over_images(
    samples: Sequence[Sample], clusters: Sequence[NDArray[np.integer]] | None, *, seeds: bool
) -> tuple[float, float, float]:
    """The variance over images, its degrees of freedom, and the part of it that is the seeds' too."""
    parts, interaction = [], 0.0
    for drawn in zip(*(_added(sample, clusters) for sample in samples), strict=True):
        count = drawn[0].shape[1]
        scale = count / (count - 1)
        together = np.sum([rows.mean(axis=0) for rows in drawn], axis=0)
        parts.append((scale * float((together**2).sum()), count - 1.0))
        if seeds:
            for sample, rows in zip(samples, drawn, strict=True):
                squares = float(((rows - rows.mean(axis=0)) ** 2).sum())
                interaction += scale * squares * sample.subsets.share / sample.subsets.trace
    return sum(variance for variance, _ in parts), satterthwaite(parts), interaction


def _added(sample: Sample, clusters: Sequence[NDArray[np.integer]] | None) -> list[Float]:
    """What each image adds to the rows' means, less its share of them: (rows, images) by test set.

    With clusters (rows, classes), of all test sets together.
    """
    sets = len(sample.values)
    centred = [(rows - rows.mean(axis=1, keepdims=True)) / rows.shape[1] / sets for rows in sample.values]
    if clusters is None:
        return centred
    names, places = np.unique(np.concatenate(clusters), return_inverse=True)
    every = np.concatenate(centred, axis=1)
    return [np.stack([np.bincount(places, weights=row, minlength=len(names)) for row in every])]
