"""Merges subsets of the seeds by one method; whatever is chosen is chosen on the held-out cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelstock.errors import MergeError
from modelstock.evaluation import score
from modelstock.files import write_json
from modelstock.merging import greedy_soup, merge
from modelstock.params import load_params
from modelstock.soups import finetuned, subsets
from modelstock.weights import WeightSet, load_weights
from stages import deterministic, run


def main(method: str, anchor: Path, tuned: Path, held_out: Path, out: Path) -> None:
    """METHOD: one of merge.methods; ANCHOR; TUNED: the seeds' folder; HELD_OUT: shards; OUT: the folder to write."""
    params = load_params()
    if method not in params.merge.methods:
        raise MergeError(
            "method", got=repr(method), expected=", ".join(params.merge.methods), cure="name one of merge.methods"
        )
    deterministic(params.threads)
    origin = load_weights(anchor)
    seeds = finetuned(tuned, params.finetune.seeds)
    report: dict[str, Any] = {}

    def accuracy(weights: Sequence[WeightSet]) -> list[float]:
        outcomes = score(held_out, weights, cache=Path("scratch/scores"), batch_size=params.evaluate.batch_size)
        return [float(outcomes[w.identity].correct.mean()) for w in weights]

    def keep(weights: WeightSet, members: Sequence[int], facts: Any, suffix: str = "") -> None:
        name = "-".join(map(str, members)) + suffix
        made = {**weights.meta["made_by"], "members": list(members)}
        WeightSet(weights.tensors, {**weights.meta, "made_by": made}, name).save(out / f"{name}.safetensors")
        report[name] = facts

    if method == "greedy":
        # One pass over the held-out cut scores all seeds, best first; the trials after it are one soup each.
        accuracy(list(seeds.values()))
        soup, chosen = greedy_soup(origin, list(seeds.values()), lambda w: accuracy([w])[0])
        identities = {w.identity for w in chosen}
        members = [seed for seed, w in seeds.items() if w.identity in identities]
        keep(soup, members, {"held-out/top1": accuracy([soup])[0]})
    elif method == "wise_ft":
        alphas = params.merge.wise_ft.alphas
        for members in subsets(params.finetune.seeds, params.merge.pairs):
            chosen = [seeds[m] for m in members]
            curve = [merge("wise_ft", origin, chosen, alpha=alpha)[0] for alpha in alphas]
            held = accuracy(curve)
            best = max(range(len(alphas)), key=lambda i: (held[i], -i))
            facts = {"held-out/top1": dict(zip(map(str, alphas), held, strict=True)), "alpha": alphas[best]}
            if len(members) == len(seeds):  # the whole curve is drawn for all seeds together
                for alpha, weights in zip(alphas, curve, strict=True):
                    keep(weights, members, facts, f"@{alpha}")
            else:
                keep(curve[best], members, facts, f"@{alphas[best]}")
    else:
        knobs = getattr(params.merge, method).model_dump()
        for members in subsets(params.finetune.seeds, params.merge.pairs):
            weights, facts = merge(method, origin, [seeds[m] for m in members], **knobs)
            keep(weights, members, facts)
    write_json(out / "report.json", report)
    print(f"{method}: {len(report)} weight sets")


if __name__ == "__main__":
    run(main)
