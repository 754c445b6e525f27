"""Checkpoints from hands that mean harm: each is one line, nothing of them runs, nothing else is opened or written."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from modelstock.errors import ModelstockError, WeightsError
from modelstock.models.adopt import adopt
from modelstock.models.towers import build_classifier
from modelstock.weights.checkpoints import open_checkpoint
from modelstock.weights.format import write_arrays
from modelstock.weights.weight_set import WeightSet, load_weights


class Harm:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def plain_pickle(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps({"w": Harm(trace)}))


def torch_archive(path: Path, trace: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Harm(trace)}, path)


def legacy_archive(path: Path, trace: Path) -> None:
    torch.save({"w": Harm(trace)}, path, _use_new_zipfile_serialization=False)


def script_archive(path: Path, trace: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", pickle.dumps(Harm(trace)))
        archive.writestr("a/data.pkl", pickle.dumps(Harm(trace)))
        archive.writestr("a/version", "3")


@pytest.mark.parametrize("write", [plain_pickle, torch_archive, legacy_archive, script_archive])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", ".ckpt", ".pth.tar"])
def test_nothing_in_a_pickle_is_executed_whatever_it_is_called(tmp_path, anchor, write, suffix):
    file, trace = tmp_path / f"c{suffix}", tmp_path / "trace"
    write(file, trace)
    for reader in (open_checkpoint, load_weights, lambda path: adopt(path, anchor)):
        with pytest.raises(WeightsError) as refusal:
            reader(file)
        assert "\n" not in str(refusal.value)
    assert not trace.exists()


def header_file(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ("[" * 100_000, b""),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, b""),
        (b"\xff\xfe{}", b""),
        ("[]", b""),
        (json.dumps({"a": {**ONE, "shape": [-1]}}), b"1234"),
        (json.dumps({"a": {**ONE, "shape": [2**62, 4]}}), b"1234"),
        (json.dumps({"a": {**ONE, "shape": [True]}}), b"1234"),
        (json.dumps({"a": {**ONE, "data_offsets": [0, 2**40]}}), b"1234"),
        (json.dumps({"a": ONE, "b": ONE}), b"1234"),
        (json.dumps({"a": {**ONE, "data_offsets": [4, 8]}}), b"12345678"),
        (json.dumps({"a": {**ONE, "dtype": "F32x"}}), b"1234"),
        (json.dumps({"a": None}), b""),
        (json.dumps({"__metadata__": []}), b""),
        (json.dumps({"__metadata__": {"modelstock": "[" * 100_000}}), b""),
        (json.dumps({"__metadata__": {"modelstock": 5}}), b""),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data):
    file = header_file(tmp_path / "c.safetensors", header, data)
    with pytest.raises(WeightsError, match=r"c\.safetensors"):
        open_checkpoint(file)


GOOD = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}


@pytest.mark.parametrize(
    "meta",
    [
        [],
        {"architecture": "ViT"},
        {"parents": 5},
        {"parents": [1]},
        {"notices": "a line"},
        {"classes": {"a": 1}},
        {"made_by": []},
        {"preprocess": 1},
        {"preprocess": {}},
        {"preprocess": {**GOOD, "size": 10**9}},
        {"preprocess": {**GOOD, "size": "32"}},
        {"preprocess": {**GOOD, "mean": [0.5]}},
        {"preprocess": {**GOOD, "std": [0.25, 0, 0.25]}},
        {"preprocess": {**GOOD, "mean": [float("nan")] * 3}},
        {"preprocess": {**GOOD, "resize_mode": "other"}},
    ],
)
def test_metadata_that_are_not_what_they_should_be_are_refused_by_every_reader(tmp_path, meta):
    header = {"a": ONE, "__metadata__": {"modelstock": json.dumps(meta)}}
    file = header_file(tmp_path / "c.safetensors", json.dumps(header), b"1234")
    for reader in (open_checkpoint, load_weights):
        with pytest.raises(WeightsError, match=r"c\.safetensors: got .*; make it again"):
            reader(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg": {"image_size": 32, "patch_size": 8, "width": 10**6, "head_width": 32, "layers": 4}},
        {"vision_cfg": {"timm_model_name": "no such model", "image_size": 32}},
        {"vision_cfg": None},
        {"vision_cfg": {"harm": 1}},
        {"embed_dim": "x"},
    ],
)
def test_an_architecture_that_is_not_that_of_the_tensors_is_refused_before_it_takes_memory(anchor, changes):
    meta = {**anchor.meta, "architecture": {**anchor.meta["architecture"], **changes}}
    with pytest.raises(WeightsError, match="anchor"):
        build_classifier(WeightSet(anchor.tensors, meta, "anchor"))


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/hostname", "index.json", "folder"])
def test_an_index_opens_nothing_but_files_beside_it(tmp_path, shard):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/folder").mkdir()
    write_arrays(tmp_path / "other.safetensors", {"w": np.ones(1, np.float32)})
    index = tmp_path / "inside/index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ModelstockError, match=r"got shard|expected"):
        open_checkpoint(index)
