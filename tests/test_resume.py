"""A damaged, missing or foreign resume point costs time and nothing else: the run ends with the same bytes."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from modelstock.errors import RoomError
from modelstock.notices import Notice, collected
from modelstock.training import resume
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import Inputs
from modelstock.training.job import Setting
from modelstock.training.loop import DamagedPoint, Run
from modelstock.training.periodic import Periodic
from modelstock.training.resume import ResumePoint, read_state, write_state
from tests.support.training import RECIPE, equal, examples, train, train_side_by_side


@pytest.fixture(autouse=True)
def after_every_step(monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)


@pytest.fixture
def steps(monkeypatch):
    """Every step that is taken from here on."""
    taken, step = [], Run._step
    monkeypatch.setattr(Run, "_step", lambda self, batch: (taken.append(self.step), step(self, batch)))
    return taken


class Stop(Exception):
    pass


def stopped(monkeypatch, cls, saves: int, work) -> None:
    """Do `work` until so many resume points are written."""
    left, save = [saves], cls.save

    def until(self, *arguments):
        save(self, *arguments)
        left[0] -= 1
        if not left[0]:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(cls, "save", until)
        with pytest.raises(Stop):
            work()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, anchor):
    """Runs of one seed and of two side by side: what they end with, and their folders, stopped on the way."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SAVE_EVERY_S", -1.0)
        stopped(patch, ResumePoint, 5, lambda: train(anchor, folder / "one" / "run"))
        stopped(patch, Periodic, 9, lambda: train_side_by_side(anchor, folder / "two" / "run"))
    one, two = train(anchor, folder / "one" / "whole"), train_side_by_side(anchor, folder / "two" / "whole")
    return {"one": one, "two": two, "folder": folder}


@pytest.fixture
def one(runs, tmp_path):
    """One seed's folder after five steps, and what it ends with."""
    return Path(shutil.copytree(runs["folder"] / "one" / "run", tmp_path / "run")), runs["one"]


@pytest.fixture
def two(runs, tmp_path):
    """The folder of two seeds side by side after nine saves, and what they end with."""
    return Path(shutil.copytree(runs["folder"] / "two" / "run", tmp_path / "run")), runs["two"]


