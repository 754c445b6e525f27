"""Where an experiment's weight sets lie to each other, read when they are asked for."""

from pathlib import Path

from modelstock.experiment.paths import anchor_file, centre_folder, finetuned_folder, load_seeds
from modelstock.geometry.space import Space, checkpoint_of
from modelstock.params import Params
from modelstock.weights.weight_set import load_weights


def load_space(models: Path, params: Params) -> Space:
    """The anchor, the seeds under test and those set aside, read when they are asked for."""
    seeds = load_seeds(finetuned_folder(models), params.seeds, lazy=True)
    centre = load_seeds(centre_folder(models), params.geometry.centre, lazy=True)
    return Space(
        checkpoint_of(load_weights(anchor_file(models), lazy=True)),
        {seed: checkpoint_of(weights) for seed, weights in seeds.items()},
        {seed: checkpoint_of(weights) for seed, weights in centre.items()},
    )
