"""What is unusual about checkpoints that are merged, but no reason to refuse them: each is one notice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modelstock.errors import few
from modelstock.merging.kernels import Float
from modelstock.merging.methods.blend import pair_cosines
from modelstock.notices import notice
from modelstock.weights.layout import is_counter, is_running_statistic
from modelstock.weights.tensors import FLOATS, Checkpoint, StoredTensor

LIKE_ONE = 0.95  # a cosine between whole updates above which they are taken for one direction that all share
NEAR_ROUNDING = 0.1  # rounding over the norm of an update above which angles are partly those of rounding
BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}  # of a significand
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAMPLE = 1 << 15  # values that a tensor's norm is estimated from


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The anchor's tensors by what becomes of them.

    `floating`: those with updates, sorted; `running`: of these, BatchNorm's running statistics; `counters`: of
    BatchNorm, each from the checkpoint where it is largest.
    """

    floating: Sequence[str]
    running: frozenset[str]
    counters: Mapping[str, StoredTensor]


def sort_tensors(anchor: Checkpoint, tuned: Sequence[Checkpoint], choose: Callable[[str], bool]) -> Tensors:
    """Sort the anchor's tensors, of which `choose` says what to merge, for checkpoints that fit it."""
    chosen = [name for name in sorted(anchor.tensors) if choose(name)]
    floating = [name for name in chosen if anchor.tensors[name].dtype in FLOATS]
    counters = {
        name: max((weights.tensors[name] for weights in (*tuned, anchor)), key=lambda tensor: tensor.array().max())
        for name in chosen
        if name not in floating and is_counter(name) and anchor.tensors[name].size
    }
    return Tensors(floating=floating, running=frozenset(filter(is_running_statistic, floating)), counters=counters)


def notice_unusual(
    anchor: Checkpoint,
    tuned: Sequence[Checkpoint],
    grams: Mapping[str, Float],
    *,
    tensors: Tensors,
    of: str,
    dtype: str | None,
    recalibrated: bool = False,
) -> None:
    """Give a notice for each thing that a user would not assume. `grams`: tensor -> inner products (rows, N, N).

    `recalibrated`: running statistics will be estimated again, so nobody needs to hear that they are averaged.
    """
    if not recalibrated:
        _notice_batch_norm(tensors)
    _notice_precisions(anchor, tuned, dtype)
    _notice_kept(anchor, tensors)
    if of == "updates":
        notice_updates(anchor, tuned, grams)


def notice_updates(anchor: Checkpoint, tuned: Sequence[Checkpoint], grams: Mapping[str, Float]) -> None:
    """Give a notice where the updates' angles may not be those of fine-tuning."""
    _notice_shared_direction(anchor, grams)
    _notice_rounding(anchor, tuned, grams)


def _notice_batch_norm(tensors: Tensors) -> None:
    if tensors.running:
        notice(
            "BatchNorm",
            f"{len(tensors.running)} running statistics are averaged, whatever the method: estimate them again on "
            "training data",
        )


def _notice_precisions(anchor: Checkpoint, tuned: Sequence[Checkpoint], dtype: str | None) -> None:
    """Where anchor and checkpoints have one tensor in different precisions."""
    mixed = [
        name
        for name, tensor in sorted(anchor.tensors.items())
        if tensor.dtype in FLOATS and any(w.tensors[name].dtype != tensor.dtype for w in tuned if name in w.tensors)
    ]
    if mixed:
        first = mixed[0]
        precisions = [NAMES.get(w.tensors[first].dtype, w.tensors[first].dtype) for w in tuned if first in w.tensors]
        result = NAMES[dtype] if dtype else f"{NAMES[anchor.tensors[first].dtype]}, the anchor's"
        notice(
            anchor.source,
            f"{len(mixed)} tensors are of another precision than in the fine-tuned checkpoints, such as {first}: "
            f"{NAMES[anchor.tensors[first].dtype]} and {few(sorted(set(precisions)))}; the result is {result}",
        )


def _notice_kept(anchor: Checkpoint, tensors: Tensors) -> None:
    """Where the anchor's own value of a tensor that is not merged is not finite."""
    for name, tensor in sorted(anchor.tensors.items()):
        if name not in tensors.floating and (count := tensor.count_non_finite()):
            notice(f"{anchor.source}, tensor {name}", f"kept, with {count} of {tensor.size} values that are not finite")


def _notice_shared_direction(anchor: Checkpoint, grams: Mapping[str, Float]) -> None:
    """Where all updates point the same way, as from an anchor that is not theirs."""
    whole = sum((gram.sum(axis=0) for gram in grams.values()), np.zeros(()))
    if len(whole) > 1 and np.diag(whole).all():
        cosine = float(pair_cosines(whole).mean())
        if cosine > LIKE_ONE:
            notice(
                anchor.source,
                f"the updates from it have a mean cosine of {cosine:.3f}, as if the checkpoints had been fine-tuned "
                "from another one, that all of them share: what they share counts as update, and ratios are near 1",
            )


def _notice_rounding(anchor: Checkpoint, tuned: Sequence[Checkpoint], grams: Mapping[str, Float]) -> None:
    """Where updates are so small that rounding to the stored precision is a part of them."""
    near: dict[str, tuple[float, float, str]] = {}  # tensor -> norm of its smallest update, of its rounding, dtype
    for name, gram in grams.items():
        stored = {weights.tensors[name].dtype for weights in (anchor, *tuned)}
        dtype = min(stored, key=lambda one: BITS[one])
        update = float(np.sqrt(np.diag(gram.sum(axis=0)).min()))
        # Over a binade, rounding's root mean square is 0.39 units of 2^-bits of a value's.
        rounding = 0.39 * 2.0 ** -BITS[dtype] * _norm(anchor.tensors[name])
        if 0 < update < rounding / NEAR_ROUNDING:
            near[name] = update, rounding, dtype
    if near:
        name = max(near, key=lambda one: near[one][1] / near[one][0])
        update, rounding, dtype = near[name]
        notice(
            anchor.source,
            f"{len(near)} of {len(grams)} tensors have updates near the rounding of their precision, such as {name}: "
            f"norm {update:.2g}, rounding to {NAMES[dtype]} {rounding:.2g}; their angles, and what is read from them, "
            "are partly those of rounding",
        )


def _norm(tensor: StoredTensor) -> float:
    """A tensor's norm, of a large one estimated from parts of it at equal distances."""
    if tensor.size <= SAMPLE:
        return float(np.linalg.norm(tensor.values()))
    part = SAMPLE // 8
    starts = np.linspace(0, tensor.size - part, 8).astype(int).tolist()
    mean_square = np.mean([np.mean(tensor.values(start, start + part) ** 2) for start in starts])
    return float(np.sqrt(mean_square * tensor.size))
