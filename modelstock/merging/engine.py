"""The merge engine: any checkpoint, streamed a chunk at a time through any method of modelstock.methods.

Two passes: the first reads every update's inner products, finds everything there is to refuse and settles the
coefficients; the second sums. Work is cut into blocks whose bounds depend on shapes alone and whose sums are added in
one order, so the result is the same to the last bit at any number of workers, on disk and in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelstock import __version__
from modelstock.errors import MergeError, WeightsError
from modelstock.merging.methods.table import METHODS, cosines, find_method, oracle_scales
from modelstock.weights.differences import differences, stored_differences
from modelstock.weights.layout import depths
from modelstock.weights.tensors import (
    CHUNK,
    FLOATS,
    STORED,
    Checkpoint,
    StoredTensor,
    check_finite,
    in_memory,
    narrow,
    widen,
)
from modelstock.weights.weight_set import WeightSet

Float = NDArray[np.float64]
Array = NDArray[Any]
Granularity = Literal["tensor", "filter", "model"]
BLOCK = 1 << 22  # values a worker takes at a time: few enough to share a large tensor among cores

# Accuracies of weight sets on the held-out cut, in one pass over it.
Scorer = Callable[[Sequence[WeightSet]], Sequence[float]]
# The held-out loss of a weight set and its gradient by tensor name.
Gradient = Callable[[WeightSet], tuple[float, Mapping[str, Array]]]


def check_fit(anchor: Checkpoint, tuned: Sequence[Checkpoint]) -> None:
    """Raise MergeError unless all checkpoints have the anchor's keys, shapes and dtypes; all differences are named.

    Floating dtypes may differ among each other. Integer and boolean buffers must be equal: there is no mean of them.
    """
    if not tuned:
        raise MergeError("merge", got="no fine-tuned weights", expected="1 or more", cure="name at least one")
    for weights in tuned:
        problems = stored_differences(weights.tensors, anchor.tensors, whose="the anchor's")
        if problems:
            raise MergeError(
                weights.source,
                got="; ".join(problems),
                expected=f"the tensors of {anchor.source}",
                cure="merge only models fine-tuned from this anchor",
            )


# ---------------------------------------------------------------- chunks and blocks


class Slice(NamedTuple):
    """Values [start, stop) of a tensor in C order: whole rows [first, last), or a part of the row `first`."""

    first: int
    last: int
    start: int
    stop: int


def slices(size: int, rows: int) -> Iterator[Slice]:
    """A tensor of equally long rows in chunks of at most CHUNK values: several short rows, or parts of a long one."""
    width = size // rows if rows else 0
    if 0 < width <= CHUNK:
        step = CHUNK // width
        for row in range(0, rows, step):
            last = min(row + step, rows)
            yield Slice(row, last, row * width, last * width)
    elif width:
        for row in range(rows):
            for start in range(row * width, (row + 1) * width, CHUNK):
                yield Slice(row, row + 1, start, min(start + CHUNK, (row + 1) * width))


def blocks(size: int, rows: int) -> Iterator[list[Slice]]:
    """The chunks of a tensor in runs of at least BLOCK values: what one worker does in one go. At least one run."""
    run: list[Slice] = []
    for piece in slices(size, rows):
        run.append(piece)
        if piece.stop - run[0].start >= BLOCK:
            yield run
            run = []
    if run or not size:
        yield run


class Updates:
    """The anchor's values and the updates of a tensor, chunk by chunk, in float64 and in memory that is used again."""

    def __init__(self, origin: StoredTensor, tuned: Sequence[StoredTensor], *, of: str = "updates") -> None:
        self.origin, self.tuned, self.of = origin, tuned, of
        # Fresh pages for every chunk would cost as much as the sums.
        size = min(CHUNK, origin.size)
        self._stored = np.empty(8 * size, np.uint8)
        self._base, self._updates = np.empty(size), np.empty((len(tuned), size))

    def __call__(self, piece: Slice) -> tuple[Float, Float]:
        """w0 (n,), zero for methods on weights, and v_i (N, n); free to be written to, until the next call."""
        count = piece.stop - piece.start
        base, updates = self._base[:count], self._updates[:, :count]
        if self.of == "weights":
            base.fill(0)
        else:
            widen(self.origin.read(piece.start, piece.stop, self._stored), self.origin.dtype, base)
        for tensor, update in zip(self.tuned, updates, strict=True):
            widen(tensor.read(piece.start, piece.stop, self._stored), tensor.dtype, update)
            np.subtract(update, base, out=update)
        return base, updates


