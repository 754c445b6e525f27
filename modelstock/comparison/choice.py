"""Which weight set to ship: the champion, chosen on the held-out split, and on held-out shifts where there are any.

Two rules. "best": the highest accuracy. "nearest": of the candidates that are not worse than the best by more than a
margin, the one nearest to the anchor. Test sets are not looked at.

The margin is a share, or one standard error of the difference to the best. That difference is paired: both weight sets
answer the same images, so what makes an image hard for both cancels. The standard error of a single accuracy is
several times as large, and would let in what is measurably worse.

Source: the one-standard-error rule of Breiman, Friedman, Olshen and Stone, Classification and Regression Trees (1984),
3.4.3, with the distance to the anchor for the size of the tree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modelstock.errors import DataError, few
from modelstock.params import STANDARD_ERROR, ChampionParams
from modelstock.scoring.results import Row, Scores

SPLITS = ("held-out", "held-out-shift")  # the roles of what is looked at


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A weight set that may be shipped.

    `accuracy`: the mean over the splits that are looked at. `difference`: of it to the best's, none above 0, with its
    paired `standard_error`. `distance`: to the anchor, over the mean seed's; None where it is not known.
    """

    name: str
    accuracy: float
    difference: float
    standard_error: float
    distance: float | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and among what.

    `splits`: the benchmarks that were looked at. `candidates`: how many there were. `best`: the most accurate one.
    `within`: those that are not worse than it by more than the margin, nearest to the anchor first where distances are
    known. `distances`: row -> |w - w0|; empty where they are not known. `seed_distance`: their mean over the seeds.
    """

    rule: str
    margin: str | float
    splits: tuple[str, ...]
    candidates: int
    best: str
    within: tuple[Candidate, ...]
    chosen: str
    distances: Mapping[str, float]
    seed_distance: float | None


def distinct(rows: Sequence[Row]) -> list[int]:
    """The places of the weight sets that can be shipped as one model: logit ensembles are several.

    Of those with the same tensors, the one that ties go to: of fewer seeds, then by name.
    """
    ranked = sorted((len(row.members), row.name, place) for place, row in enumerate(rows) if row.kind != "ensemble")
    first: dict[str, int] = {}
    for *_, place in ranked:
        first.setdefault(rows[place].identity, place)
    return sorted(first.values())


def choose(results: Sequence[Scores], params: ChampionParams, distances: Mapping[str, float] | None = None) -> Choice:
    """The champion by the rule of `params`; ties go to the one of fewer seeds, then by name.

    With sets of the role held-out-shift, the accuracy is the mean of the held-out split's and theirs, equally weighted.
    The anchor is a candidate like any other. `distances`: identity -> |w - w0|, which the rule "nearest" needs.

    Raises:
        DataError: no distance of a candidate that the rule needs one of, or splits too small for a standard error.
    """
    splits = sorted((s for s in results if s.role in SPLITS), key=lambda scores: SPLITS.index(scores.role))
    small = [scores.benchmark for scores in splits if scores.truth.size < 2]
    if small:
        raise DataError(few(small), got="one image", expected="two or more to choose on", cure="hold out more images")
    rows, places = results[0].rows, distinct(results[0].rows)
    # Rounded, so that a tie is one in whatever order the means are summed.
    accuracy = np.mean([scores.correct.mean(axis=1) for scores in splits], axis=0).round(12)
    best = min(places, key=lambda place: (-accuracy[place], *_tie(rows[place])))
    known = _distances(rows, places, distances, needed=params.rule == "nearest")
    seed_distances = [known[row.name] for row in rows if row.kind == "seed" and row.name in known]
    seed_distance = float(np.mean(seed_distances)) if seed_distances else None

    within: dict[int, Candidate] = {}
    for place in places:
        difference = float((accuracy[place] - accuracy[best]).round(12))
        error = _standard_error(splits, place, best)
        margin = error if params.margin == STANDARD_ERROR else float(params.margin)
        if -difference <= margin + 1e-12:
            name = rows[place].name
            relative = known[name] / seed_distance if known and seed_distance else None
            within[place] = Candidate(
                name=name,
                accuracy=float(accuracy[place]),
                difference=difference,
                standard_error=error,
                distance=relative,
            )
    ranked = sorted(within, key=lambda place: (known.get(rows[place].name, 0.0), *_tie(rows[place])))
    return Choice(
        rule=params.rule,
        margin=params.margin,
        splits=tuple(scores.benchmark for scores in splits),
        candidates=len(places),
        best=rows[best].name,
        within=tuple(within[place] for place in ranked),
        chosen=rows[best if params.rule == "best" else ranked[0]].name,
        distances=known,
        seed_distance=seed_distance,
    )


def _tie(row: Row) -> tuple[int, str]:
    return len(row.members), row.name


def _standard_error(splits: Sequence[Scores], place: int, best: int) -> float:
    """Of the mean over the splits of the difference in accuracy, paired over each split's images."""
    variances = [
        np.subtract(scores.correct[place], scores.correct[best], dtype=np.float64).var(ddof=1) / scores.truth.size
        for scores in splits
    ]
    return float(np.sqrt(np.sum(variances))) / len(splits)


def _distances(
    rows: Sequence[Row], places: Sequence[int], distances: Mapping[str, float] | None, *, needed: bool
) -> dict[str, float]:
    """Row -> distance, of every row that has weights; empty where they are not given."""
    missing = [rows[place].name for place in places if rows[place].identity not in (distances or {})]
    if needed and missing:
        raise DataError(
            "distances to the anchor",
            got=f"none of {few(missing)}",
            expected="one of each weight set, for the rule nearest",
            cure="compare with the weights at hand, or choose by the rule best",
        )
    return {row.name: distances[row.identity] for row in rows if row.kind != "ensemble"} if distances else {}
