"""The statistics against values worked by hand, published values and simulations of what they promise."""

import dataclasses
import json
import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from statsmodels.stats.multitest import multipletests

from modelstock.comparison.compare import compare, per_class
from modelstock.comparison.differences import Difference
from modelstock.comparison.intervals import BalancedAccuracies, wilson
from modelstock.comparison.metrics import METRICS, Metric, metrics
from modelstock.comparison.paired_tests import holm, mcnemar
from modelstock.comparison.report import write_report
from modelstock.errors import DataError
from modelstock.scoring.results import Row, Scores

ROWS = (
    Row("anchor", "a" * 64, "anchor", (), {}),
    Row("seed-0", "0" * 64, "seed", (0,), {}),
    Row("seed-1", "1" * 64, "seed", (1,), {}),
    Row("seed-2", "2" * 64, "seed", (2,), {}),
    Row("uniform/0-1", "3" * 64, "uniform", (0, 1), {}),
    Row("uniform/1-2", "4" * 64, "uniform", (1, 2), {}),
    Row("model_stock/0-1", "5" * 64, "model_stock", (0, 1), {}),
    Row("model_stock/1-2", "6" * 64, "model_stock", (1, 2), {}),
    Row("wise_ft/0-1-2@0.3", "7" * 64, "wise_ft", (0, 1, 2), {"alpha": 0.3}),
    Row("wise_ft/0-1-2@0.6", "8" * 64, "wise_ft", (0, 1, 2), {"alpha": 0.6}),
    Row("greedy/0-2", "9" * 64, "greedy", (0, 2), {}),
    Row("ensemble/0-1-2", "e" * 64, "ensemble", (0, 1, 2), {}),
)
ACCURACY = {
    "held-out": [0.60, 0.70, 0.72, 0.68, 0.74, 0.74, 0.78, 0.76, 0.71, 0.75, 0.73, 0.90],
    "shapes": [0.60, 0.70, 0.72, 0.68, 0.74, 0.74, 0.76, 0.76, 0.71, 0.75, 0.73, 0.80],
    "shift-a": [0.65, 0.50, 0.52, 0.48, 0.54, 0.54, 0.58, 0.58, 0.60, 0.62, 0.53, 0.57],
    "shift-b": [0.45, 0.30, 0.32, 0.28, 0.34, 0.34, 0.38, 0.38, 0.40, 0.42, 0.33, 0.37],
}
ROLES = {"held-out": "held-out", "shapes": "in-distribution", "shift-a": "shift", "shift-b": "shift"}
LABELS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")


def made(name: str, accuracies: list[float], count: int = 400, rows: tuple[Row, ...] = ROWS) -> Scores:
    """Exactly these accuracies: examples have a difficulty in common, and a row gets the easiest share right.

    Row i is sure of each of its answers by 0.9 - i / 100, has an NLL of 1 + i / 10 on each example, and the truth among
    its first five on the nine tenths that are the easiest, or on what it gets right where that is more.
    """
    difficulty = np.random.default_rng(len(name)).permutation(count)
    correct = np.stack([difficulty < round(a * count) for a in accuracies])
    truth = (np.arange(count) % len(LABELS)).astype(np.int32)
    prediction = np.where(correct, truth, (truth + 1) % len(LABELS)).astype(np.int32)
    number = np.arange(len(rows), dtype=np.float32)[:, None] * np.ones(count, np.float32)
    return Scores(
        name,
        ROLES[name],
        "d" * 64,
        rows,
        LABELS,
        truth,
        correct,
        correct | (difficulty < 0.9 * count),
        prediction,
        np.float32(0.9) - number / 100,
        1 + number / 10,
    )


def unbalanced(scores: Scores) -> Scores:
    """The same right and wrong, with the first label for half of the examples."""
    truth = np.where(np.arange(scores.truth.size) % 16 < 7, 0, scores.truth).astype(np.int32)
    prediction = np.where(scores.correct, truth, (truth + 1) % len(LABELS)).astype(np.int32)
    return dataclasses.replace(scores, truth=truth, prediction=prediction)


def without_shifts(results):
    return [s for s in results if s.role != "shift"]


@pytest.fixture(scope="module")
def results():
    return [made(name, accuracies) for name, accuracies in ACCURACY.items()]


