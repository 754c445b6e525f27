"""McNemar's exact test of one weight set against another on the same examples, with Holm's correction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from modelstock.scoring.results import Row, Scores


@dataclass(frozen=True, kw_only=True)
class Test:
    """One test. `wins`, `losses`: examples that only this one, only the other gets right.

    `holm`: `p` after Holm's correction over all tests of its family.
    """

    against: str
    wins: int
    losses: int
    p: float
    holm: float


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Examples only the first, and only the second, gets right, and the exact two-sided p.

    Source: McNemar, Psychometrika 12 (1947): under no difference the discordant examples fall either way by a coin.
    """
    wins, losses = int((first & ~second).sum()), int((~first & second).sum())
    return wins, losses, float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """The p of a family of tests, in their order, after Holm's correction.

    Of m tests the one of rank k (the smallest is of rank 0) has the largest of (m - rank) p up to its own, at most 1.
    Not statsmodels' multipletests, which collects all of Python's garbage every time: for seconds in a large process.
    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p)[order]))
    return [float(value) for value in corrected]


def family(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int]], summaries: Mapping[str, Sequence[Scores]]
) -> dict[str, dict[str, Test]]:
    """Row -> summary -> the test of each pair of places, over the pooled examples of the summary's benchmarks.

    All of them are corrected together.
    """
    pooled = {name: np.concatenate([scores.correct for scores in sets], axis=1) for name, sets in summaries.items()}
    results = [(i, j, name, mcnemar(correct[i], correct[j])) for i, j in pairs for name, correct in pooled.items()]
    corrected = holm([p for *_, (_, _, p) in results])
    tests: dict[str, dict[str, Test]] = {}
    for (i, j, name, (wins, losses, p)), of_family in zip(results, corrected, strict=True):
        tests.setdefault(rows[i].name, {})[name] = Test(
            against=rows[j].name, wins=wins, losses=losses, p=p, holm=of_family
        )
    return tests
