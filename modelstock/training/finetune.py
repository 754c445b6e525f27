"""Fine-tuning a classifier by a recipe: which parameters learn how fast, from which loss, over which steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelstock.data.examples import Examples
from modelstock.errors import TrainingError
from modelstock.models.towers import Classifier
from modelstock.params import FinetuneParams
from modelstock.training.batches import Batches, Scored
from modelstock.training.callbacks import Average, Ema, Lawa, Log, ResumePoint, Snapshots, Validation
from modelstock.training.distributed import ALONE, World
from modelstock.training.loop import Batch, Callback, Run, adamw, autocast, learning_rate
from modelstock.weights.layout import blocks


def parameter_groups(model: Classifier, params: FinetuneParams) -> list[dict[str, Any]]:
    """AdamW's groups: rate times layer_decay to the power of the blocks behind a parameter; decay where wanted.

    A parameter of block b of L learns at lr * layer_decay ** (L - b): the head at lr, the embeddings at b = -1.

    Raises:
        TrainingError: a layer decay for a tower in which no numbered blocks are found.
    Source: Clark et al., ELECTRA, arXiv 2003.10555; Bao et al., BEiT, arXiv 2106.08254.
    """
    place = blocks([name for name, _ in model.named_parameters()])
    if params.layer_decay < 1 and not any(count for _, count in place.values()):
        raise TrainingError(
            "finetune.layer_decay",
            got=f"{params.layer_decay} for a tower without numbered blocks",
            expected="a transformer, or stages",
            cure="set it to 1.0",
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        number, count = place[name]
        scale = params.layer_decay ** (count - number)
        decay = params.weight_decay if params.decay == "all" or parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": g, "scale": scale, "weight_decay": decay} for (scale, decay), g in groups.items()]


class HeadFirst(Callback):
    """Only the head learns during the first `steps` steps; then everything does.

    Source: Kumar et al., LP-FT, arXiv 2202.10054.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._all: bool | None = None

    def before_step(self, run: Run) -> None:
        """Switch, where that is due."""
        wanted = run.step >= self.steps
        if wanted != self._all:
            self._all = wanted
            run.model.visual.requires_grad_(wanted)
            run.rewrap()


@torch.inference_mode()
def top1(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
    """Share of the images, normalised (B, 3, S, S), whose largest logit is their label (B,)."""
    hits, count = 0, 0
    for images, labels in batches:
        hits += int((model(images.to(device)).argmax(dim=1) == labels.to(device)).sum())
        count += len(labels)
    return hits / count


def accuracy(model: nn.Module, examples: Examples, preprocess: Mapping[str, Any], device: torch.device) -> float:
    """Top-1 accuracy on whole examples, as they are scored: nothing is drawn at random."""
    return top1(model, Scored(examples, preprocess).load(), device)


def loss_of(params: FinetuneParams, device: str) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy with label smoothing, in float32; after mixup, weighted between the two labels of each image."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        images, labels, *mixed = batch
        with autocast(params.precision, device):
            logits = model(images)
        if not mixed:
            return functional.cross_entropy(logits.float(), labels, label_smoothing=params.label_smoothing)
        others, weight = mixed
        first, second = (
            functional.cross_entropy(logits.float(), target, label_smoothing=params.label_smoothing, reduction="none")
            for target in (labels, others)
        )
        return (weight * first + (1 - weight) * second).mean()

    return loss


def schedule_of(params: FinetuneParams, per_epoch: int) -> Callable[[int], float]:
    """Step -> learning rate: warm-up and cosine, once for the head alone, where wanted, and once for everything."""
    first, main = params.head_first_epochs * per_epoch, params.epochs * per_epoch

    def rate(step: int) -> float:
        if step < first:
            return learning_rate(step, peak=params.head_lr, warmup=params.warmup_steps, steps=first)
        return learning_rate(step - first, peak=params.lr, warmup=params.warmup_steps, steps=main)

    return rate


def steps_an_epoch(count: int, params: FinetuneParams) -> int:
    """Whole batches in an epoch.

    Raises:
        TrainingError: fewer examples than a batch.
    """
    if count < params.batch_size:
        raise TrainingError(
            "finetune.batch_size",
            got=params.batch_size,
            expected=f"at most the {count} training images",
            cure="lower it",
        )
    return count // params.batch_size


def new_run(
    model: Classifier,
    examples: Examples,
    params: FinetuneParams,
    preprocess: Mapping[str, Any],
    *,
    seed: int,
    workers: int = 0,
    world: World = ALONE,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """One seed at its first step; `callbacks` come after those of the recipe."""
    per_epoch = steps_an_epoch(len(examples.labels), params)
    name = f"seed-{seed}"
    data = Batches(examples, params, preprocess, seed=seed, name=name, world=world)
    if params.gradient_checkpointing:
        visual: Any = model.visual
        visual.set_grad_checkpointing(True)
    model.head.requires_grad_(params.train_head)
    head_first = params.head_first_epochs * per_epoch

    def batches(start: int, stop: int) -> Iterator[Batch]:
        return data.load(start, stop, workers=workers, pin=world.device.type == "cuda")

    return Run(
        name,
        model,
        adamw(parameter_groups(model, params), params, world.device),
        params,
        seed,
        head_first + params.epochs * per_epoch,
        loss_of(params, world.device.type),
        schedule_of(params, per_epoch),
        batches,
        [*([HeadFirst(head_first)] if head_first else []), *callbacks],
        params.micro_batch,
        params.compile,
        world,
    )


def finetune(
    model: Classifier,
    examples: Examples,
    held_out: Examples,
    params: FinetuneParams,
    preprocess: Mapping[str, Any],
    *,
    seed: int,
    folder: Path,
    workers: int = 0,
    world: World = ALONE,
    snapshot: Callable[[int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[Average]]:
    """Fine-tune tower and head in place; returns the history, and the averages along the run.

    `held_out`: scored each epoch and never trained on. `folder`: the run's scratch place, one per fingerprint of
    everything it depends on. `workers`: processes that make batches ahead. `snapshot`: called with the number of every
    epoch but the last. The model is on the world's device.

    Raises:
        TrainingError: fewer examples than a batch, a loss that is not finite, or memory that does not suffice.
    """
    per_epoch = steps_an_epoch(len(examples.labels), params)
    steps = (params.head_first_epochs + params.epochs) * per_epoch
    averages: list[Average] = [Ema(decay, model) for decay in params.ema]
    averages += [Lawa(params.lawa, per_epoch, steps)] if params.lawa else []
    point = ResumePoint(folder)
    callbacks: list[Callback] = [
        Log(params.log_every, per_epoch),
        Validation(per_epoch, lambda: {"validation/top1": accuracy(model, held_out, preprocess, world.device)}),
        *averages,
        *([Snapshots(per_epoch, snapshot)] if snapshot else []),
        point,
    ]
    run = new_run(model, examples, params, preprocess, seed=seed, workers=workers, world=world, callbacks=callbacks)
    point.resume(run)
    run.train()
    model.eval()
    return run.history, averages
