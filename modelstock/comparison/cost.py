"""What a row costs: training in units of one seed, and inference in passes of one model."""

from collections.abc import Sequence

from modelstock.merging.methods.table import METHODS
from modelstock.scoring.results import Row


def trainings(row: Row, seeds: int) -> int:
    """How many seeds' training a row takes, of an experiment with this many seeds.

    Nothing for the anchor; one for a seed, and for averages and snapshots along its run; a longer run its factor; a
    merge or an ensemble of k seeds k, and so does a periodic run, whose seeds train side by side. A method that selects
    its members among the seeds takes all of them. What merging costs itself is not counted.
    """
    if row.kind in METHODS and METHODS[row.kind].selects:
        return seeds
    return int(row.options["factor"]) if row.kind == "longer" else len(row.members)


def passes(row: Row) -> int:
    """How many models' forward passes one answer takes: an ensemble's members, else one."""
    return len(row.members) if row.kind == "ensemble" else 1


def costs(rows: Sequence[Row]) -> dict[str, int]:
    """Row -> its training in units of one seed."""
    seeds = sum(row.kind == "seed" for row in rows)
    return {row.name: trainings(row, seeds) for row in rows}
