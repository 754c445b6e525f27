"""The report says what the comparison says, in bytes that repeat."""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_comparison import ACCURACY, made

from modelstock.comparison import compare
from modelstock.report import summary_lines, write_report


@pytest.fixture(scope="module")
def comparison():
    return compare([made(name, accuracies) for name, accuracies in ACCURACY.items()], draws=200)


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
        "metrics.json",
        "accuracy.csv",
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
        numbers = [float(cell.split(" ")[0]) for cell in cells]
        expected = [metrics[name][b] for b in ("shapes", "shift-a", "shift-b", "shift-mean")]
        np.testing.assert_allclose(numbers, expected, atol=0.0501)
    rows = list(csv.DictReader(io.StringIO((folder / "accuracy.csv").read_text())))
    assert len(rows) == 12
    assert {r["name"]: float(r["shapes"]) for r in rows}["greedy/0-2"] == 73.0
    assert "median 0.75" in text
    assert "4 tests" in text


def test_the_page_needs_no_other_file_and_no_network(folder):
    page = (folder / "comparison.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    assert page.count("<table>") == 5


def test_the_figure_shows_something(folder):
    with Image.open(folder / "figure.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert picture.size == (1210, 660)
    assert len(np.unique(pixels, axis=0)) > 100


def test_the_terminal_gets_the_same_lines(comparison):
    text = summary_lines(comparison)
    assert all(line.name in text for line in comparison.lines)
    assert "+6.0 [" in text
