"""The laws of each merge method, and small cases worked by hand."""

import math

import numpy as np
import pytest

from modelstock.errors import MergeError, WeightsError
from modelstock.merging import METHODS, greedy_soup, merge, model_stock, stock_ratio
from modelstock.weights import WeightSet

CASES = [
    *((name, {}) for name in METHODS),
    ("model_stock", {"pairwise": "angle"}),
    ("model_stock", {"granularity": "filter"}),
]


def tensors(seed: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"conv.weight": (4, 3, 2, 2), "head.bias": (5,), "scale": ()}
    return {k: np.asarray(random.standard_normal(s), dtype=dtype) for k, s in shapes.items()} | {"steps": np.array([7])}


def family(count: int, dtype: type = np.float32) -> tuple[WeightSet, list[WeightSet]]:
    """An anchor and `count` updates that share a direction, as seeds of one fine-tuning do."""
    anchor, common = tensors(0, np.float64), tensors(1, np.float64)

    def tuned(seed: int) -> WeightSet:
        noise = tensors(seed, np.float64)
        out = {
            k: (v + common[k] + 0.5 * noise[k]).astype(dtype) if v.dtype.kind == "f" else v for k, v in anchor.items()
        }
        return WeightSet(out, source=f"seed {seed}")

    origin = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in anchor.items()}
    return WeightSet(origin, source="anchor"), [tuned(10 + i) for i in range(count)]


@pytest.mark.parametrize(("method", "knobs"), CASES)
class TestLaws:
    def test_keeps_keys_shapes_and_dtypes_and_leaves_inputs_alone(self, method, knobs):
        anchor, tuned = family(3, np.float16)
        before = [w.identity for w in (WeightSet(dict(t.tensors)) for t in [anchor, *tuned])]
        merged, _ = merge(method, anchor, tuned, **knobs)
        assert {k: (v.shape, v.dtype) for k, v in merged.tensors.items()} == {
            k: (v.shape, v.dtype) for k, v in anchor.tensors.items()
        }
        assert before == [WeightSet(dict(t.tensors)).identity for t in [anchor, *tuned]]

    def test_order_does_not_matter_to_the_last_bit(self, method, knobs):
        anchor, tuned = family(4)
        assert (
            merge(method, anchor, tuned, **knobs)[0].identity == merge(method, anchor, tuned[::-1], **knobs)[0].identity
        )

    def test_moves_with_the_origin(self, method, knobs):
        anchor, tuned = family(3, np.float64)
        shift = {
            k: np.full_like(v, 2.5) if v.dtype.kind == "f" else np.zeros_like(v) for k, v in anchor.tensors.items()
        }
        move = lambda w: WeightSet({k: v + shift[k] for k, v in w.tensors.items()}, source=w.source)  # noqa: E731
        here, there = (
            merge(method, anchor, tuned, **knobs)[0],
            merge(method, move(anchor), [*map(move, tuned)], **knobs)[0],
        )
        for key, value in here.tensors.items():
            np.testing.assert_allclose(there.tensors[key], value + shift[key], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("factor", [1e-8, 1e-3, 10.0])
    def test_scales_with_the_updates(self, method, knobs, factor):
        _, tuned = family(3, np.float64)
        origin = WeightSet({k: np.zeros_like(v) if v.dtype.kind == "f" else v for k, v in tuned[0].tensors.items()})
        scale = lambda w: WeightSet(  # noqa: E731
            {k: v * factor if v.dtype.kind == "f" else v for k, v in w.tensors.items()}, source=w.source
        )
        one, two = (
            merge(method, origin, tuned, **knobs)[0],
            merge(method, origin, [*map(scale, tuned)], **knobs)[0],
        )
        for key, value in one.tensors.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(two.tensors[key], value * factor, rtol=1e-9)

    def test_equal_updates_are_a_fixed_point_up_to_the_methods_own_scale(self, method, knobs):
        """cos = 1 gives t = 1; the uniform soup is the identity; WiSE-FT halves by definition."""
        anchor, update = np.zeros((4, 3)), np.arange(1.0, 13).reshape(4, 3)
        scale = 0.5 if method == "wise_ft" else 1.0
        np.testing.assert_allclose(METHODS[method](anchor, [update] * 3, **knobs).tensor, scale * update, rtol=1e-12)


class TestModelStock:
    # model-stock table: t at 45 / 60 / 75 / 85 degrees
    @pytest.mark.parametrize(
        ("count", "ratios"),
        [
            (2, [0.828, 0.667, 0.411, 0.160]),
            (3, [0.879, 0.750, 0.512, 0.223]),
            (5, [0.923, 0.833, 0.636, 0.323]),
        ],
    )
    def test_ratio_by_angle(self, count, ratios):
        got = [stock_ratio(math.cos(math.radians(a)), count) for a in (45, 60, 75, 85)]
        assert got == pytest.approx(ratios, abs=6e-4)

    def test_two_updates_at_sixty_degrees_by_hand(self):
        """cos 60 = 1/2, so t = 2/3; the mean of (1, 0) and (1/2, sqrt(3)/2) is (3/4, sqrt(3)/4)."""
        merged = model_stock(np.zeros(2), [np.array([1.0, 0]), np.array([0.5, math.sqrt(3) / 2])])
        np.testing.assert_allclose(merged.tensor, [0.5, math.sqrt(3) / 6], rtol=1e-14)
        assert merged.facts["ratio"] == pytest.approx(2 / 3)

    @pytest.mark.parametrize("rms", [1e-3, 1e-5, 1e-8, 1e-150])
    def test_the_ratio_does_not_depend_on_how_small_the_updates_are(self, rms):
        random = np.random.default_rng(0)
        common, one, two = random.standard_normal((3, 768))
        loud = model_stock(np.zeros(768), [common + one, common + two]).facts["ratio"]
        quiet = model_stock(np.zeros(768), [rms * (common + one), rms * (common + two)]).facts["ratio"]
        assert quiet == pytest.approx(loud, rel=1e-9)

    def test_pairwise_angle_averages_angles(self):
        at = lambda degrees: np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])  # noqa: E731
        merged = model_stock(np.zeros(2), [at(0), at(30), at(60)], pairwise="angle")
        assert merged.facts["cosine"] == pytest.approx(math.cos(math.radians(40)))

    def test_opposed_updates_return_the_anchor_and_are_counted(self):
        merged = model_stock(np.ones(2), [np.array([2.0, 1]), np.array([0.1, 1])])
        np.testing.assert_array_equal(merged.tensor, np.ones(2))
        assert (merged.facts["clipped"], merged.facts["negative"]) == (1, 1)

    def test_without_clip_the_literal_formula_holds(self):
        """cos = -0.9 gives t = -1.8 / 0.1 = -18."""
        tuned = [np.array([1.0, 0]), np.array([-0.9, math.sqrt(1 - 0.81)])]
        assert model_stock(np.zeros(2), tuned, clip="none").facts["ratio"] == pytest.approx(-18)
        with pytest.raises(MergeError, match="clip: unit"):
            model_stock(np.zeros(1), [np.ones(1), -np.ones(1)], clip="none")

    def test_a_zero_update_keeps_the_anchor_and_is_counted(self):
        merged = model_stock(np.ones(3), [np.ones(3), np.full(3, 2.0)])
        np.testing.assert_array_equal(merged.tensor, np.ones(3))
        assert merged.facts["zero"] == 1
        assert merged.facts["cosine"] is None

    def test_a_filter_is_the_whole_block_behind_the_first_axis(self):
        random = np.random.default_rng(1)
        tuned = [random.standard_normal((5, 3, 2, 2)) + 1 for _ in range(2)]
        merged = model_stock(np.zeros((5, 3, 2, 2)), tuned, granularity="filter").tensor
        for row in range(5):
            alone = model_stock(np.zeros((3, 2, 2)), [w[row] for w in tuned]).tensor
            np.testing.assert_allclose(merged[row], alone, rtol=1e-12)