def few(confidence, correct, correct5=None, truth=None, labels=("no", "yes")):
    """One row's scores on a handful of examples."""
    right = np.array([correct], bool)
    truth = np.array(truth if truth is not None else [0] * len(correct), np.int32)
    right5 = right if correct5 is None else np.array([correct5], bool)
    nll = np.arange(len(correct), dtype=np.float32)[None]
    return Scores(
        "few",
        "in-distribution",
        "d" * 64,
        ROWS[1:2],
        labels,
        truth,
        right,
        right5,
        np.where(right, truth, 1 - truth).astype(np.int32),
        np.array([confidence], np.float32),
        nll,
    )


@pytest.fixture(scope="module")
def comparison(results):
    return compare(results)


def test_wilsons_interval_as_published():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 gives 0.2553 to 0.3662.
    found = wilson(np.arange(263) < 81)
    np.testing.assert_allclose((found.value, found.low, found.high), (81 / 263, 0.2553, 0.3662), atol=5e-5)


def test_mcnemars_test_by_hand():
    # 6 against 1 discordant examples: p = 2 (C(7,0) + C(7,1)) / 2^7 = 0.125.
    first = np.array([True] * 6 + [False] + [True] * 3 + [False] * 2)
    second = np.array([False] * 6 + [True] + [True] * 3 + [False] * 2)
    assert mcnemar(first, second) == (6, 1, pytest.approx(0.125))
    assert mcnemar(second, first) == (1, 6, pytest.approx(0.125))
    assert mcnemar(first, first) == (0, 0, 1.0)


def line(comparison, start):
    return next(line for line in comparison.lines if line.name.startswith(start))


def test_means_and_differences_by_hand(comparison):
    stock = line(comparison, "model_stock of 2, mean of 2")
    assert stock.accuracy["shapes"].value == pytest.approx(0.76)
    assert stock.summary["in-distribution"] == stock.accuracy["shapes"]
    assert stock.summary["shifts"].value == pytest.approx(0.48)
    assert stock.over_seed["in-distribution"].value == pytest.approx(0.76 - 0.70)
    assert stock.over_seed["shifts"].value == pytest.approx(0.48 - 0.40)
    assert stock.over_uniform["in-distribution"].value == pytest.approx(0.02)
    assert stock.over_uniform["shifts"].value == pytest.approx(0.04)
    assert stock.over_uniform["shifts"].low <= 0.04 <= stock.over_uniform["shifts"].high
    assert stock.over_uniform["shifts"].low > 0
    assert stock.spread == {"in-distribution": pytest.approx(0), "shifts": pytest.approx(0)}
    seeds = line(comparison, "mean single seed")
    assert seeds.accuracy["shapes"].value == pytest.approx(0.70)
    assert seeds.spread == {"in-distribution": pytest.approx(0.02), "shifts": pytest.approx(0.02)}
    assert line(comparison, "zero-shot").summary["shifts"].value == pytest.approx(0.55)
    assert line(comparison, "uniform of 2").over_uniform == {}


def test_of_a_methods_options_the_one_best_on_the_held_out_cut_is_shown(comparison):
    assert line(comparison, "wise_ft").rows == ("wise_ft/0-1-2@0.6",)
    assert "wise_ft/0-1-2@0.3" in comparison.accuracy


def test_top5_and_nll_are_means_over_examples():
    found = metrics(few([0.5] * 4, [True, False, False, True], [True, True, False, True]), 0)
    assert found == {"top1": 0.5, "balanced_accuracy": 0.5, "top5": 0.75, "nll": 1.5, "ece": 0.0}


THREE = ("ant", "bee", "cat", "dog")  # of which none is a dog
TRUTH = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
FIRST = np.array([1, 1, 1, 1, 0, 1, 0, 0, 1, 0], bool)  # recalls 4/5, 1/3, 1/2
OTHER = np.array([1, 0, 1, 0, 0, 1, 1, 0, 1, 1], bool)  # recalls 2/5, 2/3, 1


def balanced(correct, truth=TRUTH, labels=THREE):
    return metrics(few([0.5] * len(truth), correct, truth=truth, labels=labels), 0)["balanced_accuracy"]


def balanced_difference(first, other, truth, clusters=None):
    """Of two rows that have no seeds in common with others, so over images alone."""
    return BalancedAccuracies(ROWS[:2], [np.stack([first, other])], [truth], clusters).paired([0], [1])


def test_balanced_accuracy_is_the_mean_of_the_recalls_of_the_labels_that_occur():
    assert balanced(FIRST) == pytest.approx((4 / 5 + 1 / 3 + 1 / 2) / 3)
    assert metrics(few([0.5] * 10, FIRST, truth=TRUTH, labels=THREE), 0)["top1"] == pytest.approx(6 / 10)


