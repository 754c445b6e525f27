"""What merges weigh by, against definitions computed another way, one example at a time."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from modelstock.data.dataset import open_dataset
from modelstock.data.images import normalise
from modelstock.data.shapes.render import draw
from modelstock.errors import DataError
from modelstock.models.towers import build_classifier
from modelstock.scoring.data_statistics import fisher, inner, loss_gradient, sample
from modelstock.scoring.one_pass import accuracies, score
from modelstock.weights.weight_set import load_weights
from tests.support.merging import merge_with
from tests.support.splits import make_split


@pytest.fixture(scope="module")
def examples():
    return draw("train", range(12), seed=3)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_split(folder, "train", 60)
    return open_dataset(folder)


def test_fisher_is_the_mean_squared_gradient_of_log_p_at_labels_the_model_draws(anchor, examples):
    images, _ = examples
    found = fisher(anchor, images, seed=5, batch_size=4)
    model = build_classifier(anchor)
    generator = torch.Generator().manual_seed(5)
    pixels = normalise(images, anchor.meta["preprocess"])
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for start in range(0, 12, 4):
        with torch.no_grad():
            labels = torch.multinomial(model(pixels[start : start + 4]).softmax(1), 1, generator=generator)[:, 0]
        for i, label in enumerate(labels):
            model.zero_grad()
            functional.cross_entropy(model(pixels[start + i][None]), label[None]).backward()
            for name, p in model.named_parameters():
                total[name] += p.grad**2 / 12
    assert found.tensors.keys() == total.keys()
    for name, expected in total.items():
        scale = float(expected.max())
        np.testing.assert_allclose(found.tensors[name], expected.numpy(), rtol=1e-3, atol=1e-5 * scale)
    assert found.meta["of"] == anchor.identity
    assert all((v >= 0).all() for v in found.tensors.values())


def test_fisher_of_the_last_bias_is_p_times_one_minus_p_on_average(anchor, examples):
    """d log p_y / d b_c = [y = c] - p_c, whose square has the mean p_c (1 - p_c) over y ~ p."""
    images = np.repeat(examples[0][:1], 400, axis=0)
    found = fisher(anchor, images, batch_size=500).tensors["head.bias"]
    with torch.no_grad():
        p = build_classifier(anchor)(normalise(images[:1], anchor.meta["preprocess"])).softmax(1)[0].double().numpy()
    np.testing.assert_allclose(found.sum(), (p * (1 - p)).sum(), rtol=0.02)


def test_inner_products_are_those_of_each_layers_inputs(anchor, examples):
    """The head's input by hand; for attention, the outputs that torch gives must fit the inputs that we claim."""
    images, _ = examples
    found = inner(anchor, images, batch_size=5)
    linear = {
        n for n in anchor.tensors if n.endswith(("c_fc.weight", "c_proj.weight", "in_proj_weight", "out_proj.weight"))
    }
    assert set(found.tensors) == linear | {"head.weight"}
    model = build_classifier(anchor)
    pixels = normalise(images, anchor.meta["preprocess"])
    with torch.no_grad():
        features = functional.normalize(model.visual(pixels), dim=-1).double()
    np.testing.assert_allclose(found.tensors["head.weight"], (features.T @ features / 12).numpy(), rtol=1e-4, atol=1e-7)
    # sum of squared outputs of out_proj without its bias = tr(W G W^T), for the G that we measured.
    name = "visual.transformer.resblocks.0.attn"
    seen = []
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(pixels)
    outputs = (seen[0] - module.out_proj.bias).double()
    weight = module.out_proj.weight.double().detach().numpy()
    gram = found.tensors[f"{name}.out_proj.weight"].astype(np.float64)
    np.testing.assert_allclose(12 * np.trace(weight @ gram @ weight.T), float((outputs**2).sum().detach()), rtol=1e-4)


def test_the_losss_gradient_agrees_with_finite_differences(anchor, examples):
    images, labels = examples
    of = loss_gradient(images, labels, batch_size=5)
    value, slopes = of(anchor)
    model = build_classifier(anchor)
    pixels, truth = normalise(images, anchor.meta["preprocess"]), torch.from_numpy(labels)
    with torch.no_grad():
        assert value == pytest.approx(float(functional.cross_entropy(model(pixels), truth)), rel=1e-5)
        model = model.double()
        for name in ("head.weight", "visual.transformer.resblocks.1.mlp.c_fc.weight", "visual.ln_post.bias"):
            step, parameter = 1e-6, dict(model.named_parameters())[name]
            along = torch.from_numpy(slopes[name]).double()
            parameter += step * along
            up = functional.cross_entropy(model(pixels.double()), truth)
            parameter -= 2 * step * along
            down = functional.cross_entropy(model(pixels.double()), truth)
            parameter += step * along
            assert float((up - down) / (2 * step)) == pytest.approx(float((along**2).sum()), rel=1e-3)


