"""What methods in the span of the updates give, and the angles between updates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Blend:
    """Coefficients (N,) of the updates, and JSON facts about how they came about.

    Of many rows at once: coefficients (rows, N), and facts that are arrays (rows,), NaN where there is no number.
    """

    coefficients: Float
    facts: Mapping[str, Any] = field(default_factory=dict)


def cosines(gram: Float) -> Float:
    """Cosines (..., N, N) between updates from their inner products; NaN where an update is zero."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    # One norm after the other: the product of two tiny ones could underflow.
    with np.errstate(invalid="ignore"):
        return np.clip(gram / norms[..., :, None] / norms[..., None, :], -1, 1)


def pair_cosines(gram: Float) -> Float:
    """Cosines (..., N(N-1)/2) between any two updates from their inner products (..., N, N)."""
    first, second = np.triu_indices(gram.shape[-1], 1)
    # Contiguous, so that each row's mean sums in the order in which that of a row on its own does.
    return np.ascontiguousarray(cosines(gram)[..., first, second])


def one_by_one(function: Callable[..., Blend], grams: Float, *arguments: Any, **options: Any) -> Blend:
    """The blends of all rows (rows, N, N), at least one, of a method that takes the inner products of one row."""
    blends = [function(gram, *arguments, **options) for gram in grams]
    facts = {
        key: np.array([np.nan if blend.facts[key] is None else blend.facts[key] for blend in blends])
        for key in blends[0].facts
    }
    return Blend(np.stack([blend.coefficients for blend in blends]), facts)


def summary(facts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON facts of one row as they are, None for NaN; of several rows the means of numbers and the counts of flags."""
    return dict(_summary_of(key, np.atleast_1d(values)) for key, values in facts.items())


def _summary_of(key: str, values: NDArray[Any]) -> tuple[str, Any]:
    if len(values) == 1:
        (value,) = values.tolist()
        return key, None if value != value else value
    if key == "flag":
        flags = values.tolist()
        return "flags", {flag: flags.count(flag) for flag in sorted(set(flags)) if flag}
    numbers = values[~np.isnan(values)]
    return key, float(np.mean(numbers)) if len(numbers) else None
