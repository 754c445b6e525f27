"""What the paper claims about where weights lie and how accurate they are there, with what was measured of it.

Each function takes scored rows and gives one claim, or None where there are no rows to judge it by. A rule names its
thresholds; a verdict is by the 95 % interval alone.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from modelstock.comparison.intervals import Float
from modelstock.geometry.accuracy import TITLES, Scored, best_of, quantity, rank_correlation
from modelstock.geometry.claims import Claim, Quantity, Verdict, decided, not_enough
from modelstock.geometry.space import Distance
from modelstock.merging.methods.table import METHODS

LITTLE = 0.5  # points that count as little
LIKE = 1.0  # points within which two accuracies count as alike
NEAR = 0.1  # within which a ratio counts as the best one
FEWEST_ROWS = 5  # of a rank correlation
SINGLE = "one run each: the interval is over images alone"


def joint(verdicts: Sequence[Verdict]) -> Verdict:
    """Holds where all do, does not where one does not, else undecided."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if set(verdicts) == {"holds"} else "undecided"


def above(number: Quantity, bound: float) -> Verdict:
    """Whether a quantity lies above a bound, by its interval."""
    return _by_bound(number, bound, below=False)


def below(number: Quantity, bound: float) -> Verdict:
    """Whether a quantity lies below a bound, by its interval."""
    return _by_bound(number, bound, below=True)


def _by_bound(number: Quantity, bound: float, *, below: bool) -> Verdict:
    if number.low is None or number.high is None:
        return "undecided"
    return decided(low=number.low, high=number.high, bound=bound, below=below)


def within(number: Quantity, margin: float) -> Verdict:
    """Whether a quantity lies within a margin around zero, by its interval."""
    if number.low is None or number.high is None:
        return "undecided"
    if -margin <= number.low and number.high <= margin:
        return "holds"
    return "does not hold" if number.low > margin or number.high < -margin else "undecided"


def lens(scored: Scored) -> Claim | None:
    """Claim 1: Model Stock of two lies above the curve from the anchor to one seed."""
    best = best_alphas(scored)
    pairs = scored.of_size("model_stock", 2)
    if not best or not pairs:
        return None
    numbers = []
    for summary in scored.summaries:
        places = [place for place, _ in best.values()]
        name = "Model Stock of two minus WiSE-FT of one seed"
        numbers.append(scored.difference(name, pairs, places, summary))
    return Claim(
        key="lens",
        artefact=1,
        title="Model Stock lies above the curve from the anchor to a seed",
        rule="Model Stock of two is better than WiSE-FT of one seed at its best alpha on the held-out split, in "
        "distribution and on the shifts",
        verdict=joint([above(number, 0) for number in numbers]),
        quantities=tuple(numbers),
        remark="alphas are chosen once, and not again for each resample",
    )


def alpha_curves(scored: Scored) -> dict[int, list[tuple[float, int]]]:
    """Seed -> (alpha, place) from the anchor to the seed, where it was scored."""
    anchor, curves = scored.places("anchor"), {}
    for seed_place in scored.places("seed"):
        members = scored.rows[seed_place].members
        inner = [
            (float(scored.rows[place].options["alpha"]), place)
            for place in scored.places("path", toward="seed")
            if scored.rows[place].members == members
        ]
        if inner and anchor:
            curves[members[0]] = sorted([(0.0, anchor[0]), *inner, (1.0, seed_place)])
    return curves


def best_alphas(scored: Scored) -> dict[int, tuple[int, float]]:
    """Seed -> the place and alpha of the best point from the anchor to it on the held-out split."""
    held_out, best = scored.measured("held-out"), {}
    for seed, curve in alpha_curves(scored).items():
        alpha, place = curve[int(np.argmax([held_out[place] for _, place in curve]))]
        best[seed] = (place, alpha)
    return best


def closer_is_better(scored: Scored, distances: Mapping[str, Distance | str]) -> Claim:
    """Claim 6: the nearer to the centre, the more accurate. `distances`: by name of a row."""
    known = {
        place: distance.whole
        for place, row in enumerate(scored.rows)
        if isinstance(distance := distances.get(row.name), Distance)
    }
    merges = {place: d for place, d in known.items() if scored.rows[place].kind in ("seed", "centre", *METHODS)}
    title = "the closer to the centre, the better"
    rule = "the rank correlation of distance and accuracy, over all rows, lies below 0, in distribution and on shifts"
    if len(known) < FEWEST_ROWS:
        text = not_enough(len(scored.seeds), 3)
        nothing = Quantity(name="rank correlation", value=None, text=text)
        return Claim(
            key="closer", artefact=6, title=title, rule=rule, verdict="not enough seeds", quantities=(nothing,)
        )
    whole = [rank_correlation(scored, f"{len(known)} rows", known, summary) for summary in scored.summaries]
    numbers = list(whole)
    if FEWEST_ROWS <= len(merges) < len(known):
        name = f"{len(merges)} seeds and merges alone"
        numbers += [rank_correlation(scored, name, merges, summary) for summary in scored.summaries]
    return Claim(
        key="closer",
        artefact=6,
        title=title,
        rule=rule,
        verdict=joint([below(number, 0) for number in whole]),
        quantities=tuple(numbers),
        remark="rows that share seeds are not independent; the interval knows it as far as seeds are drawn again",
    )


