"""Pre-trains the tiny CLIP of the embedded benchmark on captioned draws of all styles."""

from pathlib import Path

from modelstock import __version__
from modelstock.models import TINY_CLIP, TINY_PREPROCESS, tensors_of
from modelstock.params import load_params
from modelstock.pretraining import pretrain
from modelstock.scratch import fingerprint, write_history
from modelstock.weights import WeightSet
from stages import deterministic, run


def main(out: Path) -> None:
    """OUT: the folder for clip.safetensors, with both towers, and its history."""
    params = load_params()
    deterministic(params.threads)
    key = fingerprint(params.pretrain.model_dump(mode="json"), {"threads": params.threads})
    clip, history = pretrain(params.pretrain, folder=Path("scratch/pretrain") / key)
    made = {"stage": "pretrain", "seed": params.pretrain.seed, "knobs": params.pretrain.model_dump(mode="json")}
    meta = {
        "architecture": TINY_CLIP,
        "preprocess": TINY_PREPROCESS,
        "parents": [],
        "made_by": {**made, "version": __version__},
    }
    WeightSet(tensors_of(clip), meta, "pretrain").save(out / "clip.safetensors")
    write_history(out, history)


if __name__ == "__main__":
    run(main)
