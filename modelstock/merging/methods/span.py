"""Methods in the span of the updates: coefficients that depend on nothing but the inner products <v_i, v_j>.

`(gram, *, options) -> Blend`; the engine streams any model through it. Those that their row of the table declares
`batched` take the inner products of one row (N, N) or of many at once (rows, N, N).
"""

from collections.abc import Sequence

import numpy as np

from modelstock.merging.methods.blend import Blend, Float, cosines


def _same_for_all_rows(gram: Float, coefficients: float | Sequence[float] | Float) -> Float:
    """Coefficients (..., N), the same for every row of the inner products (..., N, N)."""
    return np.broadcast_to(np.asarray(coefficients, np.float64), gram.shape[:-1])


def uniform(gram: Float) -> Blend:
    """w0 + mean(v_i), the plain average.

    Source: Wortsman et al., arXiv 2203.05482.
    """
    return Blend(_same_for_all_rows(gram, 1 / gram.shape[-1]))


def weighted(gram: Float, *, weights: Sequence[float] = ()) -> Blend:
    """w0 + sum_i a_i v_i / sum_i a_i, the a_i in the order the checkpoints are named.

    Source: Wortsman et al., arXiv 2203.05482, learned soup.
    """
    return Blend(_same_for_all_rows(gram, np.asarray(weights, np.float64) / sum(weights)))


def wise_ft(gram: Float, *, alpha: float = 0.5) -> Blend:
    """w0 + alpha * mean(v_i), alpha in [0, 1]: WiSE-FT, of the soup where N > 1.

    Source: Wortsman et al., arXiv 2109.01903.
    """
    return Blend(_same_for_all_rows(gram, alpha / gram.shape[-1]))


def task_arithmetic(gram: Float) -> Blend:
    """w0 + scale * sum(v_i); scale 1/N gives the uniform soup.

    Source: Ilharco et al., arXiv 2212.04089.
    """
    return Blend(_same_for_all_rows(gram, 1))


def lines(gram: Float, depth: float, *, alpha: float = 0.5) -> Blend:
    """w0 + scale * (alpha + (1 - alpha) * depth) * mean(v_i), depth from 0 (input) to 1 (output) by the tensor's block.

    Shallow blocks, which hold what is general, move less than deep ones.
    Source: Wang et al., LiNeS, arXiv 2410.17146, eq. 3, on the uniform soup.
    """
    factor = alpha + (1 - alpha) * depth
    return Blend(np.full(len(gram), factor / len(gram)), {"depth": depth})


def _arc(gram: Float, at: float) -> tuple[Float, float, str]:
    """Shares (2,) of two unit vectors that turn the first toward the second, the angle, and a flag.

    A zero vector, or opposed ones, leave no circle: the shares of the straight line.
    """
    if (np.diag(gram) == 0).any():
        return np.array([1 - at, at]), 0.0, "zero"
    angle = float(np.arccos(cosines(gram)[0, 1]))
    if np.sin(angle) < 1e-7:  # the circle through them is the line, to float64's precision
        return np.array([1 - at, at]), angle, "straight"
    return np.sin(angle * np.array([1 - at, at])) / np.sin(angle), angle, ""


def slerp(gram: Float, *, at: float = 0.5) -> Blend:
    """w0 + scale * the first update turned toward the second: direction along the great circle, length in a line.

    `at` 0 gives the first checkpoint, 1 the second. A zero update, or opposed ones, leave no circle: a straight line.

    Source: Shoemake, SIGGRAPH 1985, on the updates' directions.
    """
    shares, angle, flag = _arc(gram, at)
    if flag:
        return Blend(shares, {"angle": angle, "flag": flag})
    norms = np.sqrt(np.diag(gram))
    return Blend(shares * (np.array([1 - at, at]) @ norms) / norms, {"angle": angle, "flag": ""})


def nuslerp(gram: Float, *, weights: Sequence[float] = (1, 1)) -> Blend:
    """w0 + scale * (sin((1-t) a) v_1 + sin(t a) v_2) / sin(a), t = weights_2 / (weights_1 + weights_2), a the angle.

    As `slerp`, but the updates keep their own lengths. One angle a row with granularity filter.
    Source: mergekit's nuslerp.
    """
    shares, angle, flag = _arc(gram, weights[1] / sum(weights))
    return Blend(shares, {"angle": angle, "flag": flag})


def karcher(gram: Float, *, iterations: int = 100, tolerance: float = 1e-12) -> Blend:
    """w0 + scale * the sphere's point of least squared angles to the updates' directions, times their mean norm.

    Zero updates, and directions that cancel, leave no such point: the plain mean. All steps are taken on coefficients.
    Source: Karcher, Comm. Pure Appl. Math. 30 (1977).
    """
    count, norms = len(gram), np.sqrt(np.diag(gram))
    mean = Blend(np.full(count, 1 / count), {"flag": "plain mean"})
    if (norms == 0).any():
        return mean
    inner = cosines(gram)
    place = np.full(count, 1 / count)
    length = np.sqrt(place @ inner @ place)
    if length < 1e-9:
        return mean
    place = place / length
    for _ in range(iterations):
        angles = np.arccos(np.clip(inner @ place, -1, 1))
        # The tangent at `place` toward each direction u_i: angle / sin(angle) * (u_i - cos(angle) place).
        stretch = np.array([a / np.sin(a) if np.sin(a) > 1e-9 else 1.0 for a in angles])
        step = (stretch - (stretch @ np.cos(angles)) * place) / count
        size = np.sqrt(max(0.0, step @ inner @ step))
        if size <= tolerance:
            break
        place = np.cos(size) * place + np.sin(size) * step / size
    return Blend(place * norms.mean() / norms, {"flag": ""})
