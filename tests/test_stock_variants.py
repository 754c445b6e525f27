"""What answers the open questions about Model Stock's ratio: weights per model, a tuned ratio, one checkpoint alone."""

import math

import numpy as np
import pytest
from pydantic import ValidationError
from threadpoolctl import threadpool_limits

from modelstock.comparison.compare import compare
from modelstock.comparison.figures import figures
from modelstock.errors import MergeError
from modelstock.experiment.merge import SubsetMerges
from modelstock.experiment.rows import row_of
from modelstock.experiment.subsets import subsets
from modelstock.merging.methods.model_stock import model_stock
from modelstock.merging.methods.normal_equations import normal_equations
from modelstock.merging.methods.spectral import monosoup
from modelstock.merging.methods.table import METHODS
from modelstock.params import MethodParams, merge_section, standard_section
from modelstock.scoring.one_pass import ScoringOptions
from modelstock.scoring.results import Row, Scores
from modelstock.weights.weight_set import WeightSet
from tests.support.merging import merge_with


def one(method, tuned, **options):
    """One tensor merged with an anchor of zeros, and its facts."""
    sets = [WeightSet({"w": np.asarray(w, np.float64)}, source=f"w{i}") for i, w in enumerate([0 * tuned[0], *tuned])]
    merged, report = merge_with(method, sets[0], sets[1:], **options)
    return merged.tensors["w"], report["w"]


def vectors(*tuned):
    return [np.array(w, np.float64) for w in tuned]


def simplex(count, cosine):
    """Inner products of unit updates whose pairs all have the same cosine."""
    return np.full((count, count), cosine) + (1 - cosine) * np.eye(count)


