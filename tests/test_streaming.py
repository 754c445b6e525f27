"""Merging files: any checkpoint in, the in-memory path's bytes out, and a refusal for everything that is wrong."""

import contextlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from modelstock.errors import MergeError, ModelstockError, RoomError, WeightsError
from modelstock.merging import kernels
from modelstock.merging.files import merge_files
from modelstock.merging.methods.table import METHODS
from modelstock.weights.checkpoints import open_checkpoint
from modelstock.weights.format import parse_header
from modelstock.weights.tensors import FLOATS, narrow, widen
from modelstock.weights.weight_set import WeightSet, load_weights
from tests.support.merging import merge_files_with, merge_with

ROOT = Path(__file__).parent.parent


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        "conv.weight": (4, 3, 2, 2),
        "big": (70, 50),
        "bias": (5,),
        "scale": (),
        "empty": (0, 3),
        "block.1.w": (3, 4),
    }
    base = {k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return base | {"half": random.standard_normal(7).astype(np.float16), "steps": np.array([7])}


@pytest.fixture
def files(tmp_path):
    """An anchor and two fine-tuned files beside each other."""
    anchor, paths = arrays(0), []
    for seed in range(3):
        tensors = {
            k: v + 0.1 * arrays(seed)[k].astype(v.dtype) if v.dtype.kind == "f" else v for k, v in anchor.items()
        }
        tensors = {k: np.asarray(v, anchor[k].dtype) for k, v in (anchor if seed == 0 else tensors).items()}
        paths.append(tmp_path / f"w{seed}.safetensors")
        WeightSet(tensors, {"note": seed}).save(paths[-1])
    return paths


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("workers", [1, 3])
def test_streamed_equals_in_memory_bit_for_bit_at_any_number_of_workers(files, tmp_path, method, workers, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 1000)  # so that tensors are really cut
    options = {"weights": [1, 2]} if method == "weighted" else {}
    files = files[: 1 + (METHODS[method].most or 2)]
    needs, tuned = METHODS[method].needs, [load_weights(f) for f in files[1:]]
    kept: dict[str, list] = {}
    if METHODS[method].reads_statistics:
        random = np.random.default_rng(0)
        shapes = {k: v.shape for k, v in tuned[0].tensors.items() if needs == "fisher" and v.dtype.kind == "f"}
        made = [
            {k: random.random(s).astype(np.float32) for k, s in (shapes or {"big": (50, 50)}).items()} for _ in tuned
        ]
        paths = [tmp_path / f"statistics{i}.safetensors" for i in range(2)]
        for path, tensors in zip(paths, made, strict=True):
            WeightSet(tensors).save(path)
        kept = {"on disk": paths, "in memory": [load_weights(p) for p in paths]}
    elif needs == "score":
        options["score"] = lambda trials: [-float(np.square(w.tensors["big"] - 0.3).sum()) for w in trials]
    elif needs == "gradient":
        options["gradient"] = lambda w: (
            sum(float(np.square(v - 0.3).sum()) for v in w.tensors.values() if v.dtype.kind == "f"),
            {k: 2 * (v - 0.3) for k, v in w.tensors.items() if v.dtype.kind == "f"},
        )
    merge_files_with(
        method,
        files[0],
        files[1:],
        tmp_path / "out.safetensors",
        workers=workers,
        statistics=kept.get("on disk", []),
        **options,
    )
    expected, _ = merge_with(method, load_weights(files[0]), tuned, statistics=kept.get("in memory", []), **options)
    found = load_weights(tmp_path / "out.safetensors")
    assert found.identity == expected.identity
    assert found.meta["made_by"]["method"] == method
    assert found.meta["note"] == 0


def test_the_output_has_the_bytes_of_the_same_weight_set_saved(files, tmp_path):
    for file in files:  # a file that names its architecture is a weight set of ours, with a checksum
        weights = load_weights(file)
        WeightSet(weights.tensors, {"architecture": {}}).save(file)
    merge_files("uniform", files[0], files[1:], tmp_path / "out.safetensors")
    load_weights(tmp_path / "out.safetensors").save(tmp_path / "again.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_include_exclude_and_dtype(files, tmp_path):
    anchor = load_file(files[0])
    merge_files(
        "uniform", *files[:1], files[1:], tmp_path / "o.safetensors", include=["b*"], exclude=["bias"], dtype="F64"
    )
    found = load_file(tmp_path / "o.safetensors")
    assert {v.dtype for k, v in found.items() if k != "steps"} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(found["bias"], anchor["bias"])
    assert not np.array_equal(found["big"], anchor["big"])
    with pytest.raises(MergeError, match=r"the glob 'visual\.\*'; expected one that matches"):
        merge_files("uniform", files[0], files[1:], tmp_path / "p.safetensors", include=["visual.*"])


# ---------------------------------------------------------------- what can be read


def torch_state(file: Path) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v.copy()) for k, v in load_file(file).items()}


