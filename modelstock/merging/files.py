"""Merges of checkpoints on disk, a chunk at a time: neither a model nor a large tensor is ever whole in memory."""

import fnmatch
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from modelstock.errors import MergeError, RoomError, WeightsError
from modelstock.files import atomic_path, write_json
from modelstock.merging.checks import Granularity, check_measured, check_options, check_parents
from modelstock.merging.engine import plan_merge
from modelstock.merging.kernels import Chunk
from modelstock.merging.plan import Plan, result_dtype
from modelstock.merging.searches import Gradient, Scorer
from modelstock.notices import collected
from modelstock.weights.checkpoints import open_checkpoint, open_safetensors
from modelstock.weights.format import CHECKSUM, Layout, lay_out
from modelstock.weights.origin import kept_notices, made_by, notices_of
from modelstock.weights.tensors import STORED, Checkpoint, checksum_of

SYNC = 1 << 26  # values after which what was written is sent to disk


def chooser(include: Sequence[str], exclude: Sequence[str], known: Iterable[str]) -> Callable[[str], bool]:
    """Whether a tensor matches a glob of `include` (all, where it is empty) and none of `exclude`.

    Raises:
        MergeError: a glob that matches none of the `known` tensors.
    """
    names = sorted(set(known))
    for glob in [*include, *exclude]:
        if not fnmatch.filter(names, glob):
            raise MergeError(
                "tensors",
                got=f"the glob {glob!r}",
                expected="one that matches a tensor",
                cure="see the names with: modelstock inspect FILE",
            )

    def chosen(name: str) -> bool:
        included = not include or any(fnmatch.fnmatch(name, glob) for glob in include)
        return included and not any(fnmatch.fnmatch(name, glob) for glob in exclude)

    return chosen


