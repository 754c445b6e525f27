"""The geometry of weights: cases by hand, a shell where every quantity is known, intervals, types of tensors."""

import math

import numpy as np
import pytest
import scipy.stats

from modelstock.errors import WeightsError
from modelstock.geometry import centre, figures, page, shell
from modelstock.geometry.claims import Claim
from modelstock.geometry.groups import groups
from modelstock.geometry.measure import Geometry, measure
from modelstock.geometry.stack import Stack, estimate, student_t
from modelstock.geometry.tables import distance_rows, length_rows, tensor_rows, unit_rows
from modelstock.geometry.weight_claims import NO_CENTRE, weight_claims
from modelstock.merging.engine import merge
from modelstock.notices import Notice
from modelstock.weights.tensors import Checkpoint, in_memory
from modelstock.weights.weight_set import WeightSet

ANCHOR = np.array([3.0, -1.0, 2.0])
ROOT3 = math.sqrt(3)


def checkpoints(*updates: list[float], name: str = "blocks.0.mlp.weight") -> list[Checkpoint]:
    """The anchor, and a checkpoint per update, of one tensor."""
    arrays = [ANCHOR, *(ANCHOR + np.array(update) for update in updates)]
    return [in_memory({name: array}, {}, f"s{number}") for number, array in enumerate(arrays)]


def measured(*updates: list[float], centre: tuple[list[float], ...] = ()) -> Geometry:
    anchor, *rest = checkpoints(*updates, *centre)
    return measure(anchor, rest[: len(updates)], centre=rest[len(updates) :])


def claim(geometry: Geometry, key: str) -> Claim:
    return next(one for one in weight_claims(geometry) if one.key == key)


# ---------------------------------------------------------------- by hand


def test_two_seeds_of_length_two_at_sixty_degrees():
    geometry = measured([2.0, 0.0, 0.0], [1.0, ROOT3, 0.0])
    (row,) = tensor_rows(geometry)
    assert row["norm_mean"] == pytest.approx(2)
    assert row["norm_cv"] == pytest.approx(0, abs=1e-12)
    assert row["angle_mean"] == pytest.approx(60)
    assert row["ratio"] == row["ratio_of_2"] == pytest.approx(2 / 3)
    assert row["angle_sd"] == row["cosine_sd"] == "not enough seeds (2 of 3)"
    assert row["oracle_ratio_of_2"] == "not enough seeds (2 of 3)"
    assert row["ratio_rmse"] == "not enough seeds (2 of 4)"
    single, both = length_rows(geometry)
    assert (single["length"], both["length"]) == (pytest.approx(2), pytest.approx(ROOT3))
    assert both["formula"] == pytest.approx(ROOT3)


def test_three_seeds_at_right_angles():
    geometry = measured([1.0, 0, 0], [0, 1.0, 0], [0, 0, 2.0])
    (row,) = tensor_rows(geometry)
    assert row["norm_cv"] == pytest.approx(np.std([1, 1, 2], ddof=1) / (4 / 3))
    assert (row["angle_mean"], row["angle_sd"]) == (pytest.approx(90), pytest.approx(0))
    assert row["ratio"] == pytest.approx(0)
    # The third seed stands for the centre of the first pair, to which it is orthogonal.
    assert row["oracle_ratio_of_2"] == pytest.approx(0)
    assert row["distance_to_centre"] == pytest.approx(math.sqrt((1 + 1 + 4) / 3))  # |mu|^2 and <v, mu> are 0


def test_two_seeds_beyond_a_right_angle_are_a_negative_ratio_that_is_clipped():
    geometry = measured([1.0, 0, 0], [-0.5, ROOT3 / 2, 0])
    (row,) = tensor_rows(geometry)
    assert (row["flag"], row["ratio"]) == ("negative", 0)
    ledger = claim(geometry, "ledger")
    assert {quantity.name: quantity.value for quantity in ledger.quantities}["negative t"] == 1
    assert "negative" in page.page(page.geometry_json(geometry, [ledger]), [ledger], {})


