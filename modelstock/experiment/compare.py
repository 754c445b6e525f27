"""Comparing in the experiment: intervals, paired tests and the report."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock.comparison.compare import Comparison, Resample, compare
from modelstock.comparison.report import published_figures, write_report
from modelstock.experiment.paths import GEOMETRY_SECTION
from modelstock.experiment.updates import distance, update_cosines
from modelstock.notices import repeat
from modelstock.params import ChampionParams
from modelstock.scoring.results import Scores
from modelstock.tracking.history import read_history
from modelstock.weights.checkpoints import open_safetensors
from modelstock.weights.weight_set import LazyArrays, WeightSet

NEAREST = ChampionParams()


def checked(files: Mapping[str, Path]) -> list[WeightSet]:
    """The weight sets of `files_by_identity`, which has read and checked each of them; tensors are read when used."""
    opened = [(identity, open_safetensors(file, keep_open=False)) for identity, file in files.items()]
    return [WeightSet(LazyArrays(one), one.meta, one.source, identity) for identity, one in opened]


def compare_results(
    results: Sequence[Scores],
    out: Path,
    *,
    anchor: WeightSet,
    seeds: Sequence[WeightSet],
    others: Iterable[WeightSet] = (),
    histories: Sequence[Path] = (),
    resample: Resample = "images",
    margin: float = 0.005,
    champion: ChampionParams = NEAREST,
    geometry: Path | None = None,
) -> Comparison:
    """Compare the rows on all benchmarks and write the report to `out`.

    `anchor`, `seeds`: for what is reported of the seeds' updates; with `others`, every scored weight set, for its
    distance to the anchor. `histories`: files of the seeds' training, if any. `resample`, `margin`, `champion`: see
    modelstock.comparison.compare. `geometry`: the folder of that stage, whose section and files the
    report takes.

    Raises:
        DataError: results without a held-out and an in-distribution benchmark, or of different rows.
    """
    distances: dict[str, float] = {}
    for weights in (anchor, *seeds, *others):
        if weights.identity not in distances:
            distances[weights.identity] = distance(anchor, weights)
    comparison = compare(results, resample=resample, margin=margin, champion=champion, distances=distances)
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
