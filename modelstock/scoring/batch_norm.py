"""BatchNorm's running statistics, estimated again for weights that no training has brought forth."""

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

from modelstock.data.dataset import Dataset
from modelstock.data.images import normalise
from modelstock.models.towers import build_classifier, tensors_of
from modelstock.scoring.data_statistics import sample
from modelstock.weights.layout import is_counter, is_running_statistic
from modelstock.weights.origin import kept_notices, notices_of
from modelstock.weights.weight_set import WeightSet


def has_running_statistics(weights: WeightSet) -> bool:
    """Whether a weight set is of a tower with BatchNorm."""
    return any(map(is_running_statistic, weights.tensors))


def estimated(
    weights: WeightSet, train: Dataset, *, examples: int, batch_size: int = 250, device: str = "cpu"
) -> WeightSet:
    """The weight set with running statistics measured on a random choice of training images, in one pass.

    `meta["made_by"]["batch_norm"]` says of how many; counters are those of that pass.

    Raises:
        DataError, WeightsError: see modelstock.scoring.data_statistics.sample.

    Source: Izmailov et al., arXiv 1803.05407, as torch.optim.swa_utils.update_bn has it.
    """
    images, _ = sample(train, weights, examples=examples)
    model = build_classifier(weights).to(device)
    bounds = range(0, len(images), batch_size)
    batches = (normalise(images[start : start + batch_size], weights.meta["preprocess"]) for start in bounds)
    # Without a list, torch would start up every GPU there is, also for a model on the CPU.
    with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)  # of towers with dropout
        update_bn(batches, model, torch.device(device))
    changed = tensors_of(model)
    # The tensors that were not estimated keep their dtypes.
    tensors = {n: changed[n] if _of_batch_norm(n) else np.asarray(t) for n, t in weights.tensors.items()}
    notices = [line for line in notices_of(weights.meta) if not line.startswith("BatchNorm: ")]
    made_by = {**weights.meta.get("made_by", {}), "batch_norm": len(images)}
    meta = {key: value for key, value in weights.meta.items() if key != "notices"}
    return WeightSet(tensors, {**meta, "made_by": made_by, **kept_notices(notices)}, weights.source)


def _of_batch_norm(name: str) -> bool:
    return is_running_statistic(name) or is_counter(name)
