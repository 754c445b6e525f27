"""McNemar's exact test of one weight set against another on the same examples, with Holm's correction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

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


def family(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int]], summaries: Mapping[str, Sequence[Scores]]
) -> dict[str, dict[str, Test]]:
    """Row -> summary -> the test of each pair of places, over the pooled examples of the summary's benchmarks.

    All of them are corrected together.
    """
    pooled = {name: np.concatenate([scores.correct for scores in sets], axis=1) for name, sets in summaries.items()}
    results = [(i, j, name, mcnemar(correct[i], correct[j])) for i, j in pairs for name, correct in pooled.items()]
    if not results:
        return {}
    corrected = multipletests([result[2] for *_, result in results], method="holm")[1]
    tests: dict[str, dict[str, Test]] = {}
    for (i, j, name, (wins, losses, p)), holm in zip(results, corrected, strict=True):
        tests.setdefault(rows[i].name, {})[name] = Test(
            against=rows[j].name, wins=wins, losses=losses, p=p, holm=float(holm)
        )
    return tests
