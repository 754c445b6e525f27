"""Trains one variant: a run beside the seeds, by another recipe or from another anchor; it resumes like a seed."""

from pathlib import Path

from modelstock.data.dataset import open_dataset
from modelstock.params import load_params
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import read_inputs
from modelstock.training.job import setting
from modelstock.weights.weight_set import load_weights
from stages import run


def main(name: str, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """NAME: one of `variants`; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    variant, recipe = params.variants[name], params.recipe_of(name)
    made_by = {"stage": "variant", "seed": variant.seed, "pool": variant.pool, "variant": name}
    with setting(
        "variant",
        devices=recipe.devices,
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
        accuracy = finetune_seed(inputs, recipe, name=f"{variant.pool}/{name}", made_by=made_by, setting=where, out=out)
    if accuracy is not None:
        print(f"{variant.pool}/{name}: held-out accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    run(main)
