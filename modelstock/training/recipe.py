"""The recipe of fine-tuning: which parameters learn how fast, from which loss, over which steps, on which batches."""

import warnings
import zlib
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from modelstock.data.examples import Part
from modelstock.errors import TrainingError
from modelstock.models.towers import Classifier
from modelstock.params import IMAGES_ALONE, FinetuneParams, images_alone
from modelstock.training.batch_norm import check_batch_norm
from modelstock.training.batches import Augmentation, TrainingBatches
from modelstock.training.distributed import ALONE, World
from modelstock.training.loop import Batch, Callback, Run, adamw, autocast, learning_rate
from modelstock.training.row_decay import ROW_DECAY, decay_rows, embeddings_of
from modelstock.training.text_batches import Framed, TextBatches, Tokenised
from modelstock.weights.layout import blocks


def parameter_groups(
    model: Classifier, *, layer_decay: float, weight_decay: float, decay: str, by_row: Collection[str] = ()
) -> list[dict[str, Any]]:
    """AdamW's groups: rate times layer_decay to the power of the blocks behind a parameter; weight decay where wanted.

    A parameter of block b of L learns at lr * layer_decay ** (L - b): the head at lr, the embeddings at b = -1.
    `decay`: "all" parameters decay, or "matrices", those of two dimensions and more. `by_row`: names of those that
    decay by modelstock.training.row_decay.

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
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        number, count = block_of[name]
        decays = decay == "all" or parameter.ndim > 1
        key = layer_decay ** (count - number), weight_decay if decays else 0.0, name in by_row
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": group,
            "scale": scale,
            **({ROW_DECAY: decayed, "weight_decay": 0.0} if rows else {"weight_decay": decayed}),
        }
        for (scale, decayed, rows), group in groups.items()
    ]


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

    A batch: images (B, 3, S, S) or tokens (B, L), labels (B,), and what mixup adds.

    `precision`: of the model on `device`.
    """

    label_smoothing: float = 0.0
    precision: str = "float32"
    device: str = "cpu"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels, *mixed = batch
        with autocast(self.precision, self.device):
            logits = model(inputs)
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


def examples_of(examples: Framed, recipe: FinetuneParams, seed: int) -> Framed:
    """The training examples of a seed: all, or the share that the recipe asks for, drawn by the seed."""
    if recipe.share == 1:
        return examples
    count = len(examples.labels)
    drawn = np.random.default_rng([seed, zlib.crc32(b"share")]).permutation(count)[: round(recipe.share * count)]
    rows = np.sort(drawn)
    return examples.part(rows) if isinstance(examples, Tokenised) else Part(examples, rows)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in an epoch.

    Raises:
        TrainingError: fewer examples than a batch.
    """
    if count < batch_size:
        raise TrainingError(
            "finetune.batch_size", got=batch_size, expected=f"at most the {count} training examples", cure="lower it"
        )
    return count // batch_size


def check_text_recipe(recipe: FinetuneParams) -> None:
    """Raise TrainingError where a recipe does to texts what can be done to images alone."""
    if wrong := images_alone(recipe):
        raise TrainingError(
            "finetune",
            got=", ".join(f"{name} {value}" for name, value in wrong.items()),
            expected="none of what is done to images, for the anchor takes texts",
            cure=f"set {', '.join(f'{name}: {IMAGES_ALONE[name]}' for name in wrong)}",
        )


def checkpoint_activations(model: Classifier) -> None:
    """Keep fewer activations of the tower, and compute them again.

    Raises:
        TrainingError: a tower that cannot.
    """
    tower: Any = model.tower
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of a name that open_clip calls it by
            tower.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, ValueError) as error:
        raise TrainingError(
            "finetune.gradient_checkpointing",
            got=f"true for a tower that has none ({type(error).__name__}: {str(error)[:100]})",
            expected="a tower that can compute its activations again",
            cure="set it to false, and micro_batch to auto",
        ) from error


def batches_of(
    examples: Framed, recipe: FinetuneParams, preprocess: Mapping[str, Any], *, seed: int, name: str, world: World
) -> TrainingBatches | TextBatches:
    """The batches of a seed by step, of images or texts."""
    if isinstance(examples, Tokenised):
        order = seed if recipe.order_seed is None else recipe.order_seed
        return TextBatches(examples, preprocess, batch_size=recipe.batch_size, order_seed=order, world=world)
    return TrainingBatches(
        examples,
        augmentation_of(recipe),
        preprocess,
        batch_size=recipe.batch_size,
        seed=seed,
        order_seed=recipe.order_seed,
        name=name,
        world=world,
    )


def new_run(
    model: Classifier,
    examples: Framed,
    recipe: FinetuneParams,
    *,
    preprocess: Mapping[str, Any],
    seed: int,
    workers: int = 0,
    world: World = ALONE,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """One seed at its first step, on these examples; `callbacks` come after those of the recipe.

    Of texts, rows of embeddings decay only where a gradient comes; see modelstock.training.row_decay.

    Raises:
        TrainingError: fewer examples than a batch, a layer decay or gradient checkpointing that the tower does not
            allow, or augmentation of texts.
    """
    name, epoch = f"seed-{seed}", steps_per_epoch(len(examples.labels), recipe.batch_size)
    of_texts = isinstance(examples, Tokenised)
    if of_texts:
        check_text_recipe(recipe)
    check_batch_norm(model, recipe, world)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    model.head.requires_grad_(recipe.train_head)
    groups = parameter_groups(
        model,
        layer_decay=recipe.layer_decay,
        weight_decay=recipe.weight_decay,
        decay=recipe.decay,
        by_row=embeddings_of(model) if of_texts else (),
    )
    data = batches_of(examples, recipe, preprocess, seed=seed, name=name, world=world)
    schedule = schedule_of(recipe, epoch)
    device = world.device

    def batches(start: int, stop: int) -> Generator[Batch, None, None]:
        return data.load(start, stop, workers=workers, pin=device.type == "cuda")

    optimizer = adamw(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, beta2=recipe.beta2, device=device)
    if of_texts:
        optimizer.register_step_pre_hook(decay_rows)
    return Run(
        name=name,
        model=model,
        optimizer=optimizer,
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
