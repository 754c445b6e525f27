"""A weight set as a classifier: of texts, or of pictures (files, their bytes, data URLs, arrays, Pillow's images)."""

import base64
import binascii
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modelstock.data.decoder import Unreadable, decode
from modelstock.data.preprocess import Decoded, framer_of, inputs_of, modality_of
from modelstock.errors import DataError, WeightsError
from modelstock.models.towers import Tower, check_classifier
from modelstock.weights.weight_set import WeightSet

Picture = str | Path | bytes | NDArray[np.uint8] | Image.Image
Given = TypeVar("Given")


class Classifying(ABC, Generic[Given]):
    """Examples -> probabilities of the classes, as scoring has them.

    `precision`: of the tower; the head and all that follows it are float32.

    Raises:
        WeightsError: weights that are no classifier of this modality, or whose file does not name the head's classes.
    """

    modality: ClassVar[str]

    def __init__(
        self,
        weights: WeightSet,
        *,
        precision: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        check_classifier(weights)
        if modality_of(weights.meta["preprocess"]) != self.modality:
            raise WeightsError(
                weights.source,
                got=f"a tower that takes {modality_of(weights.meta['preprocess'])}",
                expected=f"one that takes {self.modality}",
                cure="use classifier_of, which asks the weights",
            )
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._tower, self._device, self._batch_size = Tower(weights, device, self._dtype), device, batch_size
        self._framer: Any = framer_of(weights.meta["preprocess"])
        self.labels: tuple[str, ...] = tuple(weights.meta.get("classes", ()))
        classes = weights.shaped["head.weight"].shape[0]
        if len(self.labels) != classes:
            raise WeightsError(
                weights.source,
                got=f"{len(self.labels)} names for a head of {classes} classes",
                expected="one name per class",
                cure="make the weight set again from its anchor",
            )

    @staticmethod
    @abstractmethod
    def _decoded(example: Given, number: int) -> Decoded:
        """What the framer takes, of the example at place `number`."""

    @torch.inference_mode()
    def probabilities(self, examples: Sequence[Given]) -> NDArray[np.float32]:
        """Probabilities (N, C) of N examples.

        Raises:
            DataError: an example that does not decode, with its place in the sequence.
        """
        parts = [np.empty((0, len(self.labels)), np.float32)]
        for start in range(0, len(examples), self._batch_size):
            batch = examples[start : start + self._batch_size]
            framed = self._framer.batch([self._framer(self._decoded(e, start + i)) for i, e in enumerate(batch)])
            inputs = inputs_of(framed.to(self._device), self._tower.preprocess, self._dtype)
            parts.append(self._tower.logits(inputs).softmax(dim=1).cpu().numpy())
        return np.concatenate(parts)


class ImageClassifier(Classifying[Picture]):
    """Pictures -> probabilities of the classes, as scoring has them."""

    modality = "image"

    @staticmethod
    def _decoded(example: Picture, number: int) -> Image.Image:
        return image_of(example, number)


class TextClassifier(Classifying[str]):
    """Texts -> probabilities of the classes, as scoring has them."""

    modality = "text"

    @staticmethod
    def _decoded(example: str, number: int) -> str:
        if not isinstance(example, str):
            raise DataError(
                f"text {number}", got=f"a {type(example).__name__}", expected="a text", cure="give texts alone"
            )
        return example


def classifier_of(weights: WeightSet, **options: Any) -> ImageClassifier | TextClassifier:
    """A weight set's classifier, of whatever modality it is. `options`: as `Classifying` takes them.

    Raises:
        WeightsError: as `Classifying`.
    """
    check_classifier(weights)
    kind = TextClassifier if modality_of(weights.meta["preprocess"]) == "text" else ImageClassifier
    return kind(weights, **options)


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
