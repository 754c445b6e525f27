"""Accuracies of scored rows, and intervals over images and, where there are enough of them, over the seeds too.

Images are drawn again as in the comparison, the same ones for every row. Seeds are drawn again with replacement: a row
then counts as often as the product of how often each of its seeds was drawn, so that rows which share a seed move
together, and a row of no seed, such as the anchor, counts once.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from modelstock.comparison.compare import check
from modelstock.comparison.intervals import Float
from modelstock.geometry.claims import Quantity
from modelstock.scoring.results import Row, Scores

FEWEST_SEEDS = 4  # that are drawn again; of fewer, an interval is over images alone
TITLES = {"in-distribution": "in distribution", "shifts": "shifts", "held-out": "held-out split"}


class Scored:
    """Rows that were scored on the same benchmarks. `summaries`: in-distribution and, where there are any, shifts.

    Raises:
        DataError: as modelstock.comparison.compare.check.
    """

    def __init__(self, results: Sequence[Scores], *, draws: int, seed: int) -> None:
        check(results)
        of_role = {role: [scores for scores in results if scores.role == role] for role in ("in-distribution", "shift")}
        held_out = [scores for scores in results if scores.role == "held-out"]
        means = {"in-distribution": of_role["in-distribution"], "shifts": of_role["shift"]}
        means = {name: scores for name, scores in means.items() if scores}
        self.results, self.draws, self.summaries = results, draws, tuple(means)
        self.rows: tuple[Row, ...] = results[0].rows
        self.held_out = held_out[0]
        self.seeds = [row.members[0] for row in self.rows if row.kind == "seed"]
        self._measured: dict[str, Float] = {}
        self._drawn: dict[str, Float] = {}
        images = np.random.default_rng(seed)
        for name, sets in {"held-out": held_out, **means}.items():
            self._measured[name] = np.mean([scores.correct.mean(axis=1) for scores in sets], axis=0)
            self._drawn[name] = np.mean([resampled(scores.correct, draws, images) for scores in sets], axis=0)
        generator = np.random.default_rng([seed, 1])
        self._counts = generator.multinomial(len(self.seeds), np.full(len(self.seeds), 1 / len(self.seeds)), size=draws)

    def places(self, kind: str, **facts: object) -> list[int]:
        """The places of the rows of a kind whose options have these values."""
        return [
            place
            for place, row in enumerate(self.rows)
            if row.kind == kind and all(row.options.get(name) == value for name, value in facts.items())
        ]

    def of_size(self, kind: str, size: int) -> list[int]:
        """The places of the rows of a kind that are of so many seeds; of one seed, those of the seeds."""
        places = self.places("seed" if size == 1 else kind)
        return [place for place in places if len(self.rows[place].members) == size]

    def measured(self, summary: str) -> Float:
        """Accuracies (rows,)."""
        return self._measured[summary]

    def drawn(self, summary: str) -> Float:
        """Accuracies (draws, rows) on resampled images."""
        return self._drawn[summary]

    def resamples(self, places: Sequence[int]) -> bool:
        """Whether there are seeds enough to draw them again for these rows: twice as many as in the largest row."""
        most = max((len(self.rows[place].members) for place in places), default=0)
        return most > 0 and len(self.seeds) >= max(FEWEST_SEEDS, 2 * most)

    def weights(self, places: Sequence[int]) -> Float:
        """How often each row counts on the resampled seeds (draws, rows); 1 where there are too few of them."""
        counts = np.ones((self.draws, len(places)))
        if self.resamples(places):
            for column, place in enumerate(places):
                for member in self.rows[place].members:
                    counts[:, column] *= self._counts[:, self.seeds.index(member)]
        return counts

    def over(self, places: Sequence[int]) -> str:
        """What an interval of these rows is over."""
        return "seeds and images" if self.resamples(places) else "images"

    def mean(self, places: Sequence[int], summary: str) -> tuple[float, Float]:
        """The mean accuracy of rows, and its resamples (draws,), NaN where none of the rows was drawn."""
        weights, drawn = self.weights(places), self.drawn(summary)[:, list(places)]
        total = weights.sum(axis=1)
        with np.errstate(invalid="ignore"):
            samples: Float = np.where(total > 0, (weights * drawn).sum(axis=1) / np.where(total > 0, total, 1), np.nan)
        return float(self.measured(summary)[list(places)].mean()), samples

    def accuracy(self, name: str, places: Sequence[int], summary: str) -> Quantity:
        """The mean accuracy of rows, in percent."""
        value, samples = self.mean(places, summary)
        return quantity(self._named(name, summary), 100 * value, 100 * samples, over=self.over(places), unit="%")

    def difference(self, name: str, places: Sequence[int], others: Sequence[int], summary: str) -> Quantity:
        """The mean accuracy of rows minus that of others, in points."""
        (value, samples), (other, less) = self.mean(places, summary), self.mean(others, summary)
        over = self.over(places) if self.over(places) == self.over(others) else "images, and the seeds of some rows"
        if not self.rows[places[0]].members or not self.rows[others[0]].members:
            over = "seeds and images" if self.resamples(places) or self.resamples(others) else "images"
        return quantity(
            self._named(name, summary), 100 * (value - other), 100 * (samples - less), over=over, unit="points"
        )

    def gain(self, name: str, kind: str, other: str, summary: str, *, size: int, **facts: object) -> Quantity | None:
        """Rows of a kind minus those of another kind of the same seeds, in points; None where there are no such two."""
        twins = {self.rows[place].members: place for place in self.of_size(other, size)}
        places = [p for p in self.places(kind, **facts) if self.rows[p].members in twins]
        if not places:
            return None
        return self.difference(name, places, [twins[self.rows[place].members] for place in places], summary)

    @staticmethod
    def _named(name: str, summary: str) -> str:
        return ", ".join(part for part in (name, TITLES[summary]) if part)


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


# In place of a correlation.
UNDEFINED = "not defined: fewer than three of them, or all alike"


def quantity(name: str, value: float, samples: Float, *, over: str, unit: str = "") -> Quantity:
    """A number with the 95 % interval of its resamples; those that are NaN do not count, and NaN itself is none."""
    if not np.isfinite(value):
        return Quantity(name=name, value=None, over=over, unit=unit, text=UNDEFINED)
    finite = samples[np.isfinite(samples)]
    low, high = map(float, np.quantile(finite, [0.025, 0.975])) if len(finite) else (None, None)
    return Quantity(name=name, value=float(value), low=low, high=high, over=over, unit=unit)


def spearman(first: Float, second: Float) -> float:
    """Spearman's rank correlation of two (n,), ties at their mean rank; NaN where one does not vary."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def rank_correlation(scored: Scored, name: str, values: Mapping[int, float], summary: str) -> Quantity:
    """Spearman's correlation of a number by row with the rows' accuracy, over images and seeds where there are enough.

    `values`: place of a row -> its number. Seeds are drawn again for the rows of at most half as many; the rows of more
    seeds count once in every draw.
    """
    places = list(values)
    number = np.array([values[place] for place in places])
    small = [place for place in places if 2 * len(scored.rows[place].members) <= len(scored.seeds)]
    counts = np.ones((scored.draws, len(places)), int)
    columns = [places.index(place) for place in small]
    counts[:, columns] = scored.weights(small)
    drawn = scored.drawn(summary)[:, places]
    samples = np.array([spearman(np.repeat(number, c), np.repeat(a, c)) for c, a in zip(counts, drawn, strict=True)])
    over = "seeds and images" if scored.resamples(small) else "images"
    named = f"{name}, {TITLES[summary]}"
    return quantity(named, spearman(number, scored.measured(summary)[places]), samples, over=over)


def best_of(values: Float, candidates: Sequence[float]) -> Float:
    """The candidate with the highest value, values (..., n); ties go to the first."""
    chosen: Float = np.asarray(candidates, np.float64)[np.argmax(values, axis=-1)]
    return chosen


def at(values: Float, nodes: Sequence[float], wanted: float) -> Float:
    """Values (..., n) at sorted nodes, interpolated linearly at one place between them."""
    right = int(np.clip(np.searchsorted(nodes, wanted), 1, len(nodes) - 1))
    share = (wanted - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
    between: Float = (1 - share) * values[..., right - 1] + share * values[..., right]
    return between
