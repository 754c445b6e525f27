"""Intervals, paired tests, tables, figure and report; MLflow made complete; the champion by the held-out cut."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from modelstock.comparison.compare import Comparison, compare
from modelstock.comparison.report import published_figures, summary_lines, write_report
from modelstock.errors import TrackingError, WeightsError
from modelstock.experiment.subsets import beside, finetuned
from modelstock.params import TrackingParams, load_params
from modelstock.scoring.results import Scores, load_scores
from modelstock.tracking.history import read_history
from modelstock.tracking.mlflow import Tracker
from modelstock.weights.weight_set import WeightSet, load_weights
from stages import run


def cosines(anchor: WeightSet, seeds: dict[int, WeightSet]) -> dict[str, Any]:
    """Quantiles, over tensors and pairs of seeds, of the cosine between two seeds' updates; empty without any."""
    found = []
    for name, origin in anchor.tensors.items():
        if origin.dtype.kind == "f":
            updates = [(w.tensors[name].astype(np.float64) - origin).ravel() for w in seeds.values()]
            unit = [u / np.linalg.norm(u) for u in updates if u.any()]  # a frozen head has no update
            if len(unit) > 1:
                found.append((np.stack(unit) @ np.stack(unit).T)[np.triu_indices(len(unit), 1)])
    if not found:
        return {}
    values = np.quantile(np.concatenate(found), [0, 0.1, 0.5, 0.9, 1])
    return dict(zip(("minimum", "10 %", "median", "90 %", "maximum"), map(float, values), strict=True))


def provenance() -> dict[str, str]:
    """Tags that lead back to the inputs: the git commit, where this is a checkout."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"git.commit": asked.stdout.strip()} if asked.returncode == 0 else {}


def dvc_hashes() -> dict[str, str]:
    """Output path -> DVC's hash, from dvc.lock."""
    lock = Path("dvc.lock")
    stages = (YAML(typ="safe").load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def located(results: list[Scores], paths: list[Path]) -> dict[str, Path]:
    """Identity -> file, for every row that is a weight set.

    Raises:
        WeightsError: no file has a row's weights.
    """
    # Of equal tensors in two files, as a greedy soup of one seed gives, the first is the one that counts.
    files = {load_weights(p, lazy=True).identity: p for p in reversed(paths)}
    missing = [row.name for row in results[0].rows if row.kind != "ensemble" and row.identity not in files]
    if missing:
        raise WeightsError(
            "models",
            got=f"no file with the weights of {', '.join(missing[:5])}",
            expected="those that were scored",
            cure="run the stage evaluate for every benchmark again",
        )
    return files


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
    """RESULTS: per-example results; MODELS: anchor.safetensors and folders of weight sets; OUT: the report's folder."""
    params = load_params()
    scores = [load_scores(results / f"{name}.safetensors") for name in params.evaluate.benchmarks]
    anchor, tuned, merged = models / "anchor.safetensors", models / "finetuned", models / "merged"
    paths = [anchor, *(tuned / str(seed) / "weights.safetensors" for seed in params.seeds)]
    paths += [p for method in params.merge.methods for p in sorted((merged / method).glob("*.safetensors"))]
    # Somebody's own checkpoints have no averages, and nothing may have trained beside them.
    paths += [p for p in beside(tuned, models / "periodic", models / "longer", params) if p.exists()]
    files = located(scores, paths)
    comparison = compare(scores, draws=params.compare.draws, seed=params.compare.seed)
    origin = load_weights(anchor, lazy=True)
    angles = cosines(origin, finetuned(tuned, params.seeds, lazy=True))
    published = published_figures(comparison, origin.meta.get("backbone"))
    facts: dict[str, Any] = {"champion": comparison.champion, "cosines": angles, "published": published}
    facts = {name: value for name, value in facts.items() if value}
    histories = [path for seed in params.seeds if (path := tuned / str(seed) / "history.jsonl").exists()]
    write_report(comparison, out, facts=facts, histories=[read_history(path) for path in histories])
    try:
        track(params.tracking, scores, comparison, files)
    except TrackingError as error:
        # The figures do not depend on MLflow: what is missing there is sent by the next `dvc repro -f compare`.
        print(f"warning: {error}", file=sys.stderr)
    print(summary_lines(comparison))
    store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    print(f"report: {out / 'comparison.html'} | champion by the held-out cut: {comparison.champion}")
    print(f"MLflow: .venv/bin/mlflow ui --backend-store-uri {store}   (or: make up)")


if __name__ == "__main__":
    run(main)
