"""One pass over the data says of each weight set what scoring it alone says, to the last example."""

import numpy as np
import pytest
import torch
from conftest import make_split

import modelstock.evaluation as evaluation
from modelstock.errors import DataError, WeightsError
from modelstock.evaluation import Outcome, collect, ensemble_identity, label_logits, score
from modelstock.models import build_classifier, normalise
from modelstock.scores import Row, load_scores, save_scores
from modelstock.shards import read_all
from modelstock.weights import WeightSet


def alone(folder, weights):
    """The plain way: one model, all images at once; logits of the head's classes."""
    images, labels, manifest = read_all(folder)
    with torch.inference_mode():
        logits = build_classifier(weights)(normalise(images, weights.meta["preprocess"]))
    return logits, labels, manifest


@pytest.mark.parametrize("split", ["shapes", "shapes-rendition", "shapes-objectnet"])
def test_one_pass_equals_scoring_each_weight_set_alone(tmp_path, variants, split):
    make_split(tmp_path, split, 130)
    together = score(tmp_path, variants, batch_size=37)
    for weights in variants:
        logits, labels, manifest = alone(tmp_path, weights)
        grouped = np.stack([logits[:, g].max(dim=1).values.numpy() for g in manifest.label_groups], axis=1)
        outcome = together[weights.identity]
        np.testing.assert_array_equal(outcome.prediction, grouped.argmax(axis=1))
        np.testing.assert_array_equal(outcome.correct, grouped.argmax(axis=1) == labels)
        exponents = np.exp(grouped - grouped.max(axis=1, keepdims=True))
        np.testing.assert_allclose(outcome.confidence, 1 / exponents.sum(axis=1), rtol=1e-5)


def test_the_ensemble_is_the_mean_of_the_members_logits(tmp_path, variants):
    make_split(tmp_path, "shapes", 60)
    identities = [w.identity for w in variants[:2]]
    found = score(tmp_path, variants, [identities])[ensemble_identity(identities[::-1])]
    mean = (alone(tmp_path, variants[0])[0] + alone(tmp_path, variants[1])[0]) / 2
    np.testing.assert_array_equal(found.prediction, mean.argmax(dim=1).numpy())


def test_label_logits_by_hand():
    logits = torch.tensor([[1.0, 5.0, 2.0, 4.0]])
    assert label_logits(logits, [[2], [0]]).tolist() == [[2.0, 1.0]]
    assert label_logits(logits, [[0, 1], [2, 3]]).tolist() == [[5.0, 4.0]]


def test_every_image_is_decoded_once_and_what_is_scored_is_not_scored_again(tmp_path, variants, monkeypatch):
    make_split(tmp_path / "data", "shapes", 60)
    batches = []
    read = evaluation.read_batches

    def counted(*arguments, **options):
        for images, labels in read(*arguments, **options):
            batches.append(len(labels))
            yield images, labels

    monkeypatch.setattr(evaluation, "read_batches", counted)
    cache, data = tmp_path / "cache", tmp_path / "data"
    first = score(data, variants[:2], cache=cache)
    assert sum(batches) == 60
    again = score(data, variants[:2], cache=cache)
    assert sum(batches) == 60
    assert all(np.array_equal(first[k].prediction, again[k].prediction) for k in first)
    score(data, variants, cache=cache)
    assert sum(batches) == 120
    next(cache.rglob("*.safetensors")).write_bytes(b"broken")
    score(data, variants, cache=cache)
    assert sum(batches) == 180


def test_results_read_back_and_their_bytes_repeat(tmp_path, variants):
    manifest = make_split(tmp_path / "data", "shapes", 60)
    rows = [Row(f"seed-{i}", w.identity, "seed", (i,), {"lr": 0.1}) for i, w in enumerate(variants)]
    scores = collect(tmp_path / "data", rows, score(tmp_path / "data", variants))
    save_scores(tmp_path / "a", scores)
    save_scores(tmp_path / "b", scores)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = load_scores(tmp_path / "a")
    assert (read.benchmark, read.role, read.data, read.rows) == (
        "shapes",
        "in-distribution",
        manifest.sha256,
        tuple(rows),
    )
    np.testing.assert_array_equal(read.correct, scores.correct)
    with pytest.raises(DataError, match="expected per-example results"):
        load_scores(tmp_path / "absent")
    assert Outcome.load(tmp_path / "absent", 60) is None


def test_a_tower_that_does_not_fit_and_an_unknown_member_are_refused(tmp_path, variants):
    make_split(tmp_path, "shapes", 10)
    lacking = {k: v for k, v in variants[0].tensors.items() if k != "visual.proj"}
    with pytest.raises(WeightsError, match=r"got visual\.proj missing"):
        score(tmp_path, [WeightSet(lacking, variants[0].meta, "lacking")])
    with pytest.raises(WeightsError, match="ensemble: got member 0123"):
        score(tmp_path, variants, [["0123"]])
