"""A disk that is full at any write: one line, nothing half-written, and the second run ends with the same bytes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from modelstock import files
from modelstock.data.dataset import open_dataset
from modelstock.errors import ModelstockError
from modelstock.experiment.merge import SubsetMerges, merge_method
from modelstock.merging.methods.table import METHODS
from modelstock.params import standard_section
from modelstock.scoring.one_pass import ScoringOptions, collect, score
from modelstock.scoring.results import Row, save_scores
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import Inputs
from modelstock.training.job import Setting
from modelstock.training.periodic import merge_periodically
from tests.support.splits import make_split
from tests.support.training import EVERY_EPOCH, RECIPE, examples


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """A project's folder, in which scratch/ is."""
    monkeypatch.chdir(tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden() -> list[Path]:
    """Files that a write has left half-written."""
    return [path for path in Path().rglob(".*") if path.is_file()]


def full_at_every_write(work: Callable[[Path], object], monkeypatch) -> int:
    """Have `work` find the disk full at its first write, its last and some between; returns how many there are."""
    fsync, writes = os.fsync, [0]

    def full_at(number: int | None) -> None:
        def count(descriptor):
            writes[0] += 1
            if writes[0] == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        writes[0] = 0
        monkeypatch.setattr(files.os, "fsync", count)

    full_at(None)
    work(Path("whole"))
    total = writes[0]
    for number in sorted({*range(1, total, -(-total // 6)), total}):
        shutil.rmtree("scratch", ignore_errors=True)
        out = Path(f"full-{number}")
        full_at(number)
        with pytest.raises(ModelstockError, match=r"No space left on device.*expected room for it") as caught:
            work(out)
        assert "\n" not in str(caught.value)
        assert hidden() == []
        full_at(None)
        shutil.rmtree(out, ignore_errors=True)  # as DVC does before it runs a stage
        work(out)
        assert content(out) == content(Path("whole"))
    return total


def test_of_a_seed_with_averages_and_snapshots(anchor, monkeypatch):
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities={})
    recipe, made_by = RECIPE.model_copy(update={"snapshots": True}), {"stage": "finetune", "seed": 0}

    def work(out):
        finetune_seed(inputs, recipe, name="seed-0", made_by=made_by, setting=Setting(), out=out)

    # The history at the start, two snapshots, a resume point and its history; six weight sets and two histories.
    assert full_at_every_write(work, monkeypatch) == 1 + 2 + 2 + 6 + 2


def test_of_seeds_side_by_side(anchor, monkeypatch):
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities={})

    def work(out):
        merge_periodically(inputs, RECIPE, EVERY_EPOCH, arm="test", seeds=[0, 1], setting=Setting(), out=out)

    assert full_at_every_write(work, monkeypatch) >= 8


def test_of_scores_and_their_cache(anchor, variants, monkeypatch):
    make_split(Path("data"), "shapes", 60)
    dataset = open_dataset(Path("data"))
    rows = [Row(f"seed-{i}", w.identity, "seed", (i,), {}) for i, w in enumerate(variants)]

    def work(out):
        options = ScoringOptions(cache=Path("scratch/scores"), batch_size=20)
        save_scores(out / "shapes.safetensors", collect(dataset, rows, score(dataset, variants, options=options)))

    assert full_at_every_write(work, monkeypatch) == len(variants) + 1


def test_of_merges_that_are_chosen_on_the_held_out_split(anchor, variants, monkeypatch):
    make_split(Path("data"), "held-out", 48)
    held_out = open_dataset(Path("data"))
    section = standard_section(METHODS["wise_ft"]).model_copy(update={"alphas": [0.3, 0.6], "sets": "all"})

    def work(out):
        merges = SubsetMerges(
            method="wise_ft",
            section=section,
            anchor=anchor,
            seeds=dict(enumerate(variants)),
            held_out=held_out,
            scoring=ScoringOptions(cache=Path("scratch/scores")),
        )
        merge_method(merges, out)

    # Two outcomes, two merges for the curve, and the report.
    assert full_at_every_write(work, monkeypatch) == 2 + 2 + 1
