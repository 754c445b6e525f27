"""An encoder as a folder that transformers and sentence-transformers load."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelstock.data.tokens import unpacked_tokenizer
from modelstock.errors import WeightsError, few
from modelstock.files import dump_json
from modelstock.models.export_clip import write_head
from modelstock.models.names import CLASSES, HEAD
from modelstock.models.towers import config_of, from_transformers
from modelstock.weights.format import write_arrays
from modelstock.weights.weight_set import WeightSet

_PREFIX = "text.transformer."
# What special tokens are usually called.
_SPECIAL = {
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_MODES = {"mean_pooler": "mean_tokens", "cls_last_hidden_state_pooler": "cls_token"}
_POOLED = {
    "mean_pooler": [
        '    mask = tokens["attention_mask"].unsqueeze(-1)',
        "    features = (states * mask).sum(dim=1) / mask.sum(dim=1)",
    ],
    "cls_last_hidden_state_pooler": ["    features = states[:, 0]"],
}


def write(weights: WeightSet, clip: WeightSet | None, names: Sequence[str], folder: Path) -> None:
    """Write config, weights and tokenizer as transformers has them, sentence-transformers' modules, and the head.

    Where the encoder's own pooler is in no feature it is zero in the file, so that loading misses nothing.

    Raises:
        WeightsError: a tower or a tokenizer with more to it than transformers has, such as a projection.
    """
    architecture, preprocess = weights.meta["architecture"], weights.meta["preprocess"]
    more = [name for name in ("projection",) if architecture.get(name)]
    more += [f"cleaning {preprocess['cleaning']}"] if preprocess["cleaning"] != "none" else []
    if more or preprocess["tokenizer"].get("library") != "tokenizers":
        raise WeightsError(
            weights.source,
            got=f"the text tower of a CLIP ({few(more) or 'tokens of open_clip'})",
            expected="an encoder as transformers has it",
            cure="make it with pretrain.source: transformers",
        )
    tensors, class_name = _tensors(weights)
    config = config_of(architecture)
    config.architectures, config.dtype = [class_name], torch.float32
    (folder / "config.json").write_text(dump_json(json.loads(config.to_json_string())), encoding="utf-8")
    write_arrays(folder / "model.safetensors", tensors)
    content = unpacked_tokenizer(preprocess["tokenizer"])
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    special = _special_tokens(json.loads(content), preprocess["pad"])
    (folder / "special_tokens_map.json").write_text(dump_json(special), encoding="utf-8")
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": preprocess["length"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "truncation_side": "right",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(dump_json(tokenizer), encoding="utf-8")
    write_head(weights, names, folder)
    if architecture["pooling"] in _MODES:
        _write_modules(architecture, preprocess, folder)


def _tensors(weights: WeightSet) -> tuple[dict[str, Any], str]:
    """The encoder's tensors by the names of AutoModel, and its class."""
    with from_transformers("export", "the config of an encoder"), torch.device("meta"):
        from transformers import AutoModel

        model: Any = AutoModel.from_config(config_of(weights.meta["architecture"]))  # type: ignore[no-untyped-call]
    expected = model.state_dict()
    tensors = {n.removeprefix(_PREFIX): t for n, t in weights.tensors.items() if n.startswith(_PREFIX)}
    tensors |= {
        name: np.zeros(tuple(tensor.shape), np.float32)
        for name, tensor in expected.items()
        if name not in tensors and name.startswith("pooler.")
    }
    if problems := sorted(tensors.keys() ^ expected.keys()):
        raise WeightsError(
            weights.source, got=few(problems), expected="the tensors of its config", cure="make it again"
        )
    return tensors, type(model).__name__


def _special_tokens(tokenizer: Mapping[str, Any], pad: int) -> dict[str, str]:
    """The names of a tokenizer's special tokens."""
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer["model"].get("vocab", {})
    pieces = (
        vocabulary if isinstance(vocabulary, dict) else {piece: number for number, (piece, _) in enumerate(vocabulary)}
    )
    known = {**{number: piece for piece, number in pieces.items()}, **added}
    special = {name: token for name, tokens in _SPECIAL.items() for token in tokens if token in added.values()}
    return {"pad_token": known[pad], **special}


def _write_modules(architecture: Mapping[str, Any], preprocess: Mapping[str, Any], folder: Path) -> None:
    """Write what makes sentence-transformers compute the same features."""
    names = [("", "Transformer"), ("1_Pooling", "Pooling")]
    names += [("2_Normalize", "Normalize")] if architecture.get("normalise", True) else []
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (path, name) in enumerate(names)
    ]
    for path, _ in names[1:]:
        (folder / path).mkdir()
    (folder / "modules.json").write_text(dump_json(modules), encoding="utf-8")
    limits = {"max_seq_length": preprocess["length"], "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(dump_json(limits), encoding="utf-8")
    modes = {
        f"pooling_mode_{mode}": mode == _MODES[architecture["pooling"]] for mode in (*_MODES.values(), "max_tokens")
    }
    pooling = {"word_embedding_dimension": architecture["width"], **modes}
    (folder / "1_Pooling" / "config.json").write_text(dump_json(pooling), encoding="utf-8")


def notes(weights: WeightSet) -> list[str]:
    """What is to be known of the files."""
    architecture = weights.meta["architecture"]
    normalised = "normalised " if architecture.get("normalise", True) else ""
    own = architecture["pooling"] == "cls_pooler"
    return [
        f"`{HEAD}` is the fine-tuned head, over the {normalised}features; `{CLASSES}` has its classes in order. "
        + (
            "The features are the encoder's pooler's, which sentence-transformers does not take: use the lines above."
            if own
            else "`SentenceTransformer` of this folder gives the features. Where the encoder has a pooler of its own, "
            "it is in no feature, and zero in the file."
        )
    ]


def example(weights: WeightSet, name: str) -> list[str]:
    """Python that classifies texts with the folder `name`."""
    architecture = weights.meta["architecture"]
    normalise = "    features = torch.nn.functional.normalize(features, dim=-1)"
    pooled = ["    states = model(**tokens).last_hidden_state", *_POOLED.get(architecture["pooling"], [])]
    return [
        "import json, torch",
        "from pathlib import Path",
        "from safetensors.torch import load_file",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f"folder = Path({json.dumps(name)})",
        "tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()",
        f'head, classes = load_file(folder / "{HEAD}"), json.loads((folder / "{CLASSES}").read_text())',
        'tokens = tokenizer(["a text"], padding=True, truncation=True, return_tensors="pt")',
        "with torch.inference_mode():",
        *(pooled if architecture["pooling"] in _POOLED else ["    features = model(**tokens).pooler_output"]),
        *([normalise] if architecture.get("normalise", True) else []),
        '    logits = features @ head["weight"].T + head["bias"]',
        "print([classes[number] for number in logits.argmax(dim=1)])",
    ]
