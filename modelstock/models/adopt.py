"""Other people's fine-tuned checkpoints as weight sets that merge with an anchor."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch

from modelstock.data.preprocess import modality_of
from modelstock.errors import WeightsError, few
from modelstock.models.anchor import head_of
from modelstock.models.heads import Prompts
from modelstock.models.names import prefix_of_tower
from modelstock.models.towers import build_clip
from modelstock.notices import collected, notice
from modelstock.weights.checkpoints import open_checkpoint, weights_in
from modelstock.weights.differences import differences
from modelstock.weights.origin import kept_notices, made_by, notices_of
from modelstock.weights.tensors import FLOATS, Array, Checkpoint, StoredTensor
from modelstock.weights.weight_set import WeightSet, load_weights

_HEADS = ("classification_head", "head", "fc", "classifier")


def _read(tensor: StoredTensor) -> Array:
    """The tensor in float32; integers as they are."""
    values = tensor.values()
    return (values.astype(np.float32) if tensor.dtype in FLOATS else values).reshape(tensor.shape)


def _linear_head(checkpoint: Checkpoint, tower: set[str]) -> str | None:
    """The name of a checkpoint's classification layer, or None.

    Raises:
        WeightsError: it has several.
    """
    layers = []
    for name in sorted(checkpoint.tensors.keys() - tower):
        layer, _, parameter = name.rpartition(".")
        if parameter == "weight" and layer.rpartition(".")[2] in _HEADS and len(checkpoint.tensors[name].shape) == 2:
            layers.append(layer)
    if len(layers) > 1:
        raise WeightsError(
            checkpoint.source,
            got=f"{len(layers)} heads: {few(layers)}",
            expected="one",
            cure="save it with one of them",
        )
    return layers[0] if layers else None


def _check_tower(checkpoint: Checkpoint, prefix: str, names: Mapping[str, str], anchor: WeightSet) -> None:
    """Compare the tensors that are taken from a checkpoint, our name -> its name, with the anchor's.

    Raises:
        WeightsError: other shapes, or more tensors in the image tower: the file is of another architecture.
    """
    # Beside a tower without a prefix of its own lie the numbers of the CLIP.
    beside = () if prefix.endswith("visual.") else ("logit_scale", "logit_bias")
    tower = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name in names.values() or (name.startswith(prefix) and name.removeprefix(prefix) not in beside)
    }
    expected = {theirs: anchor.tensors[ours] for ours, theirs in names.items()}
    if problems := differences(tower, expected, whose="the anchor's"):
        raise WeightsError(
            checkpoint.source,
            got=few(problems),
            expected="the anchor's tensors and no more in its image tower",
            cure="name a checkpoint of the anchor's architecture and classes",
        )


def _checked(weights: WeightSet, anchor: WeightSet) -> WeightSet:
    """A weight set of ours, if it merges with the anchor.

    Raises:
        WeightsError: other tensors, a head for other classes, or weights that were made from another anchor.
    """
    if problems := differences(weights.tensors, anchor.tensors, whose="the anchor's"):
        raise WeightsError(
            weights.source,
            got=few(problems),
            expected="the tensors of the anchor",
            cure="name a weight set made from this anchor",
        )
    classes, expected = weights.meta.get("classes_sha256"), anchor.meta.get("classes_sha256")
    if classes and expected and classes != expected:
        raise WeightsError(
            weights.source,
            got=f"a head for other classes ({classes[:12]})",
            expected=f"the anchor's ({expected[:12]})",
            cure="fine-tune from an anchor with the same classes, in the same order",
        )
    parents = weights.meta.get("parents") or []
    if parents and anchor.identity not in (*parents, weights.identity):
        raise WeightsError(
            weights.source,
            got=f"weights made from {few([str(parent)[:12] for parent in parents])}",
            expected=f"from the anchor {anchor.source}, {anchor.identity[:12]}",
            cure="name the anchor that they were fine-tuned from",
        )
    return weights


def _check_other_heads(checkpoint: Checkpoint, taken: Collection[str], anchor: WeightSet, *, layer: str | None) -> None:
    """Refuse, or where a head was taken give a notice of, further tensors of the head's shape: any may be the head.

    Raises:
        WeightsError: such a tensor, and no head by its name.
    """
    text: list[str] = []
    if "kind" not in anchor.meta["architecture"]:
        with torch.device("meta"):
            clip = build_clip(anchor.meta["architecture"]).state_dict()
        text = [name for name in clip if not name.startswith("visual.")]
    ends = tuple(f".{name}" for name in text)
    others = [
        name
        for name, tensor in sorted(checkpoint.tensors.items())
        if tensor.shape == anchor.tensors["head.weight"].shape
        and name not in taken
        # The text tower's, under whatever prefix.
        and not f".{name}".endswith(ends)
    ]
    if others and layer is None:
        raise WeightsError(
            checkpoint.source,
            got=f"{few(others)} of the head's shape, under no name of a head",
            expected=f"a linear layer named {', '.join(_HEADS)}, or none",
            cure=f"rename it to head.weight (and head.bias), or leave {'it' if len(others) == 1 else 'them'} out",
        )
    if others:
        notice(checkpoint.source, f"the head is {layer}; {few(others)} of the same shape left aside")


def _whole_clip(checkpoint: Checkpoint, prefix: str, anchor: WeightSet) -> WeightSet | None:
    """Both towers of a checkpoint, if it holds the text tower of the anchor's architecture whole."""
    if not prefix.endswith("visual.") or "kind" in anchor.meta["architecture"]:
        return None
    with torch.device("meta"):
        expected = build_clip(anchor.meta["architecture"]).state_dict()
    start = prefix.removesuffix("visual.")
    tensors = {name: checkpoint.tensors[start + name] for name in expected if start + name in checkpoint.tensors}
    if differences(tensors, expected, whose="the architecture's"):
        return None
    return WeightSet({name: _read(tensor) for name, tensor in tensors.items()}, anchor.meta, checkpoint.source)


