"""dvc.yaml against params, and the whole DAG on a very small setting, through DVC and through the flow."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from modelstock.params import Params
from modelstock.scoring.results import load_scores
from modelstock.scoring.score_cache import ensemble_identity
from modelstock.tracking.mlflow import IDENTITY, MlflowTracker
from modelstock.weights.weight_set import load_weights
from tests.support.settings import full_params

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


FILES = {"centre": "finetune"}  # stages that do the work of another one's file


def definition(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_inputs_and_outputs_stand_on_its_command_line_and_its_params_exist(name):
    stage = definition(name)
    words = stage["cmd"].split()
    assert words[:3] == ["python", "-m", f"stages.{FILES.get(name, name)}"]
    inputs = {d for d in stage["deps"] if not d.startswith(("modelstock/", "stages/"))} - {"params.checked"}
    outs = {
        path for out in [*stage["outs"], *stage.get("metrics", [])] for path in ([out] if isinstance(out, str) else out)
    }
    assert set(words[3:]) - {"${item}", "${key}"} == inputs | outs
    for param in stage.get("params", []):
        section = Params
        for key in param.split("."):
            if section is not None and hasattr(section, "model_fields") and "$" not in key:
                assert key in section.model_fields
                section = section.model_fields[key].annotation


def test_one_noun_names_the_stage_its_file_and_its_params():
    files = {p.stem for p in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert files == {FILES.get(name, name) for name in STAGES}
    assert {"prepare", "pretrain", "finetune", "periodic", "merge", "evaluate", "geometry", "compare"} <= set(
        Params.model_fields
    )


ARM = {"size": 2, "reset_moments": False, "devices": 1}
SMALL = {
    "threads": 1,
    "prepare": {
        "seed": 7,
        "shard_size": 40,
        "reference_draws": 200,
        "reference_epochs": 1,
        "splits": {
            name: {"source": "shapes", "images": images}
            for name, images in (
                ("train", 64),
                ("held-out", 48),
                ("shapes", 60),
                ("shapes-adversarial", 36),
                ("shapes-objectnet", 52),
            )
        },
    },
    "pretrain": {"draws": 512, "batch_size": 64, "warmup_steps": 2},
    "seeds": [0, 1, 2],
    "finetune": {"epochs": 2, "batch_size": 32, "warmup_steps": 1, "lawa": 2, "snapshots": True},
    "periodic": {
        "stock": {**ARM, "rule": "model_stock", "every": 1.0, "pairwise": "cosine", "clip": "unit"},
        "gradual": {**ARM, "rule": "papa", "every": 0.5, "alpha": 0.9},
    },
    "variants": {
        "weak-0": {"pool": "weak", "seed": 0, "anchor": "models/anchors/weak/anchor.safetensors", "recipe": {}},
        **{
            f"constant-{seed}": {
                "pool": "constant-rate",
                "seed": seed,
                "anchor": "models/anchor.safetensors",
                "recipe": {"schedule": "constant"},
            }
            for seed in (0, 1)
        },
    },
    "merge": {
        "methods": ["model_stock", "uniform", "wise_ft", "regmean", "oracle_scales"],
        "wise_ft": {"alphas": [0.25, 0.5]},
        "regmean": {"examples": 40, "scales": [0.5, 1.0]},
        "oracle_scales": {"iterations": 2},
    },
    "evaluate": {"benchmarks": ["held-out", "shapes", "shapes-objectnet"]},
    "geometry": {
        "benchmarks": ["held-out", "shapes"],
        "centre": [8, 9],
        "draws": 200,
        "pairs": 1,
        "scales": [0.5],
        "plane": [0.0, 1.0],
    },
}


def update(base: dict, change: dict) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and key not in ("splits", "periodic", "variants"):
            update(base[key], value)
        else:
            base[key] = value


def write_params(folder: Path, change: dict) -> None:
    yaml = YAML(typ="safe")
    params = yaml.load((folder / "params.yaml").read_text())
    update(params, change)
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(params, file)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, not a git checkout, with very small params, brought up to date by `dvc repro`."""
    folder = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("modelstock", "stages", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(full_params())
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    write_params(folder, SMALL)
    done = run(folder, "dvc", "repro")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def run(folder: Path, *command: str, **extra: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PREFECT"))}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(folder), **extra}
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, env=env, capture_output=True, text=True)


def hashes(folder: Path) -> dict[str, str]:
    lock = YAML(typ="safe").load((folder / "dvc.lock").read_text())
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


@pytest.mark.timeout(600)
def test_everything_is_there_after_dvc_repro(project):
    assert {p.name for p in (project / "reports").iterdir()} >= {"comparison.html", "figure.png", "metrics.json"}
    scores = load_scores(project / "results/shapes-objectnet.safetensors")
    assert scores.correct.shape == (len(scores.rows), 52)
    names = {row.name for row in scores.rows}
    assert {"anchor", "seed-2", "model_stock/0-1", "uniform/0-2", "uniform/0-1-2", "wise_ft/0-1-2@0.25"} <= names
    assert {"ensemble/0-1", "ensemble/0-1-2"} <= names
    assert {"oracle_scales/0-1", "oracle_scales/0-1-2"} <= names
    scaled = {n for n in names if n.startswith("regmean/")}
    assert scaled < {f"regmean/{m}@{s}" for m in ("0-1", "0-1-2") for s in (0.5, 1.0)}
    assert len(scaled) == 2
    assert {"ema@0.99/0", "lawa@2/1", "snapshot@1/2", "longer@2/0"} <= names
    assert {"periodic-stock/0-1", "periodic-gradual/0-1"} <= names
    table = (project / "reports/comparison.md").read_text()
    assert all(f"| {line} of 2 |" in table for line in ("periodic-stock", "periodic-gradual"))
    merges, pulls = (
        json.loads((project / f"models/periodic/{arm}/report.json").read_text()) for arm in ("stock", "gradual")
    )
    assert (list(merges), list(pulls)) == (["2", "4"], ["1", "2", "3", "4"])
    assert merges["4"]["visual.proj"]["flag"] in ("", "clipped")
    points = {row.name: row.identity for row in load_scores(project / "results/points/shapes.safetensors").rows}
    assert {"centre", "plane/0-1@1.0@1.0", "oracle/0-1"} <= set(points)
    assert points["model_stock/0-1"] in {row.identity for row in scores.rows if row.name == "model_stock/0-1"}
    assert "\n## Geometry\n" in (project / "reports/comparison.md").read_text()
    report = json.loads((project / "models/merged/model_stock/report.json").read_text())
    assert 0 <= report["0-1"]["visual.proj"]["ratio"] <= 1
    metrics = json.loads((project / "reports/metrics.json").read_text())
    anchor = next(i for i, row in enumerate(scores.rows) if row.name == "anchor")
    assert metrics["zero-shot anchor"]["shapes-objectnet"] == pytest.approx(
        100 * scores.correct[anchor].mean(), abs=1e-4
    )


def test_dvc_shows_a_short_line_each_for_champion_seeds_and_merges(project):
    shown = run(project, "dvc", "metrics", "show").stdout.splitlines()
    lines = ["champion", "mean-seed", "model_stock", "uniform"]
    assert [line.split()[0] for line in shown[1:]] == [f"metrics/{name}.json" for name in lines]
    assert shown[0].split() == ["Path", "balanced", "balanced-shifts", "held-out", "in-distribution", "seeds", "shifts"]
    assert max(map(len, shown)) < 110
    full = json.loads((project / "reports/metrics.json").read_text())
    for line, name in zip(
        shown[2:], ("mean single seed", "model_stock of 2, mean of 3", "uniform of 2, mean of 3"), strict=True
    ):
        assert float(line.split()[4]) == pytest.approx(full[name]["shapes"], abs=0.01)
        assert float(line.split()[6]) == pytest.approx(full[name]["shift-mean"], abs=0.01)


def test_dvcs_page_of_plots_needs_no_network(project):
    done = run(project, "dvc", "plots", "show", "-o", "page")
    assert (done.returncode, done.stderr) == (0, "")
    page = (project / "page/index.html").read_text()
    assert "http" not in page
    pictures = re.findall(r'src="([^"]+)"', page)
    assert [Path(name).name for name in pictures] == [
        f"workspace_reports_{name}.png" for name in ("figure", "held_out", "methods", "pareto")
    ]
    assert all((project / "page" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    shutil.rmtree(project / "page")


def test_a_clone_without_caches_has_every_commits_metrics_and_their_differences(project, tmp_path):
    folder = tmp_path / "clone"
    for name in (".dvc", "metrics"):
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        shutil.copy(project / name, folder / name)
    shutil.copy(ROOT / ".gitignore", folder / ".gitignore")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a run"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    champion = folder / "metrics/champion.json"
    figures = json.loads(champion.read_text())
    champion.write_text(json.dumps(figures | {"held-out": figures["held-out"] + 1}))
    done = run(folder, "dvc", "metrics", "diff", "HEAD")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()[1:]
    assert line.split()[:2] == ["metrics/champion.json", "held-out"]
    assert float(line.split()[-1]) == pytest.approx(1)


def test_nothing_runs_the_second_time(project):
    done = run(project, "dvc", "repro")
    assert "Data and pipelines are up to date" in done.stdout
    assert "Running stage" not in done.stdout


def test_a_bad_value_is_refused_before_dvc_deletes_anything_and_a_good_one_runs_only_what_reads_it(project):
    text, before = (project / "params.yaml").read_text(), hashes(project)
    write_params(project, {"pretrain": {"lr": 7}})
    done = run(project, "dvc", "repro")
    (project / "params.yaml").write_text(text)
    assert done.returncode != 0
    assert "error: params.yaml: got 1 problem: pretrain.lr" in done.stderr
    assert [line for line in done.stdout.splitlines() if "Running" in line] == ["Running stage 'check':"]
    assert (project / "models/clip/clip.safetensors").is_file()
    assert run(project, "dvc", "repro").stdout.count("Running stage") == 0
    (project / "params.yaml").write_text(text + "# a comment\n")
    done = run(project, "dvc", "repro")
    (project / "params.yaml").write_text(text)
    assert [line for line in done.stdout.splitlines() if "Running" in line] == ["Running stage 'check':"]
    assert run(project, "dvc", "repro").returncode == 0
    assert hashes(project) == before


def test_a_stage_run_again_gives_the_same_bytes(project):
    before = hashes(project)
    shutil.rmtree(project / "scratch")
    stages = ("prepare@shapes-adversarial", "finetune@1", "periodic@gradual", "merge@model_stock")
    done = run(project, "dvc", "repro", "--force", "--single-item", *stages)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Running stage") == 4
    assert hashes(project) == before


def test_mlflow_holds_one_run_per_row_and_a_second_comparison_adds_none(project):
    def content():
        tracker = MlflowTracker(project, uri=f"sqlite:///{project / 'mlflow.db'}")
        client = tracker.client
        runs = {
            kind: {
                r.info.run_name: r
                for r in client.search_runs([tracker.experiment], f"tags.`modelstock.kind` = '{kind}'")
            }
            for kind in ("row", "training", "comparison")
        }
        models = client.search_logged_models([tracker.experiment])
        versions = client.search_model_versions("name = 'modelstock-shapes'")
        history = {
            name: len(client.get_metric_history(r.info.run_id, "shapes/top1")) for name, r in runs["row"].items()
        }
        champion = client.get_model_version_by_alias("modelstock-shapes", "champion").tags[IDENTITY]
        counts = {kind: len(by_name) for kind, by_name in runs.items()}
        return runs, counts, len(models), len(versions), history, champion

    runs, counts, models, versions, history, champion = content()
    scores = load_scores(project / "results/shapes.safetensors")
    weights = {row.identity for row in scores.rows if row.kind != "ensemble"}
    assert set(runs["row"]) == {row.name for row in scores.rows}
    variants = YAML(typ="safe").load((project / "params.yaml").read_text())["variants"]
    trained = ["seed-0", "seed-1", "seed-2", "periodic-stock/0-1", "periodic-gradual/0-1", "longer@2/0"]
    trained += [f"{variant['pool']}/{name}" for name, variant in variants.items()]
    assert set(runs["training"]) == {f"training of {name}" for name in trained}
    assert counts == {"row": len(scores.rows), "training": 6 + 3, "comparison": 1}
    assert models == len(weights)
    assert set(history.values()) == {1}
    for row, correct in zip(scores.rows, scores.correct, strict=True):
        assert runs["row"][row.name].data.metrics["shapes/top1"] == pytest.approx(correct.mean())
    held = load_scores(project / "results/held-out.safetensors")
    best = json.loads((project / "reports/comparison.json").read_text())["champion"]
    assert champion == next(row.identity for row in held.rows if row.name == best)
    kinds = {row.kind for row in scores.rows} - {"ensemble", "anchor"}
    assert 1 < versions <= len(kinds)  # fewer where the best of two methods have the same tensors
    training = runs["training"]["training of seed-1"]
    assert training.data.params["seed"] == "1"
    assert training.data.metrics["validation/top1"] >= 0
    assert training.info.start_time < training.info.end_time < runs["row"]["seed-1"].info.start_time
    assert "dvc.md5" in runs["row"]["seed-1"].data.tags
    (parent,) = runs["comparison"].values()
    assert parent.data.params["finetune.epochs"] == "2"
    assert "dvc.data/train" in parent.data.params
    assert run(project, "dvc", "repro", "--force", "--single-item", "compare").returncode == 0
    assert content()[1:] == (counts, models, versions, history, champion)


def test_a_weight_set_says_where_it_comes_from(project):
    anchor = load_weights(project / "models/anchor.safetensors")
    seeds = [load_weights(project / f"models/finetuned/{s}/weights.safetensors") for s in (0, 1)]
    merged = load_weights(project / "models/merged/model_stock/0-1.safetensors")
    assert merged.meta["parents"][0] == anchor.identity
    assert set(merged.meta["parents"][1:]) == {s.identity for s in seeds}
    assert merged.meta["made_by"]["options"] == {"pairwise": "cosine", "clip": "unit"}
    assert merged.meta["made_by"]["granularity"] == "tensor"
    scores = load_scores(project / "results/shapes.safetensors")
    ensemble = next(row for row in scores.rows if row.name == "ensemble/0-1")
    assert ensemble.identity == ensemble_identity([s.identity for s in seeds])


def test_a_dead_mlflow_server_stops_neither_training_nor_comparison(project):
    dead = {"MLFLOW_TRACKING_URI": "http://user:sesame@127.0.0.1:9"}
    before = hashes(project)
    for stage in ("finetune@0", "compare"):
        done = run(project, "dvc", "repro", "--force", "--single-item", stage, **dead)
        assert done.returncode == 0, done.stderr
        # So short a training does not open the tracker; one that does is in test_tracking.py.
        assert ("MLflow at http://***@127.0.0.1:9: got" in done.stderr) == (stage == "compare")
        assert "sesame" not in done.stdout + done.stderr
    assert hashes(project) == before
    files = [path for name in ("reports", "results") for path in (project / name).rglob("*")]
    assert not [path for path in files if path.is_file() and b"sesame" in path.read_bytes()]


def test_bad_input_is_one_line_and_leaves_nothing_half_written(project, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(project, folder, symlinks=True, ignore=shutil.ignore_patterns("cache", "mlruns", "tmp"))
    shard = folder / "data/shapes/000001.tar"
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-100])
    arguments = ["models/anchor.safetensors", "models/finetuned"]
    shards = ["data/train", "data/held-out"]
    done = run(folder, "stages.evaluate", "data/shapes", "models", "new.safetensors")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: data/shapes/000001.tar: got sha256")
    assert not (folder / "new.safetensors").exists()
    done = run(folder, "stages.merge", "uniform", "models/clip/clip.safetensors", arguments[1], *shards, "out")
    assert done.returncode == 1
    assert "expected from the anchor models/clip/clip.safetensors" in done.stderr
    assert not (folder / "out").exists()
    done = run(folder, "stages.merge", "unifrom", *arguments, *shards, "out")
    assert done.stderr == (
        "error: method: got 'unifrom'; expected model_stock, uniform, wise_ft, regmean, oracle_scales; "
        "name one of merge.methods\n"
    )
    write_params(folder, {"finetune": {"lr": 7}})
    done = run(folder, "stages.prepare", "shapes", "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "finetune.lr" in done.stderr


@pytest.mark.timeout(600)
def test_the_flow_runs_what_a_changed_param_touches_and_only_that(project, tmp_path):
    write_params(project, {"merge": {"wise_ft": {"alphas": [0.25, 0.75]}}})
    done = run(project, "flows.reproduce", PREFECT_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "Comparison: reports/comparison.html\n"
    names = {row.name for row in load_scores(project / "results/shapes.safetensors").rows}
    assert "wise_ft/0-1-2@0.75" in names
    assert "wise_ft/0-1-2@0.5" not in names
    # shards, the anchor's two, another anchor, the seeds, the centre's, variants, arms and a longer run, other methods
    assert done.stderr.count("Cached(") == 5 + 2 + 1 + 3 + 2 + 3 + 3 + 4
