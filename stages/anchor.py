"""The anchor w0: the pre-trained image tower with the zero-shot head made of templates and class names."""

from pathlib import Path

import torch

from modelstock import __version__
from modelstock.models import TINY_TEMPLATES, build_clip, set_tensors, tokenizer, zero_shot_head
from modelstock.params import load_params
from modelstock.shapes import NAMES
from modelstock.weights import WeightSet, classes_sha256, load_weights
from stages import deterministic, run


def main(clip: Path, out: Path) -> None:
    """CLIP: the weight set with both towers. OUT: the anchor to write."""
    deterministic(load_params().threads)
    source = load_weights(clip)
    config = source.meta["architecture"]
    model = build_clip(config)
    set_tensors(model, source)
    weight, bias = zero_shot_head(model.eval(), tokenizer(config), NAMES, TINY_TEMPLATES)
    tensors = {name: tensor for name, tensor in source.tensors.items() if name.startswith("visual.")}
    tensors |= {"head.weight": torch.Tensor.numpy(weight), "head.bias": torch.Tensor.numpy(bias)}
    meta = {
        "architecture": config,
        "preprocess": source.meta["preprocess"],
        "classes_sha256": classes_sha256(NAMES),
        "parents": [source.identity],
        "made_by": {"stage": "anchor", "knobs": {"templates": len(TINY_TEMPLATES)}, "version": __version__},
    }
    anchor = WeightSet(tensors, meta, "anchor")
    anchor.save(out)
    print(f"anchor: {len(NAMES)} classes x {len(TINY_TEMPLATES)} templates, identity {anchor.identity[:12]}")


if __name__ == "__main__":
    run(main)
