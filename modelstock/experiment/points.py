"""Scoring in the experiment, for the geometry alone: points around the seeds, and pools, on one benchmark."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from modelstock.data.dataset import Dataset
from modelstock.experiment.pools import Pool
from modelstock.geometry.points import AVERAGED, Point, points
from modelstock.geometry.space import Space, checkpoint_of, merge_plan
from modelstock.merging.engine import merge
from modelstock.params import GeometryParams
from modelstock.scoring.batch_norm import Recalibration
from modelstock.scoring.one_pass import ScoringOptions, accuracies, collect, score
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
    recalibration: Recalibration | None = None,
) -> Scores:
    """Score all points, and those of pools, in one pass over a benchmark; each has its row.

    `recalibration`: of all points but the anchor and seeds themselves; the row of such a point also has the identity
    that it had before.

    Raises:
        DataError, ParamsError, WeightsError: see modelstock.geometry.points.points and modelstock.scoring.one_pass.
    """
    chosen = [(point, anchor) for point in points(space, params)]
    for pool in pools:
        chosen += [(point, pool.anchor) for point in pool_points(pool, held_out, options, recalibration)]
    weights, rows = [], []
    for point, origin in chosen:
        averaged = point.weights(origin)
        of_point = averaged if recalibration is None or point.trained else recalibration(averaged)
        weights.append(of_point)
        row = point.row(of_point)
        if of_point is not averaged:
            row = replace(row, options={**row.options, AVERAGED: averaged.identity})
        rows.append(row)
    outcomes = score(dataset, weights, options=options)
    return collect(dataset, rows, outcomes, weights, options.precision)


def pool_points(
    pool: Pool, held_out: Dataset, scoring: ScoringOptions, recalibration: Recalibration | None = None
) -> Iterator[Point]:
    """The pool's anchor and members, both merges of every pair, and the uniform and the greedy soup of them all.

    The greedy soup takes members in the order of, and as long as they help, its accuracy on the held-out split;
    `recalibration`: of the soups that are tried.
    """
    tried: Callable[[WeightSet], WeightSet] = recalibration or (lambda weights: weights)
    names, checkpoints = list(pool.members), [checkpoint_of(weights) for weights in pool.members.values()]
    space = Space(checkpoint_of(pool.anchor), dict(enumerate(checkpoints)))

    def point(method: str, members: tuple[str, ...], checkpoint: object, **facts: object) -> Point:
        ending = "+".join(members) if len(members) < len(names) or len(names) == 2 else "all"
        return Point(
            name=f"pool/{pool.name}/{method}" + f"/{ending}" * bool(members),
            kind="pool",
            members=(),
            facts={"pool": pool.name, "method": method, "members": list(members), "of": len(names), **facts},
            checkpoint=checkpoint,  # type: ignore[arg-type]
        )

    yield point("anchor", (), space.anchor)
    for name, checkpoint in zip(names, checkpoints, strict=True):
        yield point("member", (name,), checkpoint)
    for first, second in combinations(range(len(names)), 2):
        cosine, both = space.cosine((first, second)), (names[first], names[second])
        for method in ("uniform", "model_stock"):
            plan = merge_plan(method, space.anchor, [checkpoints[first], checkpoints[second]])
            yield point(method, both, plan.as_checkpoint(), cosine=cosine)
    if len(names) > 2:
        yield point("uniform", tuple(names), merge_plan("uniform", space.anchor, checkpoints).as_checkpoint())
    soup, report = merge(
        "greedy",
        pool.anchor,
        list(pool.members.values()),
        score=lambda weights: accuracies(held_out, list(map(tried, weights)), scoring),
        recalibrated=recalibration is not None,
    )
    kept = next(iter(report.values()))["chosen"]
    taken = [name for name, weights in pool.members.items() if weights.source in kept]
    yield point("greedy", tuple(names), checkpoint_of(soup), taken=taken)
