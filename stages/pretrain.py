"""The CLIP that everything starts from: the embedded benchmark's, pre-trained here, or any of open_clip."""

from pathlib import Path

from modelstock.devices import deterministic
from modelstock.models.backbone import load_backbone
from modelstock.params import PretrainParams, TinyPretraining, load_params
from modelstock.training.pretrain import pretrain_clip
from modelstock.weights.weight_set import WeightSet
from stages import run


def make_clip(section: PretrainParams, out: Path, *, threads: int) -> WeightSet:
    """The backbone of a section, in the folder `out` with the history of its pre-training, if any."""
    if isinstance(section, TinyPretraining):
        return pretrain_clip(section, threads=threads, out=out)
    clip = load_backbone(section)
    clip.save(out / "clip.safetensors")
    print(f"clip: {clip.meta['backbone']['name']} {clip.meta['backbone']['pretrained']}, {clip.identity[:12]}")
    return clip


def main(out: Path) -> None:
    """OUT: the folder for clip.safetensors, with both towers, and the history of a pre-training."""
    params = load_params()
    deterministic(params.threads)
    make_clip(params.pretrain, out, threads=params.threads)


if __name__ == "__main__":
    run(main)
