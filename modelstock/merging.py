"""Merge methods as pure functions, in one table, and the engine that streams any checkpoint through them.

Notation: w0 the anchor, w_i the fine-tuned weights, v_i = w_i - w0 the updates (task vectors), N of them.

Most methods land in the span of the updates: w0 + sum_i c_i v_i, where the c_i depend on nothing but the inner products
<v_i, v_j>. Such a method is a function `(gram, **knobs) -> coefficients`, and the engine does the rest in two passes, a
chunk at a time: first the inner products, then the sums. The others look at single values: a function
`(updates, generator, **knobs) -> update`, one tensor at a time. All of it in float64, without any epsilon.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelstock import __version__
from modelstock.checkpoints import FLOATS, STORED, Checkpoint, Tensor, in_memory, narrow, widen
from modelstock.errors import MergeError, WeightsError
from modelstock.weights import WeightSet

Float = NDArray[np.float64]
Array = NDArray[Any]
Granularity = Literal["tensor", "filter", "model"]
# Values of each checkpoint a worker holds at a time: few enough to stay in a core's cache, and below the 10,000 from
# which OpenBLAS shares a dot product out, so that no thread count changes a bit.
CHUNK = 1 << 13


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
            "weighted, knob weights", got=list(weights), expected=f"{len(gram)} numbers whose sum is not 0",
            cure="give one a checkpoint, in their order",
        )  # fmt: skip
    return Blend(np.asarray(weights, np.float64) / sum(weights))


def wise_ft(gram: Float, *, alpha: float = 0.5) -> Blend:
    """w0 + alpha * mean(v_i), alpha in [0, 1]: WiSE-FT, of the soup where N > 1.

    Source: Wortsman et al., arXiv 2109.01903.
    """
    _within("wise_ft", alpha=(alpha, 0, 1))
    return Blend(np.full(len(gram), alpha / len(gram)))


def task_arithmetic(gram: Float, *, scale: float = 0.3) -> Blend:
    """w0 + scale * sum(v_i); 1/N gives the uniform soup.

    Source: Ilharco et al., arXiv 2212.04089.
    """
    return Blend(np.full(len(gram), float(scale)))


def slerp(gram: Float, *, at: float = 0.5) -> Blend:
    """Two updates turned into each other: direction along the great circle, length in a straight line.

    `at` 0 gives the first checkpoint, 1 the second. A zero update, or opposed ones, leave no circle: a straight line.

    Raises:
        MergeError: other than two checkpoints.
    Source: Shoemake, SIGGRAPH 1985, on the updates' directions.
    """
    _within("slerp", at=(at, 0, 1))
    if len(gram) != 2:
        raise MergeError("slerp", got=f"{len(gram)} checkpoints", expected="2", cure="use karcher for more")
    straight = np.array([1 - at, at])
    norms = np.sqrt(np.diag(gram))
    if (norms == 0).any():
        return Blend(straight, {"flag": "zero"})
    angle = float(np.arccos(cosines(gram)[0, 1]))
    if np.sin(angle) < 1e-7:  # the circle through them is the line, to float64's precision
        return Blend(straight, {"angle": angle, "flag": "straight"})
    length = straight @ norms
    turned = np.sin(angle * straight) / np.sin(angle)
    return Blend(turned * length / norms, {"angle": angle, "flag": ""})


def karcher(gram: Float, *, iterations: int = 100, tolerance: float = 1e-12) -> Blend:
    """The point of the sphere with the least sum of squared angles to the updates' directions, times their mean norm.

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
    count = round(share * update.size)
    kept = np.zeros(update.size, bool)
    kept[np.argsort(-np.abs(update), kind="stable")[:count]] = True
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


def mean_of_elected(updates: Float) -> Float:
    """Elect each value's sign by mass; the mean of the values that have it."""
    elected = np.sign(updates.sum(axis=0))
    agree = (np.sign(updates) == elected) & (updates != 0)
    count = agree.sum(axis=0)
    return np.asarray(np.where(agree, updates, 0).sum(axis=0) / np.maximum(count, 1))


