"""A folder of shards, opened and verified once per process, and passed on as an object."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelstock.data.images import InShards
from modelstock.data.shards import Manifest, check_classes, load_manifest
from modelstock.weights.weight_set import WeightSet


@dataclass(frozen=True)
class Dataset:
    """A split: its folder, its verified manifest, and its images by row in the shards' order."""

    folder: Path
    manifest: Manifest

    @cached_property
    def images(self) -> InShards:
        """The images, read from the shards whenever they are asked for."""
        return InShards(self.folder, self.manifest)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (N,): places in `manifest.labels`."""
        return self.images.labels

    def check_classes(self, weights: WeightSet) -> None:
        """Raise WeightsError unless a weight set's head has this split's classes."""
        check_classes(weights, self.manifest, self.folder)


def open_dataset(folder: Path) -> Dataset:
    """The split in `folder`; its shards are hashed when it is first opened, and again only if one was replaced.

    Raises:
        DataError: no manifest, a bad one, or a shard that is missing or does not have its sha256.
    """
    manifest = folder / "manifest.json"
    files = [manifest, *sorted(folder.glob("*.tar"))] if manifest.is_file() else []
    stamps = tuple((facts.st_ino, facts.st_size, facts.st_mtime_ns) for facts in (file.stat() for file in files))
    return _opened(Path(folder), stamps)


@lru_cache(maxsize=64)
def _opened(folder: Path, stamps: tuple[tuple[int, int, int], ...]) -> Dataset:
    return Dataset(folder, load_manifest(folder))
