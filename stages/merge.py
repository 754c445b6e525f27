"""Merges subsets of the seeds by one method; whatever is chosen is chosen on the held-out cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelstock import statistics
from modelstock.distributed import device_kind
from modelstock.errors import MergeError
from modelstock.evaluation import score
from modelstock.files import write_json
from modelstock.merging import merge
from modelstock.methods import METHODS
from modelstock.params import load_params
from modelstock.soups import finetuned, subsets
from modelstock.weights import WeightSet, load_weights
from stages import deterministic, run


def main(method: str, anchor: Path, tuned: Path, train: Path, held_out: Path, out: Path) -> None:
    """METHOD: one of merge.methods; ANCHOR; TUNED: the seeds' folder; TRAIN, HELD_OUT: shards; OUT: the folder."""
    params = load_params()
    if method not in params.merge.methods:
        raise MergeError(
            "method", got=repr(method), expected=", ".join(params.merge.methods), cure="name one of merge.methods"
        )
    deterministic(params.threads)
    origin, seeds = load_weights(anchor), finetuned(tuned, params.finetune.seeds)
    section, needs = getattr(params.merge, method), METHODS[method].needs
    knobs = section.model_dump(exclude={"alphas", "scales", "examples", "sets"})
    device, report = device_kind(params.device), dict[str, Any]()

    def accuracies(weights: Sequence[WeightSet]) -> list[float]:
        outcomes = score(
            held_out, weights, cache=Path("scratch/scores"), device=params.device,
            **params.evaluate.model_dump(exclude={"benchmarks"}),
        )  # fmt: skip
        return [float(outcomes[w.identity].correct.mean()) for w in weights]

    def keep(weights: WeightSet, members: Sequence[int], facts: Any, suffix: str = "") -> None:
        name = "-".join(map(str, members)) + suffix
        made = {**weights.meta["made_by"], "members": list(members)}
        WeightSet(weights.tensors, {**weights.meta, "made_by": made}, name).save(out / f"{name}.safetensors")
        report[name] = facts

    measured: dict[int, WeightSet] = {}
    if needs in ("fisher", "inner"):
        measure = statistics.fisher if needs == "fisher" else statistics.inner
        images, _ = statistics.sample(train, origin, examples=section.examples)
        measured = {seed: measure(weights, images, device=device) for seed, weights in seeds.items()}
    elif needs == "score":
        knobs["score"] = accuracies
    elif needs == "gradient":
        knobs["gradient"] = statistics.loss_gradient(
            *statistics.sample(held_out, origin, examples=section.examples), device=device
        )

    # What is chosen on the held-out cut: WiSE-FT's alpha, or the scale of the whole update.
    knob = "alpha" if hasattr(section, "alphas") else "scale"
    choices = list(getattr(section, f"{knob}s", []))
    for members in subsets(params.finetune.seeds, section.sets):
        given = {"statistics": [measured[m] for m in members]} if measured else {}
        chosen = [seeds[m] for m in members]
        trials = [merge(method, origin, chosen, **given, **knobs, **{knob: value}) for value in choices]
        if not trials:
            weights, facts = merge(method, origin, chosen, **given, **knobs)
            kept = next(iter(facts.values())).get("chosen")
            keep(weights, [m for m in members if seeds[m].source in kept] if kept else members, facts)
            continue
        held = accuracies([weights for weights, _ in trials])
        best = max(range(len(choices)), key=lambda i: (held[i], -i))
        curve = {"held-out/top1": dict(zip(map(str, choices), held, strict=True)), knob: choices[best]}
        # WiSE-FT's whole curve is drawn for all seeds together.
        whole = knob == "alpha" and len(members) == len(seeds)
        for i in range(len(choices)) if whole else [best]:
            keep(trials[i][0], members, curve, f"@{choices[i]}")
    write_json(out / "report.json", report)
    print(f"{method}: {len(report)} weight sets")


if __name__ == "__main__":
    run(main)
