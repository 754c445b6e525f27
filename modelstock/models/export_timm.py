"""A tower of timm with its head as a folder that timm loads: its own model, the head as its classifier."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from modelstock.errors import WeightsError, few
from modelstock.models.towers import build_classifier
from modelstock.weights.format import write_arrays
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write(weights: WeightSet, clip: WeightSet | None, names: Sequence[str], folder: Path) -> None:
    """Write timm's model by its own names with the head as its classifier, and timm's config.

    The config has the classes' names and how images are preprocessed; `checkpoint_path` takes the file of weights
    alone. Before anything is written, timm's model must give our logits.

    Raises:
        WeightsError: it does not.
    """
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
        },
    }
    tensors: dict[str, Array] = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_config_for_hf(model, str(folder / CONFIG), config)
    write_arrays(folder / WEIGHTS, tensors)


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


def example(weights: WeightSet, name: str) -> list[str]:
    """Lines of Python that classify an image."""
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


def notes(weights: WeightSet) -> list[str]:
    """Lines about the files."""
    return [f"`{WEIGHTS}` is timm's model with its classifier; `{CONFIG}` has its classes in order, as `label_names`."]
