"""Merging in the experiment: subsets of the seeds by one method, its options chosen on the held-out split."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modelstock.data.dataset import Dataset
from modelstock.errors import MergeError
from modelstock.experiment.paths import merged_file
from modelstock.experiment.subsets import subsets
from modelstock.files import write_json
from modelstock.merging.engine import merge
from modelstock.merging.methods.rows import Choice
from modelstock.merging.methods.table import METHODS
from modelstock.params import MethodParams
from modelstock.scoring import data_statistics
from modelstock.scoring.batch_norm import Recalibration, has_running_statistics
from modelstock.scoring.one_pass import ScoringOptions, accuracies
from modelstock.weights.weight_set import WeightSet


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One merge: `name` is its file's, such as 0-1 or 0-1-2@0.5; `report` has facts by tensor, or what was chosen."""

    name: str
    weights: WeightSet
    report: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SubsetMerges:
    """The merges by one method of the subsets of the seeds that its section asks for.

    An option that the method's row has chosen takes the best of the section's values on the held-out split, ties go
    to the first; where the row asks for it, every value is kept for all seeds together, for its curve.

    `scoring`: how merges are scored, and where. `train`: the split that statistics are measured on, for a method that
    reads them, and on which BatchNorm's are estimated again, where `batch_norm` says of how many images: of every
    merge, of those that are only tried too.
    """

    method: str
    section: MethodParams
    anchor: WeightSet
    seeds: Mapping[int, WeightSet]
    held_out: Dataset
    scoring: ScoringOptions
    train: Dataset | None = None
    batch_norm: int = 0

    def __iter__(self) -> Iterator[Merge]:
        """One after the other, each made when it is asked for.

        Raises:
            DataError, MergeError, WeightsError: see modelstock.merging.engine.merge and modelstock.scoring.one_pass.
        """
        choice = METHODS[self.method].chooses
        for members in subsets(list(self.seeds), self.section.sets):
            if choice is None:
                yield self._merge(members)
            else:
                yield from self._choose(choice, members)

    def _merge(self, members: Sequence[int]) -> Merge:
        weights, report = self._merged(members)
        kept = next(iter(report.values())).get("chosen")  # a greedy soup is that of the seeds it took
        if kept:
            members = [member for member in members if self.seeds[member].source in kept]
        return _named(weights, members, report)

    def _choose(self, choice: Choice, members: Sequence[int]) -> Iterator[Merge]:
        values: list[float] = self._fields[choice.name]
        trials = [self._merged(members, {choice.option: value})[0] for value in values]
        held_out = accuracies(self.held_out, trials, self.scoring)
        best = int(np.argmax(held_out))
        curve = dict(zip(map(str, values), held_out, strict=True))
        report = {"held-out/top1": curve, choice.option: values[best]}
        whole_curve = choice.curve and len(members) == len(self.seeds)
        for place in range(len(values)) if whole_curve else [best]:
            yield _named(trials[place], members, report, chosen=choice.option)

    def _merged(self, members: Sequence[int], chosen: Mapping[str, Any] | None = None) -> tuple[WeightSet, Any]:
        weights, report = merge(
            self.method,
            self.anchor,
            [self.seeds[member] for member in members],
            options={**self._options, **(chosen or {})},
            granularity=self._fields.get("granularity", "tensor"),
            statistics=[self._statistics[member] for member in members] if self._statistics else [],
            score=self._score,
            gradient=self._gradient,
            recalibrated=self._recalibration is not None,
        )
        return self._estimated(weights), report

    def _estimated(self, weights: WeightSet) -> WeightSet:
        """The weights with BatchNorm's statistics of their own, where that is asked for."""
        return weights if self._recalibration is None else self._recalibration(weights)

    @cached_property
    def _recalibration(self) -> Recalibration | None:
        if not self.batch_norm or not has_running_statistics(self.anchor):
            return None
        return Recalibration(self._training_split, examples=self.batch_norm, device=self.scoring.device)

    @property
    def _training_split(self) -> Dataset:
        if self.train is None:
            raise MergeError(
                f"method {self.method}", got="no training split", expected="one to measure on", cure="name it"
            )
        return self.train

    @cached_property
    def _fields(self) -> Mapping[str, Any]:
        return self.section.model_dump()

    @cached_property
    def _options(self) -> Mapping[str, Any]:
        return {name: self._fields[name] for name in METHODS[self.method].options if name in self._fields}

    @cached_property
    def _statistics(self) -> Mapping[int, WeightSet]:
        """What each seed is weighed by, for a method that weighs."""
        row = METHODS[self.method]
        if not row.reads_statistics:
            return {}
        measure = data_statistics.fisher if row.needs == "fisher" else data_statistics.inner
        drawn, _ = data_statistics.sample(self._training_split, self.anchor, examples=self._fields["examples"])
        device = self.scoring.device
        return {seed: measure(weights, drawn, device=device) for seed, weights in self.seeds.items()}

    @cached_property
    def _score(self) -> Callable[[Sequence[WeightSet]], list[float]] | None:
        """The accuracies that a searching method looks at."""
        if METHODS[self.method].needs != "score":
            return None
        return lambda weights: accuracies(self.held_out, list(map(self._estimated, weights)), self.scoring)

    @cached_property
    def _gradient(self) -> Callable[[WeightSet], Any] | None:
        """The held-out loss and its gradient, for a method that follows it."""
        if METHODS[self.method].needs != "gradient":
            return None
        sample = data_statistics.sample(self.held_out, self.anchor, examples=self._fields["examples"])
        of = data_statistics.loss_gradient(*sample, device=self.scoring.device)
        return lambda weights: of(self._estimated(weights))


def _named(
    weights: WeightSet, members: Sequence[int], report: Mapping[str, Any], *, chosen: str | None = None
) -> Merge:
    """A merge whose metadata says which seeds it is of and, where one was, which option was chosen."""
    made_by = {**weights.meta["made_by"], "members": list(members), **({"chosen": chosen} if chosen else {})}
    name = "-".join(map(str, members)) + (f"@{made_by['options'][chosen]}" if chosen else "")
    return Merge(
        name=name, weights=WeightSet(weights.tensors, {**weights.meta, "made_by": made_by}, name), report=report
    )


def merge_method(merges: SubsetMerges, out: Path) -> list[Path]:
    """Merge the seeds by one method. Writes `<name>.safetensors` each and report.json; returns those files, sorted.

    Raises:
        DataError, MergeError, WeightsError: as `SubsetMerges`.
    """
    report: dict[str, Any] = {}
    for merged in merges:
        merged.weights.save(merged_file(out, merged.name))
        report[merged.name] = merged.report
    write_json(out / "report.json", report)
    return sorted(merged_file(out, name) for name in report)