def test_balanced_accuracy_is_accuracy_where_labels_have_equally_many_examples():
    truth = np.arange(400) % 8
    for seed in range(5):
        correct = np.random.default_rng(seed).random(400) < 0.2 + 0.1 * truth
        assert balanced(correct, truth, LABELS) == pytest.approx(correct.mean(), abs=1e-14)


def test_balanced_accuracy_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    truth = random.choice(8, 500, p=np.arange(1, 9) / 36)
    prediction = np.where(random.random(500) < 0.1 * truth, truth, random.integers(0, 8, 500))
    expected = balanced_accuracy_score(truth, prediction)
    assert balanced(prediction == truth, truth, LABELS) == pytest.approx(expected)
    assert abs(expected - (prediction == truth).mean()) > 0.05


def test_the_variance_of_a_difference_in_balanced_accuracy_by_hand():
    # The differences are 0 1 0 1 0 of ant, 0 -1 0 of bee, 0 -1 of cat, with variances 3/10, 1/3 and 1/2.
    found = balanced_difference(FIRST, OTHER, TRUTH)
    assert found.value == pytest.approx((2 / 5 - 1 / 3 - 1 / 2) / 3)
    assert found.variance == pytest.approx((0.3 / 5 + 1 / 3 / 3 + 0.5 / 2) / 9)
    assert found.over == "images"


def test_with_classes_drawn_the_variance_of_balanced_accuracy_is_that_of_the_labels_recalls():
    found = balanced_difference(FIRST, OTHER, TRUTH, [TRUTH])
    recalls = np.array([2 / 5, -1 / 3, -1 / 2])
    assert found.value == pytest.approx(recalls.mean())
    assert found.variance == pytest.approx(recalls.var(ddof=1) / 3)


def test_what_every_image_of_a_label_does_alike_is_sure_whatever_the_labels_shares():
    truth = np.array([0] * 90 + [1] * 10)
    found = balanced_difference(truth < 2, truth == 0, truth)
    assert (found.value, found.variance) == (pytest.approx(0.5), pytest.approx(0, abs=1e-20))


def test_labels_of_a_single_image_are_together_or_with_the_next_rarest_for_one_has_no_variance():
    # "bee" and "cat" have one image each: weights 1/3, differences 1 and 0, as two images of one label of weight 2/3.
    truth = np.array([0, 0, 0, 0, 1, 2])
    first, other = np.array([1, 1, 0, 0, 1, 0], bool), np.array([1, 0, 0, 0, 0, 0], bool)
    found = balanced_difference(first, other, truth)
    assert found.value == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert found.variance == pytest.approx(0.25 / 4 / 9 + 0.5 / 2 * 4 / 9)
    # One alone is with "cat", of two: what they add to the difference is 1/3, 0 and 0, with the variance 1/27.
    found = balanced_difference(first[[0, 1, 2, 3, 4, 5, 5]], other[[0, 1, 2, 3, 4, 5, 5]], np.array([*truth, 2]))
    assert found.value == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert found.variance == pytest.approx(0.25 / 4 / 9 + 3 / 27)


def test_differences_in_balanced_accuracy_are_those_of_the_metric_and_over_what_those_in_accuracy_are(results):
    found = compare([unbalanced(scores) for scores in results])

    def mean(rows, benchmark):
        return np.mean([found.metrics[row][benchmark]["balanced_accuracy"] for row in rows])

    of = line(found, "model_stock of 2")
    seeds, twins = ("seed-0", "seed-1", "seed-2"), ("uniform/0-1", "uniform/1-2")
    for others, differences in ((seeds, of.balanced_over_seed), (twins, of.balanced_over_uniform)):
        gap = {b: mean(of.rows, b) - mean(others, b) for b in ("shapes", "shift-a", "shift-b")}
        assert differences["in-distribution"].value == pytest.approx(gap["shapes"])
        assert differences["shifts"].value == pytest.approx((gap["shift-a"] + gap["shift-b"]) / 2)
    for one in found.lines:
        assert {s: d.over for s, d in one.balanced_over_seed.items()} == {s: d.over for s, d in one.over_seed.items()}
        assert one.balanced_over_uniform.keys() == one.over_uniform.keys()
    # Holm's correction is over a family of its own.
    every = [d for one in found.lines for d in one.balanced_over_uniform.values()]
    least = min(every, key=lambda d: d.p)
    assert least.holm == pytest.approx(min(1, len(every) * least.p))


