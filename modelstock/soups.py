"""Which seeds are merged together, and what a weight set is called in tables."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from modelstock.params import Params
from modelstock.scores import Row
from modelstock.weights import WeightSet, load_weights


def subsets(seeds: Sequence[int], pairs: Literal["ring", "all"]) -> list[tuple[int, ...]]:
    """Pairs, then fours, then all seeds, none twice.

    `pairs`: "ring" is every seed with the next, so each takes part twice; "all" is every pair. Fours are disjoint.
    """
    ring = [(seeds[i], seeds[(i + 1) % len(seeds)]) for i in range(len(seeds))]
    chosen: list[tuple[int, ...]] = list(combinations(seeds, 2)) if pairs == "all" else [*ring]
    chosen += [tuple(seeds[i : i + 4]) for i in range(0, len(seeds) - 3, 4)]
    chosen += [tuple(seeds)]
    return list(dict.fromkeys(tuple(sorted(members)) for members in chosen))


def finetuned(folder: Path, seeds: Sequence[int]) -> dict[int, WeightSet]:
    """The seeds' weight sets by seed; folders of seeds that are not named are left alone."""
    return {seed: load_weights(folder / str(seed) / "weights.safetensors") for seed in seeds}


def beside(tuned_folder: Path, periodic: Path, longer: Path, params: Params) -> list[Path]:
    """What training made beside the seeds: averages and snapshots of each, periodic merges, seeds trained longer."""
    tuned = params.finetune
    stems = [f"ema-{decay}" for decay in tuned.ema] + ["lawa"] * (tuned.lawa > 0)
    stems += [f"epoch-{n}" for n in range(1, tuned.head_first_epochs + tuned.epochs) if tuned.snapshots]
    paths = [tuned_folder / str(seed) / f"{stem}.safetensors" for seed in tuned.seeds for stem in stems]
    sizes = params.periodic.sizes
    return paths + [folder / str(size) / "weights.safetensors" for folder in (periodic, longer) for size in sizes]


def row_of(weights: WeightSet) -> Row:
    """The row a weight set gets in tables: name, kind, members and knobs, from what its file says of itself."""
    made: Mapping[str, object] = weights.meta["made_by"]
    stage = made["stage"]
    if stage == "anchor":
        return Row("anchor", weights.identity, "anchor", (), {})
    if stage == "finetune":
        seed = int(str(made["seed"]))
        average = made.get("average")
        if average is None:
            return Row(f"seed-{seed}", weights.identity, "seed", (seed,), {})
        own: Mapping[str, object] = made["knobs"]  # type: ignore[assignment]
        knob = {"ema": "decay", "lawa": "last", "snapshot": "epoch"}[str(average)]
        return Row(f"{average}@{own[knob]}/{seed}", weights.identity, str(average), (seed,), {knob: own[knob]})
    if stage == "longer":
        return Row(f"longer@{made['factor']}/{made['seed']}", weights.identity, "longer", (int(str(made["seed"])),),
                   {"factor": made["factor"]})  # fmt: skip
    members = tuple(int(m) for m in made["members"])  # type: ignore[attr-defined]
    method = str(made["method"])
    knobs: Mapping[str, object] = made["knobs"]  # type: ignore[assignment]
    suffix = f"@{knobs['alpha']}" if "alpha" in knobs else ""
    return Row(f"{method}/{'-'.join(map(str, members))}{suffix}", weights.identity, method, members, knobs)
