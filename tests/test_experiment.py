"""The experiment is written once: the stages and the command `compare` give the same report for the same weights."""

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

import modelstock.data.manifest as manifest_module
from modelstock.cli.app import app
from modelstock.damage import CACHE
from modelstock.data.dataset import open_dataset
from modelstock.errors import MergeError, WeightsError
from modelstock.experiment.compare import compare_results
from modelstock.experiment.evaluate import Candidates, score_benchmark
from modelstock.experiment.left_over import remove_left_over
from modelstock.experiment.merge import SubsetMerges, merge_method
from modelstock.experiment.paths import (
    anchor_file,
    files_by_identity,
    finetuned_folder,
    load_seeds,
    merged_files,
    other_files,
    results_file,
    seed_file,
)
from modelstock.experiment.rows import ensemble_row, row_of
from modelstock.experiment.subsets import ensembles, subsets
from modelstock.merging.methods.table import METHODS
from modelstock.notices import Notice
from modelstock.params import VariantParams, load_params, standard_section
from modelstock.scoring.one_pass import ScoringOptions
from modelstock.scoring.results import load_scores, save_scores
from modelstock.scoring.score_cache import ensemble_identity
from modelstock.weights.weight_set import WeightSet, load_weights
from stages.compare import main as compare_stage
from stages.evaluate import main as evaluate_stage
from stages.geometry import main as geometry_stage
from stages.merge import main as merge_stage
from tests.support.settings import full_params
from tests.support.splits import make_split

