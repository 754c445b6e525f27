"""Fine-tunes one seed from the anchor; killed at any moment and run again, it ends with the same bytes."""

from pathlib import Path

import torch

from modelstock import __version__
from modelstock.models import build_classifier, normalise, tensors_of
from modelstock.params import load_params
from modelstock.scratch import fingerprint, write_history
from modelstock.shards import check_classes, read_all
from modelstock.tracking import Mirror, Tracker
from modelstock.training import finetune
from modelstock.weights import WeightSet, load_weights
from stages import deterministic, run


def main(seed: int, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """SEED; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    deterministic(params.threads)
    start = load_weights(anchor)
    images, labels, manifest = read_all(train)
    held_images, held_labels, held_manifest = read_all(held_out)
    check_classes(start, manifest, train)
    recipe = params.finetune.model_dump(mode="json", exclude={"seeds"})
    inputs = {"anchor": start.identity, "train": manifest.sha256, "held-out": held_manifest.sha256}
    key = fingerprint(recipe, inputs, {"seed": seed, "threads": params.threads})
    preprocess = start.meta["preprocess"]
    made = {"stage": "finetune", "seed": seed, "knobs": recipe, "version": __version__, "key": key}
    meta = {**start.meta, "parents": [start.identity], "made_by": made}
    model, folder = build_classifier(start), Path("scratch/finetune") / key
    with Mirror(
        lambda: Tracker(Path.cwd(), params.tracking.experiment),
        folder / "history.jsonl",
        key=key,
        name=f"seed-{seed}",
        params={"stage": "finetune", "seed": seed, **{f"knobs.{k}": v for k, v in recipe.items()}},
    ):
        history = finetune(
            model,
            (normalise(images, preprocess), torch.from_numpy(labels)),
            (normalise(held_images, preprocess), torch.from_numpy(held_labels)),
            params.finetune,
            seed=seed,
            folder=folder,
        )
    WeightSet(tensors_of(model), meta, f"seed {seed}").save(out / "weights.safetensors")
    write_history(out, history)
    print(f"seed {seed}: held-out accuracy {100 * history[-1]['validation/top1']:.1f} %")


if __name__ == "__main__":
    run(main)
