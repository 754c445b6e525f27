"""Trains seeds side by side, merged on the way by an arm's rule; resumes like one seed, with the same bytes."""

from pathlib import Path

from modelstock.data.dataset import open_dataset
from modelstock.params import load_params
from modelstock.training.inputs import read_inputs
from modelstock.training.job import setting
from modelstock.training.periodic import merge_periodically
from modelstock.weights.weight_set import load_weights
from stages import run


def main(arm: str, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """ARM: its name in params; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    merging = params.periodic[arm]
    seeds = params.seeds[: merging.size]
    with setting(
        "periodic",
        devices=merging.devices,
        device=params.device,
        threads=params.threads,
        loading=params.loading,
        tracking=params.tracking,
    ) as where:
        inputs = read_inputs(
            load_weights(anchor),
            open_dataset(train),
            open_dataset(held_out),
            in_memory=params.loading.in_memory,
            batch_norm=params.merge.batch_norm,
            device=where.device,
        )
        accuracy = merge_periodically(inputs, params.finetune, merging, arm=arm, seeds=seeds, setting=where, out=out)
    if accuracy is not None:
        print(f"periodic-{arm}/{'-'.join(map(str, seeds))}: held-out accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    run(main)
