"""What is measured of an anchor, its fine-tuned seeds and, if there are any, the seeds of a centre: inner products.

Everything that this package says of weights alone follows from the inner products of the updates per tensor, and from
their projections on random directions: a few numbers per tensor, whatever the model's size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modelstock.errors import MergeError, few
from modelstock.geometry.groups import Group, groups
from modelstock.geometry.one_pass import Pass
from modelstock.geometry.stack import Stack
from modelstock.merging.checks import check_different, check_fit, check_parents
from modelstock.merging.files import Advance, check_inputs, check_whole, chooser, cores, size_of
from modelstock.merging.kernels import Float
from modelstock.merging.unusual import notice_updates, sort_tensors
from modelstock.notices import notice
from modelstock.weights.checkpoints import open_checkpoint
from modelstock.weights.tensors import FLOATS, Checkpoint

DIRECTIONS = 64  # per tensor: their number costs memory, not time
SUFFIXES = (
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".json",
)  # of checkpoints, left out of what files are called
KURTOSIS_NEEDS = 4  # seeds; with fewer nothing is projected


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What was measured. With N seeds under test and C of the centre, updates are numbered in that order.

    `grams`: tensor -> inner products (N + C, N + C) of the updates; `projections`: tensor -> (N, D), D random
    directions; `shapes`, `groups`: of the same tensors. `files`: JSON facts of the anchor's file, the seeds' and the
    centre's, in this order.
    """

    seeds: tuple[str, ...]
    centre: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    grams: Mapping[str, Float]
    projections: Mapping[str, Float]
    files: tuple[Mapping[str, Any], ...]

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Type and block of each tensor."""
        return groups(self.shapes)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Tensor -> why no statistic counts it: a seed did not change it, or it has one value, and so no angle."""
        reasons = {}
        for name, gram in self.grams.items():
            zero = np.flatnonzero(np.diag(gram)[: len(self.seeds)] == 0)
            if len(zero):
                reasons[name] = "unchanged by " + few([self.seeds[i] for i in zero])
            elif math.prod(self.shapes[name]) == 1:
                reasons[name] = "one value, no angle"
        return reasons

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """The tensors that statistics count: those that every seed changed, of more than one value."""
        return tuple(name for name in self.grams if name not in self.left_out)

    def stack(self, names: Sequence[str] | None = None) -> Stack:
        """The tensors' inner products on top of each other; of all that count, where none are named."""
        names = self.counted if names is None else names
        width = len(self.seeds) + len(self.centre)
        grams = np.array([self.grams[name] for name in names]).reshape(len(names), width, width)
        return Stack(
            grams, len(self.seeds), tuple(self.projections[name] for name in names if name in self.projections)
        )

    def units(self, kind: str) -> dict[str, list[str]]:
        """Unit -> the tensors that count in it: by "type" or by "block", in the order of the model."""
        units: dict[str, list[str]] = {}
        order = sorted(self.counted, key=lambda name: (self.groups[name].number, self.groups[name].block))
        for name in order:
            group = self.groups[name]
            units.setdefault(group.kind if kind == "type" else group.block, []).append(name)
        return units


