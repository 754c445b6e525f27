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
    needs, device = METHODS[method].needs, str(scoring["device"])
    options = section.model_dump(exclude={"alphas", "scales", "examples", "sets"})

    def accuracies(weights: Sequence[WeightSet]) -> list[float]:
        outcomes = score(held_out, weights, **scoring)
        return [float(outcomes[w.identity].correct.mean()) for w in weights]

    def made(weights: WeightSet, members: Sequence[int], suffix: str = "") -> tuple[str, WeightSet]:
        name = "-".join(map(str, members)) + suffix
        by = {**weights.meta["made_by"], "members": list(members)}
        return name, WeightSet(weights.tensors, {**weights.meta, "made_by": by}, name)

    examples = getattr(section, "examples", 0)
    measured: dict[int, WeightSet] = {}
    if needs in ("fisher", "inner"):
        measure = statistics.fisher if needs == "fisher" else statistics.inner
        images, _ = statistics.sample(train, anchor, examples=examples)
        measured = {seed: measure(weights, images, device=device) for seed, weights in seeds.items()}
    elif needs == "score":
        options["score"] = accuracies
    elif needs == "gradient":
        cut = statistics.sample(held_out, anchor, examples=examples)
        options["gradient"] = statistics.loss_gradient(*cut, device=device)

    option = "alpha" if hasattr(section, "alphas") else "scale"
    choices = list(getattr(section, f"{option}s", []))
    for members in subsets(list(seeds), section.sets):
        given = {"statistics": [measured[m] for m in members]} if measured else {}
        chosen = [seeds[m] for m in members]
        trials = [merge(method, anchor, chosen, **given, **options, **{option: value}) for value in choices]
        if not trials:
            weights, facts = merge(method, anchor, chosen, **given, **options)
            kept = next(iter(facts.values())).get("chosen")
            yield *made(weights, [m for m in members if seeds[m].source in kept] if kept else members), facts
            continue
        held = accuracies([weights for weights, _ in trials])
        best = max(range(len(choices)), key=lambda i: (held[i], -i))
        curve = {"held-out/top1": dict(zip(map(str, choices), held, strict=True)), option: choices[best]}
        # WiSE-FT's whole curve is drawn for all seeds together.
        whole = option == "alpha" and len(members) == len(seeds)
        for i in range(len(choices)) if whole else [best]:
            yield *made(trials[i][0], members, f"@{choices[i]}"), curve
