"""The anchor in the experiment: a backbone's tower with a head from prompts, or from the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from modelstock.data.dataset import Dataset, open_dataset
from modelstock.errors import ParamsError
from modelstock.models.anchor import anchor_of, text_anchor_of, with_head, without_head
from modelstock.models.heads import Prompts
from modelstock.models.towers import kind_of
from modelstock.params import AnchorParams
from modelstock.scoring.features import features_of
from modelstock.scoring.probe import probe_head
from modelstock.weights.weight_set import WeightSet


@dataclass(frozen=True, kw_only=True)
class Data:
    """The folders of the splits that a head may be made from, opened where it is; None where there is none."""

    train: Path | None
    held_out: Path | None


def make_anchor(
    backbone: WeightSet,
    names: Sequence[str],
    prompts: Prompts,
    section: AnchorParams,
    *,
    data: Data,
    cache: Path | None = None,
    device: str = "cpu",
) -> WeightSet:
    """The anchor w0 as its section says; data are only looked at where the head is made from them.

    Raises:
        ParamsError: a head that this backbone cannot have.
        DataError, WeightsError: data of other classes, or of another modality.
    """
    kind = kind_of(backbone)
    if section.head == "probe":
        bare = without_head(backbone, names)
        train, held_out = _given(data.train, "training"), _given(data.held_out, "held-out")
        tensors, options = probe_head(bare, train, held_out, device=device)
        return with_head(backbone, names, tensors, {"head": "probe", **options})
    is_clip = "text_cfg" in backbone.meta["architecture"]
    if not is_clip and kind.modality != "text":
        raise ParamsError(
            "anchor.head",
            got="prompts for a tower that takes no texts",
            expected="probe",
            cure="set anchor.head: probe",
        )
    if not is_clip and not backbone.meta["architecture"].get("normalise", True):
        raise ParamsError(
            "anchor.head", got="prompts for features that are not normalised", expected="probe", cure="set one of them"
        )
    if not is_clip and "logit_scale" not in backbone.tensors and section.scale == "model":
        raise ParamsError(
            "anchor.scale", got="model, which has no logit_scale", expected="fitted", cure="set anchor.scale: fitted"
        )
    make = anchor_of if is_clip else text_anchor_of
    anchor = make(backbone, names, prompts, cache=cache, device=device)
    if section.scale == "model":
        return anchor
    return _fitted(anchor, _given(data.held_out, "held-out"), device=device)


def _given(split: Path | None, what: str) -> Dataset:
    if split is None:
        raise ParamsError("anchor", got=f"no {what} split", expected="the one its head is made from", cure="name it")
    return open_dataset(split)


def _fitted(anchor: WeightSet, held_out: Dataset, *, device: str) -> WeightSet:
    """The anchor with its head scaled to the held-out split's likelihood."""
    held_out.check_modality(anchor)
    held_out.check_classes(anchor)
    held_out.check_labels()
    weight = functional.normalize(torch.from_numpy(np.asarray(anchor.tensors["head.weight"])).double(), dim=1)
    features = functional.normalize(torch.from_numpy(features_of(anchor, held_out, device=device)).double(), dim=1)
    scale = fitted_scale((features @ weight.T).numpy(), held_out.labels)
    tensors = {**anchor.tensors, "head.weight": (scale * weight).float().numpy()}
    made_by = {**anchor.meta["made_by"], "options": {**anchor.meta["made_by"]["options"], "scale": scale}}
    return WeightSet(tensors, {**anchor.meta, "made_by": made_by}, anchor.source)


def fitted_scale(cosines: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The scale s, from 1 to 1000 and to three digits, at which softmax(s cosines) (N, C) is likeliest for labels (N,).

    Minus the log-likelihood is convex in s: its slope, the mean of what the model expects of the cosine less the
    label's own, changes its sign once.
    """
    own = cosines[np.arange(len(labels)), labels]

    def slope(scale: float) -> float:
        shares = np.exp(scale * (cosines - cosines.max(axis=1, keepdims=True)))
        shares /= shares.sum(axis=1, keepdims=True)
        return float(((shares * cosines).sum(axis=1) - own).mean())

    low, high = 1.0, 1000.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(f"{low:.3g}")
