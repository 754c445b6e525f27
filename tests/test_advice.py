"""What a comparison says in words, each sentence on a small comparison that is made for it."""

import dataclasses
import re

import pytest

from modelstock.comparison.advice import advice, rule_in_words
from modelstock.comparison.compare import compare
from modelstock.comparison.differences import Difference
from modelstock.comparison.report import as_markdown, summary_lines
from modelstock.params import ChampionParams
from tests.test_choice import ANCHOR, DISTANCES, LEFT, NEAREST, RIGHT, SEED, half, scores, with_shift
from tests.test_choice import results as small
from tests.test_comparison import ACCURACY, ROWS, made, without_shifts


def paragraphs(comparison):
    """Known, not known, advised."""
    parts = re.fullmatch(r"\*\*Known:\*\* (.*)\n\n\*\*Not known:\*\* (.*)\n\n\*\*Advised:\*\* (.*)", advice(comparison))
    assert parts, advice(comparison)
    return parts.groups()


def compared(rows=ROWS, **changes):
    """The made-up comparison with other accuracies of some rows on some benchmarks: row=(held-out, shapes, shifts)."""
    columns = {name: dict(zip([row.name for row in ROWS], values, strict=True)) for name, values in ACCURACY.items()}
    for name, values in changes.items():
        columns["held-out"][name], columns["shapes"][name], columns["shift-a"][name], columns["shift-b"][name] = values
    return [made(name, [column[row.name] for row in rows], rows=rows) for name, column in columns.items()]


def test_what_is_known_has_its_interval_and_lines_that_agree_are_one_clause():
    comparison = compare(compared())
    known, unknown, _ = paragraphs(comparison)
    first, second = known.rstrip(".").split("; ")
    assert first == (
        "all 4 kinds of merges beat the mean single seed in distribution (by +3.0 to +6.0 points, over images alone) "
        "and on the shifts (by +3.0 to +12.0 points, over images alone)"
    )
    stock = next(line for line in comparison.lines if line.key == "model_stock")
    inside, shifts = (stock.over_uniform[summary] for summary in comparison.summaries)
    assert second == (
        "model_stock of 2 beats the uniform soup of the same seeds in distribution "
        f"(+2.0 [{100 * inside.low:+.1f}, {100 * inside.high:+.1f}] points, over images alone) and on the shifts "
        f"(+4.0 [{100 * shifts.low:+.1f}, {100 * shifts.high:+.1f}] points, over images alone)"
    )
    assert unknown == "nothing: every difference has a p below 0.05 (Holm)."


def test_what_is_not_known_says_what_would_have_been_found():
    same = {"model_stock/0-1": (0.78, 0.7425, 0.58, 0.38), "model_stock/1-2": (0.76, 0.74, 0.58, 0.38)}
    comparison = compare(compared(**same))
    known, unknown, _ = paragraphs(comparison)
    inside = next(line for line in comparison.lines if line.key == "model_stock").over_uniform["in-distribution"]
    assert inside.low <= 0 <= inside.high
    assert inside.no_worse == "yes"
    assert unknown == (
        "whether model_stock of 2 differs from the uniform soup of the same seeds in distribution "
        f"(+0.1 [{100 * inside.low:+.1f}, {100 * inside.high:+.1f}] points, over images alone; no worse than 0.5 "
        f"points; this experiment finds {100 * inside.detectable:.1f} points four times in five)."
    )
    assert "model_stock of 2 beats the uniform soup of the same seeds on the shifts" in known


def test_what_is_worse_is_known_to_be():
    worse = {"model_stock/0-1": (0.78, 0.6, 0.4, 0.2), "model_stock/1-2": (0.76, 0.6, 0.4, 0.2)}
    known, _, _ = paragraphs(compare(compared(**worse)))
    assert "model_stock of 2 is worse than the mean single seed in distribution (-10.0 [" in known
    assert "greedy of 2, uniform of 2, wise_ft of 3 beat the mean single seed in distribution (by +3.0 to" in known


def test_where_nothing_differs_nothing_is_known():
    level = {row.name: (0.7, 0.7, 0.5, 0.3) for row in ROWS}
    known, unknown, advised = paragraphs(compare(compared(**level)))
    assert known == "nothing: no difference has a p below 0.05 (Holm)."
    assert unknown.startswith("whether greedy of 2, model_stock of 2, uniform of 2 and 1 more differ from the mean ")
    assert advised.startswith("ship **anchor**: the best on held-out, though 10 others are not worse by more than one ")


def test_without_merges_nothing_was_compared():
    rows = tuple(row for row in ROWS if row.kind in ("anchor", "seed"))
    known, unknown, advised = paragraphs(compare(compared(rows)))
    assert known == "nothing, for no merge was compared."
    assert unknown == "nothing, for no merge was compared."
    assert advised.startswith("ship **seed-1**")


def test_without_shifts_they_are_not_spoken_of():
    text = advice(compare(without_shifts(compared())))
    assert "shift" not in text
    assert "beat the mean single seed in distribution (by +3.0 to +6.0 points, over images alone);" in text


def test_one_method_alone_is_compared_with_the_seeds():
    rows = tuple(row for row in ROWS if row.kind in ("anchor", "seed", "uniform"))
    comparison = compare(compared(rows))
    known, unknown, _ = paragraphs(comparison)
    over = next(line for line in comparison.lines if line.key == "uniform").over_seed["in-distribution"]
    interval = f"[{100 * over.low:+.1f}, {100 * over.high:+.1f}]"
    assert known.startswith(
        f"uniform of 2 beats the mean single seed in distribution (+4.0 {interval} points, over images "
    )
    assert "uniform soup" not in known + unknown


