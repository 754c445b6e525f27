"""Weight sets that are scored for the geometry alone: points on lines, planes and shells around the seeds' centre.

A point is computed when it is read, so hundreds of them need no more memory than the few that are scored at a time.
Where the comparison has a row like it, a point has that row's kind and bytes: `uniform/0-1` is the uniform soup.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from modelstock.errors import ParamsError
from modelstock.geometry.space import Space, merge_plan
from modelstock.merging.methods.model_stock import stock_ratio
from modelstock.params import GeometryParams
from modelstock.scoring.results import Row
from modelstock.weights.layout import blocks
from modelstock.weights.tensors import Checkpoint, StoredTensor, narrow
from modelstock.weights.weight_set import LazyArrays, WeightSet

# Of a row whose BatchNorm statistics were estimated again: its point's identity before.
AVERAGED = "identity with averaged statistics"
SUBSET_TRIES = 10_000  # of which the random subsets of a size are drawn where there are too many to list


@dataclass(frozen=True, kw_only=True)
class Point:
    """`kind`: what it is for; `members`: the seeds under test that it is made of; `facts`: where it lies, as JSON."""

    name: str
    kind: str
    members: tuple[int, ...]
    facts: Mapping[str, Any]
    checkpoint: Checkpoint

    @property
    def trained(self) -> bool:
        """Whether training made it, the anchor's or a seed's."""
        return self.kind in ("anchor", "seed") or self.facts.get("method") in ("anchor", "member")

    def weights(self, anchor: WeightSet) -> WeightSet:
        """The weight set, with the anchor's architecture, preprocessing and classes."""
        meta = {name: value for name, value in anchor.meta.items() if name != "notices"}
        return WeightSet(LazyArrays(self.checkpoint), meta, self.name)

    def row(self, weights: WeightSet) -> Row:
        """Its row in the results."""
        return Row(self.name, weights.identity, self.kind, self.members, self.facts)


def points(space: Space, params: GeometryParams) -> list[Point]:
    """All points that the settings ask for, the anchor and the seeds first; each name is there once.

    Raises:
        ParamsError: fewer seeds than a group needs.
    """
    _check(space, params)
    seeds = list(space.seeds)
    chosen = [Point(name="anchor", kind="anchor", members=(), facts={}, checkpoint=space.anchor)]
    chosen += [_point("seed", (seed,), {}, space.seeds[seed], name=f"seed-{seed}") for seed in seeds]
    if space.set_aside:
        chosen.append(_point("centre", (), {"seeds": len(space.set_aside)}, space.centre, name="centre"))
    pairs = ring_pairs(seeds, params.pairs)
    subsets = [s for size in params.sizes for s in subsets_of(seeds, size, most=params.subsets, seed=params.seed)]
    chosen += _merges(space, dict.fromkeys([*subsets, *pairs, *([tuple(seeds[:2])] if params.alphas else [])]))
    chosen += _wise_ft(space, seeds[: params.paths], params.alphas)
    chosen += _rays(space, pairs, params.scales)
    chosen += _plane(space, params.plane)
    chosen += _granularities(space, pairs)
    if space.set_aside:
        chosen += _oracles(space, pairs)
        chosen += _noise(space, params.noise, params.seed)
    return list({point.name: point for point in chosen}.values())


def _check(space: Space, params: GeometryParams) -> None:
    """Refuse fewer seeds than are asked for."""
    needed = {"pairs": 2 * bool(params.pairs), "plane": 2 * bool(params.plane), "sizes": max(params.sizes, default=0)}
    for setting, count in needed.items():
        if len(space.seeds) < count:
            cure = "train more seeds, or ask for less"
            raise ParamsError(f"geometry.{setting}", got=f"{len(space.seeds)} seeds", expected=f"{count}", cure=cure)
    if params.noise and not space.set_aside:
        cure = "name seeds that are set aside for the centre"
        raise ParamsError("geometry.noise", got="no geometry.centre", expected="two seeds or more", cure=cure)


def subsets_of(seeds: Sequence[int], size: int, *, most: int, seed: int) -> list[tuple[int, ...]]:
    """All subsets of a size, or where there are more than `most` of them, `most` drawn at random; sorted."""
    count = math.comb(len(seeds), size)
    if count <= most:
        return list(combinations(seeds, size))
    generator = np.random.default_rng([seed, size])
    if count <= SUBSET_TRIES:
        every = list(combinations(seeds, size))
        return [every[place] for place in sorted(generator.choice(count, most, replace=False))]
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < most:
        places = sorted(generator.choice(len(seeds), size, replace=False).tolist())
        drawn.add(tuple(seeds[place] for place in places))
    return sorted(drawn)


