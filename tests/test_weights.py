"""Weight sets: bytes that repeat, an identity that means the tensors, and refusals with names."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from modelstock.errors import WeightsError
from modelstock.files import atomic_path
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
