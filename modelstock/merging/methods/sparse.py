"""Methods that thin each update and then agree on one: sparsify x consensus."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstock.merging.methods.blend import Float

BLOCK = 1 << 14  # values thinned at a time: few enough to stay in a core's cache

SAMPLE = 1 << 14  # values that bound the one at a place of a sorted tensor

# Thins consecutive blocks of an update (n,), in place; called with where each starts.
Thin = Callable[[int, Float], None]
# `(update, generator, *, options) -> Thin`: what has to be known of the whole update (size,) is found out here.
Sparsify = Callable[..., Thin]


class _Largest:
    """Which values belong to the `count` of largest magnitude; ties go to the earlier value."""

    def __init__(self, update: Float, count: int) -> None:
        self.every, self.ties = count >= update.size, 0
        self.least = np.inf
        if 0 < count < update.size:
            self.least, larger = _in_order(update, update.size - count)
            self.ties = count - larger  # those of `least` that are kept

    def __call__(self, sizes: Float) -> NDArray[np.bool_]:
        """Of the next magnitudes in the update's own order."""
        if self.every:
            return np.ones(sizes.size, np.bool_)
        kept: NDArray[np.bool_] = sizes > self.least
        if self.ties:
            tied = np.flatnonzero(sizes == self.least)[: self.ties]
            kept[tied] = True
            self.ties -= len(tied)
        return kept


def _in_order(update: Float, place: int) -> tuple[float, int]:
    """The magnitude at a place, counted from 0, of the sorted magnitudes, and how many are larger.

    np.partition's, in a fraction of its time: a sample bounds the magnitude, so that only those between the bounds are
    partitioned (Floyd, Rivest, CACM 18 (1975)), which are picked out block by block.
    """
    sample = np.sort(np.abs(update[:: max(1, update.size // SAMPLE)]))
    near, margin = place * sample.size // update.size, 4 * math.isqrt(sample.size)
    low, high = sample[max(0, near - margin)], sample[min(sample.size - 1, near + margin)]
    between, smaller = _between(update, low, high)
    if not 0 <= place - smaller < between.size:
        between, smaller = np.abs(update), 0
    between.partition(place - smaller)
    found = between[place - smaller]
    larger = update.size - smaller - int(np.count_nonzero(between <= found))
    return float(found), larger


def _between(update: Float, low: float, high: float) -> tuple[Float, int]:
    """The magnitudes from `low` to `high`, and how many are smaller."""
    parts, smaller = [], 0
    for start in range(0, update.size, BLOCK):
        sizes = np.abs(update[start : start + BLOCK])
        reaches = sizes >= low
        smaller += sizes.size - int(np.count_nonzero(reaches))
        parts.append(sizes[reaches & (sizes <= high)])
    return np.concatenate(parts), smaller


def _count(share: float, size: int) -> int:
    """Values in a share; above zero one at least, as tensors of one or two values would never move otherwise."""
    return max(round(share * size), 1 if share > 0 else 0)


def keep_largest(update: Float, generator: np.random.Generator, *, density: float) -> Thin:
    """Zero all but the `density` of largest magnitude."""
    is_large = _Largest(update, _count(density, update.size))

    def thin(start: int, block: Float) -> None:
        np.copyto(block, 0, where=~is_large(np.abs(block)))

    return thin


def drop_at_random(update: Float, generator: np.random.Generator, *, drop: float) -> Thin:
    """Zero each value with probability `drop` and divide the rest by 1 - drop, so that the mean stays."""

    def thin(start: int, block: Float) -> None:
        block /= 1 - drop
        np.copyto(block, 0, where=generator.random(block.size) < drop)

    return thin


def drop_both_ends(update: Float, generator: np.random.Generator, *, density: float, outliers: float) -> Thin:
    """Zero the share `outliers` of largest magnitude and, of the rest, all but `density` (a share of the whole)."""
    is_large, is_outlier = (_Largest(update, _count(share, update.size)) for share in (density + outliers, outliers))

    def thin(start: int, block: Float) -> None:
        sizes = np.abs(block)
        np.copyto(block, 0, where=~is_large(sizes) | is_outlier(sizes))

    return thin


def drop_by_rank(update: Float, generator: np.random.Generator, *, drop: float, window: float) -> Thin:
    """Zero with a probability that falls from drop + window/2 to drop - window/2 as magnitude grows; rescale each."""
    place = np.empty(update.size, np.int64)  # from 0, the smallest; of equal magnitudes the earlier value
    place[np.argsort(np.abs(update), kind="stable")] = np.arange(update.size)

    def thin(start: int, block: Float) -> None:
        rank = (place[start : start + block.size] + 0.5) / update.size
        chance = drop + window * (0.5 - rank)
        block /= 1 - chance
        np.copyto(block, 0, where=generator.random(block.size) < chance)

    return thin


def mean_of(updates: Float) -> Float:
    """The mean over checkpoints."""
    return np.asarray(updates.mean(axis=0))


def _mean_of_signed(updates: Float, sign: Float) -> Float:
    """The mean of the values that have the sign, 0 where none has it or no sign was elected."""
    agree = updates * sign > 0
    count = agree.sum(axis=0, dtype=np.min_scalar_type(len(updates)))  # of few bits, which are summed fastest
    return np.asarray(np.where(agree, updates, 0).sum(axis=0) / np.maximum(count, 1, dtype=np.float64))


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

    sparsify: Sparsify
    consensus: Callable[[Float], Float]

    def __call__(self, updates: Float, generators: Sequence[np.random.Generator], **options: float) -> Float:
        """Updates (N, ...) -> one update (...); `options` are those of `sparsify`."""
        flat = updates.reshape(len(updates), -1)
        thins = [self.sparsify(update, g, **options) for update, g in zip(flat, generators, strict=True)]
        result = np.empty(flat.shape[1])
        for start in range(0, len(result), BLOCK):
            blocks = flat[:, start : start + BLOCK].copy()
            for thin, block in zip(thins, blocks, strict=True):
                thin(start, block)
            result[start : start + BLOCK] = self.consensus(blocks)
        return result.reshape(updates.shape[1:])


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