def ring_pairs(seeds: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """The first pairs of a seed with the next one, the last with the first; none twice."""
    ring = [*pairwise(seeds), *([(seeds[-1], seeds[0])] if len(seeds) > 2 else [])]
    return [tuple(sorted(pair)) for pair in ring[:most]]


def _joined(members: Sequence[int]) -> str:
    return "-".join(map(str, members))


def _point(
    kind: str, members: Sequence[int], facts: Mapping[str, Any], checkpoint: Checkpoint, *, name: str = ""
) -> Point:
    """A point; its name ends in its facts where none is given."""
    ending = "".join(f"@{value}" for value in facts.values())
    return Point(
        name=name or f"{kind}/{_joined(members)}{ending}",
        kind=kind,
        members=tuple(members),
        facts=facts,
        checkpoint=checkpoint,
    )


def _merges(space: Space, subsets: Sequence[tuple[int, ...]] | Mapping[tuple[int, ...], Any]) -> Iterator[Point]:
    """The uniform soup and Model Stock of subsets of two seeds and more; of pairs with their cosine."""
    for members in subsets:
        if len(members) > 1:
            tuned = [space.seeds[member] for member in members]
            facts = {"cosine": space.cosine(members)} if len(members) == 2 else {}
            for method in ("uniform", "model_stock"):
                merged = merge_plan(method, space.anchor, tuned).as_checkpoint()
                yield _point(method, members, facts, merged, name=f"{method}/{_joined(members)}")


def _wise_ft(space: Space, seeds: Sequence[int], alphas: Sequence[float]) -> Iterator[Point]:
    """w0 + alpha * update, for single seeds, and for the uniform soup and Model Stock of the first two."""
    for alpha in alphas:
        for seed in seeds:
            yield _point("path", (seed,), {"toward": "seed", "alpha": alpha}, space.span.blend({seed: alpha}))
    pair = tuple(list(space.seeds)[:2])
    for method in ("uniform", "model_stock"):
        for alpha in alphas:
            tuned = [space.seeds[member] for member in pair]
            plan = merge_plan(method, space.anchor, tuned, options={"scale": alpha})
            yield _point("path", pair, {"toward": method, "alpha": alpha}, plan.as_checkpoint())


def _rays(space: Space, pairs: Sequence[tuple[int, ...]], scales: Sequence[float]) -> Iterator[Point]:
    """w0 + s * mean update of pairs."""
    for pair in pairs:
        for scale in scales:
            shares = dict.fromkeys(pair, scale / len(pair))
            yield _point("ray", pair, {"s": scale}, space.span.blend(shares))


def _plane(space: Space, steps: Sequence[float]) -> Iterator[Point]:
    """w0 + a v_1 + b v_2 of the first two seeds, on a grid of all a and b: w0, w1 and w2 are nodes at 0 and 1."""
    pair = tuple(list(space.seeds)[:2])
    for a in steps:
        for b in steps:
            yield _point("plane", pair, {"a": a, "b": b}, space.span.blend({pair[0]: a, pair[1]: b}))


def _granularities(space: Space, pairs: Sequence[tuple[int, ...]]) -> Iterator[Point]:
    """Model Stock with a ratio per filter, block, or one for the whole model; per tensor it is the merge itself."""
    for pair in pairs:
        tuned = [space.seeds[member] for member in pair]
        for granularity in ("filter", "model"):
            plan = merge_plan("model_stock", space.anchor, tuned, granularity=granularity)
            yield _point("granularity", pair, {"unit": granularity}, plan.as_checkpoint())
        shares = dict.fromkeys(pair, 1 / len(pair))
        yield _point("granularity", pair, {"unit": "block"}, space.span.blend(shares, block_ratios(space, pair)))


def block_ratios(space: Space, pair: Sequence[int]) -> dict[str, float]:
    """Tensor -> the ratio of its block, from the inner products of the block's tensors together."""
    places = [list(space.seeds).index(member) for member in pair]
    numbered = blocks(space.span.names)
    sums: dict[tuple[int, int], Any] = {}
    for name in space.span.names:
        sums[numbered[name]] = sums.get(numbered[name], 0) + space.grams[name][np.ix_(places, places)]
    ratios = {}
    for block, gram in sums.items():
        lengths = math.sqrt(gram[0, 0] * gram[1, 1])
        ratios[block] = float(np.clip(stock_ratio(gram[0, 1] / lengths, 2), 0, 1)) if lengths else 0.0
    return {name: ratios[numbered[name]] for name in space.span.names}


def _oracles(space: Space, pairs: Sequence[tuple[int, ...]]) -> Iterator[Point]:
    """The point of each tensor's ray through the pair's mean that is nearest to the centre."""
    for pair in pairs:
        shares = dict.fromkeys(pair, 1 / len(pair))
        yield _point("oracle", pair, {}, space.span.blend(shares, space.projections(pair)))


def _noise(space: Space, draws: int, seed: int) -> Iterator[Point]:
    """The centre plus Gaussian noise as large as a seed's residual: of any direction, or of the seeds' covariance."""
    keys = list(space.set_aside)
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        normal = generator.standard_normal(len(keys))
        shares = 1 / len(keys) + (normal - normal.mean()) / math.sqrt(len(keys) - 1)
        blend = space.centre_span.blend(dict(zip(keys, shares.tolist(), strict=True)))
        yield _point("noise", (), {"of": "covariance", "draw": draw}, blend)
        yield _point("noise", (), {"of": "isotropic", "draw": draw}, isotropic(space, seed, draw))


def isotropic(space: Space, seed: int, draw: int) -> Checkpoint:
    """The centre plus noise that has each tensor's radius in the root mean square, the same in every direction."""

    def entry(name: str, origin: StoredTensor) -> StoredTensor:
        if name not in space.radii or not origin.size:
            return origin

        def read(start: int, stop: int, scratch: Any = None) -> Any:
            generator = np.random.default_rng([*name.encode(), seed, draw])
            noise = space.radii[name] / math.sqrt(origin.size) * generator.standard_normal(origin.size)
            return narrow((origin.values() + noise)[start:stop], origin.dtype)

        return StoredTensor(origin.dtype, origin.shape, read)

    return Checkpoint({name: entry(name, tensor) for name, tensor in space.centre.tensors.items()})
