"""Other people's fine-tuned checkpoints as weight sets that merge with an anchor."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from modelstock.data.tokens import repacked
from modelstock.errors import WeightsError, few
from modelstock.files import as_named, on_this_machine
from modelstock.models.anchor import head_of, text_anchor_of
from modelstock.models.encoders import POOLERS, encoder_config, tokenizer_of
from modelstock.models.heads import Prompts
from modelstock.models.names import CLASSES, HEAD, UNUSED, beyond_tower, prefix_of_tower
from modelstock.models.towers import TOWERS, build_clip, config_of, kind_of
from modelstock.notices import collected, notice
from modelstock.weights.checkpoints import open_checkpoint, open_safetensors, weights_in
from modelstock.weights.differences import differences
from modelstock.weights.origin import kept_notices, made_by, notices_of
from modelstock.weights.tensors import FLOATS, Array, Checkpoint, StoredTensor
from modelstock.weights.weight_set import WeightSet, load_weights

# What two encoders of the same shapes may compute in other ways by.
_COMPUTES = (
    "model_type",
    "num_attention_heads",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "norm_eps",
    "position_embedding_type",
    "pad_token_id",
)
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


def _tower_of(checkpoint: Checkpoint, anchor: WeightSet) -> tuple[str, dict[str, str]]:
    """What stands before the names of the anchor's tower in a checkpoint, and our names -> its names.

    Raises:
        WeightsError: no such tower in it, or two.
    """
    kind = kind_of(anchor)
    ours, tower = kind.prefix, [name for name in anchor.tensors if name.startswith(kind.prefix)]
    # An encoder of transformers without projection is all that others have, by its own names.
    if kind is TOWERS["transformers"] and all(name.startswith(f"{ours}transformer.") for name in tower):
        ours = f"{ours}transformer."
    names = [name.removeprefix(ours) for name in tower]
    prefix = prefix_of_tower(
        checkpoint, names, f"{kind.modality} tower", default=kind.prefix if ours == kind.prefix else ""
    )
    return prefix, {ours + name: prefix + name for name in names}


def _check_tower(checkpoint: Checkpoint, prefix: str, names: Mapping[str, str], anchor: WeightSet) -> None:
    """Compare the tensors that are taken from a checkpoint, our name -> its name, with the anchor's.

    Raises:
        WeightsError: other shapes, or more tensors in the tower: the file is of another architecture.
    """
    kind, taken = kind_of(anchor), set(names.values())
    if kind.modality == "text":
        tower = {name.removeprefix(prefix) for name in taken if name.startswith(prefix)}
        more = beyond_tower(checkpoint, prefix, tower)
    else:
        # Beside a tower without a prefix of its own lie the numbers of the CLIP.
        beside = () if prefix.endswith("visual.") else ("logit_scale", "logit_bias")
        more = [n for n in checkpoint.tensors if n.startswith(prefix) and n.removeprefix(prefix) not in beside]
    tensors = {name: checkpoint.tensors[name] for name in (*taken, *more)}
    expected = {theirs: anchor.tensors[ours] for ours, theirs in names.items()}
    if problems := differences(tensors, expected, whose="the anchor's"):
        rows = [n for n in expected if "embeddings.weight" in n or "token_embedding" in n or "tok_embeddings" in n]
        words = any(tensors[n].shape[0] != expected[n].shape[0] and len(expected[n].shape) == 2 for n in rows)
        raise WeightsError(
            checkpoint.source,
            got=few(problems),
            expected=f"the anchor's tensors and no more in its {kind.modality} tower",
            cure="name a checkpoint of the anchor's architecture and classes"
            + ("; one with more or fewer tokens cannot be merged: fine-tune with the anchor's tokenizer" * words),
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


def _others(checkpoint: Checkpoint, prefix: str, taken: Collection[str], anchor: WeightSet) -> list[str]:
    """Tensors beside tower and head that are of no other part that such a checkpoint is known to have.

    Known are a CLIP's other tower and its numbers, and an encoder's own pooler and language head.
    """
    rest = sorted(checkpoint.tensors.keys() - set(taken))
    if "text_cfg" in anchor.meta["architecture"]:
        with torch.device("meta"):
            clip = build_clip(anchor.meta["architecture"]).state_dict()
        # The text tower's, under whatever prefix.
        ends = tuple(f".{name}" for name in clip if not name.startswith("visual."))
        return [name for name in rest if not f".{name}".endswith(ends)]
    if kind_of(anchor).modality == "text":
        rest = [
            name for name in rest if ".visual." not in f".{name}" and not name.endswith(("logit_scale", "logit_bias"))
        ]
        return [name for name in rest if not name.removeprefix(prefix).startswith(UNUSED)]
    return rest


def _head_beside(checkpoint: Checkpoint, anchor: WeightSet) -> Mapping[str, StoredTensor]:
    """The head that an export of modelstock has in a file of its own; nothing where the checkpoint is none.

    Raises:
        WeightsError: it is for other classes than the anchor's.
    """
    folder = Path(checkpoint.source).parent
    if not (folder / HEAD).is_file() or not (folder / CLASSES).is_file() or Path(checkpoint.source).name == HEAD:
        return {}
    try:
        names = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        names = None
    if names != anchor.meta.get("classes", names):
        raise WeightsError(
            folder / CLASSES,
            got="other classes",
            expected="the anchor's, in their order",
            cure="export a weight set of the same classes",
        )
    return {f"head.{name}": tensor for name, tensor in open_safetensors(folder / HEAD).tensors.items()}


def _check_other_heads(checkpoint: Checkpoint, others: Sequence[str], anchor: WeightSet, *, layer: str | None) -> None:
    """Refuse, or where a head was taken give a notice of, further tensors of the head's shape: any may be the head.

    Raises:
        WeightsError: such a tensor, and no head by its name; or, of an encoder, tensors between its tower and its head.
    """
    alike = [name for name in others if checkpoint.tensors[name].shape == anchor.tensors["head.weight"].shape]
    if layer is None and alike:
        raise WeightsError(
            checkpoint.source,
            got=f"{few(alike)} of the head's shape, under no name of a head",
            expected=f"a linear layer named {', '.join(_HEADS)}, or none",
            cure=f"rename it to head.weight (and head.bias), or leave {'it' if len(alike) == 1 else 'them'} out",
        )
    if layer is not None and others and kind_of(anchor) is TOWERS["transformers"]:
        raise WeightsError(
            checkpoint.source,
            got=f"{few(others)} beside the encoder and its head {layer}",
            expected="a head that is one linear layer on the encoder's features",
            cure="leave out what is in no feature; a head of several layers cannot be taken, but the encoder alone",
        )
    if alike:
        notice(checkpoint.source, f"the head is {layer}; {few(alike)} of the same shape left aside")


def _check_beside(folder: Path, checkpoint: Checkpoint, anchor: WeightSet, *, layer: str | None) -> bool:
    """Compare config and tokenizer beside an encoder's checkpoint with the anchor's; whether they say what the head is.

    Raises:
        WeightsError: another encoder, another tokenizer, or a head over other features than the anchor's.
        ParamsError: files that are damaged.
    """
    architecture = anchor.meta["architecture"]
    if (folder / "tokenizer.json").is_file():
        theirs, _ = tokenizer_of(str(folder))
        ours = repacked(anchor.meta["preprocess"]["tokenizer"])
        if theirs["sha256"] != ours["sha256"]:
            raise WeightsError(
                folder / "tokenizer.json",
                got=f"another tokenizer ({theirs['sha256'][:12]})",
                expected=f"the anchor's ({ours['sha256'][:12]})",
                cure="fine-tune with the anchor's tokenizer, or make the anchor from the encoder of this one",
            )
    if not (folder / "config.json").is_file():
        return False
    config, expected = encoder_config(folder, str(folder)), config_of(architecture)
    facts = [(name, getattr(config, name, None), getattr(expected, name, None)) for name in _COMPUTES]
    if problems := [f"{name} {got!r}, the anchor's {wanted!r}" for name, got, wanted in facts if got != wanted]:
        raise WeightsError(
            folder / "config.json",
            got=few(problems),
            expected="the encoder of the anchor",
            cure="name a checkpoint that was fine-tuned from it",
        )
    kinds = [name for name in config.architectures or [] if name.endswith("ForSequenceClassification")]
    if layer is None or not kinds:
        return False
    if architecture["pooling"] != POOLERS["pooler"] or architecture.get("normalise", True):
        raise WeightsError(
            checkpoint.source,
            got=f"a head over the encoder's pooler, not normalised ({kinds[0]})",
            expected=f"one over {_features(anchor)} features, as the anchor's",
            cure="make the anchor with pretrain.pooling: pooler and normalise: false, or save the encoder without head",
        )
    return True


def _features(anchor: WeightSet) -> str:
    """What a head of the anchor's is put on, in words; empty where no other features are usual."""
    architecture = anchor.meta["architecture"]
    words = ["normalised"] if architecture.get("normalise", True) else []
    words += [name for name, pooler in POOLERS.items() if pooler == architecture.get("pooling")]
    return " ".join(words)