def inner_products(
    origin: StoredTensor, tuned: Sequence[StoredTensor], run: Sequence[Slice], *, of: str = "updates"
) -> Float:
    """Inner products (rows of the run, N, N) of the updates; each is a sum of its own, so no order of them matters."""
    if not run:
        return np.zeros((0, len(tuned), len(tuned)))
    updates = Updates(origin, tuned, of=of)
    gram = np.zeros((run[-1].last - run[0].first, len(tuned), len(tuned)))
    for piece in run:
        _, chunk = updates(piece)
        table = chunk.reshape(len(tuned), piece.last - piece.first, -1)
        rows = slice(piece.first - run[0].first, piece.last - run[0].first)
        for i in range(len(tuned)):
            for j in range(i + 1):
                # einsum rather than BLAS, whose sums depend on its threads and on the processor.
                gram[rows, i, j] += np.einsum("rk,rk->r", table[i], table[j])
                gram[rows, j, i] = gram[rows, i, j]
    return gram


def blended(
    origin: StoredTensor,
    tuned: Sequence[StoredTensor],
    run: Sequence[Slice],
    shares: Float,
    dtype: str,
    *,
    of: str = "updates",
) -> Iterator[tuple[int, Array]]:
    """w0 + sum_i c_i v_i of a run of chunks, `shares` (rows, N): (start, stored values), good until the next one."""
    updates, out = Updates(origin, tuned, of=of), np.empty(min(CHUNK, origin.size), STORED[dtype])
    for piece in run:
        result, chunk = updates(piece)
        own = shares[piece.first : piece.last]
        for i, update in enumerate(chunk.reshape(len(tuned), len(own), -1)):
            update *= own[:, i, None]
            result += update.reshape(-1)
        yield piece.start, narrow(result, dtype, out[: len(result)])


def _check_products(name: str, sources: Sequence[tuple[str, StoredTensor]], gram: Float) -> None:
    """NaN and infinity show in the inner products; only then is the culprit looked for."""
    if np.isfinite(gram).all():
        return
    for source, tensor in sources:
        check_finite([(name, tensor)], source)
    raise WeightsError(
        f"{sources[-1][0]}, tensor {name}",
        got="updates whose squares overflow",
        expected="norms below 1e154",
        cure="check the training",
    )


# ---------------------------------------------------------------- a merge that was checked


