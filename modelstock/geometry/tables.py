"""What was measured, as rows of JSON values: per tensor, type, block and model; lengths, distances and steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modelstock.geometry import centre, shell
from modelstock.geometry.claims import not_enough
from modelstock.geometry.groups import KINDS
from modelstock.geometry.measure import KURTOSIS_NEEDS, Geometry
from modelstock.geometry.stack import Stack
from modelstock.geometry.weight_claims import NO_CENTRE, flag_of, sizes
from modelstock.merging.kernels import Float

Cell = float | str | None


def _cells(function: Callable[[Stack], Float], stack: Stack, need: int) -> list[Cell]:
    """A statistic per tensor, or what stands in its place."""
    tensors = len(stack.grams)
    if stack.count < need:
        return [not_enough(stack.count, need)] * tensors
    return [value if np.isfinite(value) else NO_CENTRE for value in function(stack).tolist()]


def _columns(stack: Stack) -> dict[str, list[Cell]]:
    """Every statistic per tensor (T,), by name."""
    pairs, one, two = shell.angles(stack), {"references": 1}, {"references": 2}
    cosines = np.cos(np.radians(pairs))
    return {
        "norm_mean": shell.norms(stack).mean(axis=1).tolist(),
        "norm_cv": shell.variation(stack).tolist(),
        "cosine_mean": shell.cosine(stack).tolist(),
        "cosine_sd": _cells(lambda part: cosines.std(axis=1, ddof=1), stack, 3),
        "cosine_min": cosines.min(axis=1).tolist(),
        "cosine_max": cosines.max(axis=1).tolist(),
        "angle_mean": pairs.mean(axis=1).tolist(),
        "angle_sd": _cells(shell.angle_spread, stack, 3),
        "ratio": shell.applied(stack).tolist(),
        "ratio_by_angle": shell.applied(stack, by="angle").tolist(),
        "ratio_of_2": shell.applied(stack, 2).tolist(),
        "oracle_ratio_of_2": _cells(
            lambda part: centre.around(part, 2).oracle.mean(axis=1), stack, centre.seeds_needed(stack, 2, **one)
        ),
        "ratio_bias": _cells(centre.bias, stack, centre.seeds_needed(stack, 2, **one)),
        "ratio_rmse": _cells(
            lambda part: np.sqrt(np.maximum(0, centre.mean_square(part))), stack, centre.seeds_needed(stack, 2, **two)
        ),
        "distance_to_centre": _cells(
            lambda part: np.sqrt(np.maximum(0, centre.around(part, 1).distance().mean(axis=1))),
            stack,
            centre.seeds_needed(stack, 1, **two),
        ),
        "flag": [flag_of(ratio) for ratio in shell.ratio(stack).tolist()],
    }


def tensor_rows(geometry: Geometry) -> list[dict[str, Any]]:
    """A row per tensor, by name; of one that does not count only the mean norm, and why."""
    names = geometry.counted
    columns = _columns(geometry.stack()) if names else {}
    at = {name: number for number, name in enumerate(names)}
    rows = []
    for name in geometry.grams:
        group, shape = geometry.groups[name], geometry.shapes[name]
        row: dict[str, Any] = {
            "tensor": name,
            "shape": "x".join(map(str, shape)),
            "values": int(np.prod(shape)),
            "type": group.kind,
            "block": group.block,
            "depth": group.number,
        }
        if name in at:
            row |= {key: values[at[name]] for key, values in columns.items()}
        else:
            norms = shell.norms(geometry.stack([name]))
            row |= dict.fromkeys(columns) | {"norm_mean": float(norms.mean())}
            row["flag"] = geometry.left_out[name]
        rows.append(row)
    return rows


def unit_rows(geometry: Geometry, kind: str) -> list[dict[str, Any]]:
    """A row per "type" or "block", one for the "model": means over its tensors, and all of it as one vector."""
    units = {"model": list(geometry.counted)} if kind == "model" else geometry.units(kind)
    if kind == "type":
        units = {name: units[name] for name in KINDS if name in units}
    return [_unit_row(geometry, unit, names) for unit, names in units.items()]


def _unit_row(geometry: Geometry, unit: str, names: Sequence[str]) -> dict[str, Any]:
    stack = geometry.stack(names)
    means: dict[str, Cell] = {}
    for key, values in _columns(stack).items():
        numbers = [value for value in values if isinstance(value, float)]
        if key == "ratio_rmse" and numbers:  # the square is unbiased, not its root
            means[key] = _known(centre.root_mean_square(stack))
        elif key != "flag":
            means[key] = float(np.mean(numbers)) if numbers else values[0]
    whole = stack.whole()
    kurtosis: Cell = not_enough(stack.count, KURTOSIS_NEEDS)
    if stack.count >= KURTOSIS_NEEDS:
        value = centre.kurtosis(stack)
        kurtosis = value if np.isfinite(value) else None  # too few directions in tensors this small
    return {
        "unit": unit,
        "tensors": len(names),
        "values": int(sum(np.prod(geometry.shapes[name]) for name in names)),
        "mean over tensors": means,
        "kurtosis": kurtosis,
        "as one": {
            **{key: values[0] for key, values in _columns(whole).items()},
            "norms": shell.norms(whole)[0].tolist(),
            "residuals to the centre, rms cosine": _residuals(whole, 1),
            "residuals of pairs, rms cosine": _residuals(whole, 2),
            "inner products": whole.grams[0].tolist(),
        },
    }


def _known(value: float) -> Cell:
    return value if np.isfinite(value) else NO_CENTRE


def _residuals(stack: Stack, size: int) -> Cell:
    """Root mean square cosine of residuals to the centre's update (size 1) or between two (size 2)."""
    need = centre.seeds_needed(stack, size, references=2)
    if stack.count < need:
        return not_enough(stack.count, need)
    cosines = centre.residuals_to_centre(stack) if size == 1 else centre.residual_pairs(stack)[1]
    return _known(centre.root_mean_square_of(cosines))


