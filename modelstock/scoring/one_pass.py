"""One pass over a benchmark scores any number of weight sets, and ensembles of them.

Every image is decoded once for all, and every text made tokens once for all that share a tokenizer. Where the weight
sets do not fit the device together, they take turns on a span of decoded examples, and the next turn's towers are built
meanwhile. What is already scored is not scored again, and each outcome grows on disk while the pass goes on: an
interrupted one continues where it was. Results per example are kept, so that every statistic can be made again without
a model.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from modelstock.data.dataset import Dataset
from modelstock.data.preprocess import Framer, framer_of
from modelstock.data.tokens import Tokenization
from modelstock.devices import device_kind, device_model
from modelstock.errors import AskedToEnd, WeightsError
from modelstock.models.towers import Tower, check_classifier
from modelstock.progress import progress_bar
from modelstock.scoring.decoding import DecodedBatches, Prepared
from modelstock.scoring.memory import memory_kept
from modelstock.scoring.outcome import COLUMNS, Outcome
from modelstock.scoring.results import Row, Scores
from modelstock.scoring.score_cache import DESCRIBED, Progress, ScoreCache, ensemble_identity
from modelstock.scoring.turns import Turns
from modelstock.stopping import asked_to_end
from modelstock.weights.origin import notices_of
from modelstock.weights.weight_set import WeightSet

SAVE_EVERY_S = 60.0
SPAN_BYTES = 1 << 30  # of framed examples, on which weight sets take turns


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How a pass runs.

    `precision`: of the towers; heads and everything after them are float32. `workers`: processes that decode; 0: this
    one. `resident`: weight sets that are on the device at a time, those that are built ahead among them; auto: as many
    as fit. `cache`: a folder that keeps outcomes, and unfinished passes. Workers, resident and cache do not change a
    bit of any outcome.
    """

    batch_size: int = 500
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: int = 0
    resident: int | Literal["auto"] = "auto"
    cache: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The towers' dtype."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def settings(self, device: str) -> dict[str, Any]:
        """What could change a bit of an outcome, on a kind of device."""
        return {
            "precision": self.precision,
            "device": device,
            "model": device_model(device),
            "batch_size": self.batch_size,
            "threads": torch.get_num_threads(),
        }