class TestNormalEquations:
    @pytest.mark.parametrize("count", [2, 3, 5, 10])
    @pytest.mark.parametrize("cosine", [0.0, 0.01, 0.3, 0.9, 0.9999, 1.0])
    @pytest.mark.parametrize("norm", [1e-100, 1.0, 1e3])
    @pytest.mark.parametrize("clip", ["unit", "none"])
    def test_equal_norms_and_angles_give_model_stock(self, count, cosine, norm, clip):
        gram = norm**2 * simplex(count, cosine)
        expected = model_stock(gram, clip=clip)
        found = normal_equations(gram, clip=clip)
        np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-9, atol=1e-15)
        assert found.facts["ratio"] == pytest.approx(expected.facts["ratio"], rel=1e-9, abs=1e-15)
        assert found.facts["cosine"] == expected.facts["cosine"]

    def test_equal_norms_at_an_obtuse_angle_give_model_stock_with_and_without_clip(self):
        gram = simplex(3, -0.2)
        assert (normal_equations(gram).coefficients == 0).all()
        literal = normal_equations(gram, clip="none")
        np.testing.assert_allclose(literal.coefficients, model_stock(gram, clip="none").coefficients, rtol=1e-12)
        assert (normal_equations(gram).facts["flag"], literal.facts["flag"]) == ("clipped", "negative")

    def test_two_updates_by_hand(self):
        """G = (4 2; 2 5), b = (2, 2): l = (2 (5 - 2), 2 (4 - 2)) / 16 = (3/8, 1/4)."""
        found, facts = one("normal_equations", vectors([2, 0], [1, 2]))
        np.testing.assert_allclose(found, [1, 0.5], rtol=1e-14)
        assert facts["ratio"] == pytest.approx(5 / 8)
        assert (facts["least weight"], facts["largest weight"]) == pytest.approx((1 / 4, 3 / 8))
        assert facts["flag"] == ""

    def test_a_negative_weight_is_clipped_and_then_the_sum_by_hand(self):
        """G = (9 3; 3 2), b = (3, 3): l = (3 (2 - 3), 3 (9 - 3)) / 9 = (-1/3, 2); clipped (0, 2), then (0, 1)."""
        tuned = vectors([3, 0], [1, 1])
        found, facts = one("normal_equations", tuned)
        np.testing.assert_allclose(found, tuned[1], rtol=1e-14)
        assert facts["flag"] == "clipped"
        literal, facts = one("normal_equations", tuned, clip="none")
        np.testing.assert_allclose(literal, [1, 2], rtol=1e-13)
        assert facts["flag"] == "negative"

    def test_against_a_general_solver(self):
        updates = np.random.default_rng(0).standard_normal((5, 60)) + 1
        gram = updates @ updates.T
        right = [np.mean([gram[i, j] for i in range(5) if i != j]) for j in range(5)]
        np.testing.assert_allclose(
            normal_equations(gram, clip="none").coefficients, np.linalg.solve(gram, right), rtol=1e-10
        )

    def test_the_result_is_the_projection_of_the_centre_where_the_estimates_are_exact(self):
        """Updates mu + own noise along axes of their own: every <v_i, v_j> is <v_j, mu> to the last bit."""
        sizes = [0.5, 1.0, 2.0, 4.0]
        updates = np.hstack([np.ones((4, 1)), np.diag(sizes)])
        centre = np.eye(5)[0]
        expected = updates.T @ np.linalg.lstsq(updates.T, centre, rcond=None)[0]
        found, facts = one("normal_equations", list(updates))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        # By hand: the weight of each is 1 / (size^2 (1 + sum of 1 / size^2)), the sum over (1 + the sum).
        total = sum(1 / size**2 for size in sizes)
        assert facts["ratio"] == pytest.approx(total / (1 + total))

    def test_a_pool_with_unequal_noise_is_nearer_to_its_centre_than_by_model_stock(self):
        """In high dimension: the ratio of Model Stock is biased there, and the weights are within 1 % of the oracle."""
        random, size = np.random.default_rng(0), 40_000
        centre = random.standard_normal(size)
        updates = np.stack([centre + noise * random.standard_normal(size) for noise in (0.3, 1.0, 3.0)])
        gram = updates @ updates.T
        mean, length = updates.mean(axis=0), np.linalg.norm(centre)

        def error(weights):
            return np.linalg.norm(weights @ updates - centre) / length

        oracle = error(np.linalg.solve(gram, updates @ centre))
        stock, own = model_stock(gram), normal_equations(gram)
        assert error(own.coefficients) < 1.01 * oracle
        assert error(stock.coefficients) > 2.5 * oracle
        # The best ratio of the mean itself is known too: <m, mu> / <m, m>. The formula is off by a third.
        best = mean @ centre / (mean @ mean)
        assert stock.facts["ratio"] > 1.3 * best
        assert error(np.full(3, best / 3)) > 2 * error(own.coefficients)

    def test_one_longer_update_moves_the_centre_that_the_others_see(self):
        """So its weight is not just divided: twice (1, 2) beside (2, 0) has G = (4 4; 4 20), b = (4, 4), l = (1, 0)."""
        found, facts = one("normal_equations", vectors([2, 0], [2, 4]))
        np.testing.assert_allclose(found, [2, 0], atol=1e-14)
        assert facts["largest weight"] == pytest.approx(1)

    def test_a_zero_update_keeps_the_anchor_and_is_flagged(self):
        updates = np.array([[1.0, 2, 3], [0, 0, 0], [3, 2, 1]])
        for clip in ("unit", "none"):
            blend = normal_equations(updates @ updates.T, clip=clip)
            assert not blend.coefficients.any()
            assert (blend.facts["flag"], blend.facts["ratio"]) == ("zero", 0)
            assert np.isnan(blend.facts["cosine"])

    def test_equal_updates_of_a_tensor_share_their_weight_and_are_flagged(self):
        """Beside (1, 2), twice (2, 0): b = (3, 3, 2), and 4 (l_1 + l_2) + 2 l_3 = 3, 2 (l_1 + l_2) + 5 l_3 = 2."""
        gram = np.array([[4.0, 4, 2], [4, 4, 2], [2, 2, 5]])
        blend = normal_equations(gram)
        together, third = np.linalg.solve([[4.0, 2], [2, 5]], [3, 2])
        np.testing.assert_allclose(blend.coefficients, [together / 2, together / 2, third], rtol=1e-12)
        assert blend.facts["flag"] == "singular"

    def test_at_the_pole_of_model_stock_the_anchor_is_kept_and_flagged(self):
        for clip in ("unit", "none"):
            found, facts = one("normal_equations", vectors([1], [-1]), clip=clip)
            assert (found.item(), facts["flag"]) == (0, "singular")

    def test_a_single_update_is_refused(self):
        with pytest.raises(MergeError, match="normal_equations: got 1 fine-tuned weights; expected 2 or more"):
            one("normal_equations", vectors([1, 2]))


