"""Pictures of a comparison, as PNG bytes that repeat."""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modelstock.comparison.compare import Comparison, Line
from modelstock.comparison.intervals import Estimate
from modelstock.merging.methods.rows import Style
from modelstock.merging.methods.table import METHODS
from modelstock.scoring.results import Row

# The kinds of rows that are no merge method; a method's style is in its row.
STYLES = {
    "anchor": Style("*", "black", highlight=True),
    "seed": Style("o", "dimgray", highlight=True),
    "ensemble": Style("P", "tab:purple", highlight=True),
    "periodic": Style("D", "tab:pink"),  # of every arm
    "longer": Style("^", "tab:pink"),
    "ema": Style(".", "tab:green"),
    "lawa": Style(".", "tab:cyan"),
    "snapshot": Style(".", "silver"),
}
NAMED = 25  # points of the front that a legend has room for
SINGLE = (  # kinds with a row per seed, drawn small
    *("seed", "ema", "lawa", "snapshot"),
    *(name for name, method in METHODS.items() if method.most == 1),
)


def style_of(kind: str) -> Style:
    """How rows of a kind are drawn."""
    if kind in METHODS:
        return METHODS[kind].style
    return STYLES.get("periodic" if kind.startswith("periodic-") else kind, Style("v", "tab:brown"))


def title_of(kind: str) -> str:
    """A kind as a legend names it."""
    if kind in METHODS:
        return METHODS[kind].title or kind
    return {"seed": "single seeds", "anchor": "anchor"}.get(kind, kind)


def _bars(axes: Axes, x: Estimate, y: Estimate | float, *, colour: str, alpha: float = 0.5) -> None:
    """The intervals of a point; `y` is a number where only x has one. Percent."""

    def ends(estimate: Estimate) -> list[list[float]]:
        return [[100 * (estimate.value - estimate.low)], [100 * (estimate.high - estimate.value)]]

    height = 100 * y.value if isinstance(y, Estimate) else y
    yerr = ends(y) if isinstance(y, Estimate) else None
    axes.errorbar(100 * x.value, height, fmt="none", xerr=ends(x), yerr=yerr, ecolor=colour, alpha=alpha, zorder=1)


def _axes(comparison: Comparison, drawing: Figure) -> Axes:
    axes = drawing.subplots()
    axes.set_xlabel(f"{comparison.in_distribution}: top-1 accuracy, %")
    axes.set_ylabel(f"mean of {len(comparison.shifts)} shifts: top-1 accuracy, %")
    axes.grid(alpha=0.25)
    return axes


def _place(comparison: Comparison, row: Row) -> tuple[float, float]:
    inside = comparison.accuracy[row.name][comparison.in_distribution].value
    return 100 * inside, 100 * comparison.summary[row.name]["shifts"].value


def _highlights(comparison: Comparison, drawing: Figure) -> None:
    """The lines of highlighted kinds, joined over the number of seeds; every other row is a grey dot."""
    drawing.set_size_inches(7.4, 4.8)
    axes = _axes(comparison, drawing)
    others = [row for row in comparison.rows if not style_of(row.kind).highlight]
    seeds = [row for row in comparison.rows if row.kind == "seed"]
    for rows, colour, alpha in ((others, "0.85", 1.0), (seeds, style_of("seed").colour, 0.5)):
        places = [_place(comparison, row) for row in rows]
        x, y = [place[0] for place in places], [place[1] for place in places]
        axes.scatter(x, y, color=colour, s=13, alpha=alpha, zorder=1)
    shown = [line for line in comparison.lines if line.key != "best-seed" and style_of(line.kind).highlight]
    groups: dict[str, list[Line]] = {}
    for line in shown:
        groups.setdefault(line.kind, []).append(line)
    for kind, lines in groups.items():
        _highlight(comparison, axes, kind, lines)
    axes.scatter([], [], color="0.85", s=12, label="other methods and averages")
    axes.legend(fontsize=8, loc="best", framealpha=0.9)


