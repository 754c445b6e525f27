"""`modelstock compare`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelstock.cli.options import PRECISIONS, BatchSize, Device, Precision, Workers, check_choice, check_once
from modelstock.errors import MergeError, ParamsError

if TYPE_CHECKING:
    from modelstock.data.dataset import Dataset
    from modelstock.params import ChampionParams, MethodParams
    from modelstock.weights.weight_set import WeightSet


def compare(
    weights: Annotated[list[Path], typer.Argument(help="Fine-tuned checkpoints, two or more.")],
    anchor: Annotated[Path, typer.Option(help="The weight set they started from; see `modelstock anchor`.")],
    benchmark: Annotated[list[Path], typer.Option(help="A folder of shards: held-out, a test set, shifts.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for merges, results and report.")],
    method: Annotated[
        list[str] | None, typer.Option(help="A merge method; without it, those of --params or the standard ones.")
    ] = None,
    params: Annotated[Path | None, typer.Option(help="A params file whose section merge is used.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Training shards, for methods that weigh by statistics of the data.")
    ] = None,
    batch_norm: Annotated[
        int,
        typer.Option(min=0, help="Images of --train on which BatchNorm's statistics are estimated again; 0: averaged."),
    ] = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    resample: Annotated[str, typer.Option(help="What intervals draw of a test set: images or classes.")] = "images",
    margin: Annotated[float, typer.Option(min=0, max=50, help="Points by which a method may be lower.")] = 0.5,
    champion: Annotated[
        str, typer.Option(help="nearest to the anchor, of those within a margin of the best on held-out; or best.")
    ] = "nearest",
    champion_margin: Annotated[
        str, typer.Option(help="standard-error, of the paired difference to the best; or points, such as 0.5.")
    ] = "standard-error",
) -> None:
    """Merge, score and compare fine-tuned checkpoints that are there already; run again, it goes on where it was."""
    check_choice("--precision", precision, PRECISIONS)
    check_choice("--resample", resample, ("images", "classes"))
    check_once("WEIGHTS", weights)
    rule = _rule(champion, champion_margin)
    from modelstock.comparison.report import summary_lines
    from modelstock.data.dataset import open_benchmarks
    from modelstock.experiment.compare import compare_results
    from modelstock.experiment.evaluate import Candidates, score_benchmark
    from modelstock.experiment.merge import SubsetMerges, merge_method
    from modelstock.experiment.paths import results_file
    from modelstock.params import load_merge
    from modelstock.scoring.precision import scoring_options
    from modelstock.scoring.results import save_scores
    from modelstock.weights.weight_set import load_weights

    sections = _sections(params, method or [])
    batch_norm = batch_norm or (load_merge(params).batch_norm if params else 0)
    folders = [*benchmark, *([train] if train else [])]
    datasets = dict(zip(folders, open_benchmarks(folders), strict=True))
    benchmarks = [datasets[folder] for folder in benchmark]
    _check_enough(len(weights), benchmarks, sections, has_train=train is not None, batch_norm=batch_norm)
    origin = load_weights(anchor)
    for dataset in datasets.values():
        dataset.check_modality(origin)
        dataset.check_classes(origin)
    seeds = _numbered(weights, origin)
    settings = {"precision": precision, "batch_size": batch_size, "workers": workers}
    scoring = scoring_options(settings, origin, device=device, cache=out / "scratch", kept=out / "scratch")
    files: list[Path] = []
    for name, section in sections.items():
        merges = SubsetMerges(
            method=name,
            section=section,
            anchor=origin,
            seeds=seeds,
            held_out=next(one for one in benchmarks if one.manifest.role == "held-out"),
            train=datasets[train] if train else None,
            scoring=scoring,
            batch_norm=batch_norm,
        )
        files += merge_method(merges, out / "merged" / name)
        print(f"{name}: merged")
    candidates = Candidates(anchor=origin, seeds=seeds, others=[load_weights(file, lazy=True) for file in files])
    results = [score_benchmark(dataset, candidates, scoring) for dataset in benchmarks]
    for scores in results:
        save_scores(results_file(out / "results", scores.benchmark), scores)
    comparison = compare_results(
        results,
        out / "report",
        anchor=origin,
        seeds=list(seeds.values()),
        others=candidates.others,
        resample="classes" if resample == "classes" else "images",
        margin=margin / 100,
        champion=rule,
    )
    chosen = next(row for row in results[0].rows if row.name == comparison.champion)
    source = next(one.source for one in candidates.weights if one.identity == chosen.identity)
    print(summary_lines(comparison))
    print(f"report: {out / 'report/comparison.html'}")
    print(f"champion by the held-out split: {chosen.name}, {source}")


def _rule(champion: str, margin: str) -> "ChampionParams":
    """How the champion is chosen; the margin in points.

    Raises:
        ParamsError: another rule, or a margin out of range.
    """
    from modelstock.params import STANDARD_ERROR, ChampionParams

    check_choice("--champion", champion, ("nearest", "best"))
    try:
        share = margin if margin == STANDARD_ERROR else float(margin) / 100
        return ChampionParams.model_validate({"rule": champion, "margin": share})
    except ValueError:  # pydantic's is one too
        raise ParamsError(
            "--champion-margin",
            got=margin,
            expected=f"{STANDARD_ERROR}, or points from 0 to 10",
            cure="name one of these",
        ) from None


def _sections(params: Path | None, methods: Sequence[str]) -> dict[str, "MethodParams"]:
    """Method -> its section: of a params file, or the standard methods and those that are named."""
    from modelstock.merging.methods.table import METHODS
    from modelstock.params import load_merge, standard_section

    if params is None:
        sections = {name: standard_section(row) for name, row in METHODS.items() if row.standard or name in methods}
    else:
        merge = load_merge(params)
        sections = {name: merge.section(name) for name in merge.methods}
    unknown = [method for method in methods if method not in sections]
    if unknown:
        raise MergeError(
            "--method",
            got=", ".join(unknown),
            expected=", ".join(sections),
            cure="name some of these, or with --params a file whose merge.methods has it",
        )
    return {method: sections[method] for method in methods or sections}


def _check_enough(
    checkpoints: int, benchmarks: Sequence["Dataset"], methods: Iterable[str], *, has_train: bool, batch_norm: int
) -> None:
    """Refuse what cannot be compared: too few checkpoints, benchmarks or training data."""
    from modelstock.merging.methods.table import METHODS

    roles = [dataset.manifest.role for dataset in benchmarks]
    weighing = [name for name in methods if METHODS[name].reads_statistics] + ["--batch-norm"] * (batch_norm > 0)
    has_roles = roles.count("held-out") == 1 and roles.count("in-distribution") == 1
    if checkpoints < 2 or not has_roles or (weighing and not has_train):
        expected = "two checkpoints or more, one benchmark held-out, one in-distribution, shifts if there are any"
        raise MergeError(
            "compare",
            got=f"{checkpoints} checkpoints, benchmarks {', '.join(roles)}, {'' if has_train else 'no '}--train",
            expected=expected + (f", and --train for {', '.join(weighing)}" if weighing else ""),
            cure="name what is missing",
        )


def _numbered(paths: Sequence[Path], anchor: "WeightSet") -> dict[int, "WeightSet"]:
    """The checkpoints as seeds 0, 1, ... of an experiment, with the anchor's head where they have none."""
    from modelstock.models.adopt import adopt
    from modelstock.weights.weight_set import WeightSet

    seeds = {}
    for number, path in enumerate(paths):
        weights = adopt(path, anchor)
        made_by = {**weights.meta["made_by"], "stage": "finetune", "seed": number, "source": path.name}
        seeds[number] = WeightSet(weights.tensors, {**weights.meta, "made_by": made_by}, str(path))
        print(f"seed-{number}: {path}")
    return seeds
