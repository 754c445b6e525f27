"""The command `modelstock`: merge, inspect and compare checkpoints without Prefect, DVC, MLflow or, mostly, torch."""

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstock.errors import DataError, MergeError, ModelstockError, ParamsError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Merge fine-tuned checkpoints, exactly and a chunk at a time.",
)  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON rather than a table.")]
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows with the same keys, as a table or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, key in enumerate(rows[0] if rows else ["nothing"]):
        table.add_column(key, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    Console().print(table)


def _knobs(settings: list[str]) -> dict[str, Any]:
    """`knob=value` pairs; values are JSON where they can be, else text."""
    knobs = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise MergeError("--set", got=repr(setting), expected="knob=value", cure="write it so")
        try:
            knobs[name] = json.loads(value)
        except ValueError:
            knobs[name] = value
    return knobs


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, and nothing elsewhere: call it with what is done, and of how much."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="value", unit_scale=True, mininterval=0.2, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _held_out(method: str, shards: Path | None) -> dict[str, Any]:
    """The score or the gradient that a searching method asks for, on held-out shards; needs torch."""
    from modelstock.methods import METHODS

    needs = METHODS[method].needs if method in METHODS else ""
    if needs not in ("score", "gradient"):
        if shards is not None:
            raise MergeError(
                f"method {method}", got="--held-out", expected="a method that searches", cure="leave it out"
            )
        return {}
    if shards is None:
        return {}
    from modelstock.evaluation import score
    from modelstock.statistics import loss_gradient, sample
    from modelstock.weights import WeightSet

    def accuracies(weights: Sequence[WeightSet]) -> list[float]:
        found = score(shards, weights)
        return [float(found[w.identity].correct.mean()) for w in weights]

    def gradient(weights: WeightSet) -> Any:
        if not cut:
            cut.append(loss_gradient(*sample(shards, weights, examples=10**6)))
        return cut[0](weights)

    cut: list[Any] = []
    return {"score": accuracies} if needs == "score" else {"gradient": gradient}


@app.command()
def merge(
    weights: Annotated[list[Path], typer.Argument(help="Fine-tuned checkpoints.")],
    anchor: Annotated[Path, typer.Option(help="The pre-trained checkpoint w0.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The safetensors file to write.")],
    method: Annotated[str, typer.Option(help="See `modelstock methods`.")] = "model_stock",
    granularity: Annotated[str, typer.Option(help="One ratio a tensor, filter or model.")] = "tensor",
    pairwise: Annotated[str | None, typer.Option(help="model_stock: average cosine or angle.")] = None,
    clip: Annotated[str | None, typer.Option(help="model_stock: unit or none.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Glob of tensors to merge.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of tensors to keep from the anchor.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float64, float32, float16 or bfloat16.")] = None,
    statistics: Annotated[
        list[Path] | None, typer.Option(help="fisher, regmean: a file of `modelstock statistics` a checkpoint.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="greedy and the oracles: held-out shards that merges are scored on.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write each tensor's cosine, ratio, norms and flags.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    identify: Annotated[bool, typer.Option("--identify", help="Record the inputs' sha256 in the output.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="knob=value")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints into one safetensors file."""
    from modelstock.methods import find_method
    from modelstock.streaming import merge_files

    if dtype is not None and dtype not in DTYPES:
        raise MergeError("--dtype", got=repr(dtype), expected=", ".join(DTYPES), cure="name one of these")
    knobs = _knobs(settings or []) | {k: v for k, v in (("pairwise", pairwise), ("clip", clip)) if v is not None}
    find_method(method, knobs)  # before a knob could be taken for something else
    with _bar("merging") as progress:
        plan = merge_files(
            method, anchor, weights, out, granularity=granularity,  # type: ignore[arg-type]
            include=include or [], exclude=exclude or [], dtype=DTYPES[dtype] if dtype else None, report=report,
            statistics=statistics or [], overwrite=overwrite, identify=identify, progress=progress, **knobs,
            **_held_out(method, held_out),
        )  # fmt: skip
    flags: Counter[str] = Counter()
    for facts in plan.report.values():
        flags.update({facts["flag"]: 1} if facts.get("flag") else facts.get("flags", {}))
    summary = {"out": str(out), "method": method, "checkpoints": len(weights), "tensors": len(plan.report)}
    _show("merged", [{**summary, **dict(sorted(flags.items()))}], as_json)


@app.command()
def statistics(
    what: Annotated[str, typer.Argument(help="fisher (for fisher) or inner (for regmean).")],
    weights: Annotated[Path, typer.Argument(help="A weight set made by modelstock.")],
    data: Annotated[Path, typer.Option(help="Shards of the training set.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The safetensors file to write.")],
    examples: Annotated[int, typer.Option(min=1, help="How many images, drawn at random.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Measure what fisher and regmean weigh by, for one weight set."""
    if what not in ("fisher", "inner"):
        raise MergeError("statistics", got=repr(what), expected="fisher or inner", cure="name one of these")
    from modelstock.streaming import check_paths

    check_paths([weights], [out], overwrite)
    from modelstock import statistics as measured
    from modelstock.weights import load_weights

    loaded = load_weights(weights)
    images, _ = measured.sample(data, loaded, examples=examples)
    found = (measured.fisher if what == "fisher" else measured.inner)(loaded, images)
    found.save(out)
    print(f"{out}: {what} of {len(found.tensors)} tensors on {len(images)} images")


@app.command()
def methods(as_json: AsJson = False) -> None:
    """Every merge method: formula, knobs and source."""
    from modelstock.methods import METHODS

    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        text = " ".join((method.function.__doc__ or "").split())
        formula = text.partition(" Source: ")[0].partition(" Raises: ")[0].partition(". ")[0].rstrip(".")
        knobs = ", ".join(f"{k}={json.dumps(v)}" for k, v in method.knobs.items())
        row = {"method": name, "formula": formula, "knobs": knobs, "source": text.rpartition("Source: ")[2].rstrip(".")}
        rows.append({**row, "needs": method.needs} if method.needs not in ("", "depth") else row)
    if as_json:
        _show("methods", rows, True)
        return
    for row in rows:
        print(row.pop("method"))
        for key, value in row.items():
            print(textwrap.fill(f"{key}: {value}", 100, initial_indent="    ", subsequent_indent="        "))


@app.command()
def inspect(file: Path, as_json: AsJson = False) -> None:
    """What a checkpoint holds: tensors, norms, whether they are finite, and what it says of itself."""
    import numpy as np

    from modelstock.checkpoints import FLOATS, open_checkpoint, widen
    from modelstock.merging import slices

    found, rows = open_checkpoint(file), []
    for name, tensor in sorted(found.tensors.items()):
        square, finite = 0.0, True
        for piece in slices(tensor.size, 1):
            stored = tensor.read(piece.start, piece.stop)
            values = widen(stored, tensor.dtype) if tensor.dtype in FLOATS else stored.astype(np.float64)
            square += float(np.einsum("k,k->", values, values))
            finite = finite and bool(np.isfinite(values).all())
        shape = "x".join(map(str, tensor.shape))
        norm = float(np.sqrt(square)) if finite else None
        rows.append({"tensor": name, "dtype": tensor.dtype, "shape": shape, "norm": norm, "finite": finite})
    if as_json:
        print(json.dumps({"file": str(file), "meta": found.meta, "tensors": rows}, indent=1))
        return
    _show(str(file), rows, False)
    total, bad = sum(t.size for t in found.tensors.values()), [r for r in rows if not r["finite"]]
    print(f"{len(rows)} tensors, {total:,} values, {len(bad)} tensors not finite")
    print(f"parents: {json.dumps(found.meta.get('parents', 'not recorded'))}")
    print(f"made by: {json.dumps(found.meta.get('made_by', 'not recorded'))}")


@app.command()
def diff(
    a: Path,
    b: Path,
    anchor: Annotated[Path | None, typer.Option(help="Compare the updates from this checkpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Per tensor the distance of two checkpoints and, with an anchor, their updates' norms and cosine."""
    import numpy as np

    from modelstock.checkpoints import FLOATS, Tensor, open_checkpoint
    from modelstock.merging import check_fit, inner_products, slices
    from modelstock.methods import cosines

    def products(origin: Tensor, *others: Tensor) -> Any:
        return inner_products(origin, others, list(slices(origin.size, 1)) if origin.size else [])

    first, second = open_checkpoint(a), open_checkpoint(b)
    origin = open_checkpoint(anchor) if anchor else None
    check_fit(origin or first, [first, second] if origin else [second])
    rows = []
    for name in sorted(n for n, t in first.tensors.items() if t.dtype in FLOATS):
        one, two = first.tensors[name], second.tensors[name]
        row: dict[str, Any] = {"tensor": name, "distance": float(np.sqrt(products(two, one).sum()))}
        if origin:
            gram = products(origin.tensors[name], one, two).sum(axis=0)
            norms = np.sqrt(np.diag(gram))
            row |= {"|a - w0|": float(norms[0]), "|b - w0|": float(norms[1])}
            row["cosine"] = float(cosines(gram)[0, 1]) if norms.all() else None
        rows.append(row)
    _show(f"{a} against {b}", rows, as_json)


def _listed(text: str, what: str) -> Any:
    """What a file of names or templates holds, one a line or as JSON, or None where `text` is no file."""
    path = Path(text)
    if not path.is_file():
        return None
    raw = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in raw.splitlines() if line.strip()]
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ParamsError(path, got=f"no JSON ({error})", expected=f"a list of {what}", cure="correct it") from error


def _classes(classes: str, templates: str) -> Any:
    """`--classes` and `--templates` as the params' section."""
    from pydantic import ValidationError

    from modelstock.params import ClassesParams

    names: Any = classes if classes in ("imagenet", "shapes") else _listed(classes, "class names")
    if names is None:
        names = [name.strip() for name in classes.split(",")]
    texts: Any = templates if templates in ("openai", "shapes") else _listed(templates, "templates") or [templates]
    try:
        return ClassesParams(names=names, templates=texts)
    except ValidationError as error:
        found = error.errors()[-1]
        section, text = str(found["loc"][0]), found["msg"].removeprefix("Value error, ")
        option, given = ("--classes", classes) if section == "names" else ("--templates", templates)
        raise ParamsError(option, got=repr(given), expected=text, cure="see `modelstock anchor --help`") from None


@app.command()
def anchor(
    architecture: Annotated[str, typer.Argument(help="A model of open_clip, such as ViT-B-32-quickgelu.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The safetensors file to write.")],
    pretrained: Annotated[str, typer.Option(help="A tag, a file, a folder, or random.")],
    classes: Annotated[str, typer.Option(help="imagenet, a file (one a line, or JSON), or names with commas.")],
    templates: Annotated[str, typer.Option(help="openai, a file, or one text with {} for the name.")] = "openai",
    clip_out: Annotated[Path | None, typer.Option(help="Write both towers too, as `modelstock export` needs.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights.")] = 0,
    device: Annotated[str, typer.Option(help="Where prompts are encoded: auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
) -> None:
    """Make an anchor: a CLIP's image tower with the zero-shot head of class names and templates."""
    from modelstock.streaming import check_paths

    for path in [out] if clip_out is None else [out, clip_out]:
        check_paths([], [path], overwrite)
    if clip_out is not None and clip_out.resolve() == out.resolve():
        raise ParamsError("--clip-out", got="the file of --out", expected="another", cure="name another")
    if device not in ("auto", "cpu", "cuda"):
        raise ParamsError("--device", got=repr(device), expected="auto, cpu or cuda", cure="name one of these")
    section = _classes(classes, templates)
    from modelstock.backbones import anchor_of, load_clip
    from modelstock.classes import class_names
    from modelstock.classes import templates as prompts_of
    from modelstock.distributed import processes
    from modelstock.params import OpenClipPretraining

    names, prompts = class_names(section), prompts_of(section)
    wanted = OpenClipPretraining(source="open_clip", architecture=architecture, pretrained=pretrained, seed=seed)
    with processes(1, device, "modelstock.cli") as world:
        clip = load_clip(wanted)
        made = anchor_of(clip, names, prompts, device=world.device.type)
    if clip_out is not None:
        clip.save(clip_out)
    made.save(out)
    print(f"{out}: {len(names)} classes x {len(prompts)} templates, identity {made.identity[:12]}")


@app.command()
def export(
    weights: Annotated[Path, typer.Argument(help="A weight set, such as the champion.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    clip: Annotated[Path, typer.Option(help="The CLIP with both towers that its anchor was made of.")],
    report: Annotated[Path | None, typer.Option(help="reports/comparison.json, for the model card.")] = None,
    license: Annotated[str | None, typer.Option(help="An identifier for the card, such as mit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that exists.")] = False,
) -> None:
    """Write a weight set as a folder that open_clip loads, with its head and a model card."""
    from modelstock.export import export as write
    from modelstock.weights import load_weights

    said = None
    if report is not None:
        try:
            said = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            line = " ".join(str(error).split())
            raise DataError(report, got=line, expected="reports/comparison.json", cure="check the path") from error
    write(load_weights(weights), load_weights(clip), out, report=said, licence=license, overwrite=overwrite)
    print(f'{out}: open_clip.create_model_and_transforms("local-dir:{out}")')


def main() -> None:
    """Run the command; an error a user can mend is one line on stderr and exit code 1."""
    try:
        app()
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
