"""The centre that seeds lie around: distances to it, the ratio that would be right, and what is left of the seeds.

The centre mu is not known. It is estimated by *reference* seeds, which are never those that a statement is about: the
seeds of `--centre`, or else, for a subset, the seeds outside it. Their own noise would make every distance too large.
So mu only enters through inner products of different seeds, whose noise is independent: <v, mu> is the mean of <v, v_k>
over the reference seeds k, and |mu|^2 the mean of <v_k, v_l> over two different ones. Both are unbiased, and so are all
squared distances made of them. Where the centre is one checkpoint alone it is taken for mu itself.

Over the seeds of one pool, <v_i, mu> and <v_i, v_j> average to the estimate of |mu|^2: so with references from the same
pool the mean of residuals, and of their inner products, is zero by construction, and only their spread tells anything.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from modelstock.geometry.stack import Stack
from modelstock.merging.kernels import Float
from modelstock.merging.methods.blend import cosines
from modelstock.merging.methods.model_stock import stock_ratio


@dataclass(frozen=True, kw_only=True)
class Around:
    """Subsets S of a size n and the centre, squared lengths per tensor and subset (T, S).

    `mean`: |mean of v_i|^2; `along`: <mean of v_i, mu>; `centre`: |mu|^2, NaN with one reference seed; `noise`: the
    variance of `along` for the reference seeds' noise, NaN with one; `cosine`: the mean over pairs.
    """

    size: int
    members: NDArray[np.bool_]
    mean: Float
    along: Float
    centre: Float
    noise: Float
    cosine: Float

    @property
    def ratio(self) -> Float:
        """Model Stock's t (T, S) as it is applied, in [0, 1]; 1 for single seeds, which are not pulled."""
        if self.size == 1:
            return np.ones_like(self.mean)
        return np.clip(stock_ratio(self.cosine, self.size), 0.0, 1.0)

    @property
    def oracle(self) -> Float:
        """The ratio that comes nearest to the centre: <mean, mu> / |mean|^2."""
        with np.errstate(divide="ignore", invalid="ignore"):  # updates that cancel each other have no mean to scale
            return self.along / self.mean

    @property
    def squared_error(self) -> Float:
        """(t - oracle)^2 without the part that is the reference seeds' noise: unbiased, so it may be below zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((self.ratio - self.oracle) ** 2 - self.noise / self.mean**2)

    def distance(self, ratio: Float | float = 1.0) -> Float:
        """|ratio * mean - mu|^2 (T, S), unbiased; the ratio 0 is the anchor."""
        return np.asarray(ratio**2 * self.mean - 2 * ratio * self.along + self.centre)


def seeds_needed(stack: Stack, size: int, *, references: int) -> int:
    """Seeds under test that a statement about subsets of a size needs, with this many reference seeds."""
    return size if stack.has_centre else size + references


@lru_cache(maxsize=4)  # several statistics ask for the same in turn
def around(stack: Stack, size: int) -> Around:
    """Subsets of a size and the centre. At least one reference seed is needed; see `seeds_needed`."""
    members = stack.subsets(size)
    width = stack.grams.shape[-1]
    shares = np.zeros((len(members), width))
    shares[:, : stack.count] = members / size
    reference = np.zeros((len(members), width))
    reference[:, stack.count :] = 1
    if not stack.has_centre:
        reference[:, : stack.count] = ~members
    count = reference[0].sum()
    products = shares @ stack.grams
    mean = np.maximum(0, (products * shares).sum(axis=2))
    along = (products * reference).sum(axis=2) / count
    own = np.diagonal(stack.grams, axis1=1, axis2=2) @ reference.T
    if count > 1:
        both = (reference @ stack.grams * reference).sum(axis=2)
        centre = (both - own) / (count * (count - 1))
        noise = ((products - along[:, :, None]) ** 2 * reference).sum(axis=2) / (count * (count - 1))
    elif stack.has_centre:
        centre, noise = own, np.zeros_like(mean)
    else:
        centre = noise = np.full_like(mean, np.nan)
    between = cosines(stack.seeds)
    pairs = (members @ between * members).sum(axis=2) - size
    cosine = pairs / (size * (size - 1)) if size > 1 else np.ones_like(mean)
    return Around(
        size=size, members=members, mean=mean, along=along, centre=centre, noise=noise, cosine=np.clip(cosine, -1, 1)
    )


def bias(stack: Stack, size: int = 2) -> Float:
    """Mean over subsets of t minus the oracle's (T,)."""
    subset = around(stack, size)
    return np.asarray((subset.ratio - subset.oracle).mean(axis=1))