def _sparse(
    name: str, source: str, sparsify: Callable[..., Float], consensus: Callable[[Float], Float], **defaults: float
) -> Callable[..., Float]:
    """A method made of three parts: sparsify each update, agree, rescale. Its knobs are `defaults` and `scale`."""

    def method(updates: Float, generators: Sequence[np.random.Generator], *, scale: float, **knobs: float) -> Float:
        _within(name, **{k: (v, 0, 1) for k, v in knobs.items()})
        thinned = np.stack([sparsify(u, g, **knobs) for u, g in zip(updates, generators, strict=True)])
        return scale * consensus(thinned)

    options = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in defaults.items()]
    first = inspect.Parameter("updates", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]
    method.__name__ = name
    method.__doc__ = f"""w0 + scale * {consensus.__name__}({sparsify.__name__}(v_i)).

    Source: {source}.
    """
    return method


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """A row of the table: `span` methods get inner products, the others single values."""

    function: Callable[..., Any]
    span: bool
    least: int = 1  # fine-tuned checkpoints it needs
    ordered: bool = False  # whether the order of the checkpoints has a meaning

    @property
    def knobs(self) -> dict[str, Any]:
        """Knob -> default."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _rows() -> Iterator[tuple[str, Method]]:
    yield "model_stock", Method(model_stock, True, least=2)
    yield "uniform", Method(uniform, True)
    yield "weighted", Method(weighted, True, ordered=True)
    yield "wise_ft", Method(wise_ft, True)
    yield "task_arithmetic", Method(task_arithmetic, True)
    yield "slerp", Method(slerp, True, least=2, ordered=True)
    yield "karcher", Method(karcher, True)
    ties, dare = "Yadav et al., TIES-Merging, arXiv 2306.01708", "Yu et al., DARE, arXiv 2311.03099"
    crumbs, della = "Davari, Belilovsky, Model Breadcrumbs, arXiv 2312.06795", "Deep et al., DELLA, arXiv 2406.11617"
    sparse: list[tuple[str, str, Callable[..., Float], Callable[[Float], Float], dict[str, float]]] = [
        ("ties", ties, keep_largest, mean_of_elected, {"density": 0.2, "scale": 1.0}),
        ("magnitude", ties + " (its first step)", keep_largest, mean_of, {"density": 0.2, "scale": 1.0}),
        ("dare_linear", dare, drop_at_random, mean_of, {"drop": 0.9, "scale": 1.0}),
        ("dare_ties", dare, drop_at_random, mean_of_elected, {"drop": 0.9, "scale": 1.0}),
        ("breadcrumbs", crumbs, drop_both_ends, mean_of, {"density": 0.844, "outliers": 0.006, "scale": 1.0}),
        ("breadcrumbs_ties", crumbs, drop_both_ends, mean_of_elected,
         {"density": 0.844, "outliers": 0.006, "scale": 1.0}),
        ("della", della, drop_by_rank, mean_of_elected, {"drop": 0.3, "window": 0.14, "scale": 1.0}),
        ("della_linear", della, drop_by_rank, mean_of, {"drop": 0.3, "window": 0.14, "scale": 1.0}),
    ]  # fmt: skip
    for name, source, sparsify, consensus, knobs in sparse:
        yield name, Method(_sparse(name, source, sparsify, consensus, **knobs), False)


METHODS: dict[str, Method] = dict(_rows())


def _within(method: str, **knobs: tuple[float, float, float]) -> None:
    for knob, (value, low, high) in knobs.items():
        if not low <= value <= high:
            raise MergeError(
                f"{method}, knob {knob}", got=value, expected=f"a number from {low} to {high}", cure="correct the knob"
            )


def nearest(name: str, known: Sequence[str]) -> str:
    """A cure for a name that is not known."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else "choose one of these"


def find_method(name: str, knobs: Mapping[str, Any]) -> Method:
    """The method of that name, once its knobs are known to exist and to be of their kind.

    Raises:
        MergeError: unknown method or knob, with the nearest valid one; a knob of another type or choice.
    """
    if name not in METHODS:
        raise MergeError("method", got=repr(name), expected=", ".join(METHODS), cure=nearest(name, list(METHODS)))
    known = METHODS[name].knobs
    hints = inspect.get_annotations(METHODS[name].function)
    for knob, value in knobs.items():
        place = f"method {name}, knob {knob}"
        if knob not in known:
            raise MergeError(place, got="no such knob", expected=", ".join(known) or "no knobs",
                             cure=nearest(knob, list(known)))  # fmt: skip
        choices = getattr(hints.get(knob), "__args__", ()) if isinstance(known[knob], str) else ()
        numeric = isinstance(known[knob], float | int)
        if (choices and value not in choices) or (numeric and not isinstance(value, float | int)):
            expected = " or ".join(map(str, choices)) or "a number"
            raise MergeError(place, got=repr(value), expected=expected, cure="correct the knob")
    return METHODS[name]


# ---------------------------------------------------------------- the engine


