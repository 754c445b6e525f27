"""Scores ALL weight sets, and the seeds' logit ensembles, on one benchmark in one pass over its images."""

from pathlib import Path

from modelstock.data.dataset import open_dataset
from modelstock.devices import deterministic
from modelstock.experiment.evaluate import Candidates, score_benchmark
from modelstock.experiment.left_over import remove_left_over_models
from modelstock.experiment.paths import SCORES, anchor_file, finetuned_folder, load_seeds, other_files
from modelstock.params import load_params
from modelstock.scoring.precision import scoring_options
from modelstock.scoring.results import save_scores
from modelstock.weights.weight_set import load_weights
from stages import run


def main(data: Path, models: Path, out: Path) -> None:
    """DATA: shards; MODELS: the folder of all weight sets; OUT: the results to write."""
    params = load_params()
    deterministic(params.threads)
    remove_left_over_models(models, params)
    files = other_files(models, params)
    candidates = Candidates(
        anchor=load_weights(anchor_file(models), lazy=True),
        seeds=load_seeds(finetuned_folder(models), params.seeds, lazy=True),
        others=[load_weights(file, lazy=True) for file in files],
    )
    section = params.evaluate.model_dump(exclude={"benchmarks"})
    options = scoring_options(section, candidates.anchor, device=params.device, cache=SCORES)
    results = score_benchmark(open_dataset(data), candidates, options)
    save_scores(out, results)
    print(f"{data}: {len(results.rows)} rows scored in one pass, towers in {results.precision}")


if __name__ == "__main__":
    run(main)
