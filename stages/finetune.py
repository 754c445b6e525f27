"""Fine-tunes one seed from the anchor, or adopts its checkpoint; killed at any moment, it ends with the same bytes."""

from pathlib import Path

from modelstock.data.classes import templates
from modelstock.data.dataset import open_dataset
from modelstock.models.adopt import adopt_seed
from modelstock.params import load_params
from modelstock.tracking.history import write_history
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import read_inputs
from modelstock.training.job import setting
from modelstock.weights.weight_set import load_weights
from stages import run


def main(seed: int, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """SEED; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    recipe, start = params.finetune, load_weights(anchor)
    checkpoint = params.checkpoint_of(seed)
    with setting(
        "finetune",
        devices=recipe.devices if checkpoint is None else 1,
        device=params.device,
        threads=params.threads,
        loading=params.loading,
        tracking=params.tracking,
    ) as where:
        if checkpoint is not None:
            weights = adopt_seed(checkpoint, start, seed=seed, prompts=templates(params.classes), device=where.device)
            weights.save(out / "weights.safetensors")
            write_history(out, [])
            head = weights.meta["made_by"]["options"]["head"]
            identity = weights.identity[:12]
            print(f"seed-{seed}: {checkpoint} adopted with the {head} head, identity {identity}; no training")
            return
        inputs = read_inputs(
            start,
            open_dataset(train),
            open_dataset(held_out),
            in_memory=params.loading.in_memory,
            batch_norm=params.merge.batch_norm,
            device=where.device,
        )
        made_by = {"stage": "finetune", "seed": seed}
        accuracy = finetune_seed(inputs, recipe, name=f"seed-{seed}", made_by=made_by, setting=where, out=out)
        if accuracy is not None:
            print(f"seed-{seed}: held-out accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    run(main)
