"""By which names a checkpoint has a tower's tensors."""

from collections import Counter
from collections.abc import Sequence

from modelstock.errors import WeightsError, few
from modelstock.weights.tensors import Checkpoint


def prefix_of_tower(checkpoint: Checkpoint, tower: Sequence[str], what: str = "image tower") -> str:
    """What comes before the names of a tower's tensors, given without a prefix of their own, in a checkpoint.

    Raises:
        WeightsError: no such tower in it, or two.
    """
    names, hits = set(tower), Counter[str]()
    for name in checkpoint.tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if (rest := ".".join(parts[start:])) in names:
                hits[name.removesuffix(rest)] += 1
    whole = sorted(prefix for prefix, count in hits.items() if count == len(names))
    if len(whole) == 1:
        return whole[0]
    if whole:
        got = f"{len(whole)} {what}s, under {' and '.join(map(repr, whole))}"
        cure = "save the one to merge in a file of its own"
        raise WeightsError(checkpoint.source, got=got, expected="one", cure=cure)
    best = max(sorted(hits), key=lambda prefix: hits[prefix], default="visual.")
    missing = sorted(best + name for name in names if best + name not in checkpoint.tensors)
    raise WeightsError(
        checkpoint.source,
        got=f"{len(missing)} of the {what}'s {len(names)} tensors missing: {few(missing)}",
        expected=f"the {what} of the anchor",
        cure="name a checkpoint of the anchor's architecture",
    )
