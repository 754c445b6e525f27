"""Merge methods as pure functions, in one table.

Notation: w0 the anchor, w_i the fine-tuned weights, v_i = w_i - w0 the updates (task vectors), N of them. Every method
gives w0 + scale * u; what differs is u, and there are three kinds of it:

- span: u = sum_i c_i v_i, where the c_i depend on nothing but the inner products <v_i, v_j>. A function
  `(gram, *, options) -> Blend`; modelstock.merging streams any model through it.
- values: u looks at single values. A function `(updates, given, *, options) -> update`, one tensor at a time; `given`
  are generators for those that draw, statistics of the data for those that weigh.
- search: u = sum_i c_i v_i again, the c_i found by scoring merges. A function `(count, score, *, options) -> Blend`.

All of it in float64, without any epsilon: exact zeros are handled as cases.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelstock.errors import MergeError, nearest

Float = NDArray[np.float64]


# ---------------------------------------------------------------- methods in the span of the updates


@dataclass(frozen=True)
class Blend:
    """Coefficients (N,) of the updates, and what there is to say of how they came about (JSON values)."""

    coefficients: Float
    facts: Mapping[str, Any] = field(default_factory=dict)


def stock_ratio(cosine: float, count: int) -> float:
    """t = N cos / (1 + (N - 1) cos), the pull of the mean toward the anchor; infinite where its pole is met.

    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3.
    """
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if denominator != 0 else -np.inf


def cosines(gram: Float) -> Float:
    """Cosines (N, N) between updates from their inner products; NaN where an update is zero."""
    norms = np.sqrt(np.diag(gram))
    # One norm after the other: the product of two tiny ones could underflow.
    with np.errstate(invalid="ignore"):
        return np.clip(gram / norms[:, None] / norms[None, :], -1, 1)


def model_stock(
    gram: Float,
    *,
    pairwise: Literal["cosine", "angle"] = "cosine",
    clip: Literal["unit", "none"] = "unit",
) -> Blend:
    """w0 + t * mean(v_i), t = N cos / (1 + (N - 1) cos) from the mean cosine between two updates.

    `pairwise`: average the pairs' cosines (as the authors do) or their angles. `clip`: hold t in [0, 1], or apply the
    literal formula, which explodes as cos -> -1/(N-1). A zero update leaves the cosine undefined: the anchor is kept.

    Raises:
        MergeError: an infinite ratio with `clip="none"`.
    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3.
    """
    count = len(gram)
    if (np.diag(gram) == 0).any():
        return Blend(np.zeros(count), {"cosine": None, "ratio": 0.0, "flag": "zero"})
    pairs = cosines(gram)[np.triu_indices(count, 1)]
    cosine = float(np.cos(np.arccos(pairs).mean()) if pairwise == "angle" else pairs.mean())
    raw = stock_ratio(cosine, count)
    ratio = min(1.0, max(0.0, raw)) if clip == "unit" else raw
    if not np.isfinite(ratio):
        raise MergeError(
            "model_stock", got=f"a mean cosine of {cosine}", expected="one above -1/(N-1)", cure="use clip unit"
        )
    flag = "clipped" if ratio != raw else "negative" if ratio < 0 else ""
    return Blend(np.full(count, ratio / count), {"cosine": cosine, "ratio": ratio, "flag": flag})


def uniform(gram: Float) -> Blend:
    """w0 + mean(v_i), the plain average.

    Source: Wortsman et al., arXiv 2203.05482.
    """
    return Blend(np.full(len(gram), 1 / len(gram)))


def weighted(gram: Float, *, weights: Sequence[float] = ()) -> Blend:
    """w0 + sum_i a_i v_i / sum_i a_i, the a_i in the order the checkpoints are named.

    Raises:
        MergeError: another number of weights than checkpoints, or a sum of zero.
    Source: Wortsman et al., arXiv 2203.05482, learned soup.
    """
    if len(weights) != len(gram) or sum(weights) == 0:
        raise MergeError(
            "weighted, option weights",
            got=list(weights),
            expected=f"{len(gram)} numbers whose sum is not 0",
            cure="give one a checkpoint, in their order",
        )
    return Blend(np.asarray(weights, np.float64) / sum(weights))


def wise_ft(gram: Float, *, alpha: float = 0.5) -> Blend:
    """w0 + alpha * mean(v_i), alpha in [0, 1]: WiSE-FT, of the soup where N > 1.

    Source: Wortsman et al., arXiv 2109.01903.
    """
    _within("wise_ft", alpha=(alpha, 0, 1))
    return Blend(np.full(len(gram), alpha / len(gram)))


def task_arithmetic(gram: Float) -> Blend:
    """w0 + scale * sum(v_i); scale 1/N gives the uniform soup.

    Source: Ilharco et al., arXiv 2212.04089.
    """
    return Blend(np.ones(len(gram)))


def lines(gram: Float, depth: float, *, alpha: float = 0.5) -> Blend:
    """w0 + scale * (alpha + (1 - alpha) * depth) * mean(v_i), depth from 0 (input) to 1 (output) by the tensor's block.

    Shallow blocks, which hold what is general, move less than deep ones.
    Source: Wang et al., LiNeS, arXiv 2410.17146, eq. 3, on the uniform soup.
    """
    _within("lines", alpha=(alpha, 0, 1))
    factor = alpha + (1 - alpha) * depth
    return Blend(np.full(len(gram), factor / len(gram)), {"depth": depth})


def _arc(gram: Float, at: float, method: str) -> tuple[Float, float, str]:
    """Shares (2,) of two unit vectors that turn the first toward the second, the angle, and a flag.

    A zero vector, or opposed ones, leave no circle: the shares of the straight line.
    """
    _within(method, at=(at, 0, 1))
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
    shares, angle, flag = _arc(gram, at, "slerp")
    if flag:
        return Blend(shares, {"angle": angle, "flag": flag})
    norms = np.sqrt(np.diag(gram))
    return Blend(shares * (np.array([1 - at, at]) @ norms) / norms, {"angle": angle, "flag": ""})


def nuslerp(gram: Float, *, weights: Sequence[float] = (1, 1)) -> Blend:
    """w0 + scale * (sin((1-t) a) v_1 + sin(t a) v_2) / sin(a), t = weights_2 / (weights_1 + weights_2), a the angle.

    As `slerp`, but the updates keep their own lengths. One angle a row with granularity filter.

    Raises:
        MergeError: other than two checkpoints, or weights that are not two with a positive sum.
    Source: mergekit's nuslerp.
    """
    if len(weights) != 2 or min(weights) < 0 or sum(weights) == 0:
        raise MergeError(
            "nuslerp, option weights",
            got=list(weights),
            expected="two numbers from 0 up, not both 0",
            cure="correct it",
        )
    shares, angle, flag = _arc(gram, weights[1] / sum(weights), "nuslerp")
    return Blend(shares, {"angle": angle, "flag": flag})


def karcher(gram: Float, *, iterations: int = 100, tolerance: float = 1e-12) -> Blend:
    """w0 + scale * the sphere's point of least squared angles to the updates' directions, times their mean norm.

    Zero updates, and directions that cancel, leave no such point: the plain mean. All steps are taken on coefficients.
    Source: Karcher, Comm. Pure Appl. Math. 30 (1977).
    """
    _within("karcher", iterations=(iterations, 1, 10**6), tolerance=(tolerance, 0, 1))
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


# ---------------------------------------------------------------- methods that look at single values


def _largest(update: Float, share: float) -> NDArray[np.bool_]:
    """Which values belong to the `share` of largest magnitude; ties go to the earlier value."""
    count, size = round(share * update.size), np.abs(update)
    if not 0 < count < update.size:
        return np.full(update.size, count > 0)
    least = np.partition(size, update.size - count)[update.size - count]
    kept: NDArray[np.bool_] = size > least
    kept[np.flatnonzero(size == least)[: count - int(kept.sum())]] = True
    return kept


def keep_largest(update: Float, generator: np.random.Generator, *, density: float) -> Float:
    """Zero all but the `density` of largest magnitude."""
    return np.where(_largest(update, density), update, 0)


def drop_at_random(update: Float, generator: np.random.Generator, *, drop: float) -> Float:
    """Zero each value with probability `drop` and divide the rest by 1 - drop, so that the mean stays."""
    return np.where(generator.random(update.size) >= drop, update / (1 - drop), 0)


def drop_both_ends(update: Float, generator: np.random.Generator, *, density: float, outliers: float) -> Float:
    """Zero the share `outliers` of largest magnitude and, of the rest, all but `density` (a share of the whole)."""
    return np.where(_largest(update, density + outliers) & ~_largest(update, outliers), update, 0)


def drop_by_rank(update: Float, generator: np.random.Generator, *, drop: float, window: float) -> Float:
    """Zero with a probability that falls from drop + window/2 to drop - window/2 as magnitude grows; rescale each."""
    rank = np.empty(update.size)
    rank[np.argsort(np.abs(update), kind="stable")] = (np.arange(update.size) + 0.5) / update.size
    chance = drop + window * (0.5 - rank)
    return np.where(generator.random(update.size) >= chance, update / (1 - chance), 0)


def mean_of(updates: Float) -> Float:
    """The mean over checkpoints."""
    return np.asarray(updates.mean(axis=0))


def _mean_of_signed(updates: Float, sign: Float) -> Float:
    """The mean of the values that have the sign, 0 where none has it or no sign was elected."""
    agree = (np.sign(updates) == sign) & (updates != 0)
    return np.asarray(np.where(agree, updates, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1))


def mean_of_elected(updates: Float) -> Float:
    """Elect each value's sign by mass; the mean of the values that have it."""
    elected = np.sign(updates.sum(axis=0))
    return _mean_of_signed(updates, elected)


