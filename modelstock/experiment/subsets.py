"""Which seeds are merged together, and what a weight set is called in tables."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from modelstock.params import Params
from modelstock.scoring.results import Row
from modelstock.weights.weight_set import WeightSet, load_weights

Sets = Literal["ring", "pairs", "brief", "all"]


def subsets(seeds: Sequence[int], sets: Sets) -> list[tuple[int, ...]]:
    """Which seeds merge together: some pairs, fours, and all of them; none twice.

    "ring": every seed with the next, so each takes part in two pairs, and disjoint fours; "pairs": every pair, and
    disjoint fours; "brief": disjoint pairs; "all": no pairs or fours. All seeds together come last everywhere.
    """
    chosen: list[tuple[int, ...]] = []
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


def finetuned(folder: Path, seeds: Sequence[int], *, lazy: bool = False) -> dict[int, WeightSet]:
    """The seeds' weight sets by seed; folders of seeds that are not named are left alone."""
    return {seed: load_weights(folder / str(seed) / "weights.safetensors", lazy=lazy) for seed in seeds}


def beside(tuned_folder: Path, periodic: Path, longer: Path, params: Params) -> list[Path]:
    """What training made beside the seeds: averages and snapshots of each, periodic merges, seeds trained longer."""
    tuned, sizes = params.finetune, params.periodic.sizes
    if params.checkpoints:
        return []
    stems = [f"ema-{decay}" for decay in tuned.ema] + ["lawa"] * (tuned.lawa > 0)
    stems += [f"epoch-{n}" for n in range(1, tuned.head_first_epochs + tuned.epochs) if tuned.snapshots]
    paths = [tuned_folder / str(seed) / f"{stem}.safetensors" for seed in params.seeds for stem in stems]
    return paths + [folder / str(size) / "weights.safetensors" for folder in (periodic, longer) for size in sizes]


def ensembles(seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Whose logits are averaged: two, four and all seeds, as the soups have them; of the pairs only the disjoint."""
    used: set[int] = set()
    chosen = []
    for members in subsets(seeds, "ring"):
        if len(members) != 2 or len(seeds) == 2 or not used & set(members):
            chosen.append(members)
            used |= set(members) if len(members) == 2 else set()
    return chosen


def row_of(weights: WeightSet) -> Row:
    """The row a weight set gets in tables: name, kind, members and options, from what its file says of itself."""
    made: Mapping[str, object] = weights.meta["made_by"]
    stage = made["stage"]
    if stage == "anchor":
        return Row("anchor", weights.identity, "anchor", (), {})
    if stage == "finetune":
        seed = int(str(made["seed"]))
        average = made.get("average")
        if average is None:
            return Row(f"seed-{seed}", weights.identity, "seed", (seed,), {})
        own: Mapping[str, object] = made["options"]  # type: ignore[assignment]
        option = {"ema": "ema_decay", "lawa": "lawa_last", "snapshot": "epoch"}[str(average)]
        return Row(f"{average}@{own[option]}/{seed}", weights.identity, str(average), (seed,), {option: own[option]})
    if stage == "longer":
        return Row(
            f"longer@{made['factor']}/{made['seed']}",
            weights.identity,
            "longer",
            (int(str(made["seed"])),),
            {"factor": made["factor"]},
        )
    members = tuple(int(m) for m in made["members"])  # type: ignore[attr-defined]
    method = str(made["method"])
    options: Mapping[str, object] = made["options"]  # type: ignore[assignment]
    suffix = next((f"@{options[k]}" for k in ("scale", "alpha") if k in options), "")
    return Row(f"{method}/{'-'.join(map(str, members))}{suffix}", weights.identity, method, members, options)
