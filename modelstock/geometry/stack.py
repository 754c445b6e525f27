"""Inner products of several tensors on top of each other, and what follows from leaving one seed out of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from modelstock.geometry.claims import Quantity, not_enough
from modelstock.merging.kernels import Float

# The 0.975 quantile of Student's t for 1, 2, ... degrees of freedom, and of the normal distribution.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Z_975 = 1.959964
SUBSETS = 200  # of one size; of more, this many are drawn


@dataclass(frozen=True, eq=False)
class Stack:
    """`grams`: (T, N + C, N + C) of T tensors, N = `count` seeds under test, C of the centre.

    `projections`: of each tensor that has them, (N, D) on D random directions.
    """

    grams: Float
    count: int
    projections: tuple[Float, ...] = ()
    kept: tuple[int, ...] = ()  # where seeds were left out, the numbers of those that are left, of `out_of`
    out_of: int = 0

    @property
    def seeds(self) -> Float:
        """Inner products (T, N, N) of the seeds under test."""
        return self.grams[:, : self.count, : self.count]

    @property
    def has_centre(self) -> bool:
        """Whether there are seeds of a centre."""
        return bool(self.grams.shape[-1] > self.count)

    def subsets(self, size: int) -> NDArray[np.bool_]:
        """Subsets of a size (S, N), each a row: all of them, or SUBSETS drawn at random, the same in every call.

        Where seeds were left out they are those without them, so that no other draw adds to what leaving out changes.
        """
        members = _subsets(self.out_of or self.count, size)
        if self.kept:
            members = members[:, list(self.kept)]
            members = members[members.sum(axis=1) == size]
        return members

    def without(self, seed: int) -> "Stack":
        """The same without one of the seeds under test."""
        grams = np.delete(np.delete(self.grams, seed, axis=1), seed, axis=2)
        numbers = self.kept or tuple(range(self.count))
        return Stack(
            grams,
            self.count - 1,
            tuple(np.delete(part, seed, axis=0) for part in self.projections),
            kept=numbers[:seed] + numbers[seed + 1 :],
            out_of=self.out_of or self.count,
        )

    def whole(self) -> "Stack":
        """All tensors as one: what the model as a whole has."""
        return replace(self, grams=self.grams.sum(axis=0, keepdims=True))


@cache
def _subsets(seeds: int, size: int) -> NDArray[np.bool_]:
    if comb(seeds, size) <= SUBSETS:
        chosen = [list(members) for members in combinations(range(seeds), size)]
    else:
        random = np.random.default_rng([seeds, size])
        chosen = [random.permutation(seeds)[:size].tolist() for _ in range(SUBSETS)]
    members = np.zeros((len(chosen), seeds), dtype=bool)
    for row, numbers in zip(members, chosen, strict=True):
        row[numbers] = True
    return members


def student_t(degrees: int) -> float:
    """The 0.975 quantile of Student's t, right to 0.001.

    Source: beyond the table the first terms of Abramowitz, Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def estimate(
    name: str,
    statistic: Callable[[Stack], float],
    stack: Stack,
    *,
    need: int,
    unit: str = "",
    least: float = -np.inf,
    undefined: str = "undefined",
) -> Quantity:
    """A statistic of seeds, with its interval by the jackknife: each seed is left out once.

    Standard error: sqrt((N - 1) / N * sum_i (s_i - mean s)^2), s_i the statistic without seed i; times Student's t of
    N - 1. There is an interval from `need` + 1 seeds on. `least`: no value can be below. `undefined`: stands where the
    statistic is NaN.

    Source: Efron, Stein, The Annals of Statistics 9 (1981).
    """
    count = stack.count
    if count < need:
        return Quantity(name=name, value=None, unit=unit, text=not_enough(count, need))
    value = statistic(stack)
    if not np.isfinite(value):
        return Quantity(name=name, value=None, unit=unit, text=undefined)
    if count <= need:
        text = f"an interval: {not_enough(count, need + 1)}"
        return Quantity(name=name, value=value, unit=unit, text=text)
    left_out = np.array([statistic(stack.without(seed)) for seed in range(count)])
    if not np.isfinite(left_out).all():
        return Quantity(name=name, value=value, unit=unit, text="an interval: undefined without one of the seeds")
    error = float(np.sqrt((count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)))
    half = student_t(count - 1) * error
    return Quantity(
        name=name, value=value, low=max(least, value - half), high=value + half, over=f"{count} seeds", unit=unit
    )
