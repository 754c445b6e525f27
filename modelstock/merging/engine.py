"""Merging any checkpoint by any method, in two passes.

The first reads every update's inner products, finds everything there is to refuse and settles the coefficients; the
second sums. Both run chunk by chunk (modelstock.merging.kernels).
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from modelstock.errors import MergeError
from modelstock.merging.checks import (
    Granularity,
    check_different,
    check_fit,
    check_measured,
    check_options,
    check_parents,
    check_statistics,
    refuse_non_finite,
)
from modelstock.merging.kernels import Chunk, Float, inner_products, runs
from modelstock.merging.methods.blend import Blend, one_by_one, pair_cosines, summary
from modelstock.merging.methods.rows import Method
from modelstock.merging.methods.table import METHODS
from modelstock.merging.plan import Plan
from modelstock.merging.searches import Gradient, Scorer, search
from modelstock.merging.unusual import notice_unusual, sort_tensors
from modelstock.notices import collected, notice
from modelstock.weights.layout import depths
from modelstock.weights.origin import kept_notices, made_by, notices_of
from modelstock.weights.tensors import Checkpoint, in_memory
from modelstock.weights.weight_set import WeightSet

# Checkpoints above which methods that look at no angles leave out the inner products of all pairs: the mean cosine in
# their reports is then of the mean inner product.
POOL = 16


def plan_merge(
    method: str,
    anchor: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    options: Mapping[str, Any] | None = None,
    granularity: Granularity = "tensor",
    choose: Callable[[str], bool] = lambda name: True,
    statistics: Sequence[Checkpoint] = (),
    score: Scorer | None = None,
    gradient: Gradient | None = None,
    workers: int = 1,
    dtype: str | None = None,
    recalibrated: bool = False,
    progress: Callable[[int], object] = lambda values: None,
) -> Plan:
    """Check everything and read every update's inner products: the first of the two passes.

    `options`: of the method, see `modelstock methods`; every method has `scale`. `granularity`: one set of
    coefficients per tensor, per filter (slice of the first axis) or for the whole model. `choose`: the tensors to
    merge; the others keep the anchor's values. `statistics`: one per checkpoint, for methods that weigh by them;
    `score`, `gradient`: on the held-out split, for methods that search. `dtype`: of the result's floating tensors.
    `recalibrated`: the caller estimates BatchNorm's running statistics again, see modelstock.scoring.batch_norm.
    `progress` is called with the number of values of a tensor that were read.

    Raises:
        MergeError: as `check_options`; checkpoints that do not fit, or two that are equal; statistics that do not fit.
        WeightsError: NaN or infinity, with file and tensor.
    """
    options = dict(options or {})
    check_options(method, len(tuned), options=options, granularity=granularity, dtype=dtype, statistics=len(statistics))
    row = METHODS[method]
    check_fit(anchor, tuned, choose)
    tensors = sort_tensors(anchor, tuned, choose)
    if row.reads_statistics:
        check_statistics(row.needs, anchor, statistics)
    first_pass = FirstPass(
        anchor=anchor,
        tuned=tuned,
        of=row.of,
        pairs=row.reads_angles or len(tuned) <= POOL,
        by_filter=granularity == "filter",
        progress=progress,
    )
    grams = first_pass.inner_products(tensors.floating, workers)
    squares = np.array([[gram[:, i, i].sum() for gram in grams.values()] for i in range(len(tuned))])
    check_different(anchor, tuned, grams, squares=squares, of=row.of)
    chosen = [name for name in grams if name not in tensors.running]
    if not chosen:
        raise MergeError("merge", got="no tensor chosen", expected="one or more", cure="correct include and exclude")
    notice_unusual(
        anchor,
        tuned,
        {name: grams[name] for name in chosen},
        tensors=tensors,
        of=row.of,
        dtype=dtype,
        recalibrated=recalibrated,
    )
    order = list(range(len(tuned)))
    if not row.ordered:
        # An order by the updates' norms makes the result independent of the caller's order, to the last bit.
        order.sort(key=lambda i: squares[i].tolist())
    grams = {name: gram[:, order][:, :, order] for name, gram in grams.items()}
    mean = np.full((1, len(tuned)), 1 / len(tuned))
    plan = Plan(
        method=method,
        options={**row.defaults, **options},
        anchor=anchor,
        tuned=tuple(tuned[i] for i in order),
        coefficients={name: mean for name in grams if name in tensors.running},
        report={
            name: _facts(
                grams[name].sum(axis=0),
                ("estimated again" if recalibrated else "averaged") if name in tensors.running else None,
            )
            for name in grams
        },
        chosen=frozenset(chosen),
        statistics=tuple(statistics[i] for i in order) if statistics else (),
        copied=tensors.counters,
        dtype=dtype,
    )
    if row.kind == "search":
        return search(plan, score, gradient)
    return plan if row.kind == "values" else _span(plan, {name: grams[name] for name in chosen}, granularity)


def _span(plan: Plan, grams: Mapping[str, Float], granularity: Granularity) -> Plan:
    """Settle the coefficients of a method in the span of the updates, from the inner products (rows, N, N)."""
    row = METHODS[plan.method]
    options = {name: value for name, value in plan.options.items() if name != "scale"}
    depth = _depths(plan.method, list(grams)) if row.needs == "depth" else {}
    if granularity == "model":
        blend = _blend(row, sum(gram.sum(axis=0) for gram in grams.values())[None], options)
        blends = dict.fromkeys(grams, blend)
    else:
        # A tensor without rows has no coefficients.
        blends = {
            name: _blend(row, rows, options, *([depth[name]] if depth else []))
            for name, rows in grams.items()
            if len(rows)
        }
    scale = plan.options["scale"]
    coefficients = {name: scale * blend.coefficients for name, blend in blends.items()}
    report = {name: {**plan.report[name], **summary(blend.facts)} for name, blend in blends.items()}
    return replace(plan, coefficients={**plan.coefficients, **coefficients}, report={**plan.report, **report})


def _blend(row: Method, rows: Float, options: Mapping[str, Any], *arguments: Any) -> Blend:
    """The coefficients and facts of all rows of a tensor, at least one, from their inner products (rows, N, N)."""
    if row.batched:
        return cast(Blend, row.function(rows, *arguments, **options))
    return one_by_one(row.function, rows, *arguments, **options)


def _depths(method: str, names: Sequence[str]) -> dict[str, float]:
    found = depths(names)
    if not found:
        raise MergeError(
            method,
            got="tensors without numbered blocks",
            expected="names such as blocks.3.weight",
            cure="use another method",
        )
    return found


@dataclass(frozen=True, kw_only=True)
class FirstPass:
    """The pass that reads: inner products of the updates, block by block side by side."""

    anchor: Checkpoint
    tuned: Sequence[Checkpoint]
    of: str
    pairs: bool
    by_filter: bool
    progress: Callable[[int], object]

    def inner_products(self, names: Sequence[str], workers: int) -> dict[str, Float]:
        """Tensor -> (rows, N, N), without tensors that are not finite but the same in all checkpoints.

        Raises:
            WeightsError: other NaN and infinity.
        """
        work: list[tuple[str, int, list[Chunk]]] = []
        for name in names:
            origin = self.anchor.tensors[name]
            rows = origin.shape[0] if self.by_filter and len(origin.shape) > 1 else 1
            work += [(name, rows, run) for run in runs(origin.size, rows)]
        grams: dict[str, Float] = {}
        same: set[str] = set()  # the same in all, masks of -inf for example
        with ThreadPoolExecutor(workers) as pool:
            for (name, rows, run), part in zip(work, pool.map(self._one, work), strict=True):
                gram = grams.setdefault(name, np.zeros((rows, len(self.tuned), len(self.tuned))))
                if run:
                    gram[run[0].first : run[-1].last] += part
                    if name not in same and not np.isfinite(part).all():
                        self._check_same(name)
                        same.add(name)
                    self.progress(run[-1].stop - run[0].start)
        return {name: gram for name, gram in grams.items() if name not in same}

    def _check_same(self, name: str) -> None:
        sources = [(checkpoint.source, checkpoint.tensors[name]) for checkpoint in (self.anchor, *self.tuned)]
        (_, origin), *others = sources
        if not all(tensor.equals(origin) for _, tensor in others):
            refuse_non_finite(name, sources)
        count = origin.count_non_finite()
        notice(f"tensor {name}", f"{count} of {origin.size} values are not finite, the same in all checkpoints: copied")

    def _one(self, task: tuple[str, int, list[Chunk]]) -> Float:
        name, _, run = task
        tensors = [weights.tensors[name] for weights in self.tuned]
        return inner_products(self.anchor.tensors[name], tensors, run, of=self.of, pairs=self.pairs)


def _facts(gram: Float, running: str | None) -> dict[str, Any]:
    """Norms of a tensor's updates and, where none is zero, the mean cosine between two (see POOL).

    `running`: what becomes of it, if it is a running statistic.
    """
    norms = np.sqrt(np.diag(gram))
    facts: dict[str, Any] = {"norms": norms.tolist(), **({"running statistic": running} if running else {})}
    if len(gram) > 1 and norms.all():
        facts["cosine"] = float(pair_cosines(gram).mean())
    return facts


def merge(
    method: str,
    anchor: WeightSet,
    tuned: Sequence[WeightSet],
    *,
    options: Mapping[str, Any] | None = None,
    granularity: Granularity = "tensor",
    statistics: Sequence[WeightSet] = (),
    score: Scorer | None = None,
    gradient: Gradient | None = None,
    workers: int = 1,
    dtype: str | None = None,
    recalibrated: bool = False,
) -> tuple[WeightSet, dict[str, Mapping[str, Any]]]:
    """Merge weight sets in memory; the same code as for files, so the same bytes.

    Arguments as `plan_merge`. Returns the merged weight set, whose metadata records its parents, the options that were
    passed and the granularity, and the report: tensor name -> facts.

    What is unusual is a notice, and in the metadata.

    Raises:
        MergeError, WeightsError: as `plan_merge`; weights that say they were made from another anchor; statistics that
            say they are of another checkpoint.
    """
    check_parents(anchor, tuned)
    check_measured(tuned, statistics)

    def opened(sets: Sequence[WeightSet]) -> list[Checkpoint]:
        return [in_memory(weights.tensors, weights.meta, weights.source) for weights in sets]

    with collected() as notices:
        plan = plan_merge(
            method,
            opened([anchor])[0],
            opened(tuned),
            options=options,
            granularity=granularity,
            statistics=opened(statistics),
            score=score,
            gradient=gradient,
            workers=workers,
            dtype=dtype,
            recalibrated=recalibrated,
        )
    metadata = {
        **anchor.meta,
        "parents": [anchor.identity, *sorted(weights.identity for weights in tuned)],
        "made_by": made_by(stage="merge", method=method, options=options or {}, granularity=granularity),
        **kept_notices(*(notices_of(weights.meta) for weights in (anchor, *tuned)), notices),
    }
    return WeightSet(plan.tensors(), metadata, f"{method} of {len(tuned)}"), dict(plan.report)
