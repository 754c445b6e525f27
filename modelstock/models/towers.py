"""CLIP models of open_clip, and classifiers made of an image tower and a head.

torch and open_clip cost seconds to import, so only what needs a model imports this.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.model import _build_vision_tower
from torch import Tensor, nn
from torch.nn import functional

from modelstock.errors import ParamsError, WeightsError, few
from modelstock.weights.differences import differences
from modelstock.weights.weight_set import WeightSet

# A ViT small enough for two CPU cores: 0.8M parameters in the image tower, 17 tokens an image.
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def _without_downloads(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config whose towers start from random weights: whatever they should hold is loaded afterwards."""
    blank: dict[str, Any] = copy.deepcopy(dict(config))
    for section, timm_or_hf in (("vision_cfg", "timm_model"), ("text_cfg", "hf_model")):
        if f"{timm_or_hf}_name" in blank.get(section, {}):
            blank[section][f"{timm_or_hf}_pretrained"] = False
    return blank


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """A CLIP, CustomTextCLIP or CoCa with random weights from an open_clip model config; the caller seeds torch.

    Raises:
        ParamsError: a text tower of the library `transformers`, which is not installed or does not find its config.

    Source: open_clip's factory, which chooses the class in the same way.
    """
    blank = _without_downloads(config)
    custom = blank.pop("custom_text", False) or "hf_model_name" in blank["text_cfg"]
    kind = open_clip.CLIP if not custom else open_clip.CoCa if "multimodal_cfg" in blank else open_clip.CustomTextCLIP
    if "hf_model_name" not in blank["text_cfg"]:
        model: nn.Module = kind(**blank)
        return model
    name = blank["text_cfg"]["hf_model_name"]
    with from_transformers(f"text tower {name}", f"the config of {name}"):
        return kind(**blank)  # type: ignore[no-any-return]


@contextmanager
def from_transformers(place: str, wanted: str) -> Iterator[None]:
    """Errors of the library `transformers`, and its absence, as one line."""
    if find_spec("transformers") is None:
        raise ParamsError(
            place, got="no library transformers", expected="it, which makes it", cure="pip install transformers"
        )
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ParamsError(
            place,
            got=f"{type(error).__name__}: {line}",
            expected=wanted,
            cure="connect to the hub once, or copy its files to the cache or to the folder pretrain.pretrained",
        ) from error


def build_visual(config: Mapping[str, Any]) -> nn.Module:
    """The image tower of `build_clip(config)` alone, with random weights: images (B, 3, S, S) -> features (B, D)."""
    blank = _without_downloads(config)
    visual: nn.Module = _build_vision_tower(blank["embed_dim"], blank["vision_cfg"], blank.get("quick_gelu", False))
    return visual


def _blank_visual(weights: WeightSet) -> nn.Module:
    """The image tower on the CPU, for weights to be loaded into; what the weights do not hold is right already.

    Raises:
        WeightsError: an architecture that cannot be built, or that has other tensors; before it takes any memory.
    """
    config = weights.meta["architecture"]
    try:
        with torch.device("meta"):
            visual = build_visual(config)
    except Exception as error:  # a file may say anything
        raise WeightsError(
            weights.source,
            got=f"an architecture that open_clip does not build ({type(error).__name__}: {str(error)[:120]})",
            expected="the config of one of its models",
            cure="make the weight set again from this anchor",
        ) from error
    _check_tensors(weights, {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}, "visual.")
    loaded = visual.state_dict().keys()
    if all(name in loaded for name, _ in visual.named_buffers()):
        return visual.to_empty(device="cpu")
    # Rotary embeddings, relative positions and masks are in no checkpoint: only a real tower computes them.
    with torch.random.fork_rng(devices=[]):
        return build_visual(config)


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
        output = self.visual(images)
        # Towers of captioning models give their tokens as well, after the pooled feature.
        pooled: Tensor = output[0] if isinstance(output, tuple) else output
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.normalize(self.features(images), dim=-1))
        return logits


def check_classifier(weights: WeightSet) -> None:
    """Raise WeightsError unless a weight set says what to build, how its images are preprocessed, and has a head."""
    missing = [name for name in ("architecture", "preprocess") if name not in weights.meta]
    missing += [name for name in ("head.weight", "head.bias") if name not in weights.shaped]
    if missing or len(weights.shaped["head.weight"].shape) != 2:
        raise WeightsError(
            weights.source,
            got=f"a file without {', '.join(missing) or 'a linear head'}",
            expected="a weight set made by modelstock",
            cure="make it with the stages anchor, finetune or merge; for others' checkpoints, name the --anchor",
        )


def build_classifier(weights: WeightSet) -> Classifier:
    """The classifier that a weight set describes, in evaluation mode.

    Raises:
        WeightsError: no architecture in the metadata, or tensors that do not fit it.
    """
    check_classifier(weights)
    classes, width = weights.shaped["head.weight"].shape
    with torch.device("meta"):
        model = Classifier(nn.Identity(), classes, width)
    model.head.to_empty(device="cpu")
    model.visual = _blank_visual(weights)
    set_tensors(model, weights)
    return model.eval()


def set_tensors(model: nn.Module, weights: WeightSet) -> None:
    """Copy a weight set's tensors into a model.

    Raises:
        WeightsError: names or shapes that differ from the model's.
    """
    _check_tensors(weights, model.state_dict())
    model.load_state_dict({k: torch.from_numpy(np.asarray(v, order="C")) for k, v in weights.tensors.items()})


def _check_tensors(weights: WeightSet, expected: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise WeightsError unless the weights whose names begin with `prefix` have these names and shapes."""
    tensors = {name: tensor for name, tensor in weights.shaped.items() if name.startswith(prefix)}
    problems = differences(tensors, expected, whose="the model's")
    if problems:
        raise WeightsError(
            weights.source,
            got=few(problems, 12),
            expected="the tensors of its architecture",
            cure="make the weight set again from this anchor",
        )


def tensors_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The model's state as arrays: copies, so later training does not change them."""
    return {k: v.detach().cpu().numpy().copy() for k, v in model.state_dict().items()}
