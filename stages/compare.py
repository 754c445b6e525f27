"""Intervals, paired tests, tables, figure and report; MLflow made complete; the champion by the held-out cut."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from modelstock.comparison import champion, compare
from modelstock.errors import TrackingError
from modelstock.params import TrackingParams, load_params
from modelstock.report import summary_lines, write_report
from modelstock.scores import Scores, load_scores
from modelstock.scratch import read_history, write_table
from modelstock.soups import beside, finetuned
from modelstock.tracking import Tracker
from modelstock.weights import WeightSet, load_weights
from stages import run


def cosines(anchor: WeightSet, seeds: dict[int, WeightSet]) -> dict[str, Any]:
    """Quantiles, over tensors and pairs of seeds, of the cosine between two seeds' updates."""
    found = []
    for name, origin in anchor.tensors.items():
        if origin.dtype.kind == "f":
            updates = [(w.tensors[name].astype(np.float64) - origin).ravel() for w in seeds.values()]
            unit = np.stack([u / np.linalg.norm(u) for u in updates if u.any()])
            found.append((unit @ unit.T)[np.triu_indices(len(unit), 1)])
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


def track(params: TrackingParams, results: list[Scores], files: dict[str, Path], best: str) -> None:
    """Send every row to MLflow, once by identity, and move the alias `champion`."""
    tracker = Tracker(Path.cwd(), params.experiment)
    hashes, tags = dvc_hashes(), provenance()
    datasets = {s.benchmark: s.data for s in results}
    names: dict[str, list[str]] = {}
    for row in results[0].rows:
        names.setdefault(row.identity, []).append(row.name)
    for number, row in enumerate(results[0].rows):
        if names[row.identity][0] != row.name:
            continue  # the same tensors under a second name: they have their run already, tagged with both
        metrics = {s.benchmark: {"top1": float(s.correct[number].mean())} for s in results}
        own = {**tags, "modelstock.names": ", ".join(names[row.identity])}
        if row.kind == "ensemble":
            shown: dict[str, Any] = {"method": "ensemble", "members": "-".join(map(str, row.members))}
            tracker.record_scores(
                row.identity, name=row.name, metrics=metrics, datasets=datasets, params=shown, tags=own
            )
            continue
        file = files[row.identity]
        parent = next((p for p in (str(file), str(file.parent)) if p in hashes), None)
        own |= {"dvc.md5": hashes[parent]} if parent else {}
        history = file.with_name("history.jsonl")
        key = load_weights(file).meta["made_by"].get("key")
        tracker.record(
            file, name=row.name, key=key, history=history if key and history.exists() else None,
            tags=own, metrics=metrics, datasets=datasets,
        )  # fmt: skip
        tracker.register(
            row.identity, model_name=params.model, alias="champion" if best in names[row.identity] else None
        )


def main(
    results: Path, anchor: Path, tuned: Path, merged: Path, periodic: Path, longer: Path, out: Path
) -> None:
    """RESULTS: per-example results; ANCHOR, and folders of weight sets: TUNED, ...; OUT: the folder for the report."""
    params = load_params()
    scores = [load_scores(results / f"{name}.safetensors") for name in params.evaluate.benchmarks]
    origin, seeds = load_weights(anchor), finetuned(tuned, params.finetune.seeds)
    comparison = compare(scores, draws=params.compare.draws, seed=params.compare.seed)
    best = champion(scores)
    write_report(comparison, out, facts={"cosines": cosines(origin, seeds), "champion": best.name})
    curves = [read_history(tuned / str(seed) / "history.jsonl") for seed in seeds]
    rows = []
    for moments in zip(*curves, strict=True):
        if "validation/top1" in moments[0]:
            held = [100 * m["validation/top1"] for m in moments]
            rows.append({"step": moments[0]["step"], "mean": np.mean(held), "low": min(held), "high": max(held)})
    write_table(out / "held_out.csv", rows)
    paths = [anchor, *(tuned / str(seed) / "weights.safetensors" for seed in seeds)]
    paths += [p for method in params.merge.methods for p in sorted((merged / method).glob("*.safetensors"))]
    paths += beside(tuned, periodic, longer, params)
    # Of equal tensors in two files, as a greedy soup of one seed gives, the first is the one that counts.
    try:
        track(params.tracking, scores, {load_weights(p).identity: p for p in reversed(paths)}, best.name)
    except TrackingError as error:
        # The figures do not depend on MLflow: what is missing there is sent by the next `dvc repro -f compare`.
        print(f"warning: {error}", file=sys.stderr)
    print(summary_lines(comparison))
    store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    print(f"report: {out / 'comparison.html'} | champion by the held-out cut: {best.name}")
    print(f"MLflow: .venv/bin/mlflow ui --backend-store-uri {store}   (or: make up)")


if __name__ == "__main__":
    run(main)
