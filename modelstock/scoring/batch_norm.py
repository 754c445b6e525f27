"""BatchNorm's running statistics, estimated again for weights that no training has made: merges, averages, points.

Every such weight set of an experiment is treated alike, by one `Recalibration`. Weights that a training ended with keep
its statistics, as they would be shipped; what the estimate alone changes of them is a row of its own, by the merge
method `recalibrated` of a single seed.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from modelstock.data.dataset import Dataset
from modelstock.data.images import Framing, normalise
from modelstock.models.towers import build_classifier, tensors_of
from modelstock.scoring.data_statistics import Images, sample
from modelstock.weights.layout import is_counter, is_running_statistic
from modelstock.weights.origin import kept_notices, notices_of
from modelstock.weights.tensors import Array, Checkpoint, in_memory
from modelstock.weights.weight_set import LazyArrays, WeightSet

BATCH = 250  # images at most; a part of the definition, so no setting of speed or memory changes a bit


def has_running_statistics(weights: WeightSet) -> bool:
    """Whether a weight set is of a tower with BatchNorm."""
    return any(map(is_running_statistic, weights.shaped))


class Recalibration:
    """Weight set -> the same with running statistics estimated on training images; without BatchNorm, it as it is.

    `examples`: how many images of `train`, drawn at random, the same for all; they are decoded once.
    """

    def __init__(self, train: Dataset, *, examples: int, device: str = "cpu") -> None:
        self._train, self._examples, self._device = train, examples, device
        self._images: dict[Framing, Images] = {}

    @property
    def count(self) -> int:
        """How many images there are."""
        return min(self._examples, self._train.manifest.count)

    def __call__(self, weights: WeightSet) -> WeightSet:
        """The weight set, estimated.

        Raises:
            DataError, WeightsError: see modelstock.scoring.data_statistics.sample.
        """
        if not has_running_statistics(weights):
            return weights
        framing = Framing.of(weights.meta["preprocess"])
        if framing not in self._images:
            self._images[framing], _ = sample(self._train, weights, examples=self._examples)
        return estimated_on(weights, self._images[framing], device=self._device)


def estimated(
    weights: WeightSet, train: Dataset, *, examples: int, batch_size: int = BATCH, device: str = "cpu"
) -> WeightSet:
    """The weight set with running statistics measured on a random choice of training images; see `estimated_on`.

    Raises:
        DataError, WeightsError: see modelstock.scoring.data_statistics.sample.
    """
    images, _ = sample(train, weights, examples=examples)
    return estimated_on(weights, images, batch_size=batch_size, device=device)


def estimated_on(weights: WeightSet, images: Images, *, batch_size: int = BATCH, device: str = "cpu") -> WeightSet:
    """The weight set with running statistics measured on images (n, S, S, 3), in one pass.

    The images are divided into the fewest batches of at most `batch_size`, of sizes that differ by one at most. Each
    layer's statistics are the means over batches of the batch's mean and variance, weighted by its images; every layer
    normalises by those of the batch, and nothing else of the model is as in training. So they depend on the batches:
    with others, they are another estimate. `meta["made_by"]["batch_norm"]` says of how many images; counters are those
    of that pass.

    Source: Izmailov et al., arXiv 1803.05407; with equal batches, torch.optim.swa_utils.update_bn.
    """
    model = build_classifier(weights).to(device)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    with torch.no_grad():
        for batch in np.array_split(images, -(-len(images) // batch_size)):
            seen += len(batch)
            for layer in layers:
                layer.momentum = len(batch) / seen
            model(normalise(batch, weights.meta["preprocess"]).to(device))
    # The tensors that were not estimated keep their dtypes, and are not read where they are read when they are used.
    changed = {
        name: tensor for name, tensor in tensors_of(model).items() if is_running_statistic(name) or is_counter(name)
    }
    if isinstance(weights.tensors, LazyArrays):
        stored = {**weights.tensors.stored, **in_memory(changed, {}, weights.source).tensors}
        return _described(weights, LazyArrays(Checkpoint(stored)), len(images))
    return _described(weights, {**weights.tensors, **changed}, len(images))


def _described(weights: WeightSet, tensors: Mapping[str, Array], images: int) -> WeightSet:
    """The weight set with these tensors; its metadata say of how many images the running statistics are."""
    count = sum(map(is_running_statistic, tensors))
    line = f"BatchNorm: {count} running statistics are estimated again, on {images} training images"
    notices = [*(line for line in notices_of(weights.meta) if not line.startswith("BatchNorm: ")), line]
    made_by = {**weights.meta.get("made_by", {}), "batch_norm": images}
    return WeightSet(tensors, {**weights.meta, "made_by": made_by, **kept_notices(notices)}, weights.source)