def mean_square(stack: Stack, size: int = 2) -> Float:
    """Mean over subsets of (t - oracle)^2 (T,), unbiased."""
    return np.asarray(around(stack, size).squared_error.mean(axis=1))


def root_mean_square(stack: Stack, size: int = 2) -> float:
    """The root of `mean_square` over tensors; 0 where noise explains all of it."""
    square = float(mean_square(stack, size).mean())
    return math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan


def root_mean_square_of(values: Float) -> float:
    """The root mean square of cosines."""
    return float(np.sqrt(np.mean(values**2)))


def residuals_to_centre(stack: Stack) -> Float:
    """Cosines (T, N) between residuals w_i - mu and the update mu - w0 of the centre; NaN without either."""
    single = around(stack, 1)
    return _over(single.along - single.centre, single.distance() * single.centre)


def residual_pairs(stack: Stack) -> tuple[NDArray[np.intp], Float]:
    """Pairs (S, 2) and the cosines (T, S) between their residuals; NaN where no residual is larger than its noise.

    <r_i, r_j> = <v_i, v_j> - <v_i, mu> - <v_j, mu> + |mu|^2, over the pair's mean |r|^2.
    """
    pair = around(stack, 2)
    numbers = np.array([np.flatnonzero(row) for row in pair.members])
    first, second = numbers.T
    inner = stack.seeds[:, first, second]
    squares = np.diagonal(stack.seeds, axis1=1, axis2=2)
    own = (squares[:, first] + squares[:, second]) / 2
    rest = pair.centre - 2 * pair.along
    return numbers, _over(inner + rest, np.sign(own + rest) * (own + rest) ** 2)


def _over(inner: Float, squares: Float) -> Float:
    """Inner products over the root of a product of squares; NaN where the product is not above zero."""
    return np.asarray(inner / np.sqrt(np.where(squares > 0, squares, np.nan)))


def kurtosis(stack: Stack) -> float:
    """Kurtosis over seeds of projections on random directions, 3 for a Gaussian; of four seeds or more.

    From the k-statistics of each direction's N values, which are unbiased, in units of the tensor's own variance:
    3 + E[k4] / kappa^2, with kappa from E[k2^2] = kappa^2 (N + 1) / (N - 1) + E[k4] / N. NaN without directions.
    """
    count = stack.count
    fourth: list[Float] = []
    second: list[Float] = []
    for projections in stack.projections:
        if projections.shape[1] < 8:  # too few to know the tensor's variance
            continue
        centred = projections - projections.mean(axis=0)
        m2, m4 = (centred**2).mean(axis=0), (centred**4).mean(axis=0)
        k2 = m2 * count / (count - 1)
        k4 = count**2 * ((count + 1) * m4 - 3 * (count - 1) * m2**2) / ((count - 1) * (count - 2) * (count - 3))
        scale = k2.mean()
        fourth.append(k4 / scale**2)
        second.append((k2 / scale) ** 2)
    if not fourth:
        return float("nan")
    k4_mean, k2_square = np.concatenate(fourth).mean(), np.concatenate(second).mean()
    return float(3 + k4_mean / ((k2_square - k4_mean / count) * (count - 1) / (count + 1)))
