"""What estimating BatchNorm's running statistics again changes: a finished run's merges, with and without it.

    python benchmarks/recalibration.py [--examples N]

Run in the project's folder after `dvc repro`. Every merge of the run is scored twice on every benchmark: with its
members' running statistics averaged, and with them estimated again on N training images (`merge.batch_norm`, or 500);
nothing else differs, also where a scale was chosen. So is every seed, with its training's own and estimated again: what
the estimate does without any merge. A row is a method with merges of so many seeds; differences are paired, over images
and, where there are subsets enough, seeds: see modelstock.comparison.crossed. p is Student's t, without correction.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from modelstock.comparison.crossed import Sample, Subsets, crossed
from modelstock.comparison.differences import difference
from modelstock.comparison.text import percent, signed, table
from modelstock.data.dataset import open_dataset
from modelstock.devices import deterministic, device_kind
from modelstock.experiment.paths import finetuned_folder, load_seeds, merged_files
from modelstock.merging.methods.table import METHODS
from modelstock.params import load_params
from modelstock.scoring.batch_norm import Recalibration
from modelstock.scoring.one_pass import ScoringOptions, score
from modelstock.weights.layout import is_running_statistic
from modelstock.weights.weight_set import WeightSet, load_weights

MODELS = Path("models")


def averaged(weights: WeightSet, members: list[WeightSet]) -> WeightSet:
    """A merge with the means of its members' running statistics, as merging leaves them."""
    means = {
        name: np.mean([member.tensors[name] for member in members], axis=0, dtype=np.float64).astype(np.float32)
        for name in weights.tensors
        if is_running_statistic(name)
    }
    return WeightSet({**weights.tensors, **means}, weights.meta, weights.source)


def pairs_of(
    seeds: Mapping[int, WeightSet], methods: list[str]
) -> dict[tuple[str, int], dict[tuple[int, ...], WeightSet]]:
    """(method, seeds) -> members -> the weight set as it is without an estimate."""
    groups: dict[tuple[str, int], dict[tuple[int, ...], WeightSet]] = {}
    groups["single seed", 1] = {(seed,): weights for seed, weights in seeds.items()}
    for file in merged_files(MODELS, [method for method in methods if not METHODS[method].recalibrates]):
        weights = load_weights(file)
        made_by = weights.meta["made_by"]
        members = tuple(made_by["members"])
        # Of a method whose whole curve is kept, every point: each counts as a method.
        chosen = made_by.get("chosen")
        curve = f"@{made_by['options'][chosen]:g}" if chosen and METHODS[made_by["method"]].chooses.curve else ""
        group = groups.setdefault((made_by["method"] + curve, len(members)), {})
        group[members] = averaged(weights, [seeds[member] for member in members])
    return groups


def main() -> None:
    """Score all twins, one benchmark after the other, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int)
    params = load_params()
    examples = parser.parse_args().examples or params.merge.batch_norm or 500
    deterministic(params.threads)
    device = device_kind(params.device)
    recalibration = Recalibration(open_dataset(Path("data/train")), examples=examples, device=device)
    groups = pairs_of(load_seeds(finetuned_folder(MODELS), params.seeds), params.merge.methods)
    twins = {key: {members: recalibration(one) for members, one in group.items()} for key, group in groups.items()}
    print(f"Running statistics averaged, and estimated again on {recalibration.count} training images.\n")
    head = ["weights", "seeds", "sets", "on", "averaged", "estimated again", "difference, points", "over", "p"]
    rows = []
    for benchmark in params.evaluate.benchmarks:
        dataset = open_dataset(Path("data") / benchmark)
        both = [one for side in (groups, twins) for group in side.values() for one in group.values()]
        outcomes = score(dataset, both, options=ScoringOptions(device=device))
        for (method, size), group in groups.items():
            before, after = (
                np.stack([outcomes[one.identity].correct for one in side.values()]).astype(np.int64)
                for side in (group, twins[method, size])
            )
            moments = crossed([Sample(Subsets(tuple(group)), (after - before,))])
            found = difference(moments, margin=params.compare.margin)
            accuracy = [percent(float(correct.mean())) for correct in (before, after)]
            p = "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"
            rows.append([method, str(size), str(len(group)), benchmark, *accuracy, signed(found), found.over, p])
    print(table(head, rows))


if __name__ == "__main__":
    main()
