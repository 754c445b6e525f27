"""Pools: weight sets that differ in more than their seed, merged in pairs and as a whole."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelstock.experiment.paths import variant_file
from modelstock.params import VariantParams
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


def one_recipe(variants: Mapping[str, VariantParams]) -> dict[str, VariantParams]:
    """The variants of pools whose members differ in their seeds alone, or in the order of their examples."""
    recipes: dict[str, list[dict[str, object]]] = {}
    for variant in variants.values():
        recipe = {name: value for name, value in variant.recipe.items() if name != "order_seed"}
        recipes.setdefault(variant.pool, []).append(recipe)
    same = [pool for pool, of_pool in recipes.items() if all(recipe == of_pool[0] for recipe in of_pool)]
    return {name: variant for name, variant in variants.items() if variant.pool in same}