def measure(
    anchor: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    centre: Sequence[Checkpoint] = (),
    choose: Callable[[str], bool] = lambda name: True,
    directions: int = DIRECTIONS,
    labels: Sequence[str] = (),
    workers: int = 1,
    progress: Callable[[int], object] = lambda values: None,
) -> Geometry:
    """Read every update once: two or more fine-tuned checkpoints, of files or `in_memory`.

    `centre`: other seeds of the same anchor, whose mean stands for the centre; without them each seed's centre is the
    mean of the others. `directions`: random ones per tensor that updates are projected on; 0: none. `labels`: how the
    tuned and then the centre's are called; else by their source. `progress`: called with the number of values read.

    Raises:
        MergeError: as merges: checkpoints that do not fit the anchor, or two that are equal; fewer than two.
        WeightsError: NaN or infinity, with file and tensor.
    """
    if len(tuned) < 2:
        raise MergeError("geometry", got=f"{len(tuned)} checkpoints", expected="2 or more", cure="name another seed")
    everyone = [*tuned, *centre]
    check_parents(anchor, everyone)
    check_fit(anchor, everyone, choose)
    tensors = sort_tensors(anchor, everyone, choose)
    if tensors.running:
        notice("BatchNorm", f"{len(tensors.running)} running statistics are left out: no gradient has trained them")
    names = [name for name in tensors.floating if name not in tensors.running]
    names = [name for name in names if anchor.tensors[name].size]
    if not names:
        raise MergeError("geometry", got="no tensor chosen", expected="one or more", cure="correct include and exclude")
    one_pass = Pass(
        anchor=anchor,
        tuned=everyone,
        of="updates",
        pairs=True,
        by_filter=False,
        progress=progress,
        seeds=len(tuned),
        directions=directions if len(tuned) >= KURTOSIS_NEEDS else 0,
    )
    grams = one_pass.inner_products(names, workers)
    squares = np.array([[gram[0, i, i] for gram in grams.values()] for i in range(len(everyone))])
    check_different(anchor, everyone, grams, squares=squares, of="updates")
    notice_updates(anchor, everyone, grams)
    known = list(labels) or [checkpoint.source for checkpoint in everyone]
    if len(set(known)) < len(known):
        known = [str(number) for number in range(len(known))]
    geometry = Geometry(
        seeds=tuple(known[: len(tuned)]),
        centre=tuple(known[len(tuned) :]),
        shapes={name: anchor.tensors[name].shape for name in grams},
        grams={name: gram[0] for name, gram in grams.items()},
        projections={name: part for name, part in one_pass.projections().items() if name in grams},
        files=tuple(_facts(checkpoint) for checkpoint in (anchor, *everyone)),
    )
    if not geometry.counted:
        raise MergeError(
            "geometry",
            got="no tensor of more than one value that every seed changed",
            expected="one or more",
            cure="check the anchor, or correct include and exclude",
        )
    if geometry.left_out:
        name, reason = next(iter(geometry.left_out.items()))
        notice("geometry", f"{len(geometry.left_out)} of {len(grams)} tensors do not count, such as {name}: {reason}")
    return geometry


def measure_files(
    anchor: Path,
    tuned: Sequence[Path],
    *,
    centre: Sequence[Path] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    directions: int = DIRECTIONS,
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Geometry:
    """`measure` of files, which are opened and checked as for a merge; `progress` gets the values done and their total.

    Raises:
        MergeError, WeightsError: as `measure`; a missing file, the same one twice.
        DamagedError: a file of ours that is not what was written.
    """
    paths, workers = [Path(path) for path in (anchor, *tuned, *centre)], workers or cores()
    check_inputs(paths)
    opened = [open_checkpoint(path) for path in paths]
    chosen = chooser(include, exclude, [name for checkpoint in opened for name in checkpoint.tensors])
    check_whole(opened, workers)
    values = opened[0].tensors
    return measure(
        opened[0],
        opened[1 : len(tuned) + 1],
        centre=opened[len(tuned) + 1 :],
        choose=chosen,
        directions=directions,
        labels=labels_of(paths[1:]),
        workers=workers,
        progress=Advance(sum(t.size for name, t in values.items() if t.dtype in FLOATS and chosen(name)), progress),
    )


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What says which weights these were: the file, and the identity where the file carries a checksum."""
    path = Path(checkpoint.source)
    facts: dict[str, Any] = {"source": path.name}
    if path.exists():
        facts["bytes"] = size_of(path)
    if checkpoint.checksum is not None or checkpoint.meta.get("architecture") is not None:
        facts["identity"] = checkpoint.identity
    return facts


def labels_of(paths: Sequence[Path]) -> list[str]:
    """What tells the files apart: their paths without the folders and the last parts that all share."""
    parts = [[*path.parts[:-1], path.stem if path.suffix in SUFFIXES else path.name] for path in paths]
    while all(len(one) > 1 for one in parts) and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while all(len(one) > 1 for one in parts) and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    return ["/".join(one) for one in parts]
