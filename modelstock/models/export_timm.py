"""A weight set whose tower is timm's, as a folder that timm loads: its model with the fine-tuned classifier."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from modelstock.errors import WeightsError, few
from modelstock.models.export import (
    CARD,
    Figure,
    accuracies_of,
    facts_of,
    figures_of,
    front_matter,
    names_of_classes,
    whole_folder,
)
from modelstock.models.towers import build_classifier
from modelstock.weights.format import write_arrays
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def is_of_timm(weights: WeightSet) -> bool:
    """Whether a weight set's tower is a model of timm."""
    return bool(weights.meta.get("architecture", {}).get("kind") == "timm")


def export_timm(
    weights: WeightSet,
    folder: Path,
    *,
    report: Mapping[str, Any] | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a weight set as a folder of timm's hub: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    It holds the model by timm's own names with the head as its classifier, timm's config with the classes' names and
    how images are preprocessed, and a model card; `checkpoint_path` takes the file of weights alone. Before anything is
    written, timm's model must give our logits. `report`, `licence`: see modelstock.models.export.export. Whole or not
    at all.

    Raises:
        WeightsError: weights that are no model of timm with a classifier, or do not name their classes.
        DataError: a report without these weights.
        ParamsError: a folder that exists.
    """
    if not is_of_timm(weights) or not {"head.weight", "head.bias"} <= weights.tensors.keys():
        raise WeightsError(
            weights.source,
            got="a file without head, or without a tower of timm",
            expected="a weight set made by modelstock from a model of timm",
            cure="for a CLIP, name it with --clip",
        )
    names = names_of_classes(weights)
    figures = () if report is None else figures_of(report, weights)
    weights.check_finite()
    model = _model(weights)
    preprocess = weights.meta["preprocess"]
    config = {
        "label_names": list(names),
        "pretrained_cfg": {
            "input_size": [3, preprocess["size"], preprocess["size"]],
            "mean": preprocess["mean"],
            "std": preprocess["std"],
            "interpolation": preprocess["interpolation"],
            "crop_pct": 1.0,  # all of the shorter side is kept
            "crop_mode": {"shortest": "center", "squash": "squash", "longest": "border"}[
                preprocess.get("resize_mode", "shortest")
            ],
            "tag": "modelstock",
            "license": licence or "other",
        },
    }
    tensors: dict[str, Array] = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with whole_folder(folder, overwrite, CONFIG) as new:
        save_config_for_hf(model, str(new / CONFIG), config)
        write_arrays(new / WEIGHTS, tensors)
        card = _card(weights, Path(folder).absolute().name, figures=figures, licence=licence)
        (new / CARD).write_text(card, encoding="utf-8")


def _model(weights: WeightSet) -> nn.Module:
    """timm's model with its classifier, which gives the weight set's logits.

    Raises:
        WeightsError: it does not.
    """
    architecture = weights.meta["architecture"]
    classes = len(weights.tensors["head.bias"])
    model: nn.Module = timm.create_model(architecture["name"], num_classes=classes, **architecture.get("options", {}))
    model.eval()
    state = model.state_dict()
    layer = getattr(model, "pretrained_cfg", {}).get("classifier")
    ours = {name.removeprefix("visual."): tensor for name, tensor in weights.tensors.items() if name[:5] != "head."}
    ours |= {f"{layer}.{name}": weights.tensors[f"head.{name}"] for name in ("weight", "bias")}
    problems = sorted(ours.keys() ^ state.keys())
    if not problems:
        arrays = {name: torch.from_numpy(np.asarray(tensor, order="C")) for name, tensor in ours.items()}
        model.load_state_dict({name: arrays[name].reshape(tensor.shape) for name, tensor in state.items()})
        size = weights.meta["preprocess"]["size"]
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, got = build_classifier(weights)(images), model(images)
        # As far apart as sums in another order are.
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
            problems = ["other logits than ours: its classifier is not one linear layer over these features"]
    if problems:
        raise WeightsError(
            weights.source,
            got=few(problems),
            expected=f"a classifier of timm's {architecture['name']}",
            cure="use the weight set as it is: its metadata say how it is built",
        )
    return model


def _card(weights: WeightSet, name: str, *, figures: Sequence[Figure], licence: str | None) -> str:
    """The model card: front matter for the hub, then what it is, how good, and how to use it."""
    origin, backbone = weights.meta.get("made_by", {}), weights.meta.get("backbone", {})
    method = str(origin.get("method", origin.get("stage", "not recorded")))
    how = "fine-tuned and merged" if "method" in origin else method
    # A local file or folder is named without the place where it lay.
    parent = f"{backbone.get('name', 'a model')} ({Path(str(backbone.get('pretrained', 'not recorded'))).name}) of timm"
    also = f" This folder is published under {licence} as far as that allows." if licence else ""
    head = front_matter(None, licence, merged="method" in origin, library="timm", tags=["timm"])
    lines = [
        *("---", head, "---"),
        f"# {name}",
        f"An image classifier for {len(weights.tensors['head.bias'])} classes: {parent}, {how} with modelstock.",
        "",
        *facts_of(weights, method),
        *accuracies_of(figures),
        *("", "## Use", "```python", *_example(name), "```"),
        *("", "## Licence"),
        f"The weights derive from those of {parent}, whose licence governs them; the terms of the training images may "
        f"add to it.{also}",
    ]
    return "\n".join(lines) + "\n"


def _example(name: str) -> list[str]:
    return [
        "import timm, torch",
        "from PIL import Image",
        "",
        f"model = timm.create_model({json.dumps(f'local-dir:{name}')}, pretrained=True).eval()",
        "preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "with torch.inference_mode():",
        '    logits = model(preprocess(Image.open("image.png").convert("RGB")).unsqueeze(0))[0]',
        'print(model.pretrained_cfg["label_names"][logits.argmax().item()])',
    ]
