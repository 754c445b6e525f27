"""A merge that was checked and can be carried out, piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.errors import MergeError
from modelstock.merging.kernels import Array, Chunk, Float, Updates, blended, chunks, runs
from modelstock.merging.methods.table import METHODS
from modelstock.weights.tensors import FLOATS, STORED, Checkpoint, StoredTensor, narrow, widen


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that was checked and can be carried out: every refusal happens before this exists.

    `coefficients`: tensor -> (rows, N), the scale included, for methods in the span of the updates; `report`:
    tensor -> JSON facts; `tuned`, `statistics`: in the order used; `chosen`: the tensors that the method merges.
    BatchNorm's running statistics have coefficients without being chosen. `copied`: what is not the anchor's among the
    tensors that are copied; all others are.
    """

    method: str
    options: Mapping[str, Any]
    anchor: Checkpoint
    tuned: tuple[Checkpoint, ...]
    coefficients: Mapping[str, Float]
    report: Mapping[str, Mapping[str, Any]]
    chosen: frozenset[str]
    statistics: tuple[Checkpoint, ...] = ()
    copied: Mapping[str, StoredTensor] = field(default_factory=dict)
    dtype: str | None = None  # of the merged floating tensors; None keeps each one's own

    def dtype_of(self, name: str) -> str:
        """The stored dtype of a tensor of the result."""
        return result_dtype(self.anchor.tensors[name].dtype, self.dtype)

    def takes_whole(self, name: str) -> bool:
        """Whether a tensor cannot be done in parts, as the method looks at all its values."""
        return name in self.chosen and name not in self.coefficients

    def runs(self, name: str) -> list[list[Chunk]]:
        """What can be done side by side of a tensor; methods that look at single values take it whole."""
        size = self.anchor.tensors[name].size
        if self.takes_whole(name):
            return [[Chunk(0, 1, 0, size)]]
        return list(runs(size, len(self.coefficients[name]) if name in self.coefficients else 1))

    def pieces(self, name: str, run: Sequence[Chunk]) -> Iterator[tuple[int, Array]]:
        """The merged tensor's stored values in consecutive pieces, with where each starts; good until the next one.

        Raises:
            MergeError: values beyond the range of the result's dtype.
        """
        try:
            yield from self._pieces(name, run)
        except FloatingPointError as error:
            raise MergeError(
                f"tensor {name}",
                got=f"merged values beyond {self.dtype_of(name)}",
                expected="values that fit",
                cure="use --dtype float32, or a smaller scale",
            ) from error

    def _pieces(self, name: str, run: Sequence[Chunk]) -> Iterator[tuple[int, Array]]:
        origin, dtype = self.anchor.tensors[name], self.dtype_of(name)
        others = [w.tensors[name] for w in self.tuned if name in w.tensors]  # what is copied need not be in all
        if name in self.coefficients:
            yield from blended(origin, others, run, self.coefficients[name], dtype, of=METHODS[self.method].of)
        elif name not in self.chosen:
            source = self.copied.get(name, origin)
            for piece in run:
                kept = source.read(piece.start, piece.stop)
                yield piece.start, kept if dtype == source.dtype else narrow(widen(kept, source.dtype), dtype)
        elif origin.size:
            update = self._by_values(name, origin, others).reshape(-1)
            for piece in chunks(origin.size, 1):
                merged = origin.values(piece.start, piece.stop)
                merged += self.options["scale"] * update[piece.start : piece.stop]
                yield piece.start, narrow(merged, dtype)

    def _by_values(self, name: str, origin: StoredTensor, others: Sequence[StoredTensor]) -> Float:
        """The update of a whole tensor, by a method that looks at single values."""
        row, read = METHODS[self.method], Updates(origin, others)
        updates = np.empty((len(others), origin.size))
        for piece in chunks(origin.size, 1):
            base = read.base(piece)
            for i, values in enumerate(updates):
                read.update(i, piece, base, values[piece.start : piece.stop])
        given: list[Any] | None
        if row.needs:
            known = [s.tensors.get(name) for s in self.statistics]
            given = [s.values().reshape(s.shape) for s in known if s is not None] or None
        else:
            key = np.frombuffer(name.encode(), np.uint8)
            given = [np.random.default_rng([*key, i]) for i in range(len(updates))]
        own = {k: v for k, v in self.options.items() if k != "scale"}
        update: Float = row.function(updates.reshape(len(others), *origin.shape), given, **own)
        return update

    def tensor(self, name: str) -> Array:
        """A tensor of the result in memory, bfloat16 as float32, which holds it exactly."""
        origin, dtype = self.anchor.tensors[name], self.dtype_of(name)
        merged = np.empty(origin.size, np.float32 if dtype == "BF16" else STORED[dtype])
        for run in self.runs(name):
            for start, piece in self.pieces(name, run):
                merged[start : start + piece.size] = widen(piece, dtype) if dtype == "BF16" else piece
        return merged.reshape(origin.shape)

    def as_checkpoint(self) -> Checkpoint:
        """The result as a checkpoint whose values are computed when they are read: one row of coefficients a tensor."""

        def entry(name: str) -> StoredTensor:
            dtype = self.dtype_of(name)

            def read(start: int, stop: int, scratch: NDArray[np.uint8] | None = None) -> Array:
                values = np.empty(stop - start, STORED[dtype])
                for chunk in chunks(stop - start, 1):
                    moved = Chunk(0, 1, start + chunk.start, start + chunk.stop)
                    for at, piece in self.pieces(name, [moved]):
                        values[at - start : at - start + piece.size] = piece
                return values

            return StoredTensor(dtype, self.anchor.tensors[name].shape, read)

        return Checkpoint({name: entry(name) for name in self.anchor.tensors})

    def tensors(self) -> dict[str, Array]:
        """The result in memory."""
        return {name: self.tensor(name) for name in self.anchor.tensors}


def result_dtype(own: str, asked: str | None) -> str:
    """The dtype of a merged tensor: integers keep theirs."""
    return asked or own if own in FLOATS else own
