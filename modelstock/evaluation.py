"""One pass over a benchmark scores any number of weight sets, and ensembles of them.

Every image is decoded once for all. What is already scored, by the identities of weights and data, is not scored
again. Per-example results are kept, so that every statistic can be made again without a model.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from modelstock.errors import WeightsError
from modelstock.files import atomic_path
from modelstock.models import build_classifier, normalise
from modelstock.scores import Row, Scores
from modelstock.shards import check_classes, load_manifest, read_batches
from modelstock.weights import WeightSet


@dataclass(frozen=True)
class Outcome:
    """What one scorer said of each example, in the shards' order: arrays of length n."""

    prediction: NDArray[np.int32]
    confidence: NDArray[np.float32]
    correct: NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        arrays = {"prediction": self.prediction, "confidence": self.confidence, "correct": self.correct}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(arrays))

    @classmethod
    def load(cls, path: Path, count: int) -> "Outcome | None":
        """Read it back; None for a file that is not there, is damaged or is of another length."""
        try:
            with safe_open(path, framework="numpy") as file:
                found = cls(*(file.get_tensor(k) for k in ("prediction", "confidence", "correct")))
        except (OSError, SafetensorError):
            return None
        return found if len(found.correct) == count else None


def ensemble_identity(members: Sequence[str]) -> str:
    """The identity of a logit ensemble: a hash of its members' identities, in no order."""
    return hashlib.sha256(("logit ensemble\n" + "\n".join(sorted(members))).encode()).hexdigest()


def label_logits(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Class logits (B, C) -> label logits (B, L): the maximum over each label's classes."""
    if all(len(group) == 1 for group in groups):
        return logits[:, [group[0] for group in groups]]
    return torch.stack([logits[:, group].amax(dim=1) for group in groups], dim=1)


@torch.inference_mode()
def score(
    folder: Path,
    weights: Sequence[WeightSet],
    ensembles: Sequence[Sequence[str]] = (),
    *,
    cache: Path | None = None,
    batch_size: int = 500,
    device: str = "cpu",
) -> dict[str, Outcome]:
    """Score weight sets, and logit ensembles given as lists of their identities, on the shards in `folder`.

    Returns identity -> outcome. The logit of a label is the maximum over its classes; the confidence is the softmax
    over the labels; an ensemble's logits are the mean of its members'.

    Raises:
        DataError: shards that are missing or damaged.
        WeightsError: a head for other classes, or a tower that does not fit its architecture.
    """
    manifest = load_manifest(folder)
    place = None if cache is None else cache / manifest.sha256[:24]
    by_identity = {w.identity: w for w in weights}
    groups = {ensemble_identity(members): list(members) for members in ensembles}
    for w in by_identity.values():
        check_classes(w, manifest, folder)
    for members in groups.values():
        unknown = [m for m in members if m not in by_identity]
        if unknown:
            raise WeightsError(
                "ensemble",
                got=f"member {unknown[0][:12]}",
                expected="one of the weight sets",
                cure="name it too",
            )
    done: dict[str, Outcome] = {}
    for identity in [*by_identity, *groups]:
        known = None if place is None else Outcome.load(place / f"{identity}.safetensors", manifest.count)
        if known is not None:
            done[identity] = known
    missing = [i for i in by_identity if i not in done]
    missing_groups = {i: m for i, m in groups.items() if i not in done}
    needed = sorted({*missing, *(m for members in missing_groups.values() for m in members)})
    if not needed:
        return done
    models = {i: build_classifier(by_identity[i]).to(device) for i in needed}
    preprocess = by_identity[needed[0]].meta["preprocess"]
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {i: [] for i in [*missing, *missing_groups]}
    with tqdm(total=manifest.count, desc=f"{manifest.benchmark} x {len(needed)}", unit="image", mininterval=2) as bar:
        for images, labels in read_batches(folder, manifest, batch_size=batch_size):
            pixels, truth = normalise(images, preprocess).to(device), torch.from_numpy(labels).to(device)
            logits = {i: model(pixels).float() for i, model in models.items()}
            for identity in parts:
                parents = missing_groups.get(identity)
                raw = logits[identity] if parents is None else torch.stack([logits[m] for m in parents]).mean(dim=0)
                confidence, prediction = label_logits(raw, manifest.label_groups).softmax(dim=1).max(dim=1)
                parts[identity].append((prediction.int().cpu(), confidence.cpu(), (prediction == truth).cpu()))
            bar.update(len(labels))
    for identity, pieces in parts.items():
        done[identity] = Outcome(*(torch.cat(column).numpy() for column in zip(*pieces, strict=True)))
        if place is not None:
            done[identity].save(place / f"{identity}.safetensors")
    return done


def collect(folder: Path, rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> Scores:
    """Put outcomes in the order of `rows`, as the comparison reads them."""
    manifest = load_manifest(folder)
    chosen = [outcomes[row.identity] for row in rows]
    return Scores(
        manifest.benchmark,
        manifest.role,
        manifest.sha256,
        tuple(rows),
        np.stack([o.correct for o in chosen]),
        np.stack([o.prediction for o in chosen]),
        np.stack([o.confidence for o in chosen]),
    )
