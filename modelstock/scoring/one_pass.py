"""One pass over a benchmark scores any number of weight sets, and ensembles of them.

Every image is decoded once for all. Where the weight sets do not fit the device together, they take turns on a span of
decoded images. What is already scored, by the identities of weights and data, is not scored again, and each scorer's
outcome grows on disk while the pass goes on: an interrupted one continues where it was. Per-example results are kept,
so that every statistic can be made again without a model.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from modelstock.data.images import Framing, InShards
from modelstock.data.shards import Manifest, check_classes, load_manifest
from modelstock.devices import device_kind
from modelstock.errors import DataError, WeightsError
from modelstock.files import atomic_path, dump_json
from modelstock.models.towers import Classifier, build_classifier
from modelstock.scoring.results import Row, Scores
from modelstock.weights.weight_set import WeightSet

Decoded = tuple[list[Tensor], Tensor]  # (B, S, S, 3) uint8 for each framing, and labels (B,)
SAVE_EVERY_S = 60.0
SPAN_BYTES = 1 << 30  # of decoded images, on which weight sets take turns


@dataclass(frozen=True)
class Outcome:
    """What one scorer said of the first n examples, in the shards' order: arrays of length n."""

    prediction: NDArray[np.int32]
    confidence: NDArray[np.float32]
    correct: NDArray[np.bool_]
    correct5: NDArray[np.bool_]
    nll: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(save({f.name: getattr(self, f.name) for f in fields(self)}))

    @classmethod
    def load(cls, path: Path) -> "Outcome | None":
        """Read it back; None for a file that is not there or is damaged."""
        try:
            with safe_open(path, framework="numpy") as file:
                return cls(*(file.get_tensor(f.name) for f in fields(cls)))
        except (OSError, SafetensorError):
            return None

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, groups: Sequence[Sequence[int]]) -> "Outcome":
        """What class logits (B, C) say of labels (B,); see `label_logits`."""
        chances = label_logits(logits, groups).log_softmax(dim=1)
        best, prediction = chances.max(dim=1)
        true = chances.gather(1, labels[:, None])
        # Of equal logits the lower label counts first, as argmax has it.
        places = torch.arange(chances.shape[1], device=chances.device)
        ahead = (chances > true) | ((chances == true) & (places < labels[:, None]))
        found = (prediction.int(), best.exp(), prediction == labels, ahead.sum(dim=1) < 5, -true[:, 0])
        return cls(*(values.cpu().numpy() for values in found))


class _Scorer:
    """A weight set or an ensemble, with what it has said so far."""

    def __init__(self, path: Path | None, count: int, batch_size: int) -> None:
        self.path, self.count = path, count
        known = None if path is None else Outcome.load(path)
        whole = known is not None and (len(known.correct) == count or len(known.correct) % batch_size == 0)
        self.parts = [known] if known is not None and whole else []
        self.scored = self.saved = sum(len(part.correct) for part in self.parts)

    @property
    def outcome(self) -> Outcome:
        """All of it."""
        columns = ([getattr(part, f.name) for part in self.parts] for f in fields(Outcome))
        self.parts = [Outcome(*(np.concatenate(column) for column in columns))]
        return self.parts[0]

    def add(self, part: Outcome) -> None:
        """What it said of the next examples."""
        self.parts.append(part)
        self.scored += len(part.correct)

    def keep(self) -> None:
        """Write to the cache what is new."""
        if self.path is not None and self.scored > self.saved:
            self.outcome.save(self.path)
            self.saved = self.scored


