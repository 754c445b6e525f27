"""Merges of what is unusual: refused where the result would be wrong, else a notice that stays with the result."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modelstock.errors import DamagedError, MergeError, WeightsError
from modelstock.merging.engine import merge
from modelstock.merging.files import merge_files
from modelstock.merging.methods.table import METHODS
from modelstock.notices import Notice, collected
from modelstock.weights.weight_set import WeightSet, load_weights
from tests.support.merging import merge_with


def random(seed: int, size: int = 40, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((size, size))).astype(np.float32)


def family(parents: bool = True) -> tuple[WeightSet, list[WeightSet]]:
    """An anchor, and two updates at an angle of about 60 degrees."""
    anchor = WeightSet({"w": random(0)}, {"architecture": {}}, "anchor")
    meta = {**anchor.meta, **({"parents": [anchor.identity]} if parents else {})}
    common = random(1, scale=0.1)
    tuned = [WeightSet({"w": anchor.tensors["w"] + common + random(s, scale=0.1)}, meta, f"s{s}") for s in (2, 3)]
    return anchor, tuned


def saved(folder, *weight_sets: WeightSet) -> list:
    paths = [folder / f"{weights.source.replace(' ', '-')}.safetensors" for weights in weight_sets]
    for path, weights in zip(paths, weight_sets, strict=True):
        weights.save(path)
    return paths


# ---------------------------------------------------------------- another anchor


def test_weights_that_name_another_parent_are_refused_in_memory_and_on_disk(tmp_path):
    _, tuned = family()
    other = WeightSet({"w": random(9)}, {"architecture": {}}, "other")
    paths = saved(tmp_path, other, *tuned)
    for merged in (
        lambda: merge("model_stock", other, tuned),
        lambda: merge_files("model_stock", paths[0], paths[1:], tmp_path / "out.safetensors"),
    ):
        with pytest.raises(MergeError, match=r"s2.*: got weights made from \w{12}; expected from the anchor .*other"):
            merged()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("architecture", {"quick_gelu": True}, r"another architecture \(quick_gelu\)"),
        ("preprocess", {"mean": [0.1]}, r"another preprocessing \(mean\)"),
        ("classes_sha256", "b" * 64, r"another classes \(bbbbbbbbbbbb, not aaaaaaaaaaaa\)"),
    ],
)
def test_weights_that_say_they_are_of_something_else_are_refused(key, value, line):
    anchor, tuned = family(parents=False)
    meta = {"architecture": {}, "preprocess": {"mean": [0.5]}, "classes_sha256": "a" * 64}
    other = [WeightSet(w.tensors, {**meta, key: value}, w.source) for w in tuned]
    with pytest.raises(MergeError, match=line):
        merge("uniform", WeightSet(anchor.tensors, meta, "anchor"), other)


def test_a_damaged_weight_set_is_shown_and_named(tmp_path):
    (path,) = saved(tmp_path, family()[0])
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for more in ([], ["--json"]):
        command = [sys.executable, "-m", "modelstock.cli", "inspect", str(path), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, "40x40" in done.stdout) == (1, True)
        assert done.stderr.startswith(f"error: {path}: got tensors")


def test_foreign_checkpoints_whose_updates_all_point_one_way_are_a_notice_that_stays_with_the_merge(tmp_path):
    anchor, tuned = family(parents=False)
    other = WeightSet({"w": random(9)}, {}, "other")
    paths = saved(tmp_path, other, *tuned)
    with pytest.warns(Notice, match=r"mean cosine of 0\.9\d\d, as if the checkpoints had been fine-tuned from another"):
        merge_files("model_stock", paths[0], paths[1:], tmp_path / "out.safetensors")
    (line,) = load_weights(tmp_path / "out.safetensors").meta["notices"]
    assert line.startswith(f"{paths[0]}: the updates from it")
    with collected() as notices:
        merge("model_stock", anchor, tuned)
    assert notices == []


def test_statistics_of_other_weights_are_refused_in_memory_and_on_disk(tmp_path):
    anchor, tuned = family()
    swapped = [WeightSet({"w": abs(w.tensors["w"])}, {"of": w.identity}, f"of {w.source}") for w in reversed(tuned)]
    paths = saved(tmp_path, anchor, *tuned)
    measured = saved(tmp_path, *swapped)
    for merged in (
        lambda: merge("fisher", anchor, tuned, statistics=swapped),
        lambda: merge_files("fisher", paths[0], paths[1:], tmp_path / "out.safetensors", statistics=measured),
    ):
        with pytest.raises(MergeError, match=r"of.s3.*: got statistics of \w+; expected those of .*s2"):
            merged()


def test_a_damaged_weight_set_is_merged_by_nobody(tmp_path):
    paths = saved(tmp_path, family()[0], *family()[1])
    content = bytearray(paths[1].read_bytes())
    content[-3] ^= 1
    paths[1].write_bytes(content)
    with pytest.raises(
        DamagedError, match=r"s2\.safetensors: got tensors \w{12} or metadata that are not those it was"
    ):
        merge_files("uniform", paths[0], paths[1:], tmp_path / "out.safetensors")


# ---------------------------------------------------------------- precisions


def stored(folder, dtype: torch.dtype, name: str, array: np.ndarray):
    path = folder / f"{name}_{str(dtype).removeprefix('torch.')}.safetensors"
    save_file({"w": torch.from_numpy(array).to(dtype)}, path)
    return path


@pytest.mark.parametrize(
    ("anchor_dtype", "dtype", "lines"),
    [
        (torch.float32, torch.float32, []),
        (torch.bfloat16, torch.float32, ["are of another precision", "updates near the rounding"]),
        (torch.float32, torch.bfloat16, ["are of another precision", "updates near the rounding"]),
        (torch.float16, torch.float32, ["are of another precision", "updates near the rounding"]),
        (torch.bfloat16, torch.bfloat16, ["updates near the rounding"]),
    ],
)
def test_updates_near_the_rounding_of_a_stored_precision_are_a_notice(tmp_path, anchor_dtype, dtype, lines):
    origin = random(0, 512, 0.02)
    anchor = stored(tmp_path, anchor_dtype, "w0", origin)
    tuned = [stored(tmp_path, dtype, f"s{s}", origin + random(s, 512, 3e-5)) for s in (1, 2)]
    with collected() as notices, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *arguments, **words: None)
        merge_files("model_stock", anchor, tuned, tmp_path / "out.safetensors")
    assert [line in notice for line, notice in zip(lines, notices, strict=True)] == [True] * len(lines)


def test_the_estimate_of_rounding_is_the_rounding(tmp_path):
    origin = random(0, 300, 0.02)
    bits = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    for dtype, name in bits.items():
        rounded = torch.from_numpy(origin).to(dtype).float().numpy()
        anchor = stored(tmp_path, dtype, "w0", origin)
        tuned = [stored(tmp_path, torch.float32, f"s{s}", rounded + random(s, 300, 1e-6)) for s in (1, 2)]
        with pytest.warns(Notice, match=f"rounding to {name}") as given:
            merge_files("uniform", anchor, tuned, tmp_path / "out.safetensors", overwrite=True)
        text = next(str(one.message) for one in given if "rounding to" in str(one.message))
        estimate = float(text.partition(f"rounding to {name} ")[2].partition(";")[0])
        assert estimate == pytest.approx(np.linalg.norm(rounded.astype(np.float64) - origin), rel=0.15)


def test_a_merge_in_bfloat16_is_read_by_everything_of_ours(tmp_path):
    anchor, tuned = family()
    paths = saved(tmp_path, anchor, *tuned)
    out = tmp_path / "out.safetensors"
    merge_files("uniform", paths[0], paths[1:], out, dtype="BF16")
    whole = merge("uniform", anchor, tuned)[0].tensors["w"]
    np.testing.assert_allclose(load_weights(out).tensors["w"], whole, rtol=2**-8)
    assert load_file(out)["w"].dtype == torch.bfloat16
    # As an anchor of a further merge it is its own parent's exact value.
    further = WeightSet({"w": whole + 1}, {"architecture": {}, "parents": [load_weights(out).identity]}, "further")
    merge_files("uniform", out, saved(tmp_path, further), tmp_path / "again.safetensors")


# ---------------------------------------------------------------- BatchNorm


def batch_norm(seed: int, count: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layer = torch.nn.BatchNorm2d(4)
    for _ in range(count):
        layer(torch.randn(8, 4, 3, 3) + seed)
    with torch.no_grad():
        layer.weight += 0.1 * seed
    return {f"bn.{name}": tensor for name, tensor in layer.state_dict().items()} | {"w": torch.randn(3, 4)}


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.kind != "search" and not row.needs])
def test_running_statistics_are_averaged_by_every_method_and_counters_are_the_largest(tmp_path, method):
    states = [batch_norm(seed, count) for seed, count in ((0, 1), (1, 7), (2, 5))][: 1 + (METHODS[method].most or 2)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    options = {"weights": [1, 2]} if method == "weighted" else {}
    with pytest.warns(Notice, match="BatchNorm: 2 running statistics are averaged"):
        plan = merge_files(method, paths[0], paths[1:], tmp_path / "out.safetensors", options=options)
    merged = load_file(tmp_path / "out.safetensors")
    for name in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(merged[name], torch.stack([state[name] for state in states[1:]]).mean(dim=0))
        assert plan.report[name]["running statistic"] == "averaged"
    assert merged["bn.num_batches_tracked"] == 7


def test_excluded_batch_norm_keeps_the_anchors_and_is_not_compared(tmp_path):
    states = [batch_norm(seed, count) for seed, count in ((0, 1), (1, 7), (2, 5))]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    merge_files("uniform", paths[0], paths[1:], tmp_path / "out.safetensors", exclude=["bn.*"])
    merged = load_file(tmp_path / "out.safetensors")
    for name in ("bn.running_mean", "bn.running_var", "bn.weight", "bn.num_batches_tracked"):
        assert torch.equal(merged[name], states[0][name])


def test_a_greedy_soup_averages_the_running_statistics_of_those_it_takes():
    anchor = WeightSet({"w": random(0), "bn.running_mean": np.zeros(2, np.float32)})
    tuned = [
        WeightSet({"w": anchor.tensors["w"] + shift, "bn.running_mean": np.full(2, shift, np.float32)}, {}, f"s{shift}")
        for shift in (1, 2, 40)
    ]
    score = lambda trials: [-abs(float((w.tensors["w"] - anchor.tensors["w"]).mean()) - 1.5) for w in trials]  # noqa: E731
    merged, report = merge_with("greedy", anchor, tuned, score=score)
    assert sorted(report["w"]["chosen"]) == ["s1", "s2"]
    np.testing.assert_allclose(merged.tensors["bn.running_mean"], 1.5)


# ---------------------------------------------------------------- what is not in all, or not finite


def test_a_tensor_that_is_excluded_may_be_missing_or_unknown_and_the_anchors_is_kept(tmp_path):
    states = [{"w": torch.randn(3, 3), "lm_head.weight": torch.randn(2, 3)} for _ in range(3)]
    del states[1]["lm_head.weight"]
    states[2]["extra"] = torch.ones(1)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    out = tmp_path / "out.safetensors"
    with pytest.raises(MergeError, match=r"got lm_head\.weight missing; .*what it shall keep of the anchor, --exclude"):
        merge_files("uniform", paths[0], paths[1:], out)
    merge_files("uniform", paths[0], paths[1:], out, exclude=["lm_head*", "extra"])
    assert torch.equal(load_file(out)["lm_head.weight"], states[0]["lm_head.weight"])
    assert sorted(load_file(out)) == ["lm_head.weight", "w"]


def test_buffers_that_are_not_finite_are_copied_where_all_are_equal_and_refused_where_not(tmp_path):
    mask = torch.full((4, 4), float("-inf")).triu(1)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        save_file({"mask": mask, "w": torch.randn(3, 3)}, path)
    out = tmp_path / "out.safetensors"
    for method in ("model_stock", "ties", "slerp"):
        with pytest.warns(Notice, match="tensor mask: 6 of 16 values are not finite, the same in all checkpoints"):
            merge_files(method, paths[0], paths[1:], out, overwrite=True)
        assert torch.equal(load_file(out)["mask"], mask)
    save_file({"mask": mask.nan_to_num(), "w": torch.randn(3, 3)}, paths[2])
    with pytest.raises(WeightsError, match=r"tensor mask: got 6 of 16 values NaN or infinite"):
        merge_files("model_stock", paths[0], paths[1:], out, overwrite=True)
    with pytest.warns(Notice, match=r"0\.safetensors, tensor mask: kept, with 6 of 16 values that are not finite"):
        merge_files("model_stock", paths[0], paths[1:], out, overwrite=True, exclude=["mask"])


@pytest.mark.parametrize("method", ["ties", "ties_votes", "magnitude"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_small_density_keeps_one_value_of_a_small_tensor(method, size):
    anchor = WeightSet({"w": random(0), "scale": np.zeros(size, np.float32)})
    tuned = [WeightSet({"w": random(s), "scale": np.arange(1, size + 1, dtype=np.float32)}) for s in (1, 2)]
    merged, _ = merge_with(method, anchor, tuned, density=0.2)
    np.testing.assert_array_equal(merged.tensors["scale"], [0] * (size - 1) + [size])


def test_the_command_reports_notices_on_stderr_and_in_json(tmp_path):
    _, tuned = family(parents=False)
    paths = saved(tmp_path, WeightSet({"w": random(9)}, {}, "other"), *tuned)
    command = ["merge", "--anchor", paths[0], *paths[1:], "-o", tmp_path / "out.safetensors", "--json"]
    done = subprocess.run([sys.executable, "-m", "modelstock.cli", *map(str, command)], capture_output=True, text=True)
    shown = json.loads(done.stdout)
    assert shown["rows"][0]["dtype"] == "float32"
    (line,) = shown["notices"]
    assert done.stderr == f"notice: {line}\n"
