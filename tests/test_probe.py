"""A linear probe: the solution that scikit-learn finds, its strength chosen on the held-out split, and as an anchor."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from modelstock.data.dataset import open_dataset
from modelstock.errors import WeightsError
from modelstock.experiment.anchor import Data, make_anchor
from modelstock.models.anchor import without_head
from modelstock.models.timm_models import load_timm
from modelstock.models.towers import build_classifier
from modelstock.params import AnchorParams, TimmPretraining
from modelstock.scoring.features import features_of
from modelstock.scoring.one_pass import accuracies
from modelstock.scoring.probe import STRENGTHS, Labelled, fitted_head, probe_head
from tests.support.splits import make_split

CLASSES, WIDTH = 4, 24


def examples(seed: int, count: int = 160, *, scale: float = 1.0, shift: float = 0.0) -> Labelled:
    """Classes around centres that overlap."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, WIDTH))
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    values = centres[labels] + 1.5 * random.standard_normal((count, WIDTH))
    return Labelled(features=(scale * (values + shift)).astype(np.float32), labels=labels)


def length_of(features: np.ndarray) -> float:
    centred = features - features.mean(axis=0, dtype=np.float64)
    return float(np.sqrt((centred**2).sum(axis=1).mean()))


@pytest.mark.parametrize("strength", STRENGTHS[:7:2])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (40.0, 3.0)])
def test_the_solution_is_scikit_learns(strength, scale, shift):
    train = examples(1, scale=scale, shift=shift)
    head, options = fitted_head(train, examples(2, scale=scale, shift=shift), classes=CLASSES, strengths=[strength])
    length, count = length_of(train.features), len(train.labels)
    reference = LogisticRegression(C=1 / (strength * count), max_iter=10_000, tol=1e-10)
    reference.fit(train.features.astype(np.float64) / length, train.labels)
    np.testing.assert_allclose(
        head["head.weight"] * length, reference.coef_, rtol=2e-3, atol=1e-3 * abs(reference.coef_).max()
    )
    np.testing.assert_allclose(head["head.bias"], reference.intercept_, rtol=2e-3, atol=5e-3)
    assert options["l2"] == strength


def test_the_strength_is_that_of_the_least_held_out_loss_and_is_the_same_at_any_scale():
    train, held_out = examples(1), examples(2)
    losses = {s: fitted_head(train, held_out, classes=CLASSES, strengths=[s])[1]["held-out/loss"] for s in STRENGTHS}
    head, options = fitted_head(train, held_out, classes=CLASSES)
    assert options["l2"] == min(losses, key=losses.__getitem__)
    assert options["held-out/loss"] == pytest.approx(min(losses.values()), rel=1e-4)
    assert STRENGTHS[0] > options["l2"] > STRENGTHS[-1]  # so there was something to choose
    logits = held_out.features @ head["head.weight"].T + head["head.bias"]
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(held_out.labels))
    assert float(loss) == pytest.approx(options["held-out/loss"], rel=1e-4)
    larger = fitted_head(examples(1, scale=50), examples(2, scale=50), classes=CLASSES)
    assert larger[1]["l2"] == options["l2"]
    np.testing.assert_allclose(50 * larger[0]["head.weight"], head["head.weight"], rtol=1e-2, atol=1e-4)


def test_equal_input_gives_equal_bytes():
    first, second = (fitted_head(examples(1), examples(2), classes=CLASSES)[0] for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    make_split(folder / "train", "train", 96)
    make_split(folder / "held-out", "held-out", 48)
    return folder / "train", folder / "held-out"


@pytest.fixture(scope="module")
def backbone():
    return load_timm(TimmPretraining(source="timm", model="test_efficientnet", pretrained="random", size=32))


def test_an_anchor_with_a_probe_has_the_towers_tensors_and_scores_as_its_features_do(splits, backbone):
    train, held_out = map(open_dataset, splits)
    names = train.manifest.classes
    section, data = AnchorParams(head="probe", scale="model"), Data(train=splits[0], held_out=splits[1])
    anchor = make_anchor(backbone, names, ["{}"], section, data=data)
    assert anchor.meta["made_by"]["options"] == {"head": "probe", **probe_head(anchor, train, held_out)[1]}
    assert all(np.array_equal(anchor.tensors[name], tensor) for name, tensor in backbone.tensors.items())
    assert (len(names), anchor.meta["architecture"]["width"]) == anchor.tensors["head.weight"].shape
    # Features are not normalised, as timm's classifier takes them.
    features = features_of(anchor, held_out)
    hits = (features @ anchor.tensors["head.weight"].T + anchor.tensors["head.bias"]).argmax(axis=1) == held_out.labels
    assert accuracies(held_out, [anchor]) == [pytest.approx(hits.mean())]
    assert not build_classifier(anchor).training


def test_data_of_other_classes_are_refused(splits, backbone):
    train, held_out = map(open_dataset, splits)
    with pytest.raises(WeightsError, match="a head for classes"):
        probe_head(without_head(backbone, ["cat", "dog"]), train, held_out)
