"""A folder of shards, opened and verified once per process, and passed on as an object."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modelstock.data.examples import InMemory, InShards, TextsInMemory, TextsInShards
from modelstock.data.manifest import FILE_NAME, Manifest, Modality, read_manifest, verify_shards
from modelstock.errors import DataError, WeightsError
from modelstock.notices import notice
from modelstock.weights.weight_set import WeightSet, classes_sha256


@dataclass(frozen=True)
class Dataset:
    """A split: its folder, its verified manifest, and its images or texts by row in the shards' order."""

    folder: Path
    manifest: Manifest

    @property
    def modality(self) -> Modality:
        """What the examples are: image or text."""
        return self.manifest.modality

    @cached_property
    def images(self) -> InShards:
        """The images, read from the shards whenever they are asked for.

        Raises:
            DataError: the examples are texts.
        """
        self._check("image")
        return InShards(self.folder, self.manifest)

    @cached_property
    def texts(self) -> TextsInShards:
        """The texts, read from the shards whenever they are asked for.

        Raises:
            DataError: the examples are images.
        """
        self._check("text")
        return TextsInShards(self.folder, self.manifest)

    def _check(self, wanted: Modality) -> None:
        if self.modality != wanted:
            raise DataError(
                self.folder, got=f"{self.modality}s", expected=f"{wanted}s", cure=f"name a data set of {wanted}s"
            )

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (N,): places in `manifest.labels`."""
        return self.texts.labels if self.modality == "text" else self.images.labels

    def decoded(self, row: int) -> Image.Image | str:
        """An image in RGB without its border, or a text.

        Raises:
            DataError: it does not decode.
        """
        return self.texts.text(row) if self.modality == "text" else self.images.cut(row)

    def examples(self, *, in_memory: bool) -> Any:
        """`Examples` or `Texts` with their labels, for training: decoded once, or read whenever they are asked for.

        Raises:
            DataError: images of several sizes, which cannot be kept in memory, or an example that does not decode.
        """
        if self.modality == "text":
            texts = self.texts
            rows = range(len(texts.labels))
            return TextsInMemory([texts.text(row) for row in rows], texts.labels) if in_memory else texts
        return InMemory(*read_all(self)) if in_memory else self.images

    def check_modality(self, weights: WeightSet) -> None:
        """Raise WeightsError unless a weight set's tower takes what this split holds."""
        taken = (weights.meta.get("preprocess") or {}).get("modality", "image")
        if taken != self.modality:
            raise WeightsError(
                weights.source,
                got=f"a tower for {taken}s",
                expected=f"one for the {self.modality}s of {self.folder}",
                cure=f"evaluate it on a benchmark of {taken}s, or name weights with a tower for {self.modality}s",
            )

    def check_classes(self, weights: WeightSet) -> None:
        """Raise WeightsError unless a weight set's head has the classes that this split's label groups point to."""
        expected, classes = classes_sha256(self.manifest.classes), weights.meta.get("classes_sha256")
        if classes != expected:
            raise WeightsError(
                weights.source,
                got=f"a head for classes {str(classes)[:12]}",
                expected=f"the {len(self.manifest.classes)} classes {expected[:12]} of {self.folder}",
                cure="evaluate it on data of its own classes",
            )

    def check_labels(self) -> None:
        """Raise DataError unless the labels are the head's classes in their order, as training and statistics need."""
        groups = self.manifest.label_groups
        if groups != [[i] for i in range(len(self.manifest.classes))]:
            raise DataError(
                self.folder,
                got=f"{len(groups)} labels that are not the {len(self.manifest.classes)} classes in their order",
                expected="one class per label, all of them",
                cure="use a training set of all classes, or its held-out split",
            )


def open_dataset(folder: Path) -> Dataset:
    """The split in `folder`; its shards are hashed when it is first opened, and again only if one was replaced.

    Raises:
        DataError: no manifest, a bad one, or a shard that is missing or does not have its sha256.
    """
    folder = Path(folder)
    files = [folder / FILE_NAME, *read_manifest(folder).paths(folder)]
    return _opened(folder, tuple(_stamp(file) for file in files))


def open_benchmarks(folders: Sequence[Path]) -> list[Dataset]:
    """The splits that are scored together; results go by their names.

    Raises:
        DataError: as `open_dataset`; two of one name. The same examples under two names are a notice.
    """
    datasets = [open_dataset(folder) for folder in folders]
    names: dict[str, Dataset] = {}
    shards: dict[tuple[str, ...], Dataset] = {}
    for dataset in datasets:
        name, content = dataset.manifest.benchmark, tuple(shard.sha256 for shard in dataset.manifest.shards)
        if name in names:
            raise DataError(
                dataset.folder,
                got=f"a benchmark named {name}, as {names[name].folder} is",
                expected="a name of its own for each",
                cure="prepare one of them with another --name, and name each folder once",
            )
        if content in shards:
            notice(name, f"the same {dataset.modality}s as {shards[content].manifest.benchmark}")
        names[name], shards[content] = dataset, dataset
    return datasets


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What tells a file from one that has replaced it; None for none."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


@lru_cache(maxsize=64)
def _opened(folder: Path, stamps: tuple[tuple[int, int, int] | None, ...]) -> Dataset:
    manifest = read_manifest(folder)
    verify_shards(folder, manifest)
    return Dataset(folder, manifest)


def read_all(dataset: Dataset) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Every image (N, H, W, 3) and label (N,) of a small split whose images are of one size, in the shards' order.

    Raises:
        DataError: images of several sizes, or one that does not decode.
    """
    images = dataset.images
    height, width = images.size(0)
    pixels = np.empty((len(images.labels), height, width, 3), np.uint8)
    for row in range(len(pixels)):
        image = images.image(row)
        if image.shape != pixels.shape[1:]:
            raise DataError(
                f"{dataset.folder}, example {row}",
                got=f"an image of {image.shape[1]}x{image.shape[0]} pixels after others of {width}x{height}",
                expected="images of one size, to keep them in memory",
                cure="set loading.in_memory: false",
            )
        pixels[row] = image
    return pixels, images.labels
