"""Results per example: what every scored weight set predicts on every example, so that any statistic can be redone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from modelstock.errors import DataError
from modelstock.files import atomic_path

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
    """Results on one benchmark. `role`: "held-out", "in-distribution" or "shift"; arrays are (rows, examples).

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
        **({"notices": list(scores.notices)} if scores.notices else {}),
    }
    arrays = {name: getattr(scores, name) for name in ARRAYS}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(arrays, metadata={"modelstock": json.dumps(facts, sort_keys=True)}))


def load_scores(path: Path) -> Scores:
    """Read results per example.

    Raises:
        DataError: the file is missing or is not one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["modelstock"])
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            path,
            got=f"{type(error).__name__}: {error}",
            expected="results per example",
            cure="run the stage evaluate",
        ) from error
    rows = tuple(Row(**{**row, "members": tuple(row["members"])}) for row in facts["rows"])
    named = {name: facts[name] for name in ("benchmark", "role", "data")}
    labels, notices = tuple(facts["labels"]), tuple(facts.get("notices", ()))
    return Scores(**named, rows=rows, labels=labels, **arrays, notices=notices)
