"""Named tensors, on disk or in memory: how their values are stored, their identity, whether they are finite.

A tensor is a place that gives a slice of its values when asked, so a model need never be whole in memory. numpy alone.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modelstock.damage import cure_of
from modelstock.errors import DamagedError, WeightsError

Array = NDArray[Any]
# safetensors' names for dtypes -> how numpy holds the bytes; bfloat16 is the upper half of a float32.
STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in STORED.items() if name != "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")
CHUNK = 1 << 17  # values read at a time: few enough to stay in a core's cache


def widen(stored: Array, dtype: str, out: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Stored numbers of a floating dtype as float64, exactly; into `out` where it is given."""
    out = np.empty(stored.shape) if out is None else out
    np.copyto(out, (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else stored)
    return out


def narrow(values: NDArray[np.float64], dtype: str, out: Array | None = None) -> Array:
    """float64 as the stored form of a floating dtype, rounded to nearest, ties to even; into `out` where given.

    Raises:
        FloatingPointError: values beyond the dtype's range.
    """
    out = np.empty(values.shape, STORED[dtype]) if out is None else out
    with np.errstate(over="raise"):
        if dtype != "BF16":
            np.copyto(out, values, casting="same_kind")
            return out
        single = values.astype(np.float32)
    # float64 -> float32 would round twice; rounding to odd first keeps the second rounding right.
    bits = single.view(np.uint32)
    inexact = single.astype(np.float64) != values
    outward = np.abs(single.astype(np.float64)) > np.abs(values)
    bits = np.where(inexact, np.where(outward, bits - 1, bits) | 1, bits)
    np.copyto(out, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, casting="same_kind")
    if ((out & 0x7F80) == 0x7F80).any():
        raise FloatingPointError("overflow encountered in rounding to bfloat16")
    return out


def as_arrays(stored: Array, dtype: str) -> Array:
    """Stored numbers as numpy computes with them: bfloat16, which it does not know, as float32."""
    return widen(stored, dtype).astype(np.float32) if dtype == "BF16" else stored


class Reader(Protocol):
    """Reads values [start, stop) of a tensor in C order, (stop - start,), into `scratch` if that saves memory."""

    def __call__(self, start: int, stop: int, scratch: NDArray[np.uint8] | None = None) -> Array:
        """The stored values; they hold until `scratch` is used again."""


@dataclass(frozen=True)
class StoredTensor:
    """An array somewhere: `read` gives a slice of its stored values."""

    dtype: str
    shape: tuple[int, ...]
    read: Reader

    @property
    def size(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored values."""
        return self.size * STORED[self.dtype].itemsize

    def array(self) -> Array:
        """All values in their shape, as they are stored; bfloat16 as float32, which holds it exactly."""
        return as_arrays(self.read(0, self.size), self.dtype).reshape(self.shape)

    def values(self, start: int = 0, stop: int | None = None) -> Array:
        """Values [start, stop) in a dtype that numpy computes with: float64 for floating dtypes, else the stored."""
        stored = self.read(start, self.size if stop is None else stop)
        return widen(stored, self.dtype) if self.dtype in FLOATS else stored

    def pieces(self) -> Iterator[Array]:
        """The stored values, at most CHUNK at a time."""
        for start in range(0, self.size, CHUNK):
            yield self.read(start, min(start + CHUNK, self.size))

    def equals(self, other: "StoredTensor") -> bool:
        """Whether another tensor of the same shape holds the same values, NaN in the same places; dtypes may differ."""
        bounds = ((start, min(start + CHUNK, self.size)) for start in range(0, self.size, CHUNK))
        both_float = self.dtype in FLOATS and other.dtype in FLOATS
        return all(np.array_equal(self.values(*piece), other.values(*piece), equal_nan=both_float) for piece in bounds)

    def count_non_finite(self) -> int:
        """How many of the values are NaN or infinite."""
        if self.dtype == "BF16":
            return sum(int(((stored & 0x7F80) == 0x7F80).sum()) for stored in self.pieces())
        if self.dtype not in FLOATS:
            return 0
        return sum(stored.size - int(np.isfinite(stored).sum()) for stored in self.pieces())


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one model, and the metadata that its file carries.

    `checksum`: what was written with them (see `checksum_of`), None where nothing was. `taken_from`: where in its file
    they were, if not at the top: the entries and prefixes that were taken off their names.
    """

    tensors: Mapping[str, StoredTensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = "weights in memory"
    checksum: str | None = None
    taken_from: str = ""

    @cached_property
    def identity(self) -> str:
        """The sha256 of its tensors; see `identity_of`."""
        return identity_of(sorted(self.tensors.items()))

    def check_whole(self) -> None:
        """Compare tensors and metadata with the checksum that was written with them, where one was.

        Raises:
            DamagedError: they differ.
        """
        if self.checksum is not None and self.checksum != checksum_of(self.identity, self.meta):
            raise DamagedError(
                self.source,
                got=f"tensors {self.identity[:12]} or metadata that are not those it was written with",
                expected=f"checksum {self.checksum[:12]}",
                cure=cure_of(Path(self.source), "make it again, or copy it again"),
            )


def identity_of(tensors: Iterable[tuple[str, StoredTensor]]) -> str:
    """sha256 over tensors, given in the order of their names: name, dtype, shape, bytes. Metadata does not count.

    bfloat16 counts as the float32 that holds it: what is computed with is the same.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        dtype = STORED["F32" if tensor.dtype == "BF16" else tensor.dtype].str
        digest.update(f"{name}\0{dtype}\0{tensor.shape}\0".encode())
        for stored in tensor.pieces():
            digest.update(np.ascontiguousarray(as_arrays(stored, tensor.dtype)).data)
    return digest.hexdigest()


def checksum_of(identity: str, meta: Mapping[str, Any]) -> str:
    """sha256 over a weight set's identity and its metadata: what a file's own damage changes."""
    return hashlib.sha256(f"{identity}\0{dump_meta(meta)}".encode()).hexdigest()


def dump_meta(meta: Mapping[str, Any]) -> str:
    """A weight set's metadata as they stand in its file."""
    return json.dumps(dict(meta), sort_keys=True)


def check_finite(tensors: Iterable[tuple[str, StoredTensor]], source: str) -> None:
    """Raise WeightsError naming the first tensor of `source` that holds NaN or infinity."""
    for name, tensor in tensors:
        if count := tensor.count_non_finite():
            raise WeightsError(
                f"{source}, tensor {name}",
                got=f"{count} of {tensor.size} values NaN or infinite",
                expected="finite values",
                cure="use an earlier snapshot: a merge would spread it to the whole tensor",
            )


def reader_of(flat: Array) -> Reader:
    """Reads an array in memory, (n,), without a copy."""
    return lambda start, stop, scratch=None: flat[start:stop]


def stored_array(array: Array, place: str) -> StoredTensor:
    """An array in memory as a tensor, without a copy where it is contiguous; `place` names it in errors.

    Raises:
        WeightsError: a dtype that safetensors has no name for.
    """
    dtype = _NAMES.get(array.dtype.newbyteorder("<"))
    if dtype is None:
        raise WeightsError(place, got=f"dtype {array.dtype}", expected=", ".join(STORED), cure="convert it")
    flat = np.asarray(array, STORED[dtype], order="C").reshape(-1)
    return StoredTensor(dtype, array.shape, reader_of(flat))


def in_memory(tensors: Mapping[str, Array], meta: Mapping[str, Any], source: str) -> Checkpoint:
    """Arrays as a checkpoint."""
    stored = {name: stored_array(array, f"{source}, tensor {name}") for name, array in tensors.items()}
    return Checkpoint(stored, meta, source)