def centre_beats_seeds(scored: Scored) -> Claim | None:
    """Claim 7: the centre is better than every seed."""
    centre, seeds = scored.places("centre"), scored.places("seed")
    if not centre:
        return None
    best, numbers = [], []
    for summary in scored.summaries:
        value = scored.measured(summary)[centre[0]] - scored.measured(summary)[seeds].max()
        samples = scored.drawn(summary)[:, centre[0]] - scored.drawn(summary)[:, seeds].max(axis=1)
        name = f"centre minus the best of {len(seeds)} seeds there, {TITLES[summary]}"
        best.append(quantity(name, 100 * value, 100 * samples, over="images", unit="points"))
        numbers.append(scored.difference("centre minus mean seed", centre, seeds, summary))
    return Claim(
        key="centre",
        artefact=7,
        title="the centre beats every seed",
        rule="the centre minus the seed that is best on the very set lies above 0, in distribution and on the shifts",
        verdict=joint([above(number, 0) for number in best]),
        quantities=(*best, *numbers),
        remark="the best seed is chosen on the test images, in each resample again, which favours the seeds",
    )


def plane_peak(scored: Scored, projection: tuple[float, float] | None, gram: Float) -> Claim | None:
    """Claim 8: in the plane of anchor and two seeds, accuracy peaks near the centre's projection.

    `projection`: (a, b) of it, None without a centre; `gram`: inner products (2, 2) of the two seeds' updates.
    """
    places = scored.places("plane")
    if not places or projection is None:
        return None
    nodes = [(float(scored.rows[p].options["a"]), float(scored.rows[p].options["b"])) for p in places]
    away = [_length(node, projection, gram) for node in nodes]
    seeds = np.mean([_length(node, projection, gram) for node in ((1.0, 0.0), (0.0, 1.0))])
    numbers = []
    for summary in scored.summaries:
        value = best_of(scored.measured(summary)[places], away)
        samples = best_of(scored.drawn(summary)[:, places], away)
        name = f"distance of the best node over that of a seed, {TITLES[summary]}"
        numbers.append(quantity(name, float(value / seeds), samples / seeds, over="images"))
    shown = ", ".join(f"{value:.2f}" for value in projection)
    return Claim(
        key="plane",
        artefact=8,
        title="accuracy peaks near the centre",
        rule="in the plane through anchor and two seeds, the best node of the grid is nearer to the centre's "
        "projection than the two seeds are on average, in distribution and on the shifts",
        verdict=joint([below(number, 1) for number in numbers]),
        quantities=tuple(numbers),
        remark=f"one plane of {len(places)} nodes; the centre's projection has the coordinates {shown}",
    )


def _length(node: tuple[float, float], other: tuple[float, float], gram: Float) -> float:
    step = np.subtract(node, other)
    return float(np.sqrt(step @ gram @ step))


def noise_like_seeds(scored: Scored) -> Claim | None:
    """Claim 9: the centre plus Gaussian noise of the shell's radius is as accurate as a seed."""
    seeds, numbers = scored.places("seed"), {}
    for kind in ("isotropic", "covariance"):
        places = scored.places("noise", of=kind)
        if not places:
            return None
        generator = np.random.default_rng(len(places))
        counts = generator.multinomial(len(places), np.full(len(places), 1 / len(places)), size=scored.draws)
        for summary in scored.summaries:
            value, samples = scored.mean(seeds, summary)
            noisy = (counts * scored.drawn(summary)[:, places]).sum(axis=1) / len(places)
            name = f"{kind} noise minus mean seed, {TITLES[summary]}"
            mean = float(scored.measured(summary)[places].mean())
            over = f"draws, {scored.over(seeds)}"
            numbers[kind, summary] = quantity(
                name, 100 * (mean - value), 100 * (noisy - samples), over=over, unit="points"
            )
    return Claim(
        key="noise",
        artefact=9,
        title="a seed is the centre plus noise",
        rule=f"the centre plus isotropic Gaussian noise, as long in each tensor as a seed's residual, is as accurate "
        f"as a seed within {LIKE:g} point, in distribution and on the shifts",
        verdict=joint([within(numbers["isotropic", summary], LIKE) for summary in scored.summaries]),
        quantities=tuple(numbers.values()),
        remark="noise of the seeds' own covariance mixes the residuals of the seeds set aside at random",
    )


