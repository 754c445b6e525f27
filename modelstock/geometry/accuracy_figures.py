"""Pictures of where accurate weights lie, as PNG bytes that repeat. Accuracies are in percent."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modelstock.comparison.figures import style_of, title_of
from modelstock.comparison.intervals import Float
from modelstock.geometry.accuracy import TITLES, Scored, at
from modelstock.geometry.accuracy_claims import alpha_curves, sizes_of
from modelstock.geometry.claims import Claim
from modelstock.geometry.questions import pool_pairs, ray_curves
from modelstock.geometry.space import Distance
from modelstock.merging.methods.rows import Style

Picture = tuple[str, bytes]  # what it shows, and the PNG
STYLES = {
    "centre": Style("X", "tab:red"),
    "path": Style(".", "tab:olive"),
    "granularity": Style("s", "tab:cyan"),
    "oracle": Style("h", "tab:pink"),
}
TITLED = {"centre": "centre", "path": "from the anchor to a merge or seed", "oracle": "oracle ratio"}


def png(drawing: Figure) -> bytes:
    """A figure's PNG."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panels(scored: Scored, *, height: float = 4.2) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel per summary."""
    count = len(scored.summaries)
    drawing = Figure(figsize=(5.2 * count + 0.4, height), dpi=100, layout="constrained")
    panels = drawing.subplots(1, count, squeeze=False)[0]
    for summary, axes in zip(scored.summaries, panels, strict=True):
        axes.set_title(TITLES[summary], fontsize=10)
        axes.grid(alpha=0.25)
    return drawing, dict(zip(scored.summaries, panels, strict=True))


def _style(kind: str) -> Style:
    return STYLES.get(kind) or style_of(kind)


def distance_figure(scored: Scored, distances: Mapping[str, Distance | str]) -> dict[str, Picture]:
    """Accuracy against the distance from the centre, by kind of row."""
    known = [
        (place, row.kind, distance.whole)
        for place, row in enumerate(scored.rows)
        if isinstance(distance := distances.get(row.name), Distance)
    ]
    if not known:
        return {}
    drawing, panels = _panels(scored)
    for summary, axes in panels.items():
        values = scored.measured(summary)
        for kind in dict.fromkeys(kind for _, kind, _ in known):
            places = [(distance, 100 * float(values[place])) for place, k, distance in known if k == kind]
            style = _style(kind)
            axes.scatter(
                [distance for distance, _ in places],
                [accuracy for _, accuracy in places],
                marker=style.marker,
                color=style.colour,
                s=90 if len(places) == 1 else 22,
                alpha=0.7,
                label=TITLED.get(kind) or title_of(kind),
            )
        axes.set_xlabel("distance from the centre, in norms of a seed's update")
        axes.set_ylabel("top-1 accuracy, %")
    next(iter(panels.values())).legend(fontsize=7, loc="best")
    return {"distance.png": ("accuracy against the distance from the centre", png(drawing))}


def plane_figure(
    scored: Scored, gram: Float, projection: tuple[float, float] | None, stock: float
) -> dict[str, Picture]:
    """Accuracy in the plane of anchor and two seeds. `stock`: Model Stock's ratio; `projection`: of the centre."""
    places = scored.places("plane")
    if not places:
        return {}
    steps = sorted({float(scored.rows[place].options["a"]) for place in places})
    place_of = {(scored.rows[p].options["a"], scored.rows[p].options["b"]): p for p in places}
    unit = float(np.sqrt(np.diag(gram).mean()))
    # The first update along x; the second where its angle has it.
    axis = np.sqrt(gram[0, 0])
    along, across = gram[0, 1] / axis, np.sqrt(max(0.0, gram[1, 1] - gram[0, 1] ** 2 / gram[0, 0]))

    def to(a: Float | float, b: Float | float) -> tuple[Float, Float]:
        return np.asarray((a * axis + b * along) / unit), np.asarray(b * across / unit)

    grid = np.meshgrid(steps, steps, indexing="ij")
    x, y = to(*grid)
    marks = {"anchor": (0.0, 0.0, "*", "black"), "seeds": (1.0, 0.0, "o", "dimgray")}
    marks |= {
        "uniform soup": (0.5, 0.5, "s", "tab:orange"),
        "Model Stock, one ratio": (stock / 2,) * 2 + ("D", "tab:blue"),
    }
    marks |= {"centre's projection": (*projection, "X", "tab:red")} if projection else {}
    drawing, panels = _panels(scored, height=4.6)
    for summary, axes in panels.items():
        values = 100 * np.array([[scored.measured(summary)[place_of[a, b]] for b in steps] for a in steps])
        filled = axes.contourf(x, y, values, levels=14, cmap="viridis")
        drawing.colorbar(filled, ax=axes, shrink=0.85)
        for label, (a, b, marker, colour) in marks.items():
            axes.scatter(*to(a, b), marker=marker, color=colour, edgecolor="white", s=90, label=label, zorder=3)
        axes.scatter(*to(0.0, 1.0), marker="o", color="dimgray", edgecolor="white", s=90, zorder=3)
        axes.set_aspect("equal")
        axes.set_xlabel("norms of a seed's update")
    next(iter(panels.values())).legend(fontsize=7, loc="upper right")
    return {"plane.png": ("accuracy in the plane through anchor and two seeds", png(drawing))}


