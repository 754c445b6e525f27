"""Which merge to ship, with honest error bars, from per-example results alone.

Accuracies carry 95 % Wilson intervals. Means over the shifts and all differences carry percentile bootstrap
intervals: the examples of each benchmark are drawn again, the same ones for every weight set, so what is common to
both sides of a difference cancels. Pairs of single weight sets get McNemar's exact test, with Holm's correction.

Everything is judged by one or two summaries: "in-distribution", and "shifts", the mean over the sets of that role,
where there are any. What is kept by summary has the keys of `Comparison.summaries`.
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
from modelstock.scoring.results import Row, Scores

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
    summary: Mapping[str, Estimate]
    spread: Mapping[str, float]  # by summary, the standard deviation over the rows; empty for one row
    over_seed: Mapping[str, Estimate]  # by summary, minus the mean single seed; empty for the anchor and seeds
    over_uniform: Mapping[str, Estimate]  # minus the uniform soups of the same members; empty where there is none


@dataclass(frozen=True)
class Classes:
    """Every row's accuracy on each label of one benchmark."""

    labels: tuple[str, ...]
    images: tuple[int, ...]  # by label
    accuracy: Mapping[str, tuple[float | None, ...]]  # row -> by label; None where a label has no image


@dataclass(frozen=True)
class Comparison:
    """Everything that the report says."""

    benchmarks: tuple[str, ...]
    in_distribution: str
    shifts: tuple[str, ...]
    held_out: str
    summaries: tuple[str, ...]
    rows: tuple[Row, ...]
    examples: Mapping[str, int]
    accuracy: Mapping[str, Mapping[str, Estimate]]  # row -> benchmark -> estimate
    summary: Mapping[str, Mapping[str, Estimate]]  # row -> summary -> estimate
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]  # row -> benchmark -> what `metrics` gives
    classes: Mapping[str, Classes]  # by benchmark
    lines: tuple[Line, ...]
    tests: Mapping[str, Mapping[str, Mapping[str, Test]]]  # "uniform" or "seed" -> row -> summary
    median_seed: str
    champion: str
    draws: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def check(results: Sequence[Scores]) -> None:
    """Raise DataError unless the results have the roles, the same rows and finite numbers."""

    def refuse(place: str, got: object, expected: str) -> None:
        raise DataError(place, got=got, expected=expected, cure="run the stage evaluate for every benchmark again")

    roles = [scores.role for scores in results]
    for role in ("held-out", "in-distribution"):
        if roles.count(role) != 1:
            refuse("results", f"{roles.count(role)} benchmarks with the role {role}", "exactly one")
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
    for scores in results:
        for name in ("confidence", "nll"):
            finite = np.isfinite(getattr(scores, name)).all(axis=1)
            if not finite.all():
                row = scores.rows[int(finite.argmin())].name
                refuse(f"{scores.benchmark}, row {row}", f"{name} that is NaN or infinite", "finite numbers")


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


def metrics(scores: Scores, row: int) -> dict[str, float]:
    """One row's top1 and top5 (shares), nll (mean, in nats) and ece (a share).

    ece = sum over bins of n_bin / n * |accuracy in the bin - mean confidence in the bin|, with 15 equal bins of the
    confidence in the predicted label. Source: Guo et al., ICML 2017, equation 3.
    """
    import torch  # seconds, so only where it is needed
    from torchmetrics.functional.classification import binary_calibration_error

    # torchmetrics gives a confidence of exactly 1, which rounding makes common, a sixteenth bin of its own; and one
    # value above 1 would make it take all of them for logits. In float64 the next number below 1 changes nothing else.
    confidence = np.clip(scores.confidence[row].astype(np.float64), 0, np.nextafter(1, 0))
    error = binary_calibration_error(
        torch.from_numpy(confidence), torch.from_numpy(scores.correct[row].astype(np.int64)), n_bins=15
    )
    return {
        "top1": float(scores.correct[row].mean()),
        "top5": float(scores.correct5[row].mean()),
        "nll": float(scores.nll[row].mean(dtype=np.float64)),
        "ece": float(error),
    }


def per_class(scores: Scores) -> Float:
    """Accuracies (rows, labels) on each label's own examples; NaN for a label without any."""
    counts = np.bincount(scores.truth, minlength=len(scores.labels))
    right = [np.bincount(scores.truth, weights=row, minlength=len(scores.labels)) for row in scores.correct]
    shares: Float = np.full((len(right), len(counts)), np.nan)
    np.divide(right, counts, out=shares, where=counts > 0)
    return shares


def _classes(scores: Scores) -> Classes:
    images = np.bincount(scores.truth, minlength=len(scores.labels)).tolist()
    accuracy = {
        row.name: tuple(share if count else None for share, count in zip(shares, images, strict=True))
        for row, shares in zip(scores.rows, per_class(scores).tolist(), strict=True)
    }
    return Classes(scores.labels, tuple(images), accuracy)


