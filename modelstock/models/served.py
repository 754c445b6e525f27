"""What MLflow loads a logged model by: examples in, labels with their probabilities out. Knows no MLflow."""

import json
from pathlib import Path
from typing import Any

from modelstock.models.classify import ImageClassifier, TextClassifier, classifier_of
from modelstock.weights.weight_set import load_weights

DESCRIPTION = "classifier.json"  # which file has the weights, and the precision of the tower


class Served:
    """A classifier behind MLflow's interface."""

    def __init__(self, classifier: ImageClassifier | TextClassifier) -> None:
        self._classifier = classifier

    def predict(self, model_input: Any, params: Any = None) -> Any:
        """A table with a row per example: `label`, `probability`, and `probabilities` by label.

        `model_input`: a sequence of texts, or of pictures (see `image_of`), or a table whose only column they are.
        """
        import pandas

        is_table = isinstance(model_input, pandas.DataFrame)
        examples = list(model_input.iloc[:, 0] if is_table else model_input)
        shares, labels = self._classifier.probabilities(examples), self._classifier.labels
        best = shares.argmax(axis=1)
        return pandas.DataFrame(
            {
                "label": [labels[place] for place in best],
                "probability": [float(row[place]) for row, place in zip(shares, best, strict=True)],
                "probabilities": [dict(zip(labels, row.tolist(), strict=True)) for row in shares],
            }
        )


def _load_pyfunc(path: str) -> Served:
    """The model of a logged model's folder `data/classifier`, the weights being at its top; the name is MLflow's."""
    description = json.loads((Path(path) / DESCRIPTION).read_text(encoding="utf-8"))
    weights = load_weights(Path(path).parents[1] / description["weights"])
    return Served(classifier_of(weights, precision=description["precision"]))
