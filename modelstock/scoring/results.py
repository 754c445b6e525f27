"""Results per example: what every scored weight set predicts on every example, so that any statistic can be redone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.damage import cure_of
from modelstock.errors import DataError
from modelstock.scoring.checked_arrays import read_checked, write_checked

ARRAYS = ("truth", "correct", "correct5", "prediction", "confidence", "nll")


@dataclass(frozen=True)
class Row:
    """One scored weight set, or a logit ensemble of several.

    `name` is unique ("anchor", "seed-0", "uniform/0-1"); `kind` is "anchor", "seed", "ensemble" or a merge method;
    `members` are the seeds it is made of.
    """

    name: str
    identity: str
    kind: str
    members: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """Results on one benchmark. `role`: as the data's manifest has it; arrays are (rows, examples).

    A label is a class or several classes of the head; the softmax is over the labels. `labels`: the labels' names.
    `notices`: what is unusual about the data and the weight sets; see modelstock.notices.
    """

    benchmark: str
    role: str
    data: str  # sha256 of the data
    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    truth: NDArray[np.int32]  # (examples,): places in `labels`
    correct: NDArray[np.bool_]
    correct5: NDArray[np.bool_]  # the truth is among the five most probable labels
    prediction: NDArray[np.int32]
    confidence: NDArray[np.float32]  # softmax of the prediction
    nll: NDArray[np.float32]  # minus the logarithm of the truth's softmax, in nats
    notices: tuple[str, ...] = ()
    precision: str = "float32"  # of the towers
    modality: str = "image"  # of the examples


def save_scores(path: Path, scores: Scores) -> None:
    """Write results per example: tensors (rows, n), and rows, role and data in the metadata; the bytes repeat."""
    facts: dict[str, Any] = {
        "benchmark": scores.benchmark,
        "role": scores.role,
        "data": scores.data,
        "labels": list(scores.labels),
        "rows": [
            {
                "name": row.name,
                "identity": row.identity,
                "kind": row.kind,
                "members": list(row.members),
                "options": dict(row.options),
            }
            for row in scores.rows
        ],
        "precision": scores.precision,
        **({"notices": list(scores.notices)} if scores.notices else {}),
        **({"modality": scores.modality} if scores.modality != "image" else {}),
    }
    write_checked(path, {name: getattr(scores, name) for name in ARRAYS}, facts)


def load_scores(path: Path) -> Scores:
    """Read results per example.

    Raises:
        DataError: the file is missing, is not one, was changed after it was written, or contradicts itself.
    """
    try:
        arrays, facts = read_checked(path, ARRAYS)
        rows = tuple(Row(**{**row, "members": tuple(row["members"])}) for row in facts["rows"])
        named = {name: facts[name] for name in ("benchmark", "role", "data", "precision")}
        named["modality"] = facts.get("modality", "image")
        labels, notices = tuple(facts["labels"]), tuple(facts.get("notices", ()))
        scores = Scores(**named, rows=rows, labels=labels, notices=notices, **arrays)  # type: ignore[arg-type]
        got = contradiction(scores)
    except (OSError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
    if got:
        cure = "run the stage evaluate" if not path.exists() else cure_of(path, "make it again with the stage evaluate")
        raise DataError(path, got=got, expected="results per example, as they were written", cure=cure)
    return scores


def contradiction(scores: Scores) -> str | None:
    """What cannot be true of results, if anything. NaN is left to the comparison, which names the row."""
    shape = (len(scores.rows), scores.truth.size)
    for name in ARRAYS[1:]:
        if getattr(scores, name).shape != shape:
            return f"{name} of shape {getattr(scores, name).shape} for {shape[0]} rows and {shape[1]} examples"
    names = [row.name for row in scores.rows]
    if len(set(names)) < len(names):
        return f"the row {next(name for name in names if names.count(name) > 1)} twice"
    for name in ("truth", "prediction"):
        if ((getattr(scores, name) < 0) | (getattr(scores, name) >= len(scores.labels))).any():
            return f"{name} beyond the {len(scores.labels)} labels"
    if (scores.correct != (scores.prediction == scores.truth)).any():
        return "correct that is not where the prediction is the truth"
    if ((scores.confidence < 0) | (scores.confidence > 1 + 1e-6)).any():  # the rounding of a softmax
        return "confidence beyond 0 to 1"
    return "nll below 0" if (scores.nll < 0).any() else None
