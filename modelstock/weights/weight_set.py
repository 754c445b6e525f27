"""Weight sets: one safetensors file that says what it is.

A weight set holds the image tower (`visual.*`, open_clip names) and the classification head
(`head.weight` (C, D), `head.bias` (C,)), and one metadata key `modelstock` with sorted JSON.
Nothing here knows CLIP: any mapping of names to arrays is a weight set.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from modelstock.errors import WeightsError
from modelstock.files import atomic_path
from modelstock.weights.tensors import StoredTensor, check_finite, identity_of, stored_array

Array = NDArray[Any]


@dataclass(frozen=True)
class WeightSet:
    """Named tensors and what is known of them.

    `tensors`: name -> array. `meta`: architecture, preprocess, classes_sha256, parents (identities),
    made_by (stage, method, options, seed, version); every value is JSON. `source` names the file for messages.
    """

    tensors: Mapping[str, Array]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = "weights in memory"

    @cached_property
    def identity(self) -> str:
        """The sha256 of its tensors, of whatever metadata; see `identity_of`."""
        return identity_of(self._stored())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        held = self.tensors
        return held.nbytes if isinstance(held, _Lazy) else sum(tensor.nbytes for tensor in held.values())

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all; equal weight sets give equal bytes.

        Raises:
            WeightsError: a tensor holds NaN or infinity.
        """
        self.check_finite()
        tensors = {name: np.asarray(self.tensors[name], order="C") for name in sorted(self.tensors)}
        # One key only: safetensors writes two or more in random order.
        blob = save(tensors, metadata={"modelstock": json.dumps(dict(self.meta), sort_keys=True)})
        with atomic_path(path) as temporary:
            temporary.write_bytes(blob)

    def check_finite(self) -> None:
        """Raise WeightsError naming the first tensor that holds NaN or infinity."""
        check_finite(self._stored(), self.source)

    def _stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors by name, each made when it is its turn."""
        for name in sorted(self.tensors):
            yield name, stored_array(self.tensors[name], f"{self.source}, tensor {name}")


class _Lazy(Mapping[str, Array]):
    """A safetensors file's tensors, each read when it is asked for and not kept."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="numpy")  # maps the file; nothing is read yet
        self._names = sorted(self._file.keys())  # type: ignore[no-untyped-call]
        self.nbytes = path.stat().st_size  # with a header of some KB

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        tensor: Array = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def classes_sha256(names: Sequence[str]) -> str:
    """The identity of an ordered list of class names."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def load_weights(path: Path, *, lazy: bool = False) -> WeightSet:
    """Read a weight set, or any safetensors file (its `meta` is then empty).

    `lazy`: tensors are checked now, one at a time, and read again whenever they are asked for.

    Raises:
        WeightsError: the file is missing, is not safetensors, is truncated, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            path,
            got="no such file",
            expected="a .safetensors file",
            cure="check the path, or run the stage that makes it",
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {} if lazy else {name: file.get_tensor(name) for name in sorted(file.keys())}
        held: Mapping[str, Array] = _Lazy(path) if lazy else tensors
        weights = WeightSet(held, json.loads(header.get("modelstock", "{}")), str(path))
        weights.check_finite()
    except (SafetensorError, ValueError, TypeError) as error:
        raise WeightsError(
            path,
            got=f"{path.stat().st_size} bytes that do not parse ({error})",
            expected="a whole safetensors file",
            cure="make or copy the file again",
        ) from error
    return weights