def _highlight(comparison: Comparison, axes: Axes, kind: str, lines: Sequence[Line]) -> None:
    style = style_of(kind)
    points = [(line.accuracy[comparison.in_distribution], line.summary["shifts"]) for line in lines]
    x, y = ([100 * estimate.value for estimate in axis] for axis in zip(*points, strict=True))
    sizes = ", ".join(str(line.size) for line in lines)
    label = {"seed": "mean single seed", "anchor": "anchor"}.get(kind, f"{title_of(kind)} of {sizes}")
    axes.plot(x, y, "-", color=style.colour, alpha=0.5, zorder=2)
    axes.scatter(x, y, marker=style.marker, color=style.colour, s=90, label=label, zorder=3)
    for inside, outside in points:
        _bars(axes, inside, outside, colour=style.colour, alpha=0.35)
    for line, left, height in zip(lines, x, y, strict=True):
        if len(lines) > 1:
            axes.annotate(
                str(line.size),
                (left, height),
                xytext=(6, 5),
                textcoords="offset points",
                color=style.colour,
                fontsize=9,
            )


def _against_shifts(comparison: Comparison, drawing: Figure) -> None:
    """Every method at its largest size, highlighted ones at all sizes; single seeds and averages small."""
    drawing.set_size_inches(11, 6)
    axes = _axes(comparison, drawing)
    most = max(len(row.members) for row in comparison.rows)
    for kind, rows in _curves(comparison, most).items():
        choice = METHODS[kind].chooses
        option = choice.option if choice else ""
        rows.sort(key=lambda row: float(row.options[option]))
        label = f"{title_of(kind)} of {most}, by {option}"
        path = zip(*(_place(comparison, row) for row in rows), strict=True)
        axes.plot(*path, ".-", color=style_of(kind).colour, label=label, zorder=1)
    labelled: set[str] = set()
    for row in comparison.rows:
        style, small = style_of(row.kind), row.kind in SINGLE
        if (row.kind in METHODS and not small) or row.kind == "ensemble":
            if (choice := METHODS[row.kind].chooses if row.kind in METHODS else None) is not None and choice.curve:
                continue
            small = len(row.members) < most and len(_sizes(comparison, row.kind)) > 1
            if small and not style.highlight:
                continue  # the table has them
        x, y = _place(comparison, row)
        label = f"{title_of(row.kind)}, fewer seeds" if small and row.kind not in SINGLE else title_of(row.kind)
        if not small:
            inside = comparison.accuracy[row.name][comparison.in_distribution]
            _bars(axes, inside, comparison.summary[row.name]["shifts"], colour=style.colour, alpha=0.4)
        axes.scatter(
            x,
            y,
            marker=style.marker,
            color=style.colour,
            s=25 if small else 110,
            alpha=0.55 if small else 1,
            label=None if label in labelled else label,
            zorder=2,
        )
        labelled.add(label)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _pareto(comparison: Comparison, drawing: Figure) -> None:
    """Every row, the front joined and numbered, and the champion in a ring."""
    drawing.set_size_inches(11, 6)
    axes = _axes(comparison, drawing)
    for row in comparison.rows:
        axes.scatter(*_place(comparison, row), marker=style_of(row.kind).marker, color="0.7", s=30, zorder=1)
    rows = {row.name: row for row in comparison.rows}
    places = [_place(comparison, rows[name]) for name in comparison.front]
    axes.plot([x for x, _ in places], [y for _, y in places], "-", color="tab:red", alpha=0.4, zorder=2)
    for number, (name, place) in enumerate(zip(comparison.front, places, strict=True), 1):
        style = style_of(rows[name].kind)
        label = f"{number}: {name}" if number <= NAMED else None
        axes.scatter(*place, marker=style.marker, color=style.colour, s=60, label=label, zorder=3)
        if label:
            axes.annotate(str(number), place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    champion = _place(comparison, rows[comparison.champion])
    label = f"the champion, {comparison.champion}"
    axes.scatter(*champion, marker="o", facecolors="none", edgecolors="black", s=220, label=label, zorder=4)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _curves(comparison: Comparison, most: int) -> dict[str, list[Row]]:
    """The rows of methods whose whole curve was scored, of all seeds together."""
    curves: dict[str, list[Row]] = {}
    for row in comparison.rows:
        choice = METHODS[row.kind].chooses if row.kind in METHODS else None
        if choice is not None and choice.curve and len(row.members) == most:
            curves.setdefault(row.kind, []).append(row)
    return curves


def _sizes(comparison: Comparison, kind: str) -> set[int]:
    return {len(row.members) for row in comparison.rows if row.kind == kind}


def _by_method(comparison: Comparison, drawing: Figure) -> None:
    """A dot with its interval for each line of the main table, and a small one for each of its weight sets."""
    drawing.set_size_inches(11, max(3.0, 1.0 + 0.28 * len(comparison.lines)))
    axes = drawing.subplots()
    for height, line in enumerate(comparison.lines):
        style = style_of(line.kind)
        for row in line.rows if len(line.rows) > 1 else ():
            inside = comparison.accuracy[row][comparison.in_distribution]
            axes.scatter(100 * inside.value, height, marker=".", color=style.colour, s=25, alpha=0.4, zorder=1)
        mean = line.accuracy[comparison.in_distribution]
        _bars(axes, mean, float(height), colour=style.colour, alpha=0.6)
        axes.scatter(100 * mean.value, height, marker=style.marker, color=style.colour, s=60, zorder=2)
    axes.set_yticks(range(len(comparison.lines)), [line.name for line in comparison.lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{comparison.in_distribution}: top-1 accuracy, %")
    axes.grid(alpha=0.3)


Drawer = Callable[[Comparison, Figure], None]
WITH_SHIFTS: dict[str, tuple[str, Drawer]] = {  # file -> what it shows, and what draws it
    "figure.png": ("in-distribution accuracy against the mean of the shifts", _highlights),
    "methods.png": ("in-distribution accuracy against the mean of the shifts, every method", _against_shifts),
    "pareto.png": ("the Pareto front in distribution and on the shifts, for reporting only", _pareto),
}
WITHOUT_SHIFTS: dict[str, tuple[str, Drawer]] = {"figure.png": ("in-distribution accuracy by method", _by_method)}


def draw(comparison: Comparison, drawer: Drawer) -> Figure:
    """One picture, drawn but not yet written."""
    drawing = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    drawer(comparison, drawing)
    return drawing


def _png(drawing: Figure) -> bytes:
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def figures(comparison: Comparison) -> dict[str, tuple[str, bytes]]:
    """File -> what it shows, and the PNG."""
    drawers = WITH_SHIFTS if comparison.shifts else WITHOUT_SHIFTS
    return {name: (title, _png(draw(comparison, drawer))) for name, (title, drawer) in drawers.items()}


def training_figure(curves: Sequence[Mapping[float, float]]) -> dict[str, tuple[str, bytes]]:
    """File -> what it shows, and the PNG: the seeds' curves, accuracy by step, and their mean; none of no curve."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return {}
    drawing = Figure(figsize=(7.4, 4.8), dpi=110, layout="constrained")
    axes = drawing.subplots()
    for place, curve in enumerate(curves):
        label = None if place else "single seeds"
        axes.plot(list(curve), [100 * v for v in curve.values()], color="0.75", linewidth=1, label=label)
    steps = sorted({step for curve in curves for step in curve})
    means = [float(np.mean([100 * curve[step] for curve in curves if step in curve])) for step in steps]
    axes.plot(steps, means, ".-", color=style_of("seed").colour, label="their mean")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out split: top-1 accuracy, %")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    return {"held_out.png": ("held-out accuracy while the seeds train", _png(drawing))}
