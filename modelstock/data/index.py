"""Which image or text and which label of a shard belong together: webdataset's rule, in one place.

An example is an image or a text, and a `.cls` file, of one key; a key is a member's path up to the first dot of its
name.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from modelstock.data.manifest import Manifest, Modality
from modelstock.data.tars import members
from modelstock.errors import DataError

# What an example's image may be called, and its text.
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXT = "txt"
Place = TypeVar("Place")


class Example(NamedTuple, Generic[Place]):
    """Where an example's image or text is, and what its label file says; None for what is missing."""

    content: Place | None
    label: str | None

    def label_below(self, count: int) -> int | None:
        """The label as a number from 0 to `count` - 1; None for one without content or without such a label."""
        if self.content is None or self.label is None or not (self.label.isascii() and self.label.isdigit()):
            return None
        return int(self.label) if int(self.label) < count else None


def pair(
    archive: Path, files: Iterable[tuple[str, Place]], read: Callable[[Place], bytes], modality: Modality = "image"
) -> dict[str, Example[Place]]:
    """Key -> example, in the order of its images or texts; `read` gives the content of a `.cls` file.

    A text beside an image is its caption, and not read.

    Raises:
        DataError: two images, texts or labels of one key, or an image where texts are wanted.
    """

    def refuse(got: str, expected: str) -> DataError:
        return DataError(archive, got=got, expected=expected, cure="make the shards again")

    def once(key: str, known: Mapping[str, object], what: str) -> None:
        if key in known:
            raise refuse(f"two {what} {key}", "one per example")

    contents: dict[str, Place] = {}
    labels: dict[str, str] = {}
    for path, place in files:
        folder, _, name = path.rpartition("/")
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if suffix == "cls":
            once(key, labels, "labels")
            labels[key] = read(place).decode(errors="replace").strip()
        elif modality == "text" and suffix.lower() in IMAGES:
            raise refuse(f"the image {path}", "texts alone")
        elif suffix.lower() in (IMAGES if modality == "image" else (TEXT,)):
            once(key, contents, f"{modality}s")
            contents[key] = place
    return {
        key: Example(contents.get(key), labels.get(key))
        for key in [*contents, *(k for k in labels if k not in contents)]
    }


def _content(file: BinaryIO, place: tuple[int, int, int]) -> bytes:
    return os.pread(file.fileno(), place[2], place[1])


def index_shards(folder: Path, manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each example's bytes are, in shard order: (shard, first byte, length) (N, 3), and the labels (N,).

    Only the tar files' heads and the labels are read.

    Raises:
        DataError: a damaged archive, an example without content or label, a label out of range, or a count that is not
            the manifest's.
    """
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, (shard, path) in enumerate(zip(manifest.shards, manifest.paths(folder), strict=True)):
        with open(path, "rb") as heads, open(path, "rb") as file:
            files = ((name, (number, head.offset_data, head.size)) for _, head, name in members(path, heads))
            examples = pair(path, files, partial(_content, file), manifest.modality)
        bad = [key for key, example in examples.items() if example.label_below(len(manifest.labels)) is None]
        if bad or len(examples) != shard.count:
            raise DataError(
                path,
                got=f"{len(examples)} examples"
                + (f", {bad[0]} without {manifest.modality} or valid label" if bad else ""),
                expected=f"{shard.count} with a label below {len(manifest.labels)} each",
                cure="run the stage prepare again",
            )
        places += [example.content for example in examples.values() if example.content is not None]
        labels += [int(example.label) for example in examples.values() if example.label is not None]
    return np.array(places, np.int64).reshape(-1, 3), np.array(labels, np.int64)
