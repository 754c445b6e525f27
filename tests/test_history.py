"""A run's history: what a kill leaves behind is read, and what is damaged is named by file and line."""

import json
from pathlib import Path

import pytest

from modelstock.errors import DataError
from modelstock.notices import Notice
from modelstock.tracking.history import read_history, write_history
from modelstock.tracking.mlflow import MlflowTracker

ROWS = [{"step": 5, "loss": 1.5, "lr": 1e-3}, {"step": 10, "loss": 1.25, "validation/top1": 1}]


def test_a_history_reads_back_as_it_was_written(tmp_path):
    write_history(tmp_path, ROWS)
    assert read_history(tmp_path / "history.jsonl") == ROWS
    write_history(tmp_path, [])
    assert read_history(tmp_path / "history.jsonl") == []


@pytest.mark.parametrize("left", [1, 20, -2])
def test_half_a_last_line_is_no_row_and_all_before_it_are(tmp_path, left):
    path = tmp_path / "history.jsonl"
    write_history(tmp_path, ROWS)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:left])
    with pytest.warns(Notice, match=r"history\.jsonl: ends with half a line, which is left out"):
        assert read_history(path) == ROWS[:1]


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"step": 7, "loss"', "no JSON"),
        ("", "no JSON"),
        ("\udcff", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("7", "no object with a whole number"),
        ('{"loss": 1.0}', "no object with a whole number"),
        ('{"step": true}', "no object with a whole number"),
        ('{"step": 7, "loss": NaN}', "loss nan"),
        ('{"step": 7, "loss": -Infinity}', "loss -inf"),
        ('{"step": 7, "loss": "1.0"}', "loss '1.0'"),
        ('{"step": 7, "loss": null}', "loss None"),
        ('{"step": 5, "loss": 1.0}', "step 5 after step 5"),
    ],
)
def test_a_broken_line_elsewhere_is_named_and_is_not_the_trackers_fault(tmp_path, line, got):
    path = tmp_path / "history.jsonl"
    rows = [json.dumps(row) for row in ROWS]
    path.write_bytes("\n".join([rows[0], line, rows[1], ""]).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=rf"history\.jsonl, line 2: got {got}") as caught:
        read_history(path)
    assert "\n" not in str(caught.value)
    tracker = MlflowTracker(tmp_path, uri=f"sqlite:///{tmp_path}/mlflow.db") if got.startswith("step") else None
    if tracker is not None:
        with pytest.raises(DataError, match=r"history\.jsonl, line 2"):
            tracker.live(key="k", name="seed-0", params={}, history=Path(path))
