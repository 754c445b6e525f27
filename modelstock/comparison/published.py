"""Published accuracies of the backbones that people start from, to put beside ours; published.yaml has the numbers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from ruamel.yaml import YAML

SHIFTS = ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
MEAN = "mean of shifts"


@dataclass(frozen=True)
class Published:
    """One row of somebody's table: top-1 accuracy in percent by benchmark, and the mean of the five shifts if known."""

    backbone: str
    row: str
    line: str  # the line of our comparison that it belongs beside
    members: int  # models trained for it
    accuracy: Mapping[str, float]
    shift_mean: float | None
    source: str


@dataclass(frozen=True)
class Beside:
    """A published figure and ours, in percent; `within`: the published one lies in our interval [low, high]."""

    row: str
    backbone: str
    figure: str  # a benchmark, or the mean of the shifts
    published: float
    ours: float
    low: float
    high: float
    gap: float  # ours minus published, in points
    within: bool
    source: str


@cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = YAML(typ="safe").load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return table


def _is(backbone: Mapping[str, str], known: Mapping[str, Any]) -> bool:
    """Whether weights are those that a row is about, by tag, or by the publisher's name of the file or folder."""
    if backbone.get("name") != known["name"]:
        return False
    pretrained = str(backbone.get("pretrained", ""))
    places = PurePath(pretrained).parts
    return pretrained == known["tag"] or any(part.endswith(file) for part in places for file in known["files"])


def matching(backbone: Mapping[str, str] | None, benchmarks: Sequence[str]) -> list[Published]:
    """The published rows of an anchor's backbone {name, pretrained}, cut down to the benchmarks that were scored.

    The mean of the shifts stays only where the shifts among `benchmarks` are the five it is over, no more and no fewer:
    beside `imagenet` and a held-out set there must be nothing else.
    """
    five = set(benchmarks) - {"imagenet", "held-out"} == set(SHIFTS)
    found = []
    for row in _table()["rows"]:
        if backbone is None or not _is(backbone, _table()["backbones"][row["backbone"]]):
            continue
        accuracy = {name: float(value) for name, value in row["accuracy"].items() if name in benchmarks}
        mean = float(row["mean"]) if five and row.get("mean_over", len(SHIFTS)) == len(SHIFTS) else None
        if accuracy or mean is not None:
            found.append(
                Published(row["backbone"], row["row"], row["line"], row["members"], accuracy, mean, row["source"])
            )
    return found


def _line_of(row: Published, names: Sequence[str]) -> str | None:
    """The name of our line that a row belongs beside; of several sizes the largest."""
    sizes = [
        (int(found.group(1) or 0), name)
        for name in names
        if (found := re.fullmatch(rf"{re.escape(row.line)}(?: of (\d+))?(?:,.*| on .*)?", name))
    ]
    return max(sizes)[1] if sizes else None


def beside(
    published: Sequence[Published], lines: Mapping[str, Mapping[str, tuple[float, float, float]]]
) -> list[Beside]:
    """Published figures and ours, row by row.

    `lines`: our lines by name as the comparison calls them ("zero-shot anchor", "mean single seed", "model_stock of 2,
    mean of 8", ...) -> figure (a benchmark, or "mean of shifts") -> value and both ends of its interval, in percent.
    A row for which we have no line, and a figure that we did not measure, are left out.
    """
    found = []
    for row in published:
        name = _line_of(row, list(lines))
        if name is None:
            continue
        figures = {**row.accuracy, **({} if row.shift_mean is None else {MEAN: row.shift_mean})}
        for figure, value in figures.items():
            if figure in lines[name]:
                ours, low, high = lines[name][figure]
                label = row.row if name.startswith(row.line + ",") or name == row.line else f"{row.row} (here {name})"
                found.append(
                    Beside(
                        label,
                        row.backbone,
                        figure,
                        value,
                        ours,
                        low,
                        high,
                        ours - value,
                        low <= value <= high,
                        row.source,
                    )
                )
    return found
