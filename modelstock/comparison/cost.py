"""What a row costs: training in units of one seed, and inference in passes of one model."""

from collections.abc import Sequence

from modelstock.merging.methods.table import METHODS
from modelstock.scoring.results import Row


def trainings(row: Row, seeds: Sequence[Row]) -> float:
    """How many seeds' training a row takes, of an experiment with these seeds.

    Nothing for the anchor; one for a seed, and for averages and snapshots along its run; a longer run its factor, and a
    variant its epochs over those of a seed, both times the share of the training set; a merge or an ensemble of k seeds
    k, and so does a periodic run, whose seeds train side by side. A method that selects its members among the seeds
    takes all of them. What merging costs itself is not counted.
    """
    if row.kind in METHODS and METHODS[row.kind].selects:
        return len(seeds)
    if row.kind == "longer":
        return int(row.options["factor"])
    of_seed = next((seed.options["epochs"] for seed in seeds if "epochs" in seed.options), None)
    if of_seed and row.kind not in METHODS and "epochs" in row.options:
        return float(row.options["epochs"] / of_seed)
    return len(row.members)


def passes(row: Row) -> int:
    """How many models' forward passes one answer takes: an ensemble's members, else one."""
    return len(row.members) if row.kind == "ensemble" else 1


def costs(rows: Sequence[Row]) -> dict[str, float]:
    """Row -> its training in units of one seed."""
    seeds = [row for row in rows if row.kind == "seed"]
    return {row.name: trainings(row, seeds) for row in rows}
