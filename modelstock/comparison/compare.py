"""Which merge to ship, with honest error bars, from results per example alone.

The accuracy of one weight set has the 95 % Wilson interval of its images. Means over weight sets, and differences, have
intervals over seeds and images, or over images alone where there are too few seeds; each says which: see `crossed`.
Both sides of a difference are of the same images and, where they can be, of the same seeds, so that what they have in
common cancels. Pairs of single weight sets get McNemar's exact test, with Holm's correction.

Everything is judged by one or two summaries: "in-distribution", and "shifts", the mean over the sets of that role,
where there are any. What is kept by summary has the keys of `Comparison.summaries`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from modelstock.comparison.choice import SPLITS, Choice, choose, distinct
from modelstock.comparison.cost import costs
from modelstock.comparison.crossed import Crossed
from modelstock.comparison.differences import Difference, difference, holm
from modelstock.comparison.intervals import Accuracies, BalancedAccuracies, Clusters, Estimate, Float
from modelstock.comparison.metrics import metrics
from modelstock.comparison.paired_tests import Test, family
from modelstock.comparison.pareto import front
from modelstock.errors import DataError
from modelstock.params import ChampionParams
from modelstock.scoring.results import Row, Scores

ROLES = (*SPLITS, "in-distribution", "shift")
BEST = ChampionParams(rule="best")  # which needs no weights
Resample = Literal["images", "classes"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row, or the mean over a method's rows of the same size, as the table shows it.

    `key`: "anchor", "mean-seed", "best-seed", or the kind of its rows; with `size`, the seeds in each row (0 for the
    anchor), it is unique. `accuracy`: by benchmark. By summary: `summary`; `spread`, the standard deviation over the
    rows, empty for one row; `over_seed`, minus the mean single seed, empty for the anchor and seeds; `over_uniform`,
    minus the uniform soups of the same members, empty where there is none; `balanced_over_seed` and
    `balanced_over_uniform`, the same two in balanced accuracy.
    """

    key: str
    name: str
    kind: str
    size: int
    rows: tuple[str, ...]
    accuracy: Mapping[str, Estimate]
    summary: Mapping[str, Estimate]
    spread: Mapping[str, float]
    over_seed: Mapping[str, Difference]
    over_uniform: Mapping[str, Difference]
    balanced_over_seed: Mapping[str, Difference]
    balanced_over_uniform: Mapping[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Every row's accuracy on each label of one benchmark."""

    labels: tuple[str, ...]
    images: tuple[int, ...]  # by label
    accuracy: Mapping[str, tuple[float | None, ...]]  # row -> by label; None where a label has no image


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the report shows.

    `held_out_shifts`: benchmarks that were chosen on beside `held_out`; like it, they are in no summary. `cost`: row ->
    its training in units of one seed. `front`: the weight sets that no other dominates in distribution and on the
    shifts together, the best in distribution first; empty without shifts.
    """

    benchmarks: tuple[str, ...]
    in_distribution: str
    shifts: tuple[str, ...]
    held_out: str
    held_out_shifts: tuple[str, ...]
    summaries: tuple[str, ...]
    rows: tuple[Row, ...]
    examples: Mapping[str, int]
    accuracy: Mapping[str, Mapping[str, Estimate]]  # row -> benchmark -> estimate
    summary: Mapping[str, Mapping[str, Estimate]]  # row -> summary -> estimate
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]  # row -> benchmark -> metric -> value
    classes: Mapping[str, Classes]  # by benchmark
    lines: tuple[Line, ...]
    tests: Mapping[str, Mapping[str, Mapping[str, Test]]]  # "uniform" or "seed" -> row -> summary
    median_seed: str
    champion: str
    choice: Choice
    cost: Mapping[str, float]
    front: tuple[str, ...]
    resample: str  # what intervals draw of a test set: "images", or "classes" with all their images
    margin: float  # a difference above minus this, a share, is no worse
    precision: str  # of the towers
    modality: str  # of the examples
    notices: tuple[str, ...]  # "weight set or benchmark: what is unusual about it"
    facts: Mapping[str, Any] = field(default_factory=dict)


def check(results: Sequence[Scores]) -> None:
    """Raise DataError unless the results have the roles, the same rows and finite numbers."""

    def refuse(place: str, got: object, expected: str) -> None:
        raise DataError(place, got=got, expected=expected, cure="run the stage evaluate for every benchmark again")

    roles = [scores.role for scores in results]
    for scores in results:
        if scores.role not in ROLES:
            refuse(scores.benchmark, f"the role {scores.role}", " or ".join(ROLES))
    for role in ("held-out", "in-distribution"):
        if roles.count(role) != 1:
            refuse("results", f"{roles.count(role)} benchmarks with the role {role}", "exactly one")
    benchmarks = [scores.benchmark for scores in results]
    for name in benchmarks:
        if benchmarks.count(name) > 1:
            refuse("results", f"{benchmarks.count(name)} files that are of {name}", "one per benchmark")
    names = [row.name for row in results[0].rows]
    for name in names:
        if names.count(name) > 1:
            refuse(results[0].benchmark, f"{names.count(name)} rows named {name}", "one")
    for scores in results[1:]:
        if scores.rows != results[0].rows:
            other = sorted({r.name for r in scores.rows} ^ set(names)) or ["other weights under the same names"]
            refuse(scores.benchmark, f"rows that differ: {', '.join(other)}", f"the rows of {results[0].benchmark}")
    precisions = sorted({scores.precision for scores in results})
    if len(precisions) > 1:
        refuse("results", f"towers in {' and '.join(precisions)}", "one precision")
    if not any(row.kind == "seed" for row in results[0].rows):
        refuse("results", "no row of kind seed", "one or more")
    for scores in results:
        for name in ("confidence", "nll"):
            finite = np.isfinite(getattr(scores, name)).all(axis=1)
            if not finite.all():
                row = scores.rows[int(finite.argmin())].name
                refuse(f"{scores.benchmark}, row {row}", f"{name} that is NaN or infinite", "finite numbers")


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
    return Classes(labels=scores.labels, images=tuple(images), accuracy=accuracy)


def compare(
    results: Sequence[Scores],
    *,
    resample: Resample = "images",
    margin: float = 0.005,
    champion: ChampionParams = BEST,
    distances: Mapping[str, float] | None = None,
) -> Comparison:
    """Accuracies, differences and tests of every row, and the champion; see the module's docstring.

    `resample`: whether intervals draw a test set's images, or its classes with all their images. `margin`: a difference
    above minus this share is no worse. `champion`: how it is chosen. `distances`: identity -> |w - w0|, which the rule
    "nearest" needs.

    Raises:
        DataError: missing roles, rows that differ between benchmarks, or no distances where they are needed.
    """
    check(results)
    comparing = _Comparing(results, resample=resample, margin=margin)
    return comparing.comparison(choose(results, champion, distances))


class _Comparing:
    """The results of all benchmarks, and the places of the rows that others are compared with."""

    def __init__(self, results: Sequence[Scores], *, resample: Resample, margin: float) -> None:
        self.results, self.resample, self.margin, self.rows = results, resample, margin, results[0].rows
        by_role = {role: [s for s in results if s.role == role] for role in ROLES}
        self.held_out, self.inside = by_role["held-out"][0], by_role["in-distribution"][0]
        self.shifts, self.held_out_shifts = by_role["shift"], by_role["held-out-shift"]
        self.summaries = {"in-distribution": [self.inside], **({"shifts": self.shifts} if self.shifts else {})}
        self.by_benchmark = {scores.benchmark: self._accuracies([scores]) for scores in results}
        self.by_summary = {name: self._accuracies(sets) for name, sets in self.summaries.items()}
        self.balanced_by_summary = {name: self._balanced(sets) for name, sets in self.summaries.items()}
        self.held_out_accuracy = self.by_benchmark[self.held_out.benchmark].measured
        self.seeds = [place for place, row in enumerate(self.rows) if row.kind == "seed"]
        self.uniform = {row.members: place for place, row in enumerate(self.rows) if row.kind == "uniform"}
        ranked = sorted(self.seeds, key=lambda place: (self.held_out_accuracy[place], self.rows[place].name))
        self.median_seed, self.best_seed = ranked[len(ranked) // 2], ranked[-1]
        self.summarised = best_options(self.rows, self.held_out_accuracy)

    def comparison(self, choice: Choice) -> Comparison:
        """Everything together."""
        accuracy = {row.name: self._per_benchmark(place) for place, row in enumerate(self.rows)}
        return Comparison(
            benchmarks=tuple(scores.benchmark for scores in self.results),
            in_distribution=self.inside.benchmark,
            shifts=tuple(scores.benchmark for scores in self.shifts),
            held_out=self.held_out.benchmark,
            held_out_shifts=tuple(scores.benchmark for scores in self.held_out_shifts),
            summaries=tuple(self.summaries),
            rows=self.rows,
            examples={scores.benchmark: scores.correct.shape[1] for scores in self.results},
            accuracy=accuracy,
            summary={row.name: self._summary([place]) for place, row in enumerate(self.rows)},
            metrics={
                row.name: {scores.benchmark: metrics(scores, place) for scores in self.results}
                for place, row in enumerate(self.rows)
            },
            classes={scores.benchmark: _classes(scores) for scores in self.results},
            lines=tuple(corrected(self.lines())),
            tests=self.tests(),
            median_seed=self.rows[self.median_seed].name,
            champion=choice.chosen,
            choice=choice,
            cost=costs(self.rows),
            front=self._front(),
            resample=self.resample,
            margin=self.margin,
            precision=self.held_out.precision,
            modality=self.held_out.modality,
            notices=tuple(dict.fromkeys(line for scores in self.results for line in scores.notices)),
        )

    def lines(self) -> list[Line]:
        """The anchor, the seeds, then every kind of row by size and name."""
        lines = [
            self._line(
                "anchor", "linear-probe anchor" if row.options.get("head") == "probe" else "zero-shot anchor", [place]
            )
            for place, row in enumerate(self.rows)
            if row.kind == "anchor"
        ]
        lines.append(self._line("mean-seed", "mean single seed", self.seeds))
        best = f"best single seed on {self.held_out.benchmark} ({self.rows[self.best_seed].name})"
        lines.append(self._line("best-seed", best, [self.best_seed]))
        groups: dict[tuple[int, str], list[int]] = {}
        for place in self.summarised:
            row = self.rows[place]
            groups.setdefault((len(row.members), row.kind), []).append(place)
        for (size, kind), places in sorted(groups.items()):
            several = f", mean of {len(places)}" if len(places) > 1 else ""
            lines.append(self._line(kind, f"{kind} of {size}{several}", places))
        return lines

    def tests(self) -> dict[str, dict[str, dict[str, Test]]]:
        """Every merge against the uniform soup of the same members, and against the median seed."""
        merges = [place for place in self.summarised if self.rows[place].kind != "ensemble"]
        twins = [(place, self.uniform.get(self.rows[place].members, place)) for place in merges]
        pairs = {
            "uniform": [(place, twin) for place, twin in twins if twin != place],
            "seed": [(place, self.median_seed) for place in merges],
        }
        return {name: family(self.rows, chosen, self.summaries) for name, chosen in pairs.items()}

    def _front(self) -> tuple[str, ...]:
        if not self.shifts:
            return ()
        places = distinct(self.rows)
        inside, outside = (
            np.mean([scores.correct.mean(axis=1) for scores in sets], axis=0) for sets in self.summaries.values()
        )
        on_it = front([(inside[place], outside[place]) for place in places])
        return tuple(self.rows[places[i]].name for i in on_it)

    def _accuracies(self, sets: Sequence[Scores]) -> Accuracies:
        return Accuracies(self.rows, [s.correct for s in sets], self._clusters(sets))

    def _balanced(self, sets: Sequence[Scores]) -> BalancedAccuracies:
        truths = [scores.truth for scores in sets]
        return BalancedAccuracies(self.rows, [s.correct for s in sets], truths, self._clusters(sets))

    def _clusters(self, sets: Sequence[Scores]) -> Clusters:
        if self.resample != "classes":
            return None
        number = {label: place for place, label in enumerate(sorted({label for s in sets for label in s.labels}))}
        return [np.array([number[label] for label in scores.labels])[scores.truth] for scores in sets]

    def _per_benchmark(self, place: int) -> dict[str, Estimate]:
        return {benchmark: accuracies.mean([place]) for benchmark, accuracies in self.by_benchmark.items()}

    def _summary(self, places: Sequence[int]) -> dict[str, Estimate]:
        return {name: accuracies.mean(places) for name, accuracies in self.by_summary.items()}

    def _line(self, key: str, name: str, places: Sequence[int]) -> Line:
        first = self.rows[places[0]]
        # The mean over several rows says nothing on the sets that each of them was chosen by.
        several = len(places) > 1
        chosen_on = [scores.benchmark for scores in self.results if scores.role in SPLITS]
        scored = [name for name in self.by_benchmark if not several or name not in chosen_on]
        twins = [self.uniform[members] for place in places if (members := self.rows[place].members) in self.uniform]
        paired = first.kind != "uniform" and len(twins) == len(places) and len(first.members) > 1
        trained = first.kind not in ("anchor", "seed")
        summaries, balanced = self.by_summary.items(), self.balanced_by_summary.items()
        return Line(
            key=key,
            name=name,
            kind=first.kind,
            size=len(first.members),
            rows=tuple(self.rows[place].name for place in places),
            accuracy={benchmark: self.by_benchmark[benchmark].mean(places) for benchmark in scored},
            summary=self._summary(places),
            spread={s: accuracies.spread(places) for s, accuracies in summaries} if several else {},
            over_seed={s: self._difference(a.over_members(places, self.seeds)) for s, a in summaries if trained},
            over_uniform={s: self._difference(a.paired(places, twins)) for s, a in summaries if paired},
            balanced_over_seed={
                s: self._difference(a.over_members(places, self.seeds)) for s, a in balanced if trained
            },
            balanced_over_uniform={s: self._difference(a.paired(places, twins)) for s, a in balanced if paired},
        )

    def _difference(self, moments: Crossed) -> Difference:
        return difference(moments, margin=self.margin)


def corrected(lines: Sequence[Line]) -> list[Line]:
    """The lines with Holm's correction over all differences of a kind, as over all those from the mean seed."""
    kinds = ("over_seed", "over_uniform", "balanced_over_seed", "balanced_over_uniform")
    families = [_corrected([getattr(line, kind) for line in lines]) for kind in kinds]
    return [
        dataclasses.replace(line, **dict(zip(kinds, of_line, strict=True)))
        for line, *of_line in zip(lines, *families, strict=True)
    ]


def _corrected(family: Sequence[Mapping[str, Difference]]) -> list[dict[str, Difference]]:
    tested = iter(holm([one for differences in family for one in differences.values()]))
    return [{name: next(tested) for name in differences} for differences in family]


def best_options(rows: Sequence[Row], held_out: Float) -> list[int]:
    """The rows that tables summarise: of a method's rows on the same members, the best on the held-out split."""
    best: dict[tuple[str, tuple[int, ...]], int] = {}
    for i, row in enumerate(rows):
        if row.kind not in ("anchor", "seed"):
            key = (row.kind, row.members)
            if key not in best or held_out[i] > held_out[best[key]]:
                best[key] = i
    return sorted(best.values())