class TestRefusals:
    def test_unknown_method_and_knob_name_the_nearest(self):
        anchor, tuned = family(2)
        with pytest.raises(MergeError, match="did you mean model_stock"):
            merge("model_stok", anchor, tuned)
        with pytest.raises(MergeError, match="did you mean alpha"):
            merge("wise_ft", anchor, tuned, alfa=0.5)
        with pytest.raises(MergeError, match="2 or more"):
            merge("model_stock", anchor, tuned[:1])
        with pytest.raises(MergeError, match="from 0 to 1"):
            merge("wise_ft", anchor, tuned, alpha=1.5)

    def test_all_differing_tensors_are_named_at_once(self):
        anchor, tuned = family(2)
        bad = {**tuned[1].tensors, "head.bias": np.zeros(6, np.float32), "extra": np.zeros(1, np.float32)}
        del bad["scale"]
        with pytest.raises(MergeError, match=r"extra unknown; head.bias is \(6,\), anchor \(5,\); scale missing"):
            merge("uniform", anchor, [tuned[0], WeightSet(bad, source="bad")])

    def test_a_differing_integer_buffer_the_same_weights_twice_and_the_anchor(self):
        anchor, tuned = family(2)
        with pytest.raises(MergeError, match="steps is an integer buffer"):
            merge("uniform", anchor, [WeightSet({**tuned[0].tensors, "steps": np.array([8])})])
        with pytest.raises(MergeError, match="the same tensors as seed 10"):
            merge("uniform", anchor, [tuned[0], tuned[0]])
        with pytest.raises(MergeError, match="the same tensors as anchor"):
            merge("uniform", anchor, [anchor])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_non_finite_value_is_refused_by_name(self, value):
        anchor, tuned = family(2)
        bad = tuned[1].tensors["conv.weight"].copy()
        bad[0, 0, 0, 0] = value
        with pytest.raises(WeightsError, match=r"seed 11, tensor conv.weight: got 1 of 48"):
            merge(
                "uniform",
                anchor,
                [tuned[0], WeightSet({**tuned[1].tensors, "conv.weight": bad}, source="seed 11")],
            )


class TestGreedySoup:
    def test_adds_only_what_makes_the_running_mean_strictly_better(self):
        """In one dimension with the target at 1: 0.8 first, then 1.4 (mean 1.1 is nearer), never 3."""
        at = lambda value: WeightSet({"w": np.array([value])}, source=str(value))  # noqa: E731
        soup, chosen = greedy_soup(at(0.0), [at(3.0), at(1.4), at(0.8)], lambda w: -abs(float(w.tensors["w"][0]) - 1))
        assert [w.source for w in chosen] == ["0.8", "1.4"]
        assert soup.tensors["w"][0] == pytest.approx(1.1)
        assert soup.meta["made_by"]["method"] == "greedy"