def mean_of_majority(updates: Float) -> Float:
    """Elect each value's sign by one vote a checkpoint, whatever its magnitude; the mean of those that have it."""
    elected = np.sign(np.sign(updates).sum(axis=0))
    return _mean_of_signed(updates, elected)


def _sparse(
    name: str, source: str, sparsify: Callable[..., Float], consensus: Callable[[Float], Float], **defaults: float
) -> Callable[..., Float]:
    """A method made of two parts, sparsify each update and agree; its options are `defaults`."""

    def method(updates: Float, generators: Sequence[np.random.Generator], **options: float) -> Float:
        options = {**defaults, **options}
        _within(name, **{k: (v, 0, 1) for k, v in options.items()})
        thinned = [sparsify(u.reshape(-1), g, **options) for u, g in zip(updates, generators, strict=True)]
        return consensus(np.stack(thinned)).reshape(updates.shape[1:])

    options = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in defaults.items()]
    given = [inspect.Parameter(k, inspect.Parameter.POSITIONAL_ONLY) for k in ("updates", "generators")]
    method.__signature__ = inspect.Signature([*given, *options])  # type: ignore[attr-defined]
    method.__name__ = name
    method.__doc__ = f"""w0 + scale * {consensus.__name__}({sparsify.__name__}(v_i)).

    Source: {source}.
    """
    return method


