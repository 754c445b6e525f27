"""Training batches of texts: made into tokens once, in batches of like length, by (order seed, step) alone.

An epoch visits the examples in the order that batches of images have. Stretches of that order are sorted by length, and
the batches then shuffled, so that little is filled up and no step knows the length of the next. Nothing else is drawn.
"""

import zlib
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelstock.data.examples import Examples, Texts
from modelstock.data.preprocess import modality_of
from modelstock.data.tokens import Tokenization, Tokens
from modelstock.errors import DataError
from modelstock.notices import notice
from modelstock.training.batches import epoch_order
from modelstock.training.distributed import ALONE, World
from modelstock.training.loop import Batch

_STRETCH = 50  # batches that are sorted together, at most,
_PARTS = 4  # and at least so many stretches in an epoch: sorted as a whole, all epochs would have the same batches


class Tokenised:
    """Texts as tokens, by row, with labels (N,): 4 bytes a token, in memory however the texts were read.

    `lengths` (N,): tokens of each. `too_long` (N,): whether a text had more tokens than are taken.
    """

    def __init__(self, tokens: Iterable[Tokens], labels: NDArray[np.int64], too_long: NDArray[np.bool_]) -> None:
        rows = [row.astype(np.int32) for row in tokens]
        self.labels, self.too_long = labels, too_long
        self.lengths = np.array([len(row) for row in rows], np.int64)
        self._starts = np.concatenate([[0], self.lengths.cumsum()])
        self._tokens = np.concatenate([np.empty(0, np.int32), *rows])

    def tokens(self, row: int) -> Tokens:
        """A text's tokens (L,)."""
        return self._tokens[self._starts[row] : self._starts[row + 1]].astype(np.int64)

    def part(self, rows: NDArray[np.int64]) -> "Tokenised":
        """Some of the texts."""
        return Tokenised((self.tokens(int(row)) for row in rows), self.labels[rows], self.too_long[rows])


Framed = Examples | Tokenised  # as training reads examples


def tokenised(texts: Texts, preprocess: Mapping[str, Any]) -> Tokenised:
    """All texts as tokens.

    Raises:
        DataError: a text that gives no token at all, of which no tower makes a feature.
    """
    tokenization = Tokenization.of(preprocess)
    rows: list[Tokens] = []
    too_long = np.zeros(len(texts.labels), np.bool_)
    for number in range(len(texts.labels)):
        text = texts.text(number)
        rows.append(tokenization(text))
        if not len(rows[-1]):
            raise DataError(
                f"text {number}", got="no token", expected="one token or more", cure="leave it out of the data"
            )
        too_long[number] = len(rows[-1]) == tokenization.length and tokenization.is_too_long(text)
    return Tokenised(rows, texts.labels, too_long)


def framed(examples: Examples | Texts | Tokenised, preprocess: Mapping[str, Any]) -> Framed:
    """What is read again and again in training: texts as tokens, once and for all; images as they are."""
    if modality_of(preprocess) == "text" and not isinstance(examples, Tokenised):
        return tokenised(examples, preprocess)  # type: ignore[arg-type]  # of the modality that the caller checked
    return examples  # type: ignore[return-value]


def notice_too_long(examples: Framed, preprocess: Mapping[str, Any]) -> None:
    """A notice of how many training texts are not read to their end, if any."""
    if isinstance(examples, Tokenised) and (count := int(examples.too_long.sum())):
        notice(
            "pretrain.length",
            f"{count} of {len(examples.labels)} training texts have more than {preprocess['length']} tokens; "
            "the rest of them is not read",
        )


def length_batches(lengths: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The examples of every step of an epoch: (steps, batch_size), those of a step of like length (N,).

    Source: LengthGroupedSampler of the library transformers, which sorts stretches too.
    """
    steps = len(lengths) // batch_size
    order = epoch_order(len(lengths), seed=seed, epoch=epoch)[: steps * batch_size]
    stretch = batch_size * max(1, min(_STRETCH, steps // _PARTS))
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    rows = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    shuffled = np.random.default_rng([seed, epoch, zlib.crc32(b"batches")]).permutation(steps)
    batches: NDArray[np.int64] = rows.reshape(steps, batch_size)[shuffled]
    return batches


class TextBatches:
    """Per step: this process's share of (tokens (B, L), labels (B,)), filled up to the longest of the whole batch."""

    def __init__(
        self,
        examples: Tokenised,
        preprocess: Mapping[str, Any],
        *,
        batch_size: int,
        order_seed: int,
        world: World = ALONE,
    ) -> None:
        self._examples, self._tokenization = examples, Tokenization.of(preprocess)
        self._batch_size, self._order_seed = batch_size, order_seed
        self._share = slice(world.rank * batch_size // world.size, (world.rank + 1) * batch_size // world.size)
        # Where every text is filled up to one length, sorting would only make batches alike.
        self._lengths = examples.lengths if self._tokenization.padding == "longest" else 0 * examples.lengths
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def rows(self, step: int) -> NDArray[np.int64]:
        """The examples of a step's whole batch."""
        epoch, place = divmod(step, len(self._lengths) // self._batch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            batches = length_batches(self._lengths, batch_size=self._batch_size, seed=self._order_seed, epoch=epoch)
            self._epoch = epoch, batches
        rows: NDArray[np.int64] = self._epoch[1][place]
        return rows

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step."""
        rows = self.rows(step)
        tokens = self._tokenization.batch([self._examples.tokens(int(row)) for row in rows])
        return tokens[self._share], torch.from_numpy(self._examples.labels[rows[self._share]])

    def load(self, start: int, stop: int, *, workers: int, pin: bool) -> Generator[Batch, None, None]:
        """The batches of steps `start` to `stop`, as TrainingBatches gives them.

        A batch takes less time than handing it from one process to another: `workers` are not used.
        """
        for step in range(start, stop):
            tokens, labels = self[step]
            yield (tokens.pin_memory(), labels.pin_memory()) if pin else (tokens, labels)
