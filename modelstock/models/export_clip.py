"""A fine-tuned tower in its CLIP, as a folder that open_clip loads."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelstock.errors import WeightsError, few
from modelstock.files import dump_json
from modelstock.models.names import CLASSES, HEAD
from modelstock.models.pretrained import CONFIG
from modelstock.models.towers import kind_of
from modelstock.weights.differences import differences
from modelstock.weights.format import write_arrays
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet

WEIGHTS = "open_clip_model.safetensors"
_TEXT = ("embed_dim", "text_cfg", "quick_gelu")  # of a CLIP's config, what its text tower is built from
_NONE = np.empty(0)


def write(weights: WeightSet, clip: WeightSet | None, names: Sequence[str], folder: Path) -> None:
    """Write the CLIP with the tower of `weights` in the place of its own, the head and the classes' names.

    Raises:
        WeightsError: weights that do not descend from the clip, or whose texts open_clip would take in another way.
    """
    assert clip is not None, "of these kinds there is a CLIP"
    _check_origin(weights, clip)
    context = clip.meta["architecture"]["text_cfg"].get("context_length", 77)
    preprocess = weights.meta["preprocess"]
    if _side(weights) == "text" and preprocess["padding"] == "length" and preprocess["length"] < context:
        raise WeightsError(
            weights.source,
            got=f"texts of {preprocess['length']} tokens for a tower that sees what fills up",
            expected=f"{context}, as open_clip fills up",
            cure="fine-tune with pretrain.length: null",
        )
    both = {**clip.tensors, **_tower(weights, clip)}
    WeightSet(both, {}, clip.source).check_finite()
    of_images = weights if _side(weights) == "image" else clip
    preprocess = {"resize_mode": "shortest", **of_images.meta["preprocess"]}
    config = {
        "model_cfg": clip.meta["architecture"],
        "preprocess_cfg": {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")},
    }
    (folder / CONFIG).write_text(dump_json(config), encoding="utf-8")
    write_arrays(folder / WEIGHTS, both)
    write_head(weights, names, folder)


def write_head(weights: WeightSet, names: Sequence[str], folder: Path) -> None:
    """Write the head, `weight` (C, D) and `bias` (C,) as torch's linear layer has them, and its classes in order."""
    write_arrays(folder / HEAD, {name: weights.tensors[f"head.{name}"] for name in ("weight", "bias")})
    (folder / CLASSES).write_text(dump_json(list(names)), encoding="utf-8")


def notes(weights: WeightSet) -> list[str]:
    """What is to be known of the files."""
    side, other = ("image", "text") if _side(weights) == "image" else ("text", "image")
    architecture = weights.meta["architecture"]
    tokenizer = architecture.get("config", architecture).get("text_cfg", {}).get("hf_tokenizer_name")
    also = ", so zero-shot prompts work as well" if side == "image" else ""
    return [
        f"`{HEAD}` is the fine-tuned head, over normalised {side} features; `{CLASSES}` has its classes in order. "
        f"The {other} tower is the backbone's, unchanged{also}.",
        *([f"The tokenizer is not in this folder: it is that of `{tokenizer}`."] if tokenizer else []),
    ]


def _check_origin(weights: WeightSet, clip: WeightSet) -> None:
    """Raise WeightsError unless these are a weight set with a head and the CLIP that it descends from."""
    if "architecture" not in clip.meta or "logit_scale" not in clip.tensors:
        raise WeightsError(
            clip.source,
            got="a file without architecture or text tower",
            expected="a CLIP with both towers",
            cure="name the file of the stage pretrain, or of `modelstock anchor --clip-out`",
        )
    tuned, built = weights.meta["architecture"], clip.meta["architecture"]
    if _side(weights) == "text":
        tuned, built = ({key: part.get(key) for key in _TEXT} for part in (tuned["config"], built))
    if differing := sorted(key for key in tuned.keys() | built.keys() if tuned.get(key) != built.get(key)):
        raise WeightsError(
            clip.source,
            got=f"another architecture ({', '.join(differing)} differ)",
            expected=f"that of {weights.source}",
            cure="name the CLIP that the weights were fine-tuned from",
        )
    ancestors = {weights.meta.get("clip"), *weights.meta.get("parents", [])}
    if clip.identity not in ancestors:
        recorded = str(weights.meta.get("clip", ""))[:12] or "none recorded"
        raise WeightsError(
            clip.source,
            got=f"the CLIP {clip.identity[:12]}",
            expected=f"the ancestor of {weights.source} ({recorded})",
            cure="name the CLIP that its anchor was made of",
        )
    tower, expected = _tower(weights, clip), clip.tensors
    if problems := differences(tower, {name: expected.get(name, _NONE) for name in tower}, whose="the CLIP's"):
        raise WeightsError(
            weights.source,
            got=few(problems),
            expected=f"the {_side(weights)} tower of {clip.source}",
            cure="make it again",
        )


def _side(weights: WeightSet) -> str:
    return kind_of(weights).modality


def _tower(weights: WeightSet, clip: WeightSet) -> dict[str, Array]:
    """The tensors of the fine-tuned tower, by the CLIP's names."""
    prefix = kind_of(weights).prefix
    tower = {name: tensor for name, tensor in weights.tensors.items() if name.startswith(prefix)}
    # A CLIP without custom text tower has its tensors beside the image tower's.
    if prefix == "text." and not any(name.startswith(prefix) for name in clip.tensors):
        return {name.removeprefix(prefix): tensor for name, tensor in tower.items()}
    return tower


def image_example(weights: WeightSet, name: str) -> list[str]:
    """Python that classifies an image with the folder `name`."""
    return [
        "import json, open_clip, torch",
        "from pathlib import Path",
        "from PIL import Image",
        "from safetensors.torch import load_file",
        "",
        f"folder = Path({json.dumps(name)})",
        'model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")',
        f'head, classes = load_file(folder / "{HEAD}"), json.loads((folder / "{CLASSES}").read_text())',
        "with torch.inference_mode():",
        '    pixels = preprocess(Image.open("image.png").convert("RGB")).unsqueeze(0)',
        "    features = model.eval().encode_image(pixels, normalize=True)",
        '    logits = features @ head["weight"].T + head["bias"]',
        "print(classes[logits.argmax().item()])",
    ]


def text_example(weights: WeightSet, name: str) -> list[str]:
    """Python that classifies texts with the folder `name`."""
    preprocess, text = weights.meta["preprocess"], weights.meta["architecture"]["config"]["text_cfg"]
    length, context = preprocess["length"], text.get("context_length", 77)
    tokens = ['    tokens = tokenize(["a text"])']
    if length < context:  # open_clip's own towers take all of their length
        padding = f"(0, {context - length}), value={preprocess['pad']}"
        tokens = [
            f'    tokens = tokenize(["a text"], context_length={length})',
            f"    tokens = torch.nn.functional.pad(tokens, {padding})",
        ]
    return [
        "import json, open_clip, torch",
        "from pathlib import Path",
        "from safetensors.torch import load_file",
        "",
        f"folder = Path({json.dumps(name)})",
        'model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")',
        'tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")',
        f'head, classes = load_file(folder / "{HEAD}"), json.loads((folder / "{CLASSES}").read_text())',
        "with torch.inference_mode():",
        *tokens,
        "    features = model.eval().encode_text(tokens, normalize=True)",
        '    logits = features @ head["weight"].T + head["bias"]',
        "print([classes[number] for number in logits.argmax(dim=1)])",
    ]
