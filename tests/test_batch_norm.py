"""BatchNorm's running statistics of a merge: averaged and said so, or estimated again on training data."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from modelstock.data.dataset import open_dataset
from modelstock.data.images import Framing, normalise
from modelstock.errors import MergeError
from modelstock.experiment.merge import SubsetMerges
from modelstock.merging.engine import merge
from modelstock.merging.methods.table import METHODS
from modelstock.merging.rules import RULES
from modelstock.models.towers import build_classifier
from modelstock.params import standard_section
from modelstock.scoring.batch_norm import estimated, has_running_statistics
from modelstock.scoring.one_pass import ScoringOptions
from modelstock.training.parallel_merge import flat, give_back, merge_models
from modelstock.weights.layout import is_running_statistic
from modelstock.weights.weight_set import WeightSet, classes_sha256, load_weights
from tests.support.models import CONFIGS, clip_of
from tests.support.splits import make_split

pytestmark = pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_split(folder, "train", 48)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def family(train):
    """An anchor with a ResNet tower and two seeds of it."""
    classes = train.manifest.classes
    _, clip = clip_of(CONFIGS["ResNet"])
    tower = {name: tensor for name, tensor in clip.tensors.items() if name.startswith("visual.")}
    head = {"head.weight": np.ones((len(classes), 64), np.float32), "head.bias": np.zeros(len(classes), np.float32)}
    meta = {**clip.meta, "preprocess": {**clip.meta["preprocess"], "size": 64}, "classes": classes}
    meta |= {"classes_sha256": classes_sha256(classes)}
    anchor = WeightSet(tower | head, {**meta, "parents": [], "made_by": {"stage": "anchor"}}, "anchor")
    random = np.random.default_rng(0)

    def seed(number: int) -> WeightSet:
        tensors = {
            name: np.asarray(tensor + 0.05 * abs(random.standard_normal(tensor.shape)), tensor.dtype)
            if tensor.dtype.kind == "f"
            else tensor + number
            for name, tensor in anchor.tensors.items()
        }
        origin = {"stage": "finetune", "seed": number, "options": {}}
        return WeightSet(tensors, {**meta, "parents": [anchor.identity], "made_by": origin}, f"seed {number}")

    return anchor, {number: seed(number) for number in (1, 2)}


def test_estimated_statistics_are_the_means_over_the_training_images(family, train):
    anchor, seeds = family
    merged, _ = merge("model_stock", anchor, list(seeds.values()))
    assert any("BatchNorm" in line for line in merged.meta["notices"])
    again = estimated(merged, train, examples=10**6, batch_size=10**6)
    assert "notices" not in again.meta
    assert again.meta["made_by"]["batch_norm"] == train.manifest.count
    kept = [name for name in merged.tensors if not is_running_statistic(name) and "num_batches" not in name]
    assert all(np.array_equal(again.tensors[name], merged.tensors[name]) for name in kept)
    # The first layer's statistics by hand: of its convolution over all images, in one batch.
    model = build_classifier(merged)
    framing = Framing.of(merged.meta["preprocess"])
    images = np.stack([framing(train.images.cut(row)) for row in range(train.manifest.count)])
    with torch.no_grad():
        activations = model.visual.conv1(normalise(images, merged.meta["preprocess"]))
    mean, variance = activations.mean(dim=(0, 2, 3)), activations.var(dim=(0, 2, 3))
    np.testing.assert_allclose(again.tensors["visual.bn1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.tensors["visual.bn1.running_var"], variance, rtol=1e-4)
    assert estimated(merged, train, examples=10**6, batch_size=10**6).identity == again.identity


def test_an_experiment_estimates_them_where_it_is_asked_to(family, train):
    anchor, seeds = family
    options = {"method": "uniform", "section": standard_section(METHODS["uniform"]), "anchor": anchor, "seeds": seeds}
    options |= {"held_out": train, "scoring": ScoringOptions(batch_size=32)}
    (plain,) = SubsetMerges(**options)
    (again,) = SubsetMerges(**options, train=train, batch_norm=16)
    assert has_running_statistics(plain.weights)
    name = "visual.bn1.running_mean"
    average = (seeds[1].tensors[name] + seeds[2].tensors[name]) / 2
    np.testing.assert_allclose(plain.weights.tensors[name], average, rtol=1e-6)
    assert again.weights.identity == estimated(plain.weights, train, examples=16).identity
    with pytest.raises(MergeError, match="got no training split"):
        list(SubsetMerges(**options, batch_norm=16))


def test_the_command_estimates_them_on_training_shards(family, train, tmp_path):
    anchor, seeds = family
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file, weights in zip(files, [anchor, *seeds.values()], strict=True):
        weights.save(file)
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "modelstock.cli", "merge", "--anchor", files[0], *files[1:], "-o", out]
    command += ["--method", "uniform", "--batch-norm", train.folder]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    merged, _ = merge("uniform", anchor, list(seeds.values()))
    assert load_weights(out).identity == estimated(merged, train, examples=1000).identity


def test_models_merged_in_training_have_the_running_statistics_of_the_merge_of_their_weight_sets(family):
    anchor, seeds = family
    models = [build_classifier(weights) for weights in seeds.values()]
    report = merge_models(anchor, models)
    merged, _ = merge("model_stock", anchor, list(seeds.values()))
    for name, tensor in models[0].state_dict().items():
        if tensor.is_floating_point():
            np.testing.assert_array_equal(tensor.numpy(), merged.tensors[name])
    assert report["visual.bn1.running_var"]["running statistic"] == "averaged"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_averages_running_statistics_and_a_model_keeps_its_share_of_its_own(family, rule):
    anchor, seeds = family
    models = [build_classifier(weights) for weights in seeds.values()]
    own = [flat(model) for model in models]
    merge_models(anchor, models, rule=RULES[rule], options={o.name: o.default for o in RULES[rule].options})
    name, counter = "visual.bn1.running_mean", "visual.bn1.num_batches_tracked"
    first, second = (weights.tensors[name].astype(float) for weights in seeds.values())
    for model, before, weights in zip(models, own, seeds.values(), strict=True):
        np.testing.assert_allclose(model.state_dict()[name], (first + second) / 2, rtol=1e-6)
        give_back(model, before, 0.75)
        expected = 0.75 * weights.tensors[name].astype(float) + 0.25 * (first + second) / 2
        np.testing.assert_allclose(model.state_dict()[name], expected, rtol=1e-6)
        assert model.state_dict()[counter] == weights.tensors[counter]
