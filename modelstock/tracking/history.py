"""A run's history on disk: JSON lines for programs that follow it, CSV for DVC's plots."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock.files import atomic_path

Rows = Sequence[Mapping[str, Any]]


def write_history(folder: Path, rows: Rows) -> None:
    """Write a finished run's history twice: `history.jsonl` and `history.csv`."""
    write_rows(folder / "history.jsonl", rows)
    write_table(folder / "history.csv", rows)


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as JSON lines, whole or not at all: others may read the file while a run trains."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def write_table(path: Path, rows: Rows) -> None:
    """Write rows as CSV, `step` first, a cell left empty where a row does not have that column."""
    columns = sorted({key for row in rows for key in row} - {"step"})
    text = io.StringIO()
    table = csv.DictWriter(text, ["step", *columns], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue())


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a `history.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
