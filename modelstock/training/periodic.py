"""Periodic merging: seeds train side by side, are merged by Model Stock on the way, and all go on from the merge.

In one process the seeds take turns and share the decoded data; with one process a seed, each gets a part of every
update, so that of the weights only these parts, the inner products and the merged parts travel: as much as one
all-reduce. Inner products are summed block by block as `merging` sums them, in one order, so both ways, and
`merging.merge` of the same weights, give the same bits on CPUs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelstock.data.examples import Examples
from modelstock.errors import TrainingError
from modelstock.files import write_json
from modelstock.merging.kernels import blended, chunks, inner_products, runs
from modelstock.merging.methods.model_stock import model_stock
from modelstock.models.towers import Classifier
from modelstock.params import FinetuneParams, PeriodicParams
from modelstock.training.callbacks import Clock, Log, read_state, write_growing_history, write_state
from modelstock.training.distributed import ALONE, World
from modelstock.training.finetune import accuracy, new_run, steps_an_epoch
from modelstock.training.loop import Callback, Run
from modelstock.weights.tensors import StoredTensor, in_memory
from modelstock.weights.weight_set import WeightSet

Float = NDArray[np.float64]
Report = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """Values `start` to `stop` of the flat vector of all tensors; they belong to tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


def blocks_of(sizes: Sequence[int]) -> list[Block]:
    """Every tensor in the blocks that `merging` takes it in; none reaches into the next tensor."""
    found, offset = [], 0
    for number, size in enumerate(sizes):
        found += [Block(number, offset + run[0].start, offset + run[-1].stop) for run in runs(size, 1) if run]
        offset += size
    return found


