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
    from modelstock.comparison.compare import compare as compared
    from modelstock.comparison.report import published_figures, summary_lines, write_report
    from modelstock.data.shards import check_classes, load_manifest
    from modelstock.devices import device_kind
    from modelstock.experiment.choices import merge_subsets
    from modelstock.experiment.subsets import ensembles, row_of
    from modelstock.merging.methods.table import METHODS
    from modelstock.models.adopt import adopt
    from modelstock.scoring.one_pass import collect, ensemble_identity, score
    from modelstock.scoring.results import Row, save_scores
    from modelstock.weights.weight_set import WeightSet, load_weights

    sections = _sections(params, method or [])
    needy = [name for name in sections if METHODS[name].reads_statistics]
    manifests = {folder: load_manifest(folder) for folder in [*benchmark, *([train] if train else [])]}
    held_out = [folder for folder in benchmark if manifests[folder].role == "held-out"]
    roles = [manifests[folder].role for folder in benchmark]
    if len(weights) < 2 or len(held_out) != 1 or roles.count("in-distribution") != 1 or (needy and train is None):
        raise MergeError(
            "compare",
            got=f"{len(weights)} checkpoints, benchmarks {', '.join(roles)}, {'no ' * (not train)}--train",
            expected="two checkpoints or more, one benchmark held-out, one in-distribution, shifts if there are any"
            + (f", and --train for {', '.join(needy)}" if needy else ""),
            cure="name what is missing",
        )
    origin = load_weights(anchor)
    for folder, manifest in manifests.items():
        check_classes(origin, manifest, folder)
    seeds: dict[int, WeightSet] = {}
    for number, path in enumerate(weights):
        found = adopt(path, origin)
        made = {**found.meta["made_by"], "stage": "finetune", "seed": number, "source": path.name}
        seeds[number] = WeightSet(found.tensors, {**found.meta, "made_by": made}, str(path))
        print(f"seed-{number}: {path}")
    scoring = {
        "cache": out / "scratch",
        "device": device_kind(device),
        "precision": precision,
        "batch_size": batch_size,
        "workers": workers,
    }
    files = []
    for name, section in sections.items():
        for stem, merged, _ in merge_subsets(
            name, section, origin, seeds, held_out=held_out[0], train=train or held_out[0], scoring=scoring
        ):
            files.append(out / "merged" / name / f"{stem}.safetensors")
            merged.save(files[-1])
        print(f"{name}: merged")
    everything = [origin, *seeds.values(), *(load_weights(file, lazy=True) for file in files)]
    rows = [row_of(one) for one in everything]
    groups = {members: [seeds[m].identity for m in members] for members in ensembles(list(seeds))}
    for members, identities in groups.items():
        title = f"ensemble/{'-'.join(map(str, members))}"
        rows.append(Row(title, ensemble_identity(identities), "ensemble", members, {}))
    results = []
    for folder in benchmark:
        outcomes = score(folder, everything, list(groups.values()), **scoring)  # type: ignore[arg-type]
        results.append(collect(folder, rows, outcomes))
        save_scores(out / "results" / f"{results[-1].benchmark}.safetensors", results[-1])
    comparison = compared(results, draws=draws)
    published = published_figures(comparison, origin.meta.get("backbone"))
    write_report(comparison, out / "report", facts={"champion": comparison.champion, "published": published})
    print(summary_lines(comparison))
    best = next(row for row in rows if row.name == comparison.champion)
    places = {one.identity: one.source for one in everything}
    print(f"report: {out / 'report/comparison.html'}")
    print(f"champion by the held-out cut: {best.name}, {places[best.identity]}")
