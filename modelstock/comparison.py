"""Which merge to ship, with honest error bars, from per-example results alone.

Accuracies carry 95 % Wilson intervals. Means over the shifts and all differences carry percentile bootstrap
intervals: the examples of each benchmark are drawn again, the same ones for every weight set, so what is common to
both sides of a difference cancels. Pairs of single weight sets get McNemar's exact test, with Holm's correction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from modelstock.errors import DataError
from modelstock.scores import Row, Scores

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A share (or a difference of shares) and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Test:
    """McNemar's exact test of one weight set against another on the same examples."""

    against: str
    wins: int  # examples only this one gets right
    losses: int  # examples only the other gets right
    p: float
    holm: float  # p after Holm's correction over all tests of its family


@dataclass(frozen=True)
class Line:
    """One row, or the mean over a method's rows of the same size, as the table shows it."""

    name: str
    kind: str
    size: int  # seeds in it; 0 for the anchor
    rows: tuple[str, ...]
    accuracy: Mapping[str, Estimate]  # by benchmark
    shift_mean: Estimate
    spread: tuple[float, float] | None  # standard deviations over the rows: in distribution, mean of the shifts
    over_seed: Mapping[str, Estimate]  # minus the mean single seed: "in-distribution", "shifts"
    over_uniform: Mapping[str, Estimate]  # minus the uniform soups of the same members; empty where there is none


@dataclass(frozen=True)
class Comparison:
    """Everything that the report says."""

    benchmarks: tuple[str, ...]
    in_distribution: str
    shifts: tuple[str, ...]
    held_out: str
    rows: tuple[Row, ...]
    examples: Mapping[str, int]
    accuracy: Mapping[str, Mapping[str, Estimate]]  # row -> benchmark -> estimate
    shift_mean: Mapping[str, Estimate]  # row -> estimate
    lines: tuple[Line, ...]
    tests: Mapping[str, Mapping[str, Mapping[str, Test]]]  # "uniform" or "seed" -> row -> "in-distribution"/"shifts"
    median_seed: str
    champion: str
    draws: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def check(results: Sequence[Scores]) -> None:
    """Raise DataError unless the results have the roles and the same rows."""

    def refuse(place: str, got: object, expected: str) -> None:
        raise DataError(place, got=got, expected=expected, cure="run the stage evaluate for every benchmark again")

    roles = [scores.role for scores in results]
    for role in ("held-out", "in-distribution"):
        if roles.count(role) != 1:
            refuse("results", f"{roles.count(role)} benchmarks with the role {role}", "exactly one")
    if "shift" not in roles:
        refuse("results", "no benchmark with the role shift", "one or more")
    names = [row.name for row in results[0].rows]
    for name in names:
        if names.count(name) > 1:
            refuse(results[0].benchmark, f"{names.count(name)} rows named {name}", "one")
    for scores in results[1:]:
        if scores.rows != results[0].rows:
            other = sorted({r.name for r in scores.rows} ^ set(names)) or ["other weights under the same names"]
            refuse(scores.benchmark, f"rows that differ: {', '.join(other)}", f"the rows of {results[0].benchmark}")
    if not any(row.kind == "seed" for row in results[0].rows):
        refuse("results", "no row of kind seed", "one or more")


def champion(results: Sequence[Scores]) -> Row:
    """The best single weight set on the held-out cut; of equals the one of fewer seeds, then by name.

    Logit ensembles are no candidates: they cannot be shipped as one model. No test set is looked at.
    """
    held = next(scores for scores in results if scores.role == "held-out")
    ranked = [
        (-accuracy, len(row.members), row.name, row)
        for row, accuracy in zip(held.rows, held.correct.mean(axis=1), strict=True)
        if row.kind != "ensemble"
    ]
    return min(ranked, key=lambda entry: entry[:3])[3]


def resampled(correct: NDArray[np.bool_], draws: int, generator: np.random.Generator) -> Float:
    """Accuracies (draws, rows) of bootstrap samples of the examples, the same samples for every row.

    `correct`: (rows, n). A sample is a vector of multinomial counts, so its accuracies are one product.
    """
    rows, count = correct.shape
    table, accuracies = correct.T.astype(np.float64), np.empty((draws, rows))
    for start in range(0, draws, 200):
        size = min(200, draws - start)
        counts = generator.multinomial(count, np.full(count, 1 / count), size=size)
        accuracies[start : start + size] = counts @ table / count
    return accuracies


def wilson(correct: NDArray[np.bool_]) -> Estimate:
    """A share of n examples with its 95 % Wilson interval."""
    low, high = proportion_confint(int(correct.sum()), correct.size, method="wilson")
    return Estimate(float(correct.mean()), float(low), float(high))


