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
    """A tensor's updates, one chunk of one checkpoint at a time, in float64 and in memory that is used again."""

    def __init__(self, origin: StoredTensor, tuned: Sequence[StoredTensor], *, of: str = "updates") -> None:
        self.origin, self.tuned, self.of = origin, tuned, of
        # Fresh pages for every chunk would cost as much as the sums.
        size = min(CHUNK, origin.size)
        self._stored = np.empty(8 * size, np.uint8)
        self._base, self._update = np.empty(size), np.empty(size)

    def base(self, piece: Chunk) -> Float:
        """The anchor's values w0 (n,), zero for methods on weights; until the next chunk's."""
        base = self._base[: piece.stop - piece.start]
        if self.of == "weights":
            base.fill(0)
        else:
            widen(self.origin.read(piece.start, piece.stop, self._stored), self.origin.dtype, base)
        return base

    def update(self, number: int, piece: Chunk, base: Float, out: Float | None = None) -> Float:
        """v_i (n,) of checkpoint `number`, into `out` if given; else free to be written to, until the next call."""
        update, tensor = self._update[: len(base)] if out is None else out, self.tuned[number]
        widen(tensor.read(piece.start, piece.stop, self._stored), tensor.dtype, update)
        with np.errstate(invalid="ignore"):  # infinity minus itself: what becomes of it is the caller's to say
            np.subtract(update, base, out=update)
        return update


def inner_products(
    origin: StoredTensor,
    tuned: Sequence[StoredTensor],
    run: Sequence[Chunk],
    *,
    of: str = "updates",
    pairs: bool = True,
) -> Float:
    """Inner products (rows of the run, N, N) of the updates; each is a sum of its own, so no order of them matters.

    Without `pairs`, whose number grows with N^2, those of two different updates are all set to their mean, which
    follows from the norm of the updates' sum.
    """
    count = len(tuned)
    if not run:
        return np.zeros((0, count, count))
    updates = Updates(origin, tuned, of=of)
    gram = np.zeros((run[-1].last - run[0].first, count, count))
    table = np.empty((count if pairs else 1, min(CHUNK, origin.size)))
    for piece in run:
        base = updates.base(piece)
        own = gram[piece.first - run[0].first : piece.last - run[0].first]
        by_row = table[:, : len(base)].reshape(len(table), len(own), -1)
        if pairs:
            for i in range(count):
                updates.update(i, piece, base, table[i, : len(base)])
                for j in range(i + 1):
                    own[:, i, j] += _dot(by_row[i], by_row[j])
                    own[:, j, i] = own[:, i, j]
        else:
            total = by_row[0]
            total.fill(0)
            squares = np.empty((len(own), count))
            for i in range(count):
                update = updates.update(i, piece, base).reshape(total.shape)
                squares[:, i] = _dot(update, update)
                total += update
            shared = (_dot(total, total) - squares.sum(axis=1)) / (count * (count - 1))
            own += np.where(np.eye(count, dtype=bool), squares[:, None, :], shared[:, None, None])
    return gram


def _dot(first: Float, second: Float) -> Float:
    """Inner products (rows,) of rows (rows, n)."""
    # einsum rather than BLAS, whose sums depend on its threads and on the processor.
    return np.asarray(np.einsum("rk,rk->r", first, second))


def blended(
    origin: StoredTensor,
    tuned: Sequence[StoredTensor],
    run: Sequence[Chunk],
    shares: Float,
    dtype: str,
    *,
    of: str = "updates",
) -> Iterator[tuple[int, Array]]:
    """w0 + sum_i c_i v_i of a run of chunks, `shares` (rows, N): (start, stored values), good until the next one.

    Checkpoints without a share are not read, unless none has one.
    """
    updates, size = Updates(origin, tuned, of=of), min(CHUNK, origin.size)
    result, out = np.empty(size), np.empty(size, STORED[dtype])
    used = np.flatnonzero(shares.any(axis=0)).tolist() or range(len(tuned))
    for piece in run:
        base = updates.base(piece)
        merged = result[: len(base)]
        np.copyto(merged, base)
        own = shares[piece.first : piece.last]
        for i in used:
            update = updates.update(i, piece, base).reshape(len(own), -1)
            update *= own[:, i, None]
            merged += update.reshape(-1)
        yield piece.start, narrow(merged, dtype, out[: len(merged)])
