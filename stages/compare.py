"""Intervals, paired tests, tables, figure and report; the tracker made complete; the champion by the held-out split."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from modelstock.comparison.compare import Comparison
from modelstock.comparison.report import summary_lines
from modelstock.errors import TrackingError
from modelstock.experiment.compare import compare_results, files_by_identity
from modelstock.experiment.paths import (
    anchor_file,
    finetuned_folder,
    history_file,
    load_seeds,
    other_files,
    results_file,
    seed_file,
)
from modelstock.params import TrackingParams, load_params
from modelstock.scoring.results import Scores, load_scores
from modelstock.tracking.mlflow import Tracker
from modelstock.weights.weight_set import load_weights
from stages import run


def provenance() -> dict[str, str]:
    """Tags that lead back to the inputs: the git commit, where this is a checkout."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"git.commit": asked.stdout.strip()} if asked.returncode == 0 else {}


def dvc_hashes() -> dict[str, str]:
    """Output path -> DVC's hash, from dvc.lock."""
    lock = Path("dvc.lock")
    stages = (YAML(typ="safe").load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def track(params: TrackingParams, results: list[Scores], comparison: Comparison, files: dict[str, Path]) -> None:
    """Send every row and its metrics to MLflow, once by identity, and move the alias `champion`."""
    tracker = Tracker(Path.cwd(), params.experiment)
    hashes, tags = dvc_hashes(), provenance()
    datasets = {s.benchmark: s.data for s in results}
    names: dict[str, list[str]] = {}
    for row in results[0].rows:
        names.setdefault(row.identity, []).append(row.name)
    for row in results[0].rows:
        if names[row.identity][0] != row.name:
            continue  # the same tensors under a second name: they have their run already, tagged with both
        metrics = comparison.metrics[row.name]
        own = {**tags, "modelstock.names": ", ".join(names[row.identity])}
        if row.kind == "ensemble":
            shown: dict[str, Any] = {"method": "ensemble", "members": "-".join(map(str, row.members))}
            tracker.record_scores(
                row.identity,
                name=row.name,
                metrics=metrics,
                datasets=datasets,
                params=shown,
                tags=own,
                held_out=comparison.held_out,
            )
            continue
        file = files[row.identity]
        parent = next((p for p in (str(file), str(file.parent)) if p in hashes), None)
        own |= {"dvc.md5": hashes[parent]} if parent else {}
        history = file.with_name("history.jsonl")
        key = load_weights(file, lazy=True).meta["made_by"].get("key")
        tracker.record(
            file,
            name=row.name,
            key=key,
            history=history if key and history.exists() else None,
            tags=own,
            metrics=metrics,
            datasets=datasets,
            held_out=comparison.held_out,
        )
        alias = "champion" if comparison.champion in names[row.identity] else None
        tracker.register(row.identity, model_name=params.model, alias=alias)


def main(results: Path, models: Path, out: Path) -> None:
    """RESULTS: results per example; MODELS: anchor.safetensors and folders of weight sets; OUT: the report's folder."""
    params = load_params()
    scores = [load_scores(results_file(results, name)) for name in params.evaluate.benchmarks]
    tuned, seeds = finetuned_folder(models), params.seeds
    others = other_files(
        models,
        methods=params.merge.methods,
        recipe=None if params.checkpoints else params.finetune,
        seeds=params.seeds,
        sizes=params.periodic.sizes,
    )
    seed_files = [seed_file(tuned, seed) for seed in seeds]
    files = files_by_identity(scores, [anchor_file(models), *seed_files, *others])
    comparison = compare_results(
        scores,
        out,
        anchor=load_weights(anchor_file(models), lazy=True),
        seeds=list(load_seeds(tuned, seeds, lazy=True).values()),
        histories=[file for file in map(history_file, seed_files) if file.exists()],
        draws=params.compare.draws,
        seed=params.compare.seed,
    )
    try:
        track(params.tracking, scores, comparison, files)
    except TrackingError as error:
        # The figures do not depend on a tracker: what is missing there is sent by the next `dvc repro -f compare`.
        print(f"warning: {error}", file=sys.stderr)
    print(summary_lines(comparison))
    store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    print(f"report: {out / 'comparison.html'} | champion by the held-out split: {comparison.champion}")
    print(f"MLflow: .venv/bin/mlflow ui --backend-store-uri {store}   (or: make up)")


if __name__ == "__main__":
    run(main)