# ---------------------------------------------------------------- methods that weigh by statistics of the data


def fisher(updates: Float, importance: Sequence[Float] | None) -> Float:
    """w0 + scale * sum(F_i v_i) / sum(F_i), F_i >= 0 the importance of each value to checkpoint i.

    `importance`: N arrays of the tensor's shape, the diagonal of each checkpoint's Fisher information. Where all of
    them are 0, or where there are none, the plain mean.
    Source: Matena, Raffel, arXiv 2111.09832.
    """
    mean = np.asarray(updates.mean(axis=0))
    if importance is None:
        return mean
    weight = np.stack(importance)
    total = weight.sum(axis=0)
    return np.where(total > 0, (weight * updates).sum(axis=0) / np.where(total > 0, total, 1), mean)


def regmean(updates: Float, inner: Sequence[Float] | None, *, alpha: float = 0.9) -> Float:
    """w0 + scale * sum(v_i G_i) sum(G_i)^-1 for linear layers (out, in); the plain mean for everything else.

    `inner`: N matrices G_i = X_i^T X_i (in, in) of the layer's inputs, off-diagonals times `alpha`: the layer whose
    outputs come nearest to those of each checkpoint on its own inputs. Inputs that are always 0 get the plain mean.
    Source: Jin et al., arXiv 2212.09849, eq. 3.
    """
    _within("regmean", alpha=(alpha, 0, 1))
    mean = np.asarray(updates.mean(axis=0))
    if inner is None:
        return mean
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in inner]
    total = np.asarray(sum(shrunk))
    alive = np.flatnonzero(np.diag(total) > 0)
    # Solved for the distance to the mean, so that what the inputs leave open stays at the mean.
    right = np.asarray(sum((v - mean) @ g for v, g in zip(updates, shrunk, strict=True)))[:, alive]
    system = total[np.ix_(alive, alive)]
    # Positive definite for alpha < 1, whatever the inputs were.
    solve = np.linalg.solve if alpha < 1 else lambda a, b: np.linalg.lstsq(a, b, rcond=None)[0]
    mean[:, alive] += solve(system, right.T).T
    return mean


# ---------------------------------------------------------------- methods that search, on the held-out cut alone

# Merges, each as shares of the updates: (N,) -> their accuracies, in one pass over the data.
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

    Of equally good ones the smallest, which stays nearest to the anchor.
    Source: Wortsman et al., arXiv 2109.01903, with alpha beyond 1.
    """
    _within("oracle_scale", low=(low, 0, high), steps=(steps, 1, 10**6))
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

    _within("oracle_scales", iterations=(iterations, 1, 10**6))
    return np.asarray(
        minimize(
            loss, start, jac=True, method="L-BFGS-B", bounds=[(0, high)] * len(start), options={"maxiter": iterations}
        ).x
    )


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    function: Callable[..., Any]
    kind: Literal["span", "values", "search"]
    least: int = 1  # fine-tuned checkpoints it needs
    most: int | None = None  # and takes
    ordered: bool = False  # whether the order of the checkpoints has a meaning
    scale: float = 1.0  # of the update, unless asked for another
    needs: Literal["", "depth", "fisher", "inner", "score", "gradient"] = ""
    of: Literal["updates", "weights"] = "updates"  # weights: w0 counts as zero, so only the tuned weights matter

    @property
    def options(self) -> dict[str, Any]:
        """Knob -> default."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | {"scale": self.scale}


