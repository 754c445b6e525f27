"""Scores ALL weight sets, and the seeds' logit ensembles, on one benchmark in one pass over its images."""

from pathlib import Path

from modelstock.evaluation import collect, ensemble_identity, score
from modelstock.params import load_params
from modelstock.scores import Row, save_scores
from modelstock.soups import beside, finetuned, row_of, subsets
from modelstock.weights import load_weights
from stages import deterministic, run


def main(data: Path, anchor: Path, tuned: Path, merged: Path, periodic: Path, longer: Path, out: Path) -> None:
    """DATA: shards; ANCHOR; TUNED, MERGED, PERIODIC, LONGER: folders of weight sets; OUT: the results to write."""
    params = load_params()
    deterministic(params.threads)
    seeds = finetuned(tuned, params.finetune.seeds)
    files = [path for method in params.merge.methods for path in sorted((merged / method).glob("*.safetensors"))]
    files += beside(tuned, periodic, longer, params)
    weights = [load_weights(anchor), *seeds.values(), *map(load_weights, files)]
    rows = [row_of(w) for w in weights]
    # Two, four and all seeds, as the soups have; of the pairs only the disjoint ones.
    used: set[int] = set()
    ensembles: list[list[str]] = []
    for members in subsets(params.finetune.seeds, "ring"):
        if len(members) == 2 and len(seeds) > 2 and used & set(members):
            continue
        used |= set(members) if len(members) == 2 else set()
        identities = [seeds[m].identity for m in members]
        ensembles.append(identities)
        name = f"ensemble/{'-'.join(map(str, members))}"
        rows.append(Row(name, ensemble_identity(identities), "ensemble", members, {}))
    outcomes = score(data, weights, ensembles, cache=Path("scratch/scores"), batch_size=params.evaluate.batch_size)
    save_scores(out, collect(data, rows, outcomes))
    print(f"{data}: {len(rows)} rows scored in one pass")


if __name__ == "__main__":
    run(main)
