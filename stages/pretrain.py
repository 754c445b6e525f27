"""The CLIP that everything starts from: the embedded benchmark's, pre-trained here, or any of open_clip."""

from pathlib import Path

from modelstock import __version__
from modelstock.data.shapes.names import TINY_PREPROCESS
from modelstock.devices import deterministic
from modelstock.models.pretrained import load_clip
from modelstock.models.towers import TINY_CLIP, tensors_of
from modelstock.params import OpenClipPretraining, Params, load_params
from modelstock.provenance import key_of
from modelstock.tracking.history import write_history
from modelstock.training.pretrain import pretrain
from modelstock.weights.weight_set import WeightSet
from stages import run


def clip_of(params: Params, out: Path) -> WeightSet:
    """The tiny CLIP after its pre-training, whose history goes to `out`, or open_clip's."""
    if isinstance(params.pretrain, OpenClipPretraining):
        section = params.pretrain
        return load_clip(section.architecture, section.pretrained, seed=section.seed)
    options = params.pretrain.model_dump(mode="json")
    clip, history = pretrain(
        params.pretrain,
        folder=Path("scratch/pretrain") / key_of("modelstock.training.pretrain", options, {"threads": params.threads}),
    )
    write_history(out, history)
    made = {"stage": "pretrain", "seed": params.pretrain.seed, "options": options, "version": __version__}
    meta = {
        "architecture": TINY_CLIP,
        "backbone": {"name": "tiny", "pretrained": "shapes"},
        "preprocess": TINY_PREPROCESS,
        "parents": [],
        "made_by": made,
    }
    return WeightSet(tensors_of(clip), meta, "pretrain")


def main(out: Path) -> None:
    """OUT: the folder for clip.safetensors, with both towers, and the history of a pre-training."""
    params = load_params()
    deterministic(params.threads)
    clip = clip_of(params, out)
    clip.save(out / "clip.safetensors")
    print(f"clip: {clip.meta['backbone']['name']} {clip.meta['backbone']['pretrained']}, {clip.identity[:12]}")


if __name__ == "__main__":
    run(main)
