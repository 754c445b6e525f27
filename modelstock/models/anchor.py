"""The anchor w0: a backbone's tower with a head, for a CLIP the zero-shot head of class names and prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelstock.data.classes import prompts_key
from modelstock.data.tokens import Tokenization
from modelstock.devices import device_model
from modelstock.errors import DamagedError, WeightsError
from modelstock.files import sha256_of
from modelstock.models.heads import Prompts, prompt_directions, tokenizer, tokenizer_folder, zero_shot_head
from modelstock.models.towers import build_classifier, build_clip, kind_of, set_tensors, width_of
from modelstock.provenance import key_of
from modelstock.weights.origin import kept_notices, made_by, notices_of
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet, classes_sha256, load_weights


def _build(clip: WeightSet, device: str) -> tuple[nn.Module, Callable[[Sequence[str]], torch.Tensor]]:
    """A weight set's CLIP in evaluation mode, and its tokenizer."""
    tokenize = tokenizer(clip.meta["architecture"], tokenizer_folder(clip))
    model = build_clip(clip.meta["architecture"])
    set_tensors(model, clip)
    return model.eval().to(device), tokenize


def _head_key(clip: WeightSet, names: Sequence[str], prompts: Prompts, device: str) -> str:
    """What a zero-shot head depends on: code and libraries, the text tower, its tokenizer, the texts, the machine."""
    folder = tokenizer_folder(clip)
    files = [] if folder is None else [p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model")]
    facts: Mapping[str, Any] = {
        "architecture": {k: v for k, v in clip.meta["architecture"].items() if k != "vision_cfg"},
        "text tower": WeightSet({n: t for n, t in clip.tensors.items() if not n.startswith("visual.")}).identity,
        "tokenizer": {path.name: sha256_of(path) for path in files},
        "classes": len(names),
        "prompts": prompts_key(names, prompts),
        "device": device,
        "model": device_model(device),
        "threads": torch.get_num_threads(),
    }
    return key_of("modelstock.models.anchor", facts)


def head_of(
    clip: WeightSet, names: Sequence[str], prompts: Prompts, *, cache: Path | None = None, device: str = "cpu"
) -> dict[str, Array]:
    """The zero-shot head of a CLIP, `head.weight` (C, D) and `head.bias` (C,), from the cache where it holds one.

    Raises:
        ParamsError: no tokenizer for the text tower; see modelstock.models.heads.tokenizer.
    """
    path = None if cache is None else cache / f"{_head_key(clip, names, prompts, device)}.safetensors"
    if path is not None and path.is_file():
        try:
            return dict(load_weights(path).tensors)
        except (WeightsError, DamagedError):
            path.unlink()  # damaged: it is only a cache
    weight, bias = zero_shot_head(*_build(clip, device), names, prompts)
    head = {"head.weight": weight.numpy(), "head.bias": bias.numpy()}
    if path is not None:
        WeightSet(head, {}, "zero-shot head").save(path)
    return head


def anchor_of(
    clip: WeightSet, names: Sequence[str], prompts: Prompts, *, cache: Path | None = None, device: str = "cpu"
) -> WeightSet:
    """The anchor w0: the image tower of a CLIP with both towers, in float32, and the head of names and prompts.

    `meta["clip"]` is the CLIP's identity, which every descendant inherits. `cache`: a folder of heads, by what makes
    them. `device`: where texts are encoded.

    Raises:
        ParamsError: no tokenizer for the text tower; see modelstock.models.heads.tokenizer.
        WeightsError: a weight set without a text tower.

    Source: see modelstock.models.heads.zero_shot_head.
    """
    if "architecture" not in clip.meta or "logit_scale" not in clip.tensors:
        raise WeightsError(
            clip.source,
            got="a file without architecture or text tower",
            expected="a CLIP with both towers",
            cure="make it with the stage pretrain, or `modelstock anchor --clip-out`",
        )
    head = head_of(clip, names, prompts, cache=cache, device=device)
    return with_head(clip, names, head, {"templates": len(prompts)})


def without_head(backbone: WeightSet, names: Sequence[str]) -> WeightSet:
    """A backbone with a head of zeros, to be built as a classifier."""
    width = width_of(backbone)
    return with_head(
        backbone,
        names,
        {"head.weight": np.zeros((len(names), width), np.float32), "head.bias": np.zeros(len(names), np.float32)},
        {},
    )


def with_head(
    backbone: WeightSet, names: Sequence[str], head: Mapping[str, Array], options: Mapping[str, Any]
) -> WeightSet:
    """The tower of a backbone, in float32, with a head of these classes. `options`: how the head was made."""
    prefix = kind_of(backbone).prefix
    tower = {name: _single(tensor) for name, tensor in backbone.tensors.items() if name.startswith(prefix)}
    is_clip = "text_cfg" in backbone.meta["architecture"]
    clip = backbone.identity if is_clip else backbone.meta.get("clip")
    meta = {
        "architecture": backbone.meta["architecture"],
        **({"backbone": backbone.meta["backbone"]} if "backbone" in backbone.meta else {}),
        **({"clip": clip} if clip else {}),
        "preprocess": backbone.meta["preprocess"],
        "classes": list(names),
        "classes_sha256": classes_sha256(names),
        "parents": [backbone.identity],
        "made_by": made_by(stage="anchor", options=options),
        **kept_notices(notices_of(backbone.meta)),
    }
    return WeightSet({**tower, **head}, meta, "anchor")


@torch.inference_mode()
def text_anchor_of(
    backbone: WeightSet, names: Sequence[str], prompts: Prompts, *, cache: Path | None = None, device: str = "cpu"
) -> WeightSet:
    """The anchor w0 of a text tower: the head is what the tower itself, in evaluation mode, makes of the prompts.

    Rows have the length exp(logit_scale), or 1 where the backbone has none. `cache`: of no use here, where encoding
    takes as long as reading.
    """
    framer = Tokenization.of(backbone.meta["preprocess"])
    model = build_classifier(without_head(backbone, names)).to(device)

    def encode(texts: Sequence[str]) -> torch.Tensor:
        tokens = framer.batch([framer(text) for text in texts])
        return model.features(tokens.to(device))

    scale = float(np.exp(backbone.tensors["logit_scale"])) if "logit_scale" in backbone.tensors else 1.0
    weight = (scale * prompt_directions(encode, names, prompts)).cpu().numpy().astype(np.float32)
    head = {"head.weight": weight, "head.bias": np.zeros(len(names), np.float32)}
    return with_head(backbone, names, head, {"templates": len(prompts)})


def _single(array: Array) -> Array:
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
