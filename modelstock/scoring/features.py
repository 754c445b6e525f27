"""The features of a split's examples, in one pass of a tower."""

import numpy as np
import torch
from numpy.typing import NDArray

from modelstock.data.dataset import Dataset
from modelstock.data.preprocess import framer_of
from modelstock.devices import FORWARD_BATCH
from modelstock.models.towers import build_classifier
from modelstock.scoring.decoding import DecodedBatches, Prepared
from modelstock.weights.weight_set import WeightSet


@torch.inference_mode()
def features_of(weights: WeightSet, dataset: Dataset, *, device: str = "cpu") -> NDArray[np.float32]:
    """The tower's features (N, D) of all examples in their order, not normalised; the head is not looked at.

    Raises:
        DataError: an example that does not decode.
    """
    model, preprocess = build_classifier(weights).to(device), weights.meta["preprocess"]
    batches = DecodedBatches(dataset, [framer_of(preprocess)], FORWARD_BATCH[device])
    parts = []
    for (framed,), _ in batches.load(0, workers=0, pin=False):
        inputs = Prepared({framer_of(preprocess): framed}, device, torch.float32).of(preprocess)
        parts.append(model.features(inputs).float().cpu().numpy())
    return np.concatenate(parts)
