"""Batches of decoded images for a pass, and their pixels as towers take them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from modelstock.data.dataset import Dataset
from modelstock.data.images import Framing, normalise
from modelstock.errors import DataError
from modelstock.workers import follow_parent

Decoded = tuple[list[Tensor], Tensor]  # (B, S, S, 3) uint8 per framing, and labels (B,)


class DecodedBatches(TorchDataset[Decoded | DataError]):
    """One item per batch of at most `batch_size` examples in their order, framed in every way that is asked for."""

    def __init__(self, dataset: Dataset, framings: Sequence[Framing], batch_size: int) -> None:
        self._dataset, self._framings, self._batch_size = dataset, framings, batch_size

    def __getitem__(self, number: int) -> Decoded | DataError:
        images, labels = self._dataset.images, self._dataset.labels
        first = number * self._batch_size
        rows = range(first, min(first + self._batch_size, len(labels)))
        framed: list[list[NDArray[np.uint8]]] = []
        for row in rows:
            try:
                image = images.cut(row)
                framed.append([framing(image) for framing in self._framings])
            except DataError as error:
                return error  # rather than raised: torch would wrap what a worker raises
        stacked = [torch.from_numpy(np.stack(batch)) for batch in zip(*framed, strict=True)]
        return stacked, torch.from_numpy(labels[rows.start : rows.stop])

    def load(self, start: int, *, workers: int, pin: bool) -> Iterator[Decoded]:
        """The batches from number `start` on, decoded ahead by `workers` processes, or by this one.

        Raises:
            DataError: an image that does not decode.
        """
        numbers = range(start, -(-len(self._dataset.labels) // self._batch_size))
        loader: DataLoader[Decoded | DataError] = DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pin, worker_init_fn=follow_parent
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class Pixels:
    """One batch of decoded images on the device, normalised once for all towers that ask for the same."""

    def __init__(self, images: Mapping[Framing, Tensor], device: str, dtype: torch.dtype) -> None:
        self._images, self._device, self._dtype = images, device, dtype
        self._normalised: list[tuple[Mapping[str, Any], Tensor]] = []  # few: comparing is cheaper than hashing

    def of(self, preprocess: Mapping[str, Any]) -> Tensor:
        """Pixels (B, 3, S, S), framed and scaled as the preprocess says."""
        for known, pixels in self._normalised:
            if known == preprocess:
                return pixels
        images = self._images[Framing.of(preprocess)].to(self._device, non_blocking=True)
        pixels = normalise(images, preprocess).to(self._dtype)
        self._normalised.append((preprocess, pixels))
        return pixels
