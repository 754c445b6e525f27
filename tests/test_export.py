"""Exports: folders that open_clip loads and that predict as the weights they were made of; anchors by command."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.data.images import normalise
from modelstock.errors import DataError, ParamsError, WeightsError
from modelstock.files import sealed
from modelstock.models import towers as models
from modelstock.models.anchor import anchor_of
from modelstock.models.export import export
from modelstock.models.pretrained import load_clip
from modelstock.weights.weight_set import WeightSet, load_weights
from tests.support.merging import merge_with
from tests.support.models import CONFIGS

CLASSES = ["cat", "dog", "cow"]


@pytest.fixture(params=["CLIP", "CoCa"])
def family(request, monkeypatch):
    """A CLIP, and a merge of two weight sets fine-tuned from its anchor."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CONFIGS[request.param])
    clip = load_clip("tiny", "random", seed=1)
    return clip, descendant(clip)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", models.TINY_CLIP)
    clip = load_clip("tiny", "random", seed=1)
    return clip, descendant(clip)


def descendant(clip):
    anchor = anchor_of(clip, CLASSES, [lambda name: f"a {name}."])

    def tuned(seed):
        random = np.random.default_rng(seed)
        tensors = {k: (v + 0.05 * random.standard_normal(v.shape)).astype(v.dtype) for k, v in anchor.tensors.items()}
        return WeightSet(tensors, {**anchor.meta, "parents": [anchor.identity]}, f"seed {seed}")

    merged, _ = merge_with("model_stock", anchor, [tuned(0), tuned(1)])
    made = {**merged.meta["made_by"], "members": [0, 1]}
    return WeightSet(merged.tensors, {**merged.meta, "made_by": made}, "merged")


def pictures(count=8):
    pixels = np.random.default_rng(3).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return pixels, [Image.fromarray(p) for p in pixels]


