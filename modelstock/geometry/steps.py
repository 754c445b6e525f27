"""Snapshots of several runs, grouped by step: the same seeds at each step of training."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelstock.errors import MergeError
from modelstock.geometry.measure import DIRECTIONS, Geometry, labels_of, measure_files
from modelstock.merging.files import check_inputs
from modelstock.weights.checkpoints import open_checkpoint
from modelstock.weights.tensors import Checkpoint

_LAST_NUMBER = re.compile(r"(\d+)(?!.*\d)")


def by_step(paths: Sequence[Path]) -> dict[int, dict[str, Path]]:
    """Step -> seed -> snapshot, both in order: of files of ours by their metadata, of others by their names.

    Step: the epoch that the metadata names, or the last number in the file's name. Seed: that of the metadata, or the
    rest of the path.

    Raises:
        MergeError: a file without a step, two files of one seed and step, a step at which not all seeds have a file.
    """
    steps: dict[int, dict[str, Path]] = {}
    for path, rest in zip(paths, _without_steps(paths), strict=True):
        step, seed = _named(open_checkpoint(path), path)
        seeds = steps.setdefault(step, {})
        key = rest if seed is None else seed
        if key in seeds:
            raise MergeError(
                path,
                got=f"step {step} of seed {key}, which {seeds[key]} is too",
                expected="a file per seed and step",
                cure="name snapshots by seed and step, such as SEED/epoch-3.safetensors",
            )
        seeds[key] = path
    everyone = {seed for seeds in steps.values() for seed in seeds}
    for step, seeds in sorted(steps.items()):
        if missing := sorted(everyone - seeds.keys()):
            raise MergeError(
                "--over steps",
                got=f"no snapshot of {', '.join(missing)} at step {step}",
                expected="the same seeds at every step",
                cure="name the missing files, or leave the step out",
            )
    return {step: dict(sorted(seeds.items())) for step, seeds in sorted(steps.items())}


def _without_steps(paths: Sequence[Path]) -> list[str]:
    """The paths without the last number of each file's name: what is left tells the seeds apart."""
    bare = [path.with_name(_LAST_NUMBER.sub("", path.stem) + path.suffix) for path in paths]
    unique = list(dict.fromkeys(bare))
    return [dict(zip(unique, labels_of(unique), strict=True))[path] for path in bare]


def _named(checkpoint: Checkpoint, path: Path) -> tuple[int, str | None]:
    """Step and seed of a snapshot; the seed None where only the path tells it."""
    made: Mapping[str, Any] = checkpoint.meta.get("made_by") or {}
    options = made.get("options") or {}
    seed = str(made["seed"]) if "seed" in made else None
    if isinstance(options.get("epoch"), int):
        return options["epoch"], seed
    match = _LAST_NUMBER.search(path.stem)
    if match is None:
        raise MergeError(
            path,
            got="a name without a number",
            expected="the step in it, such as epoch-3.safetensors",
            cure="rename it, or leave out --over",
        )
    return int(match[1]), seed


def measure_steps(
    anchor: Path,
    snapshots: Sequence[Path],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    directions: int = DIRECTIONS,
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[int, Geometry]:
    """Step -> what is measured of the seeds' snapshots at it; see `by_step` and `measure_files`.

    Raises:
        MergeError, WeightsError: as these.
    """
    check_inputs([Path(path) for path in (anchor, *snapshots)])
    steps = by_step([Path(path) for path in snapshots])
    measured = {}
    for number, (step, seeds) in enumerate(steps.items()):

        def advance(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, len(steps) * total)

        geometry = measure_files(
            anchor,
            list(seeds.values()),
            include=include,
            exclude=exclude,
            directions=directions,
            workers=workers,
            progress=advance,
        )
        measured[step] = replace(geometry, seeds=tuple(seeds))
    return measured