def flipped(place: float):
    """Flip a bit at this share of a file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 16
        path.write_bytes(content)

    return damage


def truncated(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGE = {
    **{f"a bit at {place}": flipped(place) for place in (0, 0.01, 0.3, 0.7, 0.99, 1)},
    **{f"truncated to {share}": truncated(share) for share in (0, 0.001, 0.5, 0.9999)},
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another file": lambda path: path.write_bytes(b"PK\x03\x04 something else"),
}


def test_no_byte_of_a_point_can_change_unnoticed(tmp_path):
    path = tmp_path / "state.pt"
    write_state(path, {"a": 1, "b": [1.5, "text"]}, of="job/seed-0")
    assert read_state(path, of="job/seed-0") == {"a": 1, "b": [1.5, "text"]}
    with pytest.raises(DamagedPoint):
        read_state(path, of="job/seed-1")  # a point of another run
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedPoint):
            read_state(path, of="job/seed-0")
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedPoint):
            read_state(path, of="job/seed-0")


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_damage_to_the_last_point_the_one_before_is_taken(one, anchor, steps, damage):
    folder, (expected, history, averages) = one
    DAMAGE[damage](folder / "state.pt")
    steps.clear()
    with collected() as kept, pytest.warns(Notice) as given:
        found, again, averages_again = train(anchor, folder)
    assert [str(line.message) for line in given] == [
        f"{folder / 'state.pt'}: not used: not the bytes that this run wrote; "
        "the run goes on from step 4, to the same end"
    ]
    assert kept == []  # nothing of it is in what is written
    assert steps == list(range(4, 9))
    assert equal(found, expected)
    assert again == history
    assert all(equal(averages_again[name], averages[name]) for name in averages)


@pytest.mark.parametrize(
    ("damage", "first_step", "lines"),
    [
        ({"state.pt": flipped(0.5), "previous.pt": flipped(0.5)}, 0, 2),
        ({"state.pt": Path.unlink}, 4, 0),
        ({"state.pt": Path.unlink, "previous.pt": truncated(0.5)}, 0, 1),
        ({"previous.pt": flipped(0.5)}, 5, 0),
        ({"previous.pt": Path.unlink}, 5, 0),
        ({"history.jsonl": truncated(0.5)}, 5, 0),
    ],
)
def test_whatever_is_left_of_the_points_the_run_ends_with_the_same_bytes(
    one, runs, anchor, steps, damage, first_step, lines, recwarn
):
    folder, (expected, history, _) = one
    for name, change in damage.items():
        change(folder / name)
    steps.clear()
    found, again, _ = train(anchor, folder)
    assert len([line for line in recwarn if line.category is Notice]) == lines
    assert steps == list(range(first_step, 9))
    assert equal(found, expected)
    assert again == history
    assert (folder / "history.jsonl").read_bytes() == (runs["folder"] / "one/whole/history.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore:.*not used")
def test_a_point_of_another_run_is_not_taken(one, tmp_path, anchor, steps):
    folder, (expected, _, _) = one
    steps.clear()
    assert equal(train(anchor, Path(shutil.copytree(folder, tmp_path / "another job")))[0], expected)
    assert steps == list(range(9))


# ---------------------------------------------------------------- what lies beside the points


@pytest.mark.parametrize("damage", [flipped(0.7), truncated(0.5), Path.unlink])
def test_a_snapshot_that_is_not_what_was_written_is_made_again(tmp_path, anchor, monkeypatch, steps, damage):
    monkeypatch.chdir(tmp_path)
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities={})

    def work(out: str):
        return finetune_seed(
            inputs,
            RECIPE.model_copy(update={"snapshots": True}),
            name="seed-0",
            made_by={"stage": "finetune", "seed": 0},
            setting=Setting(),
            out=Path(out),
        )

    work("whole")
    stopped(monkeypatch, ResumePoint, 8, lambda: work("again"))
    (snapshot,) = Path("scratch").rglob("epoch-1.safetensors")
    damage(snapshot)
    steps.clear()
    with pytest.warns(Notice, match=r"not used: .*epoch-1\.safetensors is not the snapshot that was written"):
        work("again")
    assert steps == list(range(9))
    assert {p.name: p.read_bytes() for p in Path("again").iterdir()} == {
        p.name: p.read_bytes() for p in Path("whole").iterdir()
    }


# ---------------------------------------------------------------- several seeds side by side


def last(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: int(path.name.split(".")[1]))


@pytest.mark.parametrize("name", ["seed-0.*.pt", "seed-1.*.pt", "point.*.json"])
@pytest.mark.parametrize("damage", [flipped(0.3), flipped(0.98), truncated(0), truncated(0.6), Path.unlink])
def test_seeds_side_by_side_go_back_together_to_the_point_before(two, anchor, name, damage):
    folder, expected = two
    damage(last(folder, name))
    if (name, damage) == ("point.*.json", Path.unlink):
        found = train_side_by_side(anchor, folder)  # as if the save had been interrupted
    else:
        with pytest.warns(Notice, match=r"point\.9\.json: not used: "):
            found = train_side_by_side(anchor, folder)
    assert equal(found[0], expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.filterwarnings("ignore:.*not used")
def test_seeds_side_by_side_start_again_where_no_point_is_left(two, anchor):
    folder, expected = two
    for path in [*folder.glob("seed-0.*.pt"), *folder.glob("point.9.json")]:
        truncated(0.5)(path)
    found = train_side_by_side(anchor, folder)
    assert equal(found[0], expected[0])
    assert found[1:] == expected[1:]


def test_a_changed_number_of_what_seeds_share_is_noticed(two, anchor):
    folder, _ = two
    pointer = last(folder, "point.*.json")
    written = json.loads(pointer.read_text())
    written["history"][0]["loss/0"] += 1
    pointer.write_text(json.dumps(written))
    with pytest.warns(Notice, match="not used: not the bytes that this run wrote"):
        train_side_by_side(anchor, folder)


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("after", [0, 1000, 100_000])
def test_a_disk_that_is_full_while_a_point_is_written_is_one_line_and_nothing_is_lost(
    runs, tmp_path, anchor, monkeypatch, after
):
    expected, history, _ = runs["one"]
    folder, left = tmp_path / "run", [after + 3_000_000]
    write = resume._Hashed.write

    def full(self, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(resume._Hashed, "write", full)
        with pytest.raises(RoomError, match="No space left on device") as caught:
            train(anchor, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert list(folder.glob(".*")) == []
    found, again, _ = train(anchor, folder)
    assert equal(found, expected)
    assert again == history
