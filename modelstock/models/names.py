"""By which names a checkpoint has a tower's tensors, and an export its head."""

from collections import Counter
from collections.abc import Collection, Sequence

from modelstock.errors import WeightsError, few
from modelstock.weights.tensors import Checkpoint

# An export's files of the head and of its classes' names.
HEAD = "head.safetensors"
CLASSES = "classes.json"


def prefix_of_tower(checkpoint: Checkpoint, tower: Sequence[str], what: str, *, default: str = "") -> str:
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
    best = max(sorted(hits), key=lambda prefix: hits[prefix], default=default)
    missing = sorted(best + name for name in names if best + name not in checkpoint.tensors)
    raise WeightsError(
        checkpoint.source,
        got=f"{len(missing)} of the {what}'s {len(names)} tensors missing: {few(missing)}",
        expected=f"the {what} of the anchor",
        cure="name a checkpoint of the anchor's architecture",
    )


# What checkpoints of encoders have under the encoder's prefix, or beside it, and in no feature of a tower.
UNUSED = (
    *("pooler.", "embeddings.position_ids", "embeddings.token_type_ids", "cls.", "lm_head.", "predictions."),
    *(
        "lm_predictions.",
        "generator_predictions.",
        "generator_lm_head.",
        "discriminator_predictions.",
        "mask_predictions.",
    ),
    *("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)
# Buffers that older versions of transformers kept, and that say nothing.
_POSITIONS = ("embeddings.position_ids", "embeddings.token_type_ids")


def beyond_tower(checkpoint: Checkpoint, prefix: str, tower: Collection[str]) -> list[str]:
    """Tensors of a checkpoint in the modules of its tower, under `prefix`, that the tower lacks: further layers."""
    modules = {name.partition(".")[0] for name in tower}
    return sorted(
        name
        for name in checkpoint.tensors
        if name.startswith(prefix)
        and (rest := name.removeprefix(prefix)) not in tower
        and rest.partition(".")[0] in modules
        and rest not in _POSITIONS
    )
