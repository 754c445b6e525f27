"""The stages points, geometry and compare on a very small experiment, and settings of the geometry that are refused."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from modelstock.data.dataset import open_dataset
from modelstock.errors import ParamsError, WeightsError
from modelstock.experiment.paths import anchor_file, points_file, results_file, seed_file, variant_file
from modelstock.experiment.points import pool_points
from modelstock.experiment.pools import load_pools, one_recipe
from modelstock.notices import Notice
from modelstock.params import GeometryParams, VariantParams, load_params
from modelstock.scoring.one_pass import ScoringOptions
from modelstock.scoring.results import load_scores
from modelstock.weights.weight_set import WeightSet
from stages.compare import main as compare_stage
from stages.evaluate import main as evaluate_stage
from stages.geometry import main as geometry_stage
from stages.merge import main as merge_stage
from stages.points import main as points_stage
from tests.support.settings import full_params
from tests.support.splits import make_split

SPLITS = {"held-out": 48, "shapes": 60, "shapes-sketch": 40}
METHODS = ("model_stock", "uniform")
MODELS, RESULTS = Path("models"), Path("results")
SECTION = {
    "benchmarks": list(SPLITS),
    "centre": [8, 9, 10],
    "sizes": [2, 3],
    "subsets": 3,
    "pairs": 1,
    "scales": [0.5, 1.0],
    "paths": 1,
    "alphas": [0.5],
    "plane": [0.0, 0.5, 1.0],
    "noise": 1,
    "draws": 100,
    "seed": 0,
}
NOTHING = {
    **{name: [] for name, value in SECTION.items() if isinstance(value, list)},
    "paths": 0,
    "pairs": 0,
    "noise": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in {**SPLITS, "train": 30}.items():
        make_split(folder / split, split, count)
    return folder


def tuned(anchor: WeightSet, seed: int) -> WeightSet:
    """A weight set near one in common, as if fine-tuned."""
    shared, own = np.random.default_rng(1000), np.random.default_rng(seed)
    tensors = {
        name: (v + 0.03 * shared.standard_normal(v.shape) + 0.03 * own.standard_normal(v.shape)).astype(v.dtype)
        for name, v in anchor.tensors.items()
    }
    made_by = {"stage": "finetune", "seed": seed, "options": {}, "version": "test"}
    return WeightSet(tensors, {**anchor.meta, "parents": [anchor.identity], "made_by": made_by}, f"seed {seed}")


def settings(folder: Path, **section) -> None:
    yaml = YAML(typ="safe")
    params = yaml.load(full_params())
    params |= {"threads": 1, "device": "cpu", "seeds": [0, 1, 2, 3]}
    params["finetune"] |= {"ema": [], "lawa": 0, "snapshots": False}
    params |= {"periodic": {}, "longer": [], "variants": {}, "anchors": {}}
    params["merge"]["methods"] = list(METHODS)
    params["evaluate"] |= {"benchmarks": list(SPLITS), "batch_size": 32}
    params["geometry"] |= section
    params["tracking"]["tracker"] = "none"
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(params, file)


@pytest.fixture(scope="module")
def project(tmp_path_factory, data, anchor):
    """A project after `evaluate`: four seeds, their merges, and three seeds set aside."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings(folder, **SECTION)
        anchor.save(anchor_file(MODELS))
        for seed in (0, 1, 2, 3, 8, 9, 10):
            tuned(anchor, seed).save(seed_file(MODELS / ("centre" if seed > 7 else "finetuned"), seed))
        for method in METHODS:
            out = MODELS / "merged" / method
            merge_stage(method, anchor_file(MODELS), MODELS / "finetuned", data / "train", data / "held-out", out)
        for split in SPLITS:
            evaluate_stage(data / split, MODELS, results_file(RESULTS, split))
            points_stage(data / split, data / "train", data / "held-out", MODELS, points_file(RESULTS, split))
    return folder


def claims(folder: str) -> dict[str, dict]:
    return {claim["key"]: claim for claim in json.loads(Path(folder, "geometry.json").read_text())["claims"]}


