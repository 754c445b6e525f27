"""Models of timm as towers: trained and resumed bit for bit, adopted, and given back as timm itself loads them."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from modelstock.cli.models import export as export_on_the_command_line
from modelstock.data.dataset import open_dataset
from modelstock.data.images import Framing, normalise
from modelstock.errors import ParamsError, TrainingError, WeightsError
from modelstock.models.adopt import adopt
from modelstock.models.anchor import with_head, without_head
from modelstock.models.export import export
from modelstock.models.timm_models import load_timm
from modelstock.models.towers import build_classifier
from modelstock.notices import Notice
from modelstock.params import TimmPretraining
from modelstock.training import resume
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import read_inputs
from modelstock.training.job import Setting
from modelstock.training.loop import Run
from modelstock.training.recipe import new_run, parameter_groups
from modelstock.training.resume import ResumePoint
from modelstock.weights.weight_set import WeightSet
from tests.support.splits import make_split
from tests.support.training import RECIPE, examples

MODELS = ["test_efficientnet", "test_resnet", "test_byobnet", "test_convnext", "test_vit"]
NAMES = ["cat", "dog", "owl"]
SIZE = 64


def backbone_of(name: str) -> WeightSet:
    return load_timm(TimmPretraining(source="timm", model=name, pretrained="random", size=SIZE))


def classifier_of(name: str, names=NAMES) -> WeightSet:
    """A weight set with a random head, and random statistics where there is BatchNorm."""
    backbone, random = backbone_of(name), np.random.default_rng(1)
    tensors = {
        n: (t + random.random(t.shape)).astype(t.dtype) if "running" in n else t for n, t in backbone.tensors.items()
    }
    head = {
        "head.weight": random.standard_normal((len(names), backbone.meta["architecture"]["width"])).astype(np.float32),
        "head.bias": random.standard_normal(len(names)).astype(np.float32),
    }
    return with_head(WeightSet(tensors, backbone.meta, "backbone"), names, head, {"head": "probe"})


def images(weights: WeightSet, count: int = 2) -> torch.Tensor:
    size = weights.meta["preprocess"]["size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: torch.nn.Module, inputs: torch.Tensor) -> np.ndarray:
    return model.eval()(inputs).numpy()


# ---------------------------------------------------------------- somebody's own checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_somebodys_checkpoint_is_adopted_with_its_classifier_and_predicts_as_timm_does(tmp_path, name):
    options = {"img_size": SIZE} if name == "test_vit" else {}
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=len(NAMES), **options)
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.add_(torch.rand_like(buffer))
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    anchor = without_head(backbone_of(name), NAMES)
    adopted = adopt(tmp_path / "tuned.safetensors", anchor)
    assert adopted.meta["made_by"]["options"]["head"] == "own"
    assert "notices" not in adopted.meta  # nothing is assumed: timm's classifier takes what ours takes
    inputs = images(anchor)
    np.testing.assert_array_equal(logits(build_classifier(adopted), inputs), logits(model, inputs))


def test_a_checkpoint_of_other_classes_or_another_model_is_refused(tmp_path):
    anchor = without_head(backbone_of("test_efficientnet"), NAMES)
    for name, classes, message in (("test_efficientnet", 5, "classifier"), ("test_resnet", 3, "missing")):
        save_file(timm.create_model(name, num_classes=classes).state_dict(), tmp_path / "tuned.safetensors")
        with pytest.raises(WeightsError, match=message):
            adopt(tmp_path / "tuned.safetensors", anchor)


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("name", MODELS)
def test_timm_loads_an_export_and_predicts_the_same_from_the_image_on(tmp_path, name):
    weights = classifier_of(name)
    export(weights, None, tmp_path / "out", licence="mit")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8))
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture)[None]
    preprocess = weights.meta["preprocess"]
    np.testing.assert_array_equal(pixels, normalise(Framing.of(preprocess)(picture)[None], preprocess))
    expected = logits(build_classifier(weights), pixels)
    np.testing.assert_array_equal(logits(model, pixels), expected)
    assert model.pretrained_cfg["label_names"] == NAMES
    # And as a file of weights alone.
    alone = timm.create_model(
        name,
        num_classes=len(NAMES),
        checkpoint_path=tmp_path / "out/model.safetensors",
        **weights.meta["architecture"].get("options", {}),
    )
    np.testing.assert_array_equal(logits(alone, pixels), expected)


def test_an_export_comes_back_as_the_weight_set_it_was_made_of(tmp_path):
    weights = classifier_of("test_efficientnet")
    export(weights, None, tmp_path / "out")
    again = adopt(tmp_path / "out", without_head(backbone_of("test_efficientnet"), NAMES))
    assert again.identity == weights.identity


def test_exports_repeat_and_say_what_they_are(tmp_path):
    weights = classifier_of("test_efficientnet")
    for place in ("a/out", "b/out"):
        export(weights, None, tmp_path / place, licence="mit")
    files = sorted(path.name for path in (tmp_path / "a/out").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    for file in files:
        assert (tmp_path / "a/out" / file).read_bytes() == (tmp_path / "b/out" / file).read_bytes()
    config = json.loads((tmp_path / "a/out/config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_efficientnet", 3)
    card = (tmp_path / "a/out/README.md").read_text()
    assert "library_name: timm" in card
    assert weights.identity in card
    with pytest.raises(ParamsError, match="something that exists"):
        export(weights, None, tmp_path / "a/out")
    export(weights, None, tmp_path / "a/out", overwrite=True)


def test_the_example_on_the_card_runs(tmp_path):
    weights = classifier_of("test_efficientnet")
    export(weights, None, tmp_path / "out")
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)).save(picture, "png")
    (tmp_path / "image.png").write_bytes(picture.getvalue())
    code = (tmp_path / "out/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in NAMES


def test_what_is_no_classifier_of_timm_is_refused(tmp_path):
    weights = classifier_of("test_efficientnet")
    normalised = {**weights.meta, "architecture": {**weights.meta["architecture"], "normalise": True}}
    with pytest.raises(WeightsError, match="other logits than ours"):
        export(WeightSet(weights.tensors, normalised, "w"), None, tmp_path / "out")
    with pytest.raises(WeightsError, match="without architecture or head"):
        export(backbone_of("test_efficientnet"), None, tmp_path / "out")
    weights.save(tmp_path / "weights.safetensors")
    with pytest.raises(ParamsError, match=r"--clip: got .*expected none for a tower of timm"):
        export(weights, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_on_the_command_line(tmp_path / "weights.safetensors", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


# ---------------------------------------------------------------- training

CHANGES = {"batch_size": 8, "epochs": 2, "lawa": 2, "ema": [0.5], "micro_batch": None, "layer_decay": 0.8}


class Stop(Exception):
    pass


def test_a_tower_with_batch_norm_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Stopped after every one of its saves in turn, statistics, counters and averages end as of a run in one go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)
    make_split(tmp_path / "train", "train", 24)
    train = open_dataset(tmp_path / "train")
    inputs = read_inputs(classifier_of("test_efficientnet", train.manifest.classes), train, train, in_memory=True)
    recipe, made_by = RECIPE.model_copy(update=CHANGES), {"stage": "finetune", "seed": 0}

    def work(out: str) -> dict[str, bytes]:
        finetune_seed(inputs, recipe, name="seed-0", made_by=made_by, setting=Setting(), out=tmp_path / out)
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}

    whole = work("whole")
    save = ResumePoint.save

    def until(self, *arguments):
        save(self, *arguments)
        raise Stop

    for _ in range(3):  # from where it is, one step and no more
        with monkeypatch.context() as patch:
            patch.setattr(ResumePoint, "save", until)
            with pytest.raises(Stop):
                work("stopped")
    taken, step = [], Run._step
    monkeypatch.setattr(Run, "_step", lambda self, batch: (taken.append(self.step), step(self, batch)))
    assert work("stopped") == whole
    assert taken == list(range(3, 6))


def run_of(name: str, **changes):
    weights = classifier_of(name, [str(number) for number in range(24)])
    recipe = RECIPE.model_copy(update={"batch_size": 8, **changes})
    preprocess = {**weights.meta["preprocess"], "size": 32}
    return new_run(build_classifier(weights), examples(), recipe, preprocess=preprocess, seed=0)


def test_layer_decay_follows_the_stages_of_a_convolutional_tower():
    model = build_classifier(classifier_of("test_efficientnet"))
    groups = parameter_groups(model, layer_decay=0.5, weight_decay=0.1, decay="matrices")
    scales = {id(parameter): group["scale"] for group in groups for parameter in group["params"]}
    found = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    stages = len(model.tower.blocks)
    assert found["head.weight"] == found["visual.conv_head.weight"] == found["visual.bn2.weight"] == 1
    assert found["visual.conv_stem.weight"] == found["visual.bn1.weight"] == 0.5 ** (stages + 1)
    assert {found[n] for n in found if n.startswith("visual.blocks.1.")} == {0.5 ** (stages - 1)}


def test_recomputed_activations_would_count_twice_in_running_statistics_and_are_refused():
    model = timm.create_model("test_efficientnet", num_classes=3).train()
    model.set_grad_checkpointing(True)
    model(torch.randn(4, 3, SIZE, SIZE)).sum().backward()
    counts = {int(buffer) for name, buffer in model.named_buffers() if "num_batches" in name}
    assert counts == {1, 2}  # the reason
    with pytest.raises(TrainingError, match=r"gradient_checkpointing: .* would count every image twice"):
        run_of("test_efficientnet", gradient_checkpointing=True)
    run_of("test_convnext", gradient_checkpointing=True).train(until=1)


def test_batches_that_are_divided_are_named_and_a_division_by_memory_is_refused():
    with pytest.raises(TrainingError, match="micro_batch: got auto"):
        run_of("test_efficientnet", micro_batch="auto")
    with pytest.warns(Notice, match="BatchNorm normalises 4 images at a time"):
        run_of("test_efficientnet", micro_batch=4)
    with pytest.warns(Notice, match="running statistics change too while the head learns alone"):
        run = run_of("test_efficientnet", head_first_epochs=1)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train(until=1)
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in changed - {"head.weight", "head.bias"}} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    run_of("test_convnext", micro_batch="auto")