def check_fit(anchor: Checkpoint, tuned: Sequence[Checkpoint]) -> None:
    """Raise MergeError unless all checkpoints have the anchor's keys, shapes and dtypes; all differences are named.

    Floating dtypes may differ among each other. Integer and boolean buffers must be equal: there is no mean of them.
    """
    if not tuned:
        raise MergeError("merge", got="no fine-tuned weights", expected="1 or more", cure="name at least one")
    for weights in tuned:
        known = list(anchor.tensors)
        missing = anchor.tensors.keys() - weights.tensors.keys()
        problems = [f"{k} missing" for k in missing]
        for key in weights.tensors.keys() - anchor.tensors.keys():
            close = difflib.get_close_matches(key, [k for k in known if k in missing], 1)
            problems.append(f"{key} unknown" + (f" (near {close[0]})" if close else ""))
        for key in anchor.tensors.keys() & weights.tensors.keys():
            expected, got = anchor.tensors[key], weights.tensors[key]
            if expected.shape != got.shape:
                problems.append(f"{key} is {got.shape}, anchor {expected.shape}")
            elif expected.dtype != got.dtype and not (expected.dtype in FLOATS and got.dtype in FLOATS):
                problems.append(f"{key} is {got.dtype}, anchor {expected.dtype}")
            elif expected.dtype not in FLOATS and not np.array_equal(
                expected.read(0, expected.size), got.read(0, got.size)
            ):
                problems.append(f"{key} is an integer buffer that differs from the anchor's")
        if problems:
            raise MergeError(
                weights.source, got="; ".join(sorted(problems)), expected=f"the tensors of {anchor.source}",
                cure="merge only models fine-tuned from this anchor",
            )  # fmt: skip


def _updates(origin: Tensor, tuned: Sequence[Tensor], start: int, stop: int) -> tuple[Array, list[Float]]:
    """The anchor's slice, and each update's in float64; the subtraction widens as it goes, exactly."""
    base = _plain(origin, start, stop)
    return base, [np.subtract(_plain(w, start, stop), base, dtype=np.float64) for w in tuned]


def _plain(tensor: Tensor, start: int, stop: int) -> Array:
    """A slice in a dtype that numpy computes with."""
    stored = tensor.read(start, stop)
    return widen(stored, tensor.dtype) if tensor.dtype == "BF16" else stored


