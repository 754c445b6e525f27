"""What differs between the tensors of two models, in words: what is missing, unknown, or of another shape or dtype."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from modelstock.errors import closest
from modelstock.weights.layout import is_counter
from modelstock.weights.tensors import FLOATS, StoredTensor


class Shaped(Protocol):
    """An array of numpy or torch, or a tensor in a file."""

    @property
    def shape(self) -> Any:
        """Its sizes, axis by axis."""


def differences(tensors: Mapping[str, Shaped], expected: Mapping[str, Shaped], *, whose: str) -> list[str]:
    """A line per tensor that is missing, unknown (with the missing one whose name is nearest) or of another shape.

    `whose` are the expected tensors: "the anchor's". Other shapes come first, then what is missing, then the unknown;
    each by name.
    """
    missing = sorted(expected.keys() - tensors.keys())
    shapes = {name: (tuple(tensors[name].shape), tuple(expected[name].shape)) for name in tensors if name in expected}
    lines = [f"{name} is {got}, {whose} {wanted}" for name, (got, wanted) in sorted(shapes.items()) if got != wanted]
    lines += [f"{name} missing" for name in missing]
    for name in sorted(tensors.keys() - expected.keys()):
        near = closest(name, missing)
        lines.append(f"{name} unknown" + (f" (near {near})" if near else ""))
    return lines


def stored_differences(
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, StoredTensor],
    *,
    whose: str,
    compared: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """`differences`, and a line per tensor of another dtype or with other integers, of the names that are `compared`.

    Floating dtypes may differ among each other. Integer and boolean buffers must be equal, for there is no mean of
    them; BatchNorm's counters may differ.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if compared(name)}
    expected = {name: tensor for name, tensor in expected.items() if compared(name)}
    lines = differences(tensors, expected, whose=whose)
    for name in sorted(tensors.keys() & expected.keys()):
        got, wanted = tensors[name], expected[name]
        if got.shape != wanted.shape or (got.dtype in FLOATS and wanted.dtype in FLOATS):
            continue
        if got.dtype != wanted.dtype:
            lines.append(f"{name} is {got.dtype}, {whose} {wanted.dtype}")
        elif not is_counter(name) and not got.equals(wanted):
            lines.append(f"{name} is an integer buffer that differs from {whose}")
    return lines
