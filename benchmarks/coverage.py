"""How often intervals and tests are right on simulated experiments whose truth is known, by method of computing them.

    python benchmarks/coverage.py [--experiments 1000] [--world NAME ...]

An experiment has 8 seeds, the 8 pairs of neighbours merged by two methods, and 1,000 images of 25 classes. A weight set
gets an image right where the sum of these is above 0, all normal: a level, the image's ease, and the mean over its
members of what the seed brings everywhere and on this image; a merge besides has the mean over its members of what the
method brings to that seed, and noise of its own per image. Two methods have the same level, so that the truth of their
difference is 0; the truth of everything else is the normal distribution at level / (standard deviation of the sum).
Where classes are drawn anew, an image's ease has a part that its class shares, and so has the difference between
methods.

Printed: for each world the share of 95 % intervals that cover the truth, for the difference between the methods, for
that between a method and single seeds, and for the accuracy of a single seed and of a method; the same for the crossed
percentile bootstrap, in which seeds are drawn with their rows (a pair's weight is the product of its members' counts)
and images, and for the images alone. With N experiments the share has a standard error of sqrt(0.05 * 0.95 / N).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from modelstock.comparison.differences import difference
from modelstock.comparison.intervals import Accuracies, Estimate
from modelstock.scoring.results import Row

SEEDS, IMAGES, CLASSES, LEVEL, EASE = 8, 1000, 25, 0.7, 1.0
NAMES = ("method - method", "method - seeds", "mean seed", "mean of pairs")


@dataclass(frozen=True)
class World:
    """Standard deviations. `seed`: of a seed; `method`: of a method on a seed; `seed_image`, `image`: of a seed, of a
    merge, on one image; `subset`: of a merge everywhere, beyond its members; `of_class`: of a class, and of a method on
    a class. `better`: what both methods have more than seeds."""

    seed: float = 0.1
    method: float = 0.05
    seed_image: float = 0.5
    image: float = 0.3
    subset: float = 0.0
    of_class: float = 0.0
    better: float = 0.1
    seeds: int = SEEDS
    images: int = IMAGES


@dataclass(frozen=True)
class Experiment:
    """`correct`: (rows, images) of seeds, pairs by one method, pairs by the other."""

    rows: tuple[Row, ...]
    correct: NDArray[np.bool_]
    classes: NDArray[np.int64]

    @property
    def places(self) -> tuple[list[int], list[int], list[int]]:
        """Of seeds, of pairs by one method, by the other."""
        count = len(self.rows) // 3
        return list(range(count)), list(range(count, 2 * count)), list(range(2 * count, 3 * count))


def simulate(world: World, random: np.random.Generator) -> Experiment:
    """One experiment."""
    count, images = world.seeds, world.images
    pairs = [tuple(sorted((seed, (seed + 1) % count))) for seed in range(count)]
    classes = random.integers(0, CLASSES, images)
    ease = LEVEL + EASE * random.standard_normal(images) + world.of_class * random.standard_normal(CLASSES)[classes]
    brought = world.seed * random.standard_normal((count, 1)) + world.seed_image * random.standard_normal(
        (count, images)
    )
    sums, rows = [ease + brought], [Row(f"seed-{i}", "", "seed", (i,), {}) for i in range(count)]
    for name in "ab":
        more = brought + world.method * random.standard_normal((count, 1))
        of_pairs = np.stack([more[list(pair)].mean(axis=0) for pair in pairs])
        of_pairs += world.subset * random.standard_normal((count, 1))
        of_pairs += world.image * random.standard_normal((count, images))
        of_class = world.of_class * random.standard_normal(CLASSES)[classes]
        sums.append(ease + world.better + of_pairs + of_class)
        rows += [Row(f"{name}/{pair[0]}-{pair[1]}", "", name, pair, {}) for pair in pairs]
    return Experiment(tuple(rows), np.concatenate(sums) > 0, classes)


def truth(world: World) -> dict[str, float]:
    """The expected value of every statistic, over seeds, images and classes."""
    common = EASE**2 + world.of_class**2
    of_seed = common + world.seed**2 + world.seed_image**2
    of_pair = common + (world.seed**2 + world.seed_image**2 + world.method**2) / 2
    of_pair += world.subset**2 + world.image**2 + world.of_class**2
    single = float(norm.cdf(LEVEL / math.sqrt(of_seed)))
    merged = float(norm.cdf((LEVEL + world.better) / math.sqrt(of_pair)))
    return dict(zip(NAMES, (0.0, merged - single, single, merged), strict=True))


Intervals = dict[str, Estimate]


def crossed(experiment: Experiment, *, by_class: bool = False) -> Intervals:
    """Ours."""
    seeds, ones, others = experiment.places
    clusters = [experiment.classes] if by_class else None
    accuracies = Accuracies(experiment.rows, [experiment.correct], clusters)
    values = (
        difference(accuracies.paired(ones, others), margin=0),
        difference(accuracies.over_members(ones, seeds), margin=0),
        accuracies.mean(seeds),
        accuracies.mean(ones),
    )
    return dict(zip(NAMES, values, strict=True))


def bootstrap(
    experiment: Experiment, random: np.random.Generator, *, seeds: bool, images: bool = True, draws: int = 400
) -> Intervals:
    """The percentile bootstrap over images, over seeds with all their rows, or over both."""
    count, total = len(experiment.rows) // 3, experiment.correct.shape[1]
    times = random.multinomial(total, np.full(total, 1 / total), size=draws) if images else np.ones((draws, total))
    accuracy = (times @ experiment.correct.T.astype(np.float64)) / total  # (draws, rows)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=draws) if seeds else np.ones((draws, count))
    drawn = drawn.astype(np.float64)
    pairs = [row.members for row in experiment.rows[count : 2 * count]]
    weights = np.stack([drawn[:, a] * drawn[:, b] for a, b in pairs], axis=1)
    empty = weights.sum(axis=1) == 0  # of few seeds, no two neighbours may be drawn
    weights[empty] = 1
    weights /= weights.sum(axis=1, keepdims=True)
    mean = [(accuracy[:, :count] * drawn).sum(axis=1) / count]
    mean += [(accuracy[:, start : start + count] * weights).sum(axis=1) for start in (count, 2 * count)]
    samples = (mean[1] - mean[2], mean[1] - mean[0], mean[0], mean[1])
    return {
        name: Estimate(0.0, *map(float, np.quantile(sample, [0.025, 0.975])))
        for name, sample in zip(NAMES, samples, strict=True)
    }


def covered(
    world: World, intervals: Callable[[Experiment], Intervals], experiments: int, seed: int = 0
) -> dict[str, float]:
    """The share of experiments in which each interval covers the truth."""
    random, right, wanted = np.random.default_rng(seed), dict.fromkeys(NAMES, 0), truth(world)
    for _ in range(experiments):
        for name, interval in intervals(simulate(world, random)).items():
            right[name] += interval.low <= wanted[name] <= interval.high
    return {name: count / experiments for name, count in right.items()}


WORLDS = {
    "seeds differ": World(),
    "seeds differ much": World(seed=0.3, method=0.1),
    "seeds do not differ": World(seed=0, method=0),
    "subsets bring something of their own": World(subset=0.1),
    "5,000 images": World(images=5000),
    "6 seeds": World(seeds=6),
    "16 seeds": World(seeds=16),
    "classes differ": World(of_class=0.3),
}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--world", action="append", choices=WORLDS, help="instead of all")
    options = parser.parse_args()
    random = np.random.default_rng(1)
    ways: dict[str, Callable[[Experiment], Intervals]] = {
        "crossed variance, t": crossed,
        "by class": lambda experiment: crossed(experiment, by_class=True),
        "crossed bootstrap": lambda experiment: bootstrap(experiment, random, seeds=True),
        "bootstrap of images": lambda experiment: bootstrap(experiment, random, seeds=False),
    }
    print(f"| world | intervals | {' | '.join(NAMES)} |")
    print("| --- | --- |" + " ---: |" * len(NAMES))
    for name in options.world or WORLDS:
        world = WORLDS[name]
        for way, intervals in ways.items():
            if way == "by class" and not world.of_class:
                continue
            shares = covered(world, intervals, options.experiments)
            print(f"| {name} | {way} | {' | '.join(f'{100 * share:.1f}' for share in shares.values())} |", flush=True)


if __name__ == "__main__":
    main()
