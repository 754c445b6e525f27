"""Pictures of what was measured, as PNG bytes that repeat."""

import io
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modelstock.geometry import centre, shell
from modelstock.geometry.groups import KINDS
from modelstock.geometry.measure import Geometry
from modelstock.geometry.tables import step_rows
from modelstock.merging.kernels import Float
from modelstock.merging.methods.model_stock import stock_ratio

COLOURS = dict(
    zip(
        KINDS,
        ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:gray", "tab:olive", "tab:brown"),
        strict=True,
    )
)
CURVES = (1, 2, 3, 5, 100)  # numbers of seeds whose t(theta) is drawn


def _png(drawing: Figure) -> bytes:
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _cosines(geometry: Geometry, drawing: Figure) -> None:
    """Mean cosine by type and block; blocks of the same number in several towers share a column."""
    numbers = sorted({geometry.groups[name].number for name in geometry.counted})
    kinds = [kind for kind in KINDS if any(geometry.groups[name].kind == kind for name in geometry.counted)]
    drawing.set_size_inches(max(5.0, 2.6 + 0.34 * len(numbers)), 1.6 + 0.36 * len(kinds))
    cosine = dict(zip(geometry.counted, shell.cosine(geometry.stack()).tolist(), strict=True))
    cells = np.full((len(kinds), len(numbers)), np.nan)
    for row, kind in enumerate(kinds):
        for column, number in enumerate(numbers):
            values = [
                cosine[name]
                for name in geometry.counted
                if geometry.groups[name].kind == kind and geometry.groups[name].number == number
            ]
            if values:
                cells[row, column] = np.mean(values)
    axes = drawing.subplots()
    picture = axes.imshow(cells, cmap="viridis", aspect="auto", vmin=min(0.0, float(np.nanmin(cells))), vmax=1)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    behind = max(group.blocks for group in geometry.groups.values())
    names = ["before" if n < 0 else "behind" if n == behind else str(n) for n in numbers]
    axes.set_xticks(range(len(numbers)), names, fontsize=7, rotation=90 if len(numbers) > 14 else 0)
    axes.set_xlabel("block")
    drawing.colorbar(picture, label="mean cosine over pairs")


def _norms(geometry: Geometry, drawing: Figure) -> None:
    """Each tensor's norms in the order of the model: the mean over seeds, and a line from the least to the largest."""
    drawing.set_size_inches(9.0, 4.4)
    axes = drawing.subplots()
    names = [name for block in geometry.units("block").values() for name in block]
    norms = shell.norms(geometry.stack(names))
    for kind, colour in COLOURS.items():
        at = [place for place, name in enumerate(names) if geometry.groups[name].kind == kind]
        if at:
            means = norms[at].mean(axis=1)
            axes.vlines(at, norms[at].min(axis=1), norms[at].max(axis=1), color=colour, alpha=0.8, linewidth=2)
            axes.scatter(at, means, s=9, color=colour, label=kind, zorder=3)
    axes.set_yscale("log")
    axes.set_xlabel("tensor, in the order of the model")
    axes.set_ylabel("norm of the update, seeds' mean and range")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _ratios(geometry: Geometry, drawing: Figure) -> None:
    """t(theta) for several numbers of seeds, these seeds' among them, and each tensor at its mean angle and its t."""
    drawing.set_size_inches(7.4, 4.8)
    axes = drawing.subplots()
    theta = np.linspace(0, 90, 361)
    stack = geometry.stack()
    for count in sorted({*CURVES, stack.count}):
        ratio = np.maximum(0, stock_ratio(np.cos(np.radians(theta)), count))
        axes.plot(theta, ratio, color="0.7", linewidth=1, zorder=1)
        at = int(np.abs(ratio - 0.5).argmin())
        axes.annotate(f"N = {count}", (theta[at], ratio[at]), fontsize=7, color="0.4")
    angle, ratio = shell.angles(stack).mean(axis=1), shell.applied(stack)
    for kind, colour in COLOURS.items():
        at_kind = [place for place, name in enumerate(geometry.counted) if geometry.groups[name].kind == kind]
        if at_kind:
            axes.scatter(angle[at_kind], ratio[at_kind], s=13, color=colour, label=kind, alpha=0.7, zorder=2)
    axes.set_xlim(0, max(95.0, float(angle.max()) + 3))
    axes.set_xlabel("mean angle between updates, degrees")
    axes.set_ylabel(f"t of {stack.count} seeds")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower left")