ROOT = Path(__file__).parent.parent
SPLITS = {"held-out": 48, "shapes": 60, "shapes-sketch": 40}
METHOD_NAMES = ("uniform", "wise_ft", "greedy")
FAST = ScoringOptions(batch_size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in {**SPLITS, "train": 30}.items():
        make_split(folder / split, split, count)
    return folder


@pytest.fixture
def project(tmp_path, data, anchor, variants, monkeypatch):
    """A project whose anchor and three seeds are there: what the stages after training start from."""
    yaml = YAML(typ="safe")
    params = yaml.load(full_params())
    params |= {"threads": 1, "device": "cpu", "seeds": [0, 1, 2]}
    params["finetune"] |= {"ema": [], "lawa": 0, "snapshots": False}
    params |= {"variants": {}, "periodic": {}, "longer": []}
    params["merge"]["methods"] = list(METHOD_NAMES)
    params["evaluate"] |= {"benchmarks": list(SPLITS), "batch_size": 32}
    with open(tmp_path / "params.yaml", "w") as file:
        yaml.dump(params, file)
    anchor.save(anchor_file(tmp_path / "models"))
    for seed, weights in enumerate(variants):
        weights.save(seed_file(tmp_path / "models/finetuned", seed))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_stages(project: Path, data: Path) -> None:
    models = Path("models")
    for method in METHOD_NAMES:
        out = models / "merged" / method
        merge_stage(method, anchor_file(models), finetuned_folder(models), data / "train", data / "held-out", out)
    for split in SPLITS:
        evaluate_stage(data / split, models, results_file(Path("results"), split))
    geometry_stage(Path("results"), models, Path("geometry"))
    compare_stage(Path("results"), models, Path("geometry"), Path("reports"), Path("metrics"))


def run_command(project: Path, data: Path) -> str:
    seeds = [seed_file(Path("models/finetuned"), seed) for seed in range(3)]
    words = ["compare", *seeds, "--anchor", "models/anchor.safetensors", "-o", "own", "--params", "params.yaml"]
    words += [word for split in SPLITS for word in ("--benchmark", data / split)]
    words += ["--device", "cpu", "--batch-size", 32]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_stages_and_the_command_give_the_same_report(project, data):
    run_stages(project, data)
    shown = run_command(project, data)
    for name in ("metrics.json", "quality.json", "accuracy.csv", "per_class.csv"):
        assert (project / "reports" / name).read_bytes() == (project / "own/report" / name).read_bytes(), name
    one, two = (json.loads((project / folder / "comparison.json").read_text()) for folder in ("reports", "own/report"))
    assert one["champion"] == two["champion"]
    assert f"champion by the held-out split: {one['champion']}" in shown
    assert one["facts"] == two["facts"]
    for split in SPLITS:
        first, second = (load_scores(results_file(folder, split)) for folder in (Path("results"), Path("own/results")))
        assert first.rows == second.rows
        assert (first.nll == second.nll).all()
    stage_merges = {path.relative_to("models") for path in merged_files(Path("models"), METHOD_NAMES)}
    command_merges = {path.relative_to("own") for path in merged_files(Path("own"), METHOD_NAMES)}
    assert stage_merges == command_merges
    for path in stage_merges:
        assert load_weights("models" / path).identity == load_weights("own" / path).identity
    for method in METHOD_NAMES:
        reports = [Path(folder, "merged", method, "report.json").read_bytes() for folder in ("models", "own")]
        assert reports[0].replace(b"models/", b"") == reports[1].replace(b"models/", b"")


def merges_of(method: str, data: Path, anchor, seeds, **changes) -> SubsetMerges:
    fields = {"section": standard_section(METHODS[method]), "anchor": anchor, "seeds": seeds, "scoring": FAST}
    return SubsetMerges(method=method, held_out=open_dataset(data / "held-out"), **{**fields, **changes})


def test_a_search_on_the_held_out_split_hashes_each_shard_once_per_process(
    tmp_path, data, anchor, variants, monkeypatch
):
    folder = tmp_path / "held-out"
    shutil.copytree(data / "held-out", folder)
    hashed: list[str] = []
    real = manifest_module.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(manifest_module, "sha256_of", counted)
    for method in ("greedy", "wise_ft"):
        merges = list(merges_of(method, tmp_path, anchor, dict(enumerate(variants))))
        assert merges
    assert hashed == [path.name for path in sorted(folder.glob("*.tar"))]


def test_an_option_is_chosen_on_the_held_out_split_and_ties_go_to_the_first(
    data, anchor, variants, tmp_path, monkeypatch
):
    seeds = dict(enumerate(variants))
    section = standard_section(METHODS["wise_ft"]).model_copy(update={"alphas": [0.25, 0.5, 0.75], "sets": "all"})
    monkeypatch.setattr("modelstock.experiment.merge.accuracies", lambda *arguments: [0.4, 0.6, 0.6])
    merges = merges_of("wise_ft", data, anchor, seeds, section=section)
    files = merge_method(merges, tmp_path)
    assert [file.name for file in files] == [f"0-1-2@{alpha}.safetensors" for alpha in (0.25, 0.5, 0.75)]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["0-1-2@0.25"] == {"alpha": 0.5, "held-out/top1": {"0.25": 0.4, "0.5": 0.6, "0.75": 0.6}}
    assert [row_of(load_weights(file)).name for file in files] == [f"wise_ft/0-1-2@{a}" for a in (0.25, 0.5, 0.75)]
    pairs = merges_of("wise_ft", data, anchor, seeds, section=section.model_copy(update={"sets": "brief"}))
    assert next(iter(pairs)).name == "0-1@0.5"  # of fewer than all seeds, the best alone


def test_a_greedy_soup_is_named_for_the_seeds_that_it_took(data, anchor, variants, monkeypatch):
    seeds = dict(enumerate(variants))
    section = standard_section(METHODS["greedy"]).model_copy(update={"sets": "all"})
    order = {variants[2].identity: 0.9, variants[0].identity: 0.5, variants[1].identity: 0.4}

    def accuracies(dataset, weights, options):
        return [order.get(w.identity, 0.1) for w in weights]  # no soup is better than the best seed

    monkeypatch.setattr("modelstock.experiment.merge.accuracies", accuracies)
    (merge,) = merges_of("greedy", data, anchor, seeds, section=section)
    assert (merge.name, merge.weights.meta["made_by"]["members"]) == ("2", [2])
    assert merge.weights.identity == variants[2].identity


def test_a_method_that_reads_statistics_asks_for_the_training_split(data, anchor, variants):
    seeds = dict(enumerate(variants))
    with pytest.raises(MergeError, match="method fisher: got no training split"):
        list(merges_of("fisher", data, anchor, seeds))
    section = standard_section(METHODS["fisher"]).model_copy(update={"examples": 8, "sets": "all", "scales": [1.0]})
    (merge,) = merges_of("fisher", data, anchor, seeds, section=section, train=open_dataset(data / "train"))
    assert merge.name == "0-1-2@1.0"


def test_all_weight_sets_and_the_ensembles_of_the_seeds_are_rows(data, anchor, variants):
    candidates = Candidates(anchor=anchor, seeds=dict(enumerate(variants)), others=[])
    results = score_benchmark(open_dataset(data / "shapes"), candidates, FAST)
    assert [row.name for row in results.rows] == [
        "anchor",
        "seed-0",
        "seed-1",
        "seed-2",
        "ensemble/0-1",
        "ensemble/0-1-2",
    ]
    assert results.rows[4].identity == ensemble_identity([w.identity for w in variants[:2]])
    assert results.correct.shape == (6, 60)


def test_rows_say_what_made_a_weight_set():
    def row(**made_by):
        found = row_of(WeightSet({}, {"made_by": made_by}))
        return found.name, found.kind, found.members, found.options

    average = {"stage": "finetune", "seed": 3, "average": "ema", "options": {"ema_decay": 0.99, "lr": 1}}
    assert row(**average) == ("ema@0.99/3", "ema", (3,), {"ema_decay": 0.99})
    assert row(stage="longer", seed=0, factor=4) == ("longer@4/0", "longer", (0,), {"factor": 4})
    variant = {"stage": "variant", "seed": 2, "pool": "rate", "variant": "slow"}
    variant["options"] = {"lawa_last": 5, "lr": 1, "epochs": 24, "share": 0.5}
    assert row(**variant) == ("rate/slow", "rate", (2,), {"epochs": 12})
    assert row(**variant, average="lawa") == ("rate-lawa@5/slow", "rate-lawa", (2,), {"lawa_last": 5, "epochs": 12})
    assert row(stage="finetune", seed=3, options={"epochs": 12}) == ("seed-3", "seed", (3,), {"epochs": 12})
    assert row(stage="finetune", seed=3, options={"head": "own"}) == ("seed-3", "seed", (3,), {})
    arm = {"stage": "periodic", "arm": "every-2", "members": [0, 1], "options": {"every": 2.0}}
    assert row(**arm) == ("periodic-every-2/0-1", "periodic-every-2", (0, 1), {"every": 2.0})
    merge = {"stage": "merge", "method": "ties", "members": [0, 2], "options": {"scale": 0.5, "density": 0.2}}
    assert row(**merge, chosen="scale")[0] == "ties/0-2@0.5"
    assert row(**merge)[0] == "ties/0-2"
    assert ensemble_row((0, 1), ["a", "b"]).name == "ensemble/0-1"


def test_subsets_and_ensembles_of_eight_seeds():
    assert subsets(range(4), "ring") == [(0, 1), (1, 2), (2, 3), (0, 3), (0, 1, 2, 3)]
    assert subsets(range(3), "pairs") == [(0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert subsets(range(5), "brief") == [(0, 1), (2, 3), (0, 1, 2, 3, 4)]
    assert subsets(range(3), "all") == [(0, 1, 2)]
    assert ensembles(range(4)) == [(0, 1), (2, 3), (0, 1, 2, 3)]


def test_files_lie_where_stages_write_them():
    whole = load_params(ROOT / "params.yaml")
    kept = {"ema": [0.9], "lawa": 2, "snapshots": True, "head_first_epochs": 0, "epochs": 3}
    slow = VariantParams(pool="rates", seed=0, anchor="models/anchor.safetensors", recipe={"ema": []})
    chosen = {
        "finetune": whole.finetune.model_copy(update=kept),
        "merge": whole.merge.model_copy(update={"methods": []}),
        "seeds": [4],
        "variants": {"slow": slow},
        "periodic": {"every-2": None, "papa": None},
        "longer": [3],
    }
    files = other_files(Path("models"), whole.model_copy(update=chosen))
    averages = [f"finetuned/4/{name}.safetensors" for name in ("ema-0.9", "lawa", "epoch-1", "epoch-2")]
    variants = [f"variants/slow/{name}.safetensors" for name in ("weights", "lawa", "epoch-1", "epoch-2")]
    periodic = [f"{name}/weights.safetensors" for name in ("periodic/every-2", "periodic/papa", "longer/3")]
    assert [str(file) for file in files] == [f"models/{name}" for name in averages + variants + periodic]
    adopted = {"checkpoints": ["own.pt"], "variants": {}, "periodic": {}, "longer": []}
    assert other_files(Path("models"), whole.model_copy(update={**chosen, **adopted})) == []


def test_merges_are_those_that_their_report_names(tmp_path):
    folder = tmp_path / "merged/ties"
    folder.mkdir(parents=True)
    for name in ("0-1", "0-1-2", "0-1 (copy)"):
        (folder / f"{name}.safetensors").touch()
    (folder / "report.json").write_text('{"0-1": {}, "0-1-2": {}}')
    with pytest.warns(Notice, match=r"0-1 \(copy\)\.safetensors: not a merge that the report beside it names"):
        files = merged_files(tmp_path, ["ties"])
    assert [file.name for file in files] == ["0-1-2.safetensors", "0-1.safetensors"]
    for content in ("{", "7", ""):
        (folder / "report.json").write_text(content)
        with pytest.raises(MergeError, match=r"report\.json: got .*; dvc repro -s -f merge@ties"):
            merged_files(tmp_path, ["ties"])


def test_what_other_settings_left_is_removed_where_dvc_has_it_and_named_where_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0", "1", "2", "own"):
        (Path("models/finetuned") / name).mkdir(parents=True)
        (Path("models/finetuned") / name / "weights.safetensors").touch()
    outs = "".join(f"    - {{path: models/finetuned/{seed}, md5: ab{seed}.dir}}\n" for seed in (1, 2))
    Path("dvc.lock").write_text(f"stages:\n  finetune@1:\n    outs:\n{outs}")
    (CACHE / "ab").mkdir(parents=True)
    (CACHE / "ab/2.dir").touch()
    with pytest.warns(Notice) as given:
        remove_left_over(Path("models/finetuned"), [0])
    assert [str(line.message).partition(":")[0] for line in given] == [
        f"models/finetuned/{n}" for n in ("1", "2", "own")
    ]
    assert "remove it, or clones" in str(given[0].message)  # its copy is not in the cache
    assert "left over from other settings, and removed" in str(given[1].message)
    assert {path.name for path in Path("models/finetuned").iterdir()} == {"0", "1", "own"}
    remove_left_over(Path("absent"), [])


def test_a_scored_row_without_a_file_is_refused(data, anchor, variants, tmp_path):
    candidates = Candidates(anchor=anchor, seeds={0: variants[0]}, others=[])
    results = score_benchmark(open_dataset(data / "shapes"), candidates, FAST)
    anchor.save(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="models: got no file with the weights of seed-0; expected"):
        files_by_identity([results], [tmp_path / "a.safetensors", tmp_path / "absent.safetensors"])
    variants[0].save(tmp_path / "b.safetensors")
    variants[0].save(tmp_path / "c.safetensors")
    files = files_by_identity([results], [tmp_path / f"{name}.safetensors" for name in "abc"])
    assert files[variants[0].identity] == tmp_path / "b.safetensors"  # the first of the same tensors


def test_a_comparison_reports_what_is_known_and_nothing_else(data, anchor, variants, tmp_path):
    seeds = dict(enumerate(variants[:2]))
    candidates = Candidates(anchor=anchor, seeds=seeds, others=[])
    results = [score_benchmark(open_dataset(data / split), candidates, FAST) for split in ("held-out", "shapes")]
    for one in results:
        save_scores(results_file(tmp_path / "results", one.benchmark), one)
    comparison = compare_results(results, tmp_path / "report", anchor=anchor, seeds=variants[:2])
    facts = json.loads((tmp_path / "report/comparison.json").read_text())["facts"]
    assert set(facts) == {"champion", "cosines"}  # no published figures for this backbone
    assert facts["champion"] == comparison.champion
    assert list(load_seeds(tmp_path, [])) == []
