"""Methods that weigh the updates by statistics of the data, one tensor at a time."""

from collections.abc import Sequence

import numpy as np

from modelstock.merging.methods.blend import Float


def fisher(updates: Float, importance: Sequence[Float] | None) -> Float:
    """w0 + scale * sum(F_i v_i) / sum(F_i), F_i >= 0 the importance of each value to checkpoint i.

    `importance`: N arrays of the tensor's shape, the diagonal of each checkpoint's Fisher information. Where all of
    them are 0, or where there are none, the plain mean.
    Source: Matena, Raffel, arXiv 2111.09832.
    """
    mean = np.asarray(updates.mean(axis=0))
    if importance is None:
        return mean
    weight = np.stack(importance)
    total = weight.sum(axis=0)
    return np.where(total > 0, (weight * updates).sum(axis=0) / np.where(total > 0, total, 1), mean)


def regmean(updates: Float, inner: Sequence[Float] | None, *, alpha: float = 0.9) -> Float:
    """w0 + scale * sum(v_i G_i) sum(G_i)^-1 for linear layers (out, in); the plain mean for everything else.

    `inner`: N matrices G_i = X_i^T X_i (in, in) of the layer's inputs, off-diagonals times `alpha`: the layer whose
    outputs come nearest to those of each checkpoint on its own inputs. Inputs that are always 0 get the plain mean.
    Source: Jin et al., arXiv 2212.09849, eq. 3.
    """
    mean = np.asarray(updates.mean(axis=0))
    if inner is None:
        return mean
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in inner]
    total = np.asarray(sum(shrunk))
    alive = np.flatnonzero(np.diag(total) > 0)
    # Solved for the distance to the mean, so that what the inputs leave open stays at the mean.
    right = np.asarray(sum((v - mean) @ g for v, g in zip(updates, shrunk, strict=True)))[:, alive]
    system = total[np.ix_(alive, alive)]
    # Positive definite for alpha < 1, whatever the inputs were.
    solve = np.linalg.solve if alpha < 1 else lambda a, b: np.linalg.lstsq(a, b, rcond=None)[0]
    mean[:, alive] += solve(system, right.T).T
    return mean
