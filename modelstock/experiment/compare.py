"""Comparing in the experiment: intervals, paired tests and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelstock.comparison.compare import Comparison, Resample, compare
from modelstock.comparison.report import published_figures, write_report
from modelstock.experiment.paths import GEOMETRY_SECTION
from modelstock.experiment.updates import update_cosines
from modelstock.notices import repeat
from modelstock.scoring.results import Scores
from modelstock.tracking.history import read_history
from modelstock.weights.weight_set import WeightSet


def compare_results(
    results: Sequence[Scores],
    out: Path,
    *,
    anchor: WeightSet,
    seeds: Sequence[WeightSet],
    histories: Sequence[Path] = (),
    resample: Resample = "images",
    margin: float = 0.005,
    geometry: Path | None = None,
) -> Comparison:
    """Compare the rows on all benchmarks and write the report to `out`.

    `anchor`, `seeds`: for what is reported of the seeds' updates; `histories`: files of the seeds' training, if any.
    `resample`, `margin`: see modelstock.comparison.compare. `geometry`: the folder of that stage, whose section and
    files the report takes.

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
    more = {file.name: file.read_bytes() for file in sorted(geometry.iterdir())} if geometry else {}
    section = more.pop(GEOMETRY_SECTION, b"").decode()
    lines = [read_history(file) for file in histories]
    write_report(comparison, out, facts=facts, histories=lines, section=section, more=more)
    return comparison
