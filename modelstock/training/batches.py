"""Training batches: examples in the order of (order seed, epoch), augmented by the randomness of (seed, step) alone.

A step's whole batch, its crops and its mixing weight are settled before any image is read, so that any process can
make any share of it: the batches are the same from a thread and from any number of loader workers, and the global
batch the same at every number of devices. Within an epoch no example comes twice; those that do not fill a last batch
are left out.
"""

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as transforms

from modelstock.data.examples import Examples
from modelstock.data.images import normalise
from modelstock.errors import DataError
from modelstock.training.ahead import made_ahead
from modelstock.training.distributed import ALONE, World
from modelstock.training.loop import Batch, seed_torch, step_seed
from modelstock.workers import follow_parent

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
_RATIO = (3 / 4, 4 / 3)  # least and greatest aspect ratio of a crop
_LOG_RATIO = torch.log(torch.tensor(_RATIO)).tolist()


@lru_cache(maxsize=16)  # of a million examples, it takes as long as a step; an epoch's steps ask for one per seed
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


def crop_box(height: int, width: int, scale: tuple[float, float], generator: torch.Generator) -> Box:
    """One RandomResizedCrop of an image.

    The numbers are those that torchvision's transform draws, in half the time: a step of a small tower is that short.
    Source: torchvision's RandomResizedCrop.make_params; Szegedy et al., arXiv 1409.4842.
    """
    number = torch.empty(1)
    for _ in range(10):
        area = height * width * number.uniform_(*scale, generator=generator).item()
        ratio = number.uniform_(*_LOG_RATIO, generator=generator).exp_().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(number.random_(0, height - h + 1, generator=generator).item())
            left = int(number.random_(0, width - w + 1, generator=generator).item())
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


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images. `crop_scale`: least and greatest share of the area that a crop keeps.

    `rand_augment_operations`: per image, before the crop (0: none), of `rand_augment_magnitude` (of 30). `mixup`: alpha
    of Beta(alpha, alpha) (0: none).
    """

    crop_scale: tuple[float, float]
    flip: bool = False
    rand_augment_operations: int = 0
    rand_augment_magnitude: int = 9
    mixup: float = 0.0

    @property
    def by_global_generator(self) -> bool:
        """Whether something is drawn that takes no generator of its own: mixup's Beta, and RandAugment."""
        return self.mixup > 0 or self.rand_augment_operations > 0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What was drawn for one image: its example, crop, whether it is flipped, and RandAugment's seed."""

    row: int
    box: Box
    flipped: bool
    seed: int


class TrainingBatches(Dataset[Batch | DataError]):
    """One item per step, or why there is none: (images (b, 3, S, S), labels (b,), ...).

    It is this process's share of the step's batch, augmented. After mixup: (images, labels, the partners' labels,
    each label's weight); see `mixed_pairs`.
    """

    def __init__(
        self,
        examples: Examples,
        augmentation: Augmentation,
        preprocess: Mapping[str, Any],
        *,
        batch_size: int,
        seed: int,
        name: str,
        order_seed: int | None = None,
        world: World = ALONE,
    ) -> None:
        self._examples, self._augmentation, self._preprocess = examples, augmentation, dict(preprocess)
        self._batch_size, self._seed, self._name = batch_size, seed, name
        self._order_seed = seed if order_seed is None else order_seed
        self._rank, self._world_size = world.rank, world.size
        self._rand_augment = transforms.RandAugment(
            augmentation.rand_augment_operations, augmentation.rand_augment_magnitude
        )

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self._batch(step)
        except DataError as error:
            return error  # rather than raised: torch would wrap what a worker raises

    def _batch(self, step: int) -> Batch:
        draws, weight = self._draws(step)
        share = len(draws) // self._world_size
        draws = draws[self._rank * share : (self._rank + 1) * share]
        pictures = [self._picture(draw) for draw in draws]
        images = resized_crops(pictures, [draw.box for draw in draws], self._preprocess)
        flipped = torch.tensor([draw.flipped for draw in draws])
        if flipped.any():
            images[flipped] = images[flipped].flip(-1)
        labels = torch.from_numpy(self._examples.labels[[draw.row for draw in draws]])
        return mixed_pairs(images, labels, weight) if self._augmentation.mixup else (images, labels)

    def _draws(self, step: int) -> tuple[list[Draw], float]:
        """What is drawn for every image of the step's whole batch, and mixup's weight."""
        options = self._augmentation
        count, order = len(self._examples.labels), self._order_seed
        rows = batch_rows(step, count=count, batch_size=self._batch_size, seed=order).tolist()
        generator = self._generator(step)
        boxes = [crop_box(*self._examples.size(row), options.crop_scale, generator) for row in rows]
        flips = (torch.rand(len(rows), generator=generator) < 0.5).tolist() if options.flip else [False] * len(rows)
        weight = float(torch.distributions.Beta(options.mixup, options.mixup).sample()) if options.mixup else 1.0
        seeds = [0] * len(rows)
        if options.rand_augment_operations:
            seeds = torch.randint(2**62, (len(rows),), generator=generator).tolist()
        drawn = zip(rows, boxes, flips, seeds, strict=True)
        return [Draw(row=row, box=box, flipped=flip, seed=seed) for row, box, flip, seed in drawn], weight

    def _generator(self, step: int) -> torch.Generator:
        """What a step's batch is drawn from: torch's global generator only where something takes no other."""
        seed = step_seed(self._seed, self._name, step)
        if self._augmentation.by_global_generator:
            seed_torch(seed)
            return torch.default_generator
        return torch.Generator().manual_seed(seed)

    def _picture(self, draw: Draw) -> NDArray[np.uint8]:
        """An example's image (H, W, 3), after RandAugment where that is wanted."""
        picture = self._examples.image(draw.row)
        if not self._augmentation.rand_augment_operations:
            return picture
        seed_torch(draw.seed)
        augmented: Tensor = self._rand_augment(torch.from_numpy(picture).permute(2, 0, 1))
        changed: NDArray[np.uint8] = augmented.permute(1, 2, 0).contiguous().numpy()
        return changed

    def load(self, start: int, stop: int, *, workers: int, pin: bool) -> Generator[Batch, None, None]:
        """The batches of steps `start` to `stop`, made ahead by `workers` processes; closing it ends them.

        `pin`: for a GPU, in memory that it copies from. Then, without workers, a thread makes them ahead, except with
        mixup or RandAugment: it would draw from the generator that dropout draws from. Beside training on CPUs, which
        uses all cores, a thread saves little, and costs much where other work runs (docs/benchmarks.md).

        Raises:
            DataError: an image that does not decode.
        """
        loader: DataLoader[Batch | DataError] = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=follow_parent,
        )
        if pin and not workers and not self._augmentation.by_global_generator:
            with contextlib.closing(made_ahead(iter(loader))) as batches:
                yield from _good(batches)
        else:
            yield from _good(iter(loader))


def _good(batches: Iterator[Batch | DataError]) -> Generator[Batch, None, None]:
    """The batches, up to the first that there is not, which is raised."""
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch
