"""Merge methods: pure functions of one tensor position, in one table.

Every method is `(anchor, tuned, **knobs) -> Merged`: `anchor` is one array, `tuned` a sequence of N arrays of
its shape, all float64; the result has that shape. `METHODS` maps names to methods; `merge` runs one over
weight sets.

Notation: w0 the anchor, w_i the fine-tuned weights, v_i = w_i - w0 the updates (task vectors).
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelstock import __version__
from modelstock.errors import MergeError
from modelstock.weights import WeightSet, check_finite

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Merged:
    """One merged tensor, and what there is to say of how it came about (JSON values)."""

    tensor: Float
    facts: Mapping[str, Any] = field(default_factory=dict)


def stock_ratio(cosine: float, count: int) -> float:
    """t = N cos / (1 + (N - 1) cos), the pull of the mean toward the anchor; infinite where its pole is met.

    Source: Jang, Yun, Han, arXiv 2403.19522, eq. 3.
    """
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if denominator != 0 else -np.inf


def model_stock(
    anchor: Float,
    tuned: Sequence[Float],
    *,
    pairwise: Literal["cosine", "angle"] = "cosine",
    clip: Literal["unit", "none"] = "unit",
    granularity: Literal["tensor", "filter"] = "tensor",
) -> Merged:
    """w0 + t * mean(v_i), with t read from the mean cosine between the updates.

    `pairwise`: average the pairs' cosines (as the authors do) or their angles. `clip`: hold t in [0, 1], or
    apply the literal formula, which explodes as cos -> -1/(N-1). `granularity`: one t a tensor (the authors'
    "layer-wise"), or one for each slice of its first axis. A zero update leaves the cosine undefined: the
    anchor's values are kept.

    Raises:
        MergeError: fewer than two fine-tuned weights, or an infinite ratio with `clip="none"`.
    Source: arXiv 2403.19522, eq. 3.
    """
    if len(tuned) < 2:
        raise MergeError(
            "model_stock",
            got=f"{len(tuned)} fine-tuned weights",
            expected="2 or more",
            cure="fine-tune another seed",
        )
    for knob, value, known in (
        ("pairwise", pairwise, ("cosine", "angle")),
        ("clip", clip, ("unit", "none")),
        ("granularity", granularity, ("tensor", "filter")),
    ):
        if value not in known:
            raise MergeError(
                f"model_stock, knob {knob}",
                got=repr(value),
                expected=" or ".join(known),
                cure="correct the knob",
            )
    rows = anchor.shape[0] if granularity == "filter" and anchor.ndim > 1 else 1
    updates = np.stack([(w - anchor).reshape(rows, -1) for w in tuned])  # (N, rows, values)
    gram = np.einsum("irk,jrk->rij", updates, updates)  # (rows, N, N)
    norms = np.sqrt(np.einsum("rii->ri", gram))  # (rows, N)
    zero = (norms == 0).any(axis=1)
    first, second = np.triu_indices(len(tuned), 1)
    scale = np.where(norms == 0, 1.0, norms)
    # Each update is divided by its own norm: the product of two tiny norms could underflow.
    cosines = np.clip(gram[:, first, second] / scale[:, first] / scale[:, second], -1, 1)
    cosine = np.cos(np.arccos(cosines).mean(axis=1)) if pairwise == "angle" else cosines.mean(axis=1)
    raw = np.array([stock_ratio(float(c), len(tuned)) for c in cosine])
    ratio = np.where(zero, 0.0, np.clip(raw, 0, 1) if clip == "unit" else raw)
    if not np.isfinite(ratio).all():
        raise MergeError(
            "model_stock",
            got="updates whose ratio is infinite",
            expected="cos above -1/(N-1)",
            cure="use clip: unit",
        )
    tensor = anchor + (ratio[:, None] * updates.mean(axis=0)).reshape(anchor.shape)
    facts = {
        "cosine": float(cosine[~zero].mean()) if not zero.all() else None,
        "ratio": float(ratio.mean()),
        "clipped": int(((raw != ratio) & ~zero).sum()),
        "negative": int(((cosine < 0) & ~zero).sum()),
        "zero": int(zero.sum()),
        "norms": norms.mean(axis=0).tolist() if rows > 1 else norms[0].tolist(),
    }
    return Merged(tensor, facts)


def uniform(anchor: Float, tuned: Sequence[Float]) -> Merged:
    """w0 + mean(v_i), the plain average. Source: Wortsman et al., model soups, arXiv 2203.05482."""
    return Merged(anchor + np.mean([w - anchor for w in tuned], axis=0))


def wise_ft(anchor: Float, tuned: Sequence[Float], *, alpha: float = 0.5) -> Merged:
    """w0 + alpha * mean(v_i): WiSE-FT, of the soup where N > 1. Source: Wortsman et al., arXiv 2109.01903."""
    if not 0 <= alpha <= 1:
        raise MergeError("wise_ft, knob alpha", got=alpha, expected="a number from 0 to 1", cure="correct the knob")
    return Merged(anchor + alpha * np.mean([w - anchor for w in tuned], axis=0))


Method = Callable[..., Merged]
METHODS: dict[str, Method] = {"model_stock": model_stock, "uniform": uniform, "wise_ft": wise_ft}


def find_method(name: str, knobs: Mapping[str, Any]) -> Method:
    """The method of that name, once its knobs are known to exist.

    Raises:
        MergeError: unknown method or knob, with the nearest valid one.
    """
    if name not in METHODS:
        raise MergeError("method", got=repr(name), expected=", ".join(METHODS), cure=_nearest(name, METHODS))
    known = [p for p, v in inspect.signature(METHODS[name]).parameters.items() if v.kind is v.KEYWORD_ONLY]
    for knob in knobs:
        if knob not in known:
            raise MergeError(
                f"method {name}, knob",
                got=repr(knob),
                expected=", ".join(known) or "no knobs",
                cure=_nearest(knob, known),
            )
    return METHODS[name]


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]}?" if close else "choose one of these"


def check_fit(anchor: WeightSet, tuned: Sequence[WeightSet]) -> None:
    """Raise MergeError unless all weight sets have the anchor's keys, shapes and dtypes, and finite values.

    Integer and boolean buffers must be equal everywhere: there is no mean of them.
    """
    if not tuned:
        raise MergeError("merge", got="no fine-tuned weights", expected="1 or more", cure="name at least one")
    check_finite(anchor)
    seen = {anchor.identity: anchor.source}
    for weights in tuned:
        problems = [f"{k} missing" for k in anchor.tensors.keys() - weights.tensors.keys()]
        problems += [f"{k} unknown" for k in weights.tensors.keys() - anchor.tensors.keys()]
        for key in anchor.tensors.keys() & weights.tensors.keys():
            expected, got = anchor.tensors[key], weights.tensors[key]
            if expected.shape != got.shape:
                problems.append(f"{key} is {got.shape}, anchor {expected.shape}")
            elif expected.dtype != got.dtype:
                problems.append(f"{key} is {got.dtype}, anchor {expected.dtype}")
            elif expected.dtype.kind not in "f" and not np.array_equal(expected, got):
                problems.append(f"{key} is an integer buffer that differs from the anchor's")
        if problems:
            raise MergeError(
                weights.source,
                got="; ".join(sorted(problems)),
                expected=f"the tensors of {anchor.source}",
                cure="merge only models fine-tuned from this anchor",
            )
        check_finite(weights)
        if weights.identity in seen:
            raise MergeError(
                weights.source,
                got=f"the same tensors as {seen[weights.identity]}",
                expected="different weights",
                cure="name each weight set once, and the anchor only as anchor",
            )
        seen[weights.identity] = weights.source


def merge(
    method: str, anchor: WeightSet, tuned: Sequence[WeightSet], **knobs: Any
) -> tuple[WeightSet, dict[str, Mapping[str, Any]]]:
    """Merge weight sets tensor by tensor in float64, and round once to the anchor's dtype.

    Returns the merged weight set, its parents and knobs recorded, and the report: tensor name -> facts.
    Raises:
        MergeError: unknown method or knob, weight sets that do not fit, too few of them.
    """
    function = find_method(method, knobs)
    check_fit(anchor, tuned)
    # A fixed order makes the result independent of the caller's, to the last bit.
    tuned = sorted(tuned, key=lambda weights: weights.identity)
    tensors, report = {}, {}
    for name in sorted(anchor.tensors):
        origin = anchor.tensors[name]
        if origin.dtype.kind != "f":
            tensors[name] = origin.copy()
            continue
        merged = function(origin.astype(np.float64), [w.tensors[name].astype(np.float64) for w in tuned], **knobs)
        tensors[name] = merged.tensor.astype(origin.dtype)
        report[name] = merged.facts
    meta = {
        **anchor.meta,
        "parents": [anchor.identity, *(w.identity for w in tuned)],
        "made_by": {"stage": "merge", "method": method, "knobs": knobs, "version": __version__},
    }
    return WeightSet(tensors, meta, f"{method} of {len(tuned)}"), report


def greedy_soup(
    anchor: WeightSet, tuned: Sequence[WeightSet], score: Callable[[WeightSet], float]
) -> tuple[WeightSet, list[WeightSet]]:
    """Add weight sets to a running mean, best first, while the mean gets strictly better.

    `score` is the accuracy on the held-out cut of the training set. Returns the soup and its ingredients.
    Source: Wortsman et al., arXiv 2203.05482, recipe 1.
    """
    check_fit(anchor, tuned)
    ranked = sorted(tuned, key=lambda weights: (-score(weights), weights.identity))
    chosen, soup = ranked[:1], merge("uniform", anchor, ranked[:1])[0]
    best = score(soup)
    for candidate in ranked[1:]:
        trial = merge("uniform", anchor, [*chosen, candidate])[0]
        accuracy = score(trial)
        if accuracy > best:
            chosen, soup, best = [*chosen, candidate], trial, accuracy
    meta = {
        **soup.meta,
        "made_by": {"stage": "merge", "method": "greedy", "knobs": {}, "version": __version__},
    }
    return WeightSet(soup.tensors, meta, f"greedy soup of {len(chosen)}"), chosen
