"""The reference model of the embedded benchmark, whose errors make its adversarial split."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from modelstock.data.images import normalise
from modelstock.data.shapes.names import NAMES, TINY_PREPROCESS
from modelstock.data.shapes.render import BLOCK, SPLITS, Drawn, draw
from modelstock.devices import deterministic
from modelstock.errors import DataError
from modelstock.params import PrepareParams
from modelstock.progress import progress_bar


def reference_model(params: PrepareParams) -> nn.Module:
    """A small convolutional network trained from scratch; like the ResNet-50 behind ImageNet-A it is no CLIP.

    Its training draws are photos of the `train` process far beyond the indices any split uses, so it shares no image
    with what the tower is trained or tested on.
    """
    torch.manual_seed(params.seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, 2, 1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * 16, len(NAMES)),
    )
    images, labels = draw("train", range(10**8, 10**8 + params.reference_draws), seed=params.seed)
    pixels, truth = normalise(images, TINY_PREPROCESS), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in progress_bar(range(params.reference_epochs), desc="reference model", unit="epoch"):
        order = torch.from_numpy(np.random.default_rng([params.seed, epoch]).permutation(len(truth)))
        for rows in torch.split(order, 100):
            loss = functional.cross_entropy(model(pixels[rows]), truth[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def missed(split: str, params: PrepareParams, count: int, *, threads: int) -> Iterator[Drawn]:
    """Draws of `split` on which the reference model errs, `count` of them, as many of each label as of any other.

    `threads`: of torch; which images they are repeats at one number of them.

    Raises:
        DataError: the reference errs so seldom that 100 draws an image are not enough.
    """
    deterministic(threads)
    model = reference_model(params)
    labels = list(SPLITS[split].labels.values())
    groups = torch.tensor([[NAMES.index(c) for c in group] for group in labels])
    wanted = [len(range(i, count, len(labels))) for i in range(len(labels))]
    for start in range(0, 100 * count, BLOCK):
        images, truth = draw(split, range(start, start + BLOCK), seed=params.seed)
        with torch.inference_mode():
            logits: Tensor = model(normalise(images, TINY_PREPROCESS))
        guess = logits[:, groups[:, 0]].argmax(dim=1).numpy()
        for image, label in zip(images[guess != truth], truth[guess != truth], strict=True):
            if wanted[label]:
                wanted[label] -= 1
                yield image, int(label)
        if not any(wanted):
            return
    raise DataError(
        f"split {split}",
        got=f"{count - sum(wanted)} errors of the reference model in {100 * count} draws",
        expected=f"{count}",
        cure="lower prepare.reference_epochs or prepare.reference_draws",
    )