def test_a_tensor_that_a_seed_left_alone_and_one_of_one_value_do_not_count():
    anchor = {"a": np.zeros(3), "b": np.zeros(3), "scale": np.zeros(())}
    one = {"a": np.array([1.0, 0, 0]), "b": np.zeros(3), "scale": np.array(1.0)}
    two = {"a": np.array([0, 1.0, 0]), "b": np.ones(3), "scale": np.array(2.0)}
    sets = [in_memory(tensors, {}, name) for name, tensors in (("w0", anchor), ("one", one), ("two", two))]
    with pytest.warns(Notice, match="2 of 3 tensors do not count, such as b: unchanged by one"):
        geometry = measure(sets[0], sets[1:])
    assert geometry.left_out == {"b": "unchanged by one", "scale": "one value, no angle"}
    assert [row["flag"] for row in tensor_rows(geometry)] == ["", "unchanged by one", "one value, no angle"]
    assert unit_rows(geometry, "model")[0]["tensors"] == 1


def test_unequal_norms_make_model_stocks_ratio_too_large():
    """Lengths 1 and 3 at 60 degrees; the centre has the product 1.5 with each, as they have with each other."""
    first, second, mu = [1.0, 0, 0], [1.5, 1.5 * ROOT3, 0], [1.5, -1 / (2 * ROOT3), 0]
    assert np.dot(first, mu) == pytest.approx(np.dot(first, second))
    assert np.dot(second, mu) == pytest.approx(np.dot(first, second))
    geometry = measured(first, second, centre=(mu,))
    (row,) = tensor_rows(geometry)
    oracle = 1.5 / (1.25**2 + (0.75 * ROOT3) ** 2)  # <mean, mu> / |mean|^2
    assert row["ratio_of_2"] == pytest.approx(2 / 3)
    assert row["oracle_ratio_of_2"] == pytest.approx(oracle)
    assert row["ratio_bias"] == pytest.approx(2 / 3 - oracle)
    assert row["ratio_rmse"] == pytest.approx(2 / 3 - oracle)  # one checkpoint as the centre has no noise
    assert row["distance_to_centre"] == pytest.approx(
        math.sqrt(np.mean([np.sum(np.subtract(v, mu) ** 2) for v in (first, second)]))
    )


def test_a_centre_of_several_seeds_counts_without_their_noise():
    """mu = (1, 0, 0); the centre's two seeds are off it by orthogonal noise, which adds nothing to a distance."""
    geometry = measured([1.0, 1.0, 0], [1.0, -1.0, 0], centre=([1.0, 0, 5.0], [1.0, 0.0, -5.0], [1.0, 3.0, 0.0]))
    stack = geometry.stack()
    single = centre.around(stack, 1)
    # <c_k, c_l> over pairs: 1 - 25, 1, 1; <v, c_k>: 1, 1, 1 + 3 or 1 - 3.
    assert single.centre[0, 0] == pytest.approx((-24 + 1 + 1) / 3)
    assert single.along[0].tolist() == pytest.approx([2.0, 0.0])


def test_the_point_of_model_stock_in_the_triangle_is_that_of_a_merge():
    files = checkpoints([2.0, 0, 0], [1.0, ROOT3, 0])
    anchor, *tuned = (WeightSet({name: tensor.array() for name, tensor in file.tensors.items()}) for file in files)
    merged, _ = merge("model_stock", anchor, tuned)
    points = figures.triangle(measured([2.0, 0, 0], [1.0, ROOT3, 0]))
    (update,) = (merged.tensors[name] - anchor.tensors[name] for name in anchor.tensors)
    assert points["Model Stock"] == pytest.approx(update[:2])
    assert points["seed s2"] == pytest.approx([1.0, ROOT3])