def test_points_geometry_and_report(project, monkeypatch):
    monkeypatch.chdir(project)
    settings(project, **SECTION)
    compared, scored = (load_scores(file(RESULTS, "shapes")) for file in (results_file, points_file))
    numbers = {row.name: place for place, row in enumerate(scored.rows)}
    for place, row in enumerate(compared.rows):  # a point that is a row of the comparison too has the same outcome
        if row.name in numbers:
            assert scored.rows[numbers[row.name]].identity == row.identity
            assert (scored.nll[numbers[row.name]] == compared.nll[place]).all()
    assert {"anchor", "seed-3", "uniform/0-1", "model_stock/0-1"} <= set(numbers)
    geometry_stage(RESULTS, MODELS, Path("geometry"))
    keys = {
        "lens",
        "closer",
        "centre",
        "plane",
        "noise",
        "alpha",
        "seeds",
        "granularity",
        "cost",
        "oracle-accuracy",
        "s-curve",
    }
    found = claims("geometry")
    assert keys | {"regret"} <= set(found)
    assert {"angles", "norms", "lengths"} <= set(found)  # what weights alone decide
    first = {file.name: file.read_bytes() for file in Path("geometry").iterdir()}
    geometry_stage(RESULTS, MODELS, Path("geometry"))
    assert {file.name: file.read_bytes() for file in Path("geometry").iterdir()} == first
    compare_stage(RESULTS, MODELS, Path("geometry"), Path("reports"), Path("metrics"))
    report = Path("reports/comparison.md").read_text()
    assert "\n## Geometry\n" in report
    assert "| 6 | the closer to the centre, the better:" in report
    assert "(geometry-distance.png)" in report
    html = Path("reports/comparison.html").read_text()
    assert 'src="geometry-' not in html  # pictures are in the page
    beside = {file.name for file in Path("reports").iterdir()}
    assert {
        "geometry.md",
        "geometry.json",
        "accuracy.json",
        "tensors.csv",
        "geometry-plane.png",
        "geometry-triangle.png",
    } <= beside
    assert "section.md" not in beside


def test_the_page_of_the_docs_has_every_claim_with_its_meaning_and_its_picture(project, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "docs")
    geometry_page = importlib.import_module("geometry_page")
    folder = project / "geometry"
    text, pictures = geometry_page.geometry_page(folder)
    written = json.loads((folder / "geometry.json").read_text())
    for claim in written["claims"]:
        assert f"{claim['title']}: {claim['verdict']}\n" in text
    known = {claim["key"] for claim in written["claims"] if claim["artefact"]}
    assert known <= set(geometry_page.MEANINGS)
    assert {"geometry-plane.png", "geometry-distance.png", "geometry-cosine.png"} <= set(pictures)
    assert set(re.findall(r"\]\((geometry-[\w.]+png)\)", text)) == set(pictures)
    again, none = geometry_page.geometry_page(folder, "reviews")
    assert (none, "over seeds and texts" in again, re.findall(r"!\[|\bimages?\b", again)) == ({}, True, [])
    monkeypatch.setattr(geometry_page, "MOST", 1000)
    with pytest.raises(ValueError, match="more than 1,000"):
        geometry_page.geometry_page(folder)


