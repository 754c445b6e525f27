"""Own data, an own backbone and own checkpoints, through DVC: folders of photographs in, a comparison out."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from modelstock.data.dataset import open_dataset
from modelstock.data.shapes.names import NAMES
from modelstock.data.shapes.render import draw
from modelstock.models.towers import TINY_CLIP
from modelstock.scoring.results import load_scores
from modelstock.weights.weight_set import load_weights
from tests.support.models import clip_of, folder_of
from tests.support.settings import full_params
from tests.test_pipeline import ROOT, run, write_params

CHOSEN = ("disc", "heart", "cross")
FOLDERS = {"n01": "disc", "n02": "heart", "n03": "cross"}


def photographs(folder, split: str, each: int) -> None:
    """`each` JPEGs a class, of many sizes, as a camera would leave them."""
    images, labels = draw("train", range(3000), seed=len(split))
    random = np.random.default_rng(0)
    for name, word in FOLDERS.items():
        (folder / split / name).mkdir(parents=True)
        for number, row in enumerate(np.flatnonzero(labels == NAMES.index(word))[:each]):
            size = tuple(int(side) for side in random.integers(40, 70, 2))
            Image.fromarray(images[row]).resize(size).save(folder / split / name / f"IMG_{number:03d}.JPEG", quality=95)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose params name folders of photographs and a folder with an open_clip model; nothing has run."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("modelstock", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(full_params())
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    photographs(folder / "photos", "train", 16)
    photographs(folder / "photos", "test", 6)
    model, clip = clip_of(TINY_CLIP)
    folder_of(folder / "backbone", model.state_dict(), TINY_CLIP, **clip.meta["preprocess"])
    files = {"source": "files", "labels": "classes", "part": "all"}
    write_params(
        folder,
        {
            "threads": 1,
            "prepare": {
                "held_out_per_class": 4,
                "workers": 1,
                "shard_size": 10,
                "splits": {
                    "train": {**files, "path": "photos/train", "part": "train"},
                    "held-out": {**files, "path": "photos/train", "part": "held-out"},
                    "photos": {**files, "path": "photos/test", "role": "in-distribution"},
                },
            },
            "loading": {"in_memory": False},
            "seeds": [0, 1],
            "finetune": {"epochs": 1, "batch_size": 12, "warmup_steps": 1, "lawa": 0, "ema": []},
            "merge": {"methods": ["model_stock"]},
            "evaluate": {"benchmarks": ["held-out", "photos"], "workers": 1, "batch_size": 5},
        },
    )
    yaml = YAML(typ="safe")
    raw = yaml.load((folder / "params.yaml").read_text())
    raw |= {"periodic": {}, "longer": [], "variants": {}, "anchors": {}}
    raw["classes"] = {"names": FOLDERS, "templates": ["a photo of a {}."]}
    raw["pretrain"] = {"source": "open_clip", "architecture": "tiny", "pretrained": "backbone", "seed": 0}
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(raw, file)
    done = run(folder, "dvc", "repro")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def results(project) -> dict[str, np.ndarray]:
    scores = load_scores(project / "results/photos.safetensors")
    return dict(zip([row.name for row in scores.rows], scores.nll, strict=True))


@pytest.mark.timeout(600)
def test_folders_become_splits_and_the_cut_is_never_trained_on(project):
    train, held_out, test = (
        open_dataset(project / f"data/{name}").manifest for name in ("train", "held-out", "photos")
    )
    assert (train.count, held_out.count, test.count) == (3 * 12, 3 * 4, 3 * 6)
    assert (test.labels, test.role, test.classes) == (list(CHOSEN), "in-distribution", list(CHOSEN))
    assert load_weights(project / "models/anchor.safetensors").meta["classes"] == list(CHOSEN)


def test_without_shifts_the_comparison_has_no_columns_for_them(project):
    assert set(results(project)) == {"anchor", "seed-0", "seed-1", "model_stock/0-1", "ensemble/0-1"}
    table = (project / "reports/comparison.md").read_text()
    assert "mean of shifts" not in table
    assert set(json.loads((project / "reports/metrics.json").read_text())["zero-shot anchor"]) == {"held-out", "photos"}


def test_the_pipelines_scores_are_those_of_open_clips_own_loop(project):
    """Model, transform and loop of open_clip on the photographs themselves, with the head of the weight set."""
    folder = project / "exported"
    command = (
        "modelstock.cli",
        "export",
        "models/finetuned/0/weights.safetensors",
        "--clip",
        "models/clip/clip.safetensors",
        "-o",
        "exported",
    )
    done = run(project, *command)
    assert done.returncode == 0, done.stderr
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    weights = load_weights(project / "models/finetuned/0/weights.safetensors")
    head = {name: torch.from_numpy(weights.tensors[f"head.{name}"]) for name in ("weight", "bias")}
    losses = []
    for label, name in enumerate(FOLDERS):
        for file in sorted((project / "photos/test" / name).iterdir()):
            with torch.inference_mode():
                features = model.eval().encode_image(transform(Image.open(file))[None], normalize=True)
                logits = features @ head["weight"].T + head["bias"]
            losses.append(-float(logits.log_softmax(dim=1)[0, label]))
    np.testing.assert_allclose(results(project)["seed-0"], losses, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(600)
def test_checkpoints_that_are_there_already_stand_where_trained_seeds_stood(project):
    before = results(project)
    for seed in (0, 1):
        tensors = load_weights(project / f"models/finetuned/{seed}/weights.safetensors").tensors
        state = {f"module.{name}": torch.from_numpy(value.copy()) for name, value in tensors.items()}
        torch.save({"epoch": 1, "state_dict": state}, project / f"{seed}.pt")
    write_params(project, {"checkpoints": ["0.pt", "1.pt"]})
    done = run(project, "dvc", "repro", "evaluate@photos")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adopted with the own head" in done.stdout
    after = results(project)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
