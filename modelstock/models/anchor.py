"""The anchor w0: the image tower of a CLIP with the zero-shot head of class names and prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelstock.data.classes import prompts_key
from modelstock.devices import device_model
from modelstock.errors import DamagedError, WeightsError
from modelstock.files import sha256_of
from modelstock.models.heads import Prompts, tokenizer, zero_shot_head
from modelstock.models.towers import build_clip, set_tensors
from modelstock.provenance import key_of
from modelstock.weights.origin import kept_notices, made_by, notices_of
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet, classes_sha256, load_weights


def _tokenizer_folder(clip: WeightSet) -> Path | None:
    """The folder of the backbone, where it brings a tokenizer."""
    folder = Path(str(clip.meta.get("backbone", {}).get("pretrained", "")))
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder if any((folder / name).is_file() for name in names) else None


def _build(clip: WeightSet, device: str) -> tuple[nn.Module, Callable[[Sequence[str]], torch.Tensor]]:
    """A weight set's CLIP in evaluation mode, and its tokenizer."""
    tokenize = tokenizer(clip.meta["architecture"], _tokenizer_folder(clip))
    model = build_clip(clip.meta["architecture"])
    set_tensors(model, clip)
    return model.eval().to(device), tokenize


def _head_key(clip: WeightSet, names: Sequence[str], prompts: Prompts, device: str) -> str:
    """What a zero-shot head depends on: code and libraries, the text tower, its tokenizer, the texts, the machine."""
    folder = _tokenizer_folder(clip)
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
    tower = {name: _single(tensor) for name, tensor in clip.tensors.items() if name.startswith("visual.")}
    backbone = {"backbone": clip.meta["backbone"]} if "backbone" in clip.meta else {}
    meta = {
        "architecture": clip.meta["architecture"],
        **backbone,
        "clip": clip.identity,
        "preprocess": clip.meta["preprocess"],
        "classes": list(names),
        "classes_sha256": classes_sha256(names),
        "parents": [clip.identity],
        "made_by": made_by(stage="anchor", options={"templates": len(prompts)}),
        **kept_notices(notices_of(clip.meta)),
    }
    return WeightSet(tower | head_of(clip, names, prompts, cache=cache, device=device), meta, "anchor")


def _single(array: Array) -> Array:
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
