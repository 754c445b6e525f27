"""Images or texts with labels by row: decoded once and kept in memory, or read from their shards at every use."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modelstock.data.decoder import Unreadable, decode, opened
from modelstock.data.index import index_shards
from modelstock.data.manifest import Manifest
from modelstock.data.texts import text_of
from modelstock.errors import DataError

_HEAD = 1 << 14  # bytes of a file that mostly say how large its image is


class Examples(Protocol):
    """Images with labels, by row."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (N,)."""

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image."""

    def image(self, row: int) -> NDArray[np.uint8]:
        """An image (H, W, 3)."""


class Texts(Protocol):
    """Texts with labels, by row."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (N,)."""

    def text(self, row: int) -> str:
        """A text, never empty."""


class InMemory:
    """Images (N, H, W, 3) uint8, decoded once; loader workers and seeds share them."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._images, self.labels = images, labels

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = self._images.shape[1:3]
        return height, width

    def image(self, row: int) -> NDArray[np.uint8]:
        """An image (H, W, 3)."""
        image: NDArray[np.uint8] = self._images[row]
        return image


class TextsInMemory:
    """Texts decoded once."""

    def __init__(self, texts: Sequence[str], labels: NDArray[np.int64]) -> None:
        self._texts, self.labels = texts, labels

    def text(self, row: int) -> str:
        """A text."""
        return self._texts[row]


class Part:
    """Some of the rows of other examples, of images or texts."""

    def __init__(self, examples: Examples | Texts, rows: NDArray[np.int64]) -> None:
        self._examples: Any = examples
        self._rows = rows
        self.labels: NDArray[np.int64] = examples.labels[rows]

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image."""
        size: tuple[int, int] = self._examples.size(int(self._rows[row]))
        return size

    def image(self, row: int) -> NDArray[np.uint8]:
        """An image (H, W, 3)."""
        image: NDArray[np.uint8] = self._examples.image(int(self._rows[row]))
        return image

    def text(self, row: int) -> str:
        """A text."""
        text: str = self._examples.text(int(self._rows[row]))
        return text


class _Stored:
    """Files read from their shards at every use, wherever in a shard they are; only their places are held."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._paths, self._modality = folder, manifest.paths(folder), manifest.modality
        self._places, self.labels = index_shards(folder, manifest)

    def content(self, row: int, most: int | None = None) -> bytes:
        """An example's file, or its first `most` bytes."""
        shard, start, length = self._places[row].tolist()
        # A file opened anew each time: descriptors do not survive into other processes' offsets.
        with open(self._paths[shard], "rb") as file:
            return os.pread(file.fileno(), min(length, most or length), start)

    def _unreadable(self, row: int, error: Exception) -> DataError:
        return DataError(
            f"{self._folder}, example {row}",
            got=error,
            expected=f"{'an image' if self._modality == 'image' else 'a text'} that decodes",
            cure="run the stage prepare again for this split",
        )


class TextsInShards(_Stored):
    """Texts read from their shards at every use."""

    def text(self, row: int) -> str:
        """A text.

        Raises:
            DataError: it does not decode.
        """
        try:
            return text_of(self.content(row))
        except (Unreadable, OSError) as error:
            raise self._unreadable(row, error) from error


class InShards(_Stored):
    """Images read from their shards at every use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self._border = manifest.border
        self._sizes: dict[int, tuple[int, int]] = {}

    def cut(self, row: int) -> Image.Image:
        """An image in RGB, without its border.

        Raises:
            DataError: it does not decode.
        """
        try:
            return decode(self.content(row), self._border)
        except (Unreadable, OSError) as error:
            raise self._unreadable(row, error) from error

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image, from the head of its file; a batch's crops need those of other shares too.

        Raises:
            DataError: a file that does not begin like an image.
        """
        if row not in self._sizes:
            try:
                width, height = self._stored_size(row)
            except (Unreadable, OSError) as error:
                raise self._unreadable(row, error) from error
            self._sizes[row] = (height - 2 * self._border, width - 2 * self._border)
        return self._sizes[row]

    def _stored_size(self, row: int) -> tuple[int, int]:
        try:
            with opened(self.content(row, _HEAD)) as image:
                return image.size
        except Unreadable:  # the head may end within a long preface, such as a thumbnail
            with opened(self.content(row)) as image:
                return image.size

    def image(self, row: int) -> NDArray[np.uint8]:
        """An image (H, W, 3).

        Raises:
            DataError: it does not decode.
        """
        return np.array(self.cut(row))