def pool(count):
    """An anchor and so many weight sets with a matrix, a convolution, a vector and a scalar."""
    random = np.random.default_rng(0)
    shapes = {"block.0.weight": (12, 20), "conv.weight": (6, 3, 2, 2), "bias": (12,), "scale": ()}
    anchor = {name: np.float32(random.standard_normal(shape)) for name, shape in shapes.items()}
    common = {name: random.standard_normal(shape) for name, shape in shapes.items()}

    def tuned(number):
        noise = {name: (1 + number) * random.standard_normal(shape) for name, shape in shapes.items()}
        tensors = {name: np.float32(anchor[name] + common[name] + noise[name]) for name in shapes}
        made_by = {"stage": "finetune", "seed": number, "options": {}, "version": "test"}
        return WeightSet(tensors, {"made_by": made_by}, f"seed {number}")

    return WeightSet(anchor, {}, "anchor"), [tuned(number) for number in range(count)]


def merges_of(method, count, section):
    anchor, tuned = pool(count)
    words = {"anchor": anchor, "seeds": dict(enumerate(tuned)), "held_out": None, "scoring": ScoringOptions()}
    return SubsetMerges(method=method, section=section, **words)


class TestTunedStock:
    @pytest.mark.parametrize("granularity", ["tensor", "filter", "model"])
    def test_a_factor_of_one_gives_the_bytes_of_model_stock(self, granularity):
        anchor, tuned = pool(3)
        plain, ratios = merge_with("model_stock", anchor, tuned, granularity=granularity)
        same, facts = merge_with("tuned_stock", anchor, tuned, granularity=granularity, scale=1.0)
        assert same.identity == plain.identity
        assert facts == ratios

    def test_the_factor_is_one_for_all_tensors(self):
        anchor, tuned = pool(3)
        plain, _ = merge_with("model_stock", anchor, tuned)
        longer, _ = merge_with("tuned_stock", anchor, tuned, scale=1.5)
        for name, origin in anchor.tensors.items():
            expected = origin + 1.5 * (np.float64(plain.tensors[name]) - origin)
            np.testing.assert_allclose(longer.tensors[name], expected, rtol=1e-5, atol=1e-6)

    def test_an_experiment_chooses_it_on_the_held_out_split(self, monkeypatch):
        monkeypatch.setattr("modelstock.experiment.merge.accuracies", lambda *words: [0.5, 0.5, 0.6, 0.7, 0.6, 0.1])
        section = standard_section(METHODS["tuned_stock"]).model_copy(update={"sets": "all"})
        (merge,) = merges_of("tuned_stock", 3, section)
        assert (merge.name, row_of(merge.weights).name) == ("0-1-2@1.2", "tuned_stock/0-1-2@1.2")
        assert merge.report["scale"] == 1.2


def alone(update, **options):
    return monosoup(np.asarray(update, np.float64)[None], [], **options)