def test_a_sample_is_random_repeats_and_is_at_most_everything(anchor, train):
    some, labels = sample(train, anchor, examples=20)
    again, _ = sample(train, anchor, examples=20)
    everything, _ = sample(train, anchor, examples=1000)
    other, _ = sample(train, anchor, examples=20, seed=1)
    assert (len(some), len(labels), len(everything)) == (20, 20, 60)
    assert (some == again).all()
    assert not (some == other).all()
    assert not (some == everything[:20]).all()


def test_labels_that_stand_for_several_classes_are_refused(anchor, tmp_path):
    make_split(tmp_path, "shapes-objectnet", 20)
    with pytest.raises(DataError, match="one class per label, all of them"):
        sample(open_dataset(tmp_path), anchor, examples=5)


def test_every_data_driven_merge_of_real_towers(anchor, variants, train):
    """The whole way: measured statistics, scores and gradients of a real tower, and a result that can be scored."""
    images, labels = sample(train, anchor, examples=30)
    tuned = variants[:2]
    options = {
        "fisher": {"statistics": [fisher(w, images[:8]) for w in tuned]},
        "regmean": {"statistics": [inner(w, images) for w in tuned]},
        "greedy": {"score": partial(accuracies, train)},
        "oracle_scale": {
            "score": partial(accuracies, train),
            "steps": 3,
        },
        "oracle_scales": {"gradient": loss_gradient(images, labels), "iterations": 3},
    }
    uniform, _ = merge_with("uniform", anchor, tuned)
    for method, given in options.items():
        merged, report = merge_with(method, anchor, tuned, **given)
        assert score(train, [merged])[merged.identity].correct.shape == (60,), method
        if method in ("fisher", "regmean", "oracle_scales"):
            assert merged.identity != uniform.identity
    value = loss_gradient(images, labels)
    assert value(merged)[0] < value(uniform)[0]  # the oracle's scales do better than the soup on its own data
    assert set(report) == {n for n, v in anchor.tensors.items() if v.dtype.kind == "f"}


def test_the_command_measures_statistics_and_merges_by_them(anchor, variants, train, tmp_path, monkeypatch, capsys):
    import sys

    from modelstock import cli

    monkeypatch.chdir(tmp_path)
    for name, weights in zip(("w0", "a", "b"), (anchor, *variants[:2]), strict=True):
        weights.save(tmp_path / f"{name}.safetensors")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["modelstock", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    data = ["--data", train.folder]
    for w in "ab":
        code, output = command(
            "statistics",
            "fisher",
            f"{w}.safetensors",
            *data,
            "-o",
            f"{w}.f.safetensors",
            "--examples",
            10,
        )
        assert code == 0, output.err
    merging = ["merge", "--anchor", "w0.safetensors", "a.safetensors", "b.safetensors", "--method"]
    by = ["--statistics", "a.f.safetensors", "--statistics", "b.f.safetensors"]
    assert command(*merging, "fisher", *by, "-o", "f.safetensors")[0] == 0
    expected, _ = merge_with(
        "fisher",
        load_weights(tmp_path / "w0.safetensors"),
        [load_weights(tmp_path / f"{w}.safetensors") for w in "ab"],
        statistics=[load_weights(tmp_path / f"{w}.f.safetensors") for w in "ab"],
    )
    found = load_weights(tmp_path / "f.safetensors")
    assert found.identity == expected.identity
    assert found.meta["parents"] == expected.meta["parents"]  # our own weight sets are always identified
    for method in ("greedy", "oracle_scale", "oracle_scales"):
        code, output = command(*merging, method, "--held-out", train.folder, "-o", f"{method}.safetensors")
        assert code == 0, output.err
    code, output = command(*merging, "fisher", "-o", "g.safetensors")
    assert (code, output.err.count("\n")) == (1, 1)
    assert "got 0 files of statistics; expected 2: squared gradients by checkpoint" in output.err
    code, output = command(*merging, "uniform", "--held-out", train.folder, "-o", "g.safetensors")
    assert "a method that searches" in output.err
    code, output = command("statistics", "fischer", "a.safetensors", *data, "-o", "x.safetensors")
    assert "expected fisher or inner" in output.err
    before = (tmp_path / "a.safetensors").read_bytes()
    code, output = command(
        "statistics", "inner", "a.safetensors", "--data", train.folder, "-o", "a.safetensors", "--overwrite"
    )
    assert "got an input as output" in output.err
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert not (tmp_path / "g.safetensors").exists()
