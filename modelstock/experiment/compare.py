"""Comparing in the experiment: intervals, paired tests and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelstock.comparison.compare import Comparison, Resample, compare
from modelstock.comparison.report import published_figures, write_report
from modelstock.errors import WeightsError, few
from modelstock.experiment.updates import update_cosines
from modelstock.notices import repeat
from modelstock.scoring.results import Scores
from modelstock.tracking.history import read_history
from modelstock.weights.weight_set import WeightSet, load_weights


def files_by_identity(results: Sequence[Scores], files: Sequence[Path]) -> dict[str, Path]:
    """Identity -> file, for every scored row that is a weight set; `files` that are not there count as none.

    Raises:
        WeightsError: no file has a row's weights.
    """
    # Where two files have the same tensors, as a greedy soup of one seed and the seed, the first counts.
    by_identity = {load_weights(file, lazy=True).identity: file for file in reversed(files) if file.exists()}
    missing = [row.name for row in results[0].rows if row.kind != "ensemble" and row.identity not in by_identity]
    if missing:
        raise WeightsError(
            "models",
            got=f"no file with the weights of {few(missing)}",
            expected="those that were scored",
            cure="run the stage evaluate for every benchmark again",
        )
    return by_identity


def compare_results(
    results: Sequence[Scores],
    out: Path,
    *,
    anchor: WeightSet,
    seeds: Sequence[WeightSet],
    histories: Sequence[Path] = (),
    resample: Resample = "images",
    margin: float = 0.005,
) -> Comparison:
    """Compare the rows on all benchmarks and write the report to `out`.

    `anchor`, `seeds`: for what is reported of the seeds' updates; `histories`: files of the seeds' training, if any.
    `resample`, `margin`: see modelstock.comparison.compare.

    Raises:
        DataError: results without a held-out and an in-distribution benchmark, or of different rows.
    """
    comparison = compare(results, resample=resample, margin=margin)
    for line in comparison.notices:
        subject, _, text = line.partition(": ")
        repeat([line if subject in comparison.benchmarks else text])  # a weight set's own say what they are about
    facts: dict[str, Any] = {
        "champion": comparison.champion,
        "cosines": update_cosines(anchor, seeds),
        "published": published_figures(comparison, anchor.meta.get("backbone")),
    }
    facts = {name: fact for name, fact in facts.items() if fact}
    write_report(comparison, out, facts=facts, histories=[read_history(file) for file in histories])
    return comparison
