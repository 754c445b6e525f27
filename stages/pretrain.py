"""The CLIP that everything starts from: the embedded benchmark's, pre-trained here, or any of open_clip."""

from pathlib import Path

from modelstock.devices import deterministic
from modelstock.models.pretrained import load_clip
from modelstock.params import OpenClipPretraining, load_params
from modelstock.training.pretrain import pretrain_clip
from stages import run


def main(out: Path) -> None:
    """OUT: the folder for clip.safetensors, with both towers, and the history of a pre-training."""
    params = load_params()
    deterministic(params.threads)
    if isinstance(params.pretrain, OpenClipPretraining):
        section = params.pretrain
        clip = load_clip(section.architecture, section.pretrained, seed=section.seed)
        clip.save(out / "clip.safetensors")
    else:
        clip = pretrain_clip(params.pretrain, threads=params.threads, out=out)
    print(f"clip: {clip.meta['backbone']['name']} {clip.meta['backbone']['pretrained']}, {clip.identity[:12]}")


if __name__ == "__main__":
    run(main)
