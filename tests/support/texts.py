"""A tiny encoder of texts as transformers publishes one, anchors of text towers, and texts with labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from modelstock.models.anchor import text_anchor_of
from modelstock.models.text_towers import load_encoder, text_side
from modelstock.params import TransformersPretraining
from modelstock.weights.weight_set import WeightSet
from tests.support.models import TEXT, TINY, clip_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD = ["good", "great", "fine", "lovely", "superb", "warm", "bright", "clever"]
BAD = ["bad", "awful", "poor", "dull", "cold", "dark", "silly", "broken"]
PLAIN = [
    "a",
    "an",
    "the",
    "film",
    "book",
    "plot",
    "actor",
    "scene",
    "was",
    "is",
    "and",
    "but",
    "very",
    "so",
    "it",
    "we",
    "they",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*SPECIAL, *GOOD, *BAD, *(w for w in PLAIN if len(w) > 1), *LETTERS, *(f"##{c}" for c in LETTERS)]
LENGTH = 12  # tokens that an anchor takes of a text


def encoder_folder(path: Path, *, seed: int = 0, dropout: float = 0.1) -> Path:
    """Write a BERT of 2 layers with width 32 and random weights: config.json, model.safetensors, tokenizer.json."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import BertConfig, BertModel

    path.mkdir(parents=True)
    vocabulary = {piece: number for number, piece in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
    (path / "config.json").write_text(json.dumps({**config.to_diff_dict(), "model_type": "bert"}))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / "model.safetensors")
    return path


def encoder(folder: Path, **options: Any) -> WeightSet:
    """The encoder of a folder as a weight set without a head."""
    settings = {"source": "transformers", "model": str(folder), "length": LENGTH, **options}
    return load_encoder(TransformersPretraining.model_validate(settings))


def text_anchor(folder: Path, names: Sequence[str] = ("bad", "good"), **options: Any) -> WeightSet:
    """The anchor of an encoder in a folder, with the head of `names`, scaled to 10. `options`: of the pretraining."""
    anchor = text_anchor_of(encoder(folder, **options), list(names), [lambda name: f"a {name} film", lambda name: name])
    head = 10 * np.asarray(anchor.tensors["head.weight"])
    return WeightSet({**anchor.tensors, "head.weight": head}, anchor.meta, "anchor")


SMALL_CLIP = {**TINY, "embed_dim": 32, "text_cfg": {**TEXT, "width": 16}}


def clip_text_anchor(names: Sequence[str] = ("bad", "good"), *, length: int | None = None, seed: int = 0) -> WeightSet:
    """The anchor of the text side of a tiny CLIP of open_clip, with random weights."""
    side = text_side(clip_of(SMALL_CLIP, seed)[1], length=length)
    return text_anchor_of(side, list(names), [lambda name: name])


class Sentences:
    """Texts with labels, as a data set of texts gives them. The first has more tokens than an anchor takes."""

    def __init__(self, count: int = 24, *, seed: int = 0) -> None:
        self.labels: NDArray[np.int64] = np.arange(count) % 2
        random = np.random.default_rng(seed)
        self.texts = []
        for label in self.labels:
            words = [str(w) for w in random.choice(PLAIN, random.integers(1, LENGTH - 3))]
            words.insert(int(random.integers(len(words) + 1)), str(random.choice([BAD, GOOD][label])))
            self.texts.append(" ".join(words))
        self.texts[0] = " ".join([BAD[0]] * (2 * LENGTH))

    def text(self, row: int) -> str:
        """A text."""
        return self.texts[row]
