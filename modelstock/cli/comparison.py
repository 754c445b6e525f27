"""`modelstock compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstock.cli.options import BatchSize, Device, Precision, Workers, check_choice
from modelstock.errors import MergeError


def _sections(params: Path | None, methods: Sequence[str]) -> dict[str, Any]:
    """Method -> its section: of a params file, or the four methods that need no search of their own."""
    from modelstock.merging.methods.table import METHODS
    from modelstock.params import load_merge, standard_section

    known: dict[str, Any] = {
        name: standard_section(row) for name, row in METHODS.items() if row.standard or name in methods
    }
    if params is not None:
        section = load_merge(params)
        known = {name: section.section(name) for name in section.methods}
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise MergeError(
            "--method",
            got=", ".join(unknown),
            expected=", ".join(known),
            cure="name some of these, or with --params a file whose merge.methods has it",
        )
    return {method: known[method] for method in methods or known}


def compare(
    weights: Annotated[list[Path], typer.Argument(help="Fine-tuned checkpoints, two or more.")],
    anchor: Annotated[Path, typer.Option(help="The weight set they started from; see `modelstock anchor`.")],
    benchmark: Annotated[list[Path], typer.Option(help="Folders of shards: held-out, a test set, shifts.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for merges, results and report.")],
    method: Annotated[list[str] | None, typer.Option(help="Merge methods; all that are known without it.")] = None,
    params: Annotated[Path | None, typer.Option(help="A params file whose section merge is used.")] = None,
    train: Annotated[Path | None, typer.Option(help="Training shards, for fisher and regmean.")] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    draws: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 2000,
) -> None:
    """Merge, score and compare fine-tuned checkpoints that are there already; run again, it goes on where it was."""
    check_choice("--precision", precision, ("float32", "bfloat16"))
    from modelstock.comparison.report import summary_lines
    from modelstock.data.dataset import open_dataset
    from modelstock.devices import device_kind
    from modelstock.experiment.compare import compare_results
    from modelstock.experiment.evaluate import Candidates, score_benchmark
    from modelstock.experiment.merge import SubsetMerges, merge_method
    from modelstock.experiment.paths import results_file
    from modelstock.merging.methods.table import METHODS
    from modelstock.models.adopt import adopt
    from modelstock.scoring.one_pass import ScoringOptions
    from modelstock.scoring.results import save_scores
    from modelstock.weights.weight_set import WeightSet, load_weights

    sections = _sections(params, method or [])
    needy = [name for name in sections if METHODS[name].reads_statistics]
    datasets = {folder: open_dataset(folder) for folder in [*benchmark, *([train] if train else [])]}
    held_out = [folder for folder in benchmark if datasets[folder].manifest.role == "held-out"]
    roles = [datasets[folder].manifest.role for folder in benchmark]
    if len(weights) < 2 or len(held_out) != 1 or roles.count("in-distribution") != 1 or (needy and train is None):
        raise MergeError(
            "compare",
            got=f"{len(weights)} checkpoints, benchmarks {', '.join(roles)}, {'no ' * (not train)}--train",
            expected="two checkpoints or more, one benchmark held-out, one in-distribution, shifts if there are any"
            + (f", and --train for {', '.join(needy)}" if needy else ""),
            cure="name what is missing",
        )
    origin = load_weights(anchor)
    for dataset in datasets.values():
        dataset.check_classes(origin)
    seeds: dict[int, WeightSet] = {}
    for number, path in enumerate(weights):
        found = adopt(path, origin)
        made = {**found.meta["made_by"], "stage": "finetune", "seed": number, "source": path.name}
        seeds[number] = WeightSet(found.tensors, {**found.meta, "made_by": made}, str(path))
        print(f"seed-{number}: {path}")
    scoring = ScoringOptions(
        cache=out / "scratch",
        device=device_kind(device),
        precision=precision,  # type: ignore[arg-type]
        batch_size=batch_size,
        workers=workers,
    )
    files: list[Path] = []
    for name, section in sections.items():
        merges = SubsetMerges(
            method=name,
            section=section,
            anchor=origin,
            seeds=seeds,
            held_out=datasets[held_out[0]],
            train=datasets[train] if train else None,
            scoring=scoring,
        )
        files += merge_method(merges, out / "merged" / name)
        print(f"{name}: merged")
    candidates = Candidates(anchor=origin, seeds=seeds, others=[load_weights(file, lazy=True) for file in files])
    results = [score_benchmark(datasets[folder], candidates, scoring) for folder in benchmark]
    for scores in results:
        save_scores(results_file(out / "results", scores.benchmark), scores)
    comparison = compare_results(results, out / "report", anchor=origin, seeds=list(seeds.values()), draws=draws)
    print(summary_lines(comparison))
    champion = next(row for row in results[0].rows if row.name == comparison.champion)
    sources = {weights.identity: weights.source for weights in candidates.weights}
    print(f"report: {out / 'report/comparison.html'}")
    print(f"champion by the held-out split: {champion.name}, {sources[champion.identity]}")
