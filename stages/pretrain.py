"""The CLIP that everything starts from: the embedded benchmark's, pre-trained here, or any of open_clip."""

from pathlib import Path

from modelstock.devices import deterministic
from modelstock.models.pretrained import load_clip
from modelstock.models.text_towers import load_encoder, text_side
from modelstock.models.timm_models import load_timm
from modelstock.params import (
    OpenClipPretraining,
    OpenClipTextPretraining,
    PretrainParams,
    TimmPretraining,
    TransformersPretraining,
    load_params,
)
from modelstock.training.pretrain import pretrain_clip
from modelstock.weights.weight_set import WeightSet
from stages import run


def make_clip(section: PretrainParams, out: Path, *, threads: int) -> WeightSet:
    """The backbone of a section, in the folder `out` with the history of its pre-training, if any."""
    if isinstance(section, OpenClipPretraining):
        clip = load_clip(section.architecture, section.pretrained, seed=section.seed)
        if isinstance(section, OpenClipTextPretraining):
            clip = text_side(clip, length=section.length)
    elif isinstance(section, TransformersPretraining):
        clip = load_encoder(section)
    elif isinstance(section, TimmPretraining):
        clip = load_timm(section)
    else:
        return pretrain_clip(section, threads=threads, out=out)
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