@pytest.mark.parametrize("form", ["open_clip", "plain", "legacy", "sharded", "hf folder", "lone file in a folder"])
def test_every_form_of_checkpoint_reads_as_the_same_tensors(files, tmp_path, form):
    source, place = files[1], tmp_path / "other"
    place.mkdir()
    state = torch_state(source)
    if form == "open_clip":
        path = place / "epoch_10.pt"
        torch.save({"epoch": 10, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}}, path)
    elif form in ("plain", "legacy"):
        path = place / "weights.bin"
        torch.save(state, path, _use_new_zipfile_serialization=form == "plain")
    elif form == "sharded":
        names = sorted(state)
        parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
        for file, keys in parts.items():
            save_torch({k: state[k] for k in keys}, place / file)
        path = place / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {k: file for file, keys in parts.items() for k in keys}}))
    else:
        path = place
        name = "open_clip_model.safetensors" if form == "hf folder" else "anything.safetensors"
        (place / name).write_bytes(source.read_bytes())
    found = open_checkpoint(path)
    expected = open_checkpoint(source)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(found.tensors[name].read(0, tensor.size), tensor.read(0, tensor.size))


def test_bfloat16_is_widened_exactly_and_rounded_as_torch_rounds(tmp_path):
    random = np.random.default_rng(0)
    values = np.concatenate(
        [random.standard_normal(2000), random.standard_normal(500) * 1e-40, [0.0, -0.0, 1.0, 3.38e38]]
    )
    stored = narrow(values, "BF16")
    expected = torch.from_numpy(values).to(torch.float32).to(torch.bfloat16)
    np.testing.assert_array_equal(widen(stored, "BF16"), expected.double().numpy())
    save_torch({"w": expected}, tmp_path / "w.safetensors")
    torch.save({"w": expected}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        tensor = open_checkpoint(tmp_path / name).tensors["w"]
        assert tensor.dtype == "BF16"
        np.testing.assert_array_equal(widen(tensor.read(0, tensor.size), "BF16"), expected.double().numpy())


@pytest.mark.parametrize(("dtype", "value"), [("BF16", 3.4e38), ("F16", 65530.0), ("F32", 1e39)])
def test_rounding_to_infinity_is_an_error(dtype, value):
    with pytest.raises(FloatingPointError):
        narrow(np.array([1.0, value]), dtype)


def test_rounding_to_bfloat16_is_one_rounding_not_two():
    """1 + 2^-8 + 2^-40 lies above the tie of 1 and 1 + 2^-7; by way of float32 it would fall onto the tie, and to 1."""
    value = np.array([1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40), 1 + 2**-8])
    np.testing.assert_array_equal(widen(narrow(value, "BF16"), "BF16"), [1 + 2**-7, -(1 + 2**-7), 1.0])


# ---------------------------------------------------------------- what is refused


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def broken(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    whole = (tmp_path / "w1.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])

    def rewritten(change):
        change(header)
        raw = json.dumps(header).encode()
        return struct.pack("<Q", len(raw)) + raw + whole[8 + length :]

    content = {
        "truncated": lambda: whole[:-3],
        "empty": lambda: b"",
        "longer": lambda: whole + b"x",
        "huge header": lambda: struct.pack("<Q", 2**60) + whole[8:],
        "no json": lambda: struct.pack("<Q", 8) + b"{{{{{{{{",
        "dtype": lambda: rewritten(lambda h: h["bias"].update(dtype="F3")),
        "shape": lambda: rewritten(lambda h: h["bias"].update(shape=[6])),
        "negative": lambda: rewritten(lambda h: h["bias"].update(shape=[-5])),
        "overlap": lambda: rewritten(lambda h: h["bias"].update(data_offsets=h["big"]["data_offsets"])),
        "list": lambda: struct.pack("<Q", 8) + b"[1,2,3] ",
        "entry": lambda: rewritten(lambda h: h.update(bias=3)),
    }[kind]()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        "longer",
        "huge header",
        "no json",
        "dtype",
        "shape",
        "negative",
        "overlap",
        "list",
        "entry",
    ],
)
def test_a_broken_file_is_refused_by_name_and_nothing_is_written(files, tmp_path, kind):
    bad = broken(tmp_path, kind)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(WeightsError, match=r"bad\.safetensors"):
        merge_files("uniform", files[0], [files[1], bad], tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 220), st.data())
