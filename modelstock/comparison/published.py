"""Published accuracies of the backbones that people start from, to compare with ours; published.yaml has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from ruamel.yaml import YAML

SHIFTS = ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
MEAN = "mean of shifts"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of somebody's table: top-1 accuracy in percent by benchmark, and the mean of the five shifts if known."""

    backbone: str
    row: str
    key: str  # of the line of our comparison that it is compared with
    size: int | None  # seeds in that line; None: the largest there is
    members: int  # models trained for it
    accuracy: Mapping[str, float]
    shift_mean: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Figure:
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
    besides `imagenet` and a held-out set there must be nothing else.
    """
    five = set(benchmarks) - {"imagenet", "held-out"} == set(SHIFTS)
    rows: list[Published] = []
    for row in _table()["rows"]:
        if backbone is None or not _is(backbone, _table()["backbones"][row["backbone"]]):
            continue
        accuracy = {name: float(value) for name, value in row["accuracy"].items() if name in benchmarks}
        mean = float(row["mean"]) if five and row.get("mean_over", len(SHIFTS)) == len(SHIFTS) else None
        if accuracy or mean is not None:
            rows.append(
                Published(
                    backbone=row["backbone"],
                    row=row["row"],
                    key=row["line"],
                    size=row.get("size"),
                    members=row["members"],
                    accuracy=accuracy,
                    shift_mean=mean,
                    source=row["source"],
                )
            )
    return rows


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A line of our comparison: figure (a benchmark, or the mean of the shifts) -> value, low, high in percent."""

    key: str
    size: int
    name: str
    figures: Mapping[str, tuple[float, float, float]]


def side_by_side(published: Sequence[Published], lines: Sequence[Ours]) -> list[Figure]:
    """Published figures and ours, row by row.

    A row for which we have no line, and a figure that we did not measure, are left out.
    """
    figures = []
    for row in published:
        candidates = [line for line in lines if line.key == row.key and row.size in (None, line.size)]
        if not candidates:
            continue
        ours = max(candidates, key=lambda line: line.size)
        alike = row.size is not None or ours.key in ("anchor", "mean-seed")
        label = row.row if alike else f"{row.row} (here {ours.name})"
        values = {**row.accuracy, **({} if row.shift_mean is None else {MEAN: row.shift_mean})}
        for figure, value in values.items():
            if figure in ours.figures:
                here, low, high = ours.figures[figure]
                figures.append(
                    Figure(
                        row=label,
                        backbone=row.backbone,
                        figure=figure,
                        published=value,
                        ours=here,
                        low=low,
                        high=high,
                        gap=here - value,
                        within=low <= value <= high,
                        source=row.source,
                    )
                )
    return figures
