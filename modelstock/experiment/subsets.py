"""Which seeds are merged together, and whose logits are averaged."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

Sets = Literal["ring", "pairs", "brief", "all", "single"]


def subsets(seeds: Sequence[int], sets: Sets) -> list[tuple[int, ...]]:
    """Which seeds merge together: some pairs, fours, and all of them; none twice.

    "ring": every seed with the next, so each takes part in two pairs, and disjoint fours; "pairs": every pair, and
    disjoint fours; "brief": disjoint pairs; "all": no pairs or fours. All seeds together come last everywhere, except
    with "single": every seed alone.
    """
    chosen: list[tuple[int, ...]] = []
    if sets == "single":
        return [(seed,) for seed in seeds]
    if sets == "ring":
        chosen = [(seeds[i], seeds[(i + 1) % len(seeds)]) for i in range(len(seeds))]
    elif sets == "pairs":
        chosen = list(combinations(seeds, 2))
    elif sets == "brief":
        chosen = [(seeds[i], seeds[i + 1]) for i in range(0, len(seeds) - 1, 2)]
    if sets in ("ring", "pairs"):
        chosen += [tuple(seeds[i : i + 4]) for i in range(0, len(seeds) - 3, 4)]
    chosen += [tuple(seeds)]
    return list(dict.fromkeys(tuple(sorted(members)) for members in chosen))


def ensembles(seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Whose logits are averaged: two, four and all seeds, as they are merged; of the pairs only the disjoint."""
    paired: set[int] = set()
    chosen = []
    for members in subsets(seeds, "ring"):
        if len(members) != 2 or len(seeds) == 2 or not paired & set(members):
            chosen.append(members)
            paired |= set(members) if len(members) == 2 else set()
    return chosen
