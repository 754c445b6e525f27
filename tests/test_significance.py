"""`modelstock significance` on files as people have them, and the variance that it rests on by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.comparison.crossed import Crossed, Sample, Subsets, crossed
from modelstock.comparison.differences import chance, difference, holm, shift_at
from modelstock.comparison.intervals import Accuracies, share, wilson
from modelstock.comparison.metrics import metrics
from modelstock.errors import ModelstockError
from modelstock.scoring.results import Row, load_scores, save_scores
from tests.test_comparison import ACCURACY, ROWS, made, unbalanced

RING = Subsets(tuple((seed, (seed + 1) % 8) for seed in range(8)))
SINGLE = Subsets(tuple((seed,) for seed in range(8)))


def moments(**change: object) -> Crossed:
    usual = {
        "value": 0.02,
        "variance": 0.01**2,
        "freedom": 7.0,
        "over": "seeds and images",
        "shortage": "",
        "spread": 0.02**2,
        "spread_freedom": 7.0,
        "seeds": 0.02**2 / 8,
        "draws": 8.0,
    }
    return Crossed(**{**usual, **change})


def test_single_seeds_have_the_usual_variance_and_degrees_of_freedom():
    assert (SINGLE.share, SINGLE.trace, SINGLE.freedom) == pytest.approx((1 / 8, 7, 7))


def test_pairs_of_neighbours_count_as_half_as_many_by_hand():
    # Each of 8 pairs has half its members in common with 2 others: (1 + 2 / 2) / 8. The trace is 8 - 8 / 4.
    assert (RING.share, RING.trace) == pytest.approx((1 / 4, 6))
    # The eigenvalues are 1 + cos(2 pi k / 8): 6^2 over the sum of their squares, which is 8.
    assert RING.freedom == pytest.approx(4.5)
    disjoint = Subsets(((0, 1), (2, 3), (4, 5), (6, 7)))
    assert (disjoint.share, disjoint.trace, disjoint.freedom) == pytest.approx((1 / 4, 3, 3))


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (((0,), (1,)), "not enough seeds (2 of 3)"),
        (((0,), (1,), (2,)), ""),
        (((0, 1, 2, 3), (4, 5, 6, 7)), "not enough seeds (8 of 12)"),
        ((tuple(range(8)),), "not enough seeds (8 of 24)"),
        (((0, 1), (1, 2), (2, 3), (3, 4), (0, 4)), "not enough seeds (5 of 6)"),
        (tuple((0, other) for other in range(1, 8)), "not enough seeds (3 of 6)"),  # seed 0 is in all of them
        (((),), "not enough seeds (0 of 3)"),
    ],
)
def test_fewer_than_three_separate_subsets_are_not_enough_seeds(members, text):
    assert Subsets(members).shortage == text


def test_the_variance_of_pairs_is_unbiased_where_pairs_are_sums_of_their_seeds():
    random, found, means = np.random.default_rng(0), [], []
    for _ in range(2000):
        brought = random.standard_normal(8)
        rows = np.array([brought[list(pair)].mean() for pair in RING.members])
        sample = crossed([Sample(RING, (np.repeat(rows[:, None], 2, axis=1),))])
        found.append(sample.seeds)
        means.append(sample.value)
    assert np.mean(found) == pytest.approx(1 / 8, rel=0.05)  # the mean of 8 pairs is that of the 8 seeds
    assert np.var(means) == pytest.approx(1 / 8, rel=0.1)


def test_crossed_variance_by_hand():
    # Rows 1 0 1 1, 1 1 0 1 and 0 0 0 1 on four images: means 3/4, 3/4, 1/4 and by image 2/3, 1/3, 1/3, 1.
    values = np.array([[1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 0, 1]], float)
    three = Subsets(((0,), (1,), (2,)))
    found = crossed([Sample(three, (values,))])
    images = np.var([2 / 3, 1 / 3, 1 / 3, 1], ddof=1) / 4
    spread = np.var([3 / 4, 3 / 4, 1 / 4], ddof=1)
    residual = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    interaction = (residual**2).sum() / (2 * 3) / (3 * 4)
    assert (found.value, found.spread, found.seeds) == pytest.approx((7 / 12, spread, spread / 3))
    assert found.variance == pytest.approx(images + max(0, spread / 3 - interaction))
    alone = crossed([Sample(Subsets(((0, 1, 2),)), (values.mean(axis=0, keepdims=True),))])
    assert (alone.variance, alone.freedom, alone.over) == (pytest.approx(images), 3, "images")


def test_a_class_of_one_image_each_is_an_image_and_classes_of_copies_count_once():
    random = np.random.default_rng(1)
    values = (random.random((8, 60)) < 0.7).astype(float)
    by_image, by_class = (crossed([Sample(SINGLE, (values,))], groups) for groups in (None, [np.arange(60)]))
    assert (by_class.variance, by_class.freedom) == pytest.approx((by_image.variance, by_image.freedom))
    copies = crossed([Sample(SINGLE, (np.repeat(values, 5, axis=1),))], [np.repeat(np.arange(60), 5)])
    assert (copies.variance, copies.freedom) == pytest.approx((by_image.variance, by_image.freedom))
    assert copies.over == "seeds and classes"


def test_test_sets_are_drawn_on_their_own_and_seeds_for_all_of_them():
    one = np.array([[0.0, 1.0]] * 8) + np.arange(8)[:, None]
    single, twice = crossed([Sample(SINGLE, (one,))]), crossed([Sample(SINGLE, (one, one))])
    assert twice.seeds == pytest.approx(single.seeds)
    assert twice.variance - twice.seeds == pytest.approx((single.variance - single.seeds) / 2)


def test_what_both_sides_have_in_common_cancels():
    random = np.random.default_rng(2)
    seeds = random.random((8, 300)) < 0.7
    rows = [Row(f"seed-{i}", "", "seed", (i,), {}) for i in range(8)] + [
        Row(f"m/{i}", "", "m", (i,), {}) for i in range(8)
    ]
    same = Accuracies(rows, [np.concatenate([seeds, seeds])])
    for found in (same.paired(range(8, 16), range(8)), same.over_members(range(8, 16), range(8))):
        assert (found.value, found.variance) == (0, 0)


def test_over_seeds_that_are_not_in_equally_many_rows_the_interval_is_over_images():
    accuracies = Accuracies(ROWS, [made("shapes", ACCURACY["shapes"]).correct])
    found = accuracies.over_members([6, 7], [1, 2, 3])  # model_stock of 0-1 and of 1-2
    assert found.value == pytest.approx(0.76 - 0.70)
    assert found.over == "images"


def test_a_share_of_one_row_has_wilsons_interval_but_for_one_image():
    right = np.arange(1000) < 700
    ours = share(crossed([Sample(Subsets(((),)), (right[None].astype(float),))]), 1000)
    theirs = wilson(right)
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), atol=1e-4)
    for every in (np.ones((3, 50)), np.zeros((3, 50))):
        found = share(crossed([Sample(Subsets(((0,), (1,), (2,))), (every,))]), 50)
        assert 0 <= found.low < found.high <= 1
        assert found.value in (found.low, found.high)


def test_a_difference_by_hand():
    # Standard error 1 point, 7 degrees of freedom: t is 2.3646 at 97.5 % and 0.8960 at 80 %.
    found = difference(moments(), margin=0.005)
    assert (found.low, found.high) == pytest.approx((0.02 - 0.023646, 0.02 + 0.023646), abs=1e-6)
    assert found.detectable == pytest.approx(0.023646 + 0.008960, abs=1e-6)
    assert found.p == pytest.approx(2 * stats.t.sf(2, 7))
    assert (found.no_worse, found.equivalent) == ("yes", "undecided")


@pytest.mark.parametrize(
    ("value", "no_worse", "equivalent"),
    [(0.1, "yes", "no"), (0.0, "undecided", "undecided"), (-0.1, "no", "no"), (-0.015, "undecided", "undecided")],
)
def test_no_worse_and_equivalent_are_by_where_the_interval_ends(value, no_worse, equivalent):
    found = difference(moments(value=value), margin=0.02)
    assert (found.no_worse, found.equivalent) == (no_worse, equivalent)
    assert difference(moments(value=0.0), margin=0.03).equivalent == "yes"


def test_holms_correction_of_differences_by_hand():
    family = [difference(moments(value=value), margin=0) for value in (0.01, 0.03, 0.05)]
    p = [one.p for one in family]
    assert [one.holm for one in holm(family)] == pytest.approx([p[0], max(2 * p[1], 3 * p[2]), 3 * p[2]])
    assert holm([]) == []


def test_non_centrality_is_scipys_where_scipy_has_it():
    for t, freedom in ((2.0, 4.5), (-1.0, 2.0), (0.0, 7.0)):
        for p in (0.025, 0.975):
            assert stats.nct.cdf(t, freedom, shift_at(t, freedom, p)) == pytest.approx(p, abs=5e-4)


def test_the_chance_of_beating_is_one_half_without_a_difference_and_turns_with_its_sign():
    assert chance(moments(value=0.0)).value == pytest.approx(0.5)
    one, other = chance(moments(value=0.01)), chance(moments(value=-0.01))
    assert (one.value, one.low, one.high) == pytest.approx((1 - other.value, 1 - other.high, 1 - other.low), abs=1e-6)
    far = chance(moments(value=10.0))
    assert far.low > 0.999
    # All of 8 draws alike: Clopper and Pearson's lower end of 8 in 8 is 0.025^(1/8).
    alike = chance(moments(spread=0.0, seeds=0.0))
    assert (alike.value, alike.low, alike.high) == (1, pytest.approx(0.6306, abs=1e-4), 1)
    assert difference(moments(shortage="not enough seeds (2 of 3)"), margin=0).beats == "not enough seeds (2 of 3)"


# The command.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four seeds of A and of B on 300 examples: JSON lines as an evaluation harness writes them, CSV, and results."""
    random = np.random.default_rng(3)
    ease = random.normal(0.7, 1, 300)
    for side, more in (("a", 0.3), ("b", 0.0)):
        for seed in range(4):
            right = ease + more + random.normal(0, 0.5, 300) > 0
            jsonl = [
                json.dumps({"doc_id": i, "acc": float(x), "subject": f"s{i % 20}", "filter": "none"})
                for i, x in enumerate(right)
            ]
            (tmp_path / f"{side}{seed}.jsonl").write_text("\n".join(jsonl) + "\n")
            with open(tmp_path / f"{side}{seed}.csv", "w", newline="") as file:
                table = csv.writer(file)
                table.writerow(["id", "prediction", "label", "seed"])
                table.writerows([i, f"{float(x)}", 1, seed] for i, x in reversed(list(enumerate(right))))
    save_scores(tmp_path / "shapes.safetensors", made("shapes", ACCURACY["shapes"]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: object) -> str:
    done = CliRunner().invoke(app, ["significance", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def found(*words: object) -> dict:
    return json.loads(call(*words, "--json"))


def refused(*words: object) -> str:
    with pytest.raises(ModelstockError) as caught:
        CliRunner().invoke(app, ["significance", *map(str, words)], catch_exceptions=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_files_of_a_harness(folder):
    one, other = ([json.loads(line)["acc"] for line in (folder / f"{s}0.jsonl").open()] for s in "ab")
    shown = found("a0.jsonl", "b0.jsonl")
    assert (shown["a"]["value"], shown["b"]["value"]) == pytest.approx((np.mean(one), np.mean(other)))
    gap = np.subtract(one, other)
    assert shown["difference"]["value"] == pytest.approx(gap.mean())
    half = stats.t.ppf(0.975, 299) * gap.std(ddof=1) / np.sqrt(300)
    assert shown["difference"]["high"] == pytest.approx(gap.mean() + half)
    assert shown["difference"]["beats"] == "not enough seeds (1 of 3)"
    assert shown["difference"]["over"] == "examples"
    assert shown["wins"] - shown["losses"] == gap.sum()
    text = call("a0.jsonl", "b0.jsonl").splitlines()
    assert text[0].startswith(f"A: {100 * np.mean(one):.2f} [")
    assert text[-1].startswith("A is better than B by")


def test_formats_agree_and_the_order_of_lines_does_not_matter(folder):
    lists = [",".join(f"{side}{seed}.jsonl" for seed in range(4)) for side in "ab"]
    options = [word for side in "ab" for seed in range(4) for word in (f"--{side}", f"{side}{seed}.csv")]
    unrelated, paired = found(*lists), found(*options)
    assert (unrelated["seeds"], paired["seeds"]) == ("unrelated", "paired")
    for key in ("a", "b"):
        assert unrelated[key] == pytest.approx(paired[key])
        assert unrelated[key]["over"] == "seeds and examples"
    assert unrelated["difference"]["value"] == pytest.approx(paired["difference"]["value"])
    assert 0.5 < unrelated["difference"]["beats"]["value"] <= 1
    assert unrelated["mcnemar"] is None


def test_rows_of_our_results_by_name_kind_and_pattern(folder):
    shown = found("shapes.safetensors", "--row-a", "model_stock", "--row-b", "uniform")
    assert (shown["difference"]["value"], shown["seeds"], shown["rows_a"]) == (pytest.approx(0.02), "paired", 2)
    shown = found("shapes.safetensors", "--row-a", "model_stock/0-1", "--row-b", "seed-?", "--by-class", "label")
    assert shown["difference"]["value"] == pytest.approx(0.06)
    assert shown["difference"]["over"] == "classes"
    turned = found("shapes.safetensors", "--row-a", "seed", "--row-b", "model_stock")
    assert turned["difference"]["value"] == pytest.approx(-0.06)


def test_balanced_accuracies_where_labels_are_known(folder):
    assert found("a0.jsonl", "b0.jsonl")["balanced"] is None
    same = ("shapes.safetensors", "--row-a", "model_stock", "--row-b", "uniform")
    assert found(*same)["balanced"]["difference"]["value"] == pytest.approx(0.02)
    assert "balanced" not in call(*same)
    save_scores(folder / "shapes.safetensors", unbalanced(made("shapes", ACCURACY["shapes"])))
    for a, b, seeds in (("model_stock", "uniform", "paired"), ("seed", "greedy", "unrelated")):
        shown = found("shapes.safetensors", "--row-a", a, "--row-b", b)
        scores = load_scores(folder / "shapes.safetensors")
        one, other = (
            np.mean([metrics(scores, place)["balanced_accuracy"] for place, row in enumerate(ROWS) if row.kind == kind])
            for kind in (a, b)
        )
        assert (shown["balanced"]["a"], shown["balanced"]["b"]) == pytest.approx((one, other))
        assert shown["balanced"]["difference"]["value"] == pytest.approx(one - other)
        assert shown["seeds"] == seeds
        text = call("shapes.safetensors", "--row-a", a, "--row-b", b)
        assert (
            f"balanced accuracy: A {100 * one:.2f} %, B {100 * other:.2f} %, A - B: {100 * (one - other):+.2f} ["
            in text
        )


def test_classes_of_a_column_are_drawn_together(folder):
    shown = found("a0.jsonl", "b0.jsonl", "--by-class", "subject")
    assert shown["difference"]["over"] == shown["a"]["over"] == "classes"


def test_a_margin_is_in_points(folder):
    assert found("a0.jsonl", "b0.jsonl", "--margin", 50)["difference"]["equivalent"] == "yes"
    assert "A no worse than B by 50 points: yes; equivalent within 50 points: yes" in call(
        "a0.jsonl", "b0.jsonl", "--margin", 50
    )


LINES = {
    "bad json": ('{"id": 1, "correct": 1}\n{"id": 2, ', "x.jsonl:2: got no JSON"),
    "a list": ("[1, 2]\n", "x.jsonl:1: got a list; expected an object per line"),
    "no id": ('{"key": 1, "correct": 1}\n', "x.jsonl:1: got no column id (key, correct)"),
    "nearly": ('{"id": 1, "corect": 1}\n', "x.jsonl:1: got columns id, corect; expected correct"),
    "text": ('{"id": 1, "correct": "maybe"}\n', "x.jsonl:1: got correct 'maybe'; expected 0, 1, true or false"),
    "half": ('{"id": 1, "correct": 0.5}\n', "x.jsonl:1: got correct '0.5'"),
    "nan": ('{"id": 1, "correct": NaN}\n', "x.jsonl:1: got correct 'nan'"),
    "null": ('{"id": null, "correct": 1}\n', "x.jsonl:1: got id that is empty"),
    "two": ('{"id": 1, "acc": 1, "exact_match": 0}\n', "got columns acc and exact_match; expected one of them"),
    "twice": ('{"id": 1, "correct": 1}\n{"id": 1, "correct": 0}\n', "x.jsonl:2: got id 1 again (x.jsonl:1)"),
    "later": ('{"id": 1, "correct": 1}\n{"id": 2}\n', "x.jsonl:2: got no column correct (id)"),
    "empty": ("", "x.jsonl: got no example; expected one or more"),
    "few": ('{"id": 1, "correct": 1}\n', "a0.jsonl: got 299 of 300 ids that x.jsonl lacks (0, 10, 100 and 296 more)"),
}


@pytest.mark.parametrize("name", LINES)
def test_what_cannot_be_compared_is_one_line_with_place_and_cure(folder, name):
    text, message = LINES[name]
    (folder / "x.jsonl").write_text(text)
    assert message in refused("a0.jsonl", "x.jsonl")


def test_more_that_is_refused(folder):
    assert "did you mean subject?" in refused("a0.jsonl", "b0.jsonl", "--by-class", "subjet")
    assert "SCORES_B: got" in refused("shapes.safetensors", "shapes.safetensors")
    assert "got rows of 2, 3 seeds" in refused(
        "shapes.safetensors", "--row-a", "model_stock/0-1", "--row-a", "ensemble", "--row-b", "seed-0"
    )
    assert "did you mean model_stock?" in refused("shapes.safetensors", "--row-a", "model_stok", "--row-b", "uniform")
    assert "12 rows and no choice" in refused("shapes.safetensors", "a0.jsonl")
    assert "no such file" in refused("a0.jsonl", "missing.jsonl")
    assert "each file once" in refused("--a", "a0.jsonl", "--a", "a0.jsonl", "--b", "b0.jsonl")
    assert "got no example with filter=strict" in refused("a0.jsonl", "b0.jsonl", "--where", "filter=strict")
    assert found("a0.jsonl", "b0.jsonl", "--where", "filter=none")["examples"] == 300
    assert "SCORES_A: got no file" in refused()
    (folder / "labels.csv").write_text("id,correct,label\n" + "".join(f"{i},1,2\n" for i in range(300)))
    assert "300 examples with another label than in labels.csv (299: 1 and 2)" in refused("a0.csv", "labels.csv")
    (folder / "ragged.csv").write_text("id,correct\n1,1\n2\n")
    assert "ragged.csv:3: got another number of cells than columns" in refused("a0.jsonl", "ragged.csv")


def test_the_command_imports_neither_torch_nor_a_towers_library():
    code = (
        "import sys; from modelstock.cli import main; import modelstock.significance; "
        "print(sorted({'torch', 'PIL', 'open_clip', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
