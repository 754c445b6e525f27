"""Validation on the held-out split while a seed trains."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from modelstock.data.examples import Examples, Texts
from modelstock.data.images import Framing, normalise
from modelstock.data.tokens import Tokenization
from modelstock.devices import FORWARD_BATCH
from modelstock.training.loop import Batch, Callback, Run
from modelstock.training.text_batches import Tokenised, framed


def validation_batches(
    examples: Examples | Texts | Tokenised, preprocess: Mapping[str, Any], batch_size: int
) -> Iterator[Batch]:
    """All examples in their order, framed as they are scored: images (B, 3, S, S) or tokens (B, L), labels (B,)."""
    examples, labels = framed(examples, preprocess), torch.from_numpy(examples.labels)
    for start in range(0, len(labels), batch_size):
        rows = range(start, min(start + batch_size, len(labels)))
        if isinstance(examples, Tokenised):
            inputs = Tokenization.of(preprocess).batch([examples.tokens(row) for row in rows])
        else:
            framing = Framing.of(preprocess)
            inputs = normalise(np.stack([framing(Image.fromarray(examples.image(r))) for r in rows]), preprocess)
        yield inputs, labels[rows.start : rows.stop]


@torch.inference_mode()
def top1(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
    """Share of the examples, images (B, 3, S, S) or tokens (B, L), whose largest logit is their label (B,)."""
    hits, count = 0, 0
    for inputs, labels in batches:
        hits += int((model(inputs.to(device)).argmax(dim=1) == labels.to(device)).sum())
        count += len(labels)
    return hits / count


def accuracy(
    model: nn.Module, examples: Examples | Texts | Tokenised, preprocess: Mapping[str, Any], device: torch.device
) -> float:
    """Top-1 accuracy of a model, put in evaluation mode, on whole examples: nothing is drawn at random."""
    return top1(model.eval(), validation_batches(examples, preprocess, FORWARD_BATCH[device.type]), device)


class Validation(Callback):
    """A row of held-out accuracy every `every` steps, and at the end."""

    def __init__(self, every: int, held_out: Examples | Texts | Tokenised, preprocess: Mapping[str, Any]) -> None:
        self.every, self.held_out, self.preprocess = every, framed(held_out, preprocess), preprocess

    def after_step(self, run: Run) -> None:
        """Measure, where it is time."""
        if (run.step % self.every == 0 or run.step == run.steps) and run.world.rank == 0:
            run.log({"validation/top1": accuracy(run.model, self.held_out, self.preprocess, run.world.device)})
