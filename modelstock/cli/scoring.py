"""`modelstock evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstock.cli.options import PRECISIONS, AsJson, BatchSize, Device, Precision, Workers, check_choice, check_once
from modelstock.cli.output import show
from modelstock.errors import ParamsError
from modelstock.notices import repeat

if TYPE_CHECKING:
    from modelstock.scoring.results import Scores


def evaluate(
    weights: Annotated[list[Path], typer.Argument(help="Weight sets, or any checkpoints with --anchor.")],
    benchmark: Annotated[list[Path], typer.Option(help="A folder of shards; see `modelstock prepare`.")],
    anchor: Annotated[
        Path | None, typer.Option(help="The weight set that foreign checkpoints were fine-tuned from.")
    ] = None,
    ensemble: Annotated[list[str] | None, typer.Option(help="Checkpoints whose logits are averaged: 1,2.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A folder for per-example results.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Accuracy of each class instead.")] = False,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    resident: Annotated[int, typer.Option(min=0, help="Weight sets on the device at a time; 0: as many as fit.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="A folder that keeps results, and unfinished passes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score checkpoints on benchmarks, all of them in one pass over each."""
    check_choice("--precision", precision, PRECISIONS)
    check_once("WEIGHTS", weights)
    groups = [_members(text, len(weights)) for text in ensemble or []]
    from modelstock.data.dataset import open_benchmarks
    from modelstock.models.adopt import adopt
    from modelstock.scoring.one_pass import collect, score
    from modelstock.scoring.precision import scoring_options
    from modelstock.scoring.results import Row, save_scores
    from modelstock.scoring.score_cache import ensemble_identity
    from modelstock.weights.origin import notices_of
    from modelstock.weights.weight_set import load_weights

    origin = load_weights(anchor) if anchor else None
    candidates = [adopt(path, origin) if origin else load_weights(path, lazy=True) for path in weights]
    datasets = open_benchmarks(benchmark)
    for dataset in datasets:
        for one in candidates:  # of all benchmarks, before the first is scored
            dataset.check_modality(one)
            dataset.check_classes(one)
        repeat(f"{dataset.manifest.benchmark}: {line}" for line in dataset.manifest.notices)
    for one in candidates:
        repeat(notices_of(one.meta))
    rows = [
        Row(name=str(weights[i]), identity=one.identity, kind="checkpoint", members=(i,), options={})
        for i, one in enumerate(candidates)
    ]
    identities = [[candidates[member].identity for member in members] for members in groups]
    for members, group in zip(groups, identities, strict=True):
        title = "ensemble of " + ", ".join(str(member + 1) for member in members)
        identity = ensemble_identity(group)
        rows.append(Row(name=title, identity=identity, kind="ensemble", members=tuple(members), options={}))
    settings = {"precision": precision, "batch_size": batch_size, "workers": workers, "resident": resident or "auto"}
    options = scoring_options(settings, candidates[0], device=device, cache=cache, kept=cache)
    results = []
    for dataset in datasets:
        outcomes = score(dataset, candidates, identities, options)
        results.append(collect(dataset, rows, outcomes, candidates, options.precision))
        repeat(line for line in results[-1].notices if line.startswith(f"{results[-1].benchmark}: "))
        if out is not None:
            save_scores(out / f"{results[-1].benchmark}.safetensors", results[-1])
    if per_class:
        show("accuracy by class", [row for scores in results for row in _class_rows(scores)], as_json)
    elif as_json:
        show("scores", [row for scores in results for row in _metric_rows(scores)], True)
    else:
        for scores in results:
            title = f"{scores.benchmark}: {len(scores.truth)} {scores.modality}s; 95 % interval of top-1 by Wilson"
            show(title, _for_people(scores, len(weights)), False)


def _members(text: str, count: int) -> list[int]:
    """ "1,3" -> places 0 and 2, of `count` checkpoints."""
    try:
        places = [int(part) - 1 for part in text.split(",")]
    except ValueError:
        places = []
    if len(set(places)) < max(2, len(places)) or not all(0 <= place < count for place in places):
        raise ParamsError(
            "--ensemble",
            got=repr(text),
            expected=f"two numbers or more from 1 to {count}, each once",
            cure="number the checkpoints as on the command line: --ensemble 1,2",
        )
    return places


def _metric_rows(scores: "Scores") -> list[dict[str, Any]]:
    """Every metric of every row, and the interval of its accuracy."""
    from modelstock.comparison.intervals import wilson
    from modelstock.comparison.metrics import metrics

    rows = []
    for number, row in enumerate(scores.rows):
        interval = wilson(scores.correct[number])
        facts: dict[str, Any] = {"weights": row.name, "benchmark": scores.benchmark}
        facts[f"{scores.modality}s"] = len(scores.truth)
        rows.append({**facts, **metrics(scores, number), "low": interval.low, "high": interval.high})
    return rows


def _class_rows(scores: "Scores") -> list[dict[str, Any]]:
    """The accuracy of every row on every class; none where a class has no examples."""
    import numpy as np

    from modelstock.comparison.compare import per_class

    examples = np.bincount(scores.truth, minlength=len(scores.labels))
    return [
        {
            "weights": row.name,
            "benchmark": scores.benchmark,
            "class": name,
            f"{scores.modality}s": int(count),
            "top1": None if np.isnan(share) else float(share),
        }
        for row, accuracies in zip(scores.rows, per_class(scores), strict=True)
        for name, count, share in zip(scores.labels, examples, accuracies, strict=True)
    ]


def _for_people(scores: "Scores", checkpoints: int) -> list[dict[str, Any]]:
    """The metrics as tables show them; checkpoints with the numbers that --ensemble takes."""
    from modelstock.comparison.metrics import METRICS

    shown = [metric for metric in METRICS.values() if len(scores.labels) > metric.labels]
    rows = []
    for number, row in enumerate(_metric_rows(scores), 1):
        cells = {metric.name: metric.text(row[metric.name]) for metric in shown}
        cells["top1"] += f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        name = f"{number}  {row['weights']}" if number <= checkpoints else row["weights"]
        headings = {metric.title + " %" * (metric.unit == "percent"): cells[metric.name] for metric in shown}
        rows.append({"weights": name, **headings})
    return rows
