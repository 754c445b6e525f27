"""Pools: weight sets that differ in more than their seed, merged in pairs and as a whole."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from modelstock.data.dataset import Dataset
from modelstock.experiment.paths import variant_file
from modelstock.geometry.points import Point
from modelstock.geometry.space import Space, checkpoint_of, merge_plan
from modelstock.merging.engine import merge
from modelstock.params import VariantParams
from modelstock.scoring.one_pass import ScoringOptions, accuracies
from modelstock.weights.weight_set import WeightSet, load_weights


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Weight sets from one anchor, by the names of their variants."""

    name: str
    anchor: WeightSet
    members: Mapping[str, WeightSet]


def load_pools(variants: Mapping[str, VariantParams], models: Path, *, seeds: Collection[str] = ()) -> list[Pool]:
    """The pools of two variants and more.

    `seeds`: identities of the seeds. Variants that end as these, trained for their snapshots, are no pool of their own.

    Raises:
        WeightsError: a weight set that is missing or damaged.
    """
    by_pool: dict[str, list[str]] = {}
    for name, variant in variants.items():
        by_pool.setdefault(variant.pool, []).append(name)
    pools = []
    for pool, names in by_pool.items():
        if len(names) > 1:
            members = {name: load_weights(variant_file(models, name), lazy=True) for name in names}
            anchor = load_weights(models.parent / variants[names[0]].anchor, lazy=True)  # one for the whole pool
            if not {weights.identity for weights in members.values()} <= set(seeds):
                pools.append(Pool(name=pool, anchor=anchor, members=members))
    return pools


def pool_points(pool: Pool, held_out: Dataset, scoring: ScoringOptions) -> Iterator[Point]:
    """The pool's anchor and members, both merges of every pair, and the uniform and the greedy soup of them all.

    The greedy soup takes members in the order of, and as long as they help, its accuracy on the held-out split.
    """
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
        score=lambda weights: accuracies(held_out, weights, scoring),
    )
    kept = next(iter(report.values()))["chosen"]
    taken = [name for name, weights in pool.members.items() if weights.source in kept]
    yield point("greedy", tuple(names), checkpoint_of(soup), taken=taken)