def ray_figure(
    scored: Scored, stock: Mapping[tuple[int, ...], float], slerp: Mapping[tuple[int, ...], float]
) -> dict[str, Picture]:
    """Accuracy along w0 + s * mean update of two seeds; `stock`, `slerp`: the s of each by pair."""
    rays, nodes = ray_curves(scored)
    if not rays:
        return {}
    marks = {
        "Model Stock": (float(np.mean([stock[pair] for pair in rays])), "tab:blue"),
        "uniform soup": (1.0, "tab:orange"),
        "SLERP": (float(np.mean([slerp[pair] for pair in rays])), "tab:green"),
    }
    drawing, panels = _panels(scored)
    for summary, axes in panels.items():
        curves = 100 * np.array([scored.measured(summary)[places] for places in rays.values()])
        axes.plot(nodes, curves.T, color="0.8", linewidth=1, zorder=1)
        mean = curves.mean(axis=0)
        axes.plot(nodes, mean, ".-", color="black", label=f"mean of {len(rays)} pairs", zorder=2)
        for label, (s, colour) in marks.items():
            axes.axvline(s, color=colour, linestyle=":", linewidth=1)
            height = float(at(mean, nodes, s))
            axes.scatter([s], [height], color=colour, s=60, label=f"{label}, s = {s:.2f}", zorder=3)
        axes.set_xlabel("s in anchor + s * mean update of two")
        axes.set_ylabel("top-1 accuracy, %")
    next(iter(panels.values())).legend(fontsize=7, loc="lower right")
    return {"ray.png": ("accuracy along the ray through the mean of two seeds", png(drawing))}


def alpha_figure(scored: Scored, cosines: Mapping[int, float]) -> dict[str, Picture]:
    """From the anchor to single seeds on the held-out split and by summary; the seeds' cosine is marked."""
    curves = alpha_curves(scored)
    if not curves:
        return {}
    summaries = ("held-out", *scored.summaries)
    drawing = Figure(figsize=(4.2 * len(summaries), 4), dpi=100, layout="constrained")
    for summary, axes in zip(summaries, drawing.subplots(1, len(summaries), squeeze=False)[0], strict=True):
        for number, (seed, curve) in enumerate(curves.items()):
            alphas, places = zip(*curve, strict=True)
            values = 100 * scored.measured(summary)[list(places)]
            colour = f"C{number % 10}"
            axes.plot(alphas, values, ".-", color=colour, linewidth=1, label=f"seed {seed}")
            height = float(at(values, alphas, cosines[seed]))
            axes.scatter([cosines[seed]], [height], marker="D", color=colour, edgecolor="black", s=45, zorder=3)
        axes.set_title(f"{TITLES[summary]}; diamonds: cosine", fontsize=10)
        axes.set_xlabel("alpha, from anchor to seed")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="lower right")
    return {"alpha.png": ("accuracy between anchor and single seeds", png(drawing))}


