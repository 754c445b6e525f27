"""What lies elsewhere on another machine is found there by MODELSTOCK_PATHS, and changes no byte of what is written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.manifest import make_manifest, read_manifest, save_manifest
from modelstock.data.shapes.names import NAMES
from modelstock.errors import DataError, ParamsError
from modelstock.files import as_named, on_this_machine
from modelstock.models.adopt import adopt_seed
from modelstock.models.heads import tokenizer_folder
from modelstock.models.pretrained import load_clip
from modelstock.models.timm_models import load_timm
from modelstock.params import TimmPretraining
from modelstock.weights.weight_set import WeightSet
from tests.support.models import CONFIGS, TINY, clip_of, folder_of
from tests.support.splits import make_split
from tests.support.texts import encoder, encoder_folder

ROOT = Path(__file__).parent.parent
Elsewhere = Callable[[], None]


@pytest.mark.parametrize(
    ("path", "here"),
    [
        ("/data/train/0.tar", "/mnt/data/train/0.tar"),
        ("/data", "/mnt/data"),
        ("/data/", "/mnt/data"),
        ("/database/0.tar", "/database/0.tar"),  # whole names
        ("/data/big/0.tar", "/scratch/0.tar"),  # the longest folder
        ("/data/bigger", "/mnt/data/bigger"),
        ("/mnt/data/x", "/twice/x"),  # once: what a path became is not looked up again
        ("/other/0.tar", "/other/0.tar"),
        ("data/0.tar", "data/0.tar"),
        ("laion2b_s34b_b79k", "laion2b_s34b_b79k"),
        ("", "."),
    ],
)
def test_the_longest_folder_that_an_absolute_path_begins_with_counts(monkeypatch, path, here):
    monkeypatch.setenv("MODELSTOCK_PATHS", "/data=/mnt/data:/data/big=/scratch:/mnt/data=/twice")
    assert on_this_machine(path) == Path(here)
    monkeypatch.setenv("MODELSTOCK_PATHS", "")
    assert on_this_machine(path) == Path(path)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("/data", "'/data'"),
        ("/data=mnt", "'/data=mnt'"),
        ("data=/mnt", "'data=/mnt'"),
        ("/data=", "'/data='"),
        ("/a=/b=/c", "'/a=/b=/c'"),
        ("/data=/mnt:", "''"),
        ("/data=/mnt:/data/=/other", "two places for /data/"),
    ],
)
def test_a_value_that_says_something_else_is_refused(monkeypatch, value, got):
    monkeypatch.setenv("MODELSTOCK_PATHS", value)
    with pytest.raises(ParamsError) as caught:
        on_this_machine("relative")
    expected = "expected /from=/to with absolute paths, pairs separated by ':', each folder once; correct it"
    assert str(caught.value) == f"MODELSTOCK_PATHS: got {got}; {expected}"


def test_a_stage_refuses_it_before_it_does_anything(tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "stages.check", "params.yaml", "params.checked"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MODELSTOCK_PATHS": "/data"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: MODELSTOCK_PATHS: got '/data'; expected /from=/to")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_what_is_kept_names_a_moved_file_as_the_settings_do(monkeypatch):
    assert as_named(["/data/a.pt: odd", "b: odd"], "./a.pt") == ["/data/a.pt: odd", "b: odd"]
    monkeypatch.setenv("MODELSTOCK_PATHS", "/data=/mnt/data")
    assert as_named(["/mnt/data/a.pt: odd", "b: odd"], "/data/a.pt") == ["/data/a.pt: odd", "b: odd"]
    assert as_named(["/mnt/data/a.pt: odd"], "/mnt/data/a.pt") == ["/mnt/data/a.pt: odd"]


# ---------------------------------------------------------------- shards that are used in place


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Elsewhere:
    """Goes to another machine, on which the folder `head` of the first is `gpu/mount`."""
    (tmp_path / "head").mkdir()
    (tmp_path / "gpu").mkdir()

    def go() -> None:
        shutil.copytree(tmp_path / "head", tmp_path / "gpu/mount")
        shutil.rmtree(tmp_path / "head")
        monkeypatch.setenv("MODELSTOCK_PATHS", f"{tmp_path}/head={tmp_path}/gpu/mount")

    return go


@pytest.fixture
def in_place(tmp_path, elsewhere) -> Path:
    """A split whose shards are used in place; its folder has the manifest alone."""
    made = make_split(tmp_path / "head/shards", "shapes", 120)
    facts = {"benchmark": "shapes", "role": made.role, "labels": made.labels, "label_groups": made.label_groups}
    manifest = make_manifest(**facts, classes=NAMES, shards=made.shards, root=str(tmp_path / "head/shards"))
    (tmp_path / "data").mkdir()
    save_manifest(tmp_path / "data", manifest)
    return tmp_path / "data"


def test_shards_that_are_used_in_place_are_found_and_are_the_same_data(tmp_path, in_place, elsewhere):
    here = open_dataset(in_place)
    expected, written = read_all(here), (in_place / "manifest.json").read_bytes()
    elsewhere()
    there = open_dataset(in_place)
    assert there.manifest.paths(in_place)[0] == tmp_path / "gpu/mount/shards/000000.tar"
    for found, wanted in zip(read_all(there), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert there.manifest.sha256 == here.manifest.sha256
    assert (in_place / "manifest.json").read_bytes() == written
    assert read_manifest(in_place).root == str(tmp_path / "head/shards")


def test_a_shard_that_differs_there_or_is_missing_is_named_by_its_place_there(tmp_path, in_place, elsewhere):
    elsewhere()
    shard = tmp_path / "gpu/mount/shards/000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    with pytest.raises(DataError, match=rf"^{shard}: got sha256 \w+ of {len(content)} bytes; expected sha256"):
        open_dataset(in_place)
    shard.unlink()
    with pytest.raises(DataError, match=rf"^{shard}: got no such file.*; .*say in MODELSTOCK_PATHS where the folder"):
        open_dataset(in_place)


# ---------------------------------------------------------------- backbones and checkpoints


def a_folder_of_open_clip(head: Path) -> Callable[[], WeightSet]:
    model, _ = clip_of(CONFIGS["QuickGELU"])
    folder = folder_of(head / "clip", model.state_dict(), CONFIGS["QuickGELU"])
    return lambda: load_clip("ViT-tiny", str(folder))  # not what its name means: a notice, which is kept


def a_file_of_open_clip(head: Path) -> Callable[[], WeightSet]:
    torch.save(clip_of(TINY)[0].state_dict(), head / "clip.pt")
    return lambda: load_clip("ViT-tiny", str(head / "clip.pt"))


def a_file_of_timm(head: Path) -> Callable[[], WeightSet]:
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), head / "resnet.safetensors")
    section = TimmPretraining(source="timm", model="test_resnet", pretrained=str(head / "resnet.safetensors"), size=64)
    return lambda: load_timm(section)


def a_folder_of_transformers(head: Path) -> Callable[[], WeightSet]:
    folder = encoder_folder(head / "bert")
    return lambda: encoder(folder)


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
@pytest.mark.parametrize(
    "backbone", [a_folder_of_open_clip, a_file_of_open_clip, a_file_of_timm, a_folder_of_transformers]
)
def test_a_backbone_is_found_and_every_machine_writes_the_same_bytes(tmp_path, elsewhere, monkeypatch, backbone):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", TINY)
    load = backbone(tmp_path / "head")
    load().save(tmp_path / "first.safetensors")
    elsewhere()
    second = load()
    second.save(tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()
    assert str(tmp_path / "gpu") not in str(second.meta)
    assert second.meta["backbone"]["pretrained"].startswith(str(tmp_path / "head"))
    if backbone is a_folder_of_open_clip:
        (line,) = second.meta["notices"]
        assert line.startswith(f"{tmp_path}/head/clip/open_clip_config.json: ")
    monkeypatch.delenv("MODELSTOCK_PATHS")
    with pytest.raises((DataError, ParamsError)):
        load()


def test_a_path_that_is_not_there_is_named_with_its_place_there(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", TINY)
    monkeypatch.setenv("MODELSTOCK_PATHS", f"/models={tmp_path}")
    with pytest.raises(ParamsError, match=rf"^pretrain\.pretrained: got '/models/clip\.pt', here {tmp_path}/clip\.pt;"):
        load_clip("ViT-tiny", "/models/clip.pt")


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_the_tokenizer_in_a_backbones_folder_is_found(tmp_path, elsewhere):
    folder = encoder_folder(tmp_path / "head/bert")
    backbone = encoder(folder)
    assert tokenizer_folder(backbone) == folder
    elsewhere()
    assert tokenizer_folder(backbone) == tmp_path / "gpu/mount/bert"


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_a_checkpoint_that_stands_for_a_seed_is_found_and_gives_the_same_bytes(tmp_path, elsewhere, anchor):
    tower = {name: torch.from_numpy(t + 1) for name, t in anchor.tensors.items() if name.startswith("visual.")}
    checkpoint = tmp_path / "head/tuned.pt"
    torch.save(tower, checkpoint)
    adopt_seed(checkpoint, anchor, seed=3).save(tmp_path / "first.safetensors")
    elsewhere()
    second = adopt_seed(checkpoint, anchor, seed=3)
    second.save(tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()
    assert second.meta["notices"] == [f"{checkpoint}: no head in it that can be used: the anchor's is"]