class TestMonoSoup:
    def test_two_singular_values_by_hand(self):
        """4 and 3, the first in v_high: c = 3 / 5, r = 9 / 16, low = 9 / 16 + 7 / 16 * 3 / 5 = 0.825."""
        found = alone([[4, 0], [0, 3]], rank="energy", energy=0.5)
        np.testing.assert_allclose(found, [[0.175 * 4, 0], [0, 0.825 * 3]], rtol=1e-14)

    def test_the_effective_rank_by_hand(self):
        """Of 8, 1, 1, exp of the entropy is 1.9: two are in v_high, c = 1 / sqrt(66), r = 1 / 64."""
        low = 1 / 64 + 63 / 64 / math.sqrt(66)
        found = alone(np.diag([8.0, 1, 1])[:, [2, 0, 1]])
        np.testing.assert_allclose(np.linalg.svd(found)[1], [8 * (1 - low), 1 - low, low], rtol=1e-13)

    @pytest.mark.parametrize("options", [{}, {"rank": "energy", "energy": 0.9}])
    def test_it_turns_with_the_rows_and_columns(self, options):
        """Only singular values count: Q v R becomes Q f(v) R."""
        random = np.random.default_rng(0)
        update = random.standard_normal((6, 9)) @ np.diag(0.5 ** np.arange(9))
        (left, _), (right, _) = (np.linalg.qr(random.standard_normal((size, size))) for size in (6, 9))
        np.testing.assert_allclose(alone(left @ update @ right, **options), left @ alone(update, **options) @ right)
        np.testing.assert_allclose(alone(update.T, **options), alone(update, **options).T)

    def test_against_eigenvectors_of_the_squared_update(self):
        """The authors' formula by another decomposition, with the rank of 80 % of the energy."""
        update = np.random.default_rng(1).standard_normal((7, 20)) @ np.diag(0.8 ** np.arange(20))
        values, axes = np.linalg.eigh(update @ update.T)
        values, axes = values[::-1], axes[:, ::-1]
        rank = next(k for k in range(1, 8) if values[:k].sum() >= 0.8 * values.sum())
        high = axes[:, :rank] @ axes[:, :rank].T @ update
        decay, cosine = values[rank] / values[0], math.sqrt(1 - values[:rank].sum() / values.sum())
        low = decay + (1 - decay) * cosine
        np.testing.assert_allclose(
            alone(update, rank="energy"), (1 - low) * high + low * (update - high), rtol=1e-9, atol=1e-12
        )

    @pytest.mark.parametrize("options", [{}, {"rank": "energy", "energy": 0.8}])
    def test_an_update_of_rank_one_is_kept_up_to_rounding(self, options):
        update = np.outer(np.arange(1.0, 5), [3, -1, 2])
        np.testing.assert_allclose(alone(update, **options), update, rtol=1e-13)

    def test_all_of_the_energy_is_the_checkpoint_itself_to_the_last_bit(self):
        anchor, (tuned,) = pool(1)
        merged, _ = merge_with("monosoup", anchor, [tuned], rank="energy", energy=1.0)
        assert merged.identity == merge_with("uniform", anchor, [tuned])[0].identity
        for name, values in tuned.tensors.items():
            np.testing.assert_allclose(merged.tensors[name], values, rtol=1e-6)

    def test_vectors_and_scalars_are_kept_and_convolutions_are_matrices(self):
        anchor, (tuned,) = pool(1)
        merged, _ = merge_with("monosoup", anchor, [tuned], rank="energy")
        plain, _ = merge_with("uniform", anchor, [tuned])
        for name in ("bias", "scale"):
            np.testing.assert_array_equal(merged.tensors[name], plain.tensors[name])
        flat = [WeightSet({"w": weights.tensors["conv.weight"].reshape(6, 12)}) for weights in (anchor, tuned)]
        matrix, _ = merge_with("monosoup", flat[0], flat[1:], rank="energy")
        np.testing.assert_array_equal(merged.tensors["conv.weight"].reshape(6, 12), matrix.tensors["w"])
        assert (merged.tensors["conv.weight"] != plain.tensors["conv.weight"]).any()

    def test_two_checkpoints_are_refused(self):
        anchor, tuned = pool(2)
        with pytest.raises(MergeError, match="got 2 fine-tuned weights; expected 1 at most; merge them one by one"):
            merge_with("monosoup", anchor, tuned)

    def test_workers_change_no_bit_and_threads_of_the_linear_algebra_library_only_the_last(self):
        """LAPACK divides the work of a large matrix by its threads: float64's last bits, rarely float32's."""
        random = np.random.default_rng(0)
        sets = [WeightSet({f"w{i}": random.standard_normal((300, 500)).astype("f4") for i in range(3)}) for _ in "01"]

        def merged(*, workers, threads):
            with threadpool_limits(threads, user_api="blas"):
                return merge_with("monosoup", sets[0], sets[1:], workers=workers)[0]

        assert merged(workers=1, threads=1).identity == merged(workers=3, threads=1).identity
        many, few = merged(workers=1, threads=2), merged(workers=1, threads=1)
        for name, values in many.tensors.items():
            np.testing.assert_allclose(values, few.tensors[name], rtol=1e-6, atol=1e-6)


