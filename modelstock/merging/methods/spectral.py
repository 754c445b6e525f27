"""Methods that look at the singular values of one checkpoint's update."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from modelstock.merging.methods.blend import Float


def monosoup(
    updates: Float,
    generators: Sequence[np.random.Generator],
    *,
    rank: Literal["effective", "energy"] = "effective",
    energy: float = 0.8,
) -> Float:
    """w0 + (1 - low) * v_high + low * v_low, v_high the leading singular directions of the update v, v_low the rest.

    Of singular values s_1 >= s_2 >= ..., the first k in v_high: low = r + (1 - r) * c, r = (s_(k+1) / s_1)^2 and c the
    norm of v_low over that of v. `rank`: k is the effective rank exp(-sum p_i log p_i), p_i = s_i / sum s, rounded up;
    or the least that holds the share `energy` of the squared norm. One checkpoint, tensors (out, ...) as matrices (out,
    rest); vectors and scalars are kept as they are, and so is an update that is v_high alone.

    The singular value decomposition is LAPACK's: its last bits depend on the threads of that library.
    Source: Abdollahpoorrostam et al., MonoSoup, arXiv 2602.09689, by its authors' code (MonoSoup.py, there
        "freevariance" and "variance"); the paper's own text is unverified. They keep matrices as they are, too, whose
        update is below 1e-6 of the anchor's norm.
    """
    update: Float = updates[0]
    if update.ndim < 2 or not update.any():
        return update
    matrix = update.reshape(len(update), -1)
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    shares = sizes / sizes[0]  # whose squares do not underflow
    count = _effective_rank(shares) if rank == "effective" else _rank_of_energy(shares, energy)
    if count == len(shares):
        return update
    # From the rest itself: one minus the share of v_high is rounding where the rest is small.
    cosine = np.linalg.norm(shares[count:]) / np.linalg.norm(shares)
    low = shares[count] ** 2 + (1 - shares[count] ** 2) * cosine
    high = (left[:, :count] * sizes[:count]) @ right[:count]
    return np.asarray(low * matrix + (1 - 2 * low) * high).reshape(update.shape)


def _effective_rank(shares: Float) -> int:
    """The exponential of the entropy of singular values (k,), the first 1, rounded up."""
    chances = shares[shares > 0] / shares.sum()
    return min(len(shares), int(np.ceil(np.exp(-np.sum(chances * np.log(chances))))))


def _rank_of_energy(shares: Float, energy: float) -> int:
    """How many of the singular values (k,), largest first, hold a share of the sum of squares; one at least."""
    squares = np.cumsum(shares**2)
    return int(np.searchsorted(squares, energy * squares[-1])) + 1
