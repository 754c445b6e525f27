"""What a comparison merges: subsets of the fine-tuned by each method, their options chosen on the held-out cut."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock.experiment.subsets import subsets
from modelstock.merging.engine import merge
from modelstock.merging.methods.table import METHODS
from modelstock.params import MethodParams
from modelstock.scoring import data_statistics as statistics
from modelstock.scoring.one_pass import score
from modelstock.weights.weight_set import WeightSet


def merge_subsets(
    method: str,
    section: MethodParams,
    anchor: WeightSet,
    seeds: Mapping[int, WeightSet],
    *,
    held_out: Path,
    train: Path,
    scoring: Mapping[str, Any],
) -> Iterator[tuple[str, WeightSet, Any]]:
    """Merge the subsets of `seeds` that the method's section asks for: name, weight set and report of each.

    A scale, or WiSE-FT's alpha, is the best of the section's on the shards `held_out`, of equals the first; of WiSE-FT
    of all seeds every alpha is given, for its curve. `train`: shards that Fisher and RegMean weigh by. `scoring`:
    options of modelstock.evaluation.score, its device among them.

    Raises:
        DataError, MergeError, WeightsError: see modelstock.merging.merge and modelstock.evaluation.score.
    """
    row, device = METHODS[method], str(scoring["device"])
    fields = section.model_dump()
    options = {name: fields[name] for name in row.options if name in fields}
    merged_by: dict[str, Any] = {"granularity": fields.get("granularity", "tensor")}

    def accuracies(weights: Sequence[WeightSet]) -> list[float]:
        outcomes = score(held_out, weights, **scoring)
        return [float(outcomes[w.identity].correct.mean()) for w in weights]

    def made(weights: WeightSet, members: Sequence[int], suffix: str = "") -> tuple[str, WeightSet]:
        name = "-".join(map(str, members)) + suffix
        by = {**weights.meta["made_by"], "members": list(members)}
        return name, WeightSet(weights.tensors, {**weights.meta, "made_by": by}, name)

    examples = fields.get("examples", 0)
    measured: dict[int, WeightSet] = {}
    if row.reads_statistics:
        measure = statistics.fisher if row.needs == "fisher" else statistics.inner
        images, _ = statistics.sample(train, anchor, examples=examples)
        measured = {seed: measure(weights, images, device=device) for seed, weights in seeds.items()}
    elif row.needs == "score":
        merged_by["score"] = accuracies
    elif row.needs == "gradient":
        held_out_sample = statistics.sample(held_out, anchor, examples=examples)
        merged_by["gradient"] = statistics.loss_gradient(*held_out_sample, device=device)

    choice = row.chooses
    candidates: list[float] = list(fields[choice.name]) if choice else []
    for members in subsets(list(seeds), section.sets):
        merged_by["statistics"] = [measured[m] for m in members] if measured else []
        chosen = [seeds[m] for m in members]
        if choice is None:
            weights, facts = merge(method, anchor, chosen, options=options, **merged_by)
            kept = next(iter(facts.values())).get("chosen")
            yield *made(weights, [m for m in members if seeds[m].source in kept] if kept else members), facts
            continue
        trials = [
            merge(method, anchor, chosen, options={**options, choice.option: value}, **merged_by)[0]
            for value in candidates
        ]
        held = accuracies(trials)
        best = max(range(len(candidates)), key=lambda i: (held[i], -i))
        curve = {
            "held-out/top1": dict(zip(map(str, candidates), held, strict=True)),
            choice.option: candidates[best],
        }
        whole_curve = choice.curve and len(members) == len(seeds)
        for i in range(len(candidates)) if whole_curve else [best]:
            yield *made(trials[i], members, f"@{candidates[i]}"), curve
