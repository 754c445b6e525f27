"""`modelstock geometry` on files: what it writes, what it refuses, snapshots, and what it does without the extras."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.errors import MergeError, ModelstockError, WeightsError
from modelstock.files import is_intact
from modelstock.geometry import figures, page
from modelstock.geometry.measure import labels_of, measure, measure_files
from modelstock.geometry.page import write_geometry
from modelstock.geometry.steps import by_step, measure_steps
from modelstock.merging import kernels
from modelstock.weights.tensors import in_memory
from modelstock.weights.weight_set import WeightSet, load_weights

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- files


def saved(folder: Path, count: int = 5, **changes: object) -> list[Path]:
    """An anchor and seeds of three types of tensors, an integer buffer and a running statistic, as files."""
    shapes = {"blocks.0.attn.weight": (300, 400), "blocks.1.ln.bias": (30,), "head.weight": (4, 30)}
    random = np.random.default_rng(0)
    origin = {name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    common = {name: 0.1 * random.standard_normal(shape) for name, shape in shapes.items()}
    rest = {"steps": np.array([7]), "bn.running_mean": np.ones(3, "f4")}
    anchor = WeightSet({**origin, **rest}, {"architecture": {}}, "anchor")
    paths = [folder / "anchor.safetensors"]
    anchor.save(paths[0])
    for number in range(count):
        tensors = {
            name: (value + common[name] + 0.1 * random.standard_normal(value.shape)).astype("f4")
            for name, value in origin.items()
        }
        paths.append(folder / f"{number}/weights.safetensors")
        WeightSet({**tensors, **rest}, {"architecture": {}, "parents": [anchor.identity], **changes}).save(paths[-1])
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_the_same_bytes_at_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "RUN", 1 << 15)
    monkeypatch.setattr(kernels, "CHUNK", 1 << 13)
    anchor, *tuned = saved(tmp_path)
    for workers in (1, 2):
        write_geometry(tmp_path / f"out{workers}", measure_files(anchor, tuned, workers=workers))
    one, two = contents(tmp_path / "out1"), contents(tmp_path / "out2")
    assert one == two
    assert set(one) == {"geometry.json", "geometry.md", "tensors.csv", *figures.DRAWERS, "oracle.png"}
    assert all(one[name].startswith(b"\x89PNG") for name in one if name.endswith(".png"))


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_the_command_writes_every_claim_with_its_number(tmp_path):
    anchor, *tuned = map(str, saved(tmp_path, 7))
    words = ["geometry", "--anchor", anchor, *tuned[:5], "--centre", tuned[5], "--centre", tuned[6]]
    words += ["--exclude", "head.*", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out/geometry.json").read_text())
    assert is_intact(written)
    assert json.loads(done.stdout[done.stdout.index("{") :])["claims"] == written["claims"]
    text = (tmp_path / "out/geometry.md").read_text()
    for one in written["claims"]:
        assert one["title"] in text
        assert one["verdict"] in text
    assert (written["seeds"], written["centre"]) == (["0", "1", "2", "3", "4"], ["5", "6"])
    assert [file["source"] for file in written["files"]] == ["anchor.safetensors", *["weights.safetensors"] * 7]
    assert all(len(file["identity"]) == 64 for file in written["files"])
    assert [row["n"] for row in written["ratios"]] == [2, 3, 4, 5]
    with open(tmp_path / "out/tensors.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["tensor"] for row in rows] == ["blocks.0.attn.weight", "blocks.1.ln.bias"]
    assert float(rows[0]["angle_mean"]) == pytest.approx(60, abs=2)
    assert CliRunner().invoke(app, words).exception is not None  # the folder exists
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_weights_in_memory_are_measured_as_files_are(tmp_path):
    paths = saved(tmp_path, 3)
    sets = [load_weights(path) for path in paths]
    here = measure(
        *[in_memory(sets[0].tensors, sets[0].meta, "w0")], [in_memory(w.tensors, w.meta, w.source) for w in sets[1:]]
    )
    there = measure_files(paths[0], paths[1:])
    assert here.grams.keys() == there.grams.keys()
    assert all((here.grams[name] == there.grams[name]).all() for name in here.grams)


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_a_measurement_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    anchor, *tuned = saved(tmp_path, 2)
    geometry = measure_files(anchor, tuned)
    monkeypatch.setattr(page, "draw", lambda *measured: {})
    write_geometry(tmp_path / "out", geometry)
    before = contents(tmp_path / "out")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelstockError, match="make room"):
        write_geometry(tmp_path / "out", geometry, overwrite=True)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "anchor.safetensors", "out"]


def test_labels_are_what_tells_the_files_apart():
    assert labels_of([Path("m/f/0/weights.safetensors"), Path("m/f/1/weights.safetensors")]) == ["0", "1"]
    assert labels_of([Path("a.safetensors"), Path("b/c.safetensors")]) == ["a", "b/c"]
    assert labels_of([Path("m/one.safetensors")]) == ["one"]
    assert labels_of([Path("runs/v1.5"), Path("runs/v1.6")]) == ["v1.5", "v1.6"]


# ---------------------------------------------------------------- refusals


def refused(folder: Path, *words: object) -> str:
    done = CliRunner().invoke(app, ["geometry", *map(str, words), "-o", str(folder / "out")])
    assert isinstance(done.exception, ModelstockError), done.output
    assert not (folder / "out").exists()
    return str(done.exception)


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_what_merging_refuses_is_refused(tmp_path):
    anchor, first, second, third = saved(tmp_path, 3)
    given = ("--anchor", anchor)
    assert "expected 2 or more" in refused(tmp_path, *given, first)
    assert "the same file as" in refused(tmp_path, *given, first, second, first)
    assert "the same file as" in refused(tmp_path, *given, first, second, "--centre", first)
    assert "the same file as" in refused(tmp_path, *given, first, anchor)
    assert "no such file" in refused(tmp_path, *given, first, tmp_path / "none.safetensors")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(third.read_bytes())
    assert "the same tensors as" in refused(tmp_path, *given, first, third, copy)
    assert "a glob that matches" not in refused(tmp_path, *given, first, second, "--include", "no.*")
    assert "--over" in refused(tmp_path, *given, first, second, "--over", "epochs")
    assert "--centre" in refused(tmp_path, *given, first, second, "--over", "steps", "--centre", third)
    other = tmp_path / "other.safetensors"
    WeightSet({"w": np.ones(3)}, {}).save(other)
    assert "blocks.0.attn.weight missing" in refused(tmp_path, *given, first, other)
    assert "weights made from" in refused(tmp_path, "--anchor", third, first, second)


def test_seeds_that_are_all_the_anchor_in_part_are_refused():
    sets = [
        in_memory({"a": np.array(a), "b": np.array(b)}, {}, name)
        for name, a, b in (("w0", [0.0, 0], [0.0, 0]), ("one", [1.0, 0], [0.0, 0]), ("two", [0.0, 0], [1.0, 0]))
    ]
    with pytest.raises(MergeError, match="no tensor of more than one value that every seed changed"):
        measure(sets[0], sets[1:])


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    anchor, *tuned = saved(tmp_path, 2)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    words = ["geometry", "--anchor", str(anchor), *map(str, tuned), "-o", str(mine)]
    for options in ([], ["--overwrite"]):
        assert isinstance(CliRunner().invoke(app, [*words, *options]).exception, MergeError)
    assert contents(mine) == {"notes.txt": b"mine"}


@pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
def test_every_file_that_is_written_is_one_that_may_be_replaced(tmp_path):
    anchor, *tuned = saved(tmp_path, 3)
    geometry = measure_files(anchor, tuned)
    assert set(figures.figures(geometry, {1: geometry})) == set(page.PICTURES)


# ---------------------------------------------------------------- steps


def snapshots(folder: Path, *, ours: bool, seeds: int = 4) -> list[Path]:
    """Snapshots of runs that go on in one direction: norms grow with the step, angles stay."""
    random = np.random.default_rng(0)
    origin, common = random.standard_normal((2, 60, 50))
    anchor = WeightSet({"blocks.0.mlp.weight": origin}, {}, "anchor")
    anchor.save(folder / "anchor.safetensors")
    paths = []
    for seed in range(seeds):
        update = common + random.standard_normal(origin.shape)
        for step in (1, 2, 10):
            meta = {"made_by": {"stage": "finetune", "seed": seed, "options": {"epoch": step}}} if ours else {}
            name = f"file-{len(paths)}" if ours else f"run-{seed}/epoch-{step}"
            paths.append(folder / f"{name}.safetensors")
            WeightSet({"blocks.0.mlp.weight": origin + step * update}, meta).save(paths[-1])
    return paths


@pytest.mark.parametrize("ours", [True, False])
def test_snapshots_are_grouped_by_seed_and_step(tmp_path, ours):
    steps = by_step(snapshots(tmp_path, ours=ours))
    assert list(steps) == [1, 2, 10]
    labels = ["0", "1", "2", "3"] if ours else ["run-0", "run-1", "run-2", "run-3"]
    assert all(list(seeds) == labels for seeds in steps.values())


def test_claim_four_is_decided_at_every_step(tmp_path):
    paths = snapshots(tmp_path, ours=False)
    words = ["geometry", "--anchor", str(tmp_path / "anchor.safetensors"), *map(str, paths), "--over", "steps"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out/geometry.json").read_text())
    (four,) = (one for one in written["claims"] if one["artefact"] == 4)
    assert four["verdict"] == "holds"
    norms = {row["step"]: row["norm_mean"] for row in written["steps"]}
    assert norms[10] == pytest.approx(10 * norms[1])
    assert written["seeds"] == ["run-0", "run-1", "run-2", "run-3"]
    assert "## Steps" in (tmp_path / "out/geometry.md").read_text()
    assert (tmp_path / "out/steps.png").is_file()


def test_snapshots_that_do_not_fit_together_are_refused(tmp_path):
    paths = snapshots(tmp_path, ours=False)
    anchor = tmp_path / "anchor.safetensors"
    with pytest.raises(MergeError, match="no snapshot of run-3 at step 10; expected the same seeds"):
        measure_steps(anchor, paths[:-1])
    with pytest.raises(MergeError, match="a name without a number"):
        by_step([anchor])
    twice = tmp_path / "run-0/epoch-01.safetensors"
    twice.write_bytes(paths[0].read_bytes())
    with pytest.raises(MergeError, match="step 1 of seed run-0"):
        by_step([*paths, twice])
    with pytest.raises(WeightsError, match="no such file"):
        measure_steps(anchor, [*paths, tmp_path / "run-4/epoch-1.safetensors"])


# ---------------------------------------------------------------- without the extras


def test_it_needs_neither_torch_nor_matplotlib(tmp_path):
    """Everything but the figures is written, and one notice says so."""
    anchor, *tuned = map(str, saved(tmp_path, 4))
    code = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'scipy', 'pydantic', 'safetensors'): sys.modules[name] = None\n"
        "from modelstock.cli import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "geometry", "--anchor", anchor, *tuned, "-o", str(tmp_path / "out")]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "notice: figures: not drawn, as matplotlib is not installed: pip install 'modelstock[figures]'" in done.stderr
    )
    assert sorted(contents(tmp_path / "out")) == ["geometry.json", "geometry.md", "tensors.csv"]
    assert "![" not in (tmp_path / "out/geometry.md").read_text()
