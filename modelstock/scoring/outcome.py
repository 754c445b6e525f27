"""What one weight set, or one ensemble, predicts on the examples of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelstock.notices import remark
from modelstock.scoring.checked_arrays import read_checked, write_checked


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Predictions on the first n examples, in the shards' order: arrays of length n, as in `results.Scores`."""

    prediction: NDArray[np.int32]
    confidence: NDArray[np.float32]
    correct: NDArray[np.bool_]
    correct5: NDArray[np.bool_]
    nll: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.correct)

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        write_checked(path, {name: getattr(self, name) for name in COLUMNS}, {"of": _name(path)})

    @classmethod
    def load(cls, path: Path) -> "Outcome | None":
        """Read it back; None for a file that is not there, that is damaged, or that is of another name."""
        try:
            arrays, facts = read_checked(path, COLUMNS)
            if facts != {"of": _name(path)} or len({array.shape for array in arrays.values()}) > 1:
                raise ValueError(f"an outcome of {facts.get('of')}")
        except OSError:
            return None
        except ValueError as error:
            remark(path, f"not used, and scored again: {error}")
            return None
        return cls(**arrays)

    @classmethod
    def joined(cls, parts: Sequence["Outcome"]) -> "Outcome":
        """Outcomes on consecutive examples as one."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS})

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, groups: Sequence[Sequence[int]]) -> "Outcome":
        """The outcome of class logits (B, C) on labels (B,); see `label_logits`."""
        log_shares = label_logits(logits, groups).log_softmax(dim=1)
        best, prediction = log_shares.max(dim=1)
        true = log_shares.gather(1, labels[:, None])
        # Ties go to the lower label, as argmax has it.
        numbers = torch.arange(log_shares.shape[1], device=log_shares.device)
        ahead = (log_shares > true) | ((log_shares == true) & (numbers < labels[:, None]))
        columns = {
            "prediction": prediction.int(),
            "confidence": best.exp(),
            "correct": prediction == labels,
            "correct5": ahead.sum(dim=1) < 5,
            "nll": -true[:, 0],
        }
        return cls(**{name: column.cpu().numpy() for name, column in columns.items()})


def _name(path: Path) -> str:
    """What a file in the cache is of: data, code and outcome, as it lies in their folders."""
    return "/".join(path.parts[-3:])


COLUMNS = tuple(column.name for column in fields(Outcome))


def label_logits(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Class logits (B, C) -> label logits (B, L): the maximum over each label's classes."""
    if all(len(group) == 1 for group in groups):
        return logits[:, [group[0] for group in groups]]
    return torch.stack([logits[:, group].amax(dim=1) for group in groups], dim=1)
