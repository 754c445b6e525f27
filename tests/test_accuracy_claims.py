"""Claims about accuracy on made-up results whose answer is known."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from modelstock.geometry import accuracy_claims, questions
from modelstock.geometry.accuracy import Scored, at, best_of, quantity, spearman
from modelstock.geometry.accuracy_claims import above, below
from modelstock.geometry.accuracy_figures import accuracy_figures, alpha_figure, plane_figure, ray_figure
from modelstock.geometry.space import Distance
from modelstock.scoring.results import Row, Scores

ROLES = {"held-out": "held-out", "shapes": "in-distribution", "shift-a": "shift", "shift-b": "shift"}
COUNT = 2000


class Key(NamedTuple):
    """A row that can be a key: options are pairs."""

    name: str
    kind: str
    members: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def row(name: str, kind: str, seeds: tuple[int, ...] = (), **options) -> Key:
    return Key(name, kind, tuple(seeds), tuple(options.items()))


def made(accuracies: dict[Key, float], *, roles=ROLES, spread: float = 0.0) -> Scored:
    """Results with these accuracies, the same on every benchmark: a row is right on the easiest share of examples.

    `spread`: of a row's own noise on top of an example's difficulty, so that rows differ by chance too.
    """
    results = []
    rows = tuple(Row(one.name, one.name.ljust(64, "0"), one.kind, one.members, dict(one.options)) for one in accuracies)
    for number, (benchmark, role) in enumerate(roles.items()):
        generator = np.random.default_rng(number)
        difficulty = generator.permutation(COUNT) / COUNT
        own = difficulty + spread * generator.standard_normal((len(accuracies), COUNT))
        order = np.argsort(np.argsort(own, axis=1), axis=1)
        correct = order < np.round(np.array(list(accuracies.values())) * COUNT)[:, None]
        truth = (np.arange(COUNT) % 2).astype(np.int32)
        ones = np.ones(correct.shape, np.float32)
        results.append(
            Scores(
                benchmark,
                role,
                "d" * 64,
                rows,
                ("ant", "bee"),
                truth,
                correct,
                correct,
                np.where(correct, truth, 1 - truth).astype(np.int32),
                0.5 * ones,
                ones,
            )
        )
    return Scored(results, draws=200, seed=0)


ANCHOR = row("anchor", "anchor")
SEEDS = [row(f"seed-{n}", "seed", (n,)) for n in range(8)]
SINGLE = dict.fromkeys(SEEDS, 0.6)
PAIRS = [(n, (n + 1) % 8) for n in range(7)]


def merges(kind: str, accuracy: float, subsets=PAIRS) -> dict[Key, float]:
    return {row(f"{kind}/{'-'.join(map(str, s))}", kind, tuple(s)): accuracy for s in subsets}


def numbers(claim) -> dict[str, float]:
    return {number.name: number.value for number in claim.quantities}


# --- the statistics


def test_rank_correlation_by_hand():
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6.
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 9, 8])) == pytest.approx(0.6)
    assert math.isnan(spearman(np.array([1.0, 2, 3]), np.array([5.0, 5, 5])))
    assert math.isnan(spearman(np.array([1.0, 2]), np.array([1.0, 2])))


def test_interpolation_and_the_best_by_hand():
    assert at(np.array([0.0, 10, 30]), [0.0, 1.0, 2.0], 1.25) == pytest.approx(15)
    assert at(np.array([0.0, 10, 30]), [0.0, 1.0, 2.0], 2.0) == pytest.approx(30)
    assert best_of(np.array([[1, 3, 3], [5, 0, 0]]), [0.0, 0.5, 1.0]).tolist() == [0.5, 0.0]


def test_a_row_counts_as_often_as_its_seeds_are_drawn_and_rows_of_many_seeds_are_not_drawn():
    scored = made({ANCHOR: 0.5, **SINGLE, **merges("uniform", 0.7), **merges("uniform", 0.7, [range(8)])})
    seeds, pairs = scored.places("seed"), scored.of_size("uniform", 2)
    single, double = scored.weights(seeds), scored.weights(pairs)
    assert (single.sum(axis=1) == 8).all()
    for column, place in enumerate(pairs):
        first, second = scored.rows[place].members
        assert (double[:, column] == single[:, first] * single[:, second]).all()
    assert (scored.weights(scored.of_size("uniform", 8)) == 1).all()
    assert scored.over(pairs) == "seeds and images"
    assert scored.over(scored.of_size("uniform", 8)) == scored.over(scored.places("anchor")) == "images"


def test_an_interval_over_seeds_is_wider_where_seeds_differ():
    alike = made({ANCHOR: 0.5, **SINGLE})
    apart = made({ANCHOR: 0.5, **{seed: 0.5 + 0.03 * n for n, seed in enumerate(SEEDS)}})
    widths = []
    for scored in (alike, apart):
        number = scored.accuracy("seeds", scored.places("seed"), "in-distribution")
        assert number.over == "seeds and images"
        widths.append(number.high - number.low)
    assert widths[1] > 1.5 * widths[0]


# --- claim 6


def shell(accuracy_of) -> tuple[Scored, dict[str, Distance]]:
    rows = {ANCHOR: 1.0, **{seed: 0.8 + n / 100 for n, seed in enumerate(SEEDS)}, **merges("uniform", 0.5)}
    rows |= merges("model_stock", 0.4)
    scored = made({one: accuracy_of(one, distance) for one, distance in rows.items()})
    return scored, {one.name: Distance(distance, distance) for one, distance in rows.items()}


def test_closer_is_better_where_accuracy_falls_with_the_distance():
    claim = accuracy_claims.closer_is_better(*shell(lambda one, distance: 0.9 - distance / 2))
    assert claim.verdict == "holds"
    assert claim.quantities[0].value < -0.99
    assert claim.quantities[0].over == "seeds and images"


def test_closer_is_not_better_where_accuracy_grows_with_the_distance_or_has_nothing_to_do_with_it():
    claim = accuracy_claims.closer_is_better(*shell(lambda one, distance: 0.4 + distance / 2))
    assert claim.verdict == "does not hold"
    claim = accuracy_claims.closer_is_better(*shell(lambda one, distance: 0.5 + (sum(one.members) * 3 % 5) / 50))
    assert claim.verdict != "holds"


def test_too_few_seeds_give_a_text_and_no_number():
    scored = made({ANCHOR: 0.5, **dict.fromkeys(SEEDS[:2], 0.6)})
    claim = accuracy_claims.closer_is_better(scored, dict.fromkeys(["anchor", "seed-0", "seed-1"], "not enough"))
    assert claim.verdict == "not enough seeds"
    assert [number.shown() for number in claim.quantities] == ["not enough seeds (2 of 3)"]


# --- the other claims of the paper


def test_model_stock_above_the_curve():
    paths = {row(f"path/{n}@{a}", "path", (n,), toward="seed", alpha=a): 0.64 for n in range(4) for a in (0.25, 0.5)}
    above = {ANCHOR: 0.5, **SINGLE, **paths, **merges("model_stock", 0.75)}
    claim = accuracy_claims.lens(made(above))
    assert (claim.verdict, claim.artefact) == ("holds", 1)
    assert next(iter(numbers(claim).values())) == pytest.approx(11)  # points above the best alpha
    assert accuracy_claims.lens(made({**above, **merges("model_stock", 0.6)})).verdict == "does not hold"
    assert accuracy_claims.lens(made({ANCHOR: 0.5, **SINGLE})) is None


def test_the_centre_against_the_best_seed():
    centre = row("centre", "centre")
    rows = {ANCHOR: 0.5, **SINGLE, SEEDS[3]: 0.65}
    claim = accuracy_claims.centre_beats_seeds(made({**rows, centre: 0.75}))
    assert claim.verdict == "holds"
    assert claim.quantities[0].value == pytest.approx(10)
    assert accuracy_claims.centre_beats_seeds(made({**rows, centre: 0.62})).verdict == "does not hold"
    assert accuracy_claims.centre_beats_seeds(made(rows)) is None


STEPS = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
GRAM = np.array([[1.0, 0.3], [0.3, 1.0]])


def plane(peak: tuple[float, float]) -> Scored:
    nodes = {row(f"plane/0-1@{a}@{b}", "plane", (0, 1), a=a, b=b): (a, b) for a in STEPS for b in STEPS}
    values = {one: 0.8 - 0.2 * math.dist(node, peak) for one, node in nodes.items()}
    return made({ANCHOR: 0.5, **SINGLE, **values})


def test_the_peak_of_a_plane_near_the_projection_and_at_a_seed():
    claim = accuracy_claims.plane_peak(plane((0.25, 0.25)), (0.25, 0.25), GRAM)
    assert claim.verdict == "holds"
    assert claim.quantities[0].value == 0
    far = accuracy_claims.plane_peak(plane((1.0, 1.0)), (0.25, 0.25), GRAM)
    assert far.verdict == "does not hold"
    # From (0.25, 0.25) to (1, 1): 0.75 * sqrt(2.6); to a seed: sqrt(0.5625 + 0.0625 - 0.1125).
    assert far.quantities[0].value == pytest.approx(0.75 * math.sqrt(2.6) / math.sqrt(0.5125))


def noisy(isotropic: float, covariance: float) -> Scored:
    both = {"isotropic": isotropic, "covariance": covariance}
    draws = {row(f"noise/@{of}@{n}", "noise", of=of, draw=n): value for of, value in both.items() for n in range(5)}
    return made({ANCHOR: 0.5, **SINGLE, **draws})


def test_noise_as_accurate_as_a_seed():
    assert accuracy_claims.noise_like_seeds(noisy(0.6, 0.6)).verdict == "holds"
    claim = accuracy_claims.noise_like_seeds(noisy(0.5, 0.6))
    assert claim.verdict == "does not hold"
    assert numbers(claim)["isotropic noise minus mean seed, shifts"] == pytest.approx(-10)


def paths(best: float) -> dict[Key, float]:
    return {
        row(f"path/{n}@{a}", "path", (n,), toward="seed", alpha=a): 0.8 - abs(a - best) / 2
        for n in range(8)
        for a in (0.2, 0.4, 0.6, 0.8)
    }


@pytest.mark.parametrize(("best", "verdict"), [(0.6, "holds"), (0.8, "does not hold")])
def test_the_best_alpha_and_the_cosine(best, verdict):
    scored = made({ANCHOR: 0.5, **SINGLE, **paths(best)})
    claim = accuracy_claims.best_alpha_is_cosine(scored, dict.fromkeys(range(8), 0.58))
    assert claim.verdict == verdict
    assert numbers(claim)["best alpha, mean"] == pytest.approx(best)


def test_what_further_seeds_add():
    fours = merges("model_stock", 0.704, [(0, 1, 2, 3), (4, 5, 6, 7)])
    claim = accuracy_claims.more_seeds_add_little(made({ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7), **fours}))
    assert claim.verdict == "holds"
    assert numbers(claim)["2 to 4 seeds, per seed, in distribution"] == pytest.approx(0.2)
    assert numbers(claim)["1 to 2 seeds, in distribution"] == pytest.approx(10)
    more = dict.fromkeys(fours, 0.75)
    claim = accuracy_claims.more_seeds_add_little(made({ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7), **more}))
    assert claim.verdict == "does not hold"
    assert accuracy_claims.more_seeds_add_little(made({ANCHOR: 0.5, **SINGLE})) is None


@pytest.mark.parametrize(("other", "verdict"), [(0.70, "holds"), (0.68, "holds"), (0.75, "does not hold")])
def test_the_unit_of_the_ratio(other, verdict):
    units = {
        row(f"granularity/{a}-{b}@{unit}", "granularity", (a, b), unit=unit): other
        for a, b in PAIRS
        for unit in ("filter", "block", "model")
    }
    claim = accuracy_claims.tensors_are_the_unit(made({ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7), **units}))
    assert claim.verdict == verdict


def test_periodic_runs_of_any_kind_against_the_same_seeds_after_training():
    rows = {ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7)}
    runs = {row("periodic/0-1", "periodic", (0, 1)): 0.8, row("periodic-reset/0-1", "periodic-reset", (0, 1)): 0.6}
    longer = {row("longer@2/0", "longer", (0,), factor=2): 0.65}
    claim = accuracy_claims.periodic_beats_post_hoc(made({**rows, **runs, **longer}))
    assert claim.verdict == "does not hold"
    values = numbers(claim)
    assert values["periodic/0-1 minus model_stock/0-1, in distribution"] == pytest.approx(10)
    assert values["periodic/0-1 minus longer@2/0, shifts"] == pytest.approx(15)
    assert values["periodic-reset/0-1 minus model_stock/0-1, shifts"] == pytest.approx(-10)
    assert accuracy_claims.periodic_beats_post_hoc(made(rows)) is None


# --- open questions


def test_costs_count_all_seeds_that_a_choice_needs():
    rows = {ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7), row("greedy/0-2", "greedy", (0, 2)): 0.7}
    rows |= {row("longer@3/0", "longer", (0,), factor=3): 0.6, row("periodic/0-1", "periodic", (0, 1)): 0.6}
    units = {name: cost for name, (cost, _) in questions.costs(made(rows)).items()}
    assert units == {
        "single seed": 1,
        "model_stock of 2": 2,
        "periodic of 2": 2,
        "longer, 3 times": 3,
        "greedy of 2": 8,
    }


def test_regret_of_choosing_on_the_held_out_split():
    rows = {ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7)}
    (best, *_), worse = merges("model_stock", 0.7), next(iter(SINGLE))
    claim = questions.selection_regret(made(rows), {"best": best[0], "nearest": worse[0]})
    assert claim.verdict == "measured"
    values = {name.partition(", the champion by the rule ")[2]: value for name, value in numbers(claim).items()}
    assert values["best, in distribution"] == pytest.approx(0)  # the same rows are best everywhere
    assert values["nearest, in distribution"] == pytest.approx(100 * (0.7 - SINGLE[worse]))


def rays(best: float) -> dict[Key, float]:
    return {
        row(f"ray/{a}-{b}@{s}", "ray", (a, b), s=s): 0.8 - abs(s - best) / 5
        for a, b in PAIRS[:3]
        for s in (0.5, 0.75, 1.0, 1.25)
    }


def test_the_curve_along_the_mean_update():
    scored = made({ANCHOR: 0.5, **SINGLE, **rays(0.75)})
    marks = dict.fromkeys(PAIRS[:3], 0.625), dict.fromkeys(PAIRS[:3], 1.125)
    values = numbers(questions.s_curve(scored, *marks))
    assert values["best s on the held-out split, mean"] == 0.75
    assert values["best s minus the s of Model Stock, in distribution"] == pytest.approx(2.5)
    assert values["best s minus the s of the uniform soup, shifts"] == pytest.approx(5)
    assert values["best s minus the s of SLERP, shifts"] == pytest.approx(7.5)


def test_what_the_formula_costs_against_the_oracle():
    rows = {ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7)}
    assert questions.formula_costs_little(made({**rows, **merges("oracle", 0.701)})).verdict == "holds"
    claim = questions.formula_costs_little(made({**rows, **merges("oracle", 0.75)}))
    assert claim.verdict == "does not hold"
    assert claim.quantities[0].value == pytest.approx(5)


def pool(name: str, gains: list[float]) -> dict[Key, float]:
    """Members a, b, c; gains of Model Stock over the uniform soup for the cosines 0.2, 0.4, 0.6 of their pairs."""
    rows = {row(f"pool/{name}/member/{m}", "pool", pool=name, method="member", members=(m,), of=3): 0.6 for m in "abc"}
    for gain, cosine, both in zip(gains, (0.2, 0.4, 0.6), ("ab", "ac", "bc"), strict=True):
        for method, value in (("uniform", 0.7), ("model_stock", 0.7 + gain)):
            options = {"pool": name, "method": method, "members": tuple(both), "of": 3, "cosine": cosine}
            rows[row(f"pool/{name}/{method}/{both}", "pool", **options)] = value
    for method, value in (("uniform", 0.72), ("greedy", 0.74)):
        options = {"pool": name, "method": method, "members": ("a", "b", "c"), "of": 3}
        rows[row(f"pool/{name}/{method}/all", "pool", **options)] = value
    return rows


def test_the_failure_map_and_whole_pools_against_model_stock_of_two():
    rows = {ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7), **pool("rates", [0.05, 0.02, -0.03])}
    scored = made(rows)
    claim = questions.failure_map(scored)
    assert claim.quantities[0].value == pytest.approx(-1)
    values = numbers(claim)
    assert values["rates (cosine 0.40): Model Stock minus uniform soup, shifts"] == pytest.approx(4 / 3)
    values = numbers(questions.pools_against_two(scored))
    assert values["rates, best single of 3 minus Model Stock of two, in distribution"] == pytest.approx(-10)
    assert values["rates, greedy of 3 minus Model Stock of two, shifts"] == pytest.approx(4)
    assert questions.failure_map(made({ANCHOR: 0.5, **SINGLE})) is None


# --- pictures


def test_pictures_are_drawn_where_there_are_rows_for_them_and_repeat():
    units = {row(f"granularity/0-1@{u}", "granularity", (0, 1), unit=u): 0.7 for u in ("filter", "block", "model")}
    rows = {ANCHOR: 0.5, **SINGLE, **merges("model_stock", 0.7), **merges("model_stock", 0.7, [(0, 1, 2, 3)])}
    rows |= {**units, **rays(0.75), **paths(0.6), **pool("rates", [0.05, 0.02, -0.03]), row("centre", "centre"): 0.7}
    noise = {row(f"noise/@{of}@0", "noise", of=of): 0.6 for of in ("isotropic", "covariance")}
    nodes = {row(f"plane@{a}@{b}", "plane", (0, 1), a=a, b=b): 0.6 + a * b / 9 for a in STEPS for b in STEPS}
    scored = made({**rows, **noise, **nodes})
    claims = [accuracy_claims.tensors_are_the_unit(scored)]
    distances = {one.name: Distance(0.5, 0.5) for one in scored.rows}
    marks = dict.fromkeys(PAIRS, 0.7), dict.fromkeys(PAIRS, 1.2)
    drawn = {
        **accuracy_figures(scored, distances, claims),
        **plane_figure(scored, GRAM, (0.4, 0.4), 0.7),
        **ray_figure(scored, *marks),
        **alpha_figure(scored, dict.fromkeys(range(8), 0.5)),
    }
    names = {"distance", "sizes", "noise", "granularity", "failure_map", "plane", "ray", "alpha"}
    assert set(drawn) == {f"{name}.png" for name in names}
    assert all(picture.startswith(b"\x89PNG") and title for title, picture in drawn.values())
    assert plane_figure(scored, GRAM, (0.4, 0.4), 0.7) == {"plane.png": drawn["plane.png"]}
    bare = made({ANCHOR: 0.5, **SINGLE})
    assert accuracy_figures(bare, {}, []) == {}
    assert plane_figure(bare, GRAM, None, 0.7) == ray_figure(bare, *marks) == alpha_figure(bare, {}) == {}


def test_without_shifts_everything_is_in_distribution_alone():
    two = {name: role for name, role in ROLES.items() if role != "shift"}
    scored = made({ANCHOR: 0.5, **SINGLE, row("centre", "centre"): 0.7}, roles=two)
    claim = accuracy_claims.centre_beats_seeds(scored)
    assert claim.verdict == "holds"
    assert not [number for number in claim.quantities if "shifts" in number.name]
    assert dataclasses.asdict(questions.cost(scored))["verdict"] == "measured"


def test_a_correlation_that_is_not_defined_is_no_number_and_no_verdict():
    of_two = quantity(
        "correlation", spearman(np.array([1.0, 2.0]), np.array([2.0, 1.0])), np.full(9, np.nan), over="images"
    )
    assert (of_two.value, of_two.low, of_two.shown()) == (
        None,
        None,
        "not defined: fewer than three of them, or all alike",
    )
    assert below(of_two, 0) == above(of_two, 0) == "undecided"
