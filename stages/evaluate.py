"""Scores ALL weight sets, and the seeds' logit ensembles, on one benchmark in one pass over its images."""

from pathlib import Path

from modelstock.devices import deterministic
from modelstock.experiment.subsets import beside, ensembles, finetuned, row_of
from modelstock.params import load_params
from modelstock.scoring.one_pass import collect, ensemble_identity, score
from modelstock.scoring.results import Row, save_scores
from modelstock.weights.weight_set import load_weights
from stages import run


def main(data: Path, models: Path, out: Path) -> None:
    """DATA: shards; MODELS: the folder of anchor, seeds, merges and what is beside them; OUT: the results to write."""
    params = load_params()
    deterministic(params.threads)
    seeds = finetuned(models / "finetuned", params.seeds, lazy=True)
    files = [p for method in params.merge.methods for p in sorted((models / "merged" / method).glob("*.safetensors"))]
    files += beside(models / "finetuned", models / "periodic", models / "longer", params)
    anchor = load_weights(models / "anchor.safetensors", lazy=True)
    weights = [anchor, *seeds.values(), *(load_weights(file, lazy=True) for file in files)]
    rows = [row_of(w) for w in weights]
    groups = {members: [seeds[m].identity for m in members] for members in ensembles(params.seeds)}
    for members, identities in groups.items():
        name = f"ensemble/{'-'.join(map(str, members))}"
        rows.append(Row(name, ensemble_identity(identities), "ensemble", members, {}))
    outcomes = score(
        data,
        weights,
        list(groups.values()),
        cache=Path("scratch/scores"),
        device=params.device,
        **params.evaluate.model_dump(exclude={"benchmarks"}),
    )
    save_scores(out, collect(data, rows, outcomes))
    print(f"{data}: {len(rows)} rows scored in one pass")


if __name__ == "__main__":
    run(main)
