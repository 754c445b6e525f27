"""Methods that thin each update and then agree on one: sparsify x consensus."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstock.merging.methods.blend import Float


def _largest(update: Float, share: float) -> NDArray[np.bool_]:
    """Which values belong to the `share` of largest magnitude; ties go to the earlier value.

    A share above zero is one value at least: tensors of one or two values would never move.
    """
    count, size = max(round(share * update.size), 1 if share > 0 else 0), np.abs(update)
    if not 0 < count < update.size:
        return np.full(update.size, count > 0)
    least = np.partition(size, update.size - count)[update.size - count]
    kept: NDArray[np.bool_] = size > least
    kept[np.flatnonzero(size == least)[: count - int(kept.sum())]] = True
    return kept


def keep_largest(update: Float, generator: np.random.Generator, *, density: float) -> Float:
    """Zero all but the `density` of largest magnitude."""
    return np.where(_largest(update, density), update, 0)


def drop_at_random(update: Float, generator: np.random.Generator, *, drop: float) -> Float:
    """Zero each value with probability `drop` and divide the rest by 1 - drop, so that the mean stays."""
    return np.where(generator.random(update.size) >= drop, update / (1 - drop), 0)


def drop_both_ends(update: Float, generator: np.random.Generator, *, density: float, outliers: float) -> Float:
    """Zero the share `outliers` of largest magnitude and, of the rest, all but `density` (a share of the whole)."""
    return np.where(_largest(update, density + outliers) & ~_largest(update, outliers), update, 0)


def drop_by_rank(update: Float, generator: np.random.Generator, *, drop: float, window: float) -> Float:
    """Zero with a probability that falls from drop + window/2 to drop - window/2 as magnitude grows; rescale each."""
    rank = np.empty(update.size)
    rank[np.argsort(np.abs(update), kind="stable")] = (np.arange(update.size) + 0.5) / update.size
    chance = drop + window * (0.5 - rank)
    return np.where(generator.random(update.size) >= chance, update / (1 - chance), 0)


def mean_of(updates: Float) -> Float:
    """The mean over checkpoints."""
    return np.asarray(updates.mean(axis=0))


def _mean_of_signed(updates: Float, sign: Float) -> Float:
    """The mean of the values that have the sign, 0 where none has it or no sign was elected."""
    agree = (np.sign(updates) == sign) & (updates != 0)
    return np.asarray(np.where(agree, updates, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1))


def mean_of_elected(updates: Float) -> Float:
    """Elect each value's sign by mass; the mean of the values that have it."""
    elected = np.sign(updates.sum(axis=0))
    return _mean_of_signed(updates, elected)


def mean_of_majority(updates: Float) -> Float:
    """Elect each value's sign by one vote a checkpoint, whatever its magnitude; the mean of those that have it."""
    elected = np.sign(np.sign(updates).sum(axis=0))
    return _mean_of_signed(updates, elected)


@dataclass(frozen=True)
class Sparse:
    """A method made of two parts: thin each update by `sparsify`, then make one of them by `consensus`."""

    sparsify: Callable[..., Float]
    consensus: Callable[[Float], Float]

    def __call__(self, updates: Float, generators: Sequence[np.random.Generator], **options: float) -> Float:
        """Updates (N, ...) -> one update (...); `options` are those of `sparsify`."""
        thinned = [self.sparsify(u.reshape(-1), g, **options) for u, g in zip(updates, generators, strict=True)]
        return self.consensus(np.stack(thinned)).reshape(updates.shape[1:])


TIES = Sparse(keep_largest, mean_of_elected)
TIES_VOTES = Sparse(keep_largest, mean_of_majority)
MAGNITUDE = Sparse(keep_largest, mean_of)
DARE_LINEAR = Sparse(drop_at_random, mean_of)
DARE_TIES = Sparse(drop_at_random, mean_of_elected)
DARE_VOTES = Sparse(drop_at_random, mean_of_majority)
BREADCRUMBS = Sparse(drop_both_ends, mean_of)
BREADCRUMBS_TIES = Sparse(drop_both_ends, mean_of_elected)
DELLA = Sparse(drop_by_rank, mean_of_elected)
DELLA_LINEAR = Sparse(drop_by_rank, mean_of)