def test_where_labels_have_equal_shares_differences_in_balanced_accuracy_are_those_in_accuracy(comparison):
    for one in comparison.lines:
        for kind in ("over_seed", "over_uniform"):
            for summary, expected in getattr(one, kind).items():
                assert getattr(one, f"balanced_{kind}")[summary].value == pytest.approx(expected.value, abs=1e-12)


def test_calibration_error_by_hand_on_ten_examples():
    # Fifteen bins: 0.42 and 0.45 share the seventh, 0.4 to 0.4667; 0.62 and 0.65 the tenth, 0.6 to 0.6667; 0.8 to
    # 0.8667 is the thirteenth, and 0.95 and the like lie in the last.
    confidence = [0.42, 0.45, 0.62, 0.65, 0.81, 0.82, 0.85, 0.95, 0.96, 0.99]
    correct = [True, False, False, False, True, True, False, True, True, True]
    by_hand = (abs(1 - 0.87) + abs(0 - 1.27) + abs(2 - 2.48) + abs(3 - 2.90)) / 10
    assert by_hand == pytest.approx(0.198)
    assert metrics(few(confidence, correct), 0)["ece"] == pytest.approx(0.198, abs=1e-6)


def test_a_confidence_that_rounds_to_one_lies_in_the_last_bin_and_one_above_is_no_logit():
    # The last bin holds 0.95 right and 1 wrong: |1 - 1.95| / 2. Two bins of one would give (0.05 + 1) / 2.
    assert metrics(few([0.95, 1.0], [True, False]), 0)["ece"] == pytest.approx(0.475, abs=1e-6)
    above = np.nextafter(np.float32(1), np.float32(2))
    assert metrics(few([0.95, above], [True, False]), 0)["ece"] == pytest.approx(0.475, abs=1e-6)


def test_calibration_error_is_the_definitions_sum_over_bins():
    generator = np.random.default_rng(5)
    shares = generator.dirichlet([0.3] * 7, 500).astype(np.float32)
    truth = generator.integers(0, 7, 500)
    confidence, correct = shares.max(axis=1), shares.argmax(axis=1) == truth
    expected = 0.0
    for number in range(15):
        inside = (confidence >= number / 15) & ((confidence < (number + 1) / 15) | (number == 14))
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean(dtype=np.float64))
    assert metrics(few(confidence, correct), 0)["ece"] == pytest.approx(expected, abs=1e-12)
    assert expected > 0.1


def test_a_metric_is_one_row(results, monkeypatch, tmp_path):
    """A metric that no other file knows: it is in the comparison, in the report and in its tables."""
    low = Metric(
        name="low",
        title="least sure",
        measure=lambda scores, row: float(scores.confidence[row].min()),
        unit="percent",
        better="higher",
        about="the smallest confidence",
    )
    monkeypatch.setitem(METRICS, "low", low)
    found = compare(results)
    value = float(results[0].confidence[0].min())
    assert found.metrics["anchor"][results[0].benchmark]["low"] == value
    write_report(found, tmp_path, facts={})
    text = (tmp_path / "comparison.md").read_text()
    assert "least sure: the smallest confidence, in percent" in text
    assert "| shifts, least sure |" in text
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert quality["rows"]["anchor"][results[0].benchmark]["low"] == round(value, 6)


def test_accuracy_by_class_by_hand():
    scores = few([0.5] * 5, [True, False, True, True, False], truth=[0, 0, 0, 2, 2], labels=("ant", "bee", "cat"))
    np.testing.assert_allclose(per_class(scores), [[2 / 3, np.nan, 1 / 2]])


def test_every_row_has_every_metric_on_every_benchmark(results, comparison):
    found = comparison.metrics["seed-1"]
    assert set(found) == set(ACCURACY)
    assert found["shift-a"]["top1"] == pytest.approx(0.52)
    assert found["shift-a"]["top5"] == pytest.approx(0.9)
    assert found["shift-a"]["nll"] == pytest.approx(1.2)
    assert found["shift-a"]["ece"] == pytest.approx(0.88 - 0.52, abs=1e-6)
    classes = comparison.classes["shapes"]
    assert (classes.labels, classes.images) == (LABELS, (50,) * 8)
    truth, correct = results[1].truth, results[1].correct[2]
    assert classes.accuracy["seed-1"][3] == correct[truth == 3].mean()


