"""A ViT-B/32 in training, on a CPU or a GPU: images per second of a bare loop and of the stage's loop.

Images are photographs' sizes, 500x375 in memory. Run by `python benchmarks/train.py --setting vit-b-32`.

- bare: forward, backward, clipping and AdamW on normalised batches that are on the device already.
- bare, repeatable: the same with deterministic kernels, which training always has.
- the loop, batches made before: the stage's loop, its batches copied from memory: what checks and history cost.
- the loop, N workers: the stage's loop with batches cropped and resized by N processes meanwhile.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from modelstock.data.examples import InMemory
from modelstock.devices import deterministic, device_kind
from modelstock.models.towers import Classifier, build_visual
from modelstock.params import FinetuneParams, load_params
from modelstock.training.callbacks import Log
from modelstock.training.distributed import World
from modelstock.training.loop import Batch, Run, adamw, autocast
from modelstock.training.recipe import new_run

ROOT = Path(__file__).parent.parent
CLASSES = 1000
CONFIG = open_clip.get_model_config("ViT-B-32-quickgelu")
PREPROCESS = {
    "size": 224,
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
}
WARM_UP = 3  # steps that are not timed, without workers


def classifier(device: str) -> Classifier:
    """A ViT-B/32 with random weights."""
    torch.manual_seed(0)
    return Classifier(build_visual(CONFIG), CLASSES, CONFIG["embed_dim"]).to(device)


def flops(*, training: bool) -> int:
    """Floating-point operations per image, a multiplication and an addition counting as two, by torch's counter."""
    with torch.device("meta"):
        model = Classifier(build_visual(CONFIG), CLASSES, CONFIG["embed_dim"]).train()
        images = torch.zeros(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            logits = model(images)
            if training:
                logits.sum().backward()
    return counter.get_total_flops()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bare(options: argparse.Namespace) -> float:
    """Seconds for the steps of a loop that does nothing but train."""
    device, size = options.device, options.batch_size
    model = classifier(device).train()
    groups = [{"params": list(model.parameters())}]
    optimizer = adamw(groups, lr=1e-5, weight_decay=0.1, beta2=0.98, device=torch.device(device))
    batches = [(torch.rand(size, 3, 224, 224), torch.arange(size) % CLASSES) for _ in range(2)]
    batches = [tuple(part.to(device) for part in batch) for batch in batches]
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            synchronize(device)
            begun = time.perf_counter()
        images, labels = batches[step % 2]
        with autocast(options.precision, device):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    synchronize(device)
    return time.perf_counter() - begun


def recipe_of(options: argparse.Namespace) -> FinetuneParams:
    """The recipe of params.yaml with this batch, and as many steps."""
    recipe = load_params(ROOT / "params.yaml").finetune
    epochs = warm_up(options.workers) + options.steps  # of two steps each: more than are taken
    changes = {"batch_size": options.batch_size, "precision": options.precision, "epochs": epochs}
    changes |= {"lr": 1e-5, "warmup_steps": 1, "ema": [], "lawa": 0, "snapshots": False, "micro_batch": None}
    return recipe.model_copy(update={**changes, "devices": 1})


def photographs(count: int) -> InMemory:
    """Images of 500x375; what is on them changes no time."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 375, 500, 3), np.uint8)
    return InMemory(pixels, np.arange(count) % CLASSES)


def loop(options: argparse.Namespace, examples: InMemory, *, workers: int | None) -> tuple[float, float]:
    """Seconds for the steps of the stage's loop, and those spent waiting; workers None: batches made before."""
    world = World(device=torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"))
    model = classifier(options.device)
    run = new_run(
        model,
        examples,
        recipe_of(options),
        preprocess=PREPROCESS,
        seed=0,
        workers=workers or 0,
        world=world,
        callbacks=[Log(10, 10**9)],
    )
    if workers is None:
        made = [torch.rand(options.batch_size, 3, 224, 224), torch.arange(options.batch_size) % CLASSES]
        batch = tuple(part.pin_memory() for part in made) if options.device == "cuda" else tuple(made)
        run.batches = lambda start, stop: (batch for _ in range(start, stop))
    waited: list[float] = []
    run.batches = watched(run.batches, waited)
    untimed = warm_up(workers)
    return _timed(run, options, untimed), sum(waited[untimed:])


def warm_up(workers: int | None) -> int:
    """Steps that are not timed: until what workers make ahead of the first step is used up."""
    return WARM_UP + 2 * (workers or 0)


def _timed(run: Run, options: argparse.Namespace, untimed: int) -> float:
    for step in run.stepping(until=untimed + options.steps):
        if step == untimed:
            synchronize(options.device)
            begun = time.perf_counter()
    synchronize(options.device)
    return time.perf_counter() - begun


def watched(
    batches: Callable[[int, int], Iterator[Batch]], waited: list[float]
) -> Callable[[int, int], Iterator[Batch]]:
    """The same batches; `waited` gets the seconds that each was waited for."""

    def of(start: int, stop: int) -> Iterator[Batch]:
        inner = batches(start, stop)
        for _ in range(start, stop):
            begun = time.perf_counter()
            batch = next(inner)
            waited.append(time.perf_counter() - begun)
            yield batch

    return of


def measure(options: argparse.Namespace) -> str:
    """Let the variants take turns and give the table as Markdown."""
    options.device = device_kind(options.device)
    deterministic(options.threads)
    examples = photographs(2 * options.batch_size)

    def unrepeatable() -> tuple[float, float]:
        torch.use_deterministic_algorithms(False)
        try:
            return bare(options), 0.0
        finally:
            torch.use_deterministic_algorithms(True)

    variants: dict[str, Callable[[], tuple[float, float]]] = {
        "bare": unrepeatable,
        "bare, repeatable": lambda: (bare(options), 0.0),
        "the loop, batches made before": lambda: loop(options, examples, workers=None),
        f"the loop, {options.workers} workers": lambda: loop(options, examples, workers=options.workers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    waiting: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            spent, waited = variant()
            seconds[name].append(spent)
            waiting[name].append(waited / spent)
    images = options.steps * options.batch_size
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    lines = [
        f"ViT-B/32 in training, {where}, {options.precision}, batch {options.batch_size}, {options.steps} steps, "
        f"{options.threads} threads, torch {torch.__version__}, medians of {options.rounds}",
        "",
        "| | images per second | of the bare loop's speed | of the time waiting for data |",
        "|---|---:|---:|---:|",
    ]
    for name in variants:
        rate = images / statistics.median(seconds[name])
        share = statistics.median(a / b for a, b in zip(seconds["bare"], seconds[name], strict=True))
        lines.append(f"| {name} | {rate:,.0f} | {share:.2f} | {100 * statistics.median(waiting[name]):.1f} % |")
    return "\n".join(lines)
