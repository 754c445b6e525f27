"""A run's history on disk: JSON lines for programs that follow it, CSV for DVC's plots."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock.files import atomic_path


def write_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write a run's history twice: JSON lines for programs, CSV for DVC's plots."""
    with atomic_path(folder / "history.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in history))
    write_table(folder / "history.csv", history)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
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
