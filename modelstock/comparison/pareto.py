"""The Pareto front: what no other weight set equals or beats in everything."""

from collections.abc import Sequence

import numpy as np


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other one dominates, by falling first coordinate; equal points stay together.

    One dominates another if it is at least as good in both coordinates and better in one.
    """
    values = np.asarray(points, np.float64).reshape(-1, 2)
    at_least = (values[:, None] >= values[None]).all(axis=2)
    better = (values[:, None] > values[None]).any(axis=2)
    dominated = (at_least & better).any(axis=0)
    return sorted(np.flatnonzero(~dominated).tolist(), key=lambda place: (-values[place, 0], place))
