"""The two sums that every merge is made of: inner products of updates, and coefficients times updates.

Work is cut into chunks, and chunks into runs for the workers, whose bounds depend on shapes alone and whose sums are
added in one order: so the result is the same to the last bit at any number of workers, on disk and in memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelstock.weights.tensors import CHUNK, STORED, StoredTensor, narrow, widen

Float = NDArray[np.float64]
Array = NDArray[Any]
RUN = 1 << 22  # values a worker takes at a time: few enough to share a large tensor among cores


class Chunk(NamedTuple):
    """Values [start, stop) of a tensor in C order: whole rows [first, last), or a part of the row `first`."""

    first: int
    last: int
    start: int
    stop: int


def chunks(size: int, rows: int) -> Iterator[Chunk]:
    """A tensor of equally long rows in chunks of at most CHUNK values: several short rows, or parts of a long one."""
    width = size // rows if rows else 0
    if 0 < width <= CHUNK:
        step = CHUNK // width
        for row in range(0, rows, step):
            last = min(row + step, rows)
            yield Chunk(row, last, row * width, last * width)
    elif width:
        for row in range(rows):
            for start in range(row * width, (row + 1) * width, CHUNK):
                yield Chunk(row, row + 1, start, min(start + CHUNK, (row + 1) * width))


def runs(size: int, rows: int) -> Iterator[list[Chunk]]:
    """The chunks of a tensor in runs of at least RUN values: what one worker does in one go. At least one run."""
    run: list[Chunk] = []
    for chunk in chunks(size, rows):
        run.append(chunk)
        if chunk.stop - run[0].start >= RUN:
            yield run
            run = []
    if run or not size:
        yield run


class Updates:
    """The anchor's values and the updates of a tensor, chunk by chunk, in float64 and in memory that is used again."""

    def __init__(self, origin: StoredTensor, tuned: Sequence[StoredTensor], *, of: str = "updates") -> None:
        self.origin, self.tuned, self.of = origin, tuned, of
        # Fresh pages for every chunk would cost as much as the sums.
        size = min(CHUNK, origin.size)
        self._stored = np.empty(8 * size, np.uint8)
        self._base, self._updates = np.empty(size), np.empty((len(tuned), size))

    def __call__(self, piece: Chunk) -> tuple[Float, Float]:
        """w0 (n,), zero for methods on weights, and v_i (N, n); free to be written to, until the next call."""
        count = piece.stop - piece.start
        base, updates = self._base[:count], self._updates[:, :count]
        if self.of == "weights":
            base.fill(0)
        else:
            widen(self.origin.read(piece.start, piece.stop, self._stored), self.origin.dtype, base)
        for tensor, update in zip(self.tuned, updates, strict=True):
            widen(tensor.read(piece.start, piece.stop, self._stored), tensor.dtype, update)
            with np.errstate(invalid="ignore"):  # infinity minus itself: what becomes of it is the caller's to say
                np.subtract(update, base, out=update)
        return base, updates


def inner_products(
    origin: StoredTensor, tuned: Sequence[StoredTensor], run: Sequence[Chunk], *, of: str = "updates"
) -> Float:
    """Inner products (rows of the run, N, N) of the updates; each is a sum of its own, so no order of them matters."""
    if not run:
        return np.zeros((0, len(tuned), len(tuned)))
    updates = Updates(origin, tuned, of=of)
    gram = np.zeros((run[-1].last - run[0].first, len(tuned), len(tuned)))
    for piece in run:
        _, chunk = updates(piece)
        table = chunk.reshape(len(tuned), piece.last - piece.first, -1)
        rows = slice(piece.first - run[0].first, piece.last - run[0].first)
        for i in range(len(tuned)):
            for j in range(i + 1):
                # einsum rather than BLAS, whose sums depend on its threads and on the processor.
                gram[rows, i, j] += np.einsum("rk,rk->r", table[i], table[j])
                gram[rows, j, i] = gram[rows, i, j]
    return gram


def blended(
    origin: StoredTensor,
    tuned: Sequence[StoredTensor],
    run: Sequence[Chunk],
    shares: Float,
    dtype: str,
    *,
    of: str = "updates",
) -> Iterator[tuple[int, Array]]:
    """w0 + sum_i c_i v_i of a run of chunks, `shares` (rows, N): (start, stored values), good until the next one."""
    updates, out = Updates(origin, tuned, of=of), np.empty(min(CHUNK, origin.size), STORED[dtype])
    for piece in run:
        result, chunk = updates(piece)
        own = shares[piece.first : piece.last]
        for i, update in enumerate(chunk.reshape(len(tuned), len(own), -1)):
            update *= own[:, i, None]
            result += update.reshape(-1)
        yield piece.start, narrow(result, dtype, out[: len(result)])
