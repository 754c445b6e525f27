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
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prepare data, merge fine-tuned checkpoints exactly, score them in one pass, compare and export them.",
)
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


def _options(settings: list[str]) -> dict[str, Any]:
    """`option=value` pairs; values are JSON where they can be, else text."""
    options = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise MergeError("--set", got=repr(setting), expected="option=value", cure="write it so")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


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
    from modelstock.merging.methods.table import METHODS

    needs = METHODS[method].needs if method in METHODS else ""
    if needs not in ("score", "gradient"):
        if shards is not None:
            raise MergeError(
                f"method {method}", got="--held-out", expected="a method that searches", cure="leave it out"
            )
        return {}
    if shards is None:
        return {}
    from modelstock.scoring.data_statistics import loss_gradient, sample
    from modelstock.scoring.one_pass import score
    from modelstock.weights.weight_set import WeightSet

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
    settings: Annotated[list[str] | None, typer.Option("--set", help="option=value")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints into one safetensors file."""
    from modelstock.merging.files import merge_files
    from modelstock.merging.methods.table import find_method

    if dtype is not None and dtype not in DTYPES:
        raise MergeError("--dtype", got=repr(dtype), expected=", ".join(DTYPES), cure="name one of these")
    options = _options(settings or []) | {k: v for k, v in (("pairwise", pairwise), ("clip", clip)) if v is not None}
    find_method(method, options)  # before a option could be taken for something else
    with _bar("merging") as progress:
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
            **_held_out(method, held_out),
        )
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
    from modelstock.merging.files import check_paths

    check_paths([weights], [out], overwrite)
    from modelstock.scoring import data_statistics as measured
    from modelstock.weights.weight_set import load_weights

    loaded = load_weights(weights)
    images, _ = measured.sample(data, loaded, examples=examples)
    found = (measured.fisher if what == "fisher" else measured.inner)(loaded, images)
    found.save(out)
    print(f"{out}: {what} of {len(found.tensors)} tensors on {len(images)} images")


@app.command()
def methods(as_json: AsJson = False) -> None:
    """Every merge method: formula, options and source."""
    from modelstock.merging.methods.table import METHODS

    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        options = ", ".join(f"{option}={json.dumps(default)}" for option, default in method.defaults.items())
        row = {"method": name, "formula": method.formula, "options": options, "source": method.source}
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

    from modelstock.merging.kernels import chunks
    from modelstock.weights.checkpoints import open_checkpoint
    from modelstock.weights.tensors import FLOATS, widen

    found, rows = open_checkpoint(file), []
    for name, tensor in sorted(found.tensors.items()):
        square, finite = 0.0, True
        for piece in chunks(tensor.size, 1):
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

    from modelstock.merging.checks import check_fit
    from modelstock.merging.kernels import chunks, inner_products
    from modelstock.merging.methods.blend import cosines
    from modelstock.weights.checkpoints import open_checkpoint
    from modelstock.weights.tensors import FLOATS, StoredTensor

    def products(origin: StoredTensor, *others: StoredTensor) -> Any:
        return inner_products(origin, others, list(chunks(origin.size, 1)) if origin.size else [])

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


def _members(text: str, count: int) -> list[int]:
    """ "1,3" -> places 0 and 2, of `count` checkpoints."""
    try:
        places = [int(part) - 1 for part in text.split(",")]
    except ValueError:
        places = []
    if len(set(places)) < max(2, len(places)) or not all(0 <= place < count for place in places):
        raise MergeError(
            "--ensemble",
            got=repr(text),
            expected=f"two numbers or more from 1 to {count}, each once",
            cure="number the checkpoints as they stand on the command line: --ensemble 1,2",
        )
    return places


@app.command()
def evaluate(
    weights: Annotated[list[Path], typer.Argument(help="Weight sets, or any checkpoints with --anchor.")],
    benchmark: Annotated[list[Path], typer.Option(help="A folder of shards; see `modelstock prepare`.")],
    anchor: Annotated[
        Path | None, typer.Option(help="The weight set that foreign checkpoints were fine-tuned from.")
    ] = None,
    ensemble: Annotated[list[str] | None, typer.Option(help="Checkpoints whose logits are averaged: 1,2.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A folder for per-example results.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Accuracy of each class instead.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16, of the towers.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0: this one.")] = 0,
    resident: Annotated[int, typer.Option(min=0, help="Weight sets on the device at a time; 0: as many as fit.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="A folder that keeps results, and unfinished passes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score checkpoints on benchmarks, all of them in one pass over each."""
    if precision not in ("float32", "bfloat16"):
        raise MergeError("--precision", got=repr(precision), expected="float32 or bfloat16", cure="name one of these")
    groups = [_members(text, len(weights)) for text in ensemble or []]
    import numpy as np

    from modelstock.comparison.compare import metrics, wilson
    from modelstock.comparison.compare import per_class as by_class
    from modelstock.data.shards import check_classes, load_manifest
    from modelstock.models.adopt import adopt
    from modelstock.scoring.one_pass import collect, ensemble_identity, score
    from modelstock.scoring.results import Row, save_scores
    from modelstock.weights.weight_set import load_weights

    origin = load_weights(anchor) if anchor else None
    found = [adopt(path, origin) if origin else load_weights(path, lazy=True) for path in weights]
    manifests = [load_manifest(folder) for folder in benchmark]
    for folder, manifest in zip(benchmark, manifests, strict=True):
        for one in found:  # of all benchmarks, before the first is scored
            check_classes(one, manifest, folder)
    names = [str(path) for path in weights]
    rows = [Row(name, w.identity, "checkpoint", (i,), {}) for i, (name, w) in enumerate(zip(names, found, strict=True))]
    identities = [[found[place].identity for place in members] for members in groups]
    for members, group in zip(groups, identities, strict=True):
        title = "ensemble of " + ", ".join(str(place + 1) for place in members)
        rows.append(Row(title, ensemble_identity(group), "ensemble", tuple(members), {}))
    table: list[dict[str, Any]] = []
    for folder in benchmark:
        outcomes = score(
            folder,
            found,
            identities,
            cache=cache,
            batch_size=batch_size,
            device=device,
            precision=precision,  # type: ignore[arg-type]
            workers=workers,
            resident=resident or "auto",
        )
        scores = collect(folder, rows, outcomes)
        if out is not None:
            save_scores(out / f"{scores.benchmark}.safetensors", scores)
        accuracies = by_class(scores) if per_class else None
        for number, row in enumerate(rows):
            common = {"weights": row.name, "benchmark": scores.benchmark}
            if accuracies is not None:
                table += [
                    {
                        **common,
                        "class": name,
                        "images": int((scores.truth == label).sum()),
                        "top1": None if np.isnan(share) else float(share),
                    }
                    for label, (name, share) in enumerate(zip(scores.labels, accuracies[number], strict=True))
                ]
                continue
            share = wilson(scores.correct[number])
            interval = {"low": share.low, "high": share.high}
            table.append({**common, "images": len(scores.truth), **metrics(scores, number), **interval})
    if as_json or per_class:
        _show("accuracy by class", table, as_json)
        return
    for number in range(len(benchmark)):
        own = table[number * len(rows) : (number + 1) * len(rows)]
        shown = [
            {
                "weights": f"{place}  {row['weights']}" if place <= len(found) else row["weights"],
                "top-1 %": f"{100 * row['top1']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
                "top-5 %": f"{100 * row['top5']:.1f}",
                "NLL": f"{row['nll']:.3f}",
                "ECE %": f"{100 * row['ece']:.1f}",
            }
            for place, row in enumerate(own, 1)
        ]
        _show(f"{own[0]['benchmark']}: {own[0]['images']} images; 95 % interval of top-1 by Wilson", shown, False)


def _listed(text: str, what: str) -> Any:
    """What a file of names or templates holds, one a line (or folder, tab, name) or as JSON; None for no file."""
    path = Path(text)
    if not path.is_file():
        return None
    raw = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        lines = [line.strip() for line in raw.splitlines() if line.strip()]
        if all("\t" in line for line in lines):
            return {folder.strip(): name.strip() for folder, _, name in (line.partition("\t") for line in lines)}
        return lines
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
        raise ParamsError(option, got=repr(given), expected=text, cure="see --help") from None


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="A folder, archive, webdataset shards, or folder of `datasets`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    role: Annotated[str, typer.Option(help="train, held-out, in-distribution or shift.")],
    labels: Annotated[
        str, typer.Option(help="classes, imagenet, imagenet-v2, -r, -a or -sketch, or objectnet.")
    ] = "classes",
    name: Annotated[str | None, typer.Option(help="What results call it.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="a,b,c, or a file with a folder a line (then a tab and its name), or imagenet.")
    ] = None,
    part: Annotated[str, typer.Option(help="all, or train or held-out of a training set.")] = "all",
    held_out_per_class: Annotated[int, typer.Option(min=1, help="Images of a class that are held out.")] = 26,
    short_side: Annotated[int | None, typer.Option(min=1, help="Make larger images this small.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEGs that are made smaller.")] = 95,
    shard_size: Annotated[int, typer.Option(min=1, help="Images a shard.")] = 1000,
    unreadable: Annotated[float, typer.Option(min=0, max=1, help="Share of images that may be left out.")] = 0.001,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    devkit: Annotated[str | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz, for flat validation sets.")] = None,
    mappings: Annotated[str | None, typer.Option(help="ObjectNet's folder of that name.")] = None,
    password: Annotated[str | None, typer.Option(help="Of a zip archive.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that exist.")] = False,
) -> None:
    """Make webdataset shards and a manifest of images on disk."""
    from pydantic import ValidationError

    from modelstock.data.preparation import prepare as prepare_split
    from modelstock.params import PrepareParams

    by_role = role in ("train", "held-out")
    name = name or (role if by_role else labels if labels != "classes" else Path(source).name.partition(".")[0].lower())
    if role not in ("train", "held-out", "in-distribution", "shift") or (
        name in ("train", "held-out") and name != role
    ):
        raise ParamsError(
            "--role",
            got=f"{role!r} for {name!r}",
            expected="train, held-out, in-distribution or shift",
            cure="name one of these",
        )
    if by_role and name != role:
        raise ParamsError(
            "--name", got=repr(name), expected=repr(role), cure="leave it out: such sets go by their role"
        )
    if (out / "manifest.json").exists() and not overwrite:
        raise ParamsError(
            out, got="shards that exist", expected="a new folder", cure="name another, or say --overwrite"
        )
    split = {
        "source": "files",
        "path": source,
        "labels": labels,
        "role": None if by_role else role,
        "part": part,
        "devkit": devkit,
        "mappings": mappings,
        "password": password,
    }
    try:
        if classes is None and labels == "classes":
            raise ParamsError(
                "--classes", got="none", expected="names, a file or imagenet", cure="say what the folders are"
            )
        meant = _classes(classes or "imagenet", "{}")
        params = PrepareParams(
            seed=0,
            shard_size=shard_size,
            workers=workers,
            short_side=short_side,
            quality=quality,
            held_out_per_class=held_out_per_class,
            unreadable=unreadable,
            splits={name: split},  # type: ignore[dict-item]
            reference_draws=1,
            reference_epochs=1,
        )
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ParamsError("prepare", got=text, expected="valid options", cure="see modelstock prepare --help") from None
    scratch = out.parent / f".{out.name}.unfinished"
    manifest = prepare_split(name, params, meant, out, scratch=scratch)
    if scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()
    missing = {"unreadable": len(manifest.unreadable)} if manifest.unreadable else {}
    facts = {"images": manifest.count, "labels": len(manifest.labels), **missing, **manifest.left_out}
    print(f"{out}: " + ", ".join(f"{count} {what}" for what, count in facts.items()) + f", {manifest.sha256[:12]}")


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


@app.command()
def compare(
    weights: Annotated[list[Path], typer.Argument(help="Fine-tuned checkpoints, two or more.")],
    anchor: Annotated[Path, typer.Option(help="The weight set they started from; see `modelstock anchor`.")],
    benchmark: Annotated[list[Path], typer.Option(help="Folders of shards: held-out, a test set, shifts.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for merges, results and report.")],
    method: Annotated[list[str] | None, typer.Option(help="Merge methods; all that are known without it.")] = None,
    params: Annotated[Path | None, typer.Option(help="A params file whose section merge is used.")] = None,
    train: Annotated[Path | None, typer.Option(help="Training shards, for fisher and regmean.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16, of the towers.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0: this one.")] = 0,
    draws: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 2000,
) -> None:
    """Merge, score and compare fine-tuned checkpoints that are there already; run again, it goes on where it was."""
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
    from modelstock.merging.files import check_paths

    for path in [out] if clip_out is None else [out, clip_out]:
        check_paths([], [path], overwrite)
    if clip_out is not None and clip_out.resolve() == out.resolve():
        raise ParamsError("--clip-out", got="the file of --out", expected="another", cure="name another")
    if device not in ("auto", "cpu", "cuda"):
        raise ParamsError("--device", got=repr(device), expected="auto, cpu or cuda", cure="name one of these")
    section = _classes(classes, templates)
    from modelstock.data.classes import class_names
    from modelstock.data.classes import templates as prompts_of
    from modelstock.devices import device_kind
    from modelstock.models.anchor import anchor_of
    from modelstock.models.pretrained import load_clip

    names, prompts = class_names(section), prompts_of(section)
    kind = device_kind(device)
    clip = load_clip(architecture, pretrained, seed=seed)
    made = anchor_of(clip, names, prompts, device=kind)
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
    from modelstock.models.export import export as write
    from modelstock.weights.weight_set import load_weights

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
