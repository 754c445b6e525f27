"""Training the embedded benchmark's tower: images per second beside a bare loop, and what each extra costs.

    python benchmarks/train.py [--steps N] [--rounds N] [--batch-size N] [--threads N]

- bare: forward, backward, clipping and AdamW on normalised images already in memory; no crops, no checks, no history.
- ours: the stage's loop, with crops, checks and history, its batches made in the training process (`workers` 0) or
  ahead by one process.
- each extra: the loop with workers 0 and that extra. EMA and LAWA as in params.yaml, LAWA summing every 20 steps (in
  the pipeline: every epoch). Tracking is the live mirror into a SQLite store, sending every 5 seconds.

Variants take turns, `rounds` times; a figure is the median over rounds of the ratio to the bare loop of its round, in
elapsed time and in this process's processor time, which other work on the machine disturbs less (and which leaves out
the process of `workers` 1).
Resume points are timed by themselves: seconds per save, and its share of the time at the pipeline's pace.

    python benchmarks/train.py --setting vit-b-32 [--device cpu|cuda] [--precision NAME] [--workers N] ...

A ViT-B/32 on photographs in memory instead: benchmarks/vit.py.
"""

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from modelstock.data.examples import InMemory
from modelstock.data.images import normalise
from modelstock.data.shapes.names import NAMES, TINY_PREPROCESS
from modelstock.data.shapes.render import draw
from modelstock.models.towers import TINY_CLIP, Classifier, build_clip
from modelstock.params import FinetuneParams, load_params
from modelstock.tracking import mirror
from modelstock.tracking.history import write_rows
from modelstock.tracking.mlflow import MlflowTracker
from modelstock.tracking.tracker import NullTracker
from modelstock.training import resume
from modelstock.training.batches import epoch_order
from modelstock.training.callbacks import Ema, Lawa, Log
from modelstock.training.loop import Batch, Callback, Run
from modelstock.training.recipe import new_run
from modelstock.training.resume import ResumePoint

ROOT = Path(__file__).parent.parent
Batches = Callable[[int, int], Generator[Batch, None, None]]


def tower() -> Classifier:
    """The embedded benchmark's classifier with random weights."""
    torch.manual_seed(0)
    return Classifier(build_clip(TINY_CLIP).visual, len(NAMES), 128)


class Seconds(NamedTuple):
    """What something took."""

    elapsed: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        """Both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, begun: "Seconds") -> "Seconds":
        """From then until now."""
        return Seconds(self.elapsed - begun.elapsed, self.processor - begun.processor)


def bare(images: torch.Tensor, labels: torch.Tensor, batch_size: int, steps: int) -> Seconds:
    """What `steps` take of a loop that does nothing but train."""
    model, order = tower(), epoch_order(len(images), seed=0, epoch=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    model.train()
    batches = len(images) // batch_size
    begun = Seconds.now()
    for step in range(steps):
        at = step % batches * batch_size
        rows = torch.from_numpy(order[at : at + batch_size])
        loss = functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Seconds.now().since(begun)


class Waited:
    """Counts the seconds spent waiting for batches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, batches: Batches) -> Batches:
        """The same batches, each waited for with a stop watch."""

        def watched(start: int, stop: int) -> Generator[Batch, None, None]:
            with contextlib.closing(batches(start, stop)) as inner:
                while True:
                    begun = time.perf_counter()
                    batch = next(inner, None)
                    self.seconds += time.perf_counter() - begun
                    if batch is None:
                        return
                    yield batch

        return watched


class Growing(Callback):
    """Lets a mirror see new rows, as resume points do in the pipeline."""

    def __init__(self, history: Path) -> None:
        self.history = history

    def after_step(self, run: Run) -> None:
        if run.step % 20 == 0:
            write_rows(self.history, run.history)