def triangle(geometry: Geometry) -> dict[str, Float]:
    """Points (x, y) in the plane of the anchor (the origin) and the first two seeds, of the whole model, to scale.

    Model Stock of the two, each tensor with its own t, and the centre lie beside the plane: their projections on it.
    """
    stack = geometry.stack()
    whole = stack.whole()
    gram = whole.seeds[0, :2, :2]
    first = np.sqrt(gram[0, 0])
    basis = np.array([[first, 0.0], [gram[0, 1] / first, np.sqrt(max(0.0, gram[1, 1] - gram[0, 1] ** 2 / gram[0, 0]))]])

    def projected(inner: Float) -> Float:
        """The point whose inner products with the two updates are these."""
        return np.asarray(np.linalg.lstsq(basis, inner, rcond=None)[0])

    pair = stack.seeds[:, :2, :2]
    between = pair[:, 0, 1] / np.sqrt(pair[:, 0, 0] * pair[:, 1, 1])
    ratio = np.clip(stock_ratio(between, 2), 0, 1)
    points = {
        "w0": np.zeros(2),
        f"seed {geometry.seeds[0]}": basis[0],
        f"seed {geometry.seeds[1]}": basis[1],
        "mean": basis.mean(axis=0),
        "Model Stock": projected(np.einsum("t,tij->i", ratio / 2, pair)),
    }
    references = slice(stack.count, None) if stack.has_centre else slice(2, None)
    if whole.grams[0, 0, references].size:
        points["centre"] = projected(whole.grams[0, :2, references].mean(axis=1))
    return points


def _triangle(geometry: Geometry, drawing: Figure) -> None:
    drawing.set_size_inches(6.4, 5.4)
    axes = drawing.subplots()
    points = triangle(geometry)
    one, two = (f"seed {label}" for label in geometry.seeds[:2])
    for ends in (("w0", one), ("w0", two), ("w0", "mean"), (one, two)):
        x, y = np.array([points[end] for end in ends]).T
        axes.plot(x, y, color="0.8", linewidth=1, zorder=1)
    markers = {
        "w0": ("*", "black"),
        "mean": ("s", "tab:blue"),
        "Model Stock": ("o", "tab:red"),
        "centre": ("X", "tab:green"),
    }
    for name, (x, y) in points.items():
        marker, colour = markers.get(name, ("o", "dimgray"))
        axes.scatter(x, y, marker=marker, color=colour, s=70, zorder=2)
        place = (-7, -12) if name == "centre" else (7, 4)  # it lies near Model Stock where the formula is right
        axes.annotate(name, (x, y), xytext=place, textcoords="offset points", fontsize=8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.grid(alpha=0.25)
    axes.set_xlabel("distance from the anchor, whole model")


def _oracles(geometry: Geometry, drawing: Figure) -> None:
    """The formula's t of two seeds against the t that comes nearest to the centre, a dot per tensor."""
    drawing.set_size_inches(5.6, 5.2)
    axes = drawing.subplots()
    pair = centre.around(geometry.stack(), 2)
    formula, oracle = pair.ratio.mean(axis=1), pair.oracle.mean(axis=1)
    for kind, colour in COLOURS.items():
        at = [place for place, name in enumerate(geometry.counted) if geometry.groups[name].kind == kind]
        if at:
            axes.scatter(oracle[at], formula[at], s=13, color=colour, label=kind, alpha=0.7, zorder=2)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=1)
    axes.set_xlabel("oracle t of 2, mean over pairs")
    axes.set_ylabel("the formula's t of 2, mean over pairs")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="upper left")


Drawer = Callable[[Geometry, Figure], None]
DRAWERS: dict[str, tuple[str, Drawer]] = {  # file -> what it shows, and what draws it
    "cosine.png": ("mean cosine between updates, by type of tensor and block", _cosines),
    "norms.png": ("norms of the updates, tensor by tensor", _norms),
    "ratio.png": ("t by the angle for N = 1, 2, 3, 5, 100, and each tensor's", _ratios),
    "triangle.png": ("anchor, two seeds, their mean, Model Stock and the centre, to scale", _triangle),
}


def figures(geometry: Geometry, steps: Mapping[int, Geometry] | None = None) -> dict[str, tuple[str, bytes]]:
    """File -> what it shows, and the PNG. `steps`: the seeds at several steps, for one more."""
    drawers = dict(DRAWERS)
    stack = geometry.stack()
    if stack.count >= centre.seeds_needed(stack, 2, references=1):
        drawers["oracle.png"] = ("the formula's t of two seeds against the oracle's", _oracles)
    pictures = {}
    for name, (title, drawer) in drawers.items():
        drawing = Figure(dpi=110, layout="constrained")
        drawer(geometry, drawing)
        pictures[name] = (title, _png(drawing))
    if steps:
        pictures["steps.png"] = ("norms and angles at every step", _png(_over_steps(steps)))
    return pictures


def _over_steps(steps: Mapping[int, Geometry]) -> Figure:
    """Every seed's norm and every pair's angle by step, the whole model."""
    drawing = Figure(figsize=(9.0, 3.8), dpi=110, layout="constrained")
    left, right = drawing.subplots(1, 2)
    wholes = {step: geometry.stack().whole() for step, geometry in steps.items()}
    _lines(left, list(steps), np.array([shell.norms(whole)[0] for whole in wholes.values()]))
    left.set_ylabel("norm of the update, a line per seed")
    left.set_ylim(bottom=0)
    _lines(right, list(steps), np.array([shell.angles(whole)[0] for whole in wholes.values()]))
    right.plot(list(steps), [row["angle_mean"] for row in step_rows(steps)], color="black", linewidth=1)
    right.set_ylabel("angle, degrees, a line per pair")
    return drawing


def _lines(axes: Axes, steps: list[int], values: Float) -> None:
    axes.plot(steps, values, ".-", color="tab:blue", alpha=0.5, linewidth=1)
    axes.set_xticks(steps)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