def _rows() -> Iterator[tuple[str, Method]]:
    yield "model_stock", Method(model_stock, "span", least=2)
    yield "uniform", Method(uniform, "span")
    yield "weighted", Method(weighted, "span", ordered=True)
    yield "wise_ft", Method(wise_ft, "span")
    yield "task_arithmetic", Method(task_arithmetic, "span", scale=0.3)
    yield "lines", Method(lines, "span", needs="depth")
    yield "slerp", Method(slerp, "span", least=2, most=2, ordered=True)
    yield "slerp_weights", Method(slerp, "span", least=2, most=2, ordered=True, of="weights")
    yield "nuslerp", Method(nuslerp, "span", least=2, most=2, ordered=True)
    yield "nuslerp_weights", Method(nuslerp, "span", least=2, most=2, ordered=True, of="weights")
    yield "karcher", Method(karcher, "span")
    yield "karcher_weights", Method(karcher, "span", of="weights")
    ties, dare = "Yadav et al., TIES-Merging, arXiv 2306.01708", "Yu et al., DARE, arXiv 2311.03099"
    crumbs, della = "Davari, Belilovsky, Model Breadcrumbs, arXiv 2312.06795", "Deep et al., DELLA, arXiv 2406.11617"
    part, vote = " (its first step)", ", signs by one vote each"
    sparse: list[tuple[str, str, Callable[..., Float], Callable[[Float], Float], dict[str, float]]] = [
        ("ties", ties, keep_largest, mean_of_elected, {"density": 0.2}),
        ("ties_votes", ties + vote, keep_largest, mean_of_majority, {"density": 0.2}),
        ("magnitude", ties + part, keep_largest, mean_of, {"density": 0.2}),
        ("dare_linear", dare, drop_at_random, mean_of, {"drop": 0.9}),
        ("dare_ties", dare, drop_at_random, mean_of_elected, {"drop": 0.9}),
        ("dare_votes", dare + vote, drop_at_random, mean_of_majority, {"drop": 0.9}),
        ("breadcrumbs", crumbs, drop_both_ends, mean_of, {"density": 0.844, "outliers": 0.006}),
        ("breadcrumbs_ties", crumbs, drop_both_ends, mean_of_elected, {"density": 0.844, "outliers": 0.006}),
        ("della", della, drop_by_rank, mean_of_elected, {"drop": 0.3, "window": 0.14}),
        ("della_linear", della, drop_by_rank, mean_of, {"drop": 0.3, "window": 0.14}),
    ]
    for name, source, sparsify, consensus, options in sparse:
        yield name, Method(_sparse(name, source, sparsify, consensus, **options), "values")
    yield "fisher", Method(fisher, "values", needs="fisher")
    yield "regmean", Method(regmean, "values", needs="inner")
    yield "greedy", Method(greedy, "search", needs="score")
    yield "oracle_scale", Method(oracle_scale, "search", needs="score")
    yield "oracle_scales", Method(oracle_scales, "search", needs="gradient")


METHODS: dict[str, Method] = dict(_rows())


def _within(method: str, **options: tuple[float, float, float]) -> None:
    for option, (value, low, high) in options.items():
        if not low <= value <= high:
            raise MergeError(
                f"{method}, option {option}",
                got=value,
                expected=f"a number from {low} to {high}",
                cure="correct the option",
            )


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and bool(np.isfinite(value))


def find_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name, once its options are known to exist and to be of their kind.

    Raises:
        MergeError: unknown method or option, with the nearest valid one; a option of another type or choice.
    """
    if name not in METHODS:
        raise MergeError("method", got=repr(name), expected=", ".join(METHODS), cure=nearest(name, list(METHODS)))
    known = METHODS[name].options
    hints = inspect.get_annotations(METHODS[name].function)
    for option, value in options.items():
        place = f"method {name}, option {option}"
        if option not in known:
            raise MergeError(
                place,
                got="no such option",
                expected=", ".join(known) or "no options",
                cure=nearest(option, list(known)),
            )
        choices = getattr(hints.get(option), "__args__", ()) if isinstance(known[option], str) else ()
        listed = isinstance(known[option], tuple)
        values = value if listed and isinstance(value, list | tuple) else [value]
        numeric = not choices and all(_is_number(v) for v in values) and listed == isinstance(value, list | tuple)
        if (choices and value not in choices) or not (choices or numeric):
            expected = " or ".join(map(str, choices)) or ("a list of numbers" if listed else "a number")
            raise MergeError(place, got=repr(value), expected=expected, cure="correct the option")
    return METHODS[name]
