"""The report says what the comparison says, in bytes that repeat."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML
from sklearn.metrics import balanced_accuracy_score

from modelstock.comparison.compare import compare
from modelstock.comparison.figures import WITH_SHIFTS, WITHOUT_SHIFTS, draw, style_of, title_of, training_figure
from modelstock.comparison.report import (
    as_class_csv,
    as_markdown,
    as_summary,
    as_validation_csv,
    headline,
    published_figures,
    summary_lines,
    validation_curve,
    write_report,
)
from modelstock.comparison.text import worded
from modelstock.errors import WeightsError
from modelstock.experiment.tracked import flat
from modelstock.scoring.results import Row, save_scores
from modelstock.tracking.mlflow import IDENTITY, MlflowTracker
from modelstock.tracking.tracker import TRACKERS
from modelstock.weights.weight_set import WeightSet
from stages.compare import main as compare_stage
from tests.support.tracker import Recorder
from tests.test_comparison import ACCURACY, LABELS, ROWS, made, unbalanced, without_shifts


def results():
    return [made(name, accuracies) for name, accuracies in ACCURACY.items()]


@pytest.fixture(scope="module")
def comparison():
    return compare(results())


def table(text, heading):
    """The cells of the first table after a heading, its own line of heads first."""
    lines = text.split(f"{heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    write_report(comparison, place, facts={"cosines": {"median": 0.75}})
    return place


def test_the_bytes_repeat(comparison, folder, tmp_path):
    write_report(comparison, tmp_path, facts={"cosines": {"median": 0.75}})
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "comparison.md",
        "comparison.html",
        "comparison.json",
        "figure.png",
        "methods.png",
        "pareto.png",
        "metrics.json",
        "accuracy.csv",
        "held_out.csv",
        "per_class.csv",
        "quality.json",
    }
    assert all((folder / n).read_bytes() == (tmp_path / n).read_bytes() for n in names)


def test_table_metrics_and_csv_agree(comparison, folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["model_stock of 2, mean of 2"] == {
        "shapes": 76.0,
        "shift-a": 58.0,
        "shift-b": 38.0,
        "shift-mean": 48.0,
    }
    text = (folder / "comparison.md").read_text()
    table = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    shown = {cells[0]: cells[1:] for cells in table[2 : 2 + len(comparison.lines)]}
    assert set(shown) == set(metrics)
    for name, cells in shown.items():
        numbers = [float(cell.split(" ")[0]) for cell in cells[:-1]]
        expected = [metrics[name][b] for b in ("shapes", "shift-a", "shift-b", "shift-mean")]
        np.testing.assert_allclose(numbers, expected, atol=0.0501)
    rows = list(csv.DictReader(io.StringIO((folder / "accuracy.csv").read_text())))
    assert len(rows) == 12
    assert {r["name"]: float(r["shapes"]) for r in rows}["greedy/0-2"] == 73.0
    assert {r["name"]: int(r["cost"]) for r in rows} == dict(comparison.cost)
    assert "median 0.75" in text
    assert "4 tests" in text


def test_the_lines_for_dvc_are_the_champion_the_mean_seed_and_the_highlighted_merges_of_fewest_seeds(comparison):
    assert comparison.champion == "model_stock/0-1"
    figures = ("seeds", "held-out", "in-distribution", "shifts", "balanced", "balanced-shifts")
    assert as_summary(comparison) == {
        "champion": dict(zip(figures, (2, 78, 76, 48, 76, 48), strict=True)),
        "mean-seed": dict(zip(figures, (1, 70, 70, 40, 70, 40), strict=True)),
        "model_stock": dict(zip(figures, (2, 77, 76, 48, 76, 48), strict=True)),
        "uniform": dict(zip(figures, (2, 74, 74, 44, 74, 44), strict=True)),
    }
    alone = as_summary(compare(without_shifts(results())))
    assert alone["champion"] == {"seeds": 2, "held-out": 78, "in-distribution": 76, "balanced": 76}


def test_where_labels_have_equal_shares_one_sentence_says_that_balanced_accuracy_is_accuracy(comparison, folder):
    section = (folder / "comparison.md").read_text().split("## Balanced accuracy\n")[1].split("\n## ")[0]
    assert "equals accuracy, to within 0.05 points for every weight set on every benchmark" in section
    assert "12.5 % (shapes, shift-a, shift-b)" in section
    assert "|" not in section
    assert "Balanced accuracy equals accuracy." in summary_lines(comparison)


def test_where_labels_have_unequal_shares_balanced_accuracy_has_the_lines_and_columns_of_accuracy():
    parts = [unbalanced(scores) for scores in results()]
    found = compare(parts)
    text = as_markdown(found, {}, {})
    rows, main = table(text, "## Balanced accuracy"), table(text, "# Comparison of merges")
    assert rows[0] == main[0][:-1]
    assert [cells[0] for cells in rows] == [cells[0] for cells in main]
    # The mean single seed is the mean of rows 1 to 3.
    by_set = [
        [balanced_accuracy_score(s.truth, s.prediction[row]) for row in (1, 2, 3)]
        for s in parts
        if s.role != "held-out"
    ]
    expected = [100 * np.mean(values) for values in by_set]
    np.testing.assert_allclose([float(c) for c in rows[2][1:]], [*expected, np.mean(expected[1:])], atol=0.0501)
    assert rows[2][1:] != [cell.split(" ")[0] for cell in main[2][1:-1]]
    assert "6.2 to 50.0 % (shapes, shift-a, shift-b)" in text
    for heading, kind in (("mean single seed", "over_seed"), ("uniform soup of the same seeds", "over_uniform")):
        rows = table(text, f"### Balanced accuracy over the {heading}")
        shown = [d for one in found.lines for d in getattr(one, f"balanced_{kind}").values()]
        assert [cells[2] for cells in rows[1:]] == [
            f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" for d in shown
        ]
    assert "balanced accuracy in %" in summary_lines(found)
    page = text.split("## Other metrics")[1]
    assert "balanced" not in page
    summary = as_summary(found)["champion"]
    assert summary["balanced"] == pytest.approx(
        100 * found.metrics[found.champion]["shapes"]["balanced_accuracy"], abs=0.005
    )


def test_the_page_needs_no_other_file_and_no_network(folder):
    page = (folder / "comparison.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    assert page.count("<table>") == 10


def drawn(comparison, drawer):
    """The axes of a picture, and its points by the name in the legend."""
    axes = draw(comparison, drawer).axes[0]
    points = {c.get_label(): np.asarray(c.get_offsets()) for c in axes.collections if hasattr(c, "get_offsets")}
    return axes, points


def test_the_figure_highlights_anchor_seeds_uniform_soup_model_stock_and_ensemble(comparison):
    axes, points = drawn(comparison, WITH_SHIFTS["figure.png"][1])
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [name.partition(" of ")[0] for name in legend] == [
        "anchor",
        "mean single seed",
        "Model Stock",
        "uniform soup",
        "ensemble",
        "other methods and averages",
    ]
    for name, line in (("anchor", "zero-shot anchor"), ("mean single seed", "mean single seed")):
        expected = next(one for one in comparison.lines if one.name == line)
        place = [100 * expected.accuracy["shapes"].value, 100 * expected.summary["shifts"].value]
        np.testing.assert_allclose(points[name], [place])
    stock = [line for line in comparison.lines if line.kind == "model_stock"]
    np.testing.assert_allclose(
        points["Model Stock of " + ", ".join(str(line.size) for line in stock)],
        [[100 * line.accuracy["shapes"].value, 100 * line.summary["shifts"].value] for line in stock],
    )
    assert axes.get_xlabel() == "shapes: top-1 accuracy, %"
    assert axes.get_ylabel() == "mean of 2 shifts: top-1 accuracy, %"


def test_the_second_figure_shows_every_kind_of_row_and_the_curve(comparison):
    axes, _ = drawn(comparison, WITH_SHIFTS["methods.png"][1])
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    kinds = {title_of(row.kind) for row in comparison.rows} - {"WiSE-FT"}
    assert kinds <= legend
    most = max(len(row.members) for row in comparison.rows)
    assert f"WiSE-FT of {most}, by alpha" in legend
    (curve,) = [line for line in axes.lines if line.get_label().startswith("WiSE-FT")]
    assert len(curve.get_xdata()) == sum(row.kind == "wise_ft" and len(row.members) == most for row in comparison.rows)


def test_the_pareto_figure_joins_and_names_the_front_and_rings_the_champion(comparison):
    axes, points = drawn(comparison, WITH_SHIFTS["pareto.png"][1])
    rows = {row.name: row for row in comparison.rows}

    def place(name):
        row = rows[name]
        return [100 * comparison.summary[row.name][s].value for s in comparison.summaries]

    # By hand: the ensemble is no single weight set; the anchor is the best on the shifts, and WiSE-FT at 0.6 between.
    assert comparison.front == ("model_stock/0-1", "model_stock/1-2", "wise_ft/0-1-2@0.6", "anchor")
    for number, name in enumerate(comparison.front, 1):
        np.testing.assert_allclose(points[f"{number}: {name}"], [place(name)])
    (curve,) = axes.lines
    np.testing.assert_allclose(np.transpose(curve.get_data()), [place(name) for name in comparison.front])
    np.testing.assert_allclose(points["the champion, model_stock/0-1"], [place("model_stock/0-1")])


def test_the_front_has_a_table_that_says_it_is_for_reporting_only(comparison, folder):
    text = (folder / "comparison.md").read_text()
    rows = table(text, "## Pareto front")
    assert rows[0] == ["weights", "shapes", "mean of shifts", "cost"]
    assert [cells[0] for cells in rows[1:]] == [
        "**model_stock/0-1**",
        "model_stock/1-2",
        "wise_ft/0-1-2@0.6",
        "anchor",
    ]
    assert [cells[-1] for cells in rows[1:]] == ["2", "2", "3", "0"]
    assert "For reporting only" in text.split("## Pareto front")[1].split("##")[0]


def test_every_arm_of_periodic_merging_is_drawn_alike_under_its_own_name():
    assert style_of("periodic-every-2") == style_of("periodic-papa") != style_of("a new kind")
    assert title_of("periodic-every-2") == "periodic-every-2"


def test_without_shifts_the_figure_has_a_height_for_every_line(comparison):
    alone = compare(without_shifts(results()))
    axes = draw(alone, WITHOUT_SHIFTS["figure.png"][1]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [line.name for line in alone.lines]


def test_the_headline_has_the_champion_last_and_each_line_as_the_main_table_has_it(comparison):
    rows = table("# Headline\n\n" + headline(comparison), "# Headline")
    assert [cells[0] for cells in rows[1:4]] == [line.name for line in comparison.lines[:3]]
    assert rows[-1][0] == f"**{comparison.champion}**, champion by the held-out split"
    summary = comparison.summary[comparison.champion]["shifts"]
    assert rows[-1][-1].startswith(f"{100 * summary.value:.1f} ± ")


def test_the_terminal_gets_the_same_lines(comparison):
    text = summary_lines(comparison)
    assert all(line.name in text for line in comparison.lines)
    assert "+6.0 [" in text


def test_the_main_table_has_the_benchmarks_in_distribution_first_then_each_shift_and_their_mean(folder):
    rows = table((folder / "comparison.md").read_text(), "# Comparison of merges")
    assert rows[0] == ["weights", "shapes", "shift-a", "shift-b", "mean of shifts", "cost"]
    assert [cells[0] for cells in rows[1:4]] == [
        "zero-shot anchor",
        "mean single seed",
        "best single seed on held-out (seed-1)",
    ]
    assert [re.sub(r" ±.*", "", cell) for cell in rows[1]] == ["zero-shot anchor", "60.0", "65.0", "45.0", "55.0", "0"]
    # The best of three seeds takes all three, and so does a greedy soup of two that chose among them.
    costs = {cells[0]: cells[-1] for cells in rows[1:]}
    assert list(costs.values()) == ["0", "1", "3", "3", "2", "2", "3 (3 passes)", "3"]
    assert costs["greedy of 2"] == "3"
    assert rows[1][1] == "60.0 ± 4.8†"  # Wilson's of 240 among 400: 0.5513 to 0.6468


def test_the_tables_of_differences_say_over_what_each_interval_is(comparison, folder):
    text = (folder / "comparison.md").read_text()
    rows = table(text, "### Over the uniform soup of the same seeds")
    assert rows[0][1:4] == ["on", "difference", "over"]
    assert rows[0][6] == "no worse than 0.5 points"
    stock = next(line for line in comparison.lines if line.kind == "model_stock")
    assert [cells[:2] for cells in rows[1:]] == [
        [stock.name, "in distribution"],
        [stock.name, "shifts"],
    ]
    low, high = (100 * getattr(stock.over_uniform["shifts"], end) for end in ("low", "high"))
    # The mean of two pairs that share a seed has 3/4 of the variance of one pair: that of 4/3 pairs, 2.7 seeds.
    assert rows[2][2:5] == [f"+4.0 [{low:+.1f}, {high:+.1f}]", "images", "not enough seeds (2 of 6)"]
    assert "nan" not in re.findall(r"\w+", text.lower())


def test_a_margin_and_a_resampling_of_ones_own_are_named(tmp_path):
    text = as_markdown(compare(results(), resample="classes", margin=0.02), {}, {})
    assert "| no worse than 2 points |" in text
    assert "over seeds and classes" in text
    assert {cells[3] for cells in table(text, "### Over the uniform soup of the same seeds")[1:]} == {"classes"}


def test_calibration_is_the_mean_over_a_lines_weight_sets_and_over_the_shifts(comparison, folder):
    rows = table((folder / "comparison.md").read_text(), "## Other metrics")
    assert rows[0] == ["weights", "top-5", "NLL", "ECE", "shifts, top-5", "shifts, NLL", "shifts, ECE"]
    assert [cells[0] for cells in rows[1:]] == [line.name for line in comparison.lines]
    # Seeds are rows 1 to 3: NLL 1.1, 1.2, 1.3; sure by 0.89, 0.88, 0.87 and right on 0.70, 0.72, 0.68 in distribution,
    # and on 0.50, 0.52, 0.48 and 0.30, 0.32, 0.28 of the shifts: 0.88 - 0.70 and 0.88 - 0.40 in the mean.
    assert rows[2] == ["mean single seed", "90.0", "1.200", "18.0", "90.0", "1.200", "48.0"]
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["lines"]["mean single seed"]["shift-a"] == {
        "top1": 0.5,
        "balanced_accuracy": 0.5,
        "top5": 0.9,
        "nll": 1.2,
        "ece": 0.38,
    }
    assert quality["rows"]["seed-1"]["shapes"] == {
        "top1": 0.72,
        "balanced_accuracy": 0.72,
        "top5": 0.9,
        "nll": 1.2,
        "ece": 0.16,
    }


def test_top5_is_left_out_where_no_benchmark_has_more_than_five_labels():
    few = [dataclasses.replace(s, labels=LABELS[:5], truth=s.truth % 5) for s in results()]
    text = as_markdown(compare(few), {}, {})
    assert "op-5" not in text
    assert table(text, "## Other metrics")[0] == ["weights", "NLL", "ECE", "shifts, NLL", "shifts, ECE"]


def test_classes_that_the_champion_gains_and_loses_most_on_by_hand():
    # Six labels of 10 to 60 images; every seed has the first half of each label's right. The champion has all of "fox",
    # 60 % of "bee", none of "dog", and of the others what the seeds have.
    truth = np.repeat(np.arange(6), [10, 20, 30, 40, 50, 60]).astype(np.int32)
    place = np.concatenate([np.arange(n) / n for n in (10, 20, 30, 40, 50, 60)])
    seed, best = place < 0.5, np.where(truth == 5, True, np.where(truth == 1, place < 0.6, place < 0.5) & (truth != 3))
    rows = [row for row in ROWS if row.kind == "seed"] + [ROWS[6]]
    # Of "a|b" nobody has more than a tenth: the mean of three times 0.1 is not 0.1 in floating point, and no change.
    seed, best = (np.where(truth == 0, place < 0.05, right) for right in (seed, best))
    correct = np.stack([seed, seed, seed, best])
    sets = [
        dataclasses.replace(
            made(name, [0.5] * 4, len(truth), tuple(rows)), correct=correct, truth=truth, labels=("a|b", *LABELS[1:6])
        )
        for name in ("held-out", "shapes")
    ]
    found = compare(sets)
    assert found.champion == "model_stock/0-1"
    assert table(as_markdown(found, {}, {}), "## Classes") == [
        ["class", "images", "mean single seed", "champion", "change"],
        ["fox", "60", "50.0", "100.0", "+50.0"],
        ["bee", "20", "50.0", "60.0", "+10.0"],
        ["dog", "40", "50.0", "0.0", "-50.0"],
    ]


def test_accuracy_by_class_has_every_weight_set_or_beyond_fifty_thousand_lines_the_first_of_each_line(comparison):
    rows = list(csv.DictReader(io.StringIO(as_class_csv(comparison))))
    assert len(rows) == 12 * 4 * 8
    assert rows[0].keys() == {"row", "benchmark", "label", "images", "accuracy"}
    of = [r for r in rows if (r["row"], r["benchmark"]) == ("seed-0", "shapes")]
    assert [r["label"] for r in of] == list(LABELS)
    assert sum(float(r["accuracy"]) * int(r["images"]) for r in of) / 400 == pytest.approx(70, abs=1e-3)
    many = tuple(f"class {i}" for i in range(1100))  # 12 rows x 4 benchmarks x 1,100
    wide = compare([dataclasses.replace(s, labels=many) for s in results()])
    rows = list(csv.DictReader(io.StringIO(as_class_csv(wide))))
    assert list(dict.fromkeys(r["row"] for r in rows)) == [
        "anchor",
        "seed-0",
        "seed-1",
        "greedy/0-2",
        "model_stock/0-1",
        "uniform/0-1",
        "ensemble/0-1-2",
        "wise_ft/0-1-2@0.6",
    ]
    assert (rows[8]["images"], rows[8]["accuracy"]) == ("0", "")
    assert "for the first weight set of each line" in as_markdown(wide, {}, {})
    assert "for every weight set" in as_markdown(comparison, {}, {})


def test_published_figures_stand_beside_ours(comparison):
    figure = {
        "row": "zero-shot anchor",
        "backbone": "ViT-B/32",
        "figure": "imagenet",
        "published": 63.3,
        "ours": 62.91,
        "low": 62.5,
        "high": 63.34,
        "gap": -0.39,
        "within": True,
        "source": "open_clip's table",
    }
    text = as_markdown(comparison, {"published": [figure]}, {})
    assert table(text, "## Published figures")[1] == [
        "zero-shot anchor",
        "ViT-B/32",
        "imagenet",
        "63.3",
        "62.9 [62.5, 63.3]",
        "-0.4",
        "yes",
        "open_clip's table",
    ]
    assert "Beside" not in as_markdown(comparison, {"published": []}, {})


def test_the_anchors_backbone_says_which_published_figures_stand_there():
    """OpenAI's ViT-B/32 scored on sets that are called ImageNet and -R: the table's zero-shot figures, and no mean."""
    names = dict(zip(ACCURACY, ("held-out", "imagenet", "imagenet-r", "other"), strict=False))
    renamed = [dataclasses.replace(s, benchmark=names[s.benchmark]) for s in results() if s.benchmark in names]
    found = compare(renamed)
    figures = published_figures(found, {"name": "ViT-B-32-quickgelu", "pretrained": "openai"})
    zero = {f["figure"]: f for f in figures if f["row"] == "zero-shot"}
    assert {name: f["published"] for name, f in zero.items()} == {"imagenet": 63.3, "imagenet-r": 69.3}
    ours = 100 * found.lines[0].accuracy["imagenet"].value
    assert zero["imagenet"]["gap"] == pytest.approx(ours - 63.3)
    assert published_figures(found, {"name": "tiny", "pretrained": "shapes"}) == published_figures(found, None) == []
    assert "zero-shot" in as_markdown(found, {"published": figures}, {})


def test_the_held_out_curve_is_over_the_seeds_that_have_one_and_only_a_head_line_where_none_has():
    one = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation/top1": 0.5}]
    other = [{"step": 2, "validation/top1": 0.75}]
    assert as_validation_csv(map(validation_curve, [one, [], other])) == "step,high,low,mean\n2,75.0,50.0,62.5\n"
    assert as_validation_csv(map(validation_curve, [[], []])) == "step,high,low,mean\n"


def test_the_picture_of_the_held_out_curve_is_there_where_a_seed_has_one(comparison, tmp_path):
    history = [{"step": step, "validation/top1": step / 10} for step in range(5)]
    write_report(comparison, tmp_path, facts={}, histories=[history, []])
    assert (tmp_path / "held_out.png").read_bytes().startswith(b"\x89PNG")
    assert "![held-out accuracy while the seeds train](held_out.png)" in (tmp_path / "comparison.md").read_text()
    assert training_figure([{}, {}]) == {}


def test_without_shifts_no_file_mentions_them(comparison, tmp_path):
    alone = compare(without_shifts(results()))
    write_report(alone, tmp_path, facts={})
    for path in tmp_path.iterdir():
        if path.suffix != ".png":
            text = re.sub(r"data:image/png;base64,[^\"]*", "", path.read_text())
            text = re.sub(r'"(held_out_)?shifts": \[\]', "", text)
            assert "shift" not in text, path.name
            assert "nan" not in re.findall(r"\w+", text.lower()), path.name
    text = (tmp_path / "comparison.md").read_text()
    assert table(text, "# Comparison of merges")[0] == ["weights", "shapes", "cost"]
    for heading in ("### Over the mean single seed", "### Over the uniform soup of the same seeds"):
        assert {cells[1] for cells in table(text, heading)[1:]} == {"in distribution"}
    assert (tmp_path / "comparison.html").read_text().count("<table>") == 9
    assert json.loads((tmp_path / "metrics.json").read_text())["mean single seed"] == {"shapes": 70.0}
    assert not (tmp_path / "methods.png").exists()
    assert not (tmp_path / "pareto.png").exists()
    shown = summary_lines(alone)
    assert all(line.name in shown for line in alone.lines)
    assert "shifts" not in shown


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Somebody's two checkpoints, without histories and averages, and their soup, scored on one test set."""
    yaml = YAML(typ="safe")
    params = yaml.load((Path(__file__).parent.parent / "params.yaml").read_text())
    params["seeds"] = [0, 1]
    params |= {"periodic": {}, "longer": []}
    params["merge"]["methods"] = ["uniform"]
    params["evaluate"]["benchmarks"] = ["held-out", "shapes"]
    with open(tmp_path / "params.yaml", "w") as file:
        yaml.dump(params, file)
    made_by = {
        "anchor.safetensors": {"stage": "anchor"},
        "finetuned/0/weights.safetensors": {"stage": "finetune", "seed": 0},
        "finetuned/1/weights.safetensors": {"stage": "finetune", "seed": 1},
        "merged/uniform/0-1.safetensors": {"stage": "merge", "method": "uniform", "members": [0, 1]},
    }
    rows = []
    for place, (name, made_how) in enumerate(made_by.items()):
        # Only the first tensor was trained.
        weights = WeightSet({"a": np.arange(4.0) ** place, "b": np.ones(3)}, {"made_by": made_how})
        weights.save(tmp_path / "models" / name)
        kind = made_how.get("method", "seed" if "seed" in made_how else "anchor")
        members = ((), (0,), (1,), (0, 1))[place]
        rows.append(Row(("anchor", "seed-0", "seed-1", "uniform/0-1")[place], weights.identity, kind, members, {}))
    (tmp_path / "models/merged/uniform/report.json").write_text('{"0-1": {}}')
    for name in ("held-out", "shapes"):
        save_scores(tmp_path / f"results/{name}.safetensors", made(name, [0.5, 0.6, 0.7, 0.8], 400, tuple(rows)))
    (tmp_path / "geometry").mkdir()
    (tmp_path / "geometry/section.md").write_text("## Geometry\n\nNothing was measured.\n")
    (tmp_path / "geometry/accuracy.json").write_text("{}\n")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_stage_compares_somebodys_own_checkpoints_on_one_test_set(own, capsys):
    compare_stage(Path("results"), Path("models"), Path("geometry"), Path("reports"), Path("metrics"))
    assert "champion by the held-out split: uniform/0-1" in capsys.readouterr().out
    assert (own / "reports/held_out.csv").read_text() == "step,high,low,mean\n"
    # Without Model Stock among the methods it has no line.
    assert {path.name for path in (own / "metrics").iterdir()} == {"champion.json", "mean-seed.json", "uniform.json"}
    assert "<table>" in (own / "reports/comparison.html").read_text()
    assert (own / "reports/comparison.md").read_text().endswith("\n\n## Geometry\n\nNothing was measured.\n")
    assert (own / "reports/accuracy.json").read_text() == "{}\n"
    facts = json.loads((own / "reports/comparison.json").read_text())["facts"]
    # The first updates, from ones to 0..3 and to their squares: (-1, 0, 1, 2) and (-1, 0, 3, 8).
    assert facts["cosines"]["median"] == pytest.approx(20 / np.sqrt(6 * 74))
    tracker = MlflowTracker(own)
    runs = {run.info.run_name: run for run in tracker.client.search_runs([tracker.experiment])}
    assert set(runs) == {"comparison", "anchor", "seed-0", "seed-1", "uniform/0-1"}
    values = {b: [0.7, 0.7, 0.9, 1.2, 0.18] for b in ("held-out", "shapes")}
    expected = {
        f"{b}/{key}": pytest.approx(value, abs=1e-6)
        for b, found in values.items()
        for key, value in zip(("top1", "balanced_accuracy", "top5", "nll", "ece"), found, strict=True)
    }
    seen = runs["seed-1"].data.metrics
    assert {name: seen[name] for name in expected} == expected
    assert seen["in_distribution"] == seen["held_out"] == 0.7
    assert (seen["in_distribution_balanced"], seen["held_out_balanced"]) == pytest.approx((0.7, 0.7))
    assert seen["in_distribution_low"] < 0.7 < seen["in_distribution_high"]
    client = tracker.client
    for alias, row in (("champion", "uniform/0-1"), ("uniform", "uniform/0-1"), ("seed", "seed-1")):
        version = client.get_model_version_by_alias("modelstock-shapes", alias)
        assert version.tags[IDENTITY] == runs[row].data.tags[IDENTITY]
        assert version.run_id == runs[row].info.run_id
    assert len(client.search_model_versions("name = 'modelstock-shapes'")) == 2
    files = {file.path for file in client.list_artifacts(runs["comparison"].info.run_id)}
    assert files == {path.name for path in (own / "reports").iterdir()}


