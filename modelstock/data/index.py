"""Which image and which label of a shard belong together: webdataset's rule, in one place.

An example is an image and a `.cls` file of one key; a key is a member's path up to the first dot of its name.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from modelstock.data.manifest import Manifest
from modelstock.data.tars import members
from modelstock.errors import DataError

# What an example's image may be called.
IMAGES = ("jpg", "jpeg", "png", "webp")
Place = TypeVar("Place")


class Example(NamedTuple, Generic[Place]):
    """Where an example's image is, and the text of its label; None for what is missing."""

    image: Place | None
    label: str | None

    def label_below(self, count: int) -> int | None:
        """The label as a number from 0 to `count` - 1; None for an example without image or without such a label."""
        if self.image is None or self.label is None or not (self.label.isascii() and self.label.isdigit()):
            return None
        return int(self.label) if int(self.label) < count else None


def pair(
    archive: Path, files: Iterable[tuple[str, Place]], read: Callable[[Place], bytes]
) -> dict[str, Example[Place]]:
    """Key -> example, in the images' order; `read` gives the content of a `.cls` file.

    Raises:
        DataError: two images or two labels of one key.
    """

    def once(key: str, known: Mapping[str, object], what: str) -> None:
        if key in known:
            cure = "make the shards again"
            raise DataError(archive, got=f"two {what} {key}", expected="one per example", cure=cure)

    images: dict[str, Place] = {}
    labels: dict[str, str] = {}
    for path, place in files:
        folder, _, name = path.rpartition("/")
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if suffix == "cls":
            once(key, labels, "labels")
            labels[key] = read(place).decode(errors="replace").strip()
        elif suffix.lower() in IMAGES:
            once(key, images, "images")
            images[key] = place
    return {key: Example(images.get(key), labels.get(key)) for key in [*images, *(labels.keys() - images.keys())]}


def _content(file: BinaryIO, place: tuple[int, int, int]) -> bytes:
    return os.pread(file.fileno(), place[2], place[1])


def index_shards(folder: Path, manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each image's bytes are, in shard order: (shard, first byte, length) (N, 3), and the labels (N,).

    Only the tar files' heads and the labels are read.

    Raises:
        DataError: a damaged archive, an example without image or label, a label out of range, or a count that is not
            the manifest's.
    """
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, (shard, path) in enumerate(zip(manifest.shards, manifest.paths(folder), strict=True)):
        with open(path, "rb") as heads, open(path, "rb") as file:
            files = ((name, (number, head.offset_data, head.size)) for _, head, name in members(path, heads))
            examples = pair(path, files, partial(_content, file))
        bad = [key for key, example in examples.items() if example.label_below(len(manifest.labels)) is None]
        if bad or len(examples) != shard.count:
            raise DataError(
                path,
                got=f"{len(examples)} examples" + (f", {bad[0]} without image or valid label" if bad else ""),
                expected=f"{shard.count} with a label below {len(manifest.labels)} each",
                cure="run the stage prepare again",
            )
        places += [example.image for example in examples.values() if example.image is not None]
        labels += [int(example.label) for example in examples.values() if example.label is not None]
    return np.array(places, np.int64).reshape(-1, 3), np.array(labels, np.int64)
