"""Images framed and normalised as a tower takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose


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
        image = image if image.mode == "RGB" else image.convert("RGB")  # before it is resized, as ImageFolder does
        if image.size == (self.size, self.size):
            return np.array(image)
        return np.array(_transform(self)(image))

    def batch(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Framed images as one tensor (B, S, S, 3) uint8."""
        return torch.from_numpy(np.stack(images))

    @property
    def example_bytes(self) -> int:
        """Bytes of one framed image."""
        return 3 * self.size**2


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


def normalise(images: NDArray[np.uint8] | Tensor, preprocess: Mapping[str, Any]) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 with the model's mean and std, on the images' device."""
    # Channels apart before anything is computed, and then in place: a third of the time.
    planes = torch.as_tensor(images).permute(0, 3, 1, 2)
    pixels = planes.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(preprocess[k], device=pixels.device).reshape(3, 1, 1) for k in ("mean", "std"))
    return pixels.div_(255).sub_(mean).div_(std)
