"""Points against numpy by hand: where they lie, what they are called, and how far they are from the centre."""

import math

import numpy as np
import pytest

from modelstock.errors import ParamsError
from modelstock.geometry.points import isotropic, points, ring_pairs, subsets_of
from modelstock.geometry.space import Space, checkpoint_of
from modelstock.merging.engine import merge
from modelstock.params import GeometryParams
from modelstock.weights.weight_set import WeightSet

SHAPES = {"stem.weight": (3, 2), "blocks.0.weight": (4, 3), "blocks.0.bias": (4,), "blocks.1.weight": (5, 4)}
STEPS = [-0.5, 0.0, 0.5, 1.0]


def drawn(seed: int, around: WeightSet | None = None, radius: float = 1.0) -> WeightSet:
    generator = np.random.default_rng(seed)
    tensors = {name: radius * generator.standard_normal(shape) for name, shape in SHAPES.items()}
    if around is not None:
        tensors = {name: around.tensors[name] + values for name, values in tensors.items()}
    return WeightSet({name: values.astype(np.float32) for name, values in tensors.items()}, {}, f"weights {seed}")


ANCHOR = drawn(100)
MIDDLE = drawn(101, ANCHOR)
SEEDS = {seed: drawn(seed, MIDDLE, 0.5) for seed in range(4)}
CENTRE = {seed: drawn(seed, MIDDLE, 0.5) for seed in range(10, 15)}
SECTION = GeometryParams(
    centre=list(CENTRE),
    sizes=[2, 3],
    subsets=3,
    pairs=2,
    scales=[0.5, 1.0],
    paths=2,
    alphas=[0.25],
    plane=STEPS,
    noise=2,
)


def space_of(anchor, seeds, centre=None) -> Space:
    def opened(sets):
        return {seed: checkpoint_of(weights) for seed, weights in sets.items()}

    return Space(checkpoint_of(anchor), opened(seeds), opened(centre or {}))


@pytest.fixture(scope="module")
def space():
    return space_of(ANCHOR, SEEDS, CENTRE)


@pytest.fixture(scope="module")
def by_name(space):
    return {point.name: point for point in points(space, SECTION)}


def arrays(point) -> dict[str, np.ndarray]:
    return {name: tensor.array() for name, tensor in point.checkpoint.tensors.items()}


def update(weights: WeightSet, name: str) -> np.ndarray:
    return weights.tensors[name].astype(np.float64) - ANCHOR.tensors[name]


def flat(weights: WeightSet) -> np.ndarray:
    return np.concatenate([update(weights, name).ravel() for name in SHAPES])


def assert_update(point, expected) -> None:
    """A point's tensors are the anchor plus `expected(name)`, to float32's rounding."""
    for name, values in arrays(point).items():
        np.testing.assert_allclose(values, ANCHOR.tensors[name] + expected(name), atol=1e-6)


def test_every_group_is_there(by_name):
    kinds = [point.kind for point in by_name.values()]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    merges = counts.pop("uniform")
    assert counts.pop("model_stock") == merges
    assert 3 + 3 <= merges <= 3 + 3 + 2  # the pairs of the rays are among them, whatever subsets are drawn
    assert {"uniform/0-1", "model_stock/1-2"} <= set(by_name)
    single = {"anchor": 1, "seed": 4, "centre": 1}
    assert counts == {**single, "path": 2 + 2, "ray": 4, "plane": 16, "granularity": 6, "oracle": 2, "noise": 4}


@pytest.mark.parametrize(("a", "b", "same"), [(0.0, 0.0, ANCHOR), (1.0, 0.0, SEEDS[0]), (0.0, 1.0, SEEDS[1])])
def test_corners_of_the_plane_are_the_anchor_and_the_seeds_to_the_byte(by_name, a, b, same):
    assert by_name[f"plane/0-1@{a}@{b}"].checkpoint.identity == same.identity


def test_other_nodes_of_the_plane(by_name):
    assert_update(by_name["plane/0-1@-0.5@1.0"], lambda name: -0.5 * update(SEEDS[0], name) + update(SEEDS[1], name))


@pytest.mark.parametrize("method", ["uniform", "model_stock"])
def test_merges_have_the_bytes_of_their_methods(by_name, method):
    merges = [point for point in by_name.values() if point.kind == method]
    assert {len(point.members) for point in merges} == {2, 3}
    for point in merges:
        expected, _ = merge(method, ANCHOR, [SEEDS[member] for member in point.members])
        assert point.checkpoint.identity == expected.identity


