"""What `auto` means for a pass: the precision that this machine is fast in, and a batch that suits its caches."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelstock.data.preprocess import modality_of
from modelstock.devices import FORWARD_BATCH, device_kind, device_model
from modelstock.files import SCRATCH, write_json
from modelstock.models.towers import build_classifier
from modelstock.provenance import key_of
from modelstock.scoring.one_pass import ScoringOptions
from modelstock.weights.weight_set import WeightSet

Precision = Literal["float32", "bfloat16"]
KEPT = SCRATCH / "precision"
GAIN = 1.5  # how much faster bfloat16 must be: so much that a second measurement chooses the same
_SECONDS = 0.5  # of measuring, per precision
_TYPICAL = 24  # tokens of a sentence


def scoring_options(
    section: Mapping[str, Any], weights: WeightSet, *, device: str, cache: Path | None = None, kept: Path | None = KEPT
) -> ScoringOptions:
    """The options of a pass from their settings, of which `precision` and `batch_size` may be `auto`.

    `weights`: a weight set of the architecture that is scored. `kept`: a folder that keeps what was measured, so that
    all passes on a machine choose alike.
    """
    kind = device_kind(device)
    settled = dict(section)
    if settled["batch_size"] == "auto":
        settled["batch_size"] = FORWARD_BATCH[kind]
    if settled["precision"] == "auto":
        settled["precision"] = fastest(weights, kind, batch_size=settled["batch_size"], kept=kept)
    return ScoringOptions(device=kind, cache=cache, **settled)


def fastest(weights: WeightSet, device: str, *, batch_size: int, kept: Path | None) -> Precision:
    """bfloat16 where a weight set's tower is at least GAIN times as fast in it, else float32.

    Measured once per machine, architecture, batch size and number of threads, where `kept` keeps it.
    """
    examples = f"{modality_of(weights.meta['preprocess'])}s per second"
    facts = {
        "architecture": weights.meta["architecture"],
        "batch_size": batch_size,
        "device": device_model(device),
        "threads": torch.get_num_threads(),
    }
    path = None if kept is None else kept / f"{key_of('modelstock.scoring.precision', facts)}.json"
    if path is not None and path.is_file():
        known: Precision = json.loads(path.read_text(encoding="utf-8"))["precision"]
        return known
    speed = speeds(weights, device, batch_size=batch_size)
    choice: Precision = "bfloat16" if speed["bfloat16"] >= GAIN * speed["float32"] else "float32"
    print(f"precision: {choice} ({', '.join(f'{name} {rate:,.0f}' for name, rate in speed.items())} {examples})")
    if path is not None:
        write_json(path, {"precision": choice, examples: speed})
    return choice


def speeds(weights: WeightSet, device: str, *, batch_size: int) -> dict[str, float]:
    """Examples per second of a weight set's tower in each precision, measured in turns."""
    model = build_classifier(weights).to(device)
    towers = {"float32": model.tower, "bfloat16": build_classifier(weights).tower.to(device, torch.bfloat16)}
    if modality_of(weights.meta["preprocess"]) == "text":
        batches = dict.fromkeys(towers, _tokens(weights, model.tower, batch_size).to(device))
    else:
        size = weights.meta["preprocess"]["size"]
        images = torch.zeros(batch_size, 3, size, size, device=device)
        batches = {name: images.to(next(tower.parameters()).dtype) for name, tower in towers.items()}
    spent, passes = dict.fromkeys(towers, 0.0), dict.fromkeys(towers, -1)  # the first pass only warms up
    with torch.inference_mode():
        while min(spent.values()) < _SECONDS and min(passes.values()) < 100:
            for name, tower in towers.items():
                begun = time.perf_counter()
                tower(batches[name])
                if device == "cuda":
                    torch.cuda.synchronize()
                passes[name] += 1
                spent[name] += time.perf_counter() - begun if passes[name] > 0 else 0.0
    return {name: batch_size * passes[name] / spent[name] for name in towers}


def _tokens(weights: WeightSet, tower: nn.Module, batch_size: int) -> Tensor:
    """Random texts (B, L) of a typical length, without a token that fills up."""
    preprocess = weights.meta["preprocess"]
    length = preprocess["length"] if preprocess["padding"] == "length" else min(_TYPICAL, preprocess["length"])
    generator = torch.Generator().manual_seed(0)
    words = max(module.num_embeddings for module in tower.modules() if isinstance(module, nn.Embedding))
    tokens = torch.randint(words - 1, (batch_size, length), generator=generator)
    return tokens.add(tokens >= preprocess["pad"])
