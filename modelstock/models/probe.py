"""A linear probe: the head of a tower whose classes no prompts can name."""

from typing import Any

from modelstock.data.dataset import Dataset
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet


def probe_head(
    weights: WeightSet, train: Dataset, held_out: Dataset, *, device: str = "cpu"
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The head of a weight set by a linear probe: `head.weight` (C, D) and `head.bias` (C,), and how it was chosen."""
    raise NotImplementedError