@dataclass(frozen=True, kw_only=True)
class Ours:
    """The stage's loop on examples in memory, by a recipe, for `steps`; `folder` is for what it writes."""

    examples: InMemory
    recipe: FinetuneParams
    steps: int
    folder: Path

    def __call__(
        self,
        *,
        workers: int = 0,
        extras: Callable[[Classifier], Sequence[Callback]] = lambda model: (),
        track: bool = False,
    ) -> tuple[Seconds, float, Run]:
        """What the steps took, seconds of it waiting for data, and the run."""
        model, waited, history = tower(), Waited(), self.folder / "history.jsonl"
        callbacks = [Log(self.recipe.log_every, 10**9), *extras(model), *([Growing(history)] if track else [])]
        run = new_run(
            model,
            self.examples,
            self.recipe,
            preprocess=TINY_PREPROCESS,
            seed=0,
            workers=workers,
            callbacks=callbacks,
        )
        run.batches = waited.around(run.batches)
        history.write_text("")
        tracker = MlflowTracker(self.folder) if track else NullTracker()  # before the clock starts: once per run
        with mirror.Mirror(lambda: tracker, history, key="benchmark", name="benchmark", params={}):
            begun = Seconds.now()
            run.train(until=self.steps)
            seconds = Seconds.now().since(begun)
        return seconds, waited.seconds, run


def seconds_of_a_save(run: Run, folder: Path) -> float:
    """Seconds that a resume point of this run takes."""
    point = ResumePoint(folder)
    point.resume(run)
    begun = time.perf_counter()
    point.save(run)
    return time.perf_counter() - begun


def main() -> None:
    """Let the variants take turns and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--setting", choices=["shapes", "vit-b-32"], default="shapes")
    parser.add_argument("--device", default="cpu", help="of --setting vit-b-32")
    parser.add_argument("--precision", default="bfloat16", help="of --setting vit-b-32")
    parser.add_argument("--workers", type=int, default=1, help="of --setting vit-b-32")
    options = parser.parse_args()
    if options.setting == "vit-b-32":
        from vit import measure

        print(measure(options))
        return
    torch.set_num_threads(options.threads)
    pixels, numbers = draw("train", range(1500), seed=0)
    images, labels = normalise(pixels, TINY_PREPROCESS), torch.from_numpy(numbers.astype(np.int64))
    examples = InMemory(pixels, numbers)
    epochs = -(-options.steps // (len(pixels) // options.batch_size))
    recipe = load_params(ROOT / "params.yaml").finetune.model_copy(
        update={"batch_size": options.batch_size, "epochs": epochs, "warmup_steps": 1}
    )
    folder = Path(tempfile.mkdtemp())
    mirror.AFTER_S = 0.0
    ours = Ours(examples=examples, recipe=recipe, steps=options.steps, folder=folder)
    variants: dict[str, Callable[[], tuple[Seconds, float, Run]]] = {
        "ours, workers 0": ours,
        "ours, workers 1": lambda: ours(workers=1),
        "with EMA": lambda: ours(extras=lambda model: [Ema(0.99, model)]),
        "with LAWA": lambda: ours(extras=lambda model: [Lawa(5, 20, options.steps)]),
        "with tracking": lambda: ours(track=True),
    }
    for warm in (lambda: bare(images, labels, options.batch_size, 10), ours):
        warm()
    speed: dict[str, list[float]] = {name: [] for name in variants}
    work: dict[str, list[float]] = {name: [] for name in variants}
    waiting: dict[str, list[float]] = {name: [] for name in variants}
    floor, saves = [], []
    for _ in range(options.rounds):
        base = bare(images, labels, options.batch_size, options.steps)
        floor.append(options.steps * options.batch_size / base.elapsed)
        for name, variant in variants.items():
            seconds, waited, run = variant()
            speed[name].append(base.elapsed / seconds.elapsed)
            work[name].append(base.processor / seconds.processor)
            waiting[name].append(waited / seconds.elapsed)
        saves.append(seconds_of_a_save(run, folder / "point"))
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, batch {options.batch_size}, {options.steps} steps, "
        f"medians of {options.rounds}; bare: {statistics.median(floor):,.0f} images per second\n"
    )
    print("| | of the bare loop's speed | in processor time | of the time waiting for data |")
    print("|---|---:|---:|---:|\n| bare | 1.00 | 1.00 | |")
    for name in variants:
        ratio, processor, wait = (statistics.median(figures[name]) for figures in (speed, work, waiting))
        print(f"| {name} | {ratio:.3f} | {processor:.3f} | {100 * wait:.1f} % |")
    save = statistics.median(saves)
    pace = max(resume.SAVE_EVERY_S, save / resume.SAVE_SHARE)
    print(f"\nA resume point takes {1000 * save:.0f} ms, one every {pace:.0f} s: {100 * save / (pace + save):.2f} %.")


if __name__ == "__main__":
    main()
