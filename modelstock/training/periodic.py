"""Periodic merging: seeds train side by side, are merged by Model Stock on the way, and all go on from the merge.

In one process the seeds take turns and share the decoded data; several processes train one seed each.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelstock.errors import TrainingError
from modelstock.files import write_json
from modelstock.models.towers import Classifier, build_classifier, tensors_of
from modelstock.params import FinetuneParams, PeriodicParams
from modelstock.tracking.history import write_history, write_rows
from modelstock.training.callbacks import Log
from modelstock.training.distributed import ALONE, World
from modelstock.training.inputs import Inputs
from modelstock.training.job import Job, Setting
from modelstock.training.loop import HistoryRow, Run
from modelstock.training.parallel_merge import Report, merge_models
from modelstock.training.recipe import new_run, steps_per_epoch
from modelstock.training.resume import Clock, read_state, write_state
from modelstock.training.validation import accuracy
from modelstock.weights.weight_set import WeightSet


@dataclass(kw_only=True)
class Periodic:
    """Seeds on their way: this process's runs, the step of the last merge, and the facts of all merges.

    `every`: steps between two merges; `epoch`: steps of an epoch; `measure`: held-out accuracy of the merged model.
    """

    anchor: WeightSet
    runs: Sequence[Run]
    merging: PeriodicParams
    folder: Path
    every: int
    epoch: int
    measure: Callable[[], float]
    world: World = ALONE
    merged: int = 0
    saves: int = 0  # how often all seeds were saved: in the names of their states, so that a new one replaces none
    history: list[HistoryRow] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def resume(self) -> None:
        """Go on from the last resume point that all seeds have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._pointer.exists():
            point = json.loads(self._pointer.read_text(encoding="utf-8"))
            self.saves, self.merged = point["saves"], point["merged"]
            self.history, self.reports = point["history"], point["reports"]
            for run in self.runs:
                run.load_state(read_state(self._state(run)))
        # No process goes on, and so none can finish and remove the point, before all have read it.
        self.world.barrier()
        if self.world.rank == 0:
            write_rows(self.folder / "history.jsonl", self.history)

    def save(self) -> None:
        """Every seed's state first, then the pointer that makes them the resume point: all or none of them count."""
        replaced = [self._state(run) for run in self.runs]
        self.saves += 1
        for run in self.runs:
            write_state(self._state(run), run.state())
            run.saved_step = run.step
        self.world.barrier()
        if self.world.rank == 0:
            point = {"saves": self.saves, "merged": self.merged, "history": self.history, "reports": self.reports}
            write_json(self._pointer, point)
            write_rows(self.folder / "history.jsonl", self.history)
        self.world.barrier()
        for state in replaced:
            state.unlink(missing_ok=True)
        self.world.barrier()

    @property
    def _pointer(self) -> Path:
        return self.folder / "point.json"

    def _state(self, run: Run) -> Path:
        return self.folder / f"{run.name}.{self.saves}.pt"

    def train(self) -> None:
        """Train to the next merge, merge, and so on to the end."""
        steps = self.runs[0].steps
        while self.merged < steps:
            target = min(self.merged + self.every, steps)
            for run in self.runs:
                for _ in run.stepping(until=target):
                    # Seeds that take turns in one process are saved wherever they are.
                    if self.world.size == 1 and self.clock.due():
                        self.clock.time(self.save)
            self._merge(target)
            due = torch.tensor([float(target == steps or self.clock.due())], device=self.world.device)
            # The first process's clock speaks for all.
            if bool(self.world.gather(due)[0]):
                self.clock.time(self.save)

    def _merge(self, target: int) -> None:
        """Merge all seeds, which are at step `target`."""
        models = [run.model for run in self.runs]
        report = merge_models(
            self.anchor, models, pairwise=self.merging.pairwise, clip=self.merging.clip, world=self.world
        )
        if self.merging.reset_moments:
            for run in self.runs:
                run.optimizer.state.clear()
        self.history.append(self._row(target, report))
        self.reports[str(target)] = report
        self.merged = target

    def _row(self, target: int, report: Report) -> HistoryRow:
        """The history's row of a merge: each seed's last loss, medians over tensors, and accuracy once per epoch."""
        losses = torch.tensor([run.last["loss"] for run in self.runs], dtype=torch.float64, device=self.world.device)
        row: HistoryRow = {"step": target}
        row |= {f"loss/{i}": loss.item() for i, loss in enumerate(torch.cat(self.world.gather(losses)))}
        row |= {"merge/ratio": float(np.median([facts["ratio"] for facts in report.values()]))}
        cosines = [facts["cosine"] for facts in report.values() if facts["cosine"] is not None]
        row |= {"merge/cosine": float(np.median(cosines))} if cosines else {}
        row["lr"] = self.runs[0].last["lr"]
        ended = target // self.epoch > self.merged // self.epoch or target == self.runs[0].steps
        if ended and self.world.rank == 0:
            row["validation/top1"] = self.measure()
        return row


