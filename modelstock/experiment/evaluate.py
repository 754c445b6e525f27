"""Scoring in the experiment: all weight sets, and logit ensembles of the seeds, on one benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelstock.data.dataset import Dataset
from modelstock.experiment.rows import ensemble_row, row_of
from modelstock.experiment.subsets import ensembles
from modelstock.scoring.one_pass import ScoringOptions, collect, score
from modelstock.scoring.results import Scores
from modelstock.weights.weight_set import WeightSet


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Everything that is compared: the anchor, the seeds, and merges, averages and periodic runs."""

    anchor: WeightSet
    seeds: Mapping[int, WeightSet]
    others: Sequence[WeightSet]

    @property
    def weights(self) -> list[WeightSet]:
        """All of them, in the tables' order."""
        return [self.anchor, *self.seeds.values(), *self.others]


def score_benchmark(dataset: Dataset, candidates: Candidates, options: ScoringOptions) -> Scores:
    """Score all weight sets, and logit ensembles of the seeds, in one pass over a benchmark.

    Raises:
        DataError, ParamsError, WeightsError: see modelstock.scoring.one_pass.score.
    """
    seeds, rows = candidates.seeds, [row_of(weights) for weights in candidates.weights]
    groups = {members: [seeds[m].identity for m in members] for members in ensembles(list(seeds))}
    rows += [ensemble_row(members, identities) for members, identities in groups.items()]
    outcomes = score(dataset, candidates.weights, list(groups.values()), options)
    return collect(dataset, rows, outcomes, candidates.weights, options.precision)