def test_paths_and_rays(by_name):
    assert_update(by_name["path/1@seed@0.25"], lambda name: 0.25 * update(SEEDS[1], name))
    assert_update(
        by_name["path/0-1@uniform@0.25"], lambda name: 0.125 * (update(SEEDS[0], name) + update(SEEDS[1], name))
    )
    stock = arrays(by_name["model_stock/0-1"])
    assert_update(
        by_name["path/0-1@model_stock@0.25"],
        lambda name: 0.25 * (stock[name].astype(np.float64) - ANCHOR.tensors[name]),
    )
    assert_update(by_name["ray/1-2@0.5"], lambda name: 0.25 * (update(SEEDS[1], name) + update(SEEDS[2], name)))
    assert by_name["ray/1-2@1.0"].checkpoint.identity == by_name["uniform/1-2"].checkpoint.identity


def test_the_centre_is_the_mean_of_the_seeds_set_aside(by_name):
    assert_update(by_name["centre"], lambda name: np.mean([update(w, name) for w in CENTRE.values()], axis=0))


def test_a_blocks_ratio_is_that_of_its_tensors_together():
    # Updates (1, 0 | 1, 1) and (0, 1 | 1, 1): inner product 2, squared norms 3, cosine 2/3, ratio 0.8.
    anchor = WeightSet({"blocks.0.a": np.zeros(2), "blocks.0.b": np.zeros(2)}, {}, "anchor")
    rows = {0: ([1.0, 0.0], [1.0, 1.0]), 1: ([0.0, 1.0], [1.0, 1.0])}
    seeds = {
        seed: WeightSet({"blocks.0.a": np.array(a), "blocks.0.b": np.array(b)}, {}, f"seed {seed}")
        for seed, (a, b) in rows.items()
    }
    chosen = {p.name: p for p in points(space_of(anchor, seeds), GeometryParams(pairs=1))}
    block = arrays(chosen["granularity/0-1@block"])
    np.testing.assert_allclose(block["blocks.0.a"], [0.4, 0.4])
    np.testing.assert_allclose(block["blocks.0.b"], [0.8, 0.8])
    model = arrays(chosen["granularity/0-1@model"])  # one block is the model
    np.testing.assert_allclose(model["blocks.0.b"], [0.8, 0.8])
    np.testing.assert_allclose(arrays(chosen["model_stock/0-1"])["blocks.0.a"], [0, 0])  # per tensor: a right angle


def test_the_oracle_is_the_projection_of_the_centre():
    # The mean of (1, 0) and (0, 1) is (0.5, 0.5); the centre (0.6, 0.2) projects to 0.8 times it.
    def pair(first, second):
        return {n: WeightSet({"w": np.array(v)}, {}, str(n)) for n, v in ((0, first), (1, second))}

    anchor = WeightSet({"w": np.zeros(2)}, {}, "anchor")
    centre = {n + 8: w for n, w in pair([1.2, 0.0], [0.0, 0.4]).items()}
    space = space_of(anchor, pair([1.0, 0.0], [0.0, 1.0]), centre)
    assert space.projections((0, 1)) == {"w": pytest.approx(0.8)}
    assert space.plane_projection(0, 1) == pytest.approx((0.6, 0.2))
    chosen = {p.name: p for p in points(space, GeometryParams(pairs=1, centre=list(centre)))}
    np.testing.assert_allclose(arrays(chosen["oracle/0-1"])["w"], [0.4, 0.4])


def test_scales_of_model_stock_and_slerp_by_hand():
    angle = math.radians(60)
    seeds = {0: [1.0, 0.0], 1: [math.cos(angle), math.sin(angle)]}
    sets = {seed: WeightSet({"w": np.array(v)}, {}, str(seed)) for seed, v in seeds.items()}
    space = space_of(WeightSet({"w": np.zeros(2)}, {}, "anchor"), sets)
    assert space.stock_scale((0, 1)) == pytest.approx(2 / 3)
    assert space.slerp_scale((0, 1)) == pytest.approx(1 / math.cos(math.radians(30)))


def test_distance_from_seeds_set_aside_by_hand(space):
    point = flat(SEEDS[0])
    others = np.array([flat(weights) for weights in CENTRE.values()])
    products = others @ others.T
    between = (products.sum() - np.trace(products)) / (5 * 4)
    unit = np.mean([flat(weights) @ flat(weights) for weights in SEEDS.values()])
    expected = math.sqrt((point @ point - 2 * point @ others.mean(axis=0) + between) / unit)
    assert space.distance(space.seeds[0], (0,)).whole == pytest.approx(expected, rel=1e-5)