def test_the_advice_of_the_nearest_says_by_how_much_it_is_worse_than_the_best():
    comparison = compare(small(), champion=NEAREST, distances={**DISTANCES, RIGHT.name: 0.5})
    *_, advised = paragraphs(comparison)
    assert advised.startswith(
        "ship **uniform/0-2**: 3.00 points worse than the best on held-out (uniform/0-1), which is within the margin "
        "(one standard error of their paired difference, 3.61 points), and the nearest to the anchor of the 2 weight "
        "sets that are. The test sets, which nothing was chosen on, give it 53.0 ± "
    )
    assert advised.endswith("Training it takes 2 seeds.")


@pytest.mark.parametrize(
    ("settings", "distances", "start"),
    [
        ({}, DISTANCES, "the best on held-out and the nearest to the anchor of the 2 within the margin"),
        ({"margin": 0.0}, DISTANCES, "the best on held-out, with no other within the margin"),
        (
            {"margin": 0.03},
            {**DISTANCES, RIGHT.name: 0.5},
            "3.00 points worse than the best on held-out (uniform/0-1), which is within the margin (3 points)",
        ),
        ({"rule": "best"}, None, "the best on held-out, though one other is not worse by more than one standard error"),
        ({"rule": "best", "margin": 0.0}, None, "the best on held-out. The test sets"),
    ],
)
def test_the_advice_by_rule_and_margin(settings, distances, start):
    comparison = compare(small(), champion=ChampionParams(**settings), distances=distances)
    assert paragraphs(comparison)[2].partition(": ")[2].startswith(start)


def test_an_anchor_that_is_chosen_is_named_as_what_it_is():
    close = [[*half(72), *half(6, 80)], half(70), half(80), half(60)]
    comparison = compare(small(close), champion=NEAREST, distances=DISTANCES)
    *_, advised = paragraphs(comparison)
    assert "sets that are; it is the anchor: nothing fine-tuned is measurably better there." in advised
    assert advised.endswith("Training it takes nothing.")


def test_the_rule_in_words():
    nearest = compare(small(), champion=NEAREST, distances=DISTANCES).choice
    assert rule_in_words(nearest).startswith(
        "The rule is `nearest`, by accuracy on held-out: of those that are not worse than the best, uniform/0-1, by "
        "more than one standard error of the paired difference, the one nearest to the anchor: 2 of 4 weight sets. "
        "Paired: "
    )
    best = compare(with_shift(), champion=ChampionParams(rule="best", margin=0.005)).choice
    assert rule_in_words(best).startswith(
        "The rule is `best`, by the mean accuracy on held-out and blurred, equally weighted: the best. 1 of 4 weight "
        "sets are not worse than the best, seed-0, by more than 0.5 points. Rows with"
    )


def test_the_report_begins_with_it_and_the_terminal_ends_with_it():
    comparison = compare(compared())
    text = advice(comparison)
    assert as_markdown(comparison, {}, {}).startswith(f"# Comparison of merges\n\n{text}\n\n")
    shown = " ".join(summary_lines(comparison).split())
    assert shown.endswith(" ".join(text.replace("**", "").split()))


def with_differences(difference):
    comparison = compare(compared())
    lines = tuple(
        dataclasses.replace(line, over_uniform=dict.fromkeys(line.over_uniform, difference))
        for line in comparison.lines
    )
    return dataclasses.replace(comparison, lines=lines)


def test_it_uses_whatever_difference_a_line_has():
    wide = Difference(0.02, -0.01, 0.05, "seeds and images", detectable=0.043, no_worse="undecided", p=0.2, holm=0.4)
    known, unknown, _ = paragraphs(with_differences(wide))
    assert "uniform soup" not in known
    assert (
        "whether model_stock of 2 differs from the uniform soup of the same seeds in distribution (+2.0 [-1.0, +5.0] "
        "points; this experiment finds 4.3 points four times in five) and on the shifts (+2.0 ["
    ) in unknown


def test_what_many_lines_would_give_by_chance_is_not_known():
    """An interval without 0, whose p is above 0.05 after Holm's correction."""
    lucky = Difference(0.02, 0.001, 0.039, "seeds and images", detectable=0.03, no_worse="yes", p=0.04, holm=0.3)
    known, unknown, _ = paragraphs(with_differences(lucky))
    assert "uniform soup" not in known
    assert "(+2.0 [+0.1, +3.9] points; no worse than 0.5 points; this experiment finds 3.0 points" in unknown


def test_shifts_that_were_chosen_on_are_named_in_the_advice():
    *_, advised = paragraphs(compare(with_shift(), champion=NEAREST, distances=DISTANCES))
    assert advised.startswith("ship **seed-0**: the best on held-out and blurred, with no other within the margin")


def test_a_comparison_of_the_anchor_and_a_seed_alone():
    rows = (ANCHOR, SEED)
    parts = [
        scores("held-out", "held-out", [half(40), half(80)], rows),
        scores("shapes", "in-distribution", [half(40), half(80)], rows),
    ]
    *_, advised = paragraphs(compare(parts, champion=NEAREST, distances=DISTANCES))
    assert advised.endswith("in distribution, over images. Training it takes one seed.")
    assert LEFT.name not in advised
