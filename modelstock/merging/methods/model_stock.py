"""Model Stock: the mean update, shortened by a ratio that the angle between the updates gives."""

from typing import Literal

import numpy as np

from modelstock.errors import MergeError
from modelstock.merging.methods.blend import Blend, Float, pair_cosines
from modelstock.merging.methods.rows import Option

OPTIONS = (
    Option(name="pairwise", default="cosine", about="what is averaged over pairs", choices=("cosine", "angle")),
    Option(name="clip", default="unit", about="keep t in [0, 1], or not", choices=("unit", "none")),
)


def stock_ratio(cosine: Float | float, count: int) -> Float:
    """t = N cos / (1 + (N - 1) cos), the pull of the mean toward the anchor; infinite where its pole is met.

    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3.
    """
    denominator = 1 + (count - 1) * np.asarray(cosine)
    with np.errstate(divide="ignore"):
        ratio: Float = np.where(denominator != 0, count * cosine / denominator, -np.inf)[()]
    return ratio


def model_stock(
    gram: Float,
    *,
    pairwise: Literal["cosine", "angle"] = "cosine",
    clip: Literal["unit", "none"] = "unit",
) -> Blend:
    """w0 + t * mean(v_i), t = N cos / (1 + (N - 1) cos) from the mean cosine between two updates.

    `gram`: the updates' inner products, (N, N) or of many rows (rows, N, N). `pairwise`: average the pairs' cosines (as
    the authors do) or their angles. `clip`: hold t in [0, 1], or apply the literal formula, which explodes as
    cos -> -1/(N-1). A zero update leaves the cosine undefined: the anchor is kept.

    Raises:
        MergeError: an infinite ratio with `clip="none"`.
    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3.
    """
    count = gram.shape[-1]
    zero = (np.diagonal(gram, axis1=-2, axis2=-1) == 0).any(axis=-1)
    pairs = pair_cosines(gram)
    cosine = np.cos(np.arccos(pairs).mean(axis=-1)) if pairwise == "angle" else pairs.mean(axis=-1)
    cosine = np.where(zero, np.nan, cosine)
    raw = np.where(zero, 0.0, stock_ratio(cosine, count))
    ratio = np.clip(raw, 0.0, 1.0) if clip == "unit" else raw
    if not np.isfinite(ratio).all():
        pole = cosine[~np.isfinite(ratio)].item(0)
        raise MergeError(
            "model_stock", got=f"a mean cosine of {pole}", expected="one above -1/(N-1)", cure="use clip unit"
        )
    flag = np.select([zero, ratio != raw, ratio < 0], ["zero", "clipped", "negative"], "")
    coefficients = np.broadcast_to(ratio[..., None] / count, (*ratio.shape, count))
    return Blend(coefficients, {"cosine": cosine, "ratio": ratio, "flag": flag})
