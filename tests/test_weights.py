"""Weight sets: bytes that repeat, an identity that means the tensors, and refusals with names."""

import hashlib
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import modelstock
from modelstock.errors import DamagedError, WeightsError
from modelstock.files import atomic_path
from modelstock.weights.checkpoints import open_checkpoint
from modelstock.weights.differences import differences, stored_differences
from modelstock.weights.format import write_arrays
from modelstock.weights.origin import made_by
from modelstock.weights.tensors import checksum_of, in_memory
from modelstock.weights.weight_set import WeightSet, load_weights


def sample() -> WeightSet:
    return WeightSet({"b": np.arange(3, dtype=np.float32), "a": np.ones((2, 2), np.float16)}, {"z": 1, "a": [2]})


def test_a_weight_set_reads_back_equal_and_its_bytes_repeat(tmp_path):
    sample().save(tmp_path / "one.safetensors")
    shuffled = WeightSet(dict(reversed(sample().tensors.items())), {"a": [2], "z": 1})
    shuffled.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    read = load_weights(tmp_path / "one.safetensors")
    assert read.meta == sample().meta
    assert read.identity == sample().identity


def test_identity_changes_with_name_value_shape_and_dtype_but_not_with_metadata():
    base = {"a": np.zeros(4, np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"] + 1},
        {"a": base["a"].reshape(2, 2)},
        {"a": base["a"].astype(np.int32)},
    ]
    identities = {WeightSet(t).identity for t in [base, *others]}
    assert len(identities) == 5
    assert WeightSet(base, {"note": 1}).identity == WeightSet(base).identity


def test_any_safetensors_file_is_a_weight_set_without_metadata(tmp_path):
    save_file({"x": np.zeros(2)}, tmp_path / "plain.safetensors")
    assert load_weights(tmp_path / "plain.safetensors").meta == {}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\xff" * 64, lambda b: json.dumps({}).encode()]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    sample().save(tmp_path / "w.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(damage((tmp_path / "w.safetensors").read_bytes()))
    with pytest.raises(WeightsError, match=r"bad\.safetensors: got .*; expected a whole safetensors file"):
        load_weights(tmp_path / "bad.safetensors")


def test_a_missing_file_and_a_nan_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match="tensor a: got 1 of 2 values"):
        WeightSet({"a": np.array([np.nan, 0.0])}).save(tmp_path / "nan.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_trace(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write_and_fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_a_scalar_keeps_its_shape_and_a_transposed_array_its_values(tmp_path):
    tensors = {"scale": np.array(2.5), "turned": np.arange(6.0).reshape(2, 3).T}
    WeightSet(tensors).save(tmp_path / "w.safetensors")
    read = load_weights(tmp_path / "w.safetensors")
    assert read.tensors["scale"].shape == ()
    np.testing.assert_array_equal(read.tensors["turned"], tensors["turned"])
    assert read.identity == WeightSet(tensors).identity


def test_other_libraries_read_a_weight_set_as_torchs_and_its_bytes_still_repeat(tmp_path):
    for number in range(3):
        sample().save(tmp_path / f"{number}.safetensors")
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(3)}) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        checksum = checksum_of(sample().identity, sample().meta)
        meta = {"modelstock": '{"a": [2], "z": 1}', "modelstock.checksum": checksum}
        assert file.metadata() == {"format": "pt", **meta}
        assert file.get_tensor("a").tolist() == [[1, 1], [1, 1]]


