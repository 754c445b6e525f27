"""A run's history on disk: JSON lines for programs that follow it, CSV for DVC's plots."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock.damage import cure_of
from modelstock.errors import DataError
from modelstock.files import atomic_path
from modelstock.notices import notice

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
    """The rows of a `history.jsonl`; half a last line, as a killed writer leaves it, is no row.

    Raises:
        DataError: a line that is no row of finite numbers, or whose step is not after the one before.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        notice(path, "ends with half a line, which is left out")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        wrong = _add(rows, line)
        if wrong:
            raise DataError(
                f"{path}, line {number}",
                got=wrong,
                expected="one JSON object of finite numbers per line, steps ascending",
                cure=cure_of(path, "run the training again, or remove the file: the report is then without its curve"),
            )
    return rows


def _add(rows: list[dict[str, Any]], line: bytes) -> str:
    """Add a line's row to those before it; returns what is wrong with it, if anything."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return f"no JSON ({line[:40].decode('utf-8', 'replace')!r})"
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return "no object with a whole number `step`"
    for name, value in row.items():
        if type(value) not in (int, float) or not abs(value) < math.inf:
            return f"{name} {value!r}"
    if rows and row["step"] <= rows[-1]["step"]:
        return f"step {row['step']} after step {rows[-1]['step']}"
    rows.append(row)
    return ""
