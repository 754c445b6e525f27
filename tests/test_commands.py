"""`modelstock evaluate` and `modelstock compare`, as a person with files of their own calls them."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.data.dataset import open_dataset
from modelstock.errors import ModelstockError
from modelstock.scoring.one_pass import ScoringOptions, score
from modelstock.scoring.results import load_scores
from modelstock.scoring.score_cache import ensemble_identity
from modelstock.weights.weight_set import load_weights
from tests.support.settings import full_params
from tests.support.splits import make_split

SHIFTS = ("shapes-sketch", "shapes-objectnet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, anchor, variants):
    """Shards of four benchmarks, an anchor, two weight sets of ours, and a foreign checkpoint with a module prefix."""
    place = tmp_path_factory.mktemp("own")
    for split, count in (("held-out", 48), ("shapes", 70), *((shift, 40) for shift in SHIFTS)):
        make_split(place / split, split, count)
    anchor.save(place / "anchor.safetensors")
    for number in range(2):
        variants[number].save(place / f"{number}.safetensors")
    tower = {k: v for k, v in variants[2].tensors.items() if k.startswith("visual.")}
    foreign = {f"module.{k}": torch.from_numpy(v.copy()) for k, v in tower.items()}
    torch.save({"epoch": 3, "state_dict": foreign}, place / "foreign.pt")
    return place


def call(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: object) -> str:
    with pytest.raises(ModelstockError) as caught:
        CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return str(caught.value)


def benchmarks(folder, *names: str) -> list[object]:
    return [word for name in names for word in ("--benchmark", folder / name)]


def test_evaluate_prints_what_scoring_says(folder, tmp_path, variants):
    files = [folder / "0.safetensors", folder / "1.safetensors"]
    shown = call(
        "evaluate",
        *files,
        *benchmarks(folder, "shapes", "shapes-objectnet"),
        "--ensemble",
        "1,2",
        "--json",
        "-o",
        tmp_path / "results",
        "--batch-size",
        32,
    )
    table = json.loads(shown)["rows"]
    identities = [w.identity for w in variants[:2]]
    assert [(row["weights"], row["benchmark"]) for row in table] == [
        (name, split)
        for split in ("shapes", "shapes-objectnet")
        for name in (str(files[0]), str(files[1]), "ensemble of 1, 2")
    ]
    for split, part in (("shapes", table[:3]), ("shapes-objectnet", table[3:])):
        known = score(open_dataset(folder / split), variants[:2], [identities], ScoringOptions(batch_size=32))
        kept = load_scores(tmp_path / f"results/{split}.safetensors")
        for number, (row, identity) in enumerate(zip(part, [*identities, ensemble_identity(identities)], strict=True)):
            outcome = known[identity]
            assert row["top1"] == pytest.approx(outcome.correct.mean())
            assert row["top5"] == pytest.approx(outcome.correct5.mean())
            assert row["nll"] == pytest.approx(outcome.nll.mean(), rel=1e-5)
            assert row["low"] < row["top1"] < row["high"]
            np.testing.assert_array_equal(kept.prediction[number], outcome.prediction)


def test_evaluate_shows_percent_with_intervals_to_people(folder, variants):
    shown = call("evaluate", folder / "0.safetensors", *benchmarks(folder, "shapes", "shapes-sketch"))
    for split, images in (("shapes", 70), ("shapes-sketch", 40)):
        assert f"{split}: {images} images" in shown
        share = 100 * score(open_dataset(folder / split), variants[:1])[variants[0].identity].correct.mean()
        assert f"{share:.1f} [" in shown


def test_evaluate_tells_classes_apart(folder):
    shown = call("evaluate", folder / "0.safetensors", *benchmarks(folder, "shapes"), "--per-class", "--json")
    table = json.loads(shown)["rows"]
    outcome = score(open_dataset(folder / "shapes"), [load_weights(folder / "0.safetensors")])
    assert len(table) == 24
    assert sum(row["images"] for row in table) == 70
    right = sum(row["images"] * row["top1"] for row in table)
    assert right == pytest.approx(next(iter(outcome.values())).correct.sum())


def test_evaluate_takes_foreign_checkpoints_with_their_anchor(folder, variants, anchor):
    table = json.loads(
        call(
            "evaluate",
            folder / "foreign.pt",
            "--anchor",
            folder / "anchor.safetensors",
            *benchmarks(folder, "shapes"),
            "--json",
        )
    )["rows"]
    head = {k: v for k, v in anchor.tensors.items() if k.startswith("head.")}
    same = type(anchor)({**variants[2].tensors, **head}, anchor.meta, "same")
    assert table[0]["top1"] == pytest.approx(
        score(open_dataset(folder / "shapes"), [same])[same.identity].correct.mean()
    )


def test_what_evaluate_cannot_do_is_one_line(folder):
    shapes = benchmarks(folder, "shapes")
    assert "foreign.pt" in refused("evaluate", folder / "foreign.pt", *shapes)
    one, two = folder / "0.safetensors", folder / "1.safetensors"
    for text in ("1", "1,1", "1,3", "a,b"):
        assert f"--ensemble: got '{text}'" in refused("evaluate", one, two, *shapes, "--ensemble", text)
    assert "--precision: got 'half'" in refused("evaluate", one, *shapes, "--precision", "half")
    assert "manifest" in refused("evaluate", one, *benchmarks(folder, "nothing"))
    assert "device: got tpu" in refused("evaluate", one, *shapes, "--device", "tpu")


def test_compare_merges_scores_and_reports_and_repeats_its_bytes(folder, tmp_path):
    files = [folder / "0.safetensors", folder / "1.safetensors", folder / "foreign.pt"]
    sets = benchmarks(folder, "held-out", "shapes", *SHIFTS)
    words = ("compare", *files, "--anchor", folder / "anchor.safetensors", *sets)
    shown = call(*words, "-o", tmp_path / "a")
    scores = load_scores(tmp_path / "a/results/shapes.safetensors")
    names = {row.name for row in scores.rows}
    assert {"anchor", "seed-0", "seed-2", "model_stock/0-1-2", "uniform/0-1", "ensemble/0-1-2"} <= names
    assert f"wise_ft/0-1-2@{0.5}" in names
    report = json.loads((tmp_path / "a/report/comparison.json").read_text())
    assert f"champion by the held-out split: {report['champion']}" in shown
    assert "# Comparison" in (tmp_path / "a/report/comparison.md").read_text()
    shutil.rmtree(tmp_path / "a/merged")
    call(*words, "-o", tmp_path / "a")
    call(*words, "-o", tmp_path / "b")
    assert (tmp_path / "a/report/comparison.md").read_bytes() == (tmp_path / "b/report/comparison.md").read_bytes()


def test_compare_does_without_shifts_and_takes_methods_from_a_params_file(folder, tmp_path):
    params = tmp_path / "params.yaml"
    methods = full_params().replace("karcher, ties,", "karcher,")
    params.write_text(methods.replace("[model_stock, uniform, greedy", "[ties, uniform, greedy"))
    files = (folder / "0.safetensors", folder / "1.safetensors", "--anchor", folder / "anchor.safetensors")
    call(
        "compare",
        *files,
        *benchmarks(folder, "held-out", "shapes"),
        "--params",
        params,
        "--method",
        "ties",
        "--method",
        "uniform",
        "-o",
        tmp_path / "out",
    )
    names = {row.name.partition("@")[0] for row in load_scores(tmp_path / "out/results/shapes.safetensors").rows}
    assert names == {"anchor", "seed-0", "seed-1", "ties/0-1", "uniform/0-1", "ensemble/0-1"}
    assert "shifts" not in (tmp_path / "out/report/metrics.json").read_text()


def test_what_compare_cannot_do_is_one_line_before_anything_is_written(folder, tmp_path):
    start = ("--anchor", folder / "anchor.safetensors", "-o", tmp_path / "out")
    files = (folder / "0.safetensors", folder / "1.safetensors")
    every = benchmarks(folder, "held-out", "shapes")
    assert "got 1 checkpoints" in refused("compare", files[0], *start, *every)
    assert "benchmarks in-distribution," in refused("compare", *files, *start, *benchmarks(folder, "shapes"))
    assert "--method: got tie; expected model_stock, uniform, wise_ft, greedy" in refused(
        "compare", *files, *start, *every, "--method", "tie"
    )
    (tmp_path / "params.yaml").write_text(full_params())
    params = ("--params", tmp_path / "params.yaml")
    assert "and --train for fisher, regmean" in refused("compare", *files, *start, *every, *params)
    assert not (tmp_path / "out").exists()


def test_two_benchmarks_of_one_name_and_a_file_named_twice_are_refused_before_anything_is_scored(folder, tmp_path):
    for site in ("a", "b"):
        make_split(tmp_path / site / "test", "shapes", 4 + (site == "b"))
    files, both = (folder / "0.safetensors", folder / "1.safetensors"), benchmarks(tmp_path, "a/test", "b/test")
    line = f"{tmp_path / 'b/test'}: got a benchmark named shapes, as {tmp_path / 'a/test'} is"
    assert line in refused("evaluate", *files, *both, "-o", tmp_path / "out")
    held_out, start = benchmarks(folder, "held-out"), ("--anchor", folder / "anchor.safetensors")
    assert line in refused("compare", *files, *start, *held_out, *both, "-o", tmp_path / "out")
    again = folder / "../" / folder.name / "0.safetensors"
    for command in ("evaluate", "compare"):
        more = start if command == "compare" else ()
        text = refused(command, *files, again, *more, *benchmarks(folder, "shapes"), "-o", tmp_path / "out")
        assert f"WEIGHTS: got {again}, which {files[0]} is too" in text
    assert not (tmp_path / "out").exists()