class TestSingleSeedsInAnExperiment:
    def test_every_seed_is_merged_alone_and_named_for_it(self):
        assert subsets([3, 1, 2], "single") == [(3,), (1,), (2,)]
        found = list(merges_of("monosoup", 3, standard_section(METHODS["monosoup"])))
        assert [merge.name for merge in found] == ["0", "1", "2"]
        rows = [row_of(merge.weights) for merge in found]
        assert [(row.name, row.members) for row in rows] == [(f"monosoup/{n}", (n,)) for n in range(3)]

    def test_sets_that_a_method_cannot_merge_are_refused_with_the_settings(self):
        section = merge_section(METHODS)
        for method, sets in (("model_stock", "single"), ("tuned_stock", "single"), ("monosoup", "ring")):
            given = {**standard_section(METHODS[method]).model_dump(), "sets": sets}
            with pytest.raises(ValidationError, match=f"{method}.sets"):
                section(methods=[method], **{method: given})
        alone = {**standard_section(METHODS["wise_ft"]).model_dump(), "sets": "single"}
        chosen: MethodParams = section(methods=["wise_ft"], wise_ft=alone).section("wise_ft")
        assert chosen.sets == "single"

    def test_a_comparison_has_a_line_for_them_and_draws_them_as_it_draws_seeds(self):
        rows = (
            Row("anchor", "a" * 64, "anchor", (), {}),
            *(Row(f"seed-{n}", str(n) * 64, "seed", (n,), {}) for n in range(3)),
            *(Row(f"monosoup/{n}", str(n + 3) * 64, "monosoup", (n,), {}) for n in range(3)),
            Row("uniform/0-1-2", "9" * 64, "uniform", (0, 1, 2), {}),
        )

        def scores(name, role):
            random = np.random.default_rng(len(name))
            truth = random.integers(0, 4, 60).astype(np.int32)
            prediction = np.where(random.random((len(rows), 60)) < 0.7, truth, 0).astype(np.int32)
            correct, sure = prediction == truth, np.full(prediction.shape, 0.5, np.float32)
            return Scores(name, role, "d" * 64, rows, tuple("abcd"), truth, correct, correct, prediction, sure, sure)

        comparison = compare(
            [scores("held-out", "held-out"), scores("test", "in-distribution"), scores("other", "shift")]
        )
        line = next(line for line in comparison.lines if line.key == "monosoup")
        assert (line.name, line.size, line.over_uniform) == ("monosoup of 1, mean of 3", 1, {})
        assert set(line.over_seed) == {"in-distribution", "shifts"}
        assert all(picture for _, picture in figures(comparison).values())
