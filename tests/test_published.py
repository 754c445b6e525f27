"""Published figures: what the table says, for which weights and which sets it is said, and what stands beside it."""

import dataclasses

import pytest

from modelstock.comparison.published import MEAN, SHIFTS, Ours, matching, side_by_side
from modelstock.comparison.published import _table as table

B32 = {"name": "ViT-B-32-quickgelu", "pretrained": "openai"}
ALL = ("held-out", "imagenet", *SHIFTS)


def test_the_table_is_whole_and_its_zero_shot_means_are_those_of_their_five_shifts():
    rows = table()["rows"]
    assert {row["backbone"] for row in rows} == set(table()["backbones"])
    for row in rows:
        assert row["source"]
        assert set(row["accuracy"]) <= {"imagenet", *SHIFTS}
        shifts = [row["accuracy"][s] for s in SHIFTS if s in row["accuracy"]]
        if shifts:
            # A mean is over the sets that the row names, and over five only where it does not say otherwise.
            assert len(shifts) == row.get("mean_over", 5)
            assert sum(shifts) / len(shifts) == pytest.approx(row["mean"], abs=0.06)


@pytest.mark.parametrize(
    ("name", "zero_shot", "stock"),
    [
        ("ViT-B-32", (63.3, 48.7), (81.19, 48.69)),
        ("ViT-B-16", (68.3, 58.6), (85.2, 60.1)),
        ("ViT-L-14", (75.5, 71.4), (87.7, 73.5)),
    ],
)
def test_the_papers_figures_belong_to_openais_weights(name, zero_shot, stock):
    rows = {r.row: r for r in matching({"name": f"{name}-quickgelu", "pretrained": "openai"}, ALL)}
    for row, expected in (("zero-shot", zero_shot), ("Model Stock of 2", stock)):
        assert (rows[row].accuracy["imagenet"], rows[row].shift_mean) == expected


@pytest.mark.parametrize(
    ("backbone", "known"),
    [
        (B32, True),
        ({**B32, "pretrained": "somewhere/ViT-B-32.pt"}, True),
        ({**B32, "pretrained": "hub/models--timm--vit_base_patch32_clip_224.openai/snapshots/1/open_clip.bin"}, True),
        ({**B32, "pretrained": "laion400m_e32"}, False),
        ({**B32, "pretrained": "random"}, False),
        # Without QuickGELU the same weights score less.
        ({"name": "ViT-B-32", "pretrained": "openai"}, False),
        ({"name": "tiny", "pretrained": "shapes"}, False),
        (None, False),
    ],
)
def test_figures_are_for_the_weights_they_were_measured_on(backbone, known):
    assert bool(matching(backbone, ALL)) is known


def test_a_mean_of_shifts_stands_only_beside_a_mean_of_the_same_five():
    assert all(r.shift_mean is None for r in matching(B32, ALL[:-1]))
    assert all(r.shift_mean is None for r in matching(B32, (*ALL, "imagenet-c")))
    b16 = {r.row: r for r in matching({"name": "ViT-B-16-quickgelu", "pretrained": "openai"}, ALL)}
    four = b16["Model Stock of 2 in Lipsum-FT's protocol"]
    assert four.shift_mean is None
    assert four.accuracy["imagenet-v2"] == 74.83


def test_rows_are_cut_down_to_the_sets_that_were_scored():
    (only,) = matching(B32, ("objectnet",))
    assert (only.row, only.accuracy) == ("zero-shot", {"objectnet": 44.3})


def test_ours_stands_beside_with_gap_and_interval():
    lines = [
        Ours(key=key, size=size, name=name, figures=figures)
        for key, size, name, figures in (
            ("anchor", 0, "zero-shot anchor", {"imagenet": (63.0, 62.6, 63.4), MEAN: (49.9, 49.5, 50.3)}),
            ("mean-seed", 1, "mean single seed", {"imagenet": (78.0, 77.6, 78.4)}),
            ("best-seed", 1, "best single seed on held-out (seed-1)", {"imagenet": (80.0, 79.0, 81.0)}),
            ("uniform", 2, "uniform of 2, mean of 8", {"imagenet": (1.0, 1.0, 1.0)}),
            ("uniform", 12, "uniform of 12", {"imagenet": (80.0, 79.9, 80.1)}),
            ("model_stock", 2, "any name", {"imagenet": (81.0, 80.7, 81.3), MEAN: (48.0, 47.8, 48.2)}),
            ("model_stock", 24, "model_stock of 24", {"imagenet": (1.0, 1.0, 1.0)}),
        )
    ]
    found = {(r.row, r.figure): r for r in side_by_side(matching(B32, ALL), lines)}
    assert [(row, figure) for row, figure in found] == [
        ("zero-shot", "imagenet"),
        ("zero-shot", MEAN),
        ("mean single of 71, from a linear probe", "imagenet"),
        ("best single of 71, from a linear probe (here best single seed on held-out (seed-1))", "imagenet"),
        ("uniform soup of 72 (here uniform of 12)", "imagenet"),
        ("Model Stock of 2", "imagenet"),
        ("Model Stock of 2", MEAN),
    ]
    zero = found["zero-shot", "imagenet"]
    assert (zero.published, zero.ours, zero.low, zero.high, zero.within) == (63.3, 63.0, 62.6, 63.4, True)
    assert zero.gap == pytest.approx(-0.3)
    mean = found["zero-shot", MEAN]
    assert (mean.within, mean.gap) == (False, pytest.approx(1.2))
    assert set(dataclasses.asdict(zero)) == {
        "row",
        "backbone",
        "figure",
        "published",
        "ours",
        "low",
        "high",
        "gap",
        "within",
        "source",
    }
