"""Text towers as weight sets that classify texts: the text side of a CLIP, and encoders of the library transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from modelstock.errors import DataError, ParamsError, WeightsError, few
from modelstock.files import on_this_machine
from modelstock.models.encoders import POOLERS, encoder_config, pooling_of, tokenizer_of
from modelstock.models.heads import tokenizer_folder
from modelstock.models.names import beyond_tower, prefix_of_tower
from modelstock.models.pretrained import tower_of
from modelstock.models.towers import build_encoder, build_text, check_encoder, from_transformers, tensors_of
from modelstock.notices import notice
from modelstock.params import TransformersPretraining
from modelstock.weights.checkpoints import open_checkpoint, weights_in
from modelstock.weights.differences import differences
from modelstock.weights.origin import made_by
from modelstock.weights.tensors import Array
from modelstock.weights.weight_set import WeightSet

# Whose positions are counted from the token that fills up.
_COUNTED_FROM_PAD = ("roberta", "xlm-roberta", "camembert", "mpnet")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_PATTERNS = (
    "config.json",
    "*.safetensors",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.model",
    "1_Pooling/*",
)


# ---------------------------------------------------------------- the text side of a CLIP


def text_side(clip: WeightSet, *, length: int | None = None) -> WeightSet:
    """The text tower of a CLIP of open_clip as a tower of its own, and its `logit_scale`.

    `length`: the most tokens of a text; None: as many as the tower takes.

    Raises:
        ParamsError: a longer length than the tower's, or a tokenizer that is not had as a file.
        WeightsError: a weight set without a text tower.
    """
    config = clip.meta["architecture"]
    if "text_cfg" not in config or "logit_scale" not in clip.tensors:
        raise WeightsError(clip.source, got="no text tower", expected="a CLIP with both", cure="name another")
    text = dict(config["text_cfg"])
    context = int(text.get("context_length", 77))
    if length is not None and length > context:
        raise ParamsError("pretrain.length", got=length, expected=f"at most {context}, the tower's", cure="lower it")
    preprocess = _preprocess_of_clip(clip, text, length or context)
    architecture = _architecture_of_clip(config, text)
    with torch.device("meta"):
        tower = build_encoder(architecture) if architecture["kind"] == "transformers" else build_text(architecture)
    # A CLIP without custom text tower has its tensors beside the image tower's, by the same names.
    prefix = "text." if any(name.startswith("text.") for name in clip.tensors) else ""
    tensors = {
        f"text.{name}": clip.tensors[prefix + name] for name in tower.state_dict() if prefix + name in clip.tensors
    }
    if problems := differences(tensors, {f"text.{n}": t for n, t in tower.state_dict().items()}, whose="the tower's"):
        raise WeightsError(clip.source, got=few(problems), expected="its text tower", cure="name another CLIP")
    meta = {
        **{name: value for name, value in clip.meta.items() if name != "preprocess"},
        "architecture": architecture,
        "preprocess": preprocess,
        "clip": clip.identity,
    }
    return WeightSet({**tensors, "logit_scale": clip.tensors["logit_scale"]}, meta, clip.source)


def _architecture_of_clip(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    name = text.get("hf_model_name")
    if not name:
        parts = {key: config[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in config}
        return {"kind": "open_clip-text", "config": parts}
    with from_transformers(f"text tower {name}", f"the config of {name}"):
        from transformers import AutoConfig

        encoder = AutoConfig.from_pretrained(name)
    return {
        "kind": "transformers",
        "config": _plain_config(encoder),
        "pooling": text.get("hf_pooler_type") or "mean_pooler",
        "projection": text.get("hf_proj_type"),
        "width": config["embed_dim"],
    }


def _preprocess_of_clip(clip: WeightSet, text: Mapping[str, Any], length: int) -> dict[str, Any]:
    """How a CLIP's text tower takes texts: open_clip's tokenizer, or the one that its config names."""
    options = dict(text.get("tokenizer_kwargs") or {})
    unknown = sorted(options.keys() - {"clean"}) + ["tokenizer_mode"] * bool(text.get("tokenizer_mode"))
    if unknown:
        raise ParamsError(
            "pretrain.architecture",
            got=f"a tokenizer with {few(unknown)}",
            expected="one of which only `clean` is set",
            cure="name another CLIP",
        )
    name = text.get("hf_tokenizer_name")
    # With its causal mask, a text's end sees nothing of what fills up behind it; towers without one do.
    causal = not text.get("no_causal_mask", False) and text.get("pool_type", "argmax") in ("argmax", "eos")
    masked = "hf_model_name" in text
    facts = {
        "modality": "text",
        "cleaning": options.get("clean", "whitespace" if name else "lower"),
        "length": length,
        "padding": "longest" if (causal and not text.get("embed_cls", False)) or masked else "length",
    }
    if not name:
        return {**facts, "tokenizer": {"library": "open_clip"}, "pad": int(text.get("pad_id", 0))}
    packed, pad = tokenizer_of(str(tokenizer_folder(clip) or name))
    return {**facts, "tokenizer": packed, "pad": pad}


# ---------------------------------------------------------------- encoders of transformers


def load_encoder(section: TransformersPretraining) -> WeightSet:
    """An encoder of the library transformers in float32, as a weight set without a head; see TransformersPretraining.

    Texts are not cleaned first, as transformers does not.

    Raises:
        ParamsError: `transformers` is not installed, or an encoder that is not taken.
        DataError: a name on the hub that is not on this machine while the hub cannot be reached; a folder without
            config, weights or tokenizer.
        WeightsError: weights of another architecture.
    """
    place, folder = f"pretrain.model {section.model}", _folder_of(section.model)
    _check_files(folder, place, weights=section.weights == "pretrained")
    config = encoder_config(folder, place)
    check_encoder(config, place)
    packed, pad = tokenizer_of(str(folder), vocabulary=config.vocab_size)
    if pad != config.pad_token_id:
        raise ParamsError(
            place,
            got=f"a tokenizer that fills up with {pad} for an encoder that masks {config.pad_token_id}",
            expected="one token",
            cure="correct pad_token_id in config.json, or pad_token in tokenizer_config.json",
        )
    # Where positions are counted from the token that fills up, as many are never reached.
    most = config.max_position_embeddings - (pad + 1 if config.model_type in _COUNTED_FROM_PAD else 0)
    if section.length > most:
        raise ParamsError(
            "pretrain.length", got=section.length, expected=f"at most {most}, the encoder's", cure="lower it"
        )
    published = pooling_of(folder)
    if published not in (None, section.pooling):
        notice(place, f"published with pooling {published}; it is {section.pooling} here, as params.yaml says")
    architecture = {
        "kind": "transformers",
        "config": _plain_config(config),
        "pooling": POOLERS[section.pooling],
        "width": int(config.hidden_size),
        **({} if section.normalise else {"normalise": False}),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        tensors = {f"text.{name}": value for name, value in tensors_of(build_encoder(architecture).float()).items()}
    # A folder as it is named, so that every machine writes the same.
    named = str(Path(section.model)) if folder == on_this_machine(section.model) else str(folder)
    if section.weights == "pretrained":
        tensors = _encoder_weights(folder, section.model, tensors)
    meta = {
        "architecture": architecture,
        "backbone": {"name": section.model, "pretrained": named if section.weights == "pretrained" else "random"},
        "preprocess": {
            "modality": "text",
            "tokenizer": packed,
            "cleaning": "none",
            "length": section.length,
            "pad": pad,
            "padding": "longest",
        },
        "parents": [],
        "made_by": made_by(stage="pretrain", options=section.model_dump(mode="json")),
    }
    encoder = WeightSet(tensors, meta, section.model)
    encoder.check_finite()
    return encoder


def _missing(folder: Path, *, weights: bool) -> list[str]:
    """Which files of an encoder a folder lacks."""
    wanted = [("config.json",), ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.bpe.model")]
    wanted += [("*.safetensors", "*.bin")] if weights else []
    return [
        "model.safetensors" if patterns[0].startswith("*") else patterns[0]
        for patterns in wanted
        if not any(any(folder.glob(pattern)) for pattern in patterns)
    ]


def _check_files(folder: Path, place: str, *, weights: bool) -> None:
    """Raise DataError unless a folder has an encoder's files."""
    if missing := _missing(folder, weights=weights):
        cure = "copy it there" + (", or set pretrain.weights: random" if missing == ["model.safetensors"] else "")
        raise DataError(place, got=f"a folder without {few(missing)}", expected=", ".join(FILES), cure=cure)


