"""Scoring in the experiment, for the geometry alone: points around the seeds, and pools, on one benchmark."""

from collections.abc import Sequence

from modelstock.data.dataset import Dataset
from modelstock.experiment.pools import Pool, pool_points
from modelstock.geometry.points import Point, points
from modelstock.geometry.space import Space
from modelstock.params import GeometryParams
from modelstock.scoring.one_pass import ScoringOptions, collect, score
from modelstock.scoring.results import Scores
from modelstock.weights.weight_set import WeightSet


def score_points(
    dataset: Dataset,
    anchor: WeightSet,
    space: Space,
    params: GeometryParams,
    options: ScoringOptions,
    *,
    held_out: Dataset,
    pools: Sequence[Pool] = (),
) -> Scores:
    """Score all points, and those of pools, in one pass over a benchmark; each has its row.

    Raises:
        DataError, ParamsError, WeightsError: see modelstock.geometry.points.points and modelstock.scoring.one_pass.
    """
    chosen: list[tuple[Point, WeightSet]] = [(point, point.weights(anchor)) for point in points(space, params)]
    for pool in pools:
        chosen += [(point, point.weights(pool.anchor)) for point in pool_points(pool, held_out, options)]
    weights = [of_point for _, of_point in chosen]
    outcomes = score(dataset, weights, options=options)
    return collect(dataset, [point.row(w) for point, w in chosen], outcomes, weights, options.precision)
