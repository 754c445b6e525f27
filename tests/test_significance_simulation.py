"""What intervals and tests promise, on simulated experiments whose truth is known: benchmarks/coverage.py has more."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm

from modelstock.comparison.crossed import Sample, Subsets, crossed
from modelstock.comparison.differences import difference, holm
from modelstock.comparison.intervals import Accuracies, BalancedAccuracies
from modelstock.comparison.paired_tests import mcnemar
from modelstock.scoring.results import Row

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import coverage as simulation

EXPERIMENTS = 200


def within(share: float, promised: float, experiments: int = EXPERIMENTS) -> bool:
    """Whether a share of experiments could be one of an event of that probability: all but one in 10,000 times."""
    low, high = binom.ppf([5e-5, 1 - 5e-5], experiments, promised) / experiments
    return bool(low <= share <= high)


def at_least(share: float, promised: float, experiments: int = EXPERIMENTS) -> bool:
    return bool(share >= binom.ppf(1e-4, experiments, promised) / experiments)


@pytest.mark.parametrize("name", ["seeds differ", "seeds differ much", "6 seeds", "16 seeds"])
def test_intervals_over_seeds_and_images_cover_the_truth_as_often_as_they_say(name):
    shares = simulation.covered(simulation.WORLDS[name], simulation.crossed, EXPERIMENTS)
    assert all(within(share, 0.95) for share in shares.values()), shares


@pytest.mark.parametrize("name", ["seeds do not differ", "subsets bring something of their own"])
def test_intervals_cover_at_least_as_often_where_seeds_or_subsets_are_not_as_assumed(name):
    shares = simulation.covered(simulation.WORLDS[name], simulation.crossed, EXPERIMENTS)
    assert all(at_least(share, 0.95) for share in shares.values()), shares


def test_intervals_over_images_alone_miss_the_truth_where_seeds_differ():
    random = np.random.default_rng(0)
    shares = simulation.covered(
        simulation.WORLDS["seeds differ much"],
        lambda experiment: simulation.bootstrap(experiment, random, seeds=False, draws=200),
        100,
    )
    assert all(share < 0.8 for share in shares.values()), shares


def test_where_classes_differ_drawing_by_class_covers_and_drawing_by_image_does_not():
    world = simulation.WORLDS["classes differ"]
    by_class = simulation.covered(world, lambda e: simulation.crossed(e, by_class=True), EXPERIMENTS)
    by_image = simulation.covered(world, simulation.crossed, EXPERIMENTS)
    assert all(within(share, 0.95) for share in by_class.values()), by_class
    assert by_image["method - method"] < 0.85
    assert by_image["method - seeds"] < 0.85


def null_experiments(world: simulation.World, count: int, seed: int = 3) -> Iterator[simulation.Experiment]:
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield simulation.simulate(world, random)


def paired(experiment: simulation.Experiment, *, by_class: bool = False):
    _, ones, others = experiment.places
    clusters = [experiment.classes] if by_class else None
    return Accuracies(experiment.rows, [experiment.correct], clusters).paired(ones, others)


def test_the_test_of_no_difference_rejects_at_its_level_and_of_five_with_holm_one_or_more_at_most_as_often():
    p, families = [], []
    for experiment in null_experiments(simulation.World(), EXPERIMENTS):
        p.append(difference(paired(experiment), margin=0))
    families = [holm(p[start : start + 5]) for start in range(0, EXPERIMENTS, 5)]
    assert within(np.mean([one.p < 0.05 for one in p]), 0.05)
    any_rejected = np.mean([any(one.holm < 0.05 for one in family) for family in families])
    assert any_rejected <= binom.ppf(1 - 1e-4, len(families), 0.05) / len(families)


def test_the_test_rejects_at_its_level_by_class_and_too_often_by_image_where_classes_differ():
    world = simulation.WORLDS["classes differ"]
    experiments = list(null_experiments(world, EXPERIMENTS))
    by_class = np.mean([difference(paired(e, by_class=True), margin=0).p < 0.05 for e in experiments])
    by_image = np.mean([difference(paired(e), margin=0).p < 0.05 for e in experiments])
    assert within(by_class, 0.05)
    assert by_image > 0.15


def test_mcnemars_test_rejects_at_most_at_its_level_for_two_weight_sets_that_are_equally_good():
    """Of two weight sets whose seeds are the same; of two methods over seeds it says nothing, and rejects too often."""
    random = np.random.default_rng(4)
    same = simulation.World(seed=0, method=0)
    rejected = [mcnemar(*simulation.simulate(same, random).correct[[8, 16]])[2] < 0.05 for _ in range(1000)]
    assert np.mean(rejected) <= binom.ppf(1 - 1e-4, 1000, 0.05) / 1000
    much = simulation.WORLDS["seeds differ much"]
    rejected = [mcnemar(*simulation.simulate(much, random).correct[[8, 17]])[2] < 0.05 for _ in range(200)]
    assert np.mean(rejected) > 0.3


def test_a_method_that_is_worse_by_the_margin_is_called_no_worse_as_often_as_the_interval_misses():
    world = simulation.World()
    worse = [difference(paired(e), margin=0.0) for e in null_experiments(world, EXPERIMENTS, seed=5)]
    assert binom.ppf(5e-5, EXPERIMENTS, 0.025) / EXPERIMENTS <= np.mean([one.no_worse == "yes" for one in worse])
    assert np.mean([one.no_worse == "yes" for one in worse]) <= binom.ppf(1 - 5e-5, EXPERIMENTS, 0.025) / EXPERIMENTS


def normal(random, mean: float, spread: float, seeds: int = 8, images: int = 50) -> Sample:
    """Rows whose mean over images is normal over seeds: the images are the same to all."""
    values = mean + spread * random.standard_normal(seeds)
    return Sample(Subsets(tuple((seed,) for seed in range(seeds))), (np.repeat(values[:, None], images, axis=1),))


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (0.5, 1.0), (1.5, 1.0)])
def test_the_chance_of_beating_is_that_of_a_new_draw_and_its_interval_covers(mean, spread):
    random, expected, covers, beaten = np.random.default_rng(6), norm.cdf(mean / spread), [], []
    for _ in range(EXPERIMENTS):
        beats = difference(crossed([normal(random, mean, spread)]), margin=0).beats
        covers.append(beats.low <= expected <= beats.high)
        beaten.append(beats.value)
    assert within(np.mean(covers), 0.95)
    # A prediction from 8 seeds is drawn toward one half, and by no more than seeds so few call for.
    assert abs(np.mean(beaten) - expected) < 0.04


def test_the_detectable_difference_is_found_in_four_experiments_of_five():
    random = np.random.default_rng(7)
    every = [difference(crossed([normal(random, 0, 1.0)]), margin=0).detectable for _ in range(EXPERIMENTS)]
    typical = np.sqrt(np.mean(np.square(every)))
    found = [difference(crossed([normal(random, typical, 1.0)]), margin=0).p < 0.05 for _ in range(EXPERIMENTS)]
    assert 0.7 < np.mean(found) < 0.9


@pytest.mark.parametrize(
    ("shares", "images", "low", "high"), [((0.69, 0.31), 400, 93, 97), ((0.95, 0.05), 200, 84, 93)]
)
def test_intervals_of_balanced_accuracy_cover_unless_a_label_has_few_images(shares, images, low, high):
    """Two weight sets that are equally unsure on seven images of ten; the second example has ten of the rare label."""
    random, covers, recalls = np.random.default_rng(9), [], np.array([[0.95, 0.5], [0.85, 0.7]])
    rows = (Row("a", "", "a", (0,), {}), Row("b", "", "b", (1,), {}))
    for _ in range(1000):
        truth = random.choice(2, images, p=shares)
        ease = np.stack([random.random(images)] * 2)
        ease[1] = np.where(random.random(images) < 0.7, ease[0], random.random(images))
        found = difference(BalancedAccuracies(rows, [ease < recalls[:, truth]], [truth]).paired([0], [1]), margin=0)
        covers.append(found.low <= -0.05 <= found.high)
    assert low / 100 < np.mean(covers) < high / 100


def test_seeds_that_test_sets_share_are_drawn_once_for_all_of_them():
    """Two sets on which a seed does the same: its variance does not shrink with the number of sets."""
    random, covers = np.random.default_rng(8), []
    for _ in range(EXPERIMENTS):
        brought = 0.3 * random.standard_normal((8, 1))
        sets = [0.5 + brought + random.standard_normal((8, 400)) + random.standard_normal(400) > 0 for _ in range(2)]
        moments = crossed([Sample(Subsets(tuple((seed,) for seed in range(8))), tuple(x.astype(float) for x in sets))])
        one = difference(moments, margin=0)
        covers.append(one.low <= norm.cdf(0.5 / np.sqrt(2.09)) <= one.high)
    assert within(np.mean(covers), 0.95)
