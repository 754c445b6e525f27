"""Images in shards, read where they are, and framed as a tower takes them."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from modelstock.data.shards import Manifest, example_places


@dataclass(frozen=True)
class Framing:
    """The geometric part of a preprocess: side in pixels, interpolation, and what becomes of other shapes.

    `resize_mode`: shortest (the shorter side is resized, the middle kept), squash, or longest (padded).
    """

    size: int
    interpolation: str
    resize_mode: str

    @classmethod
    def of(cls, preprocess: Mapping[str, Any]) -> "Framing":
        """The framing that a weight set's metadata asks for."""
        return cls(preprocess["size"], preprocess["interpolation"], preprocess.get("resize_mode", "shortest"))

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """An image as (size, size, 3): the pixels of open_clip's evaluation transform, before it scales them."""
        if image.size == (self.size, self.size):
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return np.array(_transform(self)(image))


@lru_cache
def _transform(framing: Framing) -> Compose:
    from open_clip import image_transform
    from torchvision.transforms import Normalize

    whole = image_transform(
        framing.size, is_train=False, interpolation=framing.interpolation, resize_mode=framing.resize_mode
    )
    # All but the scaling to [0, 1] and the model's mean and deviation, which are left to the device.
    kept = [t for t in whole.transforms if not isinstance(t, Normalize)][:-1]
    return Compose(kept)


class InShards:
    """Images read from their shards at every use, wherever in a shard they are; only their places are held."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._paths, self._border = manifest.paths(folder), manifest.border
        self._places, self.labels = example_places(folder, manifest)
        self._sizes: dict[int, tuple[int, int]] = {}

    def open(self, row: int, most: int | None = None) -> Image.Image:
        """An image of any mode, not decoded yet; of `most` bytes of its file, where given."""
        shard, start, length = self._places[row].tolist()
        # A file opened anew each time: descriptors do not survive into other processes' offsets.
        with open(self._paths[shard], "rb") as file:
            content = os.pread(file.fileno(), min(length, most or length), start)
        return Image.open(io.BytesIO(content))

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


def normalise(images: NDArray[np.uint8] | Tensor, preprocess: Mapping[str, Any]) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 with the model's mean and std, on the images' device."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(preprocess[k], device=pixels.device).reshape(3, 1, 1) for k in ("mean", "std"))
    return ((pixels - mean) / std).contiguous()
