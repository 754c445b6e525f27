"""What methods in the span of the updates give, and the angles between updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Blend:
    """Coefficients (N,) of the updates, and JSON facts about how they came about."""

    coefficients: Float
    facts: Mapping[str, Any] = field(default_factory=dict)


def cosines(gram: Float) -> Float:
    """Cosines (N, N) between updates from their inner products; NaN where an update is zero."""
    norms = np.sqrt(np.diag(gram))
    # One norm after the other: the product of two tiny ones could underflow.
    with np.errstate(invalid="ignore"):
        return np.clip(gram / norms[:, None] / norms[None, :], -1, 1)
