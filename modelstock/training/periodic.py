"""Periodic merging: seeds train side by side, are merged on the way by a rule, and go on from what it gives them.

In one process the seeds take turns and share the decoded data; several processes train one seed each.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelstock.errors import AskedToEnd, TrainingError
from modelstock.files import is_intact, sealed, write_json
from modelstock.merging.rules import RULES
from modelstock.models.towers import Classifier, build_classifier, tensors_of
from modelstock.notices import collected, remark
from modelstock.params import FinetuneParams, PeriodicParams
from modelstock.stopping import asked_to_end
from modelstock.tracking.history import write_history, write_rows
from modelstock.training.callbacks import Log
from modelstock.training.distributed import ALONE, World
from modelstock.training.inputs import Inputs
from modelstock.training.job import Job, Setting
from modelstock.training.loop import DamagedPoint, HistoryRow, Run
from modelstock.training.parallel_merge import Report, flat, give_back, merge_models
from modelstock.training.recipe import examples_of, new_run, steps_per_epoch
from modelstock.training.resume import Clock, read_state, write_state
from modelstock.training.text_batches import framed, notice_too_long
from modelstock.training.validation import accuracy
from modelstock.weights.weight_set import WeightSet


def read_pointer(path: Path, *, of: str) -> dict[str, Any]:
    """What all seeds share of the resume point of `of`.

    Raises:
        DamagedPoint: it is not what was written for `of`.
    """
    try:
        point: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        intact = is_intact(point) and point["of"] == of
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedPoint(f"{type(error).__name__}: {error}") from error
    if not intact:
        raise DamagedPoint("not the bytes that this run wrote")
    return point


def merge_step(number: int, every: float, epoch: int) -> int:
    """The step of merge `number`, from 1: `every` epochs of `epoch` steps after one another, each to the nearest step.

    So merges stay with the epochs where `every` is no whole number of steps; a half is rounded up.
    """
    return int(number * every * epoch + 0.5)


@dataclass(kw_only=True)
class Periodic:
    """Seeds on their way: this process's runs, the step of the last merge, and the facts of all merges.

    `epoch`: steps of an epoch; `measure`: held-out accuracy of the first run's model, when it is the merge.
    `origin`: what the updates of the next merge are measured from; None: the anchor.
    """

    anchor: WeightSet
    runs: Sequence[Run]
    merging: PeriodicParams
    folder: Path
    epoch: int
    measure: Callable[[], float]
    world: World = ALONE
    origin: WeightSet | None = None
    merged: int = 0
    saves: int = 0  # how often all seeds were saved: the number of the last resume point
    history: list[HistoryRow] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def resume(self) -> None:
        """Go on from the last resume point that is what was written, for all seeds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saves = self._numbers("point", "json")
        unusable = []
        while saves:
            point, states, wrong = self._read(saves[-1])
            if not wrong:
                self.saves, self.merged = saves[-1], point["merged"]
                self.history, self.reports = point["history"], point["reports"]
                for run, state in zip(self.runs, states, strict=True):
                    run.load_state(state)
                    if "origin" in state:
                        self._start_from({name: tensor.numpy() for name, tensor in state["origin"].items()})
                break
            unusable.append((saves.pop(), wrong))
        # No process goes on, and so none can finish and remove the point, before all have read it.
        self.world.barrier()
        for number, wrong in unusable:
            if self.world.rank == 0:
                place = self._pointer(number)
                remark(place, f"not used: {wrong}; the run goes on from step {self.runs[0].step}, to the same end")
            self._remove(number, number)
        if self.world.rank == 0:
            write_rows(self.folder / "history.jsonl", self.history)

    def _read(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
        """A resume point: what all seeds share, this process's states, and what is wrong with any process's."""
        point, states, wrong = {}, [], ""
        try:
            point = read_pointer(self._pointer(number), of=f"{self.folder.name}/{number}")
            states = [read_state(self._state(run, number), of=self._name(run, number)) for run in self.runs]
        except (FileNotFoundError, DamagedPoint) as error:
            wrong = str(error)
        intact = self.world.gather(torch.tensor([float(not wrong)], device=self.world.device))
        return point, states, wrong or ("" if all(map(bool, intact)) else "another process's state is damaged")

    def save(self) -> None:
        """Every seed's state first, then the pointer that makes them the resume point: all or none of them count.

        The point before is kept.
        """
        self.saves += 1
        for run in self.runs:
            state = run.state()
            if self.origin is not None:
                state["origin"] = {name: torch.from_numpy(tensor) for name, tensor in self.origin.tensors.items()}
            write_state(self._state(run, self.saves), state, of=self._name(run, self.saves))
            run.saved_step = run.step
        self.world.barrier()
        if self.world.rank == 0:
            point = {"merged": self.merged, "history": self.history, "reports": self.reports}
            write_json(self._pointer(self.saves), sealed({**point, "of": f"{self.folder.name}/{self.saves}"}))
            write_rows(self.folder / "history.jsonl", self.history)
        self.world.barrier()
        self._remove(0, self.saves - 2)

    def _remove(self, first: int, last: int) -> None:
        """Remove resume points, pointers before states, in all processes."""
        if self.world.rank == 0:
            for number in self._numbers("point", "json"):
                if first <= number <= last:
                    self._pointer(number).unlink(missing_ok=True)
        self.world.barrier()
        for run in self.runs:
            for number in self._numbers(run.name, "pt"):
                if first <= number <= last:
                    self._state(run, number).unlink(missing_ok=True)
        self.world.barrier()

    def _numbers(self, name: str, suffix: str) -> list[int]:
        """The numbers of the files `name.<number>.suffix`, in their order."""
        parts = (path.name.split(".") for path in self.folder.glob(f"{name}.*.{suffix}"))
        return sorted(int(part[1]) for part in parts if len(part) == 3 and part[1].isdecimal())

    def _pointer(self, number: int) -> Path:
        return self.folder / f"point.{number}.json"

    def _state(self, run: Run, number: int) -> Path:
        return self.folder / f"{run.name}.{number}.pt"

    def _name(self, run: Run, number: int) -> str:
        """Whose state it is: the job's key is its folder's name."""
        return f"{self.folder.name}/{run.name}/{number}"

    def train(self) -> None:
        """Train to the next merge, merge, and so on to the end.

        Raises:
            AskedToEnd: a process was asked to end; all of them end, wherever their seeds are, before the next merge.
        """
        steps = self.runs[0].steps
        while self.merged < steps:
            target = min(merge_step(len(self.reports) + 1, self.merging.every, self.epoch), steps)
            # One question for all processes before each merge: between merges they take no step together.
            if self.world.any(self._advance(target)):
                self.save()
                reached = ", ".join(str(run.step) for run in self.runs)
                raise AskedToEnd(f"at step {reached} of {steps}")
            self._merge(target)
            due = torch.tensor([float(target == steps or self.clock.due())], device=self.world.device)
            # The first process's clock speaks for all.
            if bool(self.world.gather(due)[0]):
                self.clock.time(self.save)

    def _advance(self, target: int) -> bool:
        """Train this process's seeds to the next merge; whether it was asked to end, on the way or there."""
        for run in self.runs:
            for _ in run.stepping(until=target):
                if asked_to_end():
                    return True
                # Seeds that take turns in one process are saved wherever they are.
                if self.world.size == 1 and self.clock.due():
                    self.clock.time(self.save)
        return asked_to_end()

    def _merge(self, target: int) -> None:
        """Merge all seeds, which are at step `target`; after the last merge no seed keeps anything of its own."""
        rule, options = RULES[self.merging.rule], self.merging.options
        models = [run.model for run in self.runs]
        kept = options[rule.kept] if rule.kept and target < self.runs[0].steps else 0.0
        own = [flat(model) for model in models] if kept else []
        report = merge_models(self.origin or self.anchor, models, rule=rule, options=options, world=self.world)
        self.history.append(self._row(target, report))
        if rule.toward and options[rule.toward] == "last":
            self._start_from(tensors_of(models[0]))
        if kept:
            for model, before in zip(models, own, strict=True):
                give_back(model, before, kept)
        if self.merging.reset_moments:
            for run in self.runs:
                run.optimizer.state.clear()
        self.reports[str(target)] = report
        self.merged = target

    def _start_from(self, merge: Mapping[str, NDArray[Any]]) -> None:
        """Measure the updates of the next merge from this one."""
        self.origin = WeightSet(merge, self.anchor.meta, "the merge before")

    def _row(self, target: int, report: Report) -> HistoryRow:
        """The history's row of a merge: each seed's last loss, medians over tensors, and accuracy once per epoch."""
        losses = torch.tensor([run.last["loss"] for run in self.runs], dtype=torch.float64, device=self.world.device)
        row: HistoryRow = {"step": target}
        row |= {f"loss/{i}": loss.item() for i, loss in enumerate(torch.cat(self.world.gather(losses)))}
        for name in ("ratio", "cosine"):
            values = [facts[name] for facts in report.values() if facts.get(name) is not None]
            row |= {f"merge/{name}": float(np.median(values))} if values else {}
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

    `merging`: an arm; each merge comes at the step that `merge_step` gives, and one at the end. One process trains all
    seeds in turns; several train one each. Each seed has its own data order; one schedule runs across all merges.

    Raises:
        TrainingError: as `finetune`; another number of processes than one or one per seed; merges less than a step
            apart.
    """
    if world.size not in (1, len(seeds)):
        raise TrainingError(
            "periodic.devices",
            got=f"{world.size} processes for {len(seeds)} seeds",
            expected="1, or one per seed",
            cure="start as many as there are seeds",
        )
    anchor, preprocess = inputs.anchor, inputs.anchor.meta["preprocess"]
    train, held_out = framed(inputs.train, preprocess), framed(inputs.held_out, preprocess)
    if world.rank == 0:
        notice_too_long(train, preprocess)
    epoch = steps_per_epoch(len(examples_of(train, recipe, seeds[0]).labels), recipe.batch_size)
    if merging.every * epoch < 1:
        raise TrainingError(
            "periodic.every",
            got=f"{merging.every:g} epochs of {epoch} steps",
            expected=f"a step or more from one merge to the next, {math.ceil(10_000 / epoch) / 10_000:g} epochs",
            cure="raise it",
        )
    runs = [
        new_run(
            build_classifier(anchor).to(world.device),
            examples_of(train, recipe, seed),
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
        epoch=epoch,
        measure=partial(accuracy, model, held_out, preprocess, world.device),
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
    arm: str,
    seeds: Sequence[int],
    setting: Setting,
    out: Path,
) -> float | None:
    """Train `seeds` with periodic merges, and write the last merge, reports and history to the folder `out`.

    `arm`: what these settings are called. Returns the held-out accuracy; None in every process but the first, which
    writes.

    Raises:
        TrainingError: see `train_periodic`.
    """
    # A seed's averages, and how many processes share the work, are not part of what is trained.
    options = recipe.model_dump(mode="json", exclude={"ema", "lawa", "snapshots", "devices"})
    options |= merging.model_dump(mode="json", exclude={"size", "devices"})
    job = Job(
        name=f"periodic-{arm}/{'-'.join(map(str, seeds))}",
        made_by={"stage": "periodic", "arm": arm, "members": list(seeds), "options": options},
        code="modelstock.training.periodic",
        facts=inputs.identities,
        setting=setting,
    )
    with job.mirror(), collected(job.notices):
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
    inputs.recalibrated(job.weight_set(inputs.anchor, tensors_of(model))).save(out / "weights.safetensors")
    write_history(out, history)
    write_json(out / "report.json", reports)
    job.finish()
    return float(history[-1]["validation/top1"])