def example_of(folder):
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_open_clip_loads_the_folder_and_it_predicts_as_the_weights_do(tmp_path, family):
    clip, weights = family
    export(weights, clip, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    head = load_file(tmp_path / "out/head.safetensors")
    pixels, images = pictures()
    with torch.inference_mode():
        features = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        found = features @ head["weight"].T + head["bias"]
        expected = models.build_classifier(weights)(normalise(pixels, weights.meta["preprocess"]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(set(found.argmax(dim=1).tolist())) > 1
    # The text tower is the backbone's own.
    state = model.state_dict()
    for name, tensor in clip.tensors.items():
        source = weights.tensors[name] if name.startswith("visual.") else tensor
        np.testing.assert_array_equal(state[name].numpy(), source)
    assert json.loads((tmp_path / "out/classes.json").read_text()) == CLASSES


def test_an_export_is_a_clip_that_can_be_an_anchor_again(tmp_path, pair):
    clip, weights = pair
    export(weights, clip, tmp_path / "out")
    again = load_clip("mine", str(tmp_path / "out"))
    assert again.meta["preprocess"] == weights.meta["preprocess"]
    np.testing.assert_array_equal(again.tensors["visual.proj"], weights.tensors["visual.proj"])


def test_the_cards_example_runs_as_printed(tmp_path, pair, monkeypatch, capsys):
    clip, weights = pair
    export(weights, clip, tmp_path / "my model")
    pixels, images = pictures(1)
    images[0].save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(example_of(tmp_path / "my model"), {})
    logits = models.build_classifier(weights)(normalise(pixels, weights.meta["preprocess"]))
    assert capsys.readouterr().out.strip() == CLASSES[logits.argmax().item()]
    assert len(example_of(tmp_path / "my model").splitlines()) <= 13


def report_of(weights):
    estimate = {"value": 0.812, "low": 0.8081, "high": 0.8159}
    benchmarks = ["held-out", "imagenet", "imagenet-r"]
    return {
        "rows": [{"name": "seed-0", "identity": "0" * 64}, {"name": "model_stock/0-1", "identity": weights.identity}],
        "benchmarks": benchmarks,
        "held_out": "held-out",
        "in_distribution": "imagenet",
        "shifts": ["imagenet-r"],
        "accuracy": {"model_stock/0-1": dict.fromkeys(benchmarks, estimate), "seed-0": {}},
        "summary": {"model_stock/0-1": {"shifts": {"value": 0.5, "low": 0.4, "high": 0.6}}},
    }


def test_the_card_says_what_it_is_how_good_and_whose_licence_counts(tmp_path, pair):
    clip, weights = pair
    backbone = {"name": "ViT-B-32-quickgelu", "pretrained": "openai"}
    known = WeightSet(weights.tensors, {**weights.meta, "backbone": backbone}, "merged")
    export(known, clip, tmp_path / "out", report=report_of(weights), licence="mit")
    _, front, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    front_matter = YAML(typ="safe").load(front)
    assert front_matter["library_name"] == "open_clip"
    assert front_matter["license"] == "mit"
    assert front_matter["base_model"] == "timm/vit_base_patch32_clip_224.openai"
    assert front_matter["base_model_relation"] == "merge"
    assert "| imagenet | in distribution | 81.2 | 80.8 to 81.6 |" in text
    assert "| imagenet-r | shift | 81.2 |" in text
    assert "| mean of shifts |  | 50.0 | 40.0 to 60.0 |" in text
    assert "model_stock" in text
    assert "0, 1" in text
    assert all(parent in text for parent in weights.meta["parents"])
    assert weights.identity in text
    assert "whose licence governs them" in text
    with pytest.raises(DataError, match="no row of merged"):
        export(clip_like(known), clip, tmp_path / "other", report=report_of(weights))
    assert not (tmp_path / "other").exists()


def clip_like(weights):
    return WeightSet({k: v + 1 for k, v in weights.tensors.items()}, weights.meta, "merged")


def test_a_local_backbone_is_named_without_the_place_where_it_lay(tmp_path, pair):
    clip, weights = pair
    backbone = {"name": "mine", "pretrained": "/home/somebody/clip.pt"}
    export(WeightSet(weights.tensors, {**weights.meta, "backbone": backbone}), clip, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "mine (clip.pt)" in card
    assert "somebody" not in card
    assert str(tmp_path) not in card
    assert "\nlicense: other\n" in card


def test_equal_weights_give_equal_bytes(tmp_path, pair):
    clip, weights = pair
    for parent in ("one", "two"):
        export(weights, clip, tmp_path / parent / "out", report=report_of(weights))
    files = [{p.name: p.read_bytes() for p in (tmp_path / parent / "out").iterdir()} for parent in ("one", "two")]
    assert files[0] == files[1]
    assert sorted(files[0]) == [
        "README.md",
        "classes.json",
        "head.safetensors",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": "1" * 64, "parents": []}, "got the CLIP .*; expected the ancestor of merged"),
        ({"architecture": {**models.TINY_CLIP, "quick_gelu": True}}, r"another architecture \(quick_gelu differ\)"),
        ({"classes": ["cat"]}, "1 class names for a head of 3"),
        ({"classes": ["cat", "dog", "pig"]}, "expected a weight set that names its classes"),
    ],
)
def test_weights_that_are_not_of_this_clip_or_do_not_name_their_classes_are_refused(tmp_path, pair, change, message):
    clip, weights = pair
    with pytest.raises(WeightsError, match=message):
        export(WeightSet(weights.tensors, {**weights.meta, **change}, "merged"), clip, tmp_path / "out")
    with pytest.raises(WeightsError, match="without architecture or text tower"):
        export(weights, weights, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_where_it_is_an_export_and_never_half(tmp_path, pair, monkeypatch):
    clip, weights = pair
    out = tmp_path / "out"
    export(weights, clip, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ParamsError, match="--overwrite"):
        export(weights, clip, out)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letters.txt").write_text("dear")
    with pytest.raises(ParamsError, match="something that is no export"):
        export(weights, clip, tmp_path / "home", overwrite=True)
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError("No space left on device")

        patch.setattr("modelstock.models.export.card", full)
        with pytest.raises(OSError, match="No space"):
            export(clip_like(weights), clip, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    export(clip_like(weights), clip, out, overwrite=True)
    assert (out / "head.safetensors").read_bytes() != before["head.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out"]


# --- the commands


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_commands_anchor_and_export_go_from_a_name_to_a_folder(tmp_path, pair):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    (tmp_path / "names.json").write_text('{"n01": "cat", "n02": "dog"}')
    for number, classes in enumerate(("cat,dog", tmp_path / "names.txt", tmp_path / "names.json")):
        done = run(
            "anchor",
            "tiny",
            "--pretrained",
            "random",
            "--classes",
            classes,
            "--templates",
            "a {}.",
            "-o",
            tmp_path / f"{number}.safetensors",
            "--clip-out",
            tmp_path / f"clip-{number}.safetensors",
            "--device",
            "cpu",
        )
        assert done.exit_code == 0, done.output
        assert "2 classes x 1 templates" in done.output
    made = [load_weights(tmp_path / f"{number}.safetensors") for number in range(3)]
    assert len({w.identity for w in made}) == 1
    assert made[0].meta["classes"] == ["cat", "dog"]
    report = json.dumps(sealed(report_of(made[0])))
    (tmp_path / "report.json").write_text(report)
    done = run(
        "export",
        tmp_path / "0.safetensors",
        "-o",
        tmp_path / "out",
        "--clip",
        tmp_path / "clip-0.safetensors",
        "--report",
        tmp_path / "report.json",
        "--license",
        "apache-2.0",
    )
    assert done.exit_code == 0, done.output
    assert "\nlicense: apache-2.0\n" in (tmp_path / "out/README.md").read_text()
    assert "| imagenet | in distribution | 81.2 |" in (tmp_path / "out/README.md").read_text()
    (tmp_path / "report.json").write_text(report.replace("0.812", "0.912"))
    options = ["-o", tmp_path / "other", "--clip", tmp_path / "clip-0.safetensors"]
    done = run("export", tmp_path / "0.safetensors", *options, "--report", tmp_path / "report.json")
    assert "report.json: got values that do not have the sha256 they were written with" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "cat"], "--classes: got 'cat'; expected two names or more"),
        (
            ["--classes", "cat,dog", "--templates", "a photo"],
            "--templates: got 'a photo'; expected one template or more",
        ),
        (["--classes", "cat,dog", "--device", "gpu"], "--device: got 'gpu'"),
        (["--classes", "cat,dog", "--clip-out", "a.safetensors"], "--clip-out: got the file of --out"),
    ],
)
def test_what_the_command_anchor_cannot_do_is_refused_before_a_model_is_built(
    tmp_path, monkeypatch, pair, options, message
):
    monkeypatch.chdir(tmp_path)
    done = run("anchor", "tiny", "--pretrained", "random", *options, "-o", "a.safetensors")
    assert isinstance(done.exception, ParamsError)
    assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []
