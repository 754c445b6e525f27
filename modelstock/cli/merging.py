"""`modelstock merge`, `methods` and `statistics`."""

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstock.cli.options import AsJson, OutFile, Overwrite, check_choice, method_options
from modelstock.cli.output import progress_of, show
from modelstock.errors import MergeError

if TYPE_CHECKING:
    from modelstock.scoring.batch_norm import Recalibration
    from modelstock.weights.weight_set import WeightSet

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def merge(
    weights: Annotated[list[Path], typer.Argument(help="Fine-tuned checkpoints.")],
    anchor: Annotated[Path, typer.Option(help="The pre-trained checkpoint w0.")],
    out: OutFile,
    method: Annotated[str, typer.Option(help="See `modelstock methods`.")] = "model_stock",
    granularity: Annotated[str, typer.Option(help="One ratio per tensor, filter or model.")] = "tensor",
    include: Annotated[list[str] | None, typer.Option(help="Glob of tensors to merge.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of tensors to keep from the anchor.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float64, float32, float16 or bfloat16.")] = None,
    statistics: Annotated[
        list[Path] | None,
        typer.Option(help="A file of `modelstock statistics` per checkpoint, for methods that weigh by them."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Held-out shards that merges are scored on, for methods that search.")
    ] = None,
    recalibrate: Annotated[
        Path | None,
        typer.Option(
            "--recalibrate",
            "--batch-norm",
            help="Training shards on which BatchNorm's running statistics are estimated again.",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=2, help="Images of --recalibrate, drawn at random.")] = 1000,
    report: Annotated[Path | None, typer.Option(help="Write each tensor's cosine, ratio, norms and flags.")] = None,
    overwrite: Overwrite = False,
    identify: Annotated[bool, typer.Option("--identify", help="Record the inputs' sha256 in the output.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="option=value, an option of the method.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints into one safetensors file."""
    from modelstock.merging.files import merge_files
    from modelstock.merging.methods.table import find_method

    if dtype is not None:
        check_choice("--dtype", dtype, list(DTYPES))
    options = method_options(settings or [])
    find_method(method, options)  # before an option could be taken for something else
    recalibration = None if recalibrate is None else _recalibration(anchor, recalibrate, examples)
    with progress_of("merging") as progress:
        plan = merge_files(
            method,
            anchor,
            weights,
            out,
            granularity=granularity,  # type: ignore[arg-type]
            include=include or [],
            exclude=exclude or [],
            dtype=DTYPES[dtype] if dtype else None,
            report=report,
            statistics=statistics or [],
            overwrite=overwrite,
            identify=identify,
            progress=progress,
            options=options,
            recalibrate=None if recalibration is None else partial(_recalibrate, recalibration),
            **_search_inputs(method, anchor, held_out, recalibration),
        )
    summary = {"out": str(out), "method": method, "checkpoints": len(weights), "tensors": len(plan.report)}
    summary["dtype"] = ", ".join(
        name for name, stored in DTYPES.items() if stored in set(map(plan.dtype_of, plan.report))
    )
    if recalibration is not None:
        summary["BatchNorm"] = f"estimated on {recalibration.count} images"
    show("merged", [{**summary, **_flag_counts(plan.report)}], as_json)


def _recalibration(anchor: Path, shards: Path, examples: int) -> "Recalibration":
    """What estimates the running statistics of merges again; needs torch.

    Raises:
        MergeError: an anchor without BatchNorm, or without an architecture to run.
        WeightsError: shards of texts, or of other classes.
    """
    from modelstock.data.dataset import open_dataset
    from modelstock.scoring.batch_norm import Recalibration, has_running_statistics
    from modelstock.weights.weight_set import load_weights

    weights = load_weights(anchor, lazy=True)
    missing = [] if has_running_statistics(weights) else ["running statistics of BatchNorm"]
    missing += [] if "architecture" in weights.meta else ["an architecture"]
    if missing:
        raise MergeError(
            "--recalibrate",
            got=f"{anchor}, without {' and '.join(missing)}",
            expected="a weight set of ours with BatchNorm",
            cure="leave it out",
        )
    train = open_dataset(shards)
    train.check_modality(weights)
    train.check_classes(weights)
    return Recalibration(train, examples=examples)


def _recalibrate(recalibration: "Recalibration", file: Path) -> None:
    """Estimate the running statistics of the merge in a file again."""
    from modelstock.weights.weight_set import load_weights

    recalibration(load_weights(file)).save(file)


def _flag_counts(report: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many tensors (or filters) have each flag, in the order of the flags' names."""
    counts: Counter[str] = Counter()
    for facts in report.values():
        counts.update({facts["flag"]: 1} if facts.get("flag") else facts.get("flags", {}))
    return dict(sorted(counts.items()))


def _search_inputs(
    method: str, anchor: Path, shards: Path | None, recalibration: "Recalibration | None"
) -> dict[str, Any]:
    """The score or the gradient that a searching method asks for, on held-out shards; needs torch.

    `recalibration`: of the merges that are tried.
    """
    from modelstock.merging.methods.table import METHODS

    needs = METHODS[method].needs
    if shards is None:
        return {}
    if needs not in ("score", "gradient"):
        raise MergeError(f"method {method}", got="--held-out", expected="a method that searches", cure="leave it out")
    from modelstock.data.dataset import open_dataset
    from modelstock.scoring.data_statistics import loss_gradient, sample
    from modelstock.scoring.one_pass import accuracies
    from modelstock.weights.weight_set import load_weights

    held_out = open_dataset(shards)
    tried: Callable[[WeightSet], WeightSet] = recalibration or (lambda weights: weights)
    if needs == "score":
        return {"score": lambda weights: accuracies(held_out, list(map(tried, weights)))}

    @cache
    def loss() -> Any:
        return loss_gradient(*sample(held_out, load_weights(anchor, lazy=True), examples=10**6))

    return {"gradient": lambda weights: loss()(tried(weights))}


def statistics(
    what: Annotated[str, typer.Argument(help="fisher or inner: what a method needs, see `modelstock methods`.")],
    weights: Annotated[Path, typer.Argument(help="A weight set made by modelstock.")],
    data: Annotated[Path, typer.Option(help="Shards of the training set.")],
    out: OutFile,
    examples: Annotated[int, typer.Option(min=1, help="How many examples, drawn at random.")] = 1000,
    overwrite: Overwrite = False,
) -> None:
    """Measure what some methods weigh by, statistics of the training data, for one weight set."""
    check_choice("statistics", what, ("fisher", "inner"))
    from modelstock.merging.files import check_paths

    check_paths([weights], [out], overwrite)
    from modelstock.data.dataset import open_dataset
    from modelstock.scoring import data_statistics
    from modelstock.weights.weight_set import load_weights

    loaded, dataset = load_weights(weights), open_dataset(data)
    drawn, _ = data_statistics.sample(dataset, loaded, examples=examples)
    measured = (data_statistics.fisher if what == "fisher" else data_statistics.inner)(loaded, drawn)
    measured.save(out)
    print(f"{out}: {what} of {len(measured.tensors)} tensors on {len(drawn)} {dataset.modality}s")


def methods(as_json: AsJson = False) -> None:
    """Every merge method: formula, options and source."""
    from modelstock.merging.methods.table import METHODS

    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        options = ", ".join(f"{option}={json.dumps(default)}" for option, default in method.defaults.items())
        row = {"method": name, "formula": method.formula, "options": options, "source": method.source}
        rows.append({**row, "needs": method.needs} if method.needs not in ("", "depth") else row)
    if as_json:
        show("methods", rows, True)
        return
    for row in rows:
        print(row.pop("method"))
        for key, value in row.items():
            print(textwrap.fill(f"{key}: {value}", 100, initial_indent="    ", subsequent_indent="        "))
