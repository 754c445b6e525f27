"""Coefficients that are found by scoring merges, which are made in memory for that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from modelstock.errors import MergeError
from modelstock.merging.kernels import Array, Float
from modelstock.merging.methods.table import METHODS
from modelstock.merging.plan import Plan
from modelstock.weights.tensors import Checkpoint, in_memory
from modelstock.weights.weight_set import LazyArrays, WeightSet

# Accuracies of weight sets on the held-out split, in one pass over it.
Scorer = Callable[[Sequence[WeightSet]], Sequence[float]]
# The held-out loss of a weight set and its gradient by tensor name.
Gradient = Callable[[WeightSet], tuple[float, Mapping[str, Array]]]


class Trials:
    """Merges of one plan with any shares of the updates: tensor -> (N,)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = [name for name in sorted(plan.chosen) if plan.anchor.tensors[name].size]
        self.options = {name: value for name, value in plan.options.items() if name != "scale"}

    def with_shares(self, shares: Mapping[str, Float]) -> Plan:
        """The plan that merges by these shares; running statistics are averaged over those that have one."""
        scale = self.plan.options["scale"]
        used = np.any([shares[name] != 0 for name in self.names], axis=0)
        averaged = dict.fromkeys(self.plan.coefficients, (used / max(1, used.sum()))[None])
        return replace(self.plan, coefficients={**averaged, **{n: scale * shares[n][None] for n in self.names}})

    def merged(self, shares: Mapping[str, Float]) -> WeightSet:
        """The merge by these shares, in memory."""
        return self.weights(self.with_shares(shares).tensors())

    def weights(self, tensors: Mapping[str, Array]) -> WeightSet:
        """The weight set of a trial."""
        return WeightSet(tensors, self.plan.anchor.meta, f"a trial of {self.plan.method}")


class RunningMean:
    """Plans of merges whose members have equal shares, the same for every tensor, for members that grow one by one.

    The mean of the members that two merges in a row have in common is kept, in float64, and taken as one checkpoint:
    so a greedy soup's candidate costs a pass over it and that mean, however large the soup is. Sums round in another
    order than those of a plan that names each member: a trial can differ from it by a float32's last bit.
    """

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._kept: frozenset[int] = frozenset()  # members of the mean
        self._mean: Checkpoint | None = None
        self._last: frozenset[int] = frozenset()  # members of the merge before

    def plan(self, shares: Float) -> Plan:
        """The plan of the merge by these shares (N,)."""
        members = frozenset(np.flatnonzero(shares).tolist())
        if len({shares[member] for member in members}) != 1:
            return self._trials.with_shares(dict.fromkeys(self._trials.names, shares))
        common, self._last = members & self._last, members
        if not self._kept <= members:
            self._kept, self._mean = frozenset(), None
        if len(common) > max(1, len(self._kept)):
            mean = replace(self._by_share(common, 1 / len(common), scale=1.0), dtype="F64")
            tensors = {name: mean.tensor(name) for name in mean.coefficients}
            self._kept, self._mean = common, in_memory(tensors, {}, "the mean of the soup")
        (share,) = {float(shares[member]) for member in members}
        return self._by_share(members, share, scale=self._trials.plan.options["scale"])

    def _by_share(self, members: frozenset[int], share: float, *, scale: float) -> Plan:
        """The plan of a merge with the same share for each of `members`, all that are in the mean among them."""
        plan, others = self._trials.plan, sorted(members - self._kept)
        sources, counts = [plan.tuned[member] for member in others], np.ones(len(others))
        if self._mean is not None:
            sources, counts = [self._mean, *sources], np.append(len(self._kept), counts)
        averaged = dict.fromkeys(plan.coefficients, (counts / len(members))[None])
        merged = dict.fromkeys(self._trials.names, scale * (share * counts)[None])
        return replace(plan, tuned=tuple(sources), coefficients={**averaged, **merged})


def search_by_score(plan: Plan, score: Scorer) -> Plan:
    """Settle the coefficients, the same for every tensor, by the accuracies of merges."""
    trials, method = Trials(plan), METHODS[plan.method]
    mean = RunningMean(trials)

    def score_batch(batch: Sequence[Float]) -> Sequence[float]:
        # Many at once are merged tensor by tensor when they are asked for, so that they need not be in memory together.
        plans = [mean.plan(shares) for shares in batch]
        return score([trials.weights(LazyArrays(p.as_checkpoint()) if len(plans) > 1 else p.tensors()) for p in plans])

    blend = method.function(len(plan.tuned), score_batch, **trials.options)
    facts: dict[str, Any] = dict(blend.facts)
    if "chosen" in facts:
        facts["chosen"] = [plan.tuned[number].source for number in facts["chosen"]]
    report = {name: {**plan.report[name], **facts} for name in plan.report}
    return replace(trials.with_shares(dict.fromkeys(trials.names, blend.coefficients)), report=report)


def search_by_gradient(plan: Plan, gradient: Gradient) -> Plan:
    """Settle one scale of the mean update per tensor by the gradient of the held-out loss."""
    trials, method = Trials(plan), METHODS[plan.method]
    scale, uniform = plan.options["scale"], np.full(len(plan.tuned), 1 / len(plan.tuned))
    means = {name: _mean_update(plan, name, uniform) for name in trials.names}

    def loss(scales: Float) -> tuple[float, Float]:
        value, slopes = gradient(trials.merged(_shares(trials.names, scales, uniform)))
        along = [
            scale * float(np.einsum("k,k->", slopes[name].reshape(-1).astype(np.float64), means[name]))
            for name in trials.names
        ]
        return value, np.array(along)

    scales = method.function(np.ones(len(trials.names)), loss, **trials.options)
    report = {
        name: {**plan.report[name], "ratio": float(value)} for name, value in zip(trials.names, scales, strict=True)
    }
    settled = trials.with_shares(_shares(trials.names, scales, uniform))
    return replace(settled, report={**plan.report, **report})


def _shares(names: Sequence[str], scales: Float, uniform: Float) -> dict[str, Float]:
    return {name: scale * uniform for name, scale in zip(names, scales, strict=True)}


def _mean_update(plan: Plan, name: str, uniform: Float) -> Float:
    """The mean update of a tensor (size,), as the merge itself computes it."""
    at_mean = replace(plan, coefficients={name: uniform[None]}, chosen=frozenset([name]), dtype="F64")
    pieces = [piece.copy() for run in at_mean.runs(name) for _, piece in at_mean.pieces(name, run)]
    merged = np.concatenate(pieces)
    mean: Float = merged - plan.anchor.tensors[name].values()
    return mean


def search(plan: Plan, score: Scorer | None, gradient: Gradient | None) -> Plan:
    """Settle the coefficients of a method that searches.

    Raises:
        MergeError: what the method needs was not passed.
    """
    needs = METHODS[plan.method].needs
    if needs == "score" and score is not None:
        return search_by_score(plan, score)
    if needs == "gradient" and gradient is not None:
        return search_by_gradient(plan, gradient)
    raise MergeError(
        f"method {plan.method}",
        got="nothing to score merges with",
        expected=f"a {needs} on held-out data",
        cure="give --held-out, or from Python score= or gradient=",
    )
