"""One weight per model, from the normal equations of the centre that the updates share."""

from typing import Literal

import numpy as np

from modelstock.merging.methods.blend import Blend, Float, cosines, pair_cosines

# Directions of the updates' span whose share of it is below this are rounding: they get no weight.
SINGULAR = 1e-12


def normal_equations(gram: Float, *, clip: Literal["unit", "none"] = "unit") -> Blend:
    """w0 + sum_i l_i v_i, G l = b: the point of the updates' span that is nearest to their centre mu.

    `gram`: the updates' inner products G, (N, N) or of many rows (rows, N, N). b_j = <v_j, mu> is not known; the mean
    of <v_j, v_i> over the others i estimates it without bias, if each v_i is mu plus noise of its own, of whatever
    size. Equal norms and angles give Model Stock. Seeds whose centres differ, as where one trained for longer, are
    no such noise: the centre is then that of the others' mean.

    `clip`: set weights below 0 to 0, then divide by a sum above 1, so that the result lies between the anchor and the
    fine-tuned weights; or apply the equations as they are. Updates that depend on each other leave some weights open:
    the least ones in units of the updates' norms, so that equal updates share theirs. A zero update leaves its angles
    undefined: the anchor is kept, as by Model Stock.
    """
    count = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    zero = (norms == 0).any(axis=-1)
    # In units of the norms: the weights of a long update and of a short one are then equally exact.
    norms = np.where(zero[..., None], 1.0, norms)
    inner = np.where(zero[..., None, None], np.eye(count), cosines(gram))
    right = np.einsum("...ij,...j->...i", inner * (1 - np.eye(count)), norms) / (count - 1)
    values, vectors = np.linalg.eigh(inner)
    kept = values > SINGULAR * count
    along = np.einsum("...ji,...j->...i", vectors, right) / np.where(kept, values, np.inf)
    raw = np.where(zero[..., None], 0.0, np.einsum("...ij,...j->...i", vectors, along) / norms)
    weights = raw
    if clip == "unit":
        weights = np.maximum(raw, 0.0)
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1.0)
    clipped = (np.abs(weights - raw) > 1e-12).any(axis=-1)
    flag = np.select(
        [zero, ~kept.all(axis=-1), clipped, (weights < 0).any(axis=-1)], ["zero", "singular", "clipped", "negative"], ""
    )
    facts = {
        "cosine": np.where(zero, np.nan, pair_cosines(gram).mean(axis=-1)),
        "ratio": weights.sum(axis=-1),
        "least weight": weights.min(axis=-1),
        "largest weight": weights.max(axis=-1),
        "flag": flag,
    }
    return Blend(weights, facts)
