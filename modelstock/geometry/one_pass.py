"""The one pass over the files: inner products of the updates, and their projections on random directions.

A direction is made of random +1 and -1 on a D-th of the tensor, a stretch of every chunk, and of 0 elsewhere: so all D
projections of an update together cost one multiplication per value. Signs come from the tensor's name and the place of
the run, so they are the same at any number of workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from modelstock.merging.engine import FirstPass
from modelstock.merging.kernels import Chunk, Float, Updates
from modelstock.weights.tensors import CHUNK


@dataclass(frozen=True, kw_only=True)
class Pass(FirstPass):
    """A first pass that also projects: the first `seeds` updates, on `directions` per tensor, at most one per value."""

    seeds: int
    directions: int
    parts: dict[tuple[str, int], Float] = field(default_factory=dict)  # (tensor, start of the run) -> (seeds, D)

    def projections(self) -> Mapping[str, Float]:
        """Tensor -> projections (seeds, D); the runs' parts are added in their order."""
        sums: dict[str, Float] = {}
        for (name, _), part in sorted(self.parts.items()):
            sums[name] = sums[name] + part if name in sums else part
        return sums

    def _one(self, task: tuple[str, int, list[Chunk]]) -> Float:
        name, _, run = task
        count, origin = len(self.tuned), self.anchor.tensors[name]
        gram: Float = np.zeros((1, count, count))
        updates = Updates(origin, [weights.tensors[name] for weights in self.tuned])
        size = min(CHUNK, origin.size)
        directions = min(self.directions, origin.size)
        table = np.empty((count, size))
        projected = np.zeros((self.seeds, directions))
        random = np.random.default_rng([*name.encode(), run[0].start])
        signs = _signs(random, size) if directions else np.empty(0)
        for piece in run:
            base = updates.base(piece)
            flips = _signs(random, directions)  # the signs of a run's chunks are the same but for these
            for i in range(count):
                update = updates.update(i, piece, base, table[i, : len(base)])
                for j in range(i + 1):
                    gram[0, i, j] += np.einsum("k,k->", update, table[j, : len(base)])
                    gram[0, j, i] = gram[0, i, j]
                if directions and i < self.seeds:
                    with np.errstate(invalid="ignore"):  # the inner products show what is not finite
                        projected[i] += flips * _by_direction(update, signs, directions)
        if directions:
            self.parts[name, run[0].start] = projected
        return gram


def _signs(random: np.random.Generator, count: int) -> Float:
    """+1 and -1 at random (count,)."""
    bits = np.unpackbits(random.integers(0, 256, -(-count // 8), dtype=np.uint8), count=count)
    return np.where(bits, 1.0, -1.0)


def _by_direction(update: Float, signs: Float, directions: int) -> Float:
    """Sums (D,) of values times signs: D stretches of equal length, and what is left over, one value each."""
    width = len(update) // directions
    whole = width * directions
    sums = np.zeros(directions)
    if width:
        sums += np.einsum(
            "dk,dk->d", update[:whole].reshape(directions, width), signs[:whole].reshape(directions, width)
        )
    sums[: len(update) - whole] += update[whole:] * signs[whole : len(update)]
    return sums