@dataclass(frozen=True)
class Plan:
    """A merge that was checked and can be carried out: every refusal happens before this exists.

    `coefficients`: tensor -> (rows, N), the scale included, for methods in the span of the updates; `report`:
    tensor -> JSON facts; `tuned`, `statistics`: in the order used; `chosen`: the tensors that are merged.
    """

    method: str
    options: Mapping[str, Any]
    anchor: Checkpoint
    tuned: tuple[Checkpoint, ...]
    coefficients: Mapping[str, Float]
    report: Mapping[str, Mapping[str, Any]]
    chosen: frozenset[str]
    statistics: tuple[Checkpoint, ...] = ()
    dtype: str | None = None  # of the merged floating tensors; None keeps each one's own

    def dtype_of(self, name: str) -> str:
        """The stored dtype of a tensor of the result."""
        return result_dtype(self.anchor.tensors[name].dtype, self.dtype)

    def blocks(self, name: str) -> list[list[Slice]]:
        """What can be done side by side of a tensor; methods that look at single values take it whole."""
        size = self.anchor.tensors[name].size
        if name in self.chosen and name not in self.coefficients:
            return [[Slice(0, 1, 0, size)]]
        return list(blocks(size, len(self.coefficients[name]) if name in self.coefficients else 1))

    def pieces(self, name: str, run: Sequence[Slice]) -> Iterator[tuple[int, Array]]:
        """The merged tensor's stored values in consecutive pieces, with where each starts; good until the next one.

        Raises:
            MergeError: values beyond the range of the result's dtype.
        """
        try:
            yield from self._pieces(name, run)
        except FloatingPointError as error:
            raise MergeError(
                f"tensor {name}",
                got=f"merged values beyond {self.dtype_of(name)}",
                expected="values that fit",
                cure="use --dtype float32, or a smaller scale",
            ) from error

    def _pieces(self, name: str, run: Sequence[Slice]) -> Iterator[tuple[int, Array]]:
        origin, dtype = self.anchor.tensors[name], self.dtype_of(name)
        others = [w.tensors[name] for w in self.tuned]
        if name not in self.chosen:
            for piece in run:
                kept = origin.read(piece.start, piece.stop)
                yield piece.start, kept if dtype == origin.dtype else narrow(widen(kept, origin.dtype), dtype)
        elif name in self.coefficients:
            yield from blended(origin, others, run, self.coefficients[name], dtype, of=METHODS[self.method].of)
        elif origin.size:
            yield 0, narrow(self._by_values(name, origin, others), dtype).reshape(-1)

    def _by_values(self, name: str, origin: StoredTensor, others: Sequence[StoredTensor]) -> Float:
        """w0 + scale * update of a whole tensor, by a method that looks at single values."""
        row = METHODS[self.method]
        base = origin.values().reshape(origin.shape)
        updates = np.stack([w.values().reshape(origin.shape) for w in others]) - base
        given: list[Any] | None
        if row.needs:
            known = [s.tensors.get(name) for s in self.statistics]
            given = [s.values().reshape(s.shape) for s in known if s is not None] or None
        else:
            key = np.frombuffer(name.encode(), np.uint8)
            given = [np.random.default_rng([*key, i]) for i in range(len(updates))]
        own = {k: v for k, v in self.options.items() if k != "scale"}
        return np.asarray(base + self.options["scale"] * row.function(updates, given, **own))

    def tensors(self) -> dict[str, Array]:
        """The result in memory, bfloat16 as float32, which holds it exactly."""
        found = {}
        for name, origin in self.anchor.tensors.items():
            dtype = self.dtype_of(name)
            merged = np.empty(origin.size, np.float32 if dtype == "BF16" else STORED[dtype])
            for run in self.blocks(name):
                for start, piece in self.pieces(name, run):
                    merged[start : start + piece.size] = widen(piece, dtype) if dtype == "BF16" else piece
            found[name] = merged.reshape(origin.shape)
        return found


def result_dtype(own: str, asked: str | None) -> str:
    """The dtype of a merged tensor: integers keep theirs."""
    return asked or own if own in FLOATS else own


def check_options(
    method: str, count: int, *, granularity: str, dtype: str | None, statistics: int, options: Mapping[str, Any]
) -> None:
    """Everything that can be refused before a checkpoint is read.

    Raises:
        MergeError: unknown method, option, granularity or dtype; options out of range; too few checkpoints or too many.
    """
    row = find_method(method, options)
    if dtype not in (None, *FLOATS):
        raise MergeError("dtype", got=repr(dtype), expected=", ".join(FLOATS), cure="name one of these")
    if granularity not in ("tensor", "filter", "model"):
        raise MergeError("granularity", got=repr(granularity), expected="tensor, filter or model", cure="correct it")
    if granularity != "tensor" and (row.kind != "span" or row.needs):
        raise MergeError(
            f"method {method}",
            got=f"granularity {granularity}",
            expected="tensor",
            cure="other granularities are for methods that depend on inner products alone",
        )
    if count < row.least:
        raise MergeError(
            method, got=f"{count} fine-tuned weights", expected=f"{row.least} or more", cure="fine-tune another seed"
        )
    if row.most is not None and count > row.most:
        raise MergeError(
            method, got=f"{count} fine-tuned weights", expected=f"{row.most} at most", cure="use karcher for more"
        )
    wanted = count if row.needs in ("fisher", "inner") else 0
    if statistics != wanted:
        what = {"fisher": "squared gradients", "inner": "inner products of layer inputs"}.get(row.needs, "statistics")
        raise MergeError(
            f"method {method}",
            got=f"{statistics} files of statistics",
            expected=f"{wanted}: {what} by checkpoint",
            cure="see `modelstock statistics --help`" if wanted else "leave them out",
        )
    # Options out of range show on the smallest input.
    own = {k: v for k, v in options.items() if k != "scale"}
    if row.kind == "span":
        row.function(np.eye(count), *([0.0] if row.needs == "depth" else []), **own)
    elif row.kind == "values":
        one = [np.random.default_rng(0)] if not row.needs else [np.ones((1, 1))]
        row.function(np.zeros((1, 1, 1)), one, **own)
    elif row.needs == "score":
        row.function(1, lambda trials: [0.0] * len(trials), **own)
    else:
        row.function(np.zeros(1), lambda scales: (0.0, np.zeros(1)), **own)


