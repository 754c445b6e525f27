"""Trains one seed as long as several together: what the compute of a periodic merge gives without merging."""

from pathlib import Path

from modelstock.data.dataset import open_dataset
from modelstock.params import load_params
from modelstock.training.finetune import finetune_seed, longer
from modelstock.training.inputs import read_inputs
from modelstock.training.job import setting
from modelstock.weights.weight_set import load_weights
from stages import run


def main(factor: int, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """FACTOR: times the epochs; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    seed, recipe = params.seeds[0], longer(params.finetune, factor)
    name, made_by = f"longer@{factor}/{seed}", {"stage": "longer", "seed": seed, "factor": factor}
    with setting(
        "longer",
        devices=recipe.devices,
        device=params.device,
        threads=params.threads,
        loading=params.loading,
        tracking=params.tracking,
    ) as where:
        in_memory = params.loading.in_memory
        inputs = read_inputs(load_weights(anchor), open_dataset(train), open_dataset(held_out), in_memory=in_memory)
        accuracy = finetune_seed(inputs, recipe, name=name, made_by=made_by, setting=where, out=out)
    if accuracy is not None:
        print(f"{name}: held-out accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    run(main)