def ratio_rows(geometry: Geometry) -> list[dict[str, Any]]:
    """The formula's t of n seeds against the oracle's, means over tensors and subsets."""
    stack = geometry.stack()
    rows: list[dict[str, Any]] = []
    for size in sizes(stack.count):
        one, two = (centre.seeds_needed(stack, size, references=references) for references in (1, 2))
        row: dict[str, Any] = {"n": size, "ratio": float(shell.applied(stack, size).mean())}
        row |= dict.fromkeys(("oracle", "bias"), not_enough(stack.count, one))
        row["rmse"] = not_enough(stack.count, two)
        if stack.count >= one:
            subset = centre.around(stack, size)
            row |= {"ratio": float(subset.ratio.mean()), "oracle": _known(float(subset.oracle.mean()))}
            row["bias"] = _known(float(centre.bias(stack, size).mean()))
        if stack.count >= two:
            row["rmse"] = _known(centre.root_mean_square(stack, size))
        rows.append(row)
    return rows


def length_rows(geometry: Geometry) -> list[dict[str, Any]]:
    """Lengths of the means of n seeds, the whole model: measured over subsets, and by the formula."""
    whole = geometry.stack().whole()
    rows = []
    for size in (1, *sizes(whole.count)):
        measured = shell.lengths(whole, size)[0]
        rows.append(
            {
                "n": size,
                "subsets": len(measured),
                "length": float(measured.mean()),
                "smallest": float(measured.min()),
                "largest": float(measured.max()),
                "formula": float(shell.expected_length(whole, size)[0]),
            }
        )
    return rows


def distance_rows(geometry: Geometry) -> list[dict[str, Any]]:
    """Distances to the centre, root mean squares over subsets, of the whole model; also in units of a single seed's."""
    stack = geometry.stack()
    rows: list[dict[str, Any]] = []
    for size in (1, *sizes(stack.count)):
        need = centre.seeds_needed(stack, size, references=2)
        if stack.count < need:
            if size <= 2:
                rows.append({"what": _what("mean", size), "distance": not_enough(stack.count, need)})
            continue
        subset = centre.around(stack, size)
        if size == 1:
            rows.append(_distance_row("anchor", subset.distance(0.0)))
        rows.append(_distance_row(_what("mean", size), subset.distance()))
        if size > 1:
            rows.append(_distance_row(_what("Model Stock", size), subset.distance(subset.ratio)))
    single = next((row["distance"] for row in rows if row["what"] == _what("mean", 1)), None)
    for row in rows:
        known = isinstance(row["distance"], float) and isinstance(single, float)
        row["of a seed's"] = row["distance"] / single if known else row["distance"]
    return rows


def _what(method: str, size: int) -> str:
    return "single seed" if size == 1 else f"{method} of {size}"


def _distance_row(what: str, squares: Float) -> dict[str, Any]:
    square = float(squares.sum(axis=0).mean())
    return {"what": what, "distance": float(np.sqrt(square)) if square > 0 else NO_CENTRE}


def step_rows(steps: Mapping[int, Geometry]) -> list[dict[str, Any]]:
    """A row per step: norms and angles of the whole model, and their spread, mean over tensors."""
    rows = []
    for step, geometry in steps.items():
        stack = geometry.stack()
        whole = stack.whole()
        rows.append(
            {
                "step": step,
                "seeds": stack.count,
                "norm_mean": float(shell.norms(whole).mean()),
                "norm_cv": float(shell.variation(stack).mean()),
                "angle_mean": float(shell.angles(whole).mean()),
                "angle_sd": float(shell.angle_spread(stack).mean()) if stack.count > 2 else not_enough(stack.count, 3),
                "ratio_of_2": float(shell.applied(whole, 2)[0]),
            }
        )
    return rows
