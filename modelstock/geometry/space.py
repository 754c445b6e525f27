"""The anchor, the seeds and their centre as points of one space: blends of them, and distances from the centre.

The centre is the mean of seeds set aside for it or, for want of these, of the seeds that a weight set is not made of.
Either way no seed is in both, and squared distances are corrected for the spread of the few seeds in the mean, so they
estimate without bias those from the mean of seeds without number.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from modelstock.geometry.claims import not_enough
from modelstock.merging.engine import FirstPass, plan_merge
from modelstock.merging.kernels import Float
from modelstock.merging.methods.blend import pair_cosines
from modelstock.merging.methods.model_stock import stock_ratio
from modelstock.merging.plan import Plan
from modelstock.merging.searches import Trials
from modelstock.notices import Notice
from modelstock.weights.tensors import Checkpoint, in_memory
from modelstock.weights.weight_set import LazyArrays, WeightSet


def checkpoint_of(weights: WeightSet) -> Checkpoint:
    """A weight set as merging reads it; one that is read when it is asked for stays so."""
    if isinstance(weights.tensors, LazyArrays):
        return Checkpoint(weights.tensors.stored, weights.meta, weights.source)
    return in_memory(weights.tensors, weights.meta, weights.source)


@dataclass(frozen=True)
class Distance:
    """From the centre, in units of the mean norm of a seed's update: of the whole model, and the median tensor's."""

    whole: float
    median_tensor: float


def merge_plan(method: str, anchor: Checkpoint, tuned: Sequence[Checkpoint], **more: Any) -> Plan:
    """A merge's plan without its notices: they are about the seeds, and were given when those were merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return plan_merge(method, anchor, tuned, **more)


class Span:
    """The anchor plus any blend of some checkpoints' updates, computed when it is read."""

    def __init__(self, anchor: Checkpoint, tuned: Mapping[int, Checkpoint]) -> None:
        plan = merge_plan("uniform", anchor, list(tuned.values()))
        self._trials = Trials(plan)
        keys = {id(checkpoint): key for key, checkpoint in tuned.items()}
        self._order = [keys[id(checkpoint)] for checkpoint in plan.tuned]

    @property
    def names(self) -> list[str]:
        """The tensors that are blended."""
        return self._trials.names

    def blend(self, shares: Mapping[int, float], scales: Mapping[str, float] | None = None) -> Checkpoint:
        """w0 + scale * sum_i share_i v_i; `scales`: by tensor, 1 where it is not given."""
        row = np.array([shares.get(key, 0.0) for key in self._order])
        scales = scales or {}
        return self._trials.with_shares({name: scales.get(name, 1.0) * row for name in self.names}).as_checkpoint()