def plan_merge(
    method: str,
    anchor: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    granularity: Granularity = "tensor",
    choose: Callable[[str], bool] = lambda name: True,
    statistics: Sequence[Checkpoint] = (),
    score: Scorer | None = None,
    gradient: Gradient | None = None,
    workers: int = 1,
    dtype: str | None = None,
    progress: Callable[[int], object] = lambda values: None,
    **options: Any,
) -> Plan:
    """Check everything and read every update's inner products: the first of the two passes.

    `granularity`: one set of coefficients a tensor, a filter (slice of the first axis) or the whole model. `choose`:
    the tensors to merge; the others keep the anchor's values. `statistics`: one a checkpoint, for methods that weigh
    by them; `score`, `gradient`: on the held-out cut, for methods that search. `dtype`: of the result's floating
    tensors. `progress` is told how many values of a tensor were read. Every method takes the option `scale`.

    Raises:
        MergeError: as `check_options`; checkpoints that do not fit, or two that are equal; statistics that do not fit.
        WeightsError: NaN or infinity, with file and tensor.
    """
    check_options(method, len(tuned), granularity=granularity, dtype=dtype, statistics=len(statistics), options=options)
    row = METHODS[method]
    check_fit(anchor, tuned)
    names = [n for n in sorted(anchor.tensors) if anchor.tensors[n].dtype in FLOATS]
    chosen = [n for n in names if choose(n)]
    if not chosen:
        raise MergeError("merge", got="no tensor chosen", expected="one or more", cure="correct include and exclude")
    if row.needs in ("fisher", "inner"):
        _check_statistics(row.needs, anchor, statistics)
    grams = _first_pass(row.of, anchor, tuned, names, granularity == "filter", workers, progress)
    squares = np.array([[gram[:, i, i].sum() for gram in grams.values()] for i in range(len(tuned))])
    _check_different(anchor, tuned, grams, squares, row.of)
    order = list(range(len(tuned)))
    if not row.ordered:
        # An order of our own, by the updates' norms, makes the result independent of the caller's to the last bit.
        order.sort(key=lambda i: squares[i].tolist())
    grams = {name: gram[:, order][:, :, order] for name, gram in grams.items()}
    report = {name: _facts(grams[name].sum(axis=0)) for name in chosen}
    scale = options.get("scale", row.scale)
    plan = Plan(
        method,
        {**row.options, **options},
        anchor,
        tuple(tuned[i] for i in order),
        {},
        report,
        frozenset(chosen),
        tuple(statistics[i] for i in order) if statistics else (),
        dtype,
    )
    if row.kind == "values":
        return plan
    if row.kind == "search":
        return _search(plan, score, gradient, options)
    own = {k: v for k, v in options.items() if k != "scale"}
    place = depths(chosen) if row.needs == "depth" else {}
    coefficients = {}
    whole = row.function(sum(grams[n].sum(axis=0) for n in chosen), **own) if granularity == "model" else None
    for name in chosen:
        extra = [place[name]] if place else []
        blends = [whole] if whole else [row.function(g, *extra, **own) for g in grams[name]]
        if blends:  # a tensor without rows has none
            coefficients[name] = scale * np.stack([b.coefficients for b in blends])
            report[name] |= _summary([b.facts for b in blends])
    return replace(plan, coefficients=coefficients)