class Batches(Dataset[Decoded | DataError]):
    """One item a batch of at most `batch_size` examples in their order, framed in every way that is asked for."""

    def __init__(self, folder: Path, manifest: Manifest, framings: Sequence[Framing], batch_size: int) -> None:
        self._folder, self._images, self._framings = folder, InShards(folder, manifest), framings
        self._batch_size = batch_size

    def __getitem__(self, number: int) -> Decoded | DataError:
        labels = self._images.labels[number * self._batch_size : (number + 1) * self._batch_size]
        rows = range(number * self._batch_size, number * self._batch_size + len(labels))
        framed: list[list[NDArray[np.uint8]]] = []
        for row in rows:
            try:
                image = self._images.cut(row)
                framed.append([framing(image) for framing in self._framings])
            except (OSError, ValueError) as error:
                # Given back rather than raised: torch would wrap what a worker raises.
                return DataError(
                    f"{self._folder}, example {row}",
                    got=f"{type(error).__name__}: {error}",
                    expected="an image that decodes",
                    cure="run the stage prepare again for this split",
                )
        return [torch.from_numpy(np.stack(images)) for images in zip(*framed, strict=True)], torch.from_numpy(labels)

    def load(self, start: int, *, workers: int, pin: bool) -> Iterator[Decoded]:
        """The batches from number `start` on, decoded ahead by `workers` processes, or by this one."""
        numbers = range(start, -(-len(self._images.labels) // self._batch_size))
        loader: DataLoader[Decoded | DataError] = DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pin
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class Frames:
    """One batch of decoded images on the device, normalised once for all towers that ask for the same."""

    def __init__(self, images: Sequence[Tensor], framings: Sequence[Framing], device: str, dtype: torch.dtype) -> None:
        self._images, self._framings, self._device, self._dtype = images, framings, device, dtype
        self._made: dict[str, Tensor] = {}

    def __call__(self, preprocess: Mapping[str, Any]) -> Tensor:
        """Pixels (B, 3, S, S), scaled by the preprocess's mean and deviation."""
        key = dump_json(preprocess)
        if key not in self._made:
            mean, std = (torch.tensor(preprocess[k], device=self._device).reshape(3, 1, 1) for k in ("mean", "std"))
            images = self._images[self._framings.index(Framing.of(preprocess))].to(self._device, non_blocking=True)
            pixels = (images.permute(0, 3, 1, 2).to(torch.float32) / 255 - mean) / std
            self._made[key] = pixels.to(self._dtype).contiguous()
        return self._made[key]


class Tower:
    """A weight set's classifier on a device: frames -> logits (B, C) float32."""

    def __init__(self, weights: WeightSet, device: str, dtype: torch.dtype) -> None:
        self._preprocess = weights.meta["preprocess"]
        self._model: Classifier = build_classifier(weights).to(device)
        self._model.visual.to(dtype)  # the head, and all that follows it, stays float32

    def __call__(self, frames: Frames) -> Tensor:
        features = self._model.features(frames(self._preprocess))
        logits: Tensor = self._model.head(functional.normalize(features.float(), dim=-1))
        return logits


def ensemble_identity(members: Sequence[str]) -> str:
    """The identity of a logit ensemble: a hash of its members' identities, in no order."""
    return hashlib.sha256(("logit ensemble\n" + "\n".join(sorted(members))).encode()).hexdigest()


def label_logits(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Class logits (B, C) -> label logits (B, L): the maximum over each label's classes."""
    if all(len(group) == 1 for group in groups):
        return logits[:, [group[0] for group in groups]]
    return torch.stack([logits[:, group].amax(dim=1) for group in groups], dim=1)


def fitting(weights: Sequence[WeightSet], device: str, precision: str) -> int:
    """How many of these weight sets fit the device together, each as large as the largest, in half of what is free."""
    largest = max(w.nbytes for w in weights) // (2 if precision == "bfloat16" else 1)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return max(1, free // 2 // largest)


def _key(weights: WeightSet, **settings: Any) -> str:
    """What identifies an outcome: besides the tensors, whatever could change a bit of it."""
    facts = {"architecture": weights.meta.get("architecture"), "preprocess": weights.meta.get("preprocess"), **settings}
    return hashlib.sha256((weights.identity + dump_json(facts)).encode()).hexdigest()


@torch.inference_mode()
def score(
    folder: Path,
    weights: Sequence[WeightSet],
    ensembles: Sequence[Sequence[str]] = (),
    *,
    cache: Path | None = None,
    batch_size: int = 500,
    device: str = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    workers: int = 0,
    resident: int | Literal["auto"] = "auto",
) -> dict[str, Outcome]:
    """Score weight sets, and logit ensembles given as lists of their identities, on the shards in `folder`.

    Returns identity -> outcome. The logit of a label is the maximum over its classes; probabilities are the softmax
    over the labels; an ensemble's logits are the mean of its members'. `precision` is that of the towers. `workers`
    decode; `resident` weight sets are on the device at a time. Neither changes a bit of any outcome.

    Raises:
        DataError: shards that are missing or damaged.
        ParamsError: no such device.
        WeightsError: a head for other classes, or a tower that does not fit its architecture.
    """
    manifest, device = load_manifest(folder), device_kind(device)
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
    settings = {"precision": precision, "device": device, "batch_size": batch_size}
    keys = {identity: _key(w, **settings) for identity, w in by_identity.items()}
    keys |= {identity: ensemble_identity([keys[m] for m in members]) for identity, members in groups.items()}
    place = None if cache is None else cache / manifest.sha256[:24]
    scorers = {
        identity: _Scorer(None if place is None else place / f"{key}.safetensors", manifest.count, batch_size)
        for identity, key in keys.items()
    }
    unfinished = {i: s for i, s in scorers.items() if s.scored < manifest.count}
    wanted = {i for name in unfinished for i in groups.get(name, [name])}
    needed = [i for i in by_identity if i in wanted]
    if needed:
        chosen = [by_identity[i] for i in needed]
        most = fitting(chosen, device, precision) if resident == "auto" else resident
        turns = [chosen[i : i + most] for i in range(0, len(chosen), most)]
        _pass(folder, manifest, turns, unfinished, groups, settings, workers)
    return {identity: scorer.outcome for identity, scorer in scorers.items()}


def _pass(
    folder: Path,
    manifest: Manifest,
    turns: Sequence[Sequence[WeightSet]],
    scorers: Mapping[str, _Scorer],
    groups: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    workers: int,
) -> None:
    """Read on from the first example that some scorer lacks, and let the weight sets take turns on what is decoded."""
    device, batch_size = settings["device"], settings["batch_size"]
    dtype = torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32
    towers_of = [w for turn in turns for w in turn]
    framings = list(dict.fromkeys(Framing.of(w.meta["preprocess"]) for w in towers_of))
    held = {w.identity: Tower(w, device, dtype) for w in turns[0]} if len(turns) == 1 else {}
    done = min(scorer.scored for scorer in scorers.values())
    batches = Batches(folder, manifest, framings, batch_size).load(
        done // batch_size, workers=workers, pin=device == "cuda"
    )
    bytes_a_batch = batch_size * sum(3 * framing.size**2 for framing in framings)
    span = 1 if held else max(1, SPAN_BYTES // bytes_a_batch)
    members = {m for group in groups.keys() & scorers.keys() for m in groups[group]}
    title, saved = f"{manifest.benchmark} x {len(towers_of)}", time.monotonic()

    def due(name: str, start: int) -> _Scorer | None:
        """The scorer of this name, if what it lacks begins at this example."""
        scorer = scorers.get(name)
        return scorer if scorer is not None and scorer.scored == start else None

    with tqdm(total=manifest.count, initial=done, desc=title, unit="image", mininterval=2) as bar:
        try:
            while decoded := list(islice(batches, span)):
                truths = [labels.to(device) for _, labels in decoded]
                ends = done + np.cumsum([len(labels) for _, labels in decoded])
                kept: dict[tuple[str, int], Tensor] = {}
                for turn in turns:
                    towers = held or {w.identity: Tower(w, device, dtype) for w in turn}
                    for number, (images, labels) in enumerate(decoded):
                        start, frames = ends[number] - len(labels), Frames(images, framings, device, dtype)
                        for identity, tower in towers.items():
                            scorer = due(identity, start)
                            if scorer or identity in members:
                                logits = tower(frames)
                                if scorer:
                                    scorer.add(Outcome.of(logits, truths[number], manifest.label_groups))
                                if identity in members:
                                    kept[identity, number] = logits
                    del towers  # before the next turn's are built
                for group, identities in groups.items():
                    for number, (_, labels) in enumerate(decoded):
                        if scorer := due(group, ends[number] - len(labels)):
                            mean = torch.stack([kept[identity, number] for identity in identities]).mean(dim=0)
                            scorer.add(Outcome.of(mean, truths[number], manifest.label_groups))
                bar.update(int(ends[-1]) - done)
                done = int(ends[-1])
                if time.monotonic() - saved > SAVE_EVERY_S:
                    for scorer in scorers.values():
                        scorer.keep()
                    saved = time.monotonic()
        finally:
            for scorer in scorers.values():
                scorer.keep()


def collect(folder: Path, rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> Scores:
    """Put outcomes in the order of `rows`, as the comparison reads them."""
    manifest = load_manifest(folder)
    truth = InShards(folder, manifest).labels.astype(np.int32)
    chosen = [outcomes[row.identity] for row in rows]
    columns = {f.name: np.stack([getattr(o, f.name) for o in chosen]) for f in fields(Outcome)}
    return Scores(
        manifest.benchmark, manifest.role, manifest.sha256, tuple(rows), tuple(manifest.labels), truth, **columns
    )