def fitting(weights: Sequence[WeightSet], device: str, precision: str) -> int:
    """How many of these weight sets fit the device together, each as large as the largest, in half of what is free."""
    largest = max(w.nbytes for w in weights) // (2 if precision == "bfloat16" else 1)
    if device == "cuda":
        # What torch keeps of freed memory is free for torch: of an earlier pass, or of measuring the precision.
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        free = psutil.virtual_memory().available
    return max(1, free // 2 // largest)


def score(
    dataset: Dataset,
    weights: Sequence[WeightSet],
    ensembles: Sequence[Sequence[str]] = (),
    options: ScoringOptions | None = None,
) -> dict[str, Outcome]:
    """Score weight sets, and logit ensembles given as lists of their identities, on a split.

    Returns identity -> outcome. The logit of a label is the maximum over its classes; probabilities are the softmax
    over the labels; an ensemble's logits are the mean of its members'.

    Raises:
        AskedToEnd: see modelstock.stopping; only with a cache.
        DataError: an example that does not decode.
        ParamsError: no such device.
        WeightsError: a tower for another modality, a head for other classes, a tower that does not fit its
            architecture, or the same tensors twice, to be scored in two ways.
    """
    options = options or ScoringOptions()
    device, by_identity = device_kind(options.device), _by_identity(weights)
    # Sums round: an ensemble's do in one order, in whichever its members are named.
    groups = {ensemble_identity(members): sorted(members) for members in ensembles}
    for w in by_identity.values():
        check_classifier(w)
        dataset.check_modality(w)
        dataset.check_classes(w)
    _check_members(groups, by_identity)
    cache = ScoreCache(options.cache, dataset.manifest.sha256, options.settings(device))
    keys = {identity: cache.key(w) for identity, w in by_identity.items()}
    keys |= {identity: ensemble_identity([keys[m] for m in members]) for identity, members in groups.items()}
    progress = {
        identity: Progress(cache.path(key), count=dataset.manifest.count, batch_size=options.batch_size)
        for identity, key in keys.items()
    }
    unfinished = {identity: entry for identity, entry in progress.items() if not entry.finished}
    wanted = {member for identity in unfinished for member in groups.get(identity, [identity])}
    if wanted:
        needed = [w for identity, w in by_identity.items() if identity in wanted]
        with memory_kept(device):
            _Pass(dataset, needed, groups=groups, progress=unfinished, options=options, device=device).run()
    cache.remove_outdated()
    return {identity: entry.outcome for identity, entry in progress.items()}


def _by_identity(weights: Sequence[WeightSet]) -> dict[str, WeightSet]:
    """Weight sets by identity, which is that of the tensors: what else scores depend on must then be the same."""
    by_identity: dict[str, WeightSet] = {}
    for w in weights:
        first = by_identity.setdefault(w.identity, w)
        for what in DESCRIBED:
            if w.meta.get(what) != first.meta.get(what):
                raise WeightsError(
                    w.source,
                    got=f"the tensors of {first.source} with another {what}",
                    expected="one way to score the same tensors",
                    cure="score one of the two in a run of its own",
                )
    return by_identity


def _check_members(groups: Mapping[str, Sequence[str]], by_identity: Mapping[str, WeightSet]) -> None:
    unknown = [member for members in groups.values() for member in members if member not in by_identity]
    if unknown:
        raise WeightsError(
            "ensemble", got=f"member {unknown[0][:12]}", expected="one of the weight sets", cure="name it too"
        )


class _Pass:
    """Reading on from the first example that some weight set or ensemble lacks."""

    def __init__(
        self,
        dataset: Dataset,
        weights: Sequence[WeightSet],
        *,
        groups: Mapping[str, Sequence[str]],
        progress: Mapping[str, Progress],
        options: ScoringOptions,
        device: str,
    ) -> None:
        self.dataset, self.options, self.device, self.progress = dataset, options, device, progress
        self.groups = {identity: members for identity, members in groups.items() if identity in progress}
        self.members = {member for members in self.groups.values() for member in members}
        self.framers = list(dict.fromkeys(framer_of(w.meta["preprocess"]) for w in weights))
        resident = options.resident
        most = fitting(weights, device, options.precision) if resident == "auto" else resident
        # The current GPU is each thread's own: in one that builds towers, "cuda" would be the first.
        current = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        self.turns = Turns(weights, lambda w: Tower(w, current, options.dtype), most=most)
        self.title = f"{dataset.manifest.benchmark} x {len(weights)}"

    @torch.inference_mode()
    def run(self) -> None:
        """Score what is lacking; what is scored by then is kept, however it ends.

        Raises:
            AskedToEnd: it was asked to end before the last example, and has a cache to go on from.
        """
        scored, count = min(entry.scored for entry in self.progress.values()), self.dataset.manifest.count
        saved = time.monotonic()
        bar = progress_bar(total=count, initial=scored, desc=self.title, unit="example", mininterval=2)
        with self.turns, bar:
            try:
                for span in self._spans(scored):
                    self._score(span)
                    bar.update(span[-1].stop - span[0].start)
                    if time.monotonic() - saved > SAVE_EVERY_S:
                        self._keep()
                        saved = time.monotonic()
                    scored = span[-1].stop
                    if scored < count and self.options.cache is not None and asked_to_end():
                        raise AskedToEnd(f"after {scored:,} of {count:,} examples")
            finally:
                self._keep()

    def _keep(self) -> None:
        for entry in self.progress.values():
            entry.keep()

    def _spans(self, start: int) -> "Iterator[list[_Batch]]":
        """The batches from example `start` on: one at a time, or as many as weight sets take turns on."""
        batch_size, pin = self.options.batch_size, self.device == "cuda"
        loaded = DecodedBatches(self.dataset, self.framers, batch_size)
        batches = loaded.load(start // batch_size, workers=self.options.workers, pin=pin)
        batch_bytes = batch_size * sum(framer.example_bytes for framer in self.framers)
        most = 1 if self.turns.together else max(1, SPAN_BYTES // batch_bytes)
        while decoded := list(islice(batches, most)):
            span = []
            for batches_of, labels in decoded:
                framed = dict(zip(self.framers, batches_of, strict=True))
                span.append(_Batch(start=start, framed=framed, labels=labels.to(self.device)))
                start = span[-1].stop
            yield span

    def _score(self, span: "Sequence[_Batch]") -> None:
        """Every weight set in its turn, then the ensembles of their logits."""
        logits: dict[tuple[str, int], Tensor] = {}  # of ensembles' members, by identity and first example
        for towers in self.turns:
            for batch in span:
                of_members = self._score_batch(batch, towers)
                logits |= {(identity, batch.start): values for identity, values in of_members.items()}
        for identity, members in self.groups.items():
            for batch in span:
                if self._lacks(identity, batch):
                    self._record(
                        identity, batch, torch.stack([logits[member, batch.start] for member in members]).mean(dim=0)
                    )

    def _score_batch(self, batch: "_Batch", towers: Sequence[Tower]) -> dict[str, Tensor]:
        """One batch by these towers; the logits of those that are members of ensembles."""
        inputs, of_members = Prepared(batch.framed, self.device, self.options.dtype), {}
        for tower in towers:
            identity = tower.identity
            lacks = self._lacks(identity, batch)
            if lacks or identity in self.members:
                logits = tower.logits(inputs.of(tower.preprocess))
                if lacks:
                    self._record(identity, batch, logits)
                if identity in self.members:
                    of_members[identity] = logits
        return of_members

    def _lacks(self, identity: str, batch: "_Batch") -> bool:
        """Whether what this weight set or ensemble lacks begins at this batch."""
        return identity in self.progress and self.progress[identity].scored == batch.start

    def _record(self, identity: str, batch: "_Batch", logits: Tensor) -> None:
        self.progress[identity].add(Outcome.of(logits, batch.labels, self.dataset.manifest.label_groups))


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Consecutive examples from number `start` on: framed, by framer, and labels (B,) on the device."""

    start: int
    framed: Mapping[Framer, Tensor]
    labels: Tensor

    @property
    def stop(self) -> int:
        """The number after the last example's."""
        return self.start + len(self.labels)


def accuracies(dataset: Dataset, weights: Sequence[WeightSet], options: ScoringOptions | None = None) -> list[float]:
    """The share of a split's examples that each weight set gets right.

    Raises:
        DataError, ParamsError, WeightsError: as `score`.
    """
    outcomes = score(dataset, weights, options=options)
    return [float(outcomes[w.identity].correct.mean()) for w in weights]


def _truncated(dataset: Dataset, weights: Sequence[WeightSet]) -> list[str]:
    """How many texts are longer than the weight sets read, a line for each length that some do not fit."""
    framers = dict.fromkeys(framer_of(w.meta["preprocess"]) for w in weights)
    count, lines = dataset.manifest.count, []
    for framer in framers:
        if isinstance(framer, Tokenization):
            longer = sum(framer.is_too_long(str(dataset.decoded(row))) for row in range(count))
            text = f"{longer:,} of {count:,} texts have more than {framer.length} tokens; the rest of them is not read"
            lines += [text] * (longer > 0)
    return lines


def collect(
    dataset: Dataset,
    rows: Sequence[Row],
    outcomes: Mapping[str, Outcome],
    weights: Sequence[WeightSet] = (),
    precision: str = "float32",
) -> Scores:
    """Put outcomes in the order of `rows`, as the comparison reads them, with the notices of data and weight sets.

    `weights`: those of the first rows, in their order; the other rows are ensembles.
    """
    manifest, chosen = dataset.manifest, [outcomes[row.identity] for row in rows]
    notices = [f"{manifest.benchmark}: {line}" for line in [*manifest.notices, *_truncated(dataset, weights)]]
    for row, of_row in zip(rows, weights, strict=False):
        notices += [f"{row.name}: {line}" for line in notices_of(of_row.meta)]
    return Scores(
        benchmark=manifest.benchmark,
        role=manifest.role,
        data=manifest.sha256,
        rows=tuple(rows),
        labels=tuple(manifest.labels),
        truth=dataset.labels.astype(np.int32),
        notices=tuple(dict.fromkeys(notices)),
        precision=precision,
        modality=dataset.modality,
        **{name: np.stack([getattr(outcome, name) for outcome in chosen]) for name in COLUMNS},
    )
