"""Small trainings on noise or a few texts, their comparison, and processes that are killed."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.data.examples import Examples, InMemory, Texts
from modelstock.data.preprocess import modality_of
from modelstock.models.towers import build_classifier, tensors_of
from modelstock.params import ARMS, IMAGES_ALONE, FinetuneParams, PeriodicParams, load_params
from modelstock.training.distributed import ALONE, World
from modelstock.training.finetune import finetune
from modelstock.training.inputs import Inputs
from modelstock.training.loop import HistoryRow
from modelstock.training.parallel_merge import Report
from modelstock.training.periodic import train_periodic
from modelstock.weights.weight_set import WeightSet
from tests.support.texts import Sentences

ROOT = Path(__file__).parent.parent.parent
RECIPE = load_params(ROOT / "params.yaml").finetune.model_copy(
    update={
        "batch_size": 8,
        "epochs": 3,
        "warmup_steps": 2,
        "log_every": 1,
        "validate_every": 1,
        "lawa": 2,
        "ema": [0.5, 0.9],
    }
)


def arm(rule: str = "model_stock", *, size: int = 2, **settings: Any) -> PeriodicParams:
    """An arm of periodic merging, with the rule's defaults."""
    return ARMS[rule](rule=rule, size=size, **settings)


EVERY_EPOCH = arm()

Tensors = Mapping[str, NDArray[Any]]


def examples(count: int = 24) -> InMemory:
    """Noise images whose labels go round."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return InMemory(pixels, np.arange(count) % 24)


def data_for(anchor: WeightSet) -> Examples | Texts:
    """What an anchor's tower takes: noise images, or sentences."""
    return Sentences() if modality_of(anchor.meta["preprocess"]) == "text" else examples()


def recipe_for(anchor: WeightSet, **changes: Any) -> FinetuneParams:
    """RECIPE with `changes`, and for texts without what is done to images."""
    of_texts = IMAGES_ALONE if modality_of(anchor.meta["preprocess"]) == "text" else {}
    return FinetuneParams.model_validate({**RECIPE.model_dump(), **of_texts, **changes})


def train(
    anchor: WeightSet,
    folder: Path,
    *,
    seed: int = 0,
    data: Examples | Texts | None = None,
    workers: int = 0,
    world: World = ALONE,
    **changes: Any,
) -> tuple[Tensors, list[HistoryRow], dict[str, Tensors]]:
    """Fine-tune on noise or sentences, by RECIPE with `changes`; returns tensors, history and averages."""
    model = build_classifier(anchor).to(world.device)
    history, averages = finetune(
        model,
        data or data_for(anchor),
        data_for(anchor),
        recipe=recipe_for(anchor, **changes),
        preprocess=anchor.meta["preprocess"],
        seed=seed,
        folder=folder,
        workers=workers,
        world=world,
    )
    return tensors_of(model), history, {a.name: {k: v.cpu().numpy() for k, v in a.tensors().items()} for a in averages}


def train_side_by_side(
    anchor: WeightSet,
    folder: Path,
    *,
    seeds: tuple[int, ...] = (0, 1),
    merging: PeriodicParams = EVERY_EPOCH,
    world: World = ALONE,
    workers: int = 0,
    **changes: Any,
) -> tuple[Tensors, list[HistoryRow], dict[str, Report]]:
    """Periodic merging on noise or sentences, by RECIPE with `changes`; returns tensors, history and reports."""
    model, history, reports = train_periodic(
        Inputs(anchor=anchor, train=data_for(anchor), held_out=data_for(anchor), identities={}),
        recipe_for(anchor, **changes),
        merging,
        seeds=seeds,
        folder=folder,
        workers=workers,
        world=world,
    )
    return tensors_of(model), history, reports


def equal(first: Tensors, second: Tensors) -> bool:
    """Whether two sets of tensors have the same names and values."""
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def dropping(anchor: WeightSet) -> WeightSet:
    """The anchor with an architecture that drops patches at random while it trains; its tensors fit as they are."""
    config = anchor.meta["architecture"]
    vision = {**config["vision_cfg"], "patch_dropout": 0.25}
    return WeightSet(anchor.tensors, {**anchor.meta, "architecture": {**config, "vision_cfg": vision}}, "anchor")


def keep(folder: Path, tensors: Tensors, *results: object) -> None:
    """Write what a training gave for another process to compare: tensors, and anything that is JSON."""
    WeightSet(tensors, {}).save(folder / "weights.safetensors")
    (folder / "results.json").write_text(json.dumps(results, sort_keys=True))


def child(work: Callable[[], object], delay: float | None = None) -> int:
    """Run `work` in a forked process, killed after `delay` seconds where that is given; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]
