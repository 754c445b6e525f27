"""Images with labels by row: decoded once and kept in memory, or read from their shards at every use."""

import io
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modelstock.data.index import index_shards
from modelstock.data.manifest import Manifest
from modelstock.data.shards import FORMATS


class Examples(Protocol):
    """Images with labels, by row."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (N,)."""

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image."""

    def image(self, row: int) -> NDArray[np.uint8]:
        """An image (H, W, 3)."""


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


class InShards:
    """Images read from their shards at every use, wherever in a shard they are; only their places are held."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._paths, self._border = manifest.paths(folder), manifest.border
        self._places, self.labels = index_shards(folder, manifest)
        self._sizes: dict[int, tuple[int, int]] = {}

    def open(self, row: int, most: int | None = None) -> Image.Image:
        """An image of any mode, not decoded yet; of `most` bytes of its file, where given."""
        shard, start, length = self._places[row].tolist()
        # A file opened anew each time: descriptors do not survive into other processes' offsets.
        with open(self._paths[shard], "rb") as file:
            content = os.pread(file.fileno(), min(length, most or length), start)
        return Image.open(io.BytesIO(content), formats=FORMATS)

    def cut(self, row: int) -> Image.Image:
        """An image without its border."""
        image, border = self.open(row), self._border
        return image.crop((border, border, image.width - border, image.height - border)) if border else image

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image, from the head of its file; a batch's crops need those of other shares too."""
        if row not in self._sizes:
            try:
                width, height = self.open(row, 1 << 14).size
            except OSError:  # a long preface, such as a thumbnail, is cut off
                width, height = self.open(row).size
            self._sizes[row] = (height - 2 * self._border, width - 2 * self._border)
        return self._sizes[row]

    def image(self, row: int) -> NDArray[np.uint8]:
        """An image (H, W, 3)."""
        return np.array(self.cut(row).convert("RGB"))
