"""Pre-training of the embedded benchmark's tiny CLIP on captioned draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelstock.data.images import normalise
from modelstock.data.shapes import render as shapes
from modelstock.data.shapes.names import TINY_PREPROCESS
from modelstock.models.heads import tokenizer
from modelstock.models.towers import TINY_CLIP, build_clip
from modelstock.params import TinyPretraining
from modelstock.training.callbacks import Log, ResumePoint
from modelstock.training.loop import Batch, Run, adamw, autocast, learning_rate


def shared_positives_loss(image: Tensor, text: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """Image-text contrast in which every caption of the same class is a positive, in both directions.

    `image`, `text`: (B, D) normalised; `classes`: (B,). Source: UniCL, Yang et al., arXiv 2204.03610.
    """
    logits = scale * image @ text.T
    same = (classes[:, None] == classes[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def pretrain(params: TinyPretraining, *, folder: Path) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train the tiny CLIP on captioned draws of all styles; returns it and the history.

    A batch is a whole: its loss compares every image with every text, so there are no micro-batches.
    """
    torch.manual_seed(params.seed)
    clip = build_clip(TINY_CLIP)
    tokenize = tokenizer(TINY_CLIP)
    steps = params.draws // params.batch_size

    def batches(start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            indices = range(step * params.batch_size, (step + 1) * params.batch_size)
            images, classes, captions = shapes.web(indices, seed=params.seed)
            # Captions repeat within a batch: each text is encoded once.
            texts = sorted(set(captions))
            place = {text: row for row, text in enumerate(texts)}
            rows = torch.tensor([place[caption] for caption in captions])
            yield normalise(images, TINY_PREPROCESS), torch.from_numpy(classes), rows, tokenize(texts)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        images, classes, rows, texts = batch
        with autocast(params.precision):
            image = clip.encode_image(images, normalize=True)  # type: ignore[operator]
            text = clip.encode_text(texts, normalize=True)  # type: ignore[operator]
        scale = clip.logit_scale.exp().clamp(max=100)  # type: ignore[operator]
        return shared_positives_loss(image.float(), text.float()[rows], classes, scale)

    def rate(step: int) -> float:
        return learning_rate(step, peak=params.lr, warmup=params.warmup_steps, steps=steps)

    point = ResumePoint(folder)
    optimizer = adamw([{"params": list(clip.parameters())}], params, torch.device("cpu"))
    callbacks = [Log(params.log_every, max(1, steps // 10)), point]
    run = Run("pretrain", clip, optimizer, params, params.seed, steps, loss, rate, batches, callbacks)
    point.resume(run)
    run.train()
    return clip.eval(), run.history
