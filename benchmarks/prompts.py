"""Which prompts the anchor of the preset reviews has: the sets that were tried, on the held-out split alone.

    python benchmarks/prompts.py

Run in the project's folder, after `dvc exp run -S preset=reviews`. A set is some templates with a pair of names, or
some texts of each class's own, of which the preset has all eight. For each: accuracy and mean negative log-likelihood
of the zero-shot head on the held-out split, at the scale that is likeliest there.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from modelstock.comparison.text import percent, table
from modelstock.data.classes import class_names, templates
from modelstock.data.dataset import open_dataset
from modelstock.devices import deterministic
from modelstock.experiment.anchor import fitted_scale
from modelstock.models.anchor import text_anchor_of, without_head
from modelstock.params import load_params
from modelstock.scoring.features import features_of
from modelstock.weights.weight_set import load_weights

NAMES = (("negative", "positive"), ("bad", "good"), ("terrible", "great"))
TEMPLATES = {
    "one template": ["a {} review."],
    "eight templates": [
        "a {} review.",
        "this is a {} review.",
        "a review with a {} opinion.",
        "the author's opinion is {}.",
        "a text that expresses a {} sentiment.",
        "someone with {} feelings about it.",
        "a {} comment.",
        "overall, it is {}.",
    ],
    "eight other templates": [
        "a {} review.",
        "this is a {} review.",
        "this review is {}.",
        "a {} comment.",
        "a {} opinion.",
        "a text with a {} sentiment.",
        "the author feels {} about it.",
        "it was {}.",
    ],
    "four templates": ["{}", "{} sentiment", "the sentiment is {}", "a {} text"],
}


def main() -> None:
    """Print the table."""
    params = load_params()
    deterministic(params.threads)
    encoder, held_out = load_weights(Path("models/clip/clip.safetensors")), open_dataset(Path("data/held-out"))
    own, classes = templates(params.classes), class_names(params.classes)
    tried: dict[str, tuple[list[str], list[Callable[[str], str]]]] = {
        f"{what}, {' and '.join(names)}": (list(names), [partial(str.format, text) for text in texts])
        for names in NAMES
        for what, texts in TEMPLATES.items()
    }
    tried |= {"half of the preset's texts": (classes, list(own[:4])), "the preset's texts": (classes, list(own))}
    features = torch.from_numpy(features_of(without_head(encoder, classes), held_out)).double()
    rows = []
    for what, (names, prompts) in tried.items():
        weight = torch.from_numpy(np.asarray(text_anchor_of(encoder, names, prompts).tensors["head.weight"])).double()
        cosines = functional.normalize(features, dim=1) @ functional.normalize(weight, dim=1).T
        scale = fitted_scale(cosines.numpy(), held_out.labels)
        labels = torch.from_numpy(held_out.labels)
        right = float((cosines.argmax(dim=1) == labels).double().mean())
        rows.append([what, percent(right), f"{functional.cross_entropy(scale * cosines, labels):.3f}", f"{scale:g}"])
    print(table(["prompts", "accuracy, %", "NLL", "scale"], rows))


if __name__ == "__main__":
    main()