def compare(results: Sequence[Scores], *, draws: int = 2000, seed: int = 0) -> Comparison:
    """Accuracies, differences and tests of every row; see the module's docstring.

    Raises:
        DataError: missing roles, or rows that differ between benchmarks.
    """
    check(results)
    rows, kinds = results[0].rows, [row.kind for row in results[0].rows]
    by_role = {role: [s for s in results if s.role == role] for role in ("held-out", "in-distribution", "shift")}
    inside, shifts, held = by_role["in-distribution"][0], by_role["shift"], by_role["held-out"][0]
    judged = {"in-distribution": [inside], **({"shifts": shifts} if shifts else {})}
    generator = np.random.default_rng(seed)
    samples = {s.benchmark: resampled(s.correct, draws, generator) for sets in judged.values() for s in sets}
    exact = {s.benchmark: s.correct.mean(axis=1) for s in results}
    # By summary: (rows,) and (draws, rows).
    value = {name: np.mean([exact[s.benchmark] for s in sets], axis=0) for name, sets in judged.items()}
    drawn = {name: np.mean([samples[s.benchmark] for s in sets], axis=0) for name, sets in judged.items()}
    seeds = [i for i, kind in enumerate(kinds) if kind == "seed"]
    uniform = {rows[i].members: i for i, kind in enumerate(kinds) if kind == "uniform"}

    def difference(chosen: Sequence[int], others: Sequence[int], summary: str) -> Estimate:
        exactly = value[summary][list(chosen)].mean() - value[summary][list(others)].mean()
        again = drawn[summary][:, list(chosen)].mean(axis=1) - drawn[summary][:, list(others)].mean(axis=1)
        return percentile(exactly, again)

    def summary(accuracy: Mapping[str, Estimate], chosen: Sequence[int]) -> dict[str, Estimate]:
        means = {
            name: percentile(value[name][list(chosen)].mean(), drawn[name][:, list(chosen)].mean(axis=1))
            for name in judged
        }
        return means | {"in-distribution": accuracy[inside.benchmark]}  # Wilson's, where it is one row's

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
        return Line(
            name,
            first.kind,
            len(first.members),
            tuple(rows[i].name for i in chosen),
            accuracy,
            summary(accuracy, chosen),
            {s: float(value[s][list(chosen)].std(ddof=1)) for s in value} if len(chosen) > 1 else {},
            {s: difference(chosen, seeds, s) for s in value} if first.kind not in ("anchor", "seed") else {},
            {s: difference(chosen, twins, s) for s in value} if paired else {},
        )

    order = sorted(seeds, key=lambda i: (exact[held.benchmark][i], rows[i].name))
    median = order[len(order) // 2]
    lines = [line("zero-shot anchor", [i]) for i, kind in enumerate(kinds) if kind == "anchor"]
    lines.append(line("mean single seed", seeds))
    lines.append(line(f"best single seed on {held.benchmark} ({rows[order[-1]].name})", [order[-1]]))
    groups: dict[tuple[str, int], list[int]] = {}
    for i in _chosen_options(rows, exact[held.benchmark]):
        groups.setdefault((rows[i].kind, len(rows[i].members)), []).append(i)
    for (kind, size), chosen in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        several = f", mean of {len(chosen)}" if len(chosen) > 1 else ""
        lines.append(line(f"{kind} of {size}{several}", chosen))

    merged = [i for i in _chosen_options(rows, exact[held.benchmark]) if kinds[i] != "ensemble"]
    pairs = {
        "uniform": [(i, uniform[rows[i].members]) for i in merged if uniform.get(rows[i].members, i) != i],
        "seed": [(i, median) for i in merged],
    }
    accuracy = {row.name: {s.benchmark: wilson(s.correct[i]) for s in results} for i, row in enumerate(rows)}
    return Comparison(
        benchmarks=tuple(s.benchmark for s in results),
        in_distribution=inside.benchmark,
        shifts=tuple(s.benchmark for s in shifts),
        held_out=held.benchmark,
        summaries=tuple(judged),
        rows=rows,
        examples={s.benchmark: s.correct.shape[1] for s in results},
        accuracy=accuracy,
        summary={row.name: summary(accuracy[row.name], [i]) for i, row in enumerate(rows)},
        metrics={row.name: {s.benchmark: metrics(s, i) for s in results} for i, row in enumerate(rows)},
        classes={s.benchmark: _classes(s) for s in results},
        lines=tuple(lines),
        tests={family: _tests(rows, wanted, judged) for family, wanted in pairs.items()},
        median_seed=rows[median].name,
        champion=champion(results).name,
        draws=draws,
    )


def _chosen_options(rows: Sequence[Row], held_out: Float) -> list[int]:
    """The rows that tables summarise: of a method's rows on the same members, the best on the held-out cut."""
    best: dict[tuple[str, tuple[int, ...]], int] = {}
    for i, row in enumerate(rows):
        if row.kind not in ("anchor", "seed"):
            key = (row.kind, row.members)
            if key not in best or held_out[i] > held_out[best[key]]:
                best[key] = i
    return sorted(best.values())


def _tests(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int]], judged: Mapping[str, Sequence[Scores]]
) -> dict[str, dict[str, Test]]:
    """One family: McNemar over the pooled examples of each summary's sets, corrected together."""
    pooled = {name: np.concatenate([s.correct for s in sets], axis=1) for name, sets in judged.items()}
    found = [(i, j, summary, mcnemar(correct[i], correct[j])) for i, j in pairs for summary, correct in pooled.items()]
    if not found:
        return {}
    corrected = multipletests([result[2] for *_, result in found], method="holm")[1]
    tests: dict[str, dict[str, Test]] = {}
    for (i, j, summary, (wins, losses, p)), holm in zip(found, corrected, strict=True):
        tests.setdefault(rows[i].name, {})[summary] = Test(rows[j].name, wins, losses, p, float(holm))
    return tests
