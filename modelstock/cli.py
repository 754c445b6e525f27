"""The command `modelstock`: merge, inspect and compare checkpoints without Prefect, DVC, MLflow or, mostly, torch."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstock.errors import MergeError, ModelstockError

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
    report: Annotated[Path | None, typer.Option(help="Write each tensor's cosine, ratio, norms and flags.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="knob=value")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints into one safetensors file."""
    from modelstock.files import write_json
    from modelstock.streaming import merge_files

    if dtype is not None and dtype not in DTYPES:
        raise MergeError("--dtype", got=repr(dtype), expected=", ".join(DTYPES), cure="name one of these")
    knobs = _knobs(settings or []) | {k: v for k, v in (("pairwise", pairwise), ("clip", clip)) if v is not None}
    plan = merge_files(
        method, anchor, weights, out, granularity=granularity,  # type: ignore[arg-type]
        include=include or [], exclude=exclude or [], dtype=DTYPES[dtype] if dtype else None, overwrite=overwrite,
        **knobs,
    )  # fmt: skip
    if report is not None:
        write_json(report, plan.report)
    flags = [f for facts in plan.report.values() for f in ([facts["flag"]] if facts.get("flag") else [])]
    summary = {"out": str(out), "method": method, "checkpoints": len(weights), "tensors": len(plan.report)}
    _show("merged", [{**summary, **{f: flags.count(f) for f in sorted(set(flags))}}], as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """Every merge method: formula, knobs and source."""
    from modelstock.merging import METHODS

    rows = []
    for name, method in METHODS.items():
        text = " ".join((method.function.__doc__ or "").split())
        source = text.rpartition("Source: ")[2].rstrip(".") if "Source: " in text else ""
        knobs = ", ".join(f"{k}={v}" for k, v in method.knobs.items())
        formula = text.partition(" Source: ")[0].partition(" Raises: ")[0].partition(". ")[0].rstrip(".")
        rows.append({"method": name, "formula": formula, "knobs": knobs, "source": source})
    _show("methods", rows, as_json)


@app.command()
def inspect(file: Path, as_json: AsJson = False) -> None:
    """What a checkpoint holds: tensors, norms, whether they are finite, and what it says of itself."""
    import numpy as np

    from modelstock.checkpoints import FLOATS, open_checkpoint, widen

    found, rows = open_checkpoint(file), []
    for name, tensor in sorted(found.tensors.items()):
        stored = tensor.read(0, tensor.size)
        values = widen(stored, tensor.dtype) if tensor.dtype in FLOATS else stored.astype(np.float64)
        finite = bool(np.isfinite(values).all())
        norm = float(np.sqrt(values @ values)) if finite else None
        shape = "x".join(map(str, tensor.shape))
        rows.append({"tensor": name, "dtype": tensor.dtype, "shape": shape, "norm": norm, "finite": finite})
    if as_json:
        print(json.dumps({"file": str(file), "meta": found.meta, "tensors": rows}, indent=1))
        return
    _show(str(file), rows, False)
    total, bad = sum(t.size for t in found.tensors.values()), [r for r in rows if not r["finite"]]
    print(f"{len(rows)} tensors, {total:,} values, {len(bad)} tensors not finite")
    for key in ("made_by", "parents"):
        if key in found.meta:
            print(f"{key}: {json.dumps(found.meta[key])}")


@app.command()
def diff(
    a: Path,
    b: Path,
    anchor: Annotated[Path | None, typer.Option(help="Compare the updates from this checkpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Per tensor the distance of two checkpoints and, with an anchor, their updates' norms and cosine."""
    import numpy as np

    from modelstock.checkpoints import FLOATS, open_checkpoint, widen
    from modelstock.merging import check_fit

    first, second = open_checkpoint(a), open_checkpoint(b)
    origin = open_checkpoint(anchor) if anchor else None
    check_fit(origin or first, [first, second] if origin else [second])
    rows = []
    for name in sorted(n for n, t in first.tensors.items() if t.dtype in FLOATS):
        whole = [widen(c.tensors[name].read(0, c.tensors[name].size), c.tensors[name].dtype) for c in (first, second)]
        row: dict[str, Any] = {"tensor": name, "distance": float(np.linalg.norm(whole[0] - whole[1]))}
        if origin:
            base = widen(origin.tensors[name].read(0, origin.tensors[name].size), origin.tensors[name].dtype)
            one, two = whole[0] - base, whole[1] - base
            norms = float(np.linalg.norm(one)), float(np.linalg.norm(two))
            row |= {"|a - w0|": norms[0], "|b - w0|": norms[1]}
            row["cosine"] = float((one / norms[0]) @ (two / norms[1])) if all(norms) else None
        rows.append(row)
    _show(f"{a} against {b}", rows, as_json)


def main() -> None:
    """Run the command; an error a user can mend is one line on stderr and exit code 1."""
    try:
        app()
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