def _plain_config(config: Any) -> dict[str, Any]:
    """A config of transformers as JSON, without where it came from."""
    values: dict[str, Any] = config.to_diff_dict()
    left_out = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    return {**{k: v for k, v in values.items() if k not in left_out}, "model_type": config.model_type}


def _folder_of(model: str) -> Path:
    """The folder of an encoder: as it is given, or the hub's, from its cache or downloaded into it.

    Raises:
        DataError: neither a folder here, nor in the cache, nor to be had from the hub.
    """
    if on_this_machine(model).is_dir():
        return on_this_machine(model)
    try:
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=list(_PATTERNS), local_files_only=True))
        if not _missing(folder, weights=True):
            return folder
    except Exception:  # not in the cache, or no name of a repository
        pass
    try:
        # One request without retries: a machine without a network learns it in seconds, not minutes.
        huggingface_hub.get_session().head(huggingface_hub.hf_hub_url(model, "config.json"), timeout=5.0)
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(_PATTERNS)))
    except Exception as error:  # whatever the network, a proxy or the hub does: the cure is the same
        line = " ".join(str(error).split())[:160]
        raise DataError(
            f"pretrain.model {model}",
            got=f"no such folder, and it cannot be had from the hub ({type(error).__name__}: {line})",
            expected=f"{', '.join(FILES)} of that repository",
            cure="copy these files to a folder, and set pretrain.model to it",
        ) from error


def _encoder_weights(folder: Path, place: str, expected: Mapping[str, Array]) -> dict[str, Array]:
    """The encoder's tensors by our names, from the checkpoint in its folder.

    Raises:
        WeightsError: tensors of another architecture.
    """
    checkpoint = open_checkpoint(weights_in(folder))
    encoder = {name.removeprefix("text.transformer."): built for name, built in expected.items()}
    poolers = [name for name in encoder if name.startswith("pooler.")]
    if poolers and not any(name.endswith(poolers[0]) for name in checkpoint.tensors):
        raise WeightsError(
            checkpoint.source, got="no pooler", expected=f"{few(poolers)}", cure="set pretrain.pooling: mean, or first"
        )
    prefix = prefix_of_tower(checkpoint, list(encoder), "encoder")
    tensors, wrong, beside = tower_of(checkpoint, prefix, encoder)
    problems = [f"{name} beside the encoder" for name in beyond_tower(checkpoint, prefix, encoder)] + wrong
    if not problems and poolers and not any(tensors[name].any() for name in poolers):
        problems.append("a pooler of zeros, as exports of encoders without one have")
    if problems:
        raise WeightsError(
            checkpoint.source, got=few(problems), expected="what config.json says", cure="copy both again"
        )
    if beside:
        notice(place, f"{few(beside)} {'is' if len(beside) == 1 else 'are'} in no feature and left aside")
    return {f"text.transformer.{name}": tensor for name, tensor in tensors.items()}