def test_a_tracker_of_ones_own_gets_every_row_with_its_metrics_and_the_champion(own, monkeypatch, capsys):
    monkeypatch.setitem(TRACKERS, "recorder", "tests.support.tracker:Recorder")
    monkeypatch.setattr(Recorder, "comparisons", [])
    params = (own / "params.yaml").read_text()
    assert "tracker: mlflow" in params
    (own / "params.yaml").write_text(params.replace("tracker: mlflow", "tracker: recorder"))
    compare_stage(Path("results"), Path("models"), Path("geometry"), Path("reports"), Path("metrics"))
    (comparison,) = Recorder.comparisons
    assert {row.name: row.metrics["shapes"]["top1"] for row in comparison.rows} == pytest.approx(
        {"anchor": 0.5, "seed-0": 0.6, "seed-1": 0.7, "uniform/0-1": 0.8}
    )
    aliases = {row.name: list(row.aliases) for row in comparison.rows if row.aliases}
    assert aliases == {"seed-1": ["seed"], "uniform/0-1": ["champion", "uniform"]}
    merged = comparison.rows[-1]
    assert merged.params == {"method": "uniform", "seeds": "2", "members": "0-1", "options": "none", "cost": "2"}
    assert merged.description == (
        "uniform of seeds 0, 1: top-1 accuracy 80.0 % on the held-out split, 80.0 % in distribution."
    )
    assert "shown nowhere" in capsys.readouterr().out
    assert not (own / "mlflow.db").exists()


