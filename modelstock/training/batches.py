"""Training examples in the order of (seed, epoch), augmented by the randomness of (seed, step) alone.

A step's whole batch, its crops and its mixing weight are settled before any image is read, so that any process can
make any share of it: the batches are the same at every number of loader workers, and the global batch the same at
every number of devices. Within an epoch no example comes twice; those that do not fill a last batch are left out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as transforms

from modelstock.data.examples import Examples
from modelstock.data.images import Framing, normalise
from modelstock.params import FinetuneParams
from modelstock.training.distributed import ALONE, World
from modelstock.training.loop import Batch, seed_step

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
_RATIO = (3 / 4, 4 / 3)  # least and greatest aspect ratio of a crop
_LOG_RATIO = torch.log(torch.tensor(_RATIO)).tolist()


@lru_cache(maxsize=16)  # of a million examples, it takes as long as a step; an epoch's steps ask for one, a seed
def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits `count` examples."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False  # many hold it
    return order


def batch_rows(step: int, *, count: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """The examples of one step: whole batches of the epoch's order, the rest of an epoch left out as usual."""
    per_epoch = count // batch_size
    epoch, position = divmod(step, per_epoch)
    return epoch_order(count, seed=seed, epoch=epoch)[position * batch_size : (position + 1) * batch_size]


def crop_box(height: int, width: int, scale: tuple[float, float]) -> Box:
    """One RandomResizedCrop of an image, drawn from torch's generator.

    The numbers are those that torchvision's transform draws, in half the time: a step of a small tower is that short.
    Source: torchvision's RandomResizedCrop.make_params; Szegedy et al., arXiv 1409.4842.
    """
    number = torch.empty(1)
    for _ in range(10):
        area = height * width * number.uniform_(*scale).item()
        ratio = torch.exp(number.uniform_(*_LOG_RATIO)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(number.random_(0, most + 1).item()) for most in (height - h, width - w))
            return top, left, h, w
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crops(images: Sequence[NDArray[np.uint8]], boxes: Sequence[Box], preprocess: Mapping[str, Any]) -> Tensor:
    """Each image's box, normalised, then resized to the model's size, bicubic with antialiasing: (B, 3, S, S).

    Boxes of one height and width go together; an image's pixels do not depend on which others they are.
    """
    size = preprocess["size"]
    groups: dict[tuple[int, int], list[int]] = {}
    for place, (_, _, height, width) in enumerate(boxes):
        groups.setdefault((height, width), []).append(place)
    out = torch.empty(len(images), 3, size, size)
    for (height, width), places in groups.items():
        corners = [(images[i], *boxes[i][:2]) for i in places]
        pixels = normalise(np.stack([im[t : t + height, x : x + width] for im, t, x in corners]), preprocess)
        if (height, width) != (size, size):
            pixels = functional.interpolate(pixels, [size, size], mode="bicubic", antialias=True)
        out[places] = pixels
    return out


def mixed_pairs(images: Tensor, labels: Tensor, weight: float) -> Batch:
    """Mixup between neighbours 0-1, 2-3, ...: images, labels, the partners' labels, and each label's weight (B,).

    Neighbours stay together however a batch is shared out. x_i <- weight x_i + (1 - weight) x_partner.
    Source: Zhang et al., arXiv 1710.09412.
    """
    partner = torch.arange(len(images)).reshape(-1, 2).flip(1).reshape(-1)
    return images.lerp(images[partner], 1 - weight), labels, labels[partner], torch.full((len(images),), weight)


class Batches(Dataset[Batch]):
    """One item a step: this process's share of the step's batch, augmented: (images (b, 3, S, S), labels (b,), ...)."""

    def __init__(
        self,
        examples: Examples,
        params: FinetuneParams,
        preprocess: Mapping[str, Any],
        *,
        seed: int,
        name: str,
        world: World = ALONE,
    ) -> None:
        self._examples, self._params, self._preprocess = examples, params, dict(preprocess)
        self._seed, self._name, self._rank, self._world_size = seed, name, world.rank, world.size
        self._count = len(examples.labels)
        self._augment = transforms.RandAugment(params.rand_augment_operations, params.rand_augment_magnitude)

    def __getitem__(self, step: int) -> Batch:
        params = self._params
        rows = batch_rows(step, count=self._count, batch_size=params.batch_size, seed=self._seed)
        seed_step(self._seed, self._name, step)
        boxes = [crop_box(*self._examples.size(row), params.crop_scale) for row in rows.tolist()]
        flips = (torch.rand(len(rows)) < 0.5).tolist() if params.flip else [False] * len(rows)
        weight = float(torch.distributions.Beta(params.mixup, params.mixup).sample()) if params.mixup else 1.0
        seeds = torch.randint(2**62, (len(rows),)).tolist() if params.rand_augment_operations else []
        share = len(rows) // self._world_size
        own = range(self._rank * share, (self._rank + 1) * share)
        pictures = [self._examples.image(int(rows[i])) for i in own]
        for place, i in enumerate(own if seeds else ()):
            torch.manual_seed(seeds[i])
            changed: Tensor = self._augment(torch.from_numpy(pictures[place]).permute(2, 0, 1))
            pictures[place] = changed.permute(1, 2, 0).contiguous().numpy()
        images = resized_crops(pictures, boxes[own.start : own.stop], self._preprocess)
        turned = torch.tensor([flips[i] for i in own])
        if turned.any():
            images[turned] = images[turned].flip(-1)
        labels = torch.from_numpy(self._examples.labels[rows[own.start : own.stop]])
        return mixed_pairs(images, labels, weight) if params.mixup else (images, labels)

    def load(self, start: int, stop: int, *, workers: int, pin: bool) -> Iterator[Batch]:
        """The batches of steps `start` to `stop`, made ahead by `workers` processes, or one at a time by this one."""
        loader: DataLoader[Batch] = DataLoader(
            self, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin
        )
        return iter(loader)


class Scored(Dataset[Batch]):
    """One item a batch of at most `batch_size` examples in their order, framed as they are scored."""

    def __init__(self, examples: Examples, preprocess: Mapping[str, Any], batch_size: int = 500) -> None:
        self._examples, self._preprocess, self._batch_size = examples, dict(preprocess), batch_size
        self._labels = torch.from_numpy(examples.labels)

    def __getitem__(self, number: int) -> Batch:
        rows = range(len(self._labels))[number * self._batch_size : (number + 1) * self._batch_size]
        framing = Framing.of(self._preprocess)
        images = np.stack([framing(Image.fromarray(self._examples.image(row))) for row in rows])
        return normalise(images, self._preprocess), self._labels[rows.start : rows.stop]

    def load(self) -> Iterator[Batch]:
        """All batches."""
        return (self[number] for number in range(-(-len(self._labels) // self._batch_size)))
