"""BatchNorm's running statistics of a merge: averaged and said so, or estimated again on training data."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.optim.swa_utils import update_bn

from modelstock.cli.merging import merge as merge_on_the_command_line
from modelstock.data.dataset import open_dataset
from modelstock.data.images import Framing, normalise
from modelstock.errors import MergeError, WeightsError
from modelstock.experiment.geometry import point_distances
from modelstock.experiment.merge import SubsetMerges
from modelstock.experiment.points import score_points
from modelstock.experiment.rows import row_of
from modelstock.geometry.points import AVERAGED
from modelstock.geometry.space import Space, checkpoint_of
from modelstock.merging.engine import merge
from modelstock.merging.files import merge_files
from modelstock.merging.methods.table import METHODS
from modelstock.merging.rules import RULES
from modelstock.models.towers import build_classifier
from modelstock.params import GeometryParams, MergeParams, standard_section
from modelstock.scoring.batch_norm import Recalibration, estimated, has_running_statistics
from modelstock.scoring.data_statistics import loss_gradient
from modelstock.scoring.one_pass import ScoringOptions, accuracies
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import read_inputs
from modelstock.training.job import Setting
from modelstock.training.parallel_merge import flat, give_back, merge_models
from modelstock.training.periodic import merge_periodically
from modelstock.weights.layout import is_counter, is_running_statistic
from modelstock.weights.weight_set import LazyArrays, WeightSet, classes_sha256, load_weights
from tests.support.models import CONFIGS, clip_of
from tests.support.splits import make_split
from tests.support.text_shards import make_texts
from tests.support.training import RECIPE, arm

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
    assert any("are averaged" in line for line in merged.meta["notices"])
    again = estimated(merged, train, examples=10**6, batch_size=10**6)
    count = sum(map(is_running_statistic, merged.tensors))
    assert again.meta["notices"] == [
        f"BatchNorm: {count} running statistics are estimated again, on 48 training images"
    ]
    assert again.meta["made_by"]["batch_norm"] == train.manifest.count
    kept = [name for name in merged.tensors if not is_running_statistic(name) and not is_counter(name)]
    assert all(np.array_equal(again.tensors[name], merged.tensors[name]) for name in kept)
    # The first layer's statistics by hand: of its convolution over all images, in one batch.
    activations = first_convolution(merged, train)
    mean, variance = activations.mean(dim=(0, 2, 3)), activations.var(dim=(0, 2, 3))
    np.testing.assert_allclose(again.tensors["visual.bn1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.tensors["visual.bn1.running_var"], variance, rtol=1e-4)
    assert estimated(merged, train, examples=10**6, batch_size=10**6).identity == again.identity


def first_convolution(weights, train):
    """What the first BatchNorm of the ResNet gets, for all images."""
    with torch.no_grad():
        return build_classifier(weights).tower.conv1(pixels_of(weights, train))


def pixels_of(weights, train):
    framing = Framing.of(weights.meta["preprocess"])
    images = np.stack([framing(train.images.cut(row)) for row in range(train.manifest.count)])
    return normalise(images, weights.meta["preprocess"])


def test_with_equal_batches_they_are_those_of_torchs_update_bn(family, train):
    _, seeds = family
    model = build_classifier(seeds[1])
    update_bn(torch.split(pixels_of(seeds[1], train), 16), model)
    again = estimated(seeds[1], train, examples=48, batch_size=16)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(again.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_batches_of_other_sizes_count_by_their_images(family, train):
    """48 images in batches of at most 20 are three of 16; in batches of at most 7, six of 7 and one of 6."""
    _, seeds = family
    activations = first_convolution(seeds[1], train)
    for most, sizes in ((20, [16] * 3), (7, [7] * 6 + [6])):
        again = estimated(seeds[1], train, examples=48, batch_size=most)
        assert again.tensors["visual.bn1.num_batches_tracked"] == len(sizes)
        variances = [len(part) * part.var(dim=(0, 2, 3)) for part in activations.split(sizes)]
        np.testing.assert_allclose(again.tensors["visual.bn1.running_var"], sum(variances) / 48, rtol=1e-4)
        np.testing.assert_allclose(
            again.tensors["visual.bn1.running_mean"], activations.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5
        )


def test_nothing_but_batch_norm_is_as_in_training(family, train, monkeypatch):
    """Dropout would make the statistics random: with it, they are those without it."""
    _, seeds = family
    expected = estimated(seeds[1], train, examples=16).identity

    def with_dropout(weights):
        model = build_classifier(weights)
        model.tower.conv1 = torch.nn.Sequential(model.tower.conv1, torch.nn.Dropout(0.9).eval())
        return model

    monkeypatch.setattr("modelstock.scoring.batch_norm.build_classifier", with_dropout)
    assert estimated(seeds[1], train, examples=16).identity == expected


def test_a_tower_without_batch_norm_is_left_as_it_is(train):
    _, clip = clip_of(CONFIGS["CLIP"])
    assert Recalibration(train, examples=4)(clip) is clip


def test_points_that_are_read_when_they_are_used_stay_so(family, train, tmp_path):
    _, seeds = family
    seeds[1].save(tmp_path / "seed.safetensors")
    lazy = load_weights(tmp_path / "seed.safetensors", lazy=True)
    again = Recalibration(train, examples=16)(lazy)
    assert isinstance(again.tensors, LazyArrays)
    assert again.identity == estimated(seeds[1], train, examples=16).identity


# ---------------------------------------------------------------- in an experiment


def merges_of(family, held_out, method, **more):
    anchor, seeds = family
    options = {"method": method, "section": standard_section(METHODS[method]), "anchor": anchor, "seeds": seeds}
    return list(SubsetMerges(**options, held_out=held_out, scoring=ScoringOptions(batch_size=32), **more))


def test_an_experiment_estimates_them_where_it_is_asked_to(family, train):
    _, seeds = family
    (plain,) = merges_of(family, train, "uniform")
    (again,) = merges_of(family, train, "uniform", train=train, batch_norm=16)
    assert has_running_statistics(plain.weights)
    name = "visual.bn1.running_mean"
    average = (seeds[1].tensors[name] + seeds[2].tensors[name]) / 2
    np.testing.assert_allclose(plain.weights.tensors[name], average, rtol=1e-6)
    assert plain.report[name]["running statistic"] == "averaged"
    assert again.report[name]["running statistic"] == "estimated again"
    assert again.weights.identity == estimated(plain.weights, train, examples=16).identity
    with pytest.raises(MergeError, match="got no training split"):
        merges_of(family, train, "uniform", batch_norm=16)


@pytest.mark.parametrize("method", ["greedy", "oracle_scale", "oracle_scales"])
def test_what_is_only_tried_is_estimated_as_the_result_is(family, train, monkeypatch, method):
    """A soup chosen by trials with averaged statistics would be chosen by other accuracies than those reported."""
    tried = []

    def note(weights):
        tried.append(weights.meta.get("made_by", {}).get("batch_norm"))

    def noted_accuracies(dataset, weights, options):
        list(map(note, weights))
        return accuracies(dataset, weights, options)

    def noted_gradient(*sample, device):
        of = loss_gradient(*sample, device=device)
        return lambda weights: note(weights) or of(weights)

    monkeypatch.setattr("modelstock.experiment.merge.accuracies", noted_accuracies)
    monkeypatch.setattr("modelstock.scoring.data_statistics.loss_gradient", noted_gradient)
    section = {"oracle_scale": {"steps": 2}, "oracle_scales": {"iterations": 1, "examples": 8}}.get(method, {})
    anchor, seeds = family
    (merged,) = SubsetMerges(
        method=method,
        section=standard_section(METHODS[method]).model_copy(update=section),
        anchor=anchor,
        seeds=seeds,
        held_out=train,
        scoring=ScoringOptions(batch_size=32),
        train=train,
        batch_norm=16,
    )
    assert len(tried) > 1
    assert set(tried) == {16}
    assert merged.weights.meta["made_by"]["batch_norm"] == 16


def test_points_of_the_geometry_are_estimated_as_merges_are(family, train):
    anchor, seeds = family
    space = Space(checkpoint_of(anchor), {number: checkpoint_of(seed) for number, seed in seeds.items()})
    section = GeometryParams(pairs=1, scales=[0.5])
    options = ScoringOptions(batch_size=32)
    plain, again = (
        score_points(train, anchor, space, section, options, held_out=train, recalibration=recalibration)
        for recalibration in (None, Recalibration(train, examples=16))
    )
    (merged,) = merges_of(family, train, "uniform", train=train, batch_norm=16)
    rows = {row.name: row for row in again.rows}
    assert [row.name for row in plain.rows] == list(rows)
    assert rows["uniform/1-2"].identity == merged.weights.identity  # one outcome for both, as where they are averaged
    for row in plain.rows:
        same = row.kind in ("anchor", "seed")
        assert (rows[row.name].identity == row.identity) == same
        assert rows[row.name].options.get(AVERAGED, row.identity) == row.identity
    for scores in (plain, again):  # the geometry knows them again without images
        assert point_distances(scores, space, section).keys() == rows.keys() - {row for row in rows if "ray" in row}


def test_seeds_keep_their_own_and_the_method_recalibrated_shows_what_the_estimate_alone_does(family, train):
    _, seeds = family
    merges = merges_of(family, train, "recalibrated", train=train, batch_norm=16)
    assert [merged.name for merged in merges] == ["1", "2"]
    for merged, seed in zip(merges, seeds.values(), strict=True):
        assert merged.weights.identity == estimated(seed, train, examples=16).identity
        assert row_of(merged.weights).kind == "recalibrated"


def test_the_method_recalibrated_is_refused_without_an_estimate():
    section = {"methods": ["uniform", "recalibrated"], "uniform": {"sets": "all"}, "recalibrated": {"sets": "single"}}
    assert MergeParams.model_validate({**section, "batch_norm": 100}).batch_norm == 100
    with pytest.raises(ValidationError, match="recalibrated needs batch_norm"):
        MergeParams.model_validate(section)
    with pytest.raises(ValidationError, match="one alone has no variance"):
        MergeParams.model_validate({**section, "batch_norm": 1})


# ---------------------------------------------------------------- on the command line


@pytest.fixture
def files(family, tmp_path):
    anchor, seeds = family
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, weights in zip(paths, [anchor, *seeds.values()], strict=True):
        weights.save(path)
    return paths


def test_the_command_estimates_them_on_training_shards(family, train, files, tmp_path):
    anchor, seeds = family
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "modelstock.cli", "merge", "--anchor", *files, "-o", out, "--json"]
    command += ["--method", "uniform", "--recalibrate", train.folder, "--examples", 20]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"][0]["BatchNorm"] == "estimated on 20 images"
    assert done.stderr == ""
    merged, _ = merge("uniform", anchor, list(seeds.values()))
    assert load_weights(out).identity == estimated(merged, train, examples=20).identity


def test_a_tower_without_running_statistics_is_refused(train, tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        WeightSet({"w": np.full(3, number, np.float32)}).save(path)
    with pytest.raises(MergeError, match="without running statistics of BatchNorm and an architecture"):
        merge_on_the_command_line(paths[1:], paths[0], tmp_path / "out.safetensors", recalibrate=train.folder)
    assert not (tmp_path / "out.safetensors").exists()


def test_shards_of_texts_are_refused_before_anything_is_merged(files, tmp_path):
    make_texts(tmp_path / "texts", ["good", "bad"], [1, 0])
    with pytest.raises(WeightsError, match="got a tower for images; expected one for the texts"):
        merge_on_the_command_line(files[1:], files[0], tmp_path / "out.safetensors", recalibrate=tmp_path / "texts")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_merge_that_cannot_be_estimated_leaves_no_file(files, tmp_path):
    def fails(file):
        assert file.exists()
        raise KeyboardInterrupt

    out = tmp_path / "out.safetensors"
    with pytest.raises(KeyboardInterrupt):
        merge_files("uniform", files[0], files[1:], out, recalibrate=fails)
    assert sorted(tmp_path.iterdir()) == files


# ---------------------------------------------------------------- in training


SMALL = RECIPE.model_copy(update={"batch_size": 16, "epochs": 2, "lawa": 2, "ema": [0.5], "snapshots": True})


def trained(family, train, held_out, out, batch_norm):
    """Seed 0 and a periodic run of two seeds: file -> weight set."""
    inputs = read_inputs(family[0], train, held_out, in_memory=False, batch_norm=batch_norm)
    made_by = {"stage": "finetune", "seed": 0}
    finetune_seed(inputs, SMALL, name="seed-0", made_by=made_by, setting=Setting(), out=out)
    plain = SMALL.model_copy(update={"ema": [], "lawa": 0, "snapshots": False})
    merge_periodically(inputs, plain, arm(), arm="test", seeds=[0, 1], setting=Setting(), out=out / "periodic")
    files = [*out.glob("*.safetensors"), *out.glob("periodic/*.safetensors")]
    return {str(file.relative_to(out)): load_weights(file) for file in files}


def test_averages_and_periodic_runs_are_estimated_as_merges_are_and_seeds_and_snapshots_are_not(
    family, train, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    averaged = trained(family, train, train, tmp_path / "averaged", 0)
    again = trained(family, train, train, tmp_path / "again", 16)
    ours = {"ema-0.5.safetensors", "lawa.safetensors", "periodic/weights.safetensors"}
    assert averaged.keys() == again.keys() == {*ours, "weights.safetensors", "epoch-1.safetensors"}
    for name, weights in averaged.items():
        expected = estimated(weights, train, examples=16) if name in ours else weights
        assert again[name].identity == expected.identity
        assert again[name].meta["made_by"].get("batch_norm") == (16 if name in ours else None)
    assert row_of(again["lawa.safetensors"]).name == row_of(averaged["lawa.safetensors"]).name == "lawa@2/0"


def test_a_run_that_is_estimated_goes_on_from_no_point_of_one_that_is_not(family, train):
    plain, again = (read_inputs(family[0], train, train, in_memory=False, batch_norm=n) for n in (0, 16))
    assert plain.identities != again.identities


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