def test_updates_that_cancel_each_other_have_no_oracle():
    geometry = measured([1.0, 0, 0], [-1.0, 0, 0], centre=([0, 1.0, 0],))
    (row,) = tensor_rows(geometry)
    assert (row["oracle_ratio_of_2"], row["ratio"]) == (NO_CENTRE, 0)
    assert claim(geometry, "oracle").verdict == "undecided"
    page.geometry_json(geometry, weight_claims(geometry))  # which refuses NaN


def test_nan_is_refused_with_its_tensor():
    anchor, first, second = checkpoints([1.0, 0, 0], [0, np.nan, 0])
    with pytest.raises(WeightsError, match=r"s2, tensor blocks.0.mlp.weight: got 1 of 3 values NaN"):
        measure(anchor, [first, second])


# ---------------------------------------------------------------- a shell where every quantity is known

SIZE, TENSORS, MU, SIGMA = 20_000, 16, 0.6, 0.8


def shell_of(
    count: int,
    *,
    others: int = 0,
    shared: float = 0.0,
    scales: tuple[float, ...] = (),
    size: int = SIZE,
    tensors: int = 3,
    seed: int = 0,
) -> Geometry:
    """w_i = w0 + mu + sigma * noise; `others`: seeds of a centre; `shared`: the part of the noise that seeds share."""
    random = np.random.default_rng(seed)
    names = [f"blocks.{number}.mlp.fc1.weight" for number in range(tensors)]

    def noise() -> dict[str, np.ndarray]:
        return {name: random.standard_normal((size // 100, 100)) for name in names}

    origin, common, together = noise(), noise(), noise()

    def tuned(label: str, share: float, scale: float = 1.0) -> Checkpoint:
        own = noise()
        arrays = {
            name: origin[name]
            + MU * common[name]
            + scale * SIGMA * (math.sqrt(share) * together[name] + math.sqrt(1 - share) * own[name])
            for name in names
        }
        return in_memory(arrays, {}, label)

    seeds = [tuned(f"s{i}", shared, scales[i] if scales else 1.0) for i in range(count)]
    return measure(in_memory(origin, {}, "w0"), seeds, centre=[tuned(f"c{i}", 0.0) for i in range(others)])


@pytest.fixture(scope="module")
def thin() -> Geometry:
    return shell_of(8, tensors=TENSORS)


def test_a_gaussian_shell_has_the_norms_angles_and_ratios_of_the_formula(thin):
    stack = thin.stack()
    square, own = MU**2 * SIZE, SIGMA**2 * SIZE
    assert shell.norms(stack) == pytest.approx(math.sqrt(square + own), rel=0.02)
    assert shell.variation(stack).max() < 0.01
    assert np.cos(np.radians(shell.angles(stack))) == pytest.approx(square / (square + own), abs=0.03)
    assert shell.applied(stack, 2) == pytest.approx(2 * 0.36 / 1.36, abs=0.03)
    assert centre.around(stack, 2).oracle == pytest.approx(2 * 0.36 / 1.36, abs=0.03)
    assert centre.bias(stack) == pytest.approx(0, abs=0.002)
    distances = {row["what"]: row["distance"] for row in distance_rows(thin)}
    assert distances["anchor"] == pytest.approx(math.sqrt(TENSORS * square), rel=0.02)
    for size in (2, 3, 4):
        assert distances[f"mean of {size}"] == pytest.approx(math.sqrt(TENSORS * own / size), rel=0.02)
    # Nearest on the ray through the mean of two: |mu|^2 |noise|^2 / |mean|^2.
    nearest = math.sqrt(TENSORS * square * (own / 2) / (square + own / 2))
    assert distances["Model Stock of 2"] == pytest.approx(nearest, rel=0.02)


def test_a_gaussian_shell_upholds_every_claim(thin):
    verdicts = {one.key: one.verdict for one in weight_claims(thin)}
    assert {key for key, verdict in verdicts.items() if verdict == "measured"} == {"ratio", "excess", "ledger"}
    assert set(verdicts.values()) == {"holds", "measured"}
    angle, norm = claim(thin, "angles").quantities[0], claim(thin, "norms").quantities[0]
    # Of independent directions an angle's standard deviation is near 1 / sqrt(size), in radians times their share.
    assert 0 < angle.value < math.degrees(1 / math.sqrt(SIZE))
    assert norm.over == "8 seeds"
    assert norm.low < norm.value < norm.high


def test_the_error_of_the_ratio_is_reported_without_the_noise_of_the_centres_seeds():
    """Tensors of 100 values, where the angle of a pair is off by far more than the centre of 20 other seeds."""
    geometry = shell_of(10, others=20, size=100, tensors=150)
    stack = geometry.stack()
    naive = math.sqrt(np.mean((centre.around(stack, 2).ratio - centre.around(stack, 2).oracle) ** 2))
    few = shell_of(10, others=2, size=100, tensors=150).stack()
    naive_few = math.sqrt(np.mean((centre.around(few, 2).ratio - centre.around(few, 2).oracle) ** 2))
    assert naive_few > 1.1 * naive
    assert centre.root_mean_square(few) == pytest.approx(centre.root_mean_square(stack), rel=0.05)


def test_seeds_that_share_noise_are_found_by_seeds_of_another_draw_and_only_by_these():
    shared = shell_of(5, others=5, shared=0.3, size=10_000)
    excess = claim(shared, "excess")
    assert excess.verdict == "does not hold"
    assert excess.quantities[0].value == pytest.approx(0.3, abs=0.03)
    alone = claim(shell_of(5, shared=0.3, size=10_000), "excess")
    assert alone.verdict == "measured"
    assert "--centre" in alone.remark
    assert claim(shell_of(5, others=5, size=10_000), "excess").verdict == "holds"


def test_a_pair_that_shares_noise_is_named_without_a_centre():
    random = np.random.default_rng(0)
    noise = random.standard_normal((6, 5000))
    noise[4] = 0.6 * noise[1] + 0.8 * noise[4]
    mu = random.standard_normal(5000)
    sets = [in_memory({"w": mu + one}, {}, f"s{number}") for number, one in enumerate(noise)]
    geometry = measure(in_memory({"w": np.zeros(5000)}, {}, "w0"), sets)
    (largest,) = claim(geometry, "excess").quantities
    assert largest.name == "largest cosine of two, s1 and s4"
    assert largest.value == pytest.approx(0.6, abs=0.08)
    assert claim(geometry, "residuals-pairs").quantities[0].value > 0.1


def test_settings_are_judged_one_by_one_and_all_must_hold(thin):
    uneven = shell_of(8, scales=(0.5, 1.5) * 4, size=10_000)
    found = {one.key: one for one in weight_claims(thin, settings={"other seeds": thin, "rates": uneven})}["settings"]
    assert found.verdict == "does not hold"
    assert [quantity.name for quantity in found.quantities] == [
        "seeds, variation of norms (holds)",
        "seeds, spread of angles (holds)",
        "other seeds, variation of norms (holds)",
        "other seeds, spread of angles (holds)",
        "rates, variation of norms (does not hold)",
        f"rates, spread of angles ({claim(uneven, 'angles').verdict})",
    ]
    assert found.quantities[4].value == claim(uneven, "norms").quantities[0].value
    alike = {one.key: one for one in weight_claims(thin, settings={"other seeds": thin})}["settings"]
    assert (alike.artefact, alike.verdict) == (5, "holds")
    assert "settings" not in {one.key for one in weight_claims(thin)}


def test_norms_that_vary_are_found():
    geometry = shell_of(8, scales=(0.5, 1.5) * 4, size=10_000)
    assert claim(geometry, "norms").verdict == "does not hold"
    assert claim(geometry, "oracle").quantities[0].low > 0  # the ratio is too large


def test_the_kurtosis_over_seeds_is_that_of_the_distribution():
    """Gaussian 3; noise of two scales, 1 and 3, has 3 E s^4 / (E s^2)^2 = 4.92, here over exactly half of the seeds."""
    assert centre.kurtosis(shell_of(40, size=2000, tensors=20).stack()) == pytest.approx(3, abs=0.15)
    mixed = shell_of(40, size=2000, tensors=20, scales=(1.0, 3.0) * 20)
    assert centre.kurtosis(mixed.stack()) == pytest.approx(3 * 41 / 25, abs=0.35)


def test_the_kurtosis_is_made_of_k_statistics():
    values = np.random.default_rng(0).exponential(size=(9, 16))
    k2 = np.array([scipy.stats.kstat(column, 2) for column in values.T])
    k4 = np.array([scipy.stats.kstat(column, 4) for column in values.T])
    kappa = (np.mean(k2**2) - k4.mean() / 9) * 8 / 10
    assert centre.kurtosis(Stack(np.zeros((1, 9, 9)), 9, (values,))) == pytest.approx(3 + k4.mean() / kappa)


# ---------------------------------------------------------------- intervals


def test_students_t_is_scipys():
    for degrees in range(1, 60):
        assert student_t(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), abs=1e-3)


def test_the_interval_is_the_jackknife_over_seeds():
    norms = [1.0, 2.0, 4.0, 5.0]
    stack = Stack(np.diag(np.square(norms))[None], 4)
    quantity = estimate("norm", lambda part: float(shell.norms(part).mean()), stack, need=2)
    # For a mean the jackknife's standard error is the usual one.
    half = scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(norms)
    assert quantity.value == 3
    assert (3 - quantity.low, quantity.high - 3) == (pytest.approx(half, rel=1e-3), pytest.approx(half, rel=1e-3))


def test_intervals_cover_what_new_seeds_would_show():
    """Norms of seeds of several scales around one centre: 95 % intervals of six seeds, and the mean of many draws."""
    random = np.random.default_rng(0)
    mu = random.standard_normal((4, 100))

    def drawn() -> Stack:
        scales = 1 + 0.2 * random.standard_normal((4, 6, 1))
        updates = mu[:, None] + scales * random.standard_normal((4, 6, 100))
        return Stack(np.einsum("tid,tjd->tij", updates, updates), 6)

    for statistic, need in ((shell.variation, 2), (shell.angles, 2), (centre.bias, 3)):

        def mean(part: Stack, statistic=statistic) -> float:
            return float(statistic(part).mean())

        truth = np.mean([mean(drawn()) for _ in range(1000)])
        quantities = [estimate("q", mean, drawn(), need=need) for _ in range(200)]
        covered = sum(quantity.low <= truth <= quantity.high for quantity in quantities)
        assert scipy.stats.binomtest(covered, 200, 0.95).pvalue > 1e-4


def test_few_seeds_are_texts_and_never_numbers():
    quantities = {one.key: one.quantities[0] for one in weight_claims(measured([1.0, 0, 0], [1.0, 1.0, 0]))}
    assert quantities["angles"].shown() == "not enough seeds (2 of 3)"
    assert "an interval: not enough seeds (2 of 3)" in quantities["norms"].shown()
    assert quantities["oracle"].shown() == "not enough seeds (2 of 3)"
    for key in ("residuals-pairs", "excess", "gaussian", "nearer"):
        assert quantities[key].shown() == "not enough seeds (2 of 4)"
    assert {one.verdict for one in weight_claims(measured([1.0, 0, 0], [1.0, 1.0, 0]))} == {
        "not enough seeds",
        "measured",
    }
    with_centre = weight_claims(measured([1.0, 0, 0], [1.0, 1.0, 0], centre=([1.0, 0.5, 0.5],)))
    known = {one.key: one.quantities[0].value for one in with_centre}
    assert known["oracle"] is not None
    assert known["nearer"] is not None


def test_seeds_without_a_common_centre_get_a_text_in_its_place():
    random = np.random.default_rng(0)
    sets = [in_memory({"w": random.standard_normal(64)}, {}, f"s{number}") for number in range(40)]
    claims = {one.key: one for one in weight_claims(measure(in_memory({"w": np.zeros(64)}, {}, "w0"), sets))}
    assert claims["angles"].verdict == "does not hold"
    assert all(
        quantity.value is None or np.isfinite(quantity.value) for one in claims.values() for quantity in one.quantities
    )


# ---------------------------------------------------------------- projections


def test_every_value_is_in_one_direction_with_a_sign():
    updates = np.eye(200)[[0, 57, 130, 199]]
    sets = [in_memory({"w": update}, {}, str(number)) for number, update in enumerate(updates)]
    (parts,) = measure(in_memory({"w": np.zeros(200)}, {}, "w0"), sets).projections.values()
    assert parts.shape == (4, 64)
    assert np.abs(parts).sum(axis=1).tolist() == [1, 1, 1, 1]


def test_projections_keep_lengths_on_average():
    geometry = shell_of(4, size=300_000, tensors=1)
    (parts,) = geometry.projections.values()
    assert (parts**2).sum(axis=1) == pytest.approx(shell.norms(geometry.stack())[0] ** 2, rel=0.5)
    assert np.corrcoef(parts)[0, 1] == pytest.approx(0.36, abs=0.3)


# ---------------------------------------------------------------- types and blocks


def test_types_and_blocks_are_read_off_names_and_shapes():
    shapes = {
        "visual.conv1.weight": (64, 3, 7, 7),
        "visual.class_embedding": (64,),
        "visual.positional_embedding": (50, 64),
        "visual.ln_pre.bias": (64,),
        "visual.transformer.resblocks.0.attn.in_proj_weight": (192, 64),
        "visual.transformer.resblocks.0.attn.in_proj_bias": (192,),
        "visual.transformer.resblocks.1.mlp.c_proj.weight": (64, 256),
        "visual.transformer.resblocks.1.ln_2.weight": (64,),
        "visual.proj": (64, 32),
        "head.weight": (10, 32),
        "head.bias": (10,),
    }
    found = groups(shapes)
    assert [found[name].kind for name in shapes] == [
        *("convolution", "embedding", "embedding", "norm", "attention weight", "bias", "MLP weight", "norm", "other"),
        *("head", "head"),
    ]
    assert found["visual.conv1.weight"].block == "before the blocks"
    assert found["visual.transformer.resblocks.1.ln_2.weight"].block == "visual.transformer.resblocks.1"
    assert (found["head.bias"].block, found["head.bias"].number) == ("behind the blocks", 2)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("bert.encoder.layer.3.attention.output.dense.weight", (4, 4), "attention weight"),
        ("bert.encoder.layer.3.output.dense.weight", (4, 8), "MLP weight"),
        ("bert.encoder.layer.3.output.LayerNorm.bias", (4,), "norm"),
        ("model.layers.3.mlp.down_proj.weight", (4, 8), "MLP weight"),
        ("model.layers.3.self_attn.q_proj.weight", (4, 4), "attention weight"),
        ("model.layers.3.input_layernorm.weight", (4,), "norm"),
        ("layer1.0.conv1.weight", (4, 4, 3, 3), "convolution"),
        ("layer1.0.downsample.1.weight", (4,), "norm"),
        ("layers.0.blocks.1.attn.relative_position_bias_table", (9, 4), "embedding"),
    ],
)
def test_types_of_other_families(name, shape, kind):
    assert groups({name: shape})[name].kind == kind


def test_types_blocks_and_the_model_hold_each_tensor_once(thin):
    for kind in ("type", "block", "model"):
        rows = unit_rows(thin, kind)
        assert sum(row["tensors"] for row in rows) == TENSORS
        assert sum(row["values"] for row in rows) == TENSORS * SIZE
    (model,) = unit_rows(thin, "model")
    squares = sum(shell.norms(thin.stack([name]))[0] ** 2 for name in thin.grams)
    assert model["as one"]["norms"] == pytest.approx(np.sqrt(squares))
