"""How the seeds' updates lie to each other."""

from collections.abc import Iterable

import numpy as np

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
