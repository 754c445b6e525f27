"""The laws of each merge method, and small cases worked by hand."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from threadpoolctl import threadpool_info, threadpool_limits
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.errors import MergeError, WeightsError
from modelstock.experiment.merge import SubsetMerges
from modelstock.experiment.rows import row_of
from modelstock.merging.engine import plan_merge
from modelstock.merging.files import merge_files
from modelstock.merging.kernels import blended, chunks
from modelstock.merging.methods.blend import Blend, one_by_one
from modelstock.merging.methods.model_stock import stock_ratio
from modelstock.merging.methods.rows import Choice, Method, Option
from modelstock.merging.methods.sparse import _in_order
from modelstock.merging.methods.table import METHODS
from modelstock.merging.methods.weighted import fisher, regmean
from modelstock.params import merge_section, standard_section
from modelstock.scoring.one_pass import ScoringOptions
from modelstock.weights.tensors import in_memory
from modelstock.weights.weight_set import WeightSet, load_weights
from tests.support.merging import merge_with

COUNT = {name: row.most for name, row in METHODS.items() if row.most}  # where the laws' three seeds are too many
CASES = [
    *((name, {"weights": [1, 2, 3]} if name == "weighted" else {}) for name in METHODS),
    ("nuslerp", {"granularity": "filter"}),
    ("ties", {"scale": 0.7}),
    ("model_stock", {"scale": 0.7}),
    ("model_stock", {"pairwise": "angle"}),
    ("model_stock", {"granularity": "filter"}),
    ("model_stock", {"granularity": "model"}),
    ("karcher", {"granularity": "filter"}),
    ("normal_equations", {"clip": "none"}),
    ("normal_equations", {"granularity": "filter"}),
    ("monosoup", {"rank": "energy", "energy": 0.5}),
]


def tensors(seed: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"block.1.conv.weight": (4, 3, 2, 2), "block.2.linear.weight": (3, 4), "head.bias": (5,), "scale": ()}
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


def given(method, tuned):
    """What a method asks for besides options: statistics that go with each weight set, and scores of any merge.

    The score is the nearness to a point of the updates' own span, so it moves and scales with them.
    """
    needs = METHODS[method].needs
    if needs in ("fisher", "inner"):

        def statistic(weights):
            # Seeded by the weights' place in the family, whatever was done to their values.
            random = np.random.default_rng(int(weights.source.split()[-1]))
            if needs == "fisher":
                return {k: random.random(v.shape) for k, v in weights.tensors.items() if v.dtype.kind == "f"}
            inputs = random.standard_normal((20, 4))
            return {"block.2.linear.weight": inputs.T @ inputs}

        return {"statistics": [WeightSet(statistic(w), source=f"of {w.source}") for w in tuned]}
    names = [k for k, v in tuned[0].tensors.items() if v.dtype.kind == "f"]
    goal = {k: np.mean([np.float64(w.tensors[k]) for w in tuned], axis=0) for k in names}
    unit = sum(np.sum((np.float64(w.tensors[k]) - goal[k]) ** 2) for w in tuned for k in names)

    def distance(weights):
        return sum(np.sum((weights.tensors[k] - goal[k]) ** 2) for k in names) / unit

    def gradient(weights):
        return distance(weights), {k: 2 * (weights.tensors[k] - goal[k]) / unit for k in names}

    if needs == "score":
        return {"score": lambda trials: [-round(distance(w), 9) for w in trials]}
    return {"gradient": gradient} if needs == "gradient" else {}


def merged_by(method, anchor, tuned, **options):
    """A merge with whatever the method needs."""
    return merge_with(method, anchor, tuned, **given(method, tuned), **options)


@pytest.mark.parametrize(("method", "options"), CASES)
class TestLaws:
    def test_keeps_keys_shapes_and_dtypes_and_leaves_inputs_alone(self, method, options):
        anchor, tuned = family(COUNT.get(method, 3), np.float16)
        before = [w.identity for w in (WeightSet(dict(t.tensors)) for t in [anchor, *tuned])]
        merged, _ = merged_by(method, anchor, tuned, **options)
        assert {k: (v.shape, v.dtype) for k, v in merged.tensors.items()} == {
            k: (v.shape, v.dtype) for k, v in anchor.tensors.items()
        }
        assert before == [WeightSet(dict(t.tensors)).identity for t in [anchor, *tuned]]

    def test_order_does_not_matter_to_the_last_bit_unless_it_has_a_meaning(self, method, options):
        anchor, tuned = family(COUNT.get(method, 3))
        here, there = (merged_by(method, anchor, seeds, **options)[0].identity for seeds in (tuned, tuned[::-1]))
        # Halfway between two checkpoints is the same from either side, up to rounding.
        assert (here == there) is not METHODS[method].ordered or METHODS[method].most == 2

    def test_moves_with_the_origin_unless_it_turns_the_weights_about_zero(self, method, options):
        anchor, tuned = family(COUNT.get(method, 3), np.float64)
        shift = {
            k: np.full_like(v, 2.5) if v.dtype.kind == "f" else np.zeros_like(v) for k, v in anchor.tensors.items()
        }
        move = lambda w: WeightSet({k: v + shift[k] for k, v in w.tensors.items()}, source=w.source)  # noqa: E731
        here, there = (
            merged_by(method, anchor, tuned, **options)[0],
            merged_by(method, move(anchor), [*map(move, tuned)], **options)[0],
        )
        moved = [
            np.allclose(there.tensors[key], value + shift[key], rtol=1e-9, atol=tolerance(method, 1e-12))
            for key, value in here.tensors.items()
        ]
        assert all(moved) is (METHODS[method].of == "updates")

    @pytest.mark.parametrize("factor", [1e-8, 1e-3, 10.0])
    def test_scales_with_the_updates(self, method, options, factor):
        _, tuned = family(COUNT.get(method, 3), np.float64)
        origin = WeightSet({k: np.zeros_like(v) if v.dtype.kind == "f" else v for k, v in tuned[0].tensors.items()})
        scale = lambda w: WeightSet(  # noqa: E731
            {k: v * factor if v.dtype.kind == "f" else v for k, v in w.tensors.items()}, source=w.source
        )
        one, two = (
            merged_by(method, origin, tuned, **options)[0],
            merged_by(method, origin, [*map(scale, tuned)], **options)[0],
        )
        for key, value in one.tensors.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(
                    two.tensors[key], value * factor, rtol=1e-9, atol=tolerance(method, 0) * factor
                )

    def test_equal_updates_are_a_fixed_point_up_to_the_methods_own_scale(self, method, options):
        """cos = 1 gives t = 1; WiSE-FT halves by definition, task arithmetic sums, sparse methods thin."""
        row, own = METHODS[method], {k: v for k, v in options.items() if k not in ("granularity", "scale")}
        count = COUNT.get(method, 3)
        update = np.random.default_rng(0).standard_normal((5, 4))
        if row.kind == "span":
            depth = [1.0] if row.needs == "depth" else []
            total = row.function(np.full((count, count), 2.0), *depth, **own).coefficients.sum()
            assert total == pytest.approx({"wise_ft": 0.5, "task_arithmetic": 3}.get(method, 1.0), rel=1e-12)
        elif row.kind == "values":
            given = {"fisher": [update**2 + i for i in range(3)], "inner": [np.eye(4) * (i + 1) for i in range(3)]}
            sparse = [np.random.default_rng(i) for i in range(3)]
            whole = {k: 1.0 if k == "density" else 0.0 for k in row.options if k != "scale" and not row.needs}
            whole = {"rank": "energy", "energy": 1.0} if method == "monosoup" else whole
            found = row.function(np.stack([update] * count), given.get(row.needs, sparse), **whole)
            np.testing.assert_allclose(found, update, rtol=1e-12)
        elif row.needs == "score":
            assert row.function(3, lambda trials: [-abs(t.sum() - 1) for t in trials]).coefficients.sum() == 1
        else:
            assert row.function(np.full(2, 0.3), lambda s: (((s - 1) ** 2).sum(), 2 * (s - 1))) == pytest.approx(1)


def tolerance(method, otherwise):
    """L-BFGS stops near its goal, not at it."""
    return 1e-5 if method == "oracle_scales" else otherwise


def one(method, anchor, tuned, **options):
    """One tensor merged, and its facts."""
    sets = [WeightSet({"w": np.asarray(w, np.float64)}, source=f"w{i}") for i, w in enumerate([anchor, *tuned])]
    merged, report = merge_with(method, sets[0], sets[1:], **options)
    return merged.tensors["w"], report["w"]


def at(degrees, length=1.0):
    return length * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


class TestModelStock:
    # t at 45 / 60 / 75 / 85 degrees, by eq. 3
    @pytest.mark.parametrize(
        ("count", "ratios"),
        [
            (2, [0.828, 0.667, 0.411, 0.160]),
            (3, [0.879, 0.750, 0.512, 0.223]),
            (5, [0.923, 0.833, 0.636, 0.323]),
            (10, [0.960, 0.909, 0.777, 0.488]),
        ],
    )
    def test_ratio_by_angle(self, count, ratios):
        got = [stock_ratio(math.cos(math.radians(a)), count) for a in (45, 60, 75, 85)]
        assert got == pytest.approx(ratios, abs=1e-3)

    def test_two_updates_at_sixty_degrees_by_hand(self):
        """cos 60 = 1/2, so t = 2/3; the mean of (1, 0) and (1/2, sqrt(3)/2) is (3/4, sqrt(3)/4)."""
        tensor, facts = one("model_stock", [0, 0], [at(0), at(60)])
        np.testing.assert_allclose(tensor, [0.5, math.sqrt(3) / 6], rtol=1e-14)
        assert facts["ratio"] == pytest.approx(2 / 3)
        assert facts["norms"] == pytest.approx([1, 1])

    @pytest.mark.parametrize("rms", [1e-3, 1e-5, 1e-8, 1e-150])
    @pytest.mark.parametrize("size", [1, 2, 768])
    def test_the_ratio_does_not_depend_on_how_small_the_updates_are(self, rms, size):
        common, first, second = np.random.default_rng(0).standard_normal((3, size)) + 1
        loud = one("model_stock", np.zeros(size), [common + first, common + second])[1]["ratio"]
        quiet = one("model_stock", np.zeros(size), [rms * (common + first), rms * (common + second)])[1]["ratio"]
        assert quiet == pytest.approx(loud, rel=1e-9)

    @pytest.mark.parametrize("count", [2, 3, 5, 10])
    @pytest.mark.parametrize("cosine", [-1.0, -0.5, 0.0, 0.3, 0.9, 0.9999])
    def test_against_the_formula_in_exact_arithmetic(self, count, cosine):
        """Updates common + own_i along orthogonal axes have any cosine above -1/(N-1), equal for all pairs."""
        if cosine < -0.4 and count > 2:
            pytest.skip("no N vectors have such cosines")
        gram = np.full((count, count), cosine) + (1 - cosine) * np.eye(count)
        values, vectors = np.linalg.eigh(gram)
        updates = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        if cosine == -1.0:
            updates = np.array([[1.0, 0], [-1.0, 0]])
        t = min(1.0, max(0.0, count * cosine / (1 + (count - 1) * cosine))) if cosine > -1 else 0.0
        tensor, facts = one("model_stock", np.zeros(count), updates)
        np.testing.assert_allclose(tensor, t * updates.mean(axis=0), atol=1e-9)
        assert facts["flag"] == ("clipped" if cosine < 0 else "")

    def test_float32_files_are_merged_to_within_float64(self):
        """Against exactly rounded sums; sums in float32 are off by 1e-4 at this size."""
        random, size = np.random.default_rng(0), 4_000_000
        common, first, second = (random.standard_normal(size, np.float32) for _ in range(3))
        tuned = [(1e-3 * (common + own)).astype(np.float32) for own in (first, second)]
        sets = [WeightSet({"w": w}, source=str(i)) for i, w in enumerate([np.zeros(size, np.float32), *tuned])]
        ratio = merge_with("model_stock", sets[0], sets[1:])[1]["w"]["ratio"]
        dot = math.fsum((tuned[0].astype(np.float64) * tuned[1]).tolist())
        norms = [math.sqrt(math.fsum((t.astype(np.float64) ** 2).tolist())) for t in tuned]
        cosine = dot / norms[0] / norms[1]
        assert ratio == pytest.approx(2 * cosine / (1 + cosine), rel=1e-9)

    def test_pairwise_angle_averages_angles(self):
        _, facts = one("model_stock", [0, 0], [at(0), at(30), at(60)], pairwise="angle")
        assert facts["ratio"] == pytest.approx(stock_ratio(math.cos(math.radians(40)), 3))

    def test_opposed_updates_return_the_anchor_and_are_flagged(self):
        tensor, facts = one("model_stock", [1.0, 1], [[2.0, 1], [0.1, 1]])
        np.testing.assert_array_equal(tensor, np.ones(2))
        assert facts["flag"] == "clipped"

    def test_without_clip_the_literal_formula_holds(self):
        """cos = -0.9 gives t = -1.8 / 0.1 = -18."""
        tuned = [np.array([1.0, 0]), np.array([-0.9, math.sqrt(1 - 0.81)])]
        _, facts = one("model_stock", [0, 0], tuned, clip="none")
        assert (facts["ratio"], facts["flag"]) == (pytest.approx(-18), "negative")
        with pytest.raises(MergeError, match="use clip unit"):
            one("model_stock", [0], [[1.0], [-1.0]], clip="none")

    def test_a_zero_update_keeps_the_anchor_and_is_flagged(self):
        sets = [
            {"w": np.ones(3), "b": np.zeros(1)},
            {"w": np.ones(3), "b": np.ones(1)},
            {"w": np.full(3, 2.0), "b": np.full(1, 2.0)},
        ]
        anchor, *tuned = (WeightSet(s, source=str(i)) for i, s in enumerate(sets))
        merged, report = merge_with("model_stock", anchor, tuned)
        np.testing.assert_array_equal(merged.tensors["w"], np.ones(3))
        assert (report["w"]["flag"], report["w"]["cosine"]) == ("zero", None)
        assert merged.tensors["b"] == pytest.approx(1.5)

    def test_a_filter_is_the_whole_block_behind_the_first_axis(self):
        random = np.random.default_rng(1)
        tuned = [random.standard_normal((5, 3, 2, 2)) + 1 for _ in range(2)]
        merged, facts = one("model_stock", np.zeros((5, 3, 2, 2)), tuned, granularity="filter")
        for row in range(5):
            np.testing.assert_allclose(
                merged[row], one("model_stock", np.zeros((3, 2, 2)), [w[row] for w in tuned])[0], rtol=1e-12
            )
        assert set(facts) == {"norms", "cosine", "ratio", "flags"}

    def test_model_granularity_takes_one_ratio_from_all_tensors_together(self):
        anchor, tuned = family(2, np.float64)
        _, report = merge_with("model_stock", anchor, tuned, granularity="model")
        joined = [np.concatenate([(t.tensors[k] - anchor.tensors[k]).ravel() for k in sorted(report)]) for t in tuned]
        cosine = joined[0] @ joined[1] / np.linalg.norm(joined[0]) / np.linalg.norm(joined[1])
        assert {round(facts["ratio"], 12) for facts in report.values()} == {round(stock_ratio(cosine, 2), 12)}


class TestOtherMethods:
    def test_weighted_soup_by_hand_and_its_order(self):
        assert one("weighted", [1.0], [[3.0], [7.0]], weights=[1, 3])[0] == pytest.approx(1 + (2 + 18) / 4)
        assert one("weighted", [1.0], [[7.0], [3.0]], weights=[3, 1])[0] == pytest.approx(6.0)
        with pytest.raises(MergeError, match="expected a number for each checkpoint, their sum not 0"):
            one("weighted", [1.0], [[3.0], [7.0]], weights=[1])

    def test_task_arithmetic_with_one_over_n_is_the_uniform_soup(self):
        tuned = [at(10), at(50), at(80)]
        np.testing.assert_allclose(
            one("task_arithmetic", [0, 0], tuned, scale=1 / 3)[0], one("uniform", [0, 0], tuned)[0]
        )

    @pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
    def test_slerp_turns_at_constant_speed_and_lengthens_in_a_line(self, share):
        found, facts = one("slerp", [5.0, 5.0], [at(0, 1) + 5, at(80, 3) + 5], at=share)
        np.testing.assert_allclose(found, at(80 * share, 1 + 2 * share) + 5, rtol=1e-12)
        assert facts["angle"] == pytest.approx(math.radians(80))

    def test_slerp_of_opposed_and_of_parallel_updates_is_the_straight_line(self):
        np.testing.assert_allclose(one("slerp", [0, 0], [at(0), -at(0, 3)])[0], [-1, 0], atol=1e-12)
        np.testing.assert_allclose(one("slerp", [0, 0], [at(0), at(0, 3)])[0], [2, 0], atol=1e-12)
        with pytest.raises(MergeError, match="got 3 fine-tuned weights; expected 2 at most; use karcher"):
            one("slerp", [0, 0], [at(0), at(1), at(2)])

    def test_karcher_of_two_is_slerp_halfway_and_of_three_in_a_plane_the_mean_angle(self):
        pair = [at(10, 2), at(70, 4)]
        np.testing.assert_allclose(one("karcher", [0, 0], pair)[0], one("slerp", [0, 0], pair)[0], rtol=1e-9)
        np.testing.assert_allclose(one("karcher", [0, 0], [at(0), at(20), at(70)])[0], at(30), rtol=1e-9)

    def test_karcher_of_directions_that_cancel_is_the_plain_mean(self):
        found, facts = one("karcher", [0, 0], [at(0), -at(0, 3)])
        np.testing.assert_allclose(found, [-1, 0], atol=1e-12)
        assert facts["flag"] == "plain mean"

    def test_ties_by_hand(self):
        """density 1/2 keeps (4, -3) and (-5, -2): signs by mass -, -; the means of those that agree."""
        first, second = [4.0, -3.0, 1.0, 0.0], [-5.0, -2.0, 0.5, 1.0]
        np.testing.assert_allclose(one("ties", np.zeros(4), [first, second], density=0.5)[0], [-5, -2.5, 0, 0])

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    def test_the_largest_values_are_those_of_a_stable_sort(self, share):
        """Magnitudes with many ties, of which the earlier values are kept."""
        update = np.random.default_rng(0).integers(-4, 5, 40).astype(np.float64)
        expected = np.zeros(40)
        first = np.argsort(-np.abs(update), kind="stable")[: round(share * 40)]
        expected[first] = update[first]
        found = METHODS["magnitude"].function(update[None], [None], density=share)
        np.testing.assert_array_equal(found, expected)

    def test_breadcrumbs_by_hand(self):
        """Of ten values the largest (outliers .1) and all but the next five (density .5) are dropped."""
        update = np.array([10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1])
        found, _ = one("breadcrumbs", np.zeros(10), [update], density=0.5, outliers=0.1)
        np.testing.assert_allclose(found, [0, 9, 8, 7, 6, 5, 0, 0, 0, 0])

    @pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
    def test_random_dropping_keeps_the_mean_and_drops_the_share_it_says(self, method):
        update = np.random.default_rng(0).uniform(1, 2, 20000)
        found, _ = one(method, np.zeros(20000), [update], drop=0.4)
        assert found.mean() == pytest.approx(1.5, rel=0.02)
        assert (found == 0).mean() == pytest.approx(0.4, abs=0.02)
        again, _ = one(method, np.zeros(20000), [update], drop=0.4)
        np.testing.assert_array_equal(found, again)

    def test_della_drops_small_values_more_often_than_large_ones(self):
        update = np.arange(1.0, 20001)
        dropped = one("della_linear", np.zeros(20000), [update], drop=0.5, window=0.8)[0] == 0
        assert dropped[:2000].mean() > 0.8 > 0.2 > dropped[-2000:].mean()

    def test_every_method_says_its_formula_and_source(self):
        for name, row in METHODS.items():
            assert row.name == name
            assert row.formula.startswith("w0 +"), name
            assert row.source, name


class TestRefusals:
    def test_unknown_method_and_option_name_the_nearest(self):
        anchor, tuned = family(2)
        with pytest.raises(MergeError, match="did you mean model_stock"):
            merge_with("model_stok", anchor, tuned)
        with pytest.raises(MergeError, match="did you mean alpha"):
            merge_with("wise_ft", anchor, tuned, alfa=0.5)
        with pytest.raises(MergeError, match="2 or more"):
            merge_with("model_stock", anchor, tuned[:1])
        with pytest.raises(MergeError, match="from 0 to 1"):
            merge_with("wise_ft", anchor, tuned, alpha=1.5)

    def test_all_differing_tensors_are_named_at_once(self):
        anchor, tuned = family(2)
        bad = {**tuned[1].tensors, "head.bias": np.zeros(6, np.float32), "extra": np.zeros(1, np.float32)}
        del bad["scale"]
        with pytest.raises(
            MergeError, match=r"head.bias is \(6,\), the anchor's \(5,\); scale missing; extra unknown;"
        ):
            merge_with("uniform", anchor, [tuned[0], WeightSet(bad, source="bad")])

    def test_a_differing_integer_buffer_the_same_weights_twice_and_the_anchor(self):
        anchor, tuned = family(2)
        with pytest.raises(MergeError, match="steps is an integer buffer"):
            merge_with("uniform", anchor, [WeightSet({**tuned[0].tensors, "steps": np.array([8])})])
        with pytest.raises(MergeError, match="the same tensors as seed 10"):
            merge_with("uniform", anchor, [tuned[0], WeightSet(dict(tuned[0].tensors), source="again")])
        with pytest.raises(MergeError, match="the same tensors as anchor"):
            merge_with("uniform", anchor, [WeightSet(dict(anchor.tensors), source="copy"), tuned[0]])

    def test_a_renamed_tensor_is_shown_with_its_nearest_name(self):
        anchor, tuned = family(1)
        renamed = {("head.bais" if k == "head.bias" else k): v for k, v in tuned[0].tensors.items()}
        with pytest.raises(MergeError, match=r"head\.bias missing; head\.bais unknown \(near head\.bias\);"):
            merge_with("uniform", anchor, [WeightSet(renamed, source="renamed")])

    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            ("model_stock", {"clip": "units"}, "option clip: got 'units'; expected unit or none"),
            ("model_stock", {"granularity": "layer"}, "granularity: got 'layer'; expected tensor, filter or model"),
            ("ties", {"granularity": "filter"}, "method ties: got granularity filter"),
            ("ties", {"density": 1.5}, "ties, option density: got 1.5; expected a number from 0 to 1"),
            ("karcher", {"iterations": 0}, "karcher, option iterations"),
            ("wise_ft", {"alpha": "half"}, "option alpha: got 'half'; expected a number"),
            ("uniform", {"dtype": "F8"}, "dtype: got 'F8'; expected F64, F32, F16, BF16"),
        ],
    )
    def test_each_bad_option_is_named(self, method, options, message):
        anchor, tuned = family(2)
        with pytest.raises(MergeError, match=message):
            merge_with(method, anchor, tuned, **options)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_non_finite_value_is_refused_by_name(self, value):
        anchor, tuned = family(2)
        bad = tuned[1].tensors["block.1.conv.weight"].copy()
        bad[0, 0, 0, 0] = value
        with pytest.raises(WeightsError, match=r"seed 11, tensor block.1.conv.weight: got 1 of 48"):
            merge_with(
                "uniform",
                anchor,
                [tuned[0], WeightSet({**tuned[1].tensors, "block.1.conv.weight": bad}, source="seed 11")],
            )


def at_value(value):
    return WeightSet({"w": np.array([value])}, source=str(value))


def near(goal):
    """A score: nearness of the only value to a goal; counts how often it is asked."""
    asked = []

    def score(trials):
        asked.append(len(trials))
        return [-abs(float(w.tensors["w"][0]) - goal) for w in trials]

    return score, asked


class TestSearches:
    def test_greedy_adds_only_what_makes_the_running_mean_strictly_better(self):
        """In one dimension with the goal at 1: 0.8 first, then 1.4 (mean 1.1 is nearer), never 3."""
        score, asked = near(1.0)
        soup, report = merge_with("greedy", at_value(0.0), [at_value(v) for v in (3.0, 1.4, 0.8)], score=score)
        assert report["w"]["chosen"] == ["0.8", "1.4"]
        assert report["w"]["score"] == pytest.approx(-0.1)
        assert soup.tensors["w"][0] == pytest.approx(1.1)
        assert soup.meta["made_by"] | {"version": ""} == {
            "stage": "merge",
            "method": "greedy",
            "options": {},
            "granularity": "tensor",
            "version": "",
        }
        assert asked == [3, 1, 1]  # all of them in one pass, then one trial each

    def test_the_oracle_scale_is_the_best_of_its_grid_and_of_equals_the_nearest_to_the_anchor(self):
        """Mean update 2, goal 1.5: scale 0.75 exactly; with a flat score the smallest."""
        score, asked = near(1.5)
        found, report = merge_with("oracle_scale", at_value(0.0), [at_value(1.0), at_value(3.0)], score=score)
        assert (found.tensors["w"][0], report["w"]["ratio"], asked) == (pytest.approx(1.5), pytest.approx(0.75), [31])
        flat, _ = merge_with(
            "oracle_scale", at_value(0.0), [at_value(1.0), at_value(3.0)], score=lambda w: [1.0] * len(w), low=0.25
        )
        assert flat.tensors["w"][0] == pytest.approx(0.5)

    def test_oracle_scales_find_each_tensors_own_least_loss(self):
        """Loss (a - 1)^2 + (b - 9)^2, mean updates 2 and 3: scales 1/2, and 3 which the bound holds at 2."""
        sets = [
            WeightSet({"a": np.array([v]), "b": np.array([w])}, source=f"{v}")
            for v, w in ((0.0, 0.0), (1.0, 2.0), (3.0, 4.0))
        ]

        def gradient(weights):
            a, b = (float(weights.tensors[k][0]) for k in "ab")
            return (a - 1) ** 2 + (b - 9) ** 2, {"a": np.array([2 * (a - 1)]), "b": np.array([2 * (b - 9)])}

        found, report = merge_with("oracle_scales", sets[0], sets[1:], gradient=gradient)
        assert found.tensors["a"][0] == pytest.approx(1.0, abs=1e-4)
        assert (found.tensors["b"][0], report["b"]["ratio"]) == (pytest.approx(6.0), pytest.approx(2.0))

    def test_a_search_without_a_score_says_what_to_give(self):
        for method, needs in (("greedy", "score"), ("oracle_scale", "score"), ("oracle_scales", "gradient")):
            with pytest.raises(MergeError, match=f"expected a {needs} on held-out data; give --held-out"):
                merge_with(method, at_value(0.0), [at_value(1.0), at_value(2.0)])


class TestWeighedByData:
    def test_fisher_by_hand_and_where_nothing_matters_the_mean(self):
        """(1 * 1 + 3 * 5) / 4 = 4; with no importance (1 + 5) / 2 = 3."""
        updates = np.array([[1.0, 1.0], [5.0, 5.0]])
        assert fisher(updates, [np.array([1.0, 0.0]), np.array([3.0, 0.0])]).tolist() == [4.0, 3.0]
        assert fisher(updates, None).tolist() == [3.0, 3.0]
        tiny = fisher(updates, [np.array([1e-30, 0.0]), np.array([3e-30, 0.0])])
        assert tiny.tolist() == pytest.approx([4.0, 3.0])

    def test_regmean_is_the_layer_of_least_squares(self):
        """Against a solver that knows nothing of it: the W that best gives each layer's outputs on its own inputs."""
        random = np.random.default_rng(0)
        layers, inputs = random.standard_normal((3, 5, 4)), random.standard_normal((3, 50, 4))
        found = regmean(layers, [x.T @ x for x in inputs], alpha=1.0)
        outputs = np.concatenate([x @ w.T for x, w in zip(inputs, layers, strict=True)])
        expected = np.linalg.lstsq(np.concatenate(list(inputs)), outputs, rcond=None)[0].T
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    @pytest.mark.parametrize("alpha", [0.5, 1.0])
    def test_regmean_keeps_the_mean_for_inputs_that_are_always_zero(self, alpha):
        random = np.random.default_rng(1)
        layers, inputs = random.standard_normal((2, 5, 4)), random.standard_normal((2, 50, 4))
        inputs[:, :, 2] = 0
        found = regmean(layers, [x.T @ x for x in inputs], alpha=alpha)
        np.testing.assert_allclose(found[:, 2], layers.mean(axis=0)[:, 2], rtol=1e-12)
        assert not np.allclose(found[:, 0], layers.mean(axis=0)[:, 0])

    def test_without_off_diagonals_regmean_weighs_each_input_by_its_power(self):
        found = regmean(np.array([[[2.0, 2.0]], [[6.0, 6.0]]]), [np.diag([1.0, 3.0]), np.diag([1.0, 1.0])], alpha=0.0)
        assert found.tolist() == [[4.0, 3.0]]

    @pytest.mark.parametrize(
        ("method", "change", "message"),
        [
            ("fisher", lambda s: s[:1], "got 1 files of statistics; expected 2: squared gradients"),
            ("uniform", lambda s: s, "got 2 files of statistics; expected 0"),
            ("fisher", lambda s: [s[0], {"scale": s[1]["scale"]}], "block.1.conv.weight missing"),
            ("fisher", lambda s: [{**x, "nope": x["scale"]} for x in s], "nope unknown"),
            ("fisher", lambda s: [{**x, "scale": -1 - x["scale"]} for x in s], "scale holds NaN, infinity or negative"),
            ("fisher", lambda s: [{**x, "scale": x["scale"] * np.nan} for x in s], "scale holds NaN"),
            ("fisher", lambda s: [{**x, "scale": np.ones(2)} for x in s], r"scale is F64 \(2,\) for a tensor \(\)"),
            ("regmean", lambda s: [{"head.bias": np.ones((5, 5))}] * 2, "head.bias is F64"),
        ],
    )
    def test_statistics_that_do_not_fit_are_refused(self, method, change, message):
        anchor, tuned = family(2)
        found = [dict(s.tensors) for s in given("fisher", tuned)["statistics"]]
        with pytest.raises(MergeError, match=message):
            merge_with(method, anchor, tuned, statistics=[WeightSet(s, source="statistics") for s in change(found)])

    def test_statistics_of_another_checkpoint_are_refused(self):
        anchor, tuned = family(2)
        found = [
            WeightSet(s.tensors, {"of": w.identity})
            for s, w in zip(given("fisher", tuned)["statistics"], tuned, strict=True)
        ]
        merge_with("fisher", anchor, tuned, statistics=found)
        with pytest.raises(MergeError, match="name them in the same order"):
            merge_with("fisher", anchor, tuned, statistics=found[::-1])


