"""What the names of a model's tensors say: in which block each of them is, and what BatchNorm keeps in it."""

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"(?:^|\.)(?:(\d+)|((?:layer|stage|block)s?)_?(\d+))(?=\.|$)")
_BEFORE = re.compile(r"embed|conv\d|bn\d|ln_pre|norm_pre|pre_?layer_?norm|stem|patch|cls_token|(^|\.)w[tp]e\.")
_NORM = re.compile(r"(?:^|\.)bn2\.")  # of the stem's second convolution or, in an EfficientNet, of its last
_POOL = re.compile(r"attn_?pool")  # it has embeddings of its own


def is_running_statistic(name: str) -> bool:
    """Whether a tensor is BatchNorm's mean or variance of activations, which no gradient has trained."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def is_counter(name: str) -> bool:
    """Whether a tensor is BatchNorm's count of the batches it has seen."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def blocks(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Which block of how many each tensor is in, read off its name: (-1, n) before n blocks, (n, n) behind them.

    The first number in a name is its block, `blocks.3.mlp` or `layer3.0.conv1`, counted among the blocks of the same
    prefix. Tensors outside the blocks lie before them where their name speaks of embeddings, stems or patches. Where
    no name has a number, n is 0.
    """
    numbered: dict[str, tuple[str, int]] = {}  # name -> prefix, number
    numbers: dict[str, set[int]] = {}  # prefix -> the numbers that occur
    for name in names:
        if match := _BLOCK.search(name):
            prefix, number = f"{name[: match.start()]}.{match[2] or ''}", int(match[1] or match[3])
            numbered[name] = prefix, number
            numbers.setdefault(prefix, set()).add(number)
    counts = {prefix: max(group) - min(group) + 1 for prefix, group in numbers.items()}  # some models count from 1
    most, known = max(counts.values(), default=0), set(names)

    def is_before(name: str) -> bool:
        norm = _NORM.search(name)
        if norm and f"{name[: norm.end() - len('bn2.')]}conv_head.weight" in known:
            return False
        return bool(_BEFORE.search(name)) and not _POOL.search(name)

    def block(name: str) -> tuple[int, int]:
        if name not in numbered:
            return (-1 if is_before(name) else most), most
        prefix, number = numbered[name]
        return number - min(numbers[prefix]), counts[prefix]

    return {name: block(name) for name in names}


def depths(names: Sequence[str]) -> dict[str, float]:
    """How deep in its model each tensor lies: 0 before and in the first block, 1 in the last and behind; see `blocks`.

    Empty where no name has a number.
    """
    numbered = blocks(names)
    if not any(count for _, count in numbered.values()):
        return {}
    return {name: min(max(number / max(1, count - 1), 0.0), 1.0) for name, (number, count) in numbered.items()}
