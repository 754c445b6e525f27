"""The anchor w0: the pre-trained tower with a head from templates and class names, or from the training data."""

from pathlib import Path

from modelstock.data.classes import class_names, templates
from modelstock.devices import deterministic, device_kind
from modelstock.experiment.anchor import Data, make_anchor
from modelstock.params import Params, load_params
from modelstock.weights.weight_set import WeightSet, load_weights
from stages import run


def main(clip: Path, train: Path, held_out: Path, out: Path) -> None:
    """CLIP: the backbone, with both towers where it has two. TRAIN, HELD_OUT: shards. OUT: the anchor to write."""
    params = load_params()
    deterministic(params.threads)
    anchor = anchor_from(load_weights(clip), params, train, held_out)
    anchor.save(out)
    print(f"anchor: {len(anchor.meta['classes'])} classes, identity {anchor.identity[:12]}")


def anchor_from(clip: WeightSet, params: Params, train: Path, held_out: Path) -> WeightSet:
    """The anchor that the params describe, from a backbone."""
    return make_anchor(
        clip,
        class_names(params.classes),
        templates(params.classes),
        params.anchor,
        data=Data(train=train, held_out=held_out),
        cache=Path("scratch/heads"),
        device=device_kind(params.device),
    )


if __name__ == "__main__":
    run(main)
