"""Merges of checkpoints on disk, a chunk at a time: neither a model nor a large tensor is ever whole in memory."""

import fnmatch
import json
import os
import shutil
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from modelstock import __version__
from modelstock.checkpoints import STORED, open_checkpoint
from modelstock.errors import MergeError, WeightsError
from modelstock.files import atomic_path
from modelstock.merging import Granularity, Plan, plan_merge


def chooser(include: Sequence[str], exclude: Sequence[str], known: Sequence[str]) -> set[str]:
    """The tensors that match a glob of `include` (all, where it is empty) and none of `exclude`.

    Raises:
        MergeError: a glob that matches nothing.
    """
    for glob in [*include, *exclude]:
        if not fnmatch.filter(known, glob):
            raise MergeError("tensors", got=f"the glob {glob!r}", expected="one that matches a tensor",
                             cure="see the names with: modelstock inspect FILE")  # fmt: skip
    wanted = {name for glob in include or ["*"] for name in fnmatch.filter(known, glob)}
    return wanted - {name for glob in exclude for name in fnmatch.filter(known, glob)}


def merge_files(
    method: str,
    anchor: Path,
    tuned: Sequence[Path],
    out: Path,
    *,
    granularity: Granularity = "tensor",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    **knobs: Any,
) -> Plan:
    """Merge checkpoints into one safetensors file; every refusal comes before a byte of it is written.

    The file has the anchor's metadata, and how it was made; it appears whole or not at all. Memory: a few
    MB a worker (for methods that look at single values: the largest tensor, in float64, a few times).

    Raises:
        MergeError, WeightsError: as `plan_merge`; an output that exists or is an input; a disk that is too full.
    """
    inputs = [Path(anchor), *map(Path, tuned)]
    out = Path(out)
    for path in inputs:
        if not path.exists():
            raise WeightsError(path, got="no such file", expected="a checkpoint", cure="check the path")
        if out.exists() and os.path.samefile(out, path):
            raise MergeError(out, got="an input as output", expected="another file", cure="name another output")
    for i, path in enumerate(inputs):
        for other in inputs[:i]:
            if os.path.samefile(path, other):
                raise MergeError(
                    path, got=f"the same file as {other}", expected="different weights",
                    cure="name each weight set once, and the anchor only as anchor",
                )  # fmt: skip
    if out.exists() and not overwrite:
        raise MergeError(out, got="a file that exists", expected="a new one", cure="use --overwrite or another name")
    if out.suffix != ".safetensors":
        raise MergeError(out, got=f"the suffix {out.suffix!r}", expected=".safetensors", cure="rename the output")
    origin, others = open_checkpoint(inputs[0]), [open_checkpoint(p) for p in inputs[1:]]
    wanted = chooser(include, exclude, list(origin.tensors)) if include or exclude else set(origin.tensors)
    plan = plan_merge(
        method, origin, others, granularity=granularity, choose=wanted.__contains__, dtype=dtype,
        workers=workers or os.cpu_count() or 1, **knobs,
    )  # fmt: skip
    write_plan(plan, out)
    return plan


def header_of(plan: Plan) -> tuple[bytes, dict[str, int]]:
    """The safetensors header of a merge, and the byte in the file at which each tensor begins."""
    made = {"stage": "merge", "method": plan.method, "knobs": dict(plan.knobs), "version": __version__}
    meta = {**plan.anchor.meta, "made_by": {**made, "files": [Path(w.source).name for w in plan.tuned]}}
    meta["parents"] = []  # identities are hashes of whole checkpoints, which a merge of files does not compute
    header: dict[str, Any] = {"__metadata__": {"modelstock": json.dumps(meta, sort_keys=True)}}
    place, begins = 0, {}
    # As safetensors itself orders them: larger dtypes first, so that every tensor is aligned, then by name.
    for name in sorted(plan.anchor.tensors, key=lambda n: (-STORED[plan.dtype_of(n)].itemsize, n)):
        tensor, dtype = plan.anchor.tensors[name], plan.dtype_of(name)
        size = tensor.size * STORED[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        begins[name] = place
        place += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = struct.pack("<Q", len(raw)) + raw
    return start, {name: len(start) + at for name, at in begins.items()} | {"": len(start) + place}


def write_plan(plan: Plan, out: Path) -> None:
    """Carry out a merge into a file: the second of the two passes, tensors side by side."""
    start, begins = header_of(plan)
    total = begins.pop("")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise MergeError(out, got=f"{free:,} free bytes", expected=f"{total:,}", cure="make room or name another disk")
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        file.write(start)
        file.flush()
        file.truncate(total)
        descriptor = file.fileno()

        def second_pass(name: str) -> None:
            size = STORED[plan.dtype_of(name)].itemsize
            for at, piece in plan.pieces(name):
                raw, place = np.ascontiguousarray(piece).view(np.uint8).data, begins[name] + at * size
                while raw:
                    written = os.pwrite(descriptor, raw, place)
                    raw, place = raw[written:], place + written

        with ThreadPoolExecutor(plan.workers) as pool:
            # Large tensors first, so that no worker is left with one at the end.
            for _ in pool.map(second_pass, sorted(begins, key=lambda n: -plan.anchor.tensors[n].size)):
                pass
