"""What is said of a difference between two methods: interval, test, chance of being better, power, non-inferiority."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from modelstock.comparison import paired_tests
from modelstock.comparison.crossed import Crossed
from modelstock.comparison.intervals import Estimate

LEVEL, POWER = 0.05, 0.8
MIDDLES = (np.arange(400) + 0.5) / 400  # of equally probable parts of a distribution
FAR = 50.0  # standard errors, beyond which a probability is 0 or 1 to every digit shown


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of shares with its 95 % interval, and what follows from its standard error.

    `beats`: the probability that a new weight set of the one method, made of new seeds, beats one of the other on the
    same images, or why it is not known; see `chance`. `detectable`: the difference that a test at 5 % (two-sided)
    finds in 80 % of experiments of this size. `no_worse`: "yes", "no" or "undecided", whether it is above minus the
    margin: by where the interval ends. `equivalent`: the same for within the margin on both sides. `p`: of no
    difference, two-sided, by Student's t; `holm`: after Holm's correction over all differences of its family.
    """

    beats: Estimate | str = ""
    detectable: float = math.nan
    no_worse: str = ""
    equivalent: str = ""
    p: float = math.nan
    holm: float = math.nan


def difference(moments: Crossed, *, margin: float) -> Difference:
    """Everything but Holm's correction; `margin` is a share, 0.005 for half a point."""
    error = math.sqrt(moments.variance)
    half = float(stats.t.ppf(1 - LEVEL / 2, moments.freedom)) * error
    low, high = moments.value - half, moments.value + half
    inside, outside = -margin < low and high < margin, low > margin or high < -margin
    p = 2 * float(stats.t.sf(abs(moments.value) / error, moments.freedom)) if error else float(moments.value == 0)
    return Difference(
        moments.value,
        low,
        high,
        moments.over,
        beats=moments.shortage or chance(moments),
        detectable=half + float(stats.t.ppf(POWER, moments.freedom)) * error,
        no_worse="yes" if low > -margin else "no" if high < -margin else "undecided",
        equivalent="yes" if inside else "no" if outside else "undecided",
        p=p,
        holm=p,
    )


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """The differences of a family with Holm's correction over all of them."""
    corrected = paired_tests.holm([one.p for one in differences])
    return [dataclasses.replace(one, holm=p) for one, p in zip(differences, corrected, strict=True)]


def chance(moments: Crossed) -> Estimate:
    """The probability that the difference of a new draw of seeds is above 0, on the same images.

    A new difference is normal around the mean with the variance `spread`; as both are estimates, the probability is
    Student's t at mean / sqrt(spread + the mean's variance over seeds). The interval is that of Phi(mean / sd), from
    the non-central t. Where all draws so far differ by the same, it is Clopper and Pearson's for that many draws.

    Sources: Geisser, Predictive Inference (1993), section 2; Reiser and Guttman, Technometrics 28 (1986).
    """
    if not moments.spread:
        lowest = (LEVEL / 2) ** (1 / moments.draws)
        ends = {1: (1.0, lowest, 1.0), 0: (0.5, 0.0, 1.0), -1: (0.0, 0.0, 1 - lowest)}
        return Estimate(*ends[(moments.value > 0) - (moments.value < 0)], "seeds")
    freedom = moments.spread_freedom
    value = float(stats.t.cdf(moments.value / math.sqrt(moments.spread + moments.seeds), freedom))
    t = min(FAR, max(-FAR, moments.value / math.sqrt(moments.seeds)))

    ratio = math.sqrt(moments.seeds / moments.spread)
    low, high = (float(stats.norm.cdf(shift_at(t, freedom, p) * ratio)) for p in (1 - LEVEL / 2, LEVEL / 2))
    return Estimate(value, low, high, "seeds")


def shift_at(t: float, freedom: float, probability: float) -> float:
    """The non-centrality at which Student's non-central t is at most `t` with this probability.

    That probability is the mean of Phi(t sqrt(w / freedom) - shift) over w of the chi-squared distribution. scipy's own
    function has no number far from its middle.
    """
    roots = np.sqrt(stats.chi2.ppf(MIDDLES, freedom) / freedom)

    def excess(shift: float) -> float:
        return float(special.ndtr(t * roots - shift).mean()) - probability

    far = 5 + abs(t) * float(roots[-1])
    return float(optimize.brentq(excess, -far, far))
