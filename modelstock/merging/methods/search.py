"""Methods that search for coefficients by what merges score on the held-out split."""

from collections.abc import Callable, Sequence

import numpy as np

from modelstock.errors import MergeError
from modelstock.merging.methods.blend import Blend, Float

# Merges, each as shares of the updates (N,) -> their accuracies, in one pass over the data.
Score = Callable[[Sequence[Float]], Sequence[float]]


def greedy(count: int, score: Score) -> Blend:
    """w0 + scale * mean of the v_i in the soup: added best first, each kept if the mean gets strictly better.

    Source: Wortsman et al., arXiv 2203.05482, recipe 1.
    """
    alone = list(score(list(np.eye(count))))
    ranked = sorted(range(count), key=lambda i: (-alone[i], i))
    chosen, best = ranked[:1], alone[ranked[0]]
    for candidate in ranked[1:]:
        trial = np.isin(range(count), [*chosen, candidate]) / (len(chosen) + 1)
        (accuracy,) = score([trial])
        if accuracy > best:
            chosen, best = [*chosen, candidate], accuracy
    return Blend(np.isin(range(count), chosen) / len(chosen), {"chosen": sorted(chosen), "score": best})


def oracle_scale(count: int, score: Score, *, low: float = 0.0, high: float = 1.5, steps: int = 30) -> Blend:
    """w0 + s * mean(v_i), s the best of `steps` + 1 values from `low` to `high`: what every scale is measured against.

    Ties go to the smallest, which stays nearest to the anchor.
    Source: Wortsman et al., arXiv 2109.01903, with alpha beyond 1.
    """
    if low > high:
        raise MergeError(
            "oracle_scale, option low", got=low, expected=f"a number from 0 to {high}", cure="correct the option"
        )
    scales = [low + (high - low) * i / steps for i in range(steps + 1)]
    found = list(score([np.full(count, s / count) for s in scales]))
    best = max(range(len(scales)), key=lambda i: (found[i], -i))
    return Blend(np.full(count, scales[best] / count), {"ratio": scales[best], "score": found[best]})


def oracle_scales(
    start: Float, loss: Callable[[Float], tuple[float, Float]], *, high: float = 2.0, iterations: int = 20
) -> Float:
    """w0 + s_k * mean(v_i), one s_k from 0 to `high` for each tensor k, by L-BFGS on the held-out loss.

    `start`: (K,) scales to begin from; `loss`: scales (K,) -> the held-out loss and its slopes (K,).
    Source: Wortsman et al., arXiv 2203.05482, learned soup, by tensor.
    """
    from scipy.optimize import minimize

    return np.asarray(
        minimize(
            loss, start, jac=True, method="L-BFGS-B", bounds=[(0, high)] * len(start), options={"maxiter": iterations}
        ).x
    )