def test_a_label_without_images_has_no_accuracy(results):
    wider = [dataclasses.replace(s, labels=(*LABELS, "yak")) for s in results]
    classes = compare(wider).classes["shapes"]
    assert classes.images[-1] == 0
    assert {shares[-1] for shares in classes.accuracy.values()} == {None}


def without_holm(estimates):
    """Holm's correction is over fewer differences where there are no shifts."""
    return {k: dataclasses.replace(v, holm=0.0) if isinstance(v, Difference) else v for k, v in estimates.items()}


def test_without_shifts_everything_about_them_is_absent_and_the_rest_is_as_with_them(results, comparison):
    alone = compare(without_shifts(results))
    assert alone.summaries == ("in-distribution",)
    assert comparison.summaries == ("in-distribution", "shifts")
    assert alone.shifts == ()
    assert alone.champion == comparison.champion
    for found, full in zip(alone.lines, comparison.lines, strict=True):
        assert found.name == full.name
        assert found.accuracy == {b: full.accuracy[b] for b in found.accuracy}
        for part in ("summary", "spread", "over_seed", "over_uniform", "balanced_over_seed", "balanced_over_uniform"):
            with_shifts = {k: v for k, v in getattr(full, part).items() if k == "in-distribution"}
            assert without_holm(getattr(found, part)) == without_holm(with_shifts), part
    test = alone.tests["uniform"]["model_stock/0-1"]
    assert set(test) == {"in-distribution"}
    # Two tests in the family where there were four: Holm's correction doubles the smaller p.
    assert test["in-distribution"].holm == pytest.approx(2 * 2 / 2**8)


def test_tests_are_against_the_uniform_soup_of_the_same_seeds_and_the_median_seed(comparison):
    assert comparison.median_seed == "seed-0"
    assert set(comparison.tests["uniform"]) == {"model_stock/0-1", "model_stock/1-2"}
    test = comparison.tests["uniform"]["model_stock/0-1"]["in-distribution"]
    assert (test.against, test.wins, test.losses) == ("uniform/0-1", 8, 0)
    assert test.p == pytest.approx(2 / 2**8)
    pooled = comparison.tests["uniform"]["model_stock/0-1"]["shifts"]
    assert (pooled.wins, pooled.losses) == (32, 0)
    assert {t["shifts"].against for t in comparison.tests["seed"].values()} == {"seed-0"}
    assert len(comparison.tests["seed"]) == 6


def test_holms_correction_by_hand(comparison):
    tests = [t for row in comparison.tests["uniform"].values() for t in row.values()]
    ranked = sorted(tests, key=lambda t: t.p)
    expected, running = [], 0.0
    for rank, test in enumerate(ranked):
        running = max(running, min(1.0, (len(ranked) - rank) * test.p))
        expected.append(running)
    np.testing.assert_allclose([t.holm for t in ranked], expected)


def test_holms_correction_is_that_of_statsmodels_with_ties_and_of_nothing_nothing():
    for seed in range(20):
        p = np.random.default_rng(seed).random(9).round(1) / 3
        np.testing.assert_array_equal(holm(p), multipletests(p, method="holm")[1])
    assert holm([]) == []


def test_the_same_results_give_the_same_comparison(results, comparison):
    assert compare(results) == comparison


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[1:], "0 benchmarks with the role held-out"),
        (lambda r: [r[0], *r[2:]], "0 benchmarks with the role in-distribution"),
        (lambda r: [*r, r[1]], "2 benchmarks with the role in-distribution"),
        (
            lambda r: [*r[:3], dataclasses.replace(r[3], rows=ROWS[:-1])],
            "shift-b: got rows that differ: ensemble/0-1-2",
        ),
        (lambda r: [*r, dataclasses.replace(r[3], role="none")], "shift-b: got the role none; expected held-out or"),
        (lambda r: [*r, r[3]], "2 files that are of shift-b; expected one per benchmark"),
        (lambda r: [dataclasses.replace(s, rows=(ROWS[0], *ROWS[:-1])) for s in r], "2 rows named anchor"),
        (lambda r: [dataclasses.replace(s, rows=ROWS[:1], correct=s.correct[:1]) for s in r], "no row of kind seed"),
        (
            lambda r: [*r[:3], dataclasses.replace(r[3], nll=np.where(r[3].truth == 2, math.inf, r[3].nll))],
            "shift-b, row anchor: got nll that is NaN or infinite",
        ),
    ],
)
def test_results_that_cannot_be_compared_are_refused(results, change, message):
    with pytest.raises(DataError, match=message):
        compare(change(results))
