"""CLIP models from open_clip, their zero-shot heads, and classifiers made of an image tower and a head.

torch and open_clip are imported here and in `training` and `evaluation` alone: they cost seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from modelstock.errors import WeightsError
from modelstock.weights import WeightSet

# A ViT small enough for two CPU cores: 0.8M parameters in the image tower, 17 tokens an image.
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
TINY_PREPROCESS: dict[str, Any] = {
    "size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
}
# The embedded benchmark's prompts; ImageNet's 80 come from open_clip. Both feed `zero_shot_head`.
TINY_TEMPLATES: tuple[Callable[[str], str], ...] = (
    lambda c: f"a photo of a {c}.",
    lambda c: f"a sketch of a {c}.",
    lambda c: f"a cartoon of a {c}.",
    lambda c: c,
)


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """A CLIP with random weights from an open_clip model config; the caller seeds torch."""
    model: nn.Module = open_clip.CLIP(**config)
    return model


def tokenizer(config: Mapping[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    """open_clip's own tokenizer at the text tower's context length: texts -> (B, L) int64."""
    length = config["text_cfg"].get("context_length", 77)
    tokenize = open_clip.SimpleTokenizer(context_length=length)
    return lambda texts: torch.as_tensor(tokenize(list(texts)))


@torch.inference_mode()
def zero_shot_head(
    clip: nn.Module,
    tokenize: Callable[[Sequence[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    *,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and zero bias (C,) of a linear head that classifies as CLIP's text tower does.

    Row c = exp(logit_scale) * normalise(mean over templates of normalise(text feature)).
    Source: Radford et al., arXiv 2103.00020; Wortsman et al., arXiv 2109.01903.
    """
    texts = [template(name) for name in names for template in templates]
    parts = [clip.encode_text(tokenize(texts[i : i + batch_size]), normalize=True)  # type: ignore[operator]
             for i in range(0, len(texts), batch_size)]  # fmt: skip
    features = torch.cat(parts).reshape(len(names), len(templates), -1).mean(dim=1)
    weight = functional.normalize(features, dim=-1) * clip.logit_scale.exp()  # type: ignore[operator]
    return weight.clone(), torch.zeros(len(names))


class Classifier(nn.Module):
    """Image tower and linear head: logits = W normalise(visual(images)) + b.

    Images (B, 3, S, S), normalised by the preprocess's mean and std -> logits (B, C).
    """

    def __init__(self, visual: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """The tower's pooled feature (B, D), not normalised."""
        found: Tensor = self.visual(images)
        return found

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.normalize(self.features(images), dim=-1))
        return logits


def build_classifier(weights: WeightSet) -> Classifier:
    """The classifier that a weight set describes, in evaluation mode.

    Raises:
        WeightsError: no architecture in the metadata, or tensors that do not fit it.
    """
    config = weights.meta.get("architecture")
    if not isinstance(config, Mapping) or "head.weight" not in weights.tensors:
        raise WeightsError(
            weights.source,
            got="a file without architecture or head",
            expected="a weight set made by modelstock",
            cure="make it with the stages anchor, finetune or merge",
        )
    classes, width = weights.tensors["head.weight"].shape
    # Only the image tower is wanted; the text tower is built on the meta device, where it costs nothing.
    with torch.device("meta"):
        clip = build_clip(config)
    visual: Any = clip.visual
    model = Classifier(visual.to_empty(device="cpu"), classes, width)
    model.head.to_empty(device="cpu")
    set_tensors(model, weights)
    return model.eval()


def set_tensors(model: nn.Module, weights: WeightSet) -> None:
    """Copy a weight set's tensors into a model.

    Raises:
        WeightsError: names or shapes that differ from the model's.
    """
    own = model.state_dict()
    problems = [f"{k} missing" for k in own.keys() - weights.tensors.keys()]
    problems += [f"{k} unknown" for k in weights.tensors.keys() - own.keys()]
    problems += [
        f"{k} is {weights.tensors[k].shape}, the model's {tuple(own[k].shape)}"
        for k in own.keys() & weights.tensors.keys()
        if tuple(own[k].shape) != weights.tensors[k].shape
    ]
    if problems:
        raise WeightsError(
            weights.source,
            got="; ".join(sorted(problems)),
            expected="the tensors of its architecture",
            cure="make the weight set again from this anchor",
        )
    model.load_state_dict({k: torch.from_numpy(np.asarray(v, order="C")) for k, v in weights.tensors.items()})


def tensors_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The model's state as arrays: copies, so later training does not change them."""
    return {k: v.detach().cpu().numpy().copy() for k, v in model.state_dict().items()}


def normalise(images: NDArray[np.uint8], preprocess: Mapping[str, Any]) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 with the model's mean and std."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(preprocess[k]).reshape(3, 1, 1) for k in ("mean", "std"))
    return ((pixels - mean) / std).contiguous()
