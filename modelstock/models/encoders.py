"""Config, tokenizer and pooling in the folder of an encoder of the library transformers."""

import json
from pathlib import Path
from typing import Any

from modelstock.data.tokens import packed_tokenizer
from modelstock.errors import ParamsError
from modelstock.models.towers import from_transformers

# pretrain.pooling -> what it is in an architecture: open_clip's names.
POOLERS = {"mean": "mean_pooler", "first": "cls_last_hidden_state_pooler", "pooler": "cls_pooler"}


def encoder_config(folder: Path, place: str) -> Any:
    """The config of transformers in a folder; code that comes with a model is never executed.

    Raises:
        ParamsError: a damaged config, a type that transformers does not know, or a model that is code of its own.
    """
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and b'"auto_map"' in path.read_bytes():
            raise ParamsError(
                place,
                got=f"a model that brings its own code (auto_map in {name}), which is not executed",
                expected="one that transformers knows",
                cure="where its weights are those of such a model, remove auto_map and set model_type",
            )
    with from_transformers(place, "the config of an encoder in config.json", cure="copy config.json again"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def pooling_of(folder: Path) -> str | None:
    """The pooling that sentence-transformers' files in a folder ask for; None where they are silent or unknown."""
    try:
        content = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        modes = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_max_tokens": "max",
            "pooling_mode_cls_token": "first",
        }
        taken = [name for key, name in modes.items() if content.get(key)]
    except (OSError, ValueError, AttributeError):
        return None
    return taken[0] if len(taken) == 1 else None


def tokenizer_of(name: str, *, vocabulary: int | None = None) -> tuple[dict[str, str], int]:
    """A tokenizer of transformers, packed, and the token that fills up. `vocabulary`: tokens that the encoder has.

    Raises:
        ParamsError: there is none, it is not written as one file, it fills up with nothing, it has more tokens than the
            encoder, or texts of it do not end in one token of their own.
    """
    place = f"tokenizer of {name}"
    wanted = "tokenizer.json, or what transformers makes it of"
    with from_transformers(place, wanted, cure="copy tokenizer.json and tokenizer_config.json again"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        pad = tokenizer.pad_token_id
    problem = None
    if backend is None:
        problem = "one that is not a file of `tokenizers`"
    elif pad is None:
        problem = "one without a token that fills up"
    elif vocabulary is not None and (most := max(backend.get_vocab().values(), default=0)) >= vocabulary:
        problem = f"a token {most} for an encoder of {vocabulary} tokens"
    else:
        backend.no_padding()
        backend.no_truncation()
        # Texts are cut as transformers cuts them: the beginning is kept, and the last token, which is the text's end.
        whole, empty = backend.encode("a b c d e f g h").ids, backend.encode("").ids
        backend.enable_truncation(max(4, len(empty)))
        cut = backend.encode("a b c d e f g h").ids
        backend.no_truncation()
        if not empty or cut != [*whole[: len(cut) - 1], whole[-1]]:
            problem = "one that does not end a text with one token, such as [SEP]"
    if problem is not None:
        raise ParamsError(
            place, got=problem, expected="a tokenizer.json with a padding token", cure="name another model"
        )
    return packed_tokenizer(backend.to_str()), int(pad)