def shares_of(found: Sequence[Block], processes: int) -> list[Sequence[Block]]:
    """Consecutive blocks for each process, about as many values for each."""
    total = found[-1].stop
    owners = [min(block.start * processes // total, processes - 1) for block in found]
    return [[c for c, owner in zip(found, owners, strict=True) if owner == rank] for rank in range(processes)]


def flat(model: torch.nn.Module) -> Tensor:
    """The floating tensors of a model, by name, in one float32 vector on its device."""
    state = model.state_dict()
    return torch.cat([state[n].detach().reshape(-1) for n in sorted(state) if state[n].is_floating_point()])


def merge_models(
    anchor: WeightSet, models: Sequence[torch.nn.Module], params: PeriodicParams, world: World = ALONE
) -> Report:
    """Merge this process's models with those of all others by Model Stock, in place; returns tensor -> facts.

    Facts: norms of the updates, cosine (mean over pairs), ratio, flag; the same in every process.
    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3 and its periodic merging.
    """
    names = sorted(n for n, t in anchor.tensors.items() if t.dtype.kind == "f")
    found = blocks_of([anchor.tensors[n].size for n in names])
    shares = shares_of(found, world.size)
    counts = [sum(c.stop - c.start for c in share) for share in shares]
    mine = shares[world.rank]
    first = mine[0].start if mine else 0
    origin = np.concatenate([anchor.tensors[n].reshape(-1) for n in names])
    parts = [part for model in models for part in world.exchange(flat(model), counts)]
    held = [part.cpu().numpy() for part in parts]

    def tensors(block: Block) -> tuple[StoredTensor, list[StoredTensor]]:
        """The anchor's values of a block, and each model's."""
        place = slice(block.start - first, block.stop - first)
        arrays = {"": origin[block.start : block.stop]} | {str(i): part[place] for i, part in enumerate(held)}
        base, *others = in_memory(arrays, {}, "models in training").tensors.values()
        return base, others

    grams = _grams(tensors, mine, shares, len(held), len(names), world)
    # The order by the updates' norms that `merging` takes too: a sum then has one order, whichever seed comes first.
    squares = np.diagonal(grams, axis1=1, axis2=2)
    order = sorted(range(len(held)), key=lambda i: squares[:, i].tolist())
    grams = grams[:, order][:, :, order]
    blends = [model_stock(gram, pairwise=params.pairwise, clip=params.clip) for gram in grams]

    merged = np.empty(counts[world.rank], np.float32)
    for block in mine:
        base, others = tensors(block)
        shared, at = blends[block.tensor].coefficients[None], block.start - first
        for start, piece in blended(base, [others[i] for i in order], list(chunks(base.size, 1)), shared, "F32"):
            merged[at + start : at + start + piece.size] = piece
    longest = torch.zeros(max(counts), device=world.device)
    longest[: merged.size] = torch.from_numpy(merged).to(world.device)
    whole = torch.cat([part[:count] for part, count in zip(world.gather(longest), counts, strict=True)])
    for model in models:
        state, offset = model.state_dict(), 0
        for name in names:
            state[name].copy_(whole[offset : offset + state[name].numel()].reshape(state[name].shape))
            offset += state[name].numel()
    report: Report = {}
    for name, gram, blend in zip(names, grams, blends, strict=True):
        norms = np.sqrt(np.diag(gram))
        report[name] = {"norms": norms.tolist(), **blend.facts}
    return report


def _grams(
    tensors: Callable[[Block], tuple[StoredTensor, list[StoredTensor]]],
    mine: Sequence[Block],
    shares: Sequence[Sequence[Block]],
    count: int,
    number: int,
    world: World,
) -> Float:
    """Inner products (tensors, N, N): each block's are found where it is held, then all are summed in one order."""
    own = torch.zeros(max(len(share) for share in shares), count, count, dtype=torch.float64)
    for i, block in enumerate(mine):
        base, others = tensors(block)
        own[i] = torch.from_numpy(inner_products(base, others, list(chunks(base.size, 1)))[0])
    grams = np.zeros((number, count, count))
    for share, products in zip(shares, world.gather(own.to(world.device)), strict=True):
        for block, product in zip(share, products.cpu().numpy(), strict=False):
            grams[block.tensor] += product
    return grams


@dataclass
class Periodic:
    """Seeds on their way: this process's runs, the step of the last merge, and what is known of all merges."""

    anchor: WeightSet
    runs: Sequence[Run]
    params: PeriodicParams
    folder: Path
    every: int
    epoch: int
    measure: Callable[[], float]
    world: World = ALONE
    merged: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)
    _clock: Clock = field(default_factory=Clock)

    @property
    def _pointer(self) -> Path:
        return self.folder / "point.json"

    def resume(self) -> None:
        """Go on from the last resume point that all seeds have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._pointer.exists():
            point = json.loads(self._pointer.read_text(encoding="utf-8"))
            self.merged, self.history, self.reports = point["merged"], point["history"], point["reports"]
            for run in self.runs:
                run.load_state(read_state(self.folder / f"{run.name}.{point['number']}.pt"))
        self.world.barrier()
        if self.world.rank == 0:
            write_growing_history(self.folder, self.history)

    def save(self) -> None:
        """Every seed's state first, then the pointer that makes them the resume point: all or none of them count."""
        number = sum(run.step for run in self.runs) * self.world.size + self.merged
        for run in self.runs:
            write_state(self.folder / f"{run.name}.{number}.pt", run.state())
            run.saved_step = run.step
        self.world.barrier()
        if self.world.rank == 0:
            point = {"number": number, "merged": self.merged, "history": self.history, "reports": self.reports}
            write_json(self._pointer, point)
            write_growing_history(self.folder, self.history)
        self.world.barrier()
        for run in self.runs:
            for old in self.folder.glob(f"{run.name}.*.pt"):
                if old.name != f"{run.name}.{number}.pt":
                    old.unlink()

    def save_if_due(self) -> None:
        """Between merges: seeds that take turns in one process are saved wherever they are."""
        if self._clock.due():
            self._clock.time(self.save)

    def train(self) -> None:
        """Train to the next merge, merge, and so on to the end."""
        steps = self.runs[0].steps
        while self.merged < steps:
            target = min(self.merged + self.every, steps)
            for run in self.runs:
                run.train(until=target)
            report = merge_models(self.anchor, [run.model for run in self.runs], self.params, self.world)
            if self.params.reset_moments:
                for run in self.runs:
                    run.optimizer.state.clear()
            self._note(target, report)
            self.merged = target
            due = torch.tensor([float(target == steps or self._clock.due())], device=self.world.device)
            # The first process's clock speaks for all.
            if bool(self.world.gather(due)[0]):
                self._clock.time(self.save)

    def _note(self, target: int, report: Report) -> None:
        losses = torch.tensor([run.last["loss"] for run in self.runs], dtype=torch.float64, device=self.world.device)
        known = [r for r in report.values() if r["cosine"] is not None]
        row: dict[str, Any] = {"step": target}
        row |= {f"loss/{i}": loss.item() for i, loss in enumerate(torch.cat(self.world.gather(losses)))}
        row |= {"merge/ratio": float(np.median([r["ratio"] for r in report.values()]))}
        row |= {"merge/cosine": float(np.median([r["cosine"] for r in known]))} if known else {}
        row["lr"] = self.runs[0].last["lr"]
        ended = target // self.epoch > self.merged // self.epoch or target == self.runs[0].steps
        if ended and self.world.rank == 0:
            self.runs[0].model.eval()
            row["validation/top1"] = self.measure()
        self.history.append(row)
        self.reports[str(target)] = report


class _Saved(Callback):
    """Between merges, in one process: saves all seeds together."""

    def __init__(self) -> None:
        self.periodic: Periodic | None = None

    def after_step(self, run: Run) -> None:
        """Save, where it is time."""
        if self.periodic is not None and self.periodic.world.size == 1:
            self.periodic.save_if_due()


def train_periodic(
    anchor: WeightSet,
    models: Callable[[], Classifier],
    examples: Examples,
    held_out: Examples,
    recipe: FinetuneParams,
    params: PeriodicParams,
    *,
    seeds: Sequence[int],
    folder: Path,
    workers: int = 0,
    world: World = ALONE,
) -> tuple[Classifier, list[dict[str, Any]], dict[str, Report]]:
    """Train `seeds` from the anchor with periodic merges; returns the last merge, the history and all reports.

    `models` builds the anchor's classifier on the world's device. One process trains all seeds in turns; several train
    one each. Each seed has its own data order; one schedule runs across all merges.

    Raises:
        TrainingError: as `finetune`; or another number of processes than one or one a seed.
    """
    if world.size not in (1, len(seeds)):
        raise TrainingError(
            "periodic.devices",
            got=f"{world.size} processes for {len(seeds)} seeds",
            expected="1, or one a seed",
            cure="start as many as there are seeds",
        )
    preprocess = anchor.meta["preprocess"]
    epoch = steps_an_epoch(len(examples.labels), recipe)
    own = seeds if world.size == 1 else [seeds[world.rank]]
    alone = World(device=world.device)  # a seed's own steps are nobody else's business
    saved = _Saved()
    runs = [
        new_run(
            models(),
            examples,
            recipe,
            preprocess,
            seed=seed,
            workers=workers,
            world=alone,
            callbacks=[Log(recipe.log_every, epoch), saved],
        )
        for seed in own
    ]
    every = params.every_steps or epoch

    def measure() -> float:
        return accuracy(runs[0].model, held_out, preprocess, world.device)

    periodic = Periodic(anchor, runs, params, folder, every, epoch, measure, world)
    saved.periodic = periodic
    periodic.resume()
    periodic.train()
    model: Any = runs[0].model
    return model.eval(), periodic.history, periodic.reports
