"""Scores the points that test the geometry of the seeds' weights on one benchmark, in one pass over its images."""

from pathlib import Path

from modelstock.data.dataset import open_dataset
from modelstock.devices import deterministic
from modelstock.experiment.left_over import remove_left_over_models
from modelstock.experiment.paths import SCORES, anchor_file
from modelstock.experiment.points import score_points
from modelstock.experiment.pools import load_pools
from modelstock.experiment.space import load_space
from modelstock.params import load_params
from modelstock.scoring.batch_norm import Recalibration, has_running_statistics
from modelstock.scoring.precision import scoring_options
from modelstock.scoring.results import save_scores
from modelstock.weights.weight_set import load_weights
from stages import run


def main(data: Path, train: Path, held_out: Path, models: Path, out: Path) -> None:
    """DATA, TRAIN, HELD_OUT: shards, to score, estimate BatchNorm and choose on; MODELS: all weight sets; OUT."""
    params = load_params()
    deterministic(params.threads)
    remove_left_over_models(models, params)
    anchor = load_weights(anchor_file(models), lazy=True)
    options = scoring_options(
        params.evaluate.model_dump(exclude={"benchmarks"}), anchor, device=params.device, cache=SCORES
    )
    space = load_space(models, params)
    seeds = {checkpoint.identity for checkpoint in space.seeds.values()}
    estimates = params.merge.batch_norm > 0 and has_running_statistics(anchor)
    results = score_points(
        open_dataset(data),
        anchor,
        space,
        params.geometry,
        options,
        held_out=open_dataset(held_out),
        pools=load_pools(params.variants, models, seeds=seeds),
        recalibration=Recalibration(open_dataset(train), examples=params.merge.batch_norm, device=options.device)
        if estimates
        else None,
    )
    save_scores(out, results)
    print(f"{data}: {len(results.rows)} points scored in one pass, towers in {results.precision}")


if __name__ == "__main__":
    run(main)
