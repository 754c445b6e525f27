"""The thin shell: lengths of updates and of their means, angles between them, and the ratio that the angles give.

Functions take a stack of inner products and give a number per tensor, (T,), over the seeds under test.
"""

import numpy as np

from modelstock.geometry.stack import Stack
from modelstock.merging.kernels import Float
from modelstock.merging.methods.blend import pair_cosines
from modelstock.merging.methods.model_stock import stock_ratio


def norms(stack: Stack) -> Float:
    """|v_i| (T, N)."""
    return np.sqrt(np.diagonal(stack.seeds, axis1=1, axis2=2))


def variation(stack: Stack) -> Float:
    """Coefficient of variation of the norms: their standard deviation over their mean."""
    lengths = norms(stack)
    return np.asarray(lengths.std(axis=1, ddof=1) / lengths.mean(axis=1))


def angles(stack: Stack) -> Float:
    """Degrees between any two updates (T, pairs)."""
    return np.asarray(np.degrees(np.arccos(pair_cosines(stack.seeds))))


def angle_spread(stack: Stack) -> Float:
    """Standard deviation of the angles over pairs, degrees."""
    return np.asarray(angles(stack).std(axis=1, ddof=1))


def cosine(stack: Stack) -> Float:
    """Mean cosine over pairs."""
    return np.asarray(pair_cosines(stack.seeds).mean(axis=1))


def ratio(stack: Stack, count: int | None = None, *, by: str = "cosine") -> Float:
    """Model Stock's t for `count` seeds, else for all of them, unclipped; `by` the mean cosine or the mean angle."""
    mean = cosine(stack) if by == "cosine" else np.cos(np.radians(angles(stack).mean(axis=1)))
    return stock_ratio(mean, stack.count if count is None else count)


def applied(stack: Stack, count: int | None = None, *, by: str = "cosine") -> Float:
    """`ratio` as merging applies it, in [0, 1]."""
    return np.clip(ratio(stack, count, by=by), 0.0, 1.0)


def lengths(stack: Stack, size: int) -> Float:
    """Lengths of the means of subsets of a size (T, S)."""
    shares = stack.subsets(size) / size
    return np.asarray(np.sqrt(np.maximum(0, (shares @ stack.seeds * shares).sum(axis=2))))


def expected_length(stack: Stack, size: int) -> Float:
    """sqrt((1 + (n - 1) cos) / n) * l (T,), l the mean norm, cos the mean cosine."""
    square = (1 + (size - 1) * cosine(stack)) / size
    return np.asarray(np.sqrt(np.maximum(0, square)) * norms(stack).mean(axis=1))


def length_error(stack: Stack, size: int) -> Float:
    """Mean over subsets of a size of |length / expected length - 1|."""
    expected = expected_length(stack, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.abs(lengths(stack, size) / expected[:, None] - 1).mean(axis=1))
