"""A weight set as a classifier of pictures: files, their bytes, data URLs, arrays or Pillow's images."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modelstock.data.decoder import Unreadable, decode
from modelstock.data.images import Framing, normalise
from modelstock.errors import DataError, WeightsError
from modelstock.models.towers import build_classifier
from modelstock.weights.weight_set import WeightSet

Picture = str | Path | bytes | NDArray[np.uint8] | Image.Image


class ImageClassifier:
    """Pictures -> probabilities of the classes, as scoring has them.

    `precision`: of the tower; the head and all that follows it are float32.

    Raises:
        WeightsError: weights that are no classifier, or whose file does not name the head's classes.
    """

    def __init__(
        self,
        weights: WeightSet,
        *,
        precision: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        self._model = build_classifier(weights).to(device)
        self._model.tower.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        self._dtype, self._device, self._batch_size = next(self._model.tower.parameters()).dtype, device, batch_size
        self._preprocess = weights.meta["preprocess"]
        self._framing = Framing.of(self._preprocess)
        self.labels: tuple[str, ...] = tuple(weights.meta.get("classes", ()))
        classes = self._model.head.out_features
        if len(self.labels) != classes:
            raise WeightsError(
                weights.source,
                got=f"{len(self.labels)} names for a head of {classes} classes",
                expected="one name per class",
                cure="make the weight set again from its anchor",
            )

    @torch.inference_mode()
    def probabilities(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """Probabilities (N, C) of N pictures.

        Raises:
            DataError: a picture that does not decode, with its place in the sequence.
        """
        parts = [np.empty((0, len(self.labels)), np.float32)]
        for start in range(0, len(pictures), self._batch_size):
            batch = pictures[start : start + self._batch_size]
            framed = np.stack([self._framing(image_of(p, start + i)) for i, p in enumerate(batch)])
            pixels = normalise(torch.from_numpy(framed).to(self._device), self._preprocess).to(self._dtype)
            logits = self._model.logits(self._model.features(pixels))
            parts.append(logits.softmax(dim=1).cpu().numpy())
        return np.concatenate(parts)


def image_of(picture: Picture, number: int = 0) -> Image.Image:
    """One picture as an image, decoded as scoring decodes it.

    A text is the path of a file, or a URL `data:...;base64,...`; an array is (H, W, 3) or (H, W) of uint8.

    Raises:
        DataError: a picture that cannot be read; `number` names its place.
    """
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        if isinstance(picture, str | Path):
            return decode(_content(picture))
        if isinstance(picture, bytes):
            return decode(picture)
        return _from_array(np.asarray(picture))
    except (Unreadable, OSError, binascii.Error) as error:
        raise DataError(
            f"picture {number}",
            got=f"{type(error).__name__}: {error}",
            expected="an image that decodes",
            cure="give a file's path, its bytes, a data URL, an array of uint8, or a Pillow image",
        ) from error


def _content(text: str | Path) -> bytes:
    if isinstance(text, str) and text.startswith("data:"):
        head, _, data = text.partition(",")
        if not head.endswith(";base64"):
            raise Unreadable("a data URL without base64")
        return base64.b64decode(data, validate=True)
    return Path(text).read_bytes()


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise Unreadable(f"an array {array.shape} of {array.dtype}; an image is (H, W, 3) or (H, W) of uint8")
    return Image.fromarray(array).convert("RGB")
