"""Models of timm as weight sets that classify images; a head is put on their pooled features."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from modelstock.errors import DataError, ParamsError, WeightsError, few, nearest
from modelstock.files import on_this_machine
from modelstock.models.names import prefix_of_tower
from modelstock.models.pretrained import hub_file, tower_of
from modelstock.models.towers import build_timm, tensors_of
from modelstock.notices import notice
from modelstock.params import TimmPretraining
from modelstock.weights.checkpoints import open_checkpoint, weights_in
from modelstock.weights.origin import made_by
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet


def load_timm(section: TimmPretraining) -> WeightSet:
    """A model of timm without its classifier in float32, as a weight set without a head; see TimmPretraining.

    Features are what timm's own classifier takes, and are not normalised, so that tower and head are that model.
    Images are preprocessed as the weights were published: size, mean, std, interpolation.

    Raises:
        ParamsError: a model or tag that timm does not know, or images that are not square.
        DataError: weights that are not on this machine while the hub cannot be reached.
        WeightsError: a file of another architecture.
    """
    if not timm.is_model(section.model):
        cure = nearest(section.model, timm.list_models())
        raise ParamsError("pretrain.model", got=repr(section.model), expected="one of timm.list_models()", cure=cure)
    file = _file_of(section)
    architecture: dict[str, Any] = {"kind": "timm", "name": section.model, "normalise": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        model = build_timm(architecture)
    preprocess = _preprocess(section, model)
    if section.size is not None and getattr(model, "patch_embed", None) is not None:  # position embeddings have a size
        architecture["options"] = {"img_size": section.size}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(section.seed)
            model = build_timm(architecture)
    with torch.inference_mode():
        architecture["width"] = model.eval()(torch.zeros(1, 3, preprocess["size"], preprocess["size"])).shape[1]
    tensors = {f"visual.{name}": value for name, value in tensors_of(model.float()).items()}
    if file is not None:
        tensors = _weights(file, tensors, model)
    meta = {
        "architecture": architecture,
        "backbone": {"name": section.model, "pretrained": section.pretrained},
        "preprocess": preprocess,
        "parents": [],
        "made_by": made_by(stage="pretrain", options=section.model_dump(mode="json")),
    }
    backbone = WeightSet(tensors, meta, str(file or f"{section.model} with random weights"))
    backbone.check_finite()
    return backbone


def _file_of(section: TimmPretraining) -> Path | None:
    """The checkpoint of a section; None for random weights."""
    if section.pretrained == "random":
        return None
    path = on_this_machine(section.pretrained)
    if path.is_dir():
        return weights_in(path)
    if path.is_file():
        return path
    tags = {name.partition(".")[2]: name for name in timm.list_pretrained(f"{section.model}.*")}
    if section.pretrained not in tags:
        raise ParamsError(
            "pretrain.pretrained",
            got=repr(section.pretrained),
            expected=f"a file, a folder, random, or a tag of {section.model}: {few(sorted(tags)) or 'it has none'}",
            cure="correct it",
        )
    published = get_pretrained_cfg(tags[section.pretrained])
    if published is None or not published.hf_hub_id:
        raise DataError(
            f"pretrain.pretrained {section.model} {section.pretrained}",
            got="weights that are not on the hub",
            expected="a file here",
            cure=f"get {published.url if published else 'them'} and name the file",
        )
    return hub_file(f"pretrain.pretrained {section.model} {section.pretrained}", {"hf_hub": f"{published.hf_hub_id}/"})


def _preprocess(section: TimmPretraining, model: nn.Module) -> dict[str, Any]:
    """How the weights were published to be evaluated, at the size that is wanted.

    timm resizes to a little more than it keeps (`crop_pct`); here, as everywhere in this library, all of the shorter
    side is kept.
    """
    published: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    _, height, width = published["input_size"]
    if section.size is None and height != width:
        raise ParamsError("pretrain.size", got="null", expected=f"one side: {height} x {width}", cure="name it")
    return {
        "size": section.size or height,
        "mean": list(published["mean"]),
        "std": list(published["std"]),
        "interpolation": "bicubic" if published["interpolation"] == "bicubic" else "bilinear",
        "resize_mode": "shortest",
    }


def _weights(file: Path, expected: dict[str, Array], model: nn.Module) -> dict[str, Array]:
    """The tower's tensors by our names from somebody's checkpoint; its classifier is left aside.

    Raises:
        WeightsError: tensors of another architecture.
    """
    checkpoint = open_checkpoint(file)
    tower = {name.removeprefix("visual."): built for name, built in expected.items()}
    prefix = prefix_of_tower(checkpoint, list(tower), "tower")
    tensors, problems, beside = tower_of(checkpoint, prefix, tower)
    classifiers: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    strange = [name for name in beside if not name.removeprefix(prefix).startswith(tuple(f"{head}." for head in heads))]
    if problems or strange:
        raise WeightsError(
            checkpoint.source,
            got=few(problems or strange),
            expected="the tensors of pretrain.model",
            cure="name the model that the file was trained as",
        )
    if beside:
        notice(checkpoint.source, f"its classifier {few(beside)} is left aside: the anchor gets a head of its own")
    return {f"visual.{name}": tensor for name, tensor in tensors.items()}