def test_without_points_the_comparisons_rows_are_judged(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    settings(project, **NOTHING)
    with pytest.warns(Notice) as given:
        geometry_stage(RESULTS, MODELS, tmp_path)
    assert [str(line.message).partition(": ")[0] for line in given] == [
        *(f"models/centre/{seed}" for seed in (10, 8, 9)),
        *(f"results/points/{name}.safetensors" for name in ("held-out", "shapes-sketch", "shapes")),
    ]
    found = claims(str(tmp_path))
    assert {"closer", "seeds", "cost", "regret", "angles"} <= set(found)
    assert not {"centre", "plane", "noise", "alpha", "granularity", "s-curve"} & set(found)
    distances = json.loads((tmp_path / "accuracy.json").read_text())["distances"]
    assert distances["uniform/0-1-2-3"] == "not enough seeds (4 of 5)"
    assert distances["uniform/0-1"]["whole"] < distances["seed-0"]["whole"] < 1
    assert found["closer"]["quantities"][0]["name"].startswith("13 rows")  # anchor, 4 seeds, 4 pairs by 2 methods


def test_points_of_other_weights_are_refused(project, monkeypatch, tmp_path, anchor):
    monkeypatch.chdir(project)
    settings(project, **SECTION)
    file = seed_file(MODELS / "centre", 9)
    before = file.read_bytes()
    tuned(anchor, 90).save(file)
    with pytest.raises(WeightsError, match="point centre: got other weights than those that were scored"):
        geometry_stage(RESULTS, MODELS, tmp_path)
    file.write_bytes(before)


def test_a_pool_is_merged_in_pairs_and_as_a_whole(tmp_path, data, anchor):
    models = tmp_path / "models"
    anchor.save(models / "anchors/weak.safetensors")
    for number, name in enumerate("abcd"):
        tuned(anchor, number).save(variant_file(models, name))
    variants = {
        name: VariantParams(pool=pool, seed=0, anchor="models/anchors/weak.safetensors", recipe={})
        for name, pool in (("a", "rates"), ("b", "rates"), ("c", "rates"), ("d", "alone"))
    }
    (pool,) = load_pools(variants, models)
    identities = [weights.identity for weights in pool.members.values()]
    assert load_pools(variants, models, seeds=identities) == []  # the seeds again
    assert len(load_pools(variants, models, seeds=identities[1:])) == 1
    assert (pool.name, list(pool.members), pool.anchor.identity) == ("rates", ["a", "b", "c"], anchor.identity)
    chosen = list(pool_points(pool, open_dataset(data / "held-out"), ScoringOptions(batch_size=32)))
    names = [point.name.removeprefix("pool/rates/") for point in chosen]
    pairs = [f"{method}/{both}" for both in ("a+b", "a+c", "b+c") for method in ("uniform", "model_stock")]
    members = [f"member/{name}" for name in "abc"]
    assert names == ["anchor", *members, *pairs, "uniform/all", "greedy/all"]
    (pair,) = (point for point in chosen if point.name == "pool/rates/uniform/a+b")
    first, second = (
        np.concatenate([(pool.members[n].tensors[t] - anchor.tensors[t]).ravel() for t in anchor.tensors]) for n in "ab"
    )
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert pair.facts["cosine"] == pytest.approx(cosine, rel=1e-3)
    assert set(chosen[-1].facts["taken"]) <= {"a", "b", "c"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centre": [3, 8, 9]}, "geometry.centre and seeds both name 3"),
        ({"centre": [8]}, "centre is the mean of two seeds or more"),
        ({"benchmarks": ["held-out", "shapes", "shapes-v2"]}, r"geometry\.benchmarks names 'shapes-v2'"),
        ({"benchmarks": ["shapes", "shapes-sketch"]}, "geometry.benchmarks needs held-out"),
        ({"sizes": [2, 5]}, "geometry.sizes wants 5 of 4 seeds"),
        ({"pairs": 5}, "geometry.pairs wants 5 of 4 seeds"),
        ({"paths": 5}, "geometry.paths wants 5 of 4 seeds"),
        ({"plane": [0.0, 0.5]}, "plane needs the coordinates 0.0 and 1.0"),
        ({"noise": 2, "centre": []}, "noise is drawn around the centre"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, change, message):
    settings(tmp_path, **{**SECTION, **change})
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")


def test_the_standard_settings_ask_for_no_point():
    assert GeometryParams(**NOTHING).benchmarks == []


def test_a_setting_is_a_pool_whose_members_differ_in_seed_or_order_alone():
    def variant(pool, seed, **recipe):
        return VariantParams(pool=pool, seed=seed, anchor="models/anchor.safetensors", recipe=recipe)

    variants = {
        "a": variant("order", 0, order_seed=1),
        "b": variant("order", 0, order_seed=2),
        "c": variant("half", 0, share=0.5),
        "d": variant("half", 1, share=0.5),
        "e": variant("rate", 0, lr=0.1),
        "f": variant("rate", 1, lr=0.2),
    }
    assert list(one_recipe(variants)) == ["a", "b", "c", "d"]