def train_periodic(
    inputs: Inputs,
    recipe: FinetuneParams,
    merging: PeriodicParams,
    *,
    seeds: Sequence[int],
    folder: Path,
    workers: int = 0,
    world: World = ALONE,
) -> tuple[Classifier, list[HistoryRow], dict[str, Report]]:
    """Train `seeds` from the anchor with periodic merges; returns the last merge, the history and all reports.

    One process trains all seeds in turns; several train one each. Each seed has its own data order; one schedule runs
    across all merges.

    Raises:
        TrainingError: as `finetune`; or another number of processes than one or one per seed.
    """
    if world.size not in (1, len(seeds)):
        raise TrainingError(
            "periodic.devices",
            got=f"{world.size} processes for {len(seeds)} seeds",
            expected="1, or one per seed",
            cure="start as many as there are seeds",
        )
    anchor, preprocess = inputs.anchor, inputs.anchor.meta["preprocess"]
    epoch = steps_per_epoch(len(inputs.train.labels), recipe.batch_size)
    runs = [
        new_run(
            build_classifier(anchor).to(world.device),
            inputs.train,
            recipe,
            preprocess=preprocess,
            seed=seed,
            workers=workers,
            world=World(device=world.device),  # a seed's steps are its own: between merges, processes share nothing
            callbacks=[Log(recipe.log_every, epoch)],
        )
        for seed in (seeds if world.size == 1 else [seeds[world.rank]])
    ]
    model: Any = runs[0].model
    periodic = Periodic(
        anchor=anchor,
        runs=runs,
        merging=merging,
        folder=folder,
        every=merging.every_steps or epoch,
        epoch=epoch,
        measure=partial(accuracy, model, inputs.held_out, preprocess, world.device),
        world=world,
    )
    periodic.resume()
    periodic.train()
    return model.eval(), periodic.history, periodic.reports


def merge_periodically(
    inputs: Inputs,
    recipe: FinetuneParams,
    merging: PeriodicParams,
    *,
    seeds: Sequence[int],
    setting: Setting,
    out: Path,
) -> float | None:
    """Train `seeds` with periodic merges, and write the last merge, reports and history to the folder `out`.

    Returns the held-out accuracy; None in every process but the first, which writes.

    Raises:
        TrainingError: see `train_periodic`.
    """
    # A seed's averages, and how many processes share the work, are not part of what is trained.
    options = recipe.model_dump(mode="json", exclude={"ema", "lawa", "snapshots", "devices"})
    options |= merging.model_dump(mode="json", exclude={"sizes", "devices"})
    job = Job(
        name=f"periodic/{'-'.join(map(str, seeds))}",
        made_by={"stage": "periodic", "method": "periodic", "members": list(seeds), "options": options},
        code="modelstock.training.periodic",
        facts=inputs.identities,
        setting=setting,
    )
    with job.mirror():
        model, history, reports = train_periodic(
            inputs,
            recipe,
            merging,
            seeds=seeds,
            folder=job.folder,
            workers=setting.workers,
            world=setting.world,
        )
    if setting.world.rank:
        return None
    job.weight_set(inputs.anchor, tensors_of(model)).save(out / "weights.safetensors")
    write_history(out, history)
    write_json(out / "report.json", reports)
    job.finish()
    return float(history[-1]["validation/top1"])