class TestLines:
    def test_a_block_moves_by_its_depth(self):
        """alpha 0.2, three blocks: 0.2, 0.6 and 1.0 of the mean update 2."""
        sets = [WeightSet({f"b.{i}.w": np.full(1, v) for i in range(3)}, source=str(v)) for v in (0.0, 1.0, 3.0)]
        merged, _ = merge_with("lines", sets[0], sets[1:], alpha=0.2)
        assert [float(merged.tensors[f"b.{i}.w"][0]) for i in range(3)] == pytest.approx([0.4, 1.2, 2.0])

    def test_tensors_without_numbers_are_refused(self):
        with pytest.raises(MergeError, match="names such as"):
            merge_with("lines", at_value(0.0), [at_value(1.0)])


def test_nuslerp_turns_by_the_weights_share_and_keeps_the_updates_lengths():
    """Perpendicular updates of lengths 2 and 6, weights 1 and 2: sin(30) of the first and sin(60) of the second."""
    found, _ = one("nuslerp", [5.0, 5.0], [at(0, 2) + 5, at(90, 6) + 5], weights=[1, 2])
    np.testing.assert_allclose(found, [5 + 2 * 0.5, 5 + 6 * math.sqrt(3) / 2], rtol=1e-12)


def test_karcher_and_slerp_of_weights_turn_the_weights_about_zero():
    pair = [at(10, 2), at(70, 2)]
    for method in ("slerp_weights", "karcher_weights", "nuslerp_weights"):
        np.testing.assert_allclose(one(method, [9.0, 9.0], pair)[0], at(40, 2), rtol=1e-9)


