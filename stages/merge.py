"""Merges subsets of the seeds by one method; whatever is chosen is chosen on the held-out cut."""

from pathlib import Path
from typing import Any

from modelstock.devices import deterministic, device_kind
from modelstock.errors import MergeError
from modelstock.experiment.choices import merge_subsets
from modelstock.experiment.subsets import finetuned
from modelstock.files import write_json
from modelstock.params import load_params
from modelstock.weights.weight_set import load_weights
from stages import run


def main(method: str, anchor: Path, tuned: Path, train: Path, held_out: Path, out: Path) -> None:
    """METHOD: one of merge.methods; ANCHOR; TUNED: the seeds' folder; TRAIN, HELD_OUT: shards; OUT: the folder."""
    params = load_params()
    if method not in params.merge.methods:
        raise MergeError(
            "method", got=repr(method), expected=", ".join(params.merge.methods), cure="name one of merge.methods"
        )
    deterministic(params.threads)
    scoring = params.evaluate.model_dump(exclude={"benchmarks"}) | {
        "cache": Path("scratch/scores"),
        "device": device_kind(params.device),
    }
    report: dict[str, Any] = {}
    merged = merge_subsets(
        method,
        params.merge.section(method),
        load_weights(anchor),
        finetuned(tuned, params.seeds),
        held_out=held_out,
        train=train,
        scoring=scoring,
    )
    for name, weights, facts in merged:
        weights.save(out / f"{name}.safetensors")
        report[name] = facts
    write_json(out / "report.json", report)
    print(f"{method}: {len(report)} weight sets")


if __name__ == "__main__":
    run(main)
