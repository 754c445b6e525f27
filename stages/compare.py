"""Intervals, paired tests, tables, figure and report; the tracker made complete; the champion by the held-out split."""

import sys
from collections.abc import Sequence
from pathlib import Path

from modelstock.comparison.report import summary_lines, write_summary
from modelstock.errors import TrackingError
from modelstock.experiment.compare import checked, compare_results
from modelstock.experiment.left_over import remove_left_over, remove_left_over_models
from modelstock.experiment.paths import (
    POINTS,
    anchor_file,
    files_by_identity,
    finetuned_folder,
    history_file,
    load_seeds,
    other_files,
    results_file,
    seed_file,
)
from modelstock.experiment.tracked import tracked
from modelstock.files import project
from modelstock.params import load_params
from modelstock.scoring.results import load_scores
from modelstock.tracking.lineage import dvc_hashes
from modelstock.tracking.tracker import open_tracker
from modelstock.weights.weight_set import load_weights
from stages import run


def main(results: Path, models: Path, geometry: Path, out: Path, metrics: Path) -> None:
    """RESULTS: results per example; MODELS: anchor.safetensors and folders of weight sets; OUT: the report's folder.

    GEOMETRY: the folder of that stage, whose section the report shows. METRICS: that of what `dvc metrics show` prints.
    """
    params = load_params()
    remove_left_over_models(models, params)
    remove_left_over(results, [POINTS, *(results_file(results, name).name for name in params.evaluate.benchmarks)])
    scores = [load_scores(results_file(results, name)) for name in params.evaluate.benchmarks]
    tuned, seeds = finetuned_folder(models), params.seeds
    others = other_files(models, params)
    seed_files = [seed_file(tuned, seed) for seed in seeds]
    files = files_by_identity(scores, [anchor_file(models), *seed_files, *others])
    comparison = compare_results(
        scores,
        out,
        anchor=load_weights(anchor_file(models), lazy=True),
        seeds=list(load_seeds(tuned, seeds, lazy=True).values()),
        others=checked(files),
        histories=[file for file in map(history_file, seed_files) if file.exists()],
        resample=params.compare.resample,
        margin=params.compare.margin,
        geometry=geometry,
        champion=params.compare.champion,
    )
    remove_left_over(metrics, write_summary(comparison, metrics))
    shown: Sequence[str] = []
    try:
        tracker = open_tracker(params.tracking.tracker, project(), params.tracking.experiment)
        shown = tracker.record(
            tracked(
                comparison,
                scores,
                files,
                report=out,
                params=params.model_dump(mode="json"),
                model_name=params.tracking.model,
                dvc_hashes=dvc_hashes(Path.cwd()),
            )
        )
    except TrackingError as error:
        # The figures do not depend on a tracker: what is missing there is sent by the next `dvc repro -s -f compare`.
        print(f"warning: {error}", file=sys.stderr)
    print(summary_lines(comparison))
    print(f"report: {out / 'comparison.html'} | champion by the held-out split: {comparison.champion}")
    for line in shown:
        print(line)


if __name__ == "__main__":
    run(main)
