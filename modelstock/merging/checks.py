"""Everything that a merge refuses: options before a checkpoint is read, checkpoints before a byte is written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from modelstock.errors import MergeError, WeightsError, few
from modelstock.merging.kernels import Float, chunks
from modelstock.merging.methods.table import find_method
from modelstock.weights.differences import differences, stored_differences
from modelstock.weights.tensors import FLOATS, Checkpoint, StoredTensor, check_finite
from modelstock.weights.weight_set import WeightSet

Granularity = Literal["tensor", "filter", "model"]
STATISTICS = {"fisher": "squared gradients", "inner": "inner products of layer inputs"}


def check_options(
    method: str, count: int, *, options: Mapping[str, Any], granularity: str, dtype: str | None, statistics: int
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
            method,
            got=f"{count} fine-tuned weights",
            expected=f"{row.most} at most",
            cure="use karcher for more" if row.most > 1 else "merge them one by one",
        )
    find_method(method, options, count)
    wanted = count if row.reads_statistics else 0
    if statistics != wanted:
        what = STATISTICS.get(row.needs, "statistics")
        raise MergeError(
            f"method {method}",
            got=f"{statistics} files of statistics",
            expected=f"{wanted}: {what} by checkpoint",
            cure="see `modelstock statistics --help`" if wanted else "leave them out",
        )


# What a weight set says of itself that its merge says in its turn, with the anchor's words.
SAME = {"architecture": "architecture", "preprocess": "preprocessing", "classes_sha256": "classes"}


def check_parents(anchor: WeightSet | Checkpoint, tuned: Sequence[WeightSet | Checkpoint]) -> None:
    """Raise MergeError for weights that say they are of another anchor, architecture, preprocessing or classes."""
    for weights in tuned:
        for key, what in SAME.items():
            if key in weights.meta and key in anchor.meta and weights.meta[key] != anchor.meta[key]:
                raise MergeError(
                    weights.source,
                    got=f"weights of another {what} ({_differing(weights.meta[key], anchor.meta[key])})",
                    expected=f"that of the anchor {anchor.source}",
                    cure="merge only what was fine-tuned from this anchor",
                )
        parents = weights.meta.get("parents") or []
        if parents and anchor.identity not in parents:
            raise MergeError(
                weights.source,
                got=f"weights made from {few([str(parent)[:12] for parent in parents])}",
                expected=f"from the anchor {anchor.source}, {anchor.identity[:12]}",
                cure="name the anchor that they were fine-tuned from",
            )


def _differing(value: Any, expected: Any) -> str:
    """What of two entries of metadata differs."""
    if not isinstance(value, Mapping) or not isinstance(expected, Mapping):
        return f"{str(value)[:12]}, not {str(expected)[:12]}"
    keys = [key for key in sorted(value.keys() | expected.keys()) if value.get(key) != expected.get(key)]
    return few([_named(key, value.get(key), expected.get(key)) for key in keys])


def _named(key: str, value: Any, expected: Any) -> str:
    """An entry that differs: by its sha256, where it has one, as a tokenizer's file does."""
    hashes = [one.get("sha256") if isinstance(one, Mapping) else None for one in (value, expected)]
    if not all(hashes):
        return key
    digest, other = (str(one)[:12] for one in hashes)
    return f"{key} sha256 {digest}, not {other}"


def check_measured(tuned: Sequence[WeightSet | Checkpoint], statistics: Sequence[WeightSet | Checkpoint]) -> None:
    """Raise MergeError for statistics that say they were measured of other weights than those in their place."""
    for weights, measured in zip(tuned, statistics, strict=False):
        of = measured.meta.get("of")
        if of is not None and of != weights.identity:
            raise MergeError(
                measured.source,
                got=f"statistics of {str(of)[:12]}",
                expected=f"those of {weights.source}, {weights.identity[:12]}",
                cure="name them in the same order",
            )


def check_fit(
    anchor: Checkpoint, tuned: Sequence[Checkpoint], choose: Callable[[str], bool] = lambda name: True
) -> None:
    """Raise MergeError unless all checkpoints have the anchor's keys, shapes and dtypes; all differences are named.

    Tensors that are not chosen are not compared: the anchor's are kept. See `stored_differences`.
    """
    if not tuned:
        raise MergeError("merge", got="no fine-tuned weights", expected="1 or more", cure="name at least one")
    for weights in tuned:
        problems = stored_differences(weights.tensors, anchor.tensors, whose="the anchor's", compared=choose)
        if problems:
            raise MergeError(
                weights.source,
                got="; ".join(problems),
                expected=f"the tensors of {anchor.source}",
                cure="merge only models fine-tuned from this anchor; what it shall keep of the anchor, --exclude",
            )


def refuse_non_finite(name: str, sources: Sequence[tuple[str, StoredTensor]]) -> None:
    """Raise WeightsError for inner products that are not finite: they show NaN and infinity, and overflow."""
    for source, tensor in sources:
        check_finite([(name, tensor)], source)
    raise WeightsError(
        f"{sources[-1][0]}, tensor {name}",
        got="updates whose squares overflow",
        expected="norms below 1e154",
        cure="check the training",
    )


def check_different(
    anchor: Checkpoint, tuned: Sequence[Checkpoint], grams: Mapping[str, Float], *, squares: Float, of: str
) -> None:
    """Raise MergeError for the same weights twice, or the anchor among them.

    `grams`: tensor -> inner products (rows, N, N); `squares`: (N, tensors), squared norms of the updates.
    """
    for i, weights in enumerate(tuned):
        for j, other in enumerate([*tuned[:i], anchor] if len(tuned) > 1 else []):
            # All norms are the same for equal checkpoints; for others hardly ever.
            same_norms = (squares[i] == squares[j]).all() if other is not anchor else not squares[i].any()
            near = same_norms or (other is anchor and of == "weights")
            if near and all(other.tensors[name].equals(weights.tensors[name]) for name in grams):
                raise MergeError(
                    weights.source,
                    got=f"the same tensors as {other.source}",
                    expected="different weights",
                    cure="name each weight set once, and the anchor only as anchor",
                )


def check_statistics(needs: str, anchor: Checkpoint, statistics: Sequence[Checkpoint]) -> None:
    """Raise MergeError unless the statistics are finite, have the same names, and fit the anchor's tensors.

    Importance has a tensor's shape and no negative values; inner products (in, in) belong to a matrix (out, in).
    """
    expected = {name: tensor for name, tensor in statistics[0].tensors.items() if name in anchor.tensors}
    for measured in statistics:
        problems = differences(measured.tensors, expected, whose="the first file's")
        for name in sorted(measured.tensors.keys() & expected.keys()):
            tensor, target = measured.tensors[name], anchor.tensors[name]
            fits = target.shape == tensor.shape
            if needs == "inner":
                fits = len(target.shape) == 2 and tensor.shape == (target.shape[1], target.shape[1])
            if not fits or tensor.dtype not in FLOATS:
                problems.append(f"{name} is {tensor.dtype} {tensor.shape} for a tensor {target.shape}")
                continue
            for piece in chunks(tensor.size, 1):
                values = tensor.values(piece.start, piece.stop)
                if not np.isfinite(values).all() or (needs == "fisher" and (values < 0).any()):
                    problems.append(f"{name} holds NaN, infinity or negative importance")
                    break
        if problems or not measured.tensors:
            raise MergeError(
                measured.source,
                got="; ".join(sorted(problems)) or "no tensors",
                expected=f"statistics of the tensors of {anchor.source}",
                cure="see `modelstock statistics --help`",
            )
