"""How the seeds' updates lie to each other, and how far weight sets are from the anchor."""

import math
from collections.abc import Iterable

import numpy as np

from modelstock.merging.kernels import inner_products, runs
from modelstock.weights.tensors import FLOATS, Array, StoredTensor, stored_array
from modelstock.weights.weight_set import WeightSet

QUANTILES = {"minimum": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "maximum": 1.0}


def update_cosines(anchor: WeightSet, seeds: Iterable[WeightSet]) -> dict[str, float]:
    """Quantiles, over tensors and pairs of seeds, of the cosine between two seeds' updates; empty without any."""
    weight_sets, cosines = list(seeds), []
    for name, origin in anchor.tensors.items():
        if origin.dtype.kind == "f":
            updates = [(weights.tensors[name].astype(np.float64) - origin).ravel() for weights in weight_sets]
            unit = [update / np.linalg.norm(update) for update in updates if update.any()]  # a frozen head has none
            if len(unit) > 1:
                cosines.append((np.stack(unit) @ np.stack(unit).T)[np.triu_indices(len(unit), 1)])
    if not cosines:
        return {}
    values = np.quantile(np.concatenate(cosines), list(QUANTILES.values()))
    return dict(zip(QUANTILES, map(float, values), strict=True))


def distance(anchor: WeightSet, weights: WeightSet) -> float:
    """|w - w0| over all floating tensors, in float64; tensors are read in pieces, none is whole in memory."""
    squares = [
        float(inner_products(origin, [tuned], run).sum())
        for name in sorted(anchor.tensors)
        if (origin := _stored(anchor, name)).dtype in FLOATS
        for tuned in [_stored(weights, name)]
        for run in runs(origin.size, 1)
    ]
    return math.sqrt(math.fsum(squares))


def _stored(weights: WeightSet, name: str) -> StoredTensor:
    tensor: Array | StoredTensor = weights.shaped[name]
    return tensor if isinstance(tensor, StoredTensor) else stored_array(tensor, f"{weights.source}, tensor {name}")
