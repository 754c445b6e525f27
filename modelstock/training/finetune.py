"""Fine-tuning one seed from the anchor: its training, and its weight sets with averages and snapshots."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from modelstock.data.examples import Examples, Texts
from modelstock.files import atomic_path, link_or_copy
from modelstock.models.towers import Classifier, build_classifier, tensors_of
from modelstock.notices import collected
from modelstock.params import FinetuneParams
from modelstock.tracking.history import write_history
from modelstock.training.callbacks import Average, Ema, Lawa, Log, Snapshots
from modelstock.training.distributed import ALONE, World
from modelstock.training.inputs import Inputs
from modelstock.training.job import Job, Setting
from modelstock.training.loop import Callback, HistoryRow
from modelstock.training.recipe import examples_of, new_run, schedule_of, steps_per_epoch
from modelstock.training.resume import ResumePoint
from modelstock.training.text_batches import Framed, framed, notice_too_long
from modelstock.training.validation import Validation
from modelstock.weights.weight_set import WeightSet


def finetune(
    model: Classifier,
    examples: Examples | Texts | Framed,
    held_out: Examples | Texts | Framed,
    *,
    recipe: FinetuneParams,
    preprocess: Mapping[str, Any],
    seed: int,
    folder: Path,
    workers: int = 0,
    world: World = ALONE,
    snapshot: Callable[[int], Path | None] | None = None,
) -> tuple[list[HistoryRow], list[Average]]:
    """Fine-tune tower and head in place; returns the history, and the averages along the run.

    `held_out`: scored every `validate_every` epochs and at the end, never trained on. `folder`: where the resume point
    is kept, one folder per job. `workers`: processes that make batches ahead. `snapshot`: called with the number of
    every epoch but the last; returns the file that it wrote. The model is on the world's device.

    Raises:
        TrainingError: as `new_run`; a loss that is not finite, or memory that does not suffice.
    """
    examples = examples_of(framed(examples, preprocess), recipe, seed)
    if world.rank == 0:
        notice_too_long(examples, preprocess)
    epoch = steps_per_epoch(len(examples.labels), recipe.batch_size)
    schedule = schedule_of(recipe, epoch)
    averages: list[Average] = [Ema(decay, model) for decay in recipe.ema]
    averages += [Lawa(recipe.lawa, epoch, schedule.head_steps + schedule.steps)] if recipe.lawa else []
    point = ResumePoint(folder)
    callbacks: list[Callback] = [
        Log(recipe.log_every, epoch),
        Validation(recipe.validate_every * epoch, held_out, preprocess),
        *averages,
        *([Snapshots(epoch, snapshot)] if snapshot else []),
        point,
    ]
    run = new_run(
        model, examples, recipe, preprocess=preprocess, seed=seed, workers=workers, world=world, callbacks=callbacks
    )
    point.resume(run)
    run.train()
    model.eval()
    return run.history, averages


def finetune_seed(
    inputs: Inputs, recipe: FinetuneParams, *, name: str, made_by: Mapping[str, Any], setting: Setting, out: Path
) -> float | None:
    """Fine-tune `made_by["seed"]`, and write its weights, averages, snapshots and history to the folder `out`.

    `made_by`: stage, seed and what sets the run apart from others of its recipe. Returns the held-out accuracy; None in
    every process but the first, which writes.

    Raises:
        TrainingError: see `finetune`.
    """
    anchor, options = inputs.anchor, recipe.model_dump(mode="json")
    job = Job(
        name=name,
        made_by={**made_by, "options": options},
        code="modelstock.training.finetune",
        facts=inputs.identities,
        setting=setting,
    )
    model = build_classifier(anchor).to(setting.world.device)
    with job.mirror(), collected(job.notices):
        history, averages = finetune(
            model,
            inputs.train,
            inputs.held_out,
            recipe=recipe,
            preprocess=anchor.meta["preprocess"],
            seed=made_by["seed"],
            folder=job.folder,
            workers=setting.workers,
            world=setting.world,
            snapshot=partial(_save_snapshot, job, model, anchor) if recipe.snapshots else None,
        )
    if setting.world.rank:
        return None
    final = tensors_of(model)
    job.weight_set(anchor, final).save(out / "weights.safetensors")
    for average in averages:
        tensors = {**final, **{k: t.cpu().numpy() for k, t in average.tensors().items()}}
        changes = {"average": average.name.split("-")[0], "options": {**options, **average.options}}
        inputs.recalibrated(job.weight_set(anchor, tensors, changes)).save(out / f"{average.name}.safetensors")
    for epoch in range(1, recipe.head_first_epochs + recipe.epochs if recipe.snapshots else 0):
        with atomic_path(out / _snapshot_name(epoch)) as temporary:
            link_or_copy(job.folder / _snapshot_name(epoch), temporary)
    write_history(out, history)
    job.finish()
    return float(history[-1]["validation/top1"])


def longer(recipe: FinetuneParams, factor: int) -> FinetuneParams:
    """The recipe with `factor` times the epochs and without averages and snapshots."""
    changes = {"epochs": factor * recipe.epochs, "ema": [], "lawa": 0, "snapshots": False}
    return recipe.model_copy(update=changes)


def _snapshot_name(epoch: int) -> str:
    return f"epoch-{epoch}.safetensors"


def _save_snapshot(job: Job, model: Classifier, anchor: WeightSet, epoch: int) -> Path:
    changes = {"average": "snapshot", "options": {**job.made_by["options"], "epoch": epoch}}
    file = job.folder / _snapshot_name(epoch)
    job.weight_set(anchor, tensors_of(model), changes).save(file)
    return file