def test_a_tracker_is_sent_settings_without_passwords():
    split = {"path": "x.zip", "password": "sesame", "images": 3}
    settings = {"prepare": {"splits": {"x": split, "y": {**split, "password": None}}, "url": "http://me:sesame@host/a"}}
    sent = flat(settings)
    assert sent["prepare.splits.x.images"] == "3"
    assert sent["prepare.splits.x.password"] == "***"
    assert sent["prepare.splits.y.password"] == "None"
    assert "sesame" not in str(sent)


def test_scored_weights_without_a_file_are_refused_before_anything_is_written(own):
    (own / "models/merged/uniform/0-1.safetensors").unlink()
    with pytest.raises(WeightsError, match="models: got no file with the weights of uniform/0-1; expected"):
        compare_stage(Path("results"), Path("models"), Path("geometry"), Path("reports"), Path("metrics"))
    assert not (own / "reports").exists()


def test_the_report_lists_each_notice_once_with_all_that_it_is_about():
    parts = results()
    rows = [row.name for row in parts[0].rows]
    shared = [f"{row}: a.pt: its entry model_ema is taken" for row in rows[:2]]
    parts = [dataclasses.replace(one, notices=(f"{one.benchmark}: 3 images | turned", *shared)) for one in parts]
    comparison = compare(parts)
    section = as_markdown(comparison, {}, {}).split("## Notices\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("- ")]
    assert len(lines) == 2
    assert lines[0].startswith(r"- 3 images \| turned (")
    assert all(name in lines[0] for name in comparison.benchmarks[:6])
    assert lines[1] == rf"- a.pt: its entry model\_ema is taken ({rows[0]}, {rows[1]})"


def test_a_report_without_anything_unusual_says_so(comparison):
    assert "## Notices\n\nNothing unusual was found" in as_markdown(comparison, {}, {})


def test_a_report_on_texts_speaks_of_texts_but_in_code_and_names(comparison):
    said = as_markdown(dataclasses.replace(comparison, modality="text"), {}, {"figure.png": "a figure"})
    assert "images" in as_markdown(comparison, {}, {})
    assert not re.findall(r"\b[Ii]mages?\b", said)
    assert "interval over seeds and texts" in said
    assert worded("Images of `image/x`, an image", "text") == "Texts of `image/x`, a text"
