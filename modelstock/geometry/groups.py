"""Which type of tensor each one is, and in which block: by names and shapes, for any model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from modelstock.weights.layout import blocks

# In the order in which tables list them.
KINDS = (
    "attention weight",
    "MLP weight",
    "convolution",
    "embedding",
    "head",
    "bias",
    "norm",
    "other",
)

_HEAD = re.compile(r"(^|\.)(lm_head|heads?|classifier|fc|score|qa_outputs)(\.|$)")
_NORM = re.compile(r"(^|[._])(ln|bn|(layer|batch|group|rms)_?norm|norm)(?=\d|[._]|$)|layernorm")
_BIAS = re.compile(r"(^|[._])(bias|b_[a-z]+)$|bias$")
_EMBEDDING = re.compile(r"embed|(^|\.)w[tp]e(\.|$)|(cls|class|mask|dist|register)_tokens?|relative_position")
_ATTENTION = re.compile(r"att(entio)?n|(^|[._])(q|k|v|o|qkv|kv|in|out)_proj|(^|\.)(query|key|value|to_[qkv])(\.|$)")
_MLP = re.compile(
    r"(^|[._])(mlp|ffn|fc\d?|wi|wo|w[123])(?=[._\d]|$)|feed_?forward|intermediate|dense|(gate|up|down)_proj|linear\d"
)
_BLOCK = re.compile(r"^(?:.*?(?:^|\.))??(?:\d+|(?:layer|stage|block)s?_?\d+)(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """Where a tensor belongs. `number`: of its block; -1 before the blocks, `blocks` behind them."""

    kind: str
    block: str
    number: int
    blocks: int


def kind_of(name: str, shape: tuple[int, ...], *, outside: bool) -> str:
    """The type of a tensor, one of KINDS. `outside`: it is in no numbered block, where a head may be.

    A normalisation's bias counts as norm. What has one axis and is called weight is a norm's too.
    """
    lower = name.lower()
    last = lower.rpartition(".")[2]
    if _NORM.search(lower):
        return "norm"
    if outside and _HEAD.search(lower):
        return "head"
    if len(shape) == 1 and last in ("weight", "gamma", "beta", "scale"):
        return "norm"
    if _BIAS.search(lower):
        return "bias"
    if len(shape) > 2 and last == "weight":
        return "convolution"
    if _EMBEDDING.search(lower):
        return "embedding"
    if len(shape) == 2 and _ATTENTION.search(lower):
        return "attention weight"
    return "MLP weight" if len(shape) == 2 and _MLP.search(lower) else "other"


def groups(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Group]:
    """Type and block of each tensor, by the names and shapes of all. Blocks are named as their tensors begin."""
    numbers = blocks(list(shapes))
    most = max((count for _, count in numbers.values()), default=0)

    def group(name: str) -> Group:
        match, (number, count) = _BLOCK.match(name), numbers[name]
        block = match[0] if match else "before the blocks" if number < 0 else "behind the blocks" if most else "model"
        return Group(kind_of(name, shapes[name], outside=match is None), block, number, count)

    return {name: group(name) for name in shapes}
