"""What seeds are trained from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from modelstock.data.dataset import Dataset
from modelstock.data.examples import Examples, Texts
from modelstock.files import dump_json
from modelstock.scoring.batch_norm import Recalibration, has_running_statistics
from modelstock.weights.weight_set import WeightSet


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What seeds are trained from: the anchor, the examples of both splits, and what identifies all three.

    `recalibration`: of weights that no training ends with, averages and periodic merges; None: as they are.
    """

    anchor: WeightSet
    train: Examples | Texts
    held_out: Examples | Texts
    identities: Mapping[str, str]
    recalibration: Recalibration | None = None

    def recalibrated(self, weights: WeightSet) -> WeightSet:
        """A weight set that no training ended with."""
        return weights if self.recalibration is None else self.recalibration(weights)


def read_inputs(
    anchor: WeightSet, train: Dataset, held_out: Dataset, *, in_memory: bool, batch_norm: int = 0, device: str = "cpu"
) -> Inputs:
    """The examples of both splits, for an anchor of their classes.

    `batch_norm`: training images on which BatchNorm's running statistics are estimated again on the device, of weights
    that no training ends with; 0, or a tower without BatchNorm: they are not.

    Raises:
        WeightsError: the anchor's tower takes images where these are texts, or the reverse; its head has other classes.
        DataError: shards that do not hold what their manifest says, or labels that are not the head's classes.
    """
    for dataset in (train, held_out):
        dataset.check_modality(anchor)
        dataset.check_classes(anchor)
        dataset.check_labels()
    identities = {
        "anchor": anchor.identity,
        # The same tensors in another architecture, or with other preprocessing, train otherwise.
        "anchor's metadata": hashlib.sha256(dump_json(anchor.meta).encode()).hexdigest(),
        "train": train.manifest.sha256,
        "held-out": held_out.manifest.sha256,
    }
    estimates = batch_norm > 0 and has_running_statistics(anchor)
    return Inputs(
        anchor=anchor,
        train=train.examples(in_memory=in_memory),
        held_out=held_out.examples(in_memory=in_memory),
        identities=identities | ({"batch_norm": str(batch_norm)} if estimates else {}),
        recalibration=Recalibration(train, examples=batch_norm, device=device) if estimates else None,
    )