def sizes_figure(scored: Scored) -> dict[str, Picture]:
    """Accuracy against the number of seeds, of the uniform soup and Model Stock, with intervals."""
    kinds = [kind for kind in ("uniform", "model_stock") if len(sizes_of(scored, kind)) > 2]
    if not kinds:
        return {}
    drawing, panels = _panels(scored)
    for summary, axes in panels.items():
        for shift, kind in enumerate(kinds):
            style, sizes = style_of(kind), sizes_of(scored, kind)
            numbers = [scored.accuracy("", scored.of_size(kind, size), summary) for size in sizes]
            centres = np.array([number.value for number in numbers], np.float64)
            ends = np.array([[number.low, number.high] for number in numbers], np.float64)
            errors = np.abs(ends.T - centres)
            places = np.array(sizes) + 0.06 * shift
            axes.errorbar(
                places, centres, errors, fmt=f"{style.marker}-", color=style.colour, capsize=3, label=title_of(kind)
            )
        axes.set_xlabel("seeds merged")
        axes.set_ylabel("top-1 accuracy, %")
    next(iter(panels.values())).legend(fontsize=8, loc="lower right")
    return {"sizes.png": ("accuracy against the number of seeds", png(drawing))}


def noise_figure(scored: Scored) -> dict[str, Picture]:
    """Seeds beside the centre with noise as large as a seed's residual."""
    if not scored.places("noise"):
        return {}
    groups = {
        "seeds": scored.places("seed"),
        "centre + isotropic": scored.places("noise", of="isotropic"),
        "centre + covariance": scored.places("noise", of="covariance"),
        "centre": scored.places("centre"),
    }
    drawing, panels = _panels(scored)
    for summary, axes in panels.items():
        for column, places in enumerate(groups.values()):
            values = 100 * scored.measured(summary)[places]
            axes.scatter(column + np.linspace(-0.12, 0.12, len(values)), values, color=f"C{column}", s=25)
            axes.hlines(values.mean(), column - 0.25, column + 0.25, color=f"C{column}")
        axes.set_xticks(range(len(groups)), list(groups), fontsize=7)
        axes.set_ylabel("top-1 accuracy, %")
    return {"noise.png": ("seeds beside the centre with noise", png(drawing))}


def intervals_figure(claim: Claim | None, file: str, title: str) -> dict[str, Picture]:
    """The numbers of a claim that are in points, with their intervals."""
    quantities = claim.quantities if claim else ()
    numbers = [(number, number.value) for number in quantities if number.unit == "points" and number.value is not None]
    if not numbers:
        return {}
    drawing = Figure(figsize=(8, 0.9 + 0.3 * len(numbers)), dpi=100, layout="constrained")
    axes = drawing.subplots()
    for height, (number, value) in enumerate(numbers):
        if number.low is not None and number.high is not None:
            axes.plot([number.low, number.high], [height, height], color="tab:blue", alpha=0.6)
        axes.scatter([value], [height], color="tab:blue", s=30)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(numbers)), [number.name for number, _ in numbers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("points")
    axes.grid(alpha=0.25)
    return {file: (title, png(drawing))}


def failure_figure(scored: Scored) -> dict[str, Picture]:
    """Gain of Model Stock over the uniform soup against the cosine of the two, by pool."""
    pools = pool_pairs(scored)
    if not pools:
        return {}
    drawing, panels = _panels(scored)
    for summary, axes in panels.items():
        values = 100 * scored.measured(summary)
        for number, (pool, pairs) in enumerate(pools.items()):
            cosines, gains = [c for c, _, _ in pairs], [values[stock] - values[uniform] for _, stock, uniform in pairs]
            axes.scatter(cosines, gains, s=22, color=f"C{number % 10}", label=pool)
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set_xlabel("cosine between the two updates")
        axes.set_ylabel("Model Stock minus uniform soup, points")
    next(iter(panels.values())).legend(fontsize=7, loc="best")
    return {"failure_map.png": ("gain over the uniform soup against the cosine, by pool", png(drawing))}


def accuracy_figures(
    scored: Scored, distances: Mapping[str, Distance | str], claims: Sequence[Claim]
) -> dict[str, Picture]:
    """Those that need no weights, by file."""
    by_key = {claim.key: claim for claim in claims}
    return {
        **distance_figure(scored, distances),
        **sizes_figure(scored),
        **noise_figure(scored),
        **intervals_figure(by_key.get("granularity"), "granularity.png", "other units of the ratio against tensors"),
        **failure_figure(scored),
    }