def test_distance_without_seeds_set_aside_leaves_out_a_points_own():
    space = space_of(ANCHOR, SEEDS)
    updates = np.array([flat(weights) for weights in SEEDS.values()])
    products = updates @ updates.T
    between = (products.sum() - np.trace(products)) / (4 * 3)
    point = updates[:2].mean(axis=0)
    square = point @ point - 2 * point @ updates[2:].mean(axis=0) + between
    soup, _ = merge("uniform", ANCHOR, [SEEDS[0], SEEDS[1]])
    expected = math.sqrt(max(0.0, square) / np.diag(products).mean())
    assert space.distance(checkpoint_of(soup), (0, 1)).whole == pytest.approx(expected, rel=1e-5)
    assert space.distance(checkpoint_of(soup), (0, 1, 2, 3)) == "not enough seeds (4 of 5)"
    two = space_of(ANCHOR, {seed: SEEDS[seed] for seed in (0, 1)})
    assert two.distance(two.seeds[0], (0,)) == "not enough seeds (2 of 3)"


@pytest.mark.parametrize("aside", [0, 6])
def test_distances_on_a_shell_are_its_radius_over_the_root_of_how_many_are_averaged(aside):
    # A centre of norm 3 and residuals of norm 4: seeds have norm 5, and the mean of n lies 4 / sqrt(n) off the centre.
    size, generator = 40_000, np.random.default_rng(0)

    def vector(length):
        values = generator.standard_normal(size)
        return length * values / np.linalg.norm(values)

    middle = vector(3.0)
    sets = [WeightSet({"w": middle + vector(4.0)}, {}, f"seed {n}") for n in range(6 + aside)]
    anchor = WeightSet({"w": np.zeros(size)}, {}, "anchor")
    space = space_of(anchor, dict(enumerate(sets[:6])), dict(enumerate(sets[6:], 6)))
    assert space.distance(space.anchor, ()).whole == pytest.approx(3 / 5, abs=0.02)
    assert space.distance(space.seeds[0], (0,)).whole == pytest.approx(4 / 5, abs=0.02)
    soup, _ = merge("uniform", anchor, sets[:4])
    assert space.distance(checkpoint_of(soup), (0, 1, 2, 3)).whole == pytest.approx(4 / 2 / 5, abs=0.02)
    assert space.radii["w"] == pytest.approx(4, abs=0.05)
    if aside:
        assert space.distance_of_centre().whole == pytest.approx(4 / math.sqrt(6) / 5, abs=0.02)


def test_noise_repeats_and_has_the_radius_of_the_seeds():
    size, generator = 20_000, np.random.default_rng(0)
    sets = {n: WeightSet({"w": generator.standard_normal(size)}, {}, str(n)) for n in range(8)}
    anchor = WeightSet({"w": np.full(size, 2.0)}, {}, "anchor")
    space = space_of(anchor, {n: sets[n] for n in (0, 1)}, {n: sets[n] for n in range(2, 8)})
    chosen = [p for p in points(space, GeometryParams(noise=40, centre=list(range(2, 8)))) if p.kind == "noise"]
    away = {
        kind: [
            np.sum((arrays(p)["w"] - space.centre.tensors["w"].array()) ** 2) for p in chosen if p.facts["of"] == kind
        ]
        for kind in ("isotropic", "covariance")
    }
    # Residuals of six seeds of unit variance; those of the seeds' covariance have five degrees of freedom only.
    assert np.mean(away["isotropic"]) / size == pytest.approx(1, abs=0.02)
    assert np.mean(away["covariance"]) / size == pytest.approx(1, abs=0.35)
    first, again, other = (isotropic(space, 0, draw) for draw in (0, 0, 1))
    assert first.identity == again.identity != other.identity


def test_subsets_and_pairs():
    assert subsets_of([3, 5, 8], 2, most=3, seed=0) == [(3, 5), (3, 8), (5, 8)]
    some = subsets_of(range(12), 4, most=20, seed=0)
    assert len(set(some)) == 20
    assert (
        some == sorted(some) == subsets_of(range(12), 4, most=20, seed=0) != subsets_of(range(12), 4, most=20, seed=1)
    )
    many = subsets_of(range(50), 8, most=5, seed=0)
    assert len(set(many)) == 5
    assert all(list(members) == sorted(set(members)) for members in many)
    assert ring_pairs([0, 1], 5) == [(0, 1)]
    assert ring_pairs([4, 2, 7], 3) == [(2, 4), (2, 7), (4, 7)]


def test_fewer_seeds_than_a_group_needs_are_refused():
    one = space_of(ANCHOR, {0: SEEDS[0]})
    with pytest.raises(ParamsError, match=r"geometry\.plane: got 1 seeds; expected 2"):
        points(one, GeometryParams(plane=STEPS))
    with pytest.raises(ParamsError, match=r"geometry\.noise: got no geometry\.centre"):
        points(one, GeometryParams.model_construct(noise=1, plane=[], sizes=[], pairs=0))