def adopt(path: Path, anchor: WeightSet, *, prompts: Prompts | None = None, device: str = "cpu") -> WeightSet:
    """Somebody's fine-tuned checkpoint as a weight set that merges with `anchor`; floats become float32.

    Our own files stay as they are. In others (safetensors, folders, state dicts, training checkpoints, with whatever
    prefix) the image tower is what carries the anchor's names. The head is the file's own linear layer (C, D) over
    normalised features; else zero-shot from its own text tower, if it has one, the anchor names its classes, and
    `prompts` are given; else the anchor's. `meta["made_by"]["options"]["head"]` says which: own, zero-shot or anchor.
    Which of several models or heads was taken, and what is assumed of the head, is a notice, and in the metadata.

    Raises:
        WeightsError: a pickle of more than tensors, a tower or a head that does not fit the anchor, a tensor that may
            be the head under another name, weights of ours that were made from another anchor, NaN or infinity;
            anything that is not ours, where the anchor takes texts.
        DamagedError: a weight set of ours that is not as it was written.
    """
    path = Path(path)
    with collected() as notices:
        file = weights_in(path) if path.is_dir() else path
        checkpoint = open_checkpoint(file)
        if "architecture" in checkpoint.meta and "head.weight" in checkpoint.tensors:
            return _checked(load_weights(file), anchor)
        if modality_of(anchor.meta.get("preprocess", {})) == "text":
            raise WeightsError(
                path,
                got="a checkpoint of another library",
                expected="a weight set of ours for the text tower of the anchor: others' heads are over other features",
                cure="fine-tune from the anchor, with modelstock",
            )
        tensors, head = _adopted(checkpoint, anchor, prompts=prompts, device=device)
    origin = made_by(stage="finetune", source=file.name, options={"head": head})
    meta = {**anchor.meta, "parents": [anchor.identity], "made_by": origin}
    meta |= kept_notices(notices_of(anchor.meta), notices)
    weights = WeightSet(tensors, meta, str(path))
    weights.check_finite()
    return weights


def _adopted(
    checkpoint: Checkpoint, anchor: WeightSet, *, prompts: Prompts | None, device: str
) -> tuple[dict[str, Array], str]:
    """The tensors of a foreign checkpoint by the anchor's names, and whose head is among them; see `adopt`."""
    tower = [name.removeprefix("visual.") for name in anchor.tensors if name.startswith("visual.")]
    prefix = prefix_of_tower(checkpoint, tower)
    names = {f"visual.{name}": prefix + name for name in tower}
    layer = _linear_head(checkpoint, set(names.values()))
    if layer is not None:
        parameters = ("weight", "bias") if f"{layer}.bias" in checkpoint.tensors else ("weight",)
        names |= {f"head.{parameter}": f"{layer}.{parameter}" for parameter in parameters}
    _check_tower(checkpoint, prefix, names, anchor)
    _check_other_heads(checkpoint, names.values(), anchor, layer=layer)
    tensors = {ours: _read(checkpoint.tensors[theirs]) for ours, theirs in names.items()}
    if layer is not None:
        head = "own"
        features = "normalised features" if anchor.meta["architecture"].get("normalise", True) else "its features"
        notice(checkpoint.source, f"its head {layer} is taken as a layer over {features}")
        tensors.setdefault("head.bias", np.zeros_like(anchor.tensors["head.bias"]))
    elif prompts is not None and "classes" in anchor.meta and (clip := _whole_clip(checkpoint, prefix, anchor)):
        head = "zero-shot"
        tensors |= head_of(clip, anchor.meta["classes"], prompts, device=device)
    else:
        head = "anchor"
        notice(checkpoint.source, "no head in it that can be used: the anchor's is")
        tensors |= {name: anchor.tensors[name] for name in ("head.weight", "head.bias")}
    return tensors, head


def adopt_seed(
    checkpoint: Path, anchor: WeightSet, *, seed: int, prompts: Prompts | None = None, device: str = "cpu"
) -> WeightSet:
    """A fine-tuned checkpoint, adopted, as the weight set of a seed: however it was made, here it counts as that.

    Raises:
        WeightsError: as `adopt`.
    """
    weights = adopt(checkpoint, anchor, prompts=prompts, device=device)
    head = weights.meta["made_by"].get("options", {}).get("head", "own")
    origin = made_by(stage="finetune", seed=seed, source=Path(checkpoint).name, options={"head": head})
    return WeightSet(weights.tensors, {**weights.meta, "made_by": origin}, weights.source)
