"""Another anchor than the seeds': its pre-training, and the zero-shot head, in one stage."""

from pathlib import Path

from modelstock.data.classes import class_names, templates
from modelstock.devices import deterministic, device_kind
from modelstock.models.anchor import anchor_of
from modelstock.params import load_params
from stages import run
from stages.pretrain import make_clip


def main(name: str, out: Path) -> None:
    """NAME: one of `anchors`. OUT: the folder for clip.safetensors, its history and anchor.safetensors."""
    params = load_params()
    deterministic(params.threads)
    clip = make_clip(params.anchors[name], out, threads=params.threads)
    names, prompts = class_names(params.classes), templates(params.classes)
    anchor = anchor_of(clip, names, prompts, cache=Path("scratch/heads"), device=device_kind(params.device))
    anchor.save(out / "anchor.safetensors")
    print(f"anchor {name}: identity {anchor.identity[:12]}")


if __name__ == "__main__":
    run(main)
