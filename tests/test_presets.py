"""Presets: composed as DVC composes them, valid as they are, and used by `dvc exp run` and then by `dvc repro`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from PIL import Image
from ruamel.yaml import YAML

from flows.compose import text_of
from modelstock.data.dataset import open_dataset
from modelstock.params import load_params

ROOT = Path(__file__).parent.parent
PRESETS = sorted(p.stem for p in (ROOT / "conf/preset").glob("*.yaml"))


def composed(folder: Path, *overrides: str) -> Path:
    """A params file made by DVC's own composition."""
    from dvc.utils.hydra import compose_and_dump

    compose_and_dump(folder / "params.yaml", str(ROOT / "conf"), None, "config", str(folder), list(overrides))
    return folder / "params.yaml"


def test_the_default_preset_is_params_yaml(tmp_path):
    own = [
        "digits",
        "emoji",
        "geometry",
        "methods",
        "own-checkpoints",
        "pools",
        "reviews",
        "shapes",
        "vit-b-16",
        "vit-b-32",
        "vit-l-14",
    ]
    assert own == PRESETS
    read = YAML(typ="safe").load
    assert read(composed(tmp_path).read_text()) == read((ROOT / "params.yaml").read_text())
    written = (ROOT / "params.yaml").read_text()
    assert written == text_of("shapes", ROOT / "conf"), "params.yaml is not current: run python -m flows.compose"
    assert "seeds: [0, 1, 2, 3, 4, 5, 6, 7] # one fine-tuned weight set each" in written


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_with_comments_has_the_values_that_dvc_composes(tmp_path, name):
    read = YAML(typ="safe").load
    assert read(text_of(name, ROOT / "conf")) == read(composed(tmp_path, f"preset={name}").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_says_source_expectation_and_cost(tmp_path, name):
    params = load_params(composed(tmp_path, f"preset={name}"))
    head = (ROOT / f"conf/preset/{name}.yaml").read_text()
    assert all(word in head for word in ("# Source:", "# Expected", "# Cost:"))
    if name.startswith("vit"):
        assert params.finetune.precision == params.evaluate.precision == "bfloat16"
        assert params.pretrain.pretrained in open_clip.list_pretrained_tags_by_model(params.pretrain.architecture)
        roles = [params.prepare.role(benchmark) for benchmark in params.evaluate.benchmarks]
        assert roles == ["held-out", "in-distribution"] + 5 * ["shift"]


def test_the_recipes_are_those_of_their_sources(tmp_path):
    found = {name: load_params(composed(tmp_path, f"preset={name}")).finetune for name in PRESETS}
    b32, b16, l14 = (found[f"vit-{name}"] for name in ("b-32", "b-16", "l-14"))
    assert (b32.lr, b32.epochs, b32.batch_size, b32.weight_decay, b32.warmup_steps) == (3e-5, 10, 512, 0.1, 500)
    assert (b16.lr, b16.epochs, b16.batch_size, b16.weight_decay, b16.warmup_steps) == (1e-5, 10, 256, 0.0, 5000)
    assert (b16.crop_scale, b16.flip) == ((0.08, 1.0), True)
    assert (l14.lr, l14.epochs, l14.batch_size) == (2e-5, 8, 256)


@pytest.mark.timeout(200)
def test_an_experiment_writes_the_preset_to_params_yaml_and_repro_goes_on_from_there(tmp_path):
    folder = tmp_path / "project"
    for name in ("modelstock", "stages", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    who = {f"GIT_{role}_{what}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = {
        **os.environ,
        **who,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "DVC_NO_ANALYTICS": "1",
    }

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    call("git", "init", "-q")
    call("git", "add", ".")
    call("git", "commit", "-q", "-m", "start")
    for digit in range(10):
        path = folder / f"datasets/digits/test/{digit}/scan.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8), 20 * digit).save(path)
    dvc, stage = (sys.executable, "-m", "dvc"), "prepare@digits"
    changes = ("-S", "preset=digits", "-S", "finetune.epochs=9", "-S", "prepare.shard_size=4")
    done = call(*dvc, "exp", "run", *changes, stage)
    assert f"Running stage '{stage}'" in done
    params = load_params(folder / "params.yaml")
    assert (params.finetune.batch_size, params.finetune.epochs, params.prepare.shard_size) == (32, 9, 4)
    manifest = open_dataset(folder / "data/digits").manifest
    assert ([shard.count for shard in manifest.shards], manifest.labels[7]) == ([4, 4, 2], "seven")
    written = (folder / "params.yaml").read_bytes()
    assert "up to date" in call(*dvc, "repro", stage)
    assert (folder / "params.yaml").read_bytes() == written
    # A bad value is refused where nothing is lost yet; the file has to be brought back.
    bad = ("exp", "run", "-S", "preset=digits", "-S", "prepare.shard_size=0", stage)
    with pytest.raises(AssertionError, match=r"error: params.yaml: got 1 problem: prepare.shard_size"):
        call(*dvc, *bad)
    assert (folder / "data/digits/manifest.json").is_file()
    (folder / "params.yaml").write_bytes(written)
    assert "up to date" in call(*dvc, "repro", stage)
    # In a copy that DVC makes and removes, the project's data are read, and nothing of the project is taken along.
    copy = ("exp", "run", "--temp", "-n", "copied", "-S", "preset=digits", "-S", "prepare.shard_size=5")
    call(*dvc, *copy, stage)
    assert len(list((folder / "datasets").rglob("*.png"))) == 10
    assert (folder / "scratch").is_dir()
    assert not (folder / "scratch").is_symlink()
    ref = call("git", "for-each-ref", "--format=%(refname)", "refs/exps/**/copied").strip()
    names = call("git", "ls-tree", "-r", "--name-only", ref).splitlines()
    assert [name for name in names if name.startswith(("datasets", "scratch", "mlruns"))] == []
    assert (folder / "params.yaml").read_bytes() == written
