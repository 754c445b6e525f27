"""Texts as the tokens that a tower takes."""

import base64
import html
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import ftfy
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelstock.errors import WeightsError

Tokens = NDArray[np.int64]


def packed_tokenizer(text: str) -> dict[str, str]:
    """The content of a `tokenizer.json` as a preprocess keeps it: packed, with its sha256.

    It is part of every weight set, which thereby says of itself how a text becomes tokens; a vocabulary of 30,000
    words takes 150 kB.
    """
    content = text.encode()
    packed = base64.b64encode(zlib.compress(content, 9)).decode()
    return {"library": "tokenizers", "json": packed, "sha256": sha256(content).hexdigest()}


def unpacked_tokenizer(tokenizer: Mapping[str, str]) -> str:
    """The content of `tokenizer.json` again.

    Raises:
        WeightsError: it is not what was packed.
    """
    try:
        content = zlib.decompress(base64.b64decode(tokenizer["json"], validate=True))
        whole = sha256(content).hexdigest() == tokenizer["sha256"]
    except (KeyError, ValueError, zlib.error):
        whole = False
    if not whole:
        raise WeightsError(
            "preprocess.tokenizer",
            got="a tokenizer that is not as it was written",
            expected="what has its sha256",
            cure="make the weight set again from its anchor",
        )
    return content.decode()


def repacked(tokenizer: Mapping[str, str]) -> dict[str, str]:
    """A packed tokenizer, as the installed version of `tokenizers` writes it: to be compared by its sha256."""
    from tokenizers import Tokenizer

    return packed_tokenizer(Tokenizer.from_str(unpacked_tokenizer(tokenizer)).to_str())


@dataclass(frozen=True)
class Tokenization:
    """How a text becomes tokens: a preprocess of the modality text.

    `tokenizer`: JSON of `library` (open_clip, or tokenizers with its packed file). `cleaning`: what is done to a text
    first, by open_clip's names, or none. `length`: the most tokens; more are cut off, but for the last, the end of the
    text. `pad`: the token that fills up. `padding`: to the longest of a batch, or always to `length`.
    """

    tokenizer: str
    cleaning: str
    length: int
    pad: int
    padding: str

    @classmethod
    def of(cls, preprocess: Mapping[str, Any]) -> "Tokenization":
        """The tokenization that a weight set's metadata asks for."""
        tokenizer = json.dumps(preprocess["tokenizer"], sort_keys=True)
        return cls(tokenizer, preprocess["cleaning"], preprocess["length"], preprocess["pad"], preprocess["padding"])

    def __call__(self, text: str) -> Tokens:
        """A text's tokens, at most `length`, not filled up."""
        tokens = _encoder(self.tokenizer)(_cleaned(text, self.cleaning))
        if len(tokens) > self.length:
            tokens = [*tokens[: self.length - 1], tokens[-1]]
        return np.array(tokens, np.int64)

    def is_too_long(self, text: str) -> bool:
        """Whether a text has more tokens than are taken."""
        return len(_encoder(self.tokenizer)(_cleaned(text, self.cleaning))) > self.length

    def batch(self, texts: Sequence[Tokens]) -> Tensor:
        """Tokens of several texts, filled up: (B, L) int64."""
        longest = self.length if self.padding == "length" else max(map(len, texts))
        filled = np.full((len(texts), longest), self.pad, np.int64)
        for row, tokens in zip(filled, texts, strict=True):
            row[: len(tokens)] = tokens
        return torch.from_numpy(filled)

    @property
    def example_bytes(self) -> int:
        """Bytes of one text in a batch, at most."""
        return 8 * self.length


def _cleaned(text: str, cleaning: str) -> str:
    """As open_clip cleans: mended mojibake, HTML unescaped twice, spaces made one; `lower`, `canonicalize` do more."""
    if cleaning == "none":
        return text
    if cleaning == "canonicalize":
        from open_clip.tokenizer import canonicalize_text

        canonical: str = canonicalize_text(html.unescape(html.unescape(ftfy.fix_text(text))).strip())
        return canonical
    plain = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
    return plain.lower() if cleaning == "lower" else plain


@lru_cache(maxsize=8)
def _encoder(tokenizer: str) -> Callable[[str], list[int]]:
    """Text -> its tokens with those of beginning and end, however many they are.

    Raises:
        ModuleNotFoundError: `tokenizers` is not installed.
        WeightsError: a tokenizer that is damaged or of no library that is known.
    """
    facts = json.loads(tokenizer)
    if facts.get("library") == "open_clip":
        from open_clip.tokenizer import SimpleTokenizer

        clip = SimpleTokenizer()
        clip.clean_fn = str  # what comes is cleaned already
        return lambda text: [clip.sot_token_id, *clip.encode(text), clip.eot_token_id]
    if facts.get("library") != "tokenizers":
        raise WeightsError(
            "preprocess.tokenizer",
            got=f"a tokenizer of {str(facts.get('library'))[:40]!r}",
            expected="open_clip or tokenizers",
            cure="read it with the version of modelstock that wrote it",
        )
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(unpacked_tokenizer(facts))
    whole.no_padding()
    whole.no_truncation()
    return lambda text: whole.encode(text).ids
