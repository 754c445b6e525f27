"""Pre-training of the embedded benchmark's tiny CLIP on captioned draws."""

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelstock.data.images import normalise
from modelstock.data.shapes import render as shapes
from modelstock.data.shapes.names import TINY_PREPROCESS
from modelstock.models.heads import tokenizer
from modelstock.models.towers import TINY_CLIP, build_clip, tensors_of
from modelstock.params import TinyPretraining
from modelstock.tracking.history import write_history
from modelstock.training.callbacks import Log
from modelstock.training.job import Job, Setting
from modelstock.training.loop import Batch, HistoryRow, Run, adamw, autocast, learning_rate
from modelstock.training.resume import ResumePoint
from modelstock.weights.origin import made_by
from modelstock.weights.weight_set import WeightSet


def shared_positives_loss(image: Tensor, text: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """Image-text contrast in which every caption of the same class is a positive, in both directions.

    `image`, `text`: (B, D) normalised; `classes`: (B,). Source: UniCL, Yang et al., arXiv 2204.03610.
    """
    logits = scale * image @ text.T
    same = (classes[:, None] == classes[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def web_batches(start: int, stop: int, *, batch_size: int, seed: int) -> Generator[Batch, None, None]:
    """Captioned draws of all styles, per step: images (B, 3, S, S), classes (B,), rows (B,) into texts (T, L).

    Captions repeat within a batch, where each text is encoded once, and from batch to batch: each is tokenised once.
    """
    tokenize = tokenizer(TINY_CLIP)
    tokens: dict[str, Tensor] = {}  # of the 672 texts that there are
    for step in range(start, stop):
        images, classes, captions = shapes.web(range(step * batch_size, (step + 1) * batch_size), seed=seed)
        texts = sorted(set(captions))
        place = {text: row for row, text in enumerate(texts)}
        rows = torch.tensor([place[caption] for caption in captions])
        if new := [text for text in texts if text not in tokens]:
            tokens.update(zip(new, tokenize(new), strict=True))
        tokenised = torch.stack([tokens[text] for text in texts])
        yield normalise(images, TINY_PREPROCESS), torch.from_numpy(classes), rows, tokenised


def contrast(model: nn.Module, batch: Batch, *, precision: str) -> Tensor:
    """The loss of one whole batch: every image is compared with every text."""
    clip: Any = model
    images, classes, rows, texts = batch
    with autocast(precision):
        image = clip.encode_image(images, normalize=True)
        text = clip.encode_text(texts, normalize=True)
    scale = clip.logit_scale.exp().clamp(max=100)
    return shared_positives_loss(image.float(), text.float()[rows], classes, scale)


def pretrain(params: TinyPretraining, *, folder: Path) -> tuple[nn.Module, list[HistoryRow]]:
    """Train the tiny CLIP on captioned draws of all styles; returns it and the history.

    `folder`: where the resume point is kept. There are no micro-batches, for the loss needs the whole batch.
    """
    torch.manual_seed(params.seed)
    clip = build_clip(TINY_CLIP)
    steps, point = params.draws // params.batch_size, ResumePoint(folder)
    run = Run(
        name="pretrain",
        model=clip,
        optimizer=adamw(
            [{"params": list(clip.parameters())}],
            lr=params.lr,
            weight_decay=params.weight_decay,
            beta2=params.beta2,
            device=torch.device("cpu"),
        ),
        objective=partial(contrast, precision=params.precision),
        schedule=partial(learning_rate, peak=params.lr, warmup=params.warmup_steps, steps=steps),
        batches=partial(web_batches, batch_size=params.batch_size, seed=params.seed),
        seed=params.seed,
        steps=steps,
        clip_norm=params.clip_norm,
        precision=params.precision,
        callbacks=[Log(params.log_every, max(1, steps // 10)), point],
    )
    point.resume(run)
    run.train()
    return clip.eval(), run.history


def pretrain_clip(params: TinyPretraining, *, threads: int, out: Path) -> WeightSet:
    """The tiny CLIP after its pre-training, written to the folder `out` with its history."""
    origin: dict[str, Any] = {"stage": "pretrain", "seed": params.seed, "options": params.model_dump(mode="json")}
    job = Job(
        name="pretrain",
        made_by=origin,
        code="modelstock.training.pretrain",
        setting=Setting(threads=threads),
    )
    clip, history = pretrain(params, folder=job.folder)
    meta = {
        "architecture": TINY_CLIP,
        "backbone": {"name": "tiny", "pretrained": "shapes"},
        "preprocess": TINY_PREPROCESS,
        "parents": [],
        "made_by": made_by(**origin),
    }
    weights = WeightSet(tensors_of(clip), meta, "pretrain")
    weights.save(out / "clip.safetensors")
    write_history(out, history)
    job.finish()
    return weights