def _slices(size: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of the chunks of each row; a tensor without rows is one."""
    width = size // rows if rows else 0
    for row in range(rows):
        for start in range(row * width, (row + 1) * width, CHUNK):
            yield row, start, min(start + CHUNK, (row + 1) * width)


def _grams(origin: Tensor, tuned: Sequence[Tensor], rows: int) -> Float:
    """Inner products (rows, N, N) of the updates; each is a sum of its own, so that no order of them matters."""
    gram = np.zeros((rows, len(tuned), len(tuned)))
    for row, start, stop in _slices(origin.size, rows):
        _, updates = _updates(origin, tuned, start, stop)
        for i, first in enumerate(updates):
            for j, second in enumerate(updates[: i + 1]):
                gram[row, i, j] += first @ second
                gram[row, j, i] = gram[row, i, j]
    return gram


def _check_finite(name: str, origin: Tensor, sources: Sequence[tuple[str, Tensor]], gram: Float) -> None:
    """NaN and infinity show in the inner products; only then is the culprit looked for."""
    if np.isfinite(gram).all():
        return
    for source, tensor in sources:
        bad = sum(
            int((~np.isfinite(widen(tensor.read(start, stop), tensor.dtype))).sum())
            for _, start, stop in _slices(tensor.size, 1)
        )
        if bad:
            raise WeightsError(
                f"{source}, tensor {name}", got=f"{bad} of {tensor.size} values NaN or infinite",
                expected="finite values", cure="use an earlier snapshot: a merge would spread it to the whole tensor",
            )  # fmt: skip
    raise WeightsError(
        f"{sources[-1][0]}, tensor {name}", got="updates whose squares overflow", expected="norms below 1e154",
        cure="check the training",
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A merge that was checked and can be carried out: every refusal happens before this exists.

    `coefficients`: tensor -> (rows, N) for span methods; `report`: tensor -> JSON facts; `tuned`: in the order used.
    """

    method: str
    knobs: Mapping[str, Any]
    anchor: Checkpoint
    tuned: tuple[Checkpoint, ...]
    coefficients: Mapping[str, Float]
    report: Mapping[str, Mapping[str, Any]]
    chosen: frozenset[str]
    workers: int
    dtype: str | None = None  # of the merged floating tensors; None keeps each one's own

    def dtype_of(self, name: str) -> str:
        """The stored dtype of a tensor of the result."""
        own = self.anchor.tensors[name].dtype
        return self.dtype or own if own in FLOATS else own

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        """The merged tensor's stored values in consecutive pieces, with where each starts."""
        origin = self.anchor.tensors[name]
        others = [w.tensors[name] for w in self.tuned]
        if name not in self.chosen or not origin.size:
            same = self.dtype_of(name) == origin.dtype
            for _, start, stop in _slices(origin.size, 1):
                kept = origin.read(start, stop)
                yield start, kept if same else narrow(widen(kept, origin.dtype), self.dtype_of(name))
        elif METHODS[self.method].span:
            shares = self.coefficients[name]
            for row, start, stop in _slices(origin.size, len(shares)):
                base, updates = _updates(origin, others, start, stop)
                result = base.astype(np.float64)
                for share, update in zip(shares[row], updates, strict=True):
                    update *= share
                    result += update
                yield start, narrow(result, self.dtype_of(name))
        else:
            base, updates = _updates(origin, others, 0, origin.size)
            key = np.frombuffer(name.encode(), np.uint8)
            generators = [np.random.default_rng([*key, i]) for i in range(len(updates))]
            knobs = {**METHODS[self.method].knobs, **self.knobs}
            update = METHODS[self.method].function(np.stack(updates), generators, **knobs)
            yield 0, narrow(base + update, self.dtype_of(name))


def plan_merge(
    method: str,
    anchor: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    granularity: Granularity = "tensor",
    choose: Callable[[str], bool] = lambda name: True,
    workers: int = 1,
    dtype: str | None = None,
    **knobs: Any,
) -> Plan:
    """Check everything and read every update's inner products: the first of the two passes.

    `granularity`: one set of coefficients a tensor, a filter (slice of the first axis) or the whole model. `choose`:
    the tensors to merge; the others keep the anchor's values. `dtype`: of the result's floating tensors.

    Raises:
        MergeError: unknown method or knob, checkpoints that do not fit, too few, or two that are equal.
        WeightsError: NaN or infinity, with file and tensor.
    """
    row = find_method(method, knobs)
    if dtype not in (None, *FLOATS):
        raise MergeError("dtype", got=repr(dtype), expected=", ".join(FLOATS), cure="name one of these")
    if granularity not in ("tensor", "filter", "model"):
        raise MergeError("granularity", got=repr(granularity), expected="tensor, filter or model", cure="correct it")
    if granularity != "tensor" and not row.span:
        raise MergeError(
            f"method {method}", got=f"granularity {granularity}", expected="tensor",
            cure="other granularities are for methods in the span of the updates",
        )  # fmt: skip
    if len(tuned) < row.least:
        raise MergeError(
            method,
            got=f"{len(tuned)} fine-tuned weights",
            expected=f"{row.least} or more",
            cure="fine-tune another seed",
        )
    check_fit(anchor, tuned)
    names = [n for n in sorted(anchor.tensors) if anchor.tensors[n].dtype in FLOATS]
    chosen = [n for n in names if choose(n)]
    if not chosen:
        raise MergeError("merge", got="no tensor chosen", expected="one or more", cure="correct include and exclude")

    def first_pass(name: str) -> Float:
        origin = anchor.tensors[name]
        by_filter = granularity == "filter" and len(origin.shape) > 1
        others = [w.tensors[name] for w in tuned]
        gram = _grams(origin, others, origin.shape[0] if by_filter else 1)
        sources = [(anchor.source, origin), *((w.source, w.tensors[name]) for w in tuned)]
        _check_finite(name, origin, sources, gram)
        return gram

    with ThreadPoolExecutor(workers) as pool:
        grams = dict(zip(names, pool.map(first_pass, names), strict=True))
    squares = np.array([[gram[:, i, i].sum() for gram in grams.values()] for i in range(len(tuned))])
    _check_different(anchor, tuned, grams, squares)
    order = list(range(len(tuned)))
    if not row.ordered:
        # An order of our own, by the updates' norms, makes the result independent of the caller's to the last bit.
        order.sort(key=lambda i: squares[i].tolist())
    grams = {name: gram[:, order][:, :, order] for name, gram in grams.items()}
    coefficients: dict[str, Float] = {}
    report: dict[str, dict[str, Any]] = {}
    whole = row.function(sum(grams[n].sum(axis=0) for n in chosen), **knobs) if granularity == "model" else None
    for name in chosen:
        gram = grams[name].sum(axis=0)
        norms = np.sqrt(np.diag(gram))
        report[name] = {"norms": norms.tolist()}
        if len(tuned) > 1 and norms.all():
            report[name]["cosine"] = float(cosines(gram)[np.triu_indices(len(tuned), 1)].mean())
        if row.span:
            blends = [whole] if whole else [row.function(g, **knobs) for g in grams[name]]
            coefficients[name] = np.stack([b.coefficients for b in blends])
            report[name] |= _summary([b.facts for b in blends])
    if not row.span:  # knobs out of range are found before anything is written
        row.function(np.zeros((1, 1)), [np.random.default_rng(0)], **{**row.knobs, **knobs})
    ordered = tuple(tuned[i] for i in order)
    return Plan(method, dict(knobs), anchor, ordered, coefficients, report, frozenset(chosen), workers, dtype)


def _summary(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row's facts, or over a tensor's filters: means of numbers, counts of flags."""
    if len(facts) == 1:
        return dict(facts[0])
    merged: dict[str, Any] = {}
    for key in facts[0]:
        values = [f[key] for f in facts if f[key] is not None]
        if key == "flag":
            merged["flags"] = {flag: values.count(flag) for flag in sorted(set(values)) if flag}
        else:
            merged[key] = float(np.mean(values)) if values else None
    return merged


def _check_different(
    anchor: Checkpoint, tuned: Sequence[Checkpoint], grams: Mapping[str, Float], squares: Float
) -> None:
    """Raise MergeError for the same weights twice, or the anchor among them."""
    for i, weights in enumerate(tuned):
        same = None
        if not squares[i].any() and len(tuned) > 1:
            same = anchor.source
        for j in range(i):
            # |v_i - v_j|^2 = 0 in every tensor, said by inner products; equal checkpoints give it exactly.
            if all((g[:, i, i] == g[:, j, j]).all() and (g[:, i, j] == g[:, i, i]).all() for g in grams.values()):
                same = tuned[j].source
        if same:
            raise MergeError(
                weights.source, got=f"the same tensors as {same}", expected="different weights",
                cure="name each weight set once, and the anchor only as anchor",
            )  # fmt: skip


def merge(
    method: str, anchor: WeightSet, tuned: Sequence[WeightSet], **knobs: Any
) -> tuple[WeightSet, dict[str, Mapping[str, Any]]]:
    """Merge weight sets in memory; the same code as for files, so the same bytes.

    Returns the merged weight set, its parents and knobs recorded, and the report: tensor name -> facts.

    Raises:
        MergeError, WeightsError: as `plan_merge`.
    """
    by_source = {id(w): in_memory(w.tensors, w.meta, w.source) for w in [anchor, *tuned]}
    plan = plan_merge(method, by_source[id(anchor)], [by_source[id(w)] for w in tuned], **knobs)
    tensors = {}
    for name, array in anchor.tensors.items():
        merged = np.empty(array.size, STORED[plan.anchor.tensors[name].dtype])
        for start, piece in plan.pieces(name):
            merged[start : start + piece.size] = piece
        tensors[name] = merged.reshape(array.shape)
    meta = {
        **anchor.meta,
        "parents": [anchor.identity, *sorted(w.identity for w in tuned)],
        "made_by": {"stage": "merge", "method": method, "knobs": knobs, "version": __version__},
    }
    return WeightSet(tensors, meta, f"{method} of {len(tuned)}"), dict(plan.report)


def greedy_soup(
    anchor: WeightSet, tuned: Sequence[WeightSet], score: Callable[[WeightSet], float]
) -> tuple[WeightSet, list[WeightSet]]:
    """Add weight sets to a running mean, best first, while the mean gets strictly better.

    `score` is the accuracy on the held-out cut of the training set. Returns the soup and its ingredients.
    Source: Wortsman et al., arXiv 2203.05482, recipe 1.
    """
    ranked = sorted(tuned, key=lambda weights: (-score(weights), weights.identity))
    chosen, soup = ranked[:1], merge("uniform", anchor, ranked[:1])[0]
    best = score(soup)
    for candidate in ranked[1:]:
        trial = merge("uniform", anchor, [*chosen, candidate])[0]
        accuracy = score(trial)
        if accuracy > best:
            chosen, soup, best = [*chosen, candidate], trial, accuracy
    meta = {**soup.meta, "made_by": {"stage": "merge", "method": "greedy", "knobs": {}, "version": __version__}}
    return WeightSet(soup.tensors, meta, f"greedy soup of {len(chosen)}"), chosen
