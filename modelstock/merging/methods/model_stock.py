"""Model Stock: the mean update, shortened by a ratio that the angle between the updates gives."""

from typing import Literal

import numpy as np

from modelstock.errors import MergeError
from modelstock.merging.methods.blend import Blend, Float, cosines


def stock_ratio(cosine: float, count: int) -> float:
    """t = N cos / (1 + (N - 1) cos), the pull of the mean toward the anchor; infinite where its pole is met.

    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3.
    """
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if denominator != 0 else -np.inf


def model_stock(
    gram: Float,
    *,
    pairwise: Literal["cosine", "angle"] = "cosine",
    clip: Literal["unit", "none"] = "unit",
) -> Blend:
    """w0 + t * mean(v_i), t = N cos / (1 + (N - 1) cos) from the mean cosine between two updates.

    `pairwise`: average the pairs' cosines (as the authors do) or their angles. `clip`: hold t in [0, 1], or apply the
    literal formula, which explodes as cos -> -1/(N-1). A zero update leaves the cosine undefined: the anchor is kept.

    Raises:
        MergeError: an infinite ratio with `clip="none"`.
    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3.
    """
    count = len(gram)
    if (np.diag(gram) == 0).any():
        return Blend(np.zeros(count), {"cosine": None, "ratio": 0.0, "flag": "zero"})
    pairs = cosines(gram)[np.triu_indices(count, 1)]
    cosine = float(np.cos(np.arccos(pairs).mean()) if pairwise == "angle" else pairs.mean())
    raw = stock_ratio(cosine, count)
    ratio = min(1.0, max(0.0, raw)) if clip == "unit" else raw
    if not np.isfinite(ratio):
        raise MergeError(
            "model_stock", got=f"a mean cosine of {cosine}", expected="one above -1/(N-1)", cure="use clip unit"
        )
    flag = "clipped" if ratio != raw else "negative" if ratio < 0 else ""
    return Blend(np.full(count, ratio / count), {"cosine": cosine, "ratio": ratio, "flag": flag})
