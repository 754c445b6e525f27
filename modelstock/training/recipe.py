"""The recipe of fine-tuning: which parameters learn how fast, from which loss, over which steps, on which batches."""

import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from modelstock.data.examples import Examples, Part
from modelstock.errors import TrainingError
from modelstock.models.towers import Classifier
from modelstock.params import FinetuneParams
from modelstock.training.batches import Augmentation, TrainingBatches
from modelstock.training.distributed import ALONE, World
from modelstock.training.loop import Batch, Callback, Run, adamw, autocast, learning_rate
from modelstock.weights.layout import blocks


def parameter_groups(model: Classifier, *, layer_decay: float, weight_decay: float, decay: str) -> list[dict[str, Any]]:
    """AdamW's groups: rate times layer_decay to the power of the blocks behind a parameter; weight decay where wanted.

    A parameter of block b of L learns at lr * layer_decay ** (L - b): the head at lr, the embeddings at b = -1.
    `decay`: "all" parameters decay, or "matrices", those of two dimensions and more.

    Raises:
        TrainingError: a layer decay for a tower in which no numbered blocks are found.
    Source: Clark et al., ELECTRA, arXiv 2003.10555; Bao et al., BEiT, arXiv 2106.08254.
    """
    block_of = blocks([name for name, _ in model.named_parameters()])
    if layer_decay < 1 and not any(count for _, count in block_of.values()):
        raise TrainingError(
            "finetune.layer_decay",
            got=f"{layer_decay} for a tower without numbered blocks",
            expected="a transformer, or stages",
            cure="set it to 1.0",
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        number, count = block_of[name]
        decays = decay == "all" or parameter.ndim > 1
        groups.setdefault((layer_decay ** (count - number), weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": g, "scale": scale, "weight_decay": decayed} for (scale, decayed), g in groups.items()]


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
            run.model.tower.requires_grad_(wanted)
            run.rewrap()


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy with label smoothing, in float32; after mixup, weighted between the two labels of each image.

    `precision`: of the model on `device`.
    """

    label_smoothing: float = 0.0
    precision: str = "float32"
    device: str = "cpu"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels, *mixed = batch
        with autocast(self.precision, self.device):
            logits = model(images)
        if not mixed:
            return functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        others, weight = mixed
        first, second = (
            functional.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing, reduction="none")
            for target in (labels, others)
        )
        return (weight * first + (1 - weight) * second).mean()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Step -> learning rate: once for the head alone over `head_steps`, once for everything.

    Warm-up and a cosine; for everything, with `constant`, warm-up alone.
    """

    lr: float
    steps: int
    warmup_steps: int
    head_lr: float = 0.0
    head_steps: int = 0
    constant: bool = False

    def __call__(self, step: int) -> float:
        if step < self.head_steps:
            return learning_rate(step, peak=self.head_lr, warmup=self.warmup_steps, steps=self.head_steps)
        step -= self.head_steps
        return learning_rate(step, peak=self.lr, warmup=self.warmup_steps, steps=self.steps, constant=self.constant)


def schedule_of(recipe: FinetuneParams, epoch: int) -> Schedule:
    """The schedule of a recipe whose epochs have `epoch` steps."""
    return Schedule(
        lr=recipe.lr,
        steps=recipe.epochs * epoch,
        warmup_steps=recipe.warmup_steps,
        head_lr=recipe.head_lr,
        head_steps=recipe.head_first_epochs * epoch,
        constant=recipe.schedule == "constant",
    )


def augmentation_of(recipe: FinetuneParams) -> Augmentation:
    """The augmentation of a recipe."""
    return Augmentation(
        crop_scale=recipe.crop_scale,
        flip=recipe.flip,
        rand_augment_operations=recipe.rand_augment_operations,
        rand_augment_magnitude=recipe.rand_augment_magnitude,
        mixup=recipe.mixup,
    )


def examples_of(examples: Examples, recipe: FinetuneParams, seed: int) -> Examples:
    """The training examples of a seed: all, or the share that the recipe asks for, drawn by the seed."""
    if recipe.share == 1:
        return examples
    count = len(examples.labels)
    drawn = np.random.default_rng([seed, zlib.crc32(b"share")]).permutation(count)[: round(recipe.share * count)]
    return Part(examples, np.sort(drawn))


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in an epoch.

    Raises:
        TrainingError: fewer examples than a batch.
    """
    if count < batch_size:
        raise TrainingError(
            "finetune.batch_size", got=batch_size, expected=f"at most the {count} training images", cure="lower it"
        )
    return count // batch_size


def new_run(
    model: Classifier,
    examples: Examples,
    recipe: FinetuneParams,
    *,
    preprocess: Mapping[str, Any],
    seed: int,
    workers: int = 0,
    world: World = ALONE,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """One seed at its first step, on these examples; `callbacks` come after those of the recipe.

    Raises:
        TrainingError: fewer examples than a batch, or a layer decay that the tower does not allow.
    """
    name, epoch = f"seed-{seed}", steps_per_epoch(len(examples.labels), recipe.batch_size)
    if recipe.gradient_checkpointing:
        tower: Any = model.tower
        tower.set_grad_checkpointing(True)
    model.head.requires_grad_(recipe.train_head)
    groups = parameter_groups(
        model, layer_decay=recipe.layer_decay, weight_decay=recipe.weight_decay, decay=recipe.decay
    )
    data = TrainingBatches(
        examples,
        augmentation_of(recipe),
        preprocess,
        batch_size=recipe.batch_size,
        seed=seed,
        order_seed=recipe.order_seed,
        name=name,
        world=world,
    )
    schedule = schedule_of(recipe, epoch)
    device = world.device

    def batches(start: int, stop: int) -> Generator[Batch, None, None]:
        return data.load(start, stop, workers=workers, pin=device.type == "cuda")

    return Run(
        name=name,
        model=model,
        optimizer=adamw(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, beta2=recipe.beta2, device=device),
        objective=CrossEntropy(label_smoothing=recipe.label_smoothing, precision=recipe.precision, device=device.type),
        schedule=schedule,
        batches=batches,
        seed=seed,
        steps=schedule.head_steps + schedule.steps,
        clip_norm=recipe.clip_norm,
        precision=recipe.precision,
        micro_batch=recipe.micro_batch,
        compile=recipe.compile,
        callbacks=[*([HeadFirst(schedule.head_steps)] if schedule.head_steps else []), *callbacks],
        world=world,
    )
