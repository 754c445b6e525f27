"""The statistics of one comparison, A against B, of anybody's per-example results."""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from modelstock.comparison.crossed import Crossed, Sample, Subsets, crossed
from modelstock.comparison.differences import Difference, difference
from modelstock.comparison.intervals import Accuracies, BalancedAccuracies, Estimate, Values
from modelstock.comparison.paired_tests import mcnemar
from modelstock.significance.outcomes import Outcomes, check_same_ids, check_same_values

Of = TypeVar("Of", bound=Estimate)


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """Balanced accuracies, and their difference."""

    a: float
    b: float
    difference: Difference

    def differs(self, accuracies: "Significance") -> bool:
        """Whether it is other than accuracy in the digits shown."""
        pairs = ((self.a, accuracies.a.value), (self.b, accuracies.b.value))
        return any(abs(balanced - accuracy) >= 5e-5 for balanced, accuracy in pairs)


@dataclass(frozen=True, kw_only=True)
class Significance:
    """What is known of A against B.

    `a`, `b`: accuracies; `rows_a`, `rows_b`: how many seeds or weight sets each is the mean of. `seeds`: "paired" where
    both sides are of the same seeds, else "unrelated". `wins`, `losses`, `mcnemar`: examples that only A, only B gets
    right, and the exact test, where each side is one row; else None. `balanced`: where labels are known; else None.
    """

    examples: int
    rows_a: int
    rows_b: int
    a: Estimate
    b: Estimate
    seeds: str
    difference: Difference
    margin: float
    wins: int | None
    losses: int | None
    mcnemar: float | None
    balanced: Balanced | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: shares, not points."""
        return {**dataclasses.asdict(self), "verdict": self.verdict()}

    def verdict(self) -> str:
        """One sentence."""
        one = self.difference
        points = f"{abs(100 * one.value):.2f} points"
        margin = f"{100 * self.margin:g} points"
        if one.p < 0.05:
            better, worse = ("A", "B") if one.value > 0 else ("B", "A")
            text = f"{better} is better than {worse} by {points}"
        elif one.equivalent == "yes":
            return f"A and B are equivalent within {margin}, over {one.over}."
        else:
            text = "Neither is shown to be better"
            if one.no_worse == "yes":
                text += f", and A is no worse than B by {margin}"
            text += f": differences below {100 * one.detectable:.2f} points are too small for these results"
        return f"{text}, over {one.over}."


def significance(a: Outcomes, b: Outcomes, *, margin: float) -> Significance:
    """A against B on the same examples; by class where A's outcomes have classes. `margin`: a share.

    Raises:
        DataError: examples that only one side has, or with two labels or classes.
    """
    b = _aligned(a, b)
    groups = None if a.classes is None else [np.unique(a.classes, return_inverse=True)[1]]
    accuracies = Accuracies((*a.rows, *b.rows), [np.concatenate([a.correct, b.correct])], groups)
    ones, others = list(range(len(a.rows))), list(range(len(a.rows), len(a.rows) + len(b.rows)))
    moments, seeds = _difference(accuracies, a, b)
    balanced = None
    if a.labels is not None:
        truth = np.unique(a.labels, return_inverse=True)[1]
        figures = BalancedAccuracies(accuracies.rows, accuracies.correct, [truth], groups)
        balanced = Balanced(
            a=float(figures.measured[ones].mean()),
            b=float(figures.measured[others].mean()),
            difference=_over_examples(difference(_difference(figures, a, b)[0], margin=margin)),
        )
    wins, losses, p = mcnemar(a.correct[0], b.correct[0]) if len(ones) == len(others) == 1 else (None, None, None)
    return Significance(
        examples=len(a.ids),
        rows_a=len(a.rows),
        rows_b=len(b.rows),
        a=_over_examples(accuracies.mean(ones)),
        b=_over_examples(accuracies.mean(others)),
        seeds=seeds,
        difference=_over_examples(difference(moments, margin=margin)),
        margin=margin,
        wins=wins,
        losses=losses,
        mcnemar=p,
        balanced=balanced,
    )


def _over_examples(estimate: Of) -> Of:
    """Not everybody's examples are images."""
    return dataclasses.replace(estimate, over=estimate.over.replace("images", "examples"))


def _aligned(a: Outcomes, b: Outcomes) -> Outcomes:
    """B with its examples in A's order."""
    check_same_ids(a.source, a.ids, b.source, b.ids)
    place = {name: number for number, name in enumerate(b.ids)}
    order = [place[name] for name in a.ids]
    labels = None if b.labels is None else tuple(b.labels[number] for number in order)
    classes = None if b.classes is None else tuple(b.classes[number] for number in order)
    for what, mine, theirs in (("label", a.labels, labels), ("class", a.classes, classes)):
        if mine is not None and theirs is not None:
            check_same_values(a.source, mine, b.source, theirs, a.ids, what)
    return dataclasses.replace(b, ids=a.ids, correct=b.correct[:, order], labels=labels, classes=classes)


def _difference(figures: Values, a: Outcomes, b: Outcomes) -> tuple[Crossed, str]:
    """A minus B, paired over seeds where both sides are of the same."""
    count = len(a.rows)
    of_a, of_b = ([row.members for row in side.rows] for side in (a, b))
    if a.numbered and b.numbered:
        if sorted(of_a) == sorted(of_b):
            return figures.paired(range(count), [count + of_b.index(members) for members in of_a]), "paired"
        single = {seed for members in of_b for seed in members} if len(of_b[0]) == 1 else set()
        if single and single == {seed for members in of_a for seed in members}:
            return figures.over_members(range(count), range(count, count + len(of_b))), "paired"
        if len(of_a[0]) == 1 and {seed for members in of_a for seed in members} == {s for m in of_b for s in m}:
            turned = figures.over_members(range(count, count + len(of_b)), range(count))
            return dataclasses.replace(turned, value=-turned.value), "paired"
    (ours,), (theirs,) = (figures.values(range(*ends)) for ends in ((0, count), (count, count + len(b.rows))))
    samples = [Sample(Subsets(tuple(m)), (v,)) for m, v in zip((of_a, of_b), (ours, -theirs), strict=True)]
    return crossed(samples, figures.clusters), "unrelated"