def merge_files(
    method: str,
    anchor: Path,
    tuned: Sequence[Path],
    out: Path,
    *,
    options: Mapping[str, Any] | None = None,
    granularity: Granularity = "tensor",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    statistics: Sequence[Path] = (),
    dtype: str | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    identify: bool = False,
    workers: int | None = None,
    score: Scorer | None = None,
    gradient: Gradient | None = None,
    recalibrate: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Plan:
    """Merge checkpoints into one safetensors file; every refusal comes before a byte of it is written.

    The file has the anchor's metadata, and how it was made, with the sha256 of every input where they are weight sets
    of ours or `identify` asks for it; it appears whole or not at all. Memory: a few MB per worker (for methods that
    look at single values: the largest tensor, in float64, a few times; for those that search: the model).
    `recalibrate` is called with the finished file before it appears, and may replace it: there, BatchNorm's running
    statistics are estimated again. `progress` is called with the number of values done in both passes, and their total.

    Raises:
        MergeError, WeightsError: as `plan_merge`; an output that exists or is an input.
        RoomError: a disk that is too full.
    """
    inputs, out, options = [Path(anchor), *map(Path, tuned), *map(Path, statistics)], Path(out), dict(options or {})
    check_paths(inputs, [path for path in (out, report) if path is not None], overwrite)
    check_options(method, len(tuned), options=options, granularity=granularity, dtype=dtype, statistics=len(statistics))
    workers = workers or cores()
    with collected() as notices:
        opened = [open_checkpoint(path) for path in inputs]
        origin, others, measured = opened[0], opened[1 : len(tuned) + 1], opened[len(tuned) + 1 :]
        chosen = chooser(include, exclude, [name for checkpoint in (origin, *others) for name in checkpoint.tensors])
        _check_room(out, file_size(origin, dtype))
        ours = "architecture" in origin.meta
        check_whole(opened, workers)
        check_parents(origin, others)
        check_measured(others, measured)
        advance = Advance(2 * sum(tensor.size for tensor in origin.tensors.values()), progress)
        plan = plan_merge(
            method,
            origin,
            others,
            options=options,
            granularity=granularity,
            choose=chosen,
            statistics=measured,
            score=score,
            gradient=gradient,
            workers=workers,
            dtype=dtype,
            recalibrated=recalibrate is not None,
            progress=advance,
        )
    metadata = {
        **origin.meta,
        **kept_notices(*(notices_of(checkpoint.meta) for checkpoint in (origin, *others)), notices),
        "made_by": made_by(
            stage="merge",
            method=method,
            options=options,
            granularity=granularity,
            include=list(include),
            exclude=list(exclude),
            files=[{"name": path.name, "bytes": size_of(path)} for path in inputs],
        ),
    }
    if identify or ours:
        with ThreadPoolExecutor(workers) as pool:
            parent, *rest = pool.map(lambda checkpoint: checkpoint.identity, [origin, *others])
        metadata["parents"] = [parent, *sorted(rest)]
    if recalibrate is None:
        write_plan(plan, out, metadata, checksum=ours, workers=workers, progress=advance)
    else:
        with atomic_path(out) as whole:
            write_plan(plan, whole, metadata, checksum=ours, workers=workers, progress=advance)
            recalibrate(whole)
    if report is not None:
        write_json(report, plan.report)
    return plan


def check_whole(checkpoints: Sequence[Checkpoint], workers: int) -> None:
    """Raise DamagedError for a checkpoint that does not have the checksum written with it."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(Checkpoint.check_whole, checkpoints))


class Advance:
    """Counts the values that are done, and reports them with their total."""

    def __init__(self, total: int, progress: Callable[[int, int], object]) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def __call__(self, values: int) -> None:
        """Count this many more."""
        self._done += values
        self._progress(self._done, self._total)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(p.stat().st_size for p in path.iterdir() if p.is_file()) if path.is_dir() else path.stat().st_size


def check_inputs(inputs: Sequence[Path]) -> None:
    """Refuse missing inputs, and the same one twice.

    Raises:
        WeightsError: an input that does not exist.
        MergeError: the same file twice.
    """
    for path in inputs:
        if not path.exists():
            raise WeightsError(path, got="no such file", expected="a checkpoint", cure="check the path")
    for i, path in enumerate(inputs):
        for other in inputs[:i]:
            if os.path.samefile(path, other):
                raise MergeError(
                    path,
                    got=f"the same file as {other}",
                    expected="different weights",
                    cure="name each weight set once, and the anchor only as anchor",
                )


def check_paths(inputs: Sequence[Path], outputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse missing inputs, the same one twice, and outputs that are inputs, exist, or have nowhere to go.

    The first output is the safetensors file.

    Raises:
        WeightsError: an input that does not exist.
        MergeError: everything else.
    """
    check_inputs(inputs)
    if outputs[0].suffix != ".safetensors":
        raise MergeError(
            outputs[0], got=f"the suffix {outputs[0].suffix!r}", expected=".safetensors", cure="rename the output"
        )
    if len(outputs) > 1 and outputs[0].resolve() == outputs[1].resolve():
        raise MergeError(outputs[1], got="the output as report", expected="another file", cure="rename the report")
    for out in outputs:
        if out.is_dir():
            raise MergeError(out, got="a folder", expected="a file", cure="name a file in it")
        if out.exists() and any(os.path.samefile(out, path) for path in inputs):
            raise MergeError(out, got="an input as output", expected="another file", cure="name another output")
        if out.exists() and not overwrite:
            raise MergeError(
                out, got="a file that exists", expected="a new one", cure="use --overwrite or another name"
            )
        place = standing(out)
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise MergeError(out, got=f"{place}, which is no folder to write to", expected="one", cure="name another")


def standing(path: Path) -> Path:
    """The nearest thing above a path that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(standing(out)).free
    if free < needed:
        raise RoomError(out, got=f"{free:,} free bytes", expected=f"{needed:,}", cure="make room or name another disk")


def layout(anchor: Checkpoint, dtype: str | None, meta: Mapping[str, Any], checksum: str | None = None) -> Layout:
    """The file of a merge before its values are there."""
    return lay_out({n: (result_dtype(t.dtype, dtype), t.shape) for n, t in anchor.tensors.items()}, meta, checksum)


def file_size(anchor: Checkpoint, dtype: str | None) -> int:
    """Bytes that a merge takes on disk, less a few hundred of metadata."""
    return layout(anchor, dtype, {}).size


def write_plan(
    plan: Plan,
    out: Path,
    meta: Mapping[str, Any],
    *,
    checksum: bool = False,
    workers: int = 1,
    progress: Callable[[int], object] = lambda values: None,
) -> None:
    """Carry out a merge into a file: the second of the two passes, blocks side by side.

    `checksum`: write that of weight sets of ours too, for which the result is read once more.

    Raises:
        RoomError: a disk that fills up meanwhile; nothing is left behind then.
    """
    placeholder = "0" * 64 if checksum else None
    file_layout = layout(plan.anchor, plan.dtype, meta, placeholder)
    work = [(name, run) for name in sorted(file_layout.begins) for run in plan.runs(name)]
    # Tensors that are taken whole first and largest first, so that no worker is left with a large one at the end.
    work.sort(key=lambda task: -task[1][0].stop if plan.takes_whole(task[0]) else 0)
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        file.write(file_layout.start)
        file.flush()
        file.truncate(file_layout.size)
        descriptor = file.fileno()

        def second_pass(task: tuple[str, Sequence[Chunk]]) -> int:
            name, run = task
            size = STORED[plan.dtype_of(name)].itemsize
            for at, piece in plan.pieces(name, run):
                raw, place = np.ascontiguousarray(piece).view(np.uint8).data, file_layout.begins[name] + at * size
                while raw:
                    written = os.pwrite(descriptor, raw, place)
                    raw, place = raw[written:], place + written
            return run[-1].stop - run[0].start if run else 0

        unsynced = 0
        with ThreadPoolExecutor(workers) as pool:
            for values in pool.map(second_pass, work):
                progress(values)
                unsynced += values
                if unsynced > SYNC:  # the disk works while the rest is computed
                    os.fdatasync(descriptor)
                    unsynced = 0
        if placeholder is not None:
            digest = checksum_of(open_safetensors(temporary).identity, meta)
            before = f'"{CHECKSUM}":"'.encode()
            os.pwrite(descriptor, digest.encode(), file_layout.start.index(before) + len(before))