def test_no_bytes_make_the_header_parser_fail_otherwise(tmp_path_factory, noise, position, data):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": np.zeros(3, np.float32), "b": np.zeros((2, 2))}, folder / "w.safetensors")
    content = bytearray((folder / "w.safetensors").read_bytes())
    content[position : position + data.draw(st.integers(0, 8))] = noise
    (folder / "w.safetensors").write_bytes(content)
    try:
        parse_header(folder / "w.safetensors")
        found = open_checkpoint(folder / "w.safetensors")
        assert all(tensor.read(0, tensor.size).size == tensor.size for tensor in found.tensors.values())
    except ModelstockError:
        pass


@settings(max_examples=80, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(st.sampled_from(["weight_map", "a", "../a", "w.safetensors"]), c, max_size=3)
        ),
    )
)
def test_no_index_makes_the_reader_fail_otherwise_or_leave_its_folder(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with contextlib.suppress(ModelstockError):
        assert open_checkpoint(folder).tensors == {}


def test_a_file_of_torchs_under_the_wrong_name_says_so(files, tmp_path):
    torch.save(torch_state(files[1]), tmp_path / "renamed.safetensors")
    with pytest.raises(WeightsError, match=r"renamed\.safetensors: got a zip archive, .*; rename it to \.pt"):
        open_checkpoint(tmp_path / "renamed.safetensors")


def test_a_malicious_pickle_does_not_run_and_a_pickled_module_says_what_to_do(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("evil.pt", "evil2.pt", "module.pt"):
        with pytest.raises(WeightsError, match=rf"{name}: got .*torch.save\(model.state_dict\(\)"):
            open_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_paths_that_cannot_be_merged_are_refused(files, tmp_path):
    out, taken = tmp_path / "out.safetensors", tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    link = tmp_path / "link.safetensors"
    link.symlink_to(files[1])
    (tmp_path / "folder").mkdir()
    cases = [
        ([files[1], link], out, "the same file as .*w1"),
        ([files[1], files[0]], out, "the same file as .*w0"),
        (files[1:], taken, "got a file that exists; expected a new one; use --overwrite"),
        (files[1:], files[1], "got an input as output"),
        (files[1:], tmp_path / "out.bin", r"the suffix '\.bin'"),
        ([tmp_path / "absent"], out, "absent: got no such file"),
        ([files[1], tmp_path / "folder"], out, "a folder without weights"),
    ]
    for tuned, target, message in cases:
        with pytest.raises(ModelstockError, match=message):
            merge_files("uniform", files[0], tuned, target)
    assert taken.read_bytes() == b"mine"
    assert not out.exists()
    merge_files("uniform", files[0], files[1:], taken, overwrite=True)
    assert load_weights(taken).tensors.keys() == load_weights(files[0]).tensors.keys()


def test_a_full_disk_is_found_before_writing(files, tmp_path, monkeypatch):
    monkeypatch.setattr("modelstock.merging.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(RoomError, match=r"got 100 free bytes; expected \d"):
        merge_files("uniform", files[0], files[1:], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modelstock.merging.files.os.pwrite", full)
    with pytest.raises(RoomError, match=r"got No space left on device, .* bytes free; expected room for it; make room"):
        merge_files("uniform", files[0], files[1:], tmp_path / "out.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in files}


@pytest.mark.parametrize("place", ["exists.json", "w1.safetensors", "out.safetensors", "folder"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(files, tmp_path, place):
    (tmp_path / "exists.json").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MergeError, match=place):
        merge_files("uniform", files[0], files[1:], tmp_path / "out.safetensors", report=tmp_path / place)
    assert not (tmp_path / "out.safetensors").exists()
    assert (tmp_path / "exists.json").read_text() == "mine"


def test_progress_grows_to_the_whole(files, tmp_path):
    told = []
    merge_files(
        "uniform", files[0], files[1:], tmp_path / "out.safetensors", progress=lambda *now: told.append(now), workers=3
    )
    total = sum(t.size for t in open_checkpoint(files[0]).tensors.values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {of for _, of in told} == {2 * total}
    assert 2 * total - told[-1][0] <= 1  # integer buffers are read once, when they are compared


def test_killed_while_writing_leaves_no_file_or_the_whole_one(tmp_path):
    random = np.random.default_rng(0)
    for i in range(3):
        save_file(
            {f"t{k}": random.standard_normal(400_000).astype(np.float32) for k in range(20)},
            tmp_path / f"{i}.safetensors",
        )
    command = [
        sys.executable,
        "-m",
        "modelstock.cli",
        "merge",
        "--anchor",
        "0.safetensors",
        "1.safetensors",
        "2.safetensors",
        "-o",
        "out.safetensors",
        "--overwrite",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    whole = (tmp_path / "out.safetensors").read_bytes()
    (tmp_path / "out.safetensors").unlink()
    killed = 0
    for delay in (0.15, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "out.safetensors").exists():
            assert (tmp_path / "out.safetensors").read_bytes() == whole
    assert killed


# ---------------------------------------------------------------- the command


def command(folder, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "modelstock.cli", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def test_the_command_merges_inspects_and_compares(files, tmp_path):
    done = command(
        tmp_path, "merge", "--anchor", files[0], *files[1:], "-o", "out.safetensors", "--report", "r.json", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["tensors"] == 7
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["big"]) >= {"norms", "cosine", "ratio", "flag"}
    shown = json.loads(command(tmp_path, "inspect", "out.safetensors", "--json").stdout)
    assert shown["meta"]["made_by"]["files"] == [{"name": f.name, "bytes": f.stat().st_size} for f in files]
    assert "parents" not in shown["meta"]  # to hash foreign files takes longer than to merge them
    done = command(tmp_path, "merge", "--identify", "--anchor", files[0], *files[1:], "-o", "known.safetensors")
    known = json.loads(command(tmp_path, "inspect", "known.safetensors", "--json").stdout)["meta"]["parents"]
    own = [load_weights(f).identity for f in files]
    assert known == [own[0], *sorted(own[1:])]
    assert own[0] in command(tmp_path, "inspect", "known.safetensors").stdout
    assert all(row["finite"] for row in shown["tensors"])
    rows = json.loads(command(tmp_path, "diff", files[1], files[2], "--anchor", files[0], "--json").stdout)["rows"]
    big = next(row for row in rows if row["tensor"] == "big")
    w = [load_file(f)["big"].astype(np.float64).ravel() for f in files]
    assert big["distance"] == pytest.approx(np.linalg.norm(w[1] - w[2]))
    cosine = (w[1] - w[0]) @ (w[2] - w[0]) / np.linalg.norm(w[1] - w[0]) / np.linalg.norm(w[2] - w[0])
    assert big["cosine"] == pytest.approx(cosine)
    listed = json.loads(command(tmp_path, "methods", "--json").stdout)["rows"]
    assert [row["method"] for row in listed] == list(METHODS)
    assert all(row["formula"] and row["source"] for row in listed)
    assert "model_stock" in command(tmp_path, "methods").stdout
    assert "conv.weight" in command(tmp_path, "inspect", files[0]).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "model_stok"], "error: method: got 'model_stok'; expected model_stock, tuned_stock"),
        (["--set", "alfa=0.3", "--method", "wise_ft"], "did you mean alpha?"),
        (["--set", "alpha"], "error: --set: got 'alpha'; expected option=value"),
        (["--set", "clip=never"], "option clip: got 'never'; expected unit or none"),
        (["--set", "workers=7"], "method model_stock, option workers: got no such option"),
        (["--set", "scale=big"], "option scale: got 'big'; expected a number"),
        (
            ["--method", "weighted", "--set", "weights=5"],
            "option weights: got 5; expected a number for each checkpoint, their sum not 0",
        ),
        (["--method", "slerp", "--granularity", "layer"], "granularity: got 'layer'; expected tensor, filter or model"),
        (["--dtype", "float8"], "error: --dtype: got 'float8'"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(files, tmp_path, arguments, message):
    done = command(tmp_path, "merge", "--anchor", files[0], *files[1:], "-o", "out.safetensors", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert message in done.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_merging_imports_neither_torch_nor_the_pipelines_tools(files, tmp_path):
    code = (
        "import sys; from pathlib import Path; from modelstock.merging.files import merge_files;"
        "import modelstock.cli.app;"
        "p = [Path(f'w{i}.safetensors') for i in range(3)];"
        "merge_files('model_stock', p[0], p[1:], Path('o.safetensors'));"
        "print([m for m in ('torch', 'prefect', 'dvc', 'mlflow', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert set(FLOATS) == {"F64", "F32", "F16", "BF16"}