@given(
    st.dictionaries(
        st.text(max_size=4).filter(lambda name: name != "__metadata__"),
        arrays(st.sampled_from(["f8", "f4", "f2", "u1"]), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
        max_size=5,
    )
)
def test_files_are_laid_out_as_the_library_safetensors_lays_them_out(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("layout")
    write_arrays(folder / "ours.safetensors", tensors)
    ours = (folder / "ours.safetensors").read_bytes()
    theirs = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    length, other_length = (int.from_bytes(data[:8], "little") for data in (ours, theirs))
    assert json.loads(ours[8 : 8 + length]) == json.loads(theirs[8 : 8 + other_length])
    assert ours[8 + length :] == theirs[8 + other_length :]
    assert length % 8 == 0


def test_an_identity_is_the_sha256_of_names_dtypes_shapes_and_bytes_however_the_tensors_are_read(tmp_path):
    tensors = {"w": np.arange(300_000, dtype=np.float32), "steps": np.array(7), "mask": np.zeros((0, 2), bool)}
    steps, w = tensors["steps"].tobytes(), tensors["w"].tobytes()
    content = [b"mask\0|b1\0(0, 2)\0", b"steps\0<i8\0()\0", steps, b"w\0<f4\0(300000,)\0", w]
    spelled = hashlib.sha256(b"".join(content)).hexdigest()
    WeightSet(tensors).save(tmp_path / "w.safetensors")
    assert WeightSet(tensors).identity == spelled
    assert load_weights(tmp_path / "w.safetensors", lazy=True).identity == spelled
    assert open_checkpoint(tmp_path / "w.safetensors").identity == spelled


def test_lazy_weight_sets_hold_no_file_open_and_notice_when_theirs_is_replaced(tmp_path):
    sample().save(tmp_path / "w.safetensors")
    opened = os.listdir("/dev/fd")
    lazy = [load_weights(tmp_path / "w.safetensors", lazy=True) for _ in range(5)]
    assert len(os.listdir("/dev/fd")) == len(opened)
    assert lazy[0].nbytes == sample().nbytes == 20
    np.testing.assert_array_equal(lazy[0].tensors["b"], [0, 1, 2])
    sample().save(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors: got a file that was replaced while it was in use"):
        lazy[0].tensors["b"]


def test_bfloat16_is_read_as_the_float32_that_holds_it_and_counts_as_that(tmp_path):
    values = torch.randn(5).bfloat16()
    save_torch({"a": values}, tmp_path / "half.safetensors")
    save_torch({"a": values.float()}, tmp_path / "single.safetensors")
    half, single = (load_weights(tmp_path / f"{name}.safetensors") for name in ("half", "single"))
    np.testing.assert_array_equal(half.tensors["a"], values.float().numpy())
    assert half.identity == single.identity == open_checkpoint(tmp_path / "half.safetensors").identity


def test_a_flipped_bit_anywhere_in_a_weight_set_is_found_when_it_is_read(tmp_path):
    whole = WeightSet({"w": np.linspace(1, 2, 6, dtype=np.float32)}, {"preprocess": {"mean": [0.5]}, "parents": []})
    whole.save(tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    damaged = tmp_path / "w.safetensors"
    for place in range(len(content)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for lazy in (False, True):
            try:
                read = load_weights(damaged, lazy=lazy)
            except (WeightsError, DamagedError):  # WeightsError: the header's structure, or NaN
                continue
            # What is left are bytes that mean nothing: spaces at the header's end, or the name of a key of no use.
            assert (read.identity, read.meta) in [(whole.identity, whole.meta), (whole.identity, {})]


def test_a_header_with_a_key_twice_is_refused(tmp_path):
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = f"{{{entry},{entry}}}".encode()
    (tmp_path / "twice.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(WeightsError, match="the key 'a' twice"):
        load_weights(tmp_path / "twice.safetensors")


A, B, STEPS = (np.zeros(2, np.float32), np.zeros((2, 2), np.float32), np.array(1))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"layer.a": A, "layer.b": B, "steps": STEPS}, None),
        ({"layer.a": A.astype(np.float16), "layer.b": B, "steps": STEPS}, None),
        ({"layer.b": B, "steps": STEPS}, "layer.a missing"),
        ({"layer.a": A, "layer.b": B, "steps": STEPS, "q": A}, "q unknown"),
        ({"layer.a": B, "layer.b": B, "steps": STEPS}, "layer.a is (2, 2), the anchor's (2,)"),
        ({"layer.a": A, "layer.b": B, "steps": STEPS.astype(np.int32)}, "steps is I32, the anchor's I64"),
        ({"layer.a": A, "layer.b": B, "steps": STEPS, "bn.num_batches_tracked": STEPS + 1}, None),
        ({"layer.a": A, "layer.b": B, "steps": STEPS + 1}, "steps is an integer buffer that differs from the anchor's"),
    ],
)
def test_each_difference_between_tensors_is_one_line(changed, line):
    origin = {"layer.a": A, "layer.b": B, "steps": STEPS}
    counter = {"bn.num_batches_tracked": STEPS} if "bn.num_batches_tracked" in changed else {}
    expected = in_memory(origin | counter, {}, "anchor")
    found = stored_differences(in_memory(changed, {}, "w").tensors, expected.tensors, whose="the anchor's")
    assert found == ([] if line is None else [line])


def test_a_renamed_tensor_is_shown_with_the_missing_name_that_is_nearest_and_shapes_come_first():
    expected = {"head.bias": A, "head.weight": B, "x": A}
    found = differences({"head.bais": A, "head.weight": A, "x": A}, expected, whose="the model's")
    assert found == [
        "head.weight is (2,), the model's (2, 2)",
        "head.bias missing",
        "head.bais unknown (near head.bias)",
    ]


def test_what_made_a_weight_set_is_recorded_with_the_version():
    assert made_by(stage="finetune", options={"epochs": 2}, seed=3) == {
        "stage": "finetune",
        "seed": 3,
        "options": {"epochs": 2},
        "version": modelstock.__version__,
    }


def test_weight_sets_need_neither_torch_nor_the_library_safetensors():
    code = (
        "import sys, modelstock.weights; print([m for m in ('torch', 'safetensors', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
