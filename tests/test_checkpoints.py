"""Checkpoints as people save them: what wraps the model is taken off, what cannot be weights is one line."""

import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modelstock.errors import WeightsError
from modelstock.notices import Notice, collected
from modelstock.weights.checkpoints import open_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
AVERAGE = {name: tensor + 1 for name, tensor in STATE.items()}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "saved",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model_state_dict": STATE, "optimizer_state_dict": {"lr": 1}, "loss": 0.5},
        {"model": {"state_dict": STATE}},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        {"state_dict": prefixed("_orig_mod.module.")},
        {name.replace("a.", "a._orig_mod."): tensor for name, tensor in STATE.items()},
        {name.replace("a.", "a._fsdp_wrapped_module."): tensor for name, tensor in STATE.items()},
    ],
)
def test_what_trainers_and_wrappers_put_around_a_model_is_taken_off(tmp_path, saved):
    torch.save(saved, tmp_path / "c.pt")
    read = open_checkpoint(tmp_path / "c.pt")
    assert sorted(read.tensors) == sorted(STATE)
    np.testing.assert_array_equal(read.tensors["a.weight"].array(), STATE["a.weight"])


def test_names_are_those_of_the_model_in_every_format(tmp_path):
    save_file(prefixed("module._orig_mod."), tmp_path / "model-1.safetensors")
    index = {"weight_map": {f"module._orig_mod.{name}": "model-1.safetensors" for name in STATE}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path / "model-1.safetensors", tmp_path / "model.safetensors.index.json", tmp_path):
        assert sorted(open_checkpoint(path).tensors) == sorted(STATE)


def test_two_tensors_that_would_get_one_name_are_refused(tmp_path):
    save_file({"a.w": torch.ones(1), "a._orig_mod.w": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match=r"got both a\._orig_mod\.w and a\.w; expected one of them"):
        open_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("saved", "taken", "line"),
    [
        ({"state_dict": STATE, "state_dict_ema": AVERAGE}, STATE, "state_dict is taken, a model; state_dict_ema left"),
        ({"model": STATE, "model_ema": AVERAGE}, STATE, "model is taken, a model; model_ema left aside"),
        ({"state_dict": STATE, "model": AVERAGE}, STATE, "state_dict is taken, a model; model left aside"),
        ({"model_ema": AVERAGE}, AVERAGE, "model_ema is taken, a running average"),
    ],
)
def test_which_of_several_models_was_taken_is_a_notice(tmp_path, saved, taken, line):
    torch.save(saved, tmp_path / "c.pt")
    with pytest.warns(Notice, match=f"c.pt: its entry {line}"):
        read = open_checkpoint(tmp_path / "c.pt")
    np.testing.assert_array_equal(read.tensors["a.bias"].array(), taken["a.bias"])


def test_which_of_several_files_of_a_folder_was_taken_is_a_notice(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    with collected() as notices:
        open_checkpoint(tmp_path)
    assert notices == []
    save_file(AVERAGE, tmp_path / "open_clip_model.safetensors")
    with pytest.warns(Notice, match=r"open_clip_model\.safetensors is taken of it; model\.safetensors left aside"):
        read = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(read.tensors["a.bias"].array(), AVERAGE["a.bias"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("saved", "line"),
    [
        ({**STATE, "adj": torch.eye(3).to_sparse()}, "tensor adj: got a sparse tensor (sparse_coo)"),
        ({**STATE, "adj": torch.eye(3).to_sparse_csr()}, "tensor adj: got a sparse tensor (sparse_csr)"),
        ({**STATE, "c": torch.zeros(3, device="meta")}, "tensor c: got a tensor on the device meta, without values"),
        ({**STATE, "c": torch.zeros(3, dtype=torch.complex64)}, "tensor c: got torch.complex64"),
        ({0: torch.zeros(2)}, "got the int 0 as a name"),
        ({**STATE, "_extra_state": None}, "got '_extra_state', a NoneType, among tensors"),
        ({"weights": STATE}, "got 'weights', a dict, among tensors"),
        ([1, 2], "got a list"),
        ({"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, "(an object argparse.Namespace in it)"),
        ({"state_dict": STATE, "metric": np.float64(0.5)}, "(an object numpy._core.multiarray.scalar in it)"),
        (torch.nn.Linear(2, 2), "(an object torch.nn.modules.linear.Linear in it)"),
    ],
)
def test_what_cannot_be_weights_is_one_line_that_names_the_cause(tmp_path, saved, line):
    torch.save(saved, tmp_path / "c.pt")
    with pytest.raises(WeightsError) as refusal:
        open_checkpoint(tmp_path / "c.pt")
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)
