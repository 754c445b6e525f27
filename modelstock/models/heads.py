"""Zero-shot heads: a linear layer that classifies as a CLIP's text tower does, and the tokenizers that it needs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

from modelstock.files import on_this_machine
from modelstock.models.towers import from_transformers
from modelstock.progress import progress_bar
from modelstock.weights.weight_set import WeightSet

# Class name -> prompt, each of them.
Prompts = Sequence[Callable[[str], str]]


def tokenizer_folder(clip: WeightSet) -> Path | None:
    """The folder of a CLIP's backbone, where it brings a tokenizer."""
    folder = on_this_machine(str(clip.meta.get("backbone", {}).get("pretrained", "")))
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder if any((folder / name).is_file() for name in names) else None


def tokenizer(config: Mapping[str, Any], folder: Path | None = None) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer that the text tower was trained with: texts -> (B, L) int64, L the tower's context length.

    open_clip's own, or that of the library `transformers` which the config names, from `folder` where it is given.

    Raises:
        ParamsError: `transformers` is not installed, or the tokenizer's files are neither here nor to be had.
    """
    text = config["text_cfg"]
    length, options = text.get("context_length", 77), dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    if not name:
        tokenize: Any = open_clip.SimpleTokenizer(context_length=length, **options)
    else:
        with from_transformers(f"tokenizer {name}", f"its files in the hub's cache or in the folder of {name}"):
            tokenize = open_clip.tokenizer.HFTokenizer(
                str(folder or name), context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options
            )
    return lambda texts: torch.as_tensor(tokenize(list(texts)))


@torch.inference_mode()
def prompt_directions(
    encode: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Prompts, *, batch_size: int = 256
) -> Tensor:
    """The direction (C, D) of each class: normalise(mean over templates of normalise(text feature)), float32.

    `encode`: texts -> features (B, D). Each text is encoded once.
    Source: Radford et al., arXiv 2103.00020; Wortsman et al., arXiv 2109.01903.
    """
    texts = [template(name) for name in names for template in templates]
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct, parts = list(rows), []
    # Shown where it takes a while.
    with progress_bar(total=len(distinct), desc="prompts", unit="text", disable=len(distinct) <= 1000) as bar:
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            parts.append(functional.normalize(encode(batch).float(), dim=-1))
            bar.update(len(batch))
    features = torch.cat(parts)[[rows[text] for text in texts]].reshape(len(names), len(templates), -1).mean(dim=1)
    return functional.normalize(features, dim=-1)


@torch.inference_mode()
def zero_shot_head(
    clip: nn.Module,
    tokenize: Callable[[Sequence[str]], Tensor],
    names: Sequence[str],
    templates: Prompts,
    *,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and zero bias (C,) of a linear head that classifies as CLIP's text tower does; float32 on the CPU.

    Row c = exp(logit_scale) * its direction (see `prompt_directions`). Texts are encoded on the device of `clip`.
    """
    device = next(clip.parameters()).device

    def encode(texts: Sequence[str]) -> Tensor:
        encoded: Tensor = clip.encode_text(tokenize(texts).to(device), normalize=False)  # type: ignore[operator]
        return encoded

    directions = prompt_directions(encode, names, templates, batch_size=batch_size)
    weight = directions * clip.logit_scale.float().exp()  # type: ignore[operator]
    return weight.cpu().clone(), torch.zeros(len(names))