def best_alpha_is_cosine(scored: Scored, cosines: Mapping[int, float]) -> Claim | None:
    """Claim 12: WiSE-FT is the case N = 1, and its best alpha the cosine. `cosines`: by seed, with the other seeds."""
    curves = alpha_curves(scored)
    if not curves:
        return None
    gaps, samples = [], []
    for seed, curve in curves.items():
        alphas, places = [alpha for alpha, _ in curve], [place for _, place in curve]
        gaps.append(float(best_of(scored.measured("held-out")[places], alphas)) - cosines[seed])
        samples.append(best_of(scored.drawn("held-out")[:, places], alphas) - cosines[seed])
    generator = np.random.default_rng(len(gaps))
    counts = generator.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), size=scored.draws)
    mean = (counts.T * np.array(samples)).sum(axis=0) / len(gaps)
    gap = quantity("best alpha minus cosine", float(np.mean(gaps)), mean, over="seeds and images")
    alpha = float(np.mean([alpha for _, alpha in best_alphas(scored).values()]))
    numbers = (
        gap,
        Quantity(name="best alpha, mean", value=alpha),
        Quantity(name="cosine, mean", value=float(np.mean([cosines[seed] for seed in curves]))),
    )
    return Claim(
        key="alpha",
        artefact=12,
        title="WiSE-FT is the case of one seed",
        rule=f"the best alpha of a seed on the held-out split is its cosine with other seeds, on average within "
        f"{NEAR:g}",
        verdict=within(gap, NEAR),
        quantities=numbers,
        remark=f"{len(gaps)} seeds; alphas on a grid of {len(next(iter(curves.values())))} values",
    )


def sizes_of(scored: Scored, kind: str) -> list[int]:
    """The numbers of seeds in rows of a kind, with 1 for the seeds."""
    return sorted({1, *(len(scored.rows[place].members) for place in scored.places(kind))})


def more_seeds_add_little(scored: Scored) -> Claim | None:
    """Claim 13: beyond two seeds, each adds little."""
    sizes = sizes_of(scored, "model_stock")
    if len(sizes) < 3 or sizes[1] != 2:
        return None
    numbers, beyond = [], []
    for fewer, more in pairwise(sizes):
        steps = more - fewer
        for summary in scored.summaries:
            name = f"{fewer} to {more} seeds" + (", per seed" if steps > 1 else "")
            whole = scored.difference(
                name, scored.of_size("model_stock", more), scored.of_size("model_stock", fewer), summary
            )
            number = _over(whole, steps)
            numbers.append(number)
            if fewer >= 2 and more <= 4:
                beyond.append(number)
    if not beyond:
        return None
    return Claim(
        key="seeds",
        artefact=13,
        title="beyond two seeds, each adds little",
        rule=f"from two to four seeds, each adds less than {LITTLE:g} points to Model Stock, in distribution and on "
        "the shifts",
        verdict=joint([below(number, LITTLE) for number in beyond]),
        quantities=tuple(numbers),
        remark="rows of more than half of the seeds are not drawn again by seed",
    )


def _over(number: Quantity, steps: int) -> Quantity:
    value, low, high = (None if n is None else n / steps for n in (number.value, number.low, number.high))
    return Quantity(name=number.name, value=value, low=low, high=high, over=number.over, unit=number.unit)


def tensors_are_the_unit(scored: Scored) -> Claim | None:
    """Claim 14: a ratio per tensor is as good as per filter, block, or for the whole model."""
    numbers = []
    for unit in ("filter", "block", "model"):
        for summary in scored.summaries:
            name = f"per {unit} minus per tensor"
            number = scored.gain(name, "granularity", "model_stock", summary, size=2, unit=unit)
            numbers += [number] if number else []
    if not numbers:
        return None
    return Claim(
        key="granularity",
        artefact=14,
        title="a ratio per tensor is the right unit",
        rule=f"no other unit is better by more than {LITTLE:g} points, in distribution or on the shifts",
        verdict=joint([below(number, LITTLE) for number in numbers]),
        quantities=tuple(numbers),
    )


def periodic_beats_post_hoc(scored: Scored) -> Claim | None:
    """Claim 15: merging during training is better than after it. Every kind of row whose name begins with periodic."""
    numbers, judged = [], []
    for place, row in enumerate(scored.rows):
        if not row.kind.startswith("periodic"):
            continue
        for kind in ("model_stock", "longer"):
            others = [
                other
                for other in scored.places(kind)
                if scored.rows[other].members == row.members
                or (kind == "longer" and scored.rows[other].options.get("factor") == len(row.members))
            ]
            for other in others[:1]:
                for summary in scored.summaries:
                    value = scored.measured(summary)[place] - scored.measured(summary)[other]
                    samples = scored.drawn(summary)[:, place] - scored.drawn(summary)[:, other]
                    name = f"{row.name} minus {scored.rows[other].name}, {TITLES[summary]}"
                    number = quantity(name, 100 * value, 100 * samples, over="images", unit="points")
                    numbers.append(number)
                    judged += [above(number, 0)] if kind == "model_stock" else []
    if not judged:
        return None
    return Claim(
        key="periodic",
        artefact=15,
        title="merging during training is better than after it",
        rule="every periodic run is better than Model Stock of the same seeds after training, in distribution and on "
        "the shifts",
        verdict=joint(judged),
        quantities=tuple(numbers),
        remark=SINGLE,
    )
