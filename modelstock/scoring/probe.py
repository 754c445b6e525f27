"""A linear probe: the head of a tower whose classes no prompts can name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from modelstock.data.dataset import Dataset
from modelstock.scoring.features import features_of
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet

# Strengths of the penalty, the strongest first, each solution being the start of the next.
STRENGTHS = tuple(10.0 ** (-power / 2) for power in range(2, 14))


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Features (N, D), normalised where the tower's classifier normalises them, and their labels (N,)."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]


def probe_head(
    weights: WeightSet, train: Dataset, held_out: Dataset, *, device: str = "cpu"
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The head of a weight set by a linear probe on the training split, and how it was chosen; see `fitted_head`.

    `weights`: with a head of the same classes, which is not looked at. `device`: where features are computed.

    Raises:
        DataError: labels that are not the head's, or an example that does not decode.
        WeightsError: a head for other classes.
    """
    splits = [_labelled(weights, split, device) for split in (train, held_out)]
    return fitted_head(*splits, classes=len(weights.tensors["head.bias"]))


def _labelled(weights: WeightSet, split: Dataset, device: str) -> Labelled:
    """A split's features as a head takes them, with labels."""
    split.check_classes(weights)
    split.check_labels()
    features = features_of(weights, split, device=device)
    if weights.meta["architecture"].get("normalise", True):
        features = functional.normalize(torch.from_numpy(features), dim=1).numpy()
    return Labelled(features=features, labels=split.labels)


def fitted_head(
    train: Labelled, held_out: Labelled, *, classes: int, strengths: Sequence[float] = STRENGTHS
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Multinomial logistic regression with an L2 penalty: `head.weight` (C, D), `head.bias` (C,), and its options.

    With r the root mean square distance of the training features from their mean, it minimises, for features over r, in
    float64 on the CPU, the mean loss plus strength / 2 times the squared weights; the bias is free. So a strength means
    the same for towers of any scale: scikit-learn's C is 1 / (strength n) for n examples. Of the strengths, from the
    strongest on, the one of the least held-out loss is taken, ties go to the first; after two in a row that are worse
    than the best so far, weaker ones are not tried. All features are in memory.
    """
    mean = train.features.mean(axis=0, dtype=np.float64)
    length = float(np.sqrt(np.square(train.features - mean).sum(axis=1).mean())) or 1.0
    # Around their mean, which the free bias makes up for: the same solution in a tenth of the steps.
    (inputs, targets), (seen, truth) = (
        (torch.from_numpy((split.features - mean) / length), torch.from_numpy(split.labels))
        for split in (train, held_out)
    )
    head = torch.zeros(classes, inputs.shape[1] + 1, dtype=torch.float64)
    losses: list[float] = []
    heads: list[Tensor] = []
    for strength in strengths:
        head = _fitted(inputs, targets, head, strength)
        heads.append(head)
        losses.append(float(functional.cross_entropy(_logits(head, seen), truth)))
        if len(losses) - 1 - int(np.argmin(losses)) == 2:
            break
    best = int(np.argmin(losses))
    weight = heads[best][:, :-1].numpy() / length
    bias = heads[best][:, -1].numpy() - weight @ mean
    tensors = {"head.weight": weight.astype(np.float32), "head.bias": bias.astype(np.float32)}
    return tensors, {"l2": strengths[best], "held-out/loss": losses[best]}


def _logits(head: Tensor, features: Tensor) -> Tensor:
    return functional.linear(features, head[:, :-1], head[:, -1])


def _fitted(inputs: Tensor, targets: Tensor, start: Tensor, strength: float) -> Tensor:
    """The weights and bias (C, D + 1) of least penalised loss, which is convex, from a start."""
    head = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [head],
        max_iter=1000,
        max_eval=2000,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(_logits(head, inputs), targets)
        loss = loss + strength / 2 * head[:, :-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return head.detach()
