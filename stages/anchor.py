"""The anchor w0: the pre-trained image tower with the zero-shot head made of templates and class names."""

from pathlib import Path

from modelstock.data.classes import class_names, templates
from modelstock.devices import deterministic, device_kind
from modelstock.models.anchor import anchor_of
from modelstock.params import load_params
from modelstock.weights.weight_set import load_weights
from stages import run


def main(clip: Path, out: Path) -> None:
    """CLIP: the weight set with both towers. OUT: the anchor to write."""
    params = load_params()
    deterministic(params.threads)
    names, prompts = class_names(params.classes), templates(params.classes)
    cache, device = Path("scratch/heads"), device_kind(params.device)
    anchor = anchor_of(load_weights(clip), names, prompts, cache=cache, device=device)
    anchor.save(out)
    print(f"anchor: {len(names)} classes x {len(prompts)} templates, identity {anchor.identity[:12]}")


if __name__ == "__main__":
    run(main)