def _first_pass(
    of: str,
    anchor: Checkpoint,
    tuned: Sequence[Checkpoint],
    names: Sequence[str],
    by_filter: bool,
    workers: int,
    progress: Callable[[int], object],
) -> dict[str, Float]:
    """Inner products (rows, N, N) of every floating tensor, its blocks side by side; NaN and infinity are refused."""
    work: list[tuple[str, int, list[Slice]]] = []
    for name in names:
        origin = anchor.tensors[name]
        rows = origin.shape[0] if by_filter and len(origin.shape) > 1 else 1
        work += [(name, rows, run) for run in blocks(origin.size, rows)]

    def one(task: tuple[str, int, list[Slice]]) -> Float:
        name, _, run = task
        return inner_products(anchor.tensors[name], [w.tensors[name] for w in tuned], run, of=of)

    grams: dict[str, Float] = {}
    with ThreadPoolExecutor(workers) as pool:
        for (name, rows, run), part in zip(work, pool.map(one, work), strict=True):
            gram = grams.setdefault(name, np.zeros((rows, len(tuned), len(tuned))))
            if run:
                gram[run[0].first : run[-1].last] += part
                sources = [(w.source, w.tensors[name]) for w in (anchor, *tuned)]
                _check_products(name, sources, part)
                progress(run[-1].stop - run[0].start)
    return grams


def _facts(gram: Float) -> dict[str, Any]:
    """Norms of a tensor's updates and, where none is zero, the mean cosine between two."""
    norms = np.sqrt(np.diag(gram))
    facts: dict[str, Any] = {"norms": norms.tolist()}
    if len(gram) > 1 and norms.all():
        facts["cosine"] = float(cosines(gram)[np.triu_indices(len(gram), 1)].mean())
    return facts


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
    anchor: Checkpoint, tuned: Sequence[Checkpoint], grams: Mapping[str, Float], squares: Float, of: str
) -> None:
    """Raise MergeError for the same weights twice, or the anchor among them."""
    for i, weights in enumerate(tuned):
        for j, other in enumerate([*tuned[:i], anchor] if len(tuned) > 1 else []):
            if other is not anchor:
                # |v_i - v_j|^2, said by inner products, is 0 for equal checkpoints; for others hardly ever.
                near = all(
                    (g[:, i, i] == g[:, j, j]).all() and (g[:, i, j] == g[:, i, i]).all() for g in grams.values()
                )
            else:
                near = not squares[i].any() or of == "weights"
            if near and all(other.tensors[n].equals(weights.tensors[n]) for n in grams):
                raise MergeError(
                    weights.source,
                    got=f"the same tensors as {other.source}",
                    expected="different weights",
                    cure="name each weight set once, and the anchor only as anchor",
                )


def _check_statistics(needs: str, anchor: Checkpoint, statistics: Sequence[Checkpoint]) -> None:
    """Raise MergeError unless the statistics are finite, have the same names, and fit the anchor's tensors.

    Importance has a tensor's shape and no negative values; inner products (in, in) belong to a matrix (out, in).
    """
    expected = {name: tensor for name, tensor in statistics[0].tensors.items() if name in anchor.tensors}
    for given in statistics:
        problems = differences(given.tensors, expected, whose="the first file's")
        for name in sorted(given.tensors.keys() & expected.keys()):
            tensor, target = given.tensors[name], anchor.tensors[name]
            fits = target.shape == tensor.shape
            if needs == "inner":
                fits = len(target.shape) == 2 and tensor.shape == (target.shape[1], target.shape[1])
            if not fits or tensor.dtype not in FLOATS:
                problems.append(f"{name} is {tensor.dtype} {tensor.shape} for a tensor {target.shape}")
                continue
            for piece in slices(tensor.size, 1):
                values = tensor.values(piece.start, piece.stop)
                if not np.isfinite(values).all() or (needs == "fisher" and (values < 0).any()):
                    problems.append(f"{name} holds NaN, infinity or negative importance")
                    break
        if problems or not given.tensors:
            raise MergeError(
                given.source,
                got="; ".join(sorted(problems)) or "no tensors",
                expected=f"statistics of the tensors of {anchor.source}",
                cure="see `modelstock statistics --help`",
            )


