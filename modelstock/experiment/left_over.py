"""What earlier settings have left in folders that stages depend on as a whole.

DVC leaves the outputs of a seed, method or benchmark that is no longer in params.yaml where they are. Nothing reads
them, but a clone, which does not have them, would run every stage again that depends on their folder.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from modelstock.damage import in_cache
from modelstock.notices import remark
from modelstock.params import Params


def remove_left_over(folder: Path, named: Iterable[object]) -> None:
    """Remove what is in `folder` beside `named`, where DVC made it and has it in its cache; say so of anything else."""
    names = {str(name) for name in named}
    for path in sorted(folder.glob("[!.]*")):
        if path.name in names:
            continue
        if in_cache(path):
            remark(path, "left over from other settings, and removed; DVC's cache has it")
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # stages that run side by side do the same
            else:
                path.unlink(missing_ok=True)
        else:
            remark(path, "not part of these settings, and not read; remove it, or clones without it run stages again")


def remove_left_over_models(models: Path, params: Params) -> None:
    """Remove what other settings have left of anchors, seeds, variants, merges, periodic and longer runs."""
    remove_left_over(models / "anchors", params.anchors)
    remove_left_over(models / "variants", params.variants)
    remove_left_over(models / "finetuned", params.seeds)
    remove_left_over(models / "centre", params.geometry.centre)
    remove_left_over(models / "merged", params.merge.methods)
    remove_left_over(models / "periodic", params.periodic)
    remove_left_over(models / "longer", params.longer)