def _whole_clip(checkpoint: Checkpoint, prefix: str, anchor: WeightSet) -> WeightSet | None:
    """Both towers of a checkpoint, if it holds the text tower of the anchor's architecture whole."""
    if not prefix.endswith("visual.") or "text_cfg" not in anchor.meta["architecture"]:
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
    prefix) the tower is what carries the anchor's names. The head is the file's own linear layer (C, D) over features
    as the anchor's, or beside it in an export; else zero-shot from its own text tower, if it is a CLIP, the anchor
    names its classes, and `prompts` are given; else the anchor's. Config and tokenizer beside an encoder must be the
    anchor's.
    `meta["made_by"]["options"]["head"]` says which head: own, zero-shot or anchor. Which of several models or heads was
    taken, and what is assumed of the head, is a notice, and in the metadata.

    Raises:
        WeightsError: a pickle of more than tensors, a tower or a head that does not fit the anchor, a tensor that may
            be the head under another name, weights of ours that were made from another anchor, NaN or infinity.
        DamagedError: a weight set of ours that is not as it was written.
    """
    path = Path(path)
    with collected() as notices:
        file = weights_in(path) if path.is_dir() else path
        checkpoint = open_checkpoint(file)
        if "architecture" in checkpoint.meta and "head.weight" in checkpoint.tensors:
            return _checked(load_weights(file), anchor)
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
    prefix, names = _tower_of(checkpoint, anchor)
    layer = _linear_head(checkpoint, set(names.values()))
    if layer is None and (own := _head_beside(checkpoint, anchor)):
        layer, checkpoint = "head", replace(checkpoint, tensors={**checkpoint.tensors, **own})
    if layer is not None:
        parameters = ("weight", "bias") if f"{layer}.bias" in checkpoint.tensors else ("weight",)
        names |= {f"head.{parameter}": f"{layer}.{parameter}" for parameter in parameters}
    _check_tower(checkpoint, prefix, names, anchor)
    _check_other_heads(checkpoint, _others(checkpoint, prefix, names.values(), anchor), anchor, layer=layer)
    certain = False
    if kind_of(anchor) is TOWERS["transformers"]:
        certain = _check_beside(Path(checkpoint.source).parent, checkpoint, anchor, layer=layer)
        if beside := sorted(checkpoint.tensors.keys() - set(names.values())):
            notice(checkpoint.source, f"{few(beside)} {'is' if len(beside) == 1 else 'are'} in no feature, left aside")
    tensors = {ours: _read(checkpoint.tensors[theirs]) for ours, theirs in names.items()}
    if layer is not None:
        head = "own"
        if not certain and (features := _features(anchor)):
            notice(checkpoint.source, f"its head {layer} is taken as a layer over {features} features")
        tensors.setdefault("head.bias", np.zeros_like(anchor.tensors["head.bias"]))
    elif prompts is not None and (zero_shot := _zero_shot(checkpoint, prefix, tensors, anchor, prompts, device)):
        head = "zero-shot"
        tensors |= zero_shot
    else:
        head = "anchor"
        notice(checkpoint.source, "no head in it that can be used: the anchor's is")
        tensors |= {name: anchor.tensors[name] for name in ("head.weight", "head.bias")}
    return tensors, head


def _zero_shot(
    checkpoint: Checkpoint,
    prefix: str,
    tower: Mapping[str, Array],
    anchor: WeightSet,
    prompts: Prompts,
    device: str,
) -> Mapping[str, Array] | None:
    """The head that a CLIP's own text tower makes of the anchor's classes; None of a checkpoint that has none whole."""
    if "classes" not in anchor.meta:
        return None
    if kind_of(anchor).modality == "image":
        clip = _whole_clip(checkpoint, prefix, anchor)
        return None if clip is None else head_of(clip, anchor.meta["classes"], prompts, device=device)
    scale = prefix.removesuffix("transformer.").removesuffix("text.") + "logit_scale"
    if scale not in checkpoint.tensors or "templates" not in anchor.meta.get("made_by", {}).get("options", {}):
        return None
    clip = WeightSet({**tower, "logit_scale": _read(checkpoint.tensors[scale])}, anchor.meta, checkpoint.source)
    made = text_anchor_of(clip, anchor.meta["classes"], prompts, device=device)
    return {name: made.tensors[name] for name in ("head.weight", "head.bias")}


def adopt_seed(
    checkpoint: Path, anchor: WeightSet, *, seed: int, prompts: Prompts | None = None, device: str = "cpu"
) -> WeightSet:
    """A fine-tuned checkpoint, adopted, as the weight set of a seed: however it was made, here it counts as that.

    Raises:
        WeightsError: as `adopt`.
    """
    weights = adopt(on_this_machine(checkpoint), anchor, prompts=prompts, device=device)
    head = weights.meta["made_by"].get("options", {}).get("head", "own")
    origin = made_by(stage="finetune", seed=seed, source=Path(checkpoint).name, options={"head": head})
    notices = kept_notices(as_named(notices_of(weights.meta), checkpoint))
    return WeightSet(weights.tensors, {**weights.meta, **notices, "made_by": origin}, weights.source)
