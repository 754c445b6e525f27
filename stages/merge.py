"""Merges subsets of the seeds by one method; whatever is chosen is chosen on the held-out split."""

from pathlib import Path

from modelstock.data.dataset import open_dataset
from modelstock.devices import deterministic
from modelstock.errors import MergeError
from modelstock.experiment.left_over import remove_left_over
from modelstock.experiment.merge import SubsetMerges, merge_method
from modelstock.experiment.paths import SCORES, load_seeds
from modelstock.merging.methods.table import METHODS
from modelstock.params import load_params
from modelstock.scoring.precision import scoring_options
from modelstock.weights.weight_set import load_weights
from stages import run


def main(method: str, anchor: Path, tuned: Path, train: Path, held_out: Path, out: Path) -> None:
    """METHOD: one of merge.methods; ANCHOR; TUNED: the seeds' folder; TRAIN, HELD_OUT: shards; OUT: the folder."""
    params = load_params()
    if method not in params.merge.methods:
        raise MergeError(
            "method", got=repr(method), expected=", ".join(params.merge.methods), cure="name one of merge.methods"
        )
    deterministic(params.threads)
    remove_left_over(tuned, params.seeds)
    start, options = load_weights(anchor), params.evaluate.model_dump(exclude={"benchmarks"})
    merges = SubsetMerges(
        method=method,
        section=params.merge.section(method),
        anchor=start,
        seeds=load_seeds(tuned, params.seeds),
        held_out=open_dataset(held_out),
        train=open_dataset(train) if METHODS[method].reads_statistics or params.merge.batch_norm else None,
        batch_norm=params.merge.batch_norm,
        scoring=scoring_options(options, start, device=params.device, cache=SCORES),
    )
    files = merge_method(merges, out)
    print(f"{method}: {len(files)} weight sets")


if __name__ == "__main__":
    run(main)