class Space:
    """`seeds`: those under test. `centre`: seeds that were set aside for the centre; none, or two and more."""

    def __init__(
        self, anchor: Checkpoint, seeds: Mapping[int, Checkpoint], centre: Mapping[int, Checkpoint] | None = None
    ) -> None:
        self.anchor, self.seeds, self.set_aside = anchor, dict(seeds), dict(centre or {})
        self.span = Span(anchor, self.seeds)
        self._towards: dict[tuple[int, ...], Checkpoint] = {}

    @cached_property
    def centre(self) -> Checkpoint:
        """The mean of the seeds set aside, in memory."""
        return in_memory(LazyArrays(self.centre_span.blend(self._equal(list(self.set_aside)))), {}, "the centre")

    @cached_property
    def centre_span(self) -> Span:
        """Blends of the seeds set aside."""
        return Span(self.anchor, self.set_aside)

    @cached_property
    def grams(self) -> dict[str, Float]:
        """Tensor -> inner products (N, N) of the updates of the seeds under test, in their order."""
        return self.inner_products(list(self.seeds.values()))

    def inner_products(self, tuned: Sequence[Checkpoint], *, pairs: bool = True) -> dict[str, Float]:
        """Tensor -> inner products (N, N) of updates; without `pairs`, those of two are all set to their mean."""
        first_pass = FirstPass(
            anchor=self.anchor, tuned=tuned, of="updates", pairs=pairs, by_filter=False, progress=lambda values: None
        )
        return {name: gram[0] for name, gram in first_pass.inner_products(self.span.names, 1).items()}

    def gram(self, members: Sequence[int]) -> Float:
        """Inner products (n, n) of the whole updates of some seeds."""
        places = [list(self.seeds).index(member) for member in members]
        total: Float = sum((gram[np.ix_(places, places)] for gram in self.grams.values()), np.zeros(()))
        return total

    def cosine(self, members: Sequence[int]) -> float:
        """The mean cosine between the whole updates of any two of these seeds."""
        return float(pair_cosines(self.gram(members)).mean())

    def stock_scale(self, members: Sequence[int]) -> float:
        """Model Stock's ratio where there is one for the whole model."""
        return float(stock_ratio(self.cosine(members), len(members)))

    def slerp_scale(self, members: Sequence[int]) -> float:
        """How far two updates' mean is scaled by spherical interpolation: 1 / cos(theta / 2)."""
        return 1 / math.cos(math.acos(self.cosine(members)) / 2)

    def projections(self, members: Sequence[int]) -> dict[str, float]:
        """Tensor -> the scale of these seeds' mean update that comes nearest to the centre; 0 for no update."""
        mean = self.span.blend(self._equal(members))
        grams = self.inner_products([mean, self.centre])
        return {name: float(gram[0, 1] / gram[0, 0]) if gram[0, 0] else 0.0 for name, gram in grams.items()}

    def plane_projection(self, first: int, second: int) -> tuple[float, float]:
        """The centre's projection on the plane through anchor and two seeds: w0 + a v_1 + b v_2 -> (a, b)."""
        grams = self.inner_products([self.seeds[first], self.seeds[second], self.centre])
        gram = sum(grams.values(), np.zeros(()))
        a, b = np.linalg.solve(gram[:2, :2], gram[:2, 2])
        return float(a), float(b)

    @cached_property
    def unit(self) -> dict[str, float]:
        """Tensor -> the mean squared norm of a seed's update."""
        return {name: float(np.diag(gram).mean()) for name, gram in self.grams.items()}

    @cached_property
    def _spread(self) -> dict[str, tuple[float, float]]:
        """Tensor -> squared norm of the centre's update, and of a seed's residual from it, both without bias."""
        tuned = list(self.set_aside.values()) or list(self.seeds.values())
        grams = self.inner_products(tuned, pairs=False)
        return {name: (float(gram[0, 1]), float(np.diag(gram).mean() - gram[0, 1])) for name, gram in grams.items()}

    @property
    def radii(self) -> dict[str, float]:
        """Tensor -> the root mean square of a seed's distance from the centre."""
        return {name: math.sqrt(max(0.0, square)) for name, (_, square) in self._spread.items()}

    def distance(self, point: Checkpoint, members: Sequence[int]) -> Distance | str:
        """From the centre; a text where there are too few seeds outside of `members`."""
        if self.set_aside:
            toward = self.centre
        else:
            others = tuple(seed for seed in self.seeds if seed not in members)
            if not others or len(self.seeds) < 3:
                return not_enough(len(self.seeds), max(3, len(members) + 1))
            if others not in self._towards:
                self._towards[others] = self.span.blend(self._equal(others))
            toward = self._towards[others]
        grams = self.inner_products([point, toward])
        squares = {name: gram[0, 0] - 2 * gram[0, 1] + self._spread[name][0] for name, gram in grams.items()}
        return self._in_units(squares)

    def distance_of_centre(self) -> Distance:
        """Of the mean of the seeds set aside itself: what is left of their spread in it."""
        return self._in_units({name: square / len(self.set_aside) for name, (_, square) in self._spread.items()})

    def _in_units(self, squares: Mapping[str, float]) -> Distance:
        # An estimate without bias may lie below zero, where the distance itself cannot.
        moved = [name for name in squares if self.unit[name] > 0]
        shares = [math.sqrt(max(0.0, squares[name]) / self.unit[name]) for name in moved]
        whole = max(0.0, sum(squares.values())) / sum(self.unit.values())
        return Distance(math.sqrt(whole), float(np.median(shares)))

    @staticmethod
    def _equal(members: Sequence[int]) -> dict[int, float]:
        return dict.fromkeys(members, 1 / len(members))
