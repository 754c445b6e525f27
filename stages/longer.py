"""Trains one seed as long as several together: what the compute of a periodic merge gives without merging."""

from pathlib import Path

from modelstock.params import load_params
from stages import run
from stages.finetune import train_seed


def main(factor: int, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """FACTOR: times the epochs; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    epochs = factor * params.finetune.epochs
    recipe = params.finetune.model_copy(update={"epochs": epochs, "ema": [], "lawa": 0, "snapshots": False})
    seed = params.seeds[0]
    made = {"stage": "longer", "seed": seed, "factor": factor}
    train_seed(params, recipe, made, f"longer@{factor}/{seed}", (anchor, train, held_out), out)


if __name__ == "__main__":
    run(main)
