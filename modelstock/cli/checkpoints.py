"""`modelstock inspect` and `diff`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstock.cli.options import AsJson
from modelstock.cli.output import show
from modelstock.notices import repeat, so_far

if TYPE_CHECKING:
    from modelstock.weights.tensors import StoredTensor


def inspect(file: Path, as_json: AsJson = False) -> None:
    """What a checkpoint holds: tensors, norms, whether they are finite and as written, and what its metadata says."""
    from modelstock.weights.checkpoints import open_checkpoint
    from modelstock.weights.metadata import readable
    from modelstock.weights.origin import notices_of

    checkpoint = open_checkpoint(file)
    rows = [_facts(name, tensor) for name, tensor in sorted(checkpoint.tensors.items())]
    repeat(notices_of(checkpoint.meta))
    if as_json:
        facts = {"file": str(file), "meta": readable(checkpoint.meta), "tensors": rows, "notices": so_far()}
        print(json.dumps(facts, indent=1))
        checkpoint.check_whole()
        return
    show(str(file), rows, False)
    total = sum(tensor.size for tensor in checkpoint.tensors.values())
    print(f"{len(rows)} tensors, {total:,} values, {sum(not row['finite'] for row in rows)} tensors not finite")
    print(f"parents: {json.dumps(checkpoint.meta.get('parents', 'not recorded'))}")
    print(f"made by: {json.dumps(checkpoint.meta.get('made_by', 'not recorded'))}")
    checkpoint.check_whole()


def _facts(name: str, tensor: "StoredTensor") -> dict[str, Any]:
    """A tensor's row, read a piece at a time."""
    import numpy as np

    from modelstock.merging.kernels import chunks
    from modelstock.weights.tensors import FLOATS, widen

    square, finite = 0.0, True
    for piece in chunks(tensor.size, 1):
        stored = tensor.read(piece.start, piece.stop)
        values = widen(stored, tensor.dtype) if tensor.dtype in FLOATS else stored.astype(np.float64)
        square += float(np.einsum("k,k->", values, values))
        finite = finite and bool(np.isfinite(values).all())
    return {
        "tensor": name,
        "dtype": tensor.dtype,
        "shape": "x".join(map(str, tensor.shape)),
        "norm": float(np.sqrt(square)) if finite else None,
        "finite": finite,
    }


def diff(
    a: Path,
    b: Path,
    anchor: Annotated[Path | None, typer.Option(help="Compare the updates from this checkpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Per tensor the distance of two checkpoints and, with an anchor, their updates' norms and cosine."""
    import numpy as np

    from modelstock.merging.checks import check_fit
    from modelstock.merging.methods.blend import cosines
    from modelstock.weights.checkpoints import open_checkpoint
    from modelstock.weights.tensors import FLOATS

    first, second = open_checkpoint(a), open_checkpoint(b)
    origin = open_checkpoint(anchor) if anchor else None
    for checkpoint in filter(None, (first, second, origin)):
        checkpoint.check_whole()
    check_fit(origin or first, [first, second] if origin else [second])
    rows = []
    for name in sorted(n for n, t in first.tensors.items() if t.dtype in FLOATS):
        one, two = first.tensors[name], second.tensors[name]
        row: dict[str, Any] = {"tensor": name, "distance": float(np.sqrt(_inner_products(two, one).sum()))}
        if origin:
            gram = _inner_products(origin.tensors[name], one, two).sum(axis=0)
            norms = np.sqrt(np.diag(gram))
            row |= {"|a - w0|": float(norms[0]), "|b - w0|": float(norms[1])}
            row["cosine"] = float(cosines(gram)[0, 1]) if norms.all() else None
        rows.append(row)
    show(f"{a} against {b}", rows, as_json)


def _inner_products(origin: "StoredTensor", *others: "StoredTensor") -> Any:
    """Inner products of the updates from `origin`, per piece of the tensor."""
    from modelstock.merging.kernels import chunks, inner_products

    return inner_products(origin, others, list(chunks(origin.size, 1)) if origin.size else [])