def _search(plan: Plan, score: Scorer | None, gradient: Gradient | None, options: Mapping[str, Any]) -> Plan:
    """Settle the coefficients by what merges score; they are made in memory for that."""
    row, count = METHODS[plan.method], len(plan.tuned)
    names = [n for n in sorted(plan.chosen) if plan.anchor.tensors[n].size]
    own, scale = {k: v for k, v in options.items() if k != "scale"}, plan.options["scale"]

    def with_shares(shares: Mapping[str, Float]) -> Plan:
        return replace(plan, coefficients={n: scale * shares[n][None] for n in names})

    def trial(shares: Mapping[str, Float]) -> WeightSet:
        return WeightSet(with_shares(shares).tensors(), plan.anchor.meta, f"a trial of {plan.method}")

    if (score if row.needs == "score" else gradient) is None:
        raise MergeError(
            f"method {plan.method}",
            got="nothing to score merges with",
            expected=f"a {row.needs} on held-out data",
            cure="give --held-out, or from Python score= or gradient=",
        )
    if score is not None and row.needs == "score":
        scorer = score
        blend = row.function(
            count, lambda trials: scorer([trial(dict.fromkeys(names, shares)) for shares in trials]), **own
        )
        facts = dict(blend.facts)
        if "chosen" in facts:
            facts["chosen"] = [plan.tuned[i].source for i in facts["chosen"]]
        report = {n: {**plan.report[n], **facts} for n in plan.report}
        return replace(with_shares(dict.fromkeys(names, blend.coefficients)), report=report)
    assert gradient is not None
    slope_of, uniform = gradient, np.full(count, 1 / count)
    mean = {}
    for name in names:
        at_mean = replace(plan, coefficients={name: uniform[None]}, chosen=frozenset([name]), dtype="F64")
        merged = np.concatenate([p.copy() for run in at_mean.blocks(name) for _, p in at_mean.pieces(name, run)])
        mean[name] = merged - plan.anchor.tensors[name].values()

    def loss(scales: Float) -> tuple[float, Float]:
        value, slopes = slope_of(trial({n: s * uniform for n, s in zip(names, scales, strict=True)}))
        along = [scale * float(np.einsum("k,k->", slopes[n].reshape(-1).astype(np.float64), mean[n])) for n in names]
        return value, np.array(along)

    found = oracle_scales(np.ones(len(names)), loss, **own)
    report = {n: {**plan.report[n], "ratio": float(s)} for n, s in zip(names, found, strict=True)}
    settled = with_shares({n: s * uniform for n, s in zip(names, found, strict=True)})
    return replace(settled, report={**plan.report, **report})


def merge(
    method: str,
    anchor: WeightSet,
    tuned: Sequence[WeightSet],
    *,
    statistics: Sequence[WeightSet] = (),
    **options: Any,
) -> tuple[WeightSet, dict[str, Mapping[str, Any]]]:
    """Merge weight sets in memory; the same code as for files, so the same bytes.

    `options`: the method's, and what `plan_merge` takes. Returns the merged weight set, its parents and options
    recorded, and the report: tensor name -> facts.

    Raises:
        MergeError, WeightsError: as `plan_merge`; statistics that say they are of another checkpoint.
    """
    for weights, given in zip(tuned, statistics, strict=False):
        if given.meta.get("of") not in (None, weights.identity):
            raise MergeError(
                given.source,
                got=f"statistics of {str(given.meta['of'])[:12]}",
                expected=f"those of {weights.source}, {weights.identity[:12]}",
                cure="name them in the same order",
            )
    own = {id(w): in_memory(w.tensors, w.meta, w.source) for w in [anchor, *tuned, *statistics]}
    plan = plan_merge(
        method, own[id(anchor)], [own[id(w)] for w in tuned], statistics=[own[id(s)] for s in statistics], **options
    )
    options = {k: v for k, v in options.items() if isinstance(v, str | int | float | list | tuple | None)}
    meta = {
        **anchor.meta,
        "parents": [anchor.identity, *sorted(w.identity for w in tuned)],
        "made_by": {"stage": "merge", "method": method, "options": options, "version": __version__},
    }
    return WeightSet(plan.tensors(), meta, f"{method} of {len(tuned)}"), dict(plan.report)