def test_votes_count_heads_where_mass_counts_magnitude():
    """One large negative against two small positives: mass elects minus, votes elect plus."""
    updates = [[-9.0], [1.0], [3.0]]
    assert one("ties", [0.0], updates, density=1.0)[0].tolist() == [-9.0]
    assert one("ties_votes", [0.0], updates, density=1.0)[0].tolist() == [2.0]


@pytest.mark.parametrize("rms", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("size", [1, 768, 38_000_000])
def test_model_stock_of_float32_files_agrees_with_a_float64_reference_to_1e_7(size, rms):
    """The reference: float64 BLAS on whole tensors of the same stored values."""
    if size > 1000 and rms != 1e-5:
        pytest.skip("one rms is enough for the largest tensor")
    random = np.random.default_rng(0)
    common = random.standard_normal(size, np.float32) + np.float32(0.5)
    origin = np.zeros(size, np.float32)
    tuned = [np.float32(rms) * (common + random.standard_normal(size, np.float32)) for _ in range(2)]
    sets = [WeightSet({"w": w}, source=str(i)) for i, w in enumerate([origin, *tuned])]
    merged, report = merge_with("model_stock", sets[0], sets[1:], workers=2)
    a, b = (w.astype(np.float64) for w in tuned)
    cosine = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
    t = min(1.0, max(0.0, 2 * cosine / (1 + cosine)))
    assert report["w"]["ratio"] == pytest.approx(t, rel=1e-9)
    expected = (t * (a + b) / 2).astype(np.float32)
    np.testing.assert_allclose(merged.tensors["w"], expected, rtol=1e-7, atol=1e-7 * rms)


def test_zero_updates_in_all_models_give_the_anchor():
    anchor, tuned = family(3)
    still = [WeightSet({**w.tensors, "head.bias": anchor.tensors["head.bias"]}, source=w.source) for w in tuned]
    for method in METHODS:
        if METHODS[method].of == "updates":
            options = {"weights": [1, 2, 3]} if method == "weighted" else {}
            merged, _ = merged_by(method, anchor, still[: COUNT.get(method, 3)], **options)
            np.testing.assert_array_equal(merged.tensors["head.bias"], anchor.tensors["head.bias"])


def test_values_beyond_the_results_dtype_are_refused():
    sets = [WeightSet({"w": np.array([v])}, source=str(v)) for v in (0.0, 6e4, 5e4)]
    with pytest.raises(MergeError, match="tensor w: got merged values beyond F16"):
        merge_with("uniform", sets[0], sets[1:], scale=2.0, dtype="F16")


def large(seed=0):
    """An anchor and two seeds of several chunks and runs."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((300, 70_000)).astype(np.float32)
    return [
        WeightSet({"w": shared + random.standard_normal(shared.shape, np.float32)}, source=str(i)) for i in range(3)
    ]


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
def test_the_merge_does_not_depend_on_workers(granularity):
    sets = large()
    few, many = (
        merge_with("model_stock", sets[0], sets[1:], workers=workers, granularity=granularity)[0] for workers in (1, 4)
    )
    assert few.identity == many.identity
    assert few.meta == many.meta


def test_the_merge_does_not_depend_on_threads_of_a_linear_algebra_library():
    sets = large()

    def merged(threads):
        with threadpool_limits(threads, user_api="blas"):
            used = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
            assert used == {threads}
            return merge_with("model_stock", sets[0], sets[1:])[0].identity

    assert merged(1) == merged(2)


class TestManyRowsAtOnce:
    """A method that takes the inner products of many rows gives each row the bits that it gets on its own."""

    @pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.batched])
    @pytest.mark.parametrize("options", [{}, {"pairwise": "angle"}, {"clip": "none"}])
    @pytest.mark.parametrize("count", [2, 3, 5, 8, 20])
    def test_coefficients_and_facts_are_those_of_one_row_to_the_last_bit(self, method, options, count):
        if not options.keys() <= METHODS[method].options.keys():
            pytest.skip("options of other methods")
        own = {**options, **({"weights": range(1, count + 1)} if method == "weighted" else {})}
        updates = np.random.default_rng(count).standard_normal((300, count, 40)) + 0.3
        updates[7, 1] = 0
        updates[8] = -updates[8, :1]
        grams = np.einsum("rik,rjk->rij", updates, updates)
        together = METHODS[method].function(grams, **own)
        alone = one_by_one(METHODS[method].function, grams, **own)
        np.testing.assert_array_equal(together.coefficients, alone.coefficients)
        for key, values in alone.facts.items():
            np.testing.assert_array_equal(together.facts[key], values)

    @pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.granular])
    def test_a_tensor_of_one_filter_is_merged_as_with_granularity_tensor(self, method):
        pair = [at(10, 2), at(70, 4)]
        whole, facts = one(method, [[0.0, 1.0]], [[w] for w in pair])
        by_filter, same = one(method, [[0.0, 1.0]], [[w] for w in pair], granularity="filter")
        np.testing.assert_array_equal(by_filter, whole)
        assert same == facts


def pool(count):
    """An anchor and so many updates that share a direction, of one tensor, a running statistic and a counter."""
    random = np.random.default_rng(0)
    shared = random.standard_normal((30, 40))

    def weights(scale, source):
        tensors = {"w": scale * (shared + random.standard_normal(shared.shape)), "bn.running_mean": random.random(3)}
        return WeightSet({name: np.float32(values) for name, values in tensors.items()}, source=source)

    return weights(0, "anchor"), [weights(1, f"w{number}") for number in range(count)]


class TestLargePools:
    def test_methods_without_a_declaration_are_given_all_inner_products(self):
        """What looks at angles must never get their mean by an omission in a row."""
        ignoring = {name for name, row in METHODS.items() if row.ignores_angles}
        assert ignoring == {"uniform", "weighted", "wise_ft", "task_arithmetic", "lines", "recalibrated"}
        for name in ignoring - {"recalibrated"}:  # of one checkpoint alone
            gram = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, 0.7], [0.5, 0.7, 4.0]])
            other = np.diag(np.diag(gram)) + 0.1 * (1 - np.eye(3))
            own = ([1.0] if name == "lines" else [], {"weights": [1, 2, 3]} if name == "weighted" else {})
            here, there = (METHODS[name].function(g, *own[0], **own[1]).coefficients for g in (gram, other))
            np.testing.assert_array_equal(here, there)

    @pytest.mark.parametrize("method", ["uniform", "task_arithmetic", "ties", "model_stock", "karcher"])
    @pytest.mark.parametrize("granularity", ["tensor", "filter"])
    def test_without_inner_products_of_all_pairs_a_merge_has_the_same_bytes(self, method, granularity, monkeypatch):
        if granularity == "filter" and METHODS[method].kind != "span":
            pytest.skip("not in the span")
        anchor, tuned = pool(5)
        expected, facts = merge_with(method, anchor, tuned, granularity=granularity)
        monkeypatch.setattr("modelstock.merging.engine.POOL", 4)
        found, of_pool = merge_with(method, anchor, tuned, granularity=granularity)
        assert found.identity == expected.identity
        assert of_pool["w"]["norms"] == facts["w"]["norms"]
        # The mean inner product over the norms: what the mean cosine is where the norms are alike.
        assert of_pool["w"]["cosine"] == pytest.approx(facts["w"]["cosine"], rel=1e-3)
        if METHODS[method].reads_angles:
            assert of_pool == facts

    def test_the_same_weights_twice_are_refused_in_a_large_pool(self):
        anchor, tuned = pool(20)
        again = WeightSet(dict(tuned[3].tensors), source="again")
        with pytest.raises(MergeError, match="again: got the same tensors as w3"):
            merge_with("uniform", anchor, [*tuned, again])

    def test_greedys_trials_are_the_merges_of_their_members(self):
        """Each, by the running mean, is what a uniform soup of its members gives, up to a float32's last bit."""
        anchor, tuned = pool(6)
        accuracies = iter([0.6, 0.1, 0.5, 0.4, 0.3, 0.2, 0.7, 0.65, 0.8, 0.9, 0.1])
        order, trials = [], []

        def score(batch):
            (order if len(batch) > 1 else trials).extend(w.tensors["w"].copy() for w in batch)
            return [next(accuracies) for _ in batch]

        soup, report = merge_with("greedy", anchor, tuned, score=score)
        # In the order of the updates' norms: alone, then candidates 2, 3 (no), 4, 5 and 1 (no) beside the best, 0.
        names = ["w0 w2", "w0 w2 w3", "w0 w2 w4", "w0 w2 w4 w5", "w0 w2 w4 w5 w1"]
        by_values = {w.tensors["w"].tobytes(): w for w in tuned}
        ranked = [by_values[values.tobytes()] for values in order]  # alone, each is its own values
        for values, members in zip(trials, names, strict=True):
            own = [ranked[int(name[1:])] for name in members.split()]
            expected = merge_with("uniform", anchor, own)[0].tensors["w"]
            np.testing.assert_array_max_ulp(values, expected, maxulp=1)
        members = [ranked[number] for number in (0, 2, 4, 5)]
        assert sorted(report["w"]["chosen"]) == sorted(w.source for w in members)
        assert report["w"]["score"] == 0.9
        np.testing.assert_array_equal(soup.tensors["w"], merge_with("uniform", anchor, members)[0].tensors["w"])

    def test_a_greedy_candidate_reads_one_checkpoint(self):
        """Alone each is read; then each once as a candidate, and those that are taken once more for the mean."""
        anchor, tuned = pool(12)
        reads = Counter()

        def counted(weights):
            opened = in_memory(weights.tensors, {}, weights.source)

            def entry(tensor):
                def read(start, stop, scratch=None):
                    reads[weights.source] += 1
                    return tensor.read(start, stop)

                return replace(tensor, read=read)

            return replace(opened, tensors={name: entry(tensor) for name, tensor in opened.tensors.items()})

        def score(batch):
            for trial in batch:
                dict(trial.tensors)
            return list(range(len(batch))) if len(batch) > 1 else [100 + sum(reads.values())]

        plan_merge("greedy", counted(anchor), [counted(w) for w in tuned], score=score)
        tensors = len(anchor.tensors)
        # The first pass, alone, as a candidate, and for the mean; the best one also beside the first two candidates.
        assert max(reads[w.source] for w in tuned) <= 6 * tensors
        assert sum(reads[w.source] for w in tuned) <= 12 * 4 * tensors + 4 * tensors

    def test_what_has_no_share_is_not_read(self):
        anchor, tuned = pool(2)

        def never(start, stop, scratch=None):
            raise AssertionError("read")

        origin, first = (in_memory(w.tensors, {}, w.source).tensors["w"] for w in (anchor, tuned[0]))
        pieces = blended(
            origin, [first, replace(first, read=never)], list(chunks(1200, 1)), np.array([[0.5, 0.0]]), "F32"
        )
        (_, values), *_ = pieces
        expected = anchor.tensors["w"] + 0.5 * (np.float64(tuned[0].tensors["w"]) - anchor.tensors["w"])
        np.testing.assert_array_equal(values, np.float32(expected).reshape(-1))


@pytest.mark.parametrize("size", [2, 3, 100, 40_000])
@pytest.mark.parametrize("distinct", [1, 3, 1000, 10**9])
def test_the_magnitude_at_a_place_is_that_of_the_sorted_ones_and_the_larger_are_counted(size, distinct):
    random = np.random.default_rng(size)
    values = random.integers(0, distinct, size) / 7
    values[: size // 2].sort()  # a sample at equal distances is then a poor one
    expected = np.sort(values)
    update = values * random.choice([-1, 1], size)
    for place in {0, 1, size // 5, size // 2, size - 1}:
        assert _in_order(update, place) == (expected[place], np.count_nonzero(values > expected[place]))


class TestARowIsAllThatAMethodNeeds:
    """A method that no other file knows, added to the table for one test."""

    @pytest.fixture
    def halves(self, monkeypatch):
        def function(gram, *, share):
            return Blend(np.full(len(gram), share / len(gram)), {"share": share})

        row = Method(
            name="halves",
            function=function,
            kind="span",
            formula="w0 + share * mean(v_i)",
            source="this test",
            own_options=(Option(name="share", default=0.5, about="of the mean", low=0, high=1),),
            chooses=Choice(option="share", name="shares", low=0, high=1, values=(0.25, 0.5)),
        )
        monkeypatch.setitem(METHODS, "halves", row)
        return row

    def test_it_merges_with_its_options_checked_and_recorded(self, halves):
        anchor, tuned = family(2)
        merged, report = merge_with("halves", anchor, tuned, share=0.25)
        expected = merge_with("wise_ft", anchor, tuned, alpha=0.25)[0]
        assert merged.identity == expected.identity
        assert merged.meta["made_by"]["options"] == {"share": 0.25}
        assert report["head.bias"]["share"] == 0.25
        with pytest.raises(MergeError, match="option share: got 2; expected a number from 0 to 1"):
            merge_with("halves", anchor, tuned, share=2)

    def test_it_merges_files_and_the_command_lists_it(self, halves, tmp_path):
        anchor, tuned = family(2)
        for number, weights in enumerate([anchor, *tuned]):
            weights.save(tmp_path / f"{number}.safetensors")
        paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
        merge_files("halves", paths[0], paths[1:], tmp_path / "out.safetensors", options={"share": 0.25})
        assert (
            load_weights(tmp_path / "out.safetensors").identity
            == merge_with("halves", anchor, tuned, share=0.25)[0].identity
        )
        listed = CliRunner().invoke(app, ["methods", "--json"])
        row = json.loads(listed.stdout)["rows"][-1]
        assert {"method": "halves", "options": "share=0.5, scale=1.0"}.items() <= row.items()

    def test_its_params_section_follows_from_the_row(self, halves):
        section = merge_section(METHODS)
        params = section(methods=["halves"], halves={"sets": "all", "shares": [0.5]})
        assert params.section("halves").shares == [0.5]
        with pytest.raises(ValidationError, match="takes numbers above 0 and up to 1"):
            section(methods=["halves"], halves={"sets": "all", "shares": [1.5]})
        with pytest.raises(ValidationError, match="no section for halves"):
            section(methods=["halves"])
        assert standard_section(halves).shares == [0.25, 0.5]

    def test_an_experiment_chooses_its_option_on_the_held_out_split(self, halves, monkeypatch):
        anchor, tuned = family(2)
        near = merge_with("halves", anchor, tuned, share=0.5)[0]

        def accuracies(dataset, weights, options):
            return [float(w.identity == near.identity) for w in weights]

        monkeypatch.setattr("modelstock.experiment.merge.accuracies", accuracies)
        merges = SubsetMerges(
            method="halves",
            section=standard_section(halves),
            anchor=anchor,
            seeds=dict(enumerate(tuned)),
            held_out=None,
            scoring=ScoringOptions(),
        )
        assert [(merge.name, row_of(merge.weights).name) for merge in merges] == [("0-1@0.5", "halves/0-1@0.5")]


def test_almost_equal_weights_are_not_taken_for_the_same():
    """They differ in one value of a million by so little that no inner product shows it."""
    first = np.random.default_rng(0).standard_normal(1_000_000)
    second = first.copy()
    second[5] = np.nextafter(second[5], 9)
    sets = [WeightSet({"w": w}, source=str(i)) for i, w in enumerate([np.zeros_like(first), first, second])]
    assert merge_with("uniform", sets[0], sets[1:])[0].tensors["w"].shape == (1_000_000,)