def percentile(value: float, samples: Float) -> Estimate:
    """A value with the 2.5 and 97.5 percentiles of its bootstrap samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Examples only the first, and only the second, gets right, and the exact two-sided p.

    Source: McNemar, Psychometrika 12 (1947): under no difference the discordant examples fall either way by a coin.
    """
    wins, losses = int((first & ~second).sum()), int((~first & second).sum())
    return wins, losses, float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def compare(results: Sequence[Scores], *, draws: int = 2000, seed: int = 0) -> Comparison:
    """Accuracies, differences and tests of every row; see the module's docstring.

    Raises:
        DataError: missing roles, or rows that differ between benchmarks.
    """
    check(results)
    rows, kinds = results[0].rows, [row.kind for row in results[0].rows]
    by_role = {role: [s for s in results if s.role == role] for role in ("held-out", "in-distribution", "shift")}
    inside, shifts, held = by_role["in-distribution"][0], by_role["shift"], by_role["held-out"][0]
    generator = np.random.default_rng(seed)
    samples = {s.benchmark: resampled(s.correct, draws, generator) for s in [inside, *shifts]}
    exact = {s.benchmark: s.correct.mean(axis=1) for s in results}
    # The two summaries that everything is judged by: (rows,) and (draws, rows).
    value = {
        "in-distribution": exact[inside.benchmark],
        "shifts": np.mean([exact[s.benchmark] for s in shifts], axis=0),
    }
    drawn = {
        "in-distribution": samples[inside.benchmark],
        "shifts": np.mean([samples[s.benchmark] for s in shifts], axis=0),
    }
    seeds = [i for i, kind in enumerate(kinds) if kind == "seed"]
    uniform = {rows[i].members: i for i, kind in enumerate(kinds) if kind == "uniform"}

    def difference(chosen: Sequence[int], others: Sequence[int], summary: str) -> Estimate:
        exactly = value[summary][list(chosen)].mean() - value[summary][list(others)].mean()
        again = drawn[summary][:, list(chosen)].mean(axis=1) - drawn[summary][:, list(others)].mean(axis=1)
        return percentile(exactly, again)

    def line(name: str, chosen: Sequence[int]) -> Line:
        first = rows[chosen[0]]
        accuracy = {}
        for s in results:
            if len(chosen) == 1:
                accuracy[s.benchmark] = wilson(s.correct[chosen[0]])
            elif s is not held:
                mean = exact[s.benchmark][list(chosen)].mean()
                accuracy[s.benchmark] = percentile(mean, samples[s.benchmark][:, list(chosen)].mean(axis=1))
        partners = [uniform.get(rows[i].members) for i in chosen]
        twins = [p for p in partners if p is not None] if first.kind != "uniform" else []
        paired = len(twins) == len(chosen) and len(first.members) > 1
        spread = None
        if len(chosen) > 1:
            spread = (
                float(value["in-distribution"][list(chosen)].std(ddof=1)),
                float(value["shifts"][list(chosen)].std(ddof=1)),
            )
        return Line(
            name,
            first.kind,
            len(first.members),
            tuple(rows[i].name for i in chosen),
            accuracy,
            percentile(value["shifts"][list(chosen)].mean(), drawn["shifts"][:, list(chosen)].mean(axis=1)),
            spread,
            {s: difference(chosen, seeds, s) for s in value} if first.kind not in ("anchor", "seed") else {},
            {s: difference(chosen, twins, s) for s in value} if paired else {},
        )

    order = sorted(seeds, key=lambda i: (exact[held.benchmark][i], rows[i].name))
    median = order[len(order) // 2]
    lines = [line("zero-shot anchor", [i]) for i, kind in enumerate(kinds) if kind == "anchor"]
    lines.append(line("mean single seed", seeds))
    lines.append(line(f"best single seed on {held.benchmark} ({rows[order[-1]].name})", [order[-1]]))
    groups: dict[tuple[str, int], list[int]] = {}
    for i in _chosen_knobs(rows, exact[held.benchmark]):
        groups.setdefault((rows[i].kind, len(rows[i].members)), []).append(i)
    for (kind, size), chosen in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        several = f", mean of {len(chosen)}" if len(chosen) > 1 else ""
        lines.append(line(f"{kind} of {size}{several}", chosen))

    merged = [i for i in _chosen_knobs(rows, exact[held.benchmark]) if kinds[i] != "ensemble"]
    pairs = {
        "uniform": [(i, uniform[rows[i].members]) for i in merged if uniform.get(rows[i].members, i) != i],
        "seed": [(i, median) for i in merged],
    }
    return Comparison(
        tuple(s.benchmark for s in results),
        inside.benchmark,
        tuple(s.benchmark for s in shifts),
        held.benchmark,
        rows,
        {s.benchmark: s.correct.shape[1] for s in results},
        {row.name: {s.benchmark: wilson(s.correct[i]) for s in results} for i, row in enumerate(rows)},
        {row.name: percentile(value["shifts"][i], drawn["shifts"][:, i]) for i, row in enumerate(rows)},
        tuple(lines),
        {family: _tests(rows, wanted, inside, shifts) for family, wanted in pairs.items()},
        rows[median].name,
        champion(results).name,
        draws,
    )


def _chosen_knobs(rows: Sequence[Row], held_out: Float) -> list[int]:
    """The rows that tables summarise: of a method's rows on the same members, the best on the held-out cut."""
    best: dict[tuple[str, tuple[int, ...]], int] = {}
    for i, row in enumerate(rows):
        if row.kind not in ("anchor", "seed"):
            key = (row.kind, row.members)
            if key not in best or held_out[i] > held_out[best[key]]:
                best[key] = i
    return sorted(best.values())


def _tests(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int]], inside: Scores, shifts: Sequence[Scores]
) -> dict[str, dict[str, Test]]:
    """One family: McNemar in distribution and over the pooled examples of the shifts, corrected together."""
    pooled = np.concatenate([s.correct for s in shifts], axis=1)
    found = [
        (i, j, summary, mcnemar(correct[i], correct[j]))
        for i, j in pairs
        for summary, correct in (("in-distribution", inside.correct), ("shifts", pooled))
    ]
    if not found:
        return {}
    corrected = multipletests([result[2] for *_, result in found], method="holm")[1]
    tests: dict[str, dict[str, Test]] = {}
    for (i, j, summary, (wins, losses, p)), holm in zip(found, corrected, strict=True):
        tests.setdefault(rows[i].name, {})[summary] = Test(rows[j].name, wins, losses, p, float(holm))
    return tests
