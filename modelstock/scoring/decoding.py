"""Batches of decoded examples for a pass, framed and prepared as towers take them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from modelstock.data.dataset import Dataset
from modelstock.data.preprocess import Framer, framer_of, inputs_of
from modelstock.errors import DataError
from modelstock.workers import follow_parent

Decoded = tuple[list[Tensor], Tensor]  # images (B, S, S, 3) uint8 or tokens (B, L) per framer, and labels (B,)


class DecodedBatches(TorchDataset[Decoded | DataError]):
    """One item per batch of at most `batch_size` examples in their order, framed in all ways that are asked for."""

    def __init__(self, dataset: Dataset, framers: Sequence[Framer], batch_size: int) -> None:
        self._dataset, self._framers, self._batch_size = dataset, framers, batch_size

    def __getitem__(self, number: int) -> Decoded | DataError:
        labels = self._dataset.labels
        first = number * self._batch_size
        rows = range(first, min(first + self._batch_size, len(labels)))
        framed: list[list[Any]] = []
        for row in rows:
            try:
                example: Any = self._dataset.decoded(row)
                framed.append([framer(example) for framer in self._framers])
            except DataError as error:
                return error  # rather than raised: torch would wrap what a worker raises
        columns = zip(self._framers, zip(*framed, strict=True), strict=True)
        batches = [framer.batch(column) for framer, column in columns]
        return batches, torch.from_numpy(labels[rows.start : rows.stop])

    def load(self, start: int, *, workers: int, pin: bool) -> Iterator[Decoded]:
        """The batches from number `start` on, decoded ahead by `workers` processes, or by this one.

        Raises:
            DataError: an example that does not decode.
        """
        numbers = range(start, -(-len(self._dataset.labels) // self._batch_size))
        loader: DataLoader[Decoded | DataError] = DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pin, worker_init_fn=follow_parent
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class Prepared:
    """One batch of framed examples on the device, prepared once for all towers that ask for the same."""

    def __init__(self, framed: Mapping[Framer, Tensor], device: str, dtype: torch.dtype) -> None:
        self._framed, self._device, self._dtype = framed, device, dtype
        self._prepared: list[tuple[Mapping[str, Any], Tensor]] = []  # few: comparing is cheaper than hashing

    def of(self, preprocess: Mapping[str, Any]) -> Tensor:
        """Pixels (B, 3, S, S) or tokens (B, L), as the preprocess says."""
        for known, inputs in self._prepared:
            if known == preprocess:
                return inputs
        framed = self._framed[framer_of(preprocess)].to(self._device, non_blocking=True)
        inputs = inputs_of(framed, preprocess, self._dtype)
        self._prepared.append((preprocess, inputs))
        return inputs
