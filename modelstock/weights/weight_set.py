"""Weight sets: one safetensors file that says what it is.

A weight set holds the image tower (`visual.*`, open_clip names) and the classification head
(`head.weight` (C, D), `head.bias` (C,)); its metadata key `modelstock` is sorted JSON.
Nothing here knows CLIP: any mapping of names to arrays is a weight set.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from modelstock.errors import WeightsError
from modelstock.weights.checkpoints import open_safetensors
from modelstock.weights.format import write_arrays
from modelstock.weights.tensors import Array, Checkpoint, StoredTensor, check_finite, identity_of, stored_array


@dataclass(frozen=True)
class WeightSet:
    """Named tensors, and the metadata that says what they are.

    `tensors`: name -> array. `meta`: architecture, preprocess, classes, classes_sha256, parents (identities), made_by
    (see modelstock.weights.origin); every value is JSON. `source` names the file for messages.
    """

    tensors: Mapping[str, Array]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = "weights in memory"
    checked_identity: str | None = field(default=None, compare=False, repr=False)  # computed while it was read

    @cached_property
    def identity(self) -> str:
        """The sha256 of its tensors, of whatever metadata; see `identity_of`."""
        return self.checked_identity or identity_of(self._stored())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        if isinstance(self.tensors, LazyArrays):
            return self.tensors.nbytes
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def shaped(self) -> Mapping[str, Array | StoredTensor]:
        """Its tensors by name, to ask for their shapes: nothing is read."""
        return self.tensors.stored if isinstance(self.tensors, LazyArrays) else self.tensors

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all; equal weight sets give equal bytes.

        A checksum of tensors and metadata is written with them, and compared when they are read.

        Raises:
            WeightsError: a tensor holds NaN or infinity.
        """
        self.check_finite()
        write_arrays(path, self.tensors, self.meta)

    def check_finite(self) -> None:
        """Raise WeightsError naming the first tensor that holds NaN or infinity."""
        check_finite(self._stored(), self.source)

    def _stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors by name, each made when it is its turn."""
        for name in sorted(self.tensors):
            yield name, stored_array(self.tensors[name], f"{self.source}, tensor {name}")


class LazyArrays(Mapping[str, Array]):
    """A checkpoint's tensors as arrays, each read when it is asked for and not kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.stored = {name: checkpoint.tensors[name] for name in sorted(checkpoint.tensors)}

    def __getitem__(self, name: str) -> Array:
        return self.stored[name].array()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.stored.values())


def classes_sha256(names: Sequence[str]) -> str:
    """The identity of an ordered list of class names."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def load_weights(path: Path, *, lazy: bool = False) -> WeightSet:
    """Read a weight set, or any safetensors file (its `meta` is then empty); bfloat16 becomes float32.

    `lazy`: tensors are checked now, one at a time, and read again whenever they are asked for.

    Raises:
        WeightsError: the file is missing, is not safetensors, is truncated, or holds NaN or infinity.
        DamagedError: tensors or metadata are not those that the file was written with.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            path,
            got="no such file",
            expected="a .safetensors file",
            cure="check the path, or run the stage that makes it",
        )
    # A process may use as many lazily as there are subsets to compare, more than it may have files open.
    checkpoint = open_safetensors(path, keep_open=not lazy)
    checkpoint.check_whole()
    arrays = LazyArrays(checkpoint)
    identity = checkpoint.identity if checkpoint.checksum else None
    weights = WeightSet(arrays if lazy else dict(arrays), checkpoint.meta, str(path), identity)
    weights.check_finite()
    return weights
